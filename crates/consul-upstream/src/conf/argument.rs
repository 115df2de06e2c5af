//! What the directives' arguments hold, and what is said of those that hold something else.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use consul_watch::error::printable;
use consul_watch::file::Loaded;
use nginx_sys::{
    NGX_OK, ngx_atoi, ngx_conf_full_name, ngx_conf_t, ngx_int_t, ngx_parse_time, ngx_str_t,
    ngx_uint_t,
};

use super::Fault;

/// The directory in which a relative path begins.
#[derive(Clone, Copy)]
pub enum Base {
    /// That of the configuration file, as for nginx's own certificates.
    Configuration = 1,
    /// nginx's prefix, as for the files that it writes.
    Prefix = 0,
}

/// The argument of a command that takes one: nginx has counted.
pub fn only(args: &[ngx_str_t]) -> ngx_str_t {
    args.first().copied().unwrap_or_default()
}

/// Sets what may be set once.
pub fn once<T>(slot: &mut Option<T>, value: T) -> Result<(), Fault> {
    match slot.replace(value) {
        None => Ok(()),
        Some(_) => Err(Fault::Directive("is duplicate".into())),
    }
}

/// A value that is none, and what would be one.
pub fn invalid(value: &ngx_str_t, hint: &str) -> Fault {
    Fault::Directive(format!("invalid value {}{hint}", quoted(value)))
}

/// A value in quotes, as it may stand in a log line.
pub fn quoted(value: &ngx_str_t) -> String {
    format!("\"{}\"", shown(value.as_bytes()))
}

/// A text from the configuration, as it may stand in a log line.
pub fn shown(bytes: &[u8]) -> String {
    printable(bytes, 200)
}

/// A number as nginx's `server` takes it, within 31 bits.
pub fn number(value: &[u8]) -> Option<u32> {
    // SAFETY: the function reads as many bytes as it is told.
    let number = unsafe { ngx_atoi(value.as_ptr().cast_mut(), value.len()) };
    i32::try_from(number).ok().and_then(|number| u32::try_from(number).ok())
}

/// A time that may have milliseconds.
pub fn time(value: &[u8]) -> Option<Duration> {
    let ms = parsed_time(value, false)?;
    Some(Duration::from_millis(u64::try_from(ms).ok()?))
}

/// A time as nginx's `server` takes it, within 31 bits.
pub fn seconds(value: &[u8]) -> Option<u32> {
    let seconds = i32::try_from(parsed_time(value, true)?).ok()?;
    u32::try_from(seconds).ok()
}

fn parsed_time(value: &[u8], seconds: bool) -> Option<ngx_int_t> {
    let mut value = ngx_str_t { len: value.len(), data: value.as_ptr().cast_mut() };
    // SAFETY: the function reads the text alone.
    let time = unsafe { ngx_parse_time(&mut value, seconds.into()) };
    // NGX_ERROR is −1.
    (time >= 0).then_some(time)
}

/// One of these words, as nginx itself compares them.
pub fn word<T: Copy>(value: &ngx_str_t, words: &[(&str, T)]) -> Option<T> {
    let is_it = |word: &str| word.as_bytes().eq_ignore_ascii_case(value.as_bytes());
    words.iter().find(|(word, _)| is_it(word)).map(|(_, meaning)| *meaning)
}

/// The only argument of a directive that is on or off.
pub fn flag(args: &[ngx_str_t]) -> Result<bool, Fault> {
    let value = only(args);
    word(&value, &[("on", true), ("off", false)])
        .ok_or_else(|| invalid(&value, ", it must be \"on\" or \"off\""))
}

/// The absolute path that a relative one means: also where nginx's prefix is relative itself, since
/// workers may have another working directory.
///
/// # Safety
///
/// `cf` is the context that nginx passed to a handler, and the text one of its arguments, or static.
pub unsafe fn path(cf: *mut ngx_conf_t, name: &ngx_str_t, base: Base) -> Result<PathBuf, String> {
    let mut full = *name;
    // SAFETY: the cycle is live while its configuration is read; the function stores another text
    // in `full`, from the configuration's pool, and leaves the old one as it is.
    let full = unsafe {
        if ngx_conf_full_name((*cf).cycle, &mut full, base as ngx_uint_t) != NGX_OK as ngx_int_t {
            return Err("no memory".into());
        }
        full.as_bytes()
    };
    std::path::absolute(OsStr::from_bytes(full))
        .map_err(|err| format!("path \"{}\": {err}", shown(full)))
}

/// Reads the file that the only argument of a directive names.
///
/// # Safety
///
/// See [`path`].
pub unsafe fn file(cf: *mut ngx_conf_t, args: &[ngx_str_t], what: &str) -> Result<Loaded, Fault> {
    // SAFETY: this function's own contract.
    let path = unsafe { path(cf, &only(args), Base::Configuration) }?;
    let name = named(&path);
    Loaded::read(path).map_err(|err| format!("cannot read {what} {name}: {err}").into())
}

/// A path in quotes, as it may stand in a log line.
pub fn named(path: &Path) -> String {
    format!("\"{}\"", printable(path.as_os_str().as_bytes(), 800))
}
