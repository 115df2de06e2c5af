//! Prometheus' text format 0.0.4: all samples of a metric together, so the document is gone
//! through once for each.

mod families;
mod servers;

use crate::answer::View;
use crate::escape::Prometheus;
use crate::model::{Agent, Rows, Source, Upstream};
use crate::out::Out;
use crate::text::Text;
use families::{FAMILIES, Family, Samples};
use servers::{Server, Servers};

pub(crate) use servers::BOUND;

/// Where the metrics are written up to.
pub(crate) struct Metrics {
    /// The upstreams, in the configuration's order.
    upstreams: Vec<usize>,
    /// Their sources: which upstream, and which of its.
    sources: Vec<(usize, usize)>,
    /// Taken at the first step.
    servers: Option<Servers>,
    family: usize,
    item: usize,
    /// The family has a sample, so its HELP and TYPE are written.
    begun: bool,
}

impl Metrics {
    pub(crate) fn new(view: &View) -> Self {
        let upstreams: Vec<usize> = view.asked().collect();
        let sources_of = |at: &usize| {
            let at = *at;
            (0..view.document.upstreams[at].sources.len()).map(move |nth| (at, nth))
        };
        let sources = upstreams.iter().flat_map(sources_of).collect();
        Self { upstreams, sources, servers: None, family: 0, item: 0, begun: false }
    }

    /// Writes what one item has to say to one metric; says whether there is more.
    pub(crate) fn step(
        &mut self,
        view: &View,
        rows: &mut impl Rows,
        out: &mut Out<'_, Prometheus>,
    ) -> bool {
        let servers = self.servers.get_or_insert_with(|| {
            Servers::collect(view, &self.upstreams, view.request.peers, rows)
        });
        let Some(family) = FAMILIES.get(self.family) else { return false };
        let document = &view.document;
        let mut sink = Sink { out, family, scope: Scope::Document, begun: &mut self.begun };
        let items = match family.samples {
            Samples::Document(write) => {
                write(document, &mut sink);
                1
            }
            Samples::Agent(write) => {
                if let Some(agent) = document.agents.get(self.item) {
                    sink.scope = Scope::Agent(agent);
                    write(agent, &mut sink);
                }
                document.agents.len()
            }
            Samples::Upstream(write) => {
                if let Some(at) = self.upstreams.get(self.item) {
                    let upstream = &document.upstreams[*at];
                    sink.scope = Scope::Upstream(upstream);
                    write(upstream, &mut sink);
                }
                self.upstreams.len()
            }
            Samples::Omitted => {
                if let Some(at) = self.upstreams.get(self.item) {
                    sink.scope = Scope::Upstream(&document.upstreams[*at]);
                    sink.line().number(servers.omitted[self.item]);
                }
                self.upstreams.len()
            }
            Samples::Source(write) => {
                if let Some((at, nth)) = self.sources.get(self.item) {
                    let upstream = &document.upstreams[*at];
                    let source = &upstream.sources[*nth];
                    sink.scope = Scope::Source(upstream, source);
                    write(source, &mut sink);
                }
                self.sources.len()
            }
            Samples::Server(_) | Samples::Counted(_) => {
                if let Some(server) = servers.all.get(self.item) {
                    sink.scope = Scope::Server(&document.upstreams[server.upstream], server);
                    match (family.samples, &server.counters) {
                        (Samples::Server(write), _) => write(server, &mut sink),
                        (Samples::Counted(write), Some(counters)) => write(counters, &mut sink),
                        _ => {}
                    }
                }
                servers.all.len()
            }
        };
        self.item += 1;
        if self.item >= items {
            (self.family, self.item, self.begun) = (self.family + 1, 0, false);
        }
        self.family < FAMILIES.len()
    }
}

/// Takes the samples of one item for one metric.
pub(crate) struct Sink<'a, 'b> {
    out: &'a mut Out<'b, Prometheus>,
    family: &'static Family,
    scope: Scope<'a>,
    begun: &'a mut bool,
}

/// Whose labels each sample has.
#[derive(Clone, Copy)]
enum Scope<'a> {
    Document,
    Agent(&'a Agent),
    Upstream(&'a Upstream),
    Source(&'a Upstream, &'a Source),
    Server(&'a Upstream, &'a Server),
}

impl<'b> Sink<'_, 'b> {
    /// A sample, up to the labels that all of its scope have.
    fn line(&mut self) -> Line<'_, 'b> {
        let Family { name, kind, help, .. } = self.family;
        if !*self.begun {
            *self.begun = true;
            self.out.raw("# HELP ").raw(families::PREFIX).raw(name).raw(" ").raw(help);
            self.out.raw("\n# TYPE ").raw(families::PREFIX).raw(name).raw(" ");
            self.out.raw(kind.word()).raw("\n");
        }
        self.out.raw(families::PREFIX).raw(name);
        let line = Line { out: &mut *self.out, labels: false };
        match self.scope {
            Scope::Document => line,
            Scope::Agent(agent) => line.text("address", &agent.address),
            Scope::Upstream(upstream) => line.upstream(upstream),
            Scope::Source(upstream, source) => line.upstream(upstream).label("source", |out| {
                out.number(source.id);
            }),
            Scope::Server(upstream, server) => {
                line.upstream(upstream).text("server", &server.server)
            }
        }
    }
}

/// A sample that is being written.
struct Line<'a, 'b> {
    out: &'a mut Out<'b, Prometheus>,
    labels: bool,
}

impl<'b> Line<'_, 'b> {
    fn label(mut self, name: &'static str, write: impl FnOnce(&mut Out<'b, Prometheus>)) -> Self {
        self.out.raw(if self.labels { "," } else { "{" }).raw(name).raw("=\"");
        write(self.out);
        self.out.raw("\"");
        self.labels = true;
        self
    }

    fn word(self, name: &'static str, word: &'static str) -> Self {
        self.label(name, |out| {
            out.raw(word);
        })
    }

    fn text<const MAX: usize>(self, name: &'static str, text: &Text<'_, MAX>) -> Self {
        self.label(name, |out| {
            out.text(text);
        })
    }

    fn upstream(self, upstream: &Upstream) -> Self {
        self.text("upstream", &upstream.name).word("protocol", upstream.protocol.word())
    }

    fn value(self, write: impl FnOnce(&mut Out<'b, Prometheus>)) {
        self.out.raw(if self.labels { "} " } else { " " });
        write(self.out);
        self.out.raw("\n");
    }

    fn number(self, number: impl Into<u64>) {
        self.value(|out| {
            out.number(number);
        });
    }

    fn bool(self, value: bool) {
        self.number(value);
    }

    /// Milliseconds as seconds.
    fn millis(self, millis: u64) {
        self.value(|out| {
            out.decimal(millis, 3);
        });
    }

    /// Microseconds as seconds.
    fn micros(self, micros: u64) {
        self.value(|out| {
            out.decimal(micros, 6);
        });
    }
}
