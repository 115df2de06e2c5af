//! What is known of discovery, as it stands in shared memory: for each upstream, and for the
//! thread.
//!
//! A record is one text of bounded size (see [`super::board`]), so whoever reads it needs no
//! knowledge of how it was put together, and a field more is no new layout. What the
//! configuration says stands in it nowhere: every worker has that itself.

use std::collections::{BTreeMap, VecDeque};

use consul_status::Text;
use consul_status::model::{Cause, Health, KeptBy, Reason, Sign, Status, Sync};
use serde::{Deserialize, Serialize};

use super::clock::Moment;

/// How many changes are remembered.
pub const CHANGES: usize = 8;

/// How many addresses of a change are.
pub const FIRST: usize = 3;

/// How many instances that do not serve are told one by one.
pub const ROWS: usize = 32;

/// How many that serve with something to be said about them are.
pub const MARKS: usize = 128;

/// How many agents are told of.
pub const AGENTS: usize = 16;

/// An upstream.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Record {
    /// All lines have had an answer.
    pub answered: bool,
    /// It has servers from before its first answer.
    pub restored: bool,
    /// The last update was not applied.
    pub refused: bool,
    /// Since when it is in sync, or is not.
    pub since: Option<(bool, Moment)>,
    /// When it was followed first.
    pub begun: Moment,
    pub last_change: Option<Moment>,
    pub applied: u64,
    pub not_applied: u64,
    /// The newest first.
    pub changes: VecDeque<Change>,
    /// Of a set that was refused: how many instances of each source do not serve, and some of them.
    pub missing: Vec<(u64, u64)>,
    pub missing_rows: Vec<Row>,
    /// What the consul thread knows.
    pub report: Report,
}

/// A change of what serves.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Change {
    pub time: Moment,
    pub index: u64,
    pub added: u64,
    pub removed: u64,
    pub changed: u64,
    pub first: Vec<(u8, String)>,
}

/// What the consul thread knows of an upstream.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Report {
    pub held: u64,
    pub held_until: Option<Moment>,
    pub panic: bool,
    /// Updates of which something was held.
    pub held_updates: u64,
    pub sources: Vec<Heard>,
    pub excluded: Vec<Row>,
    /// Those of the workers before this one: since when is known of them. Nobody is shown them.
    #[serde(skip)]
    pub before: Vec<Row>,
    /// How many more instances do not serve.
    pub omitted: u64,
    pub marks: Vec<Mark>,
    /// There were more of them.
    pub more_marks: bool,
}

/// What was heard of one source.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Heard {
    /// What it asks for, in brief.
    pub key: u64,
    /// Which of its agents answered last.
    pub agent: Option<usize>,
    pub last_success: Option<Moment>,
    pub index: Option<u64>,
    pub answers: u64,
    /// There was no good answer since this.
    pub failing: Option<u8>,
    pub next_try: Option<Moment>,
    /// By [`Cause`].
    pub errors: [u64; 4],
    pub last_error: Option<(Moment, u8, String)>,
    pub registered: Option<u64>,
    pub serving: u64,
    /// By [`Reason`]; those that were never there are not in it.
    pub excluded: BTreeMap<u8, u64>,
    pub datacenter: Option<String>,
}

/// An instance that does not serve.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Row {
    /// The source's number, from 1.
    pub source: u32,
    pub id: String,
    pub node: String,
    pub address: String,
    pub reason: u8,
    pub status: u8,
    pub detail: Option<String>,
    pub since: Moment,
}

/// An instance that serves, and is not merely passing.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Mark {
    pub node: String,
    pub id: String,
    pub status: u8,
    pub kept_by: Option<u8>,
    pub ignored: Vec<String>,
}

/// The consul thread.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct ThreadRecord {
    pub pid: u32,
    pub started: Moment,
    pub restarts: u64,
    /// It panicked, and is about to start again.
    pub backoff: bool,
    pub agents: Vec<Agent>,
}

/// An agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Agent {
    pub address: String,
    pub up: bool,
    pub version: Option<String>,
    pub connections: usize,
}

/// As much of a text as is ever shown, with nothing in it that could not be.
pub fn brief<const MAX: usize>(text: &str) -> String {
    Text::<MAX>::from(text).chars().collect()
}

/// The value that stands at a place of a list of all.
pub fn at<T: Copy>(all: &[T], place: u8) -> Option<T> {
    all.get(usize::from(place)).copied()
}

/// The places of words in their lists.
pub trait Place {
    fn place(self) -> u8;
}

macro_rules! places {
    ($($type:ty),+) => {$(
        impl Place for $type {
            fn place(self) -> u8 {
                // The lists have all variants in order.
                self as u8
            }
        }
    )+};
}

places!(Cause, Health, KeptBy, Reason, Sign, Status);

impl Heard {
    /// Whether there was no good answer for too long, or somebody has to do something first.
    pub fn is_stale(&self, begun: Moment, limit: u64, now: Moment) -> bool {
        self.is_denied() || now.since(self.last_success.unwrap_or(begun)) >= limit
    }

    /// Whether Consul refuses it, or hides instances.
    pub fn is_denied(&self) -> bool {
        self.failing == Some(Cause::Denied.place())
    }
}

impl Record {
    /// How it stands to what Consul says. `limit` is how long an answer counts, in milliseconds.
    pub fn sync(&self, limit: u64, now: Moment) -> Sync {
        let Report { sources, panic, held, .. } = &self.report;
        if sources.iter().any(Heard::is_denied) {
            Sync::Denied
        } else if self.refused {
            Sync::Refused
        } else if sources.iter().any(|source| source.is_stale(self.begun, limit, now)) {
            Sync::Stale
        } else if *panic {
            Sync::Panic
        } else if *held > 0 {
            Sync::Held
        } else if self.answered {
            Sync::InSync
        } else if self.restored {
            Sync::Restored
        } else {
            Sync::Starting
        }
    }

    /// Since when it is, or is not, in sync. What is too long ago is so without anybody's doing.
    pub fn since(&self, limit: u64, now: Moment) -> Option<Moment> {
        let in_sync = self.sync(limit, now).is_in_sync();
        match self.since {
            Some((was, since)) if was == in_sync => Some(since),
            _ => {
                let last =
                    |source: &Heard| source.last_success.unwrap_or(self.begun).later_by(limit);
                let stale = self.report.sources.iter().map(last);
                stale.filter(|at| *at <= now).min().or(Some(now))
            }
        }
    }

    /// Notes since when it is as it is now; whether that is news.
    pub fn note_sync(&mut self, limit: u64, now: Moment) -> bool {
        let in_sync = self.sync(limit, now).is_in_sync();
        let since = self.since(limit, now).unwrap_or(now);
        if self.since.is_some_and(|(was, _)| was == in_sync) {
            return false;
        }
        self.since = Some((in_sync, since));
        true
    }

    /// The record as bytes of at most `room`: where there are too many, rows go first.
    pub fn encode(&mut self, room: usize) -> Option<Vec<u8>> {
        loop {
            let bytes = serde_json::to_vec(self).ok()?;
            if bytes.len() <= room {
                return Some(bytes);
            }
            let Report { excluded, omitted, marks, more_marks, .. } = &mut self.report;
            let halve = |len: usize| len / 2;
            if marks.len() > 8 {
                marks.truncate(halve(marks.len()));
                *more_marks = true;
            } else if !excluded.is_empty() {
                let left = halve(excluded.len());
                *omitted += (excluded.len() - left) as u64;
                excluded.truncate(left);
            } else if !self.missing_rows.is_empty() {
                self.missing_rows.truncate(halve(self.missing_rows.len()));
            } else if !marks.is_empty() {
                marks.clear();
                *more_marks = true;
            } else if self.changes.pop_back().is_none() {
                return None;
            }
        }
    }
}
