//! How fast a watch may take answers: a service that flaps, or an agent that answers every
//! blocking query at once, costs a bounded part of a core.

use std::time::Duration;

use tokio::time::Instant;

/// Answers that may come in a row.
const BURST: u32 = 50;
/// One more every so often: 50 a second.
const EVERY: Duration = Duration::from_millis(20);
/// After an answer that took `t` to judge the watch rests for `REST * t`: a fifth of a core at
/// the most, however large the answers are.
const REST: u32 = 4;

/// A token bucket, and a rest in proportion to the work.
#[derive(Debug)]
pub struct Pace {
    tokens: u32,
    filled: Instant,
}

impl Default for Pace {
    fn default() -> Self {
        Self { tokens: BURST, filled: Instant::now() }
    }
}

impl Pace {
    /// How long to wait before the next question, after an answer that took `work` to judge.
    pub fn next(&mut self, work: Duration) -> Duration {
        let now = Instant::now();
        let earned = now.duration_since(self.filled).as_nanos() / EVERY.as_nanos();
        let room = BURST - self.tokens;
        if earned >= u128::from(room) {
            self.tokens = BURST;
            self.filled = now;
        } else {
            // Less than `room`, which is at most 50.
            let earned = earned as u32;
            self.tokens += earned;
            self.filled += EVERY * earned;
        }
        let rest = work * REST;
        if self.tokens > 0 {
            self.tokens -= 1;
            rest
        } else {
            // The token that comes next is this one's: it is taken when it is there.
            let until = (self.filled + EVERY).saturating_duration_since(now);
            self.filled += EVERY;
            rest.max(until)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_burst_and_then_fifty_a_second() {
        let mut pace = Pace::default();
        let begin = Instant::now();
        for _ in 0..BURST {
            assert_eq!(pace.next(Duration::ZERO), Duration::ZERO);
        }
        for _ in 0..100 {
            tokio::time::sleep(pace.next(Duration::ZERO)).await;
        }
        let took = begin.elapsed();
        assert!(took >= Duration::from_millis(1990) && took <= Duration::from_millis(2200));

        // Idle for long: a burst again, and no more than one.
        tokio::time::sleep(Duration::from_secs(60)).await;
        assert!((0..BURST).all(|_| pace.next(Duration::ZERO).is_zero()));
        assert!(!pace.next(Duration::ZERO).is_zero());
    }

    #[tokio::test(start_paused = true)]
    async fn rests_in_proportion_to_the_work() {
        let mut pace = Pace::default();
        assert_eq!(pace.next(Duration::from_millis(100)), Duration::from_millis(400));
    }
}
