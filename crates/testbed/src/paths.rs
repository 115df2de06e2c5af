//! Where the binaries are that the tests run: as the environment says, else where the build put
//! them.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::SystemTime;

/// The protocols of nginx that there is a module for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    Http,
    /// TCP and UDP.
    Stream,
}

impl Protocol {
    /// The name of its block in a configuration.
    pub fn block(self) -> &'static str {
        match self {
            Protocol::Http => "http",
            Protocol::Stream => "stream",
        }
    }

    /// The name under which packages and configurations know its module.
    pub fn module_name(self) -> String {
        format!("ngx_{}_consul_upstream_module.so", self.block())
    }

    fn variable(self, http: &'static str, stream: &'static str) -> &'static str {
        match self {
            Protocol::Http => http,
            Protocol::Stream => stream,
        }
    }
}

/// Cargo's target directory, in which this executable is.
pub fn build_dir() -> &'static Path {
    static FOUND: OnceLock<PathBuf> = OnceLock::new();
    FOUND.get_or_init(|| {
        // Cargo marks the top of its target directory with this file; builds for a named target
        // lie one level deeper than others, so counting levels would not do.
        let profile = profile_dir();
        profile
            .ancestors()
            .find(|dir| dir.join("CACHEDIR.TAG").exists())
            .or(profile.parent())
            .expect("an executable of cargo's lies in its target directory")
            .to_owned()
    })
}

/// The directory of this build's profile, as target/release: tests are in its `deps`, examples
/// in its `examples`, and the module right in it.
fn profile_dir() -> PathBuf {
    let exe = env::current_exe().expect("the path of this executable");
    let dir = exe.parent().expect("an executable lies in a directory");
    match dir.file_name().and_then(|name| name.to_str()) {
        Some("deps" | "examples") => dir.parent().unwrap_or(dir).to_owned(),
        _ => dir.to_owned(),
    }
}

/// The module: `MODULE_SO` or `STREAM_MODULE_SO`, else this build's.
pub fn module(of: Protocol) -> Result<PathBuf, String> {
    let file = format!("lib{}", of.module_name());
    built(&file, of.variable("MODULE_SO", "STREAM_MODULE_SO"))
}

/// The module with failpoints: `FAILPOINTS_SO` or `STREAM_FAILPOINTS_SO`, else this build's.
pub fn failpoints(of: Protocol) -> Result<PathBuf, String> {
    let file = format!("libngx_{}_consul_upstream_failpoints.so", of.block());
    built(&file, of.variable("FAILPOINTS_SO", "STREAM_FAILPOINTS_SO"))
}

/// A balancing method that is none of nginx's, for both protocols: `FOREIGN_METHOD_SO`, else this build's.
pub fn foreign_method() -> Result<PathBuf, String> {
    built("libngx_foreign_method_module.so", "FOREIGN_METHOD_SO")
}

/// nginx's own stream module, where it is not built in: `NGINX_STREAM_SO`.
pub fn nginx_stream() -> Result<Option<PathBuf>, String> {
    from_env("NGINX_STREAM_SO")
}

fn built(file: &str, variable: &str) -> Result<PathBuf, String> {
    if let Some(path) = from_env(variable)? {
        return Ok(path);
    }
    let path = profile_dir().join(file);
    if path.exists() {
        Ok(path)
    } else {
        let path = path.display();
        Err(format!("there is no module at {path}: run `make test`, or set {variable}"))
    }
}

/// The registrar: `REGISTRAR_BIN`, else the one that cargo has built for its tests.
pub fn registrar(built: &str) -> Result<PathBuf, String> {
    Ok(from_env("REGISTRAR_BIN")?.unwrap_or_else(|| built.into()))
}

/// The nginx: `NGINX_BIN`, else the newest that this build has made from source.
pub fn nginx() -> Result<PathBuf, String> {
    if let Some(path) = from_env("NGINX_BIN")? {
        return Ok(path);
    }
    let builds = profile_dir().join("build");
    let age = |path: &PathBuf| -> SystemTime {
        fs::metadata(path).and_then(|data| data.modified()).unwrap_or(SystemTime::UNIX_EPOCH)
    };
    fs::read_dir(&builds)
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok())
        .filter(|entry| entry.file_name().to_string_lossy().starts_with("nginx-sys-"))
        .map(|entry| entry.path().join("out/objs/nginx"))
        .filter(|path| path.exists())
        .max_by_key(age)
        .ok_or_else(|| {
            format!(
                "there is no nginx under {}: run `make build`, or set NGINX_BIN",
                builds.display()
            )
        })
}

/// The Consul: `CONSUL_BIN`, else the one on the PATH, else the one in the build directory.
pub fn consul() -> Result<PathBuf, String> {
    if let Some(path) = from_env("CONSUL_BIN")? {
        return Ok(path);
    }
    let on_path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&on_path)
        .map(|dir| dir.join("consul"))
        .chain([build_dir().join("consul/consul")])
        .find(|path| path.is_file())
        .ok_or_else(|| {
            "there is no consul on the PATH nor in the build directory: run \
             `scripts/fetch-consul`, which unpacks Debian's package there, or set CONSUL_BIN to the path of a consul binary"
                .into()
        })
}

fn from_env(name: &str) -> Result<Option<PathBuf>, String> {
    match env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from) {
        Some(path) if !path.exists() => {
            Err(format!("{name} is {}, and there is nothing there", path.display()))
        }
        found => Ok(found),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_build_directory_is_above_this_test() {
        let exe = env::current_exe().unwrap();
        assert!(exe.starts_with(profile_dir()), "{}", exe.display());
        assert!(profile_dir().starts_with(build_dir()));
    }
}
