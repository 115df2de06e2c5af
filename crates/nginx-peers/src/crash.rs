//! What is left of an edit whose process was killed in the middle of it.
//!
//! nginx never takes a list's lock from a dead process: requests of all workers would wait for it
//! for ever. So whoever edits says so in shared memory, by a [`Journal`], and whoever starts after
//! it finds there what to do: [`recover`].
//!
//! An edit is a row of stores, and after each of them the links are those of a list: of peers that
//! go and peers that come some are in it and some are not. What is wrong are the numbers that nginx
//! keeps beside the links, and they are counted again. What was unlinked or never linked and not
//! freed yet stays in the zone until the next reload.

use core::sync::atomic::{AtomicUsize, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nginx_sys::ngx_atomic_t;

use crate::abi::PeersAbi;
use crate::list::recount;

/// nginx's `NGX_RWLOCK_WLOCK`.
pub(crate) const WRITE_LOCKED: usize = usize::MAX;

/// A lock that is found locked for so long belongs to nobody. Requests and edits hold it for less
/// than a millisecond, and in between it is free.
const STUCK: Duration = Duration::from_millis(if cfg!(test) { 1 } else { 200 });

/// A note of where an edit is, in memory that outlives its process.
///
/// Between `held` and `release` the process has the locks, and what is written then is half of an
/// edit. Between `begin` and `held`, and between `release` and `end`, it may have them or not, and
/// the list is whole.
pub trait Journal {
    /// The lock of the primaries is about to be taken, and that of the backups as well if `both`.
    fn begin(&self, both: bool);
    /// They are taken.
    fn held(&self);
    /// They are about to be given back.
    fn release(&self);
    /// They are given back.
    fn end(&self);
    /// Called between all steps of an edit: so that tests can end the process there.
    #[inline(always)]
    fn step(&self, _step: Step) {}
}

/// For lists of one process, or none that outlives it.
impl Journal for () {
    fn begin(&self, _both: bool) {}
    fn held(&self) {}
    fn release(&self) {}
    fn end(&self) {}
}

/// What an edit has just done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Noted that it begins.
    Begun,
    /// Taken the lock of the primaries.
    LockedPrimaries,
    /// Taken all locks.
    Locked,
    /// Noted that it has them.
    Held,
    /// Stored a link.
    Linked,
    /// Stored all links.
    AllLinked,
    /// Stored the attributes of those that stay.
    Changed,
    /// Marked those that went and are in use.
    Marked,
    /// Stored the numbers of one list.
    Counted,
    /// Told all who remember something of the list that it has changed.
    Told,
    /// Noted that it gives the locks back.
    Released,
    /// Given the lock of the backups back.
    UnlockedBackups,
    /// Given all locks back.
    Unlocked,
    /// Noted that it is over.
    Ended,
    /// Freed those that went.
    Freed,
}

impl Step {
    /// All of them, in order.
    pub const ALL: [Self; 15] = [
        Self::Begun,
        Self::LockedPrimaries,
        Self::Locked,
        Self::Held,
        Self::Linked,
        Self::AllLinked,
        Self::Changed,
        Self::Marked,
        Self::Counted,
        Self::Told,
        Self::Released,
        Self::UnlockedBackups,
        Self::Unlocked,
        Self::Ended,
        Self::Freed,
    ];
}

/// What the journal of a dead process says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Left {
    /// It had the locks: [`Journal::held`] was called, and [`Journal::release`] was not.
    pub held: bool,
    /// Both locks, not that of the primaries alone.
    pub both: bool,
}

/// Completes or ends an edit whose process is dead, and gives its locks back. Returns whether there
/// was anything to do.
///
/// # Safety
///
/// `primaries` is a live list in a zone; the process that made the edit is dead; nobody else
/// recovers it or edits the list meanwhile.
pub unsafe fn recover<L: PeersAbi>(primaries: *mut L, left: Left) -> bool {
    // SAFETY: the caller's promise. Locks that the dead process had nobody else has.
    unsafe {
        let backups = *L::next(primaries);
        let both = left.both && !backups.is_null();
        let backup = both.then(|| L::rwlock(backups));
        let mut locks: Vec<&AtomicUsize> =
            [Some(L::rwlock(primaries)), backup].into_iter().flatten().map(|it| word(it)).collect();
        if left.held {
            recount(primaries, both);
        } else {
            retain_stuck(&mut locks);
        }
        let found = !locks.is_empty();
        for lock in locks.into_iter().rev() {
            let _ = lock.compare_exchange(WRITE_LOCKED, 0, Ordering::SeqCst, Ordering::Relaxed);
        }
        found
    }
}

/// # Safety
///
/// `lock` is a live lock of nginx's.
pub(crate) unsafe fn word<'a>(lock: *mut ngx_atomic_t) -> &'a AtomicUsize {
    // SAFETY: the word is live, aligned, and only ever changed by atomic operations.
    unsafe { AtomicUsize::from_ptr(lock.cast::<usize>()) }
}

/// Keeps the locks that are locked at every look. Whether somebody alive has one cannot be seen, but
/// somebody alive gives it back.
fn retain_stuck(locks: &mut Vec<&AtomicUsize>) {
    const REST: Duration = Duration::from_micros(100);
    let begin = Instant::now();
    loop {
        locks.retain(|lock| lock.load(Ordering::Relaxed) == WRITE_LOCKED);
        if locks.is_empty() || begin.elapsed() >= STUCK {
            return;
        }
        sleep(REST);
    }
}

#[cfg(test)]
mod tests;
