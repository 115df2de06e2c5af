//! New workers wait for the first answers before they take requests.
//!
//! A worker that starts with an empty upstream would answer 502 until Consul has answered, a few
//! milliseconds later. The first worker waits for all upstreams at once and opens the gate, a word
//! in a zone of our own; the others look at it. Each waits for `consul_start_timeout` at most.

use core::ptr;
use core::sync::atomic::{AtomicBool, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nginx_sys::{
    NGX_ERROR, NGX_LOG_WARN, NGX_OK, ngx_conf_t, ngx_int_t, ngx_pagesize, ngx_quit,
    ngx_shared_memory_add, ngx_shm_zone_t, ngx_slab_calloc, ngx_slab_pool_t, ngx_str_t,
    ngx_terminate, ngx_time_update,
};

use super::apply::Applier;
use crate::conf::MainConf;
use crate::log;
use crate::ngx_http_consul_upstream_module;

/// The zone's name, which stands in nginx's logs.
const NAME: &str = "consul_upstream";

/// How often the other workers look.
const LOOK: Duration = Duration::from_millis(5);

/// The word in shared memory.
#[derive(Default)]
struct Gate {
    open: AtomicBool,
}

/// Adds the zone to the configuration.
///
/// # Safety
///
/// `cf` is the context of the http block.
pub unsafe fn add(cf: *mut ngx_conf_t) -> Option<*mut ngx_shm_zone_t> {
    // SAFETY: the name is static; nginx copies the rest. The tag is the module, as usual.
    unsafe {
        let mut name = ngx_str_t { len: NAME.len(), data: NAME.as_ptr().cast_mut() };
        let size = 8 * ngx_pagesize;
        let tag = ptr::addr_of_mut!(ngx_http_consul_upstream_module).cast();
        let zone = ngx_shared_memory_add(cf, &mut name, size, tag);
        if zone.is_null() {
            return None;
        }
        (*zone).init = Some(init);
        // Every generation of workers has a gate of its own.
        (*zone).noreuse = 1;
        Some(zone)
    }
}

/// # Safety
///
/// As nginx calls it: the zone's memory is there.
unsafe extern "C" fn init(zone: *mut ngx_shm_zone_t, _old: *mut core::ffi::c_void) -> ngx_int_t {
    // SAFETY: the pool stands at the begin of the zone; zeroed memory is a closed gate.
    unsafe {
        let pool: *mut ngx_slab_pool_t = (*zone).shm.addr.cast();
        let gate = ngx_slab_calloc(pool, size_of::<Gate>());
        if gate.is_null() {
            return NGX_ERROR as ngx_int_t;
        }
        (*zone).data = gate;
        NGX_OK as ngx_int_t
    }
}

/// The gate of a configuration in use.
///
/// # Safety
///
/// `main` belongs to a cycle whose zones are there, and has upstreams.
unsafe fn gate(main: &MainConf) -> &Gate {
    // SAFETY: `init` has made it, and the mapping lasts as long as the cycle.
    unsafe { &*(*main.gate.0).data.cast::<Gate>() }
}

/// Waits until the first worker has opened the gate.
///
/// # Safety
///
/// On the main thread of another worker; see [`gate`].
pub unsafe fn wait(main: &MainConf) {
    // SAFETY: this function's own contract.
    let gate = unsafe { gate(main) };
    let until = Instant::now() + main.start_timeout();
    while !gate.open.load(Ordering::Acquire) && Instant::now() < until && !ending() {
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
/// On the main thread of the first worker; see [`gate`].
pub unsafe fn wait_and_open(main: &MainConf, applier: &mut Applier) {
    // SAFETY: this function's own contract.
    if unsafe { gate(main) }.open.load(Ordering::Acquire) {
        return;
    }
    let until = Instant::now() + main.start_timeout();
    while !applier.all_answered() && !ending() {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            break;
        }
        applier.wait(left);
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
/// See [`gate`].
pub unsafe fn open(main: &MainConf) {
    // SAFETY: this function's own contract.
    unsafe { gate(main) }.open.store(true, Ordering::Release);
}

/// Whether a signal asks the worker to end. What the master says by its channel is read only after
/// the start; it is bounded as the wait is.
fn ending() -> bool {
    // SAFETY: words that nginx's signal handler writes, on this thread.
    unsafe {
        ptr::read_volatile(&raw const ngx_quit) != 0
            || ptr::read_volatile(&raw const ngx_terminate) != 0
    }
}
