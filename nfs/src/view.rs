//! The tree of everything: what handles mean, and directories as long as they stay what they are.

use std::{
    collections::HashMap,
    num::NonZeroUsize,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use namespace::{ArenaName, Key, Namespace, NamespaceError, RelPath};
use tokio::{sync::Mutex as AsyncMutex, task::spawn_blocking};
use tree::UnixTime;

use crate::{
    directory::{Directory, Entry, FileVersion, Kind, Place},
    handle::{Handle, Ids, ROOT},
};

/// What is shown, and who asks for it. Cheap to clone.
#[derive(Clone)]
pub(crate) struct View {
    inner: Arc<Inner>,
}

struct Inner {
    namespace: Namespace,
    ids: Ids,
    /// The mtime of what has none.
    born: UnixTime,
    kept: Mutex<Kept>,
    /// Held by who puts a directory together.
    building: Mutex<HashMap<Place, Arc<AsyncMutex<()>>>>,
}

/// The directories that are kept.
#[derive(Default)]
struct Kept {
    directories: HashMap<Place, KeptDirectory>,
    /// How many entries they have.
    entries: usize,
    /// All changes up to this generation have been taken note of.
    seen: u64,
    /// Counts uses.
    clock: u64,
    /// Where the directories are whose handles were given out lately.
    places: HashMap<u64, Place>,
    /// Versions of files that were read lately, by the file's id and their number; with when that was.
    versions: HashMap<(u64, u64), (FileVersion, u64)>,
}

struct KeptDirectory {
    directory: Arc<Directory>,
    is_stale: bool,
    built: Instant,
    /// How long that took.
    took: Duration,
    used: u64,
}

/// What a handle names.
#[derive(Debug, Clone)]
pub(crate) enum Object {
    Directory(Arc<Directory>),
    File {
        id: u64,
        version: FileVersion,
        /// Whether it is the version that is shown.
        is_shown: bool,
    },
    Symlink {
        id: u64,
        target: Box<[u8]>,
        mtime: UnixTime,
    },
}

/// Why there is no such object.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ViewError {
    /// What the handle names is gone.
    #[error("it is gone")]
    Stale,
    #[error("there is no such entry")]
    NotFound,
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
}

/// How fresh a directory has to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fresh {
    /// As it is now.
    Now,
    /// A listing goes on with what it began with.
    Listing,
}

impl View {
    pub(crate) fn new(namespace: Namespace, key: [u8; 32], born: UnixTime) -> Self {
        let (kept, building) = (Mutex::default(), Mutex::default());
        Self { inner: Arc::new(Inner { namespace, ids: Ids(key), born, kept, building }) }
    }

    pub(crate) fn ids(&self) -> &Ids {
        &self.inner.ids
    }

    /// What a handle names.
    pub(crate) async fn resolve(&self, handle: &Handle) -> Result<Object, ViewError> {
        if handle.is_root() {
            return Ok(Object::Directory(self.directory(&Place::Root, Fresh::Now).await?));
        }
        let place = match self.place(handle.parent) {
            Some(place) => place,
            None => self.find_parent(handle).await?,
        };
        let parent = match self.directory(&place, Fresh::Now).await {
            Err(ViewError::NotFound) => return Err(ViewError::Stale),
            parent => parent?,
        };
        let entry = parent.by_id(handle.id).ok_or(ViewError::Stale)?;
        match self.object(&parent, entry).await {
            Ok(Object::File { version, .. }) if version.number() != handle.version => {
                self.older(&parent, entry, handle.version).await
            }
            Ok(Object::Directory(_) | Object::Symlink { .. }) if handle.version != 0 => {
                self.older(&parent, entry, handle.version).await
            }
            Err(ViewError::NotFound) => Err(ViewError::Stale),
            object => object,
        }
    }

    /// What an entry of a directory is.
    pub(crate) async fn object(&self, parent: &Directory, entry: &Entry) -> Result<Object, ViewError> {
        Ok(match &entry.kind {
            Kind::File(version) => Object::File { id: entry.id, version: *version, is_shown: true },
            Kind::Symlink { target, mtime } => Object::Symlink { id: entry.id, target: target.clone(), mtime: *mtime },
            Kind::Directory { .. } => {
                let place = parent.place.join(&entry.name).ok_or(ViewError::NotFound)?;
                Object::Directory(self.directory(&place, Fresh::Now).await?)
            }
        })
    }

    /// A directory, put together anew if it changed. [`ViewError::NotFound`] if there is none.
    pub(crate) async fn directory(&self, place: &Place, fresh: Fresh) -> Result<Arc<Directory>, ViewError> {
        if let Some(directory) = self.kept_directory(place, fresh) {
            return Ok(directory);
        }
        let turn = {
            let mut building = self.inner.building.lock().unwrap_or_else(PoisonError::into_inner);
            building.retain(|_, turn| Arc::strong_count(turn) > 1);
            building.entry(place.clone()).or_default().clone()
        };
        let _turn = turn.lock_owned().await;
        if let Some(directory) = self.kept_directory(place, fresh) {
            return Ok(directory);
        }
        let (view, place) = (self.clone(), place.clone());
        match spawn_blocking(move || view.build(place)).await {
            Ok(directory) => directory?.ok_or(ViewError::NotFound),
            Err(panic) => std::panic::resume_unwind(panic.into_panic()),
        }
    }

    /// The same, if it is kept.
    pub(crate) fn kept_directory(&self, place: &Place, fresh: Fresh) -> Option<Arc<Directory>> {
        let mut kept = self.kept();
        kept.clock += 1;
        let clock = kept.clock;
        let found = kept.directories.get_mut(place)?;
        let age = found.built.elapsed();
        let may_be_stale = age < found.took * BUILD_SHARE || fresh == Fresh::Listing && age < LISTING_LIMIT;
        if found.is_stale && !may_be_stale {
            return None;
        }
        found.used = clock;
        Some(found.directory.clone())
    }

    /// The directory that a handle's object is in, if it is kept.
    pub(crate) fn directory_of(&self, handle: &Handle) -> Option<Arc<Directory>> {
        self.kept_directory(&self.place(handle.parent)?, Fresh::Listing)
    }

    /// Takes note of a version that is being read, so that it is still known when another one is shown.
    pub(crate) fn note_read(&self, id: u64, version: FileVersion) {
        let mut kept = self.inner.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.clock += 1;
        let clock = kept.clock;
        kept.versions.insert((id, version.number()), (version, clock));
        if kept.versions.len() > VERSIONS_MAX {
            // The older half goes, so that this is seldom done.
            let mut uses: Vec<u64> = kept.versions.values().map(|&(_, used)| used).collect();
            let (_, &mut median, _) = uses.select_nth_unstable(VERSIONS_MAX / 2);
            kept.versions.retain(|_, &mut (_, used)| used > median);
        }
    }

    /// A version that is no longer shown.
    async fn older(&self, parent: &Directory, entry: &Entry, number: u64) -> Result<Object, ViewError> {
        let known = self.kept().versions.get(&(entry.id, number)).map(|&(version, _)| version);
        let version = match (known, parent.place.join(&entry.name)) {
            (Some(version), _) => Some(version),
            (None, Some(Place::In(arena, Some(path)))) => {
                let namespace = self.inner.namespace.clone();
                let looking = spawn_blocking(move || find_version(&namespace, &arena, &path, number));
                looking.await.map_err(|_| ViewError::Stale)??
            }
            _ => None,
        };
        let version = version.ok_or(ViewError::Stale)?;
        self.note_read(entry.id, version);
        Ok(Object::File { id: entry.id, version, is_shown: false })
    }

    fn place(&self, id: u64) -> Option<Place> {
        if id == ROOT { Some(Place::Root) } else { self.kept().places.get(&id).cloned() }
    }

    /// Looks for the directory that a handle's object is in, from the root down.
    async fn find_parent(&self, handle: &Handle) -> Result<Place, ViewError> {
        let mut left = SEARCH_MAX;
        let mut ways = vec![(Place::Root, 0)];
        while let Some((place, at)) = ways.pop() {
            left = NonZeroUsize::new(left.get() - 1).ok_or(ViewError::Stale)?;
            let directory = match self.directory(&place, Fresh::Now).await {
                Err(ViewError::NotFound) => continue,
                directory => directory?,
            };
            let is_last = at == handle.depth();
            for Entry { id, name, kind } in &directory.entries {
                let is_on_way = if is_last { *id == handle.parent } else { handle.may_pass(at, *id) };
                if !is_on_way || !matches!(kind, Kind::Directory { .. }) {
                    continue;
                }
                let Some(place) = place.join(name) else { continue };
                if is_last {
                    return Ok(place);
                }
                ways.push((place, at + 1));
            }
        }
        Err(ViewError::Stale)
    }

    /// Puts a directory together, and keeps it.
    fn build(&self, place: Place) -> Result<Option<Arc<Directory>>, NamespaceError> {
        let Inner { namespace, ids, born, .. } = &*self.inner;
        let (began, generation) = (Instant::now(), namespace.generation());
        let directory = Directory::read(namespace, ids, place.clone(), *born)?.map(Arc::new);
        let mut kept = self.kept();
        if let Some(old) = kept.directories.remove(&place) {
            kept.entries -= old.directory.entries.len();
        }
        let Some(directory) = directory else { return Ok(None) };
        // What was committed meanwhile was taken note of before this was there to be stale.
        let is_stale = namespace.generation() != generation
            && namespace
                .changed_since(generation)
                .is_none_or(|keys| place == Place::Root || keys.iter().any(|key| concerns(key, &directory)));
        kept.clock += 1;
        let (used, took) = (kept.clock, began.elapsed());
        kept.entries += directory.entries.len();
        if kept.places.len() >= PLACES_MAX {
            kept.places.clear();
        }
        kept.places.insert(directory.id, place.clone());
        let built = KeptDirectory { directory: directory.clone(), is_stale, built: Instant::now(), took, used };
        kept.directories.insert(place, built);
        kept.make_room();
        Ok(Some(directory))
    }

    /// The directories that are kept, with what is stale marked.
    fn kept(&self) -> MutexGuard<'_, Kept> {
        let namespace = &self.inner.namespace;
        let mut kept = self.inner.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let generation = namespace.generation();
        if generation != kept.seen {
            let changed = namespace.changed_since(kept.seen);
            kept.seen = generation;
            kept.mark_stale(&self.inner.ids, changed);
        }
        kept
    }
}

impl Kept {
    /// Marks what `changed` makes stale: all if that is not known.
    fn mark_stale(&mut self, ids: &Ids, changed: Option<Vec<Key>>) {
        let Some(changed) = changed else {
            self.directories.values_mut().for_each(|kept| kept.is_stale = true);
            return;
        };
        if let Some(root) = self.directories.get_mut(&Place::Root) {
            root.is_stale = true;
        }
        for (arena, path) in changed {
            // Its own mtime, if it is a directory; what it is in; and what comes or goes with it further up.
            let mut place = Place::In(arena, Some(path));
            if let Some(kept) = self.directories.get_mut(&place) {
                kept.is_stale = true;
            }
            let mut is_direct = true;
            while let Some(above) = place.parent() {
                if let Some(kept) = self.directories.get_mut(&above)
                    && (is_direct || !kept.directory.says(place.id(ids)))
                {
                    kept.is_stale = true;
                }
                (place, is_direct) = (above, false);
            }
        }
    }

    /// Forgets the directories that were not used for longest.
    fn make_room(&mut self) {
        if self.entries <= ENTRIES_MAX && self.directories.len() <= PLACES_MAX {
            return;
        }
        let mut uses: Vec<(u64, Place)> =
            self.directories.iter().map(|(place, kept)| (kept.used, place.clone())).collect();
        uses.sort_by_key(|&(used, _)| used);
        // One that was asked for just now stays, however large it is.
        uses.pop();
        for (_, place) in uses {
            if self.entries <= ENTRIES_MAX / 2 && self.directories.len() <= PLACES_MAX / 2 {
                break;
            }
            if let Some(gone) = self.directories.remove(&place) {
                self.entries -= gone.directory.entries.len();
            }
        }
    }
}

impl Directory {
    /// Whether a peer says that there is a directory with that id.
    fn says(&self, id: u64) -> bool {
        self.by_id(id).is_some_and(|entry| matches!(entry.kind, Kind::Directory { is_said: true }))
    }
}

/// Whether a change may change what a directory shows.
fn concerns((arena, path): &Key, directory: &Directory) -> bool {
    match &directory.place {
        Place::Root => true,
        Place::In(of, _) if of != arena => false,
        Place::In(_, None) => true,
        Place::In(_, Some(dir)) => path == dir || path.is_within(dir),
    }
}

/// A version that anybody shows or has shown at a path.
fn find_version(
    namespace: &Namespace,
    arena: &ArenaName,
    path: &RelPath,
    number: u64,
) -> Result<Option<FileVersion>, NamespaceError> {
    let is_it = |version: &namespace::Version| {
        FileVersion::of(&version.content, version.mtime).filter(|version| version.number() == number)
    };
    if let Some(found) = namespace.versions(arena, path)?.iter().find_map(|(_, version)| is_it(version)) {
        return Ok(Some(found));
    }
    Ok(namespace.past(arena, path)?.iter().rev().find_map(is_it))
}

/// A directory may be stale for as many times what it took to put it together.
const BUILD_SHARE: u32 = 10;
/// For so long a listing goes on with what it began with.
const LISTING_LIMIT: Duration = Duration::from_secs(10);
/// So many entries of all directories together are kept.
const ENTRIES_MAX: usize = 500_000;
/// Of so many directories it is known where they are.
const PLACES_MAX: usize = 100_000;
/// So many versions that were read are remembered.
const VERSIONS_MAX: usize = 4_096;
/// Into so many directories is looked for one that a handle names.
const SEARCH_MAX: NonZeroUsize = NonZeroUsize::new(4_096).unwrap();
