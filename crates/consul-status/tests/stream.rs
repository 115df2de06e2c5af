//! Answers that are larger than the buffer: in pieces, with little memory, and the same.

mod common;

use common::{NOW, Sample, peer, upstream};
use consul_status::FILL;
use consul_status::model::Protocol;

const BUFFER: usize = 64 * 1024;

/// Ten thousand peers in two upstreams, with the longest names there are.
fn large_sample() -> Sample {
    let mut sample = Sample::new(NOW);
    for (name, count) in [("large", 7000), ("other", 3000)] {
        let peers = (0..count).map(|n| {
            let server = format!("10.{}.{}.{}:8080", n / 65_536, n / 256 % 256, n % 256);
            peer(n, &server, &format!("{n:<90}"), NOW)
        });
        sample.push(upstream(name, Protocol::Http, NOW), peers.collect());
    }
    sample
}

fn pieces(sample: Sample, path: &str, args: &str) -> (Vec<u8>, usize, Vec<usize>) {
    let mut answer = sample.answer(path, args).unwrap();
    let mut buffer = Vec::with_capacity(BUFFER);
    let (mut all, mut count) = (Vec::new(), 0);
    loop {
        let more = answer.fill(&mut buffer);
        assert!(buffer.len() <= BUFFER, "{} bytes at a time", buffer.len());
        assert!(!more || buffer.len() >= FILL, "{} bytes, and there is more", buffer.len());
        all.extend_from_slice(&buffer);
        buffer.clear();
        count += 1;
        if !more {
            assert_eq!(buffer.capacity(), BUFFER, "the buffer grew");
            let taken = answer.rows().taken.clone();
            return (all, count, taken);
        }
    }
}

#[test]
fn ten_thousand_peers_in_pieces() {
    let (all, count, taken) = pieces(large_sample(), "/", "format=json");
    assert!(all.len() > 5_000_000 && count > 80, "{} bytes in {count}", all.len());
    // http's first, each once: nothing is walked again because the client is slow.
    assert_eq!(taken, [0, 1, 3, 4, 2]);
    let all: serde_json::Value = serde_json::from_slice(&all).unwrap();
    let peers = all["upstreams"]["large"]["peers"].as_array().unwrap();
    assert_eq!(peers.len(), 7000);
    assert!((0..).zip(peers).all(|(id, peer)| peer["id"] == id));
}

#[test]
fn all_formats_stay_within_the_buffer() {
    for (path, args) in [
        ("/", "format=html"),
        ("/upstreams/large", "format=html"),
        ("/", "format=html&q=7"),
        ("/", "format=prometheus"),
        ("/upstreams/large", "format=prometheus&peers=all"),
    ] {
        let (all, ..) = pieces(large_sample(), path, args);
        assert!(all.ends_with(b"\n"));
    }
}

/// Text that grows most when it is escaped, in every place.
#[test]
fn hostile_text_stays_within_the_buffer() {
    for text in ["<", "\"", "\u{2028}", "'"] {
        for format in ["format=json", "format=html", "format=prometheus"] {
            let mut sample = Sample::new(NOW);
            for _ in 0..40 {
                sample.push_hostile(text.repeat(1000).as_bytes(), NOW);
            }
            pieces(sample, "/", format);
        }
    }
}

/// Wherever an answer stops, it goes on as if it had not.
#[test]
fn where_it_stops_makes_no_difference() {
    for format in ["format=json", "format=html", "format=prometheus"] {
        let mut hostile = Sample::new(NOW);
        hostile.push_hostile(b"x", NOW);
        let whole = hostile.text("/", format);
        // With so much in front there is room for a single step at a time.
        let mut hostile = Sample::new(NOW);
        hostile.push_hostile(b"x", NOW);
        let mut answer = hostile.answer("/", format).unwrap();
        let (mut all, mut steps) = (Vec::new(), 0);
        loop {
            let mut buffer = vec![0; FILL - 1];
            let more = answer.fill(&mut buffer);
            all.extend_from_slice(&buffer[FILL - 1..]);
            steps += 1;
            if !more {
                break;
            }
        }
        assert_eq!(String::from_utf8(all).unwrap(), whole);
        assert!(steps > 50, "{steps}");
    }
}

/// The guess is on the safe side, and not far from the truth.
#[test]
fn what_is_large() {
    for (args, path, large) in [
        ("format=json", "/", true),
        ("format=html", "/upstreams/other", true),
        ("format=prometheus&peers=all", "/upstreams/large", true),
        // It was bounded.
        ("format=prometheus", "/", false),
        ("format=html", "/", false),
        ("format=json", "/upstreams/api", false),
        ("format=html", "/upstreams/api", false),
    ] {
        let len = large_sample().text(path, args).len();
        assert_eq!(len > 1 << 20, large, "{args} {path}: {len}");
        assert_eq!(large_sample().answer(path, args).unwrap().is_large(), large, "{args} {path}");
    }
    let many = || {
        let mut sample = Sample::new(NOW);
        for n in 0..1500 {
            sample.push(upstream(&format!("u{n}"), Protocol::Http, NOW), Vec::new());
        }
        sample
    };
    assert!(many().text("/", "format=html").len() > 1 << 20);
    assert!(many().answer("/", "format=html").unwrap().is_large());
}
