//! [`stop_on_signal`]: what a service listens to when it is asked to stop.

use tokio_util::sync::CancellationToken;

use crate::error::Result;

/// A token that is cancelled when the process is asked to stop: by Ctrl-C or, on Unix, by SIGTERM, which is how
/// process managers and container platforms ask. For [`Worker::run_until`](crate::Worker::run_until) and all that has to
/// end with it.
///
/// From here on these signals no longer end the process by themselves, and only the first does something: what you
/// do then must come to its end, as a worker does in its [drain](crate::runs::WorkerBuilder::drain_for).
///
/// ```no_run
/// # use throughline::{Context, Worker, testing::Scripted, store::Memory};
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> throughline::Result<()> {
/// # let worker = Worker::builder(Memory::new(), Context::builder(Scripted::new()).build()).build();
/// let stop = throughline::context::stop_on_signal()?;
/// worker.run_until(stop.cancelled()).await?;
/// # Ok(()) }
/// ```
///
/// # Errors
/// If the process may not listen to signals.
///
/// # Panics
/// Outside a Tokio runtime whose IO is enabled.
pub fn stop_on_signal() -> Result<CancellationToken> {
    let stop = CancellationToken::new();
    let asked = stop.clone();
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        tokio::spawn(async move {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
            asked.cancel();
        });
    }
    #[cfg(not(unix))]
    {
        let interrupt = tokio::signal::ctrl_c();
        tokio::spawn(async move {
            if interrupt.await.is_ok() {
                asked.cancel();
            }
        });
    }
    Ok(stop)
}
