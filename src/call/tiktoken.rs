//! [`Tiktoken`]: a token counter with the tokenizers of OpenAI's models.

use std::fmt;

use tiktoken_rs::CoreBPE;

use crate::call::estimate::TokenCounter;
use crate::error::{Error, ErrorKind, Result};
use crate::request::Request;

/// The tokens of a message beside its content: three for its frame, one for its role.
const MESSAGE: usize = 4;
/// The tokens with which the answer is primed.
const PRIMER: usize = 3;

/// A [`TokenCounter`] with the tokenizers of OpenAI's models: byte-pair encoding, and the tokens
/// around each message according to the [OpenAI cookbook].
///
/// For other providers it is an estimate, though for text that is far from English prose a closer one than four bytes to a
/// token. The first one of a process loads the vocabulary, which
/// blocks for a moment: make it before the work begins.
///
/// ```
/// use throughline::{Context, Request, testing::Scripted, call::{Tiktoken, TokenCounter}};
///
/// let counter = Tiktoken::for_model("gpt-4o")?;
/// assert_eq!(counter.count(&Request::new("hello world")), 2 + 7);
/// let cx = Context::builder(Scripted::new()).token_counter(counter).build();
/// # let _ = cx;
/// # Ok::<(), throughline::Error>(())
/// ```
///
/// [OpenAI cookbook]: https://cookbook.openai.com/examples/how_to_count_tokens_with_tiktoken
#[derive(Clone, Copy)]
pub struct Tiktoken(&'static CoreBPE);

impl Tiktoken {
    /// Loads the tokenizer of a model of OpenAI's.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] if no tokenizer is known for the model: take that of
    /// a similar model, such as `gpt-4o`.
    pub fn for_model(model: &str) -> Result<Self> {
        tiktoken_rs::bpe_for_model(model).map(Self).map_err(|_| {
            let message = format!("no tokenizer is known for the model {model:?}");
            Error::new(ErrorKind::Config, message)
        })
    }
}

impl TokenCounter for Tiktoken {
    fn count(&self, request: &Request) -> u64 {
        let messages = request.messages.iter();
        let tokens = messages.map(|it| MESSAGE + self.0.count_ordinary(&it.content));
        (tokens.sum::<usize>() + PRIMER) as u64
    }
}

impl fmt::Debug for Tiktoken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tiktoken").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The expected counts come from OpenAI's own `tiktoken`.
    #[test]
    fn counts_are_those_of_the_reference() {
        let counter = Tiktoken::for_model("gpt-4o").unwrap();
        for (text, tokens) in [("", 0), ("hello world", 2), ("tiktoken is great!", 6)] {
            assert_eq!(counter.count(&Request::new(text)), tokens + 7, "{text}");
        }
        let two = Request::new("hello world").system("hello world");
        assert_eq!(counter.count(&two), 2 * (2 + 4) + 3);
    }

    #[test]
    fn the_error_names_an_unknown_model() {
        let error = Tiktoken::for_model("some-model").unwrap_err();
        assert!(error.to_string().contains("some-model"), "{error}");
    }
}
