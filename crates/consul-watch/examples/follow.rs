//! Prints the changes of a service as they come, until it is interrupted:
//!
//! ```sh
//! cargo run -p consul-watch --example follow -- web
//! ```
//!
//! `CONSUL_HTTP_ADDR` names the agent (`http://…`, `https://…` or `unix:/…`), and
//! `CONSUL_HTTP_TOKEN` the token, as for the `consul` command.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::env;
use std::error::Error;
use std::sync::Arc;

use consul_watch::agent::{Address, Secret, Token};
use consul_watch::policy::{self, Peer};
use consul_watch::resolver::Resolver;
use consul_watch::watch::{Sink, follow};
use consul_watch::{Agents, Names, Pool, Query, Selection, Snapshot};
use tokio::time::Instant;

/// Remembers what served, to say what is new.
#[derive(Default)]
struct Printer {
    served: BTreeMap<(String, String), Arc<Peer>>,
}

impl Sink for Printer {
    async fn changed(&mut self, snapshot: Arc<Snapshot>) -> Option<Instant> {
        let verdict = policy::select(&Selection::default(), &snapshot);
        let serve: BTreeMap<_, _> =
            verdict.serve.into_iter().map(|peer| (peer.key(), peer)).collect();
        println!("index {}: {} of {} serve", snapshot.index, serve.len(), snapshot.instances.len());
        for (key, peer) in &serve {
            match self.served.get(key) {
                None => println!("  + {} on {} {:?}", peer.id, peer.node, peer.addresses),
                Some(before) if before != peer => {
                    println!("  ~ {} on {} {:?}", peer.id, peer.node, peer.addresses);
                }
                Some(_) => (),
            }
        }
        for ((node, id), _) in self.served.iter().filter(|(key, _)| !serve.contains_key(*key)) {
            let why = verdict.excluded.iter().find(|it| it.key == (node.clone(), id.clone()));
            let why = why.map_or("gone".to_owned(), |excluded| excluded.reason.to_string());
            println!("  - {id} on {node}: {why}");
        }
        self.served = serve;
        None
    }

    fn answered(&mut self) {}

    fn failed(&mut self, error: &consul_watch::Error) {
        println!("{error}; asked again {:?}", error.retry());
    }
}

async fn run() -> Result<Infallible, Box<dyn Error>> {
    let service = env::args().nth(1).ok_or("which service? cargo run … --example follow -- web")?;
    let address = env::var("CONSUL_HTTP_ADDR").unwrap_or("http://127.0.0.1:8500".to_owned());
    let mut agents = Agents::at(Address::parse(&address)?);
    if let Ok(token) = env::var("CONSUL_HTTP_TOKEN") {
        agents.token = Some(Token::Fixed(Secret::new(token.as_bytes())?));
    }
    let pool = Pool::new(10, |warning| eprintln!("{warning}"));
    let mut service = pool.client(&agents)?.service(Query::new(&service)?);
    let mut names = Names::new(Resolver::system());
    Ok(follow(&mut service, &mut names, &mut Printer::default()).await)
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    match run().await? {}
}
