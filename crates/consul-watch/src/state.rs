//! The last good set of each upstream, kept in files for a start at which Consul cannot be asked.
//!
//! A file is one JSON object with a version and a checksum at its begin. It names its upstream and
//! what the set is the answer to, so that no other service's set is ever served from it. It is
//! believed as a whole or not at all.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::fs::{self, Metadata, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::net::SocketAddr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::error::printable;
use crate::health::MAX_INSTANCES;
use crate::instance::{Status, is_host};
use crate::names::MOST;
use crate::policy::{Overrides, Peer};

/// Of this shape are the files that are written and read.
const VERSION: u32 = 1;
/// How each file begins, up to the digits of its checksum; what follows them is what they are the
/// checksum of.
const HEAD: &[u8] = b"{\"version\":1,\"checksum\":\"";
/// A larger file was not written here.
const MAX_SIZE: u64 = 64 << 20;
/// nginx's numbers have 31 bits.
const MAX_NUMBER: u32 = i32::MAX as u32;
/// How each file's name ends.
const SUFFIX: &str = ".json";
/// Longer names of upstreams are cut in names of files, which have at most 255 bytes.
const MAX_NAME: usize = 200;
/// No write takes so long: a temporary file of this age is left over from an ended process.
const STALE: Duration = Duration::from_secs(3600);

/// What is stored of one upstream.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// Its sets, one for each line that asks Consul.
    pub sources: Vec<Source>,
}

/// One set of peers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Source {
    /// What the set is the answer to: the text of query, addresses and selection. Another text is
    /// another set.
    pub key: String,
    /// The datacenter that the instances are in, where an answer said so.
    pub datacenter: Option<String>,
    /// Those that served. What is [`ignored`](Peer::ignored) of their `Meta` and what
    /// [keeps](Peer::kept_by) them is not stored.
    pub peers: Vec<Arc<Peer>>,
}

/// A directory with a file for each upstream.
#[derive(Debug)]
pub struct Store {
    dir: PathBuf,
    /// What the files' names begin with.
    prefix: &'static str,
    /// What was read or written last of each upstream.
    seen: Mutex<HashMap<String, Seen>>,
    swept: AtomicBool,
}

/// What stands in a file, and in which.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Seen {
    checksum: Digits,
    device: u64,
    inode: u64,
    size: u64,
    changed: (i64, i64),
}

/// A checksum as it is written: 64 bits in hexadecimal.
type Digits = [u8; 16];

/// Why an upstream's state was not read or written.
#[derive(Debug, Error)]
pub enum StateError {
    /// There is something, and it cannot be read.
    #[error("cannot read \"{}\": {err}", shown(.path))]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system says.
        err: io::Error,
    },
    /// What was there before still is.
    #[error("cannot write \"{}\": {err}", shown(.path))]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system says.
        err: io::Error,
    },
    /// What is there is not served.
    #[error("refused \"{}\", it {flaw}", shown(.path))]
    Refused {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        flaw: Flaw,
    },
    /// The file would be refused when it is read, so it was not written.
    #[error("not written \"{}\", it {flaw}", shown(.path))]
    Unfit {
        /// The file.
        path: PathBuf,
        /// What would be wrong with it.
        flaw: Flaw,
    },
}

/// What is wrong with a file. The texts never hold a byte of it that could not stand in a log
/// line.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Flaw {
    /// A directory, a link, a pipe.
    #[error("is no regular file")]
    NotRegular,
    /// A bound on memory.
    #[error("is larger than 64 MiB")]
    TooLarge,
    /// It does not begin as each file does.
    #[error("is no state file")]
    NotState,
    /// Another release has written it.
    #[error("has version {0}, not {VERSION}")]
    Version(u32),
    /// Cut, damaged or edited.
    #[error("has a wrong checksum")]
    Checksum,
    /// Not JSON, or not of the right shape.
    #[error("is not valid JSON for a state: {0}")]
    Json(String),
    /// Copied or renamed.
    #[error("belongs to upstream \"{0}\"")]
    Upstream(String),
    /// More than an answer of Consul may have.
    #[error("has more than {MAX_INSTANCES} peers in a set")]
    TooManyPeers,
    /// Nothing that Consul's answer could have become.
    #[error("has an invalid peer, \"{id}\" on \"{node}\": {why}")]
    Peer {
        /// The node's name.
        node: String,
        /// The service ID.
        id: String,
        /// What makes no sense.
        why: &'static str,
    },
}

fn shown(path: &Path) -> String {
    printable(path.as_os_str().as_bytes(), 1000)
}

impl Store {
    /// The store in a directory, which has to exist when something is saved. Touches nothing.
    pub fn new(dir: PathBuf) -> Self {
        Self { dir, prefix: "", seen: Mutex::default(), swept: AtomicBool::new(false) }
    }

    /// The same directory, with files of its own: their names begin with this text. It is short and ends
    /// with a tilde, as no file's name begins otherwise.
    #[must_use]
    pub fn with_prefix(self, prefix: &'static str) -> Self {
        Self { prefix, ..self }
    }

    /// The file of an upstream.
    pub fn path(&self, upstream: &str) -> PathBuf {
        self.dir.join(self.prefix.to_owned() + &file_name(upstream))
    }

    /// Reads what is stored of an upstream, if anything is.
    pub fn load(&self, upstream: &str) -> Result<Option<State>, StateError> {
        let path = self.path(upstream);
        let refused = |flaw| StateError::Refused { path: path.clone(), flaw };
        let failed = |err| StateError::Read { path: path.clone(), err };
        // A pipe in its place must not block, and a link in its place was not made here.
        let flags = libc::O_NONBLOCK | libc::O_NOFOLLOW;
        let file = match OpenOptions::new().read(true).custom_flags(flags).open(&path) {
            Ok(file) => file,
            Err(err) if err.kind() == ErrorKind::NotFound => return Ok(None),
            Err(err) if err.raw_os_error() == Some(libc::ELOOP) => {
                return Err(refused(Flaw::NotRegular));
            }
            Err(err) => return Err(failed(err)),
        };
        // Before the content: what is written meanwhile shows as a change later.
        let data = file.metadata().map_err(failed)?;
        if !data.is_file() {
            return Err(refused(Flaw::NotRegular));
        }
        let mut bytes = Vec::new();
        if data.len() <= MAX_SIZE {
            file.take(MAX_SIZE + 1).read_to_end(&mut bytes).map_err(failed)?;
        }
        if data.len().max(bytes.len() as u64) > MAX_SIZE {
            return Err(refused(Flaw::TooLarge));
        }
        let state = parse(&bytes, upstream).map_err(refused)?;
        let (checksum, _) = split(&bytes).map_err(refused)?;
        self.seen().insert(upstream.to_owned(), Seen::of(checksum, &data));
        Ok(Some(state))
    }

    /// Stores what an upstream serves; `false` if that is there already. The file is replaced as a
    /// whole: whoever reads it meanwhile, or after an error, reads what was there before.
    pub fn save(&self, upstream: &str, state: &State) -> Result<bool, StateError> {
        let path = self.path(upstream);
        let unfit = |flaw| StateError::Unfit { path: path.clone(), flaw };
        let failed = |err| StateError::Write { path: path.clone(), err };
        let bytes = encode(upstream, state).map_err(unfit)?;
        let (checksum, _) = split(&bytes).map_err(unfit)?;
        if self.is_there(upstream, checksum, &path) {
            return Ok(false);
        }
        // Before the write: what an ended process left may be what fills the disk.
        if !self.swept.swap(true, Ordering::Relaxed) {
            sweep(&self.dir);
        }
        let data = replace(&path, &bytes).map_err(failed)?;
        self.seen().insert(upstream.to_owned(), Seen::of(checksum, &data));
        Ok(true)
    }

    /// Whether the file holds this already. Another process may have replaced it, or somebody
    /// removed it, since this one saw it.
    fn is_there(&self, upstream: &str, checksum: &Digits, path: &Path) -> bool {
        let Some(seen) = self.seen().get(upstream).copied() else { return false };
        fs::symlink_metadata(path).is_ok_and(|data| seen == Seen::of(checksum, &data))
    }

    fn seen(&self) -> MutexGuard<'_, HashMap<String, Seen>> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Seen {
    fn of(checksum: &Digits, data: &Metadata) -> Self {
        Self {
            checksum: *checksum,
            device: data.dev(),
            inode: data.ino(),
            size: data.size(),
            changed: (data.ctime(), data.ctime_nsec()),
        }
    }
}

/// Puts a file with this content in the place of `path`; on an error, what is there stays.
fn replace(path: &Path, bytes: &[u8]) -> io::Result<Metadata> {
    let mut attempts = 0..4;
    let (mut file, temporary) = loop {
        let temporary = path.with_file_name(temporary_name(path));
        match OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary) {
            Ok(file) => break (file, temporary),
            Err(err) if err.kind() == ErrorKind::AlreadyExists && attempts.next().is_some() => {}
            Err(err) => return Err(err),
        }
    };
    // No fsync: it can block for seconds on a busy disk, and what a power loss takes is only a
    // start without this file. One that is cut has a wrong checksum.
    let replaced = file
        .write_all(bytes)
        .and_then(|()| fs::rename(&temporary, path))
        // Of the file that was written, whatever stands at the path by now.
        .and_then(|()| file.metadata());
    if replaced.is_err() {
        // What cannot be removed is swept one day.
        let _ = fs::remove_file(&temporary);
    }
    replaced
}

/// A name beside a file's. Each process has its own ID, but not those in two containers with one
/// volume, nor one after a restart; random numbers differ, but not those of two forked processes.
fn temporary_name(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    format!(".{name}.{}-{:016x}.tmp", std::process::id(), fastrand::u64(..))
}

/// Removes what ended processes left unfinished, of whatever upstream. A directory that cannot be
/// read is no error of its own.
fn sweep(dir: &Path) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let stale = || {
            let modified = entry.metadata().and_then(|data| data.modified()).ok()?;
            // One from the future is kept: some clock is wrong.
            modified.elapsed().ok()
        };
        if is_temporary(&entry.file_name()) && stale().is_some_and(|age| age > STALE) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// Whether this is a name by [`temporary_name`]. No upstream's own file ends so.
fn is_temporary(name: &OsStr) -> bool {
    let parts = || {
        let name = name.to_str()?.strip_prefix('.')?.strip_suffix(".tmp")?;
        let (name, number) = name.rsplit_once('.')?;
        let (process, random) = number.split_once('-')?;
        let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        let hex = |text: &str| text.len() == 16 && text.bytes().all(|b| b.is_ascii_hexdigit());
        Some(name.ends_with(SUFFIX) && digits(process) && hex(random))
    };
    parts().unwrap_or(false)
}

/// The name of an upstream's file: other names have other files, and none leaves the directory.
fn file_name(upstream: &str) -> String {
    let mut name = String::with_capacity(upstream.len() + SUFFIX.len());
    for (at, byte) in upstream.bytes().enumerate() {
        match byte {
            b'.' if at == 0 => name.push_str("%2E"),
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'.' | b'_' | b'-' => name.push(byte.into()),
            _ => name.push_str(&format!("%{byte:02X}")),
        }
    }
    if name.len() > MAX_NAME {
        // No name that is whole has a tilde.
        let end = format!("~{:016x}", fnv1a(upstream.as_bytes()));
        name.truncate(MAX_NAME - end.len());
        name.push_str(&end);
    }
    name.push_str(SUFFIX);
    name
}

/// The hash FNV-1a of 64 bits: as a checksum it finds each change of a single byte, and of others all
/// but about one in 2^64. It is no protection against somebody who may write the file.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |sum, b| (sum ^ u64::from(*b)).wrapping_mul(0x100_0000_01b3))
}

/// A file as a whole. Equal states have the same bytes.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileJson<'a> {
    version: u32,
    checksum: Cow<'a, str>,
    upstream: Cow<'a, str>,
    sources: Vec<SourceJson<'a>>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SourceJson<'a> {
    key: Cow<'a, str>,
    datacenter: Option<Cow<'a, str>>,
    peers: Vec<PeerJson<'a>>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct PeerJson<'a> {
    node: Cow<'a, str>,
    id: Cow<'a, str>,
    addresses: Cow<'a, [SocketAddr]>,
    weight: u32,
    #[serde(with = "StatusJson")]
    status: Status,
    #[serde(with = "OverridesJson", default, skip_serializing_if = "is_default")]
    overrides: Overrides,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "Status", rename_all = "lowercase")]
enum StatusJson {
    Passing,
    Warning,
    Critical,
    Maintenance,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "Overrides", deny_unknown_fields)]
struct OverridesJson {
    #[serde(skip_serializing_if = "is_default")]
    weight: Option<u32>,
    #[serde(skip_serializing_if = "is_default")]
    max_conns: Option<u32>,
    #[serde(skip_serializing_if = "is_default")]
    max_fails: Option<u32>,
    #[serde(skip_serializing_if = "is_default")]
    fail_timeout: Option<u32>,
    #[serde(skip_serializing_if = "is_default")]
    backup: Option<bool>,
    #[serde(skip_serializing_if = "is_default")]
    down: Option<bool>,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

impl<'a> PeerJson<'a> {
    fn of(peer: &'a Peer) -> Self {
        let Peer { node, id, addresses, weight, overrides, ignored: _, status, kept_by: _ } = peer;
        Self {
            node: node.into(),
            id: id.into(),
            addresses: addresses.into(),
            weight: *weight,
            status: *status,
            overrides: *overrides,
        }
    }

    fn into_peer(self) -> Peer {
        Peer {
            node: self.node.into_owned(),
            id: self.id.into_owned(),
            addresses: self.addresses.into_owned(),
            weight: self.weight,
            overrides: self.overrides,
            ignored: Vec::new(),
            status: self.status,
            kept_by: None,
        }
    }
}

/// The content of an upstream's file; what [`parse`] would refuse is refused here, too.
pub fn encode(upstream: &str, state: &State) -> Result<Vec<u8>, Flaw> {
    check(state)?;
    let sources = state.sources.iter().map(|source| SourceJson {
        key: (&source.key).into(),
        datacenter: source.datacenter.as_ref().map(Into::into),
        peers: source.peers.iter().map(|peer| PeerJson::of(peer)).collect(),
    });
    let file = FileJson {
        version: VERSION,
        checksum: "0000000000000000".into(),
        upstream: upstream.into(),
        sources: sources.collect(),
    };
    let mut bytes = serde_json::to_vec(&file).map_err(json)?;
    bytes.push(b'\n');
    if bytes.len() as u64 > MAX_SIZE {
        return Err(Flaw::TooLarge);
    }
    seal(&mut bytes);
    Ok(bytes)
}

/// Reads the content of an upstream's file.
pub fn parse(bytes: &[u8], upstream: &str) -> Result<State, Flaw> {
    if bytes.len() as u64 > MAX_SIZE {
        return Err(Flaw::TooLarge);
    }
    verify(bytes)?;
    let file: FileJson = serde_json::from_slice(bytes).map_err(json)?;
    if file.upstream != upstream {
        return Err(Flaw::Upstream(printable(file.upstream.as_bytes(), 200)));
    }
    let sources = file.sources.into_iter().map(|source| Source {
        key: source.key.into_owned(),
        datacenter: source.datacenter.map(Cow::into_owned),
        peers: source.peers.into_iter().map(|peer| Arc::new(peer.into_peer())).collect(),
    });
    let state = State { sources: sources.collect() };
    check(&state)?;
    Ok(state)
}

/// Puts the right checksum into what begins as a state file does. With it, a test of [`parse`] can
/// reach what stands behind the checksum.
pub fn seal(bytes: &mut [u8]) {
    if !bytes.starts_with(HEAD) {
        return;
    }
    if let Some((digits, rest)) = bytes[HEAD.len()..].split_first_chunk_mut::<16>() {
        digits.copy_from_slice(format!("{:016x}", fnv1a(rest)).as_bytes());
    }
}

/// Checks that a file is whole.
fn verify(bytes: &[u8]) -> Result<(), Flaw> {
    let (digits, rest) = split(bytes)?;
    // As text: one number has one text.
    let expected = format!("{:016x}", fnv1a(rest));
    if digits == expected.as_bytes() { Ok(()) } else { Err(Flaw::Checksum) }
}

/// A file's checksum, and what it is the checksum of.
fn split(bytes: &[u8]) -> Result<(&Digits, &[u8]), Flaw> {
    let rest = bytes.strip_prefix(HEAD).ok_or_else(|| other(bytes))?;
    rest.split_first_chunk().ok_or(Flaw::Checksum)
}

/// What a file is that begins in another way. Those of all versions begin with their version.
fn other(bytes: &[u8]) -> Flaw {
    let version = || {
        let rest = bytes.strip_prefix(b"{\"version\":")?;
        let digits = rest.iter().take_while(|b| b.is_ascii_digit()).count();
        std::str::from_utf8(&rest[..digits]).ok()?.parse().ok()
    };
    version().filter(|version| *version != VERSION).map_or(Flaw::NotState, Flaw::Version)
}

fn json(err: serde_json::Error) -> Flaw {
    // The text can quote a piece of the file.
    Flaw::Json(printable(err.to_string().as_bytes(), 200))
}

/// Checks that this is what answers of Consul could have become.
fn check(state: &State) -> Result<(), Flaw> {
    for source in &state.sources {
        if source.peers.len() > MAX_INSTANCES {
            return Err(Flaw::TooManyPeers);
        }
        let mut taken = HashSet::with_capacity(source.peers.len());
        for peer in &source.peers {
            check_peer(peer, &mut taken).map_err(|why| Flaw::Peer {
                node: printable(peer.node.as_bytes(), 100),
                id: printable(peer.id.as_bytes(), 100),
                why,
            })?;
        }
    }
    Ok(())
}

fn check_peer(peer: &Peer, taken: &mut HashSet<SocketAddr>) -> Result<(), &'static str> {
    match peer.addresses.len() {
        1..=MOST => {}
        0 => return Err("it has no address"),
        _ => return Err("it has too many addresses"),
    }
    for address in &peer.addresses {
        // The text of an address leaves out its flow, and Consul's addresses have no scope.
        let plain = SocketAddr::new(address.ip(), address.port());
        if !is_host(address.ip()) || address.port() == 0 || *address != plain {
            return Err("an address is of no use");
        }
        if !taken.insert(*address) {
            return Err("an address is there twice");
        }
    }
    let Overrides { weight, max_conns, max_fails, fail_timeout, backup: _, down: _ } =
        peer.overrides;
    if ![Some(peer.weight), weight].iter().flatten().all(|n| (1..=MAX_NUMBER).contains(n)) {
        return Err("a weight is out of range");
    }
    if ![max_conns, max_fails, fail_timeout].iter().flatten().all(|n| *n <= MAX_NUMBER) {
        return Err("a number is out of range");
    }
    if peer.status == Status::Maintenance {
        return Err("it is in maintenance");
    }
    Ok(())
}

#[cfg(test)]
mod tests;
