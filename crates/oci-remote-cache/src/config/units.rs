//! Sizes and spans of time as people write them, and back without loss.
//!
//! Text in, number out, and a message that says what would be right. Rounded figures for tables are `cli/ls.rs`.

use std::fmt::Write as _;
use std::time::Duration;

const SIZE_UNITS: &[(&str, u64)] = &[
    ("TiB", 1 << 40),
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("TB", 1_000_000_000_000),
    ("GB", 1_000_000_000),
    ("MB", 1_000_000),
    ("kB", 1_000),
    ("B", 1),
];

const TIME_UNITS: &[(&str, u64)] = &[
    ("d", 86_400_000_000_000),
    ("h", 3_600_000_000_000),
    ("m", 60_000_000_000),
    ("s", 1_000_000_000),
    ("ms", 1_000_000),
];

/// A hundred years: longer than anything is kept, short enough that adding it to a moment never overflows.
const LONGEST: Duration = Duration::from_hours(36_525 * 24);

/// A number with a fraction: `digits / 10^scale`.
#[derive(Debug, Clone, Copy)]
struct Decimal {
    digits: u128,
    scale: u32,
}

impl Decimal {
    fn parse(text: &str) -> Option<Self> {
        let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
        let all = format!("{whole}{fraction}");
        let legal = !whole.is_empty()
            && all.len() <= 20
            && all.bytes().all(|byte| byte.is_ascii_digit())
            && (text.contains('.') != fraction.is_empty());
        if !legal {
            return None;
        }
        Some(Self {
            digits: all.parse().ok()?,
            scale: u32::try_from(fraction.len()).ok()?,
        })
    }

    /// This many of `unit`, rounded down to whole ones of the smallest.
    fn times(self, unit: u64) -> Option<u64> {
        let product = self.digits.checked_mul(u128::from(unit))?;
        u64::try_from(product / 10_u128.checked_pow(self.scale)?).ok()
    }
}

/// Bytes from `50GiB`, `500MB`, `1.5 GiB` or a plain number.
pub(super) fn parse_size(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let (number, unit) = split_number(text);
    let unit = unit.trim();
    let bad = || format!("bad size {text:?}: write it like \"50GiB\", \"500MB\" or as plain bytes");
    let number = Decimal::parse(number).ok_or_else(bad)?;
    if unit.is_empty() {
        let whole = number.scale == 0;
        return number.times(1).filter(|_| whole).ok_or_else(bad);
    }
    if unit.len() == 1 && "KMGTkmgt".contains(unit) {
        let letter = unit.to_ascii_uppercase();
        return Err(format!(
            "bad size {text:?}: the unit is {letter}iB (powers of 1024) or {letter}B (powers of 1000)"
        ));
    }
    let (_, factor) = SIZE_UNITS
        .iter()
        .find(|(name, _)| name.eq_ignore_ascii_case(unit))
        .ok_or_else(bad)?;
    number.times(*factor).ok_or_else(bad)
}

/// A span of time from `1m`, `1h30m`, `1.5s` or `0s`.
pub(super) fn parse_duration(text: &str) -> Result<Duration, String> {
    let text = text.trim();
    let bad = || format!("bad duration {text:?}: write it like \"10s\", \"1m\" or \"1h30m\"");
    let mut rest = text;
    let mut nanos: u64 = 0;
    while !rest.is_empty() {
        let (number, after) = split_number(rest);
        let end = after
            .find(|character: char| !character.is_ascii_alphabetic())
            .unwrap_or(after.len());
        let (unit, after) = after.split_at(end);
        let known = TIME_UNITS.iter().find(|(name, _)| *name == unit);
        if known.is_none() && !number.is_empty() {
            let word = if unit.is_empty() { after } else { unit };
            return Err(no_unit(text, number, word.trim()));
        }
        let part = known
            .and_then(|(_, factor)| Decimal::parse(number)?.times(*factor))
            .ok_or_else(bad)?;
        nanos = nanos.checked_add(part).ok_or_else(|| too_long(text))?;
        rest = after.trim_start();
    }
    let span = Duration::from_nanos(nanos);
    if text.is_empty() {
        Err(bad())
    } else if span > LONGEST {
        Err(too_long(text))
    } else {
        Ok(span)
    }
}

/// What is wrong with `word` as the unit of `number`, and the number with the unit that was most likely meant.
fn no_unit(text: &str, number: &str, word: &str) -> String {
    let word = word.to_ascii_lowercase();
    let meant = match word.chars().next() {
        Some('m') if word.starts_with("mil") => "ms",
        Some('m') if !word.starts_with("mo") => "m",
        Some('h') => "h",
        Some('d' | 'w' | 'y') => "d",
        _ => "s",
    };
    let what = if word.is_empty() {
        "a unit is missing (ms, s, m, h or d)"
    } else {
        "a unit is ms, s, m, h or d, right behind its number"
    };
    format!("bad duration {text:?}: {what}, as in \"{number}{meant}\"")
}

fn too_long(text: &str) -> String {
    format!("bad duration {text:?}: more than a hundred years")
}

fn split_number(text: &str) -> (&str, &str) {
    let end = text
        .find(|character: char| !character.is_ascii_digit() && character != '.')
        .unwrap_or(text.len());
    text.split_at(end)
}

/// `bytes` in the largest unit that loses nothing.
pub(super) fn size_text(bytes: u64) -> String {
    let exact = SIZE_UNITS
        .iter()
        .find(|(_, factor)| bytes != 0 && bytes.is_multiple_of(*factor));
    match exact {
        Some((unit, factor)) => format!("{}{unit}", bytes / factor),
        None => format!("{bytes}B"),
    }
}

/// `span` in hours, minutes and seconds, or in milliseconds where those are needed.
pub(super) fn duration_text(span: Duration) -> String {
    if span.subsec_nanos() != 0 {
        let text = format!("{}.{:09}", span.as_secs(), span.subsec_nanos());
        return format!("{}s", text.trim_end_matches('0'));
    }
    let seconds = span.as_secs();
    let mut text = String::new();
    for (amount, unit) in [
        (seconds / 3600, 'h'),
        (seconds / 60 % 60, 'm'),
        (seconds % 60, 's'),
    ] {
        if amount != 0 {
            // Writing to a String cannot fail.
            write!(text, "{amount}{unit}").ok();
        }
    }
    if text.is_empty() {
        text.push_str("0s");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::{duration_text, parse_duration, parse_size, size_text};
    use std::time::Duration;

    #[test]
    fn sizes_with_and_without_units() {
        for (text, bytes) in [
            ("0", 0),
            ("1024", 1024),
            ("50GiB", 50 << 30),
            ("50 gib", 50 << 30),
            ("500MB", 500_000_000),
            ("1.5KiB", 1536),
            ("2TiB", 2 << 40),
            ("7B", 7),
            ("18446744073709551615", u64::MAX),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn bad_sizes_say_what_is_right() {
        for text in [
            "",
            "GiB",
            "-1",
            "1.5",
            "1.",
            ".5GiB",
            "1..5GiB",
            "10XB",
            "1e9",
            "99999999TiB",
            "18446744073709551616",
        ] {
            let error = parse_size(text).unwrap_err();
            assert!(error.starts_with("bad size"), "{text}: {error}");
        }
        assert_eq!(
            parse_size("50G"),
            Err("bad size \"50G\": the unit is GiB (powers of 1024) or GB (powers of 1000)".into())
        );
    }

    #[test]
    fn durations_with_units() {
        for (text, millis) in [
            ("0s", 0),
            ("10s", 10_000),
            ("1.5s", 1500),
            ("0.5s", 500),
            ("3600s", 3_600_000),
            ("1h30m", 5_400_000),
            ("1h 30m", 5_400_000),
            ("250ms", 250),
            ("2d", 172_800_000),
            ("36525d", 3_155_760_000_000),
        ] {
            assert_eq!(
                parse_duration(text),
                Ok(Duration::from_millis(millis)),
                "{text}"
            );
        }
    }

    #[test]
    fn bad_durations_say_what_is_right() {
        for text in [
            "",
            "s",
            "10",
            "-1s",
            "1x",
            "1.s",
            "1s30",
            "1m-",
            "36526d",
            "99999999999d",
        ] {
            let error = parse_duration(text).unwrap_err();
            assert!(error.starts_with("bad duration"), "{text}: {error}");
        }
    }

    #[test]
    fn words_for_units_are_answered_with_units() {
        for (text, example) in [
            ("5 minutes", "5m"),
            ("5min", "5m"),
            ("5 Hours", "5h"),
            ("250 millis", "250ms"),
            ("2 days", "2d"),
            ("5x", "5s"),
        ] {
            let what = "a unit is ms, s, m, h or d, right behind its number";
            let error = format!("bad duration {text:?}: {what}, as in {example:?}");
            assert_eq!(parse_duration(text), Err(error));
        }
    }

    #[test]
    fn what_is_printed_reads_back() {
        for bytes in [0, 1, 1000, 1024, 1536, 50 << 30, 500_000_000, u64::MAX] {
            assert_eq!(parse_size(&size_text(bytes)), Ok(bytes));
        }
        for millis in [0, 1, 1500, 60_000, 5_400_000, 90_061_001] {
            let span = Duration::from_millis(millis);
            assert_eq!(parse_duration(&duration_text(span)), Ok(span));
        }
        assert_eq!(size_text(50 << 30), "50GiB");
        assert_eq!(duration_text(Duration::from_mins(90)), "1h30m");
        assert_eq!(duration_text(Duration::from_millis(1500)), "1.5s");
    }
}
