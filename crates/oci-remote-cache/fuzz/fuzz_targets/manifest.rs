//! A manifest's bytes under any type: judged without a panic.
#![no_main]

use libfuzzer_sys::fuzz_target;
use oci::ManifestView;

fuzz_target!(|input: (Option<&str>, &[u8])| {
    let (media_type, bytes) = input;
    if let Ok(view) = ManifestView::parse(bytes, media_type) {
        assert!(view.media_type().is_json());
    }
});
