//! The arguments of a request.

/// The value of an argument, decoded; the first, if there are several.
pub(super) fn find(args: &[u8], name: &str) -> Option<Vec<u8>> {
    let mut pairs = args.split(|byte| *byte == b'&').map(|pair| {
        let at = pair.iter().position(|byte| *byte == b'=');
        at.map_or((pair, &[][..]), |at| (&pair[..at], &pair[at + 1..]))
    });
    pairs.find(|(key, _)| *key == name.as_bytes()).map(|(_, value)| decode(value))
}

/// As a form encodes it: a plus is a space. A percent sign without two digits is itself.
fn decode(mut value: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(value.len());
    while let Some((&first, rest)) = value.split_first() {
        let byte = match (first, rest) {
            (b'+', _) => Some(b' '),
            (b'%', [high, low, ..]) => digit(*high).zip(digit(*low)).map(|(h, l)| h << 4 | l),
            _ => None,
        };
        let escaped = first == b'%' && byte.is_some();
        out.push(byte.unwrap_or(first));
        value = if escaped { &rest[2..] } else { rest };
    }
    out
}

fn digit(byte: u8) -> Option<u8> {
    char::from(byte).to_digit(16).map(|digit| digit as u8)
}

/// Cuts at a character, as far as there are characters.
pub(super) fn cut(text: &mut Vec<u8>, limit: usize) {
    if text.len() > limit {
        let mut end = limit;
        // A character has at most three bytes that continue it.
        while end > limit - 3 && text[end] & 0b1100_0000 == 0b1000_0000 {
            end -= 1;
        }
        text.truncate(end);
    }
}
