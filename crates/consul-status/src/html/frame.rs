//! What stands around the upstreams: the one line that matters, whom it is about, and the form.

use super::words::Tone;
use crate::answer::View;
use crate::escape::Html;
use crate::model::ThreadState;
use crate::out::Out;
use crate::request::QUERY;
use crate::text::Text;

const STYLE: &str = include_str!("../../assets/page.css");
const SCRIPT: &str = include_str!("../../assets/page.js");

pub(super) fn start(view: &View, out: &mut Out<'_, Html>) {
    out.raw("<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n");
    out.raw("<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n");
    out.raw("<meta name=\"robots\" content=\"noindex\">\n<title>");
    headline(view, out);
    out.raw("</title>\n");
    if view.request.refresh {
        out.raw("<noscript><meta http-equiv=\"refresh\" content=\"5\"></noscript>\n");
    }
    out.raw("<style>").raw(STYLE).raw("</style>\n</head>\n<body data-refresh=\"");
    out.raw(if view.request.refresh { "on" } else { "off" }).raw("\">\n");

    let tone = if view.document.in_sync { Tone::Good } else { Tone::Bad };
    out.raw("<header>\n<div class=\"line\">\n<h1 id=\"state\" aria-live=\"polite\" class=\"");
    out.raw(tone.class()).raw("\"><span class=\"sign\" aria-hidden=\"true\">").raw(tone.sign());
    out.raw("</span> <span>");
    headline(view, out);
    if let Some(since) = view.document.since {
        // An age that grows is no news to read out.
        let now = view.document.now;
        out.raw(", since ").moment(since, now);
        out.raw(" <span id=\"age\" aria-live=\"off\">(").age(now.since(since)).raw(")</span>");
    }
    out.raw("</span></h1>\n");
    refresh_link(view, out);
    out.raw("</div>\n");
    about(view, out);
    form(view, out);
    out.raw("<p id=\"note\" class=\"note warn\" role=\"status\" hidden></p>\n");
    out.raw("</header>\n<main>\n");
}

/// The state of everything, in one sentence.
fn headline(view: &View, out: &mut Out<'_, Html>) {
    let document = &view.document;
    let all = document.upstreams.len() as u64;
    let bad = document.upstreams.iter().filter(|it| !it.sync.is_in_sync()).count() as u64;
    match (all, bad) {
        (0, _) => out.raw("No upstream follows Consul"),
        // Without it nothing else is news.
        _ if thread_state(view) != ThreadState::Running => out.raw(match thread_state(view) {
            ThreadState::Starting => "The consul thread is starting",
            ThreadState::Backoff => "The consul thread failed, and is about to start again",
            ThreadState::Silent | ThreadState::Running => {
                "The consul thread is silent: nothing is updated"
            }
        }),
        (1, 0) => out.raw("The upstream is in sync"),
        (_, 0) => out.raw("All ").grouped(all).raw(" upstreams are in sync"),
        (1, _) => out.raw("The upstream is not in sync"),
        _ => {
            out.grouped(bad).raw(" of ").grouped(all).raw(" upstreams ");
            out.raw(if bad == 1 { "is not in sync" } else { "are not in sync" })
        }
    };
}

/// What the thread does; one that should run and gives no sign of life is silent.
fn thread_state(view: &View) -> ThreadState {
    match view.document.thread.state {
        ThreadState::Running if !view.document.thread.is_up(view.document.now) => {
            ThreadState::Silent
        }
        state => state,
    }
}

/// The agents, the thread, and when this was.
fn about(view: &View, out: &mut Out<'_, Html>) {
    let document = &view.document;
    out.raw("<ul id=\"about\" class=\"facts\">\n");
    for agent in &document.agents {
        out.raw("<li>Consul <span class=\"code\">").text(&agent.address).raw("</span> ");
        if agent.up {
            out.raw("<span class=\"good\">answers</span>");
        } else {
            out.raw("<span class=\"bad\">✕ does not answer</span>");
        }
        if let Some(version) = &agent.version {
            out.raw(" (").text(version).raw(")");
        }
        out.raw("</li>\n");
    }
    let thread = &document.thread;
    let state = thread_state(view);
    let tone = if state == ThreadState::Running { Tone::Good } else { Tone::Bad };
    out.raw("<li>thread <span class=\"").raw(tone.class()).raw("\">").raw(state.word());
    out.raw("</span>");
    if thread.restarts > 0 {
        out.raw(", started again ").count(thread.restarts, "time", "times");
    }
    out.raw("</li>\n<li>nginx ").text(&document.nginx.version).raw(", module ");
    out.text(&document.nginx.module).raw("</li>\n<li><span id=\"now\">");
    out.moment(document.now, document.now).raw(" UTC</span></li>\n</ul>\n");
}

fn refresh_link(view: &View, out: &mut Out<'_, Html>) {
    let (value, text) = match view.request.refresh {
        true => ("off", "Stop refresh"),
        false => ("on", "Refresh every 5 s"),
    };
    out.raw("<a class=\"button\" href=\"?refresh=").raw(value);
    if view.request.explicit {
        out.raw("&amp;format=html");
    }
    if !view.request.query.is_empty() {
        out.raw("&amp;q=").url(&view.request.query);
    }
    out.raw("\">").raw(text).raw("</a>\n");
}

fn form(view: &View, out: &mut Out<'_, Html>) {
    let query = Text::<QUERY>::from(&*view.request.query);
    out.raw("<form method=\"get\" role=\"search\">\n<label for=\"q\">Find</label>\n");
    out.raw("<input id=\"q\" name=\"q\" type=\"search\" maxlength=\"128\" autocomplete=\"off\"");
    out.raw(" spellcheck=\"false\" placeholder=\"instance, node or address\" value=\"");
    out.text(&query).raw("\">\n");
    // What is not an input of the form would get lost.
    if view.request.explicit {
        out.raw("<input type=\"hidden\" name=\"format\" value=\"html\">\n");
    }
    if !view.request.refresh {
        out.raw("<input type=\"hidden\" name=\"refresh\" value=\"off\">\n");
    }
    out.raw("<button>Show</button>\n");
    if let (Some(base), Some(_)) = (&view.base, &view.request.upstream) {
        out.raw("<a href=\"").path(base).raw("/").arguments(view).raw("\">All upstreams</a>\n");
    }
    out.raw("</form>\n");
}

impl Out<'_, Html> {
    /// A path: each of its segments is escaped.
    pub(super) fn path(&mut self, path: &[u8]) -> &mut Self {
        for (nth, segment) in path.split(|byte| *byte == b'/').enumerate() {
            self.raw(if nth > 0 { "/" } else { "" }).url(segment);
        }
        self
    }

    /// The arguments that a link to another page of ours keeps.
    pub(super) fn arguments(&mut self, view: &View) -> &mut Self {
        match (view.request.explicit, view.request.refresh) {
            (false, true) => self,
            (true, true) => self.raw("?format=html"),
            (false, false) => self.raw("?refresh=off"),
            (true, false) => self.raw("?format=html&amp;refresh=off"),
        }
    }
}

pub(super) fn finish(view: &View, shown: u64, without: u64, out: &mut Out<'_, Html>) {
    if without > 0 {
        let query = Text::<QUERY>::from(&*view.request.query);
        out.raw("<p class=\"empty\">");
        if shown == 0 {
            out.raw("Nothing is found for <q>").text(&query).raw("</q>. ");
        }
        out.count(without, "upstream", "upstreams").raw(" without a match ");
        out.raw(if without == 1 { "is" } else { "are" }).raw(" not shown.</p>\n");
    } else if shown == 0 {
        out.raw("<p class=\"empty\">An upstream follows Consul if it has a ");
        out.raw("<span class=\"code\">consul_upstream</span> line.</p>\n");
    }
    out.raw("</main>\n<footer>\n<p>All times are UTC. The same as ");
    out.raw("<a href=\"?format=json\">JSON</a> and for ");
    out.raw("<a href=\"?format=prometheus\">Prometheus</a>.</p>\n</footer>\n");
    out.raw("<script>").raw(SCRIPT).raw("</script>\n</body>\n</html>\n");
}
