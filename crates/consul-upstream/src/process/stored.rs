//! What was stored serves at a start, until Consul answers.

use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::{DirBuilderExt, chown};
use std::path::Path;

use consul_watch::state::State;
use nginx_peers::Spec;
use nginx_peers::spec::arrange;
use nginx_sys::{NGX_LOG_WARN, ngx_core_conf_t, ngx_core_module, ngx_cycle_t, ngx_uid_t};

use super::plan::{Plan, UpstreamPlan};
use crate::log;

/// `NGX_CONF_UNSET_UINT`, as the user of the workers: they stay who the master is.
const UNSET: ngx_uid_t = ngx_uid_t::MAX;

/// Makes the directory, for the user of the workers.
///
/// # Safety
///
/// `cycle` is complete.
pub unsafe fn make_directory(cycle: *mut ngx_cycle_t, path: &Path) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    // Those above it are anybody's.
    if let Some(above) = path.parent() {
        DirBuilder::new().recursive(true).create(above)?;
    }
    DirBuilder::new().mode(0o700).create(path)?;
    // SAFETY: the core module's configuration is there in every cycle.
    let user = unsafe {
        let conf: *mut ngx_core_conf_t = (*(*cycle).conf_ctx.add(ngx_core_module.index)).cast();
        (*conf).user
    };
    // SAFETY: the call has no preconditions.
    if user != UNSET && unsafe { libc::geteuid() } == 0 {
        chown(path, Some(user), None)?;
    }
    Ok(())
}

/// The peers that are stored for an upstream. What is wrong with the file is a line in the log.
pub fn restore(plan: &mut Plan, upstream: usize) -> Vec<Spec> {
    let (Some(store), Some(upstream)) = (&plan.store, plan.upstreams.get_mut(upstream)) else {
        return Vec::new();
    };
    match store.load(&upstream.name) {
        Ok(None) => Vec::new(),
        Ok(Some(state)) => specs(upstream, state),
        Err(err) => {
            let name = &upstream.name;
            log::cycle(
                NGX_LOG_WARN,
                format_args!(
                    "consul: upstream \"{name}\": {err}, it starts without stored servers"
                ),
            );
            Vec::new()
        }
    }
}

/// Only what answered the very question that a line asks now.
fn specs(upstream: &mut UpstreamPlan, state: State) -> Vec<Spec> {
    let mut specs = Vec::new();
    for source in state.sources {
        if let Some(line) = upstream.lines.iter_mut().find(|line| line.key == source.key) {
            specs.extend(source.peers.iter().flat_map(|peer| line.specs(peer)));
            line.datacenter = source.datacenter;
        }
    }
    arrange(specs)
}
