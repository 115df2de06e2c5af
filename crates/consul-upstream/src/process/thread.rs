//! The consul thread: one for all upstreams, in the first worker alone.
//!
//! It calls no nginx function and touches no shared memory. It ends within a bound: its runtime
//! has no pool of threads for blocking calls, and dropping it drops whatever waits.

use std::convert::Infallible;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use consul_watch::backoff::Backoff;
use consul_watch::error::{Retry, printable};
use consul_watch::pool::AgentInfo;
use consul_watch::query::Parameter;
use consul_watch::resolver::Resolver;
use consul_watch::watch::follow;
use consul_watch::{Names, Pool};
use nginx_sys::{NGX_LOG_CRIT, NGX_LOG_WARN};
use tokio::sync::oneshot;
use tokio::task::{LocalSet, spawn_local};
use tokio::time::{Instant, sleep};

use super::assembly::{Assembly, Lines, Reached};
use super::clock::Moment;
use super::handoff::Handoff;
use super::plan::{Plan, WatchPlan};
use super::record::{AGENTS, Agent, ThreadRecord, brief};
use crate::{failpoint, guard};

/// What is no change of a set is told so often at most.
const NEWS: Duration = Duration::from_secs(1);

/// Without news the thread says so often that it lives.
const BEAT: Duration = Duration::from_secs(5);

/// Where watches take turns on connections, answers wait for each other this long: one by one each
/// finds a processor that has to wake and a cache that is cold, which costs several times their
/// work. Whoever waits seconds for a turn does not notice.
const LULL: Duration = Duration::from_millis(10);

/// The thread, and how to end it.
pub struct Thread {
    stop: Option<oneshot::Sender<Infallible>>,
    handle: Option<JoinHandle<()>>,
}

impl Thread {
    /// Starts following all upstreams of a configuration.
    pub fn start(plan: Plan, handoff: Arc<Handoff>) -> io::Result<Self> {
        let (stop, stopped) = oneshot::channel();
        let signals = BlockedSignals::new();
        let handle = std::thread::Builder::new()
            .name("consul".into())
            .spawn(move || run(plan, handoff, stopped))?;
        drop(signals);
        Ok(Self { stop: Some(stop), handle: Some(handle) })
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(handle) = self.handle.take() {
            // An error is a panic outside of what `run` catches; the thread has ended all the same.
            let _ = handle.join();
        }
    }
}

/// No signal is for the thread to handle: a new one inherits the mask of who makes it.
struct BlockedSignals(libc::sigset_t);

impl BlockedSignals {
    fn new() -> Self {
        // SAFETY: both sets are this function's own; the calls fill them in.
        unsafe {
            let (mut all, mut old) = (core::mem::zeroed(), core::mem::zeroed());
            libc::sigfillset(&mut all);
            libc::pthread_sigmask(libc::SIG_SETMASK, &all, &mut old);
            Self(old)
        }
    }
}

impl Drop for BlockedSignals {
    fn drop(&mut self) {
        // SAFETY: the set is that which `new` has read.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &self.0, core::ptr::null_mut()) };
    }
}

/// The thread's main function: runs until it is told to stop, whatever panics.
fn run(plan: Plan, handoff: Arc<Handoff>, mut stopped: oneshot::Receiver<Infallible>) {
    let mut backoff = Backoff::default();
    let started = Moment::now();
    loop {
        let result = catch_unwind(AssertUnwindSafe(|| {
            let warn = handoff.clone();
            let pool = Arc::new(Pool::new(plan.max_connections, move |text| {
                warn.note(NGX_LOG_WARN, format!("consul: {text}"));
            }));
            // The runtime keeps what it calls: a reference would keep the pool's connections.
            let crowd = Arc::downgrade(&pool);
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .on_thread_park(move || {
                    if crowd.upgrade().is_some_and(|pool| pool.is_crowded()) {
                        std::thread::sleep(LULL);
                    }
                })
                .build()?;
            let tasks = LocalSet::new();
            let watches = supervise(plan.clone(), pool, handoff.clone(), started);
            runtime.block_on(tasks.run_until(async {
                tokio::select! {
                    _ = &mut stopped => Ok::<(), io::Error>(()),
                    never = watches => match never {},
                }
            }))
        }));
        let text = match &result {
            Ok(Ok(())) => return,
            Ok(Err(err)) => err.to_string(),
            Err(panic) => guard::text(&**panic).to_owned(),
        };
        handoff.note(NGX_LOG_CRIT, format!("consul: the thread failed and starts again: {text}"));
        handoff.fail(itself(started));
        // Bounded by the first steps of the back-off; a thread that fails at once must not spin.
        let wait = backoff.next(Retry::BackOff).min(Duration::from_secs(1));
        if pause(wait, &mut stopped) {
            return;
        }
    }
}

/// What the thread says of itself, but for the agents.
fn itself(started: Moment) -> ThreadRecord {
    ThreadRecord { pid: std::process::id(), started, ..ThreadRecord::default() }
}

/// Waits without a runtime, and returns early, and `true`, when the thread is to end.
fn pause(wait: Duration, stopped: &mut oneshot::Receiver<Infallible>) -> bool {
    const STEP: Duration = Duration::from_millis(20);
    let mut left = wait;
    loop {
        if !matches!(stopped.try_recv(), Err(oneshot::error::TryRecvError::Empty)) {
            return true;
        }
        if left.is_zero() {
            return false;
        }
        let step = left.min(STEP);
        std::thread::sleep(step);
        left -= step;
    }
}

/// Runs all watches. One that panics is started again; the others do not notice.
async fn supervise(
    plan: Plan,
    pool: Arc<Pool>,
    handoff: Arc<Handoff>,
    started: Moment,
) -> Infallible {
    failpoint::panic("thread");
    let datacenters: Vec<Option<String>> =
        plan.watches.iter().map(|watch| datacenter(&plan, watch)).collect();
    let upstreams: Rc<[Assembly]> = plan
        .upstreams
        .into_iter()
        .enumerate()
        .map(|(number, plan)| Assembly::new(plan, &handoff.last(number), &handoff.told(number)))
        .collect();
    if let Some(store) = &plan.store {
        for number in 0..upstreams.len() {
            let (upstreams, store, handoff) = (upstreams.clone(), store.clone(), handoff.clone());
            spawn_local(async move { upstreams[number].keep_stored(&store, &handoff).await });
        }
    }
    // Before anybody is asked: clients are shared. A client that cannot be made is an error later.
    for (watch, datacenter) in plan.watches.iter().zip(datacenters) {
        if let (Some(datacenter), Ok(client)) = (datacenter, pool.client(&watch.agents)) {
            client.remember(&datacenter);
        }
    }
    let (lookup, reached) = (Resolver::system(), Reached::default());
    for watch in plan.watches {
        let watcher = Watcher {
            watch,
            upstreams: upstreams.clone(),
            pool: pool.clone(),
            lookup: lookup.clone(),
            reached: reached.clone(),
            handoff: handoff.clone(),
        };
        spawn_local(watcher.run());
    }
    news(&upstreams, &pool, &reached, &handoff, started).await
}

/// Tells what is new, once a second if there is anything, and now and then that the thread lives.
async fn news(
    upstreams: &[Assembly],
    pool: &Pool,
    reached: &Reached,
    handoff: &Handoff,
    started: Moment,
) -> Infallible {
    let mut told: Option<Vec<Agent>> = None;
    let mut beat: Option<Instant> = None;
    loop {
        let mut any = false;
        for (number, assembly) in upstreams.iter().enumerate() {
            if let Some(report) = assembly.news() {
                handoff.tell(number, report);
                any = true;
            }
        }
        let agents = agents(reached, pool);
        let is_news = told.as_ref() != Some(&agents);
        let record = is_news.then(|| ThreadRecord { agents: agents.clone(), ..itself(started) });
        if any || is_news || beat.is_none_or(|at| at.elapsed() >= BEAT) {
            told = Some(agents);
            beat = Some(Instant::now());
            handoff.beat(record);
        }
        sleep(NEWS).await;
    }
}

/// The agents in use, the first ones.
fn agents(reached: &Reached, pool: &Pool) -> Vec<Agent> {
    let one = |AgentInfo { address, version, connections }| {
        let address = address.to_string();
        let up = reached.works(&address);
        Agent { address: brief::<256>(&address), up, version, connections }
    };
    pool.agents().into_iter().take(AGENTS).map(one).collect()
}

/// In which datacenter a watch's agents were, as what is stored says. The instances of a query that
/// names a datacenter do not tell.
fn datacenter(plan: &Plan, watch: &WatchPlan) -> Option<String> {
    if watch.query.get(Parameter::Datacenter).is_some() {
        return None;
    }
    let mut lines = watch.lines.iter();
    lines.find_map(|(upstream, line)| {
        plan.upstreams.get(*upstream)?.lines.get(*line)?.datacenter.clone()
    })
}

/// One watch, for as long as the thread runs.
struct Watcher {
    watch: WatchPlan,
    upstreams: Rc<[Assembly]>,
    pool: Arc<Pool>,
    lookup: Resolver,
    reached: Reached,
    handoff: Arc<Handoff>,
}

impl Watcher {
    async fn run(self) -> Infallible {
        let mut backoff = Backoff::default();
        loop {
            let WatchPlan { agents, query, .. } = &self.watch;
            let (text, retry) = match self.pool.client(agents) {
                Err(err) => (format!("consul: {err}"), Retry::Slowly),
                Ok(client) => {
                    let mut service = client.service(query.clone());
                    let mut names = Names::new(self.lookup.clone());
                    let upstreams = self.upstreams.clone();
                    let (handoff, reached) = (self.handoff.clone(), self.reached.clone());
                    let mut sink = Lines::new(&self.watch, upstreams, handoff, reached);
                    // A task of its own, so that a panic ends it alone.
                    let task =
                        spawn_local(
                            async move { follow(&mut service, &mut names, &mut sink).await },
                        );
                    let failed = match task.await {
                        Ok(never) => match never {},
                        Err(failed) => failed,
                    };
                    let service = printable(query.service().as_bytes(), 100);
                    let text = format!(
                        "consul: the watch of service \"{service}\" failed and starts again: {failed}"
                    );
                    (text, Retry::BackOff)
                }
            };
            self.handoff.note(NGX_LOG_CRIT, text);
            sleep(backoff.next(retry)).await;
        }
    }
}
