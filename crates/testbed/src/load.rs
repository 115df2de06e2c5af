//! Load, with every request accounted for.
//!
//! A load generator that quietly tries again makes any proxy look lossless. Here a request that
//! gets no good answer is lost. There is one exception, and it is counted: a server may close a
//! connection that is kept open at any time, and a request can cross that close on its way. A
//! client may send such a request again, on another connection, if the connection had served
//! before and not one byte of an answer has come (RFC 9112, 9.3.1); browsers do. An nginx worker
//! that ends closes its kept connections, so a reload under load shows these.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::ops::ControlFlow;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::Full;
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;

use crate::http::{Answer, exchange, request};
use crate::{eventually, runtime};

/// A request that has no answer by then is lost. More than what nginx waits for a backend that
/// does not accept, in the configurations of the tests.
const TIMEOUT: Duration = Duration::from_secs(20);

/// So many requests are waited for at a time.
const STEP: usize = 1_000;

/// How many of the backends, and of the losses, are described.
const DESCRIBED: usize = 10;

/// How requests are sent.
#[derive(Clone)]
pub struct Options {
    connections: usize,
    keepalive: bool,
    pause: Duration,
    path: Arc<dyn Fn(u64) -> String + Send + Sync>,
    headers: Vec<(String, String)>,
}

impl Default for Options {
    /// Four connections that are kept open, each sending its next request for `/` when it has the
    /// last answer.
    fn default() -> Options {
        Options {
            connections: 4,
            keepalive: true,
            pause: Duration::ZERO,
            path: Arc::new(|_| "/".into()),
            headers: Vec::new(),
        }
    }
}

impl Options {
    #[must_use]
    pub fn connections(mut self, n: usize) -> Options {
        self.connections = n;
        self
    }

    /// Whether connections are kept open, or each request has a new one.
    #[must_use]
    pub fn keepalive(mut self, on: bool) -> Options {
        self.keepalive = on;
        self
    }

    /// How long each connection rests after an answer.
    #[must_use]
    pub fn pause(mut self, pause: Duration) -> Options {
        self.pause = pause;
        self
    }

    /// The path of the request with this number, counted over all connections: for balancers that
    /// go by it.
    #[must_use]
    pub fn path(mut self, path: impl Fn(u64) -> String + Send + Sync + 'static) -> Options {
        self.path = Arc::new(path);
        self
    }

    #[must_use]
    pub fn header(mut self, name: &str, value: &str) -> Options {
        self.headers.push((name.into(), value.into()));
        self
    }
}

/// What became of the requests.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Answered with 2xx and the body of the backend named in `X-Backend`.
    pub ok: u64,
    /// Everything else.
    pub lost: u64,
    /// Of the lost: those whose connection broke before the whole answer was there.
    pub broken: u64,
    /// Of all: those sent a second time, since their connection had been closed under them.
    pub reconnected: u64,
    /// Of those answered well: where nginx had to try more than one backend.
    pub retried: u64,
    /// Connections opened.
    pub connections: u64,
    /// How many of those answered well each backend had.
    pub backends: BTreeMap<String, u64>,
    /// The nginx workers that answered, by `X-Worker`.
    pub workers: BTreeSet<u32>,
    /// The first of the lost ones.
    pub losses: Vec<Loss>,
    pub elapsed: Duration,
}

/// A lost request.
#[derive(Clone, Debug)]
pub struct Loss {
    /// Since the start of the load.
    pub at: Duration,
    pub path: String,
    pub why: String,
    /// `X-Upstream` of the answer, if there was one: what nginx had tried.
    pub upstream: String,
}

impl Report {
    /// Requests that have come to an end, good or bad.
    pub fn sent(&self) -> u64 {
        self.ok + self.lost
    }

    #[track_caller]
    pub fn assert_nothing_lost(&self) {
        assert!(self.ok > 0, "there were no requests at all: {self}");
        assert!(self.lost == 0, "{self}");
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} requests in {:.1} s, {} lost, {} reconnected, {} retried by nginx",
            self.sent(),
            self.elapsed.as_secs_f64(),
            self.lost,
            self.reconnected,
            self.retried,
        )?;
        for (name, count) in self.backends.iter().take(DESCRIBED) {
            write!(f, ", {name}: {count}")?;
        }
        if self.backends.len() > DESCRIBED {
            write!(f, " and {} more backends", self.backends.len() - DESCRIBED)?;
        }
        for loss in &self.losses {
            write!(
                f,
                "\n  lost after {:.3} s: {}: {}",
                loss.at.as_secs_f64(),
                loss.path,
                loss.why
            )?;
            if !loss.upstream.is_empty() {
                write!(f, " (nginx tried {})", loss.upstream)?;
            }
        }
        Ok(())
    }
}

/// Load that runs beside a test until it is stopped.
pub struct Load {
    shared: Arc<Shared>,
    clients: Vec<JoinHandle<()>>,
}

struct Shared {
    addr: SocketAddr,
    options: Options,
    started: Instant,
    stop: AtomicBool,
    next: AtomicU64,
    limit: u64,
    report: Mutex<Report>,
}

impl Load {
    /// Load until [`Load::stop`].
    pub fn start(addr: SocketAddr, options: &Options) -> Load {
        Load::limited(addr, u64::MAX, options)
    }

    /// So many requests, now.
    pub fn run(addr: SocketAddr, requests: u64, options: &Options) -> Report {
        Load::limited(addr, requests, options).join()
    }

    fn limited(addr: SocketAddr, limit: u64, options: &Options) -> Load {
        let shared = Arc::new(Shared {
            addr,
            options: options.clone(),
            started: Instant::now(),
            stop: AtomicBool::new(false),
            next: AtomicU64::new(0),
            limit,
            report: Mutex::default(),
        });
        let clients = (0..options.connections)
            .map(|_| runtime::shared().spawn(client(shared.clone())))
            .collect();
        Load { shared, clients }
    }

    /// What has become of the requests so far.
    pub fn report(&self) -> Report {
        let mut report = self.shared.report().clone();
        report.elapsed = self.shared.started.elapsed();
        report
    }

    /// Waits until so many more requests have come to an end. How long very many of them take is the
    /// business of who wants them: only some of them are waited for in vain.
    #[track_caller]
    pub fn wait_for(&self, more: u64) {
        let begin = self.shared.report().sent();
        let steps = (begin..begin + more).step_by(STEP).skip(1);
        for target in steps.chain([begin + more]) {
            eventually(TIMEOUT + Duration::from_secs(60), "more requests", || {
                let sent = self.shared.report().sent();
                if sent >= target { Ok(()) } else { Err(format!("{} to go", target - sent)) }
            });
        }
    }

    /// Lets the requests under way come to their end and sends no more.
    pub fn stop(self) -> Report {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.join()
    }

    fn join(mut self) -> Report {
        for client in self.clients.drain(..) {
            runtime::shared().block_on(client).expect("a client of the load does not panic");
        }
        self.report()
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        // A test that fails drops its load without asking: nothing is waited for.
        for client in &self.clients {
            client.abort();
        }
    }
}

impl Shared {
    fn report(&self) -> MutexGuard<'_, Report> {
        self.report.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn next_request(&self) -> Option<u64> {
        if self.stop.load(Ordering::Relaxed) {
            return None;
        }
        let n = self.next.fetch_add(1, Ordering::Relaxed);
        (n < self.limit).then_some(n)
    }
}

/// A client with one connection at a time.
async fn client(shared: Arc<Shared>) {
    let mut kept = None;
    while let Some(n) = shared.next_request() {
        let path = (shared.options.path)(n);
        let outcome = match tokio::time::timeout(TIMEOUT, send(&shared, &path, &mut kept)).await {
            Ok(Ok(answer)) => judge(answer),
            Ok(Err(error)) => {
                shared.report().broken += 1;
                Err((describe(&error), String::new()))
            }
            Err(_) => Err((format!("no answer in {TIMEOUT:?}"), String::new())),
        };
        if outcome.is_err() {
            // What else such a connection would answer is not worth knowing.
            kept = None;
        }
        record(&shared, path, outcome);
        if !shared.options.pause.is_zero() {
            tokio::time::sleep(shared.options.pause).await;
        }
    }
}

/// Sends a request on the connection that is kept, or on a new one.
async fn send(shared: &Shared, path: &str, kept: &mut Option<Connection>) -> io::Result<Answer> {
    if let Some(mut connection) = kept.take() {
        // Closed and seen to be: nothing was sent on it, so nothing is sent twice.
        if connection.sender.ready().await.is_ok() {
            match connection.try_send(shared, path).await? {
                ControlFlow::Break(answer) => {
                    *kept = Some(connection);
                    return Ok(answer);
                }
                ControlFlow::Continue(_closed) => shared.report().reconnected += 1,
            }
        }
    }
    let mut connection = Connection::open(shared.addr).await?;
    shared.report().connections += 1;
    let answer = match connection.try_send(shared, path).await? {
        ControlFlow::Break(answer) => answer,
        ControlFlow::Continue(closed) => return Err(io::Error::other(closed)),
    };
    if shared.options.keepalive {
        *kept = Some(connection);
    }
    Ok(answer)
}

struct Connection {
    sender: SendRequest<Full<Bytes>>,
    /// How many bytes have come.
    received: Arc<AtomicU64>,
}

impl Connection {
    async fn open(addr: SocketAddr) -> io::Result<Connection> {
        let stream = TcpStream::connect(addr).await?;
        stream.set_nodelay(true)?;
        let received = Arc::new(AtomicU64::new(0));
        let stream = Counted { stream, received: received.clone() };
        let (sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(io::Error::other)?;
        tokio::spawn(connection);
        Ok(Connection { sender, received })
    }

    /// One request; goes on where the connection failed before the first byte of an answer.
    async fn try_send(
        &mut self,
        shared: &Shared,
        path: &str,
    ) -> io::Result<ControlFlow<Answer, hyper::Error>> {
        let mut headers: Vec<(&str, &str)> =
            shared.options.headers.iter().map(|(name, value)| (&**name, &**value)).collect();
        if !shared.options.keepalive {
            headers.push(("connection", "close"));
        }
        let request = request(shared.addr, "GET", path, &headers, Bytes::new())?;
        let before = self.received.load(Ordering::Relaxed);
        match exchange(&mut self.sender, request).await {
            Ok(answer) => Ok(ControlFlow::Break(answer)),
            Err(error) if self.received.load(Ordering::Relaxed) == before => {
                Ok(ControlFlow::Continue(error))
            }
            Err(error) => Err(io::Error::other(error)),
        }
    }
}

/// A stream that counts what it reads.
struct Counted {
    stream: TcpStream,
    received: Arc<AtomicU64>,
}

impl AsyncRead for Counted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let result = Pin::new(&mut self.stream).poll_read(cx, buf);
        self.received.fetch_add((buf.filled().len() - before) as u64, Ordering::Relaxed);
        result
    }
}

impl AsyncWrite for Counted {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// A good answer, or why it is none and what nginx had tried.
fn judge(answer: Answer) -> Result<Answer, (String, String)> {
    let why = if !(200..300).contains(&answer.status) {
        format!("status {}", answer.status)
    } else if answer.backend().is_empty() {
        "no backend's answer".into()
    } else if answer.body != answer.backend() {
        format!("the body is not {}'s: {:?}", answer.backend(), answer.text())
    } else {
        return Ok(answer);
    };
    Err((why, answer.header("x-upstream").to_owned()))
}

fn record(shared: &Shared, path: String, outcome: Result<Answer, (String, String)>) {
    let mut report = shared.report();
    match outcome {
        Ok(answer) => {
            report.ok += 1;
            report.retried += u64::from(answer.tried().len() > 1);
            report.workers.extend(answer.worker());
            match report.backends.get_mut(answer.backend()) {
                Some(count) => *count += 1,
                None => {
                    report.backends.insert(answer.backend().to_owned(), 1);
                }
            }
        }
        Err((why, upstream)) => {
            report.lost += 1;
            if report.losses.len() < DESCRIBED {
                let at = shared.started.elapsed();
                report.losses.push(Loss { at, path, why, upstream });
            }
        }
    }
}

/// An error with its causes: hyper's alone says little.
fn describe(error: &io::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.get_ref().and_then(|inner| inner.source());
    while let Some(inner) = cause {
        text += &format!(": {inner}");
        cause = inner.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpListener;

    use super::*;
    use crate::{Backend, Net};

    #[test]
    fn every_request_is_counted() {
        for keepalive in [true, false] {
            let net = Net::isolated();
            let backend = Backend::start(&net, 2, "one");
            let options = Options::default().connections(3).keepalive(keepalive);
            let report = Load::run(backend.addr(), 300, &options);
            report.assert_nothing_lost();
            assert_eq!((report.ok, report.backends["one"]), (300, 300));
            // Which of the clients sends how many of them is luck, and one that sends none has no
            // connection.
            let connections = if keepalive { 1..=3 } else { 300..=300 };
            assert!(connections.contains(&report.connections), "{}", report.connections);
            assert_eq!(backend.requests(), 300);
        }
    }

    #[test]
    fn a_bad_status_and_a_refused_connection_are_losses() {
        let net = Net::isolated();
        let backend = Backend::start(&net, 2, "one");
        let load = Load::start(backend.addr(), &Options::default());
        load.wait_for(100);
        assert_eq!(load.report().lost, 0);
        backend.set_status(502);
        load.wait_for(100);
        let before = load.report().lost;
        assert!(before > 0);
        backend.stop();
        load.wait_for(100);
        let report = load.stop();
        assert!(report.lost >= before + 90, "{report}");
        assert_eq!(report.losses.len(), DESCRIBED);
        assert!(report.losses[0].why.contains("502"), "{report}");
    }

    /// A server that answers the first request of each connection, and closes the connection when
    /// the second comes, having sent `scrap` of an answer.
    fn closes_on_the_second(scrap: &'static [u8]) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let mut buf = [0; 4096];
                if stream.read(&mut buf).unwrap_or(0) > 0 {
                    let good = b"HTTP/1.1 200 OK\r\nX-Backend: b\r\nContent-Length: 1\r\n\r\nb";
                    stream.write_all(good).unwrap();
                    if stream.read(&mut buf).unwrap_or(0) > 0 {
                        stream.write_all(scrap).unwrap();
                    }
                }
            }
        });
        addr
    }

    #[test]
    fn a_request_that_crossed_a_close_is_sent_again_and_counted() {
        let report = Load::run(closes_on_the_second(b""), 9, &Options::default().connections(1));
        // Each connection serves one request and has one fail, which the next one serves.
        assert_eq!((report.ok, report.lost, report.reconnected), (9, 0, 8), "{report}");
    }

    #[test]
    fn half_an_answer_is_a_loss() {
        let addr = closes_on_the_second(b"HTTP/1.1 200");
        let report = Load::run(addr, 10, &Options::default().connections(1));
        assert_eq!((report.ok, report.lost, report.reconnected), (5, 5, 0), "{report}");
    }

    #[test]
    fn a_body_of_another_is_a_loss() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let _ = stream.read(&mut [0; 4096]);
            let wrong = b"HTTP/1.1 200 OK\r\nX-Backend: a\r\nContent-Length: 1\r\n\r\nb";
            stream.write_all(wrong).unwrap();
        });
        let report = Load::run(addr, 1, &Options::default().connections(1));
        assert_eq!((report.ok, report.lost), (0, 1));
        assert!(report.losses[0].why.contains("the body is not a's"), "{report}");
    }
}
