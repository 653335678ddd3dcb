//! [`stop_on_signal`]: a token that the signals of the process cancel.

use tokio_util::sync::CancellationToken;

use crate::error::Result;

/// Returns a token that is cancelled when the process is asked to stop: by Ctrl-C or, on Unix, by SIGTERM, the signal of
/// process managers and container platforms. It is for [`Worker::run_until`](crate::Worker::run_until) and all work that
/// ends with it.
///
/// From now on these signals do not end the process by themselves, and only the first has an effect. So the work that
/// follows must end, as that of a worker does in its [drain](crate::runs::WorkerBuilder::drain_for).
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
