//! The switch by which an operator keeps upstreams from being asked: all of them, or one.
//!
//! It holds back requests that have not begun; what is being transferred goes on.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// The switch of one upstream, and beside it the one for all. Clones are the same switches.
#[derive(Clone, Debug, Default)]
pub struct Offline {
    everywhere: Switch,
    here: Switch,
}

/// On or off. Clones are the same switch.
#[derive(Clone, Debug, Default)]
pub struct Switch(Arc<AtomicBool>);

impl Offline {
    /// The switch of a further upstream, off, beside `everywhere`.
    pub fn beside(everywhere: &Switch) -> Self {
        Self {
            everywhere: everywhere.clone(),
            here: Switch::default(),
        }
    }

    /// Whether this upstream must not be asked.
    pub fn is_on(&self) -> bool {
        self.everywhere.is_on() || self.here.is_on()
    }

    /// The switch of all upstreams.
    pub fn everywhere(&self) -> &Switch {
        &self.everywhere
    }

    /// The switch of this upstream alone.
    pub fn here(&self) -> &Switch {
        &self.here
    }
}

impl Switch {
    /// Whether it is on.
    pub fn is_on(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// Nobody is asked from now on.
    pub fn turn_on(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Asking is allowed again.
    pub fn turn_off(&self) {
        self.0.store(false, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::{Offline, Switch};

    #[test]
    fn one_switch_is_for_all_and_one_for_each() {
        let all = Switch::default();
        let (one, other) = (Offline::beside(&all), Offline::beside(&all));
        one.here().turn_on();
        assert!(one.clone().is_on() && !other.is_on());
        all.turn_on();
        assert!(other.is_on());
        all.turn_off();
        one.here().turn_off();
        assert!(!one.is_on() && !other.is_on());
    }
}
