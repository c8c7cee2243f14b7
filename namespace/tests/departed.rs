//! What departs below a pin: what is recorded of it, when it is dated, and what a mass deletion is.

mod common;

use std::ops::ControlFlow;

use namespace::{
    AT_ONCE_MS, Anchor, Anchors, Arena, Batch, Content, Departed, MassDeletion, Namespace, Place, Statement,
};
use tree::BlobId;

use crate::common::{Disk, arena, change, changes, file, listing, path, peer, says, symlink};

fn pin(namespace: &Namespace, places: &[Option<&str>]) {
    let places: Vec<_> = places.iter().map(|at| Place { arena: arena("photos"), path: at.map(path) }).collect();
    namespace.change_pins(&places, &[], 1000).unwrap();
}

fn departed(namespace: &Namespace) -> Vec<Departed> {
    let mut found = Vec::new();
    namespace
        .departed(&mut |file| {
            found.push(file);
            ControlFlow::Continue(())
        })
        .unwrap();
    found
}

/// Path, number of the deletion, and time of what departed.
fn told(namespace: &Namespace) -> Vec<(String, u64, u64)> {
    departed(namespace).into_iter().map(|file| (file.path.to_string(), file.seq, file.since)).collect()
}

fn hears(namespace: &Namespace, batch: &Batch) {
    namespace.apply(batch.origin, batch).unwrap();
}

#[test]
fn what_is_recorded() {
    let disk = Disk::default();
    let namespace = disk.open();
    pin(&namespace, &[Some("a"), Some("c")]);
    let names = ["a/1", "a/2", "a/3", "a/4", "b/1", "c"];
    let statements = names.iter().zip(1..).map(|(at, seq)| says(seq, at, file(at))).collect();
    hears(&namespace, &listing(peer(1), 7, statements));
    // One of them is this machine's, too; another one is empty.
    namespace.commit(&arena("photos"), &[change("a/1", file("a/1"))], 0, &mut |_| true).unwrap();
    namespace.commit(&arena("photos"), &[change("a/1", Content::Deleted)], 0, &mut |_| true).unwrap();
    assert!(told(&namespace).is_empty());
    hears(
        &namespace,
        &changes(
            peer(1),
            7,
            6,
            12,
            vec![
                says(7, "a/1", Content::Deleted),
                says(8, "a/2", file("another")),
                says(9, "a/3", symlink("elsewhere")),
                says(10, "a/4", Content::Withdrawn),
                says(11, "b/1", Content::Deleted),
                says(12, "a/5", file("")),
            ],
        ),
    );
    assert_eq!(told(&namespace), [("a/1".into(), 7, 0), ("a/3".into(), 9, 0), ("a/4".into(), 10, 0)]);
    let first = &departed(&namespace)[0];
    assert_eq!((first.blob, first.size, first.origin), (BlobId::of(b"a/1"), 3, peer(1)));
    let bounds = ([0; 32], [0xff; 32]);
    let known = namespace.blobs_between(&bounds.0, &bounds.1, 100).unwrap();
    assert!(known.contains(&(BlobId::of(b"a/1"), 3)), "{known:?}");
    let exactly = *BlobId::of(b"a/4").as_bytes();
    assert_eq!(namespace.blobs_between(&exactly, &exactly, 2).unwrap(), [(BlobId::of(b"a/4"), 3)]);
    // A listing that no longer has a file, and a farewell.
    hears(&namespace, &listing(peer(1), 8, vec![says(1, "a/5", file(""))]));
    assert_eq!(told(&namespace).last(), Some(&("c".into(), 0, 0)));
    assert_eq!(told(&namespace).len(), 5);
    hears(&namespace, &listing(peer(2), 7, vec![says(1, "a/6", file("six"))]));
    namespace.forget_peer(peer(2)).unwrap();
    assert_eq!(told(&namespace)[4], ("a/6".into(), 0, 0));

    namespace.date_departed(5000).unwrap();
    assert!(told(&namespace).iter().all(|(.., since)| *since == 5000));
    drop(namespace);
    let namespace = disk.open();
    // The clock was ahead then; and what has a date keeps it.
    namespace.date_departed(4000).unwrap();
    namespace.date_departed(6000).unwrap();
    assert!(told(&namespace).iter().all(|(.., since)| *since == 4000));
    namespace.forget_departed(&departed(&namespace)[..1]).unwrap();
    let accepted = Place { arena: arena("photos"), path: Some(path("a")) };
    assert_eq!(namespace.accept_departed(&[accepted]).unwrap(), (4, 3 + 3 + 7 + 3));
    assert_eq!(told(&namespace), [("c".into(), 0, 4000)]);
}

/// That `peer(1)` had `before` files, all pinned, publishes `new` ones and deletes `gone`, in one batch.
fn after(before: usize, gone: usize, new: usize) -> (Namespace, Vec<MassDeletion>) {
    let namespace = Disk::default().open();
    pin(&namespace, &[None]);
    let name = |number: usize| format!("{number:04}");
    let statements = (0..before).zip(1..).map(|(number, seq)| says(seq, &name(number), file(&name(number))));
    hears(&namespace, &listing(peer(1), 7, statements.collect()));
    let at = 100 * AT_ONCE_MS;
    let news = (0..new).map(|number| (format!("new-{number:04}"), file("new")));
    let news = news.chain((0..gone).map(|number| (name(number), Content::Deleted)));
    let statements: Vec<Statement> = news
        .zip(before as u64 + 1..)
        .map(|((at_path, content), seq)| Statement { at, ..says(seq, &at_path, content) })
        .collect();
    let end = (before + new + gone) as u64;
    hears(&namespace, &changes(peer(1), 7, before as u64, end, statements));
    namespace.date_departed(AT_ONCE_MS).unwrap();
    let masses = namespace.mass_deletions().unwrap();
    (namespace, masses)
}

#[test]
fn which_deletions_are_mass_deletions() {
    for (before, gone, new, is_mass) in [
        (201, 101, 0, true),
        (202, 101, 0, false),
        (100, 100, 0, false),
        (101, 101, 0, true),
        // What is written in their place makes up for nothing.
        (150, 120, 120, true),
        (1000, 400, 0, false),
    ] {
        let (_, masses) = after(before, gone, new);
        let expected = MassDeletion {
            arena: arena("photos"),
            origin: peer(1),
            since: AT_ONCE_MS,
            files: gone as u64,
            of: before as u64,
        };
        let expected: Vec<_> = is_mass.then_some(expected).into_iter().collect();
        assert_eq!(masses, expected, "{gone} of {before}, {new} new ones");
    }
}

#[test]
fn a_mass_deletion_that_goes_on_is_one() {
    let (namespace, masses) = after(250, 130, 0);
    assert_eq!((masses[0].files, masses[0].of), (130, 250));
    let more = |from: u64, count: u64| {
        let gone = (from..from + count).map(|seq| says(seq, &format!("{:04}", seq - 251), Content::Deleted)).collect();
        changes(peer(1), 7, from - 1, from + count - 1, gone)
    };
    hears(&namespace, &more(381, 20));
    namespace.date_departed(AT_ONCE_MS + 60_000).unwrap();
    let masses = namespace.mass_deletions().unwrap();
    assert_eq!((masses.len(), masses[0].files, masses[0].of, masses[0].since), (1, 150, 250, AT_ONCE_MS));
    // Much later, it is another one; this one is none.
    hears(&namespace, &more(401, 20));
    namespace.date_departed(5 * AT_ONCE_MS).unwrap();
    assert_eq!(namespace.mass_deletions().unwrap(), masses);
    let place = |at: Option<&str>| Place { arena: arena("photos"), path: at.map(path) };
    namespace.accept_departed(&[place(Some("0001"))]).unwrap();
    assert_eq!(namespace.mass_deletions().unwrap(), masses);
    assert_eq!(namespace.accept_departed(&[place(None)]).unwrap().0, 169);
    assert!(namespace.mass_deletions().unwrap().is_empty());
    let (namespace, _) = after(250, 130, 0);
    namespace.forget_mass_deletions(AT_ONCE_MS).unwrap();
    assert_eq!(namespace.mass_deletions().unwrap().len(), 1);
    namespace.forget_mass_deletions(AT_ONCE_MS + 1).unwrap();
    assert!(namespace.mass_deletions().unwrap().is_empty());
}

#[test]
fn anchors_belong_to_their_arena() {
    let disk = Disk::default();
    let namespace = disk.open();
    let anchor = |file_system| Anchor { file_system, within: b"/docs".to_vec(), inode: 2 };
    let anchors: Anchors = [(None, anchor(1)), (Some(path("usb")), anchor(2))].into();
    namespace.set_anchors(&arena("a"), &anchors).unwrap();
    assert!(namespace.anchors(&arena("a")).unwrap().is_empty(), "it is not held");
    for name in ["a", "a-b", "b"] {
        let held = Arena { name: arena(name), dir: Some("/a".into()), public: false, root: None };
        namespace.set_arena(&held).unwrap();
        namespace.set_anchors(&held.name, &anchors).unwrap();
    }
    namespace.set_anchors(&arena("b"), &[(None, anchor(3))].into()).unwrap();
    namespace.remove_arena(&arena("a-b"), 0).unwrap();
    drop(namespace);
    let namespace = disk.open();
    let found = ["a", "a-b", "b"].map(|name| namespace.anchors(&arena(name)).unwrap());
    assert_eq!(found, [anchors, Anchors::new(), [(None, anchor(3))].into()]);
}

/// The bytes of the rows, as they stand in databases.
#[test]
fn rows_are_what_they_were() {
    let anchor = Anchor { file_system: 0x0123_4567_89ab_cdef, within: b"/d".to_vec(), inode: 300 };
    let bytes = postcard::to_stdvec(&anchor).unwrap();
    assert_eq!(data_encoding::HEXLOWER.encode(&bytes), "ef9bafcdf8acd19101022f64ac02");
}
