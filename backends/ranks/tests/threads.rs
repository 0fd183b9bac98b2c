//! Ranks that are threads: sums, faults, digests, and what happens where a rank does not answer.
#![allow(clippy::unwrap_used)]

use core::time::Duration;

use bdia_core::backend::{Exchange, OptimOps, Storage};
use bdia_core::optim::{Rule, Update};
use bdia_core::{Category, Error, Fault, Halt, Layout, Reals, Reference, Result, Site, State};
use bdia_ranks::{Local, Ranks, Replica, compare};

/// Values of the arena.
const VALUES: usize = 4096;
const LIMIT: Duration = Duration::from_secs(20);

fn leaked(layout: &Layout) -> &'static mut Reference<'static, f32> {
    let (i, r, w) = layout.arenas();
    // A test makes a handful of them; they live as long as it.
    let (i, r, w) = (vec![0; i].leak(), vec![0.0; r].leak(), vec![0; w].leak());
    Box::leak(Box::new(Reference::new(layout, i, r, w).unwrap()))
}

/// Runs `work` on every rank, each a thread with a backend of its own; what they return, in the
/// order of ranks.
fn on<T: Send>(
    ranks: usize,
    limit: Duration,
    work: impl Fn(&mut Replica<'_, Reference<'static, f32>>) -> T + Sync,
) -> Vec<T> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = (Local::group(ranks, limit).into_iter())
            .map(|link| {
                scope.spawn(|| {
                    let mut layout = Layout::new(4);
                    let _ = layout.reals(Category::Gradients, VALUES);
                    let mut ranks = Ranks::start(move || Ok(link)).unwrap();
                    work(&mut Replica::new(leaked(&layout), &mut ranks))
                })
            })
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    })
}

/// Value `i` of group `group` on a rank: magnitudes that a sum in another order would round
/// otherwise.
fn value(rank: usize, group: usize, i: usize) -> f32 {
    let mut x = (rank * 1_000_003 + group * 10_007 + i) as u64;
    x = (x ^ (x >> 13)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let sign = if x & 1 == 0 { 1.0 } else { -1.0 };
    sign * ((x >> 40) as f32) * 2.0_f32.powi((x >> 1 & 31) as i32 - 16)
}

fn expected(ranks: usize, group: usize, len: usize) -> Vec<u32> {
    (0..len)
        .map(|i| ((0..ranks).map(|r| f64::from(value(r, group, i))).sum::<f64>() as f32).to_bits())
        .collect()
}

fn read(be: &impl Storage<Real = f32>, place: Reals) -> Vec<u32> {
    let mut values = vec![0.0; place.len()];
    be.read_reals(place, &mut values).unwrap();
    values.into_iter().map(f32::to_bits).collect()
}

#[test]
fn a_replica_is_a_backend() {
    let new = |layout: &Layout| {
        let link = Local::group(1, LIMIT).remove(0);
        Replica::new(leaked(layout), Box::leak(Box::new(Ranks::start(move || Ok(link)).unwrap())))
    };
    bdia_core::testing::all(new).map_err(|f| f.to_string()).unwrap();
}

/// Groups of a buffer that all use, one on its way while the next is written; no timing changes a
/// bit.
#[test]
fn sums_are_those_of_the_order_of_ranks() {
    for ranks in 2..=5 {
        for len in [1, 3, 64, 1000, VALUES] {
            let sums = on(ranks, LIMIT, |be| {
                let (buffer, mut sums) = (Reals::new(0, len), Vec::new());
                for group in 0..4 {
                    let values: Vec<_> = (0..len).map(|i| value(be.rank(), group, i)).collect();
                    be.write_reals(buffer, &values).unwrap();
                    // Every group has another rank that is late.
                    std::thread::sleep(Duration::from_millis(((be.rank() + group) % ranks) as u64));
                    be.exchange(buffer, if group == 0 { Reals::EMPTY } else { buffer }).unwrap();
                    if group > 0 {
                        sums.push(read(be, buffer));
                    }
                }
                be.exchange(Reals::EMPTY, buffer).unwrap();
                sums.push(read(be, buffer));
                sums
            });
            for rank in sums {
                for (group, sum) in rank.iter().enumerate() {
                    assert_eq!(
                        sum,
                        &expected(ranks, group, len),
                        "{ranks} ranks, {len} values, group {group}"
                    );
                }
            }
        }
    }
}

/// Two groups of different lengths on their way at a time come back in the order in which they
/// went.
#[test]
fn several_groups_are_on_their_way() {
    let lens = [900, 77];
    let sums = on(3, LIMIT, |be| {
        let places = [Reals::new(0, lens[0]), Reals::new(1024, lens[1])];
        let mut sums = Vec::new();
        for round in 0..3 {
            for (p, &place) in places.iter().enumerate() {
                let values: Vec<_> =
                    (0..place.len()).map(|i| value(be.rank(), 2 * round + p, i)).collect();
                be.write_reals(place, &values).unwrap();
                be.exchange(place, if round == 0 { Reals::EMPTY } else { place }).unwrap();
                if round > 0 {
                    sums.push(read(be, place));
                }
            }
        }
        for place in places {
            be.exchange(Reals::EMPTY, place).unwrap();
            sums.push(read(be, place));
        }
        sums
    });
    for rank in sums {
        for (group, sum) in rank.iter().enumerate() {
            assert_eq!(sum, &expected(3, group, lens[group % 2]));
        }
    }
}

/// A fault of one rank is everybody's before anything is updated.
#[test]
fn a_fault_stops_all_ranks() {
    let fault = Fault::Range { site: Site::Block(3), sample: 5, value: f64::INFINITY };
    for culprit in 0..3 {
        let ends = on(3, LIMIT, |be| {
            let (p, g) = (Reals::new(0, 16), Reals::new(16, 16));
            be.fill_reals(p, 1.0).unwrap();
            be.fill_reals(g, 1.0).unwrap();
            if be.rank() == culprit {
                be.raise(fault);
            }
            be.exchange(g, Reals::EMPTY).unwrap();
            be.exchange(Reals::EMPTY, g).unwrap();
            let rule = Rule::Sgd { momentum: 0.0 };
            let update = Update { rule, t: 1, lr: 0.5, decay: 0.0, scale: 1.0 };
            be.update(&update, [1, p.len()], p, g, &State::EMPTY).unwrap();
            let taken = (be.take_fault(), be.take_fault());
            (read(be, p), taken)
        });
        for (parameters, taken) in ends {
            assert!(parameters.iter().all(|&p| p == 1.0_f32.to_bits()));
            assert_eq!(
                taken,
                (Err(Error::Rank { rank: culprit, why: Halt::Fault(fault) }), Ok(None))
            );
        }
    }
}

#[test]
fn numbers_are_gathered_in_order() {
    let all = on(4, LIMIT, |be| {
        let mut all = Vec::new();
        be.gather([be.rank() as f64, -0.0, f64::MIN, 1e-300], &mut |x| all.push(x)).unwrap();
        all
    });
    let expected: Vec<_> = (0..4).map(|r| [f64::from(r), -0.0, f64::MIN, 1e-300]).collect();
    assert!(all.iter().all(|a| format!("{a:?}") == format!("{expected:?}")), "{all:?}");
}

#[test]
fn the_rank_that_differs_is_named() {
    for (digests, wrong) in [
        (&[7, 7, 7][..], None),
        (&[7, 9, 7], Some(1)),
        (&[9, 7, 7], Some(0)),
        (&[7, 7 | 1 << 63, 7, 7], Some(1)),
        (&[7, 9], Some(1)),
        (&[7, 9, 7, 9], Some(1)),
    ] {
        let expected = wrong.map_or(Ok(()), |rank| Err(Error::Rank { rank, why: Halt::Differs }));
        let ends = on(digests.len(), LIMIT, |be| compare(be, digests[be.rank()], Halt::Differs));
        assert!(ends.iter().all(|e| *e == expected), "{digests:?}: {ends:?}");
    }
}

/// A rank that comes too late, does something else or has left is an error on the others, which
/// name it; none waits on.
#[test]
fn who_does_not_answer_is_named() {
    let limit = Duration::from_secs(1);
    let exchange = |be: &mut Replica<'_, _>, len| -> Result<()> {
        let g = Reals::new(0, len);
        be.exchange(g, Reals::EMPTY)?;
        be.exchange(Reals::EMPTY, g)
    };
    let silent = on(3, limit, |be| {
        if be.rank() == 1 {
            std::thread::sleep(3 * limit);
            return Ok(());
        }
        let first = exchange(be, 100);
        // It stays an error.
        assert_eq!(exchange(be, 100), first);
        first
    });
    let expected = Err(Error::Rank { rank: 1, why: Halt::Silent(1) });
    assert_eq!((silent[0], silent[2]), (expected, expected));

    let astray = Err(Error::Rank { rank: 2, why: Halt::Astray });
    let ends = on(3, limit, |be| exchange(be, if be.rank() == 2 { 99 } else { 100 }));
    assert!(ends.iter().all(|e| *e == astray), "{ends:?}");
    let ends = on(3, limit, |be| {
        if be.rank() == 2 { be.gather([0.0; 4], &mut |_| ()) } else { exchange(be, 100) }
    });
    assert!(ends.iter().all(|e| *e == astray), "{ends:?}");

    let mut links = Local::group(2, limit);
    drop(links.pop());
    let link = links.remove(0);
    let mut layout = Layout::new(4);
    let _ = layout.reals(Category::Gradients, VALUES);
    let mut ranks = Ranks::start(move || Ok(link)).unwrap();
    let mut be = Replica::new(leaked(&layout), &mut ranks);
    assert_eq!(exchange(&mut be, 10), Err(Error::Rank { rank: 1, why: Halt::Gone }));
}

#[test]
fn requests_that_make_no_sense_are_errors() {
    let ends = on(2, LIMIT, |be| {
        let g = Reals::new(0, 10);
        // Nothing has been sent.
        let early = be.exchange(Reals::EMPTY, g);
        be.exchange(g, Reals::EMPTY).unwrap();
        let busy = be.gather([0.0; 4], &mut |_| ());
        let other = be.exchange(Reals::EMPTY, Reals::new(0, 9));
        let outside = be.exchange(Reals::new(VALUES, 1), Reals::EMPTY);
        [early, busy, other, outside]
    });
    for e in ends {
        assert!(
            matches!(e[0], Err(Error::Setting { .. }))
                && matches!(e[1], Err(Error::Setting { .. })),
            "{e:?}"
        );
        assert!(matches!(e[2], Err(Error::Shape { expected: 10, found: 9, .. })), "{e:?}");
        assert!(matches!(e[3], Err(Error::Handle(_))), "{e:?}");
    }
}

/// What rank 0 works out for all: of any length, and for longer than a link waits. A rank that is
/// gone meanwhile is told.
#[test]
fn what_rank_0_finds_is_everybodys() {
    let on_links = |limit, work: &(dyn Fn(&mut Ranks) -> Result<Vec<u8>> + Sync)| {
        std::thread::scope(|scope| {
            let threads: Vec<_> = (Local::group(3, limit).into_iter())
                .map(|link| scope.spawn(move || work(&mut Ranks::start(move || Ok(link)).unwrap())))
                .collect();
            threads.into_iter().map(|t| t.join().unwrap()).collect::<Vec<_>>()
        })
    };
    for len in [0, 1, 27, 28, 29, 56, 1000] {
        let all: Vec<u8> = (0..len).map(|i| (i * 7 + len) as u8).collect();
        let found = on_links(LIMIT, &|ranks| {
            let rank = ranks.rank();
            ranks.from_first(|| if rank == 0 { all.clone() } else { panic!("rank {rank} works") })
        });
        assert!(found.iter().all(|f| f.as_ref() == Ok(&all)), "{len}: {found:?}");
    }
    let slow = on_links(Duration::from_secs(1), &|ranks| {
        ranks.from_first(|| {
            std::thread::sleep(Duration::from_millis(2500));
            vec![5; 100]
        })
    });
    assert!(slow.iter().all(|f| f == &Ok(vec![5; 100])), "{slow:?}");
    let gone = on_links(Duration::from_secs(1), &|ranks| match ranks.rank() {
        2 => Ok(Vec::new()),
        _ => ranks.from_first(|| vec![1]),
    });
    assert!(matches!(gone[0], Err(Error::Rank { rank: 1 | 2, .. })), "{gone:?}");
}
