//! `config check|show|init|schema`.

use std::fs::OpenOptions;
use std::io::{self, Write as _};
use std::path::Path;

use super::args::ConfigVerb;
use super::logging::{self, Verbosity};
use super::{Failure, print};
use crate::config::{self, Config, Contents, Settings, Sources};

/// Does what `verb` says about the configuration from `sources`.
pub(super) fn run(verb: ConfigVerb, mut sources: Sources) -> Result<(), Failure> {
    match verb {
        ConfigVerb::Check(listen) => {
            listen.add_to(&mut sources.overrides);
            print(&check(&sources)?)
        }
        ConfigVerb::Show(listen) => {
            listen.add_to(&mut sources.overrides);
            let settings = Settings::read(&sources)?;
            // What is shown is what would be served with, or nothing.
            let config = Config::check(&settings, &sources.environment)?;
            Contents::read(&config, &settings)?;
            print(&config::show(&settings))
        }
        ConfigVerb::Init { output: None } => print(&config::template()),
        ConfigVerb::Init { output: Some(path) } => write_new(&path, &config::template()),
        ConfigVerb::Schema => print(&config::schema()),
        ConfigVerb::Reference => print(&config::reference()),
    }
}

fn check(sources: &Sources) -> Result<String, Failure> {
    let settings = Settings::read(sources)?;
    let config = Config::check(&settings, &sources.environment)?;
    let contents = Contents::read(&config, &settings)?;
    let filter = logging::filter(&sources.environment, config.log.as_deref(), Verbosity(0));
    filter.map_err(Failure::Usage)?;
    let what = match &sources.file {
        Some(path) => path.display().to_string(),
        None => "no file".to_owned(),
    };
    let count = config.upstreams.len();
    let mut text = format!("OK: {what}; {count} upstreams\n");
    let notes = config::notes(&config, &settings, &contents);
    for note in config::short_lived(&config).into_iter().chain(notes) {
        text.push_str("note: ");
        text.push_str(&note);
        text.push('\n');
    }
    Ok(text)
}

fn write_new(path: &Path, text: &str) -> Result<(), Failure> {
    let written = OpenOptions::new()
        .write(true)
        .create_new(true)
        .open(path)
        .and_then(|mut file| file.write_all(text.as_bytes()));
    written.map_err(|error| {
        let way_out = if error.kind() == io::ErrorKind::AlreadyExists {
            "; nothing is written over a file: name another one, or move this one away"
        } else {
            ""
        };
        let path = path.display();
        Failure::Failed(format!("cannot write {path}: {error}{way_out}"))
    })
}
