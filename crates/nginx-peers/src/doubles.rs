//! nginx's allocator and locks, for tests: a test binary has no nginx to link with.
//!
//! They check the rules that the edit of a list must keep: nothing is allocated or freed while a
//! list is locked, everything is freed once, locks are taken in order and given back.

use core::ffi::c_void;
use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::cell::{Cell, RefCell};
use std::collections::HashMap;

use nginx_sys::{ngx_atomic_t, ngx_shmtx_t, ngx_slab_pool_t, ngx_uint_t};

thread_local! {
    static LIVE: RefCell<HashMap<usize, usize>> = RefCell::default();
    static BUDGET: Cell<usize> = const { Cell::new(usize::MAX) };
    static LOCKED: RefCell<Vec<usize>> = const { RefCell::new(Vec::new()) };
    static MUTEX: Cell<bool> = const { Cell::new(false) };
    static DEAD: Cell<bool> = const { Cell::new(false) };
}

/// How many allocations are alive.
pub fn live() -> usize {
    LIVE.with_borrow(HashMap::len)
}

/// After this many allocations the zone is full.
pub fn set_budget(allocations: usize) {
    BUDGET.set(allocations);
}

/// Whether all locks were given back.
pub fn unlocked() -> bool {
    LOCKED.with_borrow(Vec::is_empty) && !MUTEX.get()
}

/// From now on the process is as one that was killed: its destructors change nothing.
pub fn die() {
    DEAD.set(true);
}

/// Another process takes its place. Returns the locks that the dead one has left.
pub fn revive() -> Vec<usize> {
    DEAD.set(false);
    MUTEX.set(false);
    LOCKED.take()
}

/// What such an edit has left in the zone is left there.
pub fn forget_allocations() {
    LIVE.with_borrow_mut(HashMap::clear);
}

fn layout(size: usize) -> Layout {
    // In a zone there is always something behind an allocation.
    Layout::from_size_align(size + 256, 16).unwrap()
}

#[unsafe(no_mangle)]
static mut ngx_pagesize: ngx_uint_t = 4096;

#[unsafe(no_mangle)]
extern "C" fn ngx_slab_calloc(_: *mut ngx_slab_pool_t, size: usize) -> *mut c_void {
    assert!(unlocked(), "allocates under a lock");
    let Some(left) = BUDGET.get().checked_sub(1) else { return core::ptr::null_mut() };
    BUDGET.set(left);
    // SAFETY: the layout's size is not 0.
    let at = unsafe { alloc_zeroed(layout(size)) };
    LIVE.with_borrow_mut(|live| live.insert(at.addr(), size));
    at.cast()
}

#[unsafe(no_mangle)]
extern "C" fn ngx_slab_alloc(pool: *mut ngx_slab_pool_t, size: usize) -> *mut c_void {
    ngx_slab_calloc(pool, size)
}

#[unsafe(no_mangle)]
extern "C" fn ngx_slab_free_locked(_: *mut ngx_slab_pool_t, at: *mut c_void) {
    if DEAD.get() {
        return;
    }
    assert!(MUTEX.get(), "frees without the mutex");
    assert!(LOCKED.with_borrow(Vec::is_empty), "frees under a list's lock");
    let size = LIVE.with_borrow_mut(|live| live.remove(&at.addr())).expect("freed once");
    // SAFETY: it was allocated above with this layout.
    unsafe { dealloc(at.cast(), layout(size)) };
}

#[unsafe(no_mangle)]
extern "C" fn ngx_shmtx_lock(_: *mut ngx_shmtx_t) {
    assert!(DEAD.get() || !MUTEX.replace(true));
}

#[unsafe(no_mangle)]
extern "C" fn ngx_shmtx_unlock(_: *mut ngx_shmtx_t) {
    assert!(DEAD.get() || MUTEX.replace(false));
}

#[unsafe(no_mangle)]
extern "C" fn ngx_rwlock_wlock(lock: *mut ngx_atomic_t) {
    LOCKED.with_borrow_mut(|locked| {
        assert!(!locked.contains(&lock.addr()), "locks twice");
        locked.push(lock.addr());
    });
}

#[unsafe(no_mangle)]
extern "C" fn ngx_rwlock_unlock(lock: *mut ngx_atomic_t) {
    // SAFETY: a live lock. Writers are noted below, readers count themselves.
    let readers = unsafe { &mut *lock };
    if *readers > 0 {
        *readers -= 1;
        return;
    }
    let last = LOCKED.with_borrow_mut(Vec::pop);
    assert_eq!(last, Some(lock.addr()), "unlocks in the reverse order");
}
