"""The contenders and their upstreams, each with the settings that it is measured with. All listen on loopback, below one work folder."""

import hashlib
import json
import os
import random
import re
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.request

from harness.data import MANIFEST_TYPE
from harness.procs import Process, output_of

OURS = "oci-remote-cache"
NGINX_CACHE = "nginx proxy_cache"
NGINX_STATIC = "nginx static"
NGINX_LOGGING = "nginx static, access log"
REGISTRY_PROXY = "docker-registry proxy"

NGINX = """
daemon off; user root; worker_processes 2; pid {dir}/pid; error_log stderr warn;
events {{ worker_connections 4096; }}
http {{
  access_log {access_log}; sendfile on; tcp_nopush on; sendfile_max_chunk 2m; keepalive_requests 100000000;
  open_file_cache max=1000 inactive=60s;
  client_body_temp_path {dir}/body; proxy_temp_path {dir}/proxy; fastcgi_temp_path {dir}/fcgi;
  uwsgi_temp_path {dir}/uwsgi; scgi_temp_path {dir}/scgi;
{http}
}}
"""

# A lock that lasts as long as the slowest storm: with the default of 5 s nginx lets everyone through after that.
NGINX_CACHE_HTTP = """
  proxy_cache_path {dir}/cache levels=1:2 keys_zone=blobs:10m max_size=50g inactive=1d use_temp_path=off;
  server {{
    listen 127.0.0.1:{port} reuseport;
    location / {{
      proxy_pass {upstream}; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_cache blobs; proxy_cache_key $uri; proxy_cache_valid 200 1d;
      proxy_cache_lock on; proxy_cache_lock_timeout 300s; proxy_cache_lock_age 300s;
    }}
  }}
"""

NGINX_STATIC_HTTP = """
  server {{ listen 127.0.0.1:{port} reuseport; root {root}; }}
"""

# Only refuses what is not HTTP, as real registries do at once: podman tries TLS first, and the test bed's server waits for more of it.
NGINX_DOOR_HTTP = """
  upstream behind {{ server {behind}; keepalive 64; }}
  server {{
    listen 127.0.0.1:{port};
    location / {{
      proxy_pass http://behind; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_set_header Host $http_host;
    }}
  }}
"""

REGISTRY = """
version: 0.1
log: {{ level: error, accesslog: {{ disabled: {quiet} }} }}
storage:
  cache: {{ blobdescriptor: inmemory }}
  filesystem: {{ rootdirectory: {storage} }}
  maintenance: {{ uploadpurging: {{ enabled: false }} }}
http: {{ addr: "127.0.0.1:{port}", secret: bench }}
{more}
"""


class Bench:
    """One run: its work folder, its programs, everything that it started."""

    def __init__(self, quick, rounds, binaries):
        self.quick, self.rounds, self.bin = quick, rounds, binaries
        self.work = tempfile.mkdtemp(prefix="orc-bench.", dir=os.environ.get("BENCH_TMPDIR", "/tmp"))
        self.processes = []

    def dir(self, name):
        """A new folder."""
        return tempfile.mkdtemp(prefix=f"{name}.", dir=self.work)

    def start(self, name, command, url=None, env=None):
        process = Process(name, command, os.path.join(self.work, f"{name.replace(' ', '-')}.log"), url, env)
        self.processes.append(process)
        if url:
            process.wait_for_answer()
        return process

    def stop(self, process):
        process.stop()
        self.processes.remove(process)

    def settle(self):
        """What was written before is on disk and does not disturb what is measured next."""
        os.sync()
        time.sleep(0.1 if self.quick else 0.5)

    def end(self):
        """Stops what runs, takes its mounts away, removes the folder."""
        for process in reversed(self.processes):
            process.stop()
        self.processes.clear()
        self.unmount(self.work)
        shutil.rmtree(self.work, ignore_errors=True)

    def unmount(self, below):
        with open("/proc/self/mounts", encoding="utf-8") as file:
            mounts = [line.split()[1] for line in file]
        for mount in sorted((m for m in mounts if m.startswith(below + "/")), reverse=True):
            subprocess.run(["umount", "-l", mount], check=False)

    def registry(self, storage):
        """An upstream: docker-registry over a folder, with a log of its requests."""
        return self.docker_registry("upstream", storage, "false", "")

    def registry_proxy(self, upstream):
        """docker-registry as a pull-through cache."""
        more = f"proxy: {{ remoteurl: {upstream.url} }}"
        return self.docker_registry(REGISTRY_PROXY, self.dir("registry-proxy"), "true", more)

    def docker_registry(self, name, storage, quiet, more):
        port = free_port()
        config = REGISTRY.format(port=port, storage=storage, quiet=quiet, more=more)
        file = self.write(f"{name}.yml", config)
        return self.served(name, port, ["docker-registry", "serve", file])

    def nginx(self, name, http, port=None, access_log="off", **more):
        port, folder = port or free_port(), self.dir("nginx")
        http = http.format(dir=folder, port=port, **more)
        file = self.write(f"{name}.conf", NGINX.format(dir=folder, http=http, access_log=access_log))
        return self.served(name, port, ["nginx", "-p", folder, "-c", file])

    def nginx_cache(self, upstream):
        return self.nginx(NGINX_CACHE, NGINX_CACHE_HTTP, upstream=upstream.url)

    def nginx_static(self, root):
        return self.nginx(NGINX_STATIC, NGINX_STATIC_HTTP, root=root)

    def nginx_logging(self, root):
        """With a line for each request, as ours writes one."""
        return self.nginx(NGINX_LOGGING, NGINX_STATIC_HTTP, access_log=os.path.join(self.work, "nginx-access.log"), root=root)

    def nginx_door(self, port, behind):
        return self.nginx("door", NGINX_DOOR_HTTP, port, behind=behind.url.removeprefix("http://"))

    def ours(self, upstream_url, keys="", top=""):
        """The cache with an empty folder; `top` and `keys` are further lines of the configuration and of the upstream's section. None when it
        does not know one of them."""
        port, folder = free_port(), self.dir("cache")
        config = f"""listen = "127.0.0.1:{port}"
admin_listen = "127.0.0.1:{free_port()}"
cache_dir = "{folder}"
default_upstream = "bench.test"
{top}
[upstreams."bench.test"]
url = "{upstream_url}"
tag_ttl = "10m"
{keys}
"""
        file = self.write(f"{os.path.basename(folder)}.toml", config)
        binary = os.path.join(self.bin, OURS)
        if subprocess.run([binary, "config", "check", "--config", file], capture_output=True, check=False).returncode:
            return None
        process = self.served(OURS, port, [binary, "serve", "--config", file], "/healthz")
        process.folder = folder
        return process

    def drop(self, process):
        """Stops one of ours and removes its folder."""
        self.stop(process)
        shutil.rmtree(process.folder)

    def throttled(self, layout, repo, **options):
        """The test bed's registry: rate, latency_ms, realm."""
        command = [os.path.join(self.bin, "throttled"), "--layout", layout, "--repo", repo]
        for name, value in options.items():
            command += [f"--{name.replace('_', '-')}", str(value)]
        process = self.start(f"throttled-{repo.replace('/', '-')}-{len(self.processes)}", command)
        process.url = first_line(process)
        return process

    def served(self, name, port, command, path="/v2/"):
        url = f"http://127.0.0.1:{port}"
        process = self.start(name, command, url + path)
        process.url = url
        return process

    def write(self, name, text):
        path = os.path.join(self.work, name.replace(" ", "-"))
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
        return path

    def drain(self, url, connections=1, seconds=None, slow=None):
        """Downloads and drops; what the load client saw."""
        command = [os.path.join(self.bin, "drain"), "--url", url, "--connections", str(connections)]
        command += ["--seconds", str(seconds)] if seconds else []
        command += ["--slow", str(slow)] if slow else []
        return json.loads(output_of(command))


def first_line(process):
    """Waits for a program to say where it listens."""
    for _ in range(6000):
        with open(process.log, encoding="utf-8") as log:
            line = log.readline()
        if line.endswith("\n"):
            return line.strip()
        if process.popen.poll() is not None:
            break
        time.sleep(0.02)
    raise RuntimeError(f"{process.name} did not start: {process.tail()}")


class AccessLog:
    """What an upstream was asked since the last look: blobs only."""

    LINE = re.compile(r'"(GET|HEAD) (\S+/blobs/\S+) HTTP/1\.1" (\d+) (\d+)')

    def __init__(self, process):
        self.file, self.at = process.log, os.path.getsize(process.log)

    def gets(self):
        """The number of GETs and the bytes that they moved; lines are written when an answer ends, so wait for the last one."""
        time.sleep(0.3)
        with open(self.file, encoding="utf-8", errors="replace") as log:
            log.seek(self.at)
            found = self.LINE.findall(log.read())
            self.at = log.tell()
        gets = [int(sent) for method, _, _, sent in found if method == "GET"]
        return len(gets), sum(gets)


def check(server, blob, path=None):
    """A whole download, hashed, as the load client does not look at what it gets."""
    if sha256_of(server.url + (path or blob.path)) != blob.hex:
        raise RuntimeError(f"{server.name} serves wrong bytes of {blob.digest}")


def sha256_of(url):
    hasher = hashlib.sha256()
    request = urllib.request.Request(url, headers={"Accept": f"{MANIFEST_TYPE}, */*"})
    with urllib.request.urlopen(request, timeout=300) as answer:
        while part := answer.read(1 << 20):
            hasher.update(part)
    return hasher.hexdigest()


def asked(url):
    with urllib.request.urlopen(url, timeout=30) as answer:
        return json.load(answer)


def free_port():
    """Below the range that the kernel gives to outgoing connections."""
    while True:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", random.randrange(20000, 32000)))
                return probe.getsockname()[1]
            except OSError:
                continue
