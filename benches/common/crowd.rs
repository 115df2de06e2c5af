//! Very many instances that one backend answers for.

use std::net::{Ipv4Addr, SocketAddr};

use serde_json::Value;
use testbed::Backend;

use crate::fake_consul::entry;

/// One backend that answers on all addresses of the machine.
pub fn backend() -> Backend {
    Backend::bind(([0, 0, 0, 0], 0).into(), "crowd").expect("a backend")
}

/// So many addresses of it.
pub fn addresses(backend: &Backend, number: usize) -> impl Iterator<Item = SocketAddr> {
    let first = u32::from(Ipv4Addr::new(127, 200, 0, 1));
    let port = backend.addr().port();
    (0..number as u32).map(move |n| (Ipv4Addr::from(first + n), port).into())
}

/// What Consul says of an instance at each of them.
pub fn entries(backend: &Backend, number: usize) -> Vec<Value> {
    let all = (0..).zip(addresses(backend, number));
    all.map(|(n, addr): (usize, _)| entry(&format!("web-{n:05}"), addr)).collect()
}
