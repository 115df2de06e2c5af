//! Follows the health of Consul services.
//!
//! A [`Query`] names what to ask an [`Agent`] for; [`watch::follow`] asks again and again with
//! Consul's blocking queries and hands every verified change to a [`watch::Sink`] as a
//! [`Snapshot`]; [`policy::select`] decides which of its instances should serve.
//!
//! The way an answer takes, and the file of each step:
//!
//! ```text
//! query ─▶ client ─▶ health ─▶ watch ─▶ policy
//! what     HTTP      JSON to    index    who serves,
//! to ask   bounded   instances  rules    at what weight
//! ```
//!
//! Nothing here knows what nginx is, and nothing blocks: names are resolved by an asynchronous
//! resolver, so that a runtime that holds a watch can be dropped at any moment.

#![forbid(unsafe_code)]
#![warn(missing_docs)]

mod about;
pub mod agent;
pub mod backoff;
pub mod client;
pub mod credentials;
pub mod error;
pub mod file;
pub mod health;
pub mod instance;
pub mod names;
pub mod pace;
pub mod policy;
pub mod pool;
pub mod query;
mod reach;
pub mod report;
pub mod resolver;
mod rights;
pub mod state;
pub mod tls;
pub mod watch;

pub use agent::Agents;
pub use client::Client;
pub use error::Error;
pub use instance::{Endpoint, Host, Instance, Status, Unusable, Weights};
pub use names::Names;
pub use policy::{Health, Peer, Selection};
pub use pool::Pool;
pub use query::Query;
pub use watch::Snapshot;
