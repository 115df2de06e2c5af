//! A real Consul agent, and what an operator tells it.
//!
//! An agent answers a change of its services or checks before its servers know of it (it syncs in
//! the background). So the methods here that make a change return once `/v1/health` shows it,
//! which is what whoever follows Consul can see at the earliest. What a test wants to do without
//! waiting goes through [`Consul::raw`].

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::Command;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use bytes::Bytes;
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::dir::{read_lossy, tail};
use crate::eventually::within;
use crate::http::{Answer, Conn};
use crate::{Dir, Net, Process, eventually, paths, processes};

mod acl;
mod cluster;
mod service;
mod tls;
mod unix;

pub use acl::{MASTER_TOKEN, Token};
pub use cluster::Cluster;
pub use service::{Check, Instance, Service, Status};

/// How long an agent may take until it has a leader, and until it has ended.
const START: Duration = Duration::from_secs(20);

/// How long a change may take from the agent to its servers.
const SYNC: Duration = Duration::from_secs(10);

/// How long Consul holds a blocking query of ours back, and what the answer may take beyond.
const WAIT: &str = "60s";
const WAIT_TIMEOUT: Duration = Duration::from_secs(75);

/// A running agent, which is a server too. It is killed with the value.
pub struct Consul {
    builder: Builder,
    process: Option<Process>,
    paused: bool,
}

/// What an agent is started with.
#[derive(Clone)]
pub struct Builder {
    ip: Ipv4Addr,
    http_port: u16,
    https_port: u16,
    serf_lan_port: u16,
    serf_wan_port: u16,
    server_port: u16,
    node: String,
    datacenter: String,
    wan: bool,
    persistent: bool,
    acl: bool,
    tls: Option<tls::Settings>,
    unix_socket: bool,
    args: Vec<String>,
    dir: Dir,
}

impl Consul {
    /// An agent in development mode, named `n1`, in `dc1`.
    pub fn start(net: &Net, dir: &Dir) -> Consul {
        Consul::builder(net, dir).start()
    }

    pub fn builder(net: &Net, dir: &Dir) -> Builder {
        Builder {
            ip: net.ip(10),
            http_port: net.port(),
            https_port: net.port(),
            serf_lan_port: net.port(),
            serf_wan_port: net.port(),
            server_port: net.port(),
            node: "n1".into(),
            datacenter: "dc1".into(),
            wan: false,
            persistent: false,
            acl: false,
            tls: None,
            unix_socket: false,
            args: Vec::new(),
            dir: dir.clone(),
        }
    }

    pub fn addr(&self) -> SocketAddr {
        self.builder.addr()
    }

    /// As in `consul_address`.
    pub fn url(&self) -> String {
        self.builder.url()
    }

    pub fn node(&self) -> &str {
        &self.builder.node
    }

    // ---- services

    pub fn register(&self, service: &Service) {
        self.register_all(std::slice::from_ref(service));
    }

    /// Registers them all, then waits once.
    pub fn register_all(&self, services: &[Service]) {
        let mut conn = self.conn();
        for service in services {
            let body = service.registration().to_string();
            let path = "/v1/agent/service/register";
            succeeded("PUT", path, self.ask(&mut conn, "PUT", path, body));
        }
        let mut by_name: BTreeMap<&str, Vec<&Service>> = BTreeMap::new();
        for service in services {
            by_name.entry(&service.name).or_default().push(service);
        }
        for (name, services) in by_name {
            // Asking for one by its ID keeps the answer small, whatever else has that name.
            let only = match &services[..] {
                [one] => Some(one.id.as_str()),
                _ => None,
            };
            let what =
                format!("{} registered instances of {name} show in /v1/health", services.len());
            eventually(SYNC, &what, || {
                let seen: BTreeMap<String, Instance> = self
                    .instances(name, only)
                    .into_iter()
                    .filter(|instance| instance.node == self.builder.node)
                    .map(|instance| (instance.id.clone(), instance))
                    .collect();
                match services.iter().find(|s| !seen.get(&s.id).is_some_and(|i| s.is_shown_by(i))) {
                    None => Ok(()),
                    Some(missing) => Err(format!("{missing:?} is not among {:?}", seen.values())),
                }
            });
        }
    }

    pub fn deregister(&self, id: &str) {
        let name = self.service_name(id);
        self.put(&format!("/v1/agent/service/deregister/{}", encode(id)), "");
        self.settled_one(&name, id, "is gone", |instance| instance.is_none());
    }

    /// Maintenance of one instance.
    pub fn maintenance(&self, id: &str, on: bool, reason: &str) {
        let name = self.service_name(id);
        let reason = encode(reason);
        self.put(
            &format!("/v1/agent/service/maintenance/{}?enable={on}&reason={reason}", encode(id)),
            "",
        );
        let check = format!("_service_maintenance:{id}");
        let what = if on { "is in maintenance" } else { "is not in maintenance" };
        self.settled_one(&name, id, what, |instance| {
            instance.is_some_and(|instance| instance.checks.contains_key(&check) == on)
        });
    }

    /// Maintenance of the whole node.
    pub fn node_maintenance(&self, on: bool) {
        self.put(&format!("/v1/agent/maintenance?enable={on}&reason=a+test"), "");
        eventually(SYNC, &format!("maintenance of node {}: {on}", self.node()), || {
            let checks = self.get(&format!("/v1/health/node/{}?consistent", self.node()));
            let shown = checks.as_array().is_some_and(|checks| {
                checks.iter().any(|check| check["CheckID"] == "_node_maintenance")
            });
            shown == on
        });
    }

    /// Sets the status of an instance's TTL check ([`Check::ttl`]).
    pub fn check(&self, id: &str, status: Status) {
        let name = self.service_name(id);
        let check = service::ttl_check_id(id);
        let body = json!({ "Status": status.as_str(), "Output": format!("set to {status}") });
        self.put(&format!("/v1/agent/check/update/{}", encode(&check)), &body.to_string());
        self.settled_one(&name, id, &format!("has its TTL check {status}"), |instance| {
            instance.is_some_and(|instance| instance.checks.get(&check) == Some(&status))
        });
    }

    /// The instances of a service, as `/v1/health/service` has them, in the order of their IDs.
    pub fn health(&self, service: &str) -> Vec<Instance> {
        self.instances(service, None)
    }

    /// Waits until the instances of a service are as wanted, and returns them.
    pub fn settled(
        &self,
        service: &str,
        what: &str,
        wanted: impl Fn(&[Instance]) -> bool,
    ) -> Vec<Instance> {
        eventually(SYNC, &format!("Consul says of {service}: {what}"), || {
            let instances = self.health(service);
            if wanted(&instances) { Ok(instances) } else { Err(format!("{instances:?}")) }
        })
    }

    // ---- the API as it is

    /// One request. What stands after `/v1` is up to the caller; any status is an answer.
    pub fn raw(&self, method: &str, path: &str, body: impl Into<Bytes>) -> io::Result<Answer> {
        self.ask(&mut Conn::open(self.addr())?, method, path, body)
    }

    /// The same with these headers and no token but one that is among them.
    pub fn raw_with(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: impl Into<Bytes>,
    ) -> io::Result<Answer> {
        Conn::open(self.addr())?.request(method, path, headers, body)
    }

    /// A GET that has to succeed, and its JSON.
    pub fn get(&self, path: &str) -> Value {
        succeeded("GET", path, self.raw("GET", path, "")).json()
    }

    /// A PUT that has to succeed.
    pub fn put(&self, path: &str, body: &str) -> Answer {
        succeeded("PUT", path, self.raw("PUT", path, body.to_owned()))
    }

    /// The index at which a service's health stands.
    pub fn index(&self, service: &str) -> u64 {
        let path = format!("/v1/health/service/{}?consistent", encode(service));
        index_of(&succeeded("GET", &path, self.raw("GET", &path, "")))
    }

    /// Blocks until a service's index is not `index` any more. Returns when the whole answer had
    /// arrived here, and the new index.
    pub fn wait_change(&self, service: &str, index: u64) -> (Instant, u64) {
        let path = format!("/v1/health/service/{}?index={index}&wait={WAIT}", encode(service));
        let mut conn = self.conn();
        conn.set_timeout(WAIT_TIMEOUT);
        let answer = self.ask(&mut conn, "GET", &path, "");
        let arrived = Instant::now();
        (arrived, index_of(&succeeded("GET", &path, answer)))
    }

    // ---- life and death

    pub fn is_running(&mut self) -> bool {
        self.process.as_mut().is_some_and(|process| process.ended().is_none())
    }

    /// Whether it was neither ended nor paused.
    fn answers(&self) -> bool {
        self.process.is_some() && !self.paused
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        self.process = None;
        self.paused = false;
    }

    /// Ends it as an operator would (SIGTERM); a server does not leave its datacenter then.
    pub fn stop(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.signal(Signal::TERM);
            assert!(process.wait(START).is_some(), "Consul does not end within {START:?}");
        }
    }

    /// Starts it again, on the same ports; kills it first where it still runs. An agent in
    /// development mode has forgotten everything, one with a [data directory](Builder::persistent)
    /// nothing.
    pub fn restart(&mut self) {
        self.respawn();
        self.wait_ready().unwrap_or_else(|error| panic!("{error}"));
    }

    /// The same, without waiting until it is ready.
    pub fn respawn(&mut self) {
        self.kill();
        self.process = Some(self.builder.run().unwrap_or_else(|error| panic!("{error}")));
    }

    /// SIGSTOP: connections stay and are still taken by the kernel, and nothing is answered from
    /// when this returns.
    pub fn pause(&mut self) {
        if let Some(process) = &mut self.process {
            process.signal(Signal::STOP);
            let pid = process.id();
            eventually(START, "the agent stands still", || processes::stands_still(pid));
            self.paused = true;
        }
    }

    pub fn resume(&mut self) {
        if let Some(process) = &mut self.process {
            process.signal(Signal::CONT);
            self.paused = false;
        }
    }

    /// Joins this datacenter with another over the WAN; both must be [`Builder::wan`].
    pub fn join_wan(&self, other: &Consul) {
        assert!(self.builder.wan && other.builder.wan, "both need Builder::wan");
        let target = format!("{}:{}", other.builder.ip, other.builder.serf_wan_port);
        self.put(&format!("/v1/agent/join/{target}?wan=1"), "");
        for (from, to) in [(self, other), (other, self)] {
            let dc = &to.builder.datacenter;
            let what = format!("{} reaches {dc}", from.builder.datacenter);
            let path = format!("/v1/health/service/consul?dc={dc}");
            eventually(START, &what, || match from.raw("GET", &path, "") {
                Ok(answer) if answer.status == 200 => Ok(()),
                Ok(answer) => Err(answer.text()),
                Err(error) => Err(error.to_string()),
            });
        }
    }

    /// Waits until the agent has a leader and its own node is known and well, so that what is
    /// registered shows as it should.
    pub fn wait_ready(&mut self) -> Result<(), String> {
        let node = self.builder.node.clone();
        let ready = within(START, || -> Result<(), String> {
            if !self.is_running() {
                // No use in waiting; said below.
                return Ok(());
            }
            let leader = self.raw("GET", "/v1/status/leader", "").map_err(|e| e.to_string())?;
            if leader.status != 200 || leader.json().as_str().unwrap_or_default().is_empty() {
                return Err(format!("no leader: {}", leader.text()));
            }
            let checks = self
                .raw("GET", &format!("/v1/health/node/{node}?consistent"), "")
                .map_err(|e| e.to_string())?;
            let well = checks.status == 200
                && checks.json().as_array().is_some_and(|checks| {
                    checks.iter().any(|c| c["CheckID"] == "serfHealth" && c["Status"] == "passing")
                });
            if !well {
                return Err(format!("node {node}: {}", checks.text()));
            }
            if self.builder.acl { self.tokens_can_be_made() } else { Ok(()) }
        });
        let log = tail(&read_lossy(&self.builder.log_path()));
        if !self.is_running() {
            return Err(format!("Consul has ended; its log:\n{log}"));
        }
        ready.map_err(|seen| format!("Consul is not ready in {START:?}: {seen}; its log:\n{log}"))
    }

    // ---- the rest

    fn conn(&self) -> Conn {
        Conn::open(self.addr()).unwrap_or_else(|error| panic!("Consul at {}: {error}", self.url()))
    }

    /// A request with the token that may do anything, where one is needed.
    fn ask(
        &self,
        conn: &mut Conn,
        method: &str,
        path: &str,
        body: impl Into<Bytes>,
    ) -> io::Result<Answer> {
        let token = self.builder.acl.then_some((acl::HEADER, MASTER_TOKEN));
        conn.request(method, path, token.as_slice(), body)
    }

    fn service_name(&self, id: &str) -> String {
        let service = self.get(&format!("/v1/agent/service/{}", encode(id)));
        service["Service"].as_str().expect("a service has a name").to_owned()
    }

    fn instances(&self, service: &str, id: Option<&str>) -> Vec<Instance> {
        let mut path = format!("/v1/health/service/{}?consistent", encode(service));
        if let Some(id) = id {
            path += &format!("&filter={}", encode(&format!("Service.ID == {}", json!(id))));
        }
        let mut instances: Vec<Instance> = self
            .get(&path)
            .as_array()
            .expect("a health answer is a list")
            .iter()
            .map(Instance::from_entry)
            .collect();
        instances.sort_by(|a, b| (&a.node, &a.id).cmp(&(&b.node, &b.id)));
        instances
    }

    fn settled_one(
        &self,
        name: &str,
        id: &str,
        what: &str,
        wanted: impl Fn(Option<&Instance>) -> bool,
    ) {
        eventually(SYNC, &format!("Consul says that {id} of {name} {what}"), || {
            let instances = self.instances(name, Some(id));
            let own = instances.iter().find(|instance| instance.node == self.builder.node);
            if wanted(own) { Ok(()) } else { Err(format!("{instances:?}")) }
        });
    }
}

impl Builder {
    /// Which of the network's hosts it is, instead of 10: two agents on one network need two.
    #[must_use]
    pub fn host(mut self, net: &Net, n: u8) -> Builder {
        self.ip = net.ip(n);
        self
    }

    #[must_use]
    pub fn node(mut self, name: &str) -> Builder {
        self.node = name.into();
        self
    }

    #[must_use]
    pub fn datacenter(mut self, name: &str) -> Builder {
        self.datacenter = name.into();
        self
    }

    /// With a port for other datacenters; see [`Consul::join_wan`].
    #[must_use]
    pub fn wan(mut self) -> Builder {
        self.wan = true;
        self
    }

    /// A server with a data directory instead of development mode.
    #[must_use]
    pub fn persistent(mut self) -> Builder {
        self.persistent = true;
        self
    }

    /// One more argument to `consul agent`.
    #[must_use]
    pub fn arg(mut self, arg: impl Into<String>) -> Builder {
        self.args.push(arg.into());
        self
    }

    /// Where it is going to listen, for whoever has to know before it does.
    pub fn addr(&self) -> SocketAddr {
        (self.ip, self.http_port).into()
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.addr())
    }

    /// Where other servers of its datacenter find it: what their `-retry-join=` needs.
    pub fn serf_lan(&self) -> SocketAddr {
        (self.ip, self.serf_lan_port).into()
    }

    /// What it calls itself where it is asked for the leader.
    fn server(&self) -> SocketAddr {
        (self.ip, self.server_port).into()
    }

    pub fn start(self) -> Consul {
        self.try_start().unwrap_or_else(|error| panic!("{error}"))
    }

    pub fn try_start(self) -> Result<Consul, String> {
        let mut consul = self.spawn()?;
        consul.wait_ready()?;
        Ok(consul)
    }

    /// Starts it without waiting: a server of several has no leader before the others run.
    pub fn spawn(self) -> Result<Consul, String> {
        if let Some(tls) = &self.tls {
            tls.write(&self);
        }
        let process = self.run()?;
        Ok(Consul { builder: self, process: Some(process), paused: false })
    }

    fn run(&self) -> Result<Process, String> {
        let binary = paths::consul()?;
        let port = |name: &str, port: Option<u16>| match port {
            Some(port) => format!("-{name}-port={port}"),
            None => format!("-{name}-port=-1"),
        };
        let mut command = Command::new(&binary);
        command
            .arg("agent")
            .arg(format!("-node={}", self.node))
            .arg(format!("-datacenter={}", self.datacenter))
            .arg(format!("-bind={}", self.ip))
            .arg(format!("-client={}", self.ip))
            .arg(port("http", Some(self.http_port)))
            .arg(port("serf-lan", Some(self.serf_lan_port)))
            .arg(port("serf-wan", self.wan.then_some(self.serf_wan_port)))
            .arg(port("server", Some(self.server_port)))
            .arg(port("dns", None))
            .arg(port("grpc", None))
            .arg("-log-level=warn");
        let version = version(&binary)?;
        if version >= (1, 14) {
            command.arg(port("grpc-tls", None));
        }
        if self.acl {
            command.args(["-hcl", &acl::config(version)]);
        }
        if let Some(tls) = &self.tls {
            command.arg(port("https", Some(self.https_port)));
            command.args(["-hcl", &tls.config(self)]);
        }
        if self.unix_socket {
            command.args(["-hcl", &unix::config(self)?]);
        }
        if self.persistent {
            command
                .args(["-server", "-disable-host-node-id", "-hcl"])
                .arg("performance { raft_multiplier = 1 }")
                .arg(format!(
                    "-data-dir={}",
                    self.dir.join(format!("{}-data", self.node)).display()
                ));
            if !self.args.iter().any(|arg| arg.starts_with("-bootstrap")) {
                command.arg("-bootstrap-expect=1");
            }
        } else {
            command.arg("-dev");
        }
        command.args(&self.args);

        let open = || OpenOptions::new().create(true).append(true).open(self.log_path());
        let log = open().and_then(|out| Ok((out.try_clone()?, out)));
        let (out, err) = log.map_err(|e| format!("{}: {e}", self.log_path().display()))?;
        command.stdout(out).stderr(err);
        Process::spawn(&mut command).map_err(|e| format!("start {}: {e}", binary.display()))
    }

    fn log_path(&self) -> PathBuf {
        self.own_path("log")
    }

    /// A file in the test's directory that belongs to this agent.
    fn own_path(&self, extension: &str) -> PathBuf {
        self.dir.join(format!("consul-{}-{}.{extension}", self.datacenter, self.node))
    }
}

/// The first two numbers of a Consul's version. All Consuls of a process are of one binary.
fn version(binary: &PathBuf) -> Result<(u32, u32), String> {
    static KNOWN: OnceLock<Result<(u32, u32), String>> = OnceLock::new();
    KNOWN.get_or_init(|| ask_version(binary)).clone()
}

fn ask_version(binary: &PathBuf) -> Result<(u32, u32), String> {
    let said = Command::new(binary)
        .arg("version")
        .output()
        .map_err(|e| format!("start {}: {e}", binary.display()))?;
    let text = String::from_utf8_lossy(&said.stdout).into_owned();
    text.strip_prefix("Consul v")
        .and_then(|rest| {
            let mut numbers = rest.split(['.', '\n', '-', '+']);
            Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
        })
        .ok_or_else(|| format!("{} is no Consul: it says {text:?}", binary.display()))
}

#[track_caller]
fn succeeded(method: &str, path: &str, answer: io::Result<Answer>) -> Answer {
    match answer {
        Ok(answer) if answer.status == 200 => answer,
        Ok(answer) => panic!("{method} {path}: {} {}", answer.status, answer.text()),
        Err(error) => panic!("{method} {path}: {error}"),
    }
}

fn index_of(answer: &Answer) -> u64 {
    let index = answer.header("x-consul-index");
    index.parse().unwrap_or_else(|_| panic!("X-Consul-Index is {index:?}"))
}

/// A string as a part of a URL.
fn encode(text: &str) -> String {
    text.bytes()
        .map(|byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' => {
                char::from(byte).to_string()
            }
            _ => format!("%{byte:02X}"),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn started(name: &str) -> (Net, Dir, Consul) {
        let (net, dir) = (Net::isolated(), Dir::new(name));
        let consul = Consul::start(&net, &dir);
        (net, dir, consul)
    }

    #[test]
    fn a_services_life() {
        let (net, _dir, consul) = started("consul_life");
        let addr: SocketAddr = (net.ip(20), 80).into();
        let service = Service::new("web", "web 1/ä", addr)
            .tag("app")
            .meta("version", "1")
            .weights(10, 2)
            .check(Check::ttl());
        let id = service.id.clone();
        consul.register(&service);
        let [seen] = &consul.health("web")[..] else { panic!("one instance") };
        assert_eq!((seen.address.as_str(), seen.port), (&*addr.ip().to_string(), 80));
        assert_eq!(seen.status(), Status::Passing);
        assert_eq!((&seen.tags[..], seen.weights), (&["app".to_owned()][..], (10, 2)));

        for status in [Status::Warning, Status::Critical, Status::Passing] {
            consul.check(&id, status);
            assert_eq!(consul.health("web")[0].status(), status);
        }
        consul.maintenance(&id, true, "a test & more");
        assert_eq!(consul.health("web")[0].status(), Status::Critical);
        consul.maintenance(&id, false, "");
        assert_eq!(consul.health("web")[0].status(), Status::Passing);
        consul.node_maintenance(true);
        assert_eq!(consul.health("web")[0].status(), Status::Critical);
        consul.node_maintenance(false);
        consul.register(&service.clone().port(81));
        assert_eq!(consul.health("web")[0].port, 81);
        consul.deregister(&id);
        assert!(consul.health("web").is_empty());
    }

    #[test]
    fn addresses_of_every_kind() {
        let (net, _dir, consul) = started("consul_addresses");
        let (lan, wan): (SocketAddr, _) = ((net.ip(20), 80).into(), (net.ip(21), 8080).into());
        consul.register_all(&[
            Service::new("web", "1", lan).wan(wan),
            Service::new("web", "2", lan).address("host.test").wan(wan),
            Service::new("web", "3", lan).address(""),
            Service::new("web", "4", lan).address("2001:db8::1"),
        ]);
        let entries = consul.get("/v1/health/service/web");
        let entry = |id: &str| {
            let entries = entries.as_array().unwrap();
            entries.iter().find(|entry| entry["Service"]["ID"] == id).unwrap()["Service"].clone()
        };
        let tagged = |addr: &str, port: u16| json!({ "Address": addr, "Port": port });
        let wan = tagged(&wan.ip().to_string(), 8080);
        assert_eq!(entry("1")["TaggedAddresses"]["wan"], wan);
        assert_eq!(entry("1")["TaggedAddresses"]["lan"], tagged(&lan.ip().to_string(), 80));
        assert_eq!(entry("2")["Address"], "host.test");
        assert_eq!(entry("2")["TaggedAddresses"]["wan"], wan);
        assert_eq!(entry("3")["Address"], "");
        assert_eq!(entry("4")["Address"], "2001:db8::1");
    }

    #[test]
    fn headers_are_sent_as_they_are() {
        let (_net, _dir, consul) = started("consul_headers");
        let path = "/v1/agent/services";
        let answer = consul.raw_with("GET", path, &[("accept-encoding", "gzip")], "").unwrap();
        assert_eq!((answer.status, answer.header("content-encoding")), (200, "gzip"));
        assert_eq!(consul.raw("GET", path, "").unwrap().header("content-encoding"), "");
    }

    #[test]
    fn a_change_ends_a_blocking_query() {
        let (net, _dir, consul) = started("consul_blocking");
        let addr = (net.ip(20), 80).into();
        consul.register(&Service::new("web", "web-1", addr));
        let index = consul.index("web");
        let started = Instant::now();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| consul.wait_change("web", index));
            consul.register(&Service::new("web", "web-2", addr));
            let (arrived, next) = waiting.join().unwrap();
            assert!(arrived > started && next > index);
        });
    }

    #[test]
    fn development_mode_forgets_and_a_data_directory_does_not() {
        let (net, dir) = (Net::isolated(), Dir::new("consul_restart"));
        let addr = (net.ip(20), 80).into();
        for (persistent, left) in [(false, 0), (true, 1)] {
            let mut builder = Consul::builder(&net, &dir).node(if persistent { "p" } else { "d" });
            if persistent {
                builder = builder.persistent();
            }
            let mut consul = builder.start();
            consul.register(&Service::new("web", "web-1", addr));
            consul.kill();
            assert!(consul.raw("GET", "/v1/status/leader", "").is_err());
            consul.restart();
            consul.settled("web", "as before the restart", |all| all.len() == left);
            consul.stop();
            assert!(!consul.is_running());
        }
    }

    #[test]
    fn two_datacenters_reach_each_other() {
        let (net, dir) = (Net::isolated(), Dir::new("consul_wan"));
        let one = Consul::builder(&net, &dir).wan().start();
        let two = Consul::builder(&net, &dir).host(&net, 11).datacenter("dc2").wan().start();
        one.join_wan(&two);
        two.register(&Service::new("web", "web-1", (net.ip(20), 80).into()));
        let seen = one.get("/v1/health/service/web?dc=dc2");
        assert_eq!(seen.as_array().unwrap().len(), 1, "{seen}");
    }

    #[test]
    fn a_paused_agent_does_not_answer() {
        let (_net, _dir, mut consul) = started("consul_paused");
        consul.pause();
        let mut conn = Conn::open(consul.addr()).unwrap();
        conn.set_timeout(Duration::from_millis(200));
        let error = conn.get("/v1/status/leader").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        consul.resume();
        consul.wait_ready().unwrap();
    }

    #[test]
    fn an_agent_that_does_not_start_says_why() {
        let (net, dir) = (Net::isolated(), Dir::new("consul_refuses"));
        let Err(error) = Consul::builder(&net, &dir).arg("-hcl=nonsense = 1").try_start() else {
            panic!("started with nonsense");
        };
        assert!(error.contains("nonsense"), "{error}");
    }
}
