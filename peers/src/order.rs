//! What is said on order streams: one machine has another one change what is in its arenas.
//! Order and bounds: spec/wire.md, "Order streams". What it comes to on the disk: spec/copy.md.

use namespace::{ArenaName, Content, PeerId, RelPath};
use serde::{Deserialize, Serialize};
use tree::{BlobId, Fingerprint, UnixTime};

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
    /// The extended attributes that a file or directory is to have.
    pub attributes: Attributes,
    /// A file of the same arena that was placed before, of which this is to be another name.
    pub link: Option<Link>,
}

/// A file of which another name is to be made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Link {
    /// Where it is.
    pub path: RelPath,
    /// Its number: it must be that file still.
    pub inode: u64,
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
        /// The number of the file that is there; 0 for a directory.
        inode: u64,
        /// What was not kept of it.
        lost: Lost,
    },
    /// It was there before, durably.
    There {
        /// What is there; `None` for a directory.
        held: Option<Held>,
        /// The number of the file that is there; 0 for a directory.
        inode: u64,
        /// What was not kept of it.
        lost: Lost,
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
            Task::Place(Place { content, mtime, attributes, link, .. }) => {
                let may_link = matches!(content, Content::File { .. }) || link.is_none();
                is_something(content) && mtime.nanos < 1_000_000_000 && attributes.is_valid() && may_link
            }
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
        })
    }

    fn remove(content: Content, held: Option<Held>) -> Task {
        Task::Remove(Remove { path: "a b".try_into().unwrap(), content, held, attributes: None })
    }

    const HELD: Held = Held { inode: 300, size: 0, mtime: TIME, ctime: UnixTime { seconds: -1, nanos: 7 } };

    const LOST: Lost = Lost { attributes: false, mode: true };

    #[test]
    fn orders_on_the_wire() {
        let file = Content::File { blob: BlobId::EMPTY, size: 0, mode: 0o644 };
        let link = Content::Symlink { target: b"../x".to_vec() };
        let (inbox, path, mtime) = ("05696e626f78", "03612062", "80c49fd50c05");
        for (task, expected) in [
            (Task::Check, format!("{inbox}00")),
            (place(file), format!("{inbox}01{path}00{}00a403{mtime}010000000000", BlobId::EMPTY)),
            (place(Content::Directory { mode: 0o755 }), format!("{inbox}01{path}04ed03{mtime}010000000000")),
            (remove(link, Some(HELD)), format!("{inbox}02{path}01042e2e2f7801ac0200{mtime}010700")),
            (remove(Content::Directory { mode: 0 }, None), format!("{inbox}02{path}04000000")),
        ] {
            assert_eq!(hex(&order(task)), expected);
        }
        let Task::Place(place) = place(Content::File { blob: BlobId::EMPTY, size: 0, mode: 0 }) else { unreachable!() };
        let tags = Attribute { name: b"user.t".to_vec(), value: b"x".to_vec() };
        let attributes = Attributes::new(vec![tags], false);
        let link = Some(Link { path: "c".try_into().unwrap(), inode: 300 });
        let linked = hex(&order(Task::Place(Place { attributes, link, ..place })));
        assert!(linked.ends_with("010000 0106757365722e740178 00 01 0163 ac02".replace(' ', "").as_str()), "{linked}");
        for (news, expected) in [
            (News::Progress { bytes: 70_000 }, "ac0200f0a204"),
            (News::Done(Done::Ready), "ac020100"),
            (
                News::Done(Done::Placed { received: 8, held: Some(HELD), inode: 300, lost: LOST }),
                "ac0201010801ac020080c49fd50c050107ac020001",
            ),
            (News::Done(Done::There { held: None, inode: 0, lost: Lost::default() }), "ac02010200000000"),
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
        let attributes =
            Attributes::new((1..=128).map(|n| Attribute { name: vec![n; 255], value: vec![0] }).collect(), true);
        assert_eq!(attributes.list.len(), 128);
        let link = Some(Link { path: path.clone(), inode: u64::MAX });
        let place = Place { path, content, mtime, overwrite: true, prove: true, from, attributes, link };
        let longest = Order { arena: "x".repeat(255).parse().unwrap(), task: Task::Place(place) };
        assert!(postcard::to_stdvec(&longest).unwrap().len() <= ORDER_BYTES_MAX);
        // One that is valid for its content has no link.
        assert!(!longest.is_valid());
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
