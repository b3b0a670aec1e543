//! A request's path and query: whatever is read from them is made of legal parts only.
#![no_main]

use libfuzzer_sys::fuzz_target;
use oci::{Route, Target};

fuzz_target!(|text: &str| {
    let (path, query) = match text.split_once('?') {
        Some((path, query)) => (path, Some(query)),
        None => (text, None),
    };
    match Route::parse(path, query) {
        Ok(route) => {
            let name = match &route.target {
                Target::Manifest { name, .. }
                | Target::Blob { name, .. }
                | Target::Tags { name, .. }
                | Target::Referrers { name, .. }
                | Target::Warm { name, .. } => name.as_str(),
                Target::Base | Target::Catalog { .. } => "",
            };
            assert!(name.split('/').all(|segment| segment != ".." && segment != "."));
            assert!(!name.contains(['\\', '%', '\0', '\r', '\n']), "{name:?}");
        }
        Err(error) => assert!(matches!(error.status(), 400 | 404)),
    }
});
