//! A list copied for whoever shows it.
//!
//! Who picks a peer takes the list's write lock, so a reader stops them all: it copies a few
//! peers at a time, numbers and short texts, into memory that is there already, and formats
//! nothing meanwhile. Between two holds the list may change. The counter of its changes says so,
//! and then the copy begins anew; in the end all is copied at once.

use core::{ptr, slice};
use std::time::{Duration, Instant};

use nginx_sys::ngx_rwlock_unlock;

use crate::abi::{PeerAbi, PeersAbi};
use crate::carry::try_read_lock;
use crate::label::Label;
use crate::list::Statics;
use crate::meter::{Counted, Meter};

/// How many peers are copied at a time.
const HOLD: usize = 64;

/// How often a list may change meanwhile.
const TRIES: usize = 3;

/// The most that is copied of a peer's texts: its address, and what the configuration calls it with
/// the label behind.
const NAME: usize = 128;
const SERVER: usize = 384;

/// The peers of a list as they were: primaries, then backups.
#[derive(Debug, Default)]
pub struct View {
    peers: Vec<Raw>,
    texts: Vec<u8>,
    locked: Duration,
}

/// What a peer's numbers say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Numbers {
    /// It is a backup.
    pub backup: bool,
    /// Its weight.
    pub weight: u64,
    /// The weight that failures have left.
    pub effective_weight: u64,
    /// Requests that are under way.
    pub conns: u64,
    /// How many there may be.
    pub max_conns: u64,
    /// Failures of late, and how many make it unavailable.
    pub fails: u64,
    /// See `fails`; 0 for never.
    pub max_fails: u64,
    /// For how many seconds that counts.
    pub fail_timeout: i64,
    /// When it was tried last after a failure, in seconds of the epoch.
    pub checked: i64,
    /// Out of rotation.
    pub down: u64,
    /// What was counted; none for peers of the configuration.
    pub counted: Option<Counted>,
}

impl Numbers {
    /// Whether it is left alone for now, because it failed too often.
    pub fn is_unavailable(&self, now: i64) -> bool {
        self.max_fails > 0
            && self.fails >= self.max_fails
            && now.saturating_sub(self.checked) <= self.fail_timeout
    }
}

#[derive(Clone, Copy, Debug)]
struct Raw {
    numbers: Numbers,
    ours: bool,
    /// Where the texts begin, and the lengths of name, server and label.
    at: usize,
    lens: [usize; 3],
}

/// A peer of a [`View`].
#[derive(Clone, Debug)]
pub struct Seen<'a> {
    /// Its address.
    pub name: &'a [u8],
    /// What the configuration calls it.
    pub server: &'a [u8],
    /// Which instance it is; none for peers of the configuration.
    pub label: Option<Label>,
    /// Its numbers.
    pub numbers: Numbers,
}

/// Copies a list. `None` when its lock is not free within `patience`.
///
/// # Safety
///
/// `primaries` is a live list in a zone, which begins with as many peers as `statics` says that
/// come from the configuration; the others were made by [`crate::List`].
pub unsafe fn look<L: PeersAbi>(
    primaries: *mut L,
    statics: Statics,
    patience: Duration,
) -> Option<View> {
    let mut locked = Duration::ZERO;
    for attempt in 0..=TRIES {
        let hold = if attempt < TRIES { HOLD } else { usize::MAX };
        // However often it begins anew, the longest time under the lock is what it was.
        let mut view = View { locked, ..View::default() };
        // SAFETY: the caller's promise.
        match unsafe { view.take(primaries, statics, patience, hold) } {
            Some(true) => return Some(view),
            Some(false) => locked = view.locked,
            None => return None,
        }
    }
    None
}

impl View {
    /// Whether all was copied of one list: none where it is locked, `false` where it has changed.
    ///
    /// # Safety
    ///
    /// As [`look`].
    unsafe fn take<L: PeersAbi>(
        &mut self,
        primaries: *mut L,
        statics: Statics,
        patience: Duration,
        hold: usize,
    ) -> Option<bool> {
        // SAFETY: the list is live. Under its lock no peer is linked or freed, in the list of
        // backups either, whose changes take this lock as well; and while its counter is as it was,
        // the next peer is the one that it was.
        unsafe {
            let (lock, backups) = (L::rwlock(primaries), *L::next(primaries));
            let end = (*(*L::shpool(primaries))).end.cast_const();
            let mut config = None;
            for (peers, statics, backup) in
                [(primaries, statics.primaries, false), (backups, statics.backups, true)]
            {
                if peers.is_null() {
                    continue;
                }
                let mut place = 0;
                let mut next: *mut L::Peer = ptr::null_mut();
                loop {
                    // Some may come before the lock is there.
                    let most = hold.min(*L::number(peers) + HOLD);
                    self.peers.reserve(most);
                    self.texts.reserve(most * (NAME + SERVER));
                    if !try_read_lock(lock, patience) {
                        return None;
                    }
                    let begin = Instant::now();
                    let now = (*L::config(primaries)).read_volatile();
                    if *config.get_or_insert(now) != now {
                        ngx_rwlock_unlock(lock);
                        return Some(false);
                    }
                    let mut peer = if place == 0 { *L::peer(peers) } else { next };
                    let mut copied = 0;
                    while !peer.is_null() && copied < most {
                        self.push(peer, place >= statics, backup, end);
                        peer = *L::Peer::next(peer);
                        place += 1;
                        copied += 1;
                    }
                    ngx_rwlock_unlock(lock);
                    self.locked = self.locked.max(begin.elapsed());
                    next = peer;
                    if peer.is_null() {
                        break;
                    }
                    if hold == usize::MAX {
                        return Some(false);
                    }
                }
            }
        }
        Some(true)
    }

    /// # Safety
    ///
    /// `peer` is live, and the caller holds its list's lock; `end` is the end of its zone. There is
    /// room for one more.
    unsafe fn push<P: PeerAbi>(&mut self, peer: *mut P, ours: bool, backup: bool, end: *const u8) {
        // SAFETY: the caller's promise. Other processes write the numbers, one word each; texts do
        // not change while the peer lives, and ours have a label behind the second.
        unsafe {
            let meter = if ours { Meter::of(peer, end) } else { None };
            let numbers = Numbers {
                backup,
                weight: P::weight(peer).read_volatile() as u64,
                effective_weight: P::effective_weight(peer).read_volatile().max(0) as u64,
                conns: P::conns(peer).read_volatile() as u64,
                max_conns: P::max_conns(peer).read_volatile() as u64,
                fails: P::fails(peer).read_volatile() as u64,
                max_fails: P::max_fails(peer).read_volatile() as u64,
                fail_timeout: P::fail_timeout(peer).read_volatile(),
                checked: P::checked(peer).read_volatile(),
                down: P::down(peer).read_volatile() as u64,
                counted: meter.map(Meter::read),
            };
            let (name, server) = (*P::name(peer), *P::server(peer));
            let room = end.addr().saturating_sub(server.data.addr()).saturating_sub(server.len);
            let behind = server.data.wrapping_add(server.len);
            let label = if ours { Label::len_at(behind, room).unwrap_or(0) } else { 0 };
            let at = self.texts.len();
            let text = server.len.min(SERVER.saturating_sub(label));
            let label = label.min(SERVER);
            let lens = [name.len.min(NAME), text, label];
            for (from, len) in [name.data, server.data, behind].into_iter().zip(lens) {
                if len > 0 {
                    self.texts.extend_from_slice(slice::from_raw_parts(from, len));
                }
            }
            self.peers.push(Raw { numbers, ours, at, lens });
        }
    }

    /// How many peers there are.
    pub fn len(&self) -> usize {
        self.peers.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.peers.is_empty()
    }

    /// For how long the list was locked at a time, at most.
    pub fn locked(&self) -> Duration {
        self.locked
    }

    /// The numbers of all.
    pub fn numbers(&self) -> impl Iterator<Item = &Numbers> {
        self.peers.iter().map(|raw| &raw.numbers)
    }

    /// One of them.
    pub fn get(&self, at: usize) -> Option<Seen<'_>> {
        let Raw { numbers, ours, at, lens: [name, server, label] } = *self.peers.get(at)?;
        let part = |from, len| self.texts.get(from..from + len).unwrap_or_default();
        let label = ours.then(|| {
            let mut bytes = part(at + name + server, label).iter();
            // Zeros make no label.
            Label::decode(|| bytes.next().copied().unwrap_or(0))
        });
        Some(Seen {
            name: part(at, name),
            server: part(at + name, server),
            label: label.flatten(),
            numbers,
        })
    }
}

#[cfg(test)]
mod tests;
