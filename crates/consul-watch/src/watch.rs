//! The loop that keeps a snapshot in step with Consul.
//!
//! Consul's answers cannot all be believed. A single server that restarts answers with an empty
//! or a partial list for a few hundred milliseconds (seen with 1.8.7), and the one symptom is an
//! index below those before; a kept index makes a wiped agent wait its whole time. So:
//!
//! - the first question, and the one after any error, is a consistent read that does not wait;
//! - a blocking answer with an index below the highest one applied is dropped, and a consistent
//!   read asked for; if that one's index is low as well, Consul was restored or wiped, and it is
//!   believed;
//! - the index advances only after the set was taken over.
//!
//! The rules of the index are those of Consul's documentation, "Blocking Queries".

use std::convert::Infallible;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};
use tokio::time::{Instant, sleep, sleep_until, timeout_at};

use crate::backoff::Backoff;
use crate::error::Error;
use crate::health::{Listing, Reader};
use crate::instance::Instance;
use crate::names::{Lookup, Names, Resolved};
use crate::pace::Pace;
use crate::pool::Turn;
use crate::query::Network;

/// What is news of host names alone is told at most so often.
const RENAMES: Duration = Duration::from_secs(1);

/// How long host names that are new are waited for before the others of an answer serve.
const SETTLE: Duration = Duration::from_millis(200);

/// tokio's clock knows no shorter time.
const TICK: Duration = Duration::from_millis(1);

/// A question.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    /// Now, and confirmed by the leader.
    Consistent,
    /// When something after `index` has happened, or the wait is over.
    Blocking {
        /// The index of the last answer.
        index: u64,
    },
}

/// An answer with status 200.
#[derive(Debug)]
pub struct Answer {
    /// `X-Consul-Index`.
    pub index: u64,
    /// Consul says that ACLs hide a part of it (`X-Consul-Results-Filtered-By-ACLs`).
    pub hidden: bool,
    /// The body, as it came.
    pub body: Vec<u8>,
    /// Its connection is nobody else's until the answer is judged.
    pub(crate) _turn: Option<Turn>,
}

impl Answer {
    /// An answer that nothing is hidden from.
    pub fn new(index: u64, body: impl Into<Vec<u8>>) -> Self {
        Self { index, hidden: false, body: body.into(), _turn: None }
    }
}

/// Who asks. [`crate::client::Service`] asks an agent; tests answer by themselves.
pub trait Transport {
    /// Asks, and waits for the whole answer.
    fn ask(&mut self, ask: Ask) -> impl Future<Output = Result<Answer, Error>>;

    /// Makes sure that nothing is hidden from an answer that takes instances away, on these nodes,
    /// or that has none while none was known.
    fn vouch(
        &mut self,
        answer: &Answer,
        nodes: &[&str],
    ) -> impl Future<Output = Result<(), Error>> {
        let _ = (answer, nodes);
        std::future::ready(Ok(()))
    }

    /// Returns when, after an error, asking again may be of use before its time.
    fn stirred(&mut self) -> impl Future<Output = ()> {
        std::future::pending()
    }

    /// Which of an instance's addresses is meant.
    fn network(&self) -> Network {
        Network::Lan
    }

    /// Which of the agents is asked, by its place in the settings.
    fn agent(&self) -> usize {
        0
    }
}

/// All instances of a service at one index.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// Consul's index.
    pub index: u64,
    /// The instances, in the order of node and service ID.
    pub instances: Arc<[Arc<Instance>]>,
    /// The datacenter that they are in; unknown where there are none.
    pub datacenter: Option<String>,
    /// The addresses of their host names, as far as they are known.
    pub names: Arc<Resolved>,
}

/// Who wants to know.
pub trait Sink {
    /// The instances changed, or what their names resolve to. Returns once the new set was taken
    /// over: until then the watch does not go on. With a time as the result the watch asks the
    /// leader then, and calls again, changed or not.
    fn changed(&mut self, snapshot: Arc<Snapshot>) -> impl Future<Output = Option<Instant>>;

    /// A good answer came, changed or not; it is told before the change.
    fn answered(&mut self);

    /// There was no good answer. The last set stands.
    fn failed(&mut self, error: &Error);

    /// A good answer was taken over: its index, and the agent that gave it, by its place in the
    /// settings.
    fn heard(&mut self, index: u64, agent: usize) {
        let _ = (index, agent);
    }

    /// After an error: when it is asked again at the latest.
    fn rests(&mut self, until: Instant) {
        let _ = until;
    }

    /// The instances that serve since before the first answer, by node and service ID and in that
    /// order: what takes nothing away later takes nothing away from them.
    fn before(&self) -> Vec<(String, String)> {
        Vec::new()
    }
}

/// Follows a service for ever.
pub async fn follow(
    transport: &mut impl Transport,
    names: &mut Names<impl Lookup>,
    sink: &mut impl Sink,
) -> Infallible {
    let (network, before) = (transport.network(), sink.before());
    let mut watch = Watch { reader: Reader::new(network), before, ..Watch::default() };
    let mut backoff = Backoff::default();
    let mut pace = Pace::default();
    loop {
        let ask = watch.next();
        // A consistent read is what a recheck asks for: nothing cuts it short.
        let until = watch.recheck.filter(|_| matches!(ask, Ask::Blocking { .. }));
        let asking = cut(until, transport.ask(ask));
        let Some(answer) = watch.meanwhile(asking, names, sink).await else {
            watch.index = None;
            continue;
        };
        match watch.take(ask, answer, transport, names, sink).await {
            Err(error) => {
                sink.failed(&error);
                watch.index = None;
                let rest = whole(backoff.next(error.retry()));
                sink.rests(Instant::now() + rest);
                let rest = sleep(rest);
                let stirred = transport.stirred();
                let rest = async {
                    tokio::select! { () = rest => (), () = stirred => () }
                };
                watch.meanwhile(rest, names, sink).await;
            }
            Ok(work) => {
                // After a suspicious answer there is none yet.
                if watch.index.is_some() {
                    backoff.reset();
                }
                // A shorter one is not worth a timer: what was judged so soon, and fifty times a
                // second at most, is a hundredth of a core.
                let rest = pace.next(work);
                if rest >= TICK {
                    watch.meanwhile(sleep(rest), names, sink).await;
                }
            }
        }
    }
}

/// What this thread has had of a processor. By the clock on the wall a thread that has to wait for one
/// would have worked meanwhile, and would rest for it: changes came late on a busy machine.
fn processor_time() -> Duration {
    // Both parts of a time that passes are positive.
    Duration::try_from(clock_gettime(ClockId::ThreadCPUTime)).unwrap_or_default()
}

/// A time that tokio's clock knows.
fn whole(rest: Duration) -> Duration {
    rest.max(TICK)
}

/// Waits for something, until a time if there is one.
async fn cut<T>(until: Option<Instant>, this: impl Future<Output = T>) -> Option<T> {
    match until {
        Some(until) => timeout_at(until, this).await.ok(),
        None => Some(this.await),
    }
}

/// What is known so far.
#[derive(Debug, Default)]
struct Watch {
    reader: Reader,
    /// What the sink had before the first answer.
    before: Vec<(String, String)>,
    /// The index to wait on; none after an error.
    index: Option<u64>,
    /// The highest index taken over.
    high: u64,
    /// What was taken over last.
    last: Option<Arc<Snapshot>>,
    /// When the sink wants to be called again, whatever the answer.
    recheck: Option<Instant>,
    /// When it was told of names last.
    renamed: Option<Instant>,
}

enum Verdict {
    /// An older state than the one already seen: not to be believed without asking again.
    Suspicious,
    Same,
    Changed(Listing),
}

impl Watch {
    fn next(&self) -> Ask {
        match self.index {
            None => Ask::Consistent,
            Some(index) => Ask::Blocking { index },
        }
    }

    /// Waits for `this`; what is news of host names goes on to the sink meanwhile.
    async fn meanwhile<T>(
        &mut self,
        this: impl Future<Output = T>,
        names: &mut Names<impl Lookup>,
        sink: &mut impl Sink,
    ) -> T {
        let mut this = pin!(this);
        loop {
            // Names that rotate are no reason to be busy.
            let next = self.renamed.map(|at| at + RENAMES);
            let renamed = async {
                if let Some(next) = next {
                    sleep_until(next).await;
                }
                names.changed().await;
            };
            tokio::select! {
                biased;
                value = &mut this => return value,
                () = renamed => {
                    if let Some(last) = &self.last {
                        let renamed = Snapshot { names: names.resolved(), ..(**last).clone() };
                        self.give(renamed, sink).await;
                    }
                    self.renamed = Some(Instant::now());
                }
            }
        }
    }

    /// Judges an answer and hands over what it changes; how much work that was.
    async fn take(
        &mut self,
        ask: Ask,
        answer: Result<Answer, Error>,
        transport: &mut impl Transport,
        names: &mut Names<impl Lookup>,
        sink: &mut impl Sink,
    ) -> Result<Duration, Error> {
        let answer = answer?;
        // The judging alone is work: while a set is taken over the watch waits, and costs nothing.
        let begin = processor_time();
        // An index of 0 would make the next query return at once.
        let index = answer.index.max(1);
        let verdict = self.judge(ask, index, &answer.body)?;
        let work = processor_time().saturating_sub(begin);
        match verdict {
            // The next question is a consistent one.
            Verdict::Suspicious => self.index = None,
            Verdict::Same => {
                sink.answered();
                self.advance(index);
                sink.heard(index, transport.agent());
            }
            Verdict::Changed(listing) => {
                if let Some(nodes) = self.taken_away(&listing.instances) {
                    transport.vouch(&answer, &nodes).await?;
                }
                drop(answer);
                sink.answered();
                names.want(listing.instances.iter().filter_map(|one| one.name()));
                names.settled(SETTLE).await;
                let snapshot = Snapshot {
                    index,
                    instances: listing.instances.into(),
                    datacenter: listing.datacenter,
                    names: names.resolved(),
                };
                self.give(snapshot, sink).await;
                self.advance(index);
                sink.heard(index, transport.agent());
            }
        }
        Ok(work)
    }

    async fn give(&mut self, snapshot: Snapshot, sink: &mut impl Sink) {
        let snapshot = Arc::new(snapshot);
        self.recheck = sink.changed(snapshot.clone()).await;
        self.last = Some(snapshot);
    }

    fn judge(&mut self, ask: Ask, index: u64, body: &[u8]) -> Result<Verdict, Error> {
        if index < self.high && matches!(ask, Ask::Blocking { .. }) {
            return Ok(Verdict::Suspicious);
        }
        let listing = self.reader.read(body)?;
        self.check_use(&listing.instances)?;
        Ok(match &self.last {
            // One that was not read anew is equal at a glance.
            Some(last) if *last.instances == *listing.instances && !self.is_due() => Verdict::Same,
            _ => Verdict::Changed(listing),
        })
    }

    /// An answer most of which is nonsense takes nothing away. Where nothing was there what is good
    /// of it serves.
    fn check_use(&self, instances: &[Arc<Instance>]) -> Result<(), Error> {
        let usable = |all: &[Arc<Instance>]| all.iter().filter(|one| one.address.is_ok()).count();
        let before = self.last.as_ref().map_or(self.before.len(), |last| usable(&last.instances));
        let (all, usable_now) = (instances.len(), usable(instances));
        let unusable = all - usable_now;
        if unusable * 2 > all && usable_now < before {
            return Err(Error::Unusable { unusable, all });
        }
        Ok(())
    }

    /// Whether an answer takes instances away, and on which nodes: `None` where it does not. An
    /// empty one while nothing is known counts, too.
    fn taken_away<'a>(&'a self, instances: &[Arc<Instance>]) -> Option<Vec<&'a str>> {
        let mut left = instances.iter().map(|one| one.key()).peekable();
        // Both are in the same order.
        let mut nodes: Vec<&str> = Vec::new();
        for this in self.known() {
            while left.next_if(|other| *other < this).is_some() {}
            if left.peek() != Some(&this) {
                nodes.push(this.0);
            }
        }
        nodes.dedup();
        let is_news = self.last.is_none() && instances.is_empty();
        (is_news || !nodes.is_empty()).then_some(nodes)
    }

    /// The instances that were there, by node and service ID and in that order.
    fn known(&self) -> impl Iterator<Item = (&str, &str)> {
        let (last, before): (&[Arc<Instance>], &[_]) = match &self.last {
            Some(last) => (&last.instances, &[]),
            None => (&[], &self.before),
        };
        last.iter()
            .map(|one| one.key())
            .chain(before.iter().map(|(node, id): &(String, String)| (&**node, &**id)))
    }

    /// Whether the sink is to be called again.
    fn is_due(&self) -> bool {
        self.recheck.is_some_and(|at| Instant::now() >= at)
    }

    fn advance(&mut self, index: u64) {
        self.index = Some(index);
        // Not the maximum: a consistent read with a low index is a restore or a wipe.
        self.high = index;
    }
}

#[cfg(test)]
mod tests;
