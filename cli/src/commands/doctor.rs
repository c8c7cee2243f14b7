use std::path::Path;

use indicatif::HumanBytes;
use serde_json::json;

use super::{daemon, print};
use crate::{
    args::Common,
    failure::{Code, Failure},
    home::Home,
    node::{self, Checkup},
};

/// `blob doctor`
pub(crate) fn doctor(home: &Home, common: &Common, rebuild: bool, new: bool) -> Result<Code, Failure> {
    if !home.exists() {
        return Err(Failure::new(Code::NotFound, format!("there is no home at {:?}", home.state))
            .hint("make one with: blob up DIR"));
    }
    if daemon(home).is_ok() {
        return Err(Failure::new(Code::Error, "the daemon has its state in use").hint("stop it first"));
    }
    if new {
        let aside = node::begin_anew(home)?;
        return print(common, "begun_anew", json!({ "before": aside }), |_| {
            format!("a new database; what was before is in {}", shown(&aside))
        });
    }
    if !rebuild {
        let checkup = node::check(home)?;
        print(common, "checkup", json!(checkup), |_| lines(&checkup))?;
        let is_well = !checkup.needs_rebuild() && checkup.cached_damaged == 0;
        return Ok(if is_well { Code::Ok } else { Code::Damage });
    }
    match node::heal(home)? {
        None => print(common, "rebuilt", json!({ "before": null }), |_| {
            "the database is whole: nothing to make anew".to_owned()
        }),
        Some((rebuilt, aside)) => {
            let taken = json!({
                "cached_blobs": rebuilt.blobs,
                "cached_bytes": rebuilt.bytes,
                "remembered_files": rebuilt.remembered,
                "repairs": rebuilt.repairs,
                "before": aside,
            });
            print(common, "rebuilt", taken, |_| {
                format!(
                    "made anew: {} blobs of the cache proved, {}; {} files are remembered\nwhat was before is in {}\n\
                     start the daemon: it reads its arenas again",
                    rebuilt.blobs,
                    HumanBytes(rebuilt.bytes),
                    rebuilt.remembered,
                    shown(&aside)
                )
            })
        }
    }
}

fn lines(checkup: &Checkup) -> String {
    let Checkup { damage, rows, bad_rows, cached, cached_damaged } = checkup;
    if let Some(reason) = damage {
        return format!("database  damaged: {reason}\nmake it anew with: blob doctor --rebuild");
    }
    let mut text = match bad_rows {
        0 => format!("database  whole, {rows} rows"),
        _ => format!("database  {bad_rows} of {rows} rows cannot be read\nmake it anew with: blob doctor --rebuild"),
    };
    text += &match cached_damaged {
        0 => format!("\ncache     {cached} blobs, all proven"),
        _ => format!(
            "\ncache     of {cached} blobs, {cached_damaged} were damaged; that is forgotten, and fetched again"
        ),
    };
    text
}

fn shown(path: &Path) -> String {
    crate::output::printable(path.as_os_str().as_encoded_bytes())
}
