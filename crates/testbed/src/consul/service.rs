//! What is told to Consul of an instance, and what it tells back.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::time::Duration;

use serde_json::{Value, json};

/// How well Consul says something is, from well to not at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Status {
    Passing,
    Warning,
    Critical,
}

impl Status {
    pub fn as_str(self) -> &'static str {
        match self {
            Status::Passing => "passing",
            Status::Warning => "warning",
            Status::Critical => "critical",
        }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// One instance of a service, as it is registered with its agent.
#[derive(Clone, Debug, PartialEq)]
pub struct Service {
    pub name: String,
    pub id: String,
    /// Empty is the node's.
    pub address: String,
    pub port: u16,
    /// Where other datacenters find it.
    pub wan: Option<(String, u16)>,
    pub tags: Vec<String>,
    pub meta: BTreeMap<String, String>,
    /// While passing and while warning.
    pub weights: (u32, u32),
    pub checks: Vec<Check>,
}

impl Service {
    pub fn new(name: &str, id: &str, addr: SocketAddr) -> Service {
        Service {
            name: name.into(),
            id: id.into(),
            address: addr.ip().to_string(),
            port: addr.port(),
            wan: None,
            tags: Vec::new(),
            meta: BTreeMap::new(),
            weights: (1, 1),
            checks: Vec::new(),
        }
    }

    /// Consul takes any text, also the name of a host.
    #[must_use]
    pub fn address(mut self, address: &str) -> Service {
        self.address = address.into();
        self
    }

    #[must_use]
    pub fn port(mut self, port: u16) -> Service {
        self.port = port;
        self
    }

    /// An address for other datacenters beside its own one, which then is told as that for the LAN
    /// too: what Consul shows of it as `TaggedAddresses`.
    #[must_use]
    pub fn wan(mut self, addr: SocketAddr) -> Service {
        self.wan = Some((addr.ip().to_string(), addr.port()));
        self
    }

    #[must_use]
    pub fn tag(mut self, tag: &str) -> Service {
        self.tags.push(tag.into());
        self
    }

    #[must_use]
    pub fn meta(mut self, key: &str, value: &str) -> Service {
        self.meta.insert(key.into(), value.into());
        self
    }

    #[must_use]
    pub fn weights(mut self, passing: u32, warning: u32) -> Service {
        self.weights = (passing, warning);
        self
    }

    #[must_use]
    pub fn check(mut self, check: Check) -> Service {
        self.checks.push(check);
        self
    }

    /// The body of `/v1/agent/service/register`.
    pub fn registration(&self) -> Value {
        let mut registration = json!({
            "Name": self.name,
            "ID": self.id,
            "Address": self.address,
            "Port": self.port,
            "Tags": self.tags,
            "Meta": self.meta,
            "Weights": { "Passing": self.weights.0, "Warning": self.weights.1 },
            "Checks": self.checks.iter().map(|check| check.definition(&self.id)).collect::<Vec<_>>(),
        });
        if let Some((address, port)) = &self.wan {
            registration["TaggedAddresses"] = json!({
                "lan": { "Address": self.address, "Port": self.port },
                "wan": { "Address": address, "Port": port },
            });
        }
        registration
    }

    /// Whether Consul shows what was registered. (How its checks do is another matter.)
    pub(super) fn is_shown_by(&self, instance: &Instance) -> bool {
        (&self.id, &self.address, self.port, &self.wan, &self.tags, &self.meta, self.weights)
            == (
                &instance.id,
                &instance.address,
                instance.port,
                &instance.wan,
                &instance.tags,
                &instance.meta,
                instance.weights,
            )
            && self.checks.iter().all(|check| instance.checks.contains_key(&check.id(&self.id)))
    }
}

/// A check of an instance: one of each kind at most.
#[derive(Clone, Debug, PartialEq)]
pub struct Check {
    kind: Kind,
    initial: Status,
}

#[derive(Clone, Debug, PartialEq)]
enum Kind {
    Ttl,
    Http { url: String, interval: Duration },
    Tcp { addr: SocketAddr, interval: Duration },
}

impl Check {
    /// A check whose status is set by hand ([`super::Consul::check`]); passing until then.
    pub fn ttl() -> Check {
        Check { kind: Kind::Ttl, initial: Status::Passing }
    }

    /// Consul asks the URL itself, and takes intervals under a second for one of a second. Until
    /// it has asked for the first time the check is critical.
    pub fn http(url: &str, interval: Duration) -> Check {
        Check { kind: Kind::Http { url: url.into(), interval }, initial: Status::Critical }
    }

    /// Consul connects to the address itself; see [`Check::http`].
    pub fn tcp(addr: SocketAddr, interval: Duration) -> Check {
        Check { kind: Kind::Tcp { addr, interval }, initial: Status::Critical }
    }

    /// What it is until it is first set, or has first run.
    #[must_use]
    pub fn initially(mut self, status: Status) -> Check {
        self.initial = status;
        self
    }

    fn id(&self, service: &str) -> String {
        match self.kind {
            Kind::Ttl => ttl_check_id(service),
            Kind::Http { .. } => format!("http:{service}"),
            Kind::Tcp { .. } => format!("tcp:{service}"),
        }
    }

    fn definition(&self, service: &str) -> Value {
        let millis = |time: &Duration| format!("{}ms", time.as_millis());
        let mut check = match &self.kind {
            // As long as any test: it is set by hand only.
            Kind::Ttl => json!({ "TTL": "24h" }),
            Kind::Http { url, interval } => {
                json!({ "HTTP": url, "Interval": millis(interval), "Timeout": "1s" })
            }
            Kind::Tcp { addr, interval } => {
                json!({ "TCP": addr.to_string(), "Interval": millis(interval), "Timeout": "1s" })
            }
        };
        check["CheckID"] = self.id(service).into();
        check["Name"] = self.id(service).into();
        check["Status"] = self.initial.as_str().into();
        check
    }
}

pub(super) fn ttl_check_id(service: &str) -> String {
    format!("ttl:{service}")
}

/// One instance of a service, as Consul's health API has it.
#[derive(Clone, Debug, PartialEq)]
pub struct Instance {
    pub node: String,
    pub id: String,
    pub address: String,
    pub port: u16,
    /// Where other datacenters find it, if that was registered.
    pub wan: Option<(String, u16)>,
    pub tags: Vec<String>,
    pub meta: BTreeMap<String, String>,
    pub weights: (u32, u32),
    /// By ID; the node's are among them.
    pub checks: BTreeMap<String, Status>,
}

impl Instance {
    /// The worst of its checks. Maintenance is a check too, a critical one.
    pub fn status(&self) -> Status {
        self.checks.values().copied().max().unwrap_or(Status::Passing)
    }

    pub(super) fn from_entry(entry: &Value) -> Instance {
        let service = &entry["Service"];
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let number = |value: &Value| value.as_u64().unwrap_or_default() as u32;
        let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
        Instance {
            node: text(&entry["Node"]["Node"]),
            id: text(&service["ID"]),
            address: text(&service["Address"]),
            port: number(&service["Port"]) as u16,
            wan: service["TaggedAddresses"]
                .get("wan")
                .map(|wan| (text(&wan["Address"]), number(&wan["Port"]) as u16)),
            tags: list(&service["Tags"]).iter().map(text).collect(),
            meta: service["Meta"]
                .as_object()
                .into_iter()
                .flatten()
                .map(|(key, value)| (key.clone(), text(value)))
                .collect(),
            weights: (
                number(&service["Weights"]["Passing"]),
                number(&service["Weights"]["Warning"]),
            ),
            checks: list(&entry["Checks"])
                .iter()
                .map(|check| {
                    let status = match check["Status"].as_str() {
                        Some("passing") => Status::Passing,
                        Some("warning") => Status::Warning,
                        _ => Status::Critical,
                    };
                    (text(&check["CheckID"]), status)
                })
                .collect(),
        }
    }
}
