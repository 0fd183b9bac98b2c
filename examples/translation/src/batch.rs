//! Batches of about as many tokens each, of sentences of about the same length.

use bdia_core::rng::{Draw, Stream};
use bdia_models::seq2seq::model::{Shape, Tokens};

/// Lengths are rounded up to a multiple of this for the choice of a bucket.
const STEP: usize = 8;

/// Sentences of about the same length.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Bucket {
    /// The most positions of source and target.
    longest: usize,
    /// Samples of a batch.
    samples: usize,
    /// The sentences, by index.
    members: Vec<u32>,
}

/// Which sentences are together: fixed by their lengths, while the order of an epoch is drawn.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batches(Vec<Bucket>);

/// One batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// The most positions that sentences of its bucket have.
    pub longest: usize,
    /// The sentences, by index.
    pub members: Vec<u32>,
}

impl Batches {
    /// Puts sentences into buckets. A batch has at most `tokens` positions on each side, padding
    /// counted, and at least one sample; none is longer than `longest`.
    pub fn new(pairs: &[Tokens], tokens: usize, longest: usize) -> Self {
        let mut buckets: Vec<Bucket> = Vec::new();
        let lengths = |p: &Tokens| p.positions().next_multiple_of(STEP).min(longest);
        let mut used: Vec<usize> = pairs.iter().map(lengths).collect();
        used.sort_unstable();
        used.dedup();
        for longest in used {
            buckets.push(Bucket {
                longest,
                samples: (tokens / longest).max(1),
                members: Vec::new(),
            });
        }
        for (i, p) in pairs.iter().enumerate() {
            if let Ok(at) = buckets.binary_search_by_key(&lengths(p), |b| b.longest) {
                buckets[at].members.push(i as u32);
            }
        }
        Self(buckets)
    }

    /// Batches of an epoch: as many in each.
    pub fn per_epoch(&self) -> usize {
        self.0.iter().map(|b| b.members.len().div_ceil(b.samples)).sum()
    }

    /// The largest batch of every bucket, with `chunk` samples at a time of the longest sentences
    /// that there may be, and as many positions of others.
    pub fn shapes(&self, chunk: usize, longest: usize) -> impl Iterator<Item = Shape> {
        self.0.iter().map(move |b| Shape {
            samples: b.samples.min(b.members.len()),
            source: b.longest,
            target: b.longest,
            chunk: chunk_of(chunk, longest, b.longest),
        })
    }

    /// All batches in a fixed order, as for evaluation.
    pub fn in_order(&self) -> Vec<Batch> {
        let cut =
            |b: &Bucket, members: &[u32]| Batch { longest: b.longest, members: members.to_vec() };
        self.0.iter().flat_map(|b| b.members.chunks(b.samples).map(move |m| cut(b, m))).collect()
    }

    /// The batches of an epoch, drawn by permutations of Fisher and Yates.
    pub fn epoch(&self, seed: u64, epoch: u32) -> Vec<Batch> {
        let stream = |sample: u32| Stream::new(seed, epoch, sample, 0, 0, Draw::Data);
        let mut batches = Vec::new();
        for (n, bucket) in self.0.iter().enumerate() {
            let mut members = bucket.members.clone();
            shuffle(&mut members, &stream(n as u32));
            batches.extend(
                members
                    .chunks(bucket.samples)
                    .map(|m| Batch { longest: bucket.longest, members: m.to_vec() }),
            );
        }
        shuffle(&mut batches, &stream(u32::MAX));
        batches
    }
}

/// Samples at a time inside a block for sentences of `positions`, where there are `chunk` of
/// `longest`.
pub fn chunk_of(chunk: usize, longest: usize, positions: usize) -> usize {
    (chunk.saturating_mul(longest) / positions.max(1)).max(1)
}

fn shuffle<T>(items: &mut [T], stream: &Stream) {
    for i in (1..items.len()).rev() {
        items.swap(i, stream.below(i as u32, i as u32 + 1) as usize);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_sentence_is_in_one_batch_of_its_length() {
        let pairs: Vec<_> = (0..500)
            .map(|i| Tokens { source: vec![3; i * 7 % 40], target: vec![3; i * 5 % 30] })
            .collect();
        let batches = Batches::new(&pairs, 128, 41);
        let mut orders = Vec::new();
        for epoch in 0..3 {
            let all = batches.epoch(1, epoch);
            assert_eq!(all.len(), batches.per_epoch());
            let mut seen: Vec<u32> = all.iter().flat_map(|b| b.members.clone()).collect();
            orders.push(seen.clone());
            seen.sort_unstable();
            assert_eq!(seen, (0..500).collect::<Vec<_>>());
            for b in &all {
                assert!(b.members.len() * b.longest <= 128);
                let most = b.members.iter().map(|&i| pairs[i as usize].positions()).max().unwrap();
                assert!(most <= b.longest && most + STEP > b.longest.min(40));
            }
        }
        assert!(orders[0] != orders[1] && batches.epoch(1, 0) == batches.epoch(1, 0));
        assert!(batches.epoch(1, 0) != batches.epoch(2, 0));
        assert_eq!(batches.in_order().len(), batches.per_epoch());
        assert_eq!(Batches::new(&pairs, 1, 41).per_epoch(), 500);
        assert_eq!((chunk_of(4, 64, 16), chunk_of(4, 64, 64), chunk_of(1, 64, 200)), (16, 4, 1));
    }
}
