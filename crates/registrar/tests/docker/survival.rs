//! The end of a registrar, and the begin of the next.

use std::thread;
use std::time::Duration;

use testbed::{Signal, eventually};

use crate::bed::{Bed, PUBLISHED, SOON, id};

#[test]
fn a_crash() {
    let Some(bed) = Bed::new("crash") else { return };
    let mut registrar = bed.registrar(&[]);
    let (stays, goes) = (bed.labelled(&[]), bed.labelled(&[]));
    let (kept, gone) = (id(&stays, 80), id(&goes, 80));
    bed.registered(&kept);
    bed.registered(&gone);
    registrar.kill();
    drop(goes);
    let comes = bed.labelled(&[]);
    assert!(bed.service(&gone).is_some(), "nobody was there to see it");
    let _next = bed.registrar(&[]);
    bed.gone(&gone);
    bed.registered(&id(&comes, 80));
    assert!(bed.service(&kept).is_some());
}

/// An upgrade: one ends, the next begins, and whoever follows the service sees nothing of it.
#[test]
fn an_upgrade() {
    let Some(bed) = Bed::new("upgrade") else { return };
    let mut registrar = bed.registrar(&[]);
    let health = ["--health-cmd=true", "--health-interval=300ms", "--label=SERVICE_NAME=upgraded"];
    let args: Vec<&str> = PUBLISHED.into_iter().chain(health).collect();
    let web = bed.container("web", &args);
    bed.registered(&id(&web, 80));
    bed.check(&id(&web, 80), "docker", "is passing", |check| check["Status"] == "passing");
    bed.consul.settled("upgraded", "passing", |all| {
        all.len() == 1 && all[0].status() == testbed::Status::Passing
    });
    let index = bed.consul.index("upgraded");
    for _ in 0..3 {
        registrar.signal(Signal::TERM);
        let status = registrar.ended(Duration::from_secs(1)).expect("it ends within a second");
        assert!(status.success(), "{status}");
        registrar.says("SIGTERM: ends, and all stays registered");
        registrar = bed.registrar(&[]);
        bed.settled();
    }
    assert_eq!(bed.consul.index("upgraded"), index);
}

/// The next one goes on with what the one before it has begun.
#[test]
fn a_drain_goes_on() {
    let Some(bed) = Bed::new("drain_goes_on") else { return };
    let mut registrar = bed.registrar(&[]);
    let web = bed.stubborn(&[]);
    let id = id(&web, 80);
    bed.drains(&web);
    registrar.kill();
    let mut registrar = bed.registrar(&[]);
    bed.settled();
    bed.in_maintenance(&id, "registrar: stopping");
    // But not beyond a restart that nobody has seen.
    registrar.kill();
    web.docker(&["restart", "--time=0"]);
    let _registrar = bed.registrar(&[]);
    bed.out_of_maintenance(&id);
}

/// Its time begins anew with the registrar.
#[test]
fn a_drain_that_goes_on_is_over_some_day() {
    let Some(bed) = Bed::new("drain_over") else { return };
    let mut registrar = bed.registrar(&[]);
    let web = bed.stubborn(&[]);
    let id = id(&web, 80);
    bed.drains(&web);
    registrar.kill();
    let _registrar = bed.registrar(&["--drain-timeout", "2"]);
    bed.out_of_maintenance(&id);
}

/// Two registrars with different names on one agent leave each other's services alone.
#[test]
fn only_its_own_are_removed() {
    let Some(bed) = Bed::new("only_own") else { return };
    let _registrar = bed.registrar(&["-resync", "1"]);
    let others = r#"{ "ID": "x", "Name": "x", "Port": 1, "Meta": { "registrar_owner": "other" } }"#;
    bed.consul.put("/v1/agent/service/register", others);
    bed.consul.put("/v1/agent/service/register", r#"{ "ID": "y", "Name": "y", "Port": 1 }"#);
    bed.settled();
    bed.settled();
    assert!(bed.service("x").is_some() && bed.service("y").is_some());
}

/// What goes away in the agent, or is changed there, comes back.
#[test]
fn what_somebody_else_has_changed() {
    let Some(bed) = Bed::new("changed_by_others") else { return };
    let _registrar = bed.registrar(&[]);
    let web = bed.labelled(&["SERVICE_CHECK_TTL=600s"]);
    let id = id(&web, 80);
    let service = bed.registered(&id);
    bed.consul.put(&format!("/v1/agent/service/deregister/{id}"), "");
    bed.registered(&id);
    bed.consul.put(&format!("/v1/agent/check/deregister/service:{id}"), "");
    bed.check(&id, "service", "is back", |_| true);
    let other = format!(r#"{{ "ID": "{id}", "Name": "other", "Port": 1 }}"#);
    bed.consul.put("/v1/agent/service/register", &other);
    bed.until(&id, "is as before", |now| *now == service);
}

#[test]
fn it_ends_within_a_second_whatever_hangs() {
    let Some(mut bed) = Bed::new("ends") else { return };
    let relay = bed.relay();
    let mut registrar = bed.launch(&[]).engine(relay.path()).start();
    let web = bed.labelled(&[]);
    bed.registered(&id(&web, 80));
    bed.consul.pause();
    relay.fail("", testbed::relay::Fault::Hang);
    let dropped = thread::spawn(move || drop(web));
    eventually(SOON, "the container is gone", || dropped.is_finished());
    registrar.signal(Signal::TERM);
    let status = registrar.ended(Duration::from_secs(1)).expect("it ends within a second");
    assert!(status.success());
}
