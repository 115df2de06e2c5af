//! Moments on the clock that never jumps, which all processes of a machine share.

use std::time::{Duration, SystemTime};

use consul_status::Time;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

/// Milliseconds of CLOCK_MONOTONIC.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Moment(pub u64);

impl Moment {
    /// Now.
    pub fn now() -> Self {
        let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: the call fills in the structure, which is this function's own; with this clock it
        // cannot fail.
        unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut now) };
        let (s, ns) = (now.tv_sec.try_into().unwrap_or(0), now.tv_nsec.try_into().unwrap_or(0));
        Self(u64::saturating_add(u64::saturating_mul(s, 1000), u64::div_euclid(ns, 1_000_000)))
    }

    /// A moment to come.
    pub fn of(instant: Instant) -> Self {
        let ahead = instant.saturating_duration_since(Instant::now());
        Self::now().later_by(u64::try_from(ahead.as_millis()).unwrap_or(u64::MAX))
    }

    /// So many milliseconds later.
    pub fn later_by(self, ms: u64) -> Self {
        Self(self.0.saturating_add(ms))
    }

    /// Milliseconds from `earlier` to this moment.
    pub fn since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

/// Both clocks at one moment: what turns moments into times of the day.
#[derive(Clone, Copy, Debug)]
pub struct Clocks {
    pub now: Moment,
    pub wall: Time,
}

impl Clocks {
    pub fn read() -> Self {
        Self { now: Moment::now(), wall: SystemTime::now().into() }
    }

    /// The time of the day of a moment, by what the clock says now.
    pub fn time(&self, moment: Moment) -> Time {
        let wall = self.wall.millis();
        Time::from_millis(if moment <= self.now {
            wall.saturating_sub(self.now.since(moment))
        } else {
            wall.saturating_add(moment.since(self.now))
        })
    }
}

/// For how long an answer counts, in milliseconds: twice the time within which the next one has to
/// come, by Consul's sixteenth more and the time that an answer travels.
pub fn limit(wait: Duration) -> u64 {
    let longest = wait + wait / 16 + Duration::from_secs(12);
    u64::try_from(2 * longest.as_millis()).unwrap_or(u64::MAX)
}
