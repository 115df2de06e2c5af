//! A Consul that answers what a test wants, over a real socket, and remembers what it was asked.

#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use consul_watch::agent::Address;
use consul_watch::{Agents, Error, Pool, Query};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, UnixListener};
use tokio::task::{AbortHandle, JoinSet};

/// One request.
#[derive(Clone, Debug)]
pub struct Request {
    /// The method, and the path with its query.
    pub line: String,
    /// By lower-case name.
    pub headers: BTreeMap<String, String>,
    pub body: String,
}

impl Request {
    pub fn is_for(&self, path: &str) -> bool {
        self.line.split(' ').nth(1).is_some_and(|target| target.starts_with(path))
    }
}

/// The bytes of an answer, after a while.
#[derive(Clone)]
pub struct Reply(pub Vec<u8>, pub Duration);

impl Reply {
    pub fn new(status: u16, headers: &str, body: &str) -> Self {
        let len = body.len();
        let head = format!("HTTP/1.1 {status} x\r\nContent-Length: {len}\r\n{headers}\r\n");
        Self((head + body).into(), Duration::ZERO)
    }

    /// A health answer.
    pub fn health(index: u64, body: &str) -> Self {
        Self::new(200, &format!("X-Consul-Index: {index}\r\n"), body)
    }

    pub fn after(mut self, time: Duration) -> Self {
        self.1 = time;
        self
    }
}

type Script = Arc<dyn Fn(&Request) -> Reply + Send + Sync>;

/// The server; it ends with the value, and so do all its connections.
pub struct Fake {
    pub addr: SocketAddr,
    seen: Arc<Mutex<Seen>>,
    task: AbortHandle,
}

#[derive(Default)]
struct Seen {
    requests: Vec<Request>,
    connections: usize,
    open: usize,
    most: usize,
}

impl Fake {
    /// One that answers what the script says.
    pub async fn start(script: impl Fn(&Request) -> Reply + Send + Sync + 'static) -> Self {
        let free = "127.0.0.1:0".parse().unwrap();
        Self::start_at(free, script).await
    }

    pub async fn start_at(
        addr: SocketAddr,
        script: impl Fn(&Request) -> Reply + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind(addr).await.unwrap();
        let addr = listener.local_addr().unwrap();
        let seen: Arc<Mutex<Seen>> = Arc::default();
        let (script, shared): (Script, _) = (Arc::new(script), seen.clone());
        let task = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                connections.spawn(serve(stream, script.clone(), shared.clone()));
            }
        });
        Self { addr, seen, task: task.abort_handle() }
    }

    /// The same at a Unix socket.
    pub async fn start_unix(
        path: &Path,
        script: impl Fn(&Request) -> Reply + Send + Sync + 'static,
    ) -> Self {
        let listener = UnixListener::bind(path).unwrap();
        let seen: Arc<Mutex<Seen>> = Arc::default();
        let (script, shared): (Script, _) = (Arc::new(script), seen.clone());
        let task = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                connections.spawn(serve(stream, script.clone(), shared.clone()));
            }
        });
        Self { addr: ([0, 0, 0, 0], 0).into(), seen, task: task.abort_handle() }
    }

    pub fn address(&self) -> Address {
        Address::parse(&format!("http://{}", self.addr)).unwrap()
    }

    /// What it was asked under a path.
    pub fn requests(&self, path: &str) -> Vec<Request> {
        let seen = self.seen.lock().unwrap();
        seen.requests.iter().filter(|request| request.is_for(path)).cloned().collect()
    }

    /// How many connections there were, and how many at once.
    pub fn connections(&self) -> (usize, usize) {
        let seen = self.seen.lock().unwrap();
        (seen.connections, seen.most)
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    script: Script,
    seen: Arc<Mutex<Seen>>,
) {
    /// Counts a connection for as long as it is open.
    struct Open(Arc<Mutex<Seen>>);
    impl Drop for Open {
        fn drop(&mut self) {
            self.0.lock().unwrap().open -= 1;
        }
    }
    {
        let mut seen = seen.lock().unwrap();
        seen.connections += 1;
        seen.open += 1;
        seen.most = seen.most.max(seen.open);
    }
    let _open = Open(seen.clone());
    while let Some(request) = read(&mut stream).await {
        seen.lock().unwrap().requests.push(request.clone());
        let Reply(bytes, after) = script(&request);
        tokio::time::sleep(after).await;
        if stream.write_all(&bytes).await.is_err() {
            return;
        }
    }
}

async fn read(stream: &mut (impl AsyncRead + Unpin)) -> Option<Request> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.ok()?);
    }
    let head = String::from_utf8(head).unwrap();
    let mut lines = head.lines();
    let line = lines.next().unwrap().to_owned();
    let headers: BTreeMap<_, _> = lines
        .filter_map(|line| line.split_once(": "))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()))
        .collect();
    let len = headers.get("content-length").map_or(0, |len| len.parse().unwrap());
    let mut body = vec![0; len];
    stream.read_exact(&mut body).await.ok()?;
    Some(Request { line, headers, body: String::from_utf8(body).unwrap() })
}

/// The body of `/v1/agent/self`.
pub fn about(datacenter: &str, version: &str) -> Reply {
    let body = format!(r#"{{"Config":{{"Datacenter":"{datacenter}","Version":"{version}"}}}}"#);
    Reply::new(200, "", &body)
}

/// One instance on a node.
pub fn instance(node: &str, id: &str) -> String {
    format!(
        r#"{{"Node":{{"Node":"{node}","Address":"10.0.0.1"}},"Service":{{"ID":"{id}","Port":80}}}}"#
    )
}

pub fn agents(addresses: impl IntoIterator<Item = Address>) -> Agents {
    let mut addresses = addresses.into_iter();
    let first = Agents::at(addresses.next().unwrap());
    Agents {
        addresses: first.addresses.clone().into_iter().chain(addresses).collect(),
        timeout: Duration::from_secs(2),
        wait: Duration::from_secs(1),
        ..first
    }
}

pub fn web() -> Query {
    Query::new("web").unwrap()
}

/// A pool that collects what it warns of.
pub fn pool(connections: usize) -> (Pool, Arc<Mutex<Vec<String>>>) {
    let warnings: Arc<Mutex<Vec<String>>> = Arc::default();
    let told = warnings.clone();
    (Pool::new(connections, move |text| told.lock().unwrap().push(text)), warnings)
}

/// The innermost error.
pub fn inner(error: Error) -> Error {
    match error {
        Error::At { error, .. } => inner(*error),
        other => other,
    }
}
