//! Which of Consul's answers are true, and what becomes of those that no Consul should give.

use std::collections::{BTreeMap, BTreeSet};
use std::env;
use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use testbed::http::Conn;
use testbed::{Consul, Dir, Load, Net, Nginx, Signal, eventually};

use crate::common::{
    Instance, PATIENCE, Serve, Stage, asking, changes, every_worker_serves, follower,
    memory_counts, passed_to, serves, serves_now, steady, watch, web,
};
use crate::fake_consul::{FakeConsul, Reply, entry};

const WEB: &str = "consul_upstream web;";

/// What a worker may need beside what it has for one answer, and for all the others after it.
const FLAT: u64 = 64 << 20;

/// The most memory that a process has had, in bytes.
#[track_caller]
fn peak_memory(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

/// How much processor time a process has had.
fn processor_time(pid: u32) -> Duration {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    // Its name may hold anything; the times are the 14th and the 15th field.
    let fields: Vec<&str> = stat.rsplit_once(") ").unwrap().1.split(' ').collect();
    let ticks: u64 = [fields[11], fields[12]].iter().map(|it| it.parse::<u64>().unwrap()).sum();
    // Whatever the kernel's own clock is, it tells hundredths of a second.
    Duration::from_millis(ticks * 10)
}

/// The instances that the log says were taken out.
fn taken_out(nginx: &Nginx) -> Vec<String> {
    changes(nginx, "web").into_iter().filter(|change| change.contains("-127.")).collect()
}

// ---- restarts

/// How many answers said that so many instances are there.
type Told = BTreeMap<usize, usize>;

/// Reads as a naive client does, as fast as it can, until it is told to end.
fn naive(consul: SocketAddr, end: &AtomicBool) -> Told {
    let mut told = Told::new();
    while !end.load(Ordering::Relaxed) {
        let Ok(mut conn) = Conn::open(consul) else {
            thread::sleep(Duration::from_millis(1));
            continue;
        };
        conn.set_timeout(Duration::from_secs(2));
        while let Ok(answer) = conn.get("/v1/health/service/web") {
            if answer.status == 200 {
                let entries = answer.json();
                *told.entry(entries.as_array().map_or(0, Vec::len)).or_default() += 1;
            }
            if end.load(Ordering::Relaxed) {
                break;
            }
        }
    }
    told
}

/// What makes a restart long: a log that has to be read again, with the instances at its end.
fn fill(consul: &Consul) {
    const WRITES: usize = 6_000;
    const WRITERS: usize = 8;
    let value = "v".repeat(2_000);
    thread::scope(|scope| {
        for writer in 0..WRITERS {
            let value = &value;
            scope.spawn(move || {
                let mut conn = Conn::open(consul.addr()).unwrap();
                for n in (writer..WRITES).step_by(WRITERS) {
                    let path = format!("/v1/kv/fill/{n}");
                    let answer = conn.request("PUT", &path, &[], value.clone()).unwrap();
                    assert_eq!(answer.status, 200, "{}", answer.text());
                }
            });
        }
    });
}

/// The bar: a server that was just started answers 200 with a part of the instances, and with none,
/// until it has read its log. Nothing of it is believed; no guard is needed for that.
///
/// `FULL=1` does it 20 times.
#[test]
fn a_restarted_server_takes_no_instance_out() {
    const INSTANCES: usize = 20;
    let restarts = if env::var_os("FULL").is_some() { 20 } else { 6 };
    let mut stage = Stage::with("bar", |consul| consul.persistent());
    let begin = Instant::now();
    fill(&stage.consul);
    let instances: [Instance; INSTANCES] = stage.web();
    stage.register(&instances);
    let filled = begin.elapsed();
    let names: Vec<&str> = instances.iter().map(|it| it.service.id.as_str()).collect();
    let nginx = stage.nginx().workers(2).upstream("web", "consul_upstream web hold=0;").start();
    serves_now(nginx.addr(), &names);
    let load = Load::start(nginx.addr(), &steady());

    let (end, consul) = (AtomicBool::new(false), stage.consul.addr());
    let told = thread::scope(|scope| {
        let reading = scope.spawn(|| naive(consul, &end));
        for n in 1..=restarts {
            stage.consul.kill();
            nginx.wait_log("[error]", 1, PATIENCE);
            stage.consul.restart();
            nginx.wait_log("answers again, after ", n, PATIENCE);
        }
        end.store(true, Ordering::Relaxed);
        reading.join().unwrap()
    });
    every_worker_serves(&nginx, &names);
    let report = load.stop();
    let partial: usize = told.range(..INSTANCES).map(|(_, answers)| answers).sum();
    println!(
        "{restarts} restarts in {:?} after {filled:?}: a naive reader was told (instances: \
         answers) {told:?}, {partial} of them partial; {report}",
        begin.elapsed() - filled
    );
    report.assert_nothing_lost();
    assert!(partial > 0, "Consul has told no lie that could have been believed: {told:?}");
    assert_eq!(taken_out(&nginx), Vec::<String>::new());
    // And it follows still.
    stage.consul.deregister("web-1");
    every_worker_serves(&nginx, &names[1..]);
}

/// A server whose data is lost begins anew, at a lower index. What is registered again was never
/// away.
#[test]
fn a_wiped_server_is_held_until_all_is_registered_again() {
    let mut stage = Stage::with("truth_wiped", |consul| consul.persistent());
    let instances: [Instance; 3] = stage.web();
    stage.register(&instances);
    for n in 0..20 {
        let first = instances[0].service.clone();
        stage.consul.register(&first.meta("version", &n.to_string()));
    }
    stage.register(&instances);
    let names = ["web-1", "web-2", "web-3"];
    // They come back one after the other: until the last one is there, some are missing.
    let nginx = stage.nginx().workers(2).upstream("web", "consul_upstream web guard=0%;").start();
    serves_now(nginx.addr(), &names);
    let before = stage.consul.index("web");
    let load = Load::start(nginx.addr(), &steady());

    stage.consul.kill();
    fs::remove_dir_all(stage.dir.join(format!("{}-data", stage.consul.node()))).unwrap();
    stage.consul.restart();
    nginx.wait_log("are held for 30s", 1, PATIENCE);
    every_worker_serves(&nginx, &names);
    stage.register(&instances);
    nginx.wait_log("nothing is held any longer", 1, PATIENCE);
    assert!(stage.consul.index("web") < before, "the index went back");
    every_worker_serves(&nginx, &names);
    assert_eq!(taken_out(&nginx), Vec::<String>::new());
    load.stop().assert_nothing_lost();
}

// ---- indexes

/// An index that says nothing, and an answer that comes at once for ever: the watch goes on, at a
/// bounded rate, and the next sane answer is live.
#[track_caller]
fn does_not_spin(name: &str, index: Option<&str>) {
    let (net, dir) = (Net::isolated(), Dir::new(name));
    let fake = FakeConsul::start(&net);
    let [one, two] = web(&net);
    let both = [entry("web-1", one.addr()), entry("web-2", two.addr())];
    fake.know(5, &both[..1]);
    let nginx = asking(&net, &dir, &fake.url()).upstream("web", WEB).start();
    serves_now(nginx.addr(), &["web-1"]);

    let mut reply = Reply::new(200, json!(both[..1]).to_string());
    if let Some(index) = index {
        reply = reply.header("X-Consul-Index", index);
    }
    let (begin, before) = (Instant::now(), fake.requests().len());
    fake.answer(reply);
    eventually(PATIENCE, "three seconds", || begin.elapsed() > Duration::from_secs(3));
    let (asked, seconds) = (fake.requests().len() - before, begin.elapsed().as_secs_f64());
    println!("{name}: {asked} queries in {seconds:.1} s");
    // 50 in a row, and then 50 a second.
    assert!(asked >= 2 && (asked as f64) < 60.0 + 55.0 * seconds, "{asked} queries");
    serves_now(nginx.addr(), &["web-1"]);
    fake.know(9, &both);
    serves(nginx.addr(), &["web-1", "web-2"]);
    fake.know(11, &both[1..]);
    serves(nginx.addr(), &["web-2"]);
    eventually(PATIENCE, "a query that waits", || {
        fake.requests().last().is_some_and(|request| request.index() == Some(11))
    });
}

#[test]
fn an_index_of_zero() {
    does_not_spin("index_zero", Some("0"));
}

#[test]
fn an_index_that_never_changes() {
    does_not_spin("index_unchanged", Some("5"));
}

#[test]
fn an_index_that_is_missing() {
    does_not_spin("index_missing", None);
}

#[test]
fn an_index_that_is_none() {
    for (n, index) in ["", "-1", "1.5", "18446744073709551616", "x"].into_iter().enumerate() {
        does_not_spin(&format!("index_none_{n}"), Some(index));
    }
}

#[test]
fn the_largest_index_of_all() {
    let (net, dir) = (Net::isolated(), Dir::new("index_huge"));
    let fake = FakeConsul::start(&net);
    let [one, two] = web(&net);
    let both = [entry("web-1", one.addr()), entry("web-2", two.addr())];
    fake.know(u64::MAX, &both[..1]);
    let nginx = asking(&net, &dir, &fake.url()).upstream("web", WEB).start();
    serves_now(nginx.addr(), &["web-1"]);
    eventually(PATIENCE, "a query that waits on it", || {
        fake.requests().iter().any(|request| request.index() == Some(u64::MAX))
    });
    // All others are lower: the leader is asked, and believed.
    let before = fake.requests().len();
    fake.know(7, &both);
    serves(nginx.addr(), &["web-1", "web-2"]);
    eventually(PATIENCE, "a query that waits on the other", || {
        fake.requests().last().is_some_and(|request| request.index() == Some(7))
    });
    let since: Vec<Option<u64>> = fake.requests()[before..].iter().map(|it| it.index()).collect();
    assert_eq!(since, [None, Some(7)]);
    assert_eq!(nginx.log_count("[error]"), 0);
    // And up again.
    fake.know(u64::MAX - 1, &both[1..]);
    serves(nginx.addr(), &["web-2"]);
}

/// Each source of an upstream has an index of its own.
#[test]
fn of_several_sources_one_goes_back_and_the_other_goes_on() {
    let (net, dir) = (Net::isolated(), Dir::new("index_sources"));
    let fake = FakeConsul::start(&net);
    let [one, two] = web(&net);
    let apis: [Instance; 3] =
        std::array::from_fn(|n| Instance::start(&net, "api", &format!("api-{}", n + 1)));
    let web = [&one, &two].map(|it| entry(&it.service.id, it.addr()));
    let api = [0, 1, 2].map(|n: usize| entry(&apis[n].service.id, apis[n].addr()));
    // What a query that waits is told of web, what the leader says of it, and what all say of api.
    let script = |waiting: (u64, usize), leader: (u64, usize), other: (u64, usize)| {
        let (web, api) = (web.clone(), api.clone());
        fake.script(move |request| {
            let (entries, (index, number)) = match request.index() {
                _ if request.target.contains("/api?") => (&api[..], other),
                Some(_) => (&web[..], waiting),
                None => (&web[..], leader),
            };
            (request.index() != Some(index)).then(|| Reply::health(index, &entries[..number]))
        });
    };
    script((50, 2), (50, 2), (7, 1));
    let lines = "consul_upstream web hold=0; consul_upstream api hold=0;";
    let nginx = asking(&net, &dir, &fake.url()).upstream("web", lines).start();
    serves_now(nginx.addr(), &["web-1", "web-2", "api-1"]);

    // A part of web, at an index of the past; the leader has no other news.
    script((40, 1), (50, 2), (8, 2));
    serves(nginx.addr(), &["web-1", "web-2", "api-1", "api-2"]);
    let asked = |service: &str, index: Option<u64>| {
        let path = format!("/{service}?");
        let count = |request: &&crate::fake_consul::Request| {
            request.target.contains(&path) && request.index() == index
        };
        fake.requests().iter().filter(count).count()
    };
    eventually(PATIENCE, "the leader was asked twice about web", || asked("web", None) >= 3);
    script((60, 2), (60, 2), (9, 3));
    serves(nginx.addr(), &["web-1", "web-2", "api-1", "api-2", "api-3"]);
    assert_eq!(asked("api", None), 1, "of api nobody doubts anything");
    assert_eq!(taken_out(&nginx), Vec::<String>::new());

    // Restored: the leader says so. The other one still goes on from its own index.
    script((3, 1), (3, 1), (10, 1));
    serves(nginx.addr(), &["web-1", "api-1"]);
    eventually(PATIENCE, "both wait on their own index", || {
        asked("web", Some(3)) == 1 && asked("api", Some(10)) == 1
    });
    assert_eq!((asked("api", None), nginx.log_count("[error]")), (1, 0));
}

// ---- parameters

/// Its address for other datacenters, with the port that it has there.
#[test]
fn the_wan_address_of_an_instance() {
    let stage = Stage::set("truth_wan");
    let [lan, wan, own] = stage.web();
    let both = lan.service.clone().wan(wan.addr());
    stage.consul.register_all(&[both, own.service.clone()]);
    let nginx = stage
        .nginx()
        .upstream("default", WEB)
        .upstream("lan", "consul_upstream web address=lan;")
        .upstream("wan", "consul_upstream web address=wan;")
        .start();
    let [default, near, far] = nginx.addrs() else { panic!("three servers") };
    for addr in [default, near] {
        serves_now(*addr, &["web-1", "web-3"]);
    }
    serves_now(*far, &["web-2", "web-3"]);
    assert_eq!(passed_to(*far, 10), [wan.addr(), own.addr()].into());

    // It moves there alone, and has none in the end.
    let [moved] = stage.web();
    stage.consul.register(&lan.service.clone().wan(moved.addr()));
    watch("the other upstream follows", || {
        let to = passed_to(*far, 10);
        let expected: BTreeSet<SocketAddr> = [moved.addr(), own.addr()].into();
        if to == expected { Ok(()) } else { Err(format!("{to:?}")) }
    });
    serves_now(*near, &["web-1", "web-3"]);
    assert_eq!(changes(&nginx, "lan").len(), 1, "{:?}", changes(&nginx, "lan"));
    stage.consul.register(&lan.service);
    watch("it has its own address", || {
        let to = passed_to(*far, 10);
        let expected: BTreeSet<SocketAddr> = [lan.addr(), own.addr()].into();
        if to == expected { Ok(()) } else { Err(format!("{to:?}")) }
    });
}

#[test]
fn consul_evaluates_a_filter() {
    let stage = Stage::set("truth_filter");
    let [one, two, three] = stage.web();
    let version = |instance: &Instance, version: &str, tag: &str| {
        stage.consul.register(&instance.service.clone().meta("version", version).tag(tag));
    };
    version(&one, "1", "blue");
    version(&two, "2", "blue");
    version(&three, "2", "green");
    let nginx = stage
        .nginx()
        .upstream("all", WEB)
        .upstream("web", r#"consul_upstream web 'filter=Service.Meta.version == "2"';"#)
        .upstream(
            "both",
            r#"consul_upstream web tag=blue 'filter=Service.Meta.version == "2" and "blue" in Service.Tags' hold=0;"#,
        )
        .upstream("wrong", "consul_upstream web 'filter=Service.Nothing == x';")
        .start();
    let [all, some, both, wrong] = nginx.addrs() else { panic!("four servers") };
    serves_now(*all, &["web-1", "web-2", "web-3"]);
    serves_now(*some, &["web-2", "web-3"]);
    serves_now(*both, &["web-2"]);
    // What is wrong with an expression Consul says, and asking again is of no use.
    serves_now(*wrong, &["502"]);
    let errors = nginx.wait_log("[error]", 1, PATIENCE);
    let named = |line: &&String| line.contains("consul: upstream \"wrong\": service \"web\"");
    let [error] = &errors.iter().filter(named).collect::<Vec<_>>()[..] else {
        panic!("one error: {errors:?}")
    };
    assert!(error.contains("Nothing"), "Consul says why: {error}");

    // What is left out is not there at all.
    let lines = changes(&nginx, "web");
    assert!(lines[0].contains("2 of 2 instances serve"), "{lines:?}");
    version(&one, "2", "blue");
    serves(*some, &["web-1", "web-2", "web-3"]);
    serves(*both, &["web-1", "web-2"]);
    version(&two, "3", "blue");
    serves(*some, &["web-1", "web-3"]);
    serves(*both, &["web-1"]);
    version(&one, "1", "blue");
    serves(*both, &["502"]);
    serves(*some, &["web-3"]);
    serves_now(*all, &["web-1", "web-2", "web-3"]);
}

// ---- answers that are too much

/// One instance serves. Then Consul answers `bad` to everything, and says in the end that there
/// are two: until then the one goes on, one line says what happened, and the worker needs no more
/// memory than for any answer.
#[track_caller]
fn keeps_its_set(name: &str, bad: Reply, settings: &str, says: &str) {
    let (net, dir) = (Net::isolated(), Dir::new(name));
    let fake = FakeConsul::start(&net);
    let [one, two] = web(&net);
    let both = [entry("web-1", one.addr()), entry("web-2", two.addr())];
    fake.know(5, &both[..1]);
    let nginx = asking(&net, &dir, &fake.url()).http(settings).upstream("web", WEB).start();
    serves_now(nginx.addr(), &["web-1"]);
    let worker = follower(&nginx);
    let before = peak_memory(worker);

    fake.answer(bad);
    let line = format!("consul: upstream \"web\": service \"web\" at {}: {says}", fake.url());
    nginx.wait_log(&line, 1, PATIENCE);
    fake.wait_requests(3);
    serves_now(nginx.addr(), &["web-1"]);
    assert_eq!(nginx.log_count("[error]"), 1);
    let grown = peak_memory(worker) - before;
    println!("{name}: {} kB more", grown >> 10);
    assert!(grown < FLAT || !memory_counts(), "{grown} bytes more");
    fake.know(6, &both);
    serves(nginx.addr(), &["web-1", "web-2"]);
    assert_eq!(follower(&nginx), worker);
}

/// A second instance, with something odd in it, comes and goes.
#[track_caller]
fn takes(name: &str, most: u64, change: impl FnOnce(&mut Value)) {
    let (net, dir) = (Net::isolated(), Dir::new(name));
    let fake = FakeConsul::start(&net);
    let [one, two] = web(&net);
    let mut both = [entry("web-1", one.addr()), entry("web-2", two.addr())];
    change(&mut both[1]);
    fake.know(5, &both[..1]);
    let nginx = asking(&net, &dir, &fake.url()).upstream("web", WEB).start();
    serves_now(nginx.addr(), &["web-1"]);
    let worker = follower(&nginx);
    let before = peak_memory(worker);
    fake.know(6, &both);
    serves(nginx.addr(), &["web-1", "web-2"]);
    fake.know(7, &both[..1]);
    serves(nginx.addr(), &["web-1"]);
    let grown = peak_memory(worker) - before;
    println!("{name}: {} kB more", grown >> 10);
    assert!(grown < most || !memory_counts(), "{grown} bytes more");
    assert_eq!(nginx.log_count("[error]"), 0);
    let longest = nginx.log().lines().map(str::len).max().unwrap_or_default();
    assert!(longest < 2_048, "a line of {longest} bytes");
    assert_eq!(follower(&nginx), worker);
}

fn nested(levels: usize) -> String {
    "[".repeat(levels) + &"]".repeat(levels)
}

fn health(body: impl Into<Vec<u8>>) -> Reply {
    Reply::new(200, body).header("X-Consul-Index", "9")
}

#[test]
fn two_hundred_levels_of_nesting() {
    keeps_its_set("nested", health(nested(200)), "", "invalid answer: ");
    // Where a value of any kind may stand.
    let entry = json!({
        "Node": { "Node": "n1", "Address": "127.0.0.1" },
        "Service": { "ID": "web-2", "Service": "web", "Port": "HERE" },
        "Checks": [],
    });
    let body = json!([entry]).to_string().replace("\"HERE\"", &nested(200));
    keeps_its_set("nested_port", health(body), "", "invalid answer: recursion limit exceeded");
    // And where nobody looks: however deep it is.
    let body = json!([entry]).to_string().replace("\"Port\"", "\"Other\"");
    let deep = body.replace("\"HERE\"", &nested(1_000_000));
    let half = deep[..deep.len() / 2].to_owned();
    keeps_its_set("nested_half", health(half), "", "invalid answer: ");
}

#[test]
fn a_string_of_ten_megabytes() {
    let long = "x".repeat(10_000_000);
    keeps_its_set("long_text", health(format!("\"{long}\"")), "", "invalid answer: ");
    keeps_its_set("long_key", health(format!("[{{\"{long}\": 1}}]")), "", "invalid answer: ");
    takes("long_meta", FLAT, |entry| {
        entry["Service"]["Meta"] = json!({ "notes": long, "nginx_weight": "1" });
    });
    takes("long_output", FLAT, |entry| entry["Checks"][0]["Output"] = json!(long));
    takes("long_tag", FLAT, |entry| entry["Service"]["Tags"] = json!([long]));
}

/// By its name an instance is known: there are some copies, and the log has it in brief.
#[test]
fn a_name_of_ten_megabytes() {
    const COPIES: u64 = 10 * 10_000_000;
    let long = "x".repeat(10_000_000);
    takes("long_id", COPIES, |entry| entry["Service"]["ID"] = json!(long));
    takes("long_node", COPIES, |entry| entry["Node"]["Node"] = json!(long));
}

/// Nobody has asked for it, so nobody unpacks it.
#[test]
fn a_bomb_in_gzip() {
    let unpacked = 256 << 20;
    let mut gzip = Command::new("gzip")
        .arg("-1")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("start gzip");
    let (mut input, mut output) = (gzip.stdin.take().unwrap(), gzip.stdout.take().unwrap());
    let mut bomb = Vec::new();
    thread::scope(|scope| {
        scope.spawn(move || {
            // Valid JSON, too, but for its end.
            let spaces = [b' '; 1 << 16];
            input.write_all(b"[").unwrap();
            (0..unpacked / spaces.len()).for_each(|_| input.write_all(&spaces).unwrap());
        });
        output.read_to_end(&mut bomb).unwrap();
    });
    assert!(gzip.wait().unwrap().success());
    assert!(bomb.len() < 8 << 20, "{} bytes", bomb.len());
    let reply =
        health(bomb).header("Content-Type", "application/json").header("Content-Encoding", "gzip");
    keeps_its_set("gzip", reply, "consul_max_response 1024m;", "invalid answer: ");
}

#[test]
fn nothing_is_asked_for_in_another_encoding() {
    let (net, dir) = (Net::isolated(), Dir::new("encoding"));
    let fake = FakeConsul::start(&net);
    let _nginx = asking(&net, &dir, &fake.url()).upstream("web", WEB).start();
    eventually(PATIENCE, "two queries", || fake.requests().len() >= 2);
    for request in fake.requests() {
        let asked = request.headers.get("accept-encoding").map(String::as_str);
        assert!(matches!(asked, None | Some("identity")), "{request:?}");
    }
}

// ---- answers that do not come to their end

/// A Consul of which each answer is written by the test, to who asks for a service's health.
struct Raw {
    addr: SocketAddr,
    shared: Arc<RawShared>,
}

struct RawShared {
    write: Mutex<Writing>,
    asked: AtomicUsize,
    sent: AtomicU64,
    ended: AtomicBool,
}

type Writing = Arc<dyn Fn(&mut Sender) -> io::Result<()> + Send + Sync>;

/// Counts what is sent to one client.
struct Sender<'a> {
    stream: TcpStream,
    shared: &'a RawShared,
}

impl Write for Sender<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let sent = self.stream.write(bytes)?;
        self.shared.sent.fetch_add(sent as u64, Ordering::Relaxed);
        Ok(sent)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

/// A whole answer.
fn whole(index: u64, entries: &[Value]) -> Vec<u8> {
    let body = json!(entries).to_string();
    let head = format!("X-Consul-Index: {index}\r\nContent-Length: {}", body.len());
    format!("HTTP/1.1 200 OK\r\n{head}\r\n\r\n{body}").into_bytes()
}

impl Raw {
    /// One that knows these instances, and holds no query longer than a moment.
    fn start(net: &Net, index: u64, entries: &[Value]) -> Raw {
        let listener = TcpListener::bind((net.ip(10), net.port())).expect("listen");
        let shared = Arc::new(RawShared {
            write: Mutex::new(Arc::new(|_| Ok(()))),
            asked: AtomicUsize::new(0),
            sent: AtomicU64::new(0),
            ended: AtomicBool::new(false),
        });
        let raw = Raw { addr: listener.local_addr().unwrap(), shared: shared.clone() };
        raw.know(index, entries);
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                if shared.ended.load(Ordering::Relaxed) {
                    return;
                }
                let shared = shared.clone();
                thread::spawn(move || shared.serve(stream));
            }
        });
        raw
    }

    fn url(&self) -> String {
        format!("http://{}", self.addr)
    }

    fn know(&self, index: u64, entries: &[Value]) {
        let answer = whole(index, entries);
        self.answer(move |sender| {
            thread::sleep(Duration::from_millis(20));
            sender.write_all(&answer)
        });
    }

    /// From now on each answer is written so.
    fn answer(&self, write: impl Fn(&mut Sender) -> io::Result<()> + Send + Sync + 'static) {
        *self.shared.write.lock().unwrap() = Arc::new(write);
    }

    fn asked(&self) -> usize {
        self.shared.asked.load(Ordering::Relaxed)
    }

    fn sent(&self) -> u64 {
        self.shared.sent.load(Ordering::Relaxed)
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::Relaxed);
        let _ = TcpStream::connect(self.addr);
    }
}

impl RawShared {
    fn serve(&self, stream: TcpStream) -> io::Result<()> {
        let mut lines = BufReader::new(stream.try_clone()?).lines();
        let mut sender = Sender { stream, shared: self };
        while let Some(request) = lines.next() {
            let request = request?;
            for line in lines.by_ref() {
                if line?.is_empty() {
                    break;
                }
            }
            if request.contains(" /v1/health/") {
                self.asked.fetch_add(1, Ordering::Relaxed);
                let write = self.write.lock().unwrap().clone();
                write(&mut sender)?;
            } else {
                // That it has a leader, and whatever else somebody wants to know.
                sender.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")?;
            }
        }
        Ok(())
    }
}

/// As [`keeps_its_set`], with an answer that is written by the test.
#[track_caller]
fn survives(
    name: &str,
    settings: &str,
    says: &str,
    write: impl Fn(&mut Sender) -> io::Result<()> + Send + Sync + 'static,
) {
    let (net, dir) = (Net::isolated(), Dir::new(name));
    let [one, two] = web(&net);
    let both = [entry("web-1", one.addr()), entry("web-2", two.addr())];
    let raw = Raw::start(&net, 5, &both[..1]);
    let nginx = asking(&net, &dir, &raw.url()).http(settings).upstream("web", WEB).start();
    serves_now(nginx.addr(), &["web-1"]);
    eventually(PATIENCE, "queries", || raw.asked() > 3);
    let worker = follower(&nginx);
    let before = peak_memory(worker);

    raw.answer(write);
    let line = format!("consul: upstream \"web\": service \"web\" at {}: {says}", raw.url());
    nginx.wait_log(&line, 1, PATIENCE);
    let asked = raw.asked();
    let load = Load::start(nginx.addr(), &steady());
    eventually(PATIENCE, "three more queries", || raw.asked() >= asked + 3);
    serves_now(nginx.addr(), &["web-1"]);
    load.stop().assert_nothing_lost();
    assert_eq!(nginx.log_count("[error]"), 1);
    let grown = peak_memory(worker) - before;
    println!("{name}: {} kB more, {} kB were sent", grown >> 10, raw.sent() >> 10);
    assert!(grown < FLAT || !memory_counts(), "{grown} bytes more");
    raw.know(6, &both);
    serves(nginx.addr(), &["web-1", "web-2"]);
}

/// Not even one that waits: it has the second that it asked for, and twelve beyond.
#[test]
fn one_byte_a_second() {
    let answer = whole(9, &[]);
    let times = "consul_wait 1s; consul_timeout 1s;";
    survives("one_byte", times, "no answer in time", move |sender| {
        for byte in &answer {
            sender.write_all(&[*byte])?;
            thread::sleep(Duration::from_secs(1));
        }
        Ok(())
    });
}

#[test]
fn a_stall_in_the_middle() {
    let answer = whole(9, &[entry("none", ([127, 0, 0, 1], 1).into())]);
    let times = "consul_wait 1s; consul_timeout 1s;";
    survives("stall", times, "no answer in time", move |sender| {
        sender.write_all(&answer[..answer.len() - 20])?;
        // Until the client has had enough.
        sender.stream.read(&mut [0; 1]).map(drop)
    });
}

const CHUNKED: &[u8] =
    b"HTTP/1.1 200 OK\r\nX-Consul-Index: 9\r\nTransfer-Encoding: chunked\r\n\r\n";

#[test]
fn endless_chunks_are_cut() {
    const LIMIT: u64 = 4 << 20;
    let says = format!("the answer is larger than {LIMIT} bytes, see \"consul_max_response\"");
    let (sent, answers) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let (of_all, number) = (sent.clone(), answers.clone());
    survives("endless", "consul_max_response 4m;", &says, move |sender| {
        number.fetch_add(1, Ordering::Relaxed);
        sender.write_all(CHUNKED)?;
        sender.write_all(b"1\r\n[\r\n")?;
        let chunk = [b"10000\r\n", &[b' '; 0x10000][..], b"\r\n"].concat();
        loop {
            sender.write_all(&chunk)?;
            of_all.fetch_add(0x10000, Ordering::Relaxed);
        }
    });
    // What the kernel had taken on the way to somebody who did not read it comes on top.
    let each = sent.load(Ordering::Relaxed) / answers.load(Ordering::Relaxed);
    println!("endless: cut after {} kB", each >> 10);
    assert!((LIMIT / 2..LIMIT + (16 << 20)).contains(&each), "{each} bytes each");
}

/// A chunk's size may be followed by anything, for ever.
#[test]
fn an_endless_chunk_extension_and_endless_headers() {
    survives("extension", "consul_timeout 1s;", "", |sender| {
        sender.write_all(CHUNKED)?;
        sender.write_all(b"1;")?;
        loop {
            sender.write_all(&[b'x'; 0x10000])?;
        }
    });
    survives("headers", "consul_timeout 1s;", "", |sender| {
        sender.write_all(b"HTTP/1.1 200 OK\r\n")?;
        for n in 0.. {
            sender.write_all(format!("X-Header-{n}: {}\r\n", "x".repeat(1000)).as_bytes())?;
        }
        Ok(())
    });
    survives("header", "consul_timeout 1s;", "", |sender| {
        sender.write_all(b"HTTP/1.1 200 OK\r\nX-Long: ")?;
        loop {
            sender.write_all(&[b'x'; 0x10000])?;
        }
    });
}

// ---- answers that are mostly nonsense

#[test]
fn an_answer_that_is_mostly_nonsense_takes_nothing_away() {
    let (net, dir) = (Net::isolated(), Dir::new("nonsense"));
    let fake = FakeConsul::start(&net);
    let instances: [Instance; 4] = web(&net);
    let good = [0, 1, 2, 3].map(|n: usize| entry(&instances[n].service.id, instances[n].addr()));
    let bad = |n: usize, key: &str, value: Value| {
        let mut entry = good[n].clone();
        entry["Service"][key] = value;
        entry
    };
    let mostly = [
        good[0].clone(),
        bad(1, "Port", json!(0)),
        bad(2, "Port", json!(70_000)),
        bad(3, "Address", json!("not an address")),
    ];
    // At a start nothing is known, and what is good of it serves.
    fake.know(5, &mostly);
    let conf = asking(&net, &dir, &fake.url()).workers(2).upstream("web", WEB);
    let nginx = conf.start();
    serves_now(nginx.addr(), &["web-1"]);
    assert_eq!(nginx.log_count("[error]"), 0);

    fake.know(6, &good);
    let all = ["web-1", "web-2", "web-3", "web-4"];
    every_worker_serves(&nginx, &all);
    let load = Load::start(nginx.addr(), &steady());
    fake.know(7, &mostly);
    let says = "3 of 4 instances have no valid address and port, and fewer would be left";
    nginx.wait_log(says, 1, PATIENCE);
    fake.wait_requests(2);
    every_worker_serves(&nginx, &all);
    assert_eq!(nginx.log_count("[error]"), 1);

    // Half of it is not most of it.
    fake.know(8, &[&good[..2], &mostly[2..]].concat());
    every_worker_serves(&nginx, &["web-1", "web-2"]);
    // And what takes nothing away is as good as it is.
    fake.know(9, &[&good[..2], &mostly[2..], &mostly[2..3], &mostly[3..]].concat());
    nginx.wait_log("index 8", 1, PATIENCE);
    eventually(PATIENCE, "a query with the next index", || {
        fake.requests().iter().any(|request| request.index() == Some(9))
    });
    every_worker_serves(&nginx, &["web-1", "web-2"]);
    assert_eq!(nginx.log_count("[error]"), 1);
    load.stop().assert_nothing_lost();
}

/// What is stored is not forgotten for it either.
#[test]
fn nonsense_takes_nothing_from_new_workers_either() {
    let (net, dir) = (Net::isolated(), Dir::new("nonsense_reload"));
    let fake = FakeConsul::start(&net);
    let instances: [Instance; 3] = web(&net);
    let good = [0, 1, 2].map(|n: usize| entry(&instances[n].service.id, instances[n].addr()));
    let mut bad = good.clone();
    for entry in &mut bad[1..] {
        entry["Service"]["Port"] = json!(0);
    }
    fake.know(5, &good);
    let mut nginx = asking(&net, &dir, &fake.url()).workers(2).upstream("web", WEB).start();
    let all = ["web-1", "web-2", "web-3"];
    every_worker_serves(&nginx, &all);
    fake.know(6, &bad);
    nginx.wait_log("2 of 3 instances have no valid address and port", 1, PATIENCE);
    let asked = fake.requests().len();
    nginx.reload();
    eventually(PATIENCE, "the new ones have asked", || fake.requests().len() >= asked + 2);
    every_worker_serves(&nginx, &all);
    assert_eq!(taken_out(&nginx), Vec::<String>::new());
    fake.know(7, &good[..2]);
    every_worker_serves(&nginx, &all[..2]);
}

/// A part of the truth is one for those who have just begun, too: Consul leaves out what the token
/// may not read, says so in a header or when it is asked, and new workers know what served before.
#[test]
fn what_a_token_may_not_read_is_not_gone_for_new_workers() {
    let allow = |node: bool| {
        let right = |resource: &str, name: &str, allow: bool| json!({ "Resource": resource, "Segment": name, "Access": "read", "Allow": allow });
        json!([right("service", "web", true), right("node", "n2", node)]).to_string()
    };
    for (name, header, rights, says) in [
        ("part_header", "true", allow(true), "the answer lacks what the token may not read"),
        ("part_rights", "false", allow(false), "it needs node \"n2\""),
    ] {
        let (net, dir) = (Net::isolated(), Dir::new(name));
        let fake = FakeConsul::start(&net);
        let [one, two] = web(&net);
        let mut both = [entry("web-1", one.addr()), entry("web-2", two.addr())];
        both[1]["Node"]["Node"] = json!("n2");
        fake.others(move |request| {
            let asked = request.target.starts_with("/v1/internal/acl/authorize");
            let answer = if asked { rights.clone() } else { "\"127.0.0.1:8300\"".into() };
            Some(Reply::new(200, answer))
        });
        fake.know(5, &both);
        let mut nginx = asking(&net, &dir, &fake.url()).workers(2).upstream("web", WEB).start();
        nginx.allow_log("exited on signal 9");
        every_worker_serves(&nginx, &["web-1", "web-2"]);
        let load = Load::start(nginx.addr(), &steady());
        let part = Reply::health(6, &both[..1]).header("X-Consul-Results-Filtered-By-ACLs", header);
        fake.answer(part);
        nginx.wait_log(says, 1, PATIENCE);
        nginx.reload();
        nginx.wait_log(says, 2, PATIENCE);
        every_worker_serves(&nginx, &["web-1", "web-2"]);
        assert_eq!(taken_out(&nginx), Vec::<String>::new());
        // Nor for one that takes the place of another.
        let killed = follower(&nginx);
        nginx.signal_child(killed, Signal::KILL);
        nginx.wait_log(says, 3, PATIENCE);
        every_worker_serves(&nginx, &["web-1", "web-2"]);
        assert_eq!(taken_out(&nginx), Vec::<String>::new());
        drop(load);
    }
}

// ---- one address, two instances

#[test]
fn the_second_of_two_at_one_address_takes_the_place_of_the_first() {
    let stage = Stage::set("duplicates");
    let [one, two] = stage.web();
    // Nothing else serves: a gap would be a 502.
    let twin = |id: &str| {
        let mut twin = one.service.clone();
        twin.id = id.into();
        twin
    };
    stage.register([&one]);
    stage.consul.register_all(&[twin("web-2"), twin("web-3")]);
    let nginx = stage.nginx().workers(2).upstream("web", "consul_upstream web hold=0;").start();
    serves_now(nginx.addr(), &["web-1"]);
    assert_eq!(passed_to(nginx.addr(), 10), [one.addr()].into());
    let first = changes(&nginx, "web").remove(0);
    let begins = format!("+{} (web-1), 1 of 3 instances serve", one.addr());
    assert!(first.starts_with(&begins), "{first}");
    let load = Load::start(nginx.addr(), &steady().keepalive(false));

    for (gone, next) in [("web-1", "web-2"), ("web-2", "web-3")] {
        stage.consul.deregister(gone);
        let lines = nginx.wait_log(&format!("+{} ({next})", one.addr()), 1, PATIENCE);
        assert!(lines[0].contains(&format!("-{} ({gone})", one.addr())), "{lines:?}");
        load.wait_for(100);
    }
    // An earlier one comes back, and a real second one.
    stage.register([&one]);
    nginx.wait_log(&format!("+{} (web-1)", one.addr()), 2, PATIENCE);
    let second = twin("web-2").port(two.addr().port());
    stage.consul.register(&second);
    serves(nginx.addr(), &["web-1", "web-2"]);
    load.wait_for(100);
    load.stop().assert_nothing_lost();
    let second: SocketAddr = two.addr();
    assert_eq!(passed_to(nginx.addr(), 10), [one.addr(), second].into());
}

/// Tests that judge a time: they run alone, at the end.
mod timed {
    use super::*;

    /// As fast as it can be asked: what comes in between is skipped, and the last one counts.
    #[test]
    fn a_service_that_flaps_costs_a_bounded_part_of_a_core() {
        const TIME: Duration = Duration::from_secs(10);
        let (net, dir) = (Net::isolated(), Dir::new("flaps"));
        let fake = FakeConsul::start(&net);
        let instances: [Instance; 20] = web(&net);
        let all: Vec<Value> = instances.iter().map(|it| entry(&it.service.id, it.addr())).collect();
        let some: Vec<Value> = all.iter().step_by(2).cloned().collect();
        fake.know(5, &all);
        let nginx = asking(&net, &dir, &fake.url()).upstream("web", WEB).start();
        let names: Vec<&str> = instances.iter().map(|it| it.service.id.as_str()).collect();
        serves_now(nginx.addr(), &names);

        // A state for each millisecond, and for each answer that comes sooner.
        let (begin, count) = (Instant::now(), AtomicU64::new(0));
        let bodies = [&all, &some].map(|set| json!(set).to_string());
        fake.script(move |_| {
            let number = count.fetch_add(1, Ordering::Relaxed);
            let index = (6 + begin.elapsed().as_millis() as u64).max(number);
            let body = bodies[(number % 2) as usize].clone();
            Some(Reply::new(200, body).header("X-Consul-Index", &(2 * index).to_string()))
        });
        let worker = follower(&nginx);
        let (begin, before, asked) =
            (Instant::now(), processor_time(worker), fake.requests().len());
        eventually(2 * TIME, "its time is over", || begin.elapsed() >= TIME);
        let (took, used) = (begin.elapsed(), processor_time(worker) - before);
        let (answers, seen) = (fake.requests().len() - asked, changes(&nginx, "web").len());
        let share = used.as_secs_f64() / took.as_secs_f64();
        println!(
            "flaps: {answers} answers, {seen} changes in {took:?}: {:.1} % of a core",
            share * 100.0
        );
        assert!(
            seen > 100 && answers as f64 <= 60.0 + 55.0 * took.as_secs_f64(),
            "{answers} {seen}"
        );
        assert!(share < 0.6, "{share}");

        fake.know(1_000_000, &all[..3]);
        serves(nginx.addr(), &names[..3]);
        eventually(PATIENCE, "a query that waits", || {
            fake.requests().last().is_some_and(|request| request.index() == Some(1_000_000))
        });
        assert_eq!(follower(&nginx), worker);
        assert_eq!(nginx.log_count("[error]"), 0);
    }
}
