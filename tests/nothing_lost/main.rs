//! Each input ends as exactly one outcome, and a failure says why, after how many attempts, and whether it was billed.

mod batch;
mod calls;
mod deployments;
mod failures;
mod stream;
