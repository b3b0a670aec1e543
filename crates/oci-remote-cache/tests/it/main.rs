//! Front-door tests: the real binary, asked over sockets by a raw client, in front of a registry that does as it is told.
//!
//! One file for each promise. A test asserts what the client saw, which files the store holds, and which requests the upstream got; the
//! last is what a cache is for.

#[cfg(test)]
mod ahead;
mod archive;
#[cfg(test)]
mod by_login;
#[cfg(test)]
mod caps;
#[cfg(test)]
mod cli;
#[cfg(test)]
mod clients;
#[cfg(test)]
mod contract;
#[cfg(test)]
mod deeds;
#[cfg(test)]
mod durable;
#[cfg(test)]
mod dying_disk;
#[cfg(test)]
mod encrypted;
#[cfg(test)]
mod engine;
#[cfg(test)]
mod exact;
#[cfg(test)]
mod explains;
mod extras;
#[cfg(test)]
mod floors;
#[cfg(test)]
mod freshness;
#[cfg(test)]
mod heads;
#[cfg(test)]
mod hygiene;
#[cfg(test)]
mod injection;
#[cfg(test)]
mod inward;
#[cfg(test)]
mod leaks;
#[cfg(test)]
mod listings;
#[cfg(test)]
mod logins;
#[cfg(test)]
mod moved;
#[cfg(test)]
mod never_worse;
#[cfg(test)]
mod once;
#[cfg(test)]
mod one_login;
#[cfg(test)]
mod proxies;
#[cfg(test)]
mod ranges;
#[cfg(test)]
mod redirects;
#[cfg(test)]
mod resolution;
#[cfg(test)]
mod routing;
#[cfg(test)]
mod serving;
#[cfg(test)]
mod shares;
#[cfg(test)]
mod sizes;
#[cfg(test)]
mod stage;
#[cfg(test)]
mod start;
#[cfg(test)]
mod threats;
#[cfg(test)]
mod tight;
#[cfg(test)]
mod tokens;
#[cfg(test)]
mod unbroken;
#[cfg(test)]
mod upstream_auth;
#[cfg(test)]
mod whose_word;
