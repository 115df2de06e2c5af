//! One large answer: how long it takes until it is judged, and how much memory, beside what the
//! library it is read with needs to read it as plain JSON. `benches/README.md` of the repository
//! tells how to read the table.

use std::fs;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use consul_watch::health::Reader;
use consul_watch::policy::select;
use consul_watch::query::Network;
use consul_watch::{Selection, Snapshot};
use serde_json::{Value, json};

#[path = "../../../benches/common/figure.rs"]
mod figure;

use figure::Figure;

/// The bars: judged within this time, and with so many times the body's size of memory, the body
/// itself included.
const TIME: Duration = Duration::from_secs(3);
const MEMORY: f64 = 3.0;

/// What [`main`] calls itself with: memory is measured in a process of its own for each way.
const ROLE: &str = "ANSWER_ROLE";

fn main() -> ExitCode {
    let quick = std::env::args().any(|arg| arg == "--quick");
    let instances = if quick { 2_000 } else { 100_000 };
    if let Ok(role) = std::env::var(ROLE) {
        measure(&role, instances);
        return ExitCode::SUCCESS;
    }
    println!("answer: {instances} instances in one answer of Consul\n");
    println!("{:<36} {:>9} {:>9} {:>14}", "", "body, MB", "time, s", "memory / body");
    let mut results = Vec::new();
    for (role, name) in [
        ("again", "the same, once more, one changed"),
        ("judge", "read and judged"),
        ("value", "read as serde_json::Value"),
    ] {
        let output = Command::new(std::env::current_exe().expect("a path"))
            .args(std::env::args().skip(1))
            .env(ROLE, role)
            .output()
            .expect("itself");
        let text = String::from_utf8_lossy(&output.stdout);
        let numbers: Vec<f64> = text.split(' ').filter_map(|n| n.trim().parse().ok()).collect();
        let [body, time, memory] = numbers[..] else { panic!("{role}: {output:?}") };
        println!("{name:<36} {:>9.1} {time:>9.2} {:>14.2}", body / 1e6, memory / body);
        results.push((time, memory / body));
    }
    let [again, ours, theirs] = results[..] else { unreachable!("three roles") };
    println!("{:<36} {:>9} {:>8.1}x {:>13.1}x", "", "", theirs.0 / ours.0, theirs.1 / ours.1);
    let note = |what: &str, ours, rival, bar| {
        let what = format!("{instances} instances: {what}");
        Figure { bench: "answer", what: &what, ours, rival: Some(rival), bar }.note();
    };
    let value = |theirs| ("serde_json::Value", theirs);
    note("read and judged, s", ours.0, value(theirs.0), Some(TIME.as_secs_f64()));
    note("memory, in bodies", ours.1, value(theirs.1), Some(MEMORY));
    note("with one changed, s", again.0, ("the first time", ours.0), None);
    if quick || (ours.0 <= TIME.as_secs_f64() && ours.1 <= MEMORY) {
        return ExitCode::SUCCESS;
    }
    println!("\nover the bar: {} s and {MEMORY} times the body", TIME.as_secs());
    ExitCode::FAILURE
}

fn measure(role: &str, instances: usize) {
    let mut reader = Reader::new(Network::Lan);
    let mut body = body(instances);
    if role == "again" {
        reader.read(&body).expect("an answer");
        let half = body.len() / 2;
        let at = body[half..].iter().position(|byte| *byte == b'8').expect("a number");
        body[half + at] = b'9';
    }
    let begin = Instant::now();
    let kept: Box<dyn std::any::Any> = match role {
        "judge" | "again" => {
            let listing = reader.read(&body).expect("an answer");
            let snapshot = Snapshot { instances: listing.instances.into(), ..Default::default() };
            let selection = Selection::default();
            let verdict = select(&selection, &snapshot);
            let serving = selection.guard().judge(&verdict, tokio::time::Instant::now());
            assert_eq!(serving.peers.len() + verdict.excluded.len(), instances);
            Box::new((reader, snapshot, serving))
        }
        _ => Box::new(serde_json::from_slice::<Value>(&body).expect("JSON")),
    };
    let time = begin.elapsed();
    println!("{} {} {}", body.len(), time.as_secs_f64(), peak());
    drop(kept);
}

/// The most memory that was resident, in bytes (`VmHWM` of proc(5)).
fn peak() -> f64 {
    let status = fs::read_to_string("/proc/self/status").expect("Linux");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("proc(5)");
    let kb: f64 = line.trim().trim_end_matches(" kB").parse().expect("a number");
    kb * 1024.0
}

/// As Consul 1.8.7 writes it, indentation apart.
fn body(instances: usize) -> Vec<u8> {
    let entry = |n: usize| {
        let ip = format!("10.{}.{}.{}", n >> 16 & 255, n >> 8 & 255, n & 255);
        let id = format!("web-{n:06}");
        let check = |id: &str, service: &str, status: &str| {
            json!({
                "Node": format!("node-{:04}", n / 20), "CheckID": id, "Name": "Service 'web' check",
                "Status": status, "Notes": "", "ServiceID": service, "ServiceName": "web",
                "Output": "HTTP GET http://10.0.0.1:8080/health: 200 OK Output: ok",
                "ServiceTags": ["app", "v1"], "Type": "http", "Definition": {},
                "CreateIndex": 1000 + n, "ModifyIndex": 2000 + n,
            })
        };
        let status = if n.is_multiple_of(50) { "critical" } else { "passing" };
        json!({
            "Node": {
                "ID": "8e436485-73d7-9990-525d-41ec8e7a9e5b", "Node": format!("node-{:04}", n / 20),
                "Address": ip, "Datacenter": "dc1",
                "TaggedAddresses": {"lan": ip, "lan_ipv4": ip, "wan": ip, "wan_ipv4": ip},
                "Meta": {"consul-network-segment": ""}, "CreateIndex": 5, "ModifyIndex": 9,
            },
            "Service": {
                "ID": id, "Service": "web", "Tags": ["app", "v1"], "Address": ip,
                "TaggedAddresses": {
                    "lan_ipv4": {"Address": ip, "Port": 8080},
                    "wan_ipv4": {"Address": ip, "Port": 8080},
                },
                "Meta": {"version": "1.2.3", "nginx_weight": "2"}, "Port": 8080,
                "Weights": {"Passing": 1, "Warning": 1}, "EnableTagOverride": false,
                "Proxy": {"MeshGateway": {}, "Expose": {}}, "Connect": {},
                "CreateIndex": 1000 + n, "ModifyIndex": 2000 + n,
            },
            "Checks": [check("serfHealth", "", "passing"), check(&format!("service:{id}"), &id, status)],
        })
        .to_string()
    };
    let mut body = b"[".to_vec();
    for n in 0..instances {
        if n > 0 {
            body.push(b',');
        }
        body.extend_from_slice(entry(n).as_bytes());
    }
    body.push(b']');
    body.shrink_to_fit();
    body
}
