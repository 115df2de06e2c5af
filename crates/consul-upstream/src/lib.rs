//! What the http and the stream module have in common: all but the tables that nginx reads, and what
//! one of them alone has.
//!
//! Directives become settings ([`conf`]), a reload takes over what serves ([`carry`]), the first worker
//! follows Consul ([`process`]), and a layer around the balancers takes requests through changes
//! ([`balance`]). Consul is the business of the crate consul-watch, the peer list in shared memory
//! that of nginx-peers, which also knows nginx's types of both protocols. Everything here is generic
//! over the [`Protocol`], which says the rest.
//!
//! A module's file has its own copy of this crate, with its own statics: two modules in one nginx
//! share nothing.

pub mod balance;
pub mod carry;
pub mod conf;
pub mod failpoint;
pub mod guard;
pub mod log;
pub mod process;
mod protocol;
mod tables;

pub use nginx_peers::meter::Attempt;
pub use protocol::{Peer, Protocol};

#[doc(hidden)]
pub use nginx_sys;
/// For the macros here.
#[doc(hidden)]
pub use ngx;
