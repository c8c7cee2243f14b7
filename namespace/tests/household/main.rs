//! Households of a few machines: whatever happens to them, to their files and to the connections between them, in the end
//! everyone shows the same, which is so; and on the way nothing vanishes from view that was there all the time, and
//! nothing comes back that was gone.
//!
//! Everything is real but files, clocks and network. One seed is one run: a failure prints it, and `SEED=…` repeats it.
//! `HOUSEHOLD_SEEDS=200000` makes a longer run of it.

mod cases;
#[path = "../common/mod.rs"]
mod common;
mod files;
mod machine;
mod network;
mod quiet;
mod world;

use std::{
    panic,
    sync::atomic::{AtomicU64, Ordering},
    thread,
};

use crate::world::World;

#[test]
fn in_the_end_all_show_what_is_so() {
    let var = |name| std::env::var(name).ok().map(|number| number.parse::<u64>().expect("a number"));
    if let Some(seed) = var("SEED") {
        return run(seed);
    }
    let (seeds, next) = (var("HOUSEHOLD_SEEDS").unwrap_or(SEEDS), AtomicU64::new(0));
    let failed = AtomicU64::new(u64::MAX);
    let work = || {
        while failed.load(Ordering::Relaxed) == u64::MAX {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= seeds {
                return;
            }
            if panic::catch_unwind(|| run(seed)).is_err() {
                failed.fetch_min(seed, Ordering::Relaxed);
            }
        }
    };
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(1, |threads| threads.get()) {
            scope.spawn(work);
        }
    });
    let failed = failed.into_inner();
    assert_eq!(failed, u64::MAX, "again: SEED={failed} cargo nextest run -p namespace --test household in_the_end");
}

fn run(seed: u64) {
    let mut world = World::new(fastrand::Rng::with_seed(seed));
    for _ in 0..world.rng.usize(20..STEPS) {
        world.step();
    }
    world.quiet();
    world.check_quiet();
}

/// Seeds of an ordinary run.
const SEEDS: u64 = 10_000;
/// How much happens with one seed, at most.
const STEPS: usize = 150;
