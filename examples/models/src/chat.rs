//! Conversations as a model was trained to read them: its chat template (Jinja), and which of the
//! tokens an assistant is to learn.
//!
//! Templates are run as Hugging Face's `apply_chat_template` runs them: blocks take the line break
//! after them and the spaces before them along, Python's methods of texts, lists and dictionaries
//! are there, and `raise_exception`, `strftime_now` and `{% generation %}`. They come from outside:
//! a template that runs for too long or writes too much is stopped.

use core::fmt::Write as _;
use core::panic::AssertUnwindSafe;
use std::collections::BTreeMap;
use std::panic::catch_unwind;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State, UndefinedBehavior, Value};
use serde::{Deserialize, Serialize};

use crate::tokenizer::{SpecialTokens, Tokenizer};

/// The longest template, in bytes.
const MOST_TEMPLATE: usize = 1 << 20;
/// Steps of a template: some of its own, and for each message.
const STEPS: u64 = 1 << 17;
const STEPS_OF_MESSAGE: u64 = 1 << 13;
/// What a template may write besides the messages, some of it for each message.
const MOST_WRITTEN: usize = 1 << 20;
const MOST_OF_MESSAGE: usize = 1 << 14;

/// The longest conversation that is learned.
const MOST_MESSAGES: usize = 1024;

/// What somebody says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Message {
    /// Who: `system`, `user` or `assistant`.
    pub role: String,
    /// What.
    pub content: String,
}

impl Message {
    /// Whether a model says it.
    pub fn is_learned(&self) -> bool {
        self.role == "assistant" || self.role == "model"
    }
}

/// Why a conversation cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum ChatError {
    /// The template is not one.
    #[error("the chat template cannot be used: {0}")]
    Template(String),
    /// The template refuses the conversation, or cannot write it.
    #[error("the chat template cannot write this conversation: {0}")]
    Render(String),
    /// There is no template.
    #[error(
        "the tokenizer has no chat template; expected one in tokenizer_config.json, \
         chat_template.jinja, or the metadata of a GGUF file"
    )]
    None,
    /// More messages than are learned at once: each is written together with all before it.
    #[error("{found} messages in a conversation, expected at most {MOST_MESSAGES}; split it")]
    Long {
        /// How many there are.
        found: usize,
    },
    /// Where a turn begins or ends in the text cannot be told.
    #[error(
        "the template writes the messages up to number {} in another way when more follow, so \
         that it cannot be told which tokens are the assistant's; expected a template that only \
         appends, or one that marks them by {{% generation %}}", message + 1
    )]
    NotAppended {
        /// The message of the assistant, from 0.
        message: usize,
    },
    /// A token that stands on both sides of a border of the assistant's text.
    #[error("token {token} of the conversation is in the assistant's text only in part")]
    Border {
        /// Its place among the conversation's tokens.
        token: usize,
    },
}

/// A chat template.
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    source: String,
    /// What is wrong with the template, if it cannot be used.
    environment: Result<Arc<Environment<'static>>, String>,
    /// What `strftime_now` takes for now, in seconds since 1970.
    now: u64,
    bos: Option<String>,
    eos: Option<String>,
    /// Whether it marks what is learned.
    marked: bool,
}

/// Stand before and behind what is to be learned, in a rendering that asks for that: characters
/// that mean nothing in Unicode, and that no text of this process should have.
const MARKS: [char; 2] = ['\u{fdd0}', '\u{fdd1}'];

impl ChatTemplate {
    /// Reads a template, for a tokenizer whose first and last tokens are written like this.
    ///
    /// # Errors
    /// [`ChatError::Template`]
    pub fn parse(text: &str, bos: Option<&str>, eos: Option<&str>) -> Result<Self, ChatError> {
        let kept = Self::kept(text, bos, eos);
        match &kept.environment {
            Ok(_) => Ok(kept),
            Err(what) => Err(ChatError::Template(what.clone())),
        }
    }

    /// The same of a template that may be wrong: that is said when it is used, because a
    /// tokenizer's other uses do not need it.
    pub(crate) fn kept(text: &str, bos: Option<&str>, eos: Option<&str>) -> Self {
        let marked = text.contains("endgeneration");
        let environment = environment(text).map(Arc::new);
        let [bos, eos] = [bos, eos].map(|token| token.map(Into::into));
        Self { source: text.into(), environment, now: THE_DAY, bos, eos, marked }
    }

    /// The same on the day that it is. Otherwise templates are told that it is 26 July 2024, as
    /// Llama 3's has it where it knows no day, so that what is learned and measured does not change
    /// with the day.
    #[must_use]
    pub fn today(&self) -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        Self { now, ..self.clone() }
    }

    /// The template as it was read.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Writes a conversation, and what stands before an answer if that is to follow.
    ///
    /// # Errors
    /// [`ChatError`], also what the template itself refuses, such as roles in a wrong order.
    pub fn render(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
    ) -> Result<String, ChatError> {
        self.write(messages, add_generation_prompt, false)
    }

    fn write(&self, messages: &[Message], prompt: bool, marks: bool) -> Result<String, ChatError> {
        let environment = self.environment.as_ref();
        let environment = environment.map_err(|what| ChatError::Template(what.clone()))?;
        let mut environment = Environment::clone(environment);
        environment.set_fuel(Some(STEPS + STEPS_OF_MESSAGE * messages.len() as u64));
        let mut context: BTreeMap<&str, Value> = BTreeMap::new();
        context.insert("messages", Value::from_serialize(messages));
        context.insert("add_generation_prompt", prompt.into());
        // What apply_chat_template passes where nothing was given.
        for name in ["tools", "documents"] {
            context.insert(name, ().into());
        }
        for (name, token) in [("bos_token", &self.bos), ("eos_token", &self.eos)] {
            if let Some(token) = token {
                context.insert(name, token.as_str().into());
            }
        }
        context.insert(MARKING, marks.into());
        context.insert(NOW, self.now.into());
        let failed = |e: Error| {
            let mut what = String::new();
            let mut error: Option<&dyn core::error::Error> = Some(&e);
            while let Some(e) = error {
                let _ = write!(what, "{}{e}", if what.is_empty() { "" } else { ": " });
                error = e.source();
            }
            ChatError::Render(what)
        };
        if messages.is_empty() {
            return Err(ChatError::Render("there is no message".into()));
        }
        let template = environment.get_template(NAME).map_err(failed)?;
        let given: usize = messages.iter().map(|m| m.role.len() + m.content.len()).sum();
        let most = MOST_WRITTEN + MOST_OF_MESSAGE * messages.len() + 4 * given;
        let mut out = Bounded { bytes: Vec::new(), most };
        // The engine panics at some templates, such as one that reverses an empty list.
        let rendered = catch_unwind(AssertUnwindSafe(|| {
            template.render_captured_to(context, &mut out).map(|_| ()).map_err(failed)
        }));
        rendered.unwrap_or_else(|_| Err(ChatError::Render("the template engine failed".into())))?;
        String::from_utf8(out.bytes).map_err(|e| ChatError::Render(e.to_string()))
    }

    /// A conversation, and the bytes of it that an assistant is to learn, in order: its answers,
    /// each with what ends its turn.
    ///
    /// # Errors
    /// [`ChatError`]
    pub fn learned(
        &self,
        messages: &[Message],
    ) -> Result<(String, Vec<(usize, usize)>), ChatError> {
        if messages.len() > MOST_MESSAGES {
            return Err(ChatError::Long { found: messages.len() });
        }
        let text = self.write(messages, false, false)?;
        if self.marked && !text.contains(MARKS) {
            let marked = self.write(messages, false, true)?;
            let (mut ranges, mut at, mut open) = (Vec::new(), 0, None);
            for c in marked.chars() {
                if c == MARKS[0] {
                    open = Some(at);
                } else if c == MARKS[1] {
                    ranges.extend(open.take().map(|start| (start, at)));
                } else {
                    at += c.len_utf8();
                }
            }
            return Ok((text, ranges));
        }
        let mut ranges = Vec::new();
        for (message, _) in messages.iter().enumerate().filter(|(_, m)| m.is_learned()) {
            // What stands before the first message may need one to be written.
            let before = match self.write(&messages[..message], true, false) {
                Err(_) if message == 0 => String::new(),
                written => written?,
            };
            let after = self.write(&messages[..=message], false, false)?;
            if !text.starts_with(&after) || !after.starts_with(&before) {
                return Err(ChatError::NotAppended { message });
            }
            ranges.push((before.len(), after.len()));
        }
        Ok((text, ranges))
    }
}

/// A text that must not become longer than this.
struct Bounded {
    bytes: Vec<u8>,
    most: usize,
}

impl std::io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if bytes.len() > self.most - self.bytes.len() {
            return Err(std::io::Error::other("it writes far more than the messages"));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

const NAME: &str = "chat_template";
/// The variable that has the time.
const NOW: &str = "bdia_now";
/// 26 July 2024.
const THE_DAY: u64 = 1_721_952_000;
/// Whether what is learned is to be marked.
const MARKING: &str = "bdia_marking";

fn environment(text: &str) -> Result<Environment<'static>, String> {
    if text.len() > MOST_TEMPLATE {
        return Err(format!("it has {} bytes, expected at most {MOST_TEMPLATE}", text.len()));
    }
    let mut environment = Environment::new();
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    environment.set_keep_trailing_newline(false);
    environment.set_undefined_behavior(UndefinedBehavior::Lenient);
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.set_recursion_limit(64);
    environment.add_filter("tojson", to_json);
    environment.add_function("raise_exception", |what: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, what))
    });
    environment.add_function("strftime_now", |state: &State<'_, '_>, format: String| {
        let now = state.lookup(NOW).and_then(|now| u64::try_from(now).ok());
        strftime(&format, now.unwrap_or(THE_DAY))
    });
    let text = generation(text);
    environment.add_template_owned(NAME, text).map_err(|e| e.to_string())?;
    Ok(environment)
}

/// `{% generation %}` blocks as blocks that the engine knows, with marks around their content where
/// they are asked for.
fn generation(text: &str) -> String {
    if !text.contains("endgeneration") {
        return text.into();
    }
    let mark = |n: usize| format!("{{{{ '{}' if {MARKING} else '' }}}}", MARKS[n]);
    let mut out = String::new();
    let mut rest = text;
    while let Some(start) = rest.find("{%") {
        let Some(end) = rest[start + 2..].find("%}").map(|n| start + n + 4) else { break };
        let tag = &rest[start..end];
        let inner = tag[2..tag.len() - 2].trim_matches(['-', '+']).trim();
        out.push_str(&rest[..start]);
        match inner {
            "generation" => {
                out.push_str(&tag.replacen("generation", "if true", 1));
                // A block takes the line break after it along, a mark would not.
                let line = rest[end..].strip_prefix('\n').map_or(0, |_| 1);
                out.push_str(&mark(0));
                rest = &rest[end + line..];
                if tag.ends_with("-%}") {
                    rest = rest.trim_start();
                }
                continue;
            }
            "endgeneration" => {
                if tag.starts_with("{%-") {
                    out.truncate(out.trim_end().len());
                } else {
                    // Spaces before a block at the start of a line belong to it.
                    let line = out.trim_end_matches([' ', '\t']).len();
                    if out[..line].ends_with('\n') {
                        out.truncate(line);
                    }
                }
                out.push_str(&mark(1));
                out.push_str(&tag.replacen("endgeneration", "endif", 1).replacen("{%-", "{%", 1));
            }
            _ => out.push_str(tag),
        }
        rest = &rest[end..];
    }
    out.push_str(rest);
    out
}

/// As Python's `json.dumps` with `ensure_ascii=False` writes it.
fn to_json(value: &Value, options: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let _: Option<bool> = options.get("ensure_ascii")?;
    options.assert_all_used()?;
    let mut out = String::new();
    put_json(value, indent.map(|n| n.min(16)), 0, &mut out)?;
    Ok(out)
}

fn put_json(
    value: &Value,
    indent: Option<usize>,
    depth: usize,
    out: &mut String,
) -> Result<(), Error> {
    if depth > 64 {
        return Err(Error::new(ErrorKind::InvalidOperation, "tojson of values too deep"));
    }
    let line = |depth: usize, out: &mut String| {
        if let Some(n) = indent {
            out.push('\n');
            out.extend(core::iter::repeat_n(' ', n * depth));
        }
    };
    let comma = |out: &mut String| out.push_str(if indent.is_some() { "," } else { ", " });
    let quoted = |text: &str| serde_json::Value::from(text).to_string();
    match value.kind() {
        ValueKind::Map => {
            out.push('{');
            let mut any = false;
            for key in value.try_iter()? {
                if any {
                    comma(out);
                }
                any = true;
                line(depth + 1, out);
                out.push_str(&quoted(&key.to_string()));
                out.push_str(": ");
                put_json(&value.get_item(&key)?, indent, depth + 1, out)?;
            }
            if any {
                line(depth, out);
            }
            out.push('}');
        }
        ValueKind::Seq | ValueKind::Iterable => {
            out.push('[');
            let mut any = false;
            for item in value.try_iter()? {
                if any {
                    comma(out);
                }
                any = true;
                line(depth + 1, out);
                put_json(&item, indent, depth + 1, out)?;
            }
            if any {
                line(depth, out);
            }
            out.push(']');
        }
        ValueKind::Undefined => {
            return Err(Error::new(ErrorKind::InvalidOperation, "tojson of what is not defined"));
        }
        _ => {
            let json = serde_json::to_string(value)
                .map_err(|e| Error::new(ErrorKind::InvalidOperation, format!("tojson: {e}")))?;
            out.push_str(&json);
        }
    }
    Ok(())
}

/// Seconds since 1970, in universal time, by a format of C's `strftime`.
fn strftime(format: &str, seconds: u64) -> String {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    const DAYS: [&str; 7] =
        ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];
    let (days, time) = (seconds / 86_400, seconds % 86_400);
    // Years begin in March, so that leap days are last (Hinnant's civil calendar).
    let shifted = days + 719_468;
    let (era, of_era) = (shifted / 146_097, shifted % 146_097);
    let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let from_march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    let year = year + era * 400 + u64::from(month <= 2);
    let name = MONTHS[(month as usize + 11) % 12];
    let weekday = DAYS[(days % 7) as usize];
    let mut out = String::new();
    let mut all = format.chars();
    while let Some(c) = all.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        // Writing to a text does not fail.
        let _ = match all.next() {
            Some('d') => write!(out, "{day:02}"),
            Some('m') => write!(out, "{month:02}"),
            Some('Y') => write!(out, "{year}"),
            Some('y') => write!(out, "{:02}", year % 100),
            Some('b') => write!(out, "{}", &name[..3]),
            Some('B') => write!(out, "{name}"),
            Some('a') => write!(out, "{}", &weekday[..3]),
            Some('A') => write!(out, "{weekday}"),
            Some('H') => write!(out, "{:02}", time / 3600),
            Some('M') => write!(out, "{:02}", time / 60 % 60),
            Some('S') => write!(out, "{:02}", time % 60),
            Some('%') => write!(out, "%"),
            Some(other) => write!(out, "%{other}"),
            None => write!(out, "%"),
        };
    }
    out
}

impl Tokenizer {
    /// The tokens of a conversation as the model's template writes it, and of each whether it is
    /// the assistant's: its answers, each with the token that ends its turn. Those are learned; so
    /// is a token of which only a part is the assistant's, as Hugging Face has it.
    /// Special tokens are parsed, those within messages too, as `apply_chat_template` has it.
    ///
    /// # Errors
    /// [`ChatError`]
    pub fn encode_chat(&self, messages: &[Message]) -> Result<(Vec<u32>, Vec<bool>), ChatError> {
        let template = self.chat().ok_or(ChatError::None)?;
        let (text, ranges) = template.learned(messages)?;
        let tokenizer = self.clone().with_special_tokens(SpecialTokens::Parse);
        let tokens = tokenizer.encode(&text);
        let mut learned = vec![false; tokens.len()];
        match self.ends(&tokens, &text) {
            Some(ends) => {
                let mut start = 0;
                let mut ranges = ranges.iter().peekable();
                for (learned, end) in learned.iter_mut().zip(ends) {
                    while ranges.next_if(|range| range.1 <= start).is_some() {}
                    *learned = ranges.peek().is_some_and(|r| r.0 < end && start < r.1);
                    start = end;
                }
            }
            // The text cannot be told from the tokens: normalized, or with spaces put in.
            None => {
                for (start, end) in ranges {
                    let mut places = [0; 2];
                    for (place, border) in places.iter_mut().zip([start, end]) {
                        let before = tokenizer.encode(&text[..border]);
                        if !tokens.starts_with(&before) {
                            let both = tokens.iter().zip(&before);
                            let token = both.take_while(|(a, b)| a == b).count();
                            return Err(ChatError::Border { token });
                        }
                        *place = before.len();
                    }
                    learned[places[0]..places[1]].fill(true);
                }
            }
        }
        // What stands between the end of a turn and the next one, a line break mostly, is nobody's.
        let mut end = tokens.len();
        while let Some(last) = learned[..end].iter().rposition(|l| *l) {
            let start = learned[..last].iter().rposition(|l| !*l).map_or(0, |n| n + 1);
            if let Some(special) = (start..=last).rev().find(|&n| self.is_special(tokens[n])) {
                let blank = |bytes: &[u8]| bytes.iter().all(u8::is_ascii_whitespace);
                if blank(&self.decode_bytes(&tokens[special + 1..=last])) {
                    learned[special + 1..=last].fill(false);
                }
            }
            end = start;
        }
        Ok((tokens, learned))
    }

    /// Where in a text its tokens end, if they are the text's bytes one after the other, but for a
    /// space before it.
    fn ends(&self, tokens: &[u32], text: &str) -> Option<Vec<usize>> {
        let bytes = self.decode_bytes(tokens);
        let before = match bytes.strip_suffix(text.as_bytes())? {
            b"" => 0,
            b" " => 1,
            _ => return None,
        };
        let mut at = 0_usize;
        let end = |&token: &u32| {
            at += self.decode_bytes(&[token]).len();
            at.saturating_sub(before)
        };
        Some(tokens.iter().map(end).collect())
    }
}
