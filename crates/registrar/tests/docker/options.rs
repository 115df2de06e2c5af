//! Every row of the table of options that changes what is registered.

use std::time::{Duration, Instant};

use serde_json::json;
use testbed::Signal;

use crate::bed::{Bed, HOST, PUBLISHED, SOON, id};

#[test]
fn internal() {
    let Some(bed) = Bed::new("internal") else { return };
    let _registrar = bed.registrar(&["-internal"]);
    let web = bed.container("web", &["--expose=80", "--publish=127.0.0.1::443"]);
    for port in [80, 443] {
        let service = bed.registered(&id(&web, port));
        assert_eq!(
            (&service["Address"], &service["Port"]),
            (&json!(web.ip("bridge")), &json!(port))
        );
    }
}

#[test]
fn ip() {
    let Some(bed) = Bed::new("ip") else { return };
    let _registrar = bed.registrar(&["-ip", "192.0.2.1"]);
    let web = bed.labelled(&[]);
    let service = bed.registered(&id(&web, 80));
    let wanted = (&json!("192.0.2.1"), &json!(web.port("80/tcp")));
    assert_eq!((&service["Address"], &service["Port"]), wanted);
}

#[test]
fn ip_from_a_label() {
    let Some(bed) = Bed::new("ip_from_label") else { return };
    let _registrar = bed.registrar(&["-useIpFromLabel", "macvlan.ip"]);
    let web = bed.labelled(&["macvlan.ip=192.0.2.7/24"]);
    let service = bed.registered(&id(&web, 80));
    let wanted = (&json!("192.0.2.7"), &json!(web.port("80/tcp")));
    assert_eq!((&service["Address"], &service["Port"]), wanted);
    let without = bed.labelled(&[]);
    assert_eq!(bed.registered(&id(&without, 80))["Address"], "127.0.0.1");
}

#[test]
fn explicit() {
    let Some(bed) = Bed::new("explicit") else { return };
    let _registrar = bed.registrar(&["-explicit"]);
    let without = bed.labelled(&[]);
    let with = bed.labelled(&["SERVICE_80_NAME=shop"]);
    bed.registered(&id(&with, 80));
    assert!(bed.service(&id(&without, 80)).is_none());
}

/// A lost event is made up for.
#[test]
fn resync() {
    let Some(bed) = Bed::new("resync") else { return };
    let relay = bed.relay();
    // Events do not come, and nothing says so.
    relay.fail("/events", testbed::relay::Fault::Hang);
    let _registrar = bed.launch(&["-resync", "1"]).engine(relay.path()).start();
    let web = bed.labelled(&[]);
    bed.registered(&id(&web, 80));
    web.docker(&["stop", "--time=1"]);
    bed.gone(&id(&web, 80));
}

#[test]
fn cleanup() {
    let Some(bed) = Bed::new("cleanup") else { return };
    let web = bed.labelled(&[]);
    let left = |id: &str| {
        let body = json!({ "ID": id, "Name": "left", "Port": 1 });
        bed.consul.put("/v1/agent/service/register", &body.to_string());
    };
    let (dead, udp) = (format!("{HOST}:dead:80"), format!("{HOST}:dead:53:udp"));
    let others = ["other:dead:80", "somebody's"];
    // What runs is taken over, whoever has registered it.
    let ids = [&dead, &udp, &id(&web, 80), others[0], others[1]];
    ids.into_iter().for_each(left);

    let mut without = bed.registrar(&[]);
    bed.until(&id(&web, 80), "is taken over", |s| s["Meta"]["registrar_owner"] == HOST);
    assert!(bed.service(&dead).is_some() && bed.service(&udp).is_some());
    without.kill();
    let _with = bed.registrar(&["-cleanup"]);
    bed.gone(&dead);
    bed.gone(&udp);
    assert!(others.into_iter().all(|id| bed.service(id).is_some()));
    assert!(bed.service(&id(&web, 80)).is_some());
}

#[test]
fn deregister_on_success() {
    let Some(bed) = Bed::new("on_success") else { return };
    let mut registrar = bed.registrar(&["-deregister", "on-success"]);
    let ends = |code: i32| {
        let script = format!("echo ready; while ! [ -e /end ]; do sleep 0.5; done; exit {code}");
        let web = bed.docker.run_script(&bed.docker.name("web"), &PUBLISHED, &script);
        bed.registered(&id(&web, 80));
        web.exec(": >/end");
        web
    };
    let well = ends(0);
    bed.gone(&id(&well, 80));
    let signalled = ends(137);
    bed.gone(&id(&signalled, 80));
    let failed = ends(3);
    let reason = "registrar: the container exited with code 3";
    bed.in_maintenance(&id(&failed, 80), reason);

    // Another registrar keeps it as well.
    registrar.kill();
    let again = bed.registrar(&["-deregister", "on-success"]);
    bed.settled();
    again.says("connected");
    bed.in_maintenance(&id(&failed, 80), reason);
    // Until it is gone.
    let gone = id(&failed, 80);
    drop(failed);
    bed.gone(&gone);
}

#[test]
fn deregister_always() {
    let Some(bed) = Bed::new("deregister_always") else { return };
    let _registrar = bed.registrar(&["-deregister", "always"]);
    let script = "echo ready; while ! [ -e /end ]; do sleep 0.5; done; exit 3";
    let web = bed.docker.run_script(&bed.docker.name("web"), &PUBLISHED, script);
    bed.registered(&id(&web, 80));
    web.exec(": >/end");
    bed.gone(&id(&web, 80));
}

#[test]
fn retry_attempts() {
    let Some(mut bed) = Bed::new("retry_attempts") else { return };
    bed.consul.kill();
    let began = Instant::now();
    let options = ["-retry-attempts", "2", "-retry-interval", "200"];
    let mut registrar = bed.registrar(&options);
    let status = registrar.ended(SOON).expect("it gives up");
    assert!(!status.success());
    assert!(began.elapsed() >= Duration::from_millis(400));
    registrar.says("gave up after 3 attempts");

    let mut patient = bed.registrar(&["-retry-interval", "50"]);
    patient.says("waits until it answers");
    bed.consul.restart();
    let web = bed.labelled(&[]);
    bed.registered(&id(&web, 80));
    assert!(patient.is_running());
}

#[test]
fn the_engines_name() {
    let Some(bed) = Bed::new("engines_name") else { return };
    let info = std::process::Command::new("docker").args(["info", "--format={{.Name}}"]).output();
    let host = String::from_utf8(info.unwrap().stdout).unwrap().trim().to_owned();
    let _registrar = bed.launch(&[]).without_hostname().start();
    let web = bed.labelled(&[]);
    let service = bed.registered(&format!("{host}:{}:80", web.name()));
    assert_eq!(service["Meta"]["registrar_owner"], host);
}

#[test]
fn network() {
    let Some(bed) = Bed::new("network_option") else { return };
    let network = bed.docker.network(&bed.docker.name("front"));
    let _registrar = bed.registrar(&["-internal", "--network", network.name()]);
    let outside = bed.container("web", &["--expose=80"]);
    let web = bed.container("web", &["--expose=80", "--network", network.name()]);
    assert_eq!(bed.registered(&id(&web, 80))["Address"], web.ip(network.name()));
    assert!(bed.service(&id(&outside, 80)).is_none());
}

#[test]
fn name_from_compose() {
    let Some(bed) = Bed::new("name_from_compose") else { return };
    let _registrar = bed.registrar(&["--name-from", "compose"]);
    let web = bed.labelled(&["com.docker.compose.service=front"]);
    assert_eq!(bed.registered(&id(&web, 80))["Service"], "front");
    let web = bed.labelled(&["com.docker.compose.service=front", "SERVICE_NAME=shop"]);
    assert_eq!(bed.registered(&id(&web, 80))["Service"], "shop");
    let web = bed.labelled(&[]);
    assert_eq!(bed.registered(&id(&web, 80))["Service"], bed.docker.image());
}

#[test]
fn health_off() {
    let Some(bed) = Bed::new("health_off") else { return };
    let mut with = bed.registrar(&[]);
    let args: Vec<&str> = PUBLISHED.into_iter().chain(["--health-cmd=true"]).collect();
    let web = bed.container("web", &args);
    bed.registered(&id(&web, 80));
    bed.check(&id(&web, 80), "docker", "is there", |_| true);
    with.kill();
    // The check goes, the service stays.
    let _without = bed.registrar(&["--health", "off"]);
    testbed::eventually(SOON, "no check", || bed.checks(&id(&web, 80)).is_empty());
    assert!(bed.service(&id(&web, 80)).is_some());
}

#[test]
fn drain_by_deregistration() {
    let Some(bed) = Bed::new("drain_deregister") else { return };
    let _registrar = bed.registrar(&["--drain", "deregister", "--drain-timeout", "3"]);
    let web = bed.stubborn(&[]);
    let began = Instant::now();
    web.docker(&["kill", "--signal=TERM"]);
    bed.gone(&id(&web, 80));
    // It stays away for the time that was given, though it still runs, and comes back then.
    bed.registered(&id(&web, 80));
    assert!(began.elapsed() >= Duration::from_secs(3), "{:?}", began.elapsed());
}

#[test]
fn no_drain() {
    let Some(bed) = Bed::new("no_drain") else { return };
    let _registrar = bed.registrar(&["--drain", "off"]);
    let web = bed.stubborn(&[]);
    web.docker(&["kill", "--signal=TERM"]);
    bed.settled();
    assert_eq!(bed.maintenance(&id(&web, 80)), None);
    assert!(bed.service(&id(&web, 80)).is_some());
}

/// A drain is over after three seconds, and not before.
fn drained_for_three_seconds(name: &str, timeout: &str, args: &[&str]) {
    let Some(bed) = Bed::new(name) else { return };
    let _registrar = bed.registrar(&["--drain-timeout", timeout]);
    let web = bed.stubborn(args);
    let began = Instant::now();
    bed.drains(&web);
    bed.out_of_maintenance(&id(&web, 80));
    assert!(began.elapsed() >= Duration::from_secs(3), "{:?}", began.elapsed());
}

#[test]
fn drain_timeout() {
    drained_for_three_seconds("drain_timeout", "3", &[]);
}

/// The container's own time to stop counts where it is longer.
#[test]
fn drain_timeout_of_a_slow_container() {
    drained_for_three_seconds("drain_slow", "0", &["--stop-timeout=3"]);
}

#[test]
fn refused_options() {
    let Some(bed) = Bed::new("refused_options") else { return };
    for (options, says) in [
        (&["-tags", "{{.Name}}"][..], "templates are not supported"),
        (&["-nonsense"], "-nonsense"),
        (&["--drain", "maybe"], "maintenance, deregister, off"),
    ] {
        let mut registrar = bed.registrar(options);
        let status = registrar.ended(SOON).expect("it ends");
        assert!(!status.success(), "{options:?}");
        registrar.says(says);
    }
    let mut ssh = bed.launch(&[]).env("DOCKER_HOST", "ssh://host").start();
    assert!(!ssh.ended(SOON).expect("it ends").success());
    ssh.says("DOCKER_HOST \"ssh://host\" must begin with");
}

#[test]
fn accepted_and_ignored() {
    let Some(bed) = Bed::new("ignored_options") else { return };
    let mut registrar = bed.registrar(&["-ttl", "30", "-ttl-refresh=20", "-resync=0"]);
    let web = bed.labelled(&[]);
    bed.registered(&id(&web, 80));
    registrar.says("-ttl and -ttl-refresh are ignored");
    registrar.says("-resync 0 is taken as 60");
    registrar.signal(Signal::INT);
    assert!(registrar.ended(Duration::from_secs(1)).expect("it ends").success());
}
