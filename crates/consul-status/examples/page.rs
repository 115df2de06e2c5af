//! The status page of an nginx that does not exist, to be looked at in a browser.
//!
//! `cargo run -p consul-status --example page [PORT]`, then open what it prints. Every request
//! finds one instance more in the upstream `shop`.

#[path = "../tests/common/mod.rs"]
mod common;

use std::env;
use std::error::Error;
use std::net::{Ipv4Addr, TcpListener};
use std::time::SystemTime;

use common::{Sample, peer, server, upstream};
use consul_status::Time;
use consul_status::model::{Protocol, Reason, Sync};

fn main() -> Result<(), Box<dyn Error>> {
    let port = env::args().nth(1).map_or(Ok(0), |port| port.parse())?;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port))?;
    println!("http://{}{}", listener.local_addr()?, server::PREFIX);
    server::serve(&listener, story);
    Ok(())
}

fn story(nth: u64) -> Sample {
    let now = Time::from(SystemTime::now()).millis();
    let mut sample = Sample::new(now);

    let shop = upstream("shop", Protocol::Http, now);
    let peers = (0..3 + nth % 20)
        .map(|n| peer(100 + n, &format!("10.0.2.{n}:8080"), &format!("shop-{n}"), now));
    sample.push(shop, peers.collect());

    let mut large = upstream("search", Protocol::Http, now);
    large.memory.used = 900_000;
    let peers = (0..1200_u64).map(|n| {
        let server = format!("10.1.{}.{}:8080", n / 250, n % 250);
        peer(1000 + n, &server, &format!("search-{n}"), now)
    });
    sample.push(large, peers.collect());

    let mut stale = upstream("billing", Protocol::Http, now);
    stale.sync = Sync::Stale;
    stale.since = Some(Time::from_millis(now - 190_000));
    stale.sources[0].stale = true;
    stale.sources[0].last_success = Some(Time::from_millis(now - 267_000));
    stale.sources[0].next_try = Some(Time::from_millis(now + 4_000));
    for reason in Reason::ALL {
        let id = format!("billing-{}", reason.word());
        stale.excluded.push(common::excluded(&id, "10.0.3.1:70000", *reason, "detail", now));
        stale.sources[0].excluded.set(*reason, 1);
    }
    stale.sources[0].excluded.set(Reason::Critical, 18);
    stale.sources[0].serving = 0;
    stale.sources[0].registered = Some(28);
    stale.excluded_omitted = 17;
    sample.push(stale, Vec::new());

    let text = "<script>alert(1)</script>\"'&\u{202E}gnp.exe\u{2066} and so on".repeat(5);
    sample.push_hostile(text.as_bytes(), now);
    sample
}
