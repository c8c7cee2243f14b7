//! What peers say in frames: catalogs, how far they were heard, and who they are.

#![no_main]

use std::fmt::Debug;

use libfuzzer_sys::fuzz_target;
use namespace::{Batch, Cursor};
use peers::wire::{Ask, Hello};
use serde::{Serialize, de::DeserializeOwned};

fuzz_target!(|frame: &[u8]| {
    for statement in round_trip::<Batch>(frame).into_iter().flat_map(|batch| batch.statements) {
        let (arena, path) = (statement.arena.as_str(), statement.path.as_bytes());
        assert!((1..=255).contains(&arena.len()) && !arena.contains(['/', ':', '\0']), "{arena:?}");
        assert!((1..=4096).contains(&path.len()) && !path.contains(&0), "{path:?}");
        assert!(
            path.split(|&byte| byte == b'/').all(|part| part.len() <= 255 && !matches!(part, b"" | b"." | b"..")),
            "{path:?}"
        );
    }
    round_trip::<Cursor>(frame);
    round_trip::<Ask>(frame);
    round_trip::<Hello>(frame);
});

/// What a frame says; it must be the same once it is written and read again.
fn round_trip<T: Serialize + DeserializeOwned + PartialEq + Debug>(frame: &[u8]) -> Option<T> {
    let value: T = postcard::from_bytes(frame).ok()?;
    let again = postcard::to_stdvec(&value).expect("a vector takes any number of bytes");
    assert_eq!(postcard::from_bytes(&again).as_ref(), Ok(&value));
    Some(value)
}
