//! Which instances serve: what their checks say, and what a line admits.

use serde_json::json;
use testbed::{Check, Nginx, Status};

use crate::common::{Instance, Serve, Stage, serves, serves_now, shares};

/// A server for each value of `health=`, and one for none.
fn one_for_each(stage: &Stage) -> Nginx {
    stage
        .nginx()
        .upstream("passing", "consul_upstream web health=passing hold=0;")
        .upstream("warning", "consul_upstream web health=warning hold=0;")
        .upstream("any", "consul_upstream web health=any;")
        .upstream("default", "consul_upstream web;")
        .start()
}

/// An instance with a check that is set by hand.
fn checked(instance: Instance, status: Status) -> Instance {
    instance.with(|service| service.check(Check::ttl().initially(status)))
}

#[test]
fn each_status_under_each_health() {
    let stage = Stage::set("health");
    let [one, two, three, four, five] = stage.web();
    let instances = [
        checked(one, Status::Passing),
        checked(two, Status::Warning),
        checked(three, Status::Critical),
        // Without a check nothing is known against it.
        four,
        checked(five, Status::Passing),
    ];
    stage.register(&instances);
    stage.consul.maintenance("web-5", true, "a test");
    let nginx = one_for_each(&stage);
    let [passing, warning, any, default] = nginx.addrs() else { panic!("four servers") };
    serves_now(*passing, &["web-1", "web-4"]);
    serves_now(*default, &["web-1", "web-4"]);
    serves_now(*warning, &["web-1", "web-2", "web-4"]);
    serves_now(*any, &["web-1", "web-2", "web-3", "web-4"]);

    stage.consul.check("web-1", Status::Critical);
    stage.consul.check("web-2", Status::Passing);
    stage.consul.check("web-3", Status::Warning);
    serves(*passing, &["web-2", "web-4"]);
    serves(*default, &["web-2", "web-4"]);
    serves(*warning, &["web-2", "web-3", "web-4"]);
    serves(*any, &["web-1", "web-2", "web-3", "web-4"]);

    // Maintenance over critical, and back to it.
    stage.consul.maintenance("web-1", true, "a test");
    serves(*any, &["web-2", "web-3", "web-4"]);
    stage.consul.maintenance("web-1", false, "");
    serves(*any, &["web-1", "web-2", "web-3", "web-4"]);
    stage.consul.maintenance("web-5", false, "");
    serves(*passing, &["web-2", "web-4", "web-5"]);
}

#[test]
fn the_worst_check_of_an_instance_counts() {
    let stage = Stage::set("worst_check");
    let [one, two] = stage.web();
    let refused = (stage.net.ip(21), stage.net.port()).into();
    let often = std::time::Duration::from_secs(1);
    let one = checked(one, Status::Passing)
        .with(|service| service.check(Check::tcp(refused, often).initially(Status::Passing)));
    let two = checked(two, Status::Passing);
    stage.register([&one, &two]);
    let nginx = one_for_each(&stage);
    let [passing, _, any, _] = nginx.addrs() else { panic!("four servers") };
    // Consul asks by itself, in a second, and is refused.
    serves(*passing, &["web-2"]);
    serves(*any, &["web-1", "web-2"]);
}

#[test]
fn a_check_of_the_node_counts_for_all_its_instances() {
    let stage = Stage::set("node_check");
    let [one, two] = stage.web();
    let one = checked(one, Status::Passing);
    stage.register([&one, &two]);
    let nginx = one_for_each(&stage);
    let [passing, warning, any, _] = nginx.addrs() else { panic!("four servers") };
    serves_now(*passing, &["web-1", "web-2"]);

    let disk = |status: &str| {
        let check = json!({ "ID": "disk", "Name": "disk", "TTL": "24h", "Status": status });
        stage.consul.put("/v1/agent/check/register", &check.to_string());
    };
    disk("warning");
    serves(*passing, &["502"]);
    serves(*warning, &["web-1", "web-2"]);
    stage.consul.put("/v1/agent/check/fail/disk", "");
    serves(*warning, &["502"]);
    serves(*any, &["web-1", "web-2"]);
    stage.consul.put("/v1/agent/check/pass/disk", "");
    serves(*passing, &["web-1", "web-2"]);
}

#[test]
fn while_an_instance_warns_it_has_its_weight_for_warning() {
    let stage = Stage::set("warning_weight");
    let [one, two, three] = stage.web();
    let instances = [
        checked(one, Status::Passing).with(|service| service.weights(6, 2)),
        checked(two, Status::Passing).with(|service| service.weights(3, 1)),
        // Out of rotation while it warns, whatever the line admits.
        checked(three, Status::Passing).with(|service| service.weights(3, 0)),
    ];
    stage.register(&instances);
    let nginx = stage
        .nginx()
        .upstream("consuls", "consul_upstream web health=warning;")
        .upstream("lines", "consul_upstream web health=any weight=2;")
        .start();
    let [consuls, lines] = nginx.addrs() else { panic!("two servers") };
    shares(*consuls, &[("web-1", 30), ("web-2", 15), ("web-3", 15)]);
    stage.consul.check("web-1", Status::Warning);
    shares(*consuls, &[("web-1", 10), ("web-2", 15), ("web-3", 15)]);
    stage.consul.check("web-3", Status::Warning);
    shares(*consuls, &[("web-1", 20), ("web-2", 30)]);
    serves(*lines, &["web-1", "web-2"]);
    // A critical one, where it serves, has the weight for passing.
    stage.consul.check("web-3", Status::Critical);
    shares(*lines, &[("web-1", 10), ("web-2", 10), ("web-3", 10)]);
    stage.consul.check("web-1", Status::Passing);
    stage.consul.check("web-3", Status::Passing);
    shares(*consuls, &[("web-1", 30), ("web-2", 15), ("web-3", 15)]);
}
