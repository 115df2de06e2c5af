//! A Consul that answers what a test wants, when the test wants it, and remembers what it was
//! asked. It knows nothing of Consul but how a blocking query waits.

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Instant;

use serde_json::{Value, json};
use testbed::{Net, eventually};

use crate::common::PATIENCE;

pub struct FakeConsul {
    addr: SocketAddr,
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    script: Script,
    /// For what is no query of a service's health.
    others: Script,
    /// Counts the scripts.
    version: u64,
    /// How many requests there were before the last one.
    before: usize,
    requests: Vec<Request>,
    connections: Vec<TcpStream>,
    /// When the last answer was on its way as a whole.
    sent: Option<Instant>,
    ended: bool,
}

/// An answer to a request, or none while the request is held.
type Script = Arc<dyn Fn(&Request) -> Option<Reply> + Send + Sync>;

#[derive(Clone, Debug)]
pub struct Request {
    /// The path with its query.
    pub target: String,
    /// By lower-case name.
    pub headers: BTreeMap<String, String>,
}

impl Request {
    fn is_health(&self) -> bool {
        self.target.starts_with("/v1/health/")
    }

    /// The index that a blocking query waits on.
    pub fn index(&self) -> Option<u64> {
        let (_, query) = self.target.split_once('?')?;
        query.split('&').find_map(|pair| pair.strip_prefix("index="))?.parse().ok()
    }
}

/// An answer, byte by byte.
#[derive(Clone, Debug)]
pub struct Reply {
    status: u16,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
    end: End,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Whole,
    /// Half of the body, and then the connection is closed.
    Cut,
    /// Half of the body, and then nothing.
    Stalled,
}

impl Reply {
    pub fn new(status: u16, body: impl Into<Vec<u8>>) -> Reply {
        Reply { status, headers: Vec::new(), body: body.into(), end: End::Whole }
    }

    /// What Consul answers to a query of a service's health.
    pub fn health(index: u64, entries: &[Value]) -> Reply {
        Reply::new(200, json!(entries).to_string())
            .header("Content-Type", "application/json")
            .header("X-Consul-Index", &index.to_string())
    }

    #[must_use]
    pub fn header(mut self, name: &str, value: &str) -> Reply {
        self.headers.push((name.into(), value.into()));
        self
    }

    #[must_use]
    pub fn cut(mut self) -> Reply {
        self.end = End::Cut;
        self
    }

    #[must_use]
    pub fn stalled(mut self) -> Reply {
        self.end = End::Stalled;
        self
    }

    fn bytes(&self) -> Vec<u8> {
        let mut head = format!("HTTP/1.1 {} Whatever\r\n", self.status);
        for (name, value) in &self.headers {
            head += &format!("{name}: {value}\r\n");
        }
        head += &format!("Content-Length: {}\r\n\r\n", self.body.len());
        let sent = match self.end {
            End::Whole => &self.body[..],
            End::Cut | End::Stalled => &self.body[..self.body.len() / 2],
        };
        [head.as_bytes(), sent].concat()
    }
}

/// An entry of a health answer: a passing instance of the service `web` on the node `n1`.
pub fn entry(id: &str, addr: SocketAddr) -> Value {
    json!({
        "Node": { "Node": "n1", "Address": "127.0.0.1" },
        "Service": {
            "ID": id,
            "Service": "web",
            "Tags": [],
            "Address": addr.ip().to_string(),
            "Port": addr.port(),
            "Weights": { "Passing": 1, "Warning": 1 },
        },
        "Checks": [{ "CheckID": "serfHealth", "Status": "passing" }],
    })
}

impl FakeConsul {
    /// One that knows no instance, at index 1.
    pub fn start(net: &Net) -> FakeConsul {
        let listener = TcpListener::bind((net.ip(10), net.port())).expect("listen");
        let addr = listener.local_addr().expect("a listener has an address");
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                script: Arc::new(|_| None),
                others: Arc::new(|request| Some(other(request))),
                version: 0,
                before: 0,
                requests: Vec::new(),
                connections: Vec::new(),
                sent: None,
                ended: false,
            }),
            changed: Condvar::new(),
        });
        let accepting = shared.clone();
        thread::spawn(move || accept(&listener, &accepting));
        let fake = FakeConsul { addr, shared };
        fake.know(1, &[]);
        fake
    }

    /// As in `consul_address`.
    pub fn url(&self) -> String {
        format!("http://{}", self.addr)
    }

    /// From now on it knows these instances, at this index. A query that waits on that index is
    /// held.
    pub fn know(&self, index: u64, entries: &[Value]) {
        let reply = Reply::health(index, entries);
        self.script(move |request| (request.index() != Some(index)).then(|| reply.clone()));
    }

    /// From now on it answers this to everything, queries that it holds included.
    pub fn answer(&self, reply: Reply) {
        self.script(move |_| Some(reply.clone()));
    }

    /// From now on it answers what the script says. Queries that it holds are answered anew.
    pub fn script(&self, script: impl Fn(&Request) -> Option<Reply> + Send + Sync + 'static) {
        let mut state = self.shared.lock();
        state.script = Arc::new(script);
        state.version += 1;
        state.before = state.requests.len();
        self.shared.changed.notify_all();
    }

    /// From now on it answers this to what is no query of a service's health.
    #[allow(dead_code, reason = "for tests that are not switched on yet")]
    pub fn others(&self, script: impl Fn(&Request) -> Option<Reply> + Send + Sync + 'static) {
        self.shared.lock().others = Arc::new(script);
    }

    /// The queries of services' health so far.
    pub fn requests(&self) -> Vec<Request> {
        self.shared.lock().requests.clone()
    }

    /// Waits until it was asked so many times since it was told last what to answer.
    #[track_caller]
    pub fn wait_requests(&self, more: usize) {
        eventually(PATIENCE, &format!("{more} more queries"), || {
            let state = self.shared.lock();
            state.requests.len() >= state.before + more
        });
    }

    /// When the last answer was on its way as a whole, if there was one.
    #[allow(dead_code, reason = "a benchmark uses it")]
    pub fn sent(&self) -> Option<Instant> {
        self.shared.lock().sent
    }

    /// How often anybody has connected.
    pub fn connections(&self) -> usize {
        self.shared.lock().connections.len()
    }
}

impl Drop for FakeConsul {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.ended = true;
        for connection in &state.connections {
            let _ = connection.shutdown(std::net::Shutdown::Both);
        }
        self.shared.changed.notify_all();
        drop(state);
        // Its thread sees that it has ended.
        let _ = TcpStream::connect(self.addr);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The answer, waited for as long as the script holds the request. None at the end.
    fn reply(&self, request: &Request) -> Option<Reply> {
        let mut state = self.lock();
        if !request.is_health() {
            let others = state.others.clone();
            drop(state);
            return others(request);
        }
        while !state.ended {
            if let Some(reply) = (state.script)(request) {
                return Some(reply);
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        None
    }

    fn wait_for_another_script(&self) {
        let mut state = self.lock();
        let version = state.version;
        while !state.ended && state.version == version {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

fn accept(listener: &TcpListener, shared: &Arc<Shared>) {
    for stream in listener.incoming() {
        let Ok(stream) = stream else { continue };
        let mut state = shared.lock();
        if state.ended {
            return;
        }
        state.connections.push(stream.try_clone().expect("a second handle of a socket"));
        let shared = shared.clone();
        // Ends with the connection. What is wrong with it the client will say.
        thread::spawn(move || serve(stream, &shared));
    }
}

fn serve(mut stream: TcpStream, shared: &Shared) -> io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    while let Some(request) = read(&mut reader)? {
        if request.is_health() {
            shared.lock().requests.push(request.clone());
        }
        let Some(reply) = shared.reply(&request) else { break };
        stream.write_all(&reply.bytes())?;
        shared.lock().sent = Some(Instant::now());
        match reply.end {
            End::Whole => {}
            End::Cut => break,
            End::Stalled => {
                shared.wait_for_another_script();
                break;
            }
        }
    }
    stream.shutdown(std::net::Shutdown::Both)
}

/// What a Consul without ACLs says, which has a leader.
fn other(request: &Request) -> Reply {
    match request.target.split('?').next().unwrap_or_default() {
        "/v1/status/leader" => Reply::new(200, "\"127.0.0.1:8300\""),
        "/v1/internal/acl/authorize" => Reply::new(401, "ACL support disabled"),
        _ => Reply::new(404, ""),
    }
}

/// A request, whose body is of no interest, or none at the end of the connection.
fn read(reader: &mut impl BufRead) -> io::Result<Option<Request>> {
    let mut line = String::new();
    if reader.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    let target = line.split(' ').nth(1).unwrap_or_default().to_owned();
    let mut headers = BTreeMap::new();
    loop {
        line.clear();
        reader.read_line(&mut line)?;
        match line.trim_end().split_once(':') {
            Some((name, value)) => {
                headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
            }
            None => break,
        }
    }
    let len = headers.get("content-length").and_then(|len| len.parse().ok()).unwrap_or(0);
    io::copy(&mut reader.take(len), &mut io::sink())?;
    Ok(Some(Request { target, headers }))
}
