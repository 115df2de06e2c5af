//! Certificates, by authorities that only the test itself knows.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, date_time_ymd,
};

use crate::Dir;

/// Makes certificates. Clones are the same authority.
#[derive(Clone)]
pub struct Authority(Arc<Inner>);

struct Inner {
    name: String,
    issuer: Issuer<'static, KeyPair>,
    ca: PathBuf,
    dir: Dir,
}

/// The files of a certificate and its key, both PEM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Certificate {
    pub cert: PathBuf,
    pub key: PathBuf,
}

/// A certificate that is not made yet.
pub struct Request<'a> {
    authority: &'a Authority,
    name: String,
    params: CertificateParams,
}

impl Authority {
    /// A new authority. What it makes lies in a directory of its name in that of the test.
    pub fn new(dir: &Dir, name: &str) -> Authority {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.distinguished_name.push(DnType::CommonName, name);
        let key = KeyPair::generate().expect("make a key");
        let cert = params.self_signed(&key).expect("make the certificate of an authority");
        let ca = dir.write(Path::new(name).join("ca.pem"), cert.pem());
        let issuer = Issuer::new(params, key);
        Authority(Arc::new(Inner { name: name.into(), issuer, ca, dir: dir.clone() }))
    }

    /// What those have to know who trust it.
    pub fn ca(&self) -> PathBuf {
        self.0.ca.clone()
    }

    /// A certificate that is to be called so, in the directory as well as in itself.
    pub fn request(&self, name: &str) -> Request<'_> {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        // For both sides, as agents need it, which are clients of each other.
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        Request { authority: self, name: name.into(), params }
    }
}

impl Request<'_> {
    /// The hosts for which it is good: names and addresses.
    #[must_use]
    pub fn hosts(mut self, hosts: &[&str]) -> Self {
        let hosts: Vec<String> = hosts.iter().map(|&host| host.into()).collect();
        self.params.subject_alt_names =
            CertificateParams::new(hosts).expect("names of hosts").subject_alt_names;
        self
    }

    /// It was good once.
    #[must_use]
    pub fn expired(mut self) -> Self {
        self.params.not_before = date_time_ymd(2001, 1, 1);
        self.params.not_after = date_time_ymd(2002, 1, 1);
        self
    }

    /// Makes it, with a key of its own. The files of an earlier one of this name are replaced.
    pub fn issue(self) -> Certificate {
        let Inner { name, issuer, dir, .. } = &*self.authority.0;
        let key = KeyPair::generate().expect("make a key");
        let cert = self.params.signed_by(&key, issuer).expect("make a certificate");
        let path = |suffix| dir.join(name).join(format!("{}{suffix}.pem", self.name));
        let files = Certificate { cert: path(""), key: path("-key") };
        replace(&files.cert, cert.pem());
        replace(&files.key, key.serialize_pem());
        files
    }
}

impl Certificate {
    /// Puts a copy of this one into the files of another, as somebody who rotates certificates.
    pub fn replace(&self, other: &Certificate) {
        copy(&self.cert, &other.cert);
        copy(&self.key, &other.key);
    }
}

/// Puts a copy of a file in the place of another.
pub fn copy(from: &Path, to: &Path) {
    let text = fs::read(from).unwrap_or_else(|e| panic!("read {}: {e}", from.display()));
    replace(to, text);
}

/// Whoever reads the file meanwhile sees all of the old text or all of the new one.
pub fn replace(path: &Path, text: impl AsRef<[u8]>) {
    let new = path.with_extension("new");
    fs::write(&new, text)
        .and_then(|()| fs::rename(&new, path))
        .unwrap_or_else(|e| panic!("write {}: {e}", path.display()));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_certificate_has_a_key_of_its_own() {
        let dir = Dir::new("tls_files");
        let authority = Authority::new(&dir, "ca");
        let one = authority.request("one").hosts(&["localhost", "127.0.0.1", "::1"]).issue();
        let two = authority.request("two").issue();
        let text = |path: &Path| fs::read_to_string(path).unwrap();
        assert!(text(&one.cert).starts_with("-----BEGIN CERTIFICATE-----"));
        assert!(text(&one.key).starts_with("-----BEGIN PRIVATE KEY-----"));
        assert_ne!(text(&one.key), text(&two.key));

        two.replace(&one);
        assert_eq!((text(&one.cert), text(&one.key)), (text(&two.cert), text(&two.key)));
        let again = authority.request("two").issue();
        assert_eq!(again, two);
        assert_ne!(text(&one.cert), text(&two.cert));
    }
}
