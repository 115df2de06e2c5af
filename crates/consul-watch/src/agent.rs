//! How one Consul agent is reached: address, token and limits.

use std::fmt;
use std::time::Duration;

use reqwest::Url;
use thiserror::Error;

/// An agent and the settings of all requests to it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Agent {
    /// Where the agent's HTTP API listens.
    pub address: Address,
    /// The ACL token, sent as `X-Consul-Token`.
    pub token: Option<Token>,
    /// How long the agent may hold a blocking query without a change.
    pub wait: Duration,
    /// The bound on connecting, and on the whole of an answer that is not waited for.
    pub timeout: Duration,
    /// The largest body that is read, in bytes.
    pub max_response: usize,
}

/// The base URL of an agent's HTTP API.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Address(Url);

/// Why a text is no agent's address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum AddressError {
    /// No `http://` in front.
    #[error("has no scheme, it must begin with \"http://\"")]
    NoScheme,
    /// A scheme that this version does not speak.
    #[error("has a scheme that is not supported, it must begin with \"http://\"")]
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
}

impl Address {
    /// Reads a base URL such as `http://127.0.0.1:8500`. Without a port, 80 is meant, as in any
    /// `http` URL.
    pub fn parse(text: &str) -> Result<Self, AddressError> {
        match text.split_once("://") {
            None => return Err(AddressError::NoScheme),
            Some((scheme, _)) if !scheme.eq_ignore_ascii_case("http") => {
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
        Ok(Self(url))
    }

    /// The URL of an API path, given as its segments; each is percent-encoded.
    pub(crate) fn join<'a>(&self, segments: impl IntoIterator<Item = &'a str>) -> Url {
        let mut url = self.0.clone();
        if let Ok(mut path) = url.path_segments_mut() {
            path.clear().extend(segments);
        }
        url
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.as_str().trim_end_matches('/'))
    }
}

/// An ACL token. It is never printed: not by `Debug`, and nothing here puts it into a text.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Token(String);

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
    /// Takes a token, without the white space around it (files end in a newline).
    pub fn new(text: &str) -> Result<Self, TokenError> {
        let text = text.trim();
        if text.is_empty() {
            return Err(TokenError::Empty);
        }
        if !text.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(TokenError::Character);
        }
        Ok(Self(text.to_owned()))
    }

    pub(crate) fn secret(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(…)")
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

        let err = |t| Address::parse(t).unwrap_err();
        assert_eq!(err("127.0.0.1:8500"), AddressError::NoScheme);
        assert_eq!(err("localhost:8500"), AddressError::NoScheme);
        assert_eq!(err(""), AddressError::NoScheme);
        assert_eq!(err("https://127.0.0.1:8501"), AddressError::Scheme);
        assert_eq!(err("http://"), AddressError::Url);
        assert_eq!(err("http://127.0.0.1:85000"), AddressError::Url);
        assert_eq!(err("http://a/v1"), AddressError::Path);
        assert_eq!(err("http://a/?x"), AddressError::Path);
        assert_eq!(err("http://u:p@a/"), AddressError::Credentials);
    }

    #[test]
    fn path_segments_are_encoded() {
        let address = Address::parse("http://a:1").unwrap();
        assert_eq!(
            address.join(["v1", "health", "service", "a b/ü?#"]).as_str(),
            "http://a:1/v1/health/service/a%20b%2F%C3%BC%3F%23"
        );
    }

    #[test]
    fn tokens_are_not_printed() {
        let token = Token::new("secret\n").unwrap();
        assert_eq!(token.secret(), "secret");
        assert!(!format!("{token:?}").contains("secret"));
        assert_eq!(Token::new(" \n"), Err(TokenError::Empty));
        assert_eq!(Token::new("a\r\nb"), Err(TokenError::Character));
    }
}
