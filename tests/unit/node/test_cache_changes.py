"""What changed is written behind what is there: what comes back is what was held, whatever happened to the file."""

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.node.conftest import NODE, service_port
from vcproxy.model.services import ServicePort
from vcproxy.model.tenant import Tenant, TenantModel
from vcproxy.node.cache import Cache
from vcproxy.node.holdings import Held, Holdings
from vcproxy.ops import journal, metrics, statedir

ACME = Tenant("acme", "Acme Corp")
MANY = [
    service_port(f"svc-{at}", f"10.0.{at // 250}.{at % 250 + 1}", vip=f"10.32.{at // 250}.{at % 250}")
    for at in range(400)
]


def changed(port: ServicePort, host: int) -> ServicePort:
    return service_port(port.key.service, f"10.9.9.{host}")


class Node:
    """One run of a node after another over the same directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path = directory / "acme.tenant"
        self.restart()

    def restart(self) -> None:
        self.holdings = Holdings()
        self.cache = Cache(self.directory, node=NODE, holdings=self.holdings)
        found = self.cache.load().tenants
        self.holdings.put(found[0] if found else Held(ACME, synced=True))

    @property
    def held(self) -> Held:
        return self.holdings.tenants["acme"]

    async def put(self, *ports: ServicePort) -> None:
        for port in ports:
            self.held.model.put(port)
        await self._keep(*ports)

    async def remove(self, *ports: ServicePort) -> None:
        for port in ports:
            self.held.model.remove(port.key)
        await self._keep(*ports)

    async def _keep(self, *ports: ServicePort) -> None:
        self.held.revision += 1
        self.cache.changed("acme", [port.key for port in ports])
        self.cache.keep("acme")
        await self.cache.flush()

    @property
    def stored(self) -> Held:
        """What a run that starts now has."""
        (held,) = Cache(self.directory, node=NODE, holdings=Holdings()).load().tenants
        return held

    def agrees(self) -> bool:
        held, stored = self.held, self.stored
        return (held.model.ports, held.revision) == (stored.model.ports, stored.revision)


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


async def test_a_change_costs_its_own_octets(node: Node) -> None:
    await node.put(*MANY)
    whole, inode = node.path.stat().st_size, node.path.stat().st_ino
    await node.put(changed(MANY[3], 7))
    await node.remove(MANY[5])
    assert node.agrees()
    assert node.path.stat().st_ino == inode
    assert node.path.stat().st_size - whole < 1_000


async def test_the_next_run_goes_on_where_the_last_one_ended(node: Node) -> None:
    await node.put(*MANY)
    inode = node.path.stat().st_ino
    node.restart()
    await node.put(changed(MANY[3], 7))
    assert node.agrees()
    assert node.path.stat().st_ino == inode


async def test_what_is_on_disk_already_is_not_written(node: Node) -> None:
    await node.put(*MANY)
    before = node.path.stat()
    node.restart()
    node.cache.keep("acme")
    await node.cache.flush()
    assert (node.path.stat().st_mtime_ns, node.path.stat().st_size) == (before.st_mtime_ns, before.st_size)


async def test_more_changes_than_content_are_written_anew(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "SMALL_OCTETS", 1_000)
    await node.put(*MANY[:20])
    sizes = []
    for turn in range(100):
        await node.put(changed(MANY[turn % 20], turn))
        sizes.append(node.path.stat().st_size)
    assert node.agrees()
    assert max(sizes) < 3 * sizes[0] + 1_000
    assert min(sizes[50:]) <= sizes[0]


async def test_a_snapshot_is_written_whole(node: Node) -> None:
    await node.put(*MANY)
    node.held.model = TenantModel(MANY[:7])
    node.cache.changed("acme", None)
    node.cache.keep("acme")
    await node.cache.flush()
    assert node.agrees()


async def test_what_was_written_half_is_as_if_it_had_not_been_written(node: Node) -> None:
    await node.put(*MANY)
    before, whole = dict(node.held.model.ports), node.path.stat().st_size
    await node.put(changed(MANY[3], 7))
    grown = node.path.read_bytes()
    for size in range(whole, len(grown)):
        node.path.write_bytes(grown[:size])
        assert node.stored.model.ports == before
    node.restart()
    await node.put(changed(MANY[4], 8))
    assert node.agrees(), "not behind the half-written"


async def test_a_disk_that_is_full_keeps_what_was_there_and_is_tried_again(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    await node.put(*MANY)
    before = dict(node.held.model.ports)
    failures = metrics.CACHE_FAILURES._value.get()

    def full(descriptor: int) -> None:
        os.ftruncate(descriptor, os.fstat(descriptor).st_size - 10)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(statedir.os, "fsync", full)
        await node.put(changed(MANY[3], 7))
    assert metrics.CACHE_FAILURES._value.get() == failures + 1
    assert node.stored.model.ports == before
    await node.cache.flush()
    assert node.agrees()


@pytest.mark.parametrize("harm", ["deleted", "longer", "shorter", "empty"])
async def test_a_file_that_somebody_else_changed_is_written_anew(node: Node, harm: str) -> None:
    await node.put(*MANY)
    data = node.path.read_bytes()
    if harm == "deleted":
        node.path.unlink()
    else:
        node.path.write_bytes({"longer": data + b"x", "shorter": data[:-1], "empty": b""}[harm])
    await node.put(changed(MANY[3], 7))
    assert node.agrees()


steps = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.integers(0, 9), st.integers(0, 250)),
        st.tuples(st.just("remove"), st.integers(0, 9), st.just(0)),
        st.tuples(st.just("restart"), st.just(0), st.just(0)),
        st.tuples(st.just("tear"), st.integers(1, 400), st.just(0)),
        st.tuples(st.just("flip"), st.integers(0, 4_000), st.integers(1, 255)),
    ),
    max_size=25,
)


@settings(max_examples=150, deadline=None)
@given(steps)
async def test_what_comes_back_is_the_newest_or_an_older_one_whole(steps: list[tuple[str, int, int]]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        node, once = Node(Path(directory)), [(0, TenantModel().digest)]
        for act, at, value in steps:
            match act:
                case "put":
                    await node.put(changed(MANY[at], value))
                case "remove":
                    await node.remove(MANY[at])
                case "restart":
                    node.restart()
                case _ if node.path.exists():
                    data = bytearray(node.path.read_bytes())
                    if act == "tear":
                        del data[-at:]
                    elif at < len(data):
                        data[at] ^= value
                    node.path.write_bytes(data)
            if act in ("put", "remove"):
                once.append((node.held.revision, node.held.model.digest))
                if node.cache._journal.header(node.path) is not None:
                    found = Cache(Path(directory), node=NODE, holdings=Holdings()).load().tenants
                    assert all((held.revision, held.model.digest) in once for held in found)
