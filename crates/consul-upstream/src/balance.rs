//! The outermost layer around an upstream's balancer, one per request.
//!
//! nginx makes a balancer answer "busy" to a request whose list of peers has changed since the
//! request was initialised, at its first choice as well as at a retry, and busy means 502 though
//! peers are alive. This layer sees the change and initialises the balancer again. The decisions
//! are in [`nginx_peers::retry`]; here are the calls.
//!
//! A request is initialised again only in `get`: there it holds no peer, so nothing can leak. All
//! callbacks that a balancer may set are passed on, because `peer.data` is ours and the balancer
//! expects its own.

use core::ffi::c_void;
use core::ptr::NonNull;
use core::{ptr, slice};
use std::time::Instant;

use nginx_peers::meter::Meter;
use nginx_peers::retry::Attempts;
use nginx_peers::{PeerAbi, PeersAbi, UpstreamAbi};
use nginx_sys::{
    NGX_BUSY, NGX_DONE, NGX_ERROR, NGX_OK, NGX_PEER_FAILED, NGX_PEER_NEXT, ngx_current_msec,
    ngx_event_free_peer_pt, ngx_event_get_peer_pt, ngx_event_notify_peer_pt, ngx_int_t, ngx_palloc,
    ngx_peer_connection_t, ngx_uint_t,
};
#[cfg(any(ngx_feature = "ssl", ngx_feature = "compat"))]
use nginx_sys::{ngx_event_save_peer_session_pt, ngx_event_set_peer_session_pt};

use crate::conf::ServerConf;
use crate::conf::finish::server_conf;
use crate::failpoint;
use crate::protocol::{Peer, Peers, Protocol, Session};

const OK: ngx_int_t = NGX_OK as ngx_int_t;
const DONE: ngx_int_t = NGX_DONE as ngx_int_t;
const BUSY: ngx_int_t = NGX_BUSY as ngx_int_t;
const ERROR: ngx_int_t = NGX_ERROR as ngx_int_t;

/// What a request's balancer set, and what the request has done with it.
struct Balancer<P: Protocol> {
    request: *mut Session<P>,
    upstream: *mut P::Upstream,
    inner: Inner,
    /// The list's change counter before the balancer was initialised.
    config: ngx_uint_t,
    attempts: Attempts,
    /// The peer that the request holds, and its meter, if it has one.
    peer: Option<(*mut Peer<P>, NonNull<Meter>)>,
    /// What the protocol notes of that.
    held: P::Held,
    /// Traces of the balancer in the request, as headers of the response, since the last initialisation.
    left: P::Left,
}

/// The fields of `ngx_peer_connection_t` that a balancer fills in.
#[derive(Clone, Copy)]
struct Inner {
    data: *mut c_void,
    get: ngx_event_get_peer_pt,
    free: ngx_event_free_peer_pt,
    notify: ngx_event_notify_peer_pt,
    #[cfg(any(ngx_feature = "ssl", ngx_feature = "compat"))]
    set_session: ngx_event_set_peer_session_pt,
    #[cfg(any(ngx_feature = "ssl", ngx_feature = "compat"))]
    save_session: ngx_event_save_peer_session_pt,
}

/// `peer.init` of an upstream with `consul_upstream`.
///
/// # Safety
///
/// As nginx calls it: a request that has an upstream, and the upstream's configuration.
pub unsafe extern "C" fn init_peer<P: Protocol>(
    request: *mut Session<P>,
    upstream: *mut P::Upstream,
) -> ngx_int_t {
    // SAFETY: the request and its pool are live; the memory is written whole before it is used,
    // and holds nothing that would have to be dropped.
    unsafe {
        let balancer: *mut Balancer<P> =
            ngx_palloc(P::pool(request), size_of::<Balancer<P>>()).cast();
        if balancer.is_null() {
            return ERROR;
        }
        let pc = P::peer_connection(request);
        if failpoint::is_off("retry") {
            return init_inner::<P>(pc, request, upstream).1;
        }
        let (config, rc) = init_inner::<P>(pc, request, upstream);
        if rc != OK {
            return rc;
        }
        let limit = P::most_tries(request);
        let inner = Inner::of(pc);
        let attempts = match limit {
            Some(limit) => Attempts::new(limit),
            None => Attempts::limited_by(&mut (*pc).tries),
        };
        let (peer, held, left) = (None, P::Held::default(), P::Left::default());
        balancer.write(Balancer { request, upstream, inner, config, attempts, peer, held, left });
        (*balancer).wrap(pc);
        OK
    }
}

/// Calls the balancer's own `peer.init`. Returns the change counter that it has seen at least.
///
/// # Safety
///
/// As [`init_peer`]; `pc` is the request's.
unsafe fn init_inner<P: Protocol>(
    pc: *mut ngx_peer_connection_t,
    request: *mut Session<P>,
    upstream: *mut P::Upstream,
) -> (ngx_uint_t, ngx_int_t) {
    // SAFETY: `conf::finish` has replaced a callback that it kept in this configuration.
    unsafe {
        // Before: a change in between is then seen as one, and not missed.
        let config = config_of::<P>(upstream);
        // Round robin writes to what `data` points to as if it were its own.
        (*pc).data = ptr::null_mut();
        (*pc).notify = None;
        let Some(conf) = server_conf::<P>(upstream) else { return (config, ERROR) };
        let Some(init) = (*conf).init_peer else { return (config, ERROR) };
        let rc = match (*conf).seen == config {
            true => init(request, upstream),
            false => note_cost(&mut *conf, config, || init(request, upstream)),
        };
        (config, rc)
    }
}

/// Notes what a change costs: the first request after it is the one that the balancer's
/// preparations are made for.
#[cold]
fn note_cost<P: Protocol>(
    conf: &mut ServerConf<P>,
    config: ngx_uint_t,
    init: impl FnOnce() -> ngx_int_t,
) -> ngx_int_t {
    let begin = Instant::now();
    let rc = init();
    conf.seen = config;
    if let Some(cost) = conf.cost {
        cost.add(begin.elapsed());
    }
    rc
}

/// The upstream's list.
///
/// # Safety
///
/// `upstream` is one with `consul_upstream`, of a configuration that is in use.
unsafe fn list_of<P: Protocol>(upstream: *mut P::Upstream) -> *mut Peers<P> {
    // SAFETY: all stock balancers keep their list there, and `conf::finish` has seen it.
    unsafe { P::Upstream::peers(upstream) }
}

/// How often the upstream's list has changed.
///
/// # Safety
///
/// As [`list_of`].
pub unsafe fn config_of<P: Protocol>(upstream: *mut P::Upstream) -> ngx_uint_t {
    // SAFETY: a list in a zone has a counter; another process may write it meanwhile, one word.
    unsafe { (*Peers::<P>::config(list_of::<P>(upstream))).read_volatile() }
}

/// The address of the peer that was chosen.
///
/// # Safety
///
/// `pc` is a live request's, which holds a peer; the result is not used after that.
unsafe fn address_of<'a>(pc: *mut ngx_peer_connection_t) -> &'a [u8] {
    // SAFETY: the caller's promise.
    unsafe { slice::from_raw_parts((*pc).sockaddr.cast(), (*pc).socklen as usize) }
}

/// Whether an attempt ended without an answer that the request keeps, by whichever of its names.
fn has_failed(state: ngx_uint_t) -> bool {
    state & (NGX_PEER_FAILED | NGX_PEER_NEXT) as ngx_uint_t != 0
}

impl Inner {
    /// # Safety
    ///
    /// `pc` was filled in by a balancer.
    unsafe fn of(pc: *mut ngx_peer_connection_t) -> Self {
        // SAFETY: the caller's promise.
        unsafe {
            Self {
                data: (*pc).data,
                get: (*pc).get,
                free: (*pc).free,
                notify: (*pc).notify,
                #[cfg(any(ngx_feature = "ssl", ngx_feature = "compat"))]
                set_session: (*pc).set_session,
                #[cfg(any(ngx_feature = "ssl", ngx_feature = "compat"))]
                save_session: (*pc).save_session,
            }
        }
    }
}

impl<P: Protocol> Balancer<P> {
    /// Puts our callbacks in the place of those that [`Inner::of`] has read.
    ///
    /// # Safety
    ///
    /// `pc` is the request's.
    unsafe fn wrap(&mut self, pc: *mut ngx_peer_connection_t) {
        // SAFETY: the caller's promise.
        unsafe {
            (*pc).data = ptr::from_mut(self).cast();
            (*pc).get = Some(get::<P>);
            (*pc).free = Some(free::<P>);
            (*pc).notify = self.inner.notify.map(|_| notify::<P> as _);
            #[cfg(any(ngx_feature = "ssl", ngx_feature = "compat"))]
            {
                (*pc).set_session = self.inner.set_session.map(|_| set_session::<P> as _);
                (*pc).save_session = self.inner.save_session.map(|_| save_session::<P> as _);
            }
        }
    }

    /// Whether the list has changed since the balancer was initialised.
    fn list_changed(&self) -> bool {
        // SAFETY: the upstream is that of a live request.
        unsafe { config_of::<P>(self.upstream) != self.config }
    }

    /// Initialises the balancer again; the request holds no peer.
    ///
    /// # Safety
    ///
    /// `pc` is the request's.
    #[cold]
    unsafe fn restart(&mut self, pc: *mut ngx_peer_connection_t) -> bool {
        // SAFETY: the caller's promise.
        unsafe {
            P::take_back(self.request, &mut self.left);
            nginx_peers::forget_choice(pc);
            let (config, rc) = init_inner::<P>(pc, self.request, self.upstream);
            if rc == OK {
                self.config = config;
                self.inner = Inner::of(pc);
                (*pc).tries = self.attempts.tries((*pc).tries);
            }
            // After an error, too: what the balancer left behind is not to be called.
            self.wrap(pc);
            rc == OK
        }
    }

    /// # Safety
    ///
    /// `pc` is the request's.
    unsafe fn get(&mut self, pc: *mut ngx_peer_connection_t) -> ngx_int_t {
        // SAFETY: the caller's promise.
        unsafe {
            self.attempts.begin(&mut (*pc).tries);
            self.attempts.comes_back((*pc).tries);
        }
        let mut skips = 0;
        loop {
            let Some(inner) = self.inner.get else { return ERROR };
            // SAFETY: the balancer's own callback and data, and the request that they are for.
            let rc =
                unsafe { P::choose(self.request, &mut self.left, || inner(pc, self.inner.data)) };
            if rc == BUSY && self.attempts.restart(self.list_changed()) {
                // SAFETY: the caller's promise; after "busy" no peer is held.
                if !unsafe { self.restart(pc) } {
                    return ERROR;
                }
                // SAFETY: the upstream is that of a live request.
                let cost = unsafe { server_conf::<P>(self.upstream).and_then(|it| (*it).cost) };
                if let Some(cost) = cost {
                    cost.add_repaired(1);
                }
                continue;
            }
            if rc != OK && rc != DONE {
                return rc;
            }
            // A cached connection is another chance with a peer that was tried.
            // SAFETY: the balancer has chosen, and the peer is held until `free`.
            if rc == DONE || !self.attempts.was_tried(unsafe { address_of(pc) }) {
                self.attempts.given();
                // SAFETY: the caller's promise; the balancer has just chosen.
                unsafe { self.count_pick(pc) };
                return rc;
            }
            // SAFETY: the caller's promise; the peer that was given goes back.
            unsafe {
                let tries = (*pc).tries;
                if let Some(free) = self.inner.free {
                    free(pc, self.inner.data, NGX_PEER_NEXT as ngx_uint_t);
                }
                (*pc).tries = tries;
                (*pc).sockaddr = ptr::null_mut();
                if skips >= self.attempts.remembered() {
                    (*pc).name = *Peers::<P>::name(list_of::<P>(self.upstream));
                    return BUSY;
                }
            }
            skips += 1;
        }
    }

    /// Counts an attempt, and lets it be remembered whose it is.
    ///
    /// # Safety
    ///
    /// `pc` is the request's, for which the balancer has just chosen a peer.
    unsafe fn count_pick(&mut self, pc: *mut ngx_peer_connection_t) {
        if !failpoint::counts() {
            return;
        }
        // SAFETY: all stock balancers point to the name inside of the peer, which the request
        // holds until `free`; what is not in the list's zone is no peer of it.
        unsafe {
            let pool = *Peers::<P>::shpool(list_of::<P>(self.upstream));
            let peer: *mut Peer<P> = (*pc).name.wrapping_byte_sub(Peer::<P>::NAME).cast();
            let is_behind = peer.addr() > pool.addr();
            let meter = if is_behind { Meter::of(peer, (*pool).end) } else { None };
            self.peer = meter.map(|meter| {
                // The time that nginx goes by, on the same clock.
                meter.picked(ngx_current_msec as u64);
                // Peers with a meter are ours.
                P::holds(self.request, self.upstream, peer, &mut self.held);
                (peer, meter.into())
            });
        }
    }

    /// nginx has told the balancer that it is connected, which is long before the end of a session.
    ///
    /// # Safety
    ///
    /// The request holds the peer that it was given, if that has a meter.
    unsafe fn count_connected(&self) {
        if let Some((_, meter)) = self.peer {
            // SAFETY: the caller's promise, the meter goes with its peer; the clock is a word of nginx's.
            unsafe { meter.as_ref().is_available(ngx_current_msec as u64) };
        }
    }

    /// Counts how the attempt ended.
    ///
    /// # Safety
    ///
    /// The request holds the peer that it was given, still.
    unsafe fn count_end(&mut self, state: ngx_uint_t) {
        let Some((peer, meter)) = self.peer.take() else { return };
        // SAFETY: the caller's promise, the meter goes with its peer; nginx completes the state of an
        // attempt before this.
        unsafe {
            P::lets_go(&mut self.held);
            let meter = meter.as_ref();
            let failed = state & NGX_PEER_FAILED as ngx_uint_t != 0;
            let Some(attempt) = P::attempt(self.request, failed) else { return };
            meter.ended(&attempt);
            // nginx counts no failures of a single peer, and makes it never unavailable.
            if failed {
                let max = *Peer::<P>::max_fails(peer);
                let fails = *Peer::<P>::fails(peer) + 1;
                let list = list_of::<P>(self.upstream);
                if !Peers::<P>::is_single(list) && max > 0 && fails >= max {
                    meter.is_unavailable(ngx_current_msec as u64);
                }
            } else if state == 0 {
                meter.is_available(ngx_current_msec as u64);
            }
        }
    }

    /// # Safety
    ///
    /// `pc` is the request's, which holds a peer.
    unsafe fn free(&mut self, pc: *mut ngx_peer_connection_t, state: ngx_uint_t) {
        // SAFETY: the balancer's own callback and data; the list is that of a live request.
        unsafe {
            // Before: after it the peer may be gone.
            self.count_end(state);
            let failed = has_failed(state);
            if failed && !(*pc).sockaddr.is_null() {
                self.attempts.failed(address_of(pc));
            }
            if let Some(inner) = self.inner.free {
                inner(pc, self.inner.data, state);
            }
            if failed {
                self.see_whether_others_came(pc);
            }
            self.attempts.goes((*pc).tries);
        }
    }

    /// After a failure: one more try, if there is somebody to ask who was not there before.
    ///
    /// # Safety
    ///
    /// `pc` is the request's.
    #[cold]
    unsafe fn see_whether_others_came(&self, pc: *mut ngx_peer_connection_t) {
        // SAFETY: the caller's promise; the list is that of a live request.
        unsafe {
            let list = list_of::<P>(self.upstream);
            let backups = *Peers::<P>::next(list);
            let backups = if backups.is_null() { 0 } else { *Peers::<P>::number(backups) };
            let peers = *Peers::<P>::number(list) + backups;
            if self.attempts.one_more((*pc).tries, self.list_changed(), peers) {
                (*pc).tries = 1;
            }
        }
    }
}

/// # Safety
///
/// As nginx calls it: `data` is what [`Balancer::wrap`] has set.
unsafe extern "C" fn get<P: Protocol>(
    pc: *mut ngx_peer_connection_t,
    data: *mut c_void,
) -> ngx_int_t {
    // SAFETY: this function's own contract; a request is worked at by one function at a time.
    unsafe { (*data.cast::<Balancer<P>>()).get(pc) }
}

/// # Safety
///
/// As [`get`].
unsafe extern "C" fn free<P: Protocol>(
    pc: *mut ngx_peer_connection_t,
    data: *mut c_void,
    state: ngx_uint_t,
) {
    // SAFETY: as in `get`.
    unsafe { (*data.cast::<Balancer<P>>()).free(pc, state) }
}

/// # Safety
///
/// As [`get`].
unsafe extern "C" fn notify<P: Protocol>(
    pc: *mut ngx_peer_connection_t,
    data: *mut c_void,
    kind: ngx_uint_t,
) {
    // SAFETY: as in `get`; set only where the balancer has one.
    unsafe {
        let balancer = &*data.cast::<Balancer<P>>();
        if let Some(notify) = balancer.inner.notify {
            notify(pc, balancer.inner.data, kind);
        }
        balancer.count_connected();
    }
}

/// # Safety
///
/// As [`get`].
#[cfg(any(ngx_feature = "ssl", ngx_feature = "compat"))]
unsafe extern "C" fn set_session<P: Protocol>(
    pc: *mut ngx_peer_connection_t,
    data: *mut c_void,
) -> ngx_int_t {
    // SAFETY: as in `get`; set only where the balancer has one.
    unsafe {
        let inner = &(*data.cast::<Balancer<P>>()).inner;
        inner.set_session.map_or(OK, |set_session| set_session(pc, inner.data))
    }
}

/// # Safety
///
/// As [`get`].
#[cfg(any(ngx_feature = "ssl", ngx_feature = "compat"))]
unsafe extern "C" fn save_session<P: Protocol>(pc: *mut ngx_peer_connection_t, data: *mut c_void) {
    // SAFETY: as in `get`; set only where the balancer has one.
    unsafe {
        let inner = &(*data.cast::<Balancer<P>>()).inner;
        if let Some(save_session) = inner.save_session {
            save_session(pc, inner.data);
        }
    }
}
