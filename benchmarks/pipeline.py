"""Every stage of a first load and of one changed endpoint, beside the kernel's floor. `python -m benchmarks pipeline`.

The floor is the very transactions that the backend committed, sent again pre-built to a fresh table: what the kernel
takes when nobody has to think. Medians of RUNS runs; the spread is (max - min) / median.
"""

import gc
import resource
import statistics
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
from rich.table import Table

from vcproxy.backend.protocol import Attachments, TenantUpdate
from vcproxy.brain.compiler import Compiler
from vcproxy.brain.guard import UNRESTRICTED
from vcproxy.brain.store import Store
from vcproxy.kube import shapes
from vcproxy.lab import netns
from vcproxy.model.services import ServicePort
from vcproxy.model.tenant import Tenant, TenantModel
from vcproxy.node.localpolicy import local_ports
from vcproxy.node.resolver import NodeView, resolve
from vcproxy.pb import convert
from vcproxy.pb.distribution_pb2 import BrainMessage
from vcproxy.pb.model_pb2 import ServicePorts
from vcproxy_nftables import NftablesBackend
from vcproxy_nftables.netlink import Batch, Nfnetlink

RUNS = 3
CHANGES = 200
UID = "dir-bench"
NAMESPACE = "vcp-bench"
"""A network namespace of this benchmark's own."""


def objects(services: int, endpoints: int) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """A Service and its slice, as an API server would send them."""
    for number in range(services):
        name, vip = f"svc-{number}", f"10.{32 + (number >> 16)}.{number >> 8 & 255}.{number & 255}"
        yield service(name, vip), endpoint_slice(name, [endpoint(number, index) for index in range(endpoints)])


def service(name: str, vip: str) -> dict[str, Any]:
    """A ClusterIP Service with one TCP port."""
    return {
        "metadata": {"name": name, "namespace": "default", "uid": name, "resourceVersion": "1"},
        "spec": {
            "type": "ClusterIP",
            "clusterIP": vip,
            "clusterIPs": [vip],
            "ipFamilies": ["IPv4"],
            "ports": [{"name": "http", "protocol": "TCP", "port": 80}],
        },
    }


def endpoint(number: int, index: int) -> dict[str, Any]:
    """One ready endpoint."""
    host = number * 16 + index
    return {
        "addresses": [f"10.{128 + (host >> 16 & 63)}.{host >> 8 & 255}.{host & 255}"],
        "conditions": {"ready": True, "serving": True, "terminating": False},
        "nodeName": f"node-{host % 100}",
    }


def endpoint_slice(owner: str, endpoints: list[dict[str, Any]]) -> dict[str, Any]:
    """The Service's only slice."""
    return {
        "metadata": {
            "name": f"{owner}-x",
            "namespace": "default",
            "uid": f"{owner}-x",
            "resourceVersion": "1",
            "labels": {"kubernetes.io/service-name": owner},
        },
        "addressType": "IPv4",
        "ports": [{"name": "http", "protocol": "TCP", "port": 8080}],
        "endpoints": endpoints,
    }


class Stages:
    """Seconds by stage, one list a stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the time of the body to a stage."""
        started = time.perf_counter()
        yield
        self.seconds.setdefault(stage, []).append(time.perf_counter() - started)


def first_load(stages: Stages, services: int, endpoints: int) -> dict[str, Any]:
    """One first load through all stages, then CHANGES single-endpoint changes. Returns sizes."""
    decoded = [
        (msgspec.convert(a, shapes.Service), msgspec.convert(b, shapes.EndpointSlice))
        for a, b in objects(services, endpoints)
    ]
    gc.collect()
    store = Store()
    store.add_tenant(Tenant(UID, "bench"))
    compiler = Compiler(UNRESTRICTED)
    with stages.timed("brain: compile and store"):
        for found, its_slice in decoded:
            compiler.put(found)
            compiler.put(its_slice)
        compiler.listed("Service")
        compiler.listed("EndpointSlice")
        change = compiler.flush()
        store.update(UID, change.put, change.removed)
    del decoded
    store.set_synced(UID)
    stored = store.tenants()[UID]
    with stages.timed("brain: encode snapshot"):
        snapshot = stored.snapshot()
        parts = [snapshot.part(index) for index in range(len(snapshot))]
    with stages.timed("node: decode and verify"):
        model = TenantModel(decode(parts))
    assert model.digest == stored.model.digest
    with stages.timed("node: resolve"):
        forwarded = resolve(list(model), NodeView.of("node-1"))
        local_ports(list(model), NodeView.of("node-1").node_id)
    netns.create(NAMESPACE)
    try:
        with netns.entered(NAMESPACE):
            backend, sent = program(stages, forwarded)
            backend.close()
            backend = restart(stages, forwarded)
            one_endpoint(stages, backend, store, compiler, model, services, endpoints)
            backend.close()
    finally:
        netns.delete(NAMESPACE)
    netns.create(NAMESPACE)
    try:
        with netns.entered(NAMESPACE):
            floor(stages, sent)
    finally:
        netns.delete(NAMESPACE)
    return {"wire MB": sum(map(len, parts)) / 1e6, "kernel elements": sum(map(len, sent))}


def decode(parts: list[bytes]) -> Iterator[ServicePort]:
    """What a node does with the parts of a snapshot."""
    for part in parts:
        message = BrainMessage.FromString(part).snapshot
        body = zlib.decompress(message.ports) if message.encoding else message.ports
        for port in ServicePorts.FromString(body).ports:
            yield convert.decode_port(UID, port)


def program(stages: Stages, forwarded: list[Any]) -> tuple[NftablesBackend, list[Batch]]:
    """Plan, encode and commit; returns the backend and the transactions."""
    backend = NftablesBackend({})
    backend.open()
    backend.attach(Attachments(interfaces={"vx-bench": UID}))
    sent, commit, kernel = [], Nfnetlink.commit, 0.0

    def recorded(self: Nfnetlink, batch: Batch, **options: Any) -> None:
        nonlocal kernel
        started = time.perf_counter()
        commit(self, batch, **options)
        kernel += time.perf_counter() - started
        sent.append(batch)

    Nfnetlink.commit = recorded  # type: ignore[method-assign]
    try:
        started = time.perf_counter()
        backend.apply(TenantUpdate(UID, put=tuple(forwarded), complete=True))
        total = time.perf_counter() - started
    finally:
        Nfnetlink.commit = commit  # type: ignore[method-assign]
    stages.seconds.setdefault("backend: plan and encode", []).append(total - kernel)
    stages.seconds.setdefault("kernel: commit", []).append(kernel)
    return backend, sent


def restart(stages: Stages, forwarded: list[Any]) -> NftablesBackend:
    """The next run of the agent: what is in the kernel is read and taken over, and nothing written."""
    backend = NftablesBackend({})
    with stages.timed("restart: read the table"):
        backend.open()
    with stages.timed("restart: adopt"):
        backend.attach(Attachments(interfaces={"vx-bench": UID}))
        applied = backend.apply(TenantUpdate(UID, put=tuple(forwarded), complete=True))
    assert applied.operations == 0
    return backend


def floor(stages: Stages, sent: list[Batch]) -> None:
    """The same transactions into a fresh table, with nobody watching."""
    backend = NftablesBackend({})
    backend.open()
    backend.close()
    netlink = Nfnetlink()
    with stages.timed("kernel floor: same bytes again"):
        for batch in sent:
            netlink.commit(batch)
    netlink.close()


def one_endpoint(
    stages: Stages,
    backend: NftablesBackend,
    store: Store,
    compiler: Compiler,
    model: TenantModel,
    services: int,
    endpoints: int,
) -> None:
    """One endpoint of one Service changes: each stage's share, in process."""
    view = NodeView.of("node-1")
    for turn in range(CHANGES):
        number = turn * 7919 % services
        members = [endpoint(number, index) for index in range(endpoints - 1)] + [endpoint(number, endpoints + turn % 2)]
        changed = msgspec.convert(endpoint_slice(f"svc-{number}", members), shapes.EndpointSlice)
        before = store.tenants()[UID].model.digest
        started = time.perf_counter()
        compiler.put(changed)
        change = compiler.flush()
        store.update(UID, change.put, change.removed)
        compiled = time.perf_counter()
        delta = store.tenants()[UID].delta(before)
        assert delta is not None
        message = BrainMessage.FromString(delta.message).delta
        operations = [convert.decode_operation(UID, operation) for operation in message.operations]
        touched = model.apply(operations)
        received = time.perf_counter()
        ports = [model.ports[key] for key in touched]
        forwarded = resolve(ports, view)
        local_ports(ports, view.node_id)
        resolved = time.perf_counter()
        backend.apply(TenantUpdate(UID, put=tuple(forwarded)))
        committed = time.perf_counter()
        for stage, seconds in (
            ("brain: compile and store", compiled - started),
            ("encode, decode, apply", received - compiled),
            ("node: resolve", resolved - received),
            ("backend and kernel", committed - resolved),
            ("all stages", committed - started),
        ):
            stages.seconds.setdefault(f"one endpoint: {stage}", []).append(seconds)


def report(show: Callable[[Any], None]) -> None:
    """Run everything and show the tables."""
    for services, endpoints in ((1_000, 10), (10_000, 10)):
        stages, sizes = Stages(), {}
        for _ in range(RUNS):
            sizes = first_load(stages, services, endpoints)
        drawn = Table(title=f"{services:,} services x {endpoints} endpoints")
        for heading in ("stage", "median", "p99 or spread"):
            drawn.add_column(heading, justify="left" if heading == "stage" else "right")
        for stage, seconds in stages.seconds.items():
            median = statistics.median(seconds)
            if stage.startswith("one endpoint"):
                drawn.add_row(stage, f"{median * 1e6:,.0f} us", f"{quantile(seconds, 0.99) * 1e6:,.0f} us")
            else:
                drawn.add_row(stage, f"{median * 1e3:,.1f} ms", f"{(max(seconds) - min(seconds)) / median:.0%}")
        for name, value in sizes.items():
            drawn.add_row(name, f"{value:,.1f}", "")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        drawn.add_row("peak memory so far, all stages in one process", f"{peak:,.0f} MiB", "")
        show(drawn)


def quantile(values: list[float], share: float) -> float:
    """The value below which `share` of the values lie."""
    return sorted(values)[min(int(len(values) * share), len(values) - 1)]
