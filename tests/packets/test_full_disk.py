"""The last good state on a disk that is really full: a small file system in memory, which takes root to mount."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.node.conftest import FACTS, NODE, service_port
from vcproxy.brain.guard import UNRESTRICTED
from vcproxy.brain.memory import Memory
from vcproxy.brain.store import Store
from vcproxy.model.addresses import parse_address
from vcproxy.model.tenant import Tenant, TenantModel
from vcproxy.node.cache import Cache
from vcproxy.node.holdings import Held, Holdings
from vcproxy.ops import metrics

pytestmark = pytest.mark.packets

ROOM = 128 * 1024  # octets of the file system


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A directory on a file system with little room."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", str(tmp_path)], check=True)
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def fill(path: Path) -> None:
    """Write until there is no room."""
    with pytest.raises(OSError, match="No space left"), path.open("wb", buffering=0) as file:
        for _ in range(ROOM):
            file.write(bytes(4096))


async def test_the_last_good_files_stay_and_are_replaced_when_there_is_room_again(disk: Path) -> None:
    ports = [service_port(f"svc-{at}", "10.0.1.1", vip=f"10.32.1.{at}") for at in range(200)]
    holdings = Holdings()
    held = Held(Tenant("acme", "Acme Corp"), TenantModel(ports), 12, "brain-1", synced=True)
    holdings.put(held)
    cache = Cache(disk, node=NODE, holdings=holdings)
    cache.keep("acme")
    cache.keep_node(FACTS, {})
    await cache.flush()
    good = {path.name: path.read_bytes() for path in disk.iterdir()}
    assert good.keys() == {"acme.tenant", "node"}

    fill(disk / "filler")
    failures = metrics.value("vcproxy_cache_failures_total")
    wanted = [service_port(f"svc-{at}", "10.0.1.2", "fd00::2", vip=f"10.32.1.{at}") for at in range(150)]
    for port in wanted:  # more than what is left of the file's last block
        held.model.put(port)
    cache.changed("acme", [port.key for port in wanted])
    cache.keep("acme")
    cache.keep_node(FACTS, {parse_address(f"10.0.{at >> 8}.{at & 255}"): "acme" for at in range(1000)})
    await cache.flush()
    assert metrics.value("vcproxy_cache_failures_total") == failures + 2
    left = {path.name: path.read_bytes() for path in disk.iterdir() if path.name != "filler"}
    assert left.keys() == good.keys()
    assert all(left[name].startswith(good[name]) for name in good), "but for what is half-written behind it"
    (remembered,), facts, _ = Cache(disk, node=NODE, holdings=Holdings()).load()
    assert (remembered.model.digest, facts) == (TenantModel(ports).digest, FACTS)

    (disk / "filler").unlink()
    await cache.flush()
    (remembered,), _, placement = Cache(disk, node=NODE, holdings=Holdings()).load()
    assert remembered.model.digest == held.model.digest
    assert len(placement or {}) == 1000


async def test_a_full_disk_at_the_start_is_no_obstacle(disk: Path) -> None:
    fill(disk / "filler")
    cache = Cache(disk / "state" / "deep", node=NODE, holdings=Holdings())
    assert cache.load().tenants == []
    cache.keep_node(FACTS, {})
    await cache.flush()
    assert Cache(disk / "state" / "deep", node=NODE, holdings=Holdings()).load().facts is None


async def test_a_brain_goes_on_and_keeps_what_it_wrote_last(disk: Path) -> None:
    ports = [service_port(f"svc-{at}", "10.0.1.1", vip=f"10.32.1.{at}") for at in range(200)]
    store = Store()
    memory = Memory(disk, store, policy_of=lambda uid: UNRESTRICTED)
    store.subscribe(memory.changed)
    store.add_tenant(Tenant("acme", "Acme Corp"))
    store.replace("acme", ports)
    store.set_synced("acme")
    await memory.flush()
    good = (disk / "acme.tenant").read_bytes()

    fill(disk / "filler")
    failures = metrics.value("vcproxy_cache_failures_total")
    # More than what is left of the file's last block.
    store.update("acme", [service_port(f"svc-{at}", "10.0.1.2", vip=f"10.32.1.{at}") for at in range(1, 100)], [])
    await memory.flush()
    assert metrics.value("vcproxy_cache_failures_total") == failures + 1
    assert (disk / "acme.tenant").read_bytes().startswith(good)
    assert [path.name for path in disk.iterdir() if path.suffix == ".tmp"] == []
    assert Memory(disk, Store(), policy_of=lambda uid: UNRESTRICTED).load() == 1

    (disk / "filler").unlink()
    await memory.flush()
    again = Store()
    Memory(disk, again, policy_of=lambda uid: UNRESTRICTED).load()
    again.add_tenant(Tenant("acme", "Acme Corp"))
    again.set_stale("acme", 1.0, "down")
    assert again.tenants()["acme"].model.digest == store.tenants()["acme"].model.digest
