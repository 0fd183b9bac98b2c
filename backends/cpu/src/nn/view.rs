//! Operands of products, and how a product is cut.

use bdia_core::backend::Order;

/// A matrix that is read.
#[derive(Clone, Copy)]
pub(crate) struct View {
    pub(crate) start: *const f32,
    /// From one row to the next.
    pub(crate) row: usize,
    /// From one column to the next.
    pub(crate) col: usize,
}

// SAFETY: it is only read, and whoever reads it promises that the memory is there.
unsafe impl Send for View {}
// SAFETY: as above.
unsafe impl Sync for View {}

impl View {
    /// A dense operand `[rows, cols]`.
    pub(crate) fn dense(x: &[f32], order: Order, rows: usize, cols: usize) -> Self {
        let (row, col) = match order {
            Order::Plain => (cols, 1),
            Order::Transposed => (1, rows),
        };
        Self { start: x.as_ptr(), row, col }
    }

    pub(crate) fn at(self, row: usize, col: usize) -> Self {
        Self { start: self.start.wrapping_add(row * self.row + col * self.col), ..self }
    }
}

/// How a dimension is cut: into equal pieces of at most `most`, a multiple of `step`.
pub(crate) fn cut(len: usize, most: usize, step: usize) -> usize {
    len.div_ceil(len.div_ceil(most).max(1)).next_multiple_of(step).max(step)
}
