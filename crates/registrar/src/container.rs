//! A container, as far as it matters here: what the engine's long answer about it boils down to.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use bollard::models::{ContainerInspectResponse, HealthStatusEnum};

use crate::labels::Labels;
use crate::signal;

/// The label in which Compose keeps a service's name.
const COMPOSE_SERVICE: &str = "com.docker.compose.service";

/// A signal that ends a container where it names none.
const SIGTERM: i32 = 15;

/// One container.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Container {
    pub id: String,
    /// Without the slash in front.
    pub name: String,
    /// As it was named at the creation.
    pub image: String,
    /// When it was created and when it was started; texts that compare like the times.
    pub created: String,
    pub started: String,
    pub state: State,
    /// What its HEALTHCHECK says, where it has one.
    pub health: Option<Health>,
    pub stop_signal: i32,
    /// In seconds.
    pub stop_timeout: u64,
    /// `HostConfig.NetworkMode`: a network's name, or `host`, `none`, `container:ID`.
    pub network_mode: String,
    /// Where it can be reached, by the network's name.
    pub networks: BTreeMap<String, Network>,
    /// The exposed ports, and the host's ports they are bound to.
    pub ports: BTreeMap<Port, Vec<Binding>>,
    pub labels: Labels,
    pub compose_service: Option<String>,
    /// The value of the label that holds an address, where the options name one.
    pub ip_label: Option<String>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum State {
    #[default]
    Running,
    Paused,
    /// Not running, or about to be started again, with the code of the last end.
    Ended(i64),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    Starting,
    Healthy,
    Unhealthy,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Network {
    pub id: String,
    /// IPv4, else IPv6; empty as long as there is none.
    pub ip: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Port {
    pub number: u16,
    pub protocol: Protocol,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Protocol {
    Tcp,
    Udp,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Binding {
    pub ip: String,
    pub port: u16,
}

impl Container {
    /// Takes the engine's answer. `ip_label` is the label that may hold the address.
    pub fn new(answer: ContainerInspectResponse, ip_label: Option<&str>) -> Self {
        let config = answer.config.unwrap_or_default();
        let host_config = answer.host_config.unwrap_or_default();
        let network_settings = answer.network_settings.unwrap_or_default();
        let state = answer.state.unwrap_or_default();
        let labels = config.labels.unwrap_or_default();

        let mut ports: BTreeMap<Port, Vec<Binding>> = BTreeMap::new();
        for exposed in config.exposed_ports.unwrap_or_default() {
            ports.extend(Port::parse(&exposed).map(|port| (port, Vec::new())));
        }
        for (port, bindings) in network_settings.ports.unwrap_or_default() {
            let Some(port) = Port::parse(&port) else { continue };
            let bindings = bindings.unwrap_or_default().into_iter().filter_map(|binding| {
                let port = binding.host_port?.parse().ok().filter(|port| *port > 0)?;
                Some(Binding { ip: binding.host_ip.unwrap_or_default(), port })
            });
            ports.insert(port, bindings.collect());
        }
        let networks = network_settings.networks.unwrap_or_default().into_iter();
        let networks = networks.map(|(name, endpoint)| {
            let ips = [endpoint.ip_address, endpoint.global_ipv6_address].into_iter().flatten();
            let ip = ips.into_iter().find(|ip| !ip.is_empty()).unwrap_or_default();
            (name, Network { id: endpoint.network_id.unwrap_or_default(), ip })
        });
        Self {
            id: answer.id.unwrap_or_default(),
            name: answer.name.unwrap_or_default().trim_start_matches('/').to_owned(),
            image: config.image.unwrap_or_default(),
            created: comparable(answer.created.unwrap_or_default()),
            started: comparable(state.started_at.unwrap_or_default()),
            // A paused container is a running one, and so is one that waits for a restart.
            state: match (state.running, state.restarting, state.paused) {
                (Some(true), Some(false) | None, Some(true)) => State::Paused,
                (Some(true), Some(false) | None, _) => State::Running,
                _ => State::Ended(state.exit_code.unwrap_or_default()),
            },
            health: match state.health.and_then(|health| health.status) {
                Some(HealthStatusEnum::HEALTHY) => Some(Health::Healthy),
                Some(HealthStatusEnum::UNHEALTHY) => Some(Health::Unhealthy),
                Some(HealthStatusEnum::STARTING) => Some(Health::Starting),
                Some(HealthStatusEnum::NONE | HealthStatusEnum::EMPTY) | None => None,
            },
            stop_signal: config.stop_signal.and_then(|s| signal::number(&s)).unwrap_or(SIGTERM),
            stop_timeout: config.stop_timeout.and_then(|s| u64::try_from(s).ok()).unwrap_or(0),
            network_mode: host_config.network_mode.unwrap_or_default(),
            networks: networks.collect(),
            ports,
            compose_service: labels.get(COMPOSE_SERVICE).filter(|name| !name.is_empty()).cloned(),
            ip_label: ip_label.and_then(|label| labels.get(label)).cloned(),
            labels: Labels::new(
                config.env.iter().flatten().map(String::as_str),
                labels.iter().map(|(name, value)| (name.as_str(), value.as_str())),
            ),
        }
    }

    pub fn is_running(&self) -> bool {
        !matches!(self.state, State::Ended(_))
    }

    /// The code of its last end; 0 while it runs.
    pub fn exit_code(&self) -> i64 {
        match self.state {
            State::Running | State::Paused => 0,
            State::Ended(code) => code,
        }
    }

    /// The container whose network it shares.
    pub fn network_of(&self) -> Option<&str> {
        self.network_mode.strip_prefix("container:")
    }

    pub fn has_hosts_network(&self) -> bool {
        self.network_mode == "host"
    }

    /// The exposed ports, each once.
    pub fn exposed(&self) -> BTreeSet<Port> {
        self.ports.keys().copied().collect()
    }
}

/// RFC 3339 in UTC without the `Z`, so that `05` is before `05.1` in the alphabet, too.
fn comparable(time: String) -> String {
    time.trim_end_matches('Z').to_owned()
}

impl Port {
    /// Reads `80/tcp`; anything else than udp counts as tcp.
    pub fn parse(text: &str) -> Option<Self> {
        let (number, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
        let number = number.parse().ok().filter(|number| *number > 0)?;
        let protocol = if protocol == "udp" { Protocol::Udp } else { Protocol::Tcp };
        Some(Self { number, protocol })
    }
}

impl fmt::Display for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let protocol = match self.protocol {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
        };
        write!(f, "{}/{protocol}", self.number)
    }
}

/// What names a container in a log line.
pub fn short(id: &str) -> &str {
    id.get(..12).unwrap_or(id)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn container(answer: serde_json::Value) -> Container {
        Container::new(serde_json::from_value(answer).unwrap(), Some("ip"))
    }

    #[test]
    fn what_an_engine_answers() {
        let web = container(json!({
            "Id": "f1b0", "Name": "/web", "Created": "2026-11-25T22:29:24.084537709Z",
            "State": { "Running": true, "Paused": false, "Restarting": false, "ExitCode": 0,
                "StartedAt": "2026-11-25T22:29:24Z", "Health": { "Status": "starting" } },
            "Config": { "Image": "web:1", "Env": ["SERVICE_NAME=app", "SECRET=x"],
                "Labels": { "SERVICE_TAGS": "a", "com.docker.compose.service": "web", "ip": "1.2.3.4/8" },
                "ExposedPorts": { "80/tcp": {}, "53/udp": {} }, "StopSignal": "SIGQUIT", "StopTimeout": 30 },
            "HostConfig": { "NetworkMode": "shop_default" },
            "NetworkSettings": {
                "Ports": { "80/tcp": [{ "HostIp": "0.0.0.0", "HostPort": "32768" }], "53/udp": null },
                "Networks": { "shop_default": { "NetworkID": "n1", "IPAddress": "10.0.0.2" },
                    "six": { "NetworkID": "n2", "IPAddress": "", "GlobalIPv6Address": "fd00::2" } } },
        }));
        assert_eq!(
            (web.name.as_str(), web.image.as_str(), web.id.as_str()),
            ("web", "web:1", "f1b0")
        );
        assert_eq!((web.state, web.health), (State::Running, Some(Health::Starting)));
        assert_eq!((web.stop_signal, web.stop_timeout), (3, 30));
        assert_eq!(web.started, "2026-11-25T22:29:24");
        assert_eq!(web.networks["shop_default"].ip, "10.0.0.2");
        assert_eq!(web.networks["six"].ip, "fd00::2");
        assert_eq!(web.compose_service.as_deref(), Some("web"));
        assert_eq!(web.ip_label.as_deref(), Some("1.2.3.4/8"));
        let ports: Vec<_> = web.ports.iter().map(|(p, b)| (p.to_string(), b.len())).collect();
        assert_eq!(ports, [("53/udp".into(), 0), ("80/tcp".into(), 1)]);
        assert!(!format!("{web:?}").contains("SECRET"));
    }

    #[test]
    fn states() {
        let state = |running, paused, restarting| {
            let state = json!({ "Running": running, "Paused": paused, "Restarting": restarting,
                "ExitCode": 3 });
            container(json!({ "State": state })).state
        };
        assert_eq!(state(true, false, false), State::Running);
        assert_eq!(state(true, true, false), State::Paused);
        assert_eq!(state(true, false, true), State::Ended(3));
        assert_eq!(state(false, false, false), State::Ended(3));
    }

    #[test]
    fn an_empty_answer_is_a_container_that_does_not_run() {
        let empty = container(json!({}));
        assert!(!empty.is_running());
        assert_eq!((empty.stop_signal, empty.health), (15, None));
    }

    #[test]
    fn ports() {
        let parsed = |text| Port::parse(text).map(|port| port.to_string());
        assert_eq!(parsed("80/tcp").as_deref(), Some("80/tcp"));
        assert_eq!(parsed("53/udp").as_deref(), Some("53/udp"));
        assert_eq!(parsed("80").as_deref(), Some("80/tcp"));
        for bad in ["", "0/tcp", "x/tcp", "65536/tcp"] {
            assert_eq!(parsed(bad), None, "{bad}");
        }
    }

    #[test]
    fn times_compare() {
        assert!(
            comparable("2026-01-01T00:00:05Z".into()) < comparable("2026-01-01T00:00:05.1Z".into())
        );
    }
}
