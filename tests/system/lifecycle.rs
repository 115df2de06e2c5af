//! Starts, reloads and ends, and that nothing is left behind.

use std::collections::BTreeMap;
use std::fs;
use std::io::{PipeReader, Read, Write};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use testbed::http::{self, Conn};
use testbed::{Backend, Dir, Load, Net, Nginx, Signal, eventually, paths};

use crate::common::{
    Instance, PATIENCE, Serve, Stage, asking, changes, connections, every_worker_serves, follower,
    followers, met, serves, serves_now, steady, v4, wait_connections, web,
};
use crate::fake_consul::{FakeConsul, entry};

/// An end that waits for nothing takes no longer, on a machine that is busy. A blocking query is
/// open for 25 seconds.
const PROMPT: Duration = Duration::from_secs(3);

/// An nginx that follows a Consul, whose blocking query is under way.
fn started(name: &str) -> (Stage, [Instance; 2], Nginx) {
    let stage = Stage::set(name);
    let instances: [Instance; 2] = stage.web();
    stage.register(&instances);
    // Newer ones keep connections to servers, by themselves.
    let web = "consul_upstream web; keepalive_timeout 100ms;";
    let nginx = stage.nginx().workers(4).upstream("web", web).start();
    every_worker_serves(&nginx, &["web-1", "web-2"]);
    eventually(PATIENCE, "a connection to Consul", || {
        connections(&nginx, follower(&nginx), v4(stage.consul.addr())) == 1
    });
    (stage, instances, nginx)
}

#[test]
fn one_thread_in_one_worker_follows_consul() {
    let (stage, _instances, nginx) = started("one_thread");
    let follower = follower(&nginx);
    assert_eq!(nginx.threads(nginx.pid()), ["nginx"]);
    for pid in nginx.worker_pids() {
        let expected: &[&str] = if pid == follower { &["nginx", "consul"] } else { &["nginx"] };
        assert_eq!(nginx.threads(pid), expected);
        let consul = v4(stage.consul.addr());
        wait_connections(&nginx, pid, consul, usize::from(pid == follower));
    }
}

/// What the open descriptors of a process are, and how many of each kind.
fn kinds(nginx: &Nginx, pid: u32) -> BTreeMap<String, usize> {
    let mut kinds = BTreeMap::new();
    for descriptor in nginx.fds(pid) {
        // `socket:[123]`, but not `anon_inode:[eventfd]`.
        let kind = descriptor.split(":[").next().filter(|kind| *kind == "socket");
        *kinds.entry(kind.unwrap_or(&descriptor).to_owned()).or_default() += 1;
    }
    kinds
}

/// The descriptors of all processes: the master's, and the workers' in an order of their own.
fn all_kinds(nginx: &Nginx) -> Vec<BTreeMap<String, usize>> {
    let mut workers: Vec<_> =
        nginx.worker_pids().into_iter().map(|pid| kinds(nginx, pid)).collect();
    workers.sort();
    workers.insert(0, kinds(nginx, nginx.pid()));
    workers
}

/// Waits until no worker of another generation is left. One that has ended is gone when the master
/// has noticed: until then the master has its channel, and the other workers have theirs to it.
#[track_caller]
fn settled(nginx: &Nginx) {
    eventually(PATIENCE, "the old workers are gone", || {
        let (now, all) = (nginx.worker_pids(), nginx.children());
        if now == all { Ok(()) } else { Err(format!("{all:?}, of which {now:?} serve")) }
    });
    // The master tells the others, which takes each of them a moment.
    let mut before = all_kinds(nginx);
    eventually(PATIENCE, "nobody opens or closes anything", || {
        // Between two looks that have to agree.
        std::thread::sleep(Duration::from_millis(100));
        let now = all_kinds(nginx);
        std::mem::replace(&mut before, now) == before
    });
}

#[test]
fn ten_reloads_under_load_lose_nothing_and_leave_nothing_behind() {
    let (stage, _instances, mut nginx) = started("ten_reloads");
    let consul = v4(stage.consul.addr());
    // The first generation inherits less of the master than those after a reload.
    nginx.reload();
    settled(&nginx);
    eventually(PATIENCE, "a connection to Consul", || {
        connections(&nginx, follower(&nginx), consul) == 1
    });
    let before = all_kinds(&nginx);

    let load = Load::start(nginx.addr(), &steady());
    for _ in 0..10 {
        let old = nginx.worker_pids();
        nginx.reload();
        load.wait_for(50);
        assert!(nginx.worker_pids().iter().all(|pid| !old.contains(pid)));
    }
    load.stop().assert_nothing_lost();

    settled(&nginx);
    assert!(nginx.worker_pids().contains(&follower(&nginx)));
    eventually(PATIENCE, "descriptors are as before", || {
        let now = all_kinds(&nginx);
        if now == before { Ok(()) } else { Err(format!("{now:#?}\nbefore: {before:#?}")) }
    });
    every_worker_serves(&nginx, &["web-1", "web-2"]);
    assert_eq!(nginx.log_count("open socket"), 0);
}

/// Stops `nginx -t` before its last word, by a pipe that has no room for it, to see what it has
/// started by then.
#[test]
fn a_configuration_test_asks_nobody_and_starts_nothing() {
    let (net, dir) = (Net::isolated(), Dir::new("config_test"));
    let fake = FakeConsul::start(&net);
    let conf = asking(&net, &dir, &fake.url()).upstream("web", "consul_upstream web;");
    let test = conf.config_test();
    assert!(test.ok, "{}", test.output);
    let lines: Vec<&str> = test.output.split_inclusive('\n').collect();
    let [first, last] = lines[..] else { panic!("two lines: {}", test.output) };

    let prefix = dir.join("nginx");
    let (mut reader, writer) = std::io::pipe().unwrap();
    leave_room(&writer, first.len() + last.len() / 2);
    let mut child = Command::new(paths::nginx().unwrap())
        .arg("-p")
        .arg(&prefix)
        .arg("-c")
        .arg(prefix.join("test.conf"))
        .args(["-e", "error.log", "-t"])
        .stdin(Stdio::null())
        .stderr(writer)
        .spawn()
        .unwrap();
    let pid = child.id();
    eventually(PATIENCE, "it waits to say that all is well", || {
        let waits = fs::read_to_string(format!("/proc/{pid}/wchan")).unwrap_or_default();
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let sleeps = stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('S'));
        if sleeps && waits.contains("pipe") { Ok(()) } else { Err(format!("{waits} {stat}")) }
    });
    let threads = fs::read_dir(format!("/proc/{pid}/task")).unwrap().count();
    let descriptors: Vec<_> = fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .filter_map(|entry| fs::read_link(entry.ok()?.path()).ok())
        .map(|target| target.to_string_lossy().into_owned())
        .collect();
    assert_eq!(threads, 1);
    assert!(!descriptors.iter().any(|it| it.contains("eventfd")), "{descriptors:?}");
    drain(&mut reader);
    assert!(child.wait().unwrap().success());
    assert_eq!(fake.connections(), 0);
}

/// Fills a pipe up to so many bytes of its last page.
fn leave_room(mut writer: &std::io::PipeWriter, room: usize) {
    const CAPACITY: usize = 65_536;
    const PAGE: usize = 4096;
    assert!(room < PAGE);
    writer.write_all(&vec![b'\n'; CAPACITY - room]).unwrap();
}

fn drain(reader: &mut PipeReader) {
    let mut rest = Vec::new();
    reader.read_to_end(&mut rest).unwrap();
}

#[test]
fn a_killed_first_worker_is_replaced_and_follows_again() {
    let (stage, [_one, _two], mut nginx) = started("worker_killed");
    nginx.allow_log("exited on signal 9");
    let others: Vec<u32> =
        nginx.worker_pids().into_iter().filter(|pid| *pid != follower(&nginx)).collect();
    let mut conns = http::worker_conns(nginx.addr(), others).unwrap();
    let killed = follower(&nginx);
    nginx.signal_child(killed, Signal::KILL);
    eventually(PATIENCE, "another first worker", || {
        for conn in conns.values_mut() {
            let met = met(conn, 8).unwrap();
            assert_eq!(met.len(), 2, "no instance is lost meanwhile: {met:?}");
        }
        nginx.worker_pids().len() == 4 && !followers(&nginx).is_empty()
    });
    assert_ne!(follower(&nginx), killed);
    every_worker_serves(&nginx, &["web-1", "web-2"]);
    let three = Instance::start(&stage.net, "web", "web-3");
    stage.register([&three]);
    every_worker_serves(&nginx, &["web-1", "web-2", "web-3"]);
    stage.consul.deregister("web-1");
    every_worker_serves(&nginx, &["web-2", "web-3"]);
}

#[test]
fn a_killed_first_worker_costs_no_instance_while_consul_is_away() {
    let mut stage = Stage::with("worker_killed_alone", |consul| consul.persistent());
    let [one, two, three] = stage.web();
    stage.register([&one, &two]);
    let mut nginx = stage.nginx().workers(2).upstream("web", "consul_upstream web;").start();
    nginx.allow_log("exited on signal 9");
    stage.consul.kill();
    let killed = follower(&nginx);
    nginx.signal_child(killed, Signal::KILL);
    eventually(PATIENCE, "another first worker", || {
        nginx.worker_pids().len() == 2 && followers(&nginx).iter().any(|pid| *pid != killed)
    });
    // It has asked in vain, and has not taken that for an answer.
    let in_vain = format!("[error] {0}#{0}: consul: ", follower(&nginx));
    nginx.wait_log(&in_vain, 1, PATIENCE);
    every_worker_serves(&nginx, &["web-1", "web-2"]);
    stage.consul.restart();
    stage.register([&three]);
    every_worker_serves(&nginx, &["web-1", "web-2", "web-3"]);
    stage.consul.deregister("web-1");
    every_worker_serves(&nginx, &["web-2", "web-3"]);
}

/// An nginx with the module and one without it cannot be told apart.
#[test]
fn loaded_and_unused_it_is_as_if_it_were_not_there() {
    let (net, dir) = (Net::isolated(), Dir::new("unused"));
    let backend = Backend::start(&net, 20, "static");
    let nginx = |module: bool| {
        let mut nginx = Nginx::builder(&net, &dir)
            .name(if module { "with" } else { "less" })
            .module(module)
            .workers(2)
            .upstream("web", &format!("server {};", backend.addr()))
            .start();
        for _ in 0..2 {
            serves_now(nginx.addr(), &["static"]);
            nginx.reload();
            settled(&nginx);
        }
        nginx
    };
    let (with, without) = (nginx(true), nginx(false));
    let anonymous = |name: String| name.replace("/less", "/with").replace("less.log", "with.log");
    let described = |nginx: &Nginx| -> Vec<String> {
        let mut all = Vec::new();
        for pid in std::iter::once(nginx.pid()).chain(nginx.worker_pids()) {
            let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
            let shared = maps.lines().filter(|line| line.contains(" rw-s ")).count();
            all.push(format!("threads {:?}, {shared} shared maps", nginx.threads(pid)));
            all.extend(kinds(nginx, pid).into_iter().map(|it| anonymous(format!("{it:?}"))));
        }
        let answer = http::get(nginx.addr(), "/").unwrap();
        let headers: Vec<_> = answer.headers.keys().map(|name| name.as_str()).collect();
        all.push(format!("{} {headers:?} {}", answer.status, answer.text()));
        all
    };
    eventually(PATIENCE, "both have the same", || {
        let (with, without) = (described(&with), described(&without));
        if with == without { Ok(()) } else { Err(format!("{with:#?}\nwithout: {without:#?}")) }
    });
    let files = |name: &str| -> Vec<String> {
        let mut files: Vec<_> = fs::read_dir(dir.join(name))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        files.sort();
        files
    };
    assert_eq!(files("with"), files("less"));
    assert_eq!(with.log_count("consul"), 0);
}

#[test]
fn one_process_alone_stops_while_it_follows() {
    let stage = Stage::set("single_process_stop");
    let [one] = stage.web();
    stage.register([&one]);
    for signal in [Signal::TERM, Signal::QUIT] {
        let mut nginx =
            stage.nginx().single_process().upstream("web", "consul_upstream web;").start();
        serves_now(nginx.addr(), &["web-1"]);
        nginx.signal(signal);
        eventually(PROMPT, &format!("it ends by {signal:?}"), || nginx.ended());
    }
}

#[test]
fn a_reload_adds_and_removes_upstreams() {
    let stage = Stage::set("reload_upstreams");
    let [one, two] = stage.web();
    let api = Instance::start(&stage.net, "api", "api-1");
    stage.register([&one, &api]);
    let conf = stage.nginx().workers(2);
    let mut nginx = conf.clone().upstream("web", "consul_upstream web;").start();
    let addr = nginx.addr();
    serves_now(addr, &["web-1"]);

    let web = "upstream web { zone web 256k; consul_upstream web; }";
    let second = (stage.net.ip(2), stage.net.port()).into();
    nginx.configure(|_| {
        conf.clone()
            .http(web)
            .server_on(addr, "web")
            .http("upstream api { zone api 256k; consul_upstream api; }")
            .server_on(second, "api")
    });
    nginx.reload();
    every_worker_serves(&nginx, &["web-1"]);
    serves_now(second, &["api-1"]);
    stage.register([&two]);
    every_worker_serves(&nginx, &["web-1", "web-2"]);

    // Another service in the upstream of the same name, and the other upstream gone.
    nginx.configure(|_| {
        conf.clone()
            .http("upstream web { zone web 512k; consul_upstream api; }")
            .server_on(addr, "web")
    });
    nginx.reload();
    every_worker_serves(&nginx, &["api-1"]);
    settled(&nginx);
    assert!(Conn::open(second).is_err(), "nobody listens there any more");
    eventually(PATIENCE, "one connection is enough for one service", || {
        connections(&nginx, follower(&nginx), v4(stage.consul.addr())) == 1
    });

    // None at all, and back.
    nginx.configure(|_| {
        conf.clone()
            .http(format!("upstream web {{ server {}; }}", one.addr()))
            .server_on(addr, "web")
    });
    nginx.reload();
    settled(&nginx);
    serves_now(addr, &["web-1"]);
    assert!(followers(&nginx).is_empty());
    nginx.configure(|_| conf.clone().http(web).server_on(addr, "web"));
    nginx.reload();
    every_worker_serves(&nginx, &["web-1", "web-2"]);
}

#[test]
fn a_broken_configuration_changes_nothing() {
    let (stage, [one, _two], mut nginx) = started("broken_reload");
    let workers = nginx.worker_pids();
    let load = Load::start(nginx.addr(), &steady());
    nginx.configure(|conf| conf.http("upstream broken { consul_upstream web; }"));
    let refusal = nginx.try_reload().unwrap_err();
    assert!(refusal.contains("\"consul_upstream\" requires \"zone\""), "{refusal}");
    assert_eq!(nginx.worker_pids(), workers);
    stage.consul.deregister(&one.service.id);
    every_worker_serves(&nginx, &["web-2"]);
    load.stop().assert_nothing_lost();
}

/// New workers wait for Consul's answer, not for the whole of `consul_start_timeout`, and then have
/// it from their first request on.
#[test]
fn no_request_comes_before_the_first_answer() {
    let (net, dir) = (Net::isolated(), Dir::new("first_answer"));
    let fake = FakeConsul::start(&net);
    let [one] = web(&net);
    fake.script(|_| None);
    let entries = [entry("web-1", one.addr())];
    let begin = Instant::now();
    let nginx = std::thread::scope(|scope| {
        let start = scope.spawn(|| {
            asking(&net, &dir, &fake.url())
                .http("consul_start_timeout 60s;")
                .workers(4)
                .upstream("web", "consul_upstream web;")
                .start()
        });
        eventually(PATIENCE, "a query", || !fake.requests().is_empty());
        assert!(!start.is_finished());
        fake.know(3, &entries);
        start.join().unwrap()
    });
    assert!(begin.elapsed() < Duration::from_secs(30), "{:?}", begin.elapsed());
    for (_, mut conn) in http::worker_conns(nginx.addr(), nginx.worker_pids()).unwrap() {
        assert_eq!(conn.get("/").unwrap().status, 200);
    }
    assert_eq!(nginx.log_count("no live upstreams"), 0);
    assert_eq!(nginx.log_count("no answer yet"), 0);
}

/// Tests that judge a time: they run alone, at the end.
mod timed {
    use super::*;

    #[test]
    fn a_quick_stop_is_prompt() {
        let (_stage, _instances, mut nginx) = started("quick_stop");
        let begin = Instant::now();
        assert!(nginx.stop().success());
        assert!(begin.elapsed() < PROMPT, "{:?}", begin.elapsed());
    }

    #[test]
    fn a_graceful_stop_is_prompt() {
        let (_stage, _instances, mut nginx) = started("graceful_stop");
        let begin = Instant::now();
        assert!(nginx.quit().success());
        assert!(begin.elapsed() < PROMPT, "{:?}", begin.elapsed());
        assert_eq!(nginx.log_count("open socket"), 0);
    }

    #[test]
    fn a_graceful_stop_waits_for_a_request_and_for_nothing_else() {
        let (_stage, [one, two], mut nginx) = started("graceful_stop_request");
        for backend in [&one.backend, &two.backend] {
            backend.set_delay(Duration::from_secs(2));
        }
        let in_flight = || one.backend.in_flight() + two.backend.in_flight();
        let (answer, answered, ended) = std::thread::scope(|scope| {
            let addr = nginx.addr();
            let request = scope.spawn(move || (http::get(addr, "/").unwrap(), Instant::now()));
            eventually(PATIENCE, "the request is under way", || in_flight() == 1);
            assert!(nginx.quit().success());
            let ended = Instant::now();
            let (answer, answered) = request.join().unwrap();
            (answer, answered, ended)
        });
        assert_eq!(answer.status, 200);
        let after = ended.saturating_duration_since(answered);
        assert!(after < PROMPT, "it ended {after:?} after the last answer");
        assert_eq!(nginx.log_count("open socket"), 0);
    }

    /// After a reload in this mode nginx itself does not answer requests any more (1.28.3 leaves its
    /// listeners with a configuration that it has freed). So from then on the log shows what it follows.
    #[test]
    fn one_process_alone_starts_reloads_and_stops() {
        let stage = Stage::set("single_process");
        let [one, two] = stage.web();
        let api = Instance::start(&stage.net, "api", "api-1");
        stage.register([&one, &api]);
        // With a state there would be nothing to add after a reload.
        let conf = stage.nginx().single_process().http("consul_state_path off;");
        let mut nginx = conf.clone().upstream("web", "consul_upstream web;").start();
        let addr = nginx.addr();
        serves_now(addr, &["web-1"]);
        stage.register([&two]);
        serves(addr, &["web-1", "web-2"]);
        stage.consul.deregister("web-1");
        serves(addr, &["web-2"]);
        assert_eq!(nginx.threads(nginx.pid()), ["nginx", "consul"]);
        // Clients' connections come and go.
        let events = |nginx: &Nginx| -> Vec<String> {
            nginx.fds(nginx.pid()).into_iter().filter(|fd| fd.starts_with("anon_inode:")).collect()
        };
        let before = events(&nginx).len();

        // A reload replaces the thread, which follows what is written now.
        for n in 1..=3 {
            nginx.configure(|_| {
                conf.clone()
                    .http("upstream api { zone api 256k; consul_upstream api hold=0; }")
                    .server_on(addr, "api")
            });
            nginx.reload_without_waiting();
            eventually(PATIENCE, "an answer for the new thread", || {
                changes(&nginx, "api").len() == n
            });
            assert_eq!(nginx.threads(nginx.pid()), ["nginx", "consul"]);
        }
        stage.consul.deregister("api-1");
        nginx.wait_log("upstream \"api\": -", 1, PATIENCE);
        assert_eq!(events(&nginx).len(), before, "{:?}", events(&nginx));
        let consul = v4(stage.consul.addr());
        eventually(PATIENCE, "one connection to Consul", || {
            connections(&nginx, nginx.pid(), consul) == 1
        });

        // Without anything to follow there is no thread.
        nginx.configure(|_| {
            conf.clone()
                .http(format!("upstream web {{ server {}; }}", one.addr()))
                .server_on(addr, "web")
        });
        nginx.reload_without_waiting();
        eventually(PATIENCE, "no thread is left", || nginx.threads(nginx.pid()) == ["nginx"]);
        let plain = stage
            .nginx()
            .name("plain")
            .module(false)
            .clear_http()
            .single_process()
            .upstream("web", &format!("server {};", one.addr()))
            .start();
        // It listens before it has its event loop, and answers after.
        serves_now(plain.addr(), &["web-1"]);
        let expected = events(&plain);
        assert_eq!(events(&nginx).len(), expected.len(), "{expected:?}");
        let begin = Instant::now();
        assert!(nginx.stop().success());
        assert!(begin.elapsed() < PROMPT, "{:?}", begin.elapsed());
    }

    /// The wait for the first answer is no reason to outlive the order to stop. (The master says it by
    /// a channel and not by a signal, and kills whoever has not heard it after some seconds.)
    #[test]
    fn a_stop_during_the_first_wait() {
        let (net, dir) = (Net::isolated(), Dir::new("stop_in_wait"));
        let fake = FakeConsul::start(&net);
        let mut nginx = asking(&net, &dir, &fake.url())
            .http("consul_start_timeout 60s; consul_timeout 60s;")
            .workers(2)
            .upstream("web", "consul_upstream web;")
            .start();
        let blocking =
            || fake.requests().iter().filter(|request| request.index().is_some()).count();
        eventually(PATIENCE, "a blocking query", || blocking() == 1);
        let asked = fake.requests().len();
        fake.script(|_| None);
        nginx.reload_without_waiting();
        eventually(PATIENCE, "the new workers wait", || fake.requests().len() > asked);
        let begin = Instant::now();
        assert!(nginx.stop().success());
        assert!(begin.elapsed() < PROMPT, "{:?}", begin.elapsed());
    }
}
