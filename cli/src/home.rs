use std::{
    env, fs, io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::{DirBuilderExt, PermissionsExt},
    },
    path::{Path, PathBuf},
};

use rustix::fs::{Mode, OFlags};

use crate::failure::{Code, Failure, WhileDoing};

/// Where everything is that belongs to one daemon.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Home {
    /// The configuration file.
    pub config: PathBuf,
    /// Key, database, outboards.
    pub state: PathBuf,
    /// The cache.
    pub cache: PathBuf,
    /// The daemon's socket.
    pub socket: PathBuf,
}

impl Home {
    /// The places below `dir`, if it is given; otherwise those of the XDG base directory specification.
    pub fn new(dir: Option<&Path>) -> Result<Self, Failure> {
        if let Some(dir) = dir {
            let dir = std::path::absolute(dir).while_doing(format!("find {dir:?}"))?;
            return Ok(Self {
                config: dir.join("config.toml"),
                state: dir.join("state"),
                cache: dir.join("cache"),
                socket: dir.join("blobd.sock"),
            });
        }
        let home = env::var_os("HOME").map(PathBuf::from).filter(|home| home.is_absolute());
        let place = |variable: &str, below_home: &str| {
            let set = env::var_os(variable).map(PathBuf::from).filter(|dir| dir.is_absolute());
            set.or_else(|| home.as_ref().map(|home| home.join(below_home))).ok_or_else(|| {
                Failure::new(Code::Usage, format!("neither {variable} nor HOME is set"))
                    .hint("name a home with --home DIR")
            })
        };
        let state = place("XDG_STATE_HOME", ".local/state")?.join("blobd");
        let runtime = env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|dir| dir.is_absolute());
        Ok(Self {
            config: place("XDG_CONFIG_HOME", ".config")?.join("blobd/config.toml"),
            cache: place("XDG_CACHE_HOME", ".cache")?.join("blobd"),
            // Without a runtime directory, as in a bare shell over ssh, the socket lives with the state.
            socket: runtime.unwrap_or_else(|| state.clone()).join("blobd.sock"),
            state,
        })
    }

    /// Makes the directories, for their owner only.
    pub fn create(&self) -> Result<(), Failure> {
        let parents = [self.config.parent(), Some(&self.state), Some(&self.cache), self.socket.parent()];
        for dir in parents.into_iter().flatten() {
            let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(dir);
            made.while_doing(format!("create {dir:?}"))?;
        }
        let private = fs::set_permissions(&self.state, fs::Permissions::from_mode(0o700));
        private.while_doing(format!("make {:?} private", self.state))
    }

    /// Whether there is a key, and so an identity.
    pub fn exists(&self) -> bool {
        self.key().exists()
    }

    /// The file with this machine's key.
    pub fn key(&self) -> PathBuf {
        self.state.join("key")
    }

    /// The database.
    pub fn database(&self) -> PathBuf {
        self.state.join("blobd.redb")
    }

    /// What was decided for this home, beside the database.
    pub fn record(&self) -> PathBuf {
        self.state.join("record.toml")
    }

    /// The directory of outboards that are files.
    pub fn outboards(&self) -> PathBuf {
        self.state.join("outboards")
    }

    /// The directory of the bytes that repairs replaced.
    pub fn saved(&self) -> PathBuf {
        self.state.join("saved")
    }

    /// The directories that are never indexed, even inside an arena: as they are, without symbolic links.
    pub fn own_dirs(&self) -> Vec<PathBuf> {
        let dirs = [Some(self.state.as_path()), Some(&self.cache), self.config.parent()];
        dirs.into_iter().flatten().map(|dir| dir.canonicalize().unwrap_or_else(|_| dir.to_owned())).collect()
    }
}

/// The path of a socket, made short enough for the address of one (108 bytes, unix(7)): a longer one leads through its directory,
/// which is open meanwhile.
pub(crate) struct SocketPath {
    path: PathBuf,
    _dir: Option<OwnedFd>,
}

impl SocketPath {
    /// Fails if a directory is to be opened and is not there.
    pub(crate) fn of(socket: &Path) -> io::Result<Self> {
        let (Some(dir), Some(name)) = (socket.parent(), socket.file_name()) else {
            return Ok(Self { path: socket.to_owned(), _dir: None });
        };
        if socket.as_os_str().len() < ADDRESS_LEN {
            return Ok(Self { path: socket.to_owned(), _dir: None });
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let dir = rustix::fs::open(dir, flags, Mode::empty())?;
        Ok(Self { path: Path::new(&format!("/proc/self/fd/{}", dir.as_raw_fd())).join(name), _dir: Some(dir) })
    }
}

impl AsRef<Path> for SocketPath {
    fn as_ref(&self) -> &Path {
        &self.path
    }
}

/// With the zero byte at its end.
const ADDRESS_LEN: usize = 108;

/// What the host is called, or `blobd` if that is no use as a name.
pub(crate) fn host_name() -> String {
    let name = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let short = name.split('.').next().unwrap_or_default();
    let fits = !short.is_empty() && short.len() <= 64 && short.chars().all(|c| c.is_ascii_alphanumeric() || c == '-');
    if fits && !short.starts_with('-') { short.to_owned() } else { "blobd".to_owned() }
}

/// Whether an I/O error says that there is no such file.
pub(crate) fn is_not_found(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound
}
