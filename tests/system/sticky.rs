//! Sessions, by the `sticky` of newer nginx: each stays with its instance as long as that serves.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use testbed::http::{self, Conn};
use testbed::{Load, Nginx, Service, eventually, nginx};

use crate::common::{Instance, PATIENCE, Serve, Stage, steady};

const CLIENTS: usize = 12;

/// Where a client's requests go, and what it has to say for that.
struct Session {
    /// The session's ID of `sticky cookie`, which is the instance's.
    id: String,
    /// As an argument, what `sticky learn` knows the client by.
    name: String,
    /// By name of the upstream.
    instances: BTreeMap<&'static str, String>,
}

const UPSTREAMS: [(&str, &str); 3] = [
    ("cookie", "sticky cookie srv;"),
    ("route", "sticky route $arg_route;"),
    ("learn", "sticky learn zone=sessions:1m timeout=1h create=$arg_session lookup=$arg_session;"),
];

/// Whether this nginx has `sticky`; else says that a test is skipped.
fn has_sticky(conf: &nginx::Builder, test: &str) -> bool {
    let said = conf.config_test();
    let has = said.ok || !said.output.contains("unknown directive \"sticky\"");
    if !has {
        // Not by println!, which shows only where a test fails.
        let _ = writeln!(io::stderr(), "skipped: {test}, this nginx has no sticky");
    }
    has
}

#[test]
fn a_session_stays_with_its_instance() {
    let stage = Stage::set("sticky");
    let [one, two, three, four, five]: [Instance; 5] = stage.web();
    stage.register([&two, &three, &four]);
    let conf = UPSTREAMS.iter().fold(stage.nginx().workers(2), |conf, (name, sticky)| {
        conf.upstream(name, &format!("consul_upstream web; {sticky}"))
    });
    if !has_sticky(&conf, "a_session_stays_with_its_instance") {
        return;
    }
    let mut nginx = conf.start();
    let seen = |nginx: &Nginx, line: &str| {
        nginx.wait_log(line, UPSTREAMS.len(), PATIENCE);
    };
    let mut sessions: Vec<Session> =
        (0..CLIENTS).map(|n| Session::begin(&nginx, &format!("client-{n}"))).collect();
    for (upstream, _) in UPSTREAMS {
        let mut instances: Vec<_> = sessions.iter().map(|it| &it.instances[upstream]).collect();
        instances.sort_unstable();
        instances.dedup();
        assert_eq!(instances, ["web-2", "web-3", "web-4"], "{upstream}");
    }
    all_stay(&nginx, &sessions);
    // One client never rests.
    let busy = sessions.iter().find(|it| it.instances["cookie"] == "web-2").expect("one of it");
    let load = Load::start(nginx.addr(), &steady().header("Cookie", &format!("srv={}", busy.id)));

    // Before them in the list, and after them.
    stage.register([&one, &five]);
    seen(&nginx, &format!("+{}", one.addr()));
    seen(&nginx, &format!("+{}", five.addr()));
    all_stay(&nginx, &sessions);
    nginx.reload();
    all_stay(&nginx, &sessions);

    // Who loses an instance has another one, and whoever has not does not notice.
    stage.consul.deregister("web-3");
    seen(&nginx, &format!("-{}", three.addr()));
    let (lost, kept): (Vec<Session>, Vec<Session>) =
        sessions.drain(..).partition(|it| it.instances["cookie"] == "web-3");
    assert!(!lost.is_empty() && !kept.is_empty());
    for session in &lost {
        for addr in &nginx.addrs()[..UPSTREAMS.len()] {
            assert_ne!(session.ask(&mut Conn::open(*addr).unwrap()), "web-3");
        }
    }
    let kept: Vec<Session> = kept.into_iter().map(|it| it.without("web-3", &nginx)).collect();
    all_stay(&nginx, &kept);
    nginx.reload();
    all_stay(&nginx, &kept);

    // Back at its address it is known by the same ID.
    stage.register([&three]);
    nginx.wait_log(&format!("+{}", three.addr()), 2 * UPSTREAMS.len(), PATIENCE);
    all_stay(&nginx, &kept);
    for session in &lost {
        let asked = session.asked(&nginx);
        assert_eq!([&asked["cookie"], &asked["route"]], ["web-3", "web-3"]);
    }

    let report = load.stop();
    report.assert_nothing_lost();
    assert_eq!(report.backends.keys().collect::<Vec<_>>(), ["web-2"], "{report}");
}

/// A listener that takes no connection: its queue is full, and the kernel answers no SYN.
struct Swallows {
    listener: TcpListener,
    _queue: Vec<TcpStream>,
}

impl Swallows {
    fn at(addr: SocketAddr) -> Swallows {
        let listener = TcpListener::bind(addr).unwrap();
        let connect = |_| TcpStream::connect_timeout(&addr, Duration::from_millis(200)).ok();
        let queue: Vec<TcpStream> = (0..10_000).map_while(connect).collect();
        assert!(queue.len() < 10_000, "the queue has no end");
        Swallows { listener, _queue: queue }
    }

    /// Whether somebody waits for an answer to a SYN.
    fn is_asked(&self) -> bool {
        const SYN_SENT: &str = "02";
        let SocketAddr::V4(addr) = self.listener.local_addr().unwrap() else { return false };
        // The kernel shows the address as the number that its bytes make in memory.
        let to = format!("{:08X}:{:04X}", u32::from_ne_bytes(addr.ip().octets()), addr.port());
        let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
        table
            .lines()
            .map(|line| line.split_whitespace().collect::<Vec<_>>())
            .any(|columns| matches!(columns[..], [_, _, remote, SYN_SENT, ..] if remote == to))
    }

    fn service(&self, id: &str) -> Service {
        Service::new("web", id, self.listener.local_addr().unwrap())
    }
}

/// The list changes while the server of nginx's choice does not answer: the choice begins again, and the client gets one
/// cookie, of the server that answered.
#[test]
fn a_choice_that_begins_again_leaves_one_cookie() {
    let stage = Stage::set("sticky_cookie");
    let [two, three]: [Instance; 2] = stage.web();
    let silent = Swallows::at((stage.net.ip(30), stage.net.port()).into());
    let addr: SocketAddr = (stage.net.ip(1), stage.net.port()).into();
    let location = |at: &str, more: &str| {
        format!(
            "location {at} {{ {more} proxy_pass http://web; proxy_connect_timeout 2s; \
             add_header X-Upstream $upstream_addr always; }}"
        )
    };
    let conf = stage
        .nginx()
        .http("upstream web { zone web 256k; consul_upstream web hold=0; sticky cookie srv expires=1h path=/; }")
        .listen(addr)
        .http(format!(
            "server {{ listen {addr}; {} {} }}",
            location("/", ""),
            // A header that another module adds to the same response.
            location("/more", "add_header Set-Cookie other=1 always;"),
        ));
    if !has_sticky(&conf, "a_choice_that_begins_again_leaves_one_cookie") {
        return;
    }
    let nginx = conf.start();
    let mut round = 0;
    for (path, others) in [("/", 0), ("/more", 1)] {
        for leaves in [false, true] {
            round += 1;
            stage.consul.register(&silent.service("web-0"));
            nginx.wait_log(
                &format!("+{} (web-0)", silent.listener.local_addr().unwrap()),
                round,
                PATIENCE,
            );
            let answer = thread::scope(|scope| {
                let request = scope.spawn(|| http::get(addr, path).unwrap());
                eventually(PATIENCE, "nginx knocks", || silent.is_asked());
                if leaves {
                    stage.consul.register(&three.service);
                    stage.consul.deregister("web-0");
                } else {
                    stage.register([&two]);
                }
                request.join().unwrap()
            });
            let instance = if leaves { &three } else { &two };
            assert_eq!(
                (answer.status, answer.backend()),
                (200, &*instance.service.id),
                "{answer:?}"
            );
            let cookies: Vec<_> = answer.headers.get_all("set-cookie").iter().collect();
            assert_eq!(cookies.len(), 1 + others, "{path}, it leaves: {leaves}: {cookies:?}");
            // The cookie names the server that answered.
            let ours = cookies.iter().find(|it| it.as_bytes().starts_with(b"srv=")).unwrap();
            let cookie = ours.to_str().unwrap().split(';').next().unwrap().to_owned();
            for _ in 0..3 {
                let headers = [("Cookie", &*cookie)];
                let again = Conn::open(addr).unwrap().request("GET", "/", &headers, "").unwrap();
                assert_eq!(again.backend(), instance.service.id, "{again:?}");
                assert_eq!(again.tried(), [instance.addr()]);
            }
            if !leaves {
                stage.consul.deregister("web-0");
            }
            stage.consul.deregister(&instance.service.id);
            // Once more than there were rounds: nobody serves at the start.
            nginx.wait_log("0 of 0 instances serve", round + 1, PATIENCE);
        }
    }
}

/// In every worker, whatever became of the list.
#[track_caller]
fn all_stay(nginx: &Nginx, sessions: &[Session]) {
    for session in sessions {
        assert_eq!(session.asked(nginx), session.instances, "{}", session.name);
    }
}

impl Session {
    /// A client's first requests.
    fn begin(nginx: &Nginx, name: &str) -> Session {
        let answer = http::get(nginx.addrs()[0], "/").unwrap();
        let cookie = answer.header("set-cookie").to_owned();
        let id = cookie.strip_prefix("srv=").and_then(|rest| rest.split(';').next());
        let id = id.unwrap_or_else(|| panic!("no session in {cookie:?}")).to_owned();
        let mut session = Session { id, name: name.to_owned(), instances: BTreeMap::new() };
        let addr = nginx.addrs()[2];
        // The first answer begins the session.
        let learned = session.ask(&mut Conn::open(addr).unwrap());
        let name = answer.backend().to_owned();
        session.instances = [("cookie", name.clone()), ("route", name), ("learn", learned)].into();
        session
    }

    /// Where a request goes that says all that the client knows.
    fn ask(&self, conn: &mut Conn) -> String {
        let path = format!("/?route={}&session={}", self.id, self.name);
        let cookie = format!("srv={}", self.id);
        let answer = conn.request("GET", &path, &[("Cookie", &cookie)], "").unwrap();
        assert_eq!((answer.status, answer.tried().len()), (200, 1), "{}", self.name);
        answer.backend().to_owned()
    }

    /// Where requests go now, by all workers.
    fn asked(&self, nginx: &Nginx) -> BTreeMap<&'static str, String> {
        let mut asked = BTreeMap::new();
        for ((upstream, _), addr) in UPSTREAMS.iter().zip(nginx.addrs()) {
            for (worker, mut conn) in http::worker_conns(*addr, nginx.worker_pids()).unwrap() {
                let name = self.ask(&mut conn);
                let before = asked.insert(*upstream, name.clone());
                assert!(
                    before.is_none_or(|it| it == name),
                    "{upstream} in worker {worker}: {name}"
                );
            }
        }
        asked
    }

    /// The same, where it was learned that the instance is gone.
    fn without(mut self, instance: &str, nginx: &Nginx) -> Session {
        if self.instances["learn"] == instance {
            let learned = self.ask(&mut Conn::open(nginx.addrs()[2]).unwrap());
            assert_ne!(learned, instance);
            self.instances.insert("learn", learned);
        }
        self
    }
}
