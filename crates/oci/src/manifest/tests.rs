//! Tables and properties for the judgement of manifests.

use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::descriptor::Platform;
use crate::media_type::{
    DOCKER_LIST, DOCKER_MANIFEST, OCI_ARTIFACT, OCI_INDEX, OCI_MANIFEST, SCHEMA1, SCHEMA1_SIGNED,
};

const DIGEST: &str = "sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a";

fn view(body: &serde_json::Value, content_type: &str) -> Result<ManifestView, ManifestError> {
    ManifestView::parse(body.to_string().as_bytes(), Some(content_type))
}

#[test]
fn an_image() {
    let layer = json!({"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": DIGEST, "size": 5,
        "urls": ["http://evil.example/"], "data": "e30="});
    let body = json!({"schemaVersion": 2, "mediaType": OCI_MANIFEST, "artifactType": "a/b",
        "config": {"mediaType": "text/plain", "digest": DIGEST, "size": 2}, "layers": [layer, {"digest": DIGEST}, 7],
        "subject": {"mediaType": OCI_MANIFEST, "digest": "foo+bar:baz", "size": 9}});
    let view = view(&body, &format!("{OCI_MANIFEST}; charset=utf-8")).unwrap();
    assert_eq!(
        (view.media_type().as_str(), view.artifact_type()),
        (OCI_MANIFEST, Some("a/b"))
    );
    assert_eq!(
        view.blobs()
            .iter()
            .map(|blob| blob.size)
            .collect::<Vec<_>>(),
        [2, 5]
    );
    assert_eq!(view.blobs()[1].digest.to_string(), DIGEST);
    assert_eq!(
        view.subject().map(|subject| subject.digest.to_string()),
        Some("foo+bar:baz".to_owned())
    );
    assert!(view.children().is_empty());
}

#[test]
fn an_index() {
    let arm =
        json!({"os": "linux", "architecture": "arm64", "variant": "v8", "os.features": ["x"]});
    let body = json!({"manifests": [
        {"mediaType": OCI_MANIFEST, "digest": DIGEST, "size": 5, "platform": arm},
        {"mediaType": "no type", "digest": DIGEST, "size": 6, "platform": {"os": "linux"}, "artifactType": "x"},
        {"mediaType": OCI_MANIFEST, "digest": "sha256:short", "size": 7},
    ]});
    for content_type in [OCI_INDEX, DOCKER_LIST] {
        let view = view(&body, content_type).unwrap();
        let [first, second] = view.children() else {
            panic!("{view:?}")
        };
        let arm = Platform {
            os: "linux".into(),
            architecture: "arm64".into(),
            variant: Some("v8".into()),
        };
        assert_eq!(first.platform, Some(arm));
        assert_eq!(
            first.media_type.as_ref().map(MediaType::as_str),
            Some(OCI_MANIFEST)
        );
        assert_eq!(
            (&second.platform, &second.media_type, second.size),
            (&None, &None, 6)
        );
        assert_eq!(second.artifact_type.as_deref(), Some("x"));
        assert!(view.blobs().is_empty() && view.subject().is_none());
    }
}

#[test]
fn taken() {
    let blob = json!({"digest": DIGEST, "size": 1});
    for (body, content_type, expected) in [
        (json!({}), OCI_MANIFEST, OCI_MANIFEST),
        (json!({"mediaType": ""}), OCI_MANIFEST, OCI_MANIFEST),
        (
            json!({"mediaType": null, "layers": [], "manifests": null}),
            OCI_MANIFEST,
            OCI_MANIFEST,
        ),
        (
            json!({"config": {}, "layers": []}),
            DOCKER_MANIFEST,
            DOCKER_MANIFEST,
        ),
        (
            json!({"mediaType": OCI_ARTIFACT, "blobs": [blob]}),
            OCI_ARTIFACT,
            OCI_ARTIFACT,
        ),
        (
            json!({"layers": 5, "subject": "x"}),
            "application/vnd.some+json",
            "application/vnd.some+json",
        ),
        (
            json!({"any": "thing"}),
            "application/json",
            "application/json",
        ),
        (
            json!({"fsLayers": []}),
            "application/vnd.some+json",
            "application/vnd.some+json",
        ),
        (
            json!({"mediaType": OCI_INDEX}),
            "text/plain; charset=utf-8",
            OCI_INDEX,
        ),
        (json!({"mediaType": OCI_INDEX}), "", OCI_INDEX),
        (
            json!({"mediaType": OCI_INDEX}),
            "APPLICATION/vnd.oci.image.index.v1+json",
            OCI_INDEX,
        ),
    ] {
        let view = view(&body, content_type)
            .unwrap_or_else(|error| panic!("{body} as {content_type}: {error}"));
        assert_eq!(view.media_type().as_str(), expected);
    }
}

fn check_refused(body: &serde_json::Value, content_type: &str, expected: &ManifestError) {
    let error = view(body, content_type).expect_err(content_type);
    assert_eq!(&error, expected, "{body} as {content_type}");
}

#[test]
fn ambiguous() {
    for (body, content_type) in [
        (json!({"manifests": [], "layers": []}), OCI_MANIFEST),
        (json!({"manifests": [], "layers": []}), OCI_INDEX),
        (json!({"manifests": [], "layers": []}), OCI_ARTIFACT),
        (json!({"MANIFESTS": [], "layers": []}), OCI_ARTIFACT),
        (json!({"manifests": []}), OCI_MANIFEST),
        (json!({"layers": []}), OCI_INDEX),
        (json!({"config": {}}), DOCKER_LIST),
        (json!({"fsLayers": []}), OCI_MANIFEST),
        (json!({"fsLayers": []}), OCI_INDEX),
        (
            json!({"mediaType": OCI_INDEX, "MediaType": OCI_MANIFEST}),
            OCI_INDEX,
        ),
        (json!({"mediaType": 5}), OCI_INDEX),
    ] {
        check_refused(&body, content_type, &ManifestError::Ambiguous);
    }
}

#[test]
fn header_and_body_disagree() {
    for (found, declared) in [
        (OCI_INDEX, OCI_MANIFEST),
        (OCI_MANIFEST, DOCKER_MANIFEST),
        ("?", OCI_MANIFEST),
        (OCI_INDEX, "application/json"),
    ] {
        let error = ManifestError::TypeMismatch {
            declared: declared.to_owned(),
            found: found.to_owned(),
        };
        check_refused(&json!({"mediaType": found}), declared, &error);
    }
}

#[test]
fn unusable_types() {
    for (body, content_type, named) in [
        (json!({}), "text/html; charset=utf-8", "text/html"),
        (
            json!({"mediaType": OCI_INDEX}),
            "application/octet-stream",
            "application/octet-stream",
        ),
        (json!({}), "text/plain", "text/plain"),
        (json!({}), "nonsense", "nonsense"),
        (json!({"mediaType": "text/html"}), "text/plain", "text/html"),
        (json!({"mediaType": "nonsense"}), "text/plain", "nonsense"),
    ] {
        check_refused(
            &body,
            content_type,
            &ManifestError::UnusableType(named.to_owned()),
        );
    }
    let error = ManifestView::parse(b"{}", None).expect_err("no type");
    assert_eq!(error, ManifestError::UnusableType("none".to_owned()));
}

#[test]
fn schema_1() {
    let body = json!({"schemaVersion": 1, "fsLayers": [{"blobSum": DIGEST}]});
    for content_type in [
        SCHEMA1,
        SCHEMA1_SIGNED,
        "application/json",
        "text/plain",
        "",
    ] {
        check_refused(&body, content_type, &ManifestError::Schema1);
    }
    check_refused(
        &json!({"mediaType": SCHEMA1_SIGNED}),
        "text/plain",
        &ManifestError::Schema1,
    );
}

#[test]
fn no_json_objects() {
    for text in [
        "",
        "<html></html>",
        "{",
        "{} {}",
        "[]",
        "\"x\"",
        "null",
        "1",
        "true",
    ] {
        let error = ManifestView::parse(text.as_bytes(), Some(OCI_INDEX)).expect_err(text);
        assert_eq!(error, ManifestError::NotJson, "{text}");
    }
}

#[test]
fn the_limit_is_four_mebibytes() {
    let padded = |length: usize| ("{}".to_owned() + &" ".repeat(length - 2)).into_bytes();
    assert!(ManifestView::parse(&padded(MANIFEST_LIMIT), Some(OCI_INDEX)).is_ok());
    let error =
        ManifestView::parse(&padded(MANIFEST_LIMIT + 1), Some(OCI_INDEX)).expect_err("too large");
    assert_eq!(error, ManifestError::TooLarge);
    let many = json!({"config": {"digest": DIGEST, "size": 1}, "layers": vec![json!({"digest": DIGEST, "size": 2}); 10_000]});
    assert_eq!(view(&many, OCI_MANIFEST).unwrap().blobs().len(), BLOB_LIMIT);
}

fn any_type() -> impl Strategy<Value = Option<String>> {
    let known = prop::sample::select(vec![
        OCI_INDEX,
        OCI_MANIFEST,
        "application/json",
        "text/plain",
    ]);
    prop::option::of(prop_oneof![known.prop_map(str::to_owned), any::<String>()])
}

/// Bodies of known fields with values of any kind.
fn any_body() -> impl Strategy<Value = String> {
    let field = "\"(mediaType|manifests|layers|config|subject|blobs|platform|digest|size|Size)\"";
    let leaf = "null|true|-?[0-9]{1,3}|\"[a-z/]{0,6}\"|\\[\\]|\\{\\}";
    leaf.prop_recursive(6, 40, 5, move |inner| {
        let list = prop::collection::vec(inner.clone(), 0..4)
            .prop_map(|items| format!("[{}]", items.join(",")));
        let pair = (field, inner).prop_map(|(name, value)| format!("{name}:{value}"));
        let object =
            prop::collection::vec(pair, 0..5).prop_map(|pairs| format!("{{{}}}", pairs.join(",")));
        prop_oneof![list, object]
    })
}

proptest! {
    #[test]
    fn any_bytes_are_survived(bytes in any::<Vec<u8>>(), content_type in any_type()) {
        ManifestView::parse(&bytes, content_type.as_deref()).ok();
    }

    #[test]
    fn any_body_is_survived(body in any_body(), content_type in any_type()) {
        if let Ok(view) = ManifestView::parse(body.as_bytes(), content_type.as_deref()) {
            prop_assert!(view.media_type().is_json());
            prop_assert!(view.children().is_empty() || view.media_type().kind() != Kind::Image);
        }
    }
}
