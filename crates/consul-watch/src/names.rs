//! Host names to addresses, for the instances that are registered with one.
//!
//! Consul's answers say when an instance changes, and nothing when a name does: names are asked
//! for again and again. What is known of a name stands until an answer with an address comes. A
//! name server that is down, or says by mistake that there is no such name, takes nothing away;
//! an instance that is gone is gone from Consul.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;
use tokio::task::{AbortHandle, Id, JoinError, JoinSet};
use tokio::time::{Instant, sleep_until, timeout};

use crate::instance::is_host;

/// Lookups at a time: a service with many names is no burst of questions.
const AT_ONCE: usize = 16;
/// A lookup that takes longer has failed.
const PATIENCE: Duration = Duration::from_secs(10);
/// A name is not asked for more often than this, whatever its TTL.
const SHORTEST: Duration = Duration::from_secs(5);
/// Nor more seldom: a TTL of days would hide a move for days.
const LONGEST: Duration = Duration::from_secs(300);
/// The wait after a failure; it doubles.
const FIRST: Duration = Duration::from_secs(5);
/// The longest wait after a failure.
const CAP: Duration = Duration::from_secs(60);
/// Each wait is longer by up to this share: names that came together do not come together for ever.
const JITTER: f64 = 0.1;
/// Addresses of one name.
pub(crate) const MOST: usize = 64;

/// The names that have addresses, and these: sorted, each once, and at most 64 of a name.
pub type Resolved = BTreeMap<String, Vec<IpAddr>>;

/// Asks for a name's addresses.
pub trait Lookup: Clone + Send + 'static {
    /// Asks once. It may take as long as it likes: it is dropped when it is no longer wanted.
    fn lookup(&self, name: String) -> impl Future<Output = Result<Found, Failure>> + Send;
}

/// The addresses of a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// In any order.
    pub addresses: Vec<IpAddr>,
    /// For how long they hold.
    pub ttl: Duration,
    /// Why there are addresses of one family alone, if the question for the other one failed:
    /// those known of the other one stand.
    pub missing: Option<Failure>,
}

/// Why there is no answer.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Failure {
    /// There is no such name, or none with an address.
    #[error("the name does not exist, or has no address")]
    Absent,
    /// No name server answered.
    #[error("no answer in time")]
    Timeout,
    /// Anything else.
    #[error("{0}")]
    Other(String),
}

/// Keeps names resolved. Lookups run as tasks of the runtime that calls, and end with this.
#[derive(Debug)]
pub struct Names<L> {
    lookup: L,
    /// The names wanted.
    names: BTreeMap<String, State>,
    /// Those that wait for their turn, the next one first.
    queue: BTreeSet<(Instant, String)>,
    /// Those that are asked for. What a task brings that is not among them is of no use.
    running: HashMap<Id, String>,
    tasks: JoinSet<Result<Found, Failure>>,
    resolved: Arc<Resolved>,
    /// `resolved` changed since somebody was told.
    news: bool,
}

/// What is known of a name besides its addresses.
#[derive(Debug)]
struct State {
    turn: Turn,
    /// There was an answer, or a failure.
    heard: bool,
    /// In a row.
    failures: u32,
    /// The last one, if it was the last thing heard.
    failure: Option<Failure>,
}

#[derive(Debug)]
enum Turn {
    /// Its place in the queue.
    Waits(Instant),
    /// It is asked for.
    Runs(AbortHandle),
}

impl<L: Lookup> Names<L> {
    /// Wants nothing yet.
    pub fn new(lookup: L) -> Self {
        Self {
            lookup,
            names: BTreeMap::new(),
            queue: BTreeSet::new(),
            running: HashMap::new(),
            tasks: JoinSet::new(),
            resolved: Arc::default(),
            news: false,
        }
    }

    /// From now on these names are wanted, and no others. New ones are asked for at once, as far
    /// as the bound allows; then [`changed`](Self::changed) or [`settled`](Self::settled) has to
    /// be awaited for anything to go on.
    pub fn want<'a>(&mut self, names: impl IntoIterator<Item = &'a str>) {
        let wanted: BTreeSet<&str> = names.into_iter().collect();
        self.names.retain(|name, state| {
            let keep = wanted.contains(name.as_str());
            if !keep {
                match &state.turn {
                    Turn::Waits(at) => {
                        self.queue.remove(&(*at, name.clone()));
                    }
                    Turn::Runs(task) => {
                        self.running.remove(&task.id());
                        task.abort();
                    }
                }
            }
            keep
        });
        // Not without a reason: others hold it, and changing it is to copy it.
        if self.resolved.keys().any(|name| !self.names.contains_key(name)) {
            Arc::make_mut(&mut self.resolved).retain(|name, _| self.names.contains_key(name));
        }
        self.news &= !self.names.is_empty();

        let now = Instant::now();
        for name in wanted {
            if !self.names.contains_key(name) {
                let turn = Turn::Waits(now);
                let state = State { turn, heard: false, failures: 0, failure: None };
                self.names.insert(name.to_owned(), state);
                self.queue.insert((now, name.to_owned()));
            }
        }
        self.start();
    }

    /// What is known of the names wanted.
    pub fn resolved(&mut self) -> Arc<Resolved> {
        self.news = false;
        self.resolved.clone()
    }

    /// The names of which the last question failed, in full or in part, and why. They may have
    /// addresses all the same.
    pub fn failing(&self) -> impl Iterator<Item = (&str, &Failure)> {
        self.names.iter().filter_map(|(name, state)| Some((name.as_str(), state.failure.as_ref()?)))
    }

    /// Returns when an answer changed what [`resolved`](Self::resolved) says; never while no name
    /// is wanted. It can be dropped at any time, and nothing is lost.
    pub async fn changed(&mut self) {
        while !self.news {
            self.step().await;
        }
        self.news = false;
    }

    /// Waits until each name wanted has had an answer or a failure, at most this long. A change
    /// meanwhile is one for [`changed`](Self::changed), too, unless `resolved` was called since.
    pub async fn settled(&mut self, at_most: Duration) {
        let all = async {
            while self.names.values().any(|state| !state.heard) {
                self.step().await;
            }
        };
        // In time or not, what is known is what there is.
        let _ = timeout(at_most, all).await;
    }

    /// Waits for a turn or an answer. Nothing is awaited after it was taken.
    async fn step(&mut self) {
        self.start();
        let next = match self.queue.first() {
            Some((at, _)) if self.running.len() < AT_ONCE => Some(*at),
            _ => None,
        };
        let turn = async {
            match next {
                Some(at) => sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            Some(ended) = self.tasks.join_next_with_id() => self.ended(ended),
            () = turn => (),
        }
        // Answers that came together are one change.
        while let Some(ended) = self.tasks.try_join_next_with_id() {
            self.ended(ended);
        }
    }

    /// Asks for the names whose time has come.
    fn start(&mut self) {
        let now = Instant::now();
        while self.running.len() < AT_ONCE && self.queue.first().is_some_and(|(at, _)| *at <= now) {
            let Some((_, name)) = self.queue.pop_first() else { return };
            let Some(state) = self.names.get_mut(&name) else { continue };
            let (lookup, asked) = (self.lookup.clone(), name.clone());
            let task = self.tasks.spawn(async move {
                timeout(PATIENCE, lookup.lookup(asked)).await.unwrap_or(Err(Failure::Timeout))
            });
            self.running.insert(task.id(), name);
            state.turn = Turn::Runs(task);
        }
    }

    fn ended(&mut self, ended: Result<(Id, Result<Found, Failure>), JoinError>) {
        let (id, answer) = match ended {
            Ok(ended) => ended,
            Err(err) => (err.id(), Err(Failure::Other("the lookup broke off".to_owned()))),
        };
        // Otherwise the name is no longer wanted, or was wanted anew.
        let Some(name) = self.running.remove(&id) else { return };
        let Some(state) = self.names.get_mut(&name) else { return };

        let mut wait = LONGEST;
        state.heard = true;
        state.failure = match answer.and_then(usable) {
            Ok(Found { addresses, ttl, missing }) => {
                wait = ttl.clamp(SHORTEST, LONGEST);
                self.news |= learn(&mut self.resolved, &name, addresses, missing.is_some());
                missing
            }
            Err(failure) => Some(failure),
        };
        if state.failure.is_some() {
            wait = wait.min(FIRST.saturating_mul(1 << state.failures.min(16)).min(CAP));
            state.failures = state.failures.saturating_add(1);
        } else {
            state.failures = 0;
        }
        let at = Instant::now() + wait.mul_f64(1.0 + JITTER * fastrand::f64());
        state.turn = Turn::Waits(at);
        self.queue.insert((at, name));
    }
}

/// An answer without an address that could be connected to is none.
fn usable(mut found: Found) -> Result<Found, Failure> {
    found.addresses.retain(|ip| is_host(*ip));
    if found.addresses.is_empty() { Err(Failure::Absent) } else { Ok(found) }
}

/// Takes over a name's addresses; of a family that an answer in part has none of, those known
/// stand. Whether that is a change.
fn learn(resolved: &mut Arc<Resolved>, name: &str, mut new: Vec<IpAddr>, in_part: bool) -> bool {
    let known = resolved.get(name);
    if in_part {
        let known = known.into_iter().flatten().copied();
        let lacks = |ip: &IpAddr| !new.iter().any(|new| new.is_ipv4() == ip.is_ipv4());
        let kept: Vec<_> = known.filter(lacks).collect();
        new.extend(kept);
    }
    new.sort_unstable();
    new.dedup();
    new.truncate(MOST);
    if known == Some(&new) {
        return false;
    }
    Arc::make_mut(resolved).insert(name.to_owned(), new);
    true
}

#[cfg(test)]
mod tests;
