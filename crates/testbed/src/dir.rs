//! A work directory for one test.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

use crate::paths;

/// How much of each log is printed when a test fails.
const TAIL: usize = 200;

/// A directory of a test's own under the build directory. Clones share it. With the last of them
/// it is removed; in a test that fails it stays, and the end of every log in it is printed.
#[derive(Clone)]
pub struct Dir(Arc<Inner>);

struct Inner {
    path: PathBuf,
}

impl Dir {
    pub fn new(name: &str) -> Dir {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let n = COUNT.fetch_add(1, Ordering::Relaxed);
        let path =
            paths::build_dir().join("testbed").join(format!("{name}-{}-{n}", std::process::id()));
        // What is there is of a failed test whose process had the same ID.
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).unwrap_or_else(|e| panic!("mkdir {}: {e}", path.display()));
        Dir(Arc::new(Inner { path }))
    }

    pub fn path(&self) -> &Path {
        &self.0.path
    }

    pub fn join(&self, name: impl AsRef<Path>) -> PathBuf {
        self.0.path.join(name)
    }

    /// Writes a file, with the directories above it.
    pub fn write(&self, name: impl AsRef<Path>, text: impl AsRef<[u8]>) -> PathBuf {
        let path = self.join(name);
        path.parent()
            .map_or(Ok(()), fs::create_dir_all)
            .and_then(|()| fs::write(&path, text))
            .unwrap_or_else(|e| panic!("write {}: {e}", path.display()));
        path
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("kept for a look: {}", self.path.display());
            self.print_logs();
        } else {
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

impl Inner {
    fn print_logs(&self) {
        let Ok(entries) = fs::read_dir(&self.path) else { return };
        let mut logs: Vec<PathBuf> = entries
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| path.extension().is_some_and(|extension| extension == "log"))
            .collect();
        logs.sort();
        for log in logs {
            eprintln!("---- the end of {}", log.display());
            eprintln!("{}", tail(&read_lossy(&log)));
        }
    }
}

/// The last lines of a log, as many as a failure prints.
pub(crate) fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(TAIL)..].join("\n")
}

/// A log's text. A log that is not there yet is empty; bytes that are not UTF-8 are shown as such.
pub(crate) fn read_lossy(path: &Path) -> String {
    fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn goes_with_the_last_clone() {
        let dir = Dir::new("dir");
        let path = dir.write("a/b.txt", "text");
        let clone = dir.clone();
        drop(dir);
        assert!(path.exists());
        drop(clone);
        assert!(!path.parent().unwrap().parent().unwrap().exists());
    }

    #[test]
    fn a_failure_keeps_it() {
        let dir = Dir::new("dir_kept");
        let path = dir.path().to_owned();
        let failed = thread::spawn(move || {
            let _dir = dir;
            panic!("a failure that this test wants");
        });
        assert!(failed.join().is_err());
        assert!(path.exists());
        fs::remove_dir_all(path).unwrap();
    }

    #[test]
    fn the_tail_is_bounded() {
        let text: String = (0..1000).map(|n| format!("{n}\n")).collect();
        let tail = tail(&text);
        assert!(tail.starts_with("800\n") && tail.ends_with("\n999"));
    }
}
