//! Every method keeps all requests while instances are replaced, at the pace and in the number of the
//! bar: `balancers` looks at each method through all kinds of changes, and more slowly.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use testbed::{Backend, Dir, Load, Net, Options, Report};

use crate::balancers::METHODS;
use crate::common::{PATIENCE, asking, full, scaled};
use crate::fake_consul::{FakeConsul, entry};

/// Servers of which the oldest is replaced by a new one again and again.
pub struct Replaced<'a, S> {
    fake: &'a FakeConsul,
    start: Box<dyn Fn(usize) -> (SocketAddr, S) + Send + 'a>,
    live: VecDeque<(String, SocketAddr, S)>,
    begun: usize,
    /// How long one that Consul knows no longer still answers.
    linger: Duration,
}

impl<'a, S: Send> Replaced<'a, S> {
    /// So many that Consul knows; `start` makes the server of a number.
    pub fn new(
        fake: &'a FakeConsul,
        number: usize,
        linger: Duration,
        start: impl Fn(usize) -> (SocketAddr, S) + Send + 'a,
    ) -> Self {
        let start = Box::new(start);
        let mut all = Replaced { fake, start, live: VecDeque::new(), begun: 0, linger };
        (0..number).for_each(|_| all.begin_one());
        all.tell();
        all
    }

    fn begin_one(&mut self) {
        let (addr, server) = (self.start)(self.begun);
        self.live.push_back((format!("web-{}", self.begun), addr, server));
        self.begun += 1;
    }

    fn tell(&self) {
        let all: Vec<Value> = self.live.iter().map(|(id, addr, _)| entry(id, *addr)).collect();
        self.fake.know(self.begun as u64, &all);
    }

    /// Replaces one at each step while `work` goes on. Returns how often.
    pub fn replace_while<T: Send>(
        mut self,
        pace: Duration,
        work: impl FnOnce(&AtomicUsize) -> T + Send,
    ) -> (usize, T) {
        let (done, changes) = (AtomicBool::new(false), AtomicUsize::new(0));
        thread::scope(|scope| {
            let (done, changes) = (&done, &changes);
            scope.spawn(move || {
                let mut leaving = VecDeque::new();
                while !done.load(Ordering::Relaxed) {
                    self.begin_one();
                    let oldest = self.live.pop_front();
                    self.tell();
                    leaving.push_back((Instant::now(), oldest));
                    while leaving.front().is_some_and(|(left, _)| left.elapsed() >= self.linger) {
                        leaving.pop_front();
                    }
                    changes.fetch_add(1, Ordering::Relaxed);
                    thread::sleep(pace);
                }
            });
            let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| work(changes)));
            done.store(true, Ordering::Relaxed);
            let result = result.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            (changes.load(Ordering::Relaxed), result)
        })
    }
}

/// Eight backends, one replaced every 50 ms, four workers. One that left is stopped after 100 ms; beside
/// other tests a request may take longer than that to reach it, and then after a second.
fn each_method(name: &str, retries: &str) {
    let (net, dir) = (Net::isolated(), Dir::new(name));
    let fake = FakeConsul::start(&net);
    let linger = Duration::from_millis(if full() { 100 } else { 1000 });
    let servers = Replaced::new(&fake, 8, linger, |n| {
        let backend = Backend::start(&net, 20 + (n % 100) as u8, &format!("s{n}"));
        (backend.addr(), backend)
    });
    let conf = asking(&net, &dir, &fake.url())
        .workers(4)
        .http("set_real_ip_from 127.0.0.0/8; real_ip_header X-Real-IP;")
        .http(retries);
    let conf = METHODS.iter().enumerate().fold(conf, |conf, (n, method)| {
        conf.http(format!("upstream app{n} {{ zone app{n} 512k; {method} consul_upstream web; }}"))
            .server(&format!("app{n}"))
    });
    let nginx = conf.start();
    nginx.wait_log("8 of 8 instances serve", METHODS.len(), PATIENCE);
    let (changes, reports) = servers.replace_while(Duration::from_millis(50), |_| {
        let load = |(client, addr): (usize, &SocketAddr)| {
            let options = Options::default()
                .connections(2)
                .path(|n| format!("/?key={}", n % 64))
                .header("X-Real-IP", &format!("10.{client}.2.3"));
            let options = if full() { options } else { options.pause(Duration::from_millis(5)) };
            Load::start(*addr, &options)
        };
        let loads: Vec<Load> = nginx.addrs().iter().enumerate().map(load).collect();
        // The quickest goes on until the slowest has had enough: none has the machine to itself.
        let wanted = scaled(500, 80_000) as u64;
        loads.iter().for_each(|load| load.wait_for(wanted.saturating_sub(load.report().sent())));
        loads.into_iter().map(Load::stop).collect::<Vec<Report>>()
    });
    for (method, report) in METHODS.iter().zip(&reports) {
        println!("{changes} changes, {method:?}: {report}");
    }
    for (method, report) in METHODS.iter().zip(&reports) {
        report.assert_nothing_lost();
        // An address, by which `ip_hash` goes, is at one place of the list at a time.
        assert!(report.backends.len() > changes / 16, "{method:?}: {report}");
    }
}

#[test]
fn without_retries() {
    each_method("churn", "proxy_next_upstream off;");
}

#[test]
fn with_retries() {
    each_method("churn_retries", "proxy_next_upstream error timeout;");
}
