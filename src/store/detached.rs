//! Calls that run in tasks of their own.

use crate::error::{Error, ErrorKind, Persistence, Result};

/// Runs a call in a task of its own, so that it makes progress even if its caller does not poll it or drops it.
///
/// A call holds a connection, and some calls hold locks. If the caller drove it, a future that was started and is not
/// polled, as in a `buffer_unordered` whose consumer is busy, would block every other caller that needs the connection or
/// the lock, possibly including that consumer.
pub(super) async fn detached<T: Send + 'static>(
    call: impl Future<Output = Result<T>> + Send + 'static,
) -> Result<T> {
    match tokio::spawn(call).await {
        Ok(done) => done,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(_) => {
                let error = Error::new(ErrorKind::Store, "the runtime stopped during the call");
                Err(error.with_persistence(Persistence::Temporary))
            }
        },
    }
}

/// Implements `Store` and `Queue` for `$store`, a newtype around the `Arc` of a store, by calls of that store in tasks of
/// their own.
macro_rules! detached_calls {
    ($store:ident) => {
        const _: () = {
            use $crate::store::detached::call_in_task;
            $crate::store::forward::forward_store!(call_in_task, [], [], $store);
        };
    };
}
pub(super) use detached_calls;

/// Calls the inner store in a task, which owns the arguments.
macro_rules! call_in_task {
    ($self:tt.name()) => {
        $self.0.name()
    };
    ($self:tt.$method:ident($(($argument:ident: $($type:tt)+)),*)) => {{
        let inner = std::sync::Arc::clone(&$self.0);
        $(let $argument = $crate::store::detached::call_in_task!(@own $argument: $($type)+);)*
        let call = async move {
            inner
                .$method($($crate::store::detached::call_in_task!(@pass $argument: $($type)+)),*)
                .await
        };
        $crate::store::detached::detached(call).await
    }};
    (@own $argument:ident: & $($type:tt)+) => { $argument.to_owned() };
    (@own $argument:ident: $($type:tt)+) => { $argument };
    (@pass $argument:ident: & $($type:tt)+) => { &$argument };
    (@pass $argument:ident: $($type:tt)+) => { $argument };
}
pub(super) use call_in_task;
