//! How the process is asked to stop, and how it is not.

use std::io::{self, IsTerminal as _};

use tokio::signal::unix::{Signal, SignalKind, signal};

/// The signals that ask a service to stop.
#[derive(Debug)]
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
    /// Somebody sits before it, and a hangup means that they left.
    attended: bool,
}

impl Signals {
    /// Listens from now on.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
            attended: io::stdin().is_terminal(),
        })
    }

    /// Returns when the process is asked to stop.
    pub async fn next(&mut self) {
        loop {
            tokio::select! {
                _ = self.terminate.recv() => return,
                _ = self.interrupt.recv() => return,
                _ = self.hangup.recv() => {}
            }
            if self.attended {
                return;
            }
            tracing::warn!(
                "nothing is read again on SIGHUP: a changed configuration takes a restart"
            );
        }
    }
}
