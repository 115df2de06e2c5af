//! The hashes of the page's style and script, for its Content-Security-Policy.

use std::path::Path;
use std::{env, fs};

use base64::prelude::{BASE64_STANDARD, Engine};
use sha2::{Digest, Sha256};

fn main() {
    let style = hash("assets/page.css");
    let script = hash("assets/page.js");
    let policy = format!(
        "default-src 'none'; style-src '{style}'; script-src '{script}'; connect-src 'self'; \
         form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    );
    let out = env::var_os("OUT_DIR").expect("cargo sets OUT_DIR");
    fs::write(Path::new(&out).join("policy.txt"), policy).expect("OUT_DIR can be written to");
}

/// A browser hashes what stands between the tags: the file, as long as its parser changes
/// nothing of it and does not end the element early.
fn hash(path: &str) -> String {
    println!("cargo::rerun-if-changed={path}");
    let text = fs::read_to_string(path).unwrap_or_else(|error| panic!("{path}: {error}"));
    for never in ["\r", "\0", "</s", "</S", "<!--"] {
        assert!(!text.contains(never), "{path}: {never:?} cannot stand in an inline element");
    }
    format!("sha256-{}", BASE64_STANDARD.encode(Sha256::digest(text)))
}
