//! Where an edit is, as a word in shared memory; and what to do with the word of a dead process.
//!
//! One process of a generation edits, one list at a time, so one word is enough for all. It says
//! whose edit it is, of which upstream, and whether the locks of the list are that process' own.

use core::sync::atomic::{AtomicU64, Ordering, fence};

use nginx_peers::UpstreamAbi;
use nginx_peers::crash::{Journal, Left, Step, recover};
use nginx_sys::NGX_LOG_WARN;

use super::shared::{Shared, lives, own_pid};
use crate::conf::MainConf;
use crate::protocol::Protocol;
use crate::{failpoint, log};

/// Above the bits of the process: the locks are its own.
const HELD: u64 = 1 << 32;
/// The list of backups is locked as well.
const BOTH: u64 = 1 << 33;
/// Above that the number of the upstream.
const UPSTREAM: u32 = 34;

/// The word for edits of one upstream.
pub struct Note {
    edit: &'static AtomicU64,
    upstream: usize,
}

impl Note {
    pub fn new(shared: &'static Shared, upstream: usize) -> Self {
        Self { edit: &shared.edit, upstream }
    }

    fn write(&self, word: u64) {
        // What is stored before it in the program is stored before it in memory, and what comes
        // after it after.
        fence(Ordering::SeqCst);
        self.edit.store(word, Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }

    fn word(&self) -> u64 {
        self.edit.load(Ordering::Relaxed)
    }
}

impl Journal for Note {
    fn begin(&self, both: bool) {
        let both = if both { BOTH } else { 0 };
        self.write(pid_bits(own_pid()) | both | (self.upstream as u64) << UPSTREAM);
    }

    fn held(&self) {
        self.write(self.word() | HELD);
    }

    fn release(&self) {
        self.write(self.word() & !HELD);
    }

    fn end(&self) {
        self.write(0);
    }

    #[inline(always)]
    fn step(&self, step: Step) {
        failpoint::kill(step);
    }
}

fn pid_bits(pid: i32) -> u64 {
    u64::from(pid.cast_unsigned())
}

/// Completes or ends the edit of a process that was killed, if there is one.
///
/// # Safety
///
/// On the main thread of a worker that begins, before it takes a lock of a list; `main` belongs to
/// its cycle and has upstreams.
pub unsafe fn recover_lists<P: Protocol>(main: &MainConf<P>, number: usize) {
    // SAFETY: the caller's promise.
    let shared = unsafe { Shared::of(main) };
    let word = shared.edit.load(Ordering::SeqCst);
    let dead = (word & 0xffff_ffff) as i32;
    if dead == 0 {
        return;
    }
    let own = own_pid();
    // This process has not edited anything yet, nor has its number had two processes at a time.
    let gone = dead == own || shared.is_worker(number, dead) || !lives(dead);
    if !gone {
        return;
    }
    // Of several that begin at a time one does it; should it die over that, the next does it again.
    let claimed = word & !0xffff_ffff | pid_bits(own);
    if shared.edit.compare_exchange(word, claimed, Ordering::SeqCst, Ordering::SeqCst).is_err() {
        return;
    }
    let left = Left { held: word & HELD != 0, both: word & BOTH != 0 };
    if let Some(upstream) = main.upstreams.get((word >> UPSTREAM) as usize) {
        // SAFETY: the list lies in its zone as long as the cycle; the process of the edit is dead,
        // and the word is ours.
        let recovered = unsafe { recover(P::Upstream::peers(upstream.nginx), left) };
        if recovered {
            let name = &upstream.name;
            log::cycle(
                NGX_LOG_WARN,
                format_args!(
                    "consul: upstream \"{name}\": worker process {dead} died while it changed the \
                     list, which is whole again"
                ),
            );
        }
    }
    fence(Ordering::SeqCst);
    shared.edit.store(0, Ordering::SeqCst);
}
