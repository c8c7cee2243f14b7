//! File ids and handles: functions of names alone, so that they outlive the daemon. Bytes: spec/nfs.md, "The tree".

use namespace::ArenaName;

/// The id of the root.
pub(crate) const ROOT: u64 = 2;

/// Makes ids.
#[derive(Clone)]
pub(crate) struct Ids(pub(crate) [u8; 32]);

impl Ids {
    /// The id of a path, which is empty for the arena itself: 16 to 2⁶³ − 1.
    pub(crate) fn of(&self, arena: &ArenaName, path: &[u8]) -> u64 {
        let mut hasher = blake3::Hasher::new_keyed(&self.0);
        hasher.update(arena.as_str().as_bytes()).update(&[0]).update(path);
        let [a, b, c, d, e, f, g, h, ..] = *hasher.finalize().as_bytes();
        (u64::from_be_bytes([a, b, c, d, e, f, g, h]) >> 1).max(LOWEST)
    }
}

/// What a client holds of a directory, a file or a link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Handle {
    pub(crate) id: u64,
    /// The id of the directory that it is in; 0 for the root.
    pub(crate) parent: u64,
    /// What the blob id of a file begins with; 0 for what is no file.
    pub(crate) version: u64,
    /// How many directories lie between the root and the one that it is in.
    depth: u16,
    /// What their ids begin with.
    trail: Vec<u8>,
}

impl Handle {
    pub(crate) fn root() -> Self {
        Self { id: ROOT, parent: 0, version: 0, depth: 0, trail: Vec::new() }
    }

    /// Of something in the directory `parent`, which is below the directories `above`, those from the arena down.
    pub(crate) fn new(id: u64, version: u64, parent: u64, above: &[u64]) -> Self {
        let depth = u16::try_from(above.len()).unwrap_or(u16::MAX);
        let width = width(depth);
        let mut trail: Vec<u8> = above.iter().flat_map(|id| id.to_be_bytes().into_iter().take(width)).collect();
        trail.truncate(TRAIL_BYTES);
        Self { id, parent, version, depth, trail }
    }

    pub(crate) fn is_root(&self) -> bool {
        self.parent == 0
    }

    /// How many directories lie between the root and the one that it is in.
    pub(crate) fn depth(&self) -> usize {
        self.depth.into()
    }

    /// Whether `id` may be that of the directory with number `at` on the way, the arena being 0.
    pub(crate) fn may_pass(&self, at: usize, id: u64) -> bool {
        let width = width(self.depth);
        let told = self.trail.iter().skip(at * width).take(width);
        id.to_be_bytes().iter().zip(told).all(|(a, b)| a == b)
    }

    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let [high, low] = self.depth.to_be_bytes();
        let mut bytes = vec![FORMAT, high, low];
        for number in [self.id, self.parent, self.version] {
            bytes.extend(number.to_be_bytes());
        }
        bytes.extend(&self.trail);
        bytes
    }

    /// `None` if that is no handle of ours.
    pub(crate) fn parse(bytes: &[u8]) -> Option<Self> {
        let ([FORMAT, high, low], rest) = bytes.split_first_chunk()? else { return None };
        let depth = u16::from_be_bytes([*high, *low]);
        let (numbers, trail) = rest.split_first_chunk::<24>()?;
        let number = |at: usize| numbers[at..].first_chunk().copied().map(u64::from_be_bytes);
        let handle = Self { id: number(0)?, parent: number(8)?, version: number(16)?, depth, trail: trail.to_owned() };
        let is_whole = trail.len() == (width(depth) * usize::from(depth)).min(TRAIL_BYTES);
        let is_root = (handle.id == ROOT) == (handle.parent == 0);
        (is_whole && is_root).then_some(handle)
    }
}

/// How many bytes of each id on the way a handle has.
fn width(depth: u16) -> usize {
    match usize::from(depth) {
        0 => 0,
        depth => (TRAIL_BYTES / depth).clamp(1, 8),
    }
}

const FORMAT: u8 = 1;
const LOWEST: u64 = 16;
/// 64 bytes are what NFSv3 gives a handle.
const TRAIL_BYTES: usize = 64 - 27;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn ids_and_handles_stay_what_they_are() {
        let ids = Ids([7; 32]);
        let arena: ArenaName = "photos".parse().unwrap();
        assert_eq!([ids.of(&arena, b""), ids.of(&arena, b"a/b")], [GOLDEN_ARENA, GOLDEN_PATH]);
        assert_ne!(ids.of(&arena, b"a"), Ids([8; 32]).of(&arena, b"a"));
        let handle = Handle::new(GOLDEN_PATH, 0x1122334455667788, 0xa1a2a3a4a5a6a7a8, &[GOLDEN_ARENA]);
        let bytes = handle.to_bytes();
        assert_eq!(bytes[..3], [1, 0, 1]);
        assert_eq!(bytes[3..11], GOLDEN_PATH.to_be_bytes());
        assert_eq!(bytes[27..], GOLDEN_ARENA.to_be_bytes());
        assert_eq!(Handle::root().to_bytes().len(), 27);
    }

    proptest! {
        #[test]
        fn handles_fit_and_are_read_back(id in 16..u64::MAX, parent in 1..u64::MAX, version: u64, above in prop::collection::vec(any::<u64>(), 0..300)) {
            let handle = Handle::new(id, version, parent, &above);
            let bytes = handle.to_bytes();
            prop_assert!(bytes.len() <= 64);
            prop_assert_eq!(Handle::parse(&bytes), Some(handle.clone()));
            for (at, &id) in above.iter().enumerate() {
                prop_assert!(handle.may_pass(at, id));
                prop_assert!(at >= 37 || !handle.may_pass(at, !id));
            }
            prop_assert_eq!(Handle::parse(&bytes[..bytes.len() - 1]), None);
            prop_assert_eq!(Handle::parse(&[&bytes[..], &[0]].concat()), None);
        }

        #[test]
        fn what_is_no_handle_is_none(bytes in prop::collection::vec(any::<u8>(), 0..70)) {
            if let Some(handle) = Handle::parse(&bytes) {
                prop_assert_eq!(handle.to_bytes(), bytes);
            }
        }
    }

    const GOLDEN_ARENA: u64 = 4_557_065_004_192_848_826;
    const GOLDEN_PATH: u64 = 4_262_399_408_207_859_854;
}
