//! The one runtime on which everything runs that has to go on beside a test's own thread.

use std::io;
use std::sync::OnceLock;

use tokio::runtime::{Builder, Runtime};

/// Backends and load share it. Two threads are enough to keep an nginx busy, and leave it the
/// machine.
pub(crate) fn shared() -> &'static Runtime {
    static SHARED: OnceLock<Runtime> = OnceLock::new();
    SHARED.get_or_init(|| {
        Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("testbed")
            .enable_all()
            .build()
            .expect("a runtime for backends and load")
    })
}

/// A runtime that runs in the caller's thread only: no other thread has to be woken between an
/// answer's arrival and the caller, so times that are taken there are true.
pub(crate) fn own() -> io::Result<Runtime> {
    Builder::new_current_thread().enable_all().build()
}

/// Returns when the user presses Ctrl-C. Until the first call, Ctrl-C ends the process.
pub fn wait_for_ctrl_c() -> io::Result<()> {
    shared().block_on(tokio::signal::ctrl_c())
}
