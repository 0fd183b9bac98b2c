//! Fitting a step into a memory budget.
//!
//! The plan itself is the [`Layout`] that a model's buffers come from; here it is decided which of
//! the possible layouts is used.

use crate::arena::Layout;
use crate::error::{Error, Result};

/// What can be chosen without changing what is computed, except the rounding of gradient sums.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Choice {
    /// Samples processed together inside a block.
    pub chunk: usize,
    /// Rows of logits that exist at a time.
    pub head_rows: usize,
    /// Tokens that the parts of a block which treat each token alone take at a time
    /// ([`Residual::in_token_chunks`](crate::layers::Residual::in_token_chunks)); `None`: all of
    /// the chunk.
    pub token_chunk: Option<usize>,
}

impl Choice {
    /// Samples and rows of logits at a time, and every token of these samples.
    pub const fn new(chunk: usize, head_rows: usize) -> Self {
        Self { chunk, head_rows, token_chunk: None }
    }

    /// Whether it is one for `batch` samples of `tokens` tokens.
    pub fn fits(&self, batch: usize, tokens: usize) -> bool {
        (1..=batch).contains(&self.chunk)
            && (1..=self.chunk.saturating_mul(tokens)).contains(&self.head_rows)
            && self.token_chunk.is_none_or(|n| (1..=tokens).contains(&n))
    }
}

/// What a backend is fastest with, where memory does not matter ([`crate::NnOps::rows`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rows {
    /// Rows of a chunk.
    pub chunk: usize,
    /// Rows of logits.
    pub head: usize,
}

impl Rows {
    /// Enough for full-speed matrix products of a processor, few enough for its caches.
    pub const CACHED: Self = Self { chunk: 1024, head: 192 };

    /// From the fastest choice to the smallest, for `batch` samples of `tokens` tokens.
    pub fn choices(self, batch: usize, tokens: usize) -> impl Iterator<Item = Choice> {
        let tokens = tokens.max(1);
        let most = (self.chunk / tokens).clamp(1, batch.max(1));
        let halves =
            |n: usize| core::iter::successors(Some(n), |n| (*n > 1).then(|| n.div_ceil(2)));
        let rows = move |chunk| {
            let most = self.head.min(chunk * tokens);
            halves(most).take_while(move |&r| r >= 8 || r == most)
        };
        // Few rows of logits cost more than parts of a block that are computed twice.
        let many = move |r: &usize| *r >= 48;
        let whole = move |chunk, r| Choice::new(chunk, r);
        let token_chunks = move || halves(tokens).skip(1).take_while(|&n| n >= 128).map(Some);
        let last = token_chunks().last().flatten();
        (halves(most).flat_map(move |c| rows(c).filter(many).map(move |r| whole(c, r))))
            .chain(token_chunks().flat_map(move |token_chunk| {
                rows(1).filter(many).map(move |r| Choice { token_chunk, ..whole(1, r) })
            }))
            .chain(halves(most).flat_map(move |c| {
                rows(c).filter(move |r| !many(r)).map(move |r| match (c, last) {
                    (1, Some(_)) => Choice { token_chunk: last, ..whole(c, r) },
                    _ => whole(c, r),
                })
            }))
    }
}

/// The first choice whose layout has at most `budget` bytes, with what `make` built for it.
///
/// # Errors
/// [`Error::Budget`] names the smallest possible plan; errors of `make` are passed on.
pub fn fit<T>(
    budget: Option<usize>,
    choices: impl Iterator<Item = Choice>,
    mut make: impl FnMut(Choice) -> Result<(T, Layout)>,
) -> Result<(Choice, T, Layout)> {
    let mut minimum = usize::MAX;
    for choice in choices {
        let (built, layout) = make(choice)?;
        let layout = layout.checked()?;
        minimum = minimum.min(layout.total());
        if budget.is_none_or(|b| layout.total() <= b) {
            return Ok((choice, built, layout));
        }
    }
    Err(Error::Budget { budget: budget.unwrap_or(0), minimum })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arena::Category;

    #[test]
    fn the_largest_that_fits_is_chosen() {
        let make = |c: Choice| {
            let mut l = Layout::new(4);
            let _ = l.reals(Category::Workspace, c.chunk * 1000 + c.head_rows * 16);
            Ok((c.chunk, l))
        };
        let pick = |budget| fit(budget, Rows::CACHED.choices(8, 64), make);
        assert_eq!(pick(None).unwrap().0, Choice::new(8, Rows::CACHED.head));
        let (c, built, l) = pick(Some(20_000)).unwrap();
        assert!(l.total() <= 20_000 && built == c.chunk && c.chunk == 4, "{c:?}");
        assert_eq!(pick(Some(100)).unwrap_err(), Error::Budget { budget: 100, minimum: 4544 });
    }
}
