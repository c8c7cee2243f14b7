//! Reading through a peer what somebody has whom one never meets. Several machines in one process, on loopback.

mod machine;
#[allow(dead_code, reason = "other tests use the rest of it")]
mod raw;

use std::time::{Duration, Instant};

use blobstore::FetchError;
use machine::{DEADLINE, Machine, random_bytes, until};
use peers::{Identity, wire::StreamKind};
use raw::{Manner, Puppet, answer, ask, through};
use tokio::time::timeout;
use tree::{BlobId, ByteRange, GROUP_BYTES, Geometry, Query, RangeSet};

/// Where `far` has these bytes, and `near` meets only `between`, which meets `far`.
struct Three {
    far: Machine,
    between: Machine,
    near: Machine,
}

async fn three(bytes: &[u8]) -> Three {
    three_with_cache(bytes, 1 << 30).await
}

/// The same, where the one in between has a cache of so many bytes.
async fn three_with_cache(bytes: &[u8], cache_limit: u64) -> Three {
    let between = Machine::with_cache("between", cache_limit);
    let three = Three { far: Machine::start("far"), between, near: Machine::start("near") };
    let Three { far, between, near } = &three;
    let blob = far.hold("file", bytes);
    near.meet(between).await;
    far.meet(between).await;
    near.heard(between, far, blob).await;
    between.heard(far, far, blob).await;
    three
}

fn tried(error: FetchError) -> Vec<String> {
    match error {
        FetchError::AllFailed { tried, .. } => tried,
        other => panic!("{other}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_is_read_through_a_peer_and_stays_in_its_cache() {
    let bytes = random_bytes(1, (3 << 20) + 1234);
    let Three { far, between, near } = three(&bytes).await;
    let fetched = timeout(DEADLINE, near.fetch_all(&bytes)).await.unwrap().unwrap();
    assert_eq!(fetched.peers, ["between"]);
    assert_eq!(between.cached(&bytes), RangeSet::from(Geometry::new(bytes.len() as u64).all()));

    far.peers.shutdown().await;
    until("it is gone", || !between.is_connected(far.id())).await;
    timeout(DEADLINE, near.fetch_all(&bytes)).await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_range_is_fetched_and_no_more() {
    let bytes = random_bytes(2, 40 << 20);
    let Three { between, near, far: _far } = three(&bytes).await;
    let range = ByteRange::new(17_000_000, 17_100_000).unwrap();
    timeout(DEADLINE, near.fetch(&bytes, range)).await.unwrap().unwrap();
    let geometry = Geometry::new(bytes.len() as u64);
    // The last chunk group proves the size.
    let wanted = RangeSet::from(geometry.round_out(range)).union(&geometry.last_group().into());
    assert_eq!(between.cached(&bytes), wanted);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_nobody_can_get_is_an_error_that_says_through_whom_it_was_tried() {
    let bytes = random_bytes(3, 100_000);
    let Three { far, between, near } = three(&bytes).await;
    far.peers.shutdown().await;
    until("it is gone", || !between.is_connected(far.id())).await;
    let error = timeout(DEADLINE, near.fetch_all(&bytes)).await.expect("a bounded time").unwrap_err();
    assert_eq!(tried(error), [format!("{}, through between: it cannot get all of it", far.id())]);
    assert!(between.cached(&bytes).is_empty() && between.store.cached().unwrap().is_empty());
}

/// With a part in the cache already, one damaged copy here, and the rest at a peer.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_found_damaged_is_fetched_in_passing() {
    let bytes = random_bytes(4, 2 << 20);
    let Three { between, near, far: _far } = three(&bytes).await;
    between.hold("copy", &bytes);
    between.rot("copy", ByteRange::new(3 * GROUP_BYTES, 5 * GROUP_BYTES).unwrap());
    timeout(DEADLINE, near.fetch(&bytes, ByteRange::new(1_900_000, 1_900_001).unwrap())).await.unwrap().unwrap();
    let head = through(1, bytes.len());
    let came = ask(&near.identity, &between, &head, BlobId::of(&bytes), &Query::all()).await;
    assert!(came == answer(&bytes, &Query::all()), "{} bytes", came.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_lies_in_between_is_found_out() {
    let bytes = random_bytes(5, 200_000);
    let near = Machine::start("near");
    let (far, liar) = (Identity::ephemeral().unwrap().peer(), Puppet::start(Manner::Lying, &[&bytes]));
    near.hear(liar.id(), far, &[&bytes]);
    near.trust(liar.id(), "liar", Some(liar.address));
    until("they are connected", || near.is_connected(liar.id())).await;
    let error = timeout(DEADLINE, near.fetch_all(&bytes)).await.unwrap().unwrap_err();
    let tried = tried(error);
    assert!(
        tried.len() == 1 && tried[0].starts_with(&format!("{far}, through liar: it sent wrong bytes")),
        "{tried:?}"
    );
    assert_eq!((liar.times_asked(StreamKind::Through), liar.times_asked(StreamKind::Get)), (1, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn two_that_believe_that_the_other_can_get_it_do_not_ask_each_other_for_ever() {
    let bytes = random_bytes(6, 100_000);
    let [near, one, other] = ["near", "one", "other"].map(Machine::start);
    let far = Identity::ephemeral().unwrap().peer();
    near.hear(one.id(), far, &[&bytes]);
    one.hear(other.id(), far, &[&bytes]);
    other.hear(one.id(), far, &[&bytes]);
    one.meet(&other).await;
    near.meet(&one).await;
    let began = Instant::now();
    let error = timeout(DEADLINE, near.fetch_all(&bytes)).await.unwrap().unwrap_err();
    assert_eq!(tried(error), [format!("{far}, through one: it cannot get all of it")]);
    assert!(began.elapsed() < Duration::from_secs(10), "neither waits for the other: {:?}", began.elapsed());
}

/// Here the first one is asked for what it is fetching, and cannot know that this is for itself. It lets the last one
/// wait for as long as the last hop may take.
#[tokio::test(flavor = "multi_thread")]
async fn a_ring_of_three_ends_in_time() {
    let bytes = random_bytes(7, 100_000);
    let [near, one, two, three] = ["near", "one", "two", "three"].map(Machine::start);
    let far = Identity::ephemeral().unwrap().peer();
    near.hear(one.id(), far, &[&bytes]);
    one.hear(two.id(), far, &[&bytes]);
    two.hear(three.id(), far, &[&bytes]);
    three.hear(one.id(), far, &[&bytes]);
    one.meet(&two).await;
    two.meet(&three).await;
    three.meet(&one).await;
    near.meet(&one).await;
    let error = timeout(Duration::from_secs(60), near.fetch_all(&bytes)).await.unwrap().unwrap_err();
    assert_eq!(tried(error), [format!("{far}, through one: it cannot get all of it")]);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_hops_it_is_a_plain_get() {
    let bytes = random_bytes(8, 300_000);
    let own = random_bytes(9, 300_000);
    let Three { between, near, far: _far } = three(&bytes).await;
    between.hold("own", &own);
    let some = Query::chunks([(3, 20), (100, 101), (290, 1000)]);
    let came = ask(&near.identity, &between, &through(0, bytes.len()), BlobId::of(&bytes), &some).await;
    assert!(came.is_empty() && between.store.cached().unwrap().is_empty());
    for head in [through(0, own.len()), through(1, own.len()), through(200, 5), vec![StreamKind::Get as u8]] {
        let came = ask(&near.identity, &between, &head, BlobId::of(&own), &some).await;
        assert!(came == answer(&own, &some), "{head:?}");
    }
}

/// near, one, two, far: one after the other.
#[tokio::test(flavor = "multi_thread")]
async fn every_hop_is_counted() {
    let bytes = random_bytes(10, 300_000);
    let [near, one, two, far] = ["near", "one", "two", "far"].map(Machine::start);
    let blob = far.hold("file", &bytes);
    near.meet(&one).await;
    one.meet(&two).await;
    two.meet(&far).await;
    near.heard(&one, &far, blob).await;
    one.heard(&two, &far, blob).await;
    let came = ask(&near.identity, &one, &through(1, bytes.len()), blob, &Query::all()).await;
    assert!(came.is_empty() && two.store.cached().unwrap().is_empty(), "{} bytes", came.len());
    let came = ask(&near.identity, &one, &through(2, bytes.len()), blob, &Query::all()).await;
    assert!(came == answer(&bytes, &Query::all()), "{} bytes", came.len());
    // Now the one in between has it, without a hop.
    let came = ask(&near.identity, &one, &through(0, bytes.len()), blob, &Query::all()).await;
    assert_eq!(came.len(), answer(&bytes, &Query::all()).len());
    // And asked for on its own account, too.
    timeout(DEADLINE, near.fetch_all(&bytes)).await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn four_fetches_at_a_time_are_made_on_behalf_of_one_peer() {
    let files: Vec<_> = (0..12).map(|seed| random_bytes(20 + seed, 20_000)).collect();
    let files: Vec<&[u8]> = files.iter().map(|bytes| &bytes[..]).collect();
    let far = Puppet::start(Manner::Late(4), &files);
    let [near, between] = ["near", "between"].map(Machine::start);
    near.hear(between.id(), far.id(), &files);
    between.hear(far.id(), far.id(), &files);
    between.trust(far.id(), "far", Some(far.address));
    near.meet(&between).await;
    until("they are connected", || between.is_connected(far.id())).await;
    let fetches = files.iter().map(|bytes| async { near.fetch_all(bytes).await.map(drop) });
    let all = async {
        for fetched in join_all(fetches).await {
            fetched.unwrap();
        }
    };
    timeout(DEADLINE, all).await.unwrap();
    assert_eq!(far.most_open(), 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_two_want_is_fetched_once() {
    let bytes = random_bytes(40, 20_000);
    let far = Puppet::start(Manner::Late(1), &[&bytes]);
    let [near, other, between] = ["near", "other", "between"].map(Machine::start);
    between.hear(far.id(), far.id(), &[&bytes]);
    between.trust(far.id(), "far", Some(far.address));
    for machine in [&near, &other] {
        machine.hear(between.id(), far.id(), &[&bytes]);
        machine.meet(&between).await;
    }
    until("they are connected", || between.is_connected(far.id())).await;
    let both = timeout(DEADLINE, async { tokio::join!(near.fetch_all(&bytes), other.fetch_all(&bytes)) });
    let (one, two) = both.await.unwrap();
    one.and(two).unwrap();
    assert_eq!(far.times_asked(StreamKind::Get), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_small_cache_is_enough_for_a_large_file() {
    let bytes = random_bytes(41, 40 << 20);
    let Three { between, near, far: _far } = three_with_cache(&bytes, 1 << 20).await;
    timeout(DEADLINE, near.fetch_all(&bytes)).await.unwrap().unwrap();
    // The windows under way may exceed it: the one that is sent, and the one that comes.
    let used = between.store.cache_usage().unwrap().bytes;
    assert!(used < 18 << 20, "{used}");
}

/// Runs them all at once.
async fn join_all<T>(futures: impl Iterator<Item = impl Future<Output = T>>) -> Vec<T> {
    let mut futures: Vec<_> = futures.map(|future| (Box::pin(future), None)).collect();
    std::future::poll_fn(|context| {
        for (future, output) in futures.iter_mut().filter(|(_, output)| output.is_none()) {
            if let std::task::Poll::Ready(ready) = future.as_mut().poll(context) {
                *output = Some(ready);
            }
        }
        if futures.iter().all(|(_, output)| output.is_some()) {
            std::task::Poll::Ready(())
        } else {
            std::task::Poll::Pending
        }
    })
    .await;
    futures.into_iter().filter_map(|(_, output)| output).collect()
}
