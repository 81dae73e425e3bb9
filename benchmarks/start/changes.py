"""Changes beside a full API server: one at a time, and a hundred a second.

How late a change is, packets tell: the clock runs from the API server's answer to the write until a new connection to
the probe's ClusterIP is answered by the new endpoint. Beside it, in the same changes, the floor: a bare watch of the
probe's slice, which no proxy that watches can beat.
"""

import json
import subprocess
import sys
import time

from benchmarks import results
from benchmarks.end_to_end import Watch
from benchmarks.start.proxies import settle
from benchmarks.start.scene import PROBE, PROBE_VIP, Scene, cpu, dial_until
from e2e.processes import Process

WARM_UP = 20
RATE = 100
_IDLE = 5.0
_LATEST = 600.0


def one_by_one(scene: Scene, process: Process, count: int, pause: float) -> results.Document:
    """So many changes, each after a pause in which the proxy rests: lateness, and processor time of a change beyond
    what the proxy takes while nothing changes."""
    for turn in range(WARM_UP):
        _moved(scene, process, turn, pause, 1.5 * pause)
    settle(process)
    spent = cpu(process.pid)
    time.sleep(_IDLE)
    idle = (cpu(process.pid) - spent) / _IDLE
    watch = Watch(scene.plane, PROBE)
    late, floor = [], []
    spent, began = cpu(process.pid), time.monotonic()
    for turn in range(WARM_UP, WARM_UP + count):
        answered, seen = _moved(scene, process, turn, pause, 1.5 * pause)
        late.append(seen - answered)
        floor.append(watch.next() - (time.time() - (time.monotonic() - answered)))
    beyond = cpu(process.pid) - spent - idle * (time.monotonic() - began)
    watch.close()
    return {
        **results.quantiles(late),
        "cpu": beyond / count,
        "idle": idle,
        "pause": pause,
        "floor": results.quantiles(floor),
    }


def _moved(scene: Scene, process: Process, turn: int, least: float, most: float) -> tuple[float, float]:
    """Move the probe after a pause; monotonic times of the API server's answer and of the endpoint's."""
    time.sleep(scene.chance.uniform(least, most))
    answer, pod = scene.move_probe(turn)
    wanted = f'"{pod.name}"'.encode()
    return answer.answered, dial_until(scene, PROBE_VIP, wanted, timeout=1, within=_LATEST, check=process.check)


def steady(scene: Scene, process: Process, seconds: float, period: float) -> results.Document:
    """A hundred slices a second are rewritten by a process beside this one, and the probe's moves among them.

    A proxy that works once a `period` is asked at any time of it: one that was asked always right after it had worked
    would seem slower than it is."""
    words = (scene.plane.kubeconfig, scene.services, scene.endpoints, RATE, seconds)
    argv = [sys.executable, "-m", "benchmarks.start.writer", *map(str, words)]
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        try:
            writer.stdout.readline()  # it begins
            spent, began, late = cpu(process.pid), time.monotonic(), []
            while time.monotonic() < began + seconds:
                answered, seen = _moved(scene, process, len(late), 0, period)
                late.append(seen - answered)
            share = (cpu(process.pid) - spent) / (time.monotonic() - began)
            told = json.loads(writer.communicate()[0])
        finally:
            writer.kill()
    return {**results.quantiles(late), "cpu": share, "rate": told["changes"] / told["seconds"], "seconds": seconds}
