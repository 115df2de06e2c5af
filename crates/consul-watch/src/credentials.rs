//! What a client shows of itself, and how it connects: the token and the HTTP clients, made anew
//! when one of the files behind them changes.

use std::sync::{Arc, Mutex, PoisonError};

use reqwest::{ClientBuilder, Url, redirect};

use crate::agent::{Agents, Secret, Token};
use crate::error::Error;
use crate::resolver::{AgentResolver, Resolver};
use crate::tls::{Tls, last_cause, provide};

/// Whatever is needed for a request now.
#[derive(Debug)]
pub struct Ready {
    /// The token to send.
    pub token: Option<Secret>,
    /// For each address, in order: an HTTP client, and the base of its URLs.
    pub http: Vec<(reqwest::Client, Url)>,
}

/// The credentials of a client.
#[derive(Debug)]
pub struct Credentials {
    agents: Agents,
    resolver: Resolver,
    now: Mutex<Now>,
}

#[derive(Debug)]
struct Now {
    token: Option<Token>,
    tls: Tls,
    ready: Arc<Ready>,
    /// What was wrong with the files when they were looked at last.
    trouble: Option<Trouble>,
}

#[derive(Debug, PartialEq, Eq)]
struct Trouble {
    text: String,
    /// Somebody was told.
    told: bool,
}

/// What a look at the files brought.
#[derive(Debug, PartialEq, Eq)]
pub enum Look {
    /// All is as it was.
    Same,
    /// There are new credentials.
    Changed,
    /// There are others, and they are of no use; the old ones stay. Said once.
    Unusable(String),
}

impl Credentials {
    /// Makes the HTTP clients. To be called within a tokio runtime.
    pub fn new(agents: Agents) -> Result<Self, Error> {
        let (token, tls) = (agents.token.clone(), agents.tls.clone());
        let resolver = Resolver::system();
        let ready = ready(&agents, &resolver, token.as_ref(), &tls).map_err(Error::Settings)?;
        let now = Now { token, tls, ready: Arc::new(ready), trouble: None };
        Ok(Self { agents, resolver, now: Mutex::new(now) })
    }

    /// What to use for a request.
    pub fn ready(&self) -> Arc<Ready> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner).ready.clone()
    }

    /// Whether there is anything to look at.
    pub fn has_files(&self) -> bool {
        let Tls { trusted, identity, .. } = &self.agents.tls;
        let tls = trusted.is_some() || identity.is_some();
        matches!(self.agents.token, Some(Token::File(_)))
            || tls && self.agents.addresses.iter().any(|address| address.is_tls())
    }

    /// Looks whether a file has changed.
    pub fn look(&self) -> Look {
        let mut now = self.now.lock().unwrap_or_else(PoisonError::into_inner);
        match self.reread(&now) {
            Ok(None) => Look::Same,
            Ok(Some(next)) => {
                *now = next;
                Look::Changed
            }
            Err(text) => {
                // A file that is just being written, or a certificate whose key comes a moment
                // later, is no trouble: the next look will show.
                let again = now.trouble.take().filter(|trouble| trouble.text == text);
                let tell = again.as_ref().is_some_and(|trouble| !trouble.told);
                now.trouble = Some(Trouble { told: again.is_some(), text: text.clone() });
                if tell { Look::Unusable(text) } else { Look::Same }
            }
        }
    }

    fn reread(&self, now: &Now) -> Result<Option<Now>, String> {
        let token = match &now.token {
            Some(Token::File(file)) => file.reread(),
            _ => None,
        };
        let token = token.transpose().map_err(|err| err.to_string())?;
        let tls = now.tls.reread().transpose().map_err(|err| err.to_string())?;
        if token.is_none() && tls.is_none() {
            return Ok(None);
        }
        let token = token.map(Token::File).or(now.token.clone());
        let tls = tls.unwrap_or(now.tls.clone());
        let ready = Arc::new(ready(&self.agents, &self.resolver, token.as_ref(), &tls)?);
        Ok(Some(Now { token, tls, ready, trouble: None }))
    }
}

fn ready(
    agents: &Agents,
    resolver: &Resolver,
    token: Option<&Token>,
    tls: &Tls,
) -> Result<Ready, String> {
    let token = match token {
        None => None,
        Some(token) => Some(token.secret().map_err(|err| match token {
            Token::Fixed(_) => format!("the token {err}"),
            Token::File(file) => format!("the token in \"{}\" {err}", file.path().display()),
        })?),
    };
    let http = agents.addresses.iter().map(|address| {
        provide();
        let mut url = address.url();
        let mut instead = None;
        let mut builder = ClientBuilder::new()
            // The environment's proxy is not asked for: the token would go to it.
            .no_proxy()
            // Nor does the token follow a redirect.
            .redirect(redirect::Policy::none())
            .retry(reqwest::retry::never())
            .http1_only()
            .connect_timeout(agents.timeout);
        if let Some(path) = address.socket() {
            builder = builder.unix_socket(path);
        }
        if address.is_tls() {
            builder = tls.configure(builder).map_err(|err| err.to_string())?;
            if let Some(name) = &tls.server_name {
                // The URL's host is the name that is verified, and sent along; the resolver
                // knows where the agent really is.
                let host = url.host_str().unwrap_or_default();
                instead = Some(host.trim_matches(['[', ']']).to_owned());
                let port = url.port_or_known_default();
                let named = url.set_host(Some(name.as_str())).is_ok() && url.set_port(port).is_ok();
                debug_assert!(named, "a server name is a host's name");
            }
        } else {
            // No roots are needed, and a system without any is no error.
            builder = builder.tls_certs_only([]);
        }
        let resolver = AgentResolver { resolver: resolver.clone(), instead };
        let client = builder.dns_resolver(Arc::new(resolver)).build();
        let client = client.map_err(|err| tls.blame(&last_cause(&err)))?;
        Ok((client, url))
    });
    Ok(Ready { token, http: http.collect::<Result<_, String>>()? })
}
