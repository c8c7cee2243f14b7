//! Very much at once.

use std::{
    fs, thread,
    time::{Duration, Instant},
};

use crate::{Watched, shows, write};

/// As `tar x` does it.
#[test]
fn five_thousand_files() {
    let w = Watched::new(|_| {});
    let b = w.other();
    for number in 0..5000 {
        write(w.path(&format!("tree/{}/{number}", number % 50)), format!("file {number}"));
    }
    w.shows_all();
    shows(&b, &w.root);
    w.a.rests();
    let scanned = w.a.ok(["arena", "scan", "--json"]).summary();
    assert_eq!((&scanned["files"], &scanned["hashed_files"]), (&5000.into(), &0.into()), "{scanned}");
}

/// Directories that are renamed back and forth while they are looked at, and written to wherever they are.
#[test]
fn renamed_back_and_forth() {
    let w = Watched::new(|root| {
        for number in 0..200 {
            write(root.join(format!("x/dir/{}/{number}", number % 10)), format!("file {number}"));
        }
        write(root.join("y/file"), "file");
    });
    let b = w.other();
    for round in 0..3_u32 {
        let started = Instant::now();
        let pause = Duration::from_millis([0, 3, 90][round as usize]);
        while started.elapsed() < Duration::from_millis(700) {
            for (old, new) in [("x/dir", "y/dir"), ("y/dir/3", "x/3"), ("x", "z"), ("z/3", "y/dir/3")] {
                fs::rename(w.path(old), w.path(new)).unwrap();
                thread::sleep(pause);
            }
            write(w.path(&format!("y/dir/new{round}")), format!("{:?}", started.elapsed()));
            for (old, new) in [("z", "x"), ("y/dir", "x/dir")] {
                fs::rename(w.path(old), w.path(new)).unwrap();
                thread::sleep(pause);
            }
        }
        w.shows_all();
        // All of it is watched where it is now.
        write(w.path(&format!("x/dir/3/after{round}")), "after");
        write(w.path(&format!("y/after{round}")), "after");
        w.shows_all();
    }
    shows(&b, &w.root);
    w.a.rests();
    w.shows_all();
}

/// A large directory comes, and goes on growing while it is read for the first time: what comes between the reading and
/// the watching, nobody would tell.
#[test]
fn a_directory_that_grows_while_it_is_read() {
    let w = Watched::new(|_| {});
    let outside = w.scratch.dir("outside");
    for number in 0..3000 {
        write(outside.join(format!("dir/{number}")), "the same");
    }
    fs::rename(outside.join("dir"), w.path("dir")).unwrap();
    let started = Instant::now();
    let from = w.a.log().len();
    let mut number = 0;
    while started.elapsed() < Duration::from_secs(2) && w.a.log()[from..].matches("up to date").count() == 0 {
        for _ in 0..20 {
            number += 1;
            fs::write(w.path(&format!("dir/new{number}")), "").unwrap();
            thread::sleep(Duration::from_micros(100));
        }
    }
    w.shows_all();
}
