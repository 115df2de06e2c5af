//! Three servers of one datacenter.

use std::io;
use std::ops::{Index, IndexMut};
use std::time::Duration;

use super::{Builder, Consul, encode};
use crate::http::{Answer, Conn};
use crate::{Dir, Net, eventually};

/// How many there are: the fewest of which one can go.
const SERVERS: u8 = 3;

/// The host of the first of them; the others follow.
const FIRST_HOST: u8 = 10;

/// How long an election may take.
const ELECTION: Duration = Duration::from_secs(20);

/// How long it may take until a server that came back is well and has a vote. One that was gone
/// for ten seconds has lost it, and Consul gives it back after it was well for another ten.
const WHOLE: Duration = Duration::from_secs(60);

/// How long one look at one server may take, which may depend on another that hangs.
const LOOK: Duration = Duration::from_secs(1);

/// Three servers with data directories, named `n1` to `n3`. Each of them is there by its index:
/// `cluster[0].register(…)`, `cluster[1].kill()`.
pub struct Cluster {
    servers: Vec<Consul>,
}

impl Cluster {
    /// On the hosts 10 to 12 of the network. Returns when they have a leader.
    pub fn start(net: &Net, dir: &Dir) -> Cluster {
        Cluster::with(net, dir, |builder| builder)
    }

    /// The same, with servers of another kind.
    pub fn with(net: &Net, dir: &Dir, change: impl Fn(Builder) -> Builder) -> Cluster {
        let builders: Vec<Builder> = (0..SERVERS)
            .map(|n| {
                let builder = Consul::builder(net, dir).host(net, FIRST_HOST + n).persistent();
                change(builder.node(&format!("n{}", n + 1)))
                    .arg(format!("-bootstrap-expect={SERVERS}"))
                    // Half a minute otherwise, and the others are not there yet the first time.
                    .arg("-retry-interval=100ms")
            })
            .collect();
        let join: Vec<String> =
            builders.iter().map(|builder| format!("-retry-join={}", builder.serf_lan())).collect();
        let mut servers: Vec<Consul> = (0..)
            .zip(builders)
            .map(|(own, mut builder)| {
                // Not itself: one join that succeeds is enough for it.
                let others = join.iter().enumerate().filter(|&(n, _)| n != own);
                builder.args.extend(others.map(|(_, arg)| arg.clone()));
                builder.spawn().unwrap_or_else(|error| panic!("{error}"))
            })
            .collect();
        for server in &mut servers {
            server.wait_ready().unwrap_or_else(|error| panic!("{error}"));
        }
        let cluster = Cluster { servers };
        cluster.leader();
        cluster
    }

    pub fn servers(&self) -> &[Consul] {
        &self.servers
    }

    /// Waits until the servers that run agree on a leader which is one of them, and each answers
    /// what needs a leader. After the old one is gone that is a new one.
    #[track_caller]
    pub fn leader(&self) -> usize {
        eventually(ELECTION, "the servers that run have a leader", || self.agreed())
    }

    /// Waits until all three run and have a vote, so that the next one can go. That takes some
    /// seconds after a restart, and twenty if the server was gone for more than ten. (Then Consul
    /// has also forgotten the server's node and its services, until it is back.)
    #[track_caller]
    pub fn wait_whole(&self) {
        eventually(WHOLE, "all servers are well and have a vote", || {
            let leader = &self.servers[self.agreed()?];
            let health = look(leader, "/v1/operator/autopilot/health")?.json();
            let votes = health["Servers"].as_array().is_some_and(|servers| {
                servers.len() == self.servers.len()
                    && servers.iter().all(|server| server["Voter"] == true)
            });
            if votes && health["Healthy"] == true && health["FailureTolerance"] == 1 {
                Ok(())
            } else {
                Err(health.to_string())
            }
        });
    }

    fn agreed(&self) -> Result<usize, String> {
        let mut leaders = Vec::new();
        for (n, server) in self.servers.iter().enumerate().filter(|(_, server)| server.answers()) {
            let leader = look(server, "/v1/status/leader")?.json();
            let leader = leader.as_str().unwrap_or_default().to_owned();
            let read = format!("/v1/health/node/{}?consistent", encode(server.node()));
            look(server, &read).map_err(|error| format!("{}: {error}", server.node()))?;
            leaders.push((n, leader));
        }
        leaders
            .iter()
            .map(|&(n, _)| n)
            .find(|&n| {
                let own = self.servers[n].builder.server().to_string();
                leaders.iter().all(|(_, leader)| *leader == own)
            })
            .ok_or_else(|| format!("the leaders that they name: {leaders:?}"))
    }
}

impl Index<usize> for Cluster {
    type Output = Consul;

    fn index(&self, n: usize) -> &Consul {
        &self.servers[n]
    }
}

impl IndexMut<usize> for Cluster {
    fn index_mut(&mut self, n: usize) -> &mut Consul {
        &mut self.servers[n]
    }
}

/// A GET that has to succeed soon.
fn look(server: &Consul, path: &str) -> Result<Answer, String> {
    let answer = || -> io::Result<Answer> {
        let mut conn = Conn::open(server.addr())?;
        conn.set_timeout(LOOK);
        server.ask(&mut conn, "GET", path, "")
    };
    match answer() {
        Ok(answer) if answer.status == 200 => Ok(answer),
        Ok(answer) => Err(answer.text()),
        Err(error) => Err(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Service;

    fn started(name: &str) -> (Net, Dir, Cluster) {
        let (net, dir) = (Net::isolated(), Dir::new(name));
        let cluster = Cluster::start(&net, &dir);
        (net, dir, cluster)
    }

    fn web(net: &Net, n: usize) -> Service {
        Service::new("web", &format!("web-{n}"), (net.ip(20), 80).into())
    }

    #[test]
    fn every_server_knows_what_one_was_told() {
        let (net, _dir, cluster) = started("cluster_shared");
        for (n, server) in cluster.servers().iter().enumerate() {
            server.register(&web(&net, n));
            for other in cluster.servers() {
                let seen = other.health("web");
                assert_eq!(seen.len(), n + 1, "{seen:?}");
                assert_eq!(seen[n].node, format!("n{}", n + 1));
            }
        }
    }

    #[test]
    fn there_is_a_new_leader_when_the_old_one_is_killed() {
        let (net, _dir, mut cluster) = started("cluster_killed");
        let old = cluster.leader();
        cluster[old].register(&web(&net, 0));
        cluster[old].kill();
        let new = cluster.leader();
        assert_ne!(new, old);
        cluster[new].register(&web(&net, 1));
        cluster[old].restart();
        cluster.wait_whole();
        let at = cluster.leader();
        assert_eq!(cluster[old].health("web").len(), 2);

        // And so on with the next one.
        cluster[at].kill();
        assert_ne!(cluster.leader(), at);
        assert_eq!(cluster[old].health("web").len(), 2);
    }

    #[test]
    fn there_is_a_new_leader_while_the_old_one_hangs() {
        let (_net, _dir, mut cluster) = started("cluster_paused");
        let old = cluster.leader();
        cluster[old].pause();
        assert_ne!(cluster.leader(), old);
        cluster[old].resume();
        cluster.leader();
    }

    #[test]
    fn servers_of_other_kinds() {
        let (net, dir) = (Net::isolated(), Dir::new("cluster_acl"));
        let cluster = Cluster::with(&net, &dir, Builder::acl);
        cluster[0].register(&web(&net, 0));
        let token = cluster[1].token(r#"service "web" { policy = "read" }"#);
        assert!(!token.secret.is_empty());
        assert_eq!(cluster[2].health("web").len(), 1);
    }
}
