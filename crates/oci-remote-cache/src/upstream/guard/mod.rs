//! Where an upstream may lead us: which addresses, under which names, spelled how.
//!
//! Pure: addresses and texts in, a ruling out. `connect.rs` asks at connect time for every resolved address; the redirect and token
//! code ask for literals, because the connector dials literals without asking a resolver. Nothing here resolves names.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use url::{Host, Url};

use super::hosts::{HostOrNetwork, Network};

/// What kind of place an upstream is, by the addresses its own configured host resolves to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Class {
    /// On the internet.
    Public,
    /// On a network of one's own.
    Private,
    /// On this machine.
    Loopback,
}

/// What kind of address this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Range {
    /// Like the class of that name.
    Of(Class),
    /// Nothing that a registry could ever lead to, and why.
    Never(&'static str),
}

/// Why a place is out of bounds. Clients are told, so it names what the upstream named, and never what we resolved that to: where an inner
/// host lies is nothing that a registry and its clients need to learn.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{place} {why}")]
pub(super) struct Refusal {
    place: String,
    why: &'static str,
}

/// A host, by name or literally, and the address that was found under it: shown as the host, with the port.
struct Named<'a>(&'a str, SocketAddr);

/// What one upstream of one class may reach.
#[derive(Clone, Debug)]
pub(super) struct Rules {
    /// The upstream's class.
    pub(super) class: Class,
    /// The upstream's own host and port, as configured.
    pub(super) own: (String, u16),
    /// Further hosts and networks that it may send us to.
    pub(super) named: Vec<HostOrNetwork>,
    /// Networks that every upstream may send us to.
    pub(super) trusted: Vec<Network>,
    /// Where we listen ourselves.
    pub(super) listeners: Vec<SocketAddr>,
    /// The host of the configured proxy, which nobody may send us to: it is connected to whatever its address.
    pub(super) proxy: Option<String>,
    /// Whether an address is one of this machine's.
    pub(super) is_local: fn(IpAddr) -> bool,
}

/// How much of a refused place is shown.
const LONGEST_PLACE: usize = 100;

/// Addresses at which clouds hand credentials to whoever asks.
const METADATA: [IpAddr; 4] = [
    IpAddr::V4(Ipv4Addr::new(100, 100, 100, 200)),
    IpAddr::V4(Ipv4Addr::new(168, 63, 129, 16)),
    IpAddr::V4(Ipv4Addr::new(192, 0, 0, 192)),
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254)),
];

impl Class {
    /// The class of a host that resolves to `addresses`: the strictest of them, so that one odd address in an answer widens nothing.
    pub(super) fn of(addresses: &[IpAddr]) -> Self {
        let has = |class| {
            addresses
                .iter()
                .any(|&address| Range::of(address) == Range::Of(class))
        };
        if has(Self::Public) {
            Self::Public
        } else if has(Self::Private) {
            Self::Private
        } else if has(Self::Loopback) {
            Self::Loopback
        } else {
            Self::Public
        }
    }
}

impl Range {
    pub(super) fn of(address: IpAddr) -> Self {
        if METADATA.contains(&address) {
            return Self::Never("is a cloud's metadata service");
        }
        match address {
            IpAddr::V4(v4) => Self::of_v4(v4),
            IpAddr::V6(v6) => Self::of_v6(v6),
        }
    }

    fn of_v4(address: Ipv4Addr) -> Self {
        match address.octets() {
            [0, ..] => Self::Never("is in 0.0.0.0/8"),
            [169, 254, ..] => Self::Never("is link-local"),
            [224..=239, ..] => Self::Never("is multicast"),
            [240..=255, ..] => Self::Never("is reserved or broadcast"),
            [127, ..] => Self::Of(Class::Loopback),
            // Private use; carrier NAT and overlay VPNs; protocol assignments; documentation; benchmarks (and fake-IP proxies).
            [10, ..]
            | [172, 16..=31, ..]
            | [192, 168, ..]
            | [100, 64..=127, ..]
            | [192, 0, 0 | 2, _]
            | [198, 51, 100, _]
            | [203, 0, 113, _]
            | [198, 18..=19, ..] => Self::Of(Class::Private),
            _ => Self::Of(Class::Public),
        }
    }

    fn of_v6(address: Ipv6Addr) -> Self {
        if let Some(v4) = nat64(address) {
            return Self::of(IpAddr::V4(v4));
        }
        match address.segments() {
            [0, 0, 0, 0, 0, 0, 0, 1] => Self::Of(Class::Loopback),
            [0, 0, 0, 0, 0, 0, ..] => Self::Never("is unspecified or an IPv4-compatible address"),
            [0, 0, 0, 0, 0, 0xffff, ..] | [0, 0, 0, 0, 0xffff, 0, ..] => {
                Self::Never("is an IPv4-mapped address")
            }
            [0xfe80..=0xfebf, ..] => Self::Never("is link-local"),
            [0xff00..=0xffff, ..] => Self::Never("is multicast"),
            // 6to4 wraps an IPv4 address: it must not be a way around the rules for that.
            [0x2002, high, low, ..] => Self::of(IpAddr::V4(joined(high, low))),
            // Unique local, site-local, Teredo, documentation, discard, local NAT64.
            [0xfc00..=0xfdff | 0xfec0..=0xfeff, ..]
            | [0x2001, 0 | 0xdb8, ..]
            | [0x100, 0, 0, 0, ..]
            | [0x64, 0xff9b, 1, ..] => Self::Of(Class::Private),
            _ => Self::Of(Class::Public),
        }
    }
}

impl Refusal {
    fn new(place: &impl fmt::Display, why: &'static str) -> Self {
        // A place may be spelled by whoever we are guarded against: no endless texts in the log.
        let place = place.to_string().chars().take(LONGEST_PLACE).collect();
        Self { place, why }
    }
}

impl fmt::Display for Named<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(host, address) = self;
        if host.parse() == Ok(address.ip()) {
            address.fmt(f)
        } else {
            write!(f, "{host}:{}", address.port())
        }
    }
}

impl Rules {
    /// Whether `address`, found under `host`, may be connected to.
    pub(super) fn judge(&self, host: &str, address: SocketAddr) -> Result<(), Refusal> {
        let refuse = |why| Err(Refusal::new(&Named(host, address), why));
        if self.is_ourselves(address) {
            return refuse("is a listener of this very cache");
        }
        if self.is_own(host, address.port()) {
            return Ok(());
        }
        let class = match Range::of(address.ip()) {
            Range::Never(why) => return refuse(why),
            Range::Of(class) => class,
        };
        if class == Class::Public || class == self.class || self.is_widened(host, address) {
            return Ok(());
        }
        refuse(match class {
            Class::Private => {
                "is on a private network, and neither redirect_hosts nor trusted_networks names it"
            }
            Class::Loopback | Class::Public => {
                "is on this machine, and neither redirect_hosts nor trusted_networks names it"
            }
        })
    }

    /// Whether `url`, which a page at `base` spelled as `raw`, may be asked. Names are judged when they are resolved.
    pub(super) fn admit(&self, base: &Url, url: &Url, raw: &str) -> Result<(), Refusal> {
        let Some(host) = url.host() else {
            return Err(Refusal::new(&"a URL", "has no host"));
        };
        if raw.contains(|c: char| c.is_ascii_control()) {
            return Err(Refusal::new(&"a URL", "holds control characters"));
        }
        let port = url.port_or_known_default().unwrap_or_default();
        match raw_host(raw) {
            Some(written) => check_spelling(&host, written)?,
            None => check_spelling(&host, &host_text(base))?,
        }
        let address = match host {
            Host::Domain(name) if self.is_proxy(name) && !self.is_own(name, port) => {
                return Err(Refusal::new(&name, "is the proxy's own host"));
            }
            Host::Domain(_) => return Ok(()),
            Host::Ipv4(v4) => IpAddr::V4(v4),
            Host::Ipv6(v6) => IpAddr::V6(v6),
        };
        self.judge(&host_text(url), SocketAddr::new(address, port))
    }

    /// Whether a proxy may be asked for a name that we cannot resolve: not for one that by its form means a network of one's own.
    pub(super) fn judge_unresolved(&self, host: &str, port: u16) -> Result<(), Refusal> {
        let named = self.named.iter().any(|named| named.names(host, port));
        if self.class != Class::Public || named || self.is_own(host, port) || !is_inward(host) {
            return Ok(());
        }
        Err(Refusal::new(
            &host,
            "is a name of a private network, and redirect_hosts does not name it",
        ))
    }

    /// Whether `host` is the configured proxy's.
    pub(super) fn is_proxy(&self, host: &str) -> bool {
        let proxy = self.proxy.as_deref();
        proxy.is_some_and(|proxy| proxy.eq_ignore_ascii_case(host))
    }

    fn is_own(&self, host: &str, port: u16) -> bool {
        self.own.1 == port && self.own.0.eq_ignore_ascii_case(host)
    }

    fn is_ourselves(&self, address: SocketAddr) -> bool {
        self.listeners.iter().any(|listener| {
            listener.port() == address.port()
                && (listener.ip() == address.ip()
                    || (listener.ip().is_unspecified()
                        && (address.ip().is_unspecified() || (self.is_local)(address.ip()))))
        })
    }

    fn is_widened(&self, host: &str, address: SocketAddr) -> bool {
        let inside = |network: &Network| {
            network.contains(address.ip())
                || embedded(address.ip()).is_some_and(|v4| network.contains(v4))
        };
        self.trusted.iter().any(inside)
            || self.named.iter().any(|named| match named {
                HostOrNetwork::Host { .. } => named.names(host, address.port()),
                HostOrNetwork::Network(network) => inside(network),
            })
    }
}

/// Whether a name has no meaning on the internet: a single label, or one of the suffixes kept for local use (RFC 6761, 6762, 8375 and
/// ICANN's `internal`, which clouds use for their metadata services).
fn is_inward(host: &str) -> bool {
    let host = host.trim_end_matches('.').to_ascii_lowercase();
    let suffixes = [
        "localhost",
        "local",
        "internal",
        "home.arpa",
        "lan",
        "intranet",
        "corp",
    ];
    let below = |suffix: &&str| {
        let rest = host.strip_suffix(*suffix);
        rest.is_some_and(|rest| rest.ends_with('.'))
    };
    !host.contains('.') || suffixes.iter().any(below)
}

/// A URL's host without an IPv6 literal's brackets.
pub(super) fn host_text(url: &Url) -> String {
    url.host_str()
        .unwrap_or_default()
        .trim_start_matches('[')
        .trim_end_matches(']')
        .to_owned()
}

/// Refuses spellings that a URL parser turns into an address although nobody writes addresses so, except to slip past a filter.
fn check_spelling(host: &Host<&str>, written: &str) -> Result<(), Refusal> {
    match host {
        Host::Domain(_) => Ok(()),
        Host::Ipv4(v4) if v4.to_string() == written => Ok(()),
        Host::Ipv4(_) => Err(Refusal::new(&written, "is an address in disguise")),
        Host::Ipv6(v6) => match Range::of(IpAddr::V6(*v6)) {
            Range::Never(why) => Err(Refusal::new(&written, why)),
            Range::Of(_) => Ok(()),
        },
    }
}

/// The host as a URL's text spells it, before any parser has made it canonical; nothing for a relative reference. Where a parser would
/// find a host without the two slashes that announce one, the spelling is empty, which no address is.
fn raw_host(raw: &str) -> Option<&str> {
    // Parsers of the WHATWG kind take `\` for `/`, and any number of either, so this reads the same way.
    let is_slash = |c: char| c == '/' || c == '\\';
    let raw = raw.trim_matches(|c: char| c <= ' ');
    let (scheme, rest) = match raw.split_once(':') {
        Some((scheme, rest)) if scheme.chars().all(is_scheme) => (Some(scheme), rest),
        _ => (None, raw),
    };
    let after = rest
        .strip_prefix(is_slash)
        .and_then(|rest| rest.strip_prefix(is_slash));
    let Some(after) = after else {
        return scheme.map(|_| "");
    };
    let authority = after
        .trim_start_matches(is_slash)
        .split(['/', '\\', '?', '#'])
        .next()?;
    let host = authority
        .rsplit_once('@')
        .map_or(authority, |(_user, host)| host);
    if let Some(literal) = host.strip_prefix('[') {
        return literal.split(']').next();
    }
    host.split(':').next()
}

fn is_scheme(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.')
}

/// The IPv4 address inside an address of the well-known NAT64 prefix (RFC 6052).
fn nat64(address: Ipv6Addr) -> Option<Ipv4Addr> {
    match address.segments() {
        [0x64, 0xff9b, 0, 0, 0, 0, high, low] => Some(joined(high, low)),
        _ => None,
    }
}

fn embedded(address: IpAddr) -> Option<IpAddr> {
    match address {
        IpAddr::V4(_) => None,
        IpAddr::V6(v6) => nat64(v6).map(IpAddr::V4),
    }
}

fn joined(high: u16, low: u16) -> Ipv4Addr {
    Ipv4Addr::from((u32::from(high) << 16) | u32::from(low))
}

#[cfg(test)]
mod tests;
