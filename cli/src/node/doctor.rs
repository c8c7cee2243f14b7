//! What is done about a database that is lost or damaged: spec/store.md, "A database made anew".

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use blobstore::{RealDisk, Rebuilt, Store, Verdict, strange_format};
use namespace::Namespace;
use peers::{Identity, Roster};
use redb::{Database, ReadOnlyDatabase};
use serde::Serialize;
use tracing::{info, warn};

use super::{
    Home, Node, database,
    database::{OpenError, Opened, expecting_panics},
    origin,
    record::Record,
};
use crate::{
    config::Config,
    failure::{Code, Failure, WhileDoing},
};

/// Opens the database of a home. One that is damaged is made anew first if this is a daemon; one that is gone is not.
pub(super) fn open_database(home: &Home, config: &Config, is_daemon: bool) -> Result<Opened, Failure> {
    let path = home.database();
    let opening = || format!("open {path:?}");
    if !database::is_there(&path).while_doing(opening())? && was_used(home)? {
        return Err(Failure::new(
            Code::Error,
            format!("the database {path:?} is gone or empty, and this home was in use"),
        )
        .hint(format!(
            "bring it back, or make it anew from what is left: {REBUILD}; {NEW} begins anew and forgets all"
        )));
    }
    let opened = match database::open(&path) {
        Err(OpenError::Damaged(reason)) if is_daemon && home.record().exists() => {
            warn!(?path, reason, "the database is damaged, and is made anew");
            rebuild(home, config, false)?;
            database::open(&path)
        }
        opened => opened,
    };
    opened.map_err(|error| failure_of(error).while_doing(opening()))
}

fn failure_of(error: OpenError) -> Failure {
    match error {
        OpenError::Damaged(_) => Failure::from(error).code(Code::Damage).hint(format!("make it anew: {REBUILD}")),
        error => error.into(),
    }
}

/// Whether a home without a database had one.
fn was_used(home: &Home) -> Result<bool, Failure> {
    Ok(home.record().exists() || !cache_files(&home.cache).while_doing(format!("list {:?}", home.cache))?.is_empty())
}

/// The directories of the cache that have blobs in them.
fn cache_files(cache: &Path) -> io::Result<Vec<PathBuf>> {
    let dirs = match fs::read_dir(cache) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        dirs => dirs?,
    };
    let dirs = dirs.map(|dir| Ok(dir?.path())).collect::<io::Result<Vec<_>>>()?;
    let has_blobs = |dir: &PathBuf| {
        let is_ours = dir.file_name().is_some_and(|name| name.len() == 2);
        is_ours && fs::read_dir(dir).is_ok_and(|mut files| files.next().is_some())
    };
    Ok(dirs.into_iter().filter(has_blobs).collect())
}

/// Makes the database of a home anew from the record, the cache and whatever can still be read of the old one, which is put
/// aside. Nobody may have the home open. Returns what was taken over, and the directory with the old database. Unless the user
/// asked for the rebuild (`is_asked`), it fails if the old database has another format.
pub(super) fn rebuild(home: &Home, config: &Config, is_asked: bool) -> Result<(Rebuilt, PathBuf), Failure> {
    let path = home.database();
    let making = || format!("make {path:?} anew");
    let record = Record::load(home)?;
    if record.is_none() {
        warn!(path = ?home.record(), "not there: arenas, pins and peers are to be added again");
    }
    let new = path.with_extension("new");
    remove(&new).while_doing(making())?;
    let db = database::open(&new).map_err(|error| failure_of(error).while_doing(making()))?.database;
    let rebuilt = fill(home, config, db.clone(), is_asked).while_doing(making())?;
    let aside = aside(home)?;
    for file in &rebuilt.unknown_saved {
        let name = file.file_name().unwrap_or_default();
        fs::rename(file, aside.join(name)).while_doing(format!("put {file:?} aside"))?;
    }
    decide(home, config, db, record).while_doing(making())?;
    put_aside(&path, &aside)?;
    fs::rename(&new, &path).and_then(|()| sync_dir(&home.state)).while_doing(making())?;
    info!(
        cached_blobs = rebuilt.blobs,
        cached_bytes = rebuilt.bytes,
        remembered_files = rebuilt.remembered,
        before = ?aside,
        "the database was made anew; arenas are read again"
    );
    Ok((rebuilt, aside))
}

/// Fills the new database with what can be proven, and what is remembered.
fn fill(home: &Home, config: &Config, db: Arc<Database>, is_asked: bool) -> Result<Rebuilt, Failure> {
    let mark = home.database().with_extension("reading");
    let damaged = open_damaged(&home.database(), &mark);
    let settings = config.store_settings(home)?;
    let strange = damaged.as_ref().filter(|_| !is_asked).and_then(|old| expecting_panics(|| strange_format(old)));
    let rebuilt = match strange {
        Some(error) => Err(super::format_failure(error)),
        None => expecting_panics(|| Store::rebuild(Arc::new(RealDisk), db, settings, damaged.as_ref()))
            .map_err(Failure::from),
    };
    // Closing it might stumble as well, and nothing is to be saved.
    std::mem::forget(damaged);
    remove(&mark)?;
    rebuilt
}

/// Puts what the record says into the new database.
fn decide(home: &Home, config: &Config, db: Arc<Database>, record: Option<Record>) -> Result<(), Failure> {
    let identity = Identity::load_or_create(&home.key())?;
    let namespace = Namespace::open(db.clone(), origin(&identity, config))?;
    let roster = Roster::open(db.clone())?;
    let Some(record) = record else { return Ok(()) };
    if let Some(limit) = record.cache_limit() {
        Store::open(Arc::new(RealDisk), db, config.store_settings(home)?)?.set_cache_limit(limit)?;
    }
    record.apply(&namespace, &roster)
}

/// Begins anew: what there is of a database and a record is put aside, and the cache is emptied at the next start.
pub(crate) fn begin_anew(home: &Home) -> Result<PathBuf, Failure> {
    let aside = aside(home)?;
    for file in [home.database(), home.record()] {
        put_aside(&file, &aside)?;
        remove(&file).while_doing(format!("remove {file:?}"))?;
    }
    database::open(&home.database()).map_err(failure_of)?;
    Ok(aside)
}

/// What a look at a home's own state came to.
#[derive(Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Checkup {
    /// Why the database is damaged, if it is.
    pub damage: Option<String>,
    /// Rows of the database, and those of them that do not decode.
    pub rows: u64,
    pub bad_rows: u64,
    /// Blobs of the cache, and those of which something did not prove and was forgotten.
    pub cached: u64,
    pub cached_damaged: u64,
}

impl Checkup {
    /// Whether the database is to be made anew.
    pub(crate) fn needs_rebuild(&self) -> bool {
        self.damage.is_some() || self.bad_rows > 0
    }
}

/// Reads and proves all of a home's own state: the database, and the cache. Fails if somebody has it open, or if the database
/// is gone.
pub(crate) fn check(home: &Home) -> Result<Checkup, Failure> {
    let config = Config::load(&home.config)?;
    let db = match open_database(home, &config, false) {
        Ok(opened) => opened.database,
        Err(failure) if failure.code == Code::Damage => {
            return Ok(Checkup { damage: Some(failure.reason()), ..Checkup::default() });
        }
        Err(failure) => return Err(failure),
    };
    let (in_store, in_namespace) = (blobstore::count_rows(&db), namespace::count_rows(&db));
    let ((rows, bad_rows), (more, more_bad)) = (in_store?, in_namespace?);
    let mut checkup = Checkup { rows: rows + more, bad_rows: bad_rows + more_bad, ..Checkup::default() };
    let store = Store::open(Arc::new(RealDisk), db, config.store_settings(home)?)?;
    for blob in store.cached()? {
        checkup.cached += 1;
        let verdict = store.verify_cached(blob, &|_| {})?;
        checkup.cached_damaged += u64::from(!matches!(verdict, None | Some(Verdict::Sound)));
    }
    Ok(checkup)
}

/// Makes the database of a home anew, if there is a reason to. `None` if it is whole.
pub(crate) fn heal(home: &Home) -> Result<Option<(Rebuilt, PathBuf)>, Failure> {
    let config = Config::load(&home.config)?;
    let is_gone = !database::is_there(&home.database())? && was_used(home)?;
    if !is_gone && !check(home)?.needs_rebuild() {
        return Ok(None);
    }
    rebuild(home, &config, true).map(Some)
}

/// Opens the damaged database, to read what can be read. While it is read, the file `mark` is there: if reading ends the
/// program, the next attempt does without.
fn open_damaged(path: &Path, mark: &Path) -> Option<ReadOnlyDatabase> {
    if mark.exists() || !database::is_there(path).unwrap_or(false) {
        return None;
    }
    let marked = fs::File::create(mark).and_then(|file| file.sync_all()).map_err(Failure::from);
    let opened = marked.and_then(|()| Ok(database::open_damaged(path)?));
    opened.inspect_err(|failure| info!(reason = failure.reason(), "nothing of the old database can be read")).ok()
}

/// Gives `file`, if it is there, a second name in the directory `aside`, or that one alone where files have one only.
fn put_aside(file: &Path, aside: &Path) -> Result<(), Failure> {
    if !file.exists() {
        return Ok(());
    }
    let kept = aside.join(file.file_name().unwrap_or_default());
    let put = fs::hard_link(file, &kept).or_else(|_| fs::rename(file, &kept)).and_then(|()| sync_dir(aside));
    put.while_doing(format!("put {file:?} aside"))
}

/// A new directory for what is put aside now.
fn aside(home: &Home) -> Result<PathBuf, Failure> {
    let names = (0..1000).map(|number| home.state.join(format!("{ASIDE}{number}")));
    for name in names {
        match fs::create_dir(&name) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            made => return made.map(|()| name).while_doing("put the old database aside"),
        }
    }
    Err(Failure::new(Code::Limit, format!("{:?} has a thousand damaged databases", home.state)))
}

impl Node {
    /// The directories in which damaged databases are that were made anew.
    pub(crate) fn put_aside(&self) -> Vec<PathBuf> {
        let is_one = |path: &PathBuf| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            name.strip_prefix(ASIDE).is_some_and(|number| number.parse::<u32>().is_ok())
        };
        let entries = fs::read_dir(&self.inner.home.state).into_iter().flatten();
        let mut found: Vec<_> = entries.filter_map(|entry| Some(entry.ok()?.path())).filter(is_one).collect();
        found.sort();
        found
    }
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn sync_dir(dir: &Path) -> io::Result<()> {
    fs::File::open(dir)?.sync_all()
}

/// Of the name of a directory for what is put aside; a number follows.
const ASIDE: &str = "damaged-";
const REBUILD: &str = "blob doctor --rebuild";
const NEW: &str = "blob doctor --new";
