//! An nginx dynamic module that keeps an upstream's peers in step with a Consul service.
//!
//! This crate is the http module, and thin: the tables that nginx reads, what http has of its own
//! ([`http`]), and what is shown of it all ([`status`], [`variables`] and [`instances`]). What it has in
//! common with the stream module is the crate consul-upstream. Consul is the business of the crate
//! consul-watch, the peer list in shared memory that of nginx-peers.

use consul_upstream::conf;
use nginx_sys::{NGX_HTTP_MODULE, NGX_OK, ngx_conf_t, ngx_http_module_t, ngx_int_t};

use self::http::ConsulUpstream;

mod headers;
mod http;
mod instances;
mod status;
mod variables;

const OK: ngx_int_t = NGX_OK as ngx_int_t;

static CONTEXT: ngx_http_module_t = ngx_http_module_t {
    preconfiguration: Some(begin),
    postconfiguration: Some(conf::finish::<ConsulUpstream>),
    create_main_conf: Some(conf::create_main::<ConsulUpstream>),
    init_main_conf: None,
    create_srv_conf: Some(conf::create_server::<ConsulUpstream>),
    merge_srv_conf: None,
    create_loc_conf: None,
    merge_loc_conf: None,
};

/// # Safety
///
/// As nginx calls it.
unsafe extern "C" fn begin(cf: *mut ngx_conf_t) -> ngx_int_t {
    // SAFETY: this function's own contract.
    unsafe {
        match conf::begin::<ConsulUpstream>(cf) {
            OK => variables::add(cf),
            error => error,
        }
    }
}

consul_upstream::tables! {
    ConsulUpstream, NGX_HTTP_MODULE, CONTEXT, status::COMMAND, c"ngx_http_upstream_zone_module";
    ngx_http_consul_upstream_module c"ngx_http_consul_upstream_module";
    ngx_consul_upstream_recovery_module c"ngx_consul_upstream_recovery_module" "consul_upstream_recovery"
}
