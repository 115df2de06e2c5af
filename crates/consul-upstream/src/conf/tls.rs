//! `consul_ssl_…`: how agents at `https://` addresses are verified, and what they are shown.
//!
//! Every file is read here, by the master: the workers' user need not be able to.

use core::ffi::c_void;

use consul_watch::file::Loaded;
use consul_watch::tls::{ServerName, Tls, TlsError};
use nginx_sys::{ngx_conf_t, ngx_str_t};

use super::argument::{file, flag, named, once, only, quoted};
use super::{Fault, ServerConf};
use crate::protocol::Protocol;

/// What is set at one level.
#[derive(Default)]
pub struct TlsSettings {
    trusted: Option<Loaded>,
    certificate: Option<Loaded>,
    key: Option<Loaded>,
    server_name: Option<ServerName>,
    verify: Option<bool>,
}

impl TlsSettings {
    /// The settings of an upstream: each its own, else the block's, else the default.
    pub fn merged(&self, block: &TlsSettings) -> Result<Tls, String> {
        let certificate = self.certificate.as_ref().or(block.certificate.as_ref());
        let key = self.key.as_ref().or(block.key.as_ref());
        let identity = match (certificate, key) {
            (Some(certificate), Some(key)) => Some((certificate.clone(), key.clone())),
            (None, None) => None,
            (Some(certificate), None) => {
                let name = named(certificate.path());
                return Err(format!(
                    "no \"consul_ssl_certificate_key\" is defined for certificate {name}"
                ));
            }
            (None, Some(key)) => {
                let name = named(key.path());
                return Err(format!(
                    "no \"consul_ssl_certificate\" is defined for certificate key {name}"
                ));
            }
        };
        Ok(Tls {
            trusted: self.trusted.as_ref().or(block.trusted.as_ref()).cloned(),
            identity,
            server_name: self.server_name.as_ref().or(block.server_name.as_ref()).cloned(),
            verify: self.verify.or(block.verify).unwrap_or(true),
        })
    }
}

/// The settings that were found good: a thousand upstreams may share those of the block.
#[derive(Default)]
pub struct Checked(Vec<Tls>);

impl Checked {
    /// Checks settings that were not checked before.
    pub fn check(&mut self, tls: &Tls) -> Result<(), String> {
        if self.0.contains(tls) {
            return Ok(());
        }
        // First without a certificate to show: what is wrong then is no fault of that one.
        let plain = Tls { identity: None, ..tls.clone() };
        plain.check().map_err(|err| match (err, &tls.trusted) {
            (TlsError::Setup(text), Some(trusted)) => {
                format!("cannot use trusted certificate {}: {text}", named(trusted.path()))
            }
            (err, _) => format!("cannot use TLS: {err}"),
        })?;
        if let Some((certificate, key)) = &tls.identity {
            tls.check().map_err(|err| match err {
                TlsError::Setup(text) => format!(
                    "cannot use certificate {} with key {}: {text}",
                    named(certificate.path()),
                    named(key.path()),
                ),
                err => format!("cannot use TLS: {err}"),
            })?;
        }
        self.0.push(tls.clone());
        Ok(())
    }
}

/// # Safety
///
/// As for all handlers here: called by [`super::set`] with nginx's own `cf`, for a command whose
/// configuration is a [`ServerConf`], which nobody else uses meanwhile.
unsafe fn settings<'a, P: Protocol>(conf: *mut c_void) -> &'a mut TlsSettings {
    // SAFETY: the caller's promise.
    unsafe { &mut (*conf.cast::<ServerConf<P>>()).settings.tls }
}

/// `consul_ssl_trusted_certificate FILE;`
///
/// # Safety
///
/// See [`settings`].
pub unsafe fn trusted_certificate<P: Protocol>(
    cf: *mut ngx_conf_t,
    args: &[ngx_str_t],
    conf: *mut c_void,
) -> Result<(), Fault> {
    // SAFETY: this function's own contract.
    unsafe { once(&mut settings::<P>(conf).trusted, file(cf, args, "trusted certificate")?) }
}

/// `consul_ssl_certificate FILE;`
///
/// # Safety
///
/// See [`settings`].
pub unsafe fn certificate<P: Protocol>(
    cf: *mut ngx_conf_t,
    args: &[ngx_str_t],
    conf: *mut c_void,
) -> Result<(), Fault> {
    // SAFETY: this function's own contract.
    unsafe { once(&mut settings::<P>(conf).certificate, file(cf, args, "certificate")?) }
}

/// `consul_ssl_certificate_key FILE;`
///
/// # Safety
///
/// See [`settings`].
pub unsafe fn certificate_key<P: Protocol>(
    cf: *mut ngx_conf_t,
    args: &[ngx_str_t],
    conf: *mut c_void,
) -> Result<(), Fault> {
    // SAFETY: this function's own contract.
    unsafe { once(&mut settings::<P>(conf).key, file(cf, args, "certificate key")?) }
}

/// `consul_ssl_server_name NAME;`
///
/// # Safety
///
/// See [`settings`].
pub unsafe fn server_name<P: Protocol>(
    _cf: *mut ngx_conf_t,
    args: &[ngx_str_t],
    conf: *mut c_void,
) -> Result<(), Fault> {
    let value = only(args);
    let name = value
        .to_str()
        .map_err(|_| TlsError::ServerName)
        .and_then(ServerName::new)
        .map_err(|err| format!("server name {} {err}", quoted(&value)))?;
    // SAFETY: this function's own contract.
    once(unsafe { &mut settings::<P>(conf).server_name }, name)
}

/// `consul_ssl_verify on|off;`
///
/// # Safety
///
/// See [`settings`].
pub unsafe fn verify<P: Protocol>(
    _cf: *mut ngx_conf_t,
    args: &[ngx_str_t],
    conf: *mut c_void,
) -> Result<(), Fault> {
    // SAFETY: this function's own contract.
    once(unsafe { &mut settings::<P>(conf).verify }, flag(args)?)
}
