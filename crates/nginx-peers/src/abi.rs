//! The C types that nginx has twice, for http and for stream, seen as one.
//!
//! Both pairs of types have the same fields at offsets of their own. A field is given as a
//! pointer to it: the structures lie in shared memory, where other processes write other fields
//! at the same time, so a Rust reference to a whole one would be a lie.

use nginx_sys::{
    ngx_atomic_t, ngx_http_upstream_rr_peer_t, ngx_http_upstream_rr_peers_t, ngx_int_t,
    ngx_slab_pool_t, ngx_str_t, ngx_uint_t, sockaddr, socklen_t, time_t,
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
            ssl_session: *mut core::ffi::c_void;
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
            /// The backups' list, or null.
            next: *mut Self;
            /// The first peer.
            peer: *mut Self::Peer;
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

    /// Sets the two flags that nginx derives from the counters.
    ///
    /// # Safety
    ///
    /// `this` is live, and the caller holds its write lock.
    unsafe fn set_flags(this: *mut Self, single: bool, weighted: bool);
}

// SAFETY: all is of ngx_http_upstream_round_robin.h.
unsafe impl PeerAbi for ngx_http_upstream_rr_peer_t {
    peer_fields!(define);

    unsafe fn is_resolved(this: *mut Self) -> bool {
        // SAFETY: the peer is live, says the caller; the field is written before it is linked.
        unsafe { !(*this).host.is_null() }
    }

    unsafe fn set_zombie(this: *mut Self) {
        // SAFETY: under the write lock nobody else has a use for the structure, and the bit field
        // is alone in its byte's word.
        unsafe { (*this).set_zombie(1) }
    }

    unsafe fn prepare_session_id(this: *mut Self, pool: *mut ngx_slab_pool_t) -> bool {
        #[cfg(nginx_sid)]
        // SAFETY: the peer is not linked yet, so nobody else sees it; the buffer has the size
        // that the function writes.
        unsafe {
            let len = crate::inline::NGINX_PEERS_SID_LEN as usize;
            let data = nginx_sys::ngx_slab_calloc(pool, len);
            if data.is_null() {
                return false;
            }
            (*this).sid.data = data.cast();
            nginx_sys::ngx_http_upstream_init_round_robin_sid(this, core::ptr::null_mut());
        }
        #[cfg(not(nginx_sid))]
        let _ = (this, pool);
        true
    }

    unsafe fn free_locked(this: *mut Self, pool: *mut ngx_slab_pool_t) {
        // SAFETY: nginx's function looks at the list for its pool alone, so one that has nothing
        // else serves; the rest is the caller's promise.
        unsafe {
            let mut list: ngx_http_upstream_rr_peers_t = core::mem::zeroed();
            list.shpool = pool;
            crate::inline::ngx_http_upstream_rr_peer_free_locked(&mut list, this);
        }
    }
}

// SAFETY: all is of ngx_http_upstream_round_robin.h.
unsafe impl PeersAbi for ngx_http_upstream_rr_peers_t {
    type Peer = ngx_http_upstream_rr_peer_t;

    list_fields!(define);

    unsafe fn set_flags(this: *mut Self, single: bool, weighted: bool) {
        // SAFETY: under the write lock nobody else touches the two bits.
        unsafe {
            (*this).set_single(u32::from(single));
            (*this).set_weighted(u32::from(weighted));
        }
    }
}
