//! A moment, and how it is written.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Milliseconds since 1970-01-01T00:00:00Z, leap seconds not counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Time(u64);

/// The last moment whose year has four digits.
const LAST: u64 = 253_402_300_799_999;

/// Days from 0000-03-01 to 1970-01-01 in the Gregorian calendar.
const EPOCH: u64 = 719_468;
/// Days in 400, 100, 4 years and one, as the calendar's rules for leap years give them.
const DAYS_400: u64 = 146_097;
const DAYS_100: u64 = 36_524;
const DAYS_4: u64 = 1461;
const DAYS_1: u64 = 365;
/// Days of a year that begins in March, before each of its months. The leap day is its last.
const BEFORE: [u64; 12] = [0, 31, 61, 92, 122, 153, 184, 214, 245, 275, 306, 337];

impl Time {
    /// So many milliseconds after the epoch. What is after the year 9999 is the end of it.
    pub fn from_millis(millis: u64) -> Self {
        Self(millis.min(LAST))
    }

    /// Milliseconds since the epoch.
    pub fn millis(self) -> u64 {
        self.0
    }

    /// How long it is from `earlier` to this moment; zero if it is not earlier.
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_millis(self.0.saturating_sub(earlier.0))
    }

    /// Whether both are on one day of UTC.
    pub(crate) fn same_day(self, other: Self) -> bool {
        self.day() == other.day()
    }

    fn day(self) -> u64 {
        self.0 / 86_400_000
    }

    /// `2026-03-02T14:03:11.482Z`
    pub(crate) fn iso(self) -> [u8; 24] {
        let (year, month, day) = date(self.day());
        let milli = self.0 % 1000;
        let second = self.0 / 1000 % 86_400;
        let mut out = *b"0000-00-00T00:00:00.000Z";
        let fields = [
            (0, 4, year),
            (5, 2, month),
            (8, 2, day),
            (11, 2, second / 3600),
            (14, 2, second / 60 % 60),
            (17, 2, second % 60),
            (20, 3, milli),
        ];
        for (at, digits, mut value) in fields {
            for place in out[at..at + digits].iter_mut().rev() {
                *place = b'0' + (value % 10) as u8;
                value /= 10;
            }
        }
        out
    }
}

impl From<SystemTime> for Time {
    /// What is before the epoch is the epoch.
    fn from(time: SystemTime) -> Self {
        let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
        Self::from_millis(since.as_millis().try_into().unwrap_or(u64::MAX))
    }
}

/// Year, month and day of a number of days since the epoch.
///
/// Years are counted from March, so that the leap day is the last of its year, of its four years,
/// and of its four hundred.
fn date(days: u64) -> (u64, u64, u64) {
    let days = days + EPOCH;
    let (cycle, rest) = (days / DAYS_400, days % DAYS_400);
    // The last of four has one day more than the others: without `min` that day would be a fifth.
    let century = (rest / DAYS_100).min(3);
    let rest = rest - century * DAYS_100;
    let (leap, rest) = (rest / DAYS_4, rest % DAYS_4);
    let year = (rest / DAYS_1).min(3);
    let rest = rest - year * DAYS_1;

    let month = BEFORE.partition_point(|before| *before <= rest) - 1;
    let day = rest - BEFORE[month] + 1;
    let year = 400 * cycle + 100 * century + 4 * leap + year;
    match month as u64 {
        month @ 0..=9 => (year, month + 3, day),
        month => (year + 1, month - 9, day),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn iso(millis: u64) -> String {
        String::from_utf8(Time::from_millis(millis).iso().to_vec()).unwrap()
    }

    /// Seconds as `date -u +%s -d DATE` gives them.
    #[test]
    fn known_values() {
        let table = [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_399_999, "2000-02-28T23:59:59.999Z"),
            (951_782_400_000, "2000-02-29T00:00:00.000Z"),
            (951_868_800_000, "2000-03-01T00:00:00.000Z"),
            (978_220_800_000, "2000-12-31T00:00:00.000Z"),
            (1_709_164_800_000, "2024-02-29T00:00:00.000Z"),
            (1_772_460_191_482, "2026-03-02T14:03:11.482Z"),
            (4_107_542_399_000, "2100-02-28T23:59:59.000Z"),
            (4_107_542_400_000, "2100-03-01T00:00:00.000Z"),
            (LAST, "9999-12-31T23:59:59.999Z"),
            (LAST + 1, "9999-12-31T23:59:59.999Z"),
            (u64::MAX, "9999-12-31T23:59:59.999Z"),
        ];
        for (millis, text) in table {
            assert_eq!(iso(millis), text);
        }
    }

    /// Day by day through the calendar, counted by its rules.
    #[test]
    fn every_day_of_eight_centuries() {
        let (mut year, mut month, mut day) = (1970, 1, 1);
        for days in 0..800 * 365 {
            assert_eq!(date(days), (year, month, day));
            let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
            let last = match month {
                2 => 28 + u64::from(leap),
                4 | 6 | 9 | 11 => 30,
                _ => 31,
            };
            (year, month, day) = match (month, day) {
                (12, 31) => (year + 1, 1, 1),
                (_, day) if day == last => (year, month + 1, 1),
                _ => (year, month, day + 1),
            };
        }
    }

    #[test]
    fn ages() {
        let (early, late) = (Time::from_millis(1000), Time::from_millis(3500));
        assert_eq!(late.since(early), Duration::from_millis(2500));
        assert_eq!(early.since(late), Duration::ZERO);
        assert_eq!(Time::from(UNIX_EPOCH - Duration::from_secs(1)), Time::default());
        assert_eq!(Time::from(UNIX_EPOCH + Duration::from_millis(7)).millis(), 7);
    }
}
