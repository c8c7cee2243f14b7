//! What a client of the mount sends: whatever it is, it is answered or hung up on, and answers are whole.

#![no_main]

use std::{
    future::Future,
    pin::Pin,
    sync::{Arc, LazyLock},
    time::Duration,
};

use blobstore::{Fetch, FetchError, Fetched, RealDisk, Settings, SharedSink, Store, Want};
use libfuzzer_sys::fuzz_target;
use namespace::{Arena, Change, Content, Namespace, Origin, PeerId};
use nfs::Options;
use redb::{Database, backends::InMemoryBackend};
use tempfile::TempDir;
use tokio::{runtime::Runtime, sync::mpsc};
use tree::{BlobId, Grain, UnixTime};

/// A machine that knows of a few files, and can read none.
struct Machine {
    dir: TempDir,
    namespace: Namespace,
    store: Store,
    runtime: Runtime,
}

/// Has nothing.
struct Nobody;

impl Fetch for Nobody {
    fn fetch(
        &self,
        want: Want,
        _: SharedSink,
    ) -> Pin<Box<dyn Future<Output = Result<Fetched, FetchError>> + Send + '_>> {
        Box::pin(async move { Err(FetchError::NoPeerHasIt { blob: want.blob }) })
    }

    fn received_bytes(&self) -> u64 {
        0
    }
}

static MACHINE: LazyLock<Machine> = LazyLock::new(|| {
    let dir = tempfile::tempdir().expect("a directory");
    let db = Arc::new(Database::builder().create_with_backend(InMemoryBackend::new()).expect("a database"));
    let settings = Settings {
        outboards: dir.path().join("outboards"),
        cache: dir.path().join("cache"),
        grain: Grain::GROUP,
        cache_limit: 1 << 30,
        cache_keep_free: 0,
        saved: dir.path().join("saved"),
        saved_keep: Duration::MAX,
        saved_bytes_max: 1 << 30,
        vanished_max: 100,
    };
    let store = Store::open(Arc::new(RealDisk), db.clone(), settings).expect("a store");
    let me = PeerId::from_bytes([1; 32]);
    let origin = Origin { me, now: 1, random: 2, history_limit: 100 };
    let namespace = Namespace::open(db, origin).expect("a namespace");
    let arena: namespace::ArenaName = "a".parse().expect("a name");
    namespace.set_arena(&Arena { name: arena.clone(), dir: None, public: false, root: None }).expect("an arena");
    let mtime = UnixTime { seconds: 1, nanos: 2 };
    let file = |size| Content::File { blob: BlobId::of(b"x"), size, mode: 0o644 };
    let link = Content::Symlink { target: b"target".to_vec() };
    let changes = [("d", Content::Directory { mode: 0o755 }), ("d/f", file(100_000)), ("e", file(0)), ("l", link)];
    let changes = changes.map(|(path, content)| {
        let path = path.as_bytes().to_vec().try_into().expect("a path");
        Change { path, content, mtime }
    });
    namespace.commit(&arena, &changes, 1, &mut |_| true).expect("a commit");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
    Machine { dir, namespace, store, runtime }
});

fuzz_target!(|stream: &[u8]| {
    let Machine { dir, namespace, store, runtime } = &*MACHINE;
    let options = Options {
        key: [3; 32],
        read_ahead: 1 << 20,
        fetch_timeout: Duration::from_secs(1),
        read_only: false,
        home: dir.path().to_owned(),
        namespace: namespace.clone(),
        store: store.clone(),
        fetch: Arc::new(Nobody),
        fetch_ahead: Arc::new(Nobody),
        mend: mpsc::channel(1).0,
    };
    let mut answers = Vec::new();
    let outcome = runtime.block_on(nfs::serve(options, stream, &mut answers));
    let (mut rest, mut count) = (&answers[..], 0);
    while let Some((header, behind)) = rest.split_first_chunk() {
        let header = u32::from_be_bytes(*header);
        assert!(header >> 31 == 1, "one fragment each");
        let (answer, behind) = behind.split_at((header & !(1 << 31)) as usize);
        assert!(answer.len() >= 12 && answer.len() % 4 == 0 && answer[4..8] == [0, 0, 0, 1], "an answer");
        (rest, count) = (behind, count + 1);
    }
    assert!(rest.is_empty(), "answers are whole");
    // A call takes 40 bytes on the wire, and one that is denied 16.
    assert!(count <= stream.len() / 16);
    assert!(outcome.is_err() || count > 0 || stream.is_empty());
});
