use std::{
    pin::{Pin, pin},
    task::{Context, Poll, Waker},
    time::Duration,
};

use namespace::PeerId;
use tokio::time::advance;

use super::*;

const KIB: u64 = 1 << 10;
const RATE: u64 = 640 * KIB;

fn poll<F: Future>(future: &mut Pin<&mut F>) -> Option<F::Output> {
    match future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(output) => Some(output),
        Poll::Pending => None,
    }
}

fn millis(from: Instant) -> u128 {
    from.elapsed().as_millis()
}

#[tokio::test(start_paused = true)]
async fn the_rate_is_kept() {
    let pace = Pace::new(Some(RATE));
    let start = Instant::now();
    for _ in 0..200 {
        pace.take(Class::Foreground, 16 * KIB).await;
    }
    assert!((5000..=5010).contains(&millis(start)), "{} ms", millis(start));
}

#[tokio::test(start_paused = true)]
async fn all_clones_and_tasks_keep_it_together() {
    let pace = Pace::new(Some(RATE));
    let start = Instant::now();
    let tasks: Vec<_> = [Class::Copy, Class::Foreground, Class::Background, Class::Copy]
        .into_iter()
        .map(|class| {
            let pace = pace.clone();
            tokio::spawn(async move {
                for _ in 0..50 {
                    pace.take(class, 16 * KIB).await;
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    assert!((5000..=5050).contains(&millis(start)), "{} ms", millis(start));
    assert_eq!(pace.waiting(), 0);
}

#[tokio::test(start_paused = true)]
async fn without_a_limit_nobody_waits() {
    let pace = Pace::new(None);
    for _ in 0..1000 {
        assert!(poll(&mut pin!(pace.take(Class::Background, u64::MAX))).is_some());
    }
    assert_eq!(pace.waiting(), 0);
}

#[tokio::test(start_paused = true)]
async fn the_higher_class_goes_first() {
    let pace = Pace::new(Some(RATE));
    let order = Arc::new(Mutex::new(Vec::new()));
    let mut tasks = Vec::new();
    for (name, class) in
        [("b", Class::Background), ("c", Class::Copy), ("f", Class::Foreground), ("f2", Class::Foreground)]
    {
        let (pace, order) = (pace.clone(), order.clone());
        tasks.push(tokio::spawn(async move {
            pace.take(class, 64 * KIB).await;
            order.lock().unwrap().push(name);
        }));
    }
    for task in tasks {
        task.await.unwrap();
    }
    assert_eq!(*order.lock().unwrap(), ["f", "f2", "c", "b"]);
}

#[tokio::test(start_paused = true)]
async fn who_waits_sees_a_new_rate_at_once() {
    let pace = Pace::new(Some(RATE));
    let mut takes: Vec<_> = (0..3).map(|_| Box::pin(pace.take(Class::Copy, 640 * KIB))).collect();
    // The first needs a burst of 64 KiB, which takes 100 ms, and leaves 900 ms to pay off.
    let start = Instant::now();
    takes.remove(0).await;
    assert!((100..=102).contains(&millis(start)), "{} ms", millis(start));

    let waiting = tokio::spawn({
        let pace = pace.clone();
        async move { pace.take(Class::Foreground, 64 * KIB).await }
    });
    while pace.waiting() == 0 {
        tokio::task::yield_now().await;
    }
    let start = Instant::now();
    // Ten times as fast: 90 ms for the debt, and 10 for the bytes.
    pace.set(Some(10 * RATE));
    assert_eq!(pace.rate(), Some(10 * RATE));
    waiting.await.unwrap();
    assert!((95..=105).contains(&millis(start)), "{} ms", millis(start));

    let start = Instant::now();
    pace.take(Class::Foreground, 100 * RATE).await;
    let mut waiting = pin!(pace.take(Class::Foreground, 1));
    assert!(poll(&mut waiting).is_none());
    pace.set(None);
    waiting.await;
    takes.remove(0).await;
    assert!(millis(start) <= 60, "{} ms", millis(start));
}

#[tokio::test(start_paused = true)]
async fn who_goes_away_takes_nothing_and_wakes_the_next() {
    let pace = Pace::new(Some(RATE));
    let start = Instant::now();
    let first = tokio::spawn({
        let pace = pace.clone();
        async move { pace.take(Class::Foreground, 64 * KIB).await }
    });
    let second = tokio::spawn({
        let pace = pace.clone();
        async move { pace.take(Class::Foreground, 16 * KIB).await }
    });
    while pace.waiting() < 2 {
        tokio::task::yield_now().await;
    }
    first.abort();
    assert!(first.await.unwrap_err().is_cancelled());
    second.await.unwrap();
    assert!((25..=27).contains(&millis(start)), "{} ms", millis(start));
}

#[tokio::test(start_paused = true)]
async fn what_was_granted_to_one_who_is_gone_is_given_back() {
    let pace = Pace::new(Some(RATE));
    let mut gone = Box::pin(pace.take(Class::Foreground, 64 * KIB));
    assert!(poll(&mut gone.as_mut()).is_none());
    let mut next = pin!(pace.take(Class::Foreground, 64 * KIB));
    advance(Duration::from_millis(100)).await;
    assert!(poll(&mut next).is_none(), "the first is let go, and has not looked");
    assert_eq!(pace.waiting(), 1);
    drop(gone);
    assert_eq!(pace.waiting(), 0);
    assert!(poll(&mut next).is_some());
    assert!(poll(&mut pin!(pace.take(Class::Foreground, 64 * KIB))).is_none(), "and only once");
}

#[tokio::test(start_paused = true)]
async fn what_is_given_back_brings_the_next_turn_nearer() {
    let pace = Pace::new(Some(RATE));
    let mut gone = Box::pin(pace.take(Class::Foreground, 16 * KIB));
    assert!(poll(&mut gone.as_mut()).is_none());
    advance(Duration::from_millis(25)).await;
    let start = Instant::now();
    let next = tokio::spawn({
        let pace = pace.clone();
        async move { pace.take(Class::Foreground, 64 * KIB).await }
    });
    tokio::task::yield_now().await;
    assert_eq!(pace.waiting(), 1);
    drop(gone);
    next.await.unwrap();
    assert!((75..=77).contains(&millis(start)), "{} ms", millis(start));
}

#[tokio::test(start_paused = true)]
async fn limits_of_one_and_of_all_hold_together() {
    let (slow, fast) = (PeerId::from_bytes([1; 32]), PeerId::from_bytes([2; 32]));
    let limits = Limits::none();
    assert!(poll(&mut pin!(limits.take(slow, Class::Copy, 1 << 40))).is_some());
    limits.set(Some(4 * RATE));
    limits.set_peer(slow, Some(RATE));
    assert_eq!((limits.rate(), limits.rate_of(slow), limits.rate_of(fast)), (Some(4 * RATE), Some(RATE), None));
    let start = Instant::now();
    let take = |peer, count| {
        let limits = limits.clone();
        tokio::spawn(async move {
            for _ in 0..count {
                limits.take(peer, Class::Copy, 25 * KIB).await;
            }
            start.elapsed()
        })
    };
    // Each take is 26 KiB on the wire.
    let (slow_task, fast_task) = (take(slow, 100), take(fast, 290));
    let (slow_time, fast_time) = (slow_task.await.unwrap(), fast_task.await.unwrap());
    assert!((4050..=4150).contains(&slow_time.as_millis()), "{slow_time:?}");
    assert!((3900..=4000).contains(&fast_time.as_millis()), "{fast_time:?}");

    limits.set(None);
    let start = Instant::now();
    for _ in 0..10 {
        limits.take(slow, Class::Copy, 25 * KIB).await;
    }
    assert!((350..=410).contains(&millis(start)), "its own holds alone, {} ms", millis(start));

    let mut waiting = pin!(limits.take(slow, Class::Copy, 1 << 30));
    assert!(poll(&mut waiting).is_none());
    limits.set_peer(slow, None);
    assert!(poll(&mut waiting).is_some());
    assert_eq!(limits.rate_of(slow), None);
    assert!(poll(&mut pin!(limits.take(slow, Class::Copy, 1 << 40))).is_some());
}

#[tokio::test(start_paused = true)]
async fn who_stops_waiting_for_all_takes_nothing_of_its_own() {
    let peer = PeerId::from_bytes([1; 32]);
    let limits = Limits::none();
    limits.set_peer(peer, Some(RATE));
    advance(Duration::from_secs(1)).await;
    limits.set(Some(RATE_LEAST));
    let mut waiting = Box::pin(limits.take(peer, Class::Foreground, 50 * KIB));
    assert!(poll(&mut waiting.as_mut()).is_none(), "for that of all");
    drop(waiting);
    limits.set(None);
    assert!(poll(&mut pin!(limits.take(peer, Class::Foreground, 50 * KIB))).is_some());
    assert!(poll(&mut pin!(limits.take(peer, Class::Foreground, 50 * KIB))).is_none());
}

#[test]
fn classes_on_the_wire() {
    for (class, byte) in [(Class::Foreground, 0), (Class::Copy, 1), (Class::Background, 2)] {
        assert_eq!((class.byte(), Class::from_byte(byte)), (byte, class));
    }
    assert!((3..=255).all(|byte| Class::from_byte(byte) == Class::Background));
}
