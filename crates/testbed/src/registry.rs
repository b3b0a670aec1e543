//! A conformant read-only registry: content, listings, referrers, and whatever authentication a test puts before
//! it. What it does wrong is scripted (`faults`), never built in.

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::ops::Deref;
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};

use crate::exchange::Exchange;
use crate::faults::{ServeOptions, send_blob};
use crate::http::Server;
use crate::image::{Content, Image, ImageSpec, MultiImage, OCI_INDEX};
use crate::lock;
use crate::log::Kind;
use crate::script::Handler;
use crate::token::Auth;

/// A registry on a loopback port; also a [`Server`] with all its logs and scripts. Clones are the same registry.
#[derive(Clone, Debug)]
pub struct Registry {
    server: Server,
    shelf: Arc<Shelf>,
}

#[derive(Default)]
struct Shelf(Mutex<Contents>);

#[derive(Default)]
struct Contents {
    manifests: HashMap<(String, String), Stored>,
    blobs: HashMap<(String, String), Stored>,
    tags: HashMap<String, BTreeSet<String>>,
    referrers: HashMap<(String, String), Vec<Value>>,
    auth: Option<Arc<dyn Auth>>,
    tokens: Option<Handler>,
}

/// Content under the digest it is announced with, which need not be one that can be computed here.
#[derive(Clone)]
struct Stored {
    content: Content,
    digest: String,
}

impl Registry {
    /// Starts on 127.0.0.1.
    pub async fn start() -> Registry {
        Self::start_on("127.0.0.1").await
    }

    /// Starts on another loopback name or address.
    pub async fn start_on(host: &str) -> Registry {
        let shelf = Arc::new(Shelf::default());
        let behind = Arc::clone(&shelf);
        let usual = Handler::new(move |exchange| {
            let shelf = Arc::clone(&behind);
            async move { shelf.answer(exchange).await }
        });
        Registry {
            server: Server::start_on(host, usual).await,
            shelf,
        }
    }

    /// Offers a blob.
    pub fn put_blob(&self, repo: &str, blob: &Content) {
        self.put_blob_as(repo, &blob.digest.to_string(), blob);
    }

    /// Offers a blob under any digest, true or not.
    pub fn put_blob_as(&self, repo: &str, digest: &str, blob: &Content) {
        let stored = Stored {
            content: blob.clone(),
            digest: digest.to_owned(),
        };
        self.contents(|contents| contents.blobs.insert(key(repo, digest), stored));
    }

    /// Offers a manifest by digest, and by tag when there is one; a tag that existed moves.
    pub fn put_manifest(&self, repo: &str, tag: Option<&str>, manifest: &Content) {
        self.put_manifest_as(repo, &manifest.digest.to_string(), manifest);
        if let Some(tag) = tag {
            self.tag(repo, tag, manifest);
        }
    }

    /// Offers a manifest under any digest, true or not.
    pub fn put_manifest_as(&self, repo: &str, digest: &str, manifest: &Content) {
        let stored = Stored {
            content: manifest.clone(),
            digest: digest.to_owned(),
        };
        self.contents(|contents| contents.manifests.insert(key(repo, digest), stored));
    }

    /// Offers an image with all its parts.
    pub fn put_image(&self, spec: &ImageSpec) -> Image {
        let image = spec.build();
        self.put_parts(&image);
        self.put_manifest(&image.repo, Some(&image.tag), &image.manifest);
        image
    }

    /// Offers an index under the tag, and the images for two platforms behind it.
    pub fn put_multi_image(&self, spec: &ImageSpec) -> MultiImage {
        let multi = spec.build_multi();
        for image in &multi.images {
            self.put_parts(image);
            self.put_manifest(&image.repo, None, &image.manifest);
        }
        self.put_manifest(&multi.repo, Some(&multi.tag), &multi.index);
        multi
    }

    /// What the referrers API lists for a subject; without it the API answers 404 as if it did not exist.
    pub fn set_referrers(&self, repo: &str, subject: impl fmt::Display, descriptors: &[Value]) {
        let descriptors = descriptors.to_vec();
        self.contents(|contents| {
            contents
                .referrers
                .insert(key(repo, &subject.to_string()), descriptors)
        });
    }

    /// Withdraws a tag or manifest digest.
    pub fn remove_manifest(&self, repo: &str, reference: impl fmt::Display) {
        let reference = reference.to_string();
        self.contents(|contents| {
            contents.manifests.remove(&key(repo, &reference));
            if let Some(tags) = contents.tags.get_mut(repo) {
                tags.remove(&reference);
            }
        });
    }

    /// Withdraws a blob.
    pub fn remove_blob(&self, repo: &str, digest: impl fmt::Display) {
        let digest = digest.to_string();
        self.contents(|contents| contents.blobs.remove(&key(repo, &digest)));
    }

    /// From now on only whom `auth` admits is answered.
    pub fn require(&self, auth: impl Auth + 'static) {
        self.contents(|contents| contents.auth = Some(Arc::new(auth)));
    }

    /// From now on everyone is answered.
    pub fn require_nothing(&self) {
        self.contents(|contents| contents.auth = None);
    }

    /// The server below, for what wants one by value.
    pub fn server(&self) -> &Server {
        &self.server
    }

    pub(crate) fn mount_tokens(&self, tokens: Handler) {
        self.contents(|contents| contents.tokens = Some(tokens));
    }

    fn put_parts(&self, image: &Image) {
        for blob in image.blobs() {
            self.put_blob(&image.repo, blob);
        }
    }

    fn tag(&self, repo: &str, tag: &str, manifest: &Content) {
        let stored = Stored {
            content: manifest.clone(),
            digest: manifest.digest.to_string(),
        };
        self.contents(|contents| {
            contents.manifests.insert(key(repo, tag), stored);
            contents
                .tags
                .entry(repo.to_owned())
                .or_default()
                .insert(tag.to_owned());
        });
    }

    fn contents<T>(&self, change: impl FnOnce(&mut Contents) -> T) -> T {
        change(&mut lock(&self.shelf.0))
    }
}

impl Deref for Registry {
    type Target = Server;

    fn deref(&self) -> &Server {
        &self.server
    }
}

impl Shelf {
    async fn answer(&self, mut exchange: Exchange) {
        let kind = exchange.entry().kind;
        if kind == Kind::Token {
            return self.token(exchange).await;
        }
        if let Some(challenges) = self.refusal(&exchange) {
            let headers: Vec<(String, String)> = challenges
                .into_iter()
                .map(|value| ("WWW-Authenticate".to_owned(), value))
                .collect();
            return exchange.error(401, "UNAUTHORIZED", &headers).await;
        }
        if !matches!(exchange.method(), "GET" | "HEAD") {
            return exchange
                .error(
                    405,
                    "UNSUPPORTED",
                    &[("Allow".to_owned(), "GET, HEAD".to_owned())],
                )
                .await;
        }
        match kind {
            Kind::Ping => exchange.json(200, &json!({}), &[api_version()]).await,
            Kind::Manifest => self.manifest(exchange).await,
            Kind::Blob => self.blob(exchange).await,
            Kind::Tags => self.tags(exchange).await,
            Kind::Referrers => self.referrers(exchange).await,
            Kind::Token | Kind::Other => exchange.error(404, "UNSUPPORTED", &[]).await,
        }
    }

    fn refusal(&self, exchange: &Exchange) -> Option<Vec<String>> {
        let auth = lock(&self.0).auth.clone();
        auth.and_then(|auth| auth.refuse(exchange))
    }

    async fn token(&self, mut exchange: Exchange) {
        let tokens = lock(&self.0).tokens.clone();
        match tokens {
            Some(tokens) => tokens.call(exchange).await,
            None => exchange.error(404, "UNSUPPORTED", &[]).await,
        }
    }

    async fn manifest(&self, mut exchange: Exchange) {
        let wanted = (
            exchange.entry().repo.clone(),
            exchange.entry().reference.clone(),
        );
        let found = lock(&self.0).manifests.get(&wanted).cloned();
        let Some(Stored { content, digest }) = found else {
            return exchange.error(404, "MANIFEST_UNKNOWN", &[]).await;
        };
        let headers = [
            ("Content-Type", content.media_type.as_str()),
            ("Docker-Content-Digest", digest.as_str()),
            ("ETag", &format!("\"{digest}\"")),
        ];
        exchange.reply(200, &headers, &content.data).await;
    }

    async fn blob(&self, mut exchange: Exchange) {
        let wanted = (
            exchange.entry().repo.clone(),
            exchange.entry().reference.clone(),
        );
        let found = lock(&self.0).blobs.get(&wanted).cloned();
        match found {
            Some(Stored { content, digest }) => {
                send_blob(exchange, &digest, &content.data, &ServeOptions::default()).await;
            }
            None => exchange.error(404, "BLOB_UNKNOWN", &[]).await,
        }
    }

    async fn tags(&self, mut exchange: Exchange) {
        let entry = exchange.entry();
        let last = entry.parameter("last").unwrap_or_default();
        let count = entry
            .parameter("n")
            .and_then(|n| n.parse().ok())
            .unwrap_or(1000);
        let (repo, path) = (entry.repo.clone(), entry.path.clone());
        let Some(tags) = lock(&self.0).tags.get(&repo).cloned() else {
            return exchange.error(404, "NAME_UNKNOWN", &[]).await;
        };
        let rest: Vec<String> = tags.into_iter().filter(|tag| *tag > last).collect();
        let page: Vec<&String> = rest.iter().take(count).collect();
        let headers: Vec<(String, String)> = match page.last() {
            Some(last) if page.len() < rest.len() => {
                let next = format!(
                    "<{}{path}?n={count}&last={last}>; rel=\"next\"",
                    exchange.server_url()
                );
                vec![("Link".to_owned(), next)]
            }
            _ => Vec::new(),
        };
        exchange
            .json(200, &json!({"name": repo, "tags": page}), &headers)
            .await;
    }

    async fn referrers(&self, mut exchange: Exchange) {
        let wanted = (
            exchange.entry().repo.clone(),
            exchange.entry().reference.clone(),
        );
        let Some(all) = lock(&self.0).referrers.get(&wanted).cloned() else {
            return exchange.error(404, "UNSUPPORTED", &[]).await;
        };
        let filter = exchange.entry().parameter("artifactType");
        let chosen: Vec<Value> = all
            .into_iter()
            .filter(|descriptor| {
                filter.is_none() || descriptor["artifactType"].as_str() == filter.as_deref()
            })
            .collect();
        let mut headers = vec![("Content-Type".to_owned(), OCI_INDEX.to_owned())];
        if filter.is_some() {
            headers.push(("OCI-Filters-Applied".to_owned(), "artifactType".to_owned()));
        }
        let body = json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": chosen});
        exchange.json(200, &body, &headers).await;
    }
}

impl fmt::Debug for Shelf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Shelf")
    }
}

fn key(repo: &str, reference: &str) -> (String, String) {
    (repo.to_owned(), reference.to_owned())
}

fn api_version() -> (String, String) {
    (
        "Docker-Distribution-Api-Version".to_owned(),
        "registry/2.0".to_owned(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::{Request, get, head};
    use crate::image::ACCEPT_ALL;

    #[tokio::test]
    async fn serves_an_image_and_logs_what_was_asked() {
        let registry = Registry::start().await;
        let image = registry.put_image(&ImageSpec::new("lib/app", "v1").layers(&[10_000]));
        let port = registry.port();

        let manifest = get(port, "/v2/lib/app/manifests/v1", &[("Accept", ACCEPT_ALL)]).await;
        assert!(manifest.is_whole(), "{manifest}");
        assert_eq!(manifest.body, image.manifest.data);
        assert_eq!(
            manifest.header("docker-content-digest"),
            Some(image.digest().to_string().as_str())
        );
        let blob = format!("/v2/lib/app/blobs/{}", image.layer().digest);
        let first = head(port, &blob, &[]).await;
        assert_eq!(
            (first.status, first.number("content-length"), first.length),
            (200, Some(10_000), 0)
        );
        let tail = Request::get(&blob)
            .range("-500")
            .compare_from(&image.layer().data, 9500)
            .send(port)
            .await;
        assert_eq!(
            (tail.status, tail.length, tail.right),
            (206, 500, Some(true))
        );
        assert_eq!(tail.header("content-range"), Some("bytes 9500-9999/10000"));
        assert_eq!(
            Request::get(&blob).range("10000-").send(port).await.status,
            416
        );

        let expected = [
            "GET /v2/lib/app/manifests/v1".to_owned(),
            format!("HEAD {blob}"),
            format!("GET {blob}"),
        ];
        assert_eq!(registry.requests()[..3], expected);
        assert_eq!(
            registry.sent((Kind::Blob, "GET", image.layer().digest)),
            500
        );
        assert_eq!(
            registry.entries(Kind::Blob)[1].header("Range"),
            Some("bytes=-500")
        );
        assert_eq!(registry.connections(), 4);
    }

    #[tokio::test]
    async fn pages_tags_with_an_absolute_link() {
        let registry = Registry::start().await;
        for tag in ["a", "b", "c"] {
            registry.put_image(&ImageSpec::new("tags/list", tag));
        }
        let first = get(registry.port(), "/v2/tags/list/tags/list?n=2", &[]).await;
        assert_eq!(
            first.json(),
            json!({"name": "tags/list", "tags": ["a", "b"]})
        );
        let link = format!(
            "<{}/v2/tags/list/tags/list?n=2&last=b>; rel=\"next\"",
            registry.url()
        );
        assert_eq!(first.header("link"), Some(link.as_str()));
        let last = get(registry.port(), "/v2/tags/list/tags/list?n=2&last=b", &[]).await;
        assert_eq!(
            (last.json()["tags"].clone(), last.header("link")),
            (json!(["c"]), None)
        );
    }

    #[tokio::test]
    async fn filters_referrers() {
        let registry = Registry::start().await;
        let signature = json!({"artifactType": "a/b", "size": 1});
        registry.set_referrers(
            "x/referrers/y",
            "sha256:00",
            &[signature.clone(), json!({"size": 2})],
        );
        let found = get(
            registry.port(),
            "/v2/x/referrers/y/referrers/sha256:00?artifactType=a%2Fb",
            &[],
        )
        .await;
        assert_eq!(found.json()["manifests"], json!([signature]));
        assert_eq!(found.header("oci-filters-applied"), Some("artifactType"));
        assert_eq!(
            get(registry.port(), "/v2/x/referrers/sha256:01", &[])
                .await
                .status,
            404
        );
    }

    #[tokio::test]
    async fn stops_and_comes_back_on_its_port() {
        let registry = Registry::start().await;
        let port = registry.port();
        let mut kept = crate::wire::Connection::open(port).await;
        kept.send("GET /v2/ HTTP/1.1\r\nHost: x\r\n\r\n").await;
        assert_eq!(kept.response("GET").await.status, 200);
        registry.stop().await;
        assert_eq!(registry.open_connections(), 0);
        assert!(kept.until_closed(std::time::Duration::from_secs(5)).await.1);
        let down = get(port, "/v2/", &[]).await;
        assert!(down.status == 0 && down.error.contains("refused"), "{down}");
        registry.resume().await;
        assert_eq!(get(port, "/v2/", &[]).await.status, 200);
    }
}
