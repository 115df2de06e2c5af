//! Sends an answer, as fast as the client reads and no faster: one piece of it is in memory at a
//! time.

use core::ffi::c_void;
use core::ptr;
use core::sync::atomic::{AtomicUsize, Ordering};

use consul_status::Answer;
use consul_upstream::guard::guard;
use nginx_peers::http;
use nginx_sys::{
    NGX_DONE, NGX_ERROR, NGX_HTTP_REQUEST_TIME_OUT, NGX_OK, ngx_buf_t, ngx_chain_t,
    ngx_handle_write_event, ngx_http_finalize_request, ngx_http_output_filter, ngx_http_request_t,
    ngx_http_send_header, ngx_int_t, ngx_pcalloc, ngx_pool_cleanup_add,
};

use super::rows::Peers;
use super::{ERROR, OK, location_of};

/// How many large answers a worker gives at a time.
const LARGE: usize = 4;

static TAKEN: AtomicUsize = AtomicUsize::new(0);

/// A large answer's place among those that a worker gives at a time.
pub struct Place(());

impl Place {
    /// Takes one, if there is one.
    pub fn take() -> Option<Self> {
        let more = |taken| (taken < LARGE).then_some(taken + 1);
        TAKEN.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).ok().map(|_| Self(()))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        TAKEN.fetch_sub(1, Ordering::Relaxed);
    }
}

/// An answer on its way.
pub struct Sending {
    answer: Answer<Peers>,
    _place: Option<Place>,
    /// The piece that is being sent. It is not touched before nginx has done with it.
    piece: Vec<u8>,
    /// nginx's view of it, in the request's pool.
    buf: *mut ngx_buf_t,
    /// There are pieces behind it.
    more: bool,
}

impl Sending {
    pub fn new(answer: Answer<Peers>, place: Option<Place>) -> Self {
        Self { answer, _place: place, piece: Vec::new(), buf: ptr::null_mut(), more: true }
    }

    /// Makes the next piece.
    fn next(&mut self) {
        self.piece.clear();
        self.more = self.answer.fill(&mut self.piece);
    }

    /// Whether nginx has done with the piece.
    ///
    /// # Safety
    ///
    /// The request is live.
    unsafe fn is_sent(&self) -> bool {
        // SAFETY: the buffer is in the request's pool.
        self.buf.is_null() || unsafe { (*self.buf).pos == (*self.buf).last }
    }
}

/// # Safety
///
/// As nginx calls it at the end of a request: `data` is what [`start`] has made of a box.
unsafe extern "C" fn forget(data: *mut c_void) {
    guard("the end of an answer", (), || {
        // SAFETY: this function's own contract; nothing of the request is used after that.
        drop(unsafe { Box::from_raw(data.cast::<Sending>()) });
    });
}

/// Sends a body that is whole, in the request's pool.
///
/// # Safety
///
/// `r` is a request whose headers are set but for the length; the body lives as long as it does.
pub unsafe fn whole(r: *mut ngx_http_request_t, body: *mut u8, len: usize) -> ngx_int_t {
    // SAFETY: the caller's promise.
    unsafe {
        (*r).headers_out.content_length_n = len as _;
        let rc = ngx_http_send_header(r);
        if rc == ERROR || rc > OK || http::is_header_only(r) != 0 {
            return rc;
        }
        let buf: *mut ngx_buf_t = ngx_pcalloc((*r).pool, size_of::<ngx_buf_t>()).cast();
        if buf.is_null() {
            return ERROR;
        }
        output(r, buf, body, len, true)
    }
}

/// Gives a piece to nginx.
///
/// # Safety
///
/// `r` is live and its header is sent; the piece lives until it is sent, and so does `buf`.
unsafe fn output(
    r: *mut ngx_http_request_t,
    buf: *mut ngx_buf_t,
    piece: *mut u8,
    len: usize,
    last: bool,
) -> ngx_int_t {
    // SAFETY: the caller's promise; zero is valid for a buffer.
    unsafe {
        buf.write(core::mem::zeroed());
        (*buf).start = piece;
        (*buf).pos = piece;
        (*buf).last = piece.add(len);
        (*buf).end = (*buf).last;
        (*buf).set_memory(u32::from(len > 0));
        (*buf).set_last_buf(u32::from(last && ptr::eq(r, (*r).main)));
        (*buf).set_last_in_chain(u32::from(last));
        let mut chain = ngx_chain_t { buf, next: ptr::null_mut() };
        ngx_http_output_filter(r, &mut chain)
    }
}

/// Sends the header and as much of the answer as the client takes; the rest when it takes more.
///
/// # Safety
///
/// `r` is a request whose headers are set but for the length.
pub unsafe fn start(r: *mut ngx_http_request_t, mut sending: Box<Sending>) -> ngx_int_t {
    // SAFETY: the caller's promise. The box is the pool's from the moment that its cleanup knows
    // it, and stays where it is until the request ends.
    unsafe {
        let is_main = ptr::eq(r, (*r).main);
        sending.next();
        if !is_main {
            // Whoever includes the answer waits for all of it anyway.
            while sending.more {
                let mut all = core::mem::take(&mut sending.piece);
                sending.next();
                all.append(&mut sending.piece);
                sending.piece = all;
            }
        }
        let cleanup = ngx_pool_cleanup_add((*r).pool, 0);
        let buf: *mut ngx_buf_t = ngx_pcalloc((*r).pool, size_of::<ngx_buf_t>()).cast();
        if cleanup.is_null() || buf.is_null() {
            return ERROR;
        }
        sending.buf = buf;
        let sending = Box::into_raw(sending);
        (*cleanup).data = sending.cast();
        (*cleanup).handler = Some(forget);

        let (piece, len) = ((*sending).piece.as_mut_ptr(), (*sending).piece.len());
        if !(*sending).more {
            return whole(r, piece, len);
        }
        let rc = ngx_http_send_header(r);
        if rc == ERROR || rc > OK || http::is_header_only(r) != 0 {
            return rc;
        }
        (*r).write_event_handler = Some(go_on);
        // The write event needs to find it; nothing else of ours is in the context.
        set_context(r, sending);
        // Given back by the call that finalizes it.
        http::hold(r);
        let rc = output(r, buf, piece, len, false);
        proceed(r, sending, rc);
        NGX_DONE as ngx_int_t
    }
}

/// # Safety
///
/// `r` is live.
unsafe fn set_context(r: *mut ngx_http_request_t, sending: *mut Sending) {
    use ngx::http::HttpModule;
    // SAFETY: every request has a place for each module's context.
    unsafe { *(*r).ctx.add(crate::http::ConsulUpstream::module().ctx_index) = sending.cast() };
}

/// # Safety
///
/// As nginx calls it: a request that [`start`] has begun to answer.
unsafe extern "C" fn go_on(r: *mut ngx_http_request_t) {
    let done = guard("an answer", false, || {
        use ngx::http::HttpModule;
        // SAFETY: this function's own contract.
        unsafe {
            let sending = *(*r).ctx.add(crate::http::ConsulUpstream::module().ctx_index);
            let sending: *mut Sending = sending.cast();
            let connection = (*r).connection;
            if sending.is_null() {
                return false;
            }
            if (*(*connection).write).timedout() != 0 {
                (*connection).set_timedout(1);
                ngx_http_finalize_request(r, NGX_HTTP_REQUEST_TIME_OUT as ngx_int_t);
                return true;
            }
            // What waits goes first.
            let rc = ngx_http_output_filter(r, ptr::null_mut());
            proceed(r, sending, rc);
            true
        }
    });
    if !done {
        // SAFETY: this function's own contract; a panic has not ended the request.
        unsafe { ngx_http_finalize_request(r, NGX_ERROR as ngx_int_t) };
    }
}

/// Sends piece after piece, until the client takes no more or the answer ends. The request may be
/// gone after that.
///
/// # Safety
///
/// As [`go_on`]; `rc` is what nginx said of the last piece.
unsafe fn proceed(r: *mut ngx_http_request_t, sending: *mut Sending, mut rc: ngx_int_t) {
    // SAFETY: the caller's promise; the request is not touched after it was finalized.
    unsafe {
        loop {
            if rc == ERROR || !(*sending).more && (*sending).is_sent() {
                ngx_http_finalize_request(r, if rc == ERROR { ERROR } else { NGX_OK as _ });
                return;
            }
            if !(*sending).is_sent() {
                if !(*sending).more {
                    // nginx knows how to send what it has.
                    ngx_http_finalize_request(r, rc);
                    return;
                }
                let write = (*(*r).connection).write;
                let location = location_of(r);
                if (*write).delayed() == 0 {
                    nginx_sys::ngx_add_timer(write, (*location).send_timeout);
                }
                if ngx_handle_write_event(write, (*location).send_lowat) != OK {
                    ngx_http_finalize_request(r, ERROR);
                }
                return;
            }
            let write = (*(*r).connection).write;
            if (*write).timer_set() != 0 && (*write).delayed() == 0 {
                nginx_sys::ngx_del_timer(write);
            }
            (*sending).next();
            let (piece, len) = ((*sending).piece.as_mut_ptr(), (*sending).piece.len());
            rc = output(r, (*sending).buf, piece, len, !(*sending).more);
            if !(*sending).more {
                ngx_http_finalize_request(r, rc);
                return;
            }
        }
    }
}
