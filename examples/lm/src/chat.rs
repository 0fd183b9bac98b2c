//! `chat`: a conversation with a model, as its own template writes it.

use core::ops::ControlFlow;
use core::time::Duration;
use std::io::{self, BufRead, IsTerminal, Write};
use std::path::Path;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};

use bdia_core::backend::Backend;
use bdia_models::chat::{ChatError, Message};
use bdia_models::for_family;
use bdia_models::language::decode::{Decoder, Decoding, How, Sizes};
use bdia_models::language::model::LanguageModel;
use bdia_models::language::{Config, Family};
use bdia_models::sample::Sampler;
use bdia_models::tokenizer::Tokenizer;
use bdia_train::Failure;
use bdia_train::machine::{self, Work};
use bdia_train::{report, run};

use crate::cli::{ChatArgs, context_of};
use crate::hub;
use crate::inference::{self, load};
use crate::pairs::chat_prompt;
use crate::train::end_tokens;

/// Tokens that the model sees, unless the flags say otherwise.
const CONTEXT: usize = 2048;

/// Answers one message or, from the standard input, one line after the other.
///
/// # Errors
/// [`Failure`], among them a model without a template of conversations.
pub fn chat(args: &ChatArgs) -> Result<(), Failure> {
    let opened = hub::open(&args.weights)?;
    let tokenizer = inference::shown(&opened)?;
    if tokenizer.chat().is_none() {
        return Err(Failure::Other(format!(
            "{}: the model has no template of conversations (chat_template); expected a model \
             that was tuned for them. `generate` goes on from a text",
            opened.path.display()
        )));
    }
    for_family!(opened.config, config => chat_with(args, &opened.path, &config, tokenizer))
}

fn chat_with<C: Config>(
    args: &ChatArgs,
    path: &Path,
    config: &C,
    tokenizer: Tokenizer,
) -> Result<(), Failure> {
    let positions = config.dims().positions();
    let context = context_of(args.context, positions)?.unwrap_or(CONTEXT.min(positions));
    let sizes = Sizes { prompts: 1, beams: 1, context };
    let (model, decoder, layout) = inference::lay_out_decoder(config, &args.machine, sizes)?;
    let ends = end_tokens(config, &tokenizer);
    let work = Conversation { args, path, model, decoder, tokenizer, ends };
    machine::run(&args.machine, machine::threads(&args.machine), &layout, work)
}

/// The lines of the standard input, read by a thread of their own: whoever waits for one can see
/// signals, which do not end a read.
fn lines() -> Receiver<String> {
    let (told, lines) = mpsc::channel();
    std::thread::spawn(move || {
        for line in io::stdin().lock().lines().map_while(Result::ok) {
            if told.send(line).is_err() {
                break;
            }
        }
    });
    lines
}

/// The next line; `None` after the last one.
///
/// # Errors
/// [`Failure::Interrupted`]
fn next(lines: &Receiver<String>) -> Result<Option<String>, Failure> {
    loop {
        match lines.recv_timeout(Duration::from_millis(50)) {
            Ok(line) => return Ok(Some(line)),
            Err(RecvTimeoutError::Disconnected) => return Ok(None),
            Err(RecvTimeoutError::Timeout) => run::go_on()?,
        }
    }
}

struct Conversation<'a, F: Family> {
    args: &'a ChatArgs,
    path: &'a Path,
    model: LanguageModel<F>,
    decoder: Decoder<F>,
    tokenizer: Tokenizer,
    ends: Vec<i32>,
}

fn message(role: &str, content: &str) -> Message {
    Message { role: role.into(), content: content.into() }
}

impl<F: Family> Work for Conversation<'_, F> {
    fn on<B: Backend<Real = f32>>(self, be: &mut B, _: usize) -> Result<(), Failure> {
        load(self.path, self.args.adapter.as_deref(), be, &self.model)?;
        let mut messages: Vec<_> =
            self.args.system.iter().map(|text| message("system", text)).collect();
        if let Some(prompt) = &self.args.prompt {
            messages.push(message("user", prompt));
            self.answer(be, &messages)?;
            return run::go_on();
        }
        run::catch_signals();
        let by_hand = io::stdin().is_terminal();
        if by_hand {
            report::note!("An empty line or Ctrl-D ends the conversation.");
        }
        let lines = lines();
        loop {
            if by_hand {
                // A prompt that nobody can read is not missed.
                let _ = write!(io::stderr(), "> ").and_then(|()| io::stderr().flush());
            }
            let Some(line) = next(&lines)? else { break };
            if line.trim().is_empty() {
                break;
            }
            messages.push(message("user", &line));
            let answer = self.answer(be, &messages)?;
            messages.push(message("assistant", answer.trim()));
            run::go_on()?;
        }
        Ok(())
    }
}

impl<F: Family> Conversation<'_, F> {
    /// Writes what the model answers, as it is written.
    fn answer<B: Backend<Real = f32>>(
        &self,
        be: &mut B,
        messages: &[Message],
    ) -> Result<String, Failure> {
        let wrong = |error: ChatError| Failure::Program(Box::new(error));
        let template = self.tokenizer.chat().ok_or(ChatError::None).map_err(wrong)?.today();
        let prompt = chat_prompt(&self.tokenizer, &template, messages).map_err(wrong)?;
        let prompt: Vec<_> = prompt.into_iter().map(|t| t as i32).collect();
        inference::tell_long(core::slice::from_ref(&prompt), self.decoder.sizes().context);
        let ChatArgs { temperature, top_p, top_k, seed, tokens, .. } = *self.args;
        let sampler = Sampler { temperature, top_k: top_k as usize, top_p };
        let decoding = Decoding {
            // Every answer of a conversation has numbers of its own.
            how: How::Sample(sampler, seed.wrapping_add(messages.len() as u64)),
            tokens: tokens as usize,
            ends: self.ends.clone(),
            no_repeat: 0,
            inference: bdia_models::inference::Inference::STANDARD,
        };
        let mut told = 0;
        let text_of = |tokens: &[i32]| {
            let tokens: Vec<u32> = tokens.iter().map(|t| *t as u32).collect();
            let text = self.tokenizer.decode_bytes(&tokens);
            String::from_utf8_lossy(&text).trim_start().to_string()
        };
        run::catch_signals();
        let found = self.decoder.decode(be, &[prompt], &decoding, |progress| {
            let text = text_of(progress.text);
            // The last character may be a part of one.
            let whole = text.trim_end_matches('\u{fffd}').len();
            if whole > told && text.is_char_boundary(told) {
                report::out(format_args!("{}", &text[told..whole]));
                told = whole;
            }
            if run::interrupted() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })?;
        let text = text_of(found.first().map_or(&[][..], Vec::as_slice));
        report::tell!("{}", text.get(told..).unwrap_or(""));
        Ok(text)
    }
}
