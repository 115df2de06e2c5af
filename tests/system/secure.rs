//! Certificates, tokens and rights: what Consul shows and what it is shown, and what goes on
//! serving while either is not as it should be.

use std::collections::BTreeSet;
use std::fs;
use std::io::Read;
use std::net::TcpListener;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::json;
use testbed::consul::Token;
use testbed::{Authority, Certificate, Consul, Dir, Load, Net, Nginx, eventually, nginx, tls};

use crate::common::{
    PATIENCE, Serve, Stage, asking, changes, connections, follower, serves, serves_now, steady,
    text, v4, watch, web,
};
use crate::fake_consul::{FakeConsul, Reply, Request, entry};

/// An upstream that lets go at once of what it believes to be gone: nothing but an error keeps it.
const WEB: &str = "consul_upstream web hold=0;";

/// For agents that are told to read their configuration again soon after a start: Consul 1.8.7 was seen to take
/// its services out of the catalog for a moment then.
const HELD: &str = "consul_upstream web;";

/// The rights that the documentation names.
const READ: &str = r#"service "web" { policy = "read" } node_prefix "" { policy = "read" }"#;

/// How long it may take until other files are in use: a look a second, and a queue of one.
const SOON: Duration = Duration::from_secs(5);

/// The lines that say why an upstream is not followed.
pub fn errors(nginx: &Nginx, upstream: &str) -> Vec<String> {
    let of = format!("consul: upstream \"{upstream}\": service \"web\" at ");
    let log = nginx.log();
    let lines = log.lines().filter(|line| line.contains("[error]") && line.contains(&of));
    lines.map(str::to_owned).collect()
}

/// Waits for such a line, which is the only one.
#[track_caller]
pub fn fails(nginx: &Nginx, upstream: &str, says: &str) {
    let lines = eventually(PATIENCE, &format!("an error of upstream {upstream}"), || {
        let lines = errors(nginx, upstream);
        (!lines.is_empty()).then_some(lines)
    });
    assert!(lines.len() == 1 && lines[0].contains(says), "not {says:?}: {lines:?}");
}

/// The lines of warnings, but for losses that Consul made up and that are held: see [`HELD`].
fn warnings(nginx: &Nginx) -> Vec<String> {
    let log = nginx.log();
    let lines = log.lines().filter(|line| line.contains("[warn]") && line.contains("consul: "));
    lines.filter(|line| !line.contains("they are held")).map(str::to_owned).collect()
}

/// The changes that took anybody out.
fn taken_out(nginx: &Nginx, upstream: &str) -> Vec<String> {
    changes(nginx, upstream).into_iter().filter(|change| change.contains("-127.")).collect()
}

// ---- certificates

/// A Consul that speaks HTTPS, and nginx's own files, for a test to replace.
struct Scene {
    net: Net,
    dir: Dir,
    ca: Authority,
    consul: Consul,
}

impl Scene {
    /// With `mutual` Consul wants a certificate from whoever comes.
    fn set(name: &str, mutual: bool) -> Scene {
        let (net, dir) = (Net::isolated(), Dir::new(name));
        let ca = Authority::new(&dir, "ca");
        let consul = Consul::builder(&net, &dir).persistent().tls(&ca, mutual).start();
        let scene = Scene { net, dir, ca, consul };
        tls::copy(&scene.ca.ca(), &scene.trusted());
        scene
    }

    /// The file that nginx reads the authorities from.
    fn trusted(&self) -> PathBuf {
        self.dir.join("trusted.pem")
    }

    /// The files that nginx reads its own certificate from.
    fn client(&self) -> Certificate {
        Certificate { cert: self.dir.join("client.pem"), key: self.dir.join("client-key.pem") }
    }

    fn ip(&self) -> String {
        self.consul.https_addr().ip().to_string()
    }

    /// A certificate for the agent, of another authority perhaps.
    fn server_of(&self, authority: &Authority) -> Certificate {
        authority.request("server").hosts(&[&self.ip()]).issue()
    }

    /// An nginx that asks by HTTPS. What a query uses was looked up when it began, so none may last
    /// long.
    fn nginx(&self) -> nginx::Builder {
        asking(&self.net, &self.dir, &self.consul.https_url())
            .http(trusts(&self.trusted()))
            .http("consul_wait 1s; consul_start_timeout 300ms;")
    }
}

fn trusts(file: &Path) -> String {
    format!("consul_ssl_trusted_certificate {};", file.display())
}

fn shows(Certificate { cert, key }: &Certificate) -> String {
    format!(
        "consul_ssl_certificate {}; consul_ssl_certificate_key {};",
        cert.display(),
        key.display()
    )
}

#[test]
fn a_consul_is_asked_by_https_alone() {
    let scene = Scene::set("https", false);
    let [one, two] = web(&scene.net);
    scene.consul.register(&one.service);
    let nginx = scene.nginx().http("consul_ssl_verify on;").workers(2).upstream("web", WEB).start();
    serves(nginx.addr(), &["web-1"]);
    scene.consul.register(&two.service);
    serves(nginx.addr(), &["web-1", "web-2"]);
    let to = |addr| connections(&nginx, follower(&nginx), v4(addr));
    eventually(PATIENCE, "one connection, by HTTPS", || {
        let to = (to(scene.consul.https_addr()), to(scene.consul.addr()));
        if to == (1, 0) { Ok(()) } else { Err(format!("{to:?}")) }
    });
    assert_eq!(errors(&nginx, "web"), Vec::<String>::new());
}

#[test]
fn the_name_in_a_certificate_is_that_of_the_host_or_of_the_directive() {
    let scene = Scene::set("server_name", false);
    let [one] = web(&scene.net);
    scene.consul.register(&one.service);
    scene.consul.install(&scene.ca.request("dc1").hosts(&["server.dc1.consul"]).issue());
    let named = |name: &str| format!("{WEB} consul_ssl_server_name {name};");
    let conf = scene
        .nginx()
        .upstream("right", &named("server.dc1.consul"))
        .upstream("wrong", &named("server.dc2.consul"))
        .upstream("unnamed", WEB);
    let mut nginx = conf.clone().start();
    let [right, wrong, unnamed] = *nginx.addrs() else { panic!("three servers") };
    serves(right, &["web-1"]);
    fails(&nginx, "wrong", "certificate not valid for name \"server.dc2.consul\"");
    fails(&nginx, "unnamed", &format!("certificate not valid for name \"{}\"", scene.ip()));
    serves_now(wrong, &["502"]);
    serves_now(unnamed, &["502"]);
    assert_eq!(errors(&nginx, "right"), Vec::<String>::new());

    nginx.write_conf(&conf.conf().replace("server.dc2.consul", "server.dc1.consul"));
    nginx.reload();
    serves(wrong, &["web-1"]);
    serves_now(unnamed, &["502"]);
}

/// Servers that have several certificates choose by it.
#[test]
fn the_name_of_the_directive_is_sent_to_the_agent() {
    let (net, dir) = (Net::isolated(), Dir::new("sni"));
    let listener = TcpListener::bind((net.ip(10), net.port())).unwrap();
    listener.set_nonblocking(true).unwrap();
    let nginx = asking(&net, &dir, &format!("https://{}", listener.local_addr().unwrap()))
        .http("consul_start_timeout 0; consul_ssl_server_name server.dc1.consul;")
        .upstream("web", WEB)
        .start();
    let (mut stream, _) = eventually(PATIENCE, "a connection", || listener.accept());
    stream.set_nonblocking(false).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut hello: Vec<u8> = Vec::new();
    let name = b"server.dc1.consul";
    while !hello.windows(name.len()).any(|part: &[u8]| part == name) {
        let mut more = [0; 4096];
        let read = stream.read(&mut more).unwrap();
        assert!(read > 0, "not in {hello:?}");
        hello.extend(&more[..read]);
    }
    drop(nginx);
}

#[test]
fn an_agent_of_an_authority_that_is_not_trusted() {
    let scene = Scene::set("untrusted", false);
    let other = Authority::new(&scene.dir, "other");
    tls::copy(&other.ca(), &scene.trusted());
    let [one] = web(&scene.net);
    scene.consul.register(&one.service);
    let nginx = scene.nginx().upstream("web", WEB).start();
    fails(&nginx, "web", "invalid peer certificate: UnknownIssuer");
    serves_now(nginx.addr(), &["502"]);
    let workers = nginx.worker_pids();

    tls::copy(&scene.ca.ca(), &scene.trusted());
    serves(nginx.addr(), &["web-1"]);
    nginx.wait_log("answers again, after ", 1, PATIENCE);
    assert_eq!(errors(&nginx, "web").len(), 1);
    assert_eq!(nginx.worker_pids(), workers);
}

#[test]
fn an_agent_whose_certificate_has_expired() {
    let scene = Scene::set("expired", false);
    let [one] = web(&scene.net);
    scene.consul.register(&one.service);
    let server = || scene.ca.request("server").hosts(&[&scene.ip()]);
    scene.consul.install(&server().expired().issue());
    let nginx = scene.nginx().upstream("web", WEB).start();
    fails(&nginx, "web", "invalid peer certificate: certificate expired");
    serves_now(nginx.addr(), &["502"]);

    scene.consul.install(&server().issue());
    let begin = Instant::now();
    serves(nginx.addr(), &["web-1"]);
    eprintln!("served {:?} after the agent had a good certificate", begin.elapsed());
    nginx.wait_log("answers again, after ", 1, PATIENCE);
    assert_eq!(errors(&nginx, "web").len(), 1);
}

#[test]
fn without_verification_any_certificate_will_do() {
    let scene = Scene::set("no_verify", false);
    let other = Authority::new(&scene.dir, "other");
    let [one] = web(&scene.net);
    scene.consul.register(&one.service);
    let host = scene.ip();
    for (name, certificate) in [
        ("unknown", scene.server_of(&other)),
        ("expired", scene.ca.request("expired").hosts(&[&host]).expired().issue()),
        ("elsewhere", scene.ca.request("elsewhere").hosts(&["elsewhere.test"]).issue()),
    ] {
        scene.consul.install(&certificate);
        let nginx = scene
            .nginx()
            .name(name)
            .upstream("careless", &format!("{WEB} consul_ssl_verify off;"))
            .upstream("careful", WEB)
            .start();
        let [careless, careful] = *nginx.addrs() else { panic!("two servers") };
        serves(careless, &["web-1"]);
        fails(&nginx, "careful", "invalid peer certificate: ");
        serves_now(careful, &["502"]);
    }
}

#[test]
fn an_agent_that_wants_a_certificate() {
    let scene = Scene::set("mutual", true);
    let other = Authority::new(&scene.dir, "other");
    let [one, two] = web(&scene.net);
    scene.consul.register(&one.service);
    let with = |certificate: &Certificate| format!("{WEB} {}", shows(certificate));
    let nginx = scene
        .nginx()
        .upstream("good", &with(&scene.ca.request("good").issue()))
        .upstream("none", WEB)
        .upstream("foreign", &with(&other.request("foreign").issue()))
        .upstream("expired", &with(&scene.ca.request("old").expired().issue()))
        .start();
    let good = nginx.addr();
    serves(good, &["web-1"]);
    scene.consul.register(&two.service);
    serves(good, &["web-1", "web-2"]);
    for (upstream, addr) in ["none", "foreign", "expired"].into_iter().zip(&nginx.addrs()[1..]) {
        // The agent's own words, which differ from version to version.
        fails(&nginx, upstream, "received fatal alert: ");
        let line = &errors(&nginx, upstream)[0];
        let says = ["Certificate", "UnknownCA"].iter().any(|words| line.contains(words));
        assert!(says, "{line}");
        serves_now(*addr, &["502"]);
    }
    assert_eq!(errors(&nginx, "good"), Vec::<String>::new());
}

/// An upstream serves. Then the agent has a certificate that is bad, new connections are made and
/// the agent restarts, and in the end it has a good one.
#[track_caller]
fn keeps_its_set_while(name: &str, bad: impl FnOnce(&Scene) -> Certificate, says: &str) {
    let mut scene = Scene::set(name, false);
    let [one, two] = web(&scene.net);
    scene.consul.register(&one.service);
    let nginx = scene.nginx().workers(2).upstream("web", WEB).start();
    serves(nginx.addr(), &["web-1"]);
    let workers = nginx.worker_pids();
    let load = Load::start(nginx.addr(), &steady());

    scene.consul.install(&bad(&scene));
    // The connections that are there stay good. With other files there are others.
    tls::copy(&scene.ca.ca(), &scene.trusted());
    fails(&nginx, "web", says);
    scene.consul.register(&two.service);
    load.wait_for(300);
    scene.consul.restart();
    load.wait_for(300);
    serves_now(nginx.addr(), &["web-1"]);

    scene.consul.install(&scene.server_of(&scene.ca));
    serves(nginx.addr(), &["web-1", "web-2"]);
    nginx.wait_log("answers again, after ", 1, PATIENCE);
    load.stop().assert_nothing_lost();
    assert_eq!(errors(&nginx, "web").len(), 1);
    assert_eq!(taken_out(&nginx, "web"), Vec::<String>::new());
    assert_eq!(nginx.worker_pids(), workers);
}

#[test]
fn a_certificate_that_expires_changes_nothing() {
    let expired = |scene: &Scene| scene.ca.request("old").hosts(&[&scene.ip()]).expired().issue();
    keeps_its_set_while("expires", expired, "invalid peer certificate: certificate expired");
}

#[test]
fn a_certificate_for_another_name_changes_nothing() {
    let other = |scene: &Scene| scene.ca.request("other").hosts(&["other.test"]).issue();
    keeps_its_set_while(
        "renamed",
        other,
        "invalid peer certificate: certificate not valid for name",
    );
}

#[test]
fn a_certificate_of_another_authority_changes_nothing() {
    let other = |scene: &Scene| scene.server_of(&Authority::new(&scene.dir, "other"));
    keeps_its_set_while("other_authority", other, "invalid peer certificate: UnknownIssuer");
}

/// As one does it who wants no error: for a while both authorities are trusted.
#[test]
fn the_agents_authority_is_replaced_step_by_step() {
    let mut scene = Scene::set("authority_rotation", false);
    let next = Authority::new(&scene.dir, "next");
    let [one, two, three] = web(&scene.net);
    scene.consul.register(&one.service);
    let nginx = scene.nginx().workers(2).upstream("web", WEB).start();
    serves(nginx.addr(), &["web-1"]);
    let workers = nginx.worker_pids();
    let load = Load::start(nginx.addr(), &steady());

    let both = [scene.ca.ca(), next.ca()].map(|ca| fs::read_to_string(ca).unwrap()).concat();
    tls::replace(&scene.trusted(), both);
    scene.consul.install(&scene.server_of(&next));
    tls::copy(&next.ca(), &scene.trusted());
    scene.consul.register(&two.service);
    serves(nginx.addr(), &["web-1", "web-2"]);
    assert_eq!(errors(&nginx, "web"), Vec::<String>::new());

    // No connection is left from before.
    scene.consul.restart();
    scene.consul.register(&three.service);
    serves(nginx.addr(), &["web-1", "web-2", "web-3"]);
    load.stop().assert_nothing_lost();
    assert!(errors(&nginx, "web").len() <= 1, "{:?}", errors(&nginx, "web"));
    assert_eq!(warnings(&nginx), Vec::<String>::new());
    assert_eq!(nginx.worker_pids(), workers);
}

/// As it happens: the agent is first, and nginx is told later.
#[test]
fn the_agents_authority_is_replaced_at_once() {
    let mut scene = Scene::set("authority_change", false);
    let next = Authority::new(&scene.dir, "next");
    let [one, two] = web(&scene.net);
    scene.consul.register(&one.service);
    let nginx = scene.nginx().workers(2).upstream("web", WEB).start();
    serves(nginx.addr(), &["web-1"]);
    let workers = nginx.worker_pids();
    let load = Load::start(nginx.addr(), &steady());

    scene.consul.install(&scene.server_of(&next));
    scene.consul.restart();
    scene.consul.register(&two.service);
    load.wait_for(500);
    serves_now(nginx.addr(), &["web-1"]);
    assert_eq!(errors(&nginx, "web").len(), 1);

    tls::copy(&next.ca(), &scene.trusted());
    let begin = Instant::now();
    serves(nginx.addr(), &["web-1", "web-2"]);
    let took = begin.elapsed();
    eprintln!("followed {took:?} after the file was replaced");
    assert!(took < SOON, "{took:?}");
    load.stop().assert_nothing_lost();
    assert_eq!(errors(&nginx, "web").len(), 1);
    assert_eq!(nginx.worker_pids(), workers);
}

#[test]
fn our_own_certificate_is_replaced() {
    let mut scene = Scene::set("client_rotation", true);
    let [second, third] = ["second", "third"].map(|name| Authority::new(&scene.dir, name));
    let [one, two, three, four] = web(&scene.net);
    scene.ca.request("client").issue().replace(&scene.client());
    scene.consul.register(&one.service);
    let nginx = scene.nginx().http(shows(&scene.client())).workers(2).upstream("web", HELD).start();
    serves(nginx.addr(), &["web-1"]);
    let workers = nginx.worker_pids();
    let load = Load::start(nginx.addr(), &steady());

    // For a moment the key is without its certificate.
    scene.consul.trust(&[&scene.ca, &second]);
    let client = second.request("client").issue();
    tls::copy(&client.key, &scene.client().key);
    tls::copy(&client.cert, &scene.client().cert);
    scene.consul.trust(&[&second]);
    scene.consul.restart();
    scene.consul.register(&two.service);
    serves(nginx.addr(), &["web-1", "web-2"]);
    assert_eq!(warnings(&nginx), Vec::<String>::new());

    // And for so long that it is worth a line: what fits together stays in use.
    let client = third.request("client").issue();
    tls::copy(&client.key, &scene.client().key);
    let Certificate { cert, key } = scene.client();
    let lines = nginx.wait_log("the old one stays", 1, PATIENCE);
    let says = format!("certificate \"{}\" with key \"{}\": ", cert.display(), key.display());
    assert!(lines[0].contains("[warn]") && lines[0].contains(&says), "{lines:?}");
    scene.consul.register(&three.service);
    serves(nginx.addr(), &["web-1", "web-2", "web-3"]);
    scene.consul.trust(&[&third]);
    tls::copy(&client.cert, &scene.client().cert);
    scene.consul.restart();
    scene.consul.register(&four.service);
    serves(nginx.addr(), &["web-1", "web-2", "web-3", "web-4"]);

    load.stop().assert_nothing_lost();
    assert_eq!(warnings(&nginx).len(), 1);
    // That the agent was away, twice within a minute.
    assert_eq!(errors(&nginx, "web").len(), 1);
    assert_eq!(nginx.worker_pids(), workers);
}

// ---- files that the workers may not read

/// The same nginx, with workers that are nobody's; none where that cannot be, and why.
fn as_nobody(dir: &Dir, conf: &nginx::Builder) -> Result<nginx::Builder, String> {
    if fs::metadata("/proc/self").unwrap().uid() != 0 {
        return Err("only root can start an nginx with workers of another user".into());
    }
    let closed = |dir: &&Path| fs::metadata(dir).unwrap().mode() & 0o001 == 0;
    if let Some(closed) = dir.path().ancestors().find(closed) {
        return Err(format!("workers of another user could not enter {}", closed.display()));
    }
    let groups = fs::read_to_string("/etc/group").unwrap_or_default();
    let group = ["nogroup", "nobody"]
        .into_iter()
        .find(|name| groups.lines().any(|line| line.starts_with(&format!("{name}:"))))
        .ok_or("there is no group for nobody")?;
    let text = conf.conf();
    let other = text.replacen("user root;", &format!("user nobody {group};"), 1);
    assert_ne!(text, other);
    Ok(conf.clone().text(other))
}

/// Puts another file in the place of one, which root alone may read.
fn replace_by_secret(path: &Path, text: impl AsRef<[u8]>) {
    let new = path.with_extension("secret");
    fs::write(&new, text).unwrap();
    fs::set_permissions(&new, fs::Permissions::from_mode(0o600)).unwrap();
    fs::rename(new, path).unwrap();
}

#[test]
fn a_new_key_that_the_workers_may_not_read() {
    let mut scene = Scene::set("unreadable_key", true);
    let next = Authority::new(&scene.dir, "next");
    let client = scene.client();
    let put = |from: &Certificate| {
        replace_by_secret(&client.key, fs::read(&from.key).unwrap());
        tls::copy(&from.cert, &client.cert);
    };
    put(&scene.ca.request("client").issue());
    let conf = scene.nginx().http(shows(&client)).workers(2).upstream("web", HELD);
    let conf = match as_nobody(&scene.dir, &conf) {
        Ok(conf) => conf,
        Err(why) => return eprintln!("SKIPPED: {why}"),
    };
    let [one, two, three] = web(&scene.net);
    scene.consul.register(&one.service);
    let mut nginx = conf.start();
    serves(nginx.addr(), &["web-1"]);
    let load = Load::start(nginx.addr(), &steady());

    scene.consul.trust(&[&scene.ca, &next]);
    put(&next.request("client").issue());
    let lines = nginx.wait_log("the old one stays", 1, PATIENCE);
    let says = format!("\"{}\": Permission denied", client.key.display());
    assert!(lines[0].contains("[warn]") && lines[0].contains(&says), "{lines:?}");
    scene.consul.register(&two.service);
    serves(nginx.addr(), &["web-1", "web-2"]);
    assert_eq!(errors(&nginx, "web"), Vec::<String>::new());

    nginx.reload();
    scene.consul.trust(&[&next]);
    scene.consul.restart();
    scene.consul.register(&three.service);
    serves(nginx.addr(), &["web-1", "web-2", "web-3"]);
    load.stop().assert_nothing_lost();
    assert_eq!(warnings(&nginx).len(), 1);
}

#[test]
fn a_new_token_that_the_workers_may_not_read() {
    let stage = Stage::with("unreadable_token", |consul| consul.acl());
    let file = stage.dir.join("token");
    let (old, new) = (stage.consul.token(READ), stage.consul.token(READ));
    replace_by_secret(&file, &old.secret);
    let conf = stage
        .nginx()
        .http(format!("consul_token_file {}; consul_wait 1s;", file.display()))
        .workers(2)
        .upstream("web", WEB);
    let conf = match as_nobody(&stage.dir, &conf) {
        Ok(conf) => conf,
        Err(why) => return eprintln!("SKIPPED: {why}"),
    };
    let [one, two, three] = stage.web();
    stage.register([&one]);
    let mut nginx = conf.start();
    serves_now(nginx.addr(), &["web-1"]);
    let load = Load::start(nginx.addr(), &steady());

    replace_by_secret(&file, &new.secret);
    let lines = nginx.wait_log("the old one stays", 1, PATIENCE);
    let says = format!("\"{}\": Permission denied", file.display());
    assert!(lines[0].contains("[warn]") && lines[0].contains(&says), "{lines:?}");
    stage.register([&two]);
    serves(nginx.addr(), &["web-1", "web-2"]);

    // The old one it is, until the reload.
    stage.consul.revoke(&old);
    stage.register([&three]);
    fails(&nginx, "web", "permission denied (403)");
    load.wait_for(200);
    serves_now(nginx.addr(), &["web-1", "web-2"]);
    nginx.reload();
    serves(nginx.addr(), &["web-1", "web-2", "web-3"]);
    load.stop().assert_nothing_lost();
    assert_eq!(warnings(&nginx).len(), 1);
}

// ---- rights

/// Whose rights a test takes away.
enum Sends {
    /// Those of a token.
    Token,
    /// Those of whoever sends none.
    Nothing,
}

/// An upstream serves an instance on the node `n1` and one on `n2`. Then the rights become less and
/// something changes, and in the end the rights are as they were.
#[track_caller]
fn keeps_what_it_may_not_read(name: &str, sends: Sends, rules: &str, says: &str) {
    let stage = Stage::with(name, |consul| consul.acl());
    let [one, two, three] = stage.web();
    stage.register([&one]);
    let addr = two.addr();
    let elsewhere = json!({
        "Node": "n2",
        "Address": addr.ip().to_string(),
        "Service":
            { "ID": "web-2", "Service": "web", "Address": addr.ip().to_string(), "Port": addr.port() },
    });
    stage.consul.put("/v1/catalog/register", &elsewhere.to_string());

    let token = stage.consul.token(READ);
    let with = match sends {
        Sends::Token => format!("consul_token {};", token.secret),
        Sends::Nothing => {
            share_with_anybody(&stage.consul, &token);
            String::new()
        }
    };
    let nginx = stage.nginx().http(with).workers(2).upstream("web", WEB).start();
    serves_now(nginx.addr(), &["web-1", "web-2"]);
    let load = Load::start(nginx.addr(), &steady());

    stage.consul.set_rules(&token, rules);
    stage.register([&three]);
    fails(&nginx, "web", &format!("permission denied: {says}"));
    load.wait_for(300);
    serves_now(nginx.addr(), &["web-1", "web-2"]);

    stage.consul.set_rules(&token, READ);
    serves(nginx.addr(), &["web-1", "web-2", "web-3"]);
    nginx.wait_log("answers again, after ", 1, PATIENCE);
    load.stop().assert_nothing_lost();
    assert_eq!(errors(&nginx, "web").len(), 1);
    assert_eq!(taken_out(&nginx, "web"), Vec::<String>::new());
    // What is gone in truth goes.
    stage.consul.deregister("web-1");
    serves(nginx.addr(), &["web-2", "web-3"]);
}

/// Gives the rights of a token to whoever comes without one.
fn share_with_anybody(consul: &Consul, token: &Token) {
    const ANONYMOUS: &str = "00000000-0000-0000-0000-000000000002";
    let token = consul.get(&format!("/v1/acl/token/{}", token.accessor));
    let rights = json!({ "AccessorID": ANONYMOUS, "Policies": token["Policies"] });
    consul.put(&format!("/v1/acl/token/{ANONYMOUS}"), &rights.to_string());
}

const SERVICE: &str = r#"service "web" { policy = "read" }"#;
const NODES: &str = r#"node_prefix "" { policy = "read" }"#;

/// What is missing, as the log says it.
fn needs(right: &str) -> String {
    format!("the answer may lack what the token may not read, it needs {right}")
}

#[test]
fn a_token_that_may_read_no_nodes_any_more_changes_nothing() {
    let says = needs(r#"node "n1" { policy = "read" }"#);
    keeps_what_it_may_not_read("service_only", Sends::Token, SERVICE, &says);
}

#[test]
fn a_token_that_may_not_read_one_of_the_nodes_any_more_changes_nothing() {
    let rules = format!(r#"{SERVICE} node "n1" {{ policy = "read" }}"#);
    let says = needs(r#"node "n2" { policy = "read" }"#);
    keeps_what_it_may_not_read("one_node", Sends::Token, &rules, &says);
}

#[test]
fn a_token_that_may_not_read_the_service_any_more_changes_nothing() {
    keeps_what_it_may_not_read("node_only", Sends::Token, NODES, &needs(SERVICE));
}

#[test]
fn a_token_that_may_read_nothing_any_more_changes_nothing() {
    keeps_what_it_may_not_read("no_rights", Sends::Token, "", &needs(SERVICE));
}

#[test]
fn without_a_token_the_rights_of_anybody_hold() {
    keeps_what_it_may_not_read("anonymous", Sends::Nothing, "", &needs(SERVICE));
}

#[test]
fn at_a_start_with_too_few_rights_the_log_names_what_is_missing() {
    let stage = Stage::with("cold_rights", |consul| consul.acl());
    let [one] = stage.web();
    stage.register([&one]);
    let [service, nodes, nothing] =
        [SERVICE, NODES, r#"key_prefix "" { policy = "read" }"#].map(|it| stage.consul.token(it));
    let with = |token: &Token| format!("{WEB} consul_token {};", token.secret);
    let nginx = stage
        .nginx()
        .http("consul_start_timeout 300ms;")
        .upstream("service", &with(&service))
        .upstream("nodes", &with(&nodes))
        .upstream("nothing", &with(&nothing))
        .upstream("anonymous", WEB)
        .start();
    for (upstream, right) in
        [("service", NODES), ("nodes", SERVICE), ("nothing", SERVICE), ("anonymous", SERVICE)]
    {
        fails(&nginx, upstream, &format!("permission denied: {}", needs(right)));
    }
    for addr in nginx.addrs() {
        serves_now(*addr, &["502"]);
    }
    for token in [&service, &nodes, &nothing] {
        stage.consul.set_rules(token, READ);
    }
    share_with_anybody(&stage.consul, &nothing);
    for addr in nginx.addrs() {
        serves(*addr, &["web-1"]);
    }
}

/// An empty answer is believed of who has the rights, or needs none.
#[test]
fn a_service_that_nobody_runs_is_no_error() {
    let stage = Stage::with("nobody_runs", |consul| consul.acl());
    let token = stage.consul.token(READ);
    let [one] = stage.web();
    let nginx =
        stage.nginx().http(format!("consul_token {};", token.secret)).upstream("web", WEB).start();
    nginx.wait_log("\"web\": 0 of 0 instances serve", 1, PATIENCE);
    stage.register([&one]);
    serves(nginx.addr(), &["web-1"]);
    stage.consul.deregister("web-1");
    serves(nginx.addr(), &["502"]);
    assert_eq!(errors(&nginx, "web"), Vec::<String>::new());
}

/// Consul says so itself from version 1.11 on.
#[test]
fn an_answer_that_says_that_it_is_not_whole_changes_nothing() {
    let (net, dir) = (Net::isolated(), Dir::new("filtered"));
    let fake = FakeConsul::start(&net);
    let [one, two] = web(&net);
    let both = [entry("web-1", one.addr()), entry("web-2", two.addr())];
    fake.know(5, &both);
    let nginx = asking(&net, &dir, &fake.url()).upstream("web", WEB).start();
    serves_now(nginx.addr(), &["web-1", "web-2"]);
    let part = Reply::health(6, &both[..1]).header("X-Consul-Results-Filtered-By-ACLs", "true");
    fake.answer(part);
    fails(&nginx, "web", "permission denied: the answer lacks what the token may not read");
    fake.wait_requests(2);
    serves_now(nginx.addr(), &["web-1", "web-2"]);
    // The same without that header is the truth.
    fake.know(7, &both[..1]);
    serves(nginx.addr(), &["web-1"]);
}

// ---- tokens

#[test]
fn a_revoked_token_changes_nothing_and_a_good_one_is_used_soon() {
    let stage = Stage::with("revoked", |consul| consul.acl());
    let [one, two] = stage.web();
    stage.register([&one]);
    let (old, new) = (stage.consul.token(READ), stage.consul.token(READ));
    let file = stage.dir.write("token", &old.secret);
    let nginx = stage
        .nginx()
        .http(format!("consul_token_file {};", file.display()))
        .workers(2)
        .upstream("web", WEB)
        .start();
    serves_now(nginx.addr(), &["web-1"]);
    let workers = nginx.worker_pids();
    let load = Load::start(nginx.addr(), &steady());

    stage.consul.revoke(&old);
    stage.register([&two]);
    fails(&nginx, "web", "permission denied (403)");
    load.wait_for(300);
    serves_now(nginx.addr(), &["web-1"]);

    // One that is not known either is no better.
    tls::replace(&file, "00000000-dead-beef-0000-000000000000\n");
    load.wait_for(500);
    tls::replace(&file, format!("{}\n", new.secret));
    let begin = Instant::now();
    serves(nginx.addr(), &["web-1", "web-2"]);
    let took = begin.elapsed();
    eprintln!("followed {took:?} after the token was replaced");
    assert!(took < SOON, "{took:?}");
    nginx.wait_log("answers again, after ", 1, PATIENCE);
    load.stop().assert_nothing_lost();
    assert_eq!(errors(&nginx, "web").len(), 1);
    assert_eq!(taken_out(&nginx, "web"), Vec::<String>::new());
    assert_eq!(nginx.worker_pids(), workers);
}

#[test]
fn tokens_rotate_while_requests_flow() {
    let stage = Stage::with("token_rotation", |consul| consul.acl());
    let [one] = stage.web();
    stage.register([&one]);
    let mut old = stage.consul.token(READ);
    let file = stage.dir.write("token", &old.secret);
    let nginx = stage
        .nginx()
        .http(format!("consul_token_file {}; consul_wait 1s;", file.display()))
        .workers(2)
        .upstream("web", WEB)
        .start();
    serves_now(nginx.addr(), &["web-1"]);
    let workers = nginx.worker_pids();
    let load = Load::start(nginx.addr(), &steady());

    // The one before is revoked as soon as there is another one: a query may be under way with it,
    // and the next change has to arrive all the same.
    let mut known = one.service.clone();
    for round in 0..4 {
        let new = stage.consul.token(READ);
        tls::replace(&file, &new.secret);
        stage.consul.revoke(&old);
        old = new;
        known = known.weights(2 + round, 1);
        let begin = Instant::now();
        let before = changes(&nginx, "web").len();
        stage.consul.register(&known);
        eventually(SOON, "the change is in the log", || changes(&nginx, "web").len() > before);
        eprintln!("round {round}: the change arrived after {:?}", begin.elapsed());
    }
    load.stop().assert_nothing_lost();
    assert!(errors(&nginx, "web").len() <= 1, "{:?}", errors(&nginx, "web"));
    assert_eq!(taken_out(&nginx, "web"), Vec::<String>::new());
    assert_eq!(nginx.worker_pids(), workers);
}

/// While both are good nobody notices.
#[test]
fn a_token_that_is_replaced_in_time_is_no_error() {
    let (net, dir) = (Net::isolated(), Dir::new("token_in_time"));
    let fake = FakeConsul::start(&net);
    let [one, two] = web(&net);
    let both = [entry("web-1", one.addr()), entry("web-2", two.addr())];
    let file = dir.write("token", "old");
    fake.know(5, &both[..1]);
    let nginx = asking(&net, &dir, &fake.url())
        .http(format!("consul_token_file {};", file.display()))
        .upstream("web", WEB)
        .start();
    serves_now(nginx.addr(), &["web-1"]);
    let load = Load::start(nginx.addr(), &steady());
    let looks = || {
        let until = load.report().elapsed + Duration::from_millis(2500);
        eventually(PATIENCE, "two looks at the files", || load.report().elapsed > until);
    };

    fs::remove_file(&file).unwrap();
    looks();
    tls::replace(&file, "new\n");
    looks();
    // The query that waits is the last one with the old token.
    fake.know(6, &both);
    serves(nginx.addr(), &["web-1", "web-2"]);
    eventually(PATIENCE, "a query after that", || {
        fake.requests().last().is_some_and(|request| request.index() == Some(6))
    });
    for request in fake.requests() {
        let expected = if request.index() == Some(6) { "new" } else { "old" };
        assert_eq!(request.headers["x-consul-token"], expected, "{request:?}");
    }
    assert_eq!(errors(&nginx, "web"), Vec::<String>::new());
    assert_eq!(warnings(&nginx), Vec::<String>::new());

    // One that is empty, and stays so, is worth a line, and the one before stays in use.
    tls::replace(&file, "\n");
    let lines = nginx.wait_log("the old one stays", 1, PATIENCE);
    let says = format!("the token in \"{}\" is empty", file.display());
    assert!(lines[0].contains("[warn]") && lines[0].contains(&says), "{lines:?}");
    fake.know(7, &both[..1]);
    serves(nginx.addr(), &["web-1"]);
    eventually(PATIENCE, "a query after that", || {
        fake.requests().last().is_some_and(|request| request.index() == Some(7))
    });
    assert_eq!(fake.requests().last().unwrap().headers["x-consul-token"], "new");
    load.stop().assert_nothing_lost();
    assert_eq!(warnings(&nginx).len(), 1);
}

// ---- secrets

/// What must not be found, and where it was looked for.
struct Secrets(Vec<String>);

impl Secrets {
    fn add_key(&mut self, file: &Path) {
        let text = fs::read_to_string(file).unwrap();
        self.0.extend(text.lines().filter(|line| !line.starts_with("-----")).map(str::to_owned));
    }

    /// The secrets that a text holds.
    fn within(&self, text: impl AsRef<[u8]>) -> BTreeSet<&str> {
        let text = text.as_ref();
        let holds = |secret: &&str| {
            text.windows(secret.len()).any(|part| part.eq_ignore_ascii_case(secret.as_bytes()))
        };
        self.0.iter().map(String::as_str).filter(holds).collect()
    }

    #[track_caller]
    fn not_in(&self, place: impl std::fmt::Display, text: impl AsRef<[u8]>) {
        let text = text.as_ref();
        let found = self.within(text);
        assert!(found.is_empty(), "{place} has {found:?}: {}", String::from_utf8_lossy(text));
    }

    /// Looks into every file under a directory but these.
    #[track_caller]
    fn not_under(&self, dir: &Path, but: &[&str]) -> usize {
        let mut files = 0;
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if but.iter().any(|but| path.ends_with(but)) {
                continue;
            } else if path.is_dir() {
                files += self.not_under(&path, but);
            } else {
                self.not_in(path.display(), fs::read(&path).unwrap());
                files += 1;
            }
        }
        files
    }
}

#[test]
fn tokens_and_keys_are_found_nowhere() {
    let (net, dir) = (Net::isolated(), Dir::new("secrets"));
    let (ca, other) = (Authority::new(&dir, "ca"), Authority::new(&dir, "other"));
    let consul = Consul::builder(&net, &dir).persistent().acl().tls(&ca, true).start();
    let [one, two] = web(&net);
    consul.register(&one.service);
    let (client, foreign) = (ca.request("client").issue(), other.request("foreign").issue());
    let tokens =
        ["unknown", "untrusted", "shut-out", "redirected", "refused", "echoed", "nonsense"];
    let token = |name: &str| format!("5ecbe7a1-f00d-cafe-beef-{name}");
    let good = consul.token(READ);
    let mut secrets = Secrets(tokens.iter().map(|name| token(name)).collect());
    secrets.0.push(good.secret.clone());
    secrets.add_key(&client.key);
    secrets.add_key(&foreign.key);
    assert!(secrets.0.len() > tokens.len() + 2, "keys have lines");

    let [redirecting, elsewhere, echoing, nonsense] =
        std::array::from_fn(|_| FakeConsul::start(&net));
    redirecting.answer(Reply::new(302, "").header("Location", &elsewhere.url()));
    // Whatever shows in an answer what it was asked, to help whoever looks for an error.
    let shown = |request: &Request| request.headers.values().cloned().collect::<Vec<_>>().join(" ");
    echoing.script(move |request| Some(Reply::new(500, shown(request))));
    nonsense.script(move |request| {
        let body = json!([{ "Node": shown(request), "Service": 1 }]).to_string();
        Some(Reply::new(200, body).header("X-Consul-Index", "9"))
    });

    // nginx's own copies, to be replaced.
    let own = Certificate { cert: dir.join("own.pem"), key: dir.join("own-key.pem") };
    let file = dir.join("token");
    client.replace(&own);
    tls::replace(&file, &good.secret);
    let refusing = format!("http://{}:{}", net.ip(11), net.port());
    let at = |url: &str, name: &str| {
        format!("{WEB} consul_address {url}; consul_token {};", token(name))
    };
    let https = consul.https_url();
    let conf = asking(&net, &dir, &https)
        .http(format!("{} {}", trusts(&ca.ca()), shows(&own)))
        .http("consul_wait 1s; consul_start_timeout 300ms;")
        .upstream("right", &format!("{WEB} consul_token_file {};", file.display()))
        .upstream("unknown", &format!("{WEB} consul_token {};", token("unknown")))
        .upstream("untrusted", &format!("{} {}", at(&https, "untrusted"), trusts(&other.ca())))
        .upstream("shut-out", &format!("{} {}", at(&https, "shut-out"), shows(&foreign)))
        .upstream("redirected", &at(&redirecting.url(), "redirected"))
        .upstream("refused", &at(&refusing, "refused"))
        .upstream("echoed", &at(&echoing.url(), "echoed"))
        .upstream("nonsense", &at(&nonsense.url(), "nonsense"));
    // Where it is said that nothing is there, something could be found.
    let text = conf.conf().replacen("access_log off;", "access_log access.log;", 1);
    assert_eq!(secrets.within(&text).len(), tokens.len());
    let mut nginx = conf.clone().text(text).workers(2).start();
    serves(nginx.addr(), &["web-1"]);
    for (upstream, says) in [
        ("unknown", "permission denied (403)"),
        ("untrusted", "UnknownIssuer"),
        ("shut-out", "received fatal alert"),
        ("redirected", "status 302"),
        ("refused", "refused"),
        ("echoed", "status 500"),
        ("nonsense", "invalid answer"),
    ] {
        fails(&nginx, upstream, says);
    }
    assert_eq!(elsewhere.connections(), 0);

    // What is wrong with new files is told, and what is in them is not.
    tls::copy(&foreign.key, &own.key);
    nginx.wait_log("the old one stays", 1, PATIENCE);
    client.replace(&own);
    tls::replace(&file, format!("{} {}", good.secret, token("unknown")));
    nginx.wait_log("the old one stays", 2, PATIENCE);
    consul.register(&two.service);
    serves(nginx.addr(), &["web-1", "web-2"]);
    tls::replace(&file, &good.secret);
    nginx.reload();
    serves(nginx.addr(), &["web-1", "web-2"]);
    watch("the set is stored", || stored(&dir, "web-2"));

    for pid in nginx.worker_pids().into_iter().chain([nginx.pid()]) {
        for name in ["cmdline", "environ"] {
            let path = format!("/proc/{pid}/{name}");
            secrets.not_in(&path, fs::read(&path).unwrap());
        }
    }
    nginx.quit();
    secrets.not_in("the error log", nginx.log());
    let files = secrets.not_under(&dir.join("nginx"), &["nginx.conf", "modules"]);
    assert!(files >= 3, "the logs, and what is stored: {files}");
    let access = fs::read_to_string(dir.join("nginx/access.log")).unwrap();
    assert!(access.contains("GET / HTTP/1.1"), "{access}");
}

/// Whether what is stored has this.
fn stored(dir: &Dir, what: &str) -> Result<(), String> {
    let files = fs::read_dir(dir.join("nginx/consul_state")).map_err(text)?;
    let all = files.map(|file| fs::read_to_string(file?.path())).collect::<Result<String, _>>();
    let all = all.map_err(text)?;
    if all.contains(what) { Ok(()) } else { Err(all) }
}

#[test]
fn a_test_of_the_configuration_repeats_no_secret() {
    let (net, dir) = (Net::isolated(), Dir::new("secrets_tested"));
    let (ca, other) = (Authority::new(&dir, "ca"), Authority::new(&dir, "other"));
    let (client, foreign) = (ca.request("client").issue(), other.request("foreign").issue());
    const TOKEN: &str = "5ecbe7a1-f00d-cafe-beef-0123456789ab";
    let mut secrets = Secrets(vec![TOKEN.into()]);
    secrets.add_key(&client.key);
    secrets.add_key(&foreign.key);
    let key = fs::read_to_string(&client.key).unwrap();
    let write = |name: &str, text: &str| dir.write(name, text).display().to_string();
    let two_tokens = write("two-tokens", &format!("{TOKEN}\n{TOKEN}\n"));
    let not_ascii = write("not-ascii", &format!("{TOKEN}ä"));
    let cut = write("cut.pem", &key[..key.len() / 2]);
    let joined = write("joined.pem", &key.replace('\n', " "));
    let damaged = write("damaged.pem", &key.replace("MI", "?!"));
    let unnamed = write("unnamed.pem", &key.replace("PRIVATE KEY", "SECRET"));
    let public = client.cert.display().to_string();
    let pair = |cert: &str, key: &str| {
        format!("consul_ssl_certificate {cert}; consul_ssl_certificate_key {key};")
    };
    let good = client.key.display().to_string();
    let mut mistakes = vec![
        format!("consul_token '{TOKEN} {TOKEN}';"),
        format!("consul_token {TOKEN}ä;"),
        format!("consul_token {TOKEN}; consul_token {TOKEN};"),
        format!("consul_token {TOKEN} {TOKEN};"),
        format!("consul_token {TOKEN}; consul_token_file {two_tokens};"),
        format!("consul_token_file {two_tokens};"),
        format!("consul_token_file {not_ascii};"),
        format!("consul_token_file {good};"),
        pair(&public, &foreign.key.display().to_string()),
        pair(&good, &good),
        pair(&public, &public),
        format!("consul_ssl_certificate_key {good};"),
        format!("consul_ssl_trusted_certificate {good};"),
    ];
    mistakes.extend([&cut, &joined, &damaged, &unnamed].map(|key| pair(&public, key)));
    for mistake in &mistakes {
        let test = asking(&net, &dir, "https://127.0.0.1:8501")
            .http(mistake)
            .upstream("web", WEB)
            .config_test();
        assert!(!test.ok && test.output.contains("[emerg]"), "{mistake}: {}", test.output);
        secrets.not_in(mistake, &test.output);
    }
    let test = asking(&net, &dir, "https://127.0.0.1:8501")
        .http(format!("{} {} consul_token {TOKEN};", pair(&public, &good), trusts(&ca.ca())))
        .upstream("web", WEB)
        .config_test();
    assert!(test.ok, "{}", test.output);
    secrets.not_in("the test of a good configuration", &test.output);
}
