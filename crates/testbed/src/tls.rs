//! TLS before a plain server: it offers HTTP/2 and HTTP/1.1 and notes which of them each connection chose.
//!
//! What chose HTTP/1.1 is passed on byte by byte. What chose HTTP/2 is noted and closed: nothing behind this front speaks it.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use rcgen::{CertifiedKey, generate_simple_self_signed};
use tempfile::TempDir;
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::aws_lc_rs;
use tokio_rustls::rustls::pki_types::PrivatePkcs8KeyDer;

use crate::http::Server;
use crate::lock;

/// A TLS listener on 127.0.0.1 in front of a server; ends when dropped.
#[derive(Debug)]
pub struct TlsFront {
    address: SocketAddr,
    ca_file: PathBuf,
    protocols: Arc<Mutex<Vec<String>>>,
    _folder: TempDir,
    _accepting: JoinSet<()>,
}

impl TlsFront {
    /// Starts in front of `server` (a registry is one), with a certificate of its own.
    pub async fn start(server: &Server) -> Self {
        Self::before(server.port()).await
    }

    /// Starts in front of this port on 127.0.0.1, with a certificate of its own.
    pub async fn before(port: u16) -> Self {
        let names = vec!["127.0.0.1".to_owned(), "localhost".to_owned()];
        let certified = generate_simple_self_signed(names).expect("make a certificate");
        let folder = TempDir::new().expect("make a folder for the certificate");
        let ca_file = folder.path().join("ca.pem");
        fs::write(&ca_file, certified.cert.pem()).expect("write the certificate");
        let listener = TcpListener::bind("127.0.0.1:0")
            .await
            .expect("bind a loopback port");
        let address = listener.local_addr().expect("a listener has an address");
        let acceptor = TlsAcceptor::from(Arc::new(config(&certified)));
        let protocols = Arc::new(Mutex::default());
        let mut accepting = JoinSet::new();
        accepting.spawn(accept(listener, acceptor, port, Arc::clone(&protocols)));
        TlsFront {
            address,
            ca_file,
            protocols,
            _folder: folder,
            _accepting: accepting,
        }
    }

    /// `https://127.0.0.1:port`.
    pub fn url(&self) -> String {
        format!("https://{}", self.address)
    }

    /// The trust root for it, in PEM form.
    pub fn ca_file(&self) -> &Path {
        &self.ca_file
    }

    /// What each connection chose, in order: `h2`, `http/1.1`, or nothing.
    pub fn protocols(&self) -> Vec<String> {
        lock(&self.protocols).clone()
    }
}

fn config(certified: &CertifiedKey<rcgen::KeyPair>) -> ServerConfig {
    let key = PrivatePkcs8KeyDer::from(certified.signing_key.serialize_der());
    let mut config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("the provider's versions")
        .with_no_client_auth()
        .with_single_cert(vec![certified.cert.der().clone()], key.into())
        .expect("a certificate and its key");
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    config
}

async fn accept(
    listener: TcpListener,
    acceptor: TlsAcceptor,
    port: u16,
    protocols: Arc<Mutex<Vec<String>>>,
) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            Some(_) = connections.join_next() => {}
            Ok((stream, _)) = listener.accept() => {
                let (acceptor, protocols) = (acceptor.clone(), Arc::clone(&protocols));
                connections.spawn(pass_on(stream, acceptor, port, protocols));
            }
        }
    }
}

async fn pass_on(
    stream: TcpStream,
    acceptor: TlsAcceptor,
    port: u16,
    protocols: Arc<Mutex<Vec<String>>>,
) {
    stream.set_nodelay(true).ok();
    let Ok(mut secured) = acceptor.accept(stream).await else {
        return;
    };
    let chosen = secured.get_ref().1.alpn_protocol().unwrap_or_default();
    let chosen = String::from_utf8_lossy(chosen).into_owned();
    lock(&protocols).push(chosen.clone());
    if chosen == "h2" {
        return;
    }
    if let Ok(mut behind) = TcpStream::connect(("127.0.0.1", port)).await {
        behind.set_nodelay(true).ok();
        copy_bidirectional(&mut secured, &mut behind).await.ok();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::Registry;

    #[tokio::test]
    async fn has_a_trust_root_and_no_connection_at_first() {
        let registry = Registry::start().await;
        let front = TlsFront::start(&registry).await;
        let pem = fs::read_to_string(front.ca_file()).expect("read the trust root");
        assert!(pem.starts_with("-----BEGIN CERTIFICATE-----"), "{pem}");
        assert!(front.url().starts_with("https://127.0.0.1:"));
        assert_eq!(front.protocols(), Vec::<String>::new());
    }
}
