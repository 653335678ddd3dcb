//! The providers of this crate, held to the contract of all providers.

use std::sync::Arc;
use std::time::Duration;

use throughline::provider::sim::{Enforcement, Sim, Tokens};
use throughline::testing::Scripted;
use throughline::testing::provider::{self, INPUT_TOKENS, OUTPUT_TOKENS, Scenario, TEXT, WAIT};
use throughline::{Error, ErrorKind, Provider, Reply, Request, Usage};

#[tokio::test(start_paused = true)]
async fn the_simulator_conforms() {
    provider::conformance(async |scenario| {
        let sim = Sim::builder()
            .latency(Duration::from_secs(1))
            .reply(|_| TEXT)
            .output_tokens(Tokens::fixed(OUTPUT_TOKENS));
        let sim = match scenario {
            Scenario::Success => sim,
            Scenario::ThrottledWithWait => {
                // A token for each second. This request spends seven, one of which is there.
                let burst = Duration::from_secs(1);
                let sim = Sim::builder()
                    .tokens_per_minute(60)
                    .enforcement(Enforcement::TokenBucket { burst })
                    .build();
                let request = Request::new("Name a river").max_tokens(0);
                assert_eq!(request.estimated_input_tokens(), WAIT.as_secs());
                sim.generate(&request).await.unwrap();
                return Some(Arc::new(sim) as Arc<dyn Provider>);
            }
            Scenario::Throttled => sim.throttle_rate(1.0),
            Scenario::QuotaExhausted => sim.insufficient_quota_after(0),
            Scenario::Overloaded => sim.overload_rate(1.0),
            Scenario::ServerError => sim.error_rate(1.0),
            Scenario::InvalidRequest => sim.fail_when("", ErrorKind::InvalidRequest),
            Scenario::Unauthorized => sim.unauthorized(),
            Scenario::CutReply => sim.cut_rate(1.0),
            Scenario::Hang => sim.hang_rate(1.0),
            // The simulated model has a context without end.
            Scenario::ContextTooLong => return None,
            other => panic!("{other:?}"),
        };
        Some(Arc::new(sim.build()) as Arc<dyn Provider>)
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn the_scripted_provider_conforms() {
    provider::conformance(async |scenario| {
        let fails = |kind| Err(Error::new(kind, "scripted"));
        let answer = match scenario {
            Scenario::Success => Ok(Reply::new(TEXT, Usage::new(INPUT_TOKENS, OUTPUT_TOKENS))),
            Scenario::ThrottledWithWait => {
                Err(Error::new(ErrorKind::Throttled, "scripted").with_wait(WAIT))
            }
            Scenario::Throttled => fails(ErrorKind::Throttled),
            Scenario::QuotaExhausted => fails(ErrorKind::QuotaExhausted),
            Scenario::Overloaded => fails(ErrorKind::Overloaded),
            Scenario::ServerError => fails(ErrorKind::Unavailable),
            Scenario::InvalidRequest | Scenario::ContextTooLong => fails(ErrorKind::InvalidRequest),
            Scenario::Unauthorized => fails(ErrorKind::Unauthorized),
            Scenario::CutReply => fails(ErrorKind::Connection),
            Scenario::Hang => Ok(Reply::new("too late", Usage::default())),
            other => panic!("{other:?}"),
        };
        // A line for `generate` and one for `stream`.
        let script = (0..2).fold(Scripted::new(), |script, _| match &answer {
            Err(error) if scenario == Scenario::CutReply => {
                script.broken(Duration::from_secs(1), [&TEXT[..9]], error.clone())
            }
            Err(error) => script.error(error.clone()),
            Ok(reply) if scenario == Scenario::Hang => {
                script.delay(Duration::MAX / 4).exact_reply(reply.clone())
            }
            Ok(reply) => script.exact_reply(reply.clone()),
        });
        Some(Arc::new(script) as Arc<dyn Provider>)
    })
    .await;
}

#[cfg(all(feature = "openai", feature = "anthropic"))]
mod http {
    use serde_json::json;

    use super::*;
    use crate::support::server::{Act, Recorded, Script, Server, reply};
    use crate::support::{anthropic, openai};

    /// The parts in which the dialects differ.
    struct Dialect {
        /// A whole answer with this text.
        answer: fn(&str) -> String,
        /// A streamed answer with these texts, but for its end.
        begin: fn(&[&str]) -> String,
        end: &'static str,
        error: fn(kind: &str, code: &str, message: &str) -> String,
        context_too_long: (&'static str, &'static str),
        quota_exhausted: (u16, &'static str, &'static str),
        overloaded: (u16, &'static str),
    }

    const OPENAI: Dialect = Dialect {
        answer: |text| {
            json!({
                "model": "m",
                "choices": [{"index": 0, "message": {"content": text}, "finish_reason": "stop"}],
                "usage": {"prompt_tokens": INPUT_TOKENS, "completion_tokens": OUTPUT_TOKENS},
            })
            .to_string()
        },
        begin: |texts| {
            let frame = |text| {
                let delta = json!({"choices": [{"index": 0, "delta": {"content": text}}]});
                format!("data: {delta}\n\n")
            };
            texts.iter().map(frame).collect()
        },
        end: concat!(
            "data: {\"choices\":[{\"index\":0,\"delta\":{},\"finish_reason\":\"stop\"}]}\n\n",
            "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":12,\"completion_tokens\":17}}\n\n",
            "data: [DONE]\n\n",
        ),
        error: |kind, code, message| {
            json!({"error": {"type": kind, "code": code, "message": message}}).to_string()
        },
        context_too_long: ("context_length_exceeded", "at most 8192 tokens"),
        quota_exhausted: (429, "insufficient_quota", "You exceeded your current quota"),
        overloaded: (503, "The engine is currently overloaded"),
    };

    const ANTHROPIC: Dialect = Dialect {
        answer: |text| {
            json!({
                "model": "m",
                "content": [{"type": "text", "text": text}],
                "stop_reason": "end_turn",
                "usage": {"input_tokens": INPUT_TOKENS, "output_tokens": OUTPUT_TOKENS},
            })
            .to_string()
        },
        begin: |texts| {
            let usage = json!({"input_tokens": INPUT_TOKENS, "output_tokens": 1});
            let start = json!({"type": "message_start", "message": {"model": "m", "usage": usage}});
            let frame = |text| {
                let delta = json!({"type": "text_delta", "text": text});
                let frame = json!({"type": "content_block_delta", "index": 0, "delta": delta});
                format!("event: content_block_delta\ndata: {frame}\n\n")
            };
            let frames: String = texts.iter().map(frame).collect();
            format!("event: message_start\ndata: {start}\n\n{frames}")
        },
        end: concat!(
            "event: message_delta\ndata: {\"type\":\"message_delta\",\"delta\":",
            "{\"stop_reason\":\"end_turn\"},\"usage\":{\"output_tokens\":17}}\n\n",
            "event: message_stop\ndata: {\"type\":\"message_stop\"}\n\n",
        ),
        error: |kind, _, message| {
            json!({"type": "error", "error": {"type": kind, "message": message}}).to_string()
        },
        context_too_long: ("", "prompt is too long: 210000 tokens > 200000 maximum"),
        quota_exhausted: (400, "", "Your credit balance is too low to access the API."),
        overloaded: (529, "Overloaded"),
    };

    impl Dialect {
        fn script(&self, scenario: Scenario, request: &Recorded) -> Script {
            let streamed = request.json()["stream"] == true;
            let refuse = |status, kind: &str, code: &str, message: &str| {
                Script::json(status, &(self.error)(kind, code, message))
            };
            match scenario {
                Scenario::Success if streamed => {
                    let begin = (self.begin)(&[&TEXT[..9], &TEXT[9..]]);
                    Script::events(&[begin.as_str(), self.end])
                }
                Scenario::Success => Script::json(200, &(self.answer)(TEXT)),
                Scenario::ThrottledWithWait => {
                    let body = (self.error)("rate_limit_error", "rate_limit_exceeded", "slower");
                    Script::reply(429, &[("retry-after", "7")], body)
                }
                Scenario::Throttled => {
                    refuse(429, "rate_limit_error", "rate_limit_exceeded", "slower")
                }
                Scenario::QuotaExhausted => {
                    let (status, code, message) = self.quota_exhausted;
                    refuse(status, "invalid_request_error", code, message)
                }
                Scenario::Overloaded => {
                    let (status, message) = self.overloaded;
                    refuse(status, "overloaded_error", "", message)
                }
                Scenario::ServerError => refuse(500, "api_error", "", "Internal server error"),
                Scenario::InvalidRequest => refuse(
                    400,
                    "invalid_request_error",
                    "",
                    "temperature: must be at most 1",
                ),
                Scenario::ContextTooLong => {
                    let (code, message) = self.context_too_long;
                    refuse(400, "invalid_request_error", code, message)
                }
                Scenario::Unauthorized => refuse(
                    401,
                    "authentication_error",
                    "invalid_api_key",
                    "invalid x-api-key",
                ),
                Scenario::CutReply if streamed => Script::events(&[(self.begin)(&[&TEXT[..9]])]),
                Scenario::CutReply => {
                    let whole = reply(200, &[], (self.answer)(TEXT).as_bytes());
                    Script::new()
                        .send(&whole[..whole.len() - 60])
                        .then(Act::Close)
                }
                Scenario::Hang => Script::new().then(Act::Hang),
                other => panic!("{other:?}"),
            }
        }

        async fn server(&'static self, scenario: Scenario) -> Server {
            Server::answering(move |request| self.script(scenario, &request)).await
        }
    }

    /// A provider that keeps its server alive.
    struct Served<P>(P, #[allow(dead_code)] Server);

    #[throughline::async_trait]
    impl<P: Provider> Provider for Served<P> {
        fn name(&self) -> &str {
            self.0.name()
        }

        async fn generate(&self, request: &Request) -> throughline::Result<Reply> {
            self.0.generate(request).await
        }

        async fn stream(
            &self,
            request: &Request,
        ) -> throughline::Result<throughline::request::ReplyStream> {
            self.0.stream(request).await
        }
    }

    #[tokio::test]
    async fn openai_conforms() {
        provider::conformance(async |scenario| {
            let server = OPENAI.server(scenario).await;
            Some(Arc::new(Served(openai(&server), server)) as Arc<dyn Provider>)
        })
        .await;
    }

    #[tokio::test]
    async fn anthropic_conforms() {
        provider::conformance(async |scenario| {
            let server = ANTHROPIC.server(scenario).await;
            Some(Arc::new(Served(anthropic(&server), server)) as Arc<dyn Provider>)
        })
        .await;
    }
}
