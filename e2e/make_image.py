#!/usr/bin/env python3
"""Writes the test image as an OCI layout, the same bytes on every run.

usage: make_image.py LAYOUT_DIR BUSYBOX ARCH

Two tags, `v1` and `v2`, each an index of two platforms (linux/amd64, linux/arm64). A platform has five layers of its own or
shared: a root file system with a static busybox, three random layers, and one of 20 MiB. `v2` differs from `v1` in one small
layer. ARCH is the machine's own architecture: its image is the one that can run, the other one only has to be pulled.

Beside the layout it writes LAYOUT_DIR.<tag>.<arch|all>.digests: the digests that a client of that platform must have fetched.
"""

import gzip
import hashlib
import io
import json
import os
import random
import sys
import tarfile

MIB = 1 << 20
INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar+gzip"
CREATED = "2024-01-01T00:00:00Z"


class Layout:
    """A folder of blobs named by their digest."""

    def __init__(self, root):
        self.root = root
        os.makedirs(os.path.join(root, "blobs", "sha256"))
        self.write("oci-layout", json.dumps({"imageLayoutVersion": "1.0.0"}).encode())

    def write(self, name, data):
        with open(os.path.join(self.root, name), "wb") as file:
            file.write(data)

    def add(self, data, media_type, **more):
        """Stores a blob and returns its descriptor."""
        name = hashlib.sha256(data).hexdigest()
        self.write(os.path.join("blobs", "sha256", name), data)
        return {"mediaType": media_type, "digest": "sha256:" + name, "size": len(data), **more}

    def add_json(self, value, media_type, **more):
        return self.add(json.dumps(value, sort_keys=True).encode(), media_type, **more)


def tar_of(members):
    """A tar of (name, kind, payload): file bytes, a link's target, or nothing for a folder."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, kind, payload in members:
            info = tarfile.TarInfo(name)
            info.mtime = 1704067200
            if kind == "dir":
                info.type, info.mode = tarfile.DIRTYPE, 0o755
                tar.addfile(info)
            elif kind == "link":
                info.type, info.linkname = tarfile.SYMTYPE, payload
                tar.addfile(info)
            else:
                info.mode, info.size = 0o755, len(payload)
                tar.addfile(info, io.BytesIO(payload))
    return out.getvalue()


def root_layer(busybox, arch):
    return tar_of(
        [(name, "dir", None) for name in ("bin", "dev", "etc", "proc", "sys", "tmp")]
        + [("bin/busybox", "file", busybox)]
        + [(f"bin/{tool}", "link", "busybox") for tool in ("sh", "cat", "echo", "ls")]
        + [("etc/platform", "file", f"linux/{arch}\n".encode())]
    )


def random_layer(name, size):
    return tar_of([("data", "dir", None), (f"data/{name}", "file", random.Random(name).randbytes(size))])


def layer(layout, tar):
    """Stores a compressed layer: its descriptor and the digest of its tar. Random bytes do not shrink, so level 1 is enough."""
    diff_id = "sha256:" + hashlib.sha256(tar).hexdigest()
    return layout.add(gzip.compress(tar, compresslevel=1, mtime=0), LAYER_TYPE), diff_id


def image(layout, arch, layers):
    config = layout.add_json(
        {
            "architecture": arch,
            "os": "linux",
            "created": CREATED,
            "config": {"Cmd": ["/bin/cat", "/etc/platform"], "Env": ["PATH=/bin"]},
            "rootfs": {"type": "layers", "diff_ids": [diff_id for _, diff_id in layers]},
            "history": [{"created": CREATED, "created_by": f"layer {i}"} for i in range(len(layers))],
        },
        CONFIG_TYPE,
    )
    descriptors = [descriptor for descriptor, _ in layers]
    manifest = layout.add_json(
        {"schemaVersion": 2, "mediaType": MANIFEST_TYPE, "config": config, "layers": descriptors},
        MANIFEST_TYPE,
        platform={"architecture": arch, "os": "linux"},
    )
    return manifest, [manifest["digest"], config["digest"]] + [d["digest"] for d in descriptors]


def main():
    root, busybox_path, own_arch = sys.argv[1:]
    with open(busybox_path, "rb") as file:
        busybox = file.read()
    layout = Layout(root)
    shared = [layer(layout, random_layer("shared", 3 * MIB)), layer(layout, random_layer("large", 20 * MIB))]
    roots = {
        arch: [
            layer(layout, root_layer(busybox if arch == own_arch else b"not for this machine\n", arch)),
            layer(layout, random_layer(f"own-{arch}", MIB)),
        ]
        for arch in ("amd64", "arm64")
    }
    tags = []
    for tag in ("v1", "v2"):
        small = layer(layout, random_layer(tag, 64 << 10))
        manifests, everything = [], []
        for arch, own in roots.items():
            manifest, digests = image(layout, arch, own + [small] + shared)
            manifests.append(manifest)
            everything.append((arch, digests))
        index = layout.add_json(
            {"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": manifests},
            INDEX_TYPE,
            annotations={"org.opencontainers.image.ref.name": tag},
        )
        tags.append(index)
        everything.append(("all", sorted({d for _, digests in everything for d in digests})))
        for arch, digests in everything:
            with open(f"{root}.{tag}.{arch}.digests", "w", encoding="ascii") as file:
                file.write("\n".join([index["digest"], *digests]) + "\n")
    layout.write("index.json", json.dumps({"schemaVersion": 2, "manifests": tags}).encode())


if __name__ == "__main__":
    main()
