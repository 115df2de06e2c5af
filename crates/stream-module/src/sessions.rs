//! `consul_session_drop on;`: the sessions to an instance that left are closed within a second.
//!
//! Whoever edits the list marks a peer whose sessions are to end, behind the peer in shared memory, where
//! it stays as long as a session holds it. Each worker looks after its own sessions a few times a
//! second: where the list has changed, at the peers that they hold.

use core::ffi::c_void;
use core::ptr;
use core::sync::atomic::{AtomicPtr, Ordering, fence};
use std::sync::{Mutex, MutexGuard, PoisonError};

use consul_upstream::balance::config_of;
use consul_upstream::conf::argument::{flag, once};
use consul_upstream::conf::finish::server_conf;
use consul_upstream::conf::{Fault, Handler, ServerConf, command};
use consul_upstream::guard::guard;
use consul_upstream::{Peer, Protocol, log};
use nginx_peers::meter::Meter;
use nginx_peers::{PeersAbi, UpstreamAbi};
use nginx_sys::{
    NGX_CONF_TAKE1, NGX_LOG_NOTICE, ngx_add_timer, ngx_conf_t, ngx_connection_t, ngx_cycle,
    ngx_event_t, ngx_msec_t, ngx_post_event, ngx_posted_events, ngx_str_t, ngx_stream_session_t,
    ngx_stream_upstream_srv_conf_t, ngx_uint_t,
};

use crate::stream::ConsulUpstream;

/// How often a worker looks. Two looks, and what the sessions' end takes, are less than a second.
const LOOK: ngx_msec_t = 250;

/// `consul_session_drop on|off;`
pub const COMMAND: nginx_sys::ngx_command_t = command(
    c"consul_session_drop",
    ConsulUpstream::BLOCK | ConsulUpstream::UPSTREAM_BLOCK | NGX_CONF_TAKE1,
    ConsulUpstream::SERVER_OFFSET,
    &(directive as Handler),
);

/// # Safety
///
/// As nginx calls it: `conf` is a server configuration of ours.
unsafe fn directive(
    _: *mut ngx_conf_t,
    args: &[ngx_str_t],
    conf: *mut c_void,
) -> Result<(), Fault> {
    // SAFETY: this function's own contract; nobody else uses the configuration meanwhile.
    let conf = unsafe { &mut *conf.cast::<ServerConf<ConsulUpstream>>() };
    once(&mut conf.session_drop, flag(args)?)
}

/// A session's place among those that are looked after, if it has one.
#[derive(Clone, Copy, Default)]
pub struct Held(Option<usize>);

/// A session that holds a peer.
struct Session {
    session: *mut ngx_stream_session_t,
    upstream: *mut ngx_stream_upstream_srv_conf_t,
    peer: *mut Peer<ConsulUpstream>,
    /// The change of the list since when the peer was looked at; none if it never was.
    seen: Option<ngx_uint_t>,
}

/// The sessions of this process.
struct Sessions {
    places: Vec<Option<Session>>,
    free: Vec<usize>,
}

// SAFETY: only nginx's main thread has any.
unsafe impl Send for Sessions {}

static SESSIONS: Mutex<Sessions> = Mutex::new(Sessions { places: Vec::new(), free: Vec::new() });

/// Set while there are sessions; null in a process that has had none.
static TIMER: AtomicPtr<ngx_event_t> = AtomicPtr::new(ptr::null_mut());

fn sessions() -> MutexGuard<'static, Sessions> {
    SESSIONS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Looks after a session, if its upstream wants that.
///
/// # Safety
///
/// On nginx's main thread. The session holds the peer until [`remove`].
pub unsafe fn add(
    session: *mut ngx_stream_session_t,
    upstream: *mut ngx_stream_upstream_srv_conf_t,
    peer: *mut Peer<ConsulUpstream>,
    held: &mut Held,
) {
    // SAFETY: the upstream is that of a live session, and its configuration does not change.
    let drops = unsafe {
        server_conf::<ConsulUpstream>(upstream).is_some_and(|it| (*it).session_drop == Some(true))
    };
    if !drops {
        return;
    }
    let mut all = sessions();
    let place = all.free.pop().unwrap_or_else(|| {
        all.places.push(None);
        all.places.len() - 1
    });
    all.places[place] = Some(Session { session, upstream, peer, seen: None });
    held.0 = Some(place);
    drop(all);
    // SAFETY: the caller's promise.
    unsafe { look_later() };
}

/// A session lets its peer go.
pub fn remove(held: &mut Held) {
    if let Some(place) = held.0.take() {
        let mut all = sessions();
        all.places[place] = None;
        all.free.push(place);
    }
}

/// # Safety
///
/// On nginx's main thread.
unsafe fn look_later() {
    let mut timer = TIMER.load(Ordering::Relaxed);
    if timer.is_null() {
        // SAFETY: zero is valid for both. nginx's log of events reads the descriptor of a connection.
        let (mut event, mut connection) = unsafe {
            let event: Box<ngx_event_t> = Box::new(core::mem::zeroed());
            (event, Box::new(core::mem::zeroed::<ngx_connection_t>()))
        };
        connection.fd = -1;
        event.data = Box::into_raw(connection).cast();
        event.handler = Some(on_look);
        // A graceful exit does not wait for it, but for the sessions.
        event.set_cancelable(1);
        timer = Box::into_raw(event);
        TIMER.store(timer, Ordering::Relaxed);
    }
    // SAFETY: the event lives as long as the process; the cycle's log outlives the event's next time.
    unsafe {
        if (*timer).timer_set() == 0 {
            (*timer).log = (*ngx_cycle).log;
            ngx_add_timer(timer, LOOK);
        }
    }
}

/// # Safety
///
/// As nginx calls it.
unsafe extern "C" fn on_look(_: *mut ngx_event_t) {
    guard("looking after sessions", (), || {
        // SAFETY: nginx's main thread; sessions are in the list as long as they hold their peers.
        unsafe {
            let mut all = sessions();
            let mut ended: Vec<(*mut ngx_stream_upstream_srv_conf_t, usize)> = Vec::new();
            for held in all.places.iter_mut().flatten() {
                if !held.looks_ended() {
                    continue;
                }
                close(held.session);
                match ended.iter_mut().find(|(upstream, _)| *upstream == held.upstream) {
                    Some((_, count)) => *count += 1,
                    None => ended.push((held.upstream, 1)),
                }
            }
            let some = all.places.len() > all.free.len();
            drop(all);
            for (upstream, count) in ended {
                let name = *UpstreamAbi::host(upstream);
                let line = format_args!(
                    "consul: upstream \"{name}\": {count} sessions to servers that left are closed"
                );
                log::cycle(NGX_LOG_NOTICE, line);
            }
            if some {
                look_later();
            }
        }
    });
}

impl Session {
    /// Whether it is to be closed now.
    ///
    /// # Safety
    ///
    /// The session is live, and holds its peer.
    unsafe fn looks_ended(&mut self) -> bool {
        // SAFETY: the caller's promise; the list of a live session is in its zone.
        unsafe {
            let now = config_of::<ConsulUpstream>(self.upstream);
            if self.seen == Some(now) {
                return false;
            }
            // What was marked before the list changed is seen after it.
            fence(Ordering::Acquire);
            let pool = *PeersAbi::shpool(UpstreamAbi::peers(self.upstream));
            let ends = Meter::of(self.peer, (*pool).end).is_some_and(Meter::ends_sessions);
            // One that is about to connect may be passed to another server still: the next time.
            let connected = (*self.session).upstream.as_ref().is_some_and(|it| it.connected() != 0);
            if !ends {
                self.seen = Some(now);
            }
            ends && connected
        }
    }
}

/// Ends a session as nginx does when `worker_shutdown_timeout` is over; not within this call.
///
/// # Safety
///
/// `session` is live and proxied.
unsafe fn close(session: *mut ngx_stream_session_t) {
    // SAFETY: the caller's promise. The handler of the client's connection is that of the proxy,
    // which looks at the flag first; an event that is posted is forgotten with its connection.
    unsafe {
        let connection = (*session).connection;
        (*connection).set_close(1);
        ngx_post_event((*connection).read, &raw mut ngx_posted_events);
    }
}
