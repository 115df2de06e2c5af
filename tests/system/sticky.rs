//! Sessions, by the `sticky` of newer nginx: each stays with its instance as long as that serves.

use std::collections::BTreeMap;
use std::io::{self, Write};

use testbed::http::{self, Conn};
use testbed::{Load, Nginx};

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

#[test]
fn a_session_stays_with_its_instance() {
    let stage = Stage::set("sticky");
    let [one, two, three, four, five]: [Instance; 5] = stage.web();
    stage.register([&two, &three, &four]);
    let conf = UPSTREAMS.iter().fold(stage.nginx().workers(2), |conf, (name, sticky)| {
        conf.upstream(name, &format!("consul_upstream web; {sticky}"))
    });
    let test = conf.config_test();
    if !test.ok && test.output.contains("unknown directive \"sticky\"") {
        // Not by println!, which shows only where a test fails.
        let _ = writeln!(
            io::stderr(),
            "skipped: a_session_stays_with_its_instance, this nginx has no sticky"
        );
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
