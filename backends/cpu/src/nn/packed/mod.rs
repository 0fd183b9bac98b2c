//! Matrix products over packed panels: each operand is copied once into the order in which the
//! micro-kernel reads it.
//!
//! # The idea
//! `C[rows, cols] = A[rows, inner]·B[inner, cols]` with more rows than columns; otherwise `A` and
//! `B` change places. A tile of `C`, `MR × NR`, is kept in registers; `DEPTH` is the number of
//! inner terms of a panel, `PIECE` the most rows of a piece.
//!
//! ```text
//! for cols' in cols, 1536 at a time:
//!   for terms' in inner, as many times DEPTH as 4 MiB hold:
//!     all threads: pack B[terms', cols'] into panels [term][NR]   shared: the last cache
//!     each thread, for its pieces of at most PIECE rows:
//!       for terms in terms', DEPTH at a time:
//!         pack A[piece, terms] into panels [term][MR]             own: at most 768 KiB
//!         for blocks of the piece and of cols' (BLOCK):           their panels fit in the L2
//!           for each panel b of the block:                        from the L1, or (AVX-512) the L2
//!             for each panel a of the block:                      from the L2
//!               sums[MR][NR] = 0                                  registers
//!               for each term t: sums += a[t]·b[t]                MR values times NR values
//!               C[tile] += sums
//! ```
//!
//! The shorter side is packed for all threads and the longer one piece by piece by whoever
//! multiplies it, so nothing is packed twice, and pieces may be narrow enough for every thread to
//! have some.
//!
//! # What the code adds
//! 1. Edges. Panels are filled up with zeros to whole ones; a tile is cut off where `C` ends.
//! 2. Requests ahead: for the tile of `C` while its sums are made ([`Place::prefetch`]), for the
//!    next terms while a panel is packed, and for the piece that is packed next while this one is
//!    multiplied ([`Ahead`]).
//! 3. Rows of `A` that lie side by side are not packed where a kernel reads them as fast where they
//!    are ([`Kernel::IN_PLACE`]).
//! 4. bf16: a panel's unit is several terms of a row, in the order that the instructions take
//!    ([`Kernel::UNIT`]).
//! 5. [`small`]: one thread packs both operands into its own memory, for attention, which has many
//!    small products at a time.
//!
//! # The same bits for any number of threads
//! An element of `C` is a sum over at most [`Kernel::DEPTH`] terms in their order, added to what
//! the terms before them gave, whichever tile, piece or thread it is in. The number of threads only
//! decides how the longer side is cut.

#[cfg(target_arch = "x86_64")]
pub(super) mod amx;
#[cfg(target_arch = "x86_64")]
pub(super) mod avx512;
#[cfg(target_arch = "x86_64")]
pub(super) mod bf16;
pub(super) mod lanes;
pub(super) mod rounded;

use wide::f32x8;

use super::view::{View, cut};
use crate::Team;
use crate::memory::Shared;
use crate::simd::LANES;

/// Fewest rows or columns of a piece.
const SMALL: usize = 48;
/// Most of the shorter side that is packed at a time.
const SHORT: usize = 1536;
/// Values of the shorter side that are packed at a time, for all threads: 4 MiB.
pub(super) const SHARED: usize = 1 << 20;
/// Values of a thread's own piece: 768 KiB.
pub(super) const OWN: usize = 384 * 512;
/// Panels that a thread packs at a time.
const PANELS: usize = 8;
/// Values of a cache line.
const CACHE_LINE: usize = 16;
/// How many terms ahead values are asked for while they are packed, where terms are far apart, and
/// side by side.
const NEAR: usize = 16;
const FAR: usize = 64;

/// Values of packing memory: what is packed for all, and one piece for each thread.
pub(crate) fn scratch(threads: usize) -> usize {
    SHARED + threads * OWN
}

/// A micro-kernel, and how operands are cut for it.
pub(super) trait Kernel {
    /// Rows and columns of a tile of `C`, which are those of a panel of `A` and of `B`.
    const TILE: [usize; 2];
    /// Inner terms of a row that are stored together, and the values of four bytes that they take;
    /// panels are filled up with zeros to whole ones.
    const UNIT: [usize; 2] = [1, 1];
    /// Most inner terms of a panel.
    const DEPTH: usize;
    /// Most rows or columns of a piece, whole tiles. The number of threads decides how many it has,
    /// which changes no bits.
    const PIECE: usize;
    /// Rows and columns (whole tiles) that are multiplied panel by panel before the next, so that
    /// the L2 cache holds them.
    const BLOCK: [usize; 2];

    /// Makes a thread ready for tiles.
    ///
    /// # Safety
    /// The processor has what the kernel needs.
    unsafe fn begin() {}

    /// Leaves it as it was.
    ///
    /// # Safety
    /// The processor has what the kernel needs.
    unsafe fn end() {}

    /// Copies `len` rows of `A`, `terms` inner terms each, into panels, the last one filled up with
    /// zeros.
    ///
    /// # Safety
    /// The matrix has these values, and nothing writes them meanwhile.
    unsafe fn pack_rows(from: View, len: usize, terms: usize, out: &mut [f32]);

    /// As `pack_rows`, for columns of `B`.
    ///
    /// # Safety
    /// As for `pack_rows`.
    unsafe fn pack_cols(from: View, len: usize, terms: usize, out: &mut [f32]);

    /// Whether [`tile`](Self::tile) reads rows of `A` whose terms lie side by side where they are,
    /// so that they need no panel.
    const IN_PLACE: bool = false;

    /// One tile of `C` over one panel of each operand, or rows of `A` in place.
    ///
    /// # Safety
    /// The processor has what the kernel needs; the place is within `C`, and nothing else accesses
    /// it. Rows in place are there, as many as the tile has and with as many terms as the panel of
    /// `B`; only where the kernel is made for it.
    unsafe fn tile(a: Left<'_>, b: &[f32], c: Place);
}

/// Rows of `A`, from that of a tile on.
#[derive(Clone, Copy)]
pub(super) enum Left<'a> {
    /// A panel.
    Panel(&'a [f32]),
    /// The first row's first term, and the next row so many values further; terms lie side by side.
    InPlace(*const f32, usize),
}

impl<'a> Left<'a> {
    /// The panel, for kernels that take nothing else.
    #[inline(always)]
    fn panel(self) -> &'a [f32] {
        match self {
            Left::Panel(panel) => panel,
            Left::InPlace(..) => &[],
        }
    }

    /// The tile that begins at a row, whose panel has `values` values; a row has `depth`.
    fn from(self, row: usize, depth: usize, values: usize) -> Self {
        match self {
            Left::Panel(panels) => Left::Panel(&panels[row * depth..][..values]),
            Left::InPlace(start, stride) => Left::InPlace(start.wrapping_add(row * stride), stride),
        }
    }
}

/// Values that so many inner terms of a row take in a panel.
const fn values<K: Kernel>(terms: usize) -> usize {
    let [together, values] = K::UNIT;
    terms.div_ceil(together) * values
}

/// A tile of `C`, and what its sums are added to.
#[derive(Clone, Copy)]
pub(super) struct Place<'a> {
    start: *mut f32,
    /// From one row to the next.
    stride: usize,
    /// Rows and columns.
    size: [usize; 2],
    /// Whether `C` itself is added.
    add: bool,
    /// The bias of these columns.
    bias: Option<&'a [f32]>,
    /// What to ask for meanwhile.
    ahead: Lines,
}

impl Place<'_> {
    /// `C` is needed when the sums are there, and neither cache has it: this tile, or the one so
    /// many rows below.
    #[inline(always)]
    fn prefetch(&self, below: usize) {
        let [rows, cols] = self.size;
        for r in below..below + rows {
            let line = self.start.wrapping_add(r * self.stride);
            for col in (0..cols).step_by(16) {
                prefetch(line.wrapping_add(col));
            }
            prefetch(line.wrapping_add(cols - 1));
        }
    }
}

/// The operand that is packed next, whose cache lines are asked for while this one is multiplied.
struct Ahead {
    start: *const f32,
    /// From one row (or column, or term) to the next; the values of one lie side by side.
    stride: usize,
    /// How many there are, and cache lines of each.
    len: usize,
    lines: usize,
    /// Lines that were asked for.
    done: usize,
}

/// Some cache lines, `stride` values apart.
#[derive(Clone, Copy)]
pub(super) struct Lines {
    start: *const f32,
    stride: usize,
    len: usize,
}

impl Ahead {
    /// `len` rows of `terms` values, from `start` on.
    fn new(start: *const f32, [step, inner]: [usize; 2], len: usize, terms: usize) -> Self {
        let (stride, len, values) =
            if inner == 1 { (step, len, terms) } else { (inner, terms, len) };
        Self { start, stride, len, lines: values.div_ceil(CACHE_LINE), done: 0 }
    }

    /// The next `most` lines or fewer.
    fn next(&mut self, most: usize) -> Lines {
        let (line, at) = (self.done / self.len.max(1), self.done % self.len.max(1));
        let len = if line < self.lines { most.min(self.len - at) } else { 0 };
        self.done += len;
        Lines {
            start: self.start.wrapping_add(at * self.stride + line * CACHE_LINE),
            stride: self.stride,
            len,
        }
    }
}

/// Asks for the cache line at an address, which need not be one of ours.
#[inline(always)]
fn prefetch<T>(at: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint; the address is not accessed.
    unsafe {
        core::arch::x86_64::_mm_prefetch::<{ core::arch::x86_64::_MM_HINT_T0 }>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// Copies rows (or columns) `0 .. len` of a matrix, `depth` inner terms each, into panels of `W`:
/// `out[panel][term][W]`. The last panel is filled up with zeros.
///
/// # Safety
/// The matrix has these values, and nothing writes them meanwhile.
unsafe fn pack<const W: usize>(
    start: *const f32,
    step: usize,
    inner: usize,
    len: usize,
    depth: usize,
    out: &mut [f32],
) {
    let (panels, _) = out.as_chunks_mut::<W>();
    for (p, panel) in panels.chunks_mut(depth.max(1)).enumerate() {
        let from = start.wrapping_add(p * W * step);
        let width = W.min(len.saturating_sub(p * W));
        // Where row `i` of this panel has term `k`, or the next panel the term that comes after the
        // last.
        let ahead = |k: usize, i: usize| match k.checked_sub(depth) {
            Some(k) => from.wrapping_add((W + i) * step + k * inner),
            None => from.wrapping_add(i * step + k * inner),
        };
        // SAFETY: `at(i, k)` below is within the matrix, as the caller promises.
        let at = |i: usize, k: usize| unsafe { *from.add(i * step + k * inner) };
        if width < W {
            for (k, line) in panel.iter_mut().enumerate() {
                *line = core::array::from_fn(|i| if i < width { at(i, k) } else { 0.0 });
            }
        } else if step == 1 {
            for (k, line) in panel.iter_mut().enumerate() {
                let next = ahead(k + NEAR, 0);
                for col in (0..W).step_by(CACHE_LINE) {
                    prefetch(next.wrapping_add(col));
                }
                prefetch(next.wrapping_add(W - 1));
                // SAFETY: as above; the values lie side by side.
                *line = unsafe { *from.add(k * inner).cast() };
            }
        } else if inner == 1 {
            // Eight terms of up to eight rows are turned at a time.
            let whole = panel.len() / LANES * LANES;
            let flat = panel.as_flattened_mut();
            for k in (0..whole).step_by(LANES) {
                if k % CACHE_LINE == 0 {
                    (0..W).for_each(|i| prefetch(ahead(k + FAR, i)));
                }
                for first in (0..W).step_by(LANES) {
                    let n = LANES.min(W - first);
                    // SAFETY: as above.
                    let row =
                        |i: usize| f32x8::new(unsafe { *from.add((first + i) * step + k).cast() });
                    let block = f32x8::transpose(core::array::from_fn(|i| {
                        if i < n { row(i) } else { f32x8::ZERO }
                    }));
                    for (t, values) in block.iter().enumerate() {
                        let to = &mut flat[(k + t) * W + first..];
                        // What lies behind a line that is narrower than a register is written by a
                        // later store.
                        match to.first_chunk_mut() {
                            Some(to) => *to = values.to_array(),
                            None => to[..n].copy_from_slice(&values.to_array()[..n]),
                        }
                    }
                }
            }
            for (k, line) in panel.iter_mut().enumerate().skip(whole) {
                *line = core::array::from_fn(|i| at(i, k));
            }
        } else {
            for (k, line) in panel.iter_mut().enumerate() {
                *line = core::array::from_fn(|i| at(i, k));
            }
        }
    }
}

/// What `C` is, and what its sums are added to in one pass.
#[derive(Clone, Copy)]
struct Target<'a> {
    start: *mut f32,
    stride: usize,
    rows: usize,
    cols: usize,
    add: bool,
    bias: Option<&'a [f32]>,
}

/// The rectangle of `C` from row `at[0]` and column `at[1]` on, over one panel of each operand; `a`
/// and `b` begin with the panels of that row and that column, a row or column of which has `depth`
/// values.
///
/// # Safety
/// The processor has what the kernel needs, and nothing else accesses the rectangle.
unsafe fn rectangle<K: Kernel>(
    (a, b): (Left, &[f32]),
    depth: usize,
    c: Target,
    at: [usize; 2],
    [rows, cols]: [usize; 2],
    ahead: &mut Ahead,
) {
    let [tall, broad] = K::BLOCK;
    let [mr, nr] = K::TILE;
    let most = (ahead.len * ahead.lines).div_ceil(rows.div_ceil(mr) * cols.div_ceil(nr));
    for rows_from in (0..rows).step_by(tall) {
        for cols_from in (0..cols).step_by(broad) {
            for col in (cols_from..cols.min(cols_from + broad)).step_by(nr) {
                let b = &b[col * depth..][..nr * depth];
                for row in (rows_from..rows.min(rows_from + tall)).step_by(mr) {
                    let a = a.from(row, depth, mr * depth);
                    let (row, col) = (at[0] + row, at[1] + col);
                    let size = [mr.min(c.rows - row), nr.min(c.cols - col)];
                    let place = Place {
                        start: c.start.wrapping_add(row * c.stride + col),
                        stride: c.stride,
                        size,
                        add: c.add,
                        bias: c.bias.map(|bias| &bias[col..col + size[1]]),
                        ahead: ahead.next(most),
                    };
                    // SAFETY: the caller's promise; the place is cut off where `C` ends.
                    unsafe { K::tile(a, b, place) };
                }
            }
        }
    }
}

/// Rows of `A` from a row and a term on, where the kernel reads them in place.
fn in_place<K: Kernel>(a: View, row: usize, term: usize) -> Option<Left<'static>> {
    (K::IN_PLACE && a.col == 1).then(|| Left::InPlace(a.at(row, term).start, a.row))
}

/// Rows and columns of `C` that [`small`] packs at a time.
const PART: usize = 192;

/// `C (+)= A·B` in this thread, for products of which there are many; the rows of `c` are `stride`
/// apart, and `memory` is one thread's.
///
/// # Safety
/// The processor has what the kernel needs. The operands lie in readable memory, one step of each
/// is 1, and `c` lies in memory that nothing else accesses.
pub(super) unsafe fn small<K: Kernel>(
    [rows, cols, inner]: [usize; 3],
    a: View,
    b: View,
    c: *mut f32,
    stride: usize,
    accumulate: bool,
    memory: &mut [f32],
) {
    const {
        let [mr, nr] = K::TILE;
        assert!(
            PART.is_multiple_of(mr)
                && PART.is_multiple_of(nr)
                && 2 * PART * values::<K>(K::DEPTH) <= OWN
        );
    }
    let (left, right) = memory.split_at_mut(OWN / 2);
    let [mr, nr] = K::TILE;
    let terms = cut(inner, K::DEPTH, K::UNIT[0]);
    // SAFETY: the caller's promises, for parts of the operands.
    unsafe {
        K::begin();
        for row in (0..rows).step_by(PART) {
            let tall = PART.min(rows - row);
            for col in (0..cols).step_by(PART) {
                let broad = PART.min(cols - col);
                for k in (0..inner).step_by(terms) {
                    let n = terms.min(inner - k);
                    let depth = values::<K>(n);
                    let left = match in_place::<K>(a, row, k) {
                        Some(left) => left,
                        None => {
                            let left = &mut left[..tall.next_multiple_of(mr) * depth];
                            K::pack_rows(a.at(row, k), tall, n, left);
                            Left::Panel(left)
                        }
                    };
                    let right = &mut right[..broad.next_multiple_of(nr) * depth];
                    K::pack_cols(b.at(k, col), broad, n, right);
                    let target = Target {
                        start: c,
                        stride,
                        rows,
                        cols,
                        add: accumulate || k > 0,
                        bias: None,
                    };
                    let mut ahead = Ahead::new(a.start, [1, 1], 0, 0);
                    rectangle::<K>(
                        (left, right),
                        depth,
                        target,
                        [row, col],
                        [tall, broad],
                        &mut ahead,
                    );
                }
            }
        }
        K::end();
    }
    if inner == 0 && !accumulate {
        for row in 0..rows {
            // SAFETY: a row of `c`.
            unsafe { core::slice::from_raw_parts_mut(c.wrapping_add(row * stride), cols) }
                .fill(0.0);
        }
    }
}

/// `C (+)= A·B (+ bias)` for dense `c`, over the threads; `memory` holds [`scratch`] values.
///
/// # Safety
/// The processor has what the kernel needs.
pub(super) unsafe fn product<K: Kernel>(
    team: &Team,
    [rows, cols, inner]: [usize; 3],
    a: View,
    b: View,
    bias: Option<&[f32]>,
    c: &mut [f32],
    accumulate: bool,
    memory: &mut [f32],
) {
    const {
        let [mr, nr] = K::TILE;
        assert!(K::PIECE.is_multiple_of(mr) && K::PIECE.is_multiple_of(nr));
        let depth = values::<K>(K::DEPTH);
        assert!(K::PIECE * depth <= OWN && (SHORT + mr + nr) * depth <= SHARED);
    }
    if inner == 0 {
        for row in c.chunks_mut(cols) {
            if !accumulate {
                row.fill(0.0);
            }
            row.iter_mut().zip(bias.unwrap_or(&[])).for_each(|(c, bias)| *c += bias);
        }
        return;
    }
    let (shared, slots) = memory.split_at_mut(SHARED);
    let (shared, slots) = (Shared::new(shared), Shared::new(slots));
    let c = &Shared::new(c);
    // The longer side is cut into pieces, of which each thread packs its own.
    let by_rows = rows > cols;
    let (short, long) = if by_rows { (cols, rows) } else { (rows, cols) };
    let [mr, nr] = K::TILE;
    let (short_unit, long_unit) = if by_rows { (nr, mr) } else { (mr, nr) };
    let pieces = long.div_ceil(K::PIECE).max(2).next_multiple_of(team.threads);
    let piece = long.div_ceil(pieces.max(2 * team.threads)).max(SMALL).next_multiple_of(long_unit);
    let short_step = cut(short, SHORT, short_unit);
    let terms = cut(inner, K::DEPTH, K::UNIT[0]);
    let (steps, depth) = (inner.div_ceil(terms), values::<K>(terms));
    let pack_rows = |from: usize, len: usize, k: usize, n: usize, out: &mut [f32]| {
        // SAFETY: a panel's rows are rows of the operand, which the caller checked.
        unsafe { K::pack_rows(a.at(from, k), len, n, out) }
    };
    let pack_cols = |from: usize, len: usize, k: usize, n: usize, out: &mut [f32]| {
        // SAFETY: as above, for columns.
        unsafe { K::pack_cols(b.at(k, from), len, n, out) }
    };
    for from in (0..short).step_by(short_step) {
        let len = short_step.min(short - from);
        let padded = len.next_multiple_of(short_unit);
        let panels = padded / short_unit;
        let at_once = (SHARED / (padded * depth)).max(1);
        for first in (0..steps).step_by(at_once) {
            let now = at_once.min(steps - first);
            // Where step `s` is: from `k` on, `n` inner terms.
            let step = |s: usize| (s * terms, terms.min(inner - s * terms));
            // Rows that are read in place are not packed.
            let groups = if !by_rows && in_place::<K>(a, 0, 0).is_some() {
                0
            } else {
                panels.div_ceil(PANELS)
            };
            team.each(now * groups, |_, i| {
                let (s, panel) = (i / groups, i % groups * PANELS);
                let (k, n) = step(first + s);
                let (at, width) = (panel * short_unit, PANELS.min(panels - panel) * short_unit);
                // SAFETY: panels are disjoint.
                let out = unsafe {
                    shared.part(s * depth * padded + at * values::<K>(n), width * values::<K>(n))
                };
                let len = width.min(len - at);
                if by_rows {
                    pack_cols(from + at, len, k, n, out)
                } else {
                    pack_rows(from + at, len, k, n, out)
                }
            });
            team.each(long.div_ceil(piece), |slot, i| {
                let at = i * piece;
                let width = piece.min(long - at);
                // SAFETY: the caller's promise.
                unsafe { K::begin() };
                for s in 0..now {
                    let (k, n) = step(first + s);
                    let values = values::<K>(n);
                    // SAFETY: the slot is this thread's while the piece runs; what is shared is
                    // only read now.
                    let (own, all) = unsafe {
                        let own =
                            slots.part(slot * OWN, width.next_multiple_of(long_unit) * values);
                        (own, shared.view(s * depth * padded, padded * values))
                    };
                    let left = in_place::<K>(a, if by_rows { at } else { from }, k);
                    match (by_rows, left) {
                        (true, None) => pack_rows(at, width, k, n, own),
                        (true, Some(_)) => {}
                        (false, _) => pack_cols(at, width, k, n, own),
                    }
                    let start = first + s == 0;
                    let (add, bias) = (accumulate || !start, bias.filter(|_| start));
                    let target = Target { start: c.pointer(), stride: cols, rows, cols, add, bias };
                    // The next step, or what is most likely this thread's next piece.
                    let (next, (k, n)) = if s + 1 < now {
                        (at, step(first + s + 1))
                    } else {
                        (at + width, step(first))
                    };
                    let broad = piece.min(long - next);
                    let mut ahead = if by_rows {
                        Ahead::new(a.at(next, k).start, [a.row, a.col], broad, n)
                    } else {
                        Ahead::new(b.at(k, next).start, [b.col, b.row], broad, n)
                    };
                    // SAFETY: pieces are disjoint rectangles of `C`.
                    unsafe {
                        if by_rows {
                            let left = left.unwrap_or(Left::Panel(own));
                            rectangle::<K>(
                                (left, all),
                                values,
                                target,
                                [at, from],
                                [width, len],
                                &mut ahead,
                            );
                        } else {
                            let left = left.unwrap_or(Left::Panel(all));
                            rectangle::<K>(
                                (left, own),
                                values,
                                target,
                                [from, at],
                                [len, width],
                                &mut ahead,
                            );
                        }
                    }
                }
                // SAFETY: as above.
                unsafe { K::end() };
            });
        }
    }
}
