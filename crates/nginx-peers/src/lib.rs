//! Edits the peer list of an nginx upstream in shared memory, at run time.
//!
//! nginx keeps the peers of an upstream with a `zone` in a linked list in shared memory, and every
//! stock balancer picks from it. Since 1.27.3 the list may change while nginx runs: peers have
//! reference counts, and a counter (`config`) tells whoever is in the middle of something that it
//! did. nginx itself does so for `server … resolve`; here it is done for anybody who has a list of
//! [`Spec`]s.
//!
//! ```text
//! spec ──▶ diff ──▶ list ─────────────▶ shared memory
//! what     what     prepare, then link
//! should   differs  under one short lock
//! be
//! ```
//!
//! One process edits a list: the worker that calls [`List::apply`]. The others only read. That is
//! nginx's own rule (`resolve` gives each server one worker), and what follows relies on it: the
//! links may be walked without the lock, because nobody else writes them.
//!
//! [`stock`] tells whether there is such a list at all: a method of somebody else's may keep something else.
//!
//! [`meter`] counts what becomes of each peer's requests, and [`view`] copies a list for whoever
//! shows it. [`carry`] copies the peers of the list before a reload into the one after it, and [`crash`] mends
//! what a killed process leaves behind. [`retry`] holds the decisions of the other half: what a request does whose list has changed
//! since it began.

#![warn(missing_docs)]

mod abi;
pub mod carry;
pub mod counters;
pub mod crash;
pub mod diff;
mod inline;
mod label;
pub mod list;
pub mod meter;
pub mod retry;
pub mod spec;
pub mod stock;
pub mod view;
mod zone;

#[cfg(test)]
mod doubles;

pub use abi::{InitPeer, PeerAbi, PeersAbi, ServerAbi, UpstreamAbi, http, servers_of};
pub use inline::nginx_peer_connection_forget_choice as forget_choice;
pub use label::Label;
pub use list::{Change, Changed, List};
pub use spec::Spec;
pub use zone::{Full, Usage};
