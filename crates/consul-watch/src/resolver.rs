//! Host names to addresses, without a thread that could outlive the runtime.
//!
//! hickory-resolver reads the system's settings and speaks the protocol. Three things are done
//! here as the system's own resolver does them, and hickory-resolver does not:
//!
//! - Name servers are asked in their order, the next one where one is silent or cannot tell. Only
//!   the first one may know a private network's names; hickory-resolver asks two at once, and
//!   takes what comes first, be it that there is no such name.
//! - A name in `/etc/hosts` is not asked for, neither for its other family nor in a search domain.
//! - IPv4 and IPv6 are two questions, and if one of them fails that is no answer without
//!   addresses: [`Found::missing`] tells.

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use hickory_resolver::config::{
    ConnectionConfig, NameServerConfig, ResolveHosts, ResolverConfig, ResolverOpts,
};
use hickory_resolver::lookup;
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::net::{DnsError, NetError};
use hickory_resolver::proto::op::{Query, ResponseCode};
use hickory_resolver::proto::rr::{Name, RecordType};
use hickory_resolver::{Hosts, TokioResolver, system_conf};
use reqwest::dns::{Addrs, Resolve, Resolving};

use crate::error::printable;
use crate::names::{Failure, Found, Lookup};

/// A name server has at most this long for an answer, in which it is asked up to three times.
const PATIENCE: Duration = Duration::from_secs(3);
/// One that was silent is asked after the others for so long.
const SILENT: Duration = Duration::from_secs(30);
/// How long an entry of `/etc/hosts` holds: it is read once.
const HOSTS_TTL: Duration = Duration::from_secs(300);
/// How much of an error's text is kept.
const ERROR_TEXT: usize = 200;

/// Asks name servers. Clones share the settings, and what is known of the servers; they belong
/// to one runtime.
#[derive(Clone, Debug, Default)]
pub struct Resolver {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    /// None means the system's.
    servers: Option<Vec<SocketAddr>>,
    // Made at the first lookup: an agent with a literal address needs none.
    asker: OnceLock<Asker>,
}

impl Resolver {
    /// The system's: `/etc/hosts`, and the name servers, the search domains and the options of
    /// `/etc/resolv.conf`. They are read once.
    ///
    /// Where they cannot be read the lookup fails: names in a private network are never sent to
    /// somebody else's server.
    pub fn system() -> Self {
        Self::default()
    }

    /// These name servers and nothing else: names are complete, and not looked up in
    /// `/etc/hosts`.
    pub fn with_servers(servers: impl IntoIterator<Item = SocketAddr>) -> Self {
        let servers = Some(servers.into_iter().collect());
        Self { shared: Arc::new(Shared { servers, ..Shared::default() }) }
    }

    /// All addresses of a name.
    async fn find(&self, name: &str) -> Result<Found, Failure> {
        let asker = self.asker().map_err(|err| other(&err))?;
        let name = Name::from_str_relaxed(name).map_err(|err| other(&err))?;
        asker.find(&name).await
    }

    fn asker(&self) -> Result<&Asker, NetError> {
        if let Some(asker) = self.shared.asker.get() {
            return Ok(asker);
        }
        let asker = match &self.shared.servers {
            None => Asker::system()?,
            Some(servers) => Asker::with_servers(servers)?,
        };
        Ok(self.shared.asker.get_or_init(|| asker))
    }
}

impl Lookup for Resolver {
    async fn lookup(&self, name: String) -> Result<Found, Failure> {
        self.find(&name).await
    }
}

/// The addresses of the agent of one client.
#[derive(Clone)]
pub(crate) struct AgentResolver {
    pub(crate) resolver: Resolver,
    /// Where the agent is, whatever name is asked for.
    pub(crate) instead: Option<String>,
}

impl Resolve for AgentResolver {
    fn resolve(&self, name: reqwest::dns::Name) -> Resolving {
        let this = self.clone();
        Box::pin(async move {
            let host = this.instead.as_deref().unwrap_or(name.as_str());
            if let Ok(ip) = host.parse::<IpAddr>() {
                return Ok(Box::new(std::iter::once(SocketAddr::new(ip, 0))) as Addrs);
            }
            let found = this.resolver.find(host).await?;
            Ok(Box::new(found.addresses.into_iter().map(|ip| SocketAddr::new(ip, 0))) as Addrs)
        })
    }
}

/// Who is asked, and for what.
#[derive(Debug)]
struct Asker {
    hosts: Hosts,
    /// The domains in which a name is looked for that is not complete.
    search: Vec<Name>,
    /// A name with so many dots is looked for as it is first, and then in the domains.
    ndots: usize,
    servers: Vec<Server>,
}

impl Asker {
    fn system() -> Result<Self, NetError> {
        let (config, options) = system_conf::read_system_conf()?;
        let (domain, mut search, servers) = config.into_parts();
        // The domain may be that of the host's own name, which counts where nothing is set.
        if search.is_empty() {
            search.extend(domain);
        }
        let ndots = options.ndots;
        let hosts = Hosts::from_system().unwrap_or_default();
        Ok(Self { hosts, search, ndots, servers: Server::each(servers, options)? })
    }

    fn with_servers(servers: &[SocketAddr]) -> Result<Self, NetError> {
        let servers = servers.iter().map(|server| {
            let connections = [ConnectionConfig::udp(), ConnectionConfig::tcp()];
            let connections = connections.map(|mut connection| {
                connection.port = server.port();
                connection
            });
            NameServerConfig::new(server.ip(), true, connections.into())
        });
        let servers = Server::each(servers, ResolverOpts::default())?;
        Ok(Self { hosts: Hosts::default(), search: Vec::new(), ndots: 0, servers })
    }

    async fn find(&self, name: &Name) -> Result<Found, Failure> {
        if let Some(found) = self.in_hosts(name) {
            return Ok(found);
        }
        let mut failure = Failure::Absent;
        for name in self.candidates(name) {
            match self.ask(&name).await {
                Ok(found) => return Ok(found),
                Err(Failure::Absent) => (),
                // The servers would not answer the next question either.
                Err(Failure::Timeout) => return Err(Failure::Timeout),
                Err(why) => failure = why,
            }
        }
        Err(failure)
    }

    fn in_hosts(&self, name: &Name) -> Option<Found> {
        let kinds = [RecordType::A, RecordType::AAAA];
        let entries =
            kinds.map(|kind| self.hosts.lookup_static_host(&Query::query(name.clone(), kind)));
        let addresses: Vec<_> = entries.iter().flatten().flat_map(addresses).collect();
        (!addresses.is_empty()).then_some(Found { addresses, ttl: HOSTS_TTL, missing: None })
    }

    /// What a name may be short for, in the order to ask.
    fn candidates(&self, name: &Name) -> Vec<Name> {
        let mut whole = name.clone();
        whole.set_fqdn(true);
        if name.is_fqdn() {
            return vec![whole];
        }
        // One that would be too long with the domain is not there.
        let longer = |domain| name.clone().append_domain(domain).ok();
        let mut all: Vec<_> = self.search.iter().filter_map(longer).collect();
        let dots = usize::from(name.num_labels()).saturating_sub(1);
        let first = dots >= self.ndots || name.is_localhost();
        all.insert(if first { 0 } else { all.len() }, whole);
        all
    }

    /// Asks for both families of a complete name.
    async fn ask(&self, name: &Name) -> Result<Found, Failure> {
        let (v4, v6) =
            tokio::join!(self.family(name, RecordType::A), self.family(name, RecordType::AAAA));
        match (v4, v6) {
            (Ok(v4), Ok(v6)) => Ok(Found {
                addresses: [v4.addresses, v6.addresses].concat(),
                ttl: v4.ttl.min(v6.ttl),
                missing: None,
            }),
            (Ok(found), Err(Failure::Absent)) | (Err(Failure::Absent), Ok(found)) => Ok(found),
            (Ok(found), Err(why)) | (Err(why), Ok(found)) => {
                Ok(Found { missing: Some(why), ..found })
            }
            // There may be addresses as long as one of them is not known.
            (Err(Failure::Absent), Err(why)) | (Err(why), Err(_)) => Err(why),
        }
    }

    /// Asks one server after the other, until one knows.
    async fn family(&self, name: &Name, kind: RecordType) -> Result<Found, Failure> {
        // Among themselves they keep their order.
        let (silent, others): (Vec<_>, Vec<_>) =
            self.servers.iter().partition(|server| server.is_silent());
        let mut failure = Failure::Other("there is no name server".to_owned());
        for server in others.into_iter().chain(silent) {
            match server.ask(name, kind).await {
                Err(why @ (Failure::Timeout | Failure::Other(_))) => failure = why,
                answer => return answer,
            }
        }
        Err(failure)
    }
}

/// One name server.
#[derive(Debug)]
struct Server {
    resolver: TokioResolver,
    seen: Mutex<Seen>,
}

/// When a server last answered, and when it last let a question time out.
#[derive(Debug, Default)]
struct Seen {
    answered: Option<Instant>,
    silent: Option<Instant>,
}

impl Server {
    fn each(
        servers: impl IntoIterator<Item = NameServerConfig>,
        mut options: ResolverOpts,
    ) -> Result<Vec<Self>, NetError> {
        options.timeout = options.timeout.clamp(Duration::from_secs(1), PATIENCE);
        // More than the repetitions of one question, which are those of UDP.
        options.attempts = 0;
        // Who asks knows for how long the answer holds.
        options.cache_size = 0;
        options.use_hosts_file = ResolveHosts::Never;
        let make = |server| {
            let config = ResolverConfig::from_name_servers(vec![server]);
            let runtime = TokioRuntimeProvider::default();
            let builder = TokioResolver::builder_with_config(config, runtime);
            let resolver = builder.with_options(options.clone()).build()?;
            Ok(Self { resolver, seen: Mutex::default() })
        };
        servers.into_iter().map(make).collect()
    }

    async fn ask(&self, name: &Name, kind: RecordType) -> Result<Found, Failure> {
        let begin = Instant::now();
        let answer = match self.resolver.lookup(name.clone(), kind).await {
            Ok(answer) => {
                let ttl = answer.valid_until().saturating_duration_since(Instant::now());
                let addresses: Vec<_> = addresses(&answer).collect();
                let found = Found { addresses, ttl, missing: None };
                if found.addresses.is_empty() { Err(Failure::Absent) } else { Ok(found) }
            }
            Err(err) => Err(failure(&err)),
        };
        let mut seen = self.seen();
        if answer != Err(Failure::Timeout) {
            seen.answered = Some(Instant::now());
        } else if seen.answered.is_none_or(|at| at < begin) {
            // Not if it answered another question meanwhile: there are servers that are silent
            // when they are asked for IPv6.
            seen.silent = Some(Instant::now());
        }
        answer
    }

    fn is_silent(&self) -> bool {
        let seen = self.seen();
        seen.silent > seen.answered && seen.silent.is_some_and(|at| at.elapsed() < SILENT)
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn addresses(answer: &lookup::Lookup) -> impl Iterator<Item = IpAddr> {
    answer.answers().iter().filter_map(|record| record.data.ip_addr())
}

fn failure(err: &NetError) -> Failure {
    match err {
        NetError::Timeout => Failure::Timeout,
        NetError::Dns(DnsError::NoRecordsFound(none))
            if matches!(none.response_code, ResponseCode::NoError | ResponseCode::NXDomain) =>
        {
            Failure::Absent
        }
        err => other(err),
    }
}

fn other(err: &dyn std::error::Error) -> Failure {
    Failure::Other(printable(err.to_string().as_bytes(), ERROR_TEXT))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn domains(search: &[&str]) -> Vec<Name> {
        search.iter().map(|name| Name::from_str_relaxed(name).unwrap()).collect()
    }

    fn asker(search: &[&str], ndots: usize, hosts: &str) -> Asker {
        let mut asker = Asker::with_servers(&[]).unwrap();
        asker.search = domains(search);
        asker.ndots = ndots;
        asker.hosts.read_hosts_conf(hosts.as_bytes()).unwrap();
        asker
    }

    #[test]
    fn a_name_is_looked_for_in_the_search_domains_as_its_dots_say() {
        let long = ["d".repeat(60).as_str(); 4].join(".");
        for (ndots, name, expected) in [
            (1, "web", vec!["web.a.", "web.b.c.", "web."]),
            (1, "web.x", vec!["web.x.", "web.x.a.", "web.x.b.c."]),
            (1, "web.x.", vec!["web.x."]),
            (1, "web.", vec!["web."]),
            (0, "web", vec!["web.", "web.a.", "web.b.c."]),
            (5, "web.x.y", vec!["web.x.y.a.", "web.x.y.b.c.", "web.x.y."]),
            (1, "localhost", vec!["localhost.", "localhost.a.", "localhost.b.c."]),
            (1, "under_score_", vec!["under_score_.a.", "under_score_.b.c.", "under_score_."]),
            (
                1,
                &format!("{long}.eeeeee"),
                vec![&format!("{long}.eeeeee."), &format!("{long}.eeeeee.a.")],
            ),
        ] {
            let name = Name::from_str_relaxed(name).unwrap();
            let all = asker(&["a", "b.c"], ndots, "").candidates(&name);
            let all: Vec<_> = all.iter().map(Name::to_ascii).collect();
            assert_eq!(all, expected, "{ndots} {name}");
        }
    }

    /// Not even for the other family.
    #[tokio::test]
    async fn a_name_in_the_hosts_file_is_asked_of_nobody() {
        let hosts = "10.0.0.1 web web.example # it\n10.0.0.2 web\nfd00::1 Six\n10.0.0.3 six\n";
        let asker = asker(&["a"], 1, hosts);
        for (name, expected) in [
            ("web", &["10.0.0.1", "10.0.0.2"][..]),
            ("WEB.example", &["10.0.0.1"]),
            ("web.example.", &["10.0.0.1"]),
            ("six", &["10.0.0.3", "fd00::1"]),
        ] {
            let found = asker.find(&Name::from_str_relaxed(name).unwrap()).await.unwrap();
            let expected: Vec<IpAddr> = expected.iter().map(|ip| ip.parse().unwrap()).collect();
            assert_eq!((found.addresses, found.missing), (expected, None), "{name}");
        }
        let unknown = asker.find(&Name::from_str_relaxed("unknown").unwrap()).await;
        assert_eq!(unknown, Err(Failure::Other("there is no name server".to_owned())));
    }

    /// Not in each search domain.
    #[tokio::test]
    async fn silent_servers_are_asked_for_one_name() {
        let silent = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let mut asker = Asker::with_servers(&[silent.local_addr().unwrap()]).unwrap();
        asker.search = domains(&["a", "b.c"]);
        asker.ndots = 1;
        let begin = Instant::now();
        let name = Name::from_str_relaxed("web").unwrap();
        assert_eq!(asker.find(&name).await, Err(Failure::Timeout));
        assert!(begin.elapsed() < PATIENCE * 3 / 2, "{:?}", begin.elapsed());
        assert!(asker.servers[0].is_silent());
    }

    #[test]
    fn a_server_is_silent_until_it_answers_or_for_a_while() {
        let asker = Asker::with_servers(&[([127, 0, 0, 1], 9).into()]).unwrap();
        let now = Instant::now();
        let ago = |secs| now.checked_sub(Duration::from_secs(secs));
        for (answered, silent, expected) in [
            (None, None, false),
            (ago(5), None, false),
            (None, ago(5), true),
            (ago(6), ago(5), true),
            (ago(5), ago(6), false),
            (None, ago(31), false),
        ] {
            *asker.servers[0].seen() = Seen { answered, silent };
            assert_eq!(asker.servers[0].is_silent(), expected, "{answered:?} {silent:?}");
        }
    }

    #[tokio::test]
    async fn localhost_is_asked_of_nobody() {
        let found = Resolver::with_servers([([127, 0, 0, 1], 9).into()]).find("localhost").await;
        let loopback: [IpAddr; 2] = ["127.0.0.1".parse().unwrap(), "::1".parse().unwrap()];
        assert_eq!(found.unwrap().addresses, loopback);
    }
}
