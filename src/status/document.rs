//! The document, of what stands in the zone of the workers and in the configuration.

use consul_status::model::{
    Agent, Cause, Change, Counts, Errors, Excluded, Health, LastError, Memory, Nginx, Protocol,
    Reason, Sign, Source, Status, Sync, Thread, ThreadState, Updates, Upstream, Zone,
};
use consul_status::{Document, Request, Time};
use consul_upstream::process::about::{About, AboutSource, Followed};
use consul_upstream::process::clock::{Clocks, Moment};
use consul_upstream::process::record::{Heard, ROWS, Record, Row, ThreadRecord, at};
use consul_upstream::process::{Shared, own_pid};
use nginx_peers::view::View;

use super::lists::{self, All};
use super::rows;

/// Without a heartbeat for so long the thread is silent, in milliseconds.
const SILENT: u64 = consul_status::model::SILENT.as_millis() as u64;

/// What is known of an upstream; nothing where that cannot be read.
pub fn record_of(shared: &Shared, upstream: usize) -> Record {
    let record = shared.place(upstream).read();
    record.and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default()
}

/// The document that a request asks for: peers are counted of the upstreams that are in it.
pub fn of(all: &All, request: &Request) -> Document {
    let clocks = Clocks::read();
    let (thread, agents) = threads(&all.followed, &clocks);
    let upstreams: Vec<Upstream> = all
        .upstreams()
        .map(|(protocol, followed, number, about)| {
            let asked = request.asks_for(about.name.as_bytes());
            let repaired = followed.shared.cost(number).repaired();
            let record = record_of(followed.shared, number);
            upstream(protocol, about, &record, repaired, asked, &clocks)
        })
        .collect();
    let up = all.followed.is_empty() || thread.is_up(clocks.wall);
    let in_sync = up && upstreams.iter().all(|upstream| upstream.sync.is_in_sync());
    let since = if !up {
        thread.heartbeat.map(|at| Time::from_millis(at.millis().saturating_add(SILENT)))
    } else if in_sync {
        // The last that came in sync.
        upstreams.iter().filter_map(|upstream| upstream.since).max()
    } else {
        let not = upstreams.iter().filter(|upstream| !upstream.sync.is_in_sync());
        not.filter_map(|upstream| upstream.since).min()
    };
    Document {
        now: clocks.wall,
        in_sync,
        since,
        nginx: Nginx {
            version: nginx_sys::NGINX_VERSION.to_str().unwrap_or_default().into(),
            module: env!("CARGO_PKG_VERSION").into(),
            load_timestamp: all.followed.first().map(|(_, it)| clocks.time(it.shared.loaded())),
            pid: own_pid().unsigned_abs(),
        },
        thread,
        agents,
        memory: Memory {
            answers: None,
            zone_size: all.followed.iter().map(|(_, it)| it.zone_size as u64).sum(),
        },
        upstreams,
    }
}

/// The threads as one, and the agents that they ask: there is one for each protocol, and where one of
/// them is not up, that is what there is to tell.
fn threads(all: &[(Protocol, Followed)], clocks: &Clocks) -> (Thread, Vec<Agent>) {
    let (mut threads, mut agents): (Vec<Thread>, Vec<Agent>) = Default::default();
    for (_, followed) in all {
        let (thread, asked) = thread(followed, clocks);
        threads.push(thread);
        for agent in asked {
            match agents.iter_mut().find(|it| it.address == agent.address) {
                Some(same) => {
                    same.up &= agent.up;
                    same.connections += agent.connections;
                    same.max_connections += agent.max_connections;
                }
                None => agents.push(agent),
            }
        }
    }
    let not_up = threads.iter().position(|thread| !thread.is_up(clocks.wall)).unwrap_or(0);
    let none = Thread {
        state: ThreadState::Starting,
        pid: None,
        started: None,
        heartbeat: None,
        restarts: 0,
    };
    (threads.into_iter().nth(not_up).unwrap_or(none), agents)
}

/// A thread, and the agents that it asks.
fn thread(followed: &Followed, clocks: &Clocks) -> (Thread, Vec<Agent>) {
    let shared = followed.shared;
    let heartbeat = shared.heartbeat();
    let record = shared.thread_place().read();
    let record = record.and_then(|bytes| serde_json::from_slice::<ThreadRecord>(&bytes).ok());
    let silent = |at: Moment| clocks.now.since(at) >= SILENT;
    let state = match (&record, heartbeat) {
        (None, _) | (_, None) => ThreadState::Starting,
        (_, Some(at)) if silent(at) => ThreadState::Silent,
        (Some(record), _) if record.backoff => ThreadState::Backoff,
        _ => ThreadState::Running,
    };
    let record = record.as_ref();
    let thread = Thread {
        state,
        pid: record.map(|it| it.pid),
        started: record.map(|it| clocks.time(it.started)),
        heartbeat: heartbeat.map(|at| clocks.time(at)),
        restarts: record.map_or(0, |it| it.restarts),
    };
    let max_connections = followed.max_connections;
    let agents = record.into_iter().flat_map(|it| &it.agents).map(|it| Agent {
        address: it.address.clone().into(),
        up: it.up,
        version: it.version.clone().map(Into::into),
        connections: u32::try_from(it.connections).unwrap_or(u32::MAX),
        max_connections: u32::try_from(max_connections).unwrap_or(u32::MAX),
    });
    (thread, agents.collect())
}

fn upstream(
    protocol: Protocol,
    about: &About,
    record: &Record,
    repaired: u64,
    asked: bool,
    clocks: &Clocks,
) -> Upstream {
    let limit = about.limit;
    let time = |moment: Moment| clocks.time(moment);
    let sync = record.sync(limit, clocks.now);
    let report = &record.report;
    let view = if asked { lists::view(protocol, about) } else { View::default() };
    let usage = lists::usage(protocol, about);
    let all_rows = record.missing_rows.iter().chain(&report.excluded);
    let rows: Vec<Excluded> = all_rows.take(ROWS).filter_map(|row| excluded(row, clocks)).collect();
    let missing: u64 = record.missing.iter().map(|(_, count)| count).sum();
    let known = report.excluded.len() as u64 + report.omitted + missing;
    Upstream {
        protocol,
        name: about.name.clone().into(),
        zone: about.zone.clone().into(),
        sync,
        since: record.since(limit, clocks.now).map(time),
        last_change: record.last_change.map(time),
        held: report.held,
        held_until: report.held_until.map(time),
        panic: report.panic,
        zombies: None,
        updates: Updates {
            applied: record.applied,
            held: report.held_updates,
            refused: record.not_applied,
        },
        retried_gets: repaired,
        memory: Zone {
            size: usage.size as u64,
            used: usage.used as u64,
            fits_more: Some(usage.fits_more as u64),
        },
        servers: rows::servers(&view),
        sources: (1..)
            .zip(&about.sources)
            .map(|(id, source)| source_row(id, about, source, record, sync, clocks))
            .collect(),
        excluded_omitted: known.saturating_sub(rows.len() as u64),
        excluded: rows,
        changes: record
            .changes
            .iter()
            .map(|change| Change {
                time: time(change.time),
                index: change.index,
                added: change.added,
                removed: change.removed,
                changed: change.changed,
                first: change
                    .first
                    .iter()
                    .filter_map(|(sign, text)| Some((at(Sign::ALL, *sign)?, text.clone().into())))
                    .collect(),
            })
            .collect(),
    }
}

fn excluded(row: &Row, clocks: &Clocks) -> Option<Excluded> {
    Some(Excluded {
        source: row.source,
        service_id: row.id.clone().into(),
        node: row.node.clone().into(),
        address: row.address.clone().into(),
        reason: at(Reason::ALL, row.reason)?,
        status: at(Status::ALL, row.status)?,
        detail: row.detail.clone().map(Into::into),
        since: Some(clocks.time(row.since)),
    })
}

fn source_row(
    id: u32,
    about: &About,
    source: &AboutSource,
    record: &Record,
    sync: Sync,
    clocks: &Clocks,
) -> Source {
    let key = source.key;
    let unknown = Heard::default();
    let heard = record.report.sources.iter().find(|heard| heard.key == key).unwrap_or(&unknown);
    let time = |moment: Moment| clocks.time(moment);
    let mut counts = Counts::default();
    for (reason, count) in &heard.excluded {
        if let Some(reason) = at(Reason::ALL, *reason) {
            counts.set(reason, *count);
        }
    }
    let missing = record.missing.iter().find(|(source, _)| *source == key);
    if let Some((_, count)) = missing {
        counts.set(Reason::NotApplied, *count);
    }
    let missing = missing.map_or(0, |(_, count)| *count);
    let [transport, status, denied, invalid] = heard.errors;
    Source {
        id,
        service: source.service.clone().into(),
        tags: source.tags.iter().map(|tag| tag.clone().into()).collect(),
        datacenter: source.datacenter.clone().map(Into::into),
        health: at(Health::ALL, source.health).unwrap_or(Health::Passing),
        filter: source.filter.clone().map(Into::into),
        backup: source.backup,
        address: about.addresses.get(heard.agent.unwrap_or(0)).map(|it| it.clone().into()),
        last_success: heard.last_success.map(time),
        stale: sync == Sync::Refused || heard.is_stale(record.begun, about.limit, clocks.now),
        index: heard.index,
        answers: heard.answers,
        next_try: heard.next_try.filter(|at| *at > clocks.now).map(time),
        errors: Errors { transport, status, denied, invalid },
        registered: heard.registered,
        serving: heard.serving.saturating_sub(missing),
        excluded: counts,
        last_error: heard.last_error.as_ref().and_then(|(at_time, cause, text)| {
            Some(LastError {
                time: time(*at_time),
                cause: at(Cause::ALL, *cause)?,
                text: text.clone().into(),
            })
        }),
    }
}
