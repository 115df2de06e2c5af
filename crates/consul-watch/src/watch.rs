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
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout_at};

use crate::backoff::Backoff;
use crate::error::Error;
use crate::health;
use crate::instance::{Instance, Unusable};
use crate::pace::Pace;

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
    /// The body, as it came.
    pub body: Vec<u8>,
}

/// Who asks. [`crate::client::Service`] asks an agent; tests answer by themselves.
pub trait Transport {
    /// Asks, and waits for the whole answer.
    fn ask(&mut self, ask: Ask) -> impl Future<Output = Result<Answer, Error>>;
}

/// All instances of a service at one index, in the order of node and service ID.
#[derive(Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Consul's index.
    pub index: u64,
    /// The instances.
    pub instances: Vec<Instance>,
}

/// Who wants to know.
pub trait Sink {
    /// The instances changed. Returns once the new set was taken over: until then the watch does
    /// not go on. With a time as the result the watch asks the leader then, and calls again,
    /// changed or not.
    fn changed(&mut self, snapshot: Arc<Snapshot>) -> impl Future<Output = Option<Instant>>;

    /// A good answer came, changed or not; it is told before the change.
    fn answered(&mut self);

    /// There was no good answer. The last set stands.
    fn failed(&mut self, error: &Error);
}

/// Follows a service for ever.
pub async fn follow(transport: &mut impl Transport, sink: &mut impl Sink) -> Infallible {
    let mut watch = Watch::default();
    let mut backoff = Backoff::default();
    let mut pace = Pace::default();
    loop {
        let ask = watch.next();
        let answer = match watch.recheck {
            Some(at) if matches!(ask, Ask::Blocking { .. }) => {
                let Ok(answer) = timeout_at(at, transport.ask(ask)).await else {
                    watch.index = None;
                    continue;
                };
                answer
            }
            // A consistent read is what a recheck asks for.
            _ => transport.ask(ask).await,
        };
        let begin = Instant::now();
        let verdict = answer.and_then(|answer| watch.judge(ask, answer));
        // The judging alone: while a set is taken over the watch waits, and costs nothing.
        let work = begin.elapsed();
        let rest = match verdict {
            Err(error) => {
                sink.failed(&error);
                watch.index = None;
                backoff.next(error.retry())
            }
            Ok(verdict) => {
                match verdict {
                    Verdict::Suspicious => (),
                    Verdict::Same { index } => {
                        sink.answered();
                        backoff.reset();
                        watch.advance(index);
                    }
                    Verdict::Changed(snapshot) => {
                        sink.answered();
                        backoff.reset();
                        watch.recheck = sink.changed(snapshot.clone()).await;
                        watch.advance(snapshot.index);
                        watch.last = Some(snapshot);
                    }
                }
                pace.next(work)
            }
        };
        if !rest.is_zero() {
            sleep(rest.max(Duration::from_millis(1))).await;
        }
    }
}

/// What is known so far.
#[derive(Debug, Default)]
struct Watch {
    /// The index to wait on; none after an error.
    index: Option<u64>,
    /// The highest index taken over.
    high: u64,
    /// What was taken over last.
    last: Option<Arc<Snapshot>>,
    /// When the sink wants to be called again, whatever the answer.
    recheck: Option<Instant>,
}

enum Verdict {
    /// An older state than the one already seen: not to be believed without asking again.
    Suspicious,
    Same {
        index: u64,
    },
    Changed(Arc<Snapshot>),
}

impl Watch {
    fn next(&self) -> Ask {
        match self.index {
            None => Ask::Consistent,
            Some(index) => Ask::Blocking { index },
        }
    }

    fn judge(&mut self, ask: Ask, answer: Answer) -> Result<Verdict, Error> {
        // An index of 0 would make the next query return at once.
        let index = answer.index.max(1);
        if index < self.high && matches!(ask, Ask::Blocking { .. }) {
            self.index = None;
            return Ok(Verdict::Suspicious);
        }
        let instances = health::parse(&answer.body)?;
        self.check_use(&instances)?;
        Ok(match &self.last {
            Some(last) if last.instances == instances && !self.is_due() => Verdict::Same { index },
            _ => Verdict::Changed(Arc::new(Snapshot { index, instances })),
        })
    }

    /// An answer most of which is nonsense takes nothing away. At a start what is good of it serves.
    fn check_use(&self, instances: &[Instance]) -> Result<(), Error> {
        let Some(last) = &self.last else { return Ok(()) };
        let usable = |all: &[Instance]| all.iter().filter(|one| one.address.is_ok()).count();
        // A host name is no nonsense, though it is not resolved.
        let nonsense = |one: &&Instance| one.address.is_err_and(|why| why != Unusable::Unresolved);
        let (all, unusable) = (instances.len(), instances.iter().filter(nonsense).count());
        if unusable * 2 > all && usable(instances) < usable(&last.instances) {
            return Err(Error::Unusable { unusable, all });
        }
        Ok(())
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
