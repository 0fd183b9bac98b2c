//! Checks of operands: what every backend makes sure of before it touches anything, in one place.
//!
//! [`Arenas`] knows how long a backend's arenas are. For each operation of the
//! [traits](crate::backend) it has a function of the same name that takes the operation's operands
//! and checks that sizes agree, handles lie inside, outputs overlap nothing else, and settings are
//! possible. It returns the sizes that follow from the operands' lengths. After it, an
//! operation cannot fail for its operands.

use core::ops::Range;

use crate::arena::{Ints, Layout, LayoutId, Reals, Words, product};
use crate::backend::{
    Attention, Chunk, Columns, CrossEntropy, Mask, Product, RmsNorm, Rotary, State,
};
use crate::error::{Error, Result};
use crate::optim::Update;
use crate::packing::Packed;
use crate::update::Gamma;

/// Refuses two sizes that do not agree.
///
/// # Errors
/// [`Error::Shape`], as all functions here where sizes do not agree; [`Error::Handle`] for handles
/// outside and for overlaps, [`Error::Setting`] for impossible settings, [`Error::TooLarge`] for
/// sizes beyond the address space.
pub fn same(what: &'static str, expected: usize, found: usize) -> Result<()> {
    if expected == found { Ok(()) } else { Err(Error::Shape { what, expected, found }) }
}

/// Number of rows of `cols` values each in `len` values.
///
/// # Errors
/// [`same`]
pub fn rows_of(what: &'static str, len: usize, cols: usize) -> Result<usize> {
    let rows = len.checked_div(cols).unwrap_or(0);
    same(what, rows * cols, len)?;
    Ok(rows)
}

/// Values of each sample of a chunk that has `len` values.
///
/// # Errors
/// [`same`]
pub fn per_sample(chunk: &Chunk, len: usize) -> Result<usize> {
    rows_of("values of a chunk", len, chunk.samples)
}

/// Whether two places have a value in common.
pub fn overlap(a: &Range<usize>, b: &Range<usize>) -> bool {
    a.start < b.end && b.start < a.end
}

/// Refuses inputs that overlap an output, and outputs that overlap each other. Inputs may share
/// memory.
///
/// # Errors
/// [`same`]
pub fn disjoint(
    what: &'static str,
    inputs: &[Range<usize>],
    outputs: &[Range<usize>],
) -> Result<()> {
    for (n, output) in outputs.iter().enumerate() {
        if inputs.iter().chain(&outputs[..n]).any(|other| overlap(other, output)) {
            return Err(Error::Handle(what));
        }
    }
    Ok(())
}

/// Refuses a probability of dropping that is not in `[0, 1)`.
///
/// # Errors
/// [`same`]
pub fn dropout_rate(p: f64) -> Result<()> {
    if (0.0..1.0).contains(&p) {
        Ok(())
    } else {
        Err(Error::setting("dropout", p, "0 up to, not including, 1"))
    }
}

/// A sum has two words, or none where it is not wanted.
fn sum_words(sum: Words) -> Result<()> {
    if sum.is_empty() { Ok(()) } else { same("words of a sum", 2, sum.len()) }
}

/// Lengths of the three arenas of a backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Arenas {
    /// Integers.
    pub ints: usize,
    /// Reals.
    pub reals: usize,
    /// Words.
    pub words: usize,
    /// [`Layout::mapped_words`], of a backend that is given memory; else 0.
    pub mapped: usize,
    /// The layout that they were made for.
    pub layout: LayoutId,
}

/// The errors of all functions are those of [`same`].
#[allow(clippy::missing_errors_doc)]
impl Arenas {
    /// The arenas of a layout, of a backend that reads no memory but its own.
    pub const fn of(layout: &Layout) -> Self {
        let (ints, reals, words) = layout.arenas();
        Self { ints, reals, words, mapped: 0, layout: layout.id() }
    }

    fn place(
        &self,
        what: &'static str,
        place: Range<usize>,
        layout: LayoutId,
        arena: usize,
    ) -> Result<Range<usize>> {
        if place.is_empty() {
            return if place.start <= arena { Ok(0..0) } else { Err(Error::Handle(what)) };
        }
        let inside = place.end <= arena && layout.fits(self.layout);
        if inside { Ok(place) } else { Err(Error::Handle(what)) }
    }

    /// The place of a handle. An empty one is moved to the start, where it overlaps nothing.
    pub fn ints(&self, what: &'static str, h: Ints) -> Result<Range<usize>> {
        self.place(what, h.range(), h.layout(), self.ints)
    }

    /// As [`ints`](Self::ints).
    pub fn reals(&self, what: &'static str, h: Reals) -> Result<Range<usize>> {
        self.place(what, h.range(), h.layout(), self.reals)
    }

    /// As [`ints`](Self::ints).
    pub fn words(&self, what: &'static str, h: Words) -> Result<Range<usize>> {
        self.place(what, h.range(), h.layout(), self.words)
    }

    /// Words of the arena, or mapped ones ([`Words::is_mapped`]).
    fn packed_words(&self, what: &'static str, h: Words) -> Result<()> {
        match h.mapped() {
            Some(place) => self.place(what, place, h.layout(), self.mapped)?,
            None => self.words(what, h)?,
        };
        Ok(())
    }

    /// [`Storage::attach`](crate::Storage::attach)
    pub fn attach(&self, at: Words, bytes: &[u8]) -> Result<Range<usize>> {
        let place = at.mapped().ok_or(Error::Handle("attach: words that are not mapped"))?;
        same("attach", at.len(), bytes.len().div_ceil(4))?;
        self.place("attach", place, at.layout(), self.mapped)
    }

    /// Places of reals none of which may overlap.
    fn apart<const N: usize>(&self, what: &'static str, handles: [Reals; N]) -> Result<()> {
        let mut places = [const { 0..0 }; N];
        for (place, h) in places.iter_mut().zip(handles) {
            *place = self.reals(what, h)?;
        }
        disjoint(what, &[], &places)
    }

    /// [`Storage::copy_reals`](crate::Storage::copy_reals)
    pub fn copy_reals(&self, src: Reals, dst: Reals) -> Result<()> {
        same("copy_reals", dst.len(), src.len())?;
        self.apart("copy_reals", [src, dst])
    }

    /// [`Storage::copy_ints`](crate::Storage::copy_ints)
    pub fn copy_ints(&self, src: Ints, dst: Ints) -> Result<()> {
        same("copy_ints", dst.len(), src.len())?;
        disjoint("copy_ints", &[self.ints("copy_ints", src)?], &[self.ints("copy_ints", dst)?])
    }

    /// `quantize`, `add_quantized` and `subtract_quantized`: values of a sample.
    pub fn quantize(
        &self,
        what: &'static str,
        chunk: &Chunk,
        y: Reals,
        x: Ints,
        sum: Words,
    ) -> Result<usize> {
        let per = per_sample(chunk, x.len())?;
        same(what, x.len(), y.len())?;
        sum_words(sum)?;
        self.ints(what, x)?;
        self.reals(what, y)?;
        self.words(what, sum)?;
        Ok(per)
    }

    /// [`UpdateOps::dequantize`](crate::UpdateOps::dequantize)
    pub fn dequantize(&self, x: Ints, y: Reals) -> Result<()> {
        same("dequantize", x.len(), y.len())?;
        self.ints("dequantize", x)?;
        self.reals("dequantize", y)?;
        Ok(())
    }

    /// `step` (`side` may be empty) and `inverse`: values of a sample, and planes `m`.
    pub fn step(
        &self,
        what: &'static str,
        chunk: &Chunk,
        gamma: Gamma,
        x: Ints,
        [cur, h]: [Reals; 2],
        (side, optional): (Words, bool),
        sum: Words,
    ) -> Result<(usize, u32)> {
        let (per, m) = (per_sample(chunk, x.len())?, gamma.planes());
        sum_words(sum)?;
        same(what, x.len(), cur.len())?;
        same(what, x.len(), h.len())?;
        if !(optional && side.is_empty()) {
            same(what, product(what, &[chunk.samples, m as usize, per.div_ceil(32)])?, side.len())?;
        }
        self.ints(what, x)?;
        self.reals(what, cur)?;
        self.reals(what, h)?;
        disjoint(what, &[], &[self.words(what, side)?, self.words(what, sum)?])?;
        Ok((per, m))
    }

    /// `blend`, `unblend` and `combine`: values of a sample.
    pub fn blend(
        &self,
        what: &'static str,
        chunk: &Chunk,
        x: Reals,
        cur: Reals,
        h: Reals,
    ) -> Result<usize> {
        let per = per_sample(chunk, x.len())?;
        same(what, x.len(), cur.len())?;
        same(what, x.len(), h.len())?;
        self.apart(what, [x, cur, h])?;
        Ok(per)
    }

    /// [`UpdateOps::check_gradient`](crate::UpdateOps::check_gradient): values of a sample.
    pub fn check_gradient(&self, chunk: &Chunk, g: Reals) -> Result<usize> {
        self.reals("check_gradient", g)?;
        per_sample(chunk, g.len())
    }

    /// [`UpdateOps::check_input`](crate::UpdateOps::check_input): values of a sample.
    pub fn check_input(&self, chunk: &Chunk, x: Ints, y: Reals) -> Result<usize> {
        self.quantize("check_input", chunk, y, x, Words::EMPTY)
    }

    /// [`UpdateOps::compare`](crate::UpdateOps::compare)
    pub fn compare(&self, a: Words, b: Words) -> Result<()> {
        same("compare", a.len(), b.len())?;
        self.words("compare", a)?;
        self.words("compare", b)?;
        Ok(())
    }

    /// [`UpdateOps::count_differences`](crate::UpdateOps::count_differences)
    pub fn count_differences(&self, a: Ints, b: Ints, count: Words) -> Result<()> {
        same("count_differences", a.len(), b.len())?;
        same("words of a count", 2, count.len())?;
        self.ints("count_differences", a)?;
        self.ints("count_differences", b)?;
        self.words("count_differences", count)?;
        Ok(())
    }

    /// [`NnOps::matmul`](crate::NnOps::matmul)
    pub fn matmul(
        &self,
        p: &Product,
        a: Reals,
        b: Reals,
        bias: Option<Reals>,
        c: Reals,
    ) -> Result<()> {
        same("matmul: a", product("matmul: a", &[p.rows, p.inner])?, a.len())?;
        same("matmul: b", product("matmul: b", &[p.inner, p.cols])?, b.len())?;
        same("matmul: c", product("matmul: c", &[p.rows, p.cols])?, c.len())?;
        if let Some(bias) = bias {
            same("matmul: bias", p.cols, bias.len())?;
        }
        self.apart("matmul", [a, b, bias.unwrap_or(Reals::EMPTY), c])
    }

    /// [`NnOps::sum_rows`](crate::NnOps::sum_rows): the number of rows.
    pub fn sum_rows(&self, x: Reals, sum: Reals) -> Result<usize> {
        let rows = rows_of("sum_rows", x.len(), sum.len())?;
        self.apart("sum_rows", [x, sum])?;
        Ok(rows)
    }

    /// `add`, `gelu` and `gelu_vjp`: two tensors of the same length.
    pub fn pair(&self, what: &'static str, x: Reals, y: Reals) -> Result<()> {
        same(what, x.len(), y.len())?;
        self.apart(what, [x, y])
    }

    fn packed(&self, what: &'static str, x: &Packed) -> Result<()> {
        same(what, Packed::words_of(x.packing, x.rows, x.cols)?, x.words.len())?;
        let n = x.neighbours;
        if n > 0 && (!n.is_multiple_of(2) || !x.rows.is_multiple_of(n)) {
            let possible = "0, or an even divisor of the rows";
            return Err(Error::setting("rows of a head of neighbours", n as f64, possible));
        }
        self.packed_words(what, x.words)
    }

    /// [`NnOps::unpack`](crate::NnOps::unpack): the number of rows.
    pub fn unpack(&self, x: &Packed, first: usize, y: Reals) -> Result<usize> {
        let rows = rows_of("unpack: y", y.len(), x.cols)?;
        let found = first.saturating_add(rows);
        if found > x.rows {
            return Err(Error::Shape { what: "unpack: rows", expected: x.rows, found });
        }
        self.packed("unpack", x)?;
        self.reals("unpack", y)?;
        Ok(rows)
    }

    /// [`NnOps::unpack_rows`](crate::NnOps::unpack_rows): rows of a sample.
    pub fn unpack_rows(&self, chunk: &Chunk, x: &Packed, rows: Ints, y: Reals) -> Result<usize> {
        let length = rows_of("unpack_rows: rows", rows.len(), chunk.samples)?;
        same("unpack_rows: y", product("unpack_rows: y", &[rows.len(), x.cols])?, y.len())?;
        self.packed("unpack_rows", x)?;
        self.ints("unpack_rows", rows)?;
        self.reals("unpack_rows", y)?;
        Ok(length)
    }

    /// [`NnOps::add_columns`](crate::NnOps::add_columns): the number of rows.
    pub fn add_columns(&self, width: usize, from: Columns, to: Columns) -> Result<usize> {
        let rows = rows_of("add_columns: from", from.of.len(), from.stride)?;
        same("add_columns: to", product("add_columns: to", &[rows, to.stride])?, to.of.len())?;
        for c in [from, to] {
            let end = c.at.checked_add(width).ok_or(Error::TooLarge("add_columns"))?;
            if end > c.stride {
                return Err(Error::Shape { what: "add_columns", expected: end, found: c.stride });
            }
        }
        self.apart("add_columns", [from.of, to.of])?;
        Ok(rows)
    }

    /// [`NnOps::layer_norm`](crate::NnOps::layer_norm): the number of rows.
    pub fn layer_norm(
        &self,
        weight: Reals,
        bias: Reals,
        x: Reals,
        y: Reals,
        stats: Reals,
    ) -> Result<usize> {
        let width = weight.len();
        let rows = rows_of("layer_norm: x", x.len(), width)?;
        same("layer_norm: bias", width, bias.len())?;
        same("layer_norm: y", x.len(), y.len())?;
        same("layer_norm: stats", product("layer_norm: stats", &[2, rows])?, stats.len())?;
        self.apart("layer_norm", [weight, bias, x, y, stats])?;
        Ok(rows)
    }

    /// [`NnOps::layer_norm_vjp`](crate::NnOps::layer_norm_vjp): the number of rows.
    pub fn layer_norm_vjp(
        &self,
        weight: Reals,
        x: Reals,
        stats: Reals,
        dy: Reals,
        dx: Reals,
        dweight: Reals,
        dbias: Reals,
    ) -> Result<usize> {
        let width = weight.len();
        let rows = rows_of("layer_norm_vjp: x", x.len(), width)?;
        same("layer_norm_vjp: stats", product("layer_norm_vjp: stats", &[2, rows])?, stats.len())?;
        same("layer_norm_vjp: dy", x.len(), dy.len())?;
        same("layer_norm_vjp: dx", x.len(), dx.len())?;
        if !(dweight.is_empty() && dbias.is_empty()) {
            same("layer_norm_vjp: dweight", width, dweight.len())?;
            same("layer_norm_vjp: dbias", width, dbias.len())?;
        }
        self.apart("layer_norm_vjp", [weight, x, stats, dy, dx, dweight, dbias])?;
        Ok(rows)
    }

    /// [`NnOps::attention`](crate::NnOps::attention). `scratch` is the part of the operand that is
    /// used, of `needed` values.
    pub fn attention(
        &self,
        chunk: &Chunk,
        a: &Attention,
        [q, k, v]: [Columns; 3],
        out: Reals,
        lse: Reals,
        (scratch, needed): (Reals, usize),
    ) -> Result<()> {
        let all = Heads::new(a, chunk)?;
        same("attention: out", product("attention: out", &[all.queries, all.width])?, out.len())?;
        same("attention: lse", product("attention: lse", &[all.queries, a.heads])?, lse.len())?;
        same("attention: scratch", needed, scratch.len())?;
        dropout_rate(a.dropout)?;
        self.key_lens(a, chunk)?;
        let inputs = [
            self.columns("attention: q", all.width, q, all.queries)?,
            self.columns("attention: k", all.kv_width, k, all.keys)?,
            self.columns("attention: v", all.kv_width, v, all.keys)?,
            self.temperature(a.temperature)?,
        ];
        let outputs = [
            self.reals("attention: out", out)?,
            self.reals("attention: lse", lse)?,
            self.reals("attention: scratch", scratch)?,
        ];
        disjoint("attention", &inputs, &outputs)
    }

    /// [`NnOps::attention_vjp`](crate::NnOps::attention_vjp), with the scratch as in
    /// [`attention`](Self::attention).
    pub fn attention_vjp(
        &self,
        chunk: &Chunk,
        a: &Attention,
        [q, k, v]: [Columns; 3],
        [out, lse, dout]: [Reals; 3],
        [dq, dk, dv]: [Columns; 3],
        (scratch, needed): (Reals, usize),
    ) -> Result<()> {
        let all = Heads::new(a, chunk)?;
        let values = product("attention_vjp: out", &[all.queries, all.width])?;
        same("attention_vjp: out", values, out.len())?;
        same("attention_vjp: dout", values, dout.len())?;
        same(
            "attention_vjp: lse",
            product("attention_vjp: lse", &[all.queries, a.heads])?,
            lse.len(),
        )?;
        same("attention_vjp: scratch", needed, scratch.len())?;
        same("attention_vjp: temperature_grad", a.temperature.len(), a.temperature_grad.len())?;
        dropout_rate(a.dropout)?;
        self.key_lens(a, chunk)?;
        let inputs = [
            self.columns("attention_vjp: q", all.width, q, all.queries)?,
            self.columns("attention_vjp: k", all.kv_width, k, all.keys)?,
            self.columns("attention_vjp: v", all.kv_width, v, all.keys)?,
            self.reals("attention_vjp: out", out)?,
            self.reals("attention_vjp: lse", lse)?,
            self.reals("attention_vjp: dout", dout)?,
            self.temperature(a.temperature)?,
        ];
        let [dq_at, dk_at, dv_at] = [
            self.columns("attention_vjp: dq", all.width, dq, all.queries)?,
            self.columns("attention_vjp: dk", all.kv_width, dk, all.keys)?,
            self.columns("attention_vjp: dv", all.kv_width, dv, all.keys)?,
        ];
        let (scratch, slope) =
            (self.reals("attention_vjp: scratch", scratch)?, self.temperature(a.temperature_grad)?);
        for output in [&dq_at, &dk_at, &dv_at] {
            disjoint("attention_vjp", &inputs, core::slice::from_ref(output))?;
            disjoint(
                "attention_vjp: scratch",
                core::slice::from_ref(output),
                &[scratch.clone(), slope.clone()],
            )?;
        }
        disjoint("attention_vjp: scratch", &inputs, &[scratch, slope])?;
        let outputs =
            [(dq, &dq_at, all.width), (dk, &dk_at, all.kv_width), (dv, &dv_at, all.kv_width)];
        for (n, (x, x_at, x_width)) in outputs.iter().enumerate() {
            for (y, y_at, y_width) in &outputs[n + 1..] {
                // Columns of one matrix must not meet; other matrices must not overlap.
                let behind = x.at + x_width <= y.at || y.at + y_width <= x.at;
                let apart = x.of == y.of && x.stride == y.stride && behind;
                if all.width > 0 && overlap(x_at, y_at) && !apart {
                    return Err(Error::Handle("attention_vjp: dq, dk, dv"));
                }
            }
        }
        Ok(())
    }

    /// The padding lengths: none, or one for each sample; the first keys: none, or one for each
    /// query.
    fn key_lens(&self, a: &Attention, chunk: &Chunk) -> Result<()> {
        if !a.key_lens.is_empty() {
            same("attention: key_lens", chunk.samples, a.key_lens.len())?;
        }
        if !a.starts.is_empty() {
            let queries = product("attention: starts", &[chunk.samples, a.queries])?;
            same("attention: starts", queries, a.starts.len())?;
        }
        self.ints("attention: key_lens", a.key_lens)?;
        self.ints("attention: starts", a.starts)?;
        Ok(())
    }

    /// [`NnOps::rms_norm`](crate::NnOps::rms_norm): the number of rows.
    pub fn rms_norm(
        &self,
        norm: &RmsNorm,
        weight: Reals,
        x: Columns,
        y: Columns,
        stats: Reals,
    ) -> Result<usize> {
        let rows = self.rms_rows("rms_norm: stats", norm, weight, stats)?;
        let width = product("rms_norm: width", &[norm.groups, norm.width])?;
        let inputs =
            [self.reals("rms_norm: weight", weight)?, self.columns("rms_norm: x", width, x, rows)?];
        let outputs =
            [self.columns("rms_norm: y", width, y, rows)?, self.reals("rms_norm: stats", stats)?];
        disjoint("rms_norm", &inputs, &outputs)?;
        Ok(rows)
    }

    /// [`NnOps::rms_norm_vjp`](crate::NnOps::rms_norm_vjp): the number of rows.
    pub fn rms_norm_vjp(
        &self,
        norm: &RmsNorm,
        weight: Reals,
        [x, dy, dx]: [Columns; 3],
        stats: Reals,
        dweight: Reals,
    ) -> Result<usize> {
        let rows = self.rms_rows("rms_norm_vjp: stats", norm, weight, stats)?;
        let width = product("rms_norm_vjp: width", &[norm.groups, norm.width])?;
        if !dweight.is_empty() {
            same("rms_norm_vjp: dweight", norm.width, dweight.len())?;
        }
        let inputs = [
            self.reals("rms_norm_vjp: weight", weight)?,
            self.reals("rms_norm_vjp: stats", stats)?,
            self.columns("rms_norm_vjp: x", width, x, rows)?,
            self.columns("rms_norm_vjp: dy", width, dy, rows)?,
        ];
        let outputs = [
            self.columns("rms_norm_vjp: dx", width, dx, rows)?,
            self.reals("rms_norm_vjp: dweight", dweight)?,
        ];
        disjoint("rms_norm_vjp", &inputs, &outputs)?;
        Ok(rows)
    }

    fn rms_rows(
        &self,
        what: &'static str,
        norm: &RmsNorm,
        weight: Reals,
        stats: Reals,
    ) -> Result<usize> {
        same("rms_norm: weight", norm.width, weight.len())?;
        rows_of(what, stats.len(), norm.groups)
    }

    /// [`NnOps::rotate`](crate::NnOps::rotate): the number of positions in the table.
    pub fn rotate(
        &self,
        chunk: &Chunk,
        rotary: &Rotary,
        table: Reals,
        positions: Ints,
        x: Columns,
    ) -> Result<usize> {
        if !rotary.head_dim.is_multiple_of(2) {
            let found = rotary.head_dim as f64;
            return Err(Error::setting("width of a rotated head", found, "an even number"));
        }
        let known = rows_of("rotate: table", table.len(), rotary.head_dim)?;
        let rows = product("rotate: rows", &[chunk.samples, rotary.tokens])?;
        if !positions.is_empty() {
            same("rotate: positions", rows, positions.len())?;
        }
        let width = product("rotate: width", &[rotary.heads, rotary.head_dim])?;
        self.ints("rotate: positions", positions)?;
        let (table, x) =
            (self.reals("rotate: table", table)?, self.columns("rotate: x", width, x, rows)?);
        disjoint("rotate", &[table], &[x])?;
        Ok(known)
    }

    /// `gated` and `gated_vjp`: tensors of the same length.
    pub fn gated<const N: usize>(&self, what: &'static str, all: [Reals; N]) -> Result<()> {
        for h in all {
            same(what, all[0].len(), h.len())?;
        }
        self.apart(what, all)
    }

    /// The place of the temperature, or none.
    fn temperature(&self, h: Reals) -> Result<Range<usize>> {
        if !h.is_empty() {
            same("attention: temperature", 1, h.len())?;
        }
        self.reals("attention: temperature", h)
    }

    /// The place of the matrix that `width` columns lie in.
    fn columns(
        &self,
        what: &'static str,
        width: usize,
        c: Columns,
        rows: usize,
    ) -> Result<Range<usize>> {
        same(what, product(what, &[rows, c.stride])?, c.of.len())?;
        let end = c.at.checked_add(width).ok_or(Error::TooLarge(what))?;
        if end > c.stride {
            return Err(Error::Shape { what, expected: end, found: c.stride });
        }
        self.reals(what, c.of)
    }

    /// [`NnOps::dropout`](crate::NnOps::dropout): values of a sample.
    pub fn dropout(&self, chunk: &Chunk, p: f64, x: Reals) -> Result<usize> {
        let per = rows_of("dropout", x.len(), chunk.samples)?;
        dropout_rate(p)?;
        self.reals("dropout", x)?;
        Ok(per)
    }

    /// `embed` and `embed_vjp`: tokens of one sample, and the vocabulary.
    pub fn embed(
        &self,
        what: &'static str,
        chunk: &Chunk,
        tokens: Ints,
        [x, table, positions]: [Reals; 3],
        width: usize,
    ) -> Result<(usize, usize)> {
        let length = rows_of("embed: tokens", tokens.len(), chunk.samples)?;
        same("embed: x", product("embed: x", &[tokens.len(), width])?, x.len())?;
        let vocab = rows_of("embed: table", table.len(), width)?;
        let needed = product("embed: positions", &[length, width])?;
        if positions.len() < needed && !positions.is_empty() {
            return Err(Error::Shape {
                what: "embed: positions",
                expected: needed,
                found: positions.len(),
            });
        }
        self.ints(what, tokens)?;
        self.apart(what, [table, positions, x])?;
        Ok((length, vocab))
    }

    /// [`NnOps::cross_entropy`](crate::NnOps::cross_entropy)
    pub fn cross_entropy(
        &self,
        ce: &CrossEntropy,
        logits: Reals,
        targets: Ints,
        losses: Reals,
    ) -> Result<()> {
        let rows = targets.len();
        same(
            "cross_entropy: logits",
            product("cross_entropy: logits", &[rows, ce.vocab])?,
            logits.len(),
        )?;
        same("cross_entropy: losses", rows, losses.len())?;
        if !(0.0..=1.0).contains(&ce.smoothing) {
            return Err(Error::setting("label smoothing", ce.smoothing, "0 to 1"));
        }
        self.ints("cross_entropy: targets", targets)?;
        self.apart("cross_entropy", [logits, losses])
    }

    /// [`OptimOps::sum_squares`](crate::OptimOps::sum_squares)
    pub fn sum_squares(&self, g: Reals, out: Reals) -> Result<()> {
        same("sum_squares: out", 1, out.len())?;
        self.apart("sum_squares", [g, out])
    }

    /// [`OptimOps::update`](crate::OptimOps::update). Also refuses constants that would turn every
    /// parameter into NaN.
    pub fn update(
        &self,
        u: &Update,
        [rows, cols]: [usize; 2],
        p: Reals,
        g: Reals,
        state: &State,
    ) -> Result<()> {
        u.rule.check()?;
        if u.t == 0 {
            return Err(Error::setting("number of the update", 0.0, "1 and up"));
        }
        for (what, found) in [("lr", u.lr), ("weight decay", u.decay), ("gradient scale", u.scale)]
        {
            if !found.is_finite() {
                return Err(Error::setting(what, found, "a finite number"));
            }
        }
        same("update: values", product("update: values", &[rows, cols])?, p.len())?;
        same("update: gradient", p.len(), g.len())?;
        let (sizes, [m, v], [a, b]) = (u.rule.state(rows, cols), state.reals, state.codes);
        same("update: first state", sizes.reals[0], m.len())?;
        same("update: second state", sizes.reals[1], v.len())?;
        same("update: codes of first moments", sizes.codes[0], a.len())?;
        same("update: codes of second moments", sizes.codes[1], b.len())?;
        let codes = [self.words("update", a)?, self.words("update", b)?];
        disjoint("update", &[], &codes)?;
        self.apart("update", [p, g, m, v])
    }
}

/// Sizes of an attention: width of all heads of queries, and of keys and values; queries and keys
/// of all samples.
struct Heads {
    width: usize,
    kv_width: usize,
    queries: usize,
    keys: usize,
}

impl Heads {
    fn new(a: &Attention, chunk: &Chunk) -> Result<Self> {
        let width = product("attention: width", &[a.heads, a.head_dim])?;
        let kv_width = product("attention: width", &[a.kv_heads, a.head_dim])?;
        let divides = a.heads.checked_rem(a.kv_heads).map_or(a.heads == 0, |rest| rest == 0);
        if !divides {
            let possible = "a divisor of the heads of queries";
            return Err(Error::setting("heads of keys", a.kv_heads as f64, possible));
        }
        if a.mask == Mask::Sliding(0) {
            return Err(Error::setting("sliding window", 0.0, "1 or more"));
        }
        let queries = product("attention: queries", &[chunk.samples, a.queries])?;
        let keys = product("attention: keys", &[chunk.samples, a.keys])?;
        if a.mask != Mask::Full {
            same("masked attention: keys", a.queries, a.keys)?;
        }
        Ok(Self { width, kv_width, queries, keys })
    }
}
