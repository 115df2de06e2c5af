//! The two tables of an upstream: what serves, and what does not.

use super::search::Found;
use super::words::{Tone, explain, tone_of_state, tone_of_status};
use crate::answer::View;
use crate::escape::Html;
use crate::model::{Excluded, Peer, PeerState, Reason};
use crate::out::Out;

/// A longer table is closed at first, if it is not what was asked for.
const LONG: usize = 50;

/// A column: its title, and whether there are numbers in it. The style names them once more, for
/// screens on which a row is no row.
type Column = (&'static str, bool);

const PEERS: &[Column] = &[
    ("server", false),
    ("instance", false),
    ("node", false),
    ("Consul", false),
    ("state", false),
    ("weight", true),
    ("active", true),
    ("requests", true),
    ("5xx", true),
    ("ms", true),
    ("since", false),
];

const EXCLUDED: &[Column] = &[
    ("address", false),
    ("instance", false),
    ("node", false),
    ("why", false),
    ("Consul", false),
    ("since", false),
];

/// What differs between the two.
struct Table {
    class: &'static str,
    part: &'static str,
    region: &'static str,
    title: &'static str,
    caption: &'static str,
    columns: &'static [Column],
}

const SERVING: Table = Table {
    class: "peers",
    part: "-serving",
    region: "-serving-table",
    title: "serving",
    caption: "Servers of ",
    columns: PEERS,
};

const NOT_SERVING: Table = Table {
    class: "excluded",
    part: "-not-serving",
    region: "-not-serving-table",
    title: "not serving",
    caption: "Instances that do not serve, of ",
    columns: EXCLUDED,
};

pub(super) fn open_peers(view: &View, at: usize, found: &Found, out: &mut Out<'_, Html>) {
    open(view, at, &SERVING, found, found.of as u64, out);
}

pub(super) fn open_excluded(view: &View, at: usize, found: &Found, out: &mut Out<'_, Html>) {
    let upstream = &view.document.upstreams[at];
    // The rows are at most those that there was room for.
    let all = found.of as u64 + upstream.excluded_omitted;
    open(view, at, &NOT_SERVING, found, all, out);
}

fn open(view: &View, at: usize, table: &Table, found: &Found, all: u64, out: &mut Out<'_, Html>) {
    if found.shown.is_empty() {
        out.raw("<p class=\"part none\">").raw(table.title).raw(" (");
        out.grouped(all).raw(if all > 0 && found.of > 0 { ", none matches)" } else { ")" });
        out.raw("</p>\n");
        return;
    }
    let asked = found.total < found.of || view.request.upstream.is_some();
    out.raw("<details class=\"part\"").id(view, at, table.part);
    out.raw(if asked || found.shown.len() <= LONG { " open><summary>" } else { "><summary>" })
        .raw(table.title)
        .raw(" (");
    if found.total < found.of {
        out.grouped(found.total as u64).raw(" of ");
    }
    out.grouped(all).raw(")</summary>\n<div class=\"scroll\" tabindex=\"0\" role=\"region\"");
    out.id(view, at, table.region).raw(" aria-label=\"").raw(table.caption);
    let name = &view.document.upstreams[at].name;
    out.text(name).raw("\">\n<table class=\"").raw(table.class).raw("\">\n<caption>");
    out.raw(table.caption).text(name);
    out.raw("</caption>\n<thead><tr>");
    for (title, number) in table.columns {
        out.raw("<th scope=\"col\"").raw(if *number { " class=\"n\">" } else { ">" });
        out.raw(title).raw("</th>");
    }
    out.raw("</tr></thead>\n<tbody>\n");
}

/// The end of a table, and what it does not show.
pub(super) fn close(view: &View, at: usize, found: &Found, omitted: u64, out: &mut Out<'_, Html>) {
    if found.shown.is_empty() {
        return;
    }
    out.raw("</tbody>\n</table>\n</div>\n");
    let hidden = (found.total - found.shown.len()) as u64;
    if hidden > 0 {
        out.raw("<p class=\"rest\">").grouped(hidden).raw(" more: ");
        if let Some(base) = &view.base {
            let name = view.document.upstreams[at].name.bytes();
            out.raw("<a").id(view, at, "-rest").raw(" href=\"").path(base).raw("/upstreams/");
            out.url(name).arguments(view).raw("\">show all</a>, or ");
        }
        out.raw("find one by its instance, node or address.</p>\n");
    }
    if omitted > 0 {
        out.raw("<p class=\"rest\">").grouped(omitted);
        out.raw(" more, which left earlier, are only counted.</p>\n");
    }
    out.raw("</details>\n");
}

const NOTHING: &str = "<span class=\"muted\">–</span>";

pub(super) fn peer(view: &View, peer: &Peer<'_>, out: &mut Out<'_, Html>) {
    let now = view.document.now;
    out.raw("<tr><th scope=\"row\" class=\"code\">").text(&peer.server).raw("</th><td>");
    match &peer.instance {
        Some(it) => {
            out.text(&it.service_id).raw("</td><td>").text(&it.node);
            if let Some(dc) = &it.datacenter {
                out.raw(" <span class=\"muted\">").text(dc).raw("</span>");
            }
            out.raw("</td><td class=\"wrap\">");
            match it.status {
                Some(status) => out.state(tone_of_status(status), status.word()),
                None => out.raw(NOTHING),
            };
            if let Some(kept_by) = it.kept_by {
                out.raw(" <span class=\"warn\">kept by ").raw(kept_by.word()).raw("</span>");
            }
            for key in &it.ignored_meta {
                out.raw(" <span class=\"warn\">ignores ").text(key).raw("</span>");
            }
        }
        None => {
            out.raw("<span class=\"muted\">static ").text(&peer.name).raw("</span></td><td>");
            out.raw(NOTHING).raw("</td><td>").raw(NOTHING);
        }
    }
    out.raw("</td><td>").state(tone_of_state(peer.state), peer.state.word());
    if peer.backup {
        out.raw(" <span class=\"muted\">backup</span>");
    }
    out.raw("</td><td class=\"n\">").grouped(peer.weight);
    if peer.effective_weight != peer.weight && peer.state == PeerState::Up {
        out.raw(" <span class=\"muted\">(").grouped(peer.effective_weight).raw(")</span>");
    }
    out.raw("</td><td class=\"n\">").grouped(peer.active);
    if peer.max_conns > 0 {
        out.raw(" <span class=\"muted\">of ").grouped(peer.max_conns).raw("</span>");
    }
    match &peer.counters {
        Some(counters) => {
            let failed = counters.responses[4];
            out.raw("</td><td class=\"n\">").grouped(counters.requests);
            out.raw(if failed > 0 { "</td><td class=\"n bad\">" } else { "</td><td class=\"n\">" });
            out.grouped(failed).raw("</td><td class=\"n\">");
            match counters.response_time {
                Some(micros) => out.decimal(micros / 100, 1),
                None => out.raw(NOTHING),
            };
        }
        None => {
            for _ in 0..3 {
                out.raw("</td><td class=\"n\">").raw(NOTHING);
            }
        }
    }
    out.raw("</td><td>");
    match peer.instance.as_ref().and_then(|it| it.since) {
        Some(since) => out.moment(since, now),
        None => out.raw(NOTHING),
    };
    out.raw("</td></tr>\n");
}

pub(super) fn excluded(view: &View, one: &Excluded, out: &mut Out<'_, Html>) {
    out.raw("<tr><th scope=\"row\" class=\"code\">");
    if one.address.is_empty() {
        out.raw(NOTHING);
    } else {
        out.text(&one.address);
    }
    out.raw("</th><td>").text(&one.service_id).raw("</td><td>").text(&one.node);
    out.raw("</td><td class=\"wrap\">");
    let tone = match one.reason {
        Reason::Critical | Reason::NotApplied => Tone::Bad,
        Reason::Maintenance | Reason::Tag | Reason::WeightZero => Tone::Calm,
        _ => Tone::Warn,
    };
    out.raw("<b>").state(tone, one.reason.word()).raw("</b> <span class=\"muted\">");
    out.raw(explain(one.reason));
    if let Some(detail) = one.detail.as_ref().filter(|detail| !detail.is_empty()) {
        out.raw(": <span class=\"code\">").text(detail).raw("</span>");
    }
    out.raw("</span></td><td>").state(tone_of_status(one.status), one.status.word());
    out.raw("</td><td>");
    match one.since {
        Some(since) => out.moment(since, view.document.now),
        None => out.raw(NOTHING),
    };
    out.raw("</td></tr>\n");
}
