"""What is downloaded: random blobs and an image, laid out for a registry, for a file server and as an OCI layout."""

import gzip
import hashlib
import io
import json
import os
import random
import tarfile

MANIFEST_TYPE = "application/vnd.docker.distribution.manifest.v2+json"
CONFIG_TYPE = "application/vnd.docker.container.image.v1+json"
LAYER_TYPE = "application/vnd.docker.image.rootfs.diff.tar.gzip"
CREATED = "2024-01-01T00:00:00Z"
REPO = "bench/data"


class Blob:
    """A file named by its digest."""

    def __init__(self, folder, data=None, size=0):
        """From bytes, or `size` random ones written piece by piece."""
        os.makedirs(folder, exist_ok=True)
        hasher, self.size = hashlib.sha256(), 0
        temporary = os.path.join(folder, "new")
        with open(temporary, "wb") as file:
            for part in [data] if data is not None else random_parts(size):
                hasher.update(part)
                file.write(part)
                self.size += len(part)
        self.hex = hasher.hexdigest()
        self.file = os.path.join(folder, self.hex)
        os.rename(temporary, self.file)

    @property
    def digest(self):
        return "sha256:" + self.hex

    @property
    def path(self):
        """Below a registry's URL."""
        return f"/v2/{REPO}/blobs/{self.digest}"

    def descriptor(self, media_type):
        return {"mediaType": media_type, "digest": self.digest, "size": self.size}


class Shelf:
    """A registry's folder that is written to without a registry: links, no copies."""

    def __init__(self, root):
        self.root = root
        self.blobs = os.path.join(root, "data")
        self.storage = os.path.join(root, "storage")

    def add(self, data=None, size=0):
        """A blob of the repository."""
        blob = Blob(self.blobs, data, size)
        base = os.path.join(self.storage, "docker/registry/v2")
        hard_link(blob.file, os.path.join(base, f"blobs/sha256/{blob.hex[:2]}/{blob.hex}/data"))
        self.link(f"_layers/sha256/{blob.hex}/link", blob)
        return blob

    def add_manifest(self, layers, tag):
        """A manifest over these blobs, and its path."""
        config = self.add(json.dumps({"os": "linux", "architecture": "amd64"}).encode())
        body = {
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "config": config.descriptor(CONFIG_TYPE),
            "layers": [layer.descriptor(LAYER_TYPE) for layer in layers],
        }
        manifest = self.add(json.dumps(body, indent=2).encode())
        self.link(f"_manifests/revisions/sha256/{manifest.hex}/link", manifest)
        self.link(f"_manifests/tags/{tag}/current/link", manifest)
        self.link(f"_manifests/tags/{tag}/index/sha256/{manifest.hex}/link", manifest)
        return manifest, f"/v2/{REPO}/manifests/{manifest.digest}"

    def link(self, name, blob):
        path = os.path.join(self.storage, "docker/registry/v2/repositories", REPO, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w", encoding="ascii") as file:
            file.write(blob.digest)

    def publish(self, blob, path):
        """The blob as a plain file below `static/`, at the path that a registry has it at."""
        hard_link(blob.file, os.path.join(self.root, "static") + path)


class Layout:
    """An OCI layout."""

    def __init__(self, root):
        self.root, self.manifests = root, []
        self.blobs = os.path.join(root, "blobs", "sha256")

    def add(self, data=None, size=0):
        return Blob(self.blobs, data, size)

    def add_image(self, tag, sizes):
        """An image that can be unpacked: one layer of random bytes for each size."""
        layers = [self.layer(number, size) for number, size in enumerate(sizes)]
        config = {
            "architecture": "amd64",
            "os": "linux",
            "created": CREATED,
            "config": {},
            "rootfs": {"type": "layers", "diff_ids": [diff_id for _, diff_id in layers]},
            "history": [{"created": CREATED, "created_by": f"layer {number}"} for number in range(len(layers))],
        }
        body = {
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "config": self.add(json.dumps(config).encode()).descriptor(CONFIG_TYPE),
            "layers": [blob.descriptor(LAYER_TYPE) for blob, _ in layers],
        }
        descriptor = self.add(json.dumps(body).encode()).descriptor(MANIFEST_TYPE)
        self.manifests.append({**descriptor, "annotations": {"org.opencontainers.image.ref.name": tag}})

    def layer(self, number, size):
        tar = tar_of(f"layer-{number}", random.randbytes(size))
        return self.add(gzip.compress(tar, compresslevel=1, mtime=0)), "sha256:" + hashlib.sha256(tar).hexdigest()

    def finish(self):
        """Writes the index; nothing may be added afterwards."""
        with open(os.path.join(self.root, "index.json"), "w", encoding="ascii") as file:
            json.dump({"schemaVersion": 2, "manifests": self.manifests}, file)


def random_parts(size):
    while size > 0:
        part = os.urandom(min(size, 1 << 20))
        size -= len(part)
        yield part


def tar_of(name, data):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        info = tarfile.TarInfo(name)
        info.size, info.mode = len(data), 0o644
        tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def hard_link(source, target):
    os.makedirs(os.path.dirname(target), exist_ok=True)
    os.link(source, target)
