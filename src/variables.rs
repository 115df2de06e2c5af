//! `$consul_service_id`, `$consul_node` and `$consul_datacenter`: the instances that a request was
//! passed to, in the form of nginx's `$upstream_addr`. Not found where none was one of Consul's.

use core::ptr;

use consul_upstream::conf::finish::server_conf;
use consul_upstream::guard::guard;
use nginx_sys::{
    NGX_ERROR, NGX_OK, ngx_conf_t, ngx_cycle_t, ngx_http_add_variable, ngx_http_request_t,
    ngx_http_upstream_state_t, ngx_http_variable_t, ngx_http_variable_value_t, ngx_int_t,
    ngx_pnalloc, ngx_str_t,
};
use ngx::http::{HttpModuleMainConf, NgxHttpCoreModule};

use crate::http::ConsulUpstream;
use crate::instances::{self, Instance};
use crate::status::datacenters;

/// nginx's `NGX_HTTP_VAR_NOCACHEABLE`: there may be another attempt.
const NOT_CACHEABLE: usize = 2;

const NAMES: [&str; 3] = ["consul_service_id", "consul_node", "consul_datacenter"];

/// Adds them, before the block is read.
///
/// # Safety
///
/// `cf` is the context of the http block.
pub unsafe fn add(cf: *mut ngx_conf_t) -> ngx_int_t {
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

/// Finds out whether the configuration names one of them.
///
/// # Safety
///
/// `cycle` has a complete configuration.
pub unsafe fn look_for(cycle: *mut ngx_cycle_t) {
    // SAFETY: the caller's promise; a name is nginx's own text.
    unsafe {
        let Some(core) = NgxHttpCoreModule::main_conf(&*cycle) else { return };
        // What is named in whatever directive has a number there.
        let named = core.variables.as_slice::<ngx_http_variable_t>();
        if named.iter().any(|it| NAMES.iter().any(|name| it.name.as_bytes() == name.as_bytes())) {
            instances::ask();
        }
    }
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
        instances::ask();
        // SAFETY: this function's own contract; the text is copied into the request's pool.
        unsafe {
            let Some(text) = text(r, data) else {
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

/// All attempts, put together as nginx does it for `$upstream_addr`: a comma between those of one
/// upstream, a colon where a redirect led to the next one, and a dash for who has no name. `None`
/// where nobody has one.
///
/// # Safety
///
/// As [`get`].
unsafe fn text(r: *mut ngx_http_request_t, number: usize) -> Option<String> {
    // SAFETY: the caller's promise: the request is live, and so are its states.
    let (instances, states) = unsafe {
        let states = (*r).upstream_states.as_ref()?.as_slice::<ngx_http_upstream_state_t>();
        (instances::passed_to(r), states)
    };
    let mut text = String::new();
    let mut separator = "";
    let mut is_known = false;
    for (state, instance) in states.iter().zip(&instances) {
        // A redirect leaves a state that is no attempt.
        if state.peer.is_null() {
            text.push_str(" : ");
            separator = "";
            continue;
        }
        // SAFETY: as above.
        let name = instance.as_ref().and_then(|it| unsafe { name(r, it, number) });
        is_known |= name.is_some();
        text.push_str(separator);
        text.push_str(name.as_deref().unwrap_or("-"));
        separator = ", ";
    }
    is_known.then_some(text)
}

/// # Safety
///
/// As [`get`].
unsafe fn name(r: *mut ngx_http_request_t, of: &Instance, number: usize) -> Option<String> {
    match number {
        0 => Some(of.label.id().to_owned()),
        1 => Some(of.label.node().to_owned()),
        // SAFETY: the upstream is that of a live request, and its configuration is this process'.
        _ => unsafe {
            let main = ConsulUpstream::main_conf(&*r)?;
            let conf = server_conf::<ConsulUpstream>(of.upstream)?;
            let known = datacenters(main, &mut *conf);
            let source = of.label.source();
            known.iter().find(|(key, _)| *key == source).map(|(_, name)| name.clone())
        },
    }
}
