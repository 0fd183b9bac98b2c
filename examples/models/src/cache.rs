//! What a decoder remembers of a text: keys and values of its tokens so far, in every block.

use core::ops::Range;

use bdia_core::arena::{Category, Ints, Layout, Reals, product};
use bdia_core::backend::Backend;
use bdia_core::error::{Error, Result};
use bdia_core::layers::{Branches, Cached, CachedContext, Residual};
use bdia_core::stack::{Blocks, Call};

/// Rows follow one another, one for each hypothesis of each text.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cache {
    /// `[blocks][rows, keys, 2 d]`.
    all: Reals,
    /// `[beams, keys, 2 d]`, to change the order of a text's rows; empty where it has one.
    spare: Reals,
    blocks: usize,
    keys: usize,
    width: usize,
}

impl Cache {
    /// For texts of at most `keys` tokens, `beams` rows each.
    pub fn layout(
        blocks: usize,
        [rows, beams]: [usize; 2],
        keys: usize,
        width: usize,
        l: &mut Layout,
    ) -> Result<Self> {
        let spare = if beams > 1 { beams } else { 0 };
        let mut take = |sizes: &[usize]| {
            Ok::<_, Error>(l.reals(Category::Workspace, product("cache", sizes)?))
        };
        Ok(Self {
            all: take(&[blocks, rows, keys, 2, width])?,
            spare: take(&[spare, keys, 2, width])?,
            blocks,
            keys,
            width,
        })
    }

    /// `[rows, keys, 2 d]` of block `k`.
    pub fn of_block(&self, k: usize) -> Reals {
        part(self.all, k, self.blocks)
    }

    /// Some tokens of a row of block `k`: `[tokens, 2 d]`.
    pub fn tokens(&self, k: usize, row: usize, tokens: Range<usize>) -> Reals {
        let first = row * self.keys + tokens.start;
        self.of_block(k).sub(first * 2 * self.width, tokens.len() * 2 * self.width)
    }

    /// Row `first + i` becomes what row `first + order[i]` was, for every `i`. Of some tokens: the
    /// others are the same in all of these rows, or not used.
    pub fn reorder<B: Backend>(
        &self,
        be: &mut B,
        first: usize,
        order: &[usize],
        tokens: Range<usize>,
    ) -> Result<()> {
        let moved = || (0..).zip(order).filter(|&(row, &from)| row != from);
        if tokens.is_empty() || moved().next().is_none() {
            return Ok(());
        }
        let aside = Self { all: self.spare, blocks: 1, ..*self };
        for k in 0..self.blocks {
            for (_, &from) in moved() {
                let kept = self.tokens(k, first + from, tokens.clone());
                be.copy_reals(kept, aside.tokens(0, from, tokens.clone()))?;
            }
            for (row, &from) in moved() {
                let kept = aside.tokens(0, from, tokens.clone());
                be.copy_reals(kept, self.tokens(k, first + row, tokens.clone()))?;
            }
        }
        Ok(())
    }
}

/// Block `k`'s part of what all blocks have.
pub(crate) fn part(all: Reals, k: usize, blocks: usize) -> Reals {
    let per = all.len() / blocks.max(1);
    all.sub(k * per, per)
}

/// The blocks for one more token of every row.
pub(crate) struct Next<'a, P> {
    /// Those of one token.
    pub blocks: &'a Residual<P>,
    pub cache: &'a Cache,
    /// The token's place in each row.
    pub positions: &'a [usize],
    /// Tokens of each row with it, on the backend.
    pub lens: Ints,
    /// `positions` on the backend, where blocks turn by them.
    pub places: Ints,
    /// What a sliding window leaves of each row's text: its first token.
    pub starts: Ints,
    /// `[blocks][rows / beams, positions, 2 d]` of a context and `beams`, where there is one.
    pub context: Option<(Reals, usize)>,
}

impl<B: Backend, P: Branches> Blocks<B> for Next<'_, P> {
    fn residual(&mut self, be: &mut B, call: &Call, h: Reals) -> Result<()> {
        let context = self.context.map(|(all, beams)| CachedContext {
            keys_values: part(all, call.block, self.cache.blocks),
            beams,
        });
        let cached = Cached {
            of: self.cache.of_block(call.block),
            keys: self.cache.keys,
            positions: self.positions,
            lens: self.lens,
            places: self.places,
            starts: self.starts,
            context,
        };
        self.blocks.next(be, call, &cached, h)
    }

    fn vjp(&mut self, _: &mut B, _: &Call, _: Reals, _: Reals) -> Result<()> {
        Err(NO_TRAINING)
    }

    fn done(&mut self, _: &mut B, _: usize) -> Result<()> {
        Err(NO_TRAINING)
    }
}

/// What a decoder answers to a backward pass.
pub(crate) const NO_TRAINING: Error = Error::unfit("pass", "training", "inference, in a decoder");
