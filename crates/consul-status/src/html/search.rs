//! What `q` finds: a part of a service ID, a node or an address, in any case.

use crate::request::QUERY;
use crate::text::Text;

/// What is looked for.
pub(super) struct Search {
    needle: String,
    /// What is looked at, kept for its memory.
    hay: String,
}

/// Entries of a list that match.
#[derive(Default)]
pub(super) struct Found {
    /// How long the list is.
    pub(super) of: usize,
    /// How many of it match.
    pub(super) total: usize,
    /// Those that are shown.
    pub(super) shown: Vec<u32>,
}

impl Search {
    pub(super) fn new(query: &[u8]) -> Self {
        let mut needle = String::new();
        lower(&Text::<QUERY>::from(query.trim_ascii()), &mut needle);
        Self { needle, hay: String::new() }
    }

    /// Whether anything is looked for.
    pub(super) fn is_on(&self) -> bool {
        !self.needle.is_empty()
    }

    /// Whether it is found in a text, as that is shown.
    pub(super) fn matches<const MAX: usize>(&mut self, text: &Text<'_, MAX>) -> bool {
        lower(text, &mut self.hay);
        self.hay.contains(&self.needle)
    }

    /// Goes through a list; at most `limit` of it are shown.
    pub(super) fn find(
        &mut self,
        of: usize,
        limit: usize,
        mut matches: impl FnMut(&mut Self, usize) -> bool,
    ) -> Found {
        if !self.is_on() {
            let shown = (0..of.min(limit) as u32).collect();
            return Found { of, total: of, shown };
        }
        let mut found = Found { of, ..Found::default() };
        for nth in 0..of {
            if matches(self, nth) {
                found.total += 1;
                if found.shown.len() < limit {
                    found.shown.push(nth as u32);
                }
            }
        }
        found
    }
}

fn lower<const MAX: usize>(text: &Text<'_, MAX>, out: &mut String) {
    out.clear();
    out.extend(text.chars().flat_map(char::to_lowercase));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_in_any_case() {
        let matches = |query: &str, text: &str| {
            Search::new(query.as_bytes()).matches(&Text::<88>::from(text))
        };
        assert!(matches("web-1", "web-1"));
        assert!(matches(" EB-", "web-1"));
        assert!(matches("größe", "GRÖSSE") || matches("größe", "GRÖßE"));
        assert!(!matches("web-1", "web-2"));
        // As it is shown, so that it can be copied from the page.
        assert!(matches("a\u{FFFD}b", "a\nb"));
    }

    #[test]
    fn more_match_than_are_shown() {
        let found = Search::new(b"1")
            .find(30, 5, |search, nth| search.matches(&Text::<88>::from(nth.to_string())));
        assert_eq!((found.of, found.total, found.shown), (30, 12, vec![1, 10, 11, 12, 13]));
        let found = Search::new(b"  ").find(30, 5, |_, _| unreachable!());
        assert_eq!((found.of, found.total, found.shown), (30, 30, vec![0, 1, 2, 3, 4]));
    }
}
