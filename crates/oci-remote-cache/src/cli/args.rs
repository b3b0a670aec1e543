//! The arguments as clap reads them. The doc comments are the help texts.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{ArgAction, Args, CommandFactory as _, FromArgMatches as _, Parser, Subcommand};
use clap_complete::Shell;

use crate::config::Overrides;

/// A pull-through cache for OCI registries: clients on one side, registries on the other, verified bytes on disk between them.
///
/// Without a command it serves. It needs no configuration: pull through it with `localhost:8080/docker.io/library/alpine`.
#[derive(Debug, Parser)]
#[command(name = "oci-remote-cache", version, arg_required_else_help = false)]
pub(super) struct Arguments {
    #[command(flatten)]
    pub(super) common: CommonFlags,
    #[command(flatten)]
    pub(super) listen: ListenFlags,
    #[command(subcommand)]
    pub(super) command: Option<Command>,
}

/// Flags that every command takes, before or after its name.
#[derive(Debug, Args)]
pub(super) struct CommonFlags {
    /// The configuration file (TOML); none is needed.
    #[arg(long, value_name = "FILE", global = true)]
    pub(super) config: Option<PathBuf>,
    /// The folder of the cache, over the configuration.
    #[arg(long, value_name = "DIR", global = true)]
    pub(super) cache_dir: Option<PathBuf>,
    /// Log requests of clients and to upstreams; twice for all their details.
    #[arg(short, long, action = ArgAction::Count, global = true)]
    pub(super) verbose: u8,
}

/// Flags of serving, and of looking at the configuration it would serve with.
#[derive(Debug, Args)]
pub(super) struct ListenFlags {
    /// Address and port for clients, over the configuration.
    #[arg(long, value_name = "ADDRESS")]
    listen: Option<String>,
    /// Address and port for metrics and operators, over the configuration.
    #[arg(long, value_name = "ADDRESS")]
    admin_listen: Option<String>,
}

/// What can be asked for.
#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Serve clients (what happens without a command, too).
    Serve(ListenFlags),
    /// List what the cache holds.
    Ls {
        /// As JSON, with full digests and sizes in bytes.
        #[arg(long)]
        json: bool,
    },
    /// Look at what tags mean and meant.
    Tags {
        #[command(subcommand)]
        verb: TagsVerb,
    },
    /// Check, show or write a configuration.
    Config {
        #[command(subcommand)]
        verb: ConfigVerb,
    },
    /// Print a completion script for a shell.
    Completions {
        /// The shell.
        shell: Shell,
    },
    /// Print the manual page.
    Man,
}

/// What can be asked about tags.
#[derive(Debug, Subcommand)]
pub(super) enum TagsVerb {
    /// Show which digests a tag was seen to name, the latest first, and when.
    History {
        /// The tag as clients write it here: docker.io/library/alpine:3.20, or alpine:3.20. Without a tag it is latest.
        #[arg(value_name = "REF")]
        reference: String,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
}

/// What can be done about a configuration.
#[derive(Debug, Subcommand)]
pub(super) enum ConfigVerb {
    /// Say whether the configuration is right, and what is noteworthy about it.
    Check(ListenFlags),
    /// Print the effective configuration, and where each value came from.
    Show(ListenFlags),
    /// Print a commented template.
    Init {
        /// Write it to this file, which must not exist yet.
        #[arg(long, value_name = "FILE")]
        output: Option<PathBuf>,
    },
    /// Print the JSON Schema of the configuration file.
    Schema,
    /// Print the reference page.
    #[command(hide = true)]
    Reference,
}

/// The arguments as clap knows them. The help of a command leaves out flags that mean nothing to it.
pub(super) fn command() -> clap::Command {
    let mut command = Arguments::command();
    // What is global gets to the commands now.
    command.build();
    offering(command)
}

fn offering(command: clap::Command) -> clap::Command {
    let idle: &[&str] = match command.get_name() {
        "oci-remote-cache" | "serve" => &[],
        "init" | "schema" | "reference" | "completions" | "man" => {
            &["config", "cache_dir", "verbose"]
        }
        _ => &["verbose"],
    };
    let command = command.mut_args(|arg| {
        if idle.contains(&arg.get_id().as_str()) {
            arg.hide(true)
        } else {
            arg
        }
    });
    command.mut_subcommands(offering)
}

impl Arguments {
    /// Reads `arguments`, the program's name first.
    pub(super) fn read<T: Into<OsString> + Clone>(
        arguments: impl IntoIterator<Item = T>,
    ) -> Result<Self, clap::Error> {
        let matches = command().try_get_matches_from(arguments)?;
        Self::from_arg_matches(&matches)
    }
}

impl Command {
    /// Whether the command has to do with where is listened.
    pub(super) fn listens(&self) -> bool {
        match self {
            Self::Serve(_) => true,
            Self::Config { verb } => matches!(verb, ConfigVerb::Check(_) | ConfigVerb::Show(_)),
            Self::Ls { .. } | Self::Tags { .. } | Self::Completions { .. } | Self::Man => false,
        }
    }
}

impl ListenFlags {
    /// Whether any of them was given.
    pub(super) fn is_given(&self) -> bool {
        self.listen.is_some() || self.admin_listen.is_some()
    }

    /// Lays these flags over `overrides`.
    pub(super) fn add_to(self, overrides: &mut Overrides) {
        if self.listen.is_some() {
            overrides.listen = self.listen;
        }
        if self.admin_listen.is_some() {
            overrides.admin_listen = self.admin_listen;
        }
    }
}
