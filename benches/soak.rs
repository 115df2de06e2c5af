//! Everything at once, for as long as `MINUTES` says: instances that come and go, reloads, killed
//! workers and restarts of Consul under load; then what was lost, and what grew. `benches/README.md`
//! tells how to read the table.

#[allow(dead_code, reason = "each benchmark uses its part of what they share")]
mod common;

use std::collections::VecDeque;
use std::env;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::thread::sleep;
use std::time::{Duration, Instant};

use testbed::{Backend, Consul, Dir, Load, Net, Nginx, Options, Service, Signal, eventually, http};

use common::figure::Figure;

const WORKERS: usize = 4;
const INSTANCES: usize = 8;

/// The upstreams, each with its load: all follow the same service.
const UPSTREAMS: [(&str, &str); 3] =
    [("kept", "keepalive 16;"), ("least", "least_conn;"), ("ring", "hash $arg_n consistent;")];

/// Clients of each upstream.
const CLIENTS: usize = 3;

/// An old instance ends so long after Consul was told that it goes.
const GRACE: Duration = Duration::from_millis(100);

/// What a killed worker had under way is lost within this time.
const AFTERMATH: Duration = Duration::from_secs(1);

const PATIENCE: Duration = Duration::from_secs(60);

/// How often what happens.
struct Pace {
    whole: Duration,
    change: Duration,
    reload: Duration,
    kill: Duration,
    restart: Duration,
    sample: Duration,
}

impl Pace {
    fn of(minutes: f64) -> Pace {
        let whole = Duration::from_secs_f64(minutes * 60.0);
        Pace {
            whole,
            change: Duration::from_millis(50),
            reload: Duration::from_secs(10),
            kill: Duration::from_secs(7),
            restart: Duration::from_secs(60),
            sample: whole / 20,
        }
    }

    fn quick() -> Pace {
        Pace {
            whole: Duration::from_secs(8),
            change: Duration::from_millis(50),
            reload: Duration::from_millis(1500),
            kill: Duration::from_millis(2500),
            restart: Duration::from_secs(4),
            sample: Duration::from_secs(1),
        }
    }
}

fn main() -> ExitCode {
    let quick = common::is_quick();
    let minutes = env::var("MINUTES").ok().and_then(|text| text.parse().ok()).unwrap_or(20.0);
    let pace = if quick { Pace::quick() } else { Pace::of(minutes) };
    println!(
        "soak: {:.1} minutes; a change every {} ms, a reload every {:.1} s, a worker killed every \
         {:.1} s,\nConsul restarted every {} s; {WORKERS} workers, {INSTANCES} instances that end \
         {} ms after they left\n",
        pace.whole.as_secs_f64() / 60.0,
        pace.change.as_millis(),
        pace.reload.as_secs_f64(),
        pace.kill.as_secs_f64(),
        pace.restart.as_secs(),
        GRACE.as_millis(),
    );
    let mut soak = Soak::begin();
    let samples = soak.run(&pace);
    soak.end(&samples, quick)
}

/// A moment's measure.
struct Sample {
    at: Duration,
    requests: u64,
    lost: u64,
    /// Of the master and of all workers.
    master: f64,
    workers: f64,
    descriptors: f64,
    zones: f64,
}

/// What is looked at over time, and its name.
type Column = (&'static str, fn(&Sample) -> f64);

struct Soak {
    net: Net,
    consul: Consul,
    nginx: Nginx,
    status: SocketAddr,
    instances: VecDeque<(String, Backend)>,
    /// Instances that Consul does not know any more, and when they end.
    leaving: VecDeque<(Instant, Backend)>,
    loads: Vec<Load>,
    begin: Instant,
    count: usize,
    changes: usize,
    reloads: usize,
    kills: usize,
    restarts: usize,
    /// Requests that broke in the aftermath of a kill, and how many had broken before the last one.
    excused: u64,
    killed: Option<(Instant, u64)>,
}

impl Soak {
    fn begin() -> Soak {
        let (net, dir) = (Net::isolated(), Dir::new("soak"));
        let consul = Consul::builder(&net, &dir).persistent().start();
        let status: SocketAddr = (net.ip(90), net.port()).into();
        let mut conf = Nginx::builder(&net, &dir)
            .workers(WORKERS)
            .http(format!("consul_address {};", consul.url()))
            .listen(status)
            .http(format!("server {{ listen {status}; location / {{ consul_status; }} }}"));
        for (name, directives) in UPSTREAMS {
            conf = conf
                .http(format!(
                    "upstream {name} {{ zone {name} 512k; {directives} consul_upstream web; }}"
                ))
                .server(name);
        }
        let instances = (0..INSTANCES).map(|n| instance(&net, &consul, n)).collect();
        let mut nginx = conf.start();
        nginx.allow_log("exited on signal 9");
        let served = format!("{INSTANCES} of {INSTANCES} instances serve");
        nginx.wait_log(&served, UPSTREAMS.len(), PATIENCE);
        // The first address is that of the status.
        let options = Options::default()
            .connections(CLIENTS)
            .pause(Duration::from_millis(5))
            .path(|n| format!("/?n={n}"));
        let loads = nginx.addrs()[1..].iter().map(|addr| Load::start(*addr, &options)).collect();
        Soak {
            net,
            consul,
            nginx,
            status,
            instances,
            leaving: VecDeque::new(),
            loads,
            begin: Instant::now(),
            count: INSTANCES,
            changes: 0,
            reloads: 0,
            kills: 0,
            restarts: 0,
            excused: 0,
            killed: None,
        }
    }

    fn run(&mut self, pace: &Pace) -> Vec<Sample> {
        println!(
            "{:>8} {:>10} {:>6} {:>12} {:>13} {:>12} {:>10}",
            "minutes", "requests", "lost", "master, MB", "workers, MB", "descriptors", "zones, kB"
        );
        let mut samples = Vec::new();
        let [mut change, mut reload, mut kill, mut restart, mut sample] =
            [pace.change, pace.reload, pace.kill, pace.restart, pace.sample]
                .map(|every| Timer { every, next: self.begin + every });
        while self.begin.elapsed() < pace.whole {
            if change.is_due() {
                self.change();
            }
            if reload.is_due() {
                self.nginx.reload();
                self.reloads += 1;
            }
            if kill.is_due() {
                self.kill();
            }
            if restart.is_due() {
                self.consul.restart();
                self.restarts += 1;
            }
            if sample.is_due() {
                samples.push(self.sample());
            }
            self.settle();
            sleep(Duration::from_millis(1));
        }
        samples
    }

    /// A new instance in the place of the oldest one.
    fn change(&mut self) {
        self.instances.push_back(instance(&self.net, &self.consul, self.count));
        self.count += 1;
        if let Some((id, old)) = self.instances.pop_front() {
            self.consul.deregister(&id);
            self.leaving.push_back((Instant::now() + GRACE, old));
        }
        self.changes += 1;
    }

    fn kill(&mut self) {
        self.excuse();
        let workers = self.nginx.worker_pids();
        // One after the other: the one that follows Consul has its turn, too.
        let Some(victim) = workers.get(self.kills % workers.len().max(1)) else { return };
        self.killed = Some((Instant::now() + AFTERMATH, self.broken()));
        self.nginx.signal_child(*victim, Signal::KILL);
        self.kills += 1;
    }

    /// What is due a while after something else.
    fn settle(&mut self) {
        while self.leaving.front().is_some_and(|(end, _)| *end <= Instant::now()) {
            if let Some((_, old)) = self.leaving.pop_front() {
                old.stop();
            }
        }
        if self.killed.is_some_and(|(until, _)| until <= Instant::now()) {
            self.excuse();
        }
    }

    fn excuse(&mut self) {
        if let Some((_, before)) = self.killed.take() {
            self.excused += self.broken() - before;
        }
    }

    fn broken(&self) -> u64 {
        self.loads.iter().map(|load| load.report().broken).sum()
    }

    fn sample(&self) -> Sample {
        // The old workers of a reload are gone, and a killed one is replaced.
        eventually(PATIENCE, "as many workers as ever", || {
            self.nginx.children().len() == WORKERS && self.nginx.worker_pids().len() == WORKERS
        });
        let (master, workers) = (self.nginx.pid(), self.nginx.worker_pids());
        let status = http::get(self.status, "/").expect("the status").json();
        let zones = UPSTREAMS.iter().map(|(name, _)| &status["upstreams"][name]["memory"]["used"]);
        let all = || workers.iter().copied();
        let sample = Sample {
            at: self.begin.elapsed(),
            requests: self.loads.iter().map(|load| load.report().sent()).sum(),
            lost: self.loads.iter().map(|load| load.report().lost).sum(),
            master: resident(master),
            workers: all().map(resident).sum(),
            descriptors: all().chain([master]).map(|pid| self.nginx.fds(pid).len()).sum::<usize>()
                as f64,
            zones: zones.map(|used| used.as_f64().expect("bytes of a zone")).sum::<f64>() / 1e3,
        };
        let Sample { at, requests, lost, master, workers, descriptors, zones } = &sample;
        println!(
            "{:>8.1} {requests:>10} {lost:>6} {master:>12.1} {workers:>13.1} {descriptors:>12} \
             {zones:>10.0}",
            at.as_secs_f64() / 60.0,
        );
        sample
    }

    fn end(mut self, samples: &[Sample], quick: bool) -> ExitCode {
        sleep(self.killed.map_or(Duration::ZERO, |(until, _)| until - Instant::now().min(until)));
        self.excuse();
        let reports: Vec<_> = self.loads.drain(..).map(Load::stop).collect();
        let sum = |of: fn(&testbed::Report) -> u64| reports.iter().map(of).sum::<u64>();
        let (lost, excused) = (sum(|report| report.lost), self.excused);
        println!(
            "\n{} requests through {} changes, {} reloads, {} kills, {} restarts of Consul: {lost} \
             lost, {excused} of them\nwith a killed worker; {} were sent again, {} retried by nginx",
            sum(testbed::Report::sent),
            self.changes,
            self.reloads,
            self.kills,
            self.restarts,
            sum(|report| report.reconnected),
            sum(|report| report.retried),
        );
        let mut met = lost == excused;
        let note = |what: &str, ours, bar| {
            Figure { bench: "soak", what, ours, rival: None, bar: Some(bar) }.note();
        };
        note("requests lost, but with a killed worker", (lost - excused) as f64, 0.0);
        for (report, (name, _)) in reports.iter().zip(UPSTREAMS) {
            if report.lost > 0 {
                println!("{name}: {report}");
            }
        }
        // The first minute is that of caches and of the first reloads.
        let steady: Vec<&Sample> =
            samples.iter().filter(|it| quick || it.at > Duration::from_secs(60)).collect();
        let columns: [Column; 4] = [
            ("master, MB", |it| it.master),
            ("workers, MB", |it| it.workers),
            ("descriptors", |it| it.descriptors),
            ("zones, kB", |it| it.zones),
        ];
        println!("\n{:<12} {:>9} {:>9} {:>16}", "", "first", "last", "slope, % a minute");
        for (name, of) in columns {
            let points: Vec<(f64, f64)> =
                steady.iter().map(|it| (it.at.as_secs_f64() / 60.0, of(it))).collect();
            let Some((first, last)) = points.first().zip(points.last()) else { continue };
            let slope = 100.0 * slope(&points) / first.1;
            println!("{name:<12} {:>9.1} {:>9.1} {slope:>16.2}", first.1, last.1);
            if !quick {
                note(&format!("{name}: growth, % a minute"), slope, FLAT);
            }
            met &= quick || slope <= FLAT;
        }
        self.nginx.quit();
        if met { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }
}

/// What grows by less than so many percent a minute does not grow: an hour of it is within what
/// one sample differs from the next.
const FLAT: f64 = 0.5;

/// Something that is done again and again.
struct Timer {
    every: Duration,
    next: Instant,
}

impl Timer {
    fn is_due(&mut self) -> bool {
        let now = Instant::now();
        let is_due = now >= self.next;
        if is_due {
            // What was missed meanwhile is not made up for.
            self.next = now + self.every;
        }
        is_due
    }
}

fn instance(net: &Net, consul: &Consul, number: usize) -> (String, Backend) {
    let id = format!("web-{number}");
    let backend = Backend::start(net, 20, &id);
    consul.register(&Service::new("web", &id, backend.addr()));
    (id, backend)
}

/// Memory of its own, in megabytes.
fn resident(pid: u32) -> f64 {
    common::resident(pid) / 1e6
}

/// Of the straight line that is nearest to the points.
fn slope(points: &[(f64, f64)]) -> f64 {
    let n = points.len() as f64;
    let mean = |of: fn(&(f64, f64)) -> f64| points.iter().map(of).sum::<f64>() / n;
    let (x, y) = (mean(|it| it.0), mean(|it| it.1));
    let (up, down) = points.iter().fold((0.0, 0.0), |(up, down), it| {
        (up + (it.0 - x) * (it.1 - y), down + (it.0 - x).powi(2))
    });
    if down > 0.0 { up / down } else { 0.0 }
}
