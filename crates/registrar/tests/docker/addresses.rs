//! Which address and port an instance has.

use serde_json::{Value, json};

use crate::bed::{Bed, HOST, id};

fn place(service: &Value) -> (&str, u64) {
    (service["Address"].as_str().unwrap(), service["Port"].as_u64().unwrap())
}

/// The host's name resolves to a loopback address or to nothing: the address is the node's.
#[test]
fn the_nodes_address() {
    let Some(bed) = Bed::new("nodes_address") else { return };
    let registrar = bed.registrar(&["-hostname", "localhost"]);
    // On the host's network there is no binding whose address could be taken.
    let labels = ["--label=SERVICE_CHECK_TCP=true"];
    let web = bed.container("web", &[&["--network=host", "--expose=80"][..], &labels].concat());
    let service = bed.registered(&format!("localhost:{}:80", web.name()));
    assert_eq!(place(&service), ("", 80));
    registrar.says("the check goes to 127.0.0.1, as the address is the node's");
}

#[test]
fn the_hosts_network() {
    let Some(bed) = Bed::new("hosts_network") else { return };
    for options in [&["-ip", "192.0.2.1"][..], &["-ip", "192.0.2.1", "-internal"]] {
        let _registrar = bed.registrar(options);
        let web = bed.container("web", &["--network=host", "--expose=8123"]);
        let service = bed.registered(&id(&web, 8123));
        assert_eq!(place(&service), ("192.0.2.1", 8123), "{options:?}");
    }
}

/// What registrator without `-ip` got wrong in every Compose project.
#[test]
fn a_network_of_ones_own() {
    let Some(bed) = Bed::new("own_network") else { return };
    let network = bed.docker.network(&bed.docker.name("front"));
    let web = bed.container("web", &["--network", network.name(), "--publish=127.0.0.1::80"]);
    let mut outside = bed.registrar(&[]);
    let port = u64::from(web.port("80/tcp"));
    assert_eq!(place(&bed.registered(&id(&web, 80))), ("127.0.0.1", port));
    outside.kill();
    let _inside = bed.registrar(&["-internal"]);
    let ip = web.ip(network.name());
    bed.until(&id(&web, 80), "has its own address", |s| place(s) == (ip.as_str(), 80));
}

#[test]
fn several_bindings() {
    let Some(bed) = Bed::new("several_bindings") else { return };
    let _registrar = bed.registrar(&[]);
    let own = bed.net.ip(77).to_string();
    let publish = format!("--publish={own}::80");
    let web = bed.container("web", &["--publish=127.0.0.1::80", &publish]);
    let service = bed.registered(&id(&web, 80));
    // All are loopback addresses, so it is the first.
    let bindings = web.inspect()["NetworkSettings"]["Ports"]["80/tcp"].clone();
    let first = &bindings[0];
    assert_eq!(bindings.as_array().unwrap().len(), 2);
    assert_eq!(service["Address"], first["HostIp"]);
    assert_eq!(service["Port"].to_string(), first["HostPort"].as_str().unwrap());
}

#[test]
fn another_containers_network() {
    let Some(bed) = Bed::new("shared_network") else { return };
    let _registrar = bed.registrar(&["-internal"]);
    let target = bed.container("target", &["--expose=1"]);
    let image = expose(&bed, 80);
    let network = format!("--network=container:{}", target.name());
    let name = bed.docker.name("sidecar");
    let sidecar = bed.docker.run_image(&name, &[&network], &image, "sleep 1000");
    let ip = target.ip("bridge");
    assert_eq!(place(&bed.registered(&id(&sidecar, 80))), (ip.as_str(), 80));
    target.docker(&["stop", "--time=1"]);
    bed.gone(&id(&sidecar, 80));
}

#[test]
fn another_containers_bindings() {
    let Some(bed) = Bed::new("shared_bindings") else { return };
    let _registrar = bed.registrar(&[]);
    let target = bed.container("target", &["--publish=127.0.0.1::80"]);
    let image = expose(&bed, 80);
    let network = format!("--network=container:{}", target.name());
    let name = bed.docker.name("sidecar");
    let sidecar = bed.docker.run_image(&name, &[&network], &image, "sleep 1000");
    let port = u64::from(target.port("80/tcp"));
    assert_eq!(place(&bed.registered(&id(&sidecar, 80))), ("127.0.0.1", port));
}

/// An image that exposes a port, which no option can on somebody else's network.
fn expose(bed: &Bed, port: u16) -> String {
    bed.docker.commit(&["--change", &format!("EXPOSE {port}")])
}

#[test]
fn no_address_yet() {
    let Some(bed) = Bed::new("no_address") else { return };
    let registrar = bed.registrar(&["-internal"]);
    let network = bed.docker.network(&bed.docker.name("late"));
    let web = bed.container("web", &["--network=none", "--expose=80"]);
    registrar.says(&format!("{}: port 80/tcp is not registered", web.name()));
    assert!(bed.service(&id(&web, 80)).is_none());
    drop(web);
    let web = bed.container("web", &["--expose=80"]);
    bed.registered(&id(&web, 80));
    web.disconnect("bridge");
    bed.gone(&id(&web, 80));
    web.connect(network.name());
    let ip = web.ip(network.name());
    assert_eq!(place(&bed.registered(&id(&web, 80))), (ip.as_str(), 80));
}

#[test]
fn the_same_id_twice() {
    let Some(bed) = Bed::new("same_id") else { return };
    let registrar = bed.registrar(&[]);
    let label = format!("SERVICE_ID={HOST}-shared");
    let shared = format!("{HOST}-shared");
    let old = bed.labelled(&[&label]);
    bed.until(&shared, "is the older's", |s| s["Meta"]["registrar_container"] == old.id());
    let young = bed.labelled(&[&label]);
    registrar.says(&format!("{}: the ID \"{shared}\" is that of", young.name()));
    bed.settled();
    assert_eq!(bed.service(&shared).unwrap()["Meta"]["registrar_container"], json!(old.id()));
    drop(old);
    bed.until(&shared, "is the younger's", |s| s["Meta"]["registrar_container"] == young.id());
}
