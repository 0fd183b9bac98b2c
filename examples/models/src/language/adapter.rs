//! Adapters as files in PEFT's layout: `adapter_model.safetensors` and `adapter_config.json`.
//!
//! A linear layer `M` of the model, under the name that Hugging Face has for it, is adapted by
//! `base_model.model.M.lora_A.weight`, `[rank, in]`, and `….lora_B.weight`, `[out, rank]`. Any of
//! the layers may be, of any rank: whatever PEFT computes from a configuration is computed, and
//! what is not implemented is refused by its name, as is a field that is not known.
//!
//! The file of the tensors notes a digest of the weights that the adapters were trained on, so that
//! those of another model are refused. Adapters by PEFT have no such note; their names and shapes
//! are all that can be checked.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use bdia_core::backend::Backend;
use bdia_core::layers::Tensor;
use regex::Regex;
use serde_json::{Map, Value, json};

use super::Family;
use super::model::LanguageModel;
use crate::files::{FileError, read_limited, write_bytes};
use crate::named::{Named, with_products};
use crate::weights::{self, Weights, WeightsError, write_noted};

/// The tensors.
pub const FILE: &str = "adapter_model.safetensors";
/// What they are.
pub const CONFIG: &str = "adapter_config.json";

/// The largest configuration that is read.
const LIMIT: u64 = 1 << 20;
/// The part of the file that has the matrix of a layer as it was.
const BASE_LAYER: &str = "base_layer";
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
        field: String,
        /// What is possible.
        expected: String,
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
    /// The adapters have another matrix of a layer beside them than the model has.
    #[error(
        "{}: the adapters belong to another model: their copy of the matrix of {layer} is not the \
         model's",
        path.display()
    )]
    OtherMatrix {
        /// The adapters.
        path: PathBuf,
        /// The layer.
        layer: String,
    },
    /// Values cannot be read or written.
    #[error(transparent)]
    Values(#[from] WeightsError),
    /// The backend refused.
    #[error(transparent)]
    Core(#[from] bdia_core::Error),
}

/// The name of a part of layer `module`'s adapter.
fn name(module: &str, part: &str) -> String {
    format!("base_model.model.{module}.{part}.weight")
}

/// A linear layer of a model.
struct Linear {
    /// Its name.
    module: String,
    /// Its matrix.
    matrix: Named,
    /// Whether the matrix is `[out, in]` here: that of the logits.
    rows_are_outputs: bool,
}

impl Linear {
    const fn sizes(&self) -> [usize; 2] {
        let (rows, cols) = (self.matrix.tensor.rows, self.matrix.tensor.cols);
        if self.rows_are_outputs { [cols, rows] } else { [rows, cols] }
    }
}

/// The linear layers of a model, in the order of its file.
fn linear_layers<F: Family>(model: &LanguageModel<F>) -> Vec<Linear> {
    let d = model.setup().dims;
    // What is outside the blocks: embedding, positions, norm, the matrix of the logits.
    let named = |t: &Tensor| (!t.is_empty()).then(|| d.name(None, t));
    let [embedding, positions, .., head] = d.ends().map(|t| named(&t));
    let is = |t: &Named, end: &Option<String>| end.as_ref() == Some(&t.name);
    (model.tensors().into_iter())
        .filter(|t| t.tensor.matrix && !is(t, &embedding) && !is(t, &positions))
        .map(|matrix| {
            let full = F::full_name(&matrix.name);
            let module = full.strip_suffix(".weight").unwrap_or(&full).to_string();
            Linear { module, rows_are_outputs: is(&matrix, &head), matrix }
        })
        .collect()
}

/// Adapters in their files.
#[derive(Debug)]
pub struct Adapter {
    dir: PathBuf,
    weights: Weights,
    /// Rank and factor of every layer that has one.
    layers: BTreeMap<String, (usize, f64)>,
    /// The digest of the base weights, if it is noted.
    base: Option<String>,
}

impl Adapter {
    /// Reads a directory's configuration and header; the tensors must be those that the
    /// configuration gives this model.
    ///
    /// # Errors
    /// [`AdapterError`]
    pub fn open<F: Family>(dir: &Path, model: &LanguageModel<F>) -> Result<Self, AdapterError> {
        let config = Reader::open(dir.join(CONFIG))?;
        let path = dir.join(FILE);
        let wrong = |error| AdapterError::Tensors { path: path.clone(), error };
        let weights = Weights::read_files(vec![path.clone()]).map_err(wrong)?;
        let linear = linear_layers(model);
        let (mut layers, mut expected) = (BTreeMap::new(), Vec::new());
        for layer in config.targets(&linear)? {
            let (rank, scale) = config.shape(&layer.module)?;
            let [inputs, outputs] = layer.sizes();
            expected.push((name(&layer.module, "lora_A"), vec![rank, inputs]));
            expected.push((name(&layer.module, "lora_B"), vec![outputs, rank]));
            // PEFT saves the matrix itself of the logits and of embeddings.
            let base = name(&layer.module, BASE_LAYER);
            if weights.get(&base).is_some() {
                expected.push((base, layer.matrix.shape.clone()));
            }
            layers.insert(layer.module.clone(), (rank, scale));
        }
        weights.check(&expected).map_err(wrong)?;
        let base = weights::notes(&path).map_err(wrong)?.remove(BASE);
        Ok(Self { dir: dir.into(), weights, layers, base })
    }

    /// Adds the adapters to the weights that they were trained on: `W += s·B·A`, summed in `f64`.
    ///
    /// # Errors
    /// [`AdapterError::OtherModel`] where `digest` is not that of these weights.
    pub fn merge<B: Backend<Real = f32>, F: Family>(
        &self,
        be: &mut B,
        model: &LanguageModel<F>,
        digest: &str,
    ) -> Result<(), AdapterError> {
        match &self.base {
            Some(base) if base != digest => {
                let (path, expected, found) = (self.dir.clone(), base.clone(), digest.to_string());
                return Err(AdapterError::OtherModel { path, expected, found });
            }
            _ => {}
        }
        for layer in linear_layers(model) {
            let Some(&(r, scale)) = self.layers.get(&layer.module) else { continue };
            let [inputs, outputs] = layer.sizes();
            let (mut a, mut b) = (vec![0.0; r * inputs], vec![0.0; outputs * r]);
            self.weights.read(&name(&layer.module, "lora_A"), &mut a)?;
            self.weights.read(&name(&layer.module, "lora_B"), &mut b)?;
            let (rows, cols) = (layer.matrix.tensor.rows, layer.matrix.tensor.cols);
            let mut row = vec![0.0; cols];
            let copy = name(&layer.module, BASE_LAYER);
            let mut theirs = vec![0.0; self.weights.get(&copy).map_or(0, weights::Tensor::len)];
            if !theirs.is_empty() {
                self.weights.read(&copy, &mut theirs)?;
            }
            for i in 0..rows {
                let place = layer.matrix.values.sub(i * cols, cols);
                be.read_reals(place, &mut row)?;
                if theirs.get(i * cols..(i + 1) * cols).is_some_and(|own| own != row) {
                    let (path, layer) = (self.dir.clone(), layer.module);
                    return Err(AdapterError::OtherMatrix { path, layer });
                }
                for (j, x) in row.iter_mut().enumerate() {
                    let (input, output) = if layer.rows_are_outputs { (j, i) } else { (i, j) };
                    let factors = (0..r).map(|q| (a[q * inputs + input], b[output * r + q]));
                    *x = with_products(*x, scale, factors);
                }
                be.write_reals(place, &row)?;
            }
        }
        Ok(())
    }
}

/// Fields that change nothing of what a merged model computes, whatever their value.
const WITHOUT_EFFECT: [&str; 12] = [
    "auto_mapping",
    "base_model_name_or_path",
    // Transposed matrices are known by the model.
    "fan_in_fan_out",
    "inference_mode",
    "lora_dropout",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "task_type",
    "loftq_config",
];

/// Fields that are read.
const KNOWN: [&str; 11] = [
    "alpha_pattern",
    "bias",
    "exclude_modules",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "r",
    "rank_pattern",
    "target_modules",
    "use_rslora",
];

/// Initial values of adapters that come with other base weights than the model's own.
const CHANGE_THE_BASE: [&str; 4] = ["pissa", "olora", "corda", "loftq"];

/// A configuration being read.
struct Reader {
    path: PathBuf,
    map: Map<String, Value>,
}

impl Reader {
    fn open(path: PathBuf) -> Result<Self, AdapterError> {
        let bytes = read_limited(&path, LIMIT)?;
        let mut reader = Self { path, map: Map::new() };
        reader.map = serde_json::from_slice(&bytes)
            .map_err(|e| reader.wrong("the file", "a JSON object by PEFT", &e.to_string()))?;
        reader.check()?;
        Ok(reader)
    }

    fn wrong(&self, field: &str, expected: impl Into<String>, found: &str) -> AdapterError {
        AdapterError::Config {
            path: self.path.clone(),
            field: field.into(),
            expected: expected.into(),
            found: found.chars().take(60).collect(),
        }
    }

    fn unfit(&self, field: &str, expected: impl Into<String>) -> AdapterError {
        let found = self.map.get(field).map_or("nothing".into(), Value::to_string);
        self.wrong(field, expected, &found)
    }

    fn of(&self, field: &str) -> Option<&Value> {
        self.map.get(field).filter(|v| !v.is_null())
    }

    /// What would change the result and is not implemented must not be passed over.
    fn check(&self) -> Result<(), AdapterError> {
        if self.of("peft_type").and_then(Value::as_str) != Some("LORA") {
            return Err(self.unfit("peft_type", "\"LORA\""));
        }
        if self.of("bias").is_some_and(|v| v != "none") {
            return Err(self.unfit("bias", "\"none\", the only value that is implemented"));
        }
        if let Some(Value::String(how)) = self.of("init_lora_weights")
            && CHANGE_THE_BASE.iter().any(|known| how.starts_with(known))
        {
            let expected = "adapters of the model's own weights; PEFT converts these: \
                            save_pretrained(…, path_initial_model_for_weight_conversion=…)";
            return Err(self.unfit("init_lora_weights", expected));
        }
        let nothing = |v: &Value| match v {
            Value::Null | Value::Bool(false) => true,
            Value::Array(a) => a.is_empty(),
            Value::Object(o) => o.is_empty(),
            _ => false,
        };
        for (field, value) in &self.map {
            let known = KNOWN.contains(&field.as_str()) || WITHOUT_EFFECT.contains(&field.as_str());
            if !known && !nothing(value) {
                return Err(self.unfit(field, "nothing: this field is not implemented"));
            }
        }
        Ok(())
    }

    fn pattern(&self, field: &str, pattern: &str) -> Result<Regex, AdapterError> {
        Regex::new(&format!("^(?:{pattern})$"))
            .map_err(|_| self.wrong(field, "a regular expression", pattern))
    }

    /// Whether a layer is meant by a list of names, or by a regular expression.
    fn named(&self, field: &str, layers: &[Linear]) -> Result<Option<Vec<bool>>, AdapterError> {
        let hit: Box<dyn Fn(&str) -> bool> = match self.of(field) {
            None => return Ok(None),
            Some(Value::String(all)) if all.eq_ignore_ascii_case("all-linear") => {
                // PEFT leaves the logits' matrix out.
                return Ok(Some(layers.iter().map(|l| !l.rows_are_outputs).collect()));
            }
            Some(Value::String(pattern)) => {
                let pattern = self.pattern(field, pattern)?;
                Box::new(move |module| pattern.is_match(module))
            }
            Some(Value::Array(names)) => {
                let names: Option<Vec<_>> = names.iter().map(Value::as_str).collect();
                let names = names.ok_or_else(|| self.unfit(field, "names of layers"))?;
                Box::new(move |module| {
                    names.iter().any(|name| {
                        module.strip_suffix(name).is_some_and(|m| m.is_empty() || m.ends_with('.'))
                    })
                })
            }
            Some(_) => return Err(self.unfit(field, "names of layers or a regular expression")),
        };
        Ok(Some(layers.iter().map(|l| hit(&l.module)).collect()))
    }

    /// The layers that have adapters.
    fn targets<'a>(&self, layers: &'a [Linear]) -> Result<Vec<&'a Linear>, AdapterError> {
        let field = "target_modules";
        let (Some(named), without) =
            (self.named(field, layers)?, self.named("exclude_modules", layers)?)
        else {
            return Err(self.unfit(field, "names of layers or a regular expression"));
        };
        let blocks = match self.of("layers_to_transform") {
            None => None,
            Some(Value::Array(all)) if all.is_empty() => None,
            Some(Value::Array(all)) => Some(all.iter().map(Value::as_u64).collect::<Option<_>>()),
            Some(one) => Some(one.as_u64().map(|one| vec![one])),
        };
        let blocks: Option<Vec<u64>> = match blocks {
            Some(None) => return Err(self.unfit("layers_to_transform", "numbers of blocks")),
            Some(some) => some,
            None => None,
        };
        let lists = match self.of("layers_pattern") {
            None => Vec::new(),
            Some(Value::String(one)) if one.is_empty() => Vec::new(),
            Some(Value::String(one)) => vec![one.as_str()],
            Some(Value::Array(all)) => all.iter().filter_map(Value::as_str).collect(),
            Some(_) => return Err(self.unfit("layers_pattern", "names of lists of blocks")),
        };
        // PEFT asks for the blocks only where layers are listed by name.
        let by_name = matches!(self.of(field), Some(Value::Array(_)));
        let in_blocks = |module: &str| {
            let Some(blocks) = blocks.as_ref().filter(|_| by_name) else { return true };
            let parts: Vec<_> = module.split('.').collect();
            parts.windows(3).any(|w| {
                let list = lists.is_empty() || lists.contains(&w[0]);
                list && w[1].parse().is_ok_and(|k: u64| blocks.contains(&k))
            })
        };
        let targets: Vec<_> = (layers.iter().zip(named).enumerate())
            .filter(|(i, (layer, named))| {
                *named && !without.as_ref().is_some_and(|w| w[*i]) && in_blocks(&layer.module)
            })
            .map(|(_, (layer, _))| layer)
            .collect();
        if targets.is_empty() {
            let mut known: Vec<_> =
                layers.iter().filter_map(|l| l.module.rsplit('.').next()).collect();
            known.sort_unstable();
            known.dedup();
            let expected = format!("linear layers of the model, which are {}", known.join(", "));
            return Err(self.unfit(field, expected));
        }
        Ok(targets)
    }

    /// The value for a layer of a table by names or regular expressions, in the table's order.
    fn in_table(&self, field: &str, module: &str) -> Result<Option<&Value>, AdapterError> {
        let table = match self.of(field) {
            None => return Ok(None),
            Some(Value::Object(table)) => table,
            Some(_) => return Err(self.unfit(field, "values by the names of layers")),
        };
        for (key, value) in table {
            let key = key.strip_prefix('^').map_or(format!(r"(?:.*\.)?(?:{key})"), str::to_string);
            if self.pattern(field, &key)?.is_match(module) {
                return Ok(Some(value));
            }
        }
        Ok(None)
    }

    /// Rank and factor of a layer's adapter.
    fn shape(&self, module: &str) -> Result<(usize, f64), AdapterError> {
        let rank = self.in_table("rank_pattern", module)?.or_else(|| self.of("r"));
        let rank = rank.and_then(Value::as_u64).filter(|r| (1..=1 << 20).contains(r));
        let rank = rank.ok_or_else(|| self.unfit("r", "a whole number from 1 to 1048576"))?;
        let alpha = self.in_table("alpha_pattern", module)?.or_else(|| self.of("lora_alpha"));
        let alpha = alpha.and_then(Value::as_f64).filter(|a| a.is_finite());
        let alpha = alpha.ok_or_else(|| self.unfit("lora_alpha", "a number"))?;
        let root = match self.of("use_rslora") {
            None | Some(Value::Bool(false)) => false,
            Some(Value::Bool(true)) => true,
            Some(_) => return Err(self.unfit("use_rslora", "true or false")),
        };
        let by = if root { (rank as f64).sqrt() } else { rank as f64 };
        Ok((rank as usize, alpha / by))
    }
}

/// Writes a model's adapters: `base` is where its weights came from, `digest` that of their values.
///
/// # Errors
/// A file that cannot be written; an existing one is untouched then.
pub fn save<B: Backend<Real = f32>, F: Family>(
    dir: &Path,
    be: &B,
    model: &LanguageModel<F>,
    base: &str,
    digest: &str,
) -> Result<(), AdapterError> {
    let Some(shape) = model.setup().adapters.map(|a| a.shape) else { return Ok(()) };
    let theirs = F::peft_shape(&shape);
    // A and B of a layer follow each other.
    let named = model.trained();
    let mut tensors = Vec::with_capacity(named.len());
    let outputs: BTreeMap<_, _> = linear_layers(model)
        .into_iter()
        .map(|layer| (layer.module.clone(), layer.sizes()[1]))
        .collect();
    for t in &named {
        let full = F::full_name(&t.name);
        let (module, part) = full.rsplit_once('.').unwrap_or((&full, ""));
        let outputs = outputs.get(module).copied().unwrap_or(0);
        let size = if t.is_adapter_input() {
            vec![theirs.rank, t.tensor.cols]
        } else {
            vec![outputs, theirs.rank]
        };
        tensors.push((name(module, part), size));
    }
    write_noted::<AdapterError>(&dir.join(FILE), &tensors, &[(BASE, digest)], |i, sink| {
        let mut own = vec![0.0; named[i].len()];
        be.read_reals(named[i].values, &mut own)?;
        if !named[i].is_adapter_input() {
            own = F::peft_up(&shape, tensors[i].1[0], &own);
        }
        Ok(sink.put(&own)?)
    })?;
    let config = json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": theirs.rank,
        "lora_alpha": whole_or_not(theirs.alpha),
        "lora_dropout": 0.0,
        "target_modules": F::TARGETS,
        "fan_in_fan_out": !F::TRANSPOSED,
        "bias": "none",
        "inference_mode": true,
    });
    Ok(write_bytes(&dir.join(CONFIG), format!("{config:#}\n").as_bytes())?)
}

/// A number of a JSON file, without a fraction where it has none.
fn whole_or_not(x: f64) -> Value {
    if x.fract() == 0.0 { json!(x as u64) } else { json!(x) }
}
