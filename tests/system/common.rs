//! What the tests share: a stage of real parts, and how to see what nginx does.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, SocketAddrV4, TcpStream};
use std::thread;
use std::time::Duration;

use testbed::http::{self, Conn};
use testbed::{
    Backend, Consul, Dir, Net, Nginx, Options, Protocol, Service, consul, eventually, nginx,
};

/// How long anything may take that is waited for. The slowest are checks of Consul's, which run
/// once a second, and questions after errors, which are seconds apart.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// What [`met`] says of a request for which nginx had to try more than one server.
pub const RETRIED: &str = "retried";

/// A network, a directory and a Consul: what most tests begin with.
pub struct Stage {
    pub net: Net,
    pub dir: Dir,
    pub consul: Consul,
}

impl Stage {
    pub fn set(name: &str) -> Stage {
        Stage::with(name, |consul| consul)
    }

    /// The same, with a Consul of another kind.
    pub fn with(name: &str, change: impl FnOnce(consul::Builder) -> consul::Builder) -> Stage {
        let (net, dir) = (Net::isolated(), Dir::new(name));
        let consul = change(Consul::builder(&net, &dir)).start();
        Stage { net, dir, consul }
    }

    /// An nginx that asks this Consul.
    pub fn nginx(&self) -> nginx::Builder {
        asking(&self.net, &self.dir, &self.consul.url())
    }

    /// The same, in the block of a protocol.
    pub fn nginx_of(&self, of: Protocol) -> nginx::Builder {
        asking_of(of, &self.net, &self.dir, &self.consul.url())
    }

    /// Instances of the service `web`, not registered yet.
    pub fn web<const N: usize>(&self) -> [Instance; N] {
        web(&self.net)
    }

    pub fn register<'a>(&self, instances: impl IntoIterator<Item = &'a Instance>) {
        let services: Vec<_> = instances.into_iter().map(|it| it.service.clone()).collect();
        self.consul.register_all(&services);
    }
}

/// An nginx that asks the Consul at `url`.
pub fn asking(net: &Net, dir: &Dir, url: &str) -> nginx::Builder {
    asking_of(Protocol::Http, net, dir, url)
}

/// The same, in the block of a protocol.
pub fn asking_of(of: Protocol, net: &Net, dir: &Dir, url: &str) -> nginx::Builder {
    Nginx::builder(net, dir).block(of, format!("consul_address {url};"))
}

/// An upstream with a zone, and a server that passes everything to it.
pub trait Serve: Sized {
    #[must_use]
    fn upstream(self, name: &str, directives: &str) -> Self {
        self.upstream_of(Protocol::Http, name, directives)
    }

    /// The same, in the block of a protocol.
    #[must_use]
    fn upstream_of(self, of: Protocol, name: &str, directives: &str) -> Self;
}

impl Serve for nginx::Builder {
    fn upstream_of(self, of: Protocol, name: &str, directives: &str) -> Self {
        self.block(of, format!("upstream {name} {{\nzone {name} 256k;\n{directives}\n}}"))
            .server_of(of, name)
    }
}

/// A backend, and what is told to Consul of it.
pub struct Instance {
    pub backend: Backend,
    pub service: Service,
}

impl Instance {
    pub fn start(net: &Net, service: &str, id: &str) -> Instance {
        let backend = Backend::start(net, 20, id);
        let service = Service::new(service, id, backend.addr());
        Instance { backend, service }
    }

    /// Changes what is told to Consul.
    #[must_use]
    pub fn with(mut self, change: impl FnOnce(Service) -> Service) -> Instance {
        self.service = change(self.service);
        self
    }

    pub fn addr(&self) -> SocketAddr {
        self.backend.addr()
    }
}

/// Instances of the service `web`: `web-1` and so on.
pub fn web<const N: usize>(net: &Net) -> [Instance; N] {
    std::array::from_fn(|n| Instance::start(net, "web", &format!("web-{}", n + 1)))
}

/// Whether what a process has of memory is its need: AddressSanitizer keeps what was freed for a while.
pub fn memory_counts() -> bool {
    std::env::var_os("ASAN_OPTIONS").is_none()
}

/// Whether the tests run at the size of the bars: `make test-full`.
pub fn full() -> bool {
    std::env::var_os("TEST_FULL").is_some()
}

/// A count in short, and at the size of the bars.
pub fn scaled(short: usize, long: usize) -> usize {
    if full() { long } else { short }
}

/// Some hundred requests a second, as long as a test lasts. Without `keepalive` each of them is a
/// connection to a backend, and there are kernels that remember every closed connection of the
/// machine for two minutes, in a table of bounded size: all tests together must not fill it.
pub fn steady() -> Options {
    Options::default().pause(Duration::from_millis(5))
}

/// What the next requests on a connection meet: the names of backends; for an answer that is no
/// backend's its status.
pub fn met(conn: &mut Conn, requests: usize) -> io::Result<BTreeSet<String>> {
    let mut met = BTreeSet::new();
    for _ in 0..requests {
        let answer = conn.get("/")?;
        met.insert(match answer.backend() {
            "" => answer.status.to_string(),
            name => name.to_owned(),
        });
        if answer.tried().len() > 1 {
            met.insert(RETRIED.to_owned());
        }
    }
    Ok(met)
}

/// So many requests meet every backend of a set, if each has a weight of 1, and also where the
/// requests of somebody else come in between.
fn enough(expected: &[&str]) -> usize {
    4 * expected.len().max(5)
}

/// Waits for a condition that takes requests to look at, with a rest between two looks: see
/// [`steady`].
#[track_caller]
pub fn watch<T>(what: &str, mut look: impl FnMut() -> Result<T, String>) -> T {
    const REST: Duration = Duration::from_millis(25);
    eventually(PATIENCE, what, || look().inspect_err(|_| thread::sleep(REST)))
}

/// A connection whose bytes a test sends as it likes.
pub struct RawConn {
    reader: BufReader<TcpStream>,
}

impl RawConn {
    /// A connection to this worker.
    #[track_caller]
    pub fn to_worker(addr: SocketAddr, worker: u32) -> RawConn {
        for _ in 0..200 {
            let stream = TcpStream::connect(addr).unwrap();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            let mut conn = RawConn { reader: BufReader::new(stream) };
            conn.send("GET / HTTP/1.1\r\nHost: any\r\n\r\n");
            let (head, _) = conn.answer();
            if head.contains(&format!("\nX-Worker: {worker}\r")) {
                return conn;
            }
        }
        panic!("no connection reached worker {worker}");
    }

    pub fn send(&mut self, text: &str) {
        self.reader.get_mut().write_all(text.as_bytes()).unwrap();
    }

    /// The head of the next answer, and its body, if it has a length.
    pub fn answer(&mut self) -> (String, String) {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            assert!(self.reader.read_line(&mut head).unwrap() > 0, "cut off after {head:?}");
        }
        let len = head.lines().find_map(|line| {
            let (name, value) = line.split_once(": ")?;
            name.eq_ignore_ascii_case("content-length").then(|| value.parse().ok())?
        });
        let mut body = vec![0; len.unwrap_or(0)];
        self.reader.read_exact(&mut body).unwrap();
        (head, String::from_utf8(body).unwrap())
    }
}

fn names(expected: &[&str]) -> BTreeSet<String> {
    expected.iter().map(|&name| name.to_owned()).collect()
}

/// Waits until requests meet these backends, all of them and no others.
#[track_caller]
pub fn serves(addr: SocketAddr, expected: &[&str]) {
    watch(&format!("{addr} serves {expected:?}"), || {
        let met = met(&mut Conn::open(addr).map_err(text)?, enough(expected)).map_err(text)?;
        if met == names(expected) { Ok(()) } else { Err(format!("{met:?}")) }
    });
}

/// What the next requests meet, each on a connection of its own: that is how those meet several servers
/// that nginx passes on as a stream.
pub fn met_anew(addr: SocketAddr, requests: usize) -> io::Result<BTreeSet<String>> {
    let mut met = BTreeSet::new();
    for _ in 0..requests {
        met.insert(match http::get(addr, "/") {
            Ok(answer) => answer.backend().to_owned(),
            // nginx has accepted it, and has nobody to pass it to.
            Err(_) => "nobody".to_owned(),
        });
    }
    Ok(met)
}

/// Waits until such requests meet these backends, all of them and no others.
#[track_caller]
pub fn serves_anew(addr: SocketAddr, expected: &[&str]) {
    watch(&format!("{addr} serves {expected:?}"), || {
        let met = met_anew(addr, enough(expected)).map_err(text)?;
        if met == names(expected) { Ok(()) } else { Err(format!("{met:?}")) }
    });
}

/// The same, now.
#[track_caller]
pub fn serves_anew_now(addr: SocketAddr, expected: &[&str]) {
    assert_eq!(met_anew(addr, enough(expected)).unwrap(), names(expected));
}

/// Requests on one connection meet them now.
#[track_caller]
pub fn serves_now(addr: SocketAddr, expected: &[&str]) {
    let met = met(&mut Conn::open(addr).unwrap(), enough(expected)).unwrap();
    assert_eq!(met, names(expected));
}

/// Waits until each worker serves these.
#[track_caller]
pub fn every_worker_serves(nginx: &Nginx, expected: &[&str]) {
    for (pid, mut conn) in http::worker_conns(nginx.addr(), nginx.worker_pids()).unwrap() {
        watch(&format!("worker {pid} serves {expected:?}"), || {
            let met = met(&mut conn, enough(expected)).map_err(text)?;
            if met == names(expected) { Ok(()) } else { Err(format!("{met:?}")) }
        });
    }
}

/// Waits until requests spread in exactly these shares.
#[track_caller]
pub fn shares(addr: SocketAddr, expected: &[(&str, usize)]) {
    let expected: BTreeMap<String, usize> =
        expected.iter().map(|&(name, share)| (name.to_owned(), share)).collect();
    let sum = expected.values().sum();
    watch(&format!("{sum} requests spread as {expected:?}"), || {
        let spread = http::spread(addr, sum).map_err(text)?;
        if spread == expected { Ok(()) } else { Err(format!("{spread:?}")) }
    });
}

/// The addresses that the next requests are passed to.
pub fn passed_to(addr: SocketAddr, requests: usize) -> BTreeSet<SocketAddr> {
    let mut conn = Conn::open(addr).unwrap();
    (0..requests).flat_map(|_| conn.get("/").unwrap().tried()).collect()
}

/// The processes of this nginx, the master too, that have a thread named `consul`: once for each
/// such thread.
pub fn followers(nginx: &Nginx) -> Vec<u32> {
    std::iter::once(nginx.pid())
        .chain(nginx.worker_pids())
        .flat_map(|pid| {
            let threads = nginx.threads(pid);
            std::iter::repeat_n(pid, threads.iter().filter(|name| *name == "consul").count())
        })
        .collect()
}

/// The worker that follows Consul. It is the only one.
#[track_caller]
pub fn follower(nginx: &Nginx) -> u32 {
    let followers = followers(nginx);
    assert_eq!(followers.len(), 1, "{followers:?}");
    followers[0]
}

/// How many connections a process of this nginx has open to an address.
pub fn connections(nginx: &Nginx, pid: u32, to: SocketAddrV4) -> usize {
    const ESTABLISHED: &str = "01";
    let sockets: BTreeSet<String> = nginx.fds(pid).into_iter().collect();
    // The kernel shows the address as the number that its bytes make in memory.
    let to = format!("{:08X}:{:04X}", u32::from_ne_bytes(to.ip().octets()), to.port());
    let table = fs::read_to_string(format!("/proc/{pid}/net/tcp")).unwrap_or_default();
    table
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>())
        .filter(|columns| matches!(columns[..], [_, _, remote, ESTABLISHED, ..] if remote == to))
        .filter_map(|columns| Some(format!("socket:[{}]", columns.get(9)?)))
        .filter(|socket| sockets.contains(socket))
        .count()
}

/// Waits until a process of this nginx has so many connections to an address. Beside that of a watch there
/// is another one for a moment, for what is asked once.
#[track_caller]
pub fn wait_connections(nginx: &Nginx, pid: u32, to: SocketAddrV4, expected: usize) {
    eventually(PATIENCE, &format!("{expected} connections of {pid} to {to}"), || {
        let seen = connections(nginx, pid, to);
        if seen == expected { Ok(()) } else { Err(seen.to_string()) }
    });
}

/// An address of version 4, which those of the test bed are.
pub fn v4(addr: SocketAddr) -> SocketAddrV4 {
    match addr {
        SocketAddr::V4(addr) => addr,
        SocketAddr::V6(addr) => panic!("{addr} is of version 6"),
    }
}

/// The lines that tell of changes to an upstream, without what nginx writes in front.
pub fn changes(nginx: &Nginx, upstream: &str) -> Vec<String> {
    let begin = format!("consul: upstream \"{upstream}\": ");
    nginx
        .log()
        .lines()
        .filter_map(|line| line.split_once(&begin))
        .filter(|(_, change)| change.contains(" instances serve, index "))
        .map(|(_, change)| change.to_owned())
        .collect()
}

pub fn text(error: impl ToString) -> String {
    error.to_string()
}
