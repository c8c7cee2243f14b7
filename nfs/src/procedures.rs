//! The procedures of NFS version 3 (RFC 1813, section 3).

use std::sync::Arc;

use bytes::Bytes;
use nfs3_types::{
    nfs3::{
        ACCESS3_EXECUTE, ACCESS3_LOOKUP, ACCESS3_READ, FSF3_HOMOGENEOUS, FSF3_SYMLINK, FSINFO3resok, FSSTAT3resok,
        NFS_PROGRAM as Procedure, Nfs3Option, PATHCONF3resok, nfs_fh3, nfsstat3, nfstime3, post_op_attr,
    },
    rpc::accept_stat_data,
    xdr_codec::{Opaque, Pack},
};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Duration, Instant},
};
use tracing::{debug, error, warn};
use tree::ByteRange;

use crate::{
    directory::{Directory, Entry, Kind, Place},
    export::Export,
    handle::Handle,
    reader::ReadError,
    rpc::{Args, Call, Garbage, accepted, pack},
    view::{Fresh, Object, ViewError},
};

/// An answer on its way out.
#[derive(Default)]
pub(crate) struct Reply {
    pub(crate) head: Vec<u8>,
    /// Goes behind the head, and is filled up to a multiple of four bytes.
    pub(crate) data: Vec<Bytes>,
    /// The room that the data takes.
    pub(crate) room: Option<OwnedSemaphorePermit>,
}

impl From<Vec<u8>> for Reply {
    fn from(head: Vec<u8>) -> Self {
        Self { head, ..Self::default() }
    }
}

/// Answers a call to the NFS program of the right version. `room` is what data of this connection may take.
pub(crate) async fn answer(export: &Export, call: Call<'_>, room: &Arc<Semaphore>) -> Reply {
    let Ok(procedure) = Procedure::try_from(call.procedure) else {
        return accepted(call.xid, accept_stat_data::PROC_UNAVAIL).into();
    };
    let mut reply = Reply::from(accepted(call.xid, accept_stat_data::SUCCESS));
    let results = reply.head.len();
    let args = call.args;
    let outcome = match procedure {
        Procedure::NFSPROC3_NULL => args.end().map_err(Bad::from),
        Procedure::NFSPROC3_GETATTR => getattr(export, args, &mut reply.head).await,
        Procedure::NFSPROC3_LOOKUP => lookup(export, args, &mut reply.head).await,
        Procedure::NFSPROC3_ACCESS => access(export, args, &mut reply.head).await,
        Procedure::NFSPROC3_READLINK => readlink(export, args, &mut reply.head).await,
        Procedure::NFSPROC3_READ => read(export, args, room, &mut reply).await,
        Procedure::NFSPROC3_READDIR => readdir(export, args, false, &mut reply.head).await,
        Procedure::NFSPROC3_READDIRPLUS => readdir(export, args, true, &mut reply.head).await,
        Procedure::NFSPROC3_FSSTAT => fsstat(export, args, &mut reply.head).await,
        Procedure::NFSPROC3_FSINFO => fsinfo(export, args, &mut reply.head).await,
        Procedure::NFSPROC3_PATHCONF => pathconf(export, args, &mut reply.head).await,
        _ => Err(Bad::Status(nfsstat3::NFS3ERR_ROFS, None)),
    };
    match outcome {
        Ok(()) => reply,
        Err(Bad::Garbage) => accepted(call.xid, accept_stat_data::GARBAGE_ARGS).into(),
        Err(Bad::Status(status, attributes)) => {
            debug!(?procedure, %status, "refused");
            reply.head.truncate(results);
            pack(&status, &mut reply.head);
            let attributes = attributes.map_or(Nfs3Option::None, Nfs3Option::Some);
            match procedure {
                Procedure::NFSPROC3_GETATTR => {}
                // What was there before and is there now of one or two directories; none of it is told.
                Procedure::NFSPROC3_RENAME => pack(&[0; 16], &mut reply.head),
                Procedure::NFSPROC3_LINK => pack(&[0; 12], &mut reply.head),
                procedure if is_writing(procedure) => pack(&[0; 8], &mut reply.head),
                _ => pack(&attributes, &mut reply.head),
            }
            Reply::from(reply.head)
        }
    }
}

fn is_writing(procedure: Procedure) -> bool {
    use Procedure::*;
    let reading = [
        NFSPROC3_NULL,
        NFSPROC3_GETATTR,
        NFSPROC3_LOOKUP,
        NFSPROC3_ACCESS,
        NFSPROC3_READLINK,
        NFSPROC3_READ,
        NFSPROC3_READDIR,
        NFSPROC3_READDIRPLUS,
        NFSPROC3_FSSTAT,
        NFSPROC3_FSINFO,
        NFSPROC3_PATHCONF,
    ];
    !reading.contains(&procedure)
}

/// Why a call has no result.
enum Bad {
    Garbage,
    /// Perhaps with the attributes of the object asked of.
    Status(nfsstat3, Option<nfs3_types::nfs3::fattr3>),
}

impl From<Garbage> for Bad {
    fn from(Garbage: Garbage) -> Self {
        Self::Garbage
    }
}

impl From<nfsstat3> for Bad {
    fn from(status: nfsstat3) -> Self {
        Self::Status(status, None)
    }
}

impl From<ViewError> for Bad {
    fn from(error: ViewError) -> Self {
        match error {
            ViewError::Stale => nfsstat3::NFS3ERR_STALE.into(),
            ViewError::NotFound => nfsstat3::NFS3ERR_NOENT.into(),
            ViewError::Namespace(error) => {
                error!(reason = tree::reason(&error), "the namespace cannot be read");
                nfsstat3::NFS3ERR_SERVERFAULT.into()
            }
        }
    }
}

/// The handle that comes next.
fn handle(args: &mut Args<'_>) -> Result<Handle, Bad> {
    Handle::parse(args.opaque(HANDLE_BYTES_MAX)?).ok_or(nfsstat3::NFS3ERR_BADHANDLE.into())
}

/// The object whose handle comes next.
async fn object(export: &Export, args: &mut Args<'_>) -> Result<Object, Bad> {
    Ok(export.view.resolve(&handle(args)?).await?)
}

/// The same, if it is a directory.
async fn directory(export: &Export, args: &mut Args<'_>) -> Result<Arc<Directory>, Bad> {
    match object(export, args).await? {
        Object::Directory(directory) => Ok(directory),
        other => Err(Bad::Status(nfsstat3::NFS3ERR_NOTDIR, Some(export.look.object(&other)))),
    }
}

/// The only argument.
async fn only_object(export: &Export, mut args: Args<'_>) -> Result<Object, Bad> {
    let object = object(export, &mut args).await?;
    args.end()?;
    Ok(object)
}

/// Writes a part of a result.
type Part<'a> = &'a dyn Fn(&mut Vec<u8>);

/// A result: that it went well, then what it is.
fn succeed(out: &mut Vec<u8>, parts: &[Part<'_>]) {
    pack(&nfsstat3::NFS3_OK, out);
    parts.iter().for_each(|part| part(out));
}

fn known(export: &Export, object: &Object) -> post_op_attr {
    Nfs3Option::Some(export.look.object(object))
}

async fn getattr(export: &Export, args: Args<'_>, out: &mut Vec<u8>) -> Result<(), Bad> {
    let object = only_object(export, args).await?;
    succeed(out, &[&|out| pack(&export.look.object(&object), out)]);
    Ok(())
}

async fn lookup(export: &Export, mut args: Args<'_>, out: &mut Vec<u8>) -> Result<(), Bad> {
    let within = directory(export, &mut args).await?;
    let name = args.opaque(NAME_ARG_BYTES_MAX)?;
    args.end()?;
    let attributes = export.look.object(&Object::Directory(within.clone()));
    let refused = |status| Bad::Status(status, Some(attributes.clone()));
    if name.len() > NAME_BYTES_MAX {
        return Err(refused(nfsstat3::NFS3ERR_NAMETOOLONG));
    }
    let (object, handle) = match name {
        b"." => (Object::Directory(within.clone()), within.handle()),
        b".." => {
            let above = within.place.parent().unwrap_or(Place::Root);
            let above = export.view.directory(&above, Fresh::Now).await?;
            (Object::Directory(above.clone()), above.handle())
        }
        name => {
            let entry = within.by_name(export.view.ids(), name);
            let entry = entry.ok_or_else(|| refused(nfsstat3::NFS3ERR_NOENT))?;
            (export.view.object(&within, entry).await?, within.handle_of(entry))
        }
    };
    succeed(
        out,
        &[&|out| pack(&opaque(&handle.to_bytes()), out), &|out| pack(&known(export, &object), out), &|out| {
            pack(&Nfs3Option::Some(attributes.clone()), out)
        }],
    );
    Ok(())
}

async fn access(export: &Export, mut args: Args<'_>, out: &mut Vec<u8>) -> Result<(), Bad> {
    let object = object(export, &mut args).await?;
    let granted = args.u32()? & (ACCESS3_READ | ACCESS3_LOOKUP | ACCESS3_EXECUTE);
    args.end()?;
    succeed(out, &[&|out| pack(&known(export, &object), out), &|out| pack(&granted, out)]);
    Ok(())
}

async fn readlink(export: &Export, args: Args<'_>, out: &mut Vec<u8>) -> Result<(), Bad> {
    let object = only_object(export, args).await?;
    let Object::Symlink { target, .. } = &object else {
        return Err(Bad::Status(nfsstat3::NFS3ERR_INVAL, Some(export.look.object(&object))));
    };
    succeed(out, &[&|out| pack(&known(export, &object), out), &|out| pack(&opaque(target), out)]);
    Ok(())
}

async fn read(export: &Export, mut args: Args<'_>, room: &Arc<Semaphore>, reply: &mut Reply) -> Result<(), Bad> {
    let handle = handle(&mut args)?;
    let object = export.view.resolve(&handle).await?;
    let (offset, count) = (args.u64()?, args.u32()?);
    args.end()?;
    let attributes = export.look.object(&object);
    let Object::File { id, version, is_shown } = object else {
        let is_directory = matches!(object, Object::Directory(_));
        let status = if is_directory { nfsstat3::NFS3ERR_ISDIR } else { nfsstat3::NFS3ERR_INVAL };
        return Err(Bad::Status(status, Some(attributes)));
    };
    let end = offset.saturating_add(u64::from(count.min(READ_BYTES_MAX))).min(version.size);
    let range = ByteRange::new(offset, end).filter(|range| !range.is_empty());
    if let Some(range) = range {
        export.view.note_read(id, version);
        let missed = || export.missed(&handle, &version);
        let read = export.reader.read(version.blob, version.size, range, room, missed).await;
        let read = read.map_err(|error| {
            let blob = version.blob;
            warn!(%blob, %range, reason = tree::reason(&error), "cannot be read");
            let is_gone = matches!(error, ReadError::Nowhere) && !is_shown;
            let status = if is_gone { nfsstat3::NFS3ERR_STALE } else { nfsstat3::NFS3ERR_IO };
            Bad::Status(status, Some(attributes.clone()))
        })?;
        (reply.data, reply.room) = (read.pieces, Some(read.room));
    }
    // Fewer than asked for, if more takes long.
    let count = reply.data.iter().map(|piece| piece.len() as u32).sum::<u32>();
    let is_end = offset.saturating_add(count.into()) >= version.size;
    succeed(
        &mut reply.head,
        &[
            &|out| pack(&Nfs3Option::Some(attributes.clone()), out),
            &|out| pack(&count, out),
            &|out| pack(&is_end, out),
            // The length of the data, which comes behind.
            &|out| pack(&count, out),
        ],
    );
    Ok(())
}

/// READDIR, or with attributes and handles READDIRPLUS.
async fn readdir(export: &Export, mut args: Args<'_>, plus: bool, out: &mut Vec<u8>) -> Result<(), Bad> {
    let mut listed = directory(export, &mut args).await?;
    let (cookie, _verifier, count) = (args.u64()?, args.u64()?, args.u32()?);
    let limit = if plus { args.u32()? } else { count }.min(LISTING_BYTES_MAX) as usize;
    args.end()?;
    let attributes = export.look.object(&Object::Directory(listed.clone()));
    let refused = |status| Bad::Status(status, Some(attributes.clone()));
    if limit < LISTING_BYTES_MIN {
        return Err(refused(nfsstat3::NFS3ERR_TOOSMALL));
    }
    if cookie > DOTS
        && let Some(began_with) = export.view.kept_directory(&listed.place, Fresh::Listing)
    {
        listed = began_with;
    }
    let begins = out.len();
    let verifier = |out: &mut Vec<u8>| pack(&[0u8; 8], out);
    succeed(out, &[&|out| pack(&Nfs3Option::Some(attributes.clone()), out), &verifier]);
    // What ends the list, and whether it is the end.
    let limit = begins + limit - 8;
    let mut page = Page { out, limit, plus, entries: 0 };
    let itself = [(1, &b"."[..], listed.id), (2, &b".."[..], listed.parent)];
    let mut is_end = itself
        .iter()
        .filter(|(number, ..)| *number > cookie)
        .all(|&(number, name, id)| page.push(id, name, number, Nfs3Option::None, None));
    let until = Instant::now() + SUBDIRECTORIES_LIMIT;
    if is_end {
        for entry in listed.behind(cookie.max(DOTS)) {
            let attributes = match &entry.kind {
                _ if !plus => None,
                Kind::Directory { .. } => subdirectory(export, &listed, entry, until).await,
                _ => export.look.leaf(entry),
            };
            let attributes = attributes.map_or(Nfs3Option::None, Nfs3Option::Some);
            if !page.push(entry.id, &entry.name, entry.id, attributes, Some(listed.handle_of(entry))) {
                is_end = false;
                break;
            }
        }
    }
    if page.entries == 0 && !is_end {
        return Err(refused(nfsstat3::NFS3ERR_TOOSMALL));
    }
    pack(&false, out);
    pack(&is_end, out);
    Ok(())
}

/// What a directory in a directory looks like, if that is known by `until`: clients mostly go into it next.
async fn subdirectory(
    export: &Export,
    listed: &Directory,
    entry: &Entry,
    until: Instant,
) -> Option<nfs3_types::nfs3::fattr3> {
    let place = listed.place.join(&entry.name)?;
    let kept = export.view.kept_directory(&place, Fresh::Now);
    let directory = match kept {
        Some(directory) => directory,
        None if Instant::now() < until => export.view.directory(&place, Fresh::Now).await.ok()?,
        None => return None,
    };
    Some(export.look.object(&Object::Directory(directory)))
}

/// A part of a listing.
struct Page<'a> {
    out: &'a mut Vec<u8>,
    /// Up to where `out` may be filled.
    limit: usize,
    plus: bool,
    entries: usize,
}

impl Page<'_> {
    /// Appends an entry, or says that there is no room for it.
    fn push(&mut self, id: u64, name: &[u8], cookie: u64, attributes: post_op_attr, handle: Option<Handle>) -> bool {
        let before = self.out.len();
        pack(&true, self.out);
        pack(&id, self.out);
        pack(&opaque(name), self.out);
        pack(&cookie, self.out);
        if self.plus {
            pack(&attributes, self.out);
            let handle = handle.map(|handle| nfs_fh3 { data: Opaque::owned(handle.to_bytes()) });
            pack(&handle.map_or(Nfs3Option::None, Nfs3Option::Some), self.out);
        }
        let has_room = self.out.len() <= self.limit;
        if has_room {
            self.entries += 1;
        } else {
            self.out.truncate(before);
        }
        has_room
    }
}

async fn fsstat(export: &Export, args: Args<'_>, out: &mut Vec<u8>) -> Result<(), Bad> {
    let object = only_object(export, args).await?;
    let disk = rustix::fs::statvfs(&export.home).map_err(|errno| {
        warn!(path = ?export.home, reason = tree::reason(&errno), "its file system cannot be asked");
        nfsstat3::NFS3ERR_IO
    })?;
    let bytes = |blocks: u64| blocks.saturating_mul(disk.f_frsize);
    let result = FSSTAT3resok {
        obj_attributes: known(export, &object),
        tbytes: bytes(disk.f_blocks),
        fbytes: bytes(disk.f_bfree),
        abytes: bytes(disk.f_bavail),
        tfiles: disk.f_files,
        ffiles: disk.f_ffree,
        afiles: disk.f_favail,
        invarsec: 0,
    };
    succeed(out, &[&|out| pack(&result, out)]);
    Ok(())
}

async fn fsinfo(export: &Export, args: Args<'_>, out: &mut Vec<u8>) -> Result<(), Bad> {
    let object = only_object(export, args).await?;
    let result = FSINFO3resok {
        obj_attributes: known(export, &object),
        rtmax: READ_BYTES_MAX,
        rtpref: READ_BYTES_MAX,
        rtmult: 4096,
        wtmax: WRITE_BYTES_MAX,
        wtpref: WRITE_BYTES_MAX,
        wtmult: 4096,
        dtpref: 64 << 10,
        maxfilesize: i64::MAX as u64,
        time_delta: nfstime3 { seconds: 0, nseconds: 1 },
        properties: FSF3_SYMLINK | FSF3_HOMOGENEOUS,
    };
    succeed(out, &[&|out| pack(&result, out)]);
    Ok(())
}

async fn pathconf(export: &Export, args: Args<'_>, out: &mut Vec<u8>) -> Result<(), Bad> {
    let object = only_object(export, args).await?;
    let result = PATHCONF3resok {
        obj_attributes: known(export, &object),
        linkmax: 1,
        name_max: NAME_BYTES_MAX as u32,
        no_trunc: true,
        chown_restricted: true,
        case_insensitive: false,
        case_preserving: true,
    };
    succeed(out, &[&|out| pack(&result, out)]);
    Ok(())
}

fn opaque(bytes: &[u8]) -> impl Pack {
    Opaque::borrowed(bytes)
}

const HANDLE_BYTES_MAX: usize = 64;
const NAME_BYTES_MAX: usize = 255;
/// Names up to this are read, and said to be too long.
const NAME_ARG_BYTES_MAX: usize = 4096;
/// What a read gives at most; the client may ask for more.
const READ_BYTES_MAX: u32 = 1 << 20;
/// What a client may send in one WRITE before it learns that it may not; fits into a record.
const WRITE_BYTES_MAX: u32 = 64 << 10;
const LISTING_BYTES_MAX: u32 = 1 << 20;
const LISTING_BYTES_MIN: usize = 512;
/// The cookie of `..`.
const DOTS: u64 = 2;
/// For so long a listing looks into directories for their attributes.
const SUBDIRECTORIES_LIMIT: Duration = Duration::from_millis(50);
