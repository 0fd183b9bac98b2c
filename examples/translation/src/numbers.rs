//! Number words in English and French, 0 to 999,999: a task with one right answer, made by an exact
//! grammar.
//!
//! English is written without "and" and with hyphens between tens and units ("three hundred
//! forty-two"). French is in the orthography before 1990, with hyphens below one hundred only, and
//! not around "et":
//!
//! * "vingt et un", "soixante et onze", but "quatre-vingt-un", "quatre-vingt-onze";
//! * "quatre-vingts" and "deux cents" have their s where nothing follows, not before "mille", which
//!   is a numeral: "quatre-vingt mille", "deux cent mille";
//! * "mille" has neither a plural nor an "un" before it; "cent" has no "un" either.

use bdia_core::rng::{Draw, Stream};
use xxhash_rust::xxh3::xxh3_64;

/// One more than the largest number.
pub const NUMBERS: u32 = 1_000_000;

const ENGLISH: [&str; 20] = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
];
const ENGLISH_TENS: [&str; 8] =
    ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"];
const FRENCH: [&str; 20] = [
    "zéro", "un", "deux", "trois", "quatre", "cinq", "six", "sept", "huit", "neuf", "dix", "onze",
    "douze", "treize", "quatorze", "quinze", "seize", "dix-sept", "dix-huit", "dix-neuf",
];
/// Seventy and ninety count on from sixty and eighty.
const FRENCH_TENS: [&str; 8] = [
    "vingt",
    "trente",
    "quarante",
    "cinquante",
    "soixante",
    "soixante",
    "quatre-vingt",
    "quatre-vingt",
];

/// The English words of a number below [`NUMBERS`].
pub fn english(n: u32) -> String {
    let below_hundred = |n: u32| match n {
        0..20 => ENGLISH[n as usize].to_string(),
        _ if n.is_multiple_of(10) => ENGLISH_TENS[(n / 10 - 2) as usize].to_string(),
        _ => format!("{}-{}", ENGLISH_TENS[(n / 10 - 2) as usize], ENGLISH[(n % 10) as usize]),
    };
    let below_thousand = |n: u32| match (n / 100, n % 100) {
        (0, rest) => below_hundred(rest),
        (hundreds, 0) => format!("{} hundred", ENGLISH[hundreds as usize]),
        (hundreds, rest) => {
            format!("{} hundred {}", ENGLISH[hundreds as usize], below_hundred(rest))
        }
    };
    match (n / 1000 % 1000, n % 1000) {
        (0, rest) => below_thousand(rest),
        (thousands, 0) => format!("{} thousand", below_thousand(thousands)),
        (thousands, rest) => {
            format!("{} thousand {}", below_thousand(thousands), below_thousand(rest))
        }
    }
}

/// The French words of a number below [`NUMBERS`].
pub fn french(n: u32) -> String {
    match (n / 1000 % 1000, n % 1000) {
        (0, rest) => french_below_thousand(rest, true),
        (1, 0) => "mille".into(),
        (1, rest) => format!("mille {}", french_below_thousand(rest, true)),
        (thousands, 0) => format!("{} mille", french_below_thousand(thousands, false)),
        (thousands, rest) => {
            format!(
                "{} mille {}",
                french_below_thousand(thousands, false),
                french_below_thousand(rest, true)
            )
        }
    }
}

/// `last`: no numeral follows.
fn french_below_thousand(n: u32, last: bool) -> String {
    let hundreds = match n / 100 {
        0 => return french_below_hundred(n, last),
        1 => "cent".to_string(),
        many => format!("{} cent", FRENCH[many as usize]),
    };
    match n % 100 {
        0 if n > 100 && last => hundreds + "s",
        0 => hundreds,
        rest => format!("{hundreds} {}", french_below_hundred(rest, last)),
    }
}

fn french_below_hundred(n: u32, last: bool) -> String {
    if n < 20 {
        return FRENCH[n as usize].to_string();
    }
    let tens = FRENCH_TENS[(n / 10 - 2) as usize];
    // What is left above the tens' word: up to 19 above sixty and eighty.
    let rest = if n < 60 { n % 10 } else { n % 20 };
    match (n, rest) {
        (80, _) if last => "quatre-vingts".into(),
        (_, 0) => tens.to_string(),
        (20..80, 1) => format!("{tens} et un"),
        (71, _) => "soixante et onze".into(),
        _ => format!("{tens}-{}", FRENCH[rest as usize]),
    }
}

/// Whether a number is one of those that are held out: an eighth, in no order. It depends on the
/// number alone, so that no run learns from what another one is tested with.
fn held_out(n: u32) -> bool {
    xxh3_64(&n.to_le_bytes()).is_multiple_of(8)
}

/// How many numbers there are to learn from, and how many are held out.
pub fn available() -> [usize; 2] {
    let held = (0..NUMBERS).filter(|&n| held_out(n)).count();
    [NUMBERS as usize - held, held]
}

/// Pairs of different numbers to learn from, and pairs that are held out, as many as asked for (or
/// as [`available`] says), in an order of a fixed seed: more pairs begin with the same ones. Half
/// of them are drawn evenly, half evenly in the logarithm, so that short numbers are there too.
pub fn pairs(counts: [usize; 2]) -> [Vec<[String; 2]>; 2] {
    let stream = Stream::new(0x6e75_6d62, 0, 0, 0, 0, Draw::Data);
    let mut seen = vec![false; NUMBERS as usize];
    let available = available();
    let counts = [counts[0].min(available[0]), counts[1].min(available[1])];
    let (mut pairs, mut draw) = ([Vec::new(), Vec::new()], 0_u32);
    while pairs[0].len() < counts[0] || pairs[1].len() < counts[1] {
        let n = if draw.is_multiple_of(2) {
            stream.below(draw, NUMBERS)
        } else {
            // 10^(6·u) − 1
            ((10_f64.powf(6.0 * stream.uniform(draw)) - 1.0) as u32).min(NUMBERS - 1)
        };
        draw = draw.wrapping_add(1);
        let side = usize::from(held_out(n));
        if !core::mem::replace(&mut seen[n as usize], true) && pairs[side].len() < counts[side] {
            pairs[side].push([english(n), french(n)]);
        }
    }
    pairs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hard_ones() {
        for (n, expected_english, expected_french) in [
            (0, "zero", "zéro"),
            (1, "one", "un"),
            (16, "sixteen", "seize"),
            (17, "seventeen", "dix-sept"),
            (20, "twenty", "vingt"),
            (21, "twenty-one", "vingt et un"),
            (22, "twenty-two", "vingt-deux"),
            (60, "sixty", "soixante"),
            (61, "sixty-one", "soixante et un"),
            (70, "seventy", "soixante-dix"),
            (71, "seventy-one", "soixante et onze"),
            (72, "seventy-two", "soixante-douze"),
            (77, "seventy-seven", "soixante-dix-sept"),
            (80, "eighty", "quatre-vingts"),
            (81, "eighty-one", "quatre-vingt-un"),
            (90, "ninety", "quatre-vingt-dix"),
            (91, "ninety-one", "quatre-vingt-onze"),
            (99, "ninety-nine", "quatre-vingt-dix-neuf"),
            (100, "one hundred", "cent"),
            (101, "one hundred one", "cent un"),
            (180, "one hundred eighty", "cent quatre-vingts"),
            (200, "two hundred", "deux cents"),
            (201, "two hundred one", "deux cent un"),
            (1000, "one thousand", "mille"),
            (1001, "one thousand one", "mille un"),
            (1200, "one thousand two hundred", "mille deux cents"),
            (2000, "two thousand", "deux mille"),
            (21_000, "twenty-one thousand", "vingt et un mille"),
            (80_000, "eighty thousand", "quatre-vingt mille"),
            (80_080, "eighty thousand eighty", "quatre-vingt mille quatre-vingts"),
            (200_000, "two hundred thousand", "deux cent mille"),
            (200_200, "two hundred thousand two hundred", "deux cent mille deux cents"),
            (
                999_999,
                "nine hundred ninety-nine thousand nine hundred ninety-nine",
                "neuf cent quatre-vingt-dix-neuf mille neuf cent quatre-vingt-dix-neuf",
            ),
        ] {
            assert_eq!(
                (english(n).as_str(), french(n).as_str()),
                (expected_english, expected_french)
            );
        }
    }

    /// Every word sequence names one number.
    #[test]
    fn no_two_numbers_have_the_same_words() {
        let all: std::collections::HashSet<_> = (0..NUMBERS).map(french).collect();
        assert_eq!(all.len(), NUMBERS as usize);
        let all: std::collections::HashSet<_> = (0..NUMBERS).map(english).collect();
        assert_eq!(all.len(), NUMBERS as usize);
    }

    #[test]
    fn drawn_pairs_are_different_and_repeat() {
        let [all, held] = pairs([3000, 500]);
        let different: std::collections::HashSet<_> =
            all.iter().chain(&held).map(|[english, _]| english).collect();
        assert_eq!((all.len(), held.len(), different.len()), (3000, 500, 3500));
        assert_eq!([all.clone(), held.clone()], pairs([3000, 500]));
        // Other counts begin with the same ones.
        let [some, few] = pairs([40, 600]);
        assert_eq!((&some[..], &few[..500]), (&all[..40], &held[..]));
        let [learned, held] = available();
        assert!(learned + held == NUMBERS as usize && held > 120_000, "{held}");
        // Short ones too: a tenth has less than four digits.
        assert!(all.iter().filter(|[english, _]| !english.contains("thousand")).count() > 300);
    }
}
