//! The binary: hands the command line over.

use std::process::ExitCode;

use oci_remote_cache::app;
use oci_remote_cache::cli::{self, Actions};

fn main() -> ExitCode {
    cli::run(
        std::env::args_os(),
        &Actions {
            serve: app::serve_blocking,
            list: app::list,
            history: app::history,
        },
    )
}
