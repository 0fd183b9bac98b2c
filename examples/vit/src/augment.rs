//! What training changes of images: crop, flip, mixture. All of it follows from seed, step and the
//! sample's place.

use bdia_core::rng::{Draw, Stream};

/// How images are changed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Augment {
    /// Pixels that are added on every side, with value 0, before a window of the old size is cut
    /// out.
    pub padding: u32,
    /// Whether every second image is mirrored.
    pub flip: bool,
    /// Mixup: `α` of the Beta distribution that the share of the first image is drawn from; 0 for
    /// none.
    pub mixup: f64,
}

/// What happens to one image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Change {
    /// The window's rows and columns from the padded image's corner, less the padding.
    pub shift: [i32; 2],
    /// Mirrored.
    pub flip: bool,
}

impl Augment {
    /// Of sample `i` of a step.
    pub fn change(&self, seed: u64, step: u32, i: u32) -> Change {
        let s = Stream::new(seed, step, i, 0, 0, Draw::Augmentation);
        let shift = [0, 1].map(|e| s.below(e, 2 * self.padding + 1) as i32 - self.padding as i32);
        Change { shift, flip: self.flip && s.word(2) & 1 == 1 }
    }

    /// The share of the first image in all mixtures of a step: from `Beta(α, α)` by Jöhnk's method;
    /// 1 without mixup.
    pub fn share(&self, seed: u64, step: u32) -> f64 {
        if self.mixup <= 0.0 {
            return 1.0;
        }
        let s = Stream::new(seed, step, u32::MAX, 0, 0, Draw::Augmentation);
        for try_ in 0..1000 {
            let [u, v] = [0, 1].map(|e| s.uniform(2 * try_ + e).powf(1.0 / self.mixup));
            if u + v > 0.0 && u + v <= 1.0 {
                return u / (u + v);
            }
        }
        0.5
    }
}

/// `out[C, h, w]` from `image[C, h, w]`.
pub fn apply(change: Change, [channels, h, w]: [usize; 3], image: &[f64], out: &mut [f64]) {
    for c in 0..channels {
        for row in 0..h {
            for col in 0..w {
                let across = if change.flip { w - 1 - col } else { col };
                let y = row.checked_add_signed(change.shift[0] as isize).filter(|&y| y < h);
                let x = across.checked_add_signed(change.shift[1] as isize).filter(|&x| x < w);
                out[(c * h + row) * w + col] =
                    y.zip(x).map_or(0.0, |(y, x)| image[(c * h + y) * w + x]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const IMAGE: [f64; 6] = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];

    fn changed(shift: [i32; 2], flip: bool) -> [f64; 6] {
        let mut out = [9.0; 6];
        apply(Change { shift, flip }, [1, 2, 3], &IMAGE, &mut out);
        out
    }

    #[test]
    fn known_images() {
        assert_eq!(changed([0, 0], false), IMAGE);
        assert_eq!(changed([0, 0], true), [3.0, 2.0, 1.0, 6.0, 5.0, 4.0]);
        // One row down and one column to the right of the original's corner.
        assert_eq!(changed([1, 1], false), [5.0, 6.0, 0.0, 0.0, 0.0, 0.0]);
        assert_eq!(changed([-1, 0], false), [0.0, 0.0, 0.0, 1.0, 2.0, 3.0]);
        // Crop first, then mirror.
        assert_eq!(changed([0, 1], true), [0.0, 3.0, 2.0, 0.0, 6.0, 5.0]);
    }

    #[test]
    fn draws_cover_their_range_and_repeat() {
        let a = Augment { padding: 2, flip: true, mixup: 0.4 };
        let all: Vec<Change> = (0..2000).map(|i| a.change(7, 3, i)).collect();
        assert_eq!(all, (0..2000).map(|i| a.change(7, 3, i)).collect::<Vec<_>>());
        for d in 0..2 {
            for v in -2..=2 {
                let n = all.iter().filter(|c| c.shift[d] == v).count() as f64;
                // Five standard deviations of 2000 draws of one in five.
                assert!((n - 400.0).abs() < 5.0 * (2000.0_f64 * 0.2 * 0.8).sqrt(), "{n}");
            }
        }
        let flips = all.iter().filter(|c| c.flip).count() as f64;
        assert!((flips - 1000.0).abs() < 5.0 * 500.0_f64.sqrt());
        assert_ne!(all, (0..2000).map(|i| a.change(8, 3, i)).collect::<Vec<_>>());
        assert_ne!(all, (0..2000).map(|i| a.change(7, 4, i)).collect::<Vec<_>>());
        let shares: Vec<f64> = (0..2000).map(|step| a.share(1, step)).collect();
        let mean = shares.iter().sum::<f64>() / 2000.0;
        // Beta(α, α) has mean 1/2 and variance 1/(4·(2α+1)).
        assert!(
            shares.iter().all(|s| (0.0..=1.0).contains(s))
                && (mean - 0.5).abs() < 5.0 * (1.0 / 7.2 / 2000.0_f64).sqrt()
        );
        assert_eq!(Augment { mixup: 0.0, ..a }.share(1, 1), 1.0);
    }
}
