use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};

use nginx_sys::ngx_http_upstream_rr_peers_t as Peers;
use proptest::prelude::*;

use super::*;
use crate::doubles;
use crate::list::Statics;
use crate::list::tests::{NONE, Upstream, sets};
use crate::spec::Spec;
use crate::spec::tests::spec;

/// Ends the edit, as a signal would, at its n-th step.
struct Killer {
    left: Cell<usize>,
    at: Cell<Option<Left>>,
    steps: RefCell<Vec<Step>>,
}

impl Killer {
    fn at(step: usize) -> Self {
        Self { left: Cell::new(step), at: Cell::new(None), steps: RefCell::default() }
    }

    fn note(&self, change: impl FnOnce(Left) -> Left) {
        self.at.set(self.at.get().map(change));
    }
}

impl Journal for Killer {
    fn begin(&self, both: bool) {
        self.at.set(Some(Left { held: false, both }));
    }

    fn held(&self) {
        self.note(|at| Left { held: true, ..at });
    }

    fn release(&self) {
        self.note(|at| Left { held: false, ..at });
    }

    fn end(&self) {
        self.at.set(None);
    }

    fn step(&self, step: Step) {
        self.steps.borrow_mut().push(step);
        match self.left.get() {
            0 => {
                doubles::die();
                std::panic::resume_unwind(Box::new(()))
            }
            left => self.left.set(left - 1),
        }
    }
}

/// Kills an edit at this step, recovers, and checks. Returns whether it was killed at all.
fn killed_at(step: usize, statics: Statics, before: &[Spec], after: &[Spec]) -> bool {
    let mut up = Upstream::new(statics, true);
    up.list.apply(before).unwrap();
    let killer = Killer::at(step);
    let result = catch_unwind(AssertUnwindSafe(|| up.list.apply_noting(after, &killer)));
    let killed = result.is_err();
    let locked: BTreeSet<usize> = doubles::revive().into_iter().collect();
    if let Some(left) = killer.at.get() {
        // nginx's lock words are the doubles' business; these are for the recovery.
        let primaries: *mut Peers = &mut *up.primaries;
        let backups: *mut Peers = &mut **up.backups.as_mut().unwrap();
        for list in [primaries, backups] {
            // SAFETY: live lists.
            let lock = unsafe { &raw mut (*list).rwlock };
            if locked.contains(&lock.addr()) {
                // SAFETY: as above.
                unsafe { word(lock) }.store(WRITE_LOCKED, Ordering::Relaxed);
            }
        }
        let config = *up.config;
        // SAFETY: nobody else has the lists.
        let recovered = unsafe { recover(primaries, left) };
        assert_eq!(recovered, left.held || !locked.is_empty(), "{left:?} {locked:?}");
        assert!(!left.held || *up.config != config);
        assert_eq!((up.primaries.rwlock, up.backups.as_ref().unwrap().rwlock), (0, 0));
    }
    // Whatever is in the list now, the numbers are those of what is in it.
    let present = up.list.present();
    up.check_numbers();
    let stayed = before.iter().filter(|spec| after.iter().any(|other| other == *spec));
    for spec in stayed {
        assert!(present.contains(spec), "{spec:?} was to stay");
    }
    // And the next edit brings it to what was wanted.
    up.list.apply(after).unwrap();
    up.check(after);
    up.list.apply(&[]).unwrap();
    if killed {
        doubles::forget_allocations();
    } else {
        assert_eq!(doubles::live(), 0);
    }
    killed
}

#[test]
fn an_edit_goes_through_all_steps() {
    let mut up = Upstream::new(NONE, true);
    up.list.apply(&[spec("a", 1), spec("b", 2)]).unwrap();
    let mut heavy = spec("b", 2);
    heavy.attributes.weight = 7;
    let killer = Killer::at(usize::MAX);
    let backup = Spec { backup: true, ..spec("c", 3) };
    up.list.apply_noting(&[heavy, backup], &killer).unwrap();
    let mut steps = killer.steps.borrow().clone();
    steps.dedup();
    let all: BTreeSet<usize> = steps.iter().map(|step| *step as usize).collect();
    assert_eq!(all.len(), Step::ALL.len(), "{steps:?}");
    up.list.apply(&[]).unwrap();
    assert_eq!(doubles::live(), 0);
}

/// A lock that somebody alive has is left to them.
#[test]
fn a_lock_that_moves_is_not_taken_away() {
    let mut up = Upstream::new(NONE, false);
    up.primaries.rwlock = 3;
    let primaries: *mut Peers = &mut *up.primaries;
    // SAFETY: nobody else has the list.
    assert!(!unsafe { recover(primaries, Left { held: false, both: false }) });
    assert_eq!(up.primaries.rwlock, 3, "readers");
}

/// A link that makes a ring, which no edit of ours makes, does not make the count endless.
#[test]
fn a_ring_is_cut() {
    let mut up = Upstream::new(NONE, false);
    up.list.apply(&[spec("a", 1), spec("b", 2)]).unwrap();
    let [first, second] = Upstream::peers(&up.primaries)[..] else { panic!("two peers") };
    // SAFETY: live peers.
    unsafe { (*second).next = first };
    let primaries: *mut Peers = &mut *up.primaries;
    // SAFETY: nobody else has the list.
    assert!(unsafe { recover(primaries, Left { held: true, both: false }) });
    assert!(up.primaries.number > 0);
    // SAFETY: live peers.
    unsafe { (*second).next = core::ptr::null_mut() };
    up.list.apply(&[]).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn killed_at_any_step(sets in sets(), statics in (0..3usize, 0..3usize)) {
        let statics = Statics { primaries: statics.0, backups: statics.1 };
        for pair in sets.windows(2).take(2) {
            let mut step = 0;
            while killed_at(step, statics, &pair[0], &pair[1]) {
                step += 1;
            }
        }
    }
}
