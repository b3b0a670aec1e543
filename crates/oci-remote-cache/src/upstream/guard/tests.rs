use std::net::{IpAddr, SocketAddr};

use url::Url;

use super::{Class, Range, Rules, raw_host};

fn rules(class: Class) -> Rules {
    Rules {
        class,
        own: ("registry.example".into(), 443),
        named: Vec::new(),
        trusted: Vec::new(),
        listeners: Vec::new(),
        proxy: None,
        is_local: |address| address.is_loopback(),
    }
}

fn at(address: &str, port: u16) -> SocketAddr {
    SocketAddr::new(address.parse().unwrap(), port)
}

/// Address, and whether a public, a private and a loopback upstream may lead there.
const RULINGS: &[(&str, bool, bool, bool)] = &[
    ("8.8.8.8", true, true, true),
    ("2606:4700::1", true, true, true),
    ("10.1.2.3", false, true, false),
    ("172.16.0.1", false, true, false),
    ("172.32.0.1", true, true, true),
    ("192.168.0.1", false, true, false),
    ("100.64.0.1", false, true, false),
    ("100.127.255.255", false, true, false),
    ("100.128.0.1", true, true, true),
    ("198.18.0.1", false, true, false),
    ("fd12:3456::1", false, true, false),
    ("fec0::1", false, true, false),
    ("127.0.0.1", false, false, true),
    ("127.8.9.1", false, false, true),
    ("::1", false, false, true),
    ("0.0.0.0", false, false, false),
    ("0.1.2.3", false, false, false),
    ("::", false, false, false),
    ("169.254.169.254", false, false, false),
    ("fe80::1", false, false, false),
    ("fd00:ec2::254", false, false, false),
    ("100.100.100.200", false, false, false),
    ("224.0.0.1", false, false, false),
    ("ff02::1", false, false, false),
    ("255.255.255.255", false, false, false),
    ("240.0.0.1", false, false, false),
    ("::ffff:127.0.0.1", false, false, false),
    ("::ffff:8.8.8.8", false, false, false),
    ("::127.0.0.1", false, false, false),
    ("::ffff:0:7f00:1", false, false, false),
    ("64:ff9b::8.8.8.8", true, true, true),
    ("64:ff9b::10.0.0.1", false, true, false),
    ("64:ff9b::127.0.0.1", false, false, true),
    ("64:ff9b::169.254.169.254", false, false, false),
    ("2002:a00:1::1", false, true, false),
    ("2002:7f00:1::1", false, false, true),
    ("2001:db8::1", false, true, false),
];

#[test]
fn every_class_reaches_what_it_may() {
    for &(address, public, private, loopback) in RULINGS {
        for (class, allowed) in [
            (Class::Public, public),
            (Class::Private, private),
            (Class::Loopback, loopback),
        ] {
            let ruling = rules(class).judge("other.example", at(address, 443));
            assert_eq!(ruling.is_ok(), allowed, "{address} for {class:?}");
        }
    }
}

#[test]
fn own_host_and_port_are_always_allowed() {
    let rules = rules(Class::Public);
    assert!(rules.judge("registry.example", at("10.0.0.1", 443)).is_ok());
    assert!(
        rules
            .judge("Registry.Example", at("127.0.0.1", 443))
            .is_ok()
    );
    assert!(
        rules
            .judge("registry.example", at("10.0.0.1", 444))
            .is_err()
    );
    assert!(rules.judge("else.example", at("10.0.0.1", 443)).is_err());
}

#[test]
fn our_own_listeners_are_never_targets() {
    let mut rules = rules(Class::Loopback);
    rules.own = ("127.0.0.1".into(), 8080);
    rules.listeners = vec![at("::", 8080), at("127.0.0.1", 8081)];
    for (address, port, allowed) in [
        ("127.0.0.1", 8080, false),
        ("::1", 8080, false),
        ("127.0.0.1", 8081, false),
        ("::1", 8081, true),
        ("127.0.0.1", 8082, true),
    ] {
        let ruling = rules.judge("127.0.0.1", at(address, port));
        assert_eq!(ruling.is_ok(), allowed, "{address} {port}");
    }
}

#[test]
fn the_operator_widens_but_never_past_the_never_list() {
    let mut rules = rules(Class::Public);
    rules.named = vec![
        "cdn.example:8443".parse().unwrap(),
        "10.1.0.0/16".parse().unwrap(),
    ];
    rules.trusted = vec![
        "198.18.0.0/15".parse().unwrap(),
        "169.254.0.0/16".parse().unwrap(),
    ];
    for (host, address, port, allowed) in [
        ("cdn.example", "10.9.9.9", 8443, true),
        ("cdn.example", "10.9.9.9", 443, false),
        ("x.example", "10.1.9.9", 443, true),
        ("x.example", "10.2.9.9", 443, false),
        ("x.example", "198.19.0.1", 443, true),
        ("x.example", "64:ff9b::10.1.0.1", 443, true),
        ("x.example", "169.254.169.254", 80, false),
        ("cdn.example", "0.0.0.0", 8443, false),
    ] {
        let ruling = rules.judge(host, at(address, port));
        assert_eq!(ruling.is_ok(), allowed, "{host} {address}");
    }
}

#[test]
fn a_refusal_names_the_host_and_never_what_it_resolved_to() {
    let mut rules = rules(Class::Public);
    rules.listeners = vec![at("0.0.0.0", 8080)];
    for (host, address, port, shown) in [
        (
            "cdn.example",
            "10.1.2.3",
            443,
            "cdn.example:443 is on a private",
        ),
        (
            "cdn.example",
            "fd12::1",
            443,
            "cdn.example:443 is on a private",
        ),
        ("cdn.example", "127.0.0.1", 80, "cdn.example:80 is on this"),
        (
            "cdn.example",
            "127.0.0.1",
            8080,
            "cdn.example:8080 is a listener",
        ),
        (
            "cdn.example",
            "169.254.169.254",
            80,
            "cdn.example:80 is link-local",
        ),
        ("10.1.2.3", "10.1.2.3", 443, "10.1.2.3:443 is on a private"),
        ("::1", "::1", 443, "[::1]:443 is on this"),
    ] {
        let refusal = rules.judge(host, at(address, port)).unwrap_err();
        let text = refusal.to_string();
        assert!(text.starts_with(shown), "{text}");
    }
}

#[test]
fn disguised_addresses_are_refused_even_for_a_loopback_upstream() {
    let base = Url::parse("http://127.0.0.1:5000/v2/a/blobs/x").unwrap();
    for (raw, allowed) in [
        ("http://127.0.0.1:9/x", true),
        ("http://[::1]:9/x", true),
        ("/relative", true),
        ("http://8.8.8.8/x", true),
        ("http://name.example/x", true),
        ("http://0x7f.1/x", false),
        ("http://127.1/x", false),
        ("http://2130706433/x", false),
        ("http://017700000001/x", false),
        ("http://127.0.0.1./x", false),
        ("http://%31%32%37.0.0.1/x", false),
        ("http://127。0。0。1/x", false),
        ("http://0.0.0.0/x", false),
        ("http://0/x", false),
        ("http://169.254.169.254/latest", false),
        ("http://[::ffff:127.0.0.1]:9/x", false),
        ("http://[::ffff:7f00:1]:9/x", false),
        ("http://[::127.0.0.1]:9/x", false),
        ("http://[::]:9/x", false),
        ("http://[fe80::1]/x", false),
        ("//0x7f.1/x", false),
        ("\\\\0x7f.1/x", false),
        ("http:\\\\0x7f.1/x", false),
        ("https:0x7f.1/x", false),
        ("https:///0x7f.1/x", false),
        (" http://0x7f.1/x", false),
        ("http://user@0x7f.1/x", false),
        ("http://0x7f\t.1/x", false),
        ("ht\ttp://0x7f.1/x", false),
        ("https:127.0.0.1/x", false),
        ("https:/0x7f.1/x", false),
        ("http://10.0.0.1/x", false),
    ] {
        let url = base.join(raw).unwrap();
        let ruling = rules(Class::Loopback).admit(&base, &url, raw);
        assert_eq!(ruling.is_ok(), allowed, "{raw:?} -> {url}: {ruling:?}");
    }
}

#[test]
fn the_written_host_is_found() {
    for (raw, host) in [
        ("http://a.example:80/x", Some("a.example")),
        ("HTTP://A.example?x", Some("A.example")),
        ("//b/x", Some("b")),
        ("http://u:p@c:1/x", Some("c")),
        ("http://[::1]:5/x", Some("::1")),
        ("/x//y", None),
        ("x/y", None),
        ("", None),
    ] {
        assert_eq!(raw_host(raw), host, "{raw}");
    }
}

#[test]
fn a_class_is_the_strictest_of_its_addresses() {
    let of = |addresses: &[&str]| {
        let parsed: Vec<IpAddr> = addresses.iter().map(|a| a.parse().unwrap()).collect();
        Class::of(&parsed)
    };
    assert_eq!(of(&["127.0.0.1", "::1"]), Class::Loopback);
    assert_eq!(of(&["10.0.0.1", "127.0.0.1"]), Class::Private);
    assert_eq!(of(&["10.0.0.1", "8.8.8.8"]), Class::Public);
    assert_eq!(of(&[]), Class::Public);
    assert_eq!(
        Range::of("64:ff9b::1.1.1.1".parse().unwrap()),
        Range::Of(Class::Public)
    );
}

#[test]
fn a_name_that_only_the_proxy_knows_is_judged_by_its_form() {
    let mut rules = rules(Class::Public);
    rules.own.0 = "registry.corp".into();
    rules.named = vec!["cdn.internal".parse().unwrap()];
    for (host, port, allowed) in [
        ("cdn.example.com", 443, true),
        ("registry.corp", 443, true),
        ("registry.corp", 22, false),
        ("cdn.internal", 8080, true),
        ("metadata.google.internal", 80, false),
        ("metadata.google.internal.", 80, false),
        ("x.LOCALHOST", 80, false),
        ("printer", 80, false),
        ("notinternal.example", 80, true),
    ] {
        let ruling = rules.judge_unresolved(host, port);
        assert_eq!(ruling.is_ok(), allowed, "{host}");
    }
    rules.class = Class::Private;
    assert!(rules.judge_unresolved("printer", 80).is_ok());
}

#[test]
fn nobody_may_send_us_to_the_proxy() {
    let mut rules = rules(Class::Public);
    rules.proxy = Some("proxy.example".into());
    let base = Url::parse("https://registry.example/").unwrap();
    for (text, allowed) in [
        ("https://Proxy.Example:22/", false),
        ("http://proxy.example:3128/", false),
        ("https://other.example/", true),
    ] {
        let url = Url::parse(text).unwrap();
        assert_eq!(rules.admit(&base, &url, text).is_ok(), allowed, "{text}");
    }
}
