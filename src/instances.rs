//! Which instances a request was passed to, for whoever wants to know: a peer may be gone when the
//! request is logged, so its label is copied when it is picked.
//!
//! That is not done where nobody asks. A variable that the configuration names is asked for from
//! the start, one that a script looks up by name from its first time on.

use core::ffi::c_void;
use core::ptr;
use core::sync::atomic::{AtomicBool, Ordering};

use nginx_peers::Label;
use nginx_sys::{
    ngx_http_request_t, ngx_http_upstream_rr_peer_t, ngx_http_upstream_rr_peers_t,
    ngx_http_upstream_srv_conf_t, ngx_pool_cleanup_add, ngx_pool_cleanup_pt,
};

static ASKED: AtomicBool = AtomicBool::new(false);

/// From now on instances are remembered.
pub fn ask() {
    ASKED.store(true, Ordering::Relaxed);
}

/// An attempt of a request. It lies in the request's pool as the data of a cleanup: subrequests and
/// internal redirects leave those alone, and a pool is all that they have in common.
struct Attempt {
    request: *mut ngx_http_request_t,
    /// Its place in the request's `upstream_states`.
    number: usize,
    upstream: *mut ngx_http_upstream_srv_conf_t,
    label: [u8; Label::SIZE],
    len: usize,
}

/// By this an attempt is found again among the cleanups; there is nothing to clean up.
unsafe extern "C" fn attempt(_: *mut c_void) {}

/// Remembers whom a request is passed to, where somebody asks for it.
///
/// # Safety
///
/// The request is live and has begun an attempt; it holds `peer`, one of the upstream's.
pub unsafe fn remember(
    request: *mut ngx_http_request_t,
    upstream: *mut ngx_http_upstream_srv_conf_t,
    peer: *mut ngx_http_upstream_rr_peer_t,
) {
    if !ASKED.load(Ordering::Relaxed) {
        return;
    }
    // SAFETY: the caller's promise. The memory is written whole before it is used, and holds
    // nothing that would have to be dropped; without memory the attempt is nobody's.
    unsafe {
        let Some(states) = (*request).upstream_states.as_ref() else { return };
        let mut label = [0; Label::SIZE];
        let peers: *mut ngx_http_upstream_rr_peers_t = (*upstream).peer.data.cast();
        let len = Label::copy(peer, (*(*peers).shpool).end, &mut label);
        let cleanup = ngx_pool_cleanup_add((*request).pool, size_of::<Attempt>());
        if let Some(cleanup) = cleanup.as_mut() {
            let number = states.nelts.wrapping_sub(1);
            let data = cleanup.data.cast::<Attempt>();
            data.write(Attempt { request, number, upstream, label, len });
            cleanup.handler = Some(attempt);
        }
    }
}

/// Whom a request was passed to.
pub struct Instance {
    pub upstream: *mut ngx_http_upstream_srv_conf_t,
    pub label: Label,
}

/// The instances that a request was passed to, one for each of its `upstream_states`; none where
/// that is no attempt, or where it went to a server that is not Consul's.
///
/// # Safety
///
/// `request` is live.
pub unsafe fn passed_to(request: *mut ngx_http_request_t) -> Vec<Option<Instance>> {
    let ours: ngx_pool_cleanup_pt = Some(attempt);
    // SAFETY: the caller's promise. Where the handler is ours, so are the data, which live in the
    // pool.
    unsafe {
        let number = (*request).upstream_states.as_ref().map_or(0, |states| states.nelts);
        let mut all: Vec<Option<Instance>> = (0..number).map(|_| None).collect();
        let mut next = (*(*request).pool).cleanup;
        while let Some(cleanup) = next.as_ref() {
            next = cleanup.next;
            let is_ours = match (cleanup.handler, ours) {
                (Some(this), Some(ours)) => ptr::fn_addr_eq(this, ours),
                _ => false,
            };
            if !is_ours {
                continue;
            }
            let this = &*cleanup.data.cast::<Attempt>();
            if ptr::eq(this.request, request)
                && let Some(slot) = all.get_mut(this.number)
                && let Some(label) = this.label.get(..this.len).and_then(Label::read)
            {
                *slot = Some(Instance { upstream: this.upstream, label });
            }
        }
        all
    }
}
