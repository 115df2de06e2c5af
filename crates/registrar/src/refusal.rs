//! Registrations that the agent has refused: each is tried again by itself, and holds up no other.

use std::collections::BTreeMap;
use std::time::Duration;

use consul_watch::backoff::Backoff;
use consul_watch::error::Retry;
use tokio::time::Instant;

use crate::consul::Error;

/// A person has to do something about the token first.
const DENIED: Duration = Duration::from_secs(30);

#[derive(Debug, Default)]
pub struct Refusals(BTreeMap<String, Refused>);

#[derive(Debug, Default)]
struct Refused {
    /// Of the registration: another one is another try.
    hash: String,
    until: Option<Instant>,
    backoff: Backoff,
    denied: bool,
}

impl Refusals {
    pub fn refused(&mut self, id: &str, hash: &str, error: &Error, now: Instant) {
        let refused = self.0.entry(id.to_owned()).or_default();
        if refused.hash != hash {
            *refused = Refused { hash: hash.to_owned(), ..Refused::default() };
        }
        refused.denied = matches!(error, Error::Denied);
        let wait = if refused.denied { DENIED } else { refused.backoff.next(Retry::BackOff) };
        refused.until = Some(now + wait);
    }

    pub fn accepted(&mut self, id: &str) {
        self.0.remove(id);
    }

    /// Whether it is too early to try this one again.
    pub fn holds(&self, id: &str, hash: &str, now: Instant) -> bool {
        let refused = self.0.get(id).filter(|refused| refused.hash == hash);
        refused.and_then(|refused| refused.until).is_some_and(|until| until > now)
    }

    /// When the next one may be tried again.
    pub fn next_due(&self, now: Instant) -> Option<Instant> {
        self.0.values().filter_map(|refused| refused.until).filter(|until| *until > now).min()
    }

    /// There is another token.
    pub fn forget_denied(&mut self) {
        self.0.retain(|_, refused| !refused.denied);
    }

    /// Only these are still wanted.
    pub fn retain(&mut self, wanted: impl Fn(&str) -> bool) {
        self.0.retain(|id, _| wanted(id));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bad_request() -> Error {
        Error::Status { status: reqwest::StatusCode::BAD_REQUEST, text: String::new() }
    }

    #[tokio::test(start_paused = true)]
    async fn each_backs_off_by_itself() {
        let mut refusals = Refusals::default();
        for _ in 0..20 {
            refusals.refused("a", "1", &bad_request(), Instant::now());
            let due = refusals.next_due(Instant::now()).unwrap_or_else(Instant::now);
            assert!(due - Instant::now() <= Duration::from_secs(10));
            tokio::time::advance(due - Instant::now()).await;
            assert!(!refusals.holds("a", "1", Instant::now()));
        }
        assert!(!refusals.holds("b", "1", Instant::now()));
        refusals.retain(|id| id != "a");
        assert_eq!(refusals.0.len(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_denial_waits_for_another_token() {
        let mut refusals = Refusals::default();
        refusals.refused("a", "1", &Error::Denied, Instant::now());
        refusals.refused("b", "1", &Error::Denied, Instant::now());
        tokio::time::advance(Duration::from_secs(29)).await;
        assert!(refusals.holds("a", "1", Instant::now()));
        assert!(!refusals.holds("a", "2", Instant::now()), "another registration");
        refusals.forget_denied();
        assert!(!refusals.holds("a", "1", Instant::now()));
        assert_eq!(refusals.next_due(Instant::now()), None);
    }
}
