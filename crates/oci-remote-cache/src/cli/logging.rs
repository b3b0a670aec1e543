//! What is logged, where and how: text on a terminal, lines of JSON elsewhere.
//!
//! Other people's crates are held at info unless `RUST_LOG` names them: some log headers at debug, credentials among them.

use std::io::{self, IsTerminal as _};

use tracing::level_filters::LevelFilter;
use tracing::span::{Attributes, Id, Record};
use tracing::subscriber::Interest;
use tracing::{Event, Level, Metadata};
use tracing_subscriber::layer::{Context, Filter, Layer as _, SubscriberExt as _};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::{EnvFilter, Registry, fmt};

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
    let wanted = EnvFilter::builder()
        .with_regex(false)
        .parse(text)
        .map_err(|error| format!("{source}: bad log filter {text:?}: {error}"))?;
    let named = if source == RUST_LOG {
        targets(text)
    } else {
        Vec::new()
    };
    Ok(LogFilter { wanted, named })
}

/// Logs to standard error from here on.
pub(super) fn init(filter: LogFilter) -> Result<(), String> {
    // A standard error that is gone must not end the process: what cannot be logged is not complained about either.
    let layer = fmt::layer()
        .with_writer(io::stderr)
        .log_internal_errors(false);
    let outcome = if io::stderr().is_terminal() {
        let subscriber = Registry::default().with(layer.with_filter(filter));
        tracing::subscriber::set_global_default(subscriber)
    } else {
        let layer = layer.json().flatten_event(true).with_span_list(false);
        let subscriber = Registry::default().with(layer.with_filter(filter));
        tracing::subscriber::set_global_default(subscriber)
    };
    outcome.map_err(|error| format!("cannot set up logging: {error}"))
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
