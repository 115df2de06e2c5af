//! What it costs a request to be counted, in instructions of nginx's process under callgrind.
//! `benches/README.md` tells how to read the table.

#[allow(dead_code, reason = "each benchmark uses its part of what they share")]
mod common;

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, ExitCode};

use testbed::http::Conn;
use testbed::{Backend, Consul, Dir, Net, Service, eventually, paths};

use common::is_quick;

/// What counting may cost, in percent.
const BAR: f64 = 2.0;

const INSTANCES: usize = 3;

fn main() -> ExitCode {
    if Command::new("valgrind").arg("--version").output().is_err() {
        println!("counting: left out, there is no valgrind (Debian's package valgrind)");
        return ExitCode::SUCCESS;
    }
    let (rounds, requests) = if is_quick() { (1, 1_000) } else { (3, 3_000) };
    let (net, dir) = (Net::isolated(), Dir::new("bench_counting"));
    let consul = Consul::start(&net, &dir);
    let backends: Vec<Backend> = (1..=INSTANCES)
        .map(|n| {
            let backend = Backend::start(&net, 20, &format!("web-{n}"));
            consul.register(&Service::new("web", &format!("web-{n}"), backend.addr()));
            backend
        })
        .collect();
    println!(
        "counting: {requests} requests for a body of some bytes, on kept connections on both \
         sides,\nto {} instances; one process, callgrind\n",
        backends.len()
    );
    println!("{:<30} {:>14} {:>14}", "", "all of nginx", "of the module");
    let stage = Stage { net: &net, dir: &dir, consul: &consul, requests };
    let mut all = CASES.map(|_| Cost { all: f64::MAX, ours: f64::MAX });
    for round in 0..rounds {
        for (case, least) in CASES.iter().zip(&mut all) {
            let cost = stage.instructions(case, round);
            *least = Cost { all: least.all.min(cost.all), ours: least.ours.min(cost.ours) };
        }
    }
    for (case, Cost { all, ours }) in CASES.iter().zip(&all) {
        println!("{:<30} {all:>14.0} {ours:>14.0}", case.name);
    }
    let [module, counted, uncounted] = all;
    let cost = counted.ours - uncounted.ours;
    let percent = 100.0 * cost / module.all;
    println!("\ncounting costs {cost:.0} instructions, {percent:.2} % of the module's request");
    if percent <= BAR { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// A way to be run.
struct Case {
    name: &'static str,
    failpoints: bool,
    counts: bool,
}

const CASES: [Case; 3] = [
    Case { name: "the module", failpoints: false, counts: true },
    Case { name: "with failpoints", failpoints: true, counts: true },
    Case { name: "with failpoints, not counting", failpoints: true, counts: false },
];

struct Stage<'a> {
    net: &'a Net,
    dir: &'a Dir,
    consul: &'a Consul,
    requests: usize,
}

impl Stage<'_> {
    /// Instructions for each request: what a process with many of them has more than one with few.
    fn instructions(&self, case: &Case, round: usize) -> Cost {
        let few = self.requests / 10;
        let (most, least) =
            (self.run(case, round, few + self.requests), self.run(case, round, few));
        let each = |most: f64, least: f64| (most - least) / self.requests as f64;
        Cost { all: each(most.all, least.all), ours: each(most.ours, least.ours) }
    }

    /// The instructions of nginx's thread from its start to its end.
    fn run(&self, case: &Case, round: usize, requests: usize) -> Cost {
        let Case { failpoints, counts, .. } = *case;
        let name = &*format!("{failpoints}-{counts}-{requests}-{round}");
        let out = self.dir.join(format!("{name}.callgrind"));
        let valgrind = self.dir.write(
            format!("{name}.sh"),
            format!(
                "#!/bin/sh\nexec valgrind --tool=callgrind --separate-threads=yes \
                 --callgrind-out-file={} {} \"$@\"\n",
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
            .single_process()
            .http(format!("consul_address {};", self.consul.url()))
            .http("upstream web { zone web 256k; consul_upstream web; keepalive 8; }")
            .server("web");
        if failpoints {
            nginx = nginx.with_failpoints();
        }
        let mut nginx = nginx.start();
        let mut conn = Conn::open(nginx.addr()).expect("nginx");
        // The instances are there, and nothing is done for the first time.
        eventually(common::PATIENCE, "all instances serve", || {
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
        let first = format!("{}-01", out.display());
        let file = fs::read_to_string(&first).unwrap_or_else(|error| panic!("{first}: {error}"));
        Cost::read(&file)
    }
}

/// Instructions of nginx's thread: all of them, and those of the module alone, which are the same
/// however nginx's events fall.
#[derive(Clone, Copy)]
struct Cost {
    all: f64,
    ours: f64,
}

impl Cost {
    /// Reads callgrind's file: blocks of lines for each function, which have a cost each, and calls with
    /// the cost of what was called. Of that only copies of memory are the module's.
    fn read(file: &str) -> Cost {
        let mut cost = Cost { all: 0.0, ours: 0.0 };
        let (mut objects, mut functions) = (Names::default(), Names::default());
        let (mut is_ours, mut is_copy, mut is_call) = (false, false, false);
        for line in file.lines() {
            if let Some(object) = line.strip_prefix("ob=") {
                is_ours = objects.name(object).contains("ngx_http_consul_upstream");
            } else if let Some(object) = line.strip_prefix("cob=") {
                objects.name(object);
            } else if let Some(function) = line.strip_prefix("fn=") {
                functions.name(function);
            } else if let Some(function) = line.strip_prefix("cfn=") {
                is_copy = functions.name(function).contains("mem");
            } else if line.starts_with("calls=") {
                is_call = true;
            } else if let Some(total) = line.strip_prefix("totals: ") {
                cost.all = total.trim().parse().expect("a number");
            } else if line.starts_with(|c: char| c.is_ascii_digit() || "+-*".contains(c)) {
                if is_ours && (!is_call || is_copy) {
                    let number = line.split(' ').nth(1).and_then(|number| number.parse().ok());
                    cost.ours += number.unwrap_or(0.0);
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
