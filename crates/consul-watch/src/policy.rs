//! Which instances serve, at what weight, and why the others do not.
//!
//! Pure functions of a snapshot, the line's settings and, where losses are held back
//! ([`guard`]), of what served before: what they are given decides what they say.

use std::collections::HashSet;
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;

use crate::instance::{Host, Instance, Status, Unusable};
use crate::names::Resolved;
use crate::watch::Snapshot;

pub mod guard;
pub(crate) mod meta;

pub use guard::{Guard, Key, Serving};
pub use meta::{Ignored, Overrides};

/// What an upstream asks of an instance before it serves.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selection {
    /// Tags that an instance must have, all of them.
    pub tags: Vec<String>,
    /// The worst status that still serves.
    pub health: Health,
    /// This weight instead of Consul's; an instance's own `Meta` wins over it.
    pub weight: Option<u32>,
    /// What losses are held back.
    pub guard: guard::Settings,
    /// In percent: when fewer of the registered instances are healthy, all serve; 0 is never.
    pub panic: u8,
}

/// The worst status that still serves. Maintenance never does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Health {
    /// Only passing instances.
    #[default]
    Passing,
    /// Those that warn, too.
    Warning,
    /// Critical ones as well.
    Any,
}

impl Health {
    fn worst(self) -> Status {
        match self {
            Self::Passing => Status::Passing,
            Self::Warning => Status::Warning,
            Self::Any => Status::Critical,
        }
    }
}

/// An instance that should serve.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// The node's name.
    pub node: String,
    /// The service ID.
    pub id: String,
    /// Where it listens: one address, or those that its host name has.
    pub addresses: Vec<SocketAddr>,
    /// Its weight, at least 1.
    pub weight: u32,
    /// What its `Meta` says beside the weight.
    pub overrides: Overrides,
    /// Keys of its `Meta` whose values are of no use.
    pub ignored: Vec<Ignored>,
    /// Its status.
    pub status: Status,
    /// Why it serves although its status or its absence says that it should not.
    pub kept_by: Option<KeptBy>,
}

/// What keeps an instance that Consul alone would take out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KeptBy {
    /// Its loss is held back.
    Guard,
    /// Too few are healthy.
    Panic,
}

impl Peer {
    /// By what it is known.
    pub fn key(&self) -> Key {
        (self.node.clone(), self.id.clone())
    }

    /// The same, borrowed.
    pub fn name(&self) -> (&str, &str) {
        (&self.node, &self.id)
    }
}

/// An instance that does not serve.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Excluded {
    /// By what it is known.
    pub key: Key,
    /// Why.
    pub reason: Reason,
}

/// Why an instance does not serve.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reason {
    /// It lacks a tag.
    Tag,
    /// An operator took it out.
    Maintenance,
    /// A check fails.
    Critical,
    /// A check warns.
    Warning,
    /// Its weight is 0.
    WeightZero,
    /// Another instance that serves has the same address and port.
    Duplicate,
    /// Its address or port is of no use.
    Unusable(Unusable),
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tag => "tag",
            Self::Maintenance => "maintenance",
            Self::Critical => "critical",
            Self::Warning => "warning",
            Self::WeightZero => "weight-0",
            Self::Duplicate => "duplicate",
            Self::Unusable(unusable) => return unusable.fmt(f),
        })
    }
}

/// What a snapshot alone says of all instances.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// Those that should serve, in the order they came.
    pub serve: Vec<Arc<Peer>>,
    /// The others.
    pub excluded: Vec<Excluded>,
    /// Too few are healthy: all that could serve do.
    pub panic: bool,
}

/// Judges one instance by itself.
pub fn judge(selection: &Selection, names: &Resolved, instance: &Instance) -> Result<Peer, Reason> {
    judge_at(selection, names, instance, selection.health.worst())
}

fn judge_at(
    selection: &Selection,
    names: &Resolved,
    instance: &Instance,
    worst: Status,
) -> Result<Peer, Reason> {
    if !selection.tags.iter().all(|tag| instance.tags.contains(tag)) {
        return Err(Reason::Tag);
    }
    if instance.status > worst {
        return Err(match instance.status {
            Status::Maintenance => Reason::Maintenance,
            Status::Critical => Reason::Critical,
            Status::Warning | Status::Passing => Reason::Warning,
        });
    }
    let at = instance.address.as_ref().map_err(|why| Reason::Unusable(*why))?;
    let addresses = match &at.host {
        Host::Ip(ip) => vec![SocketAddr::new(*ip, at.port)],
        Host::Name(name) => {
            let known = names.get(&**name).into_iter().flatten();
            known.map(|ip| SocketAddr::new(*ip, at.port)).collect()
        }
    };
    if addresses.is_empty() {
        return Err(Reason::Unusable(Unusable::Unresolved));
    }
    let (overrides, ignored) = Overrides::read(&instance.meta);
    // 0 takes it out of rotation, whatever else is set.
    let weight = match instance.weights.at(instance.status) {
        0 => return Err(Reason::WeightZero),
        weight => overrides.weight.or(selection.weight).unwrap_or(u32::from(weight)),
    };
    Ok(Peer {
        node: instance.node.clone(),
        id: instance.id.clone(),
        addresses,
        weight,
        overrides,
        ignored,
        status: instance.status,
        kept_by: (instance.status > selection.health.worst()).then_some(KeptBy::Panic),
    })
}

/// Judges all instances of a snapshot.
pub fn select(selection: &Selection, snapshot: &Snapshot) -> Verdict {
    let normal = select_at(selection, snapshot, selection.health.worst());
    if selection.panic == 0 {
        return normal;
    }
    // Those that a check alone keeps out are what the share is taken of: an instance without the
    // tag, or in maintenance, is none of this line's.
    let all = select_at(selection, snapshot, Status::Critical);
    if normal.serve.len() * 100 < all.serve.len() * usize::from(selection.panic) {
        return Verdict { panic: true, ..all };
    }
    normal
}

fn select_at(selection: &Selection, snapshot: &Snapshot, worst: Status) -> Verdict {
    let mut verdict = Verdict::default();
    let mut taken = HashSet::with_capacity(snapshot.instances.len());
    for instance in snapshot.instances.iter() {
        let judged = judge_at(selection, &snapshot.names, instance, worst).and_then(|mut peer| {
            // Nothing else can listen there: it is the same server, registered twice.
            peer.addresses.retain(|address| taken.insert(*address));
            if peer.addresses.is_empty() { Err(Reason::Duplicate) } else { Ok(peer) }
        });
        match judged {
            Ok(peer) => verdict.serve.push(Arc::new(peer)),
            Err(reason) => {
                let key = (instance.node.clone(), instance.id.clone());
                verdict.excluded.push(Excluded { key, reason });
            }
        }
    }
    verdict
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::instance::{Endpoint, Weights};

    fn at(host: &str, port: u16) -> Result<Endpoint, Unusable> {
        let host = match host.parse() {
            Ok(ip) => Host::Ip(ip),
            Err(_) => Host::Name(host.into()),
        };
        Ok(Endpoint { host, port })
    }

    fn judge(selection: &Selection, instance: &Instance) -> Result<Peer, Reason> {
        super::judge(selection, &Resolved::default(), instance)
    }

    fn snapshot(instances: &[Instance]) -> Snapshot {
        let instances = instances.iter().cloned().map(Arc::new).collect();
        Snapshot { instances, ..Default::default() }
    }

    fn instance(status: Status) -> Instance {
        Instance {
            node: "n1".into(),
            id: "a".into(),
            address: at("10.0.0.1", 80),
            tags: vec!["app".into(), "blue".into()],
            status,
            check: None,
            weights: Weights { passing: 5, warning: 2 },
            meta: Default::default(),
        }
    }

    #[test]
    fn the_whole_table_of_status_and_health() {
        use Status::*;
        let table = [
            (Passing, [Ok(5), Ok(5), Ok(5)]),
            (Warning, [Err(Reason::Warning), Ok(2), Ok(2)]),
            (Critical, [Err(Reason::Critical), Err(Reason::Critical), Ok(5)]),
            (Maintenance, [Err(Reason::Maintenance); 3]),
        ];
        for (status, expected) in table {
            for (health, expected) in
                [Health::Passing, Health::Warning, Health::Any].into_iter().zip(expected)
            {
                let selection = Selection { health, ..Default::default() };
                let judged = judge(&selection, &instance(status)).map(|peer| peer.weight);
                assert_eq!(judged, expected, "{status:?} under health={health:?}");
            }
        }
    }

    #[test]
    fn all_tags_must_match() {
        let with = |tags: &[&str]| {
            let tags = tags.iter().map(|t| t.to_string()).collect();
            let selection = Selection { tags, ..Default::default() };
            judge(&selection, &instance(Status::Passing)).map(|_| ())
        };
        assert_eq!(with(&[]), Ok(()));
        assert_eq!(with(&["app"]), Ok(()));
        assert_eq!(with(&["blue", "app"]), Ok(()));
        assert_eq!(with(&["app", "green"]), Err(Reason::Tag));
        assert_eq!(with(&["App"]), Err(Reason::Tag));
    }

    #[test]
    fn weight_zero_wins_over_the_lines_weight() {
        let selection =
            Selection { weight: Some(9), health: Health::Warning, ..Default::default() };
        let mut it = instance(Status::Passing);
        assert_eq!(judge(&selection, &it).unwrap().weight, 9);
        it.weights.passing = 0;
        assert_eq!(judge(&selection, &it), Err(Reason::WeightZero));
        it.status = Status::Warning;
        assert_eq!(judge(&selection, &it).unwrap().weight, 9);
    }

    #[test]
    fn an_unusable_address_says_why() {
        let mut it = instance(Status::Passing);
        it.address = Err(Unusable::NoPort);
        let reason = judge(&Selection::default(), &it).unwrap_err();
        assert_eq!(reason.to_string(), "no-port");
    }

    #[test]
    fn a_host_name_serves_at_all_its_addresses() {
        let mut it = instance(Status::Passing);
        it.address = at("web.example", 80);
        let unresolved = Reason::Unusable(Unusable::Unresolved);
        assert_eq!(judge(&Selection::default(), &it), Err(unresolved));
        assert_eq!(unresolved.to_string(), "unresolved");
        let mut names = Resolved::default();
        names.insert("web.example".into(), vec![[10, 0, 0, 1].into(), [10, 0, 0, 2].into()]);
        let peer = super::judge(&Selection::default(), &names, &it).unwrap();
        let expected: Vec<SocketAddr> =
            vec!["10.0.0.1:80".parse().unwrap(), "10.0.0.2:80".parse().unwrap()];
        assert_eq!(peer.addresses, expected);
    }

    #[test]
    fn of_two_at_one_address_the_first_serves() {
        let one = instance(Status::Passing);
        let two = Instance { id: "b".into(), ..one.clone() };
        let critical = Instance { id: "0".into(), ..instance(Status::Critical) };
        let verdict = select(&Selection::default(), &snapshot(&[critical, one, two]));
        let ids: Vec<_> = verdict.serve.iter().map(|peer| peer.id.as_str()).collect();
        assert_eq!(ids, ["a"]);
        let reasons: Vec<_> = verdict.excluded.iter().map(|it| it.reason.to_string()).collect();
        assert_eq!(reasons, ["critical", "duplicate"]);
    }

    #[test]
    fn in_a_panic_each_says_whether_it_is_kept() {
        let sick =
            Instance { id: "b".into(), address: at("10.0.0.2", 80), ..instance(Status::Critical) };
        let all = [instance(Status::Passing), sick];
        let with = |panic| {
            let selection = Selection { panic, ..Default::default() };
            let verdict = select(&selection, &snapshot(&all));
            let kept: Vec<_> = verdict.serve.iter().map(|peer| peer.kept_by).collect();
            (verdict.panic, kept)
        };
        assert_eq!(with(50), (false, vec![None]));
        assert_eq!(with(51), (true, vec![None, Some(KeptBy::Panic)]));
    }

    #[test]
    fn the_share_of_a_panic_is_one_of_those_that_could_serve() {
        let all: Vec<_> = (1..=4u8)
            .map(|n| Instance {
                id: n.to_string(),
                address: at(&format!("10.0.0.{n}"), 80),
                ..instance(if n < 4 { Status::Passing } else { Status::Critical })
            })
            .collect();
        for (panic, expected) in [(50, false), (75, false), (76, true), (100, true)] {
            let selection = Selection { panic, ..Default::default() };
            assert_eq!(select(&selection, &snapshot(&all)).panic, expected, "{panic} %");
        }
    }

    fn any_instance() -> impl Strategy<Value = Instance> {
        let status = prop_oneof![
            Just(Status::Passing),
            Just(Status::Warning),
            Just(Status::Critical),
            Just(Status::Maintenance)
        ];
        let address = prop_oneof![
            (1..20u8, 1..4u16).prop_map(|(host, port)| at(&format!("10.0.0.{host}"), port)),
            Just(Err(Unusable::NoPort))
        ];
        (status, address, any::<(u16, u16)>(), proptest::collection::vec("[ab]", 0..3)).prop_map(
            |(status, address, (passing, warning), tags)| Instance {
                status,
                address,
                tags,
                weights: Weights { passing, warning },
                ..instance(Status::Passing)
            },
        )
    }

    proptest! {
        /// A laxer `health` never takes an instance out, and what serves is always usable.
        #[test]
        fn laxer_health_serves_no_less(all in proptest::collection::vec(any_instance(), 0..20)) {
            let serve = |health| {
                select(&Selection { health, ..Default::default() }, &snapshot(&all)).serve
            };
            let (passing, warning, any) =
                (serve(Health::Passing), serve(Health::Warning), serve(Health::Any));
            let addresses = |peers: &[Arc<Peer>]| -> Vec<SocketAddr> {
                peers.iter().flat_map(|peer| peer.addresses.clone()).collect()
            };
            let within = |some: &[Arc<Peer>], more: &[Arc<Peer>]| {
                let more = addresses(more);
                addresses(some).iter().all(|address| more.contains(address))
            };
            prop_assert!(within(&passing, &warning));
            prop_assert!(within(&warning, &any));
            let unique: HashSet<_> = addresses(&any).into_iter().collect();
            prop_assert_eq!(unique.len(), addresses(&any).len());
            prop_assert!(any.iter().all(|peer| peer.weight >= 1));
            let maintained = all.iter().filter(|i| i.status == Status::Maintenance).count();
            prop_assert!(any.len() <= all.len() - maintained);
        }
    }
}
