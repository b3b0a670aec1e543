//! No more than its share for one client address: connections at once, requests in a second. Off unless configured.
//!
//! Addresses, not names: this is settled before anyone is asked who they are, and guessing passwords counts too. An IPv6 client has a
//! whole /64, so that is one address here. Over its share a client is told so at once and never made to wait: a connection that waits
//! holds a place that others could have.

use std::collections::HashMap;
use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// Says of an address whether no limit holds for it.
pub type Exempt = Arc<dyn Fn(IpAddr) -> bool + Send + Sync>;

/// Addresses whose requests are remembered: a few megabytes.
const MOST_ADDRESSES: usize = 65_536;

/// How many connections each address has open.
#[derive(Clone)]
pub struct Crowd {
    most: usize,
    exempt: Exempt,
    open: Arc<Mutex<HashMap<IpAddr, usize>>>,
}

/// One connection of an address; dropping it ends it.
#[derive(Debug)]
pub struct Seat {
    address: IpAddr,
    open: Option<Arc<Mutex<HashMap<IpAddr, usize>>>>,
}

/// How many requests each address may still make.
pub struct Pace {
    rate: Rate,
    exempt: Exempt,
    buckets: Mutex<HashMap<IpAddr, Bucket>>,
}

/// Requests of one address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// In the long run, for each second.
    pub per_second: u32,
    /// At once, after a while without any.
    pub burst: u32,
}

/// Requests that may still be made, as of a moment.
#[derive(Clone, Copy, Debug)]
struct Bucket {
    left: f64,
    at: Instant,
}

impl Crowd {
    /// At most so many connections for each address that is not exempt.
    pub fn new(most: usize, exempt: Exempt) -> Self {
        Self {
            most,
            exempt,
            open: Arc::default(),
        }
    }

    /// Takes a seat for a connection from `peer`; nothing when it has its share.
    pub fn enter(&self, peer: IpAddr) -> Option<Seat> {
        let address = whole(peer);
        if (self.exempt)(peer) {
            return Some(Seat {
                address,
                open: None,
            });
        }
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let count = open.entry(address).or_default();
        if *count >= self.most {
            return None;
        }
        *count += 1;
        Some(Seat {
            address,
            open: Some(Arc::clone(&self.open)),
        })
    }
}

impl Pace {
    /// At this rate for each address that is not exempt.
    pub fn new(rate: Rate, exempt: Exempt) -> Self {
        Self {
            rate,
            exempt,
            buckets: Mutex::default(),
        }
    }

    /// Counts a request from `peer`. An error says when the next one is welcome.
    pub fn enter(&self, peer: IpAddr) -> Result<(), Duration> {
        if (self.exempt)(peer) {
            return Ok(());
        }
        let now = Instant::now();
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        let address = whole(peer);
        if buckets.len() >= MOST_ADDRESSES && !buckets.contains_key(&address) {
            self.make_room(&mut buckets, now);
        }
        let full = Bucket {
            left: f64::from(self.rate.burst),
            at: now,
        };
        let bucket = buckets.entry(address).or_insert(full);
        bucket.left = bucket.refilled(self.rate, now);
        bucket.at = now;
        if bucket.left >= 1.0 {
            bucket.left -= 1.0;
            return Ok(());
        }
        Err(Duration::from_secs_f64(
            (1.0 - bucket.left) / f64::from(self.rate.per_second),
        ))
    }

    /// Forgets whoever has its whole burst again; where those are few, everyone: memory goes before fairness, and looking through all of
    /// them must not be the price of each newcomer.
    fn make_room(&self, buckets: &mut HashMap<IpAddr, Bucket>, now: Instant) {
        let burst = f64::from(self.rate.burst);
        buckets.retain(|_, bucket| bucket.refilled(self.rate, now) < burst);
        if buckets.len() > MOST_ADDRESSES / 8 * 7 {
            buckets.clear();
        }
    }
}

impl Bucket {
    fn refilled(&self, rate: Rate, now: Instant) -> f64 {
        let gained = now.duration_since(self.at).as_secs_f64() * f64::from(rate.per_second);
        (self.left + gained).min(f64::from(rate.burst))
    }
}

/// The address that stands for all that its owner has.
fn whole(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => {
            let network = u128::from(v6) & !u128::from(u64::MAX);
            IpAddr::V6(Ipv6Addr::from(network))
        }
        v4 @ IpAddr::V4(_) => v4,
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let Some(open) = &self.open else { return };
        let mut open = open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = open.get_mut(&self.address) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                open.remove(&self.address);
            }
        }
    }
}

impl fmt::Debug for Crowd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Crowd")
            .field("most", &self.most)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Pace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pace")
            .field("rate", &self.rate)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;
    use std::sync::Arc;
    use std::time::Duration;

    use super::{Crowd, MOST_ADDRESSES, Pace, Rate};

    fn at(address: &str) -> IpAddr {
        address.parse().unwrap()
    }

    fn pace(per_second: u32, burst: u32) -> Pace {
        let exempt = Arc::new(|address: IpAddr| address == at("10.0.0.1"));
        Pace::new(Rate { per_second, burst }, exempt)
    }

    #[tokio::test(start_paused = true)]
    async fn a_burst_and_then_the_rate() {
        let pace = pace(2, 5);
        let peer = at("192.0.2.1");
        for _ in 0..5 {
            pace.enter(peer).unwrap();
        }
        assert_eq!(pace.enter(peer), Err(Duration::from_millis(500)));
        pace.enter(at("192.0.2.2")).unwrap();
        tokio::time::advance(Duration::from_millis(500)).await;
        pace.enter(peer).unwrap();
        assert!(pace.enter(peer).is_err());
        tokio::time::advance(Duration::from_hours(1)).await;
        let welcome = (0..9).filter(|_| pace.enter(peer).is_ok()).count();
        assert_eq!(welcome, 5, "an idle hour is worth one burst");
        for _ in 0..100 {
            pace.enter(at("10.0.0.1")).unwrap();
        }
    }

    #[tokio::test(start_paused = true)]
    async fn one_ipv6_network_is_one_client() {
        let pace = pace(1, 1);
        pace.enter(at("2001:db8::1")).unwrap();
        assert!(pace.enter(at("2001:db8::ffff:2")).is_err());
        pace.enter(at("2001:db8:0:1::1")).unwrap();
        pace.enter(at("::ffff:192.0.2.1")).unwrap();
        assert!(pace.enter(at("192.0.2.1")).is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn addresses_without_end_take_no_memory() {
        let pace = pace(1, 2);
        for n in 0..200_000_u32 {
            pace.enter(IpAddr::from(n.to_be_bytes())).unwrap();
        }
        assert!(pace.buckets.lock().unwrap().len() <= MOST_ADDRESSES);
    }

    #[tokio::test(start_paused = true)]
    async fn newcomers_do_not_each_cost_a_look_at_all() {
        let pace = pace(1, 2);
        let enter = |n: u32| pace.enter(IpAddr::from(n.to_be_bytes())).unwrap();
        enter(0);
        tokio::time::advance(Duration::from_secs(1)).await;
        (1..=u32::try_from(MOST_ADDRESSES).unwrap()).for_each(enter);
        // Only the first had its burst again.
        assert!(pace.buckets.lock().unwrap().len() <= MOST_ADDRESSES / 8 * 7);
    }

    #[test]
    fn seats_come_back() {
        let crowd = Crowd::new(2, Arc::new(|address| address == at("10.0.0.1")));
        let peer = at("192.0.2.1");
        let seats = (crowd.enter(peer).unwrap(), crowd.enter(peer).unwrap());
        assert!(crowd.enter(peer).is_none());
        let other = crowd.enter(at("192.0.2.2")).unwrap();
        let many: Vec<_> = (0..9)
            .map(|_| crowd.enter(at("10.0.0.1")).unwrap())
            .collect();
        drop(seats.0);
        assert!(crowd.enter(peer).is_some());
        drop((seats.1, other, many));
        assert!(crowd.open.lock().unwrap().is_empty());
    }
}
