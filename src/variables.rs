//! `$consul_service_id`, `$consul_node` and `$consul_datacenter`: the instance that a request was
//! passed to last. Not found where that was a static server, or none.

use core::ptr;

use nginx_sys::{
    NGX_ERROR, NGX_OK, ngx_conf_t, ngx_http_add_variable, ngx_http_request_t,
    ngx_http_variable_value_t, ngx_int_t, ngx_pnalloc, ngx_str_t,
};
use ngx::http::HttpModuleMainConf;

use crate::balance::{Last, last_peer};
use crate::conf::finish::server_conf;
use crate::guard::guard;
use crate::status::datacenters;
use crate::{ConsulUpstream, conf};

/// nginx's `NGX_HTTP_VAR_NOCACHEABLE`: the next attempt may be passed to another instance.
const NOT_CACHEABLE: usize = 2;

const NAMES: [&str; 3] = ["consul_service_id", "consul_node", "consul_datacenter"];

/// The module's `preconfiguration`.
///
/// # Safety
///
/// `cf` is the context of the http block.
pub unsafe extern "C" fn add(cf: *mut ngx_conf_t) -> ngx_int_t {
    for (number, name) in NAMES.into_iter().enumerate() {
        let mut name = ngx_str_t { len: name.len(), data: name.as_ptr().cast_mut() };
        // SAFETY: this function's own contract; nginx copies the name.
        unsafe {
            let variable = ngx_http_add_variable(cf, &mut name, NOT_CACHEABLE as _);
            if variable.is_null() {
                return NGX_ERROR as ngx_int_t;
            }
            (*variable).get_handler = Some(get);
            (*variable).data = number;
        }
    }
    NGX_OK as ngx_int_t
}

/// # Safety
///
/// As nginx calls it: `data` is what [`add`] has set.
unsafe extern "C" fn get(
    r: *mut ngx_http_request_t,
    value: *mut ngx_http_variable_value_t,
    data: usize,
) -> ngx_int_t {
    guard("a variable", NGX_ERROR as ngx_int_t, || {
        // SAFETY: this function's own contract; the text is copied into the request's pool.
        unsafe {
            let text = last_peer(r).and_then(|last| text(r, &last, data));
            let Some(text) = text.filter(|text| !text.is_empty()) else {
                (*value).set_not_found(1);
                return NGX_OK as ngx_int_t;
            };
            let copy: *mut u8 = ngx_pnalloc((*r).pool, text.len()).cast();
            if copy.is_null() {
                return NGX_ERROR as ngx_int_t;
            }
            ptr::copy_nonoverlapping(text.as_ptr(), copy, text.len());
            (*value).data = copy;
            (*value).set_len(text.len() as _);
            (*value).set_valid(1);
            (*value).set_no_cacheable(0);
            (*value).set_not_found(0);
            NGX_OK as ngx_int_t
        }
    })
}

/// # Safety
///
/// As [`get`].
unsafe fn text(r: *mut ngx_http_request_t, last: &Last, number: usize) -> Option<String> {
    match number {
        0 => Some(last.label.id().to_owned()),
        1 => Some(last.label.node().to_owned()),
        // SAFETY: the upstream is that of a live request, and its configuration is this process'.
        _ => unsafe {
            let main = ConsulUpstream::main_conf(&*r)?;
            let conf: *mut conf::ServerConf = server_conf(last.upstream)?;
            let known = datacenters(main, &mut *conf);
            let source = last.label.source();
            known.iter().find(|(key, _)| *key == source).map(|(_, name)| name.clone())
        },
    }
}
