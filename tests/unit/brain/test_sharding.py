"""Brains that share tenants, with a small API server: who follows what, and what becomes of it when shards move."""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.fakes.apiserver import FakeApiServer, Fault, fail
from tests.unit.brain.polling import until
from tests.unit.brain.test_brain_service import NODE, POD, Running, configured, super_cluster
from tests.unit.brain.test_directory_source import write
from tests.unit.brain.test_election import Server
from tests.unit.brain.test_feed import publish
from tests.unit.brain.test_manifests import SERVICE, SLICE
from vcproxy.brain import sharding
from vcproxy.brain.config import BrainConfiguration, Sharding
from vcproxy.brain.election import Act, Lease, Step, Timing, shard_of
from vcproxy.brain.leases import LeaseClient
from vcproxy.kube.errors import Conflict, NotFound
from vcproxy.model.addresses import parse_address
from vcproxy.ops import configfile

SHARDS = 8
QUICK = Sharding(shards=SHARDS, lease_seconds=4, renew_seconds=2.0, retry_seconds=0.05)
TENANTS = [f"t{number}" for number in range(12)]


class Sharer(Running):
    """A brain that shares, which a test may end."""

    def __init__(self, directory: Path, config: BrainConfiguration) -> None:
        super().__init__(directory, config)
        self.stop = asyncio.Event()

    @property
    def sharding(self) -> Any:
        return self.brain._sharding

    @property
    def followed(self) -> set[str]:
        return set(self.brain.tenants.feeds)


@contextlib.asynccontextmanager
async def sharers(directory: Path, count: int) -> AsyncIterator[list[Sharer]]:
    made = []
    async with asyncio.TaskGroup() as group:
        for number in range(count):
            place = directory / f"brain-{number}"
            place.mkdir()
            config = configured(place, super_cluster(directory))
            config = msgspec.structs.replace(
                config,
                sharding=QUICK,
                tenants=msgspec.structs.replace(config.tenants, sources=configured(directory, None).tenants.sources),
            )
            made.append(Sharer(place, config))
            group.create_task(made[-1].brain.run(made[-1].stop))
        try:
            yield made
        finally:
            for one in made:
                one.stop.set()


@pytest.fixture
async def super_api(tmp_path: Path) -> AsyncIterator[FakeApiServer]:
    async with FakeApiServer(token="super") as api:
        (tmp_path / "super.kubeconfig").write_bytes(api.kubeconfig())
        api.put("Node", NODE)
        api.put("Pod", POD)
        yield api


@pytest.fixture
async def tenants_api(tmp_path: Path) -> AsyncIterator[FakeApiServer]:
    """The API server of all TENANTS."""
    async with FakeApiServer() as api:
        publish(api, "web", "10.0.0.1")
        (tmp_path / "tenants").mkdir()
        for name in TENANTS:
            write(tmp_path / "tenants" / f"{name}.kubeconfig", api.kubeconfig().decode())
        yield api


def shared(*some: Sharer) -> bool:
    held = [one.sharding.held for one in some]
    return sorted(shard for each in held for shard in each) == list(range(SHARDS)) and all(held)


async def test_each_tenant_is_followed_by_the_brain_that_holds_its_shard_and_known_to_all(
    tmp_path: Path, super_api: FakeApiServer, tenants_api: FakeApiServer
) -> None:
    uids = {f"dir-{name}" for name in TENANTS}
    async with sharers(tmp_path, 2) as (first, second):
        await until(lambda: shared(first, second))
        await until(lambda: first.synced(*first.followed) and second.synced(*second.followed))
        assert first.followed - {"super"} | second.followed - {"super"} == uids
        for one in (first, second):
            assert one.synced("super"), "every brain has that"
            assert all(shard_of(uid, SHARDS) in one.sharding.held for uid in one.followed)
            assert set(one.brain.tenants.uids) == uids
        assert not first.followed & second.followed
        status = await first.ask()
        assert status["healthy"], status
        assert status["sharding"]["held"] == sorted(first.sharding.held)
        shares = {one.sharding.me: sorted(one.sharding.held) for one in (first, second)}
        await until(lambda: first.sharding.status()["brains"] == second.sharding.status()["brains"] == shares)
        # One ends in good order: the other has all at once, and forgets nothing.
        first.stop.set()
        await until(lambda: shared(second))
        await until(lambda: second.followed == uids and second.synced(*uids))
        leases = {item["metadata"]["name"]: item["spec"] for item in super_api.objects("Lease")}
        assert {spec["holderIdentity"] for spec in leases.values()} == {second.sharding.me}
        assert len(leases) == SHARDS + 1


async def test_a_tenant_that_goes_to_another_brain_is_dropped_and_not_gone(
    tmp_path: Path, super_api: FakeApiServer, tenants_api: FakeApiServer
) -> None:
    async with sharers(tmp_path, 1) as (one,):
        await until(lambda: shared(one))
        await until(lambda: one.synced(*(f"dir-{name}" for name in TENANTS)))
        before = one.followed
        compilers = {uid: weakref.ref(feed.compiler) for uid, feed in one.brain.tenants.feeds.items()}
        other = LeaseClient(
            lambda: super_api.credentials,
            namespace="vcproxy-system",
            me="other",
            shards=SHARDS,
            lease_seconds=30,
            timeout=5,
        )
        await other.do(Step(Act.HOLD, "other", None))
        await until(lambda: len(one.sharding.held) == SHARDS // 2)
        lost = before - one.followed
        assert lost
        await until(lambda: not [uid for uid in lost if compilers[uid]() is not None])  # its memory is free
        for uid in lost:
            assert uid not in one.brain.store.tenants()
            assert not one.brain.store.gone(uid)
            assert uid in one.brain.tenants.uids
        # A tenant of another brain is deleted, and that is for every brain to say.
        victim = sorted(lost)[0]
        (tmp_path / "tenants" / f"{victim.removeprefix('dir-')}.kubeconfig").unlink()
        await until(lambda: one.brain.store.gone(victim))
        await other.close()


async def test_a_brain_that_cannot_renew_tells_nodes_nothing_and_goes_on_to_follow(
    tmp_path: Path, super_api: FakeApiServer, tenants_api: FakeApiServer
) -> None:
    uid = "dir-t0"
    async with sharers(tmp_path, 1) as (one,):
        await until(lambda: shared(one) and one.synced(uid))
        feed = one.brain.tenants.feeds[uid]
        fault = Fault(fail(500), path="/apis/coordination.k8s.io")
        super_api.faults.append(fault)
        await until(lambda: not one.sharding.held)
        assert one.sharding.kept == set(range(SHARDS))
        assert one.row(uid).withheld
        status = await one.ask()
        assert not status["healthy"]
        assert any("sharding: Leases cannot be listed" in row["problem"] for row in status["problems"])
        revision = one.row(uid).revision
        publish(tenants_api, "more", "10.0.0.1")
        await until(lambda: one.row(uid).revision > revision)
        super_api.faults.remove(fault)
        await until(lambda: shared(one))
        assert not one.row(uid).withheld
        assert one.brain.tenants.feeds[uid] is feed, "it was not read anew"
        assert (await one.ask())["healthy"]


async def test_where_pods_of_a_tenant_given_as_manifests_run_is_known_to_all_brains(
    tmp_path: Path, super_api: FakeApiServer
) -> None:
    (tmp_path / "tenants").mkdir()
    write(tmp_path / "tenants" / "files" / "all.yaml", f"{SERVICE}---\n{SLICE}")
    address = parse_address("10.0.0.1")
    async with sharers(tmp_path, 2) as both:
        await until(lambda: shared(*both))
        await until(lambda: [one for one in both if one.synced("dir-files")])
        (feeder,) = [one for one in both if "dir-files" in one.followed]
        (other,) = [one for one in both if one is not feeder]
        await until(lambda: other.brain.placement.tenants("n1") == feeder.brain.placement.tenants("n1"))
        assert "dir-files" in other.brain.placement.tenants("n1")
        assert "dir-files" not in other.brain.placement.tenants("n2"), "unknown is over: it has read the files"
        assert "dir-files" not in other.brain.store.tenants()
        before = dict(other.brain.placement.pods("n1"))
        feeder.stop.set()
        seen: list[Any] = []
        other.brain.placement.subscribe(lambda node: seen.append(dict(other.brain.placement.pods("n1"))))
        await until(lambda: other.synced("dir-files"))
        assert all(pods == before for pods in seen), "no pod was nobody's while its tenant's shard moved"
        assert address in before or before == {}


async def test_last_good_contents_are_recalled_when_a_shard_comes(
    tmp_path: Path, super_api: FakeApiServer, tenants_api: FakeApiServer
) -> None:
    uid = "dir-t0"
    async with sharers(tmp_path, 1) as (one,):
        await until(lambda: shared(one) and one.synced(uid))
        held = one.row(uid).model.digest
        state = Path(one.config.state_directory)
    assert (state / f"{uid}.tenant").exists(), "written at the end"
    tenants_api.faults.append(Fault(fail(503)))
    (tmp_path / "brain-0").rename(tmp_path / "was")
    async with sharers(tmp_path, 1) as (one,):
        (tmp_path / "was" / "state").rename(Path(one.config.state_directory))
        await until(lambda: (row := one.row(uid)) is not None and row.restored)
        assert one.row(uid).model.digest == held


class Cut:
    """Leases in memory; while `cut`, a write is done and its answer does not come."""

    def __init__(self, me: str) -> None:
        self.server = Server()
        self.cut = False
        self._me = me

    async def list(self) -> list[Lease]:
        return self.server.list()

    async def do(self, step: Step) -> Lease | None:
        done = self.server.do(self._me, step)
        if self.cut:
            await asyncio.Event().wait()
        return done

    async def close(self) -> None:
        """Nothing is open."""


async def test_a_brain_that_ends_in_the_middle_of_a_write_gives_all_back_nevertheless() -> None:
    leases = Cut("me")
    sharing = sharding.Sharding(
        leases, me="me", shards=4, timing=Timing(15, 10.0, 0.01), ready=lambda: True, changed=lambda: None
    )
    async with asyncio.TaskGroup() as group:
        task = group.create_task(sharing.run())
        await until(lambda: len(sharing.held) == 4)
        before = leases.server.list()
        leases.cut = True
        await until(lambda: leases.server.list() != before)
        leases.cut = False
        task.cancel()
    assert {lease.holder for lease in leases.server.list()} == {""}
    assert {lease.key for lease in leases.server.list()} == {0, 1, 2, 3}


# --- Leases -----------------------------------------------------------------------------------------------------------


async def test_leases_are_written_on_the_condition_that_they_are_as_seen(super_api: FakeApiServer) -> None:
    def client(me: str, shards: int = 4) -> LeaseClient:
        return LeaseClient(
            lambda: super_api.credentials, namespace="x", me=me, shards=shards, lease_seconds=15, timeout=5
        )

    a, b = client("a"), client("b")
    first = await a.do(Step(Act.HOLD, 3, None))
    assert first is not None
    assert first[:2] == (3, "a")
    assert first.seconds == 15
    with pytest.raises(Conflict):
        await b.do(Step(Act.HOLD, 3, None))
    renewed = await a.do(Step(Act.HOLD, 3, first))
    assert renewed is not None
    assert (renewed.acquired, renewed.transitions) == (first.acquired, 0)
    with pytest.raises(Conflict):
        await b.do(Step(Act.HOLD, 3, first))
    taken = await b.do(Step(Act.HOLD, 3, renewed))
    assert taken is not None
    assert (taken.holder, taken.transitions) == ("b", 1)
    free = await b.do(Step(Act.RELEASE, 3, taken))
    assert free is not None
    assert (free.holder, free.transitions) == ("", 1)
    me = await a.do(Step(Act.HOLD, "a", None))
    assert await b.list() == [me, free] or await b.list() == [free, me]
    assert await client("c", shards=8).list() == [], "another number of shards is another group"
    with pytest.raises(Conflict):
        await b.do(Step(Act.REMOVE, "a", Lease("a", "a", "1", 15.0)))
    assert await b.do(Step(Act.REMOVE, "a", me)) is None
    with pytest.raises(NotFound):
        await a.do(Step(Act.HOLD, "a", me))
    for one in (a, b):
        await one.close()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("sharding: {shards: 0}", r"brain.yaml:3: sharding.shards: Expected `int` >= 1"),
        ("sharding: {}", r"brain.yaml:3: sharding: Object missing required field `shards`"),
        ("sharding: {shards: 4, renewSeconds: 15}", r"brain.yaml:3: sharding: leaseSeconds must be more"),
        ("sharding: {shards: 4, retrySeconds: 6}", r"brain.yaml:3: sharding: renewSeconds must be at least twice"),
        ("sharding: {shards: 4}\nsuperCluster: null", r"brain.yaml:1: file: sharding needs superCluster"),
        (
            "sharding: {shards: 4}\nsuperCluster: {node: n}",
            r"brain.yaml:1: file: sharding is for brains that serve all",
        ),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(text: str, problem: str) -> None:
    head = f"apiVersion: {configfile.API_VERSION}\nkind: BrainConfiguration\n"
    with pytest.raises(configfile.ConfigError, match=problem):
        configfile.parse(head + text, BrainConfiguration, source="brain.yaml")
    assert configfile.parse(head + "sharding: {shards: 4}", BrainConfiguration, source="x").sharding == Sharding(
        shards=4
    )
