//! Several agents, of one datacenter and of others, sockets, and servers that elect a leader.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use testbed::http::Conn;
use testbed::{Backend, Cluster, Consul, Dir, Load, Net, Nginx, Signal, consul, eventually};

use crate::common::{
    Instance, PATIENCE, Serve, Stage, asking, changes, connections, follower, serves, serves_now,
    steady, text, v4, web,
};
use crate::fake_consul::{FakeConsul, Reply, Request, entry};
use crate::secure::{errors, fails};

/// An upstream that lets go at once of what it believes to be gone: nothing but an error keeps it.
const WEB: &str = "consul_upstream web hold=0;";

/// "Within a second" on a machine that is busy with other tests.
const SOON: Duration = Duration::from_secs(2);

/// The lines that say that an upstream is followed again.
fn recoveries(nginx: &Nginx) -> usize {
    nginx.log_count("answers again, after ")
}

/// The changes that took anybody out.
fn taken_out(nginx: &Nginx) -> Vec<String> {
    changes(nginx, "web").into_iter().filter(|change| change.contains("-127.")).collect()
}

// ---- a socket

#[test]
fn an_agent_is_asked_through_its_socket() {
    let (net, dir) = (Net::isolated(), Dir::new("socket"));
    let mut consul = Consul::builder(&net, &dir).persistent().unix_socket().start();
    let [one, two, three, four] = web(&net);
    consul.register(&one.service);
    let nginx = asking(&net, &dir, &consul.unix_url()).workers(2).upstream("web", WEB).start();
    serves_now(nginx.addr(), &["web-1"]);
    consul.register(&two.service);
    serves(nginx.addr(), &["web-1", "web-2"]);
    assert_eq!(connections(&nginx, follower(&nginx), v4(consul.addr())), 0);
    let load = Load::start(nginx.addr(), &steady());

    // An agent that ends takes its socket along.
    consul.stop();
    assert!(!consul.unix_path().exists());
    eventually(PATIENCE, "an error", || !errors(&nginx, "web").is_empty());
    load.wait_for(300);
    serves_now(nginx.addr(), &["web-1", "web-2"]);
    consul.restart();
    consul.register(&three.service);
    serves(nginx.addr(), &["web-1", "web-2", "web-3"]);
    nginx.wait_log("answers again, after ", 1, PATIENCE);

    // One that is killed leaves it behind, and nobody listens there.
    consul.kill();
    assert!(consul.unix_path().exists());
    load.wait_for(300);
    serves_now(nginx.addr(), &["web-1", "web-2", "web-3"]);
    consul.restart();
    consul.register(&four.service);
    serves(nginx.addr(), &["web-1", "web-2", "web-3", "web-4"]);
    nginx.wait_log("answers again, after ", 2, PATIENCE);

    load.stop().assert_nothing_lost();
    // Each of two causes once: an agent on its way out answers that it knows no leader.
    let errors = errors(&nginx, "web");
    assert!((1..=2).contains(&errors.len()), "{errors:?}");
    assert!(errors.iter().all(|line| line.contains(&consul.unix_url())), "{errors:?}");
    assert_eq!(taken_out(&nginx), Vec::<String>::new());
}

#[test]
fn a_socket_that_is_not_there_at_the_start() {
    let (net, dir) = (Net::isolated(), Dir::new("no_socket"));
    let path = dir.join("consul-dc1-n1.sock");
    let nginx = asking(&net, &dir, &format!("unix:{}", path.display()))
        .http("consul_start_timeout 300ms;")
        .upstream("web", WEB)
        .start();
    serves_now(nginx.addr(), &["502"]);
    fails(&nginx, "web", "No such file or directory");
    let [one] = web(&net);
    let consul = Consul::builder(&net, &dir).unix_socket().start();
    assert_eq!(consul.unix_path(), path);
    consul.register(&one.service);
    serves(nginx.addr(), &["web-1"]);
}

// ---- two agents

/// A server, and agents of its datacenter that pass on what they are asked.
struct Datacenter {
    net: Net,
    dir: Dir,
    server: Consul,
    join: SocketAddr,
    change: fn(consul::Builder) -> consul::Builder,
}

impl Datacenter {
    fn set(name: &str, change: fn(consul::Builder) -> consul::Builder) -> Datacenter {
        let (net, dir) = (Net::isolated(), Dir::new(name));
        let server = change(Consul::builder(&net, &dir));
        let join = server.serf_lan();
        Datacenter { server: server.start(), net, dir, join, change }
    }

    /// An agent that is no server, not started yet: `agent-1` and so on.
    fn agent(&self, n: u8) -> consul::Builder {
        let name = format!("agent-{n}");
        let data = self.dir.join(format!("{name}-data"));
        (self.change)(Consul::builder(&self.net, &self.dir))
            .host(&self.net, 10 + n)
            .node(&name)
            .arg("-server=false")
            .arg("-disable-host-node-id")
            .arg(format!("-data-dir={}", data.display()))
            .arg(format!("-retry-join={}", self.join))
            .arg("-retry-interval=100ms")
    }

    fn web<const N: usize>(&self) -> [Instance; N] {
        web(&self.net)
    }
}

#[test]
fn where_the_first_agent_is_away_at_the_start_the_second_one_is_asked() {
    let dc = Datacenter::set("first_away", |agent| agent);
    let (first, second) = (dc.agent(1), dc.agent(2));
    let [one, two, three] = dc.web();
    dc.server.register(&one.service);
    let mut second = second.start();
    let urls = format!("{} {}", first.url(), second.url());
    let nginx = asking(&dc.net, &dc.dir, &urls)
        .http("consul_start_timeout 20s;")
        .workers(2)
        .upstream("web", WEB)
        .start();
    serves_now(nginx.addr(), &["web-1"]);
    fails(&nginx, "web", &format!("{}: Connection refused", first.url()));
    nginx.wait_log("answers again, after ", 1, PATIENCE);
    let load = Load::start(nginx.addr(), &steady());
    dc.server.register(&two.service);
    serves(nginx.addr(), &["web-1", "web-2"]);

    let _first = first.start();
    second.kill();
    dc.server.register(&three.service);
    serves(nginx.addr(), &["web-1", "web-2", "web-3"]);
    load.stop().assert_nothing_lost();
    assert_eq!(errors(&nginx, "web").len(), 1);
    assert_eq!(taken_out(&nginx), Vec::<String>::new());
}

#[test]
fn a_first_agent_that_says_nothing_at_the_start_is_passed_over() {
    let dc = Datacenter::set("first_silent", |agent| agent);
    let (mut first, second) = (dc.agent(1).start(), dc.agent(2).start());
    let [one] = dc.web();
    dc.server.register(&one.service);
    first.pause();
    let nginx = asking(&dc.net, &dc.dir, &format!("{} {}", first.url(), second.url()))
        .http("consul_timeout 1s; consul_start_timeout 20s;")
        .upstream("web", WEB)
        .start();
    serves_now(nginx.addr(), &["web-1"]);
    fails(&nginx, "web", &format!("{}: no answer in time", first.url()));
    first.resume();
}

#[test]
fn two_agents_take_over_from_each_other_while_requests_flow() {
    let dc = Datacenter::set("two_agents", |agent| agent);
    let (mut first, mut second) = (dc.agent(1).start(), dc.agent(2).start());
    let [one, two, three, four] = dc.web();
    dc.server.register(&one.service);
    let nginx = asking(&dc.net, &dc.dir, &format!("{} {}", first.url(), second.url()))
        .workers(2)
        .upstream("web", WEB)
        .start();
    serves_now(nginx.addr(), &["web-1"]);
    let asks = |agent: &Consul| connections(&nginx, follower(&nginx), v4(agent.addr())) > 0;
    eventually(PATIENCE, "the first one is asked", || asks(&first) && !asks(&second));
    let load = Load::start(nginx.addr(), &steady());
    // From the death of an agent to a change that the other one told of.
    let followed = |instance: &Instance, expected: &[&str]| {
        let begin = Instant::now();
        dc.server.register(&instance.service);
        serves(nginx.addr(), expected);
        let took = begin.elapsed();
        eprintln!("the other one has taken over and told of a change after {took:?}");
        assert!(took < SOON, "{took:?}");
    };

    first.kill();
    followed(&two, &["web-1", "web-2"]);
    assert!(asks(&second));
    fails(&nginx, "web", &format!("{}: ", first.url()));
    nginx.wait_log("answers again, after ", 1, PATIENCE);

    first.restart();
    second.kill();
    followed(&three, &["web-1", "web-2", "web-3"]);
    assert!(asks(&first));
    nginx.wait_log("answers again, after ", 2, PATIENCE);

    // Both, for a while.
    first.kill();
    load.wait_for(300);
    second.restart();
    followed(&four, &["web-1", "web-2", "web-3", "web-4"]);

    load.stop().assert_nothing_lost();
    nginx.wait_log("answers again, after ", 3, PATIENCE);
    assert_eq!(recoveries(&nginx), 3);
    // The same cause is not told again within a minute.
    assert_eq!(errors(&nginx, "web").len(), 1);
    assert_eq!(taken_out(&nginx), Vec::<String>::new());
}

/// A query that waits ends in silence: its own end has to be waited for.
#[test]
fn an_agent_that_hangs_while_it_is_asked_is_left_for_the_next_one() {
    let dc = Datacenter::set("hangs", |agent| agent);
    let (mut first, second) = (dc.agent(1).start(), dc.agent(2).start());
    let [one, two] = dc.web();
    dc.server.register(&one.service);
    let nginx = asking(&dc.net, &dc.dir, &format!("{} {}", first.url(), second.url()))
        .http("consul_wait 1s;")
        .upstream("web", WEB)
        .start();
    serves_now(nginx.addr(), &["web-1"]);
    let load = Load::start(nginx.addr(), &steady());
    first.pause();
    let begin = Instant::now();
    dc.server.register(&two.service);
    serves(nginx.addr(), &["web-1", "web-2"]);
    // As it is documented: a sixteenth more than the wait, and 12 seconds.
    let took = begin.elapsed();
    eprintln!("left after {took:?}");
    assert!(took < Duration::from_millis(13_100) + SOON, "{took:?}");
    fails(&nginx, "web", &format!("{}: no answer in time", first.url()));
    load.stop().assert_nothing_lost();
    first.resume();
}

// ---- datacenters

#[test]
fn an_agent_of_another_datacenter_is_never_used() {
    let (net, dir) = (Net::isolated(), Dir::new("other_datacenter"));
    let mut near = Consul::builder(&net, &dir).persistent().start();
    let far = Consul::builder(&net, &dir).host(&net, 11).datacenter("dc2").start();
    let [one, two] = web(&net);
    let there = Instance::start(&net, "web", "there");
    near.register(&one.service);
    far.register(&there.service);
    let nginx = asking(&net, &dir, &format!("{} {}", near.url(), far.url()))
        .workers(2)
        .upstream("web", WEB)
        .start();
    serves_now(nginx.addr(), &["web-1"]);
    let load = Load::start(nginx.addr(), &steady());

    near.kill();
    let says = format!(
        "{}: the agent is in datacenter \"dc2\" and the one before it in \"dc1\", it is not used",
        far.url()
    );
    nginx.wait_log(&says, 1, PATIENCE);
    load.wait_for(1000);
    near.restart();
    near.register(&two.service);
    serves(nginx.addr(), &["web-1", "web-2"]);
    let report = load.stop();
    report.assert_nothing_lost();
    assert!(!report.backends.contains_key("there"), "{report}");
    assert_eq!(nginx.log_count(&says), 1);
    // That one, and that the first one is away.
    assert_eq!(errors(&nginx, "web").len(), 2);
    assert!(!changes(&nginx, "web").iter().any(|change| change.contains("(there)")));
}

/// What is stored says in which datacenter the first one is, though nobody of the new processes has
/// reached it.
#[test]
fn new_workers_while_the_first_agent_is_away_do_not_turn_to_another_datacenter() {
    let (net, dir) = (Net::isolated(), Dir::new("reload_datacenter"));
    let mut near = Consul::builder(&net, &dir).persistent().start();
    let far = Consul::builder(&net, &dir).host(&net, 11).datacenter("dc2").start();
    let [one, two] = web(&net);
    let there = Instance::start(&net, "web", "there");
    near.register(&one.service);
    far.register(&there.service);
    let mut nginx = asking(&net, &dir, &format!("{} {}", near.url(), far.url()))
        .workers(2)
        .upstream("web", WEB)
        .start();
    serves_now(nginx.addr(), &["web-1"]);
    near.kill();
    nginx.wait_log("is in datacenter", 1, PATIENCE);
    let load = Load::start(nginx.addr(), &steady());
    nginx.reload();
    nginx.wait_log("is in datacenter", 2, PATIENCE);
    load.wait_for(300);
    let report = load.stop();
    report.assert_nothing_lost();
    assert!(!report.backends.contains_key("there"), "{report}");

    // One that takes the place of a worker that died has its servers from there.
    nginx.allow_log("exited on signal 9");
    nginx.signal_child(follower(&nginx), Signal::KILL);
    nginx.wait_log("is in datacenter", 3, PATIENCE);
    let report = Load::run(nginx.addr(), 300, &steady());
    assert!(!report.backends.contains_key("there"), "{report}");
    assert!(!changes(&nginx, "web").iter().any(|change| change.contains("(there)")));

    near.restart();
    near.register(&two.service);
    serves(nginx.addr(), &["web-1", "web-2"]);
}

/// The datacenter is in the query: whoever is asked, the answer is the same.
#[test]
fn agents_of_two_datacenters_may_both_be_asked_about_one() {
    let (net, dir) = (Net::isolated(), Dir::new("same_datacenter"));
    let mut near = Consul::builder(&net, &dir).wan().start();
    let far = Consul::builder(&net, &dir).host(&net, 11).datacenter("dc2").wan().start();
    near.join_wan(&far);
    let here = Instance::start(&net, "web", "here");
    let [one, two] = web(&net);
    near.register(&here.service);
    far.register(&one.service);
    let nginx = asking(&net, &dir, &format!("{} {}", near.url(), far.url()))
        .upstream("web", "consul_upstream web dc=dc2 hold=0;")
        .start();
    serves_now(nginx.addr(), &["web-1"]);
    let load = Load::start(nginx.addr(), &steady());
    near.kill();
    far.register(&two.service);
    serves(nginx.addr(), &["web-1", "web-2"]);
    load.stop().assert_nothing_lost();
    assert_eq!(nginx.log_count("is in datacenter"), 0);
}

#[test]
fn where_the_token_hides_the_datacenter_the_next_agent_is_used_with_a_warning() {
    let dc = Datacenter::set("hidden_datacenter", consul::Builder::acl);
    let (mut first, second) = (dc.agent(1).start(), dc.agent(2).start());
    let [one, two] = dc.web();
    dc.server.register(&one.service);
    let rules = r#"service "web" { policy = "read" } node_prefix "" { policy = "read" }"#;
    let agents = r#"agent_prefix "" { policy = "read" }"#;
    let (less, more) = (dc.server.token(rules), dc.server.token(&format!("{rules} {agents}")));
    let start = |name: &str, token: &consul::Token| {
        asking(&dc.net, &dc.dir, &format!("{} {}", first.url(), second.url()))
            .name(name)
            .http(format!("consul_token {};", token.secret))
            .upstream("web", WEB)
            .start()
    };
    let (less, more) = (start("less", &less), start("more", &more));
    for nginx in [&less, &more] {
        serves_now(nginx.addr(), &["web-1"]);
        assert_eq!(nginx.log_count("[warn]"), 0);
    }
    first.kill();
    dc.server.register(&two.service);
    for nginx in [&less, &more] {
        serves(nginx.addr(), &["web-1", "web-2"]);
    }
    let warnings = less.wait_log("may be in another datacenter than", 1, PATIENCE);
    let names = [second.url(), first.url(), agents.to_owned()];
    assert!(names.iter().all(|name| warnings[0].contains(name)), "{warnings:?}");
    assert!(warnings.len() == 1 && less.log_count("[warn]") == 1, "{warnings:?}");
    assert_eq!(more.log_count("[warn]"), 0);
}

// ---- three servers

/// From the first good answer of Consul's leader that somebody else sees to the line which says
/// that nginx has had one.
fn recovery(nginx: &Nginx, asked: SocketAddr) -> Duration {
    const OUTAGE: Duration = Duration::from_secs(60);
    let before = recoveries(nginx);
    thread::scope(|scope| {
        let look = move || {
            let mut conn = Conn::open(asked).map_err(text)?;
            // One that the agent holds back until it knows better would be late.
            conn.set_timeout(Duration::from_millis(200));
            let answer = conn.get("/v1/health/service/web?consistent").map_err(text)?;
            if answer.status == 200 { Ok(Instant::now()) } else { Err(answer.text()) }
        };
        let first = scope.spawn(move || eventually(OUTAGE, "a good answer of Consul", look));
        nginx.wait_log("answers again, after ", before + 1, OUTAGE);
        let told = Instant::now();
        told.saturating_duration_since(first.join().expect("Consul answers"))
    })
}

/// Three servers, an nginx with an instance to serve that asks some of them, and load.
struct Servers {
    cluster: Cluster,
    leader: usize,
    /// A follower: the next one after the leader.
    follower: usize,
    two: Instance,
    _one: Instance,
    nginx: Nginx,
    load: Load,
}

impl Servers {
    /// `asked`: how far behind the leader.
    fn set(name: &str, asked: &[usize], settings: &str) -> Servers {
        let (net, dir) = (Net::isolated(), Dir::new(name));
        let cluster = Cluster::start(&net, &dir);
        let leader = cluster.leader();
        let nth = |n: usize| (leader + n) % cluster.servers().len();
        let follower = nth(1);
        let urls: Vec<String> = asked.iter().map(|&n| cluster[nth(n)].url()).collect();
        let [one, two] = web(&net);
        cluster[follower].register(&one.service);
        let nginx = asking(&net, &dir, &urls.join(" "))
            .http(settings)
            .workers(2)
            .upstream("web", WEB)
            .start();
        serves_now(nginx.addr(), &["web-1"]);
        let load = Load::start(nginx.addr(), &steady());
        Servers { cluster, leader, follower, two, _one: one, nginx, load }
    }

    /// The old leader is gone, or hangs.
    #[track_caller]
    fn recovers(&self) {
        let begin = Instant::now();
        let took = recovery(&self.nginx, self.cluster[self.follower].addr());
        eprintln!("an outage of {:?}, a recovery of {took:?}", begin.elapsed());
        assert!(took < SOON, "{took:?}");
    }

    /// Whatever happened, what is told to the next leader arrives, and nothing was lost.
    #[track_caller]
    fn goes_on(self) {
        let Servers { cluster, follower, two, nginx, load, .. } = &self;
        assert_ne!(cluster.leader(), self.leader);
        cluster[*follower].register(&two.service);
        let begin = Instant::now();
        serves(nginx.addr(), &["web-1", "web-2"]);
        assert!(begin.elapsed() < SOON, "{:?}", begin.elapsed());
        assert_eq!(taken_out(nginx), Vec::<String>::new());
        load.report().assert_nothing_lost();
        self.load.stop().assert_nothing_lost();
    }
}

#[test]
fn a_follower_is_asked_and_the_leader_is_killed() {
    let mut servers = Servers::set("leader_killed", &[1], "");
    servers.cluster[servers.leader].kill();
    servers.recovers();
    // The agent knows nobody to ask, and perhaps holds a question back until it does.
    let errors = errors(&servers.nginx, "web");
    assert!((1..=2).contains(&errors.len()), "{errors:?}");
    assert_eq!(recoveries(&servers.nginx), 1);
    servers.goes_on();
}

#[test]
fn all_servers_are_asked_and_the_leader_is_killed() {
    let mut servers = Servers::set("servers_killed", &[0, 1, 2], "");
    servers.cluster[servers.leader].kill();
    servers.recovers();
    // That one broke, and those that know nobody to ask.
    let errors = errors(&servers.nginx, "web");
    assert!((1..=2).contains(&errors.len()), "{errors:?}");
    assert_eq!(recoveries(&servers.nginx), 1);
    servers.goes_on();
}

/// The agent passes the query on to a leader that is there and says nothing: its own end has to be
/// waited for, which is documented to be a sixteenth more than the wait, and 12 seconds.
#[test]
fn a_follower_is_asked_and_the_leader_hangs() {
    let mut servers = Servers::set("leader_hangs", &[1], "consul_wait 1s;");
    let begin = Instant::now();
    servers.cluster[servers.leader].pause();
    servers.nginx.wait_log("answers again, after ", 1, PATIENCE);
    let took = begin.elapsed();
    eprintln!("an outage of {took:?}");
    assert!(took < Duration::from_millis(13_100) + SOON, "{took:?}");
    assert_eq!(errors(&servers.nginx, "web").len(), 1);
    servers.goes_on();
}

/// Then the agent answers by itself, and nobody notices.
#[test]
fn a_follower_is_asked_for_stale_answers_and_the_leader_is_gone() {
    for (name, hang) in [("stale_killed", false), ("stale_hangs", true)] {
        let mut servers = Servers::set(name, &[1], "consul_consistency stale; consul_wait 1s;");
        let leader = servers.leader;
        let agent = &servers.cluster[servers.follower];
        // It hears of what the leader knows a moment later, and never from one that is gone.
        eventually(PATIENCE, "the follower knows what the leader knows", || {
            let [stale, known] = ["stale", "consistent"].map(|mode| {
                let path = format!("/v1/health/service/web?{mode}");
                agent.raw("GET", &path, "").unwrap().header("x-consul-index").to_owned()
            });
            if stale == known { Ok(()) } else { Err(format!("{stale} of {known}")) }
        });
        if hang {
            servers.cluster[leader].pause();
        } else {
            servers.cluster[leader].kill();
        }
        servers.load.wait_for(1500);
        assert_eq!(servers.nginx.log_count("[error]"), 0);
        servers.goes_on();
    }
}

#[test]
fn consul_is_away_for_half_a_minute() {
    let mut stage = Stage::with("half_a_minute", |consul| consul.persistent());
    let [one, two, three] = stage.web();
    stage.register([&one, &two]);
    let nginx = stage.nginx().workers(2).upstream("web", WEB).start();
    serves_now(nginx.addr(), &["web-1", "web-2"]);
    let load = Load::start(nginx.addr(), &steady());
    stage.consul.kill();
    let away = Instant::now();
    fails(&nginx, "web", &stage.consul.url());
    eventually(2 * PATIENCE, "half a minute", || away.elapsed() > Duration::from_secs(30));
    serves_now(nginx.addr(), &["web-1", "web-2"]);

    stage.consul.respawn();
    let took = recovery(&nginx, stage.consul.addr());
    eprintln!("half a minute away, a recovery of {took:?}");
    assert!(took < SOON, "{took:?}");
    stage.consul.wait_ready().unwrap();
    stage.register([&three]);
    serves(nginx.addr(), &["web-1", "web-2", "web-3"]);
    load.stop().assert_nothing_lost();
    assert_eq!((errors(&nginx, "web").len(), recoveries(&nginx)), (1, 1));
    assert_eq!(taken_out(&nginx), Vec::<String>::new());
}

// ---- what is asked

#[test]
fn the_consistency_is_that_of_the_queries_that_wait() {
    for (mode, expected) in [("default", ""), ("stale", "stale"), ("consistent", "consistent")] {
        let (net, dir) = (Net::isolated(), Dir::new("consistency"));
        let fake = FakeConsul::start(&net);
        let [one, two] = web(&net);
        let both = [entry("web-1", one.addr()), entry("web-2", two.addr())];
        fake.know(5, &both[..1]);
        let nginx = asking(&net, &dir, &fake.url())
            .http(format!("consul_consistency {mode};"))
            .upstream("web", WEB)
            .start();
        serves_now(nginx.addr(), &["web-1"]);
        fake.know(6, &both);
        serves(nginx.addr(), &["web-1", "web-2"]);
        // And after an error.
        fake.answer(Reply::new(500, ""));
        fails(&nginx, "web", "status 500");
        fake.know(7, &both[1..]);
        serves(nginx.addr(), &["web-2"]);
        eventually(PATIENCE, "a query that waits after the error", || {
            fake.requests().last().is_some_and(|request| request.index() == Some(7))
        });

        let requests = fake.requests();
        let (waiting, others): (Vec<_>, Vec<_>) =
            requests.iter().partition(|request| request.index().is_some());
        assert!(waiting.len() >= 3 && others.len() >= 2, "{requests:?}");
        let modes = |request: &Request| -> String {
            let (_, query) = request.target.split_once('?').unwrap();
            query.split('&').filter(|part| ["stale", "consistent"].contains(part)).collect()
        };
        assert!(waiting.iter().all(|request| modes(request) == expected), "{mode}: {waiting:?}");
        assert!(others.iter().all(|request| modes(request) == "consistent"), "{others:?}");
    }
}

#[test]
fn what_an_agent_does_not_know_is_an_error_and_never_an_answer() {
    let stage = Stage::set("unknown_parameters");
    let about = stage.consul.get("/v1/agent/self");
    let version = about["Config"]["Version"].as_str().unwrap().to_owned();
    let numbers: Vec<u32> = version.split(['.', '+', '-']).flat_map(str::parse).collect();
    let enterprise = version.contains("ent") || about.to_string().contains("+ent");
    let parameters: &[(&str, &str)] = match (&numbers[..], enterprise) {
        ([1, ..=12, ..], false) => &[
            ("ns", "Consul Enterprise"),
            ("partition", "Consul Enterprise"),
            ("peer", "Consul 1.13"),
        ],
        (_, false) => &[("ns", "Consul Enterprise"), ("partition", "Consul Enterprise")],
        (_, true) => return eprintln!("SKIPPED: Consul {version} knows these parameters"),
    };
    let [one, two] = stage.web();
    let fixed = Backend::start(&stage.net, 20, "fixed");
    stage.register([&one]);
    let mut conf = stage.nginx().http("consul_start_timeout 300ms;").upstream("web", WEB);
    for (parameter, _) in parameters {
        let line = format!("consul_upstream web {parameter}=default hold=0;");
        conf = conf
            .upstream(parameter, &line)
            .upstream(&format!("{parameter}-fixed"), &format!("{line} server {};", fixed.addr()))
            .upstream(&format!("{parameter}-both"), &format!("{line} consul_upstream web;"));
    }
    let nginx = conf.start();
    let (web, others) = nginx.addrs().split_first().unwrap();
    serves(*web, &["web-1"]);
    for (n, (parameter, needed)) in parameters.iter().enumerate() {
        let says = format!("\"{parameter}\" needs {needed}, and the agent is {version}");
        for upstream in
            [parameter.to_string(), format!("{parameter}-fixed"), format!("{parameter}-both")]
        {
            fails(&nginx, &upstream, &says);
        }
        let [alone, beside, both] = others[3 * n..][..3] else { panic!("three servers") };
        serves_now(alone, &["502"]);
        serves_now(beside, &["fixed"]);
        serves(both, &["web-1"]);
    }
    stage.register([&two]);
    serves(*web, &["web-1", "web-2"]);
    for (n, (parameter, _)) in parameters.iter().enumerate() {
        serves_now(others[3 * n], &["502"]);
        assert_eq!(errors(&nginx, parameter).len(), 1);
    }
}

// ---- connections

#[test]
fn many_services_take_turns_on_few_connections() {
    const SERVICES: usize = 10;
    /// What the documentation says of a round.
    const ROUND: Duration = Duration::from_secs(15);
    let stage = Stage::set("max_connections");
    let names: Vec<String> = (0..SERVICES).map(|n| format!("service-{n}")).collect();
    let start =
        |name: &String, id: &str| Instance::start(&stage.net, name, &format!("{name}-{id}"));
    let ones: Vec<Instance> = names.iter().map(|name| start(name, "a")).collect();
    let twos: Vec<Instance> = names.iter().map(|name| start(name, "b")).collect();
    stage.register(&ones);
    let mut conf = stage.nginx().http("consul_max_connections 2; consul_start_timeout 20s;");
    for name in &names {
        conf = conf.upstream(name, &format!("consul_upstream {name} hold=0;"));
    }
    let nginx = conf.start();
    let serves_of = |n: usize, ids: &[&str]| {
        let expected: Vec<String> = ids.iter().map(|id| format!("{}-{id}", names[n])).collect();
        let expected: Vec<&str> = expected.iter().map(String::as_str).collect();
        serves(nginx.addrs()[n], &expected);
    };
    for (n, name) in names.iter().enumerate().take(SERVICES) {
        let name = format!("{name}-a");
        serves_now(nginx.addrs()[n], &[&name]);
    }

    let (worker, consul) = (follower(&nginx), v4(stage.consul.addr()));
    let done = AtomicBool::new(false);
    let seen = thread::scope(|scope| {
        let count = scope.spawn(|| {
            let mut seen = BTreeSet::new();
            while !done.load(Ordering::Relaxed) {
                seen.insert(connections(&nginx, worker, consul));
                thread::sleep(Duration::from_millis(1));
            }
            seen
        });
        // All at once: every query is answered as soon as it is asked.
        let begin = Instant::now();
        stage.register(&twos);
        (0..SERVICES).for_each(|n| serves_of(n, &["a", "b"]));
        eprintln!("{SERVICES} additions within {:?}", begin.elapsed());
        assert!(begin.elapsed() < ROUND, "{:?}", begin.elapsed());

        // Few, among others that make them wait.
        let begin = Instant::now();
        for one in &ones[..3] {
            stage.consul.deregister(&one.service.id);
        }
        (0..3).for_each(|n| serves_of(n, &["b"]));
        eprintln!("3 removals within {:?}", begin.elapsed());
        assert!(begin.elapsed() < ROUND, "{:?}", begin.elapsed());
        (3..SERVICES).for_each(|n| serves_of(n, &["a", "b"]));
        done.store(true, Ordering::Relaxed);
        count.join().expect("who counts the connections")
    });
    eprintln!("connections at a time: {seen:?}");
    assert!(seen.contains(&2) && seen.iter().all(|count| *count <= 2), "{seen:?}");
    assert_eq!(nginx.log_count("[error]"), 0);
}
