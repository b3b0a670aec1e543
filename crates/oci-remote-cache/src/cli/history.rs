//! `tags history`: what a tag has meant, as a table for people or JSON for programs.
//!
//! Only the printing. The times come from the store's catalog.

use std::fmt::Write as _;

use serde::Serialize;

use crate::clock::Timestamp;

/// A time during which a tag named one digest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Era {
    /// The whole digest.
    pub digest: String,
    /// When it was first seen.
    #[serde(serialize_with = "moment")]
    pub first_seen: Timestamp,
    /// When it was last seen.
    #[serde(serialize_with = "moment")]
    pub last_seen: Timestamp,
}

/// `eras` in columns, under a line of headings. Digests are whole: they are what one pulls to go back.
pub fn table(eras: &[Era]) -> String {
    let mut text = format!("{:<20}  {:<20}  DIGEST\n", "FIRST SEEN", "LAST SEEN");
    for era in eras {
        let (first, last) = (era.first_seen.rfc3339(), era.last_seen.rfc3339());
        // Writing to a String cannot fail.
        writeln!(text, "{first:<20}  {last:<20}  {}", era.digest).ok();
    }
    text
}

/// `eras` as a JSON array, the latest first.
pub fn json(eras: &[Era]) -> String {
    let eras = serde_json::to_value(eras).unwrap_or_default();
    format!("{eras:#}\n")
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "the shape serialize_with wants"
)]
fn moment<S: serde::Serializer>(moment: &Timestamp, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&moment.rfc3339())
}

#[cfg(test)]
mod tests {
    use super::{Era, json, table};
    use crate::clock::Timestamp;

    #[test]
    fn both_forms_tell_the_same() {
        let era = Era {
            digest: "sha256:0123".into(),
            first_seen: Timestamp(1_787_270_400_000),
            last_seen: Timestamp(1_787_270_460_999),
        };
        assert_eq!(
            table(std::slice::from_ref(&era)),
            "FIRST SEEN            LAST SEEN             DIGEST\n\
             2026-08-21T00:00:00Z  2026-08-21T00:01:00Z  sha256:0123\n"
        );
        let parsed: serde_json::Value = serde_json::from_str(&json(&[era])).unwrap();
        assert_eq!(parsed[0]["digest"], "sha256:0123");
        assert_eq!(parsed[0]["first_seen"], "2026-08-21T00:00:00Z");
        assert_eq!(parsed[0]["last_seen"], "2026-08-21T00:01:00Z");
    }
}
