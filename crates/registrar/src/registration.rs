//! What Consul's agent is told of one instance.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::labels::Values;

/// The pairs of `Meta` that say whose a service is. No label can set them.
pub const OWNER: &str = "registrar_owner";
pub const CONTAINER: &str = "registrar_container";
pub const HASH: &str = "registrar_hash";

/// What Consul takes as `Meta` (agent/structs, `ValidateMetadata`): one pair more, a longer key or a
/// longer value make it refuse the whole registration.
const PAIRS: usize = 64;
const KEY_LENGTH: usize = 128;
const VALUE_LENGTH: usize = 512;
const RESERVED: &str = "consul-";

/// The body of `PUT /v1/agent/service/register`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct Registration {
    #[serde(rename = "ID")]
    pub id: String,
    pub name: String,
    /// Empty: the node's address.
    pub address: String,
    pub port: u16,
    pub tags: Vec<String>,
    pub meta: BTreeMap<String, String>,
    pub enable_tag_override: bool,
    pub checks: Vec<Check>,
}

/// A check, as it stands in a registration. What is empty is left out.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct Check {
    #[serde(rename = "CheckID")]
    pub id: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    #[serde(rename = "HTTP", skip_serializing_if = "Option::is_none")]
    pub http: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub method: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub args: Vec<String>,
    #[serde(rename = "TTL", skip_serializing_if = "Option::is_none")]
    pub ttl: Option<String>,
    #[serde(rename = "TCP", skip_serializing_if = "Option::is_none")]
    pub tcp: Option<String>,
    #[serde(rename = "GRPC", skip_serializing_if = "Option::is_none")]
    pub grpc: Option<String>,
    #[serde(rename = "GRPCUseTLS", skip_serializing_if = "is_false")]
    pub grpc_use_tls: bool,
    #[serde(rename = "TLSSkipVerify", skip_serializing_if = "is_false")]
    pub tls_skip_verify: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub interval: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub status: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub deregister_critical_service_after: Option<String>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde wants it so")]
fn is_false(value: &bool) -> bool {
    !value
}

impl Registration {
    /// Marks it as ours. The hash covers all but itself, since Consul does not give back what a
    /// check does.
    pub fn sign(&mut self, owner: &str, container: &str) {
        self.meta.insert(OWNER.into(), owner.into());
        self.meta.insert(CONTAINER.into(), container.into());
        let text = serde_json::to_string(self).expect("text, numbers and maps with text as keys");
        self.meta.insert(HASH.into(), format!("{:016x}", fnv1a(text.as_bytes())));
    }

    pub fn hash(&self) -> &str {
        self.meta.get(HASH).map(String::as_str).unwrap_or_default()
    }

    pub fn container(&self) -> &str {
        self.meta.get(CONTAINER).map(String::as_str).unwrap_or_default()
    }
}

/// FNV-1a, of 64 bits: the same in every version of this program, which the hashes of the standard
/// library are not.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// The keys that have a meaning of their own.
const NOT_META: [&str; 5] = ["id", "name", "tags", "ignore", "network"];

/// The pairs of `Meta` that a container's labels make, and what is wrong with the others.
pub fn meta(values: &Values) -> (BTreeMap<String, String>, Vec<String>) {
    let mut meta = BTreeMap::new();
    let mut complaints = Vec::new();
    for (key, value) in values.iter().filter(|(key, _)| !NOT_META.contains(key)) {
        let wrong = if key.is_empty() || key.len() > KEY_LENGTH {
            "its name is longer than 128 characters"
        } else if !key.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-') {
            "its name has characters other than letters, digits, _ and -"
        } else if key.starts_with(RESERVED) {
            "Consul keeps names that begin with \"consul-\" for itself"
        } else if [OWNER, CONTAINER, HASH].contains(&key) {
            "the registrar sets this itself"
        } else if value.len() > VALUE_LENGTH {
            "its value is longer than 512 bytes"
        } else if meta.len() >= PAIRS - 3 {
            "Consul takes 64 pairs of Meta, and three are the registrar's"
        } else {
            meta.insert(key.to_owned(), value.to_owned());
            continue;
        };
        complaints.push(format!("\"{key}\" is left out of Meta: {wrong}"));
    }
    (meta, complaints)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::labels::Labels;

    fn registration() -> Registration {
        Registration {
            id: "vm:web:80".into(),
            name: "web".into(),
            address: "10.0.0.2".into(),
            port: 80,
            tags: vec!["a".into()],
            meta: BTreeMap::new(),
            enable_tag_override: false,
            checks: vec![Check { id: "service:vm:web:80".into(), ..Check::default() }],
        }
    }

    #[test]
    fn as_consul_takes_it() {
        let json = serde_json::to_value(registration()).unwrap();
        let wanted = json!({
            "ID": "vm:web:80", "Name": "web", "Address": "10.0.0.2", "Port": 80, "Tags": ["a"],
            "Meta": {}, "EnableTagOverride": false, "Checks": [{ "CheckID": "service:vm:web:80" }],
        });
        assert_eq!(json, wanted);
    }

    #[test]
    fn the_hash_tells_checks_apart_and_stays_what_it_is() {
        let sign = |mut one: Registration| {
            one.sign("vm", "c1");
            one.hash().to_owned()
        };
        let mut other = registration();
        other.checks[0].timeout = Some("1s".into());
        assert_ne!(sign(registration()), sign(other));
        // A new version that hashes otherwise would register everything anew.
        assert_eq!(sign(registration()), "4951637c222b4eb6");
        assert_eq!(fnv1a(b"foobar"), 0x8594_4171_f739_67e8);
    }

    fn of(pairs: &[(&str, &str)]) -> (BTreeMap<String, String>, Vec<String>) {
        meta(&Labels::new([], pairs.iter().copied()).values(80))
    }

    #[test]
    fn what_consul_would_refuse_is_left_out() {
        let (long_key, long_value) = (format!("SERVICE_{}", "k".repeat(129)), "v".repeat(513));
        let (meta, complaints) = of(&[
            ("SERVICE_NGINX_WEIGHT", "3"),
            ("SERVICE_NAME", "x"),
            ("SERVICE_NETWORK", "x"),
            ("SERVICE_CHECK_HTTP", "/"),
            ("SERVICE_A.B", "x"),
            ("SERVICE_CONSUL-X", "x"),
            ("SERVICE_REGISTRAR_OWNER", "x"),
            (&long_key, "x"),
            ("SERVICE_LONG", &long_value),
        ]);
        assert_eq!(meta.keys().collect::<Vec<_>>(), ["check_http", "nginx_weight"]);
        assert_eq!(complaints.len(), 5, "{complaints:?}");
    }

    #[test]
    fn a_65th_pair_is_left_out() {
        let names: Vec<String> = (0..62).map(|n| format!("SERVICE_K{n:02}")).collect();
        let pairs: Vec<_> = names.iter().map(|name| (name.as_str(), "v")).collect();
        let (meta, complaints) = of(&pairs);
        assert_eq!((meta.len(), complaints.len()), (61, 1));
        assert!(!meta.contains_key("k61"), "the last one in the alphabet");
    }
}
