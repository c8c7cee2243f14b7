//! Which events are told at all. Rules: spec/logging.md, "Filter".

use tracing_subscriber::{EnvFilter, filter::LevelFilter};

use crate::failure::{Code, Failure};

/// The filter that `text` describes, which is at level `default` where it says nothing else.
pub(super) fn filter(text: &str, default: LevelFilter) -> Result<EnvFilter, Failure> {
    EnvFilter::builder().parse(directives(text, default)).map_err(|error| {
        let what = format!("understand BLOBD_LOG={text:?}");
        let hint = "such as debug, or info,peers=debug: a level, and TARGET=LEVEL, with commas between";
        Failure::from(error).while_doing(what).code(Code::Usage).hint(hint)
    })
}

/// What `text` says, with a level of its own for each of our crates; those of others tell no more than warnings, unless
/// they are named.
fn directives(text: &str, default: LevelFilter) -> String {
    let (mut general, mut named) = (default, Vec::new());
    for directive in text.split(',').map(str::trim).filter(|directive| !directive.is_empty()) {
        match directive.parse() {
            Ok(level) => general = level,
            Err(_) => named.push(directive.to_owned()),
        }
    }
    let mut directives = vec![general.min(LevelFilter::WARN).to_string()];
    directives.extend(OURS.map(|name| format!("{name}={general}")));
    directives.extend(named);
    directives.join(",")
}

const OURS: [&str; 5] = ["tree", "blobstore", "namespace", "peers", "cli"];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_level_is_that_of_our_crates() {
        let ours = |level: &str| OURS.map(|name| format!("{name}={level}")).join(",");
        for (text, expected) in [
            ("", format!("warn,{}", ours("info"))),
            ("trace", format!("warn,{}", ours("trace"))),
            ("TRACE", format!("warn,{}", ours("trace"))),
            ("error", format!("error,{}", ours("error"))),
            ("off", format!("off,{}", ours("off"))),
            ("debug, quinn=trace", format!("warn,{},quinn=trace", ours("debug"))),
            ("cli::node=debug,", format!("warn,{},cli::node=debug", ours("info"))),
        ] {
            assert_eq!(directives(text, LevelFilter::INFO), expected, "{text:?}");
            assert!(filter(text, LevelFilter::INFO).is_ok());
        }
        let failure = filter("peers=loud", LevelFilter::INFO).unwrap_err();
        assert_eq!(failure.code, Code::Usage);
    }
}
