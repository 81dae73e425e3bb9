"""What a brain remembers of tenants: what comes back, when it is served, and everything that may be wrong with a file."""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import pytest

from tests.unit.brain.kinds import endpoint_slice, service
from tests.unit.brain.polling import settle
from tests.unit.brain.test_feed import Hand, fed, targets
from tests.unit.distribution.rig import service_port
from vcproxy.brain import memory as memory_module
from vcproxy.brain.guard import UNRESTRICTED, Policy
from vcproxy.brain.memory import Memory
from vcproxy.brain.ownership import Ownership
from vcproxy.brain.store import Store
from vcproxy.kube.errors import Unreachable
from vcproxy.kube.reflector import Broken, Listed, Recovered
from vcproxy.model.addresses import parse_prefix
from vcproxy.model.mark import Mark, Position
from vcproxy.model.services import ServicePort
from vcproxy.model.tenant import Tenant, TenantModel
from vcproxy.ops import sealed

UID = "t1"
ACME = Tenant(UID, "acme", (parse_prefix("10.32.0.0/16"),))
PORTS = [service_port(f"svc-{number}", number, number + 1, number=number) for number in range(1, 6)]
MARK = {"Service": Position(5, 9, 77), "EndpointSlice": Position(8, 9, 77)}
DOWN = Unreachable(tenant=UID, path="/", message="it is down")


class At:
    def mark(self) -> Mark:
        return MARK

    def overtaken(self, by: Mark) -> None:
        raise AssertionError


def remembering(directory: Path, store: Store, policy: Policy = UNRESTRICTED) -> Memory:
    memory = Memory(directory, store, policy_of=lambda uid: policy)
    store.subscribe(memory.changed)
    return memory


async def written(directory: Path) -> Path:
    store = Store()
    memory = remembering(directory, store)
    store.add_tenant(ACME)
    store.follow(UID, At())
    store.replace(UID, PORTS)
    store.set_synced(UID)
    await memory.flush()
    return directory / "t1.tenant"


def restarted(directory: Path, policy: Policy = UNRESTRICTED) -> tuple[Store, Memory, int]:
    store = Store()
    memory = remembering(directory, store, policy)
    return store, memory, memory.load()


def read_again(directory: Path, ports: Sequence[ServicePort] = PORTS) -> tuple[Store, Memory]:
    """A restarted brain that has read the tenant's API server."""
    store, memory, _ = restarted(directory)
    store.add_tenant(ACME)
    store.replace(UID, ports)
    store.set_synced(UID)
    return store, memory


def down(store: Store) -> None:
    store.set_stale(UID, 3e9, "it is down")


async def test_what_was_remembered_is_served_when_the_api_server_is_down(tmp_path: Path) -> None:
    await written(tmp_path)
    store, _, count = restarted(tmp_path)
    assert count == 1
    assert store.tenants() == {}, "nobody has found the tenant yet"
    store.add_tenant(Tenant(UID, "acme"))
    stored = store.tenants()[UID]
    assert not stored.synced, "nobody has tried its API server yet"
    down(store)
    assert stored.synced
    assert stored.restored
    assert stored.tenant == ACME
    assert stored.model.digest == TenantModel(PORTS).digest
    assert stored.mark == MARK
    assert stored.stale_since is not None
    assert stored.stale_since < 3e9, "since it was read"
    assert stored.stale_reason.endswith("what it had before is served: it is down")
    assert stored.snapshot().version.digest == stored.model.digest
    store.set_stale(UID, None)
    assert stored.stale_since, "a server that answers has not been read yet"
    store.replace(UID, PORTS[:2])
    store.set_synced(UID)
    assert stored.stale_since is None
    assert not stored.restored


async def test_files_are_for_their_owner_alone(tmp_path: Path) -> None:
    path = await written(tmp_path / "state")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


async def test_what_was_not_synced_is_neither_written_nor_empty(tmp_path: Path) -> None:
    path = await written(tmp_path)
    before = path.read_bytes()
    store, memory, _ = restarted(tmp_path)
    store.add_tenant(Tenant(UID, "acme"))
    store.update(UID, PORTS[:1], [])
    await memory.flush()
    assert path.read_bytes() == before
    fresh = Store()
    fresh.add_tenant(ACME)
    down(fresh)
    assert not fresh.tenants()[UID].synced


async def test_a_file_is_written_when_its_content_differs_and_not_else(tmp_path: Path) -> None:
    path = await written(tmp_path)
    before = path.stat()
    store, memory = read_again(tmp_path)
    down(store)
    await memory.flush()
    assert path.stat() == before
    store.update(UID, PORTS[:1], [PORTS[1].key])
    store.update(UID, [], [PORTS[2].key])
    await memory.flush()
    changed = path.stat()
    assert changed.st_size > before.st_size
    await memory.flush()
    assert path.stat() == changed


async def test_what_nodes_were_sent_since_is_written_behind_the_content(tmp_path: Path) -> None:
    path = await written(tmp_path)
    before = path.read_bytes()
    store, memory = read_again(tmp_path)
    store.follow(UID, At())
    other = service_port("svc-2", 9, number=2)
    for put, removed in (([other], []), ([], [PORTS[0].key]), ([PORTS[0]], [PORTS[2].key])):
        store.update(UID, put, removed)
    await memory.flush()
    assert path.read_bytes().startswith(before)
    (one,) = (memory._read(path),)
    assert one is not None
    assert one.model.ports == store.tenants()[UID].model.ports
    assert one.mark == MARK


async def test_without_the_steps_from_what_is_written_all_is_written(tmp_path: Path) -> None:
    path = await written(tmp_path)
    before = path.read_bytes()
    _, memory = read_again(tmp_path, PORTS[:2])
    await memory.flush()
    assert not path.read_bytes().startswith(before)
    one = memory._read(path)
    assert one is not None
    assert one.model.digest == TenantModel(PORTS[:2]).digest


async def test_a_tenant_that_is_gone_is_forgotten(tmp_path: Path) -> None:
    path = await written(tmp_path)
    store, memory, _ = restarted(tmp_path)
    store.add_tenant(ACME)
    store.remove_tenant(UID)
    await memory.flush()
    assert not path.exists()


async def test_tenants_that_are_no_more_are_forgotten_when_all_are_known(tmp_path: Path) -> None:
    path = await written(tmp_path)
    store, memory, _ = restarted(tmp_path)
    await memory.flush()
    assert path.exists()
    memory.prune({"another"})
    await memory.flush()
    assert not path.exists()
    store.add_tenant(ACME)
    down(store)
    assert not store.tenants()[UID].synced


def resealed(data: bytes) -> bytes:
    body = data[: -sealed.CHECKSUM_OCTETS]
    return body + hashlib.blake2b(body, digest_size=sealed.CHECKSUM_OCTETS).digest()


MAGIC = memory_module.MAGIC
DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda data: b"", "not a state file"),
    "cut off": (lambda data: data[:-7], "damaged"),
    "a bit flipped": (lambda data: data[:90] + bytes((data[90] ^ 1,)) + data[91:], "damaged"),
    "a node's": (lambda data: b"vcproxy-state" + data, "not a state file"),
    "too new": (lambda data: resealed(MAGIC + b"\0\x63" + data[len(MAGIC) + 2 :]), "has version 99"),
    "other content": (lambda data: resealed(data.replace(b"svc-3", b"svc-9")), "digest"),
    "of another tenant": (lambda data: resealed(data.replace(b"uid\xa2t1", b"uid\xa2t9")), "of tenant 't9'"),
    "no MessagePack": (lambda data: resealed(data[:26] + b"\xc1" * 8 + data[34:]), "does not decode"),
}


@pytest.mark.parametrize(("damage", "reason"), DAMAGES.values(), ids=DAMAGES.keys())
async def test_a_file_that_cannot_be_used_is_named_and_set_aside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[bytes], bytes], reason: str
) -> None:
    path = await written(tmp_path)
    damaged = damage(path.read_bytes())
    path.write_bytes(damaged)
    store, memory, count = restarted(tmp_path)
    assert count == 0
    assert not path.exists()
    assert path.with_name("t1.tenant.unusable").read_bytes() == damaged
    said = capsys.readouterr().out
    assert str(path) in said
    assert reason in said
    store.add_tenant(ACME)
    store.replace(UID, PORTS)
    store.set_synced(UID)
    await memory.flush()
    assert restarted(tmp_path)[2] == 1


async def test_what_another_policy_let_through_does_not_come_back(tmp_path: Path) -> None:
    await written(tmp_path)
    narrower = msgspec.structs.replace(UNRESTRICTED, virtual_ip_ranges=(parse_prefix("10.96.0.0/16"),))
    store, _, _ = restarted(tmp_path, narrower)
    store.add_tenant(ACME)
    down(store)
    assert not store.tenants()[UID].synced


async def test_before_the_policy_is_known_nothing_comes_back_and_then_it_does(tmp_path: Path) -> None:
    await written(tmp_path)
    known: list[Policy] = []
    store = Store()
    Memory(tmp_path, store, policy_of=lambda uid: known[0] if known else None).load()
    store.add_tenant(ACME)
    down(store)
    assert not store.tenants()[UID].synced
    known.append(UNRESTRICTED)
    down(store)
    assert store.tenants()[UID].restored


async def test_an_endpoint_that_is_the_tenants_no_more_does_not_come_back(tmp_path: Path) -> None:
    await written(tmp_path)
    store, ownership = Store(), Ownership()
    own = msgspec.structs.replace(UNRESTRICTED, own_pods_only=True)
    Memory(
        tmp_path, store, policy_of=lambda uid: UNRESTRICTED, rights_of=lambda uid, _: ownership.rights(uid, own)
    ).load()
    store.add_tenant(ACME)
    down(store)
    model = store.tenants()[UID].model
    assert len(model) and not any(port.endpoints4 or port.endpoints6 for port in model)


async def test_a_directory_that_cannot_be_made_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    await written(tmp_path / "file" / "state")
    assert restarted(tmp_path / "file" / "state")[2] == 0


async def test_a_feed_serves_what_is_remembered_until_it_has_read_all(tmp_path: Path) -> None:
    hand = Hand()
    async with fed(hand) as (store, _):
        memory = remembering(tmp_path, store)
        hand.versions = {"Service": "50", "EndpointSlice": "50"}
        assert hand.sink is not None
        hand.sink("ServiceCIDR", Listed((), ()))
        for kind, found in (
            ("Service", (service("a"), service("b", clusterIP="10.96.0.2"))),
            ("EndpointSlice", (endpoint_slice(["10.0.0.1"], service="a"),)),
        ):
            hand.sink(kind, Listed(found, ()))  # type: ignore[arg-type]
        await settle()
        await memory.flush()

    hand, store = Hand(), Store()
    remembering(tmp_path, store).load()
    async with fed(hand, store=store) as (store, _):
        stored = store.tenants()[UID]
        assert not stored.synced
        assert hand.sink is not None
        hand.sink("Service", Broken(DOWN, 2e9))
        assert stored.restored
        assert targets(store) == {"a": ["10.0.0.1:8080"], "b": []}
        assert stored.mark["Service"] == Position(50, 50)
        hand.versions = {"Service": "40", "EndpointSlice": "60"}
        hand.sink("Service", Recovered())
        hand.sink("Service", Listed((service("a"),), ()))
        await settle()
        assert targets(store) == {"a": ["10.0.0.1:8080"], "b": []}, "half of the objects is a wrong state"
        hand.sink("ServiceCIDR", Listed((), ()))
        hand.sink("EndpointSlice", Listed((), ()))
        await settle()
        assert targets(store) == {"a": []}
        assert not stored.restored
        assert stored.stale_since is None
        assert stored.mark["EndpointSlice"] == Position(60, 60)
        assert stored.mark["Service"].epoch, "history was rewritten while nobody looked"
