//! What the kernel tells of a process.

use std::fs;
use std::path::PathBuf;

/// The processes whose parent is `pid`, in order. (`/proc/PID/task/PID/children` would say so at
/// once, but not every kernel is built with it.)
pub(crate) fn children(pid: u32) -> Vec<u32> {
    all().filter(|&child| Stat::of(child).is_some_and(|stat| stat.parent == pid)).collect()
}

/// The processes of a group that are alive, in order.
pub(crate) fn members(group: u32) -> Vec<u32> {
    let is_member = |stat: Stat| stat.group == group && !stat.ended;
    all().filter(|&pid| Stat::of(pid).is_some_and(is_member)).collect()
}

/// Whether a process of the group is alive. One that has ended counts as gone even where nobody
/// asks for its status: orphans do not vanish in a container whose first process is no init.
pub(crate) fn group_lives(group: u32) -> bool {
    all().filter_map(Stat::of).any(|stat| stat.group == group && !stat.ended)
}

/// Whether a process is alive, in the same sense.
#[cfg(test)]
pub(crate) fn lives(pid: u32) -> bool {
    Stat::of(pid).is_some_and(|stat| !stat.ended)
}

/// Whether no thread of a process runs any more. After SIGSTOP that takes a moment: it reaches each
/// thread where the kernel next looks for signals, and until then it may still answer somebody.
pub(crate) fn stands_still(pid: u32) -> bool {
    numbers(pid, "task")
        .iter()
        .filter_map(|id| Stat::read(pid, &format!("task/{id}/stat")))
        .all(|thread| thread.stopped || thread.ended)
}

fn all() -> impl Iterator<Item = u32> {
    let mut all: Vec<u32> = fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .collect();
    all.sort_unstable();
    all.into_iter()
}

/// A part of `/proc/PID/stat`, see proc(5).
struct Stat {
    ended: bool,
    stopped: bool,
    parent: u32,
    group: u32,
}

impl Stat {
    fn of(pid: u32) -> Option<Stat> {
        Stat::read(pid, "stat")
    }

    fn read(pid: u32, name: &str) -> Option<Stat> {
        let stat = fs::read_to_string(file(pid, name)).ok()?;
        // PID (NAME) STATE PARENT GROUP …, where NAME may hold anything, parentheses as well.
        let mut fields = stat.rsplit_once(") ")?.1.split(' ');
        let state = fields.next()?;
        Some(Stat {
            ended: matches!(state, "Z" | "X"),
            stopped: state == "T",
            parent: fields.next()?.parse().ok()?,
            group: fields.next()?.parse().ok()?,
        })
    }
}

/// The command line, one string an argument. Empty for a zombie.
pub(crate) fn command_line(pid: u32) -> Vec<String> {
    let bytes = fs::read(file(pid, "cmdline")).unwrap_or_default();
    bytes
        .split(|&byte| byte == 0)
        .filter(|argument| !argument.is_empty())
        .map(|argument| String::from_utf8_lossy(argument).into_owned())
        .collect()
}

/// The names of a process's threads, the main thread's first.
pub(crate) fn threads(pid: u32) -> Vec<String> {
    let mut ids = numbers(pid, "task");
    ids.sort_unstable_by_key(|&id| (id != pid, id));
    ids.iter()
        .filter_map(|id| fs::read_to_string(file(pid, &format!("task/{id}/comm"))).ok())
        .map(|name| name.trim_end().to_owned())
        .collect()
}

/// What a process's open descriptors are: paths, `socket:[…]`, `anon_inode:[eventfd]` ….
pub(crate) fn descriptors(pid: u32) -> Vec<String> {
    numbers(pid, "fd")
        .iter()
        .filter_map(|number| fs::read_link(file(pid, &format!("fd/{number}"))).ok())
        .map(|target| target.to_string_lossy().into_owned())
        .collect()
}

/// What a directory of a process has, where that is named by numbers; in order.
fn numbers(pid: u32, directory: &str) -> Vec<u32> {
    let mut numbers: Vec<u32> = fs::read_dir(file(pid, directory))
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .collect();
    numbers.sort_unstable();
    numbers
}

fn file(pid: u32, name: &str) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}/{name}"))
}

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::time::Duration;

    use super::*;
    use crate::{Process, Signal, eventually};

    #[test]
    fn a_stopped_process_stands_still() {
        let mut process = Process::spawn(Command::new("sleep").arg("600")).unwrap();
        assert!(!stands_still(process.id()));
        process.signal(Signal::STOP);
        eventually(Duration::from_secs(5), "it stands still", || stands_still(process.id()));
        process.signal(Signal::CONT);
        eventually(Duration::from_secs(5), "it runs", || !stands_still(process.id()));
    }

    #[test]
    fn a_process_is_described() {
        let process = Process::spawn(Command::new("sleep").arg("600")).unwrap();
        let pid = process.id();
        assert!(children(std::process::id()).contains(&pid));
        eventually(Duration::from_secs(5), "the child runs sleep", || {
            command_line(pid) == ["sleep", "600"]
        });
        assert_eq!(threads(pid), ["sleep"]);
        assert_eq!(descriptors(pid)[0], "/dev/null");
    }
}
