use std::{
    collections::{BTreeMap, BTreeSet},
    net::{Ipv4Addr, Ipv6Addr},
};

use proptest::prelude::*;

use super::*;

const LIMITS: Limits =
    Limits { resolve: Duration::from_secs(5), attempt: Duration::from_secs(5), all: Duration::from_secs(15) };

/// What is at an address; times in milliseconds.
#[derive(Debug, Clone, Copy)]
enum Place {
    /// Swallows everything.
    Silent,
    /// Fails at once, or a while after it was tried.
    Fails(u64),
    /// Finishes the handshake after so long, and answers a greeting after so long, if ever.
    Meets(u64, Option<u64>),
    /// The same, but refuses.
    Refuses(u64),
}

/// The addresses of a name: when they are found, and what is there.
type Name = (Option<u64>, Vec<(SocketAddr, Place)>);

#[derive(Debug, Default)]
struct Run {
    /// When each attempt started, and where.
    starts: Vec<(u64, SocketAddr)>,
    /// When each attempt was over that failed.
    over: BTreeMap<usize, u64>,
    greeted: Vec<usize>,
    dropped: BTreeSet<usize>,
    won: Option<SocketAddr>,
    ended: u64,
    failure: Option<Flaw>,
}

enum Event {
    Resolved(usize),
    Met(usize),
    Failed(usize, FlawKind),
    Answered(usize),
}

/// Runs a race in which time passes only between events. A name that is found at once is an address.
fn run(names: &[Name]) -> Run {
    let zero = Instant::now();
    let ms = |at: Instant| at.duration_since(zero).as_millis() as u64;
    let places: BTreeMap<SocketAddr, Place> = names.iter().flat_map(|(_, places)| places).copied().collect();
    let texts = names.iter().enumerate().map(|(number, (found, places))| match found {
        None => places[0].0.to_string(),
        Some(_) => format!("name{number}:1"),
    });
    let mut race = Race::new(texts.collect(), &[own()], LIMITS, zero);
    let mut run = Run::default();
    let mut events: BTreeMap<(u64, usize), Event> = BTreeMap::new();
    let (mut now, mut count) = (0, 0);
    let mut greeting: Option<usize> = None;
    loop {
        let step = race.poll(zero + Duration::from_millis(now));
        count += 1;
        assert!(count < 10_000, "it goes round and round");
        match step {
            Step::Resolve(number, name) => {
                assert_eq!(name, format!("name{number}:1"));
                events.insert((now + names[number].0.unwrap(), count), Event::Resolved(number));
            }
            Step::Connect(attempt, address) => {
                assert_eq!(attempt, run.starts.len());
                run.starts.push((now, address));
                match places[&address] {
                    Place::Silent => {}
                    Place::Fails(after) => {
                        events.insert((now + after, count), Event::Failed(attempt, FlawKind::Network));
                    }
                    Place::Meets(after, _) | Place::Refuses(after) => {
                        events.insert((now + after, count), Event::Met(attempt));
                    }
                }
            }
            Step::Greet(attempt) => {
                assert_eq!(greeting.replace(attempt), None, "two at once");
                assert!(!run.dropped.contains(&attempt) && !run.greeted.contains(&attempt));
                run.greeted.push(attempt);
                match places[&run.starts[attempt].1] {
                    Place::Meets(_, Some(after)) => {
                        events.insert((now + after, count), Event::Answered(attempt));
                    }
                    Place::Meets(_, None) => {}
                    Place::Refuses(_) => {
                        events.insert((now, count), Event::Failed(attempt, FlawKind::Refused));
                    }
                    other => panic!("{other:?} greets"),
                }
            }
            Step::Drop(attempt) => {
                assert!(run.dropped.insert(attempt));
                run.over.insert(attempt, now);
                greeting.take_if(|greeting| *greeting == attempt);
            }
            Step::Failed => {
                run.ended = now;
                run.failure = Some(race.into_failure());
                return run;
            }
            Step::Wait(until) => {
                let until = ms(until);
                assert!(until > now, "{until} {now}: it should say what to do");
                let Some(entry) = events.first_entry().filter(|entry| entry.key().0 <= until) else {
                    now = until;
                    continue;
                };
                now = now.max(entry.key().0);
                match entry.remove() {
                    Event::Resolved(number) => {
                        let found = names[number].1.iter().map(|(address, _)| *address).collect();
                        race.handle_resolved(number, Ok(found));
                    }
                    Event::Met(attempt) => race.handle_met(attempt),
                    Event::Failed(attempt, kind) => {
                        run.over.entry(attempt).or_insert(now);
                        greeting.take_if(|greeting| *greeting == attempt);
                        race.handle_failed(attempt, Flaw::new(kind, "so it is"));
                    }
                    Event::Answered(attempt) => {
                        if race.handle_won(attempt) {
                            assert!(!run.dropped.contains(&attempt));
                            run.won = Some(run.starts[attempt].1);
                            run.ended = now;
                            return run;
                        }
                        assert!(run.dropped.contains(&attempt));
                    }
                }
            }
        }
    }
}

/// Where this machine listens itself.
fn own() -> SocketAddr {
    (Ipv4Addr::LOCALHOST, 7700).into()
}

fn v4(n: u8) -> SocketAddr {
    (Ipv4Addr::new(192, 0, 2, n), 7700).into()
}

fn v6(n: u8) -> SocketAddr {
    (Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, n.into()), 7700).into()
}

fn known(places: impl IntoIterator<Item = (SocketAddr, Place)>) -> Vec<Name> {
    places.into_iter().map(|place| (None, vec![place])).collect()
}

fn starts(run: &Run) -> Vec<(u64, SocketAddr)> {
    run.starts.clone()
}

#[test]
fn families_take_turns_and_ipv6_begins() {
    let silent = [v4(1), v4(2), v6(1), v4(3), v6(2)].map(|address| (address, Place::Silent));
    let run = run(&known(silent));
    assert_eq!(starts(&run), [(0, v6(1)), (250, v4(1)), (500, v6(2)), (750, v4(2)), (1000, v4(3))]);
    assert_eq!(run.ended, 6000);
    let failure = run.failure.unwrap();
    assert_eq!(failure.kind, FlawKind::Network);
    let said = "[2001:db8::1]:7700: no answer within 5 s; 192.0.2.1:7700: no answer within 5 s; \
                [2001:db8::2]:7700: no answer within 5 s; 192.0.2.2:7700: no answer within 5 s; and 1 more";
    assert_eq!(failure.why, said);
}

#[test]
fn what_fails_makes_room_at_once() {
    let places = [(v6(1), Place::Fails(0)), (v6(2), Place::Fails(40)), (v4(1), Place::Meets(10, Some(5)))];
    let run = run(&known(places));
    assert_eq!(starts(&run), [(0, v6(1)), (0, v4(1))]);
    assert_eq!((run.won, run.ended), (Some(v4(1)), 15));
}

#[test]
fn an_address_that_swallows_packets_costs_a_quarter_of_a_second() {
    let run = run(&known([(v6(1), Place::Silent), (v4(1), Place::Meets(10, Some(5)))]));
    assert_eq!((run.won, run.ended), (Some(v4(1)), 265));
}

#[test]
fn a_slow_name_holds_up_nobody_and_takes_part_when_it_is_found() {
    let slow = (Some(700), vec![(v6(1), Place::Silent), (v4(2), Place::Silent)]);
    let names = [slow, (None, vec![(v4(1), Place::Silent)]), (Some(9000), vec![(v4(9), Place::Silent)])];
    let run = run(&names);
    assert_eq!(starts(&run), [(0, v4(1)), (700, v6(1)), (950, v4(2))]);
    let why = run.failure.unwrap().why;
    let said = "name2:1: the name was not found within 5 s; 192.0.2.1:7700: no answer within 5 s; \
                name0:1 ([2001:db8::1]:7700): no answer within 5 s; name0:1 (192.0.2.2:7700): no answer within 5 s";
    assert_eq!(why, said);
}

#[test]
fn one_greets_at_a_time_and_one_that_takes_long_makes_room() {
    let places = [(v6(1), Place::Meets(10, None)), (v4(1), Place::Meets(10, Some(30)))];
    let late = run(&known(places));
    assert_eq!((late.greeted, late.won, late.ended), (vec![0, 1], Some(v4(1)), 2040));
    let places = [(v6(1), Place::Meets(10, Some(3000)))];
    assert_eq!(run(&known(places)).ended, 3010, "nobody else waits");
}

#[test]
fn a_refusal_ends_the_race_and_counts_most() {
    let places = [(v6(1), Place::Fails(0)), (v4(1), Place::Refuses(30)), (v4(2), Place::Silent)];
    let run = run(&known(places));
    assert_eq!((run.ended, run.starts.len()), (30, 2));
    let failure = run.failure.unwrap();
    assert_eq!(failure.kind, FlawKind::Refused);
    assert_eq!(failure.why, "192.0.2.1:7700: so it is; [2001:db8::1]:7700: so it is");
}

#[test]
fn a_machine_does_not_dial_itself() {
    let run = run(&known([(own(), Place::Silent)]));
    assert_eq!((run.starts.len(), run.ended), (0, 0));
    let failure = run.failure.unwrap();
    assert_eq!(failure, Flaw::new(FlawKind::Elsewhere, "127.0.0.1:7700: this machine itself listens there"));
}

#[test]
fn without_addresses_it_fails_at_once() {
    let mut race = Race::new(Vec::new(), &[], LIMITS, Instant::now());
    assert_eq!(race.poll(Instant::now()), Step::Failed);
    assert_eq!(race.into_failure(), Flaw::new(FlawKind::Network, "no address to dial"));
    let mut race = Race::new(vec!["nas:1".into()], &[], LIMITS, Instant::now());
    assert_eq!(race.poll(Instant::now()), Step::Resolve(0, "nas:1".into()));
    race.handle_resolved(0, Err(Flaw::new(FlawKind::Network, "the name is not known")));
    assert_eq!(race.poll(Instant::now()), Step::Failed);
    assert_eq!(race.into_failure().why, "nas:1: the name is not known");
}

fn a_place() -> impl Strategy<Value = Place> {
    prop_oneof![
        3 => Just(Place::Silent),
        3 => (0..6000_u64).prop_map(Place::Fails),
        1 => (0..6000_u64, prop::option::of(0..6000_u64)).prop_map(|(met, greeted)| Place::Meets(met, greeted)),
    ]
}

/// Up to 9 names with up to 5 addresses each, all different but for a few; a third of the names are addresses.
fn some_names() -> impl Strategy<Value = Vec<Name>> {
    let address = (any::<bool>(), 0..60_u8).prop_map(|(is_v6, n)| if is_v6 { v6(n) } else { v4(n) });
    let places = prop::collection::vec((address, a_place()), 1..6);
    let name = (prop::option::weighted(0.7, 0..8000_u64), places);
    prop::collection::vec(name, 0..10).prop_map(|mut names| {
        let mut seen = BTreeMap::new();
        for (found, places) in &mut names {
            places.truncate(if found.is_none() { 1 } else { usize::MAX });
            // An address is one place, whoever names it.
            places.iter_mut().for_each(|(address, place)| *place = *seen.entry(*address).or_insert(*place));
        }
        names
    })
}

proptest! {
    #[test]
    fn races(names in some_names()) {
        let run = run(&names);
        prop_assert!(run.ended <= 15_000);
        for (number, pair) in run.starts.windows(2).enumerate() {
            let last_failed = run.over.get(&number).is_some_and(|&over| over <= pair[1].0);
            prop_assert!(last_failed || pair[1].0 >= pair[0].0 + 250, "{:?}", pair);
        }
        let tried: BTreeSet<_> = run.starts.iter().map(|(_, address)| *address).collect();
        prop_assert_eq!(tried.len(), run.starts.len(), "each once");
        // Nobody is left out who was found in time, unless somebody won first or the race was full; in the last
        // millisecond it may be either.
        let found_before = |limit: u64| names.iter().filter(move |(found, _)| found.is_none_or(|found| found < limit))
            .flat_map(|(_, places)| places).map(|(address, _)| *address).collect::<BTreeSet<_>>().len().min(40);
        if run.won.is_none() {
            prop_assert!((found_before(5000)..=found_before(5001)).contains(&tried.len()), "{}", tried.len());
        }
        // Families take turns among those that are known from the start.
        let first: Vec<_> = names.iter().filter(|(found, _)| found.is_none()).map(|(_, places)| places[0].0).collect();
        if let Some((at, address)) = run.starts.first().filter(|_| !first.is_empty()) {
            prop_assert_eq!((*at, address.is_ipv6()), (0, first.iter().any(SocketAddr::is_ipv6)));
        }
        // Who would answer whatever happens makes somebody win.
        let sure = |place: &Place| matches!(place, Place::Meets(met, Some(greeted)) if met + greeted < 1500);
        let place = |address: &SocketAddr| names.iter().flat_map(|(_, places)| places).find(|(at, _)| at == address);
        let greets_badly = names.iter().flat_map(|(_, places)| places)
            .any(|(_, place)| matches!(place, Place::Meets(_, greeted) if greeted.is_none_or(|greeted| greeted >= 1500)));
        let is_sure = tried.iter().any(|address| place(address).is_some_and(|(_, place)| sure(place)));
        prop_assert!(run.won.is_some() || !is_sure || greets_badly);
        prop_assert!(run.won.is_some() != run.failure.is_some());
    }

    /// With addresses alone, each has its time.
    #[test]
    fn forty_addresses_have_their_time(count in 1..40_u8, v6s in 0..40_u8) {
        let places = (0..count).map(|n| (if n < v6s { v6(n) } else { v4(n) }, Place::Silent));
        let run = run(&known(places));
        prop_assert_eq!(run.starts.len(), count.into());
        for (number, (start, _)) in run.starts.iter().enumerate() {
            prop_assert_eq!(*start, 250 * number as u64);
            prop_assert_eq!(run.over[&number], start + 5000);
        }
    }
}
