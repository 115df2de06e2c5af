//! A Unix socket before another one, which fails in the ways a test asks for.
//!
//! It knows as much HTTP as is needed to see the first line of each connection's first request.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;

use crate::runtime;

/// How much of a request is read to find its first line.
const HEAD: usize = 16 << 10;

/// What happens to a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It is closed.
    Close,
    /// It stays open, and nothing comes.
    Hang,
    /// It is answered with this status, and closed.
    Status(u16),
}

/// The relay. Its connections end with the value.
pub struct Relay {
    path: PathBuf,
    shared: Arc<Shared>,
    task: tokio::task::JoinHandle<()>,
}

struct Shared {
    target: PathBuf,
    /// The fault of new connections whose first line holds the text.
    fault: Mutex<Option<(String, Fault)>>,
    /// The first line of each connection.
    seen: Mutex<Vec<String>>,
    /// Counts how often all connections were cut.
    cuts: watch::Sender<u64>,
}

impl Relay {
    /// Listens at a path, and passes on to another.
    pub fn start(path: PathBuf, target: impl Into<PathBuf>) -> Relay {
        let _guard = runtime::shared().enter();
        let listener = UnixListener::bind(&path)
            .unwrap_or_else(|error| panic!("listen at {}: {error}", path.display()));
        let shared = Arc::new(Shared {
            target: target.into(),
            fault: Mutex::default(),
            seen: Mutex::default(),
            cuts: watch::Sender::new(0),
        });
        let task = tokio::spawn(accept(listener, shared.clone()));
        Relay { path, shared, task }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Closes all connections.
    pub fn cut(&self) {
        self.shared.cuts.send_modify(|cuts| *cuts += 1);
    }

    /// New connections whose first line holds the text have this fault; an empty text is in all.
    pub fn fail(&self, text: &str, fault: Fault) {
        *lock(&self.shared.fault) = Some((text.to_owned(), fault));
    }

    /// New connections are well again.
    pub fn heal(&self) {
        *lock(&self.shared.fault) = None;
    }

    /// The first lines of all connections so far.
    pub fn seen(&self) -> Vec<String> {
        lock(&self.shared.seen).clone()
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.cut();
        self.task.abort();
        let _ = std::fs::remove_file(&self.path);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn accept(listener: UnixListener, shared: Arc<Shared>) {
    while let Ok((stream, _)) = listener.accept().await {
        let (shared, mut cuts) = (shared.clone(), shared.cuts.subscribe());
        cuts.mark_unchanged();
        tokio::spawn(async move {
            tokio::select! {
                // What becomes of a connection its two ends see.
                _ = pass_on(stream, &shared) => (),
                _ = cuts.changed() => (),
            }
        });
    }
}

async fn pass_on(mut client: UnixStream, shared: &Shared) -> io::Result<()> {
    let mut head = Vec::new();
    while !head.contains(&b'\n') && head.len() < HEAD {
        if client.read_buf(&mut head).await? == 0 {
            return Ok(());
        }
    }
    let line = head.split(|byte| *byte == b'\r' || *byte == b'\n').next().unwrap_or_default();
    let line = String::from_utf8_lossy(line).into_owned();
    lock(&shared.seen).push(line.clone());
    let fault = lock(&shared.fault).clone();
    match fault.filter(|(text, _)| line.contains(text)).map(|(_, fault)| fault) {
        None => {
            let mut server = UnixStream::connect(&shared.target).await?;
            server.write_all(&head).await?;
            copy_bidirectional(&mut client, &mut server).await?;
        }
        Some(Fault::Close) => (),
        Some(Fault::Hang) => std::future::pending().await,
        Some(Fault::Status(status)) => {
            let body = r#"{"message":"a fault of the relay"}"#;
            let answer = format!(
                "HTTP/1.1 {status} Fault\r\nContent-Type: application/json\r\n\
                 Content-Length: {}\r\nConnection: close\r\n\r\n{body}",
                body.len()
            );
            client.write_all(answer.as_bytes()).await?;
            client.shutdown().await?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::{UnixListener as Listener, UnixStream as Stream};
    use std::time::Duration;

    use super::*;
    use crate::Dir;

    fn ask(relay: &Relay, path: &str) -> io::Result<String> {
        let mut stream = Stream::connect(relay.path())?;
        stream.set_read_timeout(Some(Duration::from_millis(300)))?;
        write!(stream, "GET {path} HTTP/1.1\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(text)
    }

    #[test]
    fn it_fails_as_it_is_told() {
        let dir = Dir::new("relay");
        let server = Listener::bind(dir.join("server")).unwrap();
        std::thread::spawn(move || {
            while let Ok((mut stream, _)) = server.accept() {
                let _ = stream.read(&mut [0; 1024]);
                let _ = stream.write_all(b"well");
            }
        });
        let relay = Relay::start(dir.join("relay"), dir.join("server"));
        assert_eq!(ask(&relay, "/a").unwrap(), "well");
        relay.fail("/b", Fault::Status(500));
        assert_eq!(ask(&relay, "/a").unwrap(), "well");
        assert!(ask(&relay, "/b").unwrap().starts_with("HTTP/1.1 500 "));
        relay.fail("", Fault::Close);
        assert_eq!(ask(&relay, "/a").unwrap(), "");
        relay.fail("", Fault::Hang);
        assert!(ask(&relay, "/a").is_err());
        relay.heal();
        assert_eq!(ask(&relay, "/a").unwrap(), "well");
        assert_eq!(relay.seen().len(), 6);
        assert_eq!(relay.seen()[0], "GET /a HTTP/1.1");
    }

    #[test]
    fn a_cut_closes_what_is_open() {
        let dir = Dir::new("relay_cut");
        let _server = Listener::bind(dir.join("server")).unwrap();
        let relay = Relay::start(dir.join("relay"), dir.join("server"));
        let mut stream = Stream::connect(relay.path()).unwrap();
        stream.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        crate::eventually(Duration::from_secs(5), "a request", || !relay.seen().is_empty());
        relay.cut();
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        assert_eq!(stream.read(&mut [0; 10]).unwrap(), 0);
    }
}
