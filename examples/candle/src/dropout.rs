//! Dropout that is replayed: the mask is a function of its place, so the recomputed block drops the
//! same values.

use core::cell::Cell;

use bdia_core::backend::Chunk;
use bdia_core::rng::{drop_threshold, keep};
use candle_core::{ModuleT, Result, Tensor};

thread_local! {
    /// The chunk that a block of a stack works on now, and how many masks it has drawn.
    static PLACE: Cell<Option<(Chunk, u8)>> = const { Cell::new(None) };
}

/// Runs a block; dropout in it draws from the numbers of this chunk.
pub(crate) fn within<T>(chunk: &Chunk, f: impl FnOnce() -> T) -> T {
    struct Leave(Option<(Chunk, u8)>);
    impl Drop for Leave {
        fn drop(&mut self) {
            PLACE.set(self.0);
        }
    }
    let _leave = Leave(PLACE.replace(Some((*chunk, 0))));
    f()
}

/// To be used in blocks of a [`Reversible`](crate::Reversible) in the place of
/// [`candle_nn::Dropout`], whose random numbers on the CPU cannot be repeated. Anywhere else it is
/// that dropout.
///
/// The mask is a function of seed, step, sample, block and the order of dropouts in the block (128
/// of them differ), and does not depend on chunks. The first dimension must be the sample, or
/// samples times something.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dropout {
    p: f32,
}

impl Dropout {
    /// Drops values with probability `p`, and divides the others by `1 - p`.
    pub fn new(p: f32) -> Self {
        Self { p }
    }

    /// Drops in training.
    ///
    /// # Errors
    /// A probability outside `[0, 1)`, or a first dimension that is not a multiple of the samples.
    pub fn forward(&self, x: &Tensor, train: bool) -> Result<Tensor> {
        if !train || self.p == 0.0 {
            return Ok(x.clone());
        }
        let Some((chunk, n)) = PLACE.get() else { return candle_nn::ops::dropout(x, self.p) };
        if !(0.0..1.0).contains(&self.p) {
            candle_core::bail!("dropout probability {} is not in [0, 1)", self.p);
        }
        if x.dims().first().is_none_or(|&rows| rows % chunk.samples != 0) {
            candle_core::bail!(
                "dropout in a block of {} samples: a shape of {:?}",
                chunk.samples,
                x.dims()
            );
        }
        PLACE.set(Some((chunk, n.wrapping_add(1))));
        let (per, threshold, scale) =
            (x.elem_count() / chunk.samples, drop_threshold(self.p.into()), 1.0 / (1.0 - self.p));
        let mut mask = Vec::with_capacity(x.elem_count());
        for i in 0..chunk.samples {
            let stream = chunk.own_stream(i, n);
            for quad in 0..per.div_ceil(4) {
                let words = stream.quad(quad as u32);
                let here = 4.min(per - 4 * quad);
                mask.extend(
                    words[..here].iter().map(|&w| if keep(w, threshold) { scale } else { 0.0 }),
                );
            }
        }
        x * Tensor::from_vec(mask, x.shape(), x.device())?.to_dtype(x.dtype())?
    }
}

impl ModuleT for Dropout {
    fn forward_t(&self, x: &Tensor, train: bool) -> Result<Tensor> {
        self.forward(x, train)
    }
}
