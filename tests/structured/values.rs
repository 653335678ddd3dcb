//! Replies as values: what is accepted, what is refused and with which words, and what is asked again.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use futures::StreamExt as _;
use schemars::JsonSchema;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use throughline::store::Memory;
use throughline::testing::Scripted;
use throughline::{
    Context, Error, ErrorKind, Reply, Request, Result, Retry, Usage,
    call::Deployment,
    observe::Event,
    request::{FinishReason, ResponseFormat, Role},
    structured::OnLength,
};

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
struct River {
    name: String,
    length_km: u32,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    cities: Vec<City>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
struct City {
    name: String,
    people: f64,
}

fn po() -> River {
    River {
        name: "Po".into(),
        length_km: 652,
        cities: Vec::new(),
    }
}

const PO: &str = r#"{"name": "Po", "length_km": 652}"#;

/// One reply, no second chance.
async fn once<T>(reply: &str) -> Result<T>
where
    T: DeserializeOwned + JsonSchema + Send + 'static,
{
    let cx = Context::builder(Scripted::new().reply(reply)).build();
    cx.generate_as::<T>("Describe a river.").attempts(1).await
}

#[tokio::test]
async fn each_kind_of_malformed_reply_has_its_outcome() {
    let fence = format!("```json\n{PO}\n```");
    let accepted = [
        ("plain", PO.to_owned()),
        ("code fence", fence.clone()),
        (
            "fence without a language or line breaks",
            format!("```{PO}```"),
        ),
        (
            "prose around it",
            format!("Sure! Here is your river:\n\n{PO}\n\nAnything else?"),
        ),
        (
            "prose with brackets, and a fence",
            format!("See [1] for {{details}}:\n{fence}\nNote that {{}} is empty."),
        ),
        ("byte order mark and spaces", format!("\u{feff}  {PO}\r\n")),
        (
            "JSON within a JSON string",
            serde_json::to_string(PO).unwrap(),
        ),
        (
            "a fence within a JSON string",
            serde_json::to_string(&fence).unwrap(),
        ),
        (
            "another value before it that does not fit",
            format!("[{{\"step\": 1}}]\nAnd so: {PO}"),
        ),
        ("an unknown field", PO.replacen('{', r#"{"x": 1, "#, 1)),
    ];
    for (what, reply) in accepted {
        assert_eq!(once::<River>(&reply).await.unwrap(), po(), "{what}");
    }

    let refused = REFUSED.trim().lines().map(|line| {
        let parts: Vec<_> = line.split(" | ").collect();
        let [what, reply, problem] = parts[..] else {
            panic!("{line}");
        };
        (what, reply.replace("PO", PO).replace("\\n", "\n"), problem)
    });
    let deep = format!("{}{}", "[".repeat(300), "]".repeat(300));
    let others = [
        ("empty", " \n".to_owned(), "the reply is empty"),
        ("too deep", deep, "at `[0]`: invalid type: sequence"),
    ];
    for (what, reply, problem) in refused.chain(others) {
        let error = once::<River>(&reply).await.expect_err(what);
        let is_told = error.is_invalid_output() && error.message().contains(problem);
        assert!(is_told, "{what}: {error:?}");
    }
}

/// On each line a kind of reply, the reply (`PO` stands for [`PO`], `\n` for a line break), and a part of the error.
const REFUSED: &str = r#"
no JSON | The Po. | holds no JSON: "The Po."
cut in a string | {"name": "P | ends in the middle, at line 1 column 11
cut between fields | {"name": "Po", | ends in the middle
cut, with a whole part | {"length_km": 1, "cities": [{"name": "Turin", "people": 1}, | ends in the middle
wrong type | {"name": "Po", "length_km": "652"} | at `length_km`: invalid type: string "652", expected u32
wrong type below | {"name": "Po", "length_km": 652, "cities": [{"name": "Turin", "people": "many"}]} | at `cities[0].people`: invalid type: string "many", expected f64
out of range | {"name": "Po", "length_km": -652} | at `length_km`: invalid value: integer `-652`
null for a value | {"name": null, "length_km": 652} | at `name`: invalid type: null
missing field | {"name": "Po"} | missing field `length_km`
in an object too many | {"river": PO} | missing field `name`
in an array | [PO] | invalid type: map, expected a string
duplicate keys | {"name": "Po", "length_km": 652, "name": "Rhine"} | duplicate field `name`
two objects | PO\nPO | holds 2 JSON values that fit
two objects with prose | PO or else {"name": "Rhine", "length_km": 1233} | holds 2 JSON values that fit
trailing comma | {"name": "Po", "length_km": 652,} | not JSON: a trailing comma, at line 1 column 33
NaN | {"name": "Po", "length_km": NaN} | `NaN` is not JSON: write a number or null
-Infinity | {"name": "Po", "length_km": -Infinity} | `Infinity` is not JSON
Python | {"name": None, "length_km": 652} | `None` is Python
single quotes | {'name': 'Po', 'length_km': 652} | a single quote where JSON has double quotes
keys without quotes | {name: "Po", length_km: 652} | a key without quotes
a comment | {"name": "Po", // the Po\n"length_km": 652} | a comment, which JSON does not have
an ellipsis | {"name": "Po", "cities": [...]} | an ellipsis in the place of values
a line break in a string | {"name": "P\no", "length_km": 652} | within a string: write it as an escape
quotes that are not escaped | {"name": "the "Po"", "length_km": 652} | expected `,` or `}`, at line 1 column 16
brackets that do not match | {"name": "Po", "cities": [} | not JSON
"#;

#[tokio::test]
async fn a_value_that_is_not_an_object_may_come_wrapped_or_bare() {
    for reply in [
        "[1, 2]",
        r#"{"value": [1, 2]}"#,
        "```\n[1,2]\n```",
        "So: {\"value\": [1,2]}.",
    ] {
        assert_eq!(once::<Vec<u8>>(reply).await.unwrap(), [1, 2], "{reply}");
    }
    assert_eq!(once::<u32>("42").await.unwrap(), 42);
    assert_eq!(once::<String>("\"a\"").await.unwrap(), "a");
    let error = once::<Vec<u8>>(r#"{"value": [1, 300]}"#).await.unwrap_err();
    assert!(
        error.message().starts_with("at `value[1]`: invalid value"),
        "{error}"
    );
}

#[tokio::test]
async fn an_unusable_reply_is_quoted_to_the_model_with_its_problem() {
    let script = Scripted::new()
        .reply("The Po, of course.")
        .reply(r#"{"name": "Po"}"#)
        .reply(PO);
    let told = Arc::new(Mutex::new(Vec::new()));
    let tell = Arc::clone(&told);
    let cx = Context::builder(script.clone())
        .on_event(move |event| {
            if let Event::ReplyRejected { ask, error, .. } = event {
                tell.lock()
                    .unwrap()
                    .push((*ask, error.message().to_owned()));
            }
        })
        .build();
    let item = cx.child("river");
    let generated = item
        .generate_as::<River>("Which?")
        .detailed()
        .await
        .unwrap();
    assert_eq!(generated.value, po());
    assert_eq!(generated.reply.text, PO);
    let problems: Vec<&str> = generated.rejected.iter().map(|r| &*r.problem).collect();
    assert_eq!(problems[1], "missing field `length_km` at line 1 column 14");
    assert_eq!(generated.rejected[0].text, "The Po, of course.");
    let told = told.lock().unwrap();
    assert_eq!(
        *told,
        [(1, problems[0].to_owned()), (2, problems[1].to_owned())]
    );
    let tally = item.tally();
    assert_eq!((tally.calls, tally.attempts), (3, 3));
    assert_eq!((tally.reasked, tally.retries), (2, 0));

    let requests = script.requests();
    let (first, last) = (&requests[0], &requests[2]);
    assert_eq!(first.messages.len(), 2, "the schema and the question");
    assert!(first.messages[0].content.contains("\"length_km\""));
    // The question, the last reply and its error; not the one before.
    assert_eq!(last.messages[..2], first.messages[..]);
    assert_eq!(last.messages[2].role, Role::Assistant);
    assert_eq!(last.messages[2].content, r#"{"name": "Po"}"#);
    assert!(last.last_text().contains("missing field `length_km`"));
    assert_eq!(last.messages.len(), 4);
}

#[tokio::test]
async fn objections_of_a_validator_are_passed_to_the_model_up_to_the_limit() {
    let script = Scripted::new().reply(PO).reply(PO).reply(PO).reply(PO);
    let cx = Context::builder(script.clone()).build();
    let asked = cx
        .generate_as::<River>("Which?")
        .validate(|river| Err(format!("the {} is too short", river.name)));
    let error = asked.await.unwrap_err();
    assert!(error.is_invalid_output() && error.is_exhausted());
    assert_eq!((error.attempts(), error.billed()), (3, Some(true)));
    assert_eq!(error.message(), "the Po is too short");
    assert_eq!(script.lines_left(), 1);
    assert!(
        script.requests()[1]
            .last_text()
            .contains("the Po is too short")
    );
    assert_eq!(cx.tally().reasked, 2);
}

#[tokio::test(start_paused = true)]
async fn failed_calls_are_retried_and_not_counted_as_asked_again() {
    let script = Scripted::new()
        .error(Error::new(ErrorKind::Unavailable, "first"))
        .reply("no")
        .error(Error::new(ErrorKind::Unavailable, "again"))
        .reply(PO);
    let cx = Context::builder(script).build();
    let asked = cx.generate_as::<River>("Which?").attempts(2);
    assert_eq!(asked.await.unwrap(), po());
    let tally = cx.tally();
    assert_eq!((tally.reasked, tally.retries, tally.attempts), (1, 2, 4));

    let refused = Error::new(ErrorKind::Unauthorized, "no");
    let cx = Context::builder(Scripted::new().error(refused)).build();
    let error = cx.generate_as::<River>("Which?").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unauthorized);
    assert_eq!(cx.tally().reasked, 0);
}

/// The type [`River`] in the next release.
#[derive(Debug, PartialEq, Deserialize, JsonSchema)]
struct EditedRiver {
    /// The name of the river.
    name: String,
    length_km: f64,
    source: Option<String>,
}

#[tokio::test(start_paused = true)]
async fn stored_replies_are_used_after_the_type_is_edited() {
    for enforces in [false, true] {
        let store = Arc::new(Memory::new());
        let script = Scripted::new()
            .reply("no")
            .reply(PO)
            .reply(format!("[{PO}]"));
        let script = match enforces {
            true => script.enforces_schema(),
            false => script,
        };
        let cx = || {
            let cx = Context::builder(script.clone()).store(Arc::clone(&store));
            cx.model("m").build()
        };
        let first = cx();
        let river = first.generate_as::<River>("Which?").await.unwrap();
        let list: Vec<_> = first.generate_items::<River>("Which?").collect().await;
        assert_eq!(first.tally().reasked, 1);
        first.flush().await.unwrap();

        // The problem with the first reply, which the model was told, is the same: it was no JSON.
        let second = cx();
        let edited = second.generate_as::<EditedRiver>("Which?").await.unwrap();
        assert_eq!((edited.name, edited.length_km), (river.name, 652.0));
        let edited: Vec<_> = second
            .generate_items::<EditedRiver>("Which?")
            .collect()
            .await;
        assert_eq!(edited.len(), list.len());
        assert_eq!(script.requests().len(), 3);
        // A value is not a list, and neither is plain text.
        let third = cx();
        third.generate("Which?").await.unwrap_err();
        assert_eq!(script.requests().len(), 4);
    }
}

#[tokio::test(start_paused = true)]
async fn a_replay_counts_nothing_as_asked_again() {
    let store = Arc::new(Memory::new());
    let script = Scripted::new().reply("no").reply("no").reply(PO);
    let cx = || {
        let cx = Context::builder(script.clone());
        cx.store(Arc::clone(&store)).build()
    };
    let first = cx();
    first.generate_as::<River>("Which?").await.unwrap();
    let tally = first.tally();
    assert_eq!((tally.calls, tally.reasked, tally.replayed), (3, 2, 0));
    first.flush().await.unwrap();
    let second = cx();
    second.generate_as::<River>("Which?").await.unwrap();
    let tally = second.tally();
    assert_eq!((tally.calls, tally.reasked, tally.replayed), (0, 0, 3));
}

fn cut(text: &str) -> Reply {
    let mut reply = Reply::new(text, Usage::new(9, 16));
    reply.finish = FinishReason::Length;
    reply
}

#[tokio::test]
async fn a_cut_reply_is_asked_for_again_only_if_the_policy_says_so() {
    // Even one that happens to be JSON: 12 may be the beginning of 1200.
    for text in ["12", r#"{"value": 12}"#, r#"{"val"#] {
        let script = Scripted::new().exact_reply(cut(text)).reply("12");
        let cx = Context::builder(script.clone()).build();
        let error = cx.generate_as::<u32>("How long?").await.unwrap_err();
        assert!(error.is_truncated() && error.is_permanent());
        assert_eq!(error.message(), "the reply reached its limit at 16 tokens");
        assert_eq!((script.lines_left(), cx.tally().reasked), (1, 0));
    }

    let raise = OnLength::RaiseTo(2_000);
    let script = Scripted::new()
        .exact_reply(cut("1"))
        .reply("x")
        .reply("1200");
    let cx = Context::builder(script.clone()).build();
    let request = Request::new("How long?").max_tokens(16);
    let asked = cx.generate_as::<u32>(request).on_length(raise);
    assert_eq!(asked.await.unwrap(), 1200);
    let limits: Vec<_> = script.requests().iter().map(|r| r.max_tokens).collect();
    assert_eq!(limits, [Some(16), Some(2_000), Some(2_000)]);
    assert_eq!(cx.tally().reasked, 2);

    let script = Scripted::new()
        .exact_reply(cut("1"))
        .exact_reply(cut("12"))
        .reply("1");
    let cx = Context::builder(script.clone()).build();
    let error = cx
        .generate_as::<u32>("How long?")
        .on_length(raise)
        .await
        .unwrap_err();
    assert!(error.is_truncated());
    assert_eq!(script.lines_left(), 1, "once is once");
}

#[tokio::test]
async fn the_model_is_not_asked_again_after_it_refused() {
    let mut refusal = Reply::new("I cannot help with rivers.", Usage::new(9, 7));
    refusal.finish = FinishReason::ContentFilter;
    let script = Scripted::new().exact_reply(refusal).reply(PO);
    let cx = Context::builder(script.clone()).build();
    let error = cx.generate_as::<River>("Which?").await.unwrap_err();
    assert!(error.is_invalid_output() && error.message().contains("I cannot help"));
    assert_eq!(script.lines_left(), 1);
}

#[tokio::test]
async fn the_schema_is_enforced_where_it_can_be() {
    let script = || Scripted::new().reply(PO).enforces_schema();
    let native = script();
    let cx = Context::builder(native.clone()).build();
    assert_eq!(cx.generate_as::<River>("Which?").await.unwrap(), po());
    let request = &native.requests()[0];
    let ResponseFormat::JsonSchema { name, schema } = &request.response_format else {
        panic!("{request:?}");
    };
    assert_eq!((&**name, request.messages.len()), ("River", 1));
    // Fields with defaults are asked for too: strict modes know no optional ones.
    let required = serde_json::json!(["cities", "length_km", "name"]);
    assert_eq!(schema["required"], required);

    let open = Scripted::new().reply(r#"{"a": 1}"#).enforces_schema();
    let cx = Context::builder(open.clone()).build();
    let map = cx.generate_as::<HashMap<String, u8>>("Any.").await.unwrap();
    assert_eq!(map["a"], 1);
    assert_eq!(open.requests()[0].response_format, ResponseFormat::Json);
    assert_eq!(open.requests()[0].messages.len(), 2);
}

#[tokio::test]
async fn a_long_reply_is_quoted_in_part() {
    let long = "ö".repeat(100_000);
    let script = Scripted::new().reply(&*long).reply(PO);
    let cx = Context::builder(script.clone()).build();
    cx.generate_as::<River>("Which?").await.unwrap();
    let quoted = &script.requests()[1].messages[2].content;
    assert!(quoted.len() < 17_000 && quoted.contains("bytes left out"));
}

#[test]
fn futures_and_streams_can_be_sent() {
    fn send<T: Send + 'static>(_: T) {}
    let cx = Context::builder(Scripted::new()).build();
    send(cx.generate_as::<River>("a").into_future());
    send(cx.generate_as::<River>("a").detailed());
    send(cx.generate_items::<River>("a"));
    send(cx.generate_drafts::<River>("a"));
    send(cx.stream("a"));
}

/// A reply is in the store before anybody parses it: what was wrong with the parser costs nothing.
#[tokio::test(start_paused = true)]
async fn a_repaired_parser_reads_the_stored_replies_without_a_call() {
    let provider = Scripted::new()
        .reply(PO)
        .reply("[1, 2, 3]")
        .reply("not again");
    let store = Arc::new(throughline::store::Memory::new());
    let cx = || {
        Context::builder(provider.clone())
            .store(Arc::clone(&store))
            .build()
    };
    let river = |cx: Context, accepts: bool| async move {
        let found = cx
            .generate_as::<River>("Describe a river.")
            .attempts(1)
            .validate(move |_| {
                if accepts {
                    Ok(())
                } else {
                    Err("a bug".to_owned())
                }
            })
            .await?;
        let mut numbers = cx.generate_items::<u32>("Count.");
        let mut sum = 0;
        while let Some(number) = numbers.next().await {
            sum += number?;
        }
        Ok((found, sum))
    };
    let run = |cx: Context, accepts| async move {
        let batch = cx.fan_out("river", ["po"]).key(|name| (*name).to_owned());
        let settled = batch.settle(move |cx, _| river(cx, accepts)).await;
        cx.flush().await.unwrap();
        (settled, cx.tally())
    };
    let (broken, paid) = run(cx(), false).await;
    assert!(
        broken
            .failures()
            .next()
            .unwrap()
            .error()
            .unwrap()
            .is_invalid_output()
    );
    assert_eq!((paid.attempts, paid.replayed), (1, 0));

    let (mended, paid) = run(cx(), true).await;
    assert_eq!(mended.oks().next(), Some(&(po(), 6)));
    assert_eq!(
        (paid.attempts, paid.replayed),
        (1, 1),
        "only what it had not asked"
    );

    let (again, paid) = run(cx(), true).await;
    assert_eq!(again.oks().next(), Some(&(po(), 6)));
    assert_eq!(
        (paid.attempts, paid.replayed),
        (0, 2),
        "streams are replayed too"
    );
    assert_eq!(provider.lines_left(), 1);
}

/// Both orders: the deployment that answers decides, not the first one.
#[tokio::test(start_paused = true)]
async fn each_deployment_gets_the_schema_in_the_form_that_it_supports() {
    let down = || Error::new(ErrorKind::Unavailable, "down");
    for enforced_last in [false, true] {
        let first = Scripted::new().error(down()).error(down()).error(down());
        let last = Scripted::new().reply(PO).reply(PO).reply(format!("[{PO}]"));
        let (first, last) = match enforced_last {
            false => (first.enforces_schema(), last),
            true => (first, last.enforces_schema()),
        };
        let cx = Context::builder(first.clone())
            .retry(Retry::none())
            .fallback(Deployment::new(last.clone()))
            .build();
        let value = cx.generate_as::<River>("Describe a river.").await.unwrap();
        assert_eq!(value, po());
        let mut drafts = cx.generate_drafts::<River>("Describe a river.");
        while let Some(draft) = drafts.next().await {
            draft.unwrap();
        }
        let items = cx.generate_items::<River>("Describe rivers.");
        assert_eq!(items.collect::<Vec<_>>().await.len(), 1);
        for (script, is_enforced) in [(first, !enforced_last), (last, enforced_last)] {
            assert_eq!(script.requests().len(), 3);
            for request in script.requests() {
                let schema = matches!(request.response_format, ResponseFormat::JsonSchema { .. });
                assert_eq!(schema, is_enforced);
                let prompt = &request.messages[0].content;
                assert_eq!(prompt.contains("length_km"), !is_enforced, "{prompt}");
            }
        }
    }
}
