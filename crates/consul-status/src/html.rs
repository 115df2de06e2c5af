//! The page.
//!
//! It is complete without its script, which only keeps it fresh. Nothing is loaded, and no link
//! comes from Consul's data.

mod frame;
mod search;
mod table;
mod upstream;
mod words;

use crate::answer::View;
use crate::escape::Html;
use crate::model::Rows;
use crate::out::Out;
use crate::walk::{List, Step, Walk};
use search::{Found, Search};

/// How many rows a list has on the page of all upstreams.
pub(crate) const ROWS: usize = 500;

/// Where the page is written up to.
pub(crate) struct Page {
    walk: Walk,
    search: Search,
    /// Which of the upstream's peers and excluded instances are shown.
    peers: Found,
    excluded: Found,
    /// Upstreams in which nothing was found.
    without: u64,
    shown: u64,
}

impl Page {
    pub(crate) fn new(view: &View) -> Self {
        let mut order: Vec<usize> = view.asked().collect();
        // What is not in sync comes first. It is stable, so the rest stays in its order.
        order.sort_by_key(|at| view.document.upstreams[*at].sync.is_in_sync());
        Self {
            walk: Walk::new(order),
            search: Search::new(&view.request.query),
            peers: Found::default(),
            excluded: Found::default(),
            without: 0,
            shown: 0,
        }
    }

    /// Writes one step; says whether there are more.
    pub(crate) fn step(
        &mut self,
        view: &View,
        rows: &mut impl Rows,
        out: &mut Out<'_, Html>,
    ) -> bool {
        let Some(step) = self.walk.step() else { return false };
        let all = &view.document.upstreams;
        match step {
            Step::Start => frame::start(view, out),
            Step::Enter(at) => {
                self.look(view, at, rows);
                if self.search.is_on() && self.peers.total + self.excluded.total == 0 {
                    self.without += 1;
                    self.walk.skip();
                    return true;
                }
                self.shown += 1;
                upstream::enter(view, at, self.search.is_on(), out);
            }
            Step::Open(_, List::Sources) => upstream::sources(out),
            Step::Open(at, List::Peers) => table::open_peers(view, at, &self.peers, out),
            Step::Open(at, List::Excluded) => table::open_excluded(view, at, &self.excluded, out),
            Step::Open(at, List::Changes) => upstream::changes(out, view, at),
            Step::Item(at, list, nth) => match list {
                List::Sources => upstream::source(view, &all[at].sources[nth], out),
                List::Peers => table::peer(view, &rows.row(self.peers.shown[nth] as usize), out),
                List::Excluded => {
                    let row = self.excluded.shown[nth] as usize;
                    table::excluded(view, &all[at].excluded[row], out);
                }
                List::Changes => upstream::change(view, &all[at].changes[nth], out),
            },
            Step::Close(_, List::Sources) => {
                out.raw("</ul>\n");
            }
            Step::Close(at, List::Peers) => table::close(view, at, &self.peers, 0, out),
            Step::Close(at, List::Excluded) => {
                table::close(view, at, &self.excluded, all[at].excluded_omitted, out);
            }
            Step::Close(at, List::Changes) => upstream::close_changes(&all[at], out),
            Step::Leave(_) => {
                out.raw("</div>\n</details>\n");
            }
            Step::Finish => frame::finish(view, self.shown, self.without, out),
        }
        let (peers, excluded) = (self.peers.shown.len(), self.excluded.shown.len());
        self.walk.advance(|at, list| match list {
            List::Sources => all[at].sources.len(),
            List::Peers => peers,
            List::Excluded => excluded,
            List::Changes => all[at].changes.len(),
        });
        self.walk.step().is_some()
    }

    /// Takes the rows of an upstream, and finds those that are shown.
    fn look(&mut self, view: &View, at: usize, rows: &mut impl Rows) {
        // The page of one upstream has all its rows.
        let limit = if view.request.upstream.is_some() { usize::MAX } else { ROWS };
        let count = rows.take(at);
        self.peers = self.search.find(count, limit, |search, nth| {
            let peer = rows.row(nth);
            search.matches(&peer.server)
                || peer
                    .instance
                    .is_some_and(|it| search.matches(&it.service_id) || search.matches(&it.node))
        });
        let excluded = &view.document.upstreams[at].excluded;
        self.excluded = self.search.find(excluded.len(), limit, |search, nth| {
            let one = &excluded[nth];
            search.matches(&one.address)
                || search.matches(&one.service_id)
                || search.matches(&one.node)
        });
    }
}
