//! What is said on order streams: one machine has another one change what is in its arenas.
//! Order and bounds: spec/wire.md, "Order streams". What it comes to on the disk: spec/copy.md.

use namespace::{ArenaName, Content, PeerId, RelPath};
use serde::{Deserialize, Serialize};
use tree::{BlobId, UnixTime};

use crate::{Attributes, attributes::ATTRIBUTES_WIRE_BYTES_MAX};

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
    /// Mark a tree as leaving for a move: until the move ends, nothing is put into it.
    Leave(Leave),
    /// Keep a tree for a move: until the move ends, nothing in it is replaced or moved away.
    Pledge(Pledge),
    /// Set an entry of a tree that leaves aside.
    Prepare(Prepare),
    /// Say that the entry at the destination is still there, although the source has set its own aside.
    Confirm(Confirm),
    /// Remove an entry that was set aside, or put it back.
    Finish(Finish),
    /// End a move: its trees are neither leaving nor kept any more. The number is the move's.
    End(u64),
    /// Say whether a move that left from here is over; asked by the machine that keeps a tree for it.
    IsOver(MoveId),
}

/// A move: the machine that directs it, and a random number by which that machine knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct MoveId {
    /// The machine that gives the orders.
    pub director: PeerId,
    /// The number in its orders.
    pub number: u64,
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
    /// The extended attributes that a file or directory is to have.
    pub attributes: Attributes,
    /// A file of the same arena that was placed before, of which this is to be another name.
    pub link: Option<Link>,
    /// The move that it is part of, for which the tree is kept; `None` for a copy.
    pub part_of: Option<u64>,
}

/// A file of which another name is to be made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Link {
    /// Where it is.
    pub path: RelPath,
    /// Its number: it must be that file still.
    pub inode: u64,
}

/// A tree that is about to be moved away.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Leave {
    /// The move's number.
    pub number: u64,
    /// The tree; `None` is the whole arena.
    pub path: Option<RelPath>,
}

/// A tree into which something is moved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pledge {
    /// The move's number.
    pub number: u64,
    /// The tree; `None` is the whole arena.
    pub path: Option<RelPath>,
    /// The machine that the move takes from; `None` for the one who asks.
    pub source: Option<PeerId>,
    /// The arena there.
    pub source_arena: ArenaName,
}

/// What is to be set aside.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prepare {
    /// The move's number.
    pub number: u64,
    /// Where.
    pub path: RelPath,
    /// What must be there. A directory must be empty.
    pub content: Content,
    /// The [digest](Attributes::digest) of the extended attributes that the other machine has kept, which must be those of
    /// the file still. `None` if they are not compared.
    pub attributes: Option<BlobId>,
}

/// What was not kept of an entry: its machine's settings, or the file system, do not allow it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lost {
    /// Some of its extended attributes.
    pub attributes: bool,
    /// Its permissions.
    pub mode: bool,
}

/// What must still be at the destination.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Confirm {
    /// The move's number.
    pub number: u64,
    /// Where.
    pub path: RelPath,
    /// What must be there.
    pub content: Content,
    /// The number of the directory into which the source has set its own aside.
    pub aside: u64,
}

/// How an entry that was set aside ends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finish {
    /// The move's number.
    pub number: u64,
    /// Where it was.
    pub path: RelPath,
    /// The number of the directory into which it was set aside.
    pub aside: u64,
    /// Whether it is removed; else it is put back.
    pub remove: bool,
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
        /// The number of the file that is there; 0 for a directory or symbolic link.
        inode: u64,
        /// What was not kept of it.
        lost: Lost,
    },
    /// It was there before, durably.
    There {
        /// The number of the file that is there; 0 for a directory or symbolic link.
        inode: u64,
        /// What was not kept of it.
        lost: Lost,
    },
    /// It is set aside.
    Prepared {
        /// The number of the directory that it is in.
        aside: u64,
    },
    /// It is still there, and is another one than what was set aside.
    Confirmed,
    /// It is not there any more.
    Removed,
    /// It was set aside, and is where it was again.
    PutBack,
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
    /// A move that has not ended has the tree.
    Busy,
    /// The move is not known, or was given up meanwhile: it may be begun again.
    Over,
}

impl Order {
    /// Whether somebody may ask so: what is placed or removed is something, within the bounds of catalogs.
    pub(crate) fn is_valid(&self) -> bool {
        let is_something = |content: &Content| content.is_present() && content.is_valid();
        match &self.task {
            Task::Place(Place { content, mtime, attributes, link, .. }) => {
                let may_link = matches!(content, Content::File { .. }) || link.is_none();
                is_something(content) && mtime.nanos < 1_000_000_000 && attributes.is_valid() && may_link
            }
            Task::Prepare(Prepare { content, .. }) | Task::Confirm(Confirm { content, .. }) => is_something(content),
            Task::Check | Task::Leave(_) | Task::Pledge(_) | Task::Finish(_) | Task::End(_) | Task::IsOver(_) => true,
        }
    }

    /// Whether only who may write to the arena may ask so. Anybody who knows a move may ask whether it is over.
    pub(crate) fn is_for_writers(&self) -> bool {
        !matches!(self.task, Task::IsOver(_))
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
pub(crate) const ORDER_BYTES_MAX: usize = (16 << 10) + ATTRIBUTES_WIRE_BYTES_MAX;

#[cfg(test)]
mod tests {
    use data_encoding::HEXLOWER;

    use super::*;
    use crate::Attribute;

    const TIME: UnixTime = UnixTime { seconds: 1_700_000_000, nanos: 5 };

    fn hex(message: &impl Serialize) -> String {
        HEXLOWER.encode(&postcard::to_stdvec(message).unwrap())
    }

    fn order(task: Task) -> Order {
        Order { arena: "inbox".parse().unwrap(), task }
    }

    fn place(content: Content) -> Task {
        let path = "a b".try_into().unwrap();
        let attributes = Attributes::default();
        Task::Place(Place {
            path,
            content,
            mtime: TIME,
            overwrite: true,
            prove: false,
            from: None,
            attributes,
            link: None,
            part_of: None,
        })
    }

    fn prepare(content: Content) -> Task {
        Task::Prepare(Prepare { number: 300, path: "a b".try_into().unwrap(), content, attributes: None })
    }

    fn confirm(content: Content) -> Task {
        Task::Confirm(Confirm { number: 300, path: "a b".try_into().unwrap(), content, aside: 9 })
    }

    const LOST: Lost = Lost { attributes: false, mode: true };

    #[test]
    fn orders_on_the_wire() {
        let file = Content::File { blob: BlobId::EMPTY, size: 0, mode: 0o644 };
        let link = Content::Symlink { target: b"../x".to_vec() };
        let (inbox, path, mtime) = ("05696e626f78", "03612062", "80c49fd50c05");
        let peer = PeerId::from_bytes([7; 32]);
        let pledge =
            |path, source| Task::Pledge(Pledge { number: 300, path, source, source_arena: "docs".parse().unwrap() });
        let finish = Finish { number: 300, path: "a b".try_into().unwrap(), aside: 9, remove: true };
        for (task, expected) in [
            (Task::Check, format!("{inbox}00")),
            (place(file.clone()), format!("{inbox}01{path}00{}00a403{mtime}01000000000000", BlobId::EMPTY)),
            (place(Content::Directory { mode: 0o755 }), format!("{inbox}01{path}04ed03{mtime}01000000000000")),
            (Task::Leave(Leave { number: 300, path: None }), format!("{inbox}02ac0200")),
            (Task::Leave(Leave { number: 1, path: Some("a b".try_into().unwrap()) }), format!("{inbox}020101{path}")),
            (pledge(None, None), format!("{inbox}03ac02000004646f6373")),
            (
                pledge(Some("a b".try_into().unwrap()), Some(peer)),
                format!("{inbox}03ac0201{path}01{}04646f6373", "07".repeat(32)),
            ),
            (prepare(link), format!("{inbox}04ac02{path}01042e2e2f7800")),
            (confirm(file), format!("{inbox}05ac02{path}00{}00a40309", BlobId::EMPTY)),
            (Task::Finish(finish), format!("{inbox}06ac02{path}0901")),
            (Task::End(300), format!("{inbox}07ac02")),
            (Task::IsOver(MoveId { director: peer, number: 300 }), format!("{inbox}08{}ac02", "07".repeat(32))),
        ] {
            assert_eq!(hex(&order(task)), expected);
        }
        let Task::Place(place) = place(Content::File { blob: BlobId::EMPTY, size: 0, mode: 0 }) else { unreachable!() };
        let tags = Attribute { name: b"user.t".to_vec(), value: b"x".to_vec() };
        let attributes = Attributes::new(vec![tags], false);
        let link = Some(Link { path: "c".try_into().unwrap(), inode: 300 });
        let linked = hex(&order(Task::Place(Place { attributes, link, ..place })));
        assert!(
            linked.ends_with("010000 0106757365722e740178 00 01 0163 ac02 00".replace(' ', "").as_str()),
            "{linked}"
        );
        for (news, expected) in [
            (News::Progress { bytes: 70_000 }, "ac0200f0a204"),
            (News::Done(Done::Ready), "ac020100"),
            (News::Done(Done::Placed { received: 8, inode: 300, lost: LOST }), "ac02010108ac020001"),
            (News::Done(Done::There { inode: 0, lost: Lost::default() }), "ac020102000000"),
            (News::Done(Done::Prepared { aside: 300 }), "ac020103ac02"),
            (News::Done(Done::Confirmed), "ac020104"),
            (News::Done(Done::Removed), "ac020105"),
            (News::Done(Done::PutBack), "ac020106"),
            (News::Done(Done::NotEmpty), "ac020107"),
            (News::Done(Done::failed(Why::Full, "no\nroom")), "ac0201080606 6e6f726f6f6d"),
            (News::Done(Done::failed(Why::Over, "")), "ac0201080800"),
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
        let attributes =
            Attributes::new((1..=128).map(|n| Attribute { name: vec![n; 255], value: vec![0] }).collect(), true);
        assert_eq!(attributes.list.len(), 128);
        let (link, part_of) = (Some(Link { path: path.clone(), inode: u64::MAX }), Some(u64::MAX));
        let arena: ArenaName = "x".repeat(255).parse().unwrap();
        let confirm = Confirm { number: u64::MAX, path: path.clone(), content: content.clone(), aside: u64::MAX };
        let place = Place { path, content, mtime, overwrite: true, prove: true, from, attributes, link, part_of };
        for (task, is_valid) in [(Task::Place(place), false), (Task::Confirm(confirm), true)] {
            let longest = Order { arena: arena.clone(), task };
            assert!(postcard::to_stdvec(&longest).unwrap().len() <= ORDER_BYTES_MAX);
            // A link may be a second name of files alone.
            assert_eq!(longest.is_valid(), is_valid);
        }
        let failed = News::Done(Done::failed(Why::Failed, &"\u{10ffff}".repeat(9999)));
        let longest = Outcome { number: u64::MAX, news: failed };
        assert!(postcard::to_stdvec(&longest).unwrap().len() <= ORDER_BYTES_MAX);
    }

    #[test]
    fn what_cannot_be_asked() {
        let file = |size, mode| Content::File { blob: BlobId::EMPTY, size, mode };
        let dir = Content::Directory { mode: 0o777 };
        let with = |task: Task, attributes: Attributes, link: Option<Link>| match task {
            Task::Place(place) => Task::Place(Place { attributes, link, ..place }),
            task => task,
        };
        let link = || Some(Link { path: "c".try_into().unwrap(), inode: 300 });
        let nameless = Attributes { list: vec![Attribute { name: vec![], value: vec![] }], is_cut: false };
        for (task, is_valid) in [
            (with(place(file(0, 0o777)), Attributes::default(), link()), true),
            (with(place(dir.clone()), Attributes::default(), link()), false),
            (with(place(dir.clone()), nameless, None), false),
            (place(file(0, 0o777)), true),
            (place(file(1, 0o777)), false),
            (place(file(0, 0o1777)), false),
            (place(Content::Symlink { target: vec![] }), false),
            (place(Content::Deleted), false),
            (place(Content::Withdrawn), false),
            (prepare(file(0, 0)), true),
            (prepare(file(1, 0)), false),
            (prepare(Content::Deleted), false),
            (confirm(dir), true),
            (confirm(Content::Withdrawn), false),
        ] {
            assert_eq!(order(task.clone()).is_valid(), is_valid, "{task:?}");
        }
    }
}
