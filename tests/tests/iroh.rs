//! A stock iroh-blobs client and blobd: where the user has turned it on, anyone who knows a blob id may read blobs of
//! public arenas, proven, whole or in part; nothing else, and by default nothing at all.

use std::{collections::BTreeMap, fs, path::Path, time::Duration};

use bytes::Bytes;
use iroh::{Endpoint, EndpointAddr, EndpointId, RelayMode, endpoint::presets};
use iroh_blobs::{
    ALPN, Hash,
    get::{
        fsm,
        request::{get_blob, get_verified_size},
    },
    protocol::{ChunkRanges, ChunkRangesExt, GetRequest},
};
use tests::{BIG_BYTES, Machine, Scratch, random_bytes};
use tokio::{runtime::Runtime, time::timeout};

const SERVE: &str = "[serve]\niroh = true\n";

#[test]
fn public_blobs_are_served_to_a_stock_client() {
    let scratch = Scratch::new();
    let sizes = [0, 1, 16384, 16385, 300_000, BIG_BYTES];
    let files = make(&scratch, "open", &sizes);
    let secret = make(&scratch, "closed", &[50_000]);
    let a = Machine::up_with_config(&scratch, "a", &[scratch.path("closed")], SERVE);
    a.ok([Path::new("arena"), "add".as_ref(), "open".as_ref(), &scratch.path("open"), "--public".as_ref()]);
    runtime().block_on(async {
        let endpoint = client().await;
        let connection = connect(&endpoint, &a).await.expect("it is served");
        for size in sizes {
            let data = &files[&size];
            let got = timeout(LIMIT, get_blob(connection.clone(), hash(data)).bytes()).await.expect("in time");
            assert!(got.expect("it is served") == data[..], "{size} bytes");
        }
        // Chunks 5 to 9, 4,000 to 4,001 and the last two of the big file.
        let ranges =
            ChunkRanges::chunks(5..10) | ChunkRanges::chunks(4000..4002) | ChunkRanges::chunks(BIG_BYTES / 1024 - 1..);
        let big = &files[&BIG_BYTES];
        let pieces = get_ranges(connection.clone(), hash(big), ranges).await.expect("it is served");
        let mut got = 0;
        for (offset, piece) in pieces {
            assert!(big[offset as usize..][..piece.len()] == piece[..], "at {offset}");
            got += piece.len();
        }
        assert!((8 * 1024 - 1023..=3 * 16384 + 16384).contains(&got), "{got} bytes");

        // Not those of an arena that is not public, nor what is not there.
        for hash in [hash(&secret[&50_000]), Hash::from_bytes([7; 32])] {
            let refused = timeout(LIMIT, get_blob(connection.clone(), hash).bytes()).await.expect("in time");
            assert!(refused.is_err(), "{hash}: {} bytes", refused.map_or(0, |bytes| bytes.len()));
        }
        // The same connection still serves.
        assert!(get_blob(connection, hash(&files[&1])).bytes().await.expect("it is served") == files[&1]);
        endpoint.close().await;
    });
    a.ok(["verify"]);
}

/// To learn a blob's size, iroh-blobs asks for the last of all chunks that there can be.
#[test]
fn the_last_chunk_proves_the_size() {
    let scratch = Scratch::new();
    let sizes = [0, 1, 16384, 16385, 300_000];
    let files = make(&scratch, "open", &sizes);
    let a = Machine::up_with_config(&scratch, "a", &[scratch.path("none")], SERVE);
    a.ok([Path::new("arena"), "add".as_ref(), "open".as_ref(), &scratch.path("open"), "--public".as_ref()]);
    runtime().block_on(async {
        let endpoint = client().await;
        let connection = connect(&endpoint, &a).await.expect("it is served");
        for size in sizes {
            let hash = hash(&files[&size]);
            let said = timeout(LIMIT, get_verified_size(&connection, &hash)).await.expect("in time");
            assert_eq!(said.map(|(size, _)| size).map_err(|error| error.to_string()), Ok(size));
        }
        let ranges = ChunkRanges::chunks(3..4) | ChunkRanges::last_chunk();
        let pieces = get_ranges(connection, hash(&files[&300_000]), ranges).await.expect("it is served");
        assert!(pieces.iter().any(|(offset, piece)| offset + piece.len() as u64 == 300_000), "the last chunk came");
        endpoint.close().await;
    });
}

/// A blob that is in a public arena and in another one is public; when it leaves the public one, it is not.
#[test]
fn what_is_public_follows_the_arenas() {
    let scratch = Scratch::new();
    let files = make(&scratch, "open", &[40_000]);
    fs::create_dir(scratch.path("closed")).unwrap();
    fs::copy(scratch.path("open/40000"), scratch.path("closed/copy")).unwrap();
    fs::write(scratch.path("open/other"), "so that it is not empty").unwrap();
    let a = Machine::up_with_config(&scratch, "a", &[scratch.path("closed")], SERVE);
    let data = &files[&40_000];
    let runtime = runtime();
    let gets = || {
        runtime.block_on(async {
            let endpoint = client().await;
            let connection = connect(&endpoint, &a).await.expect("it is served");
            let got = timeout(LIMIT, get_blob(connection, hash(data)).bytes()).await.expect("in time");
            endpoint.close().await;
            got.is_ok_and(|bytes| bytes == data[..])
        })
    };
    assert!(!gets(), "no arena is public");
    a.ok([Path::new("arena"), "add".as_ref(), "open".as_ref(), &scratch.path("open"), "--public".as_ref()]);
    assert!(gets());
    fs::remove_file(scratch.path("open/40000")).unwrap();
    a.ok(["arena", "scan", "open"]);
    assert!(!gets(), "it is in the other arena only");
}

/// Damage is not served to strangers either.
#[test]
fn damage_is_not_served_to_strangers() {
    let Some(scratch) = Scratch::that_rots() else { return };
    let files = make(&scratch, "open", &[300_000]);
    let a = Machine::up_with_config(&scratch, "a", &[scratch.path("none")], SERVE);
    a.ok([Path::new("arena"), "add".as_ref(), "open".as_ref(), &scratch.path("open"), "--public".as_ref()]);
    scratch.rot(&scratch.path("open/300000"), &[100_000]);
    runtime().block_on(async {
        let endpoint = client().await;
        let connection = connect(&endpoint, &a).await.expect("it is served");
        let data = &files[&300_000];
        for _ in 0..2 {
            let got = timeout(LIMIT, get_blob(connection.clone(), hash(data)).bytes()).await.expect("in time");
            assert!(got.is_err());
        }
        let pieces = get_ranges(connection, hash(data), ChunkRanges::bytes(0..98_304)).await.expect("it is sound");
        assert_eq!(pieces.values().map(Bytes::len).sum::<usize>(), 98_304);
        endpoint.close().await;
    });
}

#[test]
fn by_default_nothing_is_served() {
    let scratch = Scratch::new();
    make(&scratch, "open", &[1000]);
    let a = Machine::up::<&Path>(&scratch, "a", &[]);
    a.ok([Path::new("arena"), "add".as_ref(), "open".as_ref(), &scratch.path("open"), "--public".as_ref()]);
    runtime().block_on(async {
        let endpoint = client().await;
        assert!(connect(&endpoint, &a).await.is_err());
        endpoint.close().await;
    });
}

/// Files of these sizes, named by them.
fn make(scratch: &Scratch, arena: &str, sizes: &[u64]) -> BTreeMap<u64, Vec<u8>> {
    let root = scratch.dir(arena);
    scratch.dir("none");
    let files: BTreeMap<_, _> =
        sizes.iter().map(|&size| (size, random_bytes(size, &mut fastrand::Rng::new()))).collect();
    for (size, data) in &files {
        fs::write(root.join(size.to_string()), data).unwrap();
    }
    files
}

fn runtime() -> Runtime {
    Runtime::new().unwrap()
}

async fn client() -> Endpoint {
    let builder = Endpoint::builder(presets::Minimal).relay_mode(RelayMode::Disabled).clear_address_lookup();
    builder.bind().await.expect("bind")
}

async fn connect(endpoint: &Endpoint, to: &Machine) -> Result<iroh::endpoint::Connection, String> {
    let id: EndpointId = to.id().parse().expect("a public key");
    let address = EndpointAddr::new(id).with_ip_addr(to.address().parse().unwrap());
    let connecting = timeout(LIMIT, endpoint.connect(address, ALPN)).await.map_err(|error| error.to_string())?;
    connecting.map_err(|error| error.to_string())
}

/// The bytes of some chunks, each piece by its offset.
async fn get_ranges(
    connection: iroh::endpoint::Connection,
    hash: Hash,
    ranges: ChunkRanges,
) -> Result<BTreeMap<u64, Bytes>, String> {
    let start = fsm::start(connection, GetRequest::blob_ranges(hash, ranges), Default::default());
    let connected = start.next().await.map_err(|error| error.to_string())?;
    let fsm::ConnectedNext::StartRoot(root) = connected.next().await.map_err(|error| error.to_string())? else {
        return Err("no blob is asked for".into());
    };
    let (mut content, _size) = root.next().next().await.map_err(|error| error.to_string())?;
    let mut pieces = BTreeMap::new();
    loop {
        match content.next().await {
            fsm::BlobContentNext::More((next, item)) => {
                if let bao_tree::io::BaoContentItem::Leaf(leaf) = item.map_err(|error| error.to_string())? {
                    pieces.insert(leaf.offset, leaf.data);
                }
                content = next;
            }
            fsm::BlobContentNext::Done(_) => return Ok(pieces),
        }
    }
}

fn hash(data: &[u8]) -> Hash {
    Hash::from_bytes(*blake3::hash(data).as_bytes())
}

const LIMIT: Duration = Duration::from_secs(20);
