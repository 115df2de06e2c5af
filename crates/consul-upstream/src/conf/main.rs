//! What is set once for all upstreams, in the whole block alone.

use core::ffi::c_void;

use nginx_sys::{ngx_conf_t, ngx_str_t};
use ngx::ngx_string;

use super::argument::{Base, invalid, number, once, only, path, time};
use super::{Fault, MainConf};
use crate::protocol::Protocol;

/// As many connections as a port of one's own for each would allow.
const CONNECTIONS: std::ops::RangeInclusive<u32> = 1..=65535;

/// `consul_state_path`, where it is not set: a directory under nginx's prefix.
const STATE_PATH: ngx_str_t = ngx_string!("consul_state");

/// # Safety
///
/// As for all handlers here: called by [`super::set`] with nginx's own `cf`, for a command whose
/// configuration is a [`MainConf`], which nobody else uses meanwhile.
unsafe fn main<'a, P: Protocol>(conf: *mut c_void) -> &'a mut MainConf<P> {
    // SAFETY: the caller's promise.
    unsafe { &mut *conf.cast::<MainConf<P>>() }
}

/// `consul_start_timeout TIME;`
///
/// # Safety
///
/// See [`main`].
pub unsafe fn start_timeout<P: Protocol>(
    _cf: *mut ngx_conf_t,
    args: &[ngx_str_t],
    conf: *mut c_void,
) -> Result<(), Fault> {
    let value = only(args);
    let timeout = time(value.as_bytes()).ok_or_else(|| invalid(&value, ""))?;
    // SAFETY: this function's own contract.
    once(unsafe { &mut main::<P>(conf).start_timeout }, timeout)
}

/// `consul_max_connections N;`
///
/// # Safety
///
/// See [`main`].
pub unsafe fn max_connections<P: Protocol>(
    _cf: *mut ngx_conf_t,
    args: &[ngx_str_t],
    conf: *mut c_void,
) -> Result<(), Fault> {
    let value = only(args);
    let connections = number(value.as_bytes())
        .filter(|connections| CONNECTIONS.contains(connections))
        .ok_or_else(|| invalid(&value, ", it must be from 1 to 65535"))?;
    // SAFETY: this function's own contract.
    once(unsafe { &mut main::<P>(conf).max_connections }, connections as usize)
}

/// `consul_state_path PATH|off;`
///
/// # Safety
///
/// See [`main`].
pub unsafe fn state_path<P: Protocol>(
    cf: *mut ngx_conf_t,
    args: &[ngx_str_t],
    conf: *mut c_void,
) -> Result<(), Fault> {
    let value = only(args);
    let path = match value.as_bytes() {
        b"off" => None,
        b"" => return Err(invalid(&value, ", it must be a directory or \"off\"")),
        // SAFETY: this function's own contract.
        _ => Some(unsafe { path(cf, &value, Base::Prefix) }?),
    };
    // SAFETY: this function's own contract.
    once(unsafe { &mut main::<P>(conf).state_path }, path)
}

/// Completes what was not set and depends on how nginx was started.
///
/// # Safety
///
/// `cf` is the context of the block.
pub unsafe fn complete<P: Protocol>(
    cf: *mut ngx_conf_t,
    main: &mut MainConf<P>,
) -> Result<(), String> {
    if main.state_path.is_none() {
        // SAFETY: this function's own contract; the text is static.
        main.state_path = Some(Some(unsafe { path(cf, &STATE_PATH, Base::Prefix) }?));
    }
    Ok(())
}
