//! The tables, and how rows stand in them. Format: spec/store.md, "Rows".

use redb::{Database, ReadTransaction, ReadableDatabase, ReadableTable, TableDefinition};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tracing::warn;
use tree::{BlobId, Fingerprint, RangeSet, UnixTime};

use crate::{Verified, saved::RepairRow};

/// `"format"` → the number of this format; [`LAST_DIR`].
pub(crate) const META: TableDefinition<&str, u32> = TableDefinition::new("store.meta");
/// Root → its directory.
pub(crate) const ROOTS: TableDefinition<u32, &[u8]> = TableDefinition::new("store.roots");
/// File in place → [`FileRow`].
pub(crate) const FILES: TableDefinition<FileKey, &[u8]> = TableDefinition::new("store.files");
/// The beginning of a blob's id, and a file that may have the blob in place, by the number of its directory and its
/// name there: the file's row in [`FILES`] has the last word.
pub(crate) const HOLDERS: TableDefinition<HolderKey, ()> = TableDefinition::new("store.holders");
/// Number of a directory → [`DirRow`].
pub(crate) const DIRS: TableDefinition<u32, &[u8]> = TableDefinition::new("store.dirs");
/// Root and path of a directory → its number.
pub(crate) const DIR_NUMBERS: TableDefinition<FileKey, u32> = TableDefinition::new("store.dir_numbers");
/// Blob in place → its outboard, where that is at most [`INLINE_OUTBOARD_BYTES`] long and not empty.
pub(crate) const OUTBOARDS: TableDefinition<&[u8; 32], &[u8]> = TableDefinition::new("store.outboards");
/// Cached blob → [`CachedRow`].
pub(crate) const CACHED: TableDefinition<&[u8; 32], &[u8]> = TableDefinition::new("store.cached");
/// Cached blob of at most a chunk group → its bytes.
pub(crate) const INLINE: TableDefinition<&[u8; 32], &[u8]> = TableDefinition::new("store.inline");
/// Cached blob → a number that is the higher, the later it was used last.
pub(crate) const USED: TableDefinition<&[u8; 32], u64> = TableDefinition::new("store.used");
/// Blob of which nothing is evicted.
pub(crate) const PINS: TableDefinition<&[u8; 32], ()> = TableDefinition::new("store.pins");
/// What was set while the program ran, by name → a number.
pub(crate) const SET: TableDefinition<&str, u64> = TableDefinition::new("store.set");
/// Cached blob → [`Verified`]. For a file in place it is in its [`FileRow`].
pub(crate) const VERIFIED: TableDefinition<&[u8; 32], &[u8]> = TableDefinition::new("store.verified");
/// File that is being mended → its fingerprint before.
pub(crate) const MENDING: TableDefinition<FileKey, &[u8]> = TableDefinition::new("store.mending");
/// Absolute path of a file that vanished → [`VanishedRow`].
pub(crate) const VANISHED: TableDefinition<&[u8], &[u8]> = TableDefinition::new("store.vanished");
/// Number of a vanished file, in the order in which they vanished → its absolute path.
pub(crate) const VANISHED_ORDER: TableDefinition<u64, &[u8]> = TableDefinition::new("store.vanished_order");
/// Number of a repair → [`RepairRow`].
pub(crate) const REPAIRS: TableDefinition<u64, &[u8]> = TableDefinition::new("store.repairs");

/// Root and path below it.
pub(crate) type FileKey = (u32, &'static [u8]);

/// The beginning of a blob's id, the number of a directory, and a file's name in it.
pub(crate) type HolderKey = (&'static [u8; HOLDER_BYTES], u32, &'static [u8]);

/// So much of a blob's id is in the key of a holder. Among a hundred million blobs some twenty pairs begin alike, and
/// whoever looks for one of such a pair reads one row more: every use compares the blob in the file's own row.
pub(crate) const HOLDER_BYTES: usize = 6;

/// The number of the format that this code reads and writes.
pub(crate) const FORMAT: u32 = 3;

/// In [`META`]: the number that a directory got last.
pub(crate) const LAST_DIR: &str = "last_dir";

/// Longer outboards, those of blobs above 4 MiB and a chunk group, are files of their own.
pub(crate) const INLINE_OUTBOARD_BYTES: u64 = 16 << 10;

/// What is known of a file in place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "FileRowOnDisk", into = "FileRowOnDisk")]
pub struct FileRow {
    /// What its bytes are.
    pub blob: BlobId,
    /// Its metadata when that was found.
    pub fingerprint: Fingerprint,
    /// Quarantine: the chunk groups that do not prove and are served to nobody.
    pub damaged: RangeSet,
    /// How far it has been verified.
    pub verified: Verified,
    /// How far the fingerprint may be relied upon.
    pub state: FileState,
}

/// How far a file's fingerprint may be relied upon.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum FileState {
    /// Any later write moves the ctime.
    #[default]
    Settled,
    /// It was hashed within a tick of its last change, or while a program had it open for writing: a later write may have
    /// left no trace.
    Racy,
    /// The file was read and has other bytes than the blob. Rot and an edit are both possible, and the user decides.
    Suspect {
        /// What it was when it was read.
        read: Fingerprint,
        /// Whether it was settled until the one change of which only the ctime tells: who saw what that was can decide too
        /// ([`Store::explain`](crate::Store::explain)).
        was_settled: bool,
    },
}

/// A file that is no longer at its path, for when it comes back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct VanishedRow {
    /// Its place in the order in which files vanished.
    pub(crate) number: u64,
    /// What was known of it.
    pub(crate) row: FileRow,
}

/// [`FileRow`] as it is written. There is one for each file, and so bytes count.
#[derive(Serialize, Deserialize)]
struct FileRowOnDisk {
    blob: BlobId,
    device: u64,
    inode: u64,
    size: u64,
    /// Nanoseconds since 1970.
    mtime: i128,
    /// Nanoseconds since `mtime`: none, if nobody touched the file since it was written.
    ctime: i128,
    verified: Verified,
    damaged: RangeSet,
    // Rows from before the next two fields end here.
    /// Nanoseconds from the birth time to `ctime`.
    age: Option<i128>,
    state: StateOnDisk,
}

#[derive(Serialize, Deserialize)]
enum StateOnDisk {
    Settled,
    Racy,
    Suspect { read: Fingerprint, was_settled: bool },
}

impl From<FileRow> for FileRowOnDisk {
    fn from(row: FileRow) -> Self {
        let FileRow { blob, fingerprint, damaged, verified, state } = row;
        let Fingerprint { device, inode, birth, size, mtime, ctime } = fingerprint;
        let (mtime, ctime) = (nanos(mtime), nanos(ctime));
        // A time has 2⁶³ seconds at most, and so no difference leaves an i128.
        let age = birth.map(|birth| ctime - nanos(birth));
        let state = match state {
            FileState::Settled => StateOnDisk::Settled,
            FileState::Racy => StateOnDisk::Racy,
            FileState::Suspect { read, was_settled } => StateOnDisk::Suspect { read, was_settled },
        };
        Self { blob, device, inode, size, mtime, ctime: ctime - mtime, verified, damaged, age, state }
    }
}

impl TryFrom<FileRowOnDisk> for FileRow {
    type Error = &'static str;

    fn try_from(row: FileRowOnDisk) -> Result<Self, Self::Error> {
        let FileRowOnDisk { blob, device, inode, size, mtime, ctime, verified, damaged, age, state } = row;
        let time = |nanos: Option<i128>| nanos.and_then(time).ok_or("a time beyond all times");
        let ctime = mtime.checked_add(ctime);
        let birth = age.map(|age| time(ctime.and_then(|ctime| ctime.checked_sub(age)))).transpose()?;
        let fingerprint = Fingerprint { device, inode, birth, size, mtime: time(Some(mtime))?, ctime: time(ctime)? };
        let state = match state {
            StateOnDisk::Settled => FileState::Settled,
            StateOnDisk::Racy => FileState::Racy,
            StateOnDisk::Suspect { read, was_settled } => FileState::Suspect { read, was_settled },
        };
        Ok(Self { blob, fingerprint, damaged, verified, state })
    }
}

fn nanos(time: UnixTime) -> i128 {
    i128::from(time.seconds) * NANOS + i128::from(time.nanos)
}

fn time(nanos: i128) -> Option<UnixTime> {
    let seconds = i64::try_from(nanos.div_euclid(NANOS)).ok()?;
    Some(UnixTime { seconds, nanos: u32::try_from(nanos.rem_euclid(NANOS)).ok()? })
}

const NANOS: i128 = 1_000_000_000;

/// The beginning of the key of those who have `blob`.
pub(crate) fn holder_prefix(blob: &BlobId) -> &[u8; HOLDER_BYTES] {
    // 32 bytes begin with fewer.
    blob.as_bytes().first_chunk().unwrap_or(&[0; HOLDER_BYTES])
}

/// A directory that has a number.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct DirRow {
    pub(crate) root: u32,
    /// Its path with a slash behind it, as [`split`](crate::dirs::split) cuts it off.
    pub(crate) dir: Vec<u8>,
}

/// What is known of a cached blob.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct CachedRow {
    /// In bytes: proven if the last chunk group is among `proven`, and otherwise what a peer claims.
    pub(crate) size: u64,
    /// The bytes that are here, proven and durable.
    pub(crate) proven: RangeSet,
}

pub(crate) fn encode<T: Serialize>(row: &T) -> Result<Vec<u8>, redb::Error> {
    postcard::to_stdvec(row).map_err(|error| redb::Error::Corrupted(format!("encode a row: {error}")))
}

/// A value of a table.
pub(crate) trait Row: DeserializeOwned {
    /// How many fields at the end older rows lack. Each of them is one byte if it is zero.
    const APPENDED: usize = 0;
}

impl Row for FileRow {
    const APPENDED: usize = 2;
}

impl Row for VanishedRow {}
impl Row for DirRow {}
impl Row for CachedRow {}
impl Row for Verified {}
impl Row for Fingerprint {}

/// Decodes a row. Fields that were appended to its format since it was written read as zero.
pub(crate) fn decode<T: Row>(bytes: &[u8]) -> Result<T, redb::Error> {
    let decoded = match postcard::from_bytes(bytes) {
        Err(postcard::Error::DeserializeUnexpectedEnd) if T::APPENDED > 0 => {
            postcard::from_bytes(&[bytes, &vec![0; T::APPENDED]].concat())
        }
        decoded => decoded,
    };
    decoded.map_err(|error| redb::Error::Corrupted(format!("decode a row: {error}")))
}

/// How many rows the store has in `db`, and how many of these do not decode.
pub fn count_rows(db: &Database) -> Result<(u64, u64), redb::Error> {
    let txn = db.begin_read()?;
    let mut rows = (0, 0);
    count(&txn, FILES, &mut rows, |row| decode::<FileRow>(row).is_ok())?;
    count(&txn, MENDING, &mut rows, |row| decode::<Fingerprint>(row).is_ok())?;
    count(&txn, CACHED, &mut rows, |row| decode::<CachedRow>(row).is_ok())?;
    count(&txn, VERIFIED, &mut rows, |row| decode::<Verified>(row).is_ok())?;
    count(&txn, VANISHED, &mut rows, |row| decode::<VanishedRow>(row).is_ok())?;
    count(&txn, REPAIRS, &mut rows, |row| decode::<RepairRow>(row).is_ok())?;
    count(&txn, DIRS, &mut rows, |row| decode::<DirRow>(row).is_ok())?;
    Ok(rows)
}

fn count<K: redb::Key + 'static>(
    txn: &ReadTransaction,
    table: TableDefinition<K, &[u8]>,
    (all, bad): &mut (u64, u64),
    is_good: impl Fn(&[u8]) -> bool,
) -> Result<(), redb::Error> {
    for row in txn.open_table(table)?.iter()? {
        *all += 1;
        *bad += u64::from(!is_good(row?.1.value()));
    }
    Ok(())
}

/// [`decode`], where a row that does not decode counts as none: one bad row must not take the others along.
pub(crate) fn decode_or_none<T: Row>(bytes: &[u8]) -> Option<T> {
    decode(bytes).inspect_err(|error| warn!(reason = tree::reason(error), "a row of the database is passed over")).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tree::ByteRange;

    use super::*;

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// Golden bytes: stores that were written must stay readable.
    #[test]
    fn rows_on_disk() {
        let file = FileRow {
            blob: BlobId::EMPTY,
            fingerprint: Fingerprint {
                device: 1,
                inode: 300,
                birth: Some(UnixTime { seconds: 0, nanos: 999_999_999 }),
                size: 40_000,
                mtime: UnixTime { seconds: -1, nanos: 999_999_999 },
                ctime: UnixTime { seconds: 1, nanos: 0 },
            },
            damaged: ByteRange::new(16384, 32768).unwrap().into(),
            verified: Verified { at: 1_700_000_000_000, next: 0 },
            state: FileState::Settled,
        };
        let bytes = encode(&file).unwrap();
        let rest = "01ac02c0b802 01 82a8d6b907 80d095ffbc31 00 01808001808002".replace(' ', "");
        assert_eq!(hex(&bytes), format!("{}{rest}010200", BlobId::EMPTY));
        assert_eq!(decode::<FileRow>(&bytes).unwrap(), file);
        // Rows that were written before there were birth times and states.
        let fingerprint = Fingerprint { birth: None, ..file.fingerprint };
        let older = FileRow { fingerprint, ..file.clone() };
        assert_eq!(decode::<FileRow>(&bytes[..bytes.len() - 3]).unwrap(), older);
        for (state, expected) in [
            (FileState::Racy, "01"),
            (FileState::Suspect { read: fingerprint, was_settled: true }, "0201ac0200c0b80201ff93ebdc03020001"),
        ] {
            let row = FileRow { state, ..older.clone() };
            let bytes = encode(&row).unwrap();
            assert_eq!(hex(&bytes), format!("{}{rest}00{expected}", BlobId::EMPTY));
            assert_eq!(decode::<FileRow>(&bytes).unwrap(), row);
        }
        let vanished = VanishedRow { number: 300, row: file.clone() };
        let vanished_bytes = encode(&vanished).unwrap();
        assert_eq!(hex(&vanished_bytes), format!("ac02{}", hex(&bytes)));
        assert_eq!(decode::<VanishedRow>(&vanished_bytes).unwrap(), vanished);
        let cached = CachedRow { size: 16384, proven: ByteRange::new(0, 16384).unwrap().into() };
        let bytes = encode(&cached).unwrap();
        assert_eq!(hex(&bytes), "8080010100808001");
        assert_eq!(decode::<CachedRow>(&bytes).unwrap(), cached);
        assert_eq!(hex(holder_prefix(&BlobId::EMPTY)), "af1349b9f5f9");
        let dir = DirRow { root: 300, dir: b"a/".to_vec() };
        let bytes = encode(&dir).unwrap();
        assert_eq!(hex(&bytes), "ac0202612f");
        assert_eq!(decode::<DirRow>(&bytes).unwrap(), dir);
    }

    fn a_time() -> impl Strategy<Value = UnixTime> {
        let seconds = prop_oneof![Just(i64::MIN), Just(i64::MAX), -5..5i64, any::<i64>()];
        (seconds, 0..1_000_000_000u32).prop_map(|(seconds, nanos)| UnixTime { seconds, nanos })
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn a_row_comes_back(
            [mtime, ctime, birth] in [a_time(), a_time(), a_time()],
            numbers in any::<[u64; 5]>(),
            has_birth in any::<bool>(),
        ) {
            let [device, inode, size, at, next] = numbers;
            let fingerprint = Fingerprint { device, inode, birth: has_birth.then_some(birth), size, mtime, ctime };
            let (verified, state) = (Verified { at, next }, FileState::Suspect { read: fingerprint, was_settled: false });
            let row = FileRow { blob: BlobId::EMPTY, fingerprint, damaged: RangeSet::new(), verified, state };
            prop_assert_eq!(decode::<FileRow>(&encode(&row).unwrap()).unwrap(), row);
        }

        /// Rows that rotted are refused or read as something, and never panic.
        #[test]
        fn any_times_decode_or_are_refused(mtime in any::<i128>(), ctime in any::<i128>(), age in any::<Option<i128>>()) {
            let on_disk = FileRowOnDisk {
                blob: BlobId::EMPTY, device: 1, inode: 2, size: 3, mtime, ctime,
                verified: Verified::default(), damaged: RangeSet::new(), age, state: StateOnDisk::Racy,
            };
            let inside = |nanos: i128| i64::try_from(nanos.div_euclid(NANOS)).is_ok();
            let changed = mtime.checked_add(ctime);
            let born = changed.and_then(|changed| changed.checked_sub(age.unwrap_or(0)));
            let is_time = inside(mtime) && changed.is_some_and(inside) && born.is_some_and(inside);
            prop_assert_eq!(decode_or_none::<FileRow>(&encode(&on_disk).unwrap()).is_some(), is_time);
        }
    }
}
