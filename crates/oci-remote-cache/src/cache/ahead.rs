//! Reading ahead: an image's next layers are fetched while its client is still at the ones before.
//!
//! Clients pull a few layers at a time, three with docker and containerd, six with podman and skopeo, so an image of many small layers
//! costs them a round trip to the upstream for each handful. Layers are asked for in the manifest's order, and what a client has already
//! is nearly always a beginning of it (a base image), so once some layers of an image were asked for whole, the next ones will be. How
//! much is fetched that nobody has asked for yet is bounded for each image. Clients that read parts of layers never start this.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
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

/// Images that one layer is remembered of: those whose manifests came last.
const MOST_IMAGES: usize = 4;

/// What is read ahead is no more than this part of `max_size`: it must not push out what was read ahead before.
const PART_OF_CACHE: u64 = 8;

/// The images that were fetched of late, by their layers.
#[derive(Debug)]
pub(super) struct Images {
    layers: Memory<Digest, Arc<[Place]>>,
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
    layers: Vec<Layer>,
    pull: Mutex<Pull>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Layer {
    digest: Digest,
    size: u64,
}

/// How far an image has been pulled.
#[derive(Debug)]
struct Pull {
    states: Vec<State>,
    /// The first layer beyond all that were asked for.
    front: usize,
    /// Blobs asked for in this pull.
    asked: usize,
    /// Bytes fetched that nobody has asked for.
    ahead: u64,
    last: Instant,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Unasked,
    /// Fetched by us; nobody asked for it.
    Ahead,
    Asked,
}

/// How much may be fetched now.
#[derive(Clone, Copy, Debug)]
struct Most {
    /// Bytes of one image that nobody has asked for.
    bytes: u64,
    /// Layers that begin now.
    layers: usize,
}

/// What follows from a request for a layer.
#[derive(Debug, Default, PartialEq, Eq)]
struct Next {
    /// The layer had been read ahead.
    useful: bool,
    /// Which layers to fetch now.
    start: Vec<Layer>,
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
        self.add(Image::new(source, blobs));
    }

    fn add(&self, image: Image) {
        let image = Arc::new(image);
        for (index, layer) in image.layers.iter().enumerate() {
            let image = Arc::clone(&image);
            let others = self.layers.get(&layer.digest);
            let others = others.iter().flat_map(|places| places.iter()).cloned();
            let places = std::iter::once(Place { image, index }).chain(others);
            self.layers
                .insert(layer.digest, places.take(MOST_IMAGES).collect());
        }
    }

    /// A layer was asked for whole: what to fetch now.
    ///
    /// Images of one base share their first layers. While more than one may be the one that is pulled, only what is in all of them is
    /// fetched.
    fn asked(&self, source: &Source, digest: &Digest, most: impl FnOnce() -> Most) -> Next {
        let Some(places) = self.layers.get(digest) else {
            return Next::default();
        };
        let now = Instant::now();
        let ours = places.iter().filter(|place| place.image.source == *source);
        let noted: Vec<(&Image, Noted)> = ours
            .map(|place| (&*place.image, place.image.pull().note(place, now)))
            .collect();
        let asked = noted.iter().map(|(_, noted)| noted.asked).max();
        let mut likely = noted
            .iter()
            .filter(|(_, noted)| Some(noted.asked) == asked && noted.before != State::Asked);
        let start = likely.next().map(|(image, noted)| {
            if noted.asked < ENOUGH {
                return Vec::new();
            }
            let in_all = |layer: &Layer| {
                likely
                    .clone()
                    .all(|(other, _)| other.layers.contains(layer))
            };
            image.pull().reach(&image.layers, most(), in_all)
        });
        for (image, _) in noted.iter().filter(|(_, noted)| noted.complete) {
            self.forget(image);
        }
        Next {
            useful: noted.iter().any(|(_, noted)| noted.before == State::Ahead),
            start: start.unwrap_or_default(),
        }
    }

    /// No request for this image can bring anything more.
    fn forget(&self, image: &Image) {
        for layer in &image.layers {
            let places = self.layers.get(&layer.digest);
            let places = places.iter().flat_map(|places| places.iter());
            let others: Arc<[Place]> = places
                .filter(|place| !std::ptr::eq(&raw const *place.image, image))
                .cloned()
                .collect();
            if others.is_empty() {
                self.layers.remove(&layer.digest);
            } else {
                self.layers.insert(layer.digest, others);
            }
        }
    }
}

impl Image {
    /// A layer that comes more than once (the empty one does) is asked for once.
    fn new(source: &Source, blobs: &[Descriptor]) -> Self {
        let mut layers: Vec<Layer> = Vec::with_capacity(blobs.len());
        for blob in blobs {
            let AnyDigest::Known(digest) = blob.digest else {
                continue;
            };
            if !layers.iter().any(|layer| layer.digest == digest) {
                let size = blob.size;
                layers.push(Layer { digest, size });
            }
        }
        Self {
            source: source.clone(),
            pull: Mutex::new(Pull::new(layers.len(), Instant::now())),
            layers,
        }
    }

    fn pull(&self) -> MutexGuard<'_, Pull> {
        self.pull.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a request for a layer says of one image.
#[derive(Clone, Copy, Debug)]
struct Noted {
    /// Blobs asked for in this pull, this one included.
    asked: usize,
    /// What the layer was before.
    before: State,
    /// Every layer has been asked for.
    complete: bool,
}

impl Pull {
    fn new(layers: usize, now: Instant) -> Self {
        Self {
            states: vec![State::Unasked; layers],
            front: 0,
            asked: 0,
            ahead: 0,
            last: now,
        }
    }

    /// The layer at `place` was asked for.
    fn note(&mut self, place: &Place, now: Instant) -> Noted {
        let index = place.index;
        if now.saturating_duration_since(self.last) > PAUSE {
            self.asked = 0;
        }
        self.last = now;
        let state = self.states.get_mut(index);
        let before = state.map_or(State::Asked, |state| std::mem::replace(state, State::Asked));
        if before == State::Ahead {
            let size = place.image.layers.get(index).map_or(0, |layer| layer.size);
            self.ahead = self.ahead.saturating_sub(size);
        }
        if before != State::Asked {
            self.asked += 1;
            self.front = self.front.max(index + 1);
        }
        Noted {
            asked: self.asked,
            before,
            complete: self.states.iter().all(|state| *state == State::Asked),
        }
    }

    /// The layers in the window that nobody fetches yet and `wanted` takes, as far as they fit.
    fn reach(
        &mut self,
        layers: &[Layer],
        most: Most,
        wanted: impl Fn(&Layer) -> bool,
    ) -> Vec<Layer> {
        let mut start = Vec::new();
        let window = self.states.iter_mut().zip(layers);
        for (state, layer) in window.skip(self.front).take(WINDOW) {
            let fits = layer.size <= most.bytes.saturating_sub(self.ahead);
            let room = start.len() < most.layers;
            if *state != State::Unasked || !fits || !room || !wanted(layer) {
                continue;
            }
            *state = State::Ahead;
            self.ahead += layer.size;
            start.push(*layer);
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
        let most = || self.most_ahead(origin, source);
        let next = self.inner.images.asked(source, digest, most);
        let count = |outcome| {
            let counts = &self.inner.metrics.read_ahead;
            counts.get_or_create(&OutcomeLabel { outcome }).inc();
        };
        if next.useful {
            count("used");
        }
        let store = &self.inner.store;
        for layer in next.start {
            if !store.contains(&layer.digest) {
                count("started");
                self.fetch_ahead(grant, layer, wish);
            }
        }
    }

    /// Nobody waits for it: it takes nothing of what is kept for those who do, and leaves them half of the connections.
    fn most_ahead(&self, origin: &Origin, source: &Source) -> Most {
        let upstream = &origin.upstream;
        let layers = if upstream.is_short(&source.repository) {
            0
        } else {
            self.inner.fills.to_spare(upstream.id())
        };
        let part = self.inner.store.usage().max_size() / PART_OF_CACHE;
        Most {
            bytes: origin.read_ahead.min(part),
            layers,
        }
    }

    fn fetch_ahead(&self, grant: &Grant, layer: Layer, wish: Wish) {
        let (cache, grant) = (self.clone(), grant.clone());
        self.inner.tasks.spawn(async move {
            let (layer, size) = (AnyDigest::Known(layer.digest), layer.size);
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
    use std::sync::Mutex;
    use std::time::Duration;

    use oci::{Algorithm, Digest};
    use tokio::time::{Instant, advance};

    use super::{ENOUGH, Image, Images, Layer, Most, PAUSE, Pull, WINDOW};
    use crate::names::{Source, UpstreamId};

    const KIB: u64 = 1 << 10;

    fn source() -> Source {
        Source::new(UpstreamId::new("up"), "lib/app".parse().unwrap())
    }

    fn layer(name: usize, size: u64) -> Layer {
        Layer {
            digest: Digest::of(Algorithm::Sha256, name.to_string().as_bytes()),
            size,
        }
    }

    fn image(layers: Vec<Layer>) -> Image {
        Image {
            source: source(),
            pull: Mutex::new(Pull::new(layers.len(), Instant::now())),
            layers,
        }
    }

    /// Layers 0, 1, 2 and so on, of these sizes.
    fn of_sizes(sizes: &[u64]) -> Image {
        let layers = sizes.iter().enumerate();
        image(layers.map(|(name, size)| layer(name, *size)).collect())
    }

    /// What a request for layer `name` starts, by name.
    fn start(images: &Images, name: usize, most: Most) -> Vec<usize> {
        let next = images.asked(&source(), &layer(name, 0).digest, || most);
        let name = |started: &Layer| (0..100).find(|name| layer(*name, 0).digest == started.digest);
        next.start.iter().filter_map(name).collect()
    }

    fn bytes(bytes: u64) -> Most {
        Most {
            bytes,
            layers: usize::MAX,
        }
    }

    /// What each request starts, when they come right behind each other.
    fn starts(sizes: &[u64], requests: &[usize], most: Most) -> Vec<Vec<usize>> {
        let images = Images::new();
        images.add(of_sizes(sizes));
        let start = |name: &usize| start(&images, *name, most);
        requests.iter().map(start).collect()
    }

    #[test]
    fn the_fourth_blob_starts_it_and_each_further_one_moves_the_window() {
        let started = starts(&[KIB; 20], &[0, 1, 2, 3, 4, 5, 15, 4], bytes(100 * KIB));
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
        let started = starts(&sizes, &[0, 1, 2, 3, 4, 5, 6], bytes(9 * KIB));
        // 6 of 9; the next 6 do not fit, 2 and 1 do, and then it is full.
        assert_eq!(started[3], [4, 6, 7]);
        // As what was fetched is asked for, there is room for more; what is too large is left to the client.
        assert_eq!(started[4], [5]);
        assert_eq!(started[5], [8, 10]);
        assert_eq!(started[6], Vec::<usize>::new());
        let nothing = vec![Vec::<usize>::new(); 5];
        assert_eq!(starts(&[KIB; 9], &[0, 1, 2, 3, 4], bytes(0)), nothing);
        let two = Most {
            bytes: u64::MAX,
            layers: 2,
        };
        assert_eq!(starts(&[KIB; 9], &[0, 1, 2, 3], two)[3], [4, 5]);
    }

    #[test]
    fn what_is_skipped_uses_up_the_limit_for_good() {
        let every_second: Vec<usize> = (0..40).step_by(2).collect();
        let started = starts(&[KIB; 40], &every_second, bytes(5 * KIB));
        let in_all: usize = started.iter().map(Vec::len).sum();
        let started = started.concat();
        let asked_later = started.iter().filter(|name| *name % 2 == 0).count();
        assert!(in_all > 0 && in_all - asked_later <= 5, "{started:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn requests_far_apart_are_not_one_pull() {
        let images = Images::new();
        images.add(of_sizes(&[KIB; 20]));
        for name in 0..10 {
            advance(PAUSE + Duration::from_millis(1)).await;
            assert!(start(&images, name, bytes(100 * KIB)).is_empty());
        }
    }

    #[test]
    fn an_image_asked_for_whole_is_forgotten_and_others_are_not() {
        let images = Images::new();
        images.add(of_sizes(&[KIB; 7]));
        images.add(of_sizes(&[KIB; 6]));
        let asked = |name| images.asked(&source(), &layer(name, 0).digest, || bytes(100 * KIB));
        let useful: Vec<bool> = (0..6).map(|name| asked(name).useful).collect();
        assert_eq!(useful, [false, false, false, false, true, true]);
        let left = |name| images.layers.get(&layer(name, 0).digest);
        assert_eq!(left(0).map(|places| places.len()), Some(1));
        asked(6);
        assert!((0..7).all(|name| left(name).is_none()));
    }

    #[test]
    fn of_images_that_share_a_base_the_one_that_is_pulled_is_read_ahead() {
        let tag = |own: std::ops::Range<usize>| {
            let layers = (0..6).chain(own).map(|name| layer(name, KIB));
            image(layers.collect())
        };
        let images = Images::new();
        images.add(tag(10..20));
        images.add(tag(20..30));
        let start = |name| start(&images, name, bytes(100 * KIB));
        assert!((0..3).all(|name| start(name).is_empty()));
        // Either may be meant, and both begin so.
        assert_eq!(start(3), [4, 5]);
        assert!(start(4).is_empty() && start(5).is_empty());
        assert_eq!(start(10), (11..19).collect::<Vec<_>>());
    }

    #[test]
    fn a_layer_that_comes_again_has_the_place_where_it_came_first() {
        let blob = |name: usize| {
            let digest = layer(name, KIB).digest;
            serde_json::json!({"mediaType": "x/y", "digest": digest.to_string(), "size": KIB})
        };
        let names = [0, 1, 2, 9, 3, 9, 4, 5, 9];
        let layers: Vec<serde_json::Value> = names.into_iter().skip(1).map(blob).collect();
        let manifest = serde_json::json!({"schemaVersion": 2, "config": blob(0), "layers": layers});
        let media_type = "application/vnd.oci.image.manifest.v1+json";
        let view = oci::ManifestView::parse(manifest.to_string().as_bytes(), Some(media_type));
        let images = Images::new();
        images.expect(&source(), view.unwrap().blobs());
        let start = |name| start(&images, name, bytes(100 * KIB));
        assert!([0, 1, 2].into_iter().all(|name| start(name).is_empty()));
        assert_eq!(start(9), [3, 4, 5]);
    }
}
