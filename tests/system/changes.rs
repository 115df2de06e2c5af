//! What an operator does with Consul, and what becomes of nginx's upstreams.

use std::io::{self, Write};
use std::net::Ipv6Addr;
use std::time::Duration;

use serde_json::json;
use testbed::eventually;
use testbed::http::{self, Conn};
use testbed::{Backend, Check, Consul, Dir, Load, Net, Options, Service, Status, backend};

use crate::common::{
    Instance, PATIENCE, Serve, Stage, asking, changes, connections, every_worker_serves, follower,
    met, passed_to, serves, serves_now, shares, steady, v4, wait_connections, web,
};
use crate::fake_consul::{FakeConsul, entry};

/// The steps of the demo, each seen by both workers, and nothing lost on the way.
#[test]
fn the_steps_of_the_demo() {
    let stage = Stage::set("the_demo");
    let [one, two, three] = stage.web().map(|instance: Instance| {
        let health = format!("http://{}{}", instance.addr(), backend::HEALTH);
        let often = Duration::from_secs(1);
        instance.with(|service| {
            service
                .check(Check::http(&health, often).initially(Status::Passing))
                .check(Check::ttl())
        })
    });
    // With max_fails=0 nginx does not avoid a dead instance by itself: only Consul's word counts.
    let nginx =
        stage.nginx().workers(2).upstream("web", "consul_upstream web max_fails=0;").start();
    every_worker_serves(&nginx, &["502"]);

    stage.register([&one]);
    every_worker_serves(&nginx, &["web-1"]);
    let load = Load::start(nginx.addr(), &steady());

    stage.register([&two, &three]);
    every_worker_serves(&nginx, &["web-1", "web-2", "web-3"]);
    stage.consul.maintenance("web-2", true, "a test");
    every_worker_serves(&nginx, &["web-1", "web-3"]);
    stage.consul.maintenance("web-2", false, "");
    every_worker_serves(&nginx, &["web-1", "web-2", "web-3"]);
    stage.consul.check("web-3", Status::Critical);
    every_worker_serves(&nginx, &["web-1", "web-2"]);
    stage.consul.check("web-3", Status::Passing);
    every_worker_serves(&nginx, &["web-1", "web-2", "web-3"]);
    // Killed: its check fails within a second or two, and until then nginx finds another.
    one.backend.stop();
    every_worker_serves(&nginx, &["web-2", "web-3"]);

    load.stop().assert_nothing_lost();
}

#[test]
fn an_instance_is_added_and_removed() {
    let stage = Stage::set("added_and_removed");
    let [one, two] = stage.web();
    stage.register([&one]);
    let nginx = stage.nginx().upstream("web", "consul_upstream web;").start();
    // New workers wait for the first answer: there is no request that is too early.
    serves_now(nginx.addr(), &["web-1"]);

    stage.register([&two]);
    serves(nginx.addr(), &["web-1", "web-2"]);
    stage.consul.deregister("web-1");
    serves(nginx.addr(), &["web-2"]);

    let (one, two) = (one.addr(), two.addr());
    let index = stage.consul.index("web");
    let changes = changes(&nginx, "web");
    let [first, second, third] = &changes[..] else { panic!("three changes: {changes:?}") };
    assert!(first.starts_with(&format!("+{one} (web-1), 1 of 1 instances serve, index ")));
    assert!(second.starts_with(&format!("+{two} (web-2), 2 of 2 instances serve, index ")));
    assert_eq!(*third, format!("-{one} (web-1), 1 of 1 instances serve, index {index}"));
}

#[test]
fn a_request_under_way_outlives_its_instance() {
    let stage = Stage::set("under_way");
    let [one, two] = stage.web();
    stage.register([&one]);
    let nginx = stage.nginx().upstream("web", "consul_upstream web;").start();
    one.backend.set_delay(Duration::from_secs(3));
    std::thread::scope(|scope| {
        let slow = scope.spawn(|| http::get(nginx.addr(), "/").unwrap());
        eventually(PATIENCE, "the request is under way", || one.backend.in_flight() == 1);
        one.backend.set_delay(Duration::ZERO);
        stage.register([&two]);
        stage.consul.deregister("web-1");
        serves(nginx.addr(), &["web-2"]);
        assert_eq!(one.backend.in_flight(), 1, "too slow a machine to tell anything");
        let answer = slow.join().unwrap();
        assert_eq!((answer.status, answer.backend()), (200, "web-1"));
        assert_eq!(answer.tried(), [one.addr()]);
    });
}

#[test]
fn weights_are_consuls_and_a_change_shows_at_once() {
    let stage = Stage::set("weights");
    let [one, two] = stage.web();
    let one = one.with(|service| service.weights(3, 1));
    stage.register([&one, &two]);
    let nginx = stage.nginx().upstream("web", "consul_upstream web;").start();
    shares(nginx.addr(), &[("web-1", 30), ("web-2", 10)]);

    stage.consul.register(&two.service.clone().weights(7, 1));
    shares(nginx.addr(), &[("web-1", 30), ("web-2", 70)]);
    nginx.wait_log(&format!("~{} (web-2), 2 of 2 instances serve", two.addr()), 1, PATIENCE);
}

#[test]
fn the_weight_parameter_replaces_consuls() {
    let stage = Stage::set("weight_parameter");
    let [one, two, three] = stage.web();
    let one = one.with(|service| service.weights(9, 1).tag("heavy"));
    let two = two.with(|service| service.tag("light"));
    let three = three.with(|service| service.weights(5, 5).tag("light"));
    stage.register([&one, &two, &three]);
    let lines = "consul_upstream web tag=heavy weight=3; consul_upstream web tag=light weight=2;";
    let nginx = stage
        .nginx()
        .upstream("web", lines)
        .upstream("light", "consul_upstream web tag=light;")
        .start();
    let [web, light] = nginx.addrs() else { panic!("two servers") };
    shares(*web, &[("web-1", 30), ("web-2", 20), ("web-3", 20)]);
    shares(*light, &[("web-2", 10), ("web-3", 50)]);
}

/// An agent refuses a weight of 0 for passing instances, and the 0 of others means out of rotation.
#[test]
fn a_weight_of_zero_takes_out_whatever_the_line_says() {
    let (net, dir) = (Net::isolated(), Dir::new("weight_zero"));
    let fake = FakeConsul::start(&net);
    let [one, two] = web(&net);
    let know = |index: u64, weight: u32| {
        let mut weighed = entry("web-2", two.addr());
        weighed["Service"]["Weights"] = json!({ "Passing": weight, "Warning": 1 });
        fake.know(index, &[entry("web-1", one.addr()), weighed]);
    };
    know(5, 0);
    let nginx = asking(&net, &dir, &fake.url())
        .upstream("consuls", "consul_upstream web;")
        .upstream("lines", "consul_upstream web health=any weight=3;")
        .start();
    let [consuls, lines] = nginx.addrs() else { panic!("two servers") };
    serves_now(*consuls, &["web-1"]);
    serves_now(*lines, &["web-1"]);
    know(6, 4);
    shares(*consuls, &[("web-1", 10), ("web-2", 40)]);
    shares(*lines, &[("web-1", 10), ("web-2", 10)]);
    know(7, 0);
    serves(*consuls, &["web-1"]);
    serves(*lines, &["web-1"]);
}

/// A registration of an instance on a node that has no agent: it is in the catalog alone.
fn in_catalog(node: &str, instance: &Instance) -> serde_json::Value {
    let service = &instance.service;
    json!({
        "Node": node,
        "Address": service.address,
        "Service": {
            "Service": service.name,
            "ID": service.id,
            "Address": service.address,
            "Port": service.port,
        },
    })
}

#[test]
fn maintenance_of_a_service() {
    let stage = Stage::set("service_maintenance");
    let [one, two] = stage.web();
    stage.register([&one, &two]);
    let nginx = stage.nginx().upstream("web", "consul_upstream web;").start();
    serves_now(nginx.addr(), &["web-1", "web-2"]);
    stage.consul.maintenance("web-1", true, "a \"new\" disk");
    serves(nginx.addr(), &["web-2"]);
    stage.consul.maintenance("web-1", false, "");
    serves(nginx.addr(), &["web-1", "web-2"]);
}

#[test]
fn maintenance_of_a_node_takes_all_its_instances_out() {
    let stage = Stage::set("node_maintenance");
    let [one, two] = stage.web();
    stage.register([&one, &two]);
    let other = Instance::start(&stage.net, "web", "elsewhere");
    stage.consul.put("/v1/catalog/register", &in_catalog("n2", &other).to_string());
    let nginx = stage.nginx().upstream("web", "consul_upstream web;").start();
    serves(nginx.addr(), &["elsewhere", "web-1", "web-2"]);
    stage.consul.node_maintenance(true);
    serves(nginx.addr(), &["elsewhere"]);
    stage.consul.node_maintenance(false);
    serves(nginx.addr(), &["elsewhere", "web-1", "web-2"]);
}

#[test]
fn an_instance_must_have_all_tags_of_a_line() {
    let stage = Stage::set("tags");
    let [one, two, three] = stage.web();
    let one = one.with(|service| service.tag("app"));
    let two = two.with(|service| service.tag("blue").tag("app"));
    stage.register([&one, &two, &three]);
    let nginx = stage
        .nginx()
        .upstream("all", "consul_upstream web;")
        .upstream("app", "consul_upstream web tag=app;")
        .upstream("blue", "consul_upstream web tag=app tag=blue;")
        .upstream("none", "consul_upstream web tag=App;")
        .start();
    let [all, app, blue, none] = nginx.addrs() else { panic!("four servers") };
    serves_now(*all, &["web-1", "web-2", "web-3"]);
    serves_now(*app, &["web-1", "web-2"]);
    serves_now(*blue, &["web-2"]);
    serves_now(*none, &["502"]);

    // A tag comes, a tag goes.
    stage.consul.register(&three.service.clone().tag("app").tag("blue").tag("new"));
    stage.consul.register(&two.service.clone().tag("green"));
    serves(*blue, &["web-2", "web-3"]);
    stage.consul.register(&Service { tags: vec!["blue".into()], ..two.service.clone() });
    serves(*blue, &["web-3"]);
    serves(*app, &["web-1", "web-3"]);
    serves_now(*all, &["web-1", "web-2", "web-3"]);
}

#[test]
fn two_lines_feed_one_upstream() {
    let stage = Stage::set("two_lines");
    let [web] = stage.web();
    let api = Instance::start(&stage.net, "api", "api-1").with(|service| service.tag("v2"));
    let old = Instance::start(&stage.net, "api", "api-old").with(|service| service.tag("v1"));
    let fixed = Backend::start(&stage.net, 20, "fixed");
    stage.register([&web, &api, &old]);
    let lines = format!(
        "consul_upstream web hold=0; server {}; consul_upstream api tag=v2 weight=2 hold=0;",
        fixed.addr()
    );
    let nginx = stage.nginx().upstream("both", &lines).start();
    shares(nginx.addr(), &[("api-1", 20), ("fixed", 10), ("web-1", 10)]);

    // A change of one source leaves the other's instances and the static server alone.
    stage.consul.deregister("api-1");
    shares(nginx.addr(), &[("fixed", 10), ("web-1", 10)]);
    stage.consul.deregister("web-1");
    serves(nginx.addr(), &["fixed"]);
    stage.register([&api]);
    shares(nginx.addr(), &[("api-1", 20), ("fixed", 10)]);
}

#[test]
fn an_address_that_two_lines_find_is_one_server() {
    let stage = Stage::set("two_lines_one_address");
    let [one, two] = stage.web();
    let one = one.with(|service| service.tag("a").tag("b"));
    let two = two.with(|service| service.tag("b"));
    stage.register([&one, &two]);
    let lines = "consul_upstream web tag=a; consul_upstream web tag=b;";
    let nginx = stage.nginx().upstream("web", lines).start();
    shares(nginx.addr(), &[("web-1", 10), ("web-2", 10)]);
    // Without the first line's word for it, the second's stands.
    stage.consul.register(&Service { tags: vec!["b".into()], ..one.service.clone() });
    nginx.wait_log("consul: upstream \"web\": ", 1, PATIENCE);
    shares(nginx.addr(), &[("web-1", 10), ("web-2", 10)]);
}

#[test]
fn upstreams_that_ask_the_same_share_one_watch() {
    let stage = Stage::set("one_watch");
    let [one, two] = stage.web();
    let one = one.with(|service| service.tag("app"));
    stage.register([&one]);
    let nginx = stage
        .nginx()
        .workers(2)
        .upstream("a", "consul_upstream web;")
        .upstream("b", "least_conn; consul_upstream web tag=app health=any;")
        .start();
    let [a, b] = nginx.addrs() else { panic!("two servers") };
    stage.register([&two]);
    serves(*a, &["web-1", "web-2"]);
    serves(*b, &["web-1"]);

    let follower = follower(&nginx);
    let consul = v4(stage.consul.addr());
    for pid in nginx.worker_pids() {
        wait_connections(&nginx, pid, consul, usize::from(pid == follower));
    }
}

#[test]
fn upstreams_that_ask_for_different_things_do_not() {
    let stage = Stage::set("two_watches");
    let nginx = stage
        .nginx()
        .upstream("a", "consul_upstream web;")
        .upstream("b", "consul_upstream api;")
        .start();
    eventually(PATIENCE, "a connection for each service", || {
        connections(&nginx, follower(&nginx), v4(stage.consul.addr())) == 2
    });
}

#[test]
fn from_none_to_some_and_back_twice() {
    let stage = Stage::set("none_some_none");
    let instances: [Instance; 3] = stage.web();
    let nginx = stage.nginx().workers(2).upstream("web", "consul_upstream web hold=0;").start();
    for round in 1..=2 {
        every_worker_serves(&nginx, &["502"]);
        nginx.wait_log("no live upstreams", round, PATIENCE);
        stage.register(&instances);
        every_worker_serves(&nginx, &["web-1", "web-2", "web-3"]);
        for instance in &instances {
            stage.consul.deregister(&instance.service.id);
        }
    }
    every_worker_serves(&nginx, &["502"]);
}

#[test]
fn another_port_under_the_same_id() {
    let stage = Stage::set("another_port");
    let [one, two] = stage.web();
    stage.register([&one, &two]);
    let nginx = stage.nginx().upstream("web", "consul_upstream web;").start();
    serves_now(nginx.addr(), &["web-1", "web-2"]);

    let moved = Backend::start(&stage.net, 20, "web-1 moved");
    stage.consul.register(&one.service.clone().port(moved.addr().port()));
    serves(nginx.addr(), &["web-1 moved", "web-2"]);
    let line = format!("+{} (web-1) -{} (web-1), 2 of 2", moved.addr(), one.addr());
    nginx.wait_log(&line, 1, PATIENCE);
}

#[test]
fn an_ipv6_instance() {
    let Ok(backend) = Backend::bind((Ipv6Addr::LOCALHOST, 0).into(), "six") else {
        // Not by println!, which shows only where a test fails.
        let _ = writeln!(io::stderr(), "skipped: an_ipv6_instance, there is no ::1 here");
        return;
    };
    let stage = Stage::set("ipv6");
    let [four] = stage.web();
    stage.register([&four]);
    stage.consul.register(&Service::new("web", "six", backend.addr()));
    let nginx = stage.nginx().upstream("web", "consul_upstream web;").start();
    serves_now(nginx.addr(), &["six", "web-1"]);
    assert!(passed_to(nginx.addr(), 4).contains(&backend.addr()));
    stage.consul.deregister("six");
    serves(nginx.addr(), &["web-1"]);
}

fn every_one_of(workers: usize) {
    let stage = Stage::set(&format!("workers_{workers}"));
    let [one, two, three] = stage.web();
    stage.register([&one]);
    let nginx = stage.nginx().workers(workers).upstream("web", "consul_upstream web;").start();
    assert_eq!(nginx.worker_pids().len(), workers);
    every_worker_serves(&nginx, &["web-1"]);
    stage.register([&two, &three]);
    every_worker_serves(&nginx, &["web-1", "web-2", "web-3"]);
    stage.consul.deregister("web-1");
    every_worker_serves(&nginx, &["web-2", "web-3"]);
    assert!(nginx.worker_pids().contains(&follower(&nginx)));
}

#[test]
fn one_worker_serves_the_new_set() {
    every_one_of(1);
}

#[test]
fn two_workers_serve_the_new_set() {
    every_one_of(2);
}

#[test]
fn four_workers_serve_the_new_set() {
    every_one_of(4);
}

#[test]
fn many_changes_under_load_with_kept_connections() {
    let stage = Stage::set("many_changes");
    let instances: [Instance; 4] = stage.web();
    stage.register(&instances);
    let nginx =
        stage.nginx().workers(2).upstream("web", "consul_upstream web; keepalive 8;").start();
    let load = Load::start(nginx.addr(), &Options::default());
    // Maintenance, since Consul tells of it soonest. One is always out, and two for a moment.
    for n in 0..20 {
        stage.consul.maintenance(&instances[n % 4].service.id, true, "a test");
        stage.consul.maintenance(&instances[(n + 3) % 4].service.id, false, "");
        load.wait_for(50);
    }
    let report = load.stop();
    report.assert_nothing_lost();
    assert_eq!(report.backends.len(), 4, "{report}");
    serves(nginx.addr(), &["web-1", "web-2", "web-3"]);
}

#[test]
fn two_datacenters_and_a_static_backup() {
    let net = Net::isolated();
    let dir = Dir::new("two_datacenters");
    let near = Consul::builder(&net, &dir).wan().start();
    let far = Consul::builder(&net, &dir).host(&net, 11).datacenter("dc2").wan().start();
    near.join_wan(&far);
    let here = Instance::start(&net, "web", "here");
    let there = Instance::start(&net, "web", "there");
    let fixed = Backend::start(&net, 20, "fixed");
    near.register(&here.service);
    far.register(&there.service);

    let lines = format!(
        "consul_upstream web; consul_upstream web dc=dc2 backup hold=0; server {} backup;",
        fixed.addr()
    );
    let nginx = asking(&net, &dir, &near.url())
        .upstream("web", &lines)
        .upstream("far", "consul_upstream web dc=dc2 hold=0;")
        .start();
    let [web, only_far] = nginx.addrs() else { panic!("two servers") };
    serves_now(*web, &["here"]);
    serves_now(*only_far, &["there"]);
    near.maintenance("here", true, "a test");
    serves(*web, &["fixed", "there"]);
    far.deregister("there");
    serves(*web, &["fixed"]);
    serves(*only_far, &["502"]);
    far.register(&there.service);
    serves(*web, &["fixed", "there"]);
    near.maintenance("here", false, "");
    serves(*web, &["here"]);
}

#[test]
fn a_datacenter_that_nobody_knows_is_an_error() {
    let stage = Stage::set("no_datacenter");
    let [one] = stage.web();
    stage.register([&one]);
    let lines = "consul_upstream web; consul_upstream web dc=nowhere;";
    let nginx = stage.nginx().http("consul_start_timeout 300ms;").upstream("web", lines).start();
    nginx.wait_log("No path to datacenter", 1, PATIENCE);
    serves(nginx.addr(), &["web-1"]);
}

#[test]
fn a_change_is_one_line_in_the_log() {
    let (net, dir) = (Net::isolated(), Dir::new("log_line"));
    let fake = FakeConsul::start(&net);
    let instances: [Instance; 4] = web(&net);
    let [one, two, three, four] = std::array::from_fn(|n| instances[n].addr());
    fake.know(1233, &[entry("web-1", one), entry("web-2", two), entry("web-4", four)]);
    let nginx = asking(&net, &dir, &fake.url()).upstream("app", "consul_upstream web;").start();
    serves_now(nginx.addr(), &["web-1", "web-2", "web-4"]);

    let mut sick = entry("web-1", one);
    sick["Checks"][0]["Status"] = "critical".into();
    let rest = [entry("web-2", two), entry("web-3", three), entry("web-4", four)];
    fake.know(1234, &[&rest[..], &[sick]].concat());
    serves(nginx.addr(), &["web-2", "web-3", "web-4"]);
    let changes = changes(&nginx, "app");
    assert_eq!(
        changes[1..],
        [format!("+{three} (web-3) -{one} (web-1), 3 of 4 instances serve, index 1234")],
        "{changes:?}"
    );
    let lines = nginx.wait_log("consul: upstream \"app\": ", 2, PATIENCE);
    assert!(lines.iter().all(|line| line.contains("[notice]")), "{lines:?}");
}

#[test]
fn of_many_changed_instances_eight_are_named() {
    let (net, dir) = (Net::isolated(), Dir::new("log_line_many"));
    let fake = FakeConsul::start(&net);
    let nginx = asking(&net, &dir, &fake.url()).upstream("app", "consul_upstream web;").start();
    let all: Vec<_> =
        (0..20).map(|n| (format!("web-{n:02}"), (net.ip(30 + n), 80).into())).collect();
    let entries: Vec<_> = all.iter().map(|(id, addr)| entry(id, *addr)).collect();
    fake.know(7, &entries);
    let named: String = all[..8].iter().map(|(id, addr)| format!("+{addr} ({id}) ")).collect();
    nginx.wait_log("and 12 more", 1, PATIENCE);
    let expected = format!("{named}and 12 more, 20 of 20 instances serve, index 7");
    assert_eq!(changes(&nginx, "app").last(), Some(&expected));
}

/// What stands in a service ID is for Consul's users to say, and the log is not.
#[test]
fn what_comes_from_consul_is_escaped_in_the_log() {
    let stage = Stage::set("escaped");
    let [one] = stage.web();
    let id = "web\n[crit] \"$host\" ä\u{202e}<b>";
    let one = one.with(|service| Service { id: id.into(), ..service });
    let nginx = stage.nginx().upstream("web", "consul_upstream web;").start();
    stage.consul.put("/v1/agent/service/register", &one.service.registration().to_string());
    serves(nginx.addr(), &["web-1"]);
    let line = nginx.wait_log("1 of 1 instances serve", 1, PATIENCE).remove(0);
    let escaped = r#"(web\n[crit] \"$host\" \u{e4}\u{202e}<b>)"#;
    assert!(line.contains(escaped), "{line}");
}

/// A request that meets a change between two tries goes on to a server that is there, even if there
/// was none but the failed one when it began.
#[test]
fn a_retry_crosses_a_change() {
    let stage = Stage::set("retry_crosses");
    let [one, two] = stage.web();
    stage.register([&one]);
    let nginx = stage.nginx().upstream("web", "consul_upstream web max_fails=0;").start();
    one.backend.set_delay(Duration::from_secs(600));
    std::thread::scope(|scope| {
        let request = scope.spawn(|| http::get(nginx.addr(), "/").unwrap());
        eventually(PATIENCE, "the request is under way", || one.backend.in_flight() == 1);
        stage.register([&two]);
        nginx.wait_log("2 of 2 instances serve", 1, PATIENCE);
        let tried = [one.addr(), two.addr()];
        one.backend.stop();
        let answer = request.join().unwrap();
        assert_eq!((answer.status, answer.backend()), (200, "web-2"));
        assert_eq!(answer.tried(), tried);
    });
}

/// Two nginx on two machines must agree on what `hash` chooses, which goes by position.
#[test]
fn instances_stand_in_the_order_of_node_and_id() {
    let stage = Stage::set("order");
    let [one, two, three] = stage.web();
    stage.register([&three]);
    let nginx = |name: &str| {
        let upstream = "hash $arg_key; consul_upstream web;";
        stage.nginx().name(name).upstream("web", upstream).start()
    };
    let early = nginx("early");
    stage.register([&one]);
    serves_some(&early, 2);
    stage.register([&two]);
    serves_some(&early, 3);
    let late = nginx("late");
    let choice = |nginx: &testbed::Nginx| -> Vec<String> {
        let mut conn = Conn::open(nginx.addr()).unwrap();
        (0..50).map(|key| conn.get(&format!("/?key={key}")).unwrap().backend().to_owned()).collect()
    };
    assert_eq!(choice(&early), choice(&late));
}

/// Waits until the log says that so many instances serve.
#[track_caller]
fn serves_some(nginx: &testbed::Nginx, n: usize) {
    nginx.wait_log(&format!("{n} of {n} instances serve"), 1, PATIENCE);
    // And a worker meets one.
    assert!(!met(&mut Conn::open(nginx.addr()).unwrap(), 1).unwrap().contains("502"));
}
