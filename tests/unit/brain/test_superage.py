"""How new it is what a brain knows of the super cluster: counted as all replicas count, and found out when in doubt."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.apiserver import FakeApiServer
from tests.unit.brain.polling import settle, until
from vcproxy.brain import overtaking, superage
from vcproxy.brain.config import SuperCluster
from vcproxy.brain.superaccess import SuperAccess
from vcproxy.brain.superage import MOST_PLACES, SuperAge
from vcproxy.kube.decode import NODES, PODS, Resource
from vcproxy.kube.reflector import Listed, Recovered
from vcproxy.model.mark import Position, lacking

POD = {"apiVersion": "v1", "kind": "Pod", "metadata": {"namespace": "default", "name": "p"}}


@pytest.fixture(autouse=True)
def nobody_waits_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overtaking, "OVERTAKEN_SECONDS", 0.02)
    monkeypatch.setattr(superage, "LISTS_APART_SECONDS", 0.05)


class Following:
    def __init__(self, access: SuperAccess) -> None:
        self.age = access.age
        self.announced = 0
        self.age.announce = self._announce

    def _announce(self) -> None:
        self.announced += 1


@asynccontextmanager
async def following(
    api: FakeApiServer, directory: Path, resources: Sequence[Resource[Any]] = (PODS, NODES)
) -> AsyncIterator[Following]:
    """A brain's view of a super cluster."""
    (directory / "super").write_bytes(api.kubeconfig())
    access = SuperAccess(SuperCluster(kubeconfig=str(directory / "super")))
    made = access.input(resources)
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(made.run(lambda kind, event: None)), group.create_task(access.age.run())]
        await until(lambda: len(access.age.mark()) == len(resources))
        yield Following(access)
        for task in tasks:
            task.cancel()


async def test_two_that_follow_one_api_server_count_alike(tmp_path: Path) -> None:
    async with FakeApiServer() as api:
        api.put("Pod", POD)
        async with following(api, tmp_path) as one:
            await api.watching("Pod")
            api.put("Pod", {**POD, "metadata": {**POD["metadata"], "labels": {"a": "b"}}})  # type: ignore[dict-item]
            await until(lambda: one.age.mark()[PODS.path].changed == api.resource_version)
            async with following(api, tmp_path) as other:
                # A list may be of deletions that nobody else was told of yet: until a bookmark nobody is as new.
                await api.watching("Node", 2)
                api.bookmark("Node")
                await until(lambda: lacking(one.age.mark(), other.age.mark()) == {})
                assert lacking(other.age.mark(), one.age.mark()) == {}


async def test_a_bookmark_says_that_nothing_happened(tmp_path: Path) -> None:
    async with FakeApiServer() as api, following(api, tmp_path) as one:
        await api.watching("Pod")
        before = one.age.mark()[PODS.path]
        api.put("Node", {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n"}})
        api.bookmark("Pod")
        await until(lambda: one.age.mark()[PODS.path].seen > before.seen)
        assert one.age.mark()[PODS.path].changed == before.changed


async def test_who_lags_by_little_catches_up_by_waiting(tmp_path: Path) -> None:
    async with FakeApiServer() as api, following(api, tmp_path) as one:
        await api.watching("Pod")
        version = api.resource_version + 1
        lists = [request for request in api.requests if request[0] == "list"]
        one.age.overtaken({PODS.path: Position(version, version)})
        api.put("Pod", POD)
        await until(lambda: one.announced)
        assert [request for request in api.requests if request[0] == "list"] == lists


async def test_who_lags_lists_again_and_is_believed(tmp_path: Path) -> None:
    """The version that a node has is one that this API server never had: its history was rewritten."""
    async with FakeApiServer() as api, following(api, tmp_path) as one:
        ahead = {PODS.path: Position(api.resource_version + 1000, api.resource_version + 1000)}
        one.age.overtaken(ahead)
        await until(lambda: one.announced)
        assert one.age.mark()[PODS.path].epoch > 0
        assert lacking(one.age.mark(), ahead) == {}


async def test_an_api_server_that_is_away_leaves_it_behind(tmp_path: Path) -> None:
    async with FakeApiServer() as api, following(api, tmp_path) as one:
        ahead = {PODS.path: Position(api.resource_version + 1000, api.resource_version + 1000)}
        await api.stop()
        one.age.overtaken(ahead)
        await settle(200)
        assert not one.announced
        assert lacking(one.age.mark(), ahead) == ahead


def test_of_many_namespaces_the_first_are_spoken_of() -> None:
    age = SuperAge(lambda: ())
    for number in range(MOST_PLACES + 5):
        age.told(f"/api/v1/namespaces/n{number}/pods", Listed((), ()), "7")
    age.told("/api/v1/secrets", Listed((), ()), "7")
    age.told(PODS.path, Recovered(), "8")
    assert len(age.mark()) == MOST_PLACES


def test_of_two_that_follow_one_collection_the_slower_one_says_nothing() -> None:
    age = SuperAge(lambda: ())
    age.told(PODS.path, Listed((), ()), "9")
    age.told(PODS.path, Listed((), ()), "7")
    assert age.mark() == {PODS.path: Position(9, 9)}


def test_a_version_that_is_no_number_leaves_a_place_without_position() -> None:
    age = SuperAge(lambda: ())
    age.told(PODS.path, Listed((), ()), "7")
    age.told(NODES.path, Listed((), ()), "9")
    age.told(NODES.path, Listed((), ()), "opaque")
    assert age.mark() == {PODS.path: Position(7, 7)}
