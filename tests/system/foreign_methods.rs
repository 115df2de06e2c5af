//! Balancing methods that are none of nginx's: one that keeps something else where nginx's keep their list of peers is refused
//! by a sentence, and a method around one of nginx's works.

use testbed::{Dir, Net, Nginx, Protocol, nginx, paths};

use crate::common::{Serve, Stage, serves};

/// The values other than nginx's own list that the method of crates/foreign-method can keep.
const KEEPS: [&str; 7] = ["wrapped", "structure", "large", "heap", "static", "number", "nothing"];

/// The other lines of the upstream: none, servers, or a method of nginx's for the foreign one to wrap.
const BESIDE: [&str; 4] = [
    "",
    "server 127.0.0.1:1;",
    "server 127.0.0.1:1 weight=2; server 127.0.0.1:2; server 127.0.0.1:3 backup;",
    "least_conn; server 127.0.0.1:1;",
];

/// An nginx with the method.
fn with_method(conf: nginx::Builder) -> nginx::Builder {
    let path = paths::foreign_method().unwrap_or_else(|error| panic!("{error}"));
    conf.main(format!("load_module {};", path.display()))
}

fn refused_in(of: Protocol) {
    let (net, dir) = (Net::isolated(), Dir::new(&format!("foreign_{}", of.block())));
    for keeps in KEEPS {
        for beside in BESIDE {
            let method = format!("foreign_method {keeps};");
            for lines in [
                format!("{beside} {method} consul_upstream web;"),
                format!("{beside} consul_upstream web; {method}"),
                format!("consul_upstream web; {method} {}", beside.replace("least_conn; ", "")),
            ] {
                let upstream = format!("upstream web {{ zone web 256k; {lines} }}");
                // The method's file has modules of both protocols, of which that of stream needs nginx's.
                let conf =
                    Nginx::builder(&net, &dir).stream("upstream any { server 127.0.0.1:1; }");
                let test = with_method(conf.block(of, upstream)).config_test();
                let says = "[emerg] \"consul_upstream\" does not know the balancing method in upstream \"web\"";
                assert!(!test.ok && test.output.contains(says), "{lines}\n{}", test.output);
            }
        }
    }
}

#[test]
fn a_method_with_a_list_of_its_own_is_refused_in_http() {
    refused_in(Protocol::Http);
}

#[test]
fn a_method_with_a_list_of_its_own_is_refused_in_stream() {
    refused_in(Protocol::Stream);
}

/// The data of a zone is read as nginx's configuration of upstreams, so the zone has to be nginx's, too.
#[test]
fn a_method_with_a_zone_of_its_own_is_refused() {
    let (net, dir) = (Net::isolated(), Dir::new("foreign_zone"));
    for of in [Protocol::Http, Protocol::Stream] {
        let conf = Nginx::builder(&net, &dir).stream("upstream any { server 127.0.0.1:1; }");
        let upstream = "upstream web { consul_upstream web; foreign_method zone; }";
        let test = with_method(conf.block(of, upstream)).config_test();
        let says = "[emerg] \"consul_upstream\" requires nginx's own \"zone\" in upstream \"web\"";
        assert!(!test.ok && test.output.contains(says), "{}", test.output);
    }
}

/// A reload with such a configuration is refused as a mistake is: nginx goes on with the one that it has.
#[test]
fn a_reload_with_such_a_method_changes_nothing() {
    let stage = Stage::set("foreign_reload");
    let [one, two] = stage.web();
    stage.register([&one, &two]);
    let conf = with_method(stage.nginx().stream("upstream any { server 127.0.0.1:1; }"));
    let mut nginx = conf.upstream("web", "consul_upstream web;").start();
    serves(nginx.addr(), &["web-1", "web-2"]);
    for keeps in KEEPS {
        let bad = format!(
            "upstream bad {{ zone bad 256k; foreign_method {keeps}; server 127.0.0.1:1; \
             consul_upstream web; }}"
        );
        nginx.configure(|conf| {
            let lines = conf.clear_http().http(format!("consul_address {};", stage.consul.url()));
            lines.http(bad)
        });
        let refusal = nginx.try_reload().expect_err("it is refused");
        let says = "does not know the balancing method in upstream \"bad\"";
        assert!(refusal.contains(says), "{keeps}: {refusal}");
    }
    serves(nginx.addr(), &["web-1", "web-2"]);
    stage.consul.deregister("web-1");
    serves(nginx.addr(), &["web-2"]);
}

/// A method that leaves nginx's list where it is may stand around nginx's methods.
#[test]
fn a_method_around_one_of_nginxs_works() {
    let stage = Stage::set("foreign_around");
    let [one, two] = stage.web();
    stage.register([&one]);
    let conf = with_method(stage.nginx().stream("upstream any { server 127.0.0.1:1; }"));
    let mut nginx = conf
        .upstream("web", "consul_upstream web hold=0; foreign_method list;")
        .upstream("least", "least_conn; foreign_method list; consul_upstream web hold=0;")
        .start();
    for addr in nginx.addrs() {
        serves(*addr, &["web-1"]);
    }
    stage.register([&two]);
    stage.consul.deregister("web-1");
    for addr in nginx.addrs() {
        serves(*addr, &["web-2"]);
    }
    nginx.reload();
    for addr in nginx.addrs() {
        serves(*addr, &["web-2"]);
    }
}
