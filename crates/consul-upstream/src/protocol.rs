//! Where http and stream differ beside their types.

use core::ffi::c_void;
use core::sync::atomic::AtomicPtr;

use nginx_peers::meter::Attempt;
use nginx_peers::{PeersAbi, UpstreamAbi};
use nginx_sys::{ngx_cycle_t, ngx_module_t, ngx_peer_connection_t, ngx_pool_t};

use crate::conf::{MainConf, ServerConf};
use crate::process::Applier;

/// What a choice is made for: a request, or a session.
pub type Session<P> = <<P as Protocol>::Upstream as UpstreamAbi>::Session;

/// A list of peers.
pub type Peers<P> = <<P as Protocol>::Upstream as UpstreamAbi>::Peers;

/// A peer.
pub type Peer<P> = <Peers<P> as PeersAbi>::Peer;

/// A module, as what both have in common knows it.
///
/// # Safety
///
/// All modules and offsets are nginx's for this protocol. The configurations of [`Self::module`] are a
/// [`MainConf`] and a [`ServerConf`], made by [`crate::conf::create_main`] and
/// [`crate::conf::create_server`].
pub unsafe trait Protocol: Sized + 'static {
    /// nginx's types.
    type Upstream: UpstreamAbi;

    /// What the protocol notes with a session that holds a peer. No destructor is run.
    type Held: Copy + Default;

    /// Traces of a method in a session that a restart of its choice has to take back. No destructor is run.
    type Left: Copy + Default;

    /// Where directives stand that hold for all upstreams.
    const BLOCK: u32;
    /// Where those of an upstream do.
    const UPSTREAM_BLOCK: u32;
    /// Where the context of the block has the main configurations of all modules.
    const MAIN_OFFSET: usize;
    /// Where it has their server configurations.
    const SERVER_OFFSET: usize;
    /// The name of the zone of the workers, which stands in nginx's logs.
    const ZONE: &'static str;
    /// What the names of stored states begin with, behind which that of the upstream stands.
    const STATE: &'static str;

    /// This module.
    fn module() -> *mut ngx_module_t;
    /// nginx's module of the block.
    fn block_module() -> *mut ngx_module_t;
    /// nginx's module of upstreams.
    fn upstream_module() -> *mut ngx_module_t;
    /// This process' part in following Consul; null in most processes.
    fn applier() -> &'static AtomicPtr<Applier<Self>>;

    /// A configuration is complete.
    ///
    /// # Safety
    ///
    /// `cycle` is nginx's new one, in the hands of the caller alone.
    unsafe fn configured(_cycle: *mut ngx_cycle_t) {}

    /// The memory of a session.
    ///
    /// # Safety
    ///
    /// `session` is live.
    unsafe fn pool(session: *mut Session<Self>) -> *mut ngx_pool_t;

    /// Its connection to a peer; null where it has no part in any.
    ///
    /// # Safety
    ///
    /// `session` is live.
    unsafe fn peer_connection(session: *mut Session<Self>) -> *mut ngx_peer_connection_t;

    /// How many peers it may be given, 0 for no limit; none where that cannot be seen.
    ///
    /// # Safety
    ///
    /// `session` is live, and has a connection to a peer.
    unsafe fn most_tries(session: *mut Session<Self>) -> Option<usize>;

    /// How its attempt with a peer ended; none where nginx does not say.
    ///
    /// # Safety
    ///
    /// As [`Self::most_tries`]; the session holds the peer still.
    unsafe fn attempt(session: *mut Session<Self>, failed: bool) -> Option<Attempt>;

    /// It was given a peer of ours.
    ///
    /// # Safety
    ///
    /// As [`Self::most_tries`]. `held` stays where it is until [`Self::lets_go`], and so do the
    /// session and the peer.
    unsafe fn holds(
        _session: *mut Session<Self>,
        _upstream: *mut Self::Upstream,
        _peer: *mut Peer<Self>,
        _held: &mut Self::Held,
    ) {
    }

    /// It gives that peer back.
    ///
    /// # Safety
    ///
    /// The peer is the one that [`Self::holds`] was told of last.
    unsafe fn lets_go(_held: &mut Self::Held) {}

    /// Calls `get`, by which a method chooses a peer, and notes the traces of that call in the session.
    ///
    /// # Safety
    ///
    /// `session` is live.
    unsafe fn choose<R>(
        _session: *mut Session<Self>,
        _left: &mut Self::Left,
        get: impl FnOnce() -> R,
    ) -> R {
        get()
    }

    /// Removes the method's traces from the session, before the method chooses as if for the first time.
    ///
    /// # Safety
    ///
    /// `left` is that of the session's calls of [`Self::choose`].
    unsafe fn take_back(_session: *mut Session<Self>, _left: &mut Self::Left) {}
}

/// # Safety
///
/// `context` is that of a block of the protocol, and `offset` one of its two.
unsafe fn conf<P: Protocol>(context: *mut c_void, offset: usize) -> *mut c_void {
    // SAFETY: the caller's promise; nginx numbers its modules before it reads any of their blocks.
    unsafe {
        let all: *mut *mut c_void = *context.byte_add(offset).cast();
        *all.add((*P::module()).ctx_index)
    }
}

/// Our configuration of all upstreams.
///
/// # Safety
///
/// `context` is that of a block of the protocol. Nobody else uses the configuration meanwhile.
pub unsafe fn main_conf_of<'a, P: Protocol>(context: *mut c_void) -> Option<&'a mut MainConf<P>> {
    // SAFETY: the caller's promise.
    unsafe { conf::<P>(context, P::MAIN_OFFSET).cast::<MainConf<P>>().as_mut() }
}

/// What is set for all upstreams, as long as no part of the block has been read.
///
/// # Safety
///
/// As [`main_conf_of`].
pub unsafe fn shared_conf_of<P: Protocol>(context: *mut c_void) -> *mut ServerConf<P> {
    // SAFETY: the caller's promise.
    unsafe { conf::<P>(context, P::SERVER_OFFSET).cast() }
}

/// Our configuration of all upstreams in a cycle; none without a block of the protocol.
///
/// # Safety
///
/// `cycle` is complete, and nobody else uses the configuration meanwhile where it is changed.
pub unsafe fn main_conf<P: Protocol>(cycle: *mut ngx_cycle_t) -> Option<&'static mut MainConf<P>> {
    // SAFETY: the caller's promise; a module's place is null where its block is missing.
    unsafe {
        let context: *mut c_void = (*(*cycle).conf_ctx.add((*P::block_module()).index)).cast();
        if context.is_null() { None } else { main_conf_of(context) }
    }
}
