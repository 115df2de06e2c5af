//! An upstream: its line, its sources, its last changes.

use super::words::{Tone, tone_of_sync};
use crate::answer::View;
use crate::escape::Html;
use crate::model::{Change, Health, Protocol, Source, Sync, Upstream};
use crate::out::Out;
use crate::time::Time;

/// A zone that is fuller than this may refuse the next update.
const FULL: u64 = 80;

impl Out<'_, Html> {
    /// By what the script knows a part of an upstream again.
    pub(super) fn id(&mut self, view: &View, at: usize, part: &'static str) -> &mut Self {
        let protocol = view.document.upstreams[at].protocol.word();
        self.raw(" id=\"").raw(protocol).raw("-").number(at as u64).raw(part).raw("\"")
    }
}

pub(super) fn enter(view: &View, at: usize, searching: bool, out: &mut Out<'_, Html>) {
    let upstream = &view.document.upstreams[at];
    let tone = tone_of_sync(upstream.sync);
    let open = searching || view.request.upstream.is_some() || !upstream.sync.is_in_sync();
    out.raw("<details class=\"upstream ").raw(tone.class()).raw("-edge\"").id(view, at, "");
    out.raw(if open { " open>\n" } else { ">\n" });

    out.raw("<summary>\n<span class=\"sign ").raw(tone.class()).raw("\" aria-hidden=\"true\">");
    out.raw(tone.sign()).raw("</span>\n<h2>").text(&upstream.name).raw("</h2>\n");
    if upstream.protocol == Protocol::Stream {
        out.raw("<span class=\"muted\">stream</span>\n");
    }
    out.raw("<span class=\"badge ").raw(tone.class()).raw("\">");
    out.raw(match upstream.sync {
        Sync::InSync => "in sync",
        other => other.word(),
    });
    out.raw("</span>\n<span class=\"why\">");
    why(upstream, view.document.now, out);
    out.raw("</span>\n<span class=\"numbers\">");
    numbers(upstream, out);
    out.raw("</span>\n</summary>\n<div class=\"body\">\n");
    facts(view, at, out);
}

/// Why it is not in sync, or since when it is.
fn why(upstream: &Upstream, now: Time, out: &mut Out<'_, Html>) {
    match upstream.sync {
        Sync::Denied => {
            out.raw("Consul refuses the query, or hides instances");
        }
        Sync::Refused => {
            out.raw("the last answer was not applied");
        }
        Sync::Stale => {
            out.raw("no good answer for too long");
        }
        Sync::Panic => {
            out.raw("too few are healthy: all serve");
        }
        Sync::Held => {
            out.count(upstream.held, "removal", "removals").raw(" held");
        }
        Sync::Restored => {
            out.raw("what was stored serves: no answer yet");
        }
        Sync::Starting => {
            out.raw("no answer yet");
        }
        Sync::InSync => {}
    }
    if let Some(since) = upstream.since {
        out.raw(match upstream.sync {
            Sync::InSync => "since ",
            Sync::Held => " since ",
            _ => ", since ",
        });
        out.moment(since, now);
    }
    if let (Sync::Held, Some(until)) = (upstream.sync, upstream.held_until) {
        out.raw(" until ").moment(until, now);
    }
}

fn numbers(upstream: &Upstream, out: &mut Out<'_, Html>) {
    let servers = &upstream.servers;
    let excluded = upstream.sources.iter().map(|source| source.excluded.total()).sum::<u64>();
    let serve = servers.total();
    out.raw("<span>").grouped(serve).raw(if serve == 1 { " serves" } else { " serve" });
    if excluded > 0 {
        out.raw(", ").grouped(excluded).raw(if excluded == 1 { " does not" } else { " do not" });
    }
    out.raw("</span>");
    if servers.unavail > 0 {
        out.raw(" <span class=\"bad\">✕ ").grouped(servers.unavail).raw(" unavail</span>");
    }
    if servers.down > 0 {
        out.raw(" <span class=\"calm\">– ").grouped(servers.down).raw(" down</span>");
    }
    let percent = upstream.memory.percent();
    out.raw(if percent > FULL { " <span class=\"bad\">! zone " } else { " <span>zone " });
    out.number(percent).raw(" %</span>");
}

/// What is of use when something is wrong.
fn facts(view: &View, at: usize, out: &mut Out<'_, Html>) {
    let upstream = &view.document.upstreams[at];
    let now = view.document.now;
    out.raw("<ul class=\"facts\">\n<li>zone ").text(&upstream.zone).raw(": ");
    out.size(upstream.memory.used).raw(" of ").size(upstream.memory.size).raw(" used");
    if let Some(more) = upstream.memory.fits_more {
        out.raw(", room for about ").grouped(more).raw(" more");
    }
    let updates = &upstream.updates;
    out.raw("</li>\n<li>updates: ").grouped(updates.applied).raw(" applied, ");
    out.grouped(updates.held).raw(" held, ").grouped(updates.refused).raw(" refused</li>\n");
    if let Some(last) = upstream.last_change {
        out.raw("<li>last change ").moment(last, now).raw("</li>\n");
    }
    if upstream.retried_gets > 0 {
        out.raw("<li>").count(upstream.retried_gets, "attempt", "attempts");
        out.raw(" repaired after a change</li>\n");
    }
    if let Some(zombies @ 1..) = upstream.zombies {
        out.raw("<li>").grouped(zombies).raw(" left and still busy</li>\n");
    }
    if let (Some(base), None) = (&view.base, &view.request.upstream) {
        out.raw("<li><a").id(view, at, "-only").raw(" href=\"").path(base).raw("/upstreams/");
        out.url(upstream.name.bytes()).arguments(view).raw("\">only this upstream</a></li>\n");
    }
    out.raw("</ul>\n");
}

pub(super) fn sources(out: &mut Out<'_, Html>) {
    out.raw("<ul class=\"sources\" aria-label=\"Sources\">\n");
}

pub(super) fn source(view: &View, source: &Source, out: &mut Out<'_, Html>) {
    let now = view.document.now;
    out.raw("<li><p><b>").text(&source.service).raw("</b>");
    let (tags, more) = source.first_tags();
    for tag in tags {
        out.raw(" <span class=\"code\">tag=").text(tag).raw("</span>");
    }
    out.raw(if more { " …" } else { "" });
    if let Some(dc) = &source.datacenter {
        out.raw(" <span class=\"code\">dc=").text(dc).raw("</span>");
    }
    if source.health != Health::Passing {
        out.raw(" <span class=\"code\">health=").raw(source.health.word()).raw("</span>");
    }
    if let Some(filter) = &source.filter {
        out.raw(" <span class=\"code\">filter=").text(filter).raw("</span>");
    }
    if source.backup {
        out.raw(" <span class=\"code\">backup</span>");
    }
    out.raw("</p>\n<ul class=\"facts\">\n");
    if source.stale {
        out.raw("<li>").state(Tone::Bad, "stale").raw("</li>\n");
    }
    match source.last_success {
        Some(last) => {
            out.raw("<li>last answer <time datetime=\"").time(last).raw("\">");
            out.age(now.since(last)).raw(" ago</time></li>\n");
        }
        None => {
            out.raw("<li>no answer yet</li>\n");
        }
    }
    if let Some(registered) = source.registered {
        out.raw("<li>").grouped(source.serving).raw(" of ").grouped(registered);
        out.raw(if source.serving == 1 { " serves</li>\n" } else { " serve</li>\n" });
    }
    if let Some(index) = source.index {
        out.raw("<li>index ").number(index).raw("</li>\n");
    }
    let errors = source.errors.total();
    if errors > 0 {
        out.raw("<li>").count(errors, "error", "errors").raw("</li>\n");
    }
    if let Some(error) = &source.last_error {
        out.raw("<li>last error ").moment(error.time, now).raw(": ").raw(error.cause.word());
        out.raw(", ").text(&error.text).raw("</li>\n");
    }
    if let Some(next) = source.next_try {
        out.raw("<li>asked again at ").moment(next, now).raw("</li>\n");
    }
    if let Some(address) = &source.address {
        out.raw("<li class=\"code\">").text(address).raw("</li>\n");
    }
    out.raw("</ul></li>\n");
}

pub(super) fn changes(out: &mut Out<'_, Html>, view: &View, at: usize) {
    let changes = view.document.upstreams[at].changes.len();
    if changes == 0 {
        return;
    }
    out.raw("<details class=\"part\"").id(view, at, "-changes").raw("><summary>last changes (");
    out.number(changes as u64).raw(")</summary>\n<ul class=\"changes\">\n");
}

pub(super) fn change(view: &View, change: &Change, out: &mut Out<'_, Html>) {
    out.raw("<li>").moment(change.time, view.document.now);
    out.raw(" <span class=\"muted\">index ").number(change.index).raw("</span>");
    for (sign, address) in &change.first {
        out.raw(" <span class=\"code\">").raw(sign.word()).text(address).raw("</span>");
    }
    let all = change.added.saturating_add(change.removed).saturating_add(change.changed);
    let more = all.saturating_sub(change.first.len() as u64);
    if more > 0 {
        out.raw(" and ").grouped(more).raw(" more");
    }
    out.raw("</li>\n");
}

pub(super) fn close_changes(upstream: &Upstream, out: &mut Out<'_, Html>) {
    if !upstream.changes.is_empty() {
        out.raw("</ul>\n</details>\n");
    }
}
