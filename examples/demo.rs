//! The module at work: a Consul, three backends, an nginx with two workers, and what happens to
//! requests while instances come and go.
//!
//! `make demo`, or `cargo run --release --example demo` once everything is built. On a terminal it
//! stays up to be played with; with `CI` set, or without a terminal, it ends by itself, and its
//! exit status tells whether every step was seen and no request lost.

use std::collections::{BTreeMap, BTreeSet};
use std::env;
use std::io::{self, IsTerminal, Write};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use testbed::http::{self, Conn};
use testbed::{
    Check, Consul, Dir, Load, Net, Nginx, Options, Process, Protocol, Service, Status, backend,
    eventually, paths,
};

const WORKERS: usize = 2;
const NAMES: [&str; 3] = ["web-1", "web-2", "web-3"];

/// With `max_fails=0` nginx does not avoid an instance that failed it: one that is gone is gone
/// because Consul said so, and that is what this demo is about.
const UPSTREAM: &str = "\
upstream web {
    zone            web 256k;
    consul_upstream web max_fails=0;
}";

/// The same service over TCP, whose connections do not outlive their instances.
const STREAM: &str = "\
upstream tcp {
    zone            tcp 256k;
    consul_upstream web max_fails=0;
    consul_session_drop on;
}";

/// How many connections are open over TCP when an instance goes.
const OPEN: usize = 20;

/// How many requests show how they spread after each step.
const SHOWN: usize = 300;

/// How long to wait until a step is seen. The longest thing in it is a check of Consul's that
/// runs every second.
const PATIENCE: Duration = Duration::from_secs(15);

/// So many answers in a row must come from the new set only until a worker counts as having it.
const CONFIRMED: usize = 60;

/// Between two requests of whoever watches a worker, so that watching does not take the machine.
const BREATH: Duration = Duration::from_micros(200);

fn main() -> ExitCode {
    let args: Vec<String> = env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let outcome = match args[..] {
        [] => demo(),
        // A backend is a process of its own, so that killing it is killing it.
        ["backend", addr, name] => serve(addr, name),
        _ => Err("it takes no arguments".into()),
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("demo: {error}");
            ExitCode::from(2)
        }
    }
}

fn serve(addr: &str, name: &str) -> Result<bool, String> {
    let addr = addr.parse().map_err(|_| format!("{addr} is no address"))?;
    Err(format!("backend {name} on {addr}: {}", backend::serve_forever(addr, name)))
}

fn demo() -> Result<bool, String> {
    // All that may be missing, before anything is started.
    let (nginx, consul) = (paths::nginx()?, paths::consul()?);
    paths::module(Protocol::Http)?;
    paths::module(Protocol::Stream)?;

    let mut stage = Stage::set()?;
    stage.introduce(&version(&nginx, "-v"), &version(&consul, "version"));
    let all_seen = stage.play();
    if io::stdout().is_terminal() && !is_ci() {
        stage.leave_to_the_user(&consul);
        testbed::wait_for_ctrl_c().map_err(|error| error.to_string())?;
        println!();
    }
    Ok(all_seen)
}

fn is_ci() -> bool {
    env::var("CI").is_ok_and(|ci| !ci.is_empty() && ci != "false")
}

/// Everything that runs.
struct Stage {
    nginx: Nginx,
    consul: Consul,
    backends: Vec<Backend>,
    /// Where the status is.
    status: SocketAddr,
    dir: Dir,
}

struct Backend {
    service: Service,
    addr: SocketAddr,
    process: Process,
}

/// Something that happens, and the instances that serve from then on.
struct Step {
    what: &'static str,
    act: fn(&mut Stage),
    serving: &'static [usize],
}

const STEPS: [Step; 7] = [
    Step { what: "web-1 registered", act: |stage| stage.register(&[0]), serving: &[0] },
    Step {
        what: "web-2 and web-3 registered",
        act: |stage| stage.register(&[1, 2]),
        serving: &[0, 1, 2],
    },
    Step {
        what: "web-2 in maintenance",
        act: |stage| stage.consul.maintenance("web-2", true, "the demo"),
        serving: &[0, 2],
    },
    Step {
        what: "web-2 back from maintenance",
        act: |stage| stage.consul.maintenance("web-2", false, ""),
        serving: &[0, 1, 2],
    },
    Step {
        what: "web-3's check critical",
        act: |stage| stage.consul.check("web-3", Status::Critical),
        serving: &[0, 1],
    },
    Step {
        what: "web-3's check passing again",
        act: |stage| stage.consul.check("web-3", Status::Passing),
        serving: &[0, 1, 2],
    },
    Step {
        what: "nothing: web-1 killed *",
        act: |stage| stage.backends[0].process.kill(),
        serving: &[1, 2],
    },
];

impl Stage {
    fn set() -> Result<Stage, String> {
        let (net, dir) = (Net::localhost(), Dir::new("demo"));
        let consul = Consul::builder(&net, &dir).try_start()?;
        let backends = NAMES
            .iter()
            .map(|name| Backend::start(name, (net.ip(1), net.port()).into()))
            .collect::<Result<_, _>>()?;
        let status = (net.ip(1), net.port()).into();
        let nginx = Nginx::builder(&net, &dir)
            .workers(WORKERS)
            .http(format!("consul_address {};", consul.url()))
            .http(UPSTREAM)
            .server("web")
            .listen(status)
            .http(format!("server {{ listen {status}; location / {{ consul_status; }} }}"))
            .stream(format!("consul_address {};", consul.url()))
            .stream(STREAM)
            .server_of(Protocol::Stream, "tcp")
            .try_start()?;
        Ok(Stage { nginx, consul, backends, status, dir })
    }

    fn introduce(&self, nginx: &str, consul: &str) {
        println!("A Consul service becomes an nginx upstream, live.\n");
        println!("  {consul:<14} {}", self.consul.url());
        let pids: Vec<String> = self.nginx.worker_pids().iter().map(u32::to_string).collect();
        println!("  {nginx:<14} http://{}, workers {}", self.nginx.addr(), pids.join(" and "));
        let backends: Vec<String> =
            self.backends.iter().map(|b| format!("{} {}", b.service.id, b.addr)).collect();
        println!("  {:<14} {}", "backends", backends.join(", "));
        println!(
            "  {:<14} http://{}/, a page that tells all of this as it happens\n",
            "status", self.status
        );
        for line in UPSTREAM.lines() {
            println!("  {line}");
        }
        println!();
        println!("  {:<30} {:>15}   the next {SHOWN} requests", "Consul is told", "in all workers");
    }

    /// Plays every step, under load. Whether all were seen, and no request lost.
    fn play(&mut self) -> bool {
        let options = Options::default().connections(4).pause(Duration::from_millis(2));
        let mut load = None;
        let mut all_seen = true;
        for step in &STEPS {
            all_seen &= self.play_step(step).unwrap_or_else(|error| {
                println!("{error}");
                false
            });
            // Before the first instance there is nothing to lose.
            load.get_or_insert_with(|| Load::start(self.nginx.addr(), &options));
        }
        all_seen &= self.play_stream().unwrap_or_else(|error| {
            println!("{error}");
            false
        });
        println!("\n  * its check by Consul runs once a second; until then nginx finds another\n");
        let report = load.expect("there are steps").stop();
        println!(
            "  in the background all the while: {} requests, {} lost",
            report.sent(),
            report.lost
        );
        for loss in &report.losses {
            println!("    after {:.3} s: {} {}", loss.at.as_secs_f64(), loss.why, loss.upstream);
        }
        all_seen && report.sent() > 0 && report.lost == 0
    }

    fn play_step(&mut self, step: &Step) -> Result<bool, String> {
        print!("  {:<30} ", step.what);
        // The line is finished when the step was seen.
        let _ = io::stdout().flush();

        let serving: BTreeSet<SocketAddr> =
            step.serving.iter().map(|&n| self.backends[n].addr).collect();
        let workers = self.nginx.worker_pids();
        let mut conns: Vec<Conn> = http::worker_conns(self.nginx.addr(), workers)
            .map_err(|error| error.to_string())?
            .into_values()
            .collect();
        let told = OnceLock::new();
        let everywhere = thread::scope(|scope| {
            let watchers: Vec<_> =
                conns.iter_mut().map(|conn| scope.spawn(|| watch(conn, &serving, &told))).collect();
            told.get_or_init(Instant::now);
            (step.act)(self);
            watchers
                .into_iter()
                .map(|watcher| watcher.join().expect("a watcher does not panic"))
                .try_fold(Duration::ZERO, |slowest, seen| Ok::<_, String>(slowest.max(seen?)))
        })?;

        let spread = spread(&mut conns).map_err(|error| error.to_string())?;
        let columns: Vec<String> = NAMES
            .iter()
            .map(|&name| match spread.get(name) {
                Some(count) => format!("{name} {count:>3}"),
                None => " ".repeat(name.len() + 4),
            })
            .chain(spread.iter().filter(|(name, _)| !NAMES.contains(&&***name)).map(
                // No backend's answer: there should be none.
                |(status, count)| format!("status {status}: {count}"),
            ))
            .collect();
        let expected: BTreeSet<&str> = step.serving.iter().map(|&n| NAMES[n]).collect();
        let out = why_not(self.status, &expected)?;
        let line = format!(
            "{:>12.1} ms   {}   {}",
            everywhere.as_secs_f64() * 1e3,
            columns.join("   "),
            out.join(", ")
        );
        println!("{}", line.trim_end());
        Ok(spread.keys().map(String::as_str).collect::<BTreeSet<_>>() == expected)
    }

    /// The last step, over TCP: of two instances that have connections one is deregistered. Its
    /// connections are closed, those of the other one go on.
    fn play_stream(&mut self) -> Result<bool, String> {
        let tcp = self.nginx.addrs()[2];
        print!("  {:<30} ", "web-3 deregistered, over TCP");
        let _ = io::stdout().flush();
        let mut open: BTreeMap<String, Vec<Conn>> = BTreeMap::new();
        for _ in 0..OPEN {
            let mut conn = Conn::open(tcp).map_err(|error| error.to_string())?;
            let answer = conn.get("/").map_err(|error| format!("over TCP: {error}"))?;
            open.entry(answer.backend().to_owned()).or_default().push(conn);
        }
        let (mut gone, mut stays) =
            (open.remove("web-3").unwrap_or_default(), open.remove("web-2").unwrap_or_default());
        let (had, has) = (gone.len(), stays.len());
        let begin = Instant::now();
        self.consul.deregister("web-3");
        while !gone.is_empty() {
            gone.retain_mut(|conn| conn.get("/").is_ok());
            if begin.elapsed() > PATIENCE {
                return Err(format!("{} of {had} connections are open still", gone.len()));
            }
        }
        let closed = begin.elapsed();
        let alive = stays.iter_mut().filter_map(|conn| conn.get("/").ok()).count();
        println!(
            "{:>12.1} ms   {had} connections to web-3 closed, {alive} of {has} to web-2 go on",
            closed.as_secs_f64() * 1e3
        );
        Ok(open.is_empty() && had > 0 && has > 0 && alive == has)
    }

    fn register(&self, which: &[usize]) {
        let services: Vec<Service> =
            which.iter().map(|&n| self.backends[n].service.clone()).collect();
        self.consul.register_all(&services);
    }

    fn leave_to_the_user(&self, consul: &Path) {
        let consul = match env::split_paths(&env::var_os("PATH").unwrap_or_default())
            .any(|dir| dir.join("consul") == consul)
        {
            true => "consul".to_owned(),
            false => from_here(consul),
        };
        let (api, web, status) = (self.consul.url(), self.nginx.addr(), self.status);
        let log = from_here(&self.dir.join("nginx.log"));
        let demo = env::current_exe().map_or_else(|_| "demo".into(), |exe| from_here(&exe));
        let [killed, _, other] = &self.backends[..] else { unreachable!("there are three") };
        println!(
            r#"
  It stays up until Ctrl-C. What happens is on the page http://{status}/.
  To play with it, in other terminals:

    while sleep 0.2; do curl -s http://{web}/; echo; done    # who answers
    tail -f {log}

    {consul} maint -http-addr={api} -enable -service=web-2
    {consul} maint -http-addr={api} -disable -service=web-2
    {consul} services deregister -http-addr={api} -id=web-2
    curl -X PUT {api}/v1/agent/service/register -d \
      '{{"Name":"web","ID":"web-3","Address":"{}","Port":{}}}'
    {demo} backend {} web-1    # the killed one is back"#,
            other.addr.ip(),
            other.addr.port(),
            killed.addr,
        );
    }
}

impl Backend {
    fn start(name: &str, addr: SocketAddr) -> Result<Backend, String> {
        let exe = env::current_exe().map_err(|error| error.to_string())?;
        let mut command = Command::new(exe);
        command.args(["backend", &addr.to_string(), name]).stdout(Stdio::null());
        let process = Process::spawn(&mut command).map_err(|error| error.to_string())?;
        eventually(PATIENCE, &format!("backend {name} answers"), || {
            http::get(addr, backend::HEALTH)
        });
        let check = format!("http://{addr}{}", backend::HEALTH);
        let service = Service::new("web", name, addr)
            // Known to be well from the start, as it is here: Consul need not ask first.
            .check(Check::http(&check, Duration::from_secs(1)).initially(Status::Passing))
            .check(Check::ttl());
        Ok(Backend { service, addr, process })
    }
}

/// Asks one worker again and again, until it has passed requests to each of `serving` and to no
/// others any more. How long that took since Consul was told.
fn watch(
    conn: &mut Conn,
    serving: &BTreeSet<SocketAddr>,
    told: &OnceLock<Instant>,
) -> Result<Duration, String> {
    let mut missing = serving.clone();
    let mut since = None;
    let mut in_a_row = 0;
    loop {
        let told = told.get().copied();
        let answer = conn.get("/").map_err(|error| format!("a watched worker: {error}"))?;
        let Some(told) = told else { continue };
        let now = told.elapsed();

        // Also an instance that nginx tried in vain is one that it still has.
        let tried = answer.tried();
        for addr in &tried {
            if missing.remove(addr) {
                since = Some(now);
            }
        }
        if answer.status == 200 && tried.iter().all(|addr| serving.contains(addr)) {
            in_a_row += 1;
            since = since.or(Some(now));
        } else {
            in_a_row = 0;
            since = None;
        }
        if let Some(since) = since
            && missing.is_empty()
            && in_a_row >= CONFIRMED
        {
            return Ok(since);
        }
        if now > PATIENCE {
            let seen = format!("status {}, tried {:?}", answer.status, answer.tried());
            return Err(format!("not seen in {PATIENCE:?} (last: {seen})"));
        }
        thread::sleep(BREATH);
    }
}

/// Waits until the status names these instances as those that serve: which others there are, and
/// why they do not.
fn why_not(status: SocketAddr, serving: &BTreeSet<&str>) -> Result<Vec<String>, String> {
    let text = |row: &Value, field: &str| row[field].as_str().unwrap_or_default().to_owned();
    let begin = Instant::now();
    loop {
        let answer = http::get(status, "/").map_err(|error| format!("the status: {error}"))?;
        let web = answer.json()["upstreams"]["web"].take();
        let rows = |list: &str| web[list].as_array().cloned().unwrap_or_default();
        let names: BTreeSet<String> =
            rows("peers").iter().map(|peer| text(peer, "service_id")).collect();
        let out = rows("excluded");
        let why =
            out.iter().map(|row| format!("{}: {}", text(row, "service_id"), text(row, "reason")));
        let registered = web["sources"][0]["registered"].as_u64().unwrap_or_default();
        if names.iter().eq(serving) && registered as usize == names.len() + out.len() {
            return Ok(why.collect());
        }
        if begin.elapsed() > PATIENCE {
            return Err(format!("the status says otherwise: {web}"));
        }
        thread::sleep(Duration::from_millis(5));
    }
}

/// Who answers the next requests, the workers asked in turn.
fn spread(conns: &mut [Conn]) -> io::Result<BTreeMap<String, usize>> {
    let mut spread = BTreeMap::new();
    for n in 0..SHOWN {
        let workers = conns.len();
        let answer = conns[n % workers].get("/")?;
        let name = match answer.backend() {
            "" => answer.status.to_string(),
            name => name.to_owned(),
        };
        *spread.entry(name).or_default() += 1;
    }
    Ok(spread)
}

/// A name and version, as the program says it.
fn version(binary: &Path, flag: &str) -> String {
    let Ok(said) = Command::new(binary).arg(flag).output() else { return String::new() };
    // nginx says it on standard error: "nginx version: nginx/1.28.3"; Consul: "Consul v1.8.7".
    let said = String::from_utf8_lossy(&[said.stdout, said.stderr].concat()).into_owned();
    let line = said.lines().next().unwrap_or_default();
    line.trim_start_matches("nginx version: ").replace('/', " ").replace(" v", " ")
}

/// A path as one would type it here.
fn from_here(path: &Path) -> String {
    env::current_dir()
        .ok()
        .and_then(|here| path.strip_prefix(here).ok())
        .unwrap_or(path)
        .display()
        .to_string()
}
