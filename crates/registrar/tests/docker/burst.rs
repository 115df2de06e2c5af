//! Many containers at once, and what they leave behind.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use testbed::eventually;

use crate::bed::{Bed, PUBLISHED, Registrar, id};

/// How many, unless `REGISTRAR_BURST` says otherwise: what two cores start in half a minute.
const BURST: usize = 40;

/// How many are started at a time.
const AT_ONCE: usize = 4;

/// How long after the last event all has to be as it should.
const CONVERGED: Duration = Duration::from_secs(10);

/// What may be kept of containers that are gone, beside what an allocator keeps for itself.
const KEPT: u64 = 4 << 20;

fn burst() -> usize {
    std::env::var("REGISTRAR_BURST").ok().and_then(|n| n.parse().ok()).unwrap_or(BURST)
}

#[test]
fn many_come_and_go() {
    let Some(bed) = Bed::new("burst") else { return };
    let registrar = bed.registrar(&[]);
    // The first round fills caches and pools.
    come_and_go(&bed, BURST.min(burst()));
    let before = resident(&registrar);
    come_and_go(&bed, burst());
    let after = resident(&registrar);
    eprintln!("resident before {} KiB, after {} KiB", before >> 10, after >> 10);
    assert!(after <= before + KEPT, "{before} bytes before, {after} after");
}

fn come_and_go(bed: &Bed, number: usize) {
    let containers: Vec<_> = thread::scope(|scope| {
        let starters: Vec<_> = (0..AT_ONCE)
            .map(|n| {
                let share = number / AT_ONCE + usize::from(n < number % AT_ONCE);
                scope.spawn(move || {
                    let start = |_| bed.container("burst", &PUBLISHED);
                    (0..share).map(start).collect::<Vec<_>>()
                })
            })
            .collect();
        starters.into_iter().flat_map(|starter| starter.join().unwrap()).collect()
    });
    let ids: Vec<String> = containers.iter().map(|container| id(container, 80)).collect();
    let there = |wanted: bool| {
        let begun = Instant::now();
        eventually(CONVERGED, &format!("{number} containers: registered {wanted}"), || {
            let services = bed.services();
            let wrong = ids.iter().filter(|id| services.contains_key(*id) != wanted).count();
            if wrong == 0 { Ok(()) } else { Err(format!("{wrong} of {number} are not so yet")) }
        });
        eprintln!("{number} containers, registered {wanted}: {:?} after the last", begun.elapsed());
    };
    there(true);
    thread::scope(|scope| {
        let mut containers = containers.into_iter();
        while containers.len() > 0 {
            let some: Vec<_> = containers.by_ref().take(number.div_ceil(AT_ONCE)).collect();
            scope.spawn(move || drop(some));
        }
    });
    there(false);
}

/// What the process has in memory, in bytes.
fn resident(registrar: &Registrar) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", registrar.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}
