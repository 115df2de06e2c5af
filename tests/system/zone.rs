//! The zone: a set that does not fit, and upstreams that share one.

use std::net::SocketAddr;

use serde_json::Value;
use testbed::{Backend, Dir, Net, Nginx};

use crate::common::{Instance, PATIENCE, Stage, asking, changes, passed_to, serves, serves_now};
use crate::fake_consul::{FakeConsul, entry};

/// How many instances do not fit into the least zone that nginx allows.
const MANY: u8 = 200;

/// One backend that answers on all addresses of the machine, and so many instances of it.
fn crowd(net: &Net) -> (Backend, Vec<Value>) {
    let backend = Backend::bind(([0, 0, 0, 0], 0).into(), "crowd").unwrap();
    let port = backend.addr().port();
    let entries = (1..=MANY)
        .map(|n| entry(&format!("web-{n:03}"), SocketAddr::from((net.ip(n), port))))
        .collect();
    (backend, entries)
}

/// The size that the one line about a full zone names, as in `zone NAME SIZE`.
#[track_caller]
fn named_size(nginx: &Nginx, upstream: &str, zone: &str) -> String {
    let full = format!("upstream \"{upstream}\": zone \"{zone}\" of 32k is full");
    let lines = nginx.wait_log(&full, 1, PATIENCE);
    assert!(lines.len() == 1 && lines[0].contains("[error]"), "{lines:?}");
    let (_, rest) = lines[0].split_once(&format!("\"zone {zone} ")).expect("a size is named");
    let (size, _) = rest.split_once("\" would do").expect("a size is named");
    size.to_owned()
}

#[test]
fn a_set_that_does_not_fit_changes_nothing_and_the_size_named_would_do() {
    let (net, dir) = (Net::isolated(), Dir::new("zone_full"));
    let fake = FakeConsul::start(&net);
    let (_backend, entries) = crowd(&net);
    fake.know(5, &entries[..3]);
    let http = |conf: testbed::nginx::Builder, size: &str| {
        conf.http(format!("upstream web {{ zone peers {size}; consul_upstream web; }}"))
    };
    let asking = asking(&net, &dir, &fake.url());
    let mut nginx = http(asking.clone(), "32k").server("web").start();
    let addr = nginx.addr();
    assert_eq!(passed_to(addr, 12).len(), 3);

    fake.know(6, &entries);
    let size = named_size(&nginx, "web", "peers");
    assert_eq!(passed_to(addr, 12).len(), 3, "the old set stays");

    // It is tried again every second, and said once.
    fake.know(7, &entries[1..]);
    fake.wait_requests(1);
    assert_eq!(named_size(&nginx, "web", "peers"), size);

    nginx.configure(|_| http(asking, &size).server_on(addr, "web"));
    nginx.reload();
    assert_eq!(passed_to(addr, usize::from(MANY)).len(), usize::from(MANY) - 1);
    assert_eq!(nginx.log_count("is full"), 1, "not again with {size}");
}

#[test]
fn a_set_that_shrinks_is_taken_without_anybodys_help() {
    let (net, dir) = (Net::isolated(), Dir::new("zone_shrinks"));
    let fake = FakeConsul::start(&net);
    let (_backend, entries) = crowd(&net);
    fake.know(5, &entries[..3]);
    let nginx = asking(&net, &dir, &fake.url())
        .http("upstream web { zone web 32k; consul_upstream web; }")
        .server("web")
        .start();
    fake.know(6, &entries);
    named_size(&nginx, "web", "web");
    fake.know(7, &entries[2..5]);
    nginx.wait_log("3 of 3 instances serve, index 7", 1, PATIENCE);
    let ports = passed_to(nginx.addr(), 12);
    let expected = entries[2..5].iter().map(|entry| {
        let service = &entry["Service"];
        format!("{}:{}", service["Address"].as_str().unwrap(), service["Port"]).parse().unwrap()
    });
    assert_eq!(ports, expected.collect());
    let changes = changes(&nginx, "web");
    assert!(!changes.iter().any(|line| line.contains("index 6")), "{changes:?}");
}

#[test]
fn two_upstreams_share_a_zone() {
    let stage = Stage::set("zone_shared");
    let [one, two] = stage.web();
    let api = Instance::start(&stage.net, "api", "api-1");
    stage.register([&one]);
    let nginx = stage
        .nginx()
        .workers(2)
        .http("upstream web { zone shared 512k; consul_upstream web; }")
        .http("upstream api { zone shared; least_conn; consul_upstream api hold=0; keepalive 4; }")
        .server("web")
        .server("api")
        .start();
    let [web, apis] = nginx.addrs() else { panic!("two servers") };
    serves_now(*web, &["web-1"]);
    serves_now(*apis, &["502"]);
    stage.register([&two, &api]);
    serves(*web, &["web-1", "web-2"]);
    serves(*apis, &["api-1"]);
    stage.consul.deregister("web-1");
    stage.consul.deregister("api-1");
    serves(*web, &["web-2"]);
    serves(*apis, &["502"]);
}

#[test]
fn a_set_that_does_not_fit_leaves_its_neighbours_in_the_zone_alone() {
    let (net, dir) = (Net::isolated(), Dir::new("zone_neighbours"));
    let fake = FakeConsul::start(&net);
    let (_backend, entries) = crowd(&net);
    let stage = Stage::set("zone_neighbours_consul");
    let [one, two] = stage.web();
    stage.register([&one]);
    fake.know(5, &entries[..2]);
    let nginx = Nginx::builder(&net, &dir)
        .http(format!(
            "upstream small {{ zone shared 32k; consul_address {}; consul_upstream web; }}",
            stage.consul.url()
        ))
        .http(format!(
            "upstream large {{ zone shared; consul_address {}; consul_upstream web; }}",
            fake.url()
        ))
        .server("small")
        .server("large")
        .start();
    let [small, large] = nginx.addrs() else { panic!("two servers") };
    fake.know(6, &entries);
    named_size(&nginx, "large", "shared");
    stage.register([&two]);
    serves(*small, &["web-1", "web-2"]);
    stage.consul.deregister("web-1");
    serves(*small, &["web-2"]);
    assert_eq!(passed_to(*large, 8).len(), 2);
}
