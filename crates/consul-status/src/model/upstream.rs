//! An upstream: how it stands to Consul, and why.

use super::{
    Address, AgentAddress, Cause, Datacenter, Detail, Health, Id, Name, Node, Protocol, Reason,
    Sentence, Sign, Status, Sync, TAGS, Word,
};
use crate::text::Text;
use crate::time::Time;

/// An upstream that has at least one source.
#[derive(Clone, Debug)]
pub struct Upstream {
    /// Whether it is http's or stream's. The names of the two may be equal.
    pub protocol: Protocol,
    /// Its name.
    pub name: Name<'static>,
    /// Its zone's name.
    pub zone: Name<'static>,
    /// How it stands to what Consul says.
    pub sync: Sync,
    /// Since when it is in sync, or is not.
    pub since: Option<Time>,
    /// When an update last changed what serves.
    pub last_change: Option<Time>,
    /// Removals that are held back.
    pub held: u64,
    /// Until when.
    pub held_until: Option<Time>,
    /// All serve because too few are healthy.
    pub panic: bool,
    /// Peers that left and still have requests under way, if that is counted.
    pub zombies: Option<u64>,
    /// Sets that came, by what became of them.
    pub updates: Updates,
    /// Attempts of requests that were repaired after a change.
    pub retried_gets: u64,
    /// The zone that the peers live in.
    pub memory: Zone,
    /// How many peers there are.
    pub servers: Servers,
    /// Its `consul_upstream` lines.
    pub sources: Vec<Source>,
    /// Instances that do not serve; those that left last, where there are too many.
    pub excluded: Vec<Excluded>,
    /// How many more there are.
    pub excluded_omitted: u64,
    /// The last changes, the newest first.
    pub changes: Vec<Change>,
}

/// Sets that came, by what became of them.
#[derive(Clone, Copy, Debug, Default)]
pub struct Updates {
    /// Applied as they were.
    pub applied: u64,
    /// Removals of them were held back.
    pub held: u64,
    /// Not applied.
    pub refused: u64,
}

/// The memory of an upstream's zone.
#[derive(Clone, Copy, Debug, Default)]
pub struct Zone {
    /// Its size in bytes.
    pub size: u64,
    /// Bytes of it in use.
    pub used: u64,
    /// About how many peers still fit.
    pub fits_more: Option<u64>,
}

impl Zone {
    /// How full it is, in percent, rounded down.
    pub(crate) fn percent(&self) -> u64 {
        (u128::from(self.used) * 100).checked_div(self.size.into()).unwrap_or(0).min(100) as u64
    }
}

/// An upstream's peers by state, static servers among them.
#[derive(Clone, Copy, Debug, Default)]
pub struct Servers {
    /// Those that are picked.
    pub up: u64,
    /// Those that failed too often.
    pub unavail: u64,
    /// Those that are down or draining.
    pub down: u64,
}

impl Servers {
    /// All of them.
    pub fn total(&self) -> u64 {
        self.up + self.unavail + self.down
    }
}

/// A `consul_upstream` line.
#[derive(Clone, Debug)]
pub struct Source {
    /// Its number within the upstream, from 1.
    pub id: u32,
    /// The service.
    pub service: Word<'static>,
    /// The tags that an instance must have.
    pub tags: Vec<Word<'static>>,
    /// The datacenter that is asked, if it is not the agent's own.
    pub datacenter: Option<Datacenter<'static>>,
    /// The worst status that serves.
    pub health: Health,
    /// Consul's filter.
    pub filter: Option<Text<'static, 256>>,
    /// Its instances are backups.
    pub backup: bool,
    /// The agent that answers.
    pub address: Option<AgentAddress<'static>>,
    /// When the last answer came that was verified.
    pub last_success: Option<Time>,
    /// There was none for too long, it is denied, or the last one was not applied.
    pub stale: bool,
    /// The highest index that was applied.
    pub index: Option<u64>,
    /// Answers that were verified.
    pub answers: u64,
    /// When it is asked again after an error.
    pub next_try: Option<Time>,
    /// Errors since the zone was made.
    pub errors: Errors,
    /// Instances in the last answer.
    pub registered: Option<u64>,
    /// Those of them that serve.
    pub serving: u64,
    /// The others.
    pub excluded: Counts,
    /// The last error.
    pub last_error: Option<LastError>,
}

impl Source {
    /// Its tags with commas between them, to be shown as one.
    pub(crate) fn tag_list(&self) -> Text<'static, TAGS> {
        let tags: Vec<&[u8]> = self.tags.iter().map(Text::bytes).collect();
        tags.join(&b',').into()
    }

    /// The first of its tags, as far as they are shown, and whether there are more.
    pub(crate) fn first_tags(&self) -> (&[Word<'static>], bool) {
        let mut len = 0;
        let fit = |tag: &&Word<'static>| {
            len += tag.chars().map(char::len_utf8).sum::<usize>() + 1;
            len <= TAGS
        };
        let first = self.tags.iter().take_while(fit).count();
        (&self.tags[..first], first < self.tags.len())
    }
}

/// Errors by cause.
#[derive(Clone, Copy, Debug, Default)]
pub struct Errors {
    /// Refused, timed out, TLS.
    pub transport: u64,
    /// 4xx or 5xx.
    pub status: u64,
    /// 403, or filtered by ACLs.
    pub denied: u64,
    /// JSON, index or bounds.
    pub invalid: u64,
}

impl Errors {
    /// Those of one cause.
    pub fn of(&self, cause: Cause) -> u64 {
        match cause {
            Cause::Transport => self.transport,
            Cause::Status => self.status,
            Cause::Denied => self.denied,
            Cause::Invalid => self.invalid,
        }
    }

    /// All of them.
    pub fn total(&self) -> u64 {
        Cause::ALL.iter().fold(0, |sum, cause| sum.saturating_add(self.of(*cause)))
    }
}

/// How many instances do not serve, for each reason.
///
/// A reason that held once and does not now is remembered: a series that has begun goes on with 0.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts([Option<u64>; Reason::ALL.len()]);

impl Counts {
    /// Says that so many do not serve for this reason, now.
    pub fn set(&mut self, reason: Reason, count: u64) {
        self.0[reason as usize] = Some(count);
    }

    /// Each reason that was ever named, and how many there are now.
    pub fn iter(&self) -> impl Iterator<Item = (Reason, u64)> {
        let all = Reason::ALL.iter().zip(self.0);
        all.filter_map(|(reason, count)| Some((*reason, count?)))
    }

    /// All that do not serve.
    pub fn total(&self) -> u64 {
        self.iter().fold(0, |sum, (_, count)| sum.saturating_add(count))
    }
}

/// An error of a source.
#[derive(Clone, Debug)]
pub struct LastError {
    /// When.
    pub time: Time,
    /// Of which kind.
    pub cause: Cause,
    /// In our words: never what the other side sent.
    pub text: Sentence<'static>,
}

/// An instance that does not serve.
#[derive(Clone, Debug)]
pub struct Excluded {
    /// The number of the source.
    pub source: u32,
    /// Its service ID.
    pub service_id: Id<'static>,
    /// Its node.
    pub node: Node<'static>,
    /// Its address and port, as far as there are any.
    pub address: Address<'static>,
    /// Why.
    pub reason: Reason,
    /// How healthy it is.
    pub status: Status,
    /// What the reason is about.
    pub detail: Option<Detail<'static>>,
    /// Since when.
    pub since: Option<Time>,
}

/// An update that changed what serves.
#[derive(Clone, Debug)]
pub struct Change {
    /// When.
    pub time: Time,
    /// The index of Consul's answer.
    pub index: u64,
    /// How many began to serve.
    pub added: u64,
    /// How many ended.
    pub removed: u64,
    /// How many got other attributes.
    pub changed: u64,
    /// The first addresses of them.
    pub first: Vec<(Sign, Address<'static>)>,
}
