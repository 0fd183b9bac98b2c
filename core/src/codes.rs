//! Moments of an optimizer in 8 bits: dynamic codes over blocks of values (Dettmers et al. 2022,
//! arXiv 2110.02861; the tables of bitsandbytes' `create_dynamic_map`).
//!
//! The values of a tensor are cut, in their order, into blocks of [`BLOCK`]. A block keeps its
//! largest magnitude `a`, and of each value `x` the code whose table entry is nearest to `x/a`:
//! values over seven powers of ten, with more digits the larger they are. A block of zeros has
//! `a = 0`, whatever its codes.
//!
//! ```
//! use bdia_core::codes::{SIGNED, UNSIGNED, first, nearest, second};
//!
//! assert_eq!((SIGNED[127], SIGNED[255], UNSIGNED[0], UNSIGNED[255]), (0.0, 1.0, 0.0, 1.0));
//! assert_eq!(nearest(&UNSIGNED, 0.9999), 255);
//! // Neither a negative first moment nor a second moment becomes 0.
//! assert_eq!((nearest(&SIGNED, -1e-9), first(-1e-9)), (127, 126));
//! assert_eq!((nearest(&UNSIGNED, 1e-9), second(1e-9), second(0.0)), (0, 1, 0));
//! ```

/// Values that share a largest magnitude.
pub const BLOCK: usize = 256;

/// Tensors with fewer values keep their moments as reals, as bitsandbytes' `min_8bit_size` has it:
/// there is little to save.
pub const LEAST: usize = 4096;

/// Codes in a word, the first one in its lowest byte. Those beyond the end of a tensor are 0.
pub const PER_WORD: usize = 4;

/// The code of 0 in [`SIGNED`].
pub const ZERO: u8 = 127;

/// Values of the codes of first moments, ascending: 0, 1, and `±10^(d-6)` times the middles of
/// `2^d` equal parts of `[0.1, 1]` for `d = 0 … 6`.
pub static SIGNED: [f32; 256] = table(true);

/// Values of the codes of second moments, ascending: 0, 1, and `10^(d-6)` times the middles of
/// `2·2^d` equal parts of `[0.1, 1]` for `d = 0 … 6`.
pub static UNSIGNED: [f32; 256] = table(false);

/// Computed in `f64` and rounded once, which is up to two units in the last place of what
/// bitsandbytes has, who multiply in `f32`.
const fn table(signed: bool) -> [f32; 256] {
    let mut values = [0.0; 256];
    let mut next = if signed { ZERO as usize + 1 } else { 1 };
    let (mut scale, mut parts) = (1e6, if signed { 1 } else { 2 });
    while next < 255 {
        let mut part = 0;
        while part < parts {
            let middle = 0.1 + 0.9 * (2 * part + 1) as f64 / (2 * parts) as f64;
            values[next] = (middle / scale) as f32;
            if signed {
                values[2 * ZERO as usize - next] = -values[next];
            }
            next += 1;
            part += 1;
        }
        scale /= 10.0;
        parts *= 2;
    }
    values[255] = 1.0;
    values
}

/// What lies between code `i` and the one above it.
pub const fn between(table: &[f32; 256], i: usize) -> f32 {
    0.5 * (table[i] + table[i + 1])
}

/// The code whose value is nearest to `x`; of two, the lower one.
pub fn nearest(table: &[f32; 256], x: f32) -> u8 {
    let (mut code, mut step) = (0, 128);
    while step > 0 {
        if between(table, code + step - 1) < x {
            code += step;
        }
        step /= 2;
    }
    code as u8
}

/// The code of a first moment `x`. As in bitsandbytes a negative one does not become 0 but the
/// least negative code.
pub fn first(x: f32) -> u8 {
    keep_sign(nearest(&SIGNED, x), x)
}

/// The code of a first moment whose nearest one is `code`.
pub const fn keep_sign(code: u8, x: f32) -> u8 {
    if x < 0.0 && code == ZERO { ZERO - 1 } else { code }
}

/// The code of a second moment `x`. A positive one does not become 0 but the least positive code.
///
/// This is not bitsandbytes', which has 0 for what is below 1.6e-7. A first moment of the same
/// value is kept down to 2.75e-7, where gradients are the roots of second moments, so there a step
/// of `m/(√0 + ε)` follows if the next gradient is 0: tens of thousands of times the learning rate.
pub fn second(x: f32) -> u8 {
    nearest(&UNSIGNED, x).max(u8::from(x > 0.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_by_hand() {
        // d = 0: one part whose middle is 0.55; d = 1: two, 0.325 and 0.775.
        assert_eq!(SIGNED[128..131], [0.55e-6, 3.25e-6, 7.75e-6]);
        assert_eq!(SIGNED[124..128], [-7.75e-6, -3.25e-6, -0.55e-6, 0.0]);
        assert_eq!(UNSIGNED[..4], [0.0, 0.325e-6, 0.775e-6, 2.125e-6]);
        assert_eq!(SIGNED[254], (1.0 - 0.45 / 64.0) as f32);
        assert_eq!(UNSIGNED[254], (1.0 - 0.45 / 128.0) as f32);
        assert_eq!(SIGNED[0], -SIGNED[254]);
        for table in [&SIGNED, &UNSIGNED] {
            assert!(table.is_sorted_by(|a, b| a < b));
        }
    }

    #[test]
    fn every_code_is_its_own_and_ties_go_down() {
        for table in [&SIGNED, &UNSIGNED] {
            for code in 0..=255 {
                assert_eq!(nearest(table, table[usize::from(code)]), code);
            }
            for code in 0..255 {
                let middle = between(table, usize::from(code));
                assert_eq!(nearest(table, middle), code);
                assert_eq!(nearest(table, middle.next_up()), code + 1);
            }
            assert_eq!((nearest(table, -9.0), nearest(table, 9.0)), (0, 255));
        }
        assert_eq!((first(0.0), first(-0.0), first(1e-9), first(-0.3e-6)), (127, 127, 127, 126));
        assert_eq!((first(-1.0), first(1.0)), (0, 255));
        assert_eq!((second(0.0), second(1e-30), second(0.4e-6), second(1.0)), (0, 1, 1, 255));
    }
}
