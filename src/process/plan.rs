//! What is to be watched, and for whom: plain data for the consul thread, so that one that has to
//! start over can.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};

use consul_watch::policy::{Overrides, Peer};
use consul_watch::{Agent, Query, Selection, Status};
use nginx_peers::spec::Attributes;
use nginx_peers::{Label, Spec};

use crate::conf::{MainConf, Source, Upstream};

/// All upstreams of a configuration.
#[derive(Clone)]
pub struct Plan {
    /// In the configuration's order.
    pub upstreams: Vec<UpstreamPlan>,
    /// One watch for all lines that ask the same agent for the same thing.
    pub watches: Vec<WatchPlan>,
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
    pub agent: Agent,
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
    /// By what its peers are known again: another query is another source.
    pub source: u64,
    attributes: Attributes,
    backup: bool,
    /// The balancing method has a use for backups.
    knows_backups: bool,
}

impl Plan {
    pub fn new(main: &MainConf) -> Self {
        let mut watches: HashMap<(&Agent, &Query), Vec<(usize, usize)>> = HashMap::new();
        let mut upstreams = Vec::new();
        for (u, upstream) in main.upstreams.iter().enumerate() {
            for (l, source) in upstream.sources.iter().enumerate() {
                watches.entry((&upstream.agent, &source.query)).or_default().push((u, l));
            }
            let lines = upstream.sources.iter().map(|source| Line::new(upstream, source)).collect();
            upstreams.push(UpstreamPlan { name: upstream.name.clone(), lines });
        }
        let watches = watches
            .into_iter()
            .map(|((agent, query), lines)| WatchPlan {
                agent: agent.clone(),
                query: query.clone(),
                lines,
            })
            .collect();
        Self { upstreams, watches }
    }
}

impl Line {
    fn new(upstream: &Upstream, source: &Source) -> Self {
        Self {
            query: source.query.clone(),
            selection: source.selection.clone(),
            source: fingerprint(upstream, source),
            attributes: source.attributes,
            backup: source.backup,
            knows_backups: upstream.knows_backups,
        }
    }

    /// An instance that should serve, as nginx's list knows it.
    pub fn spec(&self, peer: Peer) -> Spec {
        let Overrides { max_conns, max_fails, fail_timeout, backup, down, .. } = peer.overrides;
        let line = &self.attributes;
        Spec {
            label: Label::new(&peer.node, &peer.id, self.source),
            address: peer.address,
            server: self.query.service().to_owned(),
            backup: backup.filter(|_| self.knows_backups).unwrap_or(self.backup),
            attributes: Attributes {
                weight: peer.weight,
                max_conns: max_conns.unwrap_or(line.max_conns),
                max_fails: max_fails.unwrap_or(line.max_fails),
                fail_timeout: fail_timeout.unwrap_or(line.fail_timeout),
                down: down.unwrap_or(line.down),
            },
        }
    }

    /// The way back, for peers that were there before: so they are what they were.
    pub fn peer(&self, spec: &Spec) -> Peer {
        let Attributes { weight, max_conns, max_fails, fail_timeout, down } = spec.attributes;
        Peer {
            node: spec.label.node().to_owned(),
            id: spec.label.id().to_owned(),
            address: spec.address,
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
        }
    }
}

/// A number for what a line asks for, of whom. The same in all processes of one build of the
/// module; another build may not know it again, and then begins without the peers.
fn fingerprint(upstream: &Upstream, source: &Source) -> u64 {
    let mut hasher = DefaultHasher::new();
    let mut tags = source.selection.tags.clone();
    tags.sort();
    upstream.agent.address.hash(&mut hasher);
    (&source.query, tags, source.selection.health).hash(&mut hasher);
    hasher.finish()
}
