//! The document, of what stands in the zone of the workers and in the configuration.

use consul_status::model::{
    Agent, Cause, Change, Counts, Errors, Excluded, Health, LastError, Memory, Nginx, Protocol,
    Reason, Sign, Source, Status, Sync, Thread, ThreadState, Updates, Upstream, Zone,
};
use consul_status::{Document, Request, Time};
use consul_upstream::conf::{self, MainConf};
use consul_upstream::process::clock::{Clocks, Moment, limit};
use consul_upstream::process::record::{Heard, ROWS, Record, Row, ThreadRecord, at};
use consul_upstream::process::{Shared, own_pid, source_of};
use consul_watch::agent::Address;
use consul_watch::query::Parameter;
use nginx_peers::Usage;
use nginx_peers::view::View;
use nginx_sys::ngx_http_upstream_rr_peers_t;

use super::rows;
use crate::http::ConsulUpstream;

/// Without a heartbeat for so long the thread is silent, in milliseconds.
const SILENT: u64 = consul_status::model::SILENT.as_millis() as u64;

/// What is known of an upstream; nothing where that cannot be read.
pub fn record_of(main: &MainConf<ConsulUpstream>, upstream: usize) -> Record {
    // SAFETY: the configuration is that of a live request, and has this upstream.
    let shared = unsafe { Shared::of(main) };
    let record = shared.place(upstream).read();
    record.and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default()
}

/// The document that a request asks for: peers are counted of the upstreams that are in it.
pub fn of(main: Option<&MainConf<ConsulUpstream>>, request: &Request) -> Document {
    let clocks = Clocks::read();
    let main = main.filter(|main| !main.upstreams.is_empty());
    // SAFETY: the configuration is that of a live request, and has upstreams.
    let shared = main.map(|main| unsafe { Shared::of(main) });
    let (thread, agents) = thread(main, shared, &clocks);
    let upstreams: Vec<Upstream> = main
        .into_iter()
        .flat_map(|main| main.upstreams.iter().enumerate().map(move |one| (main, one)))
        .map(|(main, (number, conf))| {
            let asked = request.asks_for(conf.name.as_bytes());
            let repaired = shared.map_or(0, |shared| shared.cost(number).repaired());
            upstream(conf, &record_of(main, number), repaired, asked, &clocks)
        })
        .collect();
    let up = main.is_none() || thread.is_up(clocks.wall);
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
            load_timestamp: shared.map(|shared| clocks.time(shared.loaded())),
            pid: own_pid().unsigned_abs(),
        },
        thread,
        agents,
        memory: Memory {
            answers: None,
            // SAFETY: the zone of a configuration in use is there.
            zone_size: main.map_or(0, |main| unsafe { (*main.shared.0).shm.size } as u64),
        },
        upstreams,
    }
}

/// The thread, and the agents that it asks.
fn thread(
    main: Option<&MainConf<ConsulUpstream>>,
    shared: Option<&Shared>,
    clocks: &Clocks,
) -> (Thread, Vec<Agent>) {
    let heartbeat = shared.and_then(Shared::heartbeat);
    let record = shared
        .and_then(|shared| shared.thread_place().read())
        .and_then(|bytes| serde_json::from_slice::<ThreadRecord>(&bytes).ok());
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
    let max_connections = main.map_or(0, MainConf::max_connections);
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
    conf: &conf::Upstream<ConsulUpstream>,
    record: &Record,
    repaired: u64,
    asked: bool,
    clocks: &Clocks,
) -> Upstream {
    let limit = limit(conf.agents.wait);
    let time = |moment: Moment| clocks.time(moment);
    let sync = record.sync(limit, clocks.now);
    let report = &record.report;
    let view = if asked { rows::view(conf) } else { View::default() };
    // SAFETY: the upstream belongs to the configuration of a live request; its list is in the zone.
    let usage = unsafe {
        let primaries: *mut ngx_http_upstream_rr_peers_t = (*conf.nginx).peer.data.cast();
        Usage::of(primaries)
    };
    let all_rows = record.missing_rows.iter().chain(&report.excluded);
    let rows: Vec<Excluded> = all_rows.take(ROWS).filter_map(|row| excluded(row, clocks)).collect();
    let missing: u64 = record.missing.iter().map(|(_, count)| count).sum();
    let known = report.excluded.len() as u64 + report.omitted + missing;
    Upstream {
        protocol: Protocol::Http,
        name: conf.name.clone().into(),
        zone: conf.zone.clone().into(),
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
            .zip(&conf.sources)
            .map(|(id, source)| source_row(id, conf, source, record, sync, limit, clocks))
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
    conf: &conf::Upstream<ConsulUpstream>,
    source: &conf::Source,
    record: &Record,
    sync: Sync,
    limit: u64,
    clocks: &Clocks,
) -> Source {
    let key = source_of(conf, source);
    let unknown = Heard::default();
    let heard = record.report.sources.iter().find(|heard| heard.key == key).unwrap_or(&unknown);
    let time = |moment: Moment| clocks.time(moment);
    let addresses: Vec<String> = conf.agents.addresses.iter().map(Address::to_string).collect();
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
    let parameter = |parameter| source.query.get(parameter).map(str::to_owned);
    Source {
        id,
        service: source.query.service().to_owned().into(),
        tags: source.selection.tags.iter().map(|tag| tag.clone().into()).collect(),
        datacenter: parameter(Parameter::Datacenter).map(Into::into),
        health: match source.selection.health {
            consul_watch::Health::Passing => Health::Passing,
            consul_watch::Health::Warning => Health::Warning,
            consul_watch::Health::Any => Health::Any,
        },
        filter: parameter(Parameter::Filter).map(Into::into),
        backup: source.backup,
        address: addresses.get(heard.agent.unwrap_or(0)).map(|it| it.clone().into()),
        last_success: heard.last_success.map(time),
        stale: sync == Sync::Refused || heard.is_stale(record.begun, limit, clocks.now),
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
