//! The C types that nginx has twice, for http and for stream, seen as one.
//!
//! Both sets of types have the same fields at offsets of their own. A field is given as a
//! pointer to it: the structures lie in shared memory, where other processes write other fields
//! at the same time, so a Rust reference to a whole one would be a lie. What stands in the memory of
//! a configuration is given alike.

use core::ffi::c_void;

use nginx_sys::{
    ngx_addr_t, ngx_array_t, ngx_atomic_t, ngx_int_t, ngx_shm_zone_t, ngx_slab_pool_t, ngx_str_t,
    ngx_uint_t, sockaddr, socklen_t, time_t,
};

/// The fields of a peer that are used here, for `declare!` and `define!`.
macro_rules! peer_fields {
    ($apply:ident) => {
        $apply! {
            /// The address, of `socklen` bytes.
            sockaddr: *mut sockaddr;
            /// The address's length.
            socklen: socklen_t;
            /// The address as text.
            name: ngx_str_t;
            /// What the configuration calls it.
            server: ngx_str_t;
            /// Where it stands in the rotation.
            current_weight: ngx_int_t;
            /// The weight that failures lower.
            effective_weight: ngx_int_t;
            /// The weight.
            weight: ngx_int_t;
            /// The most connections at a time; 0 for no limit.
            max_conns: ngx_uint_t;
            /// Failures of late.
            fails: ngx_uint_t;
            /// When it last failed.
            accessed: time_t;
            /// When it was last tried after that.
            checked: time_t;
            /// Failures until it is left alone; 0 for never.
            max_fails: ngx_uint_t;
            /// For how many seconds it is left alone.
            fail_timeout: time_t;
            /// Not 0: out of rotation.
            down: ngx_uint_t;
            /// Requests that hold the peer.
            refs: ngx_uint_t;
            /// Requests that are under way.
            conns: ngx_uint_t;
            /// The next peer.
            next: *mut Self;
            /// A TLS session, in the zone.
            ssl_session: *mut c_void;
            /// Its length.
            ssl_session_len: core::ffi::c_int;
        }
    };
}

/// The fields of a list that are used here.
macro_rules! list_fields {
    ($apply:ident) => {
        $apply! {
            /// How many peers.
            number: ngx_uint_t;
            /// The zone's allocator.
            shpool: *mut ngx_slab_pool_t;
            /// Guards the links and the counters.
            rwlock: ngx_atomic_t;
            /// Counts the changes; shared by the list and its backups.
            config: *mut ngx_uint_t;
            /// The sum of the weights.
            total_weight: ngx_uint_t;
            /// Peers that are not down.
            tries: ngx_uint_t;
            /// The upstream's name.
            name: *mut ngx_str_t;
            /// The backups' list, or null.
            next: *mut Self;
            /// The first peer.
            peer: *mut Self::Peer;
        }
    };
}

/// The fields of an upstream in the configuration that are used here.
macro_rules! upstream_fields {
    ($apply:ident) => {
        $apply! {
            /// The modules' configurations of it; null where it has no block.
            srv_conf: *mut *mut c_void;
            /// Its `server` lines.
            servers: *mut ngx_array_t;
            /// What its method can do.
            flags: ngx_uint_t;
            /// Its name.
            host: ngx_str_t;
            /// Its zone, or null.
            shm_zone: *mut ngx_shm_zone_t;
        }
    };
}

/// The fields of a `server` line that are used here.
macro_rules! server_fields {
    ($apply:ident) => {
        $apply! {
            /// What the line says.
            name: ngx_str_t;
            /// The addresses of that.
            addrs: *mut ngx_addr_t;
            /// How many.
            naddrs: ngx_uint_t;
            /// The weight.
            weight: ngx_uint_t;
            /// Not 0: out of rotation.
            down: ngx_uint_t;
            /// The name that nginx resolves at run time, if it does.
            host: ngx_str_t;
        }
    };
}

macro_rules! declare {
    ($($(#[$doc:meta])* $field:ident: $type:ty;)*) => {
        $(
            $(#[$doc])*
            ///
            /// # Safety
            ///
            /// `this` points to a live structure.
            unsafe fn $field(this: *mut Self) -> *mut $type;
        )*
    };
}

macro_rules! define {
    ($($(#[$doc:meta])* $field:ident: $type:ty;)*) => {
        $(
            unsafe fn $field(this: *mut Self) -> *mut $type {
                // SAFETY: `this` points to a live structure, says the caller; no reference to it
                // is made.
                unsafe { &raw mut (*this).$field }
            }
        )*
    };
}

/// `ngx_http_upstream_rr_peer_t` and its like.
///
/// # Safety
///
/// The fields are those of nginx's structure of the same names, and `free_locked` frees all that
/// a peer owns.
pub unsafe trait PeerAbi: Sized {
    peer_fields!(declare);

    /// Where in the structure the name is.
    const NAME: usize;

    /// Whether nginx's own `resolve` looks after the peer.
    ///
    /// # Safety
    ///
    /// `this` is live.
    unsafe fn is_resolved(this: *mut Self) -> bool;

    /// Marks the peer to be freed by the last request that holds it.
    ///
    /// # Safety
    ///
    /// `this` is live, and the caller holds the list's write lock.
    unsafe fn set_zombie(this: *mut Self);

    /// Gives the peer the session ID that `sticky` routes by, where this nginx has one. `false`
    /// when the zone has no room for it.
    ///
    /// # Safety
    ///
    /// `this` is a peer under construction in the zone of `pool`, with its name set.
    unsafe fn prepare_session_id(this: *mut Self, pool: *mut ngx_slab_pool_t) -> bool;

    /// Frees the peer and what it owns.
    ///
    /// # Safety
    ///
    /// `this` lies in the zone of `pool`, whose mutex the caller holds; nobody else can reach it.
    unsafe fn free_locked(this: *mut Self, pool: *mut ngx_slab_pool_t);
}

/// `ngx_http_upstream_rr_peers_t` and its like.
///
/// # Safety
///
/// The fields are those of nginx's structure of the same names.
pub unsafe trait PeersAbi: Sized {
    /// The peers of this list.
    type Peer: PeerAbi;

    list_fields!(declare);

    /// Whether there is nothing to choose.
    ///
    /// # Safety
    ///
    /// `this` is live.
    unsafe fn is_single(this: *mut Self) -> bool;

    /// Sets the two flags that nginx derives from the counters.
    ///
    /// # Safety
    ///
    /// `this` is live, and the caller holds its write lock.
    unsafe fn set_flags(this: *mut Self, single: bool, weighted: bool);
}

/// `peer.init` of an upstream: begins the choice for one session.
pub type InitPeer<U> = Option<
    unsafe extern "C" fn(session: *mut <U as UpstreamAbi>::Session, upstream: *mut U) -> ngx_int_t,
>;

/// `ngx_http_upstream_srv_conf_t` and its like: an upstream in the configuration.
///
/// # Safety
///
/// The fields are those of nginx's structure of the same names.
pub unsafe trait UpstreamAbi: Sized {
    /// Its list.
    type Peers: PeersAbi;
    /// Its `server` lines.
    type Server: ServerAbi;
    /// What a peer is chosen for: a request, or a session.
    type Session;

    /// The flag of methods that know backups.
    const BACKUP: ngx_uint_t;
    /// The flag of upstreams whose peers may go while nginx runs.
    const MODIFY: ngx_uint_t;

    upstream_fields!(declare);

    /// What the method keeps: for all of nginx's own, the list of peers.
    ///
    /// # Safety
    ///
    /// `this` points to a live structure.
    unsafe fn peers(this: *mut Self) -> *mut Self::Peers;

    /// The function that begins a choice.
    ///
    /// # Safety
    ///
    /// `this` points to a live structure.
    unsafe fn init_peer(this: *mut Self) -> *mut InitPeer<Self>;

    /// The upstreams of a configuration: `data` is that of an upstream's zone, or the main
    /// configuration of nginx's module of upstreams, which is the same.
    ///
    /// # Safety
    ///
    /// `data` is live as long as the result is used.
    unsafe fn all<'a>(data: *mut c_void) -> &'a [*mut Self];
}

/// `ngx_http_upstream_server_t` and its like: a `server` line.
///
/// # Safety
///
/// The fields are those of nginx's structure of the same names, and zero is valid for it.
pub unsafe trait ServerAbi: Sized {
    server_fields!(declare);

    /// Whether it is a backup.
    ///
    /// # Safety
    ///
    /// `this` points to a live structure.
    unsafe fn is_backup(this: *mut Self) -> bool;
}

/// The `server` lines of an upstream.
///
/// # Safety
///
/// `upstream` is live.
pub unsafe fn servers_of<U: UpstreamAbi>(upstream: *mut U) -> impl Iterator<Item = *mut U::Server> {
    // SAFETY: nginx's own array; an upstream that a `proxy_pass` implies has none.
    let (all, len) = unsafe {
        let servers = *U::servers(upstream);
        if servers.is_null() {
            (core::ptr::null_mut(), 0)
        } else {
            ((*servers).elts, (*servers).nelts)
        }
    };
    (0..len).map(move |n| all.cast::<U::Server>().wrapping_add(n))
}

/// All of the traits for the types of one protocol, which the file that calls it has by the names here.
macro_rules! implement {
    () => {
        // SAFETY: all is of nginx's own headers.
        unsafe impl PeerAbi for Peer {
            peer_fields!(define);

            const NAME: usize = core::mem::offset_of!(Peer, name);

            unsafe fn is_resolved(this: *mut Self) -> bool {
                // SAFETY: the peer is live, says the caller; the field is written before it is
                // linked.
                unsafe { !(*this).host.is_null() }
            }

            unsafe fn set_zombie(this: *mut Self) {
                // SAFETY: under the write lock nobody else has a use for the structure, and the
                // bit field is alone in its byte's word.
                unsafe { (*this).set_zombie(1) }
            }

            unsafe fn prepare_session_id(this: *mut Self, pool: *mut ngx_slab_pool_t) -> bool {
                // SAFETY: the caller's promise.
                unsafe { prepare_session_id(this, pool) }
            }

            unsafe fn free_locked(this: *mut Self, pool: *mut ngx_slab_pool_t) {
                // SAFETY: nginx's function looks at the list for its pool alone, so one that has
                // nothing else serves; the rest is the caller's promise.
                unsafe {
                    let mut list: Peers = core::mem::zeroed();
                    list.shpool = pool;
                    free_locked(&mut list, this);
                }
            }
        }

        // SAFETY: as above.
        unsafe impl PeersAbi for Peers {
            type Peer = Peer;

            list_fields!(define);

            unsafe fn is_single(this: *mut Self) -> bool {
                // SAFETY: the caller's promise.
                unsafe { (*this).single() != 0 }
            }

            unsafe fn set_flags(this: *mut Self, single: bool, weighted: bool) {
                // SAFETY: under the write lock nobody else touches the two bits.
                unsafe {
                    (*this).set_single(u32::from(single));
                    (*this).set_weighted(u32::from(weighted));
                }
            }
        }

        // SAFETY: as above.
        unsafe impl UpstreamAbi for Upstream {
            type Peers = Peers;
            type Server = Server;
            type Session = Session;

            const BACKUP: ngx_uint_t = BACKUP as ngx_uint_t;
            const MODIFY: ngx_uint_t = MODIFY as ngx_uint_t;

            upstream_fields!(define);

            unsafe fn peers(this: *mut Self) -> *mut Self::Peers {
                // SAFETY: the caller's promise.
                unsafe { (*this).peer.data.cast() }
            }

            unsafe fn init_peer(this: *mut Self) -> *mut InitPeer<Self> {
                // SAFETY: the caller's promise.
                unsafe { &raw mut (*this).peer.init }
            }

            unsafe fn all<'a>(data: *mut c_void) -> &'a [*mut Self] {
                // SAFETY: the array is nginx's, of pointers to this type.
                unsafe {
                    let upstreams = &(*data.cast::<Main>()).upstreams;
                    core::slice::from_raw_parts(upstreams.elts.cast(), upstreams.nelts)
                }
            }
        }

        // SAFETY: as above.
        unsafe impl ServerAbi for Server {
            server_fields!(define);

            unsafe fn is_backup(this: *mut Self) -> bool {
                // SAFETY: the caller's promise.
                unsafe { (*this).backup() != 0 }
            }
        }
    };
}

pub mod http;
#[cfg(all(ngx_feature = "stream", ngx_feature = "stream_upstream_zone"))]
mod stream;
