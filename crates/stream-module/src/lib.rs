//! The module for TCP and UDP, thin as the one for http: the tables that nginx reads, and what stream
//! has of its own ([`stream`], [`sessions`]). All else is the crate consul-upstream.

#[cfg(not(all(ngx_feature = "stream", ngx_feature = "stream_upstream_zone")))]
compile_error!("nginx is configured without stream, or without zones in it: see --with-stream");

use consul_upstream::conf;
use nginx_sys::{NGX_STREAM_MODULE, ngx_stream_module_t};

use self::stream::ConsulUpstream;

mod sessions;
mod stream;

static CONTEXT: ngx_stream_module_t = ngx_stream_module_t {
    preconfiguration: Some(conf::begin::<ConsulUpstream>),
    postconfiguration: Some(conf::finish::<ConsulUpstream>),
    create_main_conf: Some(conf::create_main::<ConsulUpstream>),
    create_srv_conf: Some(conf::create_server::<ConsulUpstream>),
    init_main_conf: None,
    merge_srv_conf: None,
};

consul_upstream::tables! {
    ConsulUpstream, NGX_STREAM_MODULE, CONTEXT, sessions::COMMAND, c"ngx_stream_upstream_zone_module";
    ngx_stream_consul_upstream_module c"ngx_stream_consul_upstream_module";
    ngx_stream_consul_upstream_recovery_module c"ngx_stream_consul_upstream_recovery_module" "stream_consul_upstream_recovery"
}
