"""Events: what is written, and that nothing which goes wrong with them concerns anybody."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import msgspec
import pytest
from structlog.testing import capture_logs

from tests.fakes.apiserver import FakeApiServer, Fault, fail
from vcproxy.kube.errors import KubeconfigError
from vcproxy.kube.kubeconfig import Credentials
from vcproxy.ops.events import WAITING, Event, EventRecorder

STARTING = Event("Node", "", "one", "Normal", "Starting", "StartKubeProxy")
FAILED = Event(
    "Service", "shop", "web", "Warning", "FailedToStartServiceHealthcheck", "Listen", "node one failed to start"
)
EVENTS = "/apis/events.k8s.io/v1/events"
NAMESPACED = "/apis/events.k8s.io/v1/namespaces"


@pytest.fixture
async def api() -> AsyncIterator[FakeApiServer]:
    async with FakeApiServer() as server:
        yield server


@asynccontextmanager
async def recording(credentials: Callable[[], Credentials], **options: float) -> AsyncIterator[EventRecorder]:
    recorder = EventRecorder(credentials, host="one", pause=0.0, **{"retry": 0.01, **options})
    async with asyncio.TaskGroup() as group:
        task = group.create_task(recorder.run())
        yield recorder
        task.cancel()


async def written(api: FakeApiServer, count: int) -> list[dict[str, object]]:
    async with asyncio.timeout(10):
        while len(found := api.objects("Event", path=EVENTS)) < count:  # noqa: ASYNC110 - the write has no event of ours
            await asyncio.sleep(0.005)
    return found


async def test_an_event_is_written_as_kube_proxys(api: FakeApiServer) -> None:
    async with recording(lambda: api.credentials) as recorder:
        recorder.emit(STARTING)
        recorder.emit(FAILED)
        node, service = await written(api, 2)
    assert node["metadata"]["name"].startswith("one.")
    assert node["metadata"]["namespace"] == "default", "where Events about cluster-scoped objects live"
    assert node["regarding"] == {"apiVersion": "v1", "kind": "Node", "name": "one"}
    assert (node["type"], node["reason"], node["action"], node["note"]) == ("Normal", "Starting", "StartKubeProxy", "")
    assert (node["reportingController"], node["reportingInstance"]) == ("vcproxy", "vcproxy-one")
    assert service["metadata"]["namespace"] == "shop"
    assert service["regarding"] == {"apiVersion": "v1", "kind": "Service", "namespace": "shop", "name": "web"}
    assert service["note"] == "node one failed to start"


async def test_what_was_just_said_is_not_said_again(api: FakeApiServer) -> None:
    now = 0.0
    async with recording(lambda: api.credentials, clock=lambda: now) as recorder:
        for _ in range(3):
            recorder.emit(STARTING)
        now = 359.0
        recorder.emit(STARTING)
        recorder.emit(FAILED)
        await written(api, 2)
        now = 361.0
        recorder.emit(STARTING)
        assert len(await written(api, 3)) == 3


async def test_too_many_are_lost_and_nobody_waits(api: FakeApiServer) -> None:
    recorder = EventRecorder(lambda: api.credentials, host="one", pause=0.0)
    for number in range(10 * WAITING):
        recorder.emit(msgspec.structs.replace(FAILED, name=f"web-{number}"))
    async with asyncio.TaskGroup() as group:
        task = group.create_task(recorder.run())
        await written(api, WAITING)
        recorder.emit(STARTING)
        assert len(await written(api, WAITING + 1)) == WAITING + 1
        task.cancel()


@pytest.mark.parametrize("status", [500, 503, 429])
async def test_a_server_that_cannot_now_is_asked_again(api: FakeApiServer, status: int) -> None:
    api.faults.append(Fault(fail(status), path=NAMESPACED, times=3))
    async with recording(lambda: api.credentials) as recorder:
        recorder.emit(STARTING)
        assert len(await written(api, 1)) == 1
    assert sum(verb == "POST" for verb, _, _ in api.requests) == 4


def no_kubeconfig() -> Credentials:
    raise KubeconfigError("users", "there is none", cure="write one")


def defect() -> Credentials:
    raise RuntimeError("a defect of ours")


@pytest.mark.parametrize("status", [401, 403, 404])
async def test_without_rights_there_is_one_warning_and_no_end(api: FakeApiServer, status: int) -> None:
    api.faults.append(Fault(fail(status), path=NAMESPACED))
    with capture_logs() as logs:
        async with recording(lambda: api.credentials) as recorder:
            for number in range(5):
                recorder.emit(msgspec.structs.replace(FAILED, name=f"web-{number}"))
            async with asyncio.timeout(10):
                await api.until(lambda: len(api.requests) >= 5)
            api.faults.clear()
            recorder.emit(STARTING)
            await written(api, 1)
    assert [line["log_level"] for line in logs] == ["warning"]
    assert "allow create" in logs[0]["cure"]


@pytest.mark.parametrize("credentials", [no_kubeconfig, defect])
async def test_whatever_goes_wrong_the_writer_goes_on(
    api: FakeApiServer, credentials: Callable[[], Credentials]
) -> None:
    broken = [credentials]
    with capture_logs() as logs:
        async with recording(lambda: broken.pop()() if broken else api.credentials) as recorder:
            recorder.emit(FAILED)
            recorder.emit(STARTING)
            (found,) = await written(api, 1)
    assert found["reason"] == "Starting"
    assert len(logs) == 1
