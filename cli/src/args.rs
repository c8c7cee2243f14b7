mod examples;
mod keep;

use std::{
    ffi::OsString,
    io::{self, Write},
    path::PathBuf,
    process::ExitCode,
    time::Duration,
};

use clap::{Args, Parser, Subcommand, ValueEnum};
use peers::Role;
use tracing::{error, level_filters::LevelFilter};

use crate::{
    commands,
    config::parse_duration,
    event::Event,
    failure::{Code, Failure, WhileDoing},
    home::Home,
    log,
    node::{HistoryScope, LimitChange},
};

pub(crate) use keep::{CacheCommand, PinArgs, WarmArgs};
use keep::{PIN_EXAMPLES, UNPIN_EXAMPLES, WARM_EXAMPLES};

/// Your files on all your machines: found, fetched, proven and mended.
#[derive(Debug, Parser)]
#[command(name = "blob", version, propagate_version = true, after_help = examples::BLOB)]
pub(crate) struct Blob {
    #[command(flatten)]
    pub(crate) common: Common,
    #[command(subcommand)]
    command: Command,
}

/// Serves the arenas of one home until it is stopped.
#[derive(Debug, Parser)]
#[command(name = "blobd", version)]
struct Blobd {
    #[command(flatten)]
    common: Common,
    #[command(flatten)]
    daemon: DaemonArgs,
}

#[derive(Debug, Args)]
pub(crate) struct Common {
    /// Keep configuration, state, cache and socket below DIR, and not in the usual places.
    #[arg(long, value_name = "DIR", env = "BLOBD_HOME", global = true)]
    home: Option<PathBuf>,
    /// Print JSON Lines.
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// How to write the log.
    #[arg(
        long,
        global = true,
        value_name = "FORMAT",
        env = "BLOBD_LOG_FORMAT",
        default_value = "auto",
        hide_default_value = true
    )]
    log_format: log::Format,
}

#[derive(Debug, Args)]
pub(crate) struct DaemonArgs {
    /// Where to listen: HOST:PORT, or "none" to dial others only; by default all addresses at port 7700. May be given
    /// several times.
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) listen: Vec<String>,
    /// What this machine calls itself [default: its host name].
    #[arg(long, value_name = "NAME")]
    pub(crate) name: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct CopyArgs {
    /// What to take, and last where to: ARENA/PATH at this machine, PEER:ARENA/PATH at another one. With a / at the end, or
    /// where it is an arena, sources go into the last one, under their own names.
    #[arg(value_names = ["SRC", "DEST"], num_args = 2.., required = true)]
    pub(crate) targets: Vec<OsString>,
    /// Replace files and links that differ, each at once when the new one is durable.
    #[arg(long)]
    pub(crate) overwrite: bool,
    /// Only say what would be done, by what is known here.
    #[arg(long)]
    pub(crate) dry_run: bool,
    #[command(flatten)]
    pub(crate) retry: Retry,
}

/// How long machines are waited for.
#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct Retry {
    /// How long to wait for a machine that disconnects during the command, such as 30s or 10m; 0s disables waiting. The default is
    /// 2m, and 20s for the destination of cp and mv if it stops answering without closing its connection.
    #[arg(long = "retry", value_name = "TIME", env = "BLOBD_RETRY", value_parser = time)]
    limit: Option<Duration>,
}

impl Retry {
    pub(crate) fn seconds(self) -> u64 {
        self.limit.map_or(DEFAULT_RETRY_S, |limit| limit.as_secs())
    }

    /// Whether the user chose it.
    pub(crate) fn is_given(self) -> bool {
        self.limit.is_some()
    }
}

const DEFAULT_RETRY_S: u64 = 120;

fn time(text: &str) -> Result<Duration, String> {
    parse_duration(text).ok_or_else(|| "that is no time, such as 30s or 10m".to_owned())
}

/// Bytes a second; or none, for no limit.
#[derive(Debug, Clone, Copy)]
struct Rate(Option<u64>);

fn rate(text: &str) -> Result<Rate, String> {
    if text == "none" {
        return Ok(Rate(None));
    }
    let rate = text.parse::<bytesize::ByteSize>().map_err(|_| "that is no rate, such as 2MiB, and not none".to_owned());
    rate.map(|rate| Rate(Some(rate.as_u64())))
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Start here: index DIRs, run the daemon in the foreground, print a ticket for other machines.
    #[command(after_help = examples::UP)]
    Up {
        /// Directories to hold as arenas, each named by its last component.
        #[arg(value_name = "DIR")]
        dirs: Vec<PathBuf>,
        #[command(flatten)]
        daemon: DaemonArgs,
    },
    /// Make the home: an identity and a configuration file.
    Init,
    /// Print this machine's peer id; makes its key if there is none.
    Id,
    /// Hold, list and give up arenas.
    #[command(subcommand)]
    Arena(ArenaCommand),
    /// Print a ticket with which one other machine can join this one.
    #[command(after_help = examples::INVITE)]
    Invite {
        /// How long the ticket works, such as 10m, 1h or 2d.
        #[arg(long, value_name = "TIME", default_value = "1h")]
        expires: String,
        /// What the other machine may do here: read, or also copy and move into and out of all arenas.
        #[arg(long, value_name = "ROLE", default_value = "reader")]
        role: RoleArg,
    },
    /// Pair with the machine that made TICKET.
    Join {
        /// What `blob up` or `blob invite` printed there.
        ticket: String,
    },
    /// Know other machines.
    #[command(subcommand)]
    Peer(PeerCommand),
    /// Limit how many bytes a second go to peers and come from them, until the daemon ends; show the limits.
    #[command(after_help = examples::LIMIT)]
    Limit {
        /// What may go out, such as 2MiB; or none.
        #[arg(long, value_name = "RATE", value_parser = rate)]
        up: Option<Rate>,
        /// What may come in, such as 500KiB; or none.
        #[arg(long, value_name = "RATE", value_parser = rate)]
        down: Option<Rate>,
        /// Of this peer alone, beside the limits of all.
        #[arg(long, value_name = "NAME")]
        peer: Option<String>,
    },
    /// Mount everything as a folder, by the system's NFS client.
    #[command(after_help = examples::MOUNT)]
    Mount {
        /// An empty directory.
        #[arg(value_name = "DIR")]
        dir: PathBuf,
        /// Only print the command.
        #[arg(long)]
        dry_run: bool,
    },
    /// Take the folder away again.
    Umount {
        /// Where it is mounted.
        #[arg(value_name = "DIR")]
        dir: PathBuf,
    },
    /// Show this machine, its arenas and its peers.
    #[command(after_help = examples::STATUS)]
    Status {
        /// List what is in arenas and not indexed, and why.
        #[arg(long)]
        skipped: bool,
        /// Exit with 4 if there is damage, with 3 if something else needs a look, and with 0 if all is well.
        #[arg(long, conflicts_with = "skipped")]
        check: bool,
    },
    /// List arenas, or what is in one, across all peers.
    #[command(after_help = examples::LS)]
    Ls {
        /// More: size, mtime, blob, where.
        #[arg(short)]
        long: bool,
        /// All the way down.
        #[arg(short = 'R', long)]
        recursive: bool,
        /// What to list [default: all arenas].
        #[arg(value_name = "ARENA[/PATH]")]
        target: Option<OsString>,
    },
    /// Show everything known of one file.
    Stat {
        /// The file.
        #[arg(value_name = "ARENA/PATH")]
        target: OsString,
    },
    /// Write a file, proven, to standard output.
    #[command(after_help = examples::CAT)]
    Cat {
        /// The file, or blob: and the first 8 or more digits of a blob's id.
        #[arg(value_name = "ARENA/PATH|blob:ID")]
        target: OsString,
        /// Only the bytes from A up to, but without, B; either may be left out.
        #[arg(long, value_name = "A..B")]
        range: Option<String>,
        /// The version that this machine has, by the name that `blob stat` gives, and not the one that is shown.
        #[arg(long, value_name = "NAME")]
        peer: Option<String>,
    },
    /// Show which machines have a file's bytes, and how many of them are here; of a directory, in one line each.
    Whereis {
        /// The file, directory or arena.
        #[arg(value_name = "ARENA[/PATH]")]
        target: OsString,
    },
    /// List the paths at which machines have different things, of which none comes from the other.
    #[command(after_help = examples::CONFLICTS)]
    Conflicts {
        /// Where to look [default: everywhere].
        #[arg(value_name = "ARENA[/PATH]")]
        targets: Vec<OsString>,
    },
    /// Show what changed, when, at which machine: each one's latest changes, by its clock.
    #[command(after_help = examples::HISTORY)]
    History {
        /// Only in this arena.
        arena: Option<String>,
        /// Only changes behind this number, of the machine named with --peer, or of this one.
        #[arg(long, value_name = "SEQ")]
        since: Option<u64>,
        /// Only at this machine.
        #[arg(long, value_name = "NAME")]
        peer: Option<String>,
        /// Go on with whatever changes, until Ctrl-C.
        #[arg(short, long)]
        follow: bool,
    },
    /// Bring files or trees here, proven, with their mtimes.
    #[command(after_help = examples::GET)]
    Get {
        /// What to bring, and last the file or directory to put it at or into.
        #[arg(value_names = ["ARENA/PATH|blob:ID", "DEST"], num_args = 2.., required = true)]
        targets: Vec<OsString>,
        #[command(flatten)]
        retry: Retry,
    },
    /// Copy files or trees between arenas, here and at other machines, proven, with their mtimes and permissions.
    #[command(after_help = examples::CP)]
    Cp(CopyArgs),
    /// Move files or trees from one machine to another: what has arrived, proven and durable, is removed at its source.
    #[command(after_help = examples::MV)]
    Mv(CopyArgs),
    /// Keep arenas, directories or files here, and every new version of them; or list what is kept so.
    #[command(after_help = PIN_EXAMPLES)]
    Pin(PinArgs),
    /// Keep something here no more.
    #[command(after_help = UNPIN_EXAMPLES)]
    Unpin {
        /// What is pinned.
        #[arg(value_name = "ARENA[/PATH]", required = true)]
        targets: Vec<OsString>,
    },
    /// Fetch what is missing of arenas, directories or files into the cache, once.
    #[command(after_help = WARM_EXAMPLES)]
    Warm(WarmArgs),
    /// Look after the cache.
    #[command(subcommand)]
    Cache(CacheCommand),
    /// Print blob ids, as b3sum does.
    Hash {
        /// Print what Linux's fs-verity measures instead, as `fsverity digest` does.
        #[arg(long)]
        fsverity: bool,
        /// The files.
        #[arg(required = true)]
        files: Vec<PathBuf>,
    },
    /// Read everything that is stored here, or what is named, and report all damage.
    #[command(after_help = examples::VERIFY)]
    Verify {
        /// Only a part of the bytes, such as 5%: what was verified longest ago.
        #[arg(long, value_name = "PERCENT")]
        sample: Option<String>,
        /// Only for so long, such as 30m; the next time goes on from there.
        #[arg(long, value_name = "TIME")]
        budget: Option<String>,
        /// What to verify [default: everything here].
        #[arg(value_name = "ARENA[/PATH]")]
        targets: Vec<OsString>,
    },
    /// Verify, and mend what is damaged with bytes from other copies, here or at peers.
    #[command(after_help = examples::REPAIR)]
    Repair {
        /// Also mend suspect files: those that may have rotted or been edited, of which you know that you did not edit them.
        #[arg(long, requires = "targets")]
        suspect: bool,
        /// Put back what the latest repair of each target replaced.
        #[arg(long, requires = "targets", conflicts_with = "suspect")]
        undo: bool,
        #[command(flatten)]
        retry: Retry,
        /// What to repair [default: everything here].
        #[arg(value_name = "ARENA[/PATH]")]
        targets: Vec<OsString>,
    },
    /// Check the database and the cache, and rebuild a damaged database. The daemon must not run.
    #[command(after_help = examples::DOCTOR)]
    Doctor {
        /// Rebuild a damaged or lost database from what can be proven. The old one is kept in a directory of its own.
        #[arg(long)]
        rebuild: bool,
        /// Start with an empty database and cache: arenas, pins and peers are forgotten. The key stays.
        #[arg(long, conflicts_with = "rebuild")]
        new: bool,
    },
    /// Publish suspect and damaged files as they are: you edited them.
    #[command(after_help = examples::ACCEPT)]
    Accept {
        /// The files, or directories and arenas with all such files in them.
        #[arg(value_name = "ARENA[/PATH]", required = true)]
        targets: Vec<OsString>,
    },
}

/// What a peer may do here.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum RoleArg {
    Reader,
    Writer,
}

impl From<RoleArg> for Role {
    fn from(role: RoleArg) -> Self {
        match role {
            RoleArg::Reader => Self::Reader,
            RoleArg::Writer => Self::Writer,
        }
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum ArenaCommand {
    /// Hold DIR as arena NAME and index it; without DIR, only follow the arena.
    #[command(after_help = examples::ARENA_ADD)]
    Add {
        /// The arena's name.
        name: String,
        /// Its directory.
        dir: Option<PathBuf>,
        /// Let anyone who knows a blob id read the arena's blobs, where serve.iroh is on.
        #[arg(long)]
        public: bool,
    },
    /// List this machine's arenas.
    Ls,
    /// Give up an arena. No file is touched.
    Rm {
        /// The arena's name.
        name: String,
    },
    /// Look for what changed in arenas [default: all that this machine holds].
    #[command(after_help = examples::ARENA_SCAN)]
    Scan {
        /// Take the file systems that are there now for the arenas': what they do not have is deleted.
        #[arg(long, requires = "names")]
        accept: bool,
        /// The arenas' names.
        names: Vec<String>,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum PeerCommand {
    /// Trust the machine with this id.
    #[command(after_help = examples::PEER_ADD)]
    Add {
        /// What to call it.
        name: String,
        /// Its peer id, as `blob id` prints it there.
        id: String,
        /// Where to dial it; may be given several times.
        #[arg(long = "address", value_name = "HOST:PORT")]
        addresses: Vec<String>,
    },
    /// List the machines that are trusted.
    Ls,
    /// Dial machines now, and say what came of it; where there is a connection, see whether it works.
    Dial {
        /// What they are called [default: all that are trusted].
        #[arg(value_name = "NAME")]
        names: Vec<String>,
    },
    /// Trust a machine no more.
    Rm {
        /// What it is called.
        name: String,
    },
}

/// Runs `blob`.
pub fn main_blob() -> ExitCode {
    let Blob { common, command } = match Blob::try_parse() {
        Ok(blob) => blob,
        Err(error) => return usage_exit(&error),
    };
    let level = if matches!(command, Command::Up { .. }) { LevelFilter::INFO } else { LevelFilter::WARN };
    run(common, level, async |home, common| match command {
        Command::Up { dirs, daemon } => commands::up(home, common, &dirs, daemon).await,
        Command::Init => commands::init(home, common),
        Command::Id => commands::id(home, common),
        Command::Arena(command) => commands::arena(home, common, command).await,
        Command::Invite { expires, role } => commands::invite(home, common, &expires, role.into()).await,
        Command::Join { ticket } => commands::join(home, common, ticket).await,
        Command::Peer(command) => commands::peer(home, common, command).await,
        Command::Mount { dir, dry_run } => commands::mount(home, common, &dir, dry_run).await,
        Command::Umount { dir } => commands::umount(&dir),
        Command::Limit { up, down, peer } => {
            let change = LimitChange { peer, up: up.map(|rate| rate.0), down: down.map(|rate| rate.0) };
            commands::limit(home, common, change).await
        }
        Command::Status { skipped, check } => commands::status(home, common, skipped, check).await,
        Command::Ls { long, recursive, target } => commands::ls(home, common, long, recursive, target).await,
        Command::Stat { target } => commands::stat(home, common, &target).await,
        Command::Cat { target, range, peer } => commands::cat(home, &target, range.as_deref(), peer.as_deref()).await,
        Command::Whereis { target } => commands::whereis(home, common, &target).await,
        Command::Conflicts { targets } => commands::conflicts(home, common, &targets).await,
        Command::History { arena, since, peer, follow } => {
            let arena = arena.map(|arena| arena.parse()).transpose();
            let arena = arena.map_err(|error: namespace::NameError| Failure::from(error).code(Code::Usage))?;
            commands::history(home, common, HistoryScope { arena, peer, since, follow }).await
        }
        Command::Get { targets, retry } => commands::get(home, common, targets, retry).await,
        Command::Cp(args) => commands::copy(home, common, args, false).await,
        Command::Mv(args) => commands::copy(home, common, args, true).await,
        Command::Pin(args) => commands::pin(home, common, args).await,
        Command::Unpin { targets } => commands::unpin(home, common, &targets).await,
        Command::Warm(args) => commands::warm(home, common, args).await,
        Command::Cache(command) => commands::cache(home, common, command).await,
        Command::Hash { fsverity, files } => commands::hash(common, fsverity, &files),
        Command::Verify { targets, sample, budget } => {
            commands::verify(home, common, &targets, sample.as_deref(), budget.as_deref()).await
        }
        Command::Repair { suspect, undo, retry, targets } => {
            commands::repair(home, common, suspect, undo, retry, &targets).await
        }
        Command::Doctor { rebuild, new } => commands::doctor(home, common, rebuild, new),
        Command::Accept { targets } => commands::accept(home, common, &targets).await,
    })
}

/// Runs `blobd`.
pub fn main_blobd() -> ExitCode {
    let Blobd { common, daemon } = match Blobd::try_parse() {
        Ok(blobd) => blobd,
        Err(error) => return usage_exit(&error),
    };
    run(common, LevelFilter::INFO, async |home, _| commands::serve(home, daemon).await)
}

/// Runs a command, or a daemon if the log is at level info.
fn run(
    common: Common,
    level: LevelFilter,
    body: impl AsyncFnOnce(&Home, &Common) -> Result<Code, Failure>,
) -> ExitCode {
    let log = match log::open(common.log_format, level) {
        Ok(log) => log,
        Err(failure) => {
            report(&failure, &common);
            return ExitCode::from(u8::from(failure.code));
        }
    };
    let work = || {
        let home = Home::new(common.home.as_deref())?;
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().while_doing("start threads")?;
        let outcome = runtime.block_on(body(&home, &common));
        // What still blocks on a disk must not keep the process.
        runtime.shutdown_timeout(Duration::from_secs(2));
        outcome
    };
    let code = work().unwrap_or_else(|failure| {
        if level == LevelFilter::INFO && log.is_for_programs() {
            error!(reason = failure.reason(), hint = failure.hint, "ended by an error");
        } else {
            report(&failure, &common);
        }
        failure.code
    });
    log.close();
    ExitCode::from(u8::from(code))
}

/// Tells why a command failed.
fn report(failure: &Failure, common: &Common) {
    if failure.silent {
        return;
    }
    if common.json {
        let line = serde_json::to_string(&Event::Error(failure.clone())).unwrap_or_default();
        let _ = writeln!(io::stdout(), "{line}");
    }
    let _ = writeln!(io::stderr(), "{failure}");
}

fn usage_exit(error: &clap::Error) -> ExitCode {
    let _ = error.print();
    ExitCode::from(if error.use_stderr() { u8::from(Code::Usage) } else { 0 })
}
