//! [`UpdateOps`] of the reference backend: [`crate::update`] element by element.

use super::{Reference, split};
use crate::arena::{Ints, Reals, Words};
use crate::backend::{Chunk, UpdateOps};
use crate::error::{Error, Fault, Result, Site};
use crate::real::Real;
use crate::update::{FloatGamma, Gamma, Grid, LIMIT, advance, checksum, combine, retreat};

/// Adds to a 64-bit number kept in two words; nothing where there are none.
fn accumulate(words: &mut [u32], add: u64) -> Result<()> {
    match words {
        [] => Ok(()),
        [low, high] => {
            let sum = (u64::from(*high) << 32 | u64::from(*low)).wrapping_add(add);
            (*low, *high) = (sum as u32, (sum >> 32) as u32);
            Ok(())
        }
        _ => Err(Error::Shape { what: "words of a sum", expected: 2, found: words.len() }),
    }
}

/// Keeps the first bad value of an operation.
struct First(Option<(usize, f64)>);

impl First {
    fn see(&mut self, index: usize, value: impl Real) {
        self.0.get_or_insert((index, value.wide()));
    }
}

impl<R: Real> Reference<'_, R> {
    fn fault_of(
        &mut self,
        chunk: &Chunk,
        per: usize,
        bad: First,
        fault: impl FnOnce(Site, usize, f64) -> Fault,
    ) {
        if let Some((index, value)) = bad.0 {
            let sample = chunk.first.saturating_add(index.checked_div(per).unwrap_or(0));
            self.fault.get_or_insert(fault(chunk.site, sample, value));
        }
    }

    fn range_fault(&mut self, chunk: &Chunk, per: usize, bad: First) {
        self.fault_of(chunk, per, bad, |site, sample, value| Fault::Range { site, sample, value });
    }

    fn gradient_fault(&mut self, chunk: &Chunk, per: usize, bad: First) {
        self.fault_of(chunk, per, bad, |site, sample, value| Fault::ActivationGradient {
            site,
            sample,
            value,
        });
    }
}

impl<R: Real> UpdateOps for Reference<'_, R> {
    fn quantize(&mut self, chunk: &Chunk, grid: Grid, y: Reals, x: Ints, sum: Words) -> Result<()> {
        let per = self.arenas().quantize("quantize", chunk, y, x, sum)?;
        let at = chunk.first.wrapping_mul(per);
        let x = self.ints.get_mut(x.range()).ok_or(Error::Handle("quantize"))?;
        let y = self.reals.get(y.range()).ok_or(Error::Handle("quantize"))?;
        let sum = self.words.get_mut(sum.range()).ok_or(Error::Handle("quantize"))?;
        let (mut bad, mut total) = (First(None), 0_u64);
        for (i, (x, &y)) in x.iter_mut().zip(y).enumerate() {
            *x = grid.quantize(y).unwrap_or_else(|| {
                bad.see(i, y);
                0
            });
            total = total.wrapping_add(checksum(*x, at.wrapping_add(i)));
        }
        accumulate(sum, total)?;
        self.range_fault(chunk, per, bad);
        Ok(())
    }

    fn dequantize(&mut self, grid: Grid, x: Ints, y: Reals) -> Result<()> {
        self.arenas().dequantize(x, y)?;
        let x = self.ints.get(x.range()).ok_or(Error::Handle("dequantize"))?;
        let y = self.reals.get_mut(y.range()).ok_or(Error::Handle("dequantize"))?;
        for (y, &x) in y.iter_mut().zip(x) {
            *y = grid.dequantize(x);
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
    ) -> Result<()> {
        let per = self.arenas().quantize("add_quantized", chunk, h, x, sum)?;
        let at = chunk.first.wrapping_mul(per);
        let x = self.ints.get_mut(x.range()).ok_or(Error::Handle("add_quantized"))?;
        let h = self.reals.get(h.range()).ok_or(Error::Handle("add_quantized"))?;
        let sum = self.words.get_mut(sum.range()).ok_or(Error::Handle("add_quantized"))?;
        let (mut bad, mut total) = (First(None), 0_u64);
        for (i, (x, &h)) in x.iter_mut().zip(h).enumerate() {
            let q = grid.quantize(h).unwrap_or_else(|| {
                bad.see(i, h);
                0
            });
            *x = x.wrapping_add(q);
            if x.unsigned_abs() > LIMIT as u32 {
                bad.see(i, grid.dequantize::<f64>(*x));
            }
            total = total.wrapping_add(checksum(*x, at.wrapping_add(i)));
        }
        accumulate(sum, total)?;
        self.range_fault(chunk, per, bad);
        Ok(())
    }

    fn subtract_quantized(
        &mut self,
        chunk: &Chunk,
        grid: Grid,
        x: Ints,
        h: Reals,
        sum: Words,
    ) -> Result<()> {
        let per = self.arenas().quantize("subtract_quantized", chunk, h, x, sum)?;
        let at = chunk.first.wrapping_mul(per);
        let x = self.ints.get_mut(x.range()).ok_or(Error::Handle("subtract_quantized"))?;
        let h = self.reals.get(h.range()).ok_or(Error::Handle("subtract_quantized"))?;
        let sum = self.words.get_mut(sum.range()).ok_or(Error::Handle("subtract_quantized"))?;
        let mut total = 0_u64;
        for (i, (x, &h)) in x.iter_mut().zip(h).enumerate() {
            *x = x.wrapping_sub(grid.quantize(h).unwrap_or(0));
            total = total.wrapping_add(checksum(*x, at.wrapping_add(i)));
        }
        accumulate(sum, total)
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
        let (per, m) = self.arenas().step("step", chunk, gamma, x, [cur, h], (side, true), sum)?;
        let at = chunk.first.wrapping_mul(per);
        let x = self.ints.get_mut(x.range()).ok_or(Error::Handle("step"))?;
        let cur = self.reals.get(cur.range()).ok_or(Error::Handle("step"))?;
        let h = self.reals.get(h.range()).ok_or(Error::Handle("step"))?;
        let [side, sum] = split(self.words, [side.range(), sum.range()], "step")?;
        let stride = per.div_ceil(32);
        side.fill(0);
        let (mut bad, mut total) = (First(None), 0_u64);
        for s in 0..if per == 0 { 0 } else { chunk.samples } {
            let sigma = chunk.sigma(gamma, s);
            for e in 0..per {
                let i = s * per + e;
                let y = gamma.mix(sigma, cur[i], h[i]);
                let q = grid.quantize(y).unwrap_or_else(|| {
                    bad.see(i, y);
                    0
                });
                let r = x[i] as u32 & ((1 << m) - 1);
                if !side.is_empty() {
                    for plane in 0..m {
                        side[(s * m as usize + plane as usize) * stride + e / 32] |=
                            (r >> plane & 1) << (e % 32);
                    }
                }
                x[i] = advance(m, sigma, x[i], q, r, e);
                if x[i].unsigned_abs() > LIMIT as u32 {
                    bad.see(i, grid.dequantize::<f64>(x[i]));
                }
                total = total.wrapping_add(checksum(x[i], at.wrapping_add(i)));
            }
        }
        accumulate(sum, total)?;
        self.range_fault(chunk, per, bad);
        Ok(())
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
            self.arenas().step("inverse", chunk, gamma, x, [cur, h], (side, false), sum)?;
        let at = chunk.first.wrapping_mul(per);
        let x = self.ints.get_mut(x.range()).ok_or(Error::Handle("inverse"))?;
        let cur = self.reals.get(cur.range()).ok_or(Error::Handle("inverse"))?;
        let h = self.reals.get(h.range()).ok_or(Error::Handle("inverse"))?;
        let [side, sum] = split(self.words, [side.range(), sum.range()], "inverse")?;
        let stride = per.div_ceil(32);
        let mut total = 0_u64;
        for s in 0..if per == 0 { 0 } else { chunk.samples } {
            let sigma = chunk.sigma(gamma, s);
            for e in 0..per {
                let i = s * per + e;
                let q = grid.quantize(gamma.mix(sigma, cur[i], h[i])).unwrap_or(0);
                let mut r = 0;
                for plane in 0..m {
                    r |= (side[(s * m as usize + plane as usize) * stride + e / 32] >> (e % 32)
                        & 1)
                        << plane;
                }
                x[i] = retreat(m, sigma, x[i], q, r, e);
                total = total.wrapping_add(checksum(x[i], at.wrapping_add(i)));
            }
        }
        accumulate(sum, total)
    }

    fn blend(
        &mut self,
        chunk: &Chunk,
        gamma: FloatGamma,
        x: Reals,
        cur: Reals,
        h: Reals,
    ) -> Result<()> {
        let per = self.arenas().blend("blend", chunk, x, cur, h)?;
        let [x, cur, h] = split(self.reals, [x.range(), cur.range(), h.range()], "blend")?;
        let mut bad = First(None);
        for s in 0..if per == 0 { 0 } else { chunk.samples } {
            let sigma = chunk.sigma(gamma, s);
            let g = gamma.value::<R>(sigma);
            for i in s * per..(s + 1) * per {
                let mixed = gamma.mix(sigma, cur[i], h[i]);
                x[i] = if gamma.magnitude() == 0.0 { mixed } else { g * x[i] + mixed };
                if !x[i].is_finite() {
                    bad.see(i, x[i]);
                }
            }
        }
        self.range_fault(chunk, per, bad);
        Ok(())
    }

    fn unblend(
        &mut self,
        chunk: &Chunk,
        gamma: FloatGamma,
        x: Reals,
        cur: Reals,
        h: Reals,
    ) -> Result<()> {
        let per = self.arenas().blend("unblend", chunk, x, cur, h)?;
        let [x, cur, h] = split(self.reals, [x.range(), cur.range(), h.range()], "unblend")?;
        for s in 0..if per == 0 { 0 } else { chunk.samples } {
            let sigma = chunk.sigma(gamma, s);
            for i in s * per..(s + 1) * per {
                x[i] = (x[i] - gamma.mix(sigma, cur[i], h[i])) / gamma.value(sigma);
            }
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
    ) -> Result<()> {
        let per = self.arenas().blend("combine", chunk, next, cur, h)?;
        let [next, cur, h] = split(self.reals, [next.range(), cur.range(), h.range()], "combine")?;
        let mut bad = First(None);
        for s in 0..if per == 0 { 0 } else { chunk.samples } {
            let g = gamma.value::<R>(chunk.sigma(gamma, s));
            for i in s * per..(s + 1) * per {
                (next[i], cur[i], h[i]) = combine(g, next[i], cur[i]);
                if let Some(&value) = [h[i], cur[i]].iter().find(|x| !x.is_finite()) {
                    bad.see(i, value);
                }
            }
        }
        self.gradient_fault(chunk, per, bad);
        Ok(())
    }

    fn check_gradient(&mut self, chunk: &Chunk, g: Reals) -> Result<()> {
        let per = self.arenas().check_gradient(chunk, g)?;
        let mut bad = First(None);
        let g = self.reals.get(g.range()).ok_or(Error::Handle("check_gradient"))?;
        if let Some((i, &value)) = g.iter().enumerate().find(|(_, x)| !x.is_finite()) {
            bad.see(i, value);
        }
        self.gradient_fault(chunk, per, bad);
        Ok(())
    }

    fn check_input(&mut self, chunk: &Chunk, grid: Grid, x: Ints, y: Reals) -> Result<()> {
        let per = self.arenas().check_input(chunk, x, y)?;
        let mut bad = First(None);
        let x = self.ints.get(x.range()).ok_or(Error::Handle("check_input"))?;
        let y = self.reals.get(y.range()).ok_or(Error::Handle("check_input"))?;
        let bits = |y: R| y.wide().to_bits();
        let differs = |(x, y): (&i32, &R)| bits(*y) != bits(grid.dequantize(*x));
        if let Some(i) = x.iter().zip(y).position(differs) {
            bad.see(i, y[i]);
        }
        self.fault_of(chunk, per, bad, |site, sample, _| Fault::Input { site, sample });
        Ok(())
    }

    fn compare(&mut self, a: Words, b: Words, activation: usize, block: usize) -> Result<()> {
        self.arenas().compare(a, b)?;
        if self.words(a)? != self.words(b)? {
            self.fault.get_or_insert(Fault::Checksum { activation, block });
        }
        Ok(())
    }

    fn count_differences(&mut self, a: Ints, b: Ints, count: Words) -> Result<()> {
        self.arenas().count_differences(a, b, count)?;
        let differing =
            self.ints(a)?.iter().zip(self.ints(b)?).filter(|(a, b)| a != b).count() as u64;
        accumulate(
            self.words.get_mut(count.range()).ok_or(Error::Handle("count_differences"))?,
            differing,
        )
    }
}
