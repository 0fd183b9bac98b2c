//! Frozen matrices in few bits: how values are stored, and where a matrix is.
//!
//! Rows are stored one after another, each in whole blocks. All numbers are little-endian; the
//! formats are those of GGUF files (ggml's reference implementation):
//!
//! | packing | values | bytes | value |
//! |---|---|---|---|
//! | `F32`, `F16`, `Bf16` | 1 | 4, 2, 2 | itself |
//! | `Q4_0`, `Q5_0`, `Q8_0` | 32 | 18, 22, 34 | `d·q`, `q` from −8, −16, −128 |
//! | `Q4_1`, `Q5_1` | 32 | 20, 24 | `d·q + m` |
//! | `Q4_K`, `Q5_K` | 256 | 144, 176 | `(d·s)·q − e·t`, `s`, `t` of 6 bits for each 32 values |
//! | `Q6_K` | 256 | 210 | `(d·s)·q`, `s` of 8 bits for each 16 values, `q` from −32 |
//!
//! Unpacking is a fixed sequence of IEEE operations, so it gives the same bits everywhere.

use crate::arena::{Words, product};
use crate::error::{Error, Result};

/// How values are stored; see the [module](self).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(non_camel_case_types, reason = "the formats' own names")]
#[allow(missing_docs, reason = "the table above")]
pub enum Packing {
    F32,
    F16,
    Bf16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q4_K,
    Q5_K,
    Q6_K,
}

impl Packing {
    /// All.
    pub const ALL: [Self; 11] = [
        Self::F32,
        Self::F16,
        Self::Bf16,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q8_0,
        Self::Q4_K,
        Self::Q5_K,
        Self::Q6_K,
    ];

    /// The name, as GGUF has it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
            Self::Q5_0 => "Q5_0",
            Self::Q5_1 => "Q5_1",
            Self::Q8_0 => "Q8_0",
            Self::Q4_K => "Q4_K",
            Self::Q5_K => "Q5_K",
            Self::Q6_K => "Q6_K",
        }
    }

    /// Values of a block.
    pub const fn values(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::Bf16 => 1,
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Q8_0 => 32,
            Self::Q4_K | Self::Q5_K | Self::Q6_K => 256,
        }
    }

    /// Bytes of a block.
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
            Self::Q8_0 => 34,
            Self::Q4_K => 144,
            Self::Q5_K => 176,
            Self::Q6_K => 210,
        }
    }

    /// The most bytes that a block of any packing has.
    pub const LARGEST: usize = 210;

    /// Bytes of a row of `cols` values, which are whole blocks.
    ///
    /// # Errors
    /// [`Error::Setting`] for a number of values that is not whole blocks; [`Error::TooLarge`].
    pub const fn row_bytes(self, cols: usize) -> Result<usize> {
        if !cols.is_multiple_of(self.values()) {
            let possible = "a multiple of the values of a block";
            return Err(Error::setting("values of a packed row", cols as f64, possible));
        }
        product("a packed row", &[cols / self.values(), self.bytes()])
    }

    /// The values of whole blocks; what is left over of either is not touched.
    #[inline]
    pub fn unpack(self, blocks: &[u8], y: &mut [f32]) {
        match self {
            Self::F32 => each(blocks, y, |b: &[u8; 4], [y]: &mut [f32; 1]| {
                *y = f32::from_le_bytes(*b);
            }),
            Self::F16 => each(blocks, y, |b: &[u8; 2], [y]: &mut [f32; 1]| *y = half(*b)),
            Self::Bf16 => each(blocks, y, |b: &[u8; 2], [y]: &mut [f32; 1]| {
                *y = f32::from_bits(u32::from(u16::from_le_bytes(*b)) << 16);
            }),
            Self::Q8_0 => each(blocks, y, |b: &[u8; 34], y: &mut [f32; 32]| {
                let d = half([b[0], b[1]]);
                for (y, q) in y.iter_mut().zip(&b[2..]) {
                    *y = f32::from(*q as i8) * d;
                }
            }),
            Self::Q4_0 => each(blocks, y, |b: &[u8; 18], y: &mut [f32; 32]| {
                let d = half([b[0], b[1]]);
                let (low, high) = y.split_at_mut(16);
                for ((low, high), q) in low.iter_mut().zip(high).zip(&b[2..]) {
                    *low = d * f32::from((q & 15) as i8 - 8);
                    *high = d * f32::from((q >> 4) as i8 - 8);
                }
            }),
            Self::Q4_1 => each(blocks, y, |b: &[u8; 20], y: &mut [f32; 32]| {
                let (d, m) = (half([b[0], b[1]]), half([b[2], b[3]]));
                let (low, high) = y.split_at_mut(16);
                for ((low, high), q) in low.iter_mut().zip(high).zip(&b[4..]) {
                    *low = d * f32::from(q & 15) + m;
                    *high = d * f32::from(q >> 4) + m;
                }
            }),
            Self::Q5_0 => each(blocks, y, |b: &[u8; 22], y: &mut [f32; 32]| {
                let d = half([b[0], b[1]]);
                fifths(&b[2..6], &b[6..], y, |q| d * f32::from(q as i8 - 16));
            }),
            Self::Q5_1 => each(blocks, y, |b: &[u8; 24], y: &mut [f32; 32]| {
                let (d, m) = (half([b[0], b[1]]), half([b[2], b[3]]));
                fifths(&b[4..8], &b[8..], y, |q| d * f32::from(q) + m);
            }),
            Self::Q4_K => each(blocks, y, |b: &[u8; 144], y: &mut [f32; 256]| {
                let (head, qs) = b.split_at(16);
                for (part, y) in y.chunks_exact_mut(32).enumerate() {
                    let (s, t) = scale_and_minimum(head, part);
                    let qs = &qs[part / 2 * 32..][..32];
                    let shift = 4 * (part % 2);
                    for (y, q) in y.iter_mut().zip(qs) {
                        *y = s * f32::from(q >> shift & 15) - t;
                    }
                }
            }),
            Self::Q5_K => each(blocks, y, |b: &[u8; 176], y: &mut [f32; 256]| {
                let (head, rest) = b.split_at(16);
                let (high, qs) = rest.split_at(32);
                for (part, y) in y.chunks_exact_mut(32).enumerate() {
                    let (s, t) = scale_and_minimum(head, part);
                    let qs = &qs[part / 2 * 32..][..32];
                    let shift = 4 * (part % 2);
                    for ((y, q), h) in y.iter_mut().zip(qs).zip(high) {
                        *y = s * f32::from(q >> shift & 15 | (h >> part & 1) << 4) - t;
                    }
                }
            }),
            Self::Q6_K => each(blocks, y, |b: &[u8; 210], y: &mut [f32; 256]| {
                let (low, rest) = b.split_at(128);
                let (high, rest) = rest.split_at(64);
                let (scales, d) = rest.split_at(16);
                let d = half([d[0], d[1]]);
                for (part, y) in y.chunks_exact_mut(16).enumerate() {
                    // Two halves of 128 values; in each, four quarters of 32, of two scales.
                    let (n, quarter, side) = (part / 8, part / 2 % 4, part % 2 * 16);
                    let low = &low[n * 64 + quarter % 2 * 32 + side..][..16];
                    let high = &high[n * 32 + side..][..16];
                    let (shift, second) = (4 * (quarter / 2), 2 * quarter);
                    let s = d * f32::from(scales[n * 8 + quarter * 2 + part % 2] as i8);
                    for ((y, low), high) in y.iter_mut().zip(low).zip(high) {
                        let q = low >> shift & 15 | (high >> second & 3) << 4;
                        *y = s * f32::from(q as i8 - 32);
                    }
                }
            }),
        }
    }
}

/// `f` of every block of `N` bytes and its `V` values.
#[inline]
fn each<const N: usize, const V: usize>(
    blocks: &[u8],
    y: &mut [f32],
    f: impl Fn(&[u8; N], &mut [f32; V]),
) {
    let (blocks, _) = blocks.as_chunks::<N>();
    let (y, _) = y.as_chunks_mut::<V>();
    for (block, y) in blocks.iter().zip(y) {
        f(block, y);
    }
}

/// 32 numbers of five bits, of which `high` has the fifth ones.
#[inline]
fn fifths(high: &[u8], low: &[u8], y: &mut [f32; 32], value: impl Fn(u8) -> f32) {
    let high = high.iter().rev().fold(0_u32, |all, byte| all << 8 | u32::from(*byte));
    let (first, second) = y.split_at_mut(16);
    for (j, ((first, second), q)) in first.iter_mut().zip(second).zip(low).enumerate() {
        *first = value(q & 15 | ((high >> j & 1) << 4) as u8);
        *second = value(q >> 4 | ((high >> (j + 16) & 1) << 4) as u8);
    }
}

/// `d·s` and `e·t` of 32 of a block's 256 values: `d` and `e` of 16 bits, then `s` and `t` of 6.
#[inline]
fn scale_and_minimum(head: &[u8], part: usize) -> (f32, f32) {
    let packed = &head[4..16];
    let (s, t) = if part < 4 {
        (packed[part] & 63, packed[part + 4] & 63)
    } else {
        let (both, low, high) = (packed[part + 4], packed[part - 4], packed[part]);
        (both & 15 | low >> 6 << 4, both >> 4 | high >> 6 << 4)
    };
    (half([head[0], head[1]]) * f32::from(s), half([head[2], head[3]]) * f32::from(t))
}

/// The value of a number of 16 bits (IEEE binary16). Exact.
#[inline]
fn half(bytes: [u8; 2]) -> f32 {
    let bits = u32::from(u16::from_le_bytes(bytes));
    let (sign, exponent, rest) = ((bits & 0x8000) << 16, bits & 0x7C00, (bits & 0x7FFF) << 13);
    // The exponents' biases are 112 apart; a product sets small values right too, which have no
    // leading 1.
    let finite = f32::from_bits(rest) * f32::from_bits((127 + 112) << 23);
    let special = rest | 0x7F80_0000;
    f32::from_bits(sign | if exponent == 0x7C00 { special } else { finite.to_bits() })
}

/// A matrix that is stored in blocks, row after row: an operand of
/// [`NnOps::unpack`](crate::NnOps::unpack).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packed {
    /// How values are stored.
    pub packing: Packing,
    /// [`words_of`](Self::words_of) words; the last one may have bytes that are not used.
    pub words: Words,
    /// Number of rows.
    pub rows: usize,
    /// Values of a row.
    pub cols: usize,
    /// Rows of a head, where the rows of each are stored for rotations of neighbours: rows `2i` and
    /// `2i + 1` are its `i`-th row and that of its second half. 0: rows are in order.
    pub neighbours: usize,
}

impl Packed {
    /// Words of a matrix.
    ///
    /// # Errors
    /// As [`Packing::row_bytes`].
    pub const fn words_of(packing: Packing, rows: usize, cols: usize) -> Result<usize> {
        match packing.row_bytes(cols) {
            Ok(bytes) => match product("a packed matrix", &[rows, bytes]) {
                Ok(bytes) => Ok(bytes.div_ceil(4)),
                Err(error) => Err(error),
            },
            Err(error) => Err(error),
        }
    }

    /// Where row `row` is stored.
    #[inline]
    pub const fn stored(&self, row: usize) -> usize {
        if self.neighbours < 2 {
            return row;
        }
        let (head, at, half) = (row / self.neighbours, row % self.neighbours, self.neighbours / 2);
        head * self.neighbours + if at < half { 2 * at } else { 2 * (at - half) + 1 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_neighbours_are_put_in_order() {
        let p =
            Packed { packing: Packing::F32, words: Words::EMPTY, rows: 12, cols: 1, neighbours: 6 };
        let order: [usize; 12] = core::array::from_fn(|row| p.stored(row));
        assert_eq!(order, [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]);
    }

    #[test]
    fn sizes() {
        for packing in Packing::ALL {
            assert!(packing.bytes() <= Packing::LARGEST);
            let cols = 2 * packing.values();
            assert_eq!(packing.row_bytes(cols), Ok(2 * packing.bytes()));
            assert_eq!(packing.row_bytes(cols + 1).is_err(), packing.values() > 1);
        }
    }
}
