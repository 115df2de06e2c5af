//! Consul's HTTP API: one question, one bounded answer.
//!
//! A [`Client`] asks the agents of one datacenter. A [`Service`] is its question about one query,
//! as a watch asks it: it begins with the first agent, goes on to the next one where a connection
//! fails, and stays with what works.

use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use reqwest::header::HeaderValue;
use reqwest::{Method, RequestBuilder, Response, StatusCode};
use serde_json::Value;
use tokio::sync::watch;
use tokio::task::yield_now;
use tokio::time::sleep;

use crate::about::{About, matters};
use crate::agent::{Agents, Consistency};
use crate::credentials::{Credentials, Look, Ready};
use crate::error::{Error, printable};
use crate::pool::{Limit, Member, Warn};
use crate::query::{Network, Parameter, Query};
use crate::reach::{EVERY, PROBE, Probe, Reach};
use crate::rights;
use crate::watch::{Answer, Ask, Transport};

/// Slack for a blocking query beyond its wait: Consul adds up to a sixteenth of the wait, and the
/// answer has to travel.
const SLACK: Duration = Duration::from_secs(12);

/// The header for the token.
const TOKEN: &str = "X-Consul-Token";

/// How much of an error's text is kept.
const ERROR_TEXT: usize = 200;

/// The bound on small answers: what an agent says of itself, and rights.
const SMALL: usize = 1 << 20;

/// How often the files of the credentials are looked at.
const LOOK: Duration = Duration::from_secs(1);

/// Many watches that are woken at once ask one after the other: each has this much room, and all
/// together this much at most.
const ROOM: Duration = Duration::from_millis(3);
const SPREAD: Duration = Duration::from_millis(300);

/// A client of the agents of one datacenter, made by [`crate::Pool::client`]. Clones share
/// connections, credentials, and what is known of the agents.
#[derive(Clone)]
pub struct Client(Arc<Inner>);

struct Inner {
    agents: Agents,
    credentials: Credentials,
    /// One for each address, in order.
    limits: Vec<Arc<Limit>>,
    reach: Vec<Reach>,
    /// The datacenter in which the agents have to be.
    home: Mutex<Option<Home>>,
    /// Counts what makes it worth while to ask again before time.
    news: watch::Sender<u64>,
    warn: Warn,
}

/// The datacenter of the first agent; until that was reached it is what was known before, or else
/// that of whoever was reached.
struct Home {
    datacenter: String,
    first: bool,
}

impl Client {
    pub(crate) fn new(agents: Agents, limits: Vec<Arc<Limit>>, warn: Warn) -> Result<Self, Error> {
        let inner = Arc::new(Inner {
            credentials: Credentials::new(agents.clone())?,
            reach: agents.addresses.iter().map(|_| Reach::default()).collect(),
            agents,
            limits,
            home: Mutex::default(),
            news: watch::Sender::new(0),
            warn,
        });
        if inner.credentials.has_files() {
            tokio::spawn(look_at_files(Arc::downgrade(&inner)));
        }
        Ok(Self(inner))
    }

    /// Says in which datacenter the agents were, as long as none was reached.
    pub fn remember(&self, datacenter: &str) {
        let mut home = self.0.home.lock().unwrap_or_else(PoisonError::into_inner);
        home.get_or_insert_with(|| Home { datacenter: datacenter.to_owned(), first: false });
    }

    /// What the agent at this place of the settings said of itself: its version.
    pub(crate) fn version(&self, at: usize) -> Option<String> {
        self.0.reach.get(at)?.about()?.version().map(str::to_owned)
    }

    /// The question for a service's health, for a watch to ask.
    pub fn service(&self, query: Query) -> Service {
        let (client, news) = (self.0.clone(), self.0.news.subscribe());
        Service { query, at: 0, member: client.limits[0].join(), news, client }
    }
}

/// Looks at the files once a second, for as long as there is a client.
async fn look_at_files(client: Weak<Inner>) {
    loop {
        sleep(LOOK).await;
        let Some(client) = client.upgrade() else { return };
        match client.credentials.look() {
            Look::Same => (),
            Look::Changed => client.news.send_modify(|news| *news += 1),
            Look::Unusable(text) => (client.warn)(format!("{text}, the old one stays")),
        }
    }
}

/// A client's question about one query.
pub struct Service {
    client: Arc<Inner>,
    query: Query,
    /// Which of the agents is asked.
    at: usize,
    /// One of its watches.
    member: Member,
    news: watch::Receiver<u64>,
}

impl Transport for Service {
    async fn ask(&mut self, ask: Ask) -> Result<Answer, Error> {
        self.news.mark_unchanged();
        let at = self.client.choose(self.at)?;
        self.turn_to(at);
        let result = self.client.ask(self.at, &self.query, ask).await;
        self.judge(result)
    }

    async fn vouch(&mut self, answer: &Answer, nodes: &[&str]) -> Result<(), Error> {
        let result = self.client.vouch(self.at, &self.query, answer.hidden, nodes).await;
        self.judge(result)
    }

    async fn stirred(&mut self) {
        // The sender lives as long as `self`: there is no error.
        let _ = self.news.changed().await;
        let watches = u32::try_from(self.client.news.receiver_count()).unwrap_or(u32::MAX);
        let spread = ROOM.saturating_mul(watches).min(SPREAD);
        sleep(spread.mul_f64(fastrand::f64())).await;
    }

    fn network(&self) -> Network {
        self.query.network
    }

    fn agent(&self) -> usize {
        self.at
    }
}

impl Service {
    fn turn_to(&mut self, at: usize) {
        if self.at != at {
            self.at = at;
            self.member = self.client.limits[at].join();
        }
    }

    /// What a failure says about the agent: whether it can be reached at all the prober finds
    /// out, and the next question goes to another one.
    fn judge<T>(&mut self, result: Result<T, Error>) -> Result<T, Error> {
        let error = match result {
            Err(error) => error,
            good => return good,
        };
        let at = self.at;
        if error.is_agents() {
            self.client.reach(at).forget();
            Inner::investigate(&self.client, at);
            self.turn_to((at + 1) % self.client.limits.len());
        }
        Err(match self.client.agents.addresses.as_slice() {
            [_] => error,
            several => Error::At { address: several[at].to_string(), error: Box::new(error) },
        })
    }
}

impl Inner {
    fn reach(&self, at: usize) -> &Reach {
        &self.reach[at]
    }

    /// The agent to ask: the one at `from`, or the next one that is not known to be away.
    fn choose(&self, from: usize) -> Result<usize, Error> {
        let number = self.reach.len();
        let mut away = None;
        for at in (from..from + number).map(|at| at % number) {
            match self.reach(at).is_down() {
                None => return Ok(at),
                Some(text) => away = away.or(Some(text)),
            }
        }
        Err(Error::Transport(away.unwrap_or_else(|| "no address".into())))
    }

    async fn ask(&self, at: usize, query: &Query, ask: Ask) -> Result<Answer, Error> {
        let turn = self.limits[at].turn().await;
        self.know(at, query).await?;

        let segments = ["v1", "health", "service", query.service()];
        let (request, mut pairs) = (Method::GET, parameters(query));
        let timeout = match (ask, self.agents.consistency) {
            (Ask::Consistent, _) => {
                pairs.push(("consistent", String::new()));
                self.agents.timeout
            }
            (Ask::Blocking { index }, consistency) => {
                match consistency {
                    Consistency::Default => (),
                    Consistency::Stale => pairs.push(("stale", String::new())),
                    Consistency::Consistent => pairs.push(("consistent", String::new())),
                }
                let wait = self.limits[at].wait(self.agents.wait);
                pairs.push(("index", index.to_string()));
                pairs.push(("wait", format!("{}ms", wait.as_millis())));
                wait + wait / 16 + SLACK
            }
        };
        let request = self.request(at, request, segments, &pairs).timeout(timeout);
        let mut response = succeeded(request).await?;
        let header = |name| response.headers().get(name).and_then(|value| value.to_str().ok());
        let index = header("X-Consul-Index").and_then(|value| value.parse().ok());
        let index = index.ok_or(Error::Index)?;
        let hidden = header("X-Consul-Results-Filtered-By-ACLs") == Some("true");
        let body = body(&mut response, self.agents.max_response).await?;
        Ok(Answer { index, hidden, body, _turn: Some(turn) })
    }

    /// Makes sure that the agent is one whose answers mean what they should.
    async fn know(&self, at: usize, query: &Query) -> Result<(), Error> {
        let several = self.agents.addresses.len() > 1;
        if !several && !matters(query) {
            return Ok(());
        }
        let about = match self.reach(at).about() {
            Some(about) => about,
            None => {
                let about = self.about(at).await?;
                self.reach(at).learn(about.clone());
                about
            }
        };
        about.check(query)?;
        if !several {
            return Ok(());
        }
        match about.datacenter {
            Some(is) => {
                let home = self.home(at, &is);
                // With a datacenter in the query it does not matter where the agent is, but for
                // the index; that is the other datacenter's, whoever is asked.
                if home != is && query.get(Parameter::Datacenter).is_none() {
                    let [is, home] = [&is, &home].map(|dc| printable(dc.as_bytes(), 100));
                    return Err(Error::Datacenter { is, home });
                }
            }
            None if at > 0 && self.reach(at).first_warning() => (self.warn)(format!(
                "{} may be in another datacenter than {}: to verify that, the token needs \
                 agent_prefix \"\" {{ policy = \"read\" }}",
                self.agents.addresses[at], self.agents.addresses[0],
            )),
            None => (),
        }
        Ok(())
    }

    /// In which datacenter an agent has to be that says where it is.
    fn home(&self, at: usize, is: &str) -> String {
        let mut home = self.home.lock().unwrap_or_else(PoisonError::into_inner);
        match &*home {
            Some(Home { datacenter, first }) if at > 0 || *first => datacenter.clone(),
            _ => {
                *home = Some(Home { datacenter: is.to_owned(), first: at == 0 });
                is.to_owned()
            }
        }
    }

    async fn about(&self, at: usize) -> Result<About, Error> {
        let request = self.request(at, Method::GET, ["v1", "agent", "self"], &[]);
        match succeeded(request.timeout(self.agents.timeout)).await {
            Ok(mut response) => About::parse(&body(&mut response, SMALL).await?),
            // It may not say.
            Err(Error::Denied) => Ok(About::default()),
            Err(error) => Err(error),
        }
    }

    /// Whether an answer that takes instances away, on these nodes, or has none at all, is whole.
    async fn vouch(
        &self,
        at: usize,
        query: &Query,
        hidden: bool,
        nodes: &[&str],
    ) -> Result<(), Error> {
        if self.reach(at).acls_are_off() && !hidden {
            return Ok(());
        }
        let missing = self.missing_right(at, query, nodes).await?;
        match missing {
            Some(right) => Err(Error::Rights(format!(
                "the answer may lack what the token may not read, it needs {right}"
            ))),
            // The header is Consul's own word, whatever was guessed here.
            None if hidden => Err(Error::Rights(
                "the answer lacks what the token may not read, it needs service and node rights \
                 for all instances"
                    .into(),
            )),
            None => Ok(()),
        }
    }

    /// The first right that the token lacks, of those that reading the service on these nodes takes.
    /// It asks on the connection of the answer, whose turn goes on until this is settled.
    async fn missing_right(
        &self,
        at: usize,
        query: &Query,
        nodes: &[&str],
    ) -> Result<Option<String>, Error> {
        let pairs: Vec<_> = parameters(query)
            .into_iter()
            .filter(|(name, _)| *name == Parameter::Datacenter.name())
            .collect();
        for questions in rights::questions(query.service(), nodes.iter().copied()) {
            let number = questions.len();
            let segments = ["v1", "internal", "acl", "authorize"];
            let request = self.request(at, Method::POST, segments, &pairs);
            let request = request.body(Value::Array(questions).to_string());
            match succeeded(request.timeout(self.agents.timeout)).await {
                Ok(mut response) => {
                    let missing = rights::missing(&body(&mut response, SMALL).await?, number)?;
                    if missing.is_some() {
                        return Ok(missing);
                    }
                }
                Err(Error::Status { status: StatusCode::UNAUTHORIZED, text })
                    if text.contains("ACL support disabled") =>
                {
                    self.reach(at).learn_acls_off();
                    return Ok(None);
                }
                // The agent cannot tell now. If the token were unknown, the answer had been refused.
                Err(Error::Denied) => {
                    return Err(Error::Rights(
                        "the agent does not say what the token may read, the answer may lack \
                         something"
                            .into(),
                    ));
                }
                // A Consul that is too old to be asked.
                Err(Error::Status { status: StatusCode::NOT_FOUND, .. }) => return Ok(None),
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    fn request<'a>(
        &self,
        at: usize,
        method: Method,
        segments: impl IntoIterator<Item = &'a str>,
        pairs: &[(&str, String)],
    ) -> RequestBuilder {
        let ready = self.credentials.ready();
        let Ready { token, http } = &*ready;
        let (http, base) = &http[at];
        let mut url = base.clone();
        if let Ok(mut path) = url.path_segments_mut() {
            path.clear().extend(segments);
        }
        for (name, value) in pairs {
            match value.as_str() {
                "" => url.query_pairs_mut().append_key_only(name),
                value => url.query_pairs_mut().append_pair(name, value),
            };
        }
        let request = http.request(method, url);
        match token {
            Some(token) => request.header(TOKEN, token.as_str()),
            None => request,
        }
    }

    /// Finds out whether an agent can be reached, and for as long as it cannot goes on.
    fn investigate(client: &Arc<Self>, at: usize) {
        if client.reach(at).begin_probing() {
            let prober = Prober { client: Arc::downgrade(client), at };
            tokio::spawn(prober.run());
        }
    }

    /// Asks for a trifle that every agent knows, and then for one that takes a leader: for some
    /// seconds an agent names one that is gone.
    async fn probe(&self, at: usize) -> Probe {
        match self.trifle(at, "/v1/status/leader", None).await {
            Ok(leader) if leader.trim_ascii() == b"\"\"" => return Probe::Leaderless,
            Err(Error::Status { status, .. }) if status.is_server_error() => {
                return Probe::Leaderless;
            }
            // Whatever it is, it answers.
            Ok(_) | Err(Error::Status { .. } | Error::Denied) => (),
            Err(error) => return Probe::Down(error.to_string()),
        }
        match self.trifle(at, "/v1/catalog/service/-", Some("consistent")).await {
            Err(Error::Status { status, .. }) if status.is_server_error() => Probe::Leaderless,
            Ok(_) | Err(Error::Status { .. } | Error::Denied) => Probe::Well,
            // It holds the question back until there is a leader.
            Err(_) => Probe::Leaderless,
        }
    }

    /// What needs no rights, and is answered in no time.
    async fn trifle(&self, at: usize, path: &str, query: Option<&str>) -> Result<Vec<u8>, Error> {
        let ready = self.credentials.ready();
        let (http, base) = &ready.http[at];
        let mut url = base.clone();
        url.set_path(path);
        url.set_query(query);
        let timeout = PROBE.min(self.agents.timeout);
        body(&mut succeeded(http.get(url).timeout(timeout)).await?, SMALL).await
    }
}

/// Asks one agent until it answers. There is one at a time.
struct Prober {
    client: Weak<Inner>,
    at: usize,
}

impl Prober {
    async fn run(self) {
        let mut was_away = false;
        // While it sleeps it keeps nothing alive.
        while let Some(client) = self.client.upgrade() {
            let probe = client.probe(self.at).await;
            client.reach(self.at).found(&probe);
            if probe == Probe::Well {
                // A query that failed while its agent is well has a trouble of its own.
                if was_away {
                    client.news.send_modify(|news| *news += 1);
                }
                return;
            }
            was_away = true;
            drop(client);
            sleep(EVERY).await;
        }
    }
}

impl Drop for Prober {
    fn drop(&mut self) {
        if let Some(client) = self.client.upgrade() {
            client.reach(self.at).end_probing();
        }
    }
}

fn parameters(query: &Query) -> Vec<(&'static str, String)> {
    query.parameters().map(|(parameter, value)| (parameter.name(), value.to_owned())).collect()
}

/// Sends a request; an answer with another status than 200 is an error.
async fn succeeded(request: RequestBuilder) -> Result<Response, Error> {
    let (http, request) = request.build_split();
    let request = request?;
    let token = request.headers().get(TOKEN).cloned();
    let mut response = http.execute(request).await?;
    let status = response.status();
    if status == StatusCode::OK {
        return Ok(response);
    }
    // The index of such an answer means nothing: 500 and 403 carry a 1.
    let text = body(&mut response, ERROR_TEXT * 4).await.unwrap_or_default();
    let mut text = String::from_utf8_lossy(&text).into_owned();
    if let Some(Ok(token)) = token.as_ref().map(HeaderValue::to_str) {
        // Some servers show in their error pages what they were asked.
        text = text.replace(token, "...");
    }
    Err(match status {
        StatusCode::FORBIDDEN => Error::Denied,
        _ => Error::Status { status, text: printable(text.as_bytes(), ERROR_TEXT) },
    })
}

/// The whole body, cut off while it streams where it grows over `limit` bytes.
async fn body(response: &mut Response, limit: usize) -> Result<Vec<u8>, Error> {
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await? {
        if chunk.len() > limit - body.len() {
            return Err(Error::TooLarge { limit });
        }
        body.extend_from_slice(&chunk);
    }
    // The task of the connection and the one that puts it back into the pool run now: otherwise
    // the next question, asked at once, would open another connection.
    for _ in 0..3 {
        yield_now().await;
    }
    Ok(body)
}
