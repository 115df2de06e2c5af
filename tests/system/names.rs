//! Instances that are registered with a host name.

use std::collections::BTreeSet;
use std::fs::{self, Permissions};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use testbed::dns::Failure;
use testbed::{Backend, Dir, Dns, Load, Nginx, Service, Signal, eventually, nginx, paths};

use crate::common::{
    PATIENCE, Serve, Stage, changes, every_worker_serves, follower, passed_to, serves, serves_now,
    steady, watch,
};

/// The time to live of a name that is to change. What is shorter than 5 seconds counts as 5.
const SHORT: Duration = Duration::from_secs(1);
const LONG: Duration = Duration::from_secs(3600);

/// After so long a change of a name is live: the 5 seconds, a tenth of them that spreads the
/// questions, a second between two changes, and what a busy machine takes.
const LIVE: Duration = Duration::from_secs(5 + 1 + 1 + 3);

/// How long a stop may take while nobody answers.
const PROMPT: Duration = Duration::from_secs(1);

const WEB: &str = "consul_upstream web;";

// ---- the system's own

/// `localhost` stands in `/etc/hosts`, and nothing ends in `.invalid` (RFC 6761).
#[test]
fn a_name_that_has_an_address_serves_and_one_that_has_none_does_not() {
    let stage = Stage::set("names_hosts");
    let [one, two] = stage.web();
    let local = Backend::bind(([127, 0, 0, 1], 0).into(), "local").unwrap();
    // On some systems it has this address, too.
    let port = local.addr().port();
    let _v6 = Backend::bind((Ipv6Addr::LOCALHOST, port).into(), "local");
    let named = Service::new("web", "web-3", local.addr()).address("localhost");
    let unknown = two.service.clone().address("no-such-host.invalid");
    stage.consul.register_all(&[one.service.clone(), unknown.clone(), named.clone()]);
    let nginx = stage.nginx().workers(2).upstream("web", WEB).start();
    // All of that in time for the first request.
    serves_now(nginx.addr(), &["web-1", "local"]);
    let first = changes(&nginx, "web").remove(0);
    assert!(first.contains("of 3 instances serve"), "{first}");
    assert!(first.contains(&format!("+127.0.0.1:{port} (web-3)")), "{first}");
    assert!(!first.contains("web-2"), "{first}");

    // Another address, and the name is forgotten; and the other way round.
    let load = Load::start(nginx.addr(), &steady());
    stage.register([&two]);
    every_worker_serves(&nginx, &["web-1", "web-2", "local"]);
    stage.consul.register(&named.clone().address("no-such-host.invalid"));
    every_worker_serves(&nginx, &["web-1", "web-2"]);
    stage.consul.register_all(&[named, unknown]);
    every_worker_serves(&nginx, &["web-1", "local"]);
    load.stop().assert_nothing_lost();
}

/// A service without a single address has no servers, and an instance that has one ends that.
#[test]
fn a_service_of_unknown_names_alone() {
    let stage = Stage::set("names_unknown");
    let [one] = stage.web();
    stage.consul.register(&one.service.clone().address("no-such-host.invalid"));
    let begin = Instant::now();
    let nginx = stage.nginx().http("consul_start_timeout 15s;").upstream("web", WEB).start();
    assert!(begin.elapsed() < Duration::from_secs(10), "{:?}", begin.elapsed());
    serves_now(nginx.addr(), &["502"]);
    stage.register([&one]);
    serves(nginx.addr(), &["web-1"]);
}

// ---- name servers of our own

/// A name server, and an nginx whose `/etc/resolv.conf` names it alone.
struct Bench {
    stage: Stage,
    dns: Dns,
    binary: PathBuf,
}

impl Bench {
    /// None, with a message, where no file of the system can be replaced for one process.
    fn set(name: &str) -> Option<Bench> {
        let stage = Stage::set(name);
        let addr: SocketAddr = (stage.net.ip(53), 53).into();
        let conf = stage.dir.write("resolv.conf", format!("nameserver {}\n", addr.ip()));
        let binary = stage.dir.write(
            "nginx-with-resolv.conf",
            format!(
                "#!/bin/sh\nexec unshare --mount --propagation private sh -c \
                 'mount --bind {} /etc/resolv.conf && exec \"$0\" \"$@\"' {} \"$@\"\n",
                conf.display(),
                paths::nginx().unwrap().display()
            ),
        );
        fs::set_permissions(&binary, Permissions::from_mode(0o755)).unwrap();
        let said = Command::new(&binary).arg("-v").output().expect("start sh");
        let dns = match (said.status.success(), Dns::bind(addr)) {
            (true, Ok(dns)) => dns,
            (true, Err(error)) => {
                eprintln!("{name}: left out, {addr}: {error}");
                return None;
            }
            (false, _) => {
                let why = String::from_utf8_lossy(&said.stderr);
                eprintln!("{name}: left out, nothing can be mounted here: {}", why.trim());
                return None;
            }
        };
        Some(Bench { stage, dns, binary })
    }

    fn nginx(&self) -> nginx::Builder {
        self.stage.nginx().binary(&self.binary)
    }

    /// Backends on several hosts, all on one port: what an instance with a name can be.
    fn hosts<const N: usize>(&self) -> (u16, [Backend; N]) {
        let port = self.stage.net.port();
        let backends = std::array::from_fn(|n| {
            let addr = (self.stage.net.ip(20 + n as u8), port).into();
            Backend::bind(addr, &format!("host-{}", n + 1)).unwrap()
        });
        (port, backends)
    }

    fn register(&self, id: &str, name: &str, port: u16) {
        let service = Service::new("web", id, (self.stage.net.ip(20), port).into());
        self.stage.consul.register(&service.address(name));
    }

    /// Waits until a name was asked for again.
    #[track_caller]
    fn wait_queries(&self, name: &str, more: u64) {
        let before = self.dns.queries(name);
        eventually(PATIENCE, &format!("{more} more questions for {name}"), || {
            self.dns.queries(name) >= before + more
        });
    }
}

fn ips(backends: &[&Backend]) -> Vec<IpAddr> {
    backends.iter().map(|backend| backend.addr().ip()).collect()
}

#[test]
fn every_address_of_a_name_serves() {
    let Some(bench) = Bench::set("names_many") else { return };
    let (port, [one, two, three]) = bench.hosts();
    bench.dns.set("web.test", &ips(&[&one, &two, &three]), LONG);
    bench.register("named", "web.test", port);
    let [own] = bench.stage.web();
    let own = own.with(|service| service.meta("nginx_weight", "3"));
    bench.stage.register([&own]);
    let nginx = bench.nginx().workers(2).upstream("web", WEB).start();
    let all = ["host-1", "host-2", "host-3", "web-1"];
    serves_now(nginx.addr(), &all);
    every_worker_serves(&nginx, &all);
    let expected: BTreeSet<SocketAddr> =
        [&one, &two, &three, &own.backend].map(|backend| backend.addr()).into();
    assert_eq!(passed_to(nginx.addr(), 20), expected);
}

#[test]
fn an_instance_of_several_addresses_has_its_attributes_at_each() {
    let Some(bench) = Bench::set("names_weights") else { return };
    let (port, [one, two, three]) = bench.hosts();
    bench.dns.set("heavy.test", &ips(&[&one, &two]), LONG);
    bench.dns.set("light.test", &ips(&[&three]), LONG);
    let heavy = Service::new("web", "heavy", one.addr()).address("heavy.test").weights(3, 1);
    bench.stage.consul.register(&heavy);
    // Twice the same server: one is enough.
    bench.register("light", "light.test", port);
    bench.register("same", "LIGHT.test.", port);
    let nginx = bench.nginx().upstream("web", WEB).start();
    crate::common::shares(nginx.addr(), &[("host-1", 30), ("host-2", 30), ("host-3", 10)]);
}

#[test]
fn a_name_that_moves_is_followed() {
    let Some(bench) = Bench::set("names_move") else { return };
    let (port, [one, two, three]) = bench.hosts();
    bench.dns.set("web.test", &ips(&[&one]), SHORT);
    bench.register("web-1", "web.test", port);
    let nginx = bench.nginx().workers(2).upstream("web", WEB).start();
    serves_now(nginx.addr(), &["host-1"]);
    let load = Load::start(nginx.addr(), &steady());
    let index = bench.stage.consul.index("web");
    for (to, expected) in [
        (ips(&[&two]), &["host-2"][..]),
        (ips(&[&two, &three, &one]), &["host-1", "host-2", "host-3"]),
        (ips(&[&three]), &["host-3"]),
    ] {
        let begin = Instant::now();
        bench.dns.set("web.test", &to, SHORT);
        every_worker_serves(&nginx, expected);
        assert!(begin.elapsed() < LIVE, "{:?}", begin.elapsed());
        println!("a changed name is live after {:?}", begin.elapsed());
    }
    load.stop().assert_nothing_lost();
    assert_eq!(bench.stage.consul.index("web"), index, "Consul has said nothing of it");
    // Three moves, and no more than a question for each family every five seconds.
    assert_eq!(changes(&nginx, "web").len(), 4, "{:?}", changes(&nginx, "web"));
}

#[test]
fn a_name_that_holds_for_long_is_not_asked_for_again() {
    let Some(bench) = Bench::set("names_long") else { return };
    let (port, [one, two]) = bench.hosts();
    bench.dns.set("long.test", &ips(&[&one]), LONG);
    bench.dns.set("short.test", &ips(&[&two]), Duration::ZERO);
    bench.register("long", "long.test", port);
    bench.register("short", "short.test", port);
    let nginx = bench.nginx().upstream("web", WEB).start();
    serves_now(nginx.addr(), &["host-1", "host-2"]);
    // Both families, twice more.
    let begin = Instant::now();
    bench.wait_queries("short.test", 4);
    assert!(begin.elapsed() > Duration::from_secs(9), "{:?}", begin.elapsed());
    assert_eq!(bench.dns.queries("long.test"), 2);
    serves_now(nginx.addr(), &["host-1", "host-2"]);
}

/// Whatever goes wrong with the name servers: what is known last serves on.
#[test]
fn while_no_name_is_answered_the_last_addresses_serve() {
    let Some(bench) = Bench::set("names_fail") else { return };
    let (port, [one, two, three]) = bench.hosts();
    let names = ["fails.test", "silent.test", "gone.test"];
    for (name, backend) in names.into_iter().zip([&one, &two, &three]) {
        bench.dns.set(name, &ips(&[backend]), SHORT);
        bench.register(name, name, port);
    }
    let nginx = bench.nginx().workers(2).upstream("web", WEB).start();
    let all = ["host-1", "host-2", "host-3"];
    serves_now(nginx.addr(), &all);
    let load = Load::start(nginx.addr(), &steady());
    bench.dns.fail(names[0], Failure::ServFail);
    bench.dns.fail(names[1], Failure::Silence);
    bench.dns.fail(names[2], Failure::NxDomain);
    // Each is asked for, and once more after that has failed.
    let before = names.map(|name| bench.dns.queries(name));
    eventually(PATIENCE, "two questions in vain for each name", || {
        let asked: Vec<u64> =
            names.iter().zip(before).map(|(name, n)| bench.dns.queries(name) - n).collect();
        if asked.iter().all(|n| *n >= 4) { Ok(()) } else { Err(format!("{asked:?}")) }
    });
    every_worker_serves(&nginx, &all);
    // Also where Consul tells of something else meanwhile.
    let [own] = bench.stage.web();
    bench.stage.register([&own]);
    every_worker_serves(&nginx, &["host-1", "host-2", "host-3", "web-1"]);
    bench.stage.consul.deregister("web-1");
    every_worker_serves(&nginx, &all);

    for name in names {
        bench.dns.set(name, &ips(&[&one]), SHORT);
    }
    // Three instances, and one address for all.
    every_worker_serves(&nginx, &["host-1"]);
    load.stop().assert_nothing_lost();
}

/// Neither new workers nor one that takes the place of another know less than those before them.
#[test]
fn new_workers_know_the_last_addresses_too() {
    let Some(bench) = Bench::set("names_reload") else { return };
    let (port, [one]) = bench.hosts();
    let [own] = bench.stage.web();
    bench.stage.register([&own]);
    bench.dns.set("web.test", &ips(&[&one]), LONG);
    bench.register("named", "web.test", port);
    let mut nginx = bench.nginx().workers(2).upstream("web", WEB).start();
    nginx.allow_log("exited on signal 9");
    let all = ["host-1", "web-1"];
    every_worker_serves(&nginx, &all);
    bench.dns.fail_all(Some(Failure::ServFail));
    let removed =
        || changes(&nginx, "web").iter().any(|line| line.contains(" -") || line.starts_with('-'));

    let killed = follower(&nginx);
    let asked = bench.dns.queries("web.test");
    nginx.signal_child(killed, Signal::KILL);
    eventually(PATIENCE, "the name was asked for in vain", || {
        bench.dns.queries("web.test") > asked
    });
    nginx.wait_log("instances serve, index", 2, PATIENCE);
    assert!(!removed(), "{:?}", changes(&nginx, "web"));
    every_worker_serves(&nginx, &all);

    // A killed worker takes its requests with it; a reload does not.
    let load = Load::start(nginx.addr(), &steady());
    let asked = bench.dns.queries("web.test");
    nginx.reload();
    eventually(PATIENCE, "the name was asked for in vain", || {
        bench.dns.queries("web.test") > asked
    });
    nginx.wait_log("instances serve, index", 3, PATIENCE);
    every_worker_serves(&nginx, &all);
    load.stop().assert_nothing_lost();
}

/// One that answers nothing, and one that does.
#[test]
fn a_second_name_server_is_asked_where_the_first_is_silent() {
    let Some(bench) = Bench::set("names_second") else { return };
    let (port, [one]) = bench.hosts();
    let second = match Dns::bind((bench.stage.net.ip(54), 53).into()) {
        Ok(second) => second,
        Err(error) => panic!("{error}"),
    };
    bench.dns.fail_all(Some(Failure::Silence));
    second.set("web.test", &ips(&[&one]), LONG);
    let servers: String = [&bench.dns, &second]
        .iter()
        .map(|dns| format!("nameserver {}\n", dns.addr().ip()))
        .collect();
    let dir: &Dir = &bench.stage.dir;
    dir.write("resolv.conf", format!("{servers}options timeout:1 attempts:1\n"));
    bench.register("web-1", "web.test", port);
    let nginx = bench.nginx().upstream("web", WEB).start();
    serves(nginx.addr(), &["host-1"]);
    assert!(bench.dns.queries("web.test") > 0 && second.queries("web.test") > 0);
}

/// Tests that judge a time: they run alone, at the end.
mod timed {
    use super::*;

    /// A name without an answer is waited for a moment, and the others of its service no longer.
    #[test]
    fn a_silent_name_server_holds_nobody_up() {
        let Some(bench) = Bench::set("names_silent") else { return };
        let (port, [one]) = bench.hosts();
        let [own] = bench.stage.web();
        bench.stage.register([&own]);
        bench.dns.fail_all(Some(Failure::Silence));
        bench.register("named", "web.test", port);
        let begin = Instant::now();
        let nginx = bench.nginx().http("consul_start_timeout 30s;").workers(2).upstream("web", WEB);
        let nginx = nginx.start();
        assert!(begin.elapsed() < Duration::from_secs(3), "{:?}", begin.elapsed());
        serves_now(nginx.addr(), &["web-1"]);
        assert!(bench.dns.queries("web.test") > 0, "it was asked for");
        // As soon as it is known it serves; until then the questions become fewer.
        bench.dns.set("web.test", &ips(&[&one]), LONG);
        bench.dns.fail_all(None);
        watch("the named one serves too", || {
            let to = passed_to(nginx.addr(), 10);
            if to == [own.addr(), one.addr()].into() { Ok(()) } else { Err(format!("{to:?}")) }
        });
    }

    #[test]
    fn a_silent_name_server_does_not_keep_nginx_from_its_end() {
        let Some(bench) = Bench::set("names_end") else { return };
        let (port, []) = bench.hosts();
        let [own] = bench.stage.web();
        bench.stage.register([&own]);
        bench.dns.fail_all(Some(Failure::Silence));
        for n in 0..40 {
            bench.register(&format!("named-{n}"), &format!("web-{n}.test"), port);
        }
        for signal in [Signal::TERM, Signal::QUIT] {
            let mut nginx: Nginx = bench.nginx().workers(2).upstream("web", WEB).start();
            serves(nginx.addr(), &["web-1"]);
            // In the middle of questions.
            bench.wait_queries("web-39.test", 1);
            let begin = Instant::now();
            nginx.signal(signal);
            eventually(PATIENCE, &format!("it ends by {signal:?}"), || nginx.ended());
            let took = begin.elapsed();
            assert!(took < PROMPT, "{signal:?}: {took:?}");
            println!("it ends by {signal:?} in {took:?}");
        }
    }
}
