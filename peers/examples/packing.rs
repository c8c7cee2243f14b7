//! What packing costs and gains: `cargo run --release -p peers --example packing -- DIR`.
//!
//! On random bytes, beside what hashing them takes; and on all `.rs` and `.md` files below DIR, by level. One thread.

use std::{
    env, fs,
    path::Path,
    time::{Duration, Instant},
};

use bytes::Bytes;
use peers::{Compress, Packer, Unpacker};
use tree::BlobId;

fn main() {
    let mut random = vec![0; 256 << 20];
    fastrand::Rng::with_seed(1).fill(&mut random);
    let noise = frames(&random);
    let hashing = shortest(|| {
        std::hint::black_box(BlobId::of(&random));
    });
    println!("BLAKE3 of random bytes: {:.0} MB/s", megabytes(random.len()) / hashing.as_secs_f64());
    for compress in ["off", "auto", "1", "3"] {
        let compress: Compress = compress.parse().expect("a setting");
        let took = shortest(|| drop(pack(&noise, compress)));
        let percent = 100.0 * took.as_secs_f64() / hashing.as_secs_f64();
        println!("random bytes, {compress}: {percent:.2} % of the time of hashing");
    }

    let dir = env::args_os().nth(1).unwrap_or_else(|| ".".into());
    let mut text = Vec::new();
    gather(Path::new(&dir), &mut text);
    let plain = frames(&text);
    println!("source text: {:.1} MB", megabytes(text.len()));
    for level in ["1", "2", "3", "6", "9", "19"] {
        let compress: Compress = level.parse().expect("a level");
        let packing = shortest(|| drop(pack(&plain, compress)));
        let wire = pack(&plain, compress);
        let unpacking = shortest(|| unpack(&wire));
        let bytes: usize = wire.iter().map(Bytes::len).sum();
        println!(
            "source text, level {level}: {:.3} of its size, packed at {:.0} MB/s, unpacked at {:.0} MB/s",
            bytes as f64 / text.len() as f64,
            megabytes(text.len()) / packing.as_secs_f64(),
            megabytes(text.len()) / unpacking.as_secs_f64(),
        );
    }
}

/// `bytes` as answers come: frames of 256 KiB in chunks of 16 KiB.
fn frames(bytes: &[u8]) -> Vec<Vec<Bytes>> {
    bytes.chunks(256 << 10).map(|frame| frame.chunks(16 << 10).map(Bytes::copy_from_slice).collect()).collect()
}

fn pack(frames: &[Vec<Bytes>], compress: Compress) -> Vec<Bytes> {
    let mut packer = Packer::new(compress);
    frames.iter().flat_map(|frame| packer.pack(frame.clone(), true)).collect()
}

fn unpack(wire: &[Bytes]) {
    let mut unpacker = Unpacker::new();
    for chunk in wire {
        unpacker.push(chunk.clone());
        while unpacker.next().expect("what was packed unpacks").is_some() {}
    }
    assert!(unpacker.is_between_frames());
}

fn gather(dir: &Path, text: &mut Vec<u8>) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    for path in entries.flatten().map(|entry| entry.path()) {
        if path.is_dir() && path.file_name() != Some("target".as_ref()) {
            gather(&path, text);
        } else if path.extension().is_some_and(|kind| kind == "rs" || kind == "md") {
            text.extend(fs::read(&path).unwrap_or_default());
        }
    }
}

/// The shortest of several runs, for the others were disturbed.
fn shortest(mut run: impl FnMut()) -> Duration {
    let times = (0..7).map(|_| {
        let start = Instant::now();
        run();
        start.elapsed()
    });
    times.min().unwrap_or_default()
}

fn megabytes(bytes: usize) -> f64 {
    bytes as f64 / 1e6
}
