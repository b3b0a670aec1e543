//! The error codes of the distribution specification, and the body that carries them.
//!
//! Which status goes with which code is the caller's decision.

use serde::Deserialize;
use serde_json::{Value, json};

/// Bytes of an upstream's error body that are worth reading.
const BODY_LIMIT: usize = 64 << 10;
/// Longest code passed on.
const CODE_LIMIT: usize = 64;

/// A code in an error body.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorCode {
    /// The repository has no such blob.
    BlobUnknown,
    /// The digest is no digest, or not that of the content.
    DigestInvalid,
    /// The repository has no such manifest.
    ManifestUnknown,
    /// The manifest cannot be taken.
    ManifestInvalid,
    /// The name is no repository name.
    NameInvalid,
    /// There is no such repository.
    NameUnknown,
    /// The length is not that of the content.
    SizeInvalid,
    /// Credentials are needed.
    Unauthorized,
    /// The credentials do not allow it.
    Denied,
    /// The operation is not offered.
    Unsupported,
    /// Too many requests in too short a time.
    TooManyRequests,
    /// The service cannot answer now.
    Unavailable,
    /// A page was asked for with parameters that make none.
    PageInvalid,
}

impl ErrorCode {
    const ALL: [Self; 13] = [
        Self::BlobUnknown,
        Self::DigestInvalid,
        Self::ManifestUnknown,
        Self::ManifestInvalid,
        Self::NameInvalid,
        Self::NameUnknown,
        Self::SizeInvalid,
        Self::Unauthorized,
        Self::Denied,
        Self::Unsupported,
        Self::TooManyRequests,
        Self::Unavailable,
        Self::PageInvalid,
    ];

    /// The code on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::BlobUnknown => "BLOB_UNKNOWN",
            Self::DigestInvalid => "DIGEST_INVALID",
            Self::ManifestUnknown => "MANIFEST_UNKNOWN",
            Self::ManifestInvalid => "MANIFEST_INVALID",
            Self::NameInvalid => "NAME_INVALID",
            Self::NameUnknown => "NAME_UNKNOWN",
            Self::SizeInvalid => "SIZE_INVALID",
            Self::Unauthorized => "UNAUTHORIZED",
            Self::Denied => "DENIED",
            Self::Unsupported => "UNSUPPORTED",
            Self::TooManyRequests => "TOOMANYREQUESTS",
            Self::Unavailable => "UNAVAILABLE",
            Self::PageInvalid => "PAGINATION_NUMBER_INVALID",
        }
    }

    /// Reads a code off the wire.
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|code| code.as_str() == text)
    }
}

/// The specification's error body: one error with its code and message.
pub fn error_body(code: ErrorCode, message: &str) -> String {
    json!({ "errors": [{ "code": code.as_str(), "message": message }] }).to_string()
}

#[derive(Deserialize)]
struct Body {
    errors: Vec<Entry>,
}

#[derive(Deserialize)]
struct Entry {
    /// Some registries put a number here.
    code: Value,
}

/// The first code of an upstream's error body, if it is one; it need not be a code of the specification.
///
/// The code is short and plain, so that it can be logged and sent on as it is.
pub fn first_error_code(body: &[u8]) -> Option<String> {
    if body.len() > BODY_LIMIT {
        return None;
    }
    let body: Body = serde_json::from_slice(body).ok()?;
    let code = body.errors.into_iter().next()?.code;
    let code = code.as_str()?;
    let plain = code
        .bytes()
        .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-'));
    (plain && !code.is_empty() && code.len() <= CODE_LIMIT).then(|| code.to_owned())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn codes_are_read_as_they_are_written() {
        for code in ErrorCode::ALL {
            assert_eq!(ErrorCode::parse(code.as_str()), Some(code));
        }
        assert_eq!(ErrorCode::parse("UNKNOWN"), None);
        assert_eq!(ErrorCode::parse("blob_unknown"), None);
    }

    #[test]
    fn bodies_are_those_of_the_specification() {
        let body = error_body(ErrorCode::NameUnknown, "no \"such\" name");
        assert_eq!(
            body,
            r#"{"errors":[{"code":"NAME_UNKNOWN","message":"no \"such\" name"}]}"#
        );
    }

    #[test]
    fn first_codes() {
        for (body, code) in [
            (
                r#"{"errors":[{"code":"UNAUTHORIZED","detail":[{"Type":"repository"}]}]}"#,
                Some("UNAUTHORIZED"),
            ),
            (r#"{"errors":[{"code":"A"},{"code":7}]}"#, Some("A")),
            (
                r#"{"errors":[{"code":"UNKNOWN","message":"Not Found"}]} "#,
                Some("UNKNOWN"),
            ),
            (r#"{"errors":[{"code":404}]}"#, None),
            (r#"{"errors":[{"code":""}]}"#, None),
            (r#"{"errors":[{"code":"two words"}]}"#, None),
            (r#"{"errors":[]}"#, None),
            (r#"{"errors":null}"#, None),
            (r#"{"code":"DENIED"}"#, None),
            ("<html>404</html>", None),
            ("", None),
        ] {
            assert_eq!(first_error_code(body.as_bytes()).as_deref(), code, "{body}");
        }
        let sized =
            |length: usize| format!(r#"{{"errors":[{{"code":"{}"}}]}}"#, "A".repeat(length));
        assert!(first_error_code(sized(CODE_LIMIT).as_bytes()).is_some());
        assert!(first_error_code(sized(CODE_LIMIT + 1).as_bytes()).is_none());
        let padded = |length: usize| sized(1) + &" ".repeat(length - sized(1).len());
        assert!(first_error_code(padded(BODY_LIMIT).as_bytes()).is_some());
        assert!(first_error_code(padded(BODY_LIMIT + 1).as_bytes()).is_none());
    }

    proptest! {
        #[test]
        fn any_message_makes_a_body_that_reads_back(message in any::<String>()) {
            let body = error_body(ErrorCode::Denied, &message);
            let value: Value = serde_json::from_str(&body).unwrap();
            prop_assert_eq!(&value["errors"][0]["message"], &Value::from(message));
            prop_assert_eq!(first_error_code(body.as_bytes()), Some("DENIED".to_owned()));
        }

        #[test]
        fn any_bytes_are_survived(body in any::<Vec<u8>>()) {
            first_error_code(&body);
        }
    }
}
