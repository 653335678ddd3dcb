//! What shows that it holds: workers that are called again and again, one of them killed, and a look at all that they left.

use std::collections::HashSet;

use throughline::provider::sim::Ledger;
use throughline::store::RunFilter;
use throughline::{Error, Result, Runner, runs::RunSnapshot};
use tokio::process::Command;
use tokio::time::sleep;

use super::{CONTINUE, ITEMS, LEDGER, SECOND};

/// The items that were completed at some time, and how many bills there were by then.
type Kept = (HashSet<String>, usize);

/// Calls a worker until it says that all is done. The victim is killed in the middle of the last phase; what was
/// completed by then is given.
pub async fn supervise(runner: &Runner, worker: &str, victim: bool) -> Result<Kept> {
    let mut kept = Kept::default();
    for call in 1.. {
        let name = format!("worker {worker}, call {call}");
        let mut command = Command::new(std::env::current_exe()?);
        let mut process = command.arg(&name).kill_on_drop(true).spawn()?;
        let ended = tokio::select! {
            ended = process.wait() => ended?,
            middle = half_way(runner), if victim && kept.0.is_empty() => {
                // On Unix that is SIGKILL: nothing is flushed and nobody says goodbye.
                process.kill().await?;
                println!("{name}: killed");
                kept = middle?;
                continue;
            }
        };
        match ended.code() {
            Some(0) => break,
            Some(CONTINUE) => {}
            code => return Err(Error::other(format!("{name} has failed: {code:?}"))),
        }
    }
    Ok(kept)
}

/// What is completed when half of all calls have their bill: that is in the last phase.
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

/// Looks at the rows, the logs and the provider's bills, and says what it finds.
pub async fn verify(runner: &Runner, (kept, bills): Kept) -> Result<()> {
    let mut completed = 0;
    for run in runner.list(RunFilter::new(), 3).await?.into_iter().rev() {
        let audit = runner.audit(run.id).await?.expect("it is there");
        assert!(audit.is_sound(), "{audit}");
        completed += audit.completed;
        let run = RunSnapshot::from(run);
        println!("{run} in {:.1?}; {audit}", run.elapsed);
    }
    let ledger = Ledger::read(LEDGER)?;
    let later = ledger.bills[bills..].iter();
    let again = later.filter(|bill| kept.contains(&*bill.key)).count();
    let twice = ledger.bills.len() - ledger.accounts.len();
    let listed = runner.ambiguous(None, 1000).await?.len();
    let kept = kept.len();
    println!("{completed} of {ITEMS} items are completed, each once");
    println!("{again} of {kept} items completed before the kill were paid for again");
    println!("{twice} calls were paid for twice, {listed} are listed as ambiguous");
    assert!(completed == ITEMS as u64 && again == 0 && twice <= listed);
    Ok(())
}
