//! Which redirects are followed, and as whom.
//!
//! Pure: a Location in, the next URL or a reason out. Whether the address behind it is allowed is the guard's matter, what is sent there
//! is `walk.rs`'s.

use std::collections::HashSet;

use url::Url;

use super::error::Fault;

const HOPS: usize = 5;
const LONGEST_LOCATION: usize = 16 << 10;

/// Scheme, host and port: where an `Authorization` belongs. Object stores refuse requests that carry a second one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Origin {
    scheme: String,
    host: String,
    port: u16,
}

/// The way of one request so far.
pub(super) struct Trail {
    start: Origin,
    seen: HashSet<String>,
    never_left: Stayed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stayed {
    Yes,
    No,
}

impl Origin {
    pub(super) fn of(url: &Url) -> Self {
        Self {
            scheme: url.scheme().to_owned(),
            host: url.host_str().unwrap_or_default().to_owned(),
            port: url.port_or_known_default().unwrap_or_default(),
        }
    }
}

impl Trail {
    /// A way that starts at `url`.
    pub(super) fn from(url: &Url) -> Self {
        Self {
            start: Origin::of(url),
            seen: HashSet::from([url.to_string()]),
            never_left: Stayed::Yes,
        }
    }

    /// Whether every hop so far stayed at the origin of the first. Who once left comes back as a stranger.
    pub(super) fn never_left(&self) -> bool {
        self.never_left == Stayed::Yes
    }

    /// The next URL, by the `Location` that the answer from `at` held (empty if none).
    pub(super) fn step(&mut self, at: &Url, location: &str) -> Result<Url, Fault> {
        let next = read(at, location).map_err(|why| Fault::BadRedirect(why.to_owned()))?;
        if self.seen.len() > HOPS {
            return Err(Fault::BadRedirect("is one of too many".to_owned()));
        }
        if !self.seen.insert(next.to_string()) {
            return Err(Fault::BadRedirect("leads in a circle".to_owned()));
        }
        if Origin::of(&next) != self.start {
            self.never_left = Stayed::No;
        }
        Ok(next)
    }
}

fn read(at: &Url, location: &str) -> Result<Url, &'static str> {
    if location.is_empty() {
        return Err("has no readable Location");
    }
    if location.len() > LONGEST_LOCATION {
        return Err("has an endless Location");
    }
    let mut next = at
        .join(location)
        .map_err(|_invalid| "has an unreadable Location")?;
    if !matches!(next.scheme(), "http" | "https") {
        return Err("leads to something other than http and https");
    }
    if at.scheme() == "https" && next.scheme() == "http" {
        return Err("leads from https to http");
    }
    if !next.username().is_empty() || next.password().is_some() {
        return Err("holds user information");
    }
    if next.host_str().is_none_or(str::is_empty) {
        return Err("names no host");
    }
    next.set_fragment(None);
    Ok(next)
}

#[cfg(test)]
mod tests {
    use url::Url;

    use super::{Origin, Trail};

    fn url(text: &str) -> Url {
        Url::parse(text).unwrap()
    }

    #[test]
    fn locations() {
        for (at, location, next) in [
            (
                "https://r.example/v2/a",
                "https://cdn.example/x?s=1#f",
                Some("https://cdn.example/x?s=1"),
            ),
            ("https://r.example/v2/a", "/x", Some("https://r.example/x")),
            (
                "https://r.example/v2/a",
                "b",
                Some("https://r.example/v2/b"),
            ),
            (
                "https://r.example/v2/a",
                "//cdn.example/x",
                Some("https://cdn.example/x"),
            ),
            (
                "http://r.example/v2/a",
                "https://cdn.example/x",
                Some("https://cdn.example/x"),
            ),
            (
                "http://r.example/v2/a",
                "http://cdn.example/x",
                Some("http://cdn.example/x"),
            ),
            ("https://r.example/v2/a", "http://r.example/x", None),
            ("https://r.example/v2/a", "file:///etc/passwd", None),
            ("https://r.example/v2/a", "gopher://cdn.example/", None),
            ("https://r.example/v2/a", "https://u@cdn.example/x", None),
            ("https://r.example/v2/a", "https://:p@cdn.example/x", None),
            ("https://r.example/v2/a", "", None),
            ("https://r.example/v2/a", "https://", None),
            ("https://r.example/v2/a", "#f", None),
        ] {
            let at = url(at);
            let read = Trail::from(&at).step(&at, location).ok();
            assert_eq!(read.as_ref().map(Url::as_str), next, "{location}");
        }
    }

    #[test]
    fn loops_and_long_ways_end() {
        let start = url("http://r.example/0");
        let mut trail = Trail::from(&start);
        let second = trail.step(&start, "/1").unwrap();
        assert!(trail.step(&second, "/0").is_err(), "a circle");

        let mut trail = Trail::from(&start);
        let mut at = start;
        for hop in 1..=5 {
            at = trail.step(&at, &format!("/{hop}")).unwrap();
        }
        assert!(trail.step(&at, "/6").is_err(), "six hops");
    }

    #[test]
    fn origins_differ_by_scheme_host_and_port() {
        let ours = Origin::of(&url("https://r.example/a"));
        assert_eq!(ours, Origin::of(&url("https://R.example:443/b")));
        for other in [
            "http://r.example/",
            "https://r.example:444/",
            "https://s.example/",
        ] {
            assert_ne!(ours, Origin::of(&url(other)), "{other}");
        }
    }

    #[test]
    fn who_left_comes_back_as_a_stranger() {
        let start = url("https://r.example/a");
        let mut trail = Trail::from(&start);
        let near = trail.step(&start, "/b").unwrap();
        assert!(trail.never_left());
        let far = trail.step(&near, "https://s.example/").unwrap();
        assert!(!trail.never_left());
        trail.step(&far, "https://r.example/c").unwrap();
        assert!(!trail.never_left());
    }
}
