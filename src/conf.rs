//! Directives to settings.
//!
//! `source` reads `consul_upstream`, `settings` the directives that say how Consul is asked, and
//! `finish` checks and completes all upstreams once the whole http block is known.

use core::ffi::{c_char, c_void};
use core::ptr;
use std::time::Duration;

use consul_watch::Agent;
use nginx_peers::list::Statics;
use nginx_sys::{
    NGX_CONF_1MORE, NGX_CONF_TAKE1, NGX_HTTP_MAIN_CONF, NGX_HTTP_MAIN_CONF_OFFSET,
    NGX_HTTP_SRV_CONF_OFFSET, NGX_HTTP_UPS_CONF, NGX_LOG_EMERG, ngx_command_t, ngx_conf_t,
    ngx_http_upstream_init_peer_pt, ngx_http_upstream_srv_conf_t, ngx_shm_zone_t, ngx_str_t,
    ngx_uint_t, sockaddr,
};
use ngx::core::{NGX_CONF_ERROR, NGX_CONF_OK};
use ngx::ngx_string;

pub use self::finish::finish;
pub use self::settings::Settings;
pub use self::source::Source;
use crate::guard::guard;
use crate::log;

pub mod finish;
mod settings;
mod source;

/// `consul_start_timeout`, where it is not set.
const START_TIMEOUT: Duration = Duration::from_secs(2);

/// The http block's.
#[derive(Default)]
pub struct MainConf {
    start_timeout: Option<Duration>,
    /// The upstreams with a `consul_upstream`, in the configuration's order.
    pub upstreams: Vec<Upstream>,
    /// The zone of [`crate::process::Gate`]; null without such an upstream.
    pub gate: GateZone,
}

/// A pointer that is null by default.
pub struct GateZone(pub *mut ngx_shm_zone_t);

impl Default for GateZone {
    fn default() -> Self {
        Self(ptr::null_mut())
    }
}

impl MainConf {
    /// How long new workers wait for the first answers.
    pub fn start_timeout(&self) -> Duration {
        self.start_timeout.unwrap_or(START_TIMEOUT)
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
    pub agent: Agent,
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

const MAIN: u32 = NGX_HTTP_MAIN_CONF;
const UPSTREAM: u32 = NGX_HTTP_UPS_CONF;

pub static mut COMMANDS: [ngx_command_t; 9] = [
    command!("consul_upstream", UPSTREAM | NGX_CONF_1MORE, NGX_HTTP_SRV_CONF_OFFSET, source::add),
    command!(
        "consul_address",
        MAIN | UPSTREAM | NGX_CONF_TAKE1,
        NGX_HTTP_SRV_CONF_OFFSET,
        settings::address
    ),
    command!(
        "consul_token",
        MAIN | UPSTREAM | NGX_CONF_TAKE1,
        NGX_HTTP_SRV_CONF_OFFSET,
        settings::token
    ),
    command!(
        "consul_token_file",
        MAIN | UPSTREAM | NGX_CONF_TAKE1,
        NGX_HTTP_SRV_CONF_OFFSET,
        settings::token_file
    ),
    command!(
        "consul_wait",
        MAIN | UPSTREAM | NGX_CONF_TAKE1,
        NGX_HTTP_SRV_CONF_OFFSET,
        settings::wait
    ),
    command!(
        "consul_timeout",
        MAIN | UPSTREAM | NGX_CONF_TAKE1,
        NGX_HTTP_SRV_CONF_OFFSET,
        settings::timeout
    ),
    command!(
        "consul_max_response",
        MAIN | UPSTREAM | NGX_CONF_TAKE1,
        NGX_HTTP_SRV_CONF_OFFSET,
        settings::max_response
    ),
    command!(
        "consul_start_timeout",
        MAIN | NGX_CONF_TAKE1,
        NGX_HTTP_MAIN_CONF_OFFSET,
        settings::start_timeout
    ),
    ngx_command_t::empty(),
];
