//! The figures of the examples, exact under the paused clock.

#[path = "../examples/coach_conversation/turn.rs"]
mod turn;

use std::time::Duration;

use throughline::{Context, Switch};

use self::turn::{MESSAGES, Trouble, Turn, model, timed};

const GRACE: Duration = Duration::from_millis(300);

/// The turn and its milliseconds.
async fn answered(message: &str, parallel: bool, trouble: Trouble) -> (Turn, u128) {
    let cx = Context::builder(model(trouble))
        .parallel(&Switch::new(parallel))
        .alongside_grace(GRACE)
        .build();
    let (turn, took) = timed(&cx, message).await.unwrap();
    (turn, took.as_millis())
}

async fn in_trouble(fails: Option<&'static str>, slow: Option<&'static str>) -> (Turn, u128) {
    answered(MESSAGES[0].1, true, Trouble { fails, slow }).await
}

#[tokio::test(start_paused = true)]
async fn a_conversation_takes_its_critical_path_for_every_kind_of_message() {
    let expected = [
        ("both", 3_942, 6_467, [true, true], 5),
        ("workout only", 3_942, 5_417, [true, false], 4),
        ("memory only", 3_892, 5_567, [false, true], 4),
        ("neither", 3_442, 4_367, [false, false], 3),
    ];
    for ((name, message), case) in MESSAGES.into_iter().zip(expected) {
        let (ours, fast) = answered(message, true, Trouble::default()).await;
        let (theirs, slow) = answered(message, false, Trouble::default()).await;
        assert_eq!(ours, theirs, "{name}: the switch changes the time alone");
        let branches = [ours.workout.is_some(), ours.memory.is_some()];
        assert_eq!((name, fast, slow, branches, ours.seen.len()), case);
    }
}

#[tokio::test(start_paused = true)]
async fn a_failed_update_costs_itself_alone() {
    let (turn, took) = in_trouble(Some("workout-update"), None).await;
    assert_eq!((turn.seen.len(), took), (4, 3_942));
    assert_eq!(turn.workout.as_deref(), Some("the workout"));
    assert!(!turn.seen.contains(&"the workout-update".to_owned()));
}

#[tokio::test(start_paused = true)]
async fn a_slow_update_costs_the_grace_at_most() {
    for (update, delay) in [
        ("workout-update", 300),
        // The memory is ready 50 ms before the workout.
        ("memory-update", 250),
        ("acknowledgement", 300),
        ("insights-update", 300),
    ] {
        let (turn, took) = in_trouble(None, Some(update)).await;
        assert_eq!((update, turn.seen.len(), took), (update, 4, 3_942 + delay));
    }
}

#[tokio::test(start_paused = true)]
async fn a_failed_branch_does_not_lose_the_other() {
    let (turn, took) = in_trouble(Some("workout"), None).await;
    assert_eq!(took, 3_942);
    assert_eq!(turn.workout.as_deref(), Some("not available now"));
    assert_eq!(turn.memory.as_deref(), Some("the memory"));
    let (turn, _) = in_trouble(Some("memory"), None).await;
    assert_eq!(turn.workout.as_deref(), Some("the workout"));
    assert_eq!(turn.memory.as_deref(), Some("not available now"));
}
