//! What an instance says of itself in its `Meta`, with the words of nginx's `server`.

use std::collections::BTreeMap;

/// The begin of all keys that are ours.
pub const PREFIX: &str = "nginx_";

/// Attributes that win over the line's parameters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Overrides {
    /// `nginx_weight`
    pub weight: Option<u32>,
    /// `nginx_max_conns`
    pub max_conns: Option<u32>,
    /// `nginx_max_fails`
    pub max_fails: Option<u32>,
    /// `nginx_fail_timeout`, in seconds
    pub fail_timeout: Option<u32>,
    /// `nginx_backup`
    pub backup: Option<bool>,
    /// `nginx_down`
    pub down: Option<bool>,
}

/// A key whose value nginx's `server` would refuse, or that is not known.
pub type Ignored = String;

impl Overrides {
    /// Reads the keys that begin with `nginx_`; those that make no sense come second.
    pub fn read(meta: &BTreeMap<String, String>) -> (Self, Vec<Ignored>) {
        let mut all = Self::default();
        let mut ignored = Vec::new();
        for (key, value) in meta {
            let Some(name) = key.strip_prefix(PREFIX) else { continue };
            let known = match name {
                "weight" => set(&mut all.weight, number(value).filter(|weight| *weight > 0)),
                "max_conns" => set(&mut all.max_conns, number(value)),
                "max_fails" => set(&mut all.max_fails, number(value)),
                "fail_timeout" => set(&mut all.fail_timeout, seconds(value)),
                "backup" => set(&mut all.backup, flag(value)),
                "down" => set(&mut all.down, flag(value)),
                _ => false,
            };
            if !known {
                ignored.push(key.clone());
            }
        }
        (all, ignored)
    }
}

fn set<T>(slot: &mut Option<T>, value: Option<T>) -> bool {
    *slot = value;
    slot.is_some()
}

/// A number as nginx reads it: digits alone, within 31 bits.
fn number(text: &str) -> Option<u32> {
    if text.is_empty() || !text.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    text.parse::<i32>().ok()?.try_into().ok()
}

fn flag(text: &str) -> Option<bool> {
    match text.to_ascii_lowercase().as_str() {
        "1" | "true" | "yes" | "on" => Some(true),
        "0" | "false" | "no" | "off" => Some(false),
        _ => None,
    }
}

/// A time as nginx reads it where it wants seconds: numbers with units from the largest to the
/// smallest, each once, and seconds where there is none (nginx.org, "Configuration file
/// measurement units").
fn seconds(text: &str) -> Option<u32> {
    const UNITS: [(u8, u64); 7] = [
        (b'y', 365 * 86400),
        (b'M', 30 * 86400),
        (b'w', 7 * 86400),
        (b'd', 86400),
        (b'h', 3600),
        (b'm', 60),
        (b's', 1),
    ];
    let mut units = UNITS.iter();
    let mut total: u64 = 0;
    let mut rest = text.as_bytes();
    if rest.is_empty() {
        return None;
    }
    while !rest.is_empty() {
        let digits = rest.iter().take_while(|b| b.is_ascii_digit()).count();
        let value: u64 = std::str::from_utf8(&rest[..digits]).ok()?.parse().ok()?;
        rest = &rest[digits..];
        let scale = match rest.split_first() {
            // Without a unit it is the last one.
            None => 1,
            Some((unit, after)) => {
                // `next` by `find`: a unit that stands behind a smaller one is not found.
                let (_, scale) = units.find(|(name, _)| name == unit)?;
                rest = after.strip_prefix(b" ").unwrap_or(after);
                *scale
            }
        };
        total = total.checked_add(value.checked_mul(scale)?)?;
    }
    i32::try_from(total).ok()?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(pairs: &[(&str, &str)]) -> (Overrides, Vec<Ignored>) {
        let meta = pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        Overrides::read(&meta)
    }

    #[test]
    fn all_keys() {
        let (all, ignored) = read(&[
            ("nginx_weight", "3"),
            ("nginx_max_conns", "0"),
            ("nginx_max_fails", "7"),
            ("nginx_fail_timeout", "1m30s"),
            ("nginx_backup", "YES"),
            ("nginx_down", "off"),
            ("version", "nginx_weight"),
        ]);
        assert_eq!(
            all,
            Overrides {
                weight: Some(3),
                max_conns: Some(0),
                max_fails: Some(7),
                fail_timeout: Some(90),
                backup: Some(true),
                down: Some(false),
            }
        );
        assert!(ignored.is_empty());
    }

    #[test]
    fn what_nginx_would_refuse_is_ignored_and_told() {
        for (key, value) in [
            ("nginx_weight", "0"),
            ("nginx_weight", "-1"),
            ("nginx_weight", "+1"),
            ("nginx_weight", "1.5"),
            ("nginx_weight", "2147483648"),
            ("nginx_weight", ""),
            ("nginx_weight", "1 "),
            ("nginx_max_conns", "x"),
            ("nginx_fail_timeout", "10ms"),
            ("nginx_backup", "maybe"),
            ("nginx_slow_start", "30s"),
            ("nginx_", "1"),
        ] {
            let (all, ignored) = read(&[(key, value)]);
            assert_eq!((all, ignored), (Overrides::default(), vec![key.to_string()]), "{value:?}");
        }
    }

    #[test]
    fn times() {
        for (text, expected) in [
            ("0", Some(0)),
            ("10", Some(10)),
            ("10s", Some(10)),
            ("1h 30m", Some(5400)),
            ("1d2h3m4s", Some(93784)),
            ("1m5", Some(65)),
            ("1M", Some(2_592_000)),
            ("", None),
            ("s", None),
            ("5s1m", None),
            ("1s1s", None),
            ("10ms", None),
            ("99y", None),
            ("99999999999999999999", None),
        ] {
            assert_eq!(seconds(text), expected, "{text:?}");
        }
    }
}
