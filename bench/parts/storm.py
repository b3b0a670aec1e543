"""Many clients on one cold blob at the same moment: how often the upstream is asked, how soon everyone has it, how soon they see the first byte."""

from statistics import median

from harness.data import Shelf
from harness.figures import GB, MIB, column, mib, middle, paired, table
from harness.procs import Meter
from harness.servers import NGINX_CACHE, OURS, REGISTRY_PROXY, AccessLog, check

COMMANDS = ["nginx", "docker-registry"]


def run(bench):
    size = (8 if bench.quick else 100) * MIB
    storms = [8] if bench.quick else [50, 200]
    shelf = Shelf(bench.dir("shelf"))
    upstream = bench.registry(shelf.storage)
    contenders = {
        OURS: bench.ours(upstream.url),
        NGINX_CACHE: bench.nginx_cache(upstream),
        REGISTRY_PROXY: bench.registry_proxy(upstream),
    }
    found = {}
    for clients in storms:
        seen = found[clients] = {name: [] for name in contenders}
        for _ in range(bench.rounds):
            blob = shelf.add(size=size)
            for name, server in contenders.items():
                seen[name].append(storm(bench, upstream, server, blob, clients))
    tables = [table_of(clients, size, seen) for clients, seen in found.items()]
    return tables, found


def storm(bench, upstream, server, blob, clients):
    log = AccessLog(upstream)
    bench.settle()
    with Meter(server) as meter:
        seen = bench.drain(server.url + blob.path, clients)
    gets, sent = log.gets()
    check(server, blob)
    return {
        "gets": gets,
        "moved": sent / blob.size,
        "seconds": seen["seconds"],
        "first_byte_ms": 1000 * median(seen["first_byte"]) if seen["first_byte"] else None,
        "first_byte_last_ms": 1000 * seen["first_byte"][-1] if seen["first_byte"] else None,
        "cpu_per_gb": meter.cpu / (seen["bytes"] / GB),
        "peak": meter.peak,
        "errors": seen["errors"],
        "whole": seen["answers"],
    }


def table_of(clients, size, seen):
    ours = column(seen[OURS], "seconds")
    rows = []
    for name, rounds in seen.items():
        rows.append([
            name,
            middle(column(rounds, "gets"), 0),
            middle(column(rounds, "moved"), 2),
            middle(column(rounds, "seconds")),
            paired(ours, column(rounds, "seconds")),
            middle(column(rounds, "first_byte_ms"), 0),
            middle(column(rounds, "first_byte_last_ms"), 0),
            middle(column(rounds, "cpu_per_gb"), 2),
            mib(column(rounds, "peak")),
            sum(clients - one["whole"] for one in rounds),
        ])
    head = ["server", "upstream GETs", "blobs moved", "all done, s", "ours / it", "median first byte, ms", "last first byte, ms",
            "CPU-s/GB sent", "peak anon MiB", "failed"]
    return table(f"storm: {clients} clients, one cold blob of {size // MIB} MiB", head, rows)
