//! What the ranks of a run compare, as threads of this process.
#![allow(clippy::unwrap_used)]

use core::time::Duration;

use bdia_core::{Category, Error, Exchange, Halt, Layout, Storage};
use bdia_cpu::Cpu;
use bdia_ranks::{Local, Ranks, Replica};
use bdia_train::ranks::same;

/// A flipped bit of a parameter or of the optimizer's state is found, and its rank is named.
#[test]
fn a_replica_that_differs_is_named() {
    for (culprit, which) in [(1, 0), (2, 1), (0, 2)] {
        let mut layout = Layout::new(size_of::<f32>());
        // More than is compared at a time, little, and one value.
        let saved = [(1 << 14) + 5, 7, 1].map(|len| layout.reals(Category::Parameters, len));
        let on_rank = |link: Local| {
            let mut be = Cpu::new(&layout, 1).unwrap();
            let mut ranks = Ranks::start(move || Ok(link)).unwrap();
            let mut be = Replica::new(&mut be, &mut ranks);
            for t in saved {
                let values: Vec<_> = (0..t.len()).map(|i| i as f32 * 0.25).collect();
                be.write_reals(t, &values).unwrap();
            }
            let equal = same(&mut be, &saved);
            if be.rank() == culprit {
                let place = saved[which].sub(saved[which].len() - 1, 1);
                let mut x = [0.0_f32];
                be.read_reals(place, &mut x).unwrap();
                be.write_reals(place, &[f32::from_bits(x[0].to_bits() ^ 1)]).unwrap();
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
