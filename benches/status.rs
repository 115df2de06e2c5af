//! What it costs the workers that somebody reads the status: of an upstream with very many peers,
//! and of very many upstreams. `benches/README.md` tells how to read the tables.

#[allow(dead_code, reason = "each benchmark uses its part of what they share")]
mod common;
#[path = "common/crowd.rs"]
mod crowd;
#[allow(dead_code, reason = "the tests use more of it")]
#[path = "../tests/system/fake_consul.rs"]
mod fake_consul;

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use testbed::http;
use testbed::nginx::Builder;
use testbed::{Dir, Net, Nginx, eventually};

use common::figure::Figure;
use common::{PATIENCE, is_quick, ms, quantile};
use fake_consul::FakeConsul;

/// Who reads at the same time.
const READERS: usize = 10;

/// The bars: for how long an answer locks the list at a time; what is on its way of an answer beside
/// its rows, and of those for each peer; the zone of very many upstreams, and the page of them.
const LOCKED: Duration = Duration::from_millis(1);
const BUFFERED: usize = 64 * 1024;
const ROW: usize = 450;
const ZONE: u64 = 32 << 20;
const PAGE: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    let quick = is_quick();
    let met = peers(if quick { 1_000 } else { 10_000 }, quick);
    println!();
    let met = upstreams(if quick { 100 } else { 1_000 }) && met;
    if met || quick { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// A server with the status on an address of its own.
fn with_status(builder: Builder, addr: SocketAddr) -> Builder {
    builder.listen(addr).http(format!(
        "server {{ listen {addr} reuseport; keepalive_requests 1000000; add_header X-Worker $pid;
         location /consul {{ consul_status; }}
         location /same {{ alias same.json; default_type application/json; }}
         location / {{ return 200; }} }}"
    ))
}

/// Memory of a process that is nobody else's, in bytes.
fn memory(pid: u32) -> usize {
    let file = format!("/proc/{pid}/smaps_rollup");
    let text = fs::read_to_string(&file).unwrap_or_else(|error| panic!("{file}: {error}"));
    let kb = text.lines().find_map(|line| line.strip_prefix("Private_Dirty:"));
    let kb = kb.and_then(|kb| kb.trim().strip_suffix(" kB")?.parse::<usize>().ok());
    kb.expect("a number") * 1024
}

fn peers(number: usize, quick: bool) -> bool {
    let (net, dir) = (Net::isolated(), Dir::new("bench_status"));
    let fake = FakeConsul::start(&net);
    let backend = crowd::backend();
    let entries = crowd::entries(&backend, number);
    fake.know(100, &entries);
    let addr = (net.ip(90), net.port()).into();
    let nginx = Nginx::builder(&net, &dir)
        .workers(2)
        .main("error_log debug.log debug;")
        .http(format!("consul_address {};", fake.url()))
        .http("upstream web { zone web 32m; consul_upstream web; keepalive 16; }")
        .server("web");
    // The kernel takes little of an answer that nobody reads.
    let slow = (net.ip(91), net.port()).into();
    let nginx = nginx
        .listen(slow)
        .http(format!("server {{ listen {slow} sndbuf=16k; location / {{ consul_status; }} }}"));
    let nginx = with_status(nginx, addr).start();
    nginx.wait_log(&format!("{number} of {number} instances serve"), 1, PATIENCE);
    let pids = nginx.worker_pids();
    let (mut met, slow) = slow_reader(slow, number, &pids);
    let answer = http::get(addr, "/consul").expect("the status");
    assert_eq!(answer.header("transfer-encoding"), "chunked", "it is made as it is read");
    let document = answer.json();
    let rows = document["upstreams"]["web"]["peers"].as_array().map_or(0, Vec::len);
    assert_eq!(rows, number);
    // The rival is a file of this size.
    dir.write("nginx/same.json", &answer.body);
    println!(
        "status: {number} peers, {} kB of JSON; {READERS} readers of it on one worker, requests to \
         the peers on another\n",
        answer.body.len() / 1000
    );

    println!("{slow}\n");
    println!(
        "{:<28} {:>8} {:>10} {:>10} {:>10} {:>10}",
        "", "answers", "requests", "median, ms", "p99, ms", "max, ms"
    );
    let time = Duration::from_secs(if quick { 1 } else { 10 });
    let mut tails = Vec::new();
    for (name, path) in
        [("nobody reads", None), ("a file is read", Some("/same")), ("the status", Some("/consul"))]
    {
        tails.push(probe(&nginx, addr, name, path, time, &pids));
    }
    let locked = locked(&nginx);
    let (p99, max) = (quantile(&locked, 0.99), quantile(&locked, 1.0));
    println!(
        "\nthe list was locked for {:.3} ms at a time (median of the longest of each of {} answers, \
         p99 {:.3}, max {:.3})",
        ms(quantile(&locked, 0.5)),
        locked.len(),
        ms(p99),
        ms(max)
    );
    let note = |what: &str, ours, rival, bar| {
        Figure { bench: "status", what: &format!("{number} peers: {what}"), ours, rival, bar }
            .note();
    };
    note("locked by an answer at a time, ms", ms(quantile(&locked, 0.5)), None, Some(ms(LOCKED)));
    met &= quantile(&locked, 0.5) <= LOCKED;
    let [_, file, status] = tails[..] else { panic!("three ways") };
    note("requests meanwhile at p99, ms", ms(status), Some(("a file", ms(file))), None);
    met && status <= file + LOCKED
}

/// What has not changed in so many looks at it stands still.
const STILL: usize = 50;

/// What a worker needs for an answer that nobody takes, the first that it gives.
fn slow_reader(addr: SocketAddr, number: usize, pids: &[u32]) -> (bool, String) {
    let before: Vec<usize> = pids.iter().map(|pid| memory(*pid)).collect();
    let mut slow = TcpStream::connect(addr).expect("nginx");
    slow.write_all(b"GET / HTTP/1.0\r\n\r\n").expect("a request");
    let mut begun = [0; 15];
    slow.read_exact(&mut begun).expect("an answer begins");
    assert_eq!(&begun, b"HTTP/1.1 200 OK");
    // What it makes beyond that the kernel takes at once, or nobody does: then it stands still.
    let (mut last, mut looks) = (0, 0);
    let grown = eventually(PATIENCE, "the answer is somewhere", || {
        let after = pids.iter().map(|pid| memory(*pid));
        let grown = after.zip(&before).map(|(after, before)| after.saturating_sub(*before)).max();
        let grown = grown.unwrap_or(0);
        looks = if grown == last { looks + 1 } else { 0 };
        last = grown;
        (grown > 0 && looks >= STILL).then_some(grown).ok_or(grown)
    });
    let said = format!(
        "an answer that nobody takes: {} kB of memory, {} bytes for each peer (bar: {ROW}, and 64 KiB)",
        grown / 1000,
        grown / number
    );
    (grown <= BUFFERED + number * ROW, said)
}

/// Requests to the peers on one worker, one after the other, while another worker's status is read.
/// How long they take at p99.
fn probe(
    nginx: &Nginx,
    addr: SocketAddr,
    name: &str,
    path: Option<&str>,
    time: Duration,
    pids: &[u32],
) -> Duration {
    let [reads, serves] = pids else { panic!("two workers") };
    let mut conns = http::worker_conns(nginx.addr(), [*serves]).expect("a worker");
    let conn = conns.get_mut(serves).expect("this one");
    let (done, answers) = (AtomicBool::new(false), AtomicU64::new(0));
    let mut sample = Vec::new();
    thread::scope(|scope| {
        if let Some(path) = path {
            for _ in 0..READERS {
                scope.spawn(|| {
                    let mut conns = http::worker_conns(addr, [*reads]).expect("a worker");
                    let conn = conns.get_mut(reads).expect("this one");
                    while !done.load(Ordering::Relaxed) {
                        // There may be four large answers at a time.
                        match conn.get(path).expect("an answer").status {
                            200 => _ = answers.fetch_add(1, Ordering::Relaxed),
                            503 => thread::sleep(Duration::from_millis(5)),
                            status => panic!("{status}"),
                        }
                    }
                });
            }
        }
        let begin = Instant::now();
        while begin.elapsed() < time {
            let asked = Instant::now();
            assert_eq!(conn.get("/").expect("an answer").status, 200);
            sample.push(asked.elapsed());
            thread::sleep(Duration::from_micros(200));
        }
        done.store(true, Ordering::Relaxed);
    });
    println!(
        "{name:<28} {:>8} {:>10} {:>10.3} {:>10.3} {:>10.3}",
        answers.load(Ordering::Relaxed),
        sample.len(),
        ms(quantile(&sample, 0.5)),
        ms(quantile(&sample, 0.99)),
        ms(quantile(&sample, 1.0)),
    );
    quantile(&sample, 0.99)
}

/// For how long each answer locked the list at a time.
fn locked(nginx: &Nginx) -> Vec<Duration> {
    let log = fs::read_to_string(nginx.dir().join("nginx/debug.log")).expect("the log");
    let lines = log.lines().filter_map(|line| line.split_once("a reader locked the list for "));
    let times = lines.filter_map(|(_, time)| time.split_once("ns")?.0.parse().ok());
    times.map(Duration::from_nanos).collect()
}

/// Very many upstreams: what they need of memory, and their page.
fn upstreams(number: usize) -> bool {
    let (net, dir) = (Net::isolated(), Dir::new("bench_status_upstreams"));
    let fake = FakeConsul::start(&net);
    let backend = crowd::backend();
    let entries = crowd::entries(&backend, 3);
    fake.know(100, &entries);
    let addr = (net.ip(90), net.port()).into();
    let all: String = (0..number)
        .map(|n| {
            let size = if n == 0 { " 64m" } else { "" };
            format!("upstream u{n} {{ zone all{size}; consul_upstream s{n}; }}\n")
        })
        .collect();
    let nginx = Nginx::builder(&net, &dir)
        .workers(2)
        .http(format!("consul_address {};", fake.url()))
        .http(all);
    let nginx = with_status(nginx, addr).start();
    let begin = Instant::now();
    let document = eventually(PATIENCE, "all upstreams are in sync", || {
        let document = http::get(addr, "/consul").map_err(|error| error.to_string())?.json();
        if document["in_sync"] == true { Ok(document) } else { Err("not yet".to_owned()) }
    });
    let upstreams = document["upstreams"].as_object().map_or(0, |all| all.len());
    assert_eq!(upstreams, number);
    println!("status: {number} upstreams with 3 peers each, in sync after {:?}\n", begin.elapsed());
    let zone = document["memory"]["zone_size"].as_u64().unwrap_or(0);
    let resident = resident(nginx.worker_pids()[0], zone);
    println!("the module's zone: {} kB, of which {} kB are resident", zone / 1000, resident / 1000);
    let mut pages: Vec<(Duration, usize)> = (0..10)
        .map(|_| {
            let begin = Instant::now();
            let page = http::get(addr, "/consul?format=html").expect("the page");
            assert_eq!(page.status, 200);
            (begin.elapsed(), page.body.len())
        })
        .collect();
    pages.sort_unstable();
    let (time, len) = pages[pages.len() / 2];
    let slowest = pages[pages.len() - 1].0;
    println!("the page: {} kB in {:.1} ms, {:.1} at most", len / 1000, ms(time), ms(slowest));
    let note = |what: &str, ours, bar| {
        let what = format!("{number} upstreams: {what}");
        Figure { bench: "status", what: &what, ours, rival: None, bar: Some(bar) }.note();
    };
    note("the module's zone, MB", zone as f64 / 1e6, ZONE as f64 / 1e6);
    note("the page, ms", ms(time), ms(PAGE));
    zone <= ZONE && time <= PAGE
}

/// How much of the zone of this size a process has in memory.
fn resident(pid: u32, zone: u64) -> u64 {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).expect("a map of memory");
    let kb = |line: &str, name: &str| -> Option<u64> {
        line.strip_prefix(name)?.trim().strip_suffix(" kB")?.parse().ok()
    };
    let mut is_zone = false;
    for line in smaps.lines() {
        if let Some(size) = kb(line, "Size:") {
            is_zone = size * 1024 == zone;
        }
        if is_zone && let Some(rss) = kb(line, "Rss:") {
            return rss * 1024;
        }
    }
    panic!("there is no zone of {zone} bytes")
}
