//! `consul_upstream SERVICE [parameter …];`

use core::ffi::c_void;
use std::time::Duration;

use consul_watch::query::{Network, Parameter, text};
use consul_watch::{Health, Query, Selection};
use nginx_peers::spec::Attributes;
use nginx_peers::{ServerAbi, UpstreamAbi};
use nginx_sys::{
    AF_INET, ngx_addr_t, ngx_array_push, ngx_conf_t, ngx_pcalloc, ngx_pool_t, ngx_str_t, sockaddr,
    sockaddr_in,
};

use super::argument::{number, quoted, seconds, time};
use super::finish::upstream_of;
use super::{Fault, ServerConf, filter};
use crate::protocol::Protocol;

/// Milliseconds within 31 bits, as nginx's own times.
const LONGEST_HOLD: Duration = Duration::from_millis(i32::MAX as u64);

/// One `consul_upstream` line.
pub struct Source {
    /// What Consul is asked for.
    pub query: Query,
    /// Which of the instances serve.
    pub selection: Selection,
    /// Attributes of all of them; the weight is the instance's own.
    pub attributes: Attributes,
    /// They are backups.
    pub backup: bool,
    /// Where the line stands, for errors that show only when all is known.
    pub place: Place,
}

/// A line of a configuration file.
pub struct Place {
    pub file: String,
    pub line: usize,
}

impl Source {
    /// Whether another line asks for the same instances.
    fn repeats(&self, other: &Self) -> bool {
        self.query == other.query && self.selection.health == other.selection.health && {
            let sorted = |source: &Self| {
                let mut tags = source.selection.tags.clone();
                tags.sort();
                tags
            };
            sorted(self) == sorted(other)
        }
    }
}

/// Reads a line.
///
/// # Safety
///
/// Called by [`super::set`] for a command whose configuration is a [`ServerConf`], inside an
/// upstream block.
pub unsafe fn add<P: Protocol>(
    cf: *mut ngx_conf_t,
    args: &[ngx_str_t],
    conf: *mut c_void,
) -> Result<(), Fault> {
    // SAFETY: this function's own contract; nobody else uses the configuration meanwhile.
    let conf = unsafe { &mut *conf.cast::<ServerConf<P>>() };
    let (service, parameters) = args.split_first().ok_or("no service")?;
    let mut source = read(service, parameters)?;
    // SAFETY: nginx fills in the file that it reads.
    source.place = unsafe {
        let file = (*cf).conf_file;
        Place { file: (*file).file.name.to_string(), line: (*file).line }
    };
    if conf.sources.iter().any(|other| other.repeats(&source)) {
        return Err(format!("duplicate query for service {}", quoted(service)).into());
    }
    conf.sources.push(source);
    if conf.placeholder.is_none() {
        // SAFETY: as above.
        conf.placeholder = Some(
            unsafe { push_placeholder::<P::Upstream>(upstream_of::<P>(cf), (*cf).pool) }
                .ok_or("no memory")?,
        );
    }
    Ok(())
}

fn read(service: &ngx_str_t, parameters: &[ngx_str_t]) -> Result<Source, String> {
    if service.as_bytes().contains(&b'$') {
        let service = quoted(service);
        return Err(format!("service {service} holds \"$\", variables are not supported"));
    }
    let mut query = text(service.as_bytes())
        .and_then(Query::new)
        .map_err(|err| format!("service {} {err}", quoted(service)))?;
    let mut selection = Selection::default();
    let mut attributes = Attributes::default();
    let mut backup = false;
    let mut seen: Vec<&[u8]> = Vec::new();

    let mut parameters = parameters.iter();
    while let Some(parameter) = parameters.next() {
        let invalid = || format!("invalid parameter {}", quoted(parameter));
        let bytes = parameter.as_bytes();
        let (name, value) = match bytes.iter().position(|b| *b == b'=') {
            Some(at) => (&bytes[..at], Some(&bytes[at + 1..])),
            None => (bytes, None),
        };
        if name != b"tag" {
            if seen.contains(&name) {
                return Err(format!("duplicate parameter {}", quoted(parameter)));
            }
            seen.push(name);
        }
        match (name, value) {
            (b"tag", Some(value)) => {
                selection.tags.push(text(value).map_err(|_| invalid())?.to_owned());
            }
            (b"health", Some(value)) => {
                selection.health = match value {
                    b"passing" => Health::Passing,
                    b"warning" => Health::Warning,
                    b"any" => Health::Any,
                    _ => return Err(invalid()),
                };
            }
            (b"dc", Some(value)) => {
                query = with(query, Parameter::Datacenter, value).ok_or_else(invalid)?;
            }
            (b"ns", Some(value)) => {
                query = with(query, Parameter::Namespace, value).ok_or_else(invalid)?;
            }
            (b"partition", Some(value)) => {
                query = with(query, Parameter::Partition, value).ok_or_else(invalid)?;
            }
            (b"peer", Some(value)) => {
                query = with(query, Parameter::Peer, value).ok_or_else(invalid)?;
            }
            (b"filter", Some(value)) => {
                let filter = filter::expression(value, &mut parameters)?;
                query = with(query, Parameter::Filter, &filter).ok_or_else(invalid)?;
            }
            (b"address", Some(value)) => {
                query.network = match value {
                    b"lan" => Network::Lan,
                    b"wan" => Network::Wan,
                    _ => return Err(invalid()),
                };
            }
            (b"weight", Some(value)) => {
                let weight = number(value).filter(|weight| *weight > 0).ok_or_else(invalid)?;
                selection.weight = Some(weight);
            }
            (b"max_conns", Some(value)) => {
                attributes.max_conns = number(value).ok_or_else(invalid)?;
            }
            (b"max_fails", Some(value)) => {
                attributes.max_fails = number(value).ok_or_else(invalid)?;
            }
            (b"fail_timeout", Some(value)) => {
                attributes.fail_timeout = seconds(value).ok_or_else(invalid)?;
            }
            (b"guard", Some(value)) => {
                selection.guard.guard = percent(value).ok_or_else(invalid)?;
            }
            (b"hold", Some(value)) => {
                selection.guard.hold =
                    time(value).filter(|hold| *hold <= LONGEST_HOLD).ok_or_else(invalid)?;
            }
            (b"panic", Some(b"0")) => selection.panic = 0,
            (b"panic", Some(value)) => {
                selection.panic = percent(value).ok_or_else(invalid)?;
            }
            (b"backup", None) => backup = true,
            _ => return Err(invalid()),
        }
    }

    let place = Place { file: String::new(), line: 0 };
    Ok(Source { query, selection, attributes, backup, place })
}

/// The query with a parameter of Consul's own; none where the value cannot be one.
fn with(query: Query, parameter: Parameter, value: &[u8]) -> Option<Query> {
    query.with(parameter, text(value).ok()?).ok()
}

/// A share such as `50%`.
fn percent(value: &[u8]) -> Option<u8> {
    let percent = number(value.strip_suffix(b"%")?)?;
    u8::try_from(percent).ok().filter(|percent| *percent <= 100)
}

/// nginx refuses an upstream without servers: this one stands in until the balancer has made its
/// list, and is taken out again by [`super::finish()`]. It is known by its address' place in memory.
///
/// # Safety
///
/// `upstream` is the one whose block is read, and `pool` the configuration's memory.
unsafe fn push_placeholder<U: UpstreamAbi>(
    upstream: *mut U,
    pool: *mut ngx_pool_t,
) -> Option<*mut sockaddr> {
    const NAME: &str = "consul";
    // SAFETY: all is allocated in the configuration's pool and filled in before nginx sees it;
    // zero is valid for all of these types.
    unsafe {
        let server: *mut U::Server = ngx_array_push(*U::servers(upstream)).cast();
        if server.is_null() {
            return None;
        }
        server.write_bytes(0, 1);
        let address: *mut ngx_addr_t = ngx_pcalloc(pool, size_of::<ngx_addr_t>()).cast();
        let sockaddr: *mut sockaddr_in = ngx_pcalloc(pool, size_of::<sockaddr_in>()).cast();
        if address.is_null() || sockaddr.is_null() {
            return None;
        }
        (*sockaddr).sin_family = AF_INET as _;
        let name = ngx_str_t { len: NAME.len(), data: NAME.as_ptr().cast_mut() };
        (*address).sockaddr = sockaddr.cast();
        (*address).socklen = size_of::<sockaddr_in>() as _;
        (*address).name = name;
        *U::Server::name(server) = name;
        *U::Server::addrs(server) = address;
        *U::Server::naddrs(server) = 1;
        *U::Server::weight(server) = 1;
        *U::Server::down(server) = 1;
        Some(sockaddr.cast())
    }
}
