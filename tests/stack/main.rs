//! The whole stack, as `compose.yaml` brings it up: containers are scaled, stopped, killed and
//! restarted while requests flow, and nothing else is touched.
//!
//! `make test-stack` builds the images first. Without a Docker engine the tests are skipped.

mod burst;
mod datacenters;
mod image;
mod monitoring;
mod stack;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use testbed::http::Conn;
use testbed::{Load, Options, eventually};

use stack::{PATIENCE, Stack};

/// Two hundred requests a second, somewhat more where nothing else keeps the machine busy.
fn load(addr: SocketAddr) -> Load {
    Load::start(addr, &Options::default().connections(5).pause(Duration::from_millis(18)))
}

/// Who answers the next requests; the status of what is no backend's answer.
fn met(addr: SocketAddr) -> Result<BTreeSet<String>, String> {
    let mut conn = Conn::open(addr).map_err(|err| err.to_string())?;
    let one = |_| {
        let answer = conn.get("/").map_err(|err| err.to_string())?;
        Ok(match answer.backend() {
            "" => answer.status.to_string(),
            name => name.to_owned(),
        })
    };
    (0..24).map(one).collect()
}

#[track_caller]
fn serves(addr: SocketAddr, expected: &BTreeSet<String>) {
    eventually(PATIENCE, &format!("{expected:?} serve"), || {
        let met = met(addr)?;
        thread::sleep(Duration::from_millis(10));
        if met == *expected { Ok(()) } else { Err(format!("{met:?}")) }
    });
}

/// The status shows so many instances, and all is in sync.
#[track_caller]
fn knows(stack: &Stack, number: usize) {
    eventually(PATIENCE, &format!("the status shows {number} instances"), || {
        let status = stack.status()?;
        let peers = status["upstreams"]["app"]["peers"].as_array().map(Vec::len);
        let in_sync = status["in_sync"] == true;
        if peers == Some(number) && in_sync { Ok(()) } else { Err(status.to_string()) }
    });
}

fn status(text: &str) -> BTreeSet<String> {
    [text.to_owned()].into()
}

/// When each of those that answer did so for the first time.
struct Firsts {
    seen: Arc<Mutex<BTreeMap<String, SystemTime>>>,
    end: Arc<AtomicBool>,
}

impl Firsts {
    fn watch(addr: SocketAddr) -> Firsts {
        let firsts = Firsts { seen: Arc::default(), end: Arc::default() };
        let (seen, end) = (firsts.seen.clone(), firsts.end.clone());
        thread::spawn(move || {
            while !end.load(Ordering::Relaxed) {
                let met = met(addr).unwrap_or_default();
                let now = SystemTime::now();
                for name in met {
                    seen.lock().expect("the times").entry(name).or_insert(now);
                }
                thread::sleep(Duration::from_millis(20));
            }
        });
        firsts
    }

    /// Waits for it.
    #[track_caller]
    fn of(&self, name: &str) -> SystemTime {
        eventually(PATIENCE, &format!("{name} answers"), || {
            self.seen.lock().expect("the times").get(name).copied()
        })
    }
}

impl Drop for Firsts {
    fn drop(&mut self) {
        self.end.store(true, Ordering::Relaxed);
    }
}

#[test]
fn scales_up_and_down_to_nothing_and_back() {
    /// A new container serves so soon after its start.
    const LIVE: Duration = Duration::from_secs(2);
    let begin = Instant::now();
    let Some(stack) = Stack::up("scale", &["nginx", "registrar", "web"]) else { return };
    serves(stack.nginx, &stack.names("web"));
    let took = begin.elapsed();
    println!("up, and the first correct answer, in {took:?}");
    assert!(took < Duration::from_secs(30), "{took:?}");
    // While a Consul that was just started looks for a leader, whoever asked it is held up.
    stack.scale("web", 2);
    serves(stack.nginx, &stack.names("web"));

    let load = load(stack.nginx);
    for number in [3, 5, 1, 4] {
        let before = stack.names("web");
        let first = Firsts::watch(stack.nginx);
        stack.scale("web", number);
        serves(stack.nginx, &stack.names("web"));
        for new in stack.containers("web") {
            if before.contains(&new.name()) {
                continue;
            }
            let took = first.of(&new.name()).duration_since(new.time("StartedAt"));
            let took = took.unwrap_or_default();
            println!("{} serves {took:?} after its start", new.name());
            assert!(took < LIVE, "{took:?}");
        }
        stack.converged("web", Duration::from_secs(10));
        knows(&stack, number);
    }
    let report = load.stop();
    println!("{report}");
    report.assert_nothing_lost();

    // Nothing left: that is an operator's word, and not held.
    stack.scale("web", 0);
    serves(stack.nginx, &status("503"));
    let page = Conn::open(stack.nginx).unwrap().get("/").unwrap();
    assert!(page.text().contains("Back soon"), "{}", page.text());
    knows(&stack, 0);
    stack.scale("web", 1);
    serves(stack.nginx, &stack.names("web"));
    knows(&stack, 1);
}

#[test]
fn a_killed_container_is_out_at_once_and_the_last_one_is_held() {
    let Some(stack) = Stack::up("kill", &["nginx", "registrar"]) else { return };
    stack.scale("web", 3);
    serves(stack.nginx, &stack.names("web"));
    let requests = load(stack.nginx);
    let victim = &stack.containers("web")[0];
    let name = victim.name();
    // The policy of restarts does not count for one that was killed by hand.
    let killed = SystemTime::now();
    victim.docker(&["kill"]);
    eventually(PATIENCE, "it is out of rotation", || {
        let registered = stack.registered("web")?;
        if registered.contains(&name) { Err(format!("{registered:?}")) } else { Ok(()) }
    });
    // By the clock of the registrar's log: on a slow machine Docker says a second later that it has killed it.
    let out = eventually(PATIENCE, "the registrar says so", || {
        let log = stack.compose(&["logs", "--no-color", "--timestamps", "registrar"]);
        let line = log.lines().find_map(|line| line.split_once(" registrar: notice: -"));
        let time = line.and_then(|(before, _)| before.split(' ').next_back()).map(stack::time);
        time.ok_or(log)
    });
    let took = out.duration_since(killed).expect("not before it was killed");
    println!("deregistered {took:?} after it was to die");
    assert!(took < Duration::from_secs(1), "{took:?}");
    serves(stack.nginx, &stack.names("web"));
    let report = requests.stop();
    println!("{report}");
    report.assert_nothing_lost();

    // Two that crash, and are not started again. That of the last one is held, though it is dead: an
    // agent that loses all of a service looks just like that.
    let left = stack.containers("web");
    assert_eq!(left.len(), 2);
    for container in left {
        container.docker(&["update", "--restart", "no"]);
        container.crash();
    }
    eventually(PATIENCE, "the last one is held", || {
        let log = stack.compose(&["logs", "--no-color", "nginx"]);
        if log.contains("are held for 30s") { Ok(()) } else { Err(log) }
    });
    eventually(PATIENCE, "nothing is registered", || {
        let registered = stack.registered("web")?;
        if registered.is_empty() { Ok(()) } else { Err(format!("{registered:?}")) }
    });
}

#[test]
fn a_server_that_lingers_is_stopped_without_a_lost_request() {
    let Some(stack) = Stack::up("linger", &["once", "registrar"]) else { return };
    stack.scale("linger", 3);
    serves(stack.once, &stack.names("linger"));
    let load = Load::start(
        stack.once,
        &Options::default().connections(4).keepalive(false).pause(Duration::from_millis(18)),
    );
    for left in [2, 1] {
        let leaving = &stack.containers("linger")[0];
        leaving.docker(&["stop", "--time", "10"]);
        let names = stack.names("linger");
        assert_eq!(names.len(), left);
        serves(stack.once, &names);
    }
    let report = load.stop();
    println!("{report}");
    report.assert_nothing_lost();
    assert_eq!(report.retried, 0);
}

#[test]
fn everything_beside_nginx_may_be_restarted_and_nginx_reloaded() {
    /// What is registered is what runs, so soon after anything.
    const CONVERGED: Duration = Duration::from_secs(10);
    let services = ["nginx", "registrar"];
    let Some(stack) = Stack::behind_a_proxy("restart", &services) else { return };
    stack.scale("web", 3);
    let names = stack.names("web");
    serves(stack.nginx, &names);
    let load = load(stack.nginx);
    let again = |service: &str, within: Duration| {
        stack.container(service).docker(&["restart", "--time", "5"]);
        let begun = Instant::now();
        stack.converged("web", within);
        println!("{service} was restarted: what runs is registered {:?} later", begun.elapsed());
    };

    again("consul", PATIENCE);
    again("registrar", CONVERGED);
    again("docker-proxy", CONVERGED);
    // A registrar that is killed, and one that loses the engine, while something happens.
    for (service, verb) in [("registrar", "kill"), ("docker-proxy", "stop")] {
        stack.container(service).docker(&[verb]);
        let gone = &stack.containers("web")[0];
        gone.docker(&["stop", "--time", "5"]);
        stack.compose(&["up", "--detach", "--no-build", "--no-recreate", service]);
        let begun = Instant::now();
        stack.converged("web", CONVERGED);
        println!("{service} is back: what runs is registered {:?} later", begun.elapsed());
        stack.scale("web", 3);
        serves(stack.nginx, &stack.names("web"));
    }
    stack.container("nginx").exec(&["nginx", "-s", "reload"]);
    serves(stack.nginx, &stack.names("web"));
    stack.converged("web", CONVERGED);
    knows(&stack, 3);

    let report = load.stop();
    println!("{report}");
    report.assert_nothing_lost();
}
