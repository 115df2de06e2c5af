//! An answer of `/v1/health/service/NAME` to instances.
//!
//! The answer as a whole must have the right shape, or nothing of it is taken. A value inside one
//! entry that makes no sense (a port of 70000, a weight of −1) is that instance's matter alone.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

use crate::error::{Error, printable};
use crate::instance::{Instance, Status, Weights, address};
use crate::policy::meta::PREFIX;

/// More instances of one service than any upstream is meant for; a bound on memory.
pub const MAX_INSTANCES: usize = 100_000;

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Entry {
    node: Node,
    service: Service,
    checks: Option<Vec<Check>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Node {
    node: String,
    address: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Service {
    #[serde(rename = "ID")]
    id: String,
    address: Option<String>,
    // Numbers that come from the catalog as anyone wrote them: judged one by one below.
    port: Option<Value>,
    tags: Option<Vec<String>>,
    weights: Option<WeightValues>,
    meta: Option<BTreeMap<String, String>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct WeightValues {
    passing: Option<Value>,
    warning: Option<Value>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Check {
    #[serde(rename = "CheckID")]
    id: String,
    status: String,
}

/// Reads an answer's body. The instances come in the order of node and service ID; Consul's own
/// order is not stable.
pub fn parse(body: &[u8]) -> Result<Vec<Instance>, Error> {
    let entries: Vec<Entry> = serde_json::from_slice(body)
        // The text can quote a piece of the answer.
        .map_err(|err| Error::Invalid(printable(err.to_string().as_bytes(), 200)))?;
    if entries.len() > MAX_INSTANCES {
        return Err(Error::TooMany { limit: MAX_INSTANCES });
    }
    let mut instances: Vec<Instance> = entries.into_iter().map(Entry::judge).collect();
    instances.sort_by(|a, b| (&a.node, &a.id).cmp(&(&b.node, &b.id)));
    Ok(instances)
}

impl Entry {
    fn judge(self) -> Instance {
        let host = [self.service.address, self.node.address]
            .into_iter()
            .flatten()
            .find(|host| !host.is_empty())
            .unwrap_or_default();
        let port = match &self.service.port {
            None | Some(Value::Null) => Some(0),
            Some(value) => value.as_i64(),
        };
        let checks = self.checks.unwrap_or_default();
        Instance {
            address: address(&host, port),
            tags: self.service.tags.unwrap_or_default(),
            status: checks.iter().map(Check::status).max().unwrap_or(Status::Passing),
            weights: self.service.weights.map(WeightValues::judge).unwrap_or_default(),
            meta: {
                let mut meta = self.service.meta.unwrap_or_default();
                meta.retain(|key, _| key.starts_with(PREFIX));
                meta
            },
            node: self.node.node,
            id: self.service.id,
        }
    }
}

impl WeightValues {
    /// A weight that Consul would not have taken is as good as none.
    fn judge(self) -> Weights {
        let valid = |value: Option<Value>| u16::try_from(value?.as_u64()?).ok();
        let default = Weights::default();
        Weights {
            passing: valid(self.passing).unwrap_or(default.passing),
            warning: valid(self.warning).unwrap_or(default.warning),
        }
    }
}

impl Check {
    fn status(&self) -> Status {
        if self.id == "_node_maintenance" || self.id.starts_with("_service_maintenance:") {
            return Status::Maintenance;
        }
        match self.status.as_str() {
            "passing" => Status::Passing,
            "warning" => Status::Warning,
            // "critical", and what no Consul of today says: an unknown state is no good health.
            _ => Status::Critical,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::instance::Unusable;

    fn one(value: Value) -> Instance {
        let mut all = parse(json!([value]).to_string().as_bytes()).unwrap();
        assert_eq!(all.len(), 1);
        all.remove(0)
    }

    fn entry(service: Value, checks: Value) -> Value {
        json!({"Node": {"Node": "n1", "Address": "10.0.0.9"}, "Service": service, "Checks": checks})
    }

    fn status_of(checks: Value) -> Status {
        one(entry(json!({"ID": "a", "Port": 80}), checks)).status
    }

    #[test]
    fn an_answer_of_consul() {
        let body = r#"[{"Node":{"ID":"","Node":"n1","Address":"127.0.0.1","Datacenter":"dc1",
            "TaggedAddresses":null,"Meta":null,"CreateIndex":5,"ModifyIndex":5},
            "Service":{"ID":"web-1","Service":"web","Tags":["app"],"Address":"10.0.0.1",
            "TaggedAddresses":{"lan_ipv4":{"Address":"10.0.0.1","Port":80}},"Meta":null,"Port":80,
            "Weights":{"Passing":3,"Warning":0},"EnableTagOverride":false,"Proxy":{},"Connect":{},
            "CreateIndex":9,"ModifyIndex":9},
            "Checks":[{"Node":"n1","CheckID":"serfHealth","Name":"x","Status":"passing",
            "Notes":"","Output":"","ServiceID":"","ServiceName":"","ServiceTags":[],"Type":""}]}]"#;
        assert_eq!(
            parse(body.as_bytes()).unwrap(),
            [Instance {
                node: "n1".into(),
                id: "web-1".into(),
                address: Ok("10.0.0.1:80".parse().unwrap()),
                tags: vec!["app".into()],
                status: Status::Passing,
                weights: Weights { passing: 3, warning: 0 },
                meta: BTreeMap::new(),
            }]
        );
    }

    #[test]
    fn the_worst_check_decides_and_maintenance_is_worse_than_all() {
        let check = |id: &str, status: &str| json!({"CheckID": id, "Status": status});
        assert_eq!(status_of(json!(null)), Status::Passing);
        assert_eq!(status_of(json!([])), Status::Passing);
        assert_eq!(status_of(json!([check("a", "passing")])), Status::Passing);
        assert_eq!(
            status_of(json!([check("a", "passing"), check("b", "warning")])),
            Status::Warning
        );
        assert_eq!(
            status_of(json!([check("serfHealth", "critical"), check("b", "warning")])),
            Status::Critical
        );
        assert_eq!(status_of(json!([check("a", "")])), Status::Critical);
        assert_eq!(
            status_of(json!([check("a", "critical"), check("_node_maintenance", "critical")])),
            Status::Maintenance
        );
        assert_eq!(
            status_of(json!([check("_service_maintenance:a", "critical")])),
            Status::Maintenance
        );
    }

    #[test]
    fn the_nodes_address_stands_in_for_an_empty_one() {
        for service in
            [json!({"ID": "a", "Port": 80}), json!({"ID": "a", "Address": "", "Port": 80})]
        {
            let at = one(entry(service, json!([]))).address.unwrap();
            assert_eq!(at.to_string(), "10.0.0.9:80");
        }
    }

    #[test]
    fn a_bad_value_is_one_instances_matter() {
        let port = |port: Value| one(entry(json!({"ID": "a", "Port": port}), json!([]))).address;
        assert_eq!(port(json!(0)), Err(Unusable::NoPort));
        assert_eq!(port(json!(null)), Err(Unusable::NoPort));
        for bad in [json!(70000), json!(-1), json!("80"), json!(80.5), json!(1e300)] {
            assert_eq!(port(bad), Err(Unusable::InvalidPort));
        }

        let weights = |weights: Value| {
            one(entry(json!({"ID": "a", "Port": 80, "Weights": weights}), json!([]))).weights
        };
        assert_eq!(weights(json!(null)), Weights { passing: 1, warning: 1 });
        assert_eq!(weights(json!({"Passing": 0})), Weights { passing: 0, warning: 1 });
        for bad in [json!(-1), json!(1u32 << 31), json!(1.5), json!("2")] {
            assert_eq!(weights(json!({"Passing": bad})).passing, 1);
        }
    }

    #[test]
    fn a_wrong_shape_refuses_the_whole_answer() {
        let deep = "[".repeat(200);
        for body in [
            "",
            "{}",
            "null",
            "<html></html>",
            "[{}]",
            "[null]",
            "[1]",
            &deep,
            r#"[{"Node":{"Node":"n1"},"Service":{"ID":"a"},"Checks":"#,
            r#"[{"Node":{"Node":"n1"},"Service":{"ID":1}}]"#,
            r#"[{"Node":{"Node":"n1"},"Service":{"ID":"a","Tags":"x"}}]"#,
            r#"[{"Node":{"Node":"n1"},"Service":{"ID":"a"},"Checks":[{"CheckID":"a"}]}]"#,
        ] {
            assert!(matches!(parse(body.as_bytes()), Err(Error::Invalid(_))), "{body}");
        }
        assert!(parse(b"[{\"Node\":{\"Node\":\"\xff\"},\"Service\":{\"ID\":\"a\"}}]").is_err());
    }

    #[test]
    fn the_order_is_that_of_node_and_id() {
        let at = |node: &str, id: &str| json!({"Node": {"Node": node, "Address": "1.1.1.1"}, "Service": {"ID": id, "Port": 1}});
        let body = json!([at("n2", "a"), at("n1", "b"), at("n1", "a")]).to_string();
        let all = parse(body.as_bytes()).unwrap();
        let keys: Vec<_> = all.iter().map(|i| (i.node.as_str(), i.id.as_str())).collect();
        assert_eq!(keys, [("n1", "a"), ("n1", "b"), ("n2", "a")]);
    }

    #[test]
    fn more_than_the_bound_is_refused() {
        let entry = r#"{"Node":{"Node":"n"},"Service":{"ID":"a"}}"#;
        let body = format!("[{}]", vec![entry; MAX_INSTANCES + 1].join(","));
        assert!(matches!(parse(body.as_bytes()), Err(Error::TooMany { .. })));
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&bytes);
        }
    }
}
