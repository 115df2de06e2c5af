//! An HTTP client for tests: it does what it is told once, and tells what came of it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1::{self, SendRequest};
use hyper::{HeaderMap, Request};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::TcpStream;
use tokio::runtime::Runtime;

use crate::runtime;

/// How long an answer may take, unless [`Conn::set_timeout`] says otherwise. A Consul whose leader hangs
/// holds a question back for 15.8 s.
const TIMEOUT: Duration = Duration::from_secs(30);

/// How many connections [`worker_conns`] opens for each worker until it gives up. The kernel
/// spreads them at random, so with four workers one is missed by 4 × 50 with odds of 10⁻²⁵.
const TRIES: usize = 50;

/// A whole answer.
#[derive(Clone, Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Answer {
    /// A header's value, or nothing.
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|e| panic!("not JSON ({e}): {}", self.text()))
    }

    /// The name of the backend that answered.
    pub fn backend(&self) -> &str {
        self.header("x-backend")
    }

    /// The process ID of the nginx worker that answered.
    pub fn worker(&self) -> Option<u32> {
        self.header("x-worker").parse().ok()
    }

    /// The addresses that nginx tried, in order. (Where it had none, `$upstream_addr` is the
    /// upstream's name, which is no address.)
    pub fn tried(&self) -> Vec<SocketAddr> {
        self.header("x-upstream").split([',', ' ']).filter_map(|part| part.parse().ok()).collect()
    }
}

/// One GET on a connection of its own.
pub fn get(addr: SocketAddr, path: &str) -> io::Result<Answer> {
    Conn::open(addr)?.get(path)
}

/// How `n` requests, one after the other on one connection, spread over backends. Answers that
/// are no backend's are counted by their status.
pub fn spread(addr: SocketAddr, n: usize) -> io::Result<BTreeMap<String, usize>> {
    let mut conn = Conn::open(addr)?;
    let mut spread = BTreeMap::new();
    for _ in 0..n {
        let answer = conn.get("/")?;
        let name = match answer.backend() {
            "" => answer.status.to_string(),
            name => name.to_owned(),
        };
        *spread.entry(name).or_default() += 1;
    }
    Ok(spread)
}

/// A connection to each of these workers, by the `X-Worker` of their answers.
pub fn worker_conns(
    addr: SocketAddr,
    workers: impl IntoIterator<Item = u32>,
) -> io::Result<HashMap<u32, Conn>> {
    let mut missing: BTreeSet<u32> = workers.into_iter().collect();
    let mut found = HashMap::new();
    for _ in 0..TRIES * missing.len() {
        if missing.is_empty() {
            break;
        }
        let mut conn = Conn::open(addr)?;
        let answer = conn.get("/")?;
        let worker = answer
            .worker()
            .ok_or_else(|| io::Error::other(format!("{addr} names no worker in X-Worker")))?;
        if missing.remove(&worker) {
            found.insert(worker, conn);
        }
    }
    if missing.is_empty() {
        Ok(found)
    } else {
        Err(io::Error::other(format!("no connection reached the workers {missing:?}")))
    }
}

/// A connection that is kept open. It lives in the thread that uses it (no other thread has to
/// be woken for an answer), so it is fit for measuring.
pub struct Conn {
    runtime: Runtime,
    sender: SendRequest<Full<Bytes>>,
    addr: SocketAddr,
    timeout: Duration,
}

impl Conn {
    pub fn open(addr: SocketAddr) -> io::Result<Conn> {
        let runtime = runtime::own()?;
        let sender = runtime.block_on(bounded(TIMEOUT, async {
            let stream = TcpStream::connect(addr).await?;
            stream.set_nodelay(true)?;
            let (sender, connection) =
                http1::handshake(TokioIo::new(stream)).await.map_err(io::Error::other)?;
            // Driven while a request waits. What becomes of the connection the next request says.
            tokio::spawn(connection);
            Ok(sender)
        }))?;
        Ok(Conn { runtime, sender, addr, timeout: TIMEOUT })
    }

    pub fn set_timeout(&mut self, timeout: Duration) {
        self.timeout = timeout;
    }

    pub fn get(&mut self, path: &str) -> io::Result<Answer> {
        self.request("GET", path, &[], Bytes::new())
    }

    pub fn request(
        &mut self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: impl Into<Bytes>,
    ) -> io::Result<Answer> {
        let request = request(self.addr, method, path, headers, body.into())?;
        let sender = &mut self.sender;
        self.runtime.block_on(bounded(self.timeout, async {
            exchange(sender, request).await.map_err(io::Error::other)
        }))
    }
}

async fn bounded<T>(timeout: Duration, work: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    match tokio::time::timeout(timeout, work).await {
        Ok(result) => result,
        Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, format!("nothing in {timeout:?}"))),
    }
}

pub(crate) fn request(
    addr: SocketAddr,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: Bytes,
) -> io::Result<Request<Full<Bytes>>> {
    let mut request = Request::builder().method(method).uri(path);
    if !headers.iter().any(|(name, _)| name.eq_ignore_ascii_case("host")) {
        request = request.header("host", addr.to_string());
    }
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    request.body(Full::new(body)).map_err(io::Error::other)
}

/// One request and its whole answer.
pub(crate) async fn exchange(
    sender: &mut SendRequest<Full<Bytes>>,
    request: Request<Full<Bytes>>,
) -> hyper::Result<Answer> {
    sender.ready().await?;
    let (head, body) = sender.send_request(request).await?.into_parts();
    let body = body.collect().await?.to_bytes();
    Ok(Answer { status: head.status.as_u16(), headers: head.headers, body })
}
