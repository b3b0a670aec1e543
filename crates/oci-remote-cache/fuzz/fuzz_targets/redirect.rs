//! `Location` and realm texts of a hostile registry: no text leads a public https upstream to a plain or an inner place.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| oci_remote_cache::upstream::try_leading_inward(text));
