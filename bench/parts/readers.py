"""Five hundred readers on one cold blob, and one among them that is very slow: what they cost in memory."""

from statistics import median

from harness.data import Shelf
from harness.figures import GB, MIB, table
from harness.procs import Meter
from harness.servers import AccessLog, check

COMMANDS = ["docker-registry"]


def run(bench):
    readers = 50 if bench.quick else 500
    size = (64 if bench.quick else 1024) * MIB
    shelf = Shelf(bench.dir("shelf"))
    blob = shelf.add(size=size)
    upstream = bench.registry(shelf.storage)
    server = bench.ours(upstream.url)
    bench.settle()
    log = AccessLog(upstream)
    with Meter(server) as meter:
        seen = bench.drain(server.url + blob.path, readers, slow=1024)
    gets, sent = log.gets()
    check(server, blob)
    found = {
        "readers": readers,
        "size": size,
        "gets": gets,
        "moved": sent / size,
        "idle": meter.idle,
        "peak": meter.peak,
        "seconds": seen["seconds"],
        "gb_per_second": seen["bytes"] / GB / seen["seconds"],
        "first_byte_ms": 1000 * median(seen["first_byte"]),
        "whole": seen["answers"],
        "errors": seen["errors"],
        "slow": seen["slow"],
    }
    above = (meter.peak - meter.idle) / MIB
    rows = [
        ["anonymous memory, idle", f"{meter.idle / MIB:.1f} MiB"],
        ["anonymous memory, peak", f"{meter.peak / MIB:.1f} MiB"],
        ["above idle", f"{above:.1f} MiB = {1024 * above / (readers + 1):.0f} KiB a reader"],
        ["upstream GETs", f"{gets}, together {sent / size:.2f} times the blob"],
        ["all but the slow one done, s", f"{seen['seconds']:.1f}"],
        ["together, GB/s", f"{found['gb_per_second']:.2f}"],
        ["median first byte, ms", f"{found['first_byte_ms']:.0f}"],
        ["readers that got all of it", f"{seen['answers']} of {readers}"],
        ["errors", seen["errors"] or "none"],
        ["the reader of 1 KiB/s", f"{seen['slow']['bytes']} bytes, {seen['slow']['error'] or 'still connected'}"],
    ]
    return [table(f"readers: {readers} and one of 1 KiB/s on a cold blob of {size // MIB} MiB", ["what", "seen"], rows)], found
