//! A directory over nfsserve, read-only: as little as that crate asks for. What a directory has is read once, so that
//! the rival pays for its own work only.

use std::{
    collections::HashMap,
    fs::{self, File},
    io,
    net::SocketAddr,
    os::unix::{
        ffi::{OsStrExt, OsStringExt},
        fs::FileExt,
    },
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use nfsserve::{
    fs_util::metadata_to_fattr3,
    nfs::{fattr3, fileid3, filename3, nfspath3, nfsstat3, sattr3},
    tcp::{NFSTcp, NFSTcpListener},
    vfs::{DirEntry, NFSFileSystem, ReadDirResult, VFSCapabilities},
};

/// The hidden subcommand that serves a directory, in a process of its own.
pub(crate) const SERVE: &str = "nfsserve";

/// Serves `dir` as `/` for as long as this process lives.
pub(crate) fn serve(dir: &Path, address: SocketAddr) -> io::Result<()> {
    let mirror = Mirror { known: Mutex::new(Known { paths: vec![dir.to_owned()], dirs: HashMap::new() }) };
    tokio::runtime::Runtime::new()?.block_on(async {
        let listener = NFSTcpListener::bind(&address.to_string(), mirror).await?;
        listener.handle_forever().await
    })
}

struct Mirror {
    known: Mutex<Known>,
}

struct Known {
    /// By id, less one.
    paths: Vec<PathBuf>,
    dirs: HashMap<fileid3, Arc<Dir>>,
}

/// A directory's entries, which have ids one after the other.
struct Dir {
    first: fileid3,
    names: Vec<Vec<u8>>,
    ids: HashMap<Vec<u8>, fileid3>,
}

impl Mirror {
    fn path(&self, id: fileid3) -> Result<PathBuf, nfsstat3> {
        let known = self.known.lock().expect("nobody panics");
        let index = usize::try_from(id).ok().and_then(|id| id.checked_sub(1));
        index.and_then(|index| known.paths.get(index)).cloned().ok_or(nfsstat3::NFS3ERR_STALE)
    }

    fn dir(&self, id: fileid3) -> Result<Arc<Dir>, nfsstat3> {
        let path = self.path(id)?;
        let mut known = self.known.lock().expect("nobody panics");
        if let Some(dir) = known.dirs.get(&id) {
            return Ok(dir.clone());
        }
        let first = known.paths.len() as fileid3 + 1;
        let mut dir = Dir { first, names: Vec::new(), ids: HashMap::new() };
        for (entry, id) in fs::read_dir(&path).map_err(status)?.zip(first..) {
            let name = entry.map_err(status)?.file_name().into_vec();
            known.paths.push(path.join(std::ffi::OsStr::from_bytes(&name)));
            dir.ids.insert(name.clone(), id);
            dir.names.push(name);
        }
        Ok(known.dirs.entry(id).or_insert(Arc::new(dir)).clone())
    }

    fn attributes(&self, id: fileid3) -> Result<fattr3, nfsstat3> {
        let meta = fs::symlink_metadata(self.path(id)?).map_err(status)?;
        Ok(metadata_to_fattr3(id, &meta))
    }
}

#[async_trait::async_trait]
impl NFSFileSystem for Mirror {
    fn capabilities(&self) -> VFSCapabilities {
        VFSCapabilities::ReadOnly
    }

    fn root_dir(&self) -> fileid3 {
        1
    }

    async fn lookup(&self, dirid: fileid3, filename: &filename3) -> Result<fileid3, nfsstat3> {
        self.dir(dirid)?.ids.get(&filename.0).copied().ok_or(nfsstat3::NFS3ERR_NOENT)
    }

    async fn getattr(&self, id: fileid3) -> Result<fattr3, nfsstat3> {
        self.attributes(id)
    }

    async fn read(&self, id: fileid3, offset: u64, count: u32) -> Result<(Vec<u8>, bool), nfsstat3> {
        let file = File::open(self.path(id)?).map_err(status)?;
        let left = file.metadata().map_err(status)?.len().saturating_sub(offset);
        let mut bytes = vec![0; u64::from(count).min(left) as usize];
        file.read_exact_at(&mut bytes, offset).map_err(status)?;
        Ok((bytes, left <= u64::from(count)))
    }

    async fn readdir(&self, dirid: fileid3, start_after: fileid3, max: usize) -> Result<ReadDirResult, nfsstat3> {
        let dir = self.dir(dirid)?;
        let skipped = (start_after + 1).saturating_sub(dir.first) as usize;
        let left = dir.names.get(skipped..).unwrap_or_default();
        let entry = |(name, fileid): (&Vec<u8>, fileid3)| {
            Ok(DirEntry { fileid, name: name.clone().into(), attr: self.attributes(fileid)? })
        };
        let entries = left.iter().zip(dir.first + skipped as fileid3..).take(max).map(entry);
        Ok(ReadDirResult { entries: entries.collect::<Result<_, nfsstat3>>()?, end: left.len() <= max })
    }

    async fn readlink(&self, id: fileid3) -> Result<nfspath3, nfsstat3> {
        Ok(fs::read_link(self.path(id)?).map_err(status)?.into_os_string().into_vec().into())
    }

    async fn setattr(&self, _: fileid3, _: sattr3) -> Result<fattr3, nfsstat3> {
        Err(nfsstat3::NFS3ERR_ROFS)
    }

    async fn write(&self, _: fileid3, _: u64, _: &[u8]) -> Result<fattr3, nfsstat3> {
        Err(nfsstat3::NFS3ERR_ROFS)
    }

    async fn create(&self, _: fileid3, _: &filename3, _: sattr3) -> Result<(fileid3, fattr3), nfsstat3> {
        Err(nfsstat3::NFS3ERR_ROFS)
    }

    async fn create_exclusive(&self, _: fileid3, _: &filename3) -> Result<fileid3, nfsstat3> {
        Err(nfsstat3::NFS3ERR_ROFS)
    }

    async fn mkdir(&self, _: fileid3, _: &filename3) -> Result<(fileid3, fattr3), nfsstat3> {
        Err(nfsstat3::NFS3ERR_ROFS)
    }

    async fn remove(&self, _: fileid3, _: &filename3) -> Result<(), nfsstat3> {
        Err(nfsstat3::NFS3ERR_ROFS)
    }

    async fn rename(&self, _: fileid3, _: &filename3, _: fileid3, _: &filename3) -> Result<(), nfsstat3> {
        Err(nfsstat3::NFS3ERR_ROFS)
    }

    async fn symlink(
        &self,
        _: fileid3,
        _: &filename3,
        _: &nfspath3,
        _: &sattr3,
    ) -> Result<(fileid3, fattr3), nfsstat3> {
        Err(nfsstat3::NFS3ERR_ROFS)
    }
}

fn status(error: io::Error) -> nfsstat3 {
    match error.kind() {
        io::ErrorKind::NotFound => nfsstat3::NFS3ERR_NOENT,
        io::ErrorKind::NotADirectory => nfsstat3::NFS3ERR_NOTDIR,
        _ => nfsstat3::NFS3ERR_IO,
    }
}
