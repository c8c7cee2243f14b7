//! The command line of what is kept here: pins, and the cache.

use std::ffi::OsString;

use clap::{Args, Subcommand};

use super::Retry;

#[derive(Debug, Args)]
pub(crate) struct PinArgs {
    /// Return at once; the daemon fetches what is missing.
    #[arg(long)]
    pub(crate) no_wait: bool,
    /// List what is kept here after its owner has deleted it.
    #[arg(long, conflicts_with = "no_wait")]
    pub(crate) deleted: bool,
    /// Keep what was deleted no longer: it becomes part of the cache, as any other file.
    #[arg(long, requires = "targets", conflicts_with_all = ["no_wait", "deleted"])]
    pub(crate) accept_deletions: bool,
    #[command(flatten)]
    pub(crate) retry: Retry,
    /// What to keep here [default: list what is pinned].
    #[arg(value_name = "ARENA[/PATH]")]
    pub(crate) targets: Vec<OsString>,
}

#[derive(Debug, Args)]
pub(crate) struct WarmArgs {
    /// Only say what would be fetched.
    #[arg(long)]
    pub(crate) dry_run: bool,
    #[command(flatten)]
    pub(crate) retry: Retry,
    /// What to fetch.
    #[arg(value_name = "ARENA[/PATH]", required = true)]
    pub(crate) targets: Vec<OsString>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum CacheCommand {
    /// Show what the cache takes on the disk, what of that is pinned, and what it may take.
    Stat,
    /// Evict what was used longest ago, until SIZE is left; what is pinned or in use stays.
    #[command(after_help = TRIM_EXAMPLES)]
    Trim {
        /// What may be left, such as 2GiB.
        #[arg(value_name = "SIZE", value_parser = size, default_value = "0")]
        left: u64,
    },
    /// Show what the cache may take on the disk, beside what is pinned; or change it, from now on.
    #[command(after_help = LIMIT_EXAMPLES)]
    Limit {
        /// Such as 50GiB.
        #[arg(value_name = "SIZE", value_parser = size)]
        limit: Option<u64>,
    },
}

fn size(text: &str) -> Result<u64, String> {
    let size = text.parse::<bytesize::ByteSize>().map_err(|_| "that is no size, such as 20GiB".to_owned());
    size.map(|size| size.as_u64())
}

pub(super) const PIN_EXAMPLES: &str = "\
Examples:
  blob pin Pictures/2024             keep it here, and wait until it is
  blob pin --no-wait Films Notes     the same for two arenas, in the background
  blob pin                           what is pinned, and what of it is not here yet
  blob pin --deleted Notes           what is still here of what others deleted, to be read with: blob cat blob:ID
  blob pin --accept-deletions Notes  accept the deletions: those bytes are kept no longer

What is pinned is fetched, stays in the cache beside its limit, and follows: a new version is fetched when it is heard of.
Ctrl-C ends the waiting, and not the pin. What this machine has in place is not fetched again.";

pub(super) const UNPIN_EXAMPLES: &str = "\
Example:
  blob unpin Pictures/2024

What is here of it stays in the cache until something else needs the room: blob cache trim.";

pub(super) const WARM_EXAMPLES: &str = "\
Examples:
  blob warm Pictures/2024            fetch it now, to be read later without the other machine
  blob warm --dry-run Films          what is missing here

It is fetched once, and may be evicted for something else: to keep it, pin it.";

const TRIM_EXAMPLES: &str = "\
Examples:
  blob cache trim            all that is not pinned or in use
  blob cache trim 2GiB       until 2 GiB are left of that";

const LIMIT_EXAMPLES: &str = "\
Examples:
  blob cache limit           what holds now
  blob cache limit 50GiB     from now on; what is beyond a smaller limit is evicted at once

It holds until cache.limit in config.toml is changed, which then counts again.";
