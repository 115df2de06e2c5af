//! `compose.yaml` at work, under a project name and on ports of its own.

use std::collections::BTreeSet;
use std::net::{SocketAddr, TcpListener};
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::{Duration, SystemTime};

use serde_json::Value;
use testbed::{Docker, eventually, http};

/// How long anything may take that has no bar of its own.
pub const PATIENCE: Duration = Duration::from_secs(60);

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// All that a stack may be made of.
const PROFILES: [&str; 3] = ["test", "monitoring", "datacenters"];

pub struct Stack {
    program: Vec<String>,
    project: String,
    profiles: Vec<&'static str>,
    files: Vec<&'static str>,
    env: Vec<(&'static str, String)>,
    /// nginx with what is set in its environment.
    pub nginx: SocketAddr,
    /// The one that never tries again.
    pub once: SocketAddr,
    /// The one that shows two datacenters.
    pub datacenters: SocketAddr,
    pub consul: SocketAddr,
    pub prometheus: SocketAddr,
    status: SocketAddr,
}

impl Stack {
    /// Brings services up. None where there is no engine, which was said.
    pub fn up(name: &str, services: &[&str]) -> Option<Stack> {
        let stack = Stack::new(name)?;
        stack.start(services);
        Some(stack)
    }

    /// All services of a profile, and those that have none.
    pub fn of_profile(name: &'static str) -> Option<Stack> {
        let mut stack = Stack::new(name)?;
        stack.profiles = vec![name];
        stack.start(&[]);
        Some(stack)
    }

    /// A registrar that reaches the engine through a proxy.
    pub fn behind_a_proxy(name: &str, services: &[&str]) -> Option<Stack> {
        let mut stack = Stack::new(name)?;
        stack.files.push("tests/stack/proxy.yaml");
        stack.start(services);
        Some(stack)
    }

    fn new(name: &str) -> Option<Stack> {
        let docker = Docker::get()?;
        let [nginx, once, datacenters, consul, prometheus, status] = free_ports();
        let port = |addr: SocketAddr| addr.port().to_string();
        let env = vec![
            ("NGINX_PORT", nginx.to_string()),
            ("ONCE_PORT", once.to_string()),
            ("DATACENTERS_PORT", port(datacenters)),
            ("CONSUL_PORT", port(consul)),
            ("PROMETHEUS_PORT", port(prometheus)),
            ("STATUS_PORT", port(status)),
            // How long the older Compose waits for the engine, which may be busy.
            ("COMPOSE_HTTP_TIMEOUT", "300".to_owned()),
        ];
        let project = docker.name(name).replace(|c: char| !c.is_ascii_alphanumeric(), "");
        Some(Stack {
            program: compose(),
            project,
            profiles: Vec::new(),
            files: vec!["compose.yaml", "tests/stack/compose.yaml"],
            env,
            nginx,
            once,
            datacenters,
            consul,
            prometheus,
            status,
        })
    }

    #[track_caller]
    fn start(&self, services: &[&str]) {
        self.compose(&[&["up", "--detach", "--no-build"], services].concat());
    }

    /// What nginx says of itself.
    pub fn status(&self) -> Result<Value, String> {
        let answer = http::get(self.status, "/").map_err(|err| err.to_string())?;
        Ok(answer.json())
    }

    /// Runs compose.
    #[track_caller]
    pub fn compose(&self, args: &[&str]) -> String {
        let output = self.try_compose(args);
        assert!(output.status.success(), "compose {}: {}", args.join(" "), text(&output));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    fn try_compose(&self, args: &[&str]) -> Output {
        let (program, first) = self.program.split_first().expect("a program");
        Command::new(program)
            .args(first)
            .args(self.files.iter().flat_map(|file| ["--file", file]))
            .args(self.profiles.iter().flat_map(|profile| ["--profile", profile]))
            .args(["--project-name", &self.project])
            .args(args)
            .envs(self.env.iter().map(|(name, value)| (*name, value)))
            .current_dir(ROOT)
            .stdin(Stdio::null())
            .output()
            .expect("run compose")
    }

    /// Scales a service, and does nothing to the others.
    #[track_caller]
    pub fn scale(&self, service: &str, number: usize) {
        let scale = format!("{service}={number}");
        self.compose(&[
            "up",
            "--detach",
            "--no-build",
            "--no-recreate",
            "--scale",
            &scale,
            service,
        ]);
    }

    /// The running containers of a service.
    #[track_caller]
    pub fn containers(&self, service: &str) -> Vec<Container> {
        let project = format!("label=com.docker.compose.project={}", self.project);
        let service = format!("label=com.docker.compose.service={service}");
        let ids = docker(&["ps", "-q", "--no-trunc", "--filter", &project, "--filter", &service]);
        ids.lines().map(|id| Container { id: id.to_owned() }).collect()
    }

    /// The one container of a service.
    #[track_caller]
    pub fn container(&self, service: &str) -> Container {
        let mut all = self.containers(service);
        assert_eq!(all.len(), 1, "{service}");
        all.remove(0)
    }

    /// The names under which the containers of a service answer.
    pub fn names(&self, service: &str) -> BTreeSet<String> {
        self.containers(service).iter().map(Container::name).collect()
    }

    /// What is registered of a service: the names of the containers.
    pub fn registered(&self, service: &str) -> Result<BTreeSet<String>, String> {
        let name = |service: &Value| {
            let id = service["Meta"]["registrar_container"].as_str().unwrap_or_default();
            id.chars().take(12).collect()
        };
        Ok(self.services(service)?.iter().map(name).collect())
    }

    /// What is registered of a service: the IDs.
    pub fn ids(&self, service: &str) -> Result<BTreeSet<String>, String> {
        let id = |service: &Value| service["ID"].as_str().unwrap_or_default().to_owned();
        Ok(self.services(service)?.iter().map(id).collect())
    }

    fn services(&self, service: &str) -> Result<Vec<Value>, String> {
        let path = format!("/v1/health/service/{service}");
        let answer = http::get(self.consul, &path).map_err(|err| err.to_string())?;
        // While it is restarted it has no leader.
        if answer.status != 200 {
            return Err(answer.text());
        }
        let mut entries = answer.json();
        let entries = entries.as_array_mut().ok_or_else(|| answer.text())?;
        Ok(entries.iter_mut().map(|entry| entry["Service"].take()).collect())
    }

    /// Waits until Consul knows what runs, no more and no less.
    #[track_caller]
    pub fn converged(&self, service: &str, within: Duration) {
        eventually(within, &format!("Consul knows what runs of {service}"), || {
            let (runs, known) = (self.names(service), self.registered(service)?);
            if runs == known { Ok(()) } else { Err(format!("{known:?} of {runs:?}")) }
        });
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        if thread::panicking() {
            let logs = self.try_compose(&["logs", "--no-color", "--timestamps"]).stdout;
            for line in String::from_utf8_lossy(&logs).lines() {
                // But for the requests.
                if !line.contains("\"GET /") {
                    eprintln!("{line}");
                }
            }
        }
        self.profiles = PROFILES.into();
        let down = self.try_compose(&["down", "--volumes", "--remove-orphans", "--timeout", "1"]);
        if !down.status.success() {
            eprintln!("compose down: {}", text(&down));
            // It gives up at a network that the engine does not let go, before it comes to the volumes.
            let project = format!("label=com.docker.compose.project={}", self.project);
            let volumes = Command::new("docker")
                .args(["volume", "ls", "--quiet", "--filter", &project])
                .output();
            let volumes = volumes.map(|output| output.stdout).unwrap_or_default();
            for volume in String::from_utf8_lossy(&volumes).lines() {
                let _ = Command::new("docker").args(["volume", "rm", "--force", volume]).output();
            }
        }
    }
}

pub struct Container {
    id: String,
}

impl Container {
    /// Its host name, which is what it answers with.
    pub fn name(&self) -> String {
        self.id.chars().take(12).collect()
    }

    /// `docker VERB ARGS… ID`
    #[track_caller]
    pub fn docker(&self, args: &[&str]) -> String {
        docker(&[args, &[self.id.as_str()]].concat())
    }

    #[track_caller]
    pub fn exec(&self, args: &[&str]) -> String {
        docker(&[&["exec", self.id.as_str()], args].concat())
    }

    /// Kills its first process, which Docker does not know of before it is dead.
    #[track_caller]
    pub fn crash(&self) {
        let pid = self.docker(&["inspect", "--format", "{{.State.Pid}}"]);
        let killed = Command::new("kill").args(["-9", &pid]).status().expect("run kill");
        assert!(killed.success(), "a process of a container takes root to be killed");
    }

    /// When it started, or ended.
    #[track_caller]
    pub fn time(&self, of: &str) -> SystemTime {
        time(&self.docker(&["inspect", "--format", &format!("{{{{.State.{of}}}}}")]))
    }
}

/// A time as Docker writes it.
pub fn time(text: &str) -> SystemTime {
    let seconds = Command::new("date").args(["--date", text, "+%s.%N"]).output();
    let seconds = seconds.expect("run date").stdout;
    let seconds: f64 = String::from_utf8_lossy(&seconds).trim().parse().expect("a time");
    SystemTime::UNIX_EPOCH + Duration::from_secs_f64(seconds)
}

/// Runs the docker program; what it says, without the line's end.
#[track_caller]
pub fn docker(args: &[&str]) -> String {
    let output = Command::new("docker").args(args).stdin(Stdio::null()).output();
    let output = output.expect("run docker");
    assert!(output.status.success(), "docker {}: {}", args.join(" "), text(&output));
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Compose v2, or else the program of before.
fn compose() -> Vec<String> {
    let v2 = Command::new("docker").args(["compose", "version"]).output();
    if v2.is_ok_and(|output| output.status.success()) {
        vec!["docker".into(), "compose".into()]
    } else {
        vec!["docker-compose".into()]
    }
}

/// Ports that were free just now.
fn free_ports<const N: usize>() -> [SocketAddr; N] {
    let listeners: [TcpListener; N] =
        std::array::from_fn(|_| TcpListener::bind("127.0.0.1:0").expect("a free port"));
    listeners.each_ref().map(|listener| listener.local_addr().expect("an address"))
}
