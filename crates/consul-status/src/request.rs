//! What a request asks for, or why it gets nothing.

mod accept;
mod args;

use thiserror::Error;

use crate::escape::Json;
use crate::out::Out;
use crate::text::Text;

/// A request for the status, as far as it matters.
#[derive(Clone, Copy, Debug, Default)]
pub struct Parts<'a> {
    /// `GET`, or another method.
    pub method: &'a [u8],
    /// The path behind the location's prefix (see [`rest`]), decoded once, as nginx's `$uri` is.
    pub path: &'a [u8],
    /// What stands behind the question mark, not decoded.
    pub args: &'a [u8],
    /// The header `Accept`; several are joined by commas.
    pub accept: &'a [u8],
}

/// What is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// In which format.
    pub format: Format,
    /// The format was named by the argument.
    pub explicit: bool,
    /// This upstream alone, by its name; both of this name, if http and stream have one.
    pub upstream: Option<Vec<u8>>,
    /// Which peers Prometheus gets.
    pub peers: Peers,
    /// What is looked for; empty is everything. At most [`QUERY`] bytes.
    pub query: Vec<u8>,
    /// The page refreshes itself.
    pub refresh: bool,
    /// Only the headers are asked for.
    pub head: bool,
}

/// A longer `q` is cut.
pub const QUERY: usize = 128;

/// The three formats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// The document.
    Json,
    /// The page.
    Html,
    /// Text format 0.0.4.
    Prometheus,
}

/// Which peers Prometheus gets: each has 17 series.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peers {
    /// 500 at most, whole upstreams.
    Bounded,
    /// None.
    None,
    /// All, of one upstream.
    All,
}

/// Why a request gets nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum Error {
    /// 400
    #[error("invalid value of \"format\": it must be \"json\", \"html\" or \"prometheus\"")]
    Format,
    /// 400
    #[error("invalid value of \"peers\": it must be \"all\" or \"none\"")]
    Peers,
    /// 400
    #[error("\"peers=all\" is for one upstream: ask for /upstreams/NAME")]
    AllPeers,
    /// 400
    #[error("invalid value of \"refresh\": it must be \"on\" or \"off\"")]
    Refresh,
    /// 404
    #[error("no such path: there are / and /upstreams/NAME")]
    Path,
    /// 404
    #[error("no such upstream")]
    Upstream,
    /// 405
    #[error("the status can only be read: GET or HEAD")]
    Method,
    /// 503
    #[error("too many large answers at a time")]
    Busy,
}

impl Error {
    /// The status of the response.
    pub fn status(self) -> u16 {
        match self {
            Self::Format | Self::Peers | Self::AllPeers | Self::Refresh => 400,
            Self::Path | Self::Upstream => 404,
            Self::Method => 405,
            Self::Busy => 503,
        }
    }

    /// A header that belongs to this error, beside those of JSON.
    pub fn header(self) -> Option<(&'static str, &'static str)> {
        match self {
            Self::Method => Some(("Allow", "GET, HEAD")),
            Self::Busy => Some(("Retry-After", "5")),
            _ => None,
        }
    }

    /// The body of the response: JSON, whatever format was asked for.
    pub fn body(self) -> Vec<u8> {
        let mut body = Vec::new();
        Out::<Json>::new(&mut body)
            .raw("{\"error\":{\"status\":")
            .number(self.status())
            .raw(",\"text\":\"")
            .text(&Text::<256>::from(self.to_string()))
            .raw("\"}}\n");
        body
    }
}

impl Request {
    /// Reads a request.
    pub fn parse(parts: &Parts<'_>) -> Result<Self, Error> {
        let head = match parts.method {
            b"GET" => false,
            b"HEAD" => true,
            _ => return Err(Error::Method),
        };
        let upstream = match parts.path {
            b"" | b"/" => None,
            path => match path.strip_prefix(b"/upstreams/") {
                None => return Err(Error::Path),
                Some(b"") => return Err(Error::Upstream),
                Some(name) => Some(name.to_vec()),
            },
        };
        let named = match args::find(parts.args, "format").as_deref() {
            None => None,
            Some(b"json") => Some(Format::Json),
            Some(b"html") => Some(Format::Html),
            Some(b"prometheus") => Some(Format::Prometheus),
            Some(_) => return Err(Error::Format),
        };
        let peers = match args::find(parts.args, "peers").as_deref() {
            None => Peers::Bounded,
            Some(b"none") => Peers::None,
            Some(b"all") if upstream.is_none() => return Err(Error::AllPeers),
            Some(b"all") => Peers::All,
            Some(_) => return Err(Error::Peers),
        };
        let refresh = match args::find(parts.args, "refresh").as_deref() {
            None | Some(b"on") => true,
            Some(b"off") => false,
            Some(_) => return Err(Error::Refresh),
        };
        let mut query = args::find(parts.args, "q").unwrap_or_default();
        args::cut(&mut query, QUERY);
        Ok(Self {
            format: named.unwrap_or_else(|| accept::negotiate(parts.accept)),
            explicit: named.is_some(),
            upstream,
            peers,
            query,
            refresh,
            head,
        })
    }
}

/// The path behind a location's prefix, whether that ends in a slash or not.
pub fn rest<'a>(uri: &'a [u8], prefix: &[u8]) -> &'a [u8] {
    let prefix = prefix.strip_suffix(b"/").unwrap_or(prefix);
    uri.strip_prefix(prefix).unwrap_or(uri)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn get<'a>(path: &'a str, args: &'a str, accept: &'a str) -> Parts<'a> {
        Parts {
            method: b"GET",
            path: path.as_bytes(),
            args: args.as_bytes(),
            accept: accept.as_bytes(),
        }
    }

    #[test]
    fn paths() {
        let table: [(&str, Result<Option<&str>, Error>); 12] = [
            ("", Ok(None)),
            ("/", Ok(None)),
            ("/upstreams/app", Ok(Some("app"))),
            ("/upstreams/a/b c", Ok(Some("a/b c"))),
            ("/upstreams//", Ok(Some("/"))),
            // nginx has decoded it: it is not decoded twice.
            ("/upstreams/a%2Fb", Ok(Some("a%2Fb"))),
            ("/upstreams/", Err(Error::Upstream)),
            ("/upstreams", Err(Error::Path)),
            ("/upstream/app", Err(Error::Path)),
            ("foo", Err(Error::Path)),
            ("/foo", Err(Error::Path)),
            ("//", Err(Error::Path)),
        ];
        for (path, expected) in table {
            let seen = Request::parse(&get(path, "", "")).map(|request| request.upstream);
            assert_eq!(seen, expected.map(|name| name.map(|name| name.into())), "{path}");
        }
    }

    #[test]
    fn prefixes() {
        let table = [
            ("/consul", "/consul", ""),
            ("/consul/", "/consul", "/"),
            ("/consul/", "/consul/", "/"),
            ("/consul/upstreams/a", "/consul", "/upstreams/a"),
            ("/consul/upstreams/a", "/consul/", "/upstreams/a"),
            ("/consulate", "/consul", "ate"),
            ("/", "/", "/"),
            ("/upstreams/a", "/", "/upstreams/a"),
        ];
        for (uri, prefix, expected) in table {
            assert_eq!(rest(uri.as_bytes(), prefix.as_bytes()), expected.as_bytes(), "{uri}");
        }
    }

    #[test]
    fn methods() {
        let parse = |method| Request::parse(&Parts { method, ..get("/", "", "") });
        assert!(!parse(b"GET").unwrap().head);
        assert!(parse(b"HEAD").unwrap().head);
        for other in [&b"POST"[..], b"PUT", b"DELETE", b"OPTIONS", b"get", b""] {
            assert_eq!(parse(other), Err(Error::Method));
        }
    }

    #[test]
    fn arguments() {
        let parse = |path, args| Request::parse(&get(path, args, "text/html"));
        let formats = [
            ("", Ok((Format::Html, false))),
            ("format=json", Ok((Format::Json, true))),
            ("x=1&format=prometheus", Ok((Format::Prometheus, true))),
            ("format=html&format=json", Ok((Format::Html, true))),
            ("format=j%73on", Ok((Format::Json, true))),
            ("format=", Err(Error::Format)),
            ("format", Err(Error::Format)),
            ("format=JSON", Err(Error::Format)),
            ("format=xml", Err(Error::Format)),
            ("notformat=xml", Ok((Format::Html, false))),
        ];
        for (args, expected) in formats {
            let seen = parse("/", args).map(|request| (request.format, request.explicit));
            assert_eq!(seen, expected, "{args}");
        }

        let peers = [
            ("/", "", Ok(Peers::Bounded)),
            ("/", "peers=none", Ok(Peers::None)),
            ("/", "peers=all", Err(Error::AllPeers)),
            ("/upstreams/app", "peers=all", Ok(Peers::All)),
            ("/upstreams/app", "peers=none", Ok(Peers::None)),
            ("/upstreams/app", "peers=500", Err(Error::Peers)),
        ];
        for (path, args, expected) in peers {
            assert_eq!(parse(path, args).map(|request| request.peers), expected, "{path} {args}");
        }

        let refresh = [
            ("", Ok(true)),
            ("refresh=on", Ok(true)),
            ("refresh=off", Ok(false)),
            ("refresh=0", Err(Error::Refresh)),
        ];
        for (args, expected) in refresh {
            assert_eq!(parse("/", args).map(|request| request.refresh), expected, "{args}");
        }

        let long = format!("q={}", "ä".repeat(100));
        let queries = [
            ("", ""),
            ("q=", ""),
            ("q=web-1", "web-1"),
            ("q=a+b%20c%2B", "a b c+"),
            ("q=%", "%"),
            ("q=%zz%4", "%zz%4"),
            (&long, &*"ä".repeat(64)),
        ];
        for (args, expected) in queries {
            assert_eq!(parse("/", args).unwrap().query, expected.as_bytes(), "{args}");
        }
    }

    #[test]
    fn errors() {
        for (error, status) in [
            (Error::Format, 400),
            (Error::Peers, 400),
            (Error::AllPeers, 400),
            (Error::Refresh, 400),
            (Error::Path, 404),
            (Error::Upstream, 404),
            (Error::Method, 405),
            (Error::Busy, 503),
        ] {
            let body: serde_json::Value = serde_json::from_slice(&error.body()).unwrap();
            assert_eq!(error.status(), status);
            assert_eq!(body["error"]["status"], status);
            assert_eq!(body["error"]["text"], error.to_string());
        }
        assert_eq!(
            Error::Upstream.body(),
            b"{\"error\":{\"status\":404,\"text\":\"no such upstream\"}}\n"
        );
        assert_eq!(Error::Method.header(), Some(("Allow", "GET, HEAD")));
        assert_eq!(Error::Busy.header().map(|header| header.0), Some("Retry-After"));
        assert_eq!(Error::Path.header(), None);
    }
}
