//! The peers of one upstream at a time.

use std::collections::HashMap;
use std::rc::Rc;
use std::time::{SystemTime, UNIX_EPOCH};

use consul_status::model::{Counters, Instance, KeptBy, PeerState, Servers, Status};
use consul_status::{Peer, Rows};
use consul_upstream::process::clock::{Clocks, Moment};
use consul_upstream::process::record::{Mark, Report, at};
use nginx_peers::view::{Numbers, Seen, View};

use super::document::record_of;
use super::lists::{self, All};

/// nginx's mark of a server that gets no new sessions.
const DRAINING: u64 = 8;

/// Seconds of the epoch, as nginx notes failures.
fn seconds() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}

fn state_of(numbers: &Numbers, now: i64) -> PeerState {
    match numbers.down {
        0 if numbers.is_unavailable(now) => PeerState::Unavail,
        0 => PeerState::Up,
        down if down & DRAINING != 0 => PeerState::Draining,
        _ => PeerState::Down,
    }
}

/// Counts peers by their states.
pub fn servers(view: &View) -> Servers {
    let now = seconds();
    let mut servers = Servers::default();
    for numbers in view.numbers() {
        match state_of(numbers, now) {
            PeerState::Up => servers.up += 1,
            PeerState::Unavail => servers.unavail += 1,
            PeerState::Down | PeerState::Draining => servers.down += 1,
        }
    }
    servers
}

/// The peers of all upstreams, as far as they are taken.
pub struct Peers {
    all: Rc<All>,
    view: View,
    /// When it was taken.
    clocks: Clocks,
    now: i64,
    /// What its sources are, by the number in their peers' labels.
    sources: HashMap<u64, Source>,
    marks: HashMap<(String, String), Mark>,
    /// Peers without a mark may be anything.
    more_marks: bool,
}

/// A `consul_upstream` line.
struct Source {
    number: u32,
    service: String,
    datacenter: Option<String>,
}

impl Peers {
    pub fn new(all: Rc<All>) -> Self {
        Self {
            all,
            view: View::default(),
            clocks: Clocks::read(),
            now: 0,
            sources: HashMap::new(),
            marks: HashMap::new(),
            more_marks: false,
        }
    }

    fn instance<'a>(&'a self, label: &nginx_peers::Label, added: Option<Moment>) -> Instance<'a> {
        let source = self.sources.get(&label.source());
        let mark = self.marks.get(&(label.node().to_owned(), label.id().to_owned()));
        let status = match mark {
            Some(mark) => at(Status::ALL, mark.status),
            None => (!self.more_marks).then_some(Status::Passing),
        };
        Instance {
            source: source.map(|source| source.number),
            service_id: label.id().to_owned().into(),
            node: label.node().to_owned().into(),
            datacenter: source.and_then(|source| source.datacenter.as_deref()).map(Into::into),
            status,
            kept_by: mark.and_then(|mark| at(KeptBy::ALL, mark.kept_by?)),
            since: added.map(|added| self.clocks.time(added)),
            ignored_meta: mark
                .map(|mark| mark.ignored.iter().map(|key| key.as_str().into()).collect())
                .unwrap_or_default(),
        }
    }
}

impl Rows for Peers {
    fn take(&mut self, upstream: usize) -> usize {
        let Some((protocol, followed, number, about)) = self.all.upstreams().nth(upstream) else {
            return 0;
        };
        self.view = lists::view(protocol, about);
        (self.clocks, self.now) = (Clocks::read(), seconds());
        let report = record_of(followed.shared, number).report;
        let Report { sources: heard, marks, more_marks, .. } = report;
        self.sources = (1..)
            .zip(&about.sources)
            .map(|(number, source)| {
                let heard = heard.iter().find(|heard| heard.key == source.key);
                let datacenter = heard.and_then(|heard| heard.datacenter.clone());
                (source.key, Source { number, service: source.service.clone(), datacenter })
            })
            .collect();
        self.more_marks = more_marks;
        self.marks = marks.into_iter().map(|it| ((it.node.clone(), it.id.clone()), it)).collect();
        self.view.len()
    }

    fn row(&self, at: usize) -> Peer<'_> {
        let Some(Seen { name, server, label, numbers }) = self.view.get(at) else {
            // No other is asked for than was taken.
            unreachable!("a row that was not taken");
        };
        let time = |ms: u64| (ms != 0).then(|| self.clocks.time(Moment(ms)));
        let counted = numbers.counted;
        let counters = counted.map(|it| Counters {
            requests: it.requests,
            responses: it.responses,
            sent: it.sent,
            received: it.received,
            fails: it.fails,
            unavail: it.unavail,
            downtime: match it.downstart {
                0 => it.downtime,
                start => it.downtime + self.clocks.now.since(Moment(start)),
            },
            downstart: time(it.downstart),
            selected: time(it.selected),
            header_time: (it.responses != [0; 5]).then_some(it.header_time),
            response_time: (it.responses != [0; 5]).then_some(it.response_time),
            header_time_total: it.header_time_total,
            response_time_total: it.response_time_total,
        });
        let source = label.as_ref().and_then(|label| self.sources.get(&label.source()));
        Peer {
            id: counted.map(|it| it.id),
            server: name.into(),
            // What stands in the list is its address once more: balancers go by that text.
            name: source.map_or_else(|| server.into(), |source| source.service.as_str().into()),
            backup: numbers.backup,
            weight: numbers.weight,
            effective_weight: numbers.effective_weight,
            state: state_of(&numbers, self.now),
            active: numbers.conns,
            max_conns: numbers.max_conns,
            counters,
            instance: label.map(|label| self.instance(&label, counted.map(|it| Moment(it.added)))),
        }
    }

    fn release(&mut self) {
        self.view = View::default();
        self.sources.clear();
        self.marks.clear();
    }
}
