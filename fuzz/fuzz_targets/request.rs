//! A request for the status: path, arguments, and the header Accept.

#![no_main]

use consul_status::Request;
use consul_status::request::{Parts, QUERY, rest};
use libfuzzer_sys::fuzz_target;

// The parts stand in lines.
fuzz_target!(|data: &[u8]| {
    let mut lines = data.splitn(3, |byte| *byte == b'\n');
    let mut line = || lines.next().unwrap_or_default();
    let (uri, args, accept) = (line(), line(), line());
    let path = rest(uri, b"/consul");
    assert!(uri.ends_with(path));
    match Request::parse(&Parts { method: b"GET", path, args, accept }) {
        Ok(request) => {
            assert!(request.query.len() <= QUERY && !request.head);
            assert!(request.upstream.is_none_or(|name| !name.is_empty() && path.ends_with(&name)));
        }
        Err(error) => {
            let body: serde_json::Value = serde_json::from_slice(&error.body()).expect("JSON");
            assert_eq!(body["error"]["status"], error.status());
            assert!((400..500).contains(&error.status()));
        }
    }
});
