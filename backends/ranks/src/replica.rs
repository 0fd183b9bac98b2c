//! A backend that is one of several ranks.

use bdia_core::arena::Reals;
use bdia_core::backend::{Backend, Exchange, Wrapper};
use bdia_core::error::{Error, Fault, Halt, Result};

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
            return Err(Error::setting("gradients on their way", 1.0, "0, to gather numbers"));
        }
        self.ranks.send(Kind::Numbers, numbers(own), crate::ranks::Buffers::default(), 0)?;
        let answer = self.ranks.receive()?;
        answer.headers.chunks_exact(HEADER).for_each(|h| each(numbers_of(h)));
        Ok(())
    }
}

/// Everything but faults is the inner backend's.
impl<B: Backend<Real = f32>> Wrapper for Replica<'_, B> {
    type Inner = B;

    fn inner(&self) -> &B {
        self.inner
    }

    fn inner_mut(&mut self) -> &mut B {
        self.inner
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
}
