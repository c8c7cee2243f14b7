//! A home that is open, and what is done with it. Knows nothing of HTTP or terminals.

mod blobs;
mod cache;
mod copy;
mod database;
mod doctor;
mod index;
mod like;
mod limits;
mod list;
mod mount;
mod patience;
mod pins;
mod read;
mod record;
mod repair;
mod scrub;
mod stall;
mod suspect;
mod under_way;
mod verify;
mod versions;
mod warm;
mod watch;

use std::{
    collections::HashMap,
    fs,
    net::SocketAddr,
    path::PathBuf,
    sync::{Arc, Mutex, OnceLock, PoisonError, RwLock, Weak},
    time::Duration,
};

use blobstore::{CacheUsage, RealDisk, RootId, Store, StoreError};
use namespace::{Arena, ArenaName, Namespace, NamespaceError, News, Origin, PeerId, Teller};
use peers::{Gate, Identity, Options, Peers, Roles, Roster, StartError};
use rustix::process::{Resource, getrlimit};
use tokio::{sync::Semaphore, task::spawn_blocking};
use tracing::{info, warn};

use crate::{
    config::Config,
    event::Reporter,
    failure::{Code, Failure, WhileDoing},
    home::{Home, host_name},
};

use database::Opened;
use index::ArenaState;
use verify::now;
use watch::Watching;

pub(crate) use cache::{CacheLimit, Trim};
pub(crate) use copy::{CopyScope, KeepAttributes, Place};
pub(crate) use database::explains_panic;
pub(crate) use doctor::{Checkup, begin_anew, check, heal};
pub(crate) use index::ScanTotals;
pub(crate) use limits::LimitChange;
pub(crate) use list::rfc3339;
pub(crate) use mount::{MountListen, MountSettings};
pub(crate) use pins::PinScope;
pub(crate) use read::READ_BYTES_MAX;
pub(crate) use scrub::{ScrubSettings, ScrubStatus};
pub(crate) use under_way::UnderWay;
pub(crate) use verify::{Scope, in_words};
pub(crate) use versions::HistoryScope;
pub(crate) use warm::WarmScope;
pub(crate) use watch::WatchSettings;

/// An open home: the store, the namespace and the peers of one machine. Cheap to clone; the clones are one.
#[derive(Clone)]
pub struct Node {
    inner: Arc<Inner>,
}

struct Inner {
    home: Home,
    database: Opened,
    name: String,
    store: Store,
    namespace: Namespace,
    peers: Peers,
    roots: Roots,
    /// For the bytes that are on their way here.
    gate: Gate,
    /// What scrubbing has come to.
    scrub: Mutex<ScrubStatus>,
    scrub_settings: ScrubSettings,
    /// What is to be kept here.
    keeping: pins::Keeping,
    /// For how long that is so after a deletion.
    pin_keep: Duration,
    /// One permit: verifying and mending take turns, for they would only fight over the disk.
    turn: Semaphore,
    /// For each arena, the turn to bring what is said of it in line.
    indexing: Mutex<HashMap<ArenaName, Arc<tokio::sync::Mutex<()>>>>,
    /// For changes in arenas that are being made ready one by one.
    placing: Semaphore,
    /// For small changes in arenas, of which many are under way.
    gathering: copy::Gathering,
    /// Changes that are ready but for their last steps, and the turn to take these.
    settling: Mutex<copy::Queue>,
    settling_turn: Arc<tokio::sync::Mutex<()>>,
    /// Arenas that were looked at a moment ago.
    held: copy::HeldArenas,
    /// The moves that this machine takes part in.
    moving: Arc<copy::Moving>,
    /// Directories that were made for what is in them.
    implied: copy::Implied,
    /// `get`s that did not come to their end.
    unfinished: copy::Unfinished,
    /// Which extended attributes are copied.
    keep_attributes: KeepAttributes,
    /// How the arenas that are held here are doing.
    arenas: Mutex<HashMap<ArenaName, ArenaState>>,
    mounts: index::MountTable,
    watch_settings: WatchSettings,
    watching: OnceLock<Arc<Watching>>,
    /// Where everything is offered as a folder.
    mount: OnceLock<SocketAddr>,
    /// What is to be looked at again.
    hints: Teller,
    hinted: Mutex<Option<News>>,
    /// The home record as it was written last.
    record: Mutex<Option<String>>,
    /// Running commands, for `blob status`.
    under_way: UnderWay,
}

/// The store's root for each arena held here.
type Roots = Arc<RwLock<HashMap<ArenaName, (RootId, bool)>>>;

/// What a node is to be like, beyond what its home says.
#[derive(Debug, Clone, Default)]
pub struct NodeOptions {
    /// What the machine calls itself.
    pub name: Option<String>,
    /// Where to listen, each `HOST:PORT`, or "none"; empty if that is not said.
    pub listen: Vec<String>,
    /// Whether not to listen at all: a node that lives for one command.
    pub deaf: bool,
}

impl Node {
    /// Opens a home, which must exist; nobody else may have it open. Starts listening and dialling.
    ///
    /// Needs a tokio runtime. The home's settings give way to `options`.
    pub fn open(home: &Home, options: &NodeOptions) -> Result<Self, Failure> {
        let config = Config::load(&home.config)?;
        home.create()?;
        let database = doctor::open_database(home, &config, !options.deaf)?;
        let db = database.database.clone();
        let opening = || format!("open {:?}", home.database());
        let identity = Identity::load_or_create(&home.key())?;
        let config_named = || format!("understand {:?}", home.config);
        let settings = config.store_settings(home).while_doing(config_named())?;
        let scrub_settings = ScrubSettings {
            period: config.scrub_period().while_doing(config_named())?,
            rate: config.scrub.rate.as_u64(),
            repair: config.scrub.repair,
        };
        let watch_settings = config.watch_settings().while_doing(config_named())?;
        let pin_keep = config.pin_keep().while_doing(config_named())?;
        let store = Store::open(Arc::new(RealDisk), db.clone(), settings).map_err(format_failure);
        let store = store.while_doing(opening())?;
        let namespace = Namespace::open(db.clone(), origin(&identity, &config)).map_err(|error| match error {
            NamespaceError::Format { found, known } => made_by_another(error, found > known),
            error => error.into(),
        });
        let namespace = namespace.while_doing(opening())?;
        let unfinished = copy::Unfinished::new(db.clone());
        let roster = Roster::open(db.clone()).while_doing(opening())?;
        let moving = Arc::new(copy::Moving::open(db, identity.peer())?);
        let roots = Roots::default();
        for arena in namespace.arenas()? {
            add_root(&store, &roots, &arena)?;
        }
        // A crash while an arena was given up leaves its files linked.
        for (root, _) in store.roots() {
            if !roots.read().unwrap_or_else(PoisonError::into_inner).values().any(|&(held, _)| held == root) {
                store.remove_root(root)?;
            }
        }
        let name = options.name.clone().or(config.name).unwrap_or_else(host_name);
        let public = config.serve.iroh.then(|| {
            let (store, roots) = (store.clone(), roots.clone());
            let is_public = move |blob| {
                let holders = store.holders(blob, HOLDERS_ASKED).unwrap_or_default();
                let roots = roots.read().unwrap_or_else(PoisonError::into_inner);
                holders.iter().any(|file| roots.values().any(|&(root, public)| public && root == file.root))
            };
            Arc::new(is_public) as _
        });
        let start = |listen: &[String]| {
            Peers::start(Options {
                identity: identity.clone(),
                name: name.clone(),
                listen: listen.to_vec(),
                advertise: config.advertise.clone(),
                public: public.clone(),
                compress: config.transfer.compress,
                congestion: config.transfer.congestion,
                roster: roster.clone(),
                store: store.clone(),
                namespace: namespace.clone(),
            })
        };
        let listen = match &config.listen {
            _ if !options.listen.is_empty() => Some(&options.listen),
            listen => listen.as_ref().map(|listen| &listen.0),
        };
        let peers = match listen.map(Vec::as_slice) {
            _ if options.deaf => start(&[]),
            Some([one]) if one == "none" => start(&[]),
            Some(listen) => start(listen),
            None => start(&[DEFAULT_LISTEN.to_owned()]).or_else(|error| match error {
                StartError::Listen(_) => {
                    warn!(
                        address = DEFAULT_LISTEN,
                        reason = tree::reason(&error),
                        "listening on another port than this one"
                    );
                    start(&[ANY_PORT.to_owned()])
                }
                error => Err(error),
            }),
        };
        let peers = peers.map_err(start_failure)?;
        let address = peers.listens_on().map(tracing::field::display);
        info!(id = %identity.peer(), name, address, "started");
        let (hints, hinted) = namespace::news(HINTS_MAX);
        let inner = Inner {
            home: home.clone(),
            database,
            name,
            store,
            namespace,
            peers,
            roots,
            gate: Gate::new(config.transfer.in_flight.as_u64()),
            scrub: Mutex::default(),
            scrub_settings,
            keeping: pins::Keeping::default(),
            pin_keep,
            turn: Semaphore::new(1),
            indexing: Mutex::default(),
            placing: Semaphore::new(PLACED_AT_ONCE),
            gathering: copy::Gathering::new(open_files_max()),
            settling: Mutex::default(),
            settling_turn: Arc::default(),
            held: copy::HeldArenas::default(),
            moving,
            implied: copy::Implied::default(),
            unfinished,
            keep_attributes: config.copy.attributes,
            arenas: Mutex::default(),
            mounts: index::MountTable::default(),
            watch_settings,
            watching: OnceLock::new(),
            mount: OnceLock::new(),
            hints,
            hinted: Mutex::new(Some(hinted)),
            record: Mutex::default(),
            under_way: UnderWay::default(),
        };
        let node = Self { inner: Arc::new(inner) };
        node.make_aside();
        node.hear_of_losses();
        node.keep_record();
        node.keep_record_of_peers();
        let orders: Weak<Inner> = Arc::downgrade(&node.inner);
        node.inner.peers.obey(orders);
        let describe: Weak<Inner> = Arc::downgrade(&node.inner);
        node.inner.peers.describe(describe);
        node.configure_limits(&config.limits)?;
        node.inner.database.reserve.set_waits(!options.deaf);
        Ok(node)
    }

    /// Makes the directory anew in which files wait for a moment before they take the place of others.
    fn make_aside(&self) {
        let aside = self.aside();
        let _ = fs::remove_dir_all(&aside);
        if let Err(error) = fs::create_dir(&aside) {
            warn!(path = ?aside, reason = tree::reason(&error), "cannot be made; files that replace others are staged beside them");
        }
    }

    /// Ends all connections. Work that is under way is left where it is safe.
    pub async fn shutdown(&self) {
        // A commit that waits for free space must not keep the daemon from stopping.
        self.inner.database.reserve.set_waits(false);
        self.stop_moving().await;
        // A scan or a mending stops between two files once nobody listens any more.
        let all = async {
            let _turn = self.inner.turn.acquire().await;
            let arenas = self.inner.indexing.lock().unwrap_or_else(PoisonError::into_inner).clone();
            for turn in arenas.into_values() {
                drop(turn.lock_owned().await);
            }
            drop(self.inner.settling_turn.lock().await);
        };
        let _ = tokio::time::timeout(Duration::from_secs(5), all).await;
        self.inner.peers.shutdown().await;
        let store = self.inner.store.clone();
        if let Err(failure) = blocking(move || Ok(store.note_uses()?)).await {
            warn!(reason = failure.reason(), "the next start will not know when the cache was used");
        }
        info!("stopped");
    }

    /// Waits until the database cannot be relied on any more, which may be never; returns why.
    pub(crate) async fn database_failed(&self) -> Failure {
        let mut health = self.inner.database.failed.clone();
        let mut damage = database::damage();
        let failure = tokio::select! {
            Ok(reason) = health.wait_for(Option::is_some) => Failure::new(Code::Error, reason.clone().unwrap_or_default())
                .hint("completed changes are safe; start the daemon again once the disk works"),
            Ok(reason) = damage.wait_for(Option::is_some) => damaged(reason.clone().unwrap_or_default()),
            else => std::future::pending().await,
        };
        failure.while_doing(format!("use {:?}", self.inner.home.database()))
    }

    /// What this machine calls itself.
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// Returns the running commands.
    pub(crate) fn under_way(&self) -> &UnderWay {
        &self.inner.under_way
    }

    /// Its home.
    pub fn home(&self) -> &Home {
        &self.inner.home
    }

    /// The other machines.
    pub fn peers(&self) -> &Peers {
        &self.inner.peers
    }

    /// How scrubbing is set.
    pub(crate) fn scrub_settings(&self) -> ScrubSettings {
        self.inner.scrub_settings
    }

    /// How changes are waited for.
    pub(crate) fn watch_settings(&self) -> WatchSettings {
        self.inner.watch_settings
    }

    /// Who may write here, as the configuration says now.
    pub(crate) fn roles(&self) -> Result<Roles, Failure> {
        Ok(Config::load(&self.inner.home.config)?.roles())
    }

    /// How full the cache is.
    pub fn cache_usage(&self) -> Result<CacheUsage, Failure> {
        Ok(self.inner.store.cache_usage()?)
    }

    /// What is where.
    pub fn namespace(&self) -> &Namespace {
        &self.inner.namespace
    }

    /// Holds the directory `dir` as arena `name` from now on, and indexes it. Without `dir`, follows the arena.
    pub async fn add_arena(&self, arena: Arena, reporter: &Reporter) -> Result<ScanTotals, Failure> {
        let node = self.clone();
        let adding = arena.clone();
        blocking(move || node.set_arena(&adding)).await.while_doing(format!("add the arena {}", arena.name))?;
        match arena.dir {
            Some(_) => self.scan(&arena.name, reporter).await,
            None => Ok(ScanTotals::default()),
        }
    }

    fn set_arena(&self, arena: &Arena) -> Result<(), Failure> {
        let known = self.inner.namespace.arenas()?;
        let held = known.iter().any(|known| known.name == arena.name && known.dir.is_some());
        if held && arena.dir.is_none() {
            return Err(Failure::new(Code::Usage, "this machine holds that arena already")
                .hint("to only follow it, give it up first: blob arena rm NAME"));
        }
        if let Some(dir) = &arena.dir {
            if !dir.is_dir() {
                return Err(Failure::new(Code::NotFound, format!("{dir:?} is not a directory")));
            }
            fs::read_dir(dir).while_doing(format!("read {dir:?}"))?;
            self.home_full().map_or(Ok(()), Err)?;
            let same_name = known.iter().find(|known| known.name == arena.name);
            if let Some(other) = same_name.and_then(|known| known.dir.as_ref()).filter(|other| *other != dir) {
                return Err(Failure::new(Code::Usage, format!("there is an arena of that name, at {other:?}"))
                    .hint("choose another name, or remove that arena first: blob arena rm NAME"));
            }
            let overlaps = |other: &PathBuf| other.starts_with(dir) || dir.starts_with(other);
            let overlapping = known.iter().filter(|known| known.name != arena.name);
            if let Some(other) = overlapping.filter_map(|known| known.dir.as_ref()).find(|other| overlaps(other)) {
                return Err(Failure::new(Code::Usage, format!("{dir:?} overlaps with an arena at {other:?}")));
            }
        }
        add_root(&self.inner.store, &self.inner.roots, arena)?;
        let root = known.iter().find(|known| known.name == arena.name).and_then(|known| known.root);
        self.inner.namespace.set_arena(&Arena { root, ..arena.clone() })?;
        self.keep_record();
        Ok(())
    }

    /// Gives up an arena. No file is touched.
    pub async fn remove_arena(&self, name: ArenaName) -> Result<(), Failure> {
        let _turn = self.turn().await;
        let _indexing = self.indexing_turn(&name).await;
        // What is put into the arena now is either said before, or finds no arena.
        let _settling = self.inner.settling_turn.lock().await;
        let node = self.clone();
        blocking(move || {
            let Some(arena) = node.inner.namespace.arenas()?.into_iter().find(|arena| arena.name == name) else {
                return Err(Failure::new(Code::NotFound, format!("this machine has no arena {name}")));
            };
            // Withdrawn first: nothing is offered that cannot be served.
            node.inner.namespace.remove_arena(&name, now())?;
            node.keep_record();
            let root = node.inner.roots.write().unwrap_or_else(PoisonError::into_inner).remove(&name);
            match root.filter(|_| arena.dir.is_some()) {
                Some((root, _)) => Ok(node.inner.store.remove_root(root)?),
                None => Ok(()),
            }
        })
        .await
    }

    /// The store's root for an arena that is held here.
    /// Waits for the turn to bring what is said of an arena in line.
    async fn indexing_turn(&self, arena: &ArenaName) -> tokio::sync::OwnedMutexGuard<()> {
        let turn = {
            let mut turns = self.inner.indexing.lock().unwrap_or_else(PoisonError::into_inner);
            turns.entry(arena.clone()).or_default().clone()
        };
        turn.lock_owned().await
    }

    fn root(&self, arena: &ArenaName) -> Option<RootId> {
        let roots = self.inner.roots.read().unwrap_or_else(PoisonError::into_inner);
        roots.get(arena).map(|&(root, _)| root)
    }

    /// What others call a machine that is not on the roster: with its id behind that if somebody else is called so here.
    fn name_by_others(&self, id: PeerId) -> String {
        match self.inner.namespace.name_of(id) {
            None => format!("{id:.16}"),
            Some(name) if name == self.inner.name || self.inner.peers.roster().by_name(&name).is_some() => {
                format!("{name}-{id:.8}")
            }
            Some(name) => name,
        }
    }

    /// The arena of which `root` is the root.
    fn arena_of(&self, root: RootId) -> Option<ArenaName> {
        let roots = self.inner.roots.read().unwrap_or_else(PoisonError::into_inner);
        roots.iter().find(|(_, held)| held.0 == root).map(|(arena, _)| arena.clone())
    }

    /// What a peer is called, `None` standing for this machine. One that is known only through others is called as they
    /// do, or by the first digits of its id.
    fn peer_name(&self, peer: Option<PeerId>) -> String {
        match peer {
            None => self.inner.name.clone(),
            Some(id) => self.inner.peers.roster().get(id).map_or_else(|| self.name_by_others(id), |peer| peer.name),
        }
    }

    async fn turn(&self) -> tokio::sync::SemaphorePermit<'_> {
        self.inner.turn.acquire().await.expect("the semaphore is never closed")
    }
}

/// Runs what blocks on a thread for that.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T, Failure> + Send + 'static) -> Result<T, Failure> {
    spawn_blocking(work).await.unwrap_or_else(|panic| {
        let damage = database::damage().borrow().clone();
        Err(damage.map_or_else(|| Failure::new(Code::Error, format!("a bug: {panic}")), damaged))
    })
}

/// The failure of whatever needs a database that is damaged.
fn damaged(reason: String) -> Failure {
    Failure::new(Code::Damage, format!("the database is damaged: {reason}"))
        .hint("the daemon ends; when it is started again, it makes the database anew from what can be proven")
}

/// Who speaks, from now on, as this machine.
fn origin(identity: &Identity, config: &Config) -> Origin {
    Origin { me: identity.peer(), now: now() / 1000, random: fastrand::u64(..), history_limit: config.history.limit }
}

fn add_root(store: &Store, roots: &Roots, arena: &Arena) -> Result<(), Failure> {
    if let Some(dir) = &arena.dir {
        let root = store.add_root(dir)?;
        let mut roots = roots.write().unwrap_or_else(PoisonError::into_inner);
        roots.insert(arena.name.clone(), (root, arena.public));
    }
    Ok(())
}

/// How many files this process may have open.
fn open_files_max() -> u64 {
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}

/// Explains a store error that may be about the format.
fn format_failure(error: StoreError) -> Failure {
    match error {
        StoreError::Format { found, known } => made_by_another(error, found > known),
        error => error.into(),
    }
}

/// A database that another version of this program made.
fn made_by_another(error: impl std::error::Error + 'static, is_newer: bool) -> Failure {
    Failure::from(error).hint(match is_newer {
        true => "a newer blobd made it: run that one, or another home with --home DIR",
        false => "an older blobd made it, which this one cannot read: make a new home with --home DIR",
    })
}

/// Why the network could not be begun with, as far as the user can help it.
fn start_failure(error: StartError) -> Failure {
    match error {
        StartError::Listen(_) => {
            Failure::from(error).hint("another address: --listen HOST:PORT, or none to dial others only")
        }
        StartError::ListenAddress(_) => Failure::from(error)
            .code(Code::Usage)
            .hint("such as --listen [::]:7700, or \"none\" alone to dial others only"),
        StartError::Name(_) => Failure::from(error).code(Code::Usage).hint("see name in config.toml, and --name"),
        StartError::Address(_) => Failure::from(error)
            .code(Code::Usage)
            .while_doing("tell others where this machine is")
            .hint("see advertise in config.toml"),
        error => error.into(),
    }
}

/// How many changes in arenas are made ready at once; the bytes of files are bounded by themselves.
const PLACED_AT_ONCE: usize = 64;
/// How many paths wait to be looked at again.
const HINTS_MAX: usize = 65_536;
const DEFAULT_LISTEN: &str = "[::]:7700";
const ANY_PORT: &str = "[::]:0";
/// In how many places a blob may be for it to be found public.
const HOLDERS_ASKED: usize = 64;
