//! The replies that a context stores and replays, and the journal that writes them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use throughline::store::{Commit, MemoKey, Memory, NewItem, NewRun, Note, Store as _};
use throughline::testing::Counted;
use throughline::{Context, Error, ErrorKind, Request, Result, Sim, Usage, store::Journal};
use throughline::{Provider, Reply, async_trait, observe::Event};

/// Answers each call with another number.
#[derive(Clone, Default)]
struct Numbered {
    calls: Arc<AtomicU64>,
    latency: Duration,
    fails: bool,
    /// The numbers of the calls that fail.
    failing: Vec<u64>,
    /// Additional seconds that a call takes, by its prompt.
    extra: Option<fn(&str) -> u64>,
}

impl Numbered {
    fn calls(&self) -> u64 {
        self.calls.load(Ordering::Relaxed)
    }
}

#[async_trait]
impl Provider for Numbered {
    fn name(&self) -> &str {
        "numbered"
    }

    async fn generate(&self, request: &Request) -> Result<Reply> {
        let n = self.calls.fetch_add(1, Ordering::Relaxed);
        tokio::time::sleep(self.latency).await;
        if let Some(extra) = self.extra {
            tokio::time::sleep(Duration::from_secs(extra(request.last_text()))).await;
        }
        if self.fails || self.failing.contains(&n) {
            return Err(Error::new(ErrorKind::InvalidRequest, "no"));
        }
        let mut reply = Reply::new(n.to_string(), Usage::new(3, 4));
        reply.raw = Some(format!("{{\"n\":{n}}}").into());
        reply.request_id = Some(format!("req-{n}"));
        reply.model = "m-1".to_owned();
        Ok(reply)
    }
}

fn over<S: throughline::store::Store>(provider: &Numbered, store: &Arc<S>) -> Context {
    Context::builder(provider.clone())
        .store(Arc::clone(store))
        .build()
}

async fn texts(cx: &Context, inputs: &[&'static str], prompt: fn(&str) -> String) -> Vec<String> {
    let asked = cx
        .fan_out("item", inputs.to_vec())
        .key(|input| input.to_string())
        .settle(|cx, input| async move { Ok(cx.generate(prompt(input)).await?.text) })
        .await;
    let texts = asked.all().unwrap();
    cx.flush().await.unwrap();
    texts
}

#[tokio::test(start_paused = true)]
async fn a_replay_equals_the_reply_and_is_not_paid_for() {
    let (provider, store) = (Numbered::default(), Arc::new(Memory::new()));
    let first = over(&provider, &store);
    let paid = first.generate("a").await.unwrap();
    assert_eq!((first.tally().calls, first.tally().replayed), (1, 0));
    first.flush().await.unwrap();

    let second = over(&provider, &store);
    let replayed = second.generate("a").await.unwrap();
    assert_eq!(replayed, paid);
    assert_eq!(provider.calls(), 1);
    let tally = second.tally();
    assert_eq!((tally.calls, tally.attempts, tally.replayed), (0, 0, 1));
    assert_eq!(tally.usage, Usage::default());
}

#[tokio::test(start_paused = true)]
async fn items_with_one_prompt_get_an_answer_each_and_keep_it() {
    let (provider, store) = (Numbered::default(), Arc::new(Memory::new()));
    let same: fn(&str) -> String = |_| "the same for all".to_owned();
    let first = texts(&over(&provider, &store), &["a", "b"], same).await;
    assert_ne!(first[0], first[1]);
    // In another order, and with one that is new in front.
    let second = texts(&over(&provider, &store), &["new", "b", "a"], same).await;
    assert_eq!((&second[1], &second[2]), (&first[1], &first[0]));
    assert_eq!(provider.calls(), 3);
    // Another prompt is another question.
    texts(&over(&provider, &store), &["a", "b"], |input| {
        format!("of {input}")
    })
    .await;
    assert_eq!(provider.calls(), 5);
}

#[tokio::test(start_paused = true)]
async fn n_identical_requests_get_n_replies_and_labels_have_replies_of_their_own() {
    let (provider, store) = (Numbered::default(), Arc::new(Memory::new()));
    let ask = async || {
        let cx = over(&provider, &store);
        let mut texts = Vec::new();
        for _ in 0..3 {
            texts.push(cx.generate("a").await.unwrap().text);
        }
        texts.push(cx.child("review").generate("a").await.unwrap().text);
        // Bounds are no place.
        let patient = cx.with_timeout(Duration::from_secs(60));
        texts.push(patient.generate("a").await.unwrap().text);
        cx.flush().await.unwrap();
        texts
    };
    assert_eq!(ask().await, ["0", "1", "2", "3", "4"]);
    assert_eq!(ask().await, ["0", "1", "2", "3", "4"]);
    assert_eq!(provider.calls(), 5);
}

/// Below an item, a branch is named by its key, or else by its index.
#[tokio::test(start_paused = true)]
async fn an_inserted_branch_pays_for_those_behind_it_only_where_branches_have_no_keys() {
    for (keys, paid) in [(true, 3), (false, 5)] {
        let (provider, store) = (Numbered::default(), Arc::new(Memory::new()));
        let ask = async |topics: &'static [&'static str]| {
            let cx = over(&provider, &store);
            let outer = cx.fan_out("plan", ["p"]).key(|plan| plan.to_string());
            let settled = outer.settle(|cx, _| async move {
                let inner = cx.fan_out("topic", topics.to_vec());
                let inner = match keys {
                    true => inner.key(|topic| topic.to_string()),
                    false => inner,
                };
                let work = |cx: Context, topic| async move { Ok(cx.generate(topic).await?.text) };
                inner.settle(work).await.all()
            });
            let texts = settled.await.all().unwrap().remove(0);
            cx.flush().await.unwrap();
            texts
        };
        let first = ask(&["x", "y"]).await;
        let second = ask(&["w", "x", "y"]).await;
        assert_eq!(second[1..] == first[..], keys);
        assert_eq!(provider.calls(), paid);
    }
}

#[tokio::test(start_paused = true)]
async fn a_branch_keeps_its_replies_whatever_the_timing() {
    let store = Arc::new(Memory::new());
    let run = async |extra: fn(&str) -> u64| {
        let provider = Numbered {
            extra: Some(extra),
            ..Numbered::default()
        };
        let cx = over(&provider, &store);
        let stories = cx.fan_out("story", ["s"]).key(|story| story.to_string());
        let stories = stories.settle(|cx, _| async move {
            let chapters = cx.fan_out("chapter", 0..5).settle(|cx, n| async move {
                cx.generate(format!("Outline {n}")).await?;
                let style = cx.generate("Name a style.").await?.text;
                let prompt = format!("Write chapter {n} in style {style}");
                Ok(cx.generate(prompt).await?.text)
            });
            chapters.await.all()
        });
        let texts = stories.await.all().unwrap();
        cx.flush().await.unwrap();
        (texts, provider.calls())
    };
    // The outlines of the first branches take longest; replayed, they come at once.
    let uneven = |prompt: &str| match prompt.strip_prefix("Outline ") {
        Some(n) => 9 - n.parse::<u64>().unwrap(),
        None => 0,
    };
    let (first, paid) = run(uneven).await;
    assert_eq!(paid, 15);
    assert_eq!(run(|_| 0).await, (first, 0));
}

#[tokio::test(start_paused = true)]
async fn rounds_of_branches_without_keys_get_an_answer_each() {
    let (provider, store) = (Numbered::default(), Arc::new(Memory::new()));
    let run = async || {
        let cx = over(&provider, &store);
        let items = cx.fan_out("item", ["a"]).key(|item| item.to_string());
        let items = items.settle(|cx, _| async move {
            let mut texts = Vec::new();
            for _round in 0..2 {
                let samples = cx.fan_out("sample", 0..2);
                let ask = |cx: Context, _| async move { Ok(cx.generate("A joke.").await?.text) };
                texts.extend(samples.settle(ask).await.all()?);
            }
            Ok(texts)
        });
        let texts = items.await.all().unwrap().remove(0);
        cx.flush().await.unwrap();
        texts
    };
    let first = run().await;
    assert_eq!(first, ["0", "1", "2", "3"]);
    assert_eq!(run().await, first);
    assert_eq!(provider.calls(), 4);
}

#[tokio::test(start_paused = true)]
async fn items_with_the_same_key_get_answers_of_their_own_and_keep_them() {
    let (provider, store) = (Numbered::default(), Arc::new(Memory::new()));
    let same: fn(&str) -> String = |_| "Write an example.".to_owned();
    let keys = ["plank", "plank", "bridge", "plank", "plank~1"];
    let first = texts(&over(&provider, &store), &keys, same).await;
    assert_eq!(first, ["0", "1", "2", "3", "4"]);
    let second = texts(&over(&provider, &store), &keys, same).await;
    assert_eq!(second, first);
    assert_eq!(provider.calls(), 5);
}

#[tokio::test(start_paused = true)]
async fn a_reply_after_a_failed_call_is_replayed() {
    let store = Arc::new(Memory::new());
    let provider = Numbered {
        failing: vec![0, 2],
        ..Numbered::default()
    };
    let run = async || {
        let cx = over(&provider, &store);
        let items = cx.fan_out("item", ["a"]).key(|item| item.to_string());
        let items = items.settle(|cx, item| async move {
            let mut texts = Vec::new();
            // Each is asked again until there is an answer.
            while texts.len() < 2 {
                if let Ok(reply) = cx.generate(item).await {
                    texts.push(reply.text);
                }
            }
            Ok(texts)
        });
        let texts = items.await.all().unwrap().remove(0);
        cx.flush().await.unwrap();
        texts
    };
    let first = run().await;
    assert_eq!(first, ["1", "3"]);
    assert_eq!(run().await, first);
    assert_eq!(provider.calls(), 4);
}

#[tokio::test(start_paused = true)]
async fn a_reply_after_a_call_that_was_dropped_is_replayed() {
    let store = Arc::new(Memory::new());
    let provider = Numbered {
        latency: Duration::from_secs(1),
        ..Numbered::default()
    };
    let run = async |patience: [u64; 2]| {
        let cx = over(&provider, &store);
        let items = cx.fan_out("item", ["a"]).key(|item| item.to_string());
        let items = items.settle(|cx, item| async move {
            for patience in patience {
                let patience = Duration::from_millis(patience);
                let call = tokio::time::timeout(patience, cx.generate(item));
                if let Ok(reply) = call.await {
                    return Ok(reply?.text);
                }
            }
            Err(Error::new(ErrorKind::Timeout, "slow"))
        });
        let texts = items.await.all().unwrap();
        cx.flush().await.unwrap();
        texts
    };
    assert_eq!(run([500, 5_000]).await, ["1"]);
    assert_eq!(run([500, 5_000]).await, ["1"]);
    assert_eq!(provider.calls(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_fresh_context_pays_again_and_keeps_earlier_replies() {
    let (provider, store) = (Numbered::default(), Arc::new(Memory::new()));
    let same: fn(&str) -> String = |_| "a".to_owned();
    let first = texts(&over(&provider, &store), &["a", "b"], same).await;
    texts(&over(&provider, &store).fresh(), &["a", "b"], same).await;
    assert_eq!(provider.calls(), 4);
    assert_eq!(
        texts(&over(&provider, &store), &["a", "b"], same).await,
        first
    );
    assert_eq!(provider.calls(), 4);
}

#[tokio::test(start_paused = true)]
async fn a_shared_answer_is_one_call_also_in_flight() {
    let provider = Numbered {
        latency: Duration::from_secs(3),
        ..Numbered::default()
    };
    let store = Arc::new(Memory::new());
    let cx = over(&provider, &store);
    let ask =
        |cx: Context, _n| async move { Ok(cx.generate(Request::new("a").shared()).await?.text) };
    let answers = cx.fan_out("item", 0..50).settle(ask).await;
    assert_eq!(answers.tally().replayed, 49);
    assert_eq!(answers.all().unwrap(), vec!["0"; 50]);
    assert_eq!(
        cx.generate(Request::new("a").sample(1)).await.unwrap().text,
        "1"
    );
    cx.flush().await.unwrap();
    let later = over(&provider, &store)
        .generate(Request::new("a").shared())
        .await;
    assert_eq!(later.unwrap().text, "0");
    assert_eq!(provider.calls(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_shared_call_that_is_dropped_or_fails_is_replaced_by_another() {
    let provider = Numbered {
        latency: Duration::from_secs(3),
        ..Numbered::default()
    };
    let store = Arc::new(Memory::new());
    let cx = over(&provider, &store);
    let ask = || cx.generate(Request::new("a").shared());
    let (cut, answer) = tokio::join!(tokio::time::timeout(Duration::from_secs(1), ask()), ask());
    assert!(cut.is_err());
    assert_eq!(answer.unwrap().text, "1");

    let failing = Numbered {
        fails: true,
        ..provider.clone()
    };
    let before = failing.calls();
    let cx = over(&failing, &store);
    let ask = |cx: Context, _n| async move { cx.generate(Request::new("b").shared()).await };
    let settled = cx.fan_out("item", 0..5).settle(ask).await;
    assert_eq!(settled.failures().count(), 5);
    assert_eq!(failing.calls() - before, 1);
}

#[tokio::test(start_paused = true)]
async fn many_calls_take_few_round_trips() {
    let store = Arc::new(Counted::default());
    let provider = Sim::builder().latency(Duration::from_secs(1)).build();
    let cx = Context::builder(provider).store(Arc::clone(&store)).build();
    let calls = cx.fan_out("item", 0..1024).buffer_unordered(1024);
    let settled = calls
        .settle(|cx, n| async move { cx.generate(format!("{n}")).await })
        .await;
    assert_eq!(settled.oks().count(), 1024);
    cx.flush().await.unwrap();
    assert_eq!(store.calls("commit"), 2);
    assert_eq!(store.largest_commit(), 512);
    assert!(
        store.calls("generations") <= 8,
        "{}",
        store.calls("generations")
    );
    assert_eq!(cx.journal().unwrap().stats().written, 1024);
}

fn note(run: throughline::store::RunId, data: impl Into<String>) -> Commit {
    Commit::new().notes([Note::new(run, "k", data)])
}

#[tokio::test(start_paused = true)]
async fn a_failing_store_is_reported_and_no_reply_is_lost() {
    let store = Arc::new(Counted::default());
    let run = store
        .create_run(NewRun::new("", "p").items([NewItem::new("a", "1")]))
        .await
        .unwrap()
        .run;
    let said = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&said);
    let cx = Context::builder(Numbered::default())
        .store(Arc::clone(&store))
        .on_event(move |event| {
            if let Event::StoreFailed { waiting, .. } = event {
                assert_eq!(*waiting, 3);
                count.fetch_add(1, Ordering::Relaxed);
            }
        })
        .build();
    let journal = cx.journal().unwrap();
    store.set_down(true);
    for n in 0..3 {
        journal.write(note(run, n.to_string()));
    }
    let error = journal.flush().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Store);
    assert_eq!(journal.stats().waiting, 3);
    store.set_down(false);
    // The failure may be met once more; then it is through.
    journal.flush().await.unwrap();
    let stats = journal.stats();
    assert!(
        stats.failures >= 1 && stats.waiting == 0 && stats.given_up == 0,
        "{stats:?}"
    );
    assert_eq!(said.load(Ordering::Relaxed), stats.failures);
    let log = store.log(run, 1, 10).await.unwrap();
    assert_eq!(
        log.iter().map(|entry| &*entry.data).collect::<Vec<_>>(),
        ["0", "1", "2"]
    );
}

#[tokio::test(start_paused = true)]
async fn only_the_entry_that_no_store_can_keep_is_given_up() {
    let store = Arc::new(Memory::new());
    let run = store
        .create_run(NewRun::new("", "p").items([NewItem::new("a", "1")]))
        .await
        .unwrap()
        .run;
    let journal = Journal::new(store.clone());
    for data in ["0", "1", "a NUL: \0", "3", "4"] {
        journal.write(note(run, data));
    }
    let error = journal.flush().await.unwrap_err();
    assert!(error.message().contains("NUL"), "{error}");
    let log = store.log(run, 1, 10).await.unwrap();
    assert_eq!(
        log.iter().map(|entry| &*entry.data).collect::<Vec<_>>(),
        ["0", "1", "3", "4"]
    );
    assert_eq!((journal.stats().given_up, journal.stats().written), (1, 4));
}

#[tokio::test(start_paused = true)]
async fn a_dropped_journal_writes_its_entries() {
    let (provider, store) = (Numbered::default(), Arc::new(Memory::new()));
    over(&provider, &store).generate("a").await.unwrap();
    // No flush: the context is gone.
    tokio::time::sleep(Duration::from_millis(1)).await;
    over(&provider, &store).generate("a").await.unwrap();
    assert_eq!(provider.calls(), 1);
}

#[tokio::test(start_paused = true)]
async fn too_many_unwritten_results_delay_new_calls() {
    let store = Arc::new(Counted::default());
    store.set_stuck(true);
    let provider = Numbered::default();
    let cx = over(&provider, &store);
    let calls = cx.fan_out("item", 0..20_000).buffer_unordered(64);
    let work = calls.settle(|cx, n| async move { cx.generate(format!("{n}")).await });
    assert!(
        tokio::time::timeout(Duration::from_secs(5), work)
            .await
            .is_err()
    );
    let calls = provider.calls();
    assert!((4096..4096 + 128).contains(&calls), "{calls}");
}

#[tokio::test]
async fn a_lookup_finds_a_reply_that_is_not_written_yet() {
    let store = Arc::new(Counted::default());
    store.set_stuck(true);
    let provider = Numbered::default();
    let cx = over(&provider, &store);
    let first = cx.generate(Request::new("a").shared()).await.unwrap();
    let second = cx.generate(Request::new("a").shared()).await.unwrap();
    assert_eq!((first, provider.calls()), (second, 1));
    let nobody = MemoKey::new([0; 32]);
    assert!(store.generations("", &[nobody]).await.unwrap().is_empty());
}
