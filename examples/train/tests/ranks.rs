//! What the ranks of a run compare, as threads of this process.
#![allow(clippy::unwrap_used)]

use core::time::Duration;

use bdia_core::{Category, Error, Exchange, Halt, Layout};
use bdia_cpu::Cpu;
use bdia_models::named::Saved;
use bdia_ranks::{Local, Ranks, Replica};
use bdia_train::Failure;
use bdia_train::calibrate::{Calibration, Penalty};
use bdia_train::cli::ModeArgs;
use bdia_train::ranks::{of_first, same};
use clap::Parser;

/// A flipped bit of a parameter or of the optimizer's state is found, and its rank is named.
#[test]
fn a_replica_that_differs_is_named() {
    for (culprit, which) in [(1, 0), (2, 1), (0, 2), (3, 3)] {
        let mut layout = Layout::new(size_of::<f32>());
        // More than is compared at a time, little, and one value; moments in 8 bits.
        let [a, b, c] = [(1 << 14) + 5, 7, 1].map(|len| layout.reals(Category::Parameters, len));
        let codes = layout.words(Category::Optimizer, 3);
        let saved = [Saved::Reals(a), Saved::Reals(b), Saved::Reals(c), Saved::Words(codes)];
        let on_rank = |link: Local| {
            let mut be = Cpu::new(&layout, 1).unwrap();
            let mut ranks = Ranks::start(move || Ok(link)).unwrap();
            let mut be = Replica::new(&mut be, &mut ranks);
            for t in saved {
                let bits: Vec<_> = (0..t.len()).map(|i| (i as f32 * 0.25).to_bits()).collect();
                t.put(&mut be, 0, &bits).unwrap();
            }
            let equal = same(&mut be, &saved);
            if be.rank() == culprit {
                let (tensor, mut bits) = (saved[which], [0]);
                tensor.get(&be, tensor.len() - 1, &mut bits).unwrap();
                tensor.put(&mut be, tensor.len() - 1, &[bits[0] ^ 1]).unwrap();
            }
            (equal, same(&mut be, &saved))
        };
        let ends: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (Local::group(4, Duration::from_secs(30)).into_iter())
                .map(|link| scope.spawn(|| on_rank(link)))
                .collect();
            threads.into_iter().map(|t| t.join().unwrap()).collect()
        });
        let expected = (Ok(()), Err(Error::Rank { rank: culprit, why: Halt::Differs }));
        assert!(ends.iter().all(|e| *e == expected), "{ends:?}");
    }
}

#[derive(Debug, Parser)]
struct Line {
    #[command(flatten)]
    mode: ModeArgs,
}

/// The γ that rank 0 measures is everybody's in every bit, and so is its error; the others measure
/// nothing.
#[test]
fn ranks_take_what_the_first_has_measured() {
    let found = Calibration {
        targets: 4096,
        loss: 3.411_000_000_000_000_3,
        largest: f64::from_bits(46_845.0_f64.to_bits() + 1),
        frac_bits: 12,
        rows: [(0, 1e-310), (1, 1.0 / 3.0), (2, -0.019)]
            .map(|(planes, mean)| Penalty { planes, mean, error: mean.abs() / 7.0, draws: 4 })
            .to_vec(),
    };
    for fails in [false, true] {
        let on_rank = |link: Local| {
            let mut ranks = Ranks::start(move || Ok(link)).unwrap();
            let rank = ranks.rank();
            let measure = || match (rank, fails) {
                (0, false) => Ok(Some(found.clone())),
                (0, true) => Err(Failure::Calibration(Box::new(found.clone()))),
                _ => panic!("rank {rank} measures"),
            };
            let mut mode = Line::parse_from(["run", "--gamma", "auto"]).mode;
            let told = of_first(Some(&mut ranks), measure).map_err(|e| e.to_string())?;
            mode.take(told.unwrap());
            Ok(mode)
        };
        let ends: Vec<Result<_, String>> = std::thread::scope(|scope| {
            let threads: Vec<_> = (Local::group(3, Duration::from_secs(30)).into_iter())
                .map(|link| scope.spawn(move || on_rank(link)))
                .collect();
            threads.into_iter().map(|t| t.join().unwrap()).collect()
        });
        for end in ends {
            if fails {
                assert_eq!(
                    end.unwrap_err(),
                    Failure::Calibration(Box::new(found.clone())).to_string()
                );
            } else {
                let mode = end.unwrap();
                assert_eq!(mode.calibration.as_ref(), Some(&found));
                assert_eq!((mode.frac_bits, mode.policy().unwrap().planes()), (12, 2));
            }
        }
    }
}
