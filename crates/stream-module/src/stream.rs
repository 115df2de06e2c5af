//! What differs in stream.

use core::ptr;

use consul_upstream::{Attempt, Peer, Protocol};
use nginx_sys::{
    NGX_STREAM_MAIN_CONF, NGX_STREAM_MAIN_CONF_OFFSET, NGX_STREAM_SRV_CONF_OFFSET,
    NGX_STREAM_UPS_CONF, ngx_current_msec, ngx_msec_t, ngx_peer_connection_t, ngx_pool_t,
    ngx_stream_module, ngx_stream_session_t, ngx_stream_upstream_module,
    ngx_stream_upstream_srv_conf_t,
};

use crate::ngx_stream_consul_upstream_module;
use crate::sessions::{self, Held};

/// The module, as the crate consul-upstream knows it.
pub struct ConsulUpstream;

// SAFETY: all is stream's.
unsafe impl Protocol for ConsulUpstream {
    type Upstream = ngx_stream_upstream_srv_conf_t;
    type Held = Held;
    type Left = ();

    consul_upstream::names! {
        ConsulUpstream; ngx_stream_consul_upstream_module, ngx_stream_module, ngx_stream_upstream_module;
        NGX_STREAM_MAIN_CONF, NGX_STREAM_UPS_CONF; NGX_STREAM_MAIN_CONF_OFFSET, NGX_STREAM_SRV_CONF_OFFSET;
        "consul_upstream_stream", "stream~"
    }

    unsafe fn pool(session: *mut ngx_stream_session_t) -> *mut ngx_pool_t {
        // SAFETY: the caller's promise.
        unsafe { (*(*session).connection).pool }
    }

    unsafe fn peer_connection(session: *mut ngx_stream_session_t) -> *mut ngx_peer_connection_t {
        // SAFETY: the caller's promise; a session that is not proxied has no upstream.
        unsafe { (*session).upstream.as_mut() }
            .map_or(ptr::null_mut(), |upstream| &raw mut upstream.peer)
    }

    /// The configuration of `proxy_pass` is nginx's own affair here.
    unsafe fn most_tries(_: *mut ngx_stream_session_t) -> Option<usize> {
        None
    }

    /// There is no response with a status; its first byte is what its header is in http.
    unsafe fn attempt(session: *mut ngx_stream_session_t, failed: bool) -> Option<Attempt> {
        let is_set = |time: &ngx_msec_t| *time != ngx_msec_t::MAX;
        // SAFETY: the caller's promise; the clock is a word of nginx's.
        let (state, time) = unsafe {
            let upstream = (*session).upstream;
            (*(*upstream).state.as_ref()?, ngx_current_msec.wrapping_sub((*upstream).start_time))
        };
        let [sent, received] =
            [state.bytes_sent, state.bytes_received].map(|bytes| u64::try_from(bytes).unwrap_or(0));
        Some(Attempt {
            header_time: Some(state.first_byte_time).filter(is_set).map(|time| time as u64),
            response_time: Some(state.response_time).filter(is_set).unwrap_or(time) as u64,
            sent,
            received,
            status: None,
            failed,
        })
    }

    unsafe fn holds(
        session: *mut ngx_stream_session_t,
        upstream: *mut Self::Upstream,
        peer: *mut Peer<Self>,
        held: &mut Held,
    ) {
        // SAFETY: the caller's promise.
        unsafe { sessions::add(session, upstream, peer, held) }
    }

    unsafe fn lets_go(held: &mut Held) {
        sessions::remove(held);
    }
}
