use std::collections::BTreeSet;
use std::fs::{File, Permissions};
use std::net::{IpAddr, SocketAddrV6};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::process::Command;
use std::sync::atomic::AtomicU32;
use std::sync::mpsc;
use std::time::SystemTime;

use proptest::prelude::*;

use super::*;
use crate::policy::KeptBy;

/// A directory that goes with its test.
struct Dir(PathBuf);

impl Dir {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("consul-watch-state-{}-{number}", std::process::id());
        let dir = std::env::temp_dir().join(name);
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir(&dir).unwrap();
        Self(dir)
    }

    fn store(&self) -> Store {
        Store::new(self.0.clone())
    }

    fn names(&self) -> Vec<String> {
        let name = |entry: io::Result<fs::DirEntry>| entry.unwrap().file_name();
        let mut names: Vec<_> =
            fs::read_dir(&self.0).unwrap().map(|e| name(e).into_string().unwrap()).collect();
        names.sort();
        names
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = fs::set_permissions(&self.0, Permissions::from_mode(0o700));
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn peer(n: u32) -> Peer {
    let [_, a, b, c] = n.to_be_bytes();
    Peer {
        node: format!("n{n}"),
        id: "web".into(),
        addresses: vec![([10, a, b, c], 80).into()],
        weight: 1,
        overrides: Overrides::default(),
        ignored: Vec::new(),
        status: Status::Passing,
        kept_by: None,
    }
}

fn source(peers: impl IntoIterator<Item = Peer>) -> Source {
    Source {
        key: "\"web\" dc=\"dc1\"".into(),
        datacenter: Some("dc1".into()),
        peers: peers.into_iter().map(Arc::new).collect(),
    }
}

fn state(peers: impl IntoIterator<Item = Peer>) -> State {
    State { sources: vec![source(peers)] }
}

/// Two sources, IPv6, all overrides.
fn rich() -> State {
    let overrides = Overrides {
        weight: Some(MAX_NUMBER),
        max_conns: Some(0),
        max_fails: Some(7),
        fail_timeout: Some(90),
        backup: Some(true),
        down: Some(false),
    };
    let six = Peer {
        id: "wéb \"\\\n".into(),
        addresses: vec!["[2001:db8::1]:443".parse().unwrap(), "10.0.0.2:443".parse().unwrap()],
        weight: MAX_NUMBER,
        overrides,
        status: Status::Warning,
        ..peer(2)
    };
    let empty = Source { key: "other".into(), ..Source::default() };
    State { sources: vec![source([peer(1), six]), empty] }
}

/// A file with a right checksum, whatever else is wrong with it.
fn sealed(text: &str) -> Vec<u8> {
    let mut bytes = text.as_bytes().to_vec();
    seal(&mut bytes);
    bytes
}

#[test]
fn the_shape_of_a_file() {
    let text = String::from_utf8(encode("web", &rich()).unwrap()).unwrap();
    let (head, rest) = text.split_at(HEAD.len());
    assert_eq!(head.as_bytes(), HEAD);
    assert_eq!(
        &rest[16..],
        "\",\"upstream\":\"web\",\"sources\":[{\"key\":\"\\\"web\\\" dc=\\\"dc1\\\"\",\
         \"datacenter\":\"dc1\",\"peers\":[{\"node\":\"n1\",\"id\":\"web\",\
         \"addresses\":[\"10.0.0.1:80\"],\"weight\":1,\"status\":\"passing\"},\
         {\"node\":\"n2\",\"id\":\"wéb \\\"\\\\\\n\",\
         \"addresses\":[\"[2001:db8::1]:443\",\"10.0.0.2:443\"],\"weight\":2147483647,\
         \"status\":\"warning\",\"overrides\":{\"weight\":2147483647,\"max_conns\":0,\
         \"max_fails\":7,\"fail_timeout\":90,\"backup\":true,\"down\":false}}]},\
         {\"key\":\"other\",\"datacenter\":null,\"peers\":[]}]}\n"
    );
    // It has to stay the same for as long as the version does.
    assert_eq!(&rest[..16], "2d6c70faf0f7520b");
    assert_eq!(fnv1a(b"foobar"), 0x8594_4171_f739_67e8, "as the hash is published");
}

#[test]
fn what_was_saved_is_loaded() {
    let dir = Dir::new();
    let store = dir.store();
    assert_eq!(store.load("web").unwrap(), None);
    assert!(store.save("web", &rich()).unwrap());
    assert!(store.save("other", &state([peer(1)])).unwrap());
    assert_eq!(dir.names(), ["other.json", "web.json"]);
    let mode = fs::metadata(store.path("web")).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o600);
    for store in [&store, &dir.store()] {
        assert_eq!(store.load("web").unwrap(), Some(rich()));
        assert_eq!(store.load("other").unwrap(), Some(state([peer(1)])));
        assert_eq!(store.load("none").unwrap(), None);
    }
    assert_eq!(Store::new(dir.0.join("none")).load("web").unwrap(), None);
}

#[test]
fn why_a_peer_served_is_not_stored() {
    let kept = Peer { ignored: vec!["nginx_x".into()], kept_by: Some(KeptBy::Guard), ..peer(1) };
    let bytes = encode("web", &state([kept])).unwrap();
    assert_eq!(bytes, encode("web", &state([peer(1)])).unwrap());
    assert_eq!(parse(&bytes, "web").unwrap(), state([peer(1)]));
}

#[test]
fn what_is_there_already_is_not_written() {
    let dir = Dir::new();
    let store = dir.store();
    let (one, two) = (state([peer(1)]), state([peer(2)]));
    let inode = || fs::metadata(store.path("web")).unwrap().ino();
    assert!(store.save("web", &one).unwrap());
    let first = inode();
    assert!(!store.save("web", &one).unwrap());
    assert_eq!(inode(), first);
    assert!(store.save("web", &two).unwrap());
    assert!(store.save("web", &one).unwrap());

    // Another process wrote, and this one learns what by reading.
    let other = dir.store();
    assert!(other.save("web", &two).unwrap());
    assert!(store.save("web", &one).unwrap());
    assert!(other.save("web", &two).unwrap());
    store.load("web").unwrap();
    assert!(!store.save("web", &two).unwrap());

    // Damaged with the same size, and removed.
    let mut bytes = fs::read(store.path("web")).unwrap();
    bytes[40] ^= 1;
    fs::write(store.path("web"), bytes).unwrap();
    assert!(store.save("web", &two).unwrap());
    fs::remove_file(store.path("web")).unwrap();
    assert!(store.save("web", &two).unwrap());
    assert_eq!(store.load("web").unwrap(), Some(two));
}

#[test]
fn no_damage_is_believed() {
    let good = encode("web", &state([peer(1)])).unwrap();
    for end in 0..good.len() {
        assert!(parse(&good[..end], "web").is_err(), "cut at {end}");
        // What a file system may leave of a file that was not on the disk yet.
        let zeros: Vec<u8> = good[..end].iter().copied().chain(vec![0; good.len() - end]).collect();
        assert!(parse(&zeros, "web").is_err(), "zeros from {end}");
        let without = [&good[..end], &good[end + 1..]].concat();
        assert!(parse(&without, "web").is_err(), "without byte {end}");
    }
    for at in 0..good.len() {
        let mut bad = good.clone();
        for value in (0..=u8::MAX).filter(|value| *value != good[at]) {
            bad[at] = value;
            assert!(parse(&bad, "web").is_err(), "{value:#x} at {at}");
        }
    }
    for more in ["\n", "\0", "{}", " "] {
        assert!(parse(&[&good, more.as_bytes()].concat(), "web").is_err(), "{more:?}");
    }
    assert!(parse(&[good.clone(), good].concat(), "web").is_err());
}

#[test]
fn each_flaw_is_told() {
    let dir = Dir::new();
    let store = dir.store();
    let good = String::from_utf8(encode("web", &state([peer(1)])).unwrap()).unwrap();
    let table = [
        ("".into(), "is no state file"),
        ("garbage".into(), "is no state file"),
        (good.replace("\"version\":1", "\"version\":"), "is no state file"),
        (good.replace("\"version\":1", "\"version\":1.5"), "is no state file"),
        (good.replace("\"version\":1", "\"version\":23"), "has version 23, not 1"),
        (good.replace("n1", "n2"), "has a wrong checksum"),
        ("{\"version\":1,\"checksum\":\"0".into(), "has a wrong checksum"),
    ];
    for (text, why) in table {
        fs::write(store.path("web"), text).unwrap();
        let text = store.load("web").unwrap_err().to_string();
        assert_eq!(text, format!("refused \"{}\", it {why}", shown(&store.path("web"))));
    }
}

#[test]
fn another_upstreams_file_is_refused() {
    let dir = Dir::new();
    let store = dir.store();
    store.save("a\nb", &state([peer(1)])).unwrap();
    fs::rename(store.path("a\nb"), store.path("web")).unwrap();
    let err = store.load("web").unwrap_err();
    assert!(err.to_string().ends_with("web.json\", it belongs to upstream \"a\\nb\""), "{err}");
}

#[test]
fn a_right_checksum_alone_is_not_believed() {
    let good = String::from_utf8(encode("web", &state([peer(1)])).unwrap()).unwrap();
    assert_eq!(parse(&sealed(&good), "web").unwrap(), state([peer(1)]));
    let invalid = "is not valid JSON for a state: ";
    for (from, to, why) in [
        ("}]}]}\n", "}]}]\n", invalid),
        ("}\n", "}}\n", invalid),
        ("n1", "\u{1}", invalid),
        ("\"node\"", "\"knot\"", invalid),
        ("\"weight\":1,", "", invalid),
        ("\"weight\":1", "\"weight\":1,\"weight\":1", invalid),
        ("\"weight\":1", "\"weight\":1,\"more\":1", invalid),
        ("\"weight\":1", "\"weight\":-1", invalid),
        ("\"weight\":1", "\"weight\":4294967296", invalid),
        ("\"weight\":1", "\"weight\":1,\"overrides\":{\"slow_start\":1}", invalid),
        ("passing", "fine", invalid),
        ("passing", "maintenance", "it is in maintenance"),
        ("\"upstream\":\"web\"", "\"upstream\":\"web\",\"version\":1", invalid),
        ("10.0.0.1:80", "web:80", invalid),
        ("10.0.0.1:80", "10.0.0.1", invalid),
        ("10.0.0.1:80", "10.0.0.1:65536", invalid),
        ("10.0.0.1:80", "10.0.0.1:0", "an address is of no use"),
        ("10.0.0.1:80", "0.0.0.0:80", "an address is of no use"),
        ("10.0.0.1:80", "224.0.0.1:80", "an address is of no use"),
        ("10.0.0.1:80", "[::]:80", "an address is of no use"),
        ("10.0.0.1:80", "[ff02::1]:80", "an address is of no use"),
        ("10.0.0.1:80", "[fe80::1%2]:80", "an address is of no use"),
        ("10.0.0.1:80", "10.0.0.1:80\",\"10.0.0.1:80", "an address is there twice"),
        ("\"10.0.0.1:80\"", "", "it has no address"),
        ("\"weight\":1", "\"weight\":0", "a weight is out of range"),
        ("\"weight\":1", "\"weight\":2147483648", "a weight is out of range"),
        ("\"weight\":1", "\"weight\":1,\"overrides\":{\"weight\":0}", "a weight is out of range"),
        (
            "\"weight\":1",
            "\"weight\":1,\"overrides\":{\"fail_timeout\":2147483648}",
            "a number is out of range",
        ),
    ] {
        assert!(good.contains(from), "{from:?}");
        let flaw = parse(&sealed(&good.replace(from, to)), "web").unwrap_err().to_string();
        assert!(flaw.contains(why) && !flaw.contains('\n'), "{from:?} as {to:?}: {flaw}");
    }
    let nested = format!("{}{}", &good[..HEAD.len() + 18], "[".repeat(100_000));
    assert!(matches!(parse(&sealed(&nested), "web"), Err(Flaw::Json(_))));
    let mut bytes = sealed(&good.replace("n1", "\u{1}\u{2}"));
    let at = bytes.iter().position(|b| *b == 1).unwrap();
    bytes[at] = 0xff;
    seal(&mut bytes);
    assert!(matches!(parse(&bytes, "web"), Err(Flaw::Json(_))), "not UTF-8");
}

#[test]
fn bounds() {
    let dir = Dir::new();
    let store = dir.store();
    let most = state((1..=MAX_INSTANCES as u32).map(peer));
    assert_eq!(check(&most), Ok(()));
    let more = state((1..=MAX_INSTANCES as u32 + 1).map(peer));
    assert_eq!(check(&more), Err(Flaw::TooManyPeers));
    // Of each line that asks Consul.
    let two = State { sources: vec![source((1..=60_000).map(peer)); 2] };
    assert_eq!(check(&two), Ok(()));

    let addresses = |n| (1..=n).map(|port| ([10, 0, 0, 1], port).into()).collect();
    let most = state([Peer { addresses: addresses(MOST as u16), ..peer(1) }]);
    assert!(store.save("web", &most).unwrap());
    let more = state([Peer { addresses: addresses(MOST as u16 + 1), ..peer(1) }]);
    let err = store.save("web", &more).unwrap_err().to_string();
    let why = "it has an invalid peer, \"web\" on \"n1\": it has too many addresses";
    assert_eq!(err, format!("not written \"{}\", {why}", shown(&store.path("web"))));
    assert_eq!(store.load("web").unwrap(), Some(most));

    // Each becomes six bytes.
    let huge = Source { key: "\0".repeat(MAX_SIZE as usize / 6), ..Source::default() };
    assert_eq!(encode("web", &State { sources: vec![huge] }), Err(Flaw::TooLarge));
    let file = File::options().write(true).open(store.path("web")).unwrap();
    file.set_len(MAX_SIZE + 1).unwrap();
    let err = store.load("web").unwrap_err();
    assert!(matches!(err, StateError::Refused { flaw: Flaw::TooLarge, .. }), "{err}");
    file.set_len(0).unwrap();
    file.set_len(MAX_SIZE).unwrap();
    let err = store.load("web").unwrap_err();
    assert!(matches!(err, StateError::Refused { flaw: Flaw::NotState, .. }), "{err}");
}

#[test]
fn what_cannot_be_read_again_is_not_written() {
    let at = |ip: &str, port| {
        let addresses = vec![SocketAddr::new(ip.parse::<IpAddr>().unwrap(), port)];
        Peer { addresses, ..peer(1) }
    };
    let six = |flow, scope| {
        let address = SocketAddrV6::new("fe80::1".parse().unwrap(), 80, flow, scope);
        Peer { addresses: vec![address.into()], ..peer(1) }
    };
    let with = |overrides| Peer { overrides, ..peer(1) };
    let over = Some(MAX_NUMBER + 1);
    for bad in [
        at("10.0.0.1", 0),
        at("0.0.0.0", 80),
        six(1, 0),
        six(0, 1),
        Peer { addresses: Vec::new(), ..peer(1) },
        Peer { weight: 0, ..peer(1) },
        Peer { weight: MAX_NUMBER + 1, ..peer(1) },
        Peer { status: Status::Maintenance, ..peer(1) },
        with(Overrides { weight: over, ..Default::default() }),
        with(Overrides { max_conns: over, ..Default::default() }),
        with(Overrides { max_fails: over, ..Default::default() }),
        with(Overrides { fail_timeout: over, ..Default::default() }),
    ] {
        let flaw = encode("web", &state([peer(2), bad.clone()])).unwrap_err();
        assert!(matches!(flaw, Flaw::Peer { .. }), "{bad:?}: {flaw}");
    }
    assert!(encode("web", &state([six(0, 0)])).is_ok());
    assert!(encode("web", &state([peer(1), peer(1)])).is_err(), "the same address twice");
    let both = State { sources: vec![source([peer(1)]), source([peer(1)])] };
    assert!(encode("web", &both).is_ok(), "in one source");
}

/// As root, everything can be read and written.
fn obeys_modes(dir: &Dir) -> bool {
    fs::set_permissions(&dir.0, Permissions::from_mode(0o500)).unwrap();
    let obeys = File::create(dir.0.join("probe")).is_err();
    fs::set_permissions(&dir.0, Permissions::from_mode(0o700)).unwrap();
    let _ = fs::remove_file(dir.0.join("probe"));
    obeys
}

#[test]
fn only_regular_files_are_read_and_anything_is_replaced() {
    let dir = Dir::new();
    let store = dir.store();
    let path = store.path("web");
    let target = dir.0.join("target");
    fs::write(&target, encode("web", &rich()).unwrap()).unwrap();
    let pipe = || assert!(Command::new("mkfifo").arg(&path).status().unwrap().success());
    let link = || symlink(&target, &path).unwrap();
    let dangling = || symlink("nothing", &path).unwrap();
    let socket = || drop(UnixListener::bind(&path).unwrap());
    let kinds: [&dyn Fn(); 4] = [&pipe, &link, &dangling, &socket];
    for (n, make) in kinds.into_iter().enumerate() {
        make();
        let (done, wait) = mpsc::channel();
        let reader = dir.store();
        std::thread::spawn(move || done.send(reader.load("web")));
        let read = wait.recv_timeout(Duration::from_secs(20)).expect("does not block");
        match read.unwrap_err() {
            StateError::Refused { flaw: Flaw::NotRegular, .. } if n < 3 => {}
            // A socket cannot even be opened.
            StateError::Read { .. } if n == 3 => {}
            err => panic!("kind {n}: {err}"),
        }
        assert!(store.save("web", &state([peer(1)])).unwrap());
        assert_eq!(store.load("web").unwrap(), Some(state([peer(1)])));
        assert_eq!(fs::read(&target).unwrap(), encode("web", &rich()).unwrap(), "not followed");
        fs::remove_file(&path).unwrap();
    }
    assert_eq!(dir.names(), ["target"]);

    fs::create_dir(&path).unwrap();
    let err = store.load("web").unwrap_err();
    assert!(matches!(err, StateError::Refused { flaw: Flaw::NotRegular, .. }), "{err}");
    let err = store.save("web", &rich()).unwrap_err();
    assert!(matches!(err, StateError::Write { .. }), "{err}");
    assert_eq!(dir.names(), ["target", "web.json"], "no temporary file is left");
}

#[test]
fn a_directory_that_is_none() {
    let dir = Dir::new();
    let file = dir.0.join("a\nfile");
    fs::write(&file, "").unwrap();
    let store = Store::new(file);
    let err = store.load("web").unwrap_err();
    assert!(matches!(err, StateError::Read { .. }));
    assert!(err.to_string().contains("/a\\nfile/web.json\": "), "{err}");
    assert!(matches!(store.save("web", &rich()).unwrap_err(), StateError::Write { .. }));
    let store = Store::new(dir.0.join("none"));
    assert!(matches!(store.save("web", &rich()).unwrap_err(), StateError::Write { .. }));
    let store = Store::new("nul\0".into());
    assert!(store.load("web").is_err() && store.save("web", &rich()).is_err());
}

#[test]
fn a_directory_without_rights() {
    let dir = Dir::new();
    if !obeys_modes(&dir) {
        return;
    }
    let store = dir.store();
    store.save("web", &rich()).unwrap();
    fs::set_permissions(&dir.0, Permissions::from_mode(0o500)).unwrap();
    let err = store.save("web", &state([peer(1)])).unwrap_err();
    assert!(matches!(err, StateError::Write { .. }), "{err}");
    assert_eq!(store.load("web").unwrap(), Some(rich()), "read-only: what was there still is");
    fs::set_permissions(&dir.0, Permissions::from_mode(0o000)).unwrap();
    let err = store.load("web").unwrap_err();
    assert!(matches!(err, StateError::Read { .. }), "{err}");
    fs::set_permissions(&dir.0, Permissions::from_mode(0o700)).unwrap();
    fs::set_permissions(store.path("web"), Permissions::from_mode(0o000)).unwrap();
    let err = store.load("web").unwrap_err();
    assert!(matches!(err, StateError::Read { .. }), "{err}");
    assert!(store.save("web", &state([peer(1)])).unwrap(), "the directory's rights decide");
    assert_eq!(store.load("web").unwrap(), Some(state([peer(1)])));
}

/// A limit on the size of files fails a write in its middle, as a full disk does. It holds for a
/// whole process: the test runs itself in another one.
#[test]
fn a_write_that_fails_leaves_what_was_there() {
    const INSIDE: &str = "CONSUL_WATCH_TEST_LIMITED";
    if std::env::var_os(INSIDE).is_none() {
        let (_, module) = module_path!().split_once("::").unwrap();
        // Whatever is ignored stays so in what is executed: without that, signal 25, SIGXFSZ,
        // would end it.
        let output = Command::new("sh")
            .args(["-c", "trap '' 25; ulimit -f 16; exec \"$@\"", "sh"])
            .arg(std::env::current_exe().unwrap())
            .arg(format!("{module}::a_write_that_fails_leaves_what_was_there"))
            .args(["--exact", "--nocapture"])
            .env(INSIDE, "1")
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && text.contains("1 passed"), "{output:?}");
        return;
    }
    let dir = Dir::new();
    let store = dir.store();
    assert!(store.save("web", &rich()).unwrap());
    for _ in 0..3 {
        let err = store.save("web", &state((1..2000).map(peer))).unwrap_err();
        assert!(
            matches!(&err, StateError::Write { err, .. } if err.kind() == ErrorKind::FileTooLarge),
            "{err}"
        );
        assert_eq!(dir.names(), ["web.json"]);
        assert_eq!(store.load("web").unwrap(), Some(rich()));
    }
    assert!(store.save("web", &state([peer(1)])).unwrap(), "once there is room again");
}

#[test]
fn two_that_write_at_once_leave_a_whole_file() {
    let dir = Dir::new();
    let states: Vec<State> = (1..5).map(|n| state((1..n * 150).map(peer))).collect();
    dir.store().save("web", &states[0]).unwrap();
    let (shared, own) = (dir.store(), dir.store());
    std::thread::scope(|scope| {
        for (n, store) in [&shared, &shared, &own].into_iter().enumerate() {
            let states = &states;
            scope.spawn(move || {
                for round in 0..50 {
                    store.save("web", &states[(round + n) % states.len()]).unwrap();
                }
            });
        }
        for _ in 0..50 {
            let state = dir.store().load("web").unwrap().unwrap();
            assert!(states.contains(&state));
        }
    });
    assert_eq!(dir.names(), ["web.json"]);
    // Whoever was last, none believes to be there what is not.
    for store in [&shared, &own] {
        for state in &states {
            store.save("web", state).unwrap();
            assert_eq!(dir.store().load("web").unwrap().as_ref(), Some(state));
        }
    }
}

#[test]
fn only_old_temporary_files_are_swept() {
    let dir = Dir::new();
    let make = |name: &str, age: u64| {
        let file = File::create(dir.0.join(name)).unwrap();
        file.set_modified(SystemTime::now() - Duration::from_secs(age)).unwrap();
    };
    let old = ".web.json.17-0123456789abcdef.tmp";
    let day = 86400;
    make(old, day);
    make(".other.json.7-0123456789abcdef.tmp", day);
    let kept = [
        (".web.json.18-0123456789abcdef.tmp", 60),
        (".web.17-0123456789abcdef.tmp", day),
        (".web.json.x-0123456789abcdef.tmp", day),
        (".web.json.17-0123.tmp", day),
        (".tmp", day),
        ("old.json", day),
        ("web.json.17-0123456789abcdef.tmp", day),
    ];
    for (name, age) in kept {
        make(name, age);
    }
    assert!(is_temporary(temporary_name(&dir.store().path("a.b~/")).as_ref()));
    let store = dir.store();
    store.save("web", &rich()).unwrap();
    let mut expected: Vec<_> = kept.iter().map(|(name, _)| *name).collect();
    expected.push("web.json");
    expected.sort_unstable();
    assert_eq!(dir.names(), expected);
    // Once: a directory may be large.
    make(old, day);
    store.save("web", &state([peer(1)])).unwrap();
    assert!(dir.names().iter().any(|name| name == old));
}

#[test]
fn names_of_files() {
    for (upstream, name) in [
        ("web", "web.json"),
        ("Web_1-a.b", "Web_1-a.b.json"),
        (".", "%2E.json"),
        ("..", "%2E..json"),
        (".hidden", "%2Ehidden.json"),
        ("a/../b", "a%2F..%2Fb.json"),
        ("/etc/passwd", "%2Fetc%2Fpasswd.json"),
        ("wéb", "w%C3%A9b.json"),
        ("a b%\0~", "a%20b%25%00%7E.json"),
        ("web.json", "web.json.json"),
        ("", ".json"),
    ] {
        assert_eq!(file_name(upstream), name);
    }
    let at = "x".repeat(MAX_NAME);
    assert_eq!(file_name(&at), format!("{at}.json"));
    let mut long = vec![at.clone() + "x", "x".repeat(300), at + "y", "é".repeat(300)];
    long.push(file_name(&long[1]).strip_suffix(".json").unwrap().into());
    let names: BTreeSet<_> = long.iter().map(|upstream| file_name(upstream)).collect();
    assert_eq!(names.len(), long.len());

    let dir = Dir::new();
    let store = dir.store();
    let all = ["", ".", "..", "a/b", "../web", "wéb", "\0\n", "web.json", "%2E"];
    let all: Vec<String> = all.into_iter().map(String::from).chain(long).collect();
    for (n, upstream) in (1..).zip(&all) {
        assert!(store.save(upstream, &state([peer(n)])).unwrap(), "{upstream:?}");
        let name = store.path(upstream);
        let temporary = temporary_name(&name).len();
        assert_eq!(name.parent(), Some(dir.0.as_path()));
        assert!(name.file_name().unwrap().len() <= 205 && temporary <= 255, "{name:?}");
    }
    for (n, upstream) in (1..).zip(&all) {
        assert_eq!(dir.store().load(upstream).unwrap(), Some(state([peer(n)])), "{upstream:?}");
    }
    assert_eq!(dir.names().len(), all.len());
}

fn any_peer() -> impl Strategy<Value = Peer> {
    let number = || proptest::option::of(0..=MAX_NUMBER);
    let overrides =
        (
            proptest::option::of(1..=MAX_NUMBER),
            number(),
            number(),
            number(),
            any::<Option<bool>>(),
            any::<Option<bool>>(),
        )
            .prop_map(|(weight, max_conns, max_fails, fail_timeout, backup, down)| {
                Overrides { weight, max_conns, max_fails, fail_timeout, backup, down }
            });
    let host =
        any::<IpAddr>().prop_map(|ip| if is_host(ip) { ip } else { IpAddr::from([127, 0, 0, 1]) });
    let address = (host, 1..=u16::MAX).prop_map(|(ip, port)| SocketAddr::new(ip, port));
    let status = prop_oneof![Just(Status::Passing), Just(Status::Warning), Just(Status::Critical)];
    (
        any::<(String, String)>(),
        proptest::collection::vec(address, 1..4),
        1..=MAX_NUMBER,
        overrides,
        status,
    )
        .prop_map(|((node, id), addresses, weight, overrides, status)| Peer {
            node,
            id,
            addresses,
            weight,
            overrides,
            status,
            ..peer(1)
        })
}

fn any_state() -> impl Strategy<Value = State> {
    let peers = proptest::collection::vec(any_peer(), 0..6).prop_map(|mut peers| {
        let mut taken = HashSet::new();
        for peer in &mut peers {
            peer.addresses.retain(|address| taken.insert(*address));
        }
        peers.retain(|peer| !peer.addresses.is_empty());
        peers
    });
    let source =
        (any::<String>(), any::<Option<String>>(), peers).prop_map(|(key, datacenter, peers)| {
            let peers = peers.into_iter().map(Arc::new).collect();
            Source { key, datacenter, peers }
        });
    proptest::collection::vec(source, 0..4).prop_map(|sources| State { sources })
}

proptest! {
    #[test]
    fn any_state_comes_back(upstream in any::<String>(), state in any_state()) {
        let bytes = encode(&upstream, &state).unwrap();
        prop_assert_eq!(&parse(&bytes, &upstream).unwrap(), &state);
        prop_assert_eq!(encode(&upstream, &state.clone()).unwrap(), bytes);
    }

    #[test]
    fn no_two_names_have_one_file(one in "[ab./%~é]{0,80}", two in "[ab./%~é]{0,80}") {
        prop_assert_eq!(file_name(&one) == file_name(&two), one == two);
        let name = file_name(&one);
        prop_assert!(!name.contains('/') && name.len() <= 205);
    }

    #[test]
    fn garbage_is_never_believed(bytes: Vec<u8>) {
        prop_assert!(parse(&bytes, "web").is_err());
    }

    /// Whatever else a file with a right checksum holds: what is believed is valid.
    #[test]
    fn no_edit_passes_the_checks(
        state in any_state(),
        edits in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
    ) {
        let mut bytes = encode("web", &state).unwrap();
        let at = HEAD.len() + 16;
        for (index, byte) in edits {
            let n = index.index(bytes.len() - at);
            bytes[at + n] = byte;
        }
        seal(&mut bytes);
        if let Ok(read) = parse(&bytes, "web") {
            let again = encode("web", &read).unwrap();
            prop_assert_eq!(parse(&again, "web").unwrap(), read);
        }
    }
}

#[test]
fn two_stores_may_have_one_directory() {
    let dir = Dir::new();
    let (one, other) = (dir.store(), dir.store().with_prefix("stream~"));
    let state = |n| {
        let source = Source { key: "web".into(), datacenter: None, peers: vec![peer(n).into()] };
        State { sources: vec![source] }
    };
    for name in ["app", "stream~app"] {
        one.save(name, &state(1)).unwrap();
        other.save(name, &state(2)).unwrap();
        assert_eq!(one.load(name).unwrap(), Some(state(1)), "{name}");
        assert_eq!(other.load(name).unwrap(), Some(state(2)), "{name}");
    }
    assert_eq!(dir.names().len(), 4);
}
