//! Operations that other crates bring: a loop over the backend's threads, on slices of handles.

use core::ops::Range;

use bdia_core::check::{disjoint, same};
use bdia_core::{Ints, Reals, Result, Words};

use crate::Cpu;
use crate::memory::{Shared, get};

/// What an operation reads. Inputs may share memory with each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Inputs<const R: usize, const I: usize, const W: usize> {
    /// Floating-point values.
    pub reals: [Reals; R],
    /// Integers.
    pub ints: [Ints; I],
    /// Words.
    pub words: [Words; W],
}

impl<const R: usize> Inputs<R, 0, 0> {
    /// Nothing but floating-point values.
    pub const fn reals(reals: [Reals; R]) -> Self {
        Self { reals, ints: [], words: [] }
    }
}

/// The values of [`Inputs`], whole.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Values<'a, const R: usize, const I: usize, const W: usize> {
    /// Floating-point values.
    pub reals: [&'a [f32]; R],
    /// Integers.
    pub ints: [&'a [i32]; I],
    /// Words.
    pub words: [&'a [u32]; W],
}

impl Cpu {
    /// An operation of one's own: `f(part, inputs, outputs)` for every part of the outputs, over the
    /// backend's threads. Each output comes with the length of a part; the last part may be shorter,
    /// and all outputs have as many parts. `f` sees the inputs whole, and of the outputs its part.
    ///
    /// ```
    /// # use bdia_core::{Category, Layout, Reals, Result, Storage};
    /// # use bdia_cpu::{Cpu, Inputs};
    /// /// `y[r] = Σ_c x[r, c]` for rows of `width` values.
    /// fn row_sums(cpu: &mut Cpu, width: usize, x: Reals, y: Reals) -> Result<()> {
    ///     const ROWS: usize = 64;
    ///     cpu.each_part("row_sums", Inputs::reals([x]), [(y, ROWS)], |part, from, [y]| {
    ///         let [x] = from.reals;
    ///         for (i, y) in y.iter_mut().enumerate() {
    ///             *y = x[(part * ROWS + i) * width..][..width].iter().sum();
    ///         }
    ///     })
    /// }
    /// # let mut layout = Layout::new(4);
    /// # let [x, y] = [600, 200].map(|n| layout.reals(Category::Workspace, n));
    /// # let mut cpu = Cpu::new(&layout, 2).map_err(bdia_core::Error::from)?;
    /// # cpu.fill_reals(x, 1.5)?;
    /// row_sums(&mut cpu, 3, x, y)?;
    /// assert_eq!(cpu.reals(y)?[199], 4.5);
    /// # Ok::<(), bdia_core::Error>(())
    /// ```
    ///
    /// # The same bits for any number of threads
    /// A part is computed by one call, which writes to nothing else, so every sum has the order that
    /// `f` gives it. That holds as long as parts are cut by the shape of the operands and not by
    /// [`threads`](Self::threads). A sum over parts takes two calls: the first leaves partial sums in
    /// an output, the second adds them up in a single part. Scratch is an output as well.
    ///
    /// # Errors
    /// [`Error::Handle`](bdia_core::Error::Handle) for handles outside their arena or of another
    /// layout, and where an output overlaps another operand; [`Error::Shape`](bdia_core::Error) where
    /// outputs differ in their number of parts. Nothing was computed then.
    pub fn each_part<const R: usize, const I: usize, const W: usize, const O: usize>(
        &mut self,
        what: &'static str,
        inputs: Inputs<R, I, W>,
        outputs: [(Reals, usize); O],
        f: impl Fn(usize, Values<'_, R, I, W>, [&mut [f32]; O]) + Sync,
    ) -> Result<()> {
        let arenas = self.arenas();
        let mut read: [Range<usize>; R] = [const { 0..0 }; R];
        let mut written: [Range<usize>; O] = [const { 0..0 }; O];
        for (place, h) in read.iter_mut().zip(inputs.reals) {
            *place = arenas.reals(what, h)?;
        }
        for (place, (h, _)) in written.iter_mut().zip(outputs) {
            *place = arenas.reals(what, h)?;
        }
        disjoint(what, &read, &written)?;
        let mut values = Values { reals: [&[]; R], ints: [&[]; I], words: [&[]; W] };
        for (slice, h) in values.ints.iter_mut().zip(inputs.ints) {
            arenas.ints(what, h)?;
            *slice = get(&self.ints, h, what)?;
        }
        for (slice, h) in values.words.iter_mut().zip(inputs.words) {
            arenas.words(what, h)?;
            *slice = get(&self.words, h, what)?;
        }
        let parts = |(h, size): (Reals, usize)| h.len().div_ceil(size.max(1));
        let count = outputs.first().map_or(0, |&first| parts(first));
        for output in outputs {
            same(what, count, parts(output))?;
        }
        let reals = Shared::new(&mut self.reals);
        for (slice, place) in values.reals.iter_mut().zip(&read) {
            // SAFETY: inside the arena, and no output overlaps it.
            *slice = unsafe { reals.view(place.start, place.len()) };
        }
        self.team.each(count, |_, part| {
            let own = core::array::from_fn(|i| {
                let (all, size) = (&written[i], outputs[i].1.max(1));
                let at = part * size;
                // SAFETY: inside the arena; outputs overlap nothing, and neither do their parts.
                unsafe { reals.part(all.start + at, size.min(all.len() - at)) }
            });
            f(part, values, own);
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bdia_core::{Category, Error, Layout, Storage};

    #[test]
    fn inputs_of_every_kind_and_outputs_in_parts() {
        let mut l = Layout::new(4);
        let [x, y, sums] = [7, 7, 3].map(|n| l.reals(Category::Workspace, n));
        let (i, w) = (l.ints(Category::Workspace, 7), l.words(Category::Workspace, 1));
        for threads in [1, 3] {
            let mut cpu = Cpu::new(&l, threads).unwrap();
            cpu.write_reals(x, &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]).unwrap();
            cpu.write_ints(i, &[10, 20, 30, 40, 50, 60, 70]).unwrap();
            cpu.write_words(w, &[100]).unwrap();
            // The same input twice; three parts of 3, 3 and 1 values.
            let inputs = Inputs { reals: [x, x], ints: [i], words: [w] };
            cpu.each_part("op", inputs, [(y, 3), (sums, 1)], |part, from, [y, sum]| {
                let ([a, b], [i], [w]) = (from.reals, from.ints, from.words);
                for (k, y) in y.iter_mut().enumerate() {
                    let at = 3 * part + k;
                    *y = a[at] + b[at] + i[at] as f32 + w[0] as f32;
                    sum[0] += *y;
                }
            })
            .unwrap();
            let expected = [112.0, 124.0, 136.0, 148.0, 160.0, 172.0, 184.0];
            assert_eq!(cpu.reals(y).unwrap(), expected);
            assert_eq!(cpu.reals(sums).unwrap(), [372.0, 480.0, 184.0]);
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let mut l = Layout::new(4);
        let [x, y] = [8, 8].map(|n| l.reals(Category::Workspace, n));
        let other = Layout::new(4).reals(Category::Workspace, 8);
        let (ints, words) = (Ints::new(0, 1), Words::new(0, 1));
        let mut cpu = Cpu::new(&l, 2).unwrap();
        let mut run = |reals: [Reals; 1], outputs: [(Reals, usize); 2]| {
            cpu.each_part("op", Inputs::reals(reals), outputs, |_, _, _| panic!("it ran"))
        };
        let outside = Reals::new(30, 8);
        for (inputs, outputs) in [
            ([outside], [(y, 8), (Reals::EMPTY, 1)]),
            ([x], [(outside, 8), (Reals::EMPTY, 1)]),
            ([other], [(y, 8), (Reals::EMPTY, 1)]),
            ([x], [(x.sub(7, 1), 1), (Reals::EMPTY, 1)]),
            ([x], [(y, 8), (y.sub(7, 1), 1)]),
        ] {
            assert_eq!(run(inputs, outputs), Err(Error::Handle("op")));
        }
        let uneven = run([x], [(y, 4), (Reals::EMPTY, 1)]);
        assert_eq!(uneven, Err(Error::Shape { what: "op", expected: 2, found: 0 }));
        // Nothing to write: nothing runs.
        assert_eq!(run([x], [(Reals::EMPTY, 0), (Reals::EMPTY, 5)]), Ok(()));
        let inputs = Inputs { reals: [], ints: [ints], words: [] };
        assert!(cpu.each_part("op", inputs, [(y, 1)], |_, _, _| ()).is_err());
        let inputs = Inputs { reals: [], ints: [], words: [words] };
        assert!(cpu.each_part("op", inputs, [(y, 1)], |_, _, _| ()).is_err());
    }
}
