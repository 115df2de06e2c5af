//! How long to wait after an error.

use std::time::Duration;

use crate::error::Retry;

/// The first wait is at most this long.
const FIRST: Duration = Duration::from_millis(250);
/// No wait is longer than this, but those for a person to act.
const CAP: Duration = Duration::from_secs(10);

/// Exponential back-off with full jitter: each wait is drawn from zero to a bound that doubles,
/// so that many clients of an agent that returns do not all ask at once.
#[derive(Debug, Default)]
pub struct Backoff {
    errors: u32,
}

impl Backoff {
    /// The wait after one more error.
    pub fn next(&mut self, retry: Retry) -> Duration {
        let share = fastrand::f64();
        match retry {
            Retry::BackOff => {
                let bound = FIRST.saturating_mul(1 << self.errors.min(16)).min(CAP);
                self.errors = self.errors.saturating_add(1);
                bound.mul_f64(share)
            }
            Retry::Slowly => Duration::from_secs(30).mul_f64(1.0 + share),
        }
    }

    /// An answer came: the next error starts from the begin.
    pub fn reset(&mut self) {
        self.errors = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doubles_up_to_the_cap() {
        let mut backoff = Backoff::default();
        for bound in [250, 500, 1000, 2000, 4000, 8000, 10_000, 10_000] {
            // Drawn 200 times, the largest comes close to the bound and none passes it.
            let errors = backoff.errors;
            let longest = (0..200)
                .map(|_| {
                    backoff.errors = errors;
                    backoff.next(Retry::BackOff)
                })
                .max()
                .unwrap();
            let bound = Duration::from_millis(bound);
            assert!(longest <= bound && longest > bound.mul_f64(0.8), "{longest:?} of {bound:?}");
        }
        backoff.reset();
        assert!(backoff.next(Retry::BackOff) <= FIRST);
    }

    #[test]
    fn never_overflows() {
        let mut backoff = Backoff { errors: u32::MAX };
        assert!(backoff.next(Retry::BackOff) <= CAP);
        let slow = backoff.next(Retry::Slowly);
        assert!(slow >= Duration::from_secs(30) && slow <= Duration::from_secs(60));
    }
}
