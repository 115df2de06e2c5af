//! Lines on standard error: one for each event, plain, and never longer than a line.

use std::collections::HashMap;
use std::fmt;
use std::io::Write;
use std::time::Duration;

use tokio::time::Instant;

/// The same trouble is not logged again within this time.
const REPEAT: Duration = Duration::from_secs(60);

/// How many troubles are remembered; beyond that, those of more than [`REPEAT`] ago are forgotten.
const REMEMBERED: usize = 1000;

pub fn line(level: &str, text: fmt::Arguments<'_>) {
    // Nobody may be reading any longer, which is no reason to stop.
    let _ = writeln!(std::io::stderr().lock(), "registrar: {level}: {text}");
}

macro_rules! notice {
    ($($text:tt)*) => { $crate::log::line("notice", format_args!($($text)*)) };
}

macro_rules! warning {
    ($($text:tt)*) => { $crate::log::line("warning", format_args!($($text)*)) };
}

macro_rules! error {
    ($($text:tt)*) => { $crate::log::line("error", format_args!($($text)*)) };
}

pub(crate) use {error, notice, warning};

/// What is worth a line again: each trouble once a minute.
#[derive(Debug, Default)]
pub struct Seldom(HashMap<String, Instant>);

impl Seldom {
    /// Whether this trouble has not been told within the last minute.
    pub fn due(&mut self, what: &str, now: Instant) -> bool {
        if self.0.len() >= REMEMBERED {
            self.0.retain(|_, told| now.duration_since(*told) < REPEAT);
        }
        match self.0.get(what) {
            Some(told) if now.duration_since(*told) < REPEAT => false,
            _ => {
                self.0.insert(what.to_owned(), now);
                true
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn each_trouble_once_a_minute() {
        let mut seldom = Seldom::default();
        assert!(seldom.due("a", Instant::now()));
        assert!(!seldom.due("a", Instant::now()));
        assert!(seldom.due("b", Instant::now()));
        tokio::time::advance(REPEAT).await;
        assert!(seldom.due("a", Instant::now()));
        for n in 0..REMEMBERED * 2 {
            tokio::time::advance(REPEAT).await;
            seldom.due(&n.to_string(), Instant::now());
        }
        assert!(seldom.0.len() <= REMEMBERED);
    }
}
