//! `Range` and `Content-Range`: whatever is resolved lies in the content.
#![no_main]

use libfuzzer_sys::fuzz_target;
use oci::{ContentRange, RangeHeader, Resolved};

fuzz_target!(|input: (u64, &str)| {
    let (size, text) = input;
    let _read = ContentRange::parse(text);
    let Some(range) = RangeHeader::parse(text) else {
        return;
    };
    let slices = match range.resolve(size) {
        Resolved::Single(slice) => vec![slice],
        Resolved::Multiple(slices) => slices,
        Resolved::Unsatisfiable => return,
    };
    for slice in slices {
        assert!(slice.start < slice.end && slice.end <= size, "{slice:?} of {size}");
    }
});
