//! What the document says, in plain structures.
//!
//! `None` is "not known" or "never", never 0. Texts are kept as they came; the type of each says
//! how much of it is shown at most.

mod peer;
mod upstream;
mod words;

pub use peer::{Counters, Instance, Peer, Rows};
pub use upstream::{
    Change, Counts, Errors, Excluded, LastError, Servers, Source, Updates, Upstream, Zone,
};
pub use words::{
    Cause, Health, KeptBy, PeerState, Protocol, Reason, Sign, Status, Sync, ThreadState,
};

use std::time::Duration;

use crate::text::Text;
use crate::time::Time;

/// The version of the document: it grows when a field goes or changes its meaning.
pub const VERSION: u32 = 1;

/// Without a heartbeat for so long the consul thread is not alive.
pub const SILENT: Duration = Duration::from_secs(15);

/// The name of an upstream or a zone.
pub type Name<'a> = Text<'a, 256>;
/// A service ID.
pub type Id<'a> = Text<'a, 88>;
/// A node's name.
pub type Node<'a> = Text<'a, 64>;
/// A datacenter's name.
pub type Datacenter<'a> = Text<'a, 32>;
/// The address of an instance as Consul has it.
pub type Address<'a> = Text<'a, 56>;
/// The address of a peer as nginx has it, which may be a Unix socket's.
pub type Server<'a> = Text<'a, 128>;
/// What a reason is about: a check ID, a tag or a port.
pub type Detail<'a> = Text<'a, 32>;
/// A key of an instance's `Meta`.
pub type Key<'a> = Text<'a, 64>;
/// A word of the configuration: a service, a filter.
pub type Word<'a> = Text<'a, 128>;
/// A list of tags, all of it.
pub const TAGS: usize = 256;
/// The address of an agent: scheme, host and port, nothing else of its URL.
pub type AgentAddress<'a> = Text<'a, 256>;
/// The version of a program.
pub type Version<'a> = Text<'a, 40>;
/// A sentence of ours.
pub type Sentence<'a> = Text<'a, 256>;

/// The whole document, but for the peers.
#[derive(Clone, Debug)]
pub struct Document {
    /// When it was taken.
    pub now: Time,
    /// All upstreams are in sync, and the thread is alive.
    pub in_sync: bool,
    /// Since when that holds, or does not.
    pub since: Option<Time>,
    /// Who answers.
    pub nginx: Nginx,
    /// The thread that follows Consul.
    pub thread: Thread,
    /// The agents in use.
    pub agents: Vec<Agent>,
    /// What the module itself needs.
    pub memory: Memory,
    /// All upstreams with sources, in the configuration's order.
    pub upstreams: Vec<Upstream>,
}

/// The nginx that answers.
#[derive(Clone, Debug)]
pub struct Nginx {
    /// nginx's version.
    pub version: Version<'static>,
    /// The module's version.
    pub module: Version<'static>,
    /// When the configuration was loaded.
    pub load_timestamp: Option<Time>,
    /// The worker that answers.
    pub pid: u32,
}

/// The thread that follows Consul, in the first worker.
#[derive(Clone, Debug)]
pub struct Thread {
    /// What it does.
    pub state: ThreadState,
    /// The worker that it runs in.
    pub pid: Option<u32>,
    /// When it was started.
    pub started: Option<Time>,
    /// When it last said that it lives.
    pub heartbeat: Option<Time>,
    /// How often it was started again after a panic.
    pub restarts: u64,
}

impl Thread {
    /// Whether there was a heartbeat within [`SILENT`].
    pub fn is_up(&self, now: Time) -> bool {
        self.heartbeat.is_some_and(|heartbeat| now.since(heartbeat) < SILENT)
    }
}

/// A Consul agent that is asked.
#[derive(Clone, Debug)]
pub struct Agent {
    /// Scheme, host and port.
    pub address: AgentAddress<'static>,
    /// Its last exchange worked.
    pub up: bool,
    /// Its version, if the token may read it.
    pub version: Option<Version<'static>>,
    /// Connections to it that are open.
    pub connections: u32,
    /// How many there may be.
    pub max_connections: u32,
}

/// Bytes that the module itself needs.
#[derive(Clone, Copy, Debug, Default)]
pub struct Memory {
    /// Answers that are kept, in the memory of the first worker.
    pub answers: Option<u64>,
    /// The module's own zone.
    pub zone_size: u64,
}
