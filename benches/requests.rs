//! What a request costs with the module and with static servers, and what counting has of it, in
//! instructions of nginx's process under callgrind.
//! `benches/README.md` tells how to read the table.

#[allow(dead_code, reason = "each benchmark uses its part of what they share")]
mod common;

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, ExitCode};

use testbed::http::Conn;
use testbed::{Backend, Consul, Dir, Net, Service, eventually, paths};

use common::figure::Figure;
use common::is_quick;

/// What the module may cost, and counting may of that, in percent.
const BAR: f64 = 2.0;

const INSTANCES: usize = 10;

fn main() -> ExitCode {
    if Command::new("valgrind").arg("--version").output().is_err() {
        println!("requests: left out, there is no valgrind (Debian's package valgrind)");
        return ExitCode::SUCCESS;
    }
    let requests = if is_quick() { 1_000 } else { 5_000 };
    let (net, dir) = (Net::isolated(), Dir::new("bench_requests"));
    let consul = Consul::start(&net, &dir);
    let backends: Vec<Backend> = (1..=INSTANCES as u8)
        .map(|n| {
            let backend = Backend::start(&net, 19 + n, &format!("web-{n}"));
            consul.register(&Service::new("web", &format!("web-{n}"), backend.addr()));
            backend
        })
        .collect();
    println!(
        "requests: {requests} for a body of some bytes, on kept connections on both sides, to \
         {INSTANCES} servers;\none of two workers, callgrind\n"
    );
    println!(
        "{:<36} {:>10} {:>12} {:>12}",
        "instructions a request", "all", "less malloc", "module"
    );
    let servers = backends.iter().map(|it| format!("server {};", it.addr())).collect();
    let stage = Stage { net: &net, dir: &dir, consul: &consul, servers, requests };
    let all = CASES.map(|case| {
        let cost = stage.instructions(&case);
        let Cost { all, memory, ours } = cost;
        println!("{:<36} {all:>10.0} {:>12.0} {ours:>12.0}", case.name, all - memory);
        cost
    });
    let [stock, zone, module, follower, counted, uncounted] = all;
    let percent = |cost: f64| 100.0 * cost / zone.all;
    let less_malloc = |cost: Cost| cost.all - cost.memory;
    let more = |than: Cost, this: Cost| less_malloc(this) - less_malloc(than);
    println!();
    for (what, cost) in [
        ("a zone of nginx's own", more(stock, zone)),
        ("the module beside that", more(zone, module)),
        ("counting, of this", counted.ours - uncounted.ours),
        ("a second thread in the process", more(module, follower)),
    ] {
        println!("{what:<36} {cost:>10.0} {:>10.2} %", percent(cost));
    }
    for (what, ours, rival, bar) in [
        (
            "instructions of a request, less malloc",
            less_malloc(module),
            Some(("static servers in a zone", less_malloc(zone))),
            less_malloc(zone) + BAR / 100.0 * zone.all,
        ),
        ("of these, for counting it", counted.ours - uncounted.ours, None, BAR / 100.0 * zone.all),
    ] {
        Figure { bench: "requests", what, ours, rival, bar: Some(bar) }.note();
    }
    let met = [more(zone, module), counted.ours - uncounted.ours];
    // A thousand requests do not tell a bar's last instruction.
    let is_met = is_quick() || met.into_iter().all(|cost| percent(cost) <= BAR);
    if is_met { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// A way to be run.
struct Case {
    name: &'static str,
    servers: Servers,
    worker: Worker,
    failpoints: bool,
    counts: bool,
}

/// Where the servers come from.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Servers {
    /// The configuration, and nginx knows no module.
    Static,
    /// The same, in a zone.
    Zone,
    /// Consul.
    Consul,
}

/// Which worker is asked.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Worker {
    /// One with a single thread.
    Any,
    /// The one that follows Consul.
    Follower,
}

const CASES: [Case; 6] = [
    Case::new("static servers", Servers::Static),
    Case::new("static servers in a zone", Servers::Zone),
    Case::new("the module", Servers::Consul),
    Case {
        worker: Worker::Follower,
        ..Case::new("the module, worker that follows", Servers::Consul)
    },
    Case { failpoints: true, ..Case::new("with failpoints", Servers::Consul) },
    Case {
        failpoints: true,
        counts: false,
        ..Case::new("with failpoints, not counting", Servers::Consul)
    },
];

impl Case {
    const fn new(name: &'static str, servers: Servers) -> Case {
        Case { name, servers, worker: Worker::Any, failpoints: false, counts: true }
    }
}

struct Stage<'a> {
    net: &'a Net,
    dir: &'a Dir,
    consul: &'a Consul,
    servers: String,
    requests: usize,
}

impl Stage<'_> {
    /// Instructions for each request: what a worker with many of them has more than one with few.
    fn instructions(&self, case: &Case) -> Cost {
        let few = self.requests / 10;
        let (most, least) = (self.run(case, few + self.requests), self.run(case, few));
        let each = |most: f64, least: f64| (most - least) / self.requests as f64;
        Cost {
            all: each(most.all, least.all),
            memory: each(most.memory, least.memory),
            ours: each(most.ours, least.ours),
        }
    }

    /// The instructions of a worker's main thread, from its start to its end.
    fn run(&self, case: &Case, requests: usize) -> Cost {
        let Case { servers, worker, failpoints, counts, .. } = *case;
        let name = &*format!("{}-{requests}", case.name.replace([' ', ','], "_"));
        let out = self.dir.join(format!("{name}.callgrind"));
        let valgrind = self.dir.write(
            format!("{name}.sh"),
            format!(
                "#!/bin/sh\nexec valgrind --tool=callgrind --separate-threads=yes \
                 --callgrind-out-file={}.%p {} \"$@\"\n",
                out.display(),
                paths::nginx().unwrap_or_else(|error| panic!("{error}")).display(),
            ),
        );
        fs::set_permissions(&valgrind, fs::Permissions::from_mode(0o755)).expect("a script");
        if !counts {
            let armed = self.dir.join(name).join("failpoints");
            fs::create_dir_all(&armed).expect("a directory");
            fs::write(armed.join("counting"), "").expect("a file");
        }
        let mut nginx = testbed::Nginx::builder(self.net, self.dir)
            .name(name)
            .binary(valgrind)
            .untitled()
            .workers(2)
            .server("web");
        let upstream = match servers {
            Servers::Static => &self.servers,
            Servers::Zone => &format!("zone web 256k; {}", self.servers),
            Servers::Consul => "zone web 256k; consul_upstream web;",
        };
        nginx = nginx.http(format!("upstream web {{ {upstream} keepalive 16; }}"));
        nginx = match servers {
            Servers::Consul => nginx.http(format!("consul_address {};", self.consul.url())),
            _ => nginx.module(false),
        };
        if failpoints {
            nginx = nginx.with_failpoints();
        }
        let mut nginx = nginx.start();
        let follows = |pid: u32| nginx.threads(pid).iter().any(|thread| thread == "consul");
        let (mut conn, pid) = eventually(common::PATIENCE, "a connection to the worker", || {
            let mut conn = Conn::open(nginx.addr()).map_err(|err| err.to_string())?;
            let pid = conn.get("/").map_err(|err| err.to_string())?.worker().unwrap_or_default();
            let is_it = follows(pid) == (worker == Worker::Follower);
            if is_it { Ok((conn, pid)) } else { Err(format!("it is worker {pid}")) }
        });
        // All servers are there, and nothing is done for the first time.
        eventually(common::PATIENCE, "all servers serve", || {
            let served = (0..INSTANCES).map(|_| conn.get("/").map(|it| it.backend().to_owned()));
            let served: Result<BTreeSet<_>, _> = served.collect();
            match served {
                Ok(served) if served.len() == INSTANCES && !served.contains("") => Ok(()),
                other => Err(format!("{other:?}")),
            }
        });
        for _ in 0..requests {
            let answer = conn.get("/").expect("an answer");
            assert_eq!(answer.status, 200);
        }
        drop(conn);
        assert!(nginx.quit().success(), "nginx ends well");
        // A file for each thread; nginx's is the first.
        let first = format!("{}.{pid}-01", out.display());
        let file = fs::read_to_string(&first).unwrap_or_else(|error| panic!("{first}: {error}"));
        Cost::read(&file)
    }
}

/// Instructions of nginx's thread.
#[derive(Clone, Copy)]
struct Cost {
    /// All of them.
    all: f64,
    /// Of these, libc's while it looks for memory and takes it back, as far as functions have
    /// names: they depend on what lies where more than on who asks.
    memory: f64,
    /// The module's alone, and those of the copies of memory that it asks for.
    ours: f64,
}

/// Parts of the names of libc's functions for memory.
const MALLOC: [&str; 6] =
    ["malloc", "free", "realloc", "memalign", "unlink_chunk", "alloc_perturb"];

impl Cost {
    /// Reads callgrind's file: blocks of lines for each function, which have a cost each, and calls with
    /// the cost of what was called. Of that only copies of memory are the module's.
    fn read(file: &str) -> Cost {
        let mut cost = Cost { all: 0.0, memory: 0.0, ours: 0.0 };
        let (mut objects, mut functions) = (Names::default(), Names::default());
        let (mut is_ours, mut is_libc, mut is_memory) = (false, false, false);
        let (mut is_copy, mut is_call) = (false, false);
        for line in file.lines() {
            if let Some(object) = line.strip_prefix("ob=") {
                let name = objects.name(object);
                is_ours = name.contains("ngx_http_consul_upstream");
                is_libc = name.contains("/libc.so");
            } else if let Some(object) = line.strip_prefix("cob=") {
                objects.name(object);
            } else if let Some(function) = line.strip_prefix("fn=") {
                let name = functions.name(function);
                is_memory = is_libc && MALLOC.iter().any(|part| name.contains(part));
            } else if let Some(function) = line.strip_prefix("cfn=") {
                is_copy = functions.name(function).contains("mem");
            } else if line.starts_with("calls=") {
                is_call = true;
            } else if let Some(total) = line.strip_prefix("totals: ") {
                cost.all = total.trim().parse().expect("a number");
            } else if line.starts_with(|c: char| c.is_ascii_digit() || "+-*".contains(c)) {
                let number = line.split(' ').nth(1).and_then(|number| number.parse().ok());
                let number = number.unwrap_or(0.0);
                if is_ours && (!is_call || is_copy) {
                    cost.ours += number;
                }
                if is_memory && !is_call {
                    cost.memory += number;
                }
                is_call = false;
            }
        }
        cost
    }
}

/// What has its name where it comes first, and then a number only.
#[derive(Default)]
struct Names<'a>(HashMap<&'a str, &'a str>);

impl<'a> Names<'a> {
    fn name(&mut self, text: &'a str) -> &'a str {
        match text.split_once(' ') {
            Some((number, name)) => {
                self.0.insert(number, name);
                name
            }
            None => self.0.get(text).copied().unwrap_or(""),
        }
    }
}
