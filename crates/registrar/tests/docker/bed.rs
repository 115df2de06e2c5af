//! What each test needs: a Consul, containers and registrars.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::path::PathBuf;
use std::process::{Command, ExitStatus};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use serde_json::Value;
use testbed::docker::{self, Container};
use testbed::{Consul, Dir, Docker, Net, Process, Relay, Signal, eventually, paths};

/// How long anything may take.
pub const SOON: Duration = Duration::from_secs(15);

/// What registrars call their host, unless a test says otherwise.
pub const HOST: &str = "h";

/// One published port.
pub const PUBLISHED: [&str; 2] = ["--publish", "127.0.0.1::80"];

const STUBBORN: &str = "trap : TERM; echo ready; while :; do sleep 0.05; done";

pub struct Bed {
    pub net: Net,
    pub dir: Dir,
    pub docker: &'static Docker,
    pub consul: Consul,
}

impl Bed {
    /// None where there is no engine, which was said.
    pub fn new(name: &str) -> Option<Bed> {
        Bed::with(name, |consul| consul)
    }

    /// With a Consul that is started in another way.
    pub fn with(
        name: &str,
        change: impl FnOnce(testbed::consul::Builder) -> testbed::consul::Builder,
    ) -> Option<Bed> {
        let docker = Docker::get()?;
        let (net, dir) = (Net::isolated(), Dir::new(&format!("registrar_{name}")));
        let consul = change(Consul::builder(&net, &dir)).start();
        Some(Bed { net, dir, docker, consul })
    }

    /// A registrar with these options.
    pub fn registrar(&self, options: &[&str]) -> Registrar {
        self.launch(options).start()
    }

    pub fn launch(&self, options: &[&str]) -> Launch {
        let uri = self.consul.url().replace("http://", "consul://");
        let mut args = vec!["-hostname".to_owned(), HOST.to_owned()];
        args.extend(options.iter().map(|option| (*option).to_owned()));
        args.push(uri);
        Launch { args, env: Vec::new(), dir: self.dir.clone() }
    }

    /// A container with these arguments of `docker run`.
    pub fn container(&self, part: &str, args: &[&str]) -> Container {
        self.docker.run(&self.docker.name(part), args)
    }

    /// One with a published port and labels.
    pub fn labelled(&self, labels: &[&str]) -> Container {
        let labels = labels.iter().flat_map(|label| ["--label", label]);
        let args: Vec<&str> = PUBLISHED.into_iter().chain(labels).collect();
        self.container("web", &args)
    }

    /// One that does not end when it is told to, with a published port and these arguments of
    /// `docker run`, once it is registered.
    pub fn stubborn(&self, args: &[&str]) -> Container {
        let args = [&PUBLISHED, args].concat();
        let container = self.docker.run_script(&self.docker.name("web"), &args, STUBBORN);
        self.registered(&id(&container, 80));
        container
    }

    /// Tells a container to end, and waits until it is in maintenance for that.
    pub fn drains(&self, container: &Container) {
        container.docker(&["kill", "--signal=TERM"]);
        self.in_maintenance(&id(container, 80), "registrar: stopping");
    }

    /// Something between a registrar and the engine that can be told to fail.
    pub fn relay(&self) -> Relay {
        // Not in the test's directory: a socket's path is short.
        let path = std::env::temp_dir().join(self.docker.name("engine"));
        Relay::start(path, docker::SOCKET)
    }

    // ---- what the agent has

    pub fn services(&self) -> BTreeMap<String, Value> {
        map(self.consul.get("/v1/agent/services"))
    }

    pub fn service(&self, id: &str) -> Option<Value> {
        self.services().remove(id)
    }

    /// Waits for a service.
    pub fn registered(&self, id: &str) -> Value {
        self.until(id, "is registered", |_| true)
    }

    /// Waits for a service that is as it should be.
    pub fn until(&self, id: &str, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        eventually(SOON, &format!("{id} {what}"), || match self.service(id) {
            Some(service) if wanted(&service) => Ok(service),
            Some(service) => Err(service.to_string()),
            None => Err(format!("only {:?}", self.services().keys())),
        })
    }

    pub fn gone(&self, id: &str) {
        eventually(SOON, &format!("{id} is deregistered"), || self.service(id).is_none());
    }

    /// The checks of a service, by ID.
    pub fn checks(&self, id: &str) -> BTreeMap<String, Value> {
        let mut checks = map(self.consul.get("/v1/agent/checks"));
        checks.retain(|_, check| check["ServiceID"] == id);
        checks
    }

    /// Waits until a check of a service is as it should be.
    pub fn check(
        &self,
        id: &str,
        check: &str,
        what: &str,
        wanted: impl Fn(&Value) -> bool,
    ) -> Value {
        let check = format!("{check}:{id}");
        eventually(SOON, &format!("check {check} {what}"), || {
            let checks = self.checks(id);
            match checks.get(&check) {
                Some(found) if wanted(found) => Ok(found.clone()),
                _ => Err(format!("{checks:?}")),
            }
        })
    }

    /// The reason of a service's maintenance.
    pub fn maintenance(&self, id: &str) -> Option<String> {
        let check = self.checks(id).remove(&format!("_service_maintenance:{id}"))?;
        Some(check["Notes"].as_str().unwrap_or_default().to_owned())
    }

    pub fn in_maintenance(&self, id: &str, reason: &str) {
        eventually(SOON, &format!("{id} is in maintenance: {reason}"), || {
            match self.maintenance(id) {
                Some(is) if is.starts_with(reason) => Ok(()),
                other => Err(format!("{other:?}")),
            }
        });
    }

    pub fn out_of_maintenance(&self, id: &str) {
        eventually(SOON, &format!("{id} is not in maintenance"), || match self.maintenance(id) {
            None => Ok(()),
            Some(reason) => Err(reason),
        });
    }

    /// Waits until the registrars have seen all that has happened to containers until now: events
    /// come in order, so one that comes and goes is proof of it.
    pub fn settled(&self) {
        let marker = self.labelled(&[]);
        self.registered(&id(&marker, 80));
        let id = id(&marker, 80);
        drop(marker);
        self.gone(&id);
    }
}

fn map(value: Value) -> BTreeMap<String, Value> {
    serde_json::from_value(value).expect("a map by ID")
}

/// The ID that a container's port has, unless a label says otherwise.
pub fn id(container: &Container, port: u16) -> String {
    format!("{HOST}:{}:{port}", container.name())
}

pub struct Launch {
    args: Vec<String>,
    env: Vec<(String, String)>,
    dir: Dir,
}

impl Launch {
    pub fn env(mut self, name: &str, value: &str) -> Launch {
        self.env.push((name.into(), value.into()));
        self
    }

    pub fn engine(self, socket: &std::path::Path) -> Launch {
        let host = format!("unix://{}", socket.display());
        self.env("DOCKER_HOST", &host)
    }

    /// Another way to the agent.
    pub fn uri(mut self, uri: &str) -> Launch {
        *self.args.last_mut().expect("the URI is the last one") = uri.to_owned();
        self
    }

    /// Without the options that come before a test's own.
    pub fn without_hostname(mut self) -> Launch {
        self.args.drain(..2);
        self
    }

    pub fn start(self) -> Registrar {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let n = COUNT.fetch_add(1, Ordering::Relaxed);
        let log = self.dir.join(format!("registrar-{n}.log"));
        let file = OpenOptions::new().create(true).append(true).open(&log).expect("open a log");
        let mut command = Command::new(paths::registrar(env!("CARGO_BIN_EXE_registrar")).unwrap());
        command
            .args(&self.args)
            .env_clear()
            .envs(self.env)
            .stdout(file.try_clone().expect("clone a file"))
            .stderr(file);
        let process = Process::spawn(&mut command).expect("start a registrar");
        Registrar { process, log }
    }
}

/// A running registrar, which is killed with the value.
pub struct Registrar {
    process: Process,
    log: PathBuf,
}

impl Registrar {
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    pub fn says(&self, text: &str) {
        eventually(SOON, &format!("the log says {text:?}"), || {
            let log = self.log();
            if log.contains(text) { Ok(()) } else { Err(log) }
        });
    }

    pub fn signal(&mut self, signal: Signal) {
        self.process.signal(signal);
    }

    pub fn kill(&mut self) {
        self.process.kill();
    }

    pub fn ended(&mut self, within: Duration) -> Option<ExitStatus> {
        self.process.wait(within)
    }

    pub fn is_running(&mut self) -> bool {
        self.process.ended().is_none()
    }

    pub fn pid(&self) -> u32 {
        self.process.id()
    }
}
