//! How `https://` agents are verified, and what they are shown.

use std::path::PathBuf;

use reqwest::{Certificate, ClientBuilder, Identity, Url};
use thiserror::Error;

use crate::error::printable;
use crate::file::Loaded;

/// Settings of TLS; they matter for `https://` addresses alone.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Tls {
    /// The certificates of the authorities to trust, in PEM; the system's where there are none.
    pub trusted: Option<Loaded>,
    /// The certificate to show, with those between it and its authority, and its key, in PEM.
    pub identity: Option<(Loaded, Loaded)>,
    /// The name that the agent's certificate must have, in place of the address's host.
    pub server_name: Option<ServerName>,
    /// Whether the agent's certificate is verified.
    pub verify: bool,
}

impl Default for Tls {
    /// The system's authorities, nothing to show, and verified.
    fn default() -> Self {
        Self { trusted: None, identity: None, server_name: None, verify: true }
    }
}

/// A host's name, as it stands in a certificate.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ServerName(String);

/// Why settings of TLS are of no use.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum TlsError {
    /// No host name; an IP address is the host of the address itself.
    #[error("is not a host name")]
    ServerName,
    /// No certificate could be read.
    #[error("no valid certificate in \"{}\"", .0.display())]
    Certificates(PathBuf),
    /// The certificate or the key could not be read.
    #[error("no valid certificate in \"{}\", or no valid key in \"{}\"", .certificate.display(), .key.display())]
    Identity {
        /// The file of the certificate.
        certificate: PathBuf,
        /// The file of the key.
        key: PathBuf,
    },
    /// All could be read, and yet there is something wrong: the key is another certificate's, or
    /// the system has no authorities.
    #[error("{0}")]
    Setup(String),
}

impl ServerName {
    /// Takes a name. An IP address is refused: it needs no other name than itself.
    pub fn new(text: &str) -> Result<Self, TlsError> {
        match rustls::pki_types::ServerName::try_from(text) {
            Ok(rustls::pki_types::ServerName::DnsName(_)) => (),
            _ => return Err(TlsError::ServerName),
        }
        // It has to stand in a URL, too, where `1.2` is an address.
        match Url::parse(&format!("https://{text}")).ok().as_ref().and_then(Url::domain) {
            Some(domain) if domain.eq_ignore_ascii_case(text) => Ok(Self(text.to_owned())),
            _ => Err(TlsError::ServerName),
        }
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Tls {
    /// Whether a connection could be made with these settings. Nothing is asked for that.
    pub fn check(&self) -> Result<(), TlsError> {
        provide();
        let builder = self.configure(ClientBuilder::new().no_proxy())?;
        builder.build().map(drop).map_err(|err| TlsError::Setup(last_cause(&err)))
    }

    /// Gives these settings to a client.
    pub(crate) fn configure(&self, mut builder: ClientBuilder) -> Result<ClientBuilder, TlsError> {
        if let Some(trusted) = &self.trusted {
            let invalid = || TlsError::Certificates(trusted.path().to_owned());
            let all = Certificate::from_pem_bundle(trusted.content()).map_err(|_| invalid())?;
            if all.is_empty() {
                return Err(invalid());
            }
            builder = builder.tls_certs_only(all);
        }
        if let Some((certificate, key)) = &self.identity {
            let pem = [certificate.content(), b"\n", key.content()].concat();
            let identity = Identity::from_pem(&pem).map_err(|_| TlsError::Identity {
                certificate: certificate.path().to_owned(),
                key: key.path().to_owned(),
            })?;
            builder = builder.identity(identity);
        }
        Ok(builder.tls_danger_accept_invalid_certs(!self.verify))
    }

    /// The settings of now, where one of their files has changed.
    pub(crate) fn reread(&self) -> Option<std::io::Result<Self>> {
        let mut next = self.clone();
        let identity = next.identity.iter_mut().flat_map(|(certificate, key)| [certificate, key]);
        let mut changed = false;
        for file in next.trusted.iter_mut().chain(identity) {
            match file.reread() {
                None => (),
                Some(Ok(now)) => {
                    *file = now;
                    changed = true;
                }
                Some(Err(err)) => return Some(Err(err)),
            }
        }
        changed.then_some(Ok(next))
    }
}

/// The one provider of cryptography in this process; a second call changes nothing.
pub(crate) fn provide() {
    let _ = rustls::crypto::ring::default_provider().install_default();
}

/// What reqwest says of itself is about the request; what a person needs is the last cause.
pub(crate) fn last_cause(err: &reqwest::Error) -> String {
    let mut cause: &dyn std::error::Error = err;
    while let Some(source) = cause.source() {
        cause = source;
    }
    printable(cause.to_string().as_bytes(), 200)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn server_names() {
        for name in ["server.dc1.consul", "localhost", "a"] {
            assert_eq!(ServerName::new(name).unwrap().as_str(), name);
        }
        let long = "a".repeat(70);
        for bad in [
            "",
            "127.0.0.1",
            "[::1]",
            "a b",
            "a/b",
            "a:1",
            "u@a",
            "a?x",
            "1.2",
            "*.a",
            "a..b",
            &long,
        ] {
            assert_eq!(ServerName::new(bad), Err(TlsError::ServerName), "{bad:?}");
        }
    }
}
