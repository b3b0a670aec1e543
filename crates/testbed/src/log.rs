//! What a server was asked: one entry for each request, told apart by how the paths of a registry are built.

use std::fmt;
use std::str::Split;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};

use tokio::time::Instant;

/// Header lines in the order of the wire.
pub type Headers = Vec<(String, String)>;

/// What a request is for, told from its path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// `/v2/`.
    Ping,
    /// `/v2/<name>/manifests/<reference>`.
    Manifest,
    /// `/v2/<name>/blobs/<digest>`, and an origin's `/cdn/<digest>`.
    Blob,
    /// `/v2/<name>/tags/list`.
    Tags,
    /// `/v2/<name>/referrers/<digest>`.
    Referrers,
    /// `/token`.
    Token,
    /// Anything else.
    Other,
}

/// One logged request, and what was answered so far.
#[derive(Clone, Debug)]
pub struct Entry {
    /// As sent.
    pub method: String,
    /// As sent, without the query.
    pub path: String,
    /// As sent, empty when there was none.
    pub query: String,
    /// As sent, in order.
    pub headers: Headers,
    /// What it is for.
    pub kind: Kind,
    /// The repository's name, empty where the path has none.
    pub repo: String,
    /// The tag or digest, percent-decoded, empty where the path has none.
    pub reference: String,
    /// The status that was answered; 0 as long as none was.
    pub status: u16,
    /// Body bytes handed to the socket.
    pub sent: u64,
    /// When the request had been read.
    pub at: Instant,
}

/// An entry whose answer is still being written.
#[derive(Debug)]
pub(crate) struct Record {
    pub(crate) entry: Entry,
    pub(crate) status: AtomicU16,
    pub(crate) sent: AtomicU64,
    /// The client is known to have left.
    pub(crate) gone: AtomicBool,
}

impl Kind {
    /// The kind, repository and reference of a path.
    fn of(path: &str) -> (Kind, &str, &str) {
        if path == "/v2" || path == "/v2/" {
            return (Kind::Ping, "", "");
        }
        if let Some(digest) = path.strip_prefix("/cdn/") {
            return (Kind::Blob, "", digest);
        }
        if path.starts_with("/token") {
            return (Kind::Token, "", "");
        }
        path.strip_prefix("/v2/")
            .and_then(Self::of_resource)
            .unwrap_or((Kind::Other, "", ""))
    }

    /// Read from the right end, as a name may hold any of the words.
    fn of_resource(rest: &str) -> Option<(Kind, &str, &str)> {
        if let Some(repo) = rest.strip_suffix("/tags/list") {
            return Some((Kind::Tags, repo, ""));
        }
        let (front, reference) = rest.rsplit_once('/')?;
        let (repo, word) = front.rsplit_once('/')?;
        let kind = match word {
            "manifests" => Kind::Manifest,
            "blobs" => Kind::Blob,
            "referrers" => Kind::Referrers,
            _ => return None,
        };
        Some((kind, repo, reference))
    }
}

impl Entry {
    /// From a request's head; None when it is none of HTTP/1.
    pub(crate) fn parse(head: &str) -> Option<Self> {
        let mut lines = head.split("\r\n");
        let mut words = lines.next()?.split(' ');
        let (method, target, version) = (words.next()?, words.next()?, words.next()?);
        if words.next().is_some() || !version.starts_with("HTTP/1.") {
            return None;
        }
        Some(Entry::new(method, target, parse_headers(lines)))
    }

    fn new(method: &str, target: &str, headers: Headers) -> Self {
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let (kind, repo, reference) = Kind::of(path);
        Entry {
            method: method.to_owned(),
            path: path.to_owned(),
            query: query.to_owned(),
            headers,
            kind,
            repo: repo.to_owned(),
            reference: decode(reference),
            status: 0,
            sent: 0,
            at: Instant::now(),
        }
    }

    /// The first header line of that name.
    pub fn header(&self, name: &str) -> Option<&str> {
        header(&self.headers, name)
    }

    /// The first query parameter of that name, decoded.
    pub fn parameter(&self, name: &str) -> Option<String> {
        self.parameters(name).into_iter().next()
    }

    /// Every query parameter of that name, decoded.
    pub fn parameters(&self, name: &str) -> Vec<String> {
        form(&self.query, name)
    }
}

/// `GET /v2/lib/app/tags/list?n=2`; a token request is shown without its query, which is mostly a scope.
impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.method, self.path)?;
        if self.query.is_empty() || self.kind == Kind::Token {
            return Ok(());
        }
        write!(f, "?{}", self.query)
    }
}

impl Record {
    pub(crate) fn new(entry: Entry) -> Self {
        Record {
            entry,
            status: AtomicU16::new(0),
            sent: AtomicU64::new(0),
            gone: AtomicBool::new(false),
        }
    }

    pub(crate) fn snapshot(&self) -> Entry {
        let (status, sent) = (
            self.status.load(Ordering::SeqCst),
            self.sent.load(Ordering::SeqCst),
        );
        Entry {
            status,
            sent,
            ..self.entry.clone()
        }
    }
}

/// Header lines to pairs; a line without a colon is kept with an empty value.
pub(crate) fn parse_headers(lines: Split<'_, &str>) -> Headers {
    lines
        .map(|line| line.split_once(':').unwrap_or((line, "")))
        .map(|(name, value)| (name.trim().to_owned(), value.trim().to_owned()))
        .collect()
}

/// The first header of that name.
pub(crate) fn header<'a>(headers: &'a [(String, String)], name: &str) -> Option<&'a str> {
    headers
        .iter()
        .find(|(key, _)| key.eq_ignore_ascii_case(name))
        .map(|(_, value)| value.as_str())
}

/// Every value of one name in a query or a form.
pub(crate) fn form(text: &str, name: &str) -> Vec<String> {
    text.split('&')
        .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
        .filter(|(key, _)| *key == name)
        .map(|(_, value)| decode(&value.replace('+', " ")))
        .collect()
}

/// Percent-decoding; what is no escape stays.
fn decode(text: &str) -> String {
    let mut parts = text.split('%');
    let mut bytes = parts.next().unwrap_or_default().as_bytes().to_vec();
    for part in parts {
        let escaped = part
            .get(..2)
            .and_then(|hex| u8::from_str_radix(hex, 16).ok());
        bytes.push(escaped.unwrap_or(b'%'));
        bytes.extend(part.bytes().skip(if escaped.is_some() { 2 } else { 0 }));
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
