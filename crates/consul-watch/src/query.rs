//! What is asked: a service's health, in one datacenter.

use thiserror::Error;

/// A query of Consul's health API. Two equal ones to the same agent can share a watch.
///
/// It asks for all instances, whatever their health and tags: Consul wakes a blocking query for
/// the same changes either way, and only so can it be said why an instance does not serve.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Query {
    service: String,
    datacenter: Option<String>,
}

/// Why a text cannot stand in a query.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum QueryError {
    /// No text at all.
    #[error("is empty")]
    Empty,
    /// `.` and `..` have a meaning of their own in a URL's path.
    #[error("cannot be asked for")]
    Dots,
    /// Tabs, newlines and the like, which no name in Consul has.
    #[error("holds a control character")]
    Control,
    /// nginx's own parser passes any byte.
    #[error("is not valid UTF-8")]
    Encoding,
}

impl Query {
    /// A query for `service`, in the agent's own datacenter or in another one.
    pub fn new(service: &str, datacenter: Option<&str>) -> Result<Self, QueryError> {
        if matches!(service, "." | "..") {
            return Err(QueryError::Dots);
        }
        Ok(Self {
            service: text(service.as_bytes())?.to_owned(),
            datacenter: datacenter.map(|dc| text(dc.as_bytes())).transpose()?.map(str::to_owned),
        })
    }

    /// The service's name.
    pub fn service(&self) -> &str {
        &self.service
    }

    /// The datacenter, where it is not the agent's own.
    pub fn datacenter(&self) -> Option<&str> {
        self.datacenter.as_deref()
    }
}

/// Checks a name or tag: UTF-8, not empty, no control characters.
pub fn text(bytes: &[u8]) -> Result<&str, QueryError> {
    let text = std::str::from_utf8(bytes).map_err(|_| QueryError::Encoding)?;
    if text.is_empty() {
        return Err(QueryError::Empty);
    }
    if text.chars().any(char::is_control) {
        return Err(QueryError::Control);
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        assert_eq!(Query::new("my web", None).unwrap().service(), "my web");
        assert_eq!(Query::new("wéb", Some("dc2")).unwrap().datacenter(), Some("dc2"));
        assert_eq!(Query::new("", None), Err(QueryError::Empty));
        assert_eq!(Query::new("web", Some("")), Err(QueryError::Empty));
        assert_eq!(Query::new("..", None), Err(QueryError::Dots));
        assert_eq!(Query::new("a\nb", None), Err(QueryError::Control));
        assert_eq!(text(b"\xff"), Err(QueryError::Encoding));
    }
}
