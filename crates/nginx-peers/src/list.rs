//! The edit of a list: everything is prepared before the lock, and inside it only pointers and
//! numbers are stored.
//!
//! nginx does not release a list's lock when the worker that holds it is killed, and requests of
//! all workers wait for it. So no memory is allocated or freed inside, nothing is searched,
//! formatted or logged, and nothing can panic. For the worker that is killed there all the same,
//! the stores are in an order that leaves a list after each of them; see [`crate::crash`].

use std::collections::HashSet;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use nginx_sys::{ngx_rwlock_unlock, ngx_rwlock_wlock, ngx_slab_pool_t};
use thiserror::Error;

use crate::abi::{PeerAbi, PeersAbi};
use crate::counters::Counters;
use crate::crash::Journal;
use crate::crash::Step::{
    AllLinked, Begun, Changed as ChangedStep, Counted, Ended, Freed, Held, Linked, Locked,
    LockedPrimaries, Marked, Released, Told, Unlocked, UnlockedBackups,
};
use crate::diff::{Found, Plan, Step};
use crate::label::Label;
use crate::meter::Meter;
use crate::spec::{self, Attributes, Spec};
use crate::zone::{self, Fresh, Full};

/// The peers of one upstream: its primaries and its backups.
#[derive(Debug)]
pub struct List<L: PeersAbi> {
    primaries: *mut L,
    /// Peers at the head of each list that come from the configuration and are nobody's to edit.
    statics: Statics,
}

/// How many peers of each list come from the configuration. They are the first ones.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statics {
    /// Among the primaries.
    pub primaries: usize,
    /// Among the backups.
    pub backups: usize,
}

/// What an edit did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Change {
    /// New peers.
    pub added: Vec<Changed>,
    /// Peers that went.
    pub removed: Vec<Changed>,
    /// Peers with other attributes than before.
    pub changed: Vec<Changed>,
    /// Whether the order of those that stayed is another.
    pub reordered: bool,
    /// By what the weights were divided, where they are larger than a balancer can use.
    pub divisor: Option<u32>,
    /// For how long the list was locked.
    pub locked: Duration,
}

/// A peer that an edit touched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Changed {
    /// Its address.
    pub address: SocketAddr,
    /// Which instance it is.
    pub label: Label,
}

impl Change {
    /// Whether the list was as wanted already.
    pub fn is_empty(&self) -> bool {
        self.added.is_empty()
            && self.removed.is_empty()
            && self.changed.is_empty()
            && !self.reordered
    }
}

/// Why a list is as it was before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum Refused {
    /// No room.
    #[error(transparent)]
    Full(#[from] Full),
    /// Somebody else edits the list.
    #[error("another process keeps changing the list")]
    Contended,
    /// A list for backups was never made.
    #[error("the upstream has no list of backups")]
    NoBackups,
}

/// How often an edit that finds the list changed under its feet begins again.
const ATTEMPTS: u32 = 4;

impl<L: PeersAbi> List<L> {
    /// The list whose primaries are at `primaries`.
    ///
    /// # Safety
    ///
    /// `primaries` and its `next` stay valid as long as the value is used, in a zone (`shpool` and
    /// `config` are set). Each begins with as many peers as `statics` says that never change; the
    /// others were made by [`Self::apply`], and no other process calls it for this list.
    pub unsafe fn new(primaries: *mut L, statics: Statics) -> Self {
        Self { primaries, statics }
    }

    pub(crate) fn primaries(&self) -> *mut L {
        self.primaries
    }

    /// The peers after the static ones, as they are: what another process has left, or this one.
    pub fn present(&self) -> Vec<Spec> {
        // SAFETY: `new`'s promise.
        unsafe {
            let backups = *L::next(self.primaries);
            let mut all = Vec::new();
            for (peers, statics, backup) in [
                (self.primaries, self.statics.primaries, false),
                (backups, self.statics.backups, true),
            ] {
                if peers.is_null() {
                    continue;
                }
                let side = Side::find(peers, statics, Vec::new());
                all.extend(side.found.into_iter().map(|found| Spec {
                    label: found.label,
                    address: found.address,
                    backup,
                    attributes: found.attributes,
                }));
            }
            all
        }
    }

    /// Makes the peers after the static ones those of `wanted`, in this order: all of it, or
    /// nothing.
    pub fn apply(&mut self, wanted: &[Spec]) -> Result<Change, Refused> {
        self.apply_noting(wanted, &())
    }

    /// The same, with notes for whoever comes after this process, should it die meanwhile.
    pub fn apply_noting(
        &mut self,
        wanted: &[Spec],
        journal: &impl Journal,
    ) -> Result<Change, Refused> {
        self.apply_ending(wanted, None, journal)
    }

    /// The same; the sessions to peers that go are to end, where `ends` says so of their instances. Of one
    /// that changes from primary to backup, or back, they go on.
    pub fn apply_ending(
        &mut self,
        wanted: &[Spec],
        ends: Option<&dyn Fn(&Label) -> bool>,
        journal: &impl Journal,
    ) -> Result<Change, Refused> {
        let divisors = [false, true].map(|backup| self.divisor(wanted, backup));
        let divisor = divisors.into_iter().max().filter(|divisor| *divisor > 1);
        let divided: Option<Vec<Spec>> = divisor.map(|_| {
            let [primaries, backups] = divisors;
            let by = |spec: &Spec| if spec.backup { backups } else { primaries };
            let divided = |spec: &Spec| spec.attributes.divided(by(spec));
            wanted.iter().map(|it| Spec { attributes: divided(it), ..it.clone() }).collect()
        });
        let wanted = divided.as_deref().unwrap_or(wanted);
        for _ in 0..ATTEMPTS {
            // SAFETY: `new`'s promise.
            match unsafe { self.try_apply(wanted, ends, journal) } {
                Err(Refused::Contended) => (),
                result => return result.map(|change| Change { divisor, ..change }),
            }
        }
        Err(Refused::Contended)
    }

    /// By what the weights of one of the two lists are divided: by nothing beside static servers,
    /// whose weights stay as they are.
    fn divisor(&self, wanted: &[Spec], backup: bool) -> u32 {
        let Statics { primaries, backups } = self.statics;
        if (if backup { backups } else { primaries }) > 0 {
            return 1;
        }
        let specs = wanted.iter().filter(|spec| spec.backup == backup);
        spec::divisor(specs.map(|spec| spec.attributes.weight))
    }

    /// # Safety
    ///
    /// As [`Self::new`].
    unsafe fn try_apply(
        &mut self,
        wanted: &[Spec],
        ends: Option<&dyn Fn(&Label) -> bool>,
        journal: &impl Journal,
    ) -> Result<Change, Refused> {
        // SAFETY: `new`'s promise: the lists are live, this process is the one that edits them,
        // so their links are read without the lock.
        unsafe {
            let pool = *L::shpool(self.primaries);
            let config = *L::config(self.primaries);
            let seen = config.read_volatile();
            let backups = *L::next(self.primaries);

            let sides = |backup| wanted.iter().filter(move |spec| spec.backup == backup).collect();
            let primary = Side::find(self.primaries, self.statics.primaries, sides(false));
            let wanted_backups: Vec<_> = sides(true);
            let backup = if !backups.is_null() {
                Some(Side::find(backups, self.statics.backups, wanted_backups))
            } else if wanted_backups.is_empty() {
                None
            } else {
                return Err(Refused::NoBackups);
            };

            if primary.plan.is_empty() && backup.as_ref().is_none_or(|side| side.plan.is_empty()) {
                return Ok(Change::default());
            }

            let mut change = Change::default();
            primary.describe(&mut change);
            if let Some(side) = &backup {
                side.describe(&mut change);
            }

            // A side that stays as it is has an edit, too: `single` depends on both.
            let prepared = primary.prepare(pool).and_then(|primary| {
                Some((primary, backup.as_ref().map_or(Some(None), |s| s.prepare(pool).map(Some))?))
            });
            let Some((mut primary_edit, mut backup_edit)) = prepared else {
                // What had room for itself is freed by now: the need is that of all.
                let sides = || [Some(&primary), backup.as_ref()].into_iter().flatten();
                let fresh = || sides().flat_map(Side::additions);
                let peers = sides().flat_map(|side| side.pointers.iter().copied());
                let sessions = zone::sessions(peers, fresh().count());
                let full = zone::full::<L::Peer>(pool, fresh(), sessions);
                return Err(full.into());
            };
            let single = primary_edit
                .counters
                .single(backup_edit.as_ref().map_or(0, |edit| edit.counters.number));

            if let Some(ends) = ends {
                let is_there = |spec: &Spec| (spec.address, spec.label.clone());
                let there: HashSet<_> = wanted.iter().map(is_there).collect();
                let ends = |found: &Found| {
                    ends(&found.label) && !there.contains(&(found.address, found.label.clone()))
                };
                primary.mark_ending(&mut primary_edit, ends);
                if let (Some(side), Some(edit)) = (&backup, &mut backup_edit) {
                    side.mark_ending(edit, ends);
                }
            }

            // The short part. Primaries first: nginx's own order.
            let backup_lock = backup
                .as_ref()
                .filter(|side| !side.plan.is_empty())
                .map(|side| L::rwlock(side.peers));
            journal.begin(backup_lock.is_some());
            journal.step(Begun);
            ngx_rwlock_wlock(L::rwlock(self.primaries));
            journal.step(LockedPrimaries);
            if let Some(lock) = backup_lock {
                ngx_rwlock_wlock(lock);
            }
            let begin = Instant::now();
            journal.step(Locked);
            let ours = config.read_volatile() == seen;
            if ours {
                journal.held();
                journal.step(Held);
                primary_edit.carry_out(single, journal);
                if let Some(edit) = &mut backup_edit
                    && backup_lock.is_some()
                {
                    edit.carry_out(false, journal);
                }
                config.write_volatile(seen.wrapping_add(1));
                journal.step(Told);
                journal.release();
                journal.step(Released);
            }
            if let Some(lock) = backup_lock {
                ngx_rwlock_unlock(lock);
                journal.step(UnlockedBackups);
            }
            ngx_rwlock_unlock(L::rwlock(self.primaries));
            journal.step(Unlocked);
            change.locked = begin.elapsed();
            journal.end();
            journal.step(Ended);

            if !ours {
                return Err(Refused::Contended);
            }
            primary_edit.finish(pool);
            if let Some(edit) = backup_edit {
                edit.finish(pool);
            }
            journal.step(Freed);
            Ok(change)
        }
    }
}

/// Counts the primaries anew, and the backups if it is `both`, and tells all who remember something
/// of them that they have changed.
///
/// # Safety
///
/// `primaries` is a live list in a zone, and nobody else uses what is counted: it is new, or the
/// caller holds the locks.
pub(crate) unsafe fn recount<L: PeersAbi>(primaries: *mut L, both: bool) {
    // SAFETY: the caller's promise.
    unsafe {
        let pool = *L::shpool(primaries);
        let most = ((*pool).end.addr() - pool.addr()) / size_of::<L::Peer>();
        let count = |peers: *mut L| {
            let mut counters = Counters::default();
            let mut at = L::peer(peers);
            while !(*at).is_null() {
                if counters.number >= most {
                    // More than there is room for: a ring, which is worse than a short list.
                    *at = core::ptr::null_mut();
                    break;
                }
                let peer = *at;
                counters.add(*L::Peer::weight(peer) as usize, *L::Peer::down(peer) != 0);
                at = L::Peer::next(peer);
            }
            counters
        };
        let backups = *L::next(primaries);
        let mut behind = 0;
        if !backups.is_null() {
            if both {
                count(backups).store(backups, false);
            }
            behind = *L::number(backups);
        }
        let counters = count(primaries);
        counters.store(primaries, counters.single(behind));
        let config = *L::config(primaries);
        config.write_volatile((*config).wrapping_add(1));
    }
}

impl Counters {
    /// # Safety
    ///
    /// As for [`recount`].
    unsafe fn store<L: PeersAbi>(&self, peers: *mut L, single: bool) {
        // SAFETY: the caller's promise.
        unsafe {
            *L::number(peers) = self.number as _;
            *L::total_weight(peers) = self.total_weight as _;
            *L::tries(peers) = self.tries as _;
            L::set_flags(peers, single, self.weighted());
        }
    }
}

/// One of the two lists, as it is and as it should be.
struct Side<'a, L: PeersAbi> {
    peers: *mut L,
    /// Where the pointer to the first peer of ours is stored.
    anchor: *mut *mut L::Peer,
    /// The static peers' counters.
    statics: Counters,
    found: Vec<Found>,
    pointers: Vec<*mut L::Peer>,
    wanted: Vec<&'a Spec>,
    plan: Plan,
}

impl<'a, L: PeersAbi> Side<'a, L> {
    /// # Safety
    ///
    /// As [`List::new`], for `peers`.
    unsafe fn find(peers: *mut L, statics: usize, wanted: Vec<&'a Spec>) -> Self {
        // SAFETY: the links are this process' to change, and static peers never change.
        unsafe {
            let mut anchor = L::peer(peers);
            let mut counters = Counters::default();
            for _ in 0..statics {
                let peer = *anchor;
                if peer.is_null() {
                    break;
                }
                counters.add(*L::Peer::weight(peer) as usize, *L::Peer::down(peer) != 0);
                anchor = L::Peer::next(peer);
            }
            let mut found = Vec::new();
            let mut pointers = Vec::new();
            let mut peer = *anchor;
            while !peer.is_null() {
                let (label, address, attributes) = zone::read(peer);
                // Ours have a label and are of IP; were one not, it matches no wish, and it goes.
                let label = label.unwrap_or_default();
                let address = address.unwrap_or_else(|| ([0, 0, 0, 0], 0).into());
                found.push(Found { label, address, attributes });
                pointers.push(peer);
                peer = *L::Peer::next(peer);
            }
            let plan = Plan::new(&found, &wanted);
            Self { peers, anchor, statics: counters, found, pointers, wanted, plan }
        }
    }

    /// The specs of the peers to add.
    fn additions(&self) -> impl Iterator<Item = &'a Spec> {
        self.plan.sequence.iter().filter_map(|step| match step {
            Step::Add { spec } => self.wanted.get(*spec).copied(),
            Step::Keep { .. } => None,
        })
    }

    /// Notes in an edit which of the peers that go end their sessions.
    ///
    /// # Safety
    ///
    /// As [`List::new`]; the edit is this side's.
    unsafe fn mark_ending(&self, edit: &mut Edit<L>, ends: impl Fn(&Found) -> bool) {
        for (n, removed) in self.plan.remove.iter().zip(&mut edit.removed) {
            if self.found.get(*n).is_some_and(&ends) {
                // SAFETY: the peer is in the list still, whose zone has an allocator.
                let meter = unsafe {
                    let pool = *L::shpool(self.peers);
                    Meter::of(removed.peer, (*pool).end)
                };
                removed.meter = meter.map(core::ptr::from_ref);
            }
        }
    }

    fn describe(&self, change: &mut Change) {
        let found = |n: &usize| {
            let peer = self.found.get(*n)?;
            Some(Changed { address: peer.address, label: peer.label.clone() })
        };
        change.added.extend(
            self.additions()
                .map(|spec| Changed { address: spec.address, label: spec.label.clone() }),
        );
        change.removed.extend(self.plan.remove.iter().filter_map(found));
        change.changed.extend(self.plan.sequence.iter().filter_map(|step| match step {
            Step::Keep { found: n, change: true, .. } => found(n),
            _ => None,
        }));
        change.reordered |= !self.plan.sequence.is_sorted_by_key(|step| match step {
            Step::Keep { found, .. } => *found,
            // Its place tells nothing of the order of those that stayed.
            Step::Add { .. } => 0,
        }) && change.added.is_empty()
            && change.removed.is_empty();
    }

    /// Everything that can be done without the lock. `None` when the zone is full; then all is as
    /// it was.
    ///
    /// # Safety
    ///
    /// As [`List::new`]; `pool` is the zone's.
    unsafe fn prepare(&self, pool: *mut ngx_slab_pool_t) -> Option<Edit<L>> {
        let mut fresh = Vec::new();
        let mut links = Vec::new();
        let mut attributes = Vec::new();
        let mut counters = self.statics;
        let mut anchor = self.anchor;
        let mut anchor_is_fresh = false;
        // SAFETY: the anchors are fields of this list, of peers that stay in it, or of new ones.
        unsafe {
            for step in &self.plan.sequence {
                let is_fresh = matches!(step, Step::Add { .. });
                let peer = match *step {
                    Step::Keep { found, spec, change } => {
                        let (peer, spec) = (*self.pointers.get(found)?, self.wanted.get(spec)?);
                        if change {
                            attributes.push((peer, spec.attributes));
                        }
                        counters.add(spec.attributes.weight as usize, spec.attributes.down);
                        peer
                    }
                    Step::Add { spec } => {
                        let spec = self.wanted.get(spec)?;
                        let new = Fresh::new(pool, spec)?;
                        let peer = new.as_ptr();
                        counters.add(spec.attributes.weight as usize, spec.attributes.down);
                        fresh.push(new);
                        peer
                    }
                };
                if anchor_is_fresh {
                    // Nobody sees a new peer yet: this link need not wait for the lock.
                    *anchor = peer;
                } else if *anchor != peer {
                    links.push((anchor, peer));
                }
                anchor = L::Peer::next(peer);
                anchor_is_fresh = is_fresh;
            }
            if !(*anchor).is_null() {
                links.push((anchor, core::ptr::null_mut()));
            }
        }
        let removed = self
            .plan
            .remove
            .iter()
            .filter_map(|n| self.pointers.get(*n))
            .map(|peer| Removed { peer: *peer, held: false, meter: None })
            .collect();
        Some(Edit { peers: self.peers, fresh, links, attributes, removed, counters })
    }
}

/// A place where a pointer to a peer is stored, and what is to be stored there.
type Link<P> = (*mut *mut P, *mut P);

/// Stores, ready to be made.
struct Edit<L: PeersAbi> {
    peers: *mut L,
    /// The new peers, freed again if the edit is not carried out.
    fresh: Vec<Fresh<L::Peer>>,
    links: Vec<Link<L::Peer>>,
    attributes: Vec<(*mut L::Peer, Attributes)>,
    removed: Vec<Removed<L::Peer>>,
    counters: Counters,
}

struct Removed<P> {
    peer: *mut P,
    /// A request holds it, and the last one will free it.
    held: bool,
    /// Its meter, if its sessions are to end.
    meter: Option<*const Meter>,
}

impl<L: PeersAbi> Edit<L> {
    /// # Safety
    ///
    /// The caller holds the list's write lock, and nothing has changed since the edit was
    /// prepared.
    unsafe fn carry_out(&mut self, single: bool, journal: &impl Journal) {
        // SAFETY: under the write lock no other process reads or writes links, attributes,
        // counters or reference counts of this list; all pointers were found in it or are new.
        unsafe {
            for (at, peer) in &self.links {
                at.write_volatile(*peer);
                journal.step(Linked);
            }
            journal.step(AllLinked);
            for (peer, attributes) in &self.attributes {
                // What failures have taken from the weight, they have taken still.
                let whole = *L::Peer::effective_weight(*peer) >= *L::Peer::weight(*peer);
                zone::write_attributes(*peer, attributes);
                let weight = *L::Peer::weight(*peer);
                if whole || *L::Peer::effective_weight(*peer) > weight {
                    *L::Peer::effective_weight(*peer) = weight;
                }
            }
            journal.step(ChangedStep);
            // After they are out of the list: the last request of a marked one frees it.
            for removed in &mut self.removed {
                if *L::Peer::refs(removed.peer) > 0 {
                    L::Peer::set_zombie(removed.peer);
                    if let Some(meter) = removed.meter {
                        (*meter).end_sessions();
                    }
                    removed.held = true;
                }
            }
            journal.step(Marked);
            self.counters.store(self.peers, single);
            journal.step(Counted);
        }
    }

    /// Hands the new peers to the list and frees those that went.
    ///
    /// # Safety
    ///
    /// The edit was carried out and the lock released; `pool` is the zone's.
    unsafe fn finish(self, pool: *mut ngx_slab_pool_t) {
        for fresh in self.fresh {
            fresh.link();
        }
        let free = self.removed.into_iter().filter(|removed| !removed.held);
        // SAFETY: they are out of the list and had no references when they left it, and a peer
        // that is not in the list cannot get one.
        unsafe { zone::free(pool, free.map(|removed| removed.peer)) };
    }
}

#[cfg(test)]
pub(crate) mod tests;
