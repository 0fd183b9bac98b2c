//! Scores of text against references: BLEU, chrF, NIST, METEOR, ROUGE-L, CIDEr.
//!
//! * **BLEU** (Papineni et al., 2002) with the settings that sacreBLEU has by default: n-grams up
//!   to 4, precisions without a match smoothed exponentially: the first counts as half a match, the
//!   next as a quarter, and so on. Of several references the one whose length is closest counts for
//!   brevity. 0 to 100.
//! * **chrF** (Popović, 2015), as sacreBLEU: character n-grams up to 6 without white space, recall
//!   counting twice as much as precision, averaged over the orders that occur. 0 to 100.
//! * **NIST** (Doddington, 2002), as mteval-v13a: n-grams up to 5, a match weighs what it tells
//!   beyond its first n-1 words, counted in all references; the length is compared with the mean of
//!   the references'. 0 or more.
//! * **METEOR** (Lavie and Agarwal, 2007) with exact and stem matches, no synonyms, no paraphrases:
//!   stages, alignment and constants (α 0.9, β 3, γ 0.5) of nltk, stems of Snowball's English
//!   stemmer (Porter 2), which the METEOR program has too. The best reference of each segment, the
//!   mean of the segments. 0 to 1.
//! * **ROUGE-L** (Lin, 2004), as coco-caption: longest common subsequence, β 1.2, the best
//!   precision and the best recall over references, the mean of the segments. 0 to 1.
//! * **CIDEr** (Vedantam et al., 2015), as coco-caption, which calls it so (it is the paper's
//!   CIDEr-D): n-grams up to 4 weighed by their rarity among the segments' references, clipped, σ
//!   6. 0 to 10.
//!
//! [`Corpus`] has words; how text becomes words is the caller's choice: [`words`] is the
//! tokenization `13a` (that of mteval-v13a), [`split`] takes text that is tokenized already. Only
//! METEOR disregards case. Sums have a fixed order.

use std::collections::{BTreeMap, HashMap};

use rust_stemmers::{Algorithm, Stemmer};

/// White space as Python's `str.split` sees it, where text cannot hold a line break.
fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}

/// What `13a` separates wherever it is: ASCII punctuation but the apostrophe, the comma, the hyphen
/// and the full stop.
fn is_punctuation(c: char) -> bool {
    matches!(c, ' '..='&' | '('..='+' | ':'..='@' | '/' | '['..='`' | '{'..='~')
}

/// The words of a segment in the sense of `13a`.
pub fn words(segment: &str) -> Vec<String> {
    let mut text = segment
        .trim_end_matches(is_space)
        .replace("<skipped>", "")
        .replace("-\n", "")
        .replace('\n', " ");
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
    // A full stop or comma that does not follow a digit; then one that no digit follows; then a
    // hyphen after a digit.
    chars = replaced(&chars, |a, b| (!a.is_ascii_digit() && stop(b)).then_some([a, ' ', b, ' ']));
    chars = replaced(&chars, |a, b| (stop(a) && !b.is_ascii_digit()).then_some([' ', a, ' ', b]));
    chars = replaced(&chars, |a, b| (a.is_ascii_digit() && b == '-').then_some([a, ' ', b, ' ']));
    let text: String = chars.into_iter().collect();
    split(&text)
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

/// The words of a segment that is tokenized already: what white space separates.
pub fn split(segment: &str) -> Vec<String> {
    segment.split(is_space).filter(|w| !w.is_empty()).map(str::to_owned).collect()
}

/// How often each n-gram occurs.
type Counts<'a, T> = BTreeMap<&'a [T], u64>;

fn ngrams<T: Ord>(items: &[T], n: usize) -> Counts<'_, T> {
    let mut counts = Counts::new();
    for gram in items.windows(n) {
        *counts.entry(gram).or_insert(0) += 1;
    }
    counts
}

/// The n-grams of several references: each as often as in the one that has it most.
fn most_ngrams<T: Ord>(references: &[Vec<T>], n: usize) -> Counts<'_, T> {
    let mut most = Counts::new();
    for reference in references {
        for (gram, count) in ngrams(reference, n) {
            let entry = most.entry(gram).or_insert(0);
            *entry = count.max(*entry);
        }
    }
    most
}

/// How many n-grams both have.
fn common<T: Ord>(a: &Counts<'_, T>, b: &Counts<'_, T>) -> u64 {
    a.iter().map(|(gram, n)| b.get(gram).map_or(0, |m| *n.min(m))).sum()
}

/// How many n-grams a segment of `len` words has.
const fn total(len: usize, n: usize) -> u64 {
    (len + 1).saturating_sub(n) as u64
}

/// What was written, and what might have been, in words.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Segment {
    hypothesis: Vec<String>,
    references: Vec<Vec<String>>,
}

/// Segments with their references.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Corpus(Vec<Segment>);

/// All scores of a corpus but chrF.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scores {
    /// 0 to 100.
    pub bleu: f64,
    /// 0 or more.
    pub nist: f64,
    /// 0 to 1.
    pub meteor: f64,
    /// 0 to 1.
    pub rouge_l: f64,
    /// 0 to 10.
    pub cider: f64,
}

impl Corpus {
    /// Hypotheses, each with one or more references, cut into words by `words`.
    pub fn new<'a, R: IntoIterator<Item = &'a str>>(
        segments: impl IntoIterator<Item = (&'a str, R)>,
        words: impl Fn(&str) -> Vec<String>,
    ) -> Self {
        let segment = |(hypothesis, references): (&'a str, R)| Segment {
            hypothesis: words(hypothesis),
            references: references.into_iter().map(&words).collect(),
        };
        Self(segments.into_iter().map(segment).collect())
    }

    /// All of them.
    pub fn scores(&self) -> Scores {
        Scores {
            bleu: self.bleu(),
            nist: self.nist(),
            meteor: self.meteor(),
            rouge_l: self.rouge_l(),
            cider: self.cider(),
        }
    }

    fn mean(&self, of: impl Fn(&Segment) -> f64) -> f64 {
        self.0.iter().map(of).sum::<f64>() / self.0.len().max(1) as f64
    }

    /// BLEU.
    pub fn bleu(&self) -> f64 {
        let (mut matches, mut totals, mut own, mut wanted) = ([0; 4], [0; 4], 0, 0);
        for Segment { hypothesis, references } in &self.0 {
            let len = hypothesis.len();
            own += len;
            // Of two that are equally close it is the shorter.
            wanted +=
                references.iter().map(Vec::len).min_by_key(|&r| (r.abs_diff(len), r)).unwrap_or(0);
            for n in 1..=4 {
                matches[n - 1] += common(&ngrams(hypothesis, n), &most_ngrams(references, n));
                totals[n - 1] += total(len, n);
            }
        }
        // Without a single match there is nothing to smooth.
        if matches.iter().all(|&m| m == 0) {
            return 0.0;
        }
        let (mut logs, mut smooth) = (0.0, 1.0);
        for (&matches, &total) in matches.iter().zip(&totals) {
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
        let brevity = if own < wanted { (1.0 - wanted as f64 / own as f64).exp() } else { 1.0 };
        brevity * (logs / 4.0).exp()
    }

    /// NIST.
    pub fn nist(&self) -> f64 {
        let all = || self.0.iter().flat_map(|s| &s.references);
        // What n-1 words say about the next: the counts of n-1 words, those of n words.
        let mut before = Counts::from([(&[][..], all().map(|r| r.len() as u64).sum())]);
        let mut score = 0.0;
        for n in 1..=5 {
            let mut counts = Counts::new();
            for gram in all().flat_map(|r| r.windows(n)) {
                *counts.entry(gram).or_insert(0) += 1;
            }
            let information = |gram: &[String]| match (before.get(&gram[..n - 1]), counts.get(gram))
            {
                (Some(&before), Some(&count)) => (before as f64 / count as f64).log2(),
                _ => 0.0,
            };
            let (mut sum, mut grams) = (0.0, 0);
            for Segment { hypothesis, references } in &self.0 {
                let most = most_ngrams(references, n);
                for (gram, count) in ngrams(hypothesis, n) {
                    let matches = most.get(gram).map_or(0, |&m| count.min(m));
                    sum += information(gram) * matches as f64;
                }
                grams += total(hypothesis.len(), n);
            }
            score += sum / grams.max(1) as f64;
            before = counts;
        }
        let own: usize = self.0.iter().map(|s| s.hypothesis.len()).sum();
        let mean = |s: &Segment| {
            s.references.iter().map(Vec::len).sum::<usize>() as f64
                / s.references.len().max(1) as f64
        };
        let ratio = own as f64 / self.0.iter().map(mean).sum::<f64>();
        if ratio >= 1.0 {
            return score;
        }
        // Two thirds of the length halve the score; nothing at all has none.
        let beta = 0.5_f64.ln() / 1.5_f64.ln().powi(2);
        if ratio > 0.0 { score * (beta * ratio.ln().powi(2)).exp() } else { 0.0 }
    }

    /// METEOR with exact and stem matches.
    pub fn meteor(&self) -> f64 {
        let stemmer = Stemmer::create(Algorithm::English);
        let words = |text: &[String]| -> Vec<[String; 2]> {
            let both = |word: &String| {
                let word = word.to_lowercase();
                // The stemmer knows the straight apostrophe only.
                [
                    stemmer
                        .stem(&word.replace(['\u{2018}', '\u{2019}', '\u{201b}'], "'"))
                        .into_owned(),
                    word,
                ]
            };
            text.iter().map(both).collect()
        };
        self.mean(|s| {
            let hypothesis = words(&s.hypothesis);
            s.references.iter().map(|r| meteor(&hypothesis, &words(r))).fold(0.0, f64::max)
        })
    }

    /// ROUGE-L.
    pub fn rouge_l(&self) -> f64 {
        self.mean(|Segment { hypothesis, references }| {
            let (mut precision, mut recall) = (0.0_f64, 0.0_f64);
            for reference in references {
                let common = longest_common(hypothesis, reference) as f64;
                precision = precision.max(common / hypothesis.len().max(1) as f64);
                recall = recall.max(common / reference.len().max(1) as f64);
            }
            let squared = 1.2 * 1.2;
            if precision > 0.0 {
                (1.0 + squared) * precision * recall / (recall + squared * precision)
            } else {
                0.0
            }
        })
    }

    /// CIDEr.
    pub fn cider(&self) -> f64 {
        // In how many segments' references an n-gram occurs.
        let mut documents = Counts::new();
        for s in &self.0 {
            for n in 1..=4 {
                for gram in most_ngrams(&s.references, n).into_keys() {
                    *documents.entry(gram).or_insert(0) += 1;
                }
            }
        }
        let all = (self.0.len() as f64).ln();
        let rarity = |gram: &[String]| all - documents.get(gram).map_or(0.0, |&d| (d as f64).ln());
        self.mean(|Segment { hypothesis, references }| {
            let mut sum = 0.0;
            for n in 1..=4 {
                let (own, own_norm) = weights(hypothesis, n, rarity);
                for reference in references {
                    let (other, norm) = weights(reference, n, rarity);
                    let both = own
                        .iter()
                        .filter_map(|(gram, &w)| other.get(gram).map(|&o| w.min(o) * o))
                        .sum::<f64>();
                    if own_norm > 0.0 && norm > 0.0 {
                        // Lengths are counted in pairs of words.
                        let apart =
                            total(hypothesis.len(), 2) as f64 - total(reference.len(), 2) as f64;
                        sum +=
                            both / (own_norm * norm) * (-apart * apart / (2.0 * 6.0 * 6.0)).exp();
                    }
                }
            }
            10.0 * sum / 4.0 / references.len().max(1) as f64
        })
    }
}

/// How much each n-gram weighs, and the norm of all.
fn weights(
    words: &[String],
    n: usize,
    rarity: impl Fn(&[String]) -> f64,
) -> (BTreeMap<&[String], f64>, f64) {
    let weights: BTreeMap<_, _> =
        ngrams(words, n).into_iter().map(|(g, count)| (g, count as f64 * rarity(g))).collect();
    let norm = weights.values().map(|w| w * w).sum::<f64>().sqrt();
    (weights, norm)
}

/// METEOR of words, each with its stem before it, against one reference.
fn meteor(hypothesis: &[[String; 2]], reference: &[[String; 2]]) -> f64 {
    let mut partner = vec![None; hypothesis.len()];
    let mut taken = vec![false; reference.len()];
    // Words first, then stems of what is left; from the end, each with the last that is free.
    for stage in [1, 0] {
        let mut free: HashMap<&str, Vec<usize>> = HashMap::new();
        for (at, word) in reference.iter().enumerate().filter(|(at, _)| !taken[*at]) {
            free.entry(&word[stage]).or_default().push(at);
        }
        for (word, partner) in
            hypothesis.iter().zip(&mut partner).rev().filter(|(_, partner)| partner.is_none())
        {
            *partner = free.get_mut(word[stage].as_str()).and_then(Vec::pop);
        }
        partner.iter().flatten().for_each(|&at: &usize| taken[at] = true);
    }
    let matches = partner.iter().flatten().count() as f64;
    if matches == 0.0 {
        return 0.0;
    }
    // A chunk goes on where both sides do.
    let chunk_begins =
        |(i, at): (usize, usize)| i == 0 || at == 0 || partner[i - 1] != Some(at - 1);
    let chunks = partner
        .iter()
        .enumerate()
        .filter_map(|(i, p)| p.map(|at| (i, at)))
        .filter(|&p| chunk_begins(p))
        .count();
    let (precision, recall) = (matches / hypothesis.len() as f64, matches / reference.len() as f64);
    let mean = precision * recall / (0.9 * precision + 0.1 * recall);
    (1.0 - 0.5 * (chunks as f64 / matches).powi(3)) * mean
}

/// The length of the longest common subsequence.
fn longest_common<T: PartialEq>(a: &[T], b: &[T]) -> usize {
    // One row of the table: the lengths for all beginnings of `b`.
    let mut row = vec![0; b.len() + 1];
    for x in a {
        let mut diagonal = 0;
        for (j, y) in b.iter().enumerate() {
            let above = row[j + 1];
            row[j + 1] = if x == y { diagonal + 1 } else { above.max(row[j]) };
            diagonal = above;
        }
    }
    row[b.len()]
}

/// BLEU of hypotheses against one reference each, in the words of `13a`.
pub fn bleu<'a>(pairs: impl IntoIterator<Item = (&'a str, &'a str)>) -> f64 {
    Corpus::new(pairs.into_iter().map(|(hypothesis, reference)| (hypothesis, [reference])), words)
        .bleu()
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
        let [h, r] = [hypothesis, reference]
            .map(|s| s.chars().filter(|&c| !is_space(c)).collect::<Vec<_>>());
        for (n, order) in (1..).zip(&mut orders) {
            // What is longer than its whole reference is not counted against the hypothesis.
            if r.len() >= n {
                order.hypothesis += total(h.len(), n);
            }
            order.reference += total(r.len(), n);
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

    #[test]
    fn without_segments_or_references() {
        let zero = Scores { bleu: 0.0, nist: 0.0, meteor: 0.0, rouge_l: 0.0, cider: 0.0 };
        assert_eq!(Corpus::default().scores(), zero);
        assert_eq!(Corpus::new([("a b", vec![])], split).scores(), zero);
        assert_eq!(Corpus::new([("", vec![""])], split).scores(), zero);
    }
}
