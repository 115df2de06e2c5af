//! Any bytes as a text of the status, in each of its formats: a reader of the format gets what is
//! shown of them, and nothing ends the place where it stands.

#![no_main]

use consul_status::Text;
use consul_status::escape::{Escape, Html, Json, Prometheus, text};
use libfuzzer_sys::fuzz_target;

/// As long as a service ID may be.
const MAX: usize = 88;

fn written<E: Escape>(bytes: &[u8]) -> String {
    let mut out = Vec::new();
    text::<E, MAX>(&bytes.into(), &mut out);
    String::from_utf8(out).expect("what is written is UTF-8")
}

fuzz_target!(|bytes: &[u8]| {
    let shown: String = Text::<MAX>::from(bytes).chars().collect();
    assert!(shown.len() <= MAX);
    let harmful =
        |c: char| c.is_control() || matches!(c, '\u{202A}'..='\u{202E}' | '\u{2066}'..='\u{2069}');
    assert!(!shown.contains(harmful));

    let json = written::<Json>(bytes);
    assert!(!json.contains(['<', '>', '&', '\u{2028}', '\u{2029}']));
    let read: String = serde_json::from_str(&format!("\"{json}\"")).expect("a string of JSON");
    assert_eq!(read, shown);

    assert_eq!(read_html(&written::<Html>(bytes)), shown);
    assert_eq!(read_label(&written::<Prometheus>(bytes)), shown);
});

fn read_html(text: &str) -> String {
    assert!(!text.contains(['<', '>', '"', '\'']));
    let mut parts = text.split('&');
    let mut out = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let (name, rest) = part.split_once(';').expect("a reference ends");
        out.push(match name {
            "amp" => '&',
            "lt" => '<',
            "gt" => '>',
            "quot" => '"',
            "#39" => '\'',
            other => panic!("{other}"),
        });
        out.push_str(rest);
    }
    out
}

fn read_label(text: &str) -> String {
    let mut chars = text.chars();
    let mut out = String::new();
    while let Some(c) = chars.next() {
        assert!(c != '"' && c != '\n');
        out.push(match c {
            '\\' => match chars.next() {
                Some('n') => '\n',
                Some(c @ ('"' | '\\')) => c,
                other => panic!("{other:?}"),
            },
            c => c,
        });
    }
    out
}
