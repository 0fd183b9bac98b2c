//! [`UpdateOps`]: the bits of the reference backend, one kernel an operation.

use bdia_core::rng::Draw;
use bdia_core::{
    Chunk, Error, FloatGamma, Gamma, Grid, Ints, Reals, Result, Sign, Site, UpdateOps, Words,
};

use crate::Cuda;
use crate::device::{AT_ONCE, Kernel, THREADS, arg};
use crate::nn::streamed;
use crate::span::{Shape, Streams};
use crate::status::{Cause, Code, MOST};

/// Warps of a block: each takes [`AT_ONCE`] groups of 32 elements at a time.
const WARPS: usize = THREADS as usize / 32;
/// Blocks that a multiprocessor has room for, as the kernels ask for it.
const RESIDENT: usize = 5;

/// Refuses more values than a report has indices for.
fn countable(values: usize) -> Result<()> {
    if values < MOST {
        Ok(())
    } else {
        Err(Error::TooLarge("values of one chunk on a device (below 2^30)"))
    }
}

impl Cuda {
    /// How kernels see a tensor of `samples` samples of `per` values, and how many blocks they take
    /// for it: no more than run at once. Nothing but integer sums and minima depends on that
    /// number.
    fn shape(&self, samples: usize, per: usize) -> Result<(Shape, usize)> {
        countable(samples.saturating_mul(per))?;
        let samples = if per == 0 { 0 } else { samples };
        let groups = per.div_ceil(32);
        let shape = Shape {
            samples: samples as u32,
            per: per as u32,
            groups: groups as u32,
            at: 0,
            streams: Streams { seed: 0, step: 0, global: 0, place: 0, threshold: 0 },
            sign: 1,
            m: 0,
            magnitude: 0.0,
            scale: 1.0,
        };
        let most = RESIDENT * self.device.multiprocessors();
        Ok((shape, (samples * groups.div_ceil(AT_ONCE)).div_ceil(WARPS).min(most)))
    }
}

impl Shape {
    fn of_chunk(self, chunk: &Chunk) -> Self {
        Self { at: (chunk.first as u64).wrapping_mul(self.per.into()), ..self }
    }

    fn grid(self, grid: Grid) -> Self {
        Self { scale: grid.scale(), ..self }
    }

    fn gamma(self, gamma: FloatGamma, chunk: &Chunk, m: u32) -> Self {
        let sign = match gamma.sign() {
            Sign::Random | Sign::Shared => 0,
            Sign::Plus => 1,
            Sign::Minus => -1,
        };
        let site = Site::Block(gamma.sign().drawn_at(chunk.block()).into());
        Self {
            sign,
            m,
            magnitude: gamma.magnitude() as f32,
            streams: Streams::new(&Chunk { site, ..*chunk }, Draw::Sign, 0),
            ..self
        }
    }
}

/// A fault of one value of a chunk.
fn of_value(code: Code, chunk: &Chunk, per: usize) -> Cause {
    Cause { first: chunk.first, per, ..Cause::new(code, chunk.site) }
}

/// The fault of a value that is not finite or leaves the range.
fn range(chunk: &Chunk, per: usize, grid: Option<Grid>) -> Cause {
    Cause { frac_bits: grid.map_or(0, Grid::frac_bits), ..of_value(Code::Range, chunk, per) }
}

impl UpdateOps for Cuda {
    fn quantize(&mut self, chunk: &Chunk, grid: Grid, y: Reals, x: Ints, sum: Words) -> Result<()> {
        let per = self.arenas.quantize("quantize", chunk, y, x, sum)?;
        let (shape, blocks) = self.shape(chunk.samples, per)?;
        let (shape, report) =
            (shape.of_chunk(chunk).grid(grid), self.report(range(chunk, per, Some(grid))));
        let (y, x, sum) = (self.reals(y), self.ints(x), self.words(sum));
        let args = &mut [arg(&shape), arg(&report), arg(&y), arg(&x), arg(&sum)];
        self.device.launch(Kernel::Quantize, [blocks, 1, 1], THREADS, args)
    }

    fn dequantize(&mut self, grid: Grid, x: Ints, y: Reals) -> Result<()> {
        self.arenas.dequantize(x, y)?;
        let (unit, x, y): (f32, _, _) = (grid.unit(), self.ints(x), self.reals(y));
        self.device.launch(
            Kernel::Dequantize,
            streamed(y.len),
            THREADS,
            &mut [arg(&unit), arg(&x), arg(&y)],
        )
    }

    fn add_quantized(
        &mut self,
        chunk: &Chunk,
        grid: Grid,
        x: Ints,
        h: Reals,
        sum: Words,
    ) -> Result<()> {
        let per = self.arenas.quantize("add_quantized", chunk, h, x, sum)?;
        let (shape, blocks) = self.shape(chunk.samples, per)?;
        let (shape, report) =
            (shape.of_chunk(chunk).grid(grid), self.report(range(chunk, per, Some(grid))));
        let (x, h, sum) = (self.ints(x), self.reals(h), self.words(sum));
        let args = &mut [arg(&shape), arg(&report), arg(&x), arg(&h), arg(&sum)];
        self.device.launch(Kernel::AddQuantized, [blocks, 1, 1], THREADS, args)
    }

    fn subtract_quantized(
        &mut self,
        chunk: &Chunk,
        grid: Grid,
        x: Ints,
        h: Reals,
        sum: Words,
    ) -> Result<()> {
        let per = self.arenas.quantize("subtract_quantized", chunk, h, x, sum)?;
        let (shape, blocks) = self.shape(chunk.samples, per)?;
        let shape = shape.of_chunk(chunk).grid(grid);
        let (x, h, sum) = (self.ints(x), self.reals(h), self.words(sum));
        let args = &mut [arg(&shape), arg(&x), arg(&h), arg(&sum)];
        self.device.launch(Kernel::SubtractQuantized, [blocks, 1, 1], THREADS, args)
    }

    fn step(
        &mut self,
        chunk: &Chunk,
        grid: Grid,
        gamma: Gamma,
        x: Ints,
        cur: Reals,
        h: Reals,
        side: Words,
        sum: Words,
    ) -> Result<()> {
        let (per, m) = self.arenas.step("step", chunk, gamma, x, [cur, h], (side, true), sum)?;
        let (shape, blocks) = self.shape(chunk.samples, per)?;
        let shape = shape.of_chunk(chunk).grid(grid).gamma(gamma.float(), chunk, m);
        let report = self.report(range(chunk, per, Some(grid)));
        let (x, cur, h) = (self.ints(x), self.reals(cur), self.reals(h));
        let (side, sum) = (self.words(side), self.words(sum));
        let args =
            &mut [arg(&shape), arg(&report), arg(&x), arg(&cur), arg(&h), arg(&side), arg(&sum)];
        self.device.launch(Kernel::Step, [blocks, 1, 1], THREADS, args)
    }

    fn inverse(
        &mut self,
        chunk: &Chunk,
        grid: Grid,
        gamma: Gamma,
        x: Ints,
        cur: Reals,
        h: Reals,
        side: Words,
        sum: Words,
    ) -> Result<()> {
        let (per, m) =
            self.arenas.step("inverse", chunk, gamma, x, [cur, h], (side, false), sum)?;
        let (shape, blocks) = self.shape(chunk.samples, per)?;
        let shape = shape.of_chunk(chunk).grid(grid).gamma(gamma.float(), chunk, m);
        let (x, cur, h) = (self.ints(x), self.reals(cur), self.reals(h));
        let (side, sum) = (self.words(side), self.words(sum));
        let args = &mut [arg(&shape), arg(&x), arg(&cur), arg(&h), arg(&side), arg(&sum)];
        self.device.launch(Kernel::Inverse, [blocks, 1, 1], THREADS, args)
    }

    fn blend(
        &mut self,
        chunk: &Chunk,
        gamma: FloatGamma,
        x: Reals,
        cur: Reals,
        h: Reals,
    ) -> Result<()> {
        let per = self.arenas.blend("blend", chunk, x, cur, h)?;
        let (shape, blocks) = self.shape(chunk.samples, per)?;
        let (shape, report) = (shape.gamma(gamma, chunk, 0), self.report(range(chunk, per, None)));
        let (x, cur, h) = (self.reals(x), self.reals(cur), self.reals(h));
        let args = &mut [arg(&shape), arg(&report), arg(&x), arg(&cur), arg(&h)];
        self.device.launch(Kernel::Blend, [blocks, 1, 1], THREADS, args)
    }

    fn unblend(
        &mut self,
        chunk: &Chunk,
        gamma: FloatGamma,
        x: Reals,
        cur: Reals,
        h: Reals,
    ) -> Result<()> {
        let per = self.arenas.blend("unblend", chunk, x, cur, h)?;
        let (shape, blocks) = self.shape(chunk.samples, per)?;
        let shape = shape.gamma(gamma, chunk, 0);
        let (x, cur, h) = (self.reals(x), self.reals(cur), self.reals(h));
        let args = &mut [arg(&shape), arg(&x), arg(&cur), arg(&h)];
        self.device.launch(Kernel::Unblend, [blocks, 1, 1], THREADS, args)
    }

    fn combine(
        &mut self,
        chunk: &Chunk,
        gamma: FloatGamma,
        next: Reals,
        cur: Reals,
        h: Reals,
    ) -> Result<()> {
        let per = self.arenas.blend("combine", chunk, next, cur, h)?;
        let (shape, blocks) = self.shape(chunk.samples, per)?;
        let shape = shape.gamma(gamma, chunk, 0);
        let report = self.report(of_value(Code::ActivationGradient, chunk, per));
        let (next, cur, h) = (self.reals(next), self.reals(cur), self.reals(h));
        let args = &mut [arg(&shape), arg(&report), arg(&next), arg(&cur), arg(&h)];
        self.device.launch(Kernel::Combine, [blocks, 1, 1], THREADS, args)
    }

    fn check_gradient(&mut self, chunk: &Chunk, g: Reals) -> Result<()> {
        let per = self.arenas.check_gradient(chunk, g)?;
        countable(g.len())?;
        let report = self.report(of_value(Code::ActivationGradient, chunk, per));
        let g = self.reals(g);
        let args = &mut [arg(&report), arg(&g)];
        self.device.launch(Kernel::CheckGradient, streamed(g.len), THREADS, args)
    }

    fn check_input(&mut self, chunk: &Chunk, grid: Grid, x: Ints, y: Reals) -> Result<()> {
        let per = self.arenas.check_input(chunk, x, y)?;
        countable(y.len())?;
        let report = self.report(of_value(Code::Input, chunk, per));
        let (unit, x, y): (f32, _, _) = (grid.unit(), self.ints(x), self.reals(y));
        let args = &mut [arg(&unit), arg(&report), arg(&x), arg(&y)];
        self.device.launch(Kernel::CheckInput, streamed(y.len), THREADS, args)
    }

    fn compare(&mut self, a: Words, b: Words, activation: usize, block: usize) -> Result<()> {
        self.arenas.compare(a, b)?;
        let cause = Cause { first: activation, ..Cause::new(Code::Checksum, Site::Block(block)) };
        let (report, a, b) = (self.report(cause), self.words(a), self.words(b));
        self.device.launch(Kernel::Compare, [1, 1, 1], 32, &mut [arg(&report), arg(&a), arg(&b)])
    }

    fn count_differences(&mut self, a: Ints, b: Ints, count: Words) -> Result<()> {
        self.arenas.count_differences(a, b, count)?;
        let (shape, blocks) = self.shape(1, a.len())?;
        let (a, b, count) = (self.ints(a), self.ints(b), self.words(count));
        let args = &mut [arg(&shape), arg(&a), arg(&b), arg(&count)];
        self.device.launch(Kernel::CountDifferences, [blocks, 1, 1], THREADS, args)
    }
}
