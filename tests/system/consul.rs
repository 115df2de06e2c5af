//! What Consul can do wrong, and what nginx goes on serving meanwhile.

use std::fs;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use testbed::http::Conn;
use testbed::{Backend, Consul, Dir, Load, Net, eventually};

use crate::common::{
    PATIENCE, Serve, Stage, asking, changes, connections, follower, serves, serves_now, steady,
    text, v4, web,
};
use crate::fake_consul::{FakeConsul, Reply, entry};

/// What is left for a start beside the wait for Consul's answers, on a machine that is busy.
const SLACK: Duration = Duration::from_secs(5);

// ---- away

#[test]
fn killed_and_restarted_while_requests_flow() {
    let mut stage = Stage::with("killed", |consul| consul.persistent());
    let [one, two, three] = stage.web();
    stage.register([&one, &two]);
    let nginx = stage.nginx().workers(2).upstream("web", "consul_upstream web;").start();
    serves(nginx.addr(), &["web-1", "web-2"]);
    let load = Load::start(nginx.addr(), &steady());

    stage.consul.kill();
    nginx.wait_log("[error]", 1, PATIENCE);
    load.wait_for(200);
    serves_now(nginx.addr(), &["web-1", "web-2"]);
    stage.consul.restart();
    stage.register([&three]);
    serves(nginx.addr(), &["web-1", "web-2", "web-3"]);
    nginx.wait_log("answers again, after ", 1, PATIENCE);

    load.stop().assert_nothing_lost();
    let changes = changes(&nginx, "web");
    assert!(!changes.iter().any(|line| line.starts_with('-')), "none ever left: {changes:?}");
    assert_eq!(nginx.log_count("[error]"), 1);
}

#[test]
fn stopped_for_a_while_with_connections_open() {
    let mut stage = Stage::set("stopped");
    let [one, two] = stage.web();
    stage.register([&one]);
    let nginx = stage.nginx().upstream("web", "consul_upstream web;").start();
    let consul = v4(stage.consul.addr());
    eventually(PATIENCE, "a blocking query", || connections(&nginx, follower(&nginx), consul) == 1);
    stage.consul.pause();
    let load = Load::start(nginx.addr(), &steady());
    eventually(PATIENCE, "three seconds of load", || {
        load.report().elapsed > Duration::from_secs(3)
    });
    load.stop().assert_nothing_lost();
    serves_now(nginx.addr(), &["web-1"]);

    stage.consul.resume();
    stage.consul.wait_ready().unwrap();
    stage.register([&two]);
    serves(nginx.addr(), &["web-1", "web-2"]);
}

/// An agent in development mode forgets all when it restarts, and its index begins anew: a query
/// with the old index would wait for ever.
#[test]
fn wiped_and_followed_again() {
    let mut stage = Stage::set("wiped");
    let [one, two] = stage.web();
    stage.register([&one]);
    for n in 0..10 {
        stage.consul.register(&one.service.clone().meta("version", &n.to_string()));
    }
    let nginx = stage.nginx().upstream("web", "consul_upstream web;").start();
    serves(nginx.addr(), &["web-1"]);
    let before = stage.consul.index("web");

    stage.consul.restart();
    stage.register([&two]);
    assert!(stage.consul.index("web") < before, "the index went back");
    serves(nginx.addr(), &["web-2"]);
    stage.register([&one]);
    serves(nginx.addr(), &["web-1", "web-2"]);
}

// ---- wrong answers

/// One instance serves. Then Consul answers `bad` to everything, and says in the end that there
/// are two: until then the one goes on, and one line says what happened.
#[track_caller]
fn keeps_its_set(name: &str, bad: Reply, settings: &str, says: &str) {
    let (net, dir) = (Net::isolated(), Dir::new(name));
    let fake = FakeConsul::start(&net);
    let [one, two] = web(&net);
    let both = [entry("web-1", one.addr()), entry("web-2", two.addr())];
    fake.know(5, &both[..1]);
    let nginx = asking(&net, &dir, &fake.url())
        .http(settings)
        .upstream("web", "consul_upstream web;")
        .start();
    serves_now(nginx.addr(), &["web-1"]);

    fake.answer(bad);
    let line = format!("consul: upstream \"web\": service \"web\" at {}: {says}", fake.url());
    nginx.wait_log(&line, 1, PATIENCE);
    // Asked again, and again in vain: that is not worth another line.
    fake.wait_requests(2);
    serves_now(nginx.addr(), &["web-1"]);
    assert_eq!(nginx.log_count("[error]"), 1);
    assert_eq!(nginx.wait_log("[error]", 1, PATIENCE), nginx.wait_log(&line, 1, PATIENCE));

    fake.know(6, &both);
    serves(nginx.addr(), &["web-1", "web-2"]);
    let recovery = nginx.wait_log("answers again, after ", 1, PATIENCE);
    assert!(recovery.len() == 1 && recovery[0].contains("[notice]"), "{recovery:?}");
}

#[test]
fn a_page_of_html_changes_nothing() {
    let page =
        Reply::new(200, "<html><h1>It works!</h1></html>").header("Content-Type", "text/html");
    keeps_its_set("html", page, "", "the answer has no valid X-Consul-Index");
}

#[test]
fn garbage_changes_nothing() {
    let garbage = Reply::new(200, b"\x00\xff[{]\n[emerg] x".to_vec()).header("X-Consul-Index", "9");
    keeps_its_set("garbage", garbage, "", "invalid answer: ");
}

#[test]
fn json_of_another_shape_changes_nothing() {
    let other = Reply::new(200, r#"[{"Node": {"Node": "n1"}}]"#).header("X-Consul-Index", "9");
    keeps_its_set("other_json", other, "", "invalid answer: ");
}

#[test]
fn half_an_answer_changes_nothing() {
    let half = Reply::health(9, &many(10)).cut();
    keeps_its_set("cut", half, "", "");
}

#[test]
fn an_answer_that_stops_in_the_middle_changes_nothing() {
    // The query that was waiting is cut off by its own length; the next one has a second.
    let (net, dir) = (Net::isolated(), Dir::new("stalled"));
    let fake = FakeConsul::start(&net);
    let [one, two] = web(&net);
    let both = [entry("web-1", one.addr()), entry("web-2", two.addr())];
    fake.know(5, &both[..1]);
    let nginx = asking(&net, &dir, &fake.url())
        .http("consul_timeout 1s;")
        .upstream("web", "consul_upstream web;")
        .start();
    serves_now(nginx.addr(), &["web-1"]);
    fake.script(|request| match request.index() {
        Some(_) => Some(Reply::new(500, "")),
        None => Some(Reply::health(9, &many(10)).stalled()),
    });
    nginx.wait_log("no answer in time", 1, PATIENCE);
    serves_now(nginx.addr(), &["web-1"]);
    fake.know(6, &both);
    serves(nginx.addr(), &["web-1", "web-2"]);
}

#[test]
fn status_500_changes_nothing() {
    // Consul sends the header with errors, too, and it means nothing there.
    let failed = Reply::new(500, "No cluster leader").header("X-Consul-Index", "1");
    keeps_its_set("status_500", failed, "", "status 500: No cluster leader");
}

#[test]
fn an_answer_over_consul_max_response_changes_nothing() {
    let large = Reply::health(9, &many(100));
    let says = "the answer is larger than 4096 bytes, see \"consul_max_response\"";
    keeps_its_set("too_large", large, "consul_max_response 4k;", says);
}

/// So many instances at addresses where nobody listens.
fn many(n: u8) -> Vec<Value> {
    (1..=n).map(|n| entry(&format!("none-{n}"), ([127, 0, 0, n], 1).into())).collect()
}

#[test]
fn a_redirect_is_not_followed() {
    let net = Net::isolated();
    let elsewhere = FakeConsul::start(&net);
    elsewhere.know(9, &many(1));
    for status in [301, 302, 307, 308] {
        let there = format!("{}/v1/health/service/web", elsewhere.url());
        let redirect = Reply::new(status, "").header("Location", &there);
        keeps_its_set("redirect", redirect, "", &format!("status {status}"));
    }
    assert_eq!(elsewhere.connections(), 0);
}

/// Somebody has to mend the token first: Consul is not asked again for half a minute.
#[test]
fn status_403_changes_nothing_and_is_not_asked_again_at_once() {
    let (net, dir) = (Net::isolated(), Dir::new("status_403"));
    let fake = FakeConsul::start(&net);
    let [one] = web(&net);
    fake.know(5, &[entry("web-1", one.addr())]);
    let nginx = asking(&net, &dir, &fake.url()).upstream("web", "consul_upstream web;").start();
    fake.answer(Reply::new(403, "ACL not found").header("X-Consul-Index", "1"));
    nginx.wait_log("permission denied (403)", 1, PATIENCE);
    let asked = fake.requests().len();
    Load::run(nginx.addr(), 500, &steady()).assert_nothing_lost();
    serves_now(nginx.addr(), &["web-1"]);
    assert_eq!(fake.requests().len(), asked);
    assert_eq!(nginx.log_count("[error]"), 1);
}

/// What a server that was just restarted does: status 200, a part of the instances, and the index
/// of a time gone by.
#[test]
fn an_older_answer_is_asked_for_again_and_not_applied() {
    let (net, dir) = (Net::isolated(), Dir::new("older"));
    let fake = FakeConsul::start(&net);
    let [one, two, three] = web(&net);
    let all = [&one, &two, &three].map(|it| entry(&it.service.id, it.addr()));
    fake.know(50, &all[..2]);
    let nginx = asking(&net, &dir, &fake.url()).upstream("web", "consul_upstream web;").start();
    serves_now(nginx.addr(), &["web-1", "web-2"]);
    let (part, whole) = (Reply::health(40, &all[..1]), Reply::health(60, &all));
    fake.script(move |request| match request.index() {
        Some(60) => None,
        Some(_) => Some(part.clone()),
        None => Some(whole.clone()),
    });
    serves(nginx.addr(), &["web-1", "web-2", "web-3"]);
    let last = fake.requests().into_iter().rev().find(|request| request.index().is_none());
    assert!(last.unwrap().target.contains("consistent"));
    let changes = changes(&nginx, "web");
    assert!(!changes.iter().any(|line| line.contains("index 40")), "{changes:?}");
}

// ---- tokens

const SECRET: &str = "5ecbe7a1-f00d-cafe-beef-0123456789ab";

#[test]
fn a_token_is_sent_with_every_query_and_never_logged() {
    let (net, dir) = (Net::isolated(), Dir::new("token"));
    let [given, filed, own, none] = std::array::from_fn(|_| FakeConsul::start(&net));
    dir.write("token", format!(" {SECRET}-filed\n"));
    // A relative path begins at the configuration's directory.
    dir.write("nginx/own-token", format!("{SECRET}-own"));
    let file = dir.join("token").display().to_string();
    let of = |fake: &FakeConsul| format!("consul_upstream web; consul_address {};", fake.url());
    let conf = asking(&net, &dir, &given.url())
        .http(format!("consul_token {SECRET}-given;"))
        .upstream("given", "consul_upstream web;")
        .upstream("filed", &format!("{} consul_token_file {file};", of(&filed)))
        .upstream("own", &format!("{} consul_token_file own-token;", of(&own)));
    let test = conf.config_test();
    assert!(test.ok && !test.output.contains(SECRET), "{}", test.output);
    let nginx = conf.start();

    let all = [(&given, "given"), (&filed, "filed"), (&own, "own")];
    for (fake, suffix) in all {
        // A good answer, an error, and a query after it.
        fake.know(5, &many(2));
        fake.wait_requests(1);
        fake.answer(Reply::new(500, "ACL trouble"));
        fake.wait_requests(2);
        let requests = fake.requests();
        for request in &requests {
            let token = request.headers.get("x-consul-token").map(String::as_str);
            assert_eq!(token, Some(&*format!("{SECRET}-{suffix}")));
            assert!(!request.target.contains(SECRET), "{}", request.target);
        }
        assert!(requests.iter().any(|request| request.index().is_some()), "{requests:?}");
    }
    nginx.wait_log("ACL trouble", 3, PATIENCE);
    assert!(!nginx.log().contains(SECRET));

    let without = asking(&net, &dir, &none.url())
        .name("without")
        .upstream("web", "consul_upstream web;")
        .start();
    let requests = none.requests();
    assert!(
        !requests.is_empty() && requests.iter().all(|r| !r.headers.contains_key("x-consul-token"))
    );
    drop(without);
}

/// With the rights that the documentation names, and no others.
#[test]
fn a_consul_with_acls_and_a_right_token() {
    let (net, dir) = (Net::isolated(), Dir::new("acl"));
    let acl = r#"acl { enabled = true default_policy = "deny" }"#;
    let consul = Consul::builder(&net, &dir).arg(format!("-hcl={acl}")).spawn().unwrap();
    let ask = |token: &str, path: &str, body: Value| -> Result<Value, String> {
        let mut conn = Conn::open(consul.addr()).map_err(text)?;
        let answer = conn
            .request("PUT", path, &[("X-Consul-Token", token)], body.to_string())
            .map_err(text)?;
        match answer.status {
            200 if answer.body.is_empty() => Ok(Value::Null),
            200 => Ok(answer.json()),
            status => Err(format!("PUT {path}: {status} {}", answer.text())),
        }
    };
    let secret = |of: &Value| of["SecretID"].as_str().expect("a token's secret").to_owned();
    let root = eventually(PATIENCE, "a token that may do everything", || {
        ask("", "/v1/acl/bootstrap", Value::Null)
    });
    let root = secret(&root);
    ask(&root, "/v1/agent/token/default", json!({ "Token": root })).unwrap();
    let rules = r#"service "web" { policy = "read" } node_prefix "" { policy = "read" }"#;
    ask(&root, "/v1/acl/policy", json!({ "Name": "nginx", "Rules": rules })).unwrap();
    let token = json!({ "Policies": [{ "Name": "nginx" }] });
    let token = secret(&ask(&root, "/v1/acl/token", token).unwrap());
    let [one] = web(&net);
    ask(&root, "/v1/agent/service/register", one.service.registration()).unwrap();

    let token_file = dir.write("token", &token);
    let nginx = asking(&net, &dir, &consul.url())
        .upstream(
            "right",
            &format!("consul_upstream web; consul_token_file {};", token_file.display()),
        )
        .upstream("unknown", &format!("consul_upstream web; consul_token {SECRET};"))
        .start();
    let [right, unknown] = nginx.addrs() else { panic!("two servers") };
    serves(*right, &["web-1"]);
    serves_now(*unknown, &["502"]);
    let denied = nginx.wait_log("permission denied (403)", 1, PATIENCE);
    assert!(denied.len() == 1 && denied[0].contains("upstream \"unknown\""), "{denied:?}");
    let log = nginx.log();
    assert!(!log.contains(&token) && !log.contains(SECRET));
    assert!(fs::read_to_string(token_file).unwrap() == token, "the file is only read");
}

// ---- the environment

/// The token would go to the proxy.
#[test]
fn a_proxy_of_the_environment_is_not_used() {
    let stage = Stage::set("proxy");
    let [one] = stage.web();
    stage.register([&one]);
    let proxy = FakeConsul::start(&stage.net);
    proxy.answer(Reply::new(500, "a proxy"));
    let mut conf = stage.nginx();
    for name in ["http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy", "ALL_PROXY"] {
        conf = conf.main(format!("env {name}={};", proxy.url()));
    }
    let nginx = conf.upstream("web", "consul_upstream web;").start();
    serves_now(nginx.addr(), &["web-1"]);
    assert_eq!(proxy.connections(), 0);
}

/// A host name goes to the name servers of the system, or to `/etc/hosts`, and blocks nothing.
#[test]
fn an_agent_may_have_a_host_name() {
    let stage = Stage::set("host_name");
    let [one] = stage.web();
    stage.register([&one]);
    let url = format!("http://localhost:{}", stage.consul.addr().port());
    let nginx = asking(&stage.net, &stage.dir, &url)
        .http("consul_start_timeout 500ms;")
        .upstream("web", "consul_upstream web;")
        .start();
    // The agent is not on 127.0.0.1, so what comes is "refused" and not "not found".
    let lines = nginx.wait_log("service \"web\" at http://localhost:", 1, PATIENCE);
    assert!(lines[0].contains("refused"), "{lines:?}");
}

/// Tests that judge a time: they run alone, at the end.
mod timed {
    use super::*;

    #[test]
    fn absent_at_the_start_and_there_later() {
        let (net, dir) = (Net::isolated(), Dir::new("absent"));
        let consul = Consul::builder(&net, &dir);
        let [one] = web(&net);
        let fixed = Backend::start(&net, 20, "fixed");
        let begin = Instant::now();
        let nginx = asking(&net, &dir, &consul.url())
            .http("consul_start_timeout 300ms;")
            .workers(2)
            .upstream("web", "consul_upstream web;")
            .upstream("fallback", &format!("consul_upstream web; server {};", fixed.addr()))
            .start();
        let [web, fallback] = nginx.addrs() else { panic!("two servers") };
        assert!(begin.elapsed() < Duration::from_millis(300) + SLACK, "{:?}", begin.elapsed());
        serves_now(*web, &["502"]);
        serves_now(*fallback, &["fixed"]);
        for upstream in ["web", "fallback"] {
            nginx.wait_log(&format!("upstream \"{upstream}\": no answer yet"), 1, PATIENCE);
            nginx.wait_log(
                &format!("upstream \"{upstream}\": service \"web\" at http://"),
                1,
                PATIENCE,
            );
        }

        let consul = consul.start();
        consul.register(&one.service);
        serves(*web, &["web-1"]);
        serves(*fallback, &["fixed", "web-1"]);
        nginx.wait_log("answers again, after ", 2, PATIENCE);
        assert_eq!(nginx.log_count("no answer yet"), 2);
    }

    /// A Consul that takes the connection and says nothing holds a start up no longer than one that is
    /// not there.
    #[test]
    fn silent_at_the_start() {
        let (net, dir) = (Net::isolated(), Dir::new("silent"));
        let fake = FakeConsul::start(&net);
        fake.script(|_| None);
        let begin = Instant::now();
        let nginx = asking(&net, &dir, &fake.url())
            .http("consul_start_timeout 300ms; consul_timeout 1s;")
            .workers(2)
            .upstream("web", "consul_upstream web;")
            .start();
        assert!(begin.elapsed() < Duration::from_millis(300) + SLACK, "{:?}", begin.elapsed());
        serves_now(nginx.addr(), &["502"]);
        nginx.wait_log("no answer in time", 1, PATIENCE);
        let [one] = web(&net);
        fake.know(3, &[entry("web-1", one.addr())]);
        serves(nginx.addr(), &["web-1"]);
    }
}
