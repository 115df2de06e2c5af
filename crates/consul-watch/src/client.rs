//! Consul's HTTP API: one question, one bounded answer.

use std::time::Duration;

use reqwest::{StatusCode, redirect};
use std::sync::Arc;

use crate::agent::Agent;
use crate::error::{Error, printable};
use crate::query::Query;
use crate::resolver::SystemResolver;
use crate::watch::{Answer, Ask, Transport};

/// Slack for a blocking query beyond its wait: Consul adds up to a sixteenth of the wait, and the
/// answer has to travel.
const SLACK: Duration = Duration::from_secs(12);

/// How much of an error's text is kept.
const ERROR_TEXT: usize = 200;

/// A client of one agent. Clones share the connections.
#[derive(Clone, Debug)]
pub struct Client {
    http: reqwest::Client,
    agent: Agent,
}

impl Client {
    /// A client of `agent`. It connects when it is first asked.
    pub fn new(agent: Agent) -> Result<Self, Error> {
        // The one provider of cryptography in this process; a second call changes nothing.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let http = reqwest::Client::builder()
            // The environment's proxy is not asked for: the token would go to it.
            .no_proxy()
            // Nor does the token follow a redirect.
            .redirect(redirect::Policy::none())
            .retry(reqwest::retry::never())
            .http1_only()
            .connect_timeout(agent.timeout)
            .dns_resolver(Arc::new(SystemResolver::default()))
            // http:// alone so far: no roots are needed, and a system without any is no error.
            .tls_certs_only([])
            .build()?;
        Ok(Self { http, agent })
    }

    /// Asks for a service's health.
    pub async fn health(&self, query: &Query, ask: Ask) -> Result<Answer, Error> {
        let mut url = self.agent.address.join(["v1", "health", "service", query.service()]);
        let timeout = {
            let mut pairs = url.query_pairs_mut();
            if let Some(dc) = query.datacenter() {
                pairs.append_pair("dc", dc);
            }
            match ask {
                Ask::Consistent => {
                    pairs.append_key_only("consistent");
                    self.agent.timeout
                }
                Ask::Blocking { index } => {
                    pairs
                        .append_pair("index", &index.to_string())
                        .append_pair("wait", &format!("{}ms", self.agent.wait.as_millis()));
                    self.agent.wait + self.agent.wait / 16 + SLACK
                }
            }
        };

        let mut request = self.http.get(url).timeout(timeout);
        if let Some(token) = &self.agent.token {
            request = request.header("X-Consul-Token", token.secret());
        }
        let mut response = request.send().await?;

        let status = response.status();
        if status != StatusCode::OK {
            // The index of such an answer means nothing: 500 and 403 carry a 1.
            let text = body(&mut response, ERROR_TEXT * 4).await.unwrap_or_default();
            return Err(match status {
                StatusCode::FORBIDDEN => Error::Denied,
                _ => Error::Status { status, text: printable(&text, ERROR_TEXT) },
            });
        }
        let index = response
            .headers()
            .get("X-Consul-Index")
            .and_then(|value| value.to_str().ok()?.parse().ok())
            .ok_or(Error::Index)?;
        let body = body(&mut response, self.agent.max_response).await?;
        Ok(Answer { index, body })
    }
}

/// The whole body, cut off while it streams where it grows over `limit` bytes.
async fn body(response: &mut reqwest::Response, limit: usize) -> Result<Vec<u8>, Error> {
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await? {
        if chunk.len() > limit - body.len() {
            return Err(Error::TooLarge { limit });
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body)
}

/// A client's question about one query, as a watch asks it.
#[derive(Clone, Debug)]
pub struct Service {
    /// Whom to ask.
    pub client: Client,
    /// What to ask for.
    pub query: Query,
}

impl Transport for Service {
    async fn ask(&mut self, ask: Ask) -> Result<Answer, Error> {
        self.client.health(&self.query, ask).await
    }
}
