//! Values: as written, as read, and as printed again.
//!
//! Judges one value by its key's kind. What values must be to each other, and what files they point at, is `check.rs`.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use url::Url;

use super::hosts::{read_host, read_host_or_network, read_name, read_network, read_url};
use super::keys::Kind;
use super::log::log_filter;
use super::logins::{self, PrefixLogin};
use super::tags::{self, TagRule};
use super::units::{duration_text, parse_duration, parse_size, size_text};
use crate::policy::rules::Rule;
use crate::secret::Secret;
use crate::upstream::Proxy;

/// A value as a source wrote it.
#[derive(Clone)]
pub(super) enum Written {
    /// A string, or the text of an environment variable.
    Text(String),
    /// A whole number; none when it is beyond 64 bits or negative.
    Integer(Option<u64>),
    /// `true` or `false`.
    Flag(bool),
    /// Several.
    List(Vec<Self>),
    /// A table of its own.
    Table(Vec<(String, Self)>),
    /// What no key takes: a date, a fraction.
    Other(&'static str),
}

/// A value as its key's kind reads it.
#[derive(Debug, Clone)]
pub(super) enum Value {
    /// An address to listen on.
    Address(SocketAddr),
    /// A file or folder.
    Path(PathBuf),
    /// Any text.
    Text(String),
    /// Bytes.
    Size(u64),
    /// A span of time.
    Duration(Duration),
    /// Yes or no.
    Flag(bool),
    /// A number of things.
    Count(usize),
    /// A registry's address.
    Url(Url),
    /// Several.
    Urls(Vec<Url>),
    /// Several names, hosts or networks.
    Texts(Vec<String>),
    /// Where a secret is.
    Secret(SecretSource),
    /// A proxy, or where its URL is.
    Proxy(SecretSource),
    /// How long tags of some patterns last.
    TagRules(Vec<TagRule>),
    /// Logins for some repositories.
    Logins(Vec<PrefixLogin>),
}

/// Where a secret's text comes from.
#[derive(Debug, Clone)]
pub(super) enum SecretSource {
    /// The value itself.
    Text(Secret),
    /// The content of this file.
    File(PathBuf),
    /// This environment variable.
    Variable(String),
}

/// A type that some values hold.
pub(super) trait Typed: Clone {
    /// The value's content, if it is of this type.
    fn of(value: &Value) -> Option<&Self>;
}

impl Written {
    /// An environment variable's text in the shape that `kind` wants.
    pub(super) fn from_variable(kind: Kind, text: &str) -> Self {
        let items = text.split(',').map(str::trim);
        let items = items.filter(|item| !item.is_empty());
        match kind {
            Kind::Urls
            | Kind::Names
            | Kind::Hosts
            | Kind::HostsOrNetworks
            | Kind::Networks
            | Kind::Rules => {
                return Self::List(items.map(|item| Self::Text(item.to_owned())).collect());
            }
            Kind::TagRules => return Self::List(items.map(tags::from_variable).collect()),
            Kind::Address
            | Kind::Path
            | Kind::UpstreamName
            | Kind::LogFilter
            | Kind::Size
            | Kind::SizeOrNothing
            | Kind::Duration
            | Kind::Flag
            | Kind::Count
            | Kind::Url
            | Kind::Username
            | Kind::Secret
            | Kind::Logins
            | Kind::Proxy
            | Kind::Choice(_) => {}
        }
        // What does not read as a flag or number is left as text, which its key then refuses.
        let flag = (kind == Kind::Flag).then(|| text.parse().ok()).flatten();
        let number = (kind == Kind::Count).then(|| text.parse().ok()).flatten();
        match (flag, number) {
            (Some(flag), _) => Self::Flag(flag),
            (None, Some(number)) => Self::Integer(Some(number)),
            (None, None) => Self::Text(text.to_owned()),
        }
    }

    /// What a message calls this shape.
    pub(super) fn found(&self) -> &'static str {
        match self {
            Self::Text(_) => "a string",
            Self::Integer(_) => "an integer",
            Self::Flag(_) => "a boolean",
            Self::List(_) => "an array",
            Self::Table(_) => "a table",
            Self::Other(found) => found,
        }
    }

    fn text(&self, wanted: &str) -> Result<&str, String> {
        match self {
            Self::Text(text) => Ok(text),
            Self::Integer(_) | Self::Flag(_) | Self::List(_) | Self::Table(_) | Self::Other(_) => {
                Err(self.unlike(wanted))
            }
        }
    }

    fn unlike(&self, wanted: &str) -> String {
        format!("must be {wanted}, found {}", self.found())
    }

    fn items<T>(&self, read: fn(&str) -> Result<T, String>) -> Result<Vec<T>, String> {
        let Self::List(items) = self else {
            return Err(self.unlike("an array of strings"));
        };
        items
            .iter()
            .map(|item| read(item.text("an array of strings")?))
            .collect()
    }
}

impl Value {
    /// Reads `written` as `kind` wants it; the error says what would be right.
    pub(super) fn read(kind: Kind, written: &Written) -> Result<Self, String> {
        match kind {
            Kind::Address => read_address(written.text("a string")?).map(Self::Address),
            Kind::Path => read_path(written.text("a string")?).map(Self::Path),
            Kind::UpstreamName => Ok(Self::Text(written.text("a string")?.to_ascii_lowercase())),
            Kind::LogFilter => read_filter(written.text("a string")?).map(Self::Text),
            Kind::Size => read_size(written).map(Self::Size),
            Kind::SizeOrNothing => read_bytes(written).map(Self::Size),
            Kind::Duration => parse_duration(written.text(A_DURATION)?).map(Self::Duration),
            Kind::Flag => read_flag(written).map(Self::Flag),
            Kind::Count => read_count(written).map(Self::Count),
            Kind::Url => read_url(written.text("a string")?).map(Self::Url),
            Kind::Urls => written.items(read_url).map(Self::Urls),
            Kind::Names => written.items(read_name).map(Self::Texts),
            Kind::Hosts => written.items(read_host).map(Self::Texts),
            Kind::HostsOrNetworks => written.items(read_host_or_network).map(Self::Texts),
            Kind::Networks => written.items(read_network).map(Self::Texts),
            Kind::Rules => written.items(read_rule).map(Self::Texts),
            Kind::Username => read_username(written.text("a string")?).map(Self::Text),
            Kind::Secret => read_secret(written).map(Self::Secret),
            Kind::Proxy => read_proxy(written).map(Self::Proxy),
            Kind::TagRules => tags::read(written).map(Self::TagRules),
            Kind::Logins => logins::read(written).map(Self::Logins),
            Kind::Choice(words) => read_choice(words, written.text("a string")?),
        }
    }

    /// Where the secrets in it are.
    pub(super) fn secrets(&self) -> Vec<&SecretSource> {
        match self {
            Self::Secret(source) | Self::Proxy(source) => vec![source],
            Self::Logins(logins) => logins.iter().map(|login| &login.password).collect(),
            Self::Address(_)
            | Self::Path(_)
            | Self::Text(_)
            | Self::Size(_)
            | Self::Duration(_)
            | Self::Flag(_)
            | Self::Count(_)
            | Self::Url(_)
            | Self::Urls(_)
            | Self::Texts(_)
            | Self::TagRules(_) => Vec::new(),
        }
    }

    /// The value as TOML. A secret is shown as three stars.
    pub(super) fn literal(&self) -> String {
        match self {
            Self::Address(address) => quoted(&address.to_string()),
            Self::Path(path) => quoted(&path.to_string_lossy()),
            Self::Text(text) => quoted(text),
            Self::Size(bytes) => quoted(&size_text(*bytes)),
            Self::Duration(span) => quoted(&duration_text(*span)),
            Self::Flag(flag) => flag.to_string(),
            Self::Count(count) => count.to_string(),
            Self::Url(url) => quoted(url_text(url)),
            Self::Urls(urls) => array(urls.iter().map(url_text)),
            Self::Texts(texts) => array(texts.iter()),
            Self::Proxy(SecretSource::Text(text)) => quoted(&proxy_text(text.expose())),
            Self::Secret(_) | Self::Proxy(_) => quoted("***"),
            Self::TagRules(rules) => tags::literal(rules),
            Self::Logins(logins) => logins::literal(logins),
        }
    }
}

macro_rules! typed {
    ($($variant:ident $type:ty),+ $(,)?) => {$(
        impl Typed for $type {
            fn of(value: &Value) -> Option<&Self> {
                if let Value::$variant(content) = value { Some(content) } else { None }
            }
        }
    )+};
}

typed!(
    Address SocketAddr,
    Path PathBuf,
    Text String,
    Size u64,
    Duration Duration,
    Flag bool,
    Count usize,
    Url Url,
    Urls Vec<Url>,
    Texts Vec<String>,
    TagRules Vec<TagRule>,
    Logins Vec<PrefixLogin>,
);

impl Typed for SecretSource {
    fn of(value: &Value) -> Option<&Self> {
        if let Value::Secret(source) | Value::Proxy(source) = value {
            Some(source)
        } else {
            None
        }
    }
}

/// What a proxy's key says to do without one.
pub(super) const NO_PROXY: &str = "none";

const A_DURATION: &str = "a string like \"1m\"";
const A_SECRET: &str = "a string, { file = \"…\" } or { env = \"…\" }";

fn read_address(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_not_an_address| {
        let port = text.rsplit_once(':').map(|(_, port)| port);
        match port.filter(|port| port.parse::<u16>().is_ok()) {
            Some(port) => format!(
                "bad address {text:?}: the part before the port must be an IP address, as in \"[::]:{port}\" or \"127.0.0.1:{port}\""
            ),
            None => format!("bad address {text:?}: write it like \"[::]:8080\" or \"127.0.0.1:8080\""),
        }
    })
}

fn read_path(text: &str) -> Result<PathBuf, String> {
    // The replacement character stands where an argument or a variable was not UTF-8: that path is another one.
    if text.is_empty() || text.contains(['\0', '\u{fffd}']) {
        return Err("must be a path in UTF-8, not empty".to_owned());
    }
    if text.starts_with('~') {
        // Shells do that, and not in the middle of an argument.
        return Err(format!(
            "~ is not expanded: write the whole path in place of {text:?}, or \"./{text}\" where that is the name"
        ));
    }
    Ok(PathBuf::from(text))
}

fn read_filter(text: &str) -> Result<String, String> {
    log_filter(text).map(|_filter| text.to_owned())
}

fn read_size(written: &Written) -> Result<u64, String> {
    // Elsewhere 0 often means "no limit": whoever writes it must not get the opposite.
    let too_small = || "bad size: must be at least 1 byte".to_owned();
    if matches!(written, Written::Integer(None)) {
        return Err(too_small());
    }
    let bytes = Some(read_bytes(written)?).filter(|&bytes| bytes > 0);
    bytes.ok_or_else(too_small)
}

fn read_bytes(written: &Written) -> Result<u64, String> {
    match written {
        Written::Text(text) => parse_size(text),
        Written::Integer(Some(bytes)) => Ok(*bytes),
        Written::Integer(None) => Err("bad size: must not be negative".to_owned()),
        Written::Flag(_) | Written::List(_) | Written::Table(_) | Written::Other(_) => {
            Err(written.unlike("a size like \"50GiB\""))
        }
    }
}

fn read_flag(written: &Written) -> Result<bool, String> {
    if let Written::Flag(flag) = written {
        Ok(*flag)
    } else {
        Err(written.unlike("true or false"))
    }
}

fn read_count(written: &Written) -> Result<usize, String> {
    let Written::Integer(number) = written else {
        return Err(written.unlike("a whole number"));
    };
    number
        .and_then(|number| usize::try_from(number).ok())
        .filter(|number| (1..=65_536).contains(number))
        .ok_or_else(|| "must be a whole number from 1 to 65536".to_owned())
}

fn read_rule(text: &str) -> Result<String, String> {
    match text.parse::<Rule>() {
        Ok(rule) => Ok(rule.to_string()),
        Err(error) => Err(error.to_string()),
    }
}

pub(super) fn read_username(text: &str) -> Result<String, String> {
    // RFC 7617 section 2: what stands before the first colon is the user name.
    if text.is_empty() || text.contains(':') || text.chars().any(char::is_control) {
        return Err("must be a user name: not empty, no colon, no control characters".to_owned());
    }
    Ok(text.to_owned())
}

pub(super) fn read_secret(written: &Written) -> Result<SecretSource, String> {
    match written {
        Written::Text(text) => Ok(SecretSource::Text(Secret::new(text.clone()))),
        Written::Table(entries) => match entries.as_slice() {
            [(name, Written::Text(path))] if name == "file" => {
                read_path(path).map(SecretSource::File)
            }
            [(name, Written::Text(variable))] if name == "env" => {
                Ok(SecretSource::Variable(variable.clone()))
            }
            _ => Err(format!("must be {A_SECRET}")),
        },
        Written::Integer(_) | Written::Flag(_) | Written::List(_) | Written::Other(_) => {
            Err(written.unlike(A_SECRET))
        }
    }
}

fn read_proxy(written: &Written) -> Result<SecretSource, String> {
    let source = read_secret(written)?;
    match &source {
        SecretSource::Text(text) if text.expose() != NO_PROXY => {
            let parsed = text.expose().parse::<Proxy>();
            parsed.map_err(|error| error.to_string()).map(|_| source)
        }
        SecretSource::Text(_) | SecretSource::File(_) | SecretSource::Variable(_) => Ok(source),
    }
}

/// A proxy without its login.
fn proxy_text(text: &str) -> String {
    match text.parse::<Proxy>() {
        Ok(proxy) => proxy.masked(),
        Err(_none) => NO_PROXY.to_owned(),
    }
}

fn read_choice(words: &[&str], text: &str) -> Result<Value, String> {
    if words.contains(&text) {
        return Ok(Value::Text(text.to_owned()));
    }
    let words: Vec<String> = words.iter().map(|word| quoted(word)).collect();
    Err(format!("must be {}, found {text:?}", words.join(" or ")))
}

/// `text` as a TOML basic string.
pub(super) fn quoted(text: &str) -> String {
    let mut quoted = String::from("\"");
    for character in text.chars() {
        match character {
            '"' | '\\' => quoted.extend(['\\', character]),
            _ if character.is_control() => {
                // Writing to a String cannot fail.
                write!(quoted, "\\u{:04X}", u32::from(character)).ok();
            }
            _ => quoted.push(character),
        }
    }
    quoted.push('"');
    quoted
}

fn array<T: AsRef<str>>(items: impl Iterator<Item = T>) -> String {
    let items: Vec<String> = items.map(|item| quoted(item.as_ref())).collect();
    format!("[{}]", items.join(", "))
}

/// `url` as people write it: no slash where there is no path.
fn url_text(url: &Url) -> &str {
    url.as_str().trim_end_matches('/')
}
