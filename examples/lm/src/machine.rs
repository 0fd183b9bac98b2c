//! From flags to a laid-out model and a backend.

use std::path::Path;

use bdia_core::backend::{Backend, Gelu};
use bdia_core::plan::{Choice, fit};
use bdia_core::{Error, Layout, Reference, Storage};
use bdia_cpu::Cpu;
use bdia_cuda::Cuda;
pub use bdia_train::machine::*;
use xxhash_rust::xxh3::Xxh3;

use crate::adapter::AdapterError;
use crate::cli::{BackendKind, Mode, ModeArgs};
use crate::config::{Activation, Bdia, Gpt2Config};
use crate::error::Failure;
use crate::model::{Dims, Gpt2, Setup};
use crate::weights::{self, Weights};

/// The architecture of a configuration.
pub fn dims(c: &Gpt2Config) -> Dims {
    Dims {
        vocab: c.vocab_size,
        positions: c.n_positions,
        width: c.n_embd,
        layers: c.n_layer,
        heads: c.n_head,
        inner: c.inner(),
        eps: c.layer_norm_epsilon,
        gelu: match c.activation_function {
            Activation::GeluNew => Gelu::Tanh,
            Activation::Gelu => Gelu::Exact,
        },
        tied: c.tie_word_embeddings,
        dropout: [c.embd_pdrop, c.attn_pdrop, c.resid_pdrop],
    }
}

/// What `config.json` says about the training.
pub fn record(args: &ModeArgs) -> Result<Bdia, Error> {
    Ok(Bdia {
        gamma: args.gamma,
        gamma_sign: args.gamma_sign,
        frac_bits: args.frac_bits,
        mode: args.mode,
        planes: if args.mode == Mode::Bdia { args.gamma()?.planes()? } else { 0 },
    })
}

/// The build and the processor that compute ([`bdia_train::machine::identity`]).
pub fn identity<B: Storage>(be: &B) -> String {
    bdia_train::machine::identity(be, concat!("bdia-gpt2 ", env!("CARGO_PKG_VERSION")))
}

/// Lays a model out within a budget.
///
/// # Errors
/// What does not fit together, or into the budget.
pub fn lay_out(
    setup: &Setup,
    kind: BackendKind,
    budget: Option<u64>,
    fixed: Option<Choice>,
) -> Result<(Choice, Gpt2, Layout), Error> {
    lay_out_for(1, setup, kind, budget, fixed)
}

/// The same with what `ranks` ranks need to add up gradients.
///
/// # Errors
/// As [`lay_out`].
pub fn lay_out_for(
    ranks: usize,
    setup: &Setup,
    kind: BackendKind,
    budget: Option<u64>,
    fixed: Option<Choice>,
) -> Result<(Choice, Gpt2, Layout), Error> {
    let budget = budget.map(|b| usize::try_from(b).unwrap_or(usize::MAX));
    let make = |choice| {
        let (model, mut layout) = match kind {
            BackendKind::Reference => Gpt2::layout::<Reference<'_, f32>>(setup, choice),
            BackendKind::Cpu => Gpt2::layout::<Cpu>(setup, choice),
            BackendKind::Cuda => Gpt2::layout::<Cuda>(setup, choice),
        }?;
        bdia_train::ranks::plan(&mut layout, &model.exchanged(), ranks);
        Ok((model, layout))
    };
    match fixed {
        // A choice that was made before, by a run within its budget.
        Some(choice) => fit(None, core::iter::once(choice), make),
        None => fit(budget, rows(kind).choices(setup.batch, setup.context), make),
    }
}

/// Reads a model's weights, whatever their names' prefix, type and number of files.
///
/// # Errors
/// Files that cannot be read, and every tensor that is missing, unexpected or of another shape.
pub fn load_weights<B: Backend<Real = f32>>(
    dir: &Path,
    config: &Gpt2Config,
    be: &mut B,
    model: &Gpt2,
) -> Result<(), Failure> {
    load_base(dir, config, be, model).map(drop)
}

/// The same, with a digest of what was read: the names and the values in f32, so that it does not
/// depend on files, their type or how the model stores them.
///
/// # Errors
/// As [`load_weights`], and a value that does not fit the 16 bits in which the model stores it.
pub fn load_base<B: Backend<Real = f32>>(
    dir: &Path,
    config: &Gpt2Config,
    be: &mut B,
    model: &Gpt2,
) -> Result<String, Failure> {
    let weights = Weights::read_dir(dir)?;
    weights.check(&config.tensors())?;
    let (mut hash, mut bytes) = (Xxh3::new(), Vec::new());
    for t in model.tensors() {
        hash.update(t.name.as_bytes());
        weights.stream::<Failure>(&t.name, |at, values| {
            bytes.clear();
            bytes.extend(values.iter().flat_map(|v| v.to_le_bytes()));
            hash.update(&bytes);
            if let Some(&value) = values.iter().find(|v| !t.holds(**v)) {
                return Err(AdapterError::Narrow { name: t.name.clone(), value }.into());
            }
            Ok(t.put(be, at, values)?)
        })?;
    }
    Ok(format!("xxh3:{:016x}", hash.digest()))
}

/// Writes `model.safetensors`.
///
/// # Errors
/// A file that cannot be written; an existing one is untouched then.
pub fn save_weights<B: Backend<Real = f32>>(
    dir: &Path,
    be: &B,
    model: &Gpt2,
) -> Result<(), Failure> {
    let named = model.tensors();
    let shapes: Vec<_> = named.iter().map(|t| (t.name.clone(), t.shape.clone())).collect();
    let mut piece = vec![0.0; 1 << 14];
    weights::write::<Failure>(&dir.join(weights::FILE), &shapes, |i, sink| {
        let values = named[i].values;
        for at in (0..values.len()).step_by(1 << 14) {
            let piece = &mut piece[..(1 << 14).min(values.len() - at)];
            be.read_reals(values.sub(at, piece.len()), piece)?;
            sink.put(piece)?;
        }
        Ok(())
    })
}
