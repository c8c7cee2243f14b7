//! A database made anew claims what proves, and nothing else.

use std::{fs, fs::File, os::unix::fs::FileExt};

use blobstore::Presence;
use redb::TableDefinition;
use tree::{BlobId, RangeSet};

use crate::{
    common::{GROUP, all, check_read, groups, random, range},
    home::Home,
};

const SIZE: usize = 20 * GROUP as usize + 3;

#[test]
fn what_the_cache_proves_is_taken_over() {
    for old_is_there in [false, true] {
        let home = Home::new();
        let [whole, partial, bare, rotten, false_name] = [1, 2, 3, 4, 5].map(|seed| random(seed, SIZE));
        let small = random(6, 500);
        [&whole, &bare, &rotten, &small].into_iter().for_each(|bytes| home.cache_all(bytes));
        home.cache(&partial, &groups(SIZE, [0, 3]));
        // One without its outboard, one whose bytes rotted, and one whose bytes are not what its name says.
        fs::remove_file(home.own_file("cache", BlobId::of(&bare), "obao4")).unwrap();
        let data = File::options().write(true).open(home.own_file("cache", BlobId::of(&rotten), "data")).unwrap();
        data.write_all_at(&[rotten[2 * GROUP as usize] ^ 1], 2 * GROUP).unwrap();
        let lie = home.own_file("cache", BlobId::of(&false_name), "data");
        fs::create_dir_all(lie.parent().unwrap()).unwrap();
        fs::write(lie, random(7, SIZE)).unwrap();

        let (home, rebuilt) = home.rebuild(old_is_there);
        let here = |bytes: &Vec<u8>| home.store.cached_ranges(BlobId::of(bytes)).unwrap();
        assert_eq!(here(&whole), all(SIZE));
        assert_eq!(here(&partial), groups(SIZE, [0, 3]));
        assert_eq!(here(&bare), all(SIZE));
        assert_eq!(here(&rotten), all(SIZE).difference(&groups(SIZE, [2])));
        assert_eq!(here(&false_name), RangeSet::new());
        let small_is = home.store.presence(BlobId::of(&small)).unwrap();
        assert_eq!(small_is, if old_is_there { Presence::Cached } else { Presence::None });
        assert_eq!(rebuilt.blobs, 4 + u64::from(old_is_there));
        for bytes in [&whole, &bare] {
            check_read(&home.store, bytes, range(0, SIZE as u64), &RangeSet::new());
        }
    }
}

#[test]
fn files_are_remembered_as_vanished_and_claimed_by_nothing() {
    let home = Home::new();
    let bytes = random(1, SIZE);
    home.put("dir/file", &bytes);
    let row = home.row("dir/file");
    let (home, rebuilt) = home.rebuild(true);
    assert_eq!(rebuilt.remembered, 1);
    assert_eq!(home.store.file(&home.file("dir/file")).unwrap(), None);
    assert_eq!(home.store.presence(BlobId::of(&bytes)).unwrap(), Presence::None);
    assert_eq!(home.store.vanished(home.root, &[b"dir/file"]).unwrap(), [Some(row)]);
}

/// Rows of another format would be misread.
#[test]
fn nothing_is_taken_from_rows_of_another_format() {
    let home = Home::new();
    home.put("dir/file", &random(1, SIZE));
    home.cache_all(&random(2, 500));
    let (home, rebuilt) = home.rebuild_after(true, |db| {
        let txn = db.begin_write().unwrap();
        txn.open_table(TableDefinition::<&str, u32>::new("store.meta")).unwrap().insert("format", 2).unwrap();
        txn.commit().unwrap();
    });
    assert_eq!((rebuilt.remembered, rebuilt.blobs), (0, 0));
    assert_eq!(home.store.presence(BlobId::of(&random(2, 500))).unwrap(), Presence::None);
}
