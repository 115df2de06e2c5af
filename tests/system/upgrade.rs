//! The binary is replaced while nginx serves (USR2, WINCH, QUIT), and the upgrade is taken back.

use std::fs;
use std::time::Duration;

use testbed::nginx::Daemon;
use testbed::{Load, Options, Signal, eventually, http};

use crate::common::{Instance, PATIENCE, Serve, Stage, met, serves, steady, watch};

/// The workers of a master that follow Consul.
fn followers(nginx: &Daemon, master: u32) -> usize {
    let workers = nginx.workers(master);
    workers.iter().filter(|pid| nginx.threads(**pid).iter().any(|name| name == "consul")).count()
}

/// Waits until each of these workers serves exactly these.
#[track_caller]
fn all_serve(nginx: &Daemon, workers: &[u32], expected: &[&str]) {
    let conns = http::worker_conns(nginx.addr(), workers.iter().copied()).unwrap();
    for (pid, mut conn) in conns {
        watch(&format!("worker {pid} serves {expected:?}"), || {
            let met = met(&mut conn, 24).map_err(|error| error.to_string())?;
            if met.iter().eq(expected) { Ok(()) } else { Err(format!("{met:?}")) }
        });
    }
}

/// Waits until so many lines of the log have this.
#[track_caller]
fn logged(nginx: &Daemon, part: &str, count: usize) {
    eventually(PATIENCE, &format!("{count} lines with {part:?}"), || {
        nginx.log_count(part) >= count
    });
}

fn stored(nginx: &Daemon, parts: &[&str]) {
    let directory = nginx.dir().join("nginx/consul_state");
    eventually(PATIENCE, "the state is stored", || {
        fs::read_dir(&directory).is_ok_and(|mut files| {
            files.any(|file| {
                let text = fs::read_to_string(file.unwrap().path()).unwrap_or_default();
                parts.iter().all(|part| text.contains(part))
            })
        })
    });
}

/// Clients that keep their connections, and clients that do not.
fn loads(nginx: &Daemon) -> [Load; 2] {
    let opening = Options::default().keepalive(false).pause(Duration::from_millis(20));
    [steady(), opening].map(|options| Load::start(nginx.addr(), &options))
}

fn nothing_lost(loads: [Load; 2]) {
    for load in loads {
        load.wait_for(20);
        let report = load.stop();
        println!("{report}");
        report.assert_nothing_lost();
    }
}

#[test]
fn both_generations_follow_and_nothing_is_lost() {
    let stage = Stage::set("upgrade");
    let [one, two, three] = stage.web();
    stage.register([&one, &two]);
    let nginx = stage.nginx().workers(2).upstream("web", "consul_upstream web;").start_detached();
    serves(nginx.addr(), &["web-1", "web-2"]);
    let loads = loads(&nginx);
    let [old] = nginx.masters()[..] else { panic!("one master") };

    let new = nginx.begin_upgrade(old);
    assert_eq!((followers(&nginx, old), followers(&nginx, new)), (1, 1));
    // They share their listeners, so which of them gets a connection is a matter of luck.
    stage.register([&three]);
    logged(&nginx, &format!("+{} (web-3), 3 of 3", three.addr()), 2);
    serves(nginx.addr(), &["web-1", "web-2", "web-3"]);
    stage.consul.deregister("web-3");
    logged(&nginx, &format!("-{} (web-3), 2 of 2", three.addr()), 2);
    serves(nginx.addr(), &["web-1", "web-2"]);

    nginx.end_workers(old);
    all_serve(&nginx, &nginx.workers(new), &["web-1", "web-2"]);
    nginx.quit(old);
    assert_eq!(nginx.masters(), [new]);
    stage.register([&three]);
    all_serve(&nginx, &nginx.workers(new), &["web-1", "web-2", "web-3"]);
    nothing_lost(loads);
    assert_eq!(nginx.log_count("open socket"), 0);
    nginx.stop();
}

/// The old master's new workers find the lists as the old ones left them; they ask Consul before they
/// serve.
#[test]
fn an_upgrade_is_taken_back_and_nothing_is_lost() {
    let stage = Stage::set("upgrade_back");
    let [one, two, three] = stage.web();
    stage.register([&one, &two]);
    let nginx = stage
        .nginx()
        .workers(2)
        .http("proxy_next_upstream off;")
        .upstream("web", "consul_upstream web;")
        .start_detached();
    serves(nginx.addr(), &["web-1", "web-2"]);
    let loads = loads(&nginx);
    let [old] = nginx.masters()[..] else { panic!("one master") };
    let new = nginx.begin_upgrade(old);
    nginx.end_workers(old);

    // Meanwhile an instance goes for good, and another one comes.
    stage.register([&three]);
    stage.consul.deregister("web-1");
    all_serve(&nginx, &nginx.workers(new), &["web-2", "web-3"]);
    eventually(PATIENCE, "its last request is answered", || one.backend.in_flight() == 0);
    one.backend.stop();

    nginx.signal(old, Signal::HUP);
    eventually(PATIENCE, "the old master has workers again", || nginx.workers(old).len() == 2);
    serves(nginx.addr(), &["web-2", "web-3"]);
    nginx.quit(new);
    assert_eq!(nginx.masters(), [old]);
    assert_eq!(followers(&nginx, old), 1);
    stage.consul.deregister("web-2");
    all_serve(&nginx, &nginx.workers(old), &["web-3"]);
    nothing_lost(loads);
    nginx.stop();
}

/// Where Consul is away the state hands the servers over.
#[test]
fn the_state_hands_over_while_consul_is_away() {
    let mut stage = Stage::with("upgrade_alone", |consul| consul.persistent());
    let [one, two, three]: [Instance; 3] = stage.web();
    stage.register([&one, &two]);
    let nginx = stage.nginx().workers(2).upstream("web", "consul_upstream web;").start_detached();
    serves(nginx.addr(), &["web-1", "web-2"]);
    stored(&nginx, &["web-1", "web-2"]);
    stage.consul.kill();
    let loads = loads(&nginx);
    let [old] = nginx.masters()[..] else { panic!("one master") };
    let new = nginx.begin_upgrade(old);
    assert_eq!(nginx.log_count("2 stored servers"), 1);
    nginx.end_workers(old);
    all_serve(&nginx, &nginx.workers(new), &["web-1", "web-2"]);
    nginx.quit(old);
    stage.consul.restart();
    stage.register([&three]);
    all_serve(&nginx, &nginx.workers(new), &["web-1", "web-2", "web-3"]);
    nothing_lost(loads);
    nginx.stop();
}
