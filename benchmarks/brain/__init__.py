"""The brain with a thousand tenants. `python -m benchmarks brain`; smaller: `python -m benchmarks.brain --tenants 100`.

The brain is the program itself, configured as operators do. Its peers are processes beside it: the tenants' API servers
(apiservers.py) and the nodes (nodes.py), both as cheap as could be, over real TCP, TLS and HTTP. Floors are measured in
the same run. Processor times are the brain's own, to the nanosecond; memory is what the kernel says of the process.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from rich.table import Table

from benchmarks.brain.objects import READERS, Objects, tenant_name
from benchmarks.brain.processes import Brain, Helper, Scene, cpu
from benchmarks.results import quantile
from vcproxy.kube.decode import ENDPOINT_SLICES, SERVICES, decode_list


class Scale(msgspec.Struct, frozen=True):
    """How much: `runs` of the start, `seconds` of each load, `changes` told to all nodes."""

    tenants: int = 1_000
    services: int = 100
    endpoints: int = 10
    nodes: int = 1_000
    runs: int = 3
    seconds: float = 20.0
    changes: int = 30

    @property
    def total(self) -> int:
        """Endpoints of all tenants."""
        return self.tenants * self.services * self.endpoints


def report(show: Callable[[Any], None], scale: Scale | None = None) -> None:
    """Run everything and show the tables."""
    scale = scale or Scale()
    with tempfile.TemporaryDirectory(prefix="vcproxy-bench-") as folder, ExitStack() as stack:
        directory = Path(folder)
        scene = Scene(directory, scale.tenants, max(scale.nodes, READERS))
        servers = stack.enter_context(Helper("apiservers", directory, scale.tenants))
        nodes = stack.enter_context(Helper("nodes", directory))
        scene.enrol(servers.answer())
        show(starts(scale, scene, servers, nodes, show))
        show(fan_out(scale, scene, servers, nodes))


# --- the start ------------------------------------------------------------------------------------------------------


def starts(scale: Scale, scene: Scene, servers: Helper, nodes: Helper, show: Callable[[Any], None]) -> Table:
    """How long until all tenants are synced, and what it takes; the last of the runs goes on under load."""
    drawn = _table(
        f"start: {scale.tenants:,} tenants of {scale.services} services x {scale.endpoints}",
        ("", "wall", "brain CPU", "peak memory", "memory once settled"),
    )
    servers.ask("objects", 0, scale.endpoints)
    empty: list[_Start] = []
    with scene.brain(0) as brain:
        idle = _started(brain)
    with scene.brain(scale.tenants) as brain:
        empty.append(_started(brain))
    servers.ask("objects", scale.services, scale.endpoints)
    full: list[_Start] = []
    for turn in range(scale.runs):
        with scene.brain(scale.tenants) as brain:
            full.append(_started(brain))
            if turn == scale.runs - 1:
                loads = load(scale, brain, servers, nodes)
    for what, runs in (("no tenant", [idle]), ("tenants that hold nothing", empty), ("all", full)):
        drawn.add_row(what, *(_spread([run[at] for run in runs], unit) for at, unit in enumerate(_UNITS)))
    floor = decoding(scale)
    drawn.add_row("floor: msgspec decodes the same lists", "", _spread(floor, "s"), "", "")
    memory = statistics.median(run.settled for run in full)
    rows = (
        ("a tenant's connections", "KiB a tenant", (empty[0].settled - idle.settled) / scale.tenants * 1024),
        ("content", "B an endpoint", (memory - empty[0].settled) / scale.total * 2**20),
        ("everything", "B an endpoint", memory / scale.total * 2**20),
        ("everything, peak", "B an endpoint", statistics.median(run.peak for run in full) / scale.total * 2**20),
        ("and after nodes have read all", "B an endpoint", loads[0] / scale.total * 2**20),
        ("and after the changes below", "B an endpoint", loads[1] / scale.total * 2**20),
    )
    for what, unit, value in rows:
        drawn.add_row(what, "", "", "", f"{value:,.0f} {unit}")
    show(drawn)
    return loads[2]


class _Start(msgspec.Struct, frozen=True, array_like=True):
    """Seconds and MiB."""

    wall: float
    cpu: float
    peak: float
    settled: float

    def __getitem__(self, at: int) -> float:
        return (self.wall, self.cpu, self.peak, self.settled)[at]


_UNITS = ("s", "s", "MiB", "MiB")


def _started(brain: Brain) -> _Start:
    """Wait until all is synced."""
    loaded = brain.logged("loaded")
    assert loaded["synced"] == loaded["tenants"], loaded
    spent = brain.cpu
    time.sleep(1)
    return _Start(loaded["seconds"], spent, brain.memory("VmHWM"), brain.memory())


def decoding(scale: Scale) -> list[float]:
    """Seconds that decoding all lists takes, and nothing else."""
    objects = Objects(scale.services, scale.endpoints)
    bodies = [
        (resource, objects.listed(resource.path, tenant))
        for tenant in range(min(scale.tenants, 50))
        for resource in (SERVICES, ENDPOINT_SLICES)
    ]
    took = []
    for _ in range(scale.runs):
        began = time.process_time()
        for resource, body in bodies:
            decode_list(resource, body, tenant="", object_bytes=len(body))
        took.append((time.process_time() - began) * scale.tenants / min(scale.tenants, 50))
    return took


# --- changes --------------------------------------------------------------------------------------------------------


def load(scale: Scale, brain: Brain, servers: Helper, nodes: Helper) -> tuple[float, float, Table]:
    """Events at their pace, and one tenant that floods; memory before and after in MiB, and the table."""
    nodes.ask("connect", brain.logged("serving nodes")["port"], READERS, 1)
    before = brain.memory()
    rate = scale.tenants
    drawn = _table(
        f"changes: {rate:,} events/s over all tenants; watch event sent -> delta at its node",
        ("", "events", "deltas", "median", "p99", "worst second's p99", "read p99", "compiled p99", "brain CPU"),
    )
    loads = (
        ("steady", ()),
        ("steady, and one tenant at 10,000/s", (scale.tenants // 2, 10_000)),
        ("steady, again", ()),
    )
    for what, more in loads:
        nodes.ask("forget")
        began = brain.cpu
        sent = servers.ask("steady", rate, scale.seconds, *more)
        time.sleep(0.5)
        spent = brain.cpu - began
        seen = nodes.ask("seen")["deltas"]
        others = [row for row in seen if row[0] != f"dir-{tenant_name(scale.tenants // 2)}"]
        read, compiled, late = (_by_second(others, at) for at in (2, 3, 4))
        drawn.add_row(
            what,
            f"{sent['sent'] + sent['more']:,}",
            f"{len(seen):,}",
            f"{statistics.median(row[4] - row[1] for row in others) * 1e3:.1f} ms",
            f"{statistics.median(late) * 1e3:.1f} ms",
            f"{max(late) * 1e3:.1f} ms",
            f"{statistics.median(read) * 1e3:.1f} ms",
            f"{statistics.median(compiled) * 1e3:.1f} ms",
            f"{spent / sent['seconds']:.0%}",
        )
    after = brain.memory()
    nodes.ask("connect", 0, 0, 0)
    return before, after, drawn


def _by_second(rows: Sequence[Sequence[Any]], at: int) -> list[float]:
    """The 99th percentile of each second's lateness at a stage; rows as nodes.py tells them."""
    seconds: dict[int, list[float]] = {}
    for row in rows:
        seconds.setdefault(int(row[1]), []).append(row[at] - row[1])
    return [quantile(late, 0.99) for late in seconds.values()]


def fan_out(scale: Scale, scene: Scene, servers: Helper, nodes: Helper) -> Table:
    """One change told to all nodes, which all have all of ten tenants; the floors in turns with it."""
    drawn = _table(
        f"one change told to {scale.nodes:,} nodes",
        ("", "connected", "median", "p99", "last", "CPU a stream"),
    )
    servers.ask("objects", scale.services, scale.endpoints)
    with ExitStack() as stack:
        brain = stack.enter_context(scene.brain(min(10, scale.tenants), placed=False))
        brain.logged("loaded")

        def change() -> object:
            return servers.ask("steady", 1, 0.9)

        def connect(acknowledge: bool) -> str:
            began = time.monotonic()
            nodes.ask("connect", brain.logged("serving nodes")["port"], scale.nodes, int(acknowledge))
            return f"{time.monotonic() - began:.1f} s"

        connected = connect(acknowledge=False)
        octets = _told(brain.process.pid, nodes, change).octets
        arms = [("deltas written", connected, brain.process.pid, nodes, change)]
        for how, what in (("grpc", "grpc.aio"), ("tls", "TLS connections")):
            floor = stack.enter_context(Helper("floor", scene.directory, octets, how))
            readers = stack.enter_context(Helper("nodes", scene.directory))
            port = floor.answer()
            readers.ask(*(("connect", port, scale.nodes, 0) if how == "grpc" else ("raw", port, scale.nodes, octets)))
            arms.append(
                (f"floor: {what}, the same octets", "", floor.process.pid, readers, partial(floor.ask, "write"))
            )
        rounds = [[_told(pid, its, tell) for _, _, pid, its, tell in arms] for _ in range(scale.changes)]
        for arm, told in zip(arms, zip(*rounds, strict=True), strict=True):
            _add_fan_out(drawn, arm[0], arm[1], told, scale.nodes)
        connected = connect(acknowledge=True)
        told = [_told(brain.process.pid, nodes, change) for _ in range(scale.changes)]
        _add_fan_out(drawn, "deltas acknowledged, too, as agents do", connected, told, scale.nodes)
        nodes.ask("connect", 0, 0, 0)
    return drawn


class _Told(NamedTuple):
    """One change: how late each node had it, in seconds; processor time that it took; and octets of the message."""

    late: list[float]
    spent: float
    octets: int


def _told(pid: int, nodes: Helper, tell: Callable[[], object]) -> _Told:
    """Of the processor time, what the second before took is left out: pings, timers, watches that are silent.

    `tell` answers when it was told, unless the message says so itself.
    """

    def spent(do: Callable[[], object]) -> tuple[float, Any]:
        began, before = time.monotonic(), cpu(pid)
        answer = do()
        time.sleep(max(0.0, began + 1 - time.monotonic()))
        return cpu(pid) - before, answer

    idle, _ = spent(lambda: None)
    nodes.ask("forget")
    taken, at = spent(tell)
    seen = nodes.ask("seen")
    return _Told([row[4] - (row[1] or at) for row in seen["deltas"]], taken - idle, seen["octets"])


def _add_fan_out(drawn: Table, what: str, connected: str, told: Sequence[_Told], nodes: int) -> None:
    assert all(len(one.late) == nodes for one in told), "a node was not told"
    late = [each for one in told for each in one.late]
    drawn.add_row(
        what,
        connected,
        f"{statistics.median(late) * 1e3:.1f} ms",
        f"{quantile(late, 0.99) * 1e3:.1f} ms",
        f"{statistics.median(max(one.late) for one in told) * 1e3:.1f} ms",
        f"{statistics.median(one.spent for one in told) / nodes * 1e6:.0f} us",
    )


# --- tables ---------------------------------------------------------------------------------------------------------


def _table(title: str, headings: Sequence[str]) -> Table:
    drawn = Table(title=title)
    for heading in headings:
        drawn.add_column(heading, justify="right" if heading else "left")
    return drawn


def _spread(values: Sequence[float], unit: str) -> str:
    """The median, and of several values (max - min) / median."""
    median = statistics.median(values)
    text = f"{median:,.0f} {unit}" if unit == "MiB" else f"{median:,.1f} {unit}"
    return text if len(values) == 1 else f"{text} ({(max(values) - min(values)) / median:.0%})"
