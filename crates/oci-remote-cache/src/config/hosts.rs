//! Names of hosts, networks and registries as the configuration writes them.
//!
//! Only their form: nothing is resolved here, and who may be connected to is decided where connections are made.

use std::net::IpAddr;

use url::{Host, Url};

/// A registry's address: http or https, with nothing but a host, a port and a path.
pub(super) fn read_url(text: &str) -> Result<Url, String> {
    // A url may hold a password where it should not; such a one is never repeated.
    if text.contains('@') {
        return Err(
            "bad url: user name and password do not belong in it; use credentials".to_owned(),
        );
    }
    let lower = text.to_ascii_lowercase();
    if !lower.starts_with("https://") && !lower.starts_with("http://") {
        return Err(format!(
            "bad url {text:?}: must begin with https:// or http://"
        ));
    }
    let mut url = Url::parse(text).map_err(|error| format!("bad url {text:?}: {error}"))?;
    if url.query().is_some() || url.fragment().is_some() {
        return Err(format!("bad url {text:?}: must not hold a ? or #"));
    }
    let path = url.path().trim_end_matches('/').to_owned();
    if path.split('/').next_back() == Some("v2") {
        return Err(format!(
            "bad url {text:?}: leave out /v2, it is added to every request"
        ));
    }
    url.set_path(&path);
    Ok(url)
}

/// What may stand as the first segment of a path or as `ns`: an upstream's key or alias.
pub(super) fn read_name(text: &str) -> Result<String, String> {
    let legal = |byte: u8| byte.is_ascii_alphanumeric() || b"._-:[]".contains(&byte);
    let shown = text.escape_debug();
    if text.is_empty() || text.len() > 255 || !text.bytes().all(legal) {
        return Err(format!(
            "bad name \"{shown}\": must be one path segment, made of letters, digits, '.', '-', '_' and ':'"
        ));
    }
    if !text.starts_with(|first: char| first.is_ascii_alphanumeric() || first == '[') {
        return Err(format!(
            "bad name \"{shown}\": must begin with a letter or digit"
        ));
    }
    if text.bytes().any(|byte| byte.is_ascii_uppercase()) {
        return Err(format!("bad name \"{shown}\": must be lower case"));
    }
    if text == "v2" {
        return Err("bad name \"v2\": every request's path begins so".to_owned());
    }
    Ok(text.to_owned())
}

/// `host` or `host:port`, in lower case.
pub(super) fn read_host(text: &str) -> Result<String, String> {
    split_host(text).ok_or_else(|| {
        format!(
            "bad host {text:?}: write \"host\" or \"host:port\", without scheme, path or wildcard"
        )
    })
}

/// `host`, `host:port` or `address/prefix`.
pub(super) fn read_host_or_network(text: &str) -> Result<String, String> {
    if text.contains('/') && !text.contains("//") {
        read_network(text)
    } else {
        read_host(text)
    }
}

/// `address/prefix`.
pub(super) fn read_network(text: &str) -> Result<String, String> {
    let bad = || format!("bad network {text:?}: write it like \"10.0.0.0/8\" or \"fd00::/8\"");
    let (address, prefix) = text.split_once('/').ok_or_else(bad)?;
    let address: IpAddr = address.parse().map_err(|_not_an_address| bad())?;
    let digits = prefix.bytes().all(|byte| byte.is_ascii_digit());
    let prefix: u32 = prefix.parse().ok().filter(|_| digits).ok_or_else(bad)?;
    let (bits, width) = match address {
        IpAddr::V4(address) => (u128::from(address.to_bits()) << 96, 32),
        IpAddr::V6(address) => (address.to_bits(), 128),
    };
    if prefix > width {
        return Err(bad());
    }
    if bits.checked_shl(prefix).is_some_and(|rest| rest != 0) {
        return Err(format!(
            "bad network {text:?}: has bits set behind its prefix of {prefix}"
        ));
    }
    Ok(format!("{address}/{prefix}"))
}

fn split_host(text: &str) -> Option<String> {
    let (host, port) = match text.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => {
            let digits = port.bytes().all(|byte| byte.is_ascii_digit());
            let port: u16 = port.parse().ok().filter(|port| digits && *port != 0)?;
            (host, Some(port))
        }
        _ => (text, None),
    };
    if host.is_empty() || host.contains(['*', '/', '@', '%']) {
        return None;
    }
    let parsed = Host::parse(host).ok()?;
    // `0x7f.1` and the like reach a host under a spelling that no comparison would find again.
    let plain = !matches!(parsed, Host::Ipv4(address) if address.to_string() != host);
    let host = parsed.to_string();
    match port {
        _ if !plain => None,
        Some(port) => Some(format!("{host}:{port}")),
        None => Some(host),
    }
}

#[cfg(test)]
mod tests {
    use super::{read_host, read_host_or_network, read_name, read_network, read_url};

    #[test]
    fn urls_are_a_place_and_nothing_else() {
        for (text, read) in [
            (
                "https://registry-1.docker.io",
                "https://registry-1.docker.io/",
            ),
            ("HTTP://Host:5000/", "http://host:5000/"),
            (
                "https://host/artifactory/api/docker/x/",
                "https://host/artifactory/api/docker/x",
            ),
            ("http://[::1]:5000", "http://[::1]:5000/"),
        ] {
            assert_eq!(read_url(text).unwrap().as_str(), read);
        }
        for text in [
            "registry-1.docker.io",
            "ftp://host",
            "https://",
            "https://host/?q",
            "https://host/#f",
            "https://host/v2",
            "https://host/x/v2/",
            "https://host:99999",
            "https:host",
        ] {
            assert!(read_url(text).unwrap_err().starts_with("bad url"), "{text}");
        }
    }

    #[test]
    fn a_password_in_a_url_is_not_repeated() {
        for text in [
            "https://u:hunter2@host",
            "u:hunter2@host",
            "https://u:hunter2@[x",
        ] {
            assert!(!read_url(text).unwrap_err().contains("hunter2"));
        }
    }

    #[test]
    fn names_are_one_segment() {
        for text in ["docker.io", "corp", "localhost:5000", "[::1]:5000", "a_b-c"] {
            assert_eq!(read_name(text), Ok(text.to_owned()));
        }
        for text in ["", "a/b", "..", ".a", "-a", "A", "v2", "a b", "ä", "a\nb"] {
            assert!(
                read_name(text).unwrap_err().starts_with("bad name"),
                "{text}"
            );
        }
    }

    #[test]
    fn hosts_with_and_without_port() {
        for (text, read) in [
            ("auth.docker.io", "auth.docker.io"),
            ("Auth.Docker.io:443", "auth.docker.io:443"),
            ("10.0.0.1:5000", "10.0.0.1:5000"),
            ("[::1]", "[::1]"),
            ("[::1]:80", "[::1]:80"),
        ] {
            assert_eq!(read_host(text).as_deref(), Ok(read), "{text}");
        }
        for text in [
            "",
            ":80",
            "host:",
            "host:0",
            "host:+1",
            "host:99999",
            "https://host",
            "host/path",
            "*.host",
            "0x7f.1",
            "127.1",
            "2130706433",
            "u@host",
            "ho st",
            "::1",
        ] {
            assert!(read_host(text).is_err(), "{text}");
        }
    }

    #[test]
    fn networks_have_nothing_behind_their_prefix() {
        for text in [
            "10.0.0.0/8",
            "0.0.0.0/0",
            "10.1.2.3/32",
            "fd00::/8",
            "::1/128",
            "::/0",
        ] {
            assert_eq!(read_network(text), Ok(text.to_owned()));
        }
        for text in [
            "10.0.0.0",
            "10.0.0.1/8",
            "10.0.0.0/33",
            "fd00::/129",
            "host/8",
            "10.0.0.0/+8",
        ] {
            assert!(read_network(text).is_err(), "{text}");
        }
        assert!(read_host_or_network("10.0.0.0/8").is_ok());
        assert!(read_host_or_network("storage.example:443").is_ok());
        assert!(read_host_or_network("https://storage.example").is_err());
    }
}
