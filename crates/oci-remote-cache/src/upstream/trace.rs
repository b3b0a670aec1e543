//! What an exchange looks like in the log: debug has one line for each, trace has the headers of both sides.
//!
//! Targets and paths are shown; every query value is masked (signed URLs are bearer secrets), and so is every header that holds a
//! credential, a token or a cookie.

use std::fmt::Write as _;

use reqwest::header::{
    AUTHORIZATION, COOKIE, HeaderMap, HeaderName, HeaderValue, LOCATION, PROXY_AUTHORIZATION,
    SET_COOKIE,
};
use url::Url;

/// A URL with its query's values and any user information masked.
pub(super) fn url(url: &Url) -> String {
    let mut shown = format!("{}://{}", url.scheme(), url.host_str().unwrap_or_default());
    if let Some(port) = url.port() {
        write!(shown, ":{port}").ok();
    }
    shown.push_str(url.path());
    for (number, (name, _value)) in url.query_pairs().enumerate() {
        shown.push(if number == 0 { '?' } else { '&' });
        shown.extend(name.chars().filter(char::is_ascii_graphic));
        shown.push_str("=***");
    }
    shown
}

/// All headers in one line, secrets masked.
pub(super) fn headers(headers: &HeaderMap) -> String {
    let mut shown = String::new();
    for (name, value) in headers {
        if !shown.is_empty() {
            shown.push_str(", ");
        }
        write!(shown, "{name}: {}", masked(name, value)).ok();
    }
    shown
}

fn masked(name: &HeaderName, value: &HeaderValue) -> String {
    let secret = [&AUTHORIZATION, &PROXY_AUTHORIZATION, &COOKIE, &SET_COOKIE];
    if secret.contains(&name) || value.is_sensitive() {
        return "***".to_owned();
    }
    let text = String::from_utf8_lossy(value.as_bytes());
    if *name == LOCATION {
        // A relative one may hold a signature just as well.
        return match (Url::parse(&text), text.split_once('?')) {
            (Ok(location), _) => url(&location),
            (Err(_), Some((path, _query))) => format!("{path}?***"),
            (Err(_), None) => text.into_owned(),
        };
    }
    mask_queries(&text)
}

/// Masks what stands behind each `?`, up to where the quoted or bracketed URL ends: challenges and links hold URLs.
fn mask_queries(text: &str) -> String {
    let mut parts = text.split('?');
    let mut shown = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        shown.push_str("?***");
        if let Some(end) = part.find(['"', '>', ' ', ',']) {
            shown.push_str(part.get(end..).unwrap_or_default());
        }
    }
    shown
}

#[cfg(test)]
mod tests {
    use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
    use url::Url;

    use super::{headers, url};

    #[test]
    fn urls_show_the_path_and_no_value() {
        let signed = "https://u:p@cdn.example:8443/a/b?sig=abc&X-Amz-Expires=9#f";
        let shown = url(&Url::parse(signed).unwrap());
        assert_eq!(
            shown,
            "https://cdn.example:8443/a/b?sig=***&X-Amz-Expires=***"
        );
    }

    #[test]
    fn headers_hide_what_is_secret() {
        let mut map = HeaderMap::new();
        for (name, value) in [
            ("authorization", "Bearer s3cret"),
            ("set-cookie", "id=s3cret"),
            ("location", "https://cdn.example/x?sig=s3cret"),
            ("location", "/x?sig=s3cret"),
            (
                "link",
                "</a?last=s3cret>; rel=\"next\", </b?last=s3cret>; rel=\"prev\"",
            ),
            (
                "www-authenticate",
                "Bearer realm=\"https://r/token?k=s3cret\",service=\"s\"",
            ),
            ("content-length", "5"),
        ] {
            let name: HeaderName = name.parse().unwrap();
            map.append(name, HeaderValue::from_static(value));
        }
        let shown = headers(&map);
        assert!(!shown.contains("s3cret"), "{shown}");
        assert!(shown.contains("content-length: 5"), "{shown}");
        assert!(shown.contains("service=\"s\""), "{shown}");
        assert!(shown.contains("https://cdn.example/x?sig=***"), "{shown}");
    }
}
