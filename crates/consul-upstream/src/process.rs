//! The life of a worker: who follows Consul, how a change gets from its thread to nginx's, and how
//! both end.
//!
//! The first worker of a generation runs the consul thread ([`thread`]) and edits the lists of all
//! upstreams ([`apply`]); the others read them. Between the two threads stands a [`handoff`]. The
//! [`gate`] holds new workers back until the first answers are there. What the workers know of each
//! other stands in [`shared`]; there is also the [`journal`] of the edit under way, for whoever takes
//! the place of a worker that was killed, and the [`board`] of what is known of discovery: a
//! [`record`] for each upstream, which every worker can show.
//!
//! At a reload the old generation's first worker goes on following Consul until all its others
//! have ended: a request that was long in coming may have to choose a server still. It writes
//! nothing to the stored state any more, which is the next generation's.
//!
//! Everything here but [`thread`] runs on nginx's main thread.

use core::ptr;
use core::sync::atomic::Ordering;

use nginx_sys::{
    NGX_LOG_CRIT, NGX_LOG_WARN, NGX_OK, NGX_PROCESS_SINGLE, NGX_PROCESS_WORKER, ngx_cycle_t,
    ngx_int_t, ngx_process, ngx_test_config, ngx_uint_t, ngx_worker,
};

pub use self::apply::Applier;
pub use self::cost::Cost;
pub use self::plan::source_of;
pub use self::shared::Shared;
pub use self::shared::{add as add_zone, own_pid};
use crate::conf::finish::server_conf;
use crate::guard::guard;
use crate::protocol::{Protocol, main_conf};
use crate::{failpoint, log};

pub mod about;
mod apply;
mod assembly;
mod board;
pub mod clock;
mod cost;
mod gate;
mod handoff;
mod journal;
mod plan;
pub mod record;
mod shared;
mod stored;
mod story;
mod tale;
mod thread;

/// Called in the master after each reading of the configuration, and by `nginx -t`: nothing is
/// started there, and by the latter nothing made. In single-process mode a reload comes by here and nowhere else: the thread that
/// followed the old configuration is replaced.
///
/// # Safety
///
/// As nginx calls it.
pub unsafe extern "C" fn init_module<P: Protocol>(cycle: *mut ngx_cycle_t) -> ngx_int_t {
    guard("a reload", (), || {
        // SAFETY: the cycle is nginx's new one, and nobody else uses it yet.
        unsafe {
            P::configured(cycle);
            prepare::<P>(cycle);
        }
        if !P::applier().load(Ordering::Relaxed).is_null() {
            // SAFETY: the cycle is nginx's new one; its configuration is complete.
            unsafe {
                stop::<P>();
                start::<P>(cycle);
            }
        }
    });
    NGX_OK as ngx_int_t
}

/// Makes the directory for what is stored, as long as this process may.
///
/// # Safety
///
/// `cycle` is complete, and in nobody else's hands.
unsafe fn prepare<P: Protocol>(cycle: *mut ngx_cycle_t) {
    // SAFETY: the caller's promise; nginx writes the word before it reads a configuration.
    unsafe {
        if ngx_test_config != 0 {
            return;
        }
        let Some(main) = main_conf::<P>(cycle) else { return };
        let Some(path) = main.state_path().filter(|_| !main.upstreams.is_empty()) else { return };
        if let Err(err) = stored::make_directory(cycle, path) {
            let line = format_args!(
                "consul: cannot make the directory \"{}\", nothing is stored: {err}",
                path.display()
            );
            log::write(NGX_LOG_WARN, (*cycle).log, line);
            main.store_nothing();
        }
    }
}

/// Called in every new process before the other modules: a worker that died while it edited a list
/// has left it locked.
///
/// # Safety
///
/// As nginx calls it.
pub unsafe extern "C" fn recover<P: Protocol>(cycle: *mut ngx_cycle_t) -> ngx_int_t {
    guard("the recovery of a list", (), || {
        // SAFETY: the cycle is nginx's; the variables are written before this call.
        unsafe {
            failpoint::init();
            if ngx_process == NGX_PROCESS_WORKER as ngx_uint_t
                && let Some(main) = main_conf::<P>(cycle).filter(|main| !main.upstreams.is_empty())
            {
                journal::recover_lists(main, ngx_worker);
            }
        }
    });
    NGX_OK as ngx_int_t
}

/// Called in every new process. An error would end the worker for good, so none is returned.
///
/// # Safety
///
/// As nginx calls it.
pub unsafe extern "C" fn init_process<P: Protocol>(cycle: *mut ngx_cycle_t) -> ngx_int_t {
    guard("the start of a worker", (), || {
        // SAFETY: the cycle is nginx's; the variables are written before this call.
        unsafe {
            if ngx_process == NGX_PROCESS_WORKER as ngx_uint_t
                || ngx_process == NGX_PROCESS_SINGLE as ngx_uint_t
            {
                start::<P>(cycle);
            }
        }
    });
    NGX_OK as ngx_int_t
}

/// Called at the end of every process. The module is unmapped right after: no thread of it may be
/// left.
///
/// # Safety
///
/// As nginx calls it.
pub unsafe extern "C" fn exit_process<P: Protocol>(cycle: *mut ngx_cycle_t) {
    guard("the end of a worker", (), || {
        // SAFETY: nginx's main thread; the cycle and its zones are there to the end.
        unsafe {
            stop::<P>();
            if let Some(main) = main_conf::<P>(cycle).filter(|main| !main.upstreams.is_empty()) {
                Shared::of(main).leave();
            }
        }
    });
}

/// # Safety
///
/// On nginx's main thread, in a worker or the single process, with a complete cycle.
unsafe fn start<P: Protocol>(cycle: *mut ngx_cycle_t) {
    // SAFETY: nginx's main thread is the only one that runs this, and the cycle outlives the
    // applier: `stop` comes before its end.
    unsafe {
        let Some(main) = main_conf::<P>(cycle) else { return };
        if main.upstreams.is_empty() {
            return;
        }
        let shared = Shared::of(main);
        shared.enter(ngx_worker);
        for (number, upstream) in main.upstreams.iter().enumerate() {
            if let Some(conf) = server_conf::<P>(upstream.nginx) {
                (*conf).cost = Some(shared.cost(number));
            }
        }
        if ngx_worker != 0 {
            gate::wait(main);
            return;
        }
        match Applier::start(main) {
            Ok(applier) => {
                let applier = Box::into_raw(applier);
                P::applier().store(applier, Ordering::Relaxed);
                gate::wait_and_open(main, &mut *applier);
            }
            Err(err) => {
                log::cycle(NGX_LOG_CRIT, format_args!("consul: cannot start: {err}"));
                gate::open(main);
            }
        }
    }
}

/// # Safety
///
/// On nginx's main thread.
unsafe fn stop<P: Protocol>() {
    let applier = P::applier().swap(ptr::null_mut(), Ordering::Relaxed);
    if !applier.is_null() {
        // SAFETY: `start` made it of a box, and nobody but this thread has it.
        drop(unsafe { Box::from_raw(applier) });
    }
}
