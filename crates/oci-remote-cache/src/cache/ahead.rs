//! Reading ahead: an image's next layers are fetched while its client is still at the ones before.
//!
//! Clients pull a few layers at a time, three with docker and containerd, six with podman and skopeo, so an image of many small layers
//! costs them a round trip to the upstream for each handful. Layers are asked for in the manifest's order, and what a client has already
//! is nearly always a beginning of it (a base image), so once some layers of an image were asked for whole, the next ones will be. How
//! much is fetched that nobody has asked for yet is bounded for each image. Clients that read parts of layers never start this.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use oci::{AnyDigest, Descriptor, Digest};
use quick_cache::sync::Cache as Memory;
use tokio::time::Instant;

use super::blob::{BlobAnswer, Wish, WishRange};
use super::{Cache, Origin};
use crate::deadline::Deadline;
use crate::metrics::OutcomeLabel;
use crate::names::Source;
use crate::policy::{Grant, May};

/// Layers remembered, of all images.
const REMEMBERED: usize = 20_000;

/// Images of more blobs than this are not images.
const MOST_LAYERS: usize = 500;

/// Blobs that were asked for, config included, before more are expected to be: whoever looks at a config, or fetches a chart or a
/// signature, stays below.
const ENOUGH: usize = 4;

/// Layers fetched beyond the last one asked for.
const WINDOW: usize = 8;

/// A pull that asked for nothing for so long is over.
const PAUSE: Duration = Duration::from_secs(30);

/// The images that were fetched of late, by their layers.
#[derive(Debug)]
pub(super) struct Images {
    layers: Memory<Digest, Place>,
}

/// A layer's place in an image.
#[derive(Clone, Debug)]
struct Place {
    image: Arc<Image>,
    index: usize,
}

#[derive(Debug)]
struct Image {
    source: Source,
    layers: Vec<(Digest, u64)>,
    pull: Mutex<Pull>,
}

/// How far an image has been pulled.
#[derive(Debug)]
struct Pull {
    states: Vec<Layer>,
    /// The first layer beyond all that were asked for.
    front: usize,
    /// Blobs asked for in this pull.
    asked: usize,
    /// Bytes fetched that nobody has asked for.
    ahead: u64,
    last: Instant,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Layer {
    Unasked,
    /// Fetched by us; nobody asked for it.
    Ahead,
    Asked,
}

/// What follows from a request for a layer.
#[derive(Debug, Default, PartialEq, Eq)]
struct Next {
    /// The layer had been read ahead.
    useful: bool,
    /// Which layers to fetch now.
    start: Vec<usize>,
    /// No request for this image can bring anything more.
    complete: bool,
}

impl Images {
    pub(super) fn new() -> Self {
        Self {
            layers: Memory::new(REMEMBERED),
        }
    }

    /// An image's manifest came from the upstream: its layers will be asked for.
    pub(super) fn expect(&self, source: &Source, blobs: &[Descriptor]) {
        if blobs.len() <= ENOUGH || blobs.len() > MOST_LAYERS {
            return;
        }
        let known = |blob: &Descriptor| match blob.digest {
            AnyDigest::Known(digest) => Some((digest, blob.size)),
            AnyDigest::Foreign(_) => None,
        };
        let layers: Vec<(Digest, u64)> = blobs.iter().filter_map(known).collect();
        let image = Arc::new(Image {
            source: source.clone(),
            pull: Mutex::new(Pull::new(layers.len(), Instant::now())),
            layers,
        });
        for (index, (digest, _)) in image.layers.iter().enumerate() {
            let image = Arc::clone(&image);
            self.layers.insert(*digest, Place { image, index });
        }
    }

    /// A layer was asked for whole. What to fetch now, and whether it had been fetched ahead.
    fn asked(
        &self,
        source: &Source,
        digest: &Digest,
        limit: impl FnOnce() -> u64,
    ) -> (Vec<(Digest, u64)>, bool) {
        let Some(Place { image, index }) = self.layers.get(digest) else {
            return (Vec::new(), false);
        };
        if image.source != *source {
            return (Vec::new(), false);
        }
        let limit = limit();
        let mut pull = image.pull.lock().unwrap_or_else(PoisonError::into_inner);
        let next = pull.asked(index, Instant::now(), (&image.layers, limit));
        drop(pull);
        if next.complete {
            for (digest, _) in &image.layers {
                self.layers.remove(digest);
            }
        }
        let layer = |index: &usize| image.layers.get(*index).copied();
        (next.start.iter().filter_map(layer).collect(), next.useful)
    }
}

impl Pull {
    fn new(layers: usize, now: Instant) -> Self {
        Self {
            states: vec![Layer::Unasked; layers],
            front: 0,
            asked: 0,
            ahead: 0,
            last: now,
        }
    }

    /// `index` was asked for; at most `limit` bytes are to be here that nobody has asked for.
    fn asked(
        &mut self,
        index: usize,
        now: Instant,
        (layers, limit): (&[(Digest, u64)], u64),
    ) -> Next {
        let size = |index: usize| layers.get(index).map_or(0, |(_, size)| *size);
        if now.saturating_duration_since(self.last) > PAUSE {
            self.asked = 0;
        }
        self.last = now;
        let Some(state) = self.states.get_mut(index) else {
            return Next::default();
        };
        let useful = match std::mem::replace(state, Layer::Asked) {
            Layer::Asked => return Next::default(),
            Layer::Ahead => true,
            Layer::Unasked => false,
        };
        if useful {
            self.ahead = self.ahead.saturating_sub(size(index));
        }
        self.asked += 1;
        self.front = self.front.max(index + 1);
        let start = if self.asked < ENOUGH {
            Vec::new()
        } else {
            self.reach(size, limit)
        };
        Next {
            useful,
            start,
            complete: self.states.iter().all(|state| *state == Layer::Asked),
        }
    }

    /// The layers in the window that nobody fetches yet, as far as they fit.
    fn reach(&mut self, size: impl Fn(usize) -> u64, limit: u64) -> Vec<usize> {
        let mut start = Vec::new();
        let window = self.states.iter_mut().enumerate();
        for (index, state) in window.skip(self.front).take(WINDOW) {
            let fits = size(index) <= limit.saturating_sub(self.ahead);
            if *state != Layer::Unasked || !fits {
                continue;
            }
            *state = Layer::Ahead;
            self.ahead += size(index);
            start.push(index);
        }
        start
    }
}

impl Cache {
    /// A client was given all of a blob, or is about to be: what it will ask for next is fetched, if it is one of an image's layers.
    pub(super) fn read_ahead(&self, grant: &Grant, digest: &Digest, wish: Wish) {
        if wish.range != WishRange::Whole || grant.may() == May::PullCached {
            return;
        }
        let source = grant.source();
        let Ok(origin) = self.origin(source) else {
            return;
        };
        let limit = || self.most_ahead(origin, source);
        let (layers, useful) = self.inner.images.asked(source, digest, limit);
        let count = |outcome| {
            let counts = &self.inner.metrics.read_ahead;
            counts.get_or_create(&OutcomeLabel { outcome }).inc();
        };
        if useful {
            count("used");
        }
        let store = &self.inner.store;
        for layer in layers {
            if !store.contains(&layer.0) {
                count("started");
                self.fetch_ahead(grant, layer, wish);
            }
        }
    }

    /// Nobody waits for it: it takes nothing of what is kept for those who do.
    fn most_ahead(&self, origin: &Origin, source: &Source) -> u64 {
        let upstream = &origin.upstream;
        if upstream.is_short(&source.repository) || self.inner.fills.is_crowded(upstream.id()) {
            return 0;
        }
        origin.read_ahead
    }

    fn fetch_ahead(&self, grant: &Grant, (layer, size): (Digest, u64), wish: Wish) {
        let (cache, grant) = (self.clone(), grant.clone());
        self.inner.tasks.spawn(async move {
            let layer = AnyDigest::Known(layer);
            let fetched = cache.find_blob(&grant, &layer, wish, Deadline::for_answer());
            let fetched = tokio::select! {
                () = cache.inner.tasks.stopping() => return,
                fetched = Box::pin(fetched) => fetched,
            };
            match fetched {
                // The limit counts what the manifest says, and anyone can push one that lies.
                Ok(BlobAnswer::Filling(open, _)) if open.size() != Some(size) => {
                    tracing::info!(source = %grant.source(), digest = %layer, said = size, size = open.size(),
                        "a layer has not the size that its manifest says; it is not read ahead");
                    open.renounce();
                }
                // A fill needs no reader to go on. Whoever asks for the layer meets what this one met, or tries again.
                Ok(_) => {}
                Err(error) => {
                    tracing::debug!(source = %grant.source(), digest = %layer, %error, "a layer was not read ahead");
                }
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use oci::{Algorithm, Digest};
    use tokio::time::Instant;

    use super::{ENOUGH, Next, PAUSE, Pull, WINDOW};

    const KIB: u64 = 1 << 10;

    fn layers(sizes: &[u64]) -> Vec<(Digest, u64)> {
        let layer = |(index, size): (usize, &u64)| {
            let digest = Digest::of(Algorithm::Sha256, index.to_string().as_bytes());
            (digest, *size)
        };
        sizes.iter().enumerate().map(layer).collect()
    }

    /// What each request starts, when they come right behind each other.
    fn starts(sizes: &[u64], requests: &[usize], limit: u64) -> Vec<Vec<usize>> {
        let now = Instant::now();
        let layers = layers(sizes);
        let mut pull = Pull::new(layers.len(), now);
        let start = |index: &usize| pull.asked(*index, now, (&layers, limit)).start;
        requests.iter().map(start).collect()
    }

    #[test]
    fn the_fourth_blob_starts_it_and_each_further_one_moves_the_window() {
        let started = starts(&[KIB; 20], &[0, 1, 2, 3, 4, 5, 15, 4], 100 * KIB);
        let none: Vec<usize> = vec![];
        assert_eq!(&started[..ENOUGH - 1], vec![none.clone(); ENOUGH - 1]);
        assert_eq!(started[3], (4..4 + WINDOW).collect::<Vec<_>>());
        assert_eq!(started[4], [12]);
        assert_eq!(started[5], [13]);
        // A client that skips some has them already: what was fetched of these stays, and nothing more comes.
        assert_eq!(started[6], [16, 17, 18, 19]);
        assert_eq!(started[7], none);
    }

    #[test]
    fn what_nobody_asked_for_stays_within_the_limit() {
        let sizes = [1, 1, 1, 1, 6, 6, 2, 1, 1, 100, 1].map(|kib| kib * KIB);
        let started = starts(&sizes, &[0, 1, 2, 3, 4, 5, 6], 9 * KIB);
        // 6 of 9; the next 6 do not fit, 2 and 1 do, and then it is full.
        assert_eq!(started[3], [4, 6, 7]);
        // As what was fetched is asked for, there is room for more; what is too large is left to the client.
        assert_eq!(started[4], [5]);
        assert_eq!(started[5], [8, 10]);
        assert_eq!(started[6], Vec::<usize>::new());
        assert_eq!(
            starts(&[KIB; 9], &[0, 1, 2, 3, 4], 0),
            vec![Vec::<usize>::new(); 5]
        );
    }

    #[test]
    fn what_is_skipped_uses_up_the_limit_for_good() {
        let every_second: Vec<usize> = (0..40).step_by(2).collect();
        let started = starts(&[KIB; 40], &every_second, 5 * KIB);
        let in_all: usize = started.iter().map(Vec::len).sum();
        let asked_later = started
            .concat()
            .iter()
            .filter(|index| *index % 2 == 0)
            .count();
        assert!(in_all - asked_later <= 5, "{started:?}");
    }

    #[test]
    fn requests_far_apart_are_not_one_pull() {
        let layers = layers(&[KIB; 20]);
        let mut now = Instant::now();
        let mut pull = Pull::new(layers.len(), now);
        for index in 0..10 {
            now += PAUSE + Duration::from_millis(1);
            let next = pull.asked(index, now, (&layers, 100 * KIB));
            assert_eq!(next, Next::default());
        }
    }

    #[test]
    fn an_image_asked_for_whole_is_complete_with_its_last_layer() {
        let layers = layers(&[KIB; 6]);
        let now = Instant::now();
        let mut pull = Pull::new(layers.len(), now);
        let mut asked = |index| pull.asked(index, now, (&layers, 100 * KIB));
        let useful: Vec<bool> = (0..5).map(|index| asked(index).useful).collect();
        assert_eq!(useful, [false, false, false, false, true]);
        let last = asked(5);
        assert!(last.complete && last.useful, "{last:?}");
    }
}
