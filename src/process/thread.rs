//! The consul thread: one for all upstreams, in the first worker alone.
//!
//! It calls no nginx function and touches no shared memory. It ends within a bound: its runtime
//! has no pool of threads for blocking calls, and dropping it drops whatever waits.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::convert::Infallible;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use consul_watch::agent::Address;
use consul_watch::backoff::Backoff;
use consul_watch::client::{Client, Service};
use consul_watch::error::{Error, Retry};
use consul_watch::report::Report;
use consul_watch::watch::{Sink, Snapshot, follow};
use consul_watch::{Agent, Query, Selection, policy};
use nginx_peers::spec::{Attributes, arrange};
use nginx_peers::{Label, Spec};
use nginx_sys::{NGX_LOG_CRIT, NGX_LOG_ERR, NGX_LOG_NOTICE};
use tokio::sync::oneshot;
use tokio::task::LocalSet;

use super::handoff::{Handoff, Update};
use crate::conf::{MainConf, Source};
use crate::guard;

/// The thread, and how to end it.
pub struct Thread {
    stop: Option<oneshot::Sender<Infallible>>,
    handle: Option<JoinHandle<()>>,
}

impl Thread {
    /// Starts following all upstreams of a configuration.
    pub fn start(main: &MainConf, handoff: Arc<Handoff>) -> io::Result<Self> {
        let plan = Plan::new(main);
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

/// What is to be watched, and for whom: plain data, so that a thread that has to start over can.
#[derive(Clone)]
struct Plan {
    upstreams: Vec<UpstreamPlan>,
    /// One watch for all lines that ask the same agent for the same thing.
    watches: Vec<WatchPlan>,
}

#[derive(Clone)]
struct UpstreamPlan {
    name: String,
    lines: Vec<Line>,
}

/// A `consul_upstream` line.
#[derive(Clone)]
struct Line {
    /// What it asks for: lines that ask for the same see the same instances.
    query: Query,
    selection: Selection,
    attributes: Attributes,
    backup: bool,
}

#[derive(Clone)]
struct WatchPlan {
    agent: Agent,
    query: Query,
    /// The upstream's number, and the line's within it.
    lines: Vec<(usize, usize)>,
}

impl Plan {
    fn new(main: &MainConf) -> Self {
        let mut watches: HashMap<(&Agent, &Query), Vec<(usize, usize)>> = HashMap::new();
        let mut upstreams = Vec::new();
        for (u, upstream) in main.upstreams.iter().enumerate() {
            for (l, source) in upstream.sources.iter().enumerate() {
                watches.entry((&upstream.agent, &source.query)).or_default().push((u, l));
            }
            let lines = upstream.sources.iter().map(Line::new).collect();
            upstreams.push(UpstreamPlan { name: upstream.name.clone(), lines });
        }
        let watches = watches
            .into_iter()
            .map(|((agent, query), lines)| WatchPlan {
                agent: agent.clone(),
                query: query.clone(),
                lines,
            })
            .collect();
        Self { upstreams, watches }
    }
}

impl Line {
    fn new(source: &Source) -> Self {
        Self {
            query: source.query.clone(),
            selection: source.selection.clone(),
            attributes: source.attributes,
            backup: source.backup,
        }
    }

    fn specs(&self, snapshot: &Snapshot) -> Vec<Spec> {
        policy::select(&self.selection, &snapshot.instances)
            .into_iter()
            .map(|peer| Spec {
                label: Label::new(&peer.node, &peer.id),
                address: peer.address,
                server: self.query.service().to_owned(),
                backup: self.backup,
                attributes: Attributes { weight: peer.weight, ..self.attributes },
            })
            .collect()
    }
}

/// The thread's main function: runs until it is told to stop, whatever panics.
fn run(plan: Plan, handoff: Arc<Handoff>, mut stopped: oneshot::Receiver<Infallible>) {
    let mut backoff = Backoff::default();
    loop {
        let result = catch_unwind(AssertUnwindSafe(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            let tasks = LocalSet::new();
            let watches = supervise(plan.clone(), handoff.clone());
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
        // Bounded by the first steps of the back-off; a thread that fails at once must not spin.
        let wait = backoff.next(Retry::BackOff).min(Duration::from_secs(1));
        if pause(wait, &mut stopped) {
            return;
        }
    }
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
async fn supervise(plan: Plan, handoff: Arc<Handoff>) -> Infallible {
    let upstreams: Rc<Vec<Assembly>> = Rc::new(
        plan.upstreams
            .iter()
            .enumerate()
            .map(|(number, plan)| Assembly::new(plan, handoff.last(number)))
            .collect(),
    );
    let clients = RefCell::new(HashMap::new());
    let mut tasks: Vec<_> =
        plan.watches
            .into_iter()
            .map(|watch| {
                let (upstreams, clients) = (upstreams.clone(), &clients);
                let handoff = handoff.clone();
                async move {
                    let mut backoff = Backoff::default();
                    loop {
                        let client = match client(clients, &watch.agent) {
                            Ok(client) => client,
                            Err(err) => {
                                let text = format!("consul: {}: {err}", watch.agent.address);
                                handoff.note(NGX_LOG_ERR, text);
                                tokio::time::sleep(backoff.next(Retry::Slowly)).await;
                                continue;
                            }
                        };
                        let mut service = Service { client, query: watch.query.clone() };
                        let mut sink = Lines::new(&watch, upstreams.clone(), handoff.clone());
                        let task = tokio::task::spawn_local(async move {
                            follow(&mut service, &mut sink).await
                        });
                        let failed = match task.await {
                            Ok(never) => match never {},
                            Err(failed) => failed,
                        };
                        let text = format!(
                            "consul: the watch of service \"{}\" failed and starts again: {failed}",
                            consul_watch::error::printable(watch.query.service().as_bytes(), 100)
                        );
                        handoff.note(NGX_LOG_CRIT, text);
                        tokio::time::sleep(backoff.next(Retry::BackOff)).await;
                    }
                }
            })
            .map(Box::pin)
            .collect();
    // No watch ends: polling them side by side is all there is to do.
    std::future::poll_fn(|cx| {
        for task in &mut tasks {
            if let std::task::Poll::Ready(never) = task.as_mut().poll(cx) {
                return std::task::Poll::Ready(never);
            }
        }
        std::task::Poll::Pending
    })
    .await
}

/// One client, and so one pool of connections, for each agent.
fn client(clients: &RefCell<HashMap<Agent, Client>>, agent: &Agent) -> Result<Client, Error> {
    if let Some(client) = clients.borrow().get(agent) {
        return Ok(client.clone());
    }
    let client = Client::new(agent.clone())?;
    clients.borrow_mut().insert(agent.clone(), client.clone());
    Ok(client)
}

/// The set of one upstream, put together of what its lines know.
struct Assembly {
    name: String,
    lines: Vec<Line>,
    known: RefCell<Vec<Option<Known>>>,
    /// The peers that were there before: until each line has had an answer they stay, since one
    /// that has had none says nothing against them.
    before: RefCell<Option<Arc<Vec<Spec>>>>,
}

/// What a line knows.
struct Known {
    specs: Vec<Spec>,
    registered: usize,
}

impl Assembly {
    fn new(plan: &UpstreamPlan, before: Arc<Vec<Spec>>) -> Self {
        Self {
            name: plan.name.clone(),
            lines: plan.lines.clone(),
            known: RefCell::new(plan.lines.iter().map(|_| None).collect()),
            before: RefCell::new(Some(before)),
        }
    }

    /// A line's instances changed: what the upstream's set is now.
    fn changed(&self, line: usize, snapshot: &Snapshot) -> Option<Update> {
        let known = Known {
            specs: self.lines.get(line)?.specs(snapshot),
            registered: snapshot.instances.len(),
        };
        let mut all = self.known.borrow_mut();
        *all.get_mut(line)? = Some(known);

        let complete = all.iter().all(Option::is_some);
        let mut before = self.before.borrow_mut();
        if complete {
            *before = None;
        }
        let before = before.iter().flat_map(|before| before.iter().cloned());
        let known = all.iter().flatten().flat_map(|known| known.specs.iter().cloned());
        // Each instance once, whatever the number of lines that look at it.
        let registered: HashMap<&Query, usize> = self
            .lines
            .iter()
            .zip(all.iter())
            .filter_map(|(line, known)| Some((&line.query, known.as_ref()?.registered)))
            .collect();
        Some(Update {
            specs: Arc::new(arrange(known.chain(before))),
            registered: registered.values().sum(),
            index: snapshot.index,
            complete,
        })
    }
}

/// All lines that share a watch, and what their upstreams' logs were told.
struct Lines {
    lines: Vec<(usize, usize)>,
    upstreams: Rc<Vec<Assembly>>,
    handoff: Arc<Handoff>,
    service: String,
    address: Address,
    report: Report,
}

impl Lines {
    fn new(watch: &WatchPlan, upstreams: Rc<Vec<Assembly>>, handoff: Arc<Handoff>) -> Self {
        Self {
            lines: watch.lines.clone(),
            upstreams,
            handoff,
            service: consul_watch::error::printable(watch.query.service().as_bytes(), 100),
            address: watch.agent.address.clone(),
            report: Report::default(),
        }
    }

    /// The upstreams of these lines, each once.
    fn upstreams(&self) -> impl Iterator<Item = &Assembly> {
        let mut numbers: Vec<usize> = self.lines.iter().map(|(upstream, _)| *upstream).collect();
        numbers.sort_unstable();
        numbers.dedup();
        numbers.into_iter().filter_map(|number| self.upstreams.get(number))
    }

    fn note(&self, level: u32, text: &str) {
        for upstream in self.upstreams() {
            let (name, service, address) = (&upstream.name, &self.service, &self.address);
            let text =
                format!("consul: upstream \"{name}\": service \"{service}\" at {address}: {text}");
            self.handoff.note(level, text);
        }
    }
}

impl Sink for Lines {
    async fn changed(&mut self, snapshot: Arc<Snapshot>) {
        // Of two lines of one upstream the later one's set holds the earlier one's, too.
        let mut updates = BTreeMap::new();
        for (upstream, line) in &self.lines {
            if let Some(assembly) = self.upstreams.get(*upstream)
                && let Some(update) = assembly.changed(*line, &snapshot)
            {
                updates.insert(*upstream, update);
            }
        }
        self.handoff.give(updates).await;
    }

    fn answered(&mut self) {
        if let Some(away) = self.report.answered() {
            let text = format!("answers again, after {}", Seconds(away));
            self.note(NGX_LOG_NOTICE, &text);
        }
    }

    fn failed(&mut self, error: &Error) {
        if self.report.failed(error) {
            self.note(NGX_LOG_ERR, &error.to_string());
        }
    }
}

/// A duration as a person says it.
struct Seconds(Duration);

impl std::fmt::Display for Seconds {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0.as_secs() {
            0 => write!(f, "{}ms", self.0.as_millis()),
            s @ 1..60 => write!(f, "{s}s"),
            s @ 60..3600 => write!(f, "{}m{}s", s / 60, s % 60),
            s => write!(f, "{}h{}m", s / 3600, s % 3600 / 60),
        }
    }
}
