//! What fails around it: the engine, the agent, its answers.

use std::path::PathBuf;

use testbed::consul::MASTER_TOKEN;
use testbed::relay::Fault;
use testbed::{Authority, Dir, eventually};

use crate::bed::{Bed, PUBLISHED, SOON, id};

/// The whole of what it asks an engine for; all else could be forbidden by a proxy.
#[test]
fn it_only_reads_from_the_engine() {
    let Some(bed) = Bed::new("only_reads") else { return };
    let relay = bed.relay();
    let _registrar = bed
        .launch(&["-resync", "1", "-deregister=on-success"])
        .without_hostname()
        .engine(relay.path())
        .start();
    let web = bed.labelled(&[]);
    let owned =
        || bed.services().into_values().any(|s| s["Meta"]["registrar_container"] == web.id());
    eventually(SOON, "it is registered", owned);
    web.docker(&["pause"]);
    web.docker(&["unpause"]);
    let container = format!("/containers/{}/json", web.id());
    eventually(SOON, "it has been inspected", || {
        relay.seen().iter().any(|line| line.contains(&container))
    });
    for line in relay.seen() {
        let path = line.strip_prefix("GET ").unwrap_or_else(|| panic!("no GET: {line}"));
        let path = path.split([' ', '?']).next().unwrap();
        // With or without a version in front.
        let path = path
            .strip_prefix("/v1.")
            .and_then(|rest| rest.find('/').map(|at| &rest[at..]))
            .unwrap_or(path);
        let known = ["/version", "/info", "/events", "/containers/json"].contains(&path)
            || (path.starts_with("/containers/") && path.ends_with("/json"));
        assert!(known, "{line}");
    }
}

#[test]
fn the_engine_goes_away() {
    let Some(bed) = Bed::new("engine_away") else { return };
    let relay = bed.relay();
    let mut registrar = bed.launch(&[]).engine(relay.path()).start();
    let (stays, goes) = (bed.labelled(&[]), bed.labelled(&[]));
    let (kept, gone) = (id(&stays, 80), id(&goes, 80));
    bed.registered(&kept);
    bed.registered(&gone);

    relay.fail("", Fault::Close);
    relay.cut();
    registrar.says("what is registered stays");
    drop(goes);
    let comes = bed.labelled(&[]);
    assert!(bed.service(&gone).is_some() && bed.service(&kept).is_some());
    relay.heal();
    bed.gone(&gone);
    bed.registered(&id(&comes, 80));
    assert!(bed.service(&kept).is_some() && registrar.is_running());
    registrar.says("docker: answers again");
}

#[test]
fn the_engine_is_not_there_at_the_start() {
    let Some(bed) = Bed::new("engine_late") else { return };
    let web = bed.labelled(&[]);
    let relay = bed.relay();
    relay.fail("", Fault::Close);
    let mut before = bed.registrar(&[]);
    bed.registered(&id(&web, 80));
    before.kill();
    let registrar = bed.launch(&[]).engine(relay.path()).start();
    registrar.says("what is registered stays");
    assert!(bed.service(&id(&web, 80)).is_some());
    relay.heal();
    registrar.says("docker: answers again");
    bed.settled();
    assert!(bed.service(&id(&web, 80)).is_some());
}

/// One container that cannot be inspected is left as it is, and holds up no other.
#[test]
fn one_inspection_fails() {
    for fault in [Fault::Status(500), Fault::Hang, Fault::Close] {
        let Some(bed) = Bed::new("inspection") else { return };
        let relay = bed.relay();
        let sick = bed.labelled(&[]);
        let mut before = bed.registrar(&[]);
        bed.registered(&id(&sick, 80));
        before.kill();

        relay.fail(&format!("/containers/{}/json", sick.id()), fault);
        let registrar = bed.launch(&["-tags", "new"]).engine(relay.path()).start();
        let well = bed.labelled(&[]);
        bed.registered(&id(&well, 80));
        registrar.says("what it has registered stays");
        assert!(bed.service(&id(&sick, 80)).is_some(), "{fault:?}");
        relay.heal();
        bed.until(&id(&sick, 80), "is registered anew", |s| s["Tags"][0] == "new");
    }
}

/// Without the stream of events a list alone keeps it up to date, and says so.
#[test]
fn the_stream_is_cut_again_and_again() {
    let Some(bed) = Bed::new("stream_cut") else { return };
    let relay = bed.relay();
    let _registrar = bed.launch(&[]).engine(relay.path()).start();
    for _ in 0..5 {
        let web = bed.labelled(&[]);
        relay.cut();
        bed.registered(&id(&web, 80));
        let id = id(&web, 80);
        relay.cut();
        drop(web);
        bed.gone(&id);
    }
}

/// The agent is started again: in development mode it has forgotten everything.
#[test]
fn the_agent_is_wiped() {
    let Some(mut bed) = Bed::new("wiped") else { return };
    let mut registrar = bed.registrar(&[]);
    let web = bed.labelled(&[]);
    bed.registered(&id(&web, 80));
    for _ in 0..2 {
        bed.consul.restart();
        bed.registered(&id(&web, 80));
    }
    assert!(registrar.is_running());
}

#[test]
fn the_agent_is_away_meanwhile() {
    let Some(mut bed) = Bed::with("agent_away", |consul| consul.persistent()) else { return };
    let registrar = bed.registrar(&[]);
    let health = ["--health-cmd=true", "--health-interval=300ms"];
    let args: Vec<&str> = PUBLISHED.into_iter().chain(health).collect();
    let (stays, goes) = (bed.container("web", &args), bed.labelled(&[]));
    let (kept, gone) = (id(&stays, 80), id(&goes, 80));
    bed.registered(&gone);
    bed.check(&kept, "docker", "is passing", |check| check["Status"] == "passing");
    bed.consul.kill();
    drop(goes);
    let comes = bed.labelled(&[]);
    registrar.says("tries again");
    bed.consul.restart();
    assert!(bed.service(&kept).is_some(), "it has a data directory");
    bed.gone(&gone);
    bed.registered(&id(&comes, 80));
    bed.check(&kept, "docker", "is passing", |check| check["Status"] == "passing");
    registrar.says("consul: answers again");
}

/// It stands still: connections are taken, and nothing is answered.
#[test]
fn the_agent_hangs() {
    let Some(mut bed) = Bed::new("agent_hangs") else { return };
    let registrar = bed.registrar(&[]);
    let goes = bed.labelled(&[]);
    let gone = id(&goes, 80);
    bed.registered(&gone);
    bed.consul.pause();
    drop(goes);
    let comes = bed.labelled(&[]);
    registrar.says("no answer within 5 s");
    bed.consul.resume();
    bed.gone(&gone);
    bed.registered(&id(&comes, 80));
}

/// A registration that Consul refuses holds up no other, and is told once.
#[test]
fn one_registration_is_refused() {
    let Some(bed) = Bed::new("refused") else { return };
    let registrar = bed.registrar(&[]);
    let bad = bed.labelled(&["SERVICE_CHECK_TTL=600s", "SERVICE_CHECK_DEREGISTER_AFTER=soon"]);
    registrar.says("registration failed: status 400");
    for _ in 0..3 {
        bed.settled();
    }
    assert!(bed.service(&id(&bad, 80)).is_none());
    assert_eq!(registrar.log().matches("registration failed").count(), 1);
}

/// Without rights it waits for another token, and takes that at once.
#[test]
fn a_token_in_a_file() {
    let Some(bed) = Bed::with("token", |consul| consul.acl()) else { return };
    let weak = bed.consul.token(r#"service_prefix "" { policy = "read" }"#);
    let strong = bed.consul.token(r#"service_prefix "" { policy = "write" }"#);
    let file = bed.dir.write("token", &weak.secret);
    let launch = bed.launch(&[]).env("CONSUL_HTTP_TOKEN_FILE", file.to_str().unwrap());
    let registrar = launch.start();
    let web = bed.labelled(&[]);
    registrar.says("permission denied (403)");
    assert!(bed.service(&id(&web, 80)).is_none());
    bed.dir.write("token", &strong.secret);
    bed.registered(&id(&web, 80));
    // With these rights all that it does can be done.
    web.docker(&["pause"]);
    bed.in_maintenance(&id(&web, 80), "registrar: paused");
    web.docker(&["unpause"]);
    bed.out_of_maintenance(&id(&web, 80));
    let id = id(&web, 80);
    drop(web);
    bed.gone(&id);
    let log = registrar.log();
    assert!(!log.contains(&weak.secret) && !log.contains(&strong.secret), "{log}");
}

#[test]
fn a_token_in_the_environment() {
    let Some(bed) = Bed::with("token_env", |consul| consul.acl()) else { return };
    let registrar = bed.launch(&[]).env("CONSUL_HTTP_TOKEN", MASTER_TOKEN).start();
    let web = bed.labelled(&[]);
    bed.registered(&id(&web, 80));
    assert!(!registrar.log().contains(MASTER_TOKEN));
}

/// What the containers' environments hold beside `SERVICE_*` is nobody's business.
#[test]
fn secrets_stay_out_of_logs() {
    let Some(bed) = Bed::new("secrets") else { return };
    let registrar = bed.registrar(&[]);
    let label = "--label=SERVICE_NAME=evil\nname";
    let env = "--env=PASSWORD=hunter2";
    let args: Vec<&str> = PUBLISHED.into_iter().chain([label, env]).collect();
    let web = bed.container("web", &args);
    bed.registered(&id(&web, 80));
    registrar.says(r"evil\nname");
    let log = registrar.log();
    assert!(!log.contains("hunter2"));
    assert!(log.lines().all(|line| line.starts_with("registrar: ")), "{log}");
}

#[test]
fn a_unix_socket() {
    let Some(bed) = Bed::with("consul_unix", |consul| consul.unix_socket()) else { return };
    let socket = bed.consul.unix_url().replace("unix:", "consul-unix://");
    let _registrar = bed.launch(&[]).uri(&socket).start();
    let web = bed.labelled(&[]);
    bed.registered(&id(&web, 80));
}

#[test]
fn tls() {
    let certificates = Dir::new("registrar_tls_ca");
    let authority = Authority::new(&certificates, "ca");
    let own = authority.request("registrar").issue();
    let Some(bed) = Bed::with("tls", |consul| consul.tls(&authority, true)) else { return };
    let uri = bed.consul.https_url().replace("https://", "consul-tls://");
    let (ca, cert, key) = (authority.ca(), own.cert, own.key);
    let path = |path: &PathBuf| path.to_str().unwrap().to_owned();
    let launch = |retries: &str| {
        let options = ["-retry-attempts", retries, "-retry-interval", "10"];
        bed.launch(&options).uri(&uri).env("CONSUL_CACERT", &path(&ca))
    };
    let mut without = launch("1").start();
    assert!(!without.ended(SOON).expect("it gives up").success());
    let with =
        launch("-1").env("CONSUL_CLIENT_CERT", &path(&cert)).env("CONSUL_CLIENT_KEY", &path(&key));
    let _registrar = with.start();
    let web = bed.labelled(&[]);
    bed.registered(&id(&web, 80));
}
