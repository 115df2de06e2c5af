//! Places where a test makes the module fail. In a build for use there are none.
//!
//! The package failpoints builds the same sources with the feature `failpoints`. A failpoint is
//! armed by a file of its name in the directory `failpoints` under nginx's prefix, whose content is
//! of no interest. One that strikes once takes the file away.

#[cfg(feature = "failpoints")]
pub use self::armed::*;
#[cfg(not(feature = "failpoints"))]
pub use self::none::*;

#[cfg(not(feature = "failpoints"))]
mod none {
    use nginx_peers::crash::Step;

    /// Finds out where the files are; on the main thread, before anything else here.
    #[inline(always)]
    pub fn init() {}

    /// Ends the process as SIGKILL does, once.
    #[inline(always)]
    pub fn kill(_step: Step) {}

    /// Panics, once.
    #[inline(always)]
    pub fn panic(_name: &str) {}

    /// Whether something is turned off as long as the file is there.
    #[inline(always)]
    pub fn is_off(_name: &str) -> bool {
        false
    }

    /// Whether requests are counted. It costs nothing to ask, so that what counting costs can be
    /// measured: the file was looked for when the process began.
    #[inline(always)]
    pub fn counts() -> bool {
        true
    }
}

#[cfg(feature = "failpoints")]
mod armed {
    use std::path::PathBuf;
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::{fs, process};

    use nginx_peers::crash::Step;
    use nginx_sys::ngx_cycle;

    static DIRECTORY: OnceLock<PathBuf> = OnceLock::new();
    static UNCOUNTED: AtomicBool = AtomicBool::new(false);

    pub fn init() {
        // SAFETY: there is a cycle in every process, and its prefix never changes.
        let prefix = unsafe { (*ngx_cycle).prefix.to_string() };
        let _ = DIRECTORY.set(PathBuf::from(prefix).join("failpoints"));
        UNCOUNTED.store(is_off("counting"), Ordering::Relaxed);
    }

    fn file(name: &str) -> Option<PathBuf> {
        Some(DIRECTORY.get()?.join(name))
    }

    fn strikes(name: &str) -> bool {
        file(name).is_some_and(|file| fs::remove_file(file).is_ok())
    }

    pub fn kill(step: Step) {
        if strikes(&format!("{step:?}")) {
            // SAFETY: the call has no preconditions; it does not return.
            unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
            process::abort();
        }
    }

    pub fn panic(name: &str) {
        if strikes(name) {
            panic!("failpoint {name}");
        }
    }

    pub fn is_off(name: &str) -> bool {
        file(name).is_some_and(|file| file.exists())
    }

    pub fn counts() -> bool {
        !UNCOUNTED.load(Ordering::Relaxed)
    }
}
