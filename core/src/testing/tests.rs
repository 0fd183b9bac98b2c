//! The suite passes on the reference and fails on backends with one mistake each.

use std::{string::ToString, vec, vec::Vec};

use super::*;
use crate::backend::{
    Attention, CrossEntropy, Exchange, Gate, Gelu, Mask, NnOps, OptimOps, Product, RmsNorm, Rotary,
    State, UpdateOps, Wrapper,
};
use crate::optim::{Rule, Update};
use crate::rng::Draw;
use crate::update::{FloatGamma, Gamma, Grid, Sign};

fn reference<R: Real>(layout: &Layout) -> Reference<'static, R> {
    let (i, r, w) = layout.arenas();
    let (i, r, w): (Vec<i32>, Vec<R>, Vec<u32>) = (vec![0; i], vec![R::zero(); r], vec![0; w]);
    // The suite builds a handful of backends; their memory lives as long as the test.
    Reference::new(layout, i.leak(), r.leak(), w.leak()).unwrap()
}

#[test]
fn reference_conforms() {
    all(reference::<f32>).map_err(|f| f.to_string()).unwrap();
    all(reference::<f64>).map_err(|f| f.to_string()).unwrap();
}

#[derive(Clone, Copy, PartialEq, Debug)]
enum Bug {
    None,
    TiesAway,
    FusedMix,
    UnusedSideBits,
    SharedSignsPerBlock,
    ChecksumFromZero,
    WeightedChecksum,
    FaultOverwritten,
    FaultNotCleared,
    BlendReadsAtZero,
    CombineForgetsCur,
    CombineSilent,
    GradientSilent,
    InputSilent,
    SumRowsSets,
    MatmulReadsOldC,
    ColumnsFromTheFirst,
    OtherGelu,
    NotRepeatable,
    AttentionWithoutDropout,
    AttentionWithoutPadding,
    AttentionVjpAdds,
    AttentionSeesItself,
    AttentionOfTheFirstHead,
    AttentionOneKeyFurther,
    AttentionAcrossTexts,
    RmsOffsetForgotten,
    RmsVjpSets,
    RotatesForward,
    RotatesByPlace,
    RotatesSilently,
    OtherGate,
    GateWithoutSlope,
    TemperatureForgotten,
    TemperatureGradientSet,
    NoSmoothing,
    LayerNormVjpBeyondItsEnd,
    MaskedTargetsCount,
    EmbedSilent,
    DropoutByChunk,
    AcceptsWrongLengths,
    UpdateDespiteFault,
    NoBiasCorrection,
    NoThreshold,
    FarCode,
    SquaresInHalf,
}

struct Broken {
    inner: Reference<'static, f32>,
    bug: Bug,
    calls: u32,
}

impl Broken {
    fn value(&self, h: Reals, i: usize) -> f32 {
        self.inner.reals(h).ok().and_then(|x| x.get(i)).copied().unwrap_or(0.0)
    }
}

/// What is not here goes to the reference.
impl Wrapper for Broken {
    type Inner = Reference<'static, f32>;

    fn inner(&self) -> &Self::Inner {
        &self.inner
    }

    fn inner_mut(&mut self) -> &mut Self::Inner {
        &mut self.inner
    }

    fn raise(&mut self, fault: Fault) {
        if self.bug == Bug::FaultOverwritten {
            let _ = self.inner.take_fault();
        }
        self.inner.raise(fault);
    }

    fn take_fault(&mut self) -> OpResult<Option<Fault>> {
        let fault = self.inner.take_fault()?;
        if let Some(fault) = fault.filter(|_| self.bug == Bug::FaultNotCleared) {
            self.inner.raise(fault);
        }
        Ok(fault)
    }

    fn quantize(
        &mut self,
        chunk: &Chunk,
        grid: Grid,
        y: Reals,
        x: Ints,
        sum: Words,
    ) -> OpResult<()> {
        self.inner.quantize(chunk, grid, y, x, sum)?;
        if self.bug == Bug::TiesAway {
            for i in 0..x.len() {
                let scaled = self.value(y, i) * grid.scale::<f32>();
                if (scaled - libm::truncf(scaled)).abs() == 0.5 {
                    self.inner.write_ints(x.sub(i, 1), &[libm::roundf(scaled) as i32])?;
                }
            }
        }
        Ok(())
    }

    fn add_quantized(
        &mut self,
        chunk: &Chunk,
        grid: Grid,
        x: Ints,
        h: Reals,
        sum: Words,
    ) -> OpResult<()> {
        self.inner.add_quantized(chunk, grid, x, h, sum)?;
        if self.bug == Bug::WeightedChecksum && !sum.is_empty() {
            let weighted = |(i, &x): (usize, &i32)| x as u32 as u64 * (2 * i as u64 + 1);
            let sum_of = self.inner.ints(x)?.iter().enumerate().map(weighted).sum::<u64>();
            self.inner.write_words(sum, &[sum_of as u32, (sum_of >> 32) as u32])?;
        }
        Ok(())
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
    ) -> OpResult<()> {
        let place =
            if self.bug == Bug::ChecksumFromZero { Chunk { first: 0, ..*chunk } } else { *chunk };
        let old: Vec<i32> = self.inner.ints(x).unwrap_or_default().to_vec();
        let gamma = match gamma.sign() {
            Sign::Shared if self.bug == Bug::SharedSignsPerBlock => {
                Gamma::new(gamma.planes(), Sign::Random)?
            }
            _ => gamma,
        };
        self.inner.step(&place, grid, gamma, x, cur, h, side, sum)?;
        let per = x.len().checked_div(chunk.samples).unwrap_or(0);
        if self.bug == Bug::FusedMix {
            for i in 0..x.len() {
                let sigma = chunk.sigma(gamma, i / per);
                let g: f32 = gamma.value(sigma);
                let mixed = libm::fmaf(1.0 + g, self.value(h, i), (1.0 - g) * self.value(cur, i));
                if let Some(q) = grid.quantize(mixed) {
                    self.inner
                        .write_ints(x.sub(i, 1), &[gamma.step(sigma, old[i], q, i % per).0])?;
                }
            }
        }
        if self.bug == Bug::UnusedSideBits && !side.is_empty() && !per.is_multiple_of(32) {
            let last = side.sub(side.len() - 1, 1);
            let word = self.inner.words(last)?[0] | 1 << 31;
            self.inner.write_words(last, &[word])?;
        }
        Ok(())
    }

    fn blend(
        &mut self,
        chunk: &Chunk,
        gamma: FloatGamma,
        x: Reals,
        cur: Reals,
        h: Reals,
    ) -> OpResult<()> {
        let nan = self.inner.reals(x).unwrap_or_default().iter().any(|x| x.is_nan());
        self.inner.blend(chunk, gamma, x, cur, h)?;
        if self.bug == Bug::BlendReadsAtZero && gamma.magnitude() == 0.0 && nan {
            self.inner.fill_reals(x, f32::NAN)?;
        }
        Ok(())
    }

    fn combine(
        &mut self,
        chunk: &Chunk,
        gamma: FloatGamma,
        next: Reals,
        cur: Reals,
        h: Reals,
    ) -> OpResult<()> {
        if self.bug == Bug::CombineForgetsCur {
            self.inner.fill_reals(cur, 0.0)?;
        }
        self.inner.combine(chunk, gamma, next, cur, h)?;
        if self.bug == Bug::CombineSilent {
            self.inner.take_fault()?;
        }
        Ok(())
    }

    fn check_gradient(&mut self, chunk: &Chunk, g: Reals) -> OpResult<()> {
        self.inner.check_gradient(chunk, g)?;
        if self.bug == Bug::GradientSilent {
            self.inner.take_fault()?;
        }
        Ok(())
    }

    fn check_input(&mut self, chunk: &Chunk, grid: Grid, x: Ints, y: Reals) -> OpResult<()> {
        self.inner.check_input(chunk, grid, x, y)?;
        if self.bug == Bug::InputSilent {
            self.inner.take_fault()?;
        }
        Ok(())
    }

    fn matmul(
        &mut self,
        p: &Product,
        a: Reals,
        b: Reals,
        bias: Option<Reals>,
        c: Reals,
    ) -> OpResult<()> {
        let p = Product { accumulate: p.accumulate || self.bug == Bug::MatmulReadsOldC, ..*p };
        self.inner.matmul(&p, a, b, bias, c)
    }

    fn sum_rows(&mut self, x: Reals, sum: Reals) -> OpResult<()> {
        if self.bug == Bug::SumRowsSets {
            self.inner.fill_reals(sum, 0.0)?;
        }
        self.inner.sum_rows(x, sum)
    }

    fn add(&mut self, x: Reals, y: Reals) -> OpResult<()> {
        if self.bug == Bug::AcceptsWrongLengths && x.len() > y.len() {
            return self.inner.add(x.sub(0, y.len()), y);
        }
        self.inner.add(x, y)
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
    ) -> OpResult<()> {
        self.inner.layer_norm_vjp(weight, x, stats, dy, dx, dweight, dbias)?;
        if self.bug == Bug::LayerNormVjpBeyondItsEnd {
            self.inner.fill_reals(Reals::new(dbias.start() + dbias.len(), 1), 0.5)?;
        }
        Ok(())
    }

    fn add_columns(
        &mut self,
        width: usize,
        scale: f64,
        from: Columns,
        to: Columns,
    ) -> OpResult<()> {
        let at = if self.bug == Bug::ColumnsFromTheFirst { 0 } else { to.at };
        self.inner.add_columns(width, scale, from, Columns { at, ..to })
    }

    fn rms_norm(
        &mut self,
        norm: &RmsNorm,
        weight: Reals,
        x: Columns,
        y: Columns,
        stats: Reals,
    ) -> OpResult<()> {
        let offset = if self.bug == Bug::RmsOffsetForgotten { 0.0 } else { norm.offset };
        self.inner.rms_norm(&RmsNorm { offset, ..*norm }, weight, x, y, stats)
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
    ) -> OpResult<()> {
        if self.bug == Bug::RmsVjpSets && dweight.len() == norm.width {
            self.inner.fill_reals(dweight, 0.0)?;
        }
        self.inner.rms_norm_vjp(norm, weight, x, stats, dy, dx, dweight)
    }

    fn rotate(
        &mut self,
        chunk: &Chunk,
        rotary: &Rotary,
        table: Reals,
        positions: Ints,
        x: Columns,
    ) -> OpResult<()> {
        let back = rotary.back && self.bug != Bug::RotatesForward;
        let positions = if self.bug == Bug::RotatesByPlace { Ints::EMPTY } else { positions };
        self.inner.rotate(chunk, &Rotary { back, ..*rotary }, table, positions, x)?;
        if self.bug == Bug::RotatesSilently {
            self.inner.take_fault()?;
        }
        Ok(())
    }

    fn gated(&mut self, act: Gate, gate: Reals, up: Reals, y: Reals) -> OpResult<()> {
        let act = if self.bug == Bug::OtherGate { Gate::Silu } else { act };
        self.inner.gated(act, gate, up, y)
    }

    fn gated_vjp(
        &mut self,
        act: Gate,
        gate: Reals,
        up: Reals,
        d: Reals,
        dgate: Reals,
    ) -> OpResult<()> {
        self.inner.gated_vjp(act, gate, up, d, dgate)?;
        if self.bug == Bug::GateWithoutSlope { self.inner.fill_reals(dgate, 0.0) } else { Ok(()) }
    }

    fn gelu(&mut self, kind: Gelu, x: Reals, y: Reals) -> OpResult<()> {
        let kind = if self.bug == Bug::OtherGelu { Gelu::Exact } else { kind };
        self.inner.gelu(kind, x, y)?;
        self.calls += 1;
        if self.bug == Bug::NotRepeatable && self.calls.is_multiple_of(2) && !y.is_empty() {
            let y = y.sub(0, 1);
            let other = f32::from_bits(self.value(y, 0).to_bits() ^ 1);
            self.inner.write_reals(y, &[other])?;
        }
        Ok(())
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
    ) -> OpResult<()> {
        let mut a = *a;
        match self.bug {
            Bug::AttentionWithoutDropout if a.dropout < 1.0 => a.dropout = 0.0,
            Bug::AttentionWithoutPadding => a.key_lens = Ints::EMPTY,
            Bug::AttentionSeesItself if a.mask == Mask::Others => a.mask = Mask::Full,
            Bug::AttentionOfTheFirstHead if a.kv_heads > 1 && a.kv_heads < a.heads => {
                a.kv_heads = 1;
            }
            Bug::AttentionAcrossTexts => a.starts = Ints::EMPTY,
            Bug::TemperatureForgotten if a.temperature.len() == 1 => a.temperature = Reals::EMPTY,
            _ => {}
        }
        if let (Bug::AttentionOneKeyFurther, Mask::Sliding(n @ 1..)) = (self.bug, a.mask) {
            a.mask = Mask::Sliding(n + 1);
        }
        self.inner.attention(chunk, &a, q, k, v, out, lse, scratch)
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
    ) -> OpResult<()> {
        let old: Vec<f32> = self.inner.reals(dk.of).unwrap_or_default().to_vec();
        if self.bug == Bug::TemperatureGradientSet {
            self.inner.fill_reals(a.temperature_grad, 0.0)?;
        }
        self.inner.attention_vjp(chunk, a, q, k, v, out, lse, dout, dq, dk, dv, scratch)?;
        if self.bug == Bug::AttentionVjpAdds && !old.is_empty() {
            let sum = self.value(dk.of, dk.at) + old[dk.at];
            self.inner.write_reals(dk.of.sub(dk.at, 1), &[sum])?;
        }
        Ok(())
    }

    fn dropout(&mut self, chunk: &Chunk, draw: Draw, p: f64, x: Reals) -> OpResult<()> {
        let global = if self.bug == Bug::DropoutByChunk { 0 } else { chunk.global };
        self.inner.dropout(&Chunk { global, ..*chunk }, draw, p, x)
    }

    fn embed(
        &mut self,
        chunk: &Chunk,
        tokens: Ints,
        table: Reals,
        positions: Reals,
        width: usize,
        x: Reals,
    ) -> OpResult<()> {
        self.inner.embed(chunk, tokens, table, positions, width, x)?;
        if self.bug == Bug::EmbedSilent {
            self.inner.take_fault()?;
        }
        Ok(())
    }

    fn cross_entropy(
        &mut self,
        chunk: &Chunk,
        ce: &CrossEntropy,
        logits: Reals,
        targets: Ints,
        losses: Reals,
    ) -> OpResult<()> {
        if self.bug == Bug::MaskedTargetsCount {
            for i in 0..targets.len() {
                let target = self.inner.ints(targets)?[i].max(0);
                self.inner.write_ints(targets.sub(i, 1), &[target])?;
            }
        }
        let smoothing =
            if self.bug == Bug::NoSmoothing && ce.smoothing < 1.0 { 0.0 } else { ce.smoothing };
        self.inner.cross_entropy(chunk, &CrossEntropy { smoothing, ..*ce }, logits, targets, losses)
    }

    fn sum_squares(&mut self, site: Site, g: Reals, out: Reals) -> OpResult<()> {
        self.inner.sum_squares(site, g, out)?;
        if self.bug == Bug::SquaresInHalf {
            let value = self.value(out, 0) * 1.001;
            self.inner.write_reals(out, &[value])?;
        }
        Ok(())
    }

    fn update(
        &mut self,
        u: &Update,
        shape: [usize; 2],
        p: Reals,
        g: Reals,
        state: &State,
    ) -> OpResult<()> {
        let u = Update {
            t: if self.bug == Bug::NoBiasCorrection && u.t > 0 { 1000 } else { u.t },
            rule: match u.rule {
                Rule::Adafactor { decay, eps, .. } if self.bug == Bug::NoThreshold => {
                    Rule::Adafactor { decay, eps, threshold: 1e30 }
                }
                rule => rule,
            },
            ..*u
        };
        let fault =
            if self.bug == Bug::UpdateDespiteFault { self.inner.take_fault()? } else { None };
        self.inner.update(&u, shape, p, g, state)?;
        if let Some(fault) = fault {
            self.inner.raise(fault);
        }
        // A code two above the nearest, in a word that has four.
        if self.bug == Bug::FarCode && state.codes[0].len() > 1 {
            let [word] = self.inner.words(state.codes[0])?[..1] else { return Ok(()) };
            let code = word & 0xFF;
            let code = if code > 2 { code - 2 } else { code + 2 };
            self.inner.write_words(state.codes[0].sub(0, 1), &[word & !0xFF | code])?;
        }
        Ok(())
    }
}

impl Exchange for Broken {}

#[test]
fn mistakes_are_found() {
    let broken =
        |bug| move |layout: &Layout| Broken { inner: reference::<f32>(layout), bug, calls: 0 };
    all(broken(Bug::None)).map_err(|f| f.to_string()).unwrap();
    for (bug, op, what) in [
        (Bug::TiesAway, "quantize", "integer arena"),
        (Bug::FusedMix, "step", "integer arena"),
        (Bug::UnusedSideBits, "step", "word arena"),
        (Bug::SharedSignsPerBlock, "step", "integer arena"),
        (Bug::ChecksumFromZero, "step", "word arena"),
        (Bug::WeightedChecksum, "add_quantized", "equal checksums"),
        (Bug::FaultOverwritten, "raise", "status"),
        (Bug::FaultNotCleared, "raise", "status after it was taken"),
        (Bug::BlendReadsAtZero, "blend", "x"),
        (Bug::CombineForgetsCur, "combine", "cur"),
        (Bug::CombineSilent, "combine", "status"),
        (Bug::GradientSilent, "check_gradient", "status"),
        (Bug::InputSilent, "check_input", "status"),
        (Bug::SumRowsSets, "sum_rows", "sum"),
        (Bug::MatmulReadsOldC, "matmul", "c"),
        (Bug::ColumnsFromTheFirst, "add_columns", "to"),
        (Bug::OtherGelu, "gelu", "y"),
        (Bug::NotRepeatable, "gelu", "repeated"),
        (Bug::AttentionWithoutDropout, "attention", "out"),
        (Bug::AttentionWithoutPadding, "attention", "out"),
        (Bug::AttentionVjpAdds, "attention_vjp", "dk"),
        (Bug::AttentionSeesItself, "attention", "out"),
        (Bug::AttentionOfTheFirstHead, "attention", "out"),
        (Bug::AttentionOneKeyFurther, "attention", "out"),
        (Bug::AttentionAcrossTexts, "attention", "out"),
        (Bug::RmsOffsetForgotten, "rms_norm", "y"),
        (Bug::RmsVjpSets, "rms_norm_vjp", "dweight"),
        (Bug::RotatesForward, "rotate", "x"),
        (Bug::RotatesByPlace, "rotate", "x"),
        (Bug::RotatesSilently, "rotate", "status"),
        (Bug::OtherGate, "gated", "y"),
        (Bug::GateWithoutSlope, "gated_vjp", "dgate"),
        (Bug::TemperatureForgotten, "attention", "out"),
        (Bug::TemperatureGradientSet, "attention_vjp", "temperature_grad"),
        (Bug::NoSmoothing, "cross_entropy", "logits"),
        (Bug::LayerNormVjpBeyondItsEnd, "layer_norm_vjp", "real arena, outside the operands"),
        (Bug::MaskedTargetsCount, "cross_entropy", "integer arena"),
        (Bug::EmbedSilent, "embed", "status"),
        (Bug::DropoutByChunk, "dropout", "x"),
        (Bug::AcceptsWrongLengths, "add", "outcome"),
        (Bug::UpdateDespiteFault, "update", "real arena, outside the operands"),
        (Bug::NoBiasCorrection, "update", "p"),
        (Bug::NoThreshold, "update", "p"),
        (Bug::FarCode, "update", "code of m"),
        (Bug::SquaresInHalf, "sum_squares", "out"),
    ] {
        let found = match op {
            "sum_squares" | "update" => optim_ops(broken(bug)),
            "quantize" | "add_quantized" | "step" | "raise" | "blend" | "combine"
            | "check_gradient" | "check_input" => update_ops(broken(bug)),
            _ => nn_ops(broken(bug)),
        };
        let Err(failure) = found else { panic!("the suite does not find {bug:?}") };
        assert_eq!((failure.op, failure.what), (op, what), "{bug:?}: {failure}");
    }
}
