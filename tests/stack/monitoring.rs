//! The profile `monitoring`: docker/prometheus.yml in a real Prometheus.

use std::collections::BTreeSet;
use std::time::Duration;

use serde_json::Value;
use testbed::{eventually, http};

use crate::stack::Stack;

/// A few of the intervals in docker/prometheus.yml.
const SCRAPED: Duration = Duration::from_secs(90);

/// What Prometheus' API answers.
fn api(stack: &Stack, path: &str) -> Result<Value, String> {
    let answer = http::get(stack.prometheus, &format!("/api/v1/{path}"));
    let answer = answer.map_err(|err| err.to_string())?;
    if answer.status == 200 { Ok(answer.json()["data"].take()) } else { Err(answer.text()) }
}

fn list(value: &Value) -> Vec<Value> {
    value.as_array().cloned().unwrap_or_default()
}

/// The targets of a job that were scraped without an error, by instance; an error where one was not.
fn targets(stack: &Stack, job: &str) -> Result<BTreeSet<String>, String> {
    let targets = list(&api(stack, "targets?state=active")?["activeTargets"]);
    let of_job = targets.into_iter().filter(|target| target["labels"]["job"] == job);
    let name = |target: Value| match (&target["health"], target["labels"]["instance"].as_str()) {
        (Value::String(health), Some(instance)) if health == "up" => Ok(instance.to_owned()),
        _ => Err(target.to_string()),
    };
    of_job.map(name).collect()
}

/// The newest values of a metric, by a label.
fn values(stack: &Stack, query: &str, label: &str) -> Result<Vec<(String, String)>, String> {
    let result = list(&api(stack, &format!("query?query={query}"))?["result"]);
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    Ok(result.iter().map(|one| (text(&one["metric"][label]), text(&one["value"][1]))).collect())
}

#[test]
fn prometheus_finds_services_through_consul_and_asks_nginx() {
    let Some(stack) = Stack::of_profile("monitoring") else { return };
    let config = ["promtool", "check", "config", "/etc/prometheus/prometheus.yml"];
    println!("{}", stack.container("prometheus").exec(&config));
    for number in [3, 1] {
        stack.scale("web", number);
        let ids: BTreeSet<String> = eventually(SCRAPED, "they are registered", || {
            let ids = stack.ids("web")?;
            if ids.len() == number { Ok(ids) } else { Err(format!("{ids:?}")) }
        });
        eventually(SCRAPED, &format!("{number} services are scraped, and nginx"), || {
            let (services, nginx) = (targets(&stack, "services")?, targets(&stack, "nginx")?);
            let all = services == ids && nginx == BTreeSet::from(["nginx:8081".to_owned()]);
            if all { Ok(()) } else { Err(format!("{services:?} and {nginx:?}")) }
        });
        eventually(SCRAPED, "their metrics, and what nginx says of them", || {
            let up = values(&stack, "nginx_consul_upstream_servers", "state")?;
            let connections = values(&stack, "nginx_connections_active", "service")?;
            let all = up.contains(&("up".to_owned(), number.to_string()))
                && connections.len() == number
                && connections.iter().all(|(service, _)| service == "web");
            if all { Ok(()) } else { Err(format!("{up:?}, {connections:?}")) }
        });
    }
    eventually(SCRAPED, "the rules are evaluated", || {
        let groups = list(&api(&stack, "rules")?["groups"]);
        let rules: Vec<Value> = groups.iter().flat_map(|group| list(&group["rules"])).collect();
        let good = rules.iter().filter(|rule| rule["health"] == "ok").count();
        if good == 3 && rules.len() == 3 { Ok(()) } else { Err(format!("{rules:?}")) }
    });
}
