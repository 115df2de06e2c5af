//! Several answers in a row, judged: whatever Consul says serves does, nothing in maintenance
//! serves, no address serves twice, and what is held is let go in time.

#![no_main]

use std::collections::HashSet;
use std::net::SocketAddr;
use std::time::Duration;

use consul_watch::health::parse;
use consul_watch::policy::guard::Settings;
use consul_watch::policy::{KeptBy, Reason, select};
use consul_watch::query::Network;
use consul_watch::{Health, Selection, Snapshot};
use libfuzzer_sys::fuzz_target;
use tokio::time::Instant;

const HOLD: Duration = Duration::from_secs(30);

// The first bytes are the settings; the rest are answers, each up to a line's end.
fuzz_target!(|data: &[u8]| {
    let Some((&[guard, panic, health, tags], answers)) = data.split_first_chunk() else { return };
    let selection = Selection {
        tags: if tags % 2 == 0 { Vec::new() } else { vec!["app".into()] },
        health: [Health::Passing, Health::Warning, Health::Any][usize::from(health % 3)],
        weight: (tags % 3 == 0).then_some(7),
        guard: Settings { guard: guard % 101, hold: HOLD },
        panic: panic % 101,
    };
    let mut line = selection.guard();
    let mut now = Instant::now();
    for body in answers.split(|byte| *byte == b'\n') {
        let Ok(listing) = parse(body, Network::Lan) else { continue };
        now += Duration::from_secs(u64::from(body.len() as u8 % 40));
        let snapshot = Snapshot {
            index: 1,
            instances: listing.instances.into(),
            datacenter: listing.datacenter,
            names: Default::default(),
        };
        let verdict = select(&selection, &snapshot);
        let serving = line.judge(&verdict, now);

        // Two registrations can have one node and ID; the later one counts.
        let wanted: HashSet<_> = verdict.serve.iter().map(|peer| peer.key()).collect();
        let keys: HashSet<_> = serving.peers.iter().map(|peer| peer.key()).collect();
        assert!(wanted.is_subset(&keys));
        for excluded in &verdict.excluded {
            if excluded.reason == Reason::Maintenance && !wanted.contains(&excluded.key) {
                assert!(!keys.contains(&excluded.key));
            }
        }
        let mut addresses: HashSet<SocketAddr> = HashSet::new();
        for peer in &serving.peers {
            assert!(peer.weight >= 1 && !peer.addresses.is_empty());
            assert!(peer.addresses.iter().all(|address| addresses.insert(*address)));
            let held = serving.held.contains(&peer.key());
            assert_eq!(held, peer.kept_by == Some(KeptBy::Guard));
        }
        assert_eq!(serving.until.is_some(), !serving.held.is_empty());
        assert!(serving.until.is_none_or(|until| until > now && until <= now + HOLD));
    }
});
