//! What the status tells of a source: put together on the consul thread, where it is known.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap, HashSet};

use consul_status::model::{Cause, KeptBy, Reason, Status};
use consul_watch::error::{self, Error};
use consul_watch::instance::{Host, Instance};
use consul_watch::policy::{self, Excluded, Key, Serving, Verdict};
use consul_watch::{Selection, Snapshot, Unusable};
use nginx_peers::Label;

use super::assembly::Known;
use super::clock::Moment;
use super::record::{Heard, MARKS, Mark, Place, ROWS, Report, Row, brief};

/// How many keys of an instance's `Meta` are named.
const KEYS: usize = 4;

/// What is told of one line.
pub struct Tale {
    pub heard: Heard,
    /// Updates of which something was held.
    pub held_updates: u64,
    /// When what is held is let go.
    until: Option<Moment>,
    /// Since when instances do not serve, and why.
    out: HashMap<Key, (u8, Moment)>,
    /// Some of them, those that went last first, and how many more there are.
    rows: Vec<Row>,
    omitted: u64,
}

impl Tale {
    /// Goes on from what was told before.
    pub fn new(key: u64, told: &Report) -> Self {
        let before = told.sources.iter().find(|heard| heard.key == key).cloned();
        let heard = match before {
            None => Heard { key, ..Heard::default() },
            // A reason that was there once stays, with nobody.
            Some(heard) => Heard {
                failing: None,
                next_try: None,
                registered: None,
                excluded: heard.excluded.keys().map(|reason| (*reason, 0)).collect(),
                ..heard
            },
        };
        // Since when an instance does not serve is carried over with its row.
        let number = told.sources.iter().position(|heard| heard.key == key);
        let number = number.map_or(0, |number| number as u32 + 1);
        let rows = told.before.iter().filter(|row| row.source == number);
        let out = rows.map(|row| ((row.node.clone(), row.id.clone()), (row.reason, row.since)));
        // One count of the upstream: its first line has it.
        let is_first = told.sources.first().is_some_and(|first| first.key == key);
        Self {
            heard,
            held_updates: if is_first { told.held_updates } else { 0 },
            until: None,
            out: out.collect(),
            rows: Vec::new(),
            omitted: 0,
        }
    }

    /// Notes what became of the instances of an answer.
    pub fn judged(
        &mut self,
        selection: &Selection,
        snapshot: &Snapshot,
        verdict: &Verdict,
        serving: &Serving,
    ) {
        let now = Moment::now();
        self.until = serving.until.map(Moment::of);
        let mut before = std::mem::take(&mut self.out);
        let mut counts: BTreeMap<u8, u64> =
            self.heard.excluded.keys().map(|reason| (*reason, 0)).collect();
        let mut gone = Vec::new();
        // What is held serves.
        for Excluded { key, reason } in
            verdict.excluded.iter().filter(|excluded| !serving.held.contains(&excluded.key))
        {
            let place = reason_of(*reason).place();
            *counts.entry(place).or_default() += 1;
            let known = before.remove(key).filter(|(was, _)| *was == place);
            let (_, since) = known.unwrap_or((place, now));
            self.out.insert(key.clone(), (place, since));
            gone.push((key, *reason, since));
        }
        self.heard.excluded = counts;
        gone.sort_by_key(|(_, _, since)| Reverse(*since));
        self.omitted = gone.len().saturating_sub(ROWS) as u64;
        gone.truncate(ROWS);
        let wanted: HashSet<_> = gone.iter().map(|(key, ..)| name(key)).collect();
        let all = snapshot.instances.iter().map(|it| (it.key(), it));
        let instances: HashMap<_, _> = all.filter(|(name, _)| wanted.contains(name)).collect();
        self.rows = gone
            .iter()
            .filter_map(|(key, reason, since)| {
                Some(row(selection, instances.get(&name(key))?, *reason, *since))
            })
            .collect();
    }
}

fn name((node, id): &Key) -> (&str, &str) {
    (node, id)
}

fn row(selection: &Selection, instance: &Instance, reason: policy::Reason, since: Moment) -> Row {
    let address = match &instance.address {
        Ok(at) => match &at.host {
            Host::Ip(ip) => std::net::SocketAddr::new(*ip, at.port).to_string(),
            Host::Name(name) => format!("{name}:{}", at.port),
        },
        Err(_) => String::new(),
    };
    let missing = || selection.tags.iter().find(|tag| !instance.tags.contains(tag));
    let detail = match reason {
        policy::Reason::Tag => missing().map(|tag| brief::<32>(tag)),
        policy::Reason::Critical | policy::Reason::Warning | policy::Reason::Maintenance => {
            instance.check.as_deref().map(brief::<32>)
        }
        policy::Reason::Unusable(Unusable::Unresolved) => instance.name().map(brief::<32>),
        _ => None,
    };
    Row {
        // The number is known to whoever knows all lines.
        source: 0,
        id: brief::<88>(&instance.id),
        node: brief::<64>(&instance.node),
        address: brief::<56>(&address),
        reason: reason_of(reason).place(),
        status: status_of(instance.status).place(),
        detail,
        since,
    }
}

/// What there is to tell of an upstream with these lines.
pub fn told(lines: &[Known]) -> Report {
    let mut report = Report::default();
    for (number, known) in (1..).zip(lines) {
        let tale = &known.tale;
        report.held += known.held as u64;
        report.held_until = report.held_until.into_iter().chain(tale.until).min();
        report.panic |= known.panic;
        report.held_updates += tale.held_updates;
        report.sources.push(Heard {
            registered: known.registered.map(|registered| registered as u64),
            serving: known.peers.len() as u64,
            datacenter: known.datacenter.as_deref().map(brief::<32>),
            ..tale.heard.clone()
        });
        report.excluded.extend(tale.rows.iter().map(|row| Row { source: number, ..row.clone() }));
        report.omitted += tale.omitted;
        for peer in &known.peers {
            if peer.status == consul_watch::Status::Passing
                && peer.kept_by.is_none()
                && peer.ignored.is_empty()
            {
                continue;
            }
            if report.marks.len() == MARKS {
                report.more_marks = true;
                break;
            }
            // As it is known in nginx's list.
            let label = Label::new(&peer.node, &peer.id, known.line.source);
            report.marks.push(Mark {
                node: label.node().to_owned(),
                id: label.id().to_owned(),
                status: status_of(peer.status).place(),
                kept_by: peer.kept_by.map(|by| kept_by(by).place()),
                ignored: peer
                    .ignored
                    .iter()
                    .take(KEYS)
                    .map(|ignored| brief::<64>(&ignored.to_string()))
                    .collect(),
            });
        }
    }
    report.excluded.sort_by_key(|row| Reverse(row.since));
    report.omitted += report.excluded.len().saturating_sub(ROWS) as u64;
    report.excluded.truncate(ROWS);
    report
}

/// Notes an error.
pub fn failed(heard: &mut Heard, error: &Error) {
    let cause = match error.cause() {
        error::Cause::Transport => Cause::Transport,
        error::Cause::Status => Cause::Status,
        error::Cause::Denied => Cause::Denied,
        error::Cause::Invalid => Cause::Invalid,
    };
    let place = cause.place();
    if let Some(count) = heard.errors.get_mut(usize::from(place)) {
        *count += 1;
    }
    heard.failing = Some(place);
    heard.last_error = Some((Moment::now(), place, brief::<256>(&sentence(error))));
}

/// An error in our own words: what Consul said stays out of it.
fn sentence(error: &Error) -> String {
    match error {
        Error::At { address, error } => format!("{address}: {}", sentence(error)),
        Error::Status { status, .. } => format!("status {}", status.as_u16()),
        other => other.to_string(),
    }
}

fn reason_of(reason: policy::Reason) -> Reason {
    match reason {
        policy::Reason::Tag => Reason::Tag,
        policy::Reason::Maintenance => Reason::Maintenance,
        policy::Reason::Critical => Reason::Critical,
        policy::Reason::Warning => Reason::Warning,
        policy::Reason::WeightZero => Reason::WeightZero,
        policy::Reason::Duplicate => Reason::Duplicate,
        policy::Reason::Unusable(Unusable::InvalidAddress) => Reason::InvalidAddress,
        policy::Reason::Unusable(Unusable::Unresolved) => Reason::Unresolved,
        policy::Reason::Unusable(Unusable::NoPort) => Reason::NoPort,
        policy::Reason::Unusable(Unusable::InvalidPort) => Reason::InvalidPort,
    }
}

fn status_of(status: consul_watch::Status) -> Status {
    match status {
        consul_watch::Status::Passing => Status::Passing,
        consul_watch::Status::Warning => Status::Warning,
        consul_watch::Status::Critical => Status::Critical,
        consul_watch::Status::Maintenance => Status::Maintenance,
    }
}

fn kept_by(by: policy::KeptBy) -> KeptBy {
    match by {
        policy::KeptBy::Guard => KeptBy::Guard,
        policy::KeptBy::Panic => KeptBy::Panic,
    }
}
