//! Byte ranges: what a client asks for, what of it a body of known size has, and how an answer is labelled.
//!
//! RFC 9110, section 14. Whether a range applies at all (`If-Range`, HEAD) is decided elsewhere.

use std::fmt;

/// Ranges taken in one header. Podman's zstd:chunked asks for many; more than this is abuse.
const RANGE_LIMIT: usize = 256;

/// One range as asked, before the size is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RangeSpec {
    /// `a-b`, both ends included; `b` may lie before `a`, which no body can satisfy.
    Closed {
        /// First byte.
        first: u64,
        /// Last byte.
        last: u64,
    },
    /// `a-`
    From {
        /// First byte.
        first: u64,
    },
    /// `-n`: the last `n` bytes.
    Suffix {
        /// How many bytes.
        length: u64,
    },
}

/// A `Range` header that is to be honoured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RangeHeader(Vec<RangeSpec>);

/// A part of a body, half open: `[start, end)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Slice {
    /// First byte.
    pub start: u64,
    /// One past the last byte.
    pub end: u64,
}

/// What a body of known size has of the ranges asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resolved {
    /// One part: 206 with `Content-Range`.
    Single(Slice),
    /// Several parts, in the order asked, overlaps made one: 206 with `multipart/byteranges`.
    Multiple(Vec<Slice>),
    /// None: 416.
    Unsatisfiable,
}

/// The label of a partial answer: `bytes a-b/total`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ContentRange {
    /// The part that was sent.
    pub slice: Slice,
    /// The size of the whole; `None` when the sender did not know.
    pub total: Option<u64>,
}

impl RangeSpec {
    fn parse(text: &str) -> Option<Self> {
        match text.split_once('-')? {
            ("", length) => Some(Self::Suffix {
                length: number(length)?,
            }),
            (first, "") => Some(Self::From {
                first: number(first)?,
            }),
            (first, last) => Some(Self::Closed {
                first: number(first)?,
                last: number(last)?,
            }),
        }
    }

    /// What a body of this size has of the range; ends past the body are cut, as regclient asks one byte too far.
    fn resolve(self, size: u64) -> Option<Slice> {
        let slice = match self {
            Self::Closed { first, last } => Slice {
                start: first,
                end: last.saturating_add(1).min(size),
            },
            Self::From { first } => Slice {
                start: first,
                end: size,
            },
            Self::Suffix { length } => Slice {
                start: size.saturating_sub(length),
                end: size,
            },
        };
        (slice.start < slice.end).then_some(slice)
    }
}

impl RangeHeader {
    /// Reads a `Range` header; `None` means that it is to be ignored: another unit, malformed, or too many ranges.
    pub fn parse(value: &str) -> Option<Self> {
        let (unit, list) = value.trim().split_once('=')?;
        if !unit.eq_ignore_ascii_case("bytes") {
            return None;
        }
        let mut specs = Vec::new();
        // Empty list elements are legal (RFC 9110, section 5.6.1).
        for item in list
            .split(',')
            .map(|item| item.trim_matches([' ', '\t']))
            .filter(|item| !item.is_empty())
        {
            if specs.len() == RANGE_LIMIT {
                return None;
            }
            specs.push(RangeSpec::parse(item)?);
        }
        (!specs.is_empty()).then_some(Self(specs))
    }

    /// One range.
    pub fn single(spec: RangeSpec) -> Self {
        Self(vec![spec])
    }

    /// The ranges, in the order asked.
    pub fn specs(&self) -> &[RangeSpec] {
        &self.0
    }

    /// What a body of this size has of the ranges.
    pub fn resolve(&self, size: u64) -> Resolved {
        let mut slices = Vec::with_capacity(self.0.len());
        for slice in self.0.iter().filter_map(|spec| spec.resolve(size)) {
            add(&mut slices, slice);
        }
        match slices.as_slice() {
            [] => Resolved::Unsatisfiable,
            [only] => Resolved::Single(*only),
            _ => Resolved::Multiple(slices),
        }
    }
}

impl Slice {
    /// How many bytes.
    pub fn len(self) -> u64 {
        self.end.saturating_sub(self.start)
    }

    /// Whether there are no bytes.
    pub fn is_empty(self) -> bool {
        self.len() == 0
    }

    fn overlaps(self, other: Self) -> bool {
        self.start < other.end && other.start < self.end
    }

    fn joined(self, other: Self) -> Self {
        Self {
            start: self.start.min(other.start),
            end: self.end.max(other.end),
        }
    }
}

impl ContentRange {
    /// Reads a `Content-Range` header of a 206; `None` for anything that labels no part, or a contradictory one.
    pub fn parse(value: &str) -> Option<Self> {
        let (unit, rest) = value.trim().split_once(' ')?;
        let (range, total) = rest.trim_start().split_once('/')?;
        let (first, last) = range.split_once('-')?;
        if !unit.eq_ignore_ascii_case("bytes") {
            return None;
        }
        let slice = Slice {
            start: exact(first)?,
            end: exact(last)?.checked_add(1)?,
        };
        let total = if total == "*" {
            None
        } else {
            Some(exact(total)?)
        };
        let sound = !slice.is_empty() && total.is_none_or(|total| slice.end <= total);
        sound.then_some(Self { slice, total })
    }
}

impl fmt::Display for ContentRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "bytes {}-{}/",
            self.slice.start,
            self.slice.end.saturating_sub(1)
        )?;
        match self.total {
            Some(total) => write!(f, "{total}"),
            None => f.write_str("*"),
        }
    }
}

/// Adds a part at the end, or makes it one with those it overlaps, in the place of the first of them.
///
/// Parts that merely touch stay apart: containers/image pairs the parts it gets with those it asked, by counting.
fn add(slices: &mut Vec<Slice>, mut slice: Slice) {
    let Some(place) = slices.iter().position(|other| other.overlaps(slice)) else {
        slices.push(slice);
        return;
    };
    // The parts were apart before, so only parts behind `place` can overlap as well.
    while let Some(at) = slices.iter().position(|other| other.overlaps(slice)) {
        slice = slice.joined(slices.remove(at));
    }
    slices.insert(place, slice);
}

/// Digits only; what is too large for us is past the end of every body.
fn number(text: &str) -> Option<u64> {
    is_digits(text).then(|| text.parse().unwrap_or(u64::MAX))
}

fn exact(text: &str) -> Option<u64> {
    is_digits(text).then(|| text.parse().ok()).flatten()
}

fn is_digits(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SIZE: u64 = 10_000;

    fn resolved(value: &str, size: u64) -> Resolved {
        RangeHeader::parse(value).unwrap().resolve(size)
    }

    fn single(start: u64, end: u64) -> Resolved {
        Resolved::Single(Slice { start, end })
    }

    #[test]
    fn one_range() {
        for (value, expected) in [
            ("bytes=500-1499", single(500, 1500)),
            ("bytes=500-", single(500, SIZE)),
            ("bytes=-500", single(9500, SIZE)),
            ("bytes=2000-50000", single(2000, SIZE)),
            ("bytes=0-0", single(0, 1)),
            ("bytes=9999-", single(9999, SIZE)),
            ("bytes=-50000", single(0, SIZE)),
            ("Bytes= 0-1 ,", single(0, 2)),
            ("bytes=0-99999999999999999999999", single(0, SIZE)),
            ("bytes=0-18446744073709551615", single(0, SIZE)),
            ("bytes=10000-", Resolved::Unsatisfiable),
            ("bytes=10000-10000", Resolved::Unsatisfiable),
            ("bytes=500-0", Resolved::Unsatisfiable),
            ("bytes=-0", Resolved::Unsatisfiable),
            ("bytes=99999999999999999999999-", Resolved::Unsatisfiable),
        ] {
            assert_eq!(resolved(value, SIZE), expected, "{value}");
        }
    }

    #[test]
    fn an_empty_body_has_no_range() {
        for value in ["bytes=0-", "bytes=0-0", "bytes=-1", "bytes=-0"] {
            assert_eq!(resolved(value, 0), Resolved::Unsatisfiable, "{value}");
        }
    }

    #[test]
    fn ignored() {
        for value in [
            "",
            "bytes",
            "bytes=",
            "bytes=,",
            "bytes=-",
            "bytes=a-b",
            "bytes=1",
            "bytes=1-2-3",
            "bytes=1 - 2",
            "bytes=+1-2",
            "bytes=1-2;3-4",
            "bytes=0x0-1",
            "items=0-1",
            "bytes =0-1",
            "bytes=0-1,x",
            "bytes=--1",
        ] {
            assert_eq!(RangeHeader::parse(value), None, "{value}");
        }
        let many = |count: usize| format!("bytes={}", vec!["0-1"; count].join(","));
        assert_eq!(
            RangeHeader::parse(&many(RANGE_LIMIT))
                .unwrap()
                .specs()
                .len(),
            RANGE_LIMIT
        );
        assert_eq!(RangeHeader::parse(&many(RANGE_LIMIT + 1)), None);
    }

    #[test]
    fn several_ranges() {
        let parts = |pairs: &[(u64, u64)]| {
            Resolved::Multiple(
                pairs
                    .iter()
                    .map(|&(start, end)| Slice { start, end })
                    .collect(),
            )
        };
        for (value, expected) in [
            ("bytes=0-1,5-6", parts(&[(0, 2), (5, 7)])),
            ("bytes=5-6,0-1", parts(&[(5, 7), (0, 2)])),
            ("bytes=0-1,2-3", parts(&[(0, 2), (2, 4)])),
            ("bytes=0-1,9-8,-0,5-6", parts(&[(0, 2), (5, 7)])),
            ("bytes=0-1,20000-", single(0, 2)),
            ("bytes=0-5,3-9", single(0, 10)),
            ("bytes=0-,-5", single(0, SIZE)),
            ("bytes=8-9,0-1,4-5,1-8", single(0, 10)),
            (
                "bytes=100-109,0-1,20-29,1-20",
                parts(&[(100, 110), (0, 30)]),
            ),
            (
                "bytes=0-1,100-109,20-29,100-100",
                parts(&[(0, 2), (100, 110), (20, 30)]),
            ),
            ("bytes=20000-,500-0", Resolved::Unsatisfiable),
        ] {
            assert_eq!(resolved(value, SIZE), expected, "{value}");
        }
    }

    #[test]
    fn content_ranges() {
        for (value, start, end, total) in [
            ("bytes 0-0/1", 0, 1, Some(1)),
            ("bytes 5000-9999/10000", 5000, 10_000, Some(10_000)),
            ("Bytes  5-9/*", 5, 10, None),
        ] {
            assert_eq!(
                ContentRange::parse(value),
                Some(ContentRange {
                    slice: Slice { start, end },
                    total
                }),
                "{value}"
            );
        }
        for value in [
            "",
            "bytes */10000",
            "bytes 5-4/10",
            "bytes 0-10/10",
            "bytes 0-1",
            "bytes 0-1/",
            "bytes=0-1/2",
            "items 0-1/2",
            "bytes -1/2",
            "bytes 0-/2",
            "bytes 0-1/x",
            "bytes 0-18446744073709551615/*",
            "bytes +0-1/2",
            "bytes 0-1/99999999999999999999",
        ] {
            assert_eq!(ContentRange::parse(value), None, "{value}");
        }
        let slice = Slice { start: 3, end: 3 };
        assert!(slice.is_empty());
        assert_eq!(Slice { start: 3, end: 8 }.len(), 5);
    }

    fn spec() -> impl Strategy<Value = String> {
        prop_oneof![
            (0..40_u64, 0..40_u64).prop_map(|(first, last)| format!("{first}-{last}")),
            any::<(u64, u64)>().prop_map(|(first, last)| format!("{first}-{last}")),
            (0..40_u64).prop_map(|first| format!("{first}-")),
            (0..40_u64).prop_map(|length| format!("-{length}")),
        ]
    }

    fn slices(resolved: Resolved) -> Vec<Slice> {
        match resolved {
            Resolved::Single(slice) => vec![slice],
            Resolved::Multiple(slices) => slices,
            Resolved::Unsatisfiable => Vec::new(),
        }
    }

    proptest! {
        #[test]
        fn parts_are_those_asked_and_inside_the_body(specs in prop::collection::vec(spec(), 1..12), size in 0..40_u64) {
            let header = RangeHeader::parse(&format!("bytes={}", specs.join(", "))).unwrap();
            let parts = slices(header.resolve(size));
            let within = |slices: &[Slice], at: u64| slices.iter().filter(|slice| slice.start <= at && at < slice.end).count();
            let asked: Vec<Slice> = header.specs().iter().filter_map(|spec| spec.resolve(size)).collect();
            prop_assert!(parts.iter().all(|part| !part.is_empty() && part.end <= size));
            for at in 0..size {
                prop_assert_eq!(within(&parts, at), within(&asked, at).min(1), "byte {}", at);
            }
        }

        #[test]
        fn any_text_is_survived(text in any::<String>(), list in "[0-9, -]{0,40}", size in any::<u64>()) {
            for value in [text.clone(), format!("bytes={list}"), format!("bytes={text}")] {
                let parts = RangeHeader::parse(&value).map(|header| slices(header.resolve(size))).unwrap_or_default();
                prop_assert!(parts.iter().all(|part| part.start < part.end && part.end <= size));
                ContentRange::parse(&value);
            }
        }

        #[test]
        fn content_ranges_print_and_read_back(start in 0..u64::MAX, length in 1..1000_u64, more in prop::option::of(0..9_u64)) {
            let end = start.saturating_add(length).min(u64::MAX - 10);
            prop_assume!(start < end);
            let label = ContentRange { slice: Slice { start, end }, total: more.map(|more| end + more) };
            prop_assert_eq!(ContentRange::parse(&label.to_string()), Some(label));
        }
    }
}
