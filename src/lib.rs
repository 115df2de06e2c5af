//! An nginx dynamic module that keeps an upstream's peers in step with a Consul service.
//!
//! This crate is the http module, and thin: the tables that nginx reads, directives to settings
//! ([`conf`]), what a reload takes over ([`carry`]), the life of a worker ([`process`]), the
//! layer around the balancers ([`balance`]), and what is shown of it all ([`status`], [`variables`] and
//! [`instances`]). Consul is the business of the crate consul-watch, the peer list in shared memory that of nginx-peers.

use core::ffi::c_char;
use core::ptr;

use nginx_sys::{
    NGX_CORE_MODULE, NGX_HTTP_MODULE, ngx_conf_t, ngx_core_module_t, ngx_http_module_t, ngx_int_t,
    ngx_module_t, ngx_uint_t,
};
use ngx::http::{HttpModule, HttpModuleMainConf, HttpModuleServerConf};
use ngx::ngx_string;

mod balance;
mod carry;
mod conf;
mod failpoint;
mod guard;
mod instances;
mod log;
mod process;
mod status;
mod variables;

/// The module, as the traits of the crate ngx know it.
struct ConsulUpstream;

static CONTEXT: ngx_http_module_t = ngx_http_module_t {
    preconfiguration: Some(variables::add),
    postconfiguration: Some(ConsulUpstream::postconfiguration),
    create_main_conf: Some(ConsulUpstream::create_main_conf),
    init_main_conf: None,
    create_srv_conf: Some(ConsulUpstream::create_srv_conf),
    merge_srv_conf: None,
    create_loc_conf: None,
    merge_loc_conf: None,
};

/// The modules in this file, for `load_module`.
#[unsafe(no_mangle)]
#[allow(non_upper_case_globals)]
pub static mut ngx_modules: [*const ngx_module_t; 3] = [
    ptr::addr_of!(ngx_consul_upstream_recovery_module),
    ptr::addr_of!(ngx_http_consul_upstream_module),
    ptr::null(),
];

/// Their names.
#[unsafe(no_mangle)]
#[allow(non_upper_case_globals)]
pub static mut ngx_module_names: [*const c_char; 3] = [
    c"ngx_consul_upstream_recovery_module".as_ptr(),
    c"ngx_http_consul_upstream_module".as_ptr(),
    ptr::null(),
];

/// The first comes before nginx's own module of zones: a new worker must mend the lists before that
/// takes their locks. The other one is where nginx puts it.
#[unsafe(no_mangle)]
#[allow(non_upper_case_globals)]
pub static mut ngx_module_order: [*const c_char; 3] = [
    c"ngx_consul_upstream_recovery_module".as_ptr(),
    c"ngx_http_upstream_zone_module".as_ptr(),
    ptr::null(),
];

static mut RECOVERY: ngx_core_module_t = ngx_core_module_t {
    name: ngx_string!("consul_upstream_recovery"),
    create_conf: None,
    init_conf: None,
};

/// What a new worker does before all else.
#[used]
#[allow(non_upper_case_globals)]
pub static mut ngx_consul_upstream_recovery_module: ngx_module_t = ngx_module_t {
    ctx: ptr::addr_of_mut!(RECOVERY).cast(),
    commands: ptr::null_mut(),
    type_: NGX_CORE_MODULE as ngx_uint_t,

    init_master: None,
    init_module: None,
    init_process: Some(process::recover),
    init_thread: None,
    exit_thread: None,
    exit_process: None,
    exit_master: None,

    ..ngx_module_t::default()
};

/// The http module.
#[used]
#[allow(non_upper_case_globals)]
pub static mut ngx_http_consul_upstream_module: ngx_module_t = ngx_module_t {
    ctx: ptr::addr_of!(CONTEXT).cast_mut().cast(),
    commands: ptr::addr_of_mut!(conf::COMMANDS).cast(),
    type_: NGX_HTTP_MODULE as ngx_uint_t,

    init_master: None,
    init_module: Some(process::init_module),
    init_process: Some(process::init_process),
    init_thread: None,
    exit_thread: None,
    exit_process: Some(process::exit_process),
    exit_master: None,

    ..ngx_module_t::default()
};

// SAFETY: create_main_conf of the trait allocates this type.
unsafe impl HttpModuleMainConf for ConsulUpstream {
    type MainConf = conf::MainConf;
}

// SAFETY: create_srv_conf of the trait allocates this type.
unsafe impl HttpModuleServerConf for ConsulUpstream {
    type ServerConf = conf::ServerConf;
}

impl HttpModule for ConsulUpstream {
    fn module() -> &'static ngx_module_t {
        // SAFETY: nginx writes the module's numbers before it calls any of its functions, and
        // never after.
        unsafe { &*ptr::addr_of!(ngx_http_consul_upstream_module) }
    }

    unsafe extern "C" fn postconfiguration(cf: *mut ngx_conf_t) -> ngx_int_t {
        // SAFETY: nginx passes the http block's context.
        unsafe { conf::finish(cf) }
    }
}
