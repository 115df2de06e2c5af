//! How Consul is asked. Each directive may stand in the http block, and again in an upstream,
//! where it replaces the former.

use core::ffi::c_void;
use std::time::Duration;

use consul_watch::Agent;
use consul_watch::agent::{Address, Token};
use consul_watch::error::printable;
use nginx_sys::{ngx_conf_full_name, ngx_conf_t, ngx_parse_size, ngx_parse_time, ngx_str_t};

use super::{Fault, MainConf, ServerConf};

const ADDRESS: &str = "http://127.0.0.1:8500";
const WAIT: Duration = Duration::from_secs(25);
const TIMEOUT: Duration = Duration::from_secs(5);
const MAX_RESPONSE: usize = 64 << 20;

/// Consul itself takes no longer wait than ten minutes; a shorter one than a second is polling.
const WAITS: std::ops::RangeInclusive<Duration> =
    Duration::from_secs(1)..=Duration::from_secs(5 * 60);

/// A token file holds one line; anything larger is the wrong file.
const TOKEN_FILE: u64 = 64 * 1024;

/// What is set at one level.
#[derive(Default)]
pub struct Settings {
    address: Option<Address>,
    token: Option<Token>,
    wait: Option<Duration>,
    timeout: Option<Duration>,
    max_response: Option<usize>,
}

impl Settings {
    /// The agent as an upstream asks it: with its own settings, else the http block's, else the
    /// defaults.
    pub fn agent(&self, http: &Settings) -> Agent {
        let address = self.address.as_ref().or(http.address.as_ref());
        Agent {
            address: address.cloned().unwrap_or_else(default_address),
            token: self.token.as_ref().or(http.token.as_ref()).cloned(),
            wait: self.wait.or(http.wait).unwrap_or(WAIT),
            timeout: self.timeout.or(http.timeout).unwrap_or(TIMEOUT),
            max_response: self.max_response.or(http.max_response).unwrap_or(MAX_RESPONSE),
        }
    }
}

fn default_address() -> Address {
    Address::parse(ADDRESS).expect("a literal that is an address")
}

/// # Safety
///
/// As for all handlers here: called by [`super::set`] for a command whose configuration is a
/// [`ServerConf`], which nobody else uses meanwhile.
unsafe fn settings<'a>(conf: *mut c_void) -> &'a mut Settings {
    // SAFETY: the caller's promise.
    unsafe { &mut (*conf.cast::<ServerConf>()).settings }
}

fn once<T>(slot: &mut Option<T>, value: T) -> Result<(), Fault> {
    match slot.replace(value) {
        None => Ok(()),
        Some(_) => Err(Fault::Directive("is duplicate".into())),
    }
}

fn only(args: &[ngx_str_t]) -> ngx_str_t {
    // The commands take one argument: nginx has counted.
    args.first().copied().unwrap_or_default()
}

/// A value in quotes, as it may stand in a log line.
fn quoted(value: &ngx_str_t) -> String {
    format!("\"{}\"", printable(value.as_bytes(), 200))
}

fn time(value: &mut ngx_str_t) -> Option<Duration> {
    // SAFETY: the function reads the text alone.
    let ms = unsafe { ngx_parse_time(value, 0) };
    // NGX_ERROR is −1.
    Some(Duration::from_millis(u64::try_from(ms).ok()?))
}

/// `consul_address URL;`
///
/// # Safety
///
/// See [`settings`].
pub unsafe fn address(
    _cf: *mut ngx_conf_t,
    args: &[ngx_str_t],
    conf: *mut c_void,
) -> Result<(), Fault> {
    let value = only(args);
    let address = value
        .to_str()
        .map_err(|_| "is not valid UTF-8".to_owned())
        .and_then(|text| Address::parse(text).map_err(|err| err.to_string()))
        .map_err(|err| {
            // What may be a secret is not repeated.
            let secret = value.as_bytes().iter().any(|byte| b"@?".contains(byte));
            let shown = if secret { String::new() } else { format!(" {}", quoted(&value)) };
            format!("address{shown} {err}")
        })?;
    // SAFETY: this function's own contract.
    once(unsafe { &mut settings(conf).address }, address)
}

/// `consul_token STRING;`
///
/// # Safety
///
/// See [`settings`].
pub unsafe fn token(
    _cf: *mut ngx_conf_t,
    args: &[ngx_str_t],
    conf: *mut c_void,
) -> Result<(), Fault> {
    // The token itself is in none of the texts.
    let token = only(args)
        .to_str()
        .map_err(|_| "the token is not valid UTF-8".to_owned())
        .and_then(|text| Token::new(text).map_err(|err| format!("the token {err}")))?;
    // SAFETY: this function's own contract.
    once(unsafe { &mut settings(conf).token }, token).map_err(|_| one_token())
}

fn one_token() -> Fault {
    "the token is set already, by \"consul_token\" or \"consul_token_file\"".into()
}

/// A value that is none, and what would be one.
fn invalid(value: &ngx_str_t, hint: &str) -> Fault {
    Fault::Directive(format!("invalid value {}{hint}", quoted(value)))
}

/// `consul_token_file PATH;`, relative to the configuration's directory as nginx's own files are.
///
/// # Safety
///
/// See [`settings`].
pub unsafe fn token_file(
    cf: *mut ngx_conf_t,
    args: &[ngx_str_t],
    conf: *mut c_void,
) -> Result<(), Fault> {
    let mut path = only(args);
    // SAFETY: `cf` is nginx's, and the text is one of its arguments; the function stores another
    // text there, from the configuration's pool.
    if unsafe { ngx_conf_full_name((*cf).cycle, &mut path, 1) } != nginx_sys::NGX_OK as isize {
        return Err("no memory".into());
    }
    let name = quoted(&path);
    let path = path.to_str().map_err(|_| format!("file name {name} is not valid UTF-8"))?;
    let text = read_token(path).map_err(|err| format!("cannot read token file {name}: {err}"))?;
    let token = Token::new(&text).map_err(|err| format!("the token in {name} {err}"))?;
    // SAFETY: this function's own contract.
    once(unsafe { &mut settings(conf).token }, token).map_err(|_| one_token())
}

fn read_token(path: &str) -> std::io::Result<String> {
    use std::io::Read;
    let mut text = String::new();
    std::fs::File::open(path)?.take(TOKEN_FILE).read_to_string(&mut text)?;
    Ok(text)
}

/// `consul_wait TIME;`
///
/// # Safety
///
/// See [`settings`].
pub unsafe fn wait(
    _cf: *mut ngx_conf_t,
    args: &[ngx_str_t],
    conf: *mut c_void,
) -> Result<(), Fault> {
    let mut value = only(args);
    let wait = time(&mut value)
        .filter(|wait| WAITS.contains(wait))
        .ok_or_else(|| invalid(&value, ", it must be from 1s to 5m"))?;
    // SAFETY: this function's own contract.
    once(unsafe { &mut settings(conf).wait }, wait)
}

/// `consul_timeout TIME;`
///
/// # Safety
///
/// See [`settings`].
pub unsafe fn timeout(
    _cf: *mut ngx_conf_t,
    args: &[ngx_str_t],
    conf: *mut c_void,
) -> Result<(), Fault> {
    let mut value = only(args);
    let timeout =
        time(&mut value).filter(|timeout| !timeout.is_zero()).ok_or_else(|| invalid(&value, ""))?;
    // SAFETY: this function's own contract.
    once(unsafe { &mut settings(conf).timeout }, timeout)
}

/// `consul_max_response SIZE;`
///
/// # Safety
///
/// See [`settings`].
pub unsafe fn max_response(
    _cf: *mut ngx_conf_t,
    args: &[ngx_str_t],
    conf: *mut c_void,
) -> Result<(), Fault> {
    let mut value = only(args);
    // SAFETY: the function reads the text alone.
    let size = unsafe { ngx_parse_size(&mut value) };
    let size =
        usize::try_from(size).ok().filter(|size| *size > 0).ok_or_else(|| invalid(&value, ""))?;
    // SAFETY: this function's own contract.
    once(unsafe { &mut settings(conf).max_response }, size)
}

/// `consul_start_timeout TIME;`, of the http block alone.
///
/// # Safety
///
/// Called by [`super::set`] for a command whose configuration is a [`MainConf`].
pub unsafe fn start_timeout(
    _cf: *mut ngx_conf_t,
    args: &[ngx_str_t],
    conf: *mut c_void,
) -> Result<(), Fault> {
    let mut value = only(args);
    let timeout = time(&mut value).ok_or_else(|| invalid(&value, ""))?;
    // SAFETY: this function's own contract.
    once(unsafe { &mut (*conf.cast::<MainConf>()).start_timeout }, timeout)
}
