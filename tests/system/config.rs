//! The configuration: what `nginx -t` refuses, and with which words; what it takes; and the examples
//! of nginx-conf.

use std::fmt::Write;
use std::net::TcpListener;
use std::path::Path;
use std::process::Command;

use testbed::{
    Authority, Backend, Certificate, Dir, Greeted, Greeter, Net, Nginx, Process, Service, http,
    nginx,
};

use crate::common::{
    Instance, PATIENCE, RETRIED, Serve, Stage, asking, serves, serves_now, shares, text, watch,
};
use crate::fake_consul::{FakeConsul, entry};

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
        "slow_start=10s",
        "filter",
        "filter=",
        "filter=\"\"",
        "ns",
        "ns=",
        "partition=",
        "peer=",
        "address=",
        "address=LAN",
        "address=10.0.0.1",
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
        ("ns=a ns=a", "ns=a"),
        ("partition=a partition=b", "partition=b"),
        ("peer=a peer=b", "peer=b"),
        ("filter=a filter=b", "filter=b"),
        ("address=lan address=wan", "address=wan"),
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
    for name in ["tag", "filter", "dc", "ns", "partition", "peer"] {
        bench.refused(
            &line(&format!(r#"web "{name}=a\nb""#)),
            &format!(r#"invalid parameter "{name}=a\nb""#),
        );
    }
}

/// In nginx a quote begins something only where a word begins, and `filter="a b"` is two words.
#[test]
fn a_filter_may_be_quoted_as_a_whole_or_after_its_name() {
    let bench = Bench::new("config_filter");
    let line = |parameters: &str| upstream(&format!("consul_upstream web {parameters};"));
    // What says the same is the same query.
    for (one, other) in [
        (r#"'filter=Meta.v == "2"'"#, r#"filter="Meta.v == \"2\"""#),
        (r#"'filter=Meta.v == "2"'"#, r#""filter=Meta.v == \"2\"""#),
        (r#"'filter="x" in Tags'"#, r#"filter="\"x\" in Tags""#),
        (r#"'filter=Meta.a == "x" and b'"#, "filter=\"Meta.a  ==\n \\\"x\\\" and\tb\""),
        ("'filter=a is empty'", r#"filter="a is empty" max_fails=2"#),
        ("'filter=a is empty'", r#"filter=" a is empty" backup"#),
        ("filter=a", r#"filter="a""#),
        ("'filter=Meta.`x y` == $z'", r#"filter="Meta.`x y` == $z""#),
    ] {
        bench.taken(&line(one));
        bench.taken(&line(other));
        let both = format!("consul_upstream web {one}; consul_upstream web {other};");
        bench.refused(&upstream(&both), "duplicate query for service \"web\"");
    }
    bench.taken(&upstream("consul_upstream web; consul_upstream web filter=a;"));

    let quote = "quote the whole: 'filter=EXPRESSION'";
    for (parameters, begin) in [
        (r#"filter="a is empty"#, r#""a"#),
        (r#"filter="Meta.a == \"x and b""#, r#""Meta.a"#),
        (r#"filter="Meta.a == "x y" and b""#, r#""Meta.a"#),
        ("filter='a is empty'", "'a"),
    ] {
        let says = format!("cannot read parameter \"filter={begin}\", {quote}");
        bench.refused(&line(parameters), &says);
    }
    bench.refused(&line("filter=a is empty"), "invalid parameter \"is\"");
    bench.refused(&line(r#"filter="a" is empty"#), "invalid parameter \"is\"");
}

#[test]
fn a_filter_reaches_consul_as_it_was_meant() {
    let (net, dir) = (Net::isolated(), Dir::new("config_filter_sent"));
    let fake = FakeConsul::start(&net);
    fake.know(7, &[entry("web-1", (net.ip(20), 80).into())]);
    let mut conf = asking(&net, &dir, &fake.url());
    let spellings = [
        r#"'filter=Meta.v == "a\b" and not x'"#,
        r#""filter=Meta.v == \"a\b\" and not x""#,
        r#"filter="Meta.v == \"a\b\" and not x""#,
    ];
    for (n, filter) in spellings.iter().enumerate() {
        conf = conf.upstream(&format!("web{n}"), &format!("consul_upstream web{n} {filter};"));
    }
    let _nginx = conf.start();
    for n in 0..spellings.len() {
        let wanted = format!(
            "/v1/health/service/web{n}?filter=Meta.v+%3D%3D+%22a%5Cb%22+and+not+x&consistent"
        );
        testbed::eventually(PATIENCE, &format!("somebody asks for {wanted}"), || {
            let targets: Vec<String> = fake.requests().into_iter().map(|it| it.target).collect();
            if targets.contains(&wanted) { Ok(()) } else { Err(format!("{targets:?}")) }
        });
    }
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
        "consul_upstream web ns=a peer=b; consul_upstream web peer=b ns=a;",
        "consul_upstream web address=wan; consul_upstream web weight=2 address=wan;",
        "consul_upstream web address=lan; consul_upstream web;",
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
    let begin = "it must begin with \"http://\", \"https://\" or \"unix:/\"";
    for (address, why) in [
        ("127.0.0.1:8500", &*format!("has no scheme, {begin}")),
        ("localhost", &*format!("has no scheme, {begin}")),
        ("ftp://127.0.0.1:8501", &*format!("has a scheme that is not supported, {begin}")),
        ("http://127.0.0.1:8500/v1", "must not have a path, a query or a fragment"),
        ("https://127.0.0.1:8500/v1", "must not have a path, a query or a fragment"),
        ("http://127.0.0.1:99999", "is not a valid URL"),
        ("http://", "is not a valid URL"),
        ("unix:consul.sock", "must have an absolute path of at most 107 bytes after \"unix:\""),
    ] {
        let says = format!("address \"{address}\" {why}");
        refused(&format!("consul_address {address};"), &says);
        refused(&format!("consul_address http://127.0.0.1 {address};"), &says);
    }
    for (addresses, twice) in [
        ("http://127.0.0.1:8500 http://127.0.0.1:8500", "http://127.0.0.1:8500"),
        ("http://consul http://a https://consul HTTP://CONSUL:80/", "HTTP://CONSUL:80/"),
        ("unix:/run/consul.sock unix:///run/consul.sock", "unix:///run/consul.sock"),
    ] {
        let says = format!("duplicate address \"{twice}\"");
        refused(&format!("consul_address {addresses};"), &says);
    }

    for mode in ["strong", "''", "stale,consistent"] {
        let shown = mode.trim_matches('\'');
        refused(
            &format!("consul_consistency {mode};"),
            &format!(
                "\"consul_consistency\" directive invalid value \"{shown}\", it must be \
                 \"default\", \"stale\" or \"consistent\""
            ),
        );
    }
    for value in ["yes", "''"] {
        let shown = value.trim_matches('\'');
        refused(
            &format!("consul_ssl_verify {value};"),
            &format!(
                "\"consul_ssl_verify\" directive invalid value \"{shown}\", it must be \"on\" or \
                 \"off\""
            ),
        );
    }
    for name in ["127.0.0.1", "a/b", "a:443", "*.consul", "''", "'a b'"] {
        let shown = name.trim_matches('\'');
        refused(
            &format!("consul_ssl_server_name {name};"),
            &format!("server name \"{shown}\" is not a host name"),
        );
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
        "consul_ssl_server_name server.dc1.consul;",
        "consul_ssl_verify off;",
        "consul_consistency stale;",
        "consul_wait 25s;",
        "consul_timeout 5s;",
        "consul_max_response 64m;",
    ] {
        let (name, _) = directive.split_once(' ').expect("a name and a value");
        let says = format!("\"{name}\" directive is duplicate");
        refused(&format!("{directive} {directive}"), &says);
    }
    for directive in [
        "consul_token",
        "consul_token_file",
        "consul_ssl_trusted_certificate",
        "consul_ssl_certificate",
        "consul_ssl_certificate_key",
        "consul_ssl_server_name",
        "consul_ssl_verify",
        "consul_consistency",
        "consul_wait",
        "consul_timeout",
        "consul_max_response",
    ] {
        let says = format!("invalid number of arguments in \"{directive}\" directive");
        refused(&format!("{directive};"), &says);
        refused(&format!("{directive} a b;"), &says);
    }
    refused("consul_address;", "invalid number of arguments in \"consul_address\" directive");
}

#[test]
fn mistakes_in_what_is_set_once_for_all() {
    let bench = Bench::new("config_once");
    let refused =
        |directive: &str, says: &str| bench.refused(&format!("{directive} {HERE}\n"), says);
    for value in ["0", "65536", "-1", "1.5", "many", "''"] {
        let shown = value.trim_matches('\'');
        refused(
            &format!("consul_max_connections {value};"),
            &format!(
                "\"consul_max_connections\" directive invalid value \"{shown}\", it must be from 1 \
                 to 65535"
            ),
        );
    }
    refused(
        "consul_state_path '';",
        "\"consul_state_path\" directive invalid value \"\", it must be a directory or \"off\"",
    );
    for directive in
        ["consul_start_timeout 1s;", "consul_max_connections 9;", "consul_state_path off;"]
    {
        let (name, _) = directive.split_once(' ').expect("a name and a value");
        refused(&format!("{directive} {directive}"), &format!("\"{name}\" directive is duplicate"));
        let says = format!("invalid number of arguments in \"{name}\" directive");
        refused(&format!("{name};"), &says);
        refused(&format!("{name} 1 2;"), &says);
    }
    refused(
        "consul_state_path a; consul_state_path off;",
        "\"consul_state_path\" directive is duplicate",
    );
    bench.taken("consul_max_connections 1; consul_state_path off;");
    bench.taken("consul_max_connections 65535; consul_state_path /nowhere/at/all;");
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
    let large = file("large", &"x".repeat((1 << 20) + 1));
    bench.refused(
        &format!("consul_token_file {large}; {HERE}\n"),
        &format!("cannot read token file \"{large}\": larger than 1 MiB"),
    );
}

// ---- TLS

/// What goes wrong with the files shows at their lines, whether anybody needs them or not.
#[test]
fn files_of_tls_that_cannot_be_read() {
    let bench = Bench::new("config_tls_files");
    let authority = Authority::new(&bench.dir, "ca");
    let good = authority.ca().display().to_string();
    let missing = bench.dir.join("missing.pem").display().to_string();
    let directory = bench.dir.path().display().to_string();
    let large = bench.dir.write("large.pem", "x".repeat((1 << 20) + 1)).display().to_string();
    for (directive, what) in [
        ("consul_ssl_trusted_certificate", "trusted certificate"),
        ("consul_ssl_certificate", "certificate"),
        ("consul_ssl_certificate_key", "certificate key"),
    ] {
        for (file, why) in [
            (&missing, "No such file or directory (os error 2)"),
            (&directory, "Is a directory (os error 21)"),
            (&large, "larger than 1 MiB"),
        ] {
            let line = format!("{directive} {file}; {HERE}\n");
            let says = format!("cannot read {what} \"{file}\": {why}");
            bench.refused(&line, &says);
            bench.refused(&upstream(&format!("consul_upstream web;\n{line}")), &says);
        }
        bench.refused(
            &format!("{directive} {good}; {directive} {good}; {HERE}\n"),
            &format!("\"{directive}\" directive is duplicate"),
        );
    }
}

/// For one test: certificates, and what is wrong with them where they are used.
struct Tls {
    bench: Bench,
    authority: Authority,
    certificate: Certificate,
}

impl Tls {
    fn new(name: &str) -> Tls {
        let bench = Bench::new(name);
        let authority = Authority::new(&bench.dir, "ca");
        let certificate = authority.request("client").issue();
        Tls { bench, authority, certificate }
    }

    /// A certificate and its key, as two directives.
    fn pair(certificate: &Certificate) -> String {
        let Certificate { cert, key } = certificate;
        format!(
            "consul_ssl_certificate {}; consul_ssl_certificate_key {};",
            cert.display(),
            key.display()
        )
    }

    fn trusted(&self) -> String {
        format!("consul_ssl_trusted_certificate {};", self.authority.ca().display())
    }

    /// An upstream whose agent, the second one, has an `https://` address.
    fn upstream(lines: &str) -> String {
        let address = "consul_address http://127.0.0.1:8500 https://127.0.0.1:8501;";
        upstream(&format!("consul_upstream web; {address} {lines}"))
    }

    #[track_caller]
    fn refused(&self, http: &str, lines: &str, says: &str) {
        self.bench.refused(
            &format!("{http}\n{}", Tls::upstream(lines)),
            &format!("{says} in upstream \"web\""),
        );
    }

    #[track_caller]
    fn taken(&self, http: &str, lines: &str) {
        self.bench.taken(&format!("{http}\n{}", Tls::upstream(lines)));
    }
}

#[test]
fn a_certificate_and_its_key_belong_together() {
    let tls = Tls::new("config_tls_pair");
    let other = tls.authority.request("other").issue();
    let (trusted, own) = (tls.trusted(), Tls::pair(&tls.certificate));
    let names = |certificate: &Certificate| {
        (certificate.cert.display().to_string(), certificate.key.display().to_string())
    };
    let ((cert, key), (other_cert, other_key)) = (names(&tls.certificate), names(&other));
    tls.taken("", &format!("{trusted} {own}"));
    tls.taken(&format!("{trusted} {own}"), "");
    // Each directive replaces that of http by itself.
    tls.taken(
        &format!("{trusted} consul_ssl_certificate {cert};"),
        &format!("consul_ssl_certificate_key {key};"),
    );
    tls.taken(&format!("{trusted} {own}"), &Tls::pair(&other));

    let without_key =
        format!("no \"consul_ssl_certificate_key\" is defined for certificate \"{cert}\"");
    let without_cert =
        format!("no \"consul_ssl_certificate\" is defined for certificate key \"{key}\"");
    for (directive, says) in [
        (format!("consul_ssl_certificate {cert};"), &without_key),
        (format!("consul_ssl_certificate_key {key};"), &without_cert),
    ] {
        tls.refused("", &format!("{trusted} {directive}"), says);
        tls.refused(&format!("{trusted} {directive}"), "", says);
    }

    let mixed = |certificate: &str, key: &str| {
        format!(
            "cannot use certificate \"{certificate}\" with key \"{key}\": keys may not be \
             consistent: KeyMismatch"
        )
    };
    tls.refused(
        &format!("{trusted} {own}"),
        &format!("consul_ssl_certificate_key {other_key};"),
        &mixed(&cert, &other_key),
    );
    tls.refused(
        &format!("{trusted} {own}"),
        &format!("consul_ssl_certificate {other_cert};"),
        &mixed(&other_cert, &key),
    );
    // Text that is no PEM.
    let says = |certificate: &str, key: &str| {
        format!(
            "cannot use TLS: no valid certificate in \"{certificate}\", or no valid key in \"{key}\""
        )
    };
    let nonsense = tls.bench.dir.write("nonsense.pem", "nonsense").display().to_string();
    for (cert, key) in [(&nonsense, &key), (&cert, &nonsense), (&cert, &cert), (&key, &key)] {
        let lines = format!("consul_ssl_certificate {cert}; consul_ssl_certificate_key {key};");
        tls.refused(&trusted, &lines, &says(cert, key));
    }
}

#[test]
fn trusted_certificates_are_those_of_the_upstream() {
    let tls = Tls::new("config_tls_trusted");
    let file = |name: &str, text: &str| tls.bench.dir.write(name, text).display().to_string();
    let good = tls.trusted();
    let broken = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
    for (bad, broken) in [
        (file("nonsense.pem", "nonsense"), false),
        (file("empty.pem", ""), false),
        (file("broken.pem", broken), true),
    ] {
        let trusts = format!("consul_ssl_trusted_certificate {bad};");
        let says = if broken {
            format!(
                "cannot use trusted certificate \"{bad}\": invalid peer certificate: BadEncoding"
            )
        } else {
            format!("cannot use TLS: no valid certificate in \"{bad}\"")
        };
        tls.refused("", &trusts, &says);
        tls.refused(&trusts, "", &says);
        tls.refused(&good, &trusts, &says);
        tls.refused("", &format!("{trusts} {}", Tls::pair(&tls.certificate)), &says);
        tls.taken(&trusts, &good);
        // Nobody asks over TLS.
        tls.bench.taken(&format!("{trusts}\n{}", upstream("consul_upstream web;")));
        tls.bench.taken(&trusts);
    }
    tls.taken("", &format!("{good} consul_ssl_server_name server.dc1.consul;"));
    // One that is good does not speak for the next.
    let trusts =
        format!("consul_ssl_trusted_certificate {};", tls.bench.dir.join("empty.pem").display());
    let address = "consul_address https://127.0.0.1:8501;";
    let first = format!("upstream good {{ zone good 256k; consul_upstream web; {address} }}");
    tls.bench.refused(
        &format!("{good}\n{first}\n{}", Tls::upstream(&trusts)),
        &format!(
            "cannot use TLS: no valid certificate in \"{}\" in upstream \"web\"",
            tls.bench.dir.join("empty.pem").display()
        ),
    );
}

// ---- paths

/// nginx with another directory for its configuration than its prefix.
struct Apart {
    net: Net,
    dir: Dir,
}

impl Apart {
    fn new(name: &str) -> Apart {
        let (net, dir) = (Net::isolated(), Dir::new(name));
        std::fs::create_dir_all(dir.join("nginx/temp")).unwrap();
        std::fs::create_dir_all(dir.join("elsewhere")).unwrap();
        Apart { net, dir }
    }

    /// Writes the configuration; the prefix is relative, as in `nginx -p nginx`.
    fn command(&self, main: &str, http: &str) -> Command {
        let module = testbed::paths::module(testbed::Protocol::Http).unwrap();
        let builder = Nginx::builder(&self.net, &self.dir)
            .module(false)
            .main(format!("load_module {};", module.display()))
            .main(main)
            .http(http);
        self.dir.write("nginx/conf/nginx.conf", builder.conf());
        let mut command = Command::new(testbed::paths::nginx().unwrap());
        command.current_dir(self.dir.path()).args(["-p", "nginx", "-c", "conf/nginx.conf"]);
        command.args(["-e", "error.log", "-g", "daemon off;"]);
        command
    }

    fn test(&self, http: &str) -> (bool, String) {
        self.test_with(http, |command| command)
    }

    fn test_with(
        &self,
        http: &str,
        change: impl Fn(&mut Command) -> &mut Command,
    ) -> (bool, String) {
        let output = change(self.command("", http).arg("-t")).output().unwrap();
        (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
    }

    /// Starts it; its workers have another working directory. Returns with the worker.
    fn start(&self, http: &str) -> Process {
        let elsewhere = self.dir.join("elsewhere");
        let main = format!("working_directory {};", elsewhere.display());
        let mut process = Process::spawn(&mut self.command(&main, http)).unwrap();
        let log = self.dir.join("nginx/error.log");
        testbed::eventually(PATIENCE, "nginx starts a worker", || {
            let log = std::fs::read_to_string(&log).unwrap_or_default();
            assert!(process.ended().is_none(), "{log}");
            if log.contains("start worker process ") { Ok(()) } else { Err(log) }
        });
        process
    }
}

#[test]
fn relative_paths_begin_where_nginxs_own_do() {
    let apart = Apart::new("config_relative");
    let authority = Authority::new(&apart.dir, "nginx/conf/tls");
    authority.request("client").issue();
    apart.dir.write("nginx/conf/token", SECRET);
    let (ok, said) = apart.test(
        "consul_address https://127.0.0.1:8501; consul_token_file token;
         consul_ssl_trusted_certificate tls/ca.pem;
         consul_ssl_certificate tls/client.pem; consul_ssl_certificate_key tls/client-key.pem;
         upstream web { zone web 256k; consul_upstream web; }",
    );
    assert!(ok, "{said}");
    // What is said of them is where they really are.
    let (ok, said) = apart.test("consul_token_file missing;");
    let missing = apart.dir.join("nginx/conf/missing").display().to_string();
    assert!(!ok && said.contains(&format!("cannot read token file \"{missing}\": ")), "{said}");
}

#[test]
fn the_state_is_kept_under_the_prefix() {
    let state = |name: &str, directive: &str, expected: Option<&str>| {
        let apart = Apart::new(name);
        let upstream = "upstream web { zone web 256k; consul_upstream web; }";
        let nobody = "consul_address unix:DIR/nobody.sock; consul_start_timeout 0;";
        let http = format!("{nobody} {directive} {upstream}")
            .replace("DIR", &apart.dir.path().display().to_string());
        let made = || {
            let places = ["nginx", "nginx/conf", "elsewhere", ""].map(|place| {
                let entries = std::fs::read_dir(apart.dir.join(place)).unwrap();
                let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
                names
                    .filter(|name| name.contains("state"))
                    .map(move |name| format!("{place}/{name}"))
            });
            places.into_iter().flatten().collect::<Vec<_>>()
        };
        let (ok, said) = apart.test(&http);
        assert!(ok, "{said}");
        assert_eq!(made(), [""; 0], "nginx -t makes nothing");
        let mut nginx = apart.start(&http);
        assert_eq!(made(), expected.as_slice());
        nginx.signal(testbed::Signal::QUIT);
        assert!(nginx.wait(PATIENCE).is_some(), "it ends");
    };
    state("state_default", "", Some("nginx/consul_state"));
    state("state_relative", "consul_state_path ./the-state;", Some("nginx/the-state"));
    state("state_absolute", "consul_state_path DIR/state;", Some("/state"));
    state("state_off", "consul_state_path off;", None);
}

/// Whose certificates are trusted where nothing is set: read, and nothing else.
#[test]
fn the_systems_authorities_stand_in() {
    let apart = Apart::new("config_roots");
    let authority = Authority::new(&apart.dir, "ca");
    let listener = TcpListener::bind((apart.net.ip(10), apart.net.port())).unwrap();
    listener.set_nonblocking(true).unwrap();
    let http = format!(
        "consul_address https://{};
         upstream web {{ zone web 256k; consul_upstream web; }}",
        listener.local_addr().unwrap()
    );
    let empty = apart.dir.join("elsewhere");
    let roots = |file: &Path| {
        apart.test_with(&http, |command| {
            command.env("SSL_CERT_FILE", file).env("SSL_CERT_DIR", &empty)
        })
    };
    let (ok, said) = roots(&authority.ca());
    assert!(ok, "{said}");
    let (ok, said) = roots(&apart.dir.write("none.pem", ""));
    assert!(!ok && said.contains("cannot use TLS: "), "{said}");
    assert!(said.contains("in upstream \"web\" in "), "{said}");
    // And nobody was asked.
    let asked = listener.accept().unwrap_err();
    assert_eq!(asked.kind(), std::io::ErrorKind::WouldBlock);
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
    for directive in
        ["consul_start_timeout 2s;", "consul_max_connections 9;", "consul_state_path off;"]
    {
        let (name, _) = directive.split_once(' ').expect("a name and a value");
        refused(&upstream(directive), name);
        refused(&format!("server {{\n{directive} {HERE}\n}}"), name);
    }
    refused(&format!("server {{\nconsul_ssl_verify on; {HERE}\n}}"), "consul_ssl_verify");
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
        "consul_upstream web dc=dc2 ns=team partition=eu peer=other filter=a address=wan;",
        "consul_upstream web address=lan; consul_upstream web address=wan;",
        "consul_upstream web; consul_upstream web ns=a; consul_upstream web partition=a;",
        "consul_upstream web; consul_address http://10.0.0.1 http://10.0.0.2 unix:/run/consul.sock;",
        "consul_upstream web; consul_address unix:/run/consul.sock; consul_consistency Stale;",
        "consul_upstream web; consul_consistency default; consul_ssl_verify OFF;",
    ] {
        bench.taken(&upstream(lines));
    }
    bench.taken("consul_consistency consistent; consul_ssl_server_name server.dc1.consul;");
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
        // Where a distribution's nginx has them, a test may not write.
        let kinds = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"];
        let paths = kinds.map(|kind| format!(" {kind}_temp_path {kind}_temp;")).concat();
        example.put("http {", &format!("http {{{paths}"));
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
        if self.conf.contains("http://127.0.0.1:8500") {
            self.put("http://127.0.0.1:8500", &url);
        } else if !self.conf.contains("consul_address ") {
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

#[test]
fn example_secure() {
    let mut example = Example::read("secure.conf");
    let (net, dir) = (example.stage.net.clone(), example.stage.dir.clone());
    let authority = Authority::new(&dir, "ca");
    example.stage.consul.stop();
    example.stage.consul =
        testbed::Consul::builder(&net, &dir).persistent().tls(&authority, true).acl().start();
    let consul = &example.stage.consul;
    consul.install(&authority.request("server").hosts(&["server.dc1.consul"]).issue());
    let rights = r#"service "web" { policy = "read" } node_prefix "" { policy = "read" }
        agent_prefix "" { policy = "read" }"#;
    let (token, client) = (consul.token(rights), authority.request("client").issue());
    for prefix in ["config-test", "nginx"] {
        let prefix = Path::new(prefix);
        dir.write(prefix.join("consul.token"), &token.secret);
        for (from, to) in [
            (&authority.ca(), "consul-agent-ca.pem"),
            (&client.cert, "dc1-client-consul-0.pem"),
            (&client.key, "dc1-client-consul-0-key.pem"),
        ] {
            testbed::tls::copy(from, &dir.join(prefix).join(to));
        }
    }
    let nobody = |host| format!("https://{}:{}", net.ip(host), net.port());
    let url = consul.https_url();
    example.put("https://127.0.0.1:8501", &nobody(10));
    example.put("https://10.0.0.10:8501", &url);
    example.put("https://10.0.0.11:8501", &nobody(11));

    let one = example.instance("web", "web-1");
    example.register(std::slice::from_ref(&one.service));
    let nginx = example.start();
    serves(nginx.addr(), &["web-1"]);
    let two = example.instance("web", "web-2");
    example.register(std::slice::from_ref(&two.service));
    serves(nginx.addr(), &["web-1", "web-2"]);
    watch("both are stored", || {
        let stored = std::fs::read_dir(dir.join("nginx/consul_state")).map_err(text)?;
        let stored = stored.map(|file| std::fs::read_to_string(file.unwrap().path()).unwrap());
        let stored: String = stored.collect();
        if stored.contains("web-1") && stored.contains("web-2") { Ok(()) } else { Err(stored) }
    });
    drop(nginx);

    // A cold start while Consul is away.
    example.stage.consul.stop();
    let nginx = example.start();
    serves_now(nginx.addr(), &["web-1", "web-2"]);
}

#[test]
fn example_databases() {
    let mut example = Example::read("databases.conf");
    let (net, status) = (example.stage.net.clone(), example.server);
    let [writers, readers] = [5432, 5433].map(|port| {
        let addr: std::net::SocketAddr = (net.ip(1), net.port()).into();
        example.put(&format!("listen {port};"), &format!("listen {addr};"));
        addr
    });
    if let Some(module) = testbed::paths::nginx_stream().unwrap() {
        let ours = "load_module modules/ngx_stream_consul_upstream_module.so;";
        example.put(ours, &format!("load_module {};\n{ours}", module.display()));
    }
    let greeters = [20, 21, 22].map(|host| Greeter::start(&net, host, &format!("pg-{host}")));
    let register = |example: &Example, roles: [&str; 3]| {
        let services: Vec<Service> = greeters
            .iter()
            .zip(roles)
            .enumerate()
            .map(|(n, (greeter, role))| {
                Service::new("postgres", &format!("pg-{n}"), greeter.addr()).tag(role)
            })
            .collect();
        example.register(&services);
    };
    register(&example, ["primary", "replica", "replica"]);
    let nginx = example.start();
    let open = |addr| Greeted::open(addr).map_err(text);
    let writer = watch("the primary", || open(writers));
    assert_eq!(writer.name, "pg-20");
    let reader = open(readers).unwrap();
    assert_ne!(reader.name, "pg-20");
    let seen = http::get(status, "/").unwrap().json();
    assert_eq!(seen["stream_upstreams"]["replicas"]["peers"].as_array().unwrap().len(), 3);

    // A fail-over: the writer is told, and the next one meets the new primary.
    register(&example, ["replica", "primary", "replica"]);
    watch("the old session is closed", || writer.is_closed().then_some(()).ok_or(String::new()));
    watch("the new primary", || {
        open(writers).and_then(|it| if it.name == "pg-21" { Ok(()) } else { Err(it.name.clone()) })
    });
    // Without replicas the primary reads.
    for n in [0, 2] {
        example.stage.consul.maintenance(&format!("pg-{n}"), true, "a test");
    }
    watch("the primary reads", || {
        open(readers).and_then(|it| if it.name == "pg-21" { Ok(()) } else { Err(it.name.clone()) })
    });
    drop(nginx);
}

#[test]
fn example_status() {
    let mut example = Example::read("status.conf");
    let status = (example.stage.net.ip(90), example.stage.net.port()).into();
    example.put("listen 127.0.0.1:8081;", &format!("listen {status};"));
    let one = example.instance("web", "web-1");
    example.register(std::slice::from_ref(&one.service));
    let nginx = example.start();
    serves(nginx.addr(), &["web-1"]);
    let page = http::get(status, "/?format=html").unwrap();
    assert!(page.status == 200 && page.text().contains("web-1"), "{}", page.text());
    assert_eq!(http::get(status, "/").unwrap().json()["upstreams"]["web"]["zone"], "web");
    let metrics = http::get(status, "/?format=prometheus").unwrap().text();
    assert!(metrics.contains("service_id=\"web-1\""), "{metrics}");
    // What the requests above have left: each line is one object.
    let log = example.stage.dir.join("nginx/access.log");
    let line = watch("a line of a request that was served", || {
        let log = std::fs::read_to_string(&log).map_err(text)?;
        let lines = log.lines().map(serde_json::from_str::<serde_json::Value>);
        let lines: Vec<_> = lines.collect::<Result<_, _>>().map_err(text)?;
        lines.into_iter().find(|line| line["instance"] == "web-1").ok_or(log)
    });
    assert_eq!(line["status"], 200, "{line}");
    assert_eq!(line["tried"], one.addr().to_string(), "{line}");
    assert_eq!(line["node"], example.stage.consul.node(), "{line}");
    assert_eq!(line["datacenter"], "dc1", "{line}");
}

/// An example that nobody tests would be worth little.
#[test]
fn every_example_has_a_test() {
    let mut names: Vec<String> =
        std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("nginx-conf"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            // The rules for Prometheus are tested where its metrics are made.
            .filter(|name| name.ends_with(".conf"))
            .collect();
    names.sort();
    let tested = [
        "classic.conf",
        "databases.conf",
        "datacenters.conf",
        "minimal.conf",
        "secure.conf",
        "services.conf",
        "status.conf",
    ];
    assert_eq!(names, tested);
}
