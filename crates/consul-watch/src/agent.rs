//! How Consul is reached: addresses, credentials and limits.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use reqwest::Url;
use thiserror::Error;

use crate::file::Loaded;
use crate::tls::Tls;

/// The agents of one datacenter, and the settings of all requests to them.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Agents {
    /// Where they listen, in the order in which they are tried.
    pub addresses: Vec<Address>,
    /// The ACL token, sent as `X-Consul-Token`.
    pub token: Option<Token>,
    /// How those with an `https://` address are verified.
    pub tls: Tls,
    /// How fresh the answers are that are waited for.
    pub consistency: Consistency,
    /// How long an agent may hold a blocking query without a change.
    pub wait: Duration,
    /// The bound on connecting, and on the whole of an answer that is not waited for.
    pub timeout: Duration,
    /// The largest body that is read, in bytes.
    pub max_response: usize,
}

impl Agents {
    /// One agent, with Consul's and nginx's usual settings: a wait of 25 s, a timeout of 5 s and
    /// answers of up to 64 MiB.
    pub fn at(address: Address) -> Self {
        Self {
            addresses: vec![address],
            token: None,
            tls: Tls::default(),
            consistency: Consistency::Default,
            wait: Duration::from_secs(25),
            timeout: Duration::from_secs(5),
            max_response: 64 << 20,
        }
    }
}

/// Consul's consistency modes, for the queries that wait. Those that do not are consistent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Consistency {
    /// The leader answers, and may be wrong for a moment if it is no longer the leader.
    #[default]
    Default,
    /// Any server answers, also without a leader.
    Stale,
    /// The leader asks the other servers whether it is still the leader.
    Consistent,
}

/// The base of an agent's HTTP API.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Address(Kind);

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Kind {
    Url(Url),
    Socket(PathBuf),
}

/// Why a text is no agent's address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum AddressError {
    /// Nothing in front that says how to connect.
    #[error("has no scheme, it must begin with \"http://\", \"https://\" or \"unix:/\"")]
    NoScheme,
    /// Another scheme.
    #[error(
        "has a scheme that is not supported, it must begin with \"http://\", \"https://\" or \
         \"unix:/\""
    )]
    Scheme,
    /// Not a URL, or one without a host.
    #[error("is not a valid URL")]
    Url,
    /// Something after the host and port.
    #[error("must not have a path, a query or a fragment")]
    Path,
    /// A user name or password: tokens have their own directives, and a URL ends up in logs.
    #[error("must not hold credentials")]
    Credentials,
    /// A Unix socket's path that does not begin at the root, or is longer than the kernel takes.
    #[error("must have an absolute path of at most 107 bytes after \"unix:\"")]
    Socket,
}

/// `sun_path` of unix(7), without the final zero.
const SOCKET_PATH: usize = 107;

impl Address {
    /// Reads a base URL such as `http://127.0.0.1:8500`, or `unix:/run/consul.sock`. Without a
    /// port that of the scheme is meant, as in any URL.
    pub fn parse(text: &str) -> Result<Self, AddressError> {
        if let Some(path) = text.strip_prefix("unix:") {
            let path = path.strip_prefix("//").unwrap_or(path);
            if !path.starts_with('/') || path.len() > SOCKET_PATH || path.contains('\0') {
                return Err(AddressError::Socket);
            }
            return Ok(Self(Kind::Socket(path.into())));
        }
        match text.split_once("://") {
            None => return Err(AddressError::NoScheme),
            Some((scheme, _))
                if !["http", "https"].iter().any(|known| scheme.eq_ignore_ascii_case(known)) =>
            {
                return Err(AddressError::Scheme);
            }
            Some(_) => (),
        }
        let url = Url::parse(text).map_err(|_| AddressError::Url)?;
        if !url.username().is_empty() || url.password().is_some() {
            return Err(AddressError::Credentials);
        }
        if url.path() != "/" || url.query().is_some() || url.fragment().is_some() {
            return Err(AddressError::Path);
        }
        Ok(Self(Kind::Url(url)))
    }

    /// Whether connections to it are encrypted.
    pub fn is_tls(&self) -> bool {
        matches!(&self.0, Kind::Url(url) if url.scheme() == "https")
    }

    /// The base of the URLs to ask for. A Unix socket has no host; Consul wants one all the same.
    pub(crate) fn url(&self) -> Url {
        match &self.0 {
            Kind::Url(url) => url.clone(),
            Kind::Socket(_) => Url::parse("http://localhost").expect("a literal that is a URL"),
        }
    }

    /// The path of the Unix socket, where it is one.
    pub(crate) fn socket(&self) -> Option<&Path> {
        match &self.0 {
            Kind::Url(_) => None,
            Kind::Socket(path) => Some(path),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Kind::Url(url) => f.write_str(url.as_str().trim_end_matches('/')),
            Kind::Socket(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// Where the ACL token comes from.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Token {
    /// It is given.
    Fixed(Secret),
    /// It stands in a file, which is read again when it changes.
    File(Loaded),
}

/// An ACL token. It is never printed: not by `Debug`, and nothing here puts it into a text.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Secret(Arc<str>);

/// Why a text is no token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum TokenError {
    /// Nothing but white space.
    #[error("is empty")]
    Empty,
    /// A character that cannot stand in an HTTP header.
    #[error("holds a character that is not printable ASCII")]
    Character,
}

impl Token {
    /// The token, as it is known now.
    pub fn secret(&self) -> Result<Secret, TokenError> {
        match self {
            Self::Fixed(secret) => Ok(secret.clone()),
            Self::File(file) => Secret::new(file.content()),
        }
    }
}

impl Secret {
    /// Takes a token, without the white space around it (files end in a newline).
    pub fn new(text: &[u8]) -> Result<Self, TokenError> {
        let text = text.trim_ascii();
        if text.is_empty() {
            return Err(TokenError::Empty);
        }
        match std::str::from_utf8(text) {
            Ok(text) if text.bytes().all(|b| b.is_ascii_graphic()) => Ok(Self(text.into())),
            _ => Err(TokenError::Character),
        }
    }

    /// The token itself, for a header and nothing else.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        let ok = |t| Address::parse(t).unwrap().to_string();
        assert_eq!(ok("http://127.0.0.1:8500"), "http://127.0.0.1:8500");
        assert_eq!(ok("HTTP://consul.example:8500/"), "http://consul.example:8500");
        assert_eq!(ok("http://[::1]:8500"), "http://[::1]:8500");
        assert_eq!(ok("https://127.0.0.1:8501"), "https://127.0.0.1:8501");
        assert_eq!(ok("unix:/run/consul.sock"), "unix:/run/consul.sock");
        assert_eq!(ok("unix:///run/consul.sock"), "unix:/run/consul.sock");

        let err = |t| Address::parse(t).unwrap_err();
        assert_eq!(err("127.0.0.1:8500"), AddressError::NoScheme);
        assert_eq!(err("localhost:8500"), AddressError::NoScheme);
        assert_eq!(err(""), AddressError::NoScheme);
        assert_eq!(err("ftp://127.0.0.1:8501"), AddressError::Scheme);
        assert_eq!(err("http://"), AddressError::Url);
        assert_eq!(err("http://127.0.0.1:85000"), AddressError::Url);
        assert_eq!(err("http://a/v1"), AddressError::Path);
        assert_eq!(err("http://a/?x"), AddressError::Path);
        assert_eq!(err("https://u:p@a/"), AddressError::Credentials);
        assert_eq!(err("unix:"), AddressError::Socket);
        assert_eq!(err("unix:consul.sock"), AddressError::Socket);
        assert_eq!(err(&format!("unix:/{}", "x".repeat(107))), AddressError::Socket);
    }

    #[test]
    fn tokens_are_not_printed() {
        let token = Secret::new(b"secret\n").unwrap();
        assert_eq!(token.as_str(), "secret");
        assert!(!format!("{:?}", Token::Fixed(token)).contains("secret"));
        assert_eq!(Secret::new(b" \n"), Err(TokenError::Empty));
        assert_eq!(Secret::new(b"a\r\nb"), Err(TokenError::Character));
        assert_eq!(Secret::new("ü".as_bytes()), Err(TokenError::Character));
    }
}
