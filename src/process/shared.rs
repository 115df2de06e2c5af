//! What the workers of one generation share: a zone of our own.

use core::ptr;
use core::sync::atomic::{AtomicBool, AtomicI32, AtomicPtr, AtomicU64, Ordering};

use nginx_sys::{
    NGX_ERROR, NGX_OK, ngx_conf_t, ngx_int_t, ngx_pagesize, ngx_shared_memory_add, ngx_shm_zone_t,
    ngx_slab_calloc, ngx_slab_pool_t, ngx_str_t,
};

use super::cost::Cost;
use crate::conf::MainConf;
use crate::ngx_http_consul_upstream_module;

/// The zone's name, which stands in nginx's logs.
const NAME: &str = "consul_upstream";

/// nginx's `NGX_MAX_PROCESSES`.
const PROCESSES: usize = 1024;

/// The zone's content. Zeroed memory is a valid one.
pub struct Shared {
    /// New workers may take requests; see [`super::gate`].
    pub open: AtomicBool,
    /// The process that is each worker, by its number; 0 for none.
    workers: [AtomicI32; PROCESSES],
    /// The edit under way; see [`super::journal`].
    pub edit: AtomicU64,
    /// For each upstream, behind this structure.
    costs: AtomicPtr<Cost>,
}

/// Adds the zone to the configuration, with room for so many upstreams.
///
/// # Safety
///
/// `cf` is the context of the http block.
pub unsafe fn add(cf: *mut ngx_conf_t, upstreams: usize) -> Option<*mut ngx_shm_zone_t> {
    // SAFETY: the name is static; nginx copies the rest. The tag is the module, as usual.
    unsafe {
        let mut name = ngx_str_t { len: NAME.len(), data: NAME.as_ptr().cast_mut() };
        // nginx's own tables, and what is here.
        let size = 8 * ngx_pagesize + costs(upstreams).next_multiple_of(ngx_pagesize);
        let tag = ptr::addr_of_mut!(ngx_http_consul_upstream_module).cast();
        let zone = ngx_shared_memory_add(cf, &mut name, size, tag);
        if zone.is_null() {
            return None;
        }
        (*zone).init = Some(init);
        // Until then: how much room for them there is.
        (*zone).data = ptr::without_provenance_mut(costs(upstreams));
        // Every generation of workers has one of its own.
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
        let shared: *mut Shared = ngx_slab_calloc(pool, size_of::<Shared>()).cast();
        let costs = ngx_slab_calloc(pool, (*zone).data.addr());
        if shared.is_null() || costs.is_null() {
            return NGX_ERROR as ngx_int_t;
        }
        (*shared).costs.store(costs.cast(), Ordering::Relaxed);
        (*zone).data = shared.cast();
        NGX_OK as ngx_int_t
    }
}

/// How many bytes the costs of so many upstreams take.
fn costs(upstreams: usize) -> usize {
    upstreams.max(1) * size_of::<Cost>()
}

impl Shared {
    /// What changes of an upstream cost; it is one of those that the zone was made for.
    pub fn cost(&self, upstream: usize) -> &Cost {
        // SAFETY: `init` has made them, for all upstreams of the configuration.
        unsafe { &*self.costs.load(Ordering::Relaxed).add(upstream) }
    }

    /// That of a configuration in use.
    ///
    /// # Safety
    ///
    /// `main` belongs to a cycle whose zones are there, and has upstreams.
    pub unsafe fn of(main: &MainConf) -> &Self {
        // SAFETY: `init` has made it, and the mapping lasts as long as the cycle.
        unsafe { &*(*main.shared.0).data.cast::<Self>() }
    }

    /// This process is the worker of this number.
    pub fn enter(&self, number: usize) {
        if let Some(worker) = self.workers.get(number) {
            worker.store(own_pid(), Ordering::Relaxed);
        }
    }

    /// It ends. Where the first one does, its generation is over; should the master start another one
    /// on the same zones, as it does when an upgrade is taken back, that has to ask Consul first.
    pub fn leave(&self) {
        let own = own_pid();
        if self.is_worker(0, own) {
            self.open.store(false, Ordering::Release);
        }
        for worker in &self.workers {
            // Whoever has its place by now keeps it.
            let _ = worker.compare_exchange(own, 0, Ordering::Relaxed, Ordering::Relaxed);
        }
    }

    /// Whether a process was the last worker of this number.
    pub fn is_worker(&self, number: usize, pid: i32) -> bool {
        self.workers.get(number).is_some_and(|worker| worker.load(Ordering::Relaxed) == pid)
    }

    /// Whether another worker of this generation is there still.
    pub fn is_in_company(&self) -> bool {
        let own = own_pid();
        self.workers
            .iter()
            .map(|worker| worker.load(Ordering::Relaxed))
            .any(|pid| pid != 0 && pid != own && lives(pid))
    }
}

/// This process, as others know it.
pub fn own_pid() -> i32 {
    // SAFETY: the call has no preconditions.
    unsafe { libc::getpid() }
}

/// Whether there is such a process.
pub fn lives(pid: i32) -> bool {
    // SAFETY: the call only looks; pids here are positive.
    let found = unsafe { libc::kill(pid, 0) } == 0;
    found || std::io::Error::last_os_error().raw_os_error() != Some(libc::ESRCH)
}
