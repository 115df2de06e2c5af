//! An answer, made piece by piece as the client reads it.

use crate::escape::{Html, Json, Prometheus};
use crate::html::{Page, ROWS};
use crate::json::Tree;
use crate::model::{Document, Rows};
use crate::out::Out;
use crate::prometheus::{BOUND, Metrics};
use crate::request::{Error, Format, Peers, Request};

/// How many bytes are made at a time: a step that is begun is finished, so a buffer of 64 KiB is
/// enough whatever the texts are.
pub const FILL: usize = 48 * 1024;

/// An answer is large from here on.
const LARGE: u64 = 1 << 20;

/// A header of a response.
pub type Header = (&'static str, &'static str);

/// The hashes of the page's style and script are among it.
const POLICY: &str = include_str!(concat!(env!("OUT_DIR"), "/policy.txt"));

const COMMON: [Header; 4] = [
    ("Vary", "Accept"),
    ("Cache-Control", "no-store"),
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
];

impl Format {
    /// The media type.
    pub fn content_type(self) -> &'static str {
        match self {
            Self::Json => "application/json",
            Self::Html => "text/html; charset=utf-8",
            Self::Prometheus => "text/plain; version=0.0.4; charset=utf-8",
        }
    }

    /// The headers of an answer beside `Content-Type`, also of one to HEAD. An error has those of
    /// JSON.
    pub fn headers(self) -> impl Iterator<Item = Header> {
        let policy = (self == Self::Html).then_some(("Content-Security-Policy", POLICY));
        COMMON.into_iter().chain(policy)
    }
}

/// What is rendered, and nothing that changes while it is.
pub(crate) struct View {
    pub(crate) document: Document,
    pub(crate) request: Request,
    /// The location's prefix without a slash at its end; `None` where there are no pages of single
    /// upstreams.
    pub(crate) base: Option<Vec<u8>>,
}

impl View {
    /// Those upstreams that are asked for, in the configuration's order.
    pub(crate) fn asked(&self) -> impl Iterator<Item = usize> {
        let all = self.document.upstreams.iter().enumerate();
        all.filter(|(_, upstream)| self.request.asks_for(upstream.name.bytes())).map(|(at, _)| at)
    }
}

impl Request {
    /// Whether this upstream is among what is asked for.
    pub fn asks_for(&self, name: &[u8]) -> bool {
        self.upstream.as_ref().is_none_or(|asked| asked == name)
    }
}

/// An answer to a request.
pub struct Answer<R> {
    view: View,
    rows: R,
    renderer: Renderer,
}

enum Renderer {
    Json(Tree),
    Html(Page),
    Prometheus(Metrics),
}

impl<R: Rows> Answer<R> {
    /// An answer with this document; no rows are taken yet.
    ///
    /// `prefix` is the location's, for the links of the page. An exact or a regex location has
    /// none.
    pub fn new(
        document: Document,
        rows: R,
        request: Request,
        prefix: Option<&[u8]>,
    ) -> Result<Self, Error> {
        let base = prefix.map(|prefix| prefix.strip_suffix(b"/").unwrap_or(prefix).to_vec());
        let view = View { document, request, base };
        if view.request.upstream.is_some() && view.asked().next().is_none() {
            return Err(Error::Upstream);
        }
        let renderer = match view.request.format {
            Format::Json => Renderer::Json(Tree::new(&view)),
            Format::Html => Renderer::Html(Page::new(&view)),
            Format::Prometheus => Renderer::Prometheus(Metrics::new(&view)),
        };
        Ok(Self { view, rows, renderer })
    }

    /// Appends until `buffer` holds about [`FILL`] bytes; says whether there is more to come. Call
    /// it again when what it appended is sent and taken out.
    ///
    /// Rows are taken in here: those of an upstream when its first byte is written.
    pub fn fill(&mut self, buffer: &mut Vec<u8>) -> bool {
        let (view, rows) = (&self.view, &mut self.rows);
        let mut more = true;
        while more && buffer.len() < FILL {
            more = match &mut self.renderer {
                Renderer::Json(tree) => tree.step(view, rows, &mut Out::<Json>::new(buffer)),
                Renderer::Html(page) => page.step(view, rows, &mut Out::<Html>::new(buffer)),
                Renderer::Prometheus(metrics) => {
                    metrics.step(view, rows, &mut Out::<Prometheus>::new(buffer))
                }
            };
        }
        if !more {
            rows.release();
        }
        more
    }

    /// Where its peers come from.
    pub fn rows(&self) -> &R {
        &self.rows
    }

    /// Whether it has more than a mebibyte, as far as that can be said without looking at the
    /// peers.
    pub fn is_large(&self) -> bool {
        let request = &self.view.request;
        // The page of all upstreams has so many rows of each.
        let rows = match (request.format, &request.upstream) {
            (Format::Html, None) => ROWS as u64,
            _ => u64::MAX,
        };
        let (mut upstreams, mut servers) = (0, 0_u64);
        for at in self.view.asked() {
            upstreams += 1;
            let more = self.view.document.upstreams[at].servers.total().min(rows);
            servers = servers.saturating_add(more);
        }
        // Bytes for each upstream and each of its servers, as they were measured.
        let (upstream, server) = match request.format {
            Format::Json => (700, 600),
            Format::Html => (2000, 500),
            Format::Prometheus => (2100, 2000),
        };
        let servers = match (request.format, request.peers) {
            (Format::Prometheus, Peers::None) => 0,
            (Format::Prometheus, Peers::Bounded) => servers.min(BOUND as u64),
            _ => servers,
        };
        servers.saturating_mul(server).saturating_add(upstreams * upstream) > LARGE
    }
}
