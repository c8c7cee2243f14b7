use std::{
    fs,
    net::SocketAddr,
    os::unix::fs::FileExt,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use blobstore::{Collected, Fetch, FetchError, Fetched, NewFile, RealDisk, Settings, Store, Want};
use namespace::{
    Applied, Arena, ArenaName, Batch, Change, Content, Mark, Namespace, Origin, Part, PeerId, RelPath, Statement,
    Version,
};
use peers::{Compress, Congestion, Identity, Options, Peer, Peers, Role, Roster, StartError};
use tempfile::TempDir;
use tree::{BlobId, ByteRange, Fingerprint, Geometry, Grain, RangeSet, UnixTime};

/// A machine with a store, a namespace and peers, listening on loopback.
pub(crate) struct Machine {
    pub(crate) name: String,
    pub(crate) identity: Identity,
    pub(crate) store: Store,
    pub(crate) namespace: Namespace,
    pub(crate) peers: Peers,
    dir: TempDir,
}

impl Machine {
    pub(crate) fn start(name: &str) -> Self {
        Self::with_cache(name, 1 << 30)
    }

    /// One whose cache may take so many bytes.
    pub(crate) fn with_cache(name: &str, cache_limit: u64) -> Self {
        Self::with(Identity::ephemeral().unwrap(), name, &["127.0.0.1:0"], cache_limit).unwrap()
    }

    /// One with this key that listens there.
    pub(crate) fn with(identity: Identity, name: &str, listen: &[&str], cache_limit: u64) -> Result<Self, StartError> {
        let dir = tempfile::tempdir().unwrap();
        let db = Arc::new(redb::Database::create(dir.path().join("db")).unwrap());
        let settings = Settings {
            outboards: dir.path().join("outboards"),
            cache: dir.path().join("cache"),
            grain: Grain::GROUP,
            cache_limit,
            cache_keep_free: 0,
            saved: dir.path().join("saved"),
            saved_keep: Duration::MAX,
            saved_bytes_max: u64::MAX,
            vanished_max: 1000,
        };
        let store = Store::open(Arc::new(RealDisk), db.clone(), settings).unwrap();
        let origin = Origin { me: identity.peer(), now: 1_700_000_000, random: fastrand::u64(..), history_limit: 1000 };
        let namespace = Namespace::open(db.clone(), origin).unwrap();
        let options = Options {
            identity: identity.clone(),
            name: name.to_owned(),
            listen: listen.iter().map(|address| address.to_string()).collect(),
            advertise: Vec::new(),
            public: None,
            compress: Compress::Auto,
            congestion: Congestion::Auto,
            roster: Roster::open(db).unwrap(),
            store: store.clone(),
            namespace: namespace.clone(),
        };
        let peers = Peers::start(options)?;
        Ok(Self { name: name.to_owned(), identity, store, namespace, peers, dir })
    }

    pub(crate) fn id(&self) -> PeerId {
        self.identity.peer()
    }

    /// Puts a peer on the roster, and dials it if there is an address.
    pub(crate) fn trust(&self, id: PeerId, name: &str, address: Option<SocketAddr>) {
        let addresses = address.iter().map(SocketAddr::to_string).collect();
        self.peers
            .roster()
            .set(Peer { id, name: name.to_owned(), addresses, told: Vec::new(), role: Role::Reader })
            .unwrap();
        self.peers.dial_now(id);
    }

    /// Pairs two, and waits until they are connected.
    pub(crate) async fn meet(&self, other: &Machine) {
        other.trust(self.id(), &self.name, None);
        self.trust(other.id(), &other.name, other.peers.listens_on());
        until("they are connected", || self.is_connected(other.id()) && other.is_connected(self.id())).await;
    }

    pub(crate) fn is_connected(&self, peer: PeerId) -> bool {
        self.peers.status().iter().any(|status| status.peer.id == peer && status.connected.is_some())
    }

    /// Has a file with these bytes from now on, in the arena "a".
    pub(crate) fn hold(&self, path: &str, bytes: &[u8]) -> BlobId {
        let (arena, size) = (arena(), bytes.len() as u64);
        let root_dir = self.dir.path().join("arena");
        fs::create_dir_all(&root_dir).unwrap();
        let file = root_dir.join(path);
        fs::write(&file, bytes).unwrap();
        let blob = self.link(path, bytes);
        self.namespace
            .set_arena(&Arena { name: arena.clone(), dir: Some(root_dir), public: false, root: None })
            .unwrap();
        let content = Content::File { blob, size, mode: 0o644 };
        let change = Change { path: rel_path(path), content, mtime: UnixTime { seconds: 1, nanos: 0 } };
        self.namespace.commit(&arena, &[change], 0, &mut |_| true).unwrap();
        blob
    }

    /// Links a file of the arena as if it had been hashed when it had these bytes, and nothing of it had moved since.
    fn link(&self, path: &str, bytes: &[u8]) -> BlobId {
        let root_dir = self.dir.path().join("arena");
        let fingerprint = Fingerprint::from(&fs::metadata(root_dir.join(path)).unwrap());
        let hashed = self.store.hash(bytes, bytes.len() as u64).unwrap();
        let blob = hashed.id();
        let root = self.store.add_root(&root_dir).unwrap();
        self.store
            .link(root, &[NewFile { path: path.into(), fingerprint, hashed, hashed_at: 1, racy: false }])
            .unwrap();
        blob
    }

    /// Lets bytes of a file rot, so that nobody notices.
    pub(crate) fn rot(&self, path: &str, range: ByteRange) {
        let path_there = self.dir.path().join("arena").join(path);
        let bytes = fs::read(&path_there).unwrap();
        let file = fs::File::options().write(true).open(path_there).unwrap();
        file.write_all_at(&vec![0x55; range.len() as usize], range.start()).unwrap();
        self.link(path, &bytes);
    }

    /// Has heard from `teller` that `origin` has files with these bytes.
    pub(crate) fn hear(&self, teller: PeerId, origin: PeerId, files: &[&[u8]]) {
        let statement = |(number, bytes): (u64, &&[u8])| {
            let content = Content::File { blob: BlobId::of(bytes), size: bytes.len() as u64, mode: 0o644 };
            let mtime = UnixTime { seconds: 1, nanos: 0 };
            let version = Version { content, mtime, seq: number, previous: Vec::new() };
            Statement { arena: arena(), path: rel_path(&format!("{number:04}")), version, at: 0 }
        };
        let statements: Vec<_> = (1..).zip(files).map(statement).collect();
        let mark = Mark { epoch: 7, seq: files.len() as u64, session: 0 };
        let batch = Batch { origin, mark, part: Part::Listing { after: None, end: None }, statements };
        assert_eq!(self.namespace.apply(teller, &batch).unwrap(), Applied::Taken);
    }

    /// Waits until this one has heard from `teller` that `origin` has a blob.
    pub(crate) async fn heard(&self, teller: &Machine, origin: &Machine, blob: BlobId) {
        let namespace = &self.namespace;
        until("it has heard of it", || {
            namespace.peers_with(blob).unwrap().contains(&origin.id())
                && namespace.told_by(origin.id()).unwrap() == Some(teller.id())
        })
        .await;
    }

    /// Fetches `range` of what should be `bytes` into memory, and checks it.
    pub(crate) async fn fetch(&self, bytes: &[u8], range: ByteRange) -> Result<Fetched, FetchError> {
        let (blob, size) = (BlobId::of(bytes), bytes.len() as u64);
        let ranges = RangeSet::from(Geometry::new(size).round_out(range));
        let sink = Arc::new(Mutex::new(Collected::default()));
        let fetched = self.peers.fetch(Want { blob, size, ranges: ranges.clone() }, sink.clone()).await?;
        let mut came = RangeSet::new();
        for piece in &sink.lock().unwrap().pieces {
            came.insert(piece.range());
            assert_eq!(&piece.bytes()[..], &bytes[piece.range().start() as usize..piece.range().end() as usize]);
        }
        assert_eq!(came, ranges);
        Ok(fetched)
    }

    /// The same, of all.
    pub(crate) async fn fetch_all(&self, bytes: &[u8]) -> Result<Fetched, FetchError> {
        self.fetch(bytes, ByteRange::new(0, bytes.len() as u64).unwrap()).await
    }

    pub(crate) fn cached(&self, bytes: &[u8]) -> RangeSet {
        self.store.cached_ranges(BlobId::of(bytes)).unwrap()
    }
}

/// Polls until `is_so`, for as long as anything may take.
pub(crate) async fn until(what: &str, is_so: impl Fn() -> bool) {
    let began = Instant::now();
    while !is_so() {
        assert!(began.elapsed() < DEADLINE, "it takes too long until {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

pub(crate) fn random_bytes(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    fastrand::Rng::with_seed(seed).fill(&mut bytes);
    bytes
}

fn arena() -> ArenaName {
    ArenaName::try_from("a".to_owned()).unwrap()
}

fn rel_path(path: &str) -> RelPath {
    RelPath::try_from(path.as_bytes().to_vec()).unwrap()
}

/// For what takes a moment.
pub(crate) const DEADLINE: Duration = Duration::from_secs(30);
