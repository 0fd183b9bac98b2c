//! Memory as a plan: handles into three arenas, handed out before anything is allocated.
//!
//! A model is laid out once: every buffer is requested from a [`Layout`], which returns a handle
//! and adds its bytes to a category. Handing out and counting are the same act, so the plan cannot
//! differ from what is used. The finished layout says how long the arenas of a backend must be.
//! Laying out is `const`, so that arenas can be `static`s whose lengths the compiler takes from the
//! plan.

use core::fmt;

use crate::error::{Error, Result};

/// The layout that a handle comes from. A backend refuses handles of another layout.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LayoutId(u32);

impl LayoutId {
    /// No layout in particular: that of handles made by hand and of [`Layout::constant`].
    pub const ANY: Self = Self(0);

    /// Whether a handle of this layout may be used where `other` is laid out.
    pub const fn fits(self, other: Self) -> bool {
        self.0 == 0 || other.0 == 0 || self.0 == other.0
    }

    /// An id that no other layout of this program has, until 2^32 of them have been made.
    fn next() -> Self {
        #[cfg(target_has_atomic = "32")]
        {
            use core::sync::atomic::{AtomicU32, Ordering};
            static LAST: AtomicU32 = AtomicU32::new(0);
            Self(LAST.fetch_add(1, Ordering::Relaxed).wrapping_add(1))
        }
        #[cfg(not(target_has_atomic = "32"))]
        Self::ANY
    }
}

macro_rules! handle {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
        pub struct $name {
            start: usize,
            len: usize,
            layout: LayoutId,
        }

        impl $name {
            /// No values.
            pub const EMPTY: Self = Self::new(0, 0);

            /// A handle to `len` values from `start` in any layout's arena; the backend checks
            /// that they are inside when it is used.
            pub const fn new(start: usize, len: usize) -> Self {
                Self { start, len, layout: LayoutId::ANY }
            }

            /// The layout that handed it out.
            pub const fn layout(self) -> LayoutId {
                self.layout
            }

            /// Index of the first value in its arena.
            pub const fn start(self) -> usize {
                self.start
            }

            /// Number of values.
            pub const fn len(self) -> usize {
                self.len
            }

            /// Whether there are no values.
            pub const fn is_empty(self) -> bool {
                self.len == 0
            }

            /// The values' place in the arena.
            pub const fn range(self) -> core::ops::Range<usize> {
                self.start..self.start.saturating_add(self.len)
            }

            /// `len` values from the `offset`-th on. What lies outside is cut off, so that an
            /// operation that needs it reports a wrong shape.
            pub const fn sub(self, offset: usize, len: usize) -> Self {
                let offset = if offset > self.len { self.len } else { offset };
                let rest = self.len - offset;
                Self {
                    start: self.start.saturating_add(offset),
                    len: if len > rest { rest } else { len },
                    layout: self.layout,
                }
            }
        }
    };
}

handle!(
    /// `i32` values: activations on the grid, tokens, targets.
    Ints
);
handle!(
    /// Floating-point values of the backend's [`Real`](crate::Real) type.
    Reals
);
handle!(
    /// `u32` words: side bits, checksums (two words each, the low one first), packed matrices.
    Words
);

impl Words {
    /// Where handles to memory that is not of the arena begin: beyond every arena.
    const MAPPED: usize = 1 << (usize::BITS - 3);

    /// Whether they lie in memory that the backend is given ([`Layout::mapped`]), which only
    /// [`NnOps::unpack`](crate::NnOps::unpack) and its like read.
    pub const fn is_mapped(self) -> bool {
        self.start >= Self::MAPPED
    }

    /// The place of mapped words among all of these.
    pub const fn mapped(self) -> Option<core::ops::Range<usize>> {
        match self.start.checked_sub(Self::MAPPED) {
            Some(start) => Some(start..start.saturating_add(self.len)),
            None => None,
        }
    }
}

/// What a buffer is for: the rows of the memory table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Category {
    /// Trained values.
    Parameters,
    /// Values of the network that stay as they are.
    Frozen,
    /// Gradients of trained values.
    Gradients,
    /// Moments of the optimizer.
    Optimizer,
    /// Gradients on their way between machines.
    Exchange,
    /// Activations that are stored: the pair `X` of reversible training; everything that the other
    /// modes keep.
    Activations,
    /// The gradients `G` of activations.
    ActivationGradients,
    /// Side bits and checksums.
    SideBits,
    /// Original activations kept by `verify`.
    Verify,
    /// What one chunk of samples needs inside a block.
    Workspace,
    /// Logits, losses, tokens and targets.
    Head,
    /// What the libraries below a backend allocate for themselves, as a bound.
    Library,
}

impl Category {
    /// All, in the order of the table.
    pub const ALL: [Self; 12] = [
        Self::Parameters,
        Self::Frozen,
        Self::Gradients,
        Self::Optimizer,
        Self::Exchange,
        Self::Activations,
        Self::ActivationGradients,
        Self::SideBits,
        Self::Verify,
        Self::Workspace,
        Self::Head,
        Self::Library,
    ];
}

impl fmt::Display for Category {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Parameters => "parameters",
            Self::Frozen => "frozen parameters",
            Self::Gradients => "gradients",
            Self::Optimizer => "optimizer state",
            Self::Exchange => "exchange between ranks",
            Self::Activations => "activations (X)",
            Self::ActivationGradients => "activation gradients (G)",
            Self::SideBits => "side bits and checksums",
            Self::Verify => "originals for --verify",
            Self::Workspace => "block workspace",
            Self::Head => "head and data",
            Self::Library => "library scratch (bound)",
        })
    }
}

/// A plan under construction: lengths of the three arenas and bytes by category.
#[derive(Debug, Clone)]
pub struct Layout {
    id: LayoutId,
    /// Values that have a gradient.
    trained: usize,
    ints: usize,
    reals: usize,
    words: usize,
    mapped: usize,
    real_bytes: usize,
    bytes: [usize; Category::ALL.len()],
    overflow: bool,
}

/// Layouts are equal if the same has been laid out in them, whatever their ids.
impl PartialEq for Layout {
    fn eq(&self, other: &Self) -> bool {
        (self.arenas(), self.mapped) == (other.arenas(), other.mapped)
            && (self.real_bytes, self.bytes, self.overflow)
                == (other.real_bytes, other.bytes, other.overflow)
    }
}

impl Eq for Layout {}

impl Layout {
    /// Handles start at multiples of this many values: 64 bytes of `f32`, a cache line.
    pub const ALIGN: usize = 16;

    /// An empty layout for reals of `real_bytes` bytes ([`Real::BYTES`](crate::Real::BYTES)). Its
    /// handles, and those of its clones, are refused by a backend that was made for another layout.
    pub fn new(real_bytes: usize) -> Self {
        Self { id: LayoutId::next(), ..Self::constant(real_bytes) }
    }

    /// An empty layout for a plan that is computed at compile time. All of these have the same id,
    /// so that handles of one are accepted by a backend for another.
    pub const fn constant(real_bytes: usize) -> Self {
        Self {
            id: LayoutId::ANY,
            trained: 0,
            ints: 0,
            reals: 0,
            words: 0,
            mapped: 0,
            real_bytes,
            bytes: [0; Category::ALL.len()],
            overflow: false,
        }
    }

    /// The id that its handles carry.
    pub const fn id(&self) -> LayoutId {
        self.id
    }

    /// Values that have a gradient: every step has to update all of them.
    pub const fn trained(&self) -> usize {
        self.trained
    }

    pub(crate) const fn count_trained(&mut self, values: usize) {
        // Sizes that overflow are refused where the values themselves are laid out.
        self.trained = self.trained.wrapping_add(values);
    }

    const fn claim(
        &mut self,
        category: Category,
        arena: usize,
        len: usize,
        size: usize,
    ) -> (usize, usize) {
        // Lengths are rounded up so that every handle is aligned; the padding is in the count.
        let padded = match len.checked_next_multiple_of(Self::ALIGN) {
            Some(padded) => padded,
            None => {
                self.overflow = true;
                return (0, 0);
            }
        };
        let end = arena.checked_add(padded);
        let bytes = padded.checked_mul(size);
        match (end, bytes) {
            (Some(end), Some(bytes)) if end <= isize::MAX as usize / 8 => {
                match self.bytes[category as usize].checked_add(bytes) {
                    Some(sum) => self.bytes[category as usize] = sum,
                    None => self.overflow = true,
                }
                (arena, end)
            }
            _ => {
                self.overflow = true;
                (0, arena)
            }
        }
    }

    /// `len` integers.
    pub const fn ints(&mut self, category: Category, len: usize) -> Ints {
        let (start, end) = self.claim(category, self.ints, len, size_of::<i32>());
        self.ints = end;
        Ints { start, len, layout: self.id }
    }

    /// `len` reals.
    pub const fn reals(&mut self, category: Category, len: usize) -> Reals {
        let (start, end) = self.claim(category, self.reals, len, self.real_bytes);
        self.reals = end;
        Reals { start, len, layout: self.id }
    }

    /// `len` words.
    pub const fn words(&mut self, category: Category, len: usize) -> Words {
        let (start, end) = self.claim(category, self.words, len, size_of::<u32>());
        self.words = end;
        Words { start, len, layout: self.id }
    }

    /// `len` words that are not allocated: the backend is given memory that has them
    /// ([`Storage::attach`](crate::Storage::attach)), as a file that is mapped. They are in no
    /// category and not in the [`total`](Self::total).
    pub const fn mapped(&mut self, len: usize) -> Words {
        match len.checked_next_multiple_of(Self::ALIGN) {
            Some(padded) if padded <= isize::MAX as usize / 8 - self.mapped => {
                let start = Words::MAPPED + self.mapped;
                self.mapped += padded;
                Words { start, len, layout: self.id }
            }
            _ => {
                self.overflow = true;
                Words::EMPTY
            }
        }
    }

    /// Makes room in the same arenas for another layout, of something that is used at another time.
    /// Both began as clones of one layout; what they have claimed since then may overlap. Where the
    /// other's arenas are longer, the difference is counted as workspace, so start with the
    /// largest.
    pub const fn cover(&mut self, other: &Self) {
        let mut claims = [
            (&mut self.ints, other.ints, 4),
            (&mut self.reals, other.reals, self.real_bytes),
            (&mut self.words, other.words, 4),
        ];
        let (mut more, mut i) = (0_usize, 0);
        while i < claims.len() {
            let (own, wanted, size) = &mut claims[i];
            if *wanted > **own {
                // Each arena is checked to be far below the address space when it is claimed.
                more = more.saturating_add((*wanted - **own).saturating_mul(*size));
                **own = *wanted;
            }
            i += 1;
        }
        if other.mapped > self.mapped {
            self.mapped = other.mapped;
        }
        self.overflow |= other.overflow;
        self.outside(Category::Workspace, more);
    }

    /// Whether another layout over the same arenas fits into them.
    pub const fn holds(&self, other: &Self) -> bool {
        self.ints >= other.ints
            && self.reals >= other.reals
            && self.words >= other.words
            && self.mapped >= other.mapped
    }

    /// Counts bytes that live outside the arenas.
    pub const fn outside(&mut self, category: Category, bytes: usize) {
        match self.bytes[category as usize].checked_add(bytes) {
            Some(sum) => self.bytes[category as usize] = sum,
            None => self.overflow = true,
        }
    }

    /// Bytes of one category.
    pub const fn bytes(&self, category: Category) -> usize {
        self.bytes[category as usize]
    }

    /// Bytes of all categories.
    pub const fn total(&self) -> usize {
        let (mut sum, mut i) = (0_usize, 0);
        while i < self.bytes.len() {
            sum = sum.saturating_add(self.bytes[i]);
            i += 1;
        }
        sum
    }

    /// Lengths of the arenas: integers, reals, words.
    pub const fn arenas(&self) -> (usize, usize, usize) {
        (self.ints, self.reals, self.words)
    }

    /// [`mapped`](Self::mapped) words, and the unused ones between them.
    pub const fn mapped_words(&self) -> usize {
        self.mapped
    }

    /// The layout itself, if every size fitted.
    ///
    /// # Errors
    /// [`Error::TooLarge`] where a size did not fit the address space.
    pub const fn checked(self) -> Result<Self> {
        if self.overflow || self.total() > isize::MAX as usize {
            return Err(Error::TooLarge("the plan"));
        }
        Ok(self)
    }
}

/// `a·b·c·…` or [`Error::TooLarge`].
///
/// # Errors
/// [`Error::TooLarge`] where the product does not fit `usize`.
pub const fn product(what: &'static str, factors: &[usize]) -> Result<usize> {
    let (mut p, mut i) = (1_usize, 0);
    while i < factors.len() {
        p = match p.checked_mul(factors[i]) {
            Some(p) => p,
            None => return Err(Error::TooLarge(what)),
        };
        i += 1;
    }
    Ok(p)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn handles_are_disjoint_and_counted() {
        let mut l = Layout::new(4);
        let a = l.reals(Category::Parameters, 5);
        let b = l.reals(Category::Gradients, 17);
        let w = l.words(Category::SideBits, 0);
        assert_eq!((a.range(), b.range(), w.len()), (0..5, 16..33, 0));
        assert_eq!(
            (l.bytes(Category::Parameters), l.bytes(Category::Gradients), l.total()),
            (64, 128, 192)
        );
        assert_eq!(b.sub(10, 100).len(), 7);
        assert_eq!(b.sub(100, 1).len(), 0);
    }

    #[test]
    fn mapped_words_are_not_allocated() {
        let mut l = Layout::new(4);
        let a = l.words(Category::Frozen, 3);
        let (b, c) = (l.mapped(5), l.mapped(2));
        assert_eq!((a.is_mapped(), a.mapped()), (false, None));
        assert_eq!((b.mapped(), c.mapped()), (Some(0..5), Some(16..18)));
        assert_eq!(c.sub(1, 9).mapped(), Some(17..18));
        assert_eq!((l.arenas(), l.mapped_words(), l.total()), ((0, 0, 16), 32, 64));
        assert_eq!(l.mapped(usize::MAX / 8), Words::EMPTY);
        assert_eq!(l.checked(), Err(Error::TooLarge("the plan")));
    }

    #[test]
    fn layouts_over_the_same_arenas() {
        let mut base = Layout::new(8);
        let _ = base.reals(Category::Parameters, 16);
        let (mut a, mut b) = (base.clone(), base);
        let first = a.reals(Category::Activations, 64);
        let second = b.reals(Category::Activations, 32);
        let _ = b.ints(Category::Head, 16);
        assert_eq!(first.start(), second.start());
        a.cover(&b);
        assert_eq!((a.arenas(), a.bytes(Category::Workspace)), ((16, 80, 0), 64));
        assert_eq!(a.total(), 16 * 4 + 80 * 8);
    }

    #[test]
    fn absurd_sizes_are_refused() {
        let mut l = Layout::new(4);
        let _ = l.reals(Category::Parameters, usize::MAX - 3);
        assert_eq!(l.checked(), Err(Error::TooLarge("the plan")));
        assert!(product("x", &[usize::MAX, 2]).is_err());
    }
}
