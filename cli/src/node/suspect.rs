//! Files of which nobody can tell whether they rotted or were edited: what is said of them, and what the user decides.
//! Rules: spec/store.md, "Suspect files".

use std::time::Duration;

use blobstore::Verdict;
use namespace::Content;
use serde_json::json;
use tree::{ByteRange, RangeSet};

use super::{
    Node, blocking,
    verify::{Damaged, Subject, in_words, now},
};
use crate::{
    event::{Event, FileName, Reporter, summary},
    failure::{Code, Failure, WhileDoing},
    target::Target,
};

impl Node {
    /// Publishes the suspect and damaged files at and below `targets` as they are: the user says that they were edited.
    pub(crate) async fn accept(&self, targets: Vec<Target>, reporter: &Reporter) -> Result<Code, Failure> {
        let what = in_words("accept", &targets);
        let accepted = async {
            let _turn = self.turn().await;
            let node = self.clone();
            let scope = targets.clone();
            let doubtful = blocking(move || {
                let mut doubtful: Vec<(Target, FileName)> = Vec::new();
                node.for_each_subject(&scope, &[], &mut |subject: Subject| {
                    if subject.is_suspect || subject.is_quarantined {
                        doubtful.extend(subject.target().map(|target| (target, subject.name())));
                    }
                    Ok(())
                })?;
                Ok(doubtful)
            });
            let doubtful = doubtful.await?;
            for target in &targets {
                self.reconcile(&target.arena, vec![target.path.clone()], true, reporter).await?;
            }
            Ok::<_, Failure>(doubtful)
        };
        let doubtful = accepted.await.while_doing(what)?;
        let mut accepted = 0u64;
        for (target, file) in doubtful {
            let Some(path) = &target.path else { continue };
            let versions = self.inner.namespace.versions(&target.arena, path)?;
            let mine = versions.into_iter().find(|(peer, _)| peer.is_none());
            if let Some(Content::File { blob, .. }) = mine.map(|(_, version)| version.content) {
                accepted += 1;
                reporter.send(Event::Accepted { file, blob }).await?;
            }
        }
        self.update_status().await?;
        reporter.send(summary(json!({ "accepted_files": accepted }))).await?;
        Ok(Code::Ok)
    }

    /// Puts back what the latest repair of each file at or below `targets` replaced.
    pub(crate) async fn undo_repair(&self, targets: Vec<Target>, reporter: &Reporter) -> Result<Code, Failure> {
        let _turn = self.turn().await;
        let (node, what) = (self.clone(), in_words("undo the repair of", &targets));
        let undone = blocking(move || {
            let mut undone = Vec::new();
            for target in &targets {
                let mut found = false;
                for (arena, file) in node.repaired_files(target)? {
                    let repair = node.inner.store.undo_repair(&file, now())?;
                    found |= repair.is_some();
                    undone.extend(repair.map(|repair| (FileName::new(&arena, &file.path), repair.ranges)));
                }
                if !found {
                    let failure = Failure::new(Code::NotFound, format!("no repair of {target} is saved"));
                    return Err(failure.hint("see which there were with: blob history"));
                }
            }
            Ok(undone)
        });
        let undone = undone.await.while_doing(what)?;
        let (files, bytes) = (undone.len(), undone.iter().map(|(_, ranges)| ranges.total_bytes()).sum::<u64>());
        for (file, ranges) in undone {
            reporter.send(Event::Undone { file, ranges }).await?;
        }
        reporter.send(summary(json!({ "undone_files": files, "bytes": bytes }))).await?;
        Ok(Code::Ok)
    }

    /// The event that lists a suspect file; with `explain`, how it differs, if good bytes can be had soon.
    pub(super) async fn suspect_event(&self, suspect: &Damaged, explain: bool) -> Result<Event, Failure> {
        let ranges = match &suspect.verdict {
            Verdict::Suspect { data } => data.clone(),
            _ => RangeSet::new(),
        };
        let difference = if explain { self.difference(suspect, &ranges).await? } else { None };
        Ok(Event::Suspect { file: suspect.name.clone(), blob: suspect.blob, ranges, difference })
    }

    /// How the bytes of a suspect file in `ranges` differ from the good ones, in words; `None` if these cannot be had soon.
    async fn difference(&self, suspect: &Damaged, ranges: &RangeSet) -> Result<Option<String>, Failure> {
        let Some((_, file)) = suspect.place.clone() else { return Ok(None) };
        let store = self.inner.store.clone();
        let Some(row) = store.file(&file)?.filter(|row| row.blob == suspect.blob) else { return Ok(None) };
        let size = row.fingerprint.size;
        let (mut compared, mut left) = (Difference::default(), COMPARED_BYTES_MAX);
        for range in ranges.iter() {
            let part = ByteRange::new(range.start(), range.end().min(range.start() + left)).unwrap_or_default();
            if part.is_empty() {
                break;
            }
            left -= part.len();
            let good = tokio::time::timeout(GOOD_BYTES_WAIT, self.read(suspect.blob, size, part)).await;
            let Ok(Ok(good)) = good else { return Ok(None) };
            let (store, file) = (store.clone(), file.clone());
            let Some(here) = blocking(move || Ok(store.read_unproven(&file, part))).await? else { return Ok(None) };
            compared.add(part.start(), &here, &good.concat());
        }
        let is_all = ranges.total_bytes() <= COMPARED_BYTES_MAX;
        let to_end = ranges.iter().next_back().is_some_and(|last| last.end() == size);
        Ok(compared.in_words(is_all, to_end && ranges.iter().len() == 1))
    }
}

/// How bytes differ from the right ones.
#[derive(Debug, Default)]
struct Difference {
    /// Bits of bytes that both have.
    bits: u64,
    /// Bytes that differ, or that are only among the right ones.
    bytes: u64,
    /// Runs of such bytes.
    runs: u64,
    /// Those that are zero here and are not to be.
    zeros: u64,
    /// Where the first one is.
    first: Option<u64>,
    /// Right behind the last one.
    end: u64,
}

impl Difference {
    /// Compares the bytes from `offset` on: those `here`, of which some may be missing at the end, and the `good` ones.
    fn add(&mut self, offset: u64, here: &[u8], good: &[u8]) {
        for (at, good) in (offset..).zip(good) {
            let here = here.get((at - offset) as usize);
            if here == Some(good) {
                continue;
            }
            self.bits += here.map_or(8, |here| u64::from((here ^ good).count_ones()));
            self.bytes += 1;
            self.zeros += u64::from(here.is_none_or(|here| *here == 0));
            self.runs += u64::from(self.first.is_none() || self.end != at);
            self.first = self.first.or(Some(at));
            self.end = at + 1;
        }
    }

    /// In words; `None` if nothing differs. `is_all` tells whether everything that may differ was compared, `to_end` whether
    /// that is one range up to the end of the file.
    fn in_words(&self, is_all: bool, to_end: bool) -> Option<String> {
        let first = self.first?;
        let size = |bytes: u64| indicatif::BinaryBytes(bytes).to_string().replace(".00", "");
        let plural = |count: u64, one: &str| if count == 1 { format!("1 {one}") } else { format!("{count} {one}s") };
        let dense = self.bytes > self.end.saturating_sub(first) / 2;
        Some(if !is_all && to_end && dense {
            format!("everything from {} on", size(first))
        } else if !is_all {
            format!("more than {}", size(self.bytes))
        } else if self.bits <= 8 {
            plural(self.bits, "bit")
        } else if self.zeros == self.bytes && self.runs < self.bytes.max(16) / 8 {
            format!("{} of zeros", size(self.end - first))
        } else if self.runs <= 4 || !dense {
            format!("{} in {}", size(self.bytes), plural(self.runs, "place"))
        } else {
            format!("{} from byte {first} on", size(self.end - first))
        })
    }
}

/// So much of each suspect file is compared.
const COMPARED_BYTES_MAX: u64 = 1 << 20;
/// How long good bytes are waited for, only to describe a difference.
const GOOD_BYTES_WAIT: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_in_words() {
        let good: Vec<u8> = (0..100_000u32).map(|n| (n % 251) as u8 + 1).collect();
        let check = |here: &[u8], is_all, to_end, expected: Option<&str>| {
            let mut difference = Difference::default();
            difference.add(0, here, &good);
            assert_eq!(difference.in_words(is_all, to_end).as_deref(), expected);
        };
        let changed = |change: &dyn Fn(&mut Vec<u8>)| {
            let mut here = good.clone();
            change(&mut here);
            here
        };
        check(&good, true, false, None);
        check(&changed(&|here| here[70_000] ^= 4), true, false, Some("1 bit"));
        check(&changed(&|here| here[70_000] ^= 7), true, false, Some("3 bits"));
        check(&changed(&|here| here[4096..8192].fill(0)), true, false, Some("4 KiB of zeros"));
        check(&changed(&|here| here[10..12].copy_from_slice(b"\xff\xff")), true, false, Some("2 B in 1 place"));
        check(&changed(&|here| here[2048..].fill(0xff)), false, true, Some("everything from 2 KiB on"));
        check(&good[..50_000], true, true, Some("48.83 KiB of zeros"));
    }
}
