//! How Consul is asked. Each directive may stand in the whole block, and again in an upstream,
//! where it replaces the former.

use core::ffi::c_void;
use std::time::Duration;

use consul_watch::Agents;
use consul_watch::agent::{Address, Consistency, Secret, Token};
use nginx_sys::{ngx_conf_t, ngx_parse_size, ngx_str_t};

use super::argument::{file, invalid, named, once, only, quoted, time, word};
use super::tls::TlsSettings;
use super::{Fault, ServerConf};
use crate::protocol::Protocol;

const ADDRESS: &str = "http://127.0.0.1:8500";
const WAIT: Duration = Duration::from_secs(25);
const TIMEOUT: Duration = Duration::from_secs(5);
const MAX_RESPONSE: usize = 64 << 20;

/// Consul itself takes no longer wait than ten minutes; a shorter one than a second is polling.
const WAITS: std::ops::RangeInclusive<Duration> =
    Duration::from_secs(1)..=Duration::from_secs(5 * 60);

/// What is set at one level.
#[derive(Default)]
pub struct Settings {
    addresses: Option<Vec<Address>>,
    token: Option<Token>,
    pub tls: TlsSettings,
    consistency: Option<Consistency>,
    wait: Option<Duration>,
    timeout: Option<Duration>,
    max_response: Option<usize>,
}

impl Settings {
    /// The agents as an upstream asks them: with its own settings, else the block's, else the
    /// defaults.
    pub fn agents(&self, block: &Settings) -> Result<Agents, String> {
        let addresses = self.addresses.as_ref().or(block.addresses.as_ref());
        Ok(Agents {
            addresses: addresses.cloned().unwrap_or_else(|| vec![default_address()]),
            token: self.token.as_ref().or(block.token.as_ref()).cloned(),
            tls: self.tls.merged(&block.tls)?,
            consistency: self.consistency.or(block.consistency).unwrap_or_default(),
            wait: self.wait.or(block.wait).unwrap_or(WAIT),
            timeout: self.timeout.or(block.timeout).unwrap_or(TIMEOUT),
            max_response: self.max_response.or(block.max_response).unwrap_or(MAX_RESPONSE),
        })
    }
}

fn default_address() -> Address {
    Address::parse(ADDRESS).expect("a literal that is an address")
}

/// # Safety
///
/// As for all handlers here: called by [`super::set`] for a command whose configuration is a
/// [`ServerConf`], which nobody else uses meanwhile.
unsafe fn settings<'a, P: Protocol>(conf: *mut c_void) -> &'a mut Settings {
    // SAFETY: the caller's promise.
    unsafe { &mut (*conf.cast::<ServerConf<P>>()).settings }
}

/// `consul_address URL …;`
///
/// # Safety
///
/// See [`settings`].
pub unsafe fn address<P: Protocol>(
    _cf: *mut ngx_conf_t,
    args: &[ngx_str_t],
    conf: *mut c_void,
) -> Result<(), Fault> {
    let mut addresses = Vec::with_capacity(args.len());
    for value in args {
        let address = parse(value)?;
        if addresses.contains(&address) {
            return Err(format!("duplicate address {}", quoted(value)).into());
        }
        addresses.push(address);
    }
    // SAFETY: this function's own contract.
    once(unsafe { &mut settings::<P>(conf).addresses }, addresses)
}

fn parse(value: &ngx_str_t) -> Result<Address, String> {
    value
        .to_str()
        .map_err(|_| "is not valid UTF-8".to_owned())
        .and_then(|text| Address::parse(text).map_err(|err| err.to_string()))
        .map_err(|err| {
            // What may be a secret is not repeated.
            let secret = value.as_bytes().iter().any(|byte| b"@?".contains(byte));
            let shown = if secret { String::new() } else { format!(" {}", quoted(value)) };
            format!("address{shown} {err}")
        })
}

/// `consul_token STRING;`
///
/// # Safety
///
/// See [`settings`].
pub unsafe fn token<P: Protocol>(
    _cf: *mut ngx_conf_t,
    args: &[ngx_str_t],
    conf: *mut c_void,
) -> Result<(), Fault> {
    // The token itself is in none of the texts.
    let secret = Secret::new(only(args).as_bytes()).map_err(|err| format!("the token {err}"))?;
    // SAFETY: this function's own contract.
    unsafe { set_token::<P>(conf, Token::Fixed(secret)) }
}

/// `consul_token_file PATH;`
///
/// # Safety
///
/// See [`settings`]; `cf` is nginx's.
pub unsafe fn token_file<P: Protocol>(
    cf: *mut ngx_conf_t,
    args: &[ngx_str_t],
    conf: *mut c_void,
) -> Result<(), Fault> {
    // SAFETY: this function's own contract.
    let file = unsafe { file(cf, args, "token file") }?;
    let name = named(file.path());
    let token = Token::File(file);
    token.secret().map_err(|err| format!("the token in {name} {err}"))?;
    // SAFETY: this function's own contract.
    unsafe { set_token::<P>(conf, token) }
}

/// # Safety
///
/// See [`settings`].
unsafe fn set_token<P: Protocol>(conf: *mut c_void, token: Token) -> Result<(), Fault> {
    // SAFETY: this function's own contract.
    once(unsafe { &mut settings::<P>(conf).token }, token).map_err(|_| {
        "the token is set already, by \"consul_token\" or \"consul_token_file\"".into()
    })
}

/// `consul_consistency default|stale|consistent;`
///
/// # Safety
///
/// See [`settings`].
pub unsafe fn consistency<P: Protocol>(
    _cf: *mut ngx_conf_t,
    args: &[ngx_str_t],
    conf: *mut c_void,
) -> Result<(), Fault> {
    let value = only(args);
    let words = [
        ("default", Consistency::Default),
        ("stale", Consistency::Stale),
        ("consistent", Consistency::Consistent),
    ];
    let consistency = word(&value, &words)
        .ok_or_else(|| invalid(&value, ", it must be \"default\", \"stale\" or \"consistent\""))?;
    // SAFETY: this function's own contract.
    once(unsafe { &mut settings::<P>(conf).consistency }, consistency)
}

/// `consul_wait TIME;`
///
/// # Safety
///
/// See [`settings`].
pub unsafe fn wait<P: Protocol>(
    _cf: *mut ngx_conf_t,
    args: &[ngx_str_t],
    conf: *mut c_void,
) -> Result<(), Fault> {
    let value = only(args);
    let wait = time(value.as_bytes())
        .filter(|wait| WAITS.contains(wait))
        .ok_or_else(|| invalid(&value, ", it must be from 1s to 5m"))?;
    // SAFETY: this function's own contract.
    once(unsafe { &mut settings::<P>(conf).wait }, wait)
}

/// `consul_timeout TIME;`
///
/// # Safety
///
/// See [`settings`].
pub unsafe fn timeout<P: Protocol>(
    _cf: *mut ngx_conf_t,
    args: &[ngx_str_t],
    conf: *mut c_void,
) -> Result<(), Fault> {
    let value = only(args);
    let timeout = time(value.as_bytes())
        .filter(|timeout| !timeout.is_zero())
        .ok_or_else(|| invalid(&value, ""))?;
    // SAFETY: this function's own contract.
    once(unsafe { &mut settings::<P>(conf).timeout }, timeout)
}

/// `consul_max_response SIZE;`
///
/// # Safety
///
/// See [`settings`].
pub unsafe fn max_response<P: Protocol>(
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
    once(unsafe { &mut settings::<P>(conf).max_response }, size)
}
