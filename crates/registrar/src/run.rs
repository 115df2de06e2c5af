//! The loop: it takes what is new, and starts what is to be done.
//!
//! It waits for nothing but news and the clock. Whatever asks the engine or the agent is a task of
//! its own that reports back, so that a signal to a container is acted upon at once, whatever else
//! hangs. One task at a time converges, which keeps the calls for one ID in order.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use consul_watch::backoff::Backoff;
use consul_watch::credentials::Look;
use consul_watch::error::{Retry, printable};
use futures_util::{StreamExt, stream};
use thiserror::Error as ThisError;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::{Semaphore, oneshot};
use tokio::time::{Instant, sleep, sleep_until, timeout};

use crate::consul::{self, Consul};
use crate::container::short;
use crate::converge::{Placed, Plan, Step, Wanted, Work, plan, status, stopping};
use crate::docker::{self, Address, Engine};
use crate::fleet::{Draining, Event, Fleet, Found, Inspection, Kind, Rules};
use crate::instance::Desired;
use crate::log::{Seldom, error, notice, warning};
use crate::options::{Config, Drain};
use crate::refusal::Refusals;

/// How often it is looked whether the agent still has what it should.
const LOOK: Duration = Duration::from_secs(5);

/// How often the files of the credentials are looked at.
const FILES: Duration = Duration::from_secs(1);

/// How many calls are under way at once.
const INSPECTIONS: usize = 16;
const WRITES: usize = 16;

/// How long a name server may take to say where this host is.
const RESOLVE: Duration = Duration::from_secs(2);

/// How long calls under way have at the end.
const LAST: Duration = Duration::from_millis(300);

/// A stream of events that lasted so long is a success.
const LASTING: Duration = Duration::from_secs(10);

/// Why it cannot go on.
#[derive(Debug, ThisError)]
pub enum Error {
    /// The credentials are of no use.
    #[error("{0}")]
    Settings(#[from] consul_watch::Error),
    /// The agent was not reached, as often as `-retry-attempts` allows.
    #[error("consul: {0}, gave up after {1} attempts")]
    NoConsul(consul::Error, u64),
}

/// What the tasks report.
enum News {
    /// The engine answers, events are subscribed to, and this is its host's name.
    Engine(Engine, String),
    EngineLost(docker::Error),
    Event(Event),
    Listed(Result<Vec<String>, docker::Error>),
    Inspected(Inspection, Result<Found, docker::Error>),
    /// What the host's name resolves to, where a name server said something.
    HostAddress(Option<Option<IpAddr>>),
    Converged(Result<Outcome, consul::Error>),
    Drained(String, Result<(), consul::Error>),
    Credentials,
}

/// What one convergence did.
#[derive(Default)]
struct Outcome {
    adopted: BTreeSet<String>,
    done: Vec<(String, Step)>,
    refused: Vec<(String, Step, consul::Error)>,
    /// The agent went away.
    broken: Option<consul::Error>,
}

struct Registrar {
    config: Config,
    consul: Arc<Consul>,
    news: UnboundedSender<News>,
    inspections: Arc<Semaphore>,
    engine: Option<Engine>,
    fleet: Fleet,
    desired: Desired,
    /// The desired state is no longer that of the fleet.
    stale: bool,
    refusals: Refusals,
    seldom: Seldom,
    engine_lost: Option<Instant>,
    consul_lost: Option<Instant>,
    list_backoff: Backoff,
    consul_backoff: Backoff,
    listing: bool,
    next_list: Option<Instant>,
    resolved: bool,
    /// To converge is due.
    due: bool,
    converging: bool,
    /// Not before this.
    not_before: Option<Instant>,
    next_look: Instant,
    drains: usize,
}

/// Runs until `stop` says what for it ends, or until it cannot go on.
pub async fn run(
    mut config: Config,
    address: Address,
    mut stop: oneshot::Receiver<&'static str>,
) -> Result<(), Error> {
    let consul = Arc::new(Consul::new(config.agents.clone())?);
    let first = first_contact(&consul, &config);
    tokio::select! {
        result = first => result?,
        why = &mut stop => return ended(why.unwrap_or_default()),
    }
    let (news, mut inbox) = unbounded_channel();
    tokio::spawn(look_at_files(consul.clone(), news.clone()));
    let ip_label = config.settings.ip_from_label.clone();
    tokio::spawn(read_events(address, config.hostname.take(), ip_label, news.clone()));

    let rules = Rules {
        keep_failed: config.keep_failed,
        drain: config.drain != Drain::Off,
        drain_timeout: config.drain_timeout,
    };
    let mut registrar = Registrar {
        resolved: config.settings.ip.is_some(),
        config,
        consul,
        news,
        inspections: Arc::new(Semaphore::new(INSPECTIONS)),
        engine: None,
        fleet: Fleet::new(rules),
        desired: Desired::default(),
        stale: true,
        refusals: Refusals::default(),
        seldom: Seldom::default(),
        engine_lost: None,
        consul_lost: None,
        list_backoff: Backoff::default(),
        consul_backoff: Backoff::default(),
        listing: false,
        next_list: None,
        due: false,
        converging: false,
        not_before: None,
        next_look: Instant::now() + LOOK,
        drains: 0,
    };
    loop {
        let next = registrar.next_tick();
        tokio::select! {
            why = &mut stop => {
                registrar.finish(&mut inbox).await;
                return ended(why.unwrap_or_default());
            }
            Some(news) = inbox.recv() => registrar.take(news),
            () = sleep_until(next) => registrar.tick(),
        }
        while let Ok(news) = inbox.try_recv() {
            registrar.take(news);
        }
        registrar.converge();
    }
}

fn ended(why: &str) -> Result<(), Error> {
    notice!("{why}: ends, and all stays registered");
    Ok(())
}

/// Waits for the agent as `-retry-attempts` and `-retry-interval` say. Any answer will do.
async fn first_contact(consul: &Consul, config: &Config) -> Result<(), Error> {
    let mut attempts = 0;
    loop {
        let error = match consul.ping().await {
            Ok(()) => return Ok(()),
            Err(error) if error.is_refusal() => return Ok(()),
            Err(error) => error,
        };
        attempts += 1;
        if config.retry_attempts.is_some_and(|retries| attempts > retries) {
            return Err(Error::NoConsul(error, attempts));
        }
        if attempts == 1 {
            warning!("consul: {error}, waits until it answers");
        }
        sleep(config.retry_interval).await;
    }
}

async fn look_at_files(consul: Arc<Consul>, news: UnboundedSender<News>) {
    loop {
        sleep(FILES).await;
        match consul.look() {
            Look::Same => (),
            Look::Changed => {
                notice!("takes the changed token or certificates");
                let _ = news.send(News::Credentials);
            }
            Look::Unusable(text) => warning!("{text}, the old one stays"),
        }
    }
}

/// Follows the engine's events, and connects again whenever that ends.
async fn read_events(
    address: Address,
    mut name: Option<String>,
    ip_label: Option<String>,
    news: UnboundedSender<News>,
) {
    let mut backoff = Backoff::default();
    loop {
        let began = Instant::now();
        let error = match follow(&address, &mut name, ip_label.clone(), &news).await {
            Err(error) => error,
            Ok(()) => docker::Error::Closed,
        };
        if began.elapsed() >= LASTING {
            backoff.reset();
        }
        let _ = news.send(News::EngineLost(error));
        sleep(backoff.next(Retry::BackOff)).await;
    }
}

async fn follow(
    address: &Address,
    name: &mut Option<String>,
    ip_label: Option<String>,
    news: &UnboundedSender<News>,
) -> Result<(), docker::Error> {
    let engine = Engine::connect(address, ip_label).await?;
    let name = match name {
        Some(name) => name.clone(),
        None => name.insert(engine.name().await?).clone(),
    };
    // The list that this makes the loop ask for comes after what the stream begins with.
    let mut events = engine.events();
    let _ = news.send(News::Engine(engine, name));
    while let Some(event) = events.next().await {
        if let Some(event) = event? {
            let _ = news.send(News::Event(event));
        }
    }
    Ok(())
}

impl Registrar {
    fn take(&mut self, news: News) {
        let now = Instant::now();
        match news {
            News::Engine(engine, name) => {
                match self.engine_lost.take() {
                    Some(since) => {
                        let seconds = now.duration_since(since).as_secs();
                        notice!("docker: answers again after {seconds} s");
                    }
                    None => notice!("docker: connected, the host is {}", shown(&name)),
                }
                self.engine = Some(engine);
                self.config.settings.host = name;
                self.list();
            }
            News::EngineLost(error) => {
                self.engine_lost.get_or_insert(now);
                if self.seldom.due(&format!("docker: {error}"), now) {
                    warning!("docker: {error}, what is registered stays");
                }
            }
            News::Event(event) => self.event(&event, now),
            News::Listed(list) => self.listed(list, now),
            News::Inspected(inspection, found) => {
                let found = found.unwrap_or_else(|error| {
                    if self.seldom.due(&format!("inspect: {error}"), now) {
                        let id = short(&inspection.container);
                        warning!("docker: {id}: {error}, what it has registered stays");
                    }
                    Found::Failed
                });
                if self.fleet.inspected(&inspection, found, now) {
                    self.changed();
                }
            }
            News::HostAddress(address) => {
                if let Some(address) = address
                    && self.config.settings.host_address != address
                {
                    self.config.settings.host_address = address;
                    self.changed();
                }
                self.due |= !self.resolved;
                self.resolved = true;
            }
            News::Converged(result) => self.converged(result, now),
            News::Drained(id, result) => {
                self.drains -= 1;
                match result {
                    Ok(()) => notice!("{}: is about to stop", shown(&id)),
                    // It may not be registered yet. If there is more to it, converging shows.
                    Err(error) => {
                        if self.seldom.due(&format!("drain: {error}"), now) {
                            warning!("{}: {error}", shown(&id));
                        }
                    }
                }
                self.due = true;
            }
            News::Credentials => {
                self.refusals.forget_denied();
                self.not_before = None;
                self.due = true;
            }
        }
    }

    fn changed(&mut self) {
        self.stale = true;
        self.due = true;
    }

    // ---- the engine's side

    fn event(&mut self, event: &Event, now: Instant) {
        let was = self.fleet.draining(&event.container);
        let inspection = self.fleet.event(event, now);
        if let Some(inspection) = inspection {
            // Until it is answered nothing has changed.
            self.inspect(inspection);
            return;
        }
        match event.kind {
            Kind::Kill(_) => {
                let drains = self.fleet.draining(&event.container) == Draining::Yes;
                if drains && was != Draining::Yes {
                    self.drain(&event.container);
                    self.due = true;
                }
            }
            _ => self.changed(),
        }
    }

    /// Takes the instances of a container out at once; to converge would come too late.
    fn drain(&mut self, container: &str) {
        self.refresh();
        let Some(started) = self.fleet.container(container).map(|c| c.started.clone()) else {
            return;
        };
        let of_container =
            |id: &&String| self.desired.instances[*id].registration.container() == container;
        let ids: Vec<String> =
            self.desired.instances.keys().filter(of_container).cloned().collect();
        for id in ids {
            self.drains += 1;
            let (consul, news, way) = (self.consul.clone(), self.news.clone(), self.config.drain);
            let reason = stopping(&started);
            tokio::spawn(async move {
                let result = match way {
                    Drain::Deregister => consul.deregister(&id).await,
                    Drain::Maintenance | Drain::Off => consul.maintenance(&id, Some(&reason)).await,
                };
                let _ = news.send(News::Drained(id, result));
            });
        }
    }

    fn inspect(&self, inspection: Inspection) {
        let Some(engine) = self.engine.clone() else { return };
        let (permits, news) = (self.inspections.clone(), self.news.clone());
        tokio::spawn(async move {
            let Ok(_permit) = permits.acquire_owned().await else { return };
            let found = engine.inspect(&inspection.container).await;
            let _ = news.send(News::Inspected(inspection, found));
        });
    }

    /// Asks for everything.
    fn list(&mut self) {
        let Some(engine) = self.engine.clone().filter(|_| !self.listing) else {
            // The one under way may be older than what this is about.
            self.next_list = Some(Instant::now());
            return;
        };
        self.listing = true;
        self.next_list = Some(Instant::now() + self.config.resync);
        let (news, all) = (self.news.clone(), self.config.keep_failed);
        tokio::spawn(async move {
            let _ = news.send(News::Listed(engine.list(all).await));
        });
        if self.config.settings.ip.is_none() {
            let (news, host) = (self.news.clone(), self.config.settings.host.clone());
            tokio::spawn(async move {
                let _ = news.send(News::HostAddress(resolve(&host).await));
            });
        }
    }

    fn listed(&mut self, list: Result<Vec<String>, docker::Error>, now: Instant) {
        self.listing = false;
        match list {
            Ok(ids) => {
                self.list_backoff.reset();
                for inspection in self.fleet.listed(ids, now) {
                    self.inspect(inspection);
                }
                self.changed();
            }
            Err(error) => {
                self.next_list = Some(now + self.list_backoff.next(Retry::BackOff));
                if self.seldom.due(&format!("docker: {error}"), now) {
                    warning!("docker: {error}, what is registered stays");
                }
            }
        }
    }

    // ---- Consul's side

    /// Makes the desired state that of the fleet.
    fn refresh(&mut self) {
        if !std::mem::take(&mut self.stale) {
            return;
        }
        let before = std::mem::take(&mut self.desired).complaints;
        self.desired = self.fleet.desired(&self.config.settings);
        for (container, complaints) in &self.desired.complaints {
            let old = before.get(container).map(Vec::as_slice).unwrap_or_default();
            for complaint in complaints.iter().filter(|complaint| !old.contains(complaint)) {
                let name = self.fleet.container(container).map(|c| c.name.as_str());
                warning!("{}: {}", shown(name.unwrap_or(short(container))), shown(complaint));
            }
        }
        let instances = &self.desired.instances;
        self.refusals.retain(|id| instances.contains_key(id));
    }

    fn wanted(&mut self, now: Instant) -> Wanted {
        self.refresh();
        let mut instances = BTreeMap::new();
        let mut refused = BTreeSet::new();
        for (id, instance) in &self.desired.instances {
            let container = instance.registration.container();
            let draining = self.fleet.draining(container);
            if draining == Draining::Yes && self.config.drain == Drain::Deregister {
                continue;
            }
            if self.refusals.holds(id, instance.registration.hash(), now) {
                refused.insert(id.clone());
            }
            let started = self.fleet.container(container).map(|c| c.started.clone());
            let started = started.unwrap_or_default();
            instances.insert(id.clone(), Placed { instance: instance.clone(), draining, started });
        }
        Wanted {
            owner: self.config.settings.host.clone(),
            instances,
            refused,
            unknown: self.fleet.unknown(),
            failed: self.fleet.failed(),
            cleanup: self.config.cleanup,
        }
    }

    /// Starts to converge, if that is due and possible.
    fn converge(&mut self) {
        let now = Instant::now();
        let complete = self.fleet.is_complete(now);
        let waits = self.converging || self.not_before.is_some_and(|at| at > now);
        if !self.due || waits || !self.resolved || !complete {
            return;
        }
        (self.due, self.converging, self.not_before) = (false, true, None);
        self.next_look = now + LOOK;
        let wanted = self.wanted(now);
        let (consul, news) = (self.consul.clone(), self.news.clone());
        tokio::spawn(async move {
            let _ = news.send(News::Converged(converge(&consul, &wanted).await));
        });
    }

    fn converged(&mut self, result: Result<Outcome, consul::Error>, now: Instant) {
        self.converging = false;
        let mut outcome =
            result.unwrap_or_else(|error| Outcome { broken: Some(error), ..Outcome::default() });
        for container in &outcome.adopted {
            self.fleet.adopt_drain(container, now);
            self.due = true;
        }
        for (id, step) in &outcome.done {
            if let Step::Register(..) = step {
                self.refusals.accepted(id);
            }
            tell(id, step);
        }
        for (id, step, error) in &outcome.refused {
            if let Step::Register(registration, _) = step {
                self.refusals.refused(id, registration.hash(), error, now);
            }
            if self.seldom.due(&format!("{id}: {error}"), now) {
                error!("consul: {}: {} failed: {error}", shown(id), verb(step));
            }
        }
        match outcome.broken.take() {
            None => {
                self.consul_backoff.reset();
                if let Some(since) = self.consul_lost.take() {
                    let seconds = now.duration_since(since).as_secs();
                    notice!("consul: answers again after {seconds} s");
                }
            }
            Some(error) => {
                self.consul_lost.get_or_insert(now);
                let retry = if matches!(error, consul::Error::Denied) {
                    Retry::Slowly
                } else {
                    Retry::BackOff
                };
                self.not_before = Some(now + self.consul_backoff.next(retry));
                self.due = true;
                if self.seldom.due(&format!("consul: {error}"), now) {
                    error!("consul: {error}, tries again");
                }
            }
        }
    }

    // ---- the clock

    fn next_tick(&self) -> Instant {
        let later = Instant::now() + LOOK;
        let look = (!self.converging && !self.due).then_some(self.next_look);
        let converge = self.not_before.filter(|_| self.due && !self.converging);
        let list = self.next_list.filter(|_| self.engine.is_some() && !self.listing);
        let refusal = self.refusals.next_due(Instant::now());
        let all = [look, converge, list, self.fleet.next_due(), refusal];
        all.into_iter().flatten().min().unwrap_or(later).min(later)
    }

    fn tick(&mut self) {
        let now = Instant::now();
        if self.next_list.is_some_and(|at| at <= now) && !self.listing {
            self.list();
        }
        for inspection in self.fleet.due(now) {
            self.inspect(inspection);
        }
        // Whatever was due, a drain that is over or a refusal among it: a look shows what to do.
        self.due = true;
    }

    /// Lets the calls to the agent that are under way come to their end.
    async fn finish(&mut self, inbox: &mut UnboundedReceiver<News>) {
        let until = Instant::now() + LAST;
        while self.converging || self.drains > 0 {
            match tokio::time::timeout_at(until, inbox.recv()).await {
                Ok(Some(News::Converged(_))) => self.converging = false,
                Ok(Some(News::Drained(..))) => self.drains -= 1,
                Ok(Some(_)) => (),
                Ok(None) | Err(_) => return,
            }
        }
    }
}

/// The first address of a host that is no loopback address, IPv4 before IPv6. None where nobody
/// could be asked.
async fn resolve(host: &str) -> Option<Option<IpAddr>> {
    let found = timeout(RESOLVE, tokio::net::lookup_host((host, 0))).await.ok()?.ok()?;
    let mut found: Vec<IpAddr> = found.map(|address| address.ip()).collect();
    found.retain(|ip| !ip.is_loopback() && !ip.is_unspecified());
    found.sort_by_key(IpAddr::is_ipv6);
    Some(found.first().copied())
}

/// Looks what the agent has, and makes it what it should have.
async fn converge(consul: &Consul, wanted: &Wanted) -> Result<Outcome, consul::Error> {
    let actual = consul.actual().await?;
    let Plan { first, then, adopted } = plan(wanted, &actual);
    let mut outcome = Outcome { adopted, ..Outcome::default() };
    for works in [first, then] {
        let mut works =
            stream::iter(works).map(|work| carry_out(consul, work)).buffer_unordered(WRITES);
        while let Some((id, done, failed)) = works.next().await {
            outcome.done.extend(done.into_iter().map(|step| (id.clone(), step)));
            match failed {
                None => (),
                Some((step, error)) if error.is_refusal() => {
                    outcome.refused.push((id, step, error))
                }
                Some((_, error)) => {
                    outcome.broken = Some(error);
                    return Ok(outcome);
                }
            }
        }
    }
    Ok(outcome)
}

/// The calls for one ID, up to the first that fails.
async fn carry_out(
    consul: &Consul,
    work: Work,
) -> (String, Vec<Step>, Option<(Step, consul::Error)>) {
    let mut done = Vec::new();
    for step in work.steps {
        let result = match &step {
            Step::Register(registration, health) => consul.register(registration, *health).await,
            Step::Deregister => consul.deregister(&work.id).await,
            Step::Update(health) => consul.update(&work.id, *health).await,
            Step::DropCheck(check) => consul.drop_check(check).await,
            Step::MaintenanceOn(reason) => consul.maintenance(&work.id, Some(reason)).await,
            Step::MaintenanceOff => consul.maintenance(&work.id, None).await,
        };
        match result {
            Ok(()) => done.push(step),
            Err(error) => return (work.id, done, Some((step, error))),
        }
    }
    (work.id, done, None)
}

fn verb(step: &Step) -> &'static str {
    match step {
        Step::Register(..) => "registration",
        Step::Deregister => "deregistration",
        Step::Update(_) => "update of the docker check",
        Step::DropCheck(_) => "removal of a check",
        Step::MaintenanceOn(_) | Step::MaintenanceOff => "maintenance",
    }
}

fn tell(id: &str, step: &Step) {
    let id = shown(id);
    match step {
        Step::Register(registration, _) => {
            let address = match registration.address.as_str() {
                "" => "the node's address",
                address => address,
            };
            let (name, address) = (shown(&registration.name), shown(address));
            let container = short(registration.container());
            notice!("+{id}: {name} at {address}, port {} ({container})", registration.port);
        }
        Step::Deregister => notice!("-{id}"),
        Step::Update(health) => notice!("{id}: Docker says {health:?}, {}", status(*health)),
        Step::DropCheck(check) => notice!("{id}: check {} is no longer wanted", shown(check)),
        Step::MaintenanceOn(reason) => notice!("{id}: maintenance: {}", shown(reason)),
        Step::MaintenanceOff => notice!("{id}: maintenance is over"),
    }
}

/// A text of somebody else's, in a log line.
fn shown(text: &str) -> String {
    printable(text.as_bytes(), 300)
}
