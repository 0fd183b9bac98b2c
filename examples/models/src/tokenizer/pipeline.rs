//! What happens to a text before its words are encoded: normalization, and the cuts between words.
//!
//! Every step takes time linear in the text's length: expressions are run by finite automata, and
//! the one kind of look-ahead that tokenizers have, `\s+(?!\S)|\s+` as the last alternatives, is
//! done by hand: a run of whitespace that something follows leaves its last character to that.

use std::borrow::Cow;

use regex_automata::meta::Regex;
use regex_automata::util::syntax;
use regex_automata::{Input, PatternID};
use serde_json::Value;
use unicode_normalization::{IsNormalized, UnicodeNormalization, is_nfc_quick};

/// GPT-2's words.
pub(super) const GPT2: &str =
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

/// How an expression ends that leaves the last character of a run of whitespace.
const LOOK_AHEAD: &str = r"|\s+(?!\S)|\s+";
/// The longest expression, in bytes, and what its automaton may take.
const MOST_PATTERN: usize = 1 << 14;
const MOST_AUTOMATON: usize = 1 << 23;
/// Steps that cut words; steps that change a text, and the bytes that one of them puts in: a text
/// must not grow beyond all bounds.
const MOST_STEPS: usize = 32;
const MOST_NORMALIZERS: usize = 8;
const MOST_PUT_IN: usize = 8;

type Said<T> = Result<T, String>;

/// What matches a pattern.
pub(super) enum Pattern {
    /// This text.
    Text(String),
    /// An expression and how it is written; the second one in it is whitespace that leaves its last
    /// character.
    Expression(Box<Regex>, String),
    /// A numeric character.
    Digit,
}

impl core::fmt::Debug for Pattern {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Text(text) => write!(f, "Text({text:?})"),
            Self::Expression(_, text) => write!(f, "Expression({text:?})"),
            Self::Digit => f.write_str("Digit"),
        }
    }
}

fn shown(value: &Value) -> String {
    value.to_string().chars().take(80).collect()
}

/// The kind of a step.
fn kind(value: &Value) -> Said<&str> {
    let kind = value.get("type").and_then(Value::as_str);
    kind.ok_or_else(|| format!("a step without \"type\": {}", shown(value)))
}

fn text<'a>(value: &'a Value, name: &str) -> Said<&'a str> {
    let found = value.get(name).and_then(Value::as_str);
    found.ok_or_else(|| format!("{name:?} is missing in {}", shown(value)))
}

fn short(text: &str) -> Said<String> {
    if text.len() > MOST_PUT_IN {
        return Err(format!("a normalizer puts in {} bytes, expected {MOST_PUT_IN}", text.len()));
    }
    Ok(text.into())
}

fn flag(value: &Value, name: &str, default: bool) -> Said<bool> {
    match value.get(name) {
        None | Some(Value::Null) => Ok(default),
        Some(Value::Bool(b)) => Ok(*b),
        Some(other) => Err(format!("{name:?} is {}, expected true or false", shown(other))),
    }
}

impl Pattern {
    pub fn expression(text: &str) -> Said<Self> {
        let wrong = |what: &str| {
            let shown: String = text.chars().take(80).collect();
            format!("the expression {shown:?} {what}")
        };
        if text.len() > MOST_PATTERN {
            return Err(wrong("is longer than any that a tokenizer has"));
        }
        let parts = match text.strip_suffix(LOOK_AHEAD) {
            Some(main) => vec![main, r"\s+"],
            None => vec![text],
        };
        // As in Ruby's syntax, which tokenizers are written in, `^` and `$` are for lines.
        let syntax = syntax::Config::new().multi_line(true).nest_limit(64);
        let config = Regex::config()
            .nfa_size_limit(Some(MOST_AUTOMATON))
            .onepass_size_limit(Some(1 << 20))
            .hybrid_cache_capacity(1 << 22);
        let built = Regex::builder().configure(config).syntax(syntax).build_many(&parts);
        let regex = built.map_err(|_| {
            wrong(
                "is not one that can be used: expected one without look-around and \
                 back-references, but for \\s+(?!\\S)|\\s+ at its end",
            )
        })?;
        Ok(Self::Expression(Box::new(regex), text.into()))
    }

    fn read(value: &Value) -> Said<Self> {
        let pattern = value.get("pattern");
        let pattern = pattern.ok_or_else(|| format!("no \"pattern\" in {}", shown(value)))?;
        if let Some(text) = pattern.get("String").and_then(Value::as_str) {
            return Ok(Self::Text(text.into()));
        }
        match pattern.get("Regex").and_then(Value::as_str) {
            Some(text) => Self::expression(text),
            None => Err(format!("a pattern {}, expected \"String\" or \"Regex\"", shown(pattern))),
        }
    }

    /// The next match from a place on, within a text.
    fn find(&self, text: &str, from: usize) -> Option<(usize, usize)> {
        match self {
            Self::Text(pattern) => {
                let at = from + text.get(from..)?.find(pattern.as_str())?;
                Some((at, at + pattern.len()))
            }
            Self::Digit => {
                let (at, c) = text.get(from..)?.char_indices().find(|(_, c)| c.is_numeric())?;
                Some((from + at, from + at + c.len_utf8()))
            }
            Self::Expression(regex, _) => {
                let found = regex.find(Input::new(text).range(from..))?;
                let (start, mut end) = (found.start(), found.end());
                if found.pattern() != PatternID::ZERO && end < text.len() {
                    let last = text[start..end].chars().next_back().map_or(0, char::len_utf8);
                    if end - last > start {
                        end -= last;
                    }
                }
                Some((start, end))
            }
        }
    }

    /// All parts of a text, and of each whether it is a match; none is empty.
    fn parts(&self, text: &str, put: &mut dyn FnMut(usize, usize, bool)) {
        let (mut from, mut end) = (0, 0);
        while from <= text.len() {
            let Some((a, b)) = self.find(text, from) else { break };
            if a > end {
                put(end, a, false);
            }
            if b > a {
                put(a, b, true);
            }
            end = b;
            from = if b > a {
                b
            } else {
                // An empty match: on from the next character.
                b + text[b..].chars().next().map_or(1, char::len_utf8)
            };
        }
        if end < text.len() {
            put(end, text.len(), false);
        }
    }
}

/// A change of a text as a whole.
#[derive(Debug)]
pub(super) enum Normalizer {
    Nfc,
    Nfd,
    Nfkc,
    Nfkd,
    Lowercase,
    Prepend(String),
    Replace(Pattern, String),
}

impl Normalizer {
    /// Reads the steps of a `normalizer`.
    pub fn read(value: &Value) -> Said<Vec<Self>> {
        let mut all = Vec::new();
        Self::collect(value, &mut all)?;
        Ok(all)
    }

    fn collect(value: &Value, all: &mut Vec<Self>) -> Said<()> {
        if value.is_null() {
            return Ok(());
        }
        let step = match kind(value)? {
            "Sequence" => {
                let steps = value.get("normalizers").and_then(Value::as_array);
                let steps = steps.ok_or("a sequence without \"normalizers\"")?;
                return steps.iter().try_for_each(|step| Self::collect(step, all));
            }
            "NFC" => Self::Nfc,
            "NFD" => Self::Nfd,
            "NFKC" => Self::Nfkc,
            "NFKD" => Self::Nfkd,
            "Lowercase" => Self::Lowercase,
            "Prepend" => Self::Prepend(short(text(value, "prepend")?)?),
            "Replace" => Self::Replace(Pattern::read(value)?, short(text(value, "content")?)?),
            other => {
                return Err(format!(
                    "normalizer {other:?}, expected Sequence, NFC, NFD, NFKC, NFKD, Lowercase, \
                     Prepend or Replace"
                ));
            }
        };
        if all.len() == MOST_NORMALIZERS {
            return Err(format!("more than {MOST_NORMALIZERS} normalizers"));
        }
        all.push(step);
        Ok(())
    }

    fn apply<'a>(&self, text: Cow<'a, str>) -> Cow<'a, str> {
        match self {
            Self::Nfc if is_nfc_quick(text.chars()) == IsNormalized::Yes => text,
            Self::Nfc => text.nfc().collect::<String>().into(),
            Self::Nfd => text.nfd().collect::<String>().into(),
            Self::Nfkc => text.nfkc().collect::<String>().into(),
            Self::Nfkd => text.nfkd().collect::<String>().into(),
            // Character by character, as the reference implementation has it.
            Self::Lowercase => text.chars().flat_map(char::to_lowercase).collect::<String>().into(),
            Self::Prepend(_) if text.is_empty() => text,
            Self::Prepend(what) => [what, &*text].concat().into(),
            Self::Replace(pattern, with) => {
                let mut changed = String::new();
                let mut any = false;
                pattern.parts(&text, &mut |a, b, is_match| {
                    any |= is_match;
                    changed.push_str(if is_match { with } else { &text[a..b] });
                });
                if any { changed.into() } else { text }
            }
        }
    }

    /// A text after all steps.
    pub fn all<'a>(steps: &[Self], text: &'a str) -> Cow<'a, str> {
        steps.iter().fold(text.into(), |text, step| step.apply(text))
    }
}

/// What becomes of the matches of a pattern.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Behavior {
    Removed,
    Isolated,
    WithPrevious,
    WithNext,
    Contiguous,
}

/// A step that cuts words out of a text.
#[derive(Debug)]
pub(super) struct Cut {
    pattern: Pattern,
    behavior: Behavior,
    invert: bool,
}

/// A character in the place of spaces, and before a text.
#[derive(Debug)]
pub(super) struct Metaspace {
    replacement: char,
    /// Before every text between added tokens, or before the very first only.
    always: bool,
    first: bool,
}

/// How words are found.
#[derive(Debug, Default)]
pub(super) struct Words {
    metaspace: Option<Metaspace>,
    cuts: Vec<Cut>,
    /// A space before a text that does not begin with one.
    prefix_space: bool,
    /// Whether words are bytes.
    pub byte_level: bool,
}

impl Words {
    /// Reads the steps of a `pre_tokenizer`.
    pub fn read(value: &Value) -> Said<Self> {
        let mut words = Self::default();
        words.step(value)?;
        Ok(words)
    }

    fn step(&mut self, value: &Value) -> Said<()> {
        if value.is_null() {
            return Ok(());
        }
        let kind = kind(value)?;
        if kind == "Sequence" {
            let steps = value.get("pretokenizers").and_then(Value::as_array);
            let steps = steps.ok_or("a sequence without \"pretokenizers\"")?;
            return steps.iter().try_for_each(|step| self.step(step));
        }
        if self.byte_level {
            return Err(format!("pre-tokenizer {kind:?} after ByteLevel, expected it to be last"));
        }
        if self.cuts.len() == MOST_STEPS {
            return Err(format!("more than {MOST_STEPS} pre-tokenizers"));
        }
        let isolated = |pattern| Cut { pattern, behavior: Behavior::Isolated, invert: false };
        match kind {
            "ByteLevel" => {
                self.byte_level = true;
                let prefix = flag(value, "add_prefix_space", true)?;
                if prefix && !self.cuts.is_empty() {
                    return Err("ByteLevel with \"add_prefix_space\" after other steps".into());
                }
                self.prefix_space = prefix;
                if flag(value, "use_regex", true)? {
                    self.cuts.push(isolated(Pattern::expression(GPT2)?));
                }
            }
            "Split" => {
                let behavior = match text(value, "behavior")? {
                    "Removed" => Behavior::Removed,
                    "Isolated" => Behavior::Isolated,
                    "MergedWithPrevious" => Behavior::WithPrevious,
                    "MergedWithNext" => Behavior::WithNext,
                    "Contiguous" => Behavior::Contiguous,
                    other => return Err(format!("behavior {other:?} of a split")),
                };
                let (pattern, invert) = (Pattern::read(value)?, flag(value, "invert", false)?);
                self.cuts.push(Cut { pattern, behavior, invert });
            }
            "Digits" => {
                let one = flag(value, "individual_digits", false)?;
                let behavior = if one { Behavior::Isolated } else { Behavior::Contiguous };
                self.cuts.push(Cut { pattern: Pattern::Digit, behavior, invert: false });
            }
            "Metaspace" => {
                if self.metaspace.is_some() || !self.cuts.is_empty() {
                    return Err("Metaspace after other steps, expected it to be first".into());
                }
                let mut replacement = text(value, "replacement")?.chars();
                let (Some(c), None) = (replacement.next(), replacement.next()) else {
                    return Err("Metaspace's \"replacement\", expected one character".into());
                };
                let prefix = flag(value, "add_prefix_space", true)?;
                let default = if prefix { "always" } else { "never" };
                let scheme = value.get("prepend_scheme").and_then(Value::as_str);
                let scheme = scheme.unwrap_or(default);
                if !["always", "first", "never"].contains(&scheme) {
                    return Err(format!(
                        "\"prepend_scheme\" {scheme:?}, expected always, first or never"
                    ));
                }
                let (always, first) = (scheme == "always", scheme == "first");
                self.metaspace = Some(Metaspace { replacement: c, always, first });
                if flag(value, "split", true)? {
                    let pattern = Pattern::Text(c.into());
                    let behavior = Behavior::WithNext;
                    self.cuts.push(Cut { pattern, behavior, invert: false });
                }
            }
            other => {
                return Err(format!(
                    "pre-tokenizer {other:?}, expected Sequence, ByteLevel, Split, Digits or \
                     Metaspace"
                ));
            }
        }
        Ok(())
    }

    /// A text between added tokens as words are cut out of it; `start` says that it stands at the
    /// very start.
    pub fn prepared<'a>(&self, text: Cow<'a, str>, start: bool) -> Cow<'a, str> {
        let mut text = text;
        if let Some(Metaspace { replacement, always, first }) = self.metaspace {
            if text.contains(' ') {
                text = text.replace(' ', replacement.encode_utf8(&mut [0; 4])).into();
            }
            if (always || first && start) && !text.starts_with(replacement) {
                text.to_mut().insert(0, replacement);
            }
        }
        if self.prefix_space && !text.starts_with(' ') {
            text.to_mut().insert(0, ' ');
        }
        text
    }

    /// The words of such a text, in order.
    pub fn of<'a>(&self, text: &'a str, put: &mut dyn FnMut(&'a str)) {
        words(&self.cuts, text, put);
    }
}

fn words<'a>(cuts: &[Cut], text: &'a str, put: &mut dyn FnMut(&'a str)) {
    let Some((cut, rest)) = cuts.split_first() else {
        if !text.is_empty() {
            put(text);
        }
        return;
    };
    // The part that may still grow, and whether the one before was a match.
    let mut open: Option<(usize, usize)> = None;
    let mut was_match = false;
    let mut all = |range: Option<(usize, usize)>| {
        if let Some((a, b)) = range {
            words(rest, &text[a..b], put);
        }
    };
    cut.pattern.parts(text, &mut |a, b, is_match| {
        let is_match = is_match != cut.invert;
        let joins = match cut.behavior {
            Behavior::Removed => {
                if !is_match {
                    all(Some((a, b)));
                }
                return;
            }
            Behavior::Isolated => false,
            Behavior::WithPrevious => is_match && !was_match,
            Behavior::WithNext => was_match && !is_match,
            Behavior::Contiguous => is_match == was_match,
        };
        was_match = is_match;
        match &mut open {
            Some((_, end)) if joins => *end = b,
            _ => all(open.replace((a, b))),
        }
    });
    all(open);
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn of(value: &Value, text: &str) -> Vec<String> {
        let mut all = Vec::new();
        Words::read(value).unwrap().of(text, &mut |word| all.push(word.to_string()));
        all
    }

    #[test]
    fn whitespace_leaves_its_last_character() {
        let level = json!({"type": "ByteLevel", "add_prefix_space": false});
        assert_eq!(of(&level, "a  b \n c  "), ["a", " ", " b", " \n", " c", "  "]);
        assert_eq!(of(&level, " \n\u{a0}x"), [" \n", "\u{a0}", "x"]);
    }

    #[test]
    fn matches_go_where_the_behavior_says() {
        let split = |behavior, invert| {
            let pattern = json!({"String": "-"});
            let (kind, b) = ("Split", behavior);
            let s = json!({"type": kind, "pattern": pattern, "behavior": b, "invert": invert});
            of(&s, "the-final--countdown")
        };
        assert_eq!(split("Removed", false), ["the", "final", "countdown"]);
        assert_eq!(split("Isolated", false), ["the", "-", "final", "-", "-", "countdown"]);
        assert_eq!(split("MergedWithPrevious", false), ["the-", "final-", "-", "countdown"]);
        assert_eq!(split("MergedWithNext", false), ["the", "-final", "-", "-countdown"]);
        assert_eq!(split("Contiguous", false), ["the", "-", "final", "--", "countdown"]);
        assert_eq!(split("Removed", true), ["-", "-", "-"]);
    }

    #[test]
    fn what_is_not_known_is_named() {
        let error = Words::read(&json!({"type": "BertPreTokenizer"})).unwrap_err();
        assert!(error.contains("BertPreTokenizer") && error.contains("Digits"), "{error}");
        let error = Normalizer::read(&json!({"type": "Precompiled"})).unwrap_err();
        assert!(error.contains("Precompiled") && error.contains("Replace"), "{error}");
        assert!(Pattern::expression("(?=a)b").is_err());
        assert!(Pattern::expression(&"(?:a{1000}){1000}".repeat(20)).is_err());
    }
}
