//! Helpers for the tests of the HTTP providers.
#![allow(dead_code, missing_docs, unreachable_pub)] // Each test uses a part.

pub mod http2;
pub mod server;

use std::sync::Arc;

use futures::StreamExt as _;
use throughline::{Anthropic, Error, OpenAi, Provider, Reply, Request, Result, request::Delta};

use self::server::Server;

pub const KEY: &str = "sk-do-not-show-this-0123456789";

pub const OPENAI_BODY: &str = r#"{"id":"c1","model":"gpt-x-1","choices":[{"index":0,
    "message":{"role":"assistant","content":"Rhône"},"finish_reason":"stop"}],
    "usage":{"prompt_tokens":12,"completion_tokens":7,"total_tokens":19,
        "prompt_tokens_details":{"cached_tokens":4},
        "completion_tokens_details":{"reasoning_tokens":5}}}"#;

pub const ANTHROPIC_BODY: &str = r#"{"id":"m1","type":"message","model":"claude-x-1",
    "content":[{"type":"thinking","thinking":"hm"},{"type":"text","text":"Rhô"},
        {"type":"text","text":"ne"}],"stop_reason":"end_turn",
    "usage":{"input_tokens":5,"cache_read_input_tokens":4,"cache_creation_input_tokens":3,
        "output_tokens":7}}"#;

pub fn openai(server: &Server) -> OpenAi {
    let url = format!("{}/v1", server.url());
    let builder = OpenAi::builder().base_url(url).api_key(KEY);
    builder.build().unwrap()
}

pub fn anthropic(server: &Server) -> Anthropic {
    let builder = Anthropic::builder().base_url(server.url()).api_key(KEY);
    builder.build().unwrap()
}

pub fn both(server: &Server) -> [Arc<dyn Provider>; 2] {
    [Arc::new(openai(server)), Arc::new(anthropic(server))]
}

pub fn request() -> Request {
    Request::new("Name a river.").model("m")
}

/// Reads a stream to its end. Returns its texts and its result.
pub async fn collect(provider: &dyn Provider) -> (Vec<String>, Result<Reply, Error>) {
    let mut texts = Vec::new();
    let mut stream = match provider.stream(&request()).await {
        Ok(stream) => stream,
        Err(error) => return (texts, Err(error)),
    };
    while let Some(delta) = stream.next().await {
        match delta {
            Ok(Delta::Text(text)) => texts.push(text),
            Ok(Delta::End(reply)) => {
                assert!(stream.next().await.is_none(), "nothing comes after the end");
                return (texts, Ok(*reply));
            }
            Ok(other) => panic!("{other:?}"),
            Err(error) => {
                assert!(
                    stream.next().await.is_none(),
                    "nothing comes after an error"
                );
                return (texts, Err(error));
            }
        }
    }
    panic!("the stream ended without Delta::End");
}
