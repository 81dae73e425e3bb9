"""The last good state on disk: what comes back, and everything that may be wrong with a file."""

import asyncio
import hashlib
import stat
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from tests.unit.node.conftest import FACTS, NODE, service_port
from vcproxy.model.addresses import parse_address, parse_prefix
from vcproxy.model.mark import Position
from vcproxy.model.tenant import Tenant, TenantModel
from vcproxy.node import statefile
from vcproxy.node.cache import Cache
from vcproxy.node.holdings import Held, Holdings
from vcproxy.ops import sealed

ACME = Tenant("acme", "Acme Corp", (parse_prefix("10.32.0.0/16"),))
LEAVING = msgspec.structs.replace(FACTS, eligible=False)
PORTS = [service_port(f"svc-{at}", "10.0.1.1", "fd00::1", vip=f"10.32.1.{at}") for at in range(5)]


MARK = {"Service": Position(5, 9, 1_700_000_000_000), "EndpointSlice": Position(7, 7)}


@pytest.fixture
def holdings() -> Holdings:
    holdings = Holdings()
    holdings.put(Held(ACME, TenantModel(PORTS), 12, "brain-1", synced=True, mark=MARK))
    return holdings


async def written(directory: Path, holdings: Holdings) -> Path:
    cache = Cache(directory, node=NODE, holdings=holdings)
    cache.keep("acme")
    cache.keep_node(LEAVING, {parse_address("10.0.1.1"): "acme"})
    await cache.flush()
    return directory / "acme.tenant"


async def test_what_was_kept_comes_back(tmp_path: Path, holdings: Holdings) -> None:
    await written(tmp_path, holdings)
    (held,), facts, placement = Cache(tmp_path, node=NODE, holdings=Holdings()).load()
    assert held.tenant == ACME
    assert held.model.ports == holdings.tenants["acme"].model.ports
    assert (held.revision, held.brain, held.synced) == (12, "brain-1", True)
    assert held.mark == MARK
    assert held.model.digest == holdings.tenants["acme"].model.digest
    assert facts == LEAVING
    assert placement == {parse_address("10.0.1.1"): "acme"}


async def test_a_file_of_a_version_without_marks_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    holdings = Holdings()
    holdings.put(Held(ACME, TenantModel(PORTS), 12, "brain-1", synced=True))

    def encode(value: object) -> bytes:
        plain = msgspec.to_builtins(value, builtin_types=(bytes,))
        if isinstance(plain, dict):
            assert plain.pop("mark", None) in ({}, None)
        return msgspec.msgpack.encode(plain)

    monkeypatch.setattr(sealed, "encode", encode)
    await written(tmp_path, holdings)
    (held,), _, _ = Cache(tmp_path, node=NODE, holdings=Holdings()).load()
    assert held.mark == {}
    assert held.model.digest == TenantModel(PORTS).digest


async def test_files_are_for_root_alone(tmp_path: Path, holdings: Holdings) -> None:
    path = await written(tmp_path / "state", holdings)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


async def test_an_empty_directory_remembers_nothing(tmp_path: Path) -> None:
    assert Cache(tmp_path / "new", node=NODE, holdings=Holdings()).load() == ([], None, None)


async def test_more_ports_than_a_frame_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, holdings: Holdings
) -> None:
    monkeypatch.setattr(sealed, "FRAME_PORTS", 2)
    await written(tmp_path, holdings)
    assert len(Cache(tmp_path, node=NODE, holdings=Holdings()).load().tenants[0].model) == 5


def resealed(data: bytes) -> bytes:
    body = data[: -sealed.CHECKSUM_OCTETS]
    return body + hashlib.blake2b(body, digest_size=sealed.CHECKSUM_OCTETS).digest()


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut off": lambda data: data[:-7],
    "a bit flipped": lambda data: data[:90] + bytes((data[90] ^ 1,)) + data[91:],
    "foreign": lambda data: b"#!/bin/sh\n" + data,
    "too new": lambda data: resealed(statefile.MAGIC + b"\0\x63" + data[len(statefile.MAGIC) + 2 :]),
    "other content under a good checksum": lambda data: resealed(data.replace(b"svc-3", b"svc-9")),
    "not MessagePack under a good checksum": lambda data: resealed(data[:20] + b"\xc1" * 8 + data[28:]),
    "a length that lies under a good checksum": lambda data: resealed(data[:16] + b"\xff\xff\xff\xff" + data[20:]),
    "a header alone": lambda data: resealed(data[:16] + bytes(32)),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
async def test_a_damaged_file_is_ignored_and_replaced_by_the_next_good_one(
    tmp_path: Path, holdings: Holdings, damage: Callable[[bytes], bytes]
) -> None:
    path = await written(tmp_path, holdings)
    path.write_bytes(damage(path.read_bytes()))
    remembered = Cache(tmp_path, node=NODE, holdings=Holdings()).load()
    assert remembered.tenants == []
    assert remembered.facts == LEAVING, "the other files are read"
    await written(tmp_path, holdings)
    assert len(Cache(tmp_path, node=NODE, holdings=Holdings()).load().tenants) == 1


async def test_a_file_of_another_node_is_ignored(tmp_path: Path, holdings: Holdings) -> None:
    await written(tmp_path, holdings)
    assert Cache(tmp_path, node="node-b", holdings=Holdings()).load() == ([], None, None)


async def test_a_file_of_another_tenant_is_ignored(tmp_path: Path, holdings: Holdings) -> None:
    path = await written(tmp_path, holdings)
    path.rename(tmp_path / "beta.tenant")
    assert Cache(tmp_path, node=NODE, holdings=Holdings()).load().tenants == []


async def test_leftovers_and_strange_names_are_no_tenants(tmp_path: Path, holdings: Holdings) -> None:
    path = await written(tmp_path, holdings)
    (tmp_path / "acme.tenant.tmp").write_bytes(b"half")
    (tmp_path / "-Bad.tenant").write_bytes(path.read_bytes())
    (tmp_path / "dir.tenant").mkdir()
    assert [held.tenant.uid for held in Cache(tmp_path, node=NODE, holdings=Holdings()).load().tenants] == ["acme"]
    assert not (tmp_path / "acme.tenant.tmp").exists()


async def test_a_gone_tenant_leaves_no_file(tmp_path: Path, holdings: Holdings) -> None:
    path = await written(tmp_path, holdings)
    cache = Cache(tmp_path, node=NODE, holdings=holdings)
    holdings.drop("acme")
    cache.forget("acme")
    await cache.flush()
    assert not path.exists()


async def test_a_tenant_that_is_not_synced_keeps_its_last_good_file(tmp_path: Path, holdings: Holdings) -> None:
    path = await written(tmp_path, holdings)
    good = path.read_bytes()
    holdings.put(Held(ACME, TenantModel(), 1, "brain-2", synced=False))
    cache = Cache(tmp_path, node=NODE, holdings=holdings)
    cache.keep("acme")
    await cache.flush()
    assert path.read_bytes() == good


async def test_a_uid_is_never_a_path(tmp_path: Path, holdings: Holdings) -> None:
    holdings.put(Held(Tenant("../evil", "evil"), synced=True))
    cache = Cache(tmp_path / "state", node=NODE, holdings=holdings)
    cache.keep("../evil")
    await cache.flush()
    assert not (tmp_path / "evil.tenant").exists()


async def test_writes_are_debounced(tmp_path: Path, holdings: Holdings) -> None:
    cache = Cache(tmp_path, node=NODE, holdings=holdings, delay=0.05)
    running = asyncio.gather(cache.run())
    try:
        for _ in range(100):
            cache.keep("acme")
        assert not (tmp_path / "acme.tenant").exists()
        async with asyncio.timeout(10):
            while not (tmp_path / "acme.tenant").exists():  # noqa: ASYNC110 - a file has no event
                await asyncio.sleep(0.005)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
