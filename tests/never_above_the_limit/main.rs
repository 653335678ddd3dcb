//! Calls go at the full rate and never above the limit: grants in any window are at most burst + rate × window.

mod deployments;
mod lane;
