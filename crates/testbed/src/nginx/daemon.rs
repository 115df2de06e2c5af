//! An nginx whose starter has gone, as that of a daemon has: only then nginx takes the signal to
//! replace its binary. It stays in a process group of ours.

use std::fs;
use std::net::SocketAddr;
use std::process::Command;

use rustix::process::{Pid, Signal, kill_process};

use super::{Builder, NEVER, PATIENCE};
use crate::dir::read_lossy;
use crate::{Dir, Process, eventually, processes};

/// Starts a command and ends when that has written its PID: by then nginx has seen who its parent is,
/// and later that it has another.
const DETACH: &str = r#"
pid=$1 n=0
shift
"$@" &
until [ -s "$pid" ] || [ $((n += 1)) -gt 400 ]; do sleep 0.05; done
"#;

/// One or, while the binary is replaced, two nginx that share their listeners.
pub struct Daemon {
    builder: Builder,
    process: Process,
}

impl Builder {
    /// Starts it so that it can be upgraded.
    #[track_caller]
    pub fn start_detached(self) -> Daemon {
        let started = || -> Result<Process, String> {
            self.write()?;
            let output = self.dir.join(format!("{}.out", self.name));
            let out =
                fs::File::create(&output).map_err(|e| format!("{}: {e}", output.display()))?;
            let err = out.try_clone().map_err(|e| e.to_string())?;
            let nginx = self.command("nginx.conf")?;
            let mut shell = Command::new("sh");
            let pid = self.prefix().join("nginx.pid");
            shell.args(["-c", DETACH, "sh"]).arg(pid);
            shell.arg(nginx.get_program()).args(nginx.get_args());
            shell.args(["-g", "daemon off;"]).stdout(out).stderr(err);
            // As if it had inherited sockets, of which there are none: then it is a daemon to itself,
            // which takes SIGWINCH, without leaving the process group as a daemon does.
            shell.env("NGINX", "");
            Process::spawn(&mut shell).map_err(|e| format!("start {shell:?}: {e}"))
        };
        let process = started().unwrap_or_else(|error| panic!("{error}"));
        let wanted = self.expected_workers();
        let mut daemon = Daemon { builder: self, process };
        eventually(PATIENCE, "nginx is up, and its starter has gone", || {
            let masters = daemon.masters();
            daemon.process.ended().is_some()
                && masters.len() == 1
                && daemon.workers(masters[0]).len() == wanted
        });
        daemon
    }
}

impl Daemon {
    pub fn addr(&self) -> SocketAddr {
        self.addrs()[0]
    }

    /// Where its servers listen, in the order of the configuration.
    pub fn addrs(&self) -> &[SocketAddr] {
        &self.builder.listens
    }

    pub fn dir(&self) -> &Dir {
        &self.builder.dir
    }

    /// The masters, in the order of their IDs.
    pub fn masters(&self) -> Vec<u32> {
        let members = processes::members(self.process.id());
        members.into_iter().filter(|pid| title(*pid).starts_with("master process")).collect()
    }

    /// The workers of a master that serve.
    pub fn workers(&self, master: u32) -> Vec<u32> {
        self.titled(master, "worker process")
    }

    /// Those that only finish what they have.
    pub fn exiting(&self, master: u32) -> Vec<u32> {
        self.titled(master, "worker process is shutting down")
    }

    fn titled(&self, master: u32, wanted: &str) -> Vec<u32> {
        let children = processes::children(master);
        children.into_iter().filter(|pid| title(*pid) == wanted).collect()
    }

    /// The names of a process's threads.
    pub fn threads(&self, pid: u32) -> Vec<String> {
        processes::threads(pid)
    }

    /// A signal to one of its masters.
    #[track_caller]
    pub fn signal(&self, master: u32, signal: Signal) {
        assert!(self.masters().contains(&master), "{master} is no master of this nginx");
        let pid = Pid::from_raw(master as i32).expect("no process has the ID 0");
        kill_process(pid, signal).expect("signal a master");
    }

    /// Replaces the binary: another master and its workers serve beside the ones that are there.
    /// Returns the new one.
    #[track_caller]
    pub fn begin_upgrade(&self, master: u32) -> u32 {
        self.signal(master, Signal::USR2);
        eventually(PATIENCE, "a new master with its workers", || {
            let new = self.masters().into_iter().find(|pid| *pid != master)?;
            (self.workers(new).len() == self.builder.expected_workers()).then_some(new)
        })
    }

    /// Tells a master's workers to end.
    #[track_caller]
    pub fn end_workers(&self, master: u32) {
        self.signal(master, Signal::WINCH);
        eventually(PATIENCE, "its workers have ended", || {
            self.workers(master).is_empty() && self.exiting(master).is_empty()
        });
    }

    /// Ends a master and its workers.
    #[track_caller]
    pub fn quit(&self, master: u32) {
        self.signal(master, Signal::QUIT);
        eventually(PATIENCE, "the master has ended", || !self.masters().contains(&master));
    }

    /// The error log.
    pub fn log(&self) -> String {
        read_lossy(&self.builder.log_path())
    }

    /// How many lines of the error log have this.
    pub fn log_count(&self, part: &str) -> usize {
        self.log().lines().filter(|line| line.contains(part)).count()
    }

    /// Ends all, and looks for what a healthy nginx never logs.
    #[track_caller]
    pub fn stop(mut self) {
        for master in self.masters() {
            self.signal(master, Signal::QUIT);
        }
        assert!(self.process.wait_group(PATIENCE), "nginx left processes behind");
        let log = self.log();
        let bad: Vec<&str> =
            log.lines().filter(|line| NEVER.iter().any(|never| line.contains(never))).collect();
        assert!(bad.is_empty(), "nginx's error log has\n{}", bad.join("\n"));
    }
}

/// What nginx calls a process of its.
fn title(pid: u32) -> String {
    let line = processes::command_line(pid);
    let title = line.iter().find_map(|argument| argument.strip_prefix("nginx: "));
    title.unwrap_or_default().trim_end().to_owned()
}
