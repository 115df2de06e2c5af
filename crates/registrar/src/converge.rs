//! What has to be done so that the agent has what it should: a pure function of both.

use std::collections::{BTreeMap, BTreeSet};

use crate::container::Health;
use crate::fleet::Draining;
use crate::instance::{Instance, docker_check, service_check};
use crate::registration::{CONTAINER, OWNER, Registration};

/// How the reasons of our own maintenance begin. What begins otherwise is an operator's.
pub const OURS: &str = "registrar:";

/// How Consul names the check that is a service's maintenance.
pub fn maintenance_check(id: &str) -> String {
    format!("_service_maintenance:{id}")
}

/// The reason of a drain. It names the run of the container, so that a registrar that is started
/// later can tell whether it still holds.
pub fn stopping(started: &str) -> String {
    format!("{OURS} stopping, started {started}")
}

fn paused() -> String {
    format!("{OURS} paused")
}

/// What the agent has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Actual {
    pub services: BTreeMap<String, Service>,
    /// By ID; those of services alone.
    pub checks: BTreeMap<String, Check>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Service {
    pub name: String,
    pub address: String,
    pub port: u16,
    pub tags: Vec<String>,
    pub meta: BTreeMap<String, String>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Check {
    pub service: String,
    pub status: String,
    pub notes: String,
}

/// What is wanted, once all containers of the engine's list were asked for.
#[derive(Clone, Debug, Default)]
pub struct Wanted {
    pub owner: String,
    pub instances: BTreeMap<String, Placed>,
    /// Those whose registration the agent has refused: it is too early to try again.
    pub refused: BTreeSet<String>,
    /// Containers that may run, and of which nothing more is known.
    pub unknown: BTreeSet<String>,
    /// Containers that ended, with their exit codes: what they have is kept in maintenance.
    pub failed: BTreeMap<String, i64>,
    /// Also remove what gliderlabs/registrator left.
    pub cleanup: bool,
}

/// An instance, and what its container is about to do.
#[derive(Clone, Debug)]
pub struct Placed {
    pub instance: Instance,
    pub draining: Draining,
    /// When the container was started.
    pub started: String,
}

/// One call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// With the status of the docker check.
    Register(Box<Registration>, Option<Health>),
    Deregister,
    /// The docker check says this now.
    Update(Health),
    /// The check with this ID is no longer wanted.
    DropCheck(String),
    MaintenanceOn(String),
    MaintenanceOff,
}

/// The calls for one ID, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Work {
    pub id: String,
    pub steps: Vec<Step>,
}

/// All that has to be done. What is in one list can be done at once; the lists are in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    pub first: Vec<Work>,
    /// What a running container has no longer goes after what it has now.
    pub then: Vec<Work>,
    /// Containers that a registrar before this one has begun to drain.
    pub adopted: BTreeSet<String>,
}

pub fn status(health: Health) -> &'static str {
    match health {
        Health::Healthy => "passing",
        Health::Starting | Health::Unhealthy => "critical",
    }
}

pub fn plan(wanted: &Wanted, actual: &Actual) -> Plan {
    let mut plan = Plan::default();
    for (id, placed) in &wanted.instances {
        let steps = towards(wanted, actual, id, placed, &mut plan.adopted);
        if !steps.is_empty() {
            plan.first.push(Work { id: id.clone(), steps });
        }
    }
    let running: BTreeSet<&str> =
        wanted.instances.values().map(|p| p.instance.registration.container()).collect();
    for (id, service) in
        actual.services.iter().filter(|(id, _)| !wanted.instances.contains_key(*id))
    {
        let is_ours = service.meta.get(OWNER).is_some_and(|owner| *owner == wanted.owner);
        let container = service.meta.get(CONTAINER).map(String::as_str).unwrap_or_default();
        let work = |step| Work { id: id.clone(), steps: vec![step] };
        if is_ours && let Some(code) = wanted.failed.get(container) {
            if !actual.checks.contains_key(&maintenance_check(id)) {
                let reason = format!("{OURS} the container exited with code {code}");
                plan.first.push(work(Step::MaintenanceOn(reason)));
            }
        } else if is_ours && !wanted.unknown.contains(container) {
            let list = if running.contains(container) { &mut plan.then } else { &mut plan.first };
            list.push(work(Step::Deregister));
        } else if wanted.cleanup
            && !service.meta.contains_key(OWNER)
            && is_registrators(id, &wanted.owner)
        {
            plan.first.push(work(Step::Deregister));
        }
    }
    plan
}

/// The calls that make one instance what it should be.
fn towards(
    wanted: &Wanted,
    actual: &Actual,
    id: &str,
    placed: &Placed,
    adopted: &mut BTreeSet<String>,
) -> Vec<Step> {
    let registration = &placed.instance.registration;
    let health = placed.instance.health;
    let mut steps = Vec::new();

    let maintenance = actual.checks.get(&maintenance_check(id)).map(|check| check.notes.as_str());
    let is_operators = maintenance.is_some_and(|reason| !reason.starts_with(OURS));
    let mut in_maintenance = maintenance.is_some();

    let present = actual.services.get(id);
    let refused = wanted.refused.contains(id);
    if refused && present.is_none() {
        return steps;
    }
    let ours = |service: &&Service| service.meta.get(OWNER) == Some(&wanted.owner);
    let replaced = present.filter(ours).is_some_and(|service| {
        service.meta.get(CONTAINER).map(String::as_str) != Some(registration.container())
    });
    let fresh = replaced && !is_operators && !refused;
    if fresh {
        // Another container: what the checks of the old one said does not hold for it.
        steps.push(Step::Deregister);
        in_maintenance = false;
    }
    if refused {
        // What is there stays as it is, but for maintenance.
    } else if fresh || !present.is_some_and(|service| is_same(registration, service, actual)) {
        steps.push(Step::Register(Box::new(registration.clone()), health));
        steps.extend(health.map(Step::Update));
    } else if let Some(health) = health {
        let now = actual.checks.get(&docker_check(id)).map(|check| check.status.as_str());
        if now != Some(status(health)) {
            steps.push(Step::Update(health));
        }
    }
    if !fresh && !refused {
        let surplus = actual.checks.iter().filter(|(check, data)| {
            data.service == id
                && is_of_a_registrar(check, id)
                && !registration.checks.iter().any(|wanted| wanted.id == **check)
        });
        steps.extend(surplus.map(|(check, _)| Step::DropCheck(check.clone())));
    }

    let reason = match placed.draining {
        Draining::Yes => Some(stopping(&placed.started)),
        _ if placed.instance.paused => Some(paused()),
        _ => None,
    };
    match reason {
        Some(reason) if !in_maintenance => steps.push(Step::MaintenanceOn(reason)),
        Some(_) => (),
        None if in_maintenance && !is_operators => {
            let here = stopping(&placed.started);
            if placed.draining == Draining::No && maintenance == Some(here.as_str()) {
                adopted.insert(registration.container().to_owned());
            } else {
                steps.push(Step::MaintenanceOff);
            }
        }
        None => (),
    }
    steps
}

/// Whether the agent has just this. What its checks do, the hash says; what somebody has added to
/// `Meta` does no harm.
fn is_same(wanted: &Registration, service: &Service, actual: &Actual) -> bool {
    wanted.meta.iter().all(|(key, value)| service.meta.get(key) == Some(value))
        && service.name == wanted.name
        && service.address == wanted.address
        && service.port == wanted.port
        && service.tags == wanted.tags
        && wanted.checks.iter().all(|check| {
            actual.checks.get(&check.id).is_some_and(|check| check.service == wanted.id)
        })
}

/// Whether a check's ID is one that a registrar gives: `docker:ID`, `service:ID`, `service:ID:1`.
/// Whatever else somebody added to a service stays.
fn is_of_a_registrar(check: &str, id: &str) -> bool {
    let numbered = || {
        let number = check.strip_prefix(&service_check(id))?.strip_prefix(':')?;
        Some(!number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()))
    };
    check == docker_check(id) || check == service_check(id) || numbered().unwrap_or(false)
}

/// Whether an ID is one that gliderlabs/registrator gives: `HOST:NAME:PORT`, `HOST:NAME:PORT:udp`.
fn is_registrators(id: &str, host: &str) -> bool {
    let Some(rest) = id.strip_prefix(host).and_then(|rest| rest.strip_prefix(':')) else {
        return false;
    };
    let rest = rest.strip_suffix(":udp").unwrap_or(rest);
    rest.split_once(':').is_some_and(|(name, port)| {
        !name.is_empty() && port.parse::<u16>().is_ok() && port.bytes().all(|b| b.is_ascii_digit())
    })
}

#[cfg(test)]
mod tests;
