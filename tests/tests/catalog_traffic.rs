//! What telling catalogs costs: who has heard all is told nothing, who was away only what changed; and whoever does not
//! read what it asked for takes no memory and is in nobody's way.

use std::{fs, path::Path, time::Duration};

use namespace::{Batch, Cursor, Mark, Part, PeerId};
use peers::{
    Identity,
    wire::{Ask, StreamKind, Telling, read_frame, write_frame},
};
use quinn::{Connection, RecvStream, SendStream};
use tests::{Machine, QUICK, Scratch, introduced, random_bytes};
use tokio::{runtime::Runtime, time::timeout};

const FILES: usize = 20_000;

#[test]
fn catalogs_cost_what_changed() {
    let scratch = Scratch::new();
    let root = scratch.dir("docs");
    for number in 0..FILES {
        fs::write(root.join(format!("file number {number}")), "").unwrap();
    }
    let a = Machine::up_with_config(&scratch, "a", &[&root], QUICK);
    let me = Identity::ephemeral().unwrap();
    a.ok(["peer", "add", "caller", &me.peer().to_string()]);
    let (id, address): (PeerId, _) = (a.id().parse().unwrap(), a.address());
    let runtime = Runtime::new().unwrap();
    let reconnect = |cursor: Cursor| {
        runtime.block_on(async {
            let connection = introduced(&me, &a, &address).await;
            let (_send, mut recv) = ask(&connection, vec![(id, cursor.clone())]).await;
            let heard = hear(&mut recv, id, cursor).await;
            let udp = connection.stats();
            (heard, udp.udp_rx.bytes + udp.udp_tx.bytes)
        })
    };
    let (first, all) = reconnect(Cursor::default());
    assert_eq!((first.rows, first.cursor.mark.seq), (FILES, a.status()["seq"].as_u64().unwrap()));
    let (idle, idle_bytes) = reconnect(first.cursor.clone());
    assert_eq!((idle.rows, idle.bytes), (0, 0));
    assert!(idle_bytes < 40 << 10, "{idle_bytes} bytes with nothing to tell");
    for number in 0..10 {
        fs::write(root.join(format!("file number {number}")), "edited").unwrap();
    }
    a.ok(["arena", "scan"]);
    let (ten, ten_bytes) = reconnect(idle.cursor);
    assert_eq!(ten.rows, 10);
    assert!(ten.bytes < 4 << 10, "{} bytes for ten changes", ten.bytes);
    assert!(ten_bytes < idle_bytes + (10 << 10), "{ten_bytes} bytes, {idle_bytes} without changes");
    println!("all: {} of {all} bytes; nothing: {idle_bytes}; ten: {} of {ten_bytes}", first.bytes, ten.bytes);
}

/// A peer asks for all there is on as many streams as it may open, and reads none of them.
#[test]
fn who_asks_and_does_not_read_is_in_nobodys_way() {
    let scratch = Scratch::new();
    let root = scratch.dir("docs");
    let long = "n".repeat(200);
    // As many bytes of catalog as 100,000 files with short names have.
    for dir in 0..20 {
        let dir = root.join(format!("{dir} {long}/{long}/{long}/{long}"));
        fs::create_dir_all(&dir).unwrap();
        for number in 0..500 {
            fs::write(dir.join(format!("{number} {long}")), "").unwrap();
        }
    }
    let data = random_bytes(100_000, &mut fastrand::Rng::with_seed(5));
    fs::write(root.join("file"), &data).unwrap();
    let a = Machine::up_with_config(&scratch, "a", &[&root], QUICK);
    let b = Machine::quick::<&Path>(&scratch, "b", &[]);
    let me = Identity::ephemeral().unwrap();
    a.ok(["peer", "add", "caller", &me.peer().to_string()]);
    let (id, address): (PeerId, _) = (a.id().parse().unwrap(), a.address());
    let runtime = Runtime::new().unwrap();
    let before = a.resident_bytes();
    runtime.block_on(async {
        let connection = introduced(&me, &a, &address).await;
        // Each question ends the answer to the one before.
        let mut unread = Vec::new();
        for _ in 0..200 {
            unread.push(ask(&connection, vec![]).await);
        }
        let grown = a.resident_bytes().saturating_sub(before);
        println!("{} streams that nobody reads: {} MiB more", unread.len(), grown >> 20);
        assert!(grown < 60 << 20, "{grown} bytes more");
        let (_, mut first) = unread.swap_remove(0);
        let end = async { while read_frame::<Telling>(&mut first, 1 << 20).await.is_ok() {} };
        timeout(Duration::from_secs(20), end).await.expect("the first answer ended");
        // Others are served meanwhile.
        b.join(&a);
        assert_eq!(b.ok(["ls", "-R", "--json", "docs"]).json().len(), 20 * 504 + 1);
        assert!(b.ok(["cat", "docs/file"]).stdout == data);
        fs::write(root.join("file"), "edited").unwrap();
        b.shows("docs/file", b"edited");
        // And so is who reads at last.
        drop(unread);
        let (_send, mut recv) = ask(&connection, vec![]).await;
        let heard = hear(&mut recv, id, Cursor::default()).await;
        assert!(heard.rows > 20 * 504, "{} rows", heard.rows);
    });
    assert!(a.is_running() && !a.log().contains("panicked"));
}

async fn ask(connection: &Connection, cursors: Vec<(PeerId, Cursor)>) -> (SendStream, RecvStream) {
    let (mut send, recv) = connection.open_bi().await.unwrap();
    send.write_all(&[StreamKind::Catalog as u8]).await.unwrap();
    write_frame(&mut send, &Ask { cursors, direct: vec![], rumour: Mark::default() }).await.unwrap();
    (send, recv)
}

#[derive(Default)]
struct Heard {
    rows: usize,
    /// Of frames, on the stream.
    bytes: usize,
    cursor: Cursor,
}

/// Hears what is said of `origin`, until nothing more is said for a while.
async fn hear(recv: &mut RecvStream, origin: PeerId, cursor: Cursor) -> Heard {
    let mut heard = Heard { cursor, ..Heard::default() };
    while let Ok(telling) = timeout(Duration::from_secs(2), read_frame::<Telling>(recv, 1 << 20)).await {
        let Telling { batch, .. } = telling.unwrap();
        if batch.origin != origin {
            continue;
        }
        heard.rows += batch.statements.len();
        heard.bytes += 4 + encoded_bytes(&batch);
        let after = match &batch.part {
            Part::Listing { end, .. } => end.clone(),
            Part::Changes { .. } => None,
        };
        heard.cursor = Cursor { mark: batch.mark, after };
    }
    heard
}

/// How long a batch is on the wire.
fn encoded_bytes(batch: &Batch) -> usize {
    postcard::to_stdvec(batch).unwrap().len()
}
