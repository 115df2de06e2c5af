//! Nothing that was started outlives the process that started it, even where that is killed.
//!
//! A value's `Drop` ends what the value started, but no `Drop` runs on SIGKILL, and none on the
//! Ctrl-C of a test run. So each process has a warden: a small shell that is told the process
//! groups which are alive, through a pipe whose only writing end is in this process. When the
//! pipe ends, whatever the reason, the warden kills the groups that are still on its list. It is
//! in a group of its own, so that a terminal's Ctrl-C does not reach it.

use std::io::{self, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process, kill_process_group, test_kill_process_group};

use crate::eventually::within;
use crate::processes;

/// Reads `+ GROUP` and `- GROUP`; at the end of its input kills the groups it has.
const WARDEN: &str = r#"
groups=
while read -r change group; do
    case $change in
    +)  groups="$groups $group" ;;
    -)  kept=
        for g in $groups; do [ "$g" = "$group" ] || kept="$kept $g"; done
        groups=$kept ;;
    esac
done
for g in $groups; do kill -s KILL -- "-$g"; done
"#;

/// How long SIGKILL may take. A process in an uninterruptible sleep ends when that ends.
const KILLED: Duration = Duration::from_secs(10);

/// A child process that leads a process group of its own. The whole group ends with the value.
pub struct Process {
    child: Child,
    group: Pid,
    /// The group has a member that was not waited for, so its ID is not anybody else's yet.
    alive: bool,
}

impl Process {
    /// Starts a command, without standard input.
    pub fn spawn(command: &mut Command) -> io::Result<Process> {
        // Before the child: between its start and its entry in the list nothing may fail.
        let mut warden = warden().lock().unwrap_or_else(PoisonError::into_inner);
        let child = command.stdin(Stdio::null()).process_group(0).spawn()?;
        let group = Pid::from_child(&child);
        writeln!(warden, "+ {group}").expect("the warden reads as long as this process lives");
        Ok(Process { child, group, alive: true })
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal to the process itself; does nothing once it was seen to have ended.
    pub fn signal(&mut self, signal: Signal) {
        if self.ended().is_none() {
            // The child was not waited for, so the ID is still its own.
            kill_process(self.group, signal).expect("signal a child");
        }
    }

    /// Sends a signal to every process of the group.
    pub fn signal_group(&mut self, signal: Signal) {
        if self.alive {
            let _ = kill_process_group(self.group, signal);
        }
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        let status = self.child.try_wait().expect("wait for a child");
        if status.is_some() && self.alive && is_empty(self.group) {
            self.alive = false;
            let mut warden = warden().lock().unwrap_or_else(PoisonError::into_inner);
            writeln!(warden, "- {}", self.group)
                .expect("the warden reads as long as this process lives");
        }
        status
    }

    /// How it ended, waiting for that at most so long.
    pub fn wait(&mut self, timeout: Duration) -> Option<ExitStatus> {
        within(timeout, || self.ended()).ok()
    }

    /// Waits until no process of the group is left.
    pub fn wait_group(&mut self, timeout: Duration) -> bool {
        let gone = || {
            self.ended();
            !self.alive
        };
        within(timeout, gone).is_ok()
    }

    /// Kills the whole group and waits for its end.
    pub fn kill(&mut self) {
        self.signal_group(Signal::KILL);
        assert!(
            self.wait_group(KILLED),
            "process group {} is not gone {KILLED:?} after SIGKILL",
            self.group
        );
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.signal_group(Signal::KILL);
        if !self.wait_group(KILLED) && !std::thread::panicking() {
            panic!("process group {} is not gone {KILLED:?} after SIGKILL", self.group);
        }
    }
}

fn is_empty(group: Pid) -> bool {
    test_kill_process_group(group) == Err(Errno::SRCH)
        || !processes::group_lives(group.as_raw_nonzero().get().unsigned_abs())
}

fn warden() -> &'static Mutex<impl Write> {
    static WARDEN_INPUT: OnceLock<Mutex<ChildStdin>> = OnceLock::new();
    WARDEN_INPUT.get_or_init(|| Mutex::new(shell_that_stays(&["-c", WARDEN])))
}

/// A shell whose input ends with this process, and that does something then.
#[expect(clippy::zombie_processes, reason = "it ends after this process, that is its purpose")]
pub(crate) fn shell_that_stays(args: &[&str]) -> ChildStdin {
    let mut child = Command::new("sh")
        .args(args)
        .stdin(Stdio::piped())
        // It lives a moment longer than this process: whoever reads our output to its end
        // must not wait for it.
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0)
        .spawn()
        .expect("start sh");
    child.stdin.take().expect("stdin was asked for as a pipe")
}

#[cfg(test)]
mod tests {
    use std::env;
    use std::fs;
    use std::path::{Path, PathBuf};

    use super::*;
    use crate::{Dir, eventually};

    const LONG: &str = "600";
    const TIMEOUT: Duration = Duration::from_secs(10);

    fn exists(pid: &str) -> bool {
        processes::lives(pid.parse().unwrap())
    }

    #[test]
    fn a_group_ends_with_its_value() {
        let dir = Dir::new("warden_drop");
        let note = dir.join("pid");
        let script = format!("sleep {LONG} & echo $! >{}; wait", note.display());
        let process = Process::spawn(Command::new("sh").args(["-c", &script])).unwrap();
        let grandchild = written(&note);
        assert!(exists(&grandchild));
        drop(process);
        assert!(!exists(&grandchild));
    }

    #[test]
    fn an_end_is_seen() {
        let mut process = Process::spawn(Command::new("sh").args(["-c", "exit 7"])).unwrap();
        assert_eq!(process.wait(TIMEOUT).unwrap().code(), Some(7));
        assert!(process.wait_group(TIMEOUT));
        process.signal(Signal::KILL);
    }

    /// This test starts itself again; that second process starts a child and is killed.
    #[test]
    fn orphans_are_killed() {
        const NOTE: &str = "TESTBED_WARDEN_NOTE";
        if let Some(note) = env::var_os(NOTE) {
            let mut child = Process::spawn(Command::new("sleep").arg(LONG)).unwrap();
            fs::write(PathBuf::from(note), format!("{}\n", child.id())).unwrap();
            child.wait(Duration::from_secs(60));
            return;
        }
        let dir = Dir::new("warden_orphans");
        let note = dir.join("pid");
        // Not by Process: its end would take the orphan with it.
        let mut parent = Command::new(env::current_exe().unwrap())
            .args(["--exact", "warden::tests::orphans_are_killed"])
            .env(NOTE, &note)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let orphan = written(&note);
        assert!(exists(&orphan));
        parent.kill().unwrap();
        parent.wait().unwrap();
        eventually(TIMEOUT, "the warden kills the orphan", || !is_running(&orphan));
    }

    /// A killed orphan stays a zombie where nobody reaps (a container whose first process is not
    /// an init); it runs no more all the same.
    fn is_running(pid: &str) -> bool {
        fs::read_to_string(format!("/proc/{pid}/stat"))
            .is_ok_and(|stat| !stat.contains(") Z ") && !stat.contains(") X "))
    }

    fn written(note: &Path) -> String {
        eventually(TIMEOUT, "a process ID in a file", || {
            let text = fs::read_to_string(note).unwrap_or_default();
            text.ends_with('\n').then(|| text.trim().to_owned())
        })
    }
}
