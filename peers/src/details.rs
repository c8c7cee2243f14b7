//! What there is to know of the entries of an arena beside what catalogs say, for whoever copies them: extended
//! attributes, which names are one file, and how many entries cannot be copied at all.
//! Order and bounds: spec/wire.md, "Detail streams".

use std::sync::{Arc, Mutex, PoisonError, Weak};

use namespace::{ArenaName, PeerId, RelPath};
use serde::{Deserialize, Serialize};
use tokio::{sync::Semaphore, task::spawn_blocking};

use crate::{
    Attributes, Peers,
    attributes::ATTRIBUTES_WIRE_BYTES_MAX,
    dial::reach,
    endpoint::{GREETING_LIMIT, Inner},
    fetch::REACH_LIMIT,
    frame::{FrameError, StreamKind, open_with_frame, read_frame, within},
    incoming::{Incoming, Terms},
    outgoing::Outgoing,
    pace::Class,
    transfer::STALL_LIMIT,
};

/// Asks for details of entries.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum DetailsRequest {
    /// Of entries of an arena: the answer has frames, each a list of details of those that come next.
    Entries {
        /// The arena, which the one who is asked must hold.
        arena: ArenaName,
        /// Where: at most [`DETAILS_MAX`].
        paths: Vec<RelPath>,
    },
    /// Of what is no file, link or directory: the answer is how many there are, a u64.
    Special {
        /// The arena.
        arena: ArenaName,
        /// At and below this path; `None` is all of the arena.
        within: Option<RelPath>,
    },
}

/// Details of a file or directory.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Details {
    /// Of a file with several names: what tells it from others while it is copied.
    pub file: Option<FileId>,
    /// Its extended attributes.
    pub attributes: Attributes,
}

/// A file among those of one machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct FileId {
    /// The device that it is on.
    pub device: u64,
    /// Its number there.
    pub inode: u64,
}

/// Knows what the entries of this machine's arenas are like on the disk.
pub trait Describe: Send + Sync {
    /// Returns details of each path, in order; `None` where no file or directory is. It may block.
    fn describe(&self, arena: &ArenaName, paths: &[RelPath]) -> Vec<Option<Details>>;

    /// Returns how many sockets, FIFOs and devices are at and below a path, as the last scan found.
    fn special(&self, arena: &ArenaName, within: Option<&RelPath>) -> u64;
}

/// Who describes this machine's entries.
#[derive(Default)]
pub(crate) struct Describing(Mutex<Option<Weak<dyn Describe>>>);

impl Peers {
    /// Answers others' questions for details from now on, as long as `describe` lives.
    pub fn describe(&self, describe: Weak<dyn Describe>) {
        *self.inner.describing.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(describe);
    }

    /// Asks a peer for details of at most [`DETAILS_MAX`] entries of an arena that it holds. Returns them in order, or why
    /// they are not known.
    pub async fn details(
        &self,
        peer: PeerId,
        arena: &ArenaName,
        paths: Vec<RelPath>,
    ) -> Result<Vec<Option<Details>>, String> {
        let count = paths.len();
        let mut answer = self.ask_details(peer, DetailsRequest::Entries { arena: arena.clone(), paths }).await?;
        let mut all = Vec::with_capacity(count);
        while all.len() < count {
            let some: Vec<Option<Details>> = answer.read_frame(DETAILS_BYTES_MAX).await?;
            let are_valid = some.iter().flatten().all(|details| details.attributes.is_valid());
            if some.is_empty() || all.len() + some.len() > count || !are_valid {
                return Err("details out of bounds".to_owned());
            }
            all.extend(some);
        }
        Ok(all)
    }

    /// Asks a peer how many sockets, FIFOs and devices are at and below a path of an arena that it holds.
    pub async fn special(&self, peer: PeerId, arena: &ArenaName, within: Option<&RelPath>) -> Result<u64, String> {
        let request = DetailsRequest::Special { arena: arena.clone(), within: within.cloned() };
        self.ask_details(peer, request).await?.read_frame(DETAILS_BYTES_MAX).await
    }

    async fn ask_details(&self, peer: PeerId, request: DetailsRequest) -> Result<Incoming, String> {
        let connection = reach(&self.inner, peer, REACH_LIMIT).await?;
        let open = open_with_frame(&connection, &[StreamKind::Details as u8], &request);
        let recv = within(STALL_LIMIT, open).await.map_err(|error| tree::reason(&error))?;
        Ok(Incoming::new(Terms::plain(&self.inner, peer, Class::Copy), recv, STALL_LIMIT))
    }
}

/// Answers one question for details. `answers` bounds what is read and held at a time.
pub(crate) async fn serve_details(
    inner: &Arc<Inner>,
    answers: &Semaphore,
    mut to: Outgoing,
    mut recv: quinn::RecvStream,
) -> Result<(), FrameError> {
    let _permit = answers.acquire().await;
    let request: DetailsRequest = within(GREETING_LIMIT, read_frame(&mut recv, REQUEST_BYTES_MAX)).await?;
    let describe = inner.describing.0.lock().unwrap_or_else(PoisonError::into_inner).as_ref().and_then(Weak::upgrade);
    let Some(describe) = describe else { return Ok(()) };
    match request {
        DetailsRequest::Entries { arena, mut paths } => {
            paths.truncate(DETAILS_MAX);
            let all = spawn_blocking(move || describe.describe(&arena, &paths)).await.unwrap_or_default();
            let mut rest = &all[..];
            while !rest.is_empty() {
                let (some, others) = rest.split_at(frame_len(rest));
                to.send_frame(&some).await?;
                rest = others;
            }
        }
        DetailsRequest::Special { arena, within } => {
            let count = spawn_blocking(move || describe.special(&arena, within.as_ref())).await.unwrap_or(0);
            to.send_frame(&count).await?;
        }
    }
    let _ = to.stream.finish();
    Ok(())
}

/// How many of these details, at least one, go into one frame.
fn frame_len(details: &[Option<Details>]) -> usize {
    let mut bytes = 0;
    let fits = |details: &&Option<Details>| {
        let attributes = details.as_ref().map_or(&[][..], |details| &details.attributes.list);
        bytes += ENTRY_BYTES_MAX + attributes.iter().map(|one| one.name.len() + one.value.len() + 6).sum::<usize>();
        bytes <= FRAME_BYTES
    };
    details.iter().take_while(fits).count().max(1)
}

/// Of how many entries details are asked for at a time.
pub const DETAILS_MAX: usize = 128;
/// The longest request: so many of the longest paths.
const REQUEST_BYTES_MAX: usize = 1024 + DETAILS_MAX * (4096 + 2);
/// What an entry takes in a frame without its attributes.
const ENTRY_BYTES_MAX: usize = 32;
/// Frames are filled up to here; one entry alone may take as much as it has.
const FRAME_BYTES: usize = 32 << 10;
/// The longest frame of an answer.
const DETAILS_BYTES_MAX: usize = ATTRIBUTES_WIRE_BYTES_MAX + ENTRY_BYTES_MAX + 2;

#[cfg(test)]
mod tests {
    use data_encoding::HEXLOWER;

    use super::*;
    use crate::Attribute;

    fn hex(message: &impl Serialize) -> String {
        HEXLOWER.encode(&postcard::to_stdvec(message).unwrap())
    }

    #[test]
    fn on_the_wire() {
        let arena: ArenaName = "inbox".parse().unwrap();
        let path: RelPath = "a b".try_into().unwrap();
        let request = DetailsRequest::Entries { arena: arena.clone(), paths: vec![path.clone()] };
        assert_eq!(hex(&request), "0005696e626f780103612062");
        assert_eq!(hex(&DetailsRequest::Special { arena: arena.clone(), within: None }), "0105696e626f7800");
        assert_eq!(hex(&DetailsRequest::Special { arena, within: Some(path) }), "0105696e626f780103612062");
        let tags = Attribute { name: b"user.tags".to_vec(), value: b"red".to_vec() };
        let file = Some(FileId { device: 300, inode: 5 });
        let details = Details { file, attributes: Attributes::new(vec![tags], false) };
        assert_eq!(
            hex(&vec![None, Some(details)]),
            "02000101ac0205010975 7365722e74616773 03726564 00".replace(' ', "")
        );
        assert_eq!(hex(&Some(Details::default())), "01000000");
        assert_eq!(hex(&None::<Details>), "00");
    }

    #[test]
    fn the_longest_fit_their_frames() {
        let path = RelPath::try_from([&b"x".repeat(255)[..]; 16].join(&b'/')).unwrap();
        let arena = "x".repeat(255).parse().unwrap();
        let request = DetailsRequest::Entries { arena, paths: vec![path; DETAILS_MAX] };
        assert!(postcard::to_stdvec(&request).unwrap().len() <= REQUEST_BYTES_MAX);
        let longest = |n: u8| Attribute { name: vec![n; 255], value: vec![0; 1] };
        let attributes = Attributes::new((1..=128).map(longest).collect(), false);
        assert_eq!(attributes.list.len(), 128);
        let file = Some(FileId { device: u64::MAX, inode: u64::MAX });
        let most = Some(Details { file, attributes });
        assert!(postcard::to_stdvec(&vec![most.clone()]).unwrap().len() <= DETAILS_BYTES_MAX);
        // Those that are short go together.
        let few = Some(Details::default());
        for (all, expected) in [
            (vec![few.clone(); 128], 128),
            (vec![few.clone(), most.clone(), few.clone()], 1),
            (vec![most.clone(), few.clone()], 1),
            (vec![None; 2000], 1024),
        ] {
            assert_eq!(frame_len(&all), expected);
            assert!(postcard::to_stdvec(&all[..expected]).unwrap().len() <= DETAILS_BYTES_MAX);
        }
    }
}
