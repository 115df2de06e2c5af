//! The status: what it says of discovery and of each peer, in three formats, from any worker.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use testbed::http::{self, Answer, Conn};
use testbed::{
    Backend, Check, Dir, Load, Net, Options, Process, Service, Signal, Status, eventually, nginx,
};

use crate::common::{
    Instance, PATIENCE, RawConn, Serve, Stage, asking, every_worker_serves, follower, full, serves,
    text, watch,
};
use crate::fake_consul::FakeConsul;
use crate::size::crowd;

/// A wait after which an answer counts for 2 × (1.06 s + 12 s).
const SHORT: &str = "consul_wait 1s;";

/// A location with the status beside what passes requests to `web`.
fn with_status(builder: nginx::Builder, addr: SocketAddr, guard: &str) -> nginx::Builder {
    builder.listen(addr).http(format!(
        "server {{ listen {addr} reuseport; location /consul {{ {guard} consul_status; \
         add_header X-Worker $pid always; }}
         location = /exact {{ consul_status; }}
         location ~ ^/regex {{ consul_status; }}
         location / {{ return 200; add_header X-Worker $pid; }} }}"
    ))
}

/// An address for the location.
fn own_addr(stage: &Stage) -> SocketAddr {
    (stage.net.ip(90), stage.net.port()).into()
}

#[track_caller]
fn get(addr: SocketAddr, path: &str) -> Answer {
    http::get(addr, path).unwrap()
}

#[track_caller]
fn document(addr: SocketAddr) -> Value {
    let answer = get(addr, "/consul");
    assert_eq!(answer.status, 200, "{}", answer.text());
    answer.json()
}

fn app(document: &Value) -> &Value {
    &document["upstreams"]["web"]
}

/// Waits until the document is as it should be.
#[track_caller]
fn shows(addr: SocketAddr, what: &str, is: impl Fn(&Value) -> bool) -> Value {
    watch(what, || {
        let document = http::get(addr, "/consul").map_err(|err| err.to_string())?.json();
        if is(app(&document)) { Ok(document) } else { Err(document.to_string()) }
    })
}

/// The document without what differs from worker to worker and from moment to moment.
fn steady(mut document: Value) -> Value {
    document["now"].take();
    document["nginx"]["pid"].take();
    document["thread"]["heartbeat"].take();
    document["agents"].take();
    for upstream in document["upstreams"].as_object_mut().unwrap().values_mut() {
        for source in upstream["sources"].as_array_mut().unwrap() {
            for field in ["last_success", "answers", "index"] {
                source[field].take();
            }
        }
        for field in ["since", "last_change"] {
            rounded(&mut upstream[field]);
        }
        for row in upstream["peers"].as_array_mut().unwrap() {
            rounded(&mut row["since"]);
            rounded(&mut row["selected"]);
        }
        for row in upstream["changes"].as_array_mut().unwrap() {
            rounded(&mut row["time"]);
        }
    }
    rounded(&mut document["since"]);
    rounded(&mut document["nginx"]["load_timestamp"]);
    rounded(&mut document["thread"]["started"]);
    document
}

/// Two clocks are read one after the other: a time may differ by a millisecond.
fn rounded(time: &mut Value) {
    if time.is_string() {
        *time = "a time".into();
    }
}

#[test]
fn every_worker_serves_the_three_formats() {
    let stage = Stage::set("status");
    let web: [Instance; 3] = stage.web();
    stage.register(&web);
    let addr = own_addr(&stage);
    let builder = stage.nginx().workers(4).upstream("web", "consul_upstream web;");
    let nginx = with_status(builder, addr, "").start();
    every_worker_serves(&nginx, &["web-1", "web-2", "web-3"]);
    let first = watch("the agent is up", || {
        let document = document(addr);
        let up = document["agents"][0]["up"] == true;
        if up { Ok(document) } else { Err(document.to_string()) }
    });
    assert_eq!(app(&first)["sync"], "in-sync");
    assert_eq!(first["in_sync"], true, "{first}");
    assert_eq!(first["version"], 1);
    assert_eq!(first["thread"]["state"], "running");
    assert_eq!(first["agents"][0]["address"], stage.consul.url());
    let source = &app(&first)["sources"][0];
    assert_eq!(source["service"], "web");
    assert_eq!(source["registered"], 3);
    assert_eq!(source["serving"], 3);
    assert_eq!(source["errors"]["transport"], 0);
    assert!(source["last_success"].is_string(), "{source}");
    let peers = app(&first)["peers"].as_array().unwrap();
    let ids: Vec<_> = peers.iter().map(|peer| peer["service_id"].as_str().unwrap()).collect();
    assert_eq!(ids, ["web-1", "web-2", "web-3"]);
    for peer in peers {
        assert_eq!(peer["state"], "up", "{peer}");
        assert_eq!(peer["node"], stage.consul.node());
        assert_eq!(peer["source"], 1);
        assert_eq!(peer["status"], "passing");
        assert_eq!(peer["datacenter"], "dc1");
    }
    assert_eq!(app(&first)["changes"][0]["added"], 3);

    let mut conns = http::worker_conns(addr, nginx.worker_pids()).unwrap();
    assert_eq!(conns.len(), 4);
    let mut seen = BTreeSet::new();
    for round in 0..50 {
        for (pid, conn) in &mut conns {
            let document = conn.get("/consul").unwrap().json();
            assert_eq!(document["nginx"]["pid"], *pid);
            seen.insert(steady(document).to_string());
            if round == 0 {
                let page = conn.get("/consul?format=html").unwrap();
                assert_eq!(page.status, 200);
                assert!(page.text().contains("web-2"), "{}", page.text());
                let metrics = conn.get("/consul?format=prometheus").unwrap();
                assert_eq!(
                    metrics.header("content-type"),
                    "text/plain; version=0.0.4; charset=utf-8"
                );
                let text = metrics.text();
                assert!(text.contains("nginx_consul_upstream_in_sync{"), "{text}");
                assert!(text.contains("nginx_consul_thread_up 1\n"), "{text}");
            }
        }
    }
    assert_eq!(seen.len(), 1, "200 requests over four workers: {seen:#?}");
}

#[test]
fn what_a_request_gets() {
    let stage = Stage::set("status-requests");
    let web: [Instance; 1] = stage.web();
    stage.register(&web);
    let addr = own_addr(&stage);
    let builder = stage.nginx().upstream("web", "consul_upstream web;");
    let nginx = with_status(builder, addr, "").start();
    serves(nginx.addr(), &["web-1"]);
    shows(addr, "in sync", |app| app["sync"] == "in-sync");

    let mut conn = Conn::open(addr).unwrap();
    for (accept, kind) in [
        ("*/*", "application/json"),
        ("text/html,application/xhtml+xml;q=0.9", "text/html; charset=utf-8"),
        ("application/openmetrics-text;version=1.0.0", "text/plain; version=0.0.4; charset=utf-8"),
    ] {
        let answer = conn.request("GET", "/consul", &[("accept", accept)], "").unwrap();
        assert_eq!((answer.status, answer.header("content-type")), (200, kind));
        assert_eq!(answer.header("vary"), "Accept");
        assert_eq!(answer.header("cache-control"), "no-store");
        assert_eq!(answer.header("x-content-type-options"), "nosniff");
        assert_eq!(answer.header("referrer-policy"), "no-referrer");
        assert_eq!(answer.header("content-length"), answer.body.len().to_string());
        let policy = answer.header("content-security-policy");
        assert_eq!(policy.contains("default-src 'none'"), kind.starts_with("text/html"));
        let head = conn.request("HEAD", "/consul", &[("accept", accept)], "").unwrap();
        assert_eq!((head.status, head.header("content-type")), (200, kind));
        assert!(head.body.is_empty());
    }
    let fails = [
        ("POST", "/consul", 405),
        ("DELETE", "/consul/upstreams/web", 405),
        ("GET", "/consul/nowhere", 404),
        ("GET", "/consul/upstreams/other", 404),
        ("HEAD", "/consul/upstreams/other", 404),
        ("GET", "/consul?format=xml", 400),
        ("GET", "/consul?format=prometheus&peers=all", 400),
    ];
    for (method, path, status) in fails {
        let answer = conn.request(method, path, &[], "a body that nobody reads").unwrap();
        assert_eq!(answer.status, status, "{method} {path}");
        assert_eq!(answer.header("content-type"), "application/json");
        if status == 405 {
            assert_eq!(answer.header("allow"), "GET, HEAD");
        }
        if method != "HEAD" {
            assert_eq!(answer.json()["error"]["status"], status);
        }
    }
    for path in
        ["/consul/", "/consul/upstreams/web", "/consul/upstreams/w%65b", "/exact", "/regex/x"]
    {
        let answer = conn.get(path).unwrap();
        assert_eq!(answer.status, 200, "{path}: {}", answer.text());
        assert!(app(&answer.json()).is_object(), "{path}");
    }
    // A condition is none of its business.
    let answer = conn.request("GET", "/consul", &[("if-match", "\"x\"")], "").unwrap();
    assert_eq!(answer.status, 200);
    assert_eq!(answer.header("etag"), "");
    assert_eq!(nginx.log_count("[alert]"), 0);
}

#[test]
fn the_location_is_guarded_as_any() {
    let stage = Stage::set("status-guard");
    let addr = own_addr(&stage);
    let builder = stage.nginx().upstream("web", "consul_upstream web;");
    let mut nginx = with_status(builder, addr, "deny all;").start();
    assert_eq!(get(addr, "/consul").status, 403);
    nginx.configure(|builder| {
        let builder = builder.clear_http();
        let builder = builder.http(format!("consul_address {};", stage.consul.url()));
        let builder = builder.upstream("web", "consul_upstream web;");
        with_status(builder, addr, "allow 127.0.0.0/8; deny all;")
    });
    nginx.reload();
    watch("the new configuration", || match get(addr, "/consul").status {
        200 => Ok(()),
        status => Err(status.to_string()),
    });
}

/// Without an upstream that follows Consul there is nothing to tell, and nothing is wrong.
#[test]
fn without_upstreams_the_document_is_empty() {
    let stage = Stage::set("status-empty");
    let addr = own_addr(&stage);
    let nginx = with_status(stage.nginx(), addr, "").start();
    let document = document(addr);
    assert_eq!(document["in_sync"], true, "{document}");
    assert_eq!(document["upstreams"], json!({}));
    assert_eq!(document["thread"]["state"], "starting");
    assert_eq!(get(addr, "/consul?format=html").status, 200);
    assert_eq!(crate::common::followers(&nginx), Vec::<u32>::new());
}

#[test]
fn every_instance_that_does_not_serve_says_why() {
    let stage = Stage::set("status-reasons");
    let net = &stage.net;
    let start = |id: &str| Instance::start(net, "web", id).with(|it| it.tag("app"));
    let good = start("web-good");
    let maintained = start("web-maintained");
    let untagged = Instance::start(net, "web", "web-untagged");
    let critical =
        start("web-critical").with(|it| it.check(Check::ttl().initially(Status::Critical)));
    let warning = start("web-warning")
        .with(|it| it.check(Check::ttl().initially(Status::Warning)).weights(1, 0));
    let portless = start("web-portless").with(|it| it.port(0));
    let named = start("web-named").with(|it| it.address("no-such-host.invalid"));
    let nonsense = start("web-nonsense").with(|it| it.address("1.2.3"));
    let twin = Service::new("web", "web-twin", good.addr()).tag("app");
    stage.register([
        &good,
        &maintained,
        &untagged,
        &critical,
        &warning,
        &portless,
        &named,
        &nonsense,
    ]);
    stage.consul.register(&twin);
    // What an agent would refuse the catalog takes.
    let body = json!({
        "Node": "elsewhere",
        "Address": "127.0.0.1",
        "Service": { "ID": "web-overflown", "Service": "web", "Tags": ["app"], "Port": 70000 },
    });
    stage.consul.put("/v1/catalog/register", &body.to_string());
    stage.consul.maintenance("web-maintained", true, "a reason of somebody");

    let addr = own_addr(&stage);
    let builder = stage
        .nginx()
        .upstream("web", "consul_upstream web tag=app;")
        .http("upstream tolerant { zone tolerant 256k; consul_upstream web health=warning; }");
    let nginx = with_status(builder, addr, "").start();
    serves(nginx.addr(), &["web-good"]);
    let expected: BTreeMap<&str, &str> = [
        ("web-maintained", "maintenance"),
        ("web-untagged", "tag"),
        ("web-critical", "critical"),
        ("web-warning", "warning"),
        ("web-portless", "no-port"),
        ("web-overflown", "invalid-port"),
        ("web-named", "unresolved"),
        ("web-nonsense", "invalid-address"),
        ("web-twin", "duplicate"),
    ]
    .into();
    let reasons = |app: &Value| -> BTreeMap<String, String> {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let rows = app["excluded"].as_array().cloned().unwrap_or_default();
        rows.iter().map(|row| (text(&row["service_id"]), text(&row["reason"]))).collect()
    };
    let document = shows(addr, "all reasons", |app| {
        let reasons = reasons(app);
        reasons.len() == expected.len()
            && reasons.iter().all(|(id, reason)| expected.get(&**id) == Some(&&**reason))
    });
    let source = &app(&document)["sources"][0];
    assert_eq!(source["registered"], 10);
    assert_eq!(source["serving"], 1);
    for reason in expected.values() {
        assert_eq!(source["excluded"][reason], 1, "{source}");
    }
    // A weight of 0 is one for an instance that warns.
    let tolerant = &document["upstreams"]["tolerant"]["excluded"];
    let weightless = tolerant.as_array().unwrap().iter().find(|it| it["reason"] == "weight-0");
    assert_eq!(weightless.expect("a weight of 0")["service_id"], "web-warning");
    let rows = app(&document)["excluded"].as_array().unwrap();
    let untagged = rows.iter().find(|row| row["service_id"] == "web-untagged").unwrap();
    assert_eq!(untagged["detail"], "app");
    assert!(untagged["since"].is_string());
    let metrics = get(addr, "/consul?format=prometheus").text();
    let page = get(addr, "/consul?format=html").text();
    for (id, reason) in &expected {
        let series = format!(
            "nginx_consul_source_excluded{{upstream=\"web\",protocol=\"http\",source=\"1\",\
             reason=\"{reason}\"}} 1\n"
        );
        assert!(metrics.contains(&series), "{series} {metrics}");
        assert!(page.contains(id) && page.contains(reason), "{id}: {page}");
    }
    assert!(!document.to_string().contains("a reason of somebody"), "{document}");

    // Back, and the reason's count goes on with nobody.
    stage.consul.maintenance("web-maintained", false, "");
    let document = shows(addr, "back from maintenance", |app| {
        app["peers"].as_array().is_some_and(|peers| peers.len() == 2)
    });
    assert_eq!(app(&document)["sources"][0]["excluded"]["maintenance"], Value::Null);
    let metrics = get(addr, "/consul?format=prometheus").text();
    assert!(metrics.contains("reason=\"maintenance\"} 0\n"), "{metrics}");
    assert_eq!(app(&document)["changes"][0]["added"], 1);
    let first = app(&document)["changes"][0]["first"][0].as_str().unwrap();
    assert_eq!(first, format!("+{}", maintained.addr()));
}

/// The first worker stands still: whoever else answers says so, and what it knows still. Killed, it
/// has a successor that goes on from there.
#[test]
fn a_first_worker_that_stands_still_is_silent() {
    let stage = Stage::set("status-silent");
    let web: [Instance; 2] = stage.web();
    stage.register(&web);
    let addr = own_addr(&stage);
    let builder = stage.nginx().workers(2).upstream("web", "consul_upstream web;");
    let mut nginx = with_status(builder, addr, "").start();
    nginx.allow_log("exited on signal 9");
    every_worker_serves(&nginx, &["web-1", "web-2"]);
    let first = follower(&nginx);
    let mut conns = http::worker_conns(addr, nginx.worker_pids()).unwrap();
    let (_, mut other) = conns.drain().find(|(pid, _)| *pid != first).unwrap();
    drop(conns);
    nginx.signal_child(first, Signal::STOP);
    let mut state = |state: &str| {
        watch(state, || {
            let document = other.get("/consul").map_err(|err| err.to_string())?.json();
            let is = document["thread"]["state"] == state;
            if is { Ok(document) } else { Err(document.to_string()) }
        })
    };
    let document = state("silent");
    assert_eq!(document["in_sync"], false);
    assert_eq!(app(&document)["peers"].as_array().unwrap().len(), 2);
    let added = &app(&document)["changes"][0];
    assert_eq!(added["added"], 2);
    nginx.signal_child(first, Signal::KILL);
    let after = state("running");
    assert_ne!(after["thread"]["pid"], first);
    assert_eq!(&app(&after)["changes"][0]["first"], &added["first"], "{after}");
}

#[test]
fn what_is_held_serves_and_says_so() {
    let stage = Stage::set("status-held");
    let web: [Instance; 3] = stage.web();
    stage.register(&web);
    let addr = own_addr(&stage);
    let builder = stage.nginx().upstream("web", "consul_upstream web hold=10s;");
    let nginx = with_status(builder, addr, "").start();
    serves(nginx.addr(), &["web-1", "web-2", "web-3"]);
    shows(addr, "in sync", |app| app["sync"] == "in-sync");
    for id in ["web-1", "web-2", "web-3"] {
        stage.consul.deregister(id);
    }
    let document =
        shows(addr, "held", |app| app["held"] == 1 || app["held"] == 2 || app["held"] == 3);
    assert_eq!(app(&document)["sync"], "held");
    assert_eq!(document["in_sync"], false);
    assert!(app(&document)["held_until"].is_string());
    let peers = app(&document)["peers"].as_array().unwrap();
    assert!(peers.iter().any(|peer| peer["kept_by"] == "guard"), "{document}");
    let document = shows(addr, "let go", |app| app["peers"].as_array().is_some_and(Vec::is_empty));
    assert_eq!(app(&document)["held"], 0);
    assert_eq!(app(&document)["updates"]["held"], 1);
    assert_eq!(app(&document)["sync"], "in-sync");
}

/// A set that does not fit is told with those who would serve if it did.
#[test]
fn a_set_that_is_refused_says_who_is_missing() {
    let stage = Stage::set("status-refused");
    let web: [Instance; 1] = stage.web();
    stage.register(&web);
    let addr = own_addr(&stage);
    let upstream = "upstream web { zone web 32k; consul_upstream web; }";
    let builder = stage.nginx().http(upstream).server("web");
    let mut nginx = with_status(builder, addr, "").start();
    nginx.allow_log("is full");
    serves(nginx.addr(), &["web-1"]);
    let more: Vec<Service> = (0..60u8)
        .map(|n| {
            let addr = SocketAddr::from(([127, 9, 0, n + 1], 80));
            Service::new("web", &format!("web-more-{n:02}"), addr)
        })
        .collect();
    stage.consul.register_all(&more);
    let all = shows(addr, "refused", |app| {
        app["sync"] == "refused" && app["sources"][0]["registered"] == 61
    });
    let source = &app(&all)["sources"][0];
    // They came one after the other: some were in time.
    let missing = source["excluded"]["not-applied"].as_u64().unwrap();
    assert!(missing > 32, "{source}");
    assert_eq!(source["serving"], 61 - missing);
    assert_eq!(all["in_sync"], false);
    assert!(app(&all)["updates"]["refused"].as_u64() > Some(0));
    let rows = app(&all)["excluded"].as_array().unwrap();
    assert_eq!(rows.len(), 32);
    assert!(rows.iter().all(|row| row["reason"] == "not-applied" && row["source"] == 1));
    assert_eq!(app(&all)["excluded_omitted"], missing - 32);
    let metrics = get(addr, "/consul?format=prometheus").text();
    assert!(metrics.contains(&format!("reason=\"not-applied\"}} {missing}\n")), "{metrics}");
    for service in &more {
        stage.consul.deregister(&service.id);
    }
    let back = shows(addr, "in sync again", |app| app["sync"] == "in-sync");
    assert_eq!(app(&back)["sources"][0]["excluded"]["not-applied"], Value::Null);
}

/// What Consul was told by somebody with bad intentions harms nobody, and what is secret is not
/// shown.
#[test]
fn hostile_text_is_harmless_and_secrets_are_not_shown() {
    const TOKEN: &str = "b1gs3cr3t-0000-4000-8000-00000000cafe";
    let stage = Stage::set("status-hostile");
    let evil = "<script>alert(1)</script>\"'\u{202e}&";
    let long = "x".repeat(120);
    let bad = Instance::start(&stage.net, "web", "bad")
        .with(|it| Service::new("web", evil, "127.0.0.1:9".parse().unwrap()).tag(&it.name));
    let out = Instance::start(&stage.net, "web", &long).with(|it| it.port(0));
    stage.register([&bad, &out]);
    let addr = own_addr(&stage);
    let builder = stage.nginx().http(format!("consul_token {TOKEN};"));
    let builder = builder.upstream("web", "consul_upstream web;");
    let _nginx = with_status(builder, addr, "").start();
    shows(addr, "both", |app| {
        app["sources"][0]["registered"] == 2 && app["excluded"].as_array().unwrap().len() == 1
    });
    for format in ["json", "html", "prometheus"] {
        let text = get(addr, &format!("/consul?format={format}")).text();
        // In plain text it is nothing but text.
        assert!(format == "prometheus" || !text.contains("<script>alert"), "{format}: {text}");
        assert!(!text.contains('\u{202e}'), "{format}");
        assert!(!text.contains(&long), "{format}: it is cut");
        assert!(!text.contains("s3cr3t"), "{format}");
    }
    let document = document(addr);
    let id = app(&document)["peers"][0]["service_id"].as_str().unwrap();
    assert!(id.starts_with("<script>alert(1)"), "{id}");
}

/// What a reader of the counters sees is what its clients did, also after a reload.
#[test]
fn requests_are_counted_by_peer() {
    let stage = Stage::set("status-counters");
    let web: [Instance; 2] = stage.web();
    stage.register(&web);
    let addr = own_addr(&stage);
    let builder =
        stage.nginx().workers(2).upstream("web", "server 127.0.0.9:1 down; consul_upstream web;");
    let mut nginx = with_status(builder, addr, "").start();
    serves(nginx.addr(), &["web-1", "web-2"]);
    let sums = |what: &str| {
        let document = document(addr);
        let peers = app(&document)["peers"].as_array().unwrap().clone();
        let counted = |peer: &Value| peer["responses"][what].as_u64();
        let sum: u64 = peers.iter().filter_map(counted).sum();
        let requests: u64 = peers.iter().filter_map(|peer| peer["requests"].as_u64()).sum();
        (requests, sum, document)
    };
    let requests = |n: usize, status: u16| {
        let mut conn = Conn::open(nginx.addr()).unwrap();
        for _ in 0..n {
            assert_eq!(conn.get("/").unwrap().status, status);
        }
    };
    let (before, ok, document) = sums("2xx");
    assert!(app(&document)["peers"][0]["requests"].is_null(), "a static server has no counters");
    requests(100, 200);
    let (after, now_ok, document) = sums("2xx");
    assert_eq!((after - before, now_ok - ok), (100, 100), "{document}");
    let peer = &app(&document)["peers"][1];
    assert!(peer["sent"].as_u64() > Some(0) && peer["received"].as_u64() > Some(0), "{peer}");
    assert!(peer["selected"].is_string() && peer["id"].is_u64());
    web.iter().for_each(|it| it.backend.set_status(404));
    requests(10, 404);
    let (total, missing, document) = sums("4xx");
    assert_eq!((total - after, missing), (10, 10), "{document}");
    let ids = |document: &Value| {
        let peers = app(document)["peers"].as_array().unwrap();
        peers.iter().map(|peer| peer["id"].as_u64()).collect::<Vec<_>>()
    };
    let before = ids(&document);
    nginx.reload();
    let (reloaded, _, document) = sums("4xx");
    assert_eq!(reloaded, total, "{document}");
    assert_eq!(ids(&document), before);
}

/// Whom a request was passed to stands in the log, one for each attempt, in the form of nginx's own
/// `$upstream_addr`.
#[test]
fn variables_name_the_instances_that_were_tried() {
    let stage = Stage::set("status-variables");
    let web: [Instance; 1] = stage.web();
    stage.register(&web);
    // Nobody listens there.
    let dead = SocketAddr::new(web[0].addr().ip(), 9);
    for (service, id, at) in
        [("half", "half-1", dead), ("half", "half-2", web[0].addr()), ("gone", "gone-1", dead)]
    {
        stage.consul.register(&Service::new(service, id, at));
    }
    let format = "log_format who '[$upstream_addr] [$consul_service_id] [$consul_node] \
                  [$consul_datacenter] $request_uri';";
    let addr = own_addr(&stage);
    let nginx = stage
        .nginx()
        .http(format)
        .upstream("web", "consul_upstream web;")
        .upstream("half", "consul_upstream half;")
        .upstream("gone", "consul_upstream gone;")
        .upstream("fixed", &format!("server {}; consul_upstream nobody;", web[0].addr()))
        .listen(addr)
        .http(format!(
            "server {{ listen {addr}; access_log logs.txt who;
             location /web {{ proxy_pass http://web; }}
             location /half {{ proxy_pass http://half; }}
             location /mixed {{ proxy_pass http://gone; error_page 502 = @fixed; }}
             location /again {{ proxy_pass http://gone; error_page 502 = @web; }}
             location /fixed {{ proxy_pass http://fixed; }}
             location /none {{ return 200; }}
             location @fixed {{ proxy_pass http://fixed; }}
             location @web {{ proxy_pass http://web; }} }}"
        ))
        .start();
    serves(nginx.addr(), &["web-1"]);
    nginx.wait_log("1 of 1 instances serve", 2, PATIENCE);
    nginx.wait_log("2 of 2 instances serve", 1, PATIENCE);
    let live = web[0].addr();
    let expected = [
        format!("[{live}] [web-1] [n1] [dc1] /web"),
        format!("[{dead}, {live}] [half-1, half-2] [n1, n1] [dc1, dc1] /half"),
        format!("[{dead} : {live}] [gone-1 : -] [n1 : -] [dc1 : -] /mixed"),
        format!("[{dead} : {live}] [gone-1 : web-1] [n1 : n1] [dc1 : dc1] /again"),
        format!("[{live}] [-] [-] [-] /fixed"),
        "[-] [-] [-] [-] /none".into(),
    ];
    for path in ["/web", "/half", "/mixed", "/again", "/fixed", "/none"] {
        assert_eq!(get(addr, path).status, 200, "{path}");
    }
    let log = stage.dir.join("nginx/logs.txt");
    watch("a line for each", || {
        let text = std::fs::read_to_string(&log).map_err(|err| err.to_string())?;
        let lines: Vec<&str> = text.lines().collect();
        if lines == expected { Ok(()) } else { Err(text) }
    });
}

/// Where the configuration names no variable, a page that looks one up by its name has it from the
/// second time on.
#[test]
fn variables_are_found_by_who_looks_them_up_by_name() {
    let stage = Stage::set("status-lookup");
    let page = "<!--# echo var=\"consul_service_id\" -->";
    let backend = Backend::start(&stage.net, 40, page);
    stage.consul.register(&Service::new("web", "web-1", backend.addr()));
    let nginx = stage
        .nginx()
        .workers(1)
        .http("ssi on; ssi_types *;")
        .upstream("web", "consul_upstream web;")
        .start();
    nginx.wait_log("1 of 1 instances serve", 1, PATIENCE);
    let served = |_| get(nginx.addr(), "/").text();
    let [first, second] = [1, 2].map(served);
    assert!(first.starts_with('('), "SSI's word for nothing: {first}");
    assert_eq!(second, "web-1");
}

/// An answer that is larger than what a client reads at a time comes whole, and a client that
/// reads nothing stops nobody.
#[test]
fn a_large_answer_comes_as_the_client_reads() {
    let stage = Stage::set("status-large");
    let services: Vec<Service> = (0..600u16)
        .map(|n| {
            let addr = SocketAddr::from(([127, 9, (n / 200) as u8, (n % 200) as u8 + 1], 80));
            Service::new("web", &format!("web-{n:04}"), addr)
        })
        .collect();
    stage.consul.register_all(&services);
    let addr = own_addr(&stage);
    let upstream = "upstream web { zone web 4m; consul_upstream web; }";
    let nginx = with_status(stage.nginx().http(upstream), addr, "").start();
    shows(addr, "all", |app| app["sources"][0]["serving"] == 600);
    let mut slow = RawConn::to_worker(addr, nginx.worker_pids()[0]);
    slow.send("GET /consul HTTP/1.1\r\nHost: any\r\n\r\n");
    for _ in 0..5 {
        let answer = get(addr, "/consul");
        assert_eq!(answer.header("content-length"), "", "it is chunked");
        let peers = answer.json();
        assert_eq!(app(&peers)["peers"].as_array().unwrap().len(), 600);
        assert!(answer.body.len() > 200_000, "{}", answer.body.len());
    }
    let page = get(addr, "/consul?format=prometheus&peers=none");
    assert_eq!(page.status, 200);
    assert!(page.text().ends_with('\n'));
    drop(slow);
    assert_eq!(nginx.log_count("[alert]"), 0, "{}", nginx.log());
}

/// What a server makes of its requests, one after the other.
#[derive(Clone, Copy)]
enum Mood {
    /// An answer with so many bytes, on a connection that stays.
    Answers(u16, usize),
    /// The connection is reset.
    Resets,
    /// The connection is closed, and not a byte was sent.
    Closes,
    /// A header that is none.
    Mumbles,
    /// Less of a body than was promised.
    Breaks,
    /// Nothing, for longer than nginx waits.
    IsSilent,
}

/// A server of such moods, which come round.
fn moody(addr: SocketAddr, moods: &'static [Mood]) {
    let listener = TcpListener::bind(addr).unwrap();
    let turn = Arc::new(AtomicUsize::new(0));
    // It ends with the test's process: what it waits in is nobody's.
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let turn = turn.clone();
            thread::spawn(move || moody_connection(stream, moods, &turn));
        }
    });
}

fn moody_connection(stream: TcpStream, moods: &[Mood], turn: &AtomicUsize) -> Option<()> {
    // What is not read of a request makes the kernel reset the connection that is closed.
    let mut reader = BufReader::with_capacity(16, stream);
    loop {
        // The head, and a body if it says so.
        let mut head = String::new();
        let mut mood = None;
        while !head.ends_with("\r\n\r\n") {
            if reader.read_line(&mut head).ok()? == 0 {
                return None;
            }
            let next = || moods[turn.fetch_add(1, Ordering::Relaxed) % moods.len()];
            if matches!(mood.get_or_insert_with(next), Mood::Resets) {
                return None;
            }
        }
        let length = |line: &str| line.strip_prefix("Content-Length: ")?.parse().ok();
        let mut body = vec![0; head.lines().find_map(length).unwrap_or(0)];
        reader.read_exact(&mut body).ok()?;
        let stream = reader.get_mut();
        match mood? {
            Mood::Answers(status, len) => {
                let answer = format!("HTTP/1.1 {status} It\r\nContent-Length: {len}\r\n\r\n");
                stream.write_all(answer.as_bytes()).ok()?;
                stream.write_all(&vec![b'x'; len]).ok()?;
            }
            Mood::Mumbles => {
                stream.write_all(b"HTTP/1.1 200 OK\r\nno\0thing\r\n\r\n").ok()?;
                return None;
            }
            Mood::Breaks => {
                stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\nless").ok()?;
                return None;
            }
            Mood::IsSilent => thread::sleep(Duration::from_secs(1)),
            Mood::Resets | Mood::Closes => return None,
        }
    }
}

/// What the log, or the status, knows of a server: requests, responses by class, fails, bytes sent
/// and received.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Sums {
    requests: u64,
    responses: [u64; 5],
    fails: u64,
    sent: u64,
    received: u64,
}

/// The sums over a log whose lines have `$status`, and of each attempt `$upstream_addr`,
/// `$upstream_status`, `$upstream_header_time`, `$upstream_bytes_sent`, `$upstream_bytes_received`;
/// and how many lines have more attempts than one.
fn sums_of_log(log: &str) -> (BTreeMap<String, Sums>, usize) {
    let mut all: BTreeMap<String, Sums> = BTreeMap::new();
    let mut retried = 0;
    for line in log.lines() {
        let fields: Vec<Vec<&str>> =
            line.split('|').map(|field| field.split(", ").collect()).collect();
        let [status, addrs, statuses, headers, sent, received] = &fields[..] else {
            panic!("{line}");
        };
        retried += usize::from(addrs.len() > 1);
        for (n, addr) in addrs.iter().enumerate() {
            if addr.parse::<SocketAddr>().is_err() {
                // Nobody was left to try.
                assert_eq!((*addr, statuses[n]), ("web", "502"), "{line}");
                continue;
            }
            let number = |text: &str| text.parse().unwrap_or(0);
            let is_last = n + 1 == addrs.len();
            let sums = all.entry(addr.to_string()).or_default();
            sums.requests += 1;
            sums.sent += number(sent[n]);
            sums.received += number(received[n]);
            // Without a header the status is nginx's own word for what went wrong.
            let code: usize = statuses[n].parse().unwrap_or(0);
            let failed = if headers[n] == "-" {
                // A client that goes away is no failure of the server.
                !(is_last && status[0] == "499")
            } else {
                sums.responses[code / 100 - 1] += 1;
                !is_last && code >= 500
            };
            sums.fails += u64::from(failed);
        }
    }
    (all, retried)
}

fn sums_of_status(document: &Value) -> BTreeMap<String, Sums> {
    let number = |value: &Value| value.as_u64().unwrap();
    let peers = app(document)["peers"].as_array().unwrap();
    let sums = |peer: &Value| {
        let classes = ["1xx", "2xx", "3xx", "4xx", "5xx"];
        let responses = classes.map(|class| number(&peer["responses"][class]));
        assert_eq!(responses.iter().sum::<u64>(), number(&peer["responses"]["total"]));
        Sums {
            requests: number(&peer["requests"]),
            responses,
            fails: number(&peer["fails"]),
            sent: number(&peer["sent"]),
            received: number(&peer["received"]),
        }
    };
    peers.iter().map(|peer| (peer["server"].as_str().unwrap().to_owned(), sums(peer))).collect()
}

/// Resets, cut answers, timeouts, 5xx, other servers tried, kept connections that die, clients that
/// go away: what is counted of each peer is what the log says, to the byte, and goes on so after a
/// reload.
#[test]
fn counters_agree_with_the_access_log() {
    const MOODS: [&[Mood]; 4] = [
        &[Mood::Answers(200, 300), Mood::Answers(204, 0), Mood::Answers(200, 100_000)],
        &[Mood::Answers(200, 10), Mood::Resets, Mood::Answers(503, 7), Mood::Answers(302, 1)],
        &[Mood::Answers(404, 20), Mood::Mumbles, Mood::Answers(500, 2_000), Mood::Closes],
        &[Mood::Answers(200, 5_000), Mood::Breaks, Mood::Answers(403, 30), Mood::IsSilent],
    ];
    let stage = Stage::set("status-truth");
    let mut services = Vec::new();
    for (n, moods) in MOODS.into_iter().enumerate() {
        let server = (stage.net.ip(30 + n as u8), stage.net.port()).into();
        moody(server, moods);
        services.push(Service::new("web", &format!("web-{n}"), server));
    }
    stage.consul.register_all(&services);
    let addr = own_addr(&stage);
    let format = "log_format tries '$status|$upstream_addr|$upstream_status|$upstream_header_time|\
                  $upstream_bytes_sent|$upstream_bytes_received';
                  proxy_next_upstream error timeout invalid_header http_500 http_503 http_404 \
                  non_idempotent; proxy_next_upstream_tries 3; proxy_read_timeout 250ms;";
    let web = (stage.net.ip(91), stage.net.port()).into();
    let builder = stage.nginx().workers(3).http(format).http(
        "upstream web { zone web 256k; keepalive 4; \
         consul_upstream web max_fails=20 fail_timeout=1s; }",
    );
    let builder = builder.listen(web).http(format!(
        "server {{ listen {web} reuseport; access_log tries.txt tries; proxy_http_version 1.1;
         proxy_set_header Connection '';
         location / {{ proxy_pass http://web; }}
         location /direct {{ proxy_pass http://web; proxy_buffering off; }} }}"
    ));
    let mut nginx = with_status(builder, addr, "access_log off;").start();
    shows(addr, "all", |app| app["sources"][0]["serving"] == services.len());
    let agree = |requests: u64| {
        let log = stage.dir.join("nginx/tries.txt");
        watch("status and log agree", || {
            let log = std::fs::read_to_string(&log).map_err(|err| err.to_string())?;
            let document = http::get(addr, "/consul").map_err(|err| err.to_string())?.json();
            let ((logged, retried), counted) = (sums_of_log(&log), sums_of_status(&document));
            let lines = log.lines().count() as u64;
            if lines >= requests && logged == counted {
                Ok((logged, retried, lines, document))
            } else {
                Err(format!("{lines} lines, the log: {logged:#?}\nthe status: {counted:#?}"))
            }
        })
    };
    let requests = |n: u64| {
        let path = |n| if n % 2 == 0 { "/".to_owned() } else { format!("/direct?n={n}") };
        let options = Options::default().connections(6).path(path);
        let sent = Load::run(web, n, &options).sent();
        for _ in 0..n / 20 {
            let mut conn = Conn::open(web).unwrap();
            // Many an answer is cut.
            let _ = conn.request("POST", "/", &[], vec![b'y'; 20_000]);
            let mut client = TcpStream::connect(web).unwrap();
            client.write_all(b"GET / HTTP/1.1\r\nHost: any\r\n\r\n").unwrap();
            drop(client);
        }
        sent + 2 * (n / 20)
    };
    let first = requests(600);
    let (before, retried, lines, document) = agree(first);
    assert_eq!(before.len(), MOODS.len(), "{before:#?}");
    assert!(retried > 20, "{retried} of {lines} were tried again");
    let total = |class: usize| before.values().map(|sums| sums.responses[class]).sum::<u64>();
    assert!((1..5).all(|class| total(class) > 0), "{before:#?}");
    assert!(before.values().filter(|sums| sums.fails > 5).count() >= 3, "{before:#?}");
    let ids = |document: &Value| -> Vec<_> {
        app(document)["peers"].as_array().unwrap().iter().map(|peer| peer["id"].clone()).collect()
    };
    println!("{lines} requests, {retried} of them tried again: {before:#?}");

    nginx.reload();
    let (reloaded, _, _, again) = agree(lines);
    assert_eq!(reloaded, before);
    assert_eq!(ids(&again), ids(&document));
    // A server that had failed too often when nginx reloaded is not asked before its time is over.
    let mut sent = lines;
    watch("each server is asked again", || {
        sent += requests(300);
        let (after, ..) = agree(sent);
        let asked = |(addr, sums): (&String, &Sums)| sums.requests > before[addr].requests;
        if after.iter().all(asked) { Ok(()) } else { Err(format!("{after:#?}")) }
    });
}

/// Four large answers are under way, to clients that take nothing: the fifth is told to come again,
/// small answers are given as ever, and nobody's list is locked.
#[test]
fn slow_readers_hold_nothing_but_their_answers() {
    let (net, dir) = (Net::isolated(), Dir::new("status-slow"));
    let fake = FakeConsul::start(&net);
    let (_backend, entries) = crowd(4_000);
    fake.know(100, &entries);
    let addr = (net.ip(90), net.port()).into();
    let builder = asking(&net, &dir, &fake.url())
        .http("upstream web { zone web 16m; consul_upstream web; } send_timeout 300s;");
    // Little of an answer is with the kernel.
    let slow: SocketAddr = (net.ip(91), net.port()).into();
    let builder = builder.server("web").listen(slow).http(format!(
        "server {{ listen {slow} sndbuf=16k; location /consul {{ consul_status; }} }}"
    ));
    let nginx = with_status(builder, addr, "").start();
    shows(addr, "all", |app| app["sources"][0]["serving"] == 4_000);
    let begin = |_| {
        let mut stream = TcpStream::connect(slow).unwrap();
        stream.write_all(b"GET /consul HTTP/1.0\r\n\r\n").unwrap();
        let mut begun = [0; 15];
        stream.read_exact(&mut begun).unwrap();
        assert_eq!(&begun, b"HTTP/1.1 200 OK");
        stream
    };
    let mut streams: Vec<TcpStream> = (0..4).map(begin).collect();
    for path in ["/consul", "/consul?format=html&q=web", "/consul/upstreams/web"] {
        let answer = get(addr, path);
        if path.contains("html") {
            assert_eq!(answer.status, 200, "it has 500 rows at most");
        } else {
            assert_eq!(answer.status, 503, "{path}");
            assert!(answer.header("retry-after").parse::<u32>().is_ok(), "{path}");
            assert_eq!(answer.json()["error"]["status"], 503);
        }
    }
    assert_eq!(get(addr, "/consul?format=prometheus&peers=none").status, 200);
    // The list is edited, and peers are picked.
    fake.know(101, &entries[..3_999]);
    nginx.wait_log("3999 of 3999 instances serve, index 101", 1, PATIENCE);
    assert_eq!(get(nginx.addr(), "/").status, 200);
    // One that goes away makes room; one that reads at last has all of it, as it was.
    drop(streams.pop());
    watch("there is room for one more", || match get(addr, "/consul").status {
        200 => Ok(()),
        status => Err(status.to_string()),
    });
    let mut text = String::new();
    streams[0].read_to_string(&mut text).unwrap();
    let (_, body) = text.split_once("\r\n\r\n").unwrap();
    let document: Value = serde_json::from_str(body).unwrap();
    assert_eq!(app(&document)["peers"].as_array().unwrap().len(), 4_000);
}

/// A Prometheus that scrapes a location with the status each second, with the rules that are shipped.
struct Prometheus {
    addr: SocketAddr,
    _process: Process,
}

impl Prometheus {
    /// None where there is no such program.
    fn start(stage: &Stage, target: SocketAddr, rules: &str) -> Option<Prometheus> {
        let addr = SocketAddr::from((stage.net.ip(92), stage.net.port()));
        stage.dir.write("rules.yml", rules);
        let conf = format!(
            "global: {{ scrape_interval: 1s, scrape_timeout: 1s, evaluation_interval: 1s }}\n\
             rule_files: [rules.yml]\n\
             scrape_configs:\n\
             - job_name: nginx\n  \
               metrics_path: /consul\n  \
               params: {{ format: [prometheus] }}\n  \
               static_configs: [{{ targets: [\"{target}\"] }}]\n"
        );
        let conf = stage.dir.write("prometheus.yml", conf);
        let log = std::fs::File::create(stage.dir.join("prometheus.log")).unwrap();
        let mut command = Command::new("prometheus");
        command
            .arg(format!("--config.file={}", conf.display()))
            .arg(format!("--storage.tsdb.path={}", stage.dir.join("prometheus").display()))
            .arg(format!("--web.listen-address={addr}"))
            .stdout(log.try_clone().unwrap())
            .stderr(log);
        match Process::spawn(&mut command) {
            Ok(process) => Some(Prometheus { addr, _process: process }),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                println!("skipped: there is no prometheus (Debian's package prometheus)");
                None
            }
            Err(error) => panic!("{error}"),
        }
    }

    fn api(&self, path: &str) -> Result<Value, String> {
        let answer = http::get(self.addr, &format!("/api/v1/{path}")).map_err(text)?;
        if answer.status == 200 { Ok(answer.json()["data"].take()) } else { Err(answer.text()) }
    }

    /// The first value of a query.
    fn value(&self, query: &str) -> Result<String, String> {
        let data = self.api(&format!("query?query={query}"))?;
        let value = data["result"][0]["value"][1].as_str();
        value.map(str::to_owned).ok_or_else(|| data.to_string())
    }

    /// Waits until it has scraped the metrics and evaluated all rules.
    #[track_caller]
    fn scrapes(&self) {
        for (query, expected) in [("up", "1"), ("nginx_consul_source_stale", "0")] {
            watch(&format!("{query} is {expected}"), || {
                let value = self.value(query)?;
                if value == expected { Ok(()) } else { Err(value) }
            });
        }
        watch("all rules are well", || {
            let data = self.api("rules")?;
            let rules = data["groups"][0]["rules"].as_array().cloned().unwrap_or_default();
            let well = rules.len() == 3 && rules.iter().all(|rule| rule["health"] == "ok");
            if well { Ok(()) } else { Err(data.to_string()) }
        });
        assert_eq!(self.firing().unwrap(), BTreeSet::new());
    }

    /// Waits until these alerts fire, and no others.
    #[track_caller]
    fn wait_firing(&self, patience: Duration, expected: &BTreeSet<String>) {
        eventually(patience, &format!("{expected:?} fire"), || {
            let firing = self.firing()?;
            // Between two looks: it evaluates its rules once a second.
            thread::sleep(Duration::from_millis(100));
            if firing == *expected { Ok(()) } else { Err(format!("{firing:?}")) }
        });
    }

    /// The alerts that fire.
    fn firing(&self) -> Result<BTreeSet<String>, String> {
        let data = self.api("alerts")?;
        let alerts = data["alerts"].as_array().ok_or("no alerts")?;
        let firing = alerts.iter().filter(|alert| alert["state"] == "firing");
        Ok(firing.map(|it| it["labels"]["alertname"].as_str().unwrap().to_owned()).collect())
    }
}

/// Milliseconds of the day of a time of the document.
#[track_caller]
fn millis(time: &Value) -> i64 {
    let clock = time.as_str().unwrap().split_once('T').unwrap().1.trim_end_matches('Z');
    let parts: Vec<f64> = clock.split(':').map(|part| part.parse().unwrap()).collect();
    ((parts[0] * 3600.0 + parts[1] * 60.0 + parts[2]) * 1000.0).round() as i64
}

/// One instance through every reason that there is, each read in all three formats.
#[test]
fn one_instance_goes_through_every_reason() {
    let stage = Stage::set("status-every-reason");
    let good = Instance::start(&stage.net, "web", "web-good").with(|it| it.tag("app"));
    let one = Instance::start(&stage.net, "web", "web-one");
    let here = one.addr();
    let service = || Service::new("web", "web-one", here);
    let tagged = || service().tag("app");
    let checked = |status| tagged().weights(1, 0).check(Check::ttl().initially(status));
    stage.register([&good]);
    let addr = own_addr(&stage);
    let line = "consul_upstream web tag=app";
    let builder = stage.nginx().http(format!(
        "upstream web {{ zone web 32k; {line}; }}
         upstream tolerant {{ zone tolerant 256k; {line} health=warning; }}"
    ));
    let mut nginx = with_status(builder.server("web"), addr, "").start();
    nginx.allow_log("is full");
    serves(nginx.addr(), &["web-good"]);
    let reads = |upstream: &str, reason: &str| -> Value {
        let path = format!("/consul/upstreams/{upstream}");
        let row = watch(&format!("{reason} in JSON"), || {
            let document = http::get(addr, &path).map_err(text)?.json();
            let rows = document["upstreams"][upstream]["excluded"].as_array().cloned();
            let row = rows.iter().flatten().find(|row| row["service_id"] == "web-one").cloned();
            row.filter(|row| row["reason"] == reason).ok_or_else(|| document.to_string())
        });
        let page = get(addr, &format!("{path}?format=html&q=web-one")).text();
        // Beside its name, in the table of those that do not serve.
        let (_, behind) = page.split_once("not serving").unwrap_or_default();
        assert!(behind.contains("web-one"), "{reason}: {page}");
        assert!(behind.contains(&format!(" {reason}</")), "{reason}: {page}");
        let metrics = get(addr, &format!("{path}?format=prometheus")).text();
        let series = format!(
            "nginx_consul_source_excluded{{upstream=\"{upstream}\",protocol=\"http\",source=\"1\",\
             reason=\"{reason}\"}} 1\n"
        );
        assert!(metrics.contains(&series), "{series} {metrics}");
        row
    };
    let mut seen = BTreeSet::new();
    let mut reason = |upstream: &str, reason: &'static str| {
        assert!(seen.insert(reason));
        reads(upstream, reason)
    };

    stage.consul.register(&checked(Status::Critical));
    let row = reason("web", "critical");
    assert_eq!(row["status"], "critical");
    assert!(row["detail"].as_str().is_some_and(|id| id.contains("web-one")), "its check: {row}");
    stage.consul.check("web-one", Status::Warning);
    reason("web", "warning");
    reason("tolerant", "weight-0");
    stage.consul.deregister("web-one");
    stage.consul.register(&tagged());
    stage.consul.maintenance("web-one", true, "somebody");
    let row = reason("web", "maintenance");
    assert_eq!(row["detail"], "_service_maintenance:web-one");
    // A reload is no new beginning of it.
    nginx.reload();
    let after = reads("web", "maintenance");
    assert!((millis(&after["since"]) - millis(&row["since"])).abs() <= 5, "{row} {after}");
    stage.consul.maintenance("web-one", false, "");
    stage.consul.register(&service());
    assert_eq!(reason("web", "tag")["detail"], "app");
    stage.consul.register(&tagged().address("1.2.3"));
    reason("web", "invalid-address");
    stage.consul.register(&tagged().address("no-such-host.invalid"));
    assert_eq!(reason("web", "unresolved")["detail"], "no-such-host.invalid");
    stage.consul.register(&tagged().port(0));
    reason("web", "no-port");
    stage.consul.register(&Service::new("web", "web-one", good.addr()).tag("app"));
    reason("web", "duplicate");
    // What an agent would refuse the catalog takes.
    stage.consul.deregister("web-one");
    let body = json!({
        "Node": "elsewhere",
        "Address": "127.0.0.1",
        "Service": { "ID": "web-one", "Service": "web", "Tags": ["app"], "Port": 70000 },
    });
    stage.consul.put("/v1/catalog/register", &body.to_string());
    reason("web", "invalid-port");
    stage.consul.put("/v1/catalog/deregister", &json!({ "Node": "elsewhere" }).to_string());

    // Others come until one is refused; without that one there is no room for any.
    shows(addr, "in sync", |app| app["sync"] == "in-sync" && app["sources"][0]["registered"] == 1);
    for n in 0..100u8 {
        let id = format!("web-more-{n:02}");
        let other = SocketAddr::from(([127, 9, 0, n + 1], 80));
        stage.consul.register(&Service::new("web", &id, other).tag("app"));
        let document = shows(addr, "applied or refused", |app| {
            let source = &app["sources"][0];
            source["registered"] == u64::from(n) + 2
                && (app["sync"] == "refused" || source["serving"] == u64::from(n) + 2)
        });
        if app(&document)["sync"] == "refused" {
            stage.consul.deregister(&id);
            break;
        }
    }
    shows(addr, "in sync", |app| app["sync"] == "in-sync");
    stage.consul.register(&tagged());
    reason("web", "not-applied");
    assert_eq!(seen.len(), 11, "{seen:?}");
}

/// Tests that judge a time: they run alone, at the end.
mod timed {
    use super::*;

    /// A Consul that is away for longer than answers count: errors are counted at once, and the status says
    /// `stale` when the last answer is too old, and since when; back again, all is well within a second, and
    /// nothing is forgotten, over a reload either. A real Prometheus, where there is one, raises the alarm
    /// and ends it. The outage and the alert's patience have two minutes and the shipped minute in `make
    /// test-full`.
    #[test]
    fn an_outage_is_told_raises_the_alarm_and_ends() {
        const COUNTS: i64 = 2 * (1_000 + 1_000 / 16 + 12_000);
        let mut stage = Stage::with("status-outage", |consul| consul.persistent());
        let web: [Instance; 2] = stage.web();
        stage.register(&web);
        let addr = own_addr(&stage);
        let builder = stage.nginx().http(SHORT).workers(2).upstream("web", "consul_upstream web;");
        let mut nginx = with_status(builder, addr, "").start();
        nginx.allow_log("[error]");
        serves(nginx.addr(), &["web-1", "web-2"]);
        let before = shows(addr, "in sync", |app| app["sync"] == "in-sync");
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/nginx-conf/prometheus-rules.yml");
        let rules = std::fs::read_to_string(path).unwrap();
        let rules = if full() { rules } else { rules.replace("for: 1m\n", "for: 1s\n") };
        let prometheus = Prometheus::start(&stage, addr, &rules);
        if let Some(prometheus) = &prometheus {
            prometheus.scrapes();
        }

        let begin = Instant::now();
        stage.consul.kill();
        let failing = shows(addr, "an error of transport", |app| {
            app["sources"][0]["errors"]["transport"].as_u64() > Some(0)
        });
        let source = &app(&failing)["sources"][0];
        assert_eq!(source["last_error"]["cause"], "transport");
        assert_eq!(failing["agents"][0]["up"], false, "{failing}");
        assert_eq!(app(&failing)["sync"], "in-sync", "a single error does not matter");
        assert!(source["last_success"].is_string());

        eventually(2 * PATIENCE, "stale", || {
            let document = http::get(addr, "/consul").map_err(text)?.json();
            if app(&document)["sync"] == "stale" { Ok(()) } else { Err(document.to_string()) }
        });
        assert!(begin.elapsed() > Duration::from_secs(24), "{:?}", begin.elapsed());
        if let Some(prometheus) = &prometheus {
            let expected = BTreeSet::from(["ConsulDiscoveryStale".to_owned()]);
            prometheus.wait_firing(if full() { 4 * PATIENCE } else { PATIENCE }, &expected);
            println!("the alert fires {:?} after Consul was killed", begin.elapsed());
        }
        if full() {
            thread::sleep(Duration::from_secs(120).saturating_sub(begin.elapsed()));
        }
        let stale = document(addr);
        assert_eq!(stale["in_sync"], false);
        assert_eq!(stale["thread"]["state"], "running");
        assert_ne!(app(&stale)["since"], app(&before)["since"]);
        assert_eq!(app(&stale)["peers"].as_array().unwrap().len(), 2, "they serve all the same");
        let last = millis(&app(&stale)["sources"][0]["last_success"]);
        let since = (millis(&app(&stale)["since"]) - last).rem_euclid(86_400_000);
        assert!(
            (since - COUNTS).abs() <= 5,
            "out of sync {since} ms after the last answer: {stale}"
        );
        assert_eq!(millis(&stale["since"]), millis(&app(&stale)["since"]));
        let metrics = get(addr, "/consul?format=prometheus").text();
        assert!(metrics.contains("nginx_consul_source_stale{upstream=\"web\""), "{metrics}");
        assert_eq!(get(addr, "/consul").status, 200);

        stage.consul.respawn();
        let mut recovered = None;
        let back = watch("in sync again", || {
            // From when it answers a query of the module's kind.
            let answer = stage.consul.raw("GET", "/v1/health/service/web?consistent", "");
            if recovered.is_none() && answer.is_ok_and(|answer| answer.status == 200) {
                recovered = Some(Instant::now());
            }
            let document = http::get(addr, "/consul").map_err(text)?.json();
            if document["in_sync"] == true { Ok(document) } else { Err(document.to_string()) }
        });
        let took = recovered.map_or(Duration::ZERO, |at| at.elapsed());
        println!("in sync {took:?} after Consul answers");
        assert!(took <= Duration::from_secs(1), "{took:?} {back}");
        assert_eq!(app(&back)["sync"], "in-sync");
        assert_ne!(app(&back)["since"], app(&stale)["since"]);
        let source = &app(&back)["sources"][0];
        assert_eq!(source["last_error"]["cause"], "transport", "it is remembered");
        assert!(source["errors"]["transport"].as_u64() > Some(0));
        if let Some(prometheus) = &prometheus {
            prometheus.wait_firing(PATIENCE, &BTreeSet::new());
        }

        // A reload forgets nothing of it.
        let errors = source["errors"]["transport"].as_u64();
        let changes = app(&back)["changes"].clone();
        nginx.reload();
        let document = shows(addr, "in sync after a reload", |app| app["sync"] == "in-sync");
        let source = &app(&document)["sources"][0];
        assert!(source["errors"]["transport"].as_u64() >= errors, "{source}");
        assert_eq!(app(&document)["changes"][0]["first"], changes[0]["first"]);
    }
}
