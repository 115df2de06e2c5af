//! Peers in shared memory: made whole, or not at all.

use core::ffi::c_void;
use core::ptr;
use std::net::SocketAddr;

use nginx_sys::{
    AF_INET, AF_INET6, ngx_pagesize, ngx_shmtx_lock, ngx_shmtx_unlock, ngx_slab_alloc,
    ngx_slab_calloc, ngx_slab_free_locked, ngx_slab_pool_t, ngx_sockaddr_t, sockaddr, sockaddr_in,
    sockaddr_in6, socklen_t,
};
use thiserror::Error;

use crate::abi::{PeerAbi, PeersAbi};
use crate::carry::History;
use crate::inline::NGINX_PEERS_SOCKADDR_STRLEN;
use crate::label::Label;
use crate::meter::{self, Meter};
use crate::spec::{Attributes, Spec};

/// The zone has no room for the new peers. The old ones stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("the zone of {size} bytes is full, it needs about {needed}k")]
pub struct Full {
    /// The zone's size, in bytes.
    pub size: usize,
    /// A size that would do, in units of 1024 bytes as in `zone NAME 256k`.
    pub needed: usize,
}

/// A peer that is in the zone and not yet in a list. Dropped, it is freed.
pub(crate) struct Fresh<P: PeerAbi> {
    peer: *mut P,
    pool: *mut ngx_slab_pool_t,
    /// It has all that nginx's own function frees with a peer.
    whole: bool,
}

impl<P: PeerAbi> Fresh<P> {
    /// Allocates and fills a peer. `None` when the zone is full.
    ///
    /// # Safety
    ///
    /// `pool` is the live allocator of a zone, and outlives the peer.
    pub(crate) unsafe fn new(pool: *mut ngx_slab_pool_t, spec: &Spec) -> Option<Self> {
        // SAFETY: the pool is live. What is allocated belongs to the peer from the moment it is
        // stored there, so that dropping an unfinished one frees it; all sizes are those that
        // nginx gives its own peers. Nobody else can reach the peer before it is linked.
        unsafe {
            let peer: *mut P = ngx_slab_calloc(pool, meter::peer_size::<P>()).cast();
            if peer.is_null() {
                return None;
            }
            let mut fresh = Self { peer, pool, whole: false };
            Meter::begin(peer);

            let address: *mut sockaddr = ngx_slab_calloc(pool, size_of::<ngx_sockaddr_t>()).cast();
            if address.is_null() {
                return None;
            }
            *P::sockaddr(peer) = address;
            *P::socklen(peer) = write_address(spec.address, address);

            let name = spec.address.to_string();
            let text: *mut u8 = ngx_slab_calloc(pool, NGINX_PEERS_SOCKADDR_STRLEN as usize).cast();
            if text.is_null() {
                return None;
            }
            (*P::name(peer)).data = text;
            debug_assert!(name.len() <= NGINX_PEERS_SOCKADDR_STRLEN as usize);
            ptr::copy_nonoverlapping(name.as_ptr(), text, name.len());
            (*P::name(peer)).len = name.len();

            // What a static server with this address would be called. `hash ... consistent` goes by
            // it: peers that share it are one to that method, which takes them in turn.
            let mut server = name.into_bytes();
            let len = server.len();
            spec.label.encode(&mut server);
            let text: *mut u8 = ngx_slab_alloc(pool, server.len()).cast();
            if text.is_null() {
                return None;
            }
            (*P::server(peer)).data = text;
            ptr::copy_nonoverlapping(server.as_ptr(), text, server.len());
            // The label stands behind the text.
            (*P::server(peer)).len = len;

            if !P::prepare_session_id(peer, pool) {
                return None;
            }
            fresh.whole = true;
            write_attributes(peer, &spec.attributes);
            *P::effective_weight(peer) = *P::weight(peer);
            Some(fresh)
        }
    }

    /// The peer, which is from now on the list's.
    pub(crate) fn link(self) -> *mut P {
        let peer = self.peer;
        core::mem::forget(self);
        peer
    }

    /// Where the peer is.
    pub(crate) fn as_ptr(&self) -> *mut P {
        self.peer
    }
}

impl<P: PeerAbi> Drop for Fresh<P> {
    fn drop(&mut self) {
        // SAFETY: the peer was never linked, so nobody else has it, and it owns what its fields
        // point to. One that is not whole is freed piece by piece: nginx's own function expects
        // all of them, and a session ID, the last piece, is then not there.
        unsafe {
            ngx_shmtx_lock(&raw mut (*self.pool).mutex);
            if self.whole {
                free_locked(self.peer, self.pool);
            } else {
                let parts: [*mut c_void; 4] = [
                    (*P::sockaddr(self.peer)).cast(),
                    (*P::name(self.peer)).data.cast(),
                    (*P::server(self.peer)).data.cast(),
                    self.peer.cast(),
                ];
                for part in parts.into_iter().filter(|part| !part.is_null()) {
                    ngx_slab_free_locked(self.pool, part);
                }
            }
            ngx_shmtx_unlock(&raw mut (*self.pool).mutex);
        }
    }
}

/// Frees peers that are out of the list and that no request holds.
///
/// # Safety
///
/// The peers lie in the zone of `pool`, and nobody else can reach them.
pub(crate) unsafe fn free<P: PeerAbi>(
    pool: *mut ngx_slab_pool_t,
    peers: impl IntoIterator<Item = *mut P>,
) {
    for peer in peers {
        // The mutex is taken for each: requests wait for it when they save TLS sessions.
        // SAFETY: the caller's promise.
        unsafe {
            ngx_shmtx_lock(&raw mut (*pool).mutex);
            free_locked(peer, pool);
            ngx_shmtx_unlock(&raw mut (*pool).mutex);
        }
    }
}

/// # Safety
///
/// As [`PeerAbi::free_locked`].
unsafe fn free_locked<P: PeerAbi>(peer: *mut P, pool: *mut ngx_slab_pool_t) {
    // SAFETY: the caller's promise. nginx's function frees the TLS session only where nginx was
    // configured with TLS, and one that was is not told from one that was not by the signature:
    // freed here, it is freed once in both.
    unsafe {
        let session = P::ssl_session(peer);
        if !(*session).is_null() {
            ngx_slab_free_locked(pool, *session);
            *session = ptr::null_mut();
        }
        P::free_locked(peer, pool);
    }
}

/// Stores the attributes, all but the effective weight.
///
/// # Safety
///
/// `peer` is live, and nobody else uses it: it is not linked, or the caller holds the write lock.
pub(crate) unsafe fn write_attributes<P: PeerAbi>(peer: *mut P, attributes: &Attributes) {
    // SAFETY: the caller's promise. All values fit: the fields have 64 bits, the attributes 32
    // (on 32-bit systems a weight of 2^31 and more is refused by the configuration).
    unsafe {
        *P::weight(peer) = attributes.weight as _;
        *P::max_conns(peer) = attributes.max_conns as _;
        *P::max_fails(peer) = attributes.max_fails as _;
        *P::fail_timeout(peer) = attributes.fail_timeout as _;
        *P::down(peer) = attributes.down as _;
    }
}

/// Reads the numbers of a peer, and its address.
///
/// # Safety
///
/// `peer` is live. Other processes may change its numbers meanwhile, one word each.
pub(crate) unsafe fn read_plain<P: PeerAbi>(
    peer: *mut P,
) -> (Option<SocketAddr>, Attributes, History) {
    // SAFETY: the caller's promise; the address never changes.
    unsafe {
        let attributes = Attributes {
            weight: P::weight(peer).read_volatile() as u32,
            max_conns: P::max_conns(peer).read_volatile() as u32,
            max_fails: P::max_fails(peer).read_volatile() as u32,
            fail_timeout: P::fail_timeout(peer).read_volatile() as u32,
            down: P::down(peer).read_volatile() != 0,
        };
        let history = History {
            fails: P::fails(peer).read_volatile(),
            accessed: P::accessed(peer).read_volatile(),
            checked: P::checked(peer).read_volatile(),
            effective_weight: P::effective_weight(peer).read_volatile(),
            current_weight: P::current_weight(peer).read_volatile(),
        };
        (read_address(*P::sockaddr(peer)), attributes, history)
    }
}

/// Stores what [`read_plain`] has found out of an earlier peer.
///
/// # Safety
///
/// `peer` is live and has its attributes, and nobody else uses it.
pub(crate) unsafe fn write_history<P: PeerAbi>(peer: *mut P, history: &History) {
    // SAFETY: the caller's promise.
    unsafe {
        *P::fails(peer) = history.fails;
        *P::accessed(peer) = history.accessed;
        *P::checked(peer) = history.checked;
        // Never more than the weight, which no failure explains.
        *P::effective_weight(peer) = history.effective_weight.min(*P::weight(peer));
        *P::current_weight(peer) = history.current_weight;
    }
}

/// Reads back what [`Fresh::new`] wrote.
///
/// # Safety
///
/// `peer` is live and was made by [`Fresh::new`] of this or another version, which puts a label
/// behind the server's text; and this process is the one that edits its list.
pub(crate) unsafe fn read<P: PeerAbi>(
    peer: *mut P,
) -> (Option<Label>, Option<SocketAddr>, Attributes) {
    // SAFETY: the fields read here are written before the peer is linked, or by this process; the
    // label stands behind the server's text, in the same allocation.
    unsafe {
        let server = P::server(peer);
        let mut at = (*server).data.add((*server).len).cast_const();
        let label = Label::decode(|| {
            let byte = *at;
            at = at.add(1);
            byte
        });
        let (address, attributes, _) = read_plain(peer);
        (label, address, attributes)
    }
}

/// How many bytes the text of the server takes, with its label.
fn server_len(spec: &Spec) -> usize {
    spec.address.to_string().len() + spec.label.encoded_len()
}

/// # Safety
///
/// `at` has room for an `ngx_sockaddr_t`, zeroed.
unsafe fn write_address(address: SocketAddr, at: *mut sockaddr) -> socklen_t {
    // SAFETY: ngx_sockaddr_t is the union of both types.
    unsafe {
        match address {
            SocketAddr::V4(address) => {
                let at: *mut sockaddr_in = at.cast();
                (*at).sin_family = AF_INET as _;
                (*at).sin_port = address.port().to_be();
                (*at).sin_addr.s_addr = u32::from(*address.ip()).to_be();
                size_of::<sockaddr_in>() as socklen_t
            }
            SocketAddr::V6(address) => {
                let at: *mut sockaddr_in6 = at.cast();
                (*at).sin6_family = AF_INET6 as _;
                (*at).sin6_port = address.port().to_be();
                ptr::copy_nonoverlapping(
                    address.ip().octets().as_ptr(),
                    (&raw mut (*at).sin6_addr).cast(),
                    16,
                );
                size_of::<sockaddr_in6>() as socklen_t
            }
        }
    }
}

/// # Safety
///
/// `at` points to a socket address of the size that its family says.
unsafe fn read_address(at: *mut sockaddr) -> Option<SocketAddr> {
    // SAFETY: the family says which type it is.
    unsafe {
        match u32::from((*at).sa_family) {
            AF_INET => {
                let at: *mut sockaddr_in = at.cast();
                let ip = u32::from_be((*at).sin_addr.s_addr).to_be_bytes();
                Some((ip, u16::from_be((*at).sin_port)).into())
            }
            AF_INET6 => {
                let at: *mut sockaddr_in6 = at.cast();
                let ip: [u8; 16] = ptr::read((&raw const (*at).sin6_addr).cast());
                Some((ip, u16::from_be((*at).sin6_port)).into())
            }
            _ => None,
        }
    }
}

/// How full a zone is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// The zone's size, in bytes.
    pub size: usize,
    /// Bytes in use, in whole pages.
    pub used: usize,
    /// How many more peers would fit, about.
    pub fits_more: usize,
}

impl Usage {
    /// Looks at a zone, without its mutex.
    ///
    /// # Safety
    ///
    /// `primaries` is a live list in a zone.
    pub unsafe fn of<L: PeersAbi>(primaries: *mut L) -> Self {
        // SAFETY: the caller's promise; `pfree` is read without the mutex, as an estimate may.
        unsafe {
            let (pool, page) = (*L::shpool(primaries), ngx_pagesize);
            let size = (*pool).end.addr() - pool.addr();
            let free = (&raw const (*pool).pfree).read_volatile() * page;
            let slots = [
                meter::peer_size::<L::Peer>(),
                size_of::<ngx_sockaddr_t>(),
                NGINX_PEERS_SOCKADDR_STRLEN as usize,
                // An address and a label of usual length.
                64,
            ];
            let peer: usize = slots.iter().map(|len| slot(*len, page)).sum();
            Self { size, used: size.saturating_sub(free), fits_more: free / peer }
        }
    }
}

/// What the allocator takes for so many bytes: a power of two, or whole pages.
fn slot(len: usize, page: usize) -> usize {
    if len > page / 2 { len.next_multiple_of(page) } else { len.next_power_of_two().max(8) }
}

/// How many bytes the TLS sessions will take that peers of a list and `more` new ones do not have
/// yet, where those that are there have any.
///
/// # Safety
///
/// The peers are live.
pub(crate) unsafe fn sessions<P: PeerAbi>(
    peers: impl IntoIterator<Item = *mut P>,
    more: usize,
) -> usize {
    let (mut without, mut longest) = (more, 0);
    for peer in peers {
        // SAFETY: the caller's promise; other processes write the two words, an estimate reads them.
        let (session, len) = unsafe {
            (P::ssl_session(peer).read_volatile(), P::ssl_session_len(peer).read_volatile())
        };
        if session.is_null() {
            without += 1;
        } else {
            longest = longest.max(usize::try_from(len).unwrap_or(0));
        }
    }
    // SAFETY: nginx writes the word once, before all.
    if longest > 0 { without * slot(longest, unsafe { ngx_pagesize }) } else { 0 }
}

/// The error for a zone that has no room for `specs`, and so many bytes, beside what is in it.
///
/// # Safety
///
/// `pool` is the live allocator of a zone.
pub(crate) unsafe fn full<'a, P: PeerAbi>(
    pool: *mut ngx_slab_pool_t,
    specs: impl Iterator<Item = &'a Spec>,
    more: usize,
) -> Full {
    // SAFETY: the bounds never change; `pfree` is read without the mutex, as an estimate may.
    let (size, used, page) = unsafe {
        let page = ngx_pagesize;
        let size = (*pool).end.addr() - pool.addr();
        let pages = ((*pool).end.addr() - (*pool).start.addr()) / page;
        (size, pages.saturating_sub((*pool).pfree), page)
    };
    // Each size in pages of its own.
    let mut bytes = more;
    let slot = |len| slot(len, page);
    for spec in specs {
        bytes += slot(meter::peer_size::<P>())
            + slot(size_of::<ngx_sockaddr_t>())
            + slot(NGINX_PEERS_SOCKADDR_STRLEN as usize)
            + slot(server_len(spec))
            // A session ID, where there is one.
            + 32;
    }
    // A page that is begun for each size, and the allocator's own tables.
    let pages = used + bytes.div_ceil(page) + 6;
    let tables = 2 * page + pages * 32;
    const STEP: usize = 64;
    let needed = (pages * page + tables).div_ceil(1024).div_ceil(STEP) * STEP;
    Full { size, needed }
}
