//! What is logged, where and how: text on a terminal, lines of JSON elsewhere.
//!
//! Other people's crates are held at info unless `RUST_LOG` names them: some log headers at debug, credentials among them.

use std::io::{self, BufWriter, IsTerminal as _, Write};
use std::time::Duration;

use tracing::level_filters::LevelFilter;
use tracing::span::{Attributes, Id, Record};
use tracing::subscriber::Interest;
use tracing::{Event, Level, Metadata};
use tracing_appender::non_blocking::{NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::layer::{Context, Filter, Layer as _, SubscriberExt as _};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::{EnvFilter, Registry, fmt};

use super::json_lines::JsonLines;
use crate::config::log_filter;

/// Lines that may wait to be written.
const QUEUED_LINES: usize = 10_000;

/// Bytes of lines that are written at once when many come: 64 KiB.
const LOG_BUFFER: usize = 64 << 10;

/// How long lines gather after some were written. Waking the writing thread for each line costs a busy server more than the line does.
const GATHER: Duration = Duration::from_millis(5);

/// How often `-v` was given.
#[derive(Debug, Clone, Copy)]
pub(super) struct Verbosity(pub(super) u8);

/// What is logged.
#[derive(Debug)]
pub(super) struct LogFilter {
    wanted: EnvFilter,
    /// Targets that `RUST_LOG` names, ours or not.
    named: Vec<String>,
}

/// Targets of this program: the crates' own names, and the subjects that log lines are about.
const OURS: &[&str] = &[
    "oci_remote_cache",
    "oci",
    "access",
    "admin",
    "cache",
    "client",
    "config",
    "fill",
    "http",
    "policy",
    "store",
    "upstream",
];

/// Writes lines in blocks, and rests after each: the thread that writes flushes when no line is waiting, and is not waited for.
struct Gathering<W: Write>(BufWriter<W>);

/// The filter: `RUST_LOG`, else the configuration's `log`, else what `-v` asks for. An error names the one that is wrong.
pub(super) fn filter(
    environment: &[(String, String)],
    configured: Option<&str>,
    verbosity: Verbosity,
) -> Result<LogFilter, String> {
    const RUST_LOG: &str = "RUST_LOG";
    let variable = environment
        .iter()
        .find(|(name, value)| name == RUST_LOG && !value.trim().is_empty());
    let (source, text) = match (variable, configured, verbosity) {
        (Some((_, text)), _, _) => (RUST_LOG, text.as_str()),
        (None, Some(text), _) => ("log", text),
        (None, None, Verbosity(0)) => ("-v", "info"),
        (None, None, Verbosity(1)) => ("-v", "info,client=debug,upstream=debug"),
        (None, None, Verbosity(_)) => ("-v", "info,client=trace,upstream=trace"),
    };
    let wanted = log_filter(text).map_err(|error| format!("{source}: {error}"))?;
    let named = if source == RUST_LOG {
        targets(text)
    } else {
        Vec::new()
    };
    Ok(LogFilter { wanted, named })
}

/// Logs to standard error from here on, until the guard is dropped.
///
/// Lines are written by a thread of their own: a reader of the log that stalls (journald, a full pipe) must not stall those who serve.
/// When it stalls for longer than the queue lasts, lines are lost and not the service.
pub(super) fn init(
    filter: LogFilter,
    environment: &[(String, String)],
) -> Result<WorkerGuard, String> {
    let (writer, guard) = NonBlockingBuilder::default()
        .buffered_lines_limit(QUEUED_LINES)
        .finish(Gathering(BufWriter::with_capacity(
            LOG_BUFFER,
            io::stderr(),
        )));
    // A standard error that is gone must not end the process: what cannot be logged is not complained about either.
    let layer = fmt::layer()
        .with_writer(writer)
        .with_ansi(has_colours(environment))
        .log_internal_errors(false);
    let outcome = if io::stderr().is_terminal() {
        let subscriber = Registry::default().with(layer.with_filter(filter));
        tracing::subscriber::set_global_default(subscriber)
    } else {
        let layer = layer.event_format(JsonLines);
        let subscriber = Registry::default().with(layer.with_filter(filter));
        tracing::subscriber::set_global_default(subscriber)
    };
    outcome.map_err(|error| format!("cannot set up logging: {error}"))?;
    Ok(guard)
}

/// Whether a terminal is sent colours: unless it cannot show them, or nobody wants them (<https://no-color.org>).
fn has_colours(environment: &[(String, String)]) -> bool {
    environment.iter().all(|(name, value)| match name.as_str() {
        "NO_COLOR" => value.is_empty(),
        "TERM" => value != "dumb",
        _ => true,
    })
}

/// The targets that the directives in `text` name.
fn targets(text: &str) -> Vec<String> {
    text.split(',')
        .filter_map(|directive| {
            let target = directive.split(['=', '[']).next()?.trim();
            let is_level = target.parse::<LevelFilter>().is_ok();
            (!target.is_empty() && !is_level).then(|| target.to_owned())
        })
        .collect()
}

/// Whether `target` is `of` or a module below it.
fn is_part(target: &str, of: &str) -> bool {
    target
        .strip_prefix(of)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
}

impl<W: Write> Write for Gathering<W> {
    fn write(&mut self, lines: &[u8]) -> io::Result<usize> {
        self.0.write(lines)
    }

    fn flush(&mut self) -> io::Result<()> {
        let written = self.0.flush();
        std::thread::sleep(GATHER);
        written
    }
}

impl LogFilter {
    fn held_back(&self, metadata: &Metadata<'_>) -> bool {
        let target = metadata.target();
        let ours = OURS.iter().any(|ours| is_part(target, ours));
        let named = self.named.iter().any(|named| is_part(target, named));
        *metadata.level() > Level::INFO && !ours && !named
    }
}

impl<S: tracing::Subscriber + for<'a> LookupSpan<'a>> Filter<S> for LogFilter {
    fn enabled(&self, metadata: &Metadata<'_>, context: &Context<'_, S>) -> bool {
        !self.held_back(metadata) && Filter::enabled(&self.wanted, metadata, context)
    }

    fn callsite_enabled(&self, metadata: &'static Metadata<'static>) -> Interest {
        if self.held_back(metadata) {
            return Interest::never();
        }
        Filter::<S>::callsite_enabled(&self.wanted, metadata)
    }

    fn event_enabled(&self, event: &Event<'_>, context: &Context<'_, S>) -> bool {
        Filter::event_enabled(&self.wanted, event, context)
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Filter::<S>::max_level_hint(&self.wanted)
    }

    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        Filter::on_new_span(&self.wanted, attributes, id, context);
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, context: Context<'_, S>) {
        Filter::on_record(&self.wanted, id, values, context);
    }

    fn on_enter(&self, id: &Id, context: Context<'_, S>) {
        Filter::on_enter(&self.wanted, id, context);
    }

    fn on_exit(&self, id: &Id, context: Context<'_, S>) {
        Filter::on_exit(&self.wanted, id, context);
    }

    fn on_close(&self, id: Id, context: Context<'_, S>) {
        Filter::on_close(&self.wanted, id, context);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use tracing::{Event, Subscriber};
    use tracing_subscriber::layer::{Context, Layer, SubscriberExt as _};
    use tracing_subscriber::registry::Registry;

    use super::{Verbosity, filter, has_colours, targets};

    /// Keeps what gets through a filter, as `target level`.
    #[derive(Clone, Default)]
    struct Seen(Arc<Mutex<Vec<String>>>);

    impl<S: Subscriber> Layer<S> for Seen {
        fn on_event(&self, event: &Event<'_>, _context: Context<'_, S>) {
            let metadata = event.metadata();
            let line = format!("{} {}", metadata.target(), metadata.level());
            self.0.lock().unwrap().push(line);
        }
    }

    fn seen(variable: Option<&str>, configured: Option<&str>, verbosity: u8) -> Vec<String> {
        let environment: Vec<_> = variable
            .map(|text| ("RUST_LOG".to_owned(), text.to_owned()))
            .into_iter()
            .collect();
        let filter = filter(&environment, configured, Verbosity(verbosity)).unwrap();
        let seen = Seen::default();
        let subscriber = Registry::default().with(seen.clone().with_filter(filter));
        tracing::subscriber::with_default(subscriber, || {
            tracing::info!(target: "access", "");
            tracing::debug!(target: "client", "");
            tracing::trace!(target: "client", "");
            tracing::debug!(target: "oci_remote_cache::store", "");
            tracing::info!(target: "hyper_util::client", "");
            tracing::debug!(target: "hyper_util::client", "");
            tracing::trace!(target: "hyper::proto", "");
            tracing::error!(target: "rustls", "");
        });
        let seen = seen.0.lock().unwrap();
        seen.clone()
    }

    #[test]
    fn info_is_the_default_and_v_opens_requests() {
        let usual = ["access INFO", "hyper_util::client INFO", "rustls ERROR"];
        assert_eq!(seen(None, None, 0), usual);
        let verbose = seen(None, None, 1);
        assert_eq!(verbose.len(), 4);
        assert!(verbose.contains(&"client DEBUG".to_owned()));
        let more = seen(None, None, 2);
        assert_eq!(more.len(), 5);
        assert!(more.contains(&"client TRACE".to_owned()));
    }

    #[test]
    fn the_variable_beats_the_file_and_the_file_beats_v() {
        assert_eq!(seen(None, Some("error"), 2), ["rustls ERROR"]);
        let variable = seen(Some("access=info"), Some("error"), 2);
        assert_eq!(variable, ["access INFO"]);
        assert_eq!(seen(Some(" "), Some("error"), 0), ["rustls ERROR"]);
    }

    #[test]
    fn a_bare_trace_does_not_open_other_peoples_crates() {
        let all = seen(Some("trace"), None, 0);
        assert_eq!(
            all,
            [
                "access INFO",
                "client DEBUG",
                "client TRACE",
                "oci_remote_cache::store DEBUG",
                "hyper_util::client INFO",
                "rustls ERROR",
            ]
        );
        assert_eq!(seen(None, Some("trace,hyper_util=trace"), 0), all);
        let named = seen(Some("trace,hyper_util=trace"), None, 0);
        assert!(named.contains(&"hyper_util::client DEBUG".to_owned()));
        // `hyper` is not named by `hyper_util`, nor the other way round.
        assert!(!named.contains(&"hyper::proto TRACE".to_owned()));
        let hyper = seen(Some("warn,hyper=trace"), None, 0);
        assert_eq!(hyper.last().map(String::as_str), Some("rustls ERROR"));
        assert!(hyper.contains(&"hyper::proto TRACE".to_owned()));
    }

    #[test]
    fn colours_are_for_terminals_that_show_them() {
        for (name, value, colours) in [
            ("TERM", "xterm-256color", true),
            ("TERM", "dumb", false),
            ("NO_COLOR", "1", false),
            ("NO_COLOR", "", true),
        ] {
            let environment = [(name.to_owned(), value.to_owned())];
            assert_eq!(has_colours(&environment), colours, "{name}={value}");
        }
        assert!(has_colours(&[]));
    }

    #[test]
    fn a_bad_filter_is_named() {
        let environment = [("RUST_LOG".to_owned(), "client=loud".to_owned())];
        let error = filter(&environment, None, Verbosity(0)).unwrap_err();
        assert!(error.starts_with("RUST_LOG: bad log filter \"client=loud\": "));
        assert!(!error.contains('\n'));
        assert_eq!(
            targets("trace, h2=debug,[x]=info,client[a{b=1}]=debug,5"),
            ["h2", "client"]
        );
    }
}
