//! A rolling replacement under load: how many requests are lost. `benches/README.md` tells how to
//! read the table.

#[allow(dead_code, reason = "each benchmark uses its part of what they share")]
mod common;

use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use testbed::nginx::Builder;
use testbed::{Backend, Consul, Dir, Load, Net, Nginx, Options, Report, Service};

use common::figure::Figure;
use common::rival::RenderAndReload;

const INSTANCES: usize = 8;
const WORKERS: usize = 4;

/// An old instance ends so long after Consul was told that it goes.
const GRACE: Duration = Duration::from_millis(100);

/// Nothing may make up for a request that was sent to an instance which is gone.
const HTTP: &str = "proxy_next_upstream off;";

/// Those of the classic template, and connections kept so that the load is on nginx and not on
/// the kernel.
const UPSTREAM: &str = "keepalive 32;";
const PARAMETERS: &str = "max_fails=3 fail_timeout=60";

struct Size {
    changes: usize,
    /// Requests for each change, at least.
    requests: u64,
}

const FULL: Size = Size { changes: 50, requests: 1_050 };
const QUICK: Size = Size { changes: 6, requests: 200 };

fn main() -> ExitCode {
    let quick = common::is_quick();
    let size = if quick { QUICK } else { FULL };
    let (net, dir) = (Net::isolated(), Dir::new("rolling"));
    let consul = Consul::start(&net, &dir);
    println!(
        "rolling: {INSTANCES} instances replaced one by one, {} in all; {WORKERS} workers, \
         proxy_next_upstream off,\nan old instance ends {} ms after its deregistration\n",
        size.changes,
        GRACE.as_millis()
    );
    println!(
        "{:<20} {:>8} {:>10} {:>8} {:>10} {:>13} {:>9}",
        "", "changes", "requests", "lost", "reloads", "reconnected", "seconds"
    );
    let conf = |name: &str| -> Builder {
        Nginx::builder(&net, &dir).name(name).workers(WORKERS).http(HTTP)
    };

    let ours = {
        let rollout = Rollout::new(&net, &consul, "ours");
        let nginx = conf("ours")
            .http(format!("consul_address {};", consul.url()))
            .http(format!(
                "upstream ours {{ zone ours 256k; consul_upstream ours {PARAMETERS}; {UPSTREAM} }}"
            ))
            .server("ours")
            .start();
        let report = rollout.run(&nginx, &size);
        tell("consul_upstream", &size, &report, 0);
        report
    };
    let theirs = {
        let rollout = Rollout::new(&net, &consul, "theirs");
        let rival =
            RenderAndReload::start(&consul, &dir, conf("theirs"), "theirs", UPSTREAM, PARAMETERS);
        let report = rollout.run(rival.nginx(), &size);
        tell("render and reload", &size, &report, rival.reloads());
        report
    };

    Figure {
        bench: "rolling",
        what: &format!("requests lost by {} replacements", size.changes),
        ours: ours.lost as f64,
        rival: Some(("render and reload", theirs.lost as f64)),
        bar: Some(0.0),
    }
    .note();
    if let Some(loss) = theirs.losses.first() {
        println!("\nthe first that render and reload lost: {} ({})", loss.why, loss.upstream);
    } else if !quick {
        println!("\nnothing was lost at all: this run was not hard enough to show a difference");
    }
    if ours.lost > 0 {
        println!("\nconsul_upstream LOST requests: {ours}");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

fn tell(who: &str, size: &Size, report: &Report, reloads: usize) {
    println!(
        "{who:<20} {:>8} {:>10} {:>8} {:>10} {:>13} {:>9.1}",
        size.changes,
        report.sent(),
        report.lost,
        reloads,
        report.reconnected,
        report.elapsed.as_secs_f64(),
    );
}

/// A service's instances, the oldest of which is replaced next.
struct Rollout<'a> {
    net: &'a Net,
    consul: &'a Consul,
    service: &'static str,
    instances: Vec<(String, Backend)>,
    count: usize,
}

impl<'a> Rollout<'a> {
    fn new(net: &'a Net, consul: &'a Consul, service: &'static str) -> Rollout<'a> {
        let mut rollout = Rollout { net, consul, service, instances: Vec::new(), count: 0 };
        for _ in 0..INSTANCES {
            rollout.start_one();
        }
        rollout
    }

    fn start_one(&mut self) {
        let id = format!("{}-{}", self.service, self.count);
        self.count += 1;
        let backend = Backend::start(self.net, 20, &id);
        self.consul.register(&Service::new(self.service, &id, backend.addr()));
        self.instances.push((id, backend));
    }

    fn run(mut self, nginx: &Nginx, size: &Size) -> Report {
        // Not all that the machine can do: a reload needs some of it, too.
        let options = Options::default().connections(8).pause(Duration::from_millis(1));
        let load = Load::start(nginx.addr(), &options);
        load.wait_for(size.requests);
        for n in 1..=size.changes as u64 {
            self.start_one();
            let (id, old) = self.instances.remove(0);
            let told = Instant::now();
            self.consul.deregister(&id);
            thread::sleep(GRACE.saturating_sub(told.elapsed()));
            old.stop();
            // However fast the machine is, each change meets its requests.
            load.wait_for((n * size.requests).saturating_sub(load.report().sent()));
        }
        load.stop()
    }
}
