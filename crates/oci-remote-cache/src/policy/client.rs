//! Who is asking.

use std::net::IpAddr;

/// A client, as far as it is known: by the address it connects from. What it claims in `X-Forwarded-For` or `User-Agent` is not believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Client {
    /// Where it connects from.
    pub address: IpAddr,
}
