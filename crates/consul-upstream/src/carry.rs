//! What a reload takes over: the peers that serve, from the old zone into the new one.
//!
//! The zone of an upstream is never used again: every reload starts with what the configuration
//! says. nginx gives the function that fills the new zone the configuration of the old one, and
//! ours stands around it. It runs in the master, before the new workers are started, so that they
//! have the peers from their first request on, whether Consul answers or not.

use core::ffi::c_void;
use std::time::{Duration, Instant};

use nginx_peers::List;
use nginx_peers::carry::{Carried, copy};
use nginx_peers::list::Statics;
use nginx_peers::{PeersAbi, ServerAbi, UpstreamAbi, servers_of, stock};
use nginx_sys::{
    NGX_ERROR, NGX_LOG_ERR, NGX_LOG_NOTICE, NGX_LOG_WARN, NGX_OK, ngx_int_t, ngx_shm_zone_init_pt,
    ngx_shm_zone_t,
};

use crate::conf::Upstream;
use crate::conf::finish::server_conf;
use crate::guard::guard;
use crate::log;
use crate::process::source_of;
use crate::protocol::{Peers, Protocol};

/// How long the master waits for the lock of an old list. Edits and requests hold it for less; a
/// worker that was killed holds it for ever.
const PATIENCE: Duration = Duration::from_millis(250);

/// What an upstream has to know to take over the peers of the one before it.
pub struct Heir {
    name: String,
    zone: String,
    statics: Statics,
    /// The sources that it still asks for: the peers of others are none of its own.
    sources: Vec<u64>,
    /// nginx's function for the zone; the first of the upstreams that share one has it.
    init_zone: ngx_shm_zone_init_pt,
}

impl Heir {
    /// Puts our function in the place of the zone's, where that is not done yet.
    ///
    /// # Safety
    ///
    /// The zone of `upstream` is being configured; the value goes into the upstream's
    /// configuration.
    pub unsafe fn new<P: Protocol>(upstream: &Upstream<P>) -> Self {
        // SAFETY: the caller's promise.
        let init_zone = unsafe {
            let zone = *P::Upstream::shm_zone(upstream.nginx);
            let function: unsafe extern "C" fn(*mut ngx_shm_zone_t, *mut c_void) -> ngx_int_t =
                init_zone::<P>;
            let ours = (*zone).init.is_some_and(|init| core::ptr::fn_addr_eq(init, function));
            if ours { None } else { (*zone).init.replace(function) }
        };
        Self {
            name: upstream.name.clone(),
            zone: upstream.zone.clone(),
            statics: upstream.statics,
            sources: upstream.sources.iter().map(|it| source_of(upstream, it)).collect(),
            init_zone,
        }
    }
}

/// # Safety
///
/// As nginx calls it: `zone` is the new one, and `old` the data of the one before, or null.
unsafe extern "C" fn init_zone<P: Protocol>(
    zone: *mut ngx_shm_zone_t,
    old: *mut c_void,
) -> ngx_int_t {
    guard("a new zone", NGX_ERROR as ngx_int_t, || {
        // SAFETY: the data of an upstream's zone is the configuration of all upstreams. That of
        // the old one belongs to a cycle that is in use. Its part of our module is not touched: it
        // may be another version's.
        unsafe {
            let upstreams = P::Upstream::all((*zone).data);
            let heirs = || {
                let ours = upstreams.iter().filter(|it| *P::Upstream::shm_zone(**it) == zone);
                ours.filter_map(|nginx| {
                    let conf = server_conf::<P>(*nginx)?;
                    Some((*nginx, (*conf).heir.as_ref()?))
                })
            };
            let Some(init) = heirs().find_map(|(_, heir)| heir.init_zone) else {
                return NGX_ERROR as ngx_int_t;
            };
            let rc = init(zone, old);
            if rc != NGX_OK as ngx_int_t || old.is_null() {
                return rc;
            }
            let old = P::Upstream::all(old);
            for (nginx, heir) in heirs() {
                if let Some(before) = old.iter().find(|before| same(**before, nginx)) {
                    take_over::<P>(zone, heir, *before, nginx);
                }
            }
            rc
        }
    })
}

/// Whether an upstream of the old configuration is the one before `new`: it has its name, and its
/// zone has. That is nginx's own rule.
///
/// # Safety
///
/// Both are live.
unsafe fn same<U: UpstreamAbi>(old: *mut U, new: *mut U) -> bool {
    // SAFETY: the caller's promise; names are there with their upstreams and zones.
    unsafe {
        let (old_zone, new_zone) = (*U::shm_zone(old), *U::shm_zone(new));
        !old_zone.is_null()
            && (*old_zone).shm.name.as_bytes() == (*new_zone).shm.name.as_bytes()
            && (*U::host(old)).as_bytes() == (*U::host(new)).as_bytes()
    }
}

/// # Safety
///
/// In the master, with the old list in use by its workers, and the new one by nobody.
unsafe fn take_over<P: Protocol>(
    zone: *mut ngx_shm_zone_t,
    heir: &Heir,
    old: *mut P::Upstream,
    new: *mut P::Upstream,
) {
    let begin = Instant::now();
    let Heir { name, zone: zone_name, .. } = heir;
    // SAFETY: both have lists in their zones, which nginx has made of their static servers.
    unsafe {
        let say = |level, args| log::write(level, (*zone).shm.log, args);
        // The upstream may have had another method, and nothing of ours.
        let Some(before) = stock::shared_list_of(old) else { return };
        let Some(copied) = copy(before, statics_of(old), PATIENCE) else {
            say(
                NGX_LOG_WARN,
                format_args!(
                    "consul: upstream \"{name}\": the old list is locked, it starts with what is \
                     stored"
                ),
            );
            return;
        };
        let carried: Vec<Carried> = copied.peers(|source| heir.sources.contains(&source));
        if carried.is_empty() {
            return;
        }
        let primaries = P::Upstream::peers(new);
        // A full zone is our line to write, with the size that would do.
        (*(*Peers::<P>::shpool(primaries))).set_log_nomem(0);
        let taken = List::new(primaries, heir.statics).take_over(&carried);
        let (locked, all) = (copied.locked.as_micros(), begin.elapsed().as_micros());
        match taken {
            Ok(taken) => say(
                NGX_LOG_NOTICE,
                format_args!(
                    "consul: upstream \"{name}\": {taken} servers taken over in {all}us, the old \
                     list was locked for {locked}us"
                ),
            ),
            Err((taken, full)) => say(
                NGX_LOG_ERR,
                format_args!(
                    "consul: upstream \"{name}\": zone \"{zone_name}\" of {}k is full, {taken} of \
                     {} servers are taken over; \"zone {zone_name} {}k\" would do",
                    full.size.div_ceil(1024),
                    carried.len(),
                    full.needed
                ),
            ),
        }
    }
}

/// How many peers of its lists come from the configuration.
///
/// # Safety
///
/// `nginx` is live.
unsafe fn statics_of<U: UpstreamAbi>(nginx: *mut U) -> Statics {
    let mut statics = Statics::default();
    // SAFETY: nginx's own list of servers, from which it has made the peers. Those whose names it
    // resolves at run time stand in a list of their own.
    unsafe {
        for server in servers_of(nginx) {
            if (*U::Server::host(server)).len == 0 {
                let side = if U::Server::is_backup(server) {
                    &mut statics.backups
                } else {
                    &mut statics.primaries
                };
                *side += *U::Server::naddrs(server);
            }
        }
    }
    statics
}
