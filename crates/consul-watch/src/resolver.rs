//! The agent's name to addresses, without a thread that could outlive the runtime.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::OnceLock;

use hickory_resolver::TokioResolver;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};

/// The system's resolver settings (`/etc/resolv.conf`, `/etc/hosts`), asked asynchronously.
///
/// Where they cannot be read the lookup fails: names in a private network are never sent to
/// somebody else's server.
#[derive(Clone, Default)]
pub(crate) struct SystemResolver {
    // Made at the first lookup: an agent with a literal address needs none.
    resolver: Arc<OnceLock<TokioResolver>>,
}

impl SystemResolver {
    fn get(&self) -> Result<&TokioResolver, Box<dyn std::error::Error + Send + Sync>> {
        if let Some(resolver) = self.resolver.get() {
            return Ok(resolver);
        }
        let resolver = TokioResolver::builder_tokio()?.build()?;
        Ok(self.resolver.get_or_init(|| resolver))
    }
}

impl Resolve for SystemResolver {
    fn resolve(&self, name: Name) -> Resolving {
        let this = self.clone();
        Box::pin(async move {
            let found = this.get()?.lookup_ip(name.as_str()).await?;
            let addresses: Vec<_> = found.iter().map(|ip| SocketAddr::new(ip, 0)).collect();
            Ok(Box::new(addresses.into_iter()) as Addrs)
        })
    }
}
