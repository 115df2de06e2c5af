//! What is to be watched, and for whom: plain data for the consul thread, so that one that has to
//! start over can.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::Path;
use std::sync::Arc;

use consul_watch::agent::Address;
use consul_watch::policy::{Overrides, Peer};
use consul_watch::state::Store;
use consul_watch::{Agents, Query, Selection, Status};
use nginx_peers::spec::Attributes;
use nginx_peers::{Label, Spec};

use crate::conf::{MainConf, Source, Upstream};
use crate::protocol::Protocol;

/// All upstreams of a configuration.
#[derive(Clone)]
pub struct Plan {
    /// In the configuration's order.
    pub upstreams: Vec<UpstreamPlan>,
    /// One watch for all lines that ask the same agents for the same thing.
    pub watches: Vec<WatchPlan>,
    /// The bound on connections to each agent.
    pub max_connections: usize,
    /// Where sets are kept for a start without Consul.
    pub store: Option<Arc<Store>>,
}

/// One upstream.
#[derive(Clone)]
pub struct UpstreamPlan {
    pub name: String,
    pub lines: Vec<Line>,
}

/// One watch.
#[derive(Clone)]
pub struct WatchPlan {
    pub agents: Agents,
    pub query: Query,
    /// The upstream's number, and the line's within it.
    pub lines: Vec<(usize, usize)>,
}

/// A `consul_upstream` line.
#[derive(Clone)]
pub struct Line {
    /// What it asks for: lines that ask for the same see the same instances.
    pub query: Query,
    /// Which of them serve.
    pub selection: Selection,
    /// What it asks for, of whom, as a text: another text is another source.
    pub key: String,
    /// The text in brief, by which its peers are known again in shared memory.
    pub source: u64,
    /// The datacenter of the peers that were restored.
    pub datacenter: Option<String>,
    attributes: Attributes,
    backup: bool,
    /// The balancing method has a use for backups.
    knows_backups: bool,
}

impl Plan {
    pub fn new<P: Protocol>(main: &MainConf<P>) -> Self {
        let mut watches: HashMap<(&Agents, &Query), Vec<(usize, usize)>> = HashMap::new();
        let mut upstreams = Vec::new();
        for (u, upstream) in main.upstreams.iter().enumerate() {
            for (l, source) in upstream.sources.iter().enumerate() {
                watches.entry((&upstream.agents, &source.query)).or_default().push((u, l));
            }
            let lines = upstream.sources.iter().map(|source| Line::new(upstream, source)).collect();
            upstreams.push(UpstreamPlan { name: upstream.name.clone(), lines });
        }
        let watches = watches
            .into_iter()
            .map(|((agents, query), lines)| WatchPlan {
                agents: agents.clone(),
                query: query.clone(),
                lines,
            })
            .collect();
        let store = |path: &Path| Store::new(path.to_owned()).with_prefix(P::STATE);
        let store = main.state_path().map(|path| Arc::new(store(path)));
        Self { upstreams, watches, max_connections: main.max_connections(), store }
    }
}

impl Line {
    fn new<P: Protocol>(upstream: &Upstream<P>, source: &Source) -> Self {
        Self {
            query: source.query.clone(),
            selection: source.selection.clone(),
            source: source_of(upstream, source),
            key: key(upstream, source),
            attributes: source.attributes,
            datacenter: None,
            backup: source.backup,
            knows_backups: upstream.knows_backups,
        }
    }

    /// An instance that should serve, as nginx's list knows it: a server for each address.
    pub fn specs(&self, peer: &Peer) -> impl Iterator<Item = Spec> {
        let Overrides { max_conns, max_fails, fail_timeout, backup, down, .. } = peer.overrides;
        let line = &self.attributes;
        let label = Label::new(&peer.node, &peer.id, self.source);
        let backup = backup.filter(|_| self.knows_backups).unwrap_or(self.backup);
        let attributes = Attributes {
            weight: peer.weight,
            max_conns: max_conns.unwrap_or(line.max_conns),
            max_fails: max_fails.unwrap_or(line.max_fails),
            fail_timeout: fail_timeout.unwrap_or(line.fail_timeout),
            down: down.unwrap_or(line.down),
        };
        let labels = std::iter::repeat_n(label, peer.addresses.len());
        labels.zip(&peer.addresses).map(move |(label, address)| Spec {
            label,
            address: *address,
            backup,
            attributes,
        })
    }

    /// The way back, for peers that were there before: so they are what they were.
    pub fn peers(&self, before: &[Spec]) -> Vec<Peer> {
        let mut peers: Vec<Peer> = Vec::new();
        // Those of one instance stand side by side.
        for spec in before.iter().filter(|spec| spec.label.source() == self.source) {
            match peers.last_mut() {
                Some(last) if last.node == spec.label.node() && last.id == spec.label.id() => {
                    last.addresses.push(spec.address);
                }
                _ => peers.push(peer(spec)),
            }
        }
        peers
    }
}

fn peer(spec: &Spec) -> Peer {
    let Attributes { weight, max_conns, max_fails, fail_timeout, down } = spec.attributes;
    Peer {
        node: spec.label.node().to_owned(),
        id: spec.label.id().to_owned(),
        addresses: vec![spec.address],
        weight,
        overrides: Overrides {
            weight: None,
            max_conns: Some(max_conns),
            max_fails: Some(max_fails),
            fail_timeout: Some(fail_timeout),
            backup: Some(spec.backup),
            down: Some(down),
        },
        ignored: Vec::new(),
        status: Status::Passing,
        kept_by: None,
    }
}

/// The number by which the peers of a line are known again in shared memory.
///
/// The same in all processes of one build of the module; another build may not know it again, and
/// then begins without the peers.
pub fn source_of<P: Protocol>(upstream: &Upstream<P>, source: &Source) -> u64 {
    let mut hasher = DefaultHasher::new();
    key(upstream, source).hash(&mut hasher);
    hasher.finish()
}

/// What a line asks for, of whom.
fn key<P: Protocol>(upstream: &Upstream<P>, source: &Source) -> String {
    let Selection { tags, health, .. } = &source.selection;
    let mut tags = tags.clone();
    tags.sort();
    let addresses: Vec<_> = upstream.agents.addresses.iter().map(Address::to_string).collect();
    format!("{} {} {tags:?} {health:?}", addresses.join(" "), source.query)
}
