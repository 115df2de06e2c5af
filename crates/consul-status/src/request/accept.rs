//! Which format the header `Accept` prefers.

use super::Format;

/// HTML or Prometheus where they are named and nothing is preferred to them, else JSON.
///
/// Wildcards mean JSON: a browser names `text/html`, and a scraper its formats. Of equal ones that
/// which is named counts before a wildcard, and the first before the second.
pub(super) fn negotiate(accept: &[u8]) -> Format {
    let ranges = accept.split(|byte| *byte == b',').filter_map(range);
    // The last of the greatest is what max_by_key takes, so it is asked for from behind.
    let mut ranges: Vec<_> = ranges.collect();
    ranges.reverse();
    let best = ranges.into_iter().max_by_key(|range| (range.quality, range.named));
    best.map_or(Format::Json, |range| range.format)
}

struct Range {
    format: Format,
    /// In thousandths.
    quality: u32,
    named: bool,
}

/// One of the media ranges; `None` for what is not ours, and for what is not wanted at all.
fn range(text: &[u8]) -> Option<Range> {
    let mut parts = text.split(|byte| *byte == b';').map(<[u8]>::trim_ascii);
    let media = parts.next()?.to_ascii_lowercase();
    let (mut quality, mut version) = (1000, false);
    for part in parts {
        let part = part.to_ascii_lowercase();
        if let Some(value) = part.strip_prefix(b"q=") {
            quality = thousandths(value)?;
        } else if part.starts_with(b"version=") {
            version = true;
        }
    }
    let (format, named) = match &*media {
        b"text/html" => (Format::Html, true),
        b"application/openmetrics-text" => (Format::Prometheus, true),
        b"text/plain" if version => (Format::Prometheus, true),
        b"application/json" => (Format::Json, true),
        b"*/*" | b"application/*" => (Format::Json, false),
        _ => return None,
    };
    (quality > 0).then_some(Range { format, quality, named })
}

/// 0 to 1 with at most three digits behind the point (RFC 9110, 12.4.2).
fn thousandths(text: &[u8]) -> Option<u32> {
    let text = std::str::from_utf8(text).ok()?;
    let (whole, part) = text.split_once('.').unwrap_or((text, ""));
    if part.len() > 3 || !part.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let value = match whole {
        "0" => format!("{part:0<3}").parse().ok()?,
        "1" => 1000,
        _ => return None,
    };
    Some(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sent_by_whom() {
        let browser = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,*/*;q=0.8";
        let prometheus_2 = "application/openmetrics-text;version=1.0.0;q=0.5,\
                            application/openmetrics-text;version=0.0.1;q=0.4,\
                            text/plain;version=0.0.4;q=0.3,*/*;q=0.2";
        let prometheus_old = "text/plain;version=0.0.4;q=1,*/*;q=0.1";
        let table = [
            ("", Format::Json),
            ("*/*", Format::Json),
            (browser, Format::Html),
            (prometheus_2, Format::Prometheus),
            (prometheus_old, Format::Prometheus),
            ("application/json", Format::Json),
            ("application/json, text/plain, */*", Format::Json),
            // Not Prometheus' text without a version.
            ("text/plain", Format::Json),
            ("TEXT/HTML", Format::Html),
            ("text/html;q=0", Format::Json),
            ("text/html;q=0.000, */*", Format::Json),
            ("text/html ; q=0.5 , application/json ; q=0.6", Format::Json),
            ("text/html;q=0.5, */*", Format::Json),
            ("*/*, text/html", Format::Html),
            ("application/json, text/html", Format::Json),
            ("text/html, application/json", Format::Html),
            ("text/html;q=0.9, text/plain;version=0.0.4", Format::Prometheus),
            ("text/html;q=2", Format::Json),
            ("text/html;q=0.1234", Format::Json),
            ("image/png", Format::Json),
            (",;,;q=,text/html;", Format::Html),
        ];
        for (accept, format) in table {
            assert_eq!(negotiate(accept.as_bytes()), format, "{accept}");
        }
        assert_eq!(negotiate(b"\xff\xfe;q=\xff, text/html;q=\xff"), Format::Json);
    }
}
