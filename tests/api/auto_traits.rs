//! The auto traits of the public types: losing one is a breaking change.

use static_assertions::{assert_impl_all, assert_not_impl_any, assert_obj_safe};
use throughline::{
    Batch, Context, ContextBuilder, Error, Outcome, Pace, Provider, Reply, Request, Retry, Settled,
    Usage,
    batch::{Outcomes, Progress},
    call::{Deployment, Tally},
    context::{Deltas, Snapshot},
    observe::{Event, Observer},
    pipeline::BoxPipeline,
    ratelimit::{Lane, LaneSnapshot, Permit},
    request::{ReplyStream, RequestDigest},
};

type Iter = futures::stream::Iter<std::vec::IntoIter<u8>>;

assert_impl_all!(Error: std::error::Error, Clone, Send, Sync, Unpin);
assert_impl_all!(Request: Clone, Send, Sync, Unpin);
assert_impl_all!(Reply: Clone, Send, Sync, Unpin);
assert_impl_all!(RequestDigest: Copy, Ord, std::hash::Hash, Send, Sync, Unpin);
assert_impl_all!(Usage: Copy, Send, Sync, Unpin);
assert_impl_all!(Tally: Copy, Send, Sync, Unpin);
assert_impl_all!(Event: Clone, Send, Sync, Unpin);
assert_impl_all!(Retry: Clone, Send, Sync, Unpin);
assert_impl_all!(Pace: Clone, Send, Sync, Unpin);
assert_impl_all!(Lane: Clone, Send, Sync, Unpin);
assert_impl_all!(LaneSnapshot: Clone, Send, Sync, Unpin);
assert_impl_all!(Permit: Send, Sync, Unpin);
assert_not_impl_any!(Permit: Clone);
assert_impl_all!(Deployment: Clone, Send, Sync, Unpin);
assert_impl_all!(Context: Clone, Send, Sync, Unpin);
assert_impl_all!(ContextBuilder: Send, Sync);
assert_impl_all!(Snapshot: Clone, Send, Sync, Unpin);
assert_impl_all!(Batch<Context, Iter>: Send);
assert_impl_all!(BoxPipeline<u8, u8>: Clone, Send, Sync, Unpin);
assert_impl_all!(Progress: Clone, Send, Sync, Unpin);
assert_impl_all!(Outcome<u8>: Clone, Send, Sync, Unpin);
assert_impl_all!(Outcomes<u8>: Send, Unpin);
assert_impl_all!(Deltas: Send, Unpin);
assert_impl_all!(throughline::structured::json::Reader: Clone, Send, Sync, Unpin);
assert_impl_all!(throughline::structured::json::Draft: Clone, Send, Sync, Unpin);
assert_impl_all!(Settled<u8>: Clone, Send, Sync, Unpin);
assert_impl_all!(ReplyStream: Send, Unpin);
assert_obj_safe!(Provider, Observer);

fn send<T: Send>(_: &T) {}

/// All futures of the crate can be spawned.
#[tokio::test]
async fn futures_are_send() {
    struct Silent;
    #[throughline::async_trait]
    impl Provider for Silent {
        fn name(&self) -> &str {
            "silent"
        }
        async fn generate(&self, _: &Request) -> throughline::Result<Reply> {
            Ok(Reply::new("", Usage::default()))
        }
    }
    let cx = Context::builder(Silent).build();
    send(&cx.generate("a"));
    let lane = cx.lanes().next().unwrap();
    send(&lane.acquire(throughline::ratelimit::Need::new(1, 1)));
    send(&cx.join_best_effort(cx.generate("a"), async { Ok(()) }));
    let nested = cx.fan_out("a", [1]).settle(|cx, _| async move {
        let inner = cx
            .fan_out("b", [2])
            .settle(|cx, _| async move { cx.generate("c").await });
        inner.await.all()
    });
    send(&nested);
    assert_eq!(tokio::spawn(nested).await.unwrap().len(), 1);
}
