//! What the configuration says of the upstreams that follow Consul, for whoever shows them: the module
//! itself, and that of another protocol in the same nginx, which finds it in the zone of the workers.

use consul_status::model::Health;
use consul_watch::agent::Address;
use consul_watch::query::Parameter;
use nginx_peers::UpstreamAbi;
use nginx_peers::list::Statics;
use nginx_sys::{ngx_cycle, ngx_list_part_t, ngx_shm_zone_t};
use serde::{Deserialize, Serialize};

use super::clock::limit;
use super::record::Place;
use super::shared::Shared;
use super::source_of;
use crate::conf::{MainConf, Source, Upstream};
use crate::protocol::Protocol;

/// An upstream.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct About {
    pub name: String,
    pub zone: String,
    /// Whom it asks.
    pub addresses: Vec<String>,
    /// For how many milliseconds an answer counts.
    pub limit: u64,
    /// How many of its primaries and of its backups are static servers.
    statics: (usize, usize),
    /// Where its list is in its zone, which all workers have at the same place.
    pub list: usize,
    pub sources: Vec<AboutSource>,
}

/// A `consul_upstream` line.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct AboutSource {
    /// What it asks for, in brief.
    pub key: u64,
    pub service: String,
    pub tags: Vec<String>,
    pub datacenter: Option<String>,
    pub filter: Option<String>,
    /// Its place among all words for it.
    pub health: u8,
    pub backup: bool,
}

impl About {
    /// What is known of an upstream when its block has been read.
    pub fn new<P: Protocol>(upstream: &Upstream<P>) -> Self {
        let Statics { primaries, backups } = upstream.statics;
        Self {
            name: upstream.name.clone(),
            zone: upstream.zone.clone(),
            addresses: upstream.agents.addresses.iter().map(Address::to_string).collect(),
            limit: limit(upstream.agents.wait),
            statics: (primaries, backups),
            // Of any place the number is no longer.
            list: usize::MAX,
            sources: upstream.sources.iter().map(|it| AboutSource::new(upstream, it)).collect(),
        }
    }

    /// The same, with its list.
    ///
    /// # Safety
    ///
    /// The list is in its zone.
    pub unsafe fn with_list<P: Protocol>(upstream: &Upstream<P>) -> Self {
        // SAFETY: the configuration's part of the upstream is alive with it.
        let list = unsafe { P::Upstream::peers(upstream.nginx) };
        Self { list: list.expose_provenance(), ..Self::new(upstream) }
    }

    /// How many peers of its lists are static servers.
    pub fn statics(&self) -> Statics {
        let (primaries, backups) = self.statics;
        Statics { primaries, backups }
    }

    /// As it stands in shared memory.
    pub fn encode(&self) -> Vec<u8> {
        // Texts and numbers alone: there is no error.
        serde_json::to_vec(self).unwrap_or_default()
    }
}

impl AboutSource {
    fn new<P: Protocol>(upstream: &Upstream<P>, source: &Source) -> Self {
        let parameter = |parameter| source.query.get(parameter).map(str::to_owned);
        let health = match source.selection.health {
            consul_watch::Health::Passing => Health::Passing,
            consul_watch::Health::Warning => Health::Warning,
            consul_watch::Health::Any => Health::Any,
        };
        Self {
            key: source_of(upstream, source),
            service: source.query.service().to_owned(),
            tags: source.selection.tags.clone(),
            datacenter: parameter(Parameter::Datacenter),
            filter: parameter(Parameter::Filter),
            health: health.place(),
            backup: source.backup,
        }
    }
}

/// The upstreams of a protocol, and what their workers share.
pub struct Followed {
    pub shared: &'static Shared,
    /// Bytes of the zone of the workers.
    pub zone_size: usize,
    pub max_connections: usize,
    pub upstreams: Vec<About>,
}

impl Followed {
    /// Those of a configuration in use; none where no upstream follows Consul.
    pub fn of<P: Protocol>(main: &'static MainConf<P>) -> Option<Self> {
        if main.upstreams.is_empty() {
            return None;
        }
        // SAFETY: the configuration is in use and has upstreams, whose lists are in their zones.
        unsafe {
            Some(Self {
                shared: Shared::of(main),
                zone_size: (*main.shared.0).shm.size,
                max_connections: main.max_connections(),
                upstreams: main.upstreams.iter().map(|it| About::with_list(it)).collect(),
            })
        }
    }

    /// Those of another module in this process, by the name of its zone. None where there is no such
    /// zone, or where another version of the module has made it.
    pub fn in_zone(name: &str) -> Option<Self> {
        // SAFETY: on nginx's main thread, where there always is a cycle; its zones are there to its
        // end. What a zone of this name is, its first word says.
        unsafe {
            let zone = zones().find(|zone| (**zone).shm.name.as_bytes() == name.as_bytes())?;
            let shared = Shared::of_zone(zone)?;
            let upstreams = (0..shared.upstreams())
                .map(|number| serde_json::from_slice(&shared.about(number).read()?).ok())
                .collect::<Option<Vec<About>>>()?;
            Some(Self {
                shared,
                zone_size: (*zone).shm.size,
                max_connections: shared.max_connections(),
                upstreams,
            })
        }
    }
}

/// The zones of this process.
///
/// # Safety
///
/// On nginx's main thread.
unsafe fn zones() -> impl Iterator<Item = *mut ngx_shm_zone_t> {
    // SAFETY: nginx's own list, in parts.
    unsafe {
        let first: *const ngx_list_part_t = &raw const (*ngx_cycle).shared_memory.part;
        let parts = std::iter::successors(first.as_ref(), |part| part.next.as_ref());
        parts.flat_map(|part| {
            let zones: *mut ngx_shm_zone_t = part.elts.cast();
            (0..part.nelts).map(move |n| zones.wrapping_add(n))
        })
    }
}
