//! Several ways to do one thing, round by round, each once a round, so that all of them meet the same machine.

use std::{io, time::Duration};

use crate::median;

/// What one run took.
#[derive(Default)]
pub(crate) struct Run {
    pub(crate) time: Duration,
    /// Bytes on the device or link, both ways, headers and acknowledgements included.
    pub(crate) wire: Option<u64>,
    /// Bytes that it says it received.
    pub(crate) told: Option<u64>,
    /// How long the sender's processors worked for it. Known to 10 ms, so the mean is what is shown.
    pub(crate) cpu: Option<Duration>,
}

/// Does it once, and puts everything back; `None` if it is not installed.
type Rival<'a> = Box<dyn FnMut() -> io::Result<Option<Run>> + 'a>;

/// Rivals at one thing.
pub(crate) struct Race<'a> {
    title: String,
    /// What is moved or done, for the rate, and of what there are so many.
    amount: f64,
    unit: &'static str,
    rivals: Vec<(String, Rival<'a>)>,
}

impl<'a> Race<'a> {
    /// Rivals at moving so many bytes.
    pub(crate) fn new(title: impl Into<String>, bytes: u64) -> Self {
        let title = format!("{}: {:.1} MiB", title.into(), bytes as f64 / f64::from(1 << 20));
        Self { title, amount: bytes as f64 / 1e6, unit: "MB/s", rivals: Vec::new() }
    }

    /// Rivals at doing something so many times.
    pub(crate) fn counting(title: impl Into<String>, count: u64) -> Self {
        Self { title: title.into(), amount: count as f64 / 1e3, unit: "k/s", rivals: Vec::new() }
    }

    pub(crate) fn add(&mut self, name: &str, rival: impl FnMut() -> io::Result<Option<Run>> + 'a) {
        self.rivals.push((name.to_owned(), Box::new(rival)));
    }

    /// Runs the first that is installed once without counting it: so the first one that counts, too, comes when
    /// everything has been read, and much was deleted.
    pub(crate) fn rehearse(&mut self) -> io::Result<()> {
        for (_, rival) in &mut self.rivals {
            if rival()?.is_some() {
                break;
            }
        }
        Ok(())
    }

    /// Runs all, so many rounds, and prints what came of it.
    pub(crate) fn run(mut self, rounds: usize) -> io::Result<()> {
        let mut runs: Vec<Vec<Run>> = self.rivals.iter().map(|_| Vec::new()).collect();
        for _ in 0..rounds {
            for ((_, rival), runs) in self.rivals.iter_mut().zip(&mut runs) {
                runs.extend(rival()?);
            }
        }
        println!("{}, medians of {rounds}", self.title);
        let mut first = None;
        for ((name, _), runs) in self.rivals.iter().zip(&runs) {
            let times: Vec<_> = runs.iter().map(|run| run.time).collect();
            let Some(time) = median(&times) else {
                println!("  {name:32} not installed");
                continue;
            };
            let seconds = time.as_secs_f64();
            let ratio = first.get_or_insert(seconds).to_owned() / seconds;
            let [least, most] =
                [times.iter().min(), times.iter().max()].map(|time| time.map_or(0.0, |time| time.as_secs_f64()));
            let (rate, unit) = (self.amount / seconds, self.unit);
            let mut line =
                format!("  {name:32} {seconds:8.3} s ({least:.3} to {most:.3}) {rate:7.1} {unit} {ratio:6.2} x");
            for (what, bytes) in [("on the wire", column(runs, |run| run.wire)), ("told", column(runs, |run| run.told))]
            {
                line += &bytes.map_or(String::new(), |bytes| format!(" {:10.1} KiB {what}", bytes as f64 / 1024.0));
            }
            if let Some(cpu) = runs.iter().map(|run| run.cpu).sum::<Option<Duration>>() {
                line += &format!(" {:7.3} s of CPU", cpu.as_secs_f64() / runs.len() as f64);
            }
            println!("{line}");
        }
        Ok(())
    }
}

/// The median of what runs tell.
fn column<T: Ord + Copy>(runs: &[Run], of: impl Fn(&Run) -> Option<T>) -> Option<T> {
    let mut values: Vec<T> = runs.iter().filter_map(of).collect();
    values.sort_unstable();
    values.get(values.len() / 2).copied()
}
