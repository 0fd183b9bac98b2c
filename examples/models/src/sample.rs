//! The next token from logits: temperature, top-k, top-p.

use bdia_core::rng::Stream;

/// How a token is chosen. The filters apply in this order, as in Hugging Face: temperature, top-k,
/// top-p.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampler {
    /// Logits are divided by it; 0 takes the most likely token.
    pub temperature: f64,
    /// Only the `top_k` most likely tokens; 0 for all.
    pub top_k: usize,
    /// Only the most likely tokens that together have this probability; 1 for all.
    pub top_p: f64,
}

/// Why no token could be chosen.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
pub enum SampleError {
    /// There is nothing to choose from.
    #[error("no logits: expected one for each token of the vocabulary")]
    Empty,
    /// A logit is NaN or infinite.
    #[error(
        "the logit of token {token} is {value}, expected a finite number; the model's weights are \
         not usable"
    )]
    NotFinite {
        /// The token.
        token: usize,
        /// Its logit.
        value: f32,
    },
}

impl Sampler {
    /// Always the most likely token.
    pub const GREEDY: Self = Self { temperature: 0.0, top_k: 0, top_p: 1.0 };

    /// Chooses a token. The random number is element `element` of `stream` (a
    /// [`Draw::Sample`](bdia_core::rng::Draw) stream; the position in the text is the natural
    /// element). `order` is scratch, kept to save allocations. Among equal logits the lower token
    /// comes first.
    ///
    /// # Errors
    /// [`SampleError`]
    pub fn choose(
        &self,
        logits: &[f32],
        stream: &Stream,
        element: u32,
        order: &mut Vec<u32>,
    ) -> Result<u32, SampleError> {
        if let Some(token) = logits.iter().position(|l| !l.is_finite()) {
            return Err(SampleError::NotFinite { token, value: logits[token] });
        }
        let (mut best, mut top) = (0, *logits.first().ok_or(SampleError::Empty)?);
        for (token, &l) in logits.iter().enumerate() {
            if l > top {
                (best, top) = (token, l);
            }
        }
        if self.temperature <= 0.0 || self.top_k == 1 {
            return Ok(best as u32);
        }
        let weight = |token: u32| {
            ((f64::from(logits[token as usize]) - f64::from(top)) / self.temperature).exp()
        };
        order.clear();
        order.extend(0..logits.len() as u32);
        let falling =
            |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
        if self.top_k > 0 && self.top_k < order.len() {
            order.select_nth_unstable_by(self.top_k - 1, falling);
            order.truncate(self.top_k);
        }
        order.sort_unstable_by(falling);
        let mut total: f64 = order.iter().map(|&t| weight(t)).sum();
        if self.top_p < 1.0 {
            // The token that crosses the border still belongs, so at least one remains.
            let (mut kept, mut sum) = (0, 0.0);
            while kept < order.len() && (kept == 0 || sum < self.top_p * total) {
                sum += weight(order[kept]);
                kept += 1;
            }
            order.truncate(kept);
            total = sum;
        }
        let mut rest = stream.uniform(element) * total;
        for &token in order.iter() {
            rest -= weight(token);
            if rest < 0.0 {
                return Ok(token);
            }
        }
        // Rounding in the sum can leave a rest of nothing.
        Ok(order.last().copied().unwrap_or(best as u32))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bdia_core::rng::Draw;

    fn counts(sampler: Sampler, logits: &[f32], n: u32) -> Vec<u32> {
        let stream = Stream::new(3, 0, 0, 0, 0, Draw::Sample);
        let (mut counts, mut order) = (vec![0; logits.len()], Vec::new());
        for i in 0..n {
            counts[sampler.choose(logits, &stream, i, &mut order).unwrap() as usize] += 1;
        }
        counts
    }

    #[test]
    fn greedy_takes_the_first_of_the_largest() {
        assert_eq!(counts(Sampler::GREEDY, &[0.0, 2.0, 2.0, -1.0], 5), [0, 5, 0, 0]);
        assert_eq!(
            counts(Sampler { temperature: 1.0, top_k: 1, top_p: 1.0 }, &[0.0, 2.0], 5),
            [0, 5]
        );
    }

    #[test]
    fn frequencies_are_the_softmax() {
        let logits = [0.0, 1.0, 2.0, -3.0];
        let n = 20_000;
        let c = counts(Sampler { temperature: 2.0, top_k: 0, top_p: 1.0 }, &logits, n);
        let total: f64 = logits.iter().map(|l| (f64::from(*l) / 2.0).exp()).sum();
        for (l, c) in logits.iter().zip(c) {
            let p = (f64::from(*l) / 2.0).exp() / total;
            let sd = (p * (1.0 - p) / f64::from(n)).sqrt();
            assert!((f64::from(c) / f64::from(n) - p).abs() < 5.0 * sd, "{l}: {c}");
        }
    }

    #[test]
    fn filters() {
        let logits = [0.0, 1.0, 2.0, 1.0];
        let c = counts(Sampler { temperature: 1.0, top_k: 2, top_p: 1.0 }, &logits, 500);
        assert!(c[0] == 0 && c[3] == 0 && c[1] > 0 && c[2] > 0, "{c:?}");
        // p = 0.07, 0.20, 0.53, 0.20: 0.6 is crossed by the second, which of two equals is the
        // lower token.
        let c = counts(Sampler { temperature: 1.0, top_k: 0, top_p: 0.6 }, &logits, 500);
        assert!(c[0] == 0 && c[3] == 0 && c[1] > 0 && c[2] > 0, "{c:?}");
        assert_eq!(
            counts(Sampler { temperature: 1.0, top_k: 0, top_p: 1e-9 }, &logits, 9),
            [0, 0, 9, 0]
        );
        assert_eq!(
            counts(Sampler { temperature: 1e-300, top_k: 99, top_p: 1.0 }, &logits, 9),
            [0, 0, 9, 0]
        );
    }

    #[test]
    fn unusable_logits() {
        let stream = Stream::new(0, 0, 0, 0, 0, Draw::Sample);
        let mut order = Vec::new();
        let error = Sampler::GREEDY.choose(&[0.0, f32::NAN], &stream, 0, &mut order).unwrap_err();
        assert!(error.to_string().contains("token 1"), "{error}");
        assert_eq!(Sampler::GREEDY.choose(&[], &stream, 0, &mut order), Err(SampleError::Empty));
    }
}
