//! What carries words from one rank to another.

use core::ops::Range;
use core::time::Duration;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Instant;

use bdia_core::{Error, Halt, Result};

/// A way to the other ranks. All calls are made by one thread.
pub trait Link {
    /// Number of this rank, from 0.
    fn rank(&self) -> usize;

    /// How many there are.
    fn ranks(&self) -> usize;

    /// Sends `out[send(p)]` to every other rank `p`, receives `into[receive(p)]` from it, and gives
    /// both buffers back when all of it is through. The ranges that receive rise with `p` and do
    /// not overlap; what one rank sends is as long as what the other receives; an empty range is no
    /// message.
    ///
    /// # Errors
    /// [`Error::Rank`] for a rank that is silent longer than the link waits, or is gone;
    /// [`Error::Handle`] for ranges outside the buffers. After an error the link is of no use.
    fn trade(
        &mut self,
        out: Vec<u32>,
        into: Vec<u32>,
        send: &dyn Fn(usize) -> Range<usize>,
        receive: &dyn Fn(usize) -> Range<usize>,
    ) -> Result<(Vec<u32>, Vec<u32>)>;
}

/// Checks the ranges of [`Link::trade`].
pub(crate) fn check(
    (rank, ranks): (usize, usize),
    (out, into): (usize, usize),
    send: &dyn Fn(usize) -> Range<usize>,
    receive: &dyn Fn(usize) -> Range<usize>,
) -> Result<()> {
    let mut free = 0;
    for p in (0..ranks).filter(|&p| p != rank) {
        let (s, r) = (send(p), receive(p));
        let good = s.start <= s.end && s.end <= out && r.start <= r.end && r.end <= into;
        if !good || (!r.is_empty() && r.start < free) {
            return Err(Error::Handle("trade"));
        }
        free = free.max(r.end);
    }
    Ok(())
}

/// Ranks that are threads of one process: for tests, and to try things out.
#[derive(Debug)]
pub struct Local {
    rank: usize,
    limit: Duration,
    to: Vec<Sender<Vec<u32>>>,
    from: Vec<Receiver<Vec<u32>>>,
}

impl Local {
    /// The links of `ranks` ranks, in their order; each waits for at most `limit`.
    pub fn group(ranks: usize, limit: Duration) -> Vec<Self> {
        let mut all: Vec<_> =
            (0..ranks).map(|rank| Self { rank, limit, to: Vec::new(), from: Vec::new() }).collect();
        for a in 0..ranks {
            for b in 0..ranks {
                let (to, from) = channel();
                all[a].to.push(to);
                all[b].from.push(from);
            }
        }
        all
    }
}

impl Link for Local {
    fn rank(&self) -> usize {
        self.rank
    }

    fn ranks(&self) -> usize {
        self.to.len()
    }

    fn trade(
        &mut self,
        out: Vec<u32>,
        mut into: Vec<u32>,
        send: &dyn Fn(usize) -> Range<usize>,
        receive: &dyn Fn(usize) -> Range<usize>,
    ) -> Result<(Vec<u32>, Vec<u32>)> {
        let (rank, ranks) = (self.rank, self.ranks());
        check((rank, ranks), (out.len(), into.len()), send, receive)?;
        let others = || (0..ranks).filter(|&p| p != rank);
        let until = Instant::now() + self.limit;
        for p in others().filter(|&p| !send(p).is_empty()) {
            self.to[p]
                .send(out[send(p)].to_vec())
                .map_err(|_| Error::Rank { rank: p, why: Halt::Gone })?;
        }
        for p in others().filter(|&p| !receive(p).is_empty()) {
            let came = self.from[p]
                .recv_timeout(until.saturating_duration_since(Instant::now()))
                .map_err(|e| {
                let why = match e {
                    RecvTimeoutError::Timeout => Halt::Silent(self.limit.as_secs()),
                    RecvTimeoutError::Disconnected => Halt::Gone,
                };
                Error::Rank { rank: p, why }
            })?;
            let place = &mut into[receive(p)];
            if came.len() != place.len() {
                return Err(Error::Rank { rank: p, why: Halt::Astray });
            }
            place.copy_from_slice(&came);
        }
        Ok((out, into))
    }
}
