//! Content digests: `algorithm:encoded`, as the OCI image specification writes them.
//!
//! A [`Digest`] is decoded bytes beside an algorithm we can compute, so it is `Copy`, compares in constant space and
//! can be turned into a file name without ever looking at the text a client sent. Digests whose algorithm we cannot
//! compute are [`ForeignDigest`]s: good enough to ask an upstream with, never good enough to store under.

use std::fmt;
use std::str::FromStr;

use sha2::{Digest as _, Sha256, Sha512};

/// Longest digest text looked at, whatever its algorithm.
const LENGTH_LIMIT: usize = 512;

/// A hash algorithm that we can compute, and hence verify.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Algorithm {
    /// SHA-256, 32 bytes.
    Sha256,
    /// SHA-512, 64 bytes.
    Sha512,
}

/// A digest that we can verify: the algorithm and the decoded hash.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest(Hash);

/// The decoded hash; the variant is the algorithm, so that the two cannot disagree.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Hash {
    Sha256([u8; 32]),
    Sha512([u8; 64]),
}

/// A digest whose grammar is right but whose algorithm we cannot compute: passed through, never stored.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ForeignDigest(Box<str>);

/// Any digest a client may ask for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum AnyDigest {
    /// One that we can verify.
    Known(Digest),
    /// One that we can only pass on.
    Foreign(ForeignDigest),
}

/// Why a text is no digest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DigestError {
    /// The text is longer than any digest.
    #[error("digest is longer than {LENGTH_LIMIT} bytes")]
    TooLong,
    /// There is no colon between an algorithm and a hash.
    #[error("digest has no `algorithm:` in front")]
    NoAlgorithm,
    /// The part before the colon is not an algorithm name.
    #[error("digest algorithm {0:?} is not a legal name")]
    Algorithm(String),
    /// The part after the colon is empty or holds characters that no encoding uses.
    #[error("digest does not hold a legal encoded hash after `{0}:`")]
    Encoded(String),
    /// A registered algorithm came with a hash of the wrong length.
    #[error("{algorithm} digest needs {expected} hex digits, this one has {found}")]
    Length {
        /// The registered algorithm.
        algorithm: &'static str,
        /// Digits that its hashes have.
        expected: usize,
        /// Digits that were sent.
        found: usize,
    },
    /// A registered algorithm came with something else than lower case hex digits.
    #[error("{0} digest must be lower case hex")]
    NotLowerHex(&'static str),
    /// The grammar is right, but the algorithm is none that we can compute.
    #[error("digest algorithm {0:?} cannot be verified here")]
    Foreign(String),
}

/// A running hash, cheap to clone, so that a long transfer can keep checkpoints.
#[derive(Clone)]
pub struct Hasher(State);

#[derive(Clone)]
enum State {
    Sha256(Sha256),
    Sha512(Sha512),
}

impl Algorithm {
    /// The name in front of the colon.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Sha256 => "sha256",
            Self::Sha512 => "sha512",
        }
    }

    /// Bytes in a hash.
    pub const fn size(self) -> usize {
        match self {
            Self::Sha256 => 32,
            Self::Sha512 => 64,
        }
    }

    fn from_name(name: &str) -> Option<Self> {
        match name {
            "sha256" => Some(Self::Sha256),
            "sha512" => Some(Self::Sha512),
            _ => None,
        }
    }
}

impl fmt::Display for Algorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Digest {
    /// The algorithm that made this hash.
    pub fn algorithm(&self) -> Algorithm {
        match self.0 {
            Hash::Sha256(_) => Algorithm::Sha256,
            Hash::Sha512(_) => Algorithm::Sha512,
        }
    }

    /// The decoded hash: 32 or 64 bytes.
    pub fn bytes(&self) -> &[u8] {
        match &self.0 {
            Hash::Sha256(bytes) => bytes,
            Hash::Sha512(bytes) => bytes,
        }
    }

    /// The hash in lower case hex, without the algorithm: fit for a file name.
    pub fn hex(&self) -> String {
        HexText::of(self.bytes()).as_str().to_owned()
    }

    /// A digest from its decoded hash; `None` when the length is not the algorithm's.
    pub fn from_bytes(algorithm: Algorithm, bytes: &[u8]) -> Option<Self> {
        match algorithm {
            Algorithm::Sha256 => bytes.try_into().ok().map(Hash::Sha256),
            Algorithm::Sha512 => bytes.try_into().ok().map(Hash::Sha512),
        }
        .map(Self)
    }

    /// The digest of these bytes.
    pub fn of(algorithm: Algorithm, data: &[u8]) -> Self {
        let mut hasher = Hasher::new(algorithm);
        hasher.update(data);
        hasher.finish()
    }

    /// Reads back what [`Algorithm::name`] and [`Digest::hex`] wrote; `None` for anything else found in a folder.
    pub fn from_file_name(algorithm: &str, hex: &str) -> Option<Self> {
        Self::decode(Algorithm::from_name(algorithm)?, hex)
    }

    fn decode(algorithm: Algorithm, hex: &str) -> Option<Self> {
        match algorithm {
            Algorithm::Sha256 => decode_hex(hex).map(Hash::Sha256),
            Algorithm::Sha512 => decode_hex(hex).map(Hash::Sha512),
        }
        .map(Self)
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.algorithm().name())?;
        f.write_str(":")?;
        f.write_str(HexText::of(self.bytes()).as_str())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Digest {
    type Err = DigestError;

    fn from_str(text: &str) -> Result<Self, DigestError> {
        match text.parse()? {
            AnyDigest::Known(digest) => Ok(digest),
            AnyDigest::Foreign(foreign) => {
                Err(DigestError::Foreign(foreign.algorithm().to_owned()))
            }
        }
    }
}

impl ForeignDigest {
    /// The whole text, as it was asked for.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The part before the colon.
    pub fn algorithm(&self) -> &str {
        self.0.split(':').next().unwrap_or_default()
    }
}

impl fmt::Display for ForeignDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl AnyDigest {
    /// The digest, if it is one that we can verify.
    pub fn known(&self) -> Option<Digest> {
        match self {
            Self::Known(digest) => Some(*digest),
            Self::Foreign(_) => None,
        }
    }
}

impl From<Digest> for AnyDigest {
    fn from(digest: Digest) -> Self {
        Self::Known(digest)
    }
}

impl fmt::Display for AnyDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Known(digest) => digest.fmt(f),
            Self::Foreign(digest) => digest.fmt(f),
        }
    }
}

impl FromStr for AnyDigest {
    type Err = DigestError;

    fn from_str(text: &str) -> Result<Self, DigestError> {
        if text.len() > LENGTH_LIMIT {
            return Err(DigestError::TooLong);
        }
        let (name, encoded) = text.split_once(':').ok_or(DigestError::NoAlgorithm)?;
        if let Some(algorithm) = Algorithm::from_name(name) {
            return Digest::decode(algorithm, encoded)
                .map(AnyDigest::Known)
                .ok_or_else(|| hex_fault(algorithm.name(), encoded, 2 * algorithm.size()));
        }
        check_foreign(name, encoded)?;
        Ok(Self::Foreign(ForeignDigest(text.into())))
    }
}

impl Hasher {
    /// A hash of nothing yet.
    pub fn new(algorithm: Algorithm) -> Self {
        Self(match algorithm {
            Algorithm::Sha256 => State::Sha256(Sha256::new()),
            Algorithm::Sha512 => State::Sha512(Sha512::new()),
        })
    }

    /// Takes in the next bytes.
    pub fn update(&mut self, data: &[u8]) {
        match &mut self.0 {
            State::Sha256(state) => state.update(data),
            State::Sha512(state) => state.update(data),
        }
    }

    /// The digest of everything taken in.
    pub fn finish(self) -> Digest {
        Digest(match self.0 {
            State::Sha256(state) => Hash::Sha256(state.finalize().into()),
            State::Sha512(state) => Hash::Sha512(state.finalize().into()),
        })
    }
}

impl fmt::Debug for Hasher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self.0 {
            State::Sha256(_) => Algorithm::Sha256,
            State::Sha512(_) => Algorithm::Sha512,
        };
        f.debug_tuple("Hasher").field(&name).finish_non_exhaustive()
    }
}

/// A hash in lower case hex, on the stack: digests are printed several times in every answer.
struct HexText {
    digits: [u8; 128],
    length: usize,
}

impl HexText {
    fn of(bytes: &[u8]) -> Self {
        let mut digits = [0; 128];
        let (pairs, _) = digits.as_chunks_mut::<2>();
        for (pair, byte) in pairs.iter_mut().zip(bytes) {
            *pair = [hex_digit(byte >> 4), hex_digit(byte & 15)];
        }
        Self {
            digits,
            length: 2 * bytes.len(),
        }
    }

    fn as_str(&self) -> &str {
        self.digits
            .get(..self.length)
            .and_then(|digits| str::from_utf8(digits).ok())
            .unwrap_or_default()
    }
}

fn hex_digit(nibble: u8) -> u8 {
    if nibble < 10 {
        b'0' + nibble
    } else {
        b'a' + (nibble - 10)
    }
}

/// Lower case only: the image specification forbids upper case for registered algorithms, and two spellings of one
/// digest would be two cache entries.
fn decode_hex<const N: usize>(hex: &str) -> Option<[u8; N]> {
    let (pairs, odd) = hex.as_bytes().as_chunks::<2>();
    if pairs.len() != N || !odd.is_empty() {
        return None;
    }
    let mut bytes = [0; N];
    for (byte, [high, low]) in bytes.iter_mut().zip(pairs) {
        *byte = (nibble(*high)? << 4) | nibble(*low)?;
    }
    Some(bytes)
}

fn nibble(digit: u8) -> Option<u8> {
    match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        _ => None,
    }
}

fn hex_fault(algorithm: &'static str, encoded: &str, expected: usize) -> DigestError {
    if encoded.len() == expected {
        return DigestError::NotLowerHex(algorithm);
    }
    DigestError::Length {
        algorithm,
        expected,
        found: encoded.len(),
    }
}

fn check_foreign(name: &str, encoded: &str) -> Result<(), DigestError> {
    if !is_algorithm(name) {
        return Err(DigestError::Algorithm(name.to_owned()));
    }
    if encoded.is_empty() || !encoded.bytes().all(is_encoded) {
        return Err(DigestError::Encoded(name.to_owned()));
    }
    // blake3 is registered too, so its shape is known although we do not compute it.
    if name == "blake3" && decode_hex::<32>(encoded).is_none() {
        return Err(hex_fault("blake3", encoded, 64));
    }
    Ok(())
}

/// `[a-z0-9]+([+._-][a-z0-9]+)*`
fn is_algorithm(name: &str) -> bool {
    name.split(['+', '.', '_', '-']).all(|part| {
        !part.is_empty()
            && part
                .bytes()
                .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit())
    })
}

fn is_encoded(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'=' | b'_' | b'-')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const EMPTY: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    fn known(text: &str) -> Digest {
        text.parse().unwrap()
    }

    #[test]
    fn known_hashes() {
        assert_eq!(Digest::of(Algorithm::Sha256, b"").to_string(), EMPTY);
        let object = "sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a";
        assert_eq!(Digest::of(Algorithm::Sha256, b"{}"), known(object));
        let long = Digest::of(Algorithm::Sha512, b"abc");
        assert!(
            long.to_string()
                .starts_with("sha512:ddaf35a193617abacc417349ae204131")
        );
        assert_eq!((long.bytes().len(), long.hex().len()), (64, 128));
        assert_eq!(format!("{long:?}"), long.to_string());
    }

    #[test]
    fn a_clone_is_a_checkpoint() {
        for algorithm in [Algorithm::Sha256, Algorithm::Sha512] {
            let mut hasher = Hasher::new(algorithm);
            hasher.update(b"one");
            let mut clone = hasher.clone();
            hasher.update(b" wrong");
            clone.update(b" two");
            assert_eq!(clone.finish(), Digest::of(algorithm, b"one two"));
            assert_eq!(hasher.finish(), Digest::of(algorithm, b"one wrong"));
        }
        assert_eq!(
            format!("{:?}", Hasher::new(Algorithm::Sha512)),
            "Hasher(Sha512, ..)"
        );
    }

    #[test]
    fn foreign_algorithms_pass_but_are_not_verified() {
        let longest = format!("a:{}", "x".repeat(LENGTH_LIMIT - 2));
        let blake = format!("blake3:{}", "ab".repeat(32));
        let algorithms = [
            ("foo+bar:baz", "foo+bar"),
            ("sha384:AA==", "sha384"),
            ("a.b_c-d+e:-_=Z", "a.b_c-d+e"),
        ];
        for (text, algorithm) in algorithms
            .into_iter()
            .chain([(&*blake, "blake3"), (&*longest, "a")])
        {
            let AnyDigest::Foreign(foreign) = text.parse().unwrap() else {
                panic!("{text} is known")
            };
            assert_eq!((foreign.as_str(), foreign.algorithm()), (text, algorithm));
            assert_eq!(AnyDigest::Foreign(foreign).known(), None);
            assert_eq!(
                text.parse::<Digest>(),
                Err(DigestError::Foreign(algorithm.to_owned()))
            );
        }
    }

    #[test]
    fn refused() {
        let sha = |encoded: &str| format!("sha256:{encoded}");
        let length = |found| DigestError::Length {
            algorithm: "sha256",
            expected: 64,
            found,
        };
        for (text, error) in [
            (String::new(), DigestError::NoAlgorithm),
            ("latest".to_owned(), DigestError::NoAlgorithm),
            (sha(&"AB".repeat(32)), DigestError::NotLowerHex("sha256")),
            (sha(&"g".repeat(64)), DigestError::NotLowerHex("sha256")),
            (sha(&"a".repeat(63)), length(63)),
            (sha(&"a".repeat(65)), length(65)),
            (sha(&"a".repeat(66)), length(66)),
            (sha(""), length(0)),
            (sha("baddigeststring"), length(15)),
            (sha("../../etc/passwd"), length(16)),
            (
                format!("blake3:{}", "A".repeat(64)),
                DigestError::NotLowerHex("blake3"),
            ),
            (
                "SHA256:aa".to_owned(),
                DigestError::Algorithm("SHA256".to_owned()),
            ),
            (":aa".to_owned(), DigestError::Algorithm(String::new())),
            (
                "a++b:c".to_owned(),
                DigestError::Algorithm("a++b".to_owned()),
            ),
            ("+a:c".to_owned(), DigestError::Algorithm("+a".to_owned())),
            ("a-:c".to_owned(), DigestError::Algorithm("a-".to_owned())),
            ("foo:".to_owned(), DigestError::Encoded("foo".to_owned())),
            ("foo:a/b".to_owned(), DigestError::Encoded("foo".to_owned())),
            ("foo:a:b".to_owned(), DigestError::Encoded("foo".to_owned())),
            (
                format!("a:{}", "x".repeat(LENGTH_LIMIT - 1)),
                DigestError::TooLong,
            ),
        ] {
            assert_eq!(text.parse::<AnyDigest>(), Err(error), "{text}");
        }
    }

    #[test]
    fn file_names() {
        let digest = known(EMPTY);
        assert_eq!(
            Digest::from_file_name("sha256", &digest.hex()),
            Some(digest)
        );
        assert_eq!(Digest::from_file_name("sha512", &digest.hex()), None);
        assert_eq!(Digest::from_file_name("blake3", &digest.hex()), None);
        assert_eq!(
            Digest::from_file_name("sha256", &digest.hex().to_uppercase()),
            None
        );
        assert_eq!(Digest::from_bytes(Algorithm::Sha256, &[0; 33]), None);
        assert_eq!(Digest::from_bytes(Algorithm::Sha512, &[0; 32]), None);
    }

    proptest! {
        #[test]
        fn hashes_print_and_read_back(bytes in any::<[u8; 32]>(), more in any::<[u8; 32]>()) {
            let long = [bytes, more].concat();
            for (algorithm, bytes) in [(Algorithm::Sha256, &bytes[..]), (Algorithm::Sha512, &long)] {
                let digest = Digest::from_bytes(algorithm, bytes).unwrap();
                prop_assert_eq!(digest.bytes(), bytes);
                prop_assert_eq!(digest.algorithm(), algorithm);
                prop_assert_eq!(digest.bytes().len(), algorithm.size());
                prop_assert_eq!(digest.to_string().parse::<AnyDigest>(), Ok(AnyDigest::from(digest)));
                prop_assert_eq!(Digest::from_file_name(algorithm.name(), &digest.hex()), Some(digest));
            }
        }

        #[test]
        fn what_is_read_prints_the_same(text in ".{0,40}|[a-z0-9+._-]{1,8}:[A-Za-z0-9=_-]{0,80}|sha256:[0-9a-f]{63,65}") {
            if let Ok(digest) = text.parse::<AnyDigest>() {
                prop_assert_eq!(digest.to_string(), text);
            }
        }

        #[test]
        fn any_cut_hashes_the_same(data in any::<Vec<u8>>(), cut in any::<prop::sample::Index>()) {
            let (left, right) = data.split_at(cut.index(data.len() + 1));
            let mut hasher = Hasher::new(Algorithm::Sha512);
            hasher.update(left);
            hasher.update(right);
            prop_assert_eq!(hasher.finish(), Digest::of(Algorithm::Sha512, &data));
        }
    }
}
