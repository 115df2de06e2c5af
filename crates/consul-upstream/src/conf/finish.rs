//! When the whole block is known: checks each upstream, takes out the placeholder, and puts
//! our layer around its balancer.
//!
//! nginx calls this after the balancers and all who wrap them (keepalive, sticky) have had their
//! turn, so ours is the outermost layer whatever the order of the directives.

use core::ffi::c_void;
use core::ptr;

use consul_watch::agent::Address;
use nginx_peers::list::Statics;
use nginx_peers::{PeerAbi, PeersAbi, ServerAbi, UpstreamAbi, servers_of, stock};
use nginx_sys::{NGX_ERROR, NGX_LOG_EMERG, NGX_OK, ngx_conf_t, ngx_int_t, ngx_pcalloc, sockaddr};

use super::tls::Checked;
use super::{ServerConf, Upstream, main};
use crate::carry::Heir;
use crate::guard::guard;
use crate::protocol::{Peer, Peers, Protocol, main_conf_of};
use crate::{balance, log, process};

/// The module's `postconfiguration`.
///
/// # Safety
///
/// `cf` is the context of the block.
pub unsafe extern "C" fn finish<P: Protocol>(cf: *mut ngx_conf_t) -> ngx_int_t {
    guard("the end of the configuration", NGX_ERROR as ngx_int_t, || {
        // SAFETY: this function's own contract.
        match unsafe { all::<P>(cf) } {
            Ok(()) => NGX_OK as ngx_int_t,
            Err(text) => {
                // SAFETY: the context has a log.
                unsafe { log::write(NGX_LOG_EMERG, (*cf).log, format_args!("{text}")) };
                NGX_ERROR as ngx_int_t
            }
        }
    })
}

/// # Safety
///
/// As [`finish`].
unsafe fn all<P: Protocol>(cf: *mut ngx_conf_t) -> Result<(), String> {
    // SAFETY: nginx has made the configuration of every module of the block, and of every upstream that
    // has a block (`srv_conf` is null for those that a `proxy_pass` implies); nobody else uses
    // them meanwhile.
    unsafe {
        let main = main_conf_of::<P>((*cf).ctx).ok_or("no configuration")?;
        let shared = main.block.as_ref().ok_or("no configuration")?;
        let upstreams = *conf_of::<P>(cf, P::MAIN_OFFSET);
        let mut checked = Checked::default();
        for nginx in P::Upstream::all(upstreams) {
            let Some(conf) = server_conf::<P>(*nginx) else { continue };
            if (*conf).sources.is_empty() {
                continue;
            }
            let upstream = complete::<P>(cf, *nginx, &mut *conf, shared, &mut checked)?;
            (*conf).heir = Some(Heir::new(&upstream));
            (*conf).number = main.upstreams.len();
            main.upstreams.push(upstream);
        }
        if !main.upstreams.is_empty() {
            main::complete(cf, main)?;
            main.shared.0 = process::add_zone(cf, main).ok_or("cannot add a shared memory zone")?;
        }
    }
    Ok(())
}

/// Checks one upstream and completes it.
///
/// # Safety
///
/// As [`finish`]; `nginx` is an upstream with a block, and `conf` is ours of it, as `shared` is the
/// whole block's.
unsafe fn complete<P: Protocol>(
    cf: *mut ngx_conf_t,
    nginx: *mut P::Upstream,
    conf: &mut ServerConf<P>,
    shared: &ServerConf<P>,
    checked: &mut Checked,
) -> Result<Upstream<P>, String> {
    // SAFETY: the upstream is complete: its balancer has made the list of its peers.
    unsafe {
        let name = (*P::Upstream::host(nginx)).to_string();
        let fail = |text: &str| match conf.sources.first() {
            Some(source) => {
                let place = &source.place;
                format!("{text} in upstream \"{name}\" in {}:{}", place.file, place.line)
            }
            None => text.to_owned(),
        };
        let zone = *P::Upstream::shm_zone(nginx);
        if zone.is_null() {
            return Err(fail("\"consul_upstream\" requires \"zone\""));
        }
        // Its data is read as nginx's configuration of upstreams, which another module's zone has not.
        let upstreams: *mut c_void = *conf_of::<P>(cf, P::MAIN_OFFSET);
        if !ptr::eq((*zone).tag, P::upstream_module().cast()) || !ptr::eq((*zone).data, upstreams) {
            return Err(fail("\"consul_upstream\" requires nginx's own \"zone\""));
        }
        let resolves = |server| (*<P::Upstream as UpstreamAbi>::Server::host(server)).len > 0;
        if servers_of(nginx).any(resolves) {
            return Err(fail(
                "\"consul_upstream\" and the \"resolve\" parameter of \"server\" cannot be used \
                 together",
            ));
        }
        let knows_backups = *P::Upstream::flags(nginx) & P::Upstream::BACKUP != 0;
        if let Some(source) = conf.sources.iter().find(|source| source.backup)
            && !knows_backups
        {
            let place = &source.place;
            return Err(format!(
                "balancing method does not support parameter \"backup\" in upstream \"{name}\" in \
                 {}:{}",
                place.file, place.line
            ));
        }

        let agents = conf.settings.agents(&shared.settings).map_err(|text| fail(&text))?;
        if agents.addresses.iter().any(Address::is_tls) {
            checked.check(&agents.tls).map_err(|text| fail(&text))?;
        }

        let peers = stock::list_of(nginx, (*cf).pool)
            .ok_or_else(|| fail("\"consul_upstream\" does not know the balancing method"))?;
        let placeholder = conf.placeholder.take().ok_or_else(|| fail("no placeholder"))?;
        if !take_out::<P>(nginx, peers, placeholder) {
            return Err(fail("the placeholder is not among the servers"));
        }
        let backups = Peers::<P>::next(peers);
        if knows_backups && (*backups).is_null() {
            // The zone copies a list for backups only if there is one, and an instance's own word
            // can make it one at any time.
            let empty: *mut Peers<P> = ngx_pcalloc((*cf).pool, size_of::<Peers<P>>()).cast();
            if empty.is_null() {
                return Err(fail("no memory"));
            }
            *Peers::<P>::name(empty) = *Peers::<P>::name(peers);
            *backups = empty;
        }
        let statics = Statics {
            primaries: *Peers::<P>::number(peers),
            backups: if (*backups).is_null() { 0 } else { *Peers::<P>::number(*backups) },
        };

        // With this flag nginx copies a peer's name for the request's log before the peer can go.
        // Set now, because balancers assign the flags.
        *P::Upstream::flags(nginx) |= P::Upstream::MODIFY;
        conf.init_peer = (*P::Upstream::init_peer(nginx)).replace(balance::init_peer::<P>);
        let drops = conf.session_drop.or(shared.session_drop).unwrap_or(false);
        conf.session_drop = Some(drops);

        Ok(Upstream {
            nginx,
            name,
            zone: (*zone).shm.name.to_string(),
            agents,
            sources: core::mem::take(&mut conf.sources),
            knows_backups,
            statics,
            drops,
        })
    }
}

/// Takes the placeholder out of the servers and of the list that the balancer made of them.
///
/// # Safety
///
/// As [`complete`]; `peers` is the upstream's list, still in the configuration's memory.
unsafe fn take_out<P: Protocol>(
    nginx: *mut P::Upstream,
    peers: *mut Peers<P>,
    placeholder: *mut sockaddr,
) -> bool {
    // SAFETY: the configuration belongs to this thread alone, and all links are those of the
    // balancer's list.
    unsafe {
        let servers = *P::Upstream::servers(nginx);
        let is_it = |server: *mut <P::Upstream as UpstreamAbi>::Server| {
            *ServerAbi::naddrs(server) == 1
                && ptr::eq((**ServerAbi::addrs(server)).sockaddr, placeholder)
        };
        let Some(at) = servers_of(nginx).position(is_it) else { return false };
        let all = (*servers).as_slice_mut::<<P::Upstream as UpstreamAbi>::Server>();
        all[at..].rotate_left(1);
        (*servers).nelts -= 1;

        let mut link = Peers::<P>::peer(peers);
        while !(*link).is_null() {
            let peer = *link;
            if ptr::eq(*Peer::<P>::sockaddr(peer), placeholder) {
                *link = *Peer::<P>::next(peer);
                let (number, weight) = (Peers::<P>::number(peers), Peers::<P>::total_weight(peers));
                *number -= 1;
                *weight -= 1;
                // It was down: `tries` did not count it.
                let backups = *Peers::<P>::next(peers);
                let backups = if backups.is_null() { 0 } else { *Peers::<P>::number(backups) };
                let single = *number == 1 && backups == 0;
                Peers::<P>::set_flags(peers, single, *weight != *number);
                return true;
            }
            link = Peer::<P>::next(peer);
        }
        false
    }
}

/// nginx's configuration of upstreams, of the block or of the upstream that is being read.
///
/// # Safety
///
/// `cf` is the context inside the block or an upstream's, and `offset` one of the protocol's.
unsafe fn conf_of<P: Protocol>(cf: *mut ngx_conf_t, offset: usize) -> *mut *mut c_void {
    // SAFETY: the caller's promise.
    unsafe {
        let all: *mut *mut c_void = *(*cf).ctx.byte_add(offset).cast();
        all.add((*P::upstream_module()).ctx_index)
    }
}

/// The upstream whose block is being read.
///
/// # Safety
///
/// `cf` is the context inside an upstream block.
pub unsafe fn upstream_of<P: Protocol>(cf: *mut ngx_conf_t) -> *mut P::Upstream {
    // SAFETY: inside the block the context's servers are the upstream's own, and its own
    // configuration stands at the place of nginx's upstream module.
    unsafe { (*conf_of::<P>(cf, P::SERVER_OFFSET)).cast() }
}

/// Our configuration of an upstream; none for one without a block.
///
/// # Safety
///
/// `nginx` is a live upstream of a block that has our module.
pub unsafe fn server_conf<P: Protocol>(nginx: *mut P::Upstream) -> Option<*mut ServerConf<P>> {
    // SAFETY: nginx makes a configuration for every module when it reads the block.
    unsafe {
        let all = *P::Upstream::srv_conf(nginx);
        if all.is_null() {
            return None;
        }
        Some((*all.add((*P::module()).ctx_index)).cast())
    }
}
