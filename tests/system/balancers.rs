//! Every method of nginx's keeps all requests while the list under it changes.
//!
//! Each test takes one method through 50 changes under load. What leaves is stopped a moment after
//! nginx has let go of it, so a request that was sent to an instance which is out of the list is
//! lost, and with `proxy_next_upstream off` nothing makes up for it.

use std::collections::{BTreeSet, VecDeque};
use std::io::{self, Read};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use serde_json::json;
use testbed::http::{self, Answer, Conn};
use testbed::nginx::Builder;
use testbed::{
    Backend, Consul, Dir, Load, Net, Nginx, Options, Protocol, Report, Service, eventually,
};

use crate::common::{Serve, asking_of, met_anew};

const CHANGES: usize = 50;

/// How many requests of each client that keeps its connections are answered between two changes,
/// at least.
const BETWEEN: u64 = 6;

/// How long a connection rests after an answer, and how long where each request has a new one. A
/// machine that tracks connections remembers each for two minutes and has room for so many: when
/// there is none left, it drops packets, and all tests fail. So these do not ask as fast as they
/// can.
const PAUSE: Duration = Duration::from_millis(8);
const PAUSE_IF_NEW: Duration = Duration::from_millis(40);

/// How many changes Consul may be ahead of nginx. On a busy machine nginx sees some at a time; the
/// line that it logs then names eight instances at most.
const AHEAD: usize = 4;

/// How long an instance lives on when nginx has let go of it: longer than any request. The server of a
/// stream is chosen when the client connects, which may be busy before it sends its request.
fn linger(of: Protocol) -> Duration {
    Duration::from_millis(match of {
        Protocol::Http => 100,
        Protocol::Stream => 1000,
    })
}

/// How long a change may take from Consul to nginx. Far more than it does: other tests have the
/// machine, too.
const PATIENCE: Duration = Duration::from_secs(20);

/// How long a faulty server keeps a request waiting: long enough that the list changes meanwhile.
const HELD: Duration = Duration::from_millis(8);

/// Clients say by this header who they are: `ip_hash` goes by it.
const CLIENTS: &str = "set_real_ip_from 127.0.0.0/8; real_ip_header X-Real-IP;";

const NO_RETRY: &str = "proxy_next_upstream off;";

/// The errors of thousands of requests are wanted here; the log need not tell each of them.
const RETRY: &str = "proxy_next_upstream error timeout; error_log error.log crit;";

/// The methods of 1.28.
pub const METHODS: [&str; 7] = [
    "",
    "least_conn;",
    "ip_hash;",
    "hash $arg_key;",
    "hash $arg_key consistent;",
    "random;",
    "random two least_conn;",
];

/// Those of stream. A client of a test has one address, and many ports.
pub const STREAM_METHODS: [&str; 6] = [
    "",
    "least_conn;",
    "hash $remote_port;",
    "hash $remote_port consistent;",
    "random;",
    "random two least_conn;",
];

/// A test for each of a protocol's.
macro_rules! each_method {
    (Http, $run:expr) => {
        each_method!(
            METHODS, $run, round_robin 0, least_conn 1, ip_hash 2, hash 3, hash_consistent 4,
            random 5, random_two_least_conn 6
        );
    };
    (Stream, $run:expr) => {
        each_method!(
            STREAM_METHODS, $run, round_robin 0, least_conn 1, hash 2, hash_consistent 3, random 4,
            random_two_least_conn 5
        );
    };
    ($methods:ident, $run:expr, $($name:ident $n:literal),*) => {
        $(
            #[test]
            fn $name() {
                $run(super::$methods[$n]);
            }
        )*
    };
}

/// A test for each that knows backups.
macro_rules! each_with_backups {
    ($run:ident, $of:ident, $($name:ident $upstream:literal),*) => {
        $(
            #[test]
            fn $name() {
                super::$run(testbed::Protocol::$of, $upstream);
            }
        )*
    };
}

mod alone {
    each_method!(Http, |method| super::through_changes(
        super::Protocol::Http,
        &format!("{method} consul_upstream web;")
    ));
}

mod with_keepalive {
    each_method!(Http, |method| super::through_changes(
        super::Protocol::Http,
        &format!("consul_upstream web; {method} keepalive 8;")
    ));
}

mod retrying {
    each_method!(Http, |method| super::through_failures(
        super::Protocol::Http,
        &format!("{method} consul_upstream web max_fails=0;")
    ));
}

mod retrying_with_keepalive {
    each_method!(Http, |method| super::through_failures(
        super::Protocol::Http,
        &format!("consul_upstream web max_fails=0; {method} keepalive 8;")
    ));
}

mod of_stream {
    each_method!(Stream, |method| super::through_changes(
        super::Protocol::Stream,
        &format!("{method} consul_upstream web;")
    ));
}

mod of_stream_retrying {
    each_method!(Stream, |method| super::through_failures(
        super::Protocol::Stream,
        &format!("{method} consul_upstream web max_fails=0;")
    ));
}

/// Of the methods of 1.28 only these know backups.
mod with_a_static_backup {
    each_with_backups!(
        through_a_static_backup, Http,
        round_robin "", round_robin_and_keepalive "keepalive 8;",
        least_conn "least_conn;", least_conn_and_keepalive "least_conn; keepalive 8;"
    );
}

mod with_backups_from_consul {
    each_with_backups!(
        through_backups_from_consul, Http,
        round_robin "", round_robin_and_keepalive "keepalive 8;",
        least_conn "least_conn;", least_conn_and_keepalive "least_conn; keepalive 8;"
    );
}

mod of_stream_with_a_static_backup {
    each_with_backups!(
        through_a_static_backup, Stream, round_robin "", least_conn "least_conn;"
    );
}

mod of_stream_with_backups_from_consul {
    each_with_backups!(
        through_backups_from_consul, Stream, round_robin "", least_conn "least_conn;"
    );
}

/// Six instances, of which one to six serve.
fn through_changes(of: Protocol, upstream: &str) {
    let stage = Stage::set(of);
    let mut pool = Pool::new(&stage, "web", 6, 1, Kind::Sound);
    let nginx = stage.nginx(upstream, NO_RETRY);
    let served = churn(&stage, &nginx, &mut [&mut pool]);
    // Each of the loads has its own address, by which ip_hash goes, so it may miss some.
    assert!(served.backends.len() > 6, "{served}");
}

/// Up to three instances that answer and up to three that take requests and drop them. At least
/// one of each serves, so every request has somewhere to go, now or at a second try.
fn through_failures(of: Protocol, upstream: &str) {
    let stage = Stage::set(of);
    let mut sound = Pool::new(&stage, "web", 3, 1, Kind::Sound);
    let kind = match of {
        Protocol::Http => Kind::Faulty,
        // A stream is passed on to a server that accepts it, whatever comes of that.
        Protocol::Stream => Kind::Refusing,
    };
    let mut faulty = Pool::new(&stage, "web", 3, 1, kind);
    let nginx = match of {
        Protocol::Http => stage.nginx(upstream, RETRY),
        Protocol::Stream => stage.nginx(upstream, ""),
    };
    let served = churn(&stage, &nginx, &mut [&mut sound, &mut faulty]);
    let retried = match of {
        Protocol::Http => served.retried > 0,
        Protocol::Stream => nginx.log_count("Connection refused") > 0,
    };
    assert!(retried, "nothing failed: {served}");
}

fn through_a_static_backup(of: Protocol, method: &str) {
    let stage = Stage::set(of);
    let mut pool = Pool::new(&stage, "web", 3, 0, Kind::Sound);
    let backup = Backend::start(&stage.net, 60, "backup");
    let nginx = stage.nginx(
        &format!("{method} consul_upstream web hold=0; server {} backup;", backup.addr()),
        NO_RETRY,
    );
    let served = churn(&stage, &nginx, &mut [&mut pool]);
    assert!(served.backends.contains_key("backup"), "{served}");
    backups_wait_for_their_turn(&stage, &nginx, pool, "backup");
}

fn through_backups_from_consul(of: Protocol, method: &str) {
    let stage = Stage::set(of);
    let mut primaries = Pool::new(&stage, "web", 3, 0, Kind::Sound);
    let mut backups = Pool::new(&stage, "spare", 3, 1, Kind::Sound);
    let nginx = stage.nginx(
        &format!("{method} consul_upstream spare backup; consul_upstream web hold=0;"),
        NO_RETRY,
    );
    let served = churn(&stage, &nginx, &mut [&mut primaries, &mut backups]);
    assert!(served.backends.keys().any(|name| name.starts_with("spare")), "{served}");
    backups_wait_for_their_turn(&stage, &nginx, primaries, "spare");
}

/// Backups serve when there is no primary, and only then.
fn backups_wait_for_their_turn(stage: &Stage, nginx: &Nginx, mut primaries: Pool, backup: &str) {
    let turn_of = |name: &str| {
        let met = met_anew(nginx.addr(), 20).unwrap();
        assert!(met.iter().all(|server| server.starts_with(name)), "not {name}: {met:?}");
    };
    if primaries.is_empty() {
        primaries.grow(stage);
    }
    primaries.wait_until_known_to(nginx);
    turn_of("web");
    while !primaries.is_empty() {
        primaries.shrink(stage, nginx).stop_when_gone_from(nginx, stage.of);
    }
    turn_of(backup);
    primaries.grow(stage);
    primaries.wait_until_known_to(nginx);
    turn_of("web");
}

/// Changes each pool in turn while requests flow. Returns what became of all requests, none of
/// which was lost.
fn churn(stage: &Stage, nginx: &Nginx, pools: &mut [&mut Pool]) -> Report {
    let traffic = Traffic::start(nginx, stage.of);
    let mut unseen = VecDeque::new();
    thread::scope(|scope| {
        for n in 0..CHANGES {
            let pool = &mut pools[n % pools.len()];
            match pool.change(stage, nginx) {
                Changed::Came(sign) => unseen.push_back(sign),
                Changed::Went(instance) => {
                    unseen.push_back(instance.sign('-'));
                    // The next change does not wait for this one's end.
                    scope.spawn(move || instance.stop_when_gone_from(nginx, stage.of));
                }
            }
            if unseen.len() > AHEAD
                && let Some(sign) = unseen.pop_front()
            {
                nginx.wait_log(&sign, 1, PATIENCE);
            }
            traffic.wait();
        }
    });
    pools.iter().for_each(|pool| pool.wait_until_known_to(nginx));
    traffic.wait();
    let report = traffic.stop();
    if stage.of == Protocol::Http {
        let both = BTreeSet::from_iter(nginx.worker_pids());
        assert_eq!(report.workers, both, "the workers that served");
    }
    report
}

/// What every test has.
struct Stage {
    of: Protocol,
    net: Net,
    consul: Consul,
    dir: Dir,
}

impl Stage {
    fn set(of: Protocol) -> Stage {
        let (net, dir) = (Net::isolated(), Dir::new("balancers"));
        let consul = Consul::start(&net, &dir);
        Stage { of, net, consul, dir }
    }

    fn nginx(&self, upstream: &str, directives: &str) -> Nginx {
        let conf = asking_of(self.of, &self.net, &self.dir, &self.consul.url()).workers(2);
        let conf = if self.of == Protocol::Http { conf.http(CLIENTS) } else { conf };
        conf.block(self.of, directives).upstream_of(self.of, "app", upstream).start()
    }

    /// An nginx with an upstream, and a server, for each of these methods.
    fn nginx_of_each(
        &self,
        name: &str,
        consul: &Consul,
        methods: &[&str],
        upstream: impl Fn(&str) -> String,
    ) -> Nginx {
        let conf = Nginx::builder(&self.net, &self.dir)
            .name(name)
            .workers(2)
            .http(format!("consul_address {};", consul.url()))
            .http(CLIENTS);
        let add = |conf: Builder, (n, method): (usize, &&str)| {
            conf.http(format!("upstream app{n} {{ zone app{n} 256k; {} }}", upstream(method)))
                .server(&format!("app{n}"))
        };
        methods.iter().enumerate().fold(conf, add).start()
    }
}

/// Clients in four networks, with a mixture of keys. Three keep their connections; the last one
/// opens one for each request, and so meets every worker.
struct Traffic {
    keeping: Vec<Load>,
    opening: Load,
}

impl Traffic {
    /// Of a stream each connection goes to one server: there all open one for each request.
    fn start(nginx: &Nginx, of: Protocol) -> Traffic {
        let load = |client: u64, options: Options| {
            let options = options
                .connections(2)
                .path(move |n| format!("/?key={client}-{}", n % 16))
                .header("X-Real-IP", &format!("10.0.{client}.1"));
            Load::start(nginx.addr(), &options)
        };
        let keeping = match of {
            Protocol::Http => Options::default().pause(PAUSE),
            Protocol::Stream => Options::default().pause(PAUSE_IF_NEW).keepalive(false),
        };
        let opening = Options::default().pause(PAUSE_IF_NEW).keepalive(false);
        Traffic {
            keeping: (0..3).map(|client| load(client, keeping.clone())).collect(),
            opening: load(3, opening),
        }
    }

    /// Waits until each client that keeps its connections has had some answers.
    fn wait(&self) {
        let sent = || self.keeping.iter().map(|load| load.report().sent());
        let wanted: Vec<u64> = sent().map(|sent| sent + BETWEEN).collect();
        eventually(PATIENCE, "requests between two changes", || {
            sent().zip(&wanted).all(|(sent, wanted)| sent >= *wanted)
        });
    }

    fn stop(self) -> Report {
        let mut sum = Report::default();
        for report in self.keeping.into_iter().chain([self.opening]).map(Load::stop) {
            report.assert_nothing_lost();
            sum.ok += report.ok;
            sum.retried += report.retried;
            sum.workers.extend(report.workers);
            for (name, count) in report.backends {
                *sum.backends.entry(name).or_default() += count;
            }
        }
        sum
    }
}

/// Instances that come and go like the tide: until all are there, then until few are left, down
/// to a single one, which nginx treats in a way of its own, or to none.
struct Pool {
    service: &'static str,
    kind: Kind,
    low: usize,
    rising: bool,
    /// Where to look for the next one to change.
    cursor: usize,
    /// How many there have been: each has a name of its own.
    count: usize,
    slots: Vec<Option<Instance>>,
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Sound,
    Faulty,
    /// Nobody listens.
    Refusing,
}

struct Instance {
    id: String,
    addr: SocketAddr,
    /// Ends with the value.
    _server: Server,
}

enum Changed {
    Came(String),
    Went(Instance),
}

enum Server {
    Sound { _backend: Backend },
    Faulty { _faulty: Faulty },
    None,
}

impl Pool {
    /// With half of its instances up, and known to Consul.
    fn new(stage: &Stage, service: &'static str, size: usize, low: usize, kind: Kind) -> Pool {
        let slots = (0..size).map(|_| None).collect();
        let mut pool = Pool { service, kind, low, rising: true, cursor: 0, count: 0, slots };
        while pool.len() < size.div_ceil(2) {
            pool.grow(stage);
        }
        pool
    }

    fn len(&self) -> usize {
        self.slots.iter().flatten().count()
    }

    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn change(&mut self, stage: &Stage, nginx: &Nginx) -> Changed {
        if self.len() == self.slots.len() {
            self.rising = false;
        } else if self.len() == self.low {
            self.rising = true;
        }
        if self.rising {
            Changed::Came(self.grow(stage))
        } else {
            Changed::Went(self.shrink(stage, nginx))
        }
    }

    /// Returns how it shows in nginx's log.
    fn grow(&mut self, stage: &Stage) -> String {
        let slot = self.next(false);
        let kind = match self.kind {
            Kind::Sound => "sound",
            Kind::Faulty => "faulty",
            Kind::Refusing => "refusing",
        };
        // The service ID stays a slot's; name and address are new each time, so that an answer
        // and a line in the log tell which one it was.
        let id = format!("{}-{kind}-{slot}", self.service);
        let name = format!("{id}-{}", self.count);
        self.count += 1;
        let (addr, server) = match self.kind {
            Kind::Sound => {
                let backend = Backend::start(&stage.net, 20 + slot as u8, &name);
                (backend.addr(), Server::Sound { _backend: backend })
            }
            Kind::Faulty => {
                let faulty = Faulty::start((stage.net.ip(40 + slot as u8), stage.net.port()));
                (faulty.addr, Server::Faulty { _faulty: faulty })
            }
            Kind::Refusing => {
                ((stage.net.ip(40 + slot as u8), stage.net.port()).into(), Server::None)
            }
        };
        stage.consul.register(&Service::new(self.service, &id, addr));
        self.slots[slot].insert(Instance { id, addr, _server: server }).sign('+')
    }

    fn shrink(&mut self, stage: &Stage, nginx: &Nginx) -> Instance {
        let slot = self.next(true);
        let instance = self.slots[slot].take().expect("the slot is in use");
        // Else nginx might never see it.
        nginx.wait_log(&instance.sign('+'), 1, PATIENCE);
        stage.consul.deregister(&instance.id);
        instance
    }

    /// The next slot that is in use, or free. Not in order: places in the middle of the list
    /// change as well as its ends.
    fn next(&mut self, in_use: bool) -> usize {
        let size = self.slots.len();
        self.cursor += size / 2 + 1;
        let slot = (self.cursor..self.cursor + size)
            .map(|n| n % size)
            .find(|&n| self.slots[n].is_some() == in_use)
            .expect("the tide turns before");
        self.cursor = slot;
        slot
    }

    fn wait_until_known_to(&self, nginx: &Nginx) {
        for instance in self.slots.iter().flatten() {
            nginx.wait_log(&instance.sign('+'), 1, PATIENCE);
        }
    }
}

impl Instance {
    /// How nginx's log tells of it.
    fn sign(&self, sign: char) -> String {
        sign_of(sign, self.addr)
    }

    fn stop_when_gone_from(self, nginx: &Nginx, of: Protocol) {
        nginx.wait_log(&self.sign('-'), 1, PATIENCE);
        // It answers for so long whoever was sent to it before: that is the case to be tested.
        thread::sleep(linger(of));
    }
}

/// A request with a key, for the methods that go by an argument and for `ip_hash`.
fn ask(conn: &mut Conn, key: u8) -> io::Result<Answer> {
    let client = format!("10.{key}.0.1");
    conn.request("GET", &format!("/?key={key}"), &[("X-Real-IP", &client)], "")
}

/// An instance in a line of nginx's log.
fn sign_of(sign: char, addr: SocketAddr) -> String {
    format!(" {sign}{addr} (")
}

/// A server that takes requests and answers none: it lets each wait a moment and closes the
/// connection, most times without having read from it, which resets it.
struct Faulty {
    addr: SocketAddr,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Faulty {
    fn start(addr: impl Into<SocketAddr>) -> Faulty {
        let addr = addr.into();
        let listener = TcpListener::bind(addr).unwrap_or_else(|e| panic!("faulty {addr}: {e}"));
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = thread::spawn(move || {
            for (n, stream) in listener.incoming().enumerate() {
                if stopped.load(Ordering::Relaxed) {
                    break;
                }
                let Ok(mut stream) = stream else { continue };
                thread::spawn(move || {
                    thread::sleep(HELD);
                    if n % 4 == 0 {
                        let _ = stream.read(&mut [0; 4096]);
                    }
                });
            }
        });
        Faulty { addr, stop, thread: Some(thread) }
    }
}

impl Drop for Faulty {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // It waits for a connection: here is one.
        let _ = TcpStream::connect(self.addr);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A request that waits for the only instance there is goes on to the one that came meanwhile: to
/// nginx an upstream of one peer is a special case, which leaves no second try.
#[test]
fn a_lone_instance_that_fails_is_made_up_for_by_the_next() {
    for stays in [true, false] {
        let stage = Stage::set(Protocol::Http);
        let listener = TcpListener::bind((stage.net.ip(40), stage.net.port())).unwrap();
        listener.set_nonblocking(true).unwrap();
        let lone = listener.local_addr().unwrap();
        stage.consul.register(&Service::new("web", "lone", lone));
        let nginx = stage.nginx_of_each("nginx", &stage.consul, &METHODS, |method| {
            format!("{method} consul_upstream web max_fails=0;")
        });
        let next = Backend::start(&stage.net, 20, "next");

        thread::scope(|scope| {
            let ask = |(addr, key)| scope.spawn(move || ask(&mut Conn::open(addr)?, key));
            // Several keys: some that will choose the one, and some that will choose the other.
            let each = nginx.addrs().iter().flat_map(|addr| (0..8).map(|key| (*addr, key)));
            let asked: Vec<_> = each.map(ask).collect();
            let held: Vec<TcpStream> = asked
                .iter()
                .map(|_| eventually(PATIENCE, "a request", || listener.accept()).0)
                .collect();
            stage.consul.register(&Service::new("web", "next", next.addr()));
            nginx.wait_log(&sign_of('+', next.addr()), METHODS.len(), PATIENCE);
            if !stays {
                stage.consul.deregister("lone");
                nginx.wait_log(&sign_of('-', lone), METHODS.len(), PATIENCE);
            }
            drop(held);
            for (n, asked) in asked.into_iter().enumerate() {
                let answer = asked.join().unwrap().unwrap();
                let seen = (answer.status, answer.backend(), answer.tried());
                let wanted = (200, "next", vec![lone, next.addr()]);
                assert_eq!(seen, wanted, "method {:?}", METHODS[n / 8]);
            }
        });
    }
}

/// What goes by an instance's place in the list.
const BY_PLACE: [&str; 3] = ["ip_hash;", "hash $arg_key;", "hash $arg_key consistent;"];

/// Two nginx that saw the same instances come in different orders choose alike, for the list is
/// in the order of node and service ID, after the static servers.
#[test]
fn hashes_agree_whatever_the_order_of_registration() {
    let stage = Stage::set(Protocol::Http);
    let other = Consul::builder(&stage.net, &stage.dir).host(&stage.net, 11).node("n2").start();
    let first = Backend::start(&stage.net, 30, "static");
    // By node, then by ID: neither the order of the IDs alone nor that of the addresses.
    let sorted = [("a", "9"), ("a", "x"), ("b", "1"), ("b", "10"), ("b", "2"), ("c", "0")];
    let backends: Vec<Backend> = (0..sorted.len())
        .map(|n| {
            let host = 40 - n as u8;
            Backend::start(&stage.net, host, &format!("{}/{}", sorted[n].0, sorted[n].1))
        })
        .collect();

    let start = |consul: &Consul, name: &str, methods: &[&str]| {
        stage.nginx_of_each(name, consul, methods, |method| {
            format!("{method} server {}; consul_upstream web;", first.addr())
        })
    };
    let nginx = [
        (&stage.consul, start(&stage.consul, "one", &BY_PLACE)),
        (&other, start(&other, "two", &BY_PLACE)),
    ];

    // Both end with the same instances. What comes and goes in between leaves no trace.
    let orders: [&[Step]; 2] = [
        &[Add(0), Add(1), Add(2), Add(3), Add(4), Add(5)],
        &[Add(4), Add(1), Add(5), Remove(1), Add(0), Add(3), Remove(5), Add(1), Add(2), Add(5)],
    ];
    for ((consul, nginx), steps) in nginx.iter().zip(orders) {
        for (done, step) in steps.iter().enumerate() {
            let (Add(n) | Remove(n)) = *step;
            let ((node, id), addr) = (sorted[n], backends[n].addr());
            let (path, sign, body) = match step {
                Add(_) => {
                    let service = json!({
                        "Service": "web", "ID": id, "Address": addr.ip(), "Port": addr.port(),
                    });
                    let body = json!({ "Node": node, "Address": addr.ip(), "Service": service });
                    ("/v1/catalog/register", '+', body)
                }
                Remove(_) => {
                    let body = json!({ "Node": node, "ServiceID": id });
                    ("/v1/catalog/deregister", '-', body)
                }
            };
            consul.put(path, &body.to_string());
            // One by one, or the order would not be the one of the steps.
            let same = steps[..=done].iter().filter(|&other| other == step).count();
            nginx.wait_log(&sign_of(sign, addr), same * BY_PLACE.len(), PATIENCE);
        }
    }

    for (n, method) in BY_PLACE.iter().enumerate() {
        let [one, two] = [0, 1].map(|which| {
            let mut conn = Conn::open(nginx[which].1.addrs()[n]).unwrap();
            let choice = |key| {
                let answer = ask(&mut conn, key).unwrap();
                assert_eq!(answer.status, 200);
                answer.backend().to_owned()
            };
            (0..100).map(choice).collect::<Vec<_>>()
        });
        assert_eq!(one, two, "{method}");
        let chosen: BTreeSet<&String> = one.iter().collect();
        assert_eq!(chosen.len(), sorted.len() + 1, "{method} spreads over all: {chosen:?}");
    }

    // The first turn of a new round robin of equal weights goes through the list from its head.
    let nginx = start(&other, "three", &[""]);
    let mut conn = Conn::open(nginx.addr()).unwrap();
    let turn: Vec<String> =
        (0..=sorted.len()).map(|_| conn.get("/").unwrap().backend().to_owned()).collect();
    let expected: Vec<String> = ["static".to_owned()]
        .into_iter()
        .chain(sorted.iter().map(|(node, id)| format!("{node}/{id}")))
        .collect();
    assert_eq!(turn, expected);
}

/// With `hash ... consistent` a key stays with its instance: in all workers, and in an nginx that has
/// the same addresses in its configuration. When one leaves only its own keys move, and when it is
/// back so are they.
#[test]
fn a_key_stays_with_its_instance() {
    let stage = Stage::set(Protocol::Http);
    let backends: Vec<Backend> =
        (1..=5).map(|n| Backend::start(&stage.net, 20 + n, &format!("web-{n}"))).collect();
    let services: Vec<Service> = (1..)
        .zip(&backends)
        .map(|(n, backend)| Service::new("web", &format!("web-{n}"), backend.addr()))
        .collect();
    stage.consul.register_all(&services);
    let method = "hash $arg_key consistent;";
    let nginx = stage.nginx(&format!("{method} consul_upstream web;"), "");
    let stock = |name: &str, backends: &[Backend]| {
        let servers: String =
            backends.iter().map(|backend| format!("server {};", backend.addr())).collect();
        Nginx::builder(&stage.net, &stage.dir)
            .name(name)
            .module(false)
            .workers(1)
            .http(format!("upstream app {{ zone app 256k; {method} {servers} }}"))
            .server("app")
            .start()
    };

    let all = choices(&stock("all", &backends));
    assert_eq!(all.iter().collect::<BTreeSet<_>>().len(), backends.len(), "{all:?}");
    nginx.wait_log("5 of 5 instances serve", 1, PATIENCE);
    assert_eq!(choices(&nginx), all);

    let without = choices(&stock("without", &backends[1..]));
    stage.consul.deregister("web-1");
    nginx.wait_log(&sign_of('-', backends[0].addr()), 1, PATIENCE);
    assert_eq!(choices(&nginx), without);
    for (before, after) in all.iter().zip(&without) {
        assert!(before == after || before == "web-1", "{before} has lost a key to {after}");
    }

    stage.consul.register(&services[0]);
    nginx.wait_log(&sign_of('+', backends[0].addr()), 2, PATIENCE);
    assert_eq!(choices(&nginx), all);
}

/// Where each of a hundred keys goes, which is the same in all workers, the second time as well.
fn choices(nginx: &Nginx) -> Vec<String> {
    let mut seen = Vec::new();
    for (worker, mut conn) in http::worker_conns(nginx.addr(), nginx.worker_pids()).unwrap() {
        for time in 1..=2 {
            let choice = |key| {
                let answer = ask(&mut conn, key).unwrap();
                assert_eq!(answer.status, 200);
                answer.backend().to_owned()
            };
            let chosen: Vec<String> = (0..100).map(choice).collect();
            if seen.is_empty() {
                seen = chosen;
            } else {
                assert_eq!(chosen, seen, "worker {worker}, time {time}");
            }
        }
    }
    seen
}

#[derive(Clone, Copy, PartialEq)]
enum Step {
    Add(usize),
    Remove(usize),
}

use Step::{Add, Remove};
