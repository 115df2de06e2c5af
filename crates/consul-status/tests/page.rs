//! The page, as text: it is whole, it is safe, and it says what it should.

mod common;

use std::collections::{BTreeMap, BTreeSet};

use base64::prelude::{BASE64_STANDARD, Engine};
use common::{NOW, Sample, peer, upstream};
use consul_status::model::*;
use consul_status::{Format, Time};
use sha2::{Digest, Sha256};

fn page(sample: Sample, path: &str, args: &str) -> String {
    let text = sample.text(path, &format!("format=html&{args}"));
    check(&text);
    text
}

/// An element that is begun: its name, and its attributes with what stands in the quotes.
type Element<'a> = (&'a str, BTreeMap<&'a str, &'a str>);

/// Reads the page more strictly than a browser would: all is nested and closed, all values are
/// quoted, all IDs are there once. Style and script are left out.
fn elements(text: &str) -> Vec<Element<'_>> {
    const VOID: [&str; 4] = ["meta", "input", "br", "hr"];
    let mut rest = text.strip_prefix("<!DOCTYPE html>").expect("a document type");
    let (mut all, mut open, mut ids) = (Vec::new(), Vec::new(), BTreeSet::new());
    while let Some(at) = rest.find('<') {
        let end = at + rest[at..].find('>').expect("each tag ends");
        let tag = &rest[at + 1..end];
        rest = &rest[end + 1..];
        if let Some(name) = tag.strip_prefix('/') {
            assert_eq!(open.pop(), Some(name), "before {}", &rest[..rest.len().min(200)]);
            continue;
        }
        let (name, mut attributes) = tag.split_once([' ', '\n']).unwrap_or((tag, ""));
        assert!(
            name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit()),
            "{tag}"
        );
        let mut known = BTreeMap::new();
        while !attributes.trim().is_empty() {
            let end = attributes.find(['=', ' ']).unwrap_or(attributes.len());
            let (key, after) = attributes.split_at(end);
            let value = match after.strip_prefix("=\"") {
                Some(value) => {
                    let (value, after) = value.split_once('"').expect("the quote is closed");
                    attributes = after.trim_start();
                    value
                }
                None => {
                    assert!(!after.starts_with('='), "{tag}");
                    attributes = after.trim_start();
                    ""
                }
            };
            assert_eq!(known.insert(key, value), None, "{tag}");
        }
        assert!(known.get("id").is_none_or(|id| ids.insert(*id)), "{tag} is there twice");
        if matches!(name, "style" | "script") {
            let end = rest.find("</").expect("style and script end");
            rest = &rest[end..];
        }
        if !VOID.contains(&name) {
            open.push(name);
        }
        all.push((name, known));
    }
    assert_eq!(open, [""; 0]);
    all
}

/// What holds for every page, whatever is on it.
fn check(text: &str) {
    let all = elements(text);
    let count = |wanted: &str| all.iter().filter(|(name, _)| *name == wanted).count();
    assert_eq!((count("style"), count("script"), count("main"), count("h1")), (1, 1, 1, 1));
    assert_eq!(count("table"), count("caption"));
    assert_eq!(all[0], ("html", BTreeMap::from([("lang", "en")])));
    for (name, attributes) in &all {
        for (key, value) in attributes {
            assert!(!key.starts_with("on") && *key != "style" && *key != "src", "{name} {key}");
            if *key == "href" {
                assert!(value.starts_with('?') || value.starts_with("/consul/"), "{value}");
            }
        }
        assert!(*name != "th" || attributes.contains_key("scope"));
        assert!(*name != "time" || attributes["datetime"].len() == 24);
    }
}

fn count(text: &str, what: &str) -> usize {
    text.matches(what).count()
}

fn rows(text: &str) -> usize {
    count(text, "<tr><th scope=\"row\"")
}

#[test]
fn it_answers_the_three_questions() {
    let text = page(Sample::new(NOW), "/", "");
    let since = "<time datetime=\"2026-03-02T14:03:01.482Z\">14:03:01</time>";
    for wanted in [
        // Is everything in sync, and since when?
        "1 of 3 upstreams is not in sync",
        &format!(", since {since} <span id=\"age\" aria-live=\"off\">(10 s)</span>"),
        "<span class=\"code\">http://127.0.0.1:8500</span> <span class=\"good\">answers</span> (1.8.7)",
        "thread <span class=\"good\">running</span>",
        &format!("1 removal held since {since} until <time"),
        "4 serve, 2 do not",
        "✕ 1 unavail",
        "zone 3 %",
        "last answer <time datetime=\"2026-03-02T14:03:01.482Z\">10 s ago</time>",
        "index 1234",
        "3 errors",
        // Why does this instance not serve?
        "not serving (2)",
        "</span> maintenance</span></b> <span class=\"muted\">somebody took it out: <span \
         class=\"code\">_service_maintenance:web-1</span>",
        "it lacks a tag: <span class=\"code\">app</span>",
        // And why does that one?
        "</span> critical</span> <span class=\"warn\">kept by guard</span> <span \
         class=\"warn\">ignores nginx_weight</span>",
        "<span class=\"code\">+10.0.0.3:8080</span> <span class=\"code\">-10.0.0.1:8080</span>",
        "static 127.0.0.1:8081",
    ] {
        assert!(text.contains(wanted), "no {wanted} in\n{text}");
    }
    assert_eq!(rows(&text), 4 + 2 + 12 + 2);
}

#[test]
fn what_is_not_in_sync_comes_first_and_open() {
    let mut sample = Sample::new(NOW);
    sample.document.upstreams.swap(0, 1);
    sample.peers.swap(0, 1);
    let text = page(sample, "/", "");
    let at = |what: &str| text.find(what).unwrap_or_else(|| panic!("no {what}"));
    assert!(at("<h2>app</h2>") < at("<h2>api</h2>"));
    assert!(at("<h2>api</h2>") < at("<span class=\"muted\">stream</span>"));
    let open = |id: &str| text[at(id)..].lines().next().unwrap().ends_with(" open>");
    assert!(open("id=\"http-1\"") && !open("id=\"http-0\"") && !open("id=\"stream-2\""));
}

#[test]
fn headlines() {
    let headline = |change: &dyn Fn(&mut Sample)| {
        let mut sample = Sample::new(NOW);
        change(&mut sample);
        let text = page(sample, "/", "");
        let (_, rest) = text.split_once("<title>").unwrap();
        rest.split_once("</title>").unwrap().0.to_owned()
    };
    let sync = |sample: &mut Sample| {
        sample.document.upstreams[0].sync = Sync::InSync;
        sample.document.in_sync = true;
    };
    assert_eq!(headline(&|_| {}), "1 of 3 upstreams is not in sync");
    assert_eq!(headline(&sync), "All 3 upstreams are in sync");
    let two = |sample: &mut Sample| sample.document.upstreams[1].sync = Sync::Stale;
    assert_eq!(headline(&two), "2 of 3 upstreams are not in sync");
    let one = |sample: &mut Sample| sample.document.upstreams.truncate(1);
    assert_eq!(headline(&one), "The upstream is not in sync");
    let none = |sample: &mut Sample| sample.document.upstreams.clear();
    assert_eq!(headline(&none), "No upstream follows Consul");
    // A thread that does nothing is worse than all else.
    let silent = |sample: &mut Sample| {
        sync(sample);
        sample.document.in_sync = false;
        sample.document.thread.state = ThreadState::Silent;
        sample.document.thread.heartbeat = Some(Time::from_millis(NOW - 20_000));
    };
    assert_eq!(headline(&silent), "The consul thread is silent: nothing is updated");
    let backoff = |sample: &mut Sample| {
        sync(sample);
        sample.document.in_sync = false;
        sample.document.thread.state = ThreadState::Backoff;
    };
    assert_eq!(headline(&backoff), "The consul thread failed, and is about to start again");
    let starting = |sample: &mut Sample| {
        sample.document.thread.state = ThreadState::Starting;
        sample.document.thread.heartbeat = None;
    };
    assert_eq!(headline(&starting), "The consul thread is starting");
}

#[test]
fn every_state_and_reason_in_words() {
    let mut sample = Sample::new(NOW);
    for sync in Sync::ALL {
        let mut one = upstream("x", Protocol::Http, NOW);
        one.sync = *sync;
        let mut peers = Vec::new();
        for state in PeerState::ALL {
            peers.push(Peer { state: *state, ..peer(1, "10.0.0.1:80", "x", NOW) });
        }
        for reason in Reason::ALL {
            one.excluded.push(common::excluded("x", "10.0.0.1:80", *reason, "it", NOW));
        }
        sample.push(one, peers);
    }
    let text = page(sample, "/", "");
    for word in ["denied", "refused", "stale", "panic", "held", "restored", "starting", "in sync"] {
        assert!(text.contains(&format!("\">{word}</span>\n<span class=\"why\">")), "{word}");
    }
    for state in PeerState::ALL {
        assert!(text.contains(&format!("</span> {}</span>", state.word())));
    }
    for reason in Reason::ALL {
        assert!(text.contains(&format!("</span> {}</span></b> <span", reason.word())));
    }
}

#[test]
fn refreshes_unless_told_not_to() {
    let meta = "<noscript><meta http-equiv=\"refresh\" content=\"5\"></noscript>";
    let text = page(Sample::new(NOW), "/", "q=web+%26");
    assert!(text.contains(meta) && text.contains("<body data-refresh=\"on\">"));
    assert!(
        text.contains("href=\"?refresh=off&amp;format=html&amp;q=web%20%26\">Stop refresh</a>")
    );
    let text = page(Sample::new(NOW), "/", "refresh=off&q=web+%26");
    assert!(!text.contains(meta) && text.contains("<body data-refresh=\"off\">"));
    assert!(text.contains("<input type=\"hidden\" name=\"refresh\" value=\"off\">"));
    assert!(
        text.contains("href=\"?refresh=on&amp;format=html&amp;q=web%20%26\">Refresh every 5 s</a>")
    );
    assert!(text.contains("value=\"web &amp;\">"));
}

fn many() -> Sample {
    let mut sample = Sample::new(NOW);
    let peers = (0..1200)
        .map(|n| peer(n, &format!("10.0.{}.{}:80", n / 250, n % 250), &format!("Many-{n}"), NOW));
    sample.push(upstream("a/b c", Protocol::Http, NOW), peers.collect());
    sample
}

#[test]
fn five_hundred_rows_and_a_link_to_the_rest() {
    let text = page(many(), "/", "");
    assert_eq!(rows(&text), 4 + 2 + 12 + 2 + 500);
    assert!(text.contains("serving (1,200)"));
    let link = "href=\"/consul/upstreams/a%2Fb%20c?format=html\">show all</a>";
    assert!(text.contains("700 more: ") && text.contains(link), "{text}");
    let text = page(many(), "/upstreams/a/b c", "");
    assert_eq!(rows(&text), 1200);
    assert!(text.contains("<a href=\"/consul/?format=html\">All upstreams</a>"));
}

#[test]
fn finds_among_all_rows() {
    for (query, found, without) in [
        ("many-119", 11, 3),
        // By its address.
        ("10.0.4.19:", 1, 3),
        // By its node.
        ("N2", 3 + 12 + 2 + 500, 0),
        ("web-1", 1, 3),
        ("nothing", 0, 4),
        ("", 4 + 2 + 12 + 2 + 500, 0),
    ] {
        let text = page(many(), "/", &format!("q={query}"));
        assert_eq!(rows(&text), found, "{query}");
        let hidden = format!("{without} upstreams without a match are not shown");
        assert_eq!(text.contains(&hidden), without > 0, "{query}");
        assert_eq!(text.contains("Nothing is found for <q>nothing</q>"), found == 0);
    }
}

#[test]
fn without_a_prefix_there_are_no_links_to_upstreams() {
    let (with, without) = (
        many().whole("/", "format=html", Some(b"/consul")),
        many().whole("/", "format=html", None),
    );
    assert!(with.contains("/upstreams/") && with.contains("700 more"));
    assert!(!without.contains("/upstreams/") && without.contains("700 more"));
    check(&without);
}

#[test]
fn hostile_text_is_shown_and_nothing_else() {
    let texts: [&[u8]; 6] = [
        b"</script><script>alert(1)</script>",
        b"\" onclick=\"alert(1)",
        b"'><img src=x onerror=alert(1)>",
        "\u{202E}\u{2066}\u{0}&lt;".as_bytes(),
        b"\xff\xfe\xc0\x80",
        b"javascript:alert(1)//",
    ];
    for text in texts {
        for text in [text.to_vec(), text.repeat(20)] {
            let mut sample = Sample::new(NOW);
            sample.push_hostile(&text, NOW);
            let before = elements(&page(Sample::new(NOW), "/", "")).len();
            let query: String = text.iter().map(|byte| format!("%{byte:02x}")).collect();
            // `page` checks that no attribute and no element is there that should not be.
            let shown = page(sample, "/", &format!("q={query}"));
            assert!(!shown.contains(['\u{202E}', '\u{2066}', '\0']));
            let mut sample = Sample::new(NOW);
            sample.push_hostile(&text, NOW);
            assert!(elements(&page(sample, "/", "")).len() > before);
        }
    }
}

#[test]
fn the_policy_knows_style_and_script() {
    let text = page(Sample::new(NOW), "/", "");
    let headers: BTreeMap<_, _> = Format::Html.headers().collect();
    let policy = headers["Content-Security-Policy"];
    let hash = |element: &str| {
        let (_, rest) = text.split_once(&format!("<{element}>")).unwrap();
        let (content, _) = rest.split_once(&format!("</{element}>")).unwrap();
        BASE64_STANDARD.encode(Sha256::digest(content))
    };
    assert_eq!(
        policy,
        format!(
            "default-src 'none'; style-src 'sha256-{}'; script-src 'sha256-{}'; connect-src \
             'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
            hash("style"),
            hash("script")
        )
    );
    for format in [Format::Json, Format::Html, Format::Prometheus] {
        let headers: BTreeMap<_, _> = format.headers().collect();
        assert_eq!(headers.contains_key("Content-Security-Policy"), format == Format::Html);
        assert_eq!(headers["Vary"], "Accept");
        assert_eq!(headers["Cache-Control"], "no-store");
        assert_eq!(headers["X-Content-Type-Options"], "nosniff");
        assert_eq!(headers["Referrer-Policy"], "no-referrer");
    }
}

/// The contrast of WCAG 2.2 (1.4.3), of every colour of a text on everything it stands on.
#[test]
fn contrast_in_light_and_dark() {
    let style = include_str!("../assets/page.css");
    let (light, rest) = style.split_once("@media (prefers-color-scheme: dark)").unwrap();
    let colours = |text: &str| -> BTreeMap<String, f64> {
        let lines =
            text.lines().filter_map(|line| line.trim().strip_prefix("--")?.split_once(": #"));
        lines.map(|(name, value)| (name.to_owned(), luminance(&value[..6]))).collect()
    };
    let dark = rest.split_once("\n}\n").unwrap().0;
    for colours in [colours(light), colours(dark)] {
        assert_eq!(colours.len(), 14);
        for text in ["text", "muted", "link", "good", "calm", "warn", "bad"] {
            let own = format!("{text}-back");
            for back in ["page", "card", "shade", &own] {
                let Some(back_colour) = colours.get(back) else { continue };
                let (a, b) = (colours[text], *back_colour);
                let contrast = (a.max(b) + 0.05) / (a.min(b) + 0.05);
                assert!(contrast >= 4.5, "{text} on {back}: {contrast:.2}");
            }
        }
    }
}

fn luminance(hex: &str) -> f64 {
    let channel = |at: usize| {
        let value = f64::from(u8::from_str_radix(&hex[at..at + 2], 16).unwrap()) / 255.0;
        if value <= 0.04045 { value / 12.92 } else { ((value + 0.055) / 1.055).powf(2.4) }
    };
    0.2126 * channel(0) + 0.7152 * channel(2) + 0.0722 * channel(4)
}
