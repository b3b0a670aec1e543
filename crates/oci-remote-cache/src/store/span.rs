//! A run of bytes in an open file: what the store and the fills hand up instead of bytes.
//!
//! How a span reaches a socket (sendfile, reads in large blocks) is the business of `http/` alone. The file stays readable while a span
//! lives, even when its name was moved (publish) or removed (eviction).

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use bytes::Bytes;

/// `len` bytes of `file` from `offset`.
#[derive(Clone, Debug)]
pub struct Span {
    /// The open file.
    pub file: Arc<File>,
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub len: u64,
}

impl Span {
    /// Reads the whole span into memory. Blocks on the disk: for small spans, or off the async threads.
    pub fn read(&self) -> io::Result<Bytes> {
        let length = usize::try_from(self.len).map_err(|_too_large| io::ErrorKind::InvalidInput)?;
        let mut block = vec![0; length];
        self.file.read_exact_at(&mut block, self.offset)?;
        Ok(block.into())
    }
}
