//! What the kernel tells of a process.

use std::fs;
use std::path::PathBuf;

/// The processes whose parent is `pid`, in order. (`/proc/PID/task/PID/children` would say so at
/// once, but not every kernel is built with it.)
pub(crate) fn children(pid: u32) -> Vec<u32> {
    let mut children: Vec<u32> = fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|&child| parent(child) == Some(pid))
        .collect();
    children.sort_unstable();
    children
}

fn parent(pid: u32) -> Option<u32> {
    let stat = fs::read_to_string(file(pid, "stat")).ok()?;
    // PID (NAME) STATE PARENT …, where NAME may hold anything, parentheses as well.
    stat.rsplit_once(") ")?.1.split(' ').nth(1)?.parse().ok()
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
    let mut ids: Vec<u32> = fs::read_dir(file(pid, "task"))
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .collect();
    ids.sort_unstable_by_key(|&id| (id != pid, id));
    ids.iter()
        .filter_map(|id| fs::read_to_string(file(pid, &format!("task/{id}/comm"))).ok())
        .map(|name| name.trim_end().to_owned())
        .collect()
}

/// What a process's open descriptors are: paths, `socket:[…]`, `anon_inode:[eventfd]` ….
pub(crate) fn descriptors(pid: u32) -> Vec<String> {
    let mut numbers: Vec<u32> = fs::read_dir(file(pid, "fd"))
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .collect();
    numbers.sort_unstable();
    numbers
        .iter()
        .filter_map(|number| fs::read_link(file(pid, &format!("fd/{number}"))).ok())
        .map(|target| target.to_string_lossy().into_owned())
        .collect()
}

fn file(pid: u32, name: &str) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}/{name}"))
}

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::time::Duration;

    use super::*;
    use crate::{Process, eventually};

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
