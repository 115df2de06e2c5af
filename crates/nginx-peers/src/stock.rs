//! Whether a method keeps its peers as nginx's own methods do.
//!
//! A method may keep whatever it likes in `peer.data` of an upstream: nginx's own all keep the list there that
//! `ngx_http_upstream_init_round_robin` makes, and only that list can be edited. A method of somebody else may keep a
//! structure of its own, a number, or nothing. So nothing is read through the pointer before its target is known to be
//! memory of the configuration's pool, and a list is believed to be nginx's when it says of each `server` line what nginx's own
//! function would have made it say.

use core::ffi::c_void;
use core::ptr;

use nginx_sys::{ngx_addr_t, ngx_pool_data_t, ngx_pool_t};

use crate::abi::{PeerAbi, PeersAbi, ServerAbi, UpstreamAbi, servers_of};

/// The list of an upstream, if it is the one that nginx's own round robin makes of the `server` lines.
///
/// # Safety
///
/// `upstream` is live, its method's `init_upstream` has run, and none of its `server` lines has names that nginx resolves at
/// run time. `pool` is the one that this function was given, and nobody else uses either meanwhile.
pub unsafe fn list_of<U: UpstreamAbi>(
    upstream: *mut U,
    pool: *mut ngx_pool_t,
) -> Option<*mut U::Peers> {
    // SAFETY: the caller's promise. A list is read only where it lies in the pool.
    unsafe {
        let peers = U::peers(upstream);
        if !is_list::<U>(upstream, peers, false, pool) {
            return None;
        }
        let backups = *U::Peers::next(peers);
        let has_backups = addresses_of::<U>(upstream, true).next().is_some();
        let is_stock = match backups.is_null() {
            true => !has_backups,
            false => is_list::<U>(upstream, backups, true, pool),
        };
        is_stock.then_some(peers)
    }
}

/// The list of an upstream in its zone, if the method keeps one there as nginx's own do.
///
/// # Safety
///
/// `upstream` is one of a configuration that is in use, and has a zone.
pub unsafe fn shared_list_of<U: UpstreamAbi>(upstream: *mut U) -> Option<*mut U::Peers> {
    // SAFETY: a zone in use is mapped as a whole, and any bytes are valid for the field that is read.
    unsafe {
        let shm = &(**U::shm_zone(upstream)).shm;
        let peers = U::peers(upstream);
        let (begin, end) = (shm.addr.addr(), shm.addr.addr() + shm.size);
        let is_inside = peers.is_aligned()
            && (begin..end).contains(&peers.addr())
            && end - peers.addr() >= size_of::<U::Peers>();
        (is_inside && ptr::eq(*U::Peers::shpool(peers), shm.addr.cast())).then_some(peers)
    }
}

/// Whether there is a list at `peers`, with all peers of one kind.
///
/// # Safety
///
/// As [`list_of`]; `peers` may be anything.
unsafe fn is_list<U: UpstreamAbi>(
    upstream: *mut U,
    peers: *mut U::Peers,
    backup: bool,
    pool: *mut ngx_pool_t,
) -> bool {
    // SAFETY: what is read lies in the pool, as is asked before; any bytes are valid for the fields that are read.
    unsafe {
        if !holds(pool, peers, 1)
            || !ptr::eq(*U::Peers::name(peers), U::host(upstream))
            || *U::Peers::number(peers) != addresses_of::<U>(upstream, backup).count()
        {
            return false;
        }
        let first = *U::Peers::peer(peers);
        let number = *U::Peers::number(peers);
        if number == 0 {
            return first.is_null();
        }
        // nginx allocates all of a list's peers at once, and links them in their order.
        if !holds(pool, first, number) {
            return false;
        }
        addresses_of::<U>(upstream, backup).enumerate().all(|(n, address)| {
            let peer = first.add(n);
            let next = if n + 1 < number { first.add(n + 1) } else { ptr::null_mut() };
            ptr::eq(*<U::Peers as PeersAbi>::Peer::sockaddr(peer), (*address).sockaddr)
                && ptr::eq(*<U::Peers as PeersAbi>::Peer::next(peer), next)
        })
    }
}

/// The addresses of the `server` lines of one kind.
///
/// # Safety
///
/// `upstream` is live, and its `server` lines are not changed as long as the result is used.
unsafe fn addresses_of<U: UpstreamAbi>(
    upstream: *mut U,
    backup: bool,
) -> impl Iterator<Item = *mut ngx_addr_t> {
    // SAFETY: nginx's own array of servers, each with so many addresses.
    unsafe {
        servers_of(upstream).filter(move |server| U::Server::is_backup(*server) == backup).flat_map(
            |server| {
                let addresses = *U::Server::addrs(server);
                (0..*U::Server::naddrs(server)).map(move |n| addresses.add(n))
            },
        )
    }
}

/// Whether `number` values at a pointer lie in a pool, all of them.
///
/// # Safety
///
/// `pool` is live, and nobody else uses it meanwhile.
unsafe fn holds<T>(pool: *mut ngx_pool_t, at: *const T, number: usize) -> bool {
    let Some(size) = size_of::<T>().checked_mul(number) else { return false };
    if !at.is_aligned() {
        return false;
    }
    let begin = at.addr();
    let Some(end) = begin.checked_add(size) else { return false };
    // SAFETY: the pool's own lists of blocks and of large pieces; a piece is one of malloc's.
    unsafe {
        let mut block = pool;
        while !block.is_null() {
            // The header of a block is no part of what was allocated; there is more of it in the first one, but
            // nobody's structure begins in it.
            let from = block.addr() + size_of::<ngx_pool_data_t>();
            if from <= begin && end <= (*block).d.last.addr() {
                return true;
            }
            block = (*block).d.next;
        }
        let mut large = (*pool).large;
        while !large.is_null() {
            let piece: *mut c_void = (*large).alloc;
            if piece.addr() == begin && begin != 0 {
                return libc::malloc_usable_size(piece.cast()) >= size;
            }
            large = (*large).next;
        }
        false
    }
}

#[cfg(test)]
mod tests;
