//! How long a change takes from Consul's answer until every worker serves it. `benches/README.md`
//! tells how to read the table.

#[allow(dead_code, reason = "each benchmark uses its part of what they share")]
mod common;

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use testbed::http::Conn;
use testbed::nginx::Builder;
use testbed::{Consul, Dir, Net, Nginx, Service, eventually};

use common::figure::Figure;
use common::rival::RenderAndReload;
use common::{ms, quantile};

const INSTANCES: usize = 10;

/// The bar: the median until a change is live in every worker, which is when they serve it less what
/// the request takes that shows it; with the first of these numbers of workers.
const WORKERS: [usize; 2] = [4, 2];
const BAR: Duration = Duration::from_millis(1);

/// The one instance that changes gets nearly all requests, the next one first of all: one request
/// to a worker shows whether it knows the instance.
const HEAVY: u32 = 10_000;

/// Before each change everything rests so long: all queries block in Consul by then, and nginx
/// and its rival are idle.
const REST: Duration = Duration::from_millis(40);

/// Between two looks at a rival, which needs the machine for its reload, or makes one wait.
const BREATH: Duration = Duration::from_micros(300);

/// How long nginx believes an answer of Consul's name server: the least that it can be told.
const VALID: &str = "1s";

/// That name server at its best: all instances in one answer, over TCP where it is too long, which is
/// old at once. By default it answers with some of them.
const DNS: &str = "-hcl=dns_config { enable_truncate = true udp_answer_limit = 100 }";

/// Changes in a row of one side before it is the other's turn: what the machine does meanwhile,
/// it does to both.
const BLOCK: usize = 20;

/// What each side's upstream has beside its servers: connections to them are kept, as anyone would
/// have it who counts milliseconds.
const KEPT: &str = "keepalive 16;";

const PATIENCE: Duration = Duration::from_secs(10);

fn main() -> ExitCode {
    let quick = common::is_quick();
    let blocks = if quick { 1 } else { 6 };
    let block = if quick { 4 } else { BLOCK };
    println!(
        "live: from Consul's answer to a request served by the new instance, in ms;\n\
         {INSTANCES} instances, one replaced at each of {} changes\n",
        blocks * block
    );
    println!("{:<32} {:^33}   {:^33}", "", "first worker", "every worker");
    let columns = format!("{:>9} {:>7} {:>7} {:>7}", "median", "p90", "p99", "max");
    println!("{:<32} {columns}   {columns}", "");

    let mut live = Duration::MAX;
    for workers in WORKERS {
        let [alone, ours, reload, resolve] = measure(workers, blocks, block);
        alone.print(&format!("{workers} workers, the requests alone"));
        ours.print(&format!("{workers} workers, consul_upstream"));
        for (name, theirs) in [("render and reload", &reload), ("server ... resolve", &resolve)] {
            theirs.print(&format!("{workers} workers, {name}"));
            let ratio = |times: fn(&Times) -> &[Duration], part: f64| {
                ms(quantile(times(theirs), part)) / ms(quantile(times(&ours), part))
            };
            let ratios = |times| {
                let [median, p90, p99, max] =
                    [0.5, 0.9, 0.99, 1.0].map(|part| format!("{:.0} x", ratio(times, part)));
                format!("{median:>9} {p90:>7} {p99:>7} {max:>7}")
            };
            println!("{:<32} {}   {}", "", ratios(|t| &t.first), ratios(|t| &t.every));
            let median = |times: &Times| ms(quantile(&times.every, 0.5));
            Figure {
                bench: "live",
                what: &format!("a change in every one of {workers} workers, ms"),
                ours: median(&ours),
                rival: Some((name, median(theirs))),
                bar: None,
            }
            .note();
        }
        println!();
        if workers == WORKERS[0] {
            live = quantile(&ours.every, 0.5).saturating_sub(quantile(&alone.every, 0.5));
            Figure {
                bench: "live",
                what: &format!("the same with {workers} workers less the request, ms"),
                ours: ms(live),
                rival: None,
                bar: Some(ms(BAR)),
            }
            .note();
        }
    }
    if quick {
        return ExitCode::SUCCESS;
    }
    let met = live <= BAR;
    println!(
        "the bar, live in every one of {} workers within {} ms at the median, less the request: {:.2} \
         ms, {}",
        WORKERS[0],
        BAR.as_millis(),
        ms(live),
        if met { "met" } else { "MISSED" }
    );
    if met { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// One value for each change.
#[derive(Default)]
struct Times {
    first: Vec<Duration>,
    every: Vec<Duration>,
}

impl Times {
    fn print(&self, who: &str) {
        let columns = |sample: &[Duration]| {
            let [median, p90, p99, max] = [0.5, 0.9, 0.99, 1.0].map(|p| ms(quantile(sample, p)));
            format!("{median:>9.2} {p90:>7.2} {p99:>7.2} {max:>7.2}")
        };
        println!("{who:<32} {}   {}", columns(&self.first), columns(&self.every));
    }
}

/// The requests without a change, ours, and those of the rivals.
fn measure(workers: usize, blocks: usize, block: usize) -> [Times; 4] {
    let (net, dir) = (Net::isolated(), Dir::new("live"));
    let dns = net.port();
    let consul = Consul::builder(&net, &dir).arg(format!("-dns-port={dns}")).arg(DNS).start();
    let dns = SocketAddr::new(consul.addr().ip(), dns);
    let conf = |name: &str| -> Builder { Nginx::builder(&net, &dir).name(name).workers(workers) };

    // Each side's heavy instance is at another place after each change, and once before.
    let places = blocks * block + 1;
    let backends = Backends::start(&net, &dir, ["ours", "theirs", "resolved"], places);

    let mut ours = Changing::new(&consul, &backends, "ours");
    let nginx = conf("ours")
        .http(format!("consul_address {};", consul.url()))
        .http(format!("upstream ours {{ zone ours 256k; consul_upstream ours; {KEPT} }}"))
        .server("ours")
        .start();
    let mut theirs = Changing::new(&consul, &backends, "theirs");
    let rival = RenderAndReload::start(&consul, &dir, conf("theirs"), "theirs", KEPT, "");

    let mut probes = probes(&nginx);
    let [mut alone, mut our_times, mut their_times, mut resolved_times] =
        [(); 4].map(|()| Times::default());
    for _ in 0..blocks {
        for _ in 0..block {
            let seen =
                ours.change(|name, since| watch_workers(&mut probes, name, since, Duration::ZERO));
            our_times.add(&seen);
            thread::sleep(REST);
            let (name, now) = (ours.name(), Instant::now());
            let seen = watch_workers(&mut probes, &name, now, Duration::ZERO);
            alone.add(&seen.expect("nothing has changed since"));
        }
        for _ in 0..block {
            let addr = rival.nginx().addr();
            let seen = theirs.change(|name, since| watch_reload(addr, workers, name, since));
            their_times.add(&seen);
            // What is left of the reload is not the next one's burden.
            eventually(PATIENCE, "the old workers end", || rival.nginx().exiting_pids().is_empty());
        }
    }
    drop((nginx, rival));

    // When the others are done: it asks each second, and they would have that in their times.
    let mut resolved = Changing::new(&consul, &backends, "resolved");
    let resolving = conf("resolved")
        .module(false)
        .http(format!("resolver {dns} valid={VALID} ipv6=off;"))
        .http(format!(
            "upstream resolved {{ zone resolved 256k; server service.consul service=resolved \
             resolve; {KEPT} }}"
        ))
        .server("resolved")
        .start();
    let mut conn = Conn::open(resolving.addr()).expect("nginx");
    eventually(PATIENCE, "the name is resolved", || {
        conn.get("/").is_ok_and(|answer| answer.status == 200)
    });

    let mut probes = self::probes(&resolving);
    // Each takes one to two seconds: fewer of them tell as much.
    for n in 0..(blocks * block).div_ceil(2) {
        // At any moment of that second, as changes come.
        thread::sleep(Duration::from_millis(n as u64 * 137 % 1000));
        let seen = resolved.change(|name, since| watch_workers(&mut probes, name, since, BREATH));
        resolved_times.add(&seen);
    }
    [alone, our_times, their_times, resolved_times]
}

impl Times {
    /// Takes up when each worker served a change.
    fn add(&mut self, seen: &[Duration]) {
        self.first.extend(seen.iter().min());
        self.every.extend(seen.iter().max());
    }
}

/// All instances, as servers of one nginx that answer by themselves: what answers a request takes
/// part in the time, and should take as little of it as any backend can.
struct Backends {
    _nginx: Nginx,
    /// Where each one listens, by name.
    places: BTreeMap<String, SocketAddr>,
}

impl Backends {
    fn start(net: &Net, dir: &Dir, services: [&str; 3], heavy: usize) -> Backends {
        let mut places = BTreeMap::new();
        for service in services {
            let light = (1..INSTANCES).map(|n| light(service, n));
            for name in light.chain((1..=heavy).map(|n| self::heavy(service, n))) {
                places.insert(name, SocketAddr::from((net.ip(20), net.port())));
            }
        }
        let servers: String = places
            .iter()
            .map(|(name, addr)| {
                format!(
                    "server {{ listen {addr}; location / {{ add_header X-Backend {name}; \
                     return 200; }} }}\n"
                )
            })
            .collect();
        let first = places.values().next().copied().expect("there are some");
        let builder = Nginx::builder(net, dir).name("backends").module(false).workers(1);
        let nginx = builder.http(servers).listen(first).start();
        Backends { _nginx: nginx, places }
    }

    fn service(&self, service: &str, id: &str, name: &str) -> Service {
        Service::new(service, id, self.places[name])
    }
}

fn light(service: &str, n: usize) -> String {
    format!("{service}-{n}")
}

fn heavy(service: &str, n: usize) -> String {
    format!("{service}-heavy-{n}")
}

/// A service of which one instance, the heavy one, moves at each change.
struct Changing<'a> {
    consul: &'a Consul,
    backends: &'a Backends,
    service: &'static str,
    count: usize,
}

impl<'a> Changing<'a> {
    fn new(consul: &'a Consul, backends: &'a Backends, service: &'static str) -> Changing<'a> {
        let services: Vec<Service> = (1..INSTANCES)
            .map(|n| light(service, n))
            .map(|name| backends.service(service, &name, &name))
            .collect();
        consul.register_all(&services);
        let mut changing = Changing { consul, backends, service, count: 0 };
        let registration = changing.next();
        consul.put("/v1/agent/service/register", &registration);
        consul.settled(service, "all are there", |all| all.len() == INSTANCES);
        changing
    }

    /// The name of the heavy instance that is the current one.
    fn name(&self) -> String {
        heavy(self.service, self.count)
    }

    /// Moves the heavy instance. Returns what Consul is to be told.
    fn next(&mut self) -> String {
        self.count += 1;
        let service = self.backends.service(self.service, "heavy", &self.name());
        service.weights(HEAVY, 1).registration().to_string()
    }

    /// Makes a change, and calls `watch` when the answer to a blocking query has arrived: in the
    /// thread that asked, so that nobody has to be woken.
    fn change(
        &mut self,
        watch: impl FnOnce(&str, Instant) -> io::Result<Vec<Duration>> + Send,
    ) -> Vec<Duration> {
        let registration = self.next();
        let name = self.name();
        let index = self.consul.index(self.service);
        let (consul, service) = (self.consul, self.service);
        let (told, arrived, seen) = thread::scope(|scope| {
            let watcher = scope.spawn(|| {
                let (arrived, _) = consul.wait_change(service, index);
                (arrived, watch(&name, arrived))
            });
            thread::sleep(REST);
            let told = Instant::now();
            consul.put("/v1/agent/service/register", &registration);
            let (arrived, seen) = watcher.join().expect("a watcher does not panic");
            (told, arrived, seen)
        });
        assert!(arrived > told, "the query did not wait for the change");
        seen.unwrap_or_else(|error| panic!("{name}: {error}"))
    }
}

/// Asks all workers at once, again and again, until each has passed a request to `name`. When each
/// had its answer.
fn watch_workers(
    probes: &mut [Probe],
    name: &str,
    since: Instant,
    breath: Duration,
) -> io::Result<Vec<Duration>> {
    let mut seen: Vec<Option<Duration>> = vec![None; probes.len()];
    while seen.contains(&None) {
        in_time(since)?;
        let mut waiting: Vec<_> =
            probes.iter_mut().zip(&mut seen).filter(|(_, seen)| seen.is_none()).collect();
        for (probe, _) in &mut waiting {
            probe.send()?;
        }
        for (probe, seen) in waiting {
            let answer = probe.receive()?;
            assert_eq!(answer.worker, probe.worker, "a connection stays with its worker");
            if answer.backend == name {
                *seen = Some(since.elapsed());
            }
        }
        if !breath.is_zero() {
            thread::sleep(breath);
        }
    }
    Ok(seen.into_iter().flatten().collect())
}

/// Asks on new connections until so many workers have passed a request to `name`: only those that
/// a reload has started know it.
fn watch_reload(
    addr: SocketAddr,
    workers: usize,
    name: &str,
    since: Instant,
) -> io::Result<Vec<Duration>> {
    let mut seen = BTreeMap::new();
    while seen.len() < workers {
        in_time(since)?;
        // A worker that is about to end may take a connection and drop it: that is no answer.
        if let Ok(answer) = Probe::open(addr).and_then(|mut probe| probe.ask())
            && answer.backend == name
        {
            seen.entry(answer.worker).or_insert_with(|| since.elapsed());
        } else {
            thread::sleep(BREATH);
        }
    }
    Ok(seen.into_values().collect())
}

fn in_time(since: Instant) -> io::Result<()> {
    match since.elapsed() < PATIENCE {
        true => Ok(()),
        false => Err(io::Error::other(format!("not seen within {PATIENCE:?}"))),
    }
}

/// A connection to one worker. A request is one `write`, an answer one `read` as a rule: the
/// client shall not be what is measured.
struct Probe {
    stream: TcpStream,
    request: Vec<u8>,
    worker: u32,
}

struct Answered {
    worker: u32,
    backend: String,
}

fn probes(nginx: &Nginx) -> Vec<Probe> {
    let workers = nginx.worker_pids();
    let mut found: BTreeMap<u32, Probe> = BTreeMap::new();
    // The kernel spreads connections at random.
    eventually(PATIENCE, "a connection to each worker", || -> io::Result<()> {
        let mut probe = Probe::open(nginx.addr())?;
        probe.worker = probe.ask()?.worker;
        found.entry(probe.worker).or_insert(probe);
        match found.len() == workers.len() {
            true => Ok(()),
            false => Err(io::Error::other(format!("{:?} of {workers:?}", found.keys()))),
        }
    });
    found.into_values().collect()
}

impl Probe {
    fn open(addr: SocketAddr) -> io::Result<Probe> {
        let stream = TcpStream::connect(addr)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let request = format!("GET / HTTP/1.1\r\nHost: {addr}\r\n\r\n").into_bytes();
        Ok(Probe { stream, request, worker: 0 })
    }

    fn ask(&mut self) -> io::Result<Answered> {
        self.send()?;
        self.receive()
    }

    fn send(&mut self) -> io::Result<()> {
        self.stream.write_all(&self.request)
    }

    /// Reads a whole answer: a head, and as much as it says that follows.
    fn receive(&mut self) -> io::Result<Answered> {
        let mut bytes = Vec::with_capacity(1024);
        let mut buffer = [0; 1024];
        loop {
            match self.stream.read(&mut buffer)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                n => bytes.extend_from_slice(&buffer[..n]),
            }
            let text = String::from_utf8_lossy(&bytes);
            let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
            let header = |name: &str| {
                head.lines()
                    .filter_map(|line| line.split_once(": "))
                    .find(|(key, _)| key.eq_ignore_ascii_case(name))
                    .map(|(_, value)| value.to_owned())
            };
            let length = header("content-length").and_then(|length| length.parse().ok());
            if body.len() >= length.unwrap_or(0) {
                return Ok(Answered {
                    worker: header("x-worker").and_then(|pid| pid.parse().ok()).unwrap_or(0),
                    backend: header("x-backend").unwrap_or_default(),
                });
            }
        }
    }
}
