use nginx_sys::{
    ngx_array_t, ngx_http_upstream_rr_peer_t as Peer, ngx_http_upstream_rr_peers_t as Peers,
    ngx_http_upstream_server_t as Server, ngx_http_upstream_srv_conf_t as Upstream,
    ngx_pool_large_t, ngx_shm_zone_t, ngx_slab_pool_t, sockaddr, sockaddr_in,
};

use super::*;

/// A pool of one block, and an upstream with servers of its own.
struct Stage {
    block: Box<[u128; 1024]>,
    upstream: Box<Upstream>,
    servers: Vec<Server>,
    array: Box<ngx_array_t>,
    _addresses: Vec<Vec<(Box<sockaddr_in>, ngx_addr_t)>>,
}

fn zeroed<T>() -> T {
    // SAFETY: used for nginx's structures, for all of which zero is valid.
    unsafe { core::mem::zeroed() }
}

impl Stage {
    /// An upstream with a `server` line for each number, which is that of the line's addresses.
    fn new(primaries: &[usize], backups: &[usize]) -> Stage {
        let mut addresses = Vec::new();
        let mut servers = Vec::new();
        let all = primaries.iter().map(|n| (*n, 0)).chain(backups.iter().map(|n| (*n, 1)));
        for (number, backup) in all {
            let mut of_server: Vec<(Box<sockaddr_in>, ngx_addr_t)> =
                (0..number).map(|_| (Box::new(zeroed()), zeroed())).collect();
            for (at, address) in &mut of_server {
                address.sockaddr = ptr::from_mut::<sockaddr_in>(at).cast();
            }
            let plain: Vec<ngx_addr_t> = of_server.iter().map(|(_, address)| *address).collect();
            let mut server: Server = zeroed();
            server.addrs = Box::leak(plain.into_boxed_slice()).as_mut_ptr();
            server.naddrs = number;
            server.set_backup(backup);
            servers.push(server);
            addresses.push(of_server);
        }
        let mut stage = Stage {
            block: Box::new([0; 1024]),
            upstream: Box::new(zeroed()),
            servers,
            array: Box::new(zeroed()),
            _addresses: addresses,
        };
        stage.array.elts = stage.servers.as_mut_ptr().cast();
        stage.array.nelts = stage.servers.len();
        stage.upstream.servers = &raw mut *stage.array;
        let (begin, size) = (stage.pool().cast::<u8>(), size_of_val(&*stage.block));
        // SAFETY: the block begins with the pool's header.
        unsafe {
            (*stage.pool()).d.last = begin.add(size_of::<ngx_pool_t>());
            (*stage.pool()).d.end = begin.add(size);
        }
        stage
    }

    fn pool(&mut self) -> *mut ngx_pool_t {
        self.block.as_mut_ptr().cast()
    }

    fn allocate<T>(&mut self, number: usize) -> *mut T {
        let pool = self.pool();
        // SAFETY: the block has room for what a test needs.
        unsafe {
            let at = (*pool).d.last.add((*pool).d.last.align_offset(16));
            (*pool).d.last = at.add(number * size_of::<T>());
            assert!((*pool).d.last <= (*pool).d.end);
            at.cast()
        }
    }

    /// As nginx's round robin makes it.
    fn make_list(&mut self) -> *mut Peers {
        let lists = [0, 1].map(|backup| {
            let addresses: Vec<*mut sockaddr> = self
                .servers
                .iter()
                .filter(|server| server.backup() == backup)
                // SAFETY: each server has so many addresses.
                .flat_map(|server| unsafe {
                    core::slice::from_raw_parts(server.addrs, server.naddrs)
                })
                .map(|address| address.sockaddr)
                .collect();
            let (list, first): (*mut Peers, *mut Peer) =
                (self.allocate(1), self.allocate(addresses.len()));
            // SAFETY: fresh memory of the pool.
            unsafe {
                list.write(zeroed());
                (*list).number = addresses.len();
                (*list).name = &raw mut self.upstream.host;
                let mut link = &raw mut (*list).peer;
                for (n, address) in addresses.iter().enumerate() {
                    let peer = first.add(n);
                    peer.write(zeroed());
                    (*peer).sockaddr = *address;
                    *link = peer;
                    link = &raw mut (*peer).next;
                }
            }
            (list, addresses.len())
        });
        let [(primaries, _), (backups, number)] = lists;
        if number > 0 {
            // SAFETY: made above.
            unsafe { (*primaries).next = backups };
        }
        self.upstream.peer.data = primaries.cast();
        primaries
    }

    fn is_known(&mut self) -> bool {
        let pool = self.pool();
        // SAFETY: all is this stage's.
        unsafe { list_of::<Upstream>(&raw mut *self.upstream, pool) }
            .inspect(|list| assert!(ptr::eq(list.cast(), self.upstream.peer.data)))
            .is_some()
    }
}

#[test]
fn nginxs_own_list_is_known() {
    for (primaries, backups) in [(&[1][..], &[][..]), (&[2, 1, 3], &[1]), (&[1], &[2, 2])] {
        let mut stage = Stage::new(primaries, backups);
        stage.make_list();
        assert!(stage.is_known(), "{primaries:?} {backups:?}");
    }
}

/// An empty list of backups is what some versions make.
#[test]
fn an_empty_list_of_backups_is_none() {
    let mut stage = Stage::new(&[2], &[]);
    let list = stage.make_list();
    let empty: *mut Peers = stage.allocate(1);
    // SAFETY: both are of the pool.
    unsafe {
        empty.write(zeroed());
        (*empty).name = &raw mut stage.upstream.host;
        (*list).next = empty;
    }
    assert!(stage.is_known());
}

#[test]
fn what_is_not_in_the_pool_is_not_read() {
    static ELSEWHERE: [u64; 64] = [u64::MAX; 64];
    let mut stage = Stage::new(&[1], &[]);
    let list = stage.make_list();
    let heap = Box::new([u64::MAX; 64]);
    let pool = stage.pool();
    // SAFETY: the pool's own bounds.
    let last = unsafe { (*pool).d.last };
    for data in [
        ptr::null_mut(),
        ptr::without_provenance_mut(1),
        ptr::without_provenance_mut(8),
        ptr::without_provenance_mut(usize::MAX & !7),
        ptr::from_ref(&ELSEWHERE).cast_mut().cast(),
        ptr::from_ref(&*heap).cast_mut().cast(),
        pool.cast(),
        // A smaller structure, the pool's last one.
        last.wrapping_sub(24).cast(),
        last.cast(),
        list.wrapping_byte_add(4).cast(),
    ] {
        stage.upstream.peer.data = data;
        assert!(!stage.is_known(), "{data:?}");
    }
}

#[test]
fn a_list_that_differs_anywhere_is_not_known() {
    type Change = fn(&mut Stage, *mut Peers);
    // SAFETY: the list is the stage's, and all of its pointers are live.
    let changes: [Change; 12] = unsafe {
        [
            |_, list| (*list).name = ptr::null_mut(),
            |_, list| (*list).number += 1,
            |_, list| (*list).number -= 1,
            |_, list| (*list).number = usize::MAX,
            |_, list| (*list).peer = ptr::null_mut(),
            |_, list| (*list).peer = (*(*list).peer).next,
            |_, list| (*list).peer = ptr::without_provenance_mut(8),
            |_, list| (*(*list).peer).next = ptr::null_mut(),
            |_, list| (*(*(*list).peer).next).next = (*list).peer,
            |_, list| (*(*list).peer).sockaddr = (*(*(*list).peer).next).sockaddr,
            |_, list| (*list).next = ptr::null_mut(),
            |_, list| (*list).next = list,
        ]
    };
    for (n, change) in changes.into_iter().enumerate() {
        let mut stage = Stage::new(&[1, 1], &[1]);
        let list = stage.make_list();
        assert!(stage.is_known());
        change(&mut stage, list);
        assert!(!stage.is_known(), "change {n}");
    }
    // A server came after the method has made its list.
    let mut stage = Stage::new(&[1, 1], &[]);
    stage.make_list();
    stage.array.nelts -= 1;
    assert!(!stage.is_known());
}

/// nginx allocates what is large by itself: so is a list of many servers.
#[test]
fn a_large_piece_is_known_by_its_size() {
    let mut stage = Stage::new(&[1], &[]);
    let list = stage.make_list();
    let mut large: Box<ngx_pool_large_t> = Box::new(zeroed());
    for (size, expected) in [(size_of::<Peers>() * 2, true), (24, false)] {
        // SAFETY: malloc's own pieces; the copy is as long as the piece at most.
        unsafe {
            let piece = libc::malloc(size);
            ptr::copy_nonoverlapping(list.cast::<u8>(), piece.cast(), size.min(size_of::<Peers>()));
            large.alloc = piece.cast();
            (*stage.pool()).large = &raw mut *large;
            stage.upstream.peer.data = piece.cast();
            assert_eq!(stage.is_known(), expected, "{size} bytes");
            libc::free(piece);
        }
    }
}

#[test]
fn a_shared_list_lies_in_its_zone_and_says_so() {
    let mut stage = Stage::new(&[1], &[]);
    let mut memory = vec![0_u128; 1024];
    let mut zone: Box<ngx_shm_zone_t> = Box::new(zeroed());
    (zone.shm.addr, zone.shm.size) = (memory.as_mut_ptr().cast(), 16 * memory.len());
    stage.upstream.shm_zone = &raw mut *zone;
    // SAFETY: inside of the memory.
    let list: *mut Peers = unsafe { memory.as_mut_ptr().add(100).cast() };
    let mut known = |data: *mut Peers| {
        stage.upstream.peer.data = data.cast();
        // SAFETY: the zone is live.
        unsafe { shared_list_of::<Upstream>(&raw mut *stage.upstream) }.is_some()
    };
    assert!(!known(list), "it names no pool");
    // SAFETY: as above.
    unsafe { (*list).shpool = memory.as_mut_ptr().cast::<ngx_slab_pool_t>() };
    assert!(known(list));
    let end = memory.as_mut_ptr_range().end;
    for data in
        [ptr::null_mut(), end.cast(), end.wrapping_byte_sub(16).cast(), list.wrapping_byte_add(4)]
    {
        assert!(!known(data), "{data:?}");
    }
}
