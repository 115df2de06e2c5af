//! What a token may read.
//!
//! Consul does not refuse a query whose token lacks a right: it leaves out what may not be seen,
//! and an empty list with status 200 looks like a service that nobody runs. From version 1.11 a
//! header tells; before, one has to ask (`/v1/internal/acl/authorize`, at most 64 at a time).

use std::collections::BTreeSet;

use serde::Deserialize;
use serde_json::{Value, json};

use crate::error::{Error, printable};

/// As many as Consul answers at once.
const AT_ONCE: usize = 64;

/// What to ask, in as many requests as it takes: whether the service may be read, and each of these
/// nodes.
pub(crate) fn questions<'a>(
    service: &str,
    nodes: impl IntoIterator<Item = &'a str>,
) -> Vec<Vec<Value>> {
    let ask = |resource: &str, name: &str| json!({"Resource": resource, "Access": "read", "Segment": name});
    let mut nodes: BTreeSet<&str> = nodes.into_iter().collect();
    if nodes.is_empty() {
        // Nothing was ever seen, so no node's name is known. Who may read all nodes may read one
        // of any name.
        nodes.insert("any");
    }
    let all: Vec<Value> = std::iter::once(ask("service", service))
        .chain(nodes.into_iter().map(|node| ask("node", node)))
        .collect();
    all.chunks(AT_ONCE).map(<[Value]>::to_vec).collect()
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Right {
    resource: String,
    segment: Option<String>,
    allow: bool,
}

/// The first right that is missing.
pub(crate) fn missing(body: &[u8], number: usize) -> Result<Option<String>, Error> {
    let rights: Vec<Right> = serde_json::from_slice(body).map_err(|err| Error::json(&err))?;
    if rights.len() != number {
        return Err(Error::Invalid("not as many rights as were asked for".into()));
    }
    Ok(rights.into_iter().find(|right| !right.allow).map(|right| {
        let name = printable(right.segment.unwrap_or_default().as_bytes(), 100);
        match right.resource.as_str() {
            "node" if name == "any" => "node_prefix \"\" { policy = \"read\" }".to_owned(),
            resource => {
                format!("{} \"{name}\" {{ policy = \"read\" }}", printable(resource.as_bytes(), 20))
            }
        }
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(rights: &[(&str, &str, bool)]) -> Vec<u8> {
        let all: Vec<Value> = rights
            .iter()
            .map(|(resource, name, allow)| {
                json!({"Resource": resource, "Segment": name, "Access": "read", "Allow": allow})
            })
            .collect();
        Value::Array(all).to_string().into_bytes()
    }

    #[test]
    fn all_are_asked_for_and_never_more_at_once_than_consul_takes() {
        let nodes: Vec<String> = (0..200).map(|n| format!("n{n}")).collect();
        let requests = questions("web", nodes.iter().map(String::as_str));
        let sizes: Vec<usize> = requests.iter().map(Vec::len).collect();
        assert_eq!(sizes, [64, 64, 64, 9]);
        assert_eq!(
            questions("web", ["n1", "n1"]),
            [[
                json!({"Resource": "service", "Access": "read", "Segment": "web"}),
                json!({"Resource": "node", "Access": "read", "Segment": "n1"}),
            ]]
        );
        assert_eq!(questions("web", [])[0].len(), 2);
    }

    #[test]
    fn the_missing_right_is_named() {
        let missing = |rights: &[_]| missing(&answer(rights), rights.len()).unwrap();
        assert_eq!(missing(&[("service", "web", true), ("node", "n1", true)]), None);
        assert_eq!(
            missing(&[("service", "web", false), ("node", "n1", false)]).unwrap(),
            "service \"web\" { policy = \"read\" }"
        );
        assert_eq!(
            missing(&[("service", "web", true), ("node", "n1", false)]).unwrap(),
            "node \"n1\" { policy = \"read\" }"
        );
        assert_eq!(
            missing(&[("service", "web", true), ("node", "any", false)]).unwrap(),
            "node_prefix \"\" { policy = \"read\" }"
        );
        assert!(super::missing(b"[]", 2).is_err());
        assert!(super::missing(b"{}", 2).is_err());
    }
}
