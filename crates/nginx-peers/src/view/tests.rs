use nginx_sys::ngx_http_upstream_rr_peers_t as Peers;

use super::*;
use crate::doubles;
use crate::list::tests::Upstream;
use crate::meter::Attempt;
use crate::spec::Spec;
use crate::spec::tests::spec;

const PATIENCE: Duration = Duration::from_millis(20);

fn seen(up: &mut Upstream) -> Option<View> {
    // The zone has no end here: its texts lie anywhere.
    up.pool.end = ptr::without_provenance_mut(usize::MAX);
    let primaries: *mut Peers = &mut *up.primaries;
    // SAFETY: the list lives in a box as long as the upstream.
    unsafe { look(primaries, up.statics(), PATIENCE) }
}

#[test]
fn all_peers_are_there_whatever_their_number() {
    for number in [0, 1, 63, 64, 65, 128, 200] {
        let mut up = Upstream::new(Statics { primaries: 2, backups: 1 }, true);
        let ours: Vec<Spec> = (1..=number)
            .map(|port| Spec { backup: port % 3 == 0, ..spec(&format!("web-{port:03}"), port) })
            .collect();
        up.list.apply(&ours).unwrap();
        let view = seen(&mut up).unwrap();
        assert_eq!(up.primaries.rwlock, 0, "the lock was given back");
        assert_eq!(view.len(), usize::from(number) + 3);
        let all: Vec<_> = (0..view.len()).map(|at| view.get(at).unwrap()).collect();
        let ids: Vec<String> =
            all.iter().filter_map(|it| Some(it.label.as_ref()?.id().to_owned())).collect();
        let expected = |backup| {
            let ours = ours.iter().filter(move |spec| spec.backup == backup);
            ours.map(|spec| spec.label.id().to_owned())
        };
        assert_eq!(ids, expected(false).chain(expected(true)).collect::<Vec<_>>());
        assert!(all.iter().all(|it| it.label.is_some() == it.numbers.counted.is_some()));
        up.list.apply(&[]).unwrap();
        assert_eq!(doubles::live(), 0);
    }
}

#[test]
fn what_is_counted_is_seen() {
    let mut up = Upstream::new(Statics::default(), false);
    up.list.apply(&[spec("a", 1), spec("b", 2)]).unwrap();
    let peer = Upstream::peers(&up.primaries)[0];
    let end = ptr::without_provenance(usize::MAX);
    // SAFETY: a live peer of ours.
    let meter = unsafe { Meter::of(peer, end) }.unwrap();
    meter.picked(7);
    meter.ended(&Attempt {
        status: Some(204),
        sent: 10,
        received: 20,
        header_time: Some(3),
        response_time: 4,
        failed: false,
    });
    meter.picked(9);
    meter.ended(&Attempt { failed: true, ..Attempt::default() });
    meter.is_unavailable(10);
    meter.is_unavailable(11);
    meter.is_available(15);
    let view = seen(&mut up).unwrap();
    let counted: Vec<Counted> = view.numbers().map(|it| it.counted.unwrap()).collect();
    let expected = Counted {
        id: counted[0].id,
        added: counted[0].added,
        requests: 2,
        responses: [0, 1, 0, 0, 0],
        sent: 10,
        received: 20,
        fails: 1,
        unavail: 1,
        downtime: 5,
        downstart: 0,
        selected: 9,
        header_time: 3000,
        response_time: 4000,
        header_time_total: 3000,
        response_time_total: 4000,
    };
    assert_eq!(counted[0], expected);
    assert_ne!(counted[0].id, counted[1].id);
    assert_eq!(counted[1].requests, 0);
}

#[test]
fn a_list_that_is_locked_is_given_up() {
    let mut up = Upstream::new(Statics::default(), false);
    up.list.apply(&[spec("a", 1)]).unwrap();
    up.primaries.rwlock = u64::MAX;
    assert!(seen(&mut up).is_none());
}
