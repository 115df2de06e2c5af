//! What an agent says of itself (`/v1/agent/self`), and what it therefore cannot do.
//!
//! Consul ignores parameters that it does not know. A query for a namespace, sent to an agent
//! without namespaces, is answered with instances of something else.

use serde::Deserialize;

use crate::error::{Error, printable};
use crate::query::{Parameter, Query};

/// What matters of it. Unknown where the token may not read it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct About {
    pub(crate) datacenter: Option<String>,
    version: Option<Version>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Version {
    text: String,
    number: (u32, u32),
    enterprise: bool,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Agent {
    config: Config,
    member: Option<Member>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Config {
    datacenter: String,
    version: String,
    version_metadata: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Member {
    tags: Option<Tags>,
}

#[derive(Deserialize)]
struct Tags {
    build: Option<String>,
}

impl About {
    /// The agent's version, as far as the token may read it.
    pub(crate) fn version(&self) -> Option<&str> {
        self.version.as_ref().map(|version| &*version.text)
    }

    /// Reads the answer.
    pub(crate) fn parse(body: &[u8]) -> Result<Self, Error> {
        let Agent { config, member } =
            serde_json::from_slice(body).map_err(|err| Error::json(&err))?;
        let build = member.and_then(|member| member.tags?.build).unwrap_or_default();
        let metadata = config.version_metadata.unwrap_or_default();
        // Where it says so has changed over the versions.
        let enterprise = metadata.split('.').any(|part| part == "ent")
            || [&config.version, &build].iter().any(|text| text.contains("+ent"));
        let mut parts = config.version.split('.').map(|part| part.parse().ok());
        let number = (parts.next().flatten(), parts.next().flatten());
        let version = match number {
            (Some(major), Some(minor)) => Some(Version {
                text: printable(config.version.as_bytes(), 40),
                number: (major, minor),
                enterprise,
            }),
            _ => None,
        };
        Ok(Self { datacenter: Some(config.datacenter), version })
    }

    /// Whether the agent does what the query asks for.
    pub(crate) fn check(&self, query: &Query) -> Result<(), Error> {
        let needs = [
            (Parameter::Namespace, "Consul Enterprise"),
            (Parameter::Partition, "Consul Enterprise"),
            (Parameter::Peer, "Consul 1.13"),
        ];
        for (parameter, needed) in needs {
            if query.get(parameter).is_none() {
                continue;
            }
            let name = parameter.name();
            let Some(version) = &self.version else {
                return Err(Error::Rights(format!(
                    "cannot verify that the agent knows \"{name}\": the token needs \
                     agent_prefix \"\" {{ policy = \"read\" }}"
                )));
            };
            let knows = match parameter {
                Parameter::Peer => version.number >= (1, 13),
                Parameter::Partition => version.enterprise && version.number >= (1, 11),
                _ => version.enterprise,
            };
            if !knows {
                return Err(Error::Unsupported {
                    parameter: name,
                    needed,
                    version: version.text.clone(),
                });
            }
        }
        Ok(())
    }
}

/// Whether a query needs an agent that says what it is.
pub(crate) fn matters(query: &Query) -> bool {
    [Parameter::Namespace, Parameter::Partition, Parameter::Peer]
        .into_iter()
        .any(|parameter| query.get(parameter).is_some())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn about(version: &str, metadata: &str, build: &str) -> About {
        let body = json!({
            "Config": {"Datacenter": "dc1", "Version": version, "VersionMetadata": metadata},
            "Member": {"Tags": {"build": build}},
        });
        About::parse(body.to_string().as_bytes()).unwrap()
    }

    fn knows(about: &About, parameter: Parameter) -> bool {
        let query = Query::new("web").unwrap().with(parameter, "x").unwrap();
        match about.check(&query) {
            Ok(()) => true,
            Err(Error::Unsupported { .. }) => false,
            Err(other) => panic!("{other}"),
        }
    }

    #[test]
    fn who_knows_what() {
        use Parameter::*;
        let table = [
            (about("1.8.7", "", "1.8.7:"), [true, false, false, false]),
            (about("1.8.7+ent", "", ""), [true, true, false, false]),
            (about("1.10.4", "", "1.10.4+ent:abc"), [true, true, false, false]),
            (about("1.12.0", "ent", ""), [true, true, true, false]),
            (about("1.13.0", "", ""), [true, false, false, true]),
            (about("1.22.4", "ent.hsm", ""), [true, true, true, true]),
            (about("2.1.0-dev", "", ""), [true, false, false, true]),
        ];
        for (about, expected) in table {
            let seen = [Datacenter, Namespace, Partition, Peer].map(|it| knows(&about, it));
            assert_eq!(seen, expected, "{about:?}");
        }
    }

    #[test]
    fn an_agent_that_may_not_say_is_believed_nothing() {
        let query = Query::new("web").unwrap();
        assert!(About::default().check(&query).is_ok());
        assert!(!matters(&query));
        let query = query.with(Parameter::Peer, "p").unwrap();
        assert!(matters(&query));
        let error = About::default().check(&query).unwrap_err();
        assert!(matches!(error, Error::Rights(_)), "{error}");
        // A version that cannot be read is none.
        assert!(matches!(about("dev", "", "").check(&query), Err(Error::Rights(_))));
    }

    #[test]
    fn no_agent() {
        for body in ["", "{}", "[]", "<html>", r#"{"Config":{}}"#] {
            assert!(About::parse(body.as_bytes()).is_err());
        }
    }
}
