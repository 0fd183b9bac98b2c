//! BLEU (Papineni et al., 2002) and chrF (Popović, 2015) of a corpus, with the settings that sacreBLEU has by default.
//!
//! BLEU: tokenization `13a` (that of the evaluation script mteval-v13a), n-grams up to 4, precisions without a match
//! smoothed exponentially: the first counts as half a match, the next as a quarter, and so on. chrF: character n-grams up to
//! 6 without white space, recall counting twice as much as precision, averaged over the orders that occur.

use core::hash::Hash;
use std::collections::HashMap;

/// Counts of one corpus for BLEU.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Counts {
    matches: [u64; 4],
    total: [u64; 4],
    hypothesis: u64,
    reference: u64,
}

/// White space as Python's `str.split` sees it, where text cannot hold a line break.
fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}

/// What `13a` separates wherever it is: ASCII punctuation but the apostrophe, the comma, the hyphen and the full stop.
fn is_punctuation(c: char) -> bool {
    matches!(c, ' '..='&' | '('..='+' | ':'..='@' | '/' | '['..='`' | '{'..='~')
}

/// The words of a segment in the sense of `13a`.
pub fn words(segment: &str) -> Vec<String> {
    let mut text = segment.trim_end_matches(is_space).replace("<skipped>", "").replace("-\n", "").replace('\n', " ");
    for (entity, character) in [("&quot;", "\""), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">")] {
        text = text.replace(entity, character);
    }
    let mut chars: Vec<char> = core::iter::once(' ').chain(text.chars()).chain([' ']).collect();
    // Every rule goes over the whole text, from left to right, and on behind what it has replaced.
    let mut out = Vec::new();
    for &c in &chars {
        if is_punctuation(c) { out.extend([' ', c, ' ']) } else { out.push(c) }
    }
    chars = out;
    let stop = |c: char| c == '.' || c == ',';
    // A full stop or comma that does not follow a digit; then one that no digit follows; then a hyphen after a digit.
    chars = replaced(&chars, |a, b| (!a.is_ascii_digit() && stop(b)).then_some([a, ' ', b, ' ']));
    chars = replaced(&chars, |a, b| (stop(a) && !b.is_ascii_digit()).then_some([' ', a, ' ', b]));
    chars = replaced(&chars, |a, b| (a.is_ascii_digit() && b == '-').then_some([a, ' ', b, ' ']));
    let text: String = chars.into_iter().collect();
    text.split(is_space).filter(|w| !w.is_empty()).map(str::to_owned).collect()
}

/// Replaces pairs of neighbours.
fn replaced(chars: &[char], rule: impl Fn(char, char) -> Option<[char; 4]>) -> Vec<char> {
    let (mut out, mut i) = (Vec::with_capacity(chars.len() + 16), 0);
    while i < chars.len() {
        match chars.get(i + 1).and_then(|&b| rule(chars[i], b)) {
            Some(new) => {
                out.extend(new);
                i += 2;
            }
            None => {
                out.push(chars[i]);
                i += 1;
            }
        }
    }
    out
}

fn ngrams<T: Hash + Eq>(items: &[T], n: usize) -> HashMap<&[T], u64> {
    let mut counts = HashMap::new();
    for gram in items.windows(n) {
        *counts.entry(gram).or_insert(0) += 1;
    }
    counts
}

/// How many n-grams both have.
fn common<T: Hash + Eq>(a: &HashMap<&[T], u64>, b: &HashMap<&[T], u64>) -> u64 {
    a.iter().map(|(gram, n)| b.get(gram).map_or(0, |m| *n.min(m))).sum()
}

/// BLEU of hypotheses against one reference each, 0 to 100.
pub fn bleu<'a>(pairs: impl IntoIterator<Item = (&'a str, &'a str)>) -> f64 {
    let mut c = Counts::default();
    for (hypothesis, reference) in pairs {
        let (h, r) = (words(hypothesis), words(reference));
        c.hypothesis += h.len() as u64;
        c.reference += r.len() as u64;
        for n in 1..=4 {
            c.matches[n - 1] += common(&ngrams(&h, n), &ngrams(&r, n));
            c.total[n - 1] += (h.len() + 1).saturating_sub(n) as u64;
        }
    }
    // Without a single match there is nothing to smooth.
    if c.matches.iter().all(|&m| m == 0) {
        return 0.0;
    }
    let (mut logs, mut smooth) = (0.0, 1.0);
    for (&matches, &total) in c.matches.iter().zip(&c.total) {
        if total == 0 {
            return 0.0;
        }
        let precision = if matches == 0 {
            smooth *= 2.0;
            100.0 / (smooth * total as f64)
        } else {
            100.0 * matches as f64 / total as f64
        };
        logs += precision.ln();
    }
    let brevity = if c.hypothesis < c.reference { (1.0 - c.reference as f64 / c.hypothesis as f64).exp() } else { 1.0 };
    brevity * (logs / 4.0).exp()
}

/// chrF of hypotheses against one reference each, 0 to 100.
pub fn chrf<'a>(pairs: impl IntoIterator<Item = (&'a str, &'a str)>) -> f64 {
    /// n-grams of the hypothesis, of the reference, of both.
    #[derive(Clone, Copy, Default)]
    struct Order {
        hypothesis: u64,
        reference: u64,
        both: u64,
    }
    let mut orders = [Order::default(); 6];
    for (hypothesis, reference) in pairs {
        let [h, r] = [hypothesis, reference].map(|s| s.chars().filter(|&c| !is_space(c)).collect::<Vec<_>>());
        for (n, order) in (1..).zip(&mut orders) {
            // What is longer than its whole reference is not counted against the hypothesis.
            if r.len() >= n {
                order.hypothesis += (h.len() + 1).saturating_sub(n) as u64;
            }
            order.reference += (r.len() + 1).saturating_sub(n) as u64;
            order.both += common(&ngrams(&h, n), &ngrams(&r, n));
        }
    }
    let (mut precision, mut recall, mut used) = (0.0, 0.0, 0.0_f64);
    for o in orders.iter().filter(|o| o.hypothesis > 0 && o.reference > 0) {
        precision += o.both as f64 / o.hypothesis as f64;
        recall += o.both as f64 / o.reference as f64;
        used += 1.0;
    }
    if precision + recall == 0.0 {
        return 0.0;
    }
    let (precision, recall) = (precision / used, recall / used);
    100.0 * 5.0 * precision * recall / (4.0 * precision + recall)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_13a() {
        for (text, expected) in [
            ("Hello, world!", "Hello , world !"),
            ("3.14 and 1,000 but a.b,c", "3.14 and 1,000 but a . b , c"),
            ("10-year e-mail", "10 - year e-mail"),
            ("It's l'eau...", "It's l'eau . . ."),
            ("&quot;x&quot; &amp;lt;", "\" x \" <"),
            ("Attends\u{a0}! «\u{a0}oui\u{202f}»", "Attends ! « oui »"),
            ("a\u{1c}b", "a b"),
            ("", ""),
        ] {
            assert_eq!(words(text).join(" "), expected, "{text}");
        }
    }

    #[test]
    fn perfect_empty_and_hopeless() {
        let same = [("the cat is on the mat", "the cat is on the mat")];
        assert!((bleu(same) - 100.0).abs() < 1e-9 && (chrf(same) - 100.0).abs() < 1e-9);
        assert_eq!((bleu([("", "something")]), chrf([("", "something")])), (0.0, 0.0));
        assert_eq!((bleu([("xyz", "something")]), chrf([])), (0.0, 0.0));
        // Three words have no 4-gram: sacreBLEU gives a corpus of them 0 too.
        assert_eq!(bleu([("a b c", "a b c")]), 0.0);
    }
}
