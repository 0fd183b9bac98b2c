//! Transformer layers over the backend traits, each with its forward pass and its vector-Jacobian
//! product.
//!
//! Names are GPT-2's (`ln_1`, `c_attn`, `c_proj`, `c_fc`, `wte`, `wpe`, `ln_f`). All matrices are
//! row-major; weights are `[in, out]`, so a linear layer is `y = x·W + b`.

mod block;
mod classifier;
mod decoder;
mod embedding;
mod head;
mod lora;
mod patches;

pub use block::{BLOCK_TENSORS, BlockShape, Cached, Narrow, TransformerBlocks};
pub use classifier::{ClassHead, Mixup};
pub use decoder::{CROSS_TENSORS, DecoderBlocks, EncoderOutput};
pub use embedding::TokenEmbedding;
pub use head::LmHead;
pub use lora::{LORA_TENSORS, Lora, LoraShape};
pub use patches::{PatchEmbedding, Patches};

use crate::arena::{Category, Layout, Reals, product};
use crate::backend::{Exchange, NnOps, OptimOps, Order, Product};
use crate::error::{Result, Site, ok};
use crate::optim::{Rule, Update};
use crate::real::Real;

/// A parameter tensor inside a group of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tensor {
    /// Its GPT-2 name within the group.
    pub name: &'static str,
    /// Rows, or 1 for a vector.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// Whether it is a matrix: only those decay.
    pub matrix: bool,
    /// Offset in the group.
    pub offset: usize,
}

impl Tensor {
    /// Whether the group does not have this tensor.
    pub const fn is_empty(&self) -> bool {
        self.rows == 0 || self.cols == 0
    }

    /// The tensor's values in its group.
    pub const fn of(&self, group: Reals) -> Reals {
        group.sub(self.offset, self.rows * self.cols)
    }
}

/// Gives the tensors of a group their offsets, each aligned, and returns the length of the group.
pub const fn place(tensors: &mut [Tensor]) -> usize {
    let (mut at, mut i) = (0_usize, 0);
    while i < tensors.len() {
        tensors[i].offset = at;
        // Sizes that overflow are caught where the model's dimensions are checked.
        let len = tensors[i]
            .rows
            .wrapping_mul(tensors[i].cols)
            .div_ceil(Layout::ALIGN)
            .wrapping_mul(Layout::ALIGN);
        at = at.wrapping_add(len);
        i += 1;
    }
    at
}

/// The optimizer of a step: what it does when a group of parameters is finished.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Updater {
    /// The rule.
    pub rule: Rule,
    /// Decoupled weight decay of matrices.
    pub weight_decay: f64,
    /// Learning rate of this step.
    pub lr: f64,
    /// Number of this update, from 1.
    pub t: u32,
    /// Factor of the gradients (clipping).
    pub scale: f64,
    /// Update each group as soon as it is finished and reuse its gradient buffer. Otherwise
    /// gradients add up in full buffers until [`Params::update`] is called.
    pub fused: bool,
}

/// Parameters of some equal groups (the blocks), with gradients and optimizer state.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Params {
    group: usize,
    /// Parameters, group after group.
    pub values: Reals,
    /// Gradients: of all groups, or of the one being worked on.
    pub gradients: Reals,
    /// First moments.
    pub m: Reals,
    /// Second moments.
    pub v: Reals,
    /// Sums of squares of the gradients, one a tensor.
    pub norms: Reals,
    tensors: usize,
}

impl Params {
    /// Lays out `groups` groups of `len` values in `tensors` tensors. `rule` is `None` where
    /// nothing is trained; `shared_gradient` is for fused updates.
    ///
    /// # Errors
    /// [`Error::TooLarge`](crate::Error::TooLarge).
    pub const fn layout(
        layout: &mut Layout,
        groups: usize,
        len: usize,
        tensors: usize,
        rule: Option<Rule>,
        shared_gradient: bool,
    ) -> Result<Self> {
        let all = ok!(product("parameters", &[groups, len]));
        let states = match rule {
            Some(rule) => rule.states(),
            None => 0,
        };
        let gradients = match rule {
            None => 0,
            Some(_) if shared_gradient => len,
            Some(_) => all,
        };
        Ok(Self {
            group: len,
            values: layout.reals(Category::Parameters, all),
            gradients: layout.reals(Category::Gradients, gradients),
            m: layout.reals(Category::Optimizer, if states > 0 { all } else { 0 }),
            v: layout.reals(Category::Optimizer, if states > 1 { all } else { 0 }),
            norms: layout
                .reals(Category::Gradients, if rule.is_some() { groups * tensors } else { 0 }),
            tensors,
        })
    }

    /// Lays out `groups` groups of `len` values that stay as they are: they have neither gradients
    /// nor optimizer state.
    ///
    /// # Errors
    /// [`Error::TooLarge`](crate::Error::TooLarge).
    pub const fn layout_frozen(layout: &mut Layout, groups: usize, len: usize) -> Result<Self> {
        let all = ok!(product("frozen parameters", &[groups, len]));
        let none = Reals::EMPTY;
        let values = layout.reals(Category::Frozen, all);
        Ok(Self { group: len, values, gradients: none, m: none, v: none, norms: none, tensors: 0 })
    }

    /// Parameters of group `k`.
    pub const fn group(&self, k: usize) -> Reals {
        self.values.sub(k * self.group, self.group)
    }

    /// Optimizer state of a tensor of group `k`: the two moments, empty where the rule has none.
    pub fn state(&self, k: usize, t: &Tensor) -> [Reals; 2] {
        [self.m, self.v]
            .map(|all| if all.is_empty() { all } else { t.of(all.sub(k * self.group, self.group)) })
    }

    /// Gradients of group `k`.
    pub const fn gradient(&self, k: usize) -> Reals {
        if self.gradients.len() == self.group {
            self.gradients
        } else {
            self.gradients.sub(k * self.group, self.group)
        }
    }

    /// Sets gradients to zero: those of all groups.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn zero_gradients<B: OptimOps>(&self, be: &mut B) -> Result<()> {
        be.fill_reals(self.gradients, B::Real::of(0.0))
    }

    /// Sums of squares of group `k`'s gradients; a value that is not finite raises a fault.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn measure<B: OptimOps>(
        &self,
        be: &mut B,
        site: Site,
        k: usize,
        tensors: &[Tensor],
    ) -> Result<()> {
        for (i, t) in tensors.iter().enumerate() {
            be.sum_squares(site, t.of(self.gradient(k)), self.norms.sub(k * self.tensors + i, 1))?;
        }
        Ok(())
    }

    /// Updates group `k`.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn update<B: OptimOps>(
        &self,
        be: &mut B,
        u: &Updater,
        k: usize,
        tensors: &[Tensor],
    ) -> Result<()> {
        for t in tensors {
            let decay = if t.matrix { u.weight_decay } else { 0.0 };
            let update = Update { rule: u.rule, t: u.t, lr: u.lr, decay, scale: u.scale };
            let [m, v] = self.state(k, t);
            be.update(&update, t.of(self.group(k)), t.of(self.gradient(k)), m, v)?;
        }
        Ok(())
    }

    /// Group `k` is finished: with fused updates it is measured, updated, and its gradient buffer
    /// cleared.
    ///
    /// Of several ranks ([`Exchange`]) its gradient is sent on its way, to be added up while the
    /// next group is worked on, and the sum of the one that was finished before, `k + 1`, takes its
    /// own gradient's place. With fused updates that is the same buffer, whose values have just
    /// been taken, and group `k + 1` is updated from it. [`settle`](Self::settle) does so for group
    /// 0.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn finished<B: OptimOps + Exchange>(
        &self,
        be: &mut B,
        u: &Updater,
        site: Site,
        k: usize,
        tensors: &[Tensor],
    ) -> Result<()> {
        if self.gradients.is_empty() || (be.ranks() == 1 && !u.fused) {
            return Ok(());
        }
        if be.ranks() == 1 {
            return self.apply(be, u, site, k, tensors);
        }
        let last = (k + 1) * self.group >= self.values.len();
        be.exchange(self.gradient(k), if last { Reals::EMPTY } else { self.gradient(k + 1) })?;
        if !u.fused {
            return Ok(());
        }
        if last {
            return be.fill_reals(self.gradient(k), B::Real::of(0.0));
        }
        let site = if matches!(site, Site::Block(_)) { Site::Block(k + 1) } else { site };
        self.apply(be, u, site, k + 1, tensors)
    }

    /// All groups are finished: of several ranks, the sum of group 0 comes back, and with fused
    /// updates it is updated.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn settle<B: OptimOps + Exchange>(
        &self,
        be: &mut B,
        u: &Updater,
        site: Site,
        tensors: &[Tensor],
    ) -> Result<()> {
        if self.gradients.is_empty() || be.ranks() == 1 {
            return Ok(());
        }
        be.exchange(Reals::EMPTY, self.gradient(0))?;
        if u.fused { self.apply(be, u, site, 0, tensors) } else { Ok(()) }
    }

    fn apply<B: OptimOps>(
        &self,
        be: &mut B,
        u: &Updater,
        site: Site,
        k: usize,
        tensors: &[Tensor],
    ) -> Result<()> {
        self.measure(be, site, k, tensors)?;
        self.update(be, u, k, tensors)?;
        be.fill_reals(self.gradient(k), B::Real::of(0.0))
    }

    /// Adds the gradients of all groups up over the ranks, `piece` values at a time, before they
    /// are measured: for groups outside of blocks, which are not [`finished`](Self::finished) one
    /// after the other.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn sum_over_ranks<B: Exchange>(&self, be: &mut B, piece: usize) -> Result<()> {
        if be.ranks() == 1 || self.gradients.is_empty() {
            return Ok(());
        }
        let mut before = Reals::EMPTY;
        for at in (0..self.gradients.len()).step_by(piece.max(1)) {
            let own = self.gradients.sub(at, piece);
            be.exchange(own, before)?;
            before = own;
        }
        be.exchange(Reals::EMPTY, before)
    }

    /// Values of one group.
    pub const fn group_len(&self) -> usize {
        self.group
    }
}

/// `y[rows, out] = x[rows, in]·W[in, out] + b`, without the bias where that is empty; `w` is the
/// group that `W` lies in, and its place there.
///
/// # Errors
/// Those of the backend.
pub fn linear<B: NnOps>(
    be: &mut B,
    rows: usize,
    w: (Reals, Tensor),
    b: Reals,
    x: Reals,
    y: Reals,
) -> Result<()> {
    let p = Product {
        rows,
        cols: w.1.cols,
        inner: w.1.rows,
        a: Order::Plain,
        b: Order::Plain,
        accumulate: false,
    };
    be.matmul(&p, x, w.1.of(w.0), Some(b).filter(|b| !b.is_empty()), y)
}

/// Its gradients: `dW += xᵀ·dy`, `db += Σ dy`, and `dx = dy·Wᵀ`; each is left out where its handle
/// is empty.
///
/// # Errors
/// Those of the backend.
pub fn linear_vjp<B: NnOps>(
    be: &mut B,
    rows: usize,
    w: (Reals, Tensor),
    (dw, db): (Reals, Reals),
    x: Reals,
    dy: Reals,
    dx: Reals,
) -> Result<()> {
    let (inner, cols) = (w.1.rows, w.1.cols);
    let p = Product {
        rows: inner,
        cols,
        inner: rows,
        a: Order::Transposed,
        b: Order::Plain,
        accumulate: true,
    };
    if !dw.is_empty() {
        be.matmul(&p, x, dy, None, dw)?;
    }
    if !db.is_empty() {
        be.sum_rows(dy, db)?;
    }
    if dx.is_empty() {
        return Ok(());
    }
    let p = Product {
        rows,
        cols: inner,
        inner: cols,
        a: Order::Plain,
        b: Order::Transposed,
        accumulate: false,
    };
    be.matmul(&p, dy, w.1.of(w.0), None, dx)
}
