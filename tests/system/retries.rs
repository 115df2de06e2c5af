//! A request whose list changes between its tries goes on as if it had not: to a server that it has
//! not tried, as often as its limits allow, and no more often.

use std::collections::BTreeSet;
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use serde_json::Value;
use testbed::http::{Answer, Conn};
use testbed::nginx::Builder;
use testbed::{Backend, Dir, Load, Net, Nginx, Options, Report, eventually};

use crate::balancers::METHODS;
use crate::common::{PATIENCE, asking, scaled};
use crate::fake_consul::{FakeConsul, entry};

/// How long a server that resets keeps a request, and how often the list changes meanwhile.
const HELD: Duration = Duration::from_millis(60);
const PACE: Duration = Duration::from_millis(30);

/// For how long each method is under load at least: `least_conn` asks servers that keep a request
/// seldom, and so many times they show all the same.
const LOADED: Duration = Duration::from_secs(4);

/// A server that takes requests, keeps each a while, and resets the connection.
struct Resetting {
    addr: SocketAddr,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Resetting {
    fn start(addr: SocketAddr) -> Resetting {
        let listener = TcpListener::bind(addr).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = thread::spawn(move || {
            for stream in listener.incoming() {
                if stopped.load(Ordering::Relaxed) {
                    return;
                }
                // Closed with bytes that nobody has read, it is reset.
                thread::spawn(move || {
                    thread::sleep(HELD);
                    drop(stream);
                });
            }
        });
        Resetting { addr, stop, thread: Some(thread) }
    }
}

impl Drop for Resetting {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = TcpStream::connect(self.addr);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn each_method(conf: Builder, upstream: &str) -> Builder {
    METHODS.iter().enumerate().fold(conf, |conf, (n, method)| {
        conf.http(format!("upstream app{n} {{ zone app{n} 512k; {method} {upstream} }}"))
            .server(&format!("app{n}"))
    })
}

/// Load on each of an nginx's servers: how many requests were lost, for each.
fn lost(nginx: &Nginx, each: u64) -> Vec<u64> {
    let begin = Instant::now();
    let loads: Vec<Load> = nginx
        .addrs()
        .iter()
        .enumerate()
        .map(|(client, addr)| {
            let options = Options::default()
                .connections(8)
                .path(|n| format!("/?key={}", n % 64))
                .header("X-Real-IP", &format!("10.{client}.2.3"))
                .pause(Duration::from_millis(1));
            Load::start(*addr, &options)
        })
        .collect();
    // Each ends when it has had enough: the quickest would otherwise open a hundred times as many
    // connections as the slowest, and the kernel's table of them is bounded.
    let reports: Vec<Report> = thread::scope(|scope| {
        let end = |load: Load| {
            load.wait_for(each);
            // And not before: changes come meanwhile.
            thread::sleep(LOADED.saturating_sub(begin.elapsed()));
            load.stop()
        };
        let ends: Vec<_> = loads.into_iter().map(|load| scope.spawn(move || end(load))).collect();
        ends.into_iter().map(|end| end.join().unwrap()).collect()
    });
    for (method, report) in METHODS.iter().zip(&reports) {
        println!("{method:?}: {report}");
    }
    reports.iter().map(|report| report.lost).collect()
}

/// Six good servers, one of which comes and goes, and two that reset. With the cure nothing is lost;
/// without it, much is, by the same requests: so it is the cure that does it.
fn across_changes(name: &str, upstream: &str) {
    let (net, dir) = (Net::isolated(), Dir::new(name));
    let fake = FakeConsul::start(&net);
    let good: Vec<Backend> =
        (20..26).map(|host| Backend::start(&net, host, &format!("s{host}"))).collect();
    let bad = [40, 41].map(|host| Resetting::start((net.ip(host), net.port()).into()));
    let set = |n: u64| -> Vec<Value> {
        let good = good.iter().map(Backend::addr);
        let bad = bad.iter().map(|it| it.addr);
        let come_and_go = n as usize % 2;
        bad.chain(good.take(5 + come_and_go))
            .enumerate()
            .map(|(i, addr)| entry(&format!("web-{i}"), addr))
            .collect()
    };
    fake.know(100, &set(0));
    let conf = asking(&net, &dir, &fake.url())
        .with_failpoints()
        .workers(2)
        .http("set_real_ip_from 127.0.0.0/8; real_ip_header X-Real-IP;")
        .http("error_log error.log crit;");
    let nginx = each_method(conf, &format!("consul_upstream web max_fails=0; {upstream}")).start();
    let done = AtomicBool::new(false);
    let (with, without) = thread::scope(|scope| {
        let churn = scope.spawn(|| {
            let mut n = 0;
            while !done.load(Ordering::Relaxed) {
                n += 1;
                fake.know(100 + n, &set(n));
                thread::sleep(PACE);
            }
        });
        let measured = std::panic::catch_unwind(|| {
            let with = lost(&nginx, scaled(500, 11_500) as u64);
            nginx.arm("retry");
            (with, lost(&nginx, 300))
        });
        done.store(true, Ordering::Relaxed);
        churn.join().unwrap();
        measured.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    });
    assert_eq!(with, [0; METHODS.len()], "lost with the cure");
    // A request on its own or two show nothing.
    assert!(without.iter().all(|lost| *lost >= 10), "lost without the cure: {without:?}");
}

#[test]
fn across_changes_nothing_is_lost() {
    across_changes("retries_across", "");
}

#[test]
fn across_changes_with_kept_connections_nothing_is_lost() {
    across_changes("retries_across_keepalive", "keepalive 8;");
}

/// Servers that keep every request until a test lets it go, which resets it.
struct Held {
    net: Net,
    fake: FakeConsul,
    listeners: Vec<TcpListener>,
    index: u64,
    dir: Dir,
}

impl Held {
    fn new(name: &str, servers: u8) -> Held {
        let (net, dir) = (Net::isolated(), Dir::new(name));
        let fake = FakeConsul::start(&net);
        let listeners = (0..servers)
            .map(|n| {
                let listener = TcpListener::bind((net.ip(40 + n), net.port())).unwrap();
                listener.set_nonblocking(true).unwrap();
                listener
            })
            .collect();
        let mut held = Held { net, fake, listeners, index: 100, dir };
        held.change(None);
        held
    }

    fn nginx(&self, directives: &str) -> Nginx {
        let conf = asking(&self.net, &self.dir, &self.fake.url())
            .workers(1)
            .http("set_real_ip_from 127.0.0.0/8; real_ip_header X-Real-IP;")
            .http(directives);
        each_method(conf, "consul_upstream web max_fails=0;").start()
    }

    /// Another change: of the list alone, or seen by an nginx.
    fn change(&mut self, nginx: Option<&Nginx>) {
        self.index += 1;
        // One that nobody can connect to comes or goes, behind all others.
        let ghost: SocketAddr = (self.net.ip(99), 9).into();
        let addrs = self.listeners.iter().map(|it| it.local_addr().unwrap());
        let all: Vec<Value> = addrs
            .chain(self.index.is_multiple_of(2).then_some(ghost))
            .enumerate()
            .map(|(n, addr)| {
                let mut entry = entry(&format!("web-{n}"), addr);
                if addr == ghost {
                    entry["Service"]["Meta"] = serde_json::json!({ "nginx_down": "1" });
                }
                entry
            })
            .collect();
        self.fake.know(self.index, &all);
        if let Some(nginx) = nginx {
            let index = self.index;
            nginx.wait_log(&format!("instances serve, index {index}"), METHODS.len(), PATIENCE);
        }
    }

    /// A request that has come to one of the servers.
    fn held(&self) -> TcpStream {
        eventually(PATIENCE, "a request", || self.poll())
    }

    fn poll(&self) -> Option<TcpStream> {
        let stream = self.listeners.iter().find_map(|it| Some(it.accept().ok()?.0))?;
        stream.set_nonblocking(false).unwrap();
        Some(stream)
    }

    /// A request to this server of nginx's. Each try is let go when the list has changed once more,
    /// after a rest. Returns the answer, and where it has been.
    fn ask(
        &mut self,
        nginx: &Nginx,
        addr: SocketAddr,
        method: &str,
        tries: usize,
        rest: Duration,
    ) -> (u16, Vec<SocketAddr>) {
        let method = method.to_owned();
        let asked = thread::spawn(move || -> io::Result<Answer> {
            Conn::open(addr)?.request(&method, "/?key=1", &[("X-Real-IP", "10.1.1.1")], "body")
        });
        for _ in 0..tries {
            let stream = self.held();
            // Its bytes must be there, or its end would be no reset.
            let mut byte = [0];
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            stream.peek(&mut byte).unwrap();
            self.change(Some(nginx));
            thread::sleep(rest);
            drop(stream);
        }
        let answer = asked.join().unwrap().unwrap();
        assert!(self.poll().is_none(), "it was tried more than {tries} times");
        (answer.status, answer.tried())
    }
}

fn check(name: &str, directives: &str, method: &str, tries: usize, rest: Duration) {
    let mut held = Held::new(name, 4);
    let nginx = held.nginx(directives);
    for (n, addr) in nginx.addrs().to_vec().into_iter().enumerate() {
        let (status, tried) = held.ask(&nginx, addr, method, tries, rest);
        let distinct: BTreeSet<_> = tried.iter().collect();
        assert_eq!((status, tried.len()), (502, tries), "{:?}: {tried:?}", METHODS[n]);
        assert_eq!(distinct.len(), tries, "{:?}: each once: {tried:?}", METHODS[n]);
    }
}

#[test]
fn without_a_limit_every_server_is_tried_once() {
    check("retries_all", "", "GET", 4, Duration::ZERO);
}

#[test]
fn proxy_next_upstream_tries() {
    check("retries_tries", "proxy_next_upstream_tries 2;", "GET", 2, Duration::ZERO);
}

#[test]
fn proxy_next_upstream_off() {
    check("retries_off", "proxy_next_upstream off;", "GET", 1, Duration::ZERO);
}

#[test]
fn proxy_next_upstream_timeout() {
    let rest = Duration::from_millis(300);
    check("retries_timeout", "proxy_next_upstream_timeout 200ms;", "GET", 1, rest);
}

#[test]
fn what_is_not_idempotent_is_not_tried_again() {
    check("retries_post", "", "POST", 1, Duration::ZERO);
}

#[test]
fn unless_it_is_asked_for() {
    let directives = "proxy_next_upstream error non_idempotent;";
    check("retries_non_idempotent", directives, "POST", 4, Duration::ZERO);
}
