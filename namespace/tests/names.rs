//! Names at the edges that the tables beside their code leave out.

use namespace::{ArenaName, PeerId, RelPath};
use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// The rule written down once more, over bytes that are likely to break it.
    #[test]
    fn paths_as_the_rule_says(bytes in prop::collection::vec(prop::sample::select(b"a./\0\xff".to_vec()), 0..12)) {
        let parts: Vec<&[u8]> = bytes.split(|&b| b == b'/').collect();
        let good = parts.iter().all(|part| !part.is_empty() && *part != b"." && *part != b"..") && !bytes.contains(&0);
        let path = RelPath::try_from(bytes.clone());
        prop_assert_eq!(path.is_ok(), good);
        let Ok(path) = path else { return Ok(()) };
        prop_assert_eq!(path.as_bytes(), &bytes[..]);
        prop_assert!(path.is_within(&path));

        let (last, above) = parts.split_last().unwrap();
        if !above.is_empty() {
            let dir = RelPath::try_from(above.join(&b'/')).unwrap();
            prop_assert_eq!(dir.join(last).unwrap(), path.clone());
            prop_assert!(path.is_within(&dir) && !dir.is_within(&path));
        }
    }
}

#[test]
fn joining_cannot_climb() {
    let dir = RelPath::try_from("a/b").unwrap();
    for name in [&b""[..], b".", b"..", b"/", b"/x", b"x/", b"../x", b"x\0", &[b'x'; 256]] {
        assert!(dir.join(name).is_err(), "{name:?}");
    }
    assert_eq!(dir.join(b"\xff:").unwrap().as_bytes(), b"a/b/\xff:");
}

#[test]
fn the_longest_path() {
    let longest = [&b"x/".repeat(2047)[..], b"xx"].concat();
    assert_eq!(longest.len(), 4096);
    let path = RelPath::try_from(longest.clone()).unwrap();
    assert!(path.join(b"x").is_err());
    assert!(RelPath::try_from([&longest[..], b"x"].concat()).is_err());
}

#[test]
fn the_longest_arena() {
    assert!("ä".repeat(127).parse::<ArenaName>().is_ok());
    assert!("ä".repeat(128).parse::<ArenaName>().is_err(), "256 bytes in 128 characters");
}

/// What refuses a name shows only the beginning of it, however long it is.
#[test]
fn refusals_are_short() {
    let long = "ä\n".repeat(100_000);
    assert!(long.parse::<ArenaName>().unwrap_err().to_string().len() < 1000);
    assert!(long.parse::<PeerId>().unwrap_err().to_string().len() < 1000);
    assert!(RelPath::try_from(&long[..]).unwrap_err().to_string().len() < 1000);
}

#[test]
fn a_peer_as_text() {
    let peer = PeerId::from_bytes(std::array::from_fn(|n| n as u8 * 8));
    let text = "0008101820283038404850586068707880889098a0a8b0b8c0c8d0d8e0e8f0f8";
    assert_eq!(peer.to_string(), text);
    assert_eq!(text.parse(), Ok(peer));
    assert_eq!(text.to_uppercase().parse(), Ok(peer));
    for bad in ["", &text[1..], &text[2..], &format!("{text}00"), &format!(" {text}"), &"g".repeat(64)] {
        assert!(bad.parse::<PeerId>().is_err(), "{bad:?}");
    }
}
