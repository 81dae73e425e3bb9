"""The two proxies as processes on the node, one after the other: begun anew each time, and watched.

`vcproxy run` is brain and agent in one process. kube-proxy runs nft for each sync: its processor time is counted with
its own, its memory is told apart.
"""

import http.client
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from benchmarks import machine
from benchmarks.start.scene import Scene, cpu, dial_until
from e2e import churn, nodes
from e2e.polling import eventually
from e2e.processes import Process
from e2e.watching import Watcher
from vcproxy.lab import netns

VCPROXY, KUBE_PROXY, EAGER = "vcproxy", "kube-proxy", "kube-proxy-1ns"
NAMES = (VCPROXY, KUBE_PROXY, EAGER)
METRICS = 10249
_TABLES = (("inet", "vcproxy"), ("ip", "kube-proxy"), ("ip6", "kube-proxy"))
_ADOPTED = b'"event":"started"'
_START_WITHIN = 3600.0
_FULL = re.compile(r'^kubeproxy_sync_full_proxy_rules_duration_seconds_(sum|count)\{ip_family="IPv4"\} (\S+)$', re.M)


def command(name: str, scene: Scene, directory: Path) -> list[str]:
    """How a proxy is started, with a state directory that is empty."""
    if name != VCPROXY:
        return churn.kube_proxy(scene.plane, scene.node, directory, min_sync_period="1ns" if name == EAGER else "1s")
    places = (f"--state-directory={directory}/state", f"--runtime-directory={directory}/run")
    flags = ("--hostname-override=one", "--logging-format=json", f"--cluster-cidr={churn.CLUSTER_CIDR}")
    kubeconfig = f"--kubeconfig={scene.plane.kubeconfig}"
    return [sys.executable, "-m", "vcproxy", "run", kubeconfig, *places, *flags]


@contextmanager
def started(name: str, scene: Scene, directory: Path) -> Iterator[tuple[Process, dict[str, float]]]:
    """Start it on a node without rules, until the sampled Services all answer and it rests; end it, and clean up.

    Figures: `seconds` and `cpu` until they answered, `settled_cpu` until it rests, in seconds; `memory` and
    `child_memory`, the peaks until then, in MiB; `full_sync` of a kube-proxy."""
    for folder in ("state", "run"):
        shutil.rmtree(directory / folder, ignore_errors=True)
    process = nodes.daemon(scene.node, name, command(name, scene, directory), directory)
    began = time.monotonic()
    process.start()
    try:
        with Children(process.pid) as children:
            ended = max(
                dial_until(scene, vip, b"pod", timeout=0.01, within=_START_WITHIN, check=process.check)
                for vip in scene.sample
            )
            figures = {"seconds": ended - began, "cpu": cpu(process.pid)}
            if name != VCPROXY:
                figures["full_sync"] = full_sync(scene)
            settle(process)
        figures["settled_cpu"] = cpu(process.pid)
        figures |= {"memory": churn.peak_memory(process.pid), "child_memory": children.peak}
        yield process, figures
    finally:
        process.terminate()
        process.wait(grace=60)
        clean(scene)


def restarted(scene: Scene, process: Process) -> dict[str, float]:
    """vcproxy ends, and starts again over the table and the state that it leaves: seconds until all is adopted, and
    elements that were written until then and until it rests."""
    process.terminate()
    process.wait(grace=60)
    told = process.log.stat().st_size
    with Watcher(scene.node) as watcher:
        began = time.monotonic()
        process.start()

        def adopted() -> bool:
            process.check()
            return _ADOPTED in process.log.read_bytes()[told:]

        eventually(adopted, within=900, every=0.005, what="the last good state is adopted")
        seconds = time.monotonic() - began
        written = len(watcher.heard())
        settle(process)
        written_later = len(watcher.heard())
    return {"seconds": seconds, "elements": written, "elements_later": written_later}


def clean(scene: Scene) -> None:
    """A node without rules and connections, and a machine that rests."""
    for family, table in _TABLES:
        scene.node.run(["nft", "delete", "table", family, table], check=False, timeout=900)
    scene.node.run(["conntrack", "-F"])
    machine.rest()


def settle(process: Process) -> None:
    """Wait until the proxy rests."""

    def rests() -> bool:
        process.check()
        spent = cpu(process.pid)
        time.sleep(1)
        return cpu(process.pid) - spent < 0.05

    eventually(rests, within=_START_WITHIN, what=f"{process.name} rests")


def full_sync(scene: Scene) -> float:
    """Seconds of kube-proxy's first full sync of IPv4, as it tells them itself right after its rules are there."""

    def told() -> float:
        with netns.entered(scene.node.ns):
            connection = http.client.HTTPConnection("127.0.0.1", METRICS, timeout=10)
            connection.request("GET", "/metrics")
            text = connection.getresponse().read().decode()
            connection.close()
        found = {kind: float(value) for kind, value in _FULL.findall(text)}
        return found["sum"] / found["count"] if found.get("count") else 0.0

    return eventually(told, within=60, what="kube-proxy tells of its first full sync")


class Children:
    """The largest resident size that any nft run by a process has had, in MiB, looked at twenty times a second."""

    def __init__(self, pid: int) -> None:
        self.peak = 0.0
        self._pid, self._over = pid, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Children":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.05):
            # A child belongs to the thread that made it.
            for file in Path(f"/proc/{self._pid}/task").glob("*/children"):
                with suppress(OSError):  # a child or a thread has ended
                    for child in file.read_text().split():
                        # Before it has become nft it has the memory of who made it.
                        if Path(f"/proc/{child}/comm").read_text() == "nft\n":
                            self.peak = max(self.peak, churn.peak_memory(int(child)))
