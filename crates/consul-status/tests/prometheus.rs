//! Prometheus' text, read by a parser of our own and, where there is one, by promtool.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::process::{Command, Stdio};

use common::{NOW, Sample, fixed, peer, upstream};
use consul_status::model::*;

/// A sample's name and labels, as they are written, and its value.
type Samples = BTreeMap<String, f64>;

/// Reads the text, and refuses what a scraper would.
fn read(text: &str) -> Samples {
    assert!(text.ends_with('\n'));
    let (mut samples, mut known) = (Samples::new(), BTreeSet::new());
    let mut family = String::new();
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            family = rest.split(' ').next().unwrap().to_owned();
            assert!(known.insert(family.clone()), "{family} is there twice");
        } else if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').unwrap();
            assert_eq!(name, family);
            assert_eq!(kind == "counter", name.ends_with("_total"), "{rest}");
        } else {
            // No value has a space in it, and no label of ours ends in one.
            let (name, value) = line.rsplit_once(' ').unwrap();
            assert_eq!(name.split('{').next(), Some(&*family), "{line}");
            assert!(name.starts_with("nginx_consul_"));
            let before = samples.insert(name.to_owned(), value.parse().unwrap());
            assert_eq!(before, None, "{name} is there twice");
        }
    }
    samples
}

fn get(samples: &Samples, name: &str) -> f64 {
    let name = format!("nginx_consul_{name}");
    *samples.get(&name).unwrap_or_else(|| panic!("no {name} in {samples:#?}"))
}

fn scrape(sample: Sample, args: &str) -> Samples {
    read(&sample.text("/", &format!("format=prometheus&{args}")))
}

fn of(samples: &Samples, begin: &str) -> usize {
    samples.keys().filter(|name| name.starts_with(&format!("nginx_consul_{begin}"))).count()
}

#[test]
fn values() {
    let all = scrape(Sample::new(NOW), "");
    let app = "upstream=\"app\",protocol=\"http\"";
    for (name, value) in [
        ("build_info{version=\"1.0.0\",nginx=\"1.30.2\"}", 1.0),
        ("thread_up", 1.0),
        ("thread_restarts_total", 0.0),
        ("memory_bytes", 182_344.0),
        ("agent_up{address=\"http://127.0.0.1:8500\"}", 1.0),
        ("agent_connections{address=\"http://127.0.0.1:8500\"}", 3.0),
        ("agent_connections_max{address=\"http://127.0.0.1:8500\"}", 100.0),
        ("upstream_in_sync{}", 0.0),
        ("upstream_held_removals{}", 1.0),
        ("upstream_panic{}", 0.0),
        ("upstream_last_change_timestamp_seconds{}", 1_772_458_807.004),
        ("upstream_servers{,state=\"up\"}", 3.0),
        ("upstream_servers{,state=\"unavail\"}", 1.0),
        ("upstream_servers{,state=\"down\"}", 0.0),
        ("upstream_updates_total{,result=\"applied\"}", 41.0),
        ("upstream_updates_total{,result=\"held\"}", 1.0),
        ("upstream_updates_total{,result=\"refused\"}", 0.0),
        ("upstream_zone_size_bytes{}", 1_048_576.0),
        ("upstream_zone_used_bytes{}", 40_960.0),
        ("upstream_zombies{}", 0.0),
        ("upstream_servers_omitted{}", 0.0),
        ("upstream_retried_gets_total{}", 3.0),
        ("source_info{,source=\"1\",service=\"web\",tags=\"app\",dc=\"\"}", 1.0),
        ("source_last_success_timestamp_seconds{,source=\"1\"}", 1_772_460_181.482),
        ("source_stale{,source=\"1\"}", 0.0),
        ("source_answers_total{,source=\"1\"}", 512.0),
        ("source_index{,source=\"1\"}", 1234.0),
        ("source_registered{,source=\"1\"}", 6.0),
        ("source_errors_total{,source=\"1\",cause=\"transport\"}", 3.0),
        ("source_errors_total{,source=\"1\",cause=\"invalid\"}", 0.0),
        ("source_excluded{,source=\"1\",reason=\"tag\"}", 1.0),
        // Not 0 once: the series goes on.
        ("source_excluded{,source=\"1\",reason=\"critical\"}", 0.0),
        (
            "upstream_server_info{,server=\"10.0.0.3:8080\",service_id=\"web-3\",node=\"n2\",\
             datacenter=\"dc1\",backup=\"false\"}",
            1.0,
        ),
        ("upstream_server_state{,server=\"10.0.0.3:8080\"}", 1.0),
        ("upstream_server_state{,server=\"10.0.0.5:8080\"}", 4.0),
        ("upstream_server_active{,server=\"10.0.0.3:8080\"}", 2.0),
        ("upstream_server_limit{,server=\"10.0.0.3:8080\"}", 0.0),
        ("upstream_server_weight{,server=\"127.0.0.1:8081\"}", 1.0),
        ("upstream_server_requests_total{,server=\"10.0.0.3:8080\"}", 8812.0),
        ("upstream_server_responses_total{,server=\"10.0.0.3:8080\",code=\"2xx\"}", 8790.0),
        ("upstream_server_sent_bytes_total{,server=\"10.0.0.3:8080\"}", 912_220.0),
        ("upstream_server_received_bytes_total{,server=\"10.0.0.3:8080\"}", 48_213_321.0),
        ("upstream_server_fails_total{,server=\"10.0.0.3:8080\"}", 1.0),
        ("upstream_server_unavail_total{,server=\"10.0.0.3:8080\"}", 0.0),
        ("upstream_server_header_seconds_total{,server=\"10.0.0.3:8080\"}", 70.496_123),
        ("upstream_server_response_seconds_total{,server=\"10.0.0.3:8080\"}", 96.932),
    ] {
        let name = match name.split_once('{') {
            Some((metric, labels))
                if metric.starts_with("upstream") || metric.starts_with("source") =>
            {
                format!("{metric}{{{app}{labels}")
            }
            _ => name.to_owned(),
        };
        assert_eq!(get(&all, &name), value, "{name}");
    }
    // Nothing is counted of static servers, and what is not known has no sample.
    assert!(!all.keys().any(|name| name.contains("requests") && name.contains("8081")));
    assert!(!all.keys().any(|name| name.contains("zombies") && name.contains("stream\"")));
    assert!(!all.keys().any(|name| name.contains("reason=\"warning\"")));
}

/// The sums that the documentation names.
#[test]
fn how_many_series() {
    let count = |sources: usize, peers: u64| {
        let mut sample = Sample::new(NOW);
        let mut one = upstream("one", Protocol::Http, NOW);
        let source = one.sources[0].clone();
        one.sources = (1..).take(sources).map(|id| Source { id, ..source.clone() }).collect();
        let peers = (0..peers).map(|n| peer(n, &format!("10.0.0.{n}:80"), "x", NOW)).collect();
        (sample.document.upstreams, sample.peers) = (Vec::new(), Vec::new());
        sample.push(one, peers);
        let all = scrape(sample, "");
        all.keys().filter(|name| name.contains("upstream=")).count()
    };
    assert_eq!(count(1, 0), 25);
    assert_eq!(count(3, 0), 25 + 20);
    assert_eq!(count(1, 1), 25 + 17);
    assert_eq!(count(1, 7), 25 + 7 * 17);
}

fn many(sample: &mut Sample, name: &str, count: u64) {
    let peers = (0..count).map(|n| peer(n, &format!("10.0.{}.{}:80", n / 250, n % 250), "x", NOW));
    sample.push(upstream(name, Protocol::Http, NOW), peers.collect());
}

#[test]
fn five_hundred_peers_and_whole_upstreams() {
    let sample = || {
        let mut sample = Sample::new(NOW);
        (sample.document.upstreams, sample.peers) = (Vec::new(), Vec::new());
        for (name, count) in [("a", 300), ("b", 300), ("c", 200), ("d", 1)] {
            many(&mut sample, name, count);
        }
        sample
    };
    let all = scrape(sample(), "");
    assert_eq!(of(&all, "upstream_server_state"), 500);
    assert_eq!(of(&all, "upstream_server_state{upstream=\"b\""), 0);
    assert_eq!(of(&all, "upstream_server_"), 500 * 17);
    for (name, omitted) in [("a", 0.0), ("b", 300.0), ("c", 0.0), ("d", 1.0)] {
        let metric = format!("upstream_servers_omitted{{upstream=\"{name}\",protocol=\"http\"}}");
        assert_eq!(get(&all, &metric), omitted);
    }

    let none = scrape(sample(), "peers=none");
    assert_eq!(of(&none, "upstream_server_"), 0);
    assert_eq!(of(&none, "upstream_servers_omitted"), 4);
    // All upstreams are there all the same.
    assert_eq!(of(&none, "upstream_in_sync"), 4);

    let mut large = sample();
    many(&mut large, "large", 2000);
    let text = large.text("/upstreams/large", "format=prometheus&peers=all");
    assert_eq!(of(&read(&text), "upstream_server_state"), 2000);
    let mut large = sample();
    many(&mut large, "large", 2000);
    let text = large.text("/upstreams/large", "format=prometheus");
    assert_eq!(of(&read(&text), "upstream_server_state"), 0);
}

/// More peers came since they were counted: the bound holds all the same.
#[test]
fn rows_count_and_not_what_was_expected() {
    let mut sample = Sample::new(NOW);
    (sample.document.upstreams, sample.peers) = (Vec::new(), Vec::new());
    many(&mut sample, "a", 600);
    sample.document.upstreams[0].servers.up = 10;
    let all = scrape(sample, "");
    assert_eq!(of(&all, "upstream_server_state"), 0);
    assert_eq!(get(&all, "upstream_servers_omitted{upstream=\"a\",protocol=\"http\"}"), 600.0);
}

#[test]
fn rows_with_one_server_are_merged() {
    let mut sample = Sample::new(NOW);
    let mut second = peer(2, "10.0.0.1:80", "second", NOW);
    second.weight = 7;
    second.state = PeerState::Down;
    second.counters.as_mut().unwrap().response_time_total = 500_000;
    // Shown the same, although it is not: a label must not be there twice.
    let mut third = peer(3, "", "third", NOW);
    third.server = "10.0.0.1:80\u{1}".into();
    let mut fourth = peer(4, "", "fourth", NOW);
    fourth.server = "10.0.0.1:80\u{2}".into();
    let peers =
        vec![peer(1, "10.0.0.1:80", "first", NOW), second, third, fourth, fixed("10.0.0.1:80")];
    sample.push(upstream("m", Protocol::Http, NOW), peers);
    let all = scrape(sample, "");
    assert_eq!(of(&all, "upstream_server_state{upstream=\"m\""), 2);
    let labels = "{upstream=\"m\",protocol=\"http\",server=\"10.0.0.1:80\"}";
    let value = |name: &str| get(&all, &format!("upstream_server_{name}{labels}"));
    assert_eq!(value("requests_total"), 2.0 * 8812.0);
    assert_eq!(value("response_seconds_total"), 97.432);
    assert_eq!((value("weight"), value("state"), value("active")), (1.0, 1.0, 2.0));
    assert_eq!(of(&all, "upstream_server_info{upstream=\"m\""), 2);
}

#[test]
fn a_thread_that_is_silent_is_not_up() {
    for (age, up) in [(0, 1.0), (14_999, 1.0), (15_000, 0.0)] {
        let mut sample = Sample::new(NOW);
        sample.document.thread.heartbeat = Some(consul_status::Time::from_millis(NOW - age));
        assert_eq!(get(&scrape(sample, ""), "thread_up"), up);
    }
    let mut sample = Sample::new(NOW);
    sample.document.thread.heartbeat = None;
    assert_eq!(get(&scrape(sample, ""), "thread_up"), 0.0);
}

#[test]
fn promtool_has_no_objection() {
    let mut sample = Sample::new(NOW);
    sample.push_hostile("\"} 1\nnginx_consul_thread_up 7\\\"{\u{202E}".repeat(9).as_bytes(), NOW);
    let text = sample.text("/", "format=prometheus");
    assert_eq!(text.matches("\nnginx_consul_thread_up ").count(), 1);
    let Some(promtool) = promtool(&["check", "metrics"], &text) else { return };
    assert!(promtool.is_empty(), "{promtool}");
    // It is really read.
    assert!(!self::promtool(&["check", "metrics"], &format!("{text}x{{\n")).unwrap().is_empty());
}

#[test]
fn promtool_knows_the_rules() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../nginx-conf/prometheus-rules.yml");
    let Some(said) = promtool(&["check", "rules", path], "") else { return };
    assert!(said.contains("SUCCESS: 3 rules found"), "{said}");
    let tests = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/rules.yml");
    let said = promtool(&["test", "rules", tests], "").unwrap();
    assert!(said.contains("SUCCESS"), "{said}");
}

/// Every metric that the rules and the dashboard ask for is there, with the labels they ask for.
#[test]
fn rules_and_dashboard_name_what_there_is() {
    let mut sample = Sample::new(NOW);
    sample.push_hostile(b"x", NOW);
    let all = scrape(sample, "");
    let known: BTreeSet<&str> = all.keys().map(|name| name.split('{').next().unwrap()).collect();
    for (file, least) in
        [("nginx-conf/prometheus-rules.yml", 4), ("docs/grafana-dashboard.json", 20)]
    {
        let path = format!("{}/../../{file}", env!("CARGO_MANIFEST_DIR"));
        let text = std::fs::read_to_string(path).unwrap();
        let names: BTreeSet<&str> = text
            .split(|c: char| !c.is_ascii_alphanumeric() && c != '_')
            .filter(|word| word.starts_with("nginx_consul_"))
            .collect();
        assert!(names.len() >= least, "{names:?}");
        for name in names {
            assert!(known.contains(name), "{file}: {name}");
        }
    }
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/grafana-dashboard.json");
    let _: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
}

/// What promtool says to this, if there is one.
fn promtool(args: &[&str], input: &str) -> Option<String> {
    let child = Command::new("promtool")
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let Ok(mut child) = child else {
        println!("skipped: there is no promtool (Debian's package prometheus has it)");
        return None;
    };
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    Some(String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned())
}
