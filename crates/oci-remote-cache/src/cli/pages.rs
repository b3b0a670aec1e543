//! Completion scripts and the manual page, made from the arguments.

use std::io::{self, Write as _};

use clap::Command;
use clap_complete::Shell;
use clap_mangen::Man;

use super::args;

/// What no argument tells, in roff.
const MORE: &str = r#".SH "EXIT STATUS"
.TP
.B 0
Done.
.TP
.B 1
It was tried and failed: a port is in use, the folder is locked or refused.
.TP
.B 2
The arguments, the environment, the configuration or a file that it names are wrong.
.SH "ENVIRONMENT"
.TP
.B OCI_REMOTE_CACHE_*
One variable for each key of the configuration, over the file and under the flags: cache.max_size is OCI_REMOTE_CACHE_CACHE__MAX_SIZE.
.TP
.B RUST_LOG
What is logged, in place of the key log and of \-v.
.TP
.B DOCKER_AUTH_CONFIG
The text of a login file of Docker or podman.
.TP
.B CACHE_DIRECTORY
The folder of the cache where nothing else names one; systemd sets it.
.TP
.B NO_COLOR
When it is not empty, or
.B TERM
is dumb, the log has no colours. Only a terminal is sent any.
.TP
.B SSL_CERT_FILE, SSL_CERT_DIR
Where the trust roots of this machine are, in place of the usual places.
.SH "FILES"
.TP
.I FILE
The configuration, TOML, as \-\-config names it.
.TP
.I /tmp/cache/oci
The folder of the cache where neither \-\-cache\-dir nor the key cache_dir names another. It does not last.
.SH "SIGNALS"
.TP
.B SIGTERM, SIGINT
No new connections; answers under way may end, for up to 25 seconds; then it ends with status 0. A second one ends it at once.
.TP
.B SIGHUP
The same where it comes of a terminal that was closed; elsewhere a line in the log and nothing else.
"#;

/// The completion script for `shell`.
pub(super) fn completions(shell: Shell) -> Vec<u8> {
    let mut command = args::command();
    let name = command.get_name().to_owned();
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut command, name, &mut script);
    script
}

/// The manual page, in roff: the program's, then one section for each command.
pub(super) fn man() -> io::Result<Vec<u8>> {
    let mut page = Vec::new();
    let command = args::command();
    let whole = Man::new(command.clone());
    whole.render_title(&mut page)?;
    whole.render_name_section(&mut page)?;
    whole.render_synopsis_section(&mut page)?;
    whole.render_description_section(&mut page)?;
    whole.render_options_section(&mut page)?;
    for below in commands(&command) {
        section(&mut page, below)?;
    }
    page.write_all(MORE.as_bytes())?;
    Ok(page)
}

/// The commands below `command` that do something themselves.
fn commands(command: &Command) -> Vec<&Command> {
    let shown = command
        .get_subcommands()
        .filter(|below| !below.is_hide_set() && below.get_name() != "help");
    shown
        .flat_map(|below| {
            let deeper = commands(below);
            if deeper.is_empty() {
                vec![below]
            } else {
                deeper
            }
        })
        .collect()
}

/// One command's own arguments; the flags that all have were told before.
fn section(page: &mut Vec<u8>, command: &Command) -> io::Result<()> {
    let name = command.get_bin_name().unwrap_or_else(|| command.get_name());
    writeln!(page, ".SH \"{}\"", name.to_uppercase().replace('-', "\\-"))?;
    if let Some(about) = command.get_about() {
        // A line of roff must not begin with a dot or a quote; no description does.
        writeln!(page, "{about}")?;
    }
    let own = command.clone().mut_args(|arg| {
        let everywhere = arg.is_global_set() || arg.get_id() == "help";
        arg.hide(everywhere)
    });
    let mut options = Vec::new();
    Man::new(own).render_options_section(&mut options)?;
    let text = String::from_utf8_lossy(&options);
    // Each part that is rendered brings a heading and a preamble; the page has both already.
    let known = [".SH", ".ie", ".el"];
    let lines = text.lines();
    for line in lines.filter(|line| !known.iter().any(|start| line.starts_with(start))) {
        writeln!(page, "{line}")?;
    }
    Ok(())
}
