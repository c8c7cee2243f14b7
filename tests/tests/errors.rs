//! Every error that spec/errors.md promises, provoked: the text there is what the programs print.
//!
//! The blocks of commands there are run in order. A line is `MACHINE$ COMMAND`, given to `sh` with that machine's home, and
//! is followed by what it must print on standard error, and `(exit N)`; or `$ COMMAND`, which sets something up, and may
//! begin with the words of [`World::set_up`].

use std::{env, fs, os::unix::fs::PermissionsExt, path::Path, process::Command, time::Duration};

use peers::Ticket;
use redb::{Database, TableDefinition};
use tests::{Machine, Output, Scratch, blob, wait_for};

struct World {
    // Dropped first, for their directories are in the scratch.
    machines: Vec<Machine>,
    scratch: Scratch,
    /// For the shell.
    variables: Vec<(&'static str, String)>,
}

impl World {
    /// The machines that the specification tells of. `None` if none can be made to obey the modes of files, or
    /// no file can rot.
    fn new() -> Option<Self> {
        let scratch = Scratch::that_rots()?;
        let (docs, far, copy) = (scratch.dir("docs"), scratch.dir("far"), scratch.dir("copy"));
        for dir in ["docs/sub", "elsewhere"] {
            scratch.dir(dir);
        }
        for (path, bytes) in [("docs/file", "hello"), ("docs/secret", "hidden"), ("docs/rotten", "sound")] {
            fs::write(scratch.path(path), bytes).unwrap();
        }
        fs::set_permissions(docs.join("secret"), fs::Permissions::from_mode(0o000)).unwrap();
        for path in ["far/small", "copy/small", "far/other"] {
            fs::write(scratch.path(path), path.split_once('/').unwrap().1).unwrap();
        }
        let a = Machine::obeying_modes(&scratch, "a", &[&docs])?;
        let b = Machine::up(&scratch, "b", &[&far]);
        let c = Machine::up_with_config(&scratch, "c", &[&copy], "[cache]\nkeep_free = \"900 TiB\"\n");
        let (deaf, cold) = (Machine::cold(&scratch, "deaf"), Machine::cold(&scratch, "cold"));
        deaf.restart_deaf();
        let used = b.ticket();
        c.ok(["join", &used]);
        c.hears(&b);
        a.join(&b);
        a.join(&c);
        let expired = Ticket { expires: 1000, ..used.parse().unwrap() };
        let variables = vec![
            ("OWN", a.ticket()),
            ("USED", used),
            ("EXPIRED", expired.to_string()),
            ("LATE", c.ticket()),
            ("ID", a.id()),
            ("STRANGER", "07".repeat(32)),
            ("TAKEN", a.address()),
        ];
        Some(Self { scratch, machines: vec![a, b, c, deaf, cold], variables })
    }

    fn machine(&self, name: &str) -> &Machine {
        self.machines.iter().find(|machine| machine.name() == name).unwrap_or_else(|| panic!("no machine {name}"))
    }

    /// Does what a line without a machine says: `stop MACHINE`, `rot PATH`, `newer MACHINE` (its database is of a newer
    /// program from then on), or what a shell understands; several with `; ` between.
    fn set_up(&self, line: &str) {
        for command in line.split("; ") {
            match command.split_once(' ') {
                Some(("stop", name)) => drop(self.machine(name).stop()),
                Some(("rot", path)) => self.scratch.rot(&self.scratch.path(path), &[0]),
                Some(("newer", name)) => {
                    let path = self.machine(name).home().join("state/blobd.redb");
                    let write = Database::create(path).unwrap().begin_write().unwrap();
                    write.open_table(FORMATS).unwrap().insert("format", 1000).unwrap();
                    write.commit().unwrap();
                }
                _ => {
                    let output = self.shell("nowhere", command);
                    assert_eq!((output.code, &*output.stderr), (0, ""), "{command}");
                }
            }
        }
        // Until a is told why it cannot reach them, it says something else.
        for peer in line.split("; ").filter_map(|command| command.strip_prefix("stop ")) {
            wait_for(&format!("a fails to reach {peer}"), Duration::from_secs(60), || {
                self.machine("a").peer(peer)?["last_error"].is_string().then_some(())
            });
        }
    }

    /// Runs a command at a machine.
    fn shell(&self, machine: &str, command: &str) -> Output {
        let programs = blob().parent().unwrap().to_owned();
        let path = env::join_paths([programs].into_iter().chain(env::split_paths(&env::var_os("PATH").unwrap())));
        let mut shell = Command::new("timeout");
        // What should fail and does not, may be a daemon.
        shell.args(["30", "sh", "-c", &command.replace("DIR", &self.dir())]).current_dir(self.scratch.path(""));
        shell.env("BLOBD_HOME", self.scratch.path(&format!("{machine}.home"))).env("PATH", path.unwrap());
        shell
            .envs(self.variables.iter().map(|(name, value)| (name, value)))
            .env_remove("BLOBD_LOG")
            .env("BLOBD_RETRY", "0s");
        Output::obeying_modes(shell)
    }

    fn dir(&self) -> String {
        self.scratch.path("").to_str().unwrap().trim_end_matches('/').to_owned()
    }

    /// What a command printed, as the specification shows it.
    fn shown(&self, output: &Output) -> String {
        let text = output.stderr.replace(&self.dir(), "DIR");
        let mut lines = text.lines().map(|line| normal(line) + "\n").collect::<Vec<_>>();
        // Several files are brought at once, and fail in any order.
        lines
            .chunk_by_mut(|one, next| [one, next].iter().all(|line| line.starts_with("failed: ")))
            .for_each(<[_]>::sort);
        format!("{}(exit {})\n", lines.concat(), output.code)
    }
}

/// A line with stand-ins for what is another each time: ids, ports, times, and large numbers.
fn normal(line: &str) -> String {
    let mut normal = String::new();
    let is_part = |c: char| c.is_ascii_alphanumeric() || ".:-".contains(c);
    let mut rest = line;
    while let Some(c) = rest.chars().next() {
        let len = rest.find(|c| !is_part(c)).unwrap_or(rest.len()).max(c.len_utf8());
        let (word, behind) = rest.split_at(len);
        rest = behind;
        let (bare, end) = word.split_at(word.trim_end_matches([':', '.']).len());
        normal += &match bare.strip_prefix("127.0.0.1:") {
            Some(_) => "127.0.0.1:PORT".to_owned(),
            None if bare.len() == 64 && bare.bytes().all(|b| b.is_ascii_hexdigit()) => "ID".to_owned(),
            None if bare.len() >= 9 && bare.bytes().all(|b| b.is_ascii_digit()) => "NUMBER".to_owned(),
            None if bare.len() >= 20 && bare.ends_with('Z') && ["19", "20"].contains(&&bare[..2]) => "TIME".to_owned(),
            None => bare.to_owned(),
        };
        normal += end;
    }
    match normal.rsplit_once(" in ") {
        Some((before, after)) if after.contains(" s") && after.starts_with(|c: char| c.is_ascii_digit()) => {
            format!("{before} in N s")
        }
        _ => normal,
    }
}

#[test]
fn every_error_is_told_as_the_specification_says() {
    let Some(world) = World::new() else { return eprintln!("nothing here can be made to obey modes") };
    let spec = Path::new(env!("CARGO_MANIFEST_DIR")).join("../spec/errors.md");
    let (mut promised, mut found, mut commands) = (fs::read_to_string(&spec).unwrap(), String::new(), 0);
    if !promised.ends_with('\n') {
        promised.push('\n');
    }
    let mut in_block = false;
    for line in promised.lines() {
        if line.starts_with("```") {
            in_block = line == "```console";
        } else if in_block {
            match line.split_once("$ ") {
                Some(("", command)) => {
                    found.extend([line, "\n"]);
                    world.set_up(command);
                }
                Some((machine, command)) if machine.bytes().all(|b| b.is_ascii_lowercase()) => {
                    found.extend([line, "\n"]);
                    found += &world.shown(&world.shell(machine, command));
                    commands += 1;
                }
                // What was printed when it was last written.
                _ => {}
            }
            continue;
        }
        found.extend([line, "\n"]);
    }
    assert!(commands > 80, "{commands} commands");
    for part in ["(os error", "Error {", "Err(", "Some(", "panicked"] {
        assert!(!found.contains(part), "{part:?} in\n{found}");
    }
    if env::var_os("UPDATE").is_some() {
        return fs::write(spec, found).unwrap();
    }
    for (promised, found) in promised.lines().zip(found.lines()) {
        assert_eq!(found, promised, "UPDATE=1 writes what is found; read the difference");
    }
    assert_eq!(found, promised);
}

/// The store's, where the number of its format is.
const FORMATS: TableDefinition<&str, u32> = TableDefinition::new("store.meta");
