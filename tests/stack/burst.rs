//! Many containers at once.

use std::time::{Duration, Instant};

use testbed::eventually;

use crate::knows;
use crate::stack::Stack;

/// How many, unless `STACK_BURST` says otherwise: what two busy cores start in twenty seconds.
const BURST: usize = 60;

/// How long after the last event all has to be as it should.
const CONVERGED: Duration = Duration::from_secs(10);

/// What the registrar may keep of containers that are gone, beside what an allocator keeps for itself.
const KEPT: u64 = 4 << 20;

#[test]
fn many_come_and_go_at_once() {
    let number = std::env::var("STACK_BURST").ok().and_then(|n| n.parse().ok()).unwrap_or(BURST);
    let Some(stack) = Stack::up("burst", &["nginx", "registrar"]) else { return };
    // Caches and pools are filled by the first time.
    come_and_go(&stack, number);
    let before = Kept::by(&stack);
    come_and_go(&stack, number);
    let after = Kept::by(&stack);
    println!("the registrar before: {before:?}, after: {after:?}");
    assert!(after.bytes <= before.bytes + KEPT, "{after:?}");
    // It keeps as many idle connections as were in use at once, which differs from one burst to the next. One that
    // is lost with each container would be more.
    let idle = number as u64 * 3 / 4;
    assert!(after.descriptors <= before.descriptors + idle, "{after:?}");
}

#[track_caller]
fn come_and_go(stack: &Stack, number: usize) {
    for number in [number, 0] {
        let begun = Instant::now();
        stack.scale("web", number);
        let last = Instant::now();
        stack.converged("web", CONVERGED);
        knows(stack, number);
        let (took, all) = (last.elapsed(), last - begun);
        println!("{number} containers, in {all:?}: registered and in nginx {took:?} later");
        assert!(took < CONVERGED, "{took:?}");
    }
}

/// What the registrar has.
#[derive(Debug)]
struct Kept {
    bytes: u64,
    descriptors: u64,
}

impl Kept {
    /// Once nothing is under way any longer. Connections that are kept idle are among the descriptors.
    fn by(stack: &Stack) -> Kept {
        let registrar = stack.container("registrar");
        let number = |script: &str| -> u64 {
            registrar.exec(&["sh", "-c", script]).parse().expect("a number")
        };
        let mut last = u64::MAX;
        let descriptors = eventually(Duration::from_secs(120), "nothing is under way", || {
            let now = number("ls /proc/1/fd | wc -l");
            // Between two looks that have to agree.
            std::thread::sleep(Duration::from_secs(5));
            let steady = now == last;
            last = now;
            steady.then_some(now).ok_or(now.to_string())
        });
        let bytes = number("grep VmRSS /proc/1/status | tr -dc 0-9") << 10;
        Kept { bytes, descriptors }
    }
}
