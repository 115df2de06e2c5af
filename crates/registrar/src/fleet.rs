//! The containers of this host, as far as they are known, and what happens to them.
//!
//! Memory alone decides nothing: what changes a member is the engine's word in an inspection, or
//! the event of its end. An inspection that an event has overtaken does not count.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use consul_watch::backoff::Backoff;
use consul_watch::error::Retry;
use tokio::time::Instant;

use crate::container::Container;
use crate::instance::{Desired, Settings};

/// How long the first convergence waits for containers that do not answer.
const PATIENCE: Duration = Duration::from_secs(2);

const SIGKILL: i32 = 9;
const SIGTERM: i32 = 15;

/// The bit of an exit code that says that a signal was the reason.
const SIGNALLED: i64 = 128;

/// What the engine told of one container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    pub container: String,
    pub kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// It was sent a signal; which one, where the engine says so.
    Kill(Option<i32>),
    /// Its process has ended, with this code.
    Die(i64),
    Destroy,
    /// Anything that an inspection tells more about.
    Change,
}

/// An inspection that is to be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inspection {
    pub container: String,
    /// The answer counts only as long as no newer one was asked for.
    pub ticket: u64,
}

/// What an inspection brought.
#[derive(Debug)]
pub enum Found {
    Container(Box<Container>),
    /// There is no such container.
    Nothing,
    /// The engine did not say.
    Failed,
}

/// The settings that say what becomes of containers that end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rules {
    /// `-deregister on-success`: what failed is kept, in maintenance.
    pub keep_failed: bool,
    /// Whether signals matter at all.
    pub drain: bool,
    pub drain_timeout: Duration,
}

#[derive(Debug)]
pub struct Fleet {
    rules: Rules,
    members: BTreeMap<String, Member>,
    tickets: u64,
    /// What is waited for before anything is decided.
    first: First,
}

/// The containers of the first list, until each was asked for.
#[derive(Debug)]
enum First {
    NoList,
    Awaits { containers: BTreeSet<String>, until: Instant },
    Complete,
}

#[derive(Debug, Default)]
struct Member {
    /// None as long as no inspection has told.
    container: Option<Container>,
    /// The newest inspection.
    ticket: u64,
    /// An inspection has brought something, be it an error.
    answered: bool,
    retry: Option<Instant>,
    backoff: Backoff,
    drain: Option<Drain>,
    /// It ended with this code, and stays in maintenance.
    failed: Option<i64>,
}

/// A signal that should end the container was sent to it.
#[derive(Debug)]
struct Drain {
    /// Which run of the container that was; none before the first inspection.
    started: Option<String>,
    until: Instant,
    /// It still runs: it was put back.
    over: bool,
}

/// Whether a container is about to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Draining {
    No,
    Yes,
    /// It was, and has stayed longer than it might.
    Over,
}

impl Fleet {
    pub fn new(rules: Rules) -> Self {
        Self { rules, members: BTreeMap::new(), tickets: 0, first: First::NoList }
    }

    /// The engine's list: all that is in it, or is known and no longer in it, has to be inspected.
    pub fn listed(&mut self, ids: Vec<String>, now: Instant) -> Vec<Inspection> {
        if let First::NoList = self.first {
            let containers = ids.iter().cloned().collect();
            self.first = First::Awaits { containers, until: now + PATIENCE };
        }
        for id in ids {
            self.members.entry(id).or_default();
        }
        let all: Vec<String> = self.members.keys().cloned().collect();
        all.into_iter().filter_map(|id| self.inspect(&id)).collect()
    }

    /// Whether what is not here is not there: a list was taken in, and each container of it has
    /// answered, or has not for long. Those are unknown, and keep what they have.
    pub fn is_complete(&mut self, now: Instant) -> bool {
        if let First::Awaits { containers, until } = &mut self.first {
            containers.retain(|id| self.members.get(id).is_some_and(|member| !member.answered));
            if containers.is_empty() || *until <= now {
                self.first = First::Complete;
            }
        }
        matches!(self.first, First::Complete)
    }

    pub fn event(&mut self, event: &Event, now: Instant) -> Option<Inspection> {
        let id = &event.container;
        match event.kind {
            Kind::Kill(signal) => {
                self.kill(id, signal, now);
                None
            }
            Kind::Change => {
                self.members.entry(id.clone()).or_default();
                self.inspect(id)
            }
            Kind::Die(code) => {
                self.ended(id, code);
                None
            }
            Kind::Destroy => {
                self.members.remove(id);
                None
            }
        }
    }

    fn kill(&mut self, id: &str, signal: Option<i32>, now: Instant) {
        let Some(signal) = signal.filter(|_| self.rules.drain) else { return };
        let Some(member) = self.members.get_mut(id) else { return };
        let own = member.container.as_ref().map(|container| container.stop_signal);
        if [Some(SIGKILL), Some(SIGTERM), own].contains(&Some(signal)) {
            member.drain(self.rules.drain_timeout, now);
        }
    }

    /// A registrar before this one has begun to drain this run of a container.
    pub fn adopt_drain(&mut self, id: &str, now: Instant) {
        if let Some(member) = self.members.get_mut(id).filter(|member| member.drain.is_none()) {
            member.drain(self.rules.drain_timeout, now);
        }
    }

    fn ended(&mut self, id: &str, code: i64) {
        if !self.rules.keep_failed || code == 0 || code & SIGNALLED != 0 {
            self.members.remove(id);
            return;
        }
        let member = self.members.entry(id.to_owned()).or_default();
        // An inspection from before may be under way.
        self.tickets += 1;
        *member = Member {
            ticket: self.tickets,
            answered: true,
            failed: Some(code),
            ..Member::default()
        };
    }

    fn inspect(&mut self, id: &str) -> Option<Inspection> {
        let member = self.members.get_mut(id)?;
        self.tickets += 1;
        member.ticket = self.tickets;
        member.retry = None;
        Some(Inspection { container: id.to_owned(), ticket: member.ticket })
    }

    /// The answer to an inspection, and whether anything is otherwise now. What was overtaken by an
    /// event changes nothing.
    pub fn inspected(&mut self, inspection: &Inspection, found: Found, now: Instant) -> bool {
        let id = &inspection.container;
        let Some(member) = self.members.get_mut(id) else { return false };
        if member.ticket != inspection.ticket {
            return false;
        }
        member.answered = true;
        match found {
            Found::Container(container) if container.is_running() => {
                member.backoff.reset();
                if let Some(drain) = &mut member.drain {
                    let started = drain.started.get_or_insert(container.started.clone());
                    if *started != container.started {
                        member.drain = None;
                    }
                }
                let same = member.container.as_ref() == Some(&*container);
                member.container = Some(*container);
                member.failed.take().is_some() || !same
            }
            Found::Container(container) => {
                let failed = member.failed;
                let code = container.exit_code();
                self.ended(id, code);
                failed != Some(code)
            }
            Found::Nothing => self.members.remove(id).is_some(),
            Found::Failed => {
                member.retry = Some(now + member.backoff.next(Retry::BackOff));
                false
            }
        }
    }

    /// When [`Fleet::due`] has something to do.
    pub fn next_due(&self) -> Option<Instant> {
        let drains = |m: &Member| m.drain.as_ref().filter(|d| !d.over).map(|d| d.until);
        let first = match &self.first {
            First::Awaits { until, .. } => Some(*until),
            First::NoList | First::Complete => None,
        };
        self.members.values().flat_map(|m| [m.retry, drains(m)]).chain([first]).flatten().min()
    }

    /// Ends the drains that have lasted too long; the inspections that are to be made again.
    pub fn due(&mut self, now: Instant) -> Vec<Inspection> {
        let mut again = Vec::new();
        for (id, member) in &mut self.members {
            if let Some(drain) = &mut member.drain {
                drain.over = drain.over || drain.until <= now;
            }
            if member.retry.is_some_and(|retry| retry <= now) {
                again.push(id.clone());
            }
        }
        again.into_iter().filter_map(|id| self.inspect(&id)).collect()
    }

    pub fn draining(&self, id: &str) -> Draining {
        match self.members.get(id).and_then(|member| member.drain.as_ref()) {
            None => Draining::No,
            Some(drain) if drain.over => Draining::Over,
            Some(_) => Draining::Yes,
        }
    }

    pub fn container(&self, id: &str) -> Option<&Container> {
        self.members.get(id)?.container.as_ref()
    }

    /// The containers that may run, and of which nothing is known yet.
    pub fn unknown(&self) -> BTreeSet<String> {
        let unknown = |m: &Member| m.container.is_none() && m.failed.is_none();
        self.members.iter().filter(|(_, m)| unknown(m)).map(|(id, _)| id.clone()).collect()
    }

    /// The containers that ended, and are kept, with their exit codes.
    pub fn failed(&self) -> BTreeMap<String, i64> {
        self.members.iter().filter_map(|(id, m)| Some((id.clone(), m.failed?))).collect()
    }

    pub fn desired(&self, settings: &Settings) -> Desired {
        let running = self.members.values().filter_map(|member| member.container.as_ref());
        Desired::new(settings, running, |id| self.container(id))
    }
}

impl Member {
    fn drain(&mut self, timeout: Duration, now: Instant) {
        let container = self.container.as_ref();
        let own = container.map(|c| Duration::from_secs(c.stop_timeout)).unwrap_or_default();
        let until = now.checked_add(timeout.max(own)).unwrap_or(now + timeout);
        let started = container.map(|container| container.started.clone());
        self.drain = Some(Drain { started, until, over: false });
    }
}

#[cfg(test)]
mod tests;
