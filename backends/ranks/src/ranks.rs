//! The thread that adds up while its rank computes.

use core::time::Duration;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, channel, sync_channel};
use std::thread::JoinHandle;

use bdia_core::{Error, Halt, Result};

use crate::link::Link;
use crate::wire::{HEADER, Header, Kind, PIECE, Piece, SAME, header, piece, piece_of};

/// Groups of gradients that may be on their way at a time, with room to spare.
const QUEUE: usize = 8;
/// How often a rank that the others wait for says that it works: more often than any link's limit.
const SOON: Duration = Duration::from_millis(200);

/// Values of a rank's share of `len` values.
const fn share(len: usize, ranks: usize) -> usize {
    len.div_ceil(ranks)
}

/// Bytes of the two buffers that `len` values take on their way between `ranks` ranks.
pub const fn buffer_bytes(len: usize, ranks: usize) -> usize {
    share(len, ranks).saturating_mul(ranks).saturating_mul(2 * size_of::<u32>())
}

/// Values on their way: this rank's own, and what comes from the others; the sums are in `into`.
#[derive(Debug, Default)]
pub(crate) struct Buffers {
    pub(crate) out: Vec<u32>,
    pub(crate) into: Vec<u32>,
}

impl Buffers {
    fn new(len: usize, ranks: usize) -> Self {
        let words = share(len, ranks) * ranks;
        Self { out: vec![0; words], into: vec![0; words] }
    }

    pub(crate) fn holds(&self, len: usize, ranks: usize) -> bool {
        self.out.len() >= share(len, ranks) * ranks
    }
}

/// A request to the thread: the words for every rank, and `len` values to add up.
struct Job {
    header: Header,
    buffers: Buffers,
    len: usize,
}

/// What came of it: the headers of all ranks, and the sums.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) headers: Vec<u32>,
    pub(crate) buffers: Buffers,
    pub(crate) len: usize,
}

/// This rank among those that train together: a link, and the thread that uses it while the rank
/// computes.
#[derive(Debug)]
pub struct Ranks {
    rank: usize,
    ranks: usize,
    jobs: Option<SyncSender<Job>>,
    answers: Receiver<Result<Answer>>,
    thread: Option<JoinHandle<()>>,
    /// Buffers that are not on their way.
    free: Vec<Buffers>,
    sent: u32,
    waiting: usize,
    /// What ended it.
    failed: Option<Error>,
}

impl Ranks {
    /// Starts the thread, which opens the link and alone uses it.
    ///
    /// # Errors
    /// What `open` returns; [`Error::Device`] where there is no further thread.
    pub fn start<L: Link>(open: impl FnOnce() -> Result<L> + Send + 'static) -> Result<Self> {
        let (jobs, todo) = sync_channel::<Job>(QUEUE);
        let (done, answers) = sync_channel(QUEUE);
        let (told, opened) = sync_channel(1);
        let work = move || {
            let mut link = match open() {
                Ok(link) => link,
                Err(error) => {
                    let _ = told.send(Err(error));
                    return;
                }
            };
            // Whoever started this thread is gone where nobody listens.
            if told.send(Ok((link.rank(), link.ranks()))).is_err() {
                return;
            }
            while let Ok(job) = todo.recv() {
                let answer = carry_out(&mut link, job);
                let failed = answer.is_err();
                if done.send(answer).is_err() || failed {
                    // MPI's end would wait for ranks that may never answer.
                    core::mem::forget(link);
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new().name("ranks".into()).spawn(work);
        let thread =
            thread.map_err(|_| Error::Device("no thread to exchange gradients can be started"))?;
        let (rank, ranks) = opened
            .recv()
            .map_err(|_| Error::Device("the thread that exchanges gradients ended"))??;
        Ok(Self {
            rank,
            ranks,
            jobs: Some(jobs),
            answers,
            thread: Some(thread),
            free: Vec::new(),
            sent: 0,
            waiting: 0,
            failed: None,
        })
    }

    /// Number of this rank, from 0.
    pub const fn rank(&self) -> usize {
        self.rank
    }

    /// How many there are.
    pub const fn ranks(&self) -> usize {
        self.ranks
    }

    /// Makes the buffers for groups of these lengths that are on their way at the same time, so
    /// that a step allocates nothing; a plan counts [`buffer_bytes`] of each.
    pub fn reserve(&mut self, lens: &[usize]) {
        for &len in lens {
            self.free.push(Buffers::new(len, self.ranks));
        }
    }

    /// Buffers for `len` values.
    pub(crate) fn buffers(&mut self, len: usize) -> Buffers {
        let ranks = self.ranks;
        // The smallest that fits, so that a larger one is there for what needs it.
        let best = (self.free.iter().enumerate())
            .filter(|(_, b)| b.holds(len, ranks))
            .min_by_key(|(_, b)| b.out.len())
            .map(|(i, _)| i);
        best.map_or_else(|| Buffers::new(len, ranks), |i| self.free.swap_remove(i))
    }

    /// Takes back what an answer held.
    pub(crate) fn recycle(&mut self, buffers: Buffers) {
        self.free.push(buffers);
    }

    /// Whether something is on its way.
    pub(crate) const fn busy(&self) -> bool {
        self.waiting > 0
    }

    /// Sends `len` values of `buffers.out` on their way, with some words to every rank.
    pub(crate) fn send(
        &mut self,
        kind: Kind,
        rest: [u32; HEADER - SAME],
        buffers: Buffers,
        len: usize,
    ) -> Result<()> {
        if let Some(error) = self.failed {
            return Err(error);
        }
        self.sent = self.sent.wrapping_add(1);
        let header = header(kind, self.sent, len, rest);
        let gone = Error::Device("the thread that exchanges gradients ended");
        self.jobs.as_ref().ok_or(gone)?.send(Job { header, buffers, len }).map_err(|_| gone)?;
        self.waiting += 1;
        Ok(())
    }

    /// Waits for the earliest request that was not answered.
    pub(crate) fn receive(&mut self) -> Result<Answer> {
        if let Some(error) = self.failed {
            return Err(error);
        }
        if self.waiting == 0 {
            return Err(Error::setting("gradients on their way", 0.0, "1 or more"));
        }
        self.waiting -= 1;
        let gone = Error::Device("the thread that exchanges gradients ended");
        let answer = self.answers.recv().unwrap_or(Err(gone));
        if let Err(error) = answer {
            self.failed = Some(error);
        }
        answer
    }

    /// What `work` gives on rank 0, on every rank; the others do not call it, and wait for as long
    /// as it takes.
    ///
    /// # Errors
    /// [`Error::Rank`] for a rank that is silent, gone, or does something else;
    /// [`Error::Setting`] where gradients are on their way.
    pub fn from_first(&mut self, work: impl FnOnce() -> Vec<u8>) -> Result<Vec<u8>> {
        if self.busy() {
            return Err(Error::setting("gradients on their way", 1.0, "0, to tell something"));
        }
        if self.rank != 0 {
            let (mut all, mut room) = (Vec::new(), [0; PIECE]);
            loop {
                let answer = self.tell(Piece::Soon)?;
                match piece_of(&answer.headers, &mut room) {
                    Some(Piece::Soon) => {}
                    Some(Piece::Part(bytes)) => all.extend_from_slice(bytes),
                    Some(Piece::End(bytes)) => {
                        all.extend_from_slice(bytes);
                        return Ok(all);
                    }
                    None => return Err(Error::Rank { rank: 0, why: Halt::Astray }),
                }
            }
        }
        let all = std::thread::scope(|scope| {
            let (done, working) = channel::<()>();
            let ranks = &mut *self;
            let telling = scope.spawn(move || {
                while working.recv_timeout(SOON) == Err(RecvTimeoutError::Timeout) {
                    ranks.tell(Piece::Soon)?;
                }
                Ok(())
            });
            let all = work();
            drop(done);
            let gone = Error::Device("the thread that says that this rank works ended");
            telling.join().unwrap_or(Err(gone)).map(|()| all)
        })?;
        let (last, parts) = match all.len().div_ceil(PIECE) {
            0 | 1 => (&all[..], &[][..]),
            n => (&all[(n - 1) * PIECE..], &all[..(n - 1) * PIECE]),
        };
        for part in parts.chunks(PIECE) {
            self.tell(Piece::Part(part))?;
        }
        self.tell(Piece::End(last))?;
        Ok(all)
    }

    fn tell(&mut self, own: Piece<'_>) -> Result<Answer> {
        self.send(Kind::Text, piece(own), Buffers::default(), 0)?;
        self.receive()
    }

    /// Ends it after all work is done: closes the link, which waits for the other ranks to do the
    /// same. MPI wants it before a process ends well.
    pub fn close(mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has been told where it happened.
            let _ = thread.join();
        }
    }
}

impl Drop for Ranks {
    /// Without [`close`](Ranks::close) something went wrong: the thread stays as it is, so that
    /// nothing waits for ranks that may never answer. The process that ends is what tells them.
    fn drop(&mut self) {
        core::mem::forget(self.jobs.take());
    }
}

/// Tells every rank the header, checks that all are at the same request, and adds the values up:
///
/// ```text
/// scatter  rank r gets the r-th share of every rank's values
/// sum      rank r adds them up in the order of ranks, in f64, and rounds once
/// gather   every rank gets every share's sum
/// ```
fn carry_out(link: &mut impl Link, job: Job) -> Result<Answer> {
    let (rank, ranks) = (link.rank(), link.ranks());
    let Job { header, buffers: Buffers { out, into }, len } = job;
    let (own, mut headers) =
        link.trade(header.to_vec(), vec![0; HEADER * ranks], &|_| 0..HEADER, &|p| {
            HEADER * p..HEADER * (p + 1)
        })?;
    headers[HEADER * rank..HEADER * (rank + 1)].copy_from_slice(&own);
    let first = &headers[..SAME];
    if let Some(astray) = (1..ranks).find(|p| &headers[HEADER * p..HEADER * p + SAME] != first) {
        return Err(Error::Rank { rank: astray, why: Halt::Astray });
    }
    if len == 0 {
        return Ok(Answer { headers, buffers: Buffers { out, into }, len });
    }
    let cut = share(len, ranks);
    let part = |p: usize| (p * cut).min(len)..((p + 1) * cut).min(len);
    let mine = part(rank);
    let n = mine.len();
    let (mut out, mut into) = link.trade(out, into, &part, &|p| p * n..(p + 1) * n)?;
    into[rank * n..(rank + 1) * n].copy_from_slice(&out[mine.clone()]);
    sum(&into[..ranks * n], &mut out[mine.clone()]);
    let (out, mut into) = link.trade(out, into, &|_| mine.clone(), &part)?;
    into[mine.clone()].copy_from_slice(&out[mine]);
    Ok(Answer { headers, buffers: Buffers { out, into }, len })
}

/// `total[i] = Σ parts[p·n + i]` over the ranks `p` in their order, in `f64`, rounded once.
fn sum(parts: &[u32], total: &mut [u32]) {
    let n = total.len();
    let mut sums = [0.0_f64; 1024];
    for at in (0..n).step_by(sums.len()) {
        let sums = &mut sums[..1024.min(n - at)];
        sums.fill(0.0);
        for part in parts.chunks_exact(n) {
            for (s, &bits) in sums.iter_mut().zip(&part[at..]) {
                *s += f64::from(f32::from_bits(bits));
            }
        }
        for (t, s) in total[at..].iter_mut().zip(sums) {
            *t = (*s as f32).to_bits();
        }
    }
}
