//! Of a file of which another version is here, only what is new is brought.

use std::{fs, path::Path, time::Duration};

use tests::{Machine, Scratch, wait_for, write_random};

const MIB: usize = 1 << 20;

/// Gets `docs/file` at `machine`, where it is at first, and gives the bytes that came for it.
fn get(machine: &Machine, scratch: &Scratch, expected: &[u8]) -> u64 {
    let copy = scratch.path("copy");
    let got = machine.ok(["get".as_ref(), "--json".as_ref(), "docs/file".as_ref(), copy.as_os_str()]);
    assert!(fs::read(&copy).unwrap() == expected);
    fs::remove_file(copy).unwrap();
    got.summary()["bytes_received"].as_u64().unwrap()
}

/// Waits until a machine shows `docs/file` with these bytes.
fn knows(machine: &Machine, bytes: &[u8]) {
    let blob = blake3::hash(bytes).to_string();
    wait_for("the file is heard of", Duration::from_secs(60), || {
        let stat = machine.run(["stat", "--json", "docs/file"]);
        (stat.code == 0 && stat.json()[0]["blob"] == blob.as_str()).then_some(())
    });
}

#[test]
fn of_an_edited_file_comes_what_was_edited() {
    let scratch = Scratch::new();
    let (root, other) = (scratch.dir("docs"), scratch.dir("b/docs"));
    write_random(&root.join("file"), 8 << 20, &mut fastrand::Rng::with_seed(1));
    fs::copy(root.join("file"), other.join("file")).unwrap();
    let a = Machine::quick(&scratch, "a", &[&root]);
    let b = Machine::quick(&scratch, "b", &[&other]);
    let c = Machine::quick::<&Path>(&scratch, "c", &[]);
    b.join(&a);
    c.join(&a);
    let mut bytes = fs::read(root.join("file")).unwrap();
    [&b, &c].into_iter().for_each(|machine| knows(machine, &bytes));
    // It is in place at B; a part of it is in the cache of C.
    c.ok(["cat", "docs/file", "--range", "0..6000000"]);

    for edit in 0..3 {
        match edit {
            0 => bytes[3 * MIB] ^= 1,
            1 => drop(bytes.splice(..0, *b"something in front")),
            _ => bytes.extend([7; 1000]),
        }
        fs::write(root.join("file"), &bytes).unwrap();
        [&b, &c].into_iter().for_each(|machine| knows(machine, &bytes));
        let (at_b, at_c) = (get(&b, &scratch, &bytes), get(&c, &scratch, &bytes));
        assert!(at_b < 400_000, "edit {edit}: {at_b} bytes came to B");
        // C keeps nothing of what it gets, but for what it has read.
        assert!(at_c < 2_900_000, "edit {edit}: {at_c} bytes came to C");
    }
}
