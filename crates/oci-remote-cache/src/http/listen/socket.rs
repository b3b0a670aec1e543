//! Binding a listener's socket, and how many connections the open-file limit allows.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tracing::warn;

use super::tls::Tls;
use crate::http::fair::Crowd;

/// Connections the kernel holds while the table is full; it cuts the number to its own limit.
const BACKLOG: i32 = 4096;

/// Descriptors kept for everything that is no client connection's.
const FILES_KEPT: u64 = 256;

/// Connections wanted in any case, where the open-file limit allows them.
const CONNECTIONS_WANTED: u64 = 10_000;

/// Connections allowed at most: each takes some 30 KB.
const CONNECTIONS_MOST: u64 = 100_000;

/// A bound socket.
#[derive(Debug)]
pub struct Listener {
    socket: TcpListener,
    address: SocketAddr,
    what: &'static str,
    tls: Option<Tls>,
    crowd: Option<Crowd>,
}

/// The address of a configuration key cannot be listened on.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Another program has it.
    #[error(
        "cannot listen on {address} (`{what}`): another program uses it; stop that program, or set `{what}` to another port"
    )]
    InUse {
        /// The address.
        address: SocketAddr,
        /// The configuration key.
        what: &'static str,
    },
    /// Low ports need a privilege.
    #[error(
        "cannot listen on {address} (`{what}`): not allowed; set `{what}` to a port from 1024 on, or grant CAP_NET_BIND_SERVICE"
    )]
    NotAllowed {
        /// The address.
        address: SocketAddr,
        /// The configuration key.
        what: &'static str,
    },
    /// No such address on this machine.
    #[error(
        "cannot listen on {address} (`{what}`): this machine has no such address; set `{what}` to one it has, or to \"[::]:{}\" for all",
        address.port()
    )]
    NoSuchAddress {
        /// The address.
        address: SocketAddr,
        /// The configuration key.
        what: &'static str,
    },
    /// Anything else.
    #[error("cannot listen on {address} (`{what}`): {source}")]
    Other {
        /// The address.
        address: SocketAddr,
        /// The configuration key.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

impl Listener {
    /// Binds `address`, which the configuration gives under the key `what`.
    ///
    /// `[::]` takes IPv4 too, and is `0.0.0.0` on a machine without IPv6.
    pub fn bind(address: SocketAddr, what: &'static str) -> Result<Self, BindError> {
        let any_v6 = address.is_ipv6() && address.ip().is_unspecified();
        let bound = match bind_socket(address) {
            Err(Errno::AFNOSUPPORT | Errno::ADDRNOTAVAIL) if any_v6 => {
                bind_socket(SocketAddr::from((Ipv4Addr::UNSPECIFIED, address.port())))
            }
            bound => bound,
        };
        let socket = TcpListener::from(bound.map_err(|e| BindError::of(e, address, what))?);
        let address = socket.local_addr().map_err(|source| BindError::Other {
            address,
            what,
            source,
        })?;
        Ok(Self {
            socket,
            address,
            what,
            tls: None,
            crowd: None,
        })
    }

    /// The same, with a limit for each client address.
    #[must_use]
    pub fn with_crowd(self, crowd: Option<Crowd>) -> Self {
        Self { crowd, ..self }
    }

    pub(super) fn crowd(&self) -> Option<Crowd> {
        self.crowd.clone()
    }

    /// The same, for clients that speak TLS.
    #[must_use]
    pub fn with_tls(self, tls: Option<Tls>) -> Self {
        Self { tls, ..self }
    }

    /// What it speaks TLS with, if it does.
    pub(super) fn tls(&self) -> Option<Tls> {
        self.tls.clone()
    }

    /// The address it got: the port is the system's choice where 0 was asked for.
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// The configuration key it was bound for.
    pub(super) fn what(&self) -> &'static str {
        self.what
    }

    pub(super) fn into_tokio(self) -> io::Result<tokio::net::TcpListener> {
        tokio::net::TcpListener::from_std(self.socket)
    }
}

impl BindError {
    fn of(error: Errno, address: SocketAddr, what: &'static str) -> Self {
        match error {
            Errno::ADDRINUSE => Self::InUse { address, what },
            Errno::ACCESS | Errno::PERM => Self::NotAllowed { address, what },
            Errno::ADDRNOTAVAIL | Errno::AFNOSUPPORT => Self::NoSuchAddress { address, what },
            other => Self::Other {
                address,
                what,
                source: other.into(),
            },
        }
    }
}

fn bind_socket(address: SocketAddr) -> rustix::io::Result<OwnedFd> {
    let family = match address {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
    // A restart must not wait for the last run's connections to be forgotten.
    sockopt::set_socket_reuseaddr(&socket, true)?;
    if address.is_ipv6() && address.ip().is_unspecified() {
        sockopt::set_ipv6_v6only(&socket, false)?;
    }
    rustix::net::bind(&socket, &address)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket)
}

/// Raises the open-file limit as far as it may be raised; the limit then in force.
pub fn raise_open_files() -> u64 {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    let in_force = match setrlimit(Resource::Nofile, raised) {
        Ok(()) => raised.current,
        Err(error) => {
            warn!(%error, "cannot raise the open-file limit");
            limit.current
        }
    };
    // None is "no limit".
    in_force.unwrap_or(u64::MAX)
}

/// How many client connections so many open files allow: half of them, for each may need a file of its own, and more than half where
/// that is needed for 10 000 (readers of one blob share its file).
pub fn connection_limit(open_files: u64) -> usize {
    let free = open_files.saturating_sub(FILES_KEPT);
    let wanted = CONNECTIONS_WANTED.min(free / 4 * 3);
    let connections = (free / 2).max(wanted).clamp(16, CONNECTIONS_MOST);
    usize::try_from(connections).unwrap_or(usize::MAX)
}
