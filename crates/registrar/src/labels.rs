//! What a container says about its services: `SERVICE_KEY` and `SERVICE_PORT_KEY`, as labels or
//! as variables of its environment.

use std::collections::BTreeMap;

const PREFIX: &str = "SERVICE_";

/// All that one container says. Nothing else of its environment is kept: it holds secrets.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Labels(Vec<Said>);

/// One `SERVICE_…=VALUE`.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Said {
    /// As it stands in the name, which is compared as a text.
    port: Option<String>,
    /// In lower case.
    key: String,
    value: String,
}

/// What holds for one port, by lower-case key. No value is empty.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Values(BTreeMap<String, Value>);

#[derive(Debug, PartialEq, Eq)]
struct Value {
    text: String,
    of_port: bool,
}

impl Labels {
    /// Takes a container's variables (`NAME=VALUE`) and labels.
    pub fn new<'a>(
        env: impl IntoIterator<Item = &'a str>,
        labels: impl IntoIterator<Item = (&'a str, &'a str)>,
    ) -> Self {
        // The later wins, so the weaker come first; two names that differ in case alone go by
        // their order in the alphabet, lest the outcome change from one start to the next.
        let mut env: Vec<_> = env.into_iter().filter_map(|line| line.split_once('=')).collect();
        let mut labels: Vec<_> = labels.into_iter().collect();
        env.sort_unstable();
        labels.sort_unstable();
        Self(env.into_iter().chain(labels).filter_map(Said::new).collect())
    }

    /// What holds for an exposed port: port label over port variable over label over variable.
    pub fn values(&self, port: u16) -> Values {
        let port = port.to_string();
        let mut values = BTreeMap::new();
        let weaker = self.0.iter().filter(|said| said.port.is_none());
        let stronger = self.0.iter().filter(|said| said.port.as_ref() == Some(&port));
        for said in weaker.chain(stronger) {
            let value = Value { text: said.value.clone(), of_port: said.port.is_some() };
            values.insert(said.key.clone(), value);
        }
        // Not before: an empty value hides what is weaker.
        values.retain(|_, value| !value.text.is_empty());
        Values(values)
    }
}

impl Said {
    fn new((name, value): (&str, &str)) -> Option<Self> {
        let key = name.strip_prefix(PREFIX)?.to_lowercase();
        let (port, key) = match key.split_once('_') {
            Some((port, rest)) if is_number(port) => (Some(port.to_owned()), rest.to_owned()),
            _ => (None, key),
        };
        (!key.is_empty()).then(|| Self { port, key, value: value.to_owned() })
    }
}

fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

impl Values {
    pub fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key).map(|value| value.text.as_str())
    }

    /// Whether the key was given for this very port.
    pub fn is_of_port(&self, key: &str) -> bool {
        self.0.get(key).is_some_and(|value| value.of_port)
    }

    /// All pairs, in the order of their keys.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(key, value)| (key.as_str(), value.text.as_str()))
    }
}

/// A list with commas, in which `\,` is a comma of an element. Empty elements do not count.
pub fn list(text: &str) -> Vec<String> {
    let mut elements = vec![String::new()];
    let mut rest = text.chars().peekable();
    while let Some(c) = rest.next() {
        let last = elements.last_mut().expect("there is one from the begin");
        match c {
            '\\' if rest.next_if_eq(&',').is_some() => last.push(','),
            ',' => elements.push(String::new()),
            c => last.push(c),
        }
    }
    elements.retain(|element| !element.is_empty());
    elements
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(env: &[&str], labels: &[(&str, &str)], port: u16) -> Values {
        Labels::new(env.iter().copied(), labels.iter().copied()).values(port)
    }

    #[test]
    fn the_order_of_precedence() {
        let all = [("SERVICE_NAME", "label"), ("SERVICE_80_NAME", "port label")];
        let env = ["SERVICE_NAME=variable", "SERVICE_80_NAME=port variable"];
        let name = |env: &[&str], labels: &[_], port| {
            values(env, labels, port).get("name").map(str::to_owned)
        };
        assert_eq!(name(&env, &all, 80).as_deref(), Some("port label"));
        assert_eq!(name(&env, &all[..1], 80).as_deref(), Some("port variable"));
        assert_eq!(name(&env[..1], &all[..1], 80).as_deref(), Some("label"));
        assert_eq!(name(&env[..1], &[], 80).as_deref(), Some("variable"));
        assert_eq!(name(&[], &[], 80), None);
        assert_eq!(name(&env, &all, 81).as_deref(), Some("label"), "another port");
    }

    #[test]
    fn an_empty_value_hides_the_weaker_one() {
        let labels = [("SERVICE_NAME", "a"), ("SERVICE_80_NAME", ""), ("SERVICE_TAGS", "x")];
        let values = values(&["SERVICE_TAGS=y"], &labels, 80);
        assert_eq!(values.get("name"), None);
        assert!(!values.is_of_port("name"));
        assert_eq!(values.iter().collect::<Vec<_>>(), [("tags", "x")]);
    }

    #[test]
    fn keys_ignore_case_and_the_prefix_does_not() {
        let labels = [("SERVICE_nAmE", "a"), ("service_tags", "b"), ("SERVICE_", "c")];
        let values = values(&["SERVICE_Nginx_WEIGHT=3", "SERVICE_ID", "PATH=/bin"], &labels, 80);
        assert_eq!(values.iter().collect::<Vec<_>>(), [("name", "a"), ("nginx_weight", "3")]);
    }

    #[test]
    fn a_value_may_hold_anything() {
        let values = values(&["SERVICE_CHECK_HTTP=/health?a=b"], &[], 80);
        assert_eq!(values.get("check_http"), Some("/health?a=b"));
    }

    #[test]
    fn ports() {
        let labels =
            [("SERVICE_80_CHECK_HTTP", "/a"), ("SERVICE_080_NAME", "b"), ("SERVICE_80", "c")];
        let values = values(&[], &labels, 80);
        assert_eq!(values.iter().collect::<Vec<_>>(), [("80", "c"), ("check_http", "/a")]);
        assert!(values.is_of_port("check_http") && !values.is_of_port("80"));
    }

    #[test]
    fn lists() {
        for (text, is) in [
            ("", &[][..]),
            (",,", &[]),
            ("a", &["a"]),
            ("a,b,,c", &["a", "b", "c"]),
            (r"a\,b,c", &["a,b", "c"]),
            (r"a\b,\", &[r"a\b", r"\"]),
            ("urlprefix-a/ b", &["urlprefix-a/ b"]),
        ] {
            assert_eq!(list(text), is, "{text}");
        }
    }
}
