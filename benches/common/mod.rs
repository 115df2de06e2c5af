//! What the benchmarks share: how they are called, what they measure, and the rival.

use std::env;
use std::fs;
use std::time::Duration;

pub mod figure;
pub mod rival;

/// How long anything may take that is waited for.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// `--quick`, or `BENCH_QUICK` in the environment: a run of seconds that tells whether the
/// benchmark works and nothing is lost, and judges no time.
pub fn is_quick() -> bool {
    // `cargo bench` adds `--bench`, which says nothing here.
    env::args().any(|arg| arg == "--quick")
        || env::var_os("BENCH_QUICK").is_some_and(|value| !value.is_empty())
}

/// A sample's value below which so much of the sample lies.
pub fn quantile(sample: &[Duration], part: f64) -> Duration {
    let mut sorted = sample.to_vec();
    sorted.sort_unstable();
    let rank = (part * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.saturating_sub(1)).copied().unwrap_or_default()
}

pub fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// Memory of a process' own, in bytes.
pub fn resident(pid: u32) -> f64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("a process");
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).expect("proc(5)");
    line.trim().trim_end_matches(" kB").parse::<f64>().expect("a number") * 1024.0
}
