"""A list in pages, and as the beginning of a watch (WatchList), from a real kube-apiserver: what each costs both sides.

Objects are put into etcd, Services and slices of ten endpoints as in benchmarks/brain, more at every step. A process
of its own then does what a Reflector does to follow them: lists, and has its watch accepted; RUNS times each way, in
turns. Printed are medians: of that process the processor time of this, and by how much its memory grew at most; of the
API server the same.
"""

import asyncio
import base64
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any
from urllib.request import Request, urlopen

import uvloop

from benchmarks.brain.objects import stored_service, stored_slice
from benchmarks.brain.processes import cpu
from e2e.controlplane import ControlPlane
from vcproxy.kube.client import Client
from vcproxy.kube.decode import ENDPOINT_SLICES, SERVICES
from vcproxy.kube.errors import Unreachable
from vcproxy.kube.kubeconfig import load_kubeconfig
from vcproxy.kube.reflector import Broken, Event, Listed, Recovered, Reflector

COUNTS = (100, 1_000, 10_000, 50_000)
RUNS = 5
KINDS = {"Service": SERVICES, "EndpointSlice": ENDPOINT_SLICES}
WAYS = {"pages": False, "stream": True}


def report(say: Callable[[str], None]) -> None:
    """Measure, and print."""
    with tempfile.TemporaryDirectory() as directory, ControlPlane("lists", Path(directory)) as plane:
        entries = _entries()
        count = 0
        for wanted in COUNTS:
            _put(plane, islice(entries, 2 * (wanted - count)))
            count = wanted
            for kind in KINDS:
                runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
                for _ in range(RUNS):
                    for way, results in runs.items():
                        results.append(_run(plane, kind, way))
                for way, results in runs.items():
                    assert {each["objects"] for each in results} == {count + 1}  # and those of `kubernetes`
                    say(f"{count:6} {kind + 's':14} {way:6} {_words(results)}")


async def follow(kubeconfig: Path, kind: str, way: str) -> dict[str, float]:
    """List, and watch."""
    result: dict[str, float] = {}
    done = asyncio.Event()
    before, began, began_at = _peak(), time.process_time(), time.monotonic()

    def take(event: Event[Any]) -> None:
        if isinstance(event, Listed):
            result["objects"] = len(event.objects)
        elif isinstance(event, Recovered):  # a watch was accepted
            result.update(cpu=time.process_time() - began, wall=time.monotonic() - began_at, memory=_peak() - before)
            done.set()

    async with Client(load_kubeconfig(kubeconfig.read_bytes()), tenant="t") as client, asyncio.TaskGroup() as group:
        reflector = Reflector(client, KINDS[kind], take, stream=WAYS[way])
        reflector.broken = Broken(Unreachable(tenant="t", path="", message=""), 0.0)  # so that it tells of the watch
        task = group.create_task(reflector.run())
        await done.wait()
        task.cancel()
    return result


def _run(plane: ControlPlane, kind: str, way: str) -> dict[str, float]:
    pid = plane.pids["kube-apiserver"]
    time.sleep(1)  # what the last one left to do
    Path(f"/proc/{pid}/clear_refs").write_text("5")  # VmHWM starts anew
    before, spent = _status(pid, "VmRSS"), cpu(pid)
    argv = [sys.executable, "-m", "benchmarks.lists", str(plane.kubeconfig), kind, way]
    result: dict[str, float] = json.loads(subprocess.run(argv, check=True, stdout=subprocess.PIPE).stdout)
    return {**result, "server cpu": cpu(pid) - spent, "server memory": _status(pid, "VmHWM") - before}


def _words(results: list[dict[str, float]]) -> str:
    found = {name: median(each[name] for each in results) for name in results[0]}
    return (
        f"client {found['cpu'] * 1e3:6.0f} ms {found['memory'] / 1e6:6.1f} MB, after {found['wall'] * 1e3:6.0f} ms; "
        f"API server {found['server cpu'] * 1e3:6.0f} ms {found['server memory'] / 1e6:6.1f} MB"
    )


def _put(plane: ControlPlane, entries: Iterator[tuple[str, dict[str, Any]]]) -> None:
    """Into its etcd."""
    while batch := list(islice(entries, 100)):
        pairs = [{"key": _base64(key.encode()), "value": _base64(json.dumps(value).encode())} for key, value in batch]
        order = json.dumps({"success": [{"requestPut": pair} for pair in pairs]}).encode()
        with urlopen(Request(f"{plane.etcd_url}/v3/kv/txn", order)) as answer:
            answer.read()


def _entries() -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    while True:
        service, found = stored_service(number), stored_slice(number)
        yield f"/registry/services/specs/default/{service['metadata']['name']}", service
        yield f"/registry/endpointslices/default/{found['metadata']['name']}", found
        number += 1


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _status(pid: int, field: str) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(float(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


if __name__ == "__main__":
    print(json.dumps(uvloop.run(follow(Path(sys.argv[1]), sys.argv[2], sys.argv[3]))))
