#!/usr/bin/env python3
"""Writes the images for new-generation clients as an OCI layout, the same bytes on every run.

usage: make_modern_image.py LAYOUT_DIR BUSYBOX ARCH

Six tags, each an image of one platform with a root file system and one layer of random files: `lazy1` and `lazy2`, 48 MiB in
files of 2 MiB, three of which differ; `lazy3` and `lazy4`, the same with files of 512 KiB, 12 MiB in all; `small`, 30 MiB, and
`large`, 50 MiB, in one file.
"""

import json
import random
import sys

from make_image import MIB, Layout, image, layer, random_layer, root_layer, tar_of

FILE_COUNT = 24
FILE_SIZE = 2 * MIB
SMALL_FILE_SIZE = MIB // 2
CHANGED = (1, 2, 3)  # side by side, so that a lazy client fetches a few MiB in a row


def lazy_layer(version, file_size=FILE_SIZE):
    def content(i):
        return random.Random(f"lazy-{i}-{version if i in CHANGED else 1}").randbytes(file_size)

    return tar_of([("data", "dir", None)] + [(f"data/{i:02}", "file", content(i)) for i in range(FILE_COUNT)])


def main():
    target, busybox_path, arch = sys.argv[1:]
    with open(busybox_path, "rb") as file:
        busybox = file.read()
    layout = Layout(target)
    root = layer(layout, root_layer(busybox, arch))
    tars = {
        "lazy1": lazy_layer(1),
        "lazy2": lazy_layer(2),
        "lazy3": lazy_layer(1, SMALL_FILE_SIZE),
        "lazy4": lazy_layer(2, SMALL_FILE_SIZE),
        "small": random_layer("modern-small", 30 * MIB),
        "large": random_layer("modern-large", 50 * MIB),
    }
    manifests = []
    for tag, tar in tars.items():
        manifest, _ = image(layout, arch, [root, layer(layout, tar)])
        manifests.append({**manifest, "annotations": {"org.opencontainers.image.ref.name": tag}})
    layout.write("index.json", json.dumps({"schemaVersion": 2, "manifests": manifests}).encode())


if __name__ == "__main__":
    main()
