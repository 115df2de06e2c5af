//! Headers that a balancing method adds to the response while it chooses, as `sticky cookie` does.
//!
//! A method remembers its header in memory of its own, to write the next choice into the same one. A restart of the
//! choice makes the method forget: its next header would stand beside the first, which names a server that failed.

use core::ptr;

use nginx_sys::{ngx_http_request_t, ngx_list_part_t, ngx_table_elt_t};

/// How many headers are remembered. nginx's own methods add one.
const MOST: usize = 4;

/// The headers that a method has added for one request since its last restart.
#[derive(Clone, Copy)]
pub struct Added {
    headers: [*mut ngx_table_elt_t; MOST],
    number: usize,
}

impl Default for Added {
    fn default() -> Self {
        Added { headers: [ptr::null_mut(); MOST], number: 0 }
    }
}

/// The end of a request's list of headers.
///
/// # Safety
///
/// `request` is live.
unsafe fn end(request: *mut ngx_http_request_t) -> (*mut ngx_list_part_t, usize) {
    // SAFETY: nginx makes the list with the request; its last part is one of its own.
    unsafe {
        let last = (*request).headers_out.headers.last;
        (last, (*last).nelts)
    }
}

impl Added {
    /// Calls `choose`, and remembers the headers that it adds.
    ///
    /// # Safety
    ///
    /// `request` is live, and so it is after `choose`.
    pub unsafe fn by<R>(
        &mut self,
        request: *mut ngx_http_request_t,
        choose: impl FnOnce() -> R,
    ) -> R {
        // SAFETY: the caller's promise.
        let before = unsafe { end(request) };
        let result = choose();
        // SAFETY: as above.
        if before != unsafe { end(request) } {
            // SAFETY: as above; headers are only ever added at the list's end, so what it was is still part of it.
            unsafe { self.remember(before) };
        }
        result
    }

    /// # Safety
    ///
    /// `part` and `from` are a former [`end`] of a live request's list.
    #[cold]
    unsafe fn remember(&mut self, (mut part, mut from): (*mut ngx_list_part_t, usize)) {
        while !part.is_null() {
            // SAFETY: the list is nginx's own: of each part `nelts` elements are filled in.
            unsafe {
                let elements: *mut ngx_table_elt_t = (*part).elts.cast();
                for n in from..(*part).nelts {
                    if let Some(place) = self.headers.get_mut(self.number) {
                        *place = elements.add(n);
                        self.number += 1;
                    }
                }
                (part, from) = ((*part).next, 0);
            }
        }
    }

    /// Takes the headers out of the response, and forgets them.
    ///
    /// # Safety
    ///
    /// `request` is that of [`Added::by`].
    pub unsafe fn take_out(&mut self, request: *mut ngx_http_request_t) {
        for header in self.headers[..core::mem::take(&mut self.number)].iter().rev() {
            // SAFETY: the header is an element of the request's list, and nobody reads the list meanwhile.
            unsafe {
                let list = &raw mut (*request).headers_out.headers;
                let last = (*list).last;
                let elements: *mut ngx_table_elt_t = (*last).elts.cast();
                let is_last =
                    (*last).nelts > 0 && ptr::eq(*header, elements.add((*last).nelts - 1));
                // A part behind the first is never empty: who walks a list relies on that.
                let may_be_empty = ptr::eq(last, &raw const (*list).part);
                if is_last && ((*last).nelts > 1 || may_be_empty) {
                    (*last).nelts -= 1;
                } else {
                    // nginx's own mark of a header that is not to be sent.
                    (**header).hash = 0;
                }
            }
        }
    }
}
