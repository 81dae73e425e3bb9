"""What an endpoint takes in memory at each stage.

Brain and node are processes of their own, begun anew, whose resident size is looked at after each stage, when what only
the stage needed has been given back to the kernel; in one process each stage would fill the holes that the last one
left. The kernel's own memory is what its slabs and mapped areas grow by while the table is filled: other work on the
machine changes it too, so it means something where there are many endpoints.
"""

import ctypes
import gc
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import msgspec

from benchmarks.pipeline.objects import pairs
from benchmarks.pipeline.stages import TENANT, UID, decode, namespace, resolved, state
from vcproxy.backend.protocol import Attachments, TenantUpdate
from vcproxy.brain.compiler import Compiler
from vcproxy.brain.guard import UNRESTRICTED
from vcproxy.brain.store import Store
from vcproxy.kube import shapes
from vcproxy.model.tenant import TenantModel
from vcproxy_nftables import NftablesBackend


def measured(services: int, endpoints: int) -> dict[str, float]:
    """Octets an endpoint by stage, in the order of the stages."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as pool:
        found, parts = pool.submit(_brain, services, endpoints).result()
        found |= pool.submit(_node, parts).result()
    return {stage: octets / services / endpoints for stage, octets in found.items()}


class _Sizes:
    """Octets by stage: what the process has grown by since the last one."""

    def __init__(self) -> None:
        self.octets: dict[str, int] = {}
        self._libc = ctypes.CDLL(None)
        self._last = self._resident()

    def _resident(self) -> int:
        gc.collect()
        self._libc.malloc_trim(0)
        return _kib("/proc/self/status", "VmRSS") * 1024

    def note(self, stage: str) -> None:
        """All that is held now and was not before is of this stage."""
        now = self._resident()
        self.octets[stage], self._last = now - self._last, now


def _kib(file: str, *names: str) -> int:
    lines = Path(file).read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.partition(":")[0] in names)


def _brain(services: int, endpoints: int) -> tuple[dict[str, int], list[bytes]]:
    """Objects are read one after the other, as from a stream; returns the parts of the snapshot too."""
    sizes, store, compiler = _Sizes(), Store(), Compiler(UNRESTRICTED)
    store.add_tenant(TENANT)
    for service, its_slice in pairs(services, endpoints):
        compiler.put(msgspec.convert(service, shapes.Service))
        compiler.put(msgspec.convert(its_slice, shapes.EndpointSlice))
    compiler.listed("Service")
    compiler.listed("EndpointSlice")
    change = compiler.flush()
    store.update(UID, change.put, change.removed)
    store.set_synced(UID)
    del change
    sizes.note("brain: compiler and store")
    snapshot = store.tenants()[UID].snapshot()
    parts = [snapshot.part(index) for index in range(len(snapshot))]
    sizes.note("brain: the snapshot, kept for the next node")
    sizes.octets["on the wire, compressed"] = sum(map(len, parts))
    return sizes.octets, parts


def _node(parts: list[bytes]) -> dict[str, int]:
    sizes = _Sizes()
    model = TenantModel(decode(parts))
    sizes.note("node: model")
    forwarded = resolved(model)
    sizes.note("node: forwarding table")
    sizes.octets["node: last good state on disk"] = sum(map(len, state(model)))
    with namespace():
        before = _kib("/proc/meminfo", "Slab", "VmallocUsed")
        backend = NftablesBackend({})
        backend.open()
        backend.attach(Attachments(interfaces={"vx-bench": UID}))
        backend.apply(TenantUpdate(UID, put=tuple(forwarded), complete=True))
        sizes.octets["kernel"] = (_kib("/proc/meminfo", "Slab", "VmallocUsed") - before) * 1024
        sizes.note("backend: mirror")
        backend.close()
    return sizes.octets
