use super::*;
use crate::instance::{Settings, instances};
use crate::registration::HASH;
use crate::{container::Container, container::Port, labels::Labels};

const ID: &str = "vm:web:80";

/// An instance of a container with a check of its own and with Docker's.
fn placed(container: &str) -> Placed {
    let labels = Labels::new([], [("SERVICE_CHECK_TCP", "x"), ("SERVICE_TAGS", "a")]);
    let container = Container {
        id: container.into(),
        name: "web".into(),
        image: "web".into(),
        network_mode: "host".into(),
        health: Some(Health::Healthy),
        ports: [(Port::parse("80").unwrap(), vec![])].into(),
        labels,
        ..Container::default()
    };
    let settings = Settings {
        host: "vm".into(),
        ip: Some("10.0.0.1".into()),
        health: true,
        ..Settings::default()
    };
    let [instance] = &instances(&settings, &container, None).instances[..] else { panic!("one") };
    Placed { instance: instance.clone(), draining: Draining::No, started: "t1".into() }
}

fn wanted(placed: impl IntoIterator<Item = Placed>) -> Wanted {
    let by_id = |placed: Placed| (placed.instance.registration.id.clone(), placed);
    Wanted {
        owner: "vm".into(),
        instances: placed.into_iter().map(by_id).collect(),
        ..Wanted::default()
    }
}

/// What the agent has when all is as it should be.
fn actual(placed: &Placed) -> Actual {
    let registration = &placed.instance.registration;
    let service = Service {
        name: registration.name.clone(),
        address: registration.address.clone(),
        port: registration.port,
        tags: registration.tags.clone(),
        meta: registration.meta.clone(),
    };
    let check = |id: &str| Check {
        service: registration.id.clone(),
        status: if id.starts_with("docker:") { "passing".into() } else { "critical".into() },
        notes: String::new(),
    };
    Actual {
        services: [(registration.id.clone(), service)].into(),
        checks: registration.checks.iter().map(|one| (one.id.clone(), check(&one.id))).collect(),
    }
}

fn in_maintenance(mut actual: Actual, reason: &str) -> Actual {
    let check = Check { service: ID.into(), status: "critical".into(), notes: reason.into() };
    actual.checks.insert(maintenance_check(ID), check);
    actual
}

/// The steps for the one ID, all in one list.
#[track_caller]
fn steps(wanted: &Wanted, actual: &Actual) -> Vec<Step> {
    let plan = plan(wanted, actual);
    let works = [plan.first, plan.then].concat();
    assert!(works.iter().all(|work| work.id == ID), "{works:?}");
    assert!(works.len() <= 1, "{works:?}");
    works.into_iter().flat_map(|work| work.steps).collect()
}

fn registers(placed: &Placed) -> Vec<Step> {
    let registration = Box::new(placed.instance.registration.clone());
    vec![
        Step::Register(registration, placed.instance.health),
        Step::Update(placed.instance.health.unwrap()),
    ]
}

#[test]
fn what_is_equal_is_left_alone() {
    let web = placed("c1");
    assert_eq!(plan(&wanted([web.clone()]), &actual(&web)), Plan::default());
    assert_eq!(plan(&wanted([]), &Actual::default()), Plan::default());
}

#[test]
fn what_somebody_has_added_stays() {
    let web = placed("c1");
    let mut actual = actual(&web);
    actual.services.get_mut(ID).unwrap().meta.insert("more".into(), "x".into());
    assert_eq!(steps(&wanted([web]), &actual), []);
}

#[test]
fn what_is_missing_is_registered() {
    let web = placed("c1");
    assert_eq!(steps(&wanted([web.clone()]), &Actual::default()), registers(&web));
}

#[test]
fn every_difference_is_mended() {
    let web = placed("c1");
    let differs = |change: fn(&mut Service)| {
        let mut actual = actual(&web);
        change(actual.services.get_mut(ID).unwrap());
        assert_eq!(steps(&wanted([web.clone()]), &actual), registers(&web));
    };
    differs(|service| service.name = "other".into());
    differs(|service| service.address = "10.0.0.2".into());
    differs(|service| service.port = 81);
    differs(|service| service.tags = vec![]);
    differs(|service| *service.meta.get_mut(HASH).unwrap() = "0".into());
    // Another's, or nobody's: the ID is taken over, without a gap.
    differs(|service| *service.meta.get_mut(OWNER).unwrap() = "other".into());
    differs(|service| service.meta.clear());
    for check in [docker_check(ID), service_check(ID)] {
        let mut actual = actual(&web);
        actual.checks.remove(&check);
        assert_eq!(steps(&wanted([web.clone()]), &actual), registers(&web), "{check}");
    }
}

#[test]
fn what_docker_says_of_its_health_is_written_when_it_differs() {
    let mut web = placed("c1");
    let actual = actual(&web);
    web.instance.health = Some(Health::Unhealthy);
    assert_eq!(steps(&wanted([web.clone()]), &actual), [Step::Update(Health::Unhealthy)]);
    web.instance.health = Some(Health::Starting);
    assert_eq!(steps(&wanted([web]), &actual), [Step::Update(Health::Starting)]);
}

#[test]
fn surplus_checks_go_and_those_of_others_stay() {
    let web = placed("c1");
    let mut actual = actual(&web);
    for id in [&format!("service:{ID}:2"), "somebody's", &format!("service:{ID}:x")] {
        actual.checks.insert(id.into(), Check { service: ID.into(), ..Check::default() });
    }
    let dropped = [Step::DropCheck(format!("service:{ID}:2"))];
    assert_eq!(steps(&wanted([web]), &actual), dropped);
}

#[test]
fn what_is_not_wanted_goes_if_it_is_ours() {
    let web = placed("c1");
    let mut there = actual(&web);
    let mut nothing = wanted([]);
    assert_eq!(steps(&nothing, &there), [Step::Deregister]);
    nothing.unknown.insert("c1".into());
    assert_eq!(steps(&nothing, &there), [], "its container may be running");
    nothing.unknown.clear();
    *there.services.get_mut(ID).unwrap().meta.get_mut(OWNER).unwrap() = "other".into();
    nothing.cleanup = true;
    assert_eq!(steps(&nothing, &there), [], "another registrar's");
    there.services.get_mut(ID).unwrap().meta.clear();
    assert_eq!(steps(&nothing, &there), [Step::Deregister], "registrator's");
    nothing.cleanup = false;
    assert_eq!(steps(&nothing, &there), []);
}

#[test]
fn what_registrator_left() {
    for (id, is) in [
        ("vm:web:80", true),
        ("vm:web:53:udp", true),
        ("vm:web:80:tcp", false),
        ("vm:web", false),
        ("vm::80", false),
        ("vm:web:x", false),
        ("vm:web:+80", false),
        ("vm2:web:80", false),
        ("web", false),
    ] {
        assert_eq!(is_registrators(id, "vm"), is, "{id}");
    }
}

#[test]
fn a_renamed_container_has_its_new_id_before_the_old_one_goes() {
    let web = placed("c1");
    let mut renamed = web.clone();
    renamed.instance.registration.id = "vm:new:80".into();
    let plan = plan(&wanted([renamed]), &actual(&web));
    let ids = |works: &[Work]| works.iter().map(|work| work.id.clone()).collect::<Vec<_>>();
    assert_eq!((ids(&plan.first), ids(&plan.then)), (vec!["vm:new:80".into()], vec![ID.into()]));
}

/// What the checks said of the old one does not hold for the new one.
#[test]
fn another_container_under_the_same_id_begins_anew() {
    let (old, new) = (placed("c1"), placed("c2"));
    let anew = [vec![Step::Deregister], registers(&new)].concat();
    assert_eq!(steps(&wanted([new.clone()]), &actual(&old)), anew);
    let stopping = in_maintenance(actual(&old), &stopping("t0"));
    assert_eq!(steps(&wanted([new.clone()]), &stopping), anew, "which ends our maintenance");
    let operators = in_maintenance(actual(&old), "broken disk");
    assert_eq!(steps(&wanted([new.clone()]), &operators), registers(&new), "not an operator's");
}

#[test]
fn maintenance_comes_and_goes() {
    let mut web = placed("c1");
    let there = actual(&web);
    let is_paused = in_maintenance(there.clone(), "registrar: paused");
    let is_stopping = in_maintenance(there.clone(), &stopping("t1"));
    let is_operators = in_maintenance(there.clone(), "broken disk");

    assert_eq!(steps(&wanted([web.clone()]), &is_paused), [Step::MaintenanceOff]);
    assert_eq!(steps(&wanted([web.clone()]), &is_operators), []);
    web.instance.paused = true;
    let on = |reason: &str| vec![Step::MaintenanceOn(reason.into())];
    assert_eq!(steps(&wanted([web.clone()]), &there), on("registrar: paused"));
    assert_eq!(steps(&wanted([web.clone()]), &is_paused), []);
    assert_eq!(steps(&wanted([web.clone()]), &is_operators), []);
    web.instance.paused = false;

    web.draining = Draining::Yes;
    assert_eq!(steps(&wanted([web.clone()]), &there), on("registrar: stopping, started t1"));
    assert_eq!(steps(&wanted([web.clone()]), &is_stopping), []);
    web.draining = Draining::Over;
    assert_eq!(steps(&wanted([web.clone()]), &is_stopping), [Step::MaintenanceOff]);
    assert_eq!(steps(&wanted([web.clone()]), &is_operators), []);

    // Registered and out at once.
    web.draining = Draining::Yes;
    let both = [registers(&web), on("registrar: stopping, started t1")].concat();
    assert_eq!(steps(&wanted([web]), &Actual::default()), both);
}

#[test]
fn the_drain_of_a_registrar_before_is_adopted_if_it_is_of_this_run() {
    let web = placed("c1");
    let here = in_maintenance(actual(&web), &stopping("t1"));
    let adopts = plan(&wanted([web.clone()]), &here);
    assert_eq!(adopts.adopted.into_iter().collect::<Vec<_>>(), ["c1"]);
    assert!(adopts.first.is_empty());
    let of_another_run = in_maintenance(actual(&web), &stopping("t0"));
    assert_eq!(steps(&wanted([web]), &of_another_run), [Step::MaintenanceOff]);
}

#[test]
fn what_failed_is_kept_in_maintenance() {
    let web = placed("c1");
    let mut kept = wanted([]);
    kept.failed.insert("c1".into(), 3);
    let reason = "registrar: the container exited with code 3";
    assert_eq!(steps(&kept, &actual(&web)), [Step::MaintenanceOn(reason.into())]);
    assert_eq!(steps(&kept, &in_maintenance(actual(&web), reason)), []);
    assert_eq!(steps(&kept, &Actual::default()), [], "it is not registered anew");
    // It runs again.
    let again = in_maintenance(actual(&web), reason);
    assert_eq!(steps(&wanted([web]), &again), [Step::MaintenanceOff]);
}

#[test]
fn what_was_refused_is_not_tried_again_at_once() {
    let mut web = placed("c1");
    let mut refused = wanted([web.clone()]);
    refused.refused.insert(ID.into());
    assert_eq!(steps(&refused, &Actual::default()), []);
    let mut other = actual(&web);
    other.services.get_mut(ID).unwrap().port = 81;
    assert_eq!(steps(&refused, &other), []);
    assert_eq!(steps(&refused, &actual(&placed("c0"))), []);
    // Its maintenance is another matter.
    web.draining = Draining::Yes;
    let mut refused = wanted([web]);
    refused.refused.insert(ID.into());
    assert_eq!(steps(&refused, &other).len(), 1);
}
