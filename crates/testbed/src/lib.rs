//! Real nginx, real Consul, real backends and load, for the whole-system tests, the demo and the
//! benchmarks.
//!
//! A test reads like what an operator does:
//!
//! ```no_run
//! use testbed::{Backend, Consul, Dir, Load, Net, Nginx, Options, Service};
//!
//! let (net, dir) = (Net::isolated(), Dir::new("one_instance"));
//! let consul = Consul::start(&net, &dir);
//! let backend = Backend::start(&net, 20, "web-1");
//! consul.register(&Service::new("web", "web-1", backend.addr()));
//! let nginx = Nginx::builder(&net, &dir)
//!     .http(format!("consul_address {};", consul.url()))
//!     .http("upstream web { zone web 256k; consul_upstream web; }")
//!     .server("web")
//!     .start();
//! Load::run(nginx.addr(), 1_000, &Options::default()).assert_nothing_lost();
//! ```
//!
//! The API blocks; what has to run beside a test (backends, load) runs on one runtime of tokio.
//! Everything that waits waits for a condition, with a bound, and says what it waited for when
//! the bound is passed. Everything that was started ends with its value, and, whatever happens to
//! the process, with the process (see [`warden`]). Where a test fails, its directory stays and
//! the ends of the logs in it are printed (see [`Dir`]).

#![forbid(unsafe_code)]

pub mod backend;
pub mod consul;
mod dir;
pub mod dns;
pub mod docker;
mod eventually;
pub mod greeter;
pub mod http;
pub mod load;
mod net;
pub mod nginx;
pub mod paths;
mod processes;
pub mod relay;
mod runtime;
pub mod tls;
mod warden;

pub use backend::Backend;
pub use consul::{Check, Cluster, Consul, Instance, Service, Status};
pub use dir::Dir;
pub use dns::Dns;
pub use docker::Docker;
pub use eventually::{Attempt, eventually};
pub use greeter::{Datagrams, Greeted, Greeter};
pub use load::{Load, Options, Report};
pub use net::Net;
pub use nginx::Nginx;
pub use paths::Protocol;
pub use relay::Relay;
pub use runtime::wait_for_ctrl_c;
pub use rustix::process::Signal;
pub use tls::{Authority, Certificate};
pub use warden::Process;
