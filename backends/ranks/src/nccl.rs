//! Ranks whose gradients travel between CUDA devices by NCCL; the few words beside them go over
//! MPI, which also tells every rank NCCL's id.
//!
//! NCCL only carries: what is added up, and in which order, is the same as over MPI, so that both
//! give the same bits.

use core::ops::Range;
use core::time::Duration;
use std::sync::Arc;
use std::time::Instant;

use bdia_core::{Error, Halt, Result};
use cudarc::driver::{CudaContext, CudaSlice, CudaStream};
use cudarc::nccl::{Comm, Id, group_end, group_start};

use crate::link::{Link, check};
use crate::mpi::Mpi;
use crate::wire::HEADER;

/// Words of NCCL's id, and one that says whether a rank has what it takes.
const HELLO: usize = 33;
const PAUSE: Duration = Duration::from_micros(50);

/// The processes that `mpirun` started, each with a CUDA device of its own.
#[expect(missing_debug_implementations, reason = "MPI's environment has nothing to show")]
pub struct Nccl {
    mpi: Mpi,
    limit: Duration,
    /// None after an error: what NCCL is stuck in must not be waited for.
    device: Option<Device>,
}

struct Device {
    stream: Arc<CudaStream>,
    comm: Comm,
    out: CudaSlice<u32>,
    into: CudaSlice<u32>,
}

/// Whether both libraries can be loaded.
fn installed() -> Result<()> {
    // SAFETY: it only loads the library.
    if !unsafe { cudarc::driver::sys::is_culib_present() } {
        return Err(Error::Device("the CUDA driver (libcuda) is not installed"));
    }
    // SAFETY: as above.
    if !unsafe { cudarc::nccl::sys::is_culib_present() } {
        return Err(Error::Device("NCCL (libnccl) is not installed"));
    }
    Ok(())
}

fn broken<E>(_: E) -> Error {
    Error::Device("NCCL, or the CUDA device below it, failed")
}

impl Nccl {
    /// Starts MPI, and NCCL on device number `device` of this machine. Waits for other ranks for at
    /// most `limit` at a time.
    ///
    /// # Errors
    /// Those of [`Mpi::open`]; [`Error::Device`] where the CUDA driver, NCCL or the device is
    /// missing here, and [`Error::Rank`] where it is missing elsewhere.
    pub fn open(limit: Duration, device: usize) -> Result<Self> {
        let mut mpi = Mpi::open(limit)?;
        let (rank, ranks) = (mpi.rank(), mpi.ranks());
        let stream = installed()
            .and_then(|()| CudaContext::new(device).and_then(|c| c.new_stream()).map_err(broken));
        let mut hello = vec![0_u32; HELLO];
        hello[0] = u32::from(stream.is_ok());
        if rank == 0 && stream.is_ok() {
            for (words, bytes) in
                hello[1..].iter_mut().zip(Id::new().map_err(broken)?.internal().chunks_exact(4))
            {
                *words = u32::from_le_bytes(core::array::from_fn(|i| bytes[i] as u8));
            }
        }
        let (own, mut all) = mpi
            .trade(hello, vec![0; HELLO * ranks], &|_| 0..HELLO, &|p| HELLO * p..HELLO * (p + 1))?;
        let stream = stream?;
        all[HELLO * rank..HELLO * (rank + 1)].copy_from_slice(&own);
        if let Some(p) = (0..ranks).find(|p| all[HELLO * p] == 0) {
            return Err(Error::Rank { rank: p, why: Halt::Astray });
        }
        let mut id = [0; 128];
        for (bytes, words) in id.chunks_exact_mut(4).zip(&all[1..HELLO]) {
            bytes
                .iter_mut()
                .zip(words.to_le_bytes())
                .for_each(|(to, from)| *to = from as core::ffi::c_char);
        }
        let comm = Comm::from_rank(stream.clone(), rank, ranks, Id::uninit(id)).map_err(broken)?;
        let empty = || stream.alloc_zeros(1).map_err(broken);
        let device = Device { comm, out: empty()?, into: empty()?, stream };
        Ok(Self { mpi, limit, device: Some(device) })
    }

    /// Who is silent: those that are not ask each other over MPI.
    fn late(&mut self) -> Error {
        let ranks = self.ranks();
        match self.mpi.trade(vec![0], vec![0; ranks], &|_| 0..1, &|p| p..p + 1) {
            Err(error) => error,
            Ok(_) => Error::Device("NCCL does not answer, though all ranks do"),
        }
    }
}

impl Device {
    /// Room for as many words as the host's buffers have.
    fn reserve(&mut self, out: usize, into: usize) -> Result<()> {
        for (buffer, len) in [(&mut self.out, out), (&mut self.into, into)] {
            if buffer.len() < len {
                *buffer = self.stream.alloc_zeros(len).map_err(broken)?;
            }
        }
        Ok(())
    }

    /// Starts all messages, which are one group.
    fn start(
        &mut self,
        (rank, ranks): (usize, usize),
        send: &dyn Fn(usize) -> Range<usize>,
        receive: &dyn Fn(usize) -> Range<usize>,
    ) -> Result<()> {
        group_start().map_err(broken)?;
        let mut messages = || {
            for p in (0..ranks).filter(|&p| p != rank) {
                let peer = i32::try_from(p).map_err(|_| Error::TooLarge("number of ranks"))?;
                if !send(p).is_empty() {
                    self.comm.send(&self.out.slice(send(p)), peer).map_err(broken)?;
                }
                if !receive(p).is_empty() {
                    self.comm.recv(&mut self.into.slice_mut(receive(p)), peer).map_err(broken)?;
                }
            }
            Ok(())
        };
        let started = messages();
        // A group that was begun has to end.
        group_end().map_err(broken)?;
        started
    }
}

impl Link for Nccl {
    fn rank(&self) -> usize {
        self.mpi.rank()
    }

    fn ranks(&self) -> usize {
        self.mpi.ranks()
    }

    fn trade(
        &mut self,
        out: Vec<u32>,
        mut into: Vec<u32>,
        send: &dyn Fn(usize) -> Range<usize>,
        receive: &dyn Fn(usize) -> Range<usize>,
    ) -> Result<(Vec<u32>, Vec<u32>)> {
        // Headers, which every request begins with: a rank that is silent is found there.
        if out.len() <= HEADER {
            return self.mpi.trade(out, into, send, receive);
        }
        let place = (self.rank(), self.ranks());
        check(place, (out.len(), into.len()), send, receive)?;
        let mut device = self.device.take().ok_or(Error::Device("NCCL failed before"))?;
        let mut carry = || {
            device.reserve(out.len(), into.len())?;
            device.stream.memcpy_htod(&out, &mut device.out).map_err(broken)?;
            device.start(place, send, receive)?;
            let done = device.stream.record_event(None).map_err(broken)?;
            let until = Instant::now() + self.limit;
            while !done.is_complete() {
                if Instant::now() >= until {
                    return Ok(false);
                }
                std::thread::sleep(PAUSE);
            }
            for range in
                (0..place.1).filter(|&p| p != place.0).map(receive).filter(|r| !r.is_empty())
            {
                device
                    .stream
                    .memcpy_dtoh(&device.into.slice(range.clone()), &mut into[range])
                    .map_err(broken)?;
            }
            device.stream.synchronize().map_err(broken)?;
            Ok(true)
        };
        match carry() {
            Ok(true) => {
                self.device = Some(device);
                Ok((out, into))
            }
            failed => {
                // Freeing waits for the stream, which waits for the rank that is silent.
                core::mem::forget((device, out, into));
                Err(failed.err().unwrap_or_else(|| self.late()))
            }
        }
    }
}
