//! A real nginx.

use std::fs;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::thread;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use crate::dir::{read_lossy, tail};
use crate::eventually::within;
use crate::{Dir, Net, Process, Protocol, eventually, paths, processes};

pub use self::daemon::Daemon;

mod daemon;

/// How long a start, a reload and an end may take. Far more than they do: on a machine that is
/// busy with other tests all of them are slow.
const PATIENCE: Duration = Duration::from_secs(20);

/// What the error log of a healthy nginx never has.
const NEVER: [&str; 3] = ["[alert]", "[emerg]", "exited on signal"];

/// A running nginx. With the value it is stopped; then nothing of it may be left, and its error
/// log may hold nothing of what a healthy nginx never logs.
pub struct Nginx {
    builder: Builder,
    process: Process,
    allowed: Vec<String>,
}

/// What an nginx is started with.
#[derive(Clone)]
pub struct Builder {
    net: Net,
    dir: Dir,
    binary: Option<PathBuf>,
    name: String,
    module: bool,
    failpoints: bool,
    single_process: bool,
    untitled: bool,
    workers: usize,
    connections: usize,
    main: Vec<String>,
    http: Vec<String>,
    stream: Vec<String>,
    listens: Vec<SocketAddr>,
    text: Option<String>,
}

impl Nginx {
    pub fn builder(net: &Net, dir: &Dir) -> Builder {
        Builder {
            net: net.clone(),
            dir: dir.clone(),
            binary: None,
            name: "nginx".into(),
            module: true,
            failpoints: false,
            single_process: false,
            untitled: false,
            workers: 1,
            connections: 1024,
            main: Vec::new(),
            http: Vec::new(),
            stream: Vec::new(),
            listens: Vec::new(),
            text: None,
        }
    }

    /// Where the first of its servers listens.
    pub fn addr(&self) -> SocketAddr {
        self.addrs()[0]
    }

    pub fn addrs(&self) -> &[SocketAddr] {
        &self.builder.listens
    }

    /// The master.
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// The workers that serve: helper processes are not among them, nor workers that are on their
    /// way up or down. (A worker takes its title when its modules are ready.)
    pub fn worker_pids(&self) -> Vec<u32> {
        if self.builder.single_process {
            return vec![self.pid()];
        }
        if self.builder.untitled {
            return self.children();
        }
        self.titled(|title| title == "worker process")
    }

    /// The workers that only finish what they have.
    pub fn exiting_pids(&self) -> Vec<u32> {
        self.titled(|title| title == "worker process is shutting down")
    }

    /// All its processes but the master, however far they are.
    pub fn children(&self) -> Vec<u32> {
        processes::children(self.pid())
    }

    fn titled(&self, wanted: impl Fn(&str) -> bool) -> Vec<u32> {
        let titled = |pid: &u32| {
            processes::command_line(*pid)
                .iter()
                .filter_map(|argument| argument.strip_prefix("nginx: "))
                .any(|title| wanted(title.trim_end()))
        };
        processes::children(self.pid()).into_iter().filter(titled).collect()
    }

    // ---- configuration

    /// Replaces the configuration that the next [reload](Nginx::reload) reads; its servers listen
    /// where they did. What is allowed in the log stays allowed.
    pub fn configure(&mut self, change: impl FnOnce(Builder) -> Builder) {
        self.builder = change(self.builder.clone());
        self.builder.write().unwrap_or_else(|error| panic!("{error}"));
    }

    /// The same, with a text of one's own.
    pub fn write_conf(&mut self, text: &str) {
        let text = text.to_owned();
        self.configure(|builder| builder.text(text));
    }

    /// `nginx -t` on the configuration as it is written.
    pub fn config_test(&self) -> ConfigTest {
        self.builder.run_config_test("nginx.conf")
    }

    /// Arms a failpoint of the module: see the crate consul-upstream.
    pub fn arm(&self, name: &str) {
        let directory = self.builder.prefix().join("failpoints");
        fs::create_dir_all(&directory).unwrap_or_else(|e| panic!("{}: {e}", directory.display()));
        self.dir().write(directory.join(name), "");
    }

    /// Whether it is armed still.
    pub fn is_armed(&self, name: &str) -> bool {
        self.builder.prefix().join("failpoints").join(name).exists()
    }

    // ---- life and death

    /// SIGHUP; returns when the new workers serve and no old one takes connections.
    #[track_caller]
    pub fn reload(&mut self) {
        self.try_reload().unwrap_or_else(|error| panic!("{error}"));
    }

    /// The same; where the configuration is refused, what nginx says of it. (That is an `[emerg]`
    /// in its log, which is allowed then.)
    pub fn try_reload(&mut self) -> Result<(), String> {
        let before = self.worker_pids();
        let refusals = self.log_count("[emerg]");
        let wanted = self.builder.expected_workers();
        self.reload_without_waiting();
        let done = within(PATIENCE, || -> Result<Result<(), String>, String> {
            if self.log_count("[emerg]") > refusals {
                return Ok(Err(self.log()));
            }
            let now = self.worker_pids();
            let all_new = now.len() == wanted && !now.iter().any(|pid| before.contains(pid));
            if all_new { Ok(Ok(())) } else { Err(format!("workers {now:?}, before {before:?}")) }
        });
        match done {
            Ok(Ok(())) => Ok(()),
            Ok(Err(log)) => {
                self.allow_log("[emerg]");
                let refusal = log.lines().rev().find(|line| line.contains("[emerg]"));
                Err(refusal.unwrap_or_default().to_owned())
            }
            Err(seen) => Err(format!("nginx has not reloaded within {PATIENCE:?}: {seen}")),
        }
    }

    pub fn reload_without_waiting(&mut self) {
        self.signal(Signal::HUP);
    }

    /// To the master.
    pub fn signal(&mut self, signal: Signal) {
        self.process.signal(signal);
    }

    /// To one of its workers or helpers.
    #[track_caller]
    pub fn signal_child(&self, pid: u32, signal: Signal) {
        assert!(processes::children(self.pid()).contains(&pid), "{pid} is no child of this nginx");
        let pid = Pid::from_raw(pid as i32).expect("no child has the ID 0");
        kill_process(pid, signal).expect("signal a child of nginx");
    }

    /// Ends gracefully: requests under way are finished.
    #[track_caller]
    pub fn quit(&mut self) -> ExitStatus {
        self.end(Signal::QUIT)
    }

    /// Ends at once.
    #[track_caller]
    pub fn stop(&mut self) -> ExitStatus {
        self.end(Signal::TERM)
    }

    #[track_caller]
    fn end(&mut self, signal: Signal) -> ExitStatus {
        self.process.signal(signal);
        let Some(status) = self.process.wait(PATIENCE) else {
            let left = processes::children(self.pid());
            panic!("nginx does not end within {PATIENCE:?} of {signal:?}; it has {left:?}");
        };
        // The master waits for its workers: what is left now would stay for good.
        assert!(self.process.wait_group(Duration::from_secs(1)), "nginx left processes behind");
        status
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.process.ended()
    }

    // ---- what can be seen of it

    pub fn dir(&self) -> &Dir {
        &self.builder.dir
    }

    /// The error log.
    pub fn log(&self) -> String {
        read_lossy(&self.builder.log_path())
    }

    /// How many lines of the error log have this.
    pub fn log_count(&self, part: &str) -> usize {
        self.log().lines().filter(|line| line.contains(part)).count()
    }

    /// Waits until so many lines of the error log have this, and returns them all.
    #[track_caller]
    pub fn wait_log(&self, part: &str, count: usize, timeout: Duration) -> Vec<String> {
        let what = format!("{count} lines with {part:?} in nginx's error log");
        eventually(timeout, &what, || {
            let log = self.log();
            let lines: Vec<String> =
                log.lines().filter(|line| line.contains(part)).map(str::to_owned).collect();
            if lines.len() >= count { Ok(lines) } else { Err(format!("{} lines", lines.len())) }
        })
    }

    /// For a test that makes nginx log an `[alert]` or an `[emerg]`: lines with this are no
    /// failure.
    pub fn allow_log(&mut self, part: &str) {
        self.allowed.push(part.into());
    }

    /// The names of a process's threads, the main thread's first.
    pub fn threads(&self, pid: u32) -> Vec<String> {
        processes::threads(pid)
    }

    /// What a process's open descriptors are.
    pub fn fds(&self, pid: u32) -> Vec<String> {
        processes::descriptors(pid)
    }
}

impl Drop for Nginx {
    fn drop(&mut self) {
        if thread::panicking() {
            // The directory prints the log; the process ends with its value.
            return;
        }
        if self.ended().is_none() {
            self.stop();
        }
        assert!(self.process.wait_group(Duration::from_secs(1)), "nginx left processes behind");
        let log = self.log();
        let bad: Vec<&str> = log
            .lines()
            .filter(|line| NEVER.iter().any(|never| line.contains(never)))
            .filter(|line| !self.allowed.iter().any(|allowed| line.contains(allowed)))
            .collect();
        assert!(bad.is_empty(), "nginx's error log has\n{}", bad.join("\n"));
    }
}

impl Builder {
    /// Raw text in `http {}`.
    #[must_use]
    pub fn http(mut self, text: impl Into<String>) -> Builder {
        self.http.push(text.into());
        self
    }

    /// Raw text in `stream {}`, which is there when it has some. The module for it is loaded then.
    #[must_use]
    pub fn stream(mut self, text: impl Into<String>) -> Builder {
        self.stream.push(text.into());
        self
    }

    /// Takes text back that [`Builder::stream`] has put there.
    #[must_use]
    pub fn stream_without(mut self, text: &str) -> Builder {
        self.stream.retain(|it| it != text);
        self
    }

    /// Raw text in the block of a protocol.
    #[must_use]
    pub fn block(self, of: Protocol, text: impl Into<String>) -> Builder {
        match of {
            Protocol::Http => self.http(text),
            Protocol::Stream => self.stream(text),
        }
    }

    /// A server of a protocol on an address of its own that passes everything to this upstream.
    #[must_use]
    pub fn server_of(self, of: Protocol, upstream: &str) -> Builder {
        match of {
            Protocol::Http => self.server(upstream),
            Protocol::Stream => {
                let addr = (self.net.ip(1), self.net.port()).into();
                self.listen(addr)
                    .stream(format!("server {{ listen {addr} reuseport; proxy_pass {upstream}; }}"))
            }
        }
    }

    /// Takes back what [`Builder::http`] and the servers have put into `http {}`. Where servers
    /// listened stays known.
    #[must_use]
    pub fn clear_http(mut self) -> Builder {
        self.http.clear();
        self
    }

    /// Raw text at the top level.
    #[must_use]
    pub fn main(mut self, text: impl Into<String>) -> Builder {
        self.main.push(text.into());
        self
    }

    /// A server on an address of its own that passes everything to this upstream.
    #[must_use]
    pub fn server(self, upstream: &str) -> Builder {
        let addr = (self.net.ip(1), self.net.port()).into();
        self.server_on(addr, upstream)
    }

    /// The same, on this address.
    #[must_use]
    pub fn server_on(self, addr: SocketAddr, upstream: &str) -> Builder {
        self.listen(addr).http(server_block(addr, upstream))
    }

    /// Says where a server of one's own listens: nginx has started when it does.
    #[must_use]
    pub fn listen(mut self, addr: SocketAddr) -> Builder {
        if !self.listens.contains(&addr) {
            self.listens.push(addr);
        }
        self
    }

    #[must_use]
    pub fn workers(mut self, n: usize) -> Builder {
        self.workers = n;
        self
    }

    /// How many connections a worker may have.
    #[must_use]
    pub fn connections(mut self, n: usize) -> Builder {
        self.connections = n;
        self
    }

    /// `master_process off`.
    #[must_use]
    pub fn single_process(mut self) -> Builder {
        self.single_process = true;
        self
    }

    /// For a [binary](Builder::binary) that keeps nginx from giving its processes titles, as
    /// valgrind does: all children of the master count as workers, ready or not.
    #[must_use]
    pub fn untitled(mut self) -> Builder {
        self.untitled = true;
        self
    }

    /// Whether the module is loaded. It is, unless this says otherwise.
    #[must_use]
    pub fn module(mut self, on: bool) -> Builder {
        self.module = on;
        self
    }

    /// The module with failpoints in place of the usual one.
    #[must_use]
    pub fn with_failpoints(mut self) -> Builder {
        self.failpoints = true;
        self
    }

    /// Another nginx than [`paths::nginx`].
    #[must_use]
    pub fn binary(mut self, path: impl Into<PathBuf>) -> Builder {
        self.binary = Some(path.into());
        self
    }

    /// Another name than `nginx` for its directory and log: for a second nginx in one test.
    #[must_use]
    pub fn name(mut self, name: &str) -> Builder {
        self.name = name.into();
        self
    }

    /// A whole configuration instead of one that is put together. Relative paths in it are
    /// relative to nginx's own directory, where `modules/` has the module.
    #[must_use]
    pub fn text(mut self, text: impl Into<String>) -> Builder {
        self.text = Some(text.into());
        self
    }

    #[track_caller]
    pub fn start(self) -> Nginx {
        self.try_start().unwrap_or_else(|error| panic!("{error}"))
    }

    pub fn try_start(self) -> Result<Nginx, String> {
        self.write()?;
        let output = self.dir.join(format!("{}.out", self.name));
        let open = || fs::File::create(&output).and_then(|out| Ok((out.try_clone()?, out)));
        let (out, err) = open().map_err(|e| format!("{}: {e}", output.display()))?;
        let mut command = self.command("nginx.conf")?;
        // As a service manager would, not as a daemon: so it stays in our group.
        command.args(["-g", "daemon off;"]).stdout(out).stderr(err);
        let process =
            Process::spawn(&mut command).map_err(|e| format!("start {command:?}: {e}"))?;
        let mut nginx = Nginx { builder: self, process, allowed: Vec::new() };
        match nginx.wait_started() {
            Ok(()) => Ok(nginx),
            Err(seen) => {
                // The failure is told here; the value's end has nothing to add.
                nginx.process.kill();
                nginx.allowed = vec![String::new()];
                // What is wrong with a configuration stands in both.
                let said = match read_lossy(&output) {
                    said if said.is_empty() => tail(&nginx.log()),
                    said => said,
                };
                Err(format!("{seen}; it says:\n{}", said.trim_end()))
            }
        }
    }

    /// `nginx -t` on this configuration, without starting it.
    pub fn config_test(&self) -> ConfigTest {
        self.prepare().unwrap_or_else(|error| panic!("{error}"));
        self.dir.write(self.prefix().join("test.conf"), self.conf());
        self.run_config_test("test.conf")
    }

    /// The configuration.
    pub fn conf(&self) -> String {
        if let Some(text) = &self.text {
            return text.clone();
        }
        let mut conf = String::new();
        let mut line = |text: &str| {
            conf += text;
            conf += "\n";
        };
        if rustix::process::geteuid().is_root() {
            // The workers of an nginx that root starts are otherwise nobody's, and could not
            // reach what is in the directory.
            line("user root;");
        }
        if !self.stream.is_empty()
            && let Ok(Some(module)) = paths::nginx_stream()
        {
            line(&format!("load_module {};", module.display()));
        }
        for of in self.modules() {
            line(&format!("load_module modules/{};", of.module_name()));
        }
        line(&format!("worker_processes {};", self.workers));
        if self.single_process {
            line("master_process off;");
        }
        line("pid nginx.pid;");
        line("error_log error.log info;");
        self.main.iter().for_each(|text| line(text));
        line(&format!("events {{ worker_connections {}; }}", self.connections));
        line("http {");
        line("access_log off;");
        for temp in ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"] {
            line(&format!("{temp}_temp_path temp/{temp};"));
        }
        self.http.iter().for_each(|text| line(text));
        line("}");
        if !self.stream.is_empty() {
            line("stream {");
            self.stream.iter().for_each(|text| line(text));
            line("}");
        }
        conf
    }

    /// Whose modules are loaded: stream's where there is something in its block, and http's but where
    /// there is nothing in its block alone.
    fn modules(&self) -> impl Iterator<Item = Protocol> {
        let stream = !self.stream.is_empty();
        let wanted =
            [(Protocol::Http, !stream || !self.http.is_empty()), (Protocol::Stream, stream)];
        wanted.into_iter().filter_map(|(of, wanted)| (wanted && self.module).then_some(of))
    }

    /// nginx's own directory.
    fn prefix(&self) -> PathBuf {
        self.dir.join(&self.name)
    }

    fn log_path(&self) -> PathBuf {
        // In the work directory itself, where the ends of logs are printed from.
        self.dir.join(format!("{}.log", self.name))
    }

    fn prepare(&self) -> Result<(), String> {
        let prefix = self.prefix();
        let modules = prefix.join("modules");
        let prepared = || -> io::Result<()> {
            fs::create_dir_all(prefix.join("temp"))?;
            fs::create_dir_all(&modules)?;
            link(&self.log_path(), &prefix.join("error.log"))
        };
        prepared().map_err(|e| format!("{}: {e}", prefix.display()))?;
        let find = if self.failpoints { paths::failpoints } else { paths::module };
        for of in [Protocol::Http, Protocol::Stream] {
            match find(of) {
                Ok(module) => link(&module, &modules.join(of.module_name()))
                    .map_err(|e| format!("{}: {e}", modules.display()))?,
                Err(error) if self.modules().any(|wanted| wanted == of) => return Err(error),
                Err(_) => {}
            }
        }
        Ok(())
    }

    fn write(&self) -> Result<(), String> {
        self.prepare()?;
        self.dir.write(self.prefix().join("nginx.conf"), self.conf());
        Ok(())
    }

    fn command(&self, conf: &str) -> Result<Command, String> {
        let binary = self.binary.clone().map_or_else(paths::nginx, Ok)?;
        let mut command = Command::new(binary);
        command
            .arg("-p")
            .arg(self.prefix())
            .arg("-c")
            .arg(self.prefix().join(conf))
            // Until it has read where its log is, it would log to a path of its build.
            .args(["-e", "error.log"]);
        Ok(command)
    }

    fn run_config_test(&self, conf: &str) -> ConfigTest {
        let mut command = self.command(conf).unwrap_or_else(|error| panic!("{error}"));
        let said = command
            .arg("-t")
            .stdin(Stdio::null())
            .output()
            .unwrap_or_else(|error| panic!("start {command:?}: {error}"));
        let output = String::from_utf8_lossy(&said.stderr).into_owned();
        ConfigTest { ok: said.status.success(), output }
    }

    /// How many workers the configuration asks for.
    fn expected_workers(&self) -> usize {
        if self.single_process {
            return 1;
        }
        match &self.text {
            None => self.workers,
            Some(text) => text
                .split(';')
                .filter_map(|directive| directive.trim().rsplit('\n').next())
                .find_map(|directive| directive.trim().strip_prefix("worker_processes "))
                .map_or(1, |n| match n.trim().parse() {
                    Ok(n) => n,
                    // `auto`
                    Err(_) => thread::available_parallelism().map_or(1, usize::from),
                }),
        }
    }
}

impl Nginx {
    fn wait_started(&mut self) -> Result<(), String> {
        let wanted = self.builder.expected_workers();
        let started = within(PATIENCE, || -> Result<Result<(), String>, String> {
            if let Some(status) = self.ended() {
                return Ok(Err(format!("nginx has ended, {status}")));
            }
            let workers = self.worker_pids().len();
            if workers != wanted {
                return Err(format!("{workers} of {wanted} workers are up"));
            }
            for addr in self.addrs() {
                TcpStream::connect(addr).map_err(|error| format!("{addr}: {error}"))?;
            }
            Ok(Ok(()))
        });
        started.unwrap_or_else(|seen| Err(format!("nginx is not up in {PATIENCE:?}: {seen}")))
    }
}

/// What `nginx -t` says.
#[derive(Clone, Debug)]
pub struct ConfigTest {
    pub ok: bool,
    pub output: String,
}

/// `nginx -t` on a whole configuration; see [`Builder::text`].
pub fn config_test(net: &Net, dir: &Dir, conf: &str) -> ConfigTest {
    Nginx::builder(net, dir).name("config-test").text(conf).config_test()
}

/// A server that passes everything to an upstream, and says in its answers which worker it was
/// (`X-Worker`) and what the upstream tried (`X-Upstream`).
///
/// Each worker has a listening socket of its own (`reuseport`): the kernel spreads connections
/// over all of them, where otherwise one worker may take them all. And a connection to a worker
/// stays with it (nginx would close it after 1,000 requests, or when idle for 75 s).
pub fn server_block(addr: SocketAddr, upstream: &str) -> String {
    format!(
        "server {{
    listen {addr} reuseport;
    keepalive_requests 1000000000;
    keepalive_timeout 1h;
    location / {{
        proxy_pass http://{upstream};
        proxy_http_version 1.1;
        proxy_set_header Connection \"\";
        add_header X-Worker $pid always;
        add_header X-Upstream $upstream_addr always;
    }}
}}"
    )
}

/// A symbolic link, in place of one that may be there.
fn link(target: &Path, link: &Path) -> io::Result<()> {
    match fs::remove_file(link) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    symlink(target, link)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::panic::{self, AssertUnwindSafe};

    use super::*;
    use crate::{Backend, Load, Options, http};

    fn plain(net: &Net, dir: &Dir, backends: &[&Backend]) -> Builder {
        let servers: String =
            backends.iter().map(|backend| format!("server {};", backend.addr())).collect();
        Nginx::builder(net, dir)
            .module(false)
            .http(format!("upstream web {{ zone web 256k; {servers} }}"))
            .server("web")
    }

    #[test]
    fn serves_reloads_and_ends() {
        let (net, dir) = (Net::isolated(), Dir::new("nginx_life"));
        let backends = [Backend::start(&net, 20, "one"), Backend::start(&net, 21, "two")];
        let mut nginx = plain(&net, &dir, &[&backends[0], &backends[1]]).workers(2).start();

        let workers = nginx.worker_pids();
        assert_eq!(workers.len(), 2);
        assert_eq!(nginx.threads(workers[0]).len(), 1);
        assert!(nginx.fds(workers[0]).iter().any(|fd| fd.ends_with("nginx.log")));

        let mut conns = http::worker_conns(nginx.addr(), workers.iter().copied()).unwrap();
        for (worker, conn) in &mut conns {
            let answer = conn.get("/").unwrap();
            assert_eq!(answer.worker(), Some(*worker));
            assert_eq!(answer.tried().len(), 1);
        }
        let spread = http::spread(nginx.addr(), 100).unwrap();
        assert_eq!((spread["one"], spread["two"]), (50, 50));

        let load = Load::start(nginx.addr(), &Options::default());
        load.wait_for(200);
        for _ in 0..3 {
            nginx.reload();
            load.wait_for(200);
        }
        let report = load.stop();
        report.assert_nothing_lost();
        let seen = nginx.worker_pids().into_iter().collect::<BTreeSet<_>>();
        assert!(!seen.iter().any(|pid| workers.contains(pid)));
        assert!(!report.workers.is_disjoint(&seen));

        assert!(nginx.config_test().ok);
        nginx.configure(|conf| conf.workers(3));
        nginx.reload();
        assert_eq!(nginx.worker_pids().len(), 3);
        assert!(nginx.quit().success());
    }

    #[test]
    fn one_process_alone_serves() {
        let (net, dir) = (Net::isolated(), Dir::new("nginx_single"));
        let backend = Backend::start(&net, 20, "one");
        let mut nginx = plain(&net, &dir, &[&backend]).single_process().start();
        let answer = http::get(nginx.addr(), "/").unwrap();
        assert_eq!(answer.worker(), Some(nginx.pid()));
        assert!(nginx.stop().success());
    }

    #[test]
    fn a_bad_configuration_is_told() {
        let (net, dir) = (Net::isolated(), Dir::new("nginx_bad"));
        let bad = Nginx::builder(&net, &dir).module(false).http("nonsense on;");
        let test = bad.config_test();
        assert!(!test.ok && test.output.contains("unknown directive \"nonsense\""), "{test:?}");
        let Err(error) = bad.try_start() else { panic!("it started") };
        assert!(error.contains("unknown directive \"nonsense\""), "{error}");

        let backend = Backend::start(&net, 20, "one");
        let mut nginx = plain(&net, &dir, &[&backend]).start();
        let worker = nginx.worker_pids();
        nginx.configure(|conf| conf.http("nonsense on;"));
        let error = nginx.try_reload().unwrap_err();
        assert!(error.contains("unknown directive \"nonsense\""), "{error}");
        assert_eq!(nginx.worker_pids(), worker);
        assert_eq!(http::get(nginx.addr(), "/").unwrap().status, 200);
    }

    #[test]
    fn a_workers_death_is_a_failure() {
        let (net, dir) = (Net::isolated(), Dir::new("nginx_worker_killed"));
        let backend = Backend::start(&net, 20, "one");
        let nginx = plain(&net, &dir, &[&backend]).start();
        let worker = nginx.worker_pids()[0];
        nginx.signal_child(worker, Signal::KILL);
        nginx.wait_log("exited on signal 9", 1, PATIENCE);
        let failure = panic::catch_unwind(AssertUnwindSafe(|| drop(nginx))).unwrap_err();
        let message = failure.downcast_ref::<String>().unwrap();
        assert!(message.contains("exited on signal 9"), "{message}");
    }
}
