//! No panic crosses into nginx.

use std::panic::{AssertUnwindSafe, catch_unwind};

use nginx_sys::NGX_LOG_CRIT;

use crate::log;

/// Runs `f`; if it panics, logs one line and returns `otherwise`. What `f` was working at stays as
/// the panic left it, which is why lists are edited without anything that could panic.
pub fn guard<T>(what: &str, otherwise: T, f: impl FnOnce() -> T) -> T {
    catch_unwind(AssertUnwindSafe(f)).unwrap_or_else(|panic| {
        let text = text(&*panic);
        log::cycle(NGX_LOG_CRIT, format_args!("consul: {what} panicked: {text}"));
        otherwise
    })
}

/// What a panic said.
pub fn text(panic: &(dyn std::any::Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("without a message")
}
