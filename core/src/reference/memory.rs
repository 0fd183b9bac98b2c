//! Memory of a fixed capacity for the reference backend: a `static` on a machine without an
//! allocator.

use heapless::Vec;

use super::Reference;
use crate::arena::Layout;
use crate::error::{Error, Result};
use crate::real::Real;

/// Three arenas of fixed capacity. `const fn new`, so that it can be a `static`; nothing moves over
/// the stack.
#[derive(Debug)]
pub struct Memory<R, const INTS: usize, const REALS: usize, const WORDS: usize> {
    ints: Vec<i32, INTS>,
    reals: Vec<R, REALS>,
    words: Vec<u32, WORDS>,
}

impl<R: Real, const INTS: usize, const REALS: usize, const WORDS: usize>
    Memory<R, INTS, REALS, WORDS>
{
    /// Empty arenas.
    pub const fn new() -> Self {
        Self { ints: Vec::new(), reals: Vec::new(), words: Vec::new() }
    }

    /// A backend over zeroed arenas of the layout's lengths.
    ///
    /// # Errors
    /// [`Error::Shape`] names the arena whose capacity is too small, and the capacity it needs.
    pub fn backend(&mut self, layout: &Layout) -> Result<Reference<'_, R>> {
        let (ints, reals, words) = layout.arenas();
        let full = |what, expected, found| Error::Shape { what, expected, found };
        self.ints.clear();
        self.reals.clear();
        self.words.clear();
        self.ints.resize(ints, 0).map_err(|_| full("capacity of the integer arena", ints, INTS))?;
        self.reals
            .resize(reals, R::zero())
            .map_err(|_| full("capacity of the real arena", reals, REALS))?;
        self.words
            .resize(words, 0)
            .map_err(|_| full("capacity of the word arena", words, WORDS))?;
        Reference::new(layout, &mut self.ints, &mut self.reals, &mut self.words)
    }
}

impl<R: Real, const INTS: usize, const REALS: usize, const WORDS: usize> Default
    for Memory<R, INTS, REALS, WORDS>
{
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arena::Category;

    #[test]
    fn a_capacity_that_is_too_small_is_named() {
        let mut layout = Layout::new(4);
        let _ = layout.reals(Category::Workspace, 20);
        assert!(Memory::<f32, 0, 32, 0>::new().backend(&layout).is_ok());
        let error = Memory::<f32, 0, 31, 0>::new().backend(&layout).unwrap_err();
        assert_eq!(
            error,
            Error::Shape { what: "capacity of the real arena", expected: 32, found: 31 }
        );
    }
}
