//! When the whole http block is known: checks each upstream, takes out the placeholder, and puts
//! our layer around its balancer.
//!
//! nginx calls this after the balancers and all who wrap them (keepalive, sticky) have had their
//! turn, so ours is the outermost layer whatever the order of the directives.

use core::ptr;

use consul_watch::agent::Address;
use nginx_peers::list::Statics;
use nginx_sys::{
    NGX_ERROR, NGX_HTTP_UPSTREAM_BACKUP, NGX_HTTP_UPSTREAM_MODIFY, NGX_LOG_EMERG, NGX_OK,
    ngx_conf_t, ngx_http_conf_ctx_t, ngx_http_upstream_main_conf_t, ngx_http_upstream_module,
    ngx_http_upstream_rr_peers_t, ngx_http_upstream_server_t, ngx_http_upstream_srv_conf_t,
    ngx_int_t, ngx_pcalloc, ngx_uint_t, sockaddr,
};
use ngx::http::{HttpModule, HttpModuleMainConf, HttpModuleServerConf};

use super::tls::Checked;
use super::{ServerConf, Upstream, http};
use crate::carry::Heir;
use crate::guard::guard;
use crate::{ConsulUpstream, balance, log, process};

/// The module's `postconfiguration`.
///
/// # Safety
///
/// `cf` is the context of the http block.
pub unsafe fn finish(cf: *mut ngx_conf_t) -> ngx_int_t {
    guard("the end of the configuration", NGX_ERROR as ngx_int_t, || {
        // SAFETY: this function's own contract.
        match unsafe { all(cf) } {
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
unsafe fn all(cf: *mut ngx_conf_t) -> Result<(), String> {
    // SAFETY: nginx has made the configuration of every http module, and of every upstream that
    // has a block (`srv_conf` is null for those that a `proxy_pass` implies); nobody else uses
    // them meanwhile.
    unsafe {
        let shared = ConsulUpstream::server_conf(&*cf).ok_or("no configuration")?;
        let main = ConsulUpstream::main_conf_mut(&*cf).ok_or("no configuration")?;
        let context = (*cf).ctx.cast::<ngx_http_conf_ctx_t>();
        let upstreams = *(*context).main_conf.add(ngx_http_upstream_module.ctx_index);
        let upstreams = &(*upstreams.cast::<ngx_http_upstream_main_conf_t>()).upstreams;
        let mut checked = Checked::default();
        for nginx in upstreams.as_slice::<*mut ngx_http_upstream_srv_conf_t>() {
            let Some(conf) = server_conf(*nginx) else { continue };
            if (*conf).sources.is_empty() {
                continue;
            }
            let upstream = complete(cf, *nginx, &mut *conf, shared, &mut checked)?;
            (*conf).heir = Some(Heir::new(&upstream));
            (*conf).number = main.upstreams.len();
            main.upstreams.push(upstream);
        }
        if !main.upstreams.is_empty() {
            http::complete(cf, main)?;
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
/// http block's.
unsafe fn complete(
    cf: *mut ngx_conf_t,
    nginx: *mut ngx_http_upstream_srv_conf_t,
    conf: &mut ServerConf,
    shared: &ServerConf,
    checked: &mut Checked,
) -> Result<Upstream, String> {
    // SAFETY: the upstream is complete: its balancer has made the list of its peers.
    unsafe {
        let name = (*nginx).host.to_string();
        let fail = |text: &str| match conf.sources.first() {
            Some(source) => {
                let place = &source.place;
                format!("{text} in upstream \"{name}\" in {}:{}", place.file, place.line)
            }
            None => text.to_owned(),
        };
        if (*nginx).shm_zone.is_null() {
            return Err(fail("\"consul_upstream\" requires \"zone\""));
        }
        let servers = (*(*nginx).servers).as_slice::<ngx_http_upstream_server_t>();
        if servers.iter().any(|server| server.host.len > 0) {
            return Err(fail(
                "\"consul_upstream\" and the \"resolve\" parameter of \"server\" cannot be used \
                 together",
            ));
        }
        let knows_backups = (*nginx).flags & NGX_HTTP_UPSTREAM_BACKUP as ngx_uint_t != 0;
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

        let peers: *mut ngx_http_upstream_rr_peers_t = (*nginx).peer.data.cast();
        let placeholder = conf.placeholder.take().ok_or_else(|| fail("no placeholder"))?;
        if peers.is_null() || !take_out(nginx, peers, placeholder) {
            return Err(fail("\"consul_upstream\" does not know the balancing method"));
        }
        if knows_backups && (*peers).next.is_null() {
            // The zone copies a list for backups only if there is one, and an instance's own word
            // can make it one at any time.
            let backups: *mut ngx_http_upstream_rr_peers_t =
                ngx_pcalloc((*cf).pool, size_of::<ngx_http_upstream_rr_peers_t>()).cast();
            if backups.is_null() {
                return Err(fail("no memory"));
            }
            (*backups).name = (*peers).name;
            (*peers).next = backups;
        }
        let statics = Statics {
            primaries: (*peers).number,
            backups: if (*peers).next.is_null() { 0 } else { (*(*peers).next).number },
        };

        // With this flag nginx copies a peer's name for the request's log before the peer can go.
        // Set now, because balancers assign the flags.
        (*nginx).flags |= NGX_HTTP_UPSTREAM_MODIFY as ngx_uint_t;
        conf.init_peer = (*nginx).peer.init.replace(balance::init_peer);

        Ok(Upstream {
            nginx,
            name,
            zone: (*(*nginx).shm_zone).shm.name.to_string(),
            agents,
            sources: core::mem::take(&mut conf.sources),
            knows_backups,
            statics,
        })
    }
}

/// Takes the placeholder out of the servers and of the list that the balancer made of them.
///
/// # Safety
///
/// As [`complete`]; `peers` is the upstream's list, still in the configuration's memory.
unsafe fn take_out(
    nginx: *mut ngx_http_upstream_srv_conf_t,
    peers: *mut ngx_http_upstream_rr_peers_t,
    placeholder: *mut sockaddr,
) -> bool {
    // SAFETY: the configuration belongs to this thread alone, and all links are those of the
    // balancer's list.
    unsafe {
        let servers = (*nginx).servers;
        let all = (*servers).as_slice_mut::<ngx_http_upstream_server_t>();
        let is_it = |server: &ngx_http_upstream_server_t| {
            server.naddrs == 1 && ptr::eq((*server.addrs).sockaddr, placeholder)
        };
        let Some(at) = all.iter().position(is_it) else { return false };
        all[at..].rotate_left(1);
        (*servers).nelts -= 1;

        let mut link = &raw mut (*peers).peer;
        while !(*link).is_null() {
            let peer = *link;
            if ptr::eq((*peer).sockaddr, placeholder) {
                *link = (*peer).next;
                (*peers).number -= 1;
                (*peers).total_weight -= 1;
                // It was down: `tries` did not count it.
                let weighted = (*peers).total_weight != (*peers).number;
                (*peers).set_weighted(u32::from(weighted));
                let backups = if (*peers).next.is_null() { 0 } else { (*(*peers).next).number };
                (*peers).set_single(u32::from((*peers).number == 1 && backups == 0));
                return true;
            }
            link = &raw mut (*peer).next;
        }
        false
    }
}

/// The upstream whose block is being read.
///
/// # Safety
///
/// `cf` is the context inside an upstream block.
pub unsafe fn upstream_of(cf: *mut ngx_conf_t) -> *mut ngx_http_upstream_srv_conf_t {
    // SAFETY: inside the block the context's servers are the upstream's own, and its own
    // configuration stands at the place of nginx's upstream module.
    unsafe {
        let context = (*cf).ctx.cast::<ngx_http_conf_ctx_t>();
        (*(*context).srv_conf.add(ngx_http_upstream_module.ctx_index)).cast()
    }
}

/// Our configuration of an upstream; none for one without a block.
///
/// # Safety
///
/// `nginx` is a live upstream of an http block that has our module.
pub unsafe fn server_conf(nginx: *mut ngx_http_upstream_srv_conf_t) -> Option<*mut ServerConf> {
    // SAFETY: nginx makes a configuration for every module when it reads the block.
    unsafe {
        let all = (*nginx).srv_conf;
        if all.is_null() {
            return None;
        }
        Some((*all.add(ConsulUpstream::module().ctx_index)).cast())
    }
}
