//! What an upstream of more and more peers costs: a request, a peer, a change. `benches/README.md`
//! tells how to read the table.

#[allow(dead_code, reason = "each benchmark uses its part of what they share")]
mod common;
#[path = "common/crowd.rs"]
mod crowd;
#[allow(dead_code, reason = "the tests use more of it")]
#[path = "../tests/system/fake_consul.rs"]
mod fake_consul;

use std::fs;
use std::process::ExitCode;
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::Value;
use testbed::nginx::Builder;
use testbed::{Dir, Load, Net, Nginx, Options, http};

use common::figure::Figure;
use common::{PATIENCE, is_quick, ms, quantile};
use fake_consul::FakeConsul;

/// The bar: for how long a change of one peer locks the list, at p99.
const LOCKED: Duration = Duration::from_micros(10);

/// More than the kept connections that all workers of a large site have for one upstream.
const KEPT: &str = "keepalive 256;";

/// Both sides' zones have room.
const ZONE: &str = "zone web 64m;";

/// Between two looks at the log for a change.
const BREATH: Duration = Duration::from_micros(100);

/// From so many peers on the zone's memory tells what each of them takes.
const WHOLE_PAGES: usize = 1_000;

struct Size {
    peers: usize,
    /// Requests in each round.
    requests: u64,
    rounds: usize,
    changes: usize,
}

fn main() -> ExitCode {
    let quick = is_quick();
    let size = |(peers, requests)| Size {
        peers,
        requests: if quick { 100 } else { requests },
        rounds: if quick { 1 } else { 7 },
        changes: if quick { 4 } else { 200 },
    };
    // Of more peers than connections are kept, each request has a new one.
    let all = [(10, 5_000), (100, 5_000), (1_000, 1_500), (10_000, 1_500)];
    let all = all.map(size);
    let all = if quick { &all[..2] } else { &all[..] };
    println!(
        "peers: round robin over so many peers in a zone, one worker; the rival is the same nginx \
         without the module\nand with static servers\n"
    );
    println!(
        "{:>7} {:^32} {:^32} {:^32} {:>10}",
        "",
        "processor time of a request, us",
        "zone, bytes for each peer",
        "locked for one change, ns",
        "live, ms"
    );
    println!(
        "{:>7} {:>10} {:>10} {:>10} {:>10} {:>10} {:>10} {:>10} {:>10} {:>10} {:>10}",
        "peers",
        "ours",
        "static",
        "ours more",
        "ours",
        "static",
        "ours more",
        "median",
        "p99",
        "max",
        "median"
    );
    let mut met = true;
    for size in all {
        met &= measure(size);
    }
    if quick {
        return ExitCode::SUCCESS;
    }
    let verdict = if met { "met" } else { "MISSED" };
    println!("\nthe bar, locked for at most {} us at p99: {verdict}", LOCKED.as_micros());
    if met { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn measure(size: &Size) -> bool {
    let (net, dir) = (Net::isolated(), Dir::new("bench_peers"));
    let fake = FakeConsul::start(&net);
    let backend = crowd::backend();
    let entries = crowd::entries(&backend, size.peers);
    let conf = |name: &str| Nginx::builder(&net, &dir).name(name);
    let status = (net.ip(90), net.port()).into();
    let ours = conf("ours")
        .main("error_log debug.log debug;")
        .http(format!("consul_address {};", fake.url()))
        .http(format!("upstream web {{ {ZONE} consul_upstream web hold=0; {KEPT} }}"))
        .server("web")
        .listen(status)
        .http(format!("server {{ listen {status}; location / {{ consul_status; }} }}"))
        .start();
    let mut consul = Changing { fake: &fake, nginx: &ours, index: 100 };
    let used = || {
        let status = http::get(status, "/").expect("the status").json();
        status["upstreams"]["web"]["memory"]["used"].as_u64().expect("bytes") as f64
    };
    let before = used();
    consul.know(&entries);
    let memory = (used() - before) / size.peers as f64;

    let servers: Vec<String> =
        crowd::addresses(&backend, size.peers).map(|addr| format!("server {addr};\n")).collect();
    let stock = |zone: &str, servers: &[String]| -> Builder {
        let servers = servers.concat();
        conf("static")
            .module(false)
            .http(format!("upstream web {{ {zone} {servers} {KEPT} }}"))
            .server("web")
    };
    // What a zone has beside its servers, it has with the first of them.
    let least = |servers: &[String]| {
        least_zone(|kilobytes| stock(&format!("zone web {kilobytes}k;"), servers))
    };
    // A few peers are in a page or two, whatever they take of them.
    let memory = (size.peers >= WHOLE_PAGES).then(|| {
        let theirs = (least(&servers) - least(&servers[..1])) / (size.peers - 1) as f64;
        (memory, theirs)
    });
    let theirs = stock(ZONE, &servers).start();

    let time = |nginx: &Nginx| {
        let [worker] = nginx.worker_pids()[..] else { panic!("one worker") };
        let before = processor_time(worker);
        Load::run(nginx.addr(), size.requests, &Options::default()).assert_nothing_lost();
        (processor_time(worker) - before) / size.requests as u32
    };
    let [mut times, mut times_static] = [Vec::new(), Vec::new()];
    for round in 0..=size.rounds {
        let (one, other) = (time(&ours), time(&theirs));
        // The first one opens the connections that are kept.
        if round > 0 {
            times.push(one);
            times_static.push(other);
        }
    }
    let [time, time_static] =
        [&times, &times_static].map(|times| quantile(times, 0.5).as_secs_f64() * 1e6);

    let live = quantile(&consul.change_at_rest(size, &entries), 0.5);
    let locked = consul.change(size, &entries);
    let [median, p99, max] = [0.5, 0.99, 1.0].map(|part| quantile(&locked, part).as_nanos());
    let more = |ours: f64, theirs: f64| format!("{:.1} %", 100.0 * (ours / theirs - 1.0));
    let column = |of: &dyn Fn((f64, f64)) -> String| memory.map_or("-".into(), of);
    println!(
        "{:>7} {time:>10.1} {time_static:>10.1} {:>10} {:>10} {:>10} {:>10} {median:>10} {p99:>10} \
         {max:>10} {:>10.2}",
        size.peers,
        more(time, time_static),
        column(&|(ours, _)| format!("{ours:.0}")),
        column(&|(_, theirs)| format!("{theirs:.0}")),
        column(&|(ours, theirs)| more(ours, theirs)),
        ms(live),
    );
    let peers = size.peers;
    let note = |what: &str, ours, rival, bar| {
        Figure { bench: "peers", what: &format!("{peers} peers: {what}"), ours, rival, bar }.note();
    };
    note("processor time of a request, us", time, Some(("static servers", time_static)), None);
    if let Some((ours, theirs)) = memory {
        note("zone for each peer, bytes", ours, Some(("static servers", theirs)), None);
    }
    note("locked for one change at p99, us", p99 as f64 / 1e3, None, Some(10.0));
    note("a change in the list, ms", ms(live), None, None);
    quantile(&locked, 0.99) <= LOCKED
}

/// A Consul that says one thing after the other, and an nginx that hears it.
struct Changing<'a> {
    fake: &'a FakeConsul,
    nginx: &'a Nginx,
    index: u64,
}

impl Changing<'_> {
    fn know(&mut self, entries: &[Value]) {
        self.index += 1;
        self.fake.know(self.index, entries);
        let line = format!("of {} instances serve, index {}", entries.len(), self.index);
        self.nginx.wait_log(&line, 1, PATIENCE);
    }

    /// Without one of the peers, or with all of them, at each change, and at any place.
    fn sets<'e>(size: &Size, entries: &'e [Value]) -> impl Iterator<Item = Vec<Value>> + 'e {
        (0..size.changes).map(|n| {
            let out = (n / 2 * 7919 + 13) % entries.len();
            match n % 2 {
                0 => [&entries[..out], &entries[out + 1..]].concat(),
                _ => entries.to_vec(),
            }
        })
    }

    /// One peer goes, and comes back. How long after the answer was on its way it was in the list,
    /// each time.
    fn change_at_rest(&mut self, size: &Size, entries: &[Value]) -> Vec<Duration> {
        let live = |set: Vec<Value>| {
            self.index += 1;
            self.fake.know(self.index, &set);
            let line = format!("of {} instances serve, index {}", set.len(), self.index);
            let begin = Instant::now();
            while !self.nginx.log().contains(&line) {
                assert!(begin.elapsed() < PATIENCE, "not in the log: {line}");
                sleep(BREATH);
            }
            let seen = Instant::now();
            seen.saturating_duration_since(self.fake.sent().expect("an answer"))
        };
        Self::sets(size, entries).map(live).collect()
    }

    /// The same under load. For how long each locked the list.
    fn change(&mut self, size: &Size, entries: &[Value]) -> Vec<Duration> {
        let pause = Duration::from_millis(1);
        let before = self.locked().len();
        let load = Load::start(self.nginx.addr(), &Options::default().pause(pause));
        Self::sets(size, entries).for_each(|set| self.know(&set));
        load.stop().assert_nothing_lost();
        self.locked().split_off(before)
    }

    /// For how long each change so far has locked the list.
    fn locked(&self) -> Vec<Duration> {
        let log = fs::read_to_string(self.nginx.dir().join("ours/debug.log")).expect("the log");
        let lines = log.lines().filter_map(|line| line.split_once("the list was locked for "));
        let times = lines.filter_map(|(_, time)| time.trim_end_matches("ns").parse().ok());
        times.map(Duration::from_nanos).collect()
    }
}

/// The size of the least zone that nginx takes, in bytes.
fn least_zone(conf: impl Fn(usize) -> Builder) -> f64 {
    const PAGE: usize = 4;
    let fits = |pages: usize| conf(pages * PAGE).config_test().ok;
    // nginx takes none of less than eight pages.
    let (mut without, mut with) = (7, 8);
    while !fits(with) {
        (without, with) = (with, 2 * with);
    }
    while with - without > 1 {
        let middle = without.midpoint(with);
        if fits(middle) { with = middle } else { without = middle }
    }
    (with * PAGE * 1024) as f64
}

/// The processor's time that all threads of a process have had.
fn processor_time(pid: u32) -> Duration {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).expect("a process");
    let times = tasks.filter_map(|task| {
        // Nanoseconds come first.
        let text = fs::read_to_string(task.ok()?.path().join("schedstat")).ok()?;
        text.split(' ').next()?.parse::<u64>().ok()
    });
    Duration::from_nanos(times.sum())
}
