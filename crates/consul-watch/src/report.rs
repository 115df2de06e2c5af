//! What is worth a log line: an error once a minute for each cause, a recovery once.

use std::time::Duration;

use tokio::time::Instant;

use crate::error::{Cause, Error};

/// The same cause is not logged again within this time.
const REPEAT: Duration = Duration::from_secs(60);

/// The errors of one watch, as one upstream's log tells them.
#[derive(Debug, Default)]
pub struct Report {
    since: Option<Instant>,
    logged: Vec<(Cause, Instant)>,
}

impl Report {
    /// An error: whether it is worth a line.
    pub fn failed(&mut self, error: &Error) -> bool {
        let now = Instant::now();
        self.since.get_or_insert(now);
        let cause = error.cause();
        match self.logged.iter_mut().find(|(logged, _)| *logged == cause) {
            Some((_, at)) if now.duration_since(*at) < REPEAT => return false,
            Some((_, at)) => *at = now,
            None => self.logged.push((cause, now)),
        }
        true
    }

    /// A good answer: after errors, for how long there was none.
    pub fn answered(&mut self) -> Option<Duration> {
        // The times of the lines stay: a link that comes and goes every second is one line a
        // minute, too.
        self.since.take().map(|since| since.elapsed())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn one_line_a_minute_for_each_cause() {
        let mut report = Report::default();
        assert_eq!(report.answered(), None);
        assert!(report.failed(&Error::Timeout));
        assert!(!report.failed(&Error::Transport("refused".into())));
        assert!(report.failed(&Error::Denied));
        tokio::time::advance(Duration::from_secs(59)).await;
        assert!(!report.failed(&Error::Timeout));
        tokio::time::advance(Duration::from_secs(1)).await;
        assert!(report.failed(&Error::Timeout));
    }

    #[tokio::test(start_paused = true)]
    async fn recovery_says_for_how_long() {
        let mut report = Report::default();
        report.failed(&Error::Timeout);
        tokio::time::advance(Duration::from_secs(5)).await;
        report.failed(&Error::Timeout);
        tokio::time::advance(Duration::from_secs(5)).await;
        assert_eq!(report.answered(), Some(Duration::from_secs(10)));
        assert_eq!(report.answered(), None);
        assert!(!report.failed(&Error::Timeout), "still the same minute");
    }
}
