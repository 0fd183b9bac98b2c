//! The micro-kernel of AMX: 32 × 32 in four tile registers of sums, over panels of bf16.

use core::arch::asm;
use core::arch::x86_64::{
    _mm512_load_ps, _mm512_mask_storeu_ps, _mm512_setzero_ps, _mm512_store_ps,
};

use super::bf16::{SIDE, TERMS, WIDE, first, pack, start};
use super::{Kernel, Left, Place};
use crate::nn::view::View;

/// See the module. Only where [`is_available`].
pub(in crate::nn) struct Amx;

impl Kernel for Amx {
    const TILE: [usize; 2] = [SIDE, SIDE];
    const UNIT: [usize; 2] = [TERMS, WIDE];
    /// A panel is 48 KiB.
    const DEPTH: usize = 768;
    const PIECE: usize = 384;
    const BLOCK: [usize; 2] = [256, 384];

    unsafe fn begin() {
        // SAFETY: whoever chose this kernel has seen that AMX may be used.
        unsafe { configure() }
    }

    unsafe fn end() {
        // SAFETY: as above.
        unsafe { asm!("tilerelease", options(nomem, nostack, preserves_flags)) }
    }

    unsafe fn pack_rows(from: View, len: usize, terms: usize, out: &mut [f32]) {
        // SAFETY: AMX for bf16 comes with AVX512-BF16; the rest is the caller's promise.
        unsafe { pack::<true>(from.start, [from.row, from.col], len, terms, out) }
    }

    unsafe fn pack_cols(from: View, len: usize, terms: usize, out: &mut [f32]) {
        // SAFETY: as above.
        unsafe { pack::<false>(from.start, [from.col, from.row], len, terms, out) }
    }

    unsafe fn tile(a: Left<'_>, b: &[f32], c: Place) {
        let a = a.panel();
        // SAFETY: as above.
        unsafe { tile(a, b, c) }
    }
}

/// Whether the processor has tiles and products of bf16, and the operating system gives this
/// process their state.
pub(in crate::nn) fn is_available() -> bool {
    #[cfg(target_os = "linux")]
    {
        use core::arch::x86_64::{__cpuid_count, __get_cpuid_max};
        use std::sync::OnceLock;

        /// `ARCH_REQ_XCOMP_PERM` of `asm/prctl.h`, and the number of the tiles' data among the
        /// states of a thread.
        const REQUEST: libc::c_int = 0x1023;
        const TILE_DATA: libc::c_ulong = 18;
        static GRANTED: OnceLock<bool> = OnceLock::new();
        *GRANTED.get_or_init(|| {
            let edx = if __get_cpuid_max(0).0 >= 7 { __cpuid_count(7, 0).edx } else { 0 };
            // AMX-BF16 and AMX-TILE.
            (edx >> 22 & 1 == 1 && edx >> 24 & 1 == 1)
                // SAFETY: it asks for more state in this process's threads, and touches no memory
                // of ours.
                && unsafe { libc::syscall(libc::SYS_arch_prctl, REQUEST, TILE_DATA) } == 0
        })
    }
    #[cfg(not(target_os = "linux"))]
    false
}

/// Eight tiles of 16 rows of 64 bytes.
#[repr(C, align(64))]
struct Config([u8; 64]);

const CONFIG: Config = {
    let mut c = [0; 64];
    c[0] = 1;
    let mut tile = 0;
    while tile < 8 {
        c[16 + 2 * tile] = 64;
        c[48 + tile] = 16;
        tile += 1;
    }
    Config(c)
};

/// Shapes this thread's tile registers.
///
/// # Safety
/// AMX may be used.
unsafe fn configure() {
    static SHAPE: Config = CONFIG;
    // SAFETY: 64 bytes are read; only the tile registers change, which compilers leave alone.
    unsafe { asm!("ldtilecfg [{}]", in(reg) &SHAPE, options(readonly, nostack, preserves_flags)) }
}

/// A tile of `C` that is not where it belongs.
#[repr(C, align(64))]
struct Buffer([f32; SIDE * SIDE]);

/// One tile: what `C` begins with, and its sums on top.
///
/// # Safety
/// AMX is configured; AVX-512F; and as for [`Kernel::tile`].
#[target_feature(enable = "avx512f")]
unsafe fn tile(a: &[f32], b: &[f32], c: Place) {
    // A tile takes too little time for its own values to arrive.
    c.prefetch(SIDE);
    if c.size == [SIDE, SIDE] && c.bias.is_none() {
        // SAFETY: a whole tile of `C`.
        unsafe { sums(a, b, c.start, c.stride, !c.add, &c) };
        return;
    }
    let mut buffer = Buffer([0.0; SIDE * SIDE]);
    let masks = [first(c.size[1]), first(c.size[1].saturating_sub(WIDE))];
    let place = |r: usize, i: usize| c.start.wrapping_add(r * c.stride + i * WIDE);
    for r in 0..c.size[0] {
        for (i, &mask) in masks.iter().enumerate() {
            // SAFETY: the masks end with the tile and with the bias; the buffer has 32 rows of 32.
            unsafe {
                let value = start(&c, mask, place(r, i), i, _mm512_setzero_ps());
                _mm512_store_ps(buffer.0.as_mut_ptr().add(r * SIDE + i * WIDE), value);
            }
        }
    }
    // SAFETY: the buffer is a whole tile.
    unsafe { sums(a, b, buffer.0.as_mut_ptr(), SIDE, false, &c) };
    for r in 0..c.size[0] {
        for (i, &mask) in masks.iter().enumerate() {
            // SAFETY: as above.
            unsafe {
                let value = _mm512_load_ps(buffer.0.as_ptr().add(r * SIDE + i * WIDE));
                _mm512_mask_storeu_ps(place(r, i), mask, value);
            }
        }
    }
}

/// The products of one panel of each operand, on top of a whole tile at `c`, or of 0 with `fresh`.
///
/// # Safety
/// AMX is configured, and nothing else accesses the tile, whose rows are `stride` apart.
unsafe fn sums(a: &[f32], b: &[f32], c: *mut f32, stride: usize, fresh: bool, place: &Place) {
    let blocks = a.len() / (SIDE * WIDE);
    // Two lines ahead are asked for with every block.
    let ahead = place.ahead.len.div_ceil(2).min(blocks);
    let rows = 4 * stride;
    // SAFETY: both panels have `blocks` blocks of 2 KiB: 32 rows of 64 bytes, and 16 lines of 128.
    // All instructions that change tile registers are here, between the configuration and its
    // release.
    unsafe {
        asm!(
            "test {fresh}, {fresh}",
            "jnz 2f",
            "tileloadd tmm0, [{c} + {rows}]",
            "tileloadd tmm1, [{c} + {rows} + 64]",
            "tileloadd tmm2, [{d} + {rows}]",
            "tileloadd tmm3, [{d} + {rows} + 64]",
            "jmp 3f",
            "2:",
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "3:",
            "test {ahead}, {ahead}",
            "jz 5f",
            "4:",
            "tileloadd tmm4, [{a} + {sixty_four}]",
            "tileloadd tmm6, [{b} + 2*{sixty_four}]",
            "prefetcht1 [{p}]",
            "add {p}, {s}",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{b} + 2*{sixty_four} + 64]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tileloadd tmm5, [{a} + {sixty_four} + 1024]",
            "prefetcht1 [{p}]",
            "add {p}, {s}",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "add {a}, 2048",
            "add {b}, 2048",
            "dec {ahead}",
            "jnz 4b",
            "5:",
            "test {n}, {n}",
            "jz 7f",
            "6:",
            "tileloadd tmm4, [{a} + {sixty_four}]",
            "tileloadd tmm6, [{b} + 2*{sixty_four}]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{b} + 2*{sixty_four} + 64]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tileloadd tmm5, [{a} + {sixty_four} + 1024]",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "add {a}, 2048",
            "add {b}, 2048",
            "dec {n}",
            "jnz 6b",
            "7:",
            "tilestored [{c} + {rows}], tmm0",
            "tilestored [{c} + {rows} + 64], tmm1",
            "tilestored [{d} + {rows}], tmm2",
            "tilestored [{d} + {rows} + 64], tmm3",
            a = inout(reg) a.as_ptr() => _,
            b = inout(reg) b.as_ptr() => _,
            c = in(reg) c,
            d = in(reg) c.wrapping_add(16 * stride),
            rows = in(reg) rows,
            sixty_four = in(reg) 64_usize,
            fresh = in(reg) usize::from(fresh),
            p = inout(reg) place.ahead.start => _,
            s = in(reg) 4 * place.ahead.stride,
            ahead = inout(reg) ahead => _,
            n = inout(reg) blocks - ahead => _,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
    const { assert!(TERMS * 2 == 64 && SIDE * 4 == 128) };
}
