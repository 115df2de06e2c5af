//! A made-up document: what the tests and the example render.

#![allow(dead_code)]

pub mod server;

use consul_status::model::*;
use consul_status::{Answer, Document, Error, Peer, Request, Rows, Time, request};

/// 2026-03-02T14:03:11.482Z
pub const NOW: u64 = 1_772_460_191_482;

/// Peers that lie in memory, and a note of which were taken.
#[derive(Default)]
pub struct Table {
    pub peers: Vec<Vec<Peer<'static>>>,
    pub taken: Vec<usize>,
    held: Option<usize>,
}

impl Rows for Table {
    fn take(&mut self, upstream: usize) -> usize {
        self.taken.push(upstream);
        self.held = Some(upstream);
        self.peers[upstream].len()
    }

    fn row(&self, at: usize) -> Peer<'_> {
        self.peers[self.held.expect("rows are taken before they are looked at")][at].clone()
    }

    fn release(&mut self) {
        self.held = None;
    }
}

/// What a document is made of.
pub struct Sample {
    pub document: Document,
    pub peers: Vec<Vec<Peer<'static>>>,
}

impl Sample {
    /// Three upstreams: `app` is held, `api` and `mail` of stream are in sync.
    pub fn new(now: u64) -> Self {
        let ago = |seconds: u64| Some(Time::from_millis(now - 1000 * seconds));
        let document = Document {
            now: Time::from_millis(now),
            in_sync: false,
            since: ago(10),
            nginx: Nginx {
                version: "1.30.2".into(),
                module: "1.0.0".into(),
                load_timestamp: ago(108_000),
                pid: 4711,
            },
            thread: Thread {
                state: ThreadState::Running,
                pid: Some(4710),
                started: ago(108_000),
                heartbeat: ago(0),
                restarts: 0,
            },
            agents: vec![Agent {
                address: "http://127.0.0.1:8500".into(),
                up: true,
                version: Some("1.8.7".into()),
                connections: 3,
                max_connections: 100,
            }],
            memory: Memory { answers: Some(182_344), zone_size: 131_072 },
            upstreams: Vec::new(),
        };
        let mut sample = Self { document, peers: Vec::new() };

        let mut app = upstream("app", Protocol::Http, now);
        app.sync = Sync::Held;
        app.since = ago(10);
        app.held = 1;
        app.held_until = Some(Time::from_millis(now + 20_000));
        app.updates = Updates { applied: 41, held: 1, refused: 0 };
        app.retried_gets = 3;
        let source = &mut app.sources[0];
        source.tags = vec!["app".into()];
        source.registered = Some(6);
        source.serving = 4;
        source.last_success = ago(10);
        source.excluded.set(Reason::Maintenance, 1);
        source.excluded.set(Reason::Tag, 1);
        source.excluded.set(Reason::Critical, 0);
        source.errors.transport = 3;
        source.last_error = Some(LastError {
            time: Time::from_millis(now - 9_791_482),
            cause: Cause::Transport,
            text: "connection refused".into(),
        });
        app.excluded = vec![
            excluded(
                "web-1",
                "10.0.0.1:8080",
                Reason::Maintenance,
                "_service_maintenance:web-1",
                now,
            ),
            excluded("web-2", "10.0.0.2:8080", Reason::Tag, "app", now),
        ];
        app.changes = vec![change(now - 1_384_478, 1201), change(now - 9_384_478, 1188)];
        let mut peers = vec![
            peer(17, "10.0.0.3:8080", "web-3", now),
            peer(18, "10.0.0.4:8080", "web-4", now),
            peer(19, "10.0.0.5:8080", "web-5", now),
            fixed("127.0.0.1:8081"),
        ];
        let instance = peers[0].instance.as_mut().unwrap();
        instance.status = Some(Status::Critical);
        instance.kept_by = Some(KeptBy::Guard);
        instance.ignored_meta = vec!["nginx_weight".into()];
        peers[2].state = PeerState::Unavail;
        sample.push(app, peers);

        let api = upstream("api", Protocol::Http, now);
        let peers =
            (0..12).map(|n| peer(40 + n, &format!("10.0.1.{n}:9000"), &format!("api-{n}"), now));
        sample.push(api, peers.collect());

        let mut mail = upstream("app", Protocol::Stream, now);
        mail.zombies = None;
        let peers =
            (0..2).map(|n| peer(60 + n, &format!("[fd00::{n}]:25"), &format!("smtp-{n}"), now));
        sample.push(mail, peers.collect());
        sample
    }

    /// Adds an upstream; its peers are counted.
    pub fn push(&mut self, mut upstream: Upstream, peers: Vec<Peer<'static>>) {
        let count = |state| peers.iter().filter(|peer| peer.state == state).count() as u64;
        upstream.servers = Servers {
            up: count(PeerState::Up),
            unavail: count(PeerState::Unavail),
            down: count(PeerState::Down) + count(PeerState::Draining),
        };
        self.document.upstreams.push(upstream);
        self.peers.push(peers);
    }

    /// An upstream whose texts all are the same, and as long as whoever wrote them liked.
    pub fn push_hostile(&mut self, text: &[u8], now: u64) {
        let at = Some(Time::from_millis(now));
        let mut bad = upstream("hostile", Protocol::Http, now);
        bad.sync = Sync::Denied;
        let source = &mut bad.sources[0];
        source.service = text.to_vec().into();
        source.tags = vec![text.to_vec().into(), text.to_vec().into()];
        source.datacenter = Some(text.to_vec().into());
        source.filter = Some(text.to_vec().into());
        source.last_error = Some(LastError {
            time: Time::from_millis(now),
            cause: Cause::Denied,
            text: text.to_vec().into(),
        });
        for reason in Reason::ALL {
            bad.sources[0].excluded.set(*reason, 1);
            bad.excluded.push(Excluded {
                source: 1,
                service_id: text.to_vec().into(),
                node: text.to_vec().into(),
                address: text.to_vec().into(),
                reason: *reason,
                status: Status::Critical,
                detail: Some(text.to_vec().into()),
                since: at,
            });
        }
        bad.changes = vec![Change {
            time: Time::from_millis(now),
            index: 1,
            added: 1,
            removed: 0,
            changed: 0,
            first: vec![(Sign::Added, text.to_vec().into())],
        }];
        let mut one = peer(99, "", "", now);
        one.server = text.to_vec().into();
        one.name = text.to_vec().into();
        let instance = one.instance.as_mut().unwrap();
        instance.service_id = text.to_vec().into();
        instance.node = text.to_vec().into();
        instance.datacenter = Some(text.to_vec().into());
        instance.ignored_meta = vec![text.to_vec().into()];
        self.push(bad, vec![one]);
    }

    /// The answer to a request.
    pub fn answer(self, path: &str, args: &str) -> Result<Answer<Table>, Error> {
        self.answer_at(path, args, Some(b"/consul"))
    }

    fn answer_at(
        self,
        path: &str,
        args: &str,
        prefix: Option<&[u8]>,
    ) -> Result<Answer<Table>, Error> {
        let (path, args) = (path.as_bytes(), args.as_bytes());
        let parts = request::Parts { method: b"GET", path, args, accept: b"" };
        let rows = Table { peers: self.peers, ..Table::default() };
        Answer::new(self.document, rows, Request::parse(&parts)?, prefix)
    }

    /// The whole of it.
    pub fn text(self, path: &str, args: &str) -> String {
        self.whole(path, args, Some(b"/consul"))
    }

    /// The whole of it, in a location with this prefix.
    pub fn whole(self, path: &str, args: &str, prefix: Option<&[u8]>) -> String {
        let mut answer = self.answer_at(path, args, prefix).unwrap();
        let (mut all, mut buffer) = (Vec::new(), Vec::new());
        loop {
            let more = answer.fill(&mut buffer);
            all.append(&mut buffer);
            if !more {
                return String::from_utf8(all).expect("an answer is UTF-8");
            }
        }
    }
}

/// An upstream in sync, with one source and nothing else.
pub fn upstream(name: &str, protocol: Protocol, now: u64) -> Upstream {
    let ago = |seconds: u64| Some(Time::from_millis(now - 1000 * seconds));
    Upstream {
        protocol,
        name: name.to_owned().into(),
        zone: name.to_owned().into(),
        sync: Sync::InSync,
        since: ago(17_307),
        last_change: Some(Time::from_millis(now - 1_384_478)),
        held: 0,
        held_until: None,
        panic: false,
        zombies: Some(0),
        updates: Updates { applied: 7, held: 0, refused: 0 },
        retried_gets: 0,
        memory: Zone { size: 1_048_576, used: 40_960, fits_more: Some(950) },
        servers: Servers::default(),
        sources: vec![Source {
            id: 1,
            service: "web".into(),
            tags: Vec::new(),
            datacenter: None,
            health: Health::Passing,
            filter: None,
            backup: false,
            address: Some("http://127.0.0.1:8500".into()),
            last_success: ago(3),
            stale: false,
            index: Some(1234),
            answers: 512,
            next_try: None,
            errors: Errors::default(),
            registered: Some(12),
            serving: 12,
            excluded: Counts::default(),
            last_error: None,
        }],
        excluded: Vec::new(),
        excluded_omitted: 0,
        changes: Vec::new(),
    }
}

/// A peer that works.
pub fn peer(id: u64, server: &str, service_id: &str, now: u64) -> Peer<'static> {
    Peer {
        id: Some(id),
        server: server.to_owned().into(),
        name: "web".into(),
        backup: false,
        weight: 1,
        effective_weight: 1,
        state: PeerState::Up,
        active: 2,
        max_conns: 0,
        counters: Some(Counters {
            requests: 8812,
            responses: [0, 8790, 12, 9, 0],
            sent: 912_220,
            received: 48_213_321,
            fails: 1,
            unavail: 0,
            downtime: 0,
            downstart: None,
            selected: Some(Time::from_millis(now - 12)),
            header_time: Some(7_900),
            response_time: Some(11_400),
            header_time_total: 70_496_123,
            response_time_total: 96_932_000,
        }),
        instance: Some(Instance {
            source: Some(1),
            service_id: service_id.to_owned().into(),
            node: "n2".into(),
            datacenter: Some("dc1".into()),
            status: Some(Status::Passing),
            kept_by: None,
            since: Some(Time::from_millis(now - 1_384_478)),
            ignored_meta: Vec::new(),
        }),
    }
}

/// A static server.
pub fn fixed(server: &str) -> Peer<'static> {
    Peer {
        id: None,
        server: server.to_owned().into(),
        name: server.to_owned().into(),
        backup: true,
        counters: None,
        instance: None,
        ..peer(0, "", "", NOW)
    }
}

pub fn excluded(id: &str, address: &str, reason: Reason, detail: &str, now: u64) -> Excluded {
    Excluded {
        source: 1,
        service_id: id.to_owned().into(),
        node: "n1".into(),
        address: address.to_owned().into(),
        reason,
        status: if reason == Reason::Maintenance { Status::Maintenance } else { Status::Passing },
        detail: Some(detail.to_owned().into()),
        since: Some(Time::from_millis(now - 1_384_478)),
    }
}

fn change(time: u64, index: u64) -> Change {
    Change {
        time: Time::from_millis(time),
        index,
        added: 1,
        removed: 1,
        changed: 0,
        first: vec![(Sign::Added, "10.0.0.3:8080".into()), (Sign::Removed, "10.0.0.1:8080".into())],
    }
}
