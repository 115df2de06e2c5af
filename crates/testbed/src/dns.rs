//! A name server that says what a test wants.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hickory_proto::op::{Message, MessageType, Metadata, ResponseCode};
use hickory_proto::rr::{DNSClass, Record, RecordType};
use tokio::net::UdpSocket;
use tokio::task::JoinHandle;

use crate::{Net, runtime};

/// Longer than any query is that a resolver sends.
const LONGEST: usize = 4096;

/// A name server, over UDP. Names that it was told nothing of do not exist.
pub struct Dns {
    addr: SocketAddr,
    state: Arc<Mutex<State>>,
    server: Option<JoinHandle<()>>,
}

/// What a name server says instead of addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// There is no such name.
    NxDomain,
    /// Something is wrong with the server.
    ServFail,
    /// Nothing at all.
    Silence,
}

#[derive(Default)]
struct State {
    names: HashMap<String, Result<Addresses, Failure>>,
    queries: HashMap<String, u64>,
    failure: Option<Failure>,
}

#[derive(Clone)]
struct Addresses {
    ips: Vec<IpAddr>,
    ttl: u32,
}

impl Dns {
    /// A name server on the network's host `host`, on a port of its own.
    pub fn start(net: &Net, host: u8) -> Dns {
        let addr = (net.ip(host), net.port()).into();
        Dns::bind(addr).unwrap_or_else(|e| panic!("name server on {addr}: {e}"))
    }

    /// A name server on any address: whoever is told of it through `resolv.conf` wants port 53.
    pub fn bind(addr: SocketAddr) -> io::Result<Dns> {
        let socket = runtime::shared().block_on(UdpSocket::bind(addr))?;
        let addr = socket.local_addr()?;
        let state = Arc::new(Mutex::new(State::default()));
        let server = runtime::shared().spawn(serve(socket, state.clone()));
        Ok(Dns { addr, state, server: Some(server) })
    }

    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// From now on the name has these addresses, in this order, to be remembered for so long
    /// (whole seconds). A question for a version of which there are none has an answer without
    /// addresses.
    pub fn set(&self, name: &str, ips: &[IpAddr], ttl: Duration) {
        let addresses = Addresses { ips: ips.to_vec(), ttl: ttl.as_secs() as u32 };
        lock(&self.state).names.insert(key(name), Ok(addresses));
    }

    /// From now on the name fails.
    pub fn fail(&self, name: &str, failure: Failure) {
        lock(&self.state).names.insert(key(name), Err(failure));
    }

    /// From now on every name fails, or none any more that is not to by itself.
    pub fn fail_all(&self, failure: Option<Failure>) {
        lock(&self.state).failure = failure;
    }

    /// How many questions there were for a name, those without an answer too. Who wants to know
    /// the addresses of both versions asks twice.
    pub fn queries(&self, name: &str) -> u64 {
        lock(&self.state).queries.get(&key(name)).copied().unwrap_or_default()
    }
}

impl Drop for Dns {
    fn drop(&mut self) {
        if let Some(server) = self.server.take() {
            server.abort();
            let _ = runtime::shared().block_on(server);
        }
    }
}

async fn serve(socket: UdpSocket, state: Arc<Mutex<State>>) {
    let mut buffer = [0; LONGEST];
    loop {
        // An error here is about an earlier answer, whose receiver is gone.
        let Ok((length, client)) = socket.recv_from(&mut buffer).await else { continue };
        let Ok(query) = Message::from_vec(&buffer[..length]) else { continue };
        let Some(answer) = lock(&state).answer(&query) else { continue };
        let bytes = answer.to_vec().expect("an answer can be encoded");
        let _ = socket.send_to(&bytes, client).await;
    }
}

impl State {
    fn answer(&mut self, query: &Message) -> Option<Message> {
        let [question] = &query.queries[..] else { return None };
        if query.metadata.message_type != MessageType::Query {
            return None;
        }
        let name = key(&question.name.to_ascii());
        let known = self.names.get(&name).cloned().unwrap_or(Err(Failure::NxDomain));
        *self.queries.entry(name).or_default() += 1;

        let mut answer = Message::response(query.metadata.id, query.metadata.op_code);
        answer.metadata = Metadata::response_from_request(&query.metadata);
        answer.metadata.recursion_available = true;
        answer.add_query(question.clone());
        match self.failure.map_or(known, Err) {
            Err(Failure::Silence) => return None,
            Err(Failure::NxDomain) => answer.metadata.response_code = ResponseCode::NXDomain,
            Err(Failure::ServFail) => answer.metadata.response_code = ResponseCode::ServFail,
            Ok(Addresses { ips, ttl }) if question.query_class == DNSClass::IN => {
                let record = |ip: IpAddr| Record::from_rdata(question.name.clone(), ttl, ip.into());
                let asked = |ip: &IpAddr| {
                    matches!(
                        (question.query_type, ip),
                        (RecordType::A, IpAddr::V4(_)) | (RecordType::AAAA, IpAddr::V6(_))
                    )
                };
                answer.add_answers(ips.into_iter().filter(asked).map(record));
            }
            Ok(_) => {}
        }
        Some(answer)
    }
}

/// Names are the same in capitals, and with the dot at their end.
fn key(name: &str) -> String {
    name.trim_end_matches('.').to_ascii_lowercase()
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::time::Instant;

    use hickory_resolver::TokioResolver;
    use hickory_resolver::config::{NameServerConfig, ResolveHosts, ResolverConfig};
    use hickory_resolver::net::runtime::TokioRuntimeProvider;

    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);
    const PATIENCE: Duration = Duration::from_secs(10);
    const MOMENT: Duration = Duration::from_millis(300);

    /// A resolver that asks only this server, and each time once.
    fn resolver(dns: &Dns, timeout: Duration) -> TokioResolver {
        let mut server = NameServerConfig::udp(dns.addr().ip());
        for connection in &mut server.connections {
            connection.port = dns.addr().port();
        }
        let config = ResolverConfig::from_parts(None, Vec::new(), vec![server]);
        let provider = TokioRuntimeProvider::default();
        let mut builder = TokioResolver::builder_with_config(config, provider);
        let options = builder.options_mut();
        options.cache_size = 0;
        options.use_hosts_file = ResolveHosts::Never;
        options.timeout = timeout;
        options.attempts = 1;
        builder.build().unwrap()
    }

    fn look_up(resolver: &TokioResolver, name: &str) -> Result<BTreeSet<IpAddr>, String> {
        let found = runtime::shared().block_on(resolver.lookup_ip(name));
        found.map(|found| found.iter().collect()).map_err(|error| error.to_string())
    }

    #[test]
    fn a_name_has_the_addresses_that_it_was_given_last() {
        let net = Net::isolated();
        let dns = Dns::start(&net, 30);
        let resolver = resolver(&dns, PATIENCE);
        let [v4, v6, other]: [IpAddr; 3] =
            ["127.0.0.1", "2001:db8::1", "127.0.0.2"].map(|ip| ip.parse().unwrap());
        dns.set("web.test", &[v4, v6], HOUR);
        assert_eq!(look_up(&resolver, "WEB.test."), Ok([v4, v6].into()));
        let before = dns.queries("web.test");
        assert!(before >= 1);
        dns.set("web.test", &[other], Duration::ZERO);
        assert_eq!(look_up(&resolver, "web.test."), Ok([other].into()));
        assert!(dns.queries("Web.Test.") > before);
        assert_eq!(dns.queries("other.test"), 0);
    }

    #[test]
    fn the_ttl_is_told() {
        let net = Net::isolated();
        let dns = Dns::start(&net, 30);
        dns.set("web.test", &["127.0.0.1".parse().unwrap()], HOUR);
        let lookup =
            runtime::shared().block_on(resolver(&dns, PATIENCE).ipv4_lookup("web.test.")).unwrap();
        let ttls: Vec<u32> = lookup.answers().iter().map(|record| record.ttl).collect();
        assert_eq!(ttls, [3600]);
    }

    #[test]
    fn it_fails_as_it_is_told() {
        let net = Net::isolated();
        let dns = Dns::start(&net, 30);
        let patient = resolver(&dns, PATIENCE);
        let ip: IpAddr = "127.0.0.1".parse().unwrap();
        dns.set("web.test", &[ip], HOUR);
        dns.fail("bad.test", Failure::ServFail);
        let failed = |name: &str, how: &str| {
            let error = look_up(&patient, name).unwrap_err();
            assert!(error.contains(how), "{error}");
        };
        failed("nobody.test.", "no records found");
        failed("bad.test.", "erver Failure");
        dns.fail_all(Some(Failure::Silence));
        let asked = Instant::now();
        let error = look_up(&resolver(&dns, MOMENT), "web.test.").unwrap_err();
        assert!(asked.elapsed() >= MOMENT && error.contains("timed out"), "{error}");
        assert!(dns.queries("web.test") >= 1);
        dns.fail_all(None);
        assert_eq!(look_up(&patient, "web.test."), Ok([ip].into()));
        failed("bad.test.", "erver Failure");
    }

    #[test]
    fn its_address_is_free_again_after_it() {
        let net = Net::isolated();
        let dns = Dns::start(&net, 30);
        let addr = dns.addr();
        assert!(Dns::bind(addr).is_err());
        drop(dns);
        Dns::bind(addr).unwrap();
    }
}
