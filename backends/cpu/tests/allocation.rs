//! No operation allocates, except the packing of matrix products, which stays within its bound. The
//! allocator counts the whole process, so this is a program without a test harness: its threads are
//! this one and the backend's.
#![allow(clippy::unwrap_used)]

use core::alloc::{GlobalAlloc, Layout as Block};
use core::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::alloc::System;

use bdia_core::backend::{
    Attention, Columns, CrossEntropy, Gate, Gelu, Mask, Order, Product, RmsNorm, Rotary,
};
use bdia_core::optim::{Rule, Update};
use bdia_core::rng::Draw;
use bdia_core::{
    Category, Chunk, Gamma, Grid, Ints, Layout, NnOps, OptimOps, Reals, Sign, Site, State, Storage,
    UpdateOps,
};
use bdia_cpu::Cpu;

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);
static CALLS: AtomicUsize = AtomicUsize::new(0);

/// The system's allocator, counted.
struct Counted;

// SAFETY: every call is the system allocator's.
unsafe impl GlobalAlloc for Counted {
    unsafe fn alloc(&self, block: Block) -> *mut u8 {
        CALLS.fetch_add(1, Relaxed);
        PEAK.fetch_max(NOW.fetch_add(block.size(), Relaxed) + block.size(), Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.alloc(block) }
    }

    unsafe fn dealloc(&self, at: *mut u8, block: Block) {
        NOW.fetch_sub(block.size(), Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(at, block) }
    }
}

#[global_allocator]
static ALLOCATOR: Counted = Counted;

/// Calls of the allocator, and bytes above what there was, while `f` runs.
fn counted(f: impl FnOnce()) -> (usize, usize) {
    let (calls, before) = (CALLS.load(Relaxed), NOW.load(Relaxed));
    PEAK.store(before, Relaxed);
    f();
    (CALLS.load(Relaxed) - calls, PEAK.load(Relaxed) - before)
}

fn main() {
    // Where the system tells.
    let threads = std::fs::read_dir("/proc/self/task").map_or(1, Iterator::count);
    assert_eq!(threads, 1, "other threads would be counted");
    const N: usize = 100_000;
    let mut l = Layout::new(4);
    let [x] = [0; 1].map(|_| l.ints(Category::Workspace, N));
    let [a, b, c, d] = [0; 4].map(|_| l.reals(Category::Workspace, N));
    let (side, sum) =
        (l.words(Category::Workspace, N.div_ceil(32)), l.words(Category::Workspace, 2));
    let codes = l.words(Category::Optimizer, N / 2);
    let (matrix_a, matrix_b) =
        (l.reals(Category::Workspace, 900 * 2000), l.reals(Category::Workspace, 2000 * 1300));
    let matrix_c = l.reals(Category::Workspace, 900 * 1300);
    let attention = Attention {
        draw: Draw::AttentionDropout,
        heads: 2,
        kv_heads: 2,
        starts: Ints::EMPTY,
        head_dim: 50,
        queries: 333,
        keys: 333,
        mask: Mask::Causal,
        key_lens: Ints::EMPTY,
        dropout: 0.1,
        temperature: Reals::EMPTY,
        temperature_grad: Reals::EMPTY,
    };
    let columns = |of, at| Columns { of, stride: 300, at };
    let (scratch, lse) = (
        l.reals(Category::Workspace, Cpu::attention_scratch(&attention, 1, 3)),
        l.reals(Category::Workspace, 2 * 333),
    );
    let chunk = Chunk {
        seed: 1,
        step: 0,
        stack: 0,
        site: Site::Block(1),
        first: 0,
        samples: 1,
        global: 0,
        frame: 0,
    };
    let (grid, gamma) = (Grid::new(14).unwrap(), Gamma::new(1, Sign::Random).unwrap());

    for threads in [1, 3] {
        let mut cpu = Cpu::new(&l, threads).unwrap();
        // Lazily made things are made.
        cpu.fill_reals(a, 0.5).unwrap();
        let (calls, bytes) = counted(|| {
            cpu.quantize(&chunk, grid, a, x, sum).unwrap();
            cpu.step(&chunk, grid, gamma, x, a, b, side, sum).unwrap();
            cpu.inverse(&chunk, grid, gamma, x, a, b, side, sum).unwrap();
            cpu.blend(&chunk, gamma.float(), a, b, c).unwrap();
            cpu.combine(&chunk, gamma.float(), a, b, c).unwrap();
            cpu.dropout(&chunk, Draw::EmbeddingDropout, 0.1, a).unwrap();
            cpu.gelu(Gelu::Tanh, a, b).unwrap();
            cpu.gelu_vjp(Gelu::Exact, a, b).unwrap();
            let (w, bias, stats) = (c.sub(0, 100), c.sub(100, 100), d.sub(0, 2 * N / 100));
            cpu.layer_norm(1e-5, w, bias, a, b, stats).unwrap();
            cpu.layer_norm_vjp(d.sub(50_000, 100), a, stats, b, matrix_a.sub(0, N), w, bias)
                .unwrap();
            let norm = RmsNorm { groups: 2, width: 50, eps: 1e-5, offset: 0.0 };
            let [u, y, dx] =
                [a, b, matrix_a.sub(0, N)].map(|of| Columns { of, stride: 100, at: 0 });
            let (w, dw, stats) = (c.sub(0, 50), c.sub(100, 50), d.sub(0, 2 * N / 100));
            cpu.rms_norm(&norm, w, u, y, stats).unwrap();
            cpu.rms_norm_vjp(&norm, w, u, stats, y, dx, dw).unwrap();
            let rotary = Rotary { heads: 2, head_dim: 50, tokens: N / 100, back: false };
            cpu.rotate(&chunk, &rotary, matrix_b.sub(0, N / 2), Ints::EMPTY, u).unwrap();
            cpu.gated(Gate::Silu, a, b, c).unwrap();
            cpu.gated_vjp(Gate::Gelu(Gelu::Exact), a, b, c, d).unwrap();
            let ce = CrossEntropy { vocab: 1000, tokens: 100, row: 0, scale: 1.0, smoothing: 0.1 };
            cpu.cross_entropy(&chunk, &ce, a, x.sub(0, 100), c.sub(0, 100)).unwrap();
            for rule in [Rule::SET_ADAM, Rule::ADAM_W_8BIT, Rule::ADAFACTOR] {
                let [first, second] = rule.state(100, N / 100).reals;
                let mut state = State::of(c.sub(0, first), d.sub(0, second));
                if rule == Rule::ADAM_W_8BIT {
                    state.codes = [codes.sub(0, N / 4), codes.sub(N / 4, N / 4)];
                }
                let update = Update { rule, t: 1, lr: 0.1, decay: 0.1, scale: 1.0 };
                cpu.update(&update, [100, N / 100], a, b, &state).unwrap();
            }
            cpu.sum_squares(Site::Head, a, b.sub(0, 1)).unwrap();
        });
        if threads == 1 {
            assert_eq!(calls, 0, "allocations");
        } else {
            // The queue through which work enters the threads grows by a small block now and then.
            assert!(bytes < 16 << 10, "{bytes} bytes in {calls} allocations");
        }
        for order in [
            (Order::Plain, Order::Plain),
            (Order::Plain, Order::Transposed),
            (Order::Transposed, Order::Plain),
        ] {
            let p = Product {
                rows: 900,
                cols: 1300,
                inner: 2000,
                a: order.0,
                b: order.1,
                accumulate: false,
            };
            let (_, bytes) =
                counted(|| cpu.matmul(&p, matrix_a, matrix_b, None, matrix_c).unwrap());
            assert!(
                bytes <= Cpu::library_bytes(threads),
                "{order:?}, {threads} threads: {bytes} bytes"
            );
        }
        let (q, out, dout) = (
            matrix_a.sub(0, 333 * 300),
            matrix_b.sub(0, 333 * 100),
            matrix_b.sub(50_000, 333 * 100),
        );
        let (of, g) = (
            [0, 100, 200].map(|at| columns(q, at)),
            [0, 100, 200].map(|at| columns(matrix_c.sub(0, 333 * 300), at)),
        );
        let (_, bytes) = counted(|| {
            cpu.attention(&chunk, &attention, of[0], of[1], of[2], out, lse, scratch).unwrap();
            cpu.attention_vjp(
                &chunk, &attention, of[0], of[1], of[2], out, lse, dout, g[0], g[1], g[2], scratch,
            )
            .unwrap();
        });
        assert!(bytes <= Cpu::library_bytes(threads), "{bytes} bytes");
    }
}
