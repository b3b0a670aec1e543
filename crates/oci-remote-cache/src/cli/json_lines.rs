//! A log line as JSON, one for each event: what `jq` and log collectors read.
//!
//! tracing-subscriber's own format hands each fragment of a value through a serializer that looks at it twice; with a line for each
//! request that was a quarter of what a small hit costs. This one writes into the line's buffer at once. There are no spans in it, for
//! this program opens none.

use std::error::Error;
use std::fmt::{self, Write};

use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime as _, SystemTime};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

/// `{"timestamp":…,"level":…,` the event's fields, `"target":…}`.
#[derive(Clone, Copy, Debug)]
pub(super) struct JsonLines;

/// Writes an event's fields, each with a comma before it.
struct Fields<'line, 'buffer> {
    line: &'line mut Writer<'buffer>,
    outcome: fmt::Result,
}

/// Text inside of a JSON string.
struct Escaped<'a>(&'a mut dyn Write);

impl<S, N> FormatEvent<S, N> for JsonLines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        _context: &FmtContext<'_, S, N>,
        mut line: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let metadata = event.metadata();
        line.write_str("{\"timestamp\":\"")?;
        SystemTime.format_time(&mut line)?;
        line.write_str("\",\"level\":\"")?;
        line.write_str(metadata.level().as_str())?;
        line.write_char('"')?;
        let mut fields = Fields {
            line: &mut line,
            outcome: Ok(()),
        };
        event.record(&mut fields);
        fields.outcome?;
        line.write_str(",\"target\":\"")?;
        Escaped(&mut line).write_str(metadata.target())?;
        line.write_str("\"}\n")
    }
}

impl Fields<'_, '_> {
    /// One field; `write` writes its value.
    fn put(&mut self, field: &Field, write: impl FnOnce(&mut Writer<'_>) -> fmt::Result) {
        let name = field.name();
        let put = || {
            self.line.write_str(",\"")?;
            self.line
                .write_str(name.strip_prefix("r#").unwrap_or(name))?;
            self.line.write_str("\":")?;
            write(self.line)
        };
        self.outcome = self.outcome.and_then(|()| put());
    }

    fn put_text(&mut self, field: &Field, text: fmt::Arguments<'_>) {
        self.put(field, |line| {
            line.write_char('"')?;
            Escaped(line).write_fmt(text)?;
            line.write_char('"')
        });
    }
}

impl Visit for Fields<'_, '_> {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.put_text(field, format_args!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field, |line| {
            line.write_char('"')?;
            Escaped(line).write_str(value)?;
            line.write_char('"')
        });
    }

    fn record_error(&mut self, field: &Field, value: &(dyn Error + 'static)) {
        self.put_text(field, format_args!("{value}"));
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.put(field, |line| write!(line, "{value}"));
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.put(field, |line| write!(line, "{value}"));
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.put(field, |line| {
            line.write_str(if value { "true" } else { "false" })
        });
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        // JSON has no word for the others.
        self.put(field, |line| {
            if value.is_finite() {
                write!(line, "{value}")
            } else {
                line.write_str("null")
            }
        });
    }
}

impl Write for Escaped<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let must = |c: char| c < ' ' || c == '"' || c == '\\';
        for piece in text.split_inclusive(must) {
            let mut plain = piece.chars();
            match plain.next_back() {
                Some(last) if must(last) => {
                    self.0.write_str(plain.as_str())?;
                    write_escape(self.0, last)?;
                }
                _ => self.0.write_str(piece)?,
            }
        }
        Ok(())
    }
}

fn write_escape(line: &mut dyn Write, c: char) -> fmt::Result {
    match c {
        '"' => line.write_str("\\\""),
        '\\' => line.write_str("\\\\"),
        '\n' => line.write_str("\\n"),
        '\r' => line.write_str("\\r"),
        '\t' => line.write_str("\\t"),
        other => write!(line, "\\u{:04x}", u32::from(other)),
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::{Arc, Mutex};

    use proptest::prelude::*;
    use serde_json::{Value, json};
    use tracing_subscriber::fmt;
    use tracing_subscriber::layer::SubscriberExt as _;
    use tracing_subscriber::registry::Registry;

    use super::JsonLines;

    #[derive(Clone, Default)]
    struct Log(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Log {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// What is logged while `work` runs, each line read back.
    fn logged(work: impl FnOnce()) -> Vec<Value> {
        let log = Log::default();
        let writer = log.clone();
        let layer = fmt::layer()
            .with_writer(move || writer.clone())
            .event_format(JsonLines);
        tracing::subscriber::with_default(Registry::default().with(layer), work);
        let bytes = log.0.lock().unwrap().clone();
        let text = String::from_utf8(bytes).unwrap();
        assert!(text.ends_with('\n'), "{text}");
        let read =
            |line: &str| serde_json::from_str(line).unwrap_or_else(|why| panic!("{why}: {line}"));
        text.lines().map(read).collect()
    }

    #[test]
    fn every_kind_of_value_is_written_as_its_own_and_what_is_missing_is_left_out() {
        let lines = logged(|| {
            let error = io::Error::other("it \"broke\"");
            let none: Option<&str> = None;
            tracing::warn!(
                target: "a\"b",
                text = "x",
                shown = %"y",
                debugged = ?Some("z\n"),
                count = 7_u16,
                below = -7_i64,
                share = 0.25,
                endless = f64::INFINITY,
                yes = true,
                none,
                error = &error as &dyn std::error::Error,
                r#type = "t",
                "a {}", "message"
            );
            tracing::info!("second");
        });
        let mut first = lines[0].clone();
        let time = first.as_object_mut().unwrap().remove("timestamp").unwrap();
        assert!(time.as_str().unwrap().ends_with('Z'), "{time}");
        let wanted = json!({
            "level": "WARN", "message": "a message", "text": "x", "shown": "y", "debugged": "Some(\"z\\n\")", "count": 7,
            "below": -7, "share": 0.25, "endless": null, "yes": true, "error": "it \"broke\"", "type": "t", "target": "a\"b",
        });
        assert_eq!(first, wanted);
        assert_eq!(lines.len(), 2);
        assert_eq!(lines[1]["message"], "second");
    }

    proptest! {
        #[test]
        fn any_text_comes_back_as_it_was(text in any::<String>(), odd in "[\\x00-\\x1f\"\\\\a\\x7f-\\x9fé]{0,12}") {
            let lines = logged(|| tracing::info!(text, shown = %odd, debugged = ?text, "{odd}"));
            prop_assert_eq!(lines.len(), 1);
            prop_assert_eq!(lines[0]["text"].as_str(), Some(text.as_str()));
            prop_assert_eq!(lines[0]["shown"].as_str(), Some(odd.as_str()));
            prop_assert_eq!(lines[0]["message"].as_str(), Some(odd.as_str()));
            let debugged = format!("{text:?}");
            prop_assert_eq!(lines[0]["debugged"].as_str(), Some(debugged.as_str()));
        }
    }
}
