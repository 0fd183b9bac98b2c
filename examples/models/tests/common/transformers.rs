//! What transformers and PEFT say of the directory of a model (`torch/check_ours.py`).

use std::ffi::OsStr;
use std::path::Path;
use std::process::Command;

use bdia_core::Real;
use bdia_core::backend::Backend;
use bdia_core::layers::Gradients;
use bdia_core::plan::Choice;
use bdia_core::rng::{Draw, Stream};
use bdia_core::stack::Mode;
use bdia_cpu::Cpu;
use bdia_models::gpt2::config::Gpt2Config;
use bdia_models::gpt2::model::{Gpt2, Setup};
use bdia_models::inference::Inference;
use bdia_models::language::adapter::Adapter;
use bdia_models::language::files::load;

/// The logits of samples of `context` tokens, as a standard transformer computes them.
pub fn logits<B: Backend>(
    be: &mut B,
    model: &mut Gpt2,
    tokens: &[i32],
    context: usize,
) -> Vec<f64> {
    let mut all = Vec::new();
    for sample in tokens.chunks(context) {
        let logits = model.logits(be, sample, 0..sample.len(), Inference::STANDARD).unwrap();
        all.extend(logits.iter().map(|x| x.wide()));
    }
    all
}

/// Whether transformers, or PEFT where `dir` has adapters of the model in `base`, computes our
/// logits: `false` where no Python for it was named.
pub fn agrees(dir: &Path, base: Option<&Path>, context: usize) -> bool {
    let Some(python) = std::env::var_os("BDIA_PYTHON") else {
        println!(
            "skipped: BDIA_PYTHON names no Python with torch, transformers and PEFT \
             (tests/torch/README.md)"
        );
        return false;
    };
    let weights = base.unwrap_or(dir);
    let config = Gpt2Config::read_dir(weights).unwrap();
    let setup = Setup {
        dims: config.dims(),
        batch: 1,
        accumulate: 1,
        context,
        mode: Mode::Standard { grid: None },
        gradients: Gradients::None,
        blocks_per_step: 1,
        adapters: None,
        packed: false,
        smoothing: 0.0,
        threads: 1,
        library: Cpu::library_bytes(1),
    };
    let (mut model, layout) = Gpt2::layout::<Cpu>(&setup, Choice::new(1, 16)).unwrap();
    let mut be = Cpu::new(&layout, 1).unwrap();
    let digest = load(weights, &mut be, &model).unwrap();
    if base.is_some() {
        Adapter::open(dir, &model).unwrap().merge(&mut be, &model, &digest).unwrap();
    }
    let random = Stream::new(1, 0, 0, 0, 0, Draw::Data);
    let tokens: Vec<i32> =
        (0..2 * context as u32).map(|i| random.below(i, config.vocab_size as u32) as i32).collect();
    let ours = logits(&mut be, &mut model, &tokens, context);

    let tokens = tokens.iter().flat_map(|t| t.to_le_bytes()).collect::<Vec<_>>();
    let ours = ours.iter().flat_map(|&x| (x as f32).to_le_bytes()).collect::<Vec<_>>();
    let view =
        |dtype, shape, bytes| safetensors::tensor::TensorView::new(dtype, shape, bytes).unwrap();
    let probe = [
        ("tokens", view(safetensors::Dtype::I32, vec![2, context], &tokens)),
        ("logits", view(safetensors::Dtype::F32, vec![2, context, config.vocab_size], &ours)),
    ];
    let path = dir.join("probe.safetensors");
    std::fs::write(&path, safetensors::serialize(probe, None).unwrap()).unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/tests/torch/check_ours.py");
    let mut command = Command::new(python);
    command.arg("-B").arg(script).arg(dir);
    base.map(|base| command.args([OsStr::new("--base"), base.as_os_str()]));
    let output = command.output().unwrap();
    std::fs::remove_file(path).unwrap();
    let text =
        [output.stdout, output.stderr].map(|b| String::from_utf8_lossy(&b).into_owned()).concat();
    println!("{}: {text}", dir.display());
    assert!(output.status.success(), "{}: {text}", dir.display());
    true
}
