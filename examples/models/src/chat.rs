//! Conversations as a model was trained to read them: its chat template (Jinja), and the tokens
//! that are learned.

use minijinja::Environment;
use serde::{Deserialize, Serialize};

use crate::tokenizer::Tokenizer;

/// What somebody says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Who: `system`, `user` or `assistant`.
    pub role: String,
    /// What.
    pub content: String,
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
    /// Where a turn begins or ends in the text cannot be told.
    #[error(
        "message {message} of {messages} changes what the template writes before it, so that its \
         tokens cannot be told; expected a template that only appends"
    )]
    NotAppended {
        /// The message, from 0.
        message: usize,
        /// How many there are.
        messages: usize,
    },
}

/// A chat template.
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    source: String,
    environment: Result<Environment<'static>, String>,
    bos: Option<String>,
    eos: Option<String>,
}

impl ChatTemplate {
    /// Reads a template.
    ///
    /// # Errors
    /// [`ChatError::Template`]
    pub fn parse(text: &str, bos: Option<&str>, eos: Option<&str>) -> Result<Self, ChatError> {
        let _ = (text, bos, eos);
        todo!()
    }
    pub(crate) fn kept(text: &str, bos: Option<&str>, eos: Option<&str>) -> Self {
        todo!()
    }
    /// Writes.
    ///
    /// # Errors
    /// [`ChatError`]
    pub fn render(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
    ) -> Result<String, ChatError> {
        todo!()
    }
}

impl Tokenizer {
    /// The tokens.
    ///
    /// # Errors
    /// [`ChatError`]
    pub fn encode_chat(&self, messages: &[Message]) -> Result<(Vec<u32>, Vec<bool>), ChatError> {
        todo!()
    }
}
