//! What ranks tell each other besides gradients, in a few words.

use bdia_core::{Fault, Site};

/// Words that every rank sends before anything else.
pub(crate) const HEADER: usize = 12;
/// Of them, those that are the same on every rank: what is asked for, which request it is, and its
/// length (two).
pub(crate) const SAME: usize = 4;

pub(crate) type Header = [u32; HEADER];

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Numbers = 1,
    Gradients = 2,
    /// A piece of what rank 0 has for all.
    Text = 3,
}

/// What rank 0 has for all, piece by piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Piece<'a> {
    /// It is not there yet.
    Soon,
    /// Up to [`PIECE`] bytes of it.
    Part(&'a [u8]),
    /// The last ones.
    End(&'a [u8]),
}

/// Bytes of a piece.
pub(crate) const PIECE: usize = 4 * (HEADER - SAME - 1);

const fn halves(x: u64) -> [u32; 2] {
    [x as u32, (x >> 32) as u32]
}

const fn whole(low: u32, high: u32) -> u64 {
    low as u64 | (high as u64) << 32
}

/// The head of request number `sequence`, about `len` values.
pub(crate) fn header(kind: Kind, sequence: u32, len: usize, rest: [u32; HEADER - SAME]) -> Header {
    let mut words = [0; HEADER];
    let [low, high] = halves(len as u64);
    words[..SAME].copy_from_slice(&[kind as u32, sequence, low, high]);
    words[SAME..].copy_from_slice(&rest);
    words
}

/// Four numbers as words.
pub(crate) fn numbers(x: [f64; 4]) -> [u32; HEADER - SAME] {
    let mut words = [0; HEADER - SAME];
    for (pair, x) in words.chunks_exact_mut(2).zip(x) {
        pair.copy_from_slice(&halves(x.to_bits()));
    }
    words
}

/// The numbers of a header.
pub(crate) fn numbers_of(header: &[u32]) -> [f64; 4] {
    core::array::from_fn(|i| f64::from_bits(whole(header[SAME + 2 * i], header[SAME + 2 * i + 1])))
}

/// A piece as words: what it is and its length, and its bytes.
pub(crate) fn piece(piece: Piece<'_>) -> [u32; HEADER - SAME] {
    let (code, bytes) = match piece {
        Piece::Soon => (0, &[][..]),
        Piece::Part(bytes) => (1, bytes),
        Piece::End(bytes) => (2, bytes),
    };
    let mut words = [0; HEADER - SAME];
    words[0] = code << 8 | bytes.len() as u32;
    for (word, bytes) in words[1..].iter_mut().zip(bytes.chunks(4)) {
        let mut four = [0; 4];
        four[..bytes.len()].copy_from_slice(bytes);
        *word = u32::from_le_bytes(four);
    }
    words
}

/// The piece of a header, with room for its bytes; what no rank writes is none.
pub(crate) fn piece_of<'a>(header: &[u32], room: &'a mut [u8; PIECE]) -> Option<Piece<'a>> {
    let (&head, words) = header[SAME..].split_first()?;
    for (four, word) in room.chunks_exact_mut(4).zip(words) {
        four.copy_from_slice(&word.to_le_bytes());
    }
    let bytes = room.get(..(head & 0xFF) as usize)?;
    match head >> 8 {
        0 => Some(Piece::Soon),
        1 => Some(Piece::Part(bytes)),
        2 => Some(Piece::End(bytes)),
        _ => None,
    }
}

/// A status as words: what it is, where, and its numbers.
pub(crate) fn fault(fault: Option<Fault>) -> [u32; HEADER - SAME] {
    let site = |site| match site {
        Site::Embedding => [0, 0],
        Site::Block(k) => [1, k as u32],
        Site::Head => [2, 0],
    };
    let (code, [a, b], index, value, last) = match fault {
        None => (0, [0; 2], 0, 0, 0),
        Some(Fault::Range { site: s, sample, value }) => (1, site(s), sample, value.to_bits(), 0),
        Some(Fault::Checksum { activation, block }) => (2, [block as u32, 0], activation, 0, 0),
        Some(Fault::Gradient { site: s }) => (3, site(s), 0, 0, 0),
        Some(Fault::Loss { sample, value }) => (4, [0; 2], sample, value.to_bits(), 0),
        Some(Fault::Token { sample, value, vocab }) => {
            (5, [0; 2], sample, u64::from(value as u32), vocab)
        }
        Some(Fault::ActivationGradient { site: s, sample, value }) => {
            (6, site(s), sample, value.to_bits(), 0)
        }
        Some(Fault::Input { site: s, sample }) => (7, site(s), sample, 0, 0),
        Some(Fault::Position { sample, value, positions }) => {
            (8, [0; 2], sample, u64::from(value as u32), positions)
        }
    };
    let ([i, _], [low, high]) = (halves(index as u64), halves(value));
    [code, a, b, i, low, high, last as u32, 0]
}

/// The status that a header tells; what no rank writes is none.
pub(crate) fn fault_of(header: &[u32]) -> Option<Fault> {
    let &[code, a, b, index, low, high, last, _] = header[SAME..].first_chunk()?;
    let site = match a {
        1 => Site::Block(b as usize),
        2 => Site::Head,
        _ => Site::Embedding,
    };
    let (sample, value) = (index as usize, f64::from_bits(whole(low, high)));
    Some(match code {
        1 => Fault::Range { site, sample, value },
        2 => Fault::Checksum { activation: sample, block: a as usize },
        3 => Fault::Gradient { site },
        4 => Fault::Loss { sample, value },
        5 => Fault::Token { sample, value: low as i32, vocab: last as usize },
        6 => Fault::ActivationGradient { site, sample, value },
        7 => Fault::Input { site, sample },
        8 => Fault::Position { sample, value: low as i32, positions: last as usize },
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_told_is_what_was_meant() {
        for f in [
            Fault::Range { site: Site::Block(70_000), sample: 3, value: f64::NEG_INFINITY },
            Fault::Range { site: Site::Embedding, sample: 0, value: 1e300 },
            Fault::Checksum { activation: 12, block: 13 },
            Fault::Gradient { site: Site::Head },
            Fault::Loss { sample: 7, value: -0.0 },
            Fault::Token { sample: 1, value: -19, vocab: 50_257 },
            Fault::ActivationGradient { site: Site::Head, sample: 2, value: f64::INFINITY },
            Fault::Input { site: Site::Block(9), sample: 4 },
            Fault::Position { sample: 2, value: 8192, positions: 8192 },
        ] {
            assert_eq!(fault_of(&header(Kind::Gradients, 1, 5, fault(Some(f)))), Some(f));
        }
        assert_eq!(fault_of(&header(Kind::Gradients, 1, 5, fault(None))), None);
        let all: Vec<u8> = (200..=255).collect();
        for p in [
            Piece::Soon,
            Piece::Part(&all[..PIECE]),
            Piece::Part(&all[..5]),
            Piece::End(&all[..PIECE]),
            Piece::End(&[]),
        ] {
            let words = header(Kind::Text, 1, 0, piece(p));
            assert_eq!(piece_of(&words, &mut [0; PIECE]), Some(p));
        }
        let x = [1.5, -0.0, f64::INFINITY, 9_007_199_254_740_993.0];
        assert_eq!(numbers_of(&header(Kind::Numbers, u32::MAX, usize::MAX, numbers(x))), x);
    }
}
