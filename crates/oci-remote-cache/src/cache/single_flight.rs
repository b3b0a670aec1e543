//! Many requests for one answer, one errand.
//!
//! The first to ask for a key starts the work as a task of its own, so that no client's leaving ends it; everyone who asks before it is
//! done gets the same answer.

use std::collections::HashMap;
use std::future::Future;
use std::hash::Hash;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::watch;

use crate::tasks::Tasks;

/// Errands under way. Clones share them.
#[derive(Debug)]
pub struct Flights<K, V> {
    under_way: Arc<Mutex<HashMap<K, watch::Receiver<Option<V>>>>>,
    tasks: Tasks,
}

/// Whether a request started the errand or found it under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// It started it.
    Lead,
    /// It waited for one already under way.
    Joined,
}

/// The errand ended without an answer: the process is stopping.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the errand ended without an answer")]
pub struct Lost;

impl<K, V> Clone for Flights<K, V> {
    fn clone(&self) -> Self {
        Self {
            under_way: Arc::clone(&self.under_way),
            tasks: self.tasks.clone(),
        }
    }
}

impl<K: Clone + Eq + Hash + Send + 'static, V: Clone + Send + Sync + 'static> Flights<K, V> {
    /// Nothing under way.
    pub fn new(tasks: Tasks) -> Self {
        Self {
            under_way: Arc::default(),
            tasks,
        }
    }

    /// The answer for `key`: that of the errand under way, or of `work`, which is started.
    pub async fn run<F>(&self, key: K, work: impl FnOnce() -> F) -> Result<(V, Role), Lost>
    where
        F: Future<Output = V> + Send + 'static,
    {
        let (mut answer, role) = self.join(key, work);
        let value = answer
            .wait_for(Option::is_some)
            .await
            .map_err(|_gone| Lost)?
            .clone();
        value.map(|value| (value, role)).ok_or(Lost)
    }

    fn join<F>(&self, key: K, work: impl FnOnce() -> F) -> (watch::Receiver<Option<V>>, Role)
    where
        F: Future<Output = V> + Send + 'static,
    {
        let mut under_way = self
            .under_way
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(answer) = under_way.get(&key) {
            return (answer.clone(), Role::Joined);
        }
        let (tell, answer) = watch::channel(None);
        under_way.insert(key.clone(), answer.clone());
        let landing = Landing {
            flights: self.clone(),
            key,
        };
        let work = work();
        self.tasks.spawn(async move {
            let value = work.await;
            drop(landing);
            tell.send_replace(Some(value));
        });
        (answer, Role::Lead)
    }
}

/// Takes an errand off the table when it ends, also when it panics.
struct Landing<K: Clone + Eq + Hash + Send + 'static, V: Clone + Send + Sync + 'static> {
    flights: Flights<K, V>,
    key: K,
}

impl<K: Clone + Eq + Hash + Send + 'static, V: Clone + Send + Sync + 'static> Drop
    for Landing<K, V>
{
    fn drop(&mut self) {
        self.flights
            .under_way
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&self.key);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::time::Duration;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn all_who_ask_meanwhile_share_one_errand() {
        let flights = Flights::<&str, u32>::new(Tasks::new());
        let runs = Arc::new(AtomicU32::new(0));
        let errand = |runs: Arc<AtomicU32>| async move {
            tokio::time::sleep(Duration::from_secs(1)).await;
            runs.fetch_add(1, Ordering::Relaxed)
        };
        let ask = || flights.run("key", || errand(Arc::clone(&runs)));
        let (first, second) = tokio::join!(ask(), ask());
        assert_eq!(first, Ok((0, Role::Lead)));
        assert_eq!(second, Ok((0, Role::Joined)));
        assert_eq!(ask().await, Ok((1, Role::Lead)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_leaves_does_not_end_it() {
        let flights = Flights::<&str, u32>::new(Tasks::new());
        let errand = || async {
            tokio::time::sleep(Duration::from_secs(5)).await;
            7
        };
        tokio::time::timeout(Duration::from_secs(1), flights.run("key", errand))
            .await
            .unwrap_err();
        assert_eq!(flights.run("key", errand).await, Ok((7, Role::Joined)));
    }
}
