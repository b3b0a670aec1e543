//! What the fuzz target `redirect` calls; no part of any build but its own.

use std::net::{IpAddr, SocketAddr};

use url::{Host, Url};

use super::guard::{Class, Rules};
use super::redirect::Trail;

/// Takes `text` for a redirect's target and for a realm of a public https upstream, and panics where it is let through to a plain
/// or an inner place.
pub fn try_leading_inward(text: &str) {
    let Ok(base) = Url::parse("https://registry.example/v2/a/blobs/x") else {
        return;
    };
    let rules = Rules {
        class: Class::Public,
        own: ("registry.example".to_owned(), 443),
        named: Vec::new(),
        trusted: Vec::new(),
        listeners: Vec::new(),
        proxy: None,
        is_local: super::connect::is_local,
    };
    let Ok(next) = Trail::from(&base).step(&base, text) else {
        return;
    };
    if rules.admit(&base, &next, text).is_err() {
        return;
    }
    assert_eq!(next.scheme(), "https", "{text:?}");
    assert!(next.username().is_empty() && next.password().is_none());
    let address: IpAddr = match next.host() {
        Some(Host::Ipv4(v4)) => v4.into(),
        Some(Host::Ipv6(v6)) => v6.into(),
        _ => return,
    };
    let port = next.port_or_known_default().unwrap_or_default();
    assert!(
        rules
            .judge(&address.to_string(), SocketAddr::new(address, port))
            .is_ok()
    );
    let IpAddr::V4(v4) = address else {
        return;
    };
    assert!(!v4.is_loopback() && !v4.is_private() && !v4.is_link_local() && !v4.is_unspecified());
}
