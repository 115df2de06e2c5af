use super::*;
use crate::container::{Port, State};

const TIMEOUT: Duration = Duration::from_secs(600);

fn fleet(keep_failed: bool) -> Fleet {
    Fleet::new(Rules { keep_failed, drain: true, drain_timeout: TIMEOUT })
}

fn running(id: &str) -> Container {
    Container {
        id: id.into(),
        name: id.into(),
        image: "web".into(),
        started: "1".into(),
        stop_signal: 15,
        ports: [(Port::parse("80").unwrap(), vec![])].into(),
        network_mode: "host".into(),
        ..Container::default()
    }
}

fn found(container: Container) -> Found {
    Found::Container(Box::new(container))
}

/// A fleet with one running container.
fn one(keep_failed: bool) -> Fleet {
    let mut fleet = fleet(keep_failed);
    for inspection in fleet.listed(vec!["a".into()], Instant::now()) {
        fleet.inspected(&inspection, found(running("a")), Instant::now());
    }
    assert!(fleet.is_complete(Instant::now()));
    fleet
}

fn event(fleet: &mut Fleet, kind: Kind) -> Option<Inspection> {
    fleet.event(&Event { container: "a".into(), kind }, Instant::now())
}

fn desired(fleet: &Fleet) -> usize {
    fleet.desired(&Settings::default()).instances.len()
}

#[tokio::test(start_paused = true)]
async fn it_is_complete_when_all_of_a_list_were_asked_for() {
    let mut fleet = fleet(false);
    assert!(!fleet.is_complete(Instant::now()));
    let inspections = fleet.listed(vec!["a".into(), "b".into()], Instant::now());
    fleet.inspected(&inspections[0], found(running("a")), Instant::now());
    assert!(!fleet.is_complete(Instant::now()));
    fleet.inspected(&inspections[1], Found::Failed, Instant::now());
    let again = fleet.due(fleet.next_due().unwrap());
    assert_eq!(again.len(), 1, "it is asked once more, which changes nothing about that");
    fleet.event(&Event { container: "c".into(), kind: Kind::Change }, Instant::now());
    assert!(fleet.is_complete(Instant::now()));
    fleet.event(&Event { container: "c".into(), kind: Kind::Destroy }, Instant::now());
    assert_eq!(fleet.unknown().into_iter().collect::<Vec<_>>(), ["b"]);
    assert_eq!(desired(&fleet), 1);
}

#[tokio::test(start_paused = true)]
async fn one_that_hangs_does_not_hold_up_the_others() {
    let mut fleet = fleet(false);
    fleet.listed(vec!["a".into()], Instant::now());
    assert_eq!(fleet.next_due(), Some(Instant::now() + PATIENCE));
    tokio::time::advance(PATIENCE - Duration::from_millis(1)).await;
    assert!(!fleet.is_complete(Instant::now()));
    tokio::time::advance(Duration::from_millis(1)).await;
    assert!(fleet.is_complete(Instant::now()));
    assert_eq!((fleet.unknown().len(), fleet.next_due()), (1, None));
}

#[tokio::test(start_paused = true)]
async fn one_that_ends_meanwhile_is_not_waited_for() {
    let mut fleet = fleet(false);
    fleet.listed(vec!["a".into()], Instant::now());
    event(&mut fleet, Kind::Die(0));
    assert!(fleet.is_complete(Instant::now()));
}

#[tokio::test(start_paused = true)]
async fn what_failed_is_asked_again() {
    let mut fleet = fleet(false);
    let inspections = fleet.listed(vec!["a".into()], Instant::now());
    fleet.inspected(&inspections[0], Found::Failed, Instant::now());
    let due = fleet.next_due().unwrap();
    assert!(due <= Instant::now() + Duration::from_millis(250));
    tokio::time::advance(due - Instant::now()).await;
    let again = fleet.due(Instant::now());
    assert_eq!(again.len(), 1);
    assert!(fleet.due(Instant::now()).is_empty(), "once");
    fleet.inspected(&again[0], found(running("a")), Instant::now());
    assert!(fleet.is_complete(Instant::now()));
    assert_eq!((desired(&fleet), fleet.next_due()), (1, None));
}

#[tokio::test(start_paused = true)]
async fn an_answer_without_news_is_none() {
    let mut fleet = one(true);
    let mut answer = |answer| {
        let inspection = event(&mut fleet, Kind::Change).unwrap();
        fleet.inspected(&inspection, answer, Instant::now())
    };
    let ended = |code| found(Container { state: State::Ended(code), ..running("a") });
    assert!(!answer(found(running("a"))));
    assert!(answer(found(Container { name: "b".into(), ..running("a") })));
    assert!(!answer(Found::Failed));
    assert!(answer(ended(3)) && !answer(ended(3)) && answer(ended(4)));
    assert!(answer(found(running("a"))) && answer(Found::Nothing));
}

#[tokio::test(start_paused = true)]
async fn an_end_is_believed_at_once() {
    for kind in [Kind::Die(0), Kind::Die(1), Kind::Destroy] {
        let mut fleet = one(false);
        assert_eq!(event(&mut fleet, kind), None);
        assert_eq!((desired(&fleet), fleet.members.len()), (0, 0), "{kind:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_an_event_has_overtaken_does_not_count() {
    let mut fleet = one(false);
    let late = event(&mut fleet, Kind::Change).unwrap();
    event(&mut fleet, Kind::Die(0));
    fleet.inspected(&late, found(running("a")), Instant::now());
    assert_eq!(desired(&fleet), 0);

    let first = event(&mut fleet, Kind::Change).unwrap();
    let second = event(&mut fleet, Kind::Change).unwrap();
    fleet.inspected(
        &second,
        found(Container { started: "2".into(), ..running("a") }),
        Instant::now(),
    );
    fleet.inspected(&first, found(running("a")), Instant::now());
    assert_eq!(fleet.container("a").unwrap().started, "2");
}

#[tokio::test(start_paused = true)]
async fn what_a_list_lacks_is_asked_for() {
    let mut fleet = one(false);
    let inspections = fleet.listed(vec![], Instant::now());
    assert_eq!((inspections.len(), desired(&fleet)), (1, 1), "the list alone removes nothing");
    fleet.inspected(&inspections[0], Found::Nothing, Instant::now());
    assert_eq!(desired(&fleet), 0);

    let mut fleet = one(false);
    let inspections = fleet.listed(vec![], Instant::now());
    let ended = Container { state: State::Ended(0), ..running("a") };
    fleet.inspected(&inspections[0], found(ended), Instant::now());
    assert_eq!(fleet.members.len(), 0);
}

#[tokio::test(start_paused = true)]
async fn what_failed_is_kept_where_that_is_asked_for() {
    for (code, kept) in [(0, false), (1, true), (137, false), (255, false), (64, true)] {
        let mut fleet = one(true);
        event(&mut fleet, Kind::Die(code));
        assert_eq!(fleet.failed().get("a").copied(), kept.then_some(code));
        assert_eq!(desired(&fleet), 0);
        assert!(fleet.unknown().is_empty());
    }
    let mut fleet = one(true);
    event(&mut fleet, Kind::Die(1));
    let again = event(&mut fleet, Kind::Change).unwrap();
    fleet.inspected(&again, found(running("a")), Instant::now());
    assert!(fleet.failed().is_empty());
    event(&mut fleet, Kind::Die(1));
    event(&mut fleet, Kind::Destroy);
    assert!(fleet.failed().is_empty());
}

#[tokio::test(start_paused = true)]
async fn which_signals_drain() {
    for (signal, drains) in [(9, true), (15, true), (3, true), (1, false), (10, false), (28, false)]
    {
        let mut fleet = fleet(false);
        let inspections = fleet.listed(vec!["a".into()], Instant::now());
        let container = Container { stop_signal: 3, ..running("a") };
        fleet.inspected(&inspections[0], found(container), Instant::now());
        event(&mut fleet, Kind::Kill(Some(signal)));
        assert_eq!(fleet.draining("a") == Draining::Yes, drains, "{signal}");
    }
    let mut fleet = one(false);
    event(&mut fleet, Kind::Kill(None));
    assert_eq!(fleet.draining("a"), Draining::No, "Podman does not say which");
    fleet.rules.drain = false;
    event(&mut fleet, Kind::Kill(Some(15)));
    assert_eq!(fleet.draining("a"), Draining::No);
}

#[tokio::test(start_paused = true)]
async fn one_that_stays_is_put_back() {
    let mut fleet = one(false);
    event(&mut fleet, Kind::Kill(Some(15)));
    assert_eq!(fleet.next_due(), Some(Instant::now() + TIMEOUT));
    tokio::time::advance(TIMEOUT - Duration::from_millis(1)).await;
    fleet.due(Instant::now());
    assert_eq!(fleet.draining("a"), Draining::Yes);
    tokio::time::advance(Duration::from_millis(1)).await;
    fleet.due(Instant::now());
    assert_eq!((fleet.draining("a"), fleet.next_due()), (Draining::Over, None));
    // And taken out again, if it is asked to end once more.
    event(&mut fleet, Kind::Kill(Some(15)));
    assert_eq!(fleet.draining("a"), Draining::Yes);
}

#[tokio::test(start_paused = true)]
async fn one_that_may_take_longer_to_stop_has_longer() {
    let mut fleet = one(false);
    let inspection = event(&mut fleet, Kind::Change).unwrap();
    let slow = Container { stop_timeout: 3600, ..running("a") };
    fleet.inspected(&inspection, found(slow), Instant::now());
    event(&mut fleet, Kind::Kill(Some(15)));
    assert_eq!(fleet.next_due(), Some(Instant::now() + Duration::from_secs(3600)));
}

#[tokio::test(start_paused = true)]
async fn another_run_is_not_drained() {
    let mut fleet = one(false);
    event(&mut fleet, Kind::Kill(Some(15)));
    // The end of the old run was lost.
    let inspection = event(&mut fleet, Kind::Change).unwrap();
    fleet.inspected(&inspection, found(running("a")), Instant::now());
    assert_eq!(fleet.draining("a"), Draining::Yes, "the same run");
    let inspection = event(&mut fleet, Kind::Change).unwrap();
    let next = Container { started: "2".into(), ..running("a") };
    fleet.inspected(&inspection, found(next), Instant::now());
    assert_eq!(fleet.draining("a"), Draining::No);
}

#[tokio::test(start_paused = true)]
async fn an_old_drain_is_adopted_once() {
    let mut fleet = one(false);
    fleet.adopt_drain("a", Instant::now());
    assert_eq!(fleet.draining("a"), Draining::Yes);
    tokio::time::advance(TIMEOUT).await;
    fleet.due(Instant::now());
    fleet.adopt_drain("a", Instant::now());
    assert_eq!(fleet.draining("a"), Draining::Over);
    fleet.adopt_drain("unknown", Instant::now());
    assert_eq!(fleet.draining("unknown"), Draining::No);
}

/// Nothing is left of containers that came and went, in whatever order their events came.
#[tokio::test(start_paused = true)]
async fn memory_goes_with_the_containers() {
    let mut fleet = one(false);
    for n in 0..1000 {
        let id = format!("c{n}");
        let event = |kind| Event { container: id.clone(), kind };
        let inspection = fleet.event(&event(Kind::Change), Instant::now()).unwrap();
        if n % 2 == 0 {
            fleet.inspected(&inspection, found(running(&id)), Instant::now());
        }
        fleet.event(&event(Kind::Kill(Some(9))), Instant::now());
        fleet.event(&event(Kind::Die(137)), Instant::now());
        let disconnect = fleet.event(&event(Kind::Change), Instant::now()).unwrap();
        fleet.event(&event(Kind::Destroy), Instant::now());
        fleet.inspected(&inspection, found(running(&id)), Instant::now());
        fleet.inspected(&disconnect, found(running(&id)), Instant::now());
    }
    assert_eq!(fleet.members.len(), 1);
}
