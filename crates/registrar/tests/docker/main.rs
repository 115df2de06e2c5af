//! The registrar between a real Docker engine and a real Consul.
//!
//! The engine is shared with whatever else runs on this machine, so each test has a Consul of its
//! own, which gets all that runs there, and looks at its own containers only. Without an engine
//! they are skipped.

#![forbid(unsafe_code)]

mod addresses;
mod bed;
mod burst;
mod events;
mod labels;
mod options;
mod survival;
mod trouble;
