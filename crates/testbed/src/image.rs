//! Test content: reproducible blobs, manifests, indexes and images with their digests. Nothing here is
//! compressed or unpackable; a cache looks at bytes and digests only.

use bytes::Bytes;
use oci::{Algorithm, Digest};
use serde_json::{Value, json};

/// An OCI image manifest.
pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// An OCI index.
pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
/// An OCI image configuration.
pub const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
/// An OCI layer.
pub const OCI_LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
/// A Docker image manifest, version 2.
pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
/// A Docker manifest list.
pub const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
/// What a client sends that takes every kind of manifest.
pub const ACCEPT_ALL: &str = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, \
     application/vnd.docker.distribution.manifest.list.v2+json, application/vnd.docker.distribution.manifest.v2+json";

/// Bytes with a media type and their digest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Content {
    /// The bytes.
    pub data: Bytes,
    /// What a descriptor or a `Content-Type` calls them.
    pub media_type: String,
    /// Their digest.
    pub digest: Digest,
}

/// What an image is made of. Its blobs are unique to repository, tag, platform and seed.
#[derive(Clone, Debug)]
pub struct ImageSpec {
    /// The repository.
    pub repo: String,
    /// The tag.
    pub tag: String,
    /// The sizes of its layers.
    pub layers: Vec<usize>,
    /// Makes otherwise equal images differ, as when a tag moves.
    pub seed: String,
    /// The manifest's type.
    pub media_type: String,
    /// The architecture its configuration names.
    pub architecture: String,
}

/// An image with all its parts.
#[derive(Clone, Debug)]
pub struct Image {
    /// The repository.
    pub repo: String,
    /// The tag.
    pub tag: String,
    /// The manifest.
    pub manifest: Content,
    /// The configuration.
    pub config: Content,
    /// The layers.
    pub layers: Vec<Content>,
}

/// An index and the images for two platforms behind it.
#[derive(Clone, Debug)]
pub struct MultiImage {
    /// The repository.
    pub repo: String,
    /// The index's tag; the images have none.
    pub tag: String,
    /// The index.
    pub index: Content,
    /// The images, `amd64` first, then `arm64`.
    pub images: Vec<Image>,
}

impl Content {
    /// Under sha256.
    pub fn new(data: impl Into<Bytes>, media_type: &str) -> Self {
        Self::hashed(Algorithm::Sha256, data, media_type)
    }

    /// Under the algorithm.
    pub fn hashed(algorithm: Algorithm, data: impl Into<Bytes>, media_type: &str) -> Self {
        let data = data.into();
        Content {
            digest: Digest::of(algorithm, &data),
            media_type: media_type.to_owned(),
            data,
        }
    }

    /// A layer of `size` bytes that look random and are the same for the same seed.
    pub fn blob(size: usize, seed: &str) -> Self {
        Self::new(noise(size, seed), OCI_LAYER)
    }

    /// JSON as it is printed.
    pub fn json(value: &Value, media_type: &str) -> Self {
        Self::new(value.to_string(), media_type)
    }

    /// A manifest over these blobs.
    pub fn manifest(config: &Content, layers: &[Content], media_type: &str) -> Self {
        let layers: Vec<Value> = layers.iter().map(Content::descriptor).collect();
        let body = json!({"schemaVersion": 2, "mediaType": media_type, "config": config.descriptor(), "layers": layers});
        Self::json(&body, media_type)
    }

    /// An index over these manifests, each with its architecture.
    pub fn index(children: &[(&Content, &str)], media_type: &str) -> Self {
        let manifests: Vec<Value> = children
            .iter()
            .map(|(child, architecture)| platform(child, architecture))
            .collect();
        let body = json!({"schemaVersion": 2, "mediaType": media_type, "manifests": manifests});
        Self::json(&body, media_type)
    }

    /// The number of bytes.
    pub fn size(&self) -> u64 {
        self.data.len() as u64
    }

    /// The descriptor that names it.
    pub fn descriptor(&self) -> Value {
        json!({"mediaType": self.media_type, "digest": self.digest.to_string(), "size": self.size()})
    }

    /// The same bytes with the last one changed: what a bad disk or a hostile upstream sends under the same digest.
    pub fn spoiled(&self) -> Bytes {
        let mut data = self.data.to_vec();
        if let Some(last) = data.last_mut() {
            *last ^= 1;
        }
        data.into()
    }
}

impl ImageSpec {
    /// One small layer.
    pub fn new(repo: &str, tag: &str) -> Self {
        ImageSpec {
            repo: repo.to_owned(),
            tag: tag.to_owned(),
            layers: vec![5000],
            seed: String::new(),
            media_type: OCI_MANIFEST.to_owned(),
            architecture: "amd64".to_owned(),
        }
    }

    /// With layers of these sizes.
    #[must_use]
    pub fn layers(mut self, sizes: &[usize]) -> Self {
        self.layers = sizes.to_vec();
        self
    }

    /// Another image of the same name.
    #[must_use]
    pub fn seed(mut self, seed: &str) -> Self {
        seed.clone_into(&mut self.seed);
        self
    }

    /// With this manifest type.
    #[must_use]
    pub fn media_type(mut self, media_type: &str) -> Self {
        media_type.clone_into(&mut self.media_type);
        self
    }

    /// For another architecture.
    #[must_use]
    pub fn architecture(mut self, architecture: &str) -> Self {
        architecture.clone_into(&mut self.architecture);
        self
    }

    /// Makes the image.
    pub fn build(&self) -> Image {
        let key = format!(
            "{}:{}:{}:{}",
            self.repo, self.tag, self.architecture, self.seed
        );
        let layers: Vec<Content> = self
            .layers
            .iter()
            .enumerate()
            .map(|(n, size)| Content::blob(*size, &format!("{key}/{n}")))
            .collect();
        let config = Content::json(
            &json!({"os": "linux", "architecture": self.architecture, "key": key}),
            OCI_CONFIG,
        );
        let manifest = Content::manifest(&config, &layers, &self.media_type);
        Image {
            repo: self.repo.clone(),
            tag: self.tag.clone(),
            manifest,
            config,
            layers,
        }
    }

    /// Makes an index with an image for each of two platforms.
    pub fn build_multi(&self) -> MultiImage {
        let images: Vec<Image> = ["amd64", "arm64"]
            .iter()
            .map(|architecture| self.clone().architecture(architecture).build())
            .collect();
        let children: Vec<(&Content, &str)> = images
            .iter()
            .map(|image| &image.manifest)
            .zip(["amd64", "arm64"])
            .collect();
        let kind = if self.media_type == DOCKER_MANIFEST {
            DOCKER_LIST
        } else {
            OCI_INDEX
        };
        let index = Content::index(&children, kind);
        MultiImage {
            repo: self.repo.clone(),
            tag: self.tag.clone(),
            index,
            images,
        }
    }
}

impl Image {
    /// The manifest's digest.
    pub fn digest(&self) -> Digest {
        self.manifest.digest
    }

    /// Configuration and layers.
    pub fn blobs(&self) -> impl Iterator<Item = &Content> {
        std::iter::once(&self.config).chain(&self.layers)
    }

    /// The first layer.
    pub fn layer(&self) -> &Content {
        self.layers.first().expect("an image with a layer")
    }
}

/// Reproducible bytes that do not compress: splitmix64, seeded by FNV-1a of the text.
pub fn noise(size: usize, seed: &str) -> Vec<u8> {
    let mut state = seed.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    let mut data = vec![0; size];
    for part in data.chunks_mut(8) {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = state;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^= word >> 31;
        let bytes = word.to_le_bytes();
        part.copy_from_slice(&bytes[..part.len()]);
    }
    data
}

fn platform(child: &Content, architecture: &str) -> Value {
    let mut descriptor = child.descriptor();
    descriptor["platform"] = json!({"os": "linux", "architecture": architecture});
    descriptor
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn noise_is_reproducible_and_differs_by_seed() {
        assert_eq!(noise(13, "a"), noise(13, "a"));
        assert_eq!(noise(100, "a")[..13], noise(13, "a"));
        assert_ne!(noise(13, "a"), noise(13, "b"));
    }

    #[test]
    fn an_index_names_both_platforms() {
        let multi = ImageSpec::new("r", "t")
            .media_type(DOCKER_MANIFEST)
            .build_multi();
        let body: Value = serde_json::from_slice(&multi.index.data).expect("JSON");
        assert_eq!(body["mediaType"], DOCKER_LIST);
        assert_eq!(
            body["manifests"][1]["digest"],
            multi.images[1].digest().to_string()
        );
        assert_eq!(body["manifests"][1]["platform"]["architecture"], "arm64");
        assert_ne!(
            multi.images[0].layer().digest,
            multi.images[1].layer().digest
        );
    }
}
