//! What γ costs a pretrained network before any training, and the γ that costs little enough.
//!
//! A trained network has never seen the perturbation that γ is; at |γ| = ½ it may forget all it
//! knows. So its loss is measured on the same batches in float, on the grid, and with
//! `m = 1, 2, …` bits over several draws of signs, and the smallest `m` whose penalty is certain to
//! be small is taken. The grid is the finest that leaves room above the largest activation.

use core::fmt;
use std::collections::BTreeSet;

use bdia_core::backend::Backend;
use bdia_core::stack::Pass;
use bdia_core::update::{Gamma, Grid, Policy, Sign};
use bdia_core::{Error, Fault, Layout};
use bdia_models::inference::Inference;
use serde::{Deserialize, Serialize};

use crate::cli::{GammaArg, MachineArgs, Mode, ModeArgs};
use crate::error::Failure;
use crate::machine::{self, Work};
use crate::study::mean_std;
use crate::{report, run};

/// Targets that are measured on, at least.
pub const TARGETS: usize = 4096;
/// Draws of signs, where signs are drawn.
const DRAWS: u64 = 4;
/// The largest penalty in nats: the magnitude of its mean and two standard errors.
const MOST: f64 = 0.02;
/// The penalty of a network that leaves the grid.
const LOST: f64 = 1e6;
/// The grid holds this many times the largest magnitude.
const ROOM: f64 = 4.0;

/// The sum of the losses of a batch, and its targets.
pub type Batch = (f64, usize);

/// What a row of the table says: the loss in nats above that in float.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Penalty {
    /// Bits per value and block; 0 for the grid alone.
    pub planes: u32,
    /// Mean over batches and draws.
    pub mean: f64,
    /// Its standard error.
    pub error: f64,
    /// Draws of signs.
    pub draws: u64,
}

impl Penalty {
    fn new(planes: u32, draws: u64, differences: &[f64]) -> Self {
        let (mean, deviation) = mean_std(differences);
        let error = deviation / (differences.len() as f64).sqrt();
        Self { planes, mean, error, draws }
    }

    /// A loss that γ lowers much is a sign of a perturbation, too: of a network that is far from
    /// its data.
    fn is_small(&self) -> bool {
        self.mean.abs() + 2.0 * self.error <= MOST
    }

    /// Whether more draws would not change that it is too large.
    fn is_large(&self) -> bool {
        self.mean.abs() - 2.0 * self.error > MOST
    }
}

/// What was measured, and what was chosen.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Calibration {
    /// Targets.
    pub targets: usize,
    /// The loss in float.
    pub loss: f64,
    /// The largest magnitude of activations, residuals, and what becomes of both.
    pub largest: f64,
    /// `l` of the grid.
    pub frac_bits: u32,
    /// The grid alone, and then `m = 1, 2, …` up to the chosen one.
    pub rows: Vec<Penalty>,
}

impl Calibration {
    /// The chosen magnitude.
    pub fn gamma(&self) -> f64 {
        0.5_f64.powi(self.rows.last().map_or(1, |row| row.planes) as i32)
    }
}

/// The finest grid that leaves room above the largest magnitude.
///
/// # Errors
/// [`Failure::Other`] where none does.
fn finest(largest: f64) -> Result<u32, Failure> {
    let room = |l: &u32| largest * ROOM * f64::from(1_u32 << l) <= f64::from(1_u32 << 30);
    (0..=Grid::MAX_FRAC_BITS).rev().find(room).ok_or_else(|| {
        Failure::Other(format!(
            "--gamma auto: activations reach {largest:e}, more than any grid holds; train it in \
             another --mode"
        ))
    })
}

/// Measures on the grid with up to `most` bits. The largest magnitude, `l` of the grid and the
/// losses of the batches in float are given, `losses` gives those of the same batches on the grid.
///
/// # Errors
/// [`Failure::Calibration`] with the table where no γ costs little enough; those of `losses`.
fn calibrate(
    (largest, frac_bits, float): (f64, u32, &[Batch]),
    sign: Sign,
    most: u32,
    mut losses: impl FnMut(Inference) -> Result<Vec<Batch>, Failure>,
) -> Result<Calibration, Failure> {
    let targets = float.iter().map(|b| b.1).sum::<usize>();
    let loss = float.iter().map(|b| b.0).sum::<f64>() / targets.max(1) as f64;
    let mut found = Calibration { targets, loss, largest, frac_bits, rows: Vec::new() };
    let mut differences = |inference, all: &mut Vec<f64>| {
        // A batch without targets says nothing.
        let one = |(&(a, n), &(b, _)): (&Batch, &Batch)| (n > 0).then(|| (a - b) / n as f64);
        all.extend(losses(inference)?.iter().zip(float).filter_map(one));
        Ok::<_, Failure>(())
    };
    let mut grid = Vec::new();
    differences(Inference::Quantized(None), &mut grid)?;
    found.rows.push(Penalty::new(0, 1, &grid));
    let bar = run::bar("gamma", most.into(), 0);
    let draws = if matches!(sign, Sign::Random | Sign::Shared) { DRAWS } else { 1 };
    for planes in 1..=most {
        let policy = Policy::fixed(Gamma::new(planes, sign)?);
        let (mut all, mut drawn) = (Vec::new(), 0);
        while drawn < draws {
            let pass = Pass { seed: drawn, step: 0, global: 0 };
            match differences(Inference::Quantized(Some((policy, pass))), &mut all) {
                // No grid holds what becomes of the network.
                Err(Failure::Core(Error::Fault(Fault::Range { .. }))) => all = vec![LOST],
                done => done?,
            }
            drawn += 1;
            if Penalty::new(planes, drawn, &all).is_large() {
                break;
            }
        }
        bar.set_position(planes.into());
        let row = Penalty::new(planes, drawn, &all);
        found.rows.push(row);
        if row.is_small() && drawn == draws {
            bar.finish_and_clear();
            return Ok(found);
        }
    }
    bar.finish_and_clear();
    Err(Failure::Calibration(Box::new(found)))
}

/// A pretrained network, laid out for inference, and what it is measured on.
pub trait Pretrained {
    /// Reads its weights.
    ///
    /// # Errors
    /// Weights that cannot be read.
    fn load<B: Backend<Real = f32>>(&mut self, be: &mut B) -> Result<(), Failure>;

    /// Losses of all batches, the same ones every time. Their samples are numbered
    /// ([`Inference::of_samples`]), so that each has signs of its own.
    ///
    /// # Errors
    /// Values that are not finite.
    fn losses<B: Backend<Real = f32>>(
        &mut self,
        be: &mut B,
        inference: Inference,
    ) -> Result<Vec<Batch>, Failure>;

    /// The largest magnitude that a grid must hold for these samples.
    ///
    /// # Errors
    /// What the backend reports.
    fn largest<B: Backend<Real = f32>>(&mut self, be: &mut B) -> Result<f64, Failure>;
}

/// Whether something is to be measured: γ where the flags leave it to us. Of a γ that was asked
/// for, ½ is known to destroy pretrained networks, so what it costs is measured and told.
///
/// # Errors
/// A γ that does not exist.
pub fn is_wanted(mode: &ModeArgs) -> Result<bool, Failure> {
    let auto = mode.gamma == GammaArg::Auto;
    Ok(mode.mode == Mode::Bdia && (auto || mode.policy()?.at(0).planes() == 1))
}

/// Measures a network, which `make` lays out with a grid: what the flags are to take
/// ([`ModeArgs::take`]), or nothing where they name a γ. Of several ranks the first does it
/// ([`ranks::of_first`](crate::ranks::of_first)).
///
/// # Errors
/// [`Failure::Calibration`] where no γ costs little enough; those of `make` and of the network.
pub fn measure<P: Pretrained>(
    mode: &ModeArgs,
    given: &BTreeSet<String>,
    place: &MachineArgs,
    make: impl Fn(u32) -> Result<(P, Layout), Failure>,
) -> Result<Option<Calibration>, Failure> {
    let (auto, sign) = (mode.gamma == GammaArg::Auto, mode.sign());
    let threads = machine::threads(place);
    let (network, layout) = make(mode.frac_bits)?;
    report::note!("gamma is measured, with a plan of {}", report::bytes(layout.total() as u64));
    let mut float = None;
    machine::run(place, threads, &layout, InFloat { network, found: &mut float })?;
    let (float, largest) = float.ok_or(Failure::Interrupted)?;
    let frac_bits =
        if !auto || given.contains("frac_bits") { mode.frac_bits } else { finest(largest)? };

    let (network, layout) = make(frac_bits)?;
    let mut found = None;
    let most = if auto { Gamma::MAX_PLANES } else { 1 };
    let of = (largest, frac_bits, float.as_slice());
    match machine::run(
        place,
        threads,
        &layout,
        OnGrid { network, of, sign, most, found: &mut found },
    ) {
        Err(Failure::Calibration(told)) if !auto => {
            report::note!(
                "warning: this gamma perturbs a network that was trained without it; --gamma auto \
                 finds one that does not\n{told}"
            );
            return Ok(None);
        }
        done => done?,
    }
    let found = found.ok_or(Failure::Interrupted)?;
    report::note!("{found}");
    Ok(auto.then_some(found))
}

struct InFloat<'a, P> {
    network: P,
    found: &'a mut Option<(Vec<Batch>, f64)>,
}

impl<P: Pretrained> Work for InFloat<'_, P> {
    fn on<B: Backend<Real = f32>>(mut self, be: &mut B, _: usize) -> Result<(), Failure> {
        self.network.load(be)?;
        let losses = self.network.losses(be, Inference::STANDARD)?;
        *self.found = Some((losses, self.network.largest(be)?));
        Ok(())
    }
}

struct OnGrid<'a, P> {
    network: P,
    of: (f64, u32, &'a [Batch]),
    sign: Sign,
    most: u32,
    found: &'a mut Option<Calibration>,
}

impl<P: Pretrained> Work for OnGrid<'_, P> {
    fn on<B: Backend<Real = f32>>(mut self, be: &mut B, _: usize) -> Result<(), Failure> {
        self.network.load(be)?;
        let losses = |inference| self.network.losses(be, inference);
        *self.found = Some(calibrate(self.of, self.sign, self.most, losses)?);
        Ok(())
    }
}

impl fmt::Display for Calibration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "gamma, measured on {} targets; loss in float {:.4}, largest activation {:.4e}, grid \
             2^-{}",
            self.targets, self.loss, self.largest, self.frac_bits
        )?;
        writeln!(f, "{:>17}  penalty in nats", "")?;
        for row in &self.rows {
            let name = match row.planes {
                0 => "the grid alone".into(),
                m => format!("m = {m}, 1/{}", 1_u32 << m),
            };
            let draws =
                if row.draws > 1 { format!(", {} draws", row.draws) } else { String::new() };
            writeln!(f, "{name:>17}  {:.4} ± {:.4}{draws}", row.mean, row.error)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Losses of 4 batches of 1024 targets, to which γ adds `γ²·of`, and a noise that the draw and
    /// the batch decide.
    fn losses(inference: Inference, of: f64, noise: f64) -> Vec<Batch> {
        let (gamma, seed) = match inference {
            Inference::Quantized(Some((policy, pass))) => {
                (0.5_f64.powi(policy.planes() as i32), pass.seed)
            }
            _ => (0.0, 0),
        };
        (0..4)
            .map(|i| {
                let sign = if (i + seed) % 2 == 0 { 1.0 } else { -1.0 };
                let loss = 3.0 + f64::from(i as u32) + gamma * gamma * of + gamma * noise * sign;
                (1024.0 * loss, 1024)
            })
            .collect()
    }

    fn measured(of: f64, noise: f64, sign: Sign) -> Result<Calibration, Failure> {
        let float = losses(Inference::STANDARD, of, noise);
        calibrate((100.0, 14, &float), sign, Gamma::MAX_PLANES, |i| Ok(losses(i, of, noise)))
    }

    #[test]
    fn the_smallest_number_of_bits_that_costs_little() {
        // 5·γ² is 0.0195 at m = 4 and 0.078 at m = 3.
        let found = measured(5.0, 0.0, Sign::Shared).unwrap();
        assert_eq!((found.targets, found.loss), (4096, 4.5));
        let planes: Vec<_> = found.rows.iter().map(|r| (r.planes, r.draws)).collect();
        assert_eq!(planes, [(0, 1), (1, 1), (2, 1), (3, 1), (4, 4)]);
        assert_eq!(found.gamma(), 0.0625);
        // The same mean with an uncertain measurement is not small enough.
        assert_eq!(measured(5.0, 0.5, Sign::Shared).unwrap().gamma(), 0.03125);
        assert_eq!(measured(0.01, 0.0, Sign::Plus).unwrap().gamma(), 0.5);
        assert_eq!(measured(-0.3, 0.0, Sign::Shared).unwrap().gamma(), 0.25);
        let Err(Failure::Calibration(table)) = measured(1e6, 0.0, Sign::Random) else {
            panic!("it found one")
        };
        assert_eq!(table.rows.len(), 9);
        let text = table.to_string();
        assert!(text.contains("m = 8, 1/256") && text.contains("4096 targets"), "{text}");
    }

    #[test]
    fn the_finest_grid_with_room() {
        assert_eq!(finest(46_845.0).unwrap(), 12);
        assert_eq!(finest(160_058.0).unwrap(), 10);
        assert_eq!(finest(0.0).unwrap(), Grid::MAX_FRAC_BITS);
        assert!(finest(1e10).is_err());
    }
}
