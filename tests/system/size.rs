//! Many peers, and many changes.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use testbed::http::{self, Conn};
use testbed::{Backend, Dir, Load, Net, Nginx, Options};

use crate::common::{PATIENCE, asking, changes, full, scaled};
use crate::fake_consul::{FakeConsul, entry};

/// One backend that answers on all addresses of the machine, and so many instances of it.
pub fn crowd(number: u32) -> (Backend, Vec<Value>) {
    let backend = Backend::bind(([0, 0, 0, 0], 0).into(), "crowd").unwrap();
    let port = backend.addr().port();
    let first = u32::from(Ipv4Addr::new(127, 200, 0, 1));
    let entries = (0..number)
        .map(|n| {
            let addr = SocketAddr::from((Ipv4Addr::from(first + n), port));
            entry(&format!("web-{n:05}"), addr)
        })
        .collect();
    (backend, entries)
}

/// For how long the list was locked by each change, in nanoseconds, in order of size.
fn locked(nginx: &Nginx) -> Vec<u64> {
    let log = fs::read_to_string(nginx.dir().join("nginx/debug.log")).unwrap();
    let lines = log.lines().filter_map(|line| line.split_once("the list was locked for "));
    let mut all: Vec<u64> =
        lines.map(|(_, time)| time.trim_end_matches("ns").parse().unwrap()).collect();
    all.sort_unstable();
    all
}

/// The memory of a process that is its alone, in bytes.
fn memory(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("RssAnon:")).unwrap();
    1024 * line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap()
}

/// A method that prepares much for each change is told so, and its changes are gathered: the workers
/// go on serving in between.
#[test]
fn a_large_ring_is_warned_of_and_its_changes_are_gathered() {
    let (net, dir) = (Net::isolated(), Dir::new("size_ring"));
    let fake = FakeConsul::start(&net);
    let (_backend, mut entries) = crowd(600);
    // As if somebody weighed in percent.
    for entry in &mut entries {
        entry["Service"]["Weights"]["Passing"] = 10.into();
    }
    fake.know(100, &entries);
    let nginx = asking(&net, &dir, &fake.url())
        .workers(2)
        .http("upstream web { zone web 4m; hash $arg_key consistent; consul_upstream web; }")
        .http("upstream other { zone other 4m; random; consul_upstream web; }")
        .server("web")
        .server("other")
        .start();
    let [ring, other] = nginx.addrs() else { panic!("two servers") };
    let mut conns = [ring, other].map(|addr| Conn::open(*addr).unwrap());
    let begin = Instant::now();
    let (mut index, mut longest) = (100, Duration::ZERO);
    while begin.elapsed() < Duration::from_secs(4) {
        index += 1;
        fake.know(index, &entries[index as usize % 2..]);
        for conn in &mut conns {
            let asked = Instant::now();
            assert_eq!(conn.get("/?key=1").unwrap().status, 200);
            longest = longest.max(asked.elapsed());
        }
        thread::sleep(Duration::from_millis(20));
    }
    // The last one comes, too.
    index += 1;
    fake.know(index, &entries[..500]);
    nginx.wait_log(&format!("500 of 500 instances serve, index {index}"), 2, PATIENCE);
    let (ring, other) = (changes(&nginx, "web").len(), changes(&nginx, "other").len());
    println!(
        "{ring} changes of the ring, {other} of the other; the longest answer took {longest:?}"
    );
    assert!(ring * 3 < other, "{ring} and {other} changes");
    let warnings = nginx.wait_log("each change stops every worker for ", 1, PATIENCE);
    assert!(warnings.len() == 1 && warnings[0].contains("[warn]"), "{warnings:?}");
    assert!(
        warnings[0].contains("upstream \"web\"") && warnings[0].contains("hash ... consistent")
    );
}

/// Weights of which a ring would have gigabytes are divided, and it is said; the shares stay.
#[test]
fn weights_beyond_any_ring_are_divided() {
    let (net, dir) = (Net::isolated(), Dir::new("size_weights"));
    let fake = FakeConsul::start(&net);
    let (_backend, mut entries) = crowd(50);
    let weigh = |entries: &mut [Value], weight: u32| {
        for entry in entries {
            entry["Service"]["Weights"]["Passing"] = weight.into();
        }
    };
    // The most that Consul takes, and a third of it.
    weigh(&mut entries[..1], 65_535);
    weigh(&mut entries[1..], 21_845);
    fake.know(100, &entries);
    let nginx = asking(&net, &dir, &fake.url())
        .http("upstream web { zone web 1m; hash $arg_key consistent; consul_upstream web; }")
        .http("upstream other { zone other 1m; consul_upstream web; }")
        .server("web")
        .server("other")
        .start();
    let [ring, other] = nginx.addrs() else { panic!("two servers") };
    let mut conn = Conn::open(*ring).unwrap();
    let begin = Instant::now();
    let first = conn.get("/?key=1").unwrap();
    let (took, memory) = (begin.elapsed(), memory(nginx.worker_pids()[0]));
    println!("a ring of large weights: {took:?} and {} KiB in all", memory / 1024);
    assert_eq!(first.status, 200);
    assert!(memory < 128 << 20, "{memory} bytes");
    for name in ["web", "other"] {
        let line = format!("upstream \"{name}\": the weights are larger than a method can use");
        let lines = nginx.wait_log(&line, 1, PATIENCE);
        assert!(lines[0].contains("[warn]") && lines[0].ends_with(" divided by 128"), "{lines:?}");
    }
    let mut conn = Conn::open(*other).unwrap();
    let heavy = entries[0]["Service"]["Address"].as_str().unwrap();
    let asked = (0..52).map(|_| conn.get("/").unwrap());
    let to_heavy = |answer: &testbed::http::Answer| answer.tried()[0].ip().to_string() == heavy;
    assert_eq!(asked.filter(to_heavy).count(), 3, "of 52, as 3 of 52 units of weight");

    // With less it is as Consul says, and nothing more is said.
    weigh(&mut entries, 100);
    fake.know(101, &entries);
    nginx.wait_log("50 of 50 instances serve, index 101", 2, PATIENCE);
    let begin = Instant::now();
    assert_eq!(Conn::open(*ring).unwrap().get("/?key=1").unwrap().status, 200);
    println!("a ring of 50 weights of 100: {:?}", begin.elapsed());
    assert_eq!(nginx.log_count("the weights are larger"), 2);
}

/// A set that waits for room does not come after a later one.
#[test]
fn an_older_set_never_comes_after_a_later_one() {
    let (net, dir) = (Net::isolated(), Dir::new("size_order"));
    let fake = FakeConsul::start(&net);
    let (_backend, entries) = crowd(200);
    fake.know(100, &entries[..2]);
    let nginx = asking(&net, &dir, &fake.url())
        .http("upstream web { zone shared 64k; consul_upstream web hold=0; }")
        .http("upstream other { zone shared; consul_upstream web hold=0 tag=none; server 127.0.0.1:1; }")
        .server("web")
        .start();
    fake.know(101, &entries);
    nginx.wait_log("zone \"shared\" of 64k is full", 1, PATIENCE);
    fake.know(102, &entries[..1]);
    nginx.wait_log("1 of 1 instances serve, index 102", 1, PATIENCE);
    // Were the earlier one kept, it would be tried again by now, and complained of or applied.
    fake.know(103, &entries[..3]);
    nginx.wait_log("3 of 3 instances serve, index 103", 1, PATIENCE);
    // What is pending is tried again each second: two of them are what there is to wait for.
    thread::sleep(Duration::from_millis(2500));
    assert_eq!(nginx.log_count("index 101"), 0);
    assert_eq!(nginx.log_count("is full"), 1);
    assert_eq!(crate::common::passed_to(nginx.addr(), 12).len(), 3);
}

/// What comes and goes leaves nothing in the zone: memory and connections are at the end what they
/// were at the start. A peer to which a request's reference were left would stay there for good.
#[test]
fn many_changes_leave_nothing_in_the_zone() {
    let (net, dir) = (Net::isolated(), Dir::new("size_leak"));
    let fake = FakeConsul::start(&net);
    // Half of the zone: were a peer in a hundred lost, it would be full before the end.
    let (backend, entries) = crowd(60);
    // Peers leave while they have requests.
    backend.set_delay(Duration::from_millis(1));
    let status: SocketAddr = (net.ip(90), net.port()).into();
    let upstreams = ["web", "kept"];
    let nginx = asking(&net, &dir, &fake.url())
        .workers(2)
        .http("upstream web { zone web 192k; consul_upstream web hold=0; }")
        .http("upstream kept { zone kept 192k; least_conn; consul_upstream web hold=0; keepalive 8; }")
        .server("web")
        .server("kept")
        .listen(status)
        .http(format!("server {{ listen {status}; location / {{ consul_status; }} }}"))
        .start();
    let mut index = 100;
    let mut know = |entries: &[Value]| {
        index += 1;
        fake.know(index, entries);
        let line = format!("of {} instances serve, index {index}", entries.len());
        nginx.wait_log(&line, upstreams.len(), PATIENCE);
    };
    // Bytes in use, and connections that peers have, in each upstream.
    let seen = || {
        let status = http::get(status, "/").unwrap().json();
        upstreams.map(|name| {
            let upstream = &status["upstreams"][name];
            let peers = upstream["peers"].as_array().unwrap();
            let active: u64 = peers.iter().map(|peer| peer["active"].as_u64().unwrap()).sum();
            (upstream["memory"]["used"].as_u64().unwrap(), active, peers.len())
        })
    };
    let none = seen();
    assert_eq!(none.map(|(_, active, peers)| (active, peers)), [(0, 0); 2]);
    know(&entries);
    let all = seen();
    assert_eq!(all.map(|(_, active, peers)| (active, peers)), [(0, 60); 2]);

    let options = Options::default().pause(Duration::from_millis(2));
    let loads: Vec<Load> =
        nginx.addrs()[..2].iter().map(|addr| Load::start(*addr, &options)).collect();
    let changes = scaled(200, 4_000);
    for n in 0..changes {
        // All thirty go, and thirty others come: 30 × 4,000 are more than 100,000.
        let from = n % 2 * 30;
        know(&entries[from..from + 30]);
    }
    for load in loads {
        let report = load.stop();
        report.assert_nothing_lost();
        println!("{} peers came and went: {report}", 30 * changes);
    }
    know(&[]);
    assert_eq!(seen(), none);
    know(&entries);
    assert_eq!(seen(), all);
    println!("in use with no peer {none:?}, with all {all:?}, and the same at the end");
    assert_eq!(nginx.log_count("is full"), 0);
}

/// Tests that judge a time: they run alone, at the end.
mod timed {
    use super::*;

    /// One change among very many peers is a few stores: what is searched and freed is so outside.
    #[test]
    fn the_list_is_locked_for_microseconds() {
        let (net, dir) = (Net::isolated(), Dir::new("size_lock"));
        let fake = FakeConsul::start(&net);
        let peers = if full() { 10_000 } else { 3_000 };
        let (_backend, entries) = crowd(peers);
        fake.know(100, &entries);
        let nginx = asking(&net, &dir, &fake.url())
            .workers(2)
            .main("error_log debug.log debug;")
            .http("upstream web { zone web 32m; random two; consul_upstream web; keepalive 16; }")
            .server("web")
            .start();
        let load = Load::start(nginx.addr(), &Options::default().pause(Duration::from_millis(1)));
        let count = scaled(40, 300);
        for n in 0..count {
            // In turn one at any place goes, and comes back.
            let out = (n / 2 * 7919 + 13) % entries.len();
            let index = 101 + n as u64;
            if n % 2 == 0 {
                let left: Vec<Value> = entries
                    .iter()
                    .enumerate()
                    .filter(|(i, _)| *i != out)
                    .map(|(_, it)| it.clone())
                    .collect();
                fake.know(index, &left);
            } else {
                fake.know(index, &entries);
            }
            nginx.wait_log(&format!("instances serve, index {index}"), 1, PATIENCE);
        }
        let report = load.stop();
        report.assert_nothing_lost();
        // The first one was the whole set.
        let all = locked(&nginx);
        assert_eq!(all.len(), count + 1);
        let (median, p99) = (all[all.len() / 2], all[(all.len() - 1) * 99 / 100]);
        println!(
            "{count} changes of one among {peers}: locked {median} ns at the median, {p99} at p99"
        );
        assert!(median <= 10_000, "{all:?}");
        assert!(!full() || p99 <= 10_000, "{all:?}");
    }
}
