//! The local Consul agent's HTTP API: one call, one bounded answer.

use std::collections::BTreeMap;
use std::time::Duration;

use consul_watch::agent::Agents;
use consul_watch::credentials::{Credentials, Look};
use consul_watch::error::printable;
use consul_watch::tls::last_cause;
use reqwest::{Method, StatusCode};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};
use thiserror::Error as ThisError;

use crate::container::Health;
use crate::converge::{Actual, Check, Service, status};
use crate::instance::docker_check;
use crate::registration::Registration;

/// The header for the token.
const TOKEN: &str = "X-Consul-Token";

/// How much of an error's text is read, and how much of it is kept.
const ERROR_READ: usize = 4096;
const ERROR_TEXT: usize = 300;

/// How long one call may take.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Why a call did not succeed. No text holds a token.
#[derive(Debug, ThisError)]
pub enum Error {
    /// The agent was not reached, or the connection broke.
    #[error("{0}")]
    Transport(String),
    /// The answer did not come in time.
    #[error("no answer within {} s", TIMEOUT.as_secs())]
    Timeout,
    /// 403.
    #[error(
        "permission denied (403), the token needs service_prefix \"\" {{ policy = \"write\" }}"
    )]
    Denied,
    /// Any other status than 200.
    #[error("status {}: {text}", .status.as_u16())]
    Status { status: StatusCode, text: String },
    /// The body is too large.
    #[error("the answer is larger than {0} bytes")]
    TooLarge(usize),
    /// The body is not what an agent answers.
    #[error("invalid answer: {0}")]
    Invalid(String),
}

impl Error {
    /// Whether it is about the one call, and the agent is well.
    pub fn is_refusal(&self) -> bool {
        match self {
            Self::Denied => true,
            // Scripts that are off are a 500.
            Self::Status { status, .. } => {
                *status != StatusCode::TOO_MANY_REQUESTS
                    && *status != StatusCode::BAD_GATEWAY
                    && *status != StatusCode::SERVICE_UNAVAILABLE
                    && *status != StatusCode::GATEWAY_TIMEOUT
            }
            Self::Transport(_) | Self::Timeout | Self::TooLarge(_) | Self::Invalid(_) => false,
        }
    }
}

/// A client of the agent.
pub struct Consul {
    credentials: Credentials,
    max_response: usize,
}

impl Consul {
    /// To be called within a runtime. What is wrong with the settings is an error.
    pub fn new(mut agents: Agents) -> Result<Self, consul_watch::Error> {
        agents.timeout = TIMEOUT;
        let max_response = agents.max_response;
        Ok(Self { credentials: Credentials::new(agents)?, max_response })
    }

    /// Reads the files of the credentials again.
    pub fn look(&self) -> Look {
        if self.credentials.has_files() { self.credentials.look() } else { Look::Same }
    }

    /// Whether it answers at all; needs no rights.
    pub async fn ping(&self) -> Result<(), Error> {
        self.call(Method::GET, &["status", "leader"], &[], None).await.map(drop)
    }

    /// What it has.
    pub async fn actual(&self) -> Result<Actual, Error> {
        let (services, checks) = tokio::try_join!(
            self.get::<BTreeMap<String, AgentService>>("services"),
            self.get::<BTreeMap<String, AgentCheck>>("checks"),
        )?;
        let services = services.into_iter().map(|(id, service)| (id, service.into()));
        let checks = checks.into_iter().filter(|(_, check)| !check.service_id.is_empty());
        Ok(Actual {
            services: services.collect(),
            checks: checks.map(|(id, check)| (id, check.into())).collect(),
        })
    }

    pub async fn register(
        &self,
        registration: &Registration,
        health: Option<Health>,
    ) -> Result<(), Error> {
        let mut registration = registration.clone();
        let docker = docker_check(&registration.id);
        for check in registration.checks.iter_mut().filter(|check| check.id == docker) {
            check.status = health.map(|health| status(health).into());
        }
        let body = serde_json::to_value(&registration).map_err(invalid)?;
        self.put(&["agent", "service", "register"], &[], Some(body)).await
    }

    /// An ID that nobody has is no error: the outcome is the same.
    pub async fn deregister(&self, id: &str) -> Result<(), Error> {
        match self.put(&["agent", "service", "deregister", id], &[], None).await {
            Err(Error::Status { status: StatusCode::NOT_FOUND, .. }) => Ok(()),
            result => result,
        }
    }

    /// Sets the docker check of a service.
    pub async fn update(&self, id: &str, health: Health) -> Result<(), Error> {
        let output = match health {
            Health::Healthy => "Docker says: healthy",
            Health::Starting => "Docker says: starting",
            Health::Unhealthy => "Docker says: unhealthy",
        };
        let body = json!({ "Status": status(health), "Output": output });
        self.put(&["agent", "check", "update", &docker_check(id)], &[], Some(body)).await
    }

    pub async fn drop_check(&self, check: &str) -> Result<(), Error> {
        match self.put(&["agent", "check", "deregister", check], &[], None).await {
            Err(Error::Status { status: StatusCode::NOT_FOUND, .. }) => Ok(()),
            result => result,
        }
    }

    /// Begins maintenance with a reason, or ends it.
    pub async fn maintenance(&self, id: &str, reason: Option<&str>) -> Result<(), Error> {
        let pairs = match reason {
            Some(reason) => vec![("enable", "true"), ("reason", reason)],
            None => vec![("enable", "false")],
        };
        self.put(&["agent", "service", "maintenance", id], &pairs, None).await
    }

    async fn get<T: DeserializeOwned>(&self, what: &str) -> Result<T, Error> {
        let body = self.call(Method::GET, &["agent", what], &[], None).await?;
        serde_json::from_slice(&body).map_err(invalid)
    }

    async fn put(
        &self,
        path: &[&str],
        pairs: &[(&str, &str)],
        body: Option<Value>,
    ) -> Result<(), Error> {
        self.call(Method::PUT, path, pairs, body).await.map(drop)
    }

    async fn call(
        &self,
        method: Method,
        path: &[&str],
        pairs: &[(&str, &str)],
        body: Option<Value>,
    ) -> Result<Vec<u8>, Error> {
        let ready = self.credentials.ready();
        let (http, base) = &ready.http[0];
        let mut url = base.clone();
        if let Ok(mut segments) = url.path_segments_mut() {
            // Each is percent-encoded as a whole, whatever an ID holds.
            segments.clear().push("v1").extend(path);
        }
        if !pairs.is_empty() {
            url.query_pairs_mut().extend_pairs(pairs);
        }
        let mut request = http.request(method, url).timeout(TIMEOUT);
        if let Some(token) = &ready.token {
            request = request.header(TOKEN, token.as_str());
        }
        if let Some(body) = body {
            request = request.body(body.to_string());
        }
        let mut response = request.send().await?;
        let status = response.status();
        let is_good = status == StatusCode::OK;
        let limit = if is_good { self.max_response } else { ERROR_READ };
        let mut read = Vec::new();
        while let Some(chunk) = response.chunk().await? {
            if chunk.len() > limit - read.len() {
                if is_good {
                    return Err(Error::TooLarge(limit));
                }
                break;
            }
            read.extend_from_slice(&chunk);
        }
        if is_good {
            return Ok(read);
        }
        let mut text = String::from_utf8_lossy(&read).into_owned();
        if let Some(token) = &ready.token {
            // Some servers show in their error pages what they were asked.
            text = text.replace(token.as_str(), "...");
        }
        Err(match status {
            StatusCode::FORBIDDEN => Error::Denied,
            _ => Error::Status { status, text: printable(text.as_bytes(), ERROR_TEXT) },
        })
    }
}

impl From<reqwest::Error> for Error {
    fn from(error: reqwest::Error) -> Self {
        if error.is_timeout() { Self::Timeout } else { Self::Transport(last_cause(&error)) }
    }
}

/// Where and what kind of a fault, without the text it was found in: that may hold anything.
fn invalid(error: serde_json::Error) -> Error {
    let place = format!("line {}, column {}", error.line(), error.column());
    Error::Invalid(format!("{:?} error at {place}", error.classify()))
}

/// `/v1/agent/services`. Lists and maps may be null.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct AgentService {
    service: String,
    #[serde(default)]
    address: String,
    #[serde(default)]
    port: u16,
    #[serde(default)]
    tags: Option<Vec<String>>,
    #[serde(default)]
    meta: Option<Map<String, Value>>,
}

/// `/v1/agent/checks`.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct AgentCheck {
    #[serde(rename = "ServiceID", default)]
    service_id: String,
    #[serde(default)]
    status: String,
    #[serde(default)]
    notes: String,
}

impl From<AgentService> for Service {
    fn from(service: AgentService) -> Self {
        let meta = service.meta.unwrap_or_default().into_iter();
        Self {
            name: service.service,
            address: service.address,
            port: service.port,
            tags: service.tags.unwrap_or_default(),
            meta: meta.filter_map(|(key, value)| Some((key, value.as_str()?.to_owned()))).collect(),
        }
    }
}

impl From<AgentCheck> for Check {
    fn from(check: AgentCheck) -> Self {
        Self { service: check.service_id, status: check.status, notes: check.notes }
    }
}
