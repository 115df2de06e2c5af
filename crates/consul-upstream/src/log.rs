//! Lines in nginx's error log. Only the main thread writes them.

use core::fmt;
use core::mem::MaybeUninit;

use nginx_sys::{ngx_conf_log_error, ngx_conf_t, ngx_cycle, ngx_log_t, ngx_uint_t};

/// Writes a line to the current cycle's log.
pub fn cycle(level: u32, args: fmt::Arguments<'_>) {
    // SAFETY: there is a cycle from before the configuration is read until the process ends, and
    // its log with it; a reload replaces both at once.
    unsafe { write(level, (*ngx_cycle).log, args) }
}

/// Writes a line to `log`.
///
/// # Safety
///
/// `log` is live.
pub unsafe fn write(level: u32, log: *mut ngx_log_t, args: fmt::Arguments<'_>) {
    let level = level as ngx_uint_t;
    // SAFETY: the log is live, says the caller.
    unsafe {
        if level > (*log).log_level {
            return;
        }
        let mut buffer = [const { MaybeUninit::uninit() }; ngx::log::LOG_BUFFER_SIZE];
        ngx::log::log_error(level, log, 0, ngx::log::write_fmt(&mut buffer, args));
    }
}

/// Writes a line about the directive that is being read: nginx appends file and line.
///
/// # Safety
///
/// `cf` is the context that nginx passed to a directive's handler.
pub unsafe fn directive(level: u32, cf: *mut ngx_conf_t, args: fmt::Arguments<'_>) {
    let mut buffer = [const { MaybeUninit::uninit() }; ngx::log::LOG_BUFFER_SIZE];
    let text = ngx::log::write_fmt(&mut buffer, args);
    // SAFETY: the format takes a length and a pointer, and gets those of a live text.
    unsafe {
        ngx_conf_log_error(level as ngx_uint_t, cf, 0, c"%*s".as_ptr(), text.len(), text.as_ptr());
    }
}
