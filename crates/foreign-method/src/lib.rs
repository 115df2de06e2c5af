//! A balancing method that is none of nginx's: `foreign_method KEEPS;` in an upstream of http or stream keeps something of
//! its own in `peer.data`, where nginx's methods keep their list of peers. Tests load it beside the modules; no request is
//! ever balanced by it.

use core::ffi::{c_char, c_void};
use core::ptr;

use nginx_sys::{
    NGX_CONF_TAKE1, NGX_ERROR, NGX_OK, ngx_alloc, ngx_command_t, ngx_conf_t, ngx_int_t,
    ngx_module_t, ngx_palloc, ngx_pcalloc, ngx_shared_memory_add, ngx_shm_zone_t, ngx_str_t,
    ngx_uint_t,
};

/// The kinds of value that the method can put into `peer.data`.
#[derive(Clone, Copy, PartialEq)]
enum Keeps {
    /// nginx's own list: it is the method before it that chooses.
    List,
    /// The same, and the upstream has a zone of this module.
    Zone,
    /// A structure that has nginx's list in it.
    Wrapped,
    /// A structure of the configuration's memory, smaller than a list.
    Structure,
    /// The same, allocated by itself because of its size.
    Large,
    /// A structure of the heap.
    Heap,
    /// A structure of the module.
    Static,
    /// A number.
    Number,
    Nothing,
}

impl Keeps {
    fn of(name: &[u8]) -> Option<Keeps> {
        Some(match name {
            b"list" => Keeps::List,
            b"zone" => Keeps::Zone,
            b"wrapped" => Keeps::Wrapped,
            b"structure" => Keeps::Structure,
            b"large" => Keeps::Large,
            b"heap" => Keeps::Heap,
            b"static" => Keeps::Static,
            b"number" => Keeps::Number,
            b"nothing" => Keeps::Nothing,
            _ => return None,
        })
    }

    /// Whether the method before it makes its list first.
    fn wraps(self) -> bool {
        matches!(self, Keeps::List | Keeps::Zone | Keeps::Wrapped)
    }

    /// The value for `peer.data` in place of `data`, the one of the method before.
    ///
    /// # Safety
    ///
    /// `cf` is the context of a block that is complete.
    unsafe fn data(self, cf: *mut ngx_conf_t, data: *mut c_void) -> *mut c_void {
        static STATIC: [u64; 4] = [u64::MAX; 4];
        // SAFETY: the caller's promise; pieces are filled in whole. Without memory they are null, which is one more of
        // the things that can stand there.
        unsafe {
            let filled = |at: *mut c_void, size: usize| {
                if !at.is_null() {
                    at.cast::<u8>().write_bytes(0xff, size);
                }
                at
            };
            match self {
                Keeps::List | Keeps::Zone => data,
                Keeps::Wrapped => {
                    let at: *mut [*mut c_void; 2] =
                        ngx_palloc((*cf).pool, size_of::<[*mut c_void; 2]>()).cast();
                    if !at.is_null() {
                        at.write([data, data]);
                    }
                    at.cast()
                }
                Keeps::Structure => filled(ngx_palloc((*cf).pool, 24), 24),
                Keeps::Large => filled(ngx_palloc((*cf).pool, 8192), 8192),
                Keeps::Heap => filled(ngx_alloc(24, (*cf).log), 24),
                Keeps::Static => ptr::from_ref(&STATIC).cast_mut().cast(),
                Keeps::Number => ptr::without_provenance_mut(8),
                Keeps::Nothing => ptr::null_mut(),
            }
        }
    }
}

unsafe extern "C" fn init_zone(_: *mut ngx_shm_zone_t, _: *mut c_void) -> ngx_int_t {
    NGX_OK as ngx_int_t
}

/// The method of one protocol.
macro_rules! method {
    (
        $protocol:ident, $upstream:ty, $session:ty, $context:ident { $($field:ident),* };
        $upstreams:path, $round_robin:path, $offset:path, $flags:expr, $block:path, $type:path
    ) => {
        pub mod $protocol {
            use super::*;

            struct Conf {
                before: Option<unsafe extern "C" fn(*mut ngx_conf_t, *mut $upstream) -> ngx_int_t>,
                keeps: Keeps,
            }

            static CONTEXT: nginx_sys::$context =
                nginx_sys::$context { $($field: None,)* create_srv_conf: Some(create) };

            static mut COMMANDS: [ngx_command_t; 2] = [
                ngx_command_t {
                    name: ngx_str_t { len: 14, data: c"foreign_method".as_ptr().cast_mut().cast() },
                    type_: ($block | NGX_CONF_TAKE1) as ngx_uint_t,
                    set: Some(set),
                    conf: $offset,
                    offset: 0,
                    post: ptr::null_mut(),
                },
                ngx_command_t::empty(),
            ];

            #[allow(missing_docs)]
            pub static mut MODULE: ngx_module_t = ngx_module_t {
                ctx: ptr::addr_of!(CONTEXT).cast_mut().cast(),
                commands: ptr::addr_of_mut!(COMMANDS).cast(),
                type_: $type as _,
                ..ngx_module_t::default()
            };

            unsafe extern "C" fn create(cf: *mut ngx_conf_t) -> *mut c_void {
                // SAFETY: the context has a pool; `set` fills the structure in.
                unsafe { ngx_pcalloc((*cf).pool, size_of::<Option<Conf>>()) }
            }

            unsafe extern "C" fn set(
                cf: *mut ngx_conf_t,
                _: *mut ngx_command_t,
                conf: *mut c_void,
            ) -> *mut c_char {
                // SAFETY: nginx calls it inside of an upstream, with one argument.
                unsafe {
                    let all: *mut *mut c_void = *(*cf).ctx.byte_add($offset).cast();
                    let index = (*ptr::addr_of!($upstreams)).ctx_index;
                    let upstream: *mut $upstream = (*all.add(index)).cast();
                    let name = &(*(*cf).args).as_slice::<ngx_str_t>()[1];
                    let Some(keeps) = Keeps::of(name.as_bytes()) else {
                        return c"knows no such thing to keep".as_ptr().cast_mut();
                    };
                    let before = (*upstream).peer.init_upstream.or(Some($round_robin));
                    conf.cast::<Option<Conf>>().write(Some(Conf { before, keeps }));
                    (*upstream).peer.init_upstream = Some(init_upstream);
                    (*upstream).flags = $flags as ngx_uint_t;
                    ptr::null_mut()
                }
            }

            unsafe extern "C" fn init_upstream(
                cf: *mut ngx_conf_t,
                upstream: *mut $upstream,
            ) -> ngx_int_t {
                // SAFETY: nginx calls it once the block is complete; `set` has filled the configuration in.
                unsafe {
                    let index = (*ptr::addr_of!(MODULE)).ctx_index;
                    let conf: *mut Option<Conf> = (*(*upstream).srv_conf.add(index)).cast();
                    let Some(Conf { before: Some(before), keeps }) = &*conf else {
                        return NGX_ERROR as ngx_int_t;
                    };
                    if keeps.wraps() {
                        let rc = before(cf, upstream);
                        if rc != NGX_OK as ngx_int_t {
                            return rc;
                        }
                    }
                    if *keeps == Keeps::Zone {
                        let mut name = ngx_str_t { len: 7, data: c"foreign".as_ptr().cast_mut().cast() };
                        let tag = ptr::addr_of_mut!(MODULE).cast();
                        let zone = ngx_shared_memory_add(cf, &mut name, 1 << 16, tag);
                        if zone.is_null() {
                            return NGX_ERROR as ngx_int_t;
                        }
                        (*zone).init = Some(init_zone);
                        (*upstream).shm_zone = zone;
                    } else if *keeps != Keeps::List {
                        (*upstream).peer.init = Some(init_peer);
                    }
                    (*upstream).peer.data = keeps.data(cf, (*upstream).peer.data);
                    NGX_OK as ngx_int_t
                }
            }

            unsafe extern "C" fn init_peer(_: *mut $session, _: *mut $upstream) -> ngx_int_t {
                NGX_ERROR as ngx_int_t
            }
        }
    };
}

method! {
    http, nginx_sys::ngx_http_upstream_srv_conf_t, nginx_sys::ngx_http_request_t,
    ngx_http_module_t {
        preconfiguration, postconfiguration, create_main_conf, init_main_conf, merge_srv_conf,
        create_loc_conf, merge_loc_conf
    };
    nginx_sys::ngx_http_upstream_module, nginx_sys::ngx_http_upstream_init_round_robin,
    nginx_sys::NGX_HTTP_SRV_CONF_OFFSET,
    nginx_sys::NGX_HTTP_UPSTREAM_CREATE | nginx_sys::NGX_HTTP_UPSTREAM_WEIGHT
        | nginx_sys::NGX_HTTP_UPSTREAM_BACKUP,
    nginx_sys::NGX_HTTP_UPS_CONF, nginx_sys::NGX_HTTP_MODULE
}

#[cfg(ngx_feature = "stream")]
method! {
    stream, nginx_sys::ngx_stream_upstream_srv_conf_t, nginx_sys::ngx_stream_session_t,
    ngx_stream_module_t {
        preconfiguration, postconfiguration, create_main_conf, init_main_conf, merge_srv_conf
    };
    nginx_sys::ngx_stream_upstream_module, nginx_sys::ngx_stream_upstream_init_round_robin,
    nginx_sys::NGX_STREAM_SRV_CONF_OFFSET,
    nginx_sys::NGX_STREAM_UPSTREAM_CREATE | nginx_sys::NGX_STREAM_UPSTREAM_WEIGHT
        | nginx_sys::NGX_STREAM_UPSTREAM_BACKUP,
    nginx_sys::NGX_STREAM_UPS_CONF, nginx_sys::NGX_STREAM_MODULE
}

/// The modules in this file, for `load_module`.
#[unsafe(no_mangle)]
#[allow(non_upper_case_globals)]
pub static mut ngx_modules: [*const ngx_module_t; 3] = [
    ptr::addr_of!(http::MODULE),
    #[cfg(ngx_feature = "stream")]
    ptr::addr_of!(stream::MODULE),
    ptr::null(),
    #[cfg(not(ngx_feature = "stream"))]
    ptr::null(),
];

/// Their names.
#[unsafe(no_mangle)]
#[allow(non_upper_case_globals)]
pub static mut ngx_module_names: [*const c_char; 3] = [
    c"ngx_http_foreign_method_module".as_ptr(),
    #[cfg(ngx_feature = "stream")]
    c"ngx_stream_foreign_method_module".as_ptr(),
    ptr::null(),
    #[cfg(not(ngx_feature = "stream"))]
    ptr::null(),
];

/// nginx puts them where it likes.
#[unsafe(no_mangle)]
#[allow(non_upper_case_globals)]
pub static mut ngx_module_order: [*const c_char; 1] = [ptr::null()];
