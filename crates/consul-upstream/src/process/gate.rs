//! New workers wait for the first answers before they take requests.
//!
//! A worker that starts with an empty upstream would answer 502 until Consul has answered, a few
//! milliseconds later. The first worker waits for all upstreams at once and opens the gate, a word
//! in [`Shared`]; the others look at it. Each waits for `consul_start_timeout` at most.

use core::ffi::c_int;
use core::ptr;
use core::sync::atomic::Ordering;
use std::thread::sleep;
use std::time::{Duration, Instant};

use nginx_sys::{
    NGX_CMD_QUIT, NGX_CMD_TERMINATE, NGX_LOG_WARN, ngx_channel, ngx_int_t, ngx_quit, ngx_terminate,
    ngx_time_update, ngx_uint_t,
};

use super::apply::Applier;
use super::shared::Shared;
use crate::conf::MainConf;
use crate::log;
use crate::protocol::Protocol;

/// How often the other workers look.
const LOOK: Duration = Duration::from_millis(5);

/// How often the first one looks whether it is to end.
const ORDERS: Duration = Duration::from_millis(50);

/// How long the answers are waited for where all upstreams have servers: what is stored may be a
/// second old, and Consul, where it is well, answers in less than this.
const GRACE: Duration = Duration::from_millis(250);

/// Waits until the first worker has opened the gate.
///
/// # Safety
///
/// On the main thread of another worker; see [`Shared::of`].
pub unsafe fn wait<P: Protocol>(main: &MainConf<P>) {
    // SAFETY: this function's own contract.
    let shared = unsafe { Shared::of(main) };
    let until = Instant::now() + main.start_timeout();
    while !shared.open.load(Ordering::Acquire) && Instant::now() < until && !ending() {
        sleep(LOOK);
    }
    // SAFETY: nginx's own clock, which stood still meanwhile.
    unsafe { ngx_time_update() };
}

/// Waits for the first answers, applying them as they come, and opens the gate. A worker that
/// takes the place of one that died finds it open, and the lists full.
///
/// # Safety
///
/// On the main thread of the first worker; see [`Shared::of`].
pub unsafe fn wait_and_open<P: Protocol>(main: &MainConf<P>, applier: &mut Applier<P>) {
    // SAFETY: this function's own contract.
    if unsafe { Shared::of(main) }.open.load(Ordering::Acquire) {
        return;
    }
    let begin = Instant::now();
    while !applier.all_answered() && !ending() {
        let timeout = main.start_timeout();
        let patience = if applier.all_serve() { timeout.min(GRACE) } else { timeout };
        let left = patience.saturating_sub(begin.elapsed());
        if left.is_zero() {
            break;
        }
        applier.wait(left.min(ORDERS));
    }
    // SAFETY: nginx's own clock, which stood still meanwhile.
    unsafe { ngx_time_update() };
    for name in applier.unanswered() {
        log::cycle(
            NGX_LOG_WARN,
            format_args!("consul: upstream \"{name}\": no answer yet, it starts with what it has"),
        );
    }
    // SAFETY: as above.
    unsafe { open(main) };
}

/// Opens the gate.
///
/// # Safety
///
/// See [`Shared::of`].
pub unsafe fn open<P: Protocol>(main: &MainConf<P>) {
    // SAFETY: this function's own contract.
    unsafe { Shared::of(main) }.open.store(true, Ordering::Release);
}

/// Whether the worker is to end. nginx's signal handler says so, or the master by its channel,
/// which nginx reads only in the event loop.
fn ending() -> bool {
    // SAFETY: words that nginx's signal handler writes, on this thread.
    let signalled = unsafe {
        ptr::read_volatile(&raw const ngx_quit) != 0
            || ptr::read_volatile(&raw const ngx_terminate) != 0
    };
    signalled || told_to_end()
}

/// nginx's `ngx_channel_t`, which nginx-sys does not bind.
#[repr(C)]
struct Message {
    command: ngx_uint_t,
    pid: libc::pid_t,
    slot: ngx_int_t,
    fd: c_int,
}

/// Looks through what the master has written, and leaves it there for nginx to read: beside an
/// order to end it is news of the other workers.
fn told_to_end() -> bool {
    // SAFETY: the channel is an open socket of this process, or −1 in a single one, where every
    // call fails; the message is plain data of the size that is asked for, and descriptors that
    // come with it are not taken.
    unsafe {
        let channel = ngx_channel;
        let mut found = false;
        set_peek_offset(channel, 0);
        loop {
            let mut message: Message = core::mem::zeroed();
            let size = size_of::<Message>();
            let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT;
            let got = libc::recv(channel, (&raw mut message).cast(), size, flags);
            if usize::try_from(got) != Ok(size) {
                break;
            }
            found |= [NGX_CMD_QUIT, NGX_CMD_TERMINATE]
                .map(|c| c as ngx_uint_t)
                .contains(&message.command);
        }
        set_peek_offset(channel, -1);
        found
    }
}

/// Where the next peek begins; each one moves it on. −1 is the usual way (socket(7)).
fn set_peek_offset(socket: c_int, offset: c_int) {
    let value = (&raw const offset).cast();
    let len = size_of::<c_int>() as libc::socklen_t;
    // SAFETY: the option takes an int; on what is no socket the call fails.
    unsafe { libc::setsockopt(socket, libc::SOL_SOCKET, libc::SO_PEEK_OFF, value, len) };
}
