//! Agents that are away, in another datacenter or too old, and tokens without rights.

mod common;

use std::fs;
use std::time::{Duration, Instant};

use common::{Fake, Reply, about, agents, inner, instance, pool, web};
use consul_watch::agent::{Address, Secret, Token};
use consul_watch::error::{Cause, Retry};
use consul_watch::file::Loaded;
use consul_watch::query::Parameter;
use consul_watch::watch::{Ask, Transport};
use consul_watch::{Agents, Error};
use tokio::time::{sleep, timeout};

const PATIENCE: Duration = Duration::from_secs(20);

const HEALTH: &str = "/v1/health/service/";
const SELF: &str = "/v1/agent/self";
const AUTHORIZE: &str = "/v1/internal/acl/authorize";
const LEADER: &str = "/v1/status/leader";

/// A well agent of a datacenter, whose answers have this index.
async fn agent(datacenter: &'static str, index: u64) -> Fake {
    Fake::start(move |request| {
        if request.is_for(SELF) { about(datacenter, "1.8.7") } else { Reply::health(index, "[]") }
    })
    .await
}

/// An address where nobody listens.
async fn nobody() -> Address {
    let gone = agent("dc1", 1).await;
    let address = gone.address();
    drop(gone);
    // The task that has the listener is gone once it ran.
    eventually(async || tokio::net::TcpStream::connect(addr(&address)).await.is_err()).await;
    address
}

fn addr(address: &Address) -> std::net::SocketAddr {
    address.to_string().trim_start_matches("http://").parse().unwrap()
}

async fn eventually(mut look: impl AsyncFnMut() -> bool) {
    timeout(PATIENCE, async {
        while !look().await {
            sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .expect("in time");
}

#[tokio::test]
async fn the_next_agent_is_asked_and_stayed_with() {
    let (away, one, two) = (nobody().await, agent("dc1", 1).await, agent("dc1", 2).await);
    let (pool, warnings) = pool(10);
    let client = pool.client(&agents([away.clone(), one.address(), two.address()])).unwrap();
    let mut service = client.service(web());

    let error = service.ask(Ask::Consistent).await.unwrap_err();
    assert_eq!(error.cause(), Cause::Transport);
    assert!(error.to_string().starts_with(&away.to_string()), "{error}");
    for _ in 0..3 {
        assert_eq!(service.ask(Ask::Consistent).await.unwrap().index, 1);
    }
    drop(one);
    eventually(async || service.ask(Ask::Consistent).await.is_ok_and(|it| it.index == 2)).await;
    assert!(warnings.lock().unwrap().is_empty());
    // Another watch need not find out by itself that the first two are away.
    eventually(async || client.service(web()).ask(Ask::Consistent).await.is_ok()).await;
}

#[tokio::test]
async fn an_agent_of_another_datacenter_is_not_used() {
    let (one, other, two) = (agent("dc1", 1).await, agent("dc2", 5).await, agent("dc1", 2).await);
    let (pool, _) = pool(10);
    let all = agents([one.address(), other.address(), two.address()]);
    let mut service = pool.client(&all).unwrap().service(web());
    assert_eq!(service.ask(Ask::Consistent).await.unwrap().index, 1);
    drop(one);
    let mut errors = Vec::new();
    let index = timeout(PATIENCE, async {
        loop {
            match service.ask(Ask::Consistent).await {
                Ok(answer) if answer.index == 2 => break answer.index,
                Ok(_) => sleep(Duration::from_millis(5)).await,
                Err(error) => errors.push(inner(error)),
            }
        }
    });
    assert_eq!(index.await.unwrap(), 2);
    let wrong = |error: &Error| matches!(error, Error::Datacenter { is, home } if is == "dc2" && home == "dc1");
    assert!(errors.iter().any(wrong), "{errors:?}");
    assert!(other.requests(HEALTH).is_empty(), "it was never asked");

    // Where the query names a datacenter, it does not matter in which the agent is.
    let query = web().with(Parameter::Datacenter, "dc1").unwrap();
    let mut service = pool.client(&all).unwrap().service(query);
    eventually(async || service.ask(Ask::Consistent).await.is_ok_and(|it| it.index == 5)).await;
}

#[tokio::test]
async fn what_was_known_of_the_first_agent_holds_until_it_is_back() {
    let (away, other) = (nobody().await, agent("dc2", 5).await);
    let (pool, _) = pool(10);
    let client = pool.client(&agents([away.clone(), other.address()])).unwrap();
    client.remember("dc1");
    let mut service = client.service(web());
    let mut errors = Vec::new();
    let wrong = |error: &Error| matches!(error, Error::Datacenter { is, home } if is == "dc2" && home == "dc1");
    while !errors.iter().any(wrong) {
        errors.push(inner(service.ask(Ask::Consistent).await.unwrap_err()));
    }
    assert!(other.requests(HEALTH).is_empty(), "it was never asked");

    // It says itself where it is, whatever was known.
    let _back = Fake::start_at(addr(&away), |request| {
        if request.is_for(SELF) { about("dc3", "1.8.7") } else { Reply::health(7, "[]") }
    })
    .await;
    eventually(async || service.ask(Ask::Consistent).await.is_ok_and(|it| it.index == 7)).await;
    client.remember("dc2");
    eventually(async || service.ask(Ask::Consistent).await.is_ok_and(|it| it.index == 7)).await;

    // Where nothing is known, whoever is reached counts until the first one is back.
    let (away, other) = (nobody().await, agent("dc2", 5).await);
    let mut service = pool.client(&agents([away.clone(), other.address()])).unwrap().service(web());
    eventually(async || service.ask(Ask::Consistent).await.is_ok_and(|it| it.index == 5)).await;
    let _back = Fake::start_at(addr(&away), |request| {
        if request.is_for(SELF) { about("dc1", "1.8.7") } else { Reply::health(8, "[]") }
    })
    .await;
    drop(other);
    eventually(async || service.ask(Ask::Consistent).await.is_ok_and(|it| it.index == 8)).await;
}

#[tokio::test]
async fn an_agent_that_may_not_say_where_it_is_is_used_with_a_warning() {
    let silent = Fake::start(|request| {
        if request.is_for(SELF) { Reply::new(403, "", "") } else { Reply::health(7, "[]") }
    })
    .await;
    let (pool, warnings) = pool(10);
    let all = agents([nobody().await, silent.address()]);
    let mut service = pool.client(&all).unwrap().service(web());
    for _ in 0..5 {
        eventually(async || service.ask(Ask::Consistent).await.is_ok()).await;
    }
    let warnings = warnings.lock().unwrap();
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    assert!(warnings[0].contains("agent_prefix"), "{warnings:?}");
}

#[tokio::test]
async fn what_the_agent_does_not_know_is_never_asked_for() {
    let old = agent("dc1", 1).await;
    let (pool, _) = pool(10);
    let client = pool.client(&agents([old.address()])).unwrap();
    for parameter in [Parameter::Peer, Parameter::Namespace, Parameter::Partition] {
        let query = web().with(parameter, "x").unwrap();
        let error = client.service(query).ask(Ask::Consistent).await.unwrap_err();
        assert!(matches!(error, Error::Unsupported { .. }), "{error}");
        assert_eq!(error.retry(), Retry::Slowly);
        let text = error.to_string();
        assert!(text.contains(parameter.name()) && text.contains("1.8.7"), "{text}");
    }
    assert!(old.requests(HEALTH).is_empty());
    client.service(web()).ask(Ask::Consistent).await.unwrap();

    let new = Fake::start(|request| {
        if request.is_for(SELF) { about("dc1", "1.13.0") } else { Reply::health(1, "[]") }
    })
    .await;
    let query = web().with(Parameter::Peer, "p").unwrap().with(Parameter::Filter, "a == \"b\"");
    let mut service = pool.client(&agents([new.address()])).unwrap().service(query.unwrap());
    service.ask(Ask::Consistent).await.unwrap();
    service.ask(Ask::Blocking { index: 1 }).await.unwrap();
    assert_eq!(new.requests(SELF).len(), 1, "asked once");
    assert_eq!(
        new.requests(HEALTH)[0].line,
        "GET /v1/health/service/web?peer=p&filter=a+%3D%3D+%22b%22&consistent HTTP/1.1"
    );
}

/// A server with ACLs that allows what it is told to.
async fn with_acls(header: &'static str, denied: &'static str) -> Fake {
    Fake::start(move |request| {
        if request.is_for(AUTHORIZE) {
            let allow = request.body.replace("\"Access\"", "\"Allow\":true,\"Access\"");
            let at = allow.find(denied).filter(|_| !denied.is_empty());
            let begin = at.map(|at| allow[..at].rfind('{').unwrap());
            let body = match begin {
                Some(begin) => {
                    let (before, rest) = allow.split_at(begin);
                    format!("{before}{}", rest.replacen("true", "false", 1))
                }
                None => allow,
            };
            return Reply::new(200, "", &body);
        }
        Reply::new(200, &format!("X-Consul-Index: 7\r\n{header}"), "[]")
    })
    .await
}

#[tokio::test]
async fn an_answer_that_acls_hide_a_part_of_is_not_vouched_for() {
    let hidden = "X-Consul-Results-Filtered-By-ACLs: true\r\n";
    for (header, denied, nodes, expected) in [
        ("", "\"web\"", &["n1"][..], Some("service \"web\"")),
        ("", "\"n2\"", &["n1", "n2"], Some("node \"n2\"")),
        ("", "\"any\"", &[], Some("node_prefix \"\"")),
        ("", "", &["n1"], None),
        (hidden, "\"n1\"", &["n1"], Some("node \"n1\"")),
        (hidden, "", &["n1"], Some("for all instances")),
        ("X-Consul-Results-Filtered-By-ACLs: false\r\n", "", &["n1"], None),
    ] {
        let fake = with_acls(header, denied).await;
        let (pool, _) = pool(1);
        let mut service = pool.client(&agents([fake.address()])).unwrap().service(web());
        let answer = service.ask(Ask::Consistent).await.unwrap();
        let result = service.vouch(&answer, nodes).await;
        match expected {
            None => result.unwrap(),
            Some(right) => {
                let error = result.unwrap_err();
                assert_eq!(error.cause(), Cause::Denied, "{error}");
                assert!(error.to_string().contains(right), "{error}");
            }
        }
        assert_eq!(fake.connections().0, 1, "on the connection of the answer");
    }
}

#[tokio::test]
async fn of_many_nodes_every_one_is_asked_for() {
    let nodes: Vec<String> = (0..200).map(|n| format!("n{n:03}")).collect();
    let nodes: Vec<&str> = nodes.iter().map(String::as_str).collect();
    for (denied, requests) in [("\"n199\"", 4), ("\"n000\"", 1), ("", 4)] {
        let fake = with_acls("", denied).await;
        let (pool, _) = pool(1);
        let mut service = pool.client(&agents([fake.address()])).unwrap().service(web());
        let answer = service.ask(Ask::Consistent).await.unwrap();
        let result = service.vouch(&answer, &nodes).await;
        assert_eq!(result.is_ok(), denied.is_empty(), "{result:?}");
        assert_eq!(fake.requests(AUTHORIZE).len(), requests);
        assert_eq!(fake.connections().0, 1, "on the connection of the answer");
    }
}

#[tokio::test]
async fn rights_are_asked_for_where_there_are_any() {
    let off = Fake::start(|request| {
        if request.is_for(AUTHORIZE) {
            Reply::new(401, "", "ACL support disabled")
        } else {
            Reply::health(7, "[]")
        }
    })
    .await;
    let (pool, _) = pool(10);
    let query = web().with(Parameter::Datacenter, "dc2").unwrap();
    let mut service = pool.client(&agents([off.address()])).unwrap().service(query);
    for _ in 0..3 {
        let answer = service.ask(Ask::Consistent).await.unwrap();
        service.vouch(&answer, &["n1"]).await.unwrap();
    }
    let asked = off.requests(AUTHORIZE);
    assert_eq!(asked.len(), 1, "once is enough");
    assert_eq!(asked[0].line, "POST /v1/internal/acl/authorize?dc=dc2 HTTP/1.1");

    // A Consul that does not know the question has no way to tell.
    let old = Fake::start(|request| {
        if request.is_for(AUTHORIZE) { Reply::new(404, "", "") } else { Reply::health(7, "[]") }
    })
    .await;
    let mut service = pool.client(&agents([old.address()])).unwrap().service(web());
    let answer = service.ask(Ask::Consistent).await.unwrap();
    service.vouch(&answer, &[]).await.unwrap();

    // One that cannot say now has not vouched.
    for reply in [Reply::new(500, "", "No cluster leader"), Reply::new(200, "", "[]")] {
        let sick = Fake::start(move |request| {
            if request.is_for(AUTHORIZE) { reply.clone() } else { Reply::health(7, "[]") }
        })
        .await;
        let mut service = pool.client(&agents([sick.address()])).unwrap().service(web());
        let answer = service.ask(Ask::Consistent).await.unwrap();
        service.vouch(&answer, &[]).await.unwrap_err();
    }
}

#[tokio::test]
async fn who_waits_for_an_agent_is_woken_when_it_is_back() {
    let away = nobody().await;
    let (pool, _) = pool(10);
    let mut service = pool.client(&agents([away.clone()])).unwrap().service(web());
    service.ask(Ask::Consistent).await.unwrap_err();
    // The prober finds the same, and then nobody else asks.
    eventually(async || service.ask(Ask::Consistent).await.is_err()).await;

    let back = Fake::start_at(addr(&away), |_| Reply::health(3, "[]")).await;
    let begin = Instant::now();
    timeout(PATIENCE, service.stirred()).await.unwrap();
    assert_eq!(service.ask(Ask::Consistent).await.unwrap().index, 3);
    assert!(begin.elapsed() < PATIENCE);
    assert!(!back.requests(LEADER).is_empty());

    // A query's own error wakes nobody, whatever its agent says.
    let sick = Fake::start(|request| {
        if request.is_for(HEALTH) {
            Reply::new(500, "", "rpc error")
        } else {
            Reply::new(200, "", "\"127.0.0.1:8300\"")
        }
    })
    .await;
    let mut service = pool.client(&agents([sick.address()])).unwrap().service(web());
    service.ask(Ask::Consistent).await.unwrap_err();
    eventually(async || !sick.requests(LEADER).is_empty()).await;
    assert!(timeout(Duration::from_secs(1), service.stirred()).await.is_err());
    assert_eq!(sick.requests(LEADER).len(), 1);
}

#[tokio::test]
async fn an_agent_without_a_leader_is_waited_for() {
    // For a while it names the one that is gone.
    for named in ["\"\"", "\"127.0.0.1:8300\""] {
        let leaderless = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(true));
        let state = leaderless.clone();
        let fake = Fake::start(move |request| {
            let leaderless = state.load(std::sync::atomic::Ordering::Relaxed);
            match (request.is_for(LEADER), leaderless) {
                (true, true) => Reply::new(200, "", named),
                (true, false) => Reply::new(200, "", "\"127.0.0.2:8300\""),
                (false, true) => Reply::new(500, "", "No cluster leader"),
                (false, false) => Reply::health(3, "[]"),
            }
        })
        .await;
        let (pool, _) = pool(10);
        let mut service = pool.client(&agents([fake.address()])).unwrap().service(web());
        service.ask(Ask::Consistent).await.unwrap_err();
        eventually(async || fake.requests(LEADER).len() > 1).await;
        leaderless.store(false, std::sync::atomic::Ordering::Relaxed);
        timeout(PATIENCE, service.stirred()).await.unwrap();
        service.ask(Ask::Consistent).await.unwrap();
    }
}

/// A directory of this test's own.
struct Dir(std::path::PathBuf);

impl Dir {
    fn new(name: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("consul-watch-{name}-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        Self(dir)
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[tokio::test]
async fn a_token_file_that_changes_is_read_again() {
    let dir = Dir::new("token");
    let path = dir.0.join("token");
    fs::write(&path, "first\n").unwrap();
    let fake = Fake::start(|_| Reply::health(1, "[]")).await;
    let (pool, warnings) = pool(10);
    let token = Some(Token::File(Loaded::read(&path).unwrap()));
    let agents = Agents { token, ..agents([fake.address()]) };
    let client = pool.client(&agents).unwrap();
    let mut service = client.service(web());
    let sent = || fake.requests(HEALTH).last().unwrap().headers["x-consul-token"].clone();
    service.ask(Ask::Consistent).await.unwrap();
    assert_eq!(sent(), "first");

    fs::write(&path, "second\n").unwrap();
    timeout(PATIENCE, service.stirred()).await.unwrap();
    service.ask(Ask::Consistent).await.unwrap();
    assert_eq!(sent(), "second");

    // What is no token is said once, and the old one stays.
    fs::write(&path, "two words\n").unwrap();
    eventually(async || !warnings.lock().unwrap().is_empty()).await;
    service.ask(Ask::Consistent).await.unwrap();
    assert_eq!(sent(), "second");
    fs::write(&path, "third\n").unwrap();
    timeout(PATIENCE, service.stirred()).await.unwrap();
    service.ask(Ask::Consistent).await.unwrap();
    assert_eq!(sent(), "third");
    let warnings = warnings.lock().unwrap().clone();
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    assert!(!warnings[0].contains("two words"), "{warnings:?}");
    assert!(warnings[0].contains("the old one stays"), "{warnings:?}");
}

#[tokio::test]
async fn a_fixed_token_is_sent() {
    let fake = Fake::start(|_| Reply::health(1, "[]")).await;
    let (pool, _) = pool(10);
    let token = Some(Token::Fixed(Secret::new(b"b1gs33cr3t").unwrap()));
    let agents = Agents { token, ..agents([fake.address()]) };
    pool.client(&agents).unwrap().service(web()).ask(Ask::Consistent).await.unwrap();
    assert_eq!(fake.requests(HEALTH)[0].headers["x-consul-token"], "b1gs33cr3t");
}

#[tokio::test]
async fn a_unix_socket() {
    let dir = Dir::new("socket");
    let path = dir.0.join("consul.sock");
    let fake = Fake::start_unix(&path, |_| Reply::health(9, "[]")).await;
    let (pool, _) = pool(10);
    let address = Address::parse(&format!("unix:{}", path.display())).unwrap();
    let mut service = pool.client(&agents([address])).unwrap().service(web());
    for _ in 0..3 {
        assert_eq!(service.ask(Ask::Consistent).await.unwrap().index, 9);
    }
    assert_eq!(fake.requests(HEALTH)[0].headers["host"], "localhost");
    assert_eq!(fake.connections().0, 1);
}

/// Watches that take turns, and one after the other ask again at once: there are never more
/// connections than there may be, and none is opened without need.
#[tokio::test]
async fn connections_are_bounded_and_used_again() {
    let list = format!("[{}]", instance("n1", "a"));
    let fake = Fake::start(move |_| Reply::health(1, &list).after(Duration::from_millis(5))).await;
    let (pool, _) = pool(4);
    let client = pool.client(&agents([fake.address()])).unwrap();
    let mut watches = tokio::task::JoinSet::new();
    for _ in 0..40 {
        let mut service = client.service(web());
        watches.spawn(async move {
            for _ in 0..25 {
                let answer = service.ask(Ask::Blocking { index: 1 }).await.unwrap();
                service.vouch(&answer, &[]).await.unwrap_err();
            }
        });
    }
    watches.join_all().await;
    assert_eq!(fake.requests(HEALTH).len(), 1000);
    assert_eq!(fake.connections(), (4, 4));
}

#[tokio::test]
async fn the_same_settings_share_a_client() {
    let fake = agent("dc1", 1).await;
    let (pool, _) = pool(10);
    let settings = agents([fake.address()]);
    for _ in 0..5 {
        let mut service = pool.client(&settings).unwrap().service(web());
        service.ask(Ask::Consistent).await.unwrap();
    }
    assert_eq!(fake.connections().0, 1);
}
