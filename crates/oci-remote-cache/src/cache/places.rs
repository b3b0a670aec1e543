//! Places for work that goes on behind an answer: so many in all, and for each client no more than its share.
//!
//! A place is free again when what holds it is dropped.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use crate::policy::ClientName;

/// Who has how many places.
type Taken = HashMap<Option<ClientName>, usize>;

/// A bounded number of places.
#[derive(Debug)]
pub(super) struct Places {
    most: usize,
    share: usize,
    taken: Arc<Mutex<Taken>>,
}

/// One place, until it is dropped.
#[derive(Debug)]
pub(super) struct Place {
    whose: Option<ClientName>,
    taken: Arc<Mutex<Taken>>,
}

/// Why there is no place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lack {
    /// All are taken.
    Place,
    /// This client has its share.
    Share,
}

impl Places {
    pub(super) fn new(most: usize, share: usize) -> Self {
        Self {
            most,
            share,
            taken: Arc::default(),
        }
    }

    /// A place for a client; those without a name are one client together.
    pub(super) fn take(&self, whose: Option<&ClientName>) -> Result<Place, Lack> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let whose = whose.cloned();
        if taken.get(&whose).is_some_and(|&has| has >= self.share) {
            return Err(Lack::Share);
        }
        if taken.values().sum::<usize>() >= self.most {
            return Err(Lack::Place);
        }
        *taken.entry(whose.clone()).or_default() += 1;
        Ok(Place {
            whose,
            taken: Arc::clone(&self.taken),
        })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(has) = taken.get_mut(&self.whose) {
            *has -= 1;
            if *has == 0 {
                taken.remove(&self.whose);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_takes_all_and_what_is_given_back_is_free() {
        let places = Places::new(5, 2);
        let names = ["a", "b", "c"].map(|name| Some(ClientName::new(name)));
        let [a, b, c] = names.each_ref().map(Option::as_ref);
        let first = places.take(a).unwrap();
        let _second = places.take(a).unwrap();
        assert_eq!(places.take(a).unwrap_err(), Lack::Share);
        let _others = (places.take(b).unwrap(), places.take(c).unwrap());
        let _last = places.take(c).unwrap();
        assert_eq!(places.take(b).unwrap_err(), Lack::Place);
        drop(first);
        places.take(a).unwrap();
        assert_eq!(places.taken.lock().unwrap().len(), 3);
    }
}
