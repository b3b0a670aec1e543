//! Which page of a list an upstream calls the next.
//!
//! Its `Link` is read for the parameters, and never followed: who asks for the next page asks as for this one. So a link to anywhere else
//! than this list is worth nothing, and one to this very page would be asked for without end.

use oci::Page;
use percent_encoding::percent_decode_str;
use url::Url;

use super::redirect::Origin;
use super::{Answer, Ask, Resource, Upstream, trace};

/// Why a link is not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
enum Dropped {
    #[error("it cannot be read")]
    Illegible,
    #[error("it leads to another server")]
    Abroad,
    #[error("it leads to something else than this list")]
    Elsewhere,
    #[error("its parameters cannot be carried")]
    Unwieldy,
    #[error("it leads to the page it is on")]
    Circular,
}

impl Upstream {
    /// The parameters of the page that follows this answer to `ask`, if there is one.
    pub fn next_page(&self, ask: &Ask, answer: &Answer) -> Option<Page> {
        let link = oci::next_link(answer.headers("link"))?;
        let (place, came) = answer.whence();
        let base = &self.places.get(place)?.url;
        match follow(link, ask, (base, came)) {
            Ok(page) => Some(page),
            Err(why) => {
                let led = came
                    .join(link)
                    .map_or_else(|_| String::new(), |url| trace::url(&url));
                tracing::warn!(target: "upstream", upstream = %self.id, what = ask.describe(), link = led, %why, "a Link to a next page is left out");
                None
            }
        }
    }
}

fn follow(link: &str, ask: &Ask, (base, came): (&Url, &Url)) -> Result<Page, Dropped> {
    let url = came.join(link).map_err(|_illegal| Dropped::Illegible)?;
    // A registry below a path of some reverse proxy's may not know of it.
    let mut root = base.clone();
    root.set_path("/");
    let homes = [came.clone(), ask.url(base), ask.url(&root)];
    let origin = Origin::of(&url);
    if homes.iter().all(|home| Origin::of(home) != origin) {
        return Err(Dropped::Abroad);
    }
    let is_this = |home: &Url| Origin::of(home) == origin && path(home) == path(&url);
    if !homes.iter().any(is_this) {
        return Err(Dropped::Elsewhere);
    }
    let page = Page::parse(url.query().unwrap_or_default());
    let page = page.map_err(|_illegal| Dropped::Unwieldy)?;
    match &ask.resource {
        Resource::Tags(this) | Resource::Referrers { page: this, .. }
            if !page.begins_with(this) =>
        {
            Ok(page)
        }
        Resource::Tags(_)
        | Resource::Referrers { .. }
        | Resource::Manifest(_)
        | Resource::Blob(_) => Err(Dropped::Circular),
    }
}

/// A path as it is meant: some escape a digest's colon.
fn path(url: &Url) -> Vec<u8> {
    percent_decode_str(url.path()).collect()
}

#[cfg(test)]
mod tests {
    use super::super::{Identity, Method, Mirrors, Stakes};
    use super::*;

    const BASE: &str = "https://r.example/art/";
    const DIGEST: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    fn ask(resource: Resource) -> Ask {
        Ask {
            repository: "lib/app".parse().unwrap(),
            resource,
            method: Method::Get,
            range: None,
            accept: None,
            mirror: 0,
            mirrors: Mirrors::Welcome,
            identity: Identity::Configured,
            stakes: Stakes::Needed,
        }
    }

    fn tags(query: &str) -> Ask {
        ask(Resource::Tags(Page::parse(query).unwrap()))
    }

    fn led(link: &str, ask: &Ask) -> Result<Page, Dropped> {
        let base = Url::parse(BASE).unwrap();
        follow(link, ask, (&base, &ask.url(&base)))
    }

    #[test]
    fn a_link_to_this_list_is_read_however_it_is_written() {
        let want = Page::parse("last=a,b&n=2&nextToken=T%2b1").unwrap();
        for place in [
            "https://r.example/art/v2/lib/app/tags/list",
            "https://r.example:443/art/v2/lib/app/tags/list",
            "HTTPS://R.example/art/v2/lib/%61pp/tags/list",
            "//r.example/art/v2/lib/app/tags/list",
            "/art/v2/lib/app/tags/list",
            "/v2/lib/app/tags/list",
            "../tags/list",
            "list",
            "",
        ] {
            let link = format!("{place}?last=a,b&n=2&nextToken=T%2b1");
            assert_eq!(led(&link, &tags("n=2")), Ok(want.clone()), "{link}");
        }
        let referrers = ask(Resource::Referrers {
            digest: DIGEST.parse().unwrap(),
            artifact_type: Some("a/b".to_owned()),
            page: Page::default(),
        });
        let escaped = DIGEST.replace(':', "%3A");
        let link = format!("/art/v2/lib/app/referrers/{escaped}?artifactType=a%2Fb&x=1");
        assert_eq!(led(&link, &referrers).ok(), Page::parse("x=1").ok());
    }

    #[test]
    fn a_link_that_leads_away_or_nowhere_is_left_out() {
        let long = format!("list?last={}", "a".repeat(2049));
        for (link, why) in [
            (
                "https://evil.example/art/v2/lib/app/tags/list?last=a",
                Dropped::Abroad,
            ),
            (
                "//evil.example/art/v2/lib/app/tags/list?last=a",
                Dropped::Abroad,
            ),
            (
                "http://r.example/art/v2/lib/app/tags/list?last=a",
                Dropped::Abroad,
            ),
            (
                "https://r.example:8443/art/v2/lib/app/tags/list?last=a",
                Dropped::Abroad,
            ),
            ("data:text/plain,x", Dropped::Abroad),
            ("/art/v2/lib/other/tags/list?last=a", Dropped::Elsewhere),
            ("/art/v2/lib/app/tags/list/?last=a", Dropped::Elsewhere),
            ("/other/v2/lib/app/tags/list?last=a", Dropped::Elsewhere),
            ("/steal?last=a", Dropped::Elsewhere),
            ("https://[/?last=a", Dropped::Illegible),
            (&long, Dropped::Unwieldy),
            ("?last=%00", Dropped::Unwieldy),
            ("?n=x", Dropped::Unwieldy),
            ("?last=a&n=3", Dropped::Circular),
            ("", Dropped::Circular),
        ] {
            assert_eq!(led(link, &tags("n=2&last=a")), Err(why), "{link}");
        }
        assert_eq!(led("?n=2", &tags("n=2")), Err(Dropped::Circular));
    }

    #[test]
    fn where_redirects_led_is_home_too() {
        let base = Url::parse("https://registry.k8s.io").unwrap();
        let came = Url::parse("https://europe.pkg.example/v2/images/lib/app/tags/list").unwrap();
        for link in [
            "/v2/images/lib/app/tags/list?last=a",
            "https://registry.k8s.io/v2/lib/app/tags/list?last=a",
        ] {
            let page = follow(link, &tags(""), (&base, &came));
            assert_eq!(page.ok(), Page::parse("last=a").ok(), "{link}");
        }
        let other = "https://europe.pkg.example/v2/images/lib/other/tags/list?last=a";
        let page = follow(other, &tags(""), (&base, &came));
        assert_eq!(page, Err(Dropped::Elsewhere));
    }
}
