//! TCP and UDP: what is nginx's stream alone, and what the http tests ask by means that a stream does not
//! have. The methods run from the same table as http's, in `balancers`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use testbed::http;
use testbed::nginx::Builder;
use testbed::{
    Authority, Backend, Datagrams, Dir, Greeted, Greeter, Load, Net, Nginx, Options, Protocol,
    Service, Signal, eventually,
};

use crate::balancers::STREAM_METHODS;
use crate::churn::Replaced;
use crate::common::{
    Instance, PATIENCE, Serve, Stage, asking_of, changes, connections, followers, full, met_anew,
    scaled, serves, serves_anew, serves_anew_now, serves_now, v4, web,
};
use crate::crash::{STEPS, at_most, entries};
use crate::fake_consul::{FakeConsul, entry};

const STREAM: Protocol = Protocol::Stream;
const NO_RETRY: &str = "proxy_next_upstream off;";

/// Some requests a second, each on a connection of its own.
fn opening() -> Options {
    Options::default().keepalive(false).pause(Duration::from_millis(10))
}

fn fake(name: &str) -> (Net, Dir, FakeConsul) {
    let (net, dir) = (Net::isolated(), Dir::new(name));
    let fake = FakeConsul::start(&net);
    (net, dir, fake)
}

/// All of these servers but one, which is another one for each number.
fn all_but_one(servers: &[SocketAddr], n: usize) -> Vec<Value> {
    let out = n % servers.len();
    let all = servers.iter().enumerate().filter(|(i, _)| *i != out);
    all.map(|(i, addr)| entry(&format!("web-{i}"), *addr)).collect()
}

/// Changes the set of these servers again and again while `work` goes on. Returns how often.
fn churn_while<T: Send>(
    fake: &FakeConsul,
    servers: &[SocketAddr],
    pace: Duration,
    work: impl FnOnce(&AtomicUsize) -> T + Send,
) -> (usize, T) {
    let (done, changes) = (AtomicBool::new(false), AtomicUsize::new(0));
    thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                let n = changes.fetch_add(1, Ordering::Relaxed);
                fake.know(1000 + n as u64, &all_but_one(servers, n));
                thread::sleep(pace);
            }
        });
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| work(&changes)));
        done.store(true, Ordering::Relaxed);
        let result = result.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        (changes.load(Ordering::Relaxed), result)
    })
}

#[test]
fn serves_what_consul_says() {
    let stage = Stage::set("stream_serves");
    let [one, two, three] = stage.web();
    let three = three.with(|service| service.tag("other"));
    let nginx = stage
        .nginx_of(STREAM)
        .workers(2)
        .upstream_of(STREAM, "web", "consul_upstream web hold=0;")
        .upstream_of(STREAM, "other", "least_conn; consul_upstream web tag=other hold=0;")
        .start();
    let [web, other] = nginx.addrs() else { panic!("two servers") };
    serves_anew_now(*web, &["nobody"]);
    stage.register([&one, &two, &three]);
    serves_anew(*web, &["web-1", "web-2", "web-3"]);
    serves_anew(*other, &["web-3"]);
    stage.consul.maintenance("web-1", true, "a test");
    serves_anew(*web, &["web-2", "web-3"]);
    stage.consul.maintenance("web-1", false, "");
    stage.consul.deregister("web-3");
    serves_anew(*web, &["web-1", "web-2"]);
    serves_anew(*other, &["nobody"]);
    let changes = changes(&nginx, "web");
    assert!(changes.iter().any(|line| line.contains(&format!("-{} (web-3)", three.addr()))));
    assert_eq!(followers(&nginx).len(), 1, "one thread for all its upstreams");
}

/// What makes an error in http makes the same one here.
#[test]
fn errors_are_those_of_http() {
    let stage = Stage::set("stream_errors");
    let in_upstream = [
        "consul_upstream web;",
        "zone web 256k; consul_upstream web; consul_upstream web;",
        "zone web 256k; consul_upstream web colour=red;",
        "zone web 256k; hash $remote_addr; consul_upstream web backup;",
        "zone web 256k; consul_upstream web; server localhost:80 resolve;",
        "zone web 256k; consul_upstream web; consul_wait 1h;",
        "zone web 256k; consul_upstream web; consul_address ftp://a;",
        "zone web 256k; consul_upstream web; consul_max_connections 3;",
    ];
    let said = |of: Protocol, line: &str| {
        let conf = Nginx::builder(&stage.net, &stage.dir);
        let conf = conf.block(of, "resolver 127.0.0.1;");
        let test = conf.block(of, format!("upstream web {{ {line} }}")).config_test();
        assert!(!test.ok, "{of:?} takes {line:?}");
        let error = test.output.lines().find(|it| it.contains("[emerg]")).unwrap_or_default();
        // Behind the place of the line, which is another one.
        error.split(" in /").next().unwrap_or_default().to_owned()
    };
    for line in in_upstream {
        assert_eq!(said(Protocol::Http, line), said(STREAM, line), "{line:?}");
    }
    let drop = "zone web 256k; consul_upstream web; consul_session_drop perhaps;";
    assert!(said(STREAM, drop).contains("invalid value \"perhaps\""));
    assert!(said(Protocol::Http, drop).contains("unknown directive \"consul_session_drop\""));
}

/// Two instances that keep their sessions.
fn two_greeters(name: &str) -> (Stage, [Greeter; 2]) {
    let stage = Stage::set(name);
    let greeters = [20, 21].map(|host| Greeter::start(&stage.net, host, &format!("g{host}")));
    for (n, greeter) in greeters.iter().enumerate() {
        stage.consul.register(&Service::new("web", &format!("web-{n}"), greeter.addr()));
    }
    (stage, greeters)
}

#[test]
fn max_conns_bounds_the_sessions_of_an_instance() {
    let (stage, greeters) = two_greeters("stream_max_conns");
    let nginx = stage
        .nginx_of(STREAM)
        .workers(2)
        .upstream_of(STREAM, "web", "consul_upstream web max_conns=2;")
        .start();
    nginx.wait_log("2 of 2 instances serve", 1, PATIENCE);
    let open: Vec<Greeted> =
        (0..4).map(|_| Greeted::open(nginx.addr()).expect("there is room")).collect();
    assert_eq!(greeters.each_ref().map(Greeter::open), [2, 2]);
    assert!(Greeted::open(nginx.addr()).is_err(), "all are busy");
    drop(open);
    eventually(PATIENCE, "there is room again", || Greeted::open(nginx.addr()).is_ok());
}

/// How often nginx was refused by an address.
fn refusals(nginx: &Nginx, addr: SocketAddr) -> usize {
    let upstream = format!("upstream: \"{addr}\"");
    let log = nginx.log();
    log.lines().filter(|it| it.contains("Connection refused") && it.contains(&upstream)).count()
}

#[test]
fn an_instance_that_fails_is_left_alone() {
    let stage = Stage::set("stream_max_fails");
    let [good] = stage.web();
    let nobody: SocketAddr = (stage.net.ip(40), stage.net.port()).into();
    stage.register([&good]);
    stage.consul.register(&Service::new("web", "web-2", nobody));
    let line = "consul_upstream web max_fails=2 fail_timeout=1h;";
    let nginx = stage.nginx_of(STREAM).upstream_of(STREAM, "web", line).start();
    nginx.wait_log("2 of 2 instances serve", 1, PATIENCE);
    serves_anew_now(nginx.addr(), &["web-1"]);
    assert_eq!(refusals(&nginx, nobody), 2);
    // It is known to be bad still after a change.
    stage.consul.register(&Service::new("web", "web-3", good.addr()).port(1));
    nginx.wait_log("3 of 3 instances serve", 1, PATIENCE);
    serves_anew_now(nginx.addr(), &["web-1"]);
    assert_eq!(refusals(&nginx, nobody), 2);
}

#[test]
fn a_retry_is_made_where_it_is_allowed() {
    let stage = Stage::set("stream_next");
    let [good] = stage.web();
    stage.register([&good]);
    let nobody: SocketAddr = (stage.net.ip(40), stage.net.port()).into();
    stage.consul.register(&Service::new("web", "web-2", nobody));
    let mut nginx = stage
        .nginx_of(STREAM)
        .stream(NO_RETRY)
        .upstream_of(STREAM, "web", "consul_upstream web max_fails=0;")
        .start();
    nginx.wait_log("2 of 2 instances serve", 1, PATIENCE);
    let met = met_anew(nginx.addr(), 10).unwrap();
    assert_eq!(met, BTreeSet::from(["nobody".to_owned(), "web-1".to_owned()]));
    // Without the directive a retry is what there is by default.
    nginx.configure(|conf| conf.stream_without(NO_RETRY));
    nginx.reload();
    serves_anew_now(nginx.addr(), &["web-1"]);
    assert!(refusals(&nginx, nobody) > 5);
}

/// Servers of TLS: an nginx without the module.
fn tls_servers(net: &Net, dir: &Dir, hosts: &[u8]) -> (Nginx, Vec<SocketAddr>) {
    let authority = Authority::new(dir, "backends");
    let certificate = authority.request("web").hosts(&["web"]).issue();
    let conf = Nginx::builder(net, dir).name("servers").module(false).http(format!(
        "ssl_certificate {}; ssl_certificate_key {}; ssl_session_cache shared:tls:1m;",
        certificate.cert.display(),
        certificate.key.display()
    ));
    servers(net, conf, hosts, "ssl")
}

/// Servers that are nginx's, each of which says its name.
fn servers(net: &Net, conf: Builder, hosts: &[u8], listen: &str) -> (Nginx, Vec<SocketAddr>) {
    let addrs: Vec<SocketAddr> =
        hosts.iter().map(|host| (net.ip(*host), net.port()).into()).collect();
    let conf = hosts.iter().zip(&addrs).fold(conf, |conf, (host, addr)| {
        conf.listen(*addr).http(format!(
            "server {{ listen {addr} {listen};
               location / {{ add_header X-Backend s{host}; add_header X-Reused $ssl_session_reused;
                 add_header X-Client $proxy_protocol_addr; return 200 s{host}; }} }}"
        ))
    });
    (conf.start(), addrs)
}

/// A server of nginx's for each method, and load on each of them that loses nothing while the list
/// changes.
fn each_method_keeps_all(
    fake: &FakeConsul,
    addrs: &[SocketAddr],
    conf: Builder,
    upstream: &str,
) -> Nginx {
    fake.know(1, &all_but_one(addrs, 0));
    let conf = STREAM_METHODS.iter().enumerate().fold(conf, |conf, (n, method)| {
        conf.upstream_of(STREAM, &format!("app{n}"), &format!("{method} {upstream}"))
    });
    let nginx = conf.start();
    let each = scaled(100, 5_000) as u64;
    let (changes, ()) = churn_while(fake, addrs, Duration::from_millis(30), |_| {
        let loads: Vec<Load> =
            nginx.addrs().iter().map(|addr| Load::start(*addr, &opening())).collect();
        loads.iter().for_each(|load| load.wait_for(each));
        for (load, method) in loads.into_iter().zip(STREAM_METHODS) {
            let report = load.stop();
            println!("{method:?}: {report}");
            report.assert_nothing_lost();
        }
    });
    assert!(changes > 10, "{changes} changes are too few to tell anything");
    nginx
}

#[test]
fn tls_to_instances_with_resumed_sessions() {
    let (net, dir, fake) = fake("stream_tls");
    let (_servers, addrs) = tls_servers(&net, &dir, &[20, 21, 22, 23]);
    let conf = asking_of(STREAM, &net, &dir, &fake.url())
        .workers(2)
        .stream(format!("{NO_RETRY} proxy_ssl on; proxy_ssl_name web;"));
    let nginx = each_method_keeps_all(&fake, &addrs, conf, "consul_upstream web;");
    // Sessions lie in the zone with their peers; those that stay resume theirs.
    let reused = || {
        let answers = (0..16).map(|_| http::get(nginx.addr(), "/").unwrap());
        answers.filter(|answer| answer.header("x-reused") == "r").count()
    };
    eventually(PATIENCE, "sessions are resumed", || reused() > 8);
}

#[test]
fn the_proxy_protocol_goes_before_each_stream() {
    let (net, dir, fake) = fake("stream_proxy_protocol");
    let conf = Nginx::builder(&net, &dir).name("servers").module(false);
    let conf = conf.http("set_real_ip_from 127.0.0.0/8;");
    let (_servers, addrs) = servers(&net, conf, &[20, 21, 22, 23], "proxy_protocol");
    let conf = asking_of(STREAM, &net, &dir, &fake.url()).workers(2);
    let conf = conf.stream(format!("{NO_RETRY} proxy_protocol on;"));
    let nginx = each_method_keeps_all(&fake, &addrs, conf, "consul_upstream web;");
    assert_eq!(http::get(nginx.addr(), "/").unwrap().header("x-client"), "127.0.0.1");
}

/// A session whose only instance fails is passed on to one that came meanwhile, as often as its limit
/// allows. The instance fails by TLS, whose handshake is a part of connecting: so it can take its time.
#[test]
fn a_lone_instance_that_fails_is_made_up_for_by_the_next() {
    let (net, dir, fake) = fake("stream_lone");
    let (_servers, next) = tls_servers(&net, &dir, &[20]);
    let lone = TcpListener::bind((net.ip(40), net.port())).unwrap();
    lone.set_nonblocking(true).unwrap();
    let old = entry("web-0", lone.local_addr().unwrap());
    let new = entry("web-1", next[0]);
    let line = "consul_upstream web max_fails=0;";
    let conf = asking_of(STREAM, &net, &dir, &fake.url()).stream("proxy_ssl on;");
    let tries = [("unlimited", 0), ("two", 2), ("one", 1)];
    // Nobody looks whether they listen: that would be sessions, too.
    let addrs = tries.map(|_| SocketAddr::from((net.ip(1), net.port())));
    let conf = tries.iter().zip(addrs).fold(conf, |conf, ((name, tries), addr)| {
        let upstream = format!("upstream {name} {{ zone {name} 256k; {line} }}");
        conf.stream(upstream).stream(format!(
            "server {{ listen {addr}; proxy_pass {name}; proxy_next_upstream_tries {tries}; }}"
        ))
    });
    fake.know(5, std::slice::from_ref(&old));
    let nginx = conf.start();
    let mut index = 5;
    for stays in [true, false] {
        index += 1;
        fake.know(index, std::slice::from_ref(&old));
        eventually(PATIENCE, "the lone one is alone", || {
            let changes = tries.map(|(name, _)| changes(&nginx, name));
            changes.iter().all(|all| all.last().is_some_and(|it| it.contains("1 of 1")))
        });
        thread::scope(|scope| {
            let ask = |addr: &SocketAddr| {
                let addr = *addr;
                scope.spawn(move || http::get(addr, "/").map(|it| it.backend().to_owned()))
            };
            let asked: Vec<_> = addrs.iter().map(ask).collect();
            let held: Vec<_> = asked
                .iter()
                .map(|_| eventually(PATIENCE, "a session", || lone.accept()).0)
                .collect();
            index += 1;
            let both = [old.clone(), new.clone()];
            fake.know(index, if stays { &both } else { &both[1..] });
            nginx.wait_log(&format!("index {index}"), tries.len(), PATIENCE);
            drop(held);
            let answers: Vec<_> = asked.into_iter().map(|it| it.join().unwrap().ok()).collect();
            let next = Some("s20".to_owned());
            assert_eq!(answers, [next.clone(), next, None], "the old one stays: {stays}");
        });
    }
}

#[test]
fn a_reload_takes_over_what_serves() {
    let mut stage = Stage::with("stream_reload", |consul| consul.persistent());
    let [one, two, three] = stage.web();
    stage.register([&one, &two]);
    let mut nginx = stage
        .nginx_of(STREAM)
        .workers(2)
        .stream("consul_state_path off;")
        .upstream_of(STREAM, "web", "consul_upstream web;")
        .start();
    serves_anew(nginx.addr(), &["web-1", "web-2"]);
    stage.consul.kill();
    let load = Load::start(nginx.addr(), &opening());
    for n in 1..=scaled(3, 20) {
        nginx.reload();
        serves_anew_now(nginx.addr(), &["web-1", "web-2"]);
        nginx.wait_log("2 servers taken over in ", n, PATIENCE);
    }
    let report = load.stop();
    println!("{report}");
    report.assert_nothing_lost();
    stage.consul.restart();
    stage.register([&three]);
    serves_anew(nginx.addr(), &["web-1", "web-2", "web-3"]);
}

#[test]
fn the_state_hands_over_at_an_upgrade() {
    let mut stage = Stage::with("stream_upgrade", |consul| consul.persistent());
    let [one, two, three]: [Instance; 3] = stage.web();
    stage.register([&one, &two]);
    let nginx = stage
        .nginx_of(STREAM)
        .workers(2)
        .upstream_of(STREAM, "web", "consul_upstream web;")
        .start_detached();
    serves_anew(nginx.addr(), &["web-1", "web-2"]);
    let state = nginx.dir().join("nginx/consul_state/stream~web.json");
    eventually(PATIENCE, "the state is stored", || {
        let text = fs::read_to_string(&state).unwrap_or_default();
        text.contains("web-1") && text.contains("web-2")
    });
    stage.consul.kill();
    let load = Load::start(nginx.addr(), &opening());
    let [old] = nginx.masters()[..] else { panic!("one master") };
    let new = nginx.begin_upgrade(old);
    assert_eq!(nginx.log_count("2 stored servers"), 1);
    nginx.end_workers(old);
    serves_anew_now(nginx.addr(), &["web-1", "web-2"]);
    nginx.quit(old);
    assert_eq!(nginx.masters(), [new]);
    stage.consul.restart();
    stage.register([&three]);
    serves_anew(nginx.addr(), &["web-1", "web-2", "web-3"]);
    load.wait_for(20);
    load.stop().assert_nothing_lost();
    nginx.stop();
}

/// A session of the new binary's workers lasts as long as its client wants, though the upgrade is
/// taken back meanwhile and its instance has left.
#[test]
fn an_upgrade_is_taken_back() {
    let stage = Stage::set("stream_upgrade_back");
    let [one, two, three] = stage.web();
    let greeter = Greeter::start(&stage.net, 20, "one");
    stage.register([&one, &two]);
    stage.consul.register(&Service::new("greeters", "greeter-1", greeter.addr()));
    let nginx = stage
        .nginx_of(STREAM)
        .workers(2)
        .stream(NO_RETRY)
        .upstream_of(STREAM, "web", "consul_upstream web;")
        .upstream_of(STREAM, "greeters", "consul_upstream greeters hold=0;")
        .start_detached();
    let [addr, greetings] = nginx.addrs()[..] else { panic!("two listeners") };
    serves_anew(addr, &["web-1", "web-2"]);
    let load = Load::start(addr, &opening());
    let [old] = nginx.masters()[..] else { panic!("one master") };
    let new = nginx.begin_upgrade(old);
    nginx.end_workers(old);
    let session = eventually(PATIENCE, "a session", || Greeted::open(greetings).ok());

    // Meanwhile an instance goes for good, and another one comes.
    stage.register([&three]);
    stage.consul.deregister("web-1");
    stage.consul.deregister("greeter-1");
    serves_anew(addr, &["web-2", "web-3"]);
    let left = format!("-{} (greeter-1)", greeter.addr());
    eventually(PATIENCE, "the session's has left", || nginx.log_count(&left) > 0);
    eventually(PATIENCE, "its last request is answered", || one.backend.in_flight() == 0);
    one.backend.stop();

    nginx.signal(old, Signal::HUP);
    eventually(PATIENCE, "the old master has workers again", || nginx.workers(old).len() == 2);
    nginx.signal(new, Signal::QUIT);
    eventually(PATIENCE, "the new one's leave", || nginx.workers(new).is_empty());
    serves_anew(addr, &["web-2", "web-3"]);
    stage.consul.deregister("web-2");
    serves_anew(addr, &["web-3"]);
    load.wait_for(20);
    let report = load.stop();
    println!("{report}");
    report.assert_nothing_lost();
    assert!(!session.is_closed());
    drop(session);
    eventually(PATIENCE, "the new master ends with its last session", || nginx.masters() == [old]);
    nginx.stop();
}

#[test]
fn killed_at_every_step_of_an_edit() {
    let (net, dir, fake) = fake("stream_crash");
    let instances: [Instance; 3] = web(&net);
    let mut index = 5;
    fake.know(index, &entries(&instances, false));
    let mut nginx = asking_of(STREAM, &net, &dir, &fake.url())
        .with_failpoints()
        .workers(3)
        .upstream_of(STREAM, "web", "consul_upstream web;")
        .start();
    nginx.allow_log("exited on signal 9");
    serves_anew(nginx.addr(), &["web-1", "web-2"]);
    let mut slowest = Duration::ZERO;
    for step in STEPS {
        let before = followers(&nginx);
        let [killed] = before[..] else { panic!("{before:?}") };
        index += 1;
        nginx.arm(step);
        fake.know(index, &entries(&instances, index % 2 == 0));
        eventually(PATIENCE, &format!("{step} strikes"), || !nginx.is_armed(step));
        eventually(PATIENCE, "it is replaced", || {
            let now = nginx.worker_pids();
            now.len() == 3
                && !now.contains(&killed)
                && matches!(followers(&nginx)[..], [pid] if pid != killed)
        });
        let begin = Instant::now();
        let expected: &[&str] =
            if index % 2 == 0 { &["web-1", "web-3"] } else { &["web-1", "web-2"] };
        let met = met_anew(nginx.addr(), 12).unwrap();
        assert!(!met.contains("nobody"), "{met:?} after {step}");
        slowest = slowest.max(begin.elapsed());
        assert!(begin.elapsed() < at_most(), "{:?} after {step}", begin.elapsed());
        serves_anew(nginx.addr(), expected);
    }
    let mended = nginx.log_count("which is whole again");
    println!("{} steps, {mended} lists mended, the slowest 12 answers {slowest:?}", STEPS.len());
    assert!(mended >= 8, "only {mended} lists were mended");
}

/// Both modules in one nginx: two threads in the first worker, each with its own settings, and neither
/// meets the other's upstream of the same name, in memory or on disk.
#[test]
fn both_modules_work_as_each_alone() {
    // nginx wants another name for its zone.
    const DB: &str = "upstream app { zone app_of_stream 256k; consul_upstream db hold=0; }";
    let mut stage = Stage::with("stream_and_http", |consul| consul.persistent());
    let [web_1, web_2] = stage.web();
    let db = Instance::start(&stage.net, "db", "db-1");
    stage.register([&web_1, &db]);
    let mut nginx = stage
        .nginx()
        .workers(2)
        .stream(format!("consul_address {};", stage.consul.url()))
        .http("consul_max_connections 1;")
        .upstream("app", "consul_upstream web hold=0;")
        .stream(DB)
        .server_of(STREAM, "app")
        .start();
    let [http, stream] = nginx.addrs()[..] else { panic!("two servers") };
    serves(http, &["web-1"]);
    serves_anew(stream, &["db-1"]);
    let following = followers(&nginx);
    assert!(matches!(following[..], [one, other] if one == other), "{following:?}");
    eventually(PATIENCE, "each has a connection of its own, though one is http's most", || {
        connections(&nginx, following[0], v4(stage.consul.addr())) == 2
    });
    stage.register([&web_2]);
    serves(http, &["web-1", "web-2"]);
    serves_anew_now(stream, &["db-1"]);
    let state = nginx.dir().join("nginx/consul_state");
    let files = || -> BTreeMap<String, String> {
        let files = fs::read_dir(&state).into_iter().flatten().flatten();
        files
            .map(|it| (it.file_name().to_string_lossy().into_owned(), it.path()))
            .filter(|(name, _)| name.ends_with(".json"))
            .map(|(name, path)| (name, fs::read_to_string(path).unwrap_or_default()))
            .collect()
    };
    eventually(PATIENCE, "both states are stored", || {
        let files = files();
        let has = |name: &str, id: &str| files.get(name).is_some_and(|text| text.contains(id));
        files.len() == 2 && has("app.json", "web-2") && has("stream~app.json", "db-1")
    });

    // A reload takes over both, a cold start stores both, without Consul.
    stage.consul.kill();
    nginx.reload();
    serves_now(http, &["web-1", "web-2"]);
    serves_anew_now(stream, &["db-1"]);
    nginx.stop();
    drop(nginx);
    let nginx = stage
        .nginx()
        .workers(2)
        .stream(format!("consul_address {};", stage.consul.url()))
        .upstream("app", "consul_upstream web hold=0;")
        .stream(DB)
        .server_of(STREAM, "app")
        .start();
    let [http, stream] = nginx.addrs()[..] else { panic!("two servers") };
    serves_now(http, &["web-1", "web-2"]);
    serves_anew_now(stream, &["db-1"]);
    stage.consul.restart();
    stage.consul.deregister("web-2");
    serves(http, &["web-1"]);
    serves_anew_now(stream, &["db-1"]);
}

/// A server of http with the status.
fn with_status(stage: &Stage, conf: Builder) -> (Builder, SocketAddr) {
    let addr: SocketAddr = (stage.net.ip(2), stage.net.port()).into();
    let server = format!("server {{ listen {addr}; location /consul {{ consul_status; }} }}");
    (conf.http(server), addr)
}

/// The status is the http module's, and shows the upstreams of both, each in its place.
#[test]
fn the_status_shows_both_protocols() {
    let stage = Stage::set("stream_status");
    let [web_1, web_2] = stage.web();
    let db = [1, 2].map(|n| Instance::start(&stage.net, "db", &format!("db-{n}")));
    stage.register(db.iter().chain([&web_1, &web_2]));
    let conf = stage
        .nginx()
        .workers(2)
        .stream(format!("consul_address {};", stage.consul.url()))
        .upstream("app", "consul_upstream web;")
        .stream(
            "upstream app { zone app_of_stream 256k; consul_upstream db tag=x backup health=any;
             consul_upstream db; server 127.0.0.1:1 down; }",
        )
        .server_of(STREAM, "app");
    let (conf, status) = with_status(&stage, conf);
    let nginx = conf.start();
    let stream = nginx.addrs()[1];
    serves_anew(stream, &["db-1", "db-2"]);
    let look = || http::get(status, "/consul").unwrap().json();
    let seen = eventually(PATIENCE, "all is in sync", || {
        let seen = look();
        if seen["in_sync"] == true { Ok(seen) } else { Err(seen.to_string()) }
    });
    assert_eq!(seen["upstreams"].as_object().unwrap().len(), 1);
    assert_eq!(seen["upstreams"]["app"]["peers"].as_array().unwrap().len(), 2);
    let app = &seen["stream_upstreams"]["app"];
    assert_eq!(app["zone"], "app_of_stream");
    let [fixed, first, second] = &app["peers"].as_array().unwrap()[..] else { panic!("{app}") };
    assert_eq!((&fixed["state"], &fixed["service_id"]), (&"down".into(), &Value::Null));
    assert_eq!((&first["service_id"], &second["service_id"]), (&"db-1".into(), &"db-2".into()));
    let [tagged, plain] = &app["sources"].as_array().unwrap()[..] else { panic!("{app}") };
    assert_eq!((&tagged["service"], &tagged["health"]), (&"db".into(), &"any".into()));
    assert_eq!((&tagged["backup"], &tagged["serving"]), (&true.into(), &0.into()));
    assert_eq!((&plain["registered"], &plain["serving"]), (&2.into(), &2.into()));
    assert_eq!(seen["agents"].as_array().unwrap().len(), 1, "asked by both");

    // Sessions count as requests do, with what went through them.
    let before: u64 = [first, second].map(|it| it["requests"].as_u64().unwrap()).iter().sum();
    serves_anew_now(stream, &["db-1", "db-2"]);
    eventually(PATIENCE, "they are counted", || {
        let peers = look()["stream_upstreams"]["app"]["peers"].clone();
        let sum = |field: &str| -> u64 { (1..3).filter_map(|n| peers[n][field].as_u64()).sum() };
        sum("requests") == before + 20 && sum("sent") > 0 && sum("received") > 0
    });
    let metrics = http::get(status, "/consul?format=prometheus").unwrap().text();
    for protocol in ["http", "stream"] {
        let line = format!("upstream=\"app\",protocol=\"{protocol}\"");
        assert!(metrics.contains(&line), "no {line} in {metrics}");
    }
    let page = http::get(status, "/consul/upstreams/app").unwrap();
    assert_eq!(page.json()["stream_upstreams"].as_object().unwrap().len(), 1);

    // An instance that goes is told of, too.
    stage.consul.maintenance("db-1", true, "a test");
    eventually(PATIENCE, "it does not serve", || {
        let app = look()["stream_upstreams"]["app"].clone();
        app["sources"][1]["excluded"]["maintenance"] == 1
    });
}

/// A server that failed is available again when a session with it has begun, however long that goes on.
#[test]
fn a_session_shows_that_its_server_is_back() {
    let stage = Stage::set("stream_back");
    let [good] = stage.web();
    stage.register([&good]);
    let late: SocketAddr = (stage.net.ip(40), stage.net.port()).into();
    stage.consul.register(&Service::new("web", "web-2", late));
    let line = "consul_upstream web max_fails=1 fail_timeout=1s;";
    let conf = stage.nginx_of(STREAM).workers(1).upstream_of(STREAM, "web", line);
    let (conf, status) = with_status(&stage, conf);
    let nginx = conf.start();
    nginx.wait_log("2 of 2 instances serve", 1, PATIENCE);
    let peer = || {
        let seen = http::get(status, "/consul").unwrap().json();
        let peers = seen["stream_upstreams"]["web"]["peers"].as_array().cloned();
        let is_late = |it: &Value| it["service_id"] == "web-2";
        peers.unwrap_or_default().into_iter().find(is_late).expect("the second server")
    };
    serves_anew_now(nginx.addr(), &["web-1"]);
    let down = peer();
    assert!(down["unavail"] == 1 && down["downstart"].is_string(), "{down}");

    let _back = Backend::bind(late, "web-2").unwrap();
    let _session = eventually(PATIENCE, "a session with it", || {
        let mut conn = http::Conn::open(nginx.addr()).ok()?;
        (conn.get("/").ok()?.backend() == "web-2").then_some(conn)
    });
    let up = peer();
    assert!(up["downstart"].is_null() && up["active"] == 1, "{up}");
}

/// Where only stream has upstreams, they are all there is.
#[test]
fn the_status_shows_stream_alone() {
    let stage = Stage::set("stream_status_alone");
    let [one] = stage.web();
    stage.register([&one]);
    let conf = stage.nginx_of(STREAM).upstream_of(STREAM, "web", "consul_upstream web;");
    let (conf, status) = with_status(&stage, conf);
    let nginx = conf.start();
    serves_anew(nginx.addr(), &["web-1"]);
    eventually(PATIENCE, "all is in sync", || {
        let seen = http::get(status, "/consul").unwrap().json();
        let web = &seen["stream_upstreams"]["web"];
        let ok = seen["in_sync"] == true
            && seen["thread"]["state"] == "running"
            && seen["upstreams"].as_object().is_some_and(|it| it.is_empty())
            && web["peers"][0]["service_id"] == "web-1";
        if ok { Ok(()) } else { Err(seen.to_string()) }
    });
}

/// A module that has no upstream of its own starts nothing.
#[test]
fn loaded_and_not_used_it_starts_nothing() {
    let stage = Stage::set("stream_unused");
    let backend = Backend::start(&stage.net, 20, "static");
    let nginx = Nginx::builder(&stage.net, &stage.dir)
        .workers(2)
        .stream(format!("upstream web {{ zone web 256k; server {}; }}", backend.addr()))
        .server_of(STREAM, "web")
        .start();
    serves_anew_now(nginx.addr(), &["static"]);
    assert!(followers(&nginx).is_empty());
    for pid in nginx.worker_pids() {
        assert!(!nginx.fds(pid).iter().any(|fd| fd.contains("eventfd") && fd.contains("consul")));
        assert_eq!(nginx.threads(pid).len(), 1);
    }
}

/// The bar of a churn: eight backends, one replaced every 50 ms, four workers, no retries. One that
/// left is stopped after 100 ms; beside other tests a client may take longer than that to send its
/// request, and then after a second.
#[test]
fn a_churn_loses_nothing() {
    let (net, dir, fake) = fake("stream_churn");
    let linger = Duration::from_millis(if full() { 100 } else { 1000 });
    let servers = Replaced::new(&fake, 8, linger, |n| {
        let backend = Backend::start(&net, 20 + (n % 100) as u8, &format!("s{n}"));
        (backend.addr(), backend)
    });
    let nginx = asking_of(STREAM, &net, &dir, &fake.url())
        .workers(4)
        .stream(NO_RETRY)
        .upstream_of(STREAM, "web", "consul_upstream web;")
        .start();
    nginx.wait_log("8 of 8 instances serve", 1, PATIENCE);
    let (changes, report) = servers.replace_while(Duration::from_millis(50), |_| {
        let options = Options::default().connections(8).keepalive(false);
        let options = if full() { options } else { options.pause(Duration::from_millis(5)) };
        let load = Load::start(nginx.addr(), &options);
        load.wait_for(scaled(2_000, 31_000) as u64);
        load.stop()
    });
    println!("{changes} changes: {report}");
    report.assert_nothing_lost();
    assert!(report.backends.len() > 8 + changes / 2, "most have served: {report}");
}

/// Datagrams while instances are replaced, which answer for a second after they left, and then no more.
#[test]
fn every_datagram_is_answered() {
    const CHANGES: usize = 100;
    let (net, dir, fake) = fake("stream_udp");
    let servers = Replaced::new(&fake, 5, Duration::from_secs(1), |n| {
        let server = Datagrams::start(&net, 20 + (n % 100) as u8, &format!("s{n}"));
        (server.addr(), server)
    });
    let conf = asking_of(STREAM, &net, &dir, &fake.url()).workers(2).stream(NO_RETRY);
    let conf = STREAM_METHODS.iter().enumerate().fold(conf, |conf, (n, method)| {
        conf.stream(format!(
            "upstream dns{n} {{ zone dns{n} 256k; {method} consul_upstream web; }}"
        ))
    });
    let ports: Vec<SocketAddr> =
        STREAM_METHODS.iter().map(|_| (net.ip(1), net.port()).into()).collect();
    let conf = ports.iter().enumerate().fold(conf, |conf, (n, addr)| {
        conf.stream(format!(
            "server {{ listen {addr} udp reuseport; proxy_pass dns{n}; proxy_responses 1; }}"
        ))
    });
    let nginx = conf.start();
    nginx.wait_log("5 of 5 instances serve", STREAM_METHODS.len(), PATIENCE);

    let wanted = scaled(4_000, 20_000);
    let answered = AtomicUsize::new(0);
    let met = std::sync::Mutex::new(BTreeSet::new());
    let (changes, lost) = servers.replace_while(Duration::from_millis(30), |changes| {
        let client = |n: usize| {
            let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
            socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
            let mut number = 0u64;
            let mut lost = 0;
            while answered.load(Ordering::Relaxed) < wanted
                || changes.load(Ordering::Relaxed) < CHANGES
            {
                number += 1;
                let question = number.to_string();
                let to = ports[(number as usize + n) % ports.len()];
                socket.send_to(question.as_bytes(), to).unwrap();
                let mut buffer = [0; 64];
                match socket.recv(&mut buffer) {
                    Ok(len) => {
                        let text = String::from_utf8_lossy(&buffer[..len]).into_owned();
                        let (name, echoed) = text.split_once(' ').unwrap();
                        assert_eq!(echoed, question);
                        met.lock().unwrap().insert(name.to_owned());
                        answered.fetch_add(1, Ordering::Relaxed);
                    }
                    Err(error) if error.kind() == ErrorKind::WouldBlock => lost += 1,
                    Err(error) => panic!("{error}"),
                }
            }
            lost
        };
        thread::scope(|scope| {
            let clients: Vec<_> = (0..4).map(|n| scope.spawn(move || client(n))).collect();
            clients.into_iter().map(|it| it.join().unwrap()).sum::<usize>()
        })
    });
    let answered = answered.load(Ordering::Relaxed);
    println!("{answered} datagrams answered, {lost} not, during {changes} changes");
    assert_eq!(lost, 0);
    assert!(changes >= CHANGES && answered >= wanted);
    assert!(met.lock().unwrap().len() > changes / 2, "most have served");
}

/// Two instances with so many sessions each, open through an nginx.
fn sessions(
    name: &str,
    each: usize,
    upstream: &str,
) -> (Stage, [Greeter; 2], Nginx, [Vec<Greeted>; 2]) {
    let (stage, greeters) = two_greeters(name);
    let nginx = stage
        .nginx_of(STREAM)
        .workers(2)
        .connections(4 * each + 256)
        .upstream_of(STREAM, "web", &format!("consul_upstream web hold=0; {upstream}"))
        .start();
    nginx.wait_log("2 of 2 instances serve", 1, PATIENCE);
    let mut all: [Vec<Greeted>; 2] = [Vec::new(), Vec::new()];
    for _ in 0..2 * each {
        let session = Greeted::open(nginx.addr()).unwrap();
        all[usize::from(session.name == "g21")].push(session);
    }
    (stage, greeters, nginx, all)
}

fn closed(sessions: &[Greeted]) -> usize {
    sessions.iter().filter(|it| it.is_closed()).count()
}

#[test]
fn maintenance_drains() {
    let (stage, greeters, nginx, [drained, stays]) =
        sessions("stream_drain", 20, "consul_session_drop on;");
    stage.consul.maintenance("web-0", true, "a test");
    nginx.wait_log(&format!("-{} (web-0)", greeters[0].addr()), 1, PATIENCE);
    // When sessions of another removal are closed, these would have been.
    stage.consul.deregister("web-1");
    eventually(PATIENCE, "those of the other one are closed", || closed(&stays) == stays.len());
    assert_eq!((closed(&drained), greeters[0].open()), (0, drained.len()));
    // One that serves again, and is deregistered then, ends what it has had since.
    stage.consul.maintenance("web-0", false, "");
    let since = eventually(PATIENCE, "it serves again", || Greeted::open(nginx.addr()).ok());
    stage.consul.deregister("web-0");
    eventually(PATIENCE, "the new session is closed", || since.is_closed());
    assert_eq!(closed(&drained), 0, "the old ones drain still");
}

#[test]
fn without_the_directive_sessions_go_on() {
    let stage = Stage::set("stream_no_drop");
    let greeter = Greeter::start(&stage.net, 20, "one");
    stage.consul.register(&Service::new("web", "web-1", greeter.addr()));
    let nginx = stage
        .nginx_of(STREAM)
        .stream("consul_session_drop on;")
        .upstream_of(STREAM, "on", "consul_upstream web hold=0;")
        .upstream_of(STREAM, "off", "consul_upstream web hold=0; consul_session_drop off;")
        .start();
    nginx.wait_log("1 of 1 instances serve", 2, PATIENCE);
    let [on, off] = [0, 1].map(|n| {
        let open = || Greeted::open(nginx.addrs()[n]).unwrap();
        (0..10).map(|_| open()).collect::<Vec<_>>()
    });
    stage.consul.deregister("web-1");
    nginx.wait_log(&format!("-{} (web-1)", greeter.addr()), 2, PATIENCE);
    // One look at the sessions of a worker is for all of them.
    eventually(PATIENCE, "the sessions of one upstream are closed", || closed(&on) == on.len());
    assert_eq!(closed(&off), 0);
    eventually(PATIENCE, "those of the other one go on", || greeter.open() == off.len());
}

/// Sessions of workers that are on their way out are closed as well.
#[test]
fn sessions_of_an_old_generation_are_closed() {
    let (stage, greeters, mut nginx, [gone, stays]) =
        sessions("stream_drop_reload", 20, "consul_session_drop on;");
    nginx.reload();
    stage.consul.deregister("web-0");
    // Both generations have seen it.
    nginx.wait_log(&format!("-{} (web-0)", greeters[0].addr()), 2, PATIENCE);
    eventually(PATIENCE, "all of its sessions are closed", || closed(&gone) == gone.len());
    assert_eq!(closed(&stays), 0);
}

/// Tests that judge a time: they run alone, at the end.
mod timed {
    use super::*;

    #[test]
    fn sessions_to_an_instance_that_left_are_closed_within_a_second() {
        const EACH: usize = 1_000;
        let (stage, greeters, nginx, [gone, stays]) =
            sessions("stream_drop", EACH, "consul_session_drop on;");
        assert_eq!(gone.len() + stays.len(), 2 * EACH);
        assert!(gone.len() > EACH / 3 && stays.len() > EACH / 3);
        stage.consul.deregister("web-0");
        nginx.wait_log(&format!("-{} (web-0)", greeters[0].addr()), 1, PATIENCE);
        let begin = Instant::now();
        eventually(PATIENCE, "all of its sessions are closed", || closed(&gone) == gone.len());
        let took = begin.elapsed();
        println!("{} sessions were closed within {took:?} of the removal", gone.len());
        assert!(took < Duration::from_secs(if full() { 1 } else { 5 }), "{took:?}");
        assert_eq!(
            (closed(&stays), greeters[1].open()),
            (0, stays.len()),
            "the others are untouched"
        );
        eventually(PATIENCE, "the instance has none", || greeters[0].open() == 0);
        nginx.wait_log("sessions to servers that left are closed", 1, PATIENCE);
        // And it is not over: what comes back and goes again is closed again.
        stage.consul.register(&Service::new("web", "web-0", greeters[0].addr()));
        let again = eventually(PATIENCE, "it serves again", || {
            Greeted::open(nginx.addr()).ok().filter(|session| session.name == "g20")
        });
        stage.consul.deregister("web-0");
        eventually(PATIENCE, "this one is closed, too", || again.is_closed());
        assert_eq!(closed(&stays), 0);
    }
}
