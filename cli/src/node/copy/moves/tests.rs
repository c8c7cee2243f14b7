use peers::Lost;

use super::*;

const LATER: Duration = SILENCE_LIMIT;

fn tree(path: Option<&str>) -> Tree {
    Tree { arena: "t".parse().unwrap(), path: path.map(|path| path.try_into().unwrap()) }
}

fn spot(path: &str) -> Spot {
    ("t".parse().unwrap(), path.try_into().unwrap())
}

fn id(number: u64) -> MoveId {
    MoveId { director: PeerId::from_bytes([1; 32]), number }
}

fn kept(number: u64, path: Option<&str>) -> Kept {
    Kept { id: id(number), tree: tree(path), source: PeerId::from_bytes([2; 32]), source_arena: "t".parse().unwrap() }
}

#[test]
fn what_leaves_is_not_kept_and_what_is_kept_does_not_leave() {
    // Of two trees, whether one is in the other.
    for (one, other, meet) in [
        (None, None, true),
        (None, Some("a"), true),
        (Some("a"), Some("a/b"), true),
        (Some("a"), Some("a"), true),
        (Some("a"), Some("ab"), false),
        (Some("a/b"), Some("a/c"), false),
    ] {
        for (one, other) in [(one, other), (other, one)] {
            let mut moves = Moves::default();
            moves.leave(id(1), &tree(one), Duration::ZERO).unwrap();
            assert_eq!(moves.keep(&kept(2, other)).is_err(), meet, "{one:?} {other:?}");
            let mut moves = Moves::new(vec![kept(1, one)]);
            assert_eq!(moves.leave(id(2), &tree(other), Duration::ZERO).is_err(), meet, "{one:?} {other:?}");
        }
    }
    let elsewhere = Tree { arena: "u".parse().unwrap(), path: None };
    let mut moves = Moves::default();
    moves.leave(id(1), &elsewhere, Duration::ZERO).unwrap();
    assert_eq!(moves.keep(&kept(2, None)), Ok(true));
    assert_eq!(moves.keep(&kept(2, None)), Ok(false));
}

#[test]
fn what_may_be_placed() {
    let mut moves = Moves::new(vec![kept(1, Some("kept"))]);
    moves.leave(id(2), &tree(Some("leaving")), Duration::ZERO).unwrap();
    for (path, replaces, part_of, may) in [
        ("free", true, None, true),
        ("leaving", false, None, false),
        ("leaving/x", false, Some(2), false),
        ("kept/x", false, None, true),
        ("kept/x", true, None, false),
        ("kept/x", true, Some(2), false),
        ("kept/x", true, Some(1), true),
    ] {
        assert_eq!(
            moves.may_place(&spot(path), replaces, part_of.map(id)).is_ok(),
            may,
            "{path} {replaces} {part_of:?}"
        );
    }
    // What is being put back needs its place, though nothing leaves any more.
    assert_eq!(moves.prepare(id(2), &spot("leaving/x"), Duration::ZERO), Ok(None));
    assert_eq!(moves.prepared(&spot("leaving/x"), 7), Prepared::Standing);
    assert_eq!(moves.end(id(2)), [(spot("leaving/x"), 7)]);
    assert_eq!(moves.may_place(&spot("leaving/x"), false, None), Err(Refusal::SetAside));
    moves.ended(&spot("leaving/x"));
    assert_eq!(moves.may_place(&spot("leaving/x"), false, None), Ok(()));
}

#[test]
fn a_destination_confirms_what_it_keeps_for_just_that_move() {
    let mut moves = Moves::new(vec![kept(1, Some("a"))]);
    assert_eq!(moves.confirm(id(1), &spot("a/x")), Ok(()));
    assert_eq!(moves.confirm(id(2), &spot("a/x")), Err(Refusal::NotKept));
    assert_eq!(moves.confirm(id(1), &spot("b")), Err(Refusal::NotKept));
    moves.release(&kept(1, Some("a")));
    moves.leave(id(3), &tree(None), Duration::ZERO).unwrap();
    assert_eq!(moves.confirm(id(1), &spot("a/x")), Err(Refusal::Leaving(tree(None))));
}

#[test]
fn an_order_to_remove_names_what_was_set_aside() {
    let mut moves = Moves::default();
    let x = spot("x");
    assert_eq!(moves.prepare(id(1), &x, Duration::ZERO), Err(Refusal::NotLeaving));
    moves.leave(id(1), &tree(None), Duration::ZERO).unwrap();
    moves.leave(id(2), &tree(None), Duration::ZERO).unwrap();
    assert_eq!(moves.prepare(id(1), &x, Duration::ZERO), Ok(None));
    assert_eq!(moves.prepare(id(1), &x, Duration::ZERO), Err(Refusal::SetAside));
    assert_eq!(moves.finish(id(1), &x, 7, Duration::ZERO), Err(Refusal::NotLeaving));
    assert_eq!(moves.prepared(&x, 7), Prepared::Standing);
    assert_eq!(moves.prepare(id(1), &x, Duration::ZERO), Ok(Some(7)));
    assert_eq!(moves.prepare(id(2), &x, Duration::ZERO), Err(Refusal::SetAside));
    for (of, number) in [(1, 6), (2, 7), (3, 7)] {
        assert_eq!(moves.finish(id(of), &x, number, Duration::ZERO), Err(Refusal::NotLeaving));
    }
    assert_eq!(moves.finish(id(1), &x, 7, Duration::ZERO), Ok(()));
    // Not twice: whether it was removed is not known yet.
    assert_eq!(moves.finish(id(1), &x, 7, Duration::ZERO), Err(Refusal::SetAside));
    assert_eq!((moves.end(id(1)), moves.is_moving(id(1)), moves.is_over(id(1), LATER)), (vec![], true, Over::No));
    moves.ended(&x);
    assert_eq!((moves.is_moving(id(1)), moves.is_over(id(1), Duration::ZERO)), (false, Over::Yes(vec![])));
}

#[test]
fn silent_moves_are_given_up() {
    let mut moves = Moves::default();
    let (x, y) = (spot("a/x"), spot("b/y"));
    for (number, path) in [(1, "a"), (2, "b")] {
        moves.leave(id(number), &tree(Some(path)), Duration::ZERO).unwrap();
    }
    for (number, at, of) in [(7, &x, 1), (8, &y, 2)] {
        moves.prepare(id(of), at, Duration::ZERO).unwrap();
        assert_eq!(moves.prepared(at, number), Prepared::Standing);
    }
    assert_eq!(moves.is_over(id(1), LATER - Duration::from_nanos(1)), Over::No);
    assert_eq!(moves.prepare(id(2), &y, LATER / 2), Ok(Some(8)));
    assert_eq!((moves.silent(LATER), moves.expire(LATER)), (vec![id(1)], vec![(x.clone(), 7)]));
    assert_eq!(moves.finish(id(1), &x, 7, LATER), Err(Refusal::SetAside));
    moves.ended(&x);
    assert_eq!(moves.finish(id(1), &x, 7, LATER), Err(Refusal::NotLeaving));
    // Asked about, it is given up at once.
    assert_eq!(moves.is_over(id(2), LATER), Over::No);
    assert_eq!(moves.is_over(id(2), LATER * 2), Over::Yes(vec![(y, 8)]));
    assert!(moves.is_quiet());
    // What was on its way to be set aside is not wanted any more.
    moves.leave(id(3), &tree(None), Duration::ZERO).unwrap();
    moves.prepare(id(3), &spot("z"), Duration::ZERO).unwrap();
    moves.expire(LATER);
    assert_eq!(moves.prepared(&spot("z"), 9), Prepared::Unwanted);
}

#[test]
fn nothing_is_removed_but_for_a_confirmation() {
    use Crossing::{Confirm, Finish, Moved, Place, Prepare, Stays, Unknown};
    let failed = |why| Done::failed(why, "");
    let there = Done::There { inode: 2, lost: Lost::default() };
    let (busy, changed) = (failed(Why::Busy), failed(Why::Changed));
    for (step, answer, next) in [
        (Place, Some(Done::Placed { received: 1, inode: 2, lost: Lost::default() }), Prepare),
        (Place, Some(there.clone()), Prepare),
        (Place, Some(Done::Ready), Stays),
        (Place, None, Stays),
        (Prepare, Some(Done::Prepared { aside: 7 }), Confirm { aside: 7 }),
        (Prepare, Some(Done::Removed), Moved),
        (Prepare, Some(busy.clone()), Stays),
        (Confirm { aside: 7 }, Some(Done::Confirmed), Finish { aside: 7, remove: true }),
        (Confirm { aside: 7 }, Some(there), Finish { aside: 7, remove: false }),
        (Confirm { aside: 7 }, Some(changed.clone()), Finish { aside: 7, remove: false }),
        (Confirm { aside: 7 }, None, Finish { aside: 7, remove: false }),
        (Finish { aside: 7, remove: true }, Some(Done::Removed), Moved),
        (Finish { aside: 7, remove: true }, Some(changed), Stays),
        (Finish { aside: 7, remove: true }, Some(busy.clone()), Unknown),
        (Finish { aside: 7, remove: true }, None, Unknown),
        (Finish { aside: 7, remove: false }, Some(Done::PutBack), Stays),
        (Finish { aside: 7, remove: false }, Some(busy), Stays),
        (Finish { aside: 7, remove: false }, None, Stays),
    ] {
        assert_eq!(step.answered(answer.as_ref()), next, "{step:?} {answer:?}");
    }
}
