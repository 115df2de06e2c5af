//! What the consul thread gives to nginx's thread: the latest set of each upstream, what else is
//! known of it, and lines for the log. Nothing here waits, but the consul thread for its set to be taken.

use std::collections::{HashSet, VecDeque};
use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use nginx_peers::{Label, Spec};
use parking_lot::Mutex;
use tokio::sync::watch;

use super::clock::Moment;
use super::record::{Report, ThreadRecord};
use crate::failpoint;

/// Lines that are kept while nginx's thread is busy; later ones are counted.
const NOTES: usize = 256;

/// A set for one upstream.
#[derive(Clone, Debug)]
pub struct Update {
    /// The peers, in order.
    pub specs: Arc<Vec<Spec>>,
    /// How many instances Consul has registered.
    pub registered: usize,
    /// Consul's index.
    pub index: u64,
    /// All lines of the upstream have had an answer.
    pub complete: bool,
    /// Instances in maintenance, by their labels: sessions to them go on to their end.
    pub draining: Arc<HashSet<Label>>,
}

/// A line for nginx's log.
#[derive(Debug)]
pub struct Note {
    /// `NGX_LOG_…`
    pub level: u32,
    pub text: String,
}

/// What both threads hold.
pub struct Handoff {
    slots: Vec<Mutex<Slot>>,
    notes: Mutex<(VecDeque<Note>, usize)>,
    wake: File,
    /// How often sets were given.
    given: AtomicU64,
    /// Of those, taken and applied, or kept for another attempt.
    taken: watch::Sender<u64>,
    /// The process only finishes what it has.
    exiting: AtomicBool,
    /// What is to be told of the thread itself.
    thread: Mutex<Option<ThreadRecord>>,
    /// When the thread last said that it lives.
    alive: AtomicU64,
    /// How often it had to start again.
    restarts: AtomicU64,
}

/// An upstream's place: the latest wins.
#[derive(Default)]
struct Slot {
    update: Option<Update>,
    /// News of it.
    report: Option<Report>,
    /// What was given last, for a thread that has to start over.
    last: Arc<Vec<Spec>>,
    told: Report,
}

/// What an upstream had before.
#[derive(Default)]
pub struct Before {
    /// Its peers.
    pub specs: Vec<Spec>,
    /// What was told of it.
    pub report: Report,
}

impl Handoff {
    /// One slot for each upstream, with what it has.
    pub fn new(present: Vec<Before>, restarts: u64) -> io::Result<Self> {
        // SAFETY: no pointer is passed; the descriptor that comes back is nobody else's.
        let wake = unsafe {
            match libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) {
                -1 => return Err(io::Error::last_os_error()),
                fd => File::from_raw_fd(fd),
            }
        };
        let slots = present
            .into_iter()
            .map(|Before { specs, report }| {
                let (last, told) = (Arc::new(specs), report);
                Mutex::new(Slot { update: None, report: None, last, told })
            })
            .collect();
        Ok(Self {
            slots,
            notes: Mutex::default(),
            wake,
            given: AtomicU64::new(0),
            taken: watch::Sender::new(0),
            exiting: AtomicBool::new(false),
            thread: Mutex::default(),
            alive: AtomicU64::new(0),
            restarts: AtomicU64::new(restarts),
        })
    }

    /// Leaves news of an upstream. Whoever gives a set has told what belongs to it first; other
    /// news waits for [`Self::beat`].
    pub fn tell(&self, upstream: usize, report: Report) {
        if let Some(slot) = self.slots.get(upstream) {
            let mut slot = slot.lock();
            slot.told.clone_from(&report);
            slot.report = Some(report);
        }
    }

    /// What was told last, or what was known before.
    pub fn told(&self, upstream: usize) -> Report {
        self.slots.get(upstream).map(|slot| slot.lock().told.clone()).unwrap_or_default()
    }

    /// The thread lives, and has told what there is. With a record of itself, that is news, too.
    pub fn beat(&self, thread: Option<ThreadRecord>) {
        if let Some(mut record) = thread {
            record.restarts = self.restarts.load(Ordering::Relaxed);
            *self.thread.lock() = Some(record);
        }
        self.alive.store(Moment::now().0, Ordering::Relaxed);
        self.wake();
    }

    /// The thread has failed, and is about to start again.
    pub fn fail(&self, thread: ThreadRecord) {
        self.restarts.fetch_add(1, Ordering::Relaxed);
        self.beat(Some(ThreadRecord { backoff: true, ..thread }));
    }

    /// When the thread last said that it lives.
    pub fn alive(&self) -> Moment {
        Moment(self.alive.load(Ordering::Relaxed))
    }

    /// Takes what is to be told of the thread.
    pub fn take_thread(&self) -> Option<ThreadRecord> {
        self.thread.lock().take()
    }

    /// From now on the process only finishes what it has: others may follow Consul by another
    /// configuration.
    pub fn begin_exit(&self) {
        self.exiting.store(true, Ordering::Relaxed);
    }

    /// Whether it does.
    pub fn is_exiting(&self) -> bool {
        self.exiting.load(Ordering::Relaxed)
    }

    /// The descriptor that is readable when there is something to take.
    pub fn fd(&self) -> RawFd {
        self.wake.as_raw_fd()
    }

    /// A duplicate of it, for who closes what it is given.
    pub fn duplicate(&self) -> io::Result<OwnedFd> {
        Ok(self.wake.try_clone()?.into())
    }

    /// Gives sets to upstreams, and returns when nginx's thread has taken all of them over.
    pub async fn give(&self, updates: impl IntoIterator<Item = (usize, Update)>) {
        failpoint::panic("watch");
        let mut taken = self.taken.subscribe();
        for (upstream, update) in updates {
            if let Some(slot) = self.slots.get(upstream) {
                let mut slot = slot.lock();
                slot.last = update.specs.clone();
                slot.update = Some(update);
            }
        }
        let number = self.given.fetch_add(1, Ordering::AcqRel) + 1;
        self.wake();
        // The sender lives as long as `self`: there is no error.
        let _ = taken.wait_for(|taken| *taken >= number).await;
    }

    /// The set given last, or what the upstream had before.
    pub fn last(&self, upstream: usize) -> Arc<Vec<Spec>> {
        self.slots.get(upstream).map(|slot| slot.lock().last.clone()).unwrap_or_default()
    }

    /// Leaves a line for the log.
    pub fn note(&self, level: u32, text: String) {
        let mut notes = self.notes.lock();
        if notes.0.len() < NOTES {
            notes.0.push_back(Note { level, text });
        } else {
            notes.1 += 1;
        }
        drop(notes);
        self.wake();
    }

    fn wake(&self) {
        // It cannot fail but with a counter that is full, and then nginx's thread is awake.
        let _ = (&self.wake).write(&1u64.to_ne_bytes());
    }

    /// Takes everything, on nginx's thread: lines first, then sets; a set whose application is to
    /// be tried again stays with who takes it.
    pub fn take(
        &self,
        mut note: impl FnMut(Note),
        mut apply: impl FnMut(usize, Option<Report>, Option<Update>),
    ) {
        loop {
            match (&self.wake).read(&mut [0; 8]) {
                Err(err) if err.kind() == ErrorKind::Interrupted => continue,
                _ => break,
            }
        }
        // Before the slots: all that was given up to this number is in them.
        let given = self.given.load(Ordering::Acquire);
        let (notes, lost) = std::mem::take(&mut *self.notes.lock());
        notes.into_iter().for_each(&mut note);
        if lost > 0 {
            let text = format!("consul: {lost} more lines were dropped");
            note(Note { level: nginx_sys::NGX_LOG_WARN, text });
        }
        for (upstream, slot) in self.slots.iter().enumerate() {
            // The lock is not held while the set is applied.
            let (report, update) = {
                let mut slot = slot.lock();
                (slot.report.take(), slot.update.take())
            };
            if report.is_some() || update.is_some() {
                apply(upstream, report, update);
            }
        }
        self.taken.send_replace(given);
    }
}
