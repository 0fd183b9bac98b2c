//! `plan`: the memory that training would take, and what fits into a budget: the ways to train a
//! model, from the one that gives up least, with the longest sample and the most samples that each
//! has room for.

use std::collections::BTreeMap;
use std::path::Path;

use bdia_core::stack::Mode;
use bdia_core::update::{Gamma, Policy};
use bdia_core::{Category, Error};
use bdia_models::language::model::{LanguageModel, Setup};
use bdia_models::language::{Config, Family};
use bdia_models::tokenizer::VOCAB;
use bdia_models::{for_family, pretrained};
use bdia_train::cli::{FrozenKind, MethodArgs, MethodKind, OptimArgs, Optimizer};
use bdia_train::report::{self, Chart, MemoryTable, Series, bytes};
use bdia_train::{Failure, machine, ranks, trainer};
use serde_json::{Value, json};

use crate::cli::{PlanArgs, check_pack, context_of};
use crate::finetune::{self, storage};
use crate::hub;

/// Tokens of a sample that every way is planned for.
const CONTEXTS: [usize; 5] = [256, 1024, 4096, 16_384, 65_536];

/// The memory table, without training.
///
/// # Errors
/// [`Failure`], among them a budget that cannot be met, with the smallest plan.
pub fn plan(args: &PlanArgs) -> Result<(), Failure> {
    let (config, weights) = match &args.weights {
        Some(model) => {
            let opened = hub::open_config(model)?;
            (opened.config, Some(opened.path))
        }
        None => (args.model.fresh(args.dropout, VOCAB)?, None),
    };
    for_family!(config, config => plan_of(args, config, weights.as_deref()))
}

fn plan_of<C: Config>(
    args: &PlanArgs,
    mut config: C,
    weights: Option<&Path>,
) -> Result<(), Failure> {
    let mut method = args.method.clone();
    if let Some(path) = weights {
        method.frozen_dtype = storage(&method, &config, path)?;
    }
    let adapters = finetune::adapters(&method, &args.machine, &config, weights)?;
    config.set_dropout(args.dropout);
    let dims = config.dims();
    let positions = dims.positions();
    let context = context_of(args.model.context, positions)?.unwrap_or(positions);
    check_pack::<C::Dims>(args.pack)?;
    let threads = machine::threads(&args.machine);
    let kind = args.machine.backend;
    let (layers, ranks) = (dims.layers(), args.ranks as usize);
    let setup = Setup {
        dims,
        batch: ranks::part(args.batch as usize, ranks)?,
        accumulate: args.accumulate as usize,
        context,
        mode: machine::mode(&args.mode, layers, args.verify)?,
        gradients: machine::gradients(&args.optim, args.accumulate),
        blocks_per_step: args.mode.blocks_per_step as usize,
        adapters,
        packed: args.pack,
        smoothing: 0.0,
        threads,
        library: machine::library(&args.machine, threads),
    };
    let fused = setup.gradients.fused();
    let planned =
        machine::lay_out::<LanguageModel<C::Dims>>(&setup, kind, ranks, args.machine.memory, None);
    if let (Err(Error::Budget { .. }), Some(budget)) = (&planned, args.machine.memory) {
        what_fits(args, &config, weights, &setup, budget)?;
    }
    let (choice, model, layout) = planned?;
    report::tell!(
        "{} parameters, {layers} blocks, width {}, {} sample(s) of {context} tokens{}, {}",
        model.parameters(),
        dims.width(),
        args.batch,
        if ranks > 1 { format!(" on {ranks} ranks, of which this is one") } else { String::new() },
        if fused { "updates as blocks are finished" } else { "full gradient buffers" },
    );
    let name = match setup.mode {
        Mode::Checkpoint { every, .. } => format!("checkpoint {every}"),
        _ => trainer::mode_name(args.mode.mode),
    };
    let mut columns = vec![(format!("{name} *"), layout.clone())];
    let mut others = machine::other_modes(&setup.mode, layers)?;
    // The fair rival in memory.
    others.push(("checkpoint 1".into(), Mode::Checkpoint { every: 1, grid: None }));
    for (other, mode) in others.into_iter().filter(|(other, _)| *other != name) {
        let setup = Setup { mode, ..setup };
        let plan =
            machine::lay_out::<LanguageModel<C::Dims>>(&setup, kind, ranks, None, Some(choice))?.2;
        columns.push((other, plan));
    }
    columns.dedup_by(|a, b| a.0 == b.0);
    report::tell!("{}", machine::memory_table(&columns, None).to_string().trim_end());
    report::tell!(
        "* chunks of {} sample(s) inside a block, {}{} rows of logits at a time",
        choice.chunk,
        choice.token_chunk.map_or_else(String::new, |n| format!("MLPs over {n} tokens, ")),
        choice.head_rows
    );
    if let Some(budget) = args.machine.memory {
        report::tell!("  fits into {}", bytes(budget));
    }
    if let Some(last) = model.stack.last_step() {
        report::tell!("{last}");
    }
    if let Mode::Bdia { grid, verify, .. } = setup.mode {
        // What --gamma auto may choose.
        let mut by_bits = MemoryTable::new(&["side bits", "total"]);
        for planes in 1..=Gamma::MAX_PLANES {
            let gamma = Policy::fixed(Gamma::new(planes, args.mode.sign())?);
            let setup = Setup { mode: Mode::Bdia { grid, gamma, verify }, ..setup };
            let plan = machine::lay_out::<LanguageModel<C::Dims>>(
                &setup,
                kind,
                ranks,
                None,
                Some(choice),
            )?
            .2;
            let cells = [plan.bytes(Category::SideBits), plan.total()].map(|n| Some(n as u64));
            by_bits.row(&format!("gamma 1/{} (m = {planes})", 1_u32 << planes), &cells);
        }
        report::tell!("\n{}", by_bits.to_string().trim_end());
    }
    let fits = match args.machine.memory {
        Some(budget) => Some(what_fits(args, &config, weights, &setup, budget)?),
        None => None,
    };
    if args.json {
        let categories: serde_json::Map<_, _> =
            Category::ALL.iter().map(|&c| (c.to_string(), json!(layout.bytes(c)))).collect();
        report::tell!(
            "{}",
            json!({
                "plan_bytes": layout.total(),
                "mapped_bytes": 4 * layout.mapped_words(),
                "parameters": model.parameters(),
                "chunk": choice.chunk,
                "head_rows": choice.head_rows,
                "token_chunk": choice.token_chunk,
                "fused": fused,
                "bytes": categories,
                "fits": fits,
            })
        );
    }
    Ok(())
}

/// A way to train a model.
struct Way<F> {
    name: &'static str,
    setup: Setup<F>,
}

/// All ways, from the one that gives up least.
fn ways<C: Config>(
    args: &PlanArgs,
    config: &C,
    weights: Option<&Path>,
    setup: &Setup<C::Dims>,
) -> Result<Vec<Way<C::Dims>>, Failure> {
    let mut ways = Vec::new();
    let gradients = |optimizer| {
        let optim = OptimArgs { optimizer, eps: None, ..args.optim.clone() };
        machine::gradients(&optim, args.accumulate)
    };
    for (name, optimizer) in [
        ("all parameters, adamw", Optimizer::Adamw),
        ("all parameters, adamw8bit", Optimizer::Adamw8bit),
        ("all parameters, adafactor", Optimizer::Adafactor),
    ] {
        let gradients = gradients(optimizer);
        ways.push(Way { name, setup: Setup { adapters: None, gradients, ..*setup } });
    }
    let is_narrow = match weights {
        Some(path) => path.is_file() && pretrained::is_narrow(path, &config.dims())?,
        None => false,
    };
    // Fewer bits than the file has are another model, more are the same in more room.
    let kinds: &[_] = if is_narrow {
        &[("lora, frozen file", FrozenKind::File)]
    } else {
        &[
            ("lora, frozen f32", FrozenKind::F32),
            ("lora, frozen bf16", FrozenKind::Bf16),
            ("lora, frozen q8_0", FrozenKind::Q8_0),
            ("lora, frozen q4_0", FrozenKind::Q4_0),
        ]
    };
    for &(name, kind) in kinds {
        let (method, frozen_dtype) = (MethodKind::Lora, Some(kind));
        let method = MethodArgs { method, frozen_dtype, ..args.method.clone() };
        // A model whose rows are not whole blocks cannot be had in few bits.
        let Ok(adapters) = finetune::adapters(&method, &args.machine, config, weights) else {
            continue;
        };
        let gradients = gradients(Optimizer::Adamw);
        ways.push(Way { name, setup: Setup { adapters, gradients, ..*setup } });
    }
    Ok(ways)
}

/// A row of the table.
struct Row {
    name: &'static str,
    /// Bytes for a sample of each of [`CONTEXTS`] that the model has positions for.
    plans: Vec<u64>,
    /// Tokens of the longest sample that fits; 0 where none does.
    longest: usize,
    /// Samples of the context that was asked for; 0 where none fits.
    most: usize,
    /// Bytes of the model's file that are mapped besides.
    mapped: u64,
}

/// Prints what fits into the budget of `--memory`, and draws it where that was asked for. Gives
/// back what `--json` says of it.
///
/// # Errors
/// A model file that cannot be read, a picture that cannot be written.
fn what_fits<C: Config>(
    args: &PlanArgs,
    config: &C,
    weights: Option<&Path>,
    setup: &Setup<C::Dims>,
    budget: u64,
) -> Result<Value, Failure> {
    let positions = setup.dims.positions();
    let mut contexts: Vec<usize> = CONTEXTS.into_iter().filter(|&t| t <= positions).collect();
    if contexts.is_empty() {
        contexts.push(positions);
    }
    let mut rows = Vec::new();
    for Way { name, setup } in ways(args, config, weights, setup)? {
        let plan = |batch, context| planned(args, &Setup { batch, context, ..setup }, budget);
        let fits = |batch, context| plan(batch, context).is_ok_and(|[total, _]| total <= budget);
        let mapped = plan(1, 1)?[1];
        rows.push(Row {
            name,
            plans: contexts.iter().map(|&t| Ok(plan(1, t)?[0])).collect::<Result<_, Error>>()?,
            longest: largest(positions, |t| fits(1, t)),
            most: largest(1 << 20, |n| fits(n, setup.context)),
            mapped,
        });
    }
    report::tell!("\n{}", table(&rows, &contexts, setup.context, budget).trim_end());
    if let Some(path) = &args.svg {
        draw(path, &rows, &contexts, budget)?;
        report::tell!("picture in {}", path.display());
    }
    Ok(rows
        .iter()
        .map(|row| {
            let plans = contexts.iter().map(ToString::to_string).zip(row.plans.iter().copied());
            json!({
                "way": row.name,
                "plan_bytes": plans.collect::<BTreeMap<_, _>>(),
                "mapped_bytes": row.mapped,
                "longest_context": row.longest,
                "largest_batch": row.most,
            })
        })
        .collect())
}

/// Bytes of the plan that the budget leads to, or of the smallest one, and bytes that are mapped.
fn planned<F: Family>(args: &PlanArgs, setup: &Setup<F>, budget: u64) -> Result<[u64; 2], Error> {
    let (kind, ranks) = (args.machine.backend, args.ranks as usize);
    match machine::lay_out::<LanguageModel<F>>(setup, kind, ranks, Some(budget), None) {
        Ok((_, _, plan)) => Ok([plan.total() as u64, 4 * plan.mapped_words() as u64]),
        Err(Error::Budget { minimum, .. }) => {
            let (_, _, plan) =
                machine::lay_out::<LanguageModel<F>>(setup, kind, ranks, None, None)?;
            Ok([minimum as u64, 4 * plan.mapped_words() as u64])
        }
        Err(e) => Err(e),
    }
}

/// The largest number up to `most` that fits, where smaller ones fit too; 0 if none does.
fn largest(most: usize, fits: impl Fn(usize) -> bool) -> usize {
    let (mut fit, mut not) = (0, most.saturating_add(1));
    // Doubling first: large ones take longer to plan.
    let mut next = 1;
    while not - fit > 1 {
        if fits(next) {
            fit = next;
        } else {
            not = next;
        }
        next = if not > most { (2 * fit).min(most) } else { fit + (not - fit) / 2 };
    }
    fit
}

fn table(rows: &[Row], contexts: &[usize], context: usize, budget: u64) -> String {
    let mut cells = vec![vec![String::new()]];
    cells[0].extend(contexts.iter().map(|t| format!("T = {t}")));
    cells[0].extend(["longest T".to_string(), format!("samples of {context}")]);
    for row in rows {
        let or_none = |n: usize| if n > 0 { n.to_string() } else { "-".into() };
        let mut line = vec![row.name.to_string()];
        // What does not fit is marked.
        line.extend(row.plans.iter().map(|&n| {
            if n <= budget { format!("{} *", bytes(n)) } else { format!("{}  ", bytes(n)) }
        }));
        line.extend([or_none(row.longest), or_none(row.most)]);
        cells.push(line);
    }
    let width = |column: usize| {
        cells.iter().map(|line| line[column].chars().count()).max().unwrap_or_default()
    };
    let mut text = format!("{} is room for (*), one sample of T tokens a step:\n", bytes(budget));
    for line in &cells {
        for (column, cell) in line.iter().enumerate() {
            let pad = " ".repeat(width(column) - cell.chars().count());
            text += &if column == 0 { format!("{cell}{pad}") } else { format!("  {pad}{cell}") };
        }
        text.push('\n');
    }
    if let Some(row) = rows.iter().find(|row| row.mapped > 0) {
        text += &format!("{}: and {} mapped from its file\n", row.name, bytes(row.mapped));
    }
    let least = context.min(CONTEXTS[0]);
    let first = rows.iter().find(|row| row.longest >= least).map_or("none", |row| row.name);
    text += &format!("the first with room for {least} tokens: {first}\n");
    text
}

fn draw(path: &Path, rows: &[Row], contexts: &[usize], budget: u64) -> Result<(), Failure> {
    let gigabytes = |n: u64| n as f64 / 1e9;
    let mut series: Vec<Series<'_>> = rows
        .iter()
        .map(|row| Series {
            name: row.name,
            points: contexts
                .iter()
                .zip(&row.plans)
                .map(|(&t, &n)| ((t as f64).log2(), gigabytes(n)))
                .collect(),
            marks: true,
            ..Series::default()
        })
        .collect();
    let ends = [contexts.first(), contexts.last()];
    let across = ends.into_iter().flatten().map(|&t| ((t as f64).log2(), gigabytes(budget)));
    series.push(Series { name: "--memory", points: across.collect(), ..Series::default() });
    let (title, x, y) = ("Memory of a step of one sample", "log2 of its tokens", "GB");
    Ok(report::svg(path, &Chart { title, x, y, series: &series })?)
}

#[cfg(test)]
mod tests {
    use super::largest;

    #[test]
    fn the_largest_that_fits_is_found() {
        for most in [1, 2, 7, 64, 1000] {
            for limit in 0..=most {
                assert_eq!(largest(most, |n| n <= limit), limit, "of {most}");
            }
        }
    }
}
