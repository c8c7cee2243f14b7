//! Blobs of which something alike is here, and lists of chunks.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    time::{Duration, Instant},
};

use blobstore::{Candidate, Sink, Store, in_the_same_place};
use tree::{BlobId, Hashed, RangeSet, Span};

use crate::{
    common::{GROUP, LARGE, all, check_read, groups, hashed, random, range},
    home::Home,
};

/// What `new` would be with the bytes that `olds` have in the same places.
fn candidate(store: &Store, new: &[u8], olds: &[&[u8]]) -> Candidate {
    let sources = olds.iter().map(|old| store.sources(BlobId::of(old)).unwrap().remove(0)).collect::<Vec<_>>();
    let spans: Vec<_> = sources.iter().enumerate().flat_map(|(n, s)| in_the_same_place(n, s.available())).collect();
    store.candidate(BlobId::of(new), new.len() as u64, spans, sources).unwrap()
}

/// Compares it with `new`, so many nodes at a time. Returns how many were asked for.
fn compare(candidate: &mut Candidate, new: &Hashed, at_a_time: usize) -> usize {
    let mut asked = 0;
    loop {
        let nodes = candidate.wanted(at_a_time);
        if nodes.is_empty() {
            return asked;
        }
        asked += nodes.len();
        let pairs: Vec<_> =
            nodes.iter().map(|&node| new.outboard[node as usize * 64..][..64].try_into().unwrap()).collect();
        let mut wrong: Vec<[u8; 64]> = pairs.clone();
        wrong[0][3] ^= 1;
        assert!(candidate.descend(&wrong).unwrap().is_err());
        candidate.descend(&pairs).unwrap().unwrap();
    }
}

fn copy(store: &Store, candidate: &Candidate, new: &[u8]) -> RangeSet {
    let mut partial = store.partial(BlobId::of(new), new.len() as u64).unwrap();
    let copied = candidate.copy(&mut partial).unwrap();
    assert_eq!(copied, store.cached_ranges(BlobId::of(new)).unwrap(), "it is committed");
    copied
}

#[test]
fn what_an_edited_file_has_of_another_is_copied() {
    for at_a_time in [1, 7, 1000] {
        let (home, old) = (Home::new(), random(1, LARGE));
        home.put("old", &old);
        let mut new = [&old[..], &random(2, 100_000)].concat();
        let edited = groups(new.len(), [0, 33, 35]);
        edited.iter().for_each(|range| new[range.start() as usize + 9] ^= 1);
        let mut candidate = candidate(&home.store, &new, &[&old]);
        let whole = candidate.groups().clone();
        assert_eq!(whole, all(LARGE / GROUP as usize * GROUP as usize));
        assert!(candidate.equal().is_empty());
        let tree = hashed(&new);
        let asked = compare(&mut candidate, &tree, at_a_time);
        assert!(asked < 40, "{asked} nodes for 3 groups, and the end");
        let equal = whole.difference(&edited);
        assert_eq!(candidate.equal(), equal);
        assert_eq!(copy(&home.store, &candidate, &new), equal);
        check_read(&home.store, &new, range(0, new.len() as u64), &all(new.len()).difference(&equal));
        // What it needed is gone with it.
        assert_eq!(home.own_files("outboards/staged").len(), 1);
        drop(candidate);
        assert!(home.own_files("outboards/staged").is_empty());
    }
}

#[test]
fn what_changes_meanwhile_is_not_copied() {
    let (home, old) = (Home::new(), random(3, LARGE));
    home.put("old", &old);
    let mut new = old.clone();
    new[LARGE - 1] ^= 1;
    let mut candidate = candidate(&home.store, &new, &[&old]);
    compare(&mut candidate, &hashed(&new), 100);
    let rot = groups(LARGE, [5, 99]);
    home.rot("old", &rot);
    let last = groups(LARGE, [LARGE as u64 / GROUP]);
    let equal = all(LARGE).difference(&last).difference(&rot);
    assert_eq!(copy(&home.store, &candidate, &new), equal);
    check_read(&home.store, &new, range(0, LARGE as u64), &rot.union(&last));
}

/// Nodes stop coming at any time: only what is known to be equal by then is copied.
#[test]
fn a_comparison_that_ends_early_gives_what_it_has() {
    let (home, old) = (Home::new(), random(4, 64 * GROUP as usize));
    home.put("old", &old);
    let mut new = old.clone();
    new[17] ^= 1;
    let tree = hashed(&new);
    let mut expected = [0, 32, 48, 56, 60, 62, 63].into_iter();
    for rounds in 0..=6 {
        let mut candidate = candidate(&home.store, &new, &[&old]);
        for _ in 0..rounds {
            let nodes = candidate.wanted(1);
            let pair = tree.outboard[nodes[0] as usize * 64..][..64].try_into().unwrap();
            candidate.descend(&[pair]).unwrap().unwrap();
        }
        assert_eq!(candidate.equal().total_bytes() / GROUP, expected.next().unwrap());
        copy(&home.store, &candidate, &new);
        assert!(candidate.descend(&[]).unwrap().is_ok());
    }
}

/// From the cache, and from a file, to other places.
#[test]
fn bytes_of_several_blobs_that_moved_make_another() {
    let home = Home::new();
    let (a, b) = (random(5, LARGE), random(6, LARGE));
    home.put("a", &a);
    home.cache_all(&b);
    let new = [&b[1_000_000..2_000_000], &a[7..3_000_000], &[9; 5], &b[..1_000_000]].concat();
    let spans = [
        Span { at: 0, len: 1_000_000, source: 1, from: 1_000_000 },
        Span { at: 1_000_000, len: 2_999_993, source: 0, from: 7 },
        Span { at: 3_999_998, len: 1_000_000, source: 1, from: 0 },
    ];
    let sources = [&a, &b].map(|old| home.store.sources(BlobId::of(old)).unwrap().remove(0)).into();
    let mut candidate = home.store.candidate(BlobId::of(&new), new.len() as u64, spans, sources).unwrap();
    compare(&mut candidate, &hashed(&new), 100);
    let hole = groups(new.len(), [3_999_993 / GROUP]);
    assert_eq!(copy(&home.store, &candidate, &new), all(new.len()).difference(&hole));
    check_read(&home.store, &new, range(0, new.len() as u64), &hole);
}

#[test]
fn what_a_file_has_of_the_same_blob_is_copied() {
    let (home, bytes) = (Home::new(), random(7, LARGE));
    let (blob, size) = (BlobId::of(&bytes), LARGE as u64);
    home.put("a", &bytes);
    home.put("b", &bytes);
    let (rot_a, rot_b) = (groups(LARGE, [1, 2, 50]), groups(LARGE, [2, 60]));
    home.rot("a", &rot_a);
    home.rot("b", &rot_b);
    let mut partial = home.store.partial(blob, size).unwrap();
    let wanted = groups(LARGE, 0..70);
    let copied = home.store.copy_from_places(blob, size, &wanted, &mut partial).unwrap();
    assert_eq!(copied, wanted.difference(&groups(LARGE, [2])));
    assert_eq!(home.store.cached_ranges(blob).unwrap(), copied);
    assert_eq!((home.damaged("a"), home.damaged("b")), (rot_a, groups(LARGE, [2])), "what was met is known");
    let again = home.store.copy_from_places(blob, size + 1, &wanted, &mut partial).unwrap();
    assert!(again.is_empty(), "of another size");
    partial.commit().unwrap();
}

#[test]
fn lists_are_kept_and_dropped_when_damaged() {
    let home = Home::new();
    let (a, b) = (BlobId::of(b"a"), BlobId::of(b"b"));
    assert_eq!(home.store.kept_list(a), None);
    home.store.keep_list(a, b"a longer list of a").unwrap();
    home.store.keep_list(a, b"the list of a").unwrap();
    home.store.keep_list(b, b"").unwrap();
    let home = home.reopen();
    assert_eq!(home.store.kept_list(a).unwrap(), b"the list of a");
    assert_eq!(home.store.kept_list(b).unwrap(), b"");
    let files = home.own_files("cache/chunks");
    let of = |blob: BlobId| files.iter().find(|path| path.to_string_lossy().contains(&blob.to_string())).unwrap();
    let bytes = fs::read(of(a)).unwrap();
    for damaged in
        [&bytes[..bytes.len() - 1], &bytes[..31], &[], &[&bytes[..], &[0]].concat(), &[&[1], &bytes[1..]].concat()]
    {
        fs::write(of(a), damaged).unwrap();
        assert_eq!(home.store.kept_list(a), None);
        assert!(!of(a).exists(), "it is dropped");
    }
    // Under another name it is the list of nothing.
    fs::write(of(b), &bytes).unwrap();
    assert_eq!(home.store.kept_list(b), None);
}

#[test]
fn lists_that_were_used_longest_ago_make_room() {
    let home = Home::new();
    let blobs: Vec<_> = (0..5u8).map(|n| BlobId::of(&[n])).collect();
    let list = vec![7; 14 << 20];
    blobs[..4].iter().for_each(|&blob| home.store.keep_list(blob, &list).unwrap());
    let used = |blob: BlobId| {
        let path = home.own_files("cache/chunks").into_iter().find(|p| p.to_string_lossy().contains(&blob.to_string()));
        let meta = fs::metadata(path.unwrap()).unwrap();
        (meta.ctime(), meta.ctime_nsec())
    };
    // The file system's clock may stand still for a moment.
    let began = Instant::now();
    while used(blobs[0]) <= used(blobs[3]) {
        assert!(home.store.kept_list(blobs[0]).is_some() && began.elapsed() < Duration::from_secs(10));
    }
    home.store.keep_list(blobs[4], &list).unwrap();
    let here: Vec<_> = blobs.iter().map(|&blob| home.store.kept_list(blob).is_some()).collect();
    assert_eq!(here.iter().filter(|&&here| here).count(), 4);
    assert!(here[0] && here[4], "{here:?}");
    home.store.keep_list(BlobId::of(b"long"), &vec![7; 17 << 20]).unwrap();
    assert_eq!(home.own_files("cache/chunks").len(), 4, "too long a list is not kept");
}
