//! `WWW-Authenticate` lines of a hostile registry: read without a panic, and bounded.
#![no_main]

use libfuzzer_sys::fuzz_target;
use oci::Challenge;

fuzz_target!(|text: &str| {
    let challenges = Challenge::parse_all(text.lines());
    if let Some(Challenge::Bearer(bearer)) = Challenge::choose(&challenges) {
        assert!(bearer.realm.len() <= text.len());
    }
});
