use std::{
    ffi::{OsStr, OsString},
    fs::File,
    io::{self, Write},
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use axum::http::Method;
use data_encoding::HEXLOWER;
use rayon::prelude::*;
use serde::Serialize;
use serde_json::{Value, json};
use tree::{BlobId, ByteRange, Fingerprint};

use super::{daemon, daemon_or_home, style, text};
use crate::{
    args::{Common, CopyArgs, Retry},
    config::parse_duration,
    control::{FindBlob, Get, List, Read, Repair, Targets},
    failure::{Code, Failure, WhileDoing},
    fsverity,
    home::Home,
    node::{CopyScope, Place, READ_BYTES_MAX, Scope},
    output::{Style, WRITING, show},
    target::{BlobPrefix, JsonPath, Target},
};

/// `blob ls`
pub(crate) async fn ls(
    home: &Home,
    common: &Common,
    long: bool,
    recursive: bool,
    target: Option<OsString>,
) -> Result<Code, Failure> {
    let target = target.as_deref().map(Target::parse).transpose()?;
    let events = daemon(home)?.events("/v1/list", &List { target, recursive, brief: !long && !common.json }).await?;
    show(events, Style { long, ..style(common) }).await
}

/// `blob cat`
pub(crate) async fn cat(home: &Home, target: &OsStr, range: Option<&str>, peer: Option<&str>) -> Result<Code, Failure> {
    let client = daemon(home)?;
    let name = target.to_string_lossy();
    let by_id = BlobPrefix::parse(target).transpose()?;
    let stat = match &by_id {
        Some(prefix) => client.value(Method::POST, "/v1/blob", &FindBlob { prefix: prefix.clone() }).await?,
        None => client.value(Method::POST, "/v1/stat", &Target::parse(target)?).await?,
    };
    let target = name;
    let shown = match peer.filter(|_| by_id.is_none()) {
        None => &stat,
        Some(peer) => {
            let mut versions = stat["versions"].as_array().into_iter().flatten();
            versions.find(|version| text(version, "peer") == peer).ok_or_else(|| {
                Failure::new(Code::NotFound, format!("{target} has no version at {peer}"))
                    .hint(format!("see which it has with: blob stat {target}"))
            })?
        }
    };
    let (Some(size), Ok(blob)) = (shown["size"].as_u64(), text(shown, "blob").parse::<BlobId>()) else {
        return Err(Failure::new(Code::Usage, format!("{target} is not a file")));
    };
    let range = range.map_or(Ok((0, size)), |range| parse_range(range, size))?;
    // The blob is settled now: a version that comes meanwhile does not mix with it.
    let (mut start, end) = range;
    let mut out = io::stdout();
    while start < end {
        let part = ByteRange::new(start, end.min(start + READ_BYTES_MAX)).unwrap_or_default();
        let read = Read { blob, size, range: part };
        let bytes = tokio::select! {
            bytes = client.bytes(Method::POST, "/v1/read", &read) => bytes.while_doing(format!("read {target}"))?,
            _ = tokio::signal::ctrl_c() => return Err(Failure::new(Code::Interrupted, "interrupted")),
        };
        if bytes.len() as u64 != part.len() {
            return Err(Failure::new(
                Code::Error,
                format!("{} bytes came where {} were asked for", bytes.len(), part.len()),
            ));
        }
        out.write_all(&bytes).while_doing(WRITING)?;
        start = part.end();
    }
    out.flush().while_doing(WRITING)?;
    Ok(Code::Ok)
}

/// Reads `A..B` for a file of `size` bytes; what is behind its end is cut off.
fn parse_range(text: &str, size: u64) -> Result<(u64, u64), Failure> {
    let usage =
        || Failure::new(Code::Usage, format!("{text:?} is not a range")).hint("a range is A..B, such as 0..1024");
    let (start, end) = text.split_once("..").ok_or_else(usage)?;
    let number = |text: &str, default| if text.is_empty() { Ok(default) } else { text.parse().map_err(|_| usage()) };
    let (start, end) = (number(start, 0)?, number(end, size)?);
    if start > end && !text.ends_with("..") { Err(usage()) } else { Ok((start.min(size), end.min(size))) }
}

/// `blob get`
pub(crate) async fn get(
    home: &Home,
    common: &Common,
    mut targets: Vec<OsString>,
    retry: Retry,
) -> Result<Code, Failure> {
    let Some(to) = targets.pop() else { return Err(Failure::new(Code::Usage, "nothing to get")) };
    let to = std::path::absolute(Path::new(&to)).while_doing(format!("find {to:?}"))?;
    let to = JsonPath::from(to.as_os_str().as_bytes());
    let (mut blobs, mut paths) = (Vec::new(), Vec::new());
    for target in &targets {
        match BlobPrefix::parse(target) {
            Some(blob) => blobs.push(blob?),
            None => paths.push(Target::parse(target)?),
        }
    }
    show(
        daemon(home)?.events("/v1/get", &Get { targets: paths, blobs, to, retry_s: retry.seconds() }).await?,
        style(common),
    )
    .await
}

/// `blob cp` and `blob mv`
pub(crate) async fn copy(home: &Home, common: &Common, args: CopyArgs, moves: bool) -> Result<Code, Failure> {
    let CopyArgs { mut targets, overwrite, dry_run, retry } = args;
    let Some(to) = targets.pop() else { return Err(Failure::new(Code::Usage, "nothing to copy")) };
    let (to, into) = Place::parse(&to)?;
    let sources = targets.iter().map(|source| Ok(Place::parse(source)?.0)).collect::<Result<_, Failure>>()?;
    let scope = CopyScope {
        sources,
        to,
        into,
        moves,
        overwrite,
        dry_run,
        retry_s: retry.seconds(),
        retry_silent: retry.is_given(),
    };
    show(daemon(home)?.events("/v1/copy", &scope).await?, style(common)).await
}

/// `blob hash`
pub(crate) fn hash(common: &Common, fsverity: bool, files: &[PathBuf]) -> Result<Code, Failure> {
    let line = |path: &PathBuf| match fsverity {
        true => Ok(fsverity_line(path, &at_rest(path, fsverity::digest)?, common.json)),
        false => Ok(blob_id_line(path, at_rest(path, tree::blob_id)?, common.json)),
    };
    let mut out = io::BufWriter::new(io::stdout());
    let mut code = Code::Ok;
    for batch in files.chunks(HASH_AT_ONCE) {
        let lines: Vec<io::Result<Vec<u8>>> = batch.par_iter().map(line).collect();
        for (path, line) in batch.iter().zip(lines) {
            match line {
                Ok(line) => out.write_all(&line).while_doing(WRITING)?,
                Err(error) => {
                    out.flush().while_doing(WRITING)?;
                    eprintln!("{}", Failure::from(error).while_doing(format!("hash {path:?}")));
                    code = if files.len() == 1 { Code::Error } else { Code::Some };
                }
            }
        }
    }
    out.flush().while_doing(WRITING)?;
    Ok(code)
}

/// Reads a file of that size with `read`, and makes sure that it was the same before and after.
fn at_rest<T>(path: &Path, read: impl FnOnce(&File, u64) -> io::Result<T>) -> io::Result<T> {
    let file = File::open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    let before = Fingerprint::from(&file.metadata()?);
    let value = read(&file, before.size)?;
    if Fingerprint::from(&file.metadata()?) != before {
        return Err(io::Error::other("it changed while it was read"));
    }
    Ok(value)
}

/// As `fsverity digest` prints it, which escapes nothing.
fn fsverity_line(path: &Path, digest: &[u8], json: bool) -> Vec<u8> {
    let name = path.as_os_str().as_bytes();
    let digest = format!("sha256:{}", HEXLOWER.encode(digest));
    if json {
        return json_line(name, json!({"type": "fsverity", "digest": digest}));
    }
    [digest.as_bytes(), b" ", name, b"\n"].concat()
}

/// As b3sum prints it.
fn blob_id_line(path: &Path, id: BlobId, json: bool) -> Vec<u8> {
    let name = path.as_os_str().as_bytes();
    if json {
        return json_line(name, json!({"type": "hash", "blob": id}));
    }
    let escaped = escaped(name);
    let mark: &[u8] = if escaped == name { b"" } else { b"\\" };
    [mark, id.to_string().as_bytes(), b"  ", &escaped, b"\n"].concat()
}

fn json_line(name: &[u8], mut line: Value) -> Vec<u8> {
    let JsonPath { path, path_bytes } = name.into();
    line["path"] = path.into();
    if let Some(bytes) = path_bytes {
        line["path_bytes"] = bytes.into();
    }
    format!("{line}\n").into_bytes()
}

/// A name as b3sum prints it: a line break and a backslash are escaped.
fn escaped(name: &[u8]) -> Vec<u8> {
    let mut escaped = Vec::with_capacity(name.len());
    for &byte in name {
        match byte {
            b'\n' => escaped.extend_from_slice(b"\\n"),
            b'\\' => escaped.extend_from_slice(b"\\\\"),
            byte => escaped.push(byte),
        }
    }
    escaped
}

/// `blob verify`
pub(crate) async fn verify(
    home: &Home,
    common: &Common,
    targets: &[OsString],
    sample: Option<&str>,
    budget: Option<&str>,
) -> Result<Code, Failure> {
    let usage = |text: &str, what| Failure::new(Code::Usage, format!("{text:?} is no {what}"));
    let fraction = |text: &str| {
        let percent = text.strip_suffix('%').unwrap_or(text).trim().parse::<f64>().ok();
        let percent = percent.filter(|percent| *percent > 0.0 && *percent <= 100.0);
        percent.map(|percent| percent / 100.0).ok_or_else(|| usage(text, "part of everything, such as 5%"))
    };
    let seconds = |text: &str| {
        let duration = parse_duration(text).filter(|duration| !duration.is_zero());
        duration.map(|duration| duration.as_secs().max(1)).ok_or_else(|| usage(text, "time to spend, such as 30m"))
    };
    let scope = Scope {
        targets: parsed(targets)?,
        sample: sample.map(fraction).transpose()?,
        budget_s: budget.map(seconds).transpose()?,
    };
    look_over(home, common, "/v1/verify", &scope).await
}

/// `blob repair`
pub(crate) async fn repair(
    home: &Home,
    common: &Common,
    suspect: bool,
    undo: bool,
    retry: Retry,
    targets: &[OsString],
) -> Result<Code, Failure> {
    let scope = Repair { targets: parsed(targets)?, suspect, undo, retry_s: retry.seconds() };
    look_over(home, common, "/v1/repair", &scope).await
}

/// `blob accept`
pub(crate) async fn accept(home: &Home, common: &Common, targets: &[OsString]) -> Result<Code, Failure> {
    look_over(home, common, "/v1/accept", &Targets { targets: parsed(targets)? }).await
}

pub(super) fn parsed(targets: &[OsString]) -> Result<Vec<Target>, Failure> {
    targets.iter().map(|target| Target::parse(target)).collect()
}

async fn look_over(home: &Home, common: &Common, path: &str, body: &impl Serialize) -> Result<Code, Failure> {
    let (client, node) = daemon_or_home(home)?;
    let outcome = match client.events(path, body).await {
        Ok(events) => show(events, style(common)).await,
        Err(failure) => Err(failure),
    };
    if let Some(node) = node {
        node.shutdown().await;
    }
    outcome
}

const HASH_AT_ONCE: usize = 256;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_changes_while_it_is_read_has_no_digest() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert_eq!(at_rest(file.path(), |_, size| Ok(size)).unwrap(), 0);
        let error = at_rest(file.path(), |_, _| std::fs::write(file.path(), "more")).unwrap_err();
        assert_eq!(error.to_string(), "it changed while it was read");
    }

    #[test]
    fn ranges() {
        for (text, expected) in [
            ("0..5", Some((0, 5))),
            ("5..", Some((5, 100))),
            ("..5", Some((0, 5))),
            ("..", Some((0, 100))),
            ("90..200", Some((90, 100))),
            ("200..300", Some((100, 100))),
            ("200..", Some((100, 100))),
            ("5..4", None),
            ("5", None),
            ("a..b", None),
            ("-1..5", None),
        ] {
            assert_eq!(parse_range(text, 100).ok(), expected, "{text}");
        }
    }
}
