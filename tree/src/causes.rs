use std::error::Error;

/// What people are told of `error`: its own text first, then each cause in turn.
///
/// Each is told once: where a text ends with that of its cause, as some libraries have it, the cause is cut off there
/// and stands for itself. The numbers that the system has for its errors (` (os error 2)`) are left out. Never empty.
pub fn causes(error: &(dyn Error + 'static)) -> Vec<String> {
    let mut texts = vec![without_numbers(&error.to_string())];
    let mut next = error.source();
    while let Some(cause) = next.filter(|_| texts.len() < CAUSES_MAX) {
        let text = without_numbers(&cause.to_string());
        let last = texts.last_mut().expect("there is one from the start");
        if let Some(outer) = last.strip_suffix(&text) {
            let outer = outer.trim_end();
            match outer.strip_suffix([':', ',']).map(str::len) {
                Some(len) if len > 0 => {
                    last.truncate(len);
                    texts.push(text);
                }
                // The whole of it, or part of a sentence.
                _ => {}
            }
        } else if !texts.contains(&text) {
            texts.push(text);
        }
        next = cause.source();
    }
    texts
}

/// The same in one line.
pub fn reason(error: &(dyn Error + 'static)) -> String {
    causes(error).join(": ")
}

/// Removes the numbers of system errors from `text`, and adds the remedy for too many open files.
fn without_numbers(text: &str) -> String {
    let mut parts = text.split(OS_ERROR);
    let mut plain = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        match part.split_once(')') {
            Some((TOO_MANY_FILES, rest)) => plain.extend([MORE_FILES, rest]),
            Some((number, rest)) if number.bytes().all(|b| b.is_ascii_digit()) => plain += rest,
            _ => plain.extend([OS_ERROR, part]),
        }
    }
    plain
}

const OS_ERROR: &str = " (os error ";
const TOO_MANY_FILES: &str = "24";
const MORE_FILES: &str = " (allow more: ulimit -n NUMBER, or LimitNOFILE=NUMBER in its unit)";
/// No chain is that long, unless it goes round in a circle.
const CAUSES_MAX: usize = 16;

#[cfg(test)]
mod tests {
    use std::{fmt, io};

    use super::*;

    /// Errors with these texts, each the cause of the one before.
    #[derive(Debug)]
    struct Chain(&'static [&'static str], Option<Box<Chain>>);

    fn chain(texts: &'static [&'static str]) -> Chain {
        let cause = if texts.len() > 1 { Some(Box::new(chain(&texts[1..]))) } else { None };
        Chain(texts, cause)
    }

    impl fmt::Display for Chain {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str(self.0[0])
        }
    }

    impl Error for Chain {
        fn source(&self) -> Option<&(dyn Error + 'static)> {
            self.1.as_deref().map(|cause| cause as _)
        }
    }

    #[test]
    fn each_cause_is_told_once() {
        for (texts, expected) in [
            (&["a"][..], &["a"][..]),
            (&["a", "b", "c"], &["a", "b", "c"]),
            (&["a: b", "b"], &["a", "b"]),
            (&["a: b: c", "b: c", "c"], &["a", "b", "c"]),
            (&["a: c", "b: c", "c"], &["a: c", "b", "c"]),
            (&["same", "same", "same"], &["same"]),
            (&["a", "b", "a"], &["a", "b"]),
            (&["it cannot read", "read"], &["it cannot read"]),
            (&[": a", "a"], &[": a"]),
            (&["open x (os error 2)", "gone (os error 2)"], &["open x", "gone"]),
            (&["open x: gone (os error 2)", "gone (os error 2)"], &["open x", "gone"]),
        ] {
            assert_eq!(causes(&chain(texts)), expected, "{texts:?}");
        }
        assert_eq!(reason(&chain(&["a: b", "b", "c"])), "a: b: c");
        // What wraps an error without a word of its own is no cause of its own.
        let wrapped = io::Error::other(io::Error::other(chain(&["a", "b"])));
        assert_eq!(causes(&wrapped), ["a", "b"]);
    }

    #[test]
    fn numbers_of_the_system() {
        let error = io::Error::from_raw_os_error(2);
        assert_eq!(error.to_string(), "No such file or directory (os error 2)");
        assert_eq!(reason(&error), "No such file or directory");
        for (text, expected) in [
            ("x (os error 2) y (os error 13)", "x y"),
            ("x (os error two)", "x (os error two)"),
            ("x (os error 2", "x (os error 2"),
            (" (os error 5)", ""),
        ] {
            assert_eq!(without_numbers(text), expected);
        }
    }
}
