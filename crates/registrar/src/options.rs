//! The command line: the options of gliderlabs/registrator under their names, and ours.

use std::env;
use std::ffi::OsString;
use std::time::Duration;

use clap::{Parser, ValueEnum};
use consul_watch::agent::{Address, Agents, Secret, Token};
use consul_watch::error::printable;
use consul_watch::file::Loaded;
use consul_watch::tls::Tls;

use crate::instance::Settings;
use crate::labels::list;

/// The `-resync` that nothing, or 0, means.
const RESYNC: u64 = 60;

/// Where an agent listens whose URI names no host.
const DEFAULT_AGENT: &str = "127.0.0.1:8500";

/// Registers the containers of this host with the local Consul agent.
///
/// The options of gliderlabs/registrator are written with one dash or two.
#[derive(Debug, Parser)]
#[command(name = "registrar", version, args_override_self = true)]
pub struct Options {
    /// The agent: consul://HOST:PORT, consul-tls://HOST:PORT or consul-unix:///PATH
    #[arg(value_name = "URI")]
    uri: String,

    /// Register the container's address and the exposed port, in place of the host's and the published one
    #[arg(long, value_name = "BOOL", value_parser = boolean, num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true", hide_default_value = true)]
    internal: bool,

    /// The host's address
    #[arg(long, value_name = "ADDR", default_value = "", hide_default_value = true)]
    ip: String,

    /// The label that holds the address to register, cut at a slash
    #[arg(
        long = "useIpFromLabel",
        value_name = "LABEL",
        default_value = "",
        hide_default_value = true
    )]
    ip_from_label: String,

    /// Register only what has a SERVICE_NAME
    #[arg(long, value_name = "BOOL", value_parser = boolean, num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true", hide_default_value = true)]
    explicit: bool,

    /// Tags that all instances get, with commas between them
    #[arg(long, default_value = "", hide_default_value = true)]
    tags: String,

    /// Seconds between full comparisons with the engine
    #[arg(long, value_name = "SECONDS", default_value_t = RESYNC)]
    resync: u64,

    /// Also remove what gliderlabs/registrator left, under the IDs of this host
    #[arg(long, value_name = "BOOL", value_parser = boolean, num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true", hide_default_value = true)]
    cleanup: bool,

    /// What to do when a container ends: on-success keeps those that failed, in maintenance
    #[arg(long, value_enum, default_value_t = Deregister::Always)]
    deregister: Deregister,

    /// How often to try again to reach the agent at the start; -1: for ever
    #[arg(long, value_name = "N", default_value_t = -1, allow_negative_numbers = true)]
    retry_attempts: i64,

    /// Milliseconds between those tries
    #[arg(long, value_name = "MS", default_value_t = 2000)]
    retry_interval: u64,

    /// Ignored, as gliderlabs/registrator does with Consul
    #[arg(long, value_name = "SECONDS")]
    ttl: Option<String>,

    /// Ignored, as gliderlabs/registrator does with Consul
    #[arg(long, value_name = "SECONDS")]
    ttl_refresh: Option<String>,

    /// The first part of the IDs, and the owner of the services [default: the engine's name]
    #[arg(long, value_name = "NAME")]
    hostname: Option<String>,

    /// The network whose address -internal registers [default: the container's own]
    #[arg(long, value_name = "NAME")]
    network: Option<String>,

    /// What a service is called that has no SERVICE_NAME
    #[arg(long, value_enum, default_value_t = NameFrom::Image)]
    name_from: NameFrom,

    /// Whether Docker's HEALTHCHECK becomes a check
    #[arg(long, value_enum, default_value_t = HealthFrom::Docker)]
    health: HealthFrom,

    /// What a signal that ends a container does to its instances at once
    #[arg(long, value_enum, default_value_t = Drain::Maintenance)]
    drain: Drain,

    /// After so many seconds, or its StopTimeout if that is longer, a container that still runs is put back
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    drain_timeout: u64,

    /// Let SERVICE_CHECK_SCRIPT make the agent run commands
    #[arg(long, value_name = "BOOL", value_parser = boolean, num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true", hide_default_value = true)]
    allow_script_checks: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Deregister {
    Always,
    OnSuccess,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum NameFrom {
    Image,
    Compose,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum HealthFrom {
    Docker,
    Off,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Drain {
    Maintenance,
    Deregister,
    Off,
}

/// All that the command line and the environment say.
#[derive(Debug)]
pub struct Config {
    pub agents: Agents,
    /// Without the host, where that is the engine's to say.
    pub settings: Settings,
    pub hostname: Option<String>,
    pub resync: Duration,
    pub cleanup: bool,
    pub keep_failed: bool,
    /// None: for ever.
    pub retry_attempts: Option<u64>,
    pub retry_interval: Duration,
    pub drain: Drain,
    pub drain_timeout: Duration,
    /// What was taken otherwise than it was said.
    pub warnings: Vec<String>,
}

/// How Go's flags take a boolean.
fn boolean(text: &str) -> Result<bool, String> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        _ => Err("it must be true or false".into()),
    }
}

/// Gives options of more than one letter their second dash. A value such as `-1` stays as it is.
fn two_dashes(args: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let mut only_values = false;
    let args = args.into_iter().map(|arg| {
        let Some(text) = arg.to_str() else { return arg };
        only_values = only_values || text == "--";
        let name = text.strip_prefix('-').filter(|_| !only_values);
        match name.map(str::as_bytes) {
            Some([first, _, ..]) if first.is_ascii_alphabetic() => format!("-{text}").into(),
            _ => arg,
        }
    });
    args.collect()
}

impl Options {
    /// Reads a command line, its first element the program's name.
    pub fn read(args: impl IntoIterator<Item = OsString>) -> Result<Self, clap::Error> {
        Self::try_parse_from(two_dashes(args))
    }

    /// Puts it all together; the environment is asked through `var`.
    pub fn config(self, var: impl Fn(&str) -> Option<String>) -> Result<Config, String> {
        if self.tags.contains("{{") {
            return Err("-tags: templates are not supported, give each container its \
                        SERVICE_TAGS instead"
                .into());
        }
        let mut warnings = Vec::new();
        if self.ttl.is_some() || self.ttl_refresh.is_some() {
            let text = "-ttl and -ttl-refresh are ignored: services in Consul do not expire";
            warnings.push(text.into());
        }
        if self.resync == 0 {
            warnings.push(format!("-resync 0 is taken as {RESYNC}: only what differs is written"));
        }
        let drain_timeout = Duration::from_secs(self.drain_timeout.min(u64::from(u32::MAX)));
        let resync = if self.resync == 0 { RESYNC } else { self.resync.min(u64::from(u32::MAX)) };
        let some = |text: String| Some(text).filter(|text| !text.is_empty());
        Ok(Config {
            agents: agents(&self.uri, var)?,
            settings: Settings {
                host: String::new(),
                internal: self.internal,
                ip: some(self.ip),
                ip_from_label: some(self.ip_from_label),
                explicit: self.explicit,
                tags: list(&self.tags),
                network: self.network.and_then(some),
                name_from_compose: self.name_from == NameFrom::Compose,
                health: self.health == HealthFrom::Docker,
                script_checks: self.allow_script_checks,
                host_address: None,
            },
            hostname: self.hostname.and_then(some),
            resync: Duration::from_secs(resync),
            cleanup: self.cleanup,
            keep_failed: self.deregister == Deregister::OnSuccess,
            retry_attempts: u64::try_from(self.retry_attempts).ok(),
            retry_interval: Duration::from_millis(self.retry_interval),
            drain: self.drain,
            drain_timeout,
            warnings,
        })
    }
}

/// The environment of this process; what is empty counts as not set.
pub fn environment(name: &str) -> Option<String> {
    env::var(name).ok().filter(|value| !value.is_empty())
}

/// How the agent is reached.
fn agents(uri: &str, var: impl Fn(&str) -> Option<String>) -> Result<Agents, String> {
    let shown = printable(uri.as_bytes(), 200);
    let Some((scheme, rest)) = uri.split_once("://") else {
        return Err(format!("\"{shown}\" is no URI, it must begin with \"consul://\""));
    };
    let rest = if rest.is_empty() { DEFAULT_AGENT } else { rest };
    let url = match scheme {
        "consul" => format!("http://{rest}"),
        "consul-tls" => format!("https://{rest}"),
        "consul-unix" => format!("unix:{rest}"),
        _ => {
            return Err(format!(
                "\"{shown}\": the only back end is Consul, the URI must begin with \"consul://\", \
                 \"consul-tls://\" or \"consul-unix://\""
            ));
        }
    };
    // What is wrong with it may be that it holds credentials, which are not shown.
    let address = Address::parse(&url).map_err(|error| format!("the URI of Consul {error}"))?;
    let mut agents = Agents::at(address);
    let file = |name: &str| {
        let path = var(name)?;
        Some(Loaded::read(&path).map_err(|error| format!("{name} \"{path}\": {error}")))
    };
    // The file wins, as with Consul's own programs.
    agents.token = match (file("CONSUL_HTTP_TOKEN_FILE").transpose()?, var("CONSUL_HTTP_TOKEN")) {
        (Some(file), _) => {
            let token = Token::File(file);
            token.secret().map_err(|error| format!("CONSUL_HTTP_TOKEN_FILE {error}"))?;
            Some(token)
        }
        (None, Some(token)) => {
            let secret = Secret::new(token.as_bytes());
            Some(Token::Fixed(secret.map_err(|error| format!("CONSUL_HTTP_TOKEN {error}"))?))
        }
        (None, None) => None,
    };
    let certificate = file("CONSUL_CLIENT_CERT").transpose()?;
    let identity = match (certificate, file("CONSUL_CLIENT_KEY").transpose()?) {
        (Some(certificate), Some(key)) => Some((certificate, key)),
        (None, None) => None,
        _ => return Err("CONSUL_CLIENT_CERT and CONSUL_CLIENT_KEY need each other".into()),
    };
    agents.tls = Tls { trusted: file("CONSUL_CACERT").transpose()?, identity, ..Tls::default() };
    Ok(agents)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(args: &[&str]) -> Result<Options, clap::Error> {
        Options::read(["registrar"].iter().chain(args).map(OsString::from))
    }

    fn config(args: &[&str]) -> Result<Config, String> {
        read(args).unwrap().config(|_| None)
    }

    const URI: &str = "consul://127.0.0.1:8500";

    #[test]
    fn one_dash_or_two() {
        for dash in ["-", "--"] {
            let d = |name: &str| format!("{dash}{name}");
            let args = [
                d("internal"),
                d("ip"),
                "10.0.0.1".into(),
                d("useIpFromLabel=ip"),
                d("explicit=true"),
                d("tags"),
                "a,b".into(),
                d("resync"),
                "30".into(),
                d("cleanup"),
                d("deregister=on-success"),
                d("retry-attempts"),
                "-1".into(),
                d("retry-interval=100"),
                d("ttl"),
                "30".into(),
                d("ttl-refresh=20"),
                d("hostname"),
                "h".into(),
                URI.into(),
            ];
            let args: Vec<&str> = args.iter().map(String::as_str).collect();
            let config = config(&args).unwrap();
            let settings = &config.settings;
            assert!(settings.internal && settings.explicit && config.cleanup && config.keep_failed);
            assert_eq!(settings.ip.as_deref(), Some("10.0.0.1"));
            assert_eq!(settings.ip_from_label.as_deref(), Some("ip"));
            assert_eq!(settings.tags, ["a", "b"]);
            assert_eq!(config.resync, Duration::from_secs(30));
            assert_eq!((config.retry_attempts, config.retry_interval.as_millis()), (None, 100));
            assert_eq!(config.hostname.as_deref(), Some("h"));
            assert_eq!(config.warnings.len(), 1, "{:?}", config.warnings);
        }
    }

    #[test]
    fn defaults() {
        let config = config(&[URI]).unwrap();
        let settings = Settings { health: true, ..Settings::default() };
        assert_eq!(config.settings, settings);
        assert_eq!((config.resync.as_secs(), config.retry_interval.as_millis()), (60, 2000));
        assert_eq!((config.retry_attempts, config.hostname), (None, None));
        assert_eq!((config.drain, config.drain_timeout.as_secs()), (Drain::Maintenance, 600));
        assert!(!config.cleanup && !config.keep_failed && config.warnings.is_empty());
        assert_eq!(config.agents.addresses[0].to_string(), URI.replace("consul", "http"));
    }

    #[test]
    fn the_last_one_wins_and_booleans_are_gos() {
        assert!(!config(&["-internal", "-internal=false", URI]).unwrap().settings.internal);
        assert!(config(&["-explicit=T", URI]).unwrap().settings.explicit);
        assert_eq!(config(&["-retry-attempts=0", URI]).unwrap().retry_attempts, Some(0));
        assert!(read(&["-internal=maybe", URI]).is_err());
        let error = read(&["-nonsense", URI]).unwrap_err().to_string();
        assert!(error.contains("'--nonsense'"), "{error}");
        assert!(read(&[]).is_err());
        assert!(read(&["-deregister", "never", URI]).is_err());
    }

    #[test]
    fn a_resync_of_0_is_60() {
        let config_of_0 = config(&["-resync", "0", URI]).unwrap();
        assert_eq!(config_of_0.resync, Duration::from_secs(60));
        assert!(config_of_0.warnings[0].contains("taken as 60"));
        assert!(config(&["-drain-timeout", "18446744073709551615", URI]).is_ok());
    }

    #[test]
    fn uris() {
        let at = |uri| config(&[uri]).map(|config| config.agents.addresses[0].to_string());
        assert_eq!(at("consul://").unwrap(), "http://127.0.0.1:8500");
        assert_eq!(at("consul-tls://c:8501").unwrap(), "https://c:8501");
        assert_eq!(at("consul-unix:///run/c.sock").unwrap(), "unix:/run/c.sock");
        for (bad, says) in [
            ("127.0.0.1:8500", "is no URI"),
            ("etcd://127.0.0.1", "only back end is Consul"),
            ("consulkv://127.0.0.1/x", "only back end is Consul"),
            ("consul://127.0.0.1:8500/path", "must not have a path"),
            ("consul-unix://run/c.sock", "absolute path"),
        ] {
            let error = at(bad).unwrap_err();
            assert!(error.contains(says), "{bad}: {error}");
        }
        let secret = at("consul://user:secret@127.0.0.1").unwrap_err();
        assert!(secret.contains("credentials") && !secret.contains("secret"), "{secret}");
    }

    #[test]
    fn templates_are_refused() {
        let error = config(&["-tags", "{{.Container.Name}}", URI]).unwrap_err();
        assert!(error.contains("templates are not supported"), "{error}");
    }

    #[test]
    fn the_environment() {
        let with = |pairs: &'static [(&str, &str)]| {
            let var = |name: &str| {
                let found = pairs.iter().find(|(key, _)| *key == name);
                found.map(|(_, value)| (*value).to_owned())
            };
            read(&[URI]).unwrap().config(var)
        };
        let token = with(&[("CONSUL_HTTP_TOKEN", "secret")]).unwrap().agents.token.unwrap();
        assert_eq!(token.secret().unwrap().as_str(), "secret");
        let error = with(&[("CONSUL_HTTP_TOKEN_FILE", "/nowhere")]).unwrap_err();
        assert!(error.contains("CONSUL_HTTP_TOKEN_FILE \"/nowhere\""), "{error}");
        let error = with(&[("CONSUL_CLIENT_CERT", "/dev/null")]).unwrap_err();
        assert!(error.contains("need each other"), "{error}");
        let error = with(&[("CONSUL_HTTP_TOKEN", "a b")]).unwrap_err();
        assert!(!error.contains("a b"), "{error}");
    }
}
