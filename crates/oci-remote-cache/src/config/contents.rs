//! The files that a configuration names, read as serving reads them, by the same functions: `config check` must not approve of what serving
//! then refuses.
//!
//! Nothing is kept but clients' names, which notes are made of. That files are there at all is `check.rs`.

use std::path::Path;

use super::Config;
use super::error::{ConfigError, Origin, Problem};
use super::keys::KeyPath;
use super::settings::Settings;
use crate::http::doorman::Books;
use crate::http::listen::{Tls, TlsFiles};
use crate::upstream::{LoginFile, judge_ca_file};
use crate::watched::{FileError, read_file};

/// Whom the files of clients name.
#[derive(Debug, Default)]
pub struct Contents {
    /// Those with a password; none without such a file.
    pub(super) passwords: Option<Vec<String>>,
    /// Those with a token; none without such a file.
    pub(super) tokens: Option<Vec<String>>,
}

impl Contents {
    /// Reads the files of `config`, and says of each that serving would refuse why, and which key names it.
    pub fn read(config: &Config, settings: &Settings) -> Result<Self, ConfigError> {
        let mut problems = Vec::new();
        let mut note = |key: &[&str], why: String| {
            let path = KeyPath::new(key);
            let origin = settings.get(&path).map(|setting| &setting.origin);
            problems.push(Problem::at(origin.unwrap_or(&Origin::Default), &path, why));
        };
        if let Err((key, error)) = tls(config) {
            note(&["tls", key], error.to_string());
        }
        if let Err(error) = config.docker_config.as_deref().map_or(Ok(()), login_file) {
            note(&["docker_config"], error.to_string());
        }
        for upstream in &config.upstreams {
            let judged = upstream.ca_file.as_deref().map_or(Ok(()), judge_ca_file);
            if let Err(error) = judged {
                note(&["upstreams", &upstream.key, "ca_file"], error.to_string());
            }
        }
        let mut names = |key: &str, file: Option<&Path>, read: fn(&Path) -> _| {
            let read: Result<Option<Vec<String>>, FileError> = file.map(read).transpose();
            read.unwrap_or_else(|error| {
                note(&["clients", key], error.to_string());
                None
            })
        };
        let clients = &config.clients;
        let contents = Self {
            passwords: names(
                "htpasswd",
                clients.htpasswd.as_deref(),
                Books::with_passwords,
            ),
            tokens: names("tokens", clients.tokens.as_deref(), Books::with_tokens),
        };
        problems.extend(variable(config));
        ConfigError::unless_any(problems, contents)
    }
}

/// The key of the file that is wrong, and what is.
fn tls(config: &Config) -> Result<(), (&'static str, FileError)> {
    let Some(tls) = &config.tls else {
        return Ok(());
    };
    let opened = Tls::open(&TlsFiles {
        certificate: tls.cert_file.clone(),
        key: tls.key_file.clone(),
        client_authorities: tls.client_ca_file.clone(),
    });
    opened.map(drop).map_err(|error| {
        let key = match error.path() {
            path if path == tls.key_file => "key_file",
            path if Some(path) == tls.client_ca_file.as_deref() => "client_ca_file",
            _ => "cert_file",
        };
        (key, error)
    })
}

fn login_file(path: &Path) -> Result<(), FileError> {
    let parsed = LoginFile::parse(&read_file(path)?);
    parsed.map(drop).map_err(|why| FileError::new(path, why))
}

fn variable(config: &Config) -> Option<Problem> {
    let text = config.docker_auth.as_ref()?;
    let why = LoginFile::parse(text.expose().as_bytes()).err()?;
    Some(Problem::of("environment variable DOCKER_AUTH_CONFIG", why))
}
