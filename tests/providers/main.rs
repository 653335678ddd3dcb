//! The providers that need no network: the simulator, which is the witness of other tests.

mod simulator;
