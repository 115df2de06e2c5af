//! nginx's types for http; and what nginx-sys' own accessors of a request do not find on every nginx:
//! see `http.h` beside this file.

use nginx_sys::{
    NGX_HTTP_UPSTREAM_BACKUP as BACKUP, NGX_HTTP_UPSTREAM_MODIFY as MODIFY,
    ngx_http_request_t as Session, ngx_http_upstream_main_conf_t as Main,
    ngx_http_upstream_rr_peer_t as Peer, ngx_http_upstream_rr_peers_t as Peers,
    ngx_http_upstream_server_t as Server, ngx_http_upstream_srv_conf_t as Upstream,
};

use super::*;
use crate::inline::ngx_http_upstream_rr_peer_free_locked as free_locked;
pub use crate::inline::{
    nginx_request_disable_not_modified as disable_not_modified, nginx_request_hold as hold,
    nginx_request_is_header_only as is_header_only,
    nginx_request_set_header_only as set_header_only,
};

implement!();

/// The session ID that `sticky` routes by.
///
/// # Safety
///
/// As [`PeerAbi::prepare_session_id`].
unsafe fn prepare_session_id(peer: *mut Peer, pool: *mut ngx_slab_pool_t) -> bool {
    #[cfg(nginx_sid)]
    // SAFETY: the peer is not linked yet, so nobody else sees it; the buffer has the size that the
    // function writes.
    unsafe {
        let len = crate::inline::NGINX_PEERS_SID_LEN as usize;
        let data = nginx_sys::ngx_slab_calloc(pool, len);
        if data.is_null() {
            return false;
        }
        (*peer).sid.data = data.cast();
        nginx_sys::ngx_http_upstream_init_round_robin_sid(peer, core::ptr::null_mut());
    }
    #[cfg(not(nginx_sid))]
    let _ = (peer, pool);
    true
}
