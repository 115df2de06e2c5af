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

    /// Which file a client could not be made of, though all could be read, and why.
    pub(crate) fn blame(&self, why: &str) -> String {
        let plain = Self { identity: None, ..self.clone() };
        match (&self.identity, &self.trusted) {
            (Some((certificate, key)), _) if plain.check().is_ok() => {
                let (certificate, key) = (certificate.path().display(), key.path().display());
                format!("certificate \"{certificate}\" with key \"{key}\": {why}")
            }
            (_, Some(trusted)) => {
                format!("trusted certificate \"{}\": {why}", trusted.path().display())
            }
            _ => why.to_owned(),
        }
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
pub fn last_cause(err: &reqwest::Error) -> String {
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

    /// Certificates of a test, in files.
    struct Files(std::path::PathBuf);

    impl Files {
        fn new(name: &str) -> Self {
            let name = format!("consul-watch-tls-{name}-{}", std::process::id());
            let dir = std::env::temp_dir().join(name);
            std::fs::create_dir_all(&dir).unwrap();
            Self(dir)
        }

        fn write(&self, name: &str, text: &str) -> Loaded {
            let path = self.0.join(name);
            std::fs::write(&path, text).unwrap();
            Loaded::read(path).unwrap()
        }

        /// A certificate that is its own authority, and its key.
        fn certificate(&self, name: &str) -> (Loaded, Loaded) {
            let made = rcgen::generate_simple_self_signed([name.to_owned()]).unwrap();
            let key = self.write(&format!("{name}.key"), &made.signing_key.serialize_pem());
            (self.write(&format!("{name}.pem"), &made.cert.pem()), key)
        }
    }

    impl Drop for Files {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn settings_that_could_and_could_not_work() {
        let files = Files::new("check");
        let ((one, key), (_, other)) = (files.certificate("one"), files.certificate("other"));
        let nonsense = files.write("nonsense", "-----BEGIN CERTIFICATE-----\nnonsense\n");
        let empty = files.write("empty", "");
        let with = |trusted: Option<&Loaded>, identity: Option<(&Loaded, &Loaded)>| Tls {
            trusted: trusted.cloned(),
            identity: identity.map(|(certificate, key)| (certificate.clone(), key.clone())),
            ..Tls::default()
        };
        with(Some(&one), None).check().unwrap();
        with(Some(&one), Some((&one, &key))).check().unwrap();
        Tls { verify: false, ..with(Some(&one), None) }.check().unwrap();

        for bad in [&nonsense, &empty, &key] {
            let error = with(Some(bad), None).check().unwrap_err();
            assert_eq!(error, TlsError::Certificates(bad.path().to_owned()));
            assert!(error.to_string().contains(&bad.path().display().to_string()));
        }
        for (certificate, key) in [(&empty, &key), (&one, &empty)] {
            let error = with(Some(&one), Some((certificate, key))).check().unwrap_err();
            assert!(matches!(error, TlsError::Identity { .. }), "{error}");
        }
        let foreign = with(Some(&one), Some((&one, &other)));
        let TlsError::Setup(why) = foreign.check().unwrap_err() else { panic!("another error") };
        let blamed = foreign.blame(&why);
        assert!(blamed.starts_with("certificate \"") && blamed.contains("other.key"), "{blamed}");
    }

    #[test]
    fn files_that_change_are_read_again() {
        let files = Files::new("reread");
        let ((one, key), (trusted, _)) = (files.certificate("one"), files.certificate("trusted"));
        let tls = Tls { trusted: Some(trusted), identity: Some((one, key)), ..Tls::default() };
        assert!(tls.reread().is_none());
        files.certificate("one");
        let next = tls.reread().unwrap().unwrap();
        assert_ne!(next.identity, tls.identity);
        assert_eq!(next.trusted, tls.trusted);
        next.check().unwrap();
        files.certificate("trusted");
        assert_ne!(next.reread().unwrap().unwrap().trusted, next.trusted);
        // What is no file any more cannot be read.
        std::fs::remove_file(files.0.join("one.key")).unwrap();
        std::fs::create_dir(files.0.join("one.key")).unwrap();
        let error = tls.reread().unwrap().unwrap_err();
        assert!(error.to_string().contains("one.key"), "{error}");
    }
}
