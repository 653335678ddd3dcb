//! Tenants with rates of their own. Uses the paused clock.

use std::time::Duration;

use throughline::ratelimit::{Binding, Lane, Need, Tenant};
use throughline::{Context, Pace, Sim};
use tokio::time::Instant;

#[tokio::test(start_paused = true)]
async fn a_tenant_keeps_its_rate_and_holds_up_no_other() {
    let lane = Lane::new(Pace::per_minute(60_000).burst(Duration::from_secs(1)));
    let began = Instant::now();
    let calls = |name: &'static str, tenant: Tenant, calls: usize| {
        let lane = lane.clone();
        tokio::spawn(async move {
            for _ in 0..calls {
                let mut permit = lane.acquire(Need::new(10, 0).tenant(tenant)).await.unwrap();
                permit.mark_sent();
            }
            (name, began.elapsed())
        })
    };
    let slow = calls("slow", Tenant::new("slow", 1).requests_per_minute(60), 6);
    let small = calls("small", Tenant::new("small", 1).tokens_per_minute(60), 3);
    let free = calls("free", Tenant::new("free", 1), 500);
    assert_eq!(free.await.unwrap(), ("free", Duration::ZERO));
    assert_eq!(lane.snapshot().binding, Binding::TenantRate);
    // The first goes at once, and a call of ten tokens owes nine.
    assert_eq!(slow.await.unwrap().1.as_secs(), 5);
    assert_eq!(small.await.unwrap().1.as_secs(), 20);
    assert_eq!(lane.snapshot().binding, Binding::Nothing);
}

#[tokio::test(start_paused = true)]
async fn the_tenant_of_a_context_brings_its_rate() {
    let cx = Context::builder(Sim::builder().latency(Duration::from_secs(1)).build()).build();
    let acme = cx.with_tenant(Tenant::new("acme", 1).requests_per_minute(60));
    let began = Instant::now();
    let calls = (0..5).map(|n| acme.generate(format!("{n}")));
    let all = futures::future::try_join_all(calls);
    let other = async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert_eq!(cx.snapshot().lane.binding, Binding::TenantRate);
        assert_eq!(Binding::TenantRate.to_string(), "rate of the tenant");
        cx.generate("other").await.unwrap();
        began.elapsed()
    };
    let (all, other) = tokio::join!(all, other);
    assert_eq!(all.unwrap().len(), 5);
    assert_eq!(other.as_millis(), 1_100);
    assert_eq!(began.elapsed().as_secs(), 5);
}
