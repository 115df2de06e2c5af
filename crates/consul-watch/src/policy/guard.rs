//! Losses that look like an accident are held back for a while.
//!
//! A restarted agent marks all its instances critical until their checks have run, and a script
//! with a typing error deregisters everything at once. What an answer takes out in such a way
//! goes on serving for the time of `hold`, and is let go when Consul, asked again, still says so.
//!
//! Maintenance is somebody's word: it is never held, and never counted as a loss. Additions are
//! never held either.

use std::collections::BTreeSet;
use std::mem::swap;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::{Excluded, KeptBy, Peer, Reason, Selection, Verdict};

/// When a loss is held back, and for how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// In percent: an update after which at most 100 − `guard` percent as many instances would
    /// serve as before is held.
    pub guard: u8,
    /// For this long; zero is never.
    pub hold: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self { guard: 100, hold: Duration::from_secs(30) }
    }
}

impl Settings {
    /// Whether so many are too few, where `before` served.
    fn loses(&self, before: usize, after: usize) -> bool {
        after < before && after * 100 <= before * usize::from(100 - self.guard.min(100))
    }
}

/// By what an instance is known: node and service ID.
pub type Key = (String, String);

/// What serves, and what of it only because it is held.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Serving {
    /// The peers, in the order of node and service ID.
    pub peers: Vec<Arc<Peer>>,
    /// Those among them that Consul would have gone.
    pub held: BTreeSet<Key>,
    /// When to ask Consul again whether they are to go.
    pub until: Option<Instant>,
    /// What was held is let go: its time is over, and Consul still says so.
    pub honoured: bool,
}

/// The memory of one line: what served before, and since when something is held.
#[derive(Debug, Default)]
pub struct Guard {
    settings: Settings,
    served: Vec<Arc<Peer>>,
    hold: Option<Hold>,
}

#[derive(Debug)]
struct Hold {
    until: Instant,
    /// What served when the loss came: what a later answer is measured by.
    before: Vec<Arc<Peer>>,
}

/// In the order of node and service ID. Two registrations can have both in common; the later one
/// counts.
fn in_order(mut peers: Vec<Arc<Peer>>) -> Vec<Arc<Peer>> {
    peers.sort_by(|a, b| a.name().cmp(&b.name()));
    peers.dedup_by(|later, earlier| {
        let is_same = later.name() == earlier.name();
        if is_same {
            swap(later, earlier);
        }
        is_same
    });
    peers
}

impl Guard {
    /// A guard that has seen nothing yet.
    pub fn new(settings: Settings) -> Self {
        Self { settings, ..Self::default() }
    }

    /// Judges an answer: what serves now.
    pub fn judge(&mut self, verdict: &Verdict, now: Instant) -> Serving {
        let mut serving = in_order(verdict.serve.clone());
        // Whatever is put into maintenance ends to count, also while something is held.
        let maintained: BTreeSet<(&str, &str)> = verdict
            .excluded
            .iter()
            .filter(|excluded| excluded.reason == Reason::Maintenance)
            .map(|Excluded { key: (node, id), .. }| (node.as_str(), id.as_str()))
            .collect();
        let mut before = match &self.hold {
            Some(hold) => hold.before.clone(),
            None => self.served.clone(),
        };
        before.retain(|peer| !maintained.contains(&peer.name()));

        let loses =
            !self.settings.hold.is_zero() && self.settings.loses(before.len(), serving.len());
        let until = match &self.hold {
            Some(hold) => hold.until,
            None => now + self.settings.hold,
        };
        let mut held = BTreeSet::new();
        if loses && now < until {
            // One that was replaced at its address is gone: two instances cannot listen there.
            let taken: BTreeSet<_> =
                serving.iter().flat_map(|peer| peer.addresses.iter().copied()).collect();
            let there: BTreeSet<_> = serving.iter().map(|peer| peer.name()).collect();
            let gone = before.iter().filter(|peer| !there.contains(&peer.name()));
            let kept: Vec<Arc<Peer>> = gone
                .map(|peer| Peer { kept_by: Some(KeptBy::Guard), ..(**peer).clone() })
                .filter_map(|mut peer| {
                    peer.addresses.retain(|address| !taken.contains(address));
                    (!peer.addresses.is_empty()).then(|| Arc::new(peer))
                })
                .collect();
            held.extend(kept.iter().map(|peer| peer.key()));
            serving.extend(kept);
            serving = in_order(serving);
        }
        let honoured = loses && self.hold.is_some() && now >= until;
        self.hold = (!held.is_empty()).then_some(Hold { until, before });
        self.served.clone_from(&serving);
        let until = self.hold.as_ref().map(|hold| hold.until);
        Serving { peers: serving, held, until, honoured }
    }

    /// Takes over what served before this process did, so that the first answer is judged, too.
    pub fn restore(&mut self, peers: impl IntoIterator<Item = Arc<Peer>>) {
        self.served = in_order(peers.into_iter().collect());
    }
}

impl Selection {
    /// A guard for this line.
    pub fn guard(&self) -> Guard {
        Guard::new(self.guard)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::instance::Status;

    const HOLD: Duration = Duration::from_secs(30);

    fn peer(id: u8) -> Peer {
        Peer {
            node: "n".into(),
            id: id.to_string(),
            addresses: vec![([10, 0, 0, id], 80).into()],
            weight: 1,
            overrides: Default::default(),
            ignored: Vec::new(),
            status: Status::Passing,
            kept_by: None,
        }
    }

    fn verdict(serve: &[u8], maintained: &[u8]) -> Verdict {
        let excluded = |id: &u8| Excluded { key: peer(*id).key(), reason: Reason::Maintenance };
        Verdict {
            serve: serve.iter().map(|id| peer(*id).into()).collect(),
            excluded: maintained.iter().map(excluded).collect(),
            panic: false,
        }
    }

    fn ids(serving: &Serving) -> (Vec<u8>, Vec<u8>) {
        let id = |text: &str| text.parse().unwrap();
        let mut all: Vec<u8> = serving.peers.iter().map(|peer| id(&peer.id)).collect();
        all.sort_unstable();
        (all, serving.held.iter().map(|key| id(&key.1)).collect())
    }

    struct Line(Guard, Instant);

    impl Line {
        fn new(guard: u8, hold: Duration) -> Self {
            Self(Guard::new(Settings { guard, hold }), Instant::now())
        }
        /// An answer so many seconds after the begin.
        fn at(&mut self, seconds: u64, serve: &[u8], maintained: &[u8]) -> (Vec<u8>, Vec<u8>) {
            let now = self.1 + Duration::from_secs(seconds);
            ids(&self.0.judge(&verdict(serve, maintained), now))
        }
    }

    fn all(serve: &[u8]) -> (Vec<u8>, Vec<u8>) {
        (serve.to_vec(), Vec::new())
    }

    #[test]
    fn a_mass_deregistration_is_held_and_then_honoured() {
        let mut line = Line::new(100, HOLD);
        assert_eq!(line.at(0, &[1, 2, 3], &[]), all(&[1, 2, 3]));
        assert_eq!(line.at(1, &[], &[]), (vec![1, 2, 3], vec![1, 2, 3]));
        assert_eq!(line.at(20, &[], &[]), (vec![1, 2, 3], vec![1, 2, 3]), "a second bad answer");
        assert_eq!(
            line.at(31, &[], &[]),
            all(&[]),
            "30 s after the loss, not after the last answer"
        );
        assert_eq!(line.at(32, &[4], &[]), all(&[4]));
    }

    #[test]
    fn what_is_let_go_is_said_once() {
        let selection =
            Selection { guard: Settings { guard: 50, hold: HOLD }, ..Selection::default() };
        let (mut guard, begin) = (selection.guard(), Instant::now());
        let mut honoured = |seconds, serve: &[u8]| {
            guard.judge(&verdict(serve, &[]), begin + Duration::from_secs(seconds)).honoured
        };
        assert!(!honoured(0, &[1, 2, 3, 4]));
        assert!(!honoured(1, &[1]), "held");
        assert!(!honoured(2, &[1, 2, 3]), "the good answer");
        assert!(!honoured(3, &[1]), "held again");
        assert!(!honoured(32, &[]), "held still");
        assert!(honoured(33, &[1]), "let go");
        assert!(!honoured(34, &[1]), "there is nothing to let go any more");
        // However late: without a hold there is nothing either.
        assert!(!honoured(100, &[]));
    }

    #[test]
    fn the_good_answer_ends_it() {
        let mut line = Line::new(100, HOLD);
        line.at(0, &[1, 2], &[]);
        line.at(1, &[], &[]);
        assert_eq!(line.at(2, &[1, 2], &[]), all(&[1, 2]));
        // A new loss has a time of its own.
        line.at(40, &[], &[]);
        assert_eq!(line.at(60, &[], &[]), (vec![1, 2], vec![1, 2]));
    }

    #[test]
    fn additions_are_live_at_once_and_end_a_total_loss() {
        let mut line = Line::new(100, HOLD);
        line.at(0, &[1, 2, 3, 4], &[]);
        line.at(1, &[], &[]);
        assert_eq!(line.at(2, &[9], &[]), all(&[9]), "no longer empty");
        let mut line = Line::new(50, HOLD);
        line.at(0, &[1, 2, 3, 4], &[]);
        assert_eq!(line.at(1, &[1, 9], &[]), (vec![1, 2, 3, 4, 9], vec![2, 3, 4]));
        assert_eq!(line.at(2, &[1, 9, 8], &[]), all(&[1, 8, 9]), "three of four are enough");
    }

    #[test]
    fn the_share_decides() {
        let mut line = Line::new(50, HOLD);
        line.at(0, &[1, 2, 3, 4], &[]);
        assert_eq!(line.at(1, &[1, 2, 3], &[]), all(&[1, 2, 3]));
        let mut line = Line::new(50, HOLD);
        line.at(0, &[1, 2, 3, 4], &[]);
        assert_eq!(line.at(1, &[1, 2], &[]), (vec![1, 2, 3, 4], vec![3, 4]), "at most half");
        let mut line = Line::new(100, HOLD);
        line.at(0, &[1, 2, 3, 4], &[]);
        assert_eq!(line.at(1, &[1], &[]), all(&[1]), "by default only the last ones count");
        let mut line = Line::new(0, HOLD);
        line.at(0, &[1, 2], &[]);
        assert_eq!(line.at(1, &[1], &[]), (vec![1, 2], vec![2]), "every loss");
    }

    #[test]
    fn a_swap_of_all_is_no_loss() {
        let mut line = Line::new(100, HOLD);
        line.at(0, &[1, 2], &[]);
        assert_eq!(line.at(1, &[3, 4], &[]), all(&[3, 4]));
        let mut line = Line::new(0, HOLD);
        line.at(0, &[1, 2], &[]);
        assert_eq!(line.at(1, &[3, 4], &[]), all(&[3, 4]));
    }

    #[test]
    fn maintenance_is_never_held_nor_counted() {
        let mut line = Line::new(100, HOLD);
        line.at(0, &[1, 2], &[]);
        assert_eq!(line.at(1, &[], &[1, 2]), all(&[]), "a scale to nothing by an operator");
        let mut line = Line::new(100, HOLD);
        line.at(0, &[1, 2], &[]);
        assert_eq!(line.at(1, &[], &[1]), (vec![2], vec![2]), "the other one is a loss");
        // Of those held, one is put into maintenance: it goes at once.
        let mut line = Line::new(100, HOLD);
        line.at(0, &[1, 2], &[]);
        line.at(1, &[], &[]);
        assert_eq!(line.at(2, &[], &[2]), (vec![1], vec![1]));
        assert_eq!(line.at(3, &[], &[1, 2]), all(&[]));
    }

    #[test]
    fn no_hold_honours_at_once() {
        let mut line = Line::new(100, Duration::ZERO);
        line.at(0, &[1], &[]);
        assert_eq!(line.at(1, &[], &[]), all(&[]));
    }

    #[test]
    fn one_that_was_replaced_at_its_address_is_not_held() {
        let mut guard = Guard::new(Settings { guard: 50, hold: HOLD });
        let now = Instant::now();
        guard.judge(&verdict(&[1, 2], &[]), now);
        let mut new = peer(9);
        new.addresses = peer(1).addresses;
        let serving = guard.judge(&Verdict { serve: vec![new.into()], ..Verdict::default() }, now);
        assert_eq!(ids(&serving), (vec![2, 9], vec![2]));
    }

    #[test]
    fn of_two_of_one_name_the_later_one_counts() {
        let mut guard = Guard::new(Settings { guard: 100, hold: HOLD });
        let later = Peer { addresses: peer(9).addresses, ..peer(1) };
        let all = [peer(2), peer(1), later.clone(), peer(0)].map(Arc::new);
        let serving =
            guard.judge(&Verdict { serve: all.to_vec(), ..Verdict::default() }, Instant::now());
        let all: Vec<Peer> = serving.peers.iter().map(|peer| (**peer).clone()).collect();
        assert_eq!(all, [peer(0), later, peer(2)]);
    }

    #[test]
    fn what_was_restored_is_guarded_too() {
        let mut line = Line::new(100, HOLD);
        line.0.restore([peer(1).into()]);
        assert_eq!(line.at(0, &[], &[]), (vec![1], vec![1]));
    }

    proptest! {
        /// Whatever the answers: what Consul says serves, serves; nothing in maintenance does;
        /// and an answer that would empty the line empties it only after the hold.
        #[test]
        fn held_but_never_longer(
            guard in 0..=100u8,
            answers in proptest::collection::vec(
                (proptest::collection::vec((0..6u8, 0..3u8), 0..8), 0..20u64), 1..20),
        ) {
            let mut line = Guard::new(Settings { guard, hold: HOLD });
            let mut now = Instant::now();
            let mut last = Serving::default();
            for (all, seconds) in answers {
                now += Duration::from_secs(seconds);
                let all: BTreeMap<u8, u8> = all.into_iter().collect();
                let of = |kind| all.iter().filter(|(_, k)| **k == kind).map(|(i, _)| *i).collect::<Vec<_>>();
                let (serve, maintained) = (of(0), of(1));
                let serving = line.judge(&verdict(&serve, &maintained), now);
                let (ids, held) = ids(&serving);
                for id in &serve {
                    prop_assert!(ids.contains(id) && !held.contains(id));
                }
                for id in &maintained {
                    prop_assert!(!ids.contains(id));
                }
                prop_assert_eq!(ids.len(), serve.len() + held.len());
                for peer in &serving.peers {
                    let kept = held.contains(&peer.id.parse().unwrap());
                    prop_assert_eq!(peer.kept_by, kept.then_some(KeptBy::Guard));
                }
                prop_assert_eq!(serving.until.is_some(), !held.is_empty());
                if let Some(until) = serving.until {
                    prop_assert!(now < until && until <= now + HOLD);
                    if let Some(before) = last.until {
                        prop_assert_eq!(until, before, "a hold is not prolonged");
                    }
                }
                last = serving;
            }
        }
    }
}
