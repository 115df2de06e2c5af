//! What a list takes over from the one that served before it, when nginx reloads.
//!
//! The new zone is filled by the master, while the workers of the old one still use it. Under the
//! old list's read lock bytes are copied and no more: its workers wait for it, and the master must
//! not be killed in there. What the bytes mean is found out after it.

use core::sync::atomic::Ordering;
use core::{ptr, slice};
use std::net::SocketAddr;
use std::thread::sleep;
use std::time::{Duration, Instant};

use nginx_sys::{ngx_atomic_t, ngx_rwlock_unlock};

use crate::abi::{PeerAbi, PeersAbi};
use crate::crash::{WRITE_LOCKED, word};
use crate::label::Label;
use crate::list::{List, Statics, recount};
use crate::meter::{Counted, Meter};
use crate::spec::{Attributes, Spec};
use crate::zone::{self, Fresh, Full};

/// The room for the label of a peer, most times.
const TEXT: usize = 96;

/// How often a copy is begun that had too little room; each time it has twice as much for a text.
const ATTEMPTS: usize = 8;

/// A peer, and what nginx has found out about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Carried {
    /// What it is.
    pub spec: Spec,
    /// How it has done.
    pub history: History,
    /// What was counted of it.
    pub counted: Option<Counted>,
}

/// How a peer has done. The connections that it has are not part of it: they are the old
/// workers', and end in the old zone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct History {
    /// Failures of late.
    pub fails: usize,
    /// When it last failed, in seconds of the epoch.
    pub accessed: i64,
    /// When it was last tried after that.
    pub checked: i64,
    /// The weight that failures have left.
    pub effective_weight: isize,
    /// Where it stands in the rotation.
    pub current_weight: isize,
}

/// The peers of a list as they were at one moment, as bytes.
#[derive(Debug)]
pub struct Copied {
    peers: Vec<Raw>,
    texts: Vec<u8>,
    /// For how long the list was locked.
    pub locked: Duration,
}

#[derive(Clone, Copy, Debug)]
struct Raw {
    address: Option<SocketAddr>,
    attributes: Attributes,
    history: History,
    counted: Option<Counted>,
    backup: bool,
    /// Where the label begins among the texts, and where it ends.
    text: (usize, usize),
}

/// Copies what a list has behind its static servers. `None` when its lock is not free within
/// `patience`: a worker that was killed while it held it keeps it for ever.
///
/// # Safety
///
/// `primaries` is a live list in a zone, which begins with as many peers as `statics` says that
/// come from the configuration. What stands behind them may be anybody's.
pub unsafe fn copy<L: PeersAbi>(
    primaries: *mut L,
    statics: Statics,
    patience: Duration,
) -> Option<Copied> {
    // SAFETY: the list is live. What is read before the lock is only a measure; under it no peer
    // is linked or freed, in the list of backups either, whose changes take this lock as well.
    unsafe {
        let backups = *L::next(primaries);
        let mut expected = *L::number(primaries);
        if !backups.is_null() {
            expected += *L::number(backups);
        }
        let pool = *L::shpool(primaries);
        let end = (*pool).end.cast_const();
        let most = (end.addr() - pool.addr()) / size_of::<L::Peer>();
        let lock = L::rwlock(primaries);
        let mut expected = expected.min(most);
        let mut text = TEXT;
        for _ in 0..ATTEMPTS {
            let mut copied = Copied {
                peers: touched(expected),
                texts: touched(expected * text),
                locked: Duration::ZERO,
            };
            if !try_read_lock(lock, patience) {
                return None;
            }
            let begin = Instant::now();
            let whole = copied.take(primaries, statics.primaries, false, end, most)
                && (backups.is_null() || copied.take(backups, statics.backups, true, end, most));
            ngx_rwlock_unlock(lock);
            copied.locked = begin.elapsed();
            if whole {
                return Some(copied);
            }
            // It has grown meanwhile, or its texts are long.
            expected = (2 * expected + 1).min(most);
            text *= 2;
        }
        None
    }
}

/// An empty vector with room for so many, in pages that are there: the first touch of each would
/// otherwise cost its time under the lock.
fn touched<T>(len: usize) -> Vec<T> {
    let mut vec: Vec<T> = Vec::with_capacity(len);
    vec.spare_capacity_mut().iter_mut().for_each(|place| {
        // SAFETY: any bytes will do for what is not initialised.
        unsafe { ptr::write_bytes(place.as_mut_ptr(), 0, 1) };
    });
    // The compiler knows that nobody reads it, but not what becomes of the address.
    std::hint::black_box(vec.as_mut_ptr());
    vec
}

impl Copied {
    /// # Safety
    ///
    /// The caller holds the list's lock; `end` is the end of its zone.
    ///
    /// `false` where there is no room: no memory is allocated under the lock.
    unsafe fn take<L: PeersAbi>(
        &mut self,
        peers: *mut L,
        statics: usize,
        backup: bool,
        end: *const u8,
        most: usize,
    ) -> bool {
        // SAFETY: under the lock the links are those of live peers. Their numbers may change
        // meanwhile, one word each; texts never do. What is read behind a text lies in the zone.
        unsafe {
            let mut peer = *L::peer(peers);
            let mut place = 0;
            while !peer.is_null() && place < most {
                if place >= statics && !L::Peer::is_resolved(peer) {
                    let (address, attributes, history) = zone::read_plain(peer);
                    let server = *L::Peer::server(peer);
                    let from = self.texts.len();
                    let room = end.addr().saturating_sub(server.data.addr());
                    let label = server.data.wrapping_add(server.len);
                    let len = Label::len_at(label, room.saturating_sub(server.len)).unwrap_or(0);
                    let room = self.texts.capacity() - from;
                    if room < len || self.peers.len() == self.peers.capacity() {
                        return false;
                    }
                    self.texts.extend_from_slice(slice::from_raw_parts(label, len));
                    let text = (from, from + len);
                    let counted = Meter::of(peer, end).map(Meter::read);
                    self.peers.push(Raw { address, attributes, history, counted, backup, text });
                }
                peer = *L::Peer::next(peer);
                place += 1;
            }
            true
        }
    }

    /// The peers of the sources that are known still, in their order.
    pub fn peers(&self, knows: impl Fn(u64) -> bool) -> Vec<Carried> {
        let known = |raw: &Raw| {
            let (from, end) = raw.text;
            let label = Label::read(self.texts.get(from..end)?)?;
            let spec = Spec {
                address: raw.address?,
                backup: raw.backup,
                attributes: raw.attributes,
                label,
            };
            knows(spec.label.source()).then_some(Carried {
                spec,
                history: raw.history,
                counted: raw.counted,
            })
        };
        let mut all: Vec<Carried> = self.peers.iter().filter_map(known).collect();
        all.sort_by(|a, b| (&a.spec.label, a.spec.address).cmp(&(&b.spec.label, b.spec.address)));
        all
    }
}

/// nginx's `ngx_rwlock_rlock`, which gives up.
///
/// # Safety
///
/// `lock` is a live lock of nginx's.
pub(crate) unsafe fn try_read_lock(lock: *mut ngx_atomic_t, patience: Duration) -> bool {
    /// An edit is over after some microseconds.
    const REST: Duration = Duration::from_micros(50);
    // SAFETY: the caller's promise.
    let word = unsafe { word(lock) };
    let begin = Instant::now();
    loop {
        let readers = word.load(Ordering::Relaxed);
        if readers != WRITE_LOCKED {
            if word
                .compare_exchange_weak(readers, readers + 1, Ordering::Acquire, Ordering::Relaxed)
                .is_ok()
            {
                return true;
            }
            continue;
        }
        if begin.elapsed() >= patience {
            return false;
        }
        sleep(REST);
    }
}

impl<L: PeersAbi> List<L> {
    /// Puts peers of an earlier list into this one, which has none but static servers yet: as many
    /// of them as there is room for, primaries first. Returns how many there are; where some are
    /// missing, beside the size that would do for all.
    ///
    /// # Errors
    ///
    /// The number of those that are in, and what the zone lacks.
    pub fn take_over(&mut self, carried: &[Carried]) -> Result<usize, (usize, Full)> {
        // SAFETY: `new`'s promise; nobody else uses a list that is new.
        unsafe {
            let backups = *L::next(self.primaries());
            let pool = *L::shpool(self.primaries());
            let mut taken = 0;
            let mut full = false;
            for (peers, backup) in [(self.primaries(), false), (backups, true)] {
                if peers.is_null() {
                    continue;
                }
                let mut tail = L::peer(peers);
                while !(*tail).is_null() {
                    tail = L::Peer::next(*tail);
                }
                // A method that knows no backups has no use for the distinction.
                let here = |one: &&Carried| (one.spec.backup && !backups.is_null()) == backup;
                for one in carried.iter().filter(here) {
                    let Some(fresh) = Fresh::<L::Peer>::new(pool, &one.spec).filter(|_| !full)
                    else {
                        full = true;
                        break;
                    };
                    let peer = fresh.link();
                    zone::write_history(peer, &one.history);
                    if let (Some(counted), Some(meter)) =
                        (&one.counted, Meter::of(peer, (*pool).end))
                    {
                        meter.write(counted);
                    }
                    *tail = peer;
                    tail = L::Peer::next(peer);
                    taken += 1;
                }
            }
            recount(self.primaries(), true);
            if !full {
                return Ok(taken);
            }
            // The need is that of the rest, beside what is in.
            let mut specs: Vec<&Spec> = carried.iter().map(|one| &one.spec).collect();
            specs.sort_by_key(|spec| spec.backup);
            Err((taken, zone::full::<L::Peer>(pool, specs.into_iter().skip(taken), 0)))
        }
    }
}

#[cfg(test)]
mod tests;
