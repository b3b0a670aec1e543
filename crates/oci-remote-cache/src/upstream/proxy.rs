//! The proxy before an upstream: how an operator writes it, and what may be asked through one that resolves names itself.
//!
//! The proxy is configured and may be anywhere. What is asked through it comes from registries as ever, and goes through the guard:
//! `socks5` is given addresses that we resolved and judged; of names that another proxy resolves we judge our own answer, if there is
//! one, and the spelling.

use std::collections::HashMap;
use std::fmt;
use std::str::FromStr;
use std::sync::Mutex;
use std::time::Duration;

use percent_encoding::percent_decode_str;
use tokio::time::Instant;
use url::{Host, Url};

use super::connect::turned_away;
use super::guard::{Refusal, Rules, host_text};
use crate::secret::Secret;

/// A proxy, and who we are there. Neither `Display` nor `Debug` shows that.
#[derive(Clone, PartialEq, Eq)]
pub struct Proxy {
    /// Without user information.
    url: Url,
    login: Option<(String, Secret)>,
}

/// Text that is no proxy. It never repeats the text, which may hold a password.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("bad proxy: {0}")]
pub struct ProxyError(&'static str);

/// Verdicts on names that the proxy resolves, remembered for a moment: no lookup for every request.
#[derive(Debug, Default)]
pub(super) struct Screen(Mutex<HashMap<(String, u16), (Verdict, Instant)>>);

type Verdict = Result<(), Refusal>;

/// How long our own DNS may take; behind a proxy it often knows nothing.
const LOOKUP_LIMIT: Duration = Duration::from_secs(2);
const VERDICT_FOR: Duration = Duration::from_secs(30);
const MOST_VERDICTS: usize = 1024;

impl Proxy {
    /// The proxy's host without brackets.
    pub(super) fn host(&self) -> String {
        host_text(&self.url)
    }

    /// Whether it is given names, and connects to whatever they mean to it.
    pub(super) fn resolves(&self) -> bool {
        self.url.scheme() != "socks5"
    }

    /// The proxy as it may be shown to its operator: three stars for who we are there.
    pub fn masked(&self) -> String {
        let shown = self.to_string();
        match self.login {
            Some(_) => shown.replacen("://", "://***@", 1),
            None => shown,
        }
    }

    /// As the HTTP client takes it.
    pub(super) fn for_client(&self) -> reqwest::Result<reqwest::Proxy> {
        let proxy = reqwest::Proxy::all(self.url.clone())?;
        Ok(match &self.login {
            Some((username, password)) => proxy.basic_auth(username, password.expose()),
            None => proxy,
        })
    }
}

impl FromStr for Proxy {
    type Err = ProxyError;

    fn from_str(text: &str) -> Result<Self, ProxyError> {
        let mut url = Url::parse(text).map_err(|_invalid| {
            ProxyError("write it like \"http://user:password@proxy.example:3128\"")
        })?;
        if !matches!(url.scheme(), "http" | "https" | "socks5" | "socks5h") {
            return Err(ProxyError(
                "must begin with http://, https://, socks5:// or socks5h://",
            ));
        }
        if url.host_str().is_none_or(str::is_empty) {
            return Err(ProxyError("names no host"));
        }
        if !matches!(url.path(), "" | "/") || url.query().is_some() || url.fragment().is_some() {
            return Err(ProxyError("must end after the port"));
        }
        let login = login(&url)?;
        let unset = ProxyError("names no host");
        url.set_username("").map_err(|()| unset)?;
        url.set_password(None).map_err(|()| unset)?;
        if url.port_or_known_default().is_none() {
            url.set_port(Some(1080)).map_err(|()| unset)?;
        }
        Ok(Self { url, login })
    }
}

fn login(url: &Url) -> Result<Option<(String, Secret)>, ProxyError> {
    if url.username().is_empty() && url.password().is_none() {
        return Ok(None);
    }
    let decoded = |text: &str| {
        let text = percent_decode_str(text).decode_utf8();
        let text = text.map_err(|_invalid| ProxyError("its login is not UTF-8"))?;
        // RFC 1929 gives each of the two one byte for its length.
        if text.len() > 255 || text.chars().any(char::is_control) {
            return Err(ProxyError(
                "its login is too long or holds control characters",
            ));
        }
        Ok(text.into_owned())
    };
    let username = decoded(url.username())?;
    if username.is_empty() || username.contains(':') {
        return Err(ProxyError("its user name is empty or holds a colon"));
    }
    let password = decoded(url.password().unwrap_or_default())?;
    Ok(Some((username, Secret::new(password))))
}

impl fmt::Display for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.url.as_str().trim_end_matches('/'))
    }
}

impl fmt::Debug for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Proxy({self})")
    }
}

impl Screen {
    /// Whether the proxy may be asked for `url`. Literals were judged where the URL was read.
    pub(super) async fn admit(&self, rules: &Rules, url: &Url) -> Verdict {
        let Some(Host::Domain(host)) = url.host() else {
            return Ok(());
        };
        let port = url.port_or_known_default().unwrap_or_default();
        let key = (host.to_owned(), port);
        let now = Instant::now();
        if let Ok(seen) = self.0.lock()
            && let Some((verdict, since)) = seen.get(&key)
            && now.duration_since(*since) < VERDICT_FOR
        {
            return verdict.clone();
        }
        let verdict = judge(rules, host, port).await;
        if let Ok(mut seen) = self.0.lock() {
            if seen.len() >= MOST_VERDICTS {
                seen.clear();
            }
            seen.insert(key, (verdict.clone(), now));
        }
        verdict
    }
}

/// Every address counts: which of them the proxy takes is not ours to choose.
async fn judge(rules: &Rules, host: &str, port: u16) -> Verdict {
    let found = tokio::time::timeout(LOOKUP_LIMIT, tokio::net::lookup_host((host, port)));
    match found.await {
        Ok(Ok(mut found)) => found.try_for_each(|address| {
            let verdict = rules.judge(host, address);
            verdict.inspect_err(|refusal| turned_away(refusal, address))
        }),
        Ok(Err(_)) | Err(_) => rules.judge_unresolved(host, port),
    }
}

#[cfg(test)]
mod tests {
    use super::Proxy;

    #[test]
    fn shows_where_and_never_who() {
        for (text, shown, resolves) in [
            ("http://proxy:3128", "http://proxy:3128", true),
            ("http://u:p%40ss@proxy:3128/", "http://proxy:3128", true),
            ("https://u:p@proxy", "https://proxy", true),
            ("socks5://u:p@10.0.0.1", "socks5://10.0.0.1:1080", false),
            ("socks5h://[::1]:9050", "socks5h://[::1]:9050", true),
        ] {
            let proxy: Proxy = text.parse().unwrap();
            assert_eq!(proxy.to_string(), shown);
            assert_eq!(format!("{proxy:?}"), format!("Proxy({shown})"));
            assert_eq!(proxy.resolves(), resolves, "{text}");
        }
        let proxy: Proxy = "http://u:p%40ss%25@proxy:3128".parse().unwrap();
        let (username, password) = proxy.login.unwrap();
        assert_eq!((username.as_str(), password.expose()), ("u", "p@ss%"));
    }

    #[test]
    fn what_is_no_proxy_is_not_repeated() {
        for text in [
            "",
            "proxy:3128",
            "u:hunter2@proxy:3128",
            "ftp://u:hunter2@proxy",
            "socks4://u:hunter2@proxy",
            "http://u:hunter2@",
            "http://u:hunter2@proxy/path",
            "http://u:hunter2@proxy:3128?x",
            "http://:hunter2@proxy",
            "http://u%3Ax:hunter2@proxy",
            "http://u:hunter2%00@proxy",
        ] {
            let error = text.parse::<Proxy>().unwrap_err().to_string();
            assert!(error.starts_with("bad proxy: "), "{text}");
            assert!(!error.contains("hunter2"), "{error}");
        }
    }
}
