//! An encoder and a decoder, assembled and differentiated: cross-attention, padding on both sides,
//! one table for source, target and logits, every training mode.
#![allow(clippy::unwrap_used)]

use bdia_core::arena::{Ints, Layout, Reals};
use bdia_core::backend::{Gelu, Mask};
use bdia_core::layers::{
    BlockShape, Cached, DecoderBlocks, EncoderOutput, LmHead, Params, Tensor, TokenEmbedding, place,
};
use bdia_core::layers::{TransformerBlocks, Updater};
use bdia_core::optim::Rule;
use bdia_core::rng::philox;
use bdia_core::stack::{Call, Config, Context, Mode, Pass, Stack, Tail, Workspace};
use bdia_core::{Category, Error, Fault, Gamma, Grid, Real, Reference, Result, Sign, Storage};

const BATCH: usize = 3;
const SOURCE: usize = 4;
const TARGET: usize = 3;
const WIDTH: usize = 4;
const VOCAB: usize = 5;
const BLOCKS: usize = 3;
/// The last sample has no source at all: its decoder attends to nothing.
const SOURCE_LENS: [i32; BATCH] = [4, 2, 0];
const TARGET_LENS: [i32; BATCH] = [2, 3, 1];

/// A number in -1 … 1.
fn noise(a: u32, i: usize) -> f64 {
    f64::from(philox(5, [a, i as u32, 0, 0])[0] as i32) / f64::from(1_u32 << 31)
}

struct Model {
    stacks: [Stack; 2],
    encoder: TransformerBlocks,
    decoder: DecoderBlocks,
    inputs: [TokenEmbedding; 2],
    output: EncoderOutput,
    head: LmHead,
    ends: Params,
    lens: [Ints; 2],
    targets: usize,
    /// The token of padding.
    padding: i32,
}

fn model<R: Real>(mode: Mode, quantize: bool, chunk: usize) -> (Model, Layout) {
    let mut l = Layout::new(R::BYTES);
    let shape = |tokens, mask| BlockShape {
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
    };
    // Plain descent without momentum: the gradients stay in full buffers.
    let rule = Some(Rule::Sgd { momentum: 0.0 });
    let mut encoder =
        TransformerBlocks::layout(shape(SOURCE, Mask::Full), BLOCKS, rule, false, &mut l).unwrap();
    let mut decoder =
        DecoderBlocks::layout(shape(TARGET, Mask::Causal), SOURCE, BLOCKS, rule, false, &mut l)
            .unwrap();
    let t = |name, rows, cols| Tensor { name, rows, cols, matrix: rows > 1, offset: 0 };
    let mut tensors = [
        t("table", VOCAB, WIDTH),
        t("source positions", SOURCE, WIDTH),
        t("target positions", TARGET, WIDTH),
        t("encoder norm", 1, WIDTH),
        t("encoder norm bias", 1, WIDTH),
        t("decoder norm", 1, WIDTH),
        t("decoder norm bias", 1, WIDTH),
    ];
    let len = place(&mut tensors);
    let ends = Params::layout(&mut l, 1, len, tensors.len(), rule, true).unwrap();
    let (p, g) = (ends.group(0), ends.gradient(0));
    let [table, sources, targets, norm, norm_bias, last, last_bias] = tensors;

    let config = |id, tokens, needs, tail, ends_scratch| Config {
        id,
        batch: BATCH,
        per_sample: tokens * WIDTH,
        blocks: BLOCKS,
        chunk,
        mode,
        grid: (mode == Mode::Bdia || quantize).then(|| Grid::new(20).unwrap()),
        gamma: Gamma::new(0.5, Sign::Random).unwrap(),
        verify: true,
        tail,
        needs,
        ends_scratch,
    };
    let configs = [
        config(0, SOURCE, encoder.shape().needs::<Reference<'_, R>>(chunk, 1), Tail::Output, 0),
        config(
            1,
            TARGET,
            decoder.needs::<Reference<'_, R>>(chunk, 1),
            Tail::Head,
            LmHead::scratch(WIDTH, TARGET, chunk),
        ),
    ];
    let workspace = Workspace::layout(&configs, &mut l).unwrap();
    let stacks = configs.map(|c| Stack::layout_in(c, &workspace, &mut l).unwrap());
    let lens = [0; 2].map(|_| l.ints(Category::Head, BATCH));
    (encoder.key_lens, decoder.own.key_lens, decoder.context_lens) = (lens[0], lens[1], lens[0]);
    let embedding = |tokens: usize, positions: Tensor, l: &mut Layout| TokenEmbedding {
        width: WIDTH,
        per_sample: tokens,
        tokens: l.ints(Category::Head, BATCH * tokens),
        wte: table.of(p),
        wpe: positions.of(p),
        dwte: table.of(g),
        dwpe: positions.of(g),
        dropout: 0.1,
    };
    let inputs = [embedding(SOURCE, sources, &mut l), embedding(TARGET, targets, &mut l)];
    let mut memory = |per: usize| l.reals(Category::Activations, BATCH * SOURCE * per);
    let context = Context { value: memory(WIDTH), grad: memory(WIDTH) };
    let output = EncoderOutput {
        eps: 1e-5,
        norm: [norm.of(p), norm_bias.of(p)],
        grads: [norm.of(g), norm_bias.of(g)],
        context,
        stats: memory(2),
    };
    let unmasked: i32 = TARGET_LENS.iter().sum();
    let head = LmHead {
        width: WIDTH,
        per_sample: TARGET,
        vocab: VOCAB,
        eps: 1e-5,
        norm: last.of(p),
        norm_bias: last_bias.of(p),
        weight: table.of(p),
        grads: [last.of(g), last_bias.of(g), table.of(g)],
        targets: l.ints(Category::Head, BATCH * TARGET),
        losses: l.reals(Category::Head, BATCH * TARGET),
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
        for params in [&m.encoder.params, &m.decoder.own.params, &m.decoder.cross, &m.ends] {
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
        decoder.context = Some(m.output.context);
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

/// Groups of parameters and their gradients.
fn groups(m: &Model) -> [(Reals, Reals); 4] {
    [&m.encoder.params, &m.decoder.own.params, &m.decoder.cross, &m.ends]
        .map(|p| (p.values, p.gradients))
}

fn parameters<R: Real>(m: &Model, len: usize) -> Vec<R> {
    let mut p = vec![R::zero(); len];
    for (h, _) in groups(m) {
        for i in h.range() {
            p[i] = R::of(0.6 * noise(1, i));
        }
    }
    p
}

#[test]
fn every_gradient_against_finite_differences() {
    for mode in [Mode::Standard, Mode::BdiaFloat] {
        let (mut m, l) = model::<f64>(mode, false, 2);
        let mut p = parameters::<f64>(&m, l.arenas().1);
        let after = run(&mut m, &l, &p).unwrap();
        if mode == Mode::BdiaFloat {
            assert!(
                after.rebuild_error > 0.0 && after.rebuild_error < 1e-13,
                "{}",
                after.rebuild_error
            );
        }
        let (e, mut seen) = (1e-5, 0);
        for (values, gradients) in groups(&m) {
            for (at, g) in values.range().zip(gradients.range()) {
                let x = p[at];
                p[at] = x + e;
                let plus = run(&mut m, &l, &p).unwrap().loss;
                p[at] = x - e;
                let minus = run(&mut m, &l, &p).unwrap().loss;
                p[at] = x;
                let (slope, g) = ((plus - minus) / (2.0 * e), after.reals[g]);
                seen += usize::from(slope != 0.0);
                // Central differences are off by e² times the third derivative, and by rounding,
                // about 1e-16 / e.
                assert!(
                    (slope - g).abs() < 1e-8 * (1.0 + slope.abs()),
                    "{mode:?} at {at}: {slope} {g}"
                );
            }
        }
        // Nearly everything has a gradient; alignment and dropped values have none.
        assert!(seen > 1000, "{seen}");
    }
}

/// Storing, recomputing and rebuilding are the same function: the same bits where the arithmetic is
/// the same.
#[test]
fn all_modes_agree() {
    for quantize in [false, true] {
        let mut first: Option<(u64, Vec<u32>)> = None;
        let every = [1, 2, 3, 9].map(|every| Mode::Checkpoint { every });
        for mode in every.into_iter().chain([Mode::Standard]) {
            let (mut m, l) = model::<f32>(mode, quantize, 2);
            let p = parameters::<f32>(&m, l.arenas().1);
            let after = run(&mut m, &l, &p).unwrap();
            let bits: Vec<_> = groups(&m)
                .iter()
                .flat_map(|(_, g)| after.reals[g.range()].iter().map(|x| x.to_bits()))
                .collect();
            let found = (after.loss.to_bits(), bits);
            assert!(
                *first.get_or_insert_with(|| found.clone()) == found,
                "{mode:?}, quantized: {quantize}"
            );
        }
    }
    // On a fine grid, γ and all, BDIA is its float twin up to rounding to 2^-20.
    let mut both = Vec::new();
    for mode in [Mode::Bdia, Mode::BdiaFloat] {
        for chunk in [1, 2, 3] {
            let (mut m, l) = model::<f64>(mode, false, chunk);
            let p = parameters::<f64>(&m, l.arenas().1);
            let after = run(&mut m, &l, &p).unwrap();
            assert_eq!(after.mismatches, 0);
            let all = groups(&m)
                .iter()
                .flat_map(|(_, g)| after.reals[g.range()].to_vec())
                .collect::<Vec<_>>();
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
    let (mut m, l) = model::<f64>(Mode::Standard, false, 3);
    let p = parameters::<f64>(&m, l.arenas().1);
    let before = run(&mut m, &l, &p).unwrap();
    assert!(before.loss.is_finite());
    m.padding = 4;
    let after = run(&mut m, &l, &p).unwrap();
    assert_eq!(before.loss.to_bits(), after.loss.to_bits());
    for (_, g) in groups(&m) {
        assert!(before.reals[g.range()] == after.reals[g.range()]);
    }
}

/// Token by token with a cache, for two hypotheses a sentence: the activations of the whole
/// sequence at once.
#[test]
fn one_token_at_a_time_is_the_same_decoder() {
    const BEAMS: usize = 2;
    let (m, mut l) = model::<f64>(Mode::Standard, false, BATCH);
    let p = parameters::<f64>(&m, l.arenas().1);
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
    impl<B: Storage<Real = f64>> bdia_core::stack::Input<B> for Fixed {
        fn forward(
            &mut self,
            be: &mut B,
            _: &bdia_core::Chunk,
            _: bool,
            x: Reals,
            _: Reals,
        ) -> Result<()> {
            be.write_reals(x, &self.0)
        }
        fn vjp(&mut self, _: &mut B, _: &bdia_core::Chunk, _: Reals, _: Reals) -> Result<()> {
            Ok(())
        }
    }
    let mut stack = m.stacks[1];
    stack.context = Some(m.output.context);
    let zero = Gamma::new(0.0, Sign::Plus).unwrap();
    let mut decoder = m.decoder;
    let all = stack.infer(&mut be, &mut decoder, &mut Fixed(inputs.clone()), BATCH, zero).unwrap();
    let expected = be.reals(all).unwrap().to_vec();
    // One after the other.
    let place = |k: usize, all: Reals| all.sub(k * (all.len() / BLOCKS), all.len() / BLOCKS);
    for k in 0..BLOCKS {
        blocks.keys_values(&mut be, k, m.output.context.value, place(k, kv)).unwrap();
    }
    for position in 0..TARGET {
        be.write_ints(lens, &[position as i32 + 1; BATCH * BEAMS]).unwrap();
        let tokens: Vec<_> = (0..rows * d)
            .map(|i| inputs[(i / d / BEAMS * TARGET + position) * d + i % d])
            .collect();
        be.write_reals(x, &tokens).unwrap();
        for k in 0..BLOCKS {
            let site = bdia_core::Site::Block(k);
            let chunk = bdia_core::Chunk {
                seed: 0,
                step: 0,
                stack: 1,
                site,
                first: 0,
                samples: rows,
                global: 0,
                frame: 0,
            };
            let call = Call {
                chunk,
                block: k,
                x,
                frame,
                scratch,
                context: None,
                train: false,
                keep: false,
            };
            let cached = Cached {
                of: place(k, cache),
                keys: TARGET,
                positions: &[position; BATCH * BEAMS],
                lens,
            };
            blocks.next(&mut be, &call, &cached, (place(k, kv), BEAMS), h).unwrap();
            bdia_core::NnOps::add(&mut be, x, h).unwrap();
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
    let (mut m, l) = model::<f32>(Mode::Bdia, false, 2);
    let p = parameters::<f32>(&m, l.arenas().1);
    let (mut i, mut r, mut w) = (vec![0; l.arenas().0], p, vec![0; l.arenas().2]);
    let mut be = Reference::new(&l, &mut i, &mut r, &mut w).unwrap();
    let pass = Pass { seed: 3, step: 4, global: 0 };
    m.stacks[1].embed(&mut be, &mut m.inputs[1], &pass).unwrap();
    let error = m.stacks[1].forward(&mut be, &mut m.decoder, &pass).unwrap_err();
    assert!(matches!(error, Error::Setting { what: "context", .. }), "{error}");
    let shape = *m.decoder.own.shape();
    let error = DecoderBlocks::layout(shape, 0, 2, None, true, &mut Layout::new(4)).unwrap_err();
    assert!(error.to_string().contains("positions of the context"), "{error}");
}

/// A flipped bit in the encoder's kept activations is found in its own backward pass, and updates
/// stop there.
#[test]
fn a_flipped_bit_in_the_encoder_is_found() {
    let (mut m, l) = model::<f32>(Mode::Bdia, false, 2);
    let p = parameters::<f32>(&m, l.arenas().1);
    let (mut i, mut r, mut w) = (vec![0; l.arenas().0], p, vec![0; l.arenas().2]);
    let mut be = Reference::new(&l, &mut i, &mut r, &mut w).unwrap();
    be.write_ints(m.lens[0], &SOURCE_LENS).unwrap();
    be.write_ints(m.lens[1], &TARGET_LENS).unwrap();
    let updater = Updater {
        rule: Rule::Sgd { momentum: 0.0 },
        weight_decay: 0.0,
        lr: 0.0,
        t: 1,
        scale: 1.0,
        fused: false,
    };
    (m.encoder.updater, m.decoder.own.updater) = (updater, updater);
    let pass = Pass { seed: 3, step: 4, global: 0 };
    let ([encoder, decoder], [source, target]) = (&mut m.stacks, &mut m.inputs);
    encoder.embed(&mut be, source, &pass).unwrap();
    encoder.forward(&mut be, &mut m.encoder, &pass).unwrap();
    m.output.forward(&mut be, encoder).unwrap();
    decoder.context = Some(m.output.context);
    decoder.train(&mut be, &mut m.decoder, target, &mut m.head, &pass).unwrap();
    m.output.vjp(&mut be, encoder).unwrap();
    assert_eq!(be.take_fault().unwrap(), None);
    let kept = encoder.activation(BLOCKS - 1).sub(5, 1);
    let mut x = [0];
    be.read_ints(kept, &mut x).unwrap();
    be.write_ints(kept, &[x[0] ^ 1]).unwrap();
    encoder.backward(&mut be, &mut m.encoder, &pass).unwrap();
    let fault = be.take_fault().unwrap();
    assert!(matches!(fault, Some(Fault::Checksum { .. })), "{fault:?}");
}
