//! A network and its optimizer step, the same for every architecture.
//!
//! A [`Network`] says which groups of parameters it has and how one forward and backward pass runs;
//! [`step`] does the rest, in this order:
//!
//! ```text
//! zero      gradients of every group
//! load      every micro-batch once, to count the targets of the whole step over all ranks
//! pass      micro-batch by micro-batch; blocks update themselves as they are finished (fused)
//! measure   what is left: gradients are added up over ranks, their norms taken
//! clip      without fused updates: the host reads the norm, or the fault that ends the step
//! update    what is left
//! read      losses and norm, or the fault: the one place where the host waits
//! ```
//!
//! The loss is the mean over the unmasked targets of the whole step, not a mean of means.

mod chain;

pub use chain::{Chain, Lm, LmShape, Loss, Training};

use crate::arena::{Layout, Reals};
use crate::backend::{Backend, Storage};
use crate::error::{Error, Result, Site};
use crate::layers::{Home, Params, Tensors, Updater};
use crate::optim::clip_scale;
use crate::real::Real;
use crate::stack::{Pass, Stack};

/// What an optimizer step needs to know. Nothing has a default.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Step {
    /// Number of the step, from 0.
    pub step: u32,
    /// Seed of the run.
    pub seed: u64,
    /// Learning rate.
    pub lr: f64,
    /// Decoupled weight decay of matrices.
    pub weight_decay: f64,
    /// Largest norm of the gradient; 0 for no clipping. Needs the gradients of all groups.
    pub clip: f64,
}

/// A micro-batch of this rank that has been loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Loaded {
    /// Index in the global batch of its first sample.
    pub first: u32,
    /// Unmasked targets.
    pub targets: usize,
    /// What speed is counted in: tokens, images.
    pub items: usize,
}

/// What one pass of a step needs to know.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Micro {
    /// Number of the micro-batch, from 0: where its losses go.
    pub index: usize,
    /// Whether it is the last: the blocks then finish their parameters.
    pub last: bool,
    /// Factor of the loss's gradient: 1 / unmasked targets of the whole step.
    pub scale: f64,
    /// The optimizer of blocks that update themselves.
    pub updater: Updater,
}

/// What a step's passes rebuilt, where the stack verifies.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Rebuilt {
    /// Elements in which rebuilt activations differed from the originals (mode `bdia`).
    pub mismatches: u64,
    /// Largest difference (modes without a grid).
    pub error: f64,
}

impl Rebuilt {
    /// What a stack's last pass rebuilt.
    ///
    /// # Errors
    /// Any error of the backend.
    pub fn of<B: Storage>(be: &B, stack: &Stack) -> Result<Self> {
        Ok(Self { mismatches: stack.mismatches(be)?, error: stack.rebuild_error() })
    }

    /// Both together.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self { mismatches: self.mismatches + other.mismatches, error: self.error.max(other.error) }
    }
}

/// The result of an optimizer step, over all ranks.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Outcome {
    /// Mean loss over the unmasked targets.
    pub loss: f64,
    /// Unmasked targets.
    pub targets: usize,
    /// What speed is counted in.
    pub items: usize,
    /// Norm of the whole gradient, before clipping.
    pub grad_norm: f64,
    /// What was rebuilt, where the stack verifies.
    pub rebuilt: Rebuilt,
}

/// Parameters that are updated together.
#[derive(Clone, Copy)]
pub struct Group<'a> {
    /// The parameters.
    pub params: &'a Params,
    /// Their tensors.
    pub tensors: &'a dyn Tensors,
    /// What they belong to.
    pub of: Owner,
}

/// What a group of parameters belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owner {
    /// The blocks of a stack, which finish them one after the other.
    Blocks,
    /// What comes before or after a stack.
    Ends(Site),
}

impl Group<'_> {
    const fn site(&self, k: usize) -> Site {
        match self.of {
            Owner::Blocks => Site::Block(k),
            Owner::Ends(site) => site,
        }
    }

    /// Refuses a list of tensors that is not the one that the parameters were laid out for, and
    /// gradients that are shared by groups which [`step`] updates all at once.
    fn check(&self) -> Result<()> {
        let mut found = 0;
        self.tensors.each(&mut |t| {
            if t.home == Home::Trained {
                found += t.len().next_multiple_of(Layout::ALIGN);
            }
            Ok(())
        })?;
        let expected = self.params.group_len();
        if found != expected {
            return Err(Error::Shape { what: "values in a group's tensors", expected, found });
        }
        if self.is_left() && self.params.fused() && self.params.groups() > 1 {
            let possible = "those of all groups outside of blocks (Gradients::Full)";
            return Err(Error::unfit("gradients", "those of one group at a time", possible));
        }
        Ok(())
    }

    /// Whether [`step`] updates it, rather than the blocks themselves.
    fn is_left(&self) -> bool {
        !(self.of == Owner::Blocks && self.params.fused())
    }
}

/// A network: an input, stacks, a head, and their parameters in groups.
pub trait Network<B: Backend> {
    /// Calls `each` with every group of parameters.
    ///
    /// # Errors
    /// The first error of `each`.
    fn groups(&self, each: &mut dyn FnMut(&Group<'_>) -> Result<()>) -> Result<()>;

    /// Values that have a gradient in the network's [`Layout`](crate::Layout::trained). [`step`]
    /// refuses a network whose groups have more or fewer: a group was forgotten.
    fn trained(&self) -> usize;

    /// Micro-batches of a step, whose gradients add up. More than one need the gradients of all
    /// groups.
    fn micro_batches(&self) -> usize;

    /// One forward and backward pass over the loaded micro-batch.
    ///
    /// # Errors
    /// Any error of the backend.
    fn pass(&mut self, be: &mut B, pass: &Pass, micro: &Micro) -> Result<()>;

    /// The sum of the losses of all micro-batches of this rank, read once, after the last pass.
    ///
    /// # Errors
    /// Any error of the backend.
    fn loss(&self, be: &B) -> Result<f64>;

    /// What the last pass rebuilt.
    ///
    /// # Errors
    /// Any error of the backend.
    fn rebuilt(&self, be: &B) -> Result<Rebuilt>;
}

/// One optimizer step. `load` loads micro-batch `i` of this rank, and may be called twice for it:
/// it then loads the same again. Of several ranks each makes the step with its part of the batch;
/// the outcome is that of all.
///
/// # Errors
/// [`Error::Fault`] when the numbers went wrong; parameters are then as the fault says.
/// [`Error::Setting`] for a network without optimizer, and for clipping or micro-batches without
/// the gradients of all groups; [`Error::Shape`] for a network that leaves out a group or a tensor,
/// and for micro-batches that are not the same when they are loaded again.
/// Any error of `load`.
pub fn step<B: Backend, N: Network<B>, E: From<Error>>(
    net: &mut N,
    be: &mut B,
    step: &Step,
    mut load: impl FnMut(&mut N, &mut B, usize) -> core::result::Result<Loaded, E>,
) -> core::result::Result<Outcome, E> {
    let micro_batches = net.micro_batches();
    check(net, step, micro_batches)?;
    // A fault that an abandoned step left behind is not this one's.
    be.clear_fault()?;
    net.groups(&mut |group| group.params.zero_gradients(be))?;

    // The mean is over the whole step, so its targets are counted first.
    let (mut counted, mut items, mut loaded) = (0, 0, None);
    for i in 0..micro_batches {
        let batch = load(net, be, i)?;
        counted += batch.targets;
        items += batch.items;
        loaded = Some(batch);
    }
    let own = [counted as f64, items as f64, 0.0, 0.0];
    let (mut targets, mut items) = (0.0_f64, 0.0_f64);
    be.gather(own, &mut |[t, n, ..]| (targets, items) = (targets + t, items + n))?;

    let &Step { lr, weight_decay, .. } = step;
    let updater = Updater { weight_decay, lr, t: step.step.wrapping_add(1), scale: 1.0 };
    let (mut rebuilt, mut trained) = (Rebuilt::default(), 0);
    for i in 0..micro_batches {
        // A single one is still there.
        let batch = match loaded.filter(|_| micro_batches == 1) {
            Some(batch) => batch,
            None => load(net, be, i)?,
        };
        let last = i + 1 == micro_batches;
        let micro = Micro { index: i, last, scale: 1.0 / targets.max(1.0), updater };
        let pass = Pass { seed: step.seed, step: step.step, global: batch.first };
        net.pass(be, &pass, &micro)?;
        rebuilt = rebuilt.and(net.rebuilt(be)?);
        trained += batch.targets;
    }
    if trained != counted {
        let what = "targets of the micro-batches, loaded again";
        return Err(Error::Shape { what, expected: counted, found: trained }.into());
    }

    let (piece, mut fused) = (exchanged(|each| net.groups(each)), false);
    net.groups(&mut |group| {
        fused |= !group.is_left();
        if matches!(group.of, Owner::Ends(_)) {
            group.params.sum_over_ranks(be, piece)?;
        }
        for k in (0..group.params.groups()).filter(|_| group.is_left()) {
            group.params.measure(be, group.site(k), k, group.tensors)?;
        }
        Ok(())
    })?;
    // What was measured cannot go wrong in the update, so the host waits once: for the norm that
    // clipping needs, or when the step is done.
    let early = if fused { None } else { Some(read(net, be)?) };
    let scale = early.map_or(1.0, |(_, norm)| clip_scale(norm, step.clip));
    let updater = Updater { scale, ..updater };
    net.groups(&mut |group| {
        for k in (0..group.params.groups()).filter(|_| group.is_left()) {
            group.params.update(be, &updater, k, group.tensors)?;
        }
        Ok(())
    })?;
    let (loss, grad_norm) = match early {
        Some(read) => read,
        None => read(net, be)?,
    };

    let own = [loss, rebuilt.mismatches as f64, rebuilt.error, 0.0];
    let (mut loss, mut rebuilt) = (0.0, Rebuilt::default());
    be.gather(own, &mut |[l, mismatches, error, _]| {
        loss += l;
        rebuilt = rebuilt.and(Rebuilt { mismatches: mismatches as u64, error });
    })?;
    loss /= targets.max(1.0);
    Ok(Outcome { loss, targets: targets as usize, items: items as usize, grad_norm, rebuilt })
}

/// Length of the longest group of gradients that is on its way between ranks at a time: one step,
/// or as much of the rest as is worth a message. `groups` is [`Network::groups`].
pub fn exchanged(groups: impl Fn(&mut dyn FnMut(&Group<'_>) -> Result<()>) -> Result<()>) -> usize {
    let mut longest = 0;
    // Nothing here fails.
    let _ = groups(&mut |group| {
        let (len, n) = (group.params.group_len(), group.params.together());
        let own = if group.of == Owner::Blocks { len.saturating_mul(n) } else { len.min(1 << 18) };
        longest = longest.max(own);
        Ok(())
    });
    longest
}

/// The sum of some values, from the first to the last in `f64`, piece by piece through the host.
///
/// # Errors
/// Any error of the backend.
pub fn sum<B: Storage>(be: &B, values: Reals) -> Result<f64> {
    let (mut total, mut piece) = (0.0, [B::Real::of(0.0); 64]);
    for at in (0..values.len()).step_by(piece.len()) {
        let piece = &mut piece[..64.min(values.len() - at)];
        be.read_reals(values.sub(at, piece.len()), piece)?;
        total = piece.iter().fold(total, |t, x| t + x.wide());
    }
    Ok(total)
}

fn check<B: Backend>(net: &impl Network<B>, step: &Step, micro_batches: usize) -> Result<()> {
    let (mut trained, mut fused) = (0, false);
    net.groups(&mut |group| {
        trained += group.params.trained();
        fused |= !group.is_left();
        group.check()
    })?;
    if trained == 0 {
        return Err(Error::unfit("optimizer", "missing", "one, to train"));
    }
    if trained != net.trained() {
        let (what, expected) = ("values in the network's groups", net.trained());
        return Err(Error::Shape { what, expected, found: trained });
    }
    if micro_batches == 0 {
        return Err(Error::setting("micro-batches", 0.0, "1 or more"));
    }
    if !(step.clip >= 0.0 && step.clip < f64::INFINITY) {
        return Err(Error::setting("clip", step.clip, "a finite number, not negative"));
    }
    let all = "0, or the gradients of all groups (Gradients::Full)";
    if fused && step.clip > 0.0 {
        return Err(Error::setting("clip", step.clip, all));
    }
    if fused && micro_batches > 1 {
        let possible = "1, or the gradients of all groups (Gradients::Full)";
        return Err(Error::setting("micro-batches", micro_batches as f64, possible));
    }
    Ok(())
}

/// What a step reads: the sum of its losses and the norm of its gradients.
fn read<B: Backend>(net: &impl Network<B>, be: &mut B) -> Result<(f64, f64)> {
    if let Some(fault) = be.take_fault()? {
        return Err(fault.into());
    }
    let mut squares = 0.0;
    net.groups(&mut |group| {
        squares += sum(be, group.params.norms())?;
        Ok(())
    })?;
    Ok((net.loss(be)?, libm::sqrt(squares)))
}
