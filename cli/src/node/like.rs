//! Which blobs here may have much in common with one that is not: other versions of the same file.

use std::path::Path;

use blobstore::Presence;
use namespace::RelPath;
use tree::BlobId;

use super::{Node, blocking};
use crate::{failure::Failure, target::Target};

impl Node {
    /// The blobs that are here, whole or in part, and may be older or newer versions of `blob`, which is or shall be at all
    /// of `near`; the likeliest first. What this machine has there comes first, then what the blob was made from, then what
    /// others have, and what theirs was made from.
    pub(super) async fn like(&self, blob: BlobId, near: Vec<Target>) -> Result<Vec<BlobId>, Failure> {
        let node = self.clone();
        blocking(move || {
            let mut versions = Vec::new();
            for Target { arena, path } in near {
                let Some(path) = path else { continue };
                versions.extend(node.inner.namespace.versions(&arena, &path)?);
            }
            // Ours comes first, and then the blob's own; the rest stays in order.
            versions.sort_by_key(|(peer, version)| (peer.is_some(), version.content.blob() != Some(blob)));
            let ids = versions.iter().map(|(_, version)| version);
            let ids =
                ids.flat_map(|version| version.content.blob().into_iter().chain(version.previous.iter().copied()));
            let mut like = Vec::new();
            for id in ids.filter(|&id| id != blob).take(LOOKED_UP) {
                if !like.contains(&id) && node.inner.store.presence(id)? != Presence::None {
                    like.push(id);
                }
            }
            Ok(like)
        })
        .await
    }

    /// What a file of this machine is called in an arena that is held here; `None` if it is in none.
    pub(super) fn target_of(&self, file: &Path) -> Result<Option<Target>, Failure> {
        let arenas = self.inner.namespace.arenas()?;
        Ok(arenas.into_iter().find_map(|arena| {
            let below = file.strip_prefix(arena.dir?).ok()?;
            let path = RelPath::try_from(below.as_os_str().as_encoded_bytes().to_vec()).ok()?;
            Some(Target { arena: arena.name, path: Some(path) })
        }))
    }
}

/// So many blobs are looked up at most.
const LOOKED_UP: usize = 64;
