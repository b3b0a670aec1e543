//! The command line: what was asked for, done, and told as an exit code.
//!
//! 0 is done, 1 failed, 2 wrong usage or configuration. Serving and reading the store are handed in as [`Actions`], so that this floor
//! only reads arguments and prints.

mod args;
mod configuration;
pub mod history;
mod json_lines;
mod logging;
pub mod ls;
mod pages;

use std::ffi::OsString;
use std::io::{self, Write as _};
use std::path::Path;
use std::process::ExitCode;

use self::args::{Arguments, Command, ListenFlags, TagsVerb};
use self::logging::Verbosity;
use crate::config::{self, Config, ConfigError, Contents, Overrides, Settings, Sources};

/// What the commands do beyond reading and printing.
#[derive(Debug, Clone, Copy)]
pub struct Actions {
    /// Serves until told to stop; logging is set up.
    pub serve: fn(Config) -> Result<(), String>,
    /// What the cache in this folder holds.
    pub list: fn(&Path) -> Result<Vec<ls::Row>, String>,
    /// What this tag has meant, the latest first.
    pub history: fn(&Config, &str) -> Result<Vec<history::Era>, String>,
}

/// How a command ended badly.
enum Failure {
    /// The arguments, the environment or the file are wrong.
    Usage(String),
    /// It was tried and did not work.
    Failed(String),
}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Self {
        Self::Usage(error.to_string())
    }
}

/// Runs the command that `arguments` (the program's name first) ask for.
pub fn run(arguments: impl IntoIterator<Item = OsString>, actions: &Actions) -> ExitCode {
    let outcome = match Arguments::read(arguments) {
        Ok(arguments) => dispatch(arguments, actions),
        Err(shown) => {
            // Help and version are answers, not failures: clap knows which. Nobody is left to tell when this cannot be printed.
            shown.print().ok();
            return ExitCode::from(u8::try_from(shown.exit_code()).unwrap_or(2));
        }
    };
    let (code, message) = match outcome {
        Ok(()) => return ExitCode::SUCCESS,
        Err(Failure::Failed(message)) => (1, message),
        Err(Failure::Usage(message)) => (2, message),
    };
    let mut stderr = io::stderr().lock();
    for line in message.lines() {
        // As above.
        writeln!(stderr, "error: {line}").ok();
    }
    ExitCode::from(code)
}

fn dispatch(arguments: Arguments, actions: &Actions) -> Result<(), Failure> {
    let listens = arguments.command.as_ref().is_none_or(Command::listens);
    if !listens && arguments.listen.is_given() {
        let what = "--listen and --admin-listen belong to serve, config check and config show";
        return Err(Failure::Usage(what.to_owned()));
    }
    let environment = config::environment();
    let mut sources = Sources {
        file: arguments.common.config,
        environment,
        overrides: Overrides {
            cache_dir: arguments.common.cache_dir,
            ..arguments.listen.into()
        },
    };
    match arguments.command {
        None => serve(&sources, Verbosity(arguments.common.verbose), actions),
        Some(Command::Serve(listen)) => {
            listen.add_to(&mut sources.overrides);
            serve(&sources, Verbosity(arguments.common.verbose), actions)
        }
        Some(Command::Ls { json }) => {
            let settings = Settings::read(&sources)?;
            let folder = settings.cache_dir().unwrap_or_else(|| Path::new("."));
            let rows = (actions.list)(folder).map_err(Failure::Failed)?;
            let text = if json {
                ls::json(&rows)
            } else {
                ls::table(&rows)
            };
            print(&text)
        }
        Some(Command::Tags {
            verb: TagsVerb::History { reference, json },
        }) => {
            let config = Config::load(&sources)?;
            let eras = (actions.history)(&config, &reference).map_err(Failure::Failed)?;
            let text = if json {
                history::json(&eras)
            } else {
                history::table(&eras)
            };
            print(&text)
        }
        Some(Command::Config { verb }) => configuration::run(verb, sources),
        Some(Command::Completions { shell }) => print_bytes(&pages::completions(shell)),
        Some(Command::Man) => print_bytes(&pages::man().map_err(unprintable)?),
    }
}

fn serve(sources: &Sources, verbosity: Verbosity, actions: &Actions) -> Result<(), Failure> {
    let settings = Settings::read(sources)?;
    let config = Config::check(&settings, &sources.environment)?;
    let contents = Contents::read(&config, &settings)?;
    let filter = logging::filter(&sources.environment, config.log.as_deref(), verbosity);
    let filter = filter.map_err(Failure::Usage)?;
    let _log = logging::init(filter, &sources.environment).map_err(Failure::Failed)?;
    for note in config::notes(&config, &settings, &contents) {
        tracing::warn!(target: "config", "{note}");
    }
    (actions.serve)(config).map_err(Failure::Failed)
}

impl From<ListenFlags> for Overrides {
    fn from(flags: ListenFlags) -> Self {
        let mut overrides = Self::default();
        flags.add_to(&mut overrides);
        overrides
    }
}

fn print(text: &str) -> Result<(), Failure> {
    print_bytes(text.as_bytes())
}

fn print_bytes(bytes: &[u8]) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(bytes).and_then(|()| stdout.flush()) {
        // `ls | head` has seen enough.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        outcome => outcome.map_err(unprintable),
    }
}

#[expect(clippy::needless_pass_by_value, reason = "the shape map_err wants")]
fn unprintable(error: io::Error) -> Failure {
    Failure::Failed(format!("cannot write to standard output: {error}"))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::args::{self, Arguments};
    use super::{Actions, Config, Failure, Sources, dispatch, ls, pages};

    const ACTIONS: Actions = Actions {
        serve: |_| Err("served".to_owned()),
        list: |folder| Err(format!("listed {}", folder.display())),
        history: |config, reference| Err(format!("{reference} in {}", config.cache_dir.display())),
    };

    fn run(arguments: &[&str]) -> Result<(), Failure> {
        let arguments = std::iter::once(&"oci-remote-cache").chain(arguments);
        dispatch(Arguments::read(arguments).unwrap(), &ACTIONS)
    }

    fn failed(arguments: &[&str]) -> String {
        match run(arguments) {
            Err(Failure::Failed(message)) => message,
            Err(Failure::Usage(message)) => panic!("usage: {message}"),
            Ok(()) => panic!("done"),
        }
    }

    fn refused(arguments: &[&str]) -> String {
        match run(arguments) {
            Err(Failure::Usage(message)) => message,
            Err(Failure::Failed(message)) => panic!("failed: {message}"),
            Ok(()) => panic!("done"),
        }
    }

    #[test]
    fn arguments_are_sound() {
        args::command().debug_assert();
    }

    #[test]
    fn flags_may_stand_before_or_after_the_command() {
        assert_eq!(failed(&["ls", "--cache-dir", "/a"]), "listed /a");
        assert_eq!(
            failed(&["tags", "history", "x:1", "--cache-dir", "/a"]),
            "x:1 in /a"
        );
        assert_eq!(failed(&["--cache-dir", "/a", "ls", "--json"]), "listed /a");
        for arguments in [["--listen", "x", "serve"], ["serve", "--listen", "x"]] {
            assert!(refused(&arguments).starts_with("flag --listen: "));
        }
        assert!(refused(&["--listen", "[::]:1", "ls"]).starts_with("--listen and"));
        assert!(refused(&["--config", "/nowhere", "config", "check"]).contains("/nowhere: cannot"));
    }

    #[test]
    fn help_offers_only_what_the_command_uses() {
        let help = |arguments: &[&str]| {
            let arguments = ["oci-remote-cache"]
                .iter()
                .chain(arguments)
                .chain(&["--help"]);
            Arguments::read(arguments).unwrap_err().to_string()
        };
        for (arguments, folder, verbose) in [
            (&[][..], true, true),
            (&["serve"], true, true),
            (&["ls"], true, false),
            (&["tags", "history"], true, false),
            (&["config", "check"], true, false),
            (&["config", "init"], false, false),
            (&["man"], false, false),
            (&["completions"], false, false),
        ] {
            let help = help(arguments);
            let offered = (help.contains("--cache-dir"), help.contains("--verbose"));
            assert_eq!(offered, (folder, verbose), "{help}");
        }
    }

    #[test]
    fn a_template_never_overwrites() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("c.toml");
        let path = path.to_str().unwrap();
        assert!(run(&["config", "init", "--output", path]).is_ok());
        fs::write(path, "mine").unwrap();
        let error = failed(&["config", "init", "--output", path]);
        assert!(error.contains("File exists") && error.contains("name another one"));
        assert_eq!(fs::read_to_string(path).unwrap(), "mine");
    }

    #[test]
    fn the_manual_tells_every_command() {
        let page = String::from_utf8(pages::man().unwrap()).unwrap();
        for name in [
            "SERVE",
            "LS",
            "TAGS HISTORY",
            "CONFIG CHECK",
            "CONFIG SHOW",
            "CONFIG INIT",
            "CONFIG SCHEMA",
        ] {
            assert!(
                page.contains(&format!(".SH \"OCI\\-REMOTE\\-CACHE {name}\"\n")),
                "{page}"
            );
        }
        for name in ["EXIT STATUS", "ENVIRONMENT", "FILES", "SIGNALS"] {
            assert_eq!(page.matches(&format!("\n.SH \"{name}\"\n")).count(), 1);
        }
        let usual = Config::load(&Sources::default()).unwrap();
        assert!(page.contains(&*usual.cache_dir.to_string_lossy()));
        assert!(!page.contains("REFERENCE"));
        assert_eq!(page.matches("cache\\-dir\\fR \\fI<DIR>").count(), 1);
        let script = pages::completions(clap_complete::Shell::Bash);
        assert!(!script.is_empty());
        assert_eq!(ls::json(&[]), "[]\n");
    }
}
