//! A pull-through cache for OCI registries: clients on one side, registries on the other, verified bytes on disk between them.
//!
//! `ARCHITECTURE.md` at the root tells the floors and walks a request through them. Each module uses only the floors below it;
//! `tests/it/floors.rs` keeps that so.

// Ground: what every floor may use.
pub mod clock;
pub mod deadline;
pub mod metrics;
pub mod names;
pub mod secret;
pub mod signals;
pub mod tasks;
pub mod verdict;
pub mod watched;

// Floor 1: where bytes can be.
pub mod store;
pub mod upstream;

// Floor 2: decisions and motion.
pub mod fill;
pub mod policy;

// Floor 3: the cache.
pub mod cache;

// Floor 4: the doors.
pub mod admin;
pub mod http;

// Floor 5: assembly.
pub mod app;
pub mod cli;
pub mod config;
