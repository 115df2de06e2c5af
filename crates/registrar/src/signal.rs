//! Names of signals, as they stand in a container's `StopSignal`.

/// By number, from 1 on, as Linux has them on all machines that Docker runs on but MIPS.
const NAMES: [&str; 31] = [
    "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2",
    "PIPE", "ALRM", "TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG",
    "XCPU", "XFSZ", "VTALRM", "PROF", "WINCH", "IO", "PWR", "SYS",
];

/// The first and the last of the real-time signals, as libc counts them.
const RT_MIN: i32 = 34;
const RT_MAX: i32 = 64;

/// The number of a signal that is given as `SIGQUIT`, `QUIT`, `3` or `SIGRTMIN+3`.
pub fn number(text: &str) -> Option<i32> {
    let text = text.trim().to_ascii_uppercase();
    if let Ok(number) = text.parse() {
        return Some(number).filter(|number| (1..=RT_MAX).contains(number));
    }
    let name = text.strip_prefix("SIG").unwrap_or(&text);
    let offset = |rest: &str| if rest.is_empty() { Some(0) } else { rest.parse().ok() };
    let number = if let Some(rest) = name.strip_prefix("RTMIN") {
        RT_MIN.checked_add(offset(rest)?)?
    } else if let Some(rest) = name.strip_prefix("RTMAX") {
        RT_MAX.checked_add(offset(rest)?)?
    } else {
        return i32::try_from(NAMES.iter().position(|known| *known == name)? + 1).ok();
    };
    Some(number).filter(|number| (RT_MIN..=RT_MAX).contains(number))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers() {
        for (text, is) in [
            ("SIGTERM", Some(15)),
            ("SIGQUIT", Some(3)),
            ("quit", Some(3)),
            ("15", Some(15)),
            ("SIGSYS", Some(31)),
            ("SIGRTMIN+3", Some(37)),
            ("RTMIN", Some(34)),
            ("SIGRTMAX-1", Some(63)),
            ("SIGRTMAX+1", None),
            ("SIGNONSENSE", None),
            ("0", None),
            ("65", None),
            ("", None),
        ] {
            assert_eq!(number(text), is, "{text}");
        }
    }
}
