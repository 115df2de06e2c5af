//! The nginx image by itself.

use std::process::Command;

use testbed::docker::Container;
use testbed::{Docker, eventually};

use crate::stack::{PATIENCE, docker};

const IMAGE: &str = "nginx-consul";

/// What it may be larger than the official one, in bytes.
const LARGER: u64 = 12_000_000;

/// Starts the image, as a container that is removed with the value.
fn run(engine: &Docker, part: &str, args: &[&str]) -> Container {
    engine.run_plain(&engine.name(part), args, IMAGE)
}

#[test]
fn it_is_the_official_one_and_a_module() {
    if Docker::get().is_none() {
        return;
    }
    let size = |image: &str| -> u64 {
        docker(&["image", "inspect", "--format", "{{.Size}}", image]).parse().expect("a size")
    };
    let base = docker(&[
        "image",
        "inspect",
        "--format",
        "{{index .Config.Labels \"org.opencontainers.image.base.name\"}}",
        IMAGE,
    ]);
    let base = base.rsplit('/').next().expect("a name");
    let larger = size(IMAGE) - size(base);
    println!("{larger} bytes over {base}");
    assert!(larger <= LARGER, "{larger}");

    let config = |image: &str, what: &str| {
        docker(&["image", "inspect", "--format", &format!("{{{{json .Config.{what}}}}}"), image])
    };
    for what in ["Entrypoint", "Cmd", "StopSignal", "Env", "User"] {
        assert_eq!(config(IMAGE, what), config(base, what), "{what}");
    }
    let tools = "for tool in cargo rustc gcc cc make; do command -v $tool; done; true";
    let found = docker(&["run", "--rm", "--entrypoint", "sh", IMAGE, "-c", tools]);
    assert_eq!(found, "");
}

/// Neither Consul nor a service has to be there.
#[test]
fn without_a_consul_it_answers_and_is_healthy() {
    let Some(engine) = Docker::get() else { return };
    let token = "0c3a4d7e-9f6b-4f43-9d34-2b1f5f0e7c11";
    let nginx = run(
        engine,
        "alone",
        &[
            "--env=CONSUL_ADDRESS=http://127.0.0.1:8500",
            "--env=CONSUL_SERVICE=a \"quoted\" name",
            "--env=CONSUL_TAG=blue,green",
            "--env=CONSUL_PARAMETERS=guard=50% max_fails=3",
            "--env=UPSTREAM_METHOD=least_conn",
            &format!("--env=CONSUL_TOKEN={token}"),
        ],
    );
    eventually(PATIENCE, "it is healthy", || {
        let health = nginx.docker(&["inspect", "--format", "{{.State.Health.Status}}"]);
        if health == "healthy" { Ok(()) } else { Err(health) }
    });
    assert_eq!(nginx.exec("curl -s -o /dev/null -w '%{http_code}' http://127.0.0.1/"), "503");
    // Who wants to see the status from outside has to say so.
    let status = nginx.exec("curl -s 'http://127.0.0.1:8081/?format=html'");
    assert!(status.contains("upstream") && status.contains("app"), "{status}");
    let from_outside = "curl -s -o /dev/null http://$(hostname):8081/ || echo none";
    assert_eq!(nginx.exec(from_outside), "none");
    let whole = nginx.exec("nginx -T 2>/dev/null");
    for line in [
        "consul_upstream \"a \\\"quoted\\\" name\" \"tag=blue\" \"tag=green\" guard=50% max_fails=3;",
        "least_conn;",
        "consul_token_file /run/consul.token;",
    ] {
        assert!(whole.contains(line), "{line}: {whole}");
    }
    assert!(!whole.contains(token));
    assert_eq!(nginx.exec("stat -c %a /run/consul.token"), "600");
    // It can be started again, and stopped in nginx's own way.
    nginx.docker(&["restart"]);
    eventually(PATIENCE, "it answers again", || {
        nginx.exec("curl -s -o /dev/null -w '%{http_code}' http://127.0.0.1/ || true") == "503"
    });
    nginx.docker(&["stop"]);
    assert_eq!(nginx.docker(&["inspect", "--format", "{{.State.ExitCode}}"]), "0");
}

#[test]
fn without_a_service_it_is_the_official_one() {
    let Some(engine) = Docker::get() else { return };
    let nginx = run(engine, "stock", &[]);
    eventually(PATIENCE, "the welcome", || {
        let page = nginx.exec("curl -s http://127.0.0.1/ || true");
        if page.contains("Welcome to nginx") { Ok(()) } else { Err(page) }
    });
}

#[test]
fn a_configuration_of_ones_own_stays() {
    let Some(engine) = Docker::get() else { return };
    let own = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/stack/web.conf");
    let nginx = run(
        engine,
        "own",
        &["--env=CONSUL_SERVICE=web", &format!("--volume={own}:/etc/nginx/conf.d/default.conf")],
    );
    eventually(PATIENCE, "its own answer", || {
        let answer = nginx.exec("curl -s http://127.0.0.1/ || true");
        if answer == nginx.id()[..12] { Ok(()) } else { Err(answer) }
    });
    let log = Command::new("docker").args(["logs", nginx.id()]).output().expect("docker logs");
    let log = String::from_utf8_lossy(&log.stderr).into_owned();
    assert!(log.contains("is one of yours"), "{log}");
}
