//! A backend: an HTTP server that says its name.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::HeaderValue;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::{JoinHandle, JoinSet};

use crate::runtime;

/// Where Consul's checks ask; such requests are answered, not counted.
pub const HEALTH: &str = "/health";

/// A server in this process. It answers 200 with its name as the body and in `X-Backend`, and
/// keeps connections open.
pub struct Backend {
    addr: SocketAddr,
    state: Arc<State>,
    server: Option<(oneshot::Sender<()>, JoinHandle<()>)>,
}

struct State {
    name: Bytes,
    header: HeaderValue,
    status: AtomicU16,
    delay_us: AtomicU64,
    requests: AtomicU64,
    in_flight: AtomicUsize,
}

impl Backend {
    /// A backend on the network's host `host`, on a port of its own.
    pub fn start(net: &crate::Net, host: u8, name: &str) -> Backend {
        let addr = (net.ip(host), net.port()).into();
        Backend::bind(addr, name).unwrap_or_else(|e| panic!("backend {name} on {addr}: {e}"))
    }

    /// A backend on any address, IPv6 as well; port 0 is one that is free.
    pub fn bind(addr: SocketAddr, name: &str) -> io::Result<Backend> {
        let (addr, listener) = runtime::shared().block_on(listen(addr))?;
        let state = Arc::new(State::new(name)?);
        let (stop, stopped) = oneshot::channel();
        let server = runtime::shared().spawn(serve(listener, state.clone(), stopped));
        Ok(Backend { addr, state, server: Some((stop, server)) })
    }

    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// How many requests have come, checks of its health apart.
    pub fn requests(&self) -> u64 {
        self.state.requests.load(Ordering::Relaxed)
    }

    /// How many requests wait for their answer now.
    pub fn in_flight(&self) -> usize {
        self.state.in_flight.load(Ordering::Relaxed)
    }

    /// From now on each answer waits so long, those to checks of its health apart.
    pub fn set_delay(&self, delay: Duration) {
        self.state.delay_us.store(delay.as_micros() as u64, Ordering::Relaxed);
    }

    /// From now on each answer has this status.
    pub fn set_status(&self, status: u16) {
        assert!(StatusCode::from_u16(status).is_ok(), "{status} is no status");
        self.state.status.store(status, Ordering::Relaxed);
    }

    /// Ends at once, as by SIGKILL: the listener and all connections are closed when this returns.
    pub fn stop(mut self) {
        self.end();
    }

    fn end(&mut self) {
        if let Some((stop, server)) = self.server.take() {
            drop(stop);
            let _ = runtime::shared().block_on(server);
        }
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        self.end();
    }
}

/// A backend as the whole work of a process: returns only if it cannot listen.
pub fn serve_forever(addr: SocketAddr, name: &str) -> io::Error {
    let serve = async {
        let (_, listener) = listen(addr).await?;
        let (_stop, stopped) = oneshot::channel();
        serve(listener, Arc::new(State::new(name)?), stopped).await;
        Ok(())
    };
    match runtime::shared().block_on(serve) {
        Ok(()) => unreachable!("nobody stops this server"),
        Err(error) => error,
    }
}

impl State {
    fn new(name: &str) -> io::Result<State> {
        Ok(State {
            name: Bytes::copy_from_slice(name.as_bytes()),
            header: HeaderValue::from_str(name).map_err(io::Error::other)?,
            status: AtomicU16::new(200),
            delay_us: AtomicU64::new(0),
            requests: AtomicU64::new(0),
            in_flight: AtomicUsize::new(0),
        })
    }

    async fn answer(&self, request: Request<Incoming>) -> Response<Full<Bytes>> {
        if request.uri().path() != HEALTH {
            self.requests.fetch_add(1, Ordering::Relaxed);
            self.in_flight.fetch_add(1, Ordering::Relaxed);
            // A client that goes away drops this future: the count must go down with it.
            let _in_flight = Decrement(&self.in_flight);
            match self.delay_us.load(Ordering::Relaxed) {
                0 => {}
                delay => tokio::time::sleep(Duration::from_micros(delay)).await,
            }
        }
        let mut response = Response::new(Full::new(self.name.clone()));
        response.headers_mut().insert("x-backend", self.header.clone());
        if let Ok(status) = StatusCode::from_u16(self.status.load(Ordering::Relaxed)) {
            *response.status_mut() = status;
        }
        response
    }
}

struct Decrement<'a>(&'a AtomicUsize);

impl Drop for Decrement<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

async fn listen(addr: SocketAddr) -> io::Result<(SocketAddr, TcpListener)> {
    let listener = TcpListener::bind(addr).await?;
    Ok((listener.local_addr()?, listener))
}

/// Runs until the other end of `stopped` is dropped; then all sockets are closed.
async fn serve(listener: TcpListener, state: Arc<State>, mut stopped: oneshot::Receiver<()>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            _ = &mut stopped => break,
            accepted = listener.accept() => {
                // Too many open files, or a connection that its peer has given up: the next
                // connection is another matter.
                let Ok((stream, _)) = accepted else { continue };
                let _ = stream.set_nodelay(true);
                let state = state.clone();
                let service = service_fn(move |request| {
                    let state = state.clone();
                    async move { Ok::<_, Infallible>(state.answer(request).await) }
                });
                let io = TokioIo::new(stream);
                connections.spawn(http1::Builder::new().serve_connection(io, service));
            }
            Some(_ended) = connections.join_next() => {}
        }
    }
    drop(listener);
    connections.shutdown().await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::{self, Conn};
    use crate::{Net, eventually};

    const TIMEOUT: Duration = Duration::from_secs(5);

    #[test]
    fn answers_with_its_name_and_counts() {
        let net = Net::isolated();
        let backend = Backend::start(&net, 2, "one");
        let mut conn = Conn::open(backend.addr()).unwrap();
        for _ in 0..3 {
            let answer = conn.get("/").unwrap();
            assert_eq!((answer.status, answer.backend(), &*answer.text()), (200, "one", "one"));
        }
        conn.get(HEALTH).unwrap();
        assert_eq!(backend.requests(), 3);
        backend.set_status(503);
        assert_eq!(conn.get("/").unwrap().status, 503);
    }

    #[test]
    fn stops_at_once_with_a_request_in_flight() {
        let net = Net::isolated();
        let backend = Backend::start(&net, 2, "slow");
        let addr = backend.addr();
        backend.set_delay(Duration::from_secs(600));
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| http::get(addr, "/"));
            eventually(TIMEOUT, "the request is in flight", || backend.in_flight() == 1);
            let state = backend.state.clone();
            backend.stop();
            assert!(waiting.join().unwrap().is_err());
            eventually(TIMEOUT, "nothing is in flight", || {
                state.in_flight.load(Ordering::Relaxed) == 0
            });
        });
        assert!(http::get(addr, "/").is_err());
        // The address is free again for the next backend.
        let again = Backend::bind(addr, "again").unwrap();
        assert_eq!(http::get(addr, "/").unwrap().backend(), "again");
        drop(again);
    }
}
