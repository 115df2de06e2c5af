//! nginx's types for TCP and UDP.

use nginx_sys::{
    NGX_STREAM_UPSTREAM_BACKUP as BACKUP, NGX_STREAM_UPSTREAM_MODIFY as MODIFY,
    ngx_stream_session_t as Session, ngx_stream_upstream_main_conf_t as Main,
    ngx_stream_upstream_rr_peer_t as Peer, ngx_stream_upstream_rr_peers_t as Peers,
    ngx_stream_upstream_server_t as Server, ngx_stream_upstream_srv_conf_t as Upstream,
};

use super::*;
use crate::inline::ngx_stream_upstream_rr_peer_free_locked as free_locked;

implement!();

/// There is no `sticky` here.
///
/// # Safety
///
/// As [`PeerAbi::prepare_session_id`].
unsafe fn prepare_session_id(_: *mut Peer, _: *mut ngx_slab_pool_t) -> bool {
    true
}
