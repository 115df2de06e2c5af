use nginx_sys::{ngx_http_upstream_rr_peer_t as Peer, ngx_http_upstream_rr_peers_t as Peers};
use proptest::prelude::*;

use super::*;
use crate::doubles;
use crate::spec::arrange;
use crate::spec::tests::spec;

/// An upstream as nginx's zone module leaves it: static servers, and perhaps a list of backups.
pub(crate) struct Upstream {
    pub(crate) pool: Box<ngx_slab_pool_t>,
    pub(crate) config: Box<usize>,
    pub(crate) primaries: Box<Peers>,
    pub(crate) backups: Option<Box<Peers>>,
    // Boxed: they are linked to each other.
    #[allow(clippy::vec_box)]
    statics: Vec<Box<Peer>>,
    pub(crate) list: List<Peers>,
    /// Requests under way: the peers they hold, which they free.
    held: Vec<*mut Peer>,
}

impl Upstream {
    pub(crate) fn new(statics: Statics, with_backups: bool) -> Self {
        doubles::set_budget(usize::MAX);
        // SAFETY: all of these are structures of numbers and pointers, valid when zero.
        let zeroed = || unsafe { Box::<Peers>::new(core::mem::zeroed()) };
        // SAFETY: as above.
        let mut pool: Box<ngx_slab_pool_t> = unsafe { Box::new(core::mem::zeroed()) };
        let base: *mut ngx_slab_pool_t = &mut *pool;
        pool.start = base.cast::<u8>().wrapping_add(4096);
        pool.end = base.cast::<u8>().wrapping_add(64 * 1024);
        let mut config = Box::new(1);
        let (mut primaries, mut backups) = (zeroed(), with_backups.then(zeroed));
        let mut all = Vec::new();
        let fill = |peers: &mut Peers, count: usize, all: &mut Vec<Box<Peer>>| {
            for n in 0..count {
                // SAFETY: as above.
                let mut peer: Box<Peer> = unsafe { Box::new(core::mem::zeroed()) };
                peer.weight = 1 + n as isize;
                peer.down = n % 2;
                peer.next = peers.peer;
                peers.peer = &mut *peer;
                peers.number += 1;
                peers.total_weight += peer.weight as usize;
                peers.tries += usize::from(peer.down == 0);
                all.push(peer);
            }
            peers.set_weighted(u32::from(peers.total_weight != peers.number));
        };
        fill(&mut primaries, statics.primaries, &mut all);
        if let Some(backups) = &mut backups {
            fill(backups, statics.backups, &mut all);
            primaries.next = &mut **backups;
        }
        let backed = backups.as_ref().is_some_and(|backups| backups.number > 0);
        primaries.set_single(u32::from(primaries.number == 1 && !backed));
        for peers in [Some(&mut primaries), backups.as_mut()].into_iter().flatten() {
            peers.shpool = base;
            peers.config = &mut *config;
        }
        // SAFETY: the lists live in boxes as long as this value.
        let list = unsafe { List::new(&mut *primaries, statics) };
        let held = Vec::new();
        Self { pool, config, primaries, backups, statics: all, list, held }
    }

    pub(crate) fn statics(&self) -> Statics {
        self.list.statics
    }

    pub(crate) fn peers(list: &Peers) -> Vec<*mut Peer> {
        let first = core::ptr::NonNull::new(list.peer);
        // SAFETY: the links are those of the list.
        std::iter::successors(first, |peer| core::ptr::NonNull::new(unsafe { peer.as_ref().next }))
            .map(|peer| peer.as_ptr())
            .collect()
    }

    /// The peers after the static ones, read back.
    fn ours(&self, list: &Peers, statics: usize) -> Vec<(Label, SocketAddr, Attributes)> {
        Self::peers(list)[statics..]
            .iter()
            .map(|peer| {
                // SAFETY: a live peer of ours.
                let (label, address, attributes) = unsafe { zone::read(*peer) };
                (label.unwrap(), address.unwrap(), attributes)
            })
            .collect()
    }

    /// Checks everything that can be seen of both lists against what was wanted.
    pub(crate) fn check(&self, wanted: &[Spec]) {
        assert!(doubles::unlocked());
        assert_eq!(arrange(self.list.present()), wanted, "what another process would find");
        let of = |backup: bool| {
            let specs = wanted.iter().filter(move |spec| spec.backup == backup);
            specs.map(|s| (s.label.clone(), s.address, s.attributes)).collect::<Vec<_>>()
        };
        assert_eq!(self.ours(&self.primaries, self.list.statics.primaries), of(false));
        if let Some(backups) = &self.backups {
            assert_eq!(self.ours(backups, self.list.statics.backups), of(true));
        }
        self.check_numbers();
    }

    /// Checks what nginx counts along against what is in the lists.
    pub(crate) fn check_numbers(&self) {
        let backups = self.backups.as_ref().map_or(0, |list| Self::peers(list).len());
        for (list, backups) in
            [(Some(&self.primaries), backups), (self.backups.as_ref(), usize::MAX)]
        {
            let Some(list) = list else { continue };
            // SAFETY: live peers.
            let all: Vec<&Peer> = Self::peers(list).iter().map(|p| unsafe { &**p }).collect();
            assert_eq!(list.number, all.len());
            assert_eq!(list.total_weight, all.iter().map(|p| p.weight as usize).sum::<usize>());
            assert_eq!(list.tries, all.iter().filter(|p| p.down == 0).count());
            assert_eq!(list.weighted() != 0, list.total_weight != list.number);
            assert_eq!(list.single() != 0, all.len() == 1 && backups == 0);
            assert!(all.iter().all(|p| p.zombie() == 0));
        }
    }

    /// A request takes the peer at `place`, as a balancer does.
    fn hold(&mut self, place: usize) {
        let peers = Self::peers(&self.primaries);
        if let Some(peer) = peers.get(place + self.list.statics.primaries) {
            // SAFETY: a live peer.
            unsafe { (**peer).refs += 1 };
            self.held.push(*peer);
        }
    }

    /// All requests end; the last one frees a zombie, as `ngx_http_upstream_rr_peer_unref` does.
    fn release(&mut self) {
        for peer in std::mem::take(&mut self.held) {
            // SAFETY: it was held, so it is alive.
            unsafe {
                (*peer).refs -= 1;
                if (*peer).refs == 0 && (*peer).zombie() != 0 {
                    zone::free(&mut *self.pool, [peer]);
                }
            }
        }
    }
}

fn ids(changed: &[Changed]) -> Vec<&str> {
    changed.iter().map(|changed| changed.label.id()).collect()
}

pub(crate) const NONE: Statics = Statics { primaries: 0, backups: 0 };

#[test]
fn adds_removes_and_changes_in_one_edit() {
    let mut up = Upstream::new(NONE, false);
    let first = [spec("a", 1), spec("b", 2)];
    let change = up.list.apply(&first).unwrap();
    assert_eq!(ids(&change.added), ["a", "b"]);
    up.check(&first);
    assert_eq!(*up.config, 2, "one change for the whole batch");

    let mut heavy = spec("b", 2);
    heavy.attributes =
        Attributes { weight: 7, max_conns: 8, max_fails: 9, fail_timeout: 10, down: true };
    let second = [heavy, spec("c", 3)];
    let change = up.list.apply(&second).unwrap();
    assert_eq!((ids(&change.added), ids(&change.removed)), (vec!["c"], vec!["a"]));
    assert_eq!(ids(&change.changed), ["b"]);
    up.check(&second);
    assert_eq!(*up.config, 3);

    assert!(up.list.apply(&second).unwrap().is_empty());
    assert_eq!(*up.config, 3, "nothing to do is no change");

    up.list.apply(&[]).unwrap();
    up.check(&[]);
    assert_eq!(doubles::live(), 0);
}

#[test]
fn names_and_addresses_are_nginxs() {
    let mut up = Upstream::new(NONE, false);
    let v6 = Spec { address: "[::1]:8080".parse().unwrap(), ..spec("b", 1) };
    up.list.apply(&[spec("a", 80), v6]).unwrap();
    let texts: Vec<_> = Upstream::peers(&up.primaries)
        .into_iter()
        // SAFETY: live peers, whose texts have the lengths that they say.
        .map(|peer| unsafe {
            ((*peer).name.as_bytes().to_vec(), (*peer).server.as_bytes().to_vec())
        })
        .collect();
    for (texts, address) in texts.into_iter().zip(["10.0.0.1:80", "[::1]:8080"]) {
        assert_eq!(texts, (address.into(), address.into()));
    }
    up.list.apply(&[]).unwrap();
}

#[test]
fn large_weights_are_divided_where_no_static_server_stands_beside() {
    let heavy = |id, port, backup, weight| {
        let mut spec = Spec { backup, ..spec(id, port) };
        spec.attributes.weight = weight;
        spec
    };
    let wanted =
        [heavy("a", 1, false, 30_000), heavy("b", 2, false, 1), heavy("c", 3, true, 9_000)];
    let mut up = Upstream::new(NONE, true);
    let change = up.list.apply(&wanted).unwrap();
    assert_eq!(change.divisor, Some(2));
    let divided =
        [heavy("a", 1, false, 15_000), heavy("b", 2, false, 1), heavy("c", 3, true, 9_000)];
    up.check(&divided);
    assert!(up.list.apply(&wanted).unwrap().is_empty(), "the same set again is no change");
    let change = up.list.apply(&wanted[1..]).unwrap();
    assert_eq!((change.divisor, change.removed.len(), change.changed.len()), (None, 1, 0));
    up.list.apply(&[]).unwrap();

    let mut up = Upstream::new(Statics { primaries: 1, backups: 0 }, true);
    assert_eq!(up.list.apply(&wanted).unwrap().divisor, None);
    up.check(&wanted);
    up.list.apply(&[]).unwrap();
}

#[test]
fn static_servers_stay_the_first_ones() {
    let mut up = Upstream::new(Statics { primaries: 2, backups: 1 }, true);
    let wanted = [spec("a", 1), Spec { backup: true, ..spec("b", 2) }];
    up.list.apply(&wanted).unwrap();
    up.check(&wanted);
    up.list.apply(&[]).unwrap();
    up.check(&[]);
    assert_eq!(Upstream::peers(&up.primaries).len(), 2);
    assert_eq!(up.statics.len(), 3);
}

#[test]
fn single_depends_on_the_backups() {
    let mut up = Upstream::new(NONE, true);
    let primary = spec("a", 1);
    let backup = Spec { backup: true, ..spec("b", 2) };
    for wanted in [
        vec![primary.clone()],
        vec![primary.clone(), backup.clone()],
        vec![primary],
        vec![backup],
        vec![],
    ] {
        up.list.apply(&wanted).unwrap();
        up.check(&wanted);
    }
}

#[test]
fn backups_need_a_list() {
    let mut up = Upstream::new(NONE, false);
    let backup = Spec { backup: true, ..spec("b", 2) };
    assert_eq!(up.list.apply(&[backup]), Err(Refused::NoBackups));
}

#[test]
fn a_peer_in_use_is_freed_by_its_last_request() {
    let mut up = Upstream::new(NONE, false);
    up.list.apply(&[spec("a", 1), spec("b", 2)]).unwrap();
    up.hold(0);
    up.hold(0);
    let live = doubles::live();
    up.list.apply(&[spec("b", 2)]).unwrap();
    up.check(&[spec("b", 2)]);
    assert_eq!(doubles::live(), live, "a request holds it");
    // The instance comes back meanwhile: another peer.
    up.list.apply(&[spec("a", 1), spec("b", 2)]).unwrap();
    up.check(&[spec("a", 1), spec("b", 2)]);
    up.release();
    assert_eq!(doubles::live(), live);
    up.list.apply(&[]).unwrap();
    assert_eq!(doubles::live(), 0);
}

#[test]
fn sessions_are_to_end_with_a_peer_that_goes_and_does_not_drain() {
    let mut up = Upstream::new(NONE, true);
    // The zone has no end here: what is in it lies anywhere.
    up.pool.end = core::ptr::without_provenance_mut(usize::MAX);
    let all = [spec("drains", 1), spec("goes", 2), spec("moves", 3), spec("stays", 4)];
    up.list.apply(&all).unwrap();
    (0..all.len()).for_each(|place| up.hold(place));
    let ends = |label: &Label| label.id() != "drains";
    let moved = Spec { backup: true, ..spec("moves", 3) };
    let left = [moved, spec("stays", 4)];
    up.list.apply_ending(&left, Some(&ends), &()).unwrap();
    up.check(&left);
    let end = up.pool.end.cast_const();
    let marked = up.held.iter().map(|peer| {
        // SAFETY: it is held, so it is alive.
        unsafe { Meter::of(*peer, end) }.unwrap().ends_sessions()
    });
    assert_eq!(marked.collect::<Vec<_>>(), [false, true, false, false]);
    up.release();
    up.list.apply(&[]).unwrap();
    assert_eq!(doubles::live(), 0);
}

#[test]
fn what_failures_took_from_a_weight_stays_taken() {
    let mut up = Upstream::new(NONE, false);
    let with = |weight| {
        let mut spec = spec("a", 1);
        spec.attributes.weight = weight;
        [spec]
    };
    up.list.apply(&with(10)).unwrap();
    let peer = up.primaries.peer;
    // SAFETY: the peer stays the same one.
    let effective = |set: Option<isize>| unsafe {
        if let Some(weight) = set {
            (*peer).effective_weight = weight;
        }
        (*peer).effective_weight
    };
    assert_eq!(effective(None), 10);
    up.list.apply(&with(20)).unwrap();
    assert_eq!(effective(None), 20, "whole before, whole after");
    effective(Some(5));
    up.list.apply(&with(30)).unwrap();
    assert_eq!(effective(None), 5);
    up.list.apply(&with(2)).unwrap();
    assert_eq!(effective(None), 2, "never more than the weight");
    up.list.apply(&[]).unwrap();
}

#[test]
fn a_full_zone_keeps_the_old_set_whatever_allocation_fails() {
    let mut up = Upstream::new(NONE, true);
    let old = [spec("a", 1), spec("b", 2)];
    up.list.apply(&old).unwrap();
    let (live, config) = (doubles::live(), *up.config);
    let new = [spec("b", 2), spec("c", 3), Spec { backup: true, ..spec("d", 4) }];
    for budget in 0..8 {
        doubles::set_budget(budget);
        let refused = up.list.apply(&new).unwrap_err();
        let Refused::Full(full) = refused else { panic!("{refused}") };
        assert_eq!(full.size, 64 * 1024);
        assert!(full.needed > 64, "{full}");
        up.check(&old);
        assert_eq!((doubles::live(), *up.config), (live, config), "budget {budget}");
    }
    doubles::set_budget(usize::MAX);
    up.list.apply(&new).unwrap();
    up.check(&new);
    up.list.apply(&[]).unwrap();
    assert_eq!(doubles::live(), 0);
}

#[test]
fn the_size_named_counts_sessions() {
    let mut up = Upstream::new(NONE, false);
    up.list.apply(&[spec("a", 1), spec("b", 2)]).unwrap();
    let first = Upstream::peers(&up.primaries)[0];
    let mut session = [0u8; 3000];
    let mut needed = |len: i32| {
        // SAFETY: a live peer; the session is taken back before anybody frees it.
        unsafe {
            (*first).ssl_session = session.as_mut_ptr().cast();
            (*first).ssl_session_len = len;
        }
        doubles::set_budget(0);
        let new = [spec("a", 1), spec("b", 2), spec("c", 3), spec("d", 4)];
        let Refused::Full(full) = up.list.apply(&new).unwrap_err() else { panic!("not full") };
        doubles::set_budget(usize::MAX);
        // SAFETY: as above.
        unsafe { (*first).ssl_session = core::ptr::null_mut() };
        full.needed
    };
    // Of the four only the first has one; a session of more than half a page takes whole pages.
    let (small, large) = (needed(8), needed(30_000));
    assert!(large >= small + 3 * 32 - 64 && large <= small + 3 * 32 + 64, "{small} {large}");
    up.list.apply(&[]).unwrap();
}

pub(crate) fn sets() -> impl Strategy<Value = Vec<Vec<Spec>>> {
    let one = (0..8u8, 1..10u16, 1..4u32, any::<(bool, bool)>()).prop_map(
        |(id, port, weight, (backup, down))| {
            let mut spec = Spec { backup, ..spec(&id.to_string(), port) };
            spec.attributes.weight = weight;
            spec.attributes.down = down;
            spec
        },
    );
    proptest::collection::vec(proptest::collection::vec(one, 0..12).prop_map(arrange), 1..12)
}

proptest! {
    /// Whatever the sequence of sets, whatever requests hold: after every step the lists are what
    /// was wanted, the counters are those of a recount, and at the end nothing is left.
    #[test]
    fn any_sequence_of_sets(
        sets in sets(),
        statics in (0..3usize, 0..3usize),
        holds in proptest::collection::vec(0..12usize, 12),
        budgets in proptest::collection::vec(proptest::option::of(0..40usize), 12),
    ) {
        let statics = Statics { primaries: statics.0, backups: statics.1 };
        let mut up = Upstream::new(statics, true);
        let mut current = Vec::new();
        for ((set, hold), budget) in sets.iter().zip(holds).zip(budgets) {
            doubles::set_budget(budget.unwrap_or(usize::MAX));
            match up.list.apply(set) {
                Ok(_) => current = set.clone(),
                Err(refused) => prop_assert!(matches!(refused, Refused::Full(_))),
            }
            up.check(&current);
            up.hold(hold);
            if hold == 0 {
                up.release();
            }
        }
        up.release();
        up.list.apply(&[]).unwrap();
        up.check(&[]);
        prop_assert_eq!(doubles::live(), 0);
    }
}
