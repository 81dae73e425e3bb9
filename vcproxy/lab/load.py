"""A load: requests without pause to a list of targets, from a process of its own, and an account of every one.

    with Load(client, [("tcp", "10.96.0.10", 80)], workers=2) as load:
        ...                       # what must not disturb
    assert load.result.failures == {}

Tests and benchmarks use it where the claim is "not one connection failed": a thread of the test itself would share the
interpreter with what is being tested, and see a few hundred requests where thousands are needed. The process is this
file, run as a script in the place's namespace with the standard library alone; it ends when its standard input closes,
however that came about, and at the latest after `seconds`.

Each request is a new connection (a new source port for UDP): connect, read who answers, reset. What is counted as
failure is everything but an answer, by its errno's name, or "timeout".

Many loads at once share the processor with what they load: `pause` leaves it some.
"""

from __future__ import annotations

import array
import errno
import json
import multiprocessing
import os
import select
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from multiprocessing import Queue
    from multiprocessing.synchronize import Event

    from vcproxy.lab.dial import Place

Target = tuple[str, str, int]
"""Protocol ("tcp" or "udp"), IP address, port."""
Span = tuple[float, float]
"""When something began and ended, by CLOCK_MONOTONIC, which all processes of a machine share."""
DATED = 10_000
"""Failures of a worker whose times are told."""

_LINGER = struct.pack("ii", 1, 0)


@dataclass(frozen=True)
class Result:
    """What became of all requests. `answers`: by the name of the pod; `failures`: by what happened; `first_failures`:
    a few of them as text; `seconds`: how long each answered one took, sorted; `failed`: when failures were under way.
    """

    answers: Mapping[str, int]
    failures: Mapping[str, int]
    first_failures: Sequence[str]
    seconds: Sequence[float] = field(repr=False)
    failed: Sequence[Span] = field(default=(), repr=False)

    @property
    def count(self) -> int:
        """All requests."""
        return sum(self.answers.values()) + sum(self.failures.values())


class Load:
    """See the module. `workers`: processes that dial at the same time; `timeout`: seconds a request may take; `pause`:
    seconds between a worker's requests.
    """

    result: Result

    def __init__(
        self,
        place: Place,
        targets: Sequence[Target],
        *,
        workers: int = 1,
        timeout: float = 2.0,
        seconds: float = 120.0,
        pause: float = 0.0,
    ) -> None:
        from vcproxy.lab import netns

        plan = {"targets": list(targets), "workers": workers, "timeout": timeout, "seconds": seconds, "pause": pause}
        command = [sys.executable, __file__, json.dumps(plan)]
        self._process = netns.spawn(place.ns, command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def finish(self) -> Result:
        """End it, and return what became of all requests."""
        if not hasattr(self, "result"):
            told, _ = self._process.communicate()
            if self._process.returncode:
                raise RuntimeError(f"the load generator ended with {self._process.returncode}")
            found = json.loads(told)
            failed = [(began, ended) for began, ended in found["failed"]]
            self.result = Result(found["answers"], found["failures"], found["first"], sorted(found["seconds"]), failed)
        return self.result

    def __enter__(self) -> Load:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finish()


def _request(target: Target, timeout: float) -> str:
    """The pod that answered. Raises OSError."""
    protocol, address, port = target
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
    with socket.socket(family, kind) as sock:
        sock.settimeout(timeout)
        if protocol == "tcp":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER)
        sock.connect((address, port))
        if protocol == "udp":
            sock.send(b"who?")
        line = sock.recv(4096)
        if not line:
            raise OSError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
        name: str = json.loads(line)["pod"]
        return name


def _work(plan: Mapping[str, Any], until: float, at: int, over: Event, out: Queue[Any]) -> None:
    targets: Sequence[Target] = [tuple(target) for target in plan["targets"]]
    timeout, pause = plan["timeout"], plan["pause"]
    answers: dict[str, int] = {}
    failures: dict[str, int] = {}
    first: list[str] = []
    failed: list[Span] = []
    seconds = array.array("d")
    while time.monotonic() < until and not over.is_set():
        target = targets[at % len(targets)]
        at += 1
        began = time.monotonic()
        try:
            name = _request(target, timeout)
        except OSError as error:
            what = errno.errorcode.get(error.errno or 0, "timeout")
            failures[what] = failures.get(what, 0) + 1
            if len(first) < 5:
                first.append(f"{' '.join(map(str, target))}: {what} at {time.time():.3f}")
            if len(failed) < DATED:
                failed.append((began, time.monotonic()))
        else:
            seconds.append(time.monotonic() - began)
            answers[name] = answers.get(name, 0) + 1
        if pause:
            time.sleep(pause)
    out.put((answers, failures, first, seconds.tolist(), failed))


def main() -> None:
    """The script: a plan as JSON in argv[1], the account as JSON on standard output."""
    plan = json.loads(sys.argv[1])
    context = multiprocessing.get_context("fork")
    over, out = context.Event(), context.Queue()
    until = time.monotonic() + plan["seconds"]
    workers = [
        context.Process(target=_work, args=(plan, until, number, over, out), daemon=True)
        for number in range(plan["workers"])
    ]
    for worker in workers:
        worker.start()
    select.select([sys.stdin], [], [], plan["seconds"])
    over.set()
    total: dict[str, dict[str, int]] = {"answers": {}, "failures": {}}
    first: list[str] = []
    seconds: list[float] = []
    failed: list[Span] = []
    for _ in workers:
        answers, failures, told, took, when = out.get()
        for kind, counts in (("answers", answers), ("failures", failures)):
            for name, count in counts.items():
                total[kind][name] = total[kind].get(name, 0) + count
        first += told
        seconds += took
        failed += when
    for worker in workers:
        worker.join()
    json.dump({**total, "first": first[:10], "seconds": seconds, "failed": failed}, sys.stdout)


if __name__ == "__main__":
    main()
