//! The content of a state file: what is read is what would be written.

#![no_main]

use consul_watch::state::{encode, parse, seal};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let _ = parse(data, "web");
    // With a right checksum the fuzzer gets to what stands behind it.
    let mut data = data.to_vec();
    seal(&mut data);
    if let Ok(state) = parse(&data, "web") {
        let bytes = encode("web", &state).expect("what was read can be written");
        assert_eq!(parse(&bytes, "web").expect("and read again"), state);
    }
});
