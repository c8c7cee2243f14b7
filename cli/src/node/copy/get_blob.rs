use std::{path::PathBuf, sync::Arc, time::SystemTime};

use namespace::RelPath;
use peers::Attributes;
use tree::{BlobId, UnixTime};

use super::{
    super::{Node, blocking},
    get::split,
    place::Destination,
};
use crate::{
    event::{Copied, Event, Reporter},
    failure::{Failure, WhileDoing},
};

impl Node {
    /// Puts a blob at `to`, an absolute path where nothing is yet, or into the directory `to` under the blob's id.
    pub(crate) async fn get_blob(
        &self,
        blob: BlobId,
        size: u64,
        to: PathBuf,
        reporter: &Reporter,
    ) -> Result<(), Failure> {
        let (dir, name) = match to.is_dir() {
            true => (to, RelPath::try_from(blob.to_string().into_bytes())?),
            false => match split(&to)? {
                (dir, Some(name)) => (dir, name),
                (dir, None) => (dir, RelPath::try_from(blob.to_string().into_bytes())?),
            },
        };
        let full = dir.join(name.as_path());
        let creating = format!("create {full:?}");
        let destination = Arc::new(Destination::open(&dir).while_doing(format!("open {dir:?}"))?);
        let _pass = self.inner.gate.pass(size).await;
        let (arrived, fetched) = self.arrive(blob, size, &destination, &name, Vec::new(), |_| {}).await?;
        let (node, at) = (self.clone(), name.clone());
        let publish = move || {
            let store = &node.inner.store;
            let (mut staged, leftover) = arrived.take(store, &destination, &at)?;
            let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
            let mtime = UnixTime { seconds: since.as_secs().cast_signed(), nanos: since.subsec_nanos() };
            staged.set_traits(node.traits(0o644, mtime, Attributes::default()))?;
            staged.publish(&at)?;
            leftover.forget(store)?;
            Ok(destination.sync()?)
        };
        blocking(publish).await.while_doing(creating)?;
        let copied = Copied {
            source: format!("blob:{blob}"),
            destination: full.to_string_lossy().into_owned(),
            blob: Some(blob),
            bytes: size,
            bytes_received: fetched.bytes_received,
            bytes_sent: None,
            not_kept: Vec::new(),
        };
        Ok(reporter.send(Event::Copied(copied)).await?)
    }
}
