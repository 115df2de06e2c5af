//! Agents that ask for tokens, and tokens for tests.

use std::sync::atomic::{AtomicU32, Ordering};

use serde_json::{Value, json};

use super::{Builder, Consul};

/// The token that may do anything, on every agent with ACLs. All methods of [`Consul`] send it.
pub const MASTER_TOKEN: &str = "6d617374-6572-4f66-8e61-746573746265";

/// The header in which Consul takes a token.
pub(super) const HEADER: &str = "x-consul-token";

/// A token with rights of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Token {
    /// What is sent.
    pub secret: String,
    /// What it is called where it is managed.
    pub accessor: String,
    policy: Value,
}

impl Builder {
    /// With ACLs: what no token allows is denied.
    #[must_use]
    pub fn acl(mut self) -> Builder {
        self.acl = true;
        self
    }
}

impl Consul {
    /// A token with the rights that these rules give, in HCL:
    /// `service "web" { policy = "read" } node_prefix "" { policy = "read" }`.
    pub fn token(&self, rules: &str) -> Token {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("rules-{}", COUNT.fetch_add(1, Ordering::Relaxed));
        let policy = json!({ "Name": name, "Rules": rules });
        let policy = self.put("/v1/acl/policy", &policy.to_string()).json();
        let token = json!({ "Policies": [{ "ID": policy["ID"] }] });
        let token = self.put("/v1/acl/token", &token.to_string()).json();
        let text = |name: &str| token[name].as_str().expect("a token has its IDs").to_owned();
        Token { secret: text("SecretID"), accessor: text("AccessorID"), policy }
    }

    /// Gives a token other rights. Servers know at once; other agents remember what they were told
    /// of a token for half a minute.
    pub fn set_rules(&self, token: &Token, rules: &str) {
        let id = token.policy["ID"].as_str().expect("a policy has an ID");
        let policy = json!({ "ID": id, "Name": token.policy["Name"], "Rules": rules });
        self.put(&format!("/v1/acl/policy/{id}"), &policy.to_string());
    }

    /// Deletes a token: from then on it is an unknown one.
    pub fn revoke(&self, token: &Token) {
        let path = format!("/v1/acl/token/{}", token.accessor);
        super::succeeded("DELETE", &path, self.raw("DELETE", &path, ""));
    }

    /// Whether the ACLs work already: servers agree on them some time after they have a leader.
    pub(super) fn tokens_can_be_made(&self) -> Result<(), String> {
        match self.raw("GET", "/v1/acl/policies", "") {
            Ok(answer) if answer.status == 200 => Ok(()),
            Ok(answer) => Err(format!("ACLs: {}", answer.text())),
            Err(error) => Err(error.to_string()),
        }
    }
}

/// The agent's own token is the master's as well, so that it can register its node.
pub(super) fn config((major, minor): (u32, u32)) -> String {
    let master = if (major, minor) >= (1, 11) { "initial_management" } else { "master" };
    format!(
        "acl {{ enabled = true default_policy = \"deny\" \
         tokens {{ {master} = \"{MASTER_TOKEN}\" agent = \"{MASTER_TOKEN}\" }} }}"
    )
}

#[cfg(test)]
mod tests {
    use crate::{Check, Dir, Net, Service, Status};

    use super::*;

    const HEALTH: &str = "/v1/health/service/web";
    const READ: &str = r#"service "web" { policy = "read" } node_prefix "" { policy = "read" }"#;

    /// The status of an answer with this token, and how many instances it has.
    fn seen(consul: &Consul, token: Option<&str>) -> (u16, Option<usize>) {
        let header = token.map(|token| (HEADER, token));
        let answer = consul.raw_with("GET", HEALTH, header.as_slice(), "").unwrap();
        let instances = (answer.status == 200).then(|| answer.json().as_array().unwrap().len());
        (answer.status, instances)
    }

    #[test]
    fn a_token_sees_what_its_rules_allow() {
        for persistent in [false, true] {
            let (net, dir) = (Net::isolated(), Dir::new("consul_acl"));
            let mut builder = Consul::builder(&net, &dir).acl();
            if persistent {
                builder = builder.persistent();
            }
            let consul = builder.start();
            let service = Service::new("web", "web-1", (net.ip(20), 80).into()).check(Check::ttl());
            consul.register(&service);

            assert_eq!(seen(&consul, Some(MASTER_TOKEN)), (200, Some(1)));
            assert_eq!(seen(&consul, Some(&consul.token(READ).secret)), (200, Some(1)));
            let service_only = consul.token(r#"service "web" { policy = "read" }"#);
            assert_eq!(seen(&consul, Some(&service_only.secret)), (200, Some(0)));
            assert_eq!(seen(&consul, None), (200, Some(0)));
            assert_eq!(seen(&consul, Some("nobody's")), (403, None));
        }
    }

    #[test]
    fn rights_can_be_taken_away() {
        let (net, dir) = (Net::isolated(), Dir::new("consul_acl_revoked"));
        let consul = Consul::builder(&net, &dir).acl().start();
        consul.register(&Service::new("web", "web-1", (net.ip(20), 80).into()));
        let token = consul.token(READ);
        assert_eq!(seen(&consul, Some(&token.secret)), (200, Some(1)));
        consul.set_rules(&token, "");
        assert_eq!(seen(&consul, Some(&token.secret)), (200, Some(0)));
        consul.set_rules(&token, READ);
        assert_eq!(seen(&consul, Some(&token.secret)), (200, Some(1)));
        consul.revoke(&token);
        assert_eq!(seen(&consul, Some(&token.secret)), (403, None));
    }

    #[test]
    fn every_method_works_with_acls() {
        let (net, dir) = (Net::isolated(), Dir::new("consul_acl_methods"));
        let mut consul = Consul::builder(&net, &dir).acl().start();
        let service = Service::new("web", "web-1", (net.ip(20), 80).into()).check(Check::ttl());
        consul.register(&service);
        let index = consul.index("web");
        consul.check("web-1", Status::Critical);
        assert!(consul.wait_change("web", index).1 > index);
        consul.maintenance("web-1", true, "a test");
        consul.node_maintenance(true);
        consul.deregister("web-1");
        assert!(consul.health("web").is_empty());
        consul.restart();
        consul.register(&service);
    }
}
