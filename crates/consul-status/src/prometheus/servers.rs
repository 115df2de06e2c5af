//! The peers that Prometheus gets: bounded, and merged.

use std::collections::HashMap;

use crate::answer::View;
use crate::model::{Counters, Datacenter, Id, Node, Peer, PeerState, Rows, Server as Address};
use crate::request::Peers;

/// How many peers are listed in a scrape, if not all are asked for.
pub(crate) const BOUND: usize = 500;

/// Rows with the same upstream and server, which is legal in nginx and a fault in Prometheus: the
/// counters are sums, all else is the first one's.
pub(crate) struct Server {
    pub(super) upstream: usize,
    pub(super) server: Address<'static>,
    pub(super) state: PeerState,
    pub(super) active: u64,
    pub(super) limit: u64,
    pub(super) weight: u64,
    pub(super) backup: bool,
    pub(super) service_id: Id<'static>,
    pub(super) node: Node<'static>,
    pub(super) datacenter: Datacenter<'static>,
    pub(super) counters: Option<Counters>,
}

/// Those that are listed, and how many are not.
pub(crate) struct Servers {
    pub(super) all: Vec<Server>,
    /// For each upstream that was asked for.
    pub(super) omitted: Vec<u64>,
}

impl Servers {
    /// Takes whole upstreams as long as they fit; what does not fit is passed over.
    pub(super) fn collect(
        view: &View,
        upstreams: &[usize],
        peers: Peers,
        rows: &mut impl Rows,
    ) -> Self {
        let mut left = match peers {
            Peers::None => 0,
            Peers::Bounded => BOUND,
            Peers::All => usize::MAX,
        };
        let (mut all, mut omitted) = (Vec::new(), Vec::new());
        for &at in upstreams {
            let expected = view.document.upstreams[at].servers.total();
            // Not looked at, if it is known before that they do not fit.
            let fits = left > 0 && usize::try_from(expected).is_ok_and(|expected| expected <= left);
            let count = if fits { rows.take(at) } else { 0 };
            if fits && count <= left {
                left -= count;
                omitted.push(0);
                merge(at, count, rows, &mut all);
            } else {
                omitted.push(expected.max(count as u64));
            }
        }
        rows.release();
        Self { all, omitted }
    }
}

fn merge(upstream: usize, count: usize, rows: &impl Rows, all: &mut Vec<Server>) {
    // By what is shown of it: that is what must not be there twice.
    let mut known: HashMap<String, usize> = HashMap::with_capacity(count);
    all.reserve(count);
    for at in 0..count {
        let peer = rows.row(at);
        let shown: String = peer.server.chars().collect();
        match known.get(&shown) {
            Some(&first) => add(&mut all[first].counters, peer.counters.as_ref()),
            None => {
                known.insert(shown, all.len());
                all.push(Server::new(upstream, peer));
            }
        }
    }
}

impl Server {
    fn new(upstream: usize, peer: Peer<'_>) -> Self {
        let instance = peer.instance;
        let (service_id, node, datacenter) = match instance {
            Some(it) => (it.service_id, it.node, it.datacenter.unwrap_or_default()),
            None => Default::default(),
        };
        Self {
            upstream,
            server: peer.server.into_owned(),
            state: peer.state,
            active: peer.active,
            limit: peer.max_conns,
            weight: peer.weight,
            backup: peer.backup,
            service_id: service_id.into_owned(),
            node: node.into_owned(),
            datacenter: datacenter.into_owned(),
            counters: peer.counters,
        }
    }
}

/// Adds what Prometheus gets of it.
fn add(sum: &mut Option<Counters>, more: Option<&Counters>) {
    let Some(more) = more else { return };
    let Some(sum) = sum else {
        *sum = Some(*more);
        return;
    };
    for (sum, more) in sum.responses.iter_mut().zip(more.responses) {
        *sum = sum.saturating_add(more);
    }
    for (sum, more) in [
        (&mut sum.requests, more.requests),
        (&mut sum.sent, more.sent),
        (&mut sum.received, more.received),
        (&mut sum.fails, more.fails),
        (&mut sum.unavail, more.unavail),
        (&mut sum.header_time_total, more.header_time_total),
        (&mut sum.response_time_total, more.response_time_total),
    ] {
        *sum = sum.saturating_add(more);
    }
}
