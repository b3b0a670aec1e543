//! What part of a list is asked for: by the specification's parameters, and by whatever a registry puts into its own `Link`.
//!
//! The specification leaves to registries how they find the next page, and clients follow the `Link` they get. So parameters that are
//! not known are carried as they stand, within bounds, and are nothing but text here.

use super::{Query, RouteError, decode_value, is_escaped};

/// Longest page asked for: ECR refuses more.
const PAGE_LIMIT: u32 = 1000;
/// Longest value. Quay's page tokens are some hundred bytes long, and what ECR gives as `last` is an opaque token too.
const TOKEN_LIMIT: usize = 2048;
/// Most other parameters, all their text, and the longest name of one.
const OTHERS_LIMIT: usize = 8;
const TEXT_LIMIT: usize = 4096;
const NAME_LIMIT: usize = 64;

/// Parameters that are never among the others: those with a place of their own, and the one that would show a client's token to the
/// upstream (RFC 6750, section 2.3).
const NOT_OTHERS: [&str; 6] = [
    "ns",
    "artifactType",
    "n",
    "last",
    "next_page",
    "access_token",
];

/// What part of a list is asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Page {
    /// At most so many entries; never more than 1000.
    pub n: Option<u32>,
    /// Only entries after this one.
    pub last: Option<String>,
    /// Quay's opaque `next_page`.
    pub next: Option<String>,
    /// All other parameters as they stand in a query, escapes and all: `nextToken=a%2Bb&x=y`.
    pub others: String,
}

impl Page {
    /// Reads the query of a list's URL.
    pub fn parse(query: &str) -> Result<Self, RouteError> {
        Self::of(Query(query))
    }

    /// Whether both begin at the same entry, however long they are.
    pub fn begins_with(&self, other: &Self) -> bool {
        (&self.last, &self.next, &self.others) == (&other.last, &other.next, &other.others)
    }

    pub(super) fn of(query: Query<'_>) -> Result<Self, RouteError> {
        Ok(Self {
            others: others(query)?,
            ..Self::known(query)?
        })
    }

    /// Only what the specification and Quay page by.
    pub(super) fn known(query: Query<'_>) -> Result<Self, RouteError> {
        Ok(Self {
            n: number(query)?,
            last: token(query, "last")?,
            next: token(query, "next_page")?,
            others: String::new(),
        })
    }
}

fn number(query: Query<'_>) -> Result<Option<u32>, RouteError> {
    let Some(raw) = query.raw("n") else {
        return Ok(None);
    };
    if !raw.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(RouteError::Page("an `n` that is not a number".to_owned()));
    }
    Ok(Some(raw.parse().unwrap_or(PAGE_LIMIT).min(PAGE_LIMIT)))
}

fn token(query: Query<'_>, name: &str) -> Result<Option<String>, RouteError> {
    let Some(raw) = query.raw(name) else {
        return Ok(None);
    };
    decode_value(raw, TOKEN_LIMIT)
        .map(Some)
        .ok_or_else(|| RouteError::Page(format!("this value of `{name}`")))
}

fn others(query: Query<'_>) -> Result<String, RouteError> {
    let mut kept = Vec::new();
    for (name, value) in query.pairs() {
        if value.is_empty() || NOT_OTHERS.contains(&name) {
            continue;
        }
        if !is_name(name) || value.len() > TOKEN_LIMIT || !is_query_text(value) {
            return Err(RouteError::Page(
                "a parameter that is too long, or not written as a query's are".to_owned(),
            ));
        }
        kept.push(format!("{name}={value}"));
    }
    let text = kept.join("&");
    if kept.len() > OTHERS_LIMIT || text.len() > TEXT_LIMIT {
        return Err(RouteError::Page("so many parameters".to_owned()));
    }
    Ok(text)
}

fn is_name(name: &str) -> bool {
    let known = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~$".contains(&byte);
    (1..=NAME_LIMIT).contains(&name.len()) && name.bytes().all(known)
}

/// Whether this can stand in a query as it is (RFC 3986, section 3.4).
fn is_query_text(text: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~!$'()*+,;:@/?=%".contains(&byte);
    text.bytes().all(plain) && is_escaped(text)
}
