//! Requests and replies of the HTTP providers over a real socket, and the classification of every error response.

use std::time::Duration;

use serde_json::json;
use throughline::ErrorKind::{self, *};
use throughline::{OpenAi, Persistence, Provider, Request, request::FinishReason};

use crate::support::server::{Script, Server};
use crate::support::{ANTHROPIC_BODY, KEY, OPENAI_BODY, anthropic, both, openai, request};

const fn s(seconds: u64) -> Option<Duration> {
    Some(Duration::from_secs(seconds))
}

const fn ms(millis: u64) -> Option<Duration> {
    Some(Duration::from_millis(millis))
}

#[tokio::test]
async fn openai_replies_carry_usage_limits_ids_and_the_raw_body() {
    let headers = [
        ("x-request-id", "req_1"),
        ("x-ratelimit-limit-requests", "500"),
        ("x-ratelimit-remaining-requests", "499"),
        ("x-ratelimit-reset-requests", "120ms"),
        ("x-ratelimit-limit-tokens", "30000"),
        ("x-ratelimit-remaining-tokens", "29000"),
        ("x-ratelimit-reset-tokens", "6m0s"),
    ];
    let server = Server::scripted([Script::reply(200, &headers, OPENAI_BODY)]).await;
    let reply = openai(&server).generate(&request()).await.unwrap();

    assert_eq!(reply.text, "Rhône");
    assert_eq!(reply.finish, FinishReason::Stop);
    assert_eq!(reply.model, "gpt-x-1");
    assert_eq!(reply.request_id.as_deref(), Some("req_1"));
    assert_eq!(reply.raw.as_deref(), Some(OPENAI_BODY));
    assert_eq!(reply.usage.input_tokens, 12);
    assert_eq!(reply.usage.output_tokens, 7);
    assert_eq!(reply.usage.cached_input_tokens, 4);
    assert_eq!(reply.usage.reasoning_tokens, 5);
    let rate = reply.rate.unwrap();
    assert_eq!(rate.requests.remaining, Some(499));
    assert_eq!(rate.requests.reset, ms(120));
    assert_eq!(rate.tokens.limit, Some(30_000));
    assert_eq!(rate.tokens.reset, s(360));

    let sent = &server.requests()[0];
    assert_eq!(sent.line, "POST /v1/chat/completions HTTP/1.1");
    let bearer = format!("Bearer {KEY}");
    assert_eq!(sent.header("authorization"), Some(bearer.as_str()));
    assert_eq!(sent.header("content-type"), Some("application/json"));
    let agent = concat!("throughline/", env!("CARGO_PKG_VERSION"));
    assert_eq!(sent.header("user-agent"), Some(agent));
    assert_eq!(
        sent.json(),
        json!({"model": "m", "messages": [{"role": "user", "content": "Name a river."}]})
    );
}

#[tokio::test]
async fn anthropic_replies_carry_usage_limits_ids_and_the_raw_body() {
    let headers = [
        ("date", "Tue, 03 Jun 2025 10:00:00 GMT"),
        ("request-id", "req_2"),
        ("anthropic-ratelimit-input-tokens-limit", "40000"),
        ("anthropic-ratelimit-input-tokens-remaining", "39000"),
        (
            "anthropic-ratelimit-input-tokens-reset",
            "2025-06-03T10:00:01Z",
        ),
    ];
    let server = Server::scripted([Script::reply(200, &headers, ANTHROPIC_BODY)]).await;
    let reply = anthropic(&server).generate(&request()).await.unwrap();

    assert_eq!(reply.text, "Rhône");
    assert_eq!(reply.finish, FinishReason::Stop);
    assert_eq!(reply.model, "claude-x-1");
    assert_eq!(reply.request_id.as_deref(), Some("req_2"));
    assert_eq!(reply.raw.as_deref(), Some(ANTHROPIC_BODY));
    assert_eq!(
        reply.usage.input_tokens, 12,
        "fresh, read and written to the cache"
    );
    assert_eq!(reply.usage.cached_input_tokens, 4);
    assert_eq!(reply.usage.output_tokens, 7);
    let rate = reply.rate.unwrap();
    assert_eq!(rate.input_tokens.limit, Some(40_000));
    assert_eq!(rate.input_tokens.reset, s(1));

    let sent = &server.requests()[0];
    assert_eq!(sent.line, "POST /v1/messages HTTP/1.1");
    assert_eq!(sent.header("x-api-key"), Some(KEY));
    assert_eq!(sent.header("anthropic-version"), Some("2023-06-01"));
    assert_eq!(sent.header("authorization"), None);
}

/// A line of the table: an error response and its classification in both dialects.
struct Case {
    status: u16,
    headers: &'static [(&'static str, &'static str)],
    body: &'static str,
    kind: ErrorKind,
    wait: Option<Duration>,
    code: Option<&'static str>,
}

const NONE: &[(&str, &str)] = &[];

const fn case(status: u16, body: &'static str, kind: ErrorKind) -> Case {
    Case {
        status,
        headers: NONE,
        body,
        kind,
        wait: None,
        code: None,
    }
}

impl Case {
    const fn headers(mut self, headers: &'static [(&'static str, &'static str)]) -> Self {
        self.headers = headers;
        self
    }
    const fn wait(mut self, wait: Option<Duration>) -> Self {
        self.wait = wait;
        self
    }
    const fn code(mut self, code: &'static str) -> Self {
        self.code = Some(code);
        self
    }
}

fn table() -> Vec<Case> {
    let mut cases = vec![
        // OpenAI
        case(
            429,
            r#"{"error":{"message":"Rate limit reached","type":"tokens","param":null,"code":"rate_limit_exceeded"}}"#,
            Throttled,
        )
        .headers(&[("retry-after-ms", "250"), ("retry-after", "1")])
        .wait(ms(250))
        .code("rate_limit_exceeded"),
        case(
            429,
            r#"{"error":{"message":"You exceeded your current quota, please check your plan and billing details.","type":"insufficient_quota","code":"insufficient_quota"}}"#,
            QuotaExhausted,
        )
        .headers(&[("x-should-retry", "true"), ("retry-after", "1")])
        .wait(s(1))
        .code("insufficient_quota"),
        case(
            429,
            r#"{"error":{"message":"x","type":"requests","code":null}}"#,
            Throttled,
        )
        .headers(&[
            ("x-ratelimit-remaining-requests", "0"),
            ("x-ratelimit-reset-requests", "2m59.56s"),
            ("x-ratelimit-remaining-tokens", "5"),
            ("x-ratelimit-reset-tokens", "10m"),
        ])
        .wait(ms(179_560))
        .code("requests"),
        case(
            503,
            r#"{"error":{"message":"Slow down","type":"slow_down","code":"slow_down"}}"#,
            Overloaded,
        )
        .code("slow_down"),
        case(
            429,
            r#"{"error":{"message":"Slow down","code":"slow_down"}}"#,
            Overloaded,
        )
        .code("slow_down"),
        case(
            401,
            r#"{"error":{"message":"Incorrect API key","type":"invalid_request_error","code":"invalid_api_key"}}"#,
            Unauthorized,
        )
        .code("invalid_api_key"),
        case(
            400,
            r#"{"error":{"message":"no","type":"invalid_request_error","code":null}}"#,
            InvalidRequest,
        )
        .code("invalid_request_error"),
        case(
            400,
            r#"{"error":{"message":"the prompt was filtered","code":"content_filter"}}"#,
            InvalidRequest,
        )
        .code("content_filter"),
        // Anthropic
        case(
            429,
            r#"{"type":"error","error":{"type":"rate_limit_error","message":"This request would exceed your organization's rate limit"}}"#,
            Throttled,
        )
        .headers(&[("retry-after", "17")])
        .wait(s(17))
        .code("rate_limit_error"),
        case(
            429,
            r#"{"type":"error","error":{"type":"rate_limit_error","message":"You have reached your spend limit."}}"#,
            QuotaExhausted,
        )
        .code("rate_limit_error"),
        case(
            400,
            r#"{"type":"error","error":{"type":"invalid_request_error","message":"Your credit balance is too low to access the API."}}"#,
            QuotaExhausted,
        )
        .code("invalid_request_error"),
        case(
            400,
            r#"{"type":"error","error":{"type":"invalid_request_error","message":"You have reached your specified API usage limits. You will regain access on 2025-07-01."}}"#,
            QuotaExhausted,
        )
        .code("invalid_request_error"),
        case(
            529,
            r#"{"type":"error","error":{"type":"overloaded_error","message":"Overloaded"}}"#,
            Overloaded,
        )
        .headers(&[("x-should-retry", "true")])
        .code("overloaded_error"),
        case(
            500,
            r#"{"type":"error","error":{"type":"overloaded_error","message":"Overloaded"}}"#,
            Overloaded,
        )
        .code("overloaded_error"),
        case(
            402,
            r#"{"type":"error","error":{"type":"billing_error","message":"pay"}}"#,
            QuotaExhausted,
        )
        .code("billing_error"),
        // Gemini's compatible endpoint: a list, and a code that is a number
        case(
            429,
            r#"[{"error":{"code":429,"message":"You exceeded your current quota, please check your plan and billing details.","status":"RESOURCE_EXHAUSTED","details":[
                {"@type":"type.googleapis.com/google.rpc.QuotaFailure","violations":[{"quotaId":"GenerateRequestsPerMinutePerProjectPerModel-FreeTier"}]},
                {"@type":"type.googleapis.com/google.rpc.RetryInfo","retryDelay":"45.8s"}]}}]"#,
            Throttled,
        )
        .wait(ms(45_800))
        .code("RESOURCE_EXHAUSTED"),
        // A header overrides the kind.
        case(
            429,
            r#"{"error":{"code":429,"status":"RESOURCE_EXHAUSTED","details":[{"retryDelay":"45.8s"}]}}"#,
            Throttled,
        )
        .headers(&[("retry-after", "2")])
        .wait(s(2))
        .code("RESOURCE_EXHAUSTED"),
        case(
            429,
            r#"{"error":{"code":429,"message":"quota","status":"RESOURCE_EXHAUSTED","details":[
                {"violations":[{"quotaId":"GenerateRequestsPerDayPerProjectPerModel-FreeTier"}]},{"retryDelay":"12s"}]}}"#,
            QuotaExhausted,
        )
        .wait(s(12))
        .code("RESOURCE_EXHAUSTED"),
        case(
            400,
            r#"{"error":{"code":400,"status":"INVALID_ARGUMENT","message":"API key not valid.","details":[{"reason":"API_KEY_INVALID"}]}}"#,
            Unauthorized,
        )
        .code("INVALID_ARGUMENT"),
        // Azure
        case(
            429,
            r#"{"statusCode": 429, "message": "Rate limit is exceeded. Try again in 3 seconds."}"#,
            Throttled,
        )
        .headers(&[
            ("retry-after", "3"),
            ("x-ratelimit-limit-tokens", "-1"),
            ("x-ratelimit-remaining-tokens", "0"),
            ("x-ratelimit-reset-tokens", "60"),
        ])
        .wait(s(3))
        .code("429"),
        case(
            429,
            r#"{"error":{"code":"429","message":"later"}}"#,
            Throttled,
        )
        .headers(&[
            ("x-ratelimit-remaining-tokens", "0"),
            ("x-ratelimit-reset-tokens", "60"),
        ])
        .wait(s(60))
        .code("429"),
        // Local servers and gateways
        case(404, r#"{"error":"model 'x' not found"}"#, InvalidRequest),
        case(
            400,
            r#"{"object":"error","message":"too long","type":"BadRequestError","param":null,"code":400}"#,
            InvalidRequest,
        )
        .code("BadRequestError"),
        case(422, r#"{"detail":[{"loc":["body"],"msg":"bad"}]}"#, InvalidRequest),
        // A validator repeats the prompt, whose words are not about the account.
        case(
            400,
            r#"{"detail":[{"loc":["body"],"input":"What is a spending limit?"}]}"#,
            InvalidRequest,
        ),
        case(429, "<html>Too many requests</html>", Throttled),
        case(429, "", Throttled)
            .headers(&[
                ("date", "Tue, 03 Jun 2025 10:00:00 GMT"),
                ("retry-after", "Tue, 03 Jun 2025 10:00:09 GMT"),
            ])
            .wait(s(9)),
        case(403, "<html>Forbidden</html>", InvalidRequest),
        case(403, r#"{"error":{"code":"forbidden","message":"Forbidden"}}"#, Forbidden).code("forbidden"),
        case(503, "upstream connect error", Overloaded)
            .headers(&[("retry-after", "0.5")])
            .wait(ms(500)),
        case(498, r#"{"error":{"message":"capacity"}}"#, Overloaded),
        case(302, "", Config).headers(&[("location", "https://other.example/v1?token=1")]),
        // Errors with a success status
        case(
            200,
            r#"{"error":{"code":429,"message":"Rate limited upstream"}}"#,
            Throttled,
        )
        .code("429"),
        case(
            200,
            "\u{feff}{\"error\":{\"code\":\"429\",\"message\":\"Rate limited upstream\"}}",
            Throttled,
        )
        .code("429"),
        case(
            200,
            r#"{"error":{"code":"502","message":"bad gateway upstream"}}"#,
            Unavailable,
        )
        .code("502"),
        case(
            200,
            r#"{"type":"error","error":{"type":"overloaded_error","message":"Overloaded"}}"#,
            Overloaded,
        )
        .code("overloaded_error"),
        case(
            200,
            r#"{"error":{"type":"insufficient_quota","code":"insufficient_quota","message":"x"}}"#,
            QuotaExhausted,
        )
        .code("insufficient_quota"),
        case(
            200,
            r#"{"error":{"type":"rate_limit_error","message":"x"}}"#,
            Throttled,
        )
        .code("rate_limit_error"),
        // Bodies that are no reply
        case(200, "<html>Log in</html>", MalformedReply),
        case(200, "", MalformedReply),
        case(200, r#"{"choices":[],"content":null}"#, MalformedReply),
        case(200, r#"{"id":"x"}"#, MalformedReply),
    ];
    // Statuses without a body
    let plain = [
        (400, InvalidRequest),
        (401, Unauthorized),
        (402, QuotaExhausted),
        (403, Forbidden),
        (404, InvalidRequest),
        (405, InvalidRequest),
        (408, Unavailable),
        (409, Unavailable),
        (413, InvalidRequest),
        (422, InvalidRequest),
        (425, Unavailable),
        (429, Throttled),
        (500, Unavailable),
        (501, Unavailable),
        (502, Unavailable),
        (503, Overloaded),
        (504, Unavailable),
        (520, Unavailable),
        (529, Overloaded),
        (599, Unavailable),
    ];
    cases.extend(plain.map(|(status, kind)| case(status, "{}", kind)));
    cases
}

#[tokio::test]
async fn every_error_response_is_classified_in_both_dialects_whole_and_streamed() {
    for case in table() {
        let mut headers = case.headers.to_vec();
        headers.push(("x-request-id", "req_9"));
        headers.push(("content-type", "application/json"));
        let server = Server::scripted([Script::reply(case.status, &headers, case.body)]).await;
        for provider in both(&server) {
            let whole = provider.generate(&request()).await.unwrap_err();
            let streamed = provider.stream(&request()).await.err().unwrap();
            for error in [whole, streamed] {
                let what = format!(
                    "{} {} {}: {error:?}",
                    provider.name(),
                    case.status,
                    case.body
                );
                assert_eq!(error.kind(), case.kind, "{what}");
                assert_eq!(error.wait(), case.wait, "{what}");
                assert_eq!(error.code(), case.code, "{what}");
                assert_eq!(error.http_status(), Some(case.status), "{what}");
                assert_eq!(error.request_id(), Some("req_9"), "{what}");
                // A web page does not come from the API, so the call is not billed.
                let billed = case.kind == MalformedReply && !case.body.starts_with('<');
                assert_eq!(error.billed(), Some(billed), "{what}");
                assert!(!error.to_string().contains("token="), "{what}");
                let limits = case
                    .headers
                    .iter()
                    .any(|(name, _)| name.contains("ratelimit"));
                assert_eq!(
                    error.rate().is_some(),
                    limits || case.wait.is_some(),
                    "{what}"
                );
            }
        }
        // Each provider makes one whole and one streamed call, and retries neither.
        assert_eq!(server.requests().len(), 4, "{} {}", case.status, case.body);
    }
}

#[tokio::test]
async fn x_should_retry_overrides_the_persistence() {
    let cases = [
        (500, "false", Persistence::Permanent),
        (400, "true", Persistence::Temporary),
        (402, "true", Persistence::Permanent),
        (429, "maybe", Persistence::Temporary),
    ];
    for (status, word, expected) in cases {
        let headers = [("x-should-retry", word)];
        let server = Server::scripted([Script::reply(status, &headers, "{}")]).await;
        let error = openai(&server).generate(&request()).await.unwrap_err();
        assert_eq!(error.persistence(), expected, "{status} {word}");
    }
}

#[tokio::test]
async fn stop_reasons_are_mapped_to_finish_reasons() {
    let openai_body = |reason: &str| {
        json!({"choices": [{"message": {"content": "a"}, "finish_reason": reason}]}).to_string()
    };
    let anthropic_body = |reason: &str| {
        json!({"content": [{"type": "text", "text": "a"}], "stop_reason": reason}).to_string()
    };
    for (openai_word, anthropic_word, expected) in [
        ("stop", "end_turn", FinishReason::Stop),
        ("stop", "stop_sequence", FinishReason::Stop),
        ("length", "max_tokens", FinishReason::Length),
        ("content_filter", "refusal", FinishReason::ContentFilter),
        ("tool_calls", "tool_use", FinishReason::ToolCalls),
        ("odd", "odd", FinishReason::Other("odd".into())),
    ] {
        let scripts = [
            Script::json(200, &openai_body(openai_word)),
            Script::json(200, &anthropic_body(anthropic_word)),
        ];
        let server = Server::scripted(scripts).await;
        for provider in both(&server) {
            let reply = provider.generate(&request()).await.unwrap();
            assert_eq!(reply.finish, expected);
        }
    }
}

#[tokio::test]
async fn unusual_but_valid_messages_are_parsed() {
    let cases = [
        (
            r#"{"content":null,"refusal":"I cannot."}"#,
            "I cannot.",
            FinishReason::ContentFilter,
        ),
        (
            r#"{"content":null,"tool_calls":[]}"#,
            "",
            FinishReason::Stop,
        ),
        (
            r#"{"content":[{"type":"text","text":"a"},{"type":"text","text":"b"}]}"#,
            "ab",
            FinishReason::Stop,
        ),
    ];
    for (message, text, finish) in cases {
        let body = format!(
            "\u{feff}{{\"error\":null,\"choices\":[{{\"index\":1,\"message\":{{\"content\":\"no\"}}}},
             {{\"index\":0,\"message\":{message},\"finish_reason\":\"stop\"}}]}}"
        );
        let server = Server::scripted([Script::json(200, &body)]).await;
        let reply = openai(&server).generate(&request()).await.unwrap();
        assert_eq!((reply.text.as_str(), reply.finish), (text, finish));
        assert_eq!(reply.usage.total(), 0, "absent usage is no error");
        assert_eq!(reply.rate, None);
    }
}

/// Azure omits the message of a choice that its filter has emptied.
#[tokio::test]
async fn a_choice_without_a_message_is_a_reply_only_if_it_was_filtered() {
    let body = |reason: &str| {
        format!(
            r#"{{"choices":[{{"content_filter_results":{{"hate":{{"filtered":true,"severity":"high"}}}},"finish_reason":"{reason}","index":0,"logprobs":null}}],
            "model":"gpt-35-turbo","usage":{{"completion_tokens":14,"prompt_tokens":6,"total_tokens":20}}}}"#
        )
    };
    let scripts = [
        Script::json(200, &body("content_filter")),
        Script::json(200, &body("stop")),
    ];
    let server = Server::scripted(scripts).await;
    let openai = openai(&server);
    let reply = openai.generate(&request()).await.unwrap();
    assert_eq!(
        (reply.text.as_str(), reply.finish),
        ("", FinishReason::ContentFilter)
    );
    assert_eq!(reply.usage.output_tokens, 14, "it was paid for");
    let error = openai.generate(&request()).await.unwrap_err();
    assert_eq!(error.kind(), MalformedReply);
    assert!(error.message().contains("no message"), "{error}");
}

#[tokio::test]
async fn azure_urls_and_key_headers_are_supported() {
    let server = Server::scripted([Script::json(200, OPENAI_BODY)]).await;
    let azure = OpenAi::builder()
        .base_url(format!("{}/openai/deployments/d?tenant=1", server.url()))
        .api_key(format!(" {KEY}\n"))
        .key_header("api-key")
        .query("api-version", "2024-10-21")
        .organization("org-1")
        .project("proj-1")
        .header("x-gateway", "gateway-secret")
        .header("user-agent", "my-service/2")
        .build()
        .unwrap();
    azure.generate(&request()).await.unwrap();
    let sent = &server.requests()[0];
    assert_eq!(
        sent.line,
        "POST /openai/deployments/d/chat/completions?tenant=1&api-version=2024-10-21 HTTP/1.1"
    );
    assert_eq!(sent.header("api-key"), Some(KEY));
    assert_eq!(sent.header("authorization"), None);
    assert_eq!(sent.header("openai-organization"), Some("org-1"));
    assert_eq!(sent.header("openai-project"), Some("proj-1"));
    assert_eq!(sent.header("x-gateway"), Some("gateway-secret"));
    assert_eq!(sent.header("user-agent"), Some("my-service/2"));
}

#[tokio::test]
async fn a_request_without_a_model_fails_before_it_is_sent() {
    let server = Server::scripted([Script::json(200, OPENAI_BODY)]).await;
    for provider in both(&server) {
        for error in [
            provider.generate(&Request::new("a")).await.unwrap_err(),
            provider.stream(&Request::new("a")).await.err().unwrap(),
        ] {
            assert_eq!(error.kind(), InvalidRequest);
            assert!(error.message().contains("names no model"));
        }
    }
    assert_eq!(server.connections(), 0);
}

#[tokio::test]
async fn invalid_settings_fail_when_the_client_is_built() {
    let build = |url: &str| OpenAi::builder().base_url(url).build();
    for (url, why) in [
        ("", "begin with https:// or http://"),
        ("localhost:1", "begin with https:// or http://"),
        ("api.example.com/v1", "begin with https:// or http://"),
        ("ftp://a", "begin with https:// or http://"),
        ("http://", "empty host"),
        ("http://user:pa55word@a", "header"),
    ] {
        let error = build(url).unwrap_err();
        assert_eq!(error.kind(), Config, "{url}");
        assert!(error.message().contains(why), "{url}: {error}");
        assert!(!error.to_string().contains("pa55word"));
    }
    let error = OpenAi::new("sk-with\nnewline").unwrap_err();
    assert_eq!(error.kind(), Config);
    assert!(error.message().contains("authorization") && !error.to_string().contains("sk-"));
    let error = OpenAi::builder()
        .header("bad name", "v")
        .build()
        .unwrap_err();
    assert!(error.message().contains("bad name"));
}

#[tokio::test]
async fn connections_are_reused() {
    let server = Server::fixed(crate::support::server::reply(
        200,
        &[],
        OPENAI_BODY.as_bytes(),
    ))
    .await;
    let openai = openai(&server);
    for _ in 0..20 {
        assert_eq!(openai.generate(&request()).await.unwrap().text, "Rhône");
    }
    assert_eq!(server.connections(), 1);
}
