//! What differs in http.

use core::ptr;

use consul_upstream::conf::{MainConf, ServerConf};
use consul_upstream::{Attempt, Protocol};
use nginx_sys::{
    NGX_HTTP_MAIN_CONF, NGX_HTTP_MAIN_CONF_OFFSET, NGX_HTTP_SRV_CONF_OFFSET, NGX_HTTP_UPS_CONF,
    ngx_current_msec, ngx_cycle_t, ngx_http_module, ngx_http_request_t, ngx_http_upstream_module,
    ngx_http_upstream_rr_peer_t, ngx_http_upstream_srv_conf_t, ngx_module_t, ngx_msec_t,
    ngx_peer_connection_t, ngx_pool_t,
};
use ngx::http::{HttpModule, HttpModuleMainConf, HttpModuleServerConf};

use crate::headers::Added;
use crate::{instances, ngx_http_consul_upstream_module, variables};

/// The module, as the crates ngx and consul-upstream know it.
pub struct ConsulUpstream;

impl HttpModule for ConsulUpstream {
    fn module() -> &'static ngx_module_t {
        // SAFETY: nginx writes the module's numbers before it calls any of its functions, and
        // never after.
        unsafe { &*ptr::addr_of!(ngx_http_consul_upstream_module) }
    }
}

// SAFETY: it is what the module's context makes.
unsafe impl HttpModuleMainConf for ConsulUpstream {
    type MainConf = MainConf<Self>;
}

// SAFETY: as above.
unsafe impl HttpModuleServerConf for ConsulUpstream {
    type ServerConf = ServerConf<Self>;
}

// SAFETY: all is http's.
unsafe impl Protocol for ConsulUpstream {
    type Upstream = ngx_http_upstream_srv_conf_t;
    type Held = ();
    type Left = Added;

    consul_upstream::names! {
        ConsulUpstream; ngx_http_consul_upstream_module, ngx_http_module, ngx_http_upstream_module;
        NGX_HTTP_MAIN_CONF, NGX_HTTP_UPS_CONF; NGX_HTTP_MAIN_CONF_OFFSET, NGX_HTTP_SRV_CONF_OFFSET;
        "consul_upstream", ""
    }

    unsafe fn configured(cycle: *mut ngx_cycle_t) {
        // SAFETY: the caller's promise.
        unsafe { variables::look_for(cycle) };
    }

    unsafe fn pool(request: *mut ngx_http_request_t) -> *mut ngx_pool_t {
        // SAFETY: the caller's promise.
        unsafe { (*request).pool }
    }

    unsafe fn peer_connection(request: *mut ngx_http_request_t) -> *mut ngx_peer_connection_t {
        // SAFETY: the caller's promise.
        unsafe {
            let upstream = (*request).upstream;
            if upstream.is_null() { ptr::null_mut() } else { &raw mut (*upstream).peer }
        }
    }

    unsafe fn most_tries(request: *mut ngx_http_request_t) -> Option<usize> {
        // SAFETY: the caller's promise.
        Some(unsafe { (*(*(*request).upstream).conf).next_upstream_tries })
    }

    unsafe fn attempt(request: *mut ngx_http_request_t, failed: bool) -> Option<Attempt> {
        const UNSET: ngx_msec_t = ngx_msec_t::MAX;
        // SAFETY: the caller's promise.
        let (upstream, ended) = unsafe {
            let upstream = (*request).upstream;
            (upstream, (*upstream).state.as_ref()?)
        };
        let has_header = ended.header_time != UNSET;
        let response_time = match ended.response_time {
            // SAFETY: as above; the clock is a word of nginx's.
            UNSET => unsafe { ngx_current_msec.wrapping_sub((*upstream).start_time) },
            time => time,
        };
        Some(Attempt {
            status: has_header.then_some(ended.status as u64),
            sent: u64::try_from(ended.bytes_sent).unwrap_or(0),
            received: u64::try_from(ended.bytes_received).unwrap_or(0),
            header_time: has_header.then_some(ended.header_time as u64),
            response_time: response_time as u64,
            failed,
        })
    }

    unsafe fn holds(
        request: *mut ngx_http_request_t,
        upstream: *mut ngx_http_upstream_srv_conf_t,
        peer: *mut ngx_http_upstream_rr_peer_t,
        (): &mut (),
    ) {
        // SAFETY: the caller's promise.
        unsafe { instances::remember(request, upstream, peer) };
    }

    unsafe fn choose<R>(
        request: *mut ngx_http_request_t,
        left: &mut Added,
        get: impl FnOnce() -> R,
    ) -> R {
        // SAFETY: the caller's promise; a choice leaves the request alive.
        unsafe { left.by(request, get) }
    }

    unsafe fn take_back(request: *mut ngx_http_request_t, left: &mut Added) {
        // SAFETY: the caller's promise.
        unsafe { left.take_out(request) };
    }
}
