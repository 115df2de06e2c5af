//! The profile `datacenters`.

use std::collections::BTreeSet;

use serde_json::Value;
use testbed::{eventually, http};

use crate::serves;
use crate::stack::{PATIENCE, Stack};

#[test]
fn the_other_datacenter_serves_while_this_one_has_nothing() {
    let Some(stack) = Stack::of_profile("datacenters") else { return };
    let other: BTreeSet<String> = ["web-dc2".to_owned()].into();
    stack.scale("web", 2);
    serves(stack.datacenters, &stack.names("web"));
    eventually(PATIENCE, "the status shows both", || {
        let answer = http::get(stack.datacenters, "/consul").map_err(|err| err.to_string())?;
        let status = answer.json();
        let peers = status["upstreams"]["web"]["peers"].as_array().cloned().unwrap_or_default();
        let backups = |wanted: bool| {
            peers.iter().filter(|peer| peer["backup"] == Value::Bool(wanted)).count()
        };
        if backups(false) == 2 && backups(true) == 1 { Ok(()) } else { Err(status.to_string()) }
    });
    stack.scale("web", 0);
    serves(stack.datacenters, &other);
    stack.scale("web", 1);
    serves(stack.datacenters, &stack.names("web"));
    // Its Consul is lost, and the last known instances go on.
    stack.container("consul-dc2").docker(&["kill"]);
    serves(stack.datacenters, &stack.names("web"));
    stack.scale("web", 0);
    serves(stack.datacenters, &other);
}
