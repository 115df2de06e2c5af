//! The Docker engine of this host: its events, its list and its containers.

use std::collections::HashMap;
use std::env;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bollard::models::EventMessage;
use bollard::query_parameters::{EventsOptions, InspectContainerOptions, ListContainersOptions};
use bollard::{API_DEFAULT_VERSION, Docker};
use consul_watch::error::printable;
use futures_util::{Stream, StreamExt};
use thiserror::Error as ThisError;
use tokio::time::timeout;

use crate::container::Container;
use crate::fleet::{Event, Found, Kind};

/// Where the engine listens, and where the users of gliderlabs/registrator mount it.
const SOCKETS: [&str; 2] = ["/var/run/docker.sock", "/tmp/docker.sock"];

/// How long one call may take, and the head of the events.
const TIMEOUT: Duration = Duration::from_secs(10);

/// What is subscribed to. The engine keeps few events, and three `exec_*` for each health probe are
/// none of ours.
const EVENTS: [&str; 11] = [
    "start",
    "unpause",
    "pause",
    "health_status",
    "kill",
    "die",
    "destroy",
    "rename",
    "update",
    "connect",
    "disconnect",
];

/// Why the engine could not be asked.
#[derive(Debug, ThisError)]
pub enum Error {
    /// `DOCKER_HOST` names something that cannot be used.
    #[error("DOCKER_HOST \"{0}\" must begin with \"unix://\", \"tcp://\" or \"http://\"")]
    Host(String),
    /// It does not answer, or not as an engine does.
    #[error("{0}")]
    Engine(String),
    /// No answer in time.
    #[error("no answer within {} s", TIMEOUT.as_secs())]
    Timeout,
    /// The stream of events has ended.
    #[error("the engine has closed the stream of events")]
    Closed,
}

impl From<bollard::errors::Error> for Error {
    fn from(error: bollard::errors::Error) -> Self {
        use bollard::errors::Error as E;
        match error {
            E::RequestTimeoutError => Self::Timeout,
            error => {
                let mut cause: &dyn std::error::Error = &error;
                while let Some(source) = cause.source() {
                    cause = source;
                }
                Self::Engine(printable(cause.to_string().as_bytes(), 300))
            }
        }
    }
}

/// Where the engine is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address(Kinds);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Kinds {
    Socket(String),
    Http(String),
}

impl Address {
    /// `DOCKER_HOST`, else the first socket that is there.
    pub fn from_env() -> Result<Self, Error> {
        match env::var("DOCKER_HOST") {
            Ok(host) if !host.is_empty() => Self::parse(&host),
            _ => {
                let there = SOCKETS.into_iter().find(|path| Path::new(path).exists());
                Ok(Self(Kinds::Socket(there.unwrap_or(SOCKETS[0]).to_owned())))
            }
        }
    }

    fn parse(host: &str) -> Result<Self, Error> {
        match host.split_once("://") {
            Some(("unix", path)) if path.starts_with('/') => {
                Ok(Self(Kinds::Socket(path.to_owned())))
            }
            Some(("tcp" | "http", at)) if !at.is_empty() => Ok(Self(Kinds::Http(host.to_owned()))),
            _ => Err(Error::Host(printable(host.as_bytes(), 200))),
        }
    }
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.0 {
            Kinds::Socket(path) => write!(f, "unix://{path}"),
            Kinds::Http(host) => f.write_str(host),
        }
    }
}

/// A client of the engine. Clones share it.
#[derive(Clone)]
pub struct Engine {
    docker: Docker,
    ip_label: Option<String>,
}

impl Engine {
    /// Connects, and settles on a version of the API that both know.
    pub async fn connect(address: &Address, ip_label: Option<String>) -> Result<Self, Error> {
        let seconds = TIMEOUT.as_secs();
        let docker = match &address.0 {
            Kinds::Socket(path) => Docker::connect_with_unix(path, seconds, API_DEFAULT_VERSION)?,
            Kinds::Http(host) => Docker::connect_with_http(host, seconds, API_DEFAULT_VERSION)?,
        };
        let docker = bounded(docker.negotiate_version()).await?;
        Ok(Self { docker, ip_label })
    }

    /// What the engine calls its host.
    pub async fn name(&self) -> Result<String, Error> {
        let info = bounded(self.docker.info()).await?;
        match info.name.filter(|name| !name.is_empty()) {
            Some(name) => Ok(name),
            None => Err(Error::Engine("the engine has no name, see --hostname".into())),
        }
    }

    /// The IDs of the containers that run; with `all`, of those that ended too.
    pub async fn list(&self, all: bool) -> Result<Vec<String>, Error> {
        let options = ListContainersOptions { all, ..ListContainersOptions::default() };
        let list = bounded(self.docker.list_containers(Some(options))).await?;
        Ok(list.into_iter().filter_map(|container| container.id).collect())
    }

    pub async fn inspect(&self, id: &str) -> Result<Found, Error> {
        let answer = self.docker.inspect_container(id, None::<InspectContainerOptions>);
        match bounded(answer).await {
            Ok(answer) => {
                let container = Container::new(answer, self.ip_label.as_deref());
                Ok(Found::Container(Box::new(container)))
            }
            Err(Call::Failed(bollard::errors::Error::DockerResponseServerError {
                status_code: 404,
                ..
            })) => Ok(Found::Nothing),
            Err(error) => Err(error.into()),
        }
    }

    /// What happens from now on. The stream begins when it is polled; what happens until the engine
    /// has taken the subscription comes with it, out of the 256 events that the engine remembers.
    pub fn events(&self) -> impl Stream<Item = Result<Option<Event>, Error>> + Unpin + use<> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let texts = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect();
        let options = EventsOptions {
            since: Some(format!("{}.{:09}", now.as_secs(), now.subsec_nanos())),
            filters: Some(HashMap::from([
                ("type".to_owned(), texts(&["container", "network"])),
                ("event".to_owned(), texts(&EVENTS)),
            ])),
            ..EventsOptions::default()
        };
        self.docker.events(Some(options)).map(|item| Ok(event(item?)))
    }
}

/// How a bounded call failed.
enum Call {
    Failed(bollard::errors::Error),
    Late,
}

impl From<Call> for Error {
    fn from(call: Call) -> Self {
        match call {
            Call::Failed(error) => error.into(),
            Call::Late => Self::Timeout,
        }
    }
}

/// The client's own bound covers the head of an answer alone.
async fn bounded<T>(
    call: impl Future<Output = Result<T, bollard::errors::Error>>,
) -> Result<T, Call> {
    match timeout(TIMEOUT, call).await {
        Ok(result) => result.map_err(Call::Failed),
        Err(_) => Err(Call::Late),
    }
}

/// An event as far as it matters.
fn event(message: EventMessage) -> Option<Event> {
    let actor = message.actor?;
    let attributes = actor.attributes.unwrap_or_default();
    let action = message.action?;
    // `health_status: healthy`, and bare with Podman.
    let name = action.split(':').next().unwrap_or_default();
    let container = match name {
        "connect" | "disconnect" => attributes.get("container").cloned(),
        _ => actor.id,
    };
    let number = |name: &str| attributes.get(name).and_then(|text| text.parse::<i64>().ok());
    let kind = match name {
        "kill" => Kind::Kill(number("signal").and_then(|signal| i32::try_from(signal).ok())),
        // An end that does not say how counts as one by a signal.
        "die" => Kind::Die(number("exitCode").unwrap_or(128)),
        "destroy" => Kind::Destroy,
        _ => Kind::Change,
    };
    Some(Event { container: container.filter(|id| !id.is_empty())?, kind })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn addresses() {
        let parsed = |host| Address::parse(host).map(|address| address.to_string());
        for good in ["unix:///run/docker.sock", "tcp://proxy:2375", "http://127.0.0.1:2375"] {
            assert_eq!(parsed(good).unwrap(), good);
        }
        for bad in ["ssh://host", "https://host", "unix://", "unix://x", "tcp://", "host:2375"] {
            let error = parsed(bad).unwrap_err().to_string();
            assert!(error.contains(bad) && error.contains("must begin"), "{error}");
        }
    }

    #[test]
    fn events() {
        let taken = |action: &str, attributes| {
            let message = json!({ "Type": "container", "Action": action,
                "Actor": { "ID": "c1", "Attributes": attributes } });
            event(serde_json::from_value(message).unwrap()).map(|e| (e.container, e.kind))
        };
        let of = |id: &str, kind| Some((id.to_owned(), kind));
        assert_eq!(taken("kill", json!({ "signal": "15" })), of("c1", Kind::Kill(Some(15))));
        assert_eq!(taken("kill", json!({})), of("c1", Kind::Kill(None)));
        assert_eq!(taken("die", json!({ "exitCode": "1" })), of("c1", Kind::Die(1)));
        assert_eq!(taken("die", json!({})), of("c1", Kind::Die(128)));
        assert_eq!(taken("destroy", json!({})), of("c1", Kind::Destroy));
        assert_eq!(taken("health_status: healthy", json!({})), of("c1", Kind::Change));
        assert_eq!(taken("connect", json!({ "container": "c2" })), of("c2", Kind::Change));
        assert_eq!(taken("connect", json!({})), None);
    }
}
