//! A CDN or object store that a registry redirects to: `/cdn/<digest>?<signature>` serves any blob it holds,
//! and refuses requests that carry an `Authorization`, as S3 and Azure do.

use std::collections::HashMap;
use std::fmt;
use std::ops::Deref;
use std::sync::{Arc, Mutex};

use crate::exchange::Exchange;
use crate::faults::{ServeOptions, send_blob};
use crate::http::Server;
use crate::image::Content;
use crate::lock;
use crate::log::Kind;
use crate::script::Handler;

/// An origin on a loopback port; also a [`Server`]: its requests are of [`Kind::Blob`] with the digest as
/// reference. Clones are the same origin.
#[derive(Clone, Debug)]
pub struct Origin {
    server: Server,
    held: Arc<Mutex<HashMap<String, Content>>>,
}

impl Origin {
    /// Starts on 127.0.0.1.
    pub async fn start() -> Origin {
        Self::start_on("127.0.0.1").await
    }

    /// Starts on another loopback name or address.
    pub async fn start_on(host: &str) -> Origin {
        let held: Arc<Mutex<HashMap<String, Content>>> = Arc::default();
        let behind = Arc::clone(&held);
        let usual = Handler::new(move |exchange| {
            let held = lock(&behind).get(&exchange.entry().reference).cloned();
            async move { answer(exchange, held).await }
        });
        Origin {
            server: Server::start_on(host, usual).await,
            held,
        }
    }

    /// Offers a blob.
    pub fn hold(&self, content: &Content) {
        lock(&self.held).insert(content.digest.to_string(), content.clone());
    }

    /// The URL of a blob, with a signature such as `sig=1` as its query.
    pub fn location(&self, digest: impl fmt::Display, query: &str) -> String {
        format!("{}/cdn/{digest}?{query}", self.server.url())
    }
}

impl Deref for Origin {
    type Target = Server;

    fn deref(&self) -> &Server {
        &self.server
    }
}

async fn answer(mut exchange: Exchange, held: Option<Content>) {
    let xml = [("Content-Type", "application/xml")];
    if exchange.header("authorization").is_some() {
        return exchange
            .reply(400, &xml, b"<Error><Code>InvalidArgument</Code></Error>")
            .await;
    }
    match held {
        Some(content) if exchange.entry().kind == Kind::Blob => {
            send_blob(
                exchange,
                &content.digest.to_string(),
                &content.data,
                &ServeOptions::default(),
            )
            .await;
        }
        _ => {
            exchange
                .reply(404, &xml, b"<Error><Code>NoSuchKey</Code></Error>")
                .await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::get;

    #[tokio::test]
    async fn serves_only_without_authorization() {
        let origin = Origin::start().await;
        let blob = Content::blob(3000, "cdn");
        origin.hold(&blob);
        let location = origin.location(blob.digest, "sig=1");
        let path = location
            .strip_prefix(&origin.url())
            .expect("an absolute URL")
            .to_owned();
        assert_eq!(get(origin.port(), &path, &[]).await.body, blob.data);
        assert_eq!(
            get(origin.port(), &path, &[("Authorization", "Bearer x")])
                .await
                .status,
            400
        );
        assert_eq!(origin.count((Kind::Blob, "GET", blob.digest)), 2);
        assert_eq!(
            origin.requests(),
            [format!("GET {path}"), format!("GET {path}")]
        );
    }
}
