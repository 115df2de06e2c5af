//! Where records stand in the zone of the workers: written by the first worker, read by all.
//!
//! Each record has room for two of its kind. The writer fills the one that nobody reads and then
//! says so with one word: there is no lock, and a writer that is killed half way has changed
//! nothing that is read. A reader copies, and looks whether the word is the same still.

use core::sync::atomic::{AtomicU64, Ordering, fence};

use nginx_sys::{ngx_slab_alloc, ngx_slab_pool_t};

/// The room for a record whatever it tells, and for each source of an upstream. With the length in
/// front, two of them fill whole pages.
const BASE: usize = 12 * 1024 - size_of::<u64>();
const SOURCE: usize = 2 * 1024;

/// How often a reader tries.
const TRIES: usize = 3;

/// How many bytes a record of an upstream with so many sources may have.
pub fn room(sources: usize) -> usize {
    BASE + sources * SOURCE
}

/// How many bytes of the zone such a record takes.
pub fn size(room: usize) -> usize {
    2 * (1 + words(room)) * size_of::<u64>()
}

fn words(bytes: usize) -> usize {
    bytes.div_ceil(size_of::<u64>())
}

/// A record's place. Zeroed memory is one without a record.
#[repr(C)]
pub struct Place {
    /// Whose record it is: a hash of the name.
    name: AtomicU64,
    /// How often it was written. The last one stands in the first half if that is even.
    written: AtomicU64,
    /// Where the two halves are; each begins with the length of what is in it.
    at: AtomicU64,
    /// Bytes of a record at most.
    room: AtomicU64,
}

impl Place {
    /// Gives it memory. `false` when the zone has none.
    ///
    /// # Safety
    ///
    /// `pool` is the live allocator of a zone, and nobody else uses the place yet.
    pub unsafe fn make(&self, pool: *mut ngx_slab_pool_t, name: u64, room: usize) -> bool {
        // SAFETY: the caller's promise. The memory is not touched: what is not written is not read.
        let at = unsafe { ngx_slab_alloc(pool, size(room)) };
        self.name.store(name, Ordering::Relaxed);
        self.at.store(at.expose_provenance() as u64, Ordering::Relaxed);
        self.room.store(if at.is_null() { 0 } else { room as u64 }, Ordering::Relaxed);
        !at.is_null()
    }

    /// Whose it is.
    pub fn name(&self) -> u64 {
        self.name.load(Ordering::Relaxed)
    }

    /// How often it was written: another number is another record.
    pub fn written(&self) -> u64 {
        self.written.load(Ordering::Relaxed)
    }

    /// Bytes of a record at most.
    pub fn room(&self) -> usize {
        self.room.load(Ordering::Relaxed) as usize
    }

    /// The words of one half; none without memory.
    fn half(&self, number: u64) -> &[AtomicU64] {
        let room = self.room();
        if room == 0 {
            return &[];
        }
        let len = 1 + words(room);
        let at = self.at.load(Ordering::Relaxed) as usize;
        let at = core::ptr::with_exposed_provenance::<AtomicU64>(at);
        // SAFETY: `make` has allocated two halves of this length, aligned as the allocator does for
        // all that is larger than a word, for as long as the zone is there; and they are used as
        // atomic words by everybody.
        unsafe { core::slice::from_raw_parts(at.add(len * (number & 1) as usize), len) }
    }

    /// Writes a record. One process does so, and one thread of it.
    pub fn write(&self, record: &[u8]) {
        if record.len() > self.room() {
            return;
        }
        let number = self.written.load(Ordering::Relaxed).wrapping_add(1);
        // What is written now is not seen before the word that turned readers away from it.
        fence(Ordering::Release);
        if let Some((len, words)) = self.half(number).split_first() {
            len.store(record.len() as u64, Ordering::Relaxed);
            for (word, bytes) in words.iter().zip(record.chunks(size_of::<u64>())) {
                let mut all = [0; size_of::<u64>()];
                for (to, from) in all.iter_mut().zip(bytes) {
                    *to = *from;
                }
                word.store(u64::from_ne_bytes(all), Ordering::Relaxed);
            }
            self.written.store(number, Ordering::Release);
        }
    }

    /// Reads the record; none if there is none, or if it changed each time.
    pub fn read(&self) -> Option<Vec<u8>> {
        for _ in 0..TRIES {
            let number = self.written.load(Ordering::Acquire);
            if number == 0 {
                return None;
            }
            let (len, words) = self.half(number).split_first()?;
            let len = (len.load(Ordering::Relaxed) as usize).min(self.room());
            let words = words.iter().take(self::words(len));
            let mut bytes = Vec::with_capacity(len + size_of::<u64>());
            bytes.extend(words.flat_map(|word| word.load(Ordering::Relaxed).to_ne_bytes()));
            bytes.truncate(len);
            fence(Ordering::Acquire);
            if self.written.load(Ordering::Relaxed) == number {
                return Some(bytes);
            }
        }
        None
    }
}
