//! The escapers, one for each format. There is no other way to write a text.

use crate::text::Text;

/// How one format writes a character that may mean something to it.
pub trait Escape {
    /// Appends it.
    fn char(c: char, out: &mut Vec<u8>);
}

/// Within a string of JSON, which may stand within HTML or a script.
pub enum Json {}

/// Between tags, or within an attribute in quotes.
pub enum Html {}

/// Within the value of a label of Prometheus' text format.
pub enum Prometheus {}

impl Escape for Json {
    fn char(c: char, out: &mut Vec<u8>) {
        match c {
            '"' => out.extend_from_slice(b"\\\""),
            '\\' => out.extend_from_slice(b"\\\\"),
            '<' | '>' | '&' | '\u{2028}' | '\u{2029}' => unicode(c as u16, out),
            c if c.is_control() => unicode(c as u16, out),
            c => plain(c, out),
        }
    }
}

/// `\u` and four digits. All that is escaped so lies in the first 65,536 characters.
fn unicode(unit: u16, out: &mut Vec<u8>) {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    out.extend_from_slice(b"\\u");
    out.extend([12, 8, 4, 0].map(|shift| DIGITS[usize::from(unit >> shift & 15)]));
}

impl Escape for Html {
    fn char(c: char, out: &mut Vec<u8>) {
        match c {
            '&' => out.extend_from_slice(b"&amp;"),
            '<' => out.extend_from_slice(b"&lt;"),
            '>' => out.extend_from_slice(b"&gt;"),
            '"' => out.extend_from_slice(b"&quot;"),
            '\'' => out.extend_from_slice(b"&#39;"),
            c => plain(c, out),
        }
    }
}

impl Escape for Prometheus {
    fn char(c: char, out: &mut Vec<u8>) {
        match c {
            '\\' => out.extend_from_slice(b"\\\\"),
            '"' => out.extend_from_slice(b"\\\""),
            '\n' => out.extend_from_slice(b"\\n"),
            c => plain(c, out),
        }
    }
}

fn plain(c: char, out: &mut Vec<u8>) {
    out.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes());
}

/// Appends a text as the format `E` writes it.
pub fn text<E: Escape, const MAX: usize>(text: &Text<'_, MAX>, out: &mut Vec<u8>) {
    text.chars().for_each(|c| E::char(c, out));
}

/// Appends a part of a URL. What is left of it means nothing to any format.
pub fn url(bytes: &[u8], out: &mut Vec<u8>) {
    const DIGITS: &[u8; 16] = b"0123456789ABCDEF";
    for &byte in bytes {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => out.push(byte),
            _ => out.extend([b'%', DIGITS[usize::from(byte >> 4)], DIGITS[usize::from(byte & 15)]]),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn written<E: Escape>(bytes: &[u8]) -> String {
        let mut out = Vec::new();
        text::<E, 200>(&bytes.into(), &mut out);
        String::from_utf8(out).unwrap()
    }

    fn shown(bytes: &[u8]) -> String {
        Text::<200>::from(bytes).chars().collect()
    }

    /// What a parser of each format makes of it.
    fn read_html(text: &str) -> String {
        assert!(!text.contains(['<', '>', '"', '\'']), "{text}");
        let rest = [("&lt;", "<"), ("&gt;", ">"), ("&quot;", "\""), ("&#39;", "'")]
            .iter()
            .fold(text.to_owned(), |text, (from, to)| text.replace(from, to));
        assert_eq!(rest.matches('&').count(), rest.matches("&amp;").count(), "{text}");
        rest.replace("&amp;", "&")
    }

    fn read_label(text: &str) -> String {
        let mut chars = text.chars();
        let mut out = String::new();
        while let Some(c) = chars.next() {
            out.push(match c {
                '"' | '\n' => panic!("{text:?}"),
                '\\' => match chars.next() {
                    Some('n') => '\n',
                    Some(c @ ('"' | '\\')) => c,
                    other => panic!("{other:?} of {text:?}"),
                },
                c => c,
            });
        }
        out
    }

    #[test]
    fn each_format_has_its_own() {
        let text = "<a href=\"x\">\\'&\u{2028}\n".as_bytes();
        let json = r#"\u003ca href=\"x\"\u003e\\'\u0026\u2028"#;
        assert_eq!(written::<Json>(text), format!("{json}\u{FFFD}"));
        let html = "&lt;a href=&quot;x&quot;&gt;\\&#39;&amp;\u{2028}\u{FFFD}";
        assert_eq!(written::<Html>(text), html);
        let label = "<a href=\\\"x\\\">\\\\'&\u{2028}\u{FFFD}";
        assert_eq!(written::<Prometheus>(text), label);
    }

    /// A text has no control characters left, but the escapers do not rely on it.
    #[test]
    fn controls() {
        let mut out = Vec::new();
        "\0\n\u{1f}\u{7f}\u{9f}".chars().for_each(|c| Json::char(c, &mut out));
        assert_eq!(out, br"\u0000\u000a\u001f\u007f\u009f");
        out.clear();
        Prometheus::char('\n', &mut out);
        assert_eq!(out, br"\n");
    }

    #[test]
    fn parts_of_urls() {
        let mut out = Vec::new();
        url("a-b_c.d~/?&\"<é".as_bytes(), &mut out);
        assert_eq!(out, b"a-b_c.d~%2F%3F%26%22%3C%C3%A9");
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(bytes: Vec<u8>) {
            let text = shown(&bytes);
            let json = written::<Json>(&bytes);
            let bare = json.contains(['<', '>', '&', '\u{2028}', '\u{2029}']);
            prop_assert!(!bare, "{}", json);
            prop_assert_eq!(serde_json::from_str::<String>(&format!("\"{json}\"")).unwrap(), &*text);
            prop_assert_eq!(read_html(&written::<Html>(&bytes)), &*text);
            prop_assert_eq!(read_label(&written::<Prometheus>(&bytes)), &*text);
        }

        #[test]
        fn every_character(text in "[<>&\"'\\\\\\n\u{2028}a\\PC]{0,40}") {
            let bytes = text.as_bytes();
            let json = written::<Json>(bytes);
            prop_assert_eq!(serde_json::from_str::<String>(&format!("\"{json}\"")).unwrap(), shown(bytes));
            prop_assert_eq!(read_html(&written::<Html>(bytes)), shown(bytes));
            prop_assert_eq!(read_label(&written::<Prometheus>(bytes)), shown(bytes));
        }
    }
}
