//! The jobs, and the static memory that the largest of them needs.

use bdia_core::arena::Layout;
use bdia_core::error::{Error, Result};
use bdia_core::optim::Rule;
use bdia_core::reference::Reference;
use bdia_core::stack::Mode;

use crate::data::{Samples, Weights};
use crate::model::{BATCH, BDIA, Be, Job, Model, Trained};

/// RAM of the device, in bytes.
pub const RAM: usize = 256 * 1024;
/// What the linker script reserves for the stack.
pub const STACK: usize = 22 * 1024;
/// What is left for a plan: all but the stack and one KiB for other variables.
pub const BUDGET: usize = RAM - STACK - 1024;

/// Seen by the new sensor, to fine-tune with.
pub const TUNE: Samples = Samples(include_bytes!(concat!(env!("OUT_DIR"), "/tune")));
/// Seen by the new sensor, to test.
pub const TEST: Samples = Samples(include_bytes!(concat!(env!("OUT_DIR"), "/test")));

/// Pretrained on the host (`bdia-mcu pretrain`).
const WIDTH_24: Weights = Weights(include_bytes!("../weights/width-24.f16"));
const WIDTH_16: Weights = Weights(include_bytes!("../weights/width-16.f16"));

const SGD: Rule = Rule::Sgd { momentum: 0.0 };
const ADAM_W: Rule = Rule::AdamW { beta1: 0.9, beta2: 0.999, eps: 1e-8 };

const STANDARD: Mode = Mode::Standard { grid: None };
const CHECKPOINT: Mode = Mode::Checkpoint { every: 1, grid: None };

/// All blocks, with stochastic gradient descent.
pub const FULL: Job = Job {
    name: "full",
    width: 24,
    heads: 2,
    inner: 48,
    trained: Trained::All,
    mode: BDIA,
    micro_batch: BATCH,
    rule: SGD,
    lr: 0.1,
    epochs: 5,
    weights: Some(WIDTH_24),
};

/// All blocks of a smaller network, with AdamW.
pub const ADAM: Job = Job {
    name: "adamw",
    width: 16,
    inner: 32,
    rule: ADAM_W,
    lr: 1e-2,
    weights: Some(WIDTH_16),
    ..FULL
};

/// Biases, norms, positions and head.
pub const VECTORS: Job =
    Job { name: "bias", trained: Trained::Vectors, rule: ADAM_W, lr: 2e-2, ..FULL };

/// The head only.
pub const HEAD: Job = Job { name: "head", trained: Trained::Head, rule: ADAM_W, lr: 2e-2, ..FULL };

/// What the device does.
pub const JOBS: [Job; 4] = [FULL, ADAM, VECTORS, HEAD];

/// What does not fit: the same training without the reversible update, whole or one sample at a
/// time.
pub const REFUSED: [Job; 4] = [
    Job { name: "standard", mode: STANDARD, ..FULL },
    Job { name: "checkpoint", mode: CHECKPOINT, ..FULL },
    Job { name: "standard-micro", mode: STANDARD, micro_batch: 1, ..FULL },
    Job { name: "checkpoint-micro", mode: CHECKPOINT, micro_batch: 1, ..FULL },
];

/// The values that the largest plan of `jobs` asks for.
pub const fn arena(jobs: &[Job]) -> usize {
    let (mut longest, mut i) = (0, 0);
    while i < jobs.len() {
        let (ints, reals, words) = match Model::plan(&jobs[i]) {
            Ok(model) => model.layout.arenas(),
            Err(_) => panic!("a job's settings do not fit together"),
        };
        if ints + reals + words > longest {
            longest = ints + reals + words;
        }
        i += 1;
    }
    longest
}

/// Values of the device's memory, from the plans; each has four bytes.
pub const ARENA: usize = arena(&JOBS);
const _: () = assert!(4 * ARENA <= BUDGET, "the jobs must fit the device");

/// One static block of memory for jobs that run one after another: each plan cuts its three arenas
/// from it. (`bdia_core::reference::Memory` has a fixed length for each of the three, which is all
/// that a single job needs.)
#[derive(Debug)]
pub struct Arena<const N: usize>([u32; N]);

impl<const N: usize> Arena<N> {
    /// All zero.
    pub const fn new() -> Self {
        Self([0; N])
    }

    /// A backend over zeroed arenas of the layout's lengths.
    ///
    /// # Errors
    /// [`Error::Shape`] if there is too little.
    pub fn backend(&mut self, layout: &Layout) -> Result<Be<'_>> {
        let (ints, reals, words) = layout.arenas();
        let expected = ints.saturating_add(reals).saturating_add(words);
        let short = Error::Shape { what: "static memory, in values", expected, found: N };
        let all = self.0.get_mut(..expected).ok_or(short)?;
        all.fill(0);
        let (first, rest) = all.split_at_mut_checked(ints).ok_or(short)?;
        let (second, third) = rest.split_at_mut_checked(reals).ok_or(short)?;
        // Values of four bytes each, whatever they are: these casts always succeed.
        let cast = |_| Error::Device("static memory cannot be shared out");
        let first = bytemuck::try_cast_slice_mut(first).map_err(cast)?;
        let second = bytemuck::try_cast_slice_mut(second).map_err(cast)?;
        Reference::new(layout, first, second, third)
    }
}

impl<const N: usize> Default for Arena<N> {
    fn default() -> Self {
        Self::new()
    }
}
