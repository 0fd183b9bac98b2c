//! The deferred status: what kernels report, and the fault that the host makes of it.

use bdia_core::{Fault, Site};

use crate::span::{Report, Status};

/// No operation.
pub(crate) const NONE: u32 = u32::MAX;
/// Indices that fit a report.
pub(crate) const MOST: usize = 1 << 30;

/// What an operation's fault is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Code {
    Range = 0,
    Checksum = 1,
    Gradient = 2,
    Loss = 3,
    Token = 4,
    /// The fault is kept on the host.
    Host = 5,
    ActivationGradient = 6,
    Input = 7,
    Position = 8,
}

/// What an operation says about its faults, before the backend fills in where they go.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cause {
    pub code: Code,
    pub site: Site,
    /// First sample of the chunk; for a checksum, the activation.
    pub first: usize,
    /// Elements (or rows) of a sample.
    pub per: usize,
    /// The size of the vocabulary, or of the table of positions.
    pub vocab: usize,
    pub frac_bits: u32,
}

impl Cause {
    pub(crate) const fn new(code: Code, site: Site) -> Self {
        Self { code, site, first: 0, per: 0, vocab: 0, frac_bits: 0 }
    }

    pub(crate) fn report(self, status: u64, seq: u32) -> Report {
        let (site_kind, site) = match self.site {
            Site::Embedding => (0, 0),
            Site::Block(k) => (1, k as u64),
            Site::Head => (2, 0),
        };
        Report {
            status,
            seq,
            code: self.code as u32,
            site_kind,
            frac_bits: self.frac_bits,
            site,
            first: self.first as u64,
            per: self.per as u64,
            vocab: self.vocab as u64,
        }
    }
}

/// The fault that a status says; `raised` is the host's own, with the number of its operation.
pub(crate) fn fault(s: &Status, raised: Option<(u32, Fault)>) -> Option<Fault> {
    if s.owner == NONE {
        return None;
    }
    if let Some((seq, fault)) = raised
        && seq == s.owner
    {
        return Some(fault);
    }
    let site = match s.site_kind {
        0 => Site::Embedding,
        1 => Site::Block(s.site as usize),
        _ => Site::Head,
    };
    let (index, kind, payload) = (s.detail >> 34, s.detail >> 32 & 3, s.detail as u32);
    let sample = (s.first as usize).wrapping_add(index.checked_div(s.per).unwrap_or(0) as usize);
    let value = match kind {
        1 => f64::from(payload as i32) / f64::from(1_u32 << s.frac_bits.min(31)),
        _ => f64::from(f32::from_bits(payload)),
    };
    Some(match s.code {
        code if code == Code::Position as u32 => {
            Fault::Position { sample, value: payload as i32, positions: s.vocab as usize }
        }
        _ if kind == 2 => Fault::Token { sample, value: payload as i32, vocab: s.vocab as usize },
        code if code == Code::Checksum as u32 => {
            Fault::Checksum { activation: s.first as usize, block: s.site as usize }
        }
        code if code == Code::Gradient as u32 => Fault::Gradient { site },
        code if code == Code::Loss as u32 => Fault::Loss { sample, value },
        code if code == Code::Input as u32 => Fault::Input { site, sample },
        code if code == Code::ActivationGradient as u32 => {
            Fault::ActivationGradient { site, sample, value }
        }
        _ => Fault::Range { site, sample, value },
    })
}
