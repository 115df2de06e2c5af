//! What is asked: a service's health, in one datacenter.

use std::collections::BTreeMap;
use std::fmt;

use thiserror::Error;

/// A query of Consul's health API. Two equal ones to the same agents can share a watch.
///
/// It asks for all instances, whatever their health and tags: Consul wakes a blocking query for
/// the same changes either way, and only so can it be said why an instance does not serve.
///
/// Its text (`Display`) is the same for equal queries, and another one for others.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Query {
    service: String,
    parameters: BTreeMap<Parameter, String>,
    /// Which of an instance's addresses is meant.
    pub network: Network,
}

/// What narrows a query, or sends it elsewhere. Consul's own words: see "Health HTTP Endpoint",
/// "List Service Instances for Service".
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Parameter {
    /// `dc`: another datacenter than the agent's.
    Datacenter,
    /// `ns`: a namespace of Consul Enterprise.
    Namespace,
    /// `partition`: an admin partition of Consul Enterprise.
    Partition,
    /// `peer`: a cluster peering, from Consul 1.13.
    Peer,
    /// `filter`: an expression that Consul evaluates.
    Filter,
}

impl Parameter {
    /// As it stands in a URL.
    pub fn name(self) -> &'static str {
        match self {
            Self::Datacenter => "dc",
            Self::Namespace => "ns",
            Self::Partition => "partition",
            Self::Peer => "peer",
            Self::Filter => "filter",
        }
    }
}

/// One of the networks that an instance may have an address in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Network {
    /// The datacenter's own.
    #[default]
    Lan,
    /// The one between datacenters: `TaggedAddresses.wan`, where a service has one.
    Wan,
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
    /// A query for `service`, in the agent's own datacenter.
    pub fn new(service: &str) -> Result<Self, QueryError> {
        if matches!(service, "." | "..") {
            return Err(QueryError::Dots);
        }
        Ok(Self {
            service: text(service.as_bytes())?.to_owned(),
            parameters: BTreeMap::new(),
            network: Network::default(),
        })
    }

    /// Sets a parameter.
    pub fn with(mut self, parameter: Parameter, value: &str) -> Result<Self, QueryError> {
        self.parameters.insert(parameter, text(value.as_bytes())?.to_owned());
        Ok(self)
    }

    /// The service's name.
    pub fn service(&self) -> &str {
        &self.service
    }

    /// A parameter, where it is set.
    pub fn get(&self, parameter: Parameter) -> Option<&str> {
        self.parameters.get(&parameter).map(String::as_str)
    }

    /// All parameters that are set.
    pub fn parameters(&self) -> impl Iterator<Item = (Parameter, &str)> {
        self.parameters.iter().map(|(parameter, value)| (*parameter, value.as_str()))
    }
}

impl fmt::Display for Query {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Quoted, so that no value reads as another parameter.
        write!(f, "{:?}", self.service)?;
        for (parameter, value) in self.parameters() {
            write!(f, " {}={value:?}", parameter.name())?;
        }
        match self.network {
            Network::Lan => Ok(()),
            Network::Wan => f.write_str(" address=wan"),
        }
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
        assert_eq!(Query::new("my web").unwrap().service(), "my web");
        let query = Query::new("wéb").unwrap().with(Parameter::Datacenter, "dc2").unwrap();
        assert_eq!(query.get(Parameter::Datacenter), Some("dc2"));
        assert_eq!(query.get(Parameter::Filter), None);
        assert_eq!(Query::new(""), Err(QueryError::Empty));
        assert_eq!(query.with(Parameter::Filter, ""), Err(QueryError::Empty));
        assert_eq!(Query::new(".."), Err(QueryError::Dots));
        assert_eq!(Query::new("a\nb"), Err(QueryError::Control));
        assert_eq!(text(b"\xff"), Err(QueryError::Encoding));
    }

    #[test]
    fn the_text_of_a_query_is_its_own() {
        let web = Query::new("web").unwrap();
        let with = |parameter, value| web.clone().with(parameter, value).unwrap();
        let all = [
            web.clone(),
            Query::new("web dc=\"dc2\"").unwrap(),
            with(Parameter::Datacenter, "dc2"),
            with(Parameter::Datacenter, "dc2\" ns=\"a"),
            with(Parameter::Datacenter, "dc2").with(Parameter::Namespace, "a").unwrap(),
            with(Parameter::Peer, "dc2"),
            Query { network: Network::Wan, ..web.clone() },
        ];
        let texts: std::collections::BTreeSet<String> = all.iter().map(Query::to_string).collect();
        assert_eq!(texts.len(), all.len(), "{texts:?}");
        let one = with(Parameter::Peer, "p").with(Parameter::Filter, "f").unwrap();
        let same = with(Parameter::Filter, "f").with(Parameter::Peer, "p").unwrap();
        assert_eq!((one.to_string(), &one), (same.to_string(), &same));
    }
}
