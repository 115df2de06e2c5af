//! `consul_status;`: what is known of discovery, for people, programs and Prometheus, from any
//! worker.
//!
//! The [`document`] is put together of what stands in the zone of the workers, [`rows`] copies the
//! peers of one upstream at a time, and [`send`] gives the client as much as it reads. What is
//! asked for, and how it looks, is the business of the crate consul-status.
//!
//! This is a content handler, so that whatever nginx knows to guard a location (`allow`,
//! `auth_basic`, ...) guards this one.

use core::ffi::c_void;
use std::rc::Rc;

use consul_status::{Answer, Error, Format, Request, request};
use consul_upstream::conf::{Fault, Handler, MainConf, ServerConf, command};
use consul_upstream::guard::guard;
use consul_upstream::process::Shared;
use nginx_peers::http;
use nginx_sys::{
    NGX_CONF_NOARGS, NGX_ERROR, NGX_HTTP_INTERNAL_SERVER_ERROR, NGX_HTTP_LOC_CONF, NGX_OK,
    ngx_command_t, ngx_conf_t, ngx_http_conf_ctx_t, ngx_http_core_loc_conf_t, ngx_http_core_module,
    ngx_http_discard_request_body, ngx_http_request_t, ngx_int_t, ngx_list_push, ngx_pnalloc,
    ngx_str_t, ngx_table_elt_t,
};
use ngx::http::HttpModuleMainConf;

use self::lists::All;
use self::rows::Peers;
use self::send::{Place, Sending};
use crate::http::ConsulUpstream;

mod document;
mod lists;
mod rows;
mod send;

const OK: ngx_int_t = NGX_OK as ngx_int_t;
const ERROR: ngx_int_t = NGX_ERROR as ngx_int_t;

/// `consul_status;` Of no configuration of ours: what it sets is nginx's.
pub const COMMAND: ngx_command_t =
    command(c"consul_status", NGX_HTTP_LOC_CONF | NGX_CONF_NOARGS, 0, &(directive as Handler));

/// # Safety
///
/// As nginx calls it: for a directive inside a location.
unsafe fn directive(cf: *mut ngx_conf_t, _: &[ngx_str_t], _: *mut c_void) -> Result<(), Fault> {
    // SAFETY: this function's own contract.
    match unsafe { install(cf) } {
        true => Ok(()),
        false => Err(Fault::Directive("is duplicate".into())),
    }
}

/// Makes a location answer with the status. `false` if it does so already.
///
/// # Safety
///
/// `cf` is the context inside a location.
unsafe fn install(cf: *mut ngx_conf_t) -> bool {
    // SAFETY: inside a location nginx's own configuration of it stands in the context.
    unsafe {
        let context = (*cf).ctx.cast::<ngx_http_conf_ctx_t>();
        let location = *(*context).loc_conf.add(ngx_http_core_module.ctx_index);
        let location: *mut ngx_http_core_loc_conf_t = location.cast();
        let ours: unsafe extern "C" fn(*mut ngx_http_request_t) -> ngx_int_t = handle;
        let is_ours = (*location).handler.is_some_and(|it| core::ptr::fn_addr_eq(it, ours));
        (*location).handler = Some(ours);
        !is_ours
    }
}

/// # Safety
///
/// As nginx calls it: a request for a location of ours.
unsafe extern "C" fn handle(r: *mut ngx_http_request_t) -> ngx_int_t {
    guard("the status", NGX_HTTP_INTERNAL_SERVER_ERROR as ngx_int_t, || {
        // SAFETY: this function's own contract; nginx's main thread.
        unsafe {
            let rc = ngx_http_discard_request_body(r);
            if rc != OK {
                return rc;
            }
            // Nothing here has a validator, and a condition must not become a 412.
            http::disable_not_modified(r);
            match answer(r) {
                Ok(Answered::Head(format)) => head(r, format),
                Ok(Answered::Body(format, sending)) => body(r, format, sending),
                Err(error) => refuse(r, error),
            }
        }
    })
}

enum Answered {
    Head(Format),
    Body(Format, Box<Sending>),
}

/// What a request gets.
///
/// # Safety
///
/// As [`handle`].
unsafe fn answer(r: *mut ngx_http_request_t) -> Result<Answered, Error> {
    // SAFETY: the request is live, and so are its texts and its configuration.
    unsafe {
        let location = location_of(r);
        let name = (*location).name.as_bytes();
        let uri = (*r).uri.as_bytes();
        // The name of a regex or a named location is not how the path begins.
        let prefix =
            Some(name).filter(|name| (*location).exact_match() == 0 && uri.starts_with(name));
        let path = prefix.map_or(&b""[..], |prefix| request::rest(uri, prefix));
        let accept = accept_of(r);
        let parts = request::Parts {
            method: (*r).method_name.as_bytes(),
            path,
            args: (*r).args.as_bytes(),
            accept: &accept,
        };
        let request = Request::parse(&parts)?;
        let format = request.format;
        let all = Rc::new(All::new(ConsulUpstream::main_conf(&*r)));
        if request.head {
            return match &request.upstream {
                Some(name) if !all.knows(name) => Err(Error::Upstream),
                _ => Ok(Answered::Head(format)),
            };
        }
        let document = document::of(&all, &request);
        let answer = Answer::new(document, Peers::new(all), request, prefix)?;
        let place = if answer.is_large() { Some(Place::take().ok_or(Error::Busy)?) } else { None };
        Ok(Answered::Body(format, Box::new(Sending::new(answer, place))))
    }
}

/// # Safety
///
/// As [`handle`].
unsafe fn location_of(r: *mut ngx_http_request_t) -> *mut ngx_http_core_loc_conf_t {
    // SAFETY: a request that has a handler has a location.
    unsafe { (*(*r).loc_conf.add(ngx_http_core_module.ctx_index)).cast() }
}

/// The headers `Accept`, as one.
///
/// # Safety
///
/// As [`handle`].
unsafe fn accept_of(r: *mut ngx_http_request_t) -> Vec<u8> {
    // SAFETY: the list and its texts live as long as the request.
    let headers = unsafe { ngx::http::list_iterator(&(*r).headers_in.headers) };
    let accept = headers.filter(|(name, _)| name.as_bytes().eq_ignore_ascii_case(b"accept"));
    let all: Vec<&[u8]> = accept.map(|(_, value)| value.as_bytes()).collect();
    all.join(&b',')
}

/// Sets what all answers have.
///
/// # Safety
///
/// As [`handle`].
unsafe fn begin(
    r: *mut ngx_http_request_t,
    status: u16,
    format: Format,
    more: Option<(&'static str, &'static str)>,
) -> bool {
    // SAFETY: the request is live; all texts are static.
    unsafe {
        (*r).headers_out.status = status.into();
        let content_type = format.content_type();
        let text =
            |text: &'static str| ngx_str_t { len: text.len(), data: text.as_ptr().cast_mut() };
        (*r).headers_out.content_type = text(content_type);
        (*r).headers_out.content_type_len = content_type.find(';').unwrap_or(content_type.len());
        for (name, value) in format.headers().chain(more) {
            let header: *mut ngx_table_elt_t =
                ngx_list_push(&raw mut (*r).headers_out.headers).cast();
            if header.is_null() {
                return false;
            }
            header.write(core::mem::zeroed());
            (*header).hash = 1;
            (*header).key = text(name);
            (*header).value = text(value);
        }
        true
    }
}

/// # Safety
///
/// As [`handle`].
unsafe fn head(r: *mut ngx_http_request_t, format: Format) -> ngx_int_t {
    // SAFETY: this function's own contract.
    unsafe {
        if !begin(r, 200, format, None) {
            return ERROR;
        }
        http::set_header_only(r);
        nginx_sys::ngx_http_send_header(r)
    }
}

/// # Safety
///
/// As [`handle`].
unsafe fn body(r: *mut ngx_http_request_t, format: Format, sending: Box<Sending>) -> ngx_int_t {
    // SAFETY: this function's own contract.
    unsafe {
        if !begin(r, 200, format, None) {
            return ERROR;
        }
        send::start(r, sending)
    }
}

/// # Safety
///
/// As [`handle`].
unsafe fn refuse(r: *mut ngx_http_request_t, error: Error) -> ngx_int_t {
    // SAFETY: this function's own contract; the text is copied into the request's pool.
    unsafe {
        if !begin(r, error.status(), Format::Json, error.header()) {
            return ERROR;
        }
        let body = error.body();
        let copy: *mut u8 = ngx_pnalloc((*r).pool, body.len()).cast();
        if copy.is_null() {
            return ERROR;
        }
        core::ptr::copy_nonoverlapping(body.as_ptr(), copy, body.len());
        send::whole(r, copy, body.len())
    }
}

/// The datacenters of an upstream's sources, read anew when its record is another.
pub fn datacenters<'a>(
    main: &MainConf<ConsulUpstream>,
    conf: &'a mut ServerConf<ConsulUpstream>,
) -> &'a [(u64, String)] {
    // SAFETY: the configuration is that of a live request, and has upstreams.
    let shared = unsafe { Shared::of(main) };
    let written = shared.place(conf.number).written();
    if conf.datacenters.0 != written {
        let sources = document::record_of(shared, conf.number).report.sources;
        let known = sources.into_iter().filter_map(|heard| Some((heard.key, heard.datacenter?)));
        conf.datacenters = (written, known.collect());
    }
    &conf.datacenters.1
}
