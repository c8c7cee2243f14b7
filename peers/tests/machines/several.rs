//! Blobs that several peers have, and many blobs at a time.

use std::{
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use crate::machine::{DEADLINE, Machine, random_bytes, until};
use crate::raw::{Manner, Puppet};
use blobstore::{Fetch, FetchError, Sink, StoreError, Want};
use peers::{
    Class,
    wire::{BLOB_BYTES_MAX, StreamKind},
};
use tokio::time::timeout;
use tree::{BlobId, ByteRange, Geometry, Verified, VerifiedData};

/// A machine that has met `others`.
async fn met(name: &str, others: &[&Machine]) -> Machine {
    let near = Machine::start(name);
    for other in others {
        near.meet(other).await;
    }
    near
}

/// Has `near` meet a puppet, which is said to have these.
async fn meet_puppet(near: &Machine, manner: Manner, blobs: &[&[u8]]) -> Puppet {
    let puppet = Puppet::start(manner, blobs);
    near.trust(puppet.id(), "puppet", Some(puppet.address));
    until("the puppet is met", || near.is_connected(puppet.id())).await;
    near.hear(puppet.id(), puppet.id(), blobs);
    puppet
}

fn bytes_of(pieces: &[VerifiedData]) -> Vec<u8> {
    pieces.iter().flat_map(|piece| piece.bytes().iter().copied()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn all_that_have_it_send_a_share() {
    let bytes = random_bytes(1, (48 << 20) + 77);
    let holders = ["one", "two", "three"].map(Machine::start);
    let near = met("near", &holders.each_ref()).await;
    for holder in &holders {
        let blob = holder.hold("file", &bytes);
        near.heard(holder, holder, blob).await;
    }
    let mut fetched = timeout(DEADLINE, near.fetch_all(&bytes)).await.unwrap().unwrap();
    fetched.peers.sort();
    assert_eq!(fetched.peers, ["one", "three", "two"]);
    assert!(fetched.bytes_received < bytes.len() as u64 * 5 / 4, "{} bytes came", fetched.bytes_received);
}

/// Wherever the one stalls, the other sends what is missing, long before the one is given up.
#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_stalls_costs_its_share_only() {
    let bytes = random_bytes(2, 9 << 20);
    let sound = Machine::start("sound");
    let near = met("near", &[&sound]).await;
    near.heard(&sound, &sound, sound.hold("file", &bytes)).await;
    for at in [0, 1, 8, 9, 100, 20_000, 1 << 20, (4 << 20) - 5] {
        let puppet = meet_puppet(&near, Manner::Stalling(at), &[&bytes]).await;
        let began = Instant::now();
        timeout(DEADLINE, near.fetch_all(&bytes)).await.unwrap().unwrap();
        assert!(began.elapsed() < Duration::from_secs(8), "stalled at {at}: {:?}", began.elapsed());
        assert!(puppet.times_asked(StreamKind::Get) > 0);
        near.peers.roster().remove(puppet.id()).unwrap();
        near.peers.disconnect(puppet.id());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_share_of_a_liar_comes_from_others() {
    let bytes = random_bytes(3, 20 << 20);
    let sound = Machine::start("sound");
    let near = met("near", &[&sound]).await;
    near.heard(&sound, &sound, sound.hold("file", &bytes)).await;
    let liar = meet_puppet(&near, Manner::Lying, &[&bytes]).await;
    timeout(DEADLINE, near.fetch_all(&bytes)).await.unwrap().unwrap();
    assert_eq!(liar.times_asked(StreamKind::Get), 1, "it is not asked again");
}

#[tokio::test(flavor = "multi_thread")]
async fn many_small_blobs_travel_together() {
    let mut rng = fastrand::Rng::with_seed(4);
    let blobs: Vec<Vec<u8>> = (0..700).map(|seed| random_bytes(seed, rng.usize(0..9000))).collect();
    let near = Machine::start("near");
    let all: Vec<&[u8]> = blobs.iter().map(Vec::as_slice).collect();
    let puppet = meet_puppet(&near, Manner::Late(0), &all).await;
    let asked: Vec<_> = all.iter().map(|bytes| (BlobId::of(bytes), bytes.len() as u64)).collect();
    let came = timeout(DEADLINE, near.peers.fetch_small(Class::Copy, &asked)).await.unwrap();
    for (came, bytes) in came.into_iter().zip(&all) {
        let (pieces, fetched) = came.unwrap();
        assert_eq!((bytes_of(&pieces), fetched.peers), (bytes.to_vec(), vec!["puppet".to_owned()]));
    }
    assert_eq!((puppet.times_asked(StreamKind::Batch), puppet.times_asked(StreamKind::Get)), (3, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_batch_lacks_is_asked_for_alone() {
    let sizes = [0, 1, 16384, 16385, 100_000, BLOB_BYTES_MAX, BLOB_BYTES_MAX + 1];
    let blobs: Vec<Vec<u8>> = (0..).zip(sizes).map(|(seed, size)| random_bytes(seed, size as usize)).collect();
    let all: Vec<&[u8]> = blobs.iter().map(Vec::as_slice).collect();
    let asked: Vec<_> = all.iter().map(|bytes| (BlobId::of(bytes), bytes.len() as u64)).collect();
    let sound = Machine::start("sound");
    for (number, bytes) in blobs.iter().enumerate() {
        sound.hold(&number.to_string(), bytes);
    }
    for manner in [Manner::Lying, Manner::Stalling(3)] {
        let near = met(&format!("{manner:?}"), &[&sound]).await;
        near.heard(&sound, &sound, asked[6].0).await;
        let _puppet = meet_puppet(&near, manner, &all).await;
        let came = timeout(DEADLINE, near.peers.fetch_small(Class::Copy, &asked)).await.unwrap();
        for (came, bytes) in came.into_iter().zip(&all) {
            assert_eq!(bytes_of(&came.unwrap().0), *bytes, "{manner:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_small_blob_that_rotted_comes_from_another() {
    let bytes = random_bytes(5, 50_000);
    let (rotten, sound) = (Machine::start("rotten"), Machine::start("sound"));
    let near = met("near", &[&rotten, &sound]).await;
    for holder in [&rotten, &sound] {
        near.heard(holder, holder, holder.hold("file", &bytes)).await;
    }
    rotten.rot("file", ByteRange::new(20_000, 20_001).unwrap());
    let asked = [(BlobId::of(&bytes), bytes.len() as u64)];
    for _ in 0..4 {
        let came = timeout(DEADLINE, near.peers.fetch_small(Class::Copy, &asked)).await.unwrap().remove(0);
        assert_eq!(bytes_of(&came.unwrap().0), bytes);
    }
    let nobody = (BlobId::from_bytes([1; 32]), 5);
    assert!(timeout(DEADLINE, near.peers.fetch_small(Class::Copy, &[nobody])).await.unwrap()[0].is_err());
}

/// As if each had come alone: in the cache, with the nodes above the larger ones, and durable.
#[tokio::test(flavor = "multi_thread")]
async fn many_small_blobs_are_brought_together() {
    let sizes = [1, 9000, 16_384, 16_385, 100_000, BLOB_BYTES_MAX as usize, BLOB_BYTES_MAX as usize + 1, 1 << 20];
    let blobs: Vec<Vec<u8>> = sizes.iter().zip(40..).map(|(&size, seed)| random_bytes(seed, size)).collect();
    let far = Machine::start("far");
    let near = met("near", &[&far]).await;
    for (number, bytes) in blobs.iter().enumerate() {
        near.heard(&far, &far, far.hold(&number.to_string(), bytes)).await;
    }
    let nobody = (BlobId::of(b"nobody has it"), 13);
    let asked = blobs.iter().map(|bytes| (BlobId::of(bytes), bytes.len() as u64)).chain([nobody]).collect::<Vec<_>>();
    let mut came = timeout(DEADLINE, near.peers.bring_small(Class::Background, &asked)).await.unwrap();
    assert!(came.pop().unwrap().is_err());
    for (came, bytes) in came.into_iter().zip(&blobs) {
        assert_eq!(came.unwrap().peers, ["far"]);
        assert_eq!(near.cached(bytes).total_bytes(), bytes.len() as u64);
        let blob = BlobId::of(bytes);
        assert!(matches!(near.store.verify_cached(blob, &|_| {}), Ok(Some(blobstore::Verdict::Sound))));
    }
}

/// A disk that is full after some MiB.
struct Full {
    written: u64,
    commits: usize,
}

impl Sink for Full {
    fn write(&mut self, pieces: &[Verified]) -> Result<(), StoreError> {
        self.written += pieces.iter().filter_map(Verified::data).map(|data| data.range().len()).sum::<u64>();
        if self.written > 2 << 20 {
            return Err(StoreError::CacheFull { free: 0, keep_free: 0 });
        }
        Ok(())
    }

    fn commit(&mut self) -> Result<(), StoreError> {
        self.commits += 1;
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sink_that_is_full_ends_the_fetch() {
    let (far, near) = (Machine::start("far"), Machine::start("near"));
    let bytes = random_bytes(11, 32 << 20);
    let (blob, size) = (far.hold("file", &bytes), bytes.len() as u64);
    near.meet(&far).await;
    near.heard(&far, &far, blob).await;
    let sink = Arc::new(Mutex::new(Full { written: 0, commits: 0 }));
    let want = Want { blob, size, ranges: Geometry::new(size).all().into() };
    let outcome = timeout(Duration::from_secs(10), near.peers.fetch(want, sink.clone())).await.expect("at once");
    assert!(matches!(outcome, Err(FetchError::Sink { source: StoreError::CacheFull { .. }, .. })), "{outcome:?}");
    assert_eq!(sink.lock().unwrap().commits, 1, "what came before is committed");
}
