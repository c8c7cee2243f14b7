//! The MOUNT protocol, version 3 (RFC 1813, appendix I): from a path to a handle. Nothing is remembered of who mounted what.

use nfs3_types::{
    mount::{MOUNT_PROGRAM as Procedure, dirpath, export_node, fhandle3, mountres3, mountres3_ok, mountstat3},
    rpc::accept_stat_data,
    xdr_codec::{List, Opaque},
};
use tracing::error;

use crate::{
    directory::Place,
    export::Export,
    rpc::{Call, accepted, pack},
    view::{Fresh, ViewError},
};

/// Answers a call to the MOUNT program of the right version.
pub(crate) async fn answer(export: &Export, call: Call<'_>) -> Vec<u8> {
    let Ok(procedure) = Procedure::try_from(call.procedure) else {
        return accepted(call.xid, accept_stat_data::PROC_UNAVAIL);
    };
    let mut args = call.args;
    let path = match procedure {
        Procedure::MOUNTPROC3_MNT | Procedure::MOUNTPROC3_UMNT => args.opaque(PATH_BYTES_MAX),
        _ => Ok(&b""[..]),
    };
    let (Ok(path), Ok(())) = (path, args.end()) else {
        return accepted(call.xid, accept_stat_data::GARBAGE_ARGS);
    };
    let mut out = accepted(call.xid, accept_stat_data::SUCCESS);
    match procedure {
        Procedure::MOUNTPROC3_MNT => pack(&mount(export, path).await, &mut out),
        Procedure::MOUNTPROC3_EXPORT => {
            let everything = export_node { ex_dir: dirpath(Opaque::borrowed(b"/")), ex_groups: List::default() };
            pack(&List(vec![everything]), &mut out);
        }
        // Nobody is on the list.
        Procedure::MOUNTPROC3_DUMP => pack(&false, &mut out),
        Procedure::MOUNTPROC3_NULL | Procedure::MOUNTPROC3_UMNT | Procedure::MOUNTPROC3_UMNTALL => {}
    }
    out
}

async fn mount(export: &Export, path: &[u8]) -> mountres3<'static> {
    let mut names = path.split(|&b| b == b'/').filter(|name| !name.is_empty());
    let place = names.try_fold(Place::Root, |place, name| place.join(name));
    let found = match place {
        Some(place) => export.view.directory(&place, Fresh::Now).await,
        None => Err(ViewError::NotFound),
    };
    match found {
        Ok(directory) => mountres3::Ok(mountres3_ok {
            fhandle: fhandle3(Opaque::owned(directory.handle().to_bytes())),
            auth_flavors: vec![AUTH_SYS, AUTH_NONE],
        }),
        Err(ViewError::NotFound | ViewError::Stale) => mountres3::Err(mountstat3::MNT3ERR_NOENT),
        Err(ViewError::Namespace(error)) => {
            error!(reason = tree::reason(&error), "the namespace cannot be read");
            mountres3::Err(mountstat3::MNT3ERR_SERVERFAULT)
        }
    }
}

const AUTH_NONE: u32 = 0;
const AUTH_SYS: u32 = 1;
/// RFC 1813, section 5.1.2.
const PATH_BYTES_MAX: usize = 1024;
