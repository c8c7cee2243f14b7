//! What is said on order streams: one machine has another one change what is in its arenas.
//! Order and bounds: spec/wire.md, "Order streams". What it comes to on the disk: spec/copy.md.

use namespace::{ArenaName, Content, PeerId, RelPath};
use serde::{Deserialize, Serialize};
use tree::{Fingerprint, UnixTime};

/// What is to be done in an arena of the machine that is asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Order {
    /// The arena, which that machine must hold.
    pub arena: ArenaName,
    /// What.
    pub task: Task,
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Task {
    /// Nothing: say whether the others would be.
    Check,
    /// Have something at a path.
    Place(Place),
    /// Have nothing at a path.
    Remove(Remove),
}

/// What is to be at a path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// Where.
    pub path: RelPath,
    /// A file, symbolic link or directory.
    pub content: Content,
    /// Its mtime; of no meaning for a directory.
    pub mtime: UnixTime,
    /// Whether it may take the place of another file or link.
    pub overwrite: bool,
    /// Whether a file that is there already is to be read and proven, and not only looked up.
    pub prove: bool,
    /// Who has the blob; `None` for the one who asks.
    pub from: Option<PeerId>,
}

/// What is to go from a path, because another machine has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Remove {
    /// Where.
    pub path: RelPath,
    /// What must be there, to be removed.
    pub content: Content,
    /// What the other machine has, which must not be this very file. `None` for a directory, which goes if it is empty.
    pub held: Option<Held>,
}

/// A file or link as the file system tells it from others, and from what it was before. Without the device, which has
/// another number on each machine that mounts it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    /// Its number.
    pub inode: u64,
    /// Bytes.
    pub size: u64,
    /// When its content was changed.
    pub mtime: UnixTime,
    /// When anything of it was changed.
    pub ctime: UnixTime,
}

impl From<Fingerprint> for Held {
    fn from(Fingerprint { inode, size, mtime, ctime, .. }: Fingerprint) -> Self {
        Self { inode, size, mtime, ctime }
    }
}

/// What became of an order, or how far it has come: a frame from the one that was asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    /// Which order: the first on the stream is 0.
    pub number: u64,
    /// What became of it.
    pub news: News,
}

/// What is told of an order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum News {
    /// It is under way.
    Progress {
        /// Bytes of the file that have come.
        bytes: u64,
    },
    /// That was all.
    Done(Done),
}

/// How an order ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Done {
    /// Orders for the arena are taken.
    Ready,
    /// It is there now, durably.
    Placed {
        /// Bytes received for it: data, proofs and sizes.
        received: u64,
        /// What is there; `None` for a directory.
        held: Option<Held>,
    },
    /// It was there before, durably.
    There {
        /// What is there; `None` for a directory.
        held: Option<Held>,
    },
    /// It is not there any more.
    Removed,
    /// The directory is not empty, and stays.
    NotEmpty,
    /// Nothing was done.
    Failed {
        /// In a word.
        why: Why,
        /// In a sentence, of at most [`REASON_CHARS_MAX`] characters.
        reason: String,
    },
}

/// Why an order was not carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Why {
    /// Something failed.
    Failed,
    /// Who asked may not.
    Refused,
    /// There is no such arena.
    NotFound,
    /// Something else is there.
    InTheWay,
    /// What is to be removed is not what it was, or not known to be.
    Changed,
    /// Nobody who can be reached has the bytes.
    Unreachable,
    /// There is no room.
    Full,
}

impl Order {
    /// Whether somebody may ask so: what is placed or removed is something, within the bounds of catalogs.
    pub(crate) fn is_valid(&self) -> bool {
        let is_something = |content: &Content| content.is_present() && content.is_valid();
        match &self.task {
            Task::Check => true,
            Task::Place(Place { content, mtime, .. }) => is_something(content) && mtime.nanos < 1_000_000_000,
            Task::Remove(Remove { content, held, .. }) => {
                is_something(content) && held.is_some() != matches!(content, Content::Directory { .. })
            }
        }
    }
}

impl Done {
    /// A failure for a reason, cut to what may be said.
    pub fn failed(why: Why, reason: &str) -> Self {
        Self::Failed { why, reason: reason.chars().filter(|c| !c.is_control()).take(REASON_CHARS_MAX).collect() }
    }
}

/// The longest reason, in characters.
pub const REASON_CHARS_MAX: usize = 2000;
/// The longest [`Order`] and [`Outcome`] that is read.
pub(crate) const ORDER_BYTES_MAX: usize = 16 << 10;

#[cfg(test)]
mod tests {
    use data_encoding::HEXLOWER;
    use tree::BlobId;

    use super::*;

    const TIME: UnixTime = UnixTime { seconds: 1_700_000_000, nanos: 5 };

    fn hex(message: &impl Serialize) -> String {
        HEXLOWER.encode(&postcard::to_stdvec(message).unwrap())
    }

    fn order(task: Task) -> Order {
        Order { arena: "inbox".parse().unwrap(), task }
    }

    fn place(content: Content) -> Task {
        let path = "a b".try_into().unwrap();
        Task::Place(Place { path, content, mtime: TIME, overwrite: true, prove: false, from: None })
    }

    fn remove(content: Content, held: Option<Held>) -> Task {
        Task::Remove(Remove { path: "a b".try_into().unwrap(), content, held })
    }

    const HELD: Held = Held { inode: 300, size: 0, mtime: TIME, ctime: UnixTime { seconds: -1, nanos: 7 } };

    #[test]
    fn orders_on_the_wire() {
        let file = Content::File { blob: BlobId::EMPTY, size: 0, mode: 0o644 };
        let link = Content::Symlink { target: b"../x".to_vec() };
        let (inbox, path, mtime) = ("05696e626f78", "03612062", "80c49fd50c05");
        for (task, expected) in [
            (Task::Check, format!("{inbox}00")),
            (place(file), format!("{inbox}01{path}00{}00a403{mtime}010000", BlobId::EMPTY)),
            (place(Content::Directory { mode: 0o755 }), format!("{inbox}01{path}04ed03{mtime}010000")),
            (remove(link, Some(HELD)), format!("{inbox}02{path}01042e2e2f7801ac0200{mtime}0107")),
            (remove(Content::Directory { mode: 0 }, None), format!("{inbox}02{path}040000")),
        ] {
            assert_eq!(hex(&order(task)), expected);
        }
        for (news, expected) in [
            (News::Progress { bytes: 70_000 }, "ac0200f0a204"),
            (News::Done(Done::Ready), "ac020100"),
            (News::Done(Done::Placed { received: 8, held: Some(HELD) }), "ac0201010801ac020080c49fd50c050107"),
            (News::Done(Done::There { held: None }), "ac02010200"),
            (News::Done(Done::Removed), "ac020103"),
            (News::Done(Done::NotEmpty), "ac020104"),
            (News::Done(Done::failed(Why::Full, "no\nroom")), "ac0201050606 6e6f726f6f6d"),
        ] {
            assert_eq!(hex(&Outcome { number: 300, news }), expected.replace(' ', ""));
        }
    }

    #[test]
    fn the_longest_fit_their_frames() {
        let path = RelPath::try_from([&b"x".repeat(255)[..]; 16].join(&b'/')).unwrap();
        let content = Content::Symlink { target: vec![b'x'; 4096] };
        let from = Some(PeerId::from_bytes([255; 32]));
        let mtime = UnixTime { seconds: i64::MIN, nanos: 999_999_999 };
        let place = Place { path, content, mtime, overwrite: true, prove: true, from };
        let longest = Order { arena: "x".repeat(255).parse().unwrap(), task: Task::Place(place) };
        assert!(postcard::to_stdvec(&longest).unwrap().len() <= ORDER_BYTES_MAX);
        let failed = News::Done(Done::failed(Why::Failed, &"\u{10ffff}".repeat(9999)));
        let longest = Outcome { number: u64::MAX, news: failed };
        assert!(postcard::to_stdvec(&longest).unwrap().len() <= ORDER_BYTES_MAX);
    }

    #[test]
    fn what_cannot_be_asked() {
        let file = |size, mode| Content::File { blob: BlobId::EMPTY, size, mode };
        let dir = Content::Directory { mode: 0o777 };
        for (task, is_valid) in [
            (place(file(0, 0o777)), true),
            (place(file(1, 0o777)), false),
            (place(file(0, 0o1777)), false),
            (place(Content::Symlink { target: vec![] }), false),
            (place(Content::Deleted), false),
            (place(Content::Withdrawn), false),
            (remove(file(0, 0), Some(HELD)), true),
            (remove(file(0, 0), None), false),
            (remove(dir.clone(), None), true),
            (remove(dir, Some(HELD)), false),
            (remove(Content::Deleted, Some(HELD)), false),
        ] {
            assert_eq!(order(task.clone()).is_valid(), is_valid, "{task:?}");
        }
    }
}
