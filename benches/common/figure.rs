//! The one table of all benchmarks: each adds its figures to a file, and `scripts/bench-table` prints
//! them.

use std::env;
use std::fs::OpenOptions;
use std::io::Write;

/// The file, where there is to be such a table.
const FILE: &str = "BENCH_TABLE";

/// A figure of ours, beside the rival's and what it may be at most.
pub struct Figure<'a> {
    /// The benchmark's name.
    pub bench: &'a str,
    /// What it is, and its unit.
    pub what: &'a str,
    /// Ours.
    pub ours: f64,
    /// Who the rival is, and what it has.
    pub rival: Option<(&'a str, f64)>,
    /// At most.
    pub bar: Option<f64>,
}

impl Figure<'_> {
    /// Adds it to the table.
    pub fn note(&self) {
        let Some(file) = env::var_os(FILE).filter(|file| !file.is_empty()) else { return };
        let Figure { bench, what, ours, rival, bar } = *self;
        let (name, theirs) = rival.unzip();
        let ratio = theirs.filter(|_| ours > 0.0).map(|theirs| theirs / ours);
        let line = [
            bench.to_owned(),
            what.to_owned(),
            number(ours),
            name.unwrap_or("-").to_owned(),
            theirs.map_or("-".into(), number),
            ratio.map_or("-".into(), |ratio| format!("{} x", number(ratio))),
            bar.map_or("-".into(), number),
        ];
        let line = line.join("\t") + "\n";
        let mut file = OpenOptions::new().create(true).append(true).open(file).expect("the table");
        file.write_all(line.as_bytes()).expect("a line of the table");
    }
}

/// A number, to three digits.
fn number(n: f64) -> String {
    match n.abs() {
        0.0 => "0".into(),
        100.0.. => format!("{n:.0}"),
        10.0.. => format!("{n:.1}"),
        1.0.. => format!("{n:.2}"),
        _ => format!("{n:.3}"),
    }
}
