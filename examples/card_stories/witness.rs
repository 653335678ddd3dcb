//! Starts the worker processes, kills one of them, and verifies the results, the logs and the provider's bills.

use std::collections::HashSet;

use throughline::provider::sim::Ledger;
use throughline::store::RunFilter;
use throughline::{Error, Result, Runner, runs::RunSnapshot};
use tokio::process::Command;
use tokio::time::sleep;

use super::{CONTINUE, ITEMS, LEDGER, SECOND};

/// The keys of the items that were completed at some time, and the number of bills at that time.
type Kept = (HashSet<String>, usize);

/// Starts a worker again and again until all is done. Kills the victim in the middle of the last phase and returns the items
/// that were completed by then.
pub async fn supervise(runner: &Runner, worker: &str, victim: bool) -> Result<Kept> {
    let mut kept = Kept::default();
    for call in 1.. {
        let name = format!("worker {worker}, call {call}");
        let mut command = Command::new(std::env::current_exe()?);
        let mut process = command.arg(&name).kill_on_drop(true).spawn()?;
        let ended = tokio::select! {
            ended = process.wait() => ended?,
            middle = half_way(runner), if victim && kept.0.is_empty() => {
                // On Unix this sends SIGKILL.
                process.kill().await?;
                println!("{name}: killed");
                kept = middle?;
                continue;
            }
        };
        match ended.code() {
            Some(0) => break,
            Some(CONTINUE) => {}
            code => return Err(Error::other(format!("{name} failed: {code:?}"))),
        }
    }
    Ok(kept)
}

/// Waits until half of all calls are billed, which is in the last phase, and returns the completed items.
async fn half_way(runner: &Runner) -> Result<Kept> {
    while Ledger::read(LEDGER)?.bills.len() < ITEMS / 2 {
        sleep(SECOND).await;
    }
    let mut keys = HashSet::new();
    for run in runner.list(RunFilter::new(), 3).await? {
        let items = runner.results::<Vec<String>>(run.id, 0, 1000).await?;
        let done = items.into_iter().filter(|item| item.output().is_some());
        keys.extend(done.map(|item| item.key));
    }
    Ok((keys, Ledger::read(LEDGER)?.bills.len()))
}

/// Checks the items, the logs and the provider's bills, and prints the findings.
pub async fn verify(runner: &Runner, (kept, bills): Kept) -> Result<()> {
    let mut completed = 0;
    for run in runner.list(RunFilter::new(), 3).await?.into_iter().rev() {
        let audit = runner.audit(run.id).await?.expect("the run exists");
        assert!(audit.is_sound(), "{audit}");
        completed += audit.completed;
        let run = RunSnapshot::from(run);
        println!("{run} in {:.1?}; {audit}", run.elapsed);
    }
    let ledger = Ledger::read(LEDGER)?;
    let later = ledger.bills[bills..].iter();
    let again = later.filter(|bill| kept.contains(&*bill.key)).count();
    let twice = ledger.bills.len() - ledger.by_key.len();
    let listed = runner.ambiguous(None, 1000).await?.len();
    let kept = kept.len();
    println!("{completed} of {ITEMS} items are completed, each once");
    println!("{again} of {kept} items completed before the kill were paid for again");
    println!("{twice} calls were paid for twice, {listed} are listed as ambiguous");
    assert!(completed == ITEMS as u64 && again == 0 && twice <= listed);
    Ok(())
}
