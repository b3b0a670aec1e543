//! `ls`: what the cache holds, as a table for people or JSON for programs.
//!
//! Only the printing. The rows come from the store's catalog.

use std::time::Duration;

use serde::Serialize;

/// One cached thing: a tag, or a manifest or blob known only by its digest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Row {
    /// The upstream's key.
    pub upstream: String,
    /// The repository's name there.
    pub repository: String,
    /// The tag, where there is one.
    pub tag: Option<String>,
    /// The whole digest.
    pub digest: String,
    /// The media type; empty where it is not known.
    pub media_type: String,
    /// Bytes.
    pub size: u64,
    /// Time since it was last checked or used.
    #[serde(rename = "age_seconds", serialize_with = "seconds")]
    pub age: Duration,
}

/// Which side of a column its text keeps to.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    Left,
    Right,
}

const COLUMNS: [(&str, Side); 6] = [
    ("REPOSITORY", Side::Left),
    ("TAG", Side::Left),
    ("DIGEST", Side::Left),
    ("TYPE", Side::Left),
    ("SIZE", Side::Right),
    ("AGE", Side::Right),
];

/// `rows` in columns, under a line of headings.
pub fn table(rows: &[Row]) -> String {
    let cells: Vec<[String; 6]> = std::iter::once(COLUMNS.map(|(name, _)| name.to_owned()))
        .chain(rows.iter().map(cells))
        .collect();
    let widths: Vec<usize> = (0..COLUMNS.len())
        .map(|column| {
            cells
                .iter()
                .filter_map(|row| row.get(column))
                .map(|cell| width(cell))
                .max()
        })
        .map(Option::unwrap_or_default)
        .collect();
    let mut text = String::new();
    for row in &cells {
        let padded: Vec<String> = row
            .iter()
            .zip(&widths)
            .zip(COLUMNS)
            .map(|((cell, width), (_, side))| pad(cell, *width, side))
            .collect();
        text.push_str(padded.join("  ").trim_end());
        text.push('\n');
    }
    text
}

/// `rows` as a JSON array.
pub fn json(rows: &[Row]) -> String {
    let rows = serde_json::to_value(rows).unwrap_or_default();
    format!("{rows:#}\n")
}

fn cells(row: &Row) -> [String; 6] {
    [
        format!("{}/{}", row.upstream, row.repository),
        row.tag.clone().unwrap_or_else(|| "-".to_owned()),
        short_digest(&row.digest),
        short_type(&row.media_type).to_owned(),
        size(row.size),
        age(row.age),
    ]
}

fn pad(cell: &str, to: usize, side: Side) -> String {
    let space = " ".repeat(to.saturating_sub(width(cell)));
    match side {
        Side::Left => format!("{cell}{space}"),
        Side::Right => format!("{space}{cell}"),
    }
}

/// Names, tags and digests are ASCII by their grammar: characters are columns.
fn width(cell: &str) -> usize {
    cell.chars().count()
}

/// Twelve digits, as Docker and podman show them.
fn short_digest(digest: &str) -> String {
    let (algorithm, hex) = digest.split_once(':').unwrap_or(("", digest));
    let short: String = hex.chars().take(12).collect();
    format!("{algorithm}:{short}")
}

fn short_type(media_type: &str) -> &str {
    match media_type {
        "application/vnd.oci.image.index.v1+json"
        | "application/vnd.docker.distribution.manifest.list.v2+json" => "index",
        "application/vnd.oci.image.manifest.v1+json"
        | "application/vnd.docker.distribution.manifest.v2+json" => "image",
        "" | "application/octet-stream" => "blob",
        other => other,
    }
}

fn size(bytes: u64) -> String {
    const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
    let mut tenths = u128::from(bytes).saturating_mul(10);
    let mut unit = "B";
    for larger in UNITS {
        if tenths < 10_240 {
            break;
        }
        tenths /= 1024;
        unit = larger;
    }
    if unit == "B" || tenths >= 1000 {
        return format!("{} {unit}", tenths / 10);
    }
    format!("{}.{} {unit}", tenths / 10, tenths % 10)
}

fn age(age: Duration) -> String {
    let seconds = age.as_secs();
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m", seconds / 60),
        3600..172_800 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

fn seconds<S: serde::Serializer>(age: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_u64(age.as_secs())
}

#[cfg(test)]
mod tests {
    use super::{Row, age, json, size, table};
    use std::time::Duration;

    fn rows() -> Vec<Row> {
        let row = |repository: &str, tag: Option<&str>, media_type: &str, size, age| Row {
            upstream: "docker.io".into(),
            repository: repository.into(),
            tag: tag.map(str::to_owned),
            digest: format!("sha256:{}", "0123456789abcdef".repeat(4)),
            media_type: media_type.into(),
            size,
            age: Duration::from_secs(age),
        };
        vec![
            row(
                "library/alpine",
                Some("3.20"),
                "application/vnd.oci.image.index.v1+json",
                1853,
                42,
            ),
            row("library/busybox", None, "", 3_623_807, 200_000),
        ]
    }

    #[test]
    fn columns_line_up() {
        assert_eq!(
            table(&rows()),
            "REPOSITORY                 TAG   DIGEST               TYPE      SIZE  AGE\n\
             docker.io/library/alpine   3.20  sha256:0123456789ab  index  1.8 KiB  42s\n\
             docker.io/library/busybox  -     sha256:0123456789ab  blob   3.4 MiB   2d\n"
        );
    }

    #[test]
    fn json_has_everything_in_full() {
        let parsed: serde_json::Value = serde_json::from_str(&json(&rows())).unwrap();
        assert_eq!(parsed[0]["age_seconds"], 42);
        assert_eq!(parsed[0]["digest"].as_str().unwrap().len(), 71);
        assert_eq!(parsed[1]["tag"], serde_json::Value::Null);
        assert_eq!(json(&[]), "[]\n");
    }

    #[test]
    fn figures_stay_short() {
        assert_eq!(size(0), "0 B");
        assert_eq!(size(1023), "1023 B");
        assert_eq!(size(1024), "1.0 KiB");
        assert_eq!(size(150 << 20), "150 MiB");
        assert_eq!(size(u64::MAX), "16777215 TiB");
        assert_eq!(age(Duration::from_secs(3599)), "59m");
        assert_eq!(age(Duration::from_hours(25)), "25h");
    }
}
