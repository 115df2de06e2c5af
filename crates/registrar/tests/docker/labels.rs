//! Every row of the table of labels.

use serde_json::{Value, json};
use testbed::Backend;

use crate::bed::{Bed, HOST, PUBLISHED, id};

/// What the agent has of the only port of a container with these labels.
fn with(name: &str, labels: &[&str]) -> Option<(Bed, Value)> {
    let bed = Bed::new(name)?;
    let _registrar = bed.registrar(&[]);
    let web = bed.labelled(labels);
    let service = bed.registered(&id(&web, 80));
    assert_eq!(service["Port"], web.port("80/tcp"));
    Some((bed, service))
}

#[test]
fn no_labels() {
    let Some(bed) = Bed::new("no_labels") else { return };
    let _registrar = bed.registrar(&[]);
    let web = bed.labelled(&[]);
    let service = bed.registered(&id(&web, 80));
    assert_eq!(service["Service"], bed.docker.image());
    assert_eq!(
        (&service["Address"], &service["Port"]),
        (&json!("127.0.0.1"), &json!(web.port("80/tcp")))
    );
    assert_eq!((&service["Tags"], &service["EnableTagOverride"]), (&json!([]), &json!(false)));
    assert_eq!(service["Weights"], json!({ "Passing": 1, "Warning": 1 }));
    assert_eq!(service["Meta"]["registrar_owner"], HOST);
    assert_eq!(service["Meta"]["registrar_container"], web.id());
    assert!(bed.checks(&id(&web, 80)).is_empty());
    // As people and tools ask for them.
    let ours = bed.consul.get("/v1/agent/services?filter=Meta.registrar_owner%20%3D%3D%20%22h%22");
    assert!(ours.get(id(&web, 80)).is_some());
}

#[test]
fn name() {
    let Some((_bed, service)) = with("name", &["SERVICE_NAME=shop"]) else { return };
    assert_eq!(service["Service"], "shop");
}

#[test]
fn name_of_the_image_without_registry_and_tag() {
    let Some(bed) = Bed::new("image_name") else { return };
    let _registrar = bed.registrar(&[]);
    let base = bed.docker.name("app");
    let image = bed.docker.tag(&format!("registry.test:5000/team/{base}:1.2"));
    let name = bed.docker.name("web");
    let web = bed.docker.run_image(&name, &PUBLISHED, &image, "sleep 1000");
    assert_eq!(bed.registered(&id(&web, 80))["Service"], base);
}

#[test]
fn several_ports() {
    let Some(bed) = Bed::new("several_ports") else { return };
    let _registrar = bed.registrar(&[]);
    let web = bed.container(
        "web",
        &[
            "--publish=127.0.0.1::80",
            "--publish=127.0.0.1::443",
            "--publish=127.0.0.1::53/udp",
            "--publish=127.0.0.1::9",
            "--expose=8080",
            "--label=SERVICE_NAME=shop",
            "--label=SERVICE_443_NAME=secure",
            "--label=SERVICE_9_IGNORE=true",
        ],
    );
    let udp = bed.registered(&(id(&web, 53) + ":udp"));
    assert_eq!((&udp["Service"], &udp["Tags"]), (&json!("shop-53"), &json!(["udp"])));
    assert_eq!(bed.registered(&id(&web, 80))["Service"], "shop-80");
    assert_eq!(bed.registered(&id(&web, 443))["Service"], "secure");
    bed.settled();
    assert!(bed.service(&id(&web, 9)).is_none(), "ignored");
    assert!(bed.service(&id(&web, 8080)).is_none(), "not published");
}

#[test]
fn own_id() {
    let Some(bed) = Bed::new("own_id") else { return };
    let _registrar = bed.registrar(&[]);
    // Whatever it holds, it comes back as it is.
    let own = "a/b c?ä%20";
    let web = bed.labelled(&[&format!("SERVICE_ID={own}")]);
    assert_eq!(bed.registered(own)["Port"], web.port("80/tcp"));
    drop(web);
    bed.gone(own);
}

#[test]
fn tags() {
    let Some(bed) = Bed::new("tags") else { return };
    let _registrar = bed.registrar(&["-tags", "all,hosts"]);
    let web = bed.labelled(&[r"SERVICE_TAGS=a\,b,c"]);
    assert_eq!(bed.registered(&id(&web, 80))["Tags"], json!(["a,b", "c", "all", "hosts"]));
    let web = bed.labelled(&["SERVICE_TAGS=a", "SERVICE_80_TAGS=b"]);
    assert_eq!(bed.registered(&id(&web, 80))["Tags"], json!(["b", "all", "hosts"]));
}

#[test]
fn ignored() {
    let Some(bed) = Bed::new("ignored") else { return };
    let registrar = bed.registrar(&[]);
    let yes = bed.labelled(&["SERVICE_IGNORE=yes"]);
    let no = bed.labelled(&["SERVICE_IGNORE=false"]);
    let empty = bed.labelled(&["SERVICE_IGNORE="]);
    bed.registered(&id(&empty, 80));
    bed.settled();
    assert!(bed.service(&id(&yes, 80)).is_none() && bed.service(&id(&no, 80)).is_none());
    registrar.says(&format!("{}: port 80/tcp is ignored", no.name()));
    assert!(!registrar.log().contains(&format!("{}: port", yes.name())));
}

#[test]
fn precedence() {
    let Some(bed) = Bed::new("precedence") else { return };
    let _registrar = bed.registrar(&[]);
    let all = [
        "--env=SERVICE_NAME=variable",
        "--label=SERVICE_NAME=label",
        "--env=SERVICE_80_NAME=port-variable",
        "--label=SERVICE_80_NAME=port-label",
        "--label=SERVICE_80_NAME=",
    ];
    let names = ["variable", "label", "port-variable", "port-label", bed.docker.image()];
    for (n, name) in names.into_iter().enumerate() {
        let args: Vec<&str> = PUBLISHED.into_iter().chain(all[..=n].iter().copied()).collect();
        let web = bed.container("web", &args);
        assert_eq!(bed.registered(&id(&web, 80))["Service"], name);
    }
}

#[test]
fn the_rest_is_meta() {
    let long = format!("SERVICE_LONG={}", "x".repeat(513));
    let labels = ["SERVICE_NGINX_WEIGHT=3", "SERVICE_a.b=1", "SERVICE_REGISTRAR_OWNER=me", &long];
    let Some(bed) = Bed::new("meta") else { return };
    let registrar = bed.registrar(&[]);
    let web = bed.labelled(&labels);
    let meta = bed.registered(&id(&web, 80))["Meta"].clone();
    assert_eq!(meta["nginx_weight"], "3");
    assert_eq!(meta.as_object().unwrap().len(), 4, "{meta}");
    registrar.says("\"a.b\" is left out of Meta");
    registrar.says("\"long\" is left out of Meta");
}

/// As many as Consul takes, and one more.
#[test]
fn too_much_meta() {
    let Some(bed) = Bed::new("too_much_meta") else { return };
    let registrar = bed.registrar(&[]);
    let labels: Vec<String> = (0..62).map(|n| format!("SERVICE_K{n:02}=v")).collect();
    let web = bed.labelled(&labels.iter().map(String::as_str).collect::<Vec<_>>());
    let meta = bed.registered(&id(&web, 80))["Meta"].clone();
    assert_eq!(meta.as_object().unwrap().len(), 64, "{meta}");
    registrar.says("\"k61\" is left out of Meta");
}

/// A container on the host's network whose port is that of a real server of this test.
struct Served {
    bed: Bed,
    backend: Backend,
    port: u16,
    ip: String,
}

impl Served {
    fn new(name: &str) -> Option<Served> {
        let bed = Bed::with(name, |consul| consul.arg("-hcl=enable_script_checks = true"))?;
        let backend = Backend::start(&bed.net, 20, "backend");
        let (port, ip) = (backend.addr().port(), backend.addr().ip().to_string());
        Some(Served { bed, backend, port, ip })
    }

    /// Consul's check of a container with these labels, once its status is as wanted.
    fn check(&self, options: &[&str], labels: &[&str], status: &str) -> Value {
        let options: Vec<&str> =
            ["-ip", &self.ip].into_iter().chain(options.iter().copied()).collect();
        let _registrar = self.bed.registrar(&options);
        let expose = format!("--expose={}", self.port);
        let labels = labels.iter().flat_map(|label| ["--label", label]);
        let args: Vec<&str> = ["--network=host", &expose].into_iter().chain(labels).collect();
        let web = self.bed.container("web", &args);
        let id = id(&web, self.port);
        self.bed.registered(&id);
        let check = self.bed.check(&id, "service", status, |check| {
            check["Status"] == status && check["Output"] != ""
        });
        assert_eq!(self.bed.checks(&id).len(), 1);
        assert_eq!(
            self.bed.service(&id).unwrap()["Meta"]["check_interval"],
            "1s",
            "Meta has them, too"
        );
        check
    }
}

const EVERY: &str = "SERVICE_CHECK_INTERVAL=1s";

#[test]
fn check_http() {
    let Some(served) = Served::new("check_http") else { return };
    let labels = ["SERVICE_CHECK_HTTP=/well", "SERVICE_CHECK_HTTP_METHOD=PUT", EVERY];
    let output = served.check(&[], &labels, "passing")["Output"].to_string();
    let url = format!("HTTP PUT http://{}:{}/well: 200 OK", served.ip, served.port);
    assert!(output.contains(&url), "{output}");
    assert!(served.backend.requests() > 0);
}

#[test]
fn check_https() {
    let Some(served) = Served::new("check_https") else { return };
    let labels = ["SERVICE_CHECK_HTTPS=/well", "SERVICE_CHECK_HTTPS_METHOD=HEAD", EVERY];
    // The backend speaks no TLS.
    let output = served.check(&[], &labels, "critical")["Output"].to_string();
    let url = format!("https://{}:{}/well", served.ip, served.port);
    assert!(output.contains(&url) && output.contains("Head"), "{output}");
}

#[test]
fn check_tcp() {
    let Some(served) = Served::new("check_tcp") else { return };
    let check = served.check(&[], &["SERVICE_CHECK_TCP=true", EVERY], "passing");
    assert_eq!(check["Type"], "tcp");
    assert!(check["Output"].to_string().contains(&format!("{}:{}", served.ip, served.port)));
}

#[test]
fn check_grpc() {
    let Some(served) = Served::new("check_grpc") else { return };
    // The backend speaks no gRPC.
    let labels = [
        "SERVICE_CHECK_GRPC=true",
        "SERVICE_CHECK_GRPC_USE_TLS=true",
        "SERVICE_CHECK_TLS_SKIP_VERIFY=true",
        "SERVICE_CHECK_TIMEOUT=2s",
        EVERY,
    ];
    assert_eq!(served.check(&[], &labels, "critical")["Type"], "grpc");
}

#[test]
fn check_script() {
    let Some(served) = Served::new("check_script") else { return };
    let script = "SERVICE_CHECK_SCRIPT=echo $SERVICE_IP,$SERVICE_PORT; exit 1";
    let check = served.check(&["--allow-script-checks"], &[script, EVERY], "warning");
    let output = check["Output"].as_str().unwrap().trim().to_owned();
    assert_eq!(output, format!("{},{}", served.ip, served.port));
}

#[test]
fn check_script_needs_an_option() {
    let Some(bed) = Bed::with("no_script", |c| c.arg("-hcl=enable_script_checks = true")) else {
        return;
    };
    let registrar = bed.registrar(&[]);
    let web = bed.labelled(&["SERVICE_CHECK_SCRIPT=true"]);
    bed.registered(&id(&web, 80));
    registrar.says("CHECK_SCRIPT needs --allow-script-checks");
    assert!(bed.checks(&id(&web, 80)).is_empty());
}

/// The application sends its heartbeats itself, and what it said survives a registration.
#[test]
fn check_ttl() {
    let Some(bed) = Bed::new("check_ttl") else { return };
    let mut registrar = bed.registrar(&[]);
    let web = bed.labelled(&["SERVICE_CHECK_TTL=600s"]);
    let id = id(&web, 80);
    bed.registered(&id);
    let check = bed.check(&id, "service", "is critical", |check| check["Status"] == "critical");
    assert_eq!(check["Type"], "ttl");
    bed.consul.put(&format!("/v1/agent/check/pass/service:{id}"), "");
    registrar.kill();
    let _registrar = bed.registrar(&["-tags", "new"]);
    bed.until(&id, "is tagged", |service| service["Tags"] == json!(["new"]));
    assert_eq!(bed.checks(&id)[&format!("service:{id}")]["Status"], "passing");
}

#[test]
fn check_initial_status() {
    let Some(bed) = Bed::new("initial_status") else { return };
    let _registrar = bed.registrar(&[]);
    let labels = ["SERVICE_CHECK_TTL=600s", "SERVICE_CHECK_INITIAL_STATUS=warning"];
    let web = bed.labelled(&labels);
    bed.registered(&id(&web, 80));
    bed.check(&id(&web, 80), "service", "is warning", |check| check["Status"] == "warning");
}

/// Consul does not show it, but refuses what is no duration.
#[test]
fn check_deregister_after() {
    let Some(bed) = Bed::new("deregister_after") else { return };
    let _registrar = bed.registrar(&[]);
    let web = bed.labelled(&["SERVICE_CHECK_TTL=600s", "SERVICE_CHECK_DEREGISTER_AFTER=nonsense"]);
    bed.settled();
    assert!(bed.service(&id(&web, 80)).is_none(), "Consul has read it, and refused it");
    let web = bed.labelled(&["SERVICE_CHECK_TTL=600s", "SERVICE_CHECK_DEREGISTER_AFTER=72h"]);
    bed.registered(&id(&web, 80));
}

#[test]
fn only_the_first_check() {
    let Some(bed) = Bed::new("first_check") else { return };
    let _registrar = bed.registrar(&[]);
    let web = bed.labelled(&["SERVICE_CHECK_TTL=600s", "SERVICE_CHECK_TCP=true"]);
    bed.registered(&id(&web, 80));
    let checks = bed.checks(&id(&web, 80));
    assert_eq!(checks.len(), 1, "{checks:?}");
    assert_eq!(checks[&format!("service:{}", id(&web, 80))]["Type"], "ttl");
}

#[test]
fn network() {
    let Some(bed) = Bed::new("network_label") else { return };
    let network = bed.docker.network(&bed.docker.name("front"));
    let _registrar = bed.registrar(&["-internal"]);
    let label = format!("--label=SERVICE_NETWORK={}", network.name());
    let web = bed.container("web", &["--expose=80", &label]);
    bed.settled();
    assert!(bed.service(&id(&web, 80)).is_none(), "it is not in that network");
    let connect = ["network", "connect", network.name()];
    web.docker(&connect);
    let service = bed.registered(&id(&web, 80));
    assert_eq!(
        (&service["Address"], &service["Port"]),
        (&json!(web.ip(network.name())), &json!(80))
    );
    assert!(service["Meta"].get("network").is_none());
}

#[test]
fn check_docker_off() {
    let Some(bed) = Bed::new("check_docker_off") else { return };
    let _registrar = bed.registrar(&[]);
    let health = ["--health-cmd=true", "--label=SERVICE_CHECK_DOCKER=off"];
    let args: Vec<&str> = PUBLISHED.into_iter().chain(health).collect();
    let web = bed.container("web", &args);
    bed.registered(&id(&web, 80));
    bed.settled();
    assert!(bed.checks(&id(&web, 80)).is_empty());
}
