//! What is kept of each upstream for a start without Consul, and what goes wrong with its files.

use std::collections::BTreeSet;
use std::fs::{self, File, Metadata, Permissions};
use std::io::Write;
use std::net::TcpStream;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use consul_watch::state::{State, Store};
use serde_json::{Value, json};
use testbed::http::{self, Conn};
use testbed::{Dir, Load, Net, Nginx, Signal, eventually, nginx};

use crate::common::{
    Instance, PATIENCE, Serve, Stage, asking, changes, every_worker_serves, follower, followers,
    met, serves, serves_now, shares, steady, web,
};
use crate::fake_consul::{FakeConsul, Reply, entry};

/// What is left for a start that waits for nobody, on a machine that is busy.
const PROMPT: Duration = Duration::from_secs(5);

/// A wait for Consul that no test would outlast.
const WAITS: &str = "consul_start_timeout 60s;";

/// A wait for Consul that is over soon.
const WAITS_NOT: &str = "consul_start_timeout 300ms;";

const WEB: &str = "consul_upstream web;";

/// Where nginx keeps its states by default.
fn kept(dir: &Dir) -> PathBuf {
    dir.join("nginx/consul_state")
}

/// What is stored of an upstream, as the next start would read it.
fn load(path: &Path, upstream: &str) -> Result<State, String> {
    let state = Store::new(path.to_owned()).load(upstream).map_err(|error| error.to_string())?;
    state.ok_or_else(|| format!("nothing is stored of {upstream}"))
}

/// The service IDs that are stored of an upstream.
fn ids(path: &Path, upstream: &str) -> Result<BTreeSet<String>, String> {
    let state = load(path, upstream)?;
    Ok(state.sources.into_iter().flat_map(|it| it.peers).map(|peer| peer.id.clone()).collect())
}

/// Waits until these are stored, and no others.
#[track_caller]
fn wait_stored(path: &Path, upstream: &str, expected: &[&str]) {
    let wanted: BTreeSet<String> = expected.iter().map(|&id| id.to_owned()).collect();
    eventually(PATIENCE, &format!("{expected:?} are stored of {upstream}"), || {
        let stored = ids(path, upstream)?;
        if stored == wanted { Ok(()) } else { Err(format!("{stored:?}")) }
    });
}

/// What a directory has, in order.
fn names(path: &Path) -> Vec<String> {
    let entries = fs::read_dir(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// What tells one writing of a file from another.
fn written(path: &Path) -> Option<(u64, i64, i64)> {
    let data = fs::metadata(path).ok()?;
    Some((data.ino(), data.mtime(), data.mtime_nsec()))
}

fn mode(data: &Metadata) -> u32 {
    data.permissions().mode() & 0o7777
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Whether a test that only root can run is to be left out.
fn not_root(test: &str) -> bool {
    if !is_root() {
        eprintln!("{test}: left out, it takes root");
    }
    !is_root()
}

/// The same configuration with workers that are nobody's, if root starts it.
fn as_nobody(conf: &nginx::Builder) -> nginx::Builder {
    // What nobody's group is called is not the same everywhere.
    conf.clone().text(conf.conf().replacen("user root;", "user nobody root;", 1))
}

/// Starts nginx, and makes sure that it has waited for nobody.
#[track_caller]
fn starts_at_once(conf: &nginx::Builder) -> Nginx {
    let begin = Instant::now();
    let nginx = conf.clone().start();
    assert!(begin.elapsed() < PROMPT, "{:?}", begin.elapsed());
    nginx
}

fn stored_servers(nginx: &Nginx) -> usize {
    nginx.log_count("stored servers, until Consul answers")
}

/// How many sets a service goes through that [`flap`]s: whoever looks at it every second, or after
/// some fifty changes, does not meet the same one each time.
const SETS: u32 = 11;

/// Another set each time that somebody asks.
fn flap(fake: &FakeConsul, set: impl Fn(u32) -> Vec<Value>) {
    let bodies: Vec<String> = (0..SETS).map(|n| json!(set(n)).to_string()).collect();
    let count = AtomicU64::new(1_000);
    fake.script(move |_| {
        let n = count.fetch_add(1, Ordering::Relaxed);
        let body = bodies[(n % u64::from(SETS)) as usize].clone();
        Some(Reply::new(200, body).header("X-Consul-Index", &n.to_string()))
    });
}

// ---- the files

#[test]
fn a_directory_for_the_workers_alone_and_a_file_for_each_upstream() {
    let stage = Stage::set("state_files");
    let [one, two] = stage.web();
    stage.register([&one, &two]);
    let conf = stage
        .nginx()
        .upstream("web", WEB)
        .http("upstream \"a b/é%\" { zone b 256k; consul_upstream web; }")
        .http("upstream .hidden { zone c 256k; consul_upstream none; }")
        .http(format!("upstream plain {{ server {}; }}", one.addr()));
    let path = kept(&stage.dir);
    assert!(conf.config_test().ok);
    assert!(!path.exists(), "a configuration test makes nothing");

    let nginx = conf.start();
    wait_stored(&path, "web", &["web-1", "web-2"]);
    wait_stored(&path, "a b/é%", &["web-1", "web-2"]);
    wait_stored(&path, ".hidden", &[]);
    assert_eq!(names(&path), ["%2Ehidden.json", "a%20b%2F%C3%A9%25.json", "web.json"]);
    let data = fs::metadata(&path).unwrap();
    assert_eq!((mode(&data), data.uid()), (0o700, rustix::process::geteuid().as_raw()));
    for name in names(&path) {
        let data = fs::metadata(path.join(&name)).unwrap();
        assert_eq!((mode(&data), data.is_file()), (0o600, true), "{name}");
    }
    drop(nginx);
    assert_eq!(names(&path).len(), 3, "the end leaves nothing beside them");
}

#[test]
fn the_directory_belongs_to_the_workers() {
    if not_root("the_directory_belongs_to_the_workers") {
        return;
    }
    let mut stage = Stage::set("state_nobody");
    let [one, two] = stage.web();
    stage.register([&one]);
    let conf = stage.nginx().http(WAITS).upstream("web", WEB);
    let conf = as_nobody(&conf);
    let mut nginx = conf.clone().start();
    let path = kept(&stage.dir);
    wait_stored(&path, "web", &["web-1"]);
    let nobody = fs::metadata(format!("/proc/{}", nginx.worker_pids()[0])).unwrap().uid();
    assert_ne!(nobody, 0);
    let owned = || {
        for (path, wanted) in [(path.clone(), 0o700), (path.join("web.json"), 0o600)] {
            let data = fs::metadata(&path).unwrap();
            assert_eq!((mode(&data), data.uid()), (wanted, nobody), "{}", path.display());
        }
    };
    owned();
    nginx.reload();
    stage.register([&two]);
    wait_stored(&path, "web", &["web-1", "web-2"]);
    owned();
    drop(nginx);
    stage.consul.stop();
    let nginx = starts_at_once(&conf);
    serves_now(nginx.addr(), &["web-1", "web-2"]);
}

#[test]
fn off_keeps_nothing() {
    let mut stage = Stage::set("state_off");
    let [one] = stage.web();
    stage.register([&one]);
    let conf = stage.nginx().http("consul_state_path off;").http(WAITS_NOT).upstream("web", WEB);
    let nginx = conf.clone().start();
    serves_now(nginx.addr(), &["web-1"]);
    stage.consul.stop();
    drop(nginx);
    let nginx = conf.start();
    serves_now(nginx.addr(), &["502"]);
    assert_eq!(nginx.log_count("[warn]"), 1, "no answer yet");
    nginx.wait_log("no answer yet", 1, PATIENCE);
    drop(nginx);
    let left = names(&stage.dir.join("nginx"));
    assert!(!left.iter().any(|name| name.contains("state")), "{left:?}");
}

// ---- starts without Consul

#[test]
fn a_start_without_consul_serves_what_was_stored() {
    let mut stage = Stage::set("state_cold");
    let [one, two] = stage.web();
    stage.register([&one, &two]);
    let conf = stage.nginx().http(WAITS).workers(2).upstream("web", WEB);
    let nginx = conf.clone().start();
    wait_stored(&kept(&stage.dir), "web", &["web-1", "web-2"]);
    assert_eq!(stored_servers(&nginx), 0);
    drop(nginx);
    stage.consul.stop();

    let nginx = starts_at_once(&conf);
    for (_, mut conn) in http::worker_conns(nginx.addr(), nginx.worker_pids()).unwrap() {
        assert_eq!(conn.get("/").unwrap().status, 200);
    }
    every_worker_serves(&nginx, &["web-1", "web-2"]);
    assert_eq!(nginx.log_count("no live upstreams"), 0, "not even the first request failed");
    nginx.wait_log("[notice]", 1, PATIENCE);
    nginx.wait_log("upstream \"web\": 2 stored servers, until Consul answers", 1, PATIENCE);
    assert_eq!(stored_servers(&nginx), 1);
    assert_eq!(nginx.log_count("no answer yet"), 1);
}

/// A Consul that was wiped says for a while that there is nobody. That is a loss to hold, also where
/// it is the first thing that is heard of it; another set is one to take.
#[test]
fn an_empty_consul_comes_back_and_then_another_set() {
    let mut stage = Stage::set("state_replaced");
    let [one, two, three] = stage.web();
    stage.register([&one, &two]);
    let conf = stage.nginx().http(WAITS).workers(2).upstream("web", WEB);
    let nginx = conf.clone().start();
    let path = kept(&stage.dir);
    wait_stored(&path, "web", &["web-1", "web-2"]);
    drop(nginx);
    stage.consul.kill();

    let nginx = starts_at_once(&conf);
    every_worker_serves(&nginx, &["web-1", "web-2"]);
    let load = Load::start(nginx.addr(), &steady());
    // In development mode it forgets all.
    stage.consul.restart();
    let held = nginx.wait_log("are held for 30s", 1, PATIENCE);
    assert!(held[0].contains("takes 2 of 2 instances out (web-1, web-2)"), "{held:?}");
    every_worker_serves(&nginx, &["web-1", "web-2"]);
    assert_eq!(ids(&path, "web").unwrap().len(), 2, "what serves is what is stored");

    stage.register([&three]);
    every_worker_serves(&nginx, &["web-3"]);
    nginx.wait_log("nothing is held any longer", 1, PATIENCE);
    wait_stored(&path, "web", &["web-3"]);
    load.stop().assert_nothing_lost();
}

#[test]
fn an_empty_answer_to_stored_servers_is_held_for_the_time_of_hold() {
    let (net, dir) = (Net::isolated(), Dir::new("state_held"));
    let fake = FakeConsul::start(&net);
    let [one, two] = web(&net);
    let both = [entry("web-1", one.addr()), entry("web-2", two.addr())];
    let hold = Duration::from_secs(3);
    let conf = asking(&net, &dir, &fake.url())
        .http(WAITS)
        .upstream("web", "consul_upstream web hold=3s;")
        .upstream("not", "consul_upstream web hold=0;");
    fake.know(5, &both);
    let nginx = conf.clone().start();
    wait_stored(&kept(&dir), "web", &["web-1", "web-2"]);
    wait_stored(&kept(&dir), "not", &["web-1", "web-2"]);
    drop(nginx);

    fake.know(9, &[]);
    let begin = Instant::now();
    let nginx = starts_at_once(&conf);
    let [held, not] = nginx.addrs() else { panic!("two servers") };
    serves_now(*not, &["502"]);
    serves_now(*held, &["web-1", "web-2"]);
    assert!(begin.elapsed() < hold, "the machine is too slow for this test");
    nginx.wait_log("Consul still says so after 3s", 1, PATIENCE);
    assert!(begin.elapsed() >= hold, "{:?}", begin.elapsed());
    serves(*held, &["502"]);
    wait_stored(&kept(&dir), "web", &[]);
    assert_eq!(nginx.log_count("are held for"), 1);
}

#[test]
fn reloads_while_consul_is_away_serve_on() {
    let mut stage = Stage::with("state_reload", |consul| consul.persistent());
    let [one, two, three] = stage.web();
    stage.register([&one, &two]);
    let mut nginx = stage.nginx().http(WAITS).workers(2).upstream("web", WEB).start();
    let path = kept(&stage.dir);
    wait_stored(&path, "web", &["web-1", "web-2"]);
    let load = Load::start(nginx.addr(), &steady());
    stage.consul.kill();
    nginx.wait_log("[error]", 1, PATIENCE);
    let before = written(&path.join("web.json"));
    for n in 1..=3 {
        let begin = Instant::now();
        nginx.reload();
        assert!(begin.elapsed() < PROMPT, "{:?}", begin.elapsed());
        load.wait_for(50);
        every_worker_serves(&nginx, &["web-1", "web-2"]);
        assert_eq!(nginx.log_count("2 servers taken over"), n);
    }
    assert_eq!(stored_servers(&nginx), 0);
    assert_eq!(written(&path.join("web.json")), before);

    stage.consul.restart();
    stage.register([&three]);
    every_worker_serves(&nginx, &["web-1", "web-2", "web-3"]);
    wait_stored(&path, "web", &["web-1", "web-2", "web-3"]);
    load.stop().assert_nothing_lost();
    let changes = changes(&nginx, "web");
    assert!(!changes.iter().any(|line| line.starts_with('-')), "none ever left: {changes:?}");
}

/// Stored servers are the answer to one question; to another one they are none.
#[test]
fn to_another_question_the_stored_servers_are_no_answer() {
    let (net, dir) = (Net::isolated(), Dir::new("state_other"));
    let (fake, other) = (FakeConsul::start(&net), FakeConsul::start(&net));
    let [one] = web(&net);
    let mut tagged = entry("web-1", one.addr());
    tagged["Service"]["Tags"] = json!(["blue", "new"]);
    fake.know(5, &[tagged]);
    let base = asking(&net, &dir, &fake.url()).http(WAITS_NOT);
    let addr = (net.ip(1), net.port()).into();
    let asks = |line: &str| {
        let upstream = format!("upstream web {{ zone web 256k; {line} }}");
        base.clone().http(upstream).server_on(addr, "web")
    };
    let nginx = asks("consul_upstream web tag=blue tag=new;").start();
    let path = kept(&dir);
    wait_stored(&path, "web", &["web-1"]);
    let before = written(&path.join("web.json"));
    drop(nginx);

    for silent in [&fake, &other] {
        silent.script(|_| None);
    }
    let web = "consul_upstream web tag=blue tag=new";
    let elsewhere = format!("consul_address {}; {web};", other.url());
    let both = format!("consul_address {} {}; {web};", fake.url(), other.url());
    for line in [
        "consul_upstream api tag=blue tag=new;",
        "consul_upstream web tag=blue;",
        "consul_upstream web tag=blue tag=new tag=x;",
        &format!("{web} dc=dc2;"),
        &format!("{web} ns=x;"),
        &format!("{web} health=any;"),
        &format!("{web} address=wan;"),
        &format!("{web} filter=Service.Port;"),
        &elsewhere,
        &both,
    ] {
        let nginx = asks(line).start();
        serves_now(addr, &["502"]);
        assert_eq!(stored_servers(&nginx), 0, "{line}");
        nginx.wait_log("upstream \"web\": no answer yet", 1, PATIENCE);
        drop(nginx);
        fs::remove_file(dir.join("nginx.log")).unwrap();
    }
    assert_eq!(written(&path.join("web.json")), before, "nobody has answered");

    // What a line does with the instances is no part of the question.
    for line in [
        "consul_upstream web tag=new tag=blue;",
        &format!("{web} weight=7 max_fails=0 max_conns=9 fail_timeout=1s;"),
        &format!("{web} guard=50% hold=1s panic=50% backup;"),
        &format!("consul_token x; consul_wait 5s; consul_consistency stale; {web};"),
        &format!("consul_upstream api; {web};"),
    ] {
        let nginx = asks(line).start();
        serves_now(addr, &["web-1"]);
        assert_eq!(stored_servers(&nginx), 1, "{line}");
        drop(nginx);
        fs::remove_file(dir.join("nginx.log")).unwrap();
    }
}

/// Its own sources each keep theirs.
#[test]
fn of_several_sources_each_has_its_own() {
    let (net, dir) = (Net::isolated(), Dir::new("state_sources"));
    let fake = FakeConsul::start(&net);
    let [one, two] = web(&net);
    let (api, web) = (entry("web-1", one.addr()), entry("web-2", two.addr()));
    fake.script(move |request| match (request.target.contains("/api"), request.index()) {
        (_, Some(_)) => None,
        (true, None) => Some(Reply::health(7, std::slice::from_ref(&api))),
        (false, None) => Some(Reply::health(5, std::slice::from_ref(&web))),
    });
    let base = asking(&net, &dir, &fake.url()).http(WAITS_NOT);
    let addr = (net.ip(1), net.port()).into();
    let asks = |lines: &str| {
        let upstream = format!("upstream web {{ zone web 256k; {lines} }}");
        base.clone().http(upstream).server_on(addr, "web")
    };
    let both = "consul_upstream api; consul_upstream web backup;";
    let nginx = asks(both).start();
    wait_stored(&kept(&dir), "web", &["web-1", "web-2"]);
    drop(nginx);

    fake.script(|_| None);
    let nginx = asks(both).start();
    serves_now(addr, &["web-1"]);
    nginx.wait_log("2 stored servers", 1, PATIENCE);
    drop(nginx);
    // The one that is still asked for.
    let nginx = asks("consul_upstream none; consul_upstream web;").start();
    serves_now(addr, &["web-2"]);
    nginx.wait_log("1 stored servers", 1, PATIENCE);
}

#[test]
fn what_an_instance_says_of_itself_is_stored_too() {
    let mut stage = Stage::set("state_meta");
    let [one, two, three, four] = stage.web();
    let says = |instance: Instance, key: &str, value: &str| {
        instance.with(|service| service.meta(key, value))
    };
    let one = says(one, "nginx_weight", "3");
    let two = two.with(|service| service.weights(2, 1));
    let three = says(three, "nginx_backup", "yes");
    let four = says(four, "nginx_down", "1");
    stage.register([&one, &two, &three, &four]);
    let conf = stage.nginx().http(WAITS).upstream("web", WEB);
    let nginx = conf.clone().start();
    let all = ["web-1", "web-2", "web-3", "web-4"];
    wait_stored(&kept(&stage.dir), "web", &all);
    let spread = [("web-1", 30), ("web-2", 20)];
    shares(nginx.addr(), &spread);
    drop(nginx);
    stage.consul.stop();

    let nginx = starts_at_once(&conf);
    shares(nginx.addr(), &spread);
    one.backend.stop();
    two.backend.stop();
    serves(nginx.addr(), &["web-3"]);
    assert_eq!((four.backend.requests(), stored_servers(&nginx)), (0, 1));
}

// ---- files that are none

/// What is damaged is no set, with a warning that says why; and it is replaced by what Consul says.
#[test]
fn a_damaged_file_is_a_warning_and_is_replaced() {
    let (net, dir) = (Net::isolated(), Dir::new("state_damaged"));
    let fake = FakeConsul::start(&net);
    let [one] = web(&net);
    let entries = [entry("web-1", one.addr())];
    fake.know(5, &entries);
    let conf = asking(&net, &dir, &fake.url())
        .http(WAITS_NOT)
        .upstream("web", WEB)
        .http("upstream other { zone other 256k; consul_upstream web; }");
    let path = kept(&dir);
    let file = path.join("web.json");
    let nginx = conf.clone().start();
    wait_stored(&path, "web", &["web-1"]);
    wait_stored(&path, "other", &["web-1"]);
    drop(nginx);
    let good = fs::read(&file).unwrap();

    let edited = |from: &str, to: &str| {
        let text = String::from_utf8(good.clone()).unwrap();
        assert!(text.contains(from), "{text}");
        text.replacen(from, to, 1).into_bytes()
    };
    let checksum = "it has a wrong checksum";
    for (bytes, flaw) in [
        (Vec::new(), "it is no state file"),
        (b"\x00\xff[emerg] \n[emerg] {".to_vec(), "it is no state file"),
        (good[..good.len() / 2].to_vec(), checksum),
        (good[..good.len() - 1].to_vec(), checksum),
        ([&good[..], b" "].concat(), checksum),
        (edited("web-1", "web-2"), checksum),
        (edited("\"version\":1", "\"version\":2"), "it has version 2, not 1"),
        (fs::read(path.join("other.json")).unwrap(), "it belongs to upstream \"other\""),
    ] {
        fs::write(&file, bytes).unwrap();
        fake.script(|_| None);
        let nginx = conf.clone().start();
        let line = format!("refused \"{}\", {flaw}", file.display());
        let lines = nginx.wait_log(&line, 1, PATIENCE);
        let [line] = &lines[..] else { panic!("one line: {lines:?}") };
        assert!(line.contains("[warn]") && line.contains("upstream \"web\""), "{line}");
        assert_eq!(nginx.log_count("it starts without stored servers"), 1);
        assert_eq!(stored_servers(&nginx), 1, "the other one's");
        serves_now(nginx.addr(), &["502"]);

        fake.know(5, &entries);
        serves(nginx.addr(), &["web-1"]);
        wait_stored(&path, "web", &["web-1"]);
        drop(nginx);
        assert_eq!(fs::read(&file).unwrap(), good);
        fs::remove_file(dir.join("nginx.log")).unwrap();
    }
}

#[test]
fn a_directory_in_a_files_place_is_a_warning() {
    let mut stage = Stage::set("state_dir_for_file");
    let [one, two] = stage.web();
    stage.register([&one]);
    let path = kept(&stage.dir);
    let in_the_way = path.join("web.json");
    fs::create_dir_all(&in_the_way).unwrap();
    let conf = stage.nginx().http(WAITS_NOT).upstream("web", WEB);
    let nginx = conf.clone().start();
    serves_now(nginx.addr(), &["web-1"]);
    let refused = nginx.wait_log("it is no regular file", 1, PATIENCE);
    assert!(refused[0].contains("it starts without stored servers"), "{refused:?}");
    let line = format!("cannot write \"{}\"", in_the_way.display());
    nginx.wait_log(&line, 1, PATIENCE);
    stage.register([&two]);
    serves(nginx.addr(), &["web-1", "web-2"]);

    fs::remove_dir(&in_the_way).unwrap();
    wait_stored(&path, "web", &["web-1", "web-2"]);
    assert_eq!(names(&path), ["web.json"], "nothing is left of the attempts");
    assert_eq!(nginx.log_count("[warn]"), 2);
    drop(nginx);
    stage.consul.stop();
    let nginx = conf.start();
    serves_now(nginx.addr(), &["web-1", "web-2"]);
}

#[test]
fn a_directory_that_cannot_be_made_is_one_warning() {
    let mut stage = Stage::set("state_no_dir");
    let [one, two] = stage.web();
    stage.register([&one]);
    let path = kept(&stage.dir);
    // A file in its place, and one in the place of what is above it.
    stage.dir.write("nginx/consul_state", "not a directory");
    for (number, (setting, shown)) in
        [("", path.clone()), ("consul_state_path consul_state/deeper;", path.join("deeper"))]
            .into_iter()
            .enumerate()
    {
        let conf = stage
            .nginx()
            .name("nginx")
            .http(WAITS_NOT)
            .http(setting)
            .workers(2)
            .upstream("web", WEB)
            .http("upstream again { zone again 256k; consul_upstream web; }");
        let mut nginx = conf.start();
        every_worker_serves(&nginx, &["web-1"]);
        if number == 0 {
            stage.register([&two]);
            every_worker_serves(&nginx, &["web-1", "web-2"]);
            stage.consul.deregister("web-2");
        }
        every_worker_serves(&nginx, &["web-1"]);
        let line = format!("consul: cannot make the directory \"{}\"", shown.display());
        let lines = nginx.wait_log(&line, 1, PATIENCE);
        assert!(lines[0].contains("[warn]"), "{lines:?}");
        assert_eq!(nginx.log_count("[warn]"), 1, "{}", nginx.log());
        // The next configuration is another attempt.
        fs::remove_file(&path).unwrap();
        nginx.reload();
        wait_stored(&shown, "web", &["web-1"]);
        assert_eq!(nginx.log_count("[warn]"), 1);
        drop(nginx);
        fs::remove_file(stage.dir.join("nginx.log")).unwrap();
        fs::remove_dir_all(&path).unwrap();
        stage.dir.write("nginx/consul_state", "not a directory");
    }
    stage.consul.stop();
}

/// Root may write anywhere: its workers are nobody's here.
#[test]
fn a_directory_without_rights_is_a_warning_until_there_are_some() {
    let stage = Stage::set("state_read_only");
    let [one, two, three] = stage.web();
    stage.register([&one]);
    let path = kept(&stage.dir);
    fs::create_dir_all(&path).unwrap();
    fs::set_permissions(&path, Permissions::from_mode(0o555)).unwrap();
    let conf = stage.nginx().http(WAITS_NOT).upstream("web", WEB);
    let nginx = as_nobody(&conf).start();
    serves_now(nginx.addr(), &["web-1"]);
    let lines = nginx.wait_log("cannot write", 1, PATIENCE);
    let shown = path.join("web.json");
    let line = format!("upstream \"web\": cannot write \"{}\": ", shown.display());
    assert!(lines[0].contains("[warn]") && lines[0].contains(&line), "{lines:?}");
    assert!(lines[0].contains("ermission denied"), "{lines:?}");
    for more in [&two, &three] {
        stage.register([more]);
    }
    serves(nginx.addr(), &["web-1", "web-2", "web-3"]);
    fs::set_permissions(&path, Permissions::from_mode(0o777)).unwrap();
    wait_stored(&path, "web", &["web-1", "web-2", "web-3"]);
    assert_eq!(nginx.log_count("[warn]"), 1);
}

#[test]
fn a_file_that_may_not_be_read_is_a_warning() {
    let (net, dir) = (Net::isolated(), Dir::new("state_unreadable"));
    let fake = FakeConsul::start(&net);
    let [one] = web(&net);
    let entries = [entry("web-1", one.addr())];
    fake.know(5, &entries);
    let conf = as_nobody(&asking(&net, &dir, &fake.url()).http(WAITS_NOT).upstream("web", WEB));
    let path = kept(&dir);
    let nginx = conf.clone().start();
    wait_stored(&path, "web", &["web-1"]);
    drop(nginx);
    // Of root's; where the test is not root's, nobody's to read.
    let file = path.join("web.json");
    let bytes = fs::read(&file).unwrap();
    fs::remove_file(&file).unwrap();
    fs::write(&file, bytes).unwrap();
    let closed = if is_root() { 0o600 } else { 0o000 };
    fs::set_permissions(&file, Permissions::from_mode(closed)).unwrap();

    fake.script(|_| None);
    let nginx = conf.start();
    serves_now(nginx.addr(), &["502"]);
    let lines = nginx.wait_log(&format!("cannot read \"{}\"", file.display()), 1, PATIENCE);
    assert!(lines[0].contains("[warn]") && lines[0].contains("without stored"), "{lines:?}");
    // It is their directory: they may replace what is in it.
    fake.know(5, &entries);
    serves(nginx.addr(), &["web-1"]);
    wait_stored(&path, "web", &["web-1"]);
}

/// A small file system of its own, gone with the value.
struct Tmpfs(PathBuf);

impl Tmpfs {
    /// What `mount` says where it may not.
    fn mount(path: PathBuf, size: &str) -> Result<Tmpfs, String> {
        fs::create_dir_all(&path).unwrap();
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &format!("size={size},mode=0700"), "tmpfs"]).arg(&path);
        let said = mount.output().map_err(|error| error.to_string())?;
        if said.status.success() {
            Ok(Tmpfs(path))
        } else {
            Err(String::from_utf8_lossy(&said.stderr).trim().to_owned())
        }
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let gone = Command::new("umount").arg(&self.0).status().is_ok_and(|it| it.success());
        if !gone {
            // A test that fails may still have an nginx that looks into it.
            let _ = Command::new("umount").arg("-l").arg(&self.0).status();
        }
    }
}

#[test]
fn a_full_disk_is_one_warning_and_the_set_is_stored_when_there_is_room() {
    let stage = Stage::set("state_full");
    let path = kept(&stage.dir);
    let tmpfs = match Tmpfs::mount(path.clone(), "64k") {
        Ok(tmpfs) => tmpfs,
        Err(error) => {
            eprintln!("left out, nothing can be mounted here: {error}");
            return;
        }
    };
    let [one, two, three] = stage.web();
    stage.register([&one]);
    let nginx = stage.nginx().http(WAITS_NOT).workers(2).upstream("web", WEB).start();
    wait_stored(&path, "web", &["web-1"]);
    let load = Load::start(nginx.addr(), &steady());
    let filler = path.join("filler");
    let mut file = File::create(&filler).unwrap();
    while file.write_all(&[0; 4096]).is_ok() {}
    drop(file);

    stage.register([&two]);
    let lines = nginx.wait_log("cannot write", 1, PATIENCE);
    assert!(lines[0].contains("[warn]") && lines[0].contains("o space left"), "{lines:?}");
    every_worker_serves(&nginx, &["web-1", "web-2"]);
    stage.register([&three]);
    every_worker_serves(&nginx, &["web-1", "web-2", "web-3"]);
    assert_eq!(ids(&path, "web").unwrap(), ["web-1".to_owned()].into(), "what was there is");
    // It is tried again and again, and that is not worth another line.
    load.wait_for(2_000);
    assert_eq!(names(&path), ["filler", "web.json"]);

    fs::remove_file(&filler).unwrap();
    wait_stored(&path, "web", &["web-1", "web-2", "web-3"]);
    assert_eq!(nginx.log_count("[warn]"), 1);
    load.stop().assert_nothing_lost();
    drop(nginx);
    drop(tmpfs);
}

// ---- when it is written

/// Looks at a file until it is told to end, and keeps each writing that it has seen.
fn watch_writes(file: &Path, end: &AtomicBool) -> Vec<(u64, i64, i64)> {
    let mut seen = Vec::new();
    while !end.load(Ordering::Relaxed) {
        let now = written(file);
        if now.is_some() && seen.last() != now.as_ref() {
            seen.extend(now);
        }
        thread::sleep(Duration::from_millis(2));
    }
    seen
}

#[test]
fn it_is_written_once_a_second_while_a_service_flaps() {
    let (net, dir) = (Net::isolated(), Dir::new("state_flaps"));
    let fake = FakeConsul::start(&net);
    let [one, two] = web(&net);
    let [one, two] = [entry("web-1", one.addr()), entry("web-2", two.addr())];
    flap(&fake, |n| {
        let mut one = one.clone();
        one["Service"]["Weights"] = json!({ "Passing": n + 1, "Warning": 1 });
        if n % 2 == 0 { vec![one] } else { vec![one, two.clone()] }
    });
    let nginx = asking(&net, &dir, &fake.url()).upstream("web", WEB).start();
    let (file, end) = (kept(&dir).join("web.json"), AtomicBool::new(false));
    let (begin, before) = (Instant::now(), changes(&nginx, "web").len());
    let writes = thread::scope(|scope| {
        let watching = scope.spawn(|| watch_writes(&file, &end));
        // More than 50 changes a second come.
        eventually(PATIENCE, "a hundred changes in five seconds or more", || {
            let changes = changes(&nginx, "web").len() - before;
            let long = begin.elapsed() > Duration::from_secs(5);
            if long && changes > 100 { Ok(()) } else { Err(format!("{changes}")) }
        });
        end.store(true, Ordering::Relaxed);
        watching.join().unwrap()
    });
    let times: Vec<f64> = writes.iter().map(|it| it.1 as f64 + it.2 as f64 / 1e9).collect();
    let rests: Vec<f64> = times.windows(2).map(|it| it[1] - it[0]).collect();
    // The kernel's clock of files ticks every few milliseconds.
    assert!(rests.iter().all(|rest| *rest > 0.98), "{rests:?}");
    let most = begin.elapsed().as_secs() as usize + 1;
    assert!((3..=most).contains(&writes.len()), "{} writes, {rests:?}", writes.len());
}

/// What cannot be stored is tried again less and less often: many upstreams may share the reason.
#[test]
fn what_cannot_be_stored_is_tried_less_and_less_often() {
    const LONG: Duration = Duration::from_secs(15);
    let stage = Stage::set("state_tries");
    let [one, two] = stage.web();
    stage.register([&one]);
    let nginx = stage.nginx().upstream("web", WEB).start();
    let dir = kept(&stage.dir);
    wait_stored(&dir, "web", &["web-1"]);
    // Nothing can take the place of a directory that is not empty.
    fs::remove_file(dir.join("web.json")).unwrap();
    fs::create_dir(dir.join("web.json")).unwrap();
    File::create(dir.join("web.json/stays")).unwrap();

    let end = AtomicBool::new(false);
    let marks = thread::scope(|scope| {
        // Each try makes a file there, and removes it.
        let watching = scope.spawn(|| watch_writes(&dir, &end));
        stage.register([&two]);
        nginx.wait_log("cannot write", 1, PATIENCE);
        let begin = Instant::now();
        eventually(PATIENCE, "it tries for long enough", || begin.elapsed() >= LONG);
        end.store(true, Ordering::Relaxed);
        watching.join().unwrap()
    });
    let times: Vec<f64> = marks.iter().map(|it| it.1 as f64 + it.2 as f64 / 1e9).collect();
    let tries = times.windows(2).filter(|two| two[1] - two[0] > 0.5).count();
    // Once a second would be 14 more after the first one.
    assert!((2..=11).contains(&tries), "{tries} more tries: {times:?}");
    fs::remove_dir_all(dir.join("web.json")).unwrap();
    wait_stored(&dir, "web", &["web-1", "web-2"]);
}

/// Neither news of other things (the index), nor a reload, nor another worker.
#[test]
fn it_is_not_written_while_nothing_changes() {
    let (net, dir) = (Net::isolated(), Dir::new("state_still"));
    let fake = FakeConsul::start(&net);
    let [one, two] = web(&net);
    let [one, two] = [entry("web-1", one.addr()), entry("web-2", two.addr())];
    fake.know(5, std::slice::from_ref(&one));
    let mut nginx = asking(&net, &dir, &fake.url()).workers(2).upstream("web", WEB).start();
    let (path, end) = (kept(&dir), AtomicBool::new(false));
    wait_stored(&path, "web", &["web-1"]);
    let file = path.join("web.json");
    let writes = thread::scope(|scope| {
        let watching = scope.spawn(|| watch_writes(&file, &end));
        for index in 6..16 {
            // What is not used of an instance is no change either.
            let mut entry = one.clone();
            entry["Service"]["Meta"] = json!({ "version": index.to_string() });
            fake.know(index, &[entry]);
            let asked = || fake.requests().iter().any(|it| it.index() == Some(index));
            eventually(PATIENCE, &format!("a query with the index {index}"), asked);
        }
        nginx.reload();
        serves_now(nginx.addr(), &["web-1"]);
        // What a second of rest may have put off would be written before this.
        fake.know(20, &[one, two]);
        wait_stored(&path, "web", &["web-1", "web-2"]);
        end.store(true, Ordering::Relaxed);
        watching.join().unwrap()
    });
    assert!(writes.len() <= 2, "{writes:?}");
    assert_ne!(writes.first(), written(&file).as_ref());
}

// ---- several that write

/// Instances at addresses where nobody listens, all of one weight. Their names are long: it takes
/// some milliseconds to write them.
fn crowd(net: &Net, number: u16, weight: u32) -> Vec<Value> {
    let long = "x".repeat(2_500);
    (1..=number)
        .map(|n| {
            let mut entry = entry(&format!("none-{n}-{long}"), (net.ip(200), n).into());
            entry["Service"]["Weights"] = json!({ "Passing": weight, "Warning": 1 });
            entry
        })
        .collect()
}

/// The weight of all instances of a [`crowd`]. A file of two halves would have two.
fn weight(path: &Path, number: u16) -> Result<u32, String> {
    let state = load(path, "web")?;
    let [source] = &state.sources[..] else {
        return Err(format!("{} sources", state.sources.len()));
    };
    let weights: BTreeSet<u32> = source.peers.iter().map(|peer| peer.weight).collect();
    if weights.len() == 1 && source.peers.len() == usize::from(number) {
        Ok(weights.into_iter().sum())
    } else {
        Err(format!("{} peers of the weights {weights:?}", source.peers.len()))
    }
}

#[test]
fn a_worker_killed_while_it_writes_leaves_a_whole_file() {
    const MANY: u16 = 3_000;
    const KILLS: usize = 20;
    const ENOUGH: usize = 3;
    let (net, dir) = (Net::isolated(), Dir::new("state_killed"));
    let fake = FakeConsul::start(&net);
    let body = json!(crowd(&net, MANY, 1)).to_string();
    // Each worker that comes is told of a weight that none was told of before.
    let count = AtomicU64::new(1);
    fake.script(move |request| {
        request.index().is_none().then(|| {
            let n = count.fetch_add(1, Ordering::Relaxed);
            let body = body.replace("\"Passing\":1", &format!("\"Passing\":{n}"));
            Reply::new(200, body).header("X-Consul-Index", &(n + 5).to_string())
        })
    });
    let conf = asking(&net, &dir, &fake.url())
        .http(WAITS)
        .http(format!("upstream web {{ zone web 8m; {WEB} }}"))
        .server("web");
    let mut nginx = conf.clone().start();
    nginx.allow_log("exited on signal 9");
    let path = kept(&dir);
    eventually(PATIENCE, "a whole file", || weight(&path, MANY));
    let file = path.join("web.json");
    let temporary = || names(&path).into_iter().filter(|name| name.ends_with(".tmp")).count();
    let (mut interrupted, mut kills) = (0, 0);
    let mut worker = follower(&nginx);
    while kills < KILLS && interrupted < ENOUGH {
        nginx.signal_child(worker, Signal::KILL);
        kills += 1;
        let (left, before) = (temporary(), written(&file));
        worker = eventually(PATIENCE, "another worker", || {
            followers(&nginx).into_iter().find(|next| *next != worker)
        });
        // Its first write begins with a file of another name, and ends with the right one.
        let deadline = Instant::now() + PATIENCE;
        while temporary() == left && written(&file) == before {
            assert!(Instant::now() < deadline, "nothing is written");
        }
        nginx.signal_child(worker, Signal::KILL);
        kills += 1;
        let killed = worker;
        worker = eventually(PATIENCE, "a worker again", || {
            followers(&nginx).into_iter().find(|next| *next != killed)
        });
        interrupted += usize::from(temporary() > left);
        weight(&path, MANY).unwrap();
    }
    println!("{kills} workers were killed, {interrupted} of them while they wrote");
    eventually(PATIENCE, "what was told last is stored", || weight(&path, MANY));
    assert!(interrupted > 0, "no worker was killed in time");
    drop(nginx);
    fake.script(|_| None);
    let mut nginx = starts_at_once(&conf);
    nginx.allow_log("exited on signal 9");
    nginx.wait_log(&format!("{MANY} stored servers"), 1, PATIENCE);
}

/// A request that goes on keeps its worker, and so a second one that follows Consul.
struct Lasting(TcpStream);

impl Lasting {
    #[track_caller]
    fn begin(nginx: &Nginx, on: &Instance) -> Lasting {
        on.backend.set_delay(Duration::from_secs(3600));
        let mut stream = TcpStream::connect(nginx.addr()).unwrap();
        stream.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
        eventually(PATIENCE, "a request is under way", || on.backend.in_flight() == 1);
        on.backend.set_delay(Duration::ZERO);
        Lasting(stream)
    }

    #[track_caller]
    fn end(self, nginx: &Nginx) {
        drop(self.0);
        eventually(PATIENCE, "the old worker is gone", || nginx.exiting_pids().is_empty());
    }
}

fn follows(nginx: &Nginx, pid: u32) -> bool {
    nginx.threads(pid).iter().any(|name| name == "consul")
}

#[test]
fn two_generations_have_one_file() {
    let (net, dir) = (Net::isolated(), Dir::new("state_generations"));
    let fake = FakeConsul::start(&net);
    let [one, two, three] = web(&net);
    let all = [&one, &two, &three].map(|it| entry(&it.service.id, it.addr()));
    fake.know(5, &all[..1]);
    let conf = asking(&net, &dir, &fake.url()).http(WAITS).upstream("web", WEB);
    let mut nginx = conf.clone().start();
    let path = kept(&dir);
    wait_stored(&path, "web", &["web-1"]);
    let lasting = Lasting::begin(&nginx, &one);
    nginx.reload();
    let [old] = nginx.exiting_pids()[..] else { panic!("one old worker") };
    assert!(follows(&nginx, old), "the old worker serves its request from a list that is kept up");

    let (end, looks) = (AtomicBool::new(false), AtomicUsize::new(0));
    thread::scope(|scope| {
        let looking = scope.spawn(|| {
            while !end.load(Ordering::Relaxed) {
                ids(&path, "web").unwrap();
                looks.fetch_add(1, Ordering::Relaxed);
            }
        });
        for round in 0..4 {
            let (index, number) = (6 + round, 2 + round as usize % 2);
            fake.know(index, &all[..number]);
            let expected = ["web-1", "web-2", "web-3"];
            wait_stored(&path, "web", &expected[..number]);
            serves(nginx.addr(), &expected[..number]);
        }
        end.store(true, Ordering::Relaxed);
        looking.join().unwrap();
    });
    assert!(looks.load(Ordering::Relaxed) > 100);
    lasting.end(&nginx);
    assert_eq!(names(&path), ["web.json"]);
    assert_eq!(nginx.log_count("[warn]"), 0);
    drop(nginx);
    fake.script(|_| None);
    let nginx = starts_at_once(&conf);
    serves_now(nginx.addr(), &["web-1", "web-2", "web-3"]);
}

/// An upgrade of nginx has two masters for a while.
#[test]
fn two_nginx_that_write_one_file_leave_it_whole() {
    let (net, dir) = (Net::isolated(), Dir::new("state_two"));
    let fakes = [FakeConsul::start(&net), FakeConsul::start(&net)];
    let path = dir.join("shared");
    let conf = |name: &str, fake: &FakeConsul| {
        asking(&net, &dir, &fake.url())
            .name(name)
            .http(format!("consul_state_path {};", path.display()))
            .http(format!("upstream web {{ zone web 8m; {WEB} }}"))
            .server("web")
    };
    const MANY: u16 = 1_000;
    for (fake, first) in fakes.iter().zip([1, 1 + SETS]) {
        flap(fake, |n| crowd(&net, MANY, first + n));
    }
    let _nginx = [conf("one", &fakes[0]).start(), conf("two", &fakes[1]).start()];
    let mut seen = BTreeSet::new();
    eventually(PATIENCE, "the file has had the sets of both", || {
        if path.join("web.json").exists() {
            seen.insert((weight(&path, MANY).unwrap() - 1) / SETS);
        }
        let writes = written(&path.join("web.json"));
        if seen.len() == 2 { Ok(()) } else { Err(format!("{seen:?}, {writes:?}")) }
    });
    let (begin, file) = (Instant::now(), path.join("web.json"));
    let (mut writes, mut looks) = (BTreeSet::new(), 0);
    while begin.elapsed() < Duration::from_secs(3) {
        weight(&path, MANY).unwrap();
        writes.extend(written(&file));
        looks += 1;
    }
    assert!(writes.len() >= 4 && looks >= 20, "{looks} looks at {writes:?}");
}

/// The old workers of a reload may live for hours. What they follow is not what the next start will
/// ask for.
#[test]
fn an_old_generation_does_not_undo_what_the_new_one_has_stored() {
    let (net, dir) = (Net::isolated(), Dir::new("state_old"));
    let fake = FakeConsul::start(&net);
    let [one, two] = web(&net);
    let api = Instance::start(&net, "api", "api-1");
    let know = |index: u64, instances: &[&Instance]| {
        let entries: Vec<_> = instances.iter().map(|it| entry(&it.service.id, it.addr())).collect();
        let api = [entry("api-1", api.addr())];
        fake.script(move |request| {
            let is_api = request.target.contains("/api");
            let (at, entries) = if is_api { (5, &api[..]) } else { (index, &entries[..]) };
            (request.index() != Some(at)).then(|| Reply::health(at, entries))
        });
    };
    know(5, &[&one]);
    let addr = (net.ip(1), net.port()).into();
    let asks = |service: &str| {
        let upstream = format!("upstream web {{ zone web 256k; consul_upstream {service}; }}");
        asking(&net, &dir, &fake.url()).http(WAITS).http(upstream).server_on(addr, "web")
    };
    let mut nginx = asks("web").start();
    let path = kept(&dir);
    wait_stored(&path, "web", &["web-1"]);
    let lasting = Lasting::begin(&nginx, &one);
    nginx.configure(|_| asks("api"));
    nginx.reload();
    serves_now(addr, &["api-1"]);
    wait_stored(&path, "web", &["api-1"]);

    // News for the old one alone.
    let [old] = nginx.exiting_pids()[..] else { panic!("one old worker") };
    assert!(follows(&nginx, old));
    know(6, &[&one, &two]);
    nginx.wait_log(&format!("+{} (web-2)", two.addr()), 1, PATIENCE);
    // It may store them within a second of the last time.
    let begin = Instant::now();
    let load = Load::start(addr, &steady());
    eventually(PATIENCE, "two seconds of load", || {
        assert_eq!(ids(&path, "web"), Ok(["api-1".to_owned()].into()));
        begin.elapsed() > Duration::from_secs(2)
    });
    load.stop().assert_nothing_lost();
    lasting.end(&nginx);
    drop(nginx);
    fake.script(|_| None);
    let nginx = starts_at_once(&asks("api"));
    serves_now(addr, &["api-1"]);
    assert_eq!(stored_servers(&nginx), 1);
}

/// A worker that takes the place of a killed one begins with what serves, not with what is stored.
#[test]
fn a_worker_that_takes_over_begins_with_what_serves() {
    let (net, dir) = (Net::isolated(), Dir::new("state_takes_over"));
    let fake = FakeConsul::start(&net);
    let [one, two] = web(&net);
    let both = [entry("web-1", one.addr()), entry("web-2", two.addr())];
    fake.know(5, &both);
    let mut nginx =
        asking(&net, &dir, &fake.url()).http(WAITS).workers(2).upstream("web", WEB).start();
    nginx.allow_log("exited on signal 9");
    let path = kept(&dir);
    wait_stored(&path, "web", &["web-1", "web-2"]);
    fake.script(|_| None);
    // Half of it, and not believed.
    let file = path.join("web.json");
    let bytes = fs::read(&file).unwrap();
    fs::write(&file, &bytes[..bytes.len() / 2]).unwrap();
    let killed = follower(&nginx);
    nginx.signal_child(killed, Signal::KILL);
    eventually(PATIENCE, "another first worker", || {
        nginx.worker_pids().len() == 2 && followers(&nginx).iter().any(|pid| *pid != killed)
    });
    every_worker_serves(&nginx, &["web-1", "web-2"]);
    assert_eq!((stored_servers(&nginx), nginx.log_count("[warn]")), (0, 1));
    assert_eq!(nginx.log_count("it has a wrong checksum"), 1);
    fake.know(6, &both[..1]);
    every_worker_serves(&nginx, &["web-1"]);
    wait_stored(&path, "web", &["web-1"]);
    let mut conn = Conn::open(nginx.addr()).unwrap();
    assert_eq!(met(&mut conn, 10).unwrap(), ["web-1".to_owned()].into());
}
