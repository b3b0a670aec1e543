"""What is stored already: large and small blobs and a manifest, beside a file server and another registry."""

import re

from harness.data import MANIFEST_TYPE, REPO, Shelf
from harness.figures import GB, MIB, column, mib, middle, paired, table
from harness.procs import Meter, output_of
from harness.servers import NGINX_LOGGING, NGINX_STATIC, OURS, REGISTRY_PROXY, check

COMMANDS = ["nginx", "docker-registry", "wrk"]
QUIET = f'{OURS}, log = "warn"'


def run(bench):
    shelf = Shelf(bench.dir("shelf"))
    large, small = shelf.add(size=(8 if bench.quick else 100) * MIB), shelf.add(size=4096)
    manifest, manifest_path = shelf.add_manifest([small] + [shelf.add(size=100) for _ in range(15)], "v1")
    tag_path = f"/v2/{REPO}/manifests/v1"
    paths = {large.path: large, small.path: small, manifest_path: manifest, tag_path: manifest}
    for path, blob in paths.items():
        shelf.publish(blob, path)
    upstream = bench.registry(shelf.storage)
    main = {
        NGINX_STATIC: bench.nginx_static(f"{shelf.root}/static"),
        REGISTRY_PROXY: bench.registry_proxy(upstream),
        OURS: bench.ours(upstream.url),
    }
    # A line in the log for each request costs about as much as a small answer: with and without one, on both sides.
    contenders = {
        **main,
        NGINX_LOGGING: bench.nginx_logging(f"{shelf.root}/static"),
        QUIET: bench.ours(upstream.url, top='log = "warn"'),
    }
    for server in contenders.values():
        for path, blob in [*paths.items(), *paths.items()]:  # the second time is a hit
            check(server, blob, path)
    found = {
        f"{large.size // MIB} MiB blob, 64 connections": rounds_of(bench, main, lambda server: big(bench, server, large, 64)),
        f"{large.size // MIB} MiB blob, 1 connection": rounds_of(bench, main, lambda server: big(bench, server, large, 1)),
        "4 KiB blob, 64 connections": rounds_of(bench, contenders, lambda server: little(bench, server, small.path)),
        f"manifest of {manifest.size} bytes by digest, 64 connections":
            rounds_of(bench, contenders, lambda server: little(bench, server, manifest_path)),
        f"manifest of {manifest.size} bytes by a fresh tag, 64 connections":
            rounds_of(bench, contenders, lambda server: little(bench, server, tag_path)),
    }
    return [table_of(title, seen) for title, seen in found.items()], found


def rounds_of(bench, contenders, load):
    bench.settle()
    seen = {name: [] for name in contenders}
    for _ in range(bench.rounds):
        for name, server in contenders.items():
            seen[name].append(load(server))
    return seen


def big(bench, server, blob, connections):
    with Meter(server) as meter:
        seen = bench.drain(server.url + blob.path, connections, seconds=0.5 if bench.quick else 2)
    amount = seen["bytes"] / GB
    return {"rate": amount / seen["seconds"], "cpu": meter.cpu / amount, "peak": meter.peak, "errors": seen["errors"]}


def little(bench, server, path):
    command = ["wrk", "-t1", "-c64", "-d1s" if bench.quick else "-d2s", "-H", f"Accept: {MANIFEST_TYPE}", server.url + path]
    with Meter(server) as meter:
        text = output_of(command)
    requests = int(re.search(r"(\d+) requests in", text)[1])
    errors = re.findall(r"(?:Non-2xx.*|Socket errors.*)", text)
    rate = float(re.search(r"Requests/sec:\s+([\d.]+)", text)[1])
    return {"rate": rate, "cpu": 1e6 * meter.cpu / max(requests, 1), "peak": meter.peak, "errors": errors}


def table_of(title, seen):
    small = "MiB blob" not in title
    digits = 0 if small else 2
    nginx_rate, nginx_cpu = column(seen[NGINX_STATIC], "rate"), column(seen[NGINX_STATIC], "cpu")
    rows = [
        [name, middle(column(rounds, "rate"), digits), paired(column(rounds, "rate"), nginx_rate), middle(column(rounds, "cpu"), 0 if small else 3),
         paired(column(rounds, "cpu"), nginx_cpu), mib(column(rounds, "peak")), sum(len(one["errors"]) for one in rounds)]
        for name, rounds in seen.items()
    ]
    head = ["server", "requests/s" if small else "GB/s", "it / nginx", "CPU us/request" if small else "CPU-s/GB", "it / nginx",
            "peak anon MiB", "rounds with errors"]
    return table(f"hits: {title}", head, rows)
