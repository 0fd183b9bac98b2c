//! Parameters: tensors, where their values live, and what an optimizer does with them.

use super::block::larger;
use super::rotary::BlockSet;
use crate::arena::{Category, Layout, Reals, Words, product};
use crate::backend::{Exchange, NnOps, OptimOps, Order, State};
use crate::error::{Error, Result, Site, ok};
use crate::optim::{Rule, Sizes, Update};
use crate::packing::{Packed, Packing};
use crate::real::Real;
use crate::rng::{Draw, Stream};

/// Initial values of a tensor.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Init {
    /// 0.
    Zeros,
    /// 1.
    Ones,
    /// Normal with this deviation.
    Normal(f64),
    /// Uniform in `±1/√inputs`, as PyTorch's linear layers begin.
    InverseRoot,
    /// Uniform in `±√(6/(inputs + outputs))` (Glorot and Bengio, 2010). Layers that lie side by
    /// side in one matrix have `outputs` each.
    Glorot {
        /// Columns of one layer.
        outputs: usize,
    },
    /// `log(head_dim^-½)`: the factor of ordinary attention, where it is learned as `e^τ`.
    Temperature {
        /// Width of a head.
        head_dim: usize,
    },
    /// Uniform in `±1/√columns`, from random numbers of its own: the `A` of an adapter.
    Adapter,
}

/// How the matrices of a network begin.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Scheme {
    /// GPT-2's: normal with σ = 0.02; the projections back into the residual stream have their own.
    Gpt2 {
        /// σ of projections: `0.02/√(2K)`.
        projections: f64,
    },
    /// Normal with one σ for all: Llama's.
    Normal(f64),
    /// [`Init::InverseRoot`]
    InverseRoot,
    /// [`Init::Glorot`]
    Glorot,
}

impl Scheme {
    /// That of a GPT-2 of `blocks` blocks.
    pub fn gpt2(blocks: usize) -> Self {
        Self::Gpt2 { projections: 0.02 / libm::sqrt(2.0 * blocks as f64) }
    }

    /// Initial values of a matrix whose layers have `outputs` columns each.
    pub const fn matrix(self, outputs: usize) -> Init {
        match self {
            Self::Gpt2 { .. } => Init::Normal(0.02),
            Self::Normal(sigma) => Init::Normal(sigma),
            Self::InverseRoot => Init::InverseRoot,
            Self::Glorot => Init::Glorot { outputs },
        }
    }

    /// Initial values of the matrix that ends a residual branch.
    pub const fn projection(self, outputs: usize) -> Init {
        match self {
            Self::Gpt2 { projections } => Init::Normal(projections),
            _ => self.matrix(outputs),
        }
    }
}

/// Where the values of a tensor are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Home {
    /// Among the values that have a gradient.
    Trained,
    /// Among those that stay as they are.
    Frozen,
    /// Among those that stay as they are, in few bits each: which of these it is
    /// ([`Params::stored`]).
    Packed(u8),
}

/// A parameter tensor of a group: of a block, or of what is outside the blocks.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Tensor {
    /// Its name within the group.
    pub name: &'static str,
    /// Rows, or 1 for a vector. 0: the group does not have it.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// Whether it is a matrix: only those decay.
    pub matrix: bool,
    /// Its values at the start.
    pub init: Init,
    /// Where they are.
    pub home: Home,
    /// Index of the first one there; of the first word for those in few bits.
    pub offset: usize,
}

/// How a matrix is stored in few bits, in every group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stored {
    /// In most groups.
    pub packing: Packing,
    /// In the other ones.
    pub other: Packing,
    /// Groups that have the other packing.
    pub others: BlockSet,
    /// `Transposed`: the rows are those of the transpose, as linear layers of `[out, in]` have it.
    pub order: Order,
    /// [`Packed::neighbours`]
    pub neighbours: usize,
}

impl Stored {
    /// Rows in order, in one packing.
    pub const fn plain(packing: Packing) -> Self {
        Self { packing, other: packing, others: BlockSet::NONE, order: Order::Plain, neighbours: 0 }
    }

    /// Those of [`plain`](Self::plain), in the order of [`Packing::ALL`].
    const PLAIN: &'static [Self; Packing::ALL.len()] = &{
        let mut all = [Self::plain(Packing::F32); Packing::ALL.len()];
        let mut i = 0;
        while i < all.len() {
            all[i] = Self::plain(Packing::ALL[i]);
            i += 1;
        }
        all
    };

    /// The packing in group `k`.
    pub const fn packing(&self, k: usize) -> Packing {
        if self.others.has(k) { self.other } else { self.packing }
    }

    /// Rows and columns of a tensor as they are stored.
    pub const fn shape(&self, rows: usize, cols: usize) -> [usize; 2] {
        match self.order {
            Order::Plain => [rows, cols],
            Order::Transposed => [cols, rows],
        }
    }
}

/// How the frozen matrices of a group are stored in few bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Store {
    /// All alike, in memory.
    Alike(Packing),
    /// Each in its way, in the order of the tensors.
    Each {
        /// One for each.
        matrices: &'static [Stored],
        /// Whether they are in memory that the backend is given ([`Layout::mapped`]).
        mapped: bool,
    },
}

impl Store {
    /// How matrix `i` is stored; another number of them is refused in [`Params::layout`].
    const fn of(&self, i: usize) -> &'static Stored {
        match self {
            Self::Alike(packing) => &Stored::PLAIN[*packing as usize],
            Self::Each { matrices, .. } if i < matrices.len() => &matrices[i],
            Self::Each { .. } => &Stored::PLAIN[0],
        }
    }

    /// Words of matrix `i`, in the larger of its packings; none where its rows are no whole blocks.
    const fn words(self, i: usize, rows: usize, cols: usize) -> Option<usize> {
        let stored = self.of(i);
        let [rows, cols] = stored.shape(rows, cols);
        match (
            Packed::words_of(stored.packing, rows, cols),
            Packed::words_of(stored.other, rows, cols),
        ) {
            (Ok(one), Ok(other)) => Some(larger(one, other)),
            _ => None,
        }
    }
}

impl Tensor {
    /// A vector.
    pub const fn vector(name: &'static str, cols: usize, init: Init) -> Self {
        Self { name, rows: 1, cols, matrix: false, init, home: Home::Trained, offset: 0 }
    }

    /// A matrix `[rows, cols]`.
    pub const fn matrix(name: &'static str, rows: usize, cols: usize, init: Init) -> Self {
        Self { name, rows, cols, matrix: true, init, home: Home::Trained, offset: 0 }
    }

    /// The tensor if it is `there`; otherwise one that the group does not have.
    #[must_use]
    pub const fn when(mut self, there: bool) -> Self {
        if !there {
            self.rows = 0;
        }
        self
    }

    /// Whether the group does not have this tensor.
    pub const fn is_empty(&self) -> bool {
        self.rows == 0 || self.cols == 0
    }

    /// Number of values.
    pub const fn len(&self) -> usize {
        self.rows.wrapping_mul(self.cols)
    }

    /// The tensor's values within those of its group.
    pub const fn of(&self, group: Reals) -> Reals {
        group.sub(self.offset, self.len())
    }

    /// Draws row `row` of the initial values; `index` is the tensor's number in its network.
    pub fn draw<R: Real>(&self, seed: u64, index: u32, row: usize, out: &mut [R]) {
        self.draw_from(seed, index, (row, 0), out);
    }

    /// As [`draw`](Self::draw), from column `col` of the row on.
    fn draw_from<R: Real>(&self, seed: u64, index: u32, (row, col): (usize, usize), out: &mut [R]) {
        let first = col as u32;
        let stream = Stream::new(seed, index, row as u32, 0, 0, Draw::Init);
        let uniform = |bound: f64, out: &mut [R]| {
            for (x, e) in out.iter_mut().zip(first..) {
                *x = R::of(bound * (2.0 * stream.uniform(e) - 1.0));
            }
        };
        match self.init {
            Init::Zeros => out.fill(R::of(0.0)),
            Init::Ones => out.fill(R::of(1.0)),
            Init::Normal(sigma) => {
                for (x, e) in out.iter_mut().zip(first..) {
                    *x = R::of(sigma * stream.normal(e));
                }
            }
            Init::InverseRoot => uniform(1.0 / libm::sqrt(self.rows as f64), out),
            Init::Glorot { outputs } => {
                uniform(libm::sqrt(6.0 / (self.rows + outputs) as f64), out);
            }
            Init::Temperature { head_dim } => out.fill(R::of(-0.5 * libm::log(head_dim as f64))),
            Init::Adapter => {
                let (bound, first) = (1.0 / libm::sqrt(self.cols as f64), row * self.cols + col);
                let stream = Stream::new(seed, index, 0, 1, 0, Draw::Init);
                for (x, e) in out.iter_mut().zip(first as u32..) {
                    *x = R::of(bound * (2.0 * stream.uniform(e) - 1.0));
                }
            }
        }
    }
}

/// The tensors of a group, one after another.
pub trait Tensors {
    /// Calls `f` with each tensor, also with those that the group does not have.
    ///
    /// # Errors
    /// The first error of `f`.
    fn each(&self, f: &mut dyn FnMut(&Tensor) -> Result<()>) -> Result<()>;
}

impl<T: Tensors + ?Sized> Tensors for &T {
    fn each(&self, f: &mut dyn FnMut(&Tensor) -> Result<()>) -> Result<()> {
        (**self).each(f)
    }
}

impl Tensors for [Tensor] {
    fn each(&self, f: &mut dyn FnMut(&Tensor) -> Result<()>) -> Result<()> {
        self.iter().try_for_each(f)
    }
}

impl<const N: usize> Tensors for [Tensor; N] {
    fn each(&self, f: &mut dyn FnMut(&Tensor) -> Result<()>) -> Result<()> {
        self.iter().try_for_each(f)
    }
}

/// Which parameters of a network stay as they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Freeze {
    /// Nothing: everything is trained.
    Nothing,
    /// The matrices; vectors are trained.
    Matrices,
    /// Everything but adapters; matrices in few bits where a storage is given.
    All(Option<Store>),
}

/// How much room the tensors of a group take, by home.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Room {
    trained: usize,
    /// Tensors that are trained, empty ones too.
    slots: usize,
    /// Optimizer state of those, for the rules whose state depends on shapes.
    coded: Kept,
    factored: Kept,
    frozen: usize,
    /// Words.
    packed: usize,
    /// Tensors in few bits.
    matrices: usize,
    /// Values of the largest of them.
    largest: usize,
    /// Whether the rows of one of them are not whole blocks.
    broken: bool,
}

impl Room {
    /// No room.
    pub const NONE: Self = Self {
        trained: 0,
        slots: 0,
        coded: Kept { reals: 0, codes: 0 },
        factored: Kept { reals: 0, codes: 0 },
        frozen: 0,
        packed: 0,
        matrices: 0,
        largest: 0,
        broken: false,
    };

    /// The same where no matrix is [asked for](Params::matrix) as a whole: what is stored in few
    /// bits is unpacked a piece at a time.
    #[must_use]
    pub const fn in_pieces(mut self) -> Self {
        self.largest = 0;
        self
    }

    /// Gives tensors their homes, and aligned places there behind those that were placed before.
    #[must_use]
    pub const fn place(mut self, tensors: &mut [Tensor], freeze: Freeze) -> Self {
        // Sizes that overflow are caught where the network's dimensions are checked.
        let mut i = 0;
        while i < tensors.len() {
            let t = &mut tensors[i];
            t.home = match freeze {
                Freeze::Nothing => Home::Trained,
                Freeze::Matrices if !t.matrix => Home::Trained,
                Freeze::All(Some(_)) if t.matrix => Home::Packed(self.matrices as u8),
                Freeze::Matrices | Freeze::All(_) => Home::Frozen,
            };
            let (at, len) = match (t.home, freeze) {
                (Home::Packed(_), Freeze::All(Some(store))) if !t.is_empty() => {
                    let words = store.words(self.matrices, t.rows, t.cols);
                    self.matrices += 1;
                    self.largest = larger(self.largest, t.len());
                    self.broken |= words.is_none();
                    (
                        &mut self.packed,
                        match words {
                            Some(words) => words,
                            None => 0,
                        },
                    )
                }
                (Home::Packed(_), _) => (&mut self.packed, 0),
                (Home::Trained, _) => {
                    self.slots += 1;
                    self.coded = self.coded.and(Rule::ADAM_W_8BIT.state(t.rows, t.cols));
                    self.factored = self.factored.and(Rule::ADAFACTOR.state(t.rows, t.cols));
                    (&mut self.trained, t.len())
                }
                (Home::Frozen, _) => (&mut self.frozen, t.len()),
            };
            t.offset = *at;
            *at = at.wrapping_add(aligned(len));
            i += 1;
        }
        self
    }

    /// The optimizer state of the group's tensors.
    const fn state(&self, rule: &Rule) -> Kept {
        match rule {
            Rule::Sgd { momentum } if *momentum == 0.0 => Kept { reals: 0, codes: 0 },
            Rule::Sgd { .. } => Kept { reals: self.trained, codes: 0 },
            Rule::AdamW { .. } | Rule::SetAdam { .. } => {
                Kept { reals: self.trained.wrapping_mul(2), codes: 0 }
            }
            Rule::AdamW8bit { .. } => self.coded,
            Rule::Adafactor { .. } => self.factored,
        }
    }
}

/// A length rounded up to where the next tensor begins.
const fn aligned(len: usize) -> usize {
    len.div_ceil(Layout::ALIGN).wrapping_mul(Layout::ALIGN)
}

/// Lengths of the optimizer state of some tensors that follow one another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Kept {
    reals: usize,
    /// Words.
    codes: usize,
}

impl Kept {
    const fn and(self, next: Sizes) -> Self {
        let ([a, b], [c, d]) = (next.reals, next.codes);
        Self {
            reals: self.reals.wrapping_add(aligned(a)).wrapping_add(aligned(b)),
            codes: self.codes.wrapping_add(aligned(c)).wrapping_add(aligned(d)),
        }
    }
}

/// The optimizer of a step: what it does when a group of parameters is finished.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Updater {
    /// Decoupled weight decay of matrices.
    pub weight_decay: f64,
    /// Learning rate of this step.
    pub lr: f64,
    /// Number of this update, from 1.
    pub t: u32,
    /// Factor of the gradients (clipping).
    pub scale: f64,
}

/// How gradients are kept.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Gradients {
    /// None are kept: inference.
    None,
    /// Those of one group at a time: a group is updated by the rule as soon as it is finished.
    Fused(Rule),
    /// Those of some groups at a time, which are finished together: see
    /// [`Residual::step_over`](super::Residual::step_over).
    Together(Rule, usize),
    /// Those of all groups, until the step is complete: for clipping and micro-batches.
    Full(Rule),
}

impl Gradients {
    /// The optimizer's rule.
    pub const fn rule(&self) -> Option<Rule> {
        match self {
            Self::None => None,
            Self::Fused(rule) | Self::Together(rule, _) | Self::Full(rule) => Some(*rule),
        }
    }

    /// Whether groups are updated as they are finished.
    pub const fn fused(&self) -> bool {
        matches!(self, Self::Fused(_) | Self::Together(..))
    }

    /// The same where `n` groups are finished together.
    #[must_use]
    pub const fn of_steps(self, n: usize) -> Self {
        match self {
            Self::Fused(rule) if n > 1 => Self::Together(rule, n),
            other => other,
        }
    }

    /// The same for groups that nobody finishes one after the other: those outside of blocks.
    #[must_use]
    pub const fn full(self) -> Self {
        match self.rule() {
            Some(rule) => Self::Full(rule),
            None => Self::None,
        }
    }
}

/// Frozen matrices in few bits; each is unpacked into one place when it is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Narrow {
    store: Store,
    /// Group after group.
    words: Words,
    /// Room for the largest tensor.
    wide: Reals,
}

/// A matrix, ready for a product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Matrix {
    /// `[inputs, outputs]`, in the order that [`order`](Self::order) says.
    pub values: Reals,
    /// Rows.
    pub inputs: usize,
    /// Columns.
    pub outputs: usize,
    /// `Transposed`: they are stored as `[outputs, inputs]`.
    pub order: Order,
}

/// The values of a tensor and their gradient, which is empty where it is frozen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parameter {
    /// The values; empty where they are stored in few bits.
    pub value: Reals,
    /// The gradient.
    pub grad: Reals,
}

/// Parameters of some equal groups (the blocks), with gradients and optimizer state.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Params {
    groups: usize,
    /// Groups that are finished together.
    together: usize,
    room: Room,
    kept: Gradients,
    /// Trained values, group after group.
    values: Reals,
    /// Their gradients: of all groups, or of those being worked on.
    gradients: Reals,
    /// Optimizer state, group after group and tensor after tensor.
    moments: Reals,
    codes: Words,
    /// Sums of squares of the gradients, one for each trained tensor.
    norms: Reals,
    /// Values that stay as they are: of all groups, or of the one that is in memory.
    frozen: Reals,
    narrow: Option<Narrow>,
}

impl Params {
    /// Lays out `groups` groups of tensors that take `room`.
    ///
    /// # Errors
    /// [`Error::Setting`] for constants of a rule that are out of range, [`Error::TooLarge`].
    pub const fn layout(
        groups: usize,
        room: Room,
        freeze: Freeze,
        gradients: Gradients,
        layout: &mut Layout,
    ) -> Result<Self> {
        Self::layout_paged(groups, groups, room, freeze, gradients, layout)
    }

    /// As [`layout`](Self::layout), with the frozen values of only `resident` groups in memory:
    /// all, or one, which the caller brings in before it is used.
    ///
    /// # Errors
    /// As [`layout`](Self::layout).
    pub const fn layout_paged(
        groups: usize,
        resident: usize,
        room: Room,
        freeze: Freeze,
        gradients: Gradients,
        layout: &mut Layout,
    ) -> Result<Self> {
        if resident != groups && resident != 1 {
            return Err(Error::setting("groups in memory", resident as f64, "all groups, or 1"));
        }
        let l = layout;
        let narrow = match freeze {
            Freeze::All(Some(store)) => {
                if room.broken {
                    let possible = "a multiple of the values of a block";
                    return Err(Error::unfit(
                        "rows of a packed matrix",
                        "no whole blocks",
                        possible,
                    ));
                }
                let words = ok!(product("frozen matrices", &[groups, room.packed]));
                let words = match store {
                    Store::Each { matrices, .. }
                        if room.matrices != matrices.len() || room.matrices > 255 =>
                    {
                        let found = matrices.len() as f64;
                        let possible = "one for every matrix of a group, at most 255";
                        return Err(Error::setting("ways to store matrices", found, possible));
                    }
                    Store::Each { mapped: true, .. } => l.mapped(words),
                    _ => l.words(Category::Frozen, words),
                };
                Some(Narrow { store, words, wide: l.reals(Category::Workspace, room.largest) })
            }
            _ => None,
        };
        let frozen = ok!(product("frozen parameters", &[resident, room.frozen]));
        let all = ok!(product("parameters", &[groups, room.trained]));
        let kept = match gradients {
            Gradients::None => 0,
            Gradients::Fused(_) => room.trained,
            Gradients::Together(_, n) => {
                let n = if n < groups { n } else { groups };
                ok!(product("gradients", &[n, room.trained]))
            }
            Gradients::Full(_) => all,
        };
        let mut state = Kept { reals: 0, codes: 0 };
        if let Some(rule) = gradients.rule() {
            ok!(rule.check());
            l.count_trained(all);
            let one = room.state(&rule);
            state.reals = ok!(product("optimizer state", &[groups, one.reals]));
            state.codes = ok!(product("optimizer state", &[groups, one.codes]));
        }
        let norms = if gradients.rule().is_some() {
            ok!(product("norms", &[groups, room.slots]))
        } else {
            0
        };
        Ok(Self {
            groups,
            together: 1,
            room,
            kept: gradients,
            frozen: l.reals(Category::Frozen, frozen),
            narrow,
            values: l.reals(Category::Parameters, all),
            gradients: l.reals(Category::Gradients, kept),
            moments: l.reals(Category::Optimizer, state.reals),
            codes: l.words(Category::Optimizer, state.codes),
            norms: l.reals(Category::Gradients, norms),
        })
    }

    /// The same groups, `n` of which are finished together.
    ///
    /// # Errors
    /// [`Error::Setting`] for another number than has gradients at a time, and for several groups
    /// of which one is in memory at a time.
    pub(super) const fn finished_by(mut self, n: usize) -> Result<Self> {
        let fits = match self.kept {
            Gradients::Fused(_) => n == 1,
            Gradients::Together(_, kept) => n == 1 || n == kept,
            Gradients::None | Gradients::Full(_) => n > 0,
        };
        if !fits {
            let possible = "as many as have gradients at a time, or 1";
            return Err(Error::setting("blocks of a step", n as f64, possible));
        }
        if n > 1 && self.frozen.len() < self.groups * self.room.frozen {
            let possible = "1 where one group is in memory at a time";
            return Err(Error::setting("blocks of a step", n as f64, possible));
        }
        self.together = if n < self.groups || self.groups == 0 { n } else { self.groups };
        Ok(self)
    }

    /// Groups that are finished together: the blocks of a step.
    pub const fn together(&self) -> usize {
        self.together
    }

    /// Number of groups.
    pub const fn groups(&self) -> usize {
        self.groups
    }

    /// Whether groups are updated as they are finished; not so where nothing is trained.
    pub const fn fused(&self) -> bool {
        self.kept.fused() && !self.gradients.is_empty()
    }

    /// Values that are trained, of all groups.
    pub const fn trained(&self) -> usize {
        if self.gradients.is_empty() { 0 } else { self.values.len() }
    }

    /// Trained values of one group.
    pub const fn group_len(&self) -> usize {
        self.room.trained
    }

    /// Values of a tensor of group `k`; empty for one in few bits ([`packed`](Self::packed)).
    pub const fn value(&self, k: usize, t: &Tensor) -> Reals {
        match t.home {
            Home::Trained => t.of(self.values.sub(k * self.room.trained, self.room.trained)),
            Home::Frozen => t.of(one_of(self.frozen, k, self.room.frozen)),
            Home::Packed(_) => Reals::EMPTY,
        }
    }

    /// A tensor of group `k` with its gradient.
    pub const fn parameter(&self, k: usize, t: &Tensor) -> Parameter {
        Parameter { value: self.value(k, t), grad: self.gradient(k, t) }
    }

    /// How a tensor is stored, if in few bits.
    pub const fn stored(&self, t: &Tensor) -> Option<&'static Stored> {
        match (&self.narrow, t.home) {
            (Some(narrow), Home::Packed(i)) if !t.is_empty() => Some(narrow.store.of(i as usize)),
            _ => None,
        }
    }

    /// A tensor of group `k` that is stored in few bits, as it is stored.
    pub const fn packed(&self, k: usize, t: &Tensor) -> Option<Packed> {
        match (&self.narrow, self.stored(t)) {
            (Some(narrow), Some(stored)) => {
                let (packing, [rows, cols]) = (stored.packing(k), stored.shape(t.rows, t.cols));
                let len = match Packed::words_of(packing, rows, cols) {
                    Ok(len) => len,
                    // Refused when it was laid out.
                    Err(_) => 0,
                };
                Some(Packed {
                    packing,
                    words: narrow.words.sub(k * self.room.packed + t.offset, len),
                    rows,
                    cols,
                    neighbours: stored.neighbours,
                })
            }
            _ => None,
        }
    }

    /// Gradient of a tensor of group `k`; with [`Gradients::Fused`] all groups have the same, with
    /// [`Gradients::Together`] those of a step have places of their own. Empty for what is frozen.
    pub const fn gradient(&self, k: usize, t: &Tensor) -> Reals {
        match t.home {
            Home::Trained => t.of(self.gradient_of(k)),
            Home::Frozen | Home::Packed(_) => Reals::EMPTY,
        }
    }

    /// Optimizer state of a tensor of group `k`, whose tensors are given; empty for what is frozen.
    pub fn state(&self, k: usize, t: &Tensor, tensors: &(impl Tensors + ?Sized)) -> State {
        let (mut from, mut found) = (self.state_of_group(k), State::EMPTY);
        // The closure does not fail.
        let _ = tensors.each(&mut |each| {
            let state = self.next_state(&mut from, each);
            // Tensors that are there have places of their own.
            if each == t && !t.is_empty() {
                found = state;
            }
            Ok(())
        });
        found
    }

    /// Where the optimizer state of group `k` begins.
    const fn state_of_group(&self, k: usize) -> Kept {
        let one = match self.kept.rule() {
            Some(rule) => self.room.state(&rule),
            None => Kept { reals: 0, codes: 0 },
        };
        Kept { reals: k * one.reals, codes: k * one.codes }
    }

    /// The optimizer state of a tensor, which begins at `from`; that of the next one begins behind.
    fn next_state(&self, from: &mut Kept, t: &Tensor) -> State {
        let (Some(rule), Home::Trained) = (self.kept.rule(), t.home) else { return State::EMPTY };
        let Sizes { reals: [a, b], codes: [c, d] } = rule.state(t.rows, t.cols);
        let state = State {
            reals: [
                self.moments.sub(from.reals, a),
                self.moments.sub(from.reals.wrapping_add(aligned(a)), b),
            ],
            codes: [
                self.codes.sub(from.codes, c),
                self.codes.sub(from.codes.wrapping_add(aligned(c)), d),
            ],
        };
        *from = from.and(Sizes { reals: [a, b], codes: [c, d] });
        state
    }

    /// A matrix of group `k`. One that is stored in few bits stays until the next one is asked for.
    ///
    /// # Errors
    /// Any error of the backend.
    pub fn matrix<B: NnOps>(&self, be: &mut B, k: usize, t: &Tensor) -> Result<Matrix> {
        let (values, order) = match (&self.narrow, self.stored(t), self.packed(k, t)) {
            (Some(narrow), Some(stored), Some(packed)) => {
                let wide = narrow.wide.sub(0, t.len());
                be.unpack(&packed, 0, wide)?;
                (wide, stored.order)
            }
            _ => (self.value(k, t), Order::Plain),
        };
        Ok(Matrix { values, inputs: t.rows, outputs: t.cols, order })
    }

    /// Draws the initial values of all groups and sets the optimizer's state to 0. `index` is the
    /// number in the network of the first tensor; it is advanced by those that are there.
    ///
    /// # Errors
    /// [`Error::Setting`] for matrices in few bits, which are read and never drawn, and for frozen
    /// values that are not all in memory; any error of the backend.
    pub fn initialize<B: OptimOps>(
        &self,
        be: &mut B,
        seed: u64,
        index: &mut u32,
        tensors: &(impl Tensors + ?Sized),
    ) -> Result<()> {
        let mut piece = [B::Real::of(0.0); 64];
        for k in 0..self.groups {
            let mut state = self.state_of_group(k);
            tensors.each(&mut |t| {
                if t.is_empty() {
                    return Ok(());
                }
                let values = match t.home {
                    Home::Packed(_) => {
                        let possible = "reals, to be drawn";
                        return Err(Error::unfit("storage of a matrix", "few bits", possible));
                    }
                    Home::Frozen if self.frozen.len() < self.groups * self.room.frozen => {
                        let possible = "all in memory, to be drawn";
                        return Err(Error::unfit("frozen values", "one group's", possible));
                    }
                    _ => self.value(k, t),
                };
                for row in 0..t.rows {
                    for col in (0..t.cols).step_by(piece.len()) {
                        let piece = &mut piece[..64.min(t.cols - col)];
                        t.draw_from(seed, *index, (row, col), piece);
                        be.write_reals(values.sub(row * t.cols + col, piece.len()), piece)?;
                    }
                }
                *index += 1;
                self.next_state(&mut state, t).clear(be)
            })?;
        }
        Ok(())
    }

    const fn gradient_of(&self, k: usize) -> Reals {
        self.gradients_of(k, 1)
    }

    /// The gradients of `n` groups from the `k`-th on, which are kept at the same time.
    const fn gradients_of(&self, k: usize, n: usize) -> Reals {
        let len = self.room.trained;
        let at = match self.gradients.len().checked_div(len) {
            Some(kept) if kept > 0 => k % kept,
            _ => 0,
        };
        self.gradients.sub(at * len, n * len)
    }

    /// The groups of a step: the first one, and how many there are.
    const fn of_step(&self, step: usize) -> (usize, usize) {
        let first = step.saturating_mul(self.together);
        let left = self.groups.saturating_sub(first);
        (first, if left < self.together { left } else { self.together })
    }

    /// Sets the gradients of all groups to zero.
    ///
    /// # Errors
    /// Any error of the backend.
    pub fn zero_gradients<B: OptimOps>(&self, be: &mut B) -> Result<()> {
        be.fill_reals(self.gradients, B::Real::of(0.0))
    }

    /// The sums of squares of the gradients, once they are [measured](Self::measure).
    pub const fn norms(&self) -> Reals {
        self.norms
    }

    /// Sums of squares of group `k`'s gradients; a value that is not finite raises a fault.
    ///
    /// # Errors
    /// Any error of the backend.
    pub fn measure<B: OptimOps>(
        &self,
        be: &mut B,
        site: Site,
        k: usize,
        tensors: &(impl Tensors + ?Sized),
    ) -> Result<()> {
        let mut slot = k * self.room.slots;
        tensors.each(&mut |t| {
            if t.home != Home::Trained {
                return Ok(());
            }
            slot += 1;
            be.sum_squares(site, self.gradient(k, t), self.norms.sub(slot - 1, 1))
        })
    }

    /// Updates group `k`.
    ///
    /// # Errors
    /// Any error of the backend.
    pub fn update<B: OptimOps>(
        &self,
        be: &mut B,
        u: &Updater,
        k: usize,
        tensors: &(impl Tensors + ?Sized),
    ) -> Result<()> {
        let Some(rule) = self.kept.rule() else { return Ok(()) };
        let mut state = self.state_of_group(k);
        tensors.each(&mut |t| {
            if t.home != Home::Trained {
                return Ok(());
            }
            let decay = if t.matrix { u.weight_decay } else { 0.0 };
            let update = Update { rule, t: u.t, lr: u.lr, decay, scale: u.scale };
            let (value, gradient) = (self.value(k, t), self.gradient(k, t));
            let state = self.next_state(&mut state, t);
            be.update(&update, [t.rows, t.cols], value, gradient, &state)
        })
    }

    /// The groups of a step are finished: with fused updates they are measured, updated, and their
    /// gradient buffer cleared.
    ///
    /// Of several ranks ([`Exchange`]) their gradients are sent on their way, to be added up while
    /// the next step is worked on, and the sums of the one that was finished before, `step + 1`,
    /// take their own gradients' place. With fused updates that is the same buffer, whose values
    /// have just been taken, and the groups of `step + 1` are updated from it.
    /// [`settle`](Self::settle) does so for step 0.
    ///
    /// # Errors
    /// Any error of the backend; [`Error::Setting`] with fused updates and no optimizer for them.
    pub fn finished<B: OptimOps + Exchange>(
        &self,
        be: &mut B,
        u: Option<&Updater>,
        step: usize,
        tensors: &(impl Tensors + ?Sized),
    ) -> Result<()> {
        if self.gradients.is_empty() || (be.ranks() == 1 && !self.fused()) {
            return Ok(());
        }
        if be.ranks() == 1 {
            return self.apply(be, u, step, tensors);
        }
        let (first, n) = self.of_step(step);
        let (above, n_above) = self.of_step(step + 1);
        be.exchange(self.gradients_of(first, n), self.gradients_of(above, n_above))?;
        if !self.fused() {
            return Ok(());
        }
        if n_above > 0 {
            self.apply(be, u, step + 1, tensors)?;
        }
        // Where the step above is a shorter one, the rest still has the values that were taken.
        let own = self.gradients_of(first, n);
        let summed = n_above * self.room.trained;
        be.fill_reals(own.sub(summed, own.len().saturating_sub(summed)), B::Real::of(0.0))
    }

    /// All groups are finished: of several ranks, the sums of step 0 come back, and with fused
    /// updates its groups are updated.
    ///
    /// # Errors
    /// As [`finished`](Self::finished).
    pub fn settle<B: OptimOps + Exchange>(
        &self,
        be: &mut B,
        u: Option<&Updater>,
        tensors: &(impl Tensors + ?Sized),
    ) -> Result<()> {
        if self.gradients.is_empty() || be.ranks() == 1 {
            return Ok(());
        }
        let (first, n) = self.of_step(0);
        be.exchange(Reals::EMPTY, self.gradients_of(first, n))?;
        if self.fused() { self.apply(be, u, 0, tensors) } else { Ok(()) }
    }

    fn apply<B: OptimOps>(
        &self,
        be: &mut B,
        u: Option<&Updater>,
        step: usize,
        tensors: &(impl Tensors + ?Sized),
    ) -> Result<()> {
        let u = u.ok_or(Error::unfit("optimizer of the step", "missing", "one, to update"))?;
        let (first, n) = self.of_step(step);
        for k in (first..first + n).rev() {
            self.measure(be, Site::Block(k), k, tensors)?;
            self.update(be, u, k, tensors)?;
        }
        be.fill_reals(self.gradients_of(first, n), B::Real::of(0.0))
    }

    /// Adds the gradients of all groups up over the ranks, `piece` values at a time, before they
    /// are measured: for groups outside of blocks, which are not [`finished`](Self::finished) one
    /// after the other.
    ///
    /// # Errors
    /// Any error of the backend.
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
}

/// Group `k` of `len` values: of all groups, or the only one that is there.
const fn one_of(all: Reals, k: usize, len: usize) -> Reals {
    if all.len() == len { all } else { all.sub(k * len, len) }
}

#[cfg(test)]
mod tests {
    use std::vec;
    use std::vec::Vec;

    use super::*;
    use crate::reference::Reference;

    const ROWS: usize = 3;
    const COLS: usize = 150;

    fn tensors() -> [Tensor; 5] {
        [
            Tensor::matrix("normal", ROWS, COLS, Init::Normal(0.5)),
            Tensor::matrix("absent", ROWS, COLS, Init::Ones).when(false),
            Tensor::matrix("glorot", ROWS, COLS, Init::Glorot { outputs: 75 }),
            Tensor::vector("ones", 5, Init::Ones),
            Tensor::matrix("adapter", ROWS, COLS, Init::Adapter),
        ]
    }

    fn lay_out(resident: usize, freeze: Freeze) -> Result<(Params, [Tensor; 5], Layout)> {
        let (mut tensors, mut layout) = (tensors(), Layout::new(4));
        let (room, kept) = (Room::NONE.place(&mut tensors, freeze), Gradients::Full(Rule::ADAM_W));
        let params = Params::layout_paged(2, resident, room, freeze, kept, &mut layout)?;
        Ok((params, tensors, layout))
    }

    /// Drawn in pieces they are what [`Tensor::draw`] gives row by row; tensors that are not there
    /// have no number, and the optimizer's state is 0.
    #[test]
    fn initial_values_are_those_of_the_rows() {
        for freeze in [Freeze::Nothing, Freeze::Matrices] {
            let (params, tensors, layout) = lay_out(2, freeze).unwrap();
            let (_, r, w) = layout.arenas();
            let (mut r, mut w) = (vec![f32::NAN; r], vec![0; w]);
            let mut be = Reference::new(&layout, &mut [], &mut r, &mut w).unwrap();
            let mut index = 3;
            params.initialize(&mut be, 7, &mut index, &tensors).unwrap();
            assert_eq!(index, 3 + 2 * 4);
            let mut index = 3;
            for k in 0..2 {
                for t in tensors.iter().filter(|t| !t.is_empty()) {
                    let found = be.reals(params.value(k, t)).unwrap();
                    for (row, found) in found.chunks(t.cols).enumerate() {
                        let mut expected: Vec<f32> = vec![0.0; t.cols];
                        t.draw(7, index, row, &mut expected);
                        assert_eq!(found, expected, "{} {k}", t.name);
                    }
                    let state = params.state(k, t, &tensors);
                    assert_eq!(
                        state.reals.map(|h| h.len()),
                        [if t.home == Home::Trained { t.len() } else { 0 }; 2]
                    );
                    for state in state.reals {
                        assert!(be.reals(state).unwrap().iter().all(|&x| x == 0.0));
                    }
                    index += 1;
                }
            }
        }
    }

    /// Every tensor's state has a place of its own, and together they are what the plan counts.
    #[test]
    fn states_fill_the_plan() {
        for rule in [
            Rule::Sgd { momentum: 0.0 },
            Rule::Sgd { momentum: 0.9 },
            Rule::ADAM_W,
            Rule::SET_ADAM,
            Rule::ADAM_W_8BIT,
            Rule::ADAFACTOR,
        ] {
            let mut tensors = [
                Tensor::matrix("large", 67, 64, Init::Zeros),
                Tensor::matrix("absent", 67, 64, Init::Zeros).when(false),
                Tensor::matrix("small", 5, 7, Init::Zeros),
                Tensor::vector("vector", 4097, Init::Zeros),
            ];
            let (mut layout, kept) = (Layout::new(4), Gradients::Fused(rule));
            let room = Room::NONE.place(&mut tensors, Freeze::Nothing);
            let params = Params::layout(3, room, Freeze::Nothing, kept, &mut layout).unwrap();
            let (mut reals, mut words, mut bytes) = (Vec::new(), Vec::new(), 0);
            for k in 0..3 {
                for t in &tensors {
                    let (state, sizes) = (params.state(k, t, &tensors), rule.state(t.rows, t.cols));
                    assert_eq!(state.reals.map(Reals::len), sizes.reals);
                    assert_eq!(state.codes.map(Words::len), sizes.codes);
                    reals.extend(
                        state.reals.map(Reals::range).into_iter().filter(|r| !r.is_empty()),
                    );
                    words.extend(
                        state.codes.map(Words::range).into_iter().filter(|r| !r.is_empty()),
                    );
                }
            }
            for places in [&mut reals, &mut words] {
                places.sort_by_key(|r| r.start);
                assert!(places.windows(2).all(|r| r[0].end <= r[1].start));
                bytes += places.iter().map(|r| 4 * aligned(r.len())).sum::<usize>();
            }
            assert_eq!(layout.bytes(Category::Optimizer), bytes, "{rule:?}");
        }
    }

    #[test]
    fn values_that_cannot_be_drawn_are_refused() {
        let refused = |resident, freeze| {
            let (params, tensors, layout) = lay_out(resident, freeze).unwrap();
            let (_, r, w) = layout.arenas();
            let (mut r, mut w) = (vec![0.0_f32; r], vec![0; w]);
            let mut be = Reference::new(&layout, &mut [], &mut r, &mut w).unwrap();
            params.initialize(&mut be, 7, &mut 0, &tensors).unwrap_err()
        };
        let error = refused(2, Freeze::All(Some(Store::Alike(Packing::Bf16))));
        assert!(matches!(error, Error::Setting { what: "storage of a matrix", .. }), "{error}");
        let error = refused(1, Freeze::Matrices);
        assert!(matches!(error, Error::Setting { what: "frozen values", .. }), "{error}");
    }

    #[test]
    fn all_groups_are_in_memory_or_one() {
        let mut tensors = tensors();
        let room = Room::NONE.place(&mut tensors, Freeze::Matrices);
        for (resident, good) in [(0, false), (1, true), (2, false), (3, true), (4, false)] {
            let (freeze, kept, mut l) = (Freeze::Matrices, Gradients::None, Layout::new(4));
            let found = Params::layout_paged(3, resident, room, freeze, kept, &mut l);
            assert_eq!(found.is_ok(), good, "{resident}");
        }
    }
}
