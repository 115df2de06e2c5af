//! Directives to settings.
//!
//! `source` reads `consul_upstream`, with the help of `filter`; `settings` and `tls` read the
//! directives that say how Consul is asked, `main` those that hold for all upstreams. `finish`
//! checks and completes all upstreams once the whole block is known.

use core::ffi::{CStr, c_char, c_void};
use core::marker::PhantomData;
use core::ptr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use consul_watch::Agents;
use nginx_peers::InitPeer;
use nginx_peers::list::Statics;
use nginx_sys::{
    NGX_CONF_1MORE, NGX_CONF_TAKE1, NGX_ERROR, NGX_LOG_EMERG, NGX_OK, ngx_command_t, ngx_conf_t,
    ngx_int_t, ngx_shm_zone_t, ngx_str_t, ngx_uint_t, sockaddr,
};
use ngx::core::{NGX_CONF_ERROR, NGX_CONF_OK, Pool};

pub use self::finish::finish;
pub use self::settings::Settings;
pub use self::source::Source;
use crate::carry::Heir;
use crate::guard::guard;
use crate::log;
use crate::process::Cost;
use crate::protocol::{Protocol, main_conf_of, shared_conf_of};

pub mod argument;
mod filter;
pub mod finish;
mod main;
mod settings;
mod source;
mod tls;

/// `consul_start_timeout`, where it is not set.
const START_TIMEOUT: Duration = Duration::from_secs(2);

/// `consul_max_connections`, where it is not set: half of what Consul itself allows to a client.
const MAX_CONNECTIONS: usize = 100;

/// The whole block's.
pub struct MainConf<P: Protocol> {
    start_timeout: Option<Duration>,
    max_connections: Option<usize>,
    /// An absolute path; inside, none is `off`.
    state_path: Option<Option<PathBuf>>,
    /// What is set for all upstreams.
    block: *const ServerConf<P>,
    /// The upstreams with a `consul_upstream`, in the configuration's order.
    pub upstreams: Vec<Upstream<P>>,
    /// The zone of what the workers share; null without such an upstream.
    pub shared: SharedZone,
}

/// A pointer that is null by default.
pub struct SharedZone(pub *mut ngx_shm_zone_t);

impl<P: Protocol> Default for MainConf<P> {
    fn default() -> Self {
        Self {
            start_timeout: None,
            max_connections: None,
            state_path: None,
            block: ptr::null(),
            upstreams: Vec::new(),
            shared: SharedZone(ptr::null_mut()),
        }
    }
}

impl<P: Protocol> MainConf<P> {
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
pub struct Upstream<P: Protocol> {
    /// nginx's part of it, alive as long as the configuration.
    pub nginx: *mut P::Upstream,
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
    /// Sessions to instances that leave are closed.
    pub drops: bool,
}

/// An upstream block's, or the whole block's for settings that hold for all.
pub struct ServerConf<P: Protocol> {
    pub settings: Settings,
    sources: Vec<Source>,
    /// The address of the server that keeps an upstream without static ones from being refused.
    placeholder: Option<*mut sockaddr>,
    /// What the balancer made of `peer.init`; [`crate::balance`] wraps it.
    pub init_peer: InitPeer<P::Upstream>,
    /// Whether sessions to instances that leave are closed, as it is set.
    pub session_drop: Option<bool>,
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

impl<P: Protocol> Default for ServerConf<P> {
    fn default() -> Self {
        Self {
            settings: Settings::default(),
            sources: Vec::new(),
            placeholder: None,
            init_peer: None,
            session_drop: None,
            seen: 0,
            cost: None,
            number: 0,
            datacenters: (0, Vec::new()),
            heir: None,
        }
    }
}

/// Makes the configuration of a block.
///
/// # Safety
///
/// As nginx calls it.
pub unsafe extern "C" fn create_main<P: Protocol>(cf: *mut ngx_conf_t) -> *mut c_void {
    // SAFETY: this function's own contract.
    unsafe { create(cf, MainConf::<P>::default()) }
}

/// Makes the configuration of an upstream, or of a block.
///
/// # Safety
///
/// As nginx calls it.
pub unsafe extern "C" fn create_server<P: Protocol>(cf: *mut ngx_conf_t) -> *mut c_void {
    // SAFETY: this function's own contract.
    unsafe { create(cf, ServerConf::<P>::default()) }
}

/// Before a block is read: finds what is set for all upstreams. When stream's block is known, nginx has
/// put the configuration of its last server in that place.
///
/// # Safety
///
/// As nginx calls it, as `preconfiguration`.
pub unsafe extern "C" fn begin<P: Protocol>(cf: *mut ngx_conf_t) -> ngx_int_t {
    // SAFETY: the context is the block's, whose configurations are made.
    unsafe {
        let Some(main) = main_conf_of::<P>((*cf).ctx) else { return NGX_ERROR as ngx_int_t };
        main.block = shared_conf_of::<P>((*cf).ctx);
    }
    NGX_OK as ngx_int_t
}

/// # Safety
///
/// `cf` is nginx's.
unsafe fn create<T>(cf: *mut ngx_conf_t, value: T) -> *mut c_void {
    // SAFETY: the caller's promise. The value is dropped with the configuration's memory.
    unsafe { Pool::from_ngx_pool((*cf).pool) }.allocate(value).cast()
}

/// What reads a directive's arguments.
pub type Handler = unsafe fn(*mut ngx_conf_t, &[ngx_str_t], *mut c_void) -> Result<(), Fault>;

/// What is wrong with a line.
pub enum Fault {
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

/// A directive that may stand in these contexts, with so many arguments; its configuration is at this
/// offset of the context.
pub const fn command(
    name: &'static CStr,
    place: u32,
    offset: usize,
    handler: &'static Handler,
) -> ngx_command_t {
    ngx_command_t {
        // nginx compares up to the zero.
        name: ngx_str_t { len: name.count_bytes(), data: name.as_ptr().cast_mut().cast() },
        type_: place as ngx_uint_t,
        set: Some(set),
        conf: offset,
        offset: 0,
        post: ptr::from_ref(handler).cast_mut().cast(),
    }
}

macro_rules! command {
    ($name:literal, $place:expr, $offset:expr, $file:ident::$handler:ident) => {{
        struct Of<P>(PhantomData<P>);
        impl<P: Protocol> Of<P> {
            const HANDLER: &'static Handler = &($file::$handler::<P> as Handler);
        }
        command($name, $place, $offset, Of::<P>::HANDLER)
    }};
}

const ONE: u32 = NGX_CONF_TAKE1;
const SOME: u32 = NGX_CONF_1MORE;

/// How many directives both protocols have.
const BOTH: usize = 16;

/// The length of a table: with the one that a protocol has of its own, and the end.
pub const COMMANDS: usize = BOTH + 2;

/// The directives of both protocols, then the one that a protocol has of its own, and the end.
pub const fn commands<P: Protocol>(own: ngx_command_t) -> [ngx_command_t; COMMANDS] {
    let upstream = P::UPSTREAM_BLOCK;
    let levels = P::BLOCK | upstream;
    let (block, server, main) = (P::BLOCK, P::SERVER_OFFSET, P::MAIN_OFFSET);
    let both: [ngx_command_t; BOTH] = [
        command!(c"consul_upstream", upstream | SOME, server, source::add),
        command!(c"consul_address", levels | SOME, server, settings::address),
        command!(c"consul_token", levels | ONE, server, settings::token),
        command!(c"consul_token_file", levels | ONE, server, settings::token_file),
        command!(c"consul_ssl_trusted_certificate", levels | ONE, server, tls::trusted_certificate),
        command!(c"consul_ssl_certificate", levels | ONE, server, tls::certificate),
        command!(c"consul_ssl_certificate_key", levels | ONE, server, tls::certificate_key),
        command!(c"consul_ssl_server_name", levels | ONE, server, tls::server_name),
        command!(c"consul_ssl_verify", levels | ONE, server, tls::verify),
        command!(c"consul_consistency", levels | ONE, server, settings::consistency),
        command!(c"consul_wait", levels | ONE, server, settings::wait),
        command!(c"consul_timeout", levels | ONE, server, settings::timeout),
        command!(c"consul_max_response", levels | ONE, server, settings::max_response),
        command!(c"consul_max_connections", block | ONE, main, main::max_connections),
        command!(c"consul_state_path", block | ONE, main, main::state_path),
        command!(c"consul_start_timeout", block | ONE, main, main::start_timeout),
    ];
    let mut all = [ngx_command_t::empty(); COMMANDS];
    let mut n = 0;
    while n < BOTH {
        all[n] = both[n];
        n += 1;
    }
    all[BOTH] = own;
    all
}
