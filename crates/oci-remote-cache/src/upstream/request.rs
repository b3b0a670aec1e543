//! What is asked of a registry, and the URL that asks it.
//!
//! URLs are built from parsed parts only: names, references, digests, and a list's page, of which parameters that only the registry
//! understands are passed on as they stand. Nothing else of a client's request line gets through. Pure.

use oci::{AnyDigest, MANIFEST_ACCEPT, OCI_INDEX, Page, Reference, RepositoryName, Slice};
use url::Url;

use super::connect::Lane;
use super::credentials::Identity;
use super::exchange::Call;

/// One request to an upstream.
#[derive(Clone, Debug)]
pub struct Ask {
    /// The repository as the upstream knows it.
    pub repository: RepositoryName,
    /// What of it.
    pub resource: Resource,
    /// With or without the body.
    pub method: Method,
    /// Which part of a blob; always sent as a closed range, because some registries answer 416 to an open one.
    pub range: Option<Slice>,
    /// The `Accept` to send instead of the resource's own.
    pub accept: Option<String>,
    /// Which place to ask: 0 is the upstream's URL, n its nth mirror.
    pub mirror: usize,
    /// Whether others may answer where it gives none.
    pub mirrors: Mirrors,
    /// In whose name.
    pub identity: Identity,
    /// What hangs on the answer.
    pub stakes: Stakes,
}

/// What hangs on an answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Stakes {
    /// Somebody waits for it: it is tried again, and what it meets is remembered of the place.
    #[default]
    Needed,
    /// Only time, for the same comes on another connection anyway. It is tried once, and again only for a connection that was closed
    /// before an answer; who refuses it may want no more connections, which is no reason to keep other requests away.
    Haste,
}

/// Whether a place's mirrors may answer in its stead.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mirrors {
    /// They may: the content is the same.
    #[default]
    Welcome,
    /// They may not: what is asked is a matter of rights, of which they know nothing.
    LeftOut,
}

/// What can be asked for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Resource {
    /// A manifest by tag or digest.
    Manifest(Reference),
    /// A blob.
    Blob(AnyDigest),
    /// The repository's tags.
    Tags(Page),
    /// What refers to a manifest.
    Referrers {
        /// The manifest referred to.
        digest: AnyDigest,
        /// Only referrers of this type.
        artifact_type: Option<String>,
        /// Which page.
        page: Page,
    },
}

/// How to ask.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Method {
    /// With the body.
    Get,
    /// Headers only.
    Head,
}

impl Ask {
    /// The request in words, for errors and logs: `GET manifests/latest of library/alpine`.
    pub fn describe(&self) -> String {
        let method = self.method.as_str();
        let resource = match &self.resource {
            Resource::Manifest(reference) => format!("manifests/{reference}"),
            Resource::Blob(digest) => format!("blobs/{digest}"),
            Resource::Tags(_) => "tags/list".to_owned(),
            Resource::Referrers { digest, .. } => format!("referrers/{digest}"),
        };
        match self.range {
            Some(Slice { start, end }) => format!(
                "{method} {resource} [{start}, {end}) of {}",
                self.repository
            ),
            None => format!("{method} {resource} of {}", self.repository),
        }
    }

    /// The URL at the registry whose base is `base`.
    pub(super) fn url(&self, base: &Url) -> Url {
        let mut url = base.clone();
        let prefix = base.path().trim_end_matches('/');
        let repository = &self.repository;
        match &self.resource {
            Resource::Manifest(reference) => {
                url.set_path(&format!("{prefix}/v2/{repository}/manifests/{reference}"));
            }
            Resource::Blob(digest) => {
                url.set_path(&format!("{prefix}/v2/{repository}/blobs/{digest}"));
            }
            Resource::Tags(page) => {
                url.set_path(&format!("{prefix}/v2/{repository}/tags/list"));
                set_query(&mut url, None, page);
            }
            Resource::Referrers {
                digest,
                artifact_type,
                page,
            } => {
                url.set_path(&format!("{prefix}/v2/{repository}/referrers/{digest}"));
                set_query(&mut url, artifact_type.as_deref(), page);
            }
        }
        url
    }

    /// The request for `url`, which is this ask's own or where a redirect led; without authorization.
    pub(super) fn call(&self, url: Url) -> Call {
        let lane = match self.resource {
            Resource::Blob(_) => Lane::Blobs,
            Resource::Manifest(_) | Resource::Tags(_) | Resource::Referrers { .. } => Lane::Small,
        };
        let method = match self.method {
            Method::Get => reqwest::Method::GET,
            Method::Head => reqwest::Method::HEAD,
        };
        Call {
            method,
            url,
            kind: self.kind(),
            lane,
            accept: self.accept().to_owned(),
            range: self.range(),
            authorization: None,
            form: None,
        }
    }

    /// The `Accept` to send; blobs are bytes of any type.
    fn accept(&self) -> &str {
        match (&self.accept, &self.resource) {
            (Some(accept), _) => accept,
            (None, Resource::Manifest(_)) => MANIFEST_ACCEPT,
            (None, Resource::Blob(_)) => "*/*",
            (None, Resource::Tags(_)) => "application/json",
            (None, Resource::Referrers { .. }) => OCI_INDEX,
        }
    }

    /// The `Range` to send.
    fn range(&self) -> Option<String> {
        let Slice { start, end } = self.range?;
        let last = end.checked_sub(1).filter(|&last| last >= start)?;
        Some(format!("bytes={start}-{last}"))
    }

    /// The word under which exchanges are counted.
    fn kind(&self) -> &'static str {
        match self.resource {
            Resource::Manifest(_) => "manifest",
            Resource::Blob(_) => "blob",
            Resource::Tags(_) => "tags",
            Resource::Referrers { .. } => "referrers",
        }
    }

    /// The question for a blob's first byte that stands for one by HEAD.
    pub(super) fn for_first_byte(&self) -> Self {
        Self {
            method: Method::Get,
            range: Some(Slice { start: 0, end: 1 }),
            ..self.clone()
        }
    }

    pub(super) fn is_manifest(&self) -> bool {
        matches!(self.resource, Resource::Manifest(_))
    }

    pub(super) fn is_blob_head(&self) -> bool {
        self.method == Method::Head && matches!(self.resource, Resource::Blob(_))
    }
}

impl Method {
    /// The method's token.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Get => "GET",
            Self::Head => "HEAD",
        }
    }
}

fn set_query(url: &mut Url, artifact_type: Option<&str>, page: &Page) {
    let n = page.n.map(|n| n.to_string());
    let parameters = [
        ("artifactType", artifact_type),
        ("n", n.as_deref()),
        ("last", page.last.as_deref()),
        ("next_page", page.next.as_deref()),
    ];
    let given = parameters
        .into_iter()
        .filter_map(|(name, value)| value.map(|value| (name, value)));
    let mut given = given.peekable();
    if given.peek().is_some() {
        url.query_pairs_mut().extend_pairs(given);
    }
    if !page.others.is_empty() {
        let query = match url.query() {
            Some(known) => format!("{known}&{}", page.others),
            None => page.others.clone(),
        };
        url.set_query(Some(&query));
    }
}

#[cfg(test)]
mod tests {
    use oci::{Page, Slice};
    use url::Url;

    use super::{Ask, Identity, Method, Mirrors, Resource, Stakes};

    const DIGEST: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    fn ask(resource: Resource) -> Ask {
        Ask {
            repository: "library/alpine".parse().unwrap(),
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

    #[test]
    fn urls_keep_a_bases_prefix() {
        let page = Page {
            n: Some(5),
            last: Some("v1 &x".into()),
            ..Page::default()
        };
        let opaque = |n| Page {
            n,
            others: "nextToken=a%2bb+c/d==&x=1".into(),
            ..Page::default()
        };
        let digest = || DIGEST.parse().unwrap();
        for (resource, path) in [
            (
                Resource::Manifest("latest".parse().unwrap()),
                "/v2/library/alpine/manifests/latest".to_owned(),
            ),
            (
                Resource::Blob(digest()),
                format!("/v2/library/alpine/blobs/{DIGEST}"),
            ),
            (
                Resource::Tags(Page::default()),
                "/v2/library/alpine/tags/list".to_owned(),
            ),
            (
                Resource::Tags(page.clone()),
                "/v2/library/alpine/tags/list?n=5&last=v1+%26x".to_owned(),
            ),
            (
                Resource::Tags(opaque(Some(5))),
                "/v2/library/alpine/tags/list?n=5&nextToken=a%2bb+c/d==&x=1".to_owned(),
            ),
            (
                Resource::Tags(opaque(None)),
                "/v2/library/alpine/tags/list?nextToken=a%2bb+c/d==&x=1".to_owned(),
            ),
            (
                Resource::Referrers {
                    digest: digest(),
                    artifact_type: Some("application/a+json".into()),
                    page: Page::default(),
                },
                format!(
                    "/v2/library/alpine/referrers/{DIGEST}?artifactType=application%2Fa%2Bjson"
                ),
            ),
        ] {
            for base in [
                "https://r.example",
                "https://r.example/",
                "http://r.example:5000/art/docker/",
            ] {
                let url = ask(resource.clone()).url(&Url::parse(base).unwrap());
                assert_eq!(
                    url.as_str(),
                    format!("{}{path}", base.trim_end_matches('/'))
                );
            }
        }
    }

    #[test]
    fn ranges_are_closed() {
        let mut ask = ask(Resource::Blob(DIGEST.parse().unwrap()));
        assert_eq!(ask.range(), None);
        ask.range = Some(Slice { start: 5, end: 10 });
        assert_eq!(ask.range().as_deref(), Some("bytes=5-9"));
        assert_eq!(
            ask.describe(),
            format!("GET blobs/{DIGEST} [5, 10) of library/alpine")
        );
        ask.range = Some(Slice { start: 5, end: 5 });
        assert_eq!(ask.range(), None);
    }
}
