use std::{ffi::OsStr, os::unix::ffi::OsStrExt};

use serde_json::Value;

/// Bytes in a chunk group.
pub const GROUP_BYTES: u64 = 16 << 10;

/// The chunk groups of a file of `size` bytes that hold `offsets`, as `--json` output says them: those that touch
/// are one range, and the last one ends with the file.
pub fn groups_of(size: u64, offsets: &[u64]) -> Vec<(u64, u64)> {
    let mut starts: Vec<u64> = offsets.iter().map(|offset| offset / GROUP_BYTES * GROUP_BYTES).collect();
    starts.sort();
    starts.dedup();
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    for start in starts {
        let end = (start + GROUP_BYTES).min(size);
        match ranges.last_mut() {
            Some(last) if last.1 == start => last.1 = end,
            _ => ranges.push((start, end)),
        }
    }
    ranges
}

/// The ranges of a line of `--json` output.
#[track_caller]
pub fn ranges_of(line: &Value) -> Vec<(u64, u64)> {
    serde_json::from_value(line["ranges"].clone()).unwrap_or_else(|error| panic!("{error}: {line}"))
}

/// The path of a line of `--json` output, exactly.
#[track_caller]
pub fn path_of(line: &Value) -> Vec<u8> {
    match line["path_bytes"].as_str() {
        Some(encoded) => data_encoding::BASE64.decode(encoded.as_bytes()).expect("base 64"),
        None => line["path"].as_str().unwrap_or_else(|| panic!("no path: {line}")).as_bytes().to_owned(),
    }
}

/// `ARENA/PATH` as an argument.
pub fn target(arena: &str, path: &[u8]) -> std::ffi::OsString {
    OsStr::from_bytes(&[arena.as_bytes(), b"/", path].concat()).to_owned()
}
