//! The set of an upstream, put together of what its lines know.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::convert::Infallible;
use std::fmt;
use std::net::IpAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use consul_watch::agent::Address;
use consul_watch::backoff::Backoff;
use consul_watch::error::{Error, Retry, printable};
use consul_watch::instance::Instance;
use consul_watch::policy::{self, Guard, Key, Peer};
use consul_watch::report::Report;
use consul_watch::state::{Source, State, Store};
use consul_watch::watch::{Sink, Snapshot};
use consul_watch::{Query, Selection};
use nginx_peers::spec::arrange;
use nginx_peers::{Label, Spec};
use nginx_sys::{NGX_LOG_ERR, NGX_LOG_NOTICE, NGX_LOG_WARN};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep};

use super::clock::Moment;
use super::handoff::{Handoff, Note, Update};
use super::plan::{Line, UpstreamPlan, WatchPlan};
use super::record::{Heard, Report as Told};
use super::tale::{Tale, told};

/// A set is stored at most this often; after a failure it is tried again less and less often: a
/// thousand upstreams and a directory that is missing are no reason to be busy.
const STORE: Duration = Duration::from_secs(1);

/// The same complaint is not logged again within this time.
const REPEAT: Duration = Duration::from_secs(60);

/// One upstream.
pub struct Assembly {
    name: String,
    lines: RefCell<Vec<Known>>,
    /// There is something new to store.
    news: Notify,
    /// Something happened that was not told yet.
    untold: Cell<bool>,
}

/// A line, and what it knows.
pub struct Known {
    pub line: Line,
    guard: Guard,
    /// What the status tells of it.
    pub tale: Tale,
    /// What serves. Until the line has had an answer these are the peers that were there before:
    /// that it has had none says nothing against them.
    pub peers: Vec<Arc<Peer>>,
    /// Where instances were before, as long as their host names have not been resolved since.
    before: BTreeMap<Key, Vec<IpAddr>>,
    /// The datacenter that they are in, where an answer said so.
    pub datacenter: Option<String>,
    /// How many instances Consul has registered; none before the first answer.
    pub registered: Option<usize>,
    /// How many serve only because they are held.
    pub held: usize,
    /// All serve, because too few are healthy.
    pub panic: bool,
    /// Those that an operator has put into maintenance.
    maintenance: Vec<Key>,
}

/// What a snapshot made of a line.
struct Judged {
    update: Update,
    /// When to ask Consul again.
    until: Option<Instant>,
    /// What is worth a line in the log beside the change itself.
    notes: Vec<Note>,
}

impl Assembly {
    /// An upstream that has the peers `before`, and of which so much was told.
    pub fn new(plan: UpstreamPlan, before: &[Spec], told: &Told) -> Self {
        let lines = plan.lines.into_iter().map(|line| Known::new(line, before, told)).collect();
        Self {
            name: plan.name,
            lines: RefCell::new(lines),
            news: Notify::new(),
            untold: Cell::new(true),
        }
    }

    /// What is to be told, if anything is new.
    pub fn news(&self) -> Option<Told> {
        self.untold.take().then(|| told(&self.lines.borrow()))
    }

    /// Notes of one line what is no change.
    fn note(&self, line: usize, note: impl FnOnce(&mut Heard)) {
        if let Some(known) = self.lines.borrow_mut().get_mut(line) {
            note(&mut known.tale.heard);
            self.untold.set(true);
        }
    }

    /// A line's instances changed: what the upstream's set is now.
    fn changed(&self, line: usize, snapshot: &Snapshot) -> Option<Judged> {
        let mut lines = self.lines.borrow_mut();
        let (until, notes) = lines.get_mut(line)?.judge(snapshot);
        self.untold.set(true);
        // Each instance once, whatever the number of lines that look at it.
        let registered: HashMap<&Query, usize> =
            lines.iter().filter_map(|known| Some((&known.line.query, known.registered?))).collect();
        let update = Update {
            specs: Arc::new(arrange(lines.iter().flat_map(Known::specs))),
            registered: registered.values().sum(),
            index: snapshot.index,
            complete: lines.iter().all(|known| known.registered.is_some()),
            draining: Arc::new(lines.iter().flat_map(Known::draining).collect()),
        };
        Some(Judged { update, until, notes })
    }

    /// The instances that serve by a line.
    fn serving(&self, line: usize) -> Vec<Key> {
        let lines = self.lines.borrow();
        let peers = lines.get(line).into_iter().flat_map(|known| &known.peers);
        peers.filter(|peer| is_whole(&peer.node)).map(|peer| peer.key()).collect()
    }

    /// What to begin with where Consul is away.
    fn state(&self) -> State {
        let lines = self.lines.borrow();
        let known =
            lines.iter().filter(|known| known.registered.is_some() || !known.peers.is_empty());
        let sources = known.map(|known| Source {
            key: known.line.key.clone(),
            datacenter: known.datacenter.clone(),
            peers: known.peers.clone(),
        });
        State { sources: sources.collect() }
    }

    /// Stores what serves, a while after each change.
    pub async fn keep_stored(&self, store: &Store, handoff: &Handoff) -> Infallible {
        let mut complained: Option<Instant> = None;
        let mut backoff = Backoff::default();
        loop {
            self.news.notified().await;
            if handoff.is_exiting() {
                // The file is the next generation's, which may ask for something else.
                continue;
            }
            let mut rest = STORE;
            match store.save(&self.name, &self.state()) {
                Ok(_) => {
                    complained = None;
                    backoff.reset();
                }
                Err(err) => {
                    rest += backoff.next(Retry::BackOff);
                    let now = Instant::now();
                    if complained.is_none_or(|at| now - at >= REPEAT) {
                        complained = Some(now);
                        let name = &self.name;
                        handoff.note(NGX_LOG_WARN, format!("consul: upstream \"{name}\": {err}"));
                    }
                    // What is not stored now is when there is room again.
                    self.news.notify_one();
                }
            }
            sleep(rest).await;
        }
    }
}

impl Known {
    fn new(mut line: Line, before: &[Spec], told: &Told) -> Self {
        let peers: Vec<_> = line.peers(before).into_iter().map(Arc::new).collect();
        let mut guard = line.selection.guard();
        guard.restore(peers.iter().cloned());
        let ips = |peer: &Arc<Peer>| peer.addresses.iter().map(|address| address.ip()).collect();
        let before = peers.iter().map(|peer| (peer.key(), ips(peer))).collect();
        let datacenter = line.datacenter.take();
        let tale = Tale::new(line.source, told);
        Self {
            line,
            guard,
            tale,
            peers,
            before,
            datacenter,
            registered: None,
            held: 0,
            panic: false,
            maintenance: Vec::new(),
        }
    }

    /// Those in maintenance, as they are known in nginx's list.
    fn draining(&self) -> impl Iterator<Item = Label> {
        self.maintenance.iter().map(|(node, id)| Label::new(node, id, self.line.source))
    }

    fn specs(&self) -> impl Iterator<Item = Spec> {
        self.peers.iter().flat_map(|peer| self.line.specs(peer))
    }

    /// The snapshot with the addresses from before for names that could not be resolved yet: name
    /// servers that are away take nothing from new workers either.
    fn with_names_from_before(&mut self, snapshot: &Snapshot) -> Snapshot {
        let (mut names, mut before) = (snapshot.names.clone(), std::mem::take(&mut self.before));
        if !before.is_empty() {
            for instance in snapshot.instances.iter() {
                if let Some(name) = instance.name()
                    && !snapshot.names.contains_key(name)
                    && let Some((key, ips)) = before.remove_entry(&key(instance))
                {
                    let names = Arc::make_mut(&mut names);
                    names.entry(name.to_owned()).or_insert_with(|| ips.clone());
                    self.before.insert(key, ips);
                }
            }
        }
        Snapshot { names, ..snapshot.clone() }
    }

    /// What the instances mean for this line; when to ask again, and what to tell of it.
    fn judge(&mut self, snapshot: &Snapshot) -> (Option<Instant>, Vec<Note>) {
        let snapshot = &self.with_names_from_before(snapshot);
        let verdict = policy::select(&self.line.selection, snapshot);
        if let (Some(is), Some(was)) = (&snapshot.datacenter, &self.datacenter)
            && is != was
        {
            // What was restored is another datacenter's: its going is no loss.
            self.guard = self.line.selection.guard();
        }
        if snapshot.datacenter.is_some() {
            self.datacenter = snapshot.datacenter.clone();
        }
        let serving = self.guard.judge(&verdict, Instant::now());
        let was_held = std::mem::replace(&mut self.held, serving.held.len());
        let panicked = std::mem::replace(&mut self.panic, verdict.panic);
        let served = serving.peers.len();
        self.tale.judged(&self.line.selection, snapshot, &verdict, &serving);
        if was_held == 0 && self.held > 0 {
            self.tale.held_updates += 1;
        }
        let excluded = verdict.excluded.iter();
        let in_maintenance = excluded.filter(|it| it.reason == policy::Reason::Maintenance);
        self.maintenance = in_maintenance.map(|it| it.key.clone()).collect();
        self.peers = serving.peers;
        self.registered = Some(snapshot.instances.len());

        let Selection { guard, panic, .. } = &self.line.selection;
        let hold = Seconds(guard.hold);
        let mut notes = Vec::new();
        let mut note = |level, text| notes.push(Note { level, text });
        match (was_held, self.held) {
            (0, 0) => (),
            (0, held) => {
                let names = Names(&serving.held);
                note(
                    NGX_LOG_WARN,
                    format!(
                        "Consul takes {held} of {served} instances out ({names}), they are held \
                         for {hold}"
                    ),
                );
            }
            (_, 0) if serving.honoured => note(
                NGX_LOG_WARN,
                format!("Consul still says so after {hold}: {was_held} instances are let go"),
            ),
            (_, 0) => note(NGX_LOG_NOTICE, "nothing is held any longer".into()),
            _ => (),
        }
        match (panicked, self.panic) {
            (false, true) => note(
                NGX_LOG_WARN,
                format!("fewer than {panic}% of the instances are healthy, all of them serve"),
            ),
            (true, false) => note(NGX_LOG_NOTICE, "enough instances are healthy again".into()),
            _ => (),
        }
        (serving.until, notes)
    }
}

fn key(instance: &Instance) -> Key {
    (instance.node.clone(), instance.id.clone())
}

/// Whether the last exchange with each agent worked, whoever's it was.
#[derive(Clone, Debug, Default)]
pub struct Reached(Rc<RefCell<HashMap<String, bool>>>);

impl Reached {
    fn note(&self, agent: &str, works: bool) {
        let mut all = self.0.borrow_mut();
        match all.get_mut(agent) {
            Some(last) => *last = works,
            None => drop(all.insert(agent.to_owned(), works)),
        }
    }

    /// An agent that nobody has asked yet does not.
    pub fn works(&self, agent: &str) -> bool {
        self.0.borrow().get(agent).is_some_and(|works| *works)
    }
}

/// All lines that share a watch, and what their upstreams' logs were told.
pub struct Lines {
    lines: Vec<(usize, usize)>,
    upstreams: Rc<[Assembly]>,
    handoff: Arc<Handoff>,
    service: String,
    /// Whom is asked: all of them, and each.
    agents: String,
    each: Vec<String>,
    reached: Reached,
    report: Report,
}

impl Lines {
    pub fn new(
        watch: &WatchPlan,
        upstreams: Rc<[Assembly]>,
        handoff: Arc<Handoff>,
        reached: Reached,
    ) -> Self {
        Self {
            lines: watch.lines.clone(),
            upstreams,
            handoff,
            reached,
            service: printable(watch.query.service().as_bytes(), 100),
            agents: {
                let all: Vec<_> = watch.agents.addresses.iter().map(Address::to_string).collect();
                printable(all.join(", ").as_bytes(), 300)
            },
            each: watch.agents.addresses.iter().map(Address::to_string).collect(),
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

    /// The lines, and the upstream of each.
    fn each_line(&self) -> impl Iterator<Item = (&Assembly, usize)> {
        let one = |(upstream, line): &(usize, usize)| Some((self.upstreams.get(*upstream)?, *line));
        self.lines.iter().filter_map(one)
    }

    fn note(&self, level: u32, text: &str) {
        self.upstreams().for_each(|upstream| self.note_of(upstream, level, text));
    }

    fn note_of(&self, upstream: &Assembly, level: u32, text: &str) {
        let (name, service, agents) = (&upstream.name, &self.service, &self.agents);
        let text =
            format!("consul: upstream \"{name}\": service \"{service}\" at {agents}: {text}");
        self.handoff.note(level, text);
    }
}

impl Sink for Lines {
    async fn changed(&mut self, snapshot: Arc<Snapshot>) -> Option<Instant> {
        // Of two lines of one upstream the later one's set holds the earlier one's, too.
        let mut updates = BTreeMap::new();
        let mut again: Option<Instant> = None;
        for (upstream, line) in &self.lines {
            if let Some(assembly) = self.upstreams.get(*upstream)
                && let Some(Judged { update, until, notes }) = assembly.changed(*line, &snapshot)
            {
                updates.insert(*upstream, update);
                again = again.into_iter().chain(until).min();
                for Note { level, text } in notes {
                    self.note_of(assembly, level, &text);
                }
            }
        }
        let changed: Vec<usize> = updates.keys().copied().collect();
        for number in &changed {
            if let Some(report) = self.upstreams.get(*number).and_then(Assembly::news) {
                self.handoff.tell(*number, report);
            }
        }
        self.handoff.give(updates).await;
        for upstream in changed.into_iter().filter_map(|number| self.upstreams.get(number)) {
            upstream.news.notify_one();
        }
        again
    }

    fn answered(&mut self) {
        if let Some(away) = self.report.answered() {
            let text = format!("answers again, after {}", Seconds(away));
            self.note(NGX_LOG_NOTICE, &text);
        }
    }

    fn heard(&mut self, index: u64, agent: usize) {
        let now = Moment::now();
        for (assembly, line) in self.each_line() {
            assembly.note(line, |heard| {
                heard.agent = Some(agent);
                heard.last_success = Some(now);
                heard.index = Some(index);
                heard.answers += 1;
                heard.failing = None;
                heard.next_try = None;
            });
        }
        if let Some(agent) = self.each.get(agent) {
            self.reached.note(agent, true);
        }
    }

    fn rests(&mut self, until: Instant) {
        let until = Moment::of(until);
        for (assembly, line) in self.each_line() {
            assembly.note(line, |heard| heard.next_try = Some(until));
        }
    }

    fn failed(&mut self, error: &Error) {
        let agent = match (error, &*self.each) {
            (Error::At { address, .. }, _) => Some(address),
            (_, [only]) => Some(only),
            _ => None,
        };
        for (assembly, line) in self.each_line() {
            assembly.note(line, |heard| super::tale::failed(heard, error));
        }
        if let Some(agent) = agent {
            self.reached.note(agent, false);
        }
        if self.report.failed(error) {
            self.note(NGX_LOG_ERR, &error.to_string());
        }
    }

    fn before(&self) -> Vec<Key> {
        let serving =
            |(upstream, line): &(usize, usize)| Some(self.upstreams.get(*upstream)?.serving(*line));
        let all: BTreeSet<Key> = self.lines.iter().filter_map(serving).flatten().collect();
        all.into_iter().collect()
    }
}

/// Whether Consul knows a node by this name. In shared memory names are escaped, and cut where they
/// are longer than 64 bytes, by an escape of ten bytes at the most.
fn is_whole(node: &str) -> bool {
    node.len() <= 54 && !node.contains('\\')
}

/// Some of the instances in a set, by service ID.
struct Names<'a>(&'a BTreeSet<Key>);

impl fmt::Display for Names<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const NAMED: usize = 4;
        for (n, (_, id)) in self.0.iter().take(NAMED).enumerate() {
            let comma = if n == 0 { "" } else { ", " };
            write!(f, "{comma}{}", printable(id.as_bytes(), 88))?;
        }
        if self.0.len() > NAMED { f.write_str(", ...") } else { Ok(()) }
    }
}

/// A duration as a person says it.
struct Seconds(Duration);

impl fmt::Display for Seconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.as_secs() {
            0 => write!(f, "{}ms", self.0.as_millis()),
            s @ 1..60 => write!(f, "{s}s"),
            s @ 60..3600 => write!(f, "{}m{}s", s / 60, s % 60),
            s => write!(f, "{}h{}m", s / 3600, s % 3600 / 60),
        }
    }
}
