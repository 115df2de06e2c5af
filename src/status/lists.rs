//! The upstreams of all modules in this nginx, and their lists: the status is the http module's, and
//! shows those of the stream module, too.

use std::time::Duration;

use consul_status::model::Protocol;
use consul_upstream::conf::MainConf;
use consul_upstream::log;
use consul_upstream::process::about::{About, Followed};
use nginx_peers::view::{View, look};
use nginx_peers::{PeersAbi, Usage};
use nginx_sys::{NGX_LOG_DEBUG, ngx_http_upstream_rr_peers_t};

use crate::http::ConsulUpstream;

/// The zone of the stream module's workers.
const STREAM_ZONE: &str = "consul_upstream_stream";

/// How long a list's lock is waited for: the worker that has it may be dead.
const PATIENCE: Duration = Duration::from_millis(20);

/// All upstreams that follow Consul, http's first.
pub struct All {
    pub followed: Vec<(Protocol, Followed)>,
}

impl All {
    pub fn new(main: Option<&'static MainConf<ConsulUpstream>>) -> Self {
        let http = main.and_then(Followed::of).map(|it| (Protocol::Http, it));
        let stream = Followed::in_zone(STREAM_ZONE).map(|it| (Protocol::Stream, it));
        Self { followed: http.into_iter().chain(stream).collect() }
    }

    /// Each upstream, with its number among those of its protocol.
    pub fn upstreams(&self) -> impl Iterator<Item = (Protocol, &Followed, usize, &About)> {
        self.followed.iter().flat_map(|(protocol, followed)| {
            let numbered = followed.upstreams.iter().enumerate();
            numbered.map(move |(number, about)| (*protocol, followed, number, about))
        })
    }

    /// Whether there is one of this name.
    pub fn knows(&self, name: &[u8]) -> bool {
        self.upstreams().any(|(.., about)| about.name.as_bytes() == name)
    }
}

/// Copies a list of peers; an empty one where it is locked.
pub fn view(protocol: Protocol, about: &About) -> View {
    let view = match protocol {
        Protocol::Http => view_of::<ngx_http_upstream_rr_peers_t>(about),
        #[cfg(all(ngx_feature = "stream", ngx_feature = "stream_upstream_zone"))]
        Protocol::Stream => view_of::<nginx_sys::ngx_stream_upstream_rr_peers_t>(about),
        #[cfg(not(all(ngx_feature = "stream", ngx_feature = "stream_upstream_zone")))]
        Protocol::Stream => View::default(),
    };
    let (name, locked) = (&about.name, view.locked().as_nanos());
    log::cycle(
        NGX_LOG_DEBUG,
        format_args!(
            "consul: upstream \"{name}\": a reader locked the list for {locked}ns at a time"
        ),
    );
    view
}

fn view_of<L: PeersAbi>(about: &About) -> View {
    let primaries = core::ptr::with_exposed_provenance_mut::<L>(about.list);
    // SAFETY: what is said of an upstream is of a configuration in use, whose list is in its zone.
    unsafe { look(primaries, about.statics(), PATIENCE).unwrap_or_default() }
}

/// How full the zone of a list is.
pub fn usage(protocol: Protocol, about: &About) -> Usage {
    match protocol {
        Protocol::Http => usage_of::<ngx_http_upstream_rr_peers_t>(about),
        #[cfg(all(ngx_feature = "stream", ngx_feature = "stream_upstream_zone"))]
        Protocol::Stream => usage_of::<nginx_sys::ngx_stream_upstream_rr_peers_t>(about),
        #[cfg(not(all(ngx_feature = "stream", ngx_feature = "stream_upstream_zone")))]
        Protocol::Stream => Usage::default(),
    }
}

fn usage_of<L: PeersAbi>(about: &About) -> Usage {
    let primaries = core::ptr::with_exposed_provenance_mut::<L>(about.list);
    // SAFETY: as in `view_of`.
    unsafe { Usage::of(primaries) }
}
