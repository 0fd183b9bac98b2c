//! Adapters as files in PEFT's layout: `adapter_model.safetensors` and `adapter_config.json`.
//!
//! PEFT has one adapter for all of `c_attn`. Ours of queries and values, of rank `r` and factor
//! `α/r` each, are such a one of rank `2r` and factor `2α/2r` whose `lora_B` is zero where it does
//! not belong to them ([`bdia_core::layers::LoraShape`]). `lora_A.weight` is `[R, d]`,
//! `lora_B.weight` `[3d, R]`.
//!
//! The file of the tensors notes a digest of the weights that the adapters were trained on, so that
//! those of another model are refused. Adapters by PEFT have no such note; their shapes are all
//! that can be checked.

use std::path::{Path, PathBuf};

use bdia_core::backend::Backend;
use serde_json::{Map, Value, json};

use super::config::Gpt2Config;
use super::model::Gpt2;
use crate::files::{FileError, read_limited, write_bytes};
use crate::named::with_products;
use crate::weights::{self, Weights, WeightsError, write_noted};

/// The tensors.
pub const FILE: &str = "adapter_model.safetensors";
/// What they are.
pub const CONFIG: &str = "adapter_config.json";

/// The largest configuration that is read.
const LIMIT: u64 = 1 << 20;
/// The note that has the digest of the base weights.
const BASE: &str = "base_digest";

/// Why adapters cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum AdapterError {
    /// A file could not be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// The tensors cannot be read, or are not those of the model.
    #[error("{}: {error}", path.display())]
    Tensors {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        error: WeightsError,
    },
    /// The configuration is not usable.
    #[error("{}: {field}: expected {expected}, found {found}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// The field.
        field: &'static str,
        /// What is possible.
        expected: &'static str,
        /// What came.
        found: String,
    },
    /// The adapters were trained on other weights.
    #[error(
        "{}: the adapters belong to another model: they were trained on weights with digest \
         {expected}, these have {found}",
        path.display()
    )]
    OtherModel {
        /// The adapters.
        path: PathBuf,
        /// The digest that they note.
        expected: String,
        /// That of the weights at hand.
        found: String,
    },
    /// Values cannot be read or written.
    #[error(transparent)]
    Values(#[from] WeightsError),
    /// The backend refused.
    #[error(transparent)]
    Core(#[from] bdia_core::Error),
}

fn name(k: usize, part: &str) -> String {
    format!("base_model.model.transformer.h.{k}.attn.c_attn.{part}.weight")
}

/// Adapters of `c_attn`, in their files.
#[derive(Debug)]
pub struct Adapter {
    dir: PathBuf,
    weights: Weights,
    rank: usize,
    scale: f64,
    /// The digest of the base weights, if it is noted.
    base: Option<String>,
}

impl Adapter {
    /// Reads a directory's configuration and header; the tensors must be those of a model.
    ///
    /// # Errors
    /// [`AdapterError`]
    pub fn open(dir: &Path, config: &Gpt2Config) -> Result<Self, AdapterError> {
        let (rank, scale) = read_config(&dir.join(CONFIG))?;
        let path = dir.join(FILE);
        let wrong = |error| AdapterError::Tensors { path: path.clone(), error };
        let weights = Weights::read_files(vec![path.clone()]).map_err(wrong)?;
        let d = config.n_embd;
        let expected: Vec<_> = (0..config.n_layer)
            .flat_map(|k| {
                [(name(k, "lora_A"), vec![rank, d]), (name(k, "lora_B"), vec![3 * d, rank])]
            })
            .collect();
        weights.check(&expected).map_err(wrong)?;
        let base = weights::notes(&path).map_err(wrong)?.remove(BASE);
        Ok(Self { dir: dir.into(), weights, rank, scale, base })
    }

    /// Adds the adapters to the weights that they were trained on: `W += s·(B·A)ᵀ`, summed in
    /// `f64`.
    ///
    /// # Errors
    /// [`AdapterError::OtherModel`] where `digest` is not that of these weights.
    pub fn merge<B: Backend<Real = f32>>(
        &self,
        be: &mut B,
        model: &Gpt2,
        digest: &str,
    ) -> Result<(), AdapterError> {
        match &self.base {
            Some(base) if base != digest => {
                let (path, expected, found) = (self.dir.clone(), base.clone(), digest.to_string());
                return Err(AdapterError::OtherModel { path, expected, found });
            }
            _ => {}
        }
        let (d, r) = (model.setup().dims.width, self.rank);
        let (mut a, mut b, mut row) = (vec![0.0; r * d], vec![0.0; 3 * d * r], vec![0.0; 3 * d]);
        let named = model.tensors();
        let all = named.iter().filter(|t| t.name.ends_with("attn.c_attn.weight"));
        for (k, t) in all.enumerate() {
            self.weights.read(&name(k, "lora_A"), &mut a)?;
            self.weights.read(&name(k, "lora_B"), &mut b)?;
            for i in 0..d {
                let place = t.values.sub(i * 3 * d, 3 * d);
                be.read_reals(place, &mut row)?;
                for (j, x) in row.iter_mut().enumerate() {
                    let factors = (0..r).map(|q| (a[q * d + i], b[j * r + q]));
                    *x = with_products(*x, self.scale, factors);
                }
                be.write_reals(place, &row)?;
            }
        }
        Ok(())
    }
}

/// Rank and factor.
fn read_config(path: &Path) -> Result<(usize, f64), AdapterError> {
    let wrong = |field, expected, found: String| AdapterError::Config {
        path: path.into(),
        field,
        expected,
        found: found.chars().take(60).collect(),
    };
    let map: Map<String, Value> = serde_json::from_slice(&read_limited(path, LIMIT)?)
        .map_err(|e| wrong("the file", "a JSON object by PEFT", e.to_string()))?;
    let of = |name: &str| map.get(name).filter(|v| !v.is_null());
    let shown = |v: Option<&Value>| v.map_or("nothing".into(), Value::to_string);
    let check = |field, expected, fits: &dyn Fn(Option<&Value>) -> bool| {
        if fits(of(field)) { Ok(()) } else { Err(wrong(field, expected, shown(of(field)))) }
    };
    // What would change the result and is not implemented must not be passed over.
    check("peft_type", "\"LORA\"", &|v| v.and_then(Value::as_str) == Some("LORA"))?;
    check("target_modules", "[\"c_attn\"], the only ones that are implemented", &|v| match v {
        Some(Value::Array(all)) => all.iter().all(|m| m == "c_attn") && !all.is_empty(),
        Some(Value::String(one)) => one == "c_attn",
        _ => false,
    })?;
    check("bias", "\"none\", the only value that is implemented", &|v| {
        v.is_none_or(|v| v == "none")
    })?;
    for field in ["use_rslora", "use_dora", "use_qalora", "use_bdlora", "lora_bias"] {
        check(field, "false, the only value that is implemented", &|v| {
            v.is_none_or(|v| v == &json!(false))
        })?;
    }
    let empty = |v: Option<&Value>| match v {
        None => true,
        Some(Value::Array(a)) => a.is_empty(),
        Some(Value::Object(o)) => o.is_empty(),
        Some(_) => false,
    };
    for field in [
        "modules_to_save",
        "layers_to_transform",
        "layer_replication",
        "rank_pattern",
        "alpha_pattern",
        "target_parameters",
        "alora_invocation_tokens",
    ] {
        check(field, "nothing, the only value that is implemented", &empty)?;
    }
    let rank = of("r").and_then(Value::as_u64).filter(|r| (1..=1 << 20).contains(r));
    let rank =
        rank.ok_or_else(|| wrong("r", "a whole number from 1 to 1048576", shown(of("r"))))?;
    let alpha = of("lora_alpha").and_then(Value::as_f64).filter(|a| a.is_finite());
    let alpha = alpha.ok_or_else(|| wrong("lora_alpha", "a number", shown(of("lora_alpha"))))?;
    Ok((rank as usize, alpha / rank as f64))
}

/// Writes a model's adapters: `base` is where its weights came from, `digest` that of their values.
///
/// # Errors
/// A file that cannot be written; an existing one is untouched then.
pub fn save<B: Backend<Real = f32>>(
    dir: &Path,
    be: &B,
    model: &Gpt2,
    base: &str,
    digest: &str,
) -> Result<(), AdapterError> {
    let Some(shape) = model.blocks.branches.0.lora() else { return Ok(()) };
    let (d, layers) = (model.setup().dims.width, model.setup().dims.layers);
    let (r, rows) = (shape.rank, 2 * shape.rank);
    let tensors: Vec<_> = (0..layers)
        .flat_map(|k| [(name(k, "lora_A"), vec![rows, d]), (name(k, "lora_B"), vec![3 * d, rows])])
        .collect();
    let named = model.trained();
    let mut own = vec![0.0; rows * d];
    write_noted::<AdapterError>(&dir.join(FILE), &tensors, &[(BASE, digest)], |i, sink| {
        be.read_reals(named[i].values, &mut own)?;
        if i % 2 == 0 {
            return Ok(sink.put(&own)?);
        }
        // Rows of B are ours of queries in its first d columns, of values in its last d; PEFT has
        // its transpose.
        let mut line = vec![0.0; rows];
        for j in 0..3 * d {
            line.fill(0.0);
            let from = match j / d {
                0 => 0..r,
                1 => 0..0,
                _ => r..rows,
            };
            for q in from {
                line[q] = own[q * d + j % d];
            }
            sink.put(&line)?;
        }
        Ok(())
    })?;
    let config = json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rows,
        "lora_alpha": whole_or_not(2.0 * shape.alpha),
        "lora_dropout": 0.0,
        "target_modules": ["c_attn"],
        "fan_in_fan_out": true,
        "bias": "none",
        "inference_mode": true,
    });
    Ok(write_bytes(&dir.join(CONFIG), format!("{config:#}\n").as_bytes())?)
}

/// A number of a JSON file, without a fraction where it has none.
fn whole_or_not(x: f64) -> Value {
    if x.fract() == 0.0 { json!(x as u64) } else { json!(x) }
}
