use nginx_sys::ngx_http_upstream_rr_peers_t as Peers;

use super::*;
use crate::doubles;
use crate::list::tests::{NONE, Upstream};
use crate::spec::tests::spec;

const WRITE_LOCKED: u64 = u64::MAX;
const PATIENCE: Duration = Duration::from_millis(20);

fn spec_of(id: &str, port: u16, source: u64) -> Spec {
    Spec { label: Label::new("n1", id, source), ..spec(id, port) }
}

/// The old list's zone has no end here: its texts lie anywhere.
fn endless(up: &mut Upstream) {
    up.pool.end = ptr::without_provenance_mut(usize::MAX);
}

fn copied(up: &mut Upstream) -> Option<Copied> {
    let primaries: *mut Peers = &mut *up.primaries;
    // SAFETY: the list lives in a box as long as the upstream.
    let copied = unsafe { copy(primaries, up.statics(), PATIENCE) };
    assert_eq!(up.primaries.rwlock, 0, "the lock was given back");
    copied
}

#[test]
fn peers_are_copied_with_what_became_of_them() {
    let statics = Statics { primaries: 2, backups: 1 };
    let mut old = Upstream::new(statics, true);
    endless(&mut old);
    let mut all = [spec_of("a", 1, 1), spec_of("b", 2, 2), spec_of("c", 3, 1)];
    all[0].attributes =
        Attributes { weight: 7, max_conns: 8, max_fails: 9, fail_timeout: 10, down: true };
    all[2].backup = true;
    old.list.apply(&all).unwrap();
    let history =
        History { fails: 1, accessed: 2, checked: 3, effective_weight: 4, current_weight: -5 };
    // SAFETY: the third peer is the first of ours.
    unsafe { zone::write_history(Upstream::peers(&old.primaries)[2], &history) };

    let carried = copied(&mut old).unwrap().peers(|source| source == 1);
    let specs: Vec<_> = carried.iter().map(|one| one.spec.clone()).collect();
    assert_eq!(specs, [all[0].clone(), all[2].clone()], "the source of the second is not known");
    assert_eq!(carried[0].history, history);

    let mut new = Upstream::new(Statics { primaries: 1, backups: 0 }, true);
    let config = *new.config;
    assert_eq!(new.list.take_over(&carried), Ok(2));
    new.check(&specs);
    assert_ne!(*new.config, config);
    // SAFETY: the second peer is the first of ours.
    let (_, _, seen) = unsafe { zone::read_plain(Upstream::peers(&new.primaries)[1]) };
    assert_eq!(seen, history);

    old.list.apply(&[]).unwrap();
    new.list.apply(&[]).unwrap();
    assert_eq!(doubles::live(), 0);
}

#[test]
fn a_list_that_is_locked_for_good_is_given_up() {
    let mut old = Upstream::new(NONE, false);
    old.primaries.rwlock = WRITE_LOCKED;
    let primaries: *mut Peers = &mut *old.primaries;
    // SAFETY: as above.
    assert!(unsafe { copy(primaries, NONE, PATIENCE) }.is_none());
    assert_eq!(old.primaries.rwlock, WRITE_LOCKED);
}

#[test]
fn without_a_list_of_backups_all_are_primaries() {
    let mut new = Upstream::new(NONE, false);
    let backup = Spec { backup: true, ..spec("a", 1) };
    let carried = Carried { spec: backup.clone(), history: History::default(), counted: None };
    assert_eq!(new.list.take_over(&[carried]), Ok(1));
    new.check(&[Spec { backup: false, ..backup }]);
    new.list.apply(&[]).unwrap();
}

#[test]
fn what_fits_is_taken_primaries_first() {
    let all = [Spec { backup: true, ..spec("a", 1) }, spec("b", 2), spec("c", 3)];
    let carried: Vec<_> = all
        .iter()
        .map(|spec| Carried { spec: spec.clone(), history: History::default(), counted: None })
        .collect();
    let one = {
        let mut new = Upstream::new(NONE, true);
        new.list.take_over(&carried[1..2]).unwrap();
        let one = doubles::live();
        new.list.apply(&[]).unwrap();
        one
    };
    for budget in 0..3 * one {
        let mut new = Upstream::new(NONE, true);
        doubles::set_budget(budget);
        let (taken, full) = new.list.take_over(&carried).unwrap_err();
        assert_eq!((taken, full.size), (budget / one, 64 * 1024));
        let expected: Vec<_> =
            [&all[1], &all[2], &all[0]].into_iter().take(taken).cloned().collect();
        new.check(&crate::spec::arrange(expected));
        new.list.apply(&[]).unwrap();
        assert_eq!(doubles::live(), 0, "budget {budget}");
    }
}

#[test]
fn what_is_no_peer_of_ours_is_left_alone() {
    let mut old = Upstream::new(NONE, false);
    endless(&mut old);
    old.list.apply(&[spec("a", 1), spec("b", 2)]).unwrap();
    let [first, second] = Upstream::peers(&old.primaries)[..] else { panic!("two peers") };
    // SAFETY: live peers; the label of the first is overwritten, the second is as one of resolve's.
    unsafe {
        *(*first).server.data.add((*first).server.len) = 0;
        (*second).host = ptr::dangling_mut();
    }
    assert_eq!(copied(&mut old).unwrap().peers(|_| true), []);
    // SAFETY: as above.
    unsafe { (*second).host = ptr::null_mut() };
    old.list.apply(&[]).unwrap();
}

/// Long texts take another attempt with more room, and never memory while the list is locked.
#[test]
fn nothing_is_allocated_under_the_lock() {
    let mut old = Upstream::new(NONE, false);
    endless(&mut old);
    let all: Vec<Spec> =
        (10..50).map(|n| spec_of(&format!("{n}-{}", "x".repeat(80)), n, 1)).collect();
    old.list.apply(&all).unwrap();
    let copied = copied(&mut old).unwrap();
    assert_eq!(copied.peers.capacity(), 2 * all.len() + 1, "the second attempt");
    assert_eq!(copied.texts.capacity(), copied.peers.capacity() * 2 * TEXT);
    let specs: Vec<_> = copied.peers(|_| true).into_iter().map(|one| one.spec).collect();
    assert_eq!(specs, all);
    old.list.apply(&[]).unwrap();
}
