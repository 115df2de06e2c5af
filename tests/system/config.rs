//! The configuration: what `nginx -t` refuses, and with which words; what it takes; and the examples
//! of nginx-conf.

use std::fmt::Write;
use std::path::Path;

use testbed::{Backend, Dir, Net, Nginx, Service, http, nginx};

use crate::common::{Instance, PATIENCE, RETRIED, Serve, Stage, serves, serves_now, shares, watch};

/// Marks the line at fault.
const HERE: &str = "# here";

/// An upstream with a zone and this line.
fn upstream(line: &str) -> String {
    format!("upstream web {{\nzone web 256k;\n{line} {HERE}\n}}")
}

/// For one test: configurations that nginx has to refuse, and those that it must not.
struct Bench {
    net: Net,
    dir: Dir,
}

impl Bench {
    fn new(name: &str) -> Bench {
        Bench { net: Net::isolated(), dir: Dir::new(name) }
    }

    fn test(&self, http: &str) -> (String, nginx::ConfigTest) {
        let conf = Nginx::builder(&self.net, &self.dir).http(http);
        (conf.conf(), conf.config_test())
    }

    /// nginx refuses it with these words, and names the line that is marked.
    #[track_caller]
    fn refused(&self, http: &str, says: &str) {
        let (conf, test) = self.test(http);
        let line = 1 + conf.lines().position(|line| line.contains(HERE)).expect("a line is marked");
        let file = self.dir.join("nginx/test.conf");
        let expected = format!("[emerg] {says} in {}:{line}\n", file.display());
        assert!(
            !test.ok && test.output.contains(&expected),
            "{http}\nis refused with\n{}but expected is\n{expected}",
            test.output
        );
    }

    #[track_caller]
    fn taken(&self, http: &str) {
        let (_, test) = self.test(http);
        assert!(test.ok, "{http}\nis refused with\n{}", test.output);
        assert!(!test.output.contains("[warn]"), "{http}: {}", test.output);
    }
}

#[test]
fn mistakes_in_the_parameters_of_a_source() {
    let bench = Bench::new("config_parameters");
    for parameter in [
        "foo",
        "foo=1",
        "=",
        "guard=50",
        "hold=soon",
        "panic=many",
        "filter=x",
        "slow_start=10s",
        "resolve",
        "service=web",
        "down",
        "backup=1",
        "tag",
        "tag=",
        "dc=",
        "health=",
        "health=good",
        "health=Passing",
        "weight=",
        "weight=0",
        "weight=-1",
        "weight=x",
        "weight=1.5",
        "weight=99999999999999999999",
        "max_fails=-1",
        "max_fails=x",
        "max_conns=-1",
        "max_conns=many",
        "fail_timeout=abc",
        "fail_timeout=",
        "fail_timeout=-1s",
    ] {
        let line = format!("consul_upstream web {parameter};");
        bench.refused(&upstream(&line), &format!("invalid parameter \"{parameter}\""));
    }
    for (twice, named) in [
        ("weight=1 weight=2", "weight=2"),
        ("health=any tag=a health=any", "health=any"),
        ("dc=a dc=b", "dc=b"),
        ("backup backup", "backup"),
        ("fail_timeout=1s max_fails=1 fail_timeout=1s", "fail_timeout=1s"),
    ] {
        let line = format!("consul_upstream web {twice};");
        bench.refused(&upstream(&line), &format!("duplicate parameter \"{named}\""));
    }
}

#[test]
fn mistakes_in_the_name_of_a_service() {
    let bench = Bench::new("config_service");
    let line = |name: &str| upstream(&format!("consul_upstream {name};"));
    bench.refused(&line(""), "invalid number of arguments in \"consul_upstream\" directive");
    bench.refused(&line("''"), "service \"\" is empty");
    for name in ["$web", "web-$host", "\"my $web\""] {
        let bare = name.trim_matches('"');
        bench.refused(
            &line(name),
            &format!("service \"{bare}\" holds \"$\", variables are not supported"),
        );
    }
    // nginx reads \n in quotes as a newline; one that is written as it is counts as a line.
    bench.refused(&line(r#""we\nb""#), r#"service "we\nb" holds a control character"#);
    bench.refused(&line("\"we\nb\""), r#"service "we\nb" holds a control character"#);
    bench.refused(&line(".."), "service \"..\" cannot be asked for");
    bench.refused(&line(r#"web "tag=a\nb""#), r#"invalid parameter "tag=a\nb""#);
}

#[test]
fn a_service_name_of_a_megabyte() {
    let bench = Bench::new("config_megabyte");
    let name = "x".repeat(1 << 20);
    let (_, test) =
        bench.test(&format!("upstream web {{ zone web 64k; consul_upstream {name}; }}"));
    assert!(!test.ok && test.output.contains("too long parameter"), "{}", test.output);
    assert!(test.output.len() < 4096, "{} bytes of it are repeated", test.output.len());
    // As long as nginx reads: it is asked for, and nobody has it.
    let long = "x".repeat(4000);
    bench.taken(&upstream(&format!("consul_upstream {long};")));
}

#[test]
fn mistakes_in_an_upstream() {
    let bench = Bench::new("config_upstream");
    let at = |text: &str| format!("{text} in upstream \"web\"");
    bench.refused(
        &format!("upstream web {{\nconsul_upstream web; {HERE}\n}}"),
        &at("\"consul_upstream\" requires \"zone\""),
    );
    bench.refused(
        &format!(
            "resolver 127.0.0.1;\n{}",
            upstream("server localhost:80 resolve; consul_upstream web;")
        ),
        &at("\"consul_upstream\" and the \"resolve\" parameter of \"server\" cannot be used together"),
    );
    for method in ["hash $uri;", "hash $uri consistent;", "ip_hash;", "random;", "random two;"] {
        for lines in [
            format!("{method} consul_upstream web backup;"),
            format!("consul_upstream web backup; {method}"),
        ] {
            bench.refused(
                &upstream(&lines),
                &at("balancing method does not support parameter \"backup\""),
            );
        }
    }
    for lines in [
        "consul_upstream web; consul_upstream web;",
        "consul_upstream web tag=a tag=b; consul_upstream web tag=b tag=a;",
        "consul_upstream web weight=1; consul_upstream web weight=2;",
        "consul_upstream web dc=x; consul_upstream web dc=x backup;",
    ] {
        bench.refused(&upstream(lines), "duplicate query for service \"web\"");
    }
}

#[test]
fn mistakes_in_the_settings() {
    let bench = Bench::new("config_settings");
    let refused = |directive: &str, says: &str| {
        let directive = format!("{directive} {HERE}\n");
        bench.refused(&directive, says);
        // The same in an upstream.
        let own = format!("upstream web {{ zone web 64k; consul_upstream web;\n{directive}}}");
        bench.refused(&own, says);
    };
    for (address, why) in [
        ("127.0.0.1:8500", "has no scheme, it must begin with \"http://\""),
        ("localhost", "has no scheme, it must begin with \"http://\""),
        (
            "https://127.0.0.1:8501",
            "has a scheme that is not supported, it must begin with \"http://\"",
        ),
        (
            "unix:///run/consul.sock",
            "has a scheme that is not supported, it must begin with \"http://\"",
        ),
        ("http://127.0.0.1:8500/v1", "must not have a path, a query or a fragment"),
        ("http://127.0.0.1:99999", "is not a valid URL"),
        ("http://", "is not a valid URL"),
    ] {
        refused(&format!("consul_address {address};"), &format!("address \"{address}\" {why}"));
    }

    for wait in ["0", "999ms", "301s", "6m", "-1s", "soon"] {
        refused(
            &format!("consul_wait {wait};"),
            &format!(
                "\"consul_wait\" directive invalid value \"{wait}\", it must be from 1s to 5m"
            ),
        );
    }
    for (directive, value) in [
        ("consul_timeout", "0"),
        ("consul_timeout", "soon"),
        ("consul_max_response", "0"),
        ("consul_max_response", "-1"),
        ("consul_max_response", "many"),
    ] {
        let says = format!("\"{directive}\" directive invalid value \"{value}\"");
        refused(&format!("{directive} {value};"), &says);
    }
    bench.refused(
        &format!("consul_start_timeout soon; {HERE}\n"),
        "\"consul_start_timeout\" directive invalid value \"soon\"",
    );

    for directive in [
        "consul_address http://127.0.0.1:8500;",
        "consul_wait 25s;",
        "consul_timeout 5s;",
        "consul_max_response 64m;",
    ] {
        let (name, _) = directive.split_once(' ').expect("a name and a value");
        let says = format!("\"{name}\" directive is duplicate");
        refused(&format!("{directive} {directive}"), &says);
    }
    bench.refused(
        &format!("consul_start_timeout 1s; consul_start_timeout 1s; {HERE}\n"),
        "\"consul_start_timeout\" directive is duplicate",
    );
    for directive in [
        "consul_address",
        "consul_token",
        "consul_token_file",
        "consul_wait",
        "consul_timeout",
        "consul_max_response",
    ] {
        refused(
            &format!("{directive};"),
            &format!("invalid number of arguments in \"{directive}\" directive"),
        );
        refused(
            &format!("{directive} a b;"),
            &format!("invalid number of arguments in \"{directive}\" directive"),
        );
    }
}

/// Whoever reads what `nginx -t` says, or the log after a reload, need not be one who may know it.
const SECRET: &str = "5ecbe7a1";

#[test]
fn an_address_with_credentials_is_refused_and_not_repeated() {
    let bench = Bench::new("config_credentials");
    for address in [
        format!("http://user:{SECRET}@127.0.0.1:8500"),
        format!("http://{SECRET}@127.0.0.1:8500"),
        format!("https://user:{SECRET}@127.0.0.1:8500"),
        format!("user:{SECRET}@127.0.0.1:8500"),
        format!("http://127.0.0.1:8500/?token={SECRET}"),
    ] {
        let (_, test) = bench.test(&format!("consul_address {address};"));
        assert!(!test.ok && test.output.contains("[emerg]"), "{}", test.output);
        assert!(!test.output.contains(SECRET), "{}", test.output);
    }
}

#[test]
fn mistakes_in_tokens_do_not_repeat_them() {
    let bench = Bench::new("config_token");
    let file = |name: &str, text: &str| bench.dir.write(name, text).display().to_string();
    let (good, empty, binary) =
        (file("good", SECRET), file("empty", " \n"), file("binary", &format!("{SECRET}\u{7f}ä")));
    let both = "the token is set already, by \"consul_token\" or \"consul_token_file\"";
    let missing = bench.dir.join("missing").display().to_string();
    let directory = bench.dir.path().display().to_string();
    for (directives, says) in [
        (format!("consul_token {SECRET}; consul_token_file {good};"), both.to_owned()),
        (format!("consul_token_file {good}; consul_token {SECRET};"), both.to_owned()),
        (format!("consul_token {SECRET}; consul_token {SECRET};"), both.to_owned()),
        (format!("consul_token_file {good}; consul_token_file {good};"), both.to_owned()),
        ("consul_token '';".into(), "the token is empty".into()),
        (
            format!("consul_token '{SECRET} x';"),
            "the token holds a character that is not printable ASCII".into(),
        ),
        (
            format!("consul_token_file {missing};"),
            format!("cannot read token file \"{missing}\": No such file or directory (os error 2)"),
        ),
        (
            format!("consul_token_file {directory};"),
            format!("cannot read token file \"{directory}\": Is a directory (os error 21)"),
        ),
        (format!("consul_token_file {empty};"), format!("the token in \"{empty}\" is empty")),
        (
            format!("consul_token_file {binary};"),
            format!("the token in \"{binary}\" holds a character that is not printable ASCII"),
        ),
    ] {
        let http = format!("{directives} {HERE}\n");
        bench.refused(&http, &says);
        let (_, test) = bench.test(&http);
        assert!(!test.output.contains(SECRET), "{}", test.output);
    }
    // On different levels they do not meet.
    bench.taken(&format!(
        "consul_token {SECRET};\n{}",
        upstream(&format!("consul_upstream web; consul_token_file {good};"))
    ));
}

#[test]
fn directives_in_a_wrong_place() {
    let bench = Bench::new("config_context");
    let refused = |http: &str, name: &str| {
        bench.refused(http, &format!("\"{name}\" directive is not allowed here"));
    };
    refused(&format!("consul_upstream web; {HERE}\n"), "consul_upstream");
    refused(&format!("server {{\nconsul_upstream web; {HERE}\n}}"), "consul_upstream");
    refused(&format!("server {{\nconsul_address http://127.0.0.1; {HERE}\n}}"), "consul_address");
    refused(&format!("server {{ location / {{\nconsul_wait 25s; {HERE}\n}} }}"), "consul_wait");
    refused(&upstream("consul_start_timeout 2s;"), "consul_start_timeout");
    let main = Nginx::builder(&bench.net, &bench.dir).main("consul_address http://127.0.0.1;");
    let test = main.config_test();
    assert!(
        !test.ok && test.output.contains("\"consul_address\" directive is not allowed here"),
        "{}",
        test.output
    );
}

#[test]
fn what_is_no_mistake() {
    let bench = Bench::new("config_good");
    for lines in [
        "consul_upstream web weight=1 max_conns=0 max_fails=0 fail_timeout=60;",
        "consul_upstream web weight=65536 fail_timeout=1m30s health=any tag=a tag=b dc=dc2 backup;",
        "consul_upstream web; consul_upstream web dc=dc2; consul_upstream web tag=a;",
        "consul_upstream 'my web' 'tag=my tag';",
        "consul_upstream wéb tag=größe;",
        "consul_upstream web; least_conn; keepalive 4;",
        "hash $uri consistent; consul_upstream web; server 127.0.0.1:1;",
        "consul_upstream web; server 127.0.0.1:1 backup;",
        "consul_upstream web; server 127.0.0.1:1 down;",
        "consul_upstream web backup; server 127.0.0.1:1 backup;",
        "consul_upstream web; consul_address http://[::1]:8500; consul_wait 1s;",
        "consul_upstream web; consul_wait 5m; consul_timeout 1ms; consul_max_response 1;",
    ] {
        bench.taken(&upstream(lines));
    }
    bench.taken("consul_address http://consul.example:8500/; consul_start_timeout 0;");
}

/// A zone may be named behind the source, and the method too.
#[test]
fn the_order_of_directives_does_not_matter() {
    let stage = Stage::set("config_order");
    let [one, two] = stage.web();
    let one = one.with(|service| service.weights(3, 1));
    stage.register([&one, &two]);
    let mut conf = stage.nginx();
    let methods = ["least_conn;", "ip_hash;", "hash $arg_k;", "random;", "random two;"];
    for (n, method) in methods.iter().enumerate() {
        for (order, lines) in [
            ("before", format!("{method} zone z 512k; consul_upstream web; keepalive 2;")),
            ("after", format!("consul_upstream web; {method} keepalive 2; zone z 512k;")),
        ] {
            let name = format!("{order}_{n}");
            let lines = lines.replace("zone z", &format!("zone {name}"));
            conf = conf.http(format!("upstream {name} {{ {lines} }}")).server(&name);
        }
    }
    let nginx = conf.start();
    for pair in nginx.addrs().chunks(2) {
        let [before, after] = pair else { panic!("two of each") };
        // What a method chooses is the same in both, as far as it is not drawn by lot.
        let by_key = |addr| -> Vec<String> {
            let mut conn = http::Conn::open(addr).unwrap();
            (0..20).map(|k| conn.get(&format!("/?k={k}")).unwrap().backend().to_owned()).collect()
        };
        let (before, after) = (by_key(*before), by_key(*after));
        assert!(before.iter().all(|name| name.starts_with("web-")), "{before:?}");
        assert!(after.iter().all(|name| name.starts_with("web-")), "{after:?}");
    }
    // `hash` goes by the key alone.
    let hash = &nginx.addrs()[4..6];
    for k in 0..20 {
        let path = format!("/?k={k}");
        let [before, after] = [0, 1].map(|n| http::get(hash[n], &path).unwrap().tried());
        assert_eq!(before, after);
    }
}

#[test]
fn beside_a_static_backup_alone() {
    let stage = Stage::set("config_backup");
    let [one] = stage.web();
    let fixed = Backend::start(&stage.net, 20, "fixed");
    let lines = format!("consul_upstream web hold=0; server {} backup;", fixed.addr());
    let nginx = stage.nginx().upstream("web", &lines).start();
    serves_now(nginx.addr(), &["fixed"]);
    stage.register([&one]);
    serves(nginx.addr(), &["web-1"]);
    stage.consul.deregister("web-1");
    serves(nginx.addr(), &["fixed"]);
}

#[test]
fn a_source_of_backups_alone() {
    let stage = Stage::set("config_backup_source");
    let [one, two] = stage.web();
    let fixed = Backend::start(&stage.net, 20, "fixed");
    stage.register([&one]);
    let nginx = stage
        .nginx()
        .upstream("alone", "consul_upstream web backup;")
        .upstream("beside", &format!("consul_upstream web backup; server {};", fixed.addr()))
        .start();
    let [alone, beside] = nginx.addrs() else { panic!("two servers") };
    serves_now(*alone, &["web-1"]);
    serves_now(*beside, &["fixed"]);
    stage.register([&two]);
    serves(*alone, &["web-1", "web-2"]);
    fixed.stop();
    // nginx finds it dead, and turns to the others.
    serves(*beside, &["web-1", "web-2"]);
}

#[test]
fn names_with_spaces_and_letters_of_all_kinds() {
    let stage = Stage::set("config_names");
    let spaced = Instance::start(&stage.net, "my web", "my web 1");
    let [one, two] = stage.web();
    let tagged = one.with(|service| service.tag("größe=XL 🦀"));
    let odd = Instance::start(&stage.net, "wéb/#?%20&x=1", "odd");
    for instance in [&spaced, &tagged, &two, &odd] {
        let body = instance.service.registration().to_string();
        stage.consul.put("/v1/agent/service/register", &body);
    }
    let nginx = stage
        .nginx()
        .upstream("spaced", "consul_upstream 'my web';")
        .upstream("tagged", "consul_upstream web 'tag=größe=XL 🦀';")
        .upstream("odd", "consul_upstream 'wéb/#?%20&x=1';")
        .start();
    let [with_spaces, with_tag, with_odd] = nginx.addrs() else { panic!("three servers") };
    serves(*with_spaces, &["my web 1"]);
    serves(*with_tag, &["web-1"]);
    serves(*with_odd, &["odd"]);
}

/// What nginx itself does with these attributes it does with ours.
#[test]
fn attributes_of_a_source_are_those_of_nginxs_servers() {
    let stage = Stage::set("config_attributes");
    let [one, two] = stage.web();
    stage.register([&one, &two]);
    let nginx = stage
        .nginx()
        .upstream("avoids", "consul_upstream web max_fails=1 fail_timeout=1h;")
        .upstream("insists", "consul_upstream web max_fails=0;")
        .upstream("limited", "consul_upstream web max_conns=1;")
        .start();
    let [avoids, insists, limited] = nginx.addrs() else { panic!("three servers") };
    for backend in [&one.backend, &two.backend] {
        backend.set_delay(std::time::Duration::from_secs(600));
    }
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let mut conn = http::Conn::open(*limited).unwrap();
                conn.set_timeout(std::time::Duration::from_secs(600));
                // It ends when its backend does.
                let _ = conn.get("/");
            });
        }
        let busy = || one.backend.in_flight() + two.backend.in_flight();
        testbed::eventually(PATIENCE, "a connection to each", || busy() == 2);
        assert_eq!((one.backend.in_flight(), two.backend.in_flight()), (1, 1));
        assert_eq!(http::get(*limited, "/").unwrap().status, 502, "both have their one");

        one.backend.set_delay(std::time::Duration::ZERO);
        two.backend.set_delay(std::time::Duration::ZERO);
        let Instance { backend, .. } = two;
        backend.stop();
        serves(*avoids, &["web-1"]);
        serves_now(*insists, &["web-1", RETRIED]);
        let Instance { backend, .. } = one;
        backend.stop();
    });
}

// ---- nginx-conf

/// An example, with the addresses of a test in place of its own.
struct Example {
    stage: Stage,
    conf: String,
    server: std::net::SocketAddr,
}

impl Example {
    fn read(name: &str) -> Example {
        let stage = Stage::set(&format!("example_{name}"));
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("nginx-conf").join(name);
        let conf = std::fs::read_to_string(&path).unwrap();
        let server: std::net::SocketAddr = (stage.net.ip(1), stage.net.port()).into();
        let mut example = Example { stage, conf, server };
        // Relative to nginx's prefix, where the test bed has one directory for everything.
        example.put("logs/", "");
        example.put("listen 8080;", &format!("listen {server};"));
        example
    }

    fn put(&mut self, old: &str, new: &str) {
        assert!(self.conf.contains(old), "there is no {old} in it");
        self.conf = self.conf.replace(old, new);
    }

    /// Names the Consul: it is the default in some, and written in others.
    fn with_consul(&mut self) {
        let url = self.stage.consul.url();
        if self.conf.contains("consul_address ") {
            self.put("http://127.0.0.1:8500", &url);
        } else {
            self.put("http {", &format!("http {{ consul_address {url};"));
        }
    }

    fn register(&self, services: &[Service]) {
        self.stage.consul.register_all(services);
    }

    fn instance(&self, service: &str, id: &str) -> Instance {
        Instance::start(&self.stage.net, service, id)
    }

    /// Passes `nginx -t` and starts.
    fn start(&mut self) -> Nginx {
        self.with_consul();
        let test = nginx::config_test(&self.stage.net, &self.stage.dir, &self.conf);
        assert!(test.ok && !test.output.contains("[warn]"), "{}", test.output);
        Nginx::builder(&self.stage.net, &self.stage.dir)
            .text(self.conf.clone())
            .listen(self.server)
            .start()
    }
}

#[test]
fn example_minimal() {
    let mut example = Example::read("minimal.conf");
    let [one, two] = ["web-1", "web-2"].map(|id| example.instance("web", id));
    example.register(&[one.service.clone(), two.service.clone()]);
    let nginx = example.start();
    serves(nginx.addr(), &["web-1", "web-2"]);
    example.stage.consul.deregister("web-1");
    serves(nginx.addr(), &["web-2"]);
}

#[test]
fn example_classic() {
    let mut example = Example::read("classic.conf");
    let app = example.instance("web", "app").with(|service| service.tag("app").weights(9, 1));
    let other = example.instance("web", "other");
    example.register(&[app.service.clone(), other.service.clone()]);
    let nginx = example.start();
    serves(nginx.addr(), &["app"]);
    example.stage.consul.register(&other.service.clone().tag("app"));
    // The line's weight, as the template wrote it.
    shares(nginx.addr(), &[("app", 10), ("other", 10)]);
    // All of them: by maintenance, which is never held.
    example.stage.consul.maintenance("app", true, "a test");
    example.stage.consul.maintenance("other", true, "a test");
    serves(nginx.addr(), &["502"]);
}

#[test]
fn example_datacenters() {
    let mut example = Example::read("datacenters.conf");
    let (net, dir) = (example.stage.net.clone(), example.stage.dir.clone());
    example.stage.consul.stop();
    example.stage.consul = testbed::Consul::builder(&net, &dir).wan().start();
    let far = testbed::Consul::builder(&net, &dir).host(&net, 11).datacenter("dc2").wan().start();
    example.stage.consul.join_wan(&far);
    let fixed = Backend::start(&net, 20, "fixed");
    example.put("127.0.0.1:8081", &fixed.addr().to_string());
    let [here, there] = ["here", "there"].map(|id| example.instance("web", id));
    example.register(std::slice::from_ref(&here.service));
    far.register(&there.service);
    let nginx = example.start();
    serves(nginx.addr(), &["here"]);
    example.stage.consul.maintenance("here", true, "a test");
    serves(nginx.addr(), &["fixed", "there"]);
    far.maintenance("there", true, "a test");
    serves(nginx.addr(), &["fixed"]);
    fixed.stop();
    watch("the page of an upstream without servers", || {
        let answer = http::get(nginx.addr(), "/").unwrap();
        let (status, text) = (answer.status, answer.text());
        if (status, &*text) == (503, "Back soon.\n") {
            Ok(())
        } else {
            Err(format!("{status} {text}"))
        }
    });
}

#[test]
fn example_services() {
    let mut example = Example::read("services.conf");
    let instances = [
        example.instance("web", "front").with(|service| service.tag("frontend")),
        example.instance("web", "back"),
        example.instance("api", "stable").with(|service| service.tag("stable")),
        example.instance("api", "canary").with(|service| service.tag("canary")),
        example.instance("cache", "cache-1"),
        example.instance("cache", "cache-2"),
        example.instance("chat", "chat-1"),
        example.instance("batch", "batch-1").with(|service| {
            service.check(testbed::Check::ttl().initially(testbed::Status::Critical))
        }),
    ];
    example.stage.register(&instances);
    let nginx = example.start();
    let meets = |path: &str| {
        let mut conn = http::Conn::open(nginx.addr()).unwrap();
        let mut seen = std::collections::BTreeMap::<String, usize>::new();
        for n in 0..60 {
            let answer = conn.get(&format!("{path}{n}")).unwrap();
            let name = if answer.status == 200 { answer.backend() } else { "none" };
            *seen.entry(name.to_owned()).or_default() += 1;
        }
        let mut text = String::new();
        for (name, count) in seen {
            let _ = write!(text, "{name}:{count} ");
        }
        text
    };
    for (path, expected) in [
        ("/", "front:60 "),
        ("/api/", "canary:6 stable:54 "),
        ("/chat/", "chat-1:60 "),
        ("/batch/", "batch-1:60 "),
    ] {
        watch(&format!("{path} meets {expected}"), || {
            let seen = meets(path);
            if seen == expected { Ok(()) } else { Err(seen) }
        });
    }
    // The same path goes to the same cache, and both have some.
    let first = meets("/assets/");
    assert!(first.contains("cache-1:") && first.contains("cache-2:"), "{first}");
    assert_eq!(meets("/assets/"), first);
}

/// An example that nobody tests would be worth little.
#[test]
fn every_example_has_a_test() {
    let mut names: Vec<String> =
        std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("nginx-conf"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
    names.sort();
    assert_eq!(names, ["classic.conf", "datacenters.conf", "minimal.conf", "services.conf"]);
}
