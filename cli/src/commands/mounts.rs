use std::{
    env, fs,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    process::Command,
};

use axum::http::Method;
use serde_json::json;

use super::{daemon, print, text};
use crate::{
    args::Common,
    failure::{Code, Failure, WhileDoing},
    home::Home,
};

/// `blob mount`
pub(crate) async fn mount(home: &Home, common: &Common, dir: &Path, dry_run: bool) -> Result<Code, Failure> {
    let status = daemon(home)?.value(Method::GET, "/v1/status", &()).await?;
    let address: SocketAddr = text(&status, "nfs").parse().map_err(|_| {
        Failure::new(Code::Usage, "the daemon offers no folder")
            .hint("in config.toml, nfs.listen is none: take that out, and start the daemon again")
    })?;
    let command = mount_command(address, dir);
    if dry_run {
        return print(common, "command", json!({ "command": command }), |_| in_words(&command));
    }
    let in_words = in_words(&command);
    if !dir.is_dir() {
        let failure = Failure::new(Code::NotFound, format!("{dir:?} is not a directory"));
        let exists = fs::symlink_metadata(dir).is_ok();
        return Err(if exists { failure } else { failure.hint(format!("make it with: mkdir -p {}", quoted(dir))) });
    }
    if find_program("mount.nfs").is_none() {
        return Err(Failure::new(Code::Error, "this system has no NFS client: there is no mount.nfs")
            .hint("install it; on Debian and Ubuntu: sudo apt install nfs-common"));
    }
    if !rustix::process::geteuid().is_root() {
        return Err(Failure::new(Code::Error, "only root may mount").hint(format!("run: sudo {in_words}")));
    }
    run(&command, &in_words)?;
    print(common, "mounted", json!({ "dir": dir.to_string_lossy(), "address": address }), |_| {
        format!("everything is at {}", dir.display())
    })
}

/// `blob umount`
pub(crate) fn umount(dir: &Path) -> Result<Code, Failure> {
    if !rustix::process::geteuid().is_root() {
        return Err(
            Failure::new(Code::Error, "only root may unmount").hint(format!("run: sudo umount {}", quoted(dir)))
        );
    }
    let command = ["umount".to_owned(), dir.to_string_lossy().into_owned()];
    run(&command, &in_words(&command))
}

/// What mounts everything at `dir` on a Linux machine.
///
/// `acdirmax` is how long a client may open an older version of a file than the one that is shown; `soft` fails reads
/// in the end if the daemon is gone, which with `timeo` and `retrans` is after three minutes.
pub(crate) fn mount_command(address: SocketAddr, dir: &Path) -> Vec<String> {
    let (host, protocol) = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => ("127.0.0.1".to_owned(), "tcp"),
        IpAddr::V6(ip) if ip.is_unspecified() => ("[::1]".to_owned(), "tcp6"),
        IpAddr::V4(ip) => (ip.to_string(), "tcp"),
        IpAddr::V6(ip) => (format!("[{ip}]"), "tcp6"),
    };
    let port = address.port();
    let options = format!(
        "ro,vers=3,proto={protocol},port={port},mountport={port},mountproto={protocol},nolock,soft,timeo=600,retrans=2,rsize=1048576,acdirmin=1,acdirmax=2,nosuid,nodev"
    );
    let words = ["mount", "-t", "nfs", "-o", &options, &format!("{host}:/"), &dir.to_string_lossy()];
    words.map(str::to_owned).to_vec()
}

/// A command as a shell takes it.
pub(crate) fn in_words(command: &[String]) -> String {
    let words: Vec<_> = command.iter().map(|word| quoted(word.as_ref())).collect();
    words.join(" ")
}

/// A path as a word of a shell's command.
fn quoted(path: &Path) -> String {
    let text = path.to_string_lossy();
    let is_plain = |c: char| c.is_alphanumeric() || "/._-+=:,@%[]".contains(c);
    if !text.is_empty() && text.chars().all(is_plain) {
        text.into_owned()
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}

/// Runs a program of the system, which says itself what goes wrong.
fn run(command: &[String], in_words: &str) -> Result<Code, Failure> {
    let [program, args @ ..] = command else { return Ok(Code::Usage) };
    let what = || format!("run {in_words}");
    let status = Command::new(program).args(args).status().while_doing(what())?;
    if status.success() {
        return Ok(Code::Ok);
    }
    Err(Failure::new(Code::Error, format!("it ended with {status}")).while_doing(what()))
}

/// Looks for a program where shells do, and where those of root are.
fn find_program(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let dirs = env::split_paths(&path).chain(["/sbin", "/usr/sbin", "/usr/local/sbin"].map(PathBuf::from));
    dirs.map(|dir| dir.join(name)).find(|program| program.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_can_be_pasted() {
        let command = |dir| in_words(&["umount".to_owned(), dir]);
        for (dir, pasted) in [
            ("/mnt/all", "/mnt/all"),
            ("/mnt/a b", "'/mnt/a b'"),
            ("it's", r"'it'\''s'"),
            ("$HOME", "'$HOME'"),
            ("", "''"),
        ] {
            assert_eq!(command(dir.to_owned()), format!("umount {pasted}"));
        }
        let mount = mount_command("[::1]:2049".parse().unwrap(), Path::new("/mnt"));
        assert_eq!(in_words(&mount), mount.join(" "));
    }
}
