//! nginx's thread of the first worker: takes sets from the consul thread and edits the lists.

use core::ffi::c_int;
use core::{fmt, ptr};
use std::io;
use std::os::fd::{AsRawFd, IntoRawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nginx_peers::list::Refused;
use nginx_peers::{Change, Changed, Label, List, PeersAbi, UpstreamAbi};
use nginx_sys::{
    NGX_LOG_CRIT, NGX_LOG_DEBUG, NGX_LOG_ERR, NGX_LOG_NOTICE, NGX_LOG_WARN, NGX_OK,
    ngx_close_connection, ngx_connection_t, ngx_cycle, ngx_event_t, ngx_get_connection,
    ngx_handle_read_event, ngx_int_t, ngx_msec_t,
};

use super::board::Place;
use super::clock::{self, Moment};
use super::cost::Cost;
use super::handoff::{Before, Handoff, Note, Update};
use super::journal;
use super::plan::Plan;
use super::record::{Record, ThreadRecord};
use super::shared::Shared;
use super::stored;
use super::story;
use super::thread::Thread;
use crate::conf::{self, MainConf};
use crate::guard::guard;
use crate::log;
use crate::protocol::{Peers, Protocol};

/// How many instances a line about a change names: nginx cuts lines at 2,048 bytes.
const NAMED: usize = 8;

/// How often a set that did not fit is tried again: requests end, and other upstreams of the zone
/// shrink.
const RETRY: Duration = Duration::from_secs(1);

/// How often the first worker of an old generation looks whether the others have ended.
const LOOK: ngx_msec_t = 50;

/// The same complaint about an upstream is not logged again within this time.
const REPEAT: Duration = Duration::from_secs(60);

/// Everything that the first worker has for following Consul. Dropped, it leaves no thread, no
/// descriptor and no timer behind.
pub struct Applier<P: Protocol> {
    upstreams: Vec<Upstream<P>>,
    handoff: Arc<Handoff>,
    /// The eventfd, as nginx's event loop sees it; null until it is added.
    connection: *mut ngx_connection_t,
    retry: Box<ngx_event_t>,
    /// Set while the process stays only for the others of its generation.
    company: Box<ngx_event_t>,
    shared: &'static Shared,
    /// When the consul thread was last seen alive.
    alive: Moment,
    /// Ended, and joined, when this is dropped.
    thread: Option<Thread>,
}

/// One upstream's list, and what happened to it.
struct Upstream<P: Protocol> {
    name: String,
    zone: String,
    list: List<Peers<P>>,
    journal: journal::Note,
    /// Sessions to instances that leave are closed.
    drops: bool,
    /// All lines have had an answer.
    answered: bool,
    /// It has servers from before its first answer.
    restored: bool,
    /// A set that was refused or came too early, until it is applied or another one comes.
    pending: Option<Update>,
    complained: Option<Instant>,
    cost: &'static Cost,
    /// Until then no change is made.
    rests: Option<Instant>,
    /// It was said that changes cost much here.
    warned: bool,
    /// By what the weights are divided, as was said.
    divisor: Option<u32>,
    /// What the status tells of it, where that stands, and for how many milliseconds an answer of
    /// Consul counts.
    record: Record,
    place: &'static Place,
    limit: u64,
}

impl<P: Protocol> Applier<P> {
    /// Starts the consul thread.
    ///
    /// # Safety
    ///
    /// On nginx's main thread, once the event loop can take connections; `main` and its upstreams
    /// outlive the value, and this process is the only one that edits their lists.
    pub unsafe fn start(main: &'static MainConf<P>) -> io::Result<Box<Self>> {
        // SAFETY: the zone module has put the lists into their zones before any worker starts,
        // and each begins with the static servers that `conf::finish` has counted. Zero is valid
        // for an event.
        let (mut upstreams, retry, company) = unsafe {
            let shared = Shared::of(main);
            let upstreams: Vec<_> = main
                .upstreams
                .iter()
                .enumerate()
                .map(|(number, conf)| Upstream::new(conf, shared, number))
                .collect();
            let event = || Box::new(core::mem::zeroed::<ngx_event_t>());
            (upstreams, event(), event())
        };
        let mut plan = Plan::new(main);
        for (number, upstream) in upstreams.iter_mut().enumerate() {
            upstream.restore(&mut plan, number);
        }
        // SAFETY: the configuration is in use and has upstreams.
        let shared = unsafe { Shared::of(main) };
        let before = upstreams.iter_mut().map(|upstream| {
            upstream.publish();
            let (specs, report) = (upstream.list.present(), upstream.record.report.clone());
            Before { specs, report }
        });
        // One that was killed had a place of the same zone.
        let thread = shared.thread_place().read();
        let thread = thread.and_then(|it| serde_json::from_slice::<ThreadRecord>(&it).ok());
        let restarts = thread.map_or(0, |thread| thread.restarts);
        let handoff = Arc::new(Handoff::new(before.collect(), restarts)?);
        let mut applier = Box::new(Self {
            upstreams,
            handoff: handoff.clone(),
            connection: ptr::null_mut(),
            retry,
            company,
            shared,
            alive: Moment::default(),
            thread: None,
        });
        // SAFETY: the box gives the value an address for the time that nginx knows it.
        unsafe { applier.listen()? };
        applier.thread = Some(Thread::start(plan, handoff)?);
        Ok(applier)
    }

    /// Adds the eventfd and the timer to nginx's event loop.
    ///
    /// # Safety
    ///
    /// As [`Self::start`]; the value does not move from now on.
    unsafe fn listen(&mut self) -> io::Result<()> {
        let this: *mut Self = self;
        // SAFETY: the connection is nginx's and stays ours until it is closed. nginx treats it
        // like the channel to the master: idle, so that a graceful exit does not wait for it, and
        // `channel`, so that an open one is no leak in its eyes.
        unsafe {
            let log = (*ngx_cycle).log;
            let fd = self.handoff.duplicate()?;
            let connection = ngx_get_connection(fd.as_raw_fd(), log);
            if connection.is_null() {
                return Err(io::Error::other("no connection is free"));
            }
            // nginx closes it with the connection.
            let _ = fd.into_raw_fd();
            self.connection = connection;
            (*connection).data = this.cast();
            (*connection).log = log;
            (*connection).set_idle(1);
            let read = (*connection).read;
            (*read).log = log;
            (*read).handler = Some(on_wake::<P>);
            (*read).set_channel(1);
            (*(*connection).write).log = log;
            if ngx_handle_read_event(read, 0) != NGX_OK as ngx_int_t {
                return Err(io::Error::other("the eventfd cannot be added to the event loop"));
            }

            self.retry.data = this.cast();
            self.retry.log = log;
            self.retry.handler = Some(on_retry::<P>);
            // A graceful exit does not wait for it.
            self.retry.set_cancelable(1);

            // But for this one, which is what it is there for.
            self.company.data = this.cast();
            self.company.log = log;
            self.company.handler = Some(on_look::<P>);
        }
        Ok(())
    }

    /// From now on this process only finishes what it has, and what the others of its generation
    /// have: they choose from the lists that it keeps.
    fn begin_exit(&mut self) {
        self.handoff.begin_exit();
        self.stay_for_the_others();
    }

    fn stay_for_the_others(&mut self) {
        if self.company.timer_set() == 0 && self.shared.is_in_company() {
            // SAFETY: the event is in a box, and removed before that goes.
            unsafe { nginx_sys::ngx_add_timer(&mut *self.company, LOOK) };
        }
    }

    /// Whether every upstream has servers of its own, or an answer that says that there are none.
    pub fn all_serve(&self) -> bool {
        self.upstreams.iter().all(|upstream| upstream.answered || upstream.restored)
    }

    /// Whether every upstream has had its first answers.
    pub fn all_answered(&self) -> bool {
        self.upstreams.iter().all(|upstream| upstream.answered)
    }

    /// The upstreams that have not.
    pub fn unanswered(&self) -> impl Iterator<Item = &str> {
        self.upstreams.iter().filter(|upstream| !upstream.answered).map(|u| u.name.as_str())
    }

    /// Waits for something to take, outside of the event loop, and takes it. A signal ends the
    /// wait, too.
    pub fn wait(&mut self, at_most: Duration) {
        let mut poll = libc::pollfd { fd: self.handoff.fd(), events: libc::POLLIN, revents: 0 };
        // Rounded up: the rest of a millisecond would be a busy loop.
        let ms = c_int::try_from(at_most.as_millis()).unwrap_or(c_int::MAX).saturating_add(1);
        // SAFETY: one descriptor, which is open.
        unsafe { libc::poll(&mut poll, 1, ms) };
        self.take();
    }

    /// Takes what the consul thread has given, and applies it.
    fn take(&mut self) {
        let upstreams = &mut self.upstreams;
        self.handoff.take(
            |Note { level, text }| log::cycle(level, format_args!("{text}")),
            |number, report, update| {
                if let Some(upstream) = upstreams.get_mut(number) {
                    if let Some(report) = report {
                        upstream.record.report = report;
                    }
                    if let Some(update) = update {
                        upstream.apply(update);
                    }
                    upstream.publish();
                }
            },
        );
        self.see_thread();
        self.schedule_retry();
    }

    /// Notes that the consul thread lives, and what time alone has changed.
    fn see_thread(&mut self) {
        if let Some(thread) = self.handoff.take_thread()
            && let Ok(record) = serde_json::to_vec(&thread)
        {
            self.shared.thread_place().write(&record);
        }
        let alive = self.handoff.alive();
        if alive == self.alive {
            return;
        }
        self.alive = alive;
        let now = Moment::now();
        self.shared.beat(now);
        for upstream in &mut self.upstreams {
            if upstream.record.note_sync(upstream.limit, now) {
                upstream.publish();
            }
        }
    }

    fn retry_pending(&mut self) {
        for upstream in &mut self.upstreams {
            if let Some(update) = upstream.pending.clone() {
                upstream.apply(update);
                upstream.publish();
            }
        }
        self.schedule_retry();
    }

    fn schedule_retry(&mut self) {
        let pending = self.upstreams.iter().filter(|upstream| upstream.pending.is_some());
        let next = pending.map(|upstream| upstream.rest().unwrap_or(RETRY)).min();
        if let Some(next) = next
            && self.retry.timer_set() == 0
        {
            // Rounded up: the rest of a millisecond would be a busy loop.
            let ms = next.as_millis() as ngx_msec_t + 1;
            // SAFETY: the event is in a box, and removed before that goes.
            unsafe { nginx_sys::ngx_add_timer(&mut *self.retry, ms) };
        }
    }
}

impl<P: Protocol> Drop for Applier<P> {
    fn drop(&mut self) {
        // First: nobody writes to the eventfd after that.
        drop(self.thread.take());
        // SAFETY: both were added by `listen`, on this thread.
        unsafe {
            for timer in [&mut self.retry, &mut self.company] {
                if timer.timer_set() != 0 {
                    nginx_sys::ngx_del_timer(&mut **timer);
                }
            }
            if !self.connection.is_null() {
                ngx_close_connection(self.connection);
            }
        }
    }
}

/// # Safety
///
/// As nginx calls it: an event of the connection of an [`Applier`] that is alive.
unsafe extern "C" fn on_wake<P: Protocol>(event: *mut ngx_event_t) {
    guard("taking a change", (), || {
        // SAFETY: this function's own contract. A graceful exit calls it once with `close` set,
        // for all idle connections: ours stays, as long as requests are served.
        unsafe {
            let connection: *mut ngx_connection_t = (*event).data.cast();
            let applier: *mut Applier<P> = (*connection).data.cast();
            if (*connection).close() != 0 {
                (*applier).begin_exit();
            }
            (*applier).take();
            if ngx_handle_read_event(event, 0) != NGX_OK as ngx_int_t {
                log::cycle(NGX_LOG_CRIT, format_args!("consul: the eventfd is lost"));
            }
        }
    });
}

/// # Safety
///
/// As nginx calls it: the timer of an [`Applier`] that is alive.
unsafe extern "C" fn on_look<P: Protocol>(event: *mut ngx_event_t) {
    // SAFETY: this function's own contract.
    guard("waiting for the others", (), || unsafe {
        (*(*event).data.cast::<Applier<P>>()).stay_for_the_others();
    });
}

/// # Safety
///
/// As nginx calls it: the timer of an [`Applier`] that is alive.
unsafe extern "C" fn on_retry<P: Protocol>(event: *mut ngx_event_t) {
    // SAFETY: this function's own contract.
    guard("trying a change again", (), || unsafe {
        (*(*event).data.cast::<Applier<P>>()).retry_pending();
    });
}

impl<P: Protocol> Upstream<P> {
    /// # Safety
    ///
    /// As [`Applier::start`].
    unsafe fn new(conf: &conf::Upstream<P>, shared: &'static Shared, number: usize) -> Self {
        // SAFETY: the caller's promise.
        let list = unsafe {
            let primaries = P::Upstream::peers(conf.nginx);
            // A full zone is our line to write, with the size that would do.
            (*(*Peers::<P>::shpool(primaries))).set_log_nomem(0);
            List::new(primaries, conf.statics)
        };
        Self {
            name: conf.name.clone(),
            zone: conf.zone.clone(),
            list,
            journal: journal::Note::new(shared, number),
            drops: conf.drops,
            answered: false,
            restored: false,
            pending: None,
            complained: None,
            cost: shared.cost(number),
            rests: None,
            warned: false,
            divisor: None,
            record: story::begin(shared.place(number)),
            place: shared.place(number),
            limit: clock::limit(conf.agents.wait),
        }
    }

    /// Shows what is known of it to all workers.
    fn publish(&mut self) {
        self.record.answered = self.answered;
        self.record.restored = self.restored;
        self.record.note_sync(self.limit, Moment::now());
        if let Some(record) = self.record.encode(self.place.room()) {
            self.place.write(&record);
        }
    }

    /// Begins with the stored peers where there are none.
    fn restore(&mut self, plan: &mut Plan, number: usize) {
        // A worker that takes the place of one that died finds them all.
        self.restored = !self.list.present().is_empty();
        // In which datacenter they are stands in what is stored alone.
        let specs = stored::restore(plan, number);
        if self.restored || specs.is_empty() {
            return;
        }
        match self.list.apply_noting(&specs, &self.journal) {
            Ok(_) => {
                self.restored = true;
                let (name, number) = (&self.name, specs.len());
                log::cycle(
                    NGX_LOG_NOTICE,
                    format_args!(
                        "consul: upstream \"{name}\": {number} stored servers, until Consul answers"
                    ),
                );
            }
            Err(refused) => self.complain(refused),
        }
    }

    fn apply(&mut self, update: Update) {
        let first = update.complete && !self.answered;
        // The very set that was refused before is no further one.
        let refused = self.pending.as_ref().filter(|_| self.record.refused);
        let is_again = refused.is_some_and(|old| Arc::ptr_eq(&old.specs, &update.specs));
        self.answered |= update.complete;
        // Whatever waited is older.
        self.pending = None;
        if self.rest().is_some() {
            self.pending = Some(update);
            return;
        }
        let ends = |label: &Label| !update.draining.contains(label);
        let ends: Option<&dyn Fn(&Label) -> bool> = if self.drops { Some(&ends) } else { None };
        match self.list.apply_ending(&update.specs, ends, &self.journal) {
            Ok(change) => {
                self.complained = None;
                story::applied(&mut self.record, &change, update.index);
                if !change.is_empty() {
                    self.weigh(&change, update.specs.len());
                    self.tell_divisor(&change);
                }
                if first || !change.is_empty() {
                    let (name, serve) = (&self.name, update.specs.len());
                    let Update { registered, index, .. } = update;
                    let change = Described(&change);
                    log::cycle(
                        NGX_LOG_NOTICE,
                        format_args!(
                            "consul: upstream \"{name}\":{change} {serve} of {registered} \
                             instances serve, index {index}"
                        ),
                    );
                }
            }
            Err(refused) => {
                let present = self.list.present();
                story::refused(&mut self.record, &update.specs, &present, is_again);
                if self.complained.is_none_or(|at| at.elapsed() >= REPEAT) {
                    self.complained = Some(Instant::now());
                    self.complain(refused);
                }
                self.pending = Some(update);
            }
        }
    }

    /// How long the next change has to wait.
    fn rest(&self) -> Option<Duration> {
        let left = self.rests?.saturating_duration_since(Instant::now());
        (!left.is_zero()).then_some(left)
    }

    /// After a change: says what it cost, and what the ones before it have cost the workers.
    fn weigh(&mut self, change: &Change, peers: usize) {
        let name = &self.name;
        let locked = change.locked.as_nanos();
        // A change is one line in any log but that of somebody who looks for more.
        log::cycle(
            NGX_LOG_DEBUG,
            format_args!("consul: upstream \"{name}\": the list was locked for {locked}ns"),
        );
        let cost = self.cost.get();
        self.rests = cost.rest().map(|rest| Instant::now() + rest);
        if cost.is_unwise() && !self.warned {
            self.warned = true;
            let ms = cost.time.as_millis();
            log::cycle(
                NGX_LOG_WARN,
                format_args!(
                    "consul: upstream \"{name}\": each change stops every worker for {ms}ms, \
                     which its method takes to prepare its choice among {peers} servers; changes \
                     are gathered; smaller weights, or \"weight=1\", make \"hash ... consistent\" \
                     faster, and \"random two\" or \"least_conn\" prepare nothing"
                ),
            );
        }
    }

    /// Says, once for each, by what the weights of Consul were divided.
    fn tell_divisor(&mut self, change: &Change) {
        let before = std::mem::replace(&mut self.divisor, change.divisor);
        if let Some(divisor) = change.divisor
            && self.divisor != before
        {
            let name = &self.name;
            log::cycle(
                NGX_LOG_WARN,
                format_args!(
                    "consul: upstream \"{name}\": the weights are larger than a method can use, \
                     they are divided by {divisor}"
                ),
            );
        }
    }

    fn complain(&self, refused: Refused) {
        let (name, zone) = (&self.name, &self.zone);
        match refused {
            Refused::Full(full) => log::cycle(
                NGX_LOG_ERR,
                format_args!(
                    "consul: upstream \"{name}\": zone \"{zone}\" of {}k is full, the old set \
                     stays; \"zone {zone} {}k\" would do",
                    full.size.div_ceil(1024),
                    full.needed
                ),
            ),
            other => log::cycle(
                NGX_LOG_ERR,
                format_args!("consul: upstream \"{name}\": {other}, the old set stays"),
            ),
        }
    }
}

/// A change, as the log tells it: `+` for new ones, `-` for those that went, `~` for other
/// attributes.
struct Described<'a>(&'a Change);

impl fmt::Display for Described<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Change { added, removed, changed, .. } = self.0;
        let all = [('+', added), ('-', removed), ('~', changed)];
        let all = all.iter().flat_map(|(sign, all)| all.iter().map(move |one| (sign, one)));
        let mut rest = 0;
        for (n, (sign, Changed { address, label })) in all.enumerate() {
            if n < NAMED {
                write!(f, " {sign}{address} ({label})")?;
            } else {
                rest += 1;
            }
        }
        match rest {
            0 if self.0.is_empty() => Ok(()),
            0 => f.write_str(","),
            rest => write!(f, " and {rest} more,"),
        }
    }
}
