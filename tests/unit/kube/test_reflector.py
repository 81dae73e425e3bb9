"""List, watch, resume and relist against an API server that may be ill or lie."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any

import pytest

from tests.fakes import apiserver
from tests.fakes.apiserver import FakeApiServer, Fault
from tests.unit.kube.recording import Recorder
from vcproxy.kube.client import Client, Limits
from vcproxy.kube.decode import SERVICES
from vcproxy.kube.errors import (
    ApiError,
    BadResponse,
    Forbidden,
    NotFound,
    ServerError,
    Throttled,
    TooLarge,
    Unauthorized,
    Unreachable,
)
from vcproxy.kube.reflector import (
    AT_ONCE,
    RECEIVING,
    Broken,
    Deleted,
    Listed,
    Malformed,
    Recovered,
    Reflector,
    Surroundings,
    Timing,
    Upserted,
)
from vcproxy.kube.shapes import Service

PATH = "/api/v1/services"
LIMITS = Limits(request_seconds=0.6, connect_seconds=0.6, object_bytes=20_000)


def service(name: str, **spec: object) -> dict[str, object]:
    ports = [{"port": 80, "protocol": "TCP"}]
    return {"metadata": {"namespace": "demo", "name": name}, "spec": {"clusterIP": "10.32.0.9", "ports": ports, **spec}}


class Sleeps:
    """Stands in for sleep and the clock: time passes by sleeping only, and at once."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.now = 1000.0

    async def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)
        self.now += seconds
        await asyncio.sleep(0.001)


@asynccontextmanager
async def following(
    api: FakeApiServer,
    recorder: Recorder,
    *,
    limits: Limits = LIMITS,
    page: int = 500,
    stream: bool = False,
    spent: Callable[[], float] = lambda: 0.0,
    **timing: Any,
) -> AsyncIterator[tuple[Reflector[Service], Sleeps]]:
    sleeps = Sleeps()
    async with Client(api.credentials, tenant="acme", limits=limits) as client:
        reflector = Reflector(
            client,
            SERVICES,
            recorder,
            page=page,
            stream=stream,
            timing=Timing(**{"inactivity": 5.0, **timing}),
            surroundings=Surroundings(
                sleep=sleeps, monotonic=lambda: sleeps.now, uniform=lambda low, high: high, spent=spent
            ),
        )
        async with asyncio.TaskGroup() as tasks:
            task = tasks.create_task(reflector.run())
            try:
                yield reflector, sleeps
            finally:
                task.cancel()


def names(listed: Listed[Service]) -> list[str]:
    return [item.metadata.name for item in listed.objects]


async def test_lists_in_pages_and_delivers_once(api: FakeApiServer, recorder: Recorder) -> None:
    for index in range(7):
        api.put("Service", service(f"s{index}"))
    async with following(api, recorder, page=3) as (reflector, _):
        await recorder.until(lambda: bool(recorder.events))
        await api.watching("Service")
    assert names(recorder.of(Listed)[0]) == [f"s{index}" for index in range(7)]
    assert [verb for verb, _, _ in api.requests] == ["list", "list", "list", "watch"]
    assert reflector.synced and reflector.lists == 1 and reflector.last_contact is not None
    query = api.requests[-1][2]
    assert query["resourceVersion"] == "7" and query["allowWatchBookmarks"] == "true"
    assert 300 <= int(query["timeoutSeconds"]) <= 600


async def test_beyond_its_share_of_the_processor_a_tenant_is_not_read(api: FakeApiServer, recorder: Recorder) -> None:
    seconds = itertools.count(0.0, 0.25)  # what each batch takes
    async with following(api, recorder, spent=lambda: next(seconds), share=0.5, saved=0.5) as (_, sleeps):
        await api.watching("Service")
        for number in range(4):
            api.put("Service", service(f"s{number}"))
            await recorder.until(lambda number=number: len(recorder.of(Upserted)) == number + 1)
    # Two batches were saved up; from then on each is waited for, and read all the same.
    assert sleeps.seconds == pytest.approx([0.0, 0.5, 0.5], abs=0.001)


async def test_receiving_counts_by_octets(api: FakeApiServer, recorder: Recorder) -> None:
    async with following(api, recorder, spent=lambda: 0.0, share=1e-6, saved=1e-9) as (_, sleeps):
        await api.watching("Service")
        for number, size in enumerate((1_000, 10_000, 1)):
            api.put("Service", service("web", note="x" * size))
            await recorder.until(lambda number=number: len(recorder.of(Upserted)) == number + 1)
    small, large, *_ = sleeps.seconds
    assert 1_000 * RECEIVING < small * 1e-6 < 2_000 * RECEIVING
    assert 10_000 * RECEIVING < large * 1e-6 < 11_000 * RECEIVING


async def test_changes_arrive_in_order(api: FakeApiServer, recorder: Recorder) -> None:
    async with following(api, recorder):
        await api.watching("Service")
        first = api.put("Service", service("web"))
        api.put("Service", service("web", type="NodePort"))
        api.delete("Service", "demo", "web")
        await recorder.until(lambda: len(recorder.events) == 4)
    assert recorder.events[0] == Listed((), ())
    assert [type(event) for event in recorder.events[1:]] == [Upserted, Upserted, Deleted]
    assert recorder.of(Upserted)[1].object.spec.type == "NodePort"
    assert recorder.events[3] == Deleted(("demo", "web"), first["metadata"]["uid"])


async def test_resumes_where_a_watch_ended(api: FakeApiServer, recorder: Recorder) -> None:
    async with following(api, recorder) as (reflector, _):
        await api.watching("Service")
        for index in range(5):
            api.put("Service", service(f"s{index}"))
            api.end_watches()
        await recorder.until(lambda: len(recorder.of(Upserted)) == 5)
    assert reflector.lists == 1
    assert [event.object.metadata.name for event in recorder.of(Upserted)] == [f"s{index}" for index in range(5)]
    assert not recorder.of(Broken)


async def test_bookmarks_move_the_place_to_resume_from(api: FakeApiServer, recorder: Recorder) -> None:
    async with following(api, recorder):
        await api.watching("Service")
        for index in range(9):
            api.put("Pod", {"metadata": {"namespace": "demo", "name": f"p{index}"}})
        api.bookmark("Service")
        api.end_watches()
        await api.until(lambda: sum(verb == "watch" for verb, _, _ in api.requests) == 2)
    assert api.requests[-1][2]["resourceVersion"] == "9"
    assert recorder.events == [Listed((), ())]


async def test_gone_before_a_watch_is_a_relist_and_no_failure(api: FakeApiServer, recorder: Recorder) -> None:
    async with following(api, recorder):
        await api.watching("Service")
        api.faults.append(Fault(apiserver.fail(500), verb="watch"))
        api.end_watches()
        await recorder.until(lambda: bool(recorder.of(Broken)))
        recorder.events.clear()
        api.put("Service", service("web"))
        api.compact()
        api.faults.clear()
        await recorder.until(lambda: any(names(event) == ["web"] for event in recorder.of(Listed)))
    assert not [event for event in recorder.of(Broken) if event.error.status == 410]


async def test_gone_as_an_error_event_is_a_relist(api: FakeApiServer, recorder: Recorder) -> None:
    async with following(api, recorder) as (reflector, _):
        await api.watching("Service")
        status = {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old resource version"}
        api.send("Service", apiserver.event("ERROR", status))
        await recorder.until(lambda: len(recorder.of(Listed)) == 2)
    assert not recorder.of(Broken)
    assert reflector.broken is None


async def test_etcd_wiped_a_complete_list_is_the_truth(api: FakeApiServer, recorder: Recorder) -> None:
    for index in range(20):
        api.put("Service", service(f"old{index}"))
    async with following(api, recorder) as (reflector, _):
        await api.watching("Service")
        api.wipe()
        api.put("Service", service("new"))
        await api.watching("Service")
        api.bookmark("Service")  # of version 1, while the watch began from 20
        await recorder.until(lambda: len(recorder.of(Listed)) == 2)
        await api.watching("Service")
        api.put("Service", service("newer"))
        await recorder.until(lambda: bool(recorder.of(Upserted)))
    assert names(recorder.of(Listed)[1]) == ["new"]
    assert reflector.resource_version == "2"


def listing(kind: str, version: str) -> bytes:
    return json.dumps({"kind": kind, "metadata": {"resourceVersion": version}, "items": []}).encode()


LIES: list[tuple[str, apiserver.Answer, type[ApiError]]] = [
    ("401", apiserver.fail(401), Unauthorized),
    ("403", apiserver.fail(403), Forbidden),
    ("404", apiserver.fail(404), NotFound),
    ("429", apiserver.fail(429), Throttled),
    ("500", apiserver.fail(500), ServerError),
    ("HTML page with 502", apiserver.html(502), ServerError),
    ("HTML page with 200", apiserver.html(200), BadResponse),
    ("redirect", apiserver.redirect("https://169.254.169.254/"), BadResponse),
    ("truncated JSON", apiserver.body(listing("ServiceList", "9")[:-2]), BadResponse),
    ("empty object", apiserver.body(b"{}"), BadResponse),
    ("a Status with 200", apiserver.body(listing("Status", "9")), BadResponse),
    ("another kind", apiserver.body(listing("PodList", "9")), BadResponse),
    ("no resourceVersion", apiserver.body(listing("ServiceList", "")), BadResponse),
    ("nothing", apiserver.body(b""), BadResponse),
    ("deep JSON", apiserver.body(b'{"a":' * 20_000), BadResponse),
    ("gzip bomb", apiserver.body(b"\x1f\x8b", headers={"Content-Encoding": "gzip"}), BadResponse),
    ("hangs before the head", apiserver.hang(), Unreachable),
    ("hangs within the body", apiserver.stream(b'{"kind":', then="hang"), Unreachable),
    ("drips", apiserver.drip(), Unreachable),
    ("cuts the connection", apiserver.cut(), Unreachable),
    ("cuts the body", apiserver.stream(b'{"kind":', then="cut"), Unreachable),
    ("more than the budget", apiserver.body(b" " * 200_000), TooLarge),
]


@pytest.mark.parametrize(("answer", "expected"), [lie[1:] for lie in LIES], ids=[lie[0] for lie in LIES])
async def test_a_lie_instead_of_a_list_is_never_data(
    api: FakeApiServer, recorder: Recorder, answer: apiserver.Answer, expected: type[ApiError]
) -> None:
    api.put("Service", service("web"))
    async with following(api, recorder, limits=Limits(request_seconds=0.6, page_bytes=150_000)) as (reflector, _):
        await api.watching("Service")
        api.faults.append(Fault(answer, path=PATH, verb="list"))
        api.compact()
        api.send("Service", apiserver.event("ERROR", {"code": 410}))
        await recorder.until(lambda: len(recorder.of(Broken)) >= 2)
        assert reflector.broken is not None
        api.faults.clear()
        await recorder.until(lambda: len(recorder.of(Listed)) == 2)
        await recorder.until(lambda: isinstance(recorder.events[-1], Recovered))
    broken = recorder.of(Broken)
    assert {type(event.error) for event in broken} == {expected}
    assert len({event.since for event in broken}) == 1, "one outage has one beginning"
    assert broken[0].error.tenant == "acme" and broken[0].error.path == PATH
    assert [names(event) for event in recorder.of(Listed)] == [["web"], ["web"]]
    assert reflector.broken is None


@pytest.mark.parametrize(
    ("answer", "expected", "relists"),
    [
        (apiserver.fail(401), Unauthorized, True),
        (apiserver.fail(500), ServerError, True),
        (apiserver.html(200), BadResponse, True),
        (apiserver.stream(b'{"type":"ADDED","obj', then="end"), Unreachable, False),
        (apiserver.stream(b'{"type":"ADDED","obj', then="cut"), Unreachable, False),
        (apiserver.stream(b"<html>\n"), BadResponse, True),
        (apiserver.stream(b'{"type":"SURPRISE","object":{}}\n'), BadResponse, True),
        (apiserver.cut(), Unreachable, False),
        (apiserver.hang(), Unreachable, False),
        (apiserver.fail(429), Throttled, False),
    ],
    ids=["401", "500", "html", "ends in a line", "cut in a line", "no JSON", "no event", "cut", "hang", "429"],
)
async def test_a_broken_watch_resumes_or_relists(
    api: FakeApiServer, recorder: Recorder, answer: apiserver.Answer, expected: type[ApiError], relists: bool
) -> None:
    async with following(api, recorder, resume_within=1e9) as (reflector, _):
        await api.watching("Service")
        api.faults.append(Fault(answer, path=PATH, verb="watch"))
        api.end_watches()
        await recorder.until(lambda: bool(recorder.of(Broken)))
        api.faults.clear()
        await recorder.until(lambda: bool(recorder.of(Recovered)) and reflector.broken is None)
        await api.watching("Service")
        api.put("Service", service("web"))
        await recorder.until(lambda: bool(recorder.of(Upserted)))
    assert {type(event.error) for event in recorder.of(Broken)} == {expected}
    assert (reflector.lists > 1) == relists


@pytest.mark.parametrize(
    "answer", [apiserver.stream(then="hang"), apiserver.drip(b" ")], ids=["says nothing", "drips a line"]
)
async def test_a_silent_watch_is_a_failure_and_a_relist(
    api: FakeApiServer, recorder: Recorder, answer: apiserver.Answer
) -> None:
    api.faults.append(Fault(answer, path=PATH, verb="watch", times=1))
    async with following(api, recorder, inactivity=0.05):
        await recorder.until(lambda: len(recorder.of(Listed)) == 2)
    broken = recorder.of(Broken)[0]
    assert isinstance(broken.error, Unreachable) and "said nothing for 0.05 s" in str(broken.error)


async def test_a_short_interruption_is_resumed(recorder: Recorder) -> None:
    async with FakeApiServer() as api, following(api, recorder, resume_within=1e9) as (reflector, sleeps):
        await api.watching("Service")
        await api.stop()
        await recorder.until(lambda: len(recorder.of(Broken)) >= 4)
        contact = reflector.last_contact
        assert [event for event in recorder.events if not isinstance(event, Broken)] == [Listed((), ())]
        await api.start(api.port)
        api.put("Service", service("web"))
        await recorder.until(lambda: bool(recorder.of(Upserted)))
        assert reflector.last_contact is not None and contact is not None and reflector.last_contact > contact
    assert reflector.lists == 1
    assert recorder.of(Recovered)
    waits = sleeps.seconds
    assert waits == sorted(waits) and waits[0] == 0.5 and waits[-1] <= 60, "delays double from 0.5 s to a minute"


@pytest.mark.parametrize(("wait", "lists"), [(1.5, 1), (2.5, 2)])
async def test_the_wait_before_the_next_attempt_counts_as_interruption(
    api: FakeApiServer, recorder: Recorder, wait: float, lists: int
) -> None:
    api.faults.append(Fault(apiserver.stream(b"{", then="cut"), verb="watch", times=1))
    async with following(api, recorder, resume_within=2.0, backoff_base=wait) as (reflector, _):
        await recorder.until(lambda: bool(recorder.of(Recovered)))
        await api.watching("Service")
    assert reflector.lists == lists


async def test_after_a_longer_one_the_list_is_the_truth(recorder: Recorder) -> None:
    """An etcd that lost its disk, and has counted past our resourceVersion by the time it can be reached again."""
    async with FakeApiServer() as api:
        api.put("Service", service("old"))
        async with following(api, recorder, resume_within=0):
            await api.watching("Service")
            await api.stop()
            await recorder.until(lambda: bool(recorder.of(Broken)))
            api.wipe()
            for index in range(9):
                api.put("Pod", {"metadata": {"namespace": "demo", "name": f"p{index}"}})
            await api.start(api.port)
            await recorder.until(lambda: bool(recorder.of(Recovered)))
    # A busy machine may take longer for an answer than this client waits: then there are more lists.
    lists = [names(event) for event in recorder.of(Listed)]
    assert (lists[0], lists[-1]) == (["old"], [])


async def test_a_server_that_ends_every_watch_at_once_is_asked_ever_more_rarely(
    api: FakeApiServer, recorder: Recorder
) -> None:
    api.faults.append(Fault(apiserver.stream(), verb="watch"))
    async with following(api, recorder) as (_, sleeps):
        await api.until(lambda: sum(verb == "watch" for verb, _, _ in api.requests) == 10)
    assert sleeps.seconds[:9] == [0.5, 1, 2, 4, 8, 16, 32, 60, 60]


async def test_retry_after_is_honoured(api: FakeApiServer, recorder: Recorder) -> None:
    api.faults.append(Fault(apiserver.fail(429, Retry_After="7"), verb="list", times=1))
    async with following(api, recorder) as (_, sleeps):
        await recorder.until(lambda: bool(recorder.of(Listed)))
    assert sleeps.seconds[0] == 7


async def test_retry_ends_the_wait(api: FakeApiServer, recorder: Recorder) -> None:
    """The next attempt is made at once, and again only once; without a wait nothing happens."""
    api.faults.append(Fault(apiserver.fail(401), verb="list"))
    asleep, sleeping = asyncio.Event(), asyncio.Event()

    async def sleep(seconds: float) -> None:
        asleep.set()
        await sleeping.wait()

    async with Client(api.credentials, tenant="acme", limits=LIMITS) as client:
        reflector = Reflector(client, SERVICES, recorder, surroundings=Surroundings(sleep=sleep))
        reflector.retry()
        async with asyncio.TaskGroup() as tasks:
            task = tasks.create_task(reflector.run())
            for tried in (1, 2):
                await asleep.wait()
                assert len(api.requests) == tried
                asleep.clear()
                reflector.retry()
            await asleep.wait()
            api.faults.clear()
            reflector.retry()
            await recorder.until(lambda: bool(recorder.of(Recovered)))
            task.cancel()
    assert [verb for verb, *_ in api.requests] == ["list", "list", "list", "list", "watch"]


async def test_health_for_a_while_makes_delays_short_again(api: FakeApiServer, recorder: Recorder) -> None:
    api.faults.append(Fault(apiserver.fail(500), verb="list", times=5))
    async with following(api, recorder, healthy_after=0.0) as (_, sleeps):
        await api.watching("Service")
        await api.stop()
        await recorder.until(lambda: len(recorder.of(Broken)) >= 6)
    assert sleeps.seconds[:6] == [0.5, 1, 2, 4, 8, 0.5]


async def test_one_malformed_object_of_a_list_costs_itself_only(api: FakeApiServer, recorder: Recorder) -> None:
    for index in range(5):
        api.put("Service", service(f"s{index}", **({"ports": "all of them"} if index == 2 else {})))
    async with following(api, recorder):
        await recorder.until(lambda: bool(recorder.of(Listed)))
    listed = recorder.of(Listed)[0]
    assert names(listed) == ["s0", "s1", "s3", "s4"]
    (error,) = listed.errors
    assert error.key == ("demo", "s2") and error.field == "$.spec.ports"
    assert str(error) == "tenant acme: Service demo/s2: $.spec.ports: Expected `array`, got `str`"


async def test_who_may_list_but_not_watch_stays_broken_and_is_polled(api: FakeApiServer, recorder: Recorder) -> None:
    api.faults.append(Fault(apiserver.fail(403), verb="watch"))
    async with following(api, recorder):
        await recorder.until(lambda: len(recorder.of(Listed)) == 4)
    assert not recorder.of(Recovered)
    assert len({event.since for event in recorder.of(Broken)}) == 1


async def test_malformed_and_oversized_events_leave_the_watch_going(api: FakeApiServer, recorder: Recorder) -> None:
    async with following(api, recorder) as (reflector, _):
        await api.watching("Service")
        api.put("Service", service("bad", clusterIP=7))
        api.put("Service", service("huge", externalName="x" * 50_000))
        api.put("Service", service("good"))
        api.delete("Service", "demo", "bad")
        await recorder.until(lambda: bool(recorder.of(Deleted)))
    assert [event.error.key for event in recorder.of(Malformed)] == [("demo", "bad"), ("demo", "huge")]
    assert [event.object.metadata.name for event in recorder.of(Upserted)] == ["good"]
    assert reflector.resource_version == "4" and reflector.lists == 1


async def test_paging_slower_than_history_lists_in_one_page(api: FakeApiServer, recorder: Recorder) -> None:
    for index in range(6):
        api.put("Service", service(f"s{index}"))
    api.faults.append(Fault(apiserver.fail(410), path=PATH, verb="list", times=1))
    async with following(api, recorder, page=2):
        await recorder.until(lambda: bool(recorder.of(Listed)))
    assert [query.get("limit") for verb, _, query in api.requests if verb == "list"] == ["2", None]
    assert len(recorder.of(Listed)[0].objects) == 6


async def test_a_flood_of_one_tenant_leaves_time_for_others(api: FakeApiServer, recorder: Recorder) -> None:
    """The loop turns after a few lines, however many are waiting."""
    async with following(api, recorder):
        await api.watching("Service")
        for index in range(3000):
            api.put("Service", service(f"s{index}"))
        seen = [0]
        while seen[-1] < 3000:
            await asyncio.sleep(0)
            seen.append(len(recorder.of(Upserted)))
    assert max(after - before for before, after in pairwise(seen)) <= AT_ONCE
