//! Lists whose elements come while the rest is still written, and values that grow.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::StreamExt as _;
use schemars::JsonSchema;
use serde::Deserialize;
use throughline::store::Memory;
use throughline::testing::Scripted;
use throughline::{
    Context, Error, ErrorKind, Pace, Provider as _, Reply, Result, Usage,
    request::{FinishReason, ResponseFormat, Role},
    structured::{Growing, Items, OnBreak},
};
use tokio::time::{Instant, sleep};

const SECOND: Duration = Duration::from_secs(1);

#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
struct Routine {
    name: String,
    #[serde(default)]
    minutes: u32,
}

fn routine(name: &str) -> String {
    format!(r#"{{"name": "{name}", "minutes": 20}}"#)
}

/// A plan of four routines, written over 4 s: one closes after each second.
fn plan() -> [String; 4] {
    [
        format!(r#"Here: {{"title": "Week", "routines": [{}"#, routine("a")),
        format!(", {}", routine("b")),
        format!(",\n{}", routine("c")),
        format!(", {}]}}", routine("d")),
    ]
}

fn names(items: &[Result<Routine>]) -> Vec<&str> {
    items
        .iter()
        .map(|item| item.as_ref().map_or("-", |routine| &*routine.name))
        .collect()
}

async fn all(items: Items<Routine>) -> Vec<Result<Routine>> {
    items.collect().await
}

#[tokio::test(start_paused = true)]
async fn work_on_an_element_starts_when_its_json_closes() {
    let mut script = Scripted::new().streamed(4 * SECOND, plan());
    for _ in 0..12 {
        script = script.delay(4 * SECOND).reply("an etude");
    }
    let cx = Context::builder(script).build();
    let done = Arc::new(Mutex::new(Vec::new()));
    let began = Instant::now();

    let plan = cx
        .generate_items::<Routine>("Plan my week.")
        .field("routines");
    let tell = Arc::clone(&done);
    let settled = cx
        .fan_out("routine", plan)
        .settle(move |cx, routine| {
            let tell = Arc::clone(&tell);
            async move {
                let routine = routine?;
                let etudes = cx
                    .fan_out("etude", 0..3)
                    .join_all()
                    .settle(|cx, n| async move { cx.generate(format!("etude {n}")).await })
                    .await;
                tell.lock().unwrap().push((routine.name, began.elapsed()));
                etudes.all()
            }
        })
        .await;

    // 4 s of plan, and the last routine's etudes behind its end: not 4 + 4 x 4.
    assert_eq!(began.elapsed(), 8 * SECOND);
    let etudes: usize = settled.all().unwrap().iter().map(Vec::len).sum();
    assert_eq!(etudes, 12);
    let expected = [("a", 5), ("b", 6), ("c", 7), ("d", 8)];
    let expected = expected.map(|(name, at)| (name.to_owned(), at * SECOND));
    assert_eq!(*done.lock().unwrap(), expected);
    assert_eq!(cx.tally().calls, 13);
}

#[tokio::test(start_paused = true)]
async fn one_permit_is_enough_for_a_list_and_the_work_on_its_elements() {
    let mut script = Scripted::new().streamed(4 * SECOND, plan());
    for _ in 0..4 {
        script = script.delay(SECOND).reply("done");
    }
    let cx = Context::builder(script)
        .pace(Pace::unlimited().in_flight(1))
        .build();
    let began = Instant::now();
    let plan = cx
        .generate_items::<Routine>("Plan my week.")
        .field("routines");
    // With one item at a time, the plan is not polled while the first item waits for the permit.
    let settled = cx
        .fan_out("routine", plan)
        .sequential()
        .settle(|cx, routine| async move { cx.generate(routine?.name).await })
        .await;
    assert_eq!(settled.all().unwrap().len(), 4);
    assert_eq!(began.elapsed(), 8 * SECOND);
}

#[tokio::test(start_paused = true)]
async fn an_element_that_does_not_fit_fails_alone() {
    let list = format!(
        r#"[{}, {{"name": 7}}, {{"name": NaN}}, {}, ]"#,
        routine("a"),
        routine("d")
    );
    let cx = Context::builder(Scripted::new().reply(list)).build();
    let items = all(cx.generate_items("list")).await;
    assert_eq!(names(&items), ["a", "-", "-", "d"]);
    let error = items[1].as_ref().unwrap_err();
    assert!(error.is_invalid_output() && error.billed() == Some(true));
    let message = error.message();
    assert!(
        message.starts_with("element 2: at `name`: invalid type: integer `7`"),
        "{message}"
    );
    let error = items[2].as_ref().unwrap_err().to_string();
    assert!(error.contains("`NaN` is not JSON"), "{error}");
    assert_eq!(cx.tally().reasked, 0);
}

fn cut() -> Error {
    Error::new(ErrorKind::Connection, "reset")
}

#[tokio::test(start_paused = true)]
async fn elements_before_a_break_are_yielded() {
    let script = || Scripted::new().broken(3 * SECOND, &plan()[..3], cut());
    let cx = Context::builder(script()).build();
    let items = all(cx.generate_items("list")).await;
    assert_eq!(names(&items), ["a", "b", "c", "-"]);
    let error = items[3].as_ref().unwrap_err();
    assert!(error.kind() == ErrorKind::Connection && error.is_exhausted());

    // Behind the list there is nothing to lose.
    let script = Scripted::new().broken(4 * SECOND, plan(), cut());
    let cx = Context::builder(script).build();
    let items = all(cx.generate_items("list")).await;
    assert_eq!(names(&items), ["a", "b", "c", "d"]);
}

#[tokio::test(start_paused = true)]
async fn the_policy_can_ask_for_the_rest_after_a_break() {
    let rest = || OnBreak::AskForRest { times: 1 };
    let script = Scripted::new()
        .broken(2 * SECOND, &plan()[..2], cut())
        .reply(format!("[{}, {}]", routine("c"), routine("d")));
    let cx = Context::builder(script.clone()).build();
    let items = all(cx.generate_items("list").on_break(rest())).await;
    assert_eq!(names(&items), ["a", "b", "c", "d"]);
    assert_eq!((cx.tally().reasked, cx.tally().retries), (1, 0));
    let asked = &script.requests()[1].messages;
    let [.., so_far, more] = &asked[..] else {
        panic!("{asked:?}");
    };
    assert_eq!(so_far.role, Role::Assistant);
    assert_eq!(
        so_far.content,
        format!("[{},{}]", routine("a"), routine("b"))
    );
    assert!(more.content.contains("elements that are missing"));

    // Once is once.
    let script = Scripted::new()
        .broken(SECOND, &plan()[..1], cut())
        .broken(SECOND, [format!("[{}", routine("b"))], cut())
        .reply("[]");
    let cx = Context::builder(script).build();
    let items = all(cx.generate_items("list").on_break(rest())).await;
    assert_eq!(names(&items), ["a", "b", "-"]);
}

/// Names rivers and asks about each, in a context with that store. Gives the answers, and the failure of the list.
async fn rivers(script: &Scripted, store: &Arc<Memory>, policy: OnBreak) -> Vec<Result<String>> {
    let cx = Context::builder(script.clone())
        .store(Arc::clone(store))
        .build();
    let items = cx.fan_out("item", ["rivers"]).key(|item| item.to_string());
    let items = items.settle(|cx, _| async move {
        let list = cx
            .generate_items::<Routine>("Name rivers.")
            .on_break(policy);
        let work = |cx: Context, river: Result<Routine>| async move {
            Ok(cx.generate(river?.name).await?.text)
        };
        Ok(cx.fan_out("river", list).sequential().settle(work).await)
    });
    let settled = items.await.all().unwrap().remove(0);
    cx.flush().await.unwrap();
    settled.into_results()
}

fn texts(results: Vec<Result<String>>) -> Vec<String> {
    results.into_iter().map(Result::unwrap).collect()
}

fn about(script: Scripted) -> Scripted {
    script.answer_with(|request| Ok(format!("about {}", request.last_text())))
}

#[tokio::test(start_paused = true)]
async fn a_list_that_was_completed_after_a_break_is_replayed() {
    let store = Arc::new(Memory::new());
    let begun = format!("[{}, {{\"name\": \"Rh", routine("Danube"));
    let script = Scripted::new().broken(SECOND, [begun], cut());
    let script = about(script).streamed(SECOND, [format!("[{}]", routine("Rhine"))]);
    let script = about(script);
    let policy = OnBreak::AskForRest { times: 2 };
    let first = texts(rivers(&script, &store, policy).await);
    assert_eq!(first, ["about Danube", "about Rhine"]);
    assert_eq!(script.lines_left(), 0);
    // The script has no more lines: whatever was asked would fail.
    assert_eq!(texts(rivers(&script, &store, policy).await), first);
    assert_eq!(script.requests().len(), 4);
}

#[tokio::test(start_paused = true)]
async fn a_rerun_asks_for_the_rest_of_a_list_that_was_never_completed() {
    let store = Arc::new(Memory::new());
    let begun = format!("[{}, ", routine("Danube"));
    let refused = Error::new(ErrorKind::InvalidRequest, "no");
    let script = about(Scripted::new().broken(SECOND, [begun], cut())).error(refused);
    let policy = OnBreak::AskForRest { times: 2 };
    let first = rivers(&script, &store, policy).await;
    assert_eq!(first[0].as_ref().unwrap(), "about Danube");
    assert!(first[1].is_err());

    let script = Scripted::new().streamed(SECOND, [format!("[{}]", routine("Rhine"))]);
    let script = about(script);
    let second = texts(rivers(&script, &store, policy).await);
    assert_eq!(second, ["about Danube", "about Rhine"]);
    let so_far = &script.requests()[0].messages[2].content;
    assert_eq!(*so_far, format!("[{}]", routine("Danube")));
}

#[tokio::test(start_paused = true)]
async fn a_complete_list_is_replayed_although_its_call_broke_off() {
    let store = Arc::new(Memory::new());
    let list = format!("[{}]", routine("Danube"));
    let script = about(Scripted::new().broken(SECOND, [list], cut()));
    let first = texts(rivers(&script, &store, OnBreak::Fail).await);
    assert_eq!(first, ["about Danube"]);
    assert_eq!(texts(rivers(&script, &store, OnBreak::Fail).await), first);
    assert_eq!(script.requests().len(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_failed_list_is_asked_for_again_by_a_rerun() {
    let store = Arc::new(Memory::new());
    let begun = format!("[{}, ", routine("Danube"));
    let script = about(Scripted::new().broken(SECOND, [begun], cut()));
    let first = rivers(&script, &store, OnBreak::Fail).await;
    assert!(first[0].is_ok() && first[1].is_err());
    let script = about(Scripted::new().reply(format!("[{}]", routine("Elbe"))));
    let second = texts(rivers(&script, &store, OnBreak::Fail).await);
    assert_eq!(second, ["about Elbe"]);
}

#[tokio::test(start_paused = true)]
async fn a_list_that_reached_its_limit_on_tokens_ends_as_truncated() {
    let mut reply = Reply::new(plan()[..2].concat(), Usage::new(5, 64));
    reply.finish = FinishReason::Length;
    let cx = Context::builder(Scripted::new().exact_reply(reply)).build();
    let items = all(cx.generate_items("list")).await;
    assert_eq!(names(&items), ["a", "b", "-"]);
    let error = items[2].as_ref().unwrap_err();
    assert!(error.is_truncated(), "{error}");
    assert!(error.to_string().contains("behind 2 elements"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn a_reply_without_a_list_is_one_failure() {
    for (reply, field, message) in [
        ("I cannot.", None, "does not hold an array"),
        (
            r#"{"routines": 3}"#,
            Some("routines"),
            "holds something else",
        ),
        (
            r#"{"plan": [1]}"#,
            Some("routines"),
            "in a field `routines`",
        ),
        (r#"[{"name": "a"]"#, None, "a `]` that closes nothing"),
    ] {
        let cx = Context::builder(Scripted::new().reply(reply)).build();
        let mut items = cx.generate_items("list");
        if let Some(field) = field {
            items = items.field(field);
        }
        let items = all(items).await;
        assert_eq!(items.len(), 1, "{items:?}");
        let error = items[0].as_ref().unwrap_err();
        assert!(error.is_invalid_output());
        assert!(error.to_string().contains(message), "{error}");
    }
}

#[tokio::test(start_paused = true)]
async fn the_schema_describes_a_list_in_the_named_field() {
    let script = Scripted::new()
        .reply(r#"{"routines": []}"#)
        .enforces_schema();
    assert!(script.capabilities().json_schema);
    let cx = Context::builder(script.clone()).build();
    assert!(
        all(cx.generate_items("a").field("routines"))
            .await
            .is_empty()
    );
    let ResponseFormat::JsonSchema { schema, .. } = &script.requests()[0].response_format else {
        panic!("not enforced");
    };
    let items = &schema["properties"]["routines"]["items"]["$ref"];
    assert_eq!(items, "#/$defs/Routine");
    assert_eq!(
        schema["$defs"]["Routine"]["required"],
        serde_json::json!(["minutes", "name"])
    );
}

#[tokio::test(start_paused = true)]
async fn dropping_a_list_ends_its_call() {
    let script = Scripted::new().streamed(4 * SECOND, plan());
    let cx = Context::builder(script)
        .pace(Pace::unlimited().in_flight(1))
        .build();
    let mut items = cx.generate_items::<Routine>("list");
    items.next().await.unwrap().unwrap();
    drop(items);
    tokio::task::yield_now().await;
    assert_eq!(cx.snapshot().lane.in_flight, 0);
    assert_eq!(cx.tally().ambiguous, 1);
}

#[derive(Debug, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(default)]
struct Story {
    title: Option<String>,
    lines: Vec<String>,
}

#[tokio::test(start_paused = true)]
async fn drafts_of_a_value_come_while_it_is_written() {
    let pieces = [
        "```json\n{\"title\": \"Two",
        " rivers\", \"li",
        "nes\": [\"Once\", \"up",
        "on\"]}\n```",
    ];
    let cx = Context::builder(Scripted::new().streamed(4 * SECOND, pieces)).build();
    let mut drafts = cx.generate_drafts::<Story>("A story.");
    let began = Instant::now();
    let mut seen = Vec::new();
    while let Some(draft) = drafts.next().await {
        let draft = draft.unwrap();
        let whole = draft.is_whole();
        let story = draft.into_inner();
        let title = story.title.unwrap_or_default();
        seen.push((
            began.elapsed().as_secs(),
            title,
            story.lines.join("/"),
            whole,
        ));
    }
    let expected = [
        (1, "Two", "", false),
        (2, "Two rivers", "", false),
        (3, "Two rivers", "Once/up", false),
        (4, "Two rivers", "Once/upon", true),
    ];
    let expected =
        expected.map(|(at, title, lines, whole)| (at, title.into(), lines.into(), whole));
    assert_eq!(seen, expected);
}

#[tokio::test(start_paused = true)]
async fn a_slow_consumer_gets_the_latest_draft_only() {
    let pieces: Vec<String> = [r#"{"lines": ["#.to_owned()]
        .into_iter()
        .chain((0..99).map(|n| format!(r#""{n}","#)))
        .chain([r#""end"]}"#.to_owned()])
        .collect();
    let cx = Context::builder(Scripted::new().streamed(SECOND, pieces)).build();
    let mut drafts = cx.generate_drafts::<Story>("A story.");
    assert!(futures::poll!(drafts.next()).is_pending());
    sleep(2 * SECOND).await;
    let last = drafts.next().await.unwrap().unwrap();
    assert!(matches!(last, Growing::Whole(story) if story.lines.len() == 100));
    assert!(drafts.next().await.is_none());
}

#[tokio::test(start_paused = true)]
async fn a_complete_value_that_does_not_fit_is_an_error() {
    let cx = Context::builder(Scripted::new().streamed(SECOND, [r#"{"title": "#, "7}"])).build();
    let drafts: Vec<_> = cx.generate_drafts::<Story>("A story.").collect().await;
    assert_eq!(drafts.len(), 2);
    assert_eq!(
        drafts[0].as_ref().unwrap(),
        &Growing::Partial(Story::default())
    );
    let error = drafts[1].as_ref().unwrap_err();
    assert!(error.is_invalid_output(), "{error}");
}
