//! Backends that speak no HTTP: one for connections, which says its name and then keeps silent, as long
//! as the client stays; and one for datagrams, which answers each with its name and what was in it.

use std::io::{self, Read};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::oneshot;
use tokio::task::{JoinHandle, JoinSet};

use crate::runtime;

/// How long a greeting is waited for.
const PATIENCE: Duration = Duration::from_secs(20);

/// What runs until it is told to stop, or its value ends.
struct Task(Option<(oneshot::Sender<()>, JoinHandle<()>)>);

impl Task {
    fn spawn(work: impl Future<Output = ()> + Send + 'static) -> Task {
        let (stop, mut stopped) = oneshot::channel();
        let task = runtime::shared().spawn(async move {
            tokio::select! {
                _ = &mut stopped => {}
                () = work => {}
            }
        });
        Task(Some((stop, task)))
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        if let Some((stop, task)) = self.0.take() {
            drop(stop);
            let _ = runtime::shared().block_on(task);
        }
    }
}

/// A server for connections.
pub struct Greeter {
    addr: SocketAddr,
    open: Arc<AtomicUsize>,
    /// Ends with the value: then the listener and all connections are closed.
    _server: Task,
}

impl Greeter {
    /// One on the network's host `host`, on a port of its own.
    pub fn start(net: &crate::Net, host: u8, name: &str) -> Greeter {
        let addr: SocketAddr = (net.ip(host), net.port()).into();
        let listener = runtime::shared()
            .block_on(TcpListener::bind(addr))
            .unwrap_or_else(|e| panic!("greeter {name} on {addr}: {e}"));
        let open = Arc::new(AtomicUsize::new(0));
        let (counted, greeting) = (open.clone(), format!("{name}\n"));
        let server = Task::spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                tokio::select! {
                    accepted = listener.accept() => {
                        let Ok((stream, _)) = accepted else { continue };
                        connections.spawn(greet(stream, greeting.clone(), counted.clone()));
                    }
                    Some(_ended) = connections.join_next() => {}
                }
            }
        });
        Greeter { addr, open, _server: server }
    }

    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// How many connections are open.
    pub fn open(&self) -> usize {
        self.open.load(Ordering::Relaxed)
    }
}

async fn greet(mut stream: TcpStream, greeting: String, open: Arc<AtomicUsize>) {
    open.fetch_add(1, Ordering::Relaxed);
    if stream.write_all(greeting.as_bytes()).await.is_ok() {
        let mut rest = [0; 256];
        while stream.read(&mut rest).await.is_ok_and(|n| n > 0) {}
    }
    open.fetch_sub(1, Ordering::Relaxed);
}

/// A server for datagrams.
pub struct Datagrams {
    addr: SocketAddr,
    _server: Task,
}

impl Datagrams {
    /// One on the network's host `host`, on a port of its own.
    pub fn start(net: &crate::Net, host: u8, name: &str) -> Datagrams {
        let addr: SocketAddr = (net.ip(host), net.port()).into();
        let socket = runtime::shared()
            .block_on(UdpSocket::bind(addr))
            .unwrap_or_else(|e| panic!("datagrams {name} on {addr}: {e}"));
        let name = format!("{name} ");
        let server = Task::spawn(async move {
            let mut buffer = [0; 2048];
            loop {
                // An error is the answer to an answer whose receiver has gone.
                let Ok((len, from)) = socket.recv_from(&mut buffer).await else { continue };
                let answer = [name.as_bytes(), &buffer[..len]].concat();
                let _ = socket.send_to(&answer, from).await;
            }
        });
        Datagrams { addr, _server: server }
    }

    pub fn addr(&self) -> SocketAddr {
        self.addr
    }
}

/// A client's connection to a [`Greeter`], through whatever is between.
pub struct Greeted {
    stream: std::net::TcpStream,
    /// Who has greeted.
    pub name: String,
}

impl Greeted {
    /// Connects, and waits for the greeting.
    pub fn open(addr: SocketAddr) -> io::Result<Greeted> {
        let mut stream = std::net::TcpStream::connect(addr)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut name = Vec::new();
        loop {
            let mut byte = [0];
            match stream.read(&mut byte)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                _ if byte == *b"\n" => break,
                _ => name.extend(byte),
            }
        }
        stream.set_nonblocking(true)?;
        Ok(Greeted { stream, name: String::from_utf8_lossy(&name).into_owned() })
    }

    /// Whether it was closed from the other side.
    pub fn is_closed(&self) -> bool {
        match self.stream.peek(&mut [0]) {
            Ok(n) => n == 0,
            Err(error) => error.kind() != io::ErrorKind::WouldBlock,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Net, eventually};

    #[test]
    fn greets_and_notices_who_goes() {
        let net = Net::isolated();
        let greeter = Greeter::start(&net, 2, "one");
        let [first, second] = [(); 2].map(|()| Greeted::open(greeter.addr()).unwrap());
        assert_eq!((&*first.name, greeter.open()), ("one", 2));
        drop(first);
        eventually(PATIENCE, "one has gone", || greeter.open() == 1);
        assert!(!second.is_closed());
        drop(greeter);
        eventually(PATIENCE, "the other one is closed", || second.is_closed());
    }

    #[test]
    fn answers_datagrams() {
        let net = Net::isolated();
        let server = Datagrams::start(&net, 2, "one");
        let client = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        client.send_to(b"hello", server.addr()).unwrap();
        let mut buffer = [0; 64];
        let len = client.recv(&mut buffer).unwrap();
        assert_eq!(&buffer[..len], b"one hello");
    }
}
