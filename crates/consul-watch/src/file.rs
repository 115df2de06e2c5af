//! A setting that stands in a file: its content as it was read last, and whether the file is
//! another one by now.

use std::fmt;
use std::fs::{File, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Tokens, certificates and keys are small; anything larger is the wrong file.
const LIMIT: u64 = 1 << 20;

/// A file, as it was when it was read.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Loaded {
    path: PathBuf,
    content: Arc<[u8]>,
    stamp: Stamp,
}

/// What differs when somebody has written or replaced a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    fn of(data: &Metadata) -> Self {
        Self {
            device: data.dev(),
            inode: data.ino(),
            size: data.size(),
            modified: (data.mtime(), data.mtime_nsec()),
            changed: (data.ctime(), data.ctime_nsec()),
        }
    }
}

impl Loaded {
    /// Reads a file of at most 1 MiB.
    pub fn read(path: impl Into<PathBuf>) -> io::Result<Self> {
        let path = path.into();
        let mut file = File::open(&path)?;
        // Before the content: what is written meanwhile shows as a change later.
        let stamp = Stamp::of(&file.metadata()?);
        let mut content = Vec::new();
        file.by_ref().take(LIMIT + 1).read_to_end(&mut content)?;
        if content.len() as u64 > LIMIT {
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, "larger than 1 MiB"));
        }
        Ok(Self { path, content: content.into(), stamp })
    }

    /// Where it was read.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What it held.
    pub fn content(&self) -> &[u8] {
        &self.content
    }

    /// Reads it again if it is not the same file any longer; an error names the file. While it is
    /// being replaced it may be missing, which is no change.
    pub fn reread(&self) -> Option<io::Result<Self>> {
        let stamp = Stamp::of(&std::fs::metadata(&self.path).ok()?);
        let name = |err: io::Error| {
            io::Error::new(err.kind(), format!("\"{}\": {err}", self.path.display()))
        };
        (stamp != self.stamp).then(|| Self::read(&self.path).map_err(name))
    }
}

/// The path alone: what the file holds is mostly a secret.
impl fmt::Debug for Loaded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Loaded").field(&self.path).finish()
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_file_that_changes_is_read_again() {
        let dir = std::env::temp_dir().join(format!("consul-watch-file-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let path = dir.join("token");
        assert!(Loaded::read(&path).is_err());
        fs::write(&path, "one").unwrap();
        let one = Loaded::read(&path).unwrap();
        assert_eq!(one.content(), b"one");
        assert!(one.reread().is_none());
        assert!(!format!("{one:?}").contains("one\""));

        // In place, with the same size; and by another file.
        fs::write(&path, "two").unwrap();
        let two = one.reread().unwrap().unwrap();
        assert_eq!(two.content(), b"two");
        fs::write(dir.join("new"), "three").unwrap();
        fs::rename(dir.join("new"), &path).unwrap();
        assert_eq!(two.reread().unwrap().unwrap().content(), b"three");

        fs::remove_file(&path).unwrap();
        assert!(two.reread().is_none());
        fs::write(&path, vec![b'x'; LIMIT as usize + 1]).unwrap();
        assert!(two.reread().unwrap().is_err());
        fs::remove_dir_all(&dir).unwrap();
    }
}
