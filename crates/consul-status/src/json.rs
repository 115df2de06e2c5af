//! The document as JSON.

use crate::answer::View;
use crate::escape::Json;
use crate::model::{
    Agent, Change, Counters, Document, Excluded, Instance, Peer, Protocol, Rows, Source, Upstream,
    VERSION, Word,
};
use crate::out::Out;
use crate::text::Text;
use crate::time::Time;
use crate::walk::{List, Step, Walk};

/// Where the document is written up to.
pub(crate) struct Tree {
    walk: Walk,
    /// Of the upstream that is being written.
    peers: usize,
    /// Whose object is open.
    begun: Option<Protocol>,
}

impl Tree {
    pub(crate) fn new(view: &View) -> Self {
        let protocol = |at: &usize| view.document.upstreams[*at].protocol;
        let mut order: Vec<usize> = view.asked().collect();
        // It is stable: each protocol's stay in the configuration's order.
        order.sort_by_key(|at| protocol(at) == Protocol::Stream);
        Self { walk: Walk::new(order), peers: 0, begun: None }
    }

    /// Writes one step; says whether there are more.
    pub(crate) fn step(
        &mut self,
        view: &View,
        rows: &mut impl Rows,
        out: &mut Out<'_, Json>,
    ) -> bool {
        let Some(step) = self.walk.step() else { return false };
        let upstreams = &view.document.upstreams;
        match step {
            Step::Start => head(&view.document, out),
            Step::Enter(at) => {
                self.peers = rows.take(at);
                self.enter(upstreams[at].protocol, out);
                upstream(&upstreams[at], out);
            }
            Step::Open(_, list) => {
                out.raw(match list {
                    List::Sources => ",\n\"sources\":[",
                    List::Peers => ",\n\"peers\":[",
                    List::Excluded => ",\n\"excluded\":[",
                    List::Changes => ",\n\"changes\":[",
                });
            }
            Step::Item(at, list, nth) => {
                out.raw(if nth > 0 { ",\n" } else { "\n" });
                match list {
                    List::Sources => source(&upstreams[at].sources[nth], out),
                    List::Peers => peer(&rows.row(nth), out),
                    List::Excluded => excluded(&upstreams[at].excluded[nth], out),
                    List::Changes => change(&upstreams[at].changes[nth], out),
                }
            }
            Step::Close(at, list) => {
                out.raw("]");
                if list == List::Excluded {
                    out.field("excluded_omitted").number(upstreams[at].excluded_omitted);
                }
            }
            Step::Leave(_) => {
                out.raw("}");
            }
            Step::Finish => {
                match self.begun {
                    None => out.raw(",\n\"upstreams\":{},\n\"stream_upstreams\":{}}\n"),
                    Some(Protocol::Http) => out.raw("},\n\"stream_upstreams\":{}}\n"),
                    Some(Protocol::Stream) => out.raw("}}\n"),
                };
            }
        }
        let peers = self.peers;
        self.walk.advance(|at, list| match list {
            List::Sources => upstreams[at].sources.len(),
            List::Peers => peers,
            List::Excluded => upstreams[at].excluded.len(),
            List::Changes => upstreams[at].changes.len(),
        });
        self.walk.step().is_some()
    }

    /// The comma before an upstream, or the begin of its protocol's object.
    fn enter(&mut self, protocol: Protocol, out: &mut Out<'_, Json>) {
        out.raw(match (self.begun, protocol) {
            (Some(begun), _) if begun == protocol => ",\n",
            (None, Protocol::Http) => ",\n\"upstreams\":{\n",
            (None, Protocol::Stream) => ",\n\"upstreams\":{},\n\"stream_upstreams\":{\n",
            (Some(_), _) => "},\n\"stream_upstreams\":{\n",
        });
        self.begun = Some(protocol);
    }
}

impl Out<'_, Json> {
    /// The name of a field, with a comma before all but the first of an object.
    ///
    /// It looks at the byte before it, so a step never ends with the begin of an object.
    fn field(&mut self, name: &'static str) -> &mut Self {
        if self.last() != Some(b'{') {
            self.raw(",");
        }
        self.raw("\"").raw(name).raw("\":")
    }

    fn string<const MAX: usize>(&mut self, text: &Text<'_, MAX>) -> &mut Self {
        self.raw("\"").text(text).raw("\"")
    }

    fn word(&mut self, word: &'static str) -> &mut Self {
        self.raw("\"").raw(word).raw("\"")
    }

    fn bool(&mut self, value: bool) -> &mut Self {
        self.raw(if value { "true" } else { "false" })
    }

    fn moment(&mut self, time: Time) -> &mut Self {
        self.raw("\"").time(time).raw("\"")
    }

    /// What is not known is `null`.
    fn or_null<T>(
        &mut self,
        value: Option<T>,
        write: impl FnOnce(&mut Self, T) -> &mut Self,
    ) -> &mut Self {
        match value {
            Some(value) => write(self, value),
            None => self.raw("null"),
        }
    }

    fn time_or_null(&mut self, time: Option<Time>) -> &mut Self {
        self.or_null(time, |out, time| out.moment(time))
    }

    fn number_or_null(&mut self, number: Option<impl Into<u64>>) -> &mut Self {
        self.or_null(number, |out, number| out.number(number))
    }

    fn string_or_null<const MAX: usize>(&mut self, text: Option<&Text<'_, MAX>>) -> &mut Self {
        self.or_null(text, |out, text| out.string(text))
    }

    /// A list within one line, with commas between its entries.
    fn list<T>(
        &mut self,
        all: &[T],
        write: impl for<'o> Fn(&'o mut Self, &T) -> &'o mut Self,
    ) -> &mut Self {
        self.raw("[");
        for (nth, one) in all.iter().enumerate() {
            self.raw(if nth > 0 { "," } else { "" });
            write(self, one);
        }
        self.raw("]")
    }
}

fn head(document: &Document, out: &mut Out<'_, Json>) {
    let Document { now, in_sync, since, nginx, thread, agents, memory, upstreams: _ } = document;
    out.raw("{").field("version").number(VERSION);
    out.field("now").moment(*now);
    out.field("in_sync").bool(*in_sync);
    out.field("since").time_or_null(*since);

    out.field("nginx").raw("{").field("version").string(&nginx.version);
    out.field("module").string(&nginx.module);
    out.field("load_timestamp").time_or_null(nginx.load_timestamp);
    out.field("pid").number(nginx.pid).raw("}");

    out.field("thread").raw("{").field("state").word(thread.state.word());
    out.field("pid").number_or_null(thread.pid);
    out.field("started").time_or_null(thread.started);
    out.field("heartbeat").time_or_null(thread.heartbeat);
    out.field("restarts").number(thread.restarts).raw("}");

    out.field("agents").list(agents, agent);
    out.field("memory").raw("{").field("answers").number_or_null(memory.answers);
    out.field("zone_size").number(memory.zone_size).raw("}");
}

fn agent<'a, 'b>(out: &'a mut Out<'b, Json>, agent: &Agent) -> &'a mut Out<'b, Json> {
    out.raw("{").field("address").string(&agent.address);
    out.field("up").bool(agent.up);
    out.field("version").string_or_null(agent.version.as_ref());
    out.field("connections").number(agent.connections);
    out.field("max_connections").number(agent.max_connections).raw("}")
}

fn upstream(upstream: &Upstream, out: &mut Out<'_, Json>) {
    out.string(&upstream.name).raw(":{").field("zone").string(&upstream.zone);
    out.field("sync").word(upstream.sync.word());
    out.field("in_sync").bool(upstream.sync.is_in_sync());
    out.field("since").time_or_null(upstream.since);
    out.field("last_change").time_or_null(upstream.last_change);
    out.field("held").number(upstream.held);
    out.field("held_until").time_or_null(upstream.held_until);
    out.field("panic").bool(upstream.panic);
    out.field("zombies").number_or_null(upstream.zombies);

    let updates = &upstream.updates;
    out.field("updates").raw("{").field("applied").number(updates.applied);
    out.field("held").number(updates.held);
    out.field("refused").number(updates.refused).raw("}");
    out.field("retried_gets").number(upstream.retried_gets);

    let memory = &upstream.memory;
    out.field("memory").raw("{").field("size").number(memory.size);
    out.field("used").number(memory.used);
    out.field("fits_more").number_or_null(memory.fits_more).raw("}");
}

fn source(source: &Source, out: &mut Out<'_, Json>) {
    out.raw("{").field("id").number(source.id);
    out.field("service").string(&source.service);
    let (tags, more) = source.first_tags();
    let cut = more.then(|| "…".into());
    let tags: Vec<&Word<'_>> = tags.iter().chain(&cut).collect();
    out.field("tags").list(&tags, |out, tag| out.string(tag));
    out.field("dc").string_or_null(source.datacenter.as_ref());
    out.field("health").word(source.health.word());
    out.field("filter").string_or_null(source.filter.as_ref());
    out.field("backup").bool(source.backup);
    out.field("address").string_or_null(source.address.as_ref());
    out.field("last_success").time_or_null(source.last_success);
    out.field("index").number_or_null(source.index);
    out.field("answers").number(source.answers);
    out.field("next_try").time_or_null(source.next_try);

    let errors = &source.errors;
    out.field("errors").raw("{").field("transport").number(errors.transport);
    out.field("status").number(errors.status);
    out.field("denied").number(errors.denied);
    out.field("invalid").number(errors.invalid).raw("}");

    out.field("registered").number_or_null(source.registered);
    out.field("serving").number(source.serving);
    out.field("excluded").raw("{");
    for (reason, count) in source.excluded.iter().filter(|(_, count)| *count > 0) {
        out.field(reason.word()).number(count);
    }
    out.raw("}");
    out.field("last_error").or_null(source.last_error.as_ref(), |out, error| {
        out.raw("{").field("time").moment(error.time);
        out.field("cause").word(error.cause.word());
        out.field("text").string(&error.text).raw("}")
    });
    out.raw("}");
}

fn peer(peer: &Peer<'_>, out: &mut Out<'_, Json>) {
    out.raw("{").field("id").number_or_null(peer.id);
    out.field("server").string(&peer.server);
    out.field("name").string(&peer.name);
    out.field("backup").bool(peer.backup);
    out.field("weight").number(peer.weight);
    out.field("effective_weight").number(peer.effective_weight);
    out.field("state").word(peer.state.word());
    out.field("active").number(peer.active);
    out.field("max_conns").number(peer.max_conns);
    counters(peer.counters.as_ref(), out);
    instance(peer.instance.as_ref(), out);
    out.raw("}");
}

fn counters(counters: Option<&Counters>, out: &mut Out<'_, Json>) {
    let number = |of: fn(&Counters) -> u64| counters.map(of);
    let time = |of: fn(&Counters) -> Option<Time>| counters.and_then(of);
    // Kept in microseconds, shown in whole milliseconds, rounded.
    let millis = |of: fn(&Counters) -> Option<u64>| {
        counters.and_then(of).map(|micros| micros.saturating_add(500) / 1000)
    };
    out.field("requests").number_or_null(number(|all| all.requests));
    out.field("responses").or_null(counters, |out, all| {
        let [informed, good, moved, refused, failed] = all.responses;
        let total = all.responses.iter().fold(0_u64, |sum, count| sum.saturating_add(*count));
        out.raw("{").field("1xx").number(informed);
        out.field("2xx").number(good);
        out.field("3xx").number(moved);
        out.field("4xx").number(refused);
        out.field("5xx").number(failed);
        out.field("total").number(total).raw("}")
    });
    out.field("sent").number_or_null(number(|all| all.sent));
    out.field("received").number_or_null(number(|all| all.received));
    out.field("fails").number_or_null(number(|all| all.fails));
    out.field("unavail").number_or_null(number(|all| all.unavail));
    out.field("downtime").number_or_null(number(|all| all.downtime));
    out.field("downstart").time_or_null(time(|all| all.downstart));
    out.field("selected").time_or_null(time(|all| all.selected));
    out.field("header_time").number_or_null(millis(|all| all.header_time));
    out.field("response_time").number_or_null(millis(|all| all.response_time));
}

fn instance(instance: Option<&Instance<'_>>, out: &mut Out<'_, Json>) {
    out.field("source").number_or_null(instance.and_then(|it| it.source));
    out.field("service_id").string_or_null(instance.map(|it| &it.service_id));
    out.field("node").string_or_null(instance.map(|it| &it.node));
    out.field("datacenter").string_or_null(instance.and_then(|it| it.datacenter.as_ref()));
    let status = instance.and_then(|it| it.status);
    out.field("status").or_null(status, |out, status| out.word(status.word()));
    let kept_by = instance.and_then(|it| it.kept_by);
    out.field("kept_by").or_null(kept_by, |out, kept_by| out.word(kept_by.word()));
    out.field("since").time_or_null(instance.and_then(|it| it.since));
    out.field("ignored_meta")
        .or_null(instance, |out, it| out.list(&it.ignored_meta, |out, key| out.string(key)));
}

fn excluded(excluded: &Excluded, out: &mut Out<'_, Json>) {
    out.raw("{").field("source").number(excluded.source);
    out.field("service_id").string(&excluded.service_id);
    out.field("node").string(&excluded.node);
    out.field("address").string(&excluded.address);
    out.field("reason").word(excluded.reason.word());
    out.field("status").word(excluded.status.word());
    out.field("detail").string_or_null(excluded.detail.as_ref());
    out.field("since").time_or_null(excluded.since).raw("}");
}

fn change(change: &Change, out: &mut Out<'_, Json>) {
    out.raw("{").field("time").moment(change.time);
    out.field("index").number(change.index);
    out.field("added").number(change.added);
    out.field("removed").number(change.removed);
    out.field("changed").number(change.changed);
    out.field("first").list(&change.first, |out, (sign, address)| {
        out.raw("\"").raw(sign.word()).text(address).raw("\"")
    });
    out.raw("}");
}
