//! [`NnOps`]: products through cuBLAS, everything else in kernels of our own.

use bdia_core::backend::{
    Attention, Columns, CrossEntropy, Gate, Gelu, Mask, Order, Product, RmsNorm, Rotary,
};
use bdia_core::plan::Rows;
use bdia_core::rng::{Draw, drop_threshold};
use bdia_core::{Chunk, Error, Ints, NnOps, Packed, Packing, Reals, Result};

use crate::device::{AT_ONCE, BLOCKS, Kernel, THREADS, arg};
use crate::products::{Factor, Gemm, Precision, padded};
use crate::span::{Attend, Matrix, Span, Streams};
use crate::status::{Cause, Code, MOST};
use crate::{Cuda, SCRATCH};

/// Warps of a block.
const WARPS: usize = THREADS as usize / 32;
/// The widest head that the attention kernels have room for.
const MOST_HEAD: usize = 256;
/// Threads of a block that has a row of logits, as in `nn.cu`.
const LOSS_THREADS: u32 = 512;
/// Threads that the gradient of a normalization has for a row, as in `nn.cu`.
const ROW_THREADS: usize = 128;
/// Rows that are summed by one block before partial sums are combined.
const ROWS: usize = 256;

/// A size that kernels take as 32 bits.
fn small(what: &'static str, n: usize) -> Result<u32> {
    if n < 1 << 31 { Ok(n as u32) } else { Err(Error::TooLarge(what)) }
}

/// Rows that a report can name.
fn reportable(what: &'static str, rows: usize) -> Result<u32> {
    if rows < MOST { Ok(rows as u32) } else { Err(Error::TooLarge(what)) }
}

/// Columns as kernels see them.
fn matrix(what: &'static str, c: Columns) -> Result<Matrix> {
    Ok(Matrix { stride: small(what, c.stride)?, at: c.at as u32 })
}

/// Blocks of a kernel that takes `n` values one by one.
pub(crate) fn blocks(n: usize) -> [usize; 3] {
    [n.div_ceil(THREADS as usize).min(BLOCKS), 1, 1]
}

/// Blocks of a kernel that streams `n` values: each takes one piece.
pub(crate) fn streamed(n: u64) -> [usize; 3] {
    [(n as usize).div_ceil(AT_ONCE * THREADS as usize), 1, 1]
}

/// How a sum of `rows` rows of `cols` columns is cut into parts, by its shape alone: rows of a
/// part, and parts.
fn parts(rows: usize, cols: usize, sums: usize) -> (usize, usize) {
    let room = SCRATCH / 4 / (cols * sums).max(1);
    let parts = rows.div_ceil(ROWS).min(64).min(room).max(1);
    let each = rows.div_ceil(parts).max(1);
    (each, rows.div_ceil(each).max(1))
}

/// Parts of all rows, each of which has one of `stats`, and parts of a row.
fn rms_parts(what: &'static str, norm: &RmsNorm, stats: Reals) -> Result<(u32, u32)> {
    Ok((small(what, stats.len())?, small(what, norm.groups)?))
}

/// A gate's function, as in `nn.cu`.
const fn function(act: Gate) -> u32 {
    match act {
        Gate::Silu => 0,
        Gate::Gelu(Gelu::Tanh) => 1,
        Gate::Gelu(Gelu::Exact) => 2,
    }
}

/// Queries of the smallest tile on the way back, by which sums of the temperature's gradient are
/// cut.
const TILE: usize = 16;

/// Queries of a tile of the forward pass, and of one of the way back, for a width of heads.
const fn tiles(head_dim: usize) -> (usize, usize) {
    match head_dim {
        0..=64 => (64, 32),
        65..=128 => (32, TILE),
        _ => (16, TILE),
    }
}

/// The most rows that a block of attention has.
const MOST_ROWS: usize = 128;

/// Threads of a block of the kernels for tensor cores (`TENSOR_THREADS` in `tensor.cu`).
const TENSOR_THREADS: u32 = 128;

/// Words of the rounded rows that a block of [`Kernel::AttentionBf16Round`] takes (`ROUNDED_EACH` a
/// thread in `tensor.cu`).
const ROUNDED: usize = 4 * THREADS as usize;

/// Attention on tensor cores: its kernels for one width of heads.
struct Tensor {
    /// Values of a rounded row of a head.
    wide: usize,
    forward: Kernel,
    dq: Kernel,
    dkv: Kernel,
    /// Rows of a block of each of them.
    rows: [usize; 3],
}

impl Tensor {
    /// None for wider heads: their rows and sums are more than a warp's registers hold.
    const fn of(head_dim: usize) -> Option<Self> {
        use Kernel as K;
        let (wide, forward, dq, dkv, rows) = match head_dim {
            0..=32 => (
                32,
                K::AttentionBf16x32,
                K::AttentionDqBf16x32,
                K::AttentionDkvBf16x32,
                [128, 128, 128],
            ),
            33..=64 => (
                64,
                K::AttentionBf16x64,
                K::AttentionDqBf16x64,
                K::AttentionDkvBf16x64,
                [128, 128, 128],
            ),
            65..=128 => (
                128,
                K::AttentionBf16x128,
                K::AttentionDqBf16x128,
                K::AttentionDkvBf16x128,
                [64, 64, 64],
            ),
            _ => return None,
        };
        Some(Self { wide, forward, dq, dkv, rows })
    }
}

impl Cuda {
    /// Operands of attention as the kernels see them.
    fn attend(
        &self,
        chunk: &Chunk,
        a: &Attention,
        [q, k, v]: [Columns; 3],
        [dq, dk, dv]: [Columns; 3],
    ) -> Result<Attend> {
        if a.head_dim > MOST_HEAD {
            let found = a.head_dim as f64;
            return Err(Error::setting("width of a head", found, "up to 256 on a CUDA device"));
        }
        small(
            "attention: rows",
            chunk.samples.saturating_mul(a.queries.max(a.keys)).saturating_mul(a.heads.max(1)),
        )?;
        let matrix = |c| matrix("attention: columns", c);
        // No window: wider than a sample, by the rows of a block, so that those behind the last
        // query do not look as if it cut something off.
        let wide = a.queries.saturating_add(MOST_ROWS);
        let (mask, window) = match a.mask {
            Mask::Full => (0, wide),
            Mask::Causal => (1, wide),
            Mask::Others => (2, wide),
            Mask::Sliding(n) => (1, if n < a.queries { n } else { wide }),
        };
        Ok(Attend {
            heads: a.heads as u32,
            kv_heads: a.kv_heads as u32,
            group: a.heads.checked_div(a.kv_heads).unwrap_or_default() as u32,
            head_dim: a.head_dim as u32,
            queries: a.queries as u32,
            keys: a.keys as u32,
            mask,
            window: window as u32,
            scale: (1.0 / libm::sqrt(a.head_dim.max(1) as f64)) as f32,
            kept: (1.0 / (1.0 - a.dropout)) as f32,
            streams: Streams::new(chunk, a.draw, drop_threshold(a.dropout)),
            q: matrix(q)?,
            k: matrix(k)?,
            v: matrix(v)?,
            dq: matrix(dq)?,
            dk: matrix(dk)?,
            dv: matrix(dv)?,
        })
    }

    /// Whether attention goes to tensor cores, forward and backward alike: where the device has the
    /// kernels, heads are not too wide for them, and the room for bf16 factors takes queries, keys,
    /// values and the result's gradient. Beside the device, shapes alone decide it.
    fn tensor(&self, chunk: &Chunk, a: &Attention) -> Option<Tensor> {
        let t = Tensor::of(a.head_dim)?;
        let (queries, keys) =
            (a.queries.saturating_mul(a.heads), a.keys.saturating_mul(a.kv_heads));
        let rows = 2_usize.saturating_mul(queries.saturating_add(keys));
        let bytes = rows.saturating_mul(chunk.samples).saturating_mul(2 * t.wide);
        (self.device.tensor_attention() && bytes <= self.half.bytes).then_some(t)
    }

    /// What several blocks of attention read, as bf16, head by head: keys and values, and on the
    /// way back queries and the result's gradient.
    fn rounded(
        &self,
        (chunk, a, t): (&Chunk, &Attention, &Tensor),
        attend: &Attend,
        [k, v]: [Span; 2],
        back: Option<[Span; 2]>,
    ) -> Result<Span> {
        let words = t.wide / 2;
        let (heads, queries) = if back.is_some() { (a.heads, a.queries) } else { (0, 0) };
        let len = 2 * (a.keys * a.kv_heads + queries * heads) * chunk.samples * words;
        let (log, [q, dout]) = (words.ilog2(), back.unwrap_or([Span::EMPTY; 2]));
        let half = Span { at: self.half.at, len: len as u64 };
        let pieces = (a.keys.max(queries) * words).div_ceil(ROUNDED);
        let grid = [pieces, chunk.samples, 2 * (a.kv_heads + heads)];
        let args = &mut [arg(attend), arg(&log), arg(&k), arg(&v), arg(&q), arg(&dout), arg(&half)];
        self.device.launch(Kernel::AttentionBf16Round, grid, THREADS, args)?;
        Ok(half)
    }

    /// Writes a factor of a product as bf16 to its place in the room.
    fn round(&self, f: Factor, at: u64) -> Result<()> {
        // What needs no gaps between rows is one row.
        let (rows, cols) =
            if f.cols == padded(f.cols) { (1, f.rows * f.cols) } else { (f.rows, f.cols) };
        let all = if rows == 1 { 1 } else { padded(rows) };
        let half = Span { at, len: (padded(f.rows) * padded(f.cols) / 2) as u64 };
        let x = Span { at: f.at, len: (f.rows * f.cols) as u64 };
        let words = half.len / all as u64;
        let (rows, all, cols) =
            (small("matrix product", rows)?, small("matrix product", all)?, cols as u64);
        let args = &mut [arg(&rows), arg(&all), arg(&cols), arg(&words), arg(&x), arg(&half)];
        self.device.launch(Kernel::ToBf16, by_rows(all as usize, words), THREADS, args)
    }
}

/// Blocks of a kernel that takes matrices row by row, [`streamed`] within each.
fn by_rows(rows: usize, cols: u64) -> [usize; 3] {
    [streamed(cols)[0], rows.min(65_535), 1]
}

/// A packed matrix, as kernels take it.
fn packed(x: &Packed) -> Result<crate::span::Packed> {
    const WHAT: &str = "a packed matrix";
    // The numbers of nn.cu.
    let packing = match x.packing {
        Packing::F32 => 0,
        Packing::F16 => 1,
        Packing::Bf16 => 2,
        Packing::Q4_0 => 3,
        Packing::Q4_1 => 4,
        Packing::Q5_0 => 5,
        Packing::Q5_1 => 6,
        Packing::Q8_0 => 7,
        Packing::Q4_K => 8,
        Packing::Q5_K => 9,
        Packing::Q6_K => 10,
    };
    // A row's values must be counted in 32 bits too.
    small(WHAT, x.cols)?;
    Ok(crate::span::Packed {
        rows: x.rows as u64,
        blocks: small(WHAT, x.cols / x.packing.values())?,
        values: small(WHAT, x.packing.values())?,
        bytes: small(WHAT, x.packing.bytes())?,
        neighbours: small(WHAT, x.neighbours)?,
        packing,
    })
}

impl NnOps for Cuda {
    fn matmul(
        &mut self,
        p: &Product,
        a: Reals,
        b: Reals,
        bias: Option<Reals>,
        c: Reals,
    ) -> Result<()> {
        self.arenas.matmul(p, a, b, bias, c)?;
        let (a, b, c) = (self.reals(a), self.reals(b), self.reals(c));
        if c.len == 0 {
            return Ok(());
        }
        if p.inner == 0 {
            let accumulate = u32::from(p.accumulate);
            return match bias {
                Some(bias) => {
                    let bias = self.reals(bias);
                    let args = &mut [arg(&accumulate), arg(&bias), arg(&c)];
                    self.device.launch(Kernel::BiasRows, blocks(c.len as usize), THREADS, args)
                }
                None if p.accumulate => Ok(()),
                None => self.fill(c, 0),
            };
        }
        // cuBLASLt counts by columns, where our matrices are their transposes: Cᵀ = Bᵀ·Aᵀ.
        let factor = |x: Span, order, rows, cols| match order {
            Order::Plain => Factor { at: x.at, rows, cols },
            Order::Transposed => Factor { at: x.at, rows: cols, cols: rows },
        };
        let factors = [factor(b, p.b, p.inner, p.cols), factor(a, p.a, p.rows, p.inner)];
        let transposed = [p.b == Order::Transposed, p.a == Order::Transposed];
        let operand = |i: usize| (factors[i].at, factors[i].cols, transposed[i]);
        let mut gemm = Gemm {
            m: p.cols,
            n: p.rows,
            k: p.inner,
            a: operand(0),
            b: operand(1),
            c: (c.at, p.cols),
            add: p.accumulate,
            bias: bias.map(|bias| self.reals(bias).at),
            half: false,
        };
        self.device.room().forget(c);
        if self.device.precision() != Precision::Bf16 {
            return self.device.gemm(&gemm);
        }
        // Rows of the result that do not begin at multiples of 16 bytes keep cuBLASLt from its fast
        // kernels: they are computed apart, where there is room.
        let apart = if p.cols.is_multiple_of(4) { 0 } else { 4 * p.rows * padded(p.cols) };
        let mut room = self.device.room();
        let (apart, placed) = match room.place(factors, apart) {
            Some(placed) => (apart > 0, placed),
            None => match room.place(factors, 0) {
                Some(placed) => (false, placed),
                // Factors that find no room are rounded by cuBLASLt itself. Which ones do is a
                // matter of their shapes alone.
                None => {
                    drop(room);
                    return self.device.gemm(&gemm);
                }
            },
        };
        drop(room);
        for ((at, fresh), f) in placed.factors.into_iter().zip(factors) {
            if fresh {
                self.round(f, at)?;
            }
        }
        (gemm.a.0, gemm.a.1) = (placed.factors[0].0, padded(gemm.a.1));
        (gemm.b.0, gemm.b.1) = (placed.factors[1].0, padded(gemm.b.1));
        (gemm.k, gemm.half) = (padded(p.inner), true);
        if !apart {
            return self.device.gemm(&gemm);
        }
        let stride = padded(p.cols);
        // With the columns beyond them, which are 0, where nothing is added to them.
        let columns = if gemm.bias.is_none() { stride } else { p.cols };
        self.device.gemm(&Gemm { m: columns, c: (placed.result, stride), add: false, ..gemm })?;
        let x = Span { at: placed.result, len: (p.rows * stride) as u64 };
        let (add, rows) = (u32::from(p.accumulate), small("matrix product", p.rows)?);
        let (cols, stride) = (small("matrix product", p.cols)?, stride as u32);
        let args = &mut [arg(&add), arg(&rows), arg(&cols), arg(&stride), arg(&x), arg(&c)];
        self.device.launch(Kernel::Unpad, by_rows(p.rows, u64::from(cols)), THREADS, args)
    }

    fn sum_rows(&mut self, x: Reals, sum: Reals) -> Result<()> {
        let rows = self.arenas.sum_rows(x, sum)?;
        let (each, parts) = parts(rows, sum.len(), 1);
        let (x, sum, part) = (self.reals(x), self.reals(sum), self.partials(parts * sum.len()));
        let (rows, each) = (small("sum_rows", rows)?, each as u32);
        let grid = [sum.len.div_ceil(32) as usize, parts, 1];
        let args = &mut [arg(&rows), arg(&each), arg(&x), arg(&sum), arg(&part)];
        self.device.launch(Kernel::SumRows, grid, THREADS, args)?;
        self.add_parts(parts, part, sum)
    }

    fn add(&mut self, x: Reals, y: Reals) -> Result<()> {
        self.arenas.pair("add", x, y)?;
        let (x, y) = (self.reals(x), self.reals(y));
        self.device.launch(Kernel::Add, streamed(x.len), THREADS, &mut [arg(&x), arg(&y)])
    }

    fn unpack(&mut self, x: &Packed, first: usize, y: Reals) -> Result<()> {
        self.arenas.unpack(x, first, y)?;
        let (p, first) = (packed(x)?, first as u64);
        let (x, y) = (self.words(x.words), self.reals(y));
        let args = &mut [arg(&p), arg(&first), arg(&x), arg(&y)];
        self.device.launch(Kernel::Unpack, blocks(y.len as usize), THREADS, args)
    }

    fn unpack_rows(&mut self, chunk: &Chunk, x: &Packed, rows: Ints, y: Reals) -> Result<()> {
        let length = self.arenas.unpack_rows(chunk, x, rows, y)?;
        reportable("unpack_rows", rows.len())?;
        let code = Cause::new(Code::Token, chunk.site);
        let cause = Cause { first: chunk.first, per: length, vocab: x.rows, ..code };
        let (report, p) = (self.report(cause), packed(x)?);
        let (x, rows, y) = (self.words(x.words), self.ints(rows), self.reals(y));
        let threads = (y.len as usize).max(rows.len as usize);
        let args = &mut [arg(&report), arg(&p), arg(&x), arg(&rows), arg(&y)];
        self.device.launch(Kernel::UnpackRows, blocks(threads), THREADS, args)
    }

    fn add_columns(&mut self, width: usize, scale: f64, from: Columns, to: Columns) -> Result<()> {
        let rows = self.arenas.add_columns(width, from, to)?;
        let values = (rows * width) as u64;
        let matrix = |c| matrix("add_columns", c);
        let (width, scale) = (small("add_columns", width)?, scale as f32);
        let (x, y, from, to) = (self.reals(from.of), self.reals(to.of), matrix(from)?, matrix(to)?);
        let args =
            &mut [arg(&values), arg(&width), arg(&scale), arg(&from), arg(&to), arg(&x), arg(&y)];
        self.device.launch(Kernel::AddColumns, blocks(rows * width as usize), THREADS, args)
    }

    fn layer_norm(
        &mut self,
        eps: f64,
        weight: Reals,
        bias: Reals,
        x: Reals,
        y: Reals,
        stats: Reals,
    ) -> Result<()> {
        let rows = small("layer_norm", self.arenas.layer_norm(weight, bias, x, y, stats)?)?;
        let (weight, bias, x) = (self.reals(weight), self.reals(bias), self.reals(x));
        let (y, stats, eps) = (self.reals(y), self.reals(stats), eps as f32);
        let args =
            &mut [arg(&rows), arg(&eps), arg(&weight), arg(&bias), arg(&x), arg(&y), arg(&stats)];
        self.device.launch(
            Kernel::LayerNorm,
            [(rows as usize).div_ceil(WARPS), 1, 1],
            THREADS,
            args,
        )
    }

    fn layer_norm_vjp(
        &mut self,
        weight: Reals,
        x: Reals,
        stats: Reals,
        dy: Reals,
        dx: Reals,
        dweight: Reals,
        dbias: Reals,
    ) -> Result<()> {
        let rows = self.arenas.layer_norm_vjp(weight, x, stats, dy, dx, dweight, dbias)?;
        let width = weight.len();
        let (each, parts) = parts(rows, width, 2);
        let part = self.partials(2 * parts * width);
        let (weight, x, stats, dy) =
            (self.reals(weight), self.reals(x), self.reals(stats), self.reals(dy));
        let (dx, dweight, dbias) = (self.reals(dx), self.reals(dweight), self.reals(dbias));
        let (rows, each) = (small("layer_norm_vjp", rows)?, each as u32);
        let args = &mut [arg(&rows), arg(&weight), arg(&x), arg(&stats), arg(&dy), arg(&dx)];
        let grid = [(rows as usize * ROW_THREADS).div_ceil(THREADS as usize), 1, 1];
        self.device.launch(Kernel::LayerNormDx, grid, THREADS, args)?;
        if dweight.len == 0 {
            return Ok(());
        }
        let args = &mut [
            arg(&rows),
            arg(&each),
            arg(&x),
            arg(&stats),
            arg(&dy),
            arg(&dweight),
            arg(&dbias),
            arg(&part),
        ];
        self.device.launch(Kernel::LayerNormDw, [width.div_ceil(32), parts, 1], THREADS, args)?;
        let half = (parts * width) as u64;
        self.add_parts(parts, Span { len: half, ..part }, dweight)?;
        self.add_parts(parts, Span { at: part.at + 4 * half, len: half }, dbias)
    }

    fn rms_norm(
        &mut self,
        norm: &RmsNorm,
        weight: Reals,
        x: Columns,
        y: Columns,
        stats: Reals,
    ) -> Result<()> {
        self.arenas.rms_norm(norm, weight, x, y, stats)?;
        let (parts, groups) = rms_parts("rms_norm", norm, stats)?;
        let (eps, offset) = (norm.eps as f32, norm.offset as f32);
        let (from, to) = (matrix("rms_norm: x", x)?, matrix("rms_norm: y", y)?);
        let (weight, x, y, stats) =
            (self.reals(weight), self.reals(x.of), self.reals(y.of), self.reals(stats));
        let args = &mut [
            arg(&parts),
            arg(&groups),
            arg(&eps),
            arg(&offset),
            arg(&from),
            arg(&to),
            arg(&weight),
            arg(&x),
            arg(&y),
            arg(&stats),
        ];
        let grid = [(parts as usize).div_ceil(WARPS), 1, 1];
        self.device.launch(Kernel::RmsParts, grid, THREADS, args)
    }

    fn rms_norm_vjp(
        &mut self,
        norm: &RmsNorm,
        weight: Reals,
        x: Columns,
        stats: Reals,
        dy: Columns,
        dx: Columns,
        dweight: Reals,
    ) -> Result<()> {
        self.arenas.rms_norm_vjp(norm, weight, [x, dy, dx], stats, dweight)?;
        let (parts, groups) = rms_parts("rms_norm_vjp", norm, stats)?;
        let offset = norm.offset as f32;
        let at = |c| matrix("rms_norm_vjp: columns", c);
        let [x_at, dy_at, dx_at] = [at(x)?, at(dy)?, at(dx)?];
        let (each, sums) = self::parts(parts as usize, norm.width, 1);
        let (each, part) = (each as u32, self.partials(sums * norm.width));
        let (weight, stats, dweight) = (self.reals(weight), self.reals(stats), self.reals(dweight));
        let (x, dy, dx) = (self.reals(x.of), self.reals(dy.of), self.reals(dx.of));
        let args = &mut [
            arg(&parts),
            arg(&groups),
            arg(&offset),
            arg(&x_at),
            arg(&dy_at),
            arg(&dx_at),
            arg(&weight),
            arg(&x),
            arg(&stats),
            arg(&dy),
            arg(&dx),
        ];
        let grid = [(parts as usize * ROW_THREADS).div_ceil(THREADS as usize), 1, 1];
        self.device.launch(Kernel::RmsPartsDx, grid, THREADS, args)?;
        if dweight.len == 0 {
            return Ok(());
        }
        let args = &mut [
            arg(&parts),
            arg(&each),
            arg(&groups),
            arg(&x_at),
            arg(&dy_at),
            arg(&x),
            arg(&stats),
            arg(&dy),
            arg(&dweight),
            arg(&part),
        ];
        let grid = [norm.width.div_ceil(32), sums, 1];
        self.device.launch(Kernel::RmsPartsDw, grid, THREADS, args)?;
        self.add_parts(sums, part, dweight)
    }

    fn rotate(
        &mut self,
        chunk: &Chunk,
        rotary: &Rotary,
        table: Reals,
        positions: Ints,
        x: Columns,
    ) -> Result<()> {
        let known = self.arenas.rotate(chunk, rotary, table, positions, x)?;
        let rows = chunk.samples * rotary.tokens;
        reportable("rotate: rows", rows)?;
        small("rotate: columns", rotary.heads.saturating_mul(rotary.head_dim))?;
        let (at, back) = (matrix("rotate: columns", x)?, u32::from(rotary.back));
        let (tokens, heads) = (small("rotate", rotary.tokens)?, rotary.heads as u32);
        let half = small("rotate", rotary.head_dim)? / 2;
        let cause = Cause {
            first: chunk.first,
            per: rotary.tokens,
            vocab: known,
            ..Cause::new(Code::Position, chunk.site)
        };
        let report = self.report(cause);
        // Positions are below 2^31, as unsigned numbers all but the negative ones.
        let known = known.min(1 << 31) as u32;
        let (table, positions, x) = (self.reals(table), self.ints(positions), self.reals(x.of));
        let args = &mut [
            arg(&report),
            arg(&tokens),
            arg(&heads),
            arg(&half),
            arg(&known),
            arg(&back),
            arg(&at),
            arg(&table),
            arg(&positions),
            arg(&x),
        ];
        self.device.launch(Kernel::Rotate, [rows, 1, 1], THREADS, args)
    }

    fn gated(&mut self, act: Gate, gate: Reals, up: Reals, y: Reals) -> Result<()> {
        self.arenas.gated("gated", [gate, up, y])?;
        let act = function(act);
        let (gate, up, y) = (self.reals(gate), self.reals(up), self.reals(y));
        let args = &mut [arg(&act), arg(&gate), arg(&up), arg(&y)];
        self.device.launch(Kernel::Gated, streamed(y.len), THREADS, args)
    }

    fn gated_vjp(
        &mut self,
        act: Gate,
        gate: Reals,
        up: Reals,
        d: Reals,
        dgate: Reals,
    ) -> Result<()> {
        self.arenas.gated("gated_vjp", [gate, up, d, dgate])?;
        let act = function(act);
        let (gate, up, d, dgate) =
            (self.reals(gate), self.reals(up), self.reals(d), self.reals(dgate));
        let args = &mut [arg(&act), arg(&gate), arg(&up), arg(&d), arg(&dgate)];
        self.device.launch(Kernel::GatedVjp, streamed(d.len), THREADS, args)
    }

    fn gelu(&mut self, kind: Gelu, x: Reals, y: Reals) -> Result<()> {
        self.arenas.pair("gelu", x, y)?;
        let (exact, x, y) = (u32::from(kind == Gelu::Exact), self.reals(x), self.reals(y));
        self.device.launch(
            Kernel::Gelu,
            streamed(y.len),
            THREADS,
            &mut [arg(&exact), arg(&x), arg(&y)],
        )
    }

    fn gelu_vjp(&mut self, kind: Gelu, x: Reals, d: Reals) -> Result<()> {
        self.arenas.pair("gelu_vjp", x, d)?;
        let (exact, x, d) = (u32::from(kind == Gelu::Exact), self.reals(x), self.reals(d));
        self.device.launch(
            Kernel::GeluVjp,
            streamed(d.len),
            THREADS,
            &mut [arg(&exact), arg(&x), arg(&d)],
        )
    }

    fn attention(
        &mut self,
        chunk: &Chunk,
        a: &Attention,
        q: Columns,
        k: Columns,
        v: Columns,
        out: Reals,
        lse: Reals,
        scratch: Reals,
    ) -> Result<()> {
        let needed = Self::attention_scratch(a, chunk.samples, 1);
        let scratch = scratch.sub(0, needed);
        self.arenas.attention(chunk, a, [q, k, v], out, lse, (scratch, needed))?;
        let attend = self.attend(chunk, a, [q, k, v], [q, k, v])?;
        let (q, k, v) = (self.reals(q.of), self.reals(k.of), self.reals(v.of));
        let (lens, starts) = (self.ints(a.key_lens), self.ints(a.starts));
        let temperature = self.reals(a.temperature);
        let (out, lse) = (self.reals(out), self.reals(lse));
        if let Some(t) = self.tensor(chunk, a) {
            let rounded = self.rounded((chunk, a, &t), &attend, [k, v], None)?;
            let grid = [a.heads, chunk.samples, a.queries.div_ceil(t.rows[0])];
            let args = &mut [
                arg(&attend),
                arg(&rounded),
                arg(&lens),
                arg(&starts),
                arg(&temperature),
                arg(&q),
                arg(&out),
                arg(&lse),
            ];
            return self.device.launch(t.forward, grid, TENSOR_THREADS, args);
        }
        let kernel = match a.head_dim {
            0..=32 => Kernel::Attention32,
            33..=64 => Kernel::Attention64,
            65..=128 => Kernel::Attention128,
            _ => Kernel::Attention256,
        };
        let grid = [a.queries.div_ceil(tiles(a.head_dim).0), a.heads, chunk.samples];
        let args = &mut [
            arg(&attend),
            arg(&q),
            arg(&k),
            arg(&v),
            arg(&lens),
            arg(&starts),
            arg(&temperature),
            arg(&out),
            arg(&lse),
        ];
        self.device.launch(kernel, grid, THREADS, args)
    }

    fn attention_vjp(
        &mut self,
        chunk: &Chunk,
        a: &Attention,
        q: Columns,
        k: Columns,
        v: Columns,
        out: Reals,
        lse: Reals,
        dout: Reals,
        dq: Columns,
        dk: Columns,
        dv: Columns,
        scratch: Reals,
    ) -> Result<()> {
        let needed = Self::attention_scratch(a, chunk.samples, 1);
        let scratch = scratch.sub(0, needed);
        let [values, grads] = [[q, k, v], [dq, dk, dv]];
        self.arenas.attention_vjp(chunk, a, values, [out, lse, dout], grads, (scratch, needed))?;
        let attend = self.attend(chunk, a, values, grads)?;
        let rows = chunk.samples * a.queries * a.heads;
        let tensor = self.tensor(chunk, a);
        let tile = tensor.as_ref().map_or(tiles(a.head_dim).1, |t| t.rows[1]);
        let slopes = if a.temperature.is_empty() {
            0
        } else {
            chunk.samples * a.heads * a.queries.div_ceil(tile)
        };
        let (delta, slopes) =
            (self.reals(scratch.sub(0, rows)), self.reals(scratch.sub(rows, slopes)));
        let (q, k, v) = (self.reals(q.of), self.reals(k.of), self.reals(v.of));
        let (lens, starts) = (self.ints(a.key_lens), self.ints(a.starts));
        let temperature = self.reals(a.temperature);
        let (out, lse, dout) = (self.reals(out), self.reals(lse), self.reals(dout));
        let (dq, dk, dv) = (self.reals(dq.of), self.reals(dk.of), self.reals(dv.of));

        if let Some(t) = tensor {
            let rounded = self.rounded((chunk, a, &t), &attend, [k, v], Some([q, dout]))?;
            let common = [
                arg(&attend),
                arg(&rounded),
                arg(&lens),
                arg(&starts),
                arg(&temperature),
                arg(&lse),
            ];
            let grid = |heads, n: usize, rows| [heads, chunk.samples, n.div_ceil(rows)];
            let mut args =
                [common.as_slice(), &[arg(&out), arg(&delta), arg(&dq), arg(&slopes)]].concat();
            self.device.launch(t.dq, grid(a.heads, a.queries, tile), TENSOR_THREADS, &mut args)?;
            let mut args = [common.as_slice(), &[arg(&delta), arg(&dk), arg(&dv)]].concat();
            let grid = grid(a.kv_heads, a.keys, t.rows[2]);
            self.device.launch(t.dkv, grid, TENSOR_THREADS, &mut args)?;
        } else {
            let samples = chunk.samples as u32;
            let args = &mut [arg(&attend), arg(&samples), arg(&out), arg(&dout), arg(&delta)];
            self.device.launch(
                Kernel::AttentionDelta,
                [rows.div_ceil(WARPS), 1, 1],
                THREADS,
                args,
            )?;
            let (for_q, for_kv) = match a.head_dim {
                0..=32 => (Kernel::AttentionDq32, Kernel::AttentionDkv32),
                33..=64 => (Kernel::AttentionDq64, Kernel::AttentionDkv64),
                65..=128 => (Kernel::AttentionDq128, Kernel::AttentionDkv128),
                _ => (Kernel::AttentionDq256, Kernel::AttentionDkv256),
            };
            let common = [
                arg(&attend),
                arg(&q),
                arg(&k),
                arg(&v),
                arg(&lens),
                arg(&starts),
                arg(&temperature),
                arg(&lse),
                arg(&delta),
                arg(&dout),
            ];
            let grid = |n: usize, heads| [n.div_ceil(tile), heads, chunk.samples];
            let mut args = [common.as_slice(), &[arg(&dq), arg(&slopes)]].concat();
            self.device.launch(for_q, grid(a.queries, a.heads), THREADS, &mut args)?;
            let mut args = [common.as_slice(), &[arg(&dk), arg(&dv)]].concat();
            self.device.launch(for_kv, grid(a.keys, a.kv_heads), THREADS, &mut args)?;
        }
        if slopes.len > 0 {
            let grad = self.reals(a.temperature_grad);
            self.device.launch(
                Kernel::AddTotal,
                [1, 1, 1],
                THREADS,
                &mut [arg(&slopes), arg(&grad)],
            )?;
        }
        Ok(())
    }

    /// As many rows as fill a large device, and logits so many at a time that the head's matrix is
    /// seldom read.
    fn rows() -> Rows {
        Rows { chunk: 8192, head: 1024 }
    }

    /// `dout·out` of every row of a head, and one number for every tile of queries.
    fn attention_scratch(a: &Attention, samples: usize, _threads: usize) -> usize {
        let each = a.queries.saturating_add(a.queries.div_ceil(TILE));
        samples.saturating_mul(a.heads).saturating_mul(each)
    }

    fn dropout(&mut self, chunk: &Chunk, draw: Draw, p: f64, x: Reals) -> Result<()> {
        let per = self.arenas.dropout(chunk, p, x)?;
        let streams = Streams::new(chunk, draw, drop_threshold(p));
        if streams.threshold == 0 || per == 0 {
            return Ok(());
        }
        let (samples, per) = (small("dropout", chunk.samples)?, small("dropout", per)?);
        let (kept, x) = ((1.0 / (1.0 - p)) as f32, self.reals(x));
        let args = &mut [arg(&samples), arg(&per), arg(&kept), arg(&streams), arg(&x)];
        self.device.launch(Kernel::Dropout, blocks((x.len as usize).div_ceil(4)), THREADS, args)
    }

    fn embed(
        &mut self,
        chunk: &Chunk,
        tokens: Ints,
        table: Reals,
        positions: Reals,
        width: usize,
        x: Reals,
    ) -> Result<()> {
        let (length, vocab) =
            self.arenas.embed("embed", chunk, tokens, [x, table, positions], width)?;
        reportable("embed: tokens", tokens.len())?;
        let (per, width) = (small("embed", length)?, small("embed: width", width)?);
        let cause =
            Cause { first: chunk.first, per: length, vocab, ..Cause::new(Code::Token, chunk.site) };
        let report = self.report(cause);
        let (tokens, table, positions, x) =
            (self.ints(tokens), self.reals(table), self.reals(positions), self.reals(x));
        let args = &mut [
            arg(&report),
            arg(&per),
            arg(&width),
            arg(&tokens),
            arg(&table),
            arg(&positions),
            arg(&x),
        ];
        self.device.launch(Kernel::Embed, blocks(x.len as usize), THREADS, args)
    }

    fn embed_vjp(
        &mut self,
        chunk: &Chunk,
        tokens: Ints,
        dx: Reals,
        width: usize,
        dtable: Reals,
        dpositions: Reals,
    ) -> Result<()> {
        let (length, _) =
            self.arenas.embed("embed_vjp", chunk, tokens, [dx, dtable, dpositions], width)?;
        let grid = blocks(length * width);
        let (samples, length) = (small("embed_vjp", chunk.samples)?, small("embed_vjp", length)?);
        let (rows, width) = (small("embed_vjp", tokens.len())?, small("embed_vjp: width", width)?);
        let (tokens, dx, dtable, dpositions) =
            (self.ints(tokens), self.reals(dx), self.reals(dtable), self.reals(dpositions));
        if width == 0 {
            return Ok(());
        }
        if dpositions.len > 0 {
            let args = &mut [arg(&samples), arg(&length), arg(&width), arg(&dx), arg(&dpositions)];
            self.device.launch(Kernel::EmbedPositions, grid, THREADS, args)?;
        }
        let args = &mut [arg(&width), arg(&tokens), arg(&dx), arg(&dtable)];
        self.device.launch(Kernel::EmbedTable, [rows as usize, 1, 1], THREADS, args)
    }

    fn cross_entropy(
        &mut self,
        chunk: &Chunk,
        ce: &CrossEntropy,
        logits: Reals,
        targets: Ints,
        losses: Reals,
    ) -> Result<()> {
        self.arenas.cross_entropy(ce, logits, targets, losses)?;
        let rows = targets.len();
        let (vocab, first) = (small("cross_entropy: vocab", ce.vocab)?, ce.row as u32);
        reportable("cross_entropy: rows", rows.saturating_add(ce.row))?;
        let (scale, hard) = (ce.scale as f32, (1.0 - ce.smoothing) as f32);
        let smooth = (ce.smoothing / ce.vocab.max(1) as f64) as f32;
        let cause = Cause {
            first: chunk.first,
            per: ce.tokens,
            vocab: ce.vocab,
            ..Cause::new(Code::Loss, chunk.site)
        };
        let report = self.report(cause);
        let (targets, logits, losses) =
            (self.ints(targets), self.reals(logits), self.reals(losses));
        let args = &mut [
            arg(&report),
            arg(&vocab),
            arg(&first),
            arg(&scale),
            arg(&smooth),
            arg(&hard),
            arg(&targets),
            arg(&logits),
            arg(&losses),
        ];
        let mut room = self.device.room();
        room.forget(logits);
        room.forget(losses);
        drop(room);
        self.device.launch(Kernel::CrossEntropy, [rows, 1, 1], LOSS_THREADS, args)
    }
}

impl Cuda {
    /// Room for `len` partial sums of a reduction.
    fn partials(&self, len: usize) -> Span {
        Span { at: self.scratch.at, len: len.min(SCRATCH / 4) as u64 }
    }

    /// `sum += Σ parts`, where there was more than one.
    fn add_parts(&self, n: usize, parts: Span, sum: Span) -> Result<()> {
        if n == 1 {
            return Ok(());
        }
        let n = n as u32;
        let args = &mut [arg(&n), arg(&parts), arg(&sum)];
        self.device.launch(Kernel::AddParts, blocks(sum.len as usize), THREADS, args)
    }
}
