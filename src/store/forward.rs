//! Stores that pass every call on to another store.
//!
//! [`forward_store`] has the list of all methods of `Store` and `Queue`, and implements both traits for a wrapper. Each
//! wrapper says with a macro how one call is passed on. So a wrapper cannot forget a method, and a new method is added
//! to one list.

use std::sync::Arc;

/// Implements `Store` and `Queue` for `$type`.
///
/// `$pass_on` is a macro that expands to the body of a method. It is called as `$pass_on!(self.name())` for the
/// name and as `$pass_on!(self.method((argument: type), ...))` for all other methods. `$store` and `$queue` are the
/// generics of the two impls.
macro_rules! forward_store {
    ($pass_on:ident, [$($store:tt)*], [$($queue:tt)*], $type:ty) => {
        const _: () = {
            use std::time::Duration;
            use $crate::error::Result;
            use $crate::store::{
                Claim, Commit, Committed, Created, Generation, Hold, Intent, IntentFilter, Item,
                LeaseId, LogEntry, MemoKey, NewRun, Purged, Queue, Reaped, Run, RunFilter, RunId,
                Store,
            };

            $crate::store::forward::forward_store! { @impl [$($store)*] Store for $type, $pass_on, {
                create_run((run: NewRun)) -> Created;
                runs((filter: RunFilter), (limit: u32)) -> Vec<Run>;
                items((run: RunId), (from: u64), (limit: u32)) -> Vec<Item>;
                log((run: RunId), (after: u64), (limit: u32)) -> Vec<LogEntry>;
                generations((tenant: &str), (keys: &[MemoKey])) -> Vec<Generation>;
                commit((commit: Commit)) -> Committed;
                intents((filter: IntentFilter), (limit: u32)) -> Vec<Intent>;
                cancel((run: RunId)) -> u64;
                retry_failed((run: RunId)) -> u64;
                purge((older_than: Duration), (limit: u32)) -> Purged;
            } fn name(&self) -> &'static str { $pass_on!(self.name()) } }

            $crate::store::forward::forward_store! { @impl [$($queue)*] Queue for $type, $pass_on, {
                register((worker: &str), (ttl: Duration)) -> LeaseId;
                heartbeat((lease: LeaseId), (ttl: Duration)) -> bool;
                retire((lease: LeaseId)) -> u64;
                claim((lease: LeaseId), (claim: Claim)) -> Vec<Item>;
                has_suspects((pipelines: &[String])) -> bool;
                release((holds: &[Hold]), (delay: Duration), (charge: bool)) -> u64;
                held((lease: LeaseId)) -> Vec<Hold>;
                reap() -> Reaped;
            } }
        };
    };
    (@impl [$($generics:tt)*] $trait:ident for $type:ty, $pass_on:ident, {
        $($method:ident($(($argument:ident: $($argument_type:tt)+)),*) -> $output:ty;)*
    } $($name:tt)*) => {
        #[async_trait::async_trait]
        #[deny(clippy::missing_trait_methods)]
        impl<$($generics)*> $trait for $type {
            $($name)*

            $(async fn $method(&self $(, $argument: $($argument_type)+)*) -> Result<$output> {
                $pass_on!(self.$method($(($argument: $($argument_type)+)),*))
            })*
        }
    };
}
pub(crate) use forward_store;

/// Calls the store behind a pointer.
macro_rules! through_pointer {
    ($self:tt.name()) => {
        (**$self).name()
    };
    ($self:tt.$method:ident($(($argument:ident: $($type:tt)+)),*)) => {
        (**$self).$method($($argument),*).await
    };
}

forward_store!(through_pointer, [S: Store + ?Sized], [S: Queue + ?Sized], Arc<S>);
forward_store!(through_pointer, [S: Store + ?Sized], [S: Queue + ?Sized], Box<S>);
