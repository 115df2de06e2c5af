//! An answer of `/v1/health/service/NAME` to instances.
//!
//! The answer as a whole must have the right shape, or nothing of it is taken. A value inside one
//! entry that makes no sense (a port of 70000, a weight of −1) is that instance's matter alone.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Deserializer};
use serde_json::Value;

use crate::error::Error;
use crate::instance::{Instance, Status, Weights, address};
use crate::policy::meta::PREFIX;
use crate::query::Network;

mod reader;

pub use reader::Reader;

/// More instances of one service than any upstream is meant for; a bound on memory.
pub const MAX_INSTANCES: usize = 100_000;

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Entry<'a> {
    #[serde(borrow)]
    node: Node<'a>,
    service: Service<'a>,
    checks: Option<Vec<Check<'a>>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Node<'a> {
    node: String,
    #[serde(borrow)]
    address: Option<Text<'a>>,
    datacenter: Option<Text<'a>>,
    tagged_addresses: Option<Tagged<Text<'a>>>,
}

/// A text that is read and not kept: a part of the answer, unless something in it is escaped. (A `Cow`
/// in an `Option` would be a copy.)
#[derive(Deserialize)]
#[serde(transparent)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

/// Addresses in other networks. There are more than this one (`lan`, `lan_ipv4` …), which only
/// repeat what stands elsewhere.
#[derive(Deserialize)]
struct Tagged<T> {
    wan: Option<T>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Service<'a> {
    #[serde(rename = "ID")]
    id: String,
    #[serde(borrow)]
    address: Option<Text<'a>>,
    // Numbers that come from the catalog as anyone wrote them: judged one by one below.
    port: Option<Value>,
    ports: Option<Vec<Port>>,
    tagged_addresses: Option<Tagged<TaggedAddress<'a>>>,
    tags: Option<Vec<String>>,
    weights: Option<WeightValues>,
    meta: Option<BTreeMap<String, String>>,
}

/// One of several ports, from Consul 1.22; a registration has either these or `Port`.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Port {
    port: Option<Value>,
    default: Option<bool>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct TaggedAddress<'a> {
    #[serde(alias = "address", borrow)]
    address: Option<Text<'a>>,
    #[serde(alias = "port")]
    port: Option<Value>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct WeightValues {
    passing: Option<Value>,
    warning: Option<Value>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Check<'a> {
    #[serde(rename = "CheckID", borrow)]
    id: Text<'a>,
    status: Text<'a>,
}

/// What an answer says.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Listing {
    /// The instances in the order of node and service ID; Consul's own order is not stable.
    pub instances: Vec<Arc<Instance>>,
    /// The datacenter that the first one of the answer is in, as they all are; unknown where there are
    /// none.
    pub datacenter: Option<String>,
}

/// Reads an answer's body that none came before; `network` says which of an instance's addresses is
/// meant.
pub fn parse(body: &[u8], network: Network) -> Result<Listing, Error> {
    Reader::new(network).read(body)
}

/// Why a body is no answer.
fn refusal(body: &[u8]) -> Error {
    /// An entry that is looked at and forgotten.
    struct Seen;

    impl<'de> Deserialize<'de> for Seen {
        fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            Entry::deserialize(deserializer).map(|_| Self)
        }
    }

    match serde_json::from_slice::<Vec<Seen>>(body) {
        Err(err) => Error::json(&err),
        Ok(_) => Error::Invalid("no list of instances".into()),
    }
}

impl Entry<'_> {
    fn datacenter(&self) -> Option<String> {
        self.node.datacenter.as_ref().map(|it| it.0.clone().into_owned())
    }

    fn judge(self, network: Network) -> Instance {
        let (host, port) = self.address(network);
        let address = address(host, port);
        // Of several that are as bad, always the same one: Consul's order is not stable.
        let checks = self.checks.unwrap_or_default().into_iter();
        let worst = checks
            .max_by(|a, b| a.status().cmp(&b.status()).then_with(|| b.id.0.cmp(&a.id.0)))
            .filter(|check| check.status() > Status::Passing);
        Instance {
            address,
            tags: self.service.tags.unwrap_or_default(),
            status: worst.as_ref().map_or(Status::Passing, Check::status),
            check: worst.map(|check| (*check.id.0).into()),
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

    /// The service's address, else its node's; in the other network those that are tagged so come
    /// first. A port of 0 is none.
    fn address(&self, network: Network) -> (&str, Option<i64>) {
        let Self { node, service, .. } = self;
        fn some<'a>(host: &'a Option<Text<'_>>) -> Option<&'a str> {
            host.as_ref().map(|Text(host)| &**host).filter(|host| !host.is_empty())
        }
        let own = some(&service.address);
        let nodes = some(&node.address);
        let tagged = match network {
            Network::Lan => None,
            Network::Wan => service.tagged_addresses.as_ref().and_then(|all| all.wan.as_ref()),
        };
        let wan = tagged.and_then(|wan| some(&wan.address));
        let nodes_wan = match network {
            Network::Lan => None,
            Network::Wan => node.tagged_addresses.as_ref().and_then(|all| some(&all.wan)),
        };
        let host = wan.or(own).or(nodes_wan).or(nodes).unwrap_or_default();

        let default = || service.ports.iter().flatten().find(|port| port.default == Some(true));
        let ports = [
            tagged.filter(|_| wan.is_some()).and_then(|wan| wan.port.as_ref()),
            service.port.as_ref(),
            default().and_then(|port| port.port.as_ref()),
        ];
        let port = ports.into_iter().map(number).find(|port| *port != Some(0)).unwrap_or(Some(0));
        (host, port)
    }
}

/// A port, as somebody wrote it: 0 where there is none, and `None` for what is no number.
fn number(value: Option<&Value>) -> Option<i64> {
    match value {
        None | Some(Value::Null) => Some(0),
        Some(value) => value.as_i64(),
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

impl Check<'_> {
    fn status(&self) -> Status {
        let Self { id: Text(id), status: Text(status) } = self;
        if id == "_node_maintenance" || id.starts_with("_service_maintenance:") {
            return Status::Maintenance;
        }
        match &**status {
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
    use crate::instance::{Endpoint, Host, Unusable};

    fn one(value: Value) -> Instance {
        one_in(Network::Lan, value)
    }

    fn one_in(network: Network, value: Value) -> Instance {
        let mut all = parse(json!([value]).to_string().as_bytes(), network).unwrap().instances;
        assert_eq!(all.len(), 1);
        (*all.remove(0)).clone()
    }

    fn at(text: &str) -> Endpoint {
        let at: std::net::SocketAddr = text.parse().unwrap();
        Endpoint { host: Host::Ip(at.ip()), port: at.port() }
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
        let instance = Instance {
            node: "n1".into(),
            id: "web-1".into(),
            address: Ok(at("10.0.0.1:80")),
            tags: vec!["app".into()],
            status: Status::Passing,
            check: None,
            weights: Weights { passing: 3, warning: 0 },
            meta: BTreeMap::new(),
        };
        let listing = Listing { instances: vec![instance.into()], datacenter: Some("dc1".into()) };
        assert_eq!(parse(body.as_bytes(), Network::Lan).unwrap(), listing);
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
        let named = |checks| one(entry(json!({"ID": "a", "Port": 80}), checks)).check;
        assert_eq!(named(json!([check("a", "passing")])), None);
        for checks in [
            json!([check("a", "warning"), check("c", "critical"), check("b", "critical")]),
            json!([check("b", "critical"), check("a", "warning"), check("c", "critical")]),
        ] {
            assert_eq!(named(checks).as_deref(), Some("b"));
        }
    }

    #[test]
    fn the_nodes_address_stands_in_for_an_empty_one() {
        for service in
            [json!({"ID": "a", "Port": 80}), json!({"ID": "a", "Address": "", "Port": 80})]
        {
            assert_eq!(one(entry(service, json!([]))).address, Ok(at("10.0.0.9:80")));
        }
    }

    #[test]
    fn the_addresses_of_the_other_network_come_first_there() {
        let node = |wan: Value| {
            json!({"Node": "n1", "Address": "10.0.0.9",
                "TaggedAddresses": {"lan": "10.0.0.9", "wan": wan}})
        };
        let with = |node: Value, service: Value| {
            let value = json!({"Node": node, "Service": service, "Checks": []});
            let [lan, wan] =
                [Network::Lan, Network::Wan].map(|network| one_in(network, value.clone()).address);
            (lan.unwrap(), wan.unwrap())
        };
        let both = |lan, wan| (at(lan), at(wan));
        let wan = |wan: Value| json!({"ID": "a", "Address": "10.0.0.1", "Port": 80, "TaggedAddresses": {"wan": wan}});
        let none = || node(json!(null));
        for (node, service, expected) in [
            (
                none(),
                wan(json!({"Address": "1.2.3.4", "Port": 8080})),
                both("10.0.0.1:80", "1.2.3.4:8080"),
            ),
            (
                none(),
                wan(json!({"address": "1.2.3.4", "port": 8080})),
                both("10.0.0.1:80", "1.2.3.4:8080"),
            ),
            // Without a port of its own it is the service's; without an address it is none.
            (none(), wan(json!({"Address": "1.2.3.4"})), both("10.0.0.1:80", "1.2.3.4:80")),
            (none(), wan(json!({"Address": "", "Port": 8080})), both("10.0.0.1:80", "10.0.0.1:80")),
            (node(json!("5.6.7.8")), wan(json!(null)), both("10.0.0.1:80", "10.0.0.1:80")),
            // A node's addresses stand in for a service without one.
            (
                node(json!("5.6.7.8")),
                json!({"ID": "a", "Port": 80}),
                both("10.0.0.9:80", "5.6.7.8:80"),
            ),
            (none(), json!({"ID": "a", "Port": 80}), both("10.0.0.9:80", "10.0.0.9:80")),
        ] {
            assert_eq!(with(node, service.clone()), expected, "{service}");
        }
    }

    #[test]
    fn the_default_of_several_ports() {
        let ports = |port: Value, ports: Value| {
            one(entry(json!({"ID": "a", "Port": port, "Ports": ports}), json!([]))).address
        };
        let two = json!([
            {"Name": "admin", "Port": 9000},
            {"Name": "http", "Port": 8080, "Default": true}
        ]);
        assert_eq!(ports(json!(0), two.clone()), Ok(at("10.0.0.9:8080")));
        assert_eq!(ports(json!(80), two), Ok(at("10.0.0.9:80")));
        let no_default = json!([{"Name": "admin", "Port": 9000}]);
        assert_eq!(ports(json!(0), no_default), Err(Unusable::NoPort));
        let bad = json!([{"Port": 70000, "Default": true}]);
        assert_eq!(ports(json!(0), bad), Err(Unusable::InvalidPort));
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
            assert!(
                matches!(parse(body.as_bytes(), Network::Lan), Err(Error::Invalid(_))),
                "{body}"
            );
        }
        assert!(
            parse(b"[{\"Node\":{\"Node\":\"\xff\"},\"Service\":{\"ID\":\"a\"}}]", Network::Lan)
                .is_err()
        );
    }

    #[test]
    fn the_order_is_that_of_node_and_id() {
        let at = |node: &str, id: &str| json!({"Node": {"Node": node, "Address": "1.1.1.1"}, "Service": {"ID": id, "Port": 1}});
        let body = json!([at("n2", "a"), at("n1", "b"), at("n1", "a")]).to_string();
        let all = parse(body.as_bytes(), Network::Lan).unwrap().instances;
        let keys: Vec<_> = all.iter().map(|one| one.key()).collect();
        assert_eq!(keys, [("n1", "a"), ("n1", "b"), ("n2", "a")]);
    }

    #[test]
    fn more_than_the_bound_is_refused() {
        let entry = r#"{"Node":{"Node":"n"},"Service":{"ID":"a"}}"#;
        let body = format!("[{}]", vec![entry; MAX_INSTANCES + 1].join(","));
        assert!(matches!(parse(body.as_bytes(), Network::Lan), Err(Error::TooMany { .. })));
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&bytes, Network::Wan);
        }
    }
}
