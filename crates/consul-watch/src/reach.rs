//! Whether an agent can be reached at all.
//!
//! While it cannot, one prober asks it twice a second for a trifle, and whoever waits is woken when
//! it answers: a thousand watches need not find that out each by itself, nor wait for as long as
//! their own back-off has grown meanwhile.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::about::About;

/// How often an agent that is away is asked.
pub(crate) const EVERY: Duration = Duration::from_millis(500);

/// How long a prober waits for an answer.
pub(crate) const PROBE: Duration = Duration::from_secs(2);

/// What a failed probe says is believed for this long: the prober that would say otherwise may be
/// gone.
const BELIEVED: Duration = Duration::from_secs(5);

/// What is known of one agent.
#[derive(Debug, Default)]
pub(crate) struct Reach(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    probing: bool,
    down: Option<(Instant, String)>,
    about: Option<About>,
    acls_off: bool,
    warned: bool,
}

/// What one probe found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Probe {
    /// It answers, and knows a leader.
    Well,
    /// It answers, and has nobody to ask.
    Leaderless,
    /// It does not answer, and why.
    Down(String),
}

impl Reach {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Why it need not be asked: the prober has just tried in vain.
    pub(crate) fn is_down(&self) -> Option<String> {
        let state = self.lock();
        let (at, text) = state.down.as_ref()?;
        (at.elapsed() < BELIEVED).then(|| text.clone())
    }

    /// A prober's begin: false if there is one already.
    pub(crate) fn begin_probing(&self) -> bool {
        !std::mem::replace(&mut self.lock().probing, true)
    }

    /// A prober's end.
    pub(crate) fn end_probing(&self) {
        self.lock().probing = false;
    }

    /// What the prober found.
    pub(crate) fn found(&self, probe: &Probe) {
        let mut state = self.lock();
        match probe {
            Probe::Down(text) => state.down = Some((Instant::now(), text.clone())),
            Probe::Well | Probe::Leaderless => state.down = None,
        }
    }

    /// A connection broke: it may be another agent that listens there next.
    pub(crate) fn forget(&self) {
        let mut state = self.lock();
        state.about = None;
        state.acls_off = false;
    }

    /// What it said of itself.
    pub(crate) fn about(&self) -> Option<About> {
        self.lock().about.clone()
    }

    /// It said this of itself.
    pub(crate) fn learn(&self, about: About) {
        self.lock().about = Some(about);
    }

    /// It has no ACLs: nothing is hidden.
    pub(crate) fn acls_are_off(&self) -> bool {
        self.lock().acls_off
    }

    /// It said that it has no ACLs.
    pub(crate) fn learn_acls_off(&self) {
        self.lock().acls_off = true;
    }

    /// Whether this is the first warning about it.
    pub(crate) fn first_warning(&self) -> bool {
        !std::mem::replace(&mut self.lock().warned, true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_failed_probe_is_believed_for_a_while() {
        let reach = Reach::default();
        assert_eq!(reach.is_down(), None);
        reach.found(&Probe::Down("refused".into()));
        assert_eq!(reach.is_down().as_deref(), Some("refused"));
        tokio::time::advance(BELIEVED).await;
        assert_eq!(reach.is_down(), None);
        reach.found(&Probe::Down("refused".into()));
        reach.found(&Probe::Leaderless);
        assert_eq!(reach.is_down(), None);
    }

    #[test]
    fn one_prober_at_a_time() {
        let reach = Reach::default();
        assert!(reach.begin_probing());
        assert!(!reach.begin_probing());
        reach.end_probing();
        assert!(reach.begin_probing());
    }
}
