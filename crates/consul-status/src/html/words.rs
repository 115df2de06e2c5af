//! Small things that the whole page writes the same way.

use std::time::Duration;

use crate::escape::Html;
use crate::model::{PeerState, Reason, Status, Sync};
use crate::out::Out;
use crate::time::Time;

impl Out<'_, Html> {
    /// A number with its noun: `1 removal`, `3 removals`.
    pub(super) fn count(&mut self, n: u64, one: &'static str, many: &'static str) -> &mut Self {
        self.grouped(n).raw(" ").raw(if n == 1 { one } else { many })
    }

    /// A number for people: `10,000`.
    pub(super) fn grouped(&mut self, n: u64) -> &mut Self {
        let scale = 10_u64.pow(n.checked_ilog10().unwrap_or(0) / 3 * 3);
        let (mut rest, mut scale) = (n, scale);
        self.number(rest / scale);
        while scale > 1 {
            rest %= scale;
            scale /= 1000;
            self.raw(",");
            let group = rest / scale;
            for digit in [group / 100, group / 10 % 10, group % 10] {
                self.number(digit);
            }
        }
        self
    }

    /// A moment: the time of day, with the date where that is not today's.
    pub(super) fn moment(&mut self, time: Time, now: Time) -> &mut Self {
        self.raw("<time datetime=\"").time(time).raw("\">");
        if !time.same_day(now) {
            self.date(time).raw(" ");
        }
        self.clock(time).raw("</time>")
    }

    /// How long something is ago, in the two largest units: `10 s`, `3 min 5 s`, `2 d 4 h`.
    pub(super) fn age(&mut self, age: Duration) -> &mut Self {
        let seconds = age.as_secs();
        let units = [(86_400, " d"), (3600, " h"), (60, " min"), (1, " s")];
        let first = units.iter().position(|(unit, _)| seconds >= *unit).unwrap_or(units.len() - 1);
        let (unit, word) = units[first];
        self.number(seconds / unit).raw(word);
        if let Some((next, word)) = units.get(first + 1)
            && seconds % unit / next > 0
        {
            self.raw(" ").number(seconds % unit / next).raw(word);
        }
        self
    }

    /// Bytes in the largest binary unit that leaves a whole number or at least ten.
    pub(super) fn size(&mut self, bytes: u64) -> &mut Self {
        match bytes {
            bytes if bytes >= 10 << 20 || bytes > 0 && bytes % (1 << 20) == 0 => {
                self.grouped(bytes >> 20).raw(" MiB")
            }
            bytes if bytes >= 10 << 10 || bytes > 0 && bytes % (1 << 10) == 0 => {
                self.grouped(bytes >> 10).raw(" KiB")
            }
            bytes => self.grouped(bytes).raw(" B"),
        }
    }

    /// A state: its sign, which is not read out, and its word.
    pub(super) fn state(&mut self, tone: Tone, word: &'static str) -> &mut Self {
        self.raw("<span class=\"").raw(tone.class()).raw("\"><span aria-hidden=\"true\">");
        self.raw(tone.sign()).raw("</span> ").raw(word).raw("</span>")
    }
}

/// How much attention something wants.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Tone {
    Good,
    Calm,
    Warn,
    Bad,
}

impl Tone {
    pub(super) fn class(self) -> &'static str {
        match self {
            Self::Good => "good",
            Self::Calm => "calm",
            Self::Warn => "warn",
            Self::Bad => "bad",
        }
    }

    pub(super) fn sign(self) -> &'static str {
        match self {
            Self::Good => "✓",
            Self::Calm => "–",
            Self::Warn => "!",
            Self::Bad => "✕",
        }
    }
}

pub(super) fn tone_of_sync(sync: Sync) -> Tone {
    match sync {
        Sync::InSync => Tone::Good,
        Sync::Held | Sync::Restored | Sync::Starting => Tone::Warn,
        Sync::Denied | Sync::Refused | Sync::Stale | Sync::Panic => Tone::Bad,
    }
}

pub(super) fn tone_of_state(state: PeerState) -> Tone {
    match state {
        PeerState::Up => Tone::Good,
        PeerState::Draining | PeerState::Down => Tone::Calm,
        PeerState::Unavail => Tone::Bad,
    }
}

pub(super) fn tone_of_status(status: Status) -> Tone {
    match status {
        Status::Passing => Tone::Good,
        Status::Warning => Tone::Warn,
        Status::Critical => Tone::Bad,
        Status::Maintenance => Tone::Calm,
    }
}

/// What a reason means.
pub(super) fn explain(reason: Reason) -> &'static str {
    match reason {
        Reason::Critical => "a check is critical",
        Reason::Warning => "a check warns",
        Reason::Maintenance => "somebody took it out",
        Reason::Tag => "it lacks a tag",
        Reason::WeightZero => "its weight is 0",
        Reason::InvalidAddress => "its address is neither an IP address nor a host name",
        Reason::Unresolved => "its host name has no known address",
        Reason::NoPort => "it has no port",
        Reason::InvalidPort => "its port is not one from 1 to 65535",
        Reason::Duplicate => "another one serves at this address",
        Reason::NotApplied => "the update it came with was refused",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(write: impl FnOnce(&mut Out<'_, Html>)) -> String {
        let mut bytes = Vec::new();
        write(&mut Out::new(&mut bytes));
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn numbers() {
        for (n, text) in [
            (0, "0"),
            (7, "7"),
            (999, "999"),
            (1000, "1,000"),
            (10_023, "10,023"),
            (1_000_001, "1,000,001"),
            (u64::MAX, "18,446,744,073,709,551,615"),
        ] {
            assert_eq!(
                written(|out| {
                    out.grouped(n);
                }),
                text
            );
        }
        assert_eq!(
            written(|out| {
                out.count(1, "one", "many");
            }),
            "1 one"
        );
        assert_eq!(
            written(|out| {
                out.count(0, "one", "many");
            }),
            "0 many"
        );
    }

    #[test]
    fn ages() {
        for (seconds, text) in [
            (0, "0 s"),
            (59, "59 s"),
            (60, "1 min"),
            (185, "3 min 5 s"),
            (3600, "1 h"),
            (3605, "1 h"),
            (7500, "2 h 5 min"),
            (86_400 * 2 + 3600 * 4 + 59, "2 d 4 h"),
        ] {
            assert_eq!(
                written(|out| {
                    out.age(Duration::from_secs(seconds));
                }),
                text
            );
        }
    }

    #[test]
    fn sizes() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1,023 B"),
            (1024, "1 KiB"),
            (40_960, "40 KiB"),
            (1 << 20, "1 MiB"),
            (1_500_000, "1,464 KiB"),
            (64 << 20, "64 MiB"),
        ] {
            assert_eq!(
                written(|out| {
                    out.size(bytes);
                }),
                text
            );
        }
    }

    #[test]
    fn moments() {
        let now = Time::from_millis(1_772_460_191_482);
        let text = written(|out| {
            out.moment(Time::from_millis(1_772_460_181_120), now);
        });
        assert_eq!(text, "<time datetime=\"2026-03-02T14:03:01.120Z\">14:03:01</time>");
        let text = written(|out| {
            out.moment(Time::default(), now);
        });
        assert!(text.ends_with(">1970-01-01 00:00:00</time>"), "{text}");
    }
}
