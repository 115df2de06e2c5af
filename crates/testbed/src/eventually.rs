//! Waiting for a condition, with a bound.

use std::fmt::Display;
use std::ops::RangeInclusive;
use std::thread;
use std::time::{Duration, Instant};

/// The shortest and the longest time between two looks at a condition. A look often costs a request or
/// a walk over all processes, and many tests wait at once: after the first moments they look less often.
const INTERVAL: RangeInclusive<Duration> = Duration::from_millis(3)..=Duration::from_millis(25);

/// The divisor of the time waited so far that gives the next pause: a condition is seen late by a sixteenth at most.
const LATER: u32 = 16;

/// What a look at a condition can answer: `bool`, `Option<T>`, or `Result<T, E>`, whose error
/// tells the state that was seen.
pub trait Attempt {
    type Output;

    /// The value waited for, or the state that was seen instead.
    fn outcome(self) -> Result<Self::Output, String>;
}

impl Attempt for bool {
    type Output = ();

    fn outcome(self) -> Result<(), String> {
        if self { Ok(()) } else { Err("not so".into()) }
    }
}

impl<T> Attempt for Option<T> {
    type Output = T;

    fn outcome(self) -> Result<T, String> {
        self.ok_or_else(|| "nothing".into())
    }
}

impl<T, E: Display> Attempt for Result<T, E> {
    type Output = T;

    fn outcome(self) -> Result<T, String> {
        self.map_err(|error| error.to_string())
    }
}

/// Looks again and again until the condition holds.
///
/// # Panics
///
/// When it does not hold within `timeout`: with `what` and the state that was seen last.
#[track_caller]
pub fn eventually<A: Attempt>(timeout: Duration, what: &str, look: impl FnMut() -> A) -> A::Output {
    within(timeout, look)
        .unwrap_or_else(|seen| panic!("{what}: not within {timeout:?}; last seen: {seen}"))
}

/// The same, for callers that have something better to do than to panic.
pub(crate) fn within<A: Attempt>(
    timeout: Duration,
    mut look: impl FnMut() -> A,
) -> Result<A::Output, String> {
    let begin = Instant::now();
    loop {
        let waited = begin.elapsed();
        match look().outcome() {
            Ok(value) => return Ok(value),
            Err(seen) if waited >= timeout => return Err(seen),
            Err(_) => thread::sleep((waited / LATER).clamp(*INTERVAL.start(), *INTERVAL.end())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn returns_what_was_waited_for() {
        let mut looks = 0;
        let value = eventually(Duration::from_secs(5), "three looks", || {
            looks += 1;
            (looks == 3).then_some("seen")
        });
        assert_eq!((value, looks), ("seen", 3));
    }

    #[test]
    #[should_panic(expected = "a door: not within 10ms; last seen: shut")]
    fn says_what_it_saw() {
        eventually(Duration::from_millis(10), "a door", || Err::<(), _>("shut"));
    }
}
