//! Connections under TLS: HTTP/2 where the client speaks it (ALPN), else HTTP/1.1. Certificate and key are read again when they change.
//!
//! Spans are read into memory here ([`ReadBody`]): what the kernel would send by itself could not be encrypted.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use hyper::body::Incoming;
use hyper::rt::Executor;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioIo, TokioTimer};
use oci::{Algorithm, Digest};
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tracing::debug;

use super::super::body::{Body, ReadBody};
use super::super::doorman::Certified;
use super::super::sendfile::{Patience, http};
use crate::policy::ClientName;
use crate::tasks::Tasks;
use crate::watched::{FileError, Watched, read_file};

/// Requests under way at once on one HTTP/2 connection: an image's layers, many times over.
const STREAMS: u32 = 256;

/// Bytes of an answer that wait for an HTTP/2 client.
const STREAM_BUFFER: usize = 256 << 10;

/// Most of a request's headers; as for HTTP/1.1.
const HEADERS: u32 = 32 << 10;

/// How often a silent HTTP/2 client is asked whether it is there, and how long it may take to say so.
const PING: Duration = Duration::from_secs(30);
const PONG: Duration = Duration::from_secs(20);

/// What someone who speaks plain HTTP to this port is told.
const NOT_PLAIN: &[u8] = b"HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\nContent-Length: 90\r\n\
    Connection: close\r\n\r\n{\"errors\":[{\"code\":\"UNSUPPORTED\",\"message\":\"this port speaks TLS: ask it with https://\"}]}";

/// Files in PEM form.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// Our certificate, and those that lead from it to one that clients trust.
    pub certificate: PathBuf,
    /// Its key.
    pub key: PathBuf,
    /// Authorities whose certificates name a client.
    pub client_authorities: Option<PathBuf>,
}

/// What a listener needs to speak TLS.
#[derive(Clone, Debug)]
pub struct Tls {
    config: Watched<ServerConfig>,
}

/// A stream whose client must take what it is sent.
struct Patient {
    stream: TlsStream<TcpStream>,
    limit: Duration,
    timer: Option<Pin<Box<Sleep>>>,
}

/// Runs what HTTP/2 starts for each request among our own tasks.
#[derive(Clone, Debug)]
struct Ours(Tasks);

impl Tls {
    /// Reads the files. Blocks on the disk.
    pub fn open(files: &TlsFiles) -> Result<Self, FileError> {
        let paths = [&files.certificate, &files.key]
            .into_iter()
            .chain(&files.client_authorities);
        let config = Watched::open_all(paths.cloned().collect(), read_config)?;
        Ok(Self { config })
    }

    /// Serves one connection until it is closed; once the tasks are to stop, until the answers under way are given.
    pub(super) async fn serve<F, A>(
        &self,
        stream: TcpStream,
        patience: Patience,
        tasks: &Tasks,
        answer: F,
    ) -> io::Result<()>
    where
        F: Fn(Request<Incoming>) -> A,
        A: Future<Output = Response<Body>> + Send + 'static,
    {
        let acceptor = TlsAcceptor::from(self.config.current(tasks).await);
        let handshake = tokio::time::timeout(patience.head, acceptor.accept(stream));
        let stream = tokio::select! {
            done = handshake => done.map_err(|_late| io::ErrorKind::TimedOut)??,
            () = tasks.stopping() => return Ok(()),
        };
        let name = client_name(&stream);
        let is_h2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
        let io = TokioIo::new(Patient {
            stream,
            limit: patience.write,
            timer: None,
        });
        let service = service_fn(|mut request: Request<Incoming>| {
            if let Some(name) = &name {
                request.extensions_mut().insert(Certified(name.clone()));
            }
            let (answer, tasks) = (answer(request), tasks.clone());
            async move {
                let answer = answer.await;
                Ok::<_, Infallible>(answer.map(|body| ReadBody::new(body, tasks)))
            }
        });
        let served = if is_h2 {
            let mut connection = pin!(http2(tasks).serve_connection(io, service));
            tokio::select! {
                ended = connection.as_mut() => return ended.map_err(io::Error::other),
                () = tasks.stopping() => connection.as_mut().graceful_shutdown(),
            }
            connection.await
        } else {
            let mut connection = pin!(http(patience).serve_connection(io, service));
            tokio::select! {
                ended = connection.as_mut() => return ended.map_err(io::Error::other),
                () = tasks.stopping() => connection.as_mut().graceful_shutdown(),
            }
            connection.await
        };
        served.map_err(io::Error::other)
    }
}

/// Tells a client that speaks plain HTTP what to do, in the words it speaks.
pub(super) async fn refuse_plain(stream: TcpStream) {
    say(stream, NOT_PLAIN).await;
}

/// Says `words` and ends the connection.
pub(super) async fn say(mut stream: TcpStream, words: &'static [u8]) {
    let told = async {
        stream.write_all(words).await?;
        stream.shutdown().await
    };
    if let Ok(Err(error)) = tokio::time::timeout(Duration::from_secs(5), told).await {
        debug!(%error, "the connection is gone");
    }
}

fn http2(tasks: &Tasks) -> http2::Builder<Ours> {
    let mut http = http2::Builder::new(Ours(tasks.clone()));
    http.timer(TokioTimer::new())
        .max_concurrent_streams(STREAMS)
        .max_send_buf_size(STREAM_BUFFER)
        .max_header_list_size(HEADERS)
        .keep_alive_interval(PING)
        .keep_alive_timeout(PONG);
    http
}

fn read_config(paths: &[PathBuf]) -> Result<ServerConfig, FileError> {
    let [certificate, key, authorities @ ..] = paths else {
        return Err(FileError::new(
            "".as_ref(),
            "certificate and key are needed",
        ));
    };
    let provider = Arc::new(aws_lc_rs::default_provider());
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(|error| FileError::new(certificate, error.to_string()))?;
    let builder = match authorities.first() {
        None => builder.with_no_client_auth(),
        Some(path) => {
            let mut roots = RootCertStore::empty();
            for root in certificates(path)? {
                let added = roots.add(root);
                added.map_err(|error| FileError::new(path, error.to_string()))?;
            }
            let verifier = WebPkiClientVerifier::builder_with_provider(roots.into(), provider)
                // Who has no certificate may still have a password.
                .allow_unauthenticated()
                .build()
                .map_err(|error| FileError::new(path, error.to_string()))?;
            builder.with_client_cert_verifier(verifier)
        }
    };
    let pem = read_file(key)?;
    let private = PrivateKeyDer::from_pem_slice(&pem)
        .map_err(|_unreadable| FileError::new(key, "it holds no private key in PEM form"))?;
    let mut config = builder
        .with_single_cert(certificates(certificate)?, private)
        .map_err(|error| FileError::new(certificate, format!("with its key: {error}")))?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(config)
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, FileError> {
    let pem = read_file(path)?;
    let read: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    match read {
        Ok(found) if !found.is_empty() => Ok(found),
        _ => Err(FileError::new(path, "it holds no certificate in PEM form")),
    }
}

/// The name that a client's certificate, which the handshake has verified, gives it: `cert:` and its first DNS name, or its hash.
fn client_name(stream: &TlsStream<TcpStream>) -> Option<ClientName> {
    let certificate = stream.get_ref().1.peer_certificates()?.first()?;
    let named = webpki::EndEntityCert::try_from(certificate).ok();
    let dns = named
        .as_ref()
        .and_then(|named| named.valid_dns_names().next());
    let shown = dns.map_or_else(
        || Digest::of(Algorithm::Sha256, certificate).hex(),
        str::to_owned,
    );
    Some(ClientName::new(&format!("cert:{shown}")))
}

impl Patient {
    /// Holds what is `Pending` against the limit.
    fn held<T>(&mut self, cx: &mut Context<'_>, done: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if done.is_ready() {
            self.timer = None;
            return done;
        }
        let limit = self.limit;
        let timer = self
            .timer
            .get_or_insert_with(|| Box::pin(tokio::time::sleep_until(Instant::now() + limit)));
        ready!(timer.as_mut().poll(cx));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl AsyncRead for Patient {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Patient {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.held(cx, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, pieces);
        self.held(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.stream).poll_flush(cx);
        self.held(cx, flushed)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let closed = Pin::new(&mut self.stream).poll_shutdown(cx);
        self.held(cx, closed)
    }
}

impl<F> Executor<F> for Ours
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    fn execute(&self, work: F) {
        drop(self.0.spawn(work));
    }
}
