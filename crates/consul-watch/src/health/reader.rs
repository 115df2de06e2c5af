//! The answers to one query, read one after the other.
//!
//! Of ten thousand instances one changes, and the next answer has all of them again. An entry that
//! stands there byte by byte as in the answer before is what it was: it is known by its length and
//! hash, and not read again. Which one to look for follows from the place, since Consul lists
//! instances by node and service ID (seen with 1.8.7, whatever had come and gone). Were it to list
//! them otherwise, more of them would be read, and the same would come of it.

use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;

use super::{Entry, Listing, MAX_INSTANCES, refusal};
use crate::error::Error;
use crate::instance::Instance;
use crate::query::Network;

/// Reads answers, and remembers the last one.
#[derive(Debug, Default)]
pub struct Reader {
    network: Network,
    /// Has keys of its own: who registers an instance cannot know which texts have the same hash.
    hasher: RandomState,
    last: Read,
    /// How many entries were read.
    #[cfg(test)]
    reads: std::cell::Cell<usize>,
}

/// What was read of an answer.
#[derive(Debug, Default)]
struct Read {
    /// Its entries, in its order.
    entries: Vec<Known>,
    /// The datacenter of the first of them.
    datacenter: Option<String>,
}

/// An entry.
#[derive(Clone, Debug)]
struct Known {
    /// How many bytes it has, with the bracket or the comma that it begins with.
    length: usize,
    hash: u64,
    instance: Arc<Instance>,
}

/// A body has not the shape of an answer.
struct Misshapen;

impl Reader {
    /// A reader that has read nothing yet; `network` says which of an instance's addresses is meant.
    pub fn new(network: Network) -> Self {
        Self { network, ..Self::default() }
    }

    /// Reads an answer's body. After an error the last good one is what is remembered.
    pub fn read(&mut self, body: &[u8]) -> Result<Listing, Error> {
        let read = self.entries(body).map_err(|Misshapen| refusal(body))?;
        if read.entries.len() > MAX_INSTANCES {
            return Err(Error::TooMany { limit: MAX_INSTANCES });
        }
        self.last = read;
        let Read { entries, datacenter } = &self.last;
        let mut instances: Vec<_> = entries.iter().map(|known| known.instance.clone()).collect();
        instances.sort_by(|a, b| a.key().cmp(&b.key()));
        Ok(Listing { instances, datacenter: datacenter.clone() })
    }

    /// All entries, or one more than there may be.
    fn entries(&self, body: &[u8]) -> Result<Read, Misshapen> {
        let last = &self.last;
        let mut read = Read::default();
        let (mut rest, mut place) = (body, 0);
        // So many bytes may be hashed in vain: a very large entry with many new ones before it is not
        // to be looked for at each of them.
        let mut spare = body.len();
        while read.entries.len() <= MAX_INSTANCES {
            let is_first = read.entries.is_empty();
            // The bracket is the first one's alone.
            let same = last.entries.get(place);
            let same = same.filter(|known| is_first == (place == 0) && known.length <= spare);
            let known = match same.filter(|known| self.is_at(rest, known)) {
                Some(known) => {
                    if is_first {
                        read.datacenter.clone_from(&last.datacenter);
                    }
                    place += 1;
                    known.clone()
                }
                None => {
                    spare -= same.map_or(0, |known| known.length);
                    let Some((entry, length)) = next(rest, is_first)? else { break };
                    if is_first {
                        read.datacenter = entry.datacenter();
                    }
                    #[cfg(test)]
                    self.reads.update(|reads| reads + 1);
                    let instance = entry.judge(self.network);
                    // What would stand before it is gone, and what has its key is what it was.
                    let gone = |known: &Known| known.instance.key() <= instance.key();
                    place += last.entries[place..].iter().take_while(|known| gone(known)).count();
                    // What changed may be a text that is not read, such as a check's output.
                    let was = place.checked_sub(1).map(|before| &last.entries[before].instance);
                    let instance = match was.filter(|was| ***was == instance) {
                        Some(was) => was.clone(),
                        None => Arc::new(instance),
                    };
                    Known { length, hash: self.hash(&rest[..length]), instance }
                }
            };
            rest = &rest[known.length..];
            read.entries.push(known);
        }
        Ok(read)
    }

    fn is_at(&self, text: &[u8], known: &Known) -> bool {
        text.get(..known.length).is_some_and(|text| self.hash(text) == known.hash)
    }

    fn hash(&self, text: &[u8]) -> u64 {
        self.hasher.hash_one(text)
    }
}

/// The next entry of a list, and how many bytes it has; none at the list's end.
fn next(list: &[u8], is_first: bool) -> Result<Option<(Entry<'_>, usize)>, Misshapen> {
    let rest = match (without_space(list), is_first) {
        ([b'[', rest @ ..], true) => match without_space(rest) {
            [b']', after @ ..] => return end(after),
            _ => rest,
        },
        ([b',', rest @ ..], false) => rest,
        ([b']', after @ ..], false) => return end(after),
        _ => return Err(Misshapen),
    };
    let mut json = serde_json::Deserializer::from_slice(rest).into_iter();
    let entry = json.next().and_then(Result::ok).ok_or(Misshapen)?;
    Ok(Some((entry, list.len() - rest.len() + json.byte_offset())))
}

/// There is no entry any more, and must not be anything else.
fn end<T>(after: &[u8]) -> Result<Option<T>, Misshapen> {
    if without_space(after).is_empty() { Ok(None) } else { Err(Misshapen) }
}

/// Without the white space of JSON that it begins with.
fn without_space(text: &[u8]) -> &[u8] {
    let begin = text.iter().position(|byte| !b" \t\n\r".contains(byte)).unwrap_or(text.len());
    &text[begin..]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::super::parse;
    use super::*;

    fn entry(id: u8, port: u16) -> Value {
        json!({
            "Node": {"Node": format!("n{}", id % 3), "Address": "10.0.0.9", "Datacenter": "dc1"},
            "Service": {"ID": format!("web-{id}"), "Port": port, "Tags": ["[,]", "\"}"]},
            "Checks": [],
        })
    }

    fn key(entry: &Value) -> (String, String) {
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        (text(&entry["Node"]["Node"]), text(&entry["Service"]["ID"]))
    }

    /// As Consul lists them.
    fn body(mut entries: Vec<Value>, is_pretty: bool) -> Vec<u8> {
        entries.sort_by_key(key);
        if is_pretty { serde_json::to_vec_pretty(&entries) } else { serde_json::to_vec(&entries) }
            .unwrap()
    }

    /// Whether what is equal in both is the same.
    fn shares(before: &Listing, after: &Listing) -> bool {
        let is_shared = |one: &Arc<Instance>| {
            before.instances.iter().find(|it| it == &one).is_none_or(|it| Arc::ptr_eq(it, one))
        };
        after.instances.iter().all(is_shared)
    }

    #[test]
    fn what_stays_is_not_read_again() {
        let all = || (0..60).map(|id| entry(id, 80)).collect::<Vec<_>>();
        let without = |ids: std::ops::Range<u8>| {
            (0..60).filter(|id| !ids.contains(id)).map(|id| entry(id, 80)).collect::<Vec<_>>()
        };
        let changed = |id: usize| {
            let mut all = all();
            all[id] = entry(id as u8, 81);
            all
        };
        let noted = |output: &str| {
            let mut all = all();
            all[31]["Checks"] = json!([{"CheckID": "a", "Status": "passing", "Output": output}]);
            all
        };
        for is_pretty in [false, true] {
            let mut reader = Reader::new(Network::Lan);
            let mut before = reader.read(&body(all(), is_pretty)).unwrap();
            // What follows upon those that have gone is read as well: it was not looked for. Many go in
            // five places.
            for (what, entries, expected) in [
                ("the same", all(), 0),
                ("one changed", changed(31), 1),
                ("and another, and the one back", changed(32), 2),
                ("all as before", all(), 1),
                ("an output", noted("2 ms"), 1),
                ("another output", noted("3 ms"), 1),
                ("one gone", without(31..32), 1),
                ("one more", all(), 1),
                ("many gone", without(10..40), 5),
                ("many more", all(), 30),
                ("the first changed", changed(0), 1),
                ("the first gone", without(0..1), 1),
                ("all gone", Vec::new(), 0),
                ("all back", all(), 60),
            ] {
                let body = body(entries, is_pretty);
                reader.reads.set(0);
                let after = reader.read(&body).unwrap();
                assert_eq!(after, parse(&body, Network::Lan).unwrap(), "{what}");
                assert_eq!(reader.reads.get(), expected, "{what}");
                assert!(shares(&before, &after), "{what}");
                before = after;
            }
        }
    }

    #[test]
    fn a_large_one_is_not_looked_for_again_and_again() {
        let mut large = entry(255, 80);
        large["Node"]["Node"] = json!("z");
        large["Service"]["Tags"] = json!(["x".repeat(1 << 20)]);
        let mut reader = Reader::new(Network::Lan);
        reader.read(&body(vec![entry(0, 80), large.clone()], false)).unwrap();
        let all = (0..200).map(|id| entry(id, 80)).chain([large]).collect();
        let body = body(all, false);
        reader.reads.set(0);
        assert_eq!(reader.read(&body).unwrap(), parse(&body, Network::Lan).unwrap());
        assert_eq!(reader.reads.get(), 200, "it was looked for once, and then read as well");
    }

    #[test]
    fn an_error_takes_nothing_from_what_is_known() {
        let mut reader = Reader::new(Network::Lan);
        let good = body((0..9).map(|id| entry(id, 80)).collect(), false);
        let before = reader.read(&good).unwrap();
        for cut in 0..good.len() {
            let Err(Error::Invalid(_)) = reader.read(&good[..cut]) else { panic!("{cut} bytes") };
        }
        for bad in ["]", ",", "[", "x", " {}"] {
            let Err(Error::Invalid(_)) = reader.read(&[&good, bad.as_bytes()].concat()) else {
                panic!("{bad}")
            };
        }
        reader.reads.set(0);
        assert_eq!(reader.read(&good).unwrap(), before);
        assert_eq!(reader.reads.get(), 0);
    }

    #[test]
    fn a_bracket_is_the_first_ones_and_a_comma_the_others() {
        let texts: Vec<String> = (0..3).map(|id| entry(id, 80).to_string()).collect();
        let good = format!("[{}]", texts.join(","));
        let mut reader = Reader::new(Network::Lan);
        reader.read(good.as_bytes()).unwrap();
        let [a, b, c] = &texts[..] else { panic!("three") };
        // Before all the others, so that the one with the bracket is looked for after it.
        let new = a.replace("\"n0\"", "\"a\"");
        assert_ne!(&new, a);
        for bad in [
            format!("[{new}[{a},{b},{c}]"),
            format!("[{a}[{a},{b},{c}]"),
            format!(",{a},{b},{c}]"),
            format!("[,{a},{b},{c}]"),
            format!("[{a},{b},{c},]"),
            format!("[{a}{b},{c}]"),
            format!("[[{a},{b},{c}]"),
            format!(",{b},{c}]"),
            format!("{a},{b},{c}]"),
        ] {
            assert!(matches!(reader.read(bad.as_bytes()), Err(Error::Invalid(_))), "{bad}");
        }
    }

    proptest! {
        /// Whatever was read before: an answer says what it says by itself.
        #[test]
        fn as_if_it_were_the_first(
            answers in prop::collection::vec(
                (prop::collection::btree_map(0u8..30, 80u16..83, 0..25), any::<bool>(), any::<bool>(), 0usize..400),
                1..8,
            )
        ) {
            let mut reader = Reader::new(Network::Lan);
            for (entries, is_pretty, is_shuffled, cut) in answers {
                let entries: Vec<Value> = entries.into_iter().map(|(id, port)| entry(id, port)).collect();
                let mut body = if is_shuffled {
                    // By number, which is not by node.
                    Value::from(entries).to_string().into_bytes()
                } else {
                    body(entries, is_pretty)
                };
                if cut < 100 {
                    body.truncate(body.len().saturating_sub(cut));
                }
                let (is, alone) = (reader.read(&body), parse(&body, Network::Lan));
                prop_assert_eq!(is.is_ok(), alone.is_ok());
                match (is, alone) {
                    (Ok(is), Ok(alone)) => prop_assert_eq!(is, alone),
                    (is, alone) => prop_assert_eq!(is.unwrap_err().to_string(), alone.unwrap_err().to_string()),
                }
            }
        }
    }
}
