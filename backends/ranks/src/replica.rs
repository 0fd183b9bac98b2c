//! A backend that is one of several ranks.

use bdia_core::arena::{Ints, Reals, Words};
use bdia_core::backend::{
    Attention, Backend, Chunk, Columns, CrossEntropy, Exchange, Gelu, Half, Identity, NnOps,
    OptimOps, Product, Storage, UpdateOps,
};
use bdia_core::error::{Error, Fault, Halt, Result, Site};
use bdia_core::optim::Update;
use bdia_core::plan::Rows;
use bdia_core::rng::Draw;
use bdia_core::update::{Gamma, Grid};

use crate::ranks::Ranks;
use crate::wire::{HEADER, Kind, fault, fault_of, numbers, numbers_of};

/// A backend whose gradients are added up over ranks: everything else is `inner`'s.
#[derive(Debug)]
pub struct Replica<'a, B> {
    inner: &'a mut B,
    ranks: &'a mut Ranks,
    /// The fault that all ranks know of, and the rank that met it.
    shared: Option<(usize, Fault)>,
}

impl<'a, B: Backend<Real = f32>> Replica<'a, B> {
    /// The backend of this rank.
    pub const fn new(inner: &'a mut B, ranks: &'a mut Ranks) -> Self {
        Self { inner, ranks, shared: None }
    }

    /// The first rank's fault becomes everybody's. One that all have met is nobody's in particular:
    /// a sum that is not finite.
    fn share_faults(&mut self, headers: &[u32]) {
        let mut all = headers.chunks_exact(HEADER);
        let Some((rank, first)) = all.clone().enumerate().find(|(_, h)| fault_of(h).is_some())
        else {
            return;
        };
        if let (None, Some(fault)) = (self.shared, fault_of(first))
            && !all.all(|h| h == first)
        {
            self.shared = Some((rank, fault));
            self.inner.raise(fault);
        }
    }
}

impl<B: Backend<Real = f32>> Exchange for Replica<'_, B> {
    fn rank(&self) -> usize {
        self.ranks.rank()
    }

    fn ranks(&self) -> usize {
        self.ranks.ranks()
    }

    fn exchange(&mut self, own: Reals, sum: Reals) -> Result<()> {
        let mut came = None;
        if !sum.is_empty() {
            let answer = self.ranks.receive()?;
            if answer.len != sum.len() {
                return Err(Error::Shape {
                    what: "gradients that come back",
                    expected: answer.len,
                    found: sum.len(),
                });
            }
            self.share_faults(&answer.headers);
            came = Some(answer);
        }
        if own.is_empty() {
            if let Some(answer) = came {
                self.inner
                    .write_reals(sum, bytemuck::cast_slice(&answer.buffers.into[..sum.len()]))?;
                self.ranks.recycle(answer.buffers);
            }
            return Ok(());
        }
        // What came is in one of its two buffers, what goes is put into the other: the same place
        // can give and take.
        let mut buffers = match came {
            Some(mut answer) if answer.buffers.holds(own.len(), self.ranks.ranks()) => {
                self.inner.read_reals(
                    own,
                    bytemuck::cast_slice_mut(&mut answer.buffers.out[..own.len()]),
                )?;
                self.inner
                    .write_reals(sum, bytemuck::cast_slice(&answer.buffers.into[..sum.len()]))?;
                answer.buffers
            }
            came => {
                let mut buffers = self.ranks.buffers(own.len());
                self.inner
                    .read_reals(own, bytemuck::cast_slice_mut(&mut buffers.out[..own.len()]))?;
                if let Some(answer) = came {
                    self.inner.write_reals(
                        sum,
                        bytemuck::cast_slice(&answer.buffers.into[..sum.len()]),
                    )?;
                    self.ranks.recycle(answer.buffers);
                }
                buffers
            }
        };
        let status = fault(self.inner.peek_fault()?);
        self.ranks.send(Kind::Gradients, status, core::mem::take(&mut buffers), own.len())
    }

    fn gather(&mut self, own: [f64; 4], each: &mut dyn FnMut([f64; 4])) -> Result<()> {
        if self.ranks.busy() {
            return Err(Error::Setting {
                what: "gradients on their way",
                found: 1.0,
                possible: "0, to gather numbers",
            });
        }
        self.ranks.send(Kind::Numbers, numbers(own), crate::ranks::Buffers::default(), 0)?;
        let answer = self.ranks.receive()?;
        answer.headers.chunks_exact(HEADER).for_each(|h| each(numbers_of(h)));
        Ok(())
    }
}

macro_rules! delegate {
    ($($name:ident($($arg:ident: $type:ty),*);)*) => {$(
        fn $name(&mut self, $($arg: $type),*) -> Result<()> {
            self.inner.$name($($arg),*)
        }
    )*};
}

impl<B: Backend<Real = f32>> Storage for Replica<'_, B> {
    type Real = f32;

    fn identity(&self) -> Identity {
        self.inner.identity()
    }

    fn read_reals(&self, src: Reals, dst: &mut [f32]) -> Result<()> {
        self.inner.read_reals(src, dst)
    }

    fn read_ints(&self, src: Ints, dst: &mut [i32]) -> Result<()> {
        self.inner.read_ints(src, dst)
    }

    fn read_words(&self, src: Words, dst: &mut [u32]) -> Result<()> {
        self.inner.read_words(src, dst)
    }

    delegate! {
        write_reals(dst: Reals, src: &[f32]);
        write_ints(dst: Ints, src: &[i32]);
        write_words(dst: Words, src: &[u32]);
        fill_reals(dst: Reals, value: f32);
        fill_words(dst: Words, value: u32);
        copy_reals(src: Reals, dst: Reals);
        copy_ints(src: Ints, dst: Ints);
    }

    fn raise(&mut self, fault: Fault) {
        self.inner.raise(fault);
    }

    /// A fault that all ranks know of is [`Error::Rank`], on each of them; one of this rank alone
    /// is a fault as ever.
    fn take_fault(&mut self) -> Result<Option<Fault>> {
        let own = self.inner.take_fault()?;
        let Some((rank, fault)) = self.shared.take() else { return Ok(own) };
        // The step is over, on every rank at this place: what it has on its way is of no use.
        while self.ranks.busy() {
            let answer = self.ranks.receive()?;
            self.ranks.recycle(answer.buffers);
        }
        Err(Error::Rank { rank, why: Halt::Fault(fault) })
    }

    fn clear_fault(&mut self) -> Result<()> {
        self.shared = None;
        self.inner.clear_fault()
    }

    fn peek_fault(&mut self) -> Result<Option<Fault>> {
        self.inner.peek_fault()
    }
}

impl<B: Backend<Real = f32>> UpdateOps for Replica<'_, B> {
    delegate! {
        quantize(chunk: &Chunk, grid: Grid, y: Reals, x: Ints, sum: Words);
        dequantize(grid: Grid, x: Ints, y: Reals);
        add_quantized(chunk: &Chunk, grid: Grid, x: Ints, h: Reals, sum: Words);
        subtract_quantized(chunk: &Chunk, grid: Grid, x: Ints, h: Reals, sum: Words);
        step(chunk: &Chunk, grid: Grid, gamma: Gamma, x: Ints, cur: Reals, h: Reals, side: Words, sum: Words);
        inverse(chunk: &Chunk, grid: Grid, gamma: Gamma, x: Ints, cur: Reals, h: Reals, side: Words, sum: Words);
        blend(chunk: &Chunk, gamma: Gamma, x: Reals, cur: Reals, h: Reals);
        unblend(chunk: &Chunk, gamma: Gamma, x: Reals, cur: Reals, h: Reals);
        combine(chunk: &Chunk, gamma: Gamma, next: Reals, cur: Reals, h: Reals);
        compare(a: Words, b: Words, activation: usize, block: usize);
        count_differences(a: Ints, b: Ints, count: Words);
    }
}

impl<B: Backend<Real = f32>> NnOps for Replica<'_, B> {
    delegate! {
        matmul(p: &Product, a: Reals, b: Reals, bias: Option<Reals>, c: Reals);
        sum_rows(x: Reals, sum: Reals);
        add(x: Reals, y: Reals);
        widen(half: Half, x: Words, y: Reals);
        add_columns(width: usize, scale: f64, from: Columns, to: Columns);
        layer_norm(eps: f64, weight: Reals, bias: Reals, x: Reals, y: Reals, stats: Reals);
        layer_norm_vjp(
            weight: Reals, x: Reals, stats: Reals, dy: Reals, dx: Reals, dweight: Reals, dbias: Reals
        );
        gelu(kind: Gelu, x: Reals, y: Reals);
        gelu_vjp(kind: Gelu, x: Reals, d: Reals);
        attention(
            chunk: &Chunk, a: &Attention, q: Columns, k: Columns, v: Columns, out: Reals, lse: Reals, scratch: Reals
        );
        attention_vjp(
            chunk: &Chunk, a: &Attention, q: Columns, k: Columns, v: Columns, out: Reals, lse: Reals, dout: Reals,
            dq: Columns, dk: Columns, dv: Columns, scratch: Reals
        );
        dropout(chunk: &Chunk, draw: Draw, p: f64, x: Reals);
        embed(chunk: &Chunk, tokens: Ints, table: Reals, positions: Reals, width: usize, x: Reals);
        embed_vjp(chunk: &Chunk, tokens: Ints, dx: Reals, width: usize, dtable: Reals, dpositions: Reals);
        cross_entropy(chunk: &Chunk, ce: &CrossEntropy, logits: Reals, targets: Ints, losses: Reals);
    }

    fn rows() -> Rows {
        B::rows()
    }

    fn attention_scratch(a: &Attention, samples: usize, threads: usize) -> usize {
        B::attention_scratch(a, samples, threads)
    }
}

impl<B: Backend<Real = f32>> OptimOps for Replica<'_, B> {
    delegate! {
        sum_squares(site: Site, g: Reals, out: Reals);
        update(u: &Update, p: Reals, g: Reals, m: Reals, v: Reals);
    }
}
