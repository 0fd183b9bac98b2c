//! Beam search: the continuations of one prompt, chosen token by token from whatever gives logits.
//!
//! A program runs its model on the rows of all prompts together and hands each prompt's logits to
//! its [`Search`], which says what every row goes on with. With one beam the most likely token is
//! taken every time.

use bdia_core::Real;

/// How hypotheses of `n` tokens with probability `p` are compared. The end is one of the tokens.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Length {
    /// `log p / ((5 + n) / 6)^α` (Wu et al., 2016, equation 14).
    Gnmt(f64),
    /// `log p / n^α`: `length_penalty` of transformers. More than 0 favours long ones.
    Power(f64),
}

impl Length {
    fn score(self, log_p: f64, n: usize) -> f64 {
        let n = n as f64;
        log_p
            / match self {
                Self::Gnmt(alpha) => ((5.0 + n) / 6.0).powf(alpha),
                Self::Power(alpha) => n.powf(alpha),
            }
    }
}

/// When a search is over before the last token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// As soon as as many hypotheses have ended as there are beams. What has not ended counts only
    /// where nothing has.
    Full,
    /// When as many have ended, and the best of those that go on is not better than the worst of
    /// them, at its present length: `early_stopping=False` of transformers. At the last token all
    /// have ended.
    NoBetter,
}

/// How a prompt is searched.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// Hypotheses that go on side by side.
    pub beams: usize,
    /// How they are compared once they have ended.
    pub length: Length,
    /// When the search is over.
    pub stop: Stop,
    /// Most tokens, with the end.
    pub tokens: usize,
    /// The tokens that end a hypothesis. They are not part of the result.
    pub ends: Vec<i32>,
    /// No `n` tokens of prompt and hypothesis occur twice in a row of this length; 0 for no such
    /// rule.
    pub no_repeat: usize,
}

/// A hypothesis that goes on.
#[derive(Debug, Clone, PartialEq, Default)]
struct Hypothesis {
    tokens: Vec<i32>,
    /// `log p`.
    score: f64,
    /// The row that its next logits come from.
    row: usize,
}

/// The search for the continuation of one prompt.
#[derive(Debug, Clone)]
pub struct Search {
    settings: Settings,
    prompt: Vec<i32>,
    live: Vec<Hypothesis>,
    /// Score and tokens of those that have ended, best first.
    done: Vec<(f64, Vec<i32>)>,
    /// Tokens of those that go on.
    length: usize,
}

impl Search {
    /// A search that begins: all rows are the prompt's. `prompt` is looked at for repeated tokens
    /// only.
    pub fn new(settings: Settings, prompt: &[i32]) -> Self {
        let live = if settings.tokens == 0 { Vec::new() } else { vec![Hypothesis::default()] };
        let prompt = if settings.no_repeat > 0 { prompt.to_vec() } else { Vec::new() };
        Self { settings, prompt, live, done: Vec::new(), length: 0 }
    }

    /// Whether the result is known.
    pub const fn finished(&self) -> bool {
        self.live.is_empty()
    }

    /// How many tokens have been taken.
    pub const fn length(&self) -> usize {
        self.length
    }

    /// Tokens of the hypothesis that goes on in each row.
    pub fn rows(&self) -> impl Iterator<Item = &[i32]> {
        self.live.iter().map(|h| h.tokens.as_slice())
    }

    /// Takes one more token for every hypothesis. `logits` is `[beams, vocab]`; where the search
    /// begins only the first row is read. Tokens in `never` are not chosen. Row `r` goes on with
    /// `tokens[r]` after what row `order[r]` was; rows that no hypothesis has keep theirs.
    pub fn advance<R: Real>(
        &mut self,
        logits: &[R],
        never: &[i32],
        order: &mut [usize],
        tokens: &mut [i32],
    ) {
        let beams = self.settings.beams;
        order.iter_mut().zip(0..).for_each(|(from, row)| *from = row);
        if self.finished() {
            return;
        }
        let next = self.candidates(logits, never);
        let before = core::mem::take(&mut self.live);
        if next.is_empty() {
            // Every token is ruled out: they end as they are.
            before.into_iter().for_each(|h| self.end(h));
            return;
        }
        self.length += 1;
        let last = self.length == self.settings.tokens;
        for (rank, (mut hypothesis, token)) in next.into_iter().enumerate() {
            let end = self.settings.ends.contains(&token);
            if end || (last && self.settings.stop == Stop::NoBetter) {
                // An end that is not among the best is not worth more than what goes on.
                if rank < beams {
                    if !end {
                        hypothesis.tokens.push(token);
                    }
                    self.end(hypothesis);
                }
                continue;
            }
            if self.live.len() == beams {
                break;
            }
            let row = self.live.len();
            (order[row], tokens[row]) = (hypothesis.row, token);
            hypothesis.tokens.push(token);
            hypothesis.row = row;
            self.live.push(hypothesis);
        }
        let full = self.done.len() >= beams;
        if last || (full && (self.settings.stop == Stop::Full || !self.improvable())) {
            let rest = core::mem::take(&mut self.live);
            if self.done.is_empty() {
                rest.into_iter().for_each(|h| self.end(h));
            }
        }
    }

    /// The best continuation, or the best that there is so far, without its end.
    pub fn best(self) -> Vec<i32> {
        let first = self.live.into_iter().next().map(|h| h.tokens);
        self.done.into_iter().next().map(|(_, tokens)| tokens).or(first).unwrap_or_default()
    }

    /// Keeps an ended hypothesis if it is among the best.
    fn end(&mut self, hypothesis: Hypothesis) {
        let score = self.settings.length.score(hypothesis.score, self.length);
        let at = self.done.partition_point(|d| d.0 >= score);
        self.done.insert(at, (score, hypothesis.tokens));
        self.done.truncate(self.settings.beams);
    }

    /// Whether the best of those that go on would be among the ended ones, if it ended with what it
    /// has.
    fn improvable(&self) -> bool {
        let best = self.live.first().map(|h| self.settings.length.score(h.score, self.length));
        matches!((best, self.done.last()), (Some(best), Some(worst)) if best > worst.0)
    }

    /// The best continuations, best first: twice as many as beams, since some may end.
    fn candidates<R: Real>(&self, logits: &[R], never: &[i32]) -> Vec<(Hypothesis, i32)> {
        let (beams, vocab) = (self.settings.beams, logits.len() / self.settings.beams.max(1));
        let wanted = 2 * beams;
        let mut best: Vec<(f64, usize, i32)> = Vec::with_capacity(wanted + 1);
        for (i, hypothesis) in self.live.iter().enumerate() {
            let row = &logits[hypothesis.row * vocab..(hypothesis.row + 1) * vocab];
            // With one hypothesis the normalizer changes no order.
            let normalizer = if beams == 1 {
                0.0
            } else {
                let most = row.iter().map(|x| x.wide()).fold(f64::NEG_INFINITY, f64::max);
                most + row.iter().map(|x| (x.wide() - most).exp()).sum::<f64>().ln()
            };
            let repeated = repeats(self.settings.no_repeat, &self.prompt, &hypothesis.tokens);
            for (token, x) in (0..).zip(row) {
                let score = hypothesis.score + (x.wide() - normalizer);
                if (best.len() == wanted && score <= best[wanted - 1].0)
                    || never.contains(&token)
                    || repeated.contains(&token)
                {
                    continue;
                }
                let at = best.partition_point(|b| b.0 >= score);
                best.insert(at, (score, i, token));
                best.truncate(wanted);
            }
        }
        best.into_iter()
            .map(|(score, i, token)| {
                let Hypothesis { tokens, row, .. } = &self.live[i];
                (Hypothesis { tokens: tokens.clone(), score, row: *row }, token)
            })
            .collect()
    }
}

/// The tokens that would make the last `n` tokens of `prompt` and `tokens` a repetition of earlier
/// ones; none for `n` = 0.
pub fn repeats(n: usize, prompt: &[i32], tokens: &[i32]) -> Vec<i32> {
    let all = [prompt, tokens].concat();
    let Some(before) = n.checked_sub(1).filter(|&before| before <= all.len()) else {
        return Vec::new();
    };
    let last = &all[all.len() - before..];
    all.windows(n).filter(|w| &w[..before] == last).map(|w| w[before]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings() -> Settings {
        Settings {
            beams: 2,
            length: Length::Power(1.0),
            stop: Stop::NoBetter,
            tokens: 3,
            ends: vec![0],
            no_repeat: 0,
        }
    }

    /// Searches where the probabilities of the next token depend on the last one only; token 1
    /// comes before the first.
    fn search(settings: Settings, table: &[&[f64]]) -> Vec<i32> {
        let (mut tokens, mut order) = (vec![1; settings.beams], vec![0; settings.beams]);
        let mut search = Search::new(settings, &[]);
        while !search.finished() {
            let logits: Vec<f64> =
                tokens.iter().flat_map(|&t| table[t as usize].iter().map(|p| p.ln())).collect();
            search.advance(&logits, &[], &mut order, &mut tokens);
        }
        search.best()
    }

    /// After 1 the end has 0.3, token 1 0.4 and token 2 0.3; after 2 the end is nearly sure.
    const TABLE: [&[f64]; 3] = [&[1.0, 0.0, 0.0], &[0.3, 0.4, 0.3], &[0.98, 0.01, 0.01]];

    #[test]
    fn a_beam_finds_what_greed_passes() {
        let greedy = Settings { beams: 1, ..settings() };
        assert_eq!(search(greedy, &TABLE), [1, 1, 1]);
        // 0.3·0.98 in two tokens against 0.4·0.4·0.4 in three; and 0.3 in one, which is less by
        // length.
        assert_eq!(search(settings(), &TABLE), [2]);
        // Without a regard for length the end alone has more.
        assert_eq!(
            search(Settings { beams: 3, length: Length::Power(0.0), ..settings() }, &TABLE),
            [0_i32; 0]
        );
    }

    #[test]
    fn the_last_token_ends_everything_or_nothing() {
        // The end is never likely: nothing has ended at the last token.
        let table: [&[f64]; 3] = [&[1.0, 0.0, 0.0], &[0.0001, 0.0999, 0.9], &[0.0001, 0.9, 0.0999]];
        for stop in [Stop::Full, Stop::NoBetter] {
            assert_eq!(search(Settings { stop, ..settings() }, &table), [2, 1, 2], "{stop:?}");
        }
        // A bad end at once, a good hypothesis without one.
        let table: [&[f64]; 3] = [&[1.0, 0.0, 0.0], &[0.1, 0.0, 0.9], &[0.0, 0.0, 1.0]];
        assert_eq!(
            search(Settings { stop: Stop::Full, tokens: 2, ..settings() }, &table),
            [0_i32; 0]
        );
        assert_eq!(search(Settings { tokens: 2, ..settings() }, &table), [2, 2]);
        assert_eq!(search(Settings { tokens: 0, ..settings() }, &table), [0_i32; 0]);
    }

    #[test]
    fn what_may_not_be_repeated() {
        assert_eq!(repeats(2, &[1, 2, 1, 3], &[1]), [2, 3]);
        assert_eq!(repeats(1, &[1, 2], &[5]), [1, 2, 5]);
        assert_eq!(repeats(3, &[1, 2], &[]), [0_i32; 0]);
        assert_eq!(repeats(0, &[1, 1], &[1]), [0_i32; 0]);
        // 1 is not followed by 1 again; of two equals it is the lower.
        let own = Settings { beams: 1, no_repeat: 2, tokens: 4, ends: Vec::new(), ..settings() };
        assert_eq!(search(own.clone(), &TABLE), [1, 1, 0, 0]);
        // Of three tokens none is left for the fourth.
        assert_eq!(search(Settings { no_repeat: 1, ..own }, &TABLE), [1, 0, 2]);
    }

    #[test]
    fn tokens_that_are_never_chosen() {
        let mut search = Search::new(settings(), &[]);
        let (mut tokens, mut order) = ([7; 2], [7; 2]);
        search.advance(&[0.0, 3.0, 2.0, 1.0, 9.0, 9.0, 9.0, 9.0], &[1, 0], &mut order, &mut tokens);
        assert_eq!((tokens, order), ([2, 3], [0, 0]));
        assert_eq!(search.rows().collect::<Vec<_>>(), [[2], [3]]);
    }
}
