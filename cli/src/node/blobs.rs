//! Finding a blob by the beginning of its id, wherever it is known.

use std::collections::BTreeMap;

use tree::BlobId;

use super::{Node, blocking};
use crate::{
    failure::{Code, Failure},
    target::BlobPrefix,
};

impl Node {
    /// Returns the one blob whose id begins so, and its size, that is here or that any machine has at any path.
    pub(crate) async fn find_blob(&self, prefix: BlobPrefix) -> Result<(BlobId, u64), Failure> {
        let node = self.clone();
        blocking(move || {
            let (low, high) = prefix.bounds();
            let mut found = BTreeMap::new();
            let mut add = |blobs: Vec<(BlobId, u64)>| {
                found.extend(blobs);
                found.len() >= if low == high { 1 } else { NAMED_MAX }
            };
            let is_empty = low <= *BlobId::EMPTY.as_bytes() && *BlobId::EMPTY.as_bytes() <= high;
            let _ = add(if is_empty { vec![(BlobId::EMPTY, 0)] } else { Vec::new() })
                || add(node.inner.store.blobs_between(&low, &high, NAMED_MAX)?)
                || add(node.inner.namespace.blobs_between(&low, &high, NAMED_MAX)?);
            match found.len() {
                0 => Err(Failure::new(Code::NotFound, format!("{prefix} is not known here"))),
                1 => {
                    found.pop_first().ok_or_else(|| Failure::new(Code::NotFound, format!("{prefix} is not known here")))
                }
                _ => {
                    let names: Vec<_> = found.keys().map(|blob| format!("blob:{blob}")).collect();
                    Err(Failure::new(Code::Usage, format!("{prefix} may be any of several blobs"))
                        .hint(format!("name one with more digits: {}", names.join(" or "))))
                }
            }
        })
        .await
    }
}

/// How many of several blobs that begin alike an error names.
const NAMED_MAX: usize = 4;
