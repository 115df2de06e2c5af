//! Workers that are killed, stopped or panic, at any moment: the others go on, and the next one takes
//! over what it finds.

use std::net::SocketAddr;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use testbed::http::{self, Conn};
use testbed::{Backend, Dir, Load, Net, Signal, eventually};

use crate::common::{
    Instance, PATIENCE, RETRIED, Serve, Stage, asking, every_worker_serves, follower, followers,
    full, met, scaled, serves, steady, web,
};
use crate::fake_consul::{FakeConsul, entry};

/// In the order in which an edit takes them; see `Step` in the crate nginx-peers.
pub const STEPS: [&str; 15] = [
    "Begun",
    "LockedPrimaries",
    "Locked",
    "Held",
    "Linked",
    "AllLinked",
    "Changed",
    "Marked",
    "Counted",
    "Told",
    "Released",
    "UnlockedBackups",
    "Unlocked",
    "Ended",
    "Freed",
];

/// How long a request may take after a worker was replaced that had a lock. In the midst of other
/// tests it is the machine that takes its time: there the bound only tells an answer from a hang.
pub fn at_most() -> Duration {
    Duration::from_secs(if full() { 1 } else { 10 })
}

/// An edit of both lists at a time: one instance comes or goes, and one becomes a backup or ceases to
/// be one.
pub fn entries(instances: &[Instance; 3], odd: bool) -> Vec<Value> {
    let [one, two, three] = instances;
    let mut second = entry("web-2", two.addr());
    if odd {
        second["Service"]["Meta"] = json!({ "nginx_backup": "1" });
    }
    let mut all = vec![entry("web-1", one.addr()), second];
    if odd {
        all.push(entry("web-3", three.addr()));
    }
    all
}

#[test]
fn killed_at_every_step_of_an_edit() {
    let (net, dir) = (Net::isolated(), Dir::new("crash_steps"));
    let fake = FakeConsul::start(&net);
    let instances: [Instance; 3] = web(&net);
    let mut index = 5;
    fake.know(index, &entries(&instances, false));
    let mut nginx = asking(&net, &dir, &fake.url())
        .with_failpoints()
        .workers(3)
        .upstream("web", "consul_upstream web;")
        .start();
    nginx.allow_log("exited on signal 9");
    every_worker_serves(&nginx, &["web-1", "web-2"]);
    let load = Load::start(nginx.addr(), &steady());
    let (mut kills, mut slowest) = (0, Duration::ZERO);
    for round in 0..scaled(2, 7) {
        for step in STEPS {
            let killed = follower(&nginx);
            let others = nginx.worker_pids().into_iter().filter(|pid| *pid != killed);
            let mut conns = http::worker_conns(nginx.addr(), others).unwrap();
            index += 1;
            nginx.arm(step);
            fake.know(index, &entries(&instances, index % 2 == 0));
            eventually(PATIENCE, &format!("{step} strikes"), || !nginx.is_armed(step));
            eventually(PATIENCE, "it is replaced", || {
                let now = nginx.children();
                now.len() == 3 && !now.contains(&killed)
            });
            let begin = Instant::now();
            for (pid, conn) in &mut conns {
                for _ in 0..3 {
                    let answer = conn.get("/").unwrap();
                    let took = begin.elapsed();
                    assert_eq!(answer.status, 200, "{pid} after {step}");
                    assert!(
                        took < at_most(),
                        "{pid} answers {took:?} after {step} of round {round}"
                    );
                    slowest = slowest.max(took);
                }
            }
            kills += 1;
            eventually(PATIENCE, "another first worker", || {
                nginx.worker_pids().len() == 3
                    && matches!(followers(&nginx)[..], [pid] if pid != killed)
            });
            let expected: &[&str] =
                if index % 2 == 0 { &["web-1", "web-3"] } else { &["web-1", "web-2"] };
            every_worker_serves(&nginx, expected);
        }
    }
    let report = load.stop();
    println!("{kills} of {kills} recovered, the slowest answer after {slowest:?}; {report}");
    let mended = nginx.log_count("which is whole again");
    assert!(mended >= kills / STEPS.len() * 8, "only {mended} lists were mended");
    // Nothing of an old edit is left that the next ones could trip over.
    for _ in 0..20 {
        index += 1;
        fake.know(index, &entries(&instances, index % 2 == 0));
        nginx.wait_log(&format!("serve, index {index}"), 1, PATIENCE);
    }
    nginx.reload();
    serves(nginx.addr(), if index % 2 == 0 { &["web-1", "web-3"] } else { &["web-1", "web-2"] });
}

/// Any worker, at any moment, under load and changes.
#[test]
fn random_workers_are_killed_in_a_loop() {
    const PEERS: u16 = 100;
    let (net, dir) = (Net::isolated(), Dir::new("crash_loop"));
    let fake = FakeConsul::start(&net);
    let backend = Backend::bind(([0, 0, 0, 0], 0).into(), "crowd").unwrap();
    let all: Vec<Value> = (0..PEERS)
        .map(|n| {
            let addr = SocketAddr::from(([127, 201, 0, n as u8 + 1], backend.addr().port()));
            entry(&format!("web-{n:03}"), addr)
        })
        .collect();
    fake.know(5, &all);
    let mut nginx = asking(&net, &dir, &fake.url())
        .workers(4)
        .http("upstream web { zone web 1m; consul_upstream web; keepalive 32; }")
        .server("web")
        .start();
    nginx.allow_log("exited on signal 9");
    let load = Load::start(nginx.addr(), &steady());
    let kills = scaled(20, 100);
    let mut slowest = Duration::ZERO;
    for n in 0..kills {
        // A change is under way while the worker dies.
        let out = n % all.len();
        let less: Vec<Value> =
            all.iter().enumerate().filter(|(i, _)| *i != out).map(|(_, it)| it.clone()).collect();
        fake.know(6 + n as u64, &less);
        let workers = nginx.worker_pids();
        // Every other time the one that edits.
        let following = followers(&nginx);
        let victim = if n % 2 == 0 { following[0] } else { workers[n / 2 % workers.len()] };
        nginx.signal_child(victim, Signal::KILL);
        eventually(PATIENCE, "it is replaced", || {
            let now = nginx.worker_pids();
            now.len() == 4 && !now.contains(&victim)
        });
        let begin = Instant::now();
        for (pid, mut conn) in http::worker_conns(nginx.addr(), nginx.worker_pids()).unwrap() {
            assert_eq!(conn.get("/").unwrap().status, 200);
            let took = begin.elapsed();
            assert!(took < at_most(), "{pid} answers {took:?} after kill {n}");
            slowest = slowest.max(took);
        }
        eventually(PATIENCE, "one follows Consul", || {
            let following = followers(&nginx);
            assert!(following.len() <= 1, "two writers: {following:?}");
            following.len() == 1
        });
    }
    let report = load.stop();
    println!("{kills} kills, the slowest round of probes took {slowest:?}; {report}");
    fake.know(1000, &all);
    nginx.wait_log("100 of 100 instances serve, index 1000", 1, PATIENCE);
}

#[test]
fn a_first_worker_that_stands_still_costs_no_request() {
    let stage = Stage::set("crash_stopped");
    let [one, two] = stage.web();
    stage.register([&one]);
    let nginx = stage.nginx().workers(3).upstream("web", "consul_upstream web;").start();
    every_worker_serves(&nginx, &["web-1"]);
    let stopped = follower(&nginx);
    let others = nginx.worker_pids().into_iter().filter(|pid| *pid != stopped);
    let mut conns = http::worker_conns(nginx.addr(), others).unwrap();
    nginx.signal_child(stopped, Signal::STOP);
    stage.register([&two]);
    for conn in conns.values_mut() {
        for _ in 0..50 {
            assert_eq!(conn.get("/").unwrap().backend(), "web-1");
        }
    }
    nginx.signal_child(stopped, Signal::CONT);
    every_worker_serves(&nginx, &["web-1", "web-2"]);
    assert_eq!(follower(&nginx), stopped, "nobody has taken its place");
}

#[test]
fn a_watch_that_panics_begins_again() {
    let stage = Stage::set("crash_watch");
    let [one, two] = stage.web();
    stage.register([&one]);
    let nginx =
        stage.nginx().with_failpoints().workers(2).upstream("web", "consul_upstream web;").start();
    every_worker_serves(&nginx, &["web-1"]);
    let before = follower(&nginx);
    for n in 1..=3 {
        nginx.arm("watch");
        let begin = Instant::now();
        if n % 2 == 0 {
            stage.consul.deregister("web-2")
        } else {
            stage.register([&two])
        }
        eventually(PATIENCE, "the failpoint strikes", || !nginx.is_armed("watch"));
        every_worker_serves(&nginx, if n % 2 == 0 { &["web-1"] } else { &["web-1", "web-2"] });
        let lines = nginx.wait_log("failed and starts again", n, PATIENCE);
        assert!(lines[n - 1].contains("[crit]"), "{lines:?}");
        println!("live {:?} after the change", begin.elapsed());
    }
    assert_eq!(follower(&nginx), before);
}

#[test]
fn a_thread_that_panics_begins_again() {
    let stage = Stage::set("crash_thread");
    let [one, two] = stage.web();
    stage.register([&one]);
    let mut nginx =
        stage.nginx().with_failpoints().workers(2).upstream("web", "consul_upstream web;").start();
    every_worker_serves(&nginx, &["web-1"]);
    let load = Load::start(nginx.addr(), &steady());
    nginx.arm("thread");
    nginx.reload();
    nginx.wait_log("the thread failed and starts again: failpoint thread", 1, PATIENCE);
    stage.register([&two]);
    every_worker_serves(&nginx, &["web-1", "web-2"]);
    assert_eq!(followers(&nginx).len(), 1);
    load.stop().assert_nothing_lost();
}

/// What becomes of the requests of a worker that is killed is its clients' loss; those of the others
/// never notice.
#[test]
fn the_others_never_notice() {
    let stage = Stage::set("crash_others");
    let [one, two] = stage.web();
    stage.register([&one, &two]);
    let mut nginx = stage.nginx().workers(4).upstream("web", "consul_upstream web;").start();
    nginx.allow_log("exited on signal 9");
    every_worker_serves(&nginx, &["web-1", "web-2"]);
    let kept = nginx.worker_pids().into_iter().find(|pid| *pid != follower(&nginx)).unwrap();
    let mut conns = http::worker_conns(nginx.addr(), [kept]).unwrap();
    let conn: &mut Conn = conns.get_mut(&kept).unwrap();
    for _ in 0..scaled(5, 20) {
        let killed = follower(&nginx);
        nginx.signal_child(killed, Signal::KILL);
        eventually(PATIENCE, "another first worker", || {
            let met = met(conn, 4).unwrap();
            assert!(met.iter().all(|name| name.starts_with("web-")), "{met:?} {RETRIED}");
            matches!(followers(&nginx)[..], [pid] if pid != killed)
        });
        thread::yield_now();
    }
}
