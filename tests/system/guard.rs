//! Losses that look like an accident, and what an instance says of itself.

use std::time::{Duration, Instant};

use serde_json::json;
use testbed::{Check, Load, Nginx, Service, Status, nginx};

use crate::common::{
    Instance, PATIENCE, Serve, Stage, changes, every_worker_serves, serves, serves_now, shares,
    steady,
};

fn nginx(stage: &Stage, line: &str) -> Nginx {
    stage.nginx().workers(2).upstream("web", &format!("consul_upstream web {line};")).start()
}

/// The instances that the log says were taken out.
fn taken_out(nginx: &Nginx) -> Vec<String> {
    changes(nginx, "web").into_iter().filter(|change| change.contains("-127.")).collect()
}

#[test]
fn a_mass_deregistration_is_held_and_then_honoured() {
    let stage = Stage::set("mass_deregistration");
    let instances: [Instance; 4] = stage.web();
    stage.register(&instances);
    let hold = Duration::from_secs(4);
    // Every loss is one to hold: Consul tells of four deregistrations in one answer or in four.
    let nginx = nginx(&stage, "guard=0% hold=4s");
    serves_now(nginx.addr(), &["web-1", "web-2", "web-3", "web-4"]);
    let load = Load::start(nginx.addr(), &steady());

    let begin = Instant::now();
    for id in ["web-1", "web-2", "web-3", "web-4"] {
        stage.consul.deregister(id);
    }
    nginx.wait_log("are held for 4s", 1, PATIENCE);
    // An addition is live at once, and ends nothing.
    let five = Instance::start(&stage.net, "web", "web-5");
    stage.register([&five]);
    every_worker_serves(&nginx, &["web-1", "web-2", "web-3", "web-4", "web-5"]);
    assert!(begin.elapsed() < hold, "the machine is too slow for this test");

    nginx.wait_log("Consul still says so after 4s", 1, PATIENCE);
    assert!(begin.elapsed() >= hold, "held for {:?}", begin.elapsed());
    every_worker_serves(&nginx, &["web-5"]);
    load.stop().assert_nothing_lost();
}

/// The bar, with the settings that nobody has set: all of a service gone in one answer, as when its
/// only node is taken for dead.
#[test]
fn twenty_that_are_gone_at_once_are_held_for_half_a_minute() {
    const HOLD: Duration = Duration::from_secs(30);
    let stage = Stage::set("twenty_gone");
    let instances: [Instance; 20] = stage.web();
    for Instance { service, .. } in &instances {
        let (node, address) = ("elsewhere", &service.address);
        let body = json!({"Node": node, "Address": address, "SkipNodeUpdate": true, "Service":
            {"ID": service.id, "Service": "web", "Address": address, "Port": service.port}});
        stage.consul.put("/v1/catalog/register", &body.to_string());
    }
    let names: Vec<&str> = instances.iter().map(|it| it.service.id.as_str()).collect();
    let nginx = stage
        .nginx()
        .workers(2)
        .upstream("web", "consul_upstream web;")
        .upstream("careful", "consul_upstream web guard=50%;")
        .start();
    let [web, careful] = *nginx.addrs() else { panic!("two servers") };
    serves_now(web, &names);
    serves_now(careful, &names);
    let loads = [web, careful].map(|addr| Load::start(addr, &steady()));

    let begin = Instant::now();
    stage.consul.put("/v1/catalog/deregister", &json!({"Node": "elsewhere"}).to_string());
    nginx.wait_log("Consul takes 20 of 20 instances out", 2, PATIENCE);
    serves_now(web, &names);
    // An addition is live at once. It ends the loss of all; of half it is none yet.
    let new = Instance::start(&stage.net, "web", "new");
    stage.register([&new]);
    let all: Vec<&str> = names.iter().copied().chain(["new"]).collect();
    serves(careful, &all);
    serves(web, &["new"]);
    assert!(begin.elapsed() < HOLD, "the machine is too slow for this test");

    let honoured = 2 * HOLD;
    nginx.wait_log("Consul still says so after 30s", 1, honoured);
    assert!(begin.elapsed() >= HOLD, "held for {:?}", begin.elapsed());
    serves(careful, &["new"]);
    loads.into_iter().for_each(|load| load.stop().assert_nothing_lost());
}

#[test]
fn the_good_answer_ends_a_hold_and_nothing_was_lost() {
    let stage = Stage::set("good_answer");
    let [one, two] = stage.web();
    stage.register([&one, &two]);
    let nginx = nginx(&stage, "");
    stage.consul.deregister("web-1");
    serves(nginx.addr(), &["web-2"]);
    // The last one is held.
    stage.consul.deregister("web-2");
    nginx.wait_log("are held for 30s", 1, PATIENCE);
    serves_now(nginx.addr(), &["web-2"]);
    stage.register([&two]);
    nginx.wait_log("nothing is held any longer", 1, PATIENCE);
    serves_now(nginx.addr(), &["web-2"]);
    assert_eq!(taken_out(&nginx).len(), 1);
}

/// An agent that comes back marks its checks critical until each has run.
#[test]
fn a_restarted_agent_takes_nothing_down() {
    let stage = Stage::with("restarted_agent", |consul| consul.persistent());
    let instances: [Instance; 3] = stage.web::<3>().map(|instance| {
        let health = format!("http://{}{}", instance.addr(), testbed::backend::HEALTH);
        instance.with(|service| service.check(Check::http(&health, Duration::from_secs(1))))
    });
    stage.register(&instances);
    let names = ["web-1", "web-2", "web-3"];
    let passing = |status| {
        move |all: &[testbed::consul::Instance]| {
            all.len() == 3 && all.iter().all(|one| one.status() == status)
        }
    };
    stage.consul.settled("web", "all pass", passing(Status::Passing));
    let nginx = nginx(&stage, "");
    serves(nginx.addr(), &names);
    let load = Load::start(nginx.addr(), &steady());
    let mut consul = stage.consul;
    for _ in 0..3 {
        consul.kill();
        consul.restart();
        consul.settled("web", "all pass again", passing(Status::Passing));
    }
    serves_now(nginx.addr(), &names);
    load.stop().assert_nothing_lost();
    assert_eq!(taken_out(&nginx), Vec::<String>::new());
}

#[test]
fn maintenance_of_all_is_honoured_at_once() {
    let stage = Stage::set("maintenance_of_all");
    let instances: [Instance; 2] = stage.web();
    stage.register(&instances);
    let nginx = nginx(&stage, "guard=0%");
    stage.consul.maintenance("web-1", true, "an operator");
    serves(nginx.addr(), &["web-2"]);
    stage.consul.maintenance("web-2", true, "an operator");
    serves(nginx.addr(), &["502"]);
    assert_eq!(nginx.log_count("are held"), 0);
}

#[test]
fn a_hold_of_nothing_honours_at_once() {
    let stage = Stage::set("no_hold");
    let [one] = stage.web();
    stage.register([&one]);
    let nginx = nginx(&stage, "hold=0");
    serves_now(nginx.addr(), &["web-1"]);
    stage.consul.deregister("web-1");
    serves(nginx.addr(), &["502"]);
}

#[test]
fn when_too_few_are_healthy_all_serve() {
    let stage = Stage::set("panic");
    let instances: [Instance; 4] =
        stage.web::<4>().map(|instance| instance.with(|service| service.check(Check::ttl())));
    stage.register(&instances);
    let nginx = nginx(&stage, "panic=50%");
    let all = ["web-1", "web-2", "web-3", "web-4"];
    serves(nginx.addr(), &all);
    stage.consul.check("web-1", Status::Critical);
    serves(nginx.addr(), &all[1..]);
    stage.consul.check("web-2", Status::Critical);
    serves(nginx.addr(), &all[2..]);
    stage.consul.check("web-3", Status::Critical);
    serves(nginx.addr(), &all);
    nginx.wait_log("fewer than 50% of the instances are healthy", 1, PATIENCE);
    // What an operator takes out is not counted, and stays out.
    stage.consul.maintenance("web-3", true, "an operator");
    stage.consul.maintenance("web-2", true, "an operator");
    serves(nginx.addr(), &["web-4"]);
    nginx.wait_log("enough instances are healthy again", 1, PATIENCE);
}

#[test]
fn the_word_of_an_instance_wins() {
    let stage = Stage::set("meta");
    let [one, two, three, four] = stage.web();
    let says = |instance: Instance, key: &str, value: &str| {
        instance.with(|service: Service| service.meta(key, value))
    };
    let one = says(one, "nginx_weight", "3").with(|service| service.weights(9, 9));
    let two = says(two, "nginx_down", "Yes");
    let three = says(three, "nginx_backup", "true");
    let four = says(says(four, "nginx_weight", "-1"), "nginx_max_fails", "many");
    stage.register([&one, &two, &three, &four]);
    let nginx = stage
        .nginx()
        .upstream("web", "consul_upstream web weight=2;")
        .upstream("hashed", "hash $arg_key; consul_upstream web weight=2;")
        .start();
    let [plain, hashed] = nginx.addrs() else { panic!("two servers") };
    // The weight of the line for those that say nothing, or nothing of use.
    shares(*plain, &[("web-1", 3), ("web-4", 2)]);
    // This method has no use for backups: it is a server like the others. One that is down has a
    // place in the hash, and passes its keys on.
    serves(*hashed, &["web-1", "web-3", "web-4"]);
    stage.consul.deregister("web-1");
    serves(*plain, &["web-4"]);
    // The last primary is gone by its own word: the backup's turn.
    let four = says(four, "nginx_down", "1");
    stage.register([&four]);
    serves(*plain, &["web-3"]);
}

fn refused(stage: &Stage, line: &str, says: &str) {
    let builder: nginx::Builder =
        stage.nginx().upstream("web", &format!("consul_upstream web {line};"));
    let test = builder.config_test();
    assert!(!test.ok && test.output.contains(says), "{line}: {}", test.output);
}

#[test]
fn shares_and_times_are_checked() {
    let stage = Stage::set("guard_parameters");
    for line in [
        "guard=101%",
        "guard=50",
        "guard=",
        "guard=-1%",
        "guard=x%",
        "hold=-1",
        "hold=x",
        "hold=",
        "panic=101%",
        "panic=50",
        "panic=%",
        "slow_start=30s",
        "guard",
        "hold",
    ] {
        refused(&stage, line, &format!("invalid parameter \"{line}\""));
    }
    refused(&stage, "guard=5% guard=5%", "duplicate parameter");
    for line in
        ["guard=0%", "guard=100%", "hold=0", "hold=1500ms", "hold=5m", "panic=0", "panic=100%"]
    {
        let web = format!("consul_upstream web {line};");
        let test = stage.nginx().upstream("web", &web).config_test();
        assert!(test.ok, "{line}: {}", test.output);
    }
}
