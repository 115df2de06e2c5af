//! Refuses an nginx that is too old, and wraps the inline functions and macros of the headers in `src/abi`.

use std::env;
use std::path::{Path, PathBuf};

/// The first nginx with reference counts on peers, without which a peer that serves a request
/// cannot be removed safely.
const OLDEST: u64 = 1_027_003;

fn main() {
    let mut headers: Vec<PathBuf> = std::fs::read_dir("src/abi")
        .expect("the sources")
        .map(|entry| entry.expect("the sources").path())
        .filter(|path| path.extension().is_some_and(|ending| ending == "h"))
        .collect();
    // All begin with what is common.
    headers.sort_by_key(|path| !path.ends_with("common.h"));
    for header in &headers {
        println!("cargo::rerun-if-changed={}", header.display());
    }
    println!("cargo::rustc-check-cfg=cfg(nginx_sid)");
    let known = metadata("FEATURES_CHECK");
    println!("cargo::rustc-check-cfg=cfg(ngx_feature, values({known}))");
    for feature in metadata("FEATURES").split(',') {
        println!("cargo::rustc-cfg=ngx_feature=\"{}\"", feature.trim());
    }

    let version: u64 = metadata("VERSION_NUMBER").parse().expect("nginx's version is a number");
    if version < OLDEST {
        println!(
            "cargo::error=nginx is {}, and this module needs 1.27.3 or newer: older ones have no \
             reference counts on peers",
            metadata("VERSION")
        );
        return;
    }

    let includes: Vec<PathBuf> = env::split_paths(&metadata("INCLUDE")).collect();
    // nginx-sys 0.5.0 means to set CFLAGS, and sets METADATA to "cflags=…".
    let defines = metadata("METADATA");
    let defines = defines.strip_prefix("cflags=").unwrap_or_default();
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let wrappers = out.join("inline.c");

    let bindings = bindgen::Builder::default()
        .headers(headers.iter().map(|path| path.display().to_string()))
        .clang_args(includes.iter().map(|dir| format!("-I{}", dir.display())))
        .clang_args(defines.split_whitespace())
        .allowlist_function("ngx_.*_upstream_rr_peer_free_locked")
        .allowlist_function("nginx_(request|peer_connection)_.*")
        .allowlist_var("NGINX_PEERS_.*")
        // The types are nginx-sys'.
        .allowlist_recursively(false)
        .raw_line("use nginx_sys::*;")
        .wrap_static_fns(true)
        .wrap_static_fns_path(&wrappers)
        .default_enum_style(bindgen::EnumVariation::Consts)
        .layout_tests(false)
        .use_core()
        .generate()
        .expect("bindings of the headers")
        .to_string();
    if bindings.contains("NGINX_PEERS_SID_LEN") {
        println!("cargo::rustc-cfg=nginx_sid");
    }
    std::fs::write(out.join("inline.rs"), bindings).expect("OUT_DIR can be written");

    let mut c = cc::Build::new();
    c.file(&wrappers).include(Path::new(".")).includes(&includes).warnings(false);
    for define in defines.split_whitespace() {
        c.flag(define);
    }
    c.compile("nginx_peers_inline");
}

/// What nginx-sys' build script found out about nginx.
fn metadata(name: &str) -> String {
    let name = format!("DEP_NGINX_{name}");
    println!("cargo::rerun-if-env-changed={name}");
    env::var(&name).unwrap_or_else(|_| panic!("nginx-sys sets {name}"))
}
