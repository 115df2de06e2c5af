//! Text that others wrote.

use std::borrow::Cow;

/// What stands in place of what cannot be shown.
const REPLACEMENT: char = '\u{FFFD}';
/// What stands at the end of a text that was cut.
const ELLIPSIS: char = '…';

/// Text from outside: Consul's, the configuration's, a request's. Any bytes.
///
/// It is shown as valid UTF-8 of at most `MAX` bytes. What is invalid, control characters, and the
/// marks that change the direction of what stands around them (U+202A to U+202E, U+2066 to
/// U+2069) become U+FFFD; what is too long is cut at a character and ends in "…".
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Text<'a, const MAX: usize>(Cow<'a, [u8]>);

impl<const MAX: usize> Text<'_, MAX> {
    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The bytes as they came.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// The characters that are shown. They still have to be escaped.
    pub fn chars(&self) -> impl Iterator<Item = char> {
        const { assert!(MAX >= ELLIPSIS.len_utf8(), "there must be room for what is cut") };
        let (mut len, mut keep, mut whole) = (0, 0, true);
        for c in clean(&self.0) {
            len += c.len_utf8();
            if len > MAX {
                whole = false;
                break;
            }
            keep += usize::from(len + ELLIPSIS.len_utf8() <= MAX);
        }
        let keep = if whole { usize::MAX } else { keep };
        clean(&self.0).take(keep).chain((!whole).then_some(ELLIPSIS))
    }

    /// The same, for as long as it takes.
    pub fn into_owned(self) -> Text<'static, MAX> {
        Text(Cow::Owned(self.0.into_owned()))
    }
}

impl<'a, const MAX: usize> From<&'a [u8]> for Text<'a, MAX> {
    fn from(bytes: &'a [u8]) -> Self {
        Self(Cow::Borrowed(bytes))
    }
}

impl<'a, const MAX: usize> From<&'a str> for Text<'a, MAX> {
    fn from(text: &'a str) -> Self {
        Self(Cow::Borrowed(text.as_bytes()))
    }
}

impl<const MAX: usize> From<Vec<u8>> for Text<'_, MAX> {
    fn from(bytes: Vec<u8>) -> Self {
        Self(Cow::Owned(bytes))
    }
}

impl<const MAX: usize> From<String> for Text<'_, MAX> {
    fn from(text: String) -> Self {
        Self(Cow::Owned(text.into_bytes()))
    }
}

fn clean(bytes: &[u8]) -> impl Iterator<Item = char> {
    bytes.utf8_chunks().flat_map(|chunk| {
        let broken = (!chunk.invalid().is_empty()).then_some(REPLACEMENT);
        chunk.valid().chars().map(harmless).chain(broken)
    })
}

fn harmless(c: char) -> char {
    match c {
        '\u{202A}'..='\u{202E}' | '\u{2066}'..='\u{2069}' => REPLACEMENT,
        c if c.is_control() => REPLACEMENT,
        c => c,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn shown<const MAX: usize>(bytes: &[u8]) -> String {
        Text::<MAX>::from(bytes).chars().collect()
    }

    #[test]
    fn what_cannot_be_shown_is_replaced() {
        let table: [(&[u8], &str); 8] = [
            (b"web-1", "web-1"),
            (b"", ""),
            ("größer 北京 🦀".as_bytes(), "größer 北京 🦀"),
            (b"a\nb\tc\0\x7f", "a\u{FFFD}b\u{FFFD}c\u{FFFD}\u{FFFD}"),
            (
                "a\u{85}b\u{202E}c\u{2066}d\u{2069}".as_bytes(),
                "a\u{FFFD}b\u{FFFD}c\u{FFFD}d\u{FFFD}",
            ),
            (b"\xff\xfe", "\u{FFFD}\u{FFFD}"),
            // A character that was cut off, at the end and in the middle.
            (b"x\xe2\x82", "x\u{FFFD}"),
            (b"\xe2\x82x", "\u{FFFD}x"),
        ];
        for (bytes, text) in table {
            assert_eq!(shown::<88>(bytes), text);
        }
    }

    #[test]
    fn what_is_too_long_is_cut_at_a_character() {
        assert_eq!(shown::<8>(b"12345678"), "12345678");
        assert_eq!(shown::<8>(b"123456789"), "12345…");
        assert_eq!(shown::<8>("äöüä".as_bytes()), "äöüä");
        assert_eq!(shown::<8>("äöüäö".as_bytes()), "äö…");
        assert_eq!(shown::<3>(b"1234"), "…");
        // What replaces is longer than what it replaces.
        assert_eq!(shown::<8>(b"\x01\x02\x03"), "\u{FFFD}…");
    }

    proptest! {
        #[test]
        fn any_bytes_are_shown_harmlessly(bytes: Vec<u8>) {
            let text = shown::<32>(&bytes);
            prop_assert!(text.len() <= 32);
            prop_assert!(text.chars().all(|c| harmless(c) == c));
            // What is shown is shown the same again.
            prop_assert_eq!(shown::<32>(text.as_bytes()), text);
        }

        #[test]
        fn harmless_text_stays_as_it_is(text in "[^\\pC]{0,20}") {
            prop_assert_eq!(shown::<80>(text.as_bytes()), text);
        }
    }
}
