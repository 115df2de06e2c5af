use std::collections::VecDeque;

use serde_json::json;

use super::*;
use crate::error::Cause;
use crate::names::{Failure, Found};

/// Answers from a script, and what was asked and told, with the times.
#[derive(Default)]
struct Script {
    answers: VecDeque<Result<Answer, Error>>,
    asked: Vec<(Duration, Ask)>,
    begin: Option<Instant>,
}

impl Transport for Script {
    async fn ask(&mut self, ask: Ask) -> Result<Answer, Error> {
        let begin = *self.begin.get_or_insert_with(Instant::now);
        self.asked.push((begin.elapsed(), ask));
        match self.answers.pop_front() {
            Some(answer) => answer,
            // The script is at its end: this long poll never returns.
            None => std::future::pending().await,
        }
    }
}

/// For answers without host names.
#[derive(Clone)]
struct Nobody;

impl Lookup for Nobody {
    async fn lookup(&self, name: String) -> Result<Found, Failure> {
        panic!("nobody asks for {name}")
    }
}

fn no_names() -> Names<Nobody> {
    Names::new(Nobody)
}

#[derive(Debug, PartialEq)]
enum Told {
    Answered,
    Changed(u64, Vec<String>),
    Failed(Cause),
}

#[derive(Default)]
struct Listener {
    told: Vec<Told>,
    /// To be called again so long after each change, so often.
    recheck: Option<(Duration, u32)>,
}

impl Sink for Listener {
    async fn changed(&mut self, snapshot: Arc<Snapshot>) -> Option<Instant> {
        let ids = snapshot.instances.iter().map(|i| i.id.clone()).collect();
        self.told.push(Told::Changed(snapshot.index, ids));
        let (after, times) = self.recheck.as_mut()?;
        *times = times.checked_sub(1)?;
        Some(Instant::now() + *after)
    }
    fn answered(&mut self) {
        self.told.push(Told::Answered);
    }
    fn failed(&mut self, error: &Error) {
        self.told.push(Told::Failed(error.cause()));
    }
}

fn answer(index: u64, ids: &[&str]) -> Result<Answer, Error> {
    let entries: Vec<_> = ids
        .iter()
        .map(|id| {
            json!({"Node": {"Node": "n", "Address": "10.0.0.1"}, "Service": {"ID": id, "Port": 80}})
        })
        .collect();
    Ok(Answer::new(index, json!(entries).to_string()))
}

async fn run(
    answers: impl IntoIterator<Item = Result<Answer, Error>>,
) -> (Vec<(Duration, Ask)>, Vec<Told>) {
    run_with(Listener::default(), answers).await
}

async fn run_with(
    mut listener: Listener,
    answers: impl IntoIterator<Item = Result<Answer, Error>>,
) -> (Vec<(Duration, Ask)>, Vec<Told>) {
    let mut script = Script { answers: answers.into_iter().collect(), ..Default::default() };
    let _ = tokio::time::timeout(
        Duration::from_secs(3600),
        follow(&mut script, &mut no_names(), &mut listener),
    )
    .await;
    assert!(script.answers.is_empty(), "the watch stopped asking");
    (script.asked, listener.told)
}

fn asks(asked: &[(Duration, Ask)]) -> Vec<Ask> {
    asked.iter().map(|(_, ask)| *ask).collect()
}

const fn blocking(index: u64) -> Ask {
    Ask::Blocking { index }
}

fn changed(index: u64, ids: &[&str]) -> Told {
    Told::Changed(index, ids.iter().map(|id| id.to_string()).collect())
}

use Ask::Consistent;
use Told::{Answered, Failed};

#[tokio::test(start_paused = true)]
async fn asks_consistently_first_and_then_waits_on_the_index() {
    let (asked, told) = run([answer(7, &["a"]), answer(9, &["a", "b"])]).await;
    assert_eq!(asks(&asked), [Consistent, blocking(7), blocking(9)]);
    assert_eq!(told, [Answered, changed(7, &["a"]), Answered, changed(9, &["a", "b"])]);
}

#[tokio::test(start_paused = true)]
async fn the_same_content_is_no_change() {
    let (asked, told) =
        run([answer(7, &["a", "b"]), answer(8, &["b", "a"]), answer(8, &["a", "b"])]).await;
    assert_eq!(asks(&asked), [Consistent, blocking(7), blocking(8), blocking(8)]);
    assert_eq!(told, [Answered, changed(7, &["a", "b"]), Answered, Answered]);
}

#[tokio::test(start_paused = true)]
async fn an_index_that_goes_back_is_verified_and_not_believed() {
    let (asked, told) =
        run([answer(78, &["a", "b"]), answer(13, &[]), answer(80, &["a", "b"])]).await;
    assert_eq!(asks(&asked), [Consistent, blocking(78), Consistent, blocking(80)]);
    assert_eq!(told, [Answered, changed(78, &["a", "b"]), Answered]);
}

#[tokio::test(start_paused = true)]
async fn a_low_index_of_a_consistent_read_is_a_wipe() {
    let (asked, told) =
        run([answer(78, &["a"]), answer(13, &[]), answer(13, &[]), answer(14, &["b"])]).await;
    assert_eq!(asks(&asked), [Consistent, blocking(78), Consistent, blocking(13), blocking(14)]);
    assert_eq!(
        told,
        [Answered, changed(78, &["a"]), Answered, changed(13, &[]), Answered, changed(14, &["b"])]
    );
}

#[tokio::test(start_paused = true)]
async fn an_index_of_zero_is_one() {
    let (asked, _) = run([answer(0, &["a"]), answer(0, &["a"])]).await;
    assert_eq!(asks(&asked), [Consistent, blocking(1), blocking(1)]);
}

#[tokio::test(start_paused = true)]
async fn an_error_keeps_the_set_and_asks_consistently() {
    let bad = || Ok(Answer::new(8, "<html>"));
    let (asked, told) = run([
        answer(7, &["a"]),
        Err(Error::Timeout),
        bad(),
        Err(Error::Index),
        answer(7, &["a"]),
        answer(8, &[]),
    ])
    .await;
    assert_eq!(
        asks(&asked),
        [Consistent, blocking(7), Consistent, Consistent, Consistent, blocking(7), blocking(8)]
    );
    assert_eq!(
        told,
        [
            Answered,
            changed(7, &["a"]),
            Failed(Cause::Transport),
            Failed(Cause::Invalid),
            Failed(Cause::Invalid),
            Answered,
            Answered,
            changed(8, &[]),
        ]
    );
}

/// As [`answer`], with addresses: an empty one is nonsense.
fn addressed(index: u64, addresses: &[&str]) -> Result<Answer, Error> {
    let entries: Vec<_> = addresses
        .iter()
        .enumerate()
        .map(|(id, address)| {
            json!({"Node": {"Node": "n"},
                "Service": {"ID": id.to_string(), "Address": address, "Port": 80}})
        })
        .collect();
    Ok(Answer::new(index, json!(entries).to_string()))
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_is_mostly_nonsense_takes_nothing_away() {
    let good = || addressed(7, &["10.0.0.1", "10.0.0.2", "10.0.0.3"]);
    let changes =
        |told: Vec<Told>| told.iter().filter(|told| matches!(told, Told::Changed(..))).count();
    for (second, refused) in [
        (["10.0.0.1", "", ""], true),
        (["10.0.0.1", "10.0.0.2", ""], false),
        // Host names are not resolved, and no nonsense either.
        (["10.0.0.1", "a.example", "b.example"], false),
    ] {
        let (_, told) = run([good(), addressed(8, &second)]).await;
        assert_eq!(told.contains(&Failed(Cause::Invalid)), refused, "{second:?}");
        assert_eq!(changes(told), if refused { 1 } else { 2 }, "{second:?}");
    }
    // Nonsense that comes in addition takes nothing away either.
    let (_, told) = run([addressed(7, &["10.0.0.1"]), addressed(8, &["10.0.0.1", "", ""])]).await;
    assert_eq!(changes(told), 2);
    // At a start there is nothing to lose, and after a bad start any good one is a gain.
    let (_, told) = run([addressed(7, &["10.0.0.1", "", ""]), good()]).await;
    assert_eq!(changes(told), 2);
}

#[tokio::test(start_paused = true)]
async fn backs_off_and_starts_over_after_an_answer() {
    let errors = |n| (0..n).map(|_| Err(Error::Timeout));
    let (asked, _) =
        run(errors(30).chain([answer(7, &["a"])]).chain(errors(1)).chain([answer(8, &["a"])]))
            .await;
    let waits: Vec<_> = asked.windows(2).map(|w| w[1].0 - w[0].0).collect();
    assert!(waits.iter().all(|wait| *wait <= Duration::from_secs(10)));
    let ms = Duration::from_millis;
    assert!(waits[0] <= ms(251) && waits[1] <= ms(501) && waits[2] <= ms(1001));
    assert!(
        waits[10..30].iter().sum::<Duration>() > Duration::from_secs(20),
        "full jitter to 10 s"
    );
    assert!(waits[31] <= ms(251), "the answer ended the back-off");
}

#[tokio::test(start_paused = true)]
async fn waits_for_a_person_after_a_denial() {
    let (asked, _) = run([Err(Error::Denied), answer(7, &["a"])]).await;
    let wait = asked[1].0;
    assert!(wait >= Duration::from_secs(30) && wait <= Duration::from_secs(60), "{wait:?}");
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_never_waits_does_not_make_it_spin() {
    let (asked, told) = run((0..500).map(|_| answer(7, &["a"]))).await;
    let took = asked[500].0;
    assert!(took >= Duration::from_secs(8), "500 answers in {took:?}");
    assert_eq!(told.iter().filter(|told| matches!(told, Told::Changed(..))).count(), 1);
}

/// The index moves on only when the set was taken over: a sink that is slow is not asked past.
#[tokio::test(start_paused = true)]
async fn does_not_go_on_before_the_set_is_taken_over() {
    struct Stuck;
    impl Sink for Stuck {
        async fn changed(&mut self, _: Arc<Snapshot>) -> Option<Instant> {
            std::future::pending().await
        }
        fn answered(&mut self) {}
        fn failed(&mut self, _: &Error) {}
    }
    let mut script =
        Script { answers: [answer(7, &["a"]), answer(8, &["b"])].into(), ..Default::default() };
    let end = tokio::time::timeout(
        Duration::from_secs(60),
        follow(&mut script, &mut no_names(), &mut Stuck),
    )
    .await;
    assert!(end.is_err());
    assert_eq!(asks(&script.asked), [Consistent]);
}

/// A sink that holds something back is called again in time, by an answer of the leader, though
/// Consul has nothing new to say; errors delay that, and nothing else.
#[tokio::test(start_paused = true)]
async fn asks_the_leader_when_the_sink_wants_to_know() {
    let recheck = Some((Duration::from_secs(30), 1));
    struct Waiting(Script);
    impl Transport for Waiting {
        async fn ask(&mut self, ask: Ask) -> Result<Answer, Error> {
            // Long polls end with the wait, or never.
            if let (Ask::Blocking { .. }, Some(Ok(_)) | None) = (ask, self.0.answers.front()) {
                let begin = *self.0.begin.get_or_insert_with(Instant::now);
                self.0.asked.push((begin.elapsed(), ask));
                return std::future::pending().await;
            }
            self.0.ask(ask).await
        }
    }
    let answers = [answer(7, &["a"]), answer(7, &["a"])];
    let mut script = Waiting(Script { answers: answers.into(), ..Default::default() });
    let mut listener = Listener { recheck, ..Default::default() };
    let end = tokio::time::timeout(
        Duration::from_secs(3600),
        follow(&mut script, &mut no_names(), &mut listener),
    )
    .await;
    assert!(end.is_err());
    assert_eq!(asks(&script.0.asked), [Consistent, blocking(7), Consistent, blocking(7)]);
    assert_eq!(script.0.asked[2].0.as_secs(), 30);
    assert_eq!(listener.told, [Answered, changed(7, &["a"]), Answered, changed(7, &["a"])]);
}

/// An agent that answers at first, and is away from then on until it is back.
struct Away {
    back: Instant,
    asked: Vec<Instant>,
}

impl Transport for Away {
    async fn ask(&mut self, ask: Ask) -> Result<Answer, Error> {
        let now = Instant::now();
        self.asked.push(now);
        match ask {
            Ask::Blocking { .. } if now >= self.back => std::future::pending().await,
            _ if self.asked.len() > 1 && now < self.back => Err(Error::Transport("refused".into())),
            _ => answer(7, &["a", "b"]),
        }
    }
    async fn stirred(&mut self) {
        // The prober sees it at the next half second.
        sleep_until(self.back + Duration::from_millis(500)).await;
    }
}

#[tokio::test(start_paused = true)]
async fn ten_minutes_without_consul_change_nothing() {
    /// What was told, and what was worth a line, with the times.
    #[derive(Default)]
    struct Seen {
        report: crate::report::Report,
        changes: usize,
        errors: Vec<Instant>,
        recovered: Option<(Instant, Duration)>,
    }
    impl Sink for Seen {
        async fn changed(&mut self, snapshot: Arc<Snapshot>) -> Option<Instant> {
            assert_eq!(snapshot.instances.len(), 2);
            self.changes += 1;
            None
        }
        fn answered(&mut self) {
            if let Some(time) = self.report.answered() {
                assert!(self.recovered.replace((Instant::now(), time)).is_none());
            }
        }
        fn failed(&mut self, error: &Error) {
            if self.report.failed(error) {
                self.errors.push(Instant::now());
            }
        }
    }
    let outage = Duration::from_secs(600);
    let back = Instant::now() + outage;
    let (mut away, mut names, mut seen) =
        (Away { back, asked: Vec::new() }, no_names(), Seen::default());
    let following = follow(&mut away, &mut names, &mut seen);
    let _ = tokio::time::timeout(2 * outage, following).await;

    assert_eq!(seen.changes, 1, "the set of before stands, and is the one of after");
    let (recovered, time) = seen.recovered.expect("a recovery");
    assert!(recovered - back <= Duration::from_secs(1), "{:?}", recovered - back);
    assert!(time >= outage - Duration::from_secs(1), "{time:?}");
    assert!(seen.errors.len() <= 10, "a line a minute: {}", seen.errors.len());
    // With full jitter below a cap of ten seconds it is five seconds from one question to the next.
    assert!((60..400).contains(&away.asked.len()), "{}", away.asked.len());
}

#[tokio::test(start_paused = true)]
async fn a_recheck_survives_errors() {
    let recheck = Some((Duration::from_millis(1), 1));
    let (asked, told) = run_with(
        Listener { recheck, ..Default::default() },
        [answer(7, &["a"]), Err(Error::Timeout), Err(Error::Timeout), answer(7, &["a"])],
    )
    .await;
    assert_eq!(asks(&asked)[1..4], [blocking(7), Consistent, Consistent]);
    assert_eq!(
        told,
        [
            Answered,
            changed(7, &["a"]),
            Failed(Cause::Transport),
            Failed(Cause::Transport),
            Answered,
            changed(7, &["a"]),
        ]
    );
}

/// Names that change with every question, as soon as they may be asked for.
#[derive(Clone, Default)]
struct Rotating(Arc<std::sync::atomic::AtomicU8>);

impl Lookup for Rotating {
    async fn lookup(&self, _: String) -> Result<Found, Failure> {
        let n = self.0.fetch_add(1, std::sync::atomic::Ordering::Relaxed) % 250;
        let addresses = vec![[10, 0, 0, n + 1].into()];
        Ok(Found { addresses, ttl: Duration::ZERO, missing: None })
    }
}

#[tokio::test(start_paused = true)]
async fn host_names_are_resolved_and_what_changes_of_them_is_told() {
    #[derive(Default)]
    struct Seen(Vec<(Instant, Arc<Resolved>)>);
    impl Sink for Seen {
        async fn changed(&mut self, snapshot: Arc<Snapshot>) -> Option<Instant> {
            self.0.push((Instant::now(), snapshot.names.clone()));
            None
        }
        fn answered(&mut self) {}
        fn failed(&mut self, error: &Error) {
            panic!("{error}")
        }
    }
    let hosts: Vec<String> = (0..100).map(|n| format!("host-{n}.example")).collect();
    let hosts: Vec<&str> = hosts.iter().map(String::as_str).collect();
    let mut script = Script { answers: [addressed(7, &hosts)].into(), ..Default::default() };
    let (mut names, mut seen) = (Names::new(Rotating::default()), Seen::default());
    let following = follow(&mut script, &mut names, &mut seen);
    let _ = tokio::time::timeout(Duration::from_secs(600), following).await;

    let (_, first) = &seen.0[0];
    assert_eq!(first.len(), 100, "the first set has all names");
    assert!(seen.0.len() > 50, "each name changes about every five seconds");
    let rests: Vec<_> = seen.0.windows(2).map(|two| two[1].0 - two[0].0).collect();
    assert!(rests[1..].iter().all(|rest| *rest >= RENAMES), "{rests:?}");
    assert!(seen.0.windows(2).all(|two| two[0].1 != two[1].1), "nothing is told twice");
}

/// What was told, in words.
#[derive(Default)]
struct Seen {
    told: Vec<String>,
    before: Vec<(String, String)>,
}

impl Sink for Seen {
    async fn changed(&mut self, snapshot: Arc<Snapshot>) -> Option<Instant> {
        self.told.push(format!("{} at {}", snapshot.instances.len(), snapshot.index));
        None
    }
    fn answered(&mut self) {}
    fn failed(&mut self, error: &Error) {
        self.told.push(error.to_string());
    }
    fn before(&self) -> Vec<(String, String)> {
        self.before.clone()
    }
}

/// A transport that does not vouch for what takes instances away.
struct Unsure(Script);

impl Transport for Unsure {
    async fn ask(&mut self, ask: Ask) -> Result<Answer, Error> {
        self.0.ask(ask).await
    }
    async fn vouch(&mut self, _: &Answer, nodes: &[&str]) -> Result<(), Error> {
        Err(Error::Rights(nodes.join(",")))
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_not_vouched_for_takes_nothing_away() {
    let on = |index, keys: &[(&str, &str)]| {
        let entries: Vec<_> = keys
            .iter()
            .map(|(node, id)| {
                json!({"Node": {"Node": node, "Address": "10.0.0.1"},
                    "Service": {"ID": id, "Port": 80}})
            })
            .collect();
        Ok(Answer::new(index, json!(entries).to_string()))
    };
    let script = Script {
        answers: [
            on(5, &[]),
            on(6, &[("n1", "a"), ("n2", "b"), ("n3", "c")]),
            on(7, &[("n1", "a")]),
            on(8, &[("n0", "x"), ("n1", "a"), ("n2", "b"), ("n3", "c"), ("n4", "y")]),
            on(9, &[]),
        ]
        .into(),
        ..Default::default()
    };
    let (mut script, mut names, mut seen) = (Unsure(script), no_names(), Seen::default());
    let following = follow(&mut script, &mut names, &mut seen);
    let _ = tokio::time::timeout(Duration::from_secs(600), following).await;
    let denied = |nodes: &str| format!("permission denied: {nodes}");
    assert_eq!(
        seen.told,
        [denied(""), "3 at 6".into(), denied("n2,n3"), "5 at 8".into(), denied("n0,n1,n2,n3,n4")]
    );
    assert!(asks(&script.0.asked)[1..].contains(&Consistent), "asked again by the leader");
}

/// What served since before the first answer is taken away by it no more easily than later.
#[tokio::test(start_paused = true)]
async fn the_first_answer_is_measured_by_what_served_before() {
    let answers = [
        // Both are gone, then one, then none; then most of an answer is nonsense.
        addressed(5, &[]),
        answer(6, &["0"]),
        addressed(7, &["", ""]),
    ];
    let before = [("m", "z"), ("n", "0")].map(|(node, id)| (node.into(), id.into())).into();
    let (mut names, mut seen) = (no_names(), Seen { before, ..Seen::default() });
    let mut script = Unsure(Script { answers: answers.into(), ..Default::default() });
    let following = follow(&mut script, &mut names, &mut seen);
    let _ = tokio::time::timeout(Duration::from_secs(600), following).await;
    let unusable = Error::Unusable { unusable: 2, all: 2 }.to_string();
    assert_eq!(seen.told, ["permission denied: m,n", "permission denied: m", &unusable]);
}

#[tokio::test(start_paused = true)]
async fn the_network_is_the_transports() {
    struct Wide(Script);
    impl Transport for Wide {
        async fn ask(&mut self, ask: Ask) -> Result<Answer, Error> {
            self.0.ask(ask).await
        }
        fn network(&self) -> Network {
            Network::Wan
        }
    }
    #[derive(Default)]
    struct Ports(Vec<u16>);
    impl Sink for Ports {
        async fn changed(&mut self, snapshot: Arc<Snapshot>) -> Option<Instant> {
            self.0.extend(snapshot.instances.iter().map(|it| it.address.as_ref().unwrap().port));
            None
        }
        fn answered(&mut self) {}
        fn failed(&mut self, error: &Error) {
            panic!("{error}")
        }
    }
    let entry = json!([{"Node": {"Node": "n"}, "Service": {"ID": "a", "Address": "10.0.0.1",
        "Port": 80, "TaggedAddresses": {"wan": {"Address": "1.2.3.4", "Port": 8080}}}}]);
    let answers = [Ok(Answer::new(7, entry.to_string()))].into();
    let mut script = Wide(Script { answers, ..Default::default() });
    let (mut names, mut ports) = (no_names(), Ports::default());
    let following = follow(&mut script, &mut names, &mut ports);
    let _ = tokio::time::timeout(Duration::from_secs(60), following).await;
    assert_eq!(ports.0, [8080]);
}

/// What a thread rests for is its own work: that it had to wait for another's is none.
#[test]
fn a_wait_is_no_work() {
    /// Works for so long.
    fn work(time: Duration) {
        let begin = processor_time();
        while processor_time() - begin < time {
            std::hint::black_box((0..1024).map(std::hint::black_box).sum::<u64>());
        }
    }
    let begin = processor_time();
    let other = std::thread::spawn(|| work(Duration::from_millis(50)));
    other.join().unwrap();
    let waited = processor_time() - begin;
    assert!(waited < Duration::from_millis(25), "{waited:?}");
    work(Duration::from_millis(2));
}
