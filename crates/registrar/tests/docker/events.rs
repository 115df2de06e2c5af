//! What each event of the engine does.

use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;
use testbed::eventually;

use crate::bed::{Bed, PUBLISHED, SOON, id};

/// Ends a second after SIGTERM, or after SIGUSR1.
const LINGERS: &str =
    "trap 'sleep 1; exit 0' TERM USR1; trap : HUP USR2; echo ready; while :; do sleep 0.02; done";

/// The whole grace time is gained: nothing is sent to a container that is about to end.
#[test]
fn stop_takes_it_out_before_it_ends() {
    let Some(bed) = Bed::new("stop") else { return };
    let registrar = bed.registrar(&[]);
    let web = bed.docker.run_script(&bed.docker.name("web"), &PUBLISHED, LINGERS);
    let id = id(&web, 80);
    bed.registered(&id);
    thread::scope(|scope| {
        let stop = scope.spawn(|| web.docker(&["stop"]));
        bed.in_maintenance(&id, "registrar: stopping, started 2");
        assert_eq!(web.inspect()["State"]["Running"], true, "it is out before it has ended");
        stop.join().unwrap();
    });
    bed.gone(&id);
    registrar.says("is about to stop");
}

/// How long after the signal the agent has it; a look at the figure, and a generous bound.
#[test]
fn the_drain_is_quick() {
    let Some(bed) = Bed::new("drain_time") else { return };
    let _registrar = bed.registrar(&[]);
    let web = bed.docker.run_script(&bed.docker.name("web"), &PUBLISHED, LINGERS);
    let service = bed.docker.image();
    bed.registered(&id(&web, 80));
    bed.consul.settled(service, "is registered", |all| !all.is_empty());
    let index = bed.consul.index(service);
    let began = Instant::now();
    thread::scope(|scope| {
        let waiting = scope.spawn(|| bed.consul.wait_change(service, index).0);
        web.docker(&["kill", "--signal=TERM"]);
        let told = began.elapsed();
        let arrived = waiting.join().unwrap() - began;
        eprintln!("docker kill took {told:?}, a blocking query had it after {arrived:?}");
        assert!(arrived < Duration::from_secs(1), "{arrived:?}");
    });
}

#[test]
fn other_signals_do_nothing() {
    let Some(bed) = Bed::new("other_signals") else { return };
    let _registrar = bed.registrar(&[]);
    let web = bed.docker.run_script(&bed.docker.name("web"), &PUBLISHED, LINGERS);
    bed.registered(&id(&web, 80));
    for signal in ["HUP", "USR2", "WINCH"] {
        web.docker(&["kill", "--signal", signal]);
    }
    bed.settled();
    assert_eq!(bed.maintenance(&id(&web, 80)), None);
}

#[test]
fn the_containers_own_stop_signal() {
    let Some(bed) = Bed::new("stop_signal") else { return };
    let _registrar = bed.registrar(&[]);
    let args = ["--publish=127.0.0.1::80", "--stop-signal=SIGUSR1"];
    let web = bed.docker.run_script(&bed.docker.name("web"), &args, LINGERS);
    bed.registered(&id(&web, 80));
    web.docker(&["kill", "--signal=USR1"]);
    bed.in_maintenance(&id(&web, 80), "registrar: stopping");
    bed.gone(&id(&web, 80));
}

#[test]
fn a_violent_end() {
    let Some(bed) = Bed::new("violent_end") else { return };
    let _registrar = bed.registrar(&[]);
    let killed = bed.labelled(&[]);
    let crashes = "echo ready; while ! [ -e /end ]; do sleep 0.5; done; exit 139";
    let crashed = bed.docker.run_script(&bed.docker.name("web"), &PUBLISHED, crashes);
    let removed = bed.labelled(&[]);
    let ids = [&killed, &crashed, &removed].map(|container| id(container, 80));
    ids.iter().for_each(|id| drop(bed.registered(id)));
    killed.docker(&["kill"]);
    bed.gone(&ids[0]);
    crashed.exec(": >/end");
    bed.gone(&ids[1]);
    drop(removed);
    bed.gone(&ids[2]);
}

#[test]
fn pause_and_unpause() {
    let Some(bed) = Bed::new("pause") else { return };
    let mut registrar = bed.registrar(&[]);
    let web = bed.labelled(&[]);
    let id = id(&web, 80);
    bed.registered(&id);
    web.docker(&["pause"]);
    bed.in_maintenance(&id, "registrar: paused");
    // One that starts later sees it as well.
    registrar.kill();
    bed.consul.put(&format!("/v1/agent/service/deregister/{id}"), "");
    let _registrar = bed.registrar(&[]);
    bed.in_maintenance(&id, "registrar: paused");
    web.docker(&["unpause"]);
    bed.out_of_maintenance(&id);
}

#[test]
fn dockers_healthcheck() {
    let Some(bed) = Bed::new("health") else { return };
    let _registrar = bed.registrar(&[]);
    let health = [
        "--health-cmd=[ -e /well ]",
        "--health-interval=500ms",
        "--health-retries=1",
        "--health-start-period=60s",
        "--label=SERVICE_CHECK_TTL=600s",
    ];
    let args: Vec<&str> = PUBLISHED.into_iter().chain(health).collect();
    let web = bed.container("web", &args);
    let id = id(&web, 80);
    bed.registered(&id);
    let says = |output: &str, status: &str| {
        bed.check(&id, "docker", output, |check| {
            check["Status"] == status && check["Output"].as_str().unwrap().ends_with(output)
        });
    };
    says("starting", "critical");
    web.exec(": >/well");
    says("healthy", "passing");
    // It stands beside the check that the labels ask for.
    assert_eq!(bed.checks(&id).len(), 2);
}

#[test]
fn an_unhealthy_container() {
    let Some(bed) = Bed::new("unhealthy") else { return };
    let _registrar = bed.registrar(&[]);
    let health = ["--health-cmd=! [ -e /ill ]", "--health-interval=300ms", "--health-retries=1"];
    let args: Vec<&str> = PUBLISHED.into_iter().chain(health).collect();
    let web = bed.container("web", &args);
    let id = id(&web, 80);
    bed.registered(&id);
    bed.check(&id, "docker", "is passing", |check| check["Status"] == "passing");
    web.exec(": >/ill");
    bed.check(&id, "docker", "is critical", |check| check["Status"] == "critical");
}

#[test]
fn rename() {
    let Some(bed) = Bed::new("rename") else { return };
    let _registrar = bed.registrar(&[]);
    let mut web = bed.labelled(&[]);
    let old = id(&web, 80);
    bed.registered(&old);
    web.rename(&bed.docker.name("renamed"));
    bed.registered(&id(&web, 80));
    bed.gone(&old);
}

#[test]
fn restart() {
    let Some(bed) = Bed::new("restart") else { return };
    let _registrar = bed.registrar(&[]);
    let web = bed.labelled(&[]);
    let id = id(&web, 80);
    let port = bed.registered(&id)["Port"].clone();
    web.docker(&["restart"]);
    // It has another port by now.
    let now = json!(web.port("80/tcp"));
    assert_ne!(now, port);
    bed.until(&id, "has its new port", |service| service["Port"] == now);
    bed.out_of_maintenance(&id);
}

#[test]
fn networks_come_and_go() {
    let Some(bed) = Bed::new("networks") else { return };
    let _registrar = bed.registrar(&["-internal"]);
    let [one, two] = [1, 2].map(|_| bed.docker.network(&bed.docker.name("net")));
    let web = bed.container("web", &["--expose=80", "--network", one.name()]);
    let id = id(&web, 80);
    assert_eq!(bed.registered(&id)["Address"], web.ip(one.name()));
    web.connect(two.name());
    web.disconnect(one.name());
    let ip = web.ip(two.name());
    bed.until(&id, "has its other address", |service| service["Address"] == ip);
}

/// The end of one container and the start of the next, under the same name.
#[test]
fn one_name_again_and_again() {
    let Some(bed) = Bed::new("one_name") else { return };
    let _registrar = bed.registrar(&[]);
    let name = bed.docker.name("web");
    let mut last = None;
    for _ in 0..5 {
        drop(last.take());
        last = Some(bed.docker.run(&name, &PUBLISHED));
    }
    let web = last.unwrap();
    let id = id(&web, 80);
    bed.until(&id, "is the last one's", |service| {
        service["Meta"]["registrar_container"] == web.id()
            && service["Port"] == json!(web.port("80/tcp"))
    });
    bed.settled();
    assert_eq!(bed.service(&id).unwrap()["Meta"]["registrar_container"], web.id());
    assert_eq!(bed.maintenance(&id), None);
}

/// What an operator has set survives all that the registrar does.
#[test]
fn an_operators_maintenance() {
    let Some(bed) = Bed::new("operators") else { return };
    let mut registrar = bed.registrar(&["--drain-timeout", "1"]);
    let health = ["--health-cmd=[ -e /well ]", "--health-interval=300ms", "--health-retries=1"];
    let args: Vec<&str> = PUBLISHED.into_iter().chain(health).collect();
    let script = "trap : TERM; echo ready; while :; do sleep 0.05; done";
    let web = bed.docker.run_script(&bed.docker.name("web"), &args, script);
    let id = id(&web, 80);
    bed.registered(&id);
    let reason = "broken disk";
    bed.consul
        .put(&format!("/v1/agent/service/maintenance/{id}?enable=true&reason=broken+disk"), "");
    let stays = || assert_eq!(bed.maintenance(&id).as_deref(), Some(reason));

    web.exec(": >/well");
    bed.check(&id, "docker", "is passing", |check| check["Status"] == "passing");
    stays();
    web.docker(&["pause"]);
    web.docker(&["unpause"]);
    bed.settled();
    stays();
    web.docker(&["kill", "--signal=TERM"]);
    registrar.says("is about to stop");
    // Longer than the drain may take, and a look of the registrar more.
    let relooked = Instant::now() + Duration::from_secs(7);
    eventually(SOON, "the drain is over", || Instant::now() > relooked);
    stays();
    registrar.kill();
    let _registrar = bed.registrar(&["-tags", "new"]);
    bed.until(&id, "is registered anew", |service| service["Tags"] == json!(["new"]));
    stays();
}
