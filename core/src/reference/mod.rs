//! The scalar reference backend: plain loops over memory that the caller supplies, in `f32` or
//! `f64`.
//!
//! It is the oracle of the other backends and good enough to train with on a microcontroller.

mod memory;
mod nn;
mod optim;
mod update;

pub use memory::Memory;

use crate::arena::{Ints, Layout, LayoutId, Reals, Words};
use crate::backend::{Identity, Storage};
use crate::check::{Arenas, same};
use crate::error::{Error, Fault, Result};
use crate::real::Real;

/// A backend over three borrowed slices.
#[derive(Debug)]
pub struct Reference<'a, R> {
    ints: &'a mut [i32],
    reals: &'a mut [R],
    words: &'a mut [u32],
    layout: LayoutId,
    fault: Option<Fault>,
}

impl<'a, R: Real> Reference<'a, R> {
    /// A backend whose arenas are the given slices, of the lengths that [`Layout::arenas`] says or
    /// longer.
    ///
    /// # Errors
    /// [`Error::Shape`] for a slice that is too short.
    pub fn new(
        layout: &Layout,
        ints: &'a mut [i32],
        reals: &'a mut [R],
        words: &'a mut [u32],
    ) -> Result<Self> {
        let (i, r, w) = layout.arenas();
        for (what, expected, found) in [
            ("integer arena", i, ints.len()),
            ("real arena", r, reals.len()),
            ("word arena", w, words.len()),
        ] {
            if found < expected {
                return Err(Error::Shape { what, expected, found });
            }
        }
        Ok(Self { ints, reals, words, layout: layout.id(), fault: None })
    }

    fn arenas(&self) -> Arenas {
        Arenas {
            ints: self.ints.len(),
            reals: self.reals.len(),
            words: self.words.len(),
            mapped: 0,
            layout: self.layout,
        }
    }

    /// The integers of a handle.
    ///
    /// # Errors
    /// [`Error::Handle`] outside the arena.
    pub fn ints(&self, h: Ints) -> Result<&[i32]> {
        self.ints.get(self.arenas().ints("ints", h)?).ok_or(Error::Handle("ints"))
    }

    /// The reals of a handle.
    ///
    /// # Errors
    /// [`Error::Handle`] outside the arena.
    pub fn reals(&self, h: Reals) -> Result<&[R]> {
        self.reals.get(self.arenas().reals("reals", h)?).ok_or(Error::Handle("reals"))
    }

    /// The reals of a handle, to be changed.
    ///
    /// # Errors
    /// [`Error::Handle`] outside the arena.
    pub fn reals_mut(&mut self, h: Reals) -> Result<&mut [R]> {
        let place = self.arenas().reals("reals", h)?;
        self.reals.get_mut(place).ok_or(Error::Handle("reals"))
    }

    /// The words of a handle.
    ///
    /// # Errors
    /// [`Error::Handle`] outside the arena.
    pub fn words(&self, h: Words) -> Result<&[u32]> {
        self.words.get(self.arenas().words("words", h)?).ok_or(Error::Handle("words"))
    }
}

/// Borrows several parts of an arena at once; an error where they overlap or lie outside. An empty
/// part overlaps nothing.
pub(crate) fn split<'s, T, const N: usize>(
    arena: &'s mut [T],
    parts: [core::ops::Range<usize>; N],
    what: &'static str,
) -> Result<[&'s mut [T]; N]> {
    let parts = parts.map(|part| if part.is_empty() { 0..0 } else { part });
    arena.get_disjoint_mut(parts).map_err(|_| Error::Handle(what))
}

fn copy<T: Copy>(what: &'static str, src: Option<&[T]>, dst: Option<&mut [T]>) -> Result<()> {
    let (Some(src), Some(dst)) = (src, dst) else { return Err(Error::Handle(what)) };
    same(what, dst.len(), src.len())?;
    dst.copy_from_slice(src);
    Ok(())
}

impl<R: Real> Storage for Reference<'_, R> {
    type Real = R;

    fn identity(&self) -> Identity {
        Identity { name: "reference", lanes: 1, fused: false }
    }

    fn read_reals(&self, src: Reals, dst: &mut [R]) -> Result<()> {
        copy("read_reals", self.reals.get(self.arenas().reals("read_reals", src)?), Some(dst))
    }

    fn write_reals(&mut self, dst: Reals, src: &[R]) -> Result<()> {
        let place = self.arenas().reals("write_reals", dst)?;
        copy("write_reals", Some(src), self.reals.get_mut(place))
    }

    fn read_ints(&self, src: Ints, dst: &mut [i32]) -> Result<()> {
        copy("read_ints", self.ints.get(self.arenas().ints("read_ints", src)?), Some(dst))
    }

    fn write_ints(&mut self, dst: Ints, src: &[i32]) -> Result<()> {
        let place = self.arenas().ints("write_ints", dst)?;
        copy("write_ints", Some(src), self.ints.get_mut(place))
    }

    fn read_words(&self, src: Words, dst: &mut [u32]) -> Result<()> {
        copy("read_words", self.words.get(self.arenas().words("read_words", src)?), Some(dst))
    }

    fn write_words(&mut self, dst: Words, src: &[u32]) -> Result<()> {
        let place = self.arenas().words("write_words", dst)?;
        copy("write_words", Some(src), self.words.get_mut(place))
    }

    fn fill_reals(&mut self, dst: Reals, value: R) -> Result<()> {
        let place = self.arenas().reals("fill_reals", dst)?;
        self.reals.get_mut(place).ok_or(Error::Handle("fill_reals"))?.fill(value);
        Ok(())
    }

    fn fill_words(&mut self, dst: Words, value: u32) -> Result<()> {
        let place = self.arenas().words("fill_words", dst)?;
        self.words.get_mut(place).ok_or(Error::Handle("fill_words"))?.fill(value);
        Ok(())
    }

    fn copy_reals(&mut self, src: Reals, dst: Reals) -> Result<()> {
        self.arenas().copy_reals(src, dst)?;
        let [src, dst] = split(self.reals, [src.range(), dst.range()], "copy_reals")?;
        dst.copy_from_slice(src);
        Ok(())
    }

    fn copy_ints(&mut self, src: Ints, dst: Ints) -> Result<()> {
        self.arenas().copy_ints(src, dst)?;
        let [src, dst] = split(self.ints, [src.range(), dst.range()], "copy_ints")?;
        dst.copy_from_slice(src);
        Ok(())
    }

    fn raise(&mut self, fault: Fault) {
        self.fault.get_or_insert(fault);
    }

    fn take_fault(&mut self) -> Result<Option<Fault>> {
        Ok(self.fault.take())
    }
}
