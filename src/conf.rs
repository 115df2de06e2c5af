//! Directives to settings.
//!
//! `source` reads `consul_upstream`, with the help of `filter`; `settings` and `tls` read the
//! directives that say how Consul is asked, `http` those that hold for all upstreams. `finish`
//! checks and completes all upstreams once the whole http block is known.

use core::ffi::{c_char, c_void};
use core::ptr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use consul_watch::Agents;
use nginx_peers::list::Statics;
use nginx_sys::{
    NGX_CONF_1MORE, NGX_CONF_NOARGS, NGX_CONF_TAKE1, NGX_HTTP_LOC_CONF, NGX_HTTP_MAIN_CONF,
    NGX_HTTP_MAIN_CONF_OFFSET, NGX_HTTP_SRV_CONF_OFFSET, NGX_HTTP_UPS_CONF, NGX_LOG_EMERG,
    ngx_command_t, ngx_conf_t, ngx_http_upstream_init_peer_pt, ngx_http_upstream_srv_conf_t,
    ngx_shm_zone_t, ngx_str_t, ngx_uint_t, sockaddr,
};
use ngx::core::{NGX_CONF_ERROR, NGX_CONF_OK};
use ngx::ngx_string;

pub use self::finish::finish;
pub use self::settings::Settings;
pub use self::source::Source;
use crate::carry::Heir;
use crate::guard::guard;
use crate::log;
use crate::process::Cost;

mod argument;
mod filter;
pub mod finish;
mod http;
mod settings;
mod source;
mod tls;

/// `consul_start_timeout`, where it is not set.
const START_TIMEOUT: Duration = Duration::from_secs(2);

/// `consul_max_connections`, where it is not set: half of what Consul itself allows to a client.
const MAX_CONNECTIONS: usize = 100;

/// The http block's.
#[derive(Default)]
pub struct MainConf {
    start_timeout: Option<Duration>,
    max_connections: Option<usize>,
    /// An absolute path; inside, none is `off`.
    state_path: Option<Option<PathBuf>>,
    /// The upstreams with a `consul_upstream`, in the configuration's order.
    pub upstreams: Vec<Upstream>,
    /// The zone of what the workers share; null without such an upstream.
    pub shared: SharedZone,
}

/// A pointer that is null by default.
pub struct SharedZone(pub *mut ngx_shm_zone_t);

impl Default for SharedZone {
    fn default() -> Self {
        Self(ptr::null_mut())
    }
}

impl MainConf {
    /// How long new workers wait for the first answers.
    pub fn start_timeout(&self) -> Duration {
        self.start_timeout.unwrap_or(START_TIMEOUT)
    }

    /// How many connections there may be to one agent.
    pub fn max_connections(&self) -> usize {
        self.max_connections.unwrap_or(MAX_CONNECTIONS)
    }

    /// The directory of the upstreams' states, an absolute path; none where it is turned off, or
    /// where no upstream follows Consul.
    pub fn state_path(&self) -> Option<&Path> {
        self.state_path.as_ref()?.as_deref()
    }

    /// Turns the states off: their directory cannot be made.
    pub fn store_nothing(&mut self) {
        self.state_path = Some(None);
    }
}

/// An upstream that follows Consul, complete and checked.
pub struct Upstream {
    /// nginx's part of it, alive as long as the configuration.
    pub nginx: *mut ngx_http_upstream_srv_conf_t,
    /// Its name.
    pub name: String,
    /// The name of its zone.
    pub zone: String,
    /// Whom to ask.
    pub agents: Agents,
    /// The `consul_upstream` lines.
    pub sources: Vec<Source>,
    /// Its balancing method knows backups.
    pub knows_backups: bool,
    /// How many peers of its lists are static servers.
    pub statics: Statics,
}

/// An upstream block's, or the http block's for settings that hold for all.
#[derive(Default)]
pub struct ServerConf {
    pub settings: Settings,
    sources: Vec<Source>,
    /// The address of the server that keeps an upstream without static ones from being refused.
    placeholder: Option<*mut sockaddr>,
    /// What the balancer made of `peer.init`; [`crate::balance`] wraps it.
    pub init_peer: ngx_http_upstream_init_peer_pt,
    /// The change of its list that this process has seen last, and where it notes what that took it.
    pub seen: ngx_uint_t,
    pub cost: Option<&'static Cost>,
    /// Its number among those that follow Consul.
    pub number: usize,
    /// The datacenters of its sources, as the record of this number has them.
    pub datacenters: (u64, Vec<(u64, String)>),
    /// What the upstream takes over at a reload; [`crate::carry`] does.
    pub heir: Option<Heir>,
}

type Handler = unsafe fn(*mut ngx_conf_t, &[ngx_str_t], *mut c_void) -> Result<(), Fault>;

/// What is wrong with a line.
enum Fault {
    /// A sentence of its own.
    Line(String),
    /// What nginx says after `"NAME" directive`.
    Directive(String),
}

impl From<String> for Fault {
    fn from(text: String) -> Self {
        Self::Line(text)
    }
}

impl From<&str> for Fault {
    fn from(text: &str) -> Self {
        Self::Line(text.into())
    }
}

/// Calls a directive's handler with its arguments, and logs what it finds wrong.
///
/// # Safety
///
/// As nginx calls it: `conf` is the configuration that the command's offset names.
unsafe extern "C" fn set(
    cf: *mut ngx_conf_t,
    command: *mut ngx_command_t,
    conf: *mut c_void,
) -> *mut c_char {
    guard("a directive", NGX_CONF_ERROR, || {
        // SAFETY: nginx passes live arguments, the first of which is the directive's name; `post`
        // of all commands below points to a handler for the configuration that it gets.
        let result = unsafe {
            let args = (*(*cf).args).as_slice::<ngx_str_t>();
            let handler = *(*command).post.cast::<Handler>();
            handler(cf, args.get(1..).unwrap_or_default(), conf)
        };
        let Err(fault) = result else { return NGX_CONF_OK };
        // SAFETY: `cf` and the command are nginx's.
        unsafe {
            match fault {
                Fault::Line(text) => log::directive(NGX_LOG_EMERG, cf, format_args!("{text}")),
                Fault::Directive(text) => {
                    let name = (*command).name;
                    let line = format_args!("\"{name}\" directive {text}");
                    log::directive(NGX_LOG_EMERG, cf, line);
                }
            }
        }
        NGX_CONF_ERROR
    })
}

/// `consul_status;`
///
/// # Safety
///
/// Called by [`set`] for a directive inside a location.
unsafe fn status(cf: *mut ngx_conf_t, _: &[ngx_str_t], _: *mut c_void) -> Result<(), Fault> {
    // SAFETY: this function's own contract.
    match unsafe { crate::status::install(cf) } {
        true => Ok(()),
        false => Err(Fault::Directive("is duplicate".into())),
    }
}

macro_rules! command {
    ($name:literal, $contexts:expr, $offset:expr, $handler:path) => {
        ngx_command_t {
            name: ngx_string!($name),
            type_: ($contexts) as ngx_uint_t,
            set: Some(set),
            conf: $offset as ngx_uint_t,
            offset: 0,
            post: {
                static HANDLER: Handler = $handler;
                ptr::addr_of!(HANDLER).cast_mut().cast()
            },
        }
    };
}

/// Of a [`ServerConf`] in an upstream alone, and in the http block too.
const UPSTREAM: u32 = NGX_HTTP_UPS_CONF;
const LEVELS: u32 = NGX_HTTP_MAIN_CONF | UPSTREAM;
const SERVER: u32 = NGX_HTTP_SRV_CONF_OFFSET as u32;

/// Of the [`MainConf`].
const HTTP: u32 = NGX_HTTP_MAIN_CONF;
const MAIN: u32 = NGX_HTTP_MAIN_CONF_OFFSET as u32;

/// Of no configuration of ours: what it sets is nginx's.
const NO_CONF: u32 = 0;

const ONE: u32 = NGX_CONF_TAKE1;
const SOME: u32 = NGX_CONF_1MORE;

pub static mut COMMANDS: [ngx_command_t; 18] = [
    command!("consul_upstream", UPSTREAM | SOME, SERVER, source::add),
    command!("consul_address", LEVELS | SOME, SERVER, settings::address),
    command!("consul_token", LEVELS | ONE, SERVER, settings::token),
    command!("consul_token_file", LEVELS | ONE, SERVER, settings::token_file),
    command!("consul_ssl_trusted_certificate", LEVELS | ONE, SERVER, tls::trusted_certificate),
    command!("consul_ssl_certificate", LEVELS | ONE, SERVER, tls::certificate),
    command!("consul_ssl_certificate_key", LEVELS | ONE, SERVER, tls::certificate_key),
    command!("consul_ssl_server_name", LEVELS | ONE, SERVER, tls::server_name),
    command!("consul_ssl_verify", LEVELS | ONE, SERVER, tls::verify),
    command!("consul_consistency", LEVELS | ONE, SERVER, settings::consistency),
    command!("consul_wait", LEVELS | ONE, SERVER, settings::wait),
    command!("consul_timeout", LEVELS | ONE, SERVER, settings::timeout),
    command!("consul_max_response", LEVELS | ONE, SERVER, settings::max_response),
    command!("consul_max_connections", HTTP | ONE, MAIN, http::max_connections),
    command!("consul_state_path", HTTP | ONE, MAIN, http::state_path),
    command!("consul_start_timeout", HTTP | ONE, MAIN, http::start_timeout),
    command!("consul_status", NGX_HTTP_LOC_CONF | NGX_CONF_NOARGS, NO_CONF, status),
    ngx_command_t::empty(),
];
