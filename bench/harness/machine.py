"""The machine: what it is, what it lacks, whether it is quiet, and the programs that are measured."""

import os
import platform
import shutil
import subprocess
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
PACKAGES = {
    "nginx": "nginx-light",
    "docker-registry": "docker-registry",
    "wrk": "wrk",
    "podman": "podman",
    "ctr": "containerd",
    "containerd": "containerd",
    "runc": "runc",
}


def install(commands):
    """Debian's packages for the commands that are missing."""
    missing = sorted({PACKAGES[command] for command in commands if not shutil.which(command)})
    if not missing:
        return
    print(f"-- installing {' '.join(missing)}", flush=True)
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    subprocess.run(["apt-get", "update", "-qq"], check=True, env=env)
    subprocess.run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", *missing], check=True, env=env)


def build():
    """The folder with the release binaries; BENCH_BIN_DIR names one and then nothing is built."""
    if "BENCH_BIN_DIR" in os.environ:
        return os.environ["BENCH_BIN_DIR"]
    subprocess.run(["cargo", "build", "--release", "--workspace", "--bins"], check=True, cwd=ROOT)
    return os.path.join(os.environ.get("CARGO_TARGET_DIR", os.path.join(ROOT, "target")), "release")


def describe():
    """What stands above every result."""
    return {
        "date": time.strftime("%Y-%m-%d %H:%M %z"),
        "processor": f"{first_of('/proc/cpuinfo', 'model name')}, {os.cpu_count()} cores",
        "memory": f"{int(first_of('/proc/meminfo', 'MemTotal').split()[0]) >> 20} GiB",
        "kernel": f"{platform.system()} {platform.release()}",
        "load": "load average {:.1f} at the start".format(os.getloadavg()[0]),
        "versions": ", ".join(filter(None, map(version, (["nginx", "-v"], ["docker-registry", "--version"],
                                                           ["podman", "--version"], ["containerd", "--version"])))),
    }


def first_of(path, name):
    with open(path, encoding="ascii", errors="replace") as file:
        return next((line.partition(":")[2].strip() for line in file if line.startswith(name)), "?")


def version(command):
    if not shutil.which(command[0]):
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return (done.stdout or done.stderr).strip().replace("github.com/", "")


def busy():
    """The share of processor time that others used during one second."""
    before = times()
    time.sleep(1)
    total, idle = (after - earlier for after, earlier in zip(times(), before))
    return 1 - idle / max(total, 1)


def times():
    with open("/proc/stat", encoding="ascii") as file:
        values = list(map(int, file.readline().split()[1:9]))
    return sum(values), values[3] + values[4]
