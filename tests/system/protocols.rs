//! Whatever nginx speaks to its servers, a change of the list takes no request away: with TLS and its
//! sessions, FastCGI, uwsgi, SCGI, memcached, gRPC, WebSocket, subrequests and names in variables.
//!
//! Retries are off, and a server that went is stopped: a request that was sent to one that is out of
//! the list is lost, and so is one that was told that nobody lives.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use serde_json::Value;
use testbed::http::Conn;
use testbed::nginx::Builder;
use testbed::{Authority, Backend, Dir, Load, Net, Nginx, Options, eventually};

use crate::balancers::METHODS;
use crate::common::{PATIENCE, asking, scaled};
use crate::fake_consul::{FakeConsul, entry};

/// How long a set stands before the next one.
const PACE: Duration = Duration::from_millis(30);

/// What every test has: an nginx that asks a Consul which knows some of these servers.
struct Stage {
    net: Net,
    dir: Dir,
    fake: FakeConsul,
}

impl Stage {
    fn set(name: &str) -> Stage {
        let (net, dir) = (Net::isolated(), Dir::new(name));
        let fake = FakeConsul::start(&net);
        Stage { net, dir, fake }
    }

    fn nginx(&self) -> Builder {
        asking(&self.net, &self.dir, &self.fake.url())
            .workers(2)
            .http("set_real_ip_from 127.0.0.0/8; real_ip_header X-Real-IP;")
            .http("proxy_next_upstream off; fastcgi_next_upstream off; uwsgi_next_upstream off;")
            .http("scgi_next_upstream off; memcached_next_upstream off; grpc_next_upstream off;")
    }

    /// Changes the set of all these servers in turn while `work` goes on: one is missing each time.
    /// Returns how many changes there were.
    fn churn_while<T: Send>(&self, servers: &[SocketAddr], work: impl FnOnce() -> T + Send) -> T {
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            let churn = scope.spawn(|| {
                let mut n = 0;
                while !done.load(Ordering::Relaxed) {
                    let out = n as usize % servers.len();
                    let all = servers.iter().enumerate().filter(|(i, _)| *i != out);
                    let all: Vec<Value> =
                        all.map(|(i, it)| entry(&format!("web-{i}"), *it)).collect();
                    n += 1;
                    self.fake.know(100 + n, &all);
                    thread::sleep(PACE);
                }
                n
            });
            let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
            done.store(true, Ordering::Relaxed);
            let changes = churn.join().unwrap();
            assert!(changes > 10, "{changes} changes are too few to tell anything");
            result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    fn know(&self, servers: &[SocketAddr]) {
        let all: Vec<Value> =
            servers.iter().enumerate().map(|(i, it)| entry(&format!("web-{i}"), *it)).collect();
        self.fake.know(100, &all);
    }

    fn addr(&self, host: u8) -> SocketAddr {
        (self.net.ip(host), self.net.port()).into()
    }
}

/// A server for each method, whose location has these directives, and an upstream for it.
fn each_method(conf: Builder, stage: &Stage, upstream: &str, location: &str) -> Builder {
    METHODS.iter().enumerate().fold(conf, |conf, (n, method)| {
        let addr = stage.addr(1);
        conf.http(format!(
            "upstream app{n} {{ zone app{n} 512k; {method} consul_upstream web; {upstream} }}"
        ))
        .http(format!(
            "server {{ listen {addr} reuseport; keepalive_requests 1000000000; location / {{
                add_header X-Worker $pid always;
                add_header X-Upstream $upstream_addr always;
                {} }} }}",
            location.replace("APP", &format!("app{n}"))
        ))
        .listen(addr)
    })
}

/// Requests to each of the servers of an nginx, all of which must be answered by a backend.
fn all_answer(nginx: &Nginx, each: u64) {
    let loads: Vec<Load> = nginx
        .addrs()
        .iter()
        .map(|addr| {
            let options = Options::default()
                .connections(4)
                .path(|n| format!("/?key={}", n % 16))
                .header("X-Real-IP", "10.1.2.3")
                .pause(Duration::from_millis(2));
            Load::start(*addr, &options)
        })
        .collect();
    loads.iter().for_each(|load| load.wait_for(each));
    for load in loads {
        let report = load.stop();
        println!("{report}");
        report.assert_nothing_lost();
    }
}

/// An nginx without the module, as so many servers of another kind.
fn servers_of_nginx(
    stage: &Stage,
    http: &str,
    listen: &str,
    hosts: &[u8],
) -> (Nginx, Vec<SocketAddr>) {
    let mut conf = Nginx::builder(&stage.net, &stage.dir).name("servers").module(false).http(http);
    let mut addrs = Vec::new();
    for host in hosts {
        let addr = stage.addr(*host);
        conf = conf
            .http(format!(
                "server {{ listen {addr} {listen};
                   keepalive_requests 1000000;
                   location / {{ add_header X-Backend s{host}; {} return 200 s{host}; }} }}",
                "add_header X-Reused $ssl_session_reused;"
            ))
            .listen(addr);
        addrs.push(addr);
    }
    (conf.start(), addrs)
}

fn tls(name: &str, upstream: &str) {
    let stage = Stage::set(name);
    let authority = Authority::new(&stage.dir, "backends");
    let certificate = authority.request("web").hosts(&["web"]).issue();
    let http = format!(
        "ssl_certificate {}; ssl_certificate_key {}; ssl_session_cache shared:tls:1m;",
        certificate.cert.display(),
        certificate.key.display()
    );
    let (_servers, addrs) = servers_of_nginx(&stage, &http, "ssl", &[20, 21, 22, 23]);
    stage.know(&addrs);
    let location = "proxy_pass https://APP; proxy_http_version 1.1; proxy_set_header Connection '';
                    proxy_ssl_name web;";
    let nginx = each_method(stage.nginx(), &stage, upstream, location).start();
    stage.churn_while(&addrs, || all_answer(&nginx, scaled(300, 10_000) as u64));
    // Sessions lie in the zone with their peers; those that stay resume theirs.
    stage.know(&addrs);
    let mut conn = Conn::open(nginx.addr()).unwrap();
    let reused = |conn: &mut Conn| {
        let answers: Vec<_> = (0..16).map(|_| conn.get("/?key=1").unwrap()).collect();
        answers.iter().filter(|answer| answer.header("x-reused") == "r").count()
    };
    eventually(PATIENCE, "sessions are resumed", || reused(&mut conn) > 8);
}

#[test]
fn tls_with_resumed_sessions() {
    tls("protocols_tls", "");
}

#[test]
fn tls_with_kept_connections() {
    tls("protocols_tls_keepalive", "keepalive 4;");
}

#[test]
fn grpc() {
    let stage = Stage::set("protocols_grpc");
    let (_servers, addrs) = servers_of_nginx(&stage, "http2 on;", "", &[20, 21, 22, 23]);
    stage.know(&addrs);
    let nginx = each_method(stage.nginx(), &stage, "", "grpc_pass grpc://APP;").start();
    stage.churn_while(&addrs, || all_answer(&nginx, scaled(300, 10_000) as u64));
}

/// A server of a protocol that the test bed does not know: `answer` reads one request of a
/// connection and answers it with the server's name.
struct Peer {
    addr: SocketAddr,
    stop: Arc<AtomicBool>,
    served: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

type Answer = fn(&mut BufReader<TcpStream>, &str) -> io::Result<()>;

impl Peer {
    fn start(addr: SocketAddr, name: &str, answer: Answer) -> Peer {
        let listener = TcpListener::bind(addr).unwrap();
        let (stop, served) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopped, counted, name) = (stop.clone(), served.clone(), name.to_owned());
        let thread = thread::spawn(move || {
            for stream in listener.incoming() {
                if stopped.load(Ordering::Relaxed) {
                    return;
                }
                let (name, counted) = (name.clone(), counted.clone());
                let Ok(stream) = stream else { continue };
                thread::spawn(move || {
                    let mut reader = BufReader::new(stream);
                    // What goes wrong shows as a request without an answer.
                    if answer(&mut reader, &name).is_ok() {
                        counted.fetch_add(1, Ordering::Relaxed);
                        let _ = reader.get_ref().shutdown(Shutdown::Write);
                    }
                });
            }
        });
        Peer { addr, stop, served, thread: Some(thread) }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = TcpStream::connect(self.addr);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The head and body of a CGI's answer.
fn cgi(name: &str) -> String {
    format!("Status: 200 OK\r\nX-Backend: {name}\r\n\r\n{name}")
}

fn fastcgi(reader: &mut BufReader<TcpStream>, name: &str) -> io::Result<()> {
    const END_REQUEST: u8 = 3;
    const STDIN: u8 = 5;
    const STDOUT: u8 = 6;
    loop {
        let mut head = [0; 8];
        reader.read_exact(&mut head)?;
        let len = usize::from(u16::from_be_bytes([head[4], head[5]])) + usize::from(head[6]);
        io::copy(&mut reader.take(len as u64), &mut io::sink())?;
        if head[1] == STDIN && len == 0 {
            break;
        }
    }
    let mut answer = Vec::new();
    let mut record = |kind: u8, content: &[u8]| {
        let [high, low] = (content.len() as u16).to_be_bytes();
        answer.extend([1, kind, 0, 1, high, low, 0, 0]);
        answer.extend(content);
    };
    record(STDOUT, cgi(name).as_bytes());
    record(STDOUT, b"");
    record(END_REQUEST, &[0; 8]);
    reader.get_mut().write_all(&answer)
}

fn scgi(reader: &mut BufReader<TcpStream>, name: &str) -> io::Result<()> {
    let mut len = Vec::new();
    reader.read_until(b':', &mut len)?;
    let len = String::from_utf8_lossy(&len).trim_end_matches(':').parse::<u64>();
    let len = len.map_err(io::Error::other)? + 1;
    io::copy(&mut reader.take(len), &mut io::sink())?;
    reader.get_mut().write_all(cgi(name).as_bytes())
}

fn uwsgi(reader: &mut BufReader<TcpStream>, name: &str) -> io::Result<()> {
    let mut head = [0; 4];
    reader.read_exact(&mut head)?;
    let len = u64::from(u16::from_le_bytes([head[1], head[2]]));
    io::copy(&mut reader.take(len), &mut io::sink())?;
    let answer = format!("HTTP/1.0 200 OK\r\nX-Backend: {name}\r\n\r\n{name}");
    reader.get_mut().write_all(answer.as_bytes())
}

fn memcached(reader: &mut BufReader<TcpStream>, name: &str) -> io::Result<()> {
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let key = line.trim_end().strip_prefix("get ").ok_or_else(|| io::Error::other("no get"))?;
    let answer = format!("VALUE {key} 0 {}\r\n{name}\r\nEND\r\n", name.len());
    reader.get_mut().write_all(answer.as_bytes())
}

fn of_protocol(name: &str, answer: Answer, location: &str) {
    let stage = Stage::set(&format!("protocols_{name}"));
    let peers: Vec<Peer> =
        (20..24).map(|host| Peer::start(stage.addr(host), &format!("s{host}"), answer)).collect();
    let addrs: Vec<SocketAddr> = peers.iter().map(|peer| peer.addr).collect();
    stage.know(&addrs);
    let nginx = each_method(stage.nginx(), &stage, "", location).start();
    stage.churn_while(&addrs, || all_answer(&nginx, scaled(150, 10_000) as u64));
    assert!(peers.iter().all(|peer| peer.served.load(Ordering::Relaxed) > 0));
}

#[test]
fn fastcgi_servers() {
    of_protocol("fastcgi", fastcgi, "fastcgi_pass APP; fastcgi_param QUERY_STRING $query_string;");
}

#[test]
fn scgi_servers() {
    of_protocol("scgi", scgi, "scgi_pass APP; scgi_param QUERY_STRING $query_string;");
}

#[test]
fn uwsgi_servers() {
    of_protocol("uwsgi", uwsgi, "uwsgi_pass APP; uwsgi_param QUERY_STRING $query_string;");
}

/// Its answers have no head, so the body is what says who it was.
#[test]
fn memcached_servers() {
    let stage = Stage::set("protocols_memcached");
    let peers: Vec<Peer> = (20..24)
        .map(|host| Peer::start(stage.addr(host), &format!("s{host}"), memcached))
        .collect();
    let addrs: Vec<SocketAddr> = peers.iter().map(|peer| peer.addr).collect();
    stage.know(&addrs);
    let location = "set $memcached_key $arg_key; memcached_pass APP;";
    let nginx = each_method(stage.nginx(), &stage, "", location).start();
    stage.churn_while(&addrs, || {
        for n in 0..scaled(100, 5_000) {
            for addr in nginx.addrs() {
                let mut conn = Conn::open(*addr).unwrap();
                let answer = conn.get(&format!("/?key={}", n % 16)).unwrap();
                assert_eq!(answer.status, 200, "{}", answer.header("x-upstream"));
                assert!(answer.text().starts_with("s2"), "{}", answer.text());
            }
            thread::sleep(Duration::from_millis(5));
        }
    });
}

/// A request to one upstream that asks another one first, and upstreams that a variable names.
#[test]
fn subrequests_and_names_in_variables() {
    let stage = Stage::set("protocols_subrequests");
    let backends: Vec<Backend> =
        (20..24).map(|host| Backend::start(&stage.net, host, &format!("s{host}"))).collect();
    let addrs: Vec<SocketAddr> = backends.iter().map(Backend::addr).collect();
    stage.know(&addrs);
    let addr = stage.addr(1);
    let nginx = stage
        .nginx()
        .http("upstream web { zone web 512k; consul_upstream web; }")
        .http("upstream auth { zone auth 512k; least_conn; consul_upstream web; keepalive 4; }")
        .http("map $arg_to $upstream { default web; other auth; }")
        .http(format!(
            "server {{ listen {addr} reuseport; keepalive_requests 1000000000;
               add_header X-Worker $pid always; add_header X-Upstream $upstream_addr always;
               proxy_http_version 1.1; proxy_set_header Connection '';
               location / {{ auth_request /auth; mirror /mirror; proxy_pass http://$upstream; }}
               location = /auth {{ internal; proxy_pass http://auth; }}
               location = /mirror {{ internal; proxy_pass http://web; }} }}"
        ))
        .listen(addr)
        .start();
    stage.churn_while(&addrs, || {
        let to = |n: u64| if n.is_multiple_of(2) { "/?to=other".into() } else { "/".into() };
        let options = Options::default().connections(8).path(to).pause(Duration::from_millis(2));
        let load = Load::start(nginx.addr(), &options);
        load.wait_for(scaled(1_500, 20_000) as u64);
        let report = load.stop();
        println!("{report}");
        report.assert_nothing_lost();
    });
    assert_eq!(nginx.log_count("no live upstreams"), 0);
}

/// An open WebSocket stays where it is when its server leaves the list; the next one goes elsewhere.
#[test]
fn websockets() {
    fn echo(reader: &mut BufReader<TcpStream>, name: &str) -> io::Result<()> {
        let mut line = String::new();
        while line != "\r\n" {
            line.clear();
            if reader.read_line(&mut line)? == 0 {
                return Ok(());
            }
        }
        let head = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade";
        let head = format!("{head}\r\nX-Backend: {name}\r\n\r\n");
        reader.get_mut().write_all(head.as_bytes())?;
        // Bytes are bytes: nginx does not look into them.
        loop {
            line.clear();
            if reader.read_line(&mut line)? == 0 {
                return Ok(());
            }
            let answer = format!("{name} {line}");
            reader.get_mut().write_all(answer.as_bytes())?;
        }
    }
    let stage = Stage::set("protocols_websocket");
    let peers = [20, 21].map(|host| Peer::start(stage.addr(host), &format!("s{host}"), echo));
    let addrs = peers.each_ref().map(|peer| peer.addr);
    stage.know(&addrs[..1]);
    let location = "proxy_pass http://APP; proxy_http_version 1.1; proxy_read_timeout 1h;
                    proxy_set_header Upgrade $http_upgrade; proxy_set_header Connection upgrade;";
    let nginx = each_method(stage.nginx(), &stage, "", location).start();
    let open = |addr: SocketAddr| {
        let stream = TcpStream::connect(addr).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut reader = BufReader::new(stream);
        let request = "GET /?key=1 HTTP/1.1\r\nHost: any\r\nUpgrade: websocket\r\n\
                       Connection: Upgrade\r\nX-Real-IP: 10.0.0.1\r\n\r\n";
        reader.get_mut().write_all(request.as_bytes()).unwrap();
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            assert!(reader.read_line(&mut head).unwrap() > 0, "{head}");
        }
        assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
        reader
    };
    let say = |reader: &mut BufReader<TcpStream>, text: &str| {
        reader.get_mut().write_all(format!("{text}\n").as_bytes()).unwrap();
        let mut answer = String::new();
        reader.read_line(&mut answer).unwrap();
        answer.trim_end().to_owned()
    };
    let mut old: Vec<_> = nginx.addrs().iter().map(|addr| open(*addr)).collect();
    old.iter_mut().for_each(|it| assert_eq!(say(it, "one"), "s20 one"));
    stage.fake.know(101, &[entry("web-1", addrs[1])]);
    nginx.wait_log("1 of 1 instances serve, index 101", METHODS.len(), PATIENCE);
    let mut new: Vec<_> = nginx.addrs().iter().map(|addr| open(*addr)).collect();
    new.iter_mut().for_each(|it| assert_eq!(say(it, "two"), "s21 two"));
    old.iter_mut().for_each(|it| assert_eq!(say(it, "three"), "s20 three"));
}
