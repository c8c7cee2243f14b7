use std::{collections::BTreeMap, fs, path::Path, time::Duration};

use serde_json::Value;

use crate::{Item, Machine, Mtime, Scratch, Tree, differences, indexed, path_of, wait_for};

/// A configuration with which changes are found at once.
pub const QUICK: &str = "[watch]\nsettle = \"100ms\"\nsettle_max = \"1s\"\n";

impl Machine {
    /// Starts a machine that finds changes at once.
    pub fn quick<P: AsRef<Path>>(scratch: &Scratch, name: &str, dirs: &[P]) -> Self {
        Self::up_with_config(scratch, name, dirs, QUICK)
    }

    /// What it lists of an arena; modes are not listed, and so 0. Nothing if it knows of no such arena.
    #[track_caller]
    pub fn listed(&self, arena: &str) -> Tree {
        let output = self.run(["ls", "-R", "--json", arena]);
        assert!([0, 7].contains(&output.code), "{}", output.stderr);
        let item = |line: &Value| {
            let mtime = || Mtime::from_json(line["mtime"].as_str().expect("it has an mtime"));
            match line["kind"].as_str() {
                Some("file") => Item::File {
                    size: line["size"].as_u64().expect("it has a size"),
                    blob: blake3::Hash::from_hex(line["blob"].as_str().expect("it has a blob")).expect("it is a hash"),
                    mode: 0,
                    mtime: mtime(),
                },
                Some("symlink") => Item::Symlink { target: path_of(&line["target"]), mtime: mtime() },
                Some("dir") => Item::Directory,
                _ => panic!("{line}"),
            }
        };
        output.of_type("entry").iter().map(|line| (path_of(line), item(line))).collect()
    }

    /// Waits until it lists of an arena just what is below `root`, directories included.
    #[track_caller]
    pub fn sees(&self, arena: &str, root: &Path) {
        self.lists(arena, &listable(root));
    }

    /// Waits until it lists just `expected` of an arena.
    #[track_caller]
    pub fn lists(&self, arena: &str, expected: &Tree) {
        let mut left = Vec::new();
        let mut tries = 0;
        wait_for(&format!("{} sees {arena}", self.name()), LIMIT, || {
            left = differences(expected, &self.listed(arena));
            tries += 1;
            if tries % 200 == 0 {
                eprintln!("{} does not yet see: {left:#?}", self.name());
            }
            left.is_empty().then_some(())
        });
    }

    /// Waits until it shows just these bytes' blob at a path.
    #[track_caller]
    pub fn shows(&self, target: &str, data: &[u8]) {
        let blob = blake3::hash(data).to_string();
        wait_for(&format!("{} shows {:?} at {target}", self.name(), String::from_utf8_lossy(data)), LIMIT, || {
            let output = self.run(["stat", "--json", target]);
            (output.code == 0 && output.json()[0]["blob"] == blob).then_some(())
        });
    }

    /// Waits until these are the paths in conflict, in order.
    #[track_caller]
    pub fn is_in_conflict_at(&self, paths: &[&str]) {
        wait_for(&format!("{} is in conflict at {paths:?}", self.name()), LIMIT, || {
            let conflicts = self.ok(["conflicts", "--json"]);
            assert_eq!(conflicts.summary()["conflicts"], conflicts.of_type("conflict").len());
            let found = conflicts.of_type("conflict").iter().map(path_of).collect::<Vec<_>>();
            found.iter().map(Vec::as_slice).eq(paths.iter().map(|path| path.as_bytes())).then_some(())
        });
    }
}

/// What a listing of `root` says.
pub fn listable(root: &Path) -> Tree {
    let mut tree = indexed(root);
    for item in tree.values_mut() {
        if let Item::File { mode, .. } = item {
            *mode = 0;
        }
    }
    tree
}

/// Writes files below `root`, each with its name's bytes; a name that ends with `/` is a directory.
pub fn write_tree(root: &Path, names: &[&str]) {
    for name in names {
        let path = root.join(name);
        if name.ends_with('/') {
            fs::create_dir_all(path).expect("make a directory");
        } else {
            fs::create_dir_all(path.parent().expect("it is below the root")).expect("make a directory");
            fs::write(path, name).expect("write a file");
        }
    }
}

/// Writes files below `root`, each under its path.
pub fn write_files<P: AsRef<Path>>(root: &Path, files: &BTreeMap<P, Vec<u8>>) {
    for (path, bytes) in files {
        let path = root.join(path);
        fs::create_dir_all(path.parent().expect("it is below the root")).expect("make a directory");
        fs::write(path, bytes).expect("write a file");
    }
}

const LIMIT: Duration = Duration::from_secs(60);
