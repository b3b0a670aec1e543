//! TLS towards our own clients: HTTP/2 and HTTP/1.1, certificates that are replaced while we run, certificates as names.

use std::fs;
use std::sync::Arc;
use std::time::Duration;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use reqwest::{Certificate, Client, ClientBuilder, Identity, StatusCode, Version};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tempfile::TempDir;
use testbed::cache::{blob_path, manifest_path};
use testbed::{
    CacheBuilder, CacheProcess, Content, Handler, Image, ImageSpec, Kind, Registry, Upstream,
    faults,
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::stage::{BINARY, REPO, cache};

type Authority = CertifiedIssuer<'static, KeyPair>;

/// An authority and what it has signed, in a folder.
pub(crate) struct Office {
    folder: TempDir,
    authority: Authority,
}

fn authority() -> Authority {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    CertifiedIssuer::self_signed(params, KeyPair::generate().expect("a key")).expect("an authority")
}

impl Office {
    pub(crate) fn new() -> Self {
        let office = Self {
            folder: tempfile::tempdir().expect("a folder"),
            authority: authority(),
        };
        fs::write(office.folder.path().join("ca.crt"), office.authority.pem())
            .expect("write the authority");
        office.certify();
        office
    }

    /// Signs a certificate for the cache, in place of the one before.
    fn certify(&self) {
        let (certificate, key) = self.signed("localhost");
        fs::write(self.folder.path().join("tls.key"), key).expect("write the key");
        fs::write(self.folder.path().join("tls.crt"), certificate).expect("write the certificate");
    }

    fn signed(&self, name: &str) -> (String, String) {
        let key = KeyPair::generate().expect("a key");
        let params = CertificateParams::new(vec![name.to_owned()]).expect("parameters");
        let certificate = params
            .signed_by(&key, &self.authority)
            .expect("a certificate");
        (certificate.pem(), key.serialize_pem())
    }

    pub(crate) fn cache(&self) -> CacheBuilder {
        let file = |name| format!("{:?}", self.folder.path().join(name));
        cache()
            .tls()
            .line(&format!("tls.cert_file = {}", file("tls.crt")))
            .line(&format!("tls.key_file = {}", file("tls.key")))
    }

    pub(crate) fn client(&self, say: impl FnOnce(ClientBuilder) -> ClientBuilder) -> Client {
        oci_remote_cache::upstream::install_crypto();
        let root = Certificate::from_pem(self.authority.pem().as_bytes()).expect("the authority");
        let builder = Client::builder().no_proxy().tls_certs_only([root]);
        say(builder).build().expect("a client")
    }
}

pub(crate) fn url(cache: &CacheProcess, path: &str) -> String {
    format!("https://localhost:{}{path}", cache.port())
}

async fn scene(office: &Office) -> (Registry, CacheProcess, Image) {
    let registry = Registry::start().await;
    let image = registry.put_image(&ImageSpec::new(REPO, "v1").layers(&[3_000_000]));
    let cache = office
        .cache()
        .upstream(Upstream::new("up", registry.url()))
        .start()
        .await;
    (registry, cache, image)
}

#[tokio::test(flavor = "multi_thread")]
async fn both_versions_carry_the_right_bytes_from_upstream_and_from_disk() {
    let office = Office::new();
    let (registry, cache, image) = scene(&office).await;
    let h1 = office.client(ClientBuilder::http1_only);
    let h2 = office.client(|builder| builder);
    for (client, version) in [(&h1, Version::HTTP_11), (&h2, Version::HTTP_2)] {
        for part in image.blobs() {
            let answer = client
                .get(url(&cache, &blob_path("up", REPO, part.digest)))
                .send()
                .await
                .unwrap();
            assert_eq!(
                (answer.version(), answer.status()),
                (version, StatusCode::OK)
            );
            assert_eq!(answer.content_length(), Some(part.size()));
            assert!(answer.bytes().await.unwrap() == part.data);
        }
        let layer = image.layer();
        let range = client
            .get(url(&cache, &blob_path("up", REPO, layer.digest)))
            .header("Range", "bytes=1000-1999");
        let answer = range.send().await.unwrap();
        assert_eq!(answer.status(), StatusCode::PARTIAL_CONTENT);
        assert!(answer.bytes().await.unwrap() == layer.data.slice(1000..2000));
        let head = client
            .head(url(&cache, &manifest_path("up", REPO, "v1")))
            .send()
            .await
            .unwrap();
        assert_eq!(
            head.headers()["content-length"],
            image.manifest.size().to_string().as_str()
        );
    }
    assert_eq!(registry.count((Kind::Blob, "GET")), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_breaks_is_reset_and_never_ends_well() {
    let office = Office::new();
    let (registry, cache, _image) = scene(&office).await;
    let blob = Content::blob(300_000, "spoiled");
    registry.put_blob(REPO, &blob);
    registry.script(Kind::Blob, spoiled(&blob));
    let path = url(&cache, &blob_path("up", REPO, blob.digest));
    for client in [
        office.client(|builder| builder),
        office.client(ClientBuilder::http1_only),
    ] {
        let body = match client.get(&path).send().await {
            Ok(answer) if answer.status() == StatusCode::OK => answer.bytes().await.is_ok(),
            Ok(_) | Err(_) => false,
        };
        assert!(!body, "wrong bytes came to a good end");
        tokio::time::sleep(Duration::from_millis(700)).await;
    }
}

fn spoiled(blob: &Content) -> Handler {
    faults::status(200, &[], blob.spoiled())
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_that_could_be_read_in_two_ways_are_refused_in_http2_too() {
    let office = Office::new();
    let (_registry, cache, _image) = scene(&office).await;
    let client = office.client(|builder| builder);
    let answer = client
        .get(url(&cache, "/v2/"))
        .body("GET /v2/ HTTP/1.1\r\n\r\n")
        .send()
        .await
        .unwrap();
    assert_eq!(
        (answer.version(), answer.status()),
        (Version::HTTP_2, StatusCode::BAD_REQUEST)
    );
    // And the connection lives: what was refused was one stream.
    assert_eq!(
        client
            .get(url(&cache, "/v2/"))
            .send()
            .await
            .unwrap()
            .status(),
        StatusCode::OK
    );
    let post = client
        .post(url(&cache, "/v2/up/lib/app/blobs/uploads/"))
        .send()
        .await
        .unwrap();
    assert_eq!(post.status(), StatusCode::METHOD_NOT_ALLOWED);
}

/// A connection that speaks HTTP/2, byte by byte.
async fn raw_http2(office: &Office, cache: &CacheProcess) -> TlsStream<TcpStream> {
    oci_remote_cache::upstream::install_crypto();
    let mut roots = RootCertStore::empty();
    let pem = office.authority.pem();
    let root = CertificateDer::from_pem_slice(pem.as_bytes()).expect("the authority");
    roots.add(root).expect("a root");
    let mut config = ClientConfig::builder()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let connector = TlsConnector::from(Arc::new(config));
    let stream = TcpStream::connect(("127.0.0.1", cache.port())).await;
    let name = ServerName::try_from("localhost").expect("a name");
    let connected = connector.connect(name, stream.expect("a connection")).await;
    let mut stream = connected.expect("a TLS connection");
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
    stream.write_all(preface).await.expect("send the preface");
    stream
}

/// The next frame's kind and payload; nothing at the end (RFC 9113 section 4.1).
async fn frame(stream: &mut TlsStream<TcpStream>) -> Option<(u8, Vec<u8>)> {
    let mut head = [0; 9];
    stream.read_exact(&mut head).await.ok()?;
    let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
    let mut payload = vec![0; length.try_into().expect("a frame's length")];
    stream.read_exact(&mut payload).await.ok()?;
    Some((head[3], payload))
}

/// Why the connection ends; nothing when it is just cut off.
async fn goodbye(stream: &mut TlsStream<TcpStream>) -> Option<[u8; 4]> {
    loop {
        let (kind, payload) = frame(stream).await?;
        if kind == 7 {
            return payload.get(4..8)?.try_into().ok();
        }
    }
}

/// An HTTP/2 client is told what it may do: so many requests at once, and heads of so many bytes. A larger head is refused.
#[tokio::test(flavor = "multi_thread")]
async fn http2_has_bounds() {
    let office = Office::new();
    let (_registry, cache, _image) = scene(&office).await;
    let mut stream = raw_http2(&office, &cache).await;
    let (kind, settings) = frame(&mut stream).await.expect("the settings");
    assert_eq!(kind, 4);
    let said = |wanted: u16| {
        let mut each = settings.chunks_exact(6);
        let found = each.find(|setting| setting[..2] == wanted.to_be_bytes())?;
        found[2..].try_into().map(u32::from_be_bytes).ok()
    };
    assert_eq!((said(3), said(6)), (Some(256), Some(32 << 10)));

    let client = office.client(|builder| builder);
    for (length, wanted) in [(30 << 10, 200), (40 << 10, 431)] {
        let ask = client.get(url(&cache, "/v2/"));
        let answer = ask.header("x-long", "y".repeat(length)).send().await;
        assert_eq!(answer.unwrap().status().as_u16(), wanted, "{length}");
    }
}

/// CVE-2023-44487: requests that are taken back as fast as they are made cost their connection.
#[tokio::test(flavor = "multi_thread")]
async fn http2_requests_taken_back_without_end_end_the_connection() {
    let office = Office::new();
    let (_registry, cache, _image) = scene(&office).await;
    let mut stream = raw_http2(&office, &cache).await;
    // GET https://localhost/, and the end of it (RFC 7541: three of the static table, and a literal).
    let request = b"\x82\x87\x84\x41\x09localhost";
    let length = u8::try_from(request.len()).expect("a short head");
    let mut storm = Vec::new();
    for stream in (1..20_001_u32).step_by(2) {
        let id = stream.to_be_bytes();
        storm.extend([&[0, 0, length, 1, 5], &id[..], request].concat());
        storm.extend([&[0, 0, 4, 3, 0], &id[..], &[0, 0, 0, 8]].concat());
    }
    // It may be cut off before it has said all.
    stream.write_all(&storm).await.ok();
    let ended = tokio::time::timeout(Duration::from_secs(10), goodbye(&mut stream)).await;
    let why = ended.expect("the connection ends");
    let asked_too_much = |code: [u8; 4]| code == [0, 0, 0, 11];
    assert!(why.is_none_or(asked_too_much), "{why:?}");
    let client = office.client(|builder| builder);
    let next = client.get(url(&cache, "/v2/")).send().await.unwrap();
    assert_eq!(next.status(), StatusCode::OK);
}

#[tokio::test(flavor = "multi_thread")]
async fn plain_http_is_told_what_to_do() {
    let office = Office::new();
    let (_registry, cache, _image) = scene(&office).await;
    let answer = cache.get("/v2/").await;
    assert_eq!(answer.status, 400);
    assert!(answer.text().contains("https://"), "{}", answer.text());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_certificate_is_shown_to_new_clients_without_a_restart() {
    let office = Office::new();
    let (_registry, cache, _image) = scene(&office).await;
    let client = || office.client(|builder| builder.tls_info(true));
    let shown = async || {
        let answer = client().get(url(&cache, "/v2/")).send().await.unwrap();
        let info = answer.extensions().get::<reqwest::tls::TlsInfo>().unwrap();
        info.peer_certificate().unwrap().to_vec()
    };
    let first = shown().await;
    office.certify();
    tokio::time::sleep(Duration::from_millis(1200)).await;
    let second = shown().await;
    assert_ne!(first, second);
    fs::write(office.folder.path().join("tls.crt"), "half written").unwrap();
    tokio::time::sleep(Duration::from_millis(1200)).await;
    assert_eq!(shown().await, second);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_is_a_name() {
    let office = Office::new();
    let registry = Registry::start().await;
    registry.put_image(&ImageSpec::new(REPO, "v1"));
    let ca = format!(
        "tls.client_ca_file = {:?}",
        office.folder.path().join("ca.crt")
    );
    let rules = "clients.rules = [\"cert:node7.example pull **\"]";
    let cache = office
        .cache()
        .line(&ca)
        .line(rules)
        .upstream(Upstream::new("up", registry.url()))
        .start()
        .await;
    let known = |name: &str, by: &Office| {
        let (certificate, key) = by.signed(name);
        Identity::from_pem(format!("{certificate}{key}").as_bytes()).unwrap()
    };
    let path = url(&cache, &manifest_path("up", REPO, "v1"));
    let status = async |client: Client| {
        client
            .get(&path)
            .send()
            .await
            .map(|answer| answer.status().as_u16())
            .ok()
    };
    let ours = known("node7.example", &office);
    assert_eq!(
        status(office.client(|builder| builder.identity(ours))).await,
        Some(200)
    );
    let other = known("node8.example", &office);
    assert_eq!(
        status(office.client(|builder| builder.identity(other))).await,
        Some(403)
    );
    assert_eq!(status(office.client(|builder| builder)).await, Some(401));
    let stranger = known("node7.example", &Office::new());
    assert_eq!(
        status(office.client(|builder| builder.identity(stranger))).await,
        None
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn files_that_do_not_fit_end_the_start() {
    let office = Office::new();
    let (_certificate, other_key) = office.signed("localhost");
    fs::write(office.folder.path().join("tls.key"), other_key).unwrap();
    let file = |name| office.folder.path().join(name).display().to_string();
    let output = std::process::Command::new(BINARY)
        .env("OCI_REMOTE_CACHE_TLS__CERT_FILE", file("tls.crt"))
        .env("OCI_REMOTE_CACHE_TLS__KEY_FILE", file("tls.key"))
        .env("OCI_REMOTE_CACHE_CACHE_DIR", file("cache"))
        .env("OCI_REMOTE_CACHE_LISTEN", "127.0.0.1:0")
        .env("OCI_REMOTE_CACHE_ADMIN_LISTEN", "127.0.0.1:0")
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        !output.status.success() && told.contains("tls.crt"),
        "{told}"
    );
}
