//! What is counted of a peer, in NGINX Plus' words: it stands behind the peer in the same
//! allocation, so it comes and goes with it.
//!
//! nginx's structure of a peer takes a slot of 512 bytes and leaves a third of it unused. Peers
//! that are not made here, a configuration's static ones, have no meter: the first word says
//! whether there is one.

use core::sync::atomic::{AtomicU64, Ordering};

use crate::abi::PeerAbi;

/// What a meter begins with.
const MAGIC: u64 = 0xC05E_5E1F_3E7E_0001;

/// In the first word: the peer is gone, and the sessions that hold it are to end.
const ENDS: u64 = 1 << 8;

/// The slot of the allocator that a peer takes, with a meter and without one.
const SLOT: usize = 512;

/// A new value has this part of a moving average, as in nginx: 5 %.
const SMOOTH: u64 = 20;

/// How many numbers there are.
const NUMBERS: usize = 19;

/// A peer's counters, which all workers write.
#[repr(C)]
pub struct Meter {
    magic: AtomicU64,
    numbers: [AtomicU64; NUMBERS],
}

/// What was counted. Times are milliseconds of CLOCK_MONOTONIC, durations of responses
/// microseconds; 0 is never.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counted {
    /// By this the peer is known: never used again for another.
    pub id: u64,
    /// When it was added.
    pub added: u64,
    /// Attempts.
    pub requests: u64,
    /// Responses of 1xx to 5xx.
    pub responses: [u64; 5],
    /// Bytes sent.
    pub sent: u64,
    /// Bytes received.
    pub received: u64,
    /// Attempts that failed.
    pub fails: u64,
    /// How often it became unavailable.
    pub unavail: u64,
    /// For how many milliseconds, without the time since `downstart`.
    pub downtime: u64,
    /// Since when it is unavailable.
    pub downstart: u64,
    /// When it was picked last.
    pub selected: u64,
    /// On a moving average, to the header.
    pub header_time: u64,
    /// On a moving average, to the end.
    pub response_time: u64,
    /// The sum, to the headers.
    pub header_time_total: u64,
    /// The sum, to the ends.
    pub response_time_total: u64,
}

impl Counted {
    fn numbers(&self) -> [u64; NUMBERS] {
        let [r1, r2, r3, r4, r5] = self.responses;
        [
            self.id,
            self.added,
            self.requests,
            r1,
            r2,
            r3,
            r4,
            r5,
            self.sent,
            self.received,
            self.fails,
            self.unavail,
            self.downtime,
            self.downstart,
            self.selected,
            self.header_time,
            self.response_time,
            self.header_time_total,
            self.response_time_total,
        ]
    }

    fn of(numbers: [u64; NUMBERS]) -> Self {
        let [
            id,
            added,
            requests,
            r1,
            r2,
            r3,
            r4,
            r5,
            sent,
            received,
            fails,
            unavail,
            downtime,
            downstart,
            selected,
            header_time,
            response_time,
            header_time_total,
            response_time_total,
        ] = numbers;
        Self {
            id,
            added,
            requests,
            responses: [r1, r2, r3, r4, r5],
            sent,
            received,
            fails,
            unavail,
            downtime,
            downstart,
            selected,
            header_time,
            response_time,
            header_time_total,
            response_time_total,
        }
    }
}

/// The places of the numbers.
const REQUESTS: usize = 2;
const RESPONSES: usize = 3;
const SENT: usize = 8;
const RECEIVED: usize = 9;
const FAILS: usize = 10;
const UNAVAIL: usize = 11;
const DOWNTIME: usize = 12;
const DOWNSTART: usize = 13;
const SELECTED: usize = 14;
const HEADER_TIME: usize = 15;
const RESPONSE_TIME: usize = 16;
const HEADER_TOTAL: usize = 17;
const RESPONSE_TOTAL: usize = 18;

/// How an attempt ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Attempt {
    /// The status of the response, if there was one.
    pub status: Option<u64>,
    /// Bytes sent.
    pub sent: u64,
    /// Bytes received.
    pub received: u64,
    /// Milliseconds to the header, if there was one.
    pub header_time: Option<u64>,
    /// Milliseconds to the end.
    pub response_time: u64,
    /// nginx counts it as a failure.
    pub failed: bool,
}

/// How many bytes a peer takes with its meter.
pub(crate) const fn peer_size<P>() -> usize {
    const { assert!(align_of::<P>() >= align_of::<Meter>() && size_of::<P>() > SLOT / 2) };
    const { assert!(size_of::<P>() + size_of::<Meter>() <= SLOT) };
    size_of::<P>() + size_of::<Meter>()
}

/// Milliseconds of CLOCK_MONOTONIC.
pub fn now() -> u64 {
    micros() / 1000
}

fn micros() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call fills in the structure, which is this function's own.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut now) };
    (now.tv_sec as u64).wrapping_mul(1_000_000).wrapping_add(now.tv_nsec as u64 / 1000)
}

impl Meter {
    /// Begins to count. The ID is the moment in microseconds, or one more than the last.
    ///
    /// # Safety
    ///
    /// `peer` is one of [`peer_size`] bytes, zeroed behind nginx's structure; nobody else uses it.
    pub(crate) unsafe fn begin<P: PeerAbi>(peer: *mut P) {
        static LAST: AtomicU64 = AtomicU64::new(0);
        let now = micros();
        let next = |last: u64| Some(now.max(last.wrapping_add(1)));
        let last = LAST.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next).unwrap_or(0);
        // SAFETY: the caller's promise.
        let meter = unsafe { &*peer.add(1).cast::<Self>() };
        let counted =
            Counted { id: now.max(last.wrapping_add(1)), added: now / 1000, ..Counted::default() };
        meter.write(&counted);
        meter.magic.store(MAGIC, Ordering::Relaxed);
    }

    /// The meter of a peer, if it has one.
    ///
    /// # Safety
    ///
    /// `peer` is live as long as the result is used, in a zone that was fresh when its first peers
    /// were made and that ends at `end`.
    #[inline]
    pub unsafe fn of<'a, P: PeerAbi>(peer: *mut P, end: *const u8) -> Option<&'a Self> {
        let behind = peer.wrapping_add(1);
        if behind.addr() + size_of::<Self>() > end.addr() {
            return None;
        }
        // SAFETY: what is behind a peer is in the zone: its meter, or the rest of its slot, which is
        // as fresh as the zone, since nobody writes there. All words are atomic to everybody.
        let meter = unsafe { &*behind.cast::<Self>() };
        (meter.magic.load(Ordering::Relaxed) & !ENDS == MAGIC).then_some(meter)
    }

    /// The peer is gone, and the sessions that hold it are to end.
    pub(crate) fn end_sessions(&self) {
        self.magic.store(MAGIC | ENDS, Ordering::Relaxed);
    }

    /// Whether they are.
    pub fn ends_sessions(&self) -> bool {
        self.magic.load(Ordering::Relaxed) & ENDS != 0
    }

    /// What was counted until now.
    pub fn read(&self) -> Counted {
        Counted::of(core::array::from_fn(|n| self.numbers[n].load(Ordering::Relaxed)))
    }

    /// Goes on from what was counted before.
    pub(crate) fn write(&self, counted: &Counted) {
        for (to, from) in self.numbers.iter().zip(counted.numbers()) {
            to.store(from, Ordering::Relaxed);
        }
    }

    #[inline]
    fn add(&self, number: usize, more: u64) {
        self.numbers[number].fetch_add(more, Ordering::Relaxed);
    }

    #[inline]
    fn average(&self, number: usize, us: u64) {
        let number = &self.numbers[number];
        // Two workers at once may lose one value of it.
        let old = number.load(Ordering::Relaxed);
        let new = if old == 0 { us } else { (old * (SMOOTH - 1) + us) / SMOOTH };
        number.store(new, Ordering::Relaxed);
    }

    /// It was picked.
    #[inline]
    pub fn picked(&self, now: u64) {
        self.add(REQUESTS, 1);
        self.numbers[SELECTED].store(now, Ordering::Relaxed);
    }

    /// An attempt is over.
    #[inline]
    pub fn ended(&self, attempt: &Attempt) {
        if let Some(class) = attempt.status.map(|status| status / 100)
            && let Some(class @ 0..5) = usize::try_from(class).ok().and_then(|n| n.checked_sub(1))
        {
            self.add(RESPONSES + class, 1);
        }
        self.add(SENT, attempt.sent);
        self.add(RECEIVED, attempt.received);
        if attempt.failed {
            self.add(FAILS, 1);
        }
        if let Some(ms) = attempt.header_time {
            self.add(HEADER_TOTAL, ms * 1000);
            self.average(HEADER_TIME, ms * 1000);
            self.add(RESPONSE_TOTAL, attempt.response_time * 1000);
            self.average(RESPONSE_TIME, attempt.response_time * 1000);
        }
    }

    /// After a failure: whether it was the one that made the peer unavailable.
    pub fn is_unavailable(&self, now: u64) {
        let start = &self.numbers[DOWNSTART];
        if start.compare_exchange(0, now, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
            self.add(UNAVAIL, 1);
        }
    }

    /// After a success: it is available again.
    #[inline]
    pub fn is_available(&self, now: u64) {
        if self.numbers[DOWNSTART].load(Ordering::Relaxed) != 0 {
            let start = self.numbers[DOWNSTART].swap(0, Ordering::Relaxed);
            if start != 0 {
                self.add(DOWNTIME, now.saturating_sub(start));
            }
        }
    }
}
