//! What many watched services cost, and how soon a change of one of them is live: within the
//! bound on connections to Consul, above it, and with the bound raised. `benches/README.md` tells
//! how to read the table.

#[allow(dead_code, reason = "each benchmark uses its part of what they share")]
mod common;

use std::fs;
use std::process::ExitCode;
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::json;
use testbed::http::Conn;
use testbed::{Consul, Dir, Net, Nginx, eventually};

use common::figure::Figure;
use common::{is_quick, ms, quantile, resident};

/// Instances of each service.
const INSTANCES: usize = 5;

/// The bars: of one core, in percent; resident memory that the watching worker has and another
/// one has not; a change within and above the bound on connections.
const CPU: f64 = 1.0;
const MEMORY: f64 = 64e6;
const WITHIN: Duration = Duration::from_millis(10);
const ABOVE: Duration = Duration::from_secs(15);

const PATIENCE: Duration = Duration::from_secs(60);

struct Case {
    name: &'static str,
    services: usize,
    connections: usize,
    /// So is Consul's own bound.
    is_raised: bool,
    /// A change is live within this time.
    live: Duration,
}

fn main() -> ExitCode {
    let quick = is_quick();
    let many = if quick { 60 } else { 1000 };
    let cap = if quick { 6 } else { 100 };
    println!(
        "services: {INSTANCES} instances each, idle for {} s, then changes one by one\n",
        idle(quick).as_secs()
    );
    println!(
        "{:<44} {:>8} {:>12} {:>10}   {:^25}",
        "", "core, %", "connections", "memory, MB", "change live after, ms"
    );
    println!("{:<78}   {:>8} {:>8} {:>8}", "", "median", "p90", "max");
    let cases = [
        Case {
            name: "within the bound",
            services: cap,
            connections: cap,
            is_raised: false,
            live: WITHIN,
        },
        Case {
            name: "above the bound",
            services: many,
            connections: cap,
            is_raised: false,
            live: ABOVE,
        },
        Case {
            name: "the bound raised",
            services: many,
            connections: many,
            is_raised: true,
            live: WITHIN,
        },
    ];
    let mut met = true;
    for case in &cases {
        met &= measure(case, quick);
    }
    if met || quick { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn idle(quick: bool) -> Duration {
    Duration::from_secs(if quick { 2 } else { 60 })
}

fn measure(case: &Case, quick: bool) -> bool {
    let (net, dir) = (Net::isolated(), Dir::new("bench_services"));
    // Consul's own bound is 200 for each client.
    let limits = "-hcl=limits { http_max_conns_per_client = 4000 rpc_max_conns_per_client = 4000 }";
    let consul = Consul::builder(&net, &dir).arg(limits).start();
    let mut conn = Conn::open(consul.addr()).expect("Consul");
    for service in 0..case.services {
        for instance in 0..INSTANCES {
            register(&mut conn, service, instance, 9000);
        }
    }
    let upstreams: String = (0..case.services)
        .map(|n| format!("upstream s{n} {{ zone s{n} 64k; consul_upstream s{n}; }}\n"))
        .collect();
    let nginx = Nginx::builder(&net, &dir)
        .workers(2)
        .http(format!(
            "consul_address {}; consul_max_connections {}; consul_start_timeout 30s;",
            consul.url(),
            case.connections
        ))
        .http(upstreams)
        .server("s0")
        .start();
    nginx.wait_log(" instances serve, index ", case.services, PATIENCE);
    let follower = *nginx
        .worker_pids()
        .iter()
        .find(|pid| nginx.threads(**pid).iter().any(|name| name == "consul"))
        .expect("a worker that follows Consul");
    // The round of all watches begins evenly once all have waited for the first time.
    sleep(Duration::from_secs(if quick { 1 } else { 15 }));

    let (before, begin) = (cpu(follower), Instant::now());
    let mut connections = 0;
    while begin.elapsed() < idle(quick) {
        connections = connections.max(open_to(&nginx, follower, consul.addr().port()));
        sleep(Duration::from_millis(100));
    }
    let share = (cpu(follower) - before) / begin.elapsed().as_secs_f64() * 100.0;
    let other = nginx.worker_pids().into_iter().find(|pid| *pid != follower).expect("two workers");
    let memory = resident(follower) - resident(other);

    let samples = if quick { 3 } else { 20 };
    let times: Vec<Duration> = (0..samples)
        .map(|sample| {
            let service = (sample * 37 + 11) % case.services;
            let index = consul.index(&format!("s{service}"));
            let needle = format!("upstream \"s{service}\": +");
            let seen = nginx.log_count(&needle);
            let log = std::thread::scope(|scope| {
                // When the answer is there for whoever waits for it.
                let answered = scope.spawn(|| consul.wait_change(&format!("s{service}"), index).0);
                // The raw query blocks by then; if not, it is answered at once all the same.
                sleep(Duration::from_millis(5));
                register(&mut conn, service, 0, 9001 + sample as u16);
                let live = eventually(PATIENCE, "a change", || {
                    (nginx.log_count(&needle) > seen).then(Instant::now).ok_or("not yet")
                });
                (answered.join().expect("an answer"), live)
            });
            log.1.saturating_duration_since(log.0)
        })
        .collect();
    let [median, p90, max] = [0.5, 0.9, 1.0].map(|part| quantile(&times, part));
    println!(
        "{:<44} {share:>8.2} {connections:>12} {:>10.1}   {:>8.1} {:>8.1} {:>8.1}",
        format!("{}: {} services, {} connections", case.name, case.services, case.connections),
        memory / 1e6,
        ms(median),
        ms(p90),
        ms(max),
    );
    let note = |what: &str, ours, bar: f64| {
        let what = format!("{} services, {} connections: {what}", case.services, case.connections);
        Figure { bench: "services", what: &what, ours, rival: None, bar: Some(bar) }.note();
    };
    note("a core while idle, %", share, CPU);
    note("memory of the first worker, MB", memory / 1e6, MEMORY / 1e6);
    // Above the bound it is the turn that takes time: each has to be in time. Within, one sample
    // tells what else the machine did.
    let live = if case.live == ABOVE { max } else { median };
    note("a change in the log, ms", ms(live), ms(case.live));
    // Beyond Consul's own bound a connection more is no harm: one that was begun as another came
    // free, and was then not needed.
    let bounded = case.is_raised || connections <= case.connections;
    share < CPU && bounded && memory <= MEMORY && live <= case.live
}

/// Puts an instance straight into the catalog: an agent of its own would do no more.
fn register(conn: &mut Conn, service: usize, instance: usize, port: u16) {
    let body = json!({
        "Node": format!("n{}", instance + 2),
        "Address": format!("127.0.0.{}", instance + 2),
        "SkipNodeUpdate": service > 0,
        "Service": {
            "ID": format!("s{service}-{instance}"),
            "Service": format!("s{service}"),
            "Address": format!("127.1.{}.{}", service / 250, service % 250 + 1),
            "Port": port as usize + instance * 100,
        },
    });
    let answer = conn.request("PUT", "/v1/catalog/register", &[], body.to_string());
    assert_eq!(answer.expect("an answer").status, 200);
}

/// Seconds of processor time, of the process and all its threads.
fn cpu(pid: u32) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("a process");
    let (_, fields) = stat.rsplit_once(") ").expect("proc(5)");
    let ticks: u64 =
        fields.split(' ').skip(11).take(2).map(|n| n.parse::<u64>().unwrap_or(0)).sum();
    // USER_HZ, which is 100 on all of Linux.
    ticks as f64 / 100.0
}

/// Connections of a process to a port, in whatever state.
fn open_to(nginx: &Nginx, pid: u32, port: u16) -> usize {
    let sockets = nginx.fds(pid);
    let table = fs::read_to_string(format!("/proc/{pid}/net/tcp")).unwrap_or_default();
    let port = format!(":{port:04X}");
    table
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>())
        .filter(|columns| columns.get(2).is_some_and(|remote| remote.ends_with(&port)))
        .filter_map(|columns| Some(format!("socket:[{}]", columns.get(9)?)))
        .filter(|socket| sockets.contains(socket))
        .count()
}
