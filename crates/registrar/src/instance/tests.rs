use super::*;
use crate::container::Container;
use crate::labels::Labels;

fn settings() -> Settings {
    Settings { host: "vm".into(), health: true, ..Settings::default() }
}

fn port(text: &str) -> Port {
    Port::parse(text).unwrap()
}

fn bound(ip: &str, port: u16) -> Binding {
    Binding { ip: ip.into(), port }
}

/// A container of a Compose project with one published port.
fn web() -> Container {
    Container {
        id: "c1".into(),
        name: "shop-web-1".into(),
        image: "registry:5000/team/web:1".into(),
        created: "2026-01-01T00:00:00".into(),
        network_mode: "shop_default".into(),
        networks: network("shop_default", "172.20.0.2"),
        ports: BTreeMap::from([(
            port("80/tcp"),
            vec![bound("0.0.0.0", 32768), bound("::", 32769)],
        )]),
        ..Container::default()
    }
}

fn network(name: &str, ip: &str) -> BTreeMap<String, Network> {
    let network = Network { id: format!("id of {name}"), ip: ip.into() };
    BTreeMap::from([(name.into(), network)])
}

fn labelled(labels: &[(&str, &str)]) -> Container {
    Container { labels: Labels::new([], labels.iter().copied()), ..web() }
}

#[track_caller]
fn one(settings: &Settings, container: &Container) -> Registration {
    let found = instances(settings, container, None);
    let [instance] = &found.instances[..] else { panic!("one instance: {found:?}") };
    instance.registration.clone()
}

fn at(settings: &Settings, container: &Container) -> (String, u16) {
    let one = one(settings, container);
    (one.address, one.port)
}

fn pair(address: &str, port: u16) -> (String, u16) {
    (address.to_owned(), port)
}

/// The names of all instances, in the order of their ports.
fn names(settings: &Settings, container: &Container) -> Vec<String> {
    let found = instances(settings, container, None).instances;
    found.into_iter().map(|instance| instance.registration.name).collect()
}

#[test]
fn a_container_without_labels() {
    let web = one(&settings(), &web());
    assert_eq!((web.id.as_str(), web.name.as_str()), ("vm:shop-web-1:80", "web"));
    assert_eq!((web.address.as_str(), web.port), ("", 32768));
    assert!(web.tags.is_empty() && web.checks.is_empty() && !web.enable_tag_override);
    assert_eq!(web.meta["registrar_owner"], "vm");
    assert_eq!(web.meta["registrar_container"], "c1");
    assert_eq!(web.meta.len(), 3);
}

#[test]
fn names_come_from_images() {
    for (image, is) in [
        ("nginx", "nginx"),
        ("nginx:1.28", "nginx"),
        ("registry:5000/team/x:tag", "x"),
        ("team/x@sha256:0123", "x"),
        ("team/x:tag@sha256:0123", "x"),
    ] {
        let container = Container { image: image.into(), ..web() };
        assert_eq!(one(&settings(), &container).name, is, "{image}");
    }
}

#[test]
fn names_come_from_compose_where_that_is_asked_for() {
    let compose = Settings { name_from_compose: true, ..settings() };
    let container = Container { compose_service: Some("front".into()), ..web() };
    assert_eq!(one(&compose, &container).name, "front");
    assert_eq!(one(&settings(), &container).name, "web");
    assert_eq!(one(&compose, &web()).name, "web");
    let labelled = Container {
        compose_service: Some("front".into()),
        ..labelled(&[("SERVICE_NAME", "shop")])
    };
    assert_eq!(one(&compose, &labelled).name, "shop");
}

#[test]
fn several_ports() {
    let mut two = labelled(&[("SERVICE_443_NAME", "secure"), ("SERVICE_443_ID", "x")]);
    two.ports.insert(port("443/tcp"), vec![bound("", 443)]);
    two.ports.insert(port("8080/tcp"), vec![]);
    assert_eq!(names(&settings(), &two), ["web-80", "secure"]);
    let internal = Settings { internal: true, ..settings() };
    assert_eq!(names(&internal, &two), ["web-80", "secure", "web-8080"]);

    // Those that are ignored count, as with registrator.
    let mut two = labelled(&[("SERVICE_443_IGNORE", "yes"), ("SERVICE_NAME", "shop")]);
    two.ports.insert(port("443/tcp"), vec![bound("", 443)]);
    assert_eq!(names(&settings(), &two), ["shop-80"]);
    // So do both protocols of one port.
    let mut two = web();
    two.ports.insert(port("80/udp"), vec![bound("", 443)]);
    assert_eq!(names(&settings(), &two), ["web-80", "web-80"]);
}

#[test]
fn only_what_has_a_name_where_that_is_asked_for() {
    let explicit = Settings { explicit: true, name_from_compose: true, ..settings() };
    let compose = Container { compose_service: Some("front".into()), ..web() };
    assert!(names(&explicit, &compose).is_empty());
    assert_eq!(names(&explicit, &labelled(&[("SERVICE_NAME", "a")])), ["a"]);
    assert_eq!(names(&explicit, &labelled(&[("SERVICE_80_NAME", "a")])), ["a"]);
    assert!(names(&explicit, &labelled(&[("SERVICE_81_NAME", "a")])).is_empty());
}

#[test]
fn ids_tags_and_meta() {
    let mut container = labelled(&[
        ("SERVICE_ID", "own"),
        ("SERVICE_TAGS", r"a\,b,c"),
        ("SERVICE_NGINX_WEIGHT", "3"),
        ("SERVICE_REGISTRAR_HASH", "mine"),
    ]);
    let tagged = Settings { tags: vec!["all".into()], ..settings() };
    let web = one(&tagged, &container);
    assert_eq!((web.id.as_str(), &web.tags[..]), ("own", &["a,b", "c", "all"].map(Into::into)[..]));
    assert_eq!(web.meta["nginx_weight"], "3");
    assert_ne!(web.meta["registrar_hash"], "mine");
    assert_eq!(instances(&tagged, &container, None).complaints.len(), 1);

    container.labels = Labels::new([], [("SERVICE_TAGS", "a"), ("SERVICE_53_TAGS", "b")]);
    container.ports = BTreeMap::from([(port("53/udp"), vec![bound("", 53)])]);
    let dns = one(&tagged, &container);
    assert_eq!(dns.id, "vm:shop-web-1:53:udp");
    assert_eq!(dns.tags, ["b", "all", "udp"]);
}

#[test]
fn ignoring() {
    let with = |value| instances(&settings(), &labelled(&[("SERVICE_IGNORE", value)]), None);
    for value in ["true", "yes", "x"] {
        assert_eq!(with(value), Instances::default());
    }
    let odd = with("false");
    assert!(odd.instances.is_empty());
    assert!(odd.complaints[0].contains("even \"false\""), "{odd:?}");
    assert_eq!(with("").instances.len(), 1);
}

#[test]
fn the_hosts_address() {
    let mut container = web();
    let mut settings = settings();
    assert_eq!(at(&settings, &container), pair("", 32768));
    settings.host_address = Some("10.0.0.1".parse().unwrap());
    assert_eq!(at(&settings, &container), pair("10.0.0.1", 32768));
    container.ports.insert(port("80/tcp"), vec![bound("192.0.2.1", 8080)]);
    assert_eq!(at(&settings, &container), pair("192.0.2.1", 8080));
    settings.ip = Some("10.9.9.9".into());
    assert_eq!(at(&settings, &container), pair("10.9.9.9", 8080));
}

#[test]
fn which_binding() {
    for (bindings, is) in [
        (vec![bound("127.0.0.1", 1), bound("::", 2), bound("10.0.0.1", 3)], pair("10.0.0.1", 3)),
        (vec![bound("::", 1), bound("0.0.0.0", 2)], pair("", 2)),
        (vec![bound("::1", 1), bound("127.0.0.1", 2)], pair("::1", 1)),
        (vec![bound("fd00::1", 1)], pair("fd00::1", 1)),
        (vec![bound("", 1)], pair("", 1)),
    ] {
        let mut container = web();
        container.ports.insert(port("80/tcp"), bindings.clone());
        assert_eq!(at(&settings(), &container), is, "{bindings:?}");
    }
}

#[test]
fn the_containers_own_address() {
    let internal = Settings { internal: true, ..settings() };
    let mut container = web();
    container.ports.insert(port("80/tcp"), vec![]);
    assert_eq!(at(&internal, &container), pair("172.20.0.2", 80));

    // The one of the mode, by name or ID; else the first by name.
    container.networks.extend(network("a", "10.0.1.1"));
    container.networks.extend(network("z", "10.0.2.1"));
    assert_eq!(at(&internal, &container), pair("172.20.0.2", 80));
    container.network_mode = "id of z".into();
    assert_eq!(at(&internal, &container), pair("10.0.2.1", 80));
    container.network_mode = "gone".into();
    assert_eq!(at(&internal, &container), pair("10.0.1.1", 80));
    container.network_mode = "default".into();
    container.networks.extend(network("bridge", "172.17.0.2"));
    assert_eq!(at(&internal, &container), pair("172.17.0.2", 80));

    // The option, and over it the label.
    let named = Settings { network: Some("z".into()), ..internal };
    assert_eq!(at(&named, &container), pair("10.0.2.1", 80));
    container.labels = Labels::new([], [("SERVICE_NETWORK", "a")]);
    assert_eq!(at(&named, &container), pair("10.0.1.1", 80));
}

#[test]
fn no_address_is_no_registration() {
    let internal = Settings { internal: true, ..settings() };
    let says = |settings: &Settings, container: &Container| {
        let found = instances(settings, container, None);
        assert!(found.instances.is_empty(), "{found:?}");
        found.complaints.join(";")
    };
    let mut container = web();
    container.networks = network("shop_default", "");
    assert!(says(&internal, &container).contains("no address in the network \"shop_default\" yet"));
    container.networks.clear();
    assert!(says(&internal, &container).contains("in no network"));
    let named = Settings { network: Some("front".into()), ..internal.clone() };
    assert!(says(&named, &web()).contains("not in the network \"front\""));
    // A label with an address needs none.
    container.ip_label = Some("192.0.2.7".into());
    assert_eq!(at(&internal, &container), pair("192.0.2.7", 80));
}

#[test]
fn an_address_from_a_label() {
    let with = |label: &str| at(&settings(), &Container { ip_label: Some(label.into()), ..web() });
    assert_eq!(with("192.0.2.7/24"), pair("192.0.2.7", 32768));
    assert_eq!(with("192.0.2.7"), pair("192.0.2.7", 32768));
    assert_eq!(with(""), pair("", 32768));
    assert_eq!(with("/24"), pair("", 32768));
}

#[test]
fn the_hosts_network() {
    let mut container = Container { network_mode: "host".into(), ..web() };
    container.ports.insert(port("80/tcp"), vec![]);
    container.networks = network("host", "");
    for internal in [false, true] {
        let settings = Settings { internal, ip: Some("10.0.0.1".into()), ..settings() };
        assert_eq!(at(&settings, &container), pair("10.0.0.1", 80));
    }
}

#[test]
fn another_containers_network() {
    let target = Container { id: "t1".into(), ..web() };
    let mut sidecar = Container {
        id: "s1".into(),
        name: "sidecar".into(),
        network_mode: "container:t1".into(),
        networks: BTreeMap::new(),
        ..web()
    };
    sidecar.ports = BTreeMap::from([(port("80/tcp"), vec![]), (port("9/tcp"), vec![])]);
    let registered = |settings: &Settings, target| {
        let found = instances(settings, &sidecar, target).instances.into_iter();
        found
            .map(|one| (one.registration.id, one.registration.address, one.registration.port))
            .collect::<Vec<_>>()
    };
    let wanted = ("vm:sidecar:80".to_owned(), "172.20.0.2".to_owned(), 80);
    let internal = Settings { internal: true, ..settings() };
    assert_eq!(registered(&internal, Some(&target))[1], wanted);
    assert_eq!(registered(&settings(), Some(&target)), [(wanted.0, String::new(), 32768)]);
    assert!(registered(&internal, None).is_empty());
    let ended = Container { state: State::Ended(0), ..target.clone() };
    assert!(registered(&internal, Some(&ended)).is_empty());
}

#[track_caller]
fn checked(settings: &Settings, labels: &[(&str, &str)]) -> Check {
    let one = one(&Settings { ip: Some("10.0.0.1".into()), ..settings.clone() }, &labelled(labels));
    let [check] = &one.checks[..] else { panic!("one check: {one:?}") };
    assert_eq!(check.id, "service:vm:shop-web-1:80");
    check.clone()
}

#[test]
fn checks() {
    let settings = settings();
    let http = checked(
        &settings,
        &[
            ("SERVICE_CHECK_HTTP", "health?a"),
            ("SERVICE_CHECK_HTTP_METHOD", "HEAD"),
            ("SERVICE_CHECK_TCP", "true"),
            ("SERVICE_CHECK_INTERVAL", "3s"),
            ("SERVICE_CHECK_TIMEOUT", "1s"),
            ("SERVICE_CHECK_INITIAL_STATUS", "passing"),
            ("SERVICE_CHECK_DEREGISTER_AFTER", "10m"),
        ],
    );
    let wanted = Check {
        id: http.id.clone(),
        http: Some("http://10.0.0.1:32768/health?a".into()),
        method: Some("HEAD".into()),
        interval: Some("3s".into()),
        timeout: Some("1s".into()),
        status: Some("passing".into()),
        deregister_critical_service_after: Some("10m".into()),
        ..Check::default()
    };
    assert_eq!(http, wanted);

    let labels = [("SERVICE_CHECK_HTTPS", "/"), ("SERVICE_CHECK_HTTPS_METHOD", "POST")];
    let https = checked(&settings, &labels);
    assert_eq!(https.http.as_deref(), Some("https://10.0.0.1:32768/"));
    assert_eq!((https.method.as_deref(), https.interval.as_deref()), (Some("POST"), Some("10s")));

    let ttl = checked(&settings, &[("SERVICE_CHECK_TTL", "30s"), ("SERVICE_CHECK_TIMEOUT", "1s")]);
    assert_eq!((ttl.ttl.as_deref(), ttl.interval, ttl.timeout), (Some("30s"), None, None));
    let tcp = checked(&settings, &[("SERVICE_CHECK_TCP", "x")]);
    assert_eq!(tcp.tcp.as_deref(), Some("10.0.0.1:32768"));

    let skip = ("SERVICE_CHECK_TLS_SKIP_VERIFY", "1");
    let grpc = checked(&settings, &[("SERVICE_CHECK_GRPC", "true"), skip]);
    assert_eq!(grpc.grpc.as_deref(), Some("10.0.0.1:32768"));
    assert!(!grpc.grpc_use_tls && !grpc.tls_skip_verify);
    let use_tls = ("SERVICE_CHECK_GRPC_USE_TLS", "1");
    let grpc = checked(&settings, &[("SERVICE_CHECK_GRPC", "true"), use_tls, skip]);
    assert!(grpc.grpc_use_tls && grpc.tls_skip_verify);
}

#[test]
fn scripts_need_an_option() {
    let labels = [("SERVICE_CHECK_SCRIPT", "probe $SERVICE_IP $SERVICE_PORT; true")];
    let found = instances(&settings(), &labelled(&labels), None);
    assert!(found.instances[0].registration.checks.is_empty());
    assert!(found.complaints[0].contains("--allow-script-checks"), "{found:?}");
    let scripts = Settings { script_checks: true, ..settings() };
    assert_eq!(checked(&scripts, &labels).args, ["sh", "-c", "probe 10.0.0.1 32768; true"]);

    let cmd = [("SERVICE_CHECK_CMD", "x"), ("SERVICE_CHECK_TCP", "x")];
    let found = instances(&scripts, &labelled(&cmd), None);
    assert!(found.instances[0].registration.checks.is_empty());
    assert!(found.complaints[0].contains("CHECK_CMD"), "{found:?}");
}

#[test]
fn checks_of_odd_addresses() {
    let check = |ip: &str| {
        let settings =
            Settings { ip: Some(ip.into()).filter(|ip: &String| !ip.is_empty()), ..settings() };
        let found = instances(&settings, &labelled(&[("SERVICE_CHECK_HTTP", "/")]), None);
        let url = found.instances[0].registration.checks[0].http.clone().unwrap();
        (url, found.complaints.len())
    };
    assert_eq!(check("fd00::1"), ("http://[fd00::1]:32768/".into(), 0));
    assert_eq!(check(""), ("http://127.0.0.1:32768/".into(), 1));
}

#[test]
fn dockers_own_check() {
    let sick = |labels| Container { health: Some(Health::Unhealthy), ..labelled(labels) };
    let found = instances(&settings(), &sick(&[]), None).instances;
    assert_eq!(found[0].health, Some(Health::Unhealthy));
    let [check] = &found[0].registration.checks[..] else { panic!("one check") };
    assert_eq!(
        (check.id.as_str(), check.ttl.as_deref()),
        ("docker:vm:shop-web-1:80", Some("87600h"))
    );

    let without = Settings { health: false, ..settings() };
    for (settings, labels) in [(without, &[][..]), (settings(), &[("SERVICE_CHECK_DOCKER", "off")])]
    {
        let found = instances(&settings, &sick(labels), None).instances;
        assert!(found[0].health.is_none() && found[0].registration.checks.is_empty());
    }
    // What it says is no reason to register anew.
    let well = Container { health: Some(Health::Healthy), ..web() };
    let hash = |container: &Container| one(&settings(), container).hash().to_owned();
    assert_eq!(hash(&well), hash(&sick(&[])));
    assert_ne!(hash(&well), hash(&web()));
}

#[test]
fn the_older_container_keeps_an_id() {
    let labels = Labels::new([], [("SERVICE_ID", "same")]);
    let old = Container { id: "old".into(), labels: labels.clone(), ..web() };
    let young = Container {
        id: "a young one".into(),
        created: "2026-01-01T00:00:00.5".into(),
        labels,
        ..web()
    };
    let desired = Desired::new(&settings(), [&young, &old].into_iter(), |_| None);
    assert_eq!(desired.instances["same"].registration.container(), "old");
    assert_eq!(desired.instances.len(), 1);
    assert!(desired.complaints["a young one"][0].contains("is that of old"));
}

#[test]
fn a_paused_container() {
    let paused = Container { state: State::Paused, ..web() };
    assert!(instances(&settings(), &paused, None).instances[0].paused);
}
