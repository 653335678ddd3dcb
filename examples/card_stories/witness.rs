//! What shows that it holds: two processes of which one is killed, and a look at all that they left.

use std::collections::{BTreeMap, HashSet};
use std::path::Path;
use std::process::{Child, Command};
use std::time::Duration;

use futures::TryStreamExt as _;
use futures::future::ready;
use serde_json::Value;
use throughline::provider::sim::Ledger;
use throughline::store::{RunFilter, Status};
use throughline::{Result, Runner};
use tokio::time::sleep;

use super::{CONTINUE, ITEMS, LEDGER, SCALE};

/// Keeps two workers going until both say that all is done, and kills one in the middle of the last phase. Gives
/// the items that were completed then, with how often each was paid for.
pub async fn supervise(dir: &Path, runner: &Runner) -> Result<BTreeMap<String, u64>> {
    let start = |worker: &str, call: u32| -> Result<Child> {
        let mut command = Command::new(std::env::current_exe()?);
        let name = format!("worker {worker}, call {call}");
        Ok(command.arg(dir).arg(name).spawn()?)
    };
    let mut at_work = vec![("a", 1, start("a", 1)?), ("b", 1, start("b", 1)?)];
    let mut kept = BTreeMap::new();
    while !at_work.is_empty() {
        sleep(Duration::from_millis(10)).await;
        let runs = runner.list(RunFilter::new(), 3).await?;
        if kept.is_empty() && runs.len() == 3 && runs[0].completed > runs[0].total / 3 {
            let (name, call, child) = &mut at_work[1];
            // On Unix that is SIGKILL: nothing is flushed and nobody says goodbye.
            child.kill()?;
            child.wait()?;
            println!("worker {name}, call {call}: killed");
            for run in runs {
                let rows = runner.stream_results::<Vec<String>>(run.id);
                let rows = rows.try_filter(|row| ready(row.status == Status::Completed));
                let keys: Vec<_> = rows.map_ok(|row| row.key).try_collect().await?;
                kept.extend(keys.into_iter().map(|key| (key, 0)));
            }
            let ledger = Ledger::read(dir.join(LEDGER))?;
            kept.iter_mut()
                .for_each(|(key, times)| *times = ledger.account(key).billed);
            *call += 1;
            *child = start(name, *call)?;
        }
        let mut on = Vec::new();
        for (name, call, mut child) in at_work {
            match child.try_wait()?.map(|status| status.code()) {
                None => on.push((name, call, child)),
                Some(Some(CONTINUE)) => on.push((name, call + 1, start(name, call + 1)?)),
                Some(code) => assert_eq!(code, Some(0), "worker {name} has failed"),
            }
        }
        at_work = on;
    }
    Ok(kept)
}

/// Looks at the rows, the log and the provider's bills, and says what it finds.
pub async fn verify(dir: &Path, runner: &Runner, kept: BTreeMap<String, u64>) -> Result<bool> {
    let (mut equal, mut gap_free, mut once) = (true, true, true);
    let mut completed = HashSet::new();
    for run in runner.list(RunFilter::new(), 3).await?.into_iter().rev() {
        let rows = runner.stream_results::<Vec<String>>(run.id);
        let rows: Vec<_> = rows.try_collect().await?;
        let done = rows.iter().filter(|row| row.output().is_some()).count() as u64;
        equal &= (run.total, run.completed) == (rows.len() as u64, done);
        let log = runner.log_since(run.id, 0, u32::MAX).await?;
        gap_free &= log.iter().map(|entry| entry.seq).eq(1..=run.log_seq);
        for entry in log.iter().filter(|entry| entry.kind == "settled") {
            let settled: Value = serde_json::from_str(&entry.data)?;
            let seqs = settled["completed"].as_array().into_iter().flatten();
            seqs.for_each(|seq| once &= completed.insert((run.id, seq.as_u64())));
        }
        let took = run
            .ended_at
            .unwrap_or(run.created_at)
            .duration_since(run.created_at);
        let took = took.unwrap_or_default().mul_f64(SCALE);
        println!(
            "{:9} {:3} items created in one round trip, done in {took:.0?}",
            run.name, run.total
        );
    }
    let ledger = Ledger::read(dir.join(LEDGER))?;
    let again = kept
        .iter()
        .filter(|(key, times)| ledger.account(key).billed != **times)
        .count();
    let in_vain = ledger.bills.len() - ledger.accounts.len();
    let listed = runner.ambiguous(None, 1000).await?.len();
    let verdicts = [
        (
            once && completed.len() == ITEMS,
            format!("{} of {ITEMS} items completed, each once", completed.len()),
        ),
        (equal, "the counters equal the rows".to_owned()),
        (gap_free, "the logs have no gap".to_owned()),
        (
            again == 0,
            format!(
                "{again} of {} items completed before the kill were paid for again",
                kept.len()
            ),
        ),
        (
            in_vain <= listed,
            format!("{in_vain} calls paid twice, of {listed} that are listed as ambiguous"),
        ),
    ];
    for (holds, what) in &verdicts {
        println!("{} {what}", if *holds { "ok:   " } else { "WRONG:" });
    }
    Ok(verdicts.iter().all(|(holds, _)| *holds))
}
