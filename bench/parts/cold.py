"""One client, one cold blob: what the cache costs beside a direct download, and what it gains when each upstream connection is narrow."""

from harness.data import Layout, Shelf
from harness.figures import GB, MIB, column, mib, middle, paired, table
from harness.procs import Meter
from harness.servers import NGINX_CACHE, OURS, REGISTRY_PROXY, AccessLog, asked, check

COMMANDS = ["nginx", "docker-registry"]
RATE = 20_000_000
DIRECT = "direct"
ONE = f"{OURS}, connections_per_blob = 1"


def run(bench):
    limited, limited_found = narrow(bench)
    unlimited, unlimited_found = unthrottled(bench)
    return [limited, unlimited], {"limited": limited_found, "unthrottled": unlimited_found}


def narrow(bench):
    """An upstream that gives each connection 20 MB/s after 30 ms."""
    size = (64 if bench.quick else 512) * MIB
    layout = Layout(bench.dir("layout"))
    blob = layout.add(size=size)
    layout.finish()
    repo = blob.path.split("/blobs/")[0].removeprefix("/v2/")
    upstream = bench.throttled(layout.root, repo, rate=RATE, latency_ms=30)
    found = {DIRECT: [], OURS: [], ONE: []}
    keys = {OURS: "", ONE: "connections_per_blob = 1"}
    for _ in range(bench.rounds):
        for name, rounds in found.items():
            one = narrow_download(bench, upstream, blob, keys.get(name))
            if one is not None:
                rounds.append(one)
    bench.stop(upstream)
    direct = column(found[DIRECT], "seconds")
    rows = [
        [name, middle(column(rounds, "seconds"), 2), paired(column(rounds, "seconds"), direct, 3), middle(column(rounds, "gets"), 0),
         middle(column(rounds, "connections"), 0), middle(column(rounds, "moved"), 3), middle(column(rounds, "first_byte_ms"), 0)]
        for name, rounds in found.items() if rounds
    ]
    if not found[ONE]:
        print(f"-- skipped: {ONE}: this build does not know the key", flush=True)
    head = ["way", "s", "it / direct", "upstream GETs", "connections", "blobs moved", "first byte, ms"]
    return table(f"cold: {size // MIB} MiB, upstream of {RATE // 10**6} MB/s and 30 ms per connection", head, rows), found


def narrow_download(bench, upstream, blob, keys):
    """Direct without `keys`. None when ours does not know them."""
    server = upstream if keys is None else bench.ours(upstream.url, keys)
    if server is None:
        return None
    before = asked(upstream.url + "/bench/stats")["connections"]
    asked(upstream.url + "/bench/reset")
    seen = bench.drain(server.url + blob.path)
    stats = asked(upstream.url + "/bench/stats")
    if keys is not None:
        check(server, blob)
        bench.drop(server)
    gets = [one for one in stats["requests"] if one["kind"] == "blob" and one["method"] == "GET"]
    return {
        "seconds": seen["seconds"],
        "first_byte_ms": 1000 * seen["first_byte"][0],
        "gets": len(gets),
        "ranges": [one["range"] for one in gets],
        # Each look at the statistics is a connection too.
        "connections": stats["connections"] - before - 2,
        "moved": sum(one["sent"] for one in gets) / blob.size,
        "errors": seen["errors"],
    }


def unthrottled(bench):
    """As fast as loopback goes; a direct download right before each, from the same upstream."""
    size = (8 if bench.quick else 100) * MIB
    shelf = Shelf(bench.dir("shelf"))
    upstream = bench.registry(shelf.storage)
    contenders = {
        REGISTRY_PROXY: bench.registry_proxy(upstream),
        NGINX_CACHE: bench.nginx_cache(upstream),
        OURS: bench.ours(upstream.url),
    }
    found = {name: [] for name in contenders}
    for _ in range(bench.rounds):
        blob = shelf.add(size=size)
        bench.drain(upstream.url + blob.path)
        for name, server in contenders.items():
            found[name].append(download(bench, upstream, server, blob))
    for process in [*contenders.values(), upstream]:
        bench.stop(process)
    ours = column(found[OURS], "seconds")
    rows = [
        [name, middle(column(rounds, "seconds")), middle(column(rounds, "ratio"), 2), paired(ours, column(rounds, "seconds")),
         middle(column(rounds, "first_byte_ms"), 0), middle(column(rounds, "cpu_per_gb"), 2), mib(column(rounds, "peak")),
         middle(column(rounds, "gets"), 0)]
        for name, rounds in found.items()
    ]
    rows.insert(0, [DIRECT, middle([one["direct"] for rounds in found.values() for one in rounds]), "1", "-", "-", "-", "-", "-"])
    head = ["way", "s", "it / direct", "ours / it", "first byte, ms", "CPU-s/GB filled", "peak anon MiB", "upstream GETs"]
    return table(f"cold: {size // MIB} MiB, upstream unthrottled", head, rows), found


def download(bench, upstream, server, blob):
    bench.settle()
    direct = bench.drain(upstream.url + blob.path)
    log = AccessLog(upstream)
    log.gets()
    with Meter(server, interval=0.01) as meter:
        seen = bench.drain(server.url + blob.path)
    gets, _ = log.gets()
    check(server, blob)
    return {
        "direct": direct["seconds"],
        "seconds": seen["seconds"],
        "ratio": seen["seconds"] / direct["seconds"],
        "first_byte_ms": 1000 * seen["first_byte"][0] if seen["first_byte"] else None,
        "cpu_per_gb": meter.cpu / (blob.size / GB),
        "peak": meter.peak,
        "gets": gets,
        "errors": seen["errors"],
    }
