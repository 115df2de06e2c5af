//! The metrics: their names, types and labels are a contract.

use super::{Server, Sink};
use crate::model::{Agent, Cause, Counters, Document, PeerState, Source, Upstream};

/// What all names begin with. `consul_` alone is what Consul's own exporter uses.
pub(super) const PREFIX: &str = "nginx_consul_";

/// A metric.
pub(super) struct Family {
    /// Without the prefix.
    pub(super) name: &'static str,
    pub(super) kind: Kind,
    pub(super) help: &'static str,
    pub(super) samples: Samples,
}

#[derive(Clone, Copy)]
pub(super) enum Kind {
    Counter,
    Gauge,
}

impl Kind {
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
        }
    }
}

/// Which of the document's parts have samples of it, and how each writes them.
#[derive(Clone, Copy)]
pub(super) enum Samples {
    Document(fn(&Document, &mut Sink<'_, '_>)),
    Agent(fn(&Agent, &mut Sink<'_, '_>)),
    Upstream(fn(&Upstream, &mut Sink<'_, '_>)),
    /// For each upstream, how many of its servers are not listed.
    Omitted,
    Source(fn(&Source, &mut Sink<'_, '_>)),
    Server(fn(&Server, &mut Sink<'_, '_>)),
    /// For each server of which something is counted.
    Counted(fn(&Counters, &mut Sink<'_, '_>)),
}

use Kind::{Counter, Gauge};

const fn family(name: &'static str, kind: Kind, help: &'static str, samples: Samples) -> Family {
    Family { name, kind, help, samples }
}

pub(super) const FAMILIES: &[Family] = &[
    family(
        "build_info",
        Gauge,
        "1, with the versions of the module and of nginx.",
        Samples::Document(|document, sink| {
            let line = sink.line().text("version", &document.nginx.module);
            line.text("nginx", &document.nginx.version).number(1_u8);
        }),
    ),
    family(
        "thread_up",
        Gauge,
        "Whether the thread that follows Consul gave a sign of life within 15 s.",
        Samples::Document(|document, sink| sink.line().bool(document.thread.is_up(document.now))),
    ),
    family(
        "thread_restarts_total",
        Counter,
        "How often the thread was started again after a panic.",
        Samples::Document(|document, sink| sink.line().number(document.thread.restarts)),
    ),
    family(
        "memory_bytes",
        Gauge,
        "Bytes of the answers that are kept.",
        Samples::Document(|document, sink| {
            if let Some(answers) = document.memory.answers {
                sink.line().number(answers);
            }
        }),
    ),
    family(
        "agent_up",
        Gauge,
        "Whether the last exchange with the Consul agent worked.",
        Samples::Agent(|agent, sink| sink.line().bool(agent.up)),
    ),
    family(
        "agent_connections",
        Gauge,
        "Open connections to the Consul agent.",
        Samples::Agent(|agent, sink| sink.line().number(agent.connections)),
    ),
    family(
        "agent_connections_max",
        Gauge,
        "How many connections to the Consul agent there may be.",
        Samples::Agent(|agent, sink| sink.line().number(agent.max_connections)),
    ),
    family(
        "upstream_in_sync",
        Gauge,
        "Whether what serves is what Consul says.",
        Samples::Upstream(|upstream, sink| sink.line().bool(upstream.sync.is_in_sync())),
    ),
    family(
        "upstream_held_removals",
        Gauge,
        "Removals that are held back.",
        Samples::Upstream(|upstream, sink| sink.line().number(upstream.held)),
    ),
    family(
        "upstream_panic",
        Gauge,
        "Whether all instances serve because too few are healthy.",
        Samples::Upstream(|upstream, sink| sink.line().bool(upstream.panic)),
    ),
    family(
        "upstream_last_change_timestamp_seconds",
        Gauge,
        "When an update last changed what serves; 0 is never.",
        Samples::Upstream(|upstream, sink| {
            sink.line().millis(upstream.last_change.map_or(0, |time| time.millis()));
        }),
    ),
    family(
        "upstream_servers",
        Gauge,
        "Servers by state; draining ones count as down.",
        Samples::Upstream(|upstream, sink| {
            let servers = &upstream.servers;
            sink.line().word("state", "up").number(servers.up);
            sink.line().word("state", "unavail").number(servers.unavail);
            sink.line().word("state", "down").number(servers.down);
        }),
    ),
    family(
        "upstream_updates_total",
        Counter,
        "Sets of instances that came, by what became of them.",
        Samples::Upstream(|upstream, sink| {
            let updates = &upstream.updates;
            sink.line().word("result", "applied").number(updates.applied);
            sink.line().word("result", "held").number(updates.held);
            sink.line().word("result", "refused").number(updates.refused);
        }),
    ),
    family(
        "upstream_zone_size_bytes",
        Gauge,
        "Size of the zone that the servers live in.",
        Samples::Upstream(|upstream, sink| sink.line().number(upstream.memory.size)),
    ),
    family(
        "upstream_zone_used_bytes",
        Gauge,
        "Bytes of the zone that are in use.",
        Samples::Upstream(|upstream, sink| sink.line().number(upstream.memory.used)),
    ),
    family(
        "upstream_zombies",
        Gauge,
        "Servers that left and still have requests under way.",
        Samples::Upstream(|upstream, sink| {
            if let Some(zombies) = upstream.zombies {
                sink.line().number(zombies);
            }
        }),
    ),
    family(
        "upstream_servers_omitted",
        Gauge,
        "Servers that are not listed in this scrape.",
        Samples::Omitted,
    ),
    family(
        "upstream_retried_gets_total",
        Counter,
        "Attempts of requests that were repaired after a change.",
        Samples::Upstream(|upstream, sink| sink.line().number(upstream.retried_gets)),
    ),
    family(
        "source_info",
        Gauge,
        "1, with what the source asks for; its number is that of its line.",
        Samples::Source(|source, sink| {
            let line = sink.line().text("service", &source.service);
            let line = line.text("tags", &source.tag_list());
            let dc = source.datacenter.as_ref();
            match dc {
                Some(dc) => line.text("dc", dc),
                None => line.word("dc", ""),
            }
            .number(1_u8);
        }),
    ),
    family(
        "source_last_success_timestamp_seconds",
        Gauge,
        "When the last answer came that was verified; 0 is never.",
        Samples::Source(|source, sink| {
            sink.line().millis(source.last_success.map_or(0, |time| time.millis()));
        }),
    ),
    family(
        "source_stale",
        Gauge,
        "Whether there was no good answer for too long, or the last one was not applied.",
        Samples::Source(|source, sink| sink.line().bool(source.stale)),
    ),
    family(
        "source_answers_total",
        Counter,
        "Answers that were verified.",
        Samples::Source(|source, sink| sink.line().number(source.answers)),
    ),
    family(
        "source_index",
        Gauge,
        "The highest index of Consul that was applied.",
        Samples::Source(|source, sink| sink.line().number(source.index.unwrap_or(0))),
    ),
    family(
        "source_registered",
        Gauge,
        "Instances in the last answer.",
        Samples::Source(|source, sink| sink.line().number(source.registered.unwrap_or(0))),
    ),
    family(
        "source_errors_total",
        Counter,
        "Errors by cause.",
        Samples::Source(|source, sink| {
            for &cause in Cause::ALL {
                sink.line().word("cause", cause.word()).number(source.errors.of(cause));
            }
        }),
    ),
    family(
        "source_excluded",
        Gauge,
        "Instances that do not serve, by reason.",
        Samples::Source(|source, sink| {
            for (reason, count) in source.excluded.iter() {
                sink.line().word("reason", reason.word()).number(count);
            }
        }),
    ),
    family(
        "upstream_server_info",
        Gauge,
        "1, with the instance that the server is.",
        Samples::Server(|server, sink| {
            let line = sink.line().text("service_id", &server.service_id);
            let line = line.text("node", &server.node).text("datacenter", &server.datacenter);
            line.word("backup", if server.backup { "true" } else { "false" }).number(1_u8);
        }),
    ),
    family(
        "upstream_server_state",
        Gauge,
        "1 up, 2 draining, 3 down, 4 unavail.",
        Samples::Server(|server, sink| {
            sink.line().number(match server.state {
                PeerState::Up => 1_u8,
                PeerState::Draining => 2,
                PeerState::Down => 3,
                PeerState::Unavail => 4,
            });
        }),
    ),
    family(
        "upstream_server_active",
        Gauge,
        "Requests that are under way.",
        Samples::Server(|server, sink| sink.line().number(server.active)),
    ),
    family(
        "upstream_server_limit",
        Gauge,
        "How many requests there may be under way; 0 is any number.",
        Samples::Server(|server, sink| sink.line().number(server.limit)),
    ),
    family(
        "upstream_server_weight",
        Gauge,
        "The weight.",
        Samples::Server(|server, sink| sink.line().number(server.weight)),
    ),
    family(
        "upstream_server_requests_total",
        Counter,
        "Requests that were sent to the server.",
        Samples::Counted(|counters, sink| sink.line().number(counters.requests)),
    ),
    family(
        "upstream_server_responses_total",
        Counter,
        "Responses by the class of their status.",
        Samples::Counted(|counters, sink| {
            let codes = ["1xx", "2xx", "3xx", "4xx", "5xx"];
            for (code, count) in codes.into_iter().zip(counters.responses) {
                sink.line().word("code", code).number(count);
            }
        }),
    ),
    family(
        "upstream_server_sent_bytes_total",
        Counter,
        "Bytes sent to the server.",
        Samples::Counted(|counters, sink| sink.line().number(counters.sent)),
    ),
    family(
        "upstream_server_received_bytes_total",
        Counter,
        "Bytes received from the server.",
        Samples::Counted(|counters, sink| sink.line().number(counters.received)),
    ),
    family(
        "upstream_server_fails_total",
        Counter,
        "Attempts that failed.",
        Samples::Counted(|counters, sink| sink.line().number(counters.fails)),
    ),
    family(
        "upstream_server_unavail_total",
        Counter,
        "How often the server became unavailable.",
        Samples::Counted(|counters, sink| sink.line().number(counters.unavail)),
    ),
    family(
        "upstream_server_header_seconds_total",
        Counter,
        "Time to the headers of all responses.",
        Samples::Counted(|counters, sink| sink.line().micros(counters.header_time_total)),
    ),
    family(
        "upstream_server_response_seconds_total",
        Counter,
        "Time to the ends of all responses.",
        Samples::Counted(|counters, sink| sink.line().micros(counters.response_time_total)),
    ),
];
