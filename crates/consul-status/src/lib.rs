//! The status of discovery, rendered: JSON, a page, and text for Prometheus.
//!
//! Whoever answers a request reads a [`Request`] off it, fills a [`Document`], and hands both and
//! the peers' [`Rows`] to an [`Answer`], which is asked for some 64 KiB whenever the client has
//! read what it was given.
//!
//! ```text
//! request ─▶ Request ─┐
//! model ──▶ Document ─┼▶ Answer ─▶ walk ─▶ json, html     ─▶ escape ─▶ bytes
//! peers ──▶ Rows ─────┘         └▶ series ─▶ prometheus ─▶
//! ```
//!
//! Nothing here knows what nginx is, and nothing reads a clock: what is rendered is what the
//! document says. Text that comes from Consul is [`Text`], and there is no way to write one but
//! through the escaper of the format that is written.

#![forbid(unsafe_code)]
#![warn(missing_docs)]

mod answer;
pub mod escape;
mod html;
mod json;
pub mod model;
mod out;
mod prometheus;
pub mod request;
mod text;
mod time;
mod walk;

pub use answer::{Answer, FILL, Header};
pub use model::{Document, Peer, Rows};
pub use request::{Error, Format, Request};
pub use text::Text;
pub use time::Time;
