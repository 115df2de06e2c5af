//! All clients of a process: who asks the same agents in the same way shares one, and the
//! connections to each agent are bounded.
//!
//! An agent takes 200 connections from one address, and 1.8.7 closes further ones without a word
//! (`limits.http_max_conns_per_client`). A blocking query occupies one for its whole wait. Where
//! there are more watches than connections they take turns, in the order in which they came, and
//! wait no longer than it takes for each to have its turn within [`ROUND`].

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

use crate::agent::{Address, Agents};
use crate::client::Client;
use crate::error::Error;

/// Within this time every watch of an agent has had its turn, and a tenth of a second later its
/// answer.
const ROUND: Duration = Duration::from_millis(14_900);

/// A shorter wait is polling. With so many watches that this is not enough, a round is longer.
const SHORTEST: Duration = Duration::from_secs(1);

/// Who is told of what is wrong and is no query's error. The texts are fit for a log.
pub type Warn = Arc<dyn Fn(String) + Send + Sync>;

/// The clients of a process.
pub struct Pool {
    max_connections: usize,
    warn: Warn,
    shared: Mutex<Shared>,
}

#[derive(Default)]
struct Shared {
    clients: HashMap<Agents, Client>,
    limits: HashMap<Address, Arc<Limit>>,
}

impl Pool {
    /// A pool with at most so many connections to each agent.
    pub fn new(max_connections: usize, warn: impl Fn(String) + Send + Sync + 'static) -> Self {
        Self { max_connections, warn: Arc::new(warn), shared: Mutex::default() }
    }

    /// The client for these settings. It connects when it is first asked. To be called within a
    /// tokio runtime, which the client's own tasks run on.
    pub fn client(&self, agents: &Agents) -> Result<Client, Error> {
        let mut shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        let Shared { clients, limits } = &mut *shared;
        if let Some(client) = clients.get(agents) {
            return Ok(client.clone());
        }
        let limits = agents.addresses.iter().map(|address| {
            let limit = limits.entry(address.clone());
            limit.or_insert_with(|| Arc::new(Limit::new(self.max_connections))).clone()
        });
        let client = Client::new(agents.clone(), limits.collect(), self.warn.clone())?;
        clients.insert(agents.clone(), client.clone());
        Ok(client)
    }
}

/// How it stands with one agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AgentInfo {
    /// Where it listens.
    pub address: Address,
    /// Its version, as far as a token may read it.
    pub version: Option<String>,
    /// How many queries it is asked at the moment, each on a connection of its own.
    pub connections: usize,
}

impl Pool {
    /// Whether watches of some agent take turns: there are more of them than connections.
    pub fn is_crowded(&self) -> bool {
        let shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        shared.limits.values().any(|limit| limit.is_crowded())
    }

    /// The agents that are asked, in the order of their addresses.
    pub fn agents(&self) -> Vec<AgentInfo> {
        let shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        let info = |(address, limit): (&Address, &Arc<Limit>)| {
            let version = shared.clients.iter().find_map(|(agents, client)| {
                let at = agents.addresses.iter().position(|other| other == address)?;
                client.version(at)
            });
            AgentInfo { address: address.clone(), version, connections: limit.in_use() }
        };
        let mut all: Vec<_> = shared.limits.iter().map(info).collect();
        all.sort_by_key(|agent| agent.address.to_string());
        all
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool").field("max_connections", &self.max_connections).finish()
    }
}

/// The connections to one agent.
#[derive(Debug)]
pub(crate) struct Limit {
    connections: usize,
    /// Fair: who waits longest is next.
    permits: Arc<Semaphore>,
    /// How many watches ask this agent.
    watches: Arc<AtomicUsize>,
    /// Turns begin and end at multiples of their length since then.
    epoch: Instant,
}

/// One watch of an agent, until it is dropped.
#[derive(Debug)]
pub(crate) struct Member(Arc<AtomicUsize>);

impl Drop for Member {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A connection's worth of an agent, until it is dropped.
#[derive(Debug)]
pub(crate) struct Turn {
    _permit: Option<OwnedSemaphorePermit>,
}

impl Limit {
    fn new(connections: usize) -> Self {
        let permits = Arc::new(Semaphore::new(connections));
        Self { connections, permits, watches: Arc::default(), epoch: Instant::now() }
    }

    fn is_crowded(&self) -> bool {
        self.watches.load(Ordering::Relaxed) > self.connections
    }

    fn in_use(&self) -> usize {
        self.connections.saturating_sub(self.permits.available_permits())
    }

    /// Counts one more watch.
    pub(crate) fn join(&self) -> Member {
        self.watches.fetch_add(1, Ordering::Relaxed);
        Member(self.watches.clone())
    }

    /// Waits for a turn.
    pub(crate) async fn turn(&self) -> Turn {
        // There is no error: nobody closes the semaphore.
        Turn { _permit: self.permits.clone().acquire_owned().await.ok() }
    }

    /// How long a blocking query may wait so that all have their turn.
    ///
    /// The turns of all connections end together, give or take the sixteenth: answers that come
    /// one by one find a cold processor each, and cost half as much again.
    pub(crate) fn wait(&self, configured: Duration) -> Duration {
        if !self.is_crowded() {
            return configured;
        }
        let watches = self.watches.load(Ordering::Relaxed);
        // Consul adds up to a sixteenth to the last wait of a round; those before end with theirs.
        let turns = watches as f64 / self.connections as f64 + 1.0 / 16.0;
        let turn = ROUND.div_f64(turns).max(SHORTEST);
        let gone = self.epoch.elapsed().as_nanos() % turn.as_nanos();
        // Below the turn, which is some seconds.
        let left = turn - Duration::from_nanos(gone as u64);
        // A wait that is next to none goes on through the next turn.
        let wait = if left < SHORTEST / 4 { left + turn } else { left };
        wait.min(configured)
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::sleep;

    use super::*;

    const CONFIGURED: Duration = Duration::from_secs(25);

    #[tokio::test(start_paused = true)]
    async fn within_the_limit_a_query_waits_as_configured() {
        let limit = Limit::new(2);
        let two = [limit.join(), limit.join()];
        assert_eq!(limit.wait(CONFIGURED), CONFIGURED);
        let three = limit.join();
        assert!(limit.wait(CONFIGURED) < Duration::from_secs(10));
        drop(three);
        assert_eq!(limit.wait(CONFIGURED), CONFIGURED);
        drop(two);
        let many: Vec<_> = (0..1000).map(|_| limit.join()).collect();
        assert_eq!(limit.wait(CONFIGURED), SHORTEST, "{}", many.len());
    }

    #[tokio::test(start_paused = true)]
    async fn above_the_limit_all_turns_end_together() {
        let limit = Limit::new(100);
        let _members: Vec<_> = (0..1000).map(|_| limit.join()).collect();
        let (begin, turn) = (Instant::now(), limit.wait(CONFIGURED));
        assert!(turn > Duration::from_millis(1400) && turn < Duration::from_millis(1500));
        for _ in 0..50 {
            sleep(Duration::from_millis(97)).await;
            let wait = limit.wait(CONFIGURED);
            assert!(wait >= Duration::from_millis(250), "{wait:?}");
            let end = (begin.elapsed() + wait).as_nanos() % turn.as_nanos();
            assert_eq!(end, 0, "after {:?}", begin.elapsed());
        }
    }

    /// A thousand watches on a hundred connections: each has its turn in time, and never are more
    /// connections in use.
    #[tokio::test(start_paused = true)]
    async fn above_the_limit_all_take_turns() {
        let limit = Arc::new(Limit::new(100));
        let in_use = Arc::new(AtomicUsize::new(0));
        let begin = Instant::now();
        let _members: Vec<_> = (0..1000).map(|_| limit.join()).collect();
        let watches = (0..1000).map(|_| {
            let (limit, in_use) = (limit.clone(), in_use.clone());
            tokio::spawn(async move {
                let mut longest = Duration::ZERO;
                let mut last = Instant::now();
                while begin.elapsed() < Duration::from_secs(120) {
                    let _turn = limit.turn().await;
                    longest = longest.max(last.elapsed());
                    assert!(in_use.fetch_add(1, Ordering::Relaxed) < 100);
                    let wait = limit.wait(CONFIGURED);
                    sleep(wait + wait / 16).await;
                    in_use.fetch_sub(1, Ordering::Relaxed);
                    last = Instant::now();
                }
                longest
            })
        });
        let mut longest = Duration::ZERO;
        for watch in watches.collect::<Vec<_>>() {
            longest = longest.max(watch.await.unwrap());
        }
        assert!(longest <= Duration::from_secs(15), "{longest:?}");
        assert!(longest >= Duration::from_secs(10), "{longest:?}");
    }

    #[tokio::test]
    async fn a_pool_is_crowded_where_one_agent_has_more_watches_than_connections() {
        let pool = Pool::new(2, |text| panic!("{text}"));
        let service = |port: u16| {
            let address = Address::parse(&format!("http://127.0.0.1:{port}")).unwrap();
            let client = pool.client(&Agents::at(address)).unwrap();
            client.service(crate::Query::new("web").unwrap())
        };
        assert!(!pool.is_crowded(), "nobody is asked");
        let _elsewhere = [service(1), service(1)];
        let _two = [service(2), service(2)];
        assert!(!pool.is_crowded());
        let third = service(2);
        assert!(pool.is_crowded());
        drop(third);
        assert!(!pool.is_crowded());
    }

    #[tokio::test]
    async fn who_gives_up_waiting_loses_nobody_a_turn() {
        let limit = Limit::new(1);
        let turn = limit.turn().await;
        let waiting = tokio::time::timeout(Duration::from_millis(1), limit.turn()).await;
        assert!(waiting.is_err());
        drop(turn);
        limit.turn().await;
    }
}
