"""Processes that a measurement starts, and what they cost: processor time and anonymous memory of the whole tree, from /proc."""

import os
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request

TICKS = os.sysconf("SC_CLK_TCK")


class Process:
    """A started program. Its log is a file; it is ended by its own pid only."""

    def __init__(self, name, command, log, url=None, env=None):
        self.name, self.log, self.url = name, log, url
        with open(log, "ab") as out:
            self.popen = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=env, start_new_session=True
            )
        self.pid = self.popen.pid

    def wait_for_answer(self, seconds=30):
        """Returns once the URL answers, with any status."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if self.popen.poll() is not None:
                break
            if answers(self.url):
                return
            time.sleep(0.05)
        raise RuntimeError(f"{self.name} does not answer at {self.url}:\n{self.tail()}")

    def tail(self, lines=15):
        with open(self.log, encoding="utf-8", errors="replace") as log:
            return "".join(log.readlines()[-lines:])

    def stop(self):
        """SIGTERM, and SIGKILL after 20 s."""
        if self.popen.poll() is None:
            self.popen.send_signal(signal.SIGTERM)
            try:
                self.popen.wait(20)
            except subprocess.TimeoutExpired:
                self.popen.kill()
                self.popen.wait()

    def tree(self):
        """Its pid and those of its children, however deep."""
        children = {}
        for pid in filter(str.isdigit, os.listdir("/proc")):
            stat = stat_of(pid)
            if stat:
                children.setdefault(int(stat[1]), []).append(int(pid))
        found, left = [], [self.pid]
        while left:
            pid = left.pop()
            found.append(pid)
            left.extend(children.get(pid, []))
        return found


class Meter:
    """What a server's process tree used while the block ran. `cpu` also holds the work that it finished afterwards, off its clients' path."""

    def __init__(self, process, interval=0.05):
        self.process, self.interval = process, interval
        self.cpu = self.peak = 0

    def __enter__(self):
        self.pids = self.process.tree()
        self.before, self.idle = cpu_of(self.pids), anon_of(self.pids)
        self.peak, self.over = self.idle, threading.Event()
        self.sampler = threading.Thread(target=self.sample, daemon=True)
        self.sampler.start()
        return self

    def sample(self):
        while not self.over.wait(self.interval):
            self.peak = max(self.peak, anon_of(self.pids))

    def __exit__(self, *_):
        self.cpu = settled_cpu(self.pids) - self.before
        self.over.set()
        self.sampler.join()
        self.peak = max(self.peak, anon_of(self.pids))


def answers(url):
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            answer.read()
    except urllib.error.HTTPError as error:
        error.close()
    except OSError:
        return False
    return True


def stat_of(pid):
    """The fields of /proc/PID/stat after the command's name: state, parent, ..."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()
    except OSError:
        return None


def cpu_of(pids):
    """Seconds of processor time, reaped children included."""
    fields = (stat_of(pid) for pid in pids)
    return sum(sum(map(int, stat[11:15])) for stat in fields if stat) / TICKS


def settled_cpu(pids, quiet=0.4, limit=10):
    """The same, once it has not moved for a moment."""
    seen, since, end = cpu_of(pids), time.monotonic(), time.monotonic() + limit
    while time.monotonic() - since < quiet and time.monotonic() < end:
        time.sleep(0.05)
        now = cpu_of(pids)
        if now > seen + 0.011:
            seen, since = now, time.monotonic()
    return cpu_of(pids)


def anon_of(pids):
    """Bytes of anonymous memory."""
    total = 0
    for pid in pids:
        try:
            with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as file:
                total += sum(int(line.split()[1]) << 10 for line in file if line.startswith("RssAnon"))
        except OSError:
            pass
    return total


def output_of(command, **more):
    """A command's output; it has to succeed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, **more)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: status {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout
