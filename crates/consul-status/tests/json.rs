//! The document as JSON, read back.

mod common;

use common::{NOW, Sample, excluded, upstream};
use consul_status::Error;
use consul_status::model::*;
use serde_json::{Value, json};

fn read(sample: Sample, path: &str) -> Value {
    let text = sample.text(path, "format=json");
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}:\n{text}"))
}

#[test]
fn the_head() {
    let all = read(Sample::new(NOW), "/");
    assert_eq!(
        all.as_object().unwrap().keys().collect::<Vec<_>>(),
        [
            "agents",
            "in_sync",
            "memory",
            "nginx",
            "now",
            "since",
            "stream_upstreams",
            "thread",
            "upstreams",
            "version"
        ]
    );
    assert_eq!(all["version"], 1);
    assert_eq!(all["now"], "2026-03-02T14:03:11.482Z");
    assert_eq!(all["in_sync"], false);
    assert_eq!(all["since"], "2026-03-02T14:03:01.482Z");
    assert_eq!(
        all["nginx"],
        json!({"version": "1.30.2", "module": "1.0.0",
            "load_timestamp": "2026-03-01T08:03:11.482Z", "pid": 4711})
    );
    assert_eq!(
        all["thread"],
        json!({"state": "running", "pid": 4710, "started": "2026-03-01T08:03:11.482Z",
            "heartbeat": "2026-03-02T14:03:11.482Z", "restarts": 0})
    );
    assert_eq!(
        all["agents"],
        json!([{"address": "http://127.0.0.1:8500", "up": true, "version": "1.8.7",
            "connections": 3, "max_connections": 100}])
    );
    assert_eq!(all["memory"], json!({"answers": 182_344, "zone_size": 131_072}));
}

#[test]
fn an_upstream() {
    let mut all = read(Sample::new(NOW), "/");
    let app = all["upstreams"]["app"].take();
    let expected = json!({
        "zone": "app", "sync": "held", "in_sync": false, "since": "2026-03-02T14:03:01.482Z",
        "last_change": "2026-03-02T13:40:07.004Z", "held": 1,
        "held_until": "2026-03-02T14:03:31.482Z", "panic": false, "zombies": 0,
        "updates": {"applied": 41, "held": 1, "refused": 0}, "retried_gets": 3,
        "memory": {"size": 1_048_576, "used": 40_960, "fits_more": 950},
        "sources": [{"id": 1, "service": "web", "tags": ["app"], "dc": null, "health": "passing",
            "filter": null, "backup": false, "address": "http://127.0.0.1:8500",
            "last_success": "2026-03-02T14:03:01.482Z", "index": 1234, "answers": 512,
            "next_try": null,
            "errors": {"transport": 3, "status": 0, "denied": 0, "invalid": 0},
            "registered": 6, "serving": 4, "excluded": {"maintenance": 1, "tag": 1},
            "last_error": {"time": "2026-03-02T11:20:00.000Z", "cause": "transport",
                "text": "connection refused"}}],
        "excluded": [
            {"source": 1, "service_id": "web-1", "node": "n1", "address": "10.0.0.1:8080",
                "reason": "maintenance", "status": "maintenance",
                "detail": "_service_maintenance:web-1", "since": "2026-03-02T13:40:07.004Z"},
            {"source": 1, "service_id": "web-2", "node": "n1", "address": "10.0.0.2:8080",
                "reason": "tag", "status": "passing", "detail": "app",
                "since": "2026-03-02T13:40:07.004Z"}],
        "excluded_omitted": 0,
        "changes": [
            {"time": "2026-03-02T13:40:07.004Z", "index": 1201, "added": 1, "removed": 1,
                "changed": 0, "first": ["+10.0.0.3:8080", "-10.0.0.1:8080"]},
            {"time": "2026-03-02T11:26:47.004Z", "index": 1188, "added": 1, "removed": 1,
                "changed": 0, "first": ["+10.0.0.3:8080", "-10.0.0.1:8080"]}],
    });
    for (field, value) in expected.as_object().unwrap() {
        assert_eq!(&app[field], value, "{field}");
    }
    // And the peers, nothing else.
    assert_eq!(app.as_object().unwrap().len(), expected.as_object().unwrap().len() + 1);
}

#[test]
fn a_peer_and_a_static_server() {
    let all = read(Sample::new(NOW), "/");
    let peers = &all["upstreams"]["app"]["peers"];
    let expected = json!({
        "id": 17, "server": "10.0.0.3:8080", "name": "web", "backup": false, "weight": 1,
        "effective_weight": 1, "state": "up", "active": 2, "max_conns": 0, "requests": 8812,
        "responses": {"1xx": 0, "2xx": 8790, "3xx": 12, "4xx": 9, "5xx": 0, "total": 8811},
        "sent": 912_220, "received": 48_213_321, "fails": 1, "unavail": 0, "downtime": 0,
        "downstart": null, "selected": "2026-03-02T14:03:11.470Z", "header_time": 8,
        "response_time": 11, "source": 1, "service_id": "web-3", "node": "n2",
        "datacenter": "dc1", "status": "critical", "kept_by": "guard",
        "since": "2026-03-02T13:40:07.004Z", "ignored_meta": ["nginx_weight"],
    });
    assert_eq!(peers[0], expected);

    // What is not known of a static server is null, never 0.
    let known =
        ["server", "name", "backup", "weight", "effective_weight", "state", "active", "max_conns"];
    let fixed = peers[3].as_object().unwrap();
    assert_eq!(fixed.len(), expected.as_object().unwrap().len());
    for (field, value) in fixed {
        assert_eq!(!value.is_null(), known.contains(&&**field), "{field}");
    }
}

#[test]
fn both_protocols_and_names_that_are_equal() {
    let all = read(Sample::new(NOW), "/");
    let names = |of: &str| all[of].as_object().unwrap().keys().cloned().collect::<Vec<_>>();
    assert_eq!(names("upstreams"), ["api", "app"]);
    assert_eq!(names("stream_upstreams"), ["app"]);
    assert_eq!(all["stream_upstreams"]["app"]["zombies"], Value::Null);
    assert_eq!(all["stream_upstreams"]["app"]["peers"][0]["server"], "[fd00::0]:25");

    // One name: of both, and nothing else of the document changes.
    let one = read(Sample::new(NOW), "/upstreams/app");
    assert_eq!(one["upstreams"].as_object().unwrap().len(), 1);
    assert_eq!(one["upstreams"]["app"], all["upstreams"]["app"]);
    assert_eq!(one["stream_upstreams"], all["stream_upstreams"]);
    assert_eq!(one["since"], all["since"]);
    let one = read(Sample::new(NOW), "/upstreams/api");
    assert_eq!(one["upstreams"].as_object().unwrap().len(), 1);
    assert_eq!(one["stream_upstreams"], json!({}));

    let error = Sample::new(NOW).answer("/upstreams/none", "").err();
    assert_eq!(error, Some(Error::Upstream));
}

#[test]
fn every_mix_of_protocols_is_a_document() {
    use Protocol::{Http, Stream};
    for order in [&[][..], &[Http], &[Stream], &[Http, Http], &[Stream, Http, Stream, Http]] {
        let mut sample = Sample::new(NOW);
        sample.document.upstreams.clear();
        sample.peers.clear();
        for (nth, protocol) in order.iter().enumerate() {
            sample.push(upstream(&format!("u{nth}"), *protocol, NOW), Vec::new());
        }
        let all = read(sample, "/");
        let count = |of: &str| all[of].as_object().unwrap().len();
        let wanted = |wanted| order.iter().filter(|protocol| **protocol == wanted).count();
        assert_eq!(count("upstreams"), wanted(Http));
        assert_eq!(count("stream_upstreams"), wanted(Stream));
    }
}

#[test]
fn nothing_is_known_yet() {
    let mut sample = Sample::new(NOW);
    sample.document.since = None;
    sample.document.thread = Thread {
        state: ThreadState::Starting,
        pid: None,
        started: None,
        heartbeat: None,
        restarts: 0,
    };
    sample.document.memory.answers = None;
    sample.document.agents[0].version = None;
    let api = &mut sample.document.upstreams[1];
    api.sync = Sync::Starting;
    (api.since, api.last_change, api.memory.fits_more) = (None, None, None);
    let source = &mut api.sources[0];
    (source.last_success, source.index, source.address) = (None, None, None);
    (source.registered, source.answers, source.serving) = (None, 0, 0);
    let all = read(sample, "/");
    assert_eq!(
        all["thread"],
        json!({"state": "starting", "pid": null, "started": null, "heartbeat": null, "restarts": 0})
    );
    assert_eq!((&all["since"], &all["memory"]["answers"]), (&Value::Null, &Value::Null));
    assert_eq!(all["agents"][0]["version"], Value::Null);
    let api = &all["upstreams"]["api"];
    for field in ["since", "last_change", "held_until"] {
        assert_eq!(api[field], Value::Null, "{field}");
    }
    assert_eq!(api["memory"]["fits_more"], Value::Null);
    for field in ["last_success", "index", "address", "registered", "last_error", "next_try"] {
        assert_eq!(api["sources"][0][field], Value::Null, "{field}");
    }
}

#[test]
fn every_word() {
    let mut sample = Sample::new(NOW);
    for sync in Sync::ALL {
        let mut one = upstream(sync.word(), Protocol::Http, NOW);
        one.sync = *sync;
        for reason in Reason::ALL {
            one.excluded.push(excluded(reason.word(), "", *reason, "", NOW));
            one.sources[0].excluded.set(*reason, 1);
        }
        one.excluded_omitted = 5;
        sample.push(one, Vec::new());
    }
    let all = read(sample, "/");
    for word in ["denied", "refused", "stale", "panic", "held", "restored", "starting", "in-sync"] {
        let one = &all["upstreams"][word];
        assert_eq!(one["sync"], word);
        assert_eq!(one["in_sync"], word == "in-sync");
        assert_eq!(one["excluded_omitted"], 5);
        let reasons = [
            "critical",
            "warning",
            "maintenance",
            "tag",
            "weight-0",
            "invalid-address",
            "unresolved",
            "no-port",
            "invalid-port",
            "duplicate",
            "not-applied",
        ];
        assert_eq!(one["excluded"].as_array().unwrap().len(), reasons.len());
        for (nth, reason) in reasons.iter().enumerate() {
            assert_eq!(one["excluded"][nth]["reason"], *reason);
            assert_eq!(one["sources"][0]["excluded"][reason], 1);
        }
    }
}

#[test]
fn a_long_list_of_tags_is_cut() {
    let mut sample = Sample::new(NOW);
    sample.document.upstreams[1].sources[0].tags =
        (0..100).map(|n| format!("tag-{n:05}").into()).collect();
    let all = read(sample, "/");
    let tags = all["upstreams"]["api"]["sources"][0]["tags"].as_array().unwrap();
    assert_eq!((tags.len(), &tags[24], &tags[25]), (26, &json!("tag-00024"), &json!("…")));
}

#[test]
fn hostile_text_is_text() {
    let text = "</script><script>\"\\\u{2028}\n\u{202E}\u{0}".repeat(8);
    for bytes in [text.as_bytes(), b"\xff\xc0\x80\xed\xa0\x80", b"\\", b"\""] {
        let mut sample = Sample::new(NOW);
        sample.push_hostile(bytes, NOW);
        let written = sample.text("/", "format=json");
        assert!(!written.contains(['<', '>', '&', '\u{2028}', '\u{202E}', '\0']));
        let all: Value = serde_json::from_str(&written).unwrap();
        let shown = all["upstreams"]["hostile"]["peers"][0]["service_id"].as_str().unwrap();
        assert!(shown.len() <= 88);
        assert!(bytes[0] != b'<' || shown.starts_with("</script><script>\"\\\u{2028}\u{FFFD}"));
    }
}
