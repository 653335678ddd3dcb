//! The cells: every scenario at half, exactly and twice the true limit.

use std::time::Duration;

use throughline::provider::OutputCharge;
use throughline::provider::sim::{Dialect, Enforcement, Headers, Tokens};

use crate::ablation;
use crate::cell::{Cell, Sizes};

const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);
const AXIS: [f64; 3] = [0.5, 1.0, 2.0];

pub fn all() -> Vec<Cell> {
    let cells = older();
    // With a burst that is set the lane learns none: each cell once more without, in a debug build the right ones.
    let learns = |cell: &Cell| match cell.configured {
        _ if cell.burst != Some(SECOND) => false,
        Some(share) if cfg!(debug_assertions) => share == 1.0 && cell.items <= 4_000,
        configured => configured.is_some(),
    };
    let default = cells.iter().filter(|cell| learns(cell)).cloned();
    let default = default.map(|cell| cell.with(|cell| cell.burst = None));
    let default: Vec<_> = default.collect();
    [cells, default, bursts()].concat()
}

fn older() -> Vec<Cell> {
    [
        steady(),
        steps(),
        windows(),
        headers(),
        sizes(),
        several_contexts(),
        slots(),
        tiers(),
        unconfigured(),
    ]
    .concat()
}

fn steady() -> Vec<Cell> {
    let bucket = AXIS.map(|c| Cell::new("bucket of 1 s", c).requests(600, 3_000));
    // The behaviour that providers document: a minute's worth goes through at once.
    let minute = AXIS.map(|c| {
        Cell::new("bucket of 60 s", c)
            .requests(600, 3_000)
            .truth(|t| t.enforcement = Enforcement::TokenBucket { burst: MINUTE })
    });
    let counted = AXIS.map(|c| {
        Cell::new("refusals count", c)
            .requests(600, 3_000)
            .truth(|t| t.refusals_count = true)
    });
    [bucket, minute, counted].concat()
}

/// The limit falls in the middle, so no configuration stays right.
fn steps() -> Vec<Cell> {
    let step = |cell: Cell, steps: &[(u64, f64)]| {
        let steps = steps.iter().map(|(s, f)| (Duration::from_secs(*s), *f));
        let steps: Vec<_> = steps.collect();
        cell.truth(|t| t.steps = steps).with(|cell| {
            cell.most_ratio = 1.15;
            cell.most_rejected = 0.02;
            cell.seeds = ablation::seeds();
        })
    };
    let dip = AXIS.map(|c| {
        let cell = Cell::new("x 0.4 for 180 s", c).requests(600, 3_000);
        step(cell, &[(120, 0.4), (300, 1.0)])
    });
    let drop = AXIS.map(|c| {
        let cell = Cell::new("falls to a quarter", c).requests(600, 2_400);
        step(cell, &[(120, 0.25)])
    });
    [dip, drop].concat()
}

/// A window lets nothing through beyond its share: a configuration with a burst of its own
/// is right only as far as burst and rate together fit in one.
fn windows() -> Vec<Cell> {
    let second = |c, burst| {
        Cell::new("1 s windows", c)
            .requests(600, 3_000)
            .truth(|t| t.enforcement = Enforcement::FixedWindow(SECOND))
            .with(|cell| cell.burst = Some(burst))
    };
    let minute = |c, burst| {
        Cell::new("60 s windows", c)
            .requests(120, 3_600)
            .truth(|t| t.enforcement = Enforcement::FixedWindow(MINUTE))
            .with(|cell| cell.burst = Some(burst))
    };
    let named = |scenario, cell: Cell, most_rejected| {
        cell.with(|cell| {
            cell.scenario = scenario;
            cell.most_rejected = most_rejected;
        })
    };
    vec![
        second(0.5, SECOND),
        named("1 s windows, no burst", second(1.0, Duration::ZERO), 0.0),
        named("1 s windows", second(1.0, SECOND), 0.02),
        second(2.0, SECOND),
        minute(0.5, SECOND),
        named("60 s windows, no burst", minute(1.0, Duration::ZERO), 0.0),
        named("60 s windows", minute(1.0, SECOND), 0.02),
        minute(2.0, SECOND),
    ]
}

/// Headers that are absent, incomplete or wrong.
fn headers() -> Vec<Cell> {
    let none = AXIS.map(|c| {
        Cell::new("no headers", c)
            .requests(600, 3_000)
            .truth(|t| t.headers = Headers::None)
    });
    let silent = AXIS.map(|c| {
        Cell::new("nor retry-after", c)
            .requests(600, 3_000)
            .truth(|t| {
                t.headers = Headers::None;
                t.retry_after = false;
            })
    });
    let double = AXIS.map(|c| {
        Cell::new("headers say 2x", c)
            .requests(600, 3_000)
            .truth(|t| t.headers = Headers::Wrong(2.0))
    });
    // Whoever believes them goes at half the true rate and is not to blame.
    let half = AXIS.map(|c| {
        Cell::new("headers say 0.5x", c)
            .requests(600, 3_000)
            .truth(|t| t.headers = Headers::Wrong(0.5))
    });
    [none, silent, double, half].concat()
}

fn sizes() -> Vec<Cell> {
    let tokens = |cell: Cell, items| {
        cell.requests(600, items)
            .truth(|t| t.tokens = Some(60_000))
            .with(|cell| cell.parallel = 40)
    };
    let oversize = AXIS.map(|c| {
        tokens(Cell::new("oversize, 4 s of tokens", c), 3_000).with(|cell| {
            cell.sizes = Sizes::Some {
                one_in: 20,
                tokens: 4_000,
            };
        })
    });
    let heavy = AXIS.map(|c| {
        tokens(Cell::new("tokens, heavy tail", c), 2_000)
            .with(|cell| cell.sizes = Sizes::HeavyTailed)
    });
    let produced = AXIS.map(|c| {
        Cell::new("output as produced", c)
            .requests(600, 3_000)
            .truth(|t| {
                t.output_tokens = Some(60_000);
                t.output_charge = OutputCharge::Produced;
                t.answers = Tokens::heavy_tailed(200, 2_000);
            })
            .with(|cell| {
                cell.sizes = Sizes::Capped(4_000);
                cell.parallel = 40;
            })
    });
    [oversize, heavy, produced].concat()
}

/// Four that know nothing of each other; "configured" is what all of them are told together.
fn several_contexts() -> Vec<Cell> {
    let four = |c| {
        Cell::new("4 contexts", c)
            .requests(600, 3_000)
            .with(|cell| cell.contexts = 4)
    };
    [0.5, 1.0, 2.0, 4.0].map(four).to_vec()
}

fn slots() -> Vec<Cell> {
    let slots = |c| {
        Cell::new("8 calls in flight", c)
            .truth(|t| t.in_flight = Some(8))
            .with(|cell| {
                cell.items = 2_000;
                cell.parallel = 32;
            })
    };
    AXIS.map(slots).to_vec()
}

fn tiers() -> Vec<Cell> {
    let tier = |scenario, per_minute, items| {
        [1.0, 2.0].map(|c| Cell::new(scenario, c).requests(per_minute, items))
    };
    // Told double, the burst of the first instant alone would be more than 2 % of any run
    // that ends within a minute: only the right configuration is run.
    let fastest = Cell::new("1,000,000 a minute", 1.0)
        .requests(1_000_000, 60_000)
        .truth(|t| {
            t.latency = Duration::from_millis(200);
            t.jitter = 0.1;
        });
    let slower = [
        tier("3 a minute", 3, 300),
        tier("60 a minute", 60, 1_200),
        tier("6,000 a minute", 6_000, 12_000).map(|cell| cell.with(|cell| cell.seeds = 1)),
    ];
    [slower.concat(), vec![fastest]].concat()
}

/// The lane is told nothing, and learns from the headers.
fn unconfigured() -> Vec<Cell> {
    vec![
        Cell::new("told nothing", None).requests(600, 3_000),
        Cell::new("told nothing, 60 s", None)
            .requests(600, 3_000)
            .truth(|t| t.enforcement = Enforcement::TokenBucket { burst: MINUTE }),
        Cell::new("told nothing, tokens", None)
            .requests(600, 2_000)
            .truth(|t| t.tokens = Some(60_000))
            .with(|cell| {
                cell.sizes = Sizes::HeavyTailed;
                cell.parallel = 40;
            }),
    ]
}

/// The lane finds out by headers or by a probe how much the provider has stored, and uses it.
fn bursts() -> Vec<Cell> {
    let cell = |scenario, configured: Option<f64>, per_minute, items| {
        Cell::new(scenario, configured)
            .requests(per_minute, items)
            .truth(|t| {
                t.headers = Headers::As(Dialect::OpenAi);
                t.latency = Duration::from_millis(200);
                t.jitter = 0.0;
            })
            .with(|cell| {
                cell.burst = None;
                cell.seeds = ablation::seeds();
                cell.most_rejected = 0.0;
            })
    };
    let stores = |cell: Cell, seconds: u64| {
        let burst = Duration::from_secs(seconds);
        cell.truth(|t| t.enforcement = Enforcement::TokenBucket { burst })
    };
    let bars = |cell: Cell, ratio, rejected| {
        cell.with(|cell| (cell.most_ratio, cell.most_rejected) = (ratio, rejected))
    };
    let second = [
        cell("stores 1 s", Some(1.0), 6_000, 1_000).with(|cell| cell.parallel = 1_000),
        cell("stores 1 s of tokens", Some(1.0), 6_000, 1_000)
            .truth(|t| (t.requests, t.tokens) = (None, Some(3_000_000)))
            .with(|cell| (cell.sizes, cell.parallel) = (Sizes::HeavyTailed, 1_000)),
    ];
    // Calls of very different sizes leave a little more at the end.
    let [requests, tokens] = second;
    let second = [bars(requests, 1.01, 0.0), bars(tokens, 1.025, 0.0)];
    let longer = [
        ("stores 10 s", 10),
        ("stores 30 s", 30),
        ("stores 60 s", 60),
    ];
    let longer = longer.into_iter().flat_map(|(name, seconds)| {
        [Some(1.0), None].map(|configured| {
            bars(
                stores(cell(name, configured, 600, 1_000), seconds),
                1.05,
                0.0,
            )
        })
    });
    let share = stores(
        cell("stores 60 s, half is meant", Some(0.5), 600, 1_000),
        60,
    );
    let two = stores(cell("2 cold lanes, stores 60 s", Some(2.0), 600, 1_000), 60)
        .with(|cell| cell.contexts = 2);
    let probed = cell("stores 1 s, says nothing", Some(1.0), 6_000, 1_000)
        .truth(|t| t.headers = Headers::None)
        .with(|cell| cell.parallel = 1_000);
    let windows = [
        ("windows of 1 s", 1),
        ("windows of 10 s", 10),
        ("windows of 60 s", 60),
    ];
    let windows = windows.into_iter().flat_map(|(name, seconds)| {
        let windows = cell(name, Some(1.0), 6_000, 1_000)
            .truth(|t| t.enforcement = Enforcement::FixedWindow(Duration::from_secs(seconds)));
        let silent = windows.clone().truth(|t| t.headers = Headers::None);
        [bars(windows, 1.10, 0.0), bars(silent, 1.10, 0.003)]
    });
    let calls = if cfg!(debug_assertions) {
        5_000
    } else {
        20_000
    };
    let hidden = stores(
        cell("promises 60 s, counts by 1 s", Some(1.0), 6_000, calls),
        60,
    )
    .truth(|t| t.hidden = Some(Enforcement::FixedWindow(SECOND)));
    // Whole seconds, a day and no reset say nothing of what is stored: a second's burst is what they get.
    let dialects = [
        ("Anthropic\'s headers", Dialect::Anthropic),
        ("Azure\'s headers", Dialect::Azure),
        ("Groq\'s headers", Dialect::Groq),
        ("Mistral\'s headers", Dialect::Mistral),
    ];
    let dialects = dialects.map(|(name, dialect)| {
        let cell = cell(name, Some(1.0), 600, 1_000)
            .truth(|t| (t.headers, t.tokens) = (Headers::As(dialect), Some(300_000)))
            .with(|cell| cell.sizes = Sizes::Capped(300));
        bars(stores(cell, 10), 1.12, 0.003)
    });
    let cells = second
        .into_iter()
        .chain(longer)
        .chain(windows)
        .chain(dialects);
    cells
        .chain([
            bars(share, 1.01, 0.0),
            bars(two, 1.10, 0.01),
            bars(probed, 1.02, 0.003),
            bars(hidden, 1.05, 0.01),
        ])
        .collect()
}
