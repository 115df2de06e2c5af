//! The body of a health answer: it is read or refused, in the order that is promised. Of several, a
//! line each, every one says what it says alone, whatever was read before.

#![no_main]

use consul_watch::health::{MAX_INSTANCES, Reader, parse};
use consul_watch::query::Network;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|body: &[u8]| {
    for network in [Network::Lan, Network::Wan] {
        match parse(body, network) {
            Ok(listing) => {
                assert!(listing.instances.len() <= MAX_INSTANCES);
                let keys = || listing.instances.iter().map(|one| (&one.node, &one.id));
                assert!(keys().is_sorted());
                for at in listing.instances.iter().filter_map(|one| one.address.as_ref().ok()) {
                    assert!(at.port > 0);
                }
            }
            Err(error) => {
                let text = error.to_string();
                assert!(text.len() < 1000 && text.bytes().all(|b| (b' '..=b'~').contains(&b)));
            }
        }
    }
    let mut reader = Reader::new(Network::Lan);
    for line in body.split(|byte| *byte == b'\n') {
        match (reader.read(line), parse(line, Network::Lan)) {
            (Ok(read), Ok(alone)) => assert_eq!(read, alone),
            (Err(read), Err(alone)) => assert_eq!(read.to_string(), alone.to_string()),
            (read, alone) => panic!("{read:?}, and alone {alone:?}"),
        }
    }
});
