//! An encoder and a decoder, assembled and differentiated: cross-attention, padding on both sides,
//! one table for source, target and logits, every training mode.
#![allow(clippy::unwrap_used)]

mod common;

use bdia_core::arena::{Ints, Layout, Reals};
use bdia_core::backend::{Chunk, Gelu, Mask};
use bdia_core::layers::{
    BlockShape, Cached, CachedContext, Decoder, EncoderOutput, Freeze, Gradients, LmHead, Norm,
    Parameter, Params, PreNorm, Room, Scheme, Tensor, TokenEmbedding,
};
use bdia_core::optim::Rule;
use bdia_core::stack::{Call, Config, Context, Input, Mode, Pass, Stack, Tail, Workspace};
use bdia_core::{
    Category, Error, Fault, FloatGamma, Gamma, Grid, NnOps, Policy, Real, Reference, Result, Sign,
    Site, Storage,
};
use common::noise;

const BATCH: usize = 3;
const SOURCE: usize = 4;
const TARGET: usize = 3;
const WIDTH: usize = 4;
const VOCAB: usize = 5;
const BLOCKS: usize = 3;
/// The last sample has no source at all: its decoder attends to nothing.
const SOURCE_LENS: [i32; BATCH] = [4, 2, 0];
const TARGET_LENS: [i32; BATCH] = [2, 3, 1];

fn grid() -> Grid {
    Grid::new(20).unwrap()
}

fn bdia() -> Mode {
    let gamma = Policy::fixed(Gamma::new(1, Sign::Random).unwrap());
    Mode::Bdia { grid: grid(), gamma, verify: true }
}

fn bdia_float() -> Mode {
    Mode::BdiaFloat { gamma: FloatGamma::new(0.5, Sign::Random).unwrap(), verify: true }
}

const STANDARD: Mode = Mode::Standard { grid: None };

struct Model {
    stacks: [Stack; 2],
    encoder: PreNorm,
    decoder: Decoder,
    inputs: [TokenEmbedding; 2],
    output: EncoderOutput,
    head: LmHead,
    ends: Params,
    outside: [Tensor; 7],
    lens: [Ints; 2],
    targets: usize,
    /// The token of padding.
    padding: i32,
}

impl Model {
    fn trained(&self) -> Vec<Parameter> {
        common::trained(&[
            (&self.encoder.params, &self.encoder),
            (&self.decoder.params, &self.decoder),
            (&self.ends, &self.outside),
        ])
    }
}

fn shape(tokens: usize, mask: Mask) -> BlockShape {
    BlockShape {
        tokens,
        width: WIDTH,
        heads: 2,
        inner: 5,
        eps: 1e-5,
        gelu: Gelu::Exact,
        mask,
        attention_dropout: 0.2,
        residual_dropout: 0.1,
        hidden_dropout: 0.3,
        qkv_bias: true,
        temperature: false,
        init: Scheme::Glorot,
    }
}

fn model<R: Real>(mode: Mode, chunk: usize) -> (Model, Layout) {
    let mut l = Layout::new(R::BYTES);
    // Plain descent without momentum: the gradients stay in full buffers.
    let (freeze, gradients) = (Freeze::Nothing, Gradients::Full(Rule::Sgd { momentum: 0.0 }));
    let own = shape(SOURCE, Mask::Full);
    let mut encoder = PreNorm::layout(&own, BLOCKS, None, freeze, gradients, &mut l).unwrap();
    let own = shape(TARGET, Mask::Causal);
    let mut decoder = Decoder::layout(&own, SOURCE, BLOCKS, gradients, &mut l).unwrap();
    // One table for source, target and logits.
    let [table, sources] = TokenEmbedding::tensors(VOCAB, SOURCE, WIDTH, 0.02);
    let [_, targets] = TokenEmbedding::tensors(VOCAB, TARGET, WIDTH, 0.02);
    let [norm, norm_bias] = EncoderOutput::tensors(WIDTH);
    let [last, last_bias, _] = LmHead::tensors(VOCAB, WIDTH, true);
    let mut outside = [table, sources, targets, norm, norm_bias, last, last_bias];
    let room = Room::NONE.place(&mut outside, freeze);
    let ends = Params::layout(1, room, freeze, gradients, &mut l).unwrap();
    let [table, sources, targets, norm, norm_bias, last, last_bias] =
        outside.map(|t| ends.parameter(0, &t));

    let config = |id, tokens, needs, tail, ends_scratch| Config {
        id,
        batch: BATCH,
        per_sample: tokens * WIDTH,
        blocks: BLOCKS,
        chunk,
        tail,
        needs,
        ends_scratch,
    };
    let configs = [
        config(0, SOURCE, encoder.needs::<Reference<'_, R>>(chunk, 1), Tail::Output, 0),
        config(
            1,
            TARGET,
            decoder.needs::<Reference<'_, R>>(chunk, 1),
            Tail::Head,
            LmHead::scratch(WIDTH, TARGET, chunk),
        ),
    ];
    let workspace = Workspace::layout(&configs.map(|c| (c, mode)), &mut l).unwrap();
    let stacks = configs.map(|c| Stack::layout_in(&c, &mode, &workspace, &mut l).unwrap());
    let lens = [0; 2].map(|_| l.ints(Category::Head, BATCH));
    (encoder.branches.0.key_lens, decoder.branches.0.key_lens) = (lens[0], lens[1]);
    decoder.branches.1.context_lens = lens[0];
    let embedding = |tokens: usize, wpe: Parameter, l: &mut Layout| TokenEmbedding {
        width: WIDTH,
        per_sample: tokens,
        tokens: l.ints(Category::Head, BATCH * tokens),
        packed: None,
        wte: table,
        wpe,
        scale: 1.0,
        dropout: 0.1,
    };
    let inputs = [embedding(SOURCE, sources, &mut l), embedding(TARGET, targets, &mut l)];
    let mut memory = |per: usize| l.reals(Category::Activations, BATCH * SOURCE * per);
    let context = Context { value: memory(WIDTH), grad: memory(WIDTH) };
    let output = EncoderOutput { eps: 1e-5, norm: [norm, norm_bias], context, stats: memory(2) };
    let unmasked: i32 = TARGET_LENS.iter().sum();
    let head = LmHead {
        width: WIDTH,
        per_sample: TARGET,
        vocab: VOCAB,
        norm: Norm::Layer { eps: 1e-5, weight: last, bias: last_bias },
        weight: table,
        packed: None,
        targets: l.ints(Category::Head, BATCH * TARGET),
        losses: l.reals(Category::Head, BATCH * TARGET),
        micro_batch: 0,
        logits: l.reals(Category::Head, 2 * VOCAB),
        scale: 1.0 / f64::from(unmasked),
        smoothing: 0.1,
    };
    (
        Model {
            stacks,
            encoder,
            decoder,
            inputs,
            output,
            head,
            ends,
            outside,
            lens,
            targets: unmasked as usize,
            padding: 0,
        },
        l,
    )
}

struct After<R> {
    loss: f64,
    reals: Vec<R>,
    mismatches: u64,
    rebuild_error: f64,
}

/// One pass.
fn run<R: Real>(m: &mut Model, l: &Layout, parameters: &[R]) -> Result<After<R>> {
    let (i, r, w) = l.arenas();
    let (mut i, mut r, mut w) = (vec![0; i], vec![R::nan(); r], vec![0xABAD_1DEA; w]);
    r[..parameters.len()].copy_from_slice(parameters);
    let (loss, mismatches, rebuild_error) = {
        let mut be = Reference::new(l, &mut i, &mut r, &mut w)?;
        for params in [&m.encoder.params, &m.decoder.params, &m.ends] {
            params.zero_gradients(&mut be)?;
        }
        be.write_ints(m.lens[0], &SOURCE_LENS)?;
        be.write_ints(m.lens[1], &TARGET_LENS)?;
        let tokens = |a: usize, per: usize, lens: [i32; BATCH], padding: i32| {
            let token = |i: usize| {
                if i % per < lens[i / per] as usize {
                    ((i * 7 + a) % VOCAB) as i32
                } else {
                    padding
                }
            };
            (0..BATCH * per).map(token).collect::<Vec<_>>()
        };
        be.write_ints(m.inputs[0].tokens, &tokens(1, SOURCE, SOURCE_LENS, m.padding))?;
        be.write_ints(m.inputs[1].tokens, &tokens(2, TARGET, TARGET_LENS, m.padding))?;
        be.write_ints(m.head.targets, &tokens(3, TARGET, TARGET_LENS, -1))?;
        let pass = Pass { seed: 3, step: 4, global: 0 };
        let ([encoder, decoder], [source, target]) = (&mut m.stacks, &mut m.inputs);
        encoder.embed(&mut be, source, &pass)?;
        encoder.forward(&mut be, &mut m.encoder, &pass)?;
        m.output.forward(&mut be, encoder)?;
        decoder.set_context(m.output.context);
        decoder.train(&mut be, &mut m.decoder, target, &mut m.head, &pass)?;
        m.output.vjp(&mut be, encoder)?;
        encoder.backward(&mut be, &mut m.encoder, &pass)?;
        encoder.embed_vjp(&mut be, source, &pass)?;
        if let Some(fault) = be.take_fault()? {
            return Err(fault.into());
        }
        let loss =
            be.reals(m.head.losses)?.iter().map(|x| x.wide()).sum::<f64>() / m.targets as f64;
        let mismatches = m.stacks[0].mismatches(&be)? + m.stacks[1].mismatches(&be)?;
        (loss, mismatches, m.stacks.iter().map(Stack::rebuild_error).fold(0.0, f64::max))
    };
    Ok(After { loss, reals: r, mismatches, rebuild_error })
}

#[test]
fn every_gradient_against_finite_differences() {
    for mode in [STANDARD, bdia_float()] {
        let (mut m, l) = model::<f64>(mode, 2);
        let trained = m.trained();
        let mut p = common::random_parameters::<f64>(&trained, l.arenas().1);
        let after = run(&mut m, &l, &p).unwrap();
        if mode == bdia_float() {
            let error = after.rebuild_error;
            assert!(error > 0.0 && error < 1e-13, "{error}");
        }
        let loss = |p: &[f64]| run(&mut m, &l, p).unwrap().loss;
        let seen = common::compare_gradients(&trained, &mut p, &after.reals, loss);
        // Nearly everything has a gradient; dropped values have none.
        assert!(seen > 1000, "{mode:?}: {seen}");
    }
}

/// Storing, recomputing and rebuilding are the same function: the same bits where the arithmetic is
/// the same.
#[test]
fn all_modes_agree() {
    let gradients = |m: &Model| m.trained().into_iter().map(|p| p.grad).collect::<Vec<_>>();
    for grid in [None, Some(grid())] {
        let mut first: Option<(u64, Vec<u32>)> = None;
        let every = [1, 2, 3, 9].map(|every| Mode::Checkpoint { every, grid });
        for mode in every.into_iter().chain([Mode::Standard { grid }]) {
            let (mut m, l) = model::<f32>(mode, 2);
            let p = common::random_parameters::<f32>(&m.trained(), l.arenas().1);
            let after = run(&mut m, &l, &p).unwrap();
            let bits: Vec<_> = gradients(&m)
                .iter()
                .flat_map(|g| after.reals[g.range()].iter().map(|x| x.to_bits()))
                .collect();
            let found = (after.loss.to_bits(), bits);
            assert!(*first.get_or_insert_with(|| found.clone()) == found, "{mode:?}");
        }
    }
    // On a fine grid, γ and all, BDIA is its float twin up to rounding to 2^-20.
    let mut both = Vec::new();
    for mode in [bdia(), bdia_float()] {
        for chunk in [1, 2, 3] {
            let (mut m, l) = model::<f64>(mode, chunk);
            let p = common::random_parameters::<f64>(&m.trained(), l.arenas().1);
            let after = run(&mut m, &l, &p).unwrap();
            assert_eq!(after.mismatches, 0);
            let all: Vec<_> =
                gradients(&m).iter().flat_map(|g| after.reals[g.range()].to_vec()).collect();
            both.push((after.loss, all));
        }
    }
    for other in &both[1..] {
        assert!((both[0].0 - other.0).abs() < 1e-4, "{} {}", both[0].0, other.0);
        assert!(
            both[0].1.iter().zip(&other.1).all(|(a, b)| (a - b).abs() < 1e-4 * (1.0 + a.abs()))
        );
    }
}

/// What is in the padding reaches neither the loss nor any gradient; a sample without a source has
/// a loss.
#[test]
fn padding_is_not_seen() {
    let (mut m, l) = model::<f64>(STANDARD, 3);
    let p = common::random_parameters::<f64>(&m.trained(), l.arenas().1);
    let before = run(&mut m, &l, &p).unwrap();
    assert!(before.loss.is_finite());
    m.padding = 4;
    let after = run(&mut m, &l, &p).unwrap();
    assert_eq!(before.loss.to_bits(), after.loss.to_bits());
    for Parameter { grad, .. } in m.trained() {
        assert!(before.reals[grad.range()] == after.reals[grad.range()]);
    }
}

/// Token by token with a cache, for two hypotheses a sentence: the activations of the whole
/// sequence at once.
#[test]
fn one_token_at_a_time_is_the_same_decoder() {
    const BEAMS: usize = 2;
    let (m, mut l) = model::<f64>(STANDARD, BATCH);
    let p = common::random_parameters::<f64>(&m.trained(), l.arenas().1);
    let (rows, d) = (BATCH * BEAMS, WIDTH);
    let blocks = m.decoder.with_tokens(1, SOURCE);
    let needs = blocks.needs::<Reference<'_, f64>>(rows, 1);
    let mut take = |n: usize| l.reals(Category::Workspace, n);
    let (cache, kv) = (take(BLOCKS * rows * TARGET * 2 * d), take(BLOCKS * BATCH * SOURCE * 2 * d));
    let (x, h, frame, scratch) =
        (take(rows * d), take(rows * d), take(rows * needs.frame), take(rows * needs.scratch));
    let lens = l.ints(Category::Workspace, rows);
    let (i, r, w) = l.arenas();
    let (mut i, mut r, mut w) = (vec![0; i], vec![f64::NAN; r], vec![0; w]);
    r[..p.len()].copy_from_slice(&p);
    let mut be = Reference::new(&l, &mut i, &mut r, &mut w).unwrap();
    be.write_ints(m.lens[0], &SOURCE_LENS).unwrap();
    be.write_ints(m.lens[1], &[TARGET as i32; BATCH]).unwrap();
    let memory: Vec<_> = (0..BATCH * SOURCE * d).map(|i| noise(8, i)).collect();
    let inputs: Vec<_> = (0..BATCH * TARGET * d).map(|i| noise(9, i)).collect();
    be.write_reals(m.output.context.value, &memory).unwrap();
    // All at once.
    struct Fixed(Vec<f64>);
    impl<B: Storage<Real = f64>> Input<B> for Fixed {
        fn forward(&mut self, be: &mut B, _: &Chunk, _: bool, x: Reals, _: Reals) -> Result<()> {
            be.write_reals(x, &self.0)
        }
        fn vjp(&mut self, _: &mut B, _: &Chunk, _: Reals, _: Reals) -> Result<()> {
            Ok(())
        }
    }
    let mut stack = m.stacks[1];
    stack.set_context(m.output.context);
    let (mut decoder, mut fixed) = (m.decoder, Fixed(inputs.clone()));
    let all = stack.infer(&mut be, &mut decoder, &mut fixed, BATCH, FloatGamma::ZERO).unwrap();
    let expected = be.reals(all).unwrap().to_vec();
    // One after the other.
    let place = |k: usize, all: Reals| all.sub(k * (all.len() / BLOCKS), all.len() / BLOCKS);
    let call = |k: usize| Call {
        chunk: Chunk {
            seed: 0,
            step: 0,
            stack: 1,
            site: Site::Block(k),
            first: 0,
            samples: rows,
            global: 0,
            frame: 0,
        },
        block: k,
        x,
        frame,
        scratch,
        context: None,
        train: false,
        keep: false,
    };
    for k in 0..BLOCKS {
        let memory = m.output.context.value;
        blocks.context_keys_values(&mut be, k, memory, place(k, kv)).unwrap();
    }
    for position in 0..TARGET {
        be.write_ints(lens, &[position as i32 + 1; BATCH * BEAMS]).unwrap();
        let tokens: Vec<_> = (0..rows * d)
            .map(|i| inputs[(i / d / BEAMS * TARGET + position) * d + i % d])
            .collect();
        be.write_reals(x, &tokens).unwrap();
        for k in 0..BLOCKS {
            let cached = Cached {
                of: place(k, cache),
                keys: TARGET,
                positions: &[position; BATCH * BEAMS],
                lens,
                places: Ints::EMPTY,
                starts: Ints::EMPTY,
                context: Some(CachedContext { keys_values: place(k, kv), beams: BEAMS }),
            };
            blocks.next(&mut be, &call(k), &cached, h).unwrap();
            be.add(x, h).unwrap();
        }
        for (i, found) in be.reals(x).unwrap().iter().enumerate() {
            let expected = expected[(i / d / BEAMS * TARGET + position) * d + i % d];
            assert!(
                (found - expected).abs() < 1e-12,
                "position {position}, value {i}: {found} {expected}"
            );
        }
    }
}

#[test]
fn a_decoder_without_a_context_and_bad_sizes_are_refused() {
    let (mut m, l) = model::<f32>(bdia(), 2);
    let p = common::random_parameters::<f32>(&m.trained(), l.arenas().1);
    let (mut i, mut r, mut w) = (vec![0; l.arenas().0], p, vec![0; l.arenas().2]);
    let mut be = Reference::new(&l, &mut i, &mut r, &mut w).unwrap();
    let pass = Pass { seed: 3, step: 4, global: 0 };
    m.stacks[1].embed(&mut be, &mut m.inputs[1], &pass).unwrap();
    let error = m.stacks[1].forward(&mut be, &mut m.decoder, &pass).unwrap_err();
    assert!(matches!(error, Error::Setting { what: "context", .. }), "{error}");
    let (shape, mut none) = (shape(TARGET, Mask::Causal), Layout::new(4));
    let error = Decoder::layout(&shape, 0, 2, Gradients::None, &mut none).unwrap_err();
    assert!(error.to_string().contains("positions of the context"), "{error}");
}

/// A token that has no room in the cache does not go to the next sample's.
#[test]
fn a_place_outside_the_cache_is_refused() {
    let (m, mut l) = model::<f32>(STANDARD, BATCH);
    let blocks = m.decoder.with_tokens(1, SOURCE);
    let needs = blocks.needs::<Reference<'_, f32>>(BATCH, 1);
    let mut take = |n: usize| l.reals(Category::Workspace, n);
    let [x, h] = [0; 2].map(|_| take(BATCH * WIDTH));
    let (frame, scratch) = (take(BATCH * needs.frame), take(BATCH * needs.scratch + needs.fixed));
    let cache = take(BATCH * TARGET * 2 * WIDTH);
    let lens = l.ints(Category::Workspace, BATCH);
    let (i, r, w) = l.arenas();
    let (mut i, mut r, mut w) = (vec![0; i], vec![0.5; r], vec![0; w]);
    let mut be = Reference::new(&l, &mut i, &mut r, &mut w).unwrap();
    let chunk = Chunk {
        seed: 0,
        step: 0,
        stack: 1,
        site: Site::Block(0),
        first: 0,
        samples: BATCH,
        global: 0,
        frame: 0,
    };
    let (train, keep, context) = (false, false, None);
    let call = Call { chunk, block: 0, x, frame, scratch, context, train, keep };
    for (positions, what) in [
        (&[0, TARGET, 1][..], "cache: position"),
        (&[0, usize::MAX, 1], "cache: position"),
        (&[0, 1], "cache: positions"),
    ] {
        let (places, starts) = (Ints::EMPTY, Ints::EMPTY);
        let (of, keys, context) = (cache, TARGET, None);
        let cached = Cached { of, keys, positions, lens, places, starts, context };
        let error = blocks.next(&mut be, &call, &cached, h).unwrap_err();
        assert!(error.to_string().starts_with(what), "{error}");
        // What the sample after it has is what it had.
        let next = cache.sub(2 * TARGET * 2 * WIDTH, TARGET * 2 * WIDTH);
        assert!(be.reals(next).unwrap().iter().all(|&x| x == 0.5));
    }
}

/// A flipped bit in the encoder's kept activations is found in its own backward pass, and updates
/// stop there.
#[test]
fn a_flipped_bit_in_the_encoder_is_found() {
    let (mut m, l) = model::<f32>(bdia(), 2);
    let p = common::random_parameters::<f32>(&m.trained(), l.arenas().1);
    let (mut i, mut r, mut w) = (vec![0; l.arenas().0], p, vec![0; l.arenas().2]);
    let mut be = Reference::new(&l, &mut i, &mut r, &mut w).unwrap();
    be.write_ints(m.lens[0], &SOURCE_LENS).unwrap();
    be.write_ints(m.lens[1], &TARGET_LENS).unwrap();
    let pass = Pass { seed: 3, step: 4, global: 0 };
    let ([encoder, decoder], [source, target]) = (&mut m.stacks, &mut m.inputs);
    encoder.embed(&mut be, source, &pass).unwrap();
    encoder.forward(&mut be, &mut m.encoder, &pass).unwrap();
    m.output.forward(&mut be, encoder).unwrap();
    decoder.set_context(m.output.context);
    decoder.train(&mut be, &mut m.decoder, target, &mut m.head, &pass).unwrap();
    m.output.vjp(&mut be, encoder).unwrap();
    assert_eq!(be.take_fault().unwrap(), None);
    let Stack::Reversible(kept) = encoder else { panic!("mode bdia is reversible") };
    let kept = kept.activation(BLOCKS - 1).sub(5, 1);
    let mut x = [0];
    be.read_ints(kept, &mut x).unwrap();
    be.write_ints(kept, &[x[0] ^ 1]).unwrap();
    encoder.backward(&mut be, &mut m.encoder, &pass).unwrap();
    let fault = be.take_fault().unwrap();
    assert!(matches!(fault, Some(Fault::Checksum { .. })), "{fault:?}");
}
