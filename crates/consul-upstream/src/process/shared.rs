//! What the workers of one generation share: a zone of our own.

use core::ptr;
use core::sync::atomic::{AtomicBool, AtomicI32, AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::hash::{DefaultHasher, Hash, Hasher};

use nginx_sys::{
    NGX_ERROR, NGX_OK, ngx_conf_t, ngx_int_t, ngx_pagesize, ngx_shared_memory_add, ngx_shm_zone_t,
    ngx_slab_calloc, ngx_slab_page_t, ngx_slab_pool_t, ngx_str_t,
};

use super::about::About;
use super::board::{self, Place};
use super::clock::Moment;
use super::cost::Cost;
use crate::conf::MainConf;
use crate::guard::guard;
use crate::protocol::Protocol;

/// nginx's `NGX_MAX_PROCESSES`.
const PROCESSES: usize = 1024;

/// Says of which shape the content is: the module of another protocol, which may be of another version,
/// reads it as well.
const SHAPE: u64 = {
    let version = env!("CARGO_PKG_VERSION").as_bytes();
    let mut sum = 0xcbf2_9ce4_8422_2325_u64 ^ (size_of::<Shared>() as u64) << 32;
    let mut n = 0;
    while n < version.len() {
        sum = (sum ^ version[n] as u64).wrapping_mul(0x0100_0000_01b3);
        n += 1;
    }
    sum
};

/// The zone's content. Zeroed memory is a valid one.
#[repr(C)]
pub struct Shared {
    /// [`SHAPE`].
    shape: AtomicU64,
    /// New workers may take requests; see [`super::gate`].
    pub open: AtomicBool,
    /// The process that is each worker, by its number; 0 for none.
    workers: [AtomicI32; PROCESSES],
    /// The edit under way; see [`super::journal`].
    pub edit: AtomicU64,
    /// For each upstream, behind this structure.
    costs: AtomicPtr<Cost>,
    /// What is known of each upstream, and behind them of the consul thread; then what the configuration
    /// says of each upstream.
    places: AtomicPtr<Place>,
    /// How many upstreams there are.
    upstreams: AtomicUsize,
    /// How many connections there may be to one agent.
    max_connections: AtomicUsize,
    /// When the zone was made.
    loaded: AtomicU64,
    /// When the consul thread last said that it lives; 0 is never.
    heartbeat: AtomicU64,
}

/// Adds the zone to the configuration, with room for what is known of its upstreams.
///
/// # Safety
///
/// `cf` is the context of the block, and `main` ours of it, complete.
pub unsafe fn add<P: Protocol>(
    cf: *mut ngx_conf_t,
    main: &MainConf<P>,
) -> Option<*mut ngx_shm_zone_t> {
    // SAFETY: the name is static; nginx copies the rest. The tag is the module, as usual.
    unsafe {
        let mut name = ngx_str_t { len: P::ZONE.len(), data: P::ZONE.as_ptr().cast_mut() };
        let size = size(main);
        let tag = P::module().cast();
        let zone = ngx_shared_memory_add(cf, &mut name, size, tag);
        if zone.is_null() {
            return None;
        }
        (*zone).init = Some(init::<P>);
        // Until then: whom it is for.
        (*zone).data = ptr::from_ref(main).cast_mut().cast();
        // Every generation of workers has one of its own.
        (*zone).noreuse = 1;
        Some(zone)
    }
}

/// How large the zone has to be.
fn size<P: Protocol>(main: &MainConf<P>) -> usize {
    // SAFETY: nginx writes the word once, before all.
    let page = unsafe { ngx_pagesize };
    let pages = |bytes: usize| bytes.div_ceil(page);
    // As nginx's allocator does: whole pages, or slots of which some share a page. Of each size of slot
    // one page may not be full.
    let slot = |bytes: usize| match bytes.next_power_of_two() {
        slot if slot <= page / 2 => slot,
        _ => pages(bytes) * page,
    };
    let records: usize = rooms(main).map(|room| slot(board::size(room))).sum();
    let records = pages(records) + page.ilog2() as usize;
    let upstreams = main.upstreams.len();
    let used = pages(costs(upstreams)) + pages(places(upstreams)) + records;
    // nginx's own tables, and what is here.
    8 * page + (used + pages(used * size_of::<ngx_slab_page_t>())) * page
}

/// How many bytes each record may have: of the upstreams, of the thread, and what the configuration says.
fn rooms<P: Protocol>(main: &MainConf<P>) -> impl Iterator<Item = usize> {
    let upstreams = main.upstreams.iter().map(|upstream| board::room(upstream.sources.len()));
    let abouts = main.upstreams.iter().map(|upstream| About::new(upstream).encode().len());
    upstreams.chain([board::room(0)]).chain(abouts)
}

/// # Safety
///
/// As nginx calls it: the zone's memory is there. `old` is the data of the zone of this name in the
/// configuration before, if that was this very module's, or null.
unsafe extern "C" fn init<P: Protocol>(
    zone: *mut ngx_shm_zone_t,
    old: *mut core::ffi::c_void,
) -> ngx_int_t {
    guard("the zone of the workers", NGX_ERROR as ngx_int_t, || {
        // SAFETY: the pool stands at the begin of the zone; zeroed memory is a closed gate. Until now
        // the data is what `add` has stored, a configuration that is complete; that of the old zone
        // is what this function has made of it, and its workers are there still.
        unsafe {
            let pool: *mut ngx_slab_pool_t = (*zone).shm.addr.cast();
            let main = &*(*zone).data.cast::<MainConf<P>>();
            let upstreams = main.upstreams.len();
            let shared: *mut Shared = ngx_slab_calloc(pool, size_of::<Shared>()).cast();
            let costs = ngx_slab_calloc(pool, costs(upstreams));
            let places: *mut Place = ngx_slab_calloc(pool, places(upstreams)).cast();
            if shared.is_null() || costs.is_null() || places.is_null() {
                return NGX_ERROR as ngx_int_t;
            }
            (*shared).costs.store(costs.cast(), Ordering::Relaxed);
            (*shared).places.store(places, Ordering::Relaxed);
            (*shared).upstreams.store(upstreams, Ordering::Relaxed);
            (*shared).loaded.store(Moment::now().0, Ordering::Relaxed);
            (*shared).max_connections.store(main.max_connections(), Ordering::Relaxed);
            (*shared).shape.store(SHAPE, Ordering::Relaxed);
            let names = main.upstreams.iter().map(|upstream| Some(&*upstream.name));
            let names = names.chain(core::iter::repeat(None));
            for (number, (name, room)) in names.zip(rooms(main)).enumerate() {
                let place = &*places.add(number);
                let name = name.map_or(0, hash);
                if !place.make(pool, name, room) {
                    return NGX_ERROR as ngx_int_t;
                }
                // What was known goes on.
                if name != 0
                    && let Some(old) = old.cast::<Shared>().as_ref()
                    && let Some(before) = old.all().iter().position(|place| place.name() == name)
                {
                    if let Some(record) = old.place(before).read() {
                        place.write(&record);
                    }
                    (*shared).cost(number).add_repaired(old.cost(before).repaired());
                }
            }
            // nginx makes zones in the order of the configuration: those of the upstreams are there.
            for (number, upstream) in main.upstreams.iter().enumerate() {
                (*shared).about(number).write(&About::with_list(upstream).encode());
            }
            (*zone).data = shared.cast();
            NGX_OK as ngx_int_t
        }
    })
}

/// An upstream's name in brief; never 0.
fn hash(name: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    name.hash(&mut hasher);
    hasher.finish().max(1)
}

/// How many bytes the costs of so many upstreams take.
fn costs(upstreams: usize) -> usize {
    upstreams.max(1) * size_of::<Cost>()
}

/// How many bytes the places of so many upstreams, and of the thread, take.
fn places(upstreams: usize) -> usize {
    (2 * upstreams + 1) * size_of::<Place>()
}

impl Shared {
    /// The places of the upstreams, in the configuration's order, of the thread, and of what the
    /// configuration says.
    fn all(&self) -> &[Place] {
        let len = 2 * self.upstreams() + 1;
        // SAFETY: `init` has made so many, before anybody has this structure.
        unsafe { core::slice::from_raw_parts(self.places.load(Ordering::Relaxed), len) }
    }

    /// What is known of an upstream; it is one of those that the zone was made for.
    pub fn place(&self, upstream: usize) -> &Place {
        &self.all()[upstream]
    }

    /// What is known of the consul thread.
    pub fn thread_place(&self) -> &Place {
        &self.all()[self.upstreams()]
    }

    /// What the configuration says of an upstream; it is one of those that the zone was made for.
    pub fn about(&self, upstream: usize) -> &Place {
        &self.all()[self.upstreams() + 1 + upstream]
    }

    /// How many upstreams there are.
    pub fn upstreams(&self) -> usize {
        self.upstreams.load(Ordering::Relaxed)
    }

    /// How many connections there may be to one agent.
    pub fn max_connections(&self) -> usize {
        self.max_connections.load(Ordering::Relaxed)
    }

    /// When the zone was made.
    pub fn loaded(&self) -> Moment {
        Moment(self.loaded.load(Ordering::Relaxed))
    }

    /// When the consul thread last said that it lives.
    pub fn heartbeat(&self) -> Option<Moment> {
        match self.heartbeat.load(Ordering::Relaxed) {
            0 => None,
            at => Some(Moment(at)),
        }
    }

    /// The consul thread says that it lives.
    pub fn beat(&self, at: Moment) {
        self.heartbeat.store(at.0, Ordering::Relaxed);
    }

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
    pub unsafe fn of<P: Protocol>(main: &MainConf<P>) -> &Self {
        // SAFETY: `init` has made it, and the mapping lasts as long as the cycle.
        unsafe { &*(*main.shared.0).data.cast::<Self>() }
    }

    /// That of a zone, whichever module has made it; none where it is of another shape.
    ///
    /// # Safety
    ///
    /// `zone` is a zone of a cycle in use, with a name of ours.
    pub unsafe fn of_zone(zone: *mut ngx_shm_zone_t) -> Option<&'static Self> {
        // SAFETY: the first word of all shapes says which it is; the mapping lasts as long as the cycle.
        unsafe {
            let shape = (*zone).data.cast::<AtomicU64>().as_ref()?;
            (shape.load(Ordering::Relaxed) == SHAPE).then(|| &*(*zone).data.cast::<Self>())
        }
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
