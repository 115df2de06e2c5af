//! Names resolved by asking a name server over real sockets.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use consul_watch::names::{Failure, Found, Lookup, Names};
use consul_watch::resolver::Resolver;
use hickory_resolver::proto::op::{Message, ResponseCode};
use hickory_resolver::proto::rr::rdata::CNAME;
use hickory_resolver::proto::rr::{Name, RData, Record, RecordType};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};

/// What the server does about a question.
#[derive(Clone)]
enum Reply {
    Records(Vec<Record>),
    Code(ResponseCode),
    Silence,
}

/// A name server that knows what the test says. A type that is missing is an answer without
/// records, and a name without any type is one that does not exist.
#[derive(Clone)]
struct Dns {
    address: SocketAddr,
    zone: Arc<Mutex<Zone>>,
}

#[derive(Default)]
struct Zone {
    replies: BTreeMap<(String, RecordType), Reply>,
    asked: usize,
}

impl Dns {
    async fn start() -> Self {
        let (udp, tcp) = loop {
            let udp = UdpSocket::bind("127.0.0.1:0").await.unwrap();
            // Its port may be taken for TCP.
            if let Ok(tcp) = TcpListener::bind(udp.local_addr().unwrap()).await {
                break (udp, tcp);
            }
        };
        let dns = Self { address: udp.local_addr().unwrap(), zone: Arc::default() };
        let it = dns.clone();
        tokio::spawn(async move {
            let mut buf = [0; 4096];
            loop {
                let (len, from) = udp.recv_from(&mut buf).await.unwrap();
                if let Some(bytes) = it.reply(&buf[..len], true) {
                    udp.send_to(&bytes, from).await.unwrap();
                }
            }
        });
        let it = dns.clone();
        tokio::spawn(async move {
            loop {
                let (mut stream, _) = tcp.accept().await.unwrap();
                let it = it.clone();
                tokio::spawn(async move { while it.serve(&mut stream).await.is_some() {} });
            }
        });
        dns
    }

    async fn serve(&self, stream: &mut TcpStream) -> Option<()> {
        let len = stream.read_u16().await.ok()?;
        let mut question = vec![0; usize::from(len)];
        stream.read_exact(&mut question).await.ok()?;
        let bytes = self.reply(&question, false)?;
        stream.write_u16(u16::try_from(bytes.len()).unwrap()).await.ok()?;
        stream.write_all(&bytes).await.ok()
    }

    fn reply(&self, question: &[u8], is_udp: bool) -> Option<Vec<u8>> {
        let question = Message::from_vec(question).unwrap();
        let most = usize::from(question.max_payload());
        let query = question.queries[0].clone();
        let name = query.name().to_lowercase().to_ascii();
        let mut zone = self.zone.lock().unwrap();
        zone.asked += 1;
        let mut answer = question.into_response();
        let code = match zone.replies.get(&(name.clone(), query.query_type())) {
            Some(Reply::Silence) => return None,
            Some(Reply::Code(code)) => *code,
            Some(Reply::Records(records)) => {
                answer.add_answers(records.iter().cloned());
                ResponseCode::NoError
            }
            None if zone.replies.keys().any(|(known, _)| *known == name) => ResponseCode::NoError,
            None => ResponseCode::NXDomain,
        };
        answer.metadata.response_code = code;
        let bytes = answer.to_vec().unwrap();
        if bytes.len() <= most || !is_udp {
            return Some(bytes);
        }
        answer.answers.clear();
        answer.metadata.truncation = true;
        Some(answer.to_vec().unwrap())
    }

    fn set(&self, name: &str, kind: RecordType, reply: Reply) -> &Self {
        self.zone.lock().unwrap().replies.insert((name.to_owned(), kind), reply);
        self
    }

    /// The addresses of a name, and no others.
    fn addresses(&self, name: &str, ttl: u32, addresses: &[&str]) -> &Self {
        let mut kinds = BTreeMap::<_, Vec<_>>::new();
        for ip in ips(addresses) {
            let kind = if ip.is_ipv4() { RecordType::A } else { RecordType::AAAA };
            kinds.entry(kind).or_default().push(record(name, ttl, ip.into()));
        }
        self.forget(name);
        for (kind, records) in kinds {
            self.set(name, kind, Reply::Records(records));
        }
        self
    }

    fn forget(&self, name: &str) -> &Self {
        self.zone.lock().unwrap().replies.retain(|(known, _), _| known != name);
        self
    }

    fn asked(&self) -> usize {
        self.zone.lock().unwrap().asked
    }

    fn resolver(&self) -> Resolver {
        Resolver::with_servers([self.address])
    }

    async fn lookup(&self, name: &str) -> Result<Found, Failure> {
        self.resolver().lookup(name.to_owned()).await
    }
}

fn record(name: &str, ttl: u32, data: RData) -> Record {
    Record::from_rdata(Name::from_ascii(name).unwrap(), ttl, data)
}

fn ips(addresses: &[&str]) -> Vec<IpAddr> {
    addresses.iter().map(|ip| ip.parse().unwrap()).collect()
}

const SERVFAIL: Reply = Reply::Code(ResponseCode::ServFail);

#[tokio::test]
async fn all_addresses_of_both_families() {
    let dns = Dns::start().await;
    let all = ["10.0.0.3", "10.0.0.1", "10.0.0.2", "fd00::2", "fd00::1"];
    dns.addresses("web.example.", 30, &all);
    dns.set("web.example.", RecordType::TXT, SERVFAIL);
    let mut found = dns.lookup("web.example").await.unwrap();
    found.addresses.sort();
    assert_eq!(found.addresses, ips(&["10.0.0.1", "10.0.0.2", "10.0.0.3", "fd00::1", "fd00::2"]));
    assert_eq!(found.missing, None);
    assert!(found.ttl <= Duration::from_secs(30) && found.ttl > Duration::from_secs(29));
    assert_eq!(dns.asked(), 2, "once for each family");
}

#[tokio::test]
async fn one_family_is_enough() {
    let dns = Dns::start().await;
    dns.addresses("four.example.", 30, &["10.0.0.1"]).addresses("six.example.", 30, &["fd00::1"]);
    for (name, expected) in [("four.example", "10.0.0.1"), ("SIX.example.", "fd00::1")] {
        let found = dns.lookup(name).await.unwrap();
        assert_eq!((found.addresses, found.missing), (ips(&[expected]), None));
    }
}

#[tokio::test]
async fn the_ttl_is_the_shortest() {
    let dns = Dns::start().await;
    let six = record("web.example.", 20, ips(&["fd00::1"])[0].into());
    dns.addresses("web.example.", 300, &["10.0.0.1"]);
    dns.set("web.example.", RecordType::AAAA, Reply::Records(vec![six]));
    let ttl = dns.lookup("web.example").await.unwrap().ttl;
    assert!(ttl <= Duration::from_secs(20) && ttl > Duration::from_secs(19), "{ttl:?}");
}

#[tokio::test]
async fn an_answer_too_large_for_udp() {
    let dns = Dns::start().await;
    let all: Vec<String> = (0..250).map(|n| Ipv4Addr::new(10, 0, 0, n).to_string()).collect();
    dns.addresses("web.example.", 30, &all.iter().map(String::as_str).collect::<Vec<_>>());
    assert_eq!(dns.lookup("web.example").await.unwrap().addresses.len(), 250);
}

/// The target's records come along, or have to be asked for.
#[tokio::test]
async fn an_alias() {
    let dns = Dns::start().await;
    let alias = |ttl| {
        let target = CNAME(Name::from_ascii("web.example.").unwrap());
        record("alias.example.", ttl, RData::CNAME(target))
    };
    let target = record("web.example.", 300, ips(&["10.0.0.1"])[0].into());
    dns.addresses("web.example.", 300, &["10.0.0.1", "fd00::1"]);
    dns.set("alias.example.", RecordType::A, Reply::Records(vec![alias(20), target]));
    dns.set("alias.example.", RecordType::AAAA, Reply::Records(vec![alias(10)]));
    let found = dns.lookup("alias.example").await.unwrap();
    assert_eq!(found.addresses, ips(&["10.0.0.1", "fd00::1"]));
    assert!(found.ttl <= Duration::from_secs(10), "{:?}", found.ttl);
}

#[tokio::test]
async fn nothing_is_cached() {
    let dns = Dns::start().await;
    let resolver = dns.resolver();
    for addresses in [&["10.0.0.1", "fd00::1"][..], &["10.0.0.2"], &["fd00::1"]] {
        dns.addresses("web.example.", 3600, addresses);
        let found = resolver.lookup("web.example".to_owned()).await.unwrap();
        assert_eq!(found.addresses, ips(addresses));
    }
    dns.forget("web.example.");
    assert_eq!(resolver.lookup("web.example".to_owned()).await, Err(Failure::Absent));
    dns.addresses("web.example.", 3600, &["10.0.0.3"]);
    assert!(resolver.lookup("web.example".to_owned()).await.is_ok());
}

#[tokio::test]
async fn a_failure_says_what_it_is() {
    let dns = Dns::start().await;
    assert_eq!(dns.lookup("unknown.example").await, Err(Failure::Absent));
    // It exists.
    dns.set("text.example.", RecordType::TXT, SERVFAIL);
    assert_eq!(dns.lookup("text.example").await, Err(Failure::Absent));
    // One family does not exist, and the other one is not known.
    dns.set("bad.example.", RecordType::AAAA, SERVFAIL);
    let Err(Failure::Other(why)) = dns.lookup("bad.example").await else { panic!("no failure") };
    assert!(why.contains("Server Failure"), "{why}");
    let long = "a".repeat(70);
    assert!(matches!(dns.lookup(&long).await, Err(Failure::Other(_))), "no name at all");
}

#[tokio::test]
async fn an_answer_in_part_says_so() {
    let dns = Dns::start().await;
    dns.addresses("a.example.", 30, &["10.0.0.1"]).set("a.example.", RecordType::AAAA, SERVFAIL);
    dns.addresses("b.example.", 30, &["fd00::1"]).set("b.example.", RecordType::A, Reply::Silence);
    let found = dns.lookup("a.example").await.unwrap();
    assert_eq!(found.addresses, ips(&["10.0.0.1"]));
    assert!(matches!(found.missing, Some(Failure::Other(_))));
    let found = dns.lookup("b.example").await.unwrap();
    assert_eq!((found.addresses, found.missing), (ips(&["fd00::1"]), Some(Failure::Timeout)));
}

#[tokio::test]
async fn servers_are_asked_in_their_order() {
    let (first, second) = (Dns::start().await, Dns::start().await);
    let resolver = Resolver::with_servers([first.address, second.address]);
    for _ in 0..20 {
        // The first one's word counts, even if it says that there is no such name.
        second.addresses("web.example.", 30, &["10.0.0.2"]);
        assert_eq!(resolver.lookup("web.example".to_owned()).await, Err(Failure::Absent));
        assert_eq!(second.asked(), 0);
    }
    for code in [ResponseCode::ServFail, ResponseCode::Refused, ResponseCode::NotImp] {
        first.set("web.example.", RecordType::A, Reply::Code(code));
        let found = resolver.lookup("web.example".to_owned()).await.unwrap();
        assert_eq!(found.addresses, ips(&["10.0.0.2"]), "{code}");
    }
    let found = resolver.lookup("web.example".to_owned()).await.unwrap();
    assert_eq!((found.addresses, found.missing), (ips(&["10.0.0.2"]), None));
}

#[tokio::test]
async fn a_server_that_is_silent_costs_its_time_once() {
    // Nobody answers at this address, though somebody is there.
    let silent = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let dns = Dns::start().await;
    dns.addresses("web.example.", 30, &["10.0.0.1"]);
    let resolver = Resolver::with_servers([silent.local_addr().unwrap(), dns.address]);
    for patience in [2500..4500, 0..1000] {
        let begin = Instant::now();
        let found = resolver.lookup("web.example".to_owned()).await.unwrap();
        assert_eq!(found.addresses, ips(&["10.0.0.1"]));
        assert!(patience.contains(&begin.elapsed().as_millis()), "{:?}", begin.elapsed());
    }
}

/// Silent about one family, it is there all the same.
#[tokio::test]
async fn a_server_that_answers_in_part_keeps_its_place() {
    let (first, second) = (Dns::start().await, Dns::start().await);
    first.addresses("web.example.", 30, &["10.0.0.1"]);
    first.set("web.example.", RecordType::AAAA, Reply::Silence);
    let resolver = Resolver::with_servers([first.address, second.address]);
    resolver.lookup("web.example".to_owned()).await.unwrap();
    let asked = second.asked();
    assert_eq!(resolver.lookup("unknown.example".to_owned()).await, Err(Failure::Absent));
    assert_eq!(second.asked(), asked);
}

#[tokio::test]
async fn a_silent_server_is_a_failure_in_time() {
    let silent = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let resolver = Resolver::with_servers([silent.local_addr().unwrap()]);
    let begin = Instant::now();
    assert_eq!(resolver.lookup("web.example".to_owned()).await, Err(Failure::Timeout));
    assert!(begin.elapsed() < Duration::from_secs(5), "{:?}", begin.elapsed());
}

#[tokio::test]
async fn names_follow_a_changed_answer_and_keep_it_when_the_server_forgets() {
    let dns = Dns::start().await;
    dns.addresses("web.example.", 1, &["10.0.0.1", "fd00::1"]);
    let mut names = Names::new(dns.resolver());
    names.want(["web.example"]);
    names.settled(Duration::from_secs(5)).await;
    assert_eq!(names.resolved()["web.example"], ips(&["10.0.0.1", "fd00::1"]));

    dns.addresses("web.example.", 1, &["10.0.0.2", "fd00::1"]);
    let begin = Instant::now();
    names.changed().await;
    assert!(begin.elapsed() < Duration::from_secs(8), "{:?}", begin.elapsed());
    assert_eq!(names.resolved()["web.example"], ips(&["10.0.0.2", "fd00::1"]));

    dns.forget("web.example.");
    let long = tokio::time::timeout(Duration::from_secs(6), names.changed()).await;
    assert!(long.is_err(), "nothing changed");
    assert_eq!(names.resolved()["web.example"], ips(&["10.0.0.2", "fd00::1"]));
    assert_eq!(names.failing().collect::<Vec<_>>(), [("web.example", &Failure::Absent)]);
}

/// Tests that judge a time: they run alone, at the end.
mod timed {
    use super::*;

    /// The runtime ends with its thread, whatever is under way.
    #[test]
    fn a_silent_server_does_not_delay_the_end() {
        let silent = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let server = silent.local_addr().unwrap();
        let begin = Instant::now();
        std::thread::spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let mut names = Names::new(Resolver::with_servers([server]));
                names.want(["a.example", "b.example"]);
                names.settled(Duration::from_millis(200)).await;
                assert!(names.resolved().is_empty());
            });
        })
        .join()
        .unwrap();
        assert!(begin.elapsed() < Duration::from_millis(1500), "{:?}", begin.elapsed());
        // It was asked.
        silent.set_nonblocking(true).unwrap();
        assert!(silent.recv_from(&mut [0; 4096]).is_ok());
    }
}
