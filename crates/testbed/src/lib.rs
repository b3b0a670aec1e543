//! The bench that the front-door tests stand on: a scripted registry, a token service, a CDN origin, a raw
//! client, and a runner for the real binary. Everything speaks over loopback sockets, byte by byte, so that a
//! test can say exactly what an upstream does wrong and what a client saw. Never shipped.
//!
//! ```no_run
//! # async fn story(binary: &str) {
//! use testbed::{CacheProcess, ImageSpec, Kind, Registry, Upstream};
//!
//! let registry = Registry::start().await;
//! let image = registry.put_image(&ImageSpec::new("lib/app", "v1"));
//! let cache = CacheProcess::of(binary).upstream(Upstream::new("up", registry.url())).start().await;
//! cache.pull("up", &image).await;
//! assert_eq!(registry.count((Kind::Manifest, "GET")), 1);
//! cache.check_invariants().await;
//! # }
//! ```
#![expect(
    clippy::expect_used,
    clippy::panic,
    clippy::missing_panics_doc,
    clippy::indexing_slicing,
    reason = "test support: a failed expectation is a failed test"
)]

pub mod cache;
pub mod cdn;
pub mod client;
pub mod config;
pub mod disk;
pub mod exchange;
pub mod faults;
pub mod http;
pub mod image;
pub mod log;
pub mod proxy;
pub mod registry;
pub mod script;
pub mod tls;
pub mod token;
pub mod wire;

pub use cache::{CacheProcess, assert_good, eventually};
pub use cdn::Origin;
pub use client::{Background, Incoming, Request, Response};
pub use config::{CacheBuilder, Upstream};
pub use disk::{StoredFile, can_limit_disk, can_name_hosts};
pub use exchange::Exchange;
pub use faults::{Ending, ServeOptions};
pub use http::Server;
pub use image::{Content, Image, ImageSpec, MultiImage};
pub use log::{Entry, Headers, Kind};
pub use proxy::Proxy;
pub use registry::Registry;
pub use script::{Gate, Handler, Matcher};
pub use tls::TlsFront;
pub use token::{Auth, Basic, Bearer, TokenServer};
pub use wire::Connection;

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks although another test thread may have panicked: the first failure is the one to report.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
