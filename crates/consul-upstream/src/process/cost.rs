//! What a change of a list costs the workers.
//!
//! Some methods prepare their choice anew after each change: `hash ... consistent` sorts 160 points
//! for each unit of weight, in every worker, while a request waits and the list is locked for
//! readers. Which method it is cannot be seen from outside, but what it takes can: the layer around
//! the balancers measures the first request after a change. Changes are then gathered, so that the
//! workers spend at most a tenth of their time on them.

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

/// Below this it is nothing but a worker that was interrupted.
const NOTABLE: Duration = Duration::from_millis(2);

/// From here on clients notice.
const UNWISE: Duration = Duration::from_millis(50);

/// How many times its cost a change is apart from the next.
const APART: u32 = 10;

/// A change waits no longer than that.
const LONGEST: Duration = Duration::from_secs(5);

/// The measure, in memory that all workers share. Zeroed memory is none.
#[repr(C)]
pub struct Cost {
    /// The last two, in microseconds: once may be an accident.
    last: AtomicU32,
    before: AtomicU32,
    /// Attempts of requests that were repaired after a change.
    repaired: AtomicU64,
}

/// What a change costs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Measured {
    /// How long a request had to wait.
    pub time: Duration,
}

impl Cost {
    /// A worker has seen what a change costs.
    pub fn add(&self, time: Duration) {
        let us = u32::try_from(time.as_micros()).unwrap_or(u32::MAX);
        self.before.store(self.last.swap(us, Ordering::Relaxed), Ordering::Relaxed);
    }

    /// So many attempts of requests were repaired after a change.
    pub fn add_repaired(&self, attempts: u64) {
        self.repaired.fetch_add(attempts, Ordering::Relaxed);
    }

    /// How many were.
    pub fn repaired(&self) -> u64 {
        self.repaired.load(Ordering::Relaxed)
    }

    /// What the changes of late have cost.
    pub fn get(&self) -> Measured {
        let [last, before] = [&self.last, &self.before].map(|it| it.load(Ordering::Relaxed));
        Measured { time: Duration::from_micros(last.min(before).into()) }
    }
}

impl Measured {
    /// How long to wait before the next change.
    pub fn rest(&self) -> Option<Duration> {
        (self.time >= NOTABLE).then(|| (self.time * APART).min(LONGEST))
    }

    /// Whether the method is not made for so many servers.
    pub fn is_unwise(&self) -> bool {
        self.time >= UNWISE
    }
}
