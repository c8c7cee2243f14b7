//! What `--help` shows below the options.

pub(super) const UP: &str = "\
Examples:
  blob up ~/Pictures ~/Music             hold two folders, at port 7700 of all addresses
  blob up --listen none                  dial others only
  blob up                                the same arenas as before; from systemd: blobd";

pub(super) const ARENA_ADD: &str = "\
Examples:
  blob arena add Pictures ~/Pictures     hold a folder under that name
  blob arena add Pictures                only follow what other machines have of it";

pub(super) const ARENA_SCAN: &str = "\
Examples:
  blob arena scan                        look for what was missed
  blob arena scan --accept Pictures      a disk was replaced, or taken away for good";

pub(super) const INVITE: &str = "\
Examples:
  blob invite                            for a machine that may read
  blob invite --role writer --expires 10m";

pub(super) const PEER_ADD: &str = "\
Examples:
  blob peer add nas ID --address nas.local:7700 --address '[2001:db8::1]:7700'
  blob peer add phone ID                 it must dial this machine

Both machines must trust each other. A ticket does both sides at once: blob invite.";

pub(super) const LS: &str = "\
Examples:
  blob ls                                the arenas of all machines
  blob ls -l Pictures/2024               sizes, times, and who has it
  blob ls -R --json Pictures             for programs: one object a line";

pub(super) const CAT: &str = "\
Examples:
  blob cat Pictures/cat.jpg | display -
  blob cat --range 0..1024 Films/a.mkv   only these bytes are fetched
  blob cat --peer nas Notes/todo.txt     the version that nas has";

pub(super) const GET: &str = "\
Examples:
  blob get Pictures/2024 ~/copies        the tree, as ~/copies/2024
  blob get Pictures/cat.jpg cat2.jpg     one file, under another name
  blob get Pictures Music /mnt/disk      several

What is there already with the same bytes is skipped; what differs fails, and stays. Run it again to go on where it stopped.";

pub(super) const VERIFY: &str = "\
Examples:
  blob verify && echo all is well        everything here
  blob verify Pictures/2024
  blob verify --sample 5% --budget 30m   some each night: what was verified longest ago

Exit code 4 if there is damage, which blob repair mends, or a suspect file, of which you decide whether it rotted
(blob repair --suspect) or was edited (blob accept).";

pub(super) const REPAIR: &str = "\
Examples:
  blob repair                            everything here
  blob repair Pictures/cat.jpg
  blob repair --suspect Pictures/a.jpg   also a file that may have been edited: you know that you did not
  blob repair --undo Pictures/a.jpg      put back what the repair replaced

What a repair replaces is kept for 30 days. Exit code 4 if suspect files are left, 5 if something could not be mended:
no copy of it was to be had.";

pub(super) const ACCEPT: &str = "\
Examples:
  blob accept Music/song.flac            I retagged it, and the program kept its time
  blob accept Downloads                  everything suspect there

See what is suspect, and how it differs, with: blob verify";

pub(super) const HISTORY: &str = "\
Examples:
  blob history Pictures                  what changed there, at all machines
  blob history --peer nas --since 1200   what changed at nas behind its change 1200
  blob history -f --json                 all of it, and then whatever changes";

pub(super) const CP: &str = "\
Examples:
  blob cp Pictures/2024 nas:Pictures/2024          bring it there, under that name
  blob cp nas:Pictures/2024/ Pictures              bring it here, into the arena
  blob cp nas:Films closet:Films                   between two others, neither byte by way of this machine
  blob cp --dry-run Pictures nas:Pictures          say what is missing there

A file that is there already with the same bytes is skipped; one that differs fails, unless --overwrite. Run it again to go
on where it stopped. Who receives must let you write: see blob peer ls there, and [roles] in its config.toml.
Holes, hard links, extended attributes and ACLs are kept ([copy] in config.toml); the summary counts what was not.";

pub(super) const MV: &str = "\
Examples:
  blob mv Camera/ nas:Pictures/inbox/              empty the camera's folder into the NAS
  blob mv laptop:Downloads/iso nas:Archive/        between two others

A file is removed only after the destination has said that it has it, durably and proven, and after the source has read it
once more and found it unchanged. What changed meanwhile stays, and is reported; so does a file whose extended attributes
could not be kept, unless attributes = false in [copy] of config.toml. Within one machine, use plain mv.";

pub(super) const MOUNT: &str = "\
Examples:
  blob mount /mnt/all                  everything, below /mnt/all; without being root, what to run as root
  blob mount --dry-run /mnt/all        the command that does it, here or at another machine
  blob umount /mnt/all

Mounting needs root, and the system's NFS client: on Debian, the package nfs-common. Other machines may mount it if
config.toml says so: [nfs], listen and allow.";

pub(super) const LIMIT: &str = "\
Examples:
  blob limit --up 2MiB               at most 2 MiB a second to all peers together
  blob limit --down none             as much as comes
  blob limit --peer nas --up 500KiB  to one of them
  blob limit                         what holds now

Limits that last are in config.toml: [limits].";

pub(super) const CONFLICTS: &str = "\
Every version stays where it is. To end a conflict, let one machine have the other's content, or delete its own:
  blob conflicts
  blob cat --peer nas Notes/todo.txt | diff - ~/Notes/todo.txt
  blob cat --peer nas Notes/todo.txt > new && mv new ~/Notes/todo.txt";

pub(super) const BLOB: &str = "\
Examples:
  blob up ~/Pictures                     hold a folder, run the daemon, print a ticket
  blob join TICKET                       on another machine: pair with this one
  blob ls -l Pictures/2024               what is there, on whichever machine
  blob get Pictures/2024 ~/copies        bring it here, proven
  blob cp Pictures/2024 nas:Pictures/    bring it to another machine's arena
  blob mv Camera nas:Pictures/           and remove it here, once it is there
  blob pin Pictures/2024                 keep it here, also when the other machine is off
  blob verify && echo all is well        look for damage
  blob repair                            mend it from other machines
  blob history Pictures                  what changed there, when, at which machine
  blob whereis Pictures/cat.jpg          which machines have it
  blob hash --fsverity video.mkv         what fs-verity measures of a file

Exit codes: 0 ok, 1 error, 2 usage, 3 some items failed, 4 damage found, 5 damage left unrepaired,
6 no reachable peer has it, 7 not found, 8 a limit was hit, 10 no daemon, 130 interrupted.
Places: --home DIR, else $XDG_CONFIG_HOME/blobd, $XDG_STATE_HOME/blobd, $XDG_CACHE_HOME/blobd, $XDG_RUNTIME_DIR.
Log: BLOBD_LOG=debug, or info,peers=debug; BLOBD_LOG_FORMAT=human, json, systemd or auto.";

pub(super) const DOCTOR: &str = "\
Examples:
  blob doctor                            is the database whole, does the cache prove?
  blob doctor --rebuild                  it is not: keep the identity, arenas, pins, peers, and all of the cache that proves

No user's file is touched. Exit code 4 if there is damage.";

pub(super) const STATUS: &str = "\
Examples:
  blob status
  blob status --check || mail -s 'blobd needs a look' me     from a timer
  blob status --skipped                  what is in the arenas and not indexed";
