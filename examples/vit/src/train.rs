//! `train`, `eval` and `plan`: from flags to a run directory.
//!
//! ```text
//! config.json, model.safetensors       the model after the last epoch, under timm's names
//! best.safetensors                     the weights of the best epoch
//! run.json                             the flags of the run
//! metrics.jsonl, loss.svg, accuracy.svg one object per step; the curves
//! step-*.ckpt                          the last two checkpoints
//! ```

use std::path::Path;

use bdia_core::backend::Backend;
use bdia_core::layers::Gradients;
use bdia_core::network::{Outcome, Step};
use bdia_core::plan::Choice;
use bdia_core::rng::{Draw, Stream};
use bdia_core::stack::Mode as StackMode;
use bdia_core::update::{FloatGamma, Gamma, Policy, Sign};
use bdia_core::{Grid, Layout};
use bdia_models::inference::Inference;
use bdia_models::named::{Named, Saved};
use bdia_models::plan::Plan;
use bdia_models::vit::config::VitConfig;
use bdia_models::vit::files::{load_weights, save_weights};
use bdia_models::vit::model::{Setup, Vit};
use bdia_models::weights;
use bdia_train::calibrate::{self, Batch, Pretrained};
use bdia_train::cli::{self, BackendKind, Flags as _, GammaArg, MachineArgs, MethodArgs, Mode};
use bdia_train::machine::{self, Work};
use bdia_train::trainer::{
    self, Picture, Planned, Settings, Summary, Task, Validation, Verify, When,
};
use bdia_train::{Failure, ranks, report, run};

use crate::augment::{Augment, apply};
use crate::cli::{AugmentKind, EvalArgs, Network, Size, TrainArgs};
use crate::data::{DataError, Dataset, Images};

/// The images that the flags name, as `open` reads a directory. Where a model is there already, in
/// the directory `trained`, they have its classes.
fn images(
    args: &TrainArgs,
    trained: Option<&Path>,
    open: fn(&Path, usize) -> Result<Dataset, DataError>,
) -> Result<Dataset, Failure> {
    let mut data = match &args.data {
        Some(dir) => open(dir, args.image_size as usize)?,
        None => Dataset::digits()?,
    };
    // Weights from elsewhere may come without a configuration of ours.
    if let Some(dir) = trained.filter(|dir| VitConfig::is_in(dir)) {
        data = data.with_classes(dir, &VitConfig::read_dir(dir)?.classes)?;
    }
    for note in &data.notes {
        report::note!("{note}");
    }
    if let Some(n) = args.train_subset {
        data.train = data.train.subset(n as usize);
    }
    if let Some(n) = args.test_subset {
        for held in data.validation.iter_mut().chain([&mut data.test]) {
            *held = held.subset(n as usize);
        }
    }
    Ok(data)
}

/// The images that the flags name, the model for them, and how training changes them. Where a
/// model is there already, in the directory `trained`, the images have its classes.
///
/// # Errors
/// Files that cannot be used, classes that the model does not have, dimensions that do not fit
/// together.
pub fn prepare(
    args: &TrainArgs,
    trained: Option<&Path>,
) -> Result<(Dataset, VitConfig, Augment), Failure> {
    let data = images(args, trained, Dataset::open)?;
    let [channels, rows, _] = data.train.shape;
    let little = rows < 16;
    let size = args.config.unwrap_or(if little { Size::Mini } else { Size::Small });
    let [layers, heads, width, mlp] = match size {
        Size::Mini => [6, 4, 64, 128],
        Size::Small => [6, 8, 512, 512],
    };
    let or = |asked: Option<u64>, default: usize| asked.map_or(default, |n| n as usize);
    let (mean, std) = data.train.statistics();
    let config = VitConfig {
        image: data.train.shape,
        patch: or(args.patch, if little { 2 } else { 4 }),
        shifted: !args.plain,
        locality: !args.plain,
        two_streams: args.network == Network::Revvit,
        width: or(args.width, width),
        layers: or(args.layers, layers),
        heads: or(args.heads, heads),
        mlp: or(args.mlp, mlp),
        dropout: args.dropout,
        classes: data.classes.clone(),
        mean,
        std,
        bdia: args.run.mode.training()?,
    };
    let kind = args.augment.unwrap_or(match channels {
        // Eight pixels across: a crop loses more than it teaches.
        _ if little => AugmentKind::None,
        3 => AugmentKind::CropFlip,
        _ => AugmentKind::Crop,
    });
    let padding = args.padding.map_or(if little { 1 } else { 4 }, |p| p as u32);
    let augment = Augment {
        padding: if kind == AugmentKind::None { 0 } else { padding },
        flip: kind == AugmentKind::CropFlip,
        mixup: args.mixup,
    };
    Ok((data, config, augment))
}

/// How the flags train a model.
fn setup(args: &TrainArgs, config: &VitConfig, ranks: usize) -> Result<Setup, Failure> {
    let threads = machine::threads(&args.run.machine);
    // Two streams keep activations in their own way, which is nobody else's in the table.
    let mode = if config.two_streams {
        StackMode::BdiaFloat { gamma: FloatGamma::ZERO, verify: args.run.verify }
    } else {
        machine::mode(&args.run.mode, config.layers, args.run.verify)?
    };
    Ok(Setup {
        dims: config.dims(),
        batch: ranks::part(args.batch as usize, ranks)?,
        accumulate: args.run.accumulate as usize,
        chunk: 1,
        mode,
        gradients: machine::gradients(&args.run.optim, args.run.accumulate),
        blocks_per_step: args.run.mode.blocks_per_step as usize,
        adapters: args.method.adapters()?,
        drop_path: args.drop_path,
        smoothing: args.smoothing,
        mixup: args.mixup > 0.0,
        threads,
        library: machine::library(&args.run.machine, threads),
    })
}

/// The plans of the modes that are not used, for the table: with this run's chunks.
fn other_plans(
    setup: &Setup,
    kind: BackendKind,
    choice: Choice,
) -> Result<Vec<(String, Layout)>, Failure> {
    let mut others: Vec<_> = (machine::other_modes(&setup.mode, setup.dims.layers)?.into_iter())
        .map(|(name, mode)| (name, mode, false))
        .collect();
    if !setup.dims.two_streams {
        others.push(("revvit".into(), StackMode::Standard { grid: None }, true));
    }
    let plan = |(name, mode, two_streams)| {
        let mut other = Setup { mode, drop_path: 0.0, blocks_per_step: 1, ..*setup };
        other.dims.two_streams = two_streams;
        Ok((name, machine::lay_out::<Vit>(&other, kind, 1, None, Some(choice))?.2))
    };
    others.into_iter().map(plan).collect()
}

fn mode_name(args: &TrainArgs) -> String {
    match args.network {
        Network::Vit => trainer::mode_name(args.run.mode.mode),
        Network::Revvit => "revvit".into(),
    }
}

/// Images of an optimizer step.
const fn step_images(args: &TrainArgs) -> usize {
    (args.batch * args.run.accumulate) as usize
}

/// What is learned: the images, and the network.
struct Training {
    args: TrainArgs,
    config: VitConfig,
    data: Dataset,
    augment: Augment,
    model: Vit,
    per_epoch: u32,
    /// The order of the epoch's images.
    order: Vec<u32>,
    /// An image as it is, and two that are mixed.
    pixels: [Vec<f64>; 3],
    /// Of the last validation.
    confusion: Vec<Vec<u32>>,
}

/// Trains.
///
/// # Errors
/// [`Failure`]; what was saved before stays good.
pub fn train(args: &TrainArgs) -> Result<Summary, Failure> {
    let (mut args, from) = run::begin(args)?;
    args.method.check_start(args.weights.as_deref(), &args.clone().run())?;
    let mut joined = ranks::join(&args.run.machine)?;
    if from.is_none() {
        measure_gamma(&mut args, joined.as_mut())?;
    }
    let (rank, count) = ranks::place(joined.as_ref());
    let trained = if from.is_some() { Some(&args.run.out) } else { args.weights.as_ref() };
    let (data, config, augment) = prepare(&args, trained.map(|dir| dir.as_path()))?;
    let setup = setup(&args, &config, count)?;
    let per_epoch = steps_per_epoch(&args, &data)?;
    let steps = trainer::steps(per_epoch, args.run.epochs, args.run.steps)?;
    let fits = |c: Choice| (1..=setup.batch).contains(&c.chunk) && c.head_rows > 0;
    let fixed = trainer::fixed_choice(from.as_ref(), steps, count, fits)?;
    let kind = args.run.machine.backend;
    let (choice, model, layout) =
        machine::lay_out::<Vit>(&setup, kind, count, args.run.machine.memory, fixed)?;
    if let Some(joined) = &mut joined {
        joined.reserve(&[model.exchanged()]);
    }
    // The table is told by the first rank alone.
    let others = if rank == 0 { other_plans(&setup, kind, choice)? } else { Vec::new() };
    let every = |epochs: u64| (epochs as u32).saturating_mul(per_epoch);
    let settings = Settings {
        command: "bdia-vit train",
        program: concat!("bdia-vit ", env!("CARGO_PKG_VERSION")),
        steps,
        epoch: Some(per_epoch),
        seed: args.run.seed,
        optim: args.run.optim.clone(),
        eval_every: every(args.run.eval_interval),
        save_every: every(args.run.checkpoint_interval),
        mode: mode_name(&args),
        verify: match args.network {
            Network::Vit => Verify::of(args.run.verify, args.run.mode.mode),
            Network::Revvit => Verify::of(args.run.verify, Mode::BdiaFloat),
        },
        items: ["images", "img"],
        pictures: &[Picture {
            file: "accuracy.svg",
            title: "Validation accuracy",
            y: "accuracy (%)",
            scores: &[("accuracy", "validation", 100.0)],
        }],
    };
    let pixels = data.train.shape.iter().product();
    let task = Training {
        args: args.clone(),
        config,
        data,
        augment,
        model,
        per_epoch,
        order: Vec::new(),
        pixels: [0; 3].map(|_| vec![0.0; pixels]),
        confusion: Vec::new(),
    };
    trainer::train(args, settings, Planned { choice, layout, others }, task, from, joined)
}

/// Measures the γ that a pretrained network bears, where that is asked for. Of several ranks the
/// first measures.
fn measure_gamma(args: &mut TrainArgs, joined: Option<&mut ranks::Ranks>) -> Result<(), Failure> {
    let Some(weights) = args.weights.clone() else { return Ok(()) };
    if args.network == Network::Revvit || !calibrate::is_wanted(&args.run.mode)? {
        return Ok(());
    }
    let found = ranks::of_first(joined, || {
        let mut some = args.clone();
        some.run.mode.gamma = GammaArg::Paper;
        let (data, config, _) = prepare(&some, Some(&weights))?;
        let images = data.train.subset(calibrate::TARGETS);
        let (run, together) = (&args.run, args.run.mode.blocks_per_step as usize);
        let place = &run.machine;
        calibrate::measure(&run.mode, &run.given, place, |frac_bits| {
            let setup = inference_setup(&config, place, images.len(), frac_bits, together)?;
            let (_, model, layout) =
                machine::lay_out(&setup, place.backend, 1, place.memory, None)?;
            Ok((Measured { weights: &weights, config: &config, images: &images, model }, layout))
        })
    })?;
    if let Some(found) = found {
        args.run.mode.take(found);
    }
    Ok(())
}

struct Measured<'a> {
    weights: &'a Path,
    config: &'a VitConfig,
    images: &'a Images,
    model: Vit,
}

impl Pretrained for Measured<'_> {
    fn load<B: Backend<Real = f32>>(&mut self, be: &mut B) -> Result<(), Failure> {
        Ok(load_weights(&self.weights.join(weights::FILE), be, &self.model)?)
    }

    fn losses<B: Backend<Real = f32>>(
        &mut self,
        be: &mut B,
        inference: Inference,
    ) -> Result<Vec<Batch>, Failure> {
        let (all, at_once) = (self.images, self.model.chunk());
        let batch = |first: usize| {
            let n = at_once.min(all.len() - first);
            let inference = inference.of_samples(first as u32);
            let (_, loss) = self.model.evaluate::<B, Failure>(be, n, inference, |i, out| {
                normalized(self.config, all.image(first + i), out);
                Ok([i32::from(all.labels[first + i]); 2])
            })?;
            Ok((loss, n))
        };
        (0..all.len()).step_by(at_once).map(batch).collect()
    }

    fn largest<B: Backend<Real = f32>>(&mut self, be: &mut B) -> Result<f64, Failure> {
        let (all, at_once, mut largest) = (self.images, self.model.chunk(), 0.0_f64);
        for first in (0..all.len()).step_by(at_once) {
            let n = at_once.min(all.len() - first);
            let found = self.model.largest::<B, Failure>(be, n, |i, out| {
                normalized(self.config, all.image(first + i), out);
                Ok([i32::from(all.labels[first + i]); 2])
            })?;
            largest = largest.max(found);
        }
        Ok(largest)
    }
}

/// How a trained model is laid out for inference on some images.
fn inference_setup(
    config: &VitConfig,
    place: &MachineArgs,
    images: usize,
    frac_bits: u32,
    blocks_per_step: usize,
) -> Result<Setup, Failure> {
    let threads = machine::threads(place);
    let batch = 64.min(images).max(1);
    Ok(Setup {
        dims: config.dims(),
        batch,
        accumulate: 1,
        chunk: batch,
        mode: StackMode::Bdia {
            grid: Grid::new(frac_bits)?,
            gamma: Policy::fixed(Gamma::new(1, Sign::Plus)?),
            verify: false,
        },
        gradients: Gradients::None,
        blocks_per_step,
        adapters: None,
        drop_path: 0.0,
        smoothing: 0.0,
        mixup: false,
        threads,
        library: machine::library(place, threads),
    })
}

/// Steps of an epoch: whole ones only.
fn steps_per_epoch(args: &TrainArgs, data: &Dataset) -> Result<u32, Failure> {
    let (images, of_step) = (data.train.len(), step_images(args));
    if images < of_step {
        let what = format!("{images} training images, expected at least a batch of {of_step}");
        let do_ = "use a smaller --batch or --accumulate";
        return Err(Failure::Other(format!("{}: {what}; {do_}", data.name)));
    }
    u32::try_from(images / of_step).map_err(|_| {
        Failure::Other(format!("{}: more images than steps can be counted", data.name))
    })
}

/// The order of an epoch's images: a permutation by Fisher and Yates.
pub fn order(seed: u64, epoch: u32, n: usize) -> Vec<u32> {
    let s = Stream::new(seed, epoch, 0, 0, 0, Draw::Data);
    let mut order: Vec<u32> = (0..n as u32).collect();
    for i in (1..n).rev() {
        order.swap(i, s.below(i as u32, i as u32 + 1) as usize);
    }
    order
}

/// Pixels of an image as the network sees them: mean 0 and deviation 1 by channel.
fn normalized(config: &VitConfig, image: &[u8], out: &mut [f64]) {
    let per = image.len() / config.image[0].max(1);
    for ((image, out), (mean, std)) in
        image.chunks(per).zip(out.chunks_mut(per)).zip(config.mean.iter().zip(&config.std))
    {
        for (&p, out) in image.iter().zip(out) {
            *out = (f64::from(p) - mean) / std;
        }
    }
}

/// Accuracy, mean loss, and how often images of class `row` were taken for class `column`.
#[derive(Debug, Clone, PartialEq)]
pub struct Evaluation {
    /// 0 to 1.
    pub accuracy: f64,
    /// Nats.
    pub loss: f64,
    /// `[classes][classes]`.
    pub confusion: Vec<Vec<u32>>,
}

/// Evaluates all images.
///
/// # Errors
/// [`Failure`]
pub fn evaluate<B: Backend>(
    be: &mut B,
    model: &mut Vit,
    config: &VitConfig,
    images: &Images,
    inference: Inference,
) -> Result<Evaluation, Failure> {
    let (classes, at_once) = (config.classes.len(), model.chunk());
    let mut confusion = vec![vec![0; classes]; classes];
    let (mut loss, mut right) = (0.0, 0);
    for first in (0..images.len()).step_by(at_once) {
        run::go_on()?;
        let n = at_once.min(images.len() - first);
        let (logits, sum) = model.evaluate::<B, Failure>(be, n, inference, |i, out| {
            normalized(config, images.image(first + i), out);
            Ok([i32::from(images.labels[first + i]); 2])
        })?;
        loss += sum;
        for (i, row) in logits.chunks_exact(classes).enumerate() {
            // The first of the largest.
            let best = (0..classes).fold(0, |best, c| if row[c] > row[best] { c } else { best });
            let label = usize::from(images.labels[first + i]);
            right += usize::from(best == label);
            confusion[label][best] += 1;
        }
    }
    let n = images.len().max(1) as f64;
    Ok(Evaluation { accuracy: right as f64 / n, loss: loss / n, confusion })
}

fn percent(x: f64) -> String {
    format!("{:.2} %", 100.0 * x)
}

impl Task for Training {
    const DATA: &'static str = "the data, or the model whose adapters are trained,";
    const HIGHER: bool = true;

    fn describe(&self) -> String {
        let (c, s, [parameters, trained]) = (&self.config, self.model.setup(), self.parameters());
        format!(
            "{parameters} parameters{}, {} blocks, width {}, {} patches, batch {}, {} \
             thread(s); {} training and {} held-out images of {}",
            trainer::adapters(s.adapters.is_some(), trained),
            c.layers,
            c.width,
            s.dims.patches.count(),
            step_images(&self.args),
            s.threads,
            self.data.train.len(),
            self.data.test.len() + self.data.validation.as_ref().map_or(0, Images::len),
            self.data.name,
        )
    }

    fn digest(&self) -> Result<u64, Failure> {
        trainer::digest(self.data.digest(), &self.args.method, self.args.weights.as_deref())
    }

    fn start<B: Backend<Real = f32>>(&mut self, be: &mut B, resumed: bool) -> Result<(), Failure> {
        // What is frozen is in no checkpoint.
        if resumed && self.model.setup().adapters.is_none() {
            return Ok(());
        }
        self.model.initialize(be, self.args.run.seed)?;
        if let Some(dir) = &self.args.weights {
            load_weights(&dir.join(weights::FILE), be, &self.model)
                .map_err(MethodArgs::unreadable)?;
        }
        Ok(())
    }

    fn record(&self, out: &Path) -> Result<(), Failure> {
        Ok(self.config.write_dir(out)?)
    }

    fn parameters(&self) -> [usize; 2] {
        [self.model.parameters(), self.model.trained().iter().map(Named::len).sum()]
    }

    fn saved(&self) -> Vec<Saved> {
        self.model.saved()
    }

    fn prepare(&mut self) {
        self.model.prepare();
    }

    fn choose(&mut self, step: u32) {
        if self.order.is_empty() || step.is_multiple_of(self.per_epoch) {
            let epoch = step / self.per_epoch;
            self.order = order(self.args.run.seed, epoch, self.data.train.len());
        }
    }

    fn step<B: Backend<Real = f32>>(
        &mut self,
        be: &mut B,
        step: &Step,
    ) -> Result<Outcome, Failure> {
        let (batch, all) = (self.args.batch as usize, step_images(&self.args));
        let rank_first = be.rank() * (batch / be.ranks());
        let within = (step.step % self.per_epoch) as usize;
        let (order, augment) = (&self.order[within * all..][..all], self.augment);
        let (config, train) = (&self.config, &self.data.train);
        let share = augment.share(step.seed, step.step);
        let load = |i: usize, raw: &mut [f64], to: &mut [f64]| {
            let at = order[i] as usize;
            normalized(config, train.image(at), raw);
            apply(augment.change(step.seed, step.step, i as u32), train.shape, raw, to);
            i32::from(train.labels[at])
        };
        let [raw, one, two] = &mut self.pixels;
        self.model.train(be, step, share, |micro, i, pixels| {
            let i = micro * batch + rank_first + i;
            let label = load(i, raw, one);
            if augment.mixup <= 0.0 {
                pixels.copy_from_slice(one);
                return Ok([label; 2]);
            }
            let other = load(all - 1 - i, raw, two);
            for ((p, a), b) in pixels.iter_mut().zip(&*one).zip(&*two) {
                *p = share * a + (1.0 - share) * b;
            }
            Ok([label, other])
        })
    }

    fn validate<B: Backend<Real = f32>>(
        &mut self,
        be: &mut B,
        when: When,
    ) -> Result<Option<Validation>, Failure> {
        let mut measure = |images: &Images| {
            evaluate(be, &mut self.model, &self.config, images, Inference::STANDARD)
        };
        let e = measure(self.data.held_out())?;
        let told = |e: &Evaluation| format!("loss {:.4}, accuracy {}", e.loss, percent(e.accuracy));
        let mut v = Validation {
            loss: e.loss,
            scores: [("accuracy".into(), e.accuracy)].into(),
            text: told(&e),
        };
        self.confusion = e.confusion;
        // Test images are looked at once.
        if self.data.validation.is_some() && when == When::End {
            let test = measure(&self.data.test)?;
            v.scores.insert("test_accuracy".into(), test.accuracy);
            v.text += &format!("; test {}", told(&test));
            self.confusion = test.confusion;
        }
        Ok(Some(v))
    }

    fn key(&self, v: &Validation) -> f64 {
        v.scores.get("accuracy").copied().unwrap_or(0.0)
    }

    fn save<B: Backend<Real = f32>>(&self, be: &B, path: &Path) -> Result<(), Failure> {
        Ok(save_weights(path, be, &self.model)?)
    }

    fn write<B: Backend<Real = f32>>(&self, be: &B, out: &Path) -> Result<&'static str, Failure> {
        self.config.write_dir(out)?;
        save_weights(&out.join(weights::FILE), be, &self.model)?;
        Ok("model.safetensors, best.safetensors, config.json")
    }

    fn tell<B: Backend<Real = f32>>(&mut self, _: &mut B, _: &Path) -> Result<String, Failure> {
        Ok(confusion_table(&self.config.classes, &self.confusion))
    }
}

/// How often images of the class of a row were taken for the class of a column, where there are not
/// too many classes for a table.
fn confusion_table(classes: &[String], confusion: &[Vec<u32>]) -> String {
    if classes.len() > 20 {
        return String::new();
    }
    let width = classes.iter().map(|c| c.chars().count()).max().unwrap_or(1).clamp(4, 12);
    let short = |c: &str| c.chars().take(width).collect::<String>();
    let mut text = format!("\nconfusion (rows: the class, columns: the answer)\n{:width$}", "");
    for c in classes {
        text += &format!(" {:>width$}", short(c));
    }
    for (c, row) in classes.iter().zip(confusion) {
        text += &format!("\n{:>width$}", short(c));
        for n in row {
            text += &format!(" {n:>width$}");
        }
    }
    text + "\n"
}

/// Does something with the weights of a run and its held-out images, or others.
fn with_model(
    dir: &Path,
    data: Option<&Path>,
    best: bool,
    machine_args: &MachineArgs,
    frac_bits: Option<u32>,
    task: impl OnModel,
) -> Result<(), Failure> {
    struct Eval<T> {
        path: std::path::PathBuf,
        config: VitConfig,
        images: Images,
        model: Vit,
        task: T,
    }
    impl<T: OnModel> Work for Eval<T> {
        fn on<B: Backend<Real = f32>>(mut self, be: &mut B, _: usize) -> Result<(), Failure> {
            load_weights(&self.path, be, &self.model)?;
            self.task.on(be, &mut self.model, &self.config, &self.images)
        }
    }

    let config = VitConfig::read_dir(dir)?;
    let mut args: TrainArgs = run::saved(dir)?;
    let mut open: fn(&Path, usize) -> _ = Dataset::open;
    if let Some(data) = data {
        (args.data, args.test_subset) = (Some(data.into()), None);
        open = Dataset::open_to_evaluate;
    }
    let images = images(&args, Some(dir), open)?.test;
    if images.shape != config.image {
        let what = format!("images of {:?}, the model is for {:?}", images.shape, config.image);
        return Err(Failure::Other(format!("{}: {what}", data.unwrap_or(dir).display())));
    }
    let threads = machine::threads(machine_args);
    let frac_bits = frac_bits.unwrap_or(config.bdia.frac_bits);
    let setup = inference_setup(&config, machine_args, images.len(), frac_bits, 1)?;
    let (_, model, layout) =
        machine::lay_out(&setup, machine_args.backend, 1, machine_args.memory, None)?;
    let path = dir.join(if best { "best.safetensors" } else { weights::FILE });
    machine::run(machine_args, threads, &layout, Eval { path, config, images, model, task })
}

/// What is done with a trained model.
trait OnModel {
    fn on<B: Backend<Real = f32>>(
        self,
        be: &mut B,
        model: &mut Vit,
        config: &VitConfig,
        images: &Images,
    ) -> Result<(), Failure>;
}

/// Evaluates the weights of a run on its held-out images, or on others.
///
/// # Errors
/// [`Failure`]
pub fn evaluation(
    dir: &Path,
    data: Option<&Path>,
    best: bool,
    inferences: &[Inference],
    machine_args: &MachineArgs,
    frac_bits: Option<u32>,
) -> Result<Vec<Evaluation>, Failure> {
    struct All<'a>(&'a [Inference], &'a mut Vec<Evaluation>);
    impl OnModel for All<'_> {
        fn on<B: Backend<Real = f32>>(
            self,
            be: &mut B,
            model: &mut Vit,
            config: &VitConfig,
            images: &Images,
        ) -> Result<(), Failure> {
            for &inference in self.0 {
                self.1.push(evaluate(be, model, config, images, inference)?);
            }
            Ok(())
        }
    }
    let mut out = Vec::new();
    with_model(dir, data, best, machine_args, frac_bits, All(inferences, &mut out))?;
    Ok(out)
}

/// Largest magnitude that activations and residuals of the first held-out images of a run reach
/// ([`Vit::largest`]).
///
/// # Errors
/// [`Failure`]
pub fn largest_activation(dir: &Path, machine_args: &MachineArgs) -> Result<f64, Failure> {
    struct Largest<'a>(&'a mut f64);
    impl OnModel for Largest<'_> {
        fn on<B: Backend<Real = f32>>(
            self,
            be: &mut B,
            model: &mut Vit,
            config: &VitConfig,
            images: &Images,
        ) -> Result<(), Failure> {
            let n = model.chunk().min(images.len());
            *self.0 = model.largest::<B, Failure>(be, n, |i, out| {
                normalized(config, images.image(i), out);
                Ok([i32::from(images.labels[i]); 2])
            })?;
            Ok(())
        }
    }
    let mut largest = 0.0;
    with_model(dir, None, false, machine_args, None, Largest(&mut largest))?;
    Ok(largest)
}

/// `eval`.
///
/// # Errors
/// [`Failure`]
pub fn eval(args: &EvalArgs) -> Result<(), Failure> {
    let inference = match args.inference {
        cli::Inference::Float => Inference::Float(FloatGamma::new(args.gamma, Sign::Plus)?),
        cli::Inference::Quantized if args.gamma == 0.0 => Inference::Quantized(None),
        cli::Inference::Quantized => {
            Inference::constant(Gamma::from_value(args.gamma, Sign::Plus)?)
        }
    };
    let all = evaluation(
        &args.weights,
        args.data.as_deref(),
        args.best,
        &[inference],
        &args.machine,
        None,
    )?;
    let config = VitConfig::read_dir(&args.weights)?;
    for e in all {
        report::tell!("{}", confusion_table(&config.classes, &e.confusion));
        let images: u32 = e.confusion.iter().flatten().sum();
        report::tell!("accuracy {}, loss {:.4}, {images} images", percent(e.accuracy), e.loss);
        if args.json {
            report::tell!("{}", serde_json::json!({"accuracy": e.accuracy, "loss": e.loss}));
        }
    }
    Ok(())
}

/// `plan`.
///
/// # Errors
/// [`Failure`]
pub fn plan(args: &TrainArgs) -> Result<(), Failure> {
    let (_, config, _) = prepare(args, args.weights.as_deref())?;
    let setup = setup(args, &config, 1)?;
    let kind = args.run.machine.backend;
    let (choice, model, layout) =
        machine::lay_out::<Vit>(&setup, kind, 1, args.run.machine.memory, None)?;
    let mut plans = vec![(mode_name(args), layout.clone())];
    plans.extend(other_plans(&setup, kind, choice)?);
    report::tell!("{} parameters; chunks of {} image(s)\n", model.parameters(), choice.chunk);
    report::tell!("{}", machine::memory_table(&plans, None));
    if let Some(last) = model.last_step() {
        report::tell!("{last}");
    }
    if args.run.json {
        let json =
            serde_json::json!({"parameters": model.parameters(), "plan_bytes": layout.total()});
        report::tell!("{json}");
    }
    Ok(())
}
