//! How the matrices of a language model that stays as it is are stored in few bits.

use std::sync::{Mutex, PoisonError};

use bdia_core::arena::Layout;
use bdia_core::backend::Order;
use bdia_core::layers::{BlockSet, Gradients, Home, LoraShape, Store, Stored};
use bdia_core::{Packing, Real};

use super::Family;
use crate::named::{self, Adapters, Frozen};
use crate::weights::{Source, WeightsError};

/// All matrices in one packing, in the order that files have.
///
/// # Errors
/// A model that cannot be laid out, or rows that are not whole blocks of the packing.
pub fn packed<F: Family>(dims: &F, packing: Packing) -> Result<Frozen, WeightsError> {
    let of = |cols: usize| {
        packing.row_bytes(cols)?;
        Ok((packing, 0))
    };
    stores(dims, false, |_, [_, cols]| of(cols))
}

/// Every matrix as the files have it. Those that are `mapped` take no memory of the network's: they
/// are read where the system keeps the file.
///
/// # Errors
/// As [`packed`], and a matrix whose values have to be converted, or that comes in more than two
/// packings.
pub fn as_stored<F: Family>(
    dims: &F,
    weights: &dyn Source,
    mapped: bool,
) -> Result<Frozen, WeightsError> {
    stores(dims, mapped, |name, _| match weights.extent(name) {
        Some(found) => Ok((found.packing, found.neighbours)),
        None => Err(WeightsError::Stored {
            name: name.into(),
            expected: "values in a packing that can be used where it lies".into(),
            found: "others".into(),
        }),
    })
}

/// `of` has packing and neighbours of a matrix, of its name and its shape as it is stored.
fn stores<F: Family>(
    dims: &F,
    mapped: bool,
    of: impl Fn(&str, [usize; 2]) -> Result<(Packing, usize), WeightsError>,
) -> Result<Frozen, WeightsError> {
    let order = if F::TRANSPOSED { Order::Transposed } else { Order::Plain };
    // The tensors of a block are those of one with adapters, which are not frozen.
    let adapters = Some(Adapters::new(LoraShape { rank: 1, alpha: 1.0 }));
    let mut layout = Layout::new(f32::BYTES);
    let blocks = dims.blocks(1, adapters, Gradients::None, &mut layout)?;
    let mut matrices: Vec<Stored> = Vec::new();
    for k in 0..dims.layers() {
        let frozen = named::of_block(&blocks, k).into_iter().map(|(_, _, t)| t);
        for (i, t) in frozen.filter(|t| t.matrix && t.home == Home::Frozen).enumerate() {
            let name = dims.name(Some(k), &t);
            let stored = Stored { order, ..Stored::plain(Packing::F32) };
            let shape = if F::TRANSPOSED { [t.cols, t.rows] } else { [t.rows, t.cols] };
            let (packing, neighbours) = of(&name, shape)?;
            if k == 0 {
                matrices.push(Stored { packing, other: packing, neighbours, ..stored });
                continue;
            }
            let Some(known) = matrices.get_mut(i) else { continue };
            if packing != known.packing {
                if known.others == BlockSet::NONE {
                    known.other = packing;
                }
                known.others = known.others.with(k)?;
            }
            if (packing, neighbours) != (known.packing(k), known.neighbours) {
                let [a, b] = [known.packing, known.other].map(Packing::name);
                return Err(WeightsError::Stored {
                    name,
                    expected: format!("{a} or {b}, as in the blocks before"),
                    found: packing.name().into(),
                });
            }
        }
    }
    let mut ends = Vec::new();
    for (i, t) in dims.ends().into_iter().enumerate() {
        // Learned positions are added, not looked up.
        if t.matrix && !t.is_empty() && i != 1 {
            let (packing, neighbours) = of(&dims.name(None, &t), [t.rows, t.cols])?;
            ends.push(Stored { neighbours, ..Stored::plain(packing) });
        }
    }
    let [blocks, ends] =
        [matrices, ends].map(|list| Some(Store::Each { matrices: kept(list), mapped }));
    Ok(Frozen { blocks, ends })
}

/// The same list until the program ends; equal ones are kept once.
fn kept(list: Vec<Stored>) -> &'static [Stored] {
    static LISTS: Mutex<Vec<&'static [Stored]>> = Mutex::new(Vec::new());
    let mut lists = LISTS.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(known) = lists.iter().find(|known| **known == list) {
        return known;
    }
    let new: &'static [Stored] = list.leak();
    lists.push(new);
    new
}
