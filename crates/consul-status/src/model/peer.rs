//! The peers of one upstream at a time.

use super::{Datacenter, Id, KeptBy, Key, Node, PeerState, Server, Status};
use crate::time::Time;

/// Where peers come from.
///
/// There may be ten thousand of them, so the document does not hold them: those of one upstream
/// are taken when its turn comes, in whatever form needs the least memory, and looked at one by
/// one.
pub trait Rows {
    /// Takes the peers of this upstream of [`Document::upstreams`](super::Document::upstreams),
    /// and lets go of those taken before. Says how many there are.
    fn take(&mut self, upstream: usize) -> usize;

    /// One of those taken, counted from 0, in the order of nginx's lists. No other is asked for.
    fn row(&self, at: usize) -> Peer<'_>;

    /// Lets go of those taken: no more of them is asked for.
    fn release(&mut self);
}

/// A peer of nginx's list.
#[derive(Clone, Debug)]
pub struct Peer<'a> {
    /// Never used again for another one; none for static servers.
    pub id: Option<u64>,
    /// Its address.
    pub server: Server<'a>,
    /// What the configuration calls it: the service, or a static server's name.
    pub name: Server<'a>,
    /// It is asked only when no other is left.
    pub backup: bool,
    /// Its weight.
    pub weight: u64,
    /// Its weight after failures.
    pub effective_weight: u64,
    /// What nginx does with it.
    pub state: PeerState,
    /// Requests that are under way.
    pub active: u64,
    /// How many there may be; 0 is any number.
    pub max_conns: u64,
    /// What was counted; none for static servers.
    pub counters: Option<Counters>,
    /// Whose it is; none for static servers.
    pub instance: Option<Instance<'a>>,
}

/// What was counted of a peer since it was added, or since the zone was made.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counters {
    /// Requests that were sent to it.
    pub requests: u64,
    /// Responses of 1xx to 5xx.
    pub responses: [u64; 5],
    /// Bytes sent to it.
    pub sent: u64,
    /// Bytes received from it.
    pub received: u64,
    /// Attempts that failed.
    pub fails: u64,
    /// How often it became unavailable.
    pub unavail: u64,
    /// For how many milliseconds it was unavailable.
    pub downtime: u64,
    /// Since when it is unavailable.
    pub downstart: Option<Time>,
    /// When it was last picked.
    pub selected: Option<Time>,
    /// Microseconds to the header of a response, on a moving average.
    pub header_time: Option<u64>,
    /// Microseconds to the end of a response, on a moving average.
    pub response_time: Option<u64>,
    /// Microseconds to the headers of all responses.
    pub header_time_total: u64,
    /// Microseconds to the ends of all responses.
    pub response_time_total: u64,
}

/// The instance of Consul that a peer stands for.
#[derive(Clone, Debug)]
pub struct Instance<'a> {
    /// The number of the source that it comes from.
    pub source: Option<u32>,
    /// Its service ID.
    pub service_id: Id<'a>,
    /// Its node.
    pub node: Node<'a>,
    /// Its node's datacenter.
    pub datacenter: Option<Datacenter<'a>>,
    /// How healthy it is.
    pub status: Option<Status>,
    /// Why it serves although its status or its absence says that it should not.
    pub kept_by: Option<KeptBy>,
    /// When it was added.
    pub since: Option<Time>,
    /// Keys of its `Meta` whose values are of no use.
    pub ignored_meta: Vec<Key<'a>>,
}
