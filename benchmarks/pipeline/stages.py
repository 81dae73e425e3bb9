"""One first load through all stages, a restart over what it left, and changes of one endpoint; seconds of each.

The floor is the very transactions that the backend committed, sent again pre-built to a fresh table: what the kernel
takes when nobody has to think.
"""

import gc
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec

from benchmarks import machine
from benchmarks.pipeline.objects import endpoint, endpoint_slice, pairs
from vcproxy.backend.protocol import Attachments, TenantUpdate
from vcproxy.brain.compiler import Compiler
from vcproxy.brain.guard import UNRESTRICTED
from vcproxy.brain.store import Store
from vcproxy.cli.daemons import SWITCH_SECONDS
from vcproxy.kube import shapes
from vcproxy.lab import netns
from vcproxy.model.forwarding import ForwardedPort
from vcproxy.model.services import ServicePort
from vcproxy.model.tenant import Tenant, TenantModel
from vcproxy.node import statefile
from vcproxy.node.localpolicy import local_ports
from vcproxy.node.resolver import NodeView, resolve
from vcproxy.ops import garbage, sealed
from vcproxy.pb import convert
from vcproxy.pb.distribution_pb2 import BrainMessage
from vcproxy.pb.model_pb2 import ServicePorts
from vcproxy_nftables import NftablesBackend
from vcproxy_nftables.netlink import Batch, Nfnetlink

CHANGES = 200
PROGRAM = "node programming: model in memory -> committed"
FLOOR = "kernel floor: same bytes again"
ADOPTION = "restart: last good state and table -> adopted"
ONE = "one endpoint"
"""Rows that others speak of; what begins with ONE is of changes."""
TENANT = Tenant("dir-bench", "bench")
UID = TENANT.uid
NAMESPACE = "vcp-bench"


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
    loaded = decoded(services, endpoints)
    gc.collect()
    garbage.tune()  # as the programs do
    sys.setswitchinterval(SWITCH_SECONDS)
    store = Store()
    store.add_tenant(TENANT)
    compiler = Compiler(UNRESTRICTED)
    with stages.timed("brain: compile and store"):
        for found, its_slice in loaded:
            compiler.put(found)
            compiler.put(its_slice)
        compiler.listed("Service")
        compiler.listed("EndpointSlice")
        change = compiler.flush()
        store.update(UID, change.put, change.removed)
    del loaded
    store.set_synced(UID)
    stored = store.tenants()[UID]
    with stages.timed("brain: encode snapshot"):
        snapshot = stored.snapshot()
        parts = [snapshot.part(index) for index in range(len(snapshot))]
    with stages.timed("node: decode and verify"):
        model = TenantModel(decode(parts))
    assert model.digest == stored.model.digest
    with stages.timed("node: resolve"):
        forwarded = resolved(model)
    image = b"".join(state(model))
    machine.rest()
    with namespace():
        backend, sent = program(stages, forwarded)
        backend.close()
        backend = restart(stages, image)
        del image
        garbage.settled()
        one_endpoint(stages, backend, store, compiler, model, services, endpoints)
        backend.close()
    machine.rest()
    with namespace():
        floor(stages, sent)
    gc.unfreeze()
    return {"wire": sum(map(len, parts)), "elements": sum(map(len, sent))}


@contextmanager
def namespace() -> Iterator[None]:
    """In a network namespace of this benchmark's own; what a run that was killed left of it is removed."""
    netns.delete(NAMESPACE)
    netns.create(NAMESPACE)
    try:
        with netns.entered(NAMESPACE):
            yield
    finally:
        netns.delete(NAMESPACE)


def decoded(services: int, endpoints: int) -> list[tuple[shapes.Service, shapes.EndpointSlice]]:
    """What the brain has read."""
    return [
        (msgspec.convert(service, shapes.Service), msgspec.convert(its_slice, shapes.EndpointSlice))
        for service, its_slice in pairs(services, endpoints)
    ]


def resolved(model: TenantModel) -> list[ForwardedPort]:
    """The forwarding table of one node, and what Local policies come to on it."""
    ports, view = list(model), NodeView.of("node-1")
    forwarded = resolve(ports, view)
    local_ports(ports, view.node_id)
    return forwarded


def state(model: TenantModel) -> Iterator[bytes]:
    """The file of a node's last good state."""
    header = statefile.TenantHeader("node-1", TENANT, 1, "bench", model.digest)
    return iter(sealed.seal(statefile.MAGIC, header, tuple(model)))


def decode(parts: list[bytes]) -> Iterator[ServicePort]:
    """What a node does with the parts of a snapshot."""
    for part in parts:
        message = BrainMessage.FromString(part).snapshot
        body = zlib.decompress(message.ports) if message.encoding else message.ports
        for port in ServicePorts.FromString(body).ports:
            yield convert.decode_port(UID, port)


def program(stages: Stages, forwarded: Sequence[ForwardedPort]) -> tuple[NftablesBackend, list[Batch]]:
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
    stages.seconds.setdefault(PROGRAM, []).append(total + stages.seconds["node: resolve"][-1])
    return backend, sent


def restart(stages: Stages, image: bytes) -> NftablesBackend:
    """The next run of the agent: what is on disk and in the kernel is read and taken over, and nothing written."""
    began = time.perf_counter()
    with stages.timed("restart: decode the last good state"):
        model = statefile.decode_tenant(image, node="node-1", uid=UID).model
    with stages.timed("restart: resolve"):
        forwarded = resolved(model)
    backend = NftablesBackend({})
    with stages.timed("restart: read the table"):
        backend.open()
    with stages.timed("restart: adopt"):
        backend.attach(Attachments(interfaces={"vx-bench": UID}))
        applied = backend.apply(TenantUpdate(UID, put=tuple(forwarded), complete=True))
    stages.seconds.setdefault(ADOPTION, []).append(time.perf_counter() - began)
    assert applied.operations == 0
    return backend


def floor(stages: Stages, sent: list[Batch]) -> None:
    """The same transactions into a fresh table, with nobody watching."""
    backend = NftablesBackend({})
    backend.open()
    backend.close()
    netlink, messages = Nfnetlink(), [batch.message() for batch in sent]
    answers = []
    with stages.timed(FLOOR):
        for message in messages:
            answers += netlink._commits.transact(message)[0]
    assert len(answers) == len(sent) and not any(answer.error for answer in answers)
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
            stages.seconds.setdefault(f"{ONE}: {stage}", []).append(seconds)
