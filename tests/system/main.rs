//! The module at work in real nginx, with real Consul and real backends.
//!
//! Each test has its own loopback network, directory and processes (see the crate testbed), so all
//! of them run in parallel. Where a Consul has to answer what no real one would, at a moment that a
//! test chooses, a [`fake_consul`] takes its place.

mod common;
mod fake_consul;
mod guard;

mod agents;
mod balancers;
mod changes;
mod churn;
mod config;
mod consul;
mod crash;
mod foreign_methods;
mod health;
mod lifecycle;
mod names;
mod protocols;
mod reload;
mod retries;
mod secure;
mod size;
mod state;
mod status;
mod sticky;
mod stream;
mod truth;
mod upgrade;
mod zone;
