//! Patterns of tags: what an operator writes to say which tags a rule is for.
//!
//! Small on purpose, so that it fits in one sentence: `*` is any text, `?` any one character, `\d` any one digit, `+` behind one of them
//! repeats it at least once, `{n}` exactly n times; all else stands for itself, and a pattern is always for the whole tag. Matching takes
//! at most the tag's length times the pattern's: no pattern can be made to take longer.

use std::fmt;
use std::str::FromStr;

/// The longest tag the specification allows, and so the most characters a pattern can ask for.
const LONGEST: usize = 128;

/// Which tags are meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pattern {
    text: String,
    steps: Vec<Step>,
}

/// What the next characters of a tag must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    One(Class),
    /// None, or any number.
    Many(Class),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    Any,
    Digit,
    Exactly(char),
}

/// Why a text is no pattern.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PatternError {
    /// Nothing is written.
    #[error("a pattern must not be empty")]
    Empty,
    /// A character that no tag holds and that has no meaning here.
    #[error(
        "{0:?} is in no tag: a pattern is made of a tag's own characters, *, ?, \\d, + and {{n}}"
    )]
    Character(char),
    /// `+` or `{n}` without something before it.
    #[error("{0:?} must stand behind a character, ? or \\d")]
    NothingToRepeat(char),
    /// What is in the braces is no count.
    #[error("braces must hold a number from 1 to 128, as in \\d{{8}}")]
    BadCount,
    /// No tag is that long.
    #[error("no tag is longer than 128 characters")]
    TooLong,
}

impl Pattern {
    /// Whether the rule of this pattern is for this tag.
    pub fn fits(&self, tag: &str) -> bool {
        // at[n]: the first n steps can make what was read so far.
        let mut at = vec![false; self.steps.len() + 1];
        if let Some(start) = at.first_mut() {
            *start = true;
        }
        self.skip(&mut at);
        for character in tag.chars() {
            at = self.read(&at, character);
        }
        at.last().copied().unwrap_or(false)
    }

    /// Where one more character leads.
    fn read(&self, at: &[bool], character: char) -> Vec<bool> {
        let mut next = vec![false; at.len()];
        for (n, step) in self.steps.iter().enumerate() {
            if !at.get(n).copied().unwrap_or(false) {
                continue;
            }
            let to = match step {
                Step::One(class) if class.holds(character) => n + 1,
                Step::Many(class) if class.holds(character) => n,
                Step::One(_) | Step::Many(_) => continue,
            };
            if let Some(reached) = next.get_mut(to) {
                *reached = true;
            }
        }
        self.skip(&mut next);
        next
    }

    /// Steps that may be left out are.
    fn skip(&self, at: &mut [bool]) {
        for (n, step) in self.steps.iter().enumerate() {
            let here = at.get(n).copied().unwrap_or(false);
            if here
                && matches!(step, Step::Many(_))
                && let Some(reached) = at.get_mut(n + 1)
            {
                *reached = true;
            }
        }
    }
}

impl FromStr for Pattern {
    type Err = PatternError;

    fn from_str(text: &str) -> Result<Self, PatternError> {
        let mut steps: Vec<Step> = Vec::new();
        let mut rest = text.chars();
        while let Some(character) = rest.next() {
            let repeated = steps.last().copied().and_then(Step::single);
            match (character, repeated) {
                ('*', _) => steps.push(Step::Many(Class::Any)),
                ('?', _) => steps.push(Step::One(Class::Any)),
                ('\\', _) if rest.next() == Some('d') => steps.push(Step::One(Class::Digit)),
                ('+', Some(class)) => steps.push(Step::Many(class)),
                ('{', Some(class)) => {
                    let more = count(&mut rest)? - 1;
                    steps.extend(std::iter::repeat_n(Step::One(class), more));
                }
                ('+' | '{', None) => return Err(PatternError::NothingToRepeat(character)),
                (character, _) if is_of_a_tag(character) => {
                    steps.push(Step::One(Class::Exactly(character)));
                }
                (character, _) => return Err(PatternError::Character(character)),
            }
            if steps.len() > 2 * LONGEST {
                return Err(PatternError::TooLong);
            }
        }
        if steps.is_empty() {
            return Err(PatternError::Empty);
        }
        Ok(Self {
            text: text.to_owned(),
            steps,
        })
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Step {
    fn single(self) -> Option<Class> {
        match self {
            Self::One(class) => Some(class),
            Self::Many(_) => None,
        }
    }
}

impl Class {
    fn holds(self, character: char) -> bool {
        match self {
            Self::Any => true,
            Self::Digit => character.is_ascii_digit(),
            Self::Exactly(wanted) => wanted == character,
        }
    }
}

/// The number up to the closing brace.
fn count(rest: &mut std::str::Chars<'_>) -> Result<usize, PatternError> {
    let (number, after) = rest
        .as_str()
        .split_once('}')
        .ok_or(PatternError::BadCount)?;
    *rest = after.chars();
    let count = number
        .parse()
        .map_err(|_no_number| PatternError::BadCount)?;
    (1..=LONGEST)
        .contains(&count)
        .then_some(count)
        .ok_or(PatternError::BadCount)
}

fn is_of_a_tag(character: char) -> bool {
    character.is_ascii_alphanumeric() || matches!(character, '.' | '_' | '-')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn patterns_are_for_whole_tags() {
        for (pattern, fitting, other) in [
            (
                "latest",
                &["latest"][..],
                &["latest1", "Latest", "a-latest"][..],
            ),
            ("*", &["", "a", "1.2.3"], &[]),
            (
                r"*-\d{8}",
                &["app-20260821", "-00000000"],
                &["app-2026082", "app-202608211", "20260821"],
            ),
            (
                r"v\d+.\d+.\d+",
                &["v1.2.3", "v10.20.30"],
                &["v1.2", "v1.2.x", "1.2.3", "v1x2.3"],
            ),
            ("1.?", &["1.2", "1.x"], &["1.", "1.22"]),
            ("*rc*", &["rc", "1-rc.2", "xrcx"], &["r-c"]),
            ("a{3}b+", &["aaab", "aaabbb"], &["aab", "aaa"]),
        ] {
            let pattern: Pattern = pattern.parse().unwrap();
            for tag in fitting {
                assert!(pattern.fits(tag), "{pattern} and {tag:?}");
            }
            for tag in other {
                assert!(!pattern.fits(tag), "{pattern} and {tag:?}");
            }
        }
    }

    #[test]
    fn what_is_no_pattern_says_why() {
        for (text, why) in [
            ("", PatternError::Empty),
            ("a b", PatternError::Character(' ')),
            ("^v1", PatternError::Character('^')),
            (r"\w", PatternError::Character('\\')),
            ("+1", PatternError::NothingToRepeat('+')),
            ("*{2}", PatternError::NothingToRepeat('{')),
            (r"\d{x}", PatternError::BadCount),
            (r"\d{0}", PatternError::BadCount),
            (r"\d{8", PatternError::BadCount),
            (r"\d{128}?{128}x", PatternError::TooLong),
        ] {
            assert_eq!(text.parse::<Pattern>(), Err(why), "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn a_tag_fits_itself_and_what_is_left_open(tag in "[A-Za-z0-9_.-]{1,128}", cut in 0usize..128) {
            let start: String = tag.chars().take(cut).collect();
            let open = format!("{start}*");
            prop_assert!(tag.parse::<Pattern>().unwrap().fits(&tag));
            prop_assert!(open.parse::<Pattern>().unwrap().fits(&tag));
        }

        /// The worst that can be written takes no time.
        #[test]
        fn stars_do_not_explode(tag in "a{100,128}") {
            let pattern: Pattern = "*a".repeat(60).parse().unwrap();
            prop_assert!(pattern.fits(&tag));
            let other = tag + "b";
            prop_assert!(!pattern.fits(&other));
        }
    }
}
