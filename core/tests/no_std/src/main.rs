//! Trains a small transformer with exact reversible backpropagation: no std, no allocator, all
//! memory static.
#![no_std]
#![no_main]

use core::fmt::Write;

use bdia_core::arena::{Category, Layout, Reals};
use bdia_core::backend::{Chunk, Gelu, Mask};
use bdia_core::layers::{
    BlockShape, Freeze, Gradients, Mlp, Params, PreNorm, Room, Scheme, SelfAttention,
};
use bdia_core::network::{self, Chain, Loaded, Loss, Micro, Step};
use bdia_core::optim::Rule;
use bdia_core::reference::{Memory, Reference};
use bdia_core::rng::philox;
use bdia_core::stack::{Config, Head, Input, Mode, Stack, Tail};
use bdia_core::update::{Grid, Policy};
use bdia_core::{Error, Result};

const TOKENS: usize = 5;
const WIDTH: usize = 8;
const BATCH: usize = 3;
const BLOCKS: usize = 4;
const PER: usize = TOKENS * WIDTH;
const STEPS: u32 = 40;

type Be<'a> = Reference<'a, f32>;

fn noise(key: u64, i: usize) -> f32 {
    philox(key, [i as u32, 0, 0, 0])[0] as i32 as f32 / 2_147_483_648.0
}

/// Fixed inputs.
struct Inputs;

impl<'a> Input<Be<'a>> for Inputs {
    fn forward(&mut self, be: &mut Be<'a>, c: &Chunk, _: bool, x: Reals, _: Reals) -> Result<()> {
        for (i, x) in be.reals_mut(x)?.iter_mut().enumerate() {
            *x = noise(1, c.first * PER + i);
        }
        Ok(())
    }

    fn vjp(&mut self, _: &mut Be<'a>, _: &Chunk, _: Reals, _: Reals) -> Result<()> {
        Ok(())
    }
}

/// Half the mean squared distance to fixed targets.
struct Distance {
    scale: f32,
    sum: f64,
}

impl<'a> Head<Be<'a>> for Distance {
    fn forward_backward(
        &mut self,
        be: &mut Be<'a>,
        c: &Chunk,
        x: Reals,
        gx: Reals,
        _: Reals,
    ) -> Result<()> {
        for i in 0..x.len() {
            let d = be.reals(x.sub(i, 1))?[0] - noise(2, c.first * PER + i);
            self.sum += 0.5 * f64::from(d * d);
            be.reals_mut(gx.sub(i, 1))?[0] = d * self.scale;
        }
        Ok(())
    }
}

impl<'a> Loss<Be<'a>> for Distance {
    fn begin(&mut self, micro: &Micro) {
        *self = Self { scale: micro.scale as f32, sum: 0.0 };
    }

    fn loss(&self, _: &Be<'a>, _: usize) -> Result<f64> {
        Ok(self.sum)
    }
}

/// Input and head have no parameters.
type Net = Chain<Inputs, (SelfAttention, Mlp), Distance, 0>;

fn train(memory: &mut Memory<f32, 4096, 32768, 512>) -> Result<(f64, f64)> {
    let shape = BlockShape {
        tokens: TOKENS,
        width: WIDTH,
        heads: 2,
        inner: 16,
        eps: 1e-5,
        gelu: Gelu::Exact,
        mask: Mask::Full,
        attention_dropout: 0.1,
        residual_dropout: 0.1,
        hidden_dropout: 0.0,
        qkv_bias: true,
        temperature: false,
        init: Scheme::InverseRoot,
    };
    let mut layout = Layout::new(size_of::<f32>());
    let (freeze, gradients) = (Freeze::Nothing, Gradients::Fused(Rule::ADAM_W));
    let blocks = PreNorm::layout(&shape, BLOCKS, None, freeze, gradients, &mut layout)?;
    let config = Config {
        id: 0,
        batch: BATCH,
        per_sample: PER,
        blocks: BLOCKS,
        chunk: 2,
        tail: Tail::Head,
        needs: blocks.needs::<Be<'_>>(2, 1),
        ends_scratch: 0,
    };
    let mode = Mode::Bdia { grid: Grid::DEFAULT, gamma: Policy::PAPER, verify: true };
    let mut net = Net {
        stack: Stack::layout(&config, &mode, &mut layout)?,
        blocks,
        input: Inputs,
        head: Distance { scale: 0.0, sum: 0.0 },
        ends: Params::layout(1, Room::NONE, freeze, gradients, &mut layout)?,
        outside: [],
        trained: layout.trained(),
        micro_batches: 1,
    };
    let layout = layout.checked()?;
    if layout.bytes(Category::Library) != 0 {
        return Err(Error::Device("the reference backend has no library"));
    }
    let mut be = memory.backend(&layout)?;
    net.initialize(&mut be, 9)?;
    let (mut first, mut last) = (0.0, 0.0);
    for step in 0..STEPS {
        let at = Step { step, seed: 3, lr: 0.01, weight_decay: 0.0, clip: 0.0 };
        let targets = BATCH * PER;
        let loaded = Loaded { first: 0, targets, items: targets };
        let outcome = network::step(&mut net, &mut be, &at, |_, _, _| Ok::<_, Error>(loaded))?;
        if outcome.rebuilt.mismatches != 0 {
            return Err(Error::Device("a rebuilt activation differs"));
        }
        if step == 0 {
            first = outcome.loss;
        }
        last = outcome.loss;
    }
    Ok((first, last))
}

unsafe extern "C" {
    fn write(fd: i32, data: *const u8, len: usize) -> isize;
}

#[unsafe(no_mangle)]
extern "C" fn main() -> i32 {
    static mut MEMORY: Memory<f32, 4096, 32768, 512> = Memory::new();
    let place = &raw mut MEMORY;
    // SAFETY: the program has one thread and this is the only reference.
    let memory = unsafe { &mut *place };
    let mut line = heapless::String::<200>::new();
    let (code, written) = match train(memory) {
        Ok((first, last)) if last < 0.7 * first => (
            0,
            writeln!(
                line,
                "no_std: {STEPS} exact steps, loss {first:.4} to {last:.4}, 0 differing elements"
            ),
        ),
        Ok((first, last)) => {
            (1, writeln!(line, "no_std: the loss went from {first} to {last} only"))
        }
        Err(e) => (1, writeln!(line, "no_std: {e}")),
    };
    // SAFETY: the pointer and the length are those of `line`.
    unsafe { write(1, line.as_ptr(), line.len()) };
    if written.is_err() { 2 } else { code }
}

/// The precompiled `core` names it in its unwind tables; with `panic = "abort"` nobody calls it.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
