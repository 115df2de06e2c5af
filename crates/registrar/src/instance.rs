//! From a container to its instances: one for each port and protocol.
//!
//! Everything here is a pure function of the settings and of what the engine said.

use std::collections::BTreeMap;
use std::net::IpAddr;

use crate::container::{Binding, Container, Health, Network, Port, Protocol, State};
use crate::labels::Values;
use crate::registration::{Check, Registration, meta};

/// What the options say about registrations.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// The first part of the IDs, and the owner.
    pub host: String,
    pub internal: bool,
    pub ip: Option<String>,
    pub ip_from_label: Option<String>,
    pub explicit: bool,
    pub tags: Vec<String>,
    pub network: Option<String>,
    pub name_from_compose: bool,
    pub health: bool,
    pub script_checks: bool,
    /// What the host's name resolves to, where that is no loopback address.
    pub host_address: Option<IpAddr>,
}

/// An instance as Consul should have it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Instance {
    pub registration: Registration,
    /// What the docker check should say; without, there should be none.
    pub health: Option<Health>,
    pub paused: bool,
}

/// The instances of one container, and what is worth a line in the log.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Instances {
    pub instances: Vec<Instance>,
    pub complaints: Vec<String>,
}

/// The lifetime of a docker check: ten years. It is a flag and no dead man's switch, since a dead
/// registrar must not take instances away.
const DOCKER_TTL: &str = "87600h";

/// How often Consul checks, where no label says so.
const INTERVAL: &str = "10s";

/// Where checks go to when the address is the node's.
const LOCALHOST: &str = "127.0.0.1";

pub fn docker_check(id: &str) -> String {
    format!("docker:{id}")
}

pub fn service_check(id: &str) -> String {
    format!("service:{id}")
}

/// The instances of a container. `target` is the container whose network it shares, as far as that
/// is known.
pub fn instances(
    settings: &Settings,
    container: &Container,
    target: Option<&Container>,
) -> Instances {
    let mut found = Instances::default();
    let place = match (container.network_of(), target) {
        (None, _) => container,
        (Some(_), Some(target)) if target.is_running() => target,
        (Some(id), _) => {
            let id = crate::container::short(id);
            found.complaints.push(format!("its network is that of {id}, which does not run"));
            return found;
        }
    };
    let served: Vec<Port> = container
        .exposed()
        .into_iter()
        .filter(|port| {
            settings.internal
                || place.has_hosts_network()
                || place.ports.get(port).is_some_and(|bindings| !bindings.is_empty())
        })
        .collect();
    let several = served.len() > 1;
    for port in served {
        let values = container.labels.values(port.number);
        if let Some(ignore) = values.get("ignore") {
            if ["false", "0", "no", "off"].contains(&ignore.to_lowercase().as_str()) {
                let text = format!("port {port} is ignored: any value of IGNORE does that, even");
                found.complaints.push(format!("{text} \"{ignore}\""));
            }
            continue;
        }
        let Some(name) = name(settings, container, &values, port, several) else { continue };
        let (address, number) = match address(settings, container, place, &values, port) {
            Ok(place) => place,
            Err(why) => {
                found.complaints.push(format!("port {port} is not registered: {why}"));
                continue;
            }
        };
        let id = match values.get("id") {
            Some(id) => id.to_owned(),
            None => {
                let id = format!("{}:{}:{}", settings.host, container.name, port.number);
                if port.protocol == Protocol::Udp { id + ":udp" } else { id }
            }
        };
        let (meta, complaints) = meta(&values);
        found.complaints.extend(complaints);
        let check = check(settings, &values, &id, &address, number, &mut found.complaints);
        let health = container
            .health
            .filter(|_| settings.health && !values.get("check_docker").is_some_and(is_off));
        let mut checks: Vec<Check> = check.into_iter().collect();
        checks.extend(health.map(|_| Check {
            id: docker_check(&id),
            name: Some("Docker HEALTHCHECK".into()),
            ttl: Some(DOCKER_TTL.into()),
            ..Check::default()
        }));
        let mut registration = Registration {
            tags: tags(settings, &values, port),
            id,
            name,
            address,
            port: number,
            meta,
            enable_tag_override: false,
            checks,
        };
        registration.sign(&settings.host, &container.id);
        let paused = container.state == State::Paused;
        found.instances.push(Instance { registration, health, paused });
    }
    found
}

fn is_off(value: &str) -> bool {
    value.eq_ignore_ascii_case("off")
}

/// The service's name; none where `-explicit` wants one and there is none.
fn name(
    settings: &Settings,
    container: &Container,
    values: &Values,
    port: Port,
    several: bool,
) -> Option<String> {
    let base = match (values.get("name"), &container.compose_service) {
        (Some(name), _) => name,
        (None, _) if settings.explicit => return None,
        (None, Some(service)) if settings.name_from_compose => service,
        (None, _) => base_name(&container.image),
    };
    if several && !values.is_of_port("name") {
        Some(format!("{base}-{}", port.number))
    } else {
        Some(base.to_owned())
    }
}

/// `x` of `registry:5000/team/x:tag@sha256:…`.
fn base_name(image: &str) -> &str {
    let last = image.rsplit('/').next().unwrap_or_default();
    last.split([':', '@']).next().unwrap_or_default()
}

fn tags(settings: &Settings, values: &Values, port: Port) -> Vec<String> {
    let mut tags = crate::labels::list(values.get("tags").unwrap_or_default());
    tags.extend(settings.tags.iter().cloned());
    if port.protocol == Protocol::Udp {
        tags.push("udp".into());
    }
    tags
}

/// Where an instance can be reached, or why it cannot. `place` is the container whose network it
/// is.
fn address(
    settings: &Settings,
    container: &Container,
    place: &Container,
    values: &Values,
    port: Port,
) -> Result<(String, u16), String> {
    let hosts = |specific: Option<&str>| match (&settings.ip, specific, settings.host_address) {
        (Some(ip), _, _) => ip.clone(),
        (None, Some(ip), _) => ip.to_owned(),
        (None, None, Some(ip)) => ip.to_string(),
        (None, None, None) => String::new(),
    };
    let (address, number) = if place.has_hosts_network() {
        (Ok(hosts(None)), port.number)
    } else if settings.internal {
        (inner(settings, place, values), port.number)
    } else {
        let bindings = place.ports.get(&port).map(Vec::as_slice).unwrap_or_default();
        let binding = best(bindings).ok_or("it is not published any longer")?;
        (Ok(hosts(specific(&binding.ip))), binding.port)
    };
    // The port stays.
    let labelled = container.ip_label.as_deref().and_then(|label| label.rsplit('/').next_back());
    match labelled.filter(|ip| !ip.is_empty()) {
        Some(ip) => Ok((ip.to_owned(), number)),
        None => Ok((address?, number)),
    }
}

/// The first IPv4 address that is not a loopback one, else the first.
fn best(bindings: &[Binding]) -> Option<&Binding> {
    let is_good = |binding: &&Binding| match binding.ip.parse() {
        Ok(IpAddr::V4(ip)) => !ip.is_loopback(),
        // Nothing means all of them.
        _ => binding.ip.is_empty(),
    };
    bindings.iter().find(is_good).or(bindings.first())
}

/// A binding's address, unless it is all addresses.
fn specific(ip: &str) -> Option<&str> {
    let all = ip.is_empty() || ip.parse::<IpAddr>().is_ok_and(|ip| ip.is_unspecified());
    (!all).then_some(ip)
}

/// The container's own address.
fn inner(settings: &Settings, place: &Container, values: &Values) -> Result<String, String> {
    let named = values.get("network").or(settings.network.as_deref());
    let of = |name: &str| {
        let by_id = |network: &&Network| !name.is_empty() && network.id == name;
        place.networks.get(name).or_else(|| place.networks.values().find(by_id))
    };
    let (name, network) = match named {
        Some(name) => (name, of(name)),
        None => {
            // The mode `default` is the network `bridge`.
            let mode = match place.network_mode.as_str() {
                "default" | "" => "bridge",
                mode => mode,
            };
            let first = || place.networks.iter().next().map(|(name, one)| (name.as_str(), one));
            match of(mode).map(|network| (mode, network)).or_else(first) {
                Some((name, network)) => (name, Some(network)),
                None => (mode, None),
            }
        }
    };
    match network {
        None if named.is_some() => Err(format!("the container is not in the network \"{name}\"")),
        None => Err("the container is in no network".into()),
        Some(network) if network.ip.is_empty() => {
            Err(format!("the container has no address in the network \"{name}\" yet"))
        }
        Some(network) => Ok(network.ip.clone()),
    }
}

/// The one check that the labels ask for.
fn check(
    settings: &Settings,
    values: &Values,
    id: &str,
    address: &str,
    port: u16,
    complaints: &mut Vec<String>,
) -> Option<Check> {
    let ip = if address.is_empty() { LOCALHOST } else { address };
    let host = if ip.contains(':') { format!("[{ip}]") } else { ip.to_owned() };
    let own = |key: &str| values.get(key).map(str::to_owned);
    let url = |scheme: &str, path: &str| {
        let slash = if path.starts_with('/') { "" } else { "/" };
        Some(format!("{scheme}://{host}:{port}{slash}{path}"))
    };
    let mut check =
        Check { id: service_check(id), timeout: own("check_timeout"), ..Check::default() };
    if let Some(path) = values.get("check_http") {
        check.http = url("http", path);
        check.method = own("check_http_method");
    } else if let Some(path) = values.get("check_https") {
        check.http = url("https", path);
        check.method = own("check_https_method");
    } else if values.get("check_cmd").is_some() {
        complaints.push("CHECK_CMD is not supported, there is no check".into());
        return None;
    } else if let Some(script) = values.get("check_script") {
        if !settings.script_checks {
            let text = "CHECK_SCRIPT needs --allow-script-checks, there is no check";
            complaints.push(text.into());
            return None;
        }
        let script = script.replace("$SERVICE_IP", ip);
        let script = script.replace("$SERVICE_PORT", &port.to_string());
        check.args = vec!["sh".into(), "-c".into(), script];
    } else if let Some(ttl) = values.get("check_ttl") {
        check.ttl = Some(ttl.to_owned());
        check.timeout = None;
    } else if values.get("check_tcp").is_some() {
        check.tcp = Some(format!("{host}:{port}"));
    } else if values.get("check_grpc").is_some() {
        check.grpc = Some(format!("{host}:{port}"));
        check.grpc_use_tls = values.get("check_grpc_use_tls").is_some();
        check.tls_skip_verify = check.grpc_use_tls && values.get("check_tls_skip_verify").is_some();
    } else {
        return None;
    }
    if check.ttl.is_none() {
        check.interval = own("check_interval").or(Some(INTERVAL.into()));
        if address.is_empty() {
            let text = format!("the check goes to {LOCALHOST}, as the address is the node's");
            complaints.push(format!("port {port}: {text}"));
        }
    }
    check.status = own("check_initial_status");
    check.deregister_critical_service_after = own("check_deregister_after");
    Some(check)
}

/// The instances of all containers, by ID. Where two have the same ID, the older container wins.
#[derive(Debug, Default)]
pub struct Desired {
    pub instances: BTreeMap<String, Instance>,
    /// By container.
    pub complaints: BTreeMap<String, Vec<String>>,
}

impl Desired {
    /// Takes all running containers.
    pub fn new<'a>(
        settings: &Settings,
        containers: impl Iterator<Item = &'a Container>,
        by_id: impl Fn(&str) -> Option<&'a Container>,
    ) -> Self {
        let mut oldest_first: Vec<&Container> = containers.collect();
        oldest_first.sort_by(|a, b| (&a.created, &a.id).cmp(&(&b.created, &b.id)));
        let mut desired = Self::default();
        for container in oldest_first {
            let target = container.network_of().and_then(&by_id);
            let Instances { instances, mut complaints } = instances(settings, container, target);
            for instance in instances {
                let id = instance.registration.id.clone();
                match desired.instances.get(&id) {
                    None => {
                        desired.instances.insert(id, instance);
                    }
                    Some(first) => {
                        let holder = crate::container::short(first.registration.container());
                        complaints.push(format!("the ID \"{id}\" is that of {holder} already"));
                    }
                }
            }
            if !complaints.is_empty() {
                desired.complaints.insert(container.id.clone(), complaints);
            }
        }
        desired
    }
}

#[cfg(test)]
mod tests;
