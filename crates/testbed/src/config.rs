//! The configuration that a cache under test is started with, in the words of its own file.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use crate::cache::CacheProcess;
use crate::token::TOKEN_MARK;

/// One `[upstreams."key"]` section.
#[derive(Clone, Debug)]
pub struct Upstream {
    key: String,
    lines: String,
    secrets: Vec<String>,
    tag_ttl: String,
    negative_ttl: String,
}

/// What the cache is started with.
#[derive(Debug)]
pub struct CacheBuilder {
    pub(crate) binary: PathBuf,
    host: String,
    pub(crate) tls: bool,
    default_upstream: Option<String>,
    upstreams: Vec<Upstream>,
    top: String,
    cache: String,
    pub(crate) environment: Vec<(String, String)>,
    pub(crate) secrets: Vec<String>,
    pub(crate) disk: Option<u64>,
    pub(crate) names: Vec<(String, Vec<String>)>,
}

impl Upstream {
    /// A section with a long `tag_ttl` and no `negative_ttl`, so that only a test that is about time depends on it.
    pub fn new(key: &str, url: impl AsRef<str>) -> Self {
        Upstream {
            key: key.to_owned(),
            lines: format!("url = {}\n", quoted(url.as_ref())),
            secrets: Vec::new(),
            tag_ttl: "1h".to_owned(),
            negative_ttl: "0s".to_owned(),
        }
    }

    /// Names of one segment get `library/`.
    #[must_use]
    pub fn library(self) -> Self {
        self.line("library = true")
    }

    /// Further keys.
    #[must_use]
    pub fn aliases(self, aliases: &[&str]) -> Self {
        self.line(&format!("aliases = {}", list(aliases)))
    }

    /// How long a tag is served without asking.
    #[must_use]
    pub fn tag_ttl(mut self, value: &str) -> Self {
        value.clone_into(&mut self.tag_ttl);
        self
    }

    /// How long a 404 is remembered.
    #[must_use]
    pub fn negative_ttl(mut self, value: &str) -> Self {
        value.clone_into(&mut self.negative_ttl);
        self
    }

    /// Credentials; the password becomes a secret that no log may hold.
    #[must_use]
    pub fn credentials(mut self, username: &str, password: &str) -> Self {
        self.secrets.push(password.to_owned());
        let (username, password) = (quoted(username), quoted(password));
        self.line(&format!(
            "credentials = {{ username = {username}, password = {password} }}"
        ))
    }

    /// Hosts that may get the credentials.
    #[must_use]
    pub fn token_realms(self, hosts: &[&str]) -> Self {
        self.line(&format!("token_realms = {}", list(hosts)))
    }

    /// Further addresses of the same content.
    #[must_use]
    pub fn mirrors(self, urls: &[&str]) -> Self {
        self.line(&format!("mirrors = {}", list(urls)))
    }

    /// Any other line of the section.
    #[must_use]
    pub fn line(mut self, line: &str) -> Self {
        self.lines.extend([line, "\n"]);
        self
    }
}

impl CacheBuilder {
    pub(crate) fn new(binary: PathBuf) -> Self {
        CacheBuilder {
            binary,
            host: "127.0.0.1".to_owned(),
            tls: false,
            default_upstream: None,
            upstreams: Vec::new(),
            top: String::new(),
            cache: String::new(),
            environment: Vec::new(),
            secrets: vec![TOKEN_MARK.to_owned()],
            disk: None,
            names: Vec::new(),
        }
    }

    /// Adds an upstream; the first one is the default for names without a key, unless said otherwise.
    #[must_use]
    pub fn upstream(mut self, upstream: Upstream) -> Self {
        self.default_upstream
            .get_or_insert_with(|| upstream.key.clone());
        self.secrets.extend(upstream.secrets.iter().cloned());
        self.upstreams.push(upstream);
        self
    }

    /// Names the default upstream; call it after the upstreams.
    #[must_use]
    pub fn default_upstream(mut self, key: &str) -> Self {
        self.default_upstream = Some(key.to_owned());
        self
    }

    /// Leaves `default_upstream` out; call it after the upstreams.
    #[must_use]
    pub fn no_default_upstream(mut self) -> Self {
        self.default_upstream = None;
        self
    }

    /// `max_size` of the cache.
    #[must_use]
    pub fn max_size(self, value: &str) -> Self {
        self.cache_line(&format!("max_size = {}", quoted(value)))
    }

    /// Any other line of `[cache]`.
    #[must_use]
    pub fn cache_line(mut self, line: &str) -> Self {
        self.cache.extend([line, "\n"]);
        self
    }

    /// Listens on this address in place of 127.0.0.1, at which tests reach it all the same.
    #[must_use]
    pub fn listen_on(mut self, host: &str) -> Self {
        host.clone_into(&mut self.host);
        self
    }

    /// Its port speaks TLS, which the test bed does not: it is ready when it takes connections.
    #[must_use]
    pub fn tls(mut self) -> Self {
        self.tls = true;
        self
    }

    /// Any other line outside of a table.
    #[must_use]
    pub fn line(mut self, line: &str) -> Self {
        self.top.extend([line, "\n"]);
        self
    }

    /// A variable for the process.
    #[must_use]
    pub fn environment(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Logs all there is.
    #[must_use]
    pub fn trace(self) -> Self {
        self.environment("RUST_LOG", "trace")
    }

    /// A text that must not be in the log at the end.
    #[must_use]
    pub fn secret(mut self, secret: &str) -> Self {
        self.secrets.push(secret.to_owned());
        self
    }

    /// Gives the cache a disk of so many bytes that is empty after each restart; needs [`can_limit_disk`](crate::disk::can_limit_disk).
    #[must_use]
    pub fn disk(mut self, bytes: u64) -> Self {
        self.disk = Some(bytes);
        self
    }

    /// Lets a name resolve to these addresses for the cache; needs [`can_name_hosts`](crate::disk::can_name_hosts), and no disk of its own.
    /// [`CacheProcess::rename`] changes it later.
    #[must_use]
    pub fn name(mut self, name: &str, addresses: &[&str]) -> Self {
        let addresses = addresses.iter().map(|&address| address.to_owned());
        self.names.push((name.to_owned(), addresses.collect()));
        self
    }

    /// Starts the cache and waits until it answers.
    pub async fn start(self) -> CacheProcess {
        CacheProcess::launch(self).await
    }

    pub(crate) fn text(&self, ports: (u16, u16), cache_dir: &Path) -> String {
        let mut text = format!(
            "listen = \"{}:{}\"\nadmin_listen = \"127.0.0.1:{}\"\ncache_dir = {}\n",
            self.host,
            ports.0,
            ports.1,
            quoted(&cache_dir.to_string_lossy())
        );
        if let Some(key) = &self.default_upstream {
            writeln!(text, "default_upstream = {}", quoted(key)).ok();
        }
        write!(text, "{}\n[cache]\n{}", self.top, self.cache).ok();
        for Upstream {
            key,
            lines,
            tag_ttl,
            negative_ttl,
            ..
        } in &self.upstreams
        {
            write!(text, "\n[upstreams.{}]\n{lines}", quoted(key)).ok();
            writeln!(
                text,
                "tag_ttl = {}\nnegative_ttl = {}",
                quoted(tag_ttl),
                quoted(negative_ttl)
            )
            .ok();
        }
        text
    }
}

/// A TOML string.
fn quoted(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
}

fn list(items: &[&str]) -> String {
    let items: Vec<String> = items.iter().map(|item| quoted(item)).collect();
    format!("[{}]", items.join(", "))
}
