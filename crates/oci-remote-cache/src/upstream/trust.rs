//! Whose certificates are believed: this machine's roots, read once for all upstreams, and an upstream's own `ca_file` beside them.
//!
//! Reading the machine's roots takes tens of milliseconds, which would otherwise come on top of the first answer of every upstream.

use std::path::Path;
use std::sync::{Arc, OnceLock};

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use rustls::{ClientConfig, RootCertStore};

use super::error::SetupError;

/// This machine's roots.
static SYSTEM: OnceLock<Arc<RootCertStore>> = OnceLock::new();

/// The roots that count for one upstream.
#[derive(Clone, Debug)]
pub(super) enum Trust {
    /// This machine's.
    System,
    /// This machine's and those of a `ca_file`.
    Extended(Arc<RootCertStore>),
}

impl Trust {
    /// This machine's roots, and those in `ca_file` if there is one. Blocks on the disk.
    pub(super) fn with(ca_file: Option<&Path>) -> Result<Self, SetupError> {
        ca_file.map_or(Ok(Self::System), Self::extended)
    }

    fn extended(path: &Path) -> Result<Self, SetupError> {
        let roots = with_roots_of(path, RootCertStore::clone(&system_roots()))?;
        Ok(Self::Extended(Arc::new(roots)))
    }

    /// The TLS settings of a client that speaks `protocols`, the preferred one first.
    pub(super) fn settings(&self, protocols: &[&str]) -> ClientConfig {
        let roots = match self {
            Self::System => system_roots(),
            Self::Extended(roots) => Arc::clone(roots),
        };
        let mut settings = ClientConfig::builder()
            .with_root_certificates(roots)
            .with_no_client_auth();
        settings.alpn_protocols = protocols
            .iter()
            .map(|protocol| protocol.as_bytes().to_vec())
            .collect();
        settings
    }
}

/// Whether an upstream can be set up with this `ca_file`. Blocks on the disk.
pub fn judge_ca_file(path: &Path) -> Result<(), SetupError> {
    with_roots_of(path, RootCertStore::empty()).map(drop)
}

fn with_roots_of(path: &Path, mut roots: RootCertStore) -> Result<RootCertStore, SetupError> {
    let pem = std::fs::read(path).map_err(|source| SetupError::ReadCa {
        path: path.to_owned(),
        source,
    })?;
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    let (added, _ignored) = roots.add_parsable_certificates(certificates.unwrap_or_default());
    if added == 0 {
        return Err(SetupError::BadCa {
            path: path.to_owned(),
        });
    }
    Ok(roots)
}

/// This machine's roots, read the first time somebody asks. A machine without any can still reach `http://` registries, and
/// `https://` ones by their `ca_file`. Blocks on the disk.
pub fn system_roots() -> Arc<RootCertStore> {
    let read = || {
        let found = rustls_native_certs::load_native_certs();
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(found.certs);
        if roots.is_empty() {
            let why = found.errors.first().map(ToString::to_string);
            tracing::warn!(target: "upstream", why, "this machine has no trust roots: https:// registries are reached only by a ca_file");
        }
        Arc::new(roots)
    };
    Arc::clone(SYSTEM.get_or_init(read))
}
