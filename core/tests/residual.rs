//! Residual blocks: the composed vector-Jacobian product against finite differences, against the
//! formulas written out by hand, and with branches of another crate.
#![allow(clippy::unwrap_used)]

mod common;

use bdia_core::arena::{Ints, Layout, Reals};
use bdia_core::backend::{Backend, Chunk, Gate, Gelu, Mask};
use bdia_core::layers::{
    At, BlockSet, BlockShape, Branch, Branches, CrossAttention, Decoder, Freeze, GatedMlp,
    Gradients, GroupedAttention, Init, LlamaBlocks, LlamaShape, LoraShape, Mlp, MlpShape,
    Parameter, Params, PreNorm, Residual, Room, Scheme, SelfAttention, Store, Tensor, Tensors,
};
use bdia_core::optim::Rule;
use bdia_core::stack::{Blocks, Call, Context, Needs};
use bdia_core::{Category, NnOps, Packing, Real, Reference, Result, Site, Storage};
use common::noise;

const SAMPLES: usize = 3;
const TOKENS: usize = 4;
const WIDTH: usize = 4;
const KEYS: usize = 3;
const BLOCKS: usize = 2;
/// The block that is called: not the first, so that a wrong group would show.
const K: usize = 1;
const KEPT: Gradients = Gradients::Full(Rule::Sgd { momentum: 0.0 });

fn shape() -> BlockShape {
    BlockShape {
        tokens: TOKENS,
        width: WIDTH,
        heads: 2,
        inner: 6,
        eps: 1e-5,
        gelu: Gelu::Exact,
        mask: Mask::Causal,
        attention_dropout: 0.0,
        residual_dropout: 0.0,
        hidden_dropout: 0.0,
        qkv_bias: true,
        temperature: false,
        init: Scheme::InverseRoot,
    }
}

fn dropped() -> BlockShape {
    BlockShape { attention_dropout: 0.2, residual_dropout: 0.3, hidden_dropout: 0.25, ..shape() }
}

/// Blocks, and the buffers of one call.
struct Bench<P> {
    blocks: Residual<P>,
    layout: Layout,
    call: Call,
    h: Reals,
    gh: Reals,
    gx: Reals,
    /// For what is written out by hand.
    own: [Reals; 7],
    lens: [Ints; 2],
    /// Positions of packed samples, and where their texts begin.
    packed: [Ints; 2],
}

fn bench<R: Real, P: Branches>(
    blocks: impl FnOnce(&mut Layout) -> Residual<P>,
    context: bool,
) -> Bench<P> {
    let mut l = Layout::new(R::BYTES);
    let blocks = blocks(&mut l);
    let needs = blocks.needs::<Reference<'_, R>>(SAMPLES, 1);
    let whole = SAMPLES * TOKENS * WIDTH;
    let lens = [0; 2].map(|_| l.ints(Category::Head, SAMPLES));
    let packed = [0; 2].map(|_| l.ints(Category::Head, SAMPLES * TOKENS));
    let mut take = |n: usize| l.reals(Category::Workspace, n);
    let context = context.then(|| Context {
        value: take(SAMPLES * KEYS * WIDTH),
        grad: take(SAMPLES * KEYS * WIDTH),
    });
    let chunk = Chunk {
        seed: 5,
        step: 3,
        stack: 1,
        site: Site::Block(K),
        first: 0,
        samples: SAMPLES,
        global: 9,
        frame: 0,
    };
    let call = Call {
        chunk,
        block: K,
        x: take(whole),
        frame: take(SAMPLES * needs.frame),
        scratch: take(SAMPLES * needs.scratch + needs.fixed),
        context,
        train: true,
        keep: true,
    };
    let [h, gh, gx] = [0; 3].map(|_| take(whole));
    let own = [0; 7].map(|_| take(whole));
    Bench { blocks, layout: l.checked().unwrap(), call, h, gh, gx, own, lens, packed }
}

/// Memory full of garbage, with values where a block reads them.
struct Memory<R>(Vec<i32>, Vec<R>, Vec<u32>);

impl<R: Real> Memory<R> {
    fn new<P: Branches>(b: &Bench<P>) -> Self {
        let (i, r, w) = b.layout.arenas();
        // The words of narrow matrices: numbers of either format around 1.
        let word = |i: usize| 0x3E80_3E80 ^ (i as u32).wrapping_mul(0x9E37_79B1) & 0x807F_807F;
        let mut memory = Self(vec![0; i], vec![R::nan(); r], (0..w).map(word).collect());
        b.blocks
            .each(&mut |t| {
                for k in 0..BLOCKS {
                    memory.fill(b.blocks.params.value(k, t), 1, 0.6);
                }
                Ok(())
            })
            .unwrap();
        memory.fill(b.call.x, 2, 1.0);
        memory.fill(b.gh, 3, 1.0);
        if let Some(context) = b.call.context {
            memory.fill(context.value, 4, 1.0);
        }
        memory.0[b.lens[0].range()].copy_from_slice(&[4, 2, 3]);
        memory.0[b.lens[1].range()].copy_from_slice(&[3, 0, 2]);
        // Texts of 1 and 3 tokens, one of 4, and two of 2.
        memory.0[b.packed[0].range()].copy_from_slice(&[0, 0, 1, 2, 0, 1, 2, 3, 0, 1, 0, 1]);
        memory.0[b.packed[1].range()].copy_from_slice(&[0, 1, 1, 1, 0, 0, 0, 0, 0, 0, 2, 2]);
        memory.fill(b.own[0], 5, 1.0);
        memory.fill(b.own[1], 6, 1.0);
        memory
    }

    fn fill(&mut self, h: Reals, key: u32, scale: f64) {
        for (i, x) in self.1[h.range()].iter_mut().enumerate() {
            *x = R::of(scale * noise(key, h.start() + i));
        }
    }

    fn backend<P>(&mut self, b: &Bench<P>) -> Reference<'_, R> {
        Reference::new(&b.layout, &mut self.0, &mut self.1, &mut self.2).unwrap()
    }
}

/// `Σ gh·h(x)` and, with `back`, its gradients.
fn run<R: Real, P: Branches + Copy>(b: &Bench<P>, memory: &mut Memory<R>, back: bool) -> f64 {
    let gh: Vec<f64> = memory.1[b.gh.range()].iter().map(|g| g.wide()).collect();
    let (call, h, gx) = (b.call, b.h, b.gx);
    let mut blocks = b.blocks;
    let mut be = memory.backend(b);
    blocks.residual(&mut be, &call, h).unwrap();
    let sum = be.reals(h).unwrap().iter().zip(&gh).map(|(h, g)| h.wide() * g).sum();
    if back {
        blocks.params.zero_gradients(&mut be).unwrap();
        // `gx` is added to.
        be.fill_reals(gx, R::of(0.125)).unwrap();
        if let Some(context) = call.context {
            be.fill_reals(context.grad, R::of(-0.5)).unwrap();
        }
        blocks.vjp(&mut be, &call, b.gh, gx).unwrap();
    }
    assert_eq!(be.take_fault(), Ok(None));
    sum
}

/// Every gradient that the product gives, against central differences: of `x`, of what is trained,
/// of the context. Returns how many parameters have a gradient.
fn check<P: Branches + Copy>(
    name: &str,
    blocks: impl FnOnce(&mut Layout) -> Residual<P>,
    prepare: impl FnOnce(&mut Bench<P>),
    context: bool,
) -> usize {
    let mut b = bench::<f64, P>(blocks, context);
    prepare(&mut b);
    let mut memory = Memory::<f64>::new(&b);
    let fresh = memory.1.clone();
    run(&b, &mut memory, true);
    let mut after = core::mem::replace(&mut memory.1, fresh);
    // What was there before is not the product's.
    after[b.gx.range()].iter_mut().for_each(|g| *g -= 0.125);
    let mut of = common::trained(&[(&b.blocks.params, &b.blocks)]);
    // Of the other block nothing was touched.
    let foreign = |p: &Parameter| after[p.grad.range()].iter().all(|&g| g == 0.0);
    let groups = of.len() / BLOCKS;
    assert!(of[..groups].iter().all(foreign), "{name}: a gradient of another block");
    of.drain(..groups);
    let trained = of.iter().map(|p| p.value.len()).sum();
    of.push(Parameter { value: b.call.x, grad: b.gx });
    if let Some(context) = b.call.context {
        after[context.grad.range()].iter_mut().for_each(|g| *g += 0.5);
        of.push(Parameter { value: context.value, grad: context.grad });
    }
    let mut arena = memory.1.clone();
    let seen = common::compare_gradients(&of, &mut arena, &after, |arena| {
        memory.1.copy_from_slice(arena);
        run(&b, &mut memory, false)
    });
    // The gradient of x, at least.
    assert!(seen > SAMPLES * TOKENS * WIDTH / 2, "{name}: {seen}");
    trained
}

#[test]
fn two_branches_against_finite_differences() {
    let plain = |shape: BlockShape, lora: Option<LoraShape>, freeze: Freeze| {
        move |l: &mut Layout| PreNorm::layout(&shape, BLOCKS, lora, freeze, KEPT, l).unwrap()
    };
    let pad = |b: &mut Bench<(SelfAttention, Mlp)>| b.blocks.branches.0.key_lens = b.lens[0];
    let lora = Some(LoraShape { rank: 2, alpha: 3.0 });
    let all = 4 * WIDTH + WIDTH * 3 * WIDTH + 3 * WIDTH + WIDTH * WIDTH + WIDTH;
    let all = all + 2 * WIDTH * 6 + 6 + WIDTH;
    let vectors = 4 * WIDTH + 3 * WIDTH + WIDTH + 6 + WIDTH;
    let adapters = 2 * 4 * WIDTH;

    let cases = [
        ("plain", shape(), None, Freeze::Nothing, all),
        ("dropout", dropped(), None, Freeze::Nothing, all),
        (
            "temperature",
            BlockShape { temperature: true, qkv_bias: false, mask: Mask::Others, ..dropped() },
            None,
            Freeze::Nothing,
            all + 1 - 3 * WIDTH,
        ),
        (
            "frozen temperature",
            BlockShape { temperature: true, mask: Mask::Others, ..dropped() },
            lora,
            Freeze::All(Some(Store::Alike(Packing::F16))),
            adapters,
        ),
        (
            "temperature among frozen matrices",
            BlockShape { temperature: true, mask: Mask::Full, ..dropped() },
            None,
            Freeze::Matrices,
            vectors + 1,
        ),
        ("frozen matrices", dropped(), None, Freeze::Matrices, vectors),
        ("frozen", dropped(), None, Freeze::All(None), 0),
        ("frozen in bf16", dropped(), None, Freeze::All(Some(Store::Alike(Packing::Bf16))), 0),
        ("adapters", dropped(), lora, Freeze::Nothing, all + adapters),
        ("adapters of frozen blocks", dropped(), lora, Freeze::All(None), adapters),
        (
            "adapters of binary16",
            dropped(),
            lora,
            Freeze::All(Some(Store::Alike(Packing::F16))),
            adapters,
        ),
        ("adapters and vectors", shape(), lora, Freeze::Matrices, vectors + adapters),
    ];
    for (name, shape, lora, freeze, trained) in cases {
        assert_eq!(check(name, plain(shape, lora, freeze), |_| {}, false), trained, "{name}");
        assert_eq!(check(name, plain(shape, lora, freeze), pad, false), trained, "{name}, padded");
    }
}

/// A block of Llama's family without any option.
fn llama() -> LlamaShape {
    LlamaShape {
        tokens: TOKENS,
        width: WIDTH,
        heads: 4,
        kv_heads: 2,
        head_dim: 2,
        inner: 6,
        eps: 1e-2,
        norm_offset: 0.0,
        gate: Gate::Silu,
        qkv_bias: false,
        output_bias: false,
        mlp_bias: false,
        head_norms: false,
        post_norms: false,
        window: None,
        sliding: BlockSet::NONE,
        unrotated: BlockSet::NONE,
        attention_dropout: 0.0,
        init: Scheme::InverseRoot,
    }
}

/// With all of them.
fn llama_of_everything() -> LlamaShape {
    LlamaShape {
        norm_offset: 1.0,
        gate: Gate::Gelu(Gelu::Tanh),
        qkv_bias: true,
        output_bias: true,
        mlp_bias: true,
        head_norms: true,
        post_norms: true,
        window: Some(2),
        sliding: BlockSet::ALL,
        attention_dropout: 0.2,
        ..llama()
    }
}

#[test]
fn branches_of_llama_against_finite_differences() {
    let (shape, everything) = (llama(), llama_of_everything());
    // Queries and output, keys and values; gate, up and down; norms.
    let plain = 2 * WIDTH * 8 + 2 * WIDTH * 4 + 3 * WIDTH * 6 + 2 * WIDTH;
    let all = plain + 8 + 2 * 4 + WIDTH + 2 * 6 + WIDTH + 2 * 2 + 2 * WIDTH;
    let lora = Some(LoraShape { rank: 2, alpha: 3.0 });
    let adapters = 2 * (2 * (WIDTH + 8) + 2 * (WIDTH + 4) + 3 * (WIDTH + 6));
    let narrow = 2 * WIDTH * 4 + 2 * WIDTH * 4 + 3 * WIDTH * 20 + 2 * WIDTH;
    let unrotated = BlockSet::NONE.with(K).unwrap();
    for (name, shape, lora, freeze, trained) in [
        ("plain", shape, None, Freeze::Nothing, plain),
        ("everything", everything, None, Freeze::Nothing, all),
        ("no positions", LlamaShape { unrotated, ..shape }, None, Freeze::Nothing, plain),
        ("adapters", shape, lora, Freeze::All(None), adapters),
        (
            "adapters of everything",
            everything,
            lora,
            Freeze::All(Some(Store::Alike(Packing::Bf16))),
            adapters,
        ),
        ("all and adapters", everything, lora, Freeze::Nothing, all + adapters),
        // Rows wider than all heads, and an MLP wider than rows.
        (
            "narrow heads",
            LlamaShape { heads: 2, inner: 20, ..shape },
            None,
            Freeze::Nothing,
            narrow,
        ),
    ] {
        let blocks =
            |l: &mut Layout| LlamaBlocks::layout(&shape, BLOCKS, lora, freeze, KEPT, l).unwrap();
        // Any numbers are a table: the product is that of the linear map that they are.
        let tables = |b: &mut Bench<(GroupedAttention, GatedMlp)>| {
            b.blocks.branches.0.tables = [b.own[0], b.own[1]].map(|of| of.sub(0, 2 * TOKENS));
        };
        assert_eq!(check(name, blocks, tables, false), trained, "{name}");
        let packed = |b: &mut Bench<(GroupedAttention, GatedMlp)>| {
            tables(b);
            let attention = &mut b.blocks.branches.0;
            (attention.positions, attention.starts) = (b.packed[0], b.packed[1]);
        };
        assert_eq!(check(name, blocks, packed, false), trained, "{name}, packed");
    }
}

/// The results of blocks that take some tokens at a time are those of blocks that take all: bit for
/// bit, but for gradients of parameters, which are sums over tokens in another order.
fn in_chunks<P: Branches + Copy>(
    name: &str,
    blocks: impl Fn(&mut Layout) -> Residual<P>,
    prepare: impl Fn(&mut Bench<P>),
    smaller: bool,
) {
    let of = |tokens: Option<usize>| {
        let mut b = bench::<f64, P>(|l| blocks(l).in_token_chunks(tokens), false);
        prepare(&mut b);
        let mut memory = Memory::<f64>::new(&b);
        // Values depend on their places, which differ.
        for (key, h) in [(7, b.gh), (8, b.own[0]), (9, b.own[1])] {
            for (i, x) in memory.1[h.range()].iter_mut().enumerate() {
                *x = noise(key, i);
            }
        }
        run(&b, &mut memory, true);
        let bits = |h: Reals| memory.1[h.range()].iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        let gradients = common::trained(&[(&b.blocks.params, &b.blocks)]);
        let gradients = gradients.iter().flat_map(|p| memory.1[p.grad.range()].to_vec());
        let frame = b.call.frame.len();
        (bits(b.h), bits(b.gx), gradients.collect::<Vec<_>>(), frame)
    };
    let whole = of(None);
    for tokens in [1, 3, TOKENS, 100] {
        let some = of(Some(tokens));
        assert_eq!((&some.0, &some.1), (&whole.0, &whole.1), "{name}, {tokens} tokens");
        for (a, b) in some.2.iter().zip(&whole.2) {
            // Sums of twelve terms around 1.
            assert!((a - b).abs() < 1e-12, "{name}, {tokens} tokens: {a} {b}");
        }
        assert_eq!(some.3 < whole.3, smaller && tokens < TOKENS, "{name}, {tokens} tokens");
    }
}

#[test]
fn some_tokens_at_a_time_are_all_tokens() {
    let lora = Some(LoraShape { rank: 2, alpha: 3.0 });
    for (lora, freeze) in [
        (None, Freeze::Nothing),
        (lora, Freeze::All(Some(Store::Alike(Packing::Bf16)))),
        (lora, Freeze::Nothing),
    ] {
        for shape in [llama(), llama_of_everything()] {
            let blocks = |l: &mut Layout| {
                LlamaBlocks::layout(&shape, BLOCKS, lora, freeze, KEPT, l).unwrap()
            };
            let tables = |b: &mut Bench<(GroupedAttention, GatedMlp)>| {
                b.blocks.branches.0.tables = [b.own[0], b.own[1]].map(|of| of.sub(0, 2 * TOKENS));
            };
            in_chunks("Llama", blocks, tables, true);
        }
        let blocks = |shape: BlockShape| {
            move |l: &mut Layout| PreNorm::layout(&shape, BLOCKS, lora, freeze, KEPT, l).unwrap()
        };
        in_chunks("GPT-2", blocks(shape()), |_| {}, true);
        // Numbers of dropout are drawn for whole samples.
        in_chunks("GPT-2 with dropout", blocks(dropped()), |_| {}, false);
    }
}

#[test]
fn three_branches_against_finite_differences() {
    for (name, shape) in [("plain", shape()), ("dropout", dropped())] {
        let blocks = |l: &mut Layout| Decoder::layout(&shape, KEYS, BLOCKS, KEPT, l).unwrap();
        check(name, blocks, |_| {}, true);
        let pad = |b: &mut Bench<(SelfAttention, CrossAttention, Mlp)>| {
            b.blocks.branches.0.key_lens = b.lens[0];
            b.blocks.branches.1.context_lens = b.lens[1];
        };
        check(name, blocks, pad, true);
    }
    // Frozen as in two branches.
    let lora = Some(LoraShape { rank: 2, alpha: 3.0 });
    let (vectors, adapters) = (6 * WIDTH + 3 * WIDTH + 5 * WIDTH + 6 + WIDTH, 2 * 4 * WIDTH);
    for (name, lora, freeze, trained) in [
        ("frozen matrices", None, Freeze::Matrices, vectors),
        ("frozen", None, Freeze::All(None), 0),
        ("adapters of bf16", lora, Freeze::All(Some(Store::Alike(Packing::Bf16))), adapters),
        ("adapters and vectors", lora, Freeze::Matrices, vectors + adapters),
    ] {
        let blocks = |l: &mut Layout| {
            Decoder::layout_frozen(&dropped(), KEYS, BLOCKS, lora, freeze, KEPT, l).unwrap()
        };
        assert_eq!(check(name, blocks, |_| {}, true), trained, "{name}");
    }
}

/// Bits of all that a product gives: `h`, `gx`, gradients of parameters and of the context.
fn results<P: Branches>(b: &Bench<P>, memory: &Memory<f32>) -> Vec<u32> {
    let parameters = common::trained(&[(&b.blocks.params, &b.blocks)]);
    let context = b.call.context.map_or(Reals::EMPTY, |c| c.grad);
    let all = parameters.iter().map(|p| p.grad).chain([b.h, b.gx, context]);
    all.flat_map(|h| memory.1[h.range()].iter().map(|x| x.to_bits())).collect()
}

/// What the blocks' formulas give, step by step: `by_hand` computes `h`, then adds to `gx`.
fn compare<P: Branches + Copy>(
    b: Bench<P>,
    by_hand: impl Fn(&mut Reference<'_, f32>, &Bench<P>) -> Result<()>,
) {
    let (mut composed, mut hand) = (Memory::new(&b), Memory::new(&b));
    run(&b, &mut composed, true);
    let mut be = hand.backend(&b);
    b.blocks.params.zero_gradients(&mut be).unwrap();
    be.fill_reals(b.gx, 0.125).unwrap();
    if let Some(context) = b.call.context {
        be.fill_reals(context.grad, -0.5).unwrap();
    }
    by_hand(&mut be, &b).unwrap();
    assert_eq!(be.take_fault(), Ok(None));
    let (composed, hand) = (results(&b, &composed), results(&b, &hand));
    assert!(composed.iter().all(|&x| f32::from_bits(x).is_finite()));
    assert_eq!(composed, hand);
}

/// `h(x) = f(x) + g(x + f(x))` of attention `f` and MLP `g`, bit for bit.
#[test]
fn two_branches_are_the_formulas() {
    let lora = Some(LoraShape { rank: 2, alpha: 3.0 });
    for (lora, freeze) in [
        (None, Freeze::Nothing),
        (None, Freeze::Matrices),
        (lora, Freeze::All(None)),
        (lora, Freeze::All(Some(Store::Alike(Packing::Bf16)))),
    ] {
        let blocks =
            |l: &mut Layout| PreNorm::layout(&dropped(), BLOCKS, lora, freeze, KEPT, l).unwrap();
        let mut b = bench::<f32, _>(blocks, false);
        b.blocks.branches.0.key_lens = b.lens[0];
        compare(b, |be, b| {
            let (blocks, call, [f, mid, g, gmid, ..]) = (&b.blocks, &b.call, b.own);
            blocks.branch(be, 0, call, call.x, f)?;
            be.copy_reals(call.x, mid)?;
            be.add(mid, f)?;
            blocks.branch(be, 1, call, mid, g)?;
            be.copy_reals(f, b.h)?;
            be.add(b.h, g)?;

            // mid = x + f: gx += gmid, gf = gh + gmid
            be.fill_reals(gmid, 0.0)?;
            blocks.branch_vjp(be, 1, call, mid, b.gh, gmid)?;
            be.add(b.gx, gmid)?;
            be.add(b.gh, gmid)?;
            blocks.branch_vjp(be, 0, call, call.x, b.gh, b.gx)
        });
    }
}

/// `h(x) = f(x) + c(a) + g(a + c(a))` with `a = x + f(x)`, cross-attention `c`, bit for bit.
#[test]
fn three_branches_are_the_formulas() {
    let blocks = |l: &mut Layout| Decoder::layout(&dropped(), KEYS, BLOCKS, KEPT, l).unwrap();
    let mut b = bench::<f32, _>(blocks, true);
    b.blocks.branches.0.key_lens = b.lens[0];
    b.blocks.branches.1.context_lens = b.lens[1];
    compare(b, |be, b| {
        let (blocks, call, [f, a, c, mid, g, ga, gc]) = (&b.blocks, &b.call, b.own);
        blocks.branch(be, 0, call, call.x, f)?;
        be.copy_reals(call.x, a)?;
        be.add(a, f)?;
        blocks.branch(be, 1, call, a, c)?;
        be.copy_reals(a, mid)?;
        be.add(mid, c)?;
        blocks.branch(be, 2, call, mid, g)?;
        be.copy_reals(f, b.h)?;
        be.add(b.h, c)?;
        be.add(b.h, g)?;

        // With gb = J_gᵀ·gh and ga = gb + J_cᵀ·(gh + gb): gx += ga + J_fᵀ·(gh + ga).
        be.fill_reals(ga, 0.0)?;
        blocks.branch_vjp(be, 2, call, mid, b.gh, ga)?;
        be.copy_reals(b.gh, gc)?;
        be.add(gc, ga)?;
        blocks.branch_vjp(be, 1, call, a, gc, ga)?;
        be.add(b.gx, ga)?;
        be.add(b.gh, ga)?;
        blocks.branch_vjp(be, 0, call, call.x, b.gh, b.gx)
    });
}

/// A branch of another crate: `y = w·x²`, `w` of every column.
#[derive(Clone, Copy)]
struct Square([Tensor; 1]);

impl Square {
    fn new(room: Room) -> (Self, Room) {
        let mut tensors = [Tensor::vector("square.weight", WIDTH, Init::Ones)];
        let room = room.place(&mut tensors, Freeze::Nothing);
        (Self(tensors), room)
    }
}

fn fetch<B: Storage>(be: &B, h: Reals) -> Result<Vec<f64>> {
    let mut values = vec![B::Real::of(0.0); h.len()];
    be.read_reals(h, &mut values)?;
    Ok(values.iter().map(|x| x.wide()).collect())
}

fn store<B: Storage>(be: &mut B, h: Reals, values: &[f64]) -> Result<()> {
    be.write_reals(h, &values.iter().map(|&x| B::Real::of(x)).collect::<Vec<_>>())
}

impl<B: Backend> Branch<B> for Square {
    fn needs(&self, _: usize, _: usize) -> Needs {
        // The square, so that frames have something in them.
        Needs { frame: TOKENS * WIDTH, scratch: 1, fixed: 2 }
    }

    fn forward(&self, be: &mut B, at: &At<'_>, x: Reals, y: Reals) -> Result<()> {
        let (x, w) = (fetch(be, x)?, fetch(be, at.value(&self.0[0]))?);
        let squares: Vec<_> = x.iter().map(|x| x * x).collect();
        store(be, at.frame, &squares)?;
        be.fill_reals(at.scratch, B::Real::of(7.0))?;
        let y_host: Vec<_> = squares.iter().enumerate().map(|(i, s)| w[i % WIDTH] * s).collect();
        store(be, y, &y_host)
    }

    fn vjp(&self, be: &mut B, at: &At<'_>, x: Reals, gy: Reals, gx: Reals) -> Result<()> {
        let (x, w, squares) =
            (fetch(be, x)?, fetch(be, at.value(&self.0[0]))?, fetch(be, at.frame)?);
        let (gy, mut gx_host) = (fetch(be, gy)?, fetch(be, gx)?);
        let mut gw = fetch(be, at.slope(&self.0[0]))?;
        for i in 0..x.len() {
            gx_host[i] += 2.0 * w[i % WIDTH] * x[i] * gy[i];
            gw[i % WIDTH] += squares[i] * gy[i];
        }
        be.fill_reals(at.scratch, B::Real::of(-7.0))?;
        store(be, at.slope(&self.0[0]), &gw)?;
        store(be, gx, &gx_host)
    }
}

/// `N` of them, one after the other.
#[derive(Clone, Copy)]
struct Squares<const N: usize>([Square; N]);

impl<const N: usize> Branches for Squares<N> {
    const COUNT: usize = N;

    fn branch<B: Backend>(&self, i: usize) -> &dyn Branch<B> {
        &self.0[i]
    }

    fn tensors(&self, i: usize) -> &[Tensor] {
        &self.0[i].0
    }
}

/// And before an MLP of this crate.
#[derive(Clone, Copy)]
struct Mixed(Square, Mlp);

impl Branches for Mixed {
    const COUNT: usize = 2;

    fn branch<B: Backend>(&self, i: usize) -> &dyn Branch<B> {
        if i == 0 { &self.0 } else { &self.1 }
    }

    fn tensors(&self, i: usize) -> &[Tensor] {
        if i == 0 { &self.0.0 } else { self.1.tensors() }
    }
}

fn squares<const N: usize>(l: &mut Layout) -> Residual<Squares<N>> {
    let mut room = Room::NONE;
    let branches = [(); N].map(|()| {
        let (square, more) = Square::new(room);
        room = more;
        square
    });
    let params = Params::layout(BLOCKS, room, Freeze::Nothing, KEPT, l).unwrap();
    Residual::new(Squares(branches), params, TOKENS, WIDTH)
}

#[test]
fn branches_of_another_crate_are_composed() {
    assert_eq!(check("one", squares::<1>, |_| {}, false), WIDTH);
    assert_eq!(check("two", squares::<2>, |_| {}, false), 2 * WIDTH);
    assert_eq!(check("five", squares::<5>, |_| {}, false), 5 * WIDTH);
    let mixed = |l: &mut Layout| {
        let (square, room) = Square::new(Room::NONE);
        let shape = MlpShape {
            tokens: TOKENS,
            width: WIDTH,
            inner: 6,
            eps: 1e-5,
            gelu: Gelu::Tanh,
            hidden_dropout: 0.1,
            residual_dropout: 0.1,
            init: Scheme::Glorot,
        };
        let (mlp, room) = Mlp::new(shape, Freeze::Nothing, room);
        let params = Params::layout(BLOCKS, room, Freeze::Nothing, KEPT, l).unwrap();
        Residual::new(Mixed(square, mlp), params, TOKENS, WIDTH)
    };
    assert_eq!(check("mixed", mixed, |_| {}, false), WIDTH + 2 * WIDTH + 2 * 6 * WIDTH + 6 + WIDTH);
}
