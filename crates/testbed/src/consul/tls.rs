//! An agent that speaks HTTPS too.

use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;

use super::{Builder, Consul};
use crate::tls::{self, Authority, Certificate};

/// What [`Builder::tls`] was told.
#[derive(Clone)]
pub(super) struct Settings {
    authority: Authority,
    verify_incoming: bool,
}

/// The files that the agent reads, and only it: what is put in their place it uses from its next
/// reload or start on.
struct Files {
    ca: PathBuf,
    certificate: Certificate,
}

impl Builder {
    /// HTTPS, on a port of its own beside that for HTTP, with a certificate of this authority for
    /// its address and `localhost`. With `verify_incoming` whoever comes by HTTPS must have a
    /// certificate of the same authority.
    #[must_use]
    pub fn tls(mut self, authority: &Authority, verify_incoming: bool) -> Builder {
        self.tls = Some(Settings { authority: authority.clone(), verify_incoming });
        self
    }

    pub fn https_addr(&self) -> SocketAddr {
        (self.ip, self.https_port).into()
    }

    fn tls_files(&self) -> Files {
        let dir = self.own_path("tls");
        let certificate = Certificate { cert: dir.join("cert.pem"), key: dir.join("key.pem") };
        Files { ca: dir.join("ca.pem"), certificate }
    }
}

impl Settings {
    pub(super) fn write(&self, builder: &Builder) {
        let dir = builder.own_path("tls");
        fs::create_dir_all(&dir).unwrap_or_else(|e| panic!("mkdir {}: {e}", dir.display()));
        let files = builder.tls_files();
        tls::copy(&self.authority.ca(), &files.ca);
        let name = format!("{}-{}", builder.datacenter, builder.node);
        let hosts = [&*builder.ip.to_string(), "localhost"];
        self.authority.request(&name).hosts(&hosts).issue().replace(&files.certificate);
    }

    /// Only HTTPS is to ask for certificates: servers among themselves do without.
    pub(super) fn config(&self, builder: &Builder) -> String {
        let Files { ca, certificate: Certificate { cert, key } } = builder.tls_files();
        format!(
            "ca_file = {ca:?} cert_file = {cert:?} key_file = {key:?} verify_incoming_https = {}",
            self.verify_incoming
        )
    }
}

impl Consul {
    pub fn https_addr(&self) -> SocketAddr {
        self.builder.https_addr()
    }

    /// As in `consul_address`.
    pub fn https_url(&self) -> String {
        format!("https://{}", self.https_addr())
    }

    /// From now on new connections meet this certificate; those that are there stay. It needs
    /// [`Builder::persistent`], see [`Consul::reload`].
    pub fn install(&self, certificate: &Certificate) {
        certificate.replace(&self.builder.tls_files().certificate);
        self.reload();
    }

    /// From now on certificates of these authorities are taken, and of no others. It needs
    /// [`Builder::persistent`], see [`Consul::reload`].
    pub fn trust(&self, authorities: &[&Authority]) {
        let read = |path: PathBuf| {
            fs::read_to_string(&path).unwrap_or_else(|e| panic!("read {}: {e}", path.display()))
        };
        let all: String = authorities.iter().map(|authority| read(authority.ca())).collect();
        tls::replace(&self.builder.tls_files().ca, all);
        self.reload();
    }

    /// Reads its configuration again, and has done so on return.
    ///
    /// # Panics
    ///
    /// In development mode: there an agent forgets its services with that.
    pub fn reload(&self) {
        assert!(self.builder.persistent, "a reload needs Builder::persistent");
        self.put("/v1/agent/reload", "");
    }
}

#[cfg(test)]
mod tests {
    use std::io::{self, Read, Write};
    use std::net::TcpStream;
    use std::sync::Arc;
    use std::time::Duration;

    use rustls::pki_types::pem::PemObject;
    use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
    use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

    use super::*;
    use crate::{Dir, Net, Service};

    type Stream = StreamOwned<ClientConnection, TcpStream>;

    fn connect(
        consul: &Consul,
        host: &str,
        ca: &Authority,
        client: Option<&Certificate>,
    ) -> io::Result<Stream> {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(ca.ca()).unwrap()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots);
        let config = match client {
            None => config.with_no_client_auth(),
            Some(Certificate { cert, key }) => {
                let chain = vec![CertificateDer::from_pem_file(cert).unwrap()];
                let key = PrivateKeyDer::from_pem_file(key).unwrap();
                config.with_client_auth_cert(chain, key).unwrap()
            }
        };
        let name = ServerName::try_from(host.to_owned()).unwrap();
        let connection = ClientConnection::new(Arc::new(config), name).map_err(io::Error::other)?;
        let stream = TcpStream::connect(consul.https_addr())?;
        stream.set_read_timeout(Some(Duration::from_secs(15)))?;
        Ok(StreamOwned::new(connection, stream))
    }

    /// Sends a request and waits for the first bytes of its answer.
    fn request(stream: &mut Stream) -> io::Result<String> {
        stream.write_all(b"GET /v1/status/leader HTTP/1.1\r\nHost: consul\r\n\r\n")?;
        let mut answer = [0; 12];
        stream.read_exact(&mut answer)?;
        Ok(String::from_utf8_lossy(&answer).into_owned())
    }

    /// What comes of one request; an error as its text.
    fn ask(
        consul: &Consul,
        host: &str,
        ca: &Authority,
        client: Option<&Certificate>,
    ) -> Result<(), String> {
        let mut stream = connect(consul, host, ca, client).map_err(|e| e.to_string())?;
        let answer = request(&mut stream).map_err(|e| e.to_string())?;
        assert_eq!(answer, "HTTP/1.1 200");
        Ok(())
    }

    /// What the server says of a certificate differs from version to version, and is lost where
    /// the request meets an end that is closed already.
    #[track_caller]
    fn is_shut_out(asked: Result<(), String>) {
        asked.expect_err("a refusal");
    }

    #[track_caller]
    fn refuses(asked: Result<(), String>, why: &str) {
        let error = asked.expect_err("a refusal");
        assert!(error.contains(why), "{error}");
    }

    #[test]
    fn https_is_good_for_its_address_and_its_authority() {
        let (net, dir) = (Net::isolated(), Dir::new("consul_tls"));
        let (ca, other) = (Authority::new(&dir, "ca"), Authority::new(&dir, "other"));
        let consul = Consul::builder(&net, &dir).tls(&ca, false).host(&net, 11).start();
        let addr = consul.https_addr();
        assert_eq!(consul.https_url(), format!("https://{addr}"));
        let ip = addr.ip().to_string();
        ask(&consul, &ip, &ca, None).unwrap();
        ask(&consul, "localhost", &ca, None).unwrap();
        refuses(ask(&consul, &ip, &other, None), "UnknownIssuer");
        refuses(ask(&consul, "consul.test", &ca, None), "not valid for name");
        // HTTP goes on beside it.
        consul.register(&Service::new("web", "web-1", (net.ip(20), 80).into()));
    }

    #[test]
    fn only_who_is_known_comes_in() {
        let (net, dir) = (Net::isolated(), Dir::new("consul_tls_client"));
        let (ca, other) = (Authority::new(&dir, "ca"), Authority::new(&dir, "other"));
        let consul = Consul::builder(&net, &dir).persistent().tls(&ca, true).start();
        let ask =
            |client: Option<&Certificate>| super::tests::ask(&consul, "localhost", &ca, client);
        let client = ca.request("client").issue();
        let foreign = other.request("client").issue();
        ask(Some(&client)).unwrap();
        is_shut_out(ask(None));
        is_shut_out(ask(Some(&foreign)));
        is_shut_out(ask(Some(&ca.request("old").expired().issue())));

        consul.trust(&[&other]);
        ask(Some(&foreign)).unwrap();
        is_shut_out(ask(Some(&client)));
        consul.trust(&[&ca, &other]);
        ask(Some(&foreign)).unwrap();
        ask(Some(&client)).unwrap();
    }

    #[test]
    fn certificates_rotate() {
        let (net, dir) = (Net::isolated(), Dir::new("consul_tls_rotation"));
        let (ca, next) = (Authority::new(&dir, "ca"), Authority::new(&dir, "next"));
        let mut consul = Consul::builder(&net, &dir).persistent().tls(&ca, false).start();
        consul.register(&Service::new("web", "web-1", (net.ip(20), 80).into()));
        let index = consul.index("web");
        let mut kept = connect(&consul, "localhost", &ca, None).unwrap();
        request(&mut kept).unwrap();

        consul.install(&ca.request("moved").hosts(&["consul.test"]).issue());
        ask(&consul, "consul.test", &ca, None).unwrap();
        refuses(ask(&consul, "localhost", &ca, None), "not valid for name");
        consul.install(&ca.request("expired").hosts(&["consul.test"]).expired().issue());
        refuses(ask(&consul, "consul.test", &ca, None), "expired");
        consul.install(&next.request("new").hosts(&["consul.test"]).issue());
        refuses(ask(&consul, "consul.test", &ca, None), "UnknownIssuer");
        ask(&consul, "consul.test", &next, None).unwrap();

        let mut rest = vec![0; 4096];
        let _ = kept.read(&mut rest).unwrap();
        assert_eq!(request(&mut kept).unwrap(), "HTTP/1.1 200", "a connection from before");
        assert_eq!(consul.index("web"), index, "services stay as they are");
        consul.restart();
        ask(&consul, "consul.test", &next, None).unwrap();
    }
}
