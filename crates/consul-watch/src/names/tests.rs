use std::collections::VecDeque;
use std::sync::Mutex;

use super::*;

/// Answers from a script, and what was asked, with the times.
#[derive(Clone, Default)]
struct Fake(Arc<Mutex<Script>>);

#[derive(Default)]
struct Script {
    /// What a name's questions are answered with. The last one stays; without any, none is.
    replies: BTreeMap<String, VecDeque<Reply>>,
    asked: Vec<(Instant, String)>,
    /// Questions without an answer so far, now and at the most.
    open: usize,
    most: usize,
}

#[derive(Clone)]
struct Reply {
    after: Duration,
    answer: Result<Found, Failure>,
}

impl Reply {
    fn after(self, after: Duration) -> Self {
        Self { after, ..self }
    }
}

/// A question that has no answer yet, and was not given up.
struct Open(Fake);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.0.lock().unwrap().open -= 1;
    }
}

impl Lookup for Fake {
    async fn lookup(&self, name: String) -> Result<Found, Failure> {
        let (_open, reply) = {
            let mut script = self.0.lock().unwrap();
            script.asked.push((Instant::now(), name.clone()));
            script.open += 1;
            script.most = script.most.max(script.open);
            let reply = script.replies.get_mut(&name).and_then(|all| match all.len() {
                0 | 1 => all.front().cloned(),
                _ => all.pop_front(),
            });
            (Open(self.clone()), reply)
        };
        let Some(Reply { after, answer }) = reply else { return std::future::pending().await };
        tokio::time::sleep(after).await;
        assert_ne!(answer, Err(Failure::Other("panic".to_owned())), "as the test asked for");
        answer
    }
}

impl Fake {
    fn with<const N: usize>(name: &str, replies: [Reply; N]) -> Self {
        Self::default().and(name, replies)
    }

    fn and<const N: usize>(self, name: &str, replies: [Reply; N]) -> Self {
        self.0.lock().unwrap().replies.insert(name.to_owned(), replies.into());
        self
    }

    fn names(&self, wanted: &[&str]) -> Names<Self> {
        let mut names = Names::new(self.clone());
        names.want(wanted.iter().copied());
        names
    }

    /// When the name was asked for.
    fn asked(&self, name: &str) -> Vec<Instant> {
        let script = self.0.lock().unwrap();
        script.asked.iter().filter(|(_, asked)| asked == name).map(|(at, _)| *at).collect()
    }

    /// The waits between its questions.
    fn waits(&self, name: &str) -> Vec<Duration> {
        self.asked(name).windows(2).map(|at| at[1] - at[0]).collect()
    }

    fn open(&self) -> usize {
        self.0.lock().unwrap().open
    }
}

fn ips(addresses: &[&str]) -> Vec<IpAddr> {
    addresses.iter().map(|ip| ip.parse().unwrap()).collect()
}

fn found(ttl: u64, addresses: &[&str]) -> Reply {
    let found = Found { addresses: ips(addresses), ttl: Duration::from_secs(ttl), missing: None };
    Reply { after: Duration::ZERO, answer: Ok(found) }
}

fn in_part(ttl: u64, addresses: &[&str], why: Failure) -> Reply {
    let mut reply = found(ttl, addresses);
    reply.answer.as_mut().unwrap().missing = Some(why);
    reply
}

fn fails(why: Failure) -> Reply {
    Reply { after: Duration::ZERO, answer: Err(why) }
}

const fn secs(secs: u64) -> Duration {
    Duration::from_secs(secs)
}

/// Lets the time go by; whether something changed, and how often.
async fn pass(names: &mut Names<Fake>, time: Duration) -> usize {
    let end = Instant::now() + time;
    let mut changes = 0;
    while tokio::time::timeout_at(end, names.changed()).await.is_ok() {
        changes += 1;
    }
    changes
}

/// A wait of this length, with its jitter and the timer's grain.
#[track_caller]
fn assert_waited(wait: Duration, about: Duration) {
    let most = about.mul_f64(1.0 + JITTER) + Duration::from_millis(2);
    assert!(wait >= about && wait <= most, "{wait:?} is not about {about:?}");
}

#[tokio::test(start_paused = true)]
async fn a_new_name_is_asked_for_at_once() {
    let fake = Fake::with("a", [found(60, &["10.0.0.1"])]).and("b", [found(60, &["10.0.0.2"])]);
    let mut names = fake.names(&["a"]);
    let begin = Instant::now();
    names.changed().await;
    assert_eq!(*names.resolved(), Resolved::from([("a".into(), ips(&["10.0.0.1"]))]));
    // Before its turn, and without a question for the one that is known.
    names.want(["b", "a", "a"]);
    names.changed().await;
    assert_eq!(names.resolved()["b"], ips(&["10.0.0.2"]));
    assert_eq!(names.resolved()["a"], ips(&["10.0.0.1"]));
    assert_eq!(begin.elapsed(), Duration::ZERO);
    assert_eq!(fake.asked("a").len(), 1);
}

#[tokio::test(start_paused = true)]
async fn all_addresses_are_taken_sorted_and_each_once() {
    let all = ["fd00::2", "10.0.0.9", "fd00::1", "10.0.0.10", "10.0.0.9", "::ffff:1.2.3.4"];
    let mut names = Fake::with("a", [found(60, &all)]).names(&["a"]);
    names.changed().await;
    let sorted = ["10.0.0.9", "10.0.0.10", "::ffff:1.2.3.4", "fd00::1", "fd00::2"];
    assert_eq!(names.resolved()["a"], ips(&sorted));
}

#[tokio::test(start_paused = true)]
async fn an_address_that_is_no_hosts_is_not_taken() {
    let bad = ["0.0.0.0", "224.0.0.1", "::", "ff02::1"];
    let fake = Fake::with("a", [found(60, &[&bad[..], &["10.0.0.1"]].concat())])
        .and("b", [found(60, &bad)]);
    let mut names = fake.names(&["a", "b"]);
    names.settled(secs(1)).await;
    assert_eq!(*names.resolved(), Resolved::from([("a".into(), ips(&["10.0.0.1"]))]));
    assert_eq!(names.failing().collect::<Vec<_>>(), [("b", &Failure::Absent)]);
}

#[tokio::test(start_paused = true)]
async fn at_most_64_addresses_of_a_name() {
    let all: Vec<String> = (0..200).rev().map(|n| format!("10.0.0.{n}")).collect();
    let all: Vec<&str> = all.iter().map(String::as_str).collect();
    let mut names = Fake::with("a", [found(60, &all)]).names(&["a"]);
    names.changed().await;
    let resolved = names.resolved();
    assert_eq!(resolved["a"].len(), 64);
    assert_eq!(resolved["a"][63], ips(&["10.0.0.63"])[0], "the same ones, in whatever order");
}

#[tokio::test(start_paused = true)]
async fn a_name_is_asked_for_again_after_its_ttl_within_bounds() {
    for (ttl, wait) in [(0, 5), (1, 5), (5, 5), (60, 60), (300, 300), (86_400, 300)] {
        let fake = Fake::with("a", [found(ttl, &["10.0.0.1"])]);
        pass(&mut fake.names(&["a"]), secs(2000)).await;
        let waits = fake.waits("a");
        assert!(waits.len() >= 5, "asked {} times", waits.len());
        waits.into_iter().for_each(|waited| assert_waited(waited, secs(wait)));
    }
}

#[tokio::test(start_paused = true)]
async fn names_that_came_together_part() {
    let all: Vec<String> = (0..16).map(|n| format!("n{n}")).collect();
    let fake =
        all.iter().fold(Fake::default(), |fake, name| fake.and(name, [found(60, &["1.1.1.1"])]));
    let mut names = fake.names(&all.iter().map(String::as_str).collect::<Vec<_>>());
    pass(&mut names, secs(67)).await;
    let mut second: Vec<_> = all.iter().map(|name| fake.asked(name)[1]).collect();
    second.sort();
    assert!(second[15] - second[0] > secs(1), "{:?}", second[15] - second[0]);
}

#[tokio::test(start_paused = true)]
async fn the_waits_after_failures_double() {
    let none = || fails(Failure::Absent);
    let fake = Fake::with("a", [(); 9].map(|()| none()))
        .and("b", [none(), none(), found(0, &["1.1.1.1"]), none(), none()]);
    pass(&mut fake.names(&["a", "b"]), secs(400)).await;
    let expected = [5, 10, 20, 40, 60, 60, 60].map(secs);
    fake.waits("a")
        .into_iter()
        .zip(expected)
        .for_each(|(waited, wait)| assert_waited(waited, wait));
    assert!(fake.waits("a").len() >= expected.len());
    // An answer ends it.
    let expected = [5, 10, 5, 5, 10].map(secs);
    fake.waits("b")
        .into_iter()
        .zip(expected)
        .for_each(|(waited, wait)| assert_waited(waited, wait));
}

#[tokio::test(start_paused = true)]
async fn a_lookup_that_takes_too_long_has_failed() {
    let fake =
        Fake::with("a", [found(60, &["10.0.0.1"]).after(secs(11)), found(60, &["10.0.0.2"])])
            .and("b", [found(60, &["10.0.0.3"]).after(secs(9))]);
    let mut names = fake.names(&["a", "b"]);
    assert_eq!(pass(&mut names, secs(12)).await, 1);
    assert_eq!(names.resolved().keys().collect::<Vec<_>>(), ["b"]);
    assert_eq!(names.failing().collect::<Vec<_>>(), [("a", &Failure::Timeout)]);
    assert_eq!(fake.open(), 0, "it was given up");
    pass(&mut names, secs(4)).await;
    assert_eq!(names.resolved()["a"], ips(&["10.0.0.2"]));
    assert_waited(fake.waits("a")[0] - PATIENCE, FIRST);
}

#[tokio::test(start_paused = true)]
async fn a_lookup_that_panics_has_failed() {
    let fake = Fake::with("a", [fails(Failure::Other("panic".into())), found(60, &["10.0.0.1"])]);
    let mut names = fake.names(&["a"]);
    names.settled(secs(1)).await;
    assert!(matches!(names.failing().next(), Some(("a", Failure::Other(_)))));
    names.changed().await;
    assert_eq!(names.failing().count(), 0);
}

#[tokio::test(start_paused = true)]
async fn at_most_16_lookups_at_a_time() {
    let all: Vec<String> = (0..100).map(|n| format!("n{n}")).collect();
    let slow = || found(60, &["10.0.0.1"]).after(secs(1));
    let fake = all.iter().fold(Fake::default(), |fake, name| fake.and(name, [slow()]));
    let begin = Instant::now();
    let mut names = fake.names(&all.iter().map(String::as_str).collect::<Vec<_>>());
    names.settled(secs(60)).await;
    assert_eq!(names.resolved().len(), 100);
    assert_eq!(begin.elapsed().as_secs(), 7, "100 in 7 rounds");
    pass(&mut names, secs(300)).await;
    assert_eq!(fake.0.lock().unwrap().most, 16);
}

#[tokio::test(start_paused = true)]
async fn names_that_are_silent_delay_the_others_no_longer_than_a_lookup_may_take() {
    let silent: Vec<String> = (0..20).map(|n| format!("n{n}")).collect();
    let fake = Fake::with("z", [found(60, &["10.0.0.1"])]);
    let begin = Instant::now();
    let mut names = fake.names(&silent.iter().map(String::as_str).chain(["z"]).collect::<Vec<_>>());
    names.changed().await;
    assert!(names.resolved().contains_key("z"));
    assert_eq!(begin.elapsed().as_secs(), PATIENCE.as_secs());
}

#[tokio::test(start_paused = true)]
async fn a_name_no_longer_wanted_is_forgotten() {
    let fake = Fake::with("a", [found(60, &["10.0.0.1"])]).and("b", [found(60, &["10.0.0.2"])]);
    let mut names = fake.names(&["a", "b"]);
    names.settled(secs(1)).await;
    names.want(["b"]);
    assert_eq!(names.resolved().keys().collect::<Vec<_>>(), ["b"]);
    pass(&mut names, secs(600)).await;
    assert_eq!(fake.asked("a").len(), 1);
    assert!(fake.asked("b").len() > 5);
    // Wanted again it is a new one, and asked for once.
    for _ in 0..5 {
        names.want(["b"]);
        names.want(["a", "b"]);
        assert_eq!(names.resolved().keys().collect::<Vec<_>>(), ["b"]);
        names.settled(secs(1)).await;
        assert_eq!(names.resolved().len(), 2);
    }
    let asked = fake.asked("a").len();
    pass(&mut names, secs(70)).await;
    assert_eq!(fake.asked("a").len(), asked + 1);
}

#[tokio::test(start_paused = true)]
async fn the_answer_for_a_name_no_longer_wanted_is_dropped() {
    let fake = Fake::with("a", [found(60, &["10.0.0.1"]).after(secs(2))]).and("b", []);
    let mut names = fake.names(&["a", "b"]);
    assert_eq!(pass(&mut names, secs(1)).await, 0);
    names.want(["b"]);
    assert_eq!(pass(&mut names, secs(3)).await, 0);
    assert_eq!(fake.open(), 1, "the lookup of a is over");
    assert!(names.resolved().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_name_wanted_anew_takes_no_answer_to_the_old_question() {
    let fake = Fake::with("a", [found(60, &["10.0.0.1"]), found(60, &["10.0.0.2"])]);
    let mut names = fake.names(&["a"]);
    // The answer is there, and nobody has taken it yet.
    tokio::task::yield_now().await;
    assert_eq!((fake.asked("a").len(), fake.open()), (1, 0));
    names.want([]);
    names.want(["a"]);
    names.settled(secs(1)).await;
    assert_eq!(names.resolved()["a"], ips(&["10.0.0.2"]));
}

/// Names that are forgotten make room at once, though their tasks are not over yet.
#[tokio::test(start_paused = true)]
async fn forgotten_lookups_do_not_count() {
    let all: Vec<String> = (0..16).map(|n| format!("n{n}")).collect();
    let fake = Fake::with("a", [found(60, &["10.0.0.1"])]);
    let mut names = fake.names(&all.iter().map(String::as_str).collect::<Vec<_>>());
    tokio::task::yield_now().await;
    assert_eq!(fake.open(), 16);
    let begin = Instant::now();
    names.want(["a"]);
    names.changed().await;
    assert_eq!(begin.elapsed(), Duration::ZERO);
    assert_eq!(fake.open(), 0);
}

#[tokio::test(start_paused = true)]
async fn the_last_good_answer_stands_whatever_fails() {
    let fake = Fake::with(
        "a",
        [
            found(5, &["10.0.0.1"]),
            fails(Failure::Absent),
            fails(Failure::Timeout),
            fails(Failure::Other("SERVFAIL".into())),
            found(5, &[]),
            found(5, &["0.0.0.0"]),
            found(5, &["10.0.0.7"]).after(secs(60)),
            fails(Failure::Other("panic".into())),
            fails(Failure::Absent),
        ],
    );
    let mut names = fake.names(&["a"]);
    assert_eq!(pass(&mut names, secs(3600)).await, 1);
    assert_eq!(names.resolved()["a"], ips(&["10.0.0.1"]));
    assert!(fake.asked("a").len() > 9, "and it is still asked for");
}

#[tokio::test(start_paused = true)]
async fn an_answer_in_part_takes_nothing_of_the_other_family_away() {
    let fake = Fake::with(
        "a",
        [
            found(60, &["10.0.0.1", "fd00::1"]),
            in_part(60, &["10.0.0.2"], Failure::Timeout),
            in_part(60, &["fd00::2"], Failure::Timeout),
            found(60, &["10.0.0.3"]),
        ],
    );
    let mut names = fake.names(&["a"]);
    let mut told = Vec::new();
    for _ in 0..4 {
        names.changed().await;
        told.push((names.resolved()["a"].clone(), names.failing().count()));
    }
    assert_eq!(
        told,
        [
            (ips(&["10.0.0.1", "fd00::1"]), 0),
            (ips(&["10.0.0.2", "fd00::1"]), 1),
            (ips(&["10.0.0.2", "fd00::2"]), 1),
            (ips(&["10.0.0.3"]), 0),
        ]
    );
    // What is missing is asked for as after a failure, and no later than the TTL says.
    let waits = fake.waits("a");
    [60, 5, 10]
        .map(secs)
        .into_iter()
        .zip(waits)
        .for_each(|(wait, waited)| assert_waited(waited, wait));
}

#[tokio::test(start_paused = true)]
async fn a_family_that_always_fails_does_not_shorten_the_ttl_for_ever() {
    let fake = Fake::with("a", [in_part(30, &["10.0.0.1"], Failure::Timeout)]);
    pass(&mut fake.names(&["a"]), secs(400)).await;
    let waits = fake.waits("a");
    [5, 10, 20, 30, 30]
        .map(secs)
        .into_iter()
        .zip(waits)
        .for_each(|(wait, waited)| assert_waited(waited, wait));
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_says_the_same_is_no_change() {
    let fake =
        Fake::with("a", [found(5, &["10.0.0.1", "10.0.0.2"]), found(5, &["10.0.0.2", "10.0.0.1"])]);
    let mut names = fake.names(&["a"]);
    assert_eq!(pass(&mut names, secs(60)).await, 1);
    let before = names.resolved();
    assert_eq!(pass(&mut names, secs(60)).await, 0);
    names.want(["a"]);
    assert!(Arc::ptr_eq(&before, &names.resolved()), "shared, not copied");
}

#[tokio::test(start_paused = true)]
async fn answers_that_come_together_are_one_change() {
    let fake = Fake::with("a", [found(60, &["10.0.0.1"])]).and("b", [found(60, &["10.0.0.2"])]);
    let mut names = fake.names(&["a", "b"]);
    assert_eq!(pass(&mut names, secs(1)).await, 1);
    assert_eq!(names.resolved().len(), 2);
}

#[tokio::test(start_paused = true)]
async fn what_was_handed_out_does_not_change() {
    let fake = Fake::with("a", [found(5, &["10.0.0.1"]), found(60, &["10.0.0.2"])]);
    let mut names = fake.names(&["a"]);
    names.changed().await;
    let before = names.resolved();
    names.changed().await;
    names.want([]);
    assert_eq!(before["a"], ips(&["10.0.0.1"]));
}

#[tokio::test(start_paused = true)]
async fn nothing_changes_while_no_name_is_wanted() {
    let fake = Fake::with("a", [found(5, &["10.0.0.1"])]);
    let mut names = Names::new(fake.clone());
    assert_eq!(pass(&mut names, secs(3600)).await, 0);
    // Nor when there was one, whose answer nobody was told of.
    names.want(["a"]);
    names.settled(secs(1)).await;
    names.want([]);
    assert_eq!(pass(&mut names, secs(3600)).await, 0);
    assert_eq!(fake.asked("a").len(), 1);
    assert!(names.resolved().is_empty());
    names.settled(secs(3600)).await;
}

/// It stands in a `select!`, and is dropped there at any time.
#[tokio::test(start_paused = true)]
async fn dropping_the_wait_for_a_change_loses_nothing() {
    let slow = |ip| found(5, &[ip]).after(Duration::from_millis(500));
    let fake = Fake::with("a", [slow("10.0.0.1"), slow("10.0.0.2"), slow("10.0.0.3")]);
    let mut names = fake.names(&["a"]);
    let mut told = Vec::new();
    for n in 0..1000 {
        let short = Duration::from_millis(n % 40);
        if tokio::time::timeout(short, names.changed()).await.is_ok() {
            told.push(names.resolved()["a"].clone());
        }
    }
    assert_eq!(told, [ips(&["10.0.0.1"]), ips(&["10.0.0.2"]), ips(&["10.0.0.3"])]);
    assert_eq!(fake.asked("a").len(), 4, "no question was lost, and none asked twice");
}

/// A loop that is busy elsewhere finds the change when it comes back.
#[tokio::test(start_paused = true)]
async fn a_change_waits_until_somebody_asks() {
    let fake = Fake::with("a", [found(5, &["10.0.0.1"])]);
    let mut names = fake.names(&["a"]);
    tokio::time::sleep(secs(600)).await;
    assert_eq!(fake.asked("a").len(), 1);
    names.changed().await;
    assert_eq!(names.resolved()["a"], ips(&["10.0.0.1"]));
}

#[tokio::test(start_paused = true)]
async fn settled_waits_for_each_name_to_be_answered_or_to_fail() {
    let fake = Fake::with("a", [found(60, &["10.0.0.1"]).after(secs(2))])
        .and("b", [fails(Failure::Absent).after(secs(3))]);
    let begin = Instant::now();
    let mut names = fake.names(&["a", "b"]);
    names.settled(secs(5)).await;
    assert_eq!(begin.elapsed().as_secs(), 3);
    assert_eq!(names.resolved().len(), 1);
    // Once is enough, and a new one makes it wait again, not longer than it may.
    names.settled(secs(5)).await;
    assert_eq!(begin.elapsed().as_secs(), 3);
    names.want(["a", "b", "silent"]);
    names.settled(secs(5)).await;
    assert_eq!(begin.elapsed().as_secs(), 8);
    assert_eq!(names.resolved().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_change_while_settling_is_told_once() {
    let fake = Fake::with("a", [found(300, &["10.0.0.1"])]).and("b", [found(300, &["10.0.0.2"])]);
    let mut names = fake.names(&["a"]);
    names.settled(secs(1)).await;
    names.resolved();
    assert_eq!(pass(&mut names, secs(60)).await, 0, "it is known already");
    names.want(["a", "b"]);
    names.settled(secs(1)).await;
    assert_eq!(pass(&mut names, secs(60)).await, 1, "nobody has asked");
    // Nor does it count how often it was said.
    let mut names = Fake::with("a", [found(5, &["10.0.0.1"])]).names(&["a", "silent"]);
    names.settled(secs(30)).await;
    assert_eq!(pass(&mut names, secs(60)).await, 1);
}

#[tokio::test(start_paused = true)]
async fn dropping_it_ends_a_lookup_that_is_never_answered() {
    let fake = Fake::default();
    let mut names = fake.names(&["a", "b"]);
    pass(&mut names, secs(1)).await;
    assert_eq!(fake.open(), 2);
    let begin = Instant::now();
    drop(names);
    tokio::task::yield_now().await;
    assert_eq!((fake.open(), begin.elapsed()), (0, Duration::ZERO));
}

#[tokio::test(start_paused = true)]
async fn questions_are_bounded_in_an_hour() {
    let fake = Fake::with("a", [found(0, &["10.0.0.1"])])
        .and("b", [fails(Failure::Absent)])
        // Never the same twice.
        .and("c", std::array::from_fn::<_, 250, _>(|n| found(0, &[&format!("10.0.0.{n}")])))
        .and("d", [in_part(0, &["10.0.0.1"], Failure::Timeout)]);
    let mut names = fake.names(&["a", "b", "c", "d", "silent"]);
    pass(&mut names, secs(3600)).await;
    for (name, most) in [("a", 720), ("b", 65), ("c", 720), ("d", 720), ("silent", 60)] {
        let asked = fake.asked(name).len();
        assert!(asked <= most && asked >= most * 4 / 5, "{name}: {asked} of {most}");
    }
}
