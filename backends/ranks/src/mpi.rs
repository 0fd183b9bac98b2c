//! The ranks of an MPI job.

use core::ops::Range;
use core::time::Duration;
use std::os::raw::{c_int, c_void};
use std::time::Instant;

use bdia_core::{Error, Halt, Result};
use mpi::Threading;
use mpi::environment::Universe;
use mpi::ffi;
use mpi::topology::{AsCommunicator, Communicator, SimpleCommunicator};
use mpi::traits::AsRaw;

use crate::link::{Link, check};

/// Messages carry no other tag: each pair of ranks has one at a time, and MPI keeps their order.
const TAG: c_int = 0;
/// Looks without a pause, before the thread sleeps between them: the processor belongs to those who
/// compute.
const LOOKS: u32 = 32;
/// The shortest and the longest sleep.
const SLEEP: [Duration; 2] = [Duration::from_micros(20), Duration::from_micros(200)];

/// The processes that `mpirun` started.
#[expect(missing_debug_implementations, reason = "the environment has nothing to show")]
pub struct Mpi {
    world: SimpleCommunicator,
    limit: Duration,
    requests: Vec<ffi::MPI_Request>,
    peers: Vec<usize>,
    /// Ends MPI when it is dropped, after everything else.
    _universe: Universe,
}

impl Mpi {
    /// Starts MPI in this process, whose calls all come from the calling thread. Without `mpirun`
    /// it is the only rank. Waits for other ranks for at most `limit` at a time.
    ///
    /// # Errors
    /// [`Error::Device`] where MPI has been started before, or cannot be used by a process with
    /// threads.
    pub fn open(limit: Duration) -> Result<Self> {
        let (universe, level) = mpi::initialize_with_threading(Threading::Funneled)
            .ok_or(Error::Device("MPI has been started before in this process"))?;
        if level < Threading::Funneled {
            return Err(Error::Device("this MPI does not support processes with threads"));
        }
        let world = universe.world();
        // SAFETY: a valid communicator and a constant of the library. From here on errors are
        // returned, not fatal.
        unsafe { ffi::MPI_Comm_set_errhandler(world.as_raw(), ffi::RSMPI_ERRORS_RETURN) };
        Ok(Self { world, limit, requests: Vec::new(), peers: Vec::new(), _universe: universe })
    }

    /// Whether all requests are through.
    fn through(&mut self) -> Result<bool> {
        let mut flag = 0;
        let count = c_int::try_from(self.requests.len())
            .map_err(|_| Error::TooLarge("number of messages"))?;
        // SAFETY: `count` requests, each of a message whose buffer is alive or forgotten (`trade`);
        // completed ones become null. No status is wanted.
        let code = unsafe {
            ffi::MPI_Testall(
                count,
                self.requests.as_mut_ptr(),
                &raw mut flag,
                ffi::RSMPI_STATUSES_IGNORE,
            )
        };
        if code != ffi::MPI_SUCCESS as c_int { Err(self.late(Halt::Gone)) } else { Ok(flag != 0) }
    }

    /// The first rank whose message is not through.
    fn late(&mut self, why: Halt) -> Error {
        let mut rank = self.peers.first().copied().unwrap_or(0);
        for (request, &peer) in self.requests.iter_mut().zip(&self.peers) {
            let mut flag = 0;
            // SAFETY: as in `through`.
            let code = unsafe { ffi::MPI_Test(request, &raw mut flag, ffi::RSMPI_STATUS_IGNORE) };
            if flag == 0 || code != ffi::MPI_SUCCESS as c_int {
                rank = peer;
                break;
            }
        }
        Error::Rank { rank, why }
    }

    fn wait(&mut self) -> Result<()> {
        let until = Instant::now() + self.limit;
        let (mut looks, mut sleep) = (0, SLEEP[0]);
        while !self.through()? {
            looks += 1;
            if looks < LOOKS {
                std::thread::yield_now();
                continue;
            }
            if Instant::now() >= until {
                return Err(self.late(Halt::Silent(self.limit.as_secs())));
            }
            std::thread::sleep(sleep);
            sleep = (sleep * 2).min(SLEEP[1]);
        }
        Ok(())
    }
}

fn count(words: usize) -> Result<c_int> {
    c_int::try_from(words).map_err(|_| Error::TooLarge("a message"))
}

impl Link for Mpi {
    fn rank(&self) -> usize {
        usize::try_from(self.world.as_communicator().rank()).unwrap_or(0)
    }

    fn ranks(&self) -> usize {
        usize::try_from(self.world.as_communicator().size()).unwrap_or(1)
    }

    fn trade(
        &mut self,
        out: Vec<u32>,
        mut into: Vec<u32>,
        send: &dyn Fn(usize) -> Range<usize>,
        receive: &dyn Fn(usize) -> Range<usize>,
    ) -> Result<(Vec<u32>, Vec<u32>)> {
        let (rank, ranks, world) = (self.rank(), self.ranks(), self.world.as_raw());
        check((rank, ranks), (out.len(), into.len()), send, receive)?;
        self.requests.clear();
        self.peers.clear();
        let start = into.as_mut_ptr();
        let mut begin = || -> Result<()> {
            // Receives come first, so that a late rank is found among them.
            for (receives, p) in
                [true, false].into_iter().flat_map(|r| (0..ranks).map(move |p| (r, p)))
            {
                let range = if receives { receive(p) } else { send(p) };
                if p == rank || range.is_empty() {
                    continue;
                }
                // SAFETY: a constant of the library.
                let (n, peer, mut request) =
                    (count(range.len())?, count(p)?, unsafe { ffi::RSMPI_REQUEST_NULL });
                // SAFETY: `check` found the ranges inside their buffers and those that receive
                // apart from each other. Both buffers stay where they are until all requests are
                // through, or are forgotten.
                let code = unsafe {
                    if receives {
                        let to = start.add(range.start).cast::<c_void>();
                        ffi::MPI_Irecv(
                            to,
                            n,
                            ffi::RSMPI_UINT32_T,
                            peer,
                            TAG,
                            world,
                            &raw mut request,
                        )
                    } else {
                        let from = out.as_ptr().add(range.start).cast::<c_void>();
                        ffi::MPI_Isend(
                            from,
                            n,
                            ffi::RSMPI_UINT32_T,
                            peer,
                            TAG,
                            world,
                            &raw mut request,
                        )
                    }
                };
                if code != ffi::MPI_SUCCESS as c_int {
                    return Err(Error::Rank { rank: p, why: Halt::Gone });
                }
                self.requests.push(request);
                self.peers.push(p);
            }
            Ok(())
        };
        if let Err(error) = begin().and_then(|()| self.wait()) {
            // Messages may still be on their way: their memory is MPI's until the process ends.
            core::mem::forget((out, into));
            return Err(error);
        }
        Ok((out, into))
    }
}
