//! Keeps the services of the local Consul agent equal to the containers of this host.
//!
//! ```text
//! docker ─▶ fleet ─▶ instance ─▶ converge ─▶ consul
//! events,   what     what it     what        HTTP
//! list,     runs     should be   differs
//! inspect            in Consul
//! ```
//!
//! `run` is the loop that holds them together. What is decided is decided in `fleet`, `instance`
//! and `converge`, which ask nobody.

#![forbid(unsafe_code)]

mod consul;
mod container;
mod converge;
mod docker;
mod fleet;
mod instance;
mod labels;
mod log;
mod options;
mod refusal;
mod registration;
mod run;
mod signal;

use std::io;
use std::process::{ExitCode, exit};

use tokio::runtime::Builder;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

use crate::log::{error, warning};
use crate::options::{Config, Options, environment};

/// What a crash ends with, as Rust's own.
const CRASHED: i32 = 101;

fn main() -> ExitCode {
    // A task that is gone would be missed by nobody: better to be started again as a whole.
    std::panic::set_hook(Box::new(|panic| {
        error!("a bug: {panic}");
        exit(CRASHED);
    }));
    let options = match Options::read(std::env::args_os()) {
        Ok(options) => options,
        Err(error) => error.exit(),
    };
    let started = options.config(environment).and_then(|config| {
        let address = docker::Address::from_env().map_err(|error| error.to_string())?;
        Ok((config, address))
    });
    let result = started.and_then(|(config, address)| {
        for text in &config.warnings {
            warning!("{text}");
        }
        let runtime = Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|error| error.to_string())?;
        let result = runtime.block_on(run_until_signalled(config, address));
        // A name server that is still being asked is not waited for.
        runtime.shutdown_background();
        result
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(text) => {
            error!("{text}");
            ExitCode::FAILURE
        }
    }
}

async fn run_until_signalled(config: Config, address: docker::Address) -> Result<(), String> {
    let stop = stop_signal().map_err(|error| error.to_string())?;
    run::run(config, address, stop).await.map_err(|error| error.to_string())
}

/// Says which signal came.
fn stop_signal() -> io::Result<oneshot::Receiver<&'static str>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let (sender, receiver) = oneshot::channel();
    tokio::spawn(async move {
        let why = tokio::select! {
            _ = terminate.recv() => "SIGTERM",
            _ = interrupt.recv() => "SIGINT",
        };
        let _ = sender.send(why);
    });
    Ok(receiver)
}
