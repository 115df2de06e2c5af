//! What can go wrong between a query and a verified answer, and whether to ask again.

use std::fmt;

use reqwest::StatusCode;
use thiserror::Error;

use crate::tls::last_cause;

/// Why a query had no usable answer. The texts never hold a token, nor a byte of an answer that
/// could not stand in a log line.
#[derive(Debug, Error)]
pub enum Error {
    /// The agent was not reached, or the connection broke.
    #[error("{0}")]
    Transport(String),
    /// The answer, or a part of it, did not come in time.
    #[error("no answer in time")]
    Timeout,
    /// 403: the token is unknown, or lacks a right.
    #[error("permission denied (403), check the token and its rights")]
    Denied,
    /// The token lacks a right that the answer depends on; which one.
    #[error("permission denied: {0}")]
    Rights(String),
    /// The agent does not know a parameter of the query, and would ignore it.
    #[error("\"{parameter}\" needs {needed}, and the agent is {version}")]
    Unsupported {
        /// The parameter.
        parameter: &'static str,
        /// What would know it.
        needed: &'static str,
        /// The agent's version.
        version: String,
    },
    /// The agent is in another datacenter than the first one of the same list.
    #[error(
        "the agent is in datacenter \"{is}\" and the one before it in \"{home}\", it is not used"
    )]
    Datacenter {
        /// Its own.
        is: String,
        /// The first one's.
        home: String,
    },
    /// Which of several agents it was.
    #[error("{address}: {error}")]
    At {
        /// Its address.
        address: String,
        /// What went wrong.
        error: Box<Error>,
    },
    /// The settings are of no use, which shows only now.
    #[error("{0}")]
    Settings(String),
    /// Any other status than 200, with the begin of Consul's text.
    #[error("status {}{}", .status.as_u16(), Explained(.text))]
    Status {
        /// The status.
        status: StatusCode,
        /// What Consul said, printable and cut.
        text: String,
    },
    /// The body is larger than the settings allow.
    #[error("the answer is larger than {limit} bytes, see \"consul_max_response\"")]
    TooLarge {
        /// The limit, in bytes.
        limit: usize,
    },
    /// `X-Consul-Index` is missing or no number: this is not Consul's health API.
    #[error("the answer has no valid X-Consul-Index, is this a Consul agent?")]
    Index,
    /// The body is not what the health API answers.
    #[error("invalid answer: {0}")]
    Invalid(String),
    /// Most entries are of no use, and fewer instances would be left: something writes nonsense.
    #[error(
        "{unusable} of {all} instances have no valid address and port, and fewer would be left"
    )]
    Unusable {
        /// Without a valid address and port.
        unusable: usize,
        /// In the answer.
        all: usize,
    },
    /// More instances than an upstream may have.
    #[error("the answer has more than {limit} instances")]
    TooMany {
        /// The limit.
        limit: usize,
    },
}

struct Explained<'a>(&'a str);

impl fmt::Display for Explained<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() { Ok(()) } else { write!(f, ": {}", self.0) }
    }
}

/// The kinds of errors that are told apart in logs and counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Cause {
    /// Refused, reset, timed out.
    Transport,
    /// A status other than 200 and 403.
    Status,
    /// 403, or a right that is missing.
    Denied,
    /// JSON, index, bounds, and agents that cannot answer the query.
    Invalid,
}

/// When to ask again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retry {
    /// Soon, backing off: the trouble passes by itself.
    BackOff,
    /// In 30 to 60 seconds: somebody has to change a setting first.
    Slowly,
}

impl Error {
    /// JSON of another shape. What serde quotes of it stays out of the text: who shows in an answer
    /// what it was asked shows the token.
    pub(crate) fn json(err: &serde_json::Error) -> Self {
        let text = err.to_string();
        let text = match (text.find('"'), text.rfind('"')) {
            (Some(begin), Some(end)) if begin < end => {
                format!("{}...{}", &text[..=begin], &text[end..])
            }
            _ => text,
        };
        Self::Invalid(printable(text.as_bytes(), 200))
    }

    /// The error's kind.
    pub fn cause(&self) -> Cause {
        match self {
            Self::At { error, .. } => error.cause(),
            Self::Transport(_) | Self::Timeout => Cause::Transport,
            Self::Denied | Self::Rights(_) => Cause::Denied,
            Self::Status { .. } => Cause::Status,
            Self::TooLarge { .. }
            | Self::Unsupported { .. }
            | Self::Datacenter { .. }
            | Self::Settings(_)
            | Self::Index
            | Self::Invalid(_)
            | Self::Unusable { .. }
            | Self::TooMany { .. } => Cause::Invalid,
        }
    }

    /// When to ask again.
    pub fn retry(&self) -> Retry {
        match self {
            Self::At { error, .. } => error.retry(),
            Self::Denied | Self::Unsupported { .. } | Self::Settings(_) => Retry::Slowly,
            Self::Status { status, .. } if *status == StatusCode::TOO_MANY_REQUESTS => {
                Retry::BackOff
            }
            Self::Status { status, .. } if status.is_client_error() => Retry::Slowly,
            Self::Status { text, .. } if text.contains("No path to datacenter") => Retry::Slowly,
            _ => Retry::BackOff,
        }
    }

    /// Whether it is the agent's fault, and another one may do better.
    pub(crate) fn is_agents(&self) -> bool {
        match self {
            Self::Transport(_) | Self::Timeout | Self::Index | Self::Datacenter { .. } => true,
            Self::Status { status, .. } => {
                status.is_server_error() && self.retry() == Retry::BackOff
            }
            _ => false,
        }
    }
}

impl From<reqwest::Error> for Error {
    fn from(err: reqwest::Error) -> Self {
        if err.is_timeout() {
            return Self::Timeout;
        }
        Self::Transport(last_cause(&err))
    }
}

/// At most `limit` characters of a text, with everything that does not belong into a log line
/// escaped.
pub fn printable(bytes: &[u8], limit: usize) -> String {
    let text = String::from_utf8_lossy(bytes);
    let mut out = String::new();
    for (n, c) in text.trim().chars().enumerate() {
        if n == limit {
            out.push_str("...");
            break;
        }
        match c {
            ' '..='~' => out.push(c),
            _ => out.extend(c.escape_default()),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(code: u16, text: &str) -> Error {
        Error::Status { status: StatusCode::from_u16(code).unwrap(), text: text.into() }
    }

    #[test]
    fn who_has_to_act_decides_when_to_ask_again() {
        assert_eq!(Error::Denied.retry(), Retry::Slowly);
        assert_eq!(status(400, "").retry(), Retry::Slowly);
        assert_eq!(status(404, "").retry(), Retry::Slowly);
        assert_eq!(status(500, "No path to datacenter").retry(), Retry::Slowly);
        assert_eq!(status(500, "No cluster leader").retry(), Retry::BackOff);
        assert_eq!(status(429, "").retry(), Retry::BackOff);
        assert_eq!(status(503, "").retry(), Retry::BackOff);
        assert_eq!(Error::Timeout.retry(), Retry::BackOff);
    }

    #[test]
    fn texts() {
        assert_eq!(status(500, "oh no").to_string(), "status 500: oh no");
        assert_eq!(status(404, "").to_string(), "status 404");
        assert_eq!(printable(b" a\r\nb\x00\xff ", 99), "a\\r\\nb\\u{0}\\u{fffd}");
        assert_eq!(printable(b"abcdef", 3), "abc...");
    }

    #[test]
    fn json_is_not_quoted() {
        for (json, says) in [
            (r#""a \"secret\"""#, "invalid type: string \"...\", expected u8 at line 1 column 14"),
            ("1000", "invalid value: integer `1000`, expected u8 at line 1 column 4"),
            ("[", "invalid type: sequence, expected u8 at line 1 column 0"),
        ] {
            let error = Error::json(&serde_json::from_str::<u8>(json).unwrap_err());
            assert_eq!(error.to_string(), format!("invalid answer: {says}"));
        }
    }
}
