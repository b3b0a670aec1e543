//! The log filter: what `log` and `RUST_LOG` may say.

use tracing::level_filters::LevelFilter;
use tracing_subscriber::EnvFilter;

use super::nearest::nearest;

const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];

/// Reads directives; the error says which of them is wrong, and what would be right.
pub fn log_filter(text: &str) -> Result<EnvFilter, String> {
    let bad = |why: String| format!("bad log filter {text:?}: {why}");
    if text.split(',').all(|directive| directive.trim().is_empty()) {
        // To the parser this is silence but for errors.
        return Err(bad("it says nothing; the usual is \"info\"".to_owned()));
    }
    if let Some(word) = text.split(',').map(str::trim).find(|word| is_lone(word)) {
        return Err(bad(no_level(word)));
    }
    let parsed = EnvFilter::builder().with_regex(false).parse(text);
    parsed.map_err(|error| bad(error.to_string()))
}

/// Whether it is neither a level nor gives one to something. To the parser such a word is a target, and a misspelt level then silences
/// everything but that.
fn is_lone(word: &str) -> bool {
    let is_level = word.parse::<LevelFilter>().is_ok();
    !word.is_empty() && !is_level && !word.contains(['=', '[', ']', '{', '}'])
}

fn no_level(word: &str) -> String {
    match nearest(&word.to_ascii_lowercase(), LEVELS) {
        Some(level) => format!("{word:?} is no level; did you mean {level:?}?"),
        None => format!(
            "{word:?} is no level ({}); a target is written with one, as in \"{word}=debug\"",
            LEVELS.join(", ")
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::log_filter;

    #[test]
    fn levels_and_targets_with_levels_are_filters() {
        for text in [
            "info",
            "WARN",
            "Off",
            "3",
            "info,",
            "info,upstream=debug",
            "warn,hyper_util::client=trace",
            "[x]=info,client[a{b=1}]=debug",
        ] {
            assert!(log_filter(text).is_ok(), "{text}");
        }
    }

    #[test]
    fn a_word_that_is_no_level_is_told_with_the_nearest() {
        for (text, why) in [
            ("", "it says nothing; the usual is \"info\""),
            (" ,", "it says nothing; the usual is \"info\""),
            ("inof", "\"inof\" is no level; did you mean \"info\"?"),
            ("Warning", "\"Warning\" is no level; did you mean \"warn\"?"),
            (
                "info,debgu",
                "\"debgu\" is no level; did you mean \"debug\"?",
            ),
            (
                "info,hyper",
                "\"hyper\" is no level (off, error, warn, info, debug, trace); a target is written with one, as in \"hyper=debug\"",
            ),
        ] {
            let error = log_filter(text).unwrap_err();
            assert_eq!(error, format!("bad log filter {text:?}: {why}"));
        }
    }
}
