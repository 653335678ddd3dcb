//! Error responses in the words of real services: request or account, wait, and message.

use std::time::{Duration, Instant};

use throughline::ErrorKind::{self, *};
use throughline::{Context, Error, Pace, Provider};

use crate::support::server::{Recorded, Script, Server};
use crate::support::{ANTHROPIC_BODY, OPENAI_BODY, anthropic, both, collect, openai, request};

/// Returns the errors of both providers for this answer, whole and streamed.
async fn refused(scripts: impl IntoIterator<Item = Script>) -> Vec<Vec<Error>> {
    let scripts: Vec<_> = scripts.into_iter().collect();
    let twice = scripts
        .iter()
        .flat_map(|script| [script.clone(), script.clone()]);
    let server = Server::scripted(twice.clone().chain(twice)).await;
    let mut errors = vec![Vec::new(); scripts.len()];
    for provider in both(&server) {
        for errors in &mut errors {
            errors.push(provider.generate(&request()).await.unwrap_err());
            errors.push(collect(provider.as_ref()).await.1.unwrap_err());
        }
    }
    errors
}

const OPENAI_TOO_LARGE: &str = r#"{"error": {"message": "Request too large for gpt-4o in organization org-x on tokens per min (TPM): Limit 30000, Requested 31538. The input or output tokens must be reduced in order to run successfully. Visit https://platform.openai.com/account/rate-limits to learn more.", "type": "tokens", "param": null, "code": "rate_limit_exceeded"}}"#;
const GROQ_TOO_LARGE: &str = r#"{"error": {"message": "Rate limit reached for model `llama3-70b-8192` in organization `org_x` on tokens per minute (TPM): Limit 7000, Used 0, Requested ~12903. Please try again in 50.597142857s. Visit https://console.groq.com/docs/rate-limits for more information.", "type": "tokens", "code": "rate_limit_exceeded"}}"#;
const LONG_CONTEXT: &str = r#"{"type":"error","error":{"type":"rate_limit_error","message":"Extra usage is required for long context requests."},"request_id":"req_1"}"#;
const OPENROUTER_MODERATION: &str = r#"{"error":{"code":403,"message":"Input refused","metadata":{"reasons":["violence"],"flagged_input":"how to ...","provider_name":"OpenAI","model_slug":"openai/gpt-4o"}}}"#;
const XAI_GUIDELINES: &str = r#"{"code":"The caller does not have permission to execute the specified operation","error":"Content violates usage guidelines. Team: 0000, API key ID: 0000, Model: grok-4-0709, Failed check: SAFETY_CHECK_TYPE_BIO"}"#;
const CLOUDFLARE_BLOCK: &str = "<!DOCTYPE html><html><head><title>Attention Required! | Cloudflare</title></head><body>Sorry, you have been blocked. You are unable to access api.example.com</body></html>";

#[tokio::test]
async fn a_request_above_the_limit_is_invalid_and_not_throttled() {
    let headers = [("retry-after", "2"), ("x-should-retry", "true")];
    let bodies = [
        OPENAI_TOO_LARGE,
        GROQ_TOO_LARGE,
        LONG_CONTEXT,
        r#"{"error":{"message":"limit: 1,000 tokens, requested: 1,001","type":"tokens"}}"#,
    ];
    for status in [200, 429] {
        let scripts = bodies.map(|body| Script::reply(status, &headers, body));
        for error in refused(scripts).await.concat() {
            assert_eq!(error.kind(), InvalidRequest, "{error:?}");
            assert!(error.is_permanent() && error.wait().is_none(), "{error:?}");
        }
    }
}

#[tokio::test]
async fn a_request_within_the_limit_is_throttled() {
    let messages = [
        "Rate limit reached for gpt-4o on tokens per min (TPM): Limit 300000, Used 286751, Requested 16144. Please try again in 579ms.",
        "Rate limit reached on requests per min (RPM): Limit 3, Used 3, Requested 1. Please try again in 20s.",
        "Limit 30000, Requested 30000",
        "Request 7 of 5: rate limit exceeded",
        "limit reached, requested 99999999999999999999999 tokens",
    ];
    let scripts = messages.map(|message| {
        let body =
            serde_json::json!({"error": {"message": message, "code": "rate_limit_exceeded"}});
        Script::json(429, &body.to_string())
    });
    for error in refused(scripts).await.concat() {
        assert_eq!(error.kind(), Throttled, "{error:?}");
    }
}

/// A provider reports a wait of a day as it is; the rate limiter decides what it means for the account.
#[tokio::test]
async fn a_wait_of_a_day_is_reported_as_throttling() {
    let body = r#"{"error": {"code": "429", "message": "Requests to the ChatCompletions_Create Operation under Azure OpenAI API version 2024-08-01-preview have exceeded token rate limit of your current OpenAI S0 pricing tier. Please retry after 86400 seconds."}}"#;
    let script = Script::reply(429, &[("retry-after", "86400")], body);
    for error in refused([script]).await.concat() {
        assert_eq!(error.kind(), Throttled, "{error:?}");
        assert_eq!(error.wait(), Some(Duration::from_secs(86_400)));
        assert!(!error.is_account_wide());
    }
}

#[tokio::test]
async fn a_403_concerns_the_account_only_where_a_code_says_so() {
    let cases: [(&str, ErrorKind); 10] = [
        (OPENROUTER_MODERATION, InvalidRequest),
        (XAI_GUIDELINES, InvalidRequest),
        (CLOUDFLARE_BLOCK, InvalidRequest),
        (
            r#"{"error":{"code":"content_policy_violation","message":"no"}}"#,
            InvalidRequest,
        ),
        (
            r#"{"error":{"code":"model_not_allowed","message":"this key may not use the model"}}"#,
            Forbidden,
        ),
        (
            r#"{"type":"error","error":{"type":"permission_error","message":"Your API key does not have permission to use the specified resource."}}"#,
            Forbidden,
        ),
        ("", Forbidden),
        (
            r#"{"error":{"code":"unsupported_country_region_territory","message":"Country, region, or territory not supported"}}"#,
            Unauthorized,
        ),
        (
            r#"{"error":{"code":403,"status":"PERMISSION_DENIED","message":"API has not been used in project 1 before or it is disabled.","details":[{"reason":"SERVICE_DISABLED"}]}}"#,
            Unauthorized,
        ),
        (
            r#"{"error":{"type":"insufficient_quota","message":"no credit"}}"#,
            QuotaExhausted,
        ),
    ];
    let scripts = cases.map(|(body, _)| Script::reply(403, &[], body));
    for (errors, (body, kind)) in refused(scripts).await.iter().zip(cases) {
        for error in errors {
            assert_eq!(error.kind(), kind, "{body}: {error:?}");
            assert!(error.is_permanent() && error.billed() == Some(false));
            let account = matches!(kind, Unauthorized | QuotaExhausted);
            assert_eq!(error.is_account_wide(), account, "{body}");
        }
    }
    for error in refused([Script::reply(401, &[], CLOUDFLARE_BLOCK)])
        .await
        .concat()
    {
        assert!(error.is_account_wide(), "401 is about the key: {error:?}");
    }
}

/// Makes forty calls, one of which is refused with this answer.
async fn batch_with_one_refusal(refusal: Script) {
    let server = Server::answering(move |asked: Recorded| {
        if String::from_utf8_lossy(&asked.body).contains("(7)") {
            return refusal.clone();
        }
        Script::json(200, OPENAI_BODY)
    })
    .await;
    let cx = Context::builder(openai(&server))
        .pace(Pace::per_minute(60_000).in_flight(8))
        .model("m")
        .build();
    let start = Instant::now();
    let settled = cx
        .fan_out("call", 0..40)
        .settle(async |cx, n| cx.generate(format!("Describe river ({n}).")).await)
        .await;
    let failed: Vec<_> = settled.failures().map(|failed| failed.index).collect();
    assert_eq!(failed, [7]);
    assert!(
        start.elapsed() < Duration::from_secs(10),
        "{:?}",
        start.elapsed()
    );
    assert!(cx.lanes().all(|lane| lane.stopped().is_none()));
}

#[tokio::test]
async fn one_request_that_can_never_fit_fails_alone() {
    let body = GROQ_TOO_LARGE;
    batch_with_one_refusal(Script::reply(429, &[("retry-after", "50")], body)).await;
}

#[tokio::test]
async fn one_forbidden_request_fails_alone() {
    for body in [
        CLOUDFLARE_BLOCK,
        OPENROUTER_MODERATION,
        r#"{"error":{"code":"model_not_allowed"}}"#,
    ] {
        batch_with_one_refusal(Script::reply(403, &[], body)).await;
    }
}

/// Anthropic sends `retry-after` with successes too. It is not the wait of an overload in the middle of such a reply.
#[tokio::test]
async fn a_wait_in_a_success_is_ignored() {
    let start = "event: message_start\ndata: {\"type\":\"message_start\",\"message\":{\"model\":\"c\",\"usage\":{\"input_tokens\":5,\"output_tokens\":1}}}\n\n";
    let end = "event: error\ndata: {\"type\":\"error\",\"error\":{\"type\":\"overloaded_error\",\"message\":\"Overloaded\"}}\n\n";
    let waits = [("retry-after", "25"), ("retry-after-ms", "25000")];
    let body = format!("{start}{end}");
    let server = Server::scripted([
        Script::reply(200, &waits, body),
        Script::reply(200, &waits, ANTHROPIC_BODY),
        Script::reply(200, &waits, r#"{"error":{"type":"overloaded_error"}}"#),
        Script::reply(503, &waits, ""),
    ])
    .await;
    let anthropic = anthropic(&server);
    let error = collect(&anthropic).await.1.unwrap_err();
    assert_eq!((error.kind(), error.wait()), (Overloaded, None));
    assert_eq!(anthropic.generate(&request()).await.unwrap().rate, None);
    let error = anthropic.generate(&request()).await.unwrap_err();
    assert_eq!((error.kind(), error.wait()), (Overloaded, None));
    let error = anthropic.generate(&request()).await.unwrap_err();
    assert_eq!(error.wait(), Some(Duration::from_secs(25)));
}

#[tokio::test]
async fn the_error_of_a_wrong_base_url_names_it() {
    let cases = [
        (
            404,
            "<html><head><title>404 Not Found</title></head></html>",
            true,
        ),
        (404, "404 page not found", true),
        (404, "", true),
        (405, "<h1>Method Not Allowed</h1>", true),
        (404, r#"{"detail":"Not Found"}"#, false),
        (404, r#"{"error":"404 page not found"}"#, false),
    ];
    let scripts = cases.map(|(status, body, _)| Script::reply(status, &[], body));
    for (errors, (_, body, hint)) in refused(scripts).await.iter().zip(cases) {
        for error in errors {
            assert!(error.message().contains("http://127.0.0.1:"), "{error}");
            assert!(error.message().contains("/v1/"), "{error}");
            let hinted = error.message().contains("is the base URL right?");
            assert_eq!(hinted, hint, "{body}: {error}");
            assert!(!error.message().contains('<'), "{error}");
        }
    }
    let body = r#"{"error":{"code":"model_not_found","message":"The model `x` does not exist"}}"#;
    for error in refused([Script::json(404, body)]).await.concat() {
        assert_eq!(error.message(), "The model `x` does not exist");
    }
}

#[tokio::test]
async fn a_web_page_in_place_of_a_reply_is_not_billed() {
    let page = "<!doctype html>\n<html><head><title>Sign in to\n the Wi-Fi</title></head></html>";
    let scripts = ["text/html; charset=utf-8", "TEXT/HTML", "text/event-stream"]
        .map(|kind| Script::reply(200, &[("content-type", kind)], page));
    for error in refused(scripts).await.concat() {
        assert_eq!(
            (error.kind(), error.billed()),
            (MalformedReply, Some(false))
        );
        let message = error.message();
        assert!(
            message.contains("a web page came from http://127.0.0.1"),
            "{message}"
        );
        assert!(message.contains("\"Sign in to the Wi-Fi\""), "{message}");
    }
}

/// A server's message can contain anything. The error shows it as one line.
#[tokio::test]
async fn messages_are_one_line_without_escape_sequences() {
    let body = r#"{"error":{"message":"bad \u001b[2J\u001b[31mred\r\nERROR 2026 forged log line\u0000","code":"a\nb"}}"#;
    let plain = "upstream\u{1b}[31m failed\r\n\r\nConnection: close";
    let page = "<html>\r\n<head><title>502 Bad Gateway</title></head>\r\n<body>\r\n<center><h1>502 Bad Gateway</h1></center>\r\n</body>\r\n</html>\r\n";
    let cases = [
        (400, body, "bad red ERROR 2026 forged log line"),
        (502, plain, "upstream failed Connection: close"),
        (200, plain, "upstream failed Connection: close"),
        (502, page, "(\"502 Bad Gateway\")"),
    ];
    let scripts = cases.map(|(status, text, _)| Script::reply(status, &[], text));
    for (errors, (_, _, end)) in refused(scripts).await.iter().zip(cases) {
        for error in errors {
            let shown = error.to_string();
            assert!(!shown.chars().any(char::is_control), "{shown:?}");
            assert!(error.message().ends_with(end), "{shown}");
        }
    }
}
