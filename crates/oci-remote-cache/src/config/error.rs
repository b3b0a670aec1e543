//! What can be wrong with a configuration: where it was written, which key, and what would be right.
//!
//! A problem is always one line, whatever control characters a key or value holds, and never shows a secret's text.

use std::fmt;
use std::sync::Arc;

use super::keys::KeyPath;

/// Where a value was said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Origin {
    /// Nowhere: it is the key's default.
    Default,
    /// With an upstream that needs no configuration.
    BuiltIn,
    /// In the file, on this line.
    File {
        /// The file as named on the command line.
        file: Arc<str>,
        /// Counted from one.
        line: usize,
    },
    /// In this environment variable.
    Variable(String),
    /// In this command-line flag.
    Flag(&'static str),
}

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Problem {
    place: String,
    key: Option<KeyPath>,
    what: String,
}

/// A configuration that cannot be used, and everything that is wrong with it.
///
/// Shown as one line for each problem: `FILE:LINE: key "…": what`. The user's fault, always; trying again does not help.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct ConfigError {
    problems: Vec<Problem>,
}

impl Origin {
    /// Whether somebody set the value, rather than us.
    pub(super) fn is_set(&self) -> bool {
        !matches!(self, Self::Default | Self::BuiltIn)
    }
}

impl Problem {
    /// `what` is wrong with `key` as said at `origin`.
    pub(super) fn at(origin: &Origin, key: &KeyPath, what: impl Into<String>) -> Self {
        let place = match origin {
            Origin::Variable(name) => format!("environment variable {name}"),
            Origin::Flag(name) => format!("flag {name}"),
            Origin::Default | Origin::BuiltIn | Origin::File { .. } => origin.to_string(),
        };
        Self {
            place: one_line(&place),
            key: Some(key.clone()),
            what: one_line(&what.into()),
        }
    }

    /// `what` is wrong with `place` (a file, a line, a variable) as a whole.
    pub(super) fn of(place: &str, what: impl Into<String>) -> Self {
        Self {
            place: one_line(place),
            key: None,
            what: one_line(&what.into()),
        }
    }
}

impl ConfigError {
    /// `value`, unless something is wrong. What is wrong with what all upstreams inherit is found with each, and told once.
    pub(super) fn unless_any<T>(found: Vec<Problem>, value: T) -> Result<T, Self> {
        let mut problems: Vec<Problem> = Vec::new();
        for problem in found {
            if !problems.contains(&problem) {
                problems.push(problem);
            }
        }
        if problems.is_empty() {
            Ok(value)
        } else {
            Err(Self { problems })
        }
    }
}

impl From<Problem> for ConfigError {
    fn from(problem: Problem) -> Self {
        Self {
            problems: vec![problem],
        }
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::BuiltIn => f.write_str("built in"),
            Self::File { file, line } => write!(f, "{}:{line}", one_line(file)),
            Self::Variable(name) => write!(f, "env {}", one_line(name)),
            Self::Flag(name) => write!(f, "flag {name}"),
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { place, key, what } = self;
        match key {
            Some(key) => write!(f, "{place}: key \"{key}\": {what}"),
            None => write!(f, "{place}: {what}"),
        }
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, problem) in self.problems.iter().enumerate() {
            if number > 0 {
                f.write_str("\n")?;
            }
            problem.fmt(f)?;
        }
        Ok(())
    }
}

/// `text` without anything that could start a new line or steer a terminal.
pub(super) fn one_line(text: &str) -> String {
    text.chars()
        .map(|character| {
            if character.is_control() {
                ' '
            } else {
                character
            }
        })
        .collect()
}
