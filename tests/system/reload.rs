//! A reload takes over what serves, with or without Consul, and leaves nothing behind.

use std::fs;
use std::time::{Duration, Instant};

use testbed::{Backend, Dir, Load, Net, Nginx, Options, eventually, http};

use crate::common::{
    Instance, PATIENCE, RawConn, Serve, Stage, asking, every_worker_serves, follower, followers,
    full, memory_counts, met, passed_to, scaled, serves, steady,
};
use crate::fake_consul::FakeConsul;
use crate::size::crowd;

/// Nothing is stored: what serves after a reload without Consul can only have been taken over.
const STORES_NOTHING: &str = "consul_state_path off;";

/// A Consul that comes back with what it knew.
fn stage(name: &str) -> Stage {
    Stage::with(name, |consul| consul.persistent())
}

/// What the line of a reload tells: how many peers, in how many microseconds, and for how many of
/// them the old list was locked.
fn taken_over(nginx: &Nginx) -> Vec<[u64; 3]> {
    let numbers = |line: &str| -> [u64; 3] {
        let (_, rest) = line.split_once("\": ").expect("an upstream is named");
        let words = rest.split(|c: char| !c.is_ascii_digit()).filter(|word| !word.is_empty());
        let numbers: Vec<u64> = words.map(|word| word.parse().expect("a number")).collect();
        numbers.try_into().expect("three numbers")
    };
    let log = nginx.log();
    log.lines().filter(|line| line.contains(" servers taken over in ")).map(numbers).collect()
}

/// The first requests of each worker meet these.
#[track_caller]
fn every_worker_serves_at_once(nginx: &Nginx, expected: &[&str]) {
    for (pid, mut conn) in http::worker_conns(nginx.addr(), nginx.worker_pids()).unwrap() {
        let met = met(&mut conn, 12).unwrap();
        assert_eq!(met.into_iter().collect::<Vec<_>>(), expected, "worker {pid}");
    }
}

#[test]
fn without_consul_nothing_is_lost() {
    let mut stage = stage("reload_alone");
    let [one, two, three] = stage.web();
    stage.register([&one, &two]);
    let mut nginx = stage
        .nginx()
        .workers(2)
        .http(STORES_NOTHING)
        .upstream("web", "consul_upstream web;")
        .start();
    every_worker_serves(&nginx, &["web-1", "web-2"]);
    stage.consul.kill();
    let load = Load::start(nginx.addr(), &steady());
    for n in 1..=3 {
        nginx.reload();
        every_worker_serves_at_once(&nginx, &["web-1", "web-2"]);
        assert_eq!(taken_over(&nginx).len(), n);
    }
    load.stop().assert_nothing_lost();
    assert!(taken_over(&nginx).iter().all(|[peers, ..]| *peers == 2));

    stage.consul.restart();
    stage.register([&three]);
    every_worker_serves(&nginx, &["web-1", "web-2", "web-3"]);
    stage.consul.deregister("web-1");
    every_worker_serves(&nginx, &["web-2", "web-3"]);
}

#[test]
fn a_changed_query_keeps_nothing_and_its_neighbours_keep_theirs() {
    let mut stage = stage("reload_query");
    let [one, two] = stage.web();
    let one = one.with(|service| service.tag("a"));
    let two = two.with(|service| service.tag("b"));
    let static_one = Backend::start(&stage.net, 30, "static");
    stage.register([&one, &two]);
    let upstream = |lines: &str| {
        let server = static_one.addr();
        format!("upstream web {{ zone web 256k; server {server}; {lines} }}")
    };
    let conf = stage.nginx().http(STORES_NOTHING).http("consul_start_timeout 100ms;");
    let mut nginx = conf
        .clone()
        .http(upstream("consul_upstream web tag=a; consul_upstream web tag=b;"))
        .server("web")
        .start();
    let addr = nginx.addr();
    serves(addr, &["static", "web-1", "web-2"]);
    stage.consul.kill();

    // What the order of the lines is, and what of a line says nothing about instances, changes no
    // question.
    nginx.configure(|_| {
        conf.clone()
            .http(upstream(
                "consul_upstream web tag=b hold=1s; consul_upstream web tag=a weight=3;",
            ))
            .server_on(addr, "web")
    });
    nginx.reload();
    every_worker_serves_at_once(&nginx, &["static", "web-1", "web-2"]);

    nginx.configure(|_| {
        conf.clone()
            .http(upstream("consul_upstream web tag=a; consul_upstream web tag=b health=any;"))
            .server_on(addr, "web")
    });
    nginx.reload();
    every_worker_serves_at_once(&nginx, &["static", "web-1"]);
    stage.consul.restart();
    stage.register([&one, &two]);
    serves(addr, &["static", "web-1", "web-2"]);
}

#[test]
fn a_resized_zone_takes_over_and_a_renamed_one_begins_with_what_is_stored() {
    let mut stage = stage("reload_zone");
    let [one, two] = stage.web();
    stage.register([&one, &two]);
    let conf = stage.nginx().workers(2);
    let upstream = |zone: &str| format!("upstream web {{ zone {zone}; consul_upstream web; }}");
    let mut nginx = conf.clone().http(upstream("web 256k")).server("web").start();
    let addr = nginx.addr();
    every_worker_serves(&nginx, &["web-1", "web-2"]);
    let stored = nginx.dir().join("nginx/consul_state");
    eventually(PATIENCE, "the state is stored", || {
        fs::read_dir(&stored).is_ok_and(|mut files| {
            files.any(|file| {
                let text = fs::read_to_string(file.unwrap().path()).unwrap_or_default();
                text.contains("web-1") && text.contains("web-2")
            })
        })
    });
    stage.consul.kill();
    for (n, size) in ["1m", "64k", "256k"].into_iter().enumerate() {
        nginx.configure(|_| {
            conf.clone().http(upstream(&format!("web {size}"))).server_on(addr, "web")
        });
        nginx.reload();
        every_worker_serves_at_once(&nginx, &["web-1", "web-2"]);
        assert_eq!(taken_over(&nginx).len(), n + 1, "{size}");
    }
    assert_eq!(nginx.log_count("stored servers"), 0);

    nginx.configure(|_| conf.clone().http(upstream("other 256k")).server_on(addr, "web"));
    nginx.reload();
    every_worker_serves_at_once(&nginx, &["web-1", "web-2"]);
    assert_eq!(taken_over(&nginx).len(), 3);
    assert_eq!(nginx.log_count("2 stored servers"), 1);
}

#[test]
fn a_zone_that_became_too_small_has_what_fits() {
    let (net, dir) = (Net::isolated(), Dir::new("reload_small"));
    let fake = FakeConsul::start(&net);
    let (_backend, entries) = crowd(200);
    fake.know(5, &entries);
    let conf = asking(&net, &dir, &fake.url()).workers(2).http(STORES_NOTHING);
    let upstream = |size: &str| format!("upstream web {{ zone web {size}; consul_upstream web; }}");
    let mut nginx = conf.clone().http(upstream("512k")).server("web").start();
    let addr = nginx.addr();
    assert_eq!(passed_to(addr, 200).len(), 200);

    nginx.configure(|_| conf.clone().http(upstream("32k")).server_on(addr, "web"));
    nginx.reload();
    let lines = nginx.wait_log("servers are taken over; \"zone web ", 1, PATIENCE);
    let (_, size) = lines[0].split_once("\"zone web ").unwrap();
    let (size, _) = size.split_once("\" would do").unwrap();
    assert!(lines[0].contains("[error]"), "{lines:?}");
    let some = passed_to(addr, 400).len();
    assert!((5..200).contains(&some), "{some} serve");
    assert!(lines[0].contains(&format!(" {some} of 200 servers")), "{some}: {lines:?}");

    // With the size that was named there is room for all, which Consul has to say again.
    nginx.configure(|_| conf.clone().http(upstream(size)).server_on(addr, "web"));
    nginx.reload();
    eventually(PATIENCE, "all serve", || passed_to(addr, 400).len() == 200);
    assert_eq!(nginx.log_count("servers are taken over; \"zone web "), 1, "not again with {size}");
}

/// An instance that has failed is left alone for its `fail_timeout`, whatever is reloaded.
#[test]
fn failures_are_remembered() {
    let stage = stage("reload_failures");
    let [one, two] = stage.web();
    stage.register([&one, &two]);
    let mut nginx = stage
        .nginx()
        .http("error_log error.log notice;")
        .upstream("web", "consul_upstream web fail_timeout=1h;")
        .start();
    let addr = nginx.addr();
    serves(addr, &["web-1", "web-2"]);
    let dead = two.addr();
    two.backend.stop();
    eventually(PATIENCE, "a failure", || passed_to(addr, 2).contains(&dead));
    for _ in 0..3 {
        assert!(!passed_to(addr, 20).contains(&dead), "it is left alone");
        nginx.reload();
    }
    assert!(!passed_to(addr, 20).contains(&dead), "still");
    assert_eq!(taken_over(&nginx).len(), 3);
}

/// Backups stay backups, and a change of the method that knows none makes them servers as others.
#[test]
fn backups_are_taken_over() {
    let mut stage = stage("reload_backups");
    let [one, two] = stage.web();
    let spare = Instance::start(&stage.net, "spare", "spare-1");
    stage.register([&one, &two, &spare]);
    let conf = stage.nginx().workers(2).http(STORES_NOTHING);
    let mut nginx =
        conf.clone().upstream("web", "consul_upstream web; consul_upstream spare backup;").start();
    every_worker_serves(&nginx, &["web-1", "web-2"]);
    nginx.wait_log("(spare-1)", 1, PATIENCE);
    stage.consul.kill();
    nginx.reload();
    every_worker_serves_at_once(&nginx, &["web-1", "web-2"]);
    assert_eq!(taken_over(&nginx)[0][0], 3);
    one.backend.stop();
    two.backend.stop();
    every_worker_serves(&nginx, &["spare-1", "retried"]);
}

/// With retries off, an answer that is lost is lost. The old list is locked for a copy's time only.
fn under_load(name: &str, peers: u32) {
    let (net, dir) = (Net::isolated(), Dir::new(name));
    let fake = FakeConsul::start(&net);
    let (_backend, entries) = crowd(peers);
    fake.know(5, &entries);
    let mut nginx = asking(&net, &dir, &fake.url())
        .workers(2)
        .http("proxy_next_upstream off;")
        .http("upstream web { zone web 32m; consul_upstream web; keepalive 32; }")
        .server("web")
        .start();
    let load = Load::start(nginx.addr(), &Options::default().pause(Duration::from_millis(2)));
    for _ in 0..scaled(6, 30) {
        nginx.reload();
        load.wait_for(50);
    }
    let report = load.stop();
    report.assert_nothing_lost();
    let all = taken_over(&nginx);
    assert_eq!(all.len(), scaled(6, 30));
    // In order of size, in microseconds.
    let times = |n: usize| -> Vec<u64> {
        let mut times: Vec<u64> = all.iter().map(|it| it[n]).collect();
        times.sort_unstable();
        times
    };
    let [took, locked] = [times(1), times(2)];
    let middle = all.len() / 2;
    println!(
        "{peers} peers, {} reloads, {report}; the old list was locked for {} us at the median and {} \
         at most, all of it took {} and {}",
        all.len(),
        locked[middle],
        locked[all.len() - 1],
        took[middle],
        took[all.len() - 1],
    );
    assert!(all.iter().all(|it| it[0] == u64::from(peers)), "{all:?}");
    // Several tests share the machine: one that was interrupted while it held the lock is no
    // measure, most are.
    assert!(locked[middle] <= 5_000, "{locked:?}");
}

#[test]
fn thirty_reloads_with_few_peers() {
    under_load("reload_few", 4);
}

#[test]
fn thirty_reloads_with_many_peers() {
    under_load("reload_many", if full() { 10_000 } else { 2_000 });
}

/// The memory of a process that is its alone, in KiB.
fn memory(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("RssAnon:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// Whether nginx's master has nothing to do: it blocks its signals except while it waits for the next
/// one. On a busy machine it may be a reload behind.
fn waits_for_signals(master: u32) -> bool {
    let status = fs::read_to_string(format!("/proc/{master}/status")).unwrap();
    let hangup = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        u64::from_str_radix(line.trim(), 16).unwrap() & 1
    };
    ["SigBlk:", "SigPnd:", "ShdPnd:"].map(hangup) == [0; 3]
}

#[test]
fn a_hundred_reloads_in_ten_seconds_leave_nothing_behind() {
    let stage = stage("reload_hundred");
    let [one, two] = stage.web();
    stage.register([&one, &two]);
    let mut nginx = stage.nginx().workers(2).upstream("web", "consul_upstream web;").start();
    let seen = |nginx: &Nginx| -> Vec<(Vec<String>, usize)> {
        std::iter::once(nginx.pid())
            .chain(nginx.worker_pids())
            .map(|pid| {
                let threads = nginx.threads(pid);
                (threads, nginx.fds(pid).len())
            })
            .collect()
    };
    let settle = |nginx: &Nginx| {
        eventually(PATIENCE, "one generation is left", || {
            let left = nginx.exiting_pids();
            let (now, idle) = (nginx.worker_pids().len(), waits_for_signals(nginx.pid()));
            if idle && left.is_empty() && now == 2 && followers(nginx).len() == 1 {
                Ok(())
            } else {
                Err(format!("{now} workers, {left:?} are leaving, the master is idle: {idle}"))
            }
        });
    };
    // What the first ones allocate, the others use again.
    for _ in 0..5 {
        nginx.reload();
    }
    settle(&nginx);
    every_worker_serves(&nginx, &["web-1", "web-2"]);
    let before = memory(nginx.pid());
    let load = Load::start(nginx.addr(), &steady());
    let begin = Instant::now();
    for n in 1..=100 {
        nginx.reload_without_waiting();
        std::thread::sleep((begin + n * Duration::from_millis(100)) - Instant::now());
    }
    load.stop().assert_nothing_lost();
    settle(&nginx);
    let reloads = nginx.log_count("reconfiguring");
    assert!(reloads > 20, "{reloads} reloads: too slow a machine to tell anything");
    let after = memory(nginx.pid());
    println!("{reloads} reloads, the master has {before} and {after} KiB");
    assert!(
        after < before + 1024 || !memory_counts(),
        "the master had {before} KiB and has {after}"
    );
    every_worker_serves(&nginx, &["web-1", "web-2"]);
    // Connections of clients and to backends come and go; the rest is as after one reload.
    nginx.reload();
    settle(&nginx);
    let once = seen(&nginx);
    assert_eq!(once.iter().filter(|(threads, _)| threads.len() > 1).count(), 1, "{once:?}");
    assert!(once.iter().all(|(_, fds)| *fds < 32), "{once:?}");
    assert_eq!(nginx.log_count("open socket"), 0);
}

/// The first worker of an old generation follows Consul until its others have ended, too: a request
/// that they have may still have to choose.
#[test]
fn an_old_generation_follows_until_its_last_request_is_answered() {
    let stage = stage("reload_old_generation");
    let [one, two] = stage.web();
    stage.register([&one]);
    let mut nginx = stage.nginx().workers(2).upstream("web", "consul_upstream web;").start();
    every_worker_serves(&nginx, &["web-1"]);
    let old_follower = follower(&nginx);
    let other = nginx.worker_pids().into_iter().find(|pid| *pid != old_follower).unwrap();
    // The head of a request whose body takes its time: nginx chooses a server when it has it all.
    let mut conn = RawConn::to_worker(nginx.addr(), other);
    conn.send("POST / HTTP/1.1\r\nHost: any\r\nContent-Length: 10\r\n\r\n01234");
    nginx.reload();
    eventually(PATIENCE, "the old generation", || {
        let mut leaving = nginx.exiting_pids();
        leaving.sort_unstable();
        let mut expected = [old_follower, other];
        expected.sort_unstable();
        if leaving == expected { Ok(()) } else { Err(format!("{leaving:?}")) }
    });
    stage.register([&two]);
    stage.consul.deregister("web-1");
    // Both generations have seen it.
    nginx.wait_log(&format!("-{} (web-1)", one.addr()), 2, PATIENCE);
    one.backend.stop();
    conn.send("56789");
    let (head, body) = conn.answer();
    assert!(head.starts_with("HTTP/1.1 200 ") && body == "web-2", "{head}{body}");
    assert!(head.contains(&format!("X-Worker: {other}\r")), "{head}");
    assert!(head.contains(&format!("X-Upstream: {}\r", two.addr())), "{head}");
    eventually(PATIENCE, "the old generation has ended", || nginx.exiting_pids().is_empty());
    assert_eq!(followers(&nginx).len(), 1);
}
