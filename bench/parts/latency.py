"""An image of many layers behind a round trip that one can feel: real clients, cold and warm, beside a direct pull; what the upstream was asked."""

import json
import os
import shutil
import time
from collections import Counter

from harness.data import Layout
from harness.figures import column, middle, paired, table
from harness.procs import output_of
from harness.servers import asked, free_port

COMMANDS = ["nginx", "podman", "containerd", "ctr", "runc"]
REPO = "bench/image"
KIB = 1024


class Podman:
    """podman with a store, settings and home of its own for every pull."""

    name = "podman"

    def __init__(self, bench):
        self.bench, self.home = bench, bench.dir("home")
        os.makedirs(f"{self.home}/.config/containers")
        self.put(".config/containers/policy.json", json.dumps({"default": [{"type": "insecureAcceptAnything"}]}))
        self.put("registries.conf", "unqualified-search-registries = []\n")
        self.put("containers.conf", '[engine]\nruntime = "runc"\ncgroup_manager = "cgroupfs"\nevents_logger = "none"\n')
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("XDG_", "CONTAINERS_", "REGISTRY_"))}
        self.env = {**clean, "HOME": self.home, "CONTAINERS_CONF": f"{self.home}/containers.conf",
                    "CONTAINERS_REGISTRIES_CONF": f"{self.home}/registries.conf", "STORAGE_DRIVER": "overlay"}

    def put(self, name, text):
        with open(os.path.join(self.home, name), "w", encoding="utf-8") as file:
            file.write(text)

    def pull(self, url):
        """The seconds that a pull into an empty store takes."""
        store = self.bench.dir("s")
        image = f"{url.removeprefix('http://')}/{REPO}:v1"
        command = ["podman", "--root", f"{store}/root", "--runroot", f"{store}/run", "pull", "-q", "--tls-verify=false", image]
        begin = time.monotonic()
        output_of(command, env=self.env)
        seconds = time.monotonic() - begin
        self.bench.unmount(store)
        shutil.rmtree(store)
        return seconds


class Containerd:
    """A containerd with an empty root for every pull, found through hosts.toml and so with `?ns=`."""

    name = "containerd"

    def __init__(self, bench):
        self.bench = bench

    def pull(self, url):
        store = self.bench.dir("c")
        hosts = f"{store}/hosts/bench.test"
        os.makedirs(hosts)
        with open(f"{hosts}/hosts.toml", "w", encoding="utf-8") as file:
            file.write(f'server = "http://127.0.0.1:1"\n[host."{url}"]\ncapabilities = ["pull", "resolve"]\n')
        daemon = self.daemon(store)
        command = ["ctr", "-a", f"{store}/sock", "images", "pull", "--hosts-dir", f"{store}/hosts", "--snapshotter", "overlayfs",
                   f"bench.test/{REPO}:v1"]
        begin = time.monotonic()
        output_of(command)
        seconds = time.monotonic() - begin
        self.bench.stop(daemon)
        self.bench.unmount(store)
        shutil.rmtree(store)
        return seconds

    def daemon(self, store):
        config = f"""version = 2
root = "{store}/root"
state = "{store}/state"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs"]
[grpc]
address = "{store}/sock"
[plugins."io.containerd.internal.v1.opt"]
path = "{store}/opt"
"""
        with open(f"{store}/config.toml", "w", encoding="utf-8") as file:
            file.write(config)
        daemon = self.bench.start("containerd", ["containerd", "--config", f"{store}/config.toml"])
        for _ in range(300):
            try:
                output_of(["ctr", "-a", f"{store}/sock", "version"])
                return daemon
            except RuntimeError:
                time.sleep(0.1)
        raise RuntimeError(f"containerd does not start:\n{daemon.tail()}")


def run(bench):
    layers = 8 if bench.quick else 40
    layout = Layout(bench.dir("layout"))
    layout.add_image("v1", [(4096 if number % 10 == 9 else 256) * KIB for number in range(layers)])
    layout.finish()
    port = free_port()
    upstream = bench.throttled(layout.root, REPO, latency_ms=50, realm=f"http://127.0.0.1:{port}/token")
    door = bench.nginx_door(port, upstream)
    clients = [Podman(bench), Containerd(bench)]
    found = {client.name: {"direct": [], "cold": [], "warm": []} for client in clients}
    for _ in range(bench.rounds):
        for client in clients:
            one_round(bench, door, client, found[client.name])
    rows = [row(client, way, rounds, ways["direct"]) for client, ways in found.items() for way, rounds in ways.items()]
    head = ["client", "pull", "s", "it / direct", "upstream requests", "of these (last round)"]
    return [table(f"latency: image of {layers} layers, 50 ms before each answer of the upstream, token", head, rows)], found


def one_round(bench, door, client, found):
    found["direct"].append(counted(bench, door, client, door))
    server = bench.ours(door.url)
    found["cold"].append(counted(bench, door, client, server))
    found["warm"].append(counted(bench, door, client, server))
    bench.drop(server)


def counted(bench, door, client, server):
    bench.settle()
    asked(door.url + "/bench/reset")
    seconds = client.pull(server.url)
    requests = asked(door.url + "/bench/stats")["requests"]
    kinds = Counter(f"{one['method']} {one['kind']} {one['status']}" for one in requests)
    return {"seconds": seconds, "requests": len(requests), "kinds": dict(sorted(kinds.items()))}


def row(client, way, rounds, direct):
    last = ", ".join(f"{count} {kind}" for kind, count in rounds[-1]["kinds"].items()) or "none"
    seconds = column(rounds, "seconds")
    return [client, way, middle(seconds, 2), paired(seconds, column(direct, "seconds")), middle(column(rounds, "requests"), 0), last]
