"""A reflector that asks for its lists as streams: of servers that have them, have none, are ill, or lie."""

from __future__ import annotations

import asyncio
import itertools

import pytest
from aiohttp import web

from tests.fakes import apiserver
from tests.fakes.apiserver import FakeApiServer, Fault, end_of_list, event
from tests.unit.kube.recording import Recorder
from tests.unit.kube.test_reflector import LIMITS, PATH, following, names, service
from vcproxy.kube.client import Limits
from vcproxy.kube.errors import (
    ApiError,
    BadResponse,
    Forbidden,
    Gone,
    NotFound,
    ServerError,
    Throttled,
    TooLarge,
    Unauthorized,
    Unreachable,
)
from vcproxy.kube.reflector import Broken, Deleted, Listed, Malformed, Recovered, Upserted

SMALL = Limits(
    request_seconds=1.0,
    stalled_seconds=0.1,
    list_seconds=1.0,
    object_bytes=2_000,
    page_bytes=150_000,
    list_bytes=100_000,
    list_objects=500,
)


def asked(api: FakeApiServer) -> list[str]:
    """What was asked for: "list", "watch", or "stream" for both at once."""
    return ["stream" if "sendInitialEvents" in query else verb for verb, _, query in api.requests]


async def test_one_request_is_a_list_and_the_watch_after_it(api: FakeApiServer, recorder: Recorder) -> None:
    stored = [api.put("Service", service(f"s{index}")) for index in range(7)]
    async with following(api, recorder, stream=True) as (reflector, sleeps):
        await recorder.until(lambda: bool(recorder.of(Listed)))
        assert reflector.synced and reflector.lists == 1 and reflector.resource_version == "7"
        assert reflector.last_contact is not None
        api.put("Service", service("more"))
        api.delete("Service", "demo", "s0")
        await recorder.until(lambda: bool(recorder.of(Deleted)))
    assert names(recorder.of(Listed)[0]) == [f"s{index}" for index in range(7)]
    assert [type(found) for found in recorder.events] == [Listed, Upserted, Deleted]
    assert recorder.events[2] == Deleted(("demo", "s0"), stored[0]["metadata"]["uid"])
    [(verb, path, query)] = api.requests
    assert (verb, path) == ("watch", PATH)
    assert query["sendInitialEvents"] == "true" and query["resourceVersionMatch"] == "NotOlderThan"
    assert query["allowWatchBookmarks"] == "true" and "resourceVersion" not in query and query["labelSelector"]
    assert 300 <= int(query["timeoutSeconds"]) <= 600
    assert not sleeps.seconds


async def test_nothing_is_an_empty_list(api: FakeApiServer, recorder: Recorder) -> None:
    async with following(api, recorder, stream=True):
        await recorder.until(lambda: bool(recorder.events))
    assert recorder.events == [Listed((), ())]


async def test_where_it_ended_a_watch_goes_on_and_a_list_is_a_stream_again(
    api: FakeApiServer, recorder: Recorder
) -> None:
    api.put("Service", service("a"))
    async with following(api, recorder, stream=True, healthy_after=0.0) as (reflector, _):
        await recorder.until(lambda: bool(recorder.of(Listed)))
        api.end_watches()
        await api.watching("Service")
        api.send("Service", event("ERROR", {"code": 410}))
        await recorder.until(lambda: reflector.lists == 2)
    assert asked(api) == ["stream", "watch", "stream"]
    assert api.requests[1][2]["resourceVersion"] == "1"
    assert not recorder.of(Broken)


async def test_a_lower_version_than_before_is_the_truth_too(api: FakeApiServer, recorder: Recorder) -> None:
    for index in range(20):
        api.put("Service", service(f"old{index}"))
    async with following(api, recorder, stream=True) as (reflector, _):
        await recorder.until(lambda: bool(recorder.of(Listed)))
        await api.watching("Service")
        api.wipe()
        api.put("Service", service("new"))
        await api.watching("Service")
        api.bookmark("Service")
        await recorder.until(lambda: len(recorder.of(Listed)) == 2)
    assert names(recorder.of(Listed)[1]) == ["new"] and reflector.resource_version == "1"


async def test_wrong_shapes_are_errors_of_the_list(api: FakeApiServer, recorder: Recorder) -> None:
    api.put("Service", service("good"))
    api.put("Service", service("bad", ports="none"))
    async with following(api, recorder, stream=True):
        await recorder.until(lambda: bool(recorder.of(Listed)))
    [listed] = recorder.of(Listed)
    assert names(listed) == ["good"] and [error.key for error in listed.errors] == [("demo", "bad")]
    assert not recorder.of(Malformed)


async def test_what_follows_the_end_in_the_same_breath_is_a_change(api: FakeApiServer, recorder: Recorder) -> None:
    first, second = ({**service(name), "metadata": {"name": name, "resourceVersion": "9"}} for name in "ab")
    answer = apiserver.stream(event("ADDED", first) + end_of_list("Service", 8) + event("ADDED", second), then="hang")
    api.faults.append(Fault(answer))
    async with following(api, recorder, stream=True) as (reflector, _):
        await recorder.until(lambda: bool(recorder.of(Upserted)))
    assert [type(found) for found in recorder.events] == [Listed, Upserted]
    assert names(recorder.of(Listed)[0]) == ["a"] and recorder.of(Upserted)[0].object.metadata.name == "b"
    assert reflector.resource_version == "9"


# --- servers that have no such list: pages at once, for good, and no failure ---------------------------------------

HEAD = event("ADDED", {"metadata": {"namespace": "demo", "name": "lie", "resourceVersion": "1"}})


def marked() -> bytes:
    return event("BOOKMARK", {"kind": "Service", "metadata": {"resourceVersion": "9"}})


UNSERVED: dict[str, apiserver.Answer] = {
    "off, or before 1.27": apiserver.fail(422),
    "bad request": apiserver.fail(400),
    "no such method": apiserver.fail(405),
    "another bookmark": apiserver.stream(HEAD, marked(), then="hang"),
    "etcd knows no progress": apiserver.stream(event("ERROR", {"code": 500, "message": "feature"}), then="hang"),
    "objects and no end": apiserver.stream(HEAD, then="hang"),
    "silence": apiserver.stream(then="hang"),
    "a line without an end": apiserver.stream(b"x" * 9_000, then="hang"),
    "changes for ever": apiserver.drip(HEAD, every=0.02),
    "drips a line": apiserver.drip(b" "),
}


@pytest.mark.parametrize("answer", UNSERVED.values(), ids=UNSERVED.keys())
async def test_who_has_no_such_list_is_asked_for_pages(
    api: FakeApiServer, recorder: Recorder, answer: apiserver.Answer
) -> None:
    api.put("Service", service("web"))
    api.faults.append(Fault(answer, verb="watch", times=1))
    async with following(api, recorder, limits=SMALL, stream=True, healthy_after=0.0) as (_, sleeps):
        await recorder.until(lambda: bool(recorder.of(Listed)))
        await api.watching("Service")
        api.send("Service", event("ERROR", {"code": 410}))
        await recorder.until(lambda: len(recorder.of(Listed)) == 2)
        await api.until(lambda: len(api.requests) == 5)
    assert asked(api) == ["stream", "list", "watch", "list", "watch"]
    assert recorder.events == [recorder.of(Listed)[0]] * 2 and names(recorder.of(Listed)[0]) == ["web"]
    assert not sleeps.seconds


@pytest.mark.parametrize("how", ["refused", "ignored"])
async def test_the_two_kinds_of_such_servers(api: FakeApiServer, recorder: Recorder, how: str) -> None:
    api.watch_list = how  # type: ignore[assignment]
    api.put("Service", service("web"))
    async with following(api, recorder, limits=SMALL, stream=True):
        await recorder.until(lambda: bool(recorder.of(Listed)))
        await api.until(lambda: len(api.requests) == 3)
    assert asked(api) == ["stream", "list", "watch"] and recorder.events == recorder.of(Listed)


# --- anything else is a failure, and never data --------------------------------------------------------------------


def endless(size: int, *, names: int = 1 << 30) -> apiserver.Answer:
    """One object after the other."""

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        for number in itertools.count(0, 50):
            found = ({"name": f"n{each % names}", "x": "x" * size} for each in range(number, number + 50))
            await response.write(b"".join(event("ADDED", {"metadata": metadata}) for metadata in found))
            await asyncio.sleep(0)  # one loop for both: else it writes until a buffer is full
        raise AssertionError

    return answer


REFUSED: dict[str, tuple[apiserver.Answer, type[ApiError]]] = {
    "401": (apiserver.fail(401), Unauthorized),
    "403": (apiserver.fail(403), Forbidden),
    "404": (apiserver.fail(404), NotFound),
    "429": (apiserver.fail(429), Throttled),
    "hangs": (apiserver.hang(), Unreachable),
}
NO_LIST: dict[str, tuple[apiserver.Answer, type[ApiError]]] = {
    "500": (apiserver.fail(500), ServerError),
    "410": (apiserver.fail(410), Gone),
    "html, 502": (apiserver.html(502), ServerError),
    "html, 200": (apiserver.html(200), BadResponse),
    "redirect": (apiserver.redirect("https://169.254.169.254/"), BadResponse),
    "compressed": (apiserver.body(b"\x1f\x8b", headers={"Content-Encoding": "gzip"}), BadResponse),
    "ends": (apiserver.stream(), Unreachable),
    "ends after an object": (apiserver.stream(HEAD), Unreachable),
    "ends within a line": (apiserver.stream(HEAD, HEAD[:-20]), Unreachable),
    "cuts": (apiserver.stream(HEAD, then="cut"), Unreachable),
    "no JSON": (apiserver.stream(HEAD, b"<html>\n", then="hang"), BadResponse),
    "a list": (apiserver.body(b'{"kind":"ServiceList","metadata":{"resourceVersion":"9"},"items":[]}\n'), BadResponse),
    "no event": (apiserver.stream(HEAD, event("SURPRISE", {}), then="hang"), BadResponse),
    "the end of another kind": (apiserver.stream(HEAD, end_of_list("Pod", 9), then="hang"), BadResponse),
    "the end without a version": (apiserver.stream(HEAD, end_of_list("Service", ""), then="hang"), BadResponse),
    "gone": (apiserver.stream(HEAD, event("ERROR", {"code": 410}), then="hang"), Gone),
    "too many requests": (apiserver.stream(event("ERROR", {"code": 429}), then="hang"), Throttled),
    "too large a version": (apiserver.stream(event("ERROR", {"code": 504}), then="hang"), ServerError),
    "endless objects": (endless(0), TooLarge),
    "endless octets": (endless(1_500), TooLarge),
    "the same object for ever": (endless(0, names=1), TooLarge),
}
LIES = [(name, *lie, "stream") for name, lie in REFUSED.items()] + [
    (name, *lie, "list") for name, lie in NO_LIST.items()
]


@pytest.mark.parametrize(("answer", "expected", "then"), [lie[1:] for lie in LIES], ids=[lie[0] for lie in LIES])
async def test_a_lie_instead_of_a_stream_is_never_data(
    api: FakeApiServer, recorder: Recorder, answer: apiserver.Answer, expected: type[ApiError], then: str
) -> None:
    """The next attempt, after a wait: a stream again if there was no answer, else pages; and later a stream again."""
    api.put("Service", service("web"))
    async with following(api, recorder, limits=SMALL, stream=True) as (reflector, sleeps):
        await recorder.until(lambda: bool(recorder.of(Listed)))
        await api.watching("Service")
        api.faults.append(Fault(answer, path=PATH, verb="watch", times=1))
        api.send("Service", event("ERROR", {"code": 410}))
        await recorder.until(lambda: bool(recorder.of(Broken)))
        await recorder.until(lambda: bool(recorder.of(Recovered)))
        await api.watching("Service")
        api.send("Service", event("ERROR", {"code": 410}))
        await recorder.until(lambda: reflector.lists == 3)
    assert [type(found.error) for found in recorder.of(Broken)] == [expected], recorder.of(Broken)
    assert recorder.of(Broken)[0].error.path == PATH
    kinds = [type(found) for found in recorder.events]
    assert kinds == [Listed, Broken, Listed, Recovered, Listed]
    assert [names(found) for found in recorder.of(Listed)] == [["web"]] * 3
    between = ["list", "watch"] if then == "list" else ["stream"]
    assert asked(api) == ["stream", "stream", *between, "stream"]
    assert sleeps.seconds == [0.5, 1, 2]  # after the first 410, the lie, and the second 410


async def test_while_it_fails_pages_and_streams_take_turns_ever_more_rarely(
    api: FakeApiServer, recorder: Recorder
) -> None:
    api.faults += [Fault(apiserver.stream(HEAD), verb="watch"), Fault(apiserver.fail(500), verb="list")]
    async with following(api, recorder, stream=True) as (_, sleeps):
        await api.until(lambda: len(api.requests) == 7)
        assert sleeps.seconds[:6] == [0.5, 1, 2, 4, 8, 16]
        api.faults.clear()
        await recorder.until(lambda: bool(recorder.of(Listed)))
    assert asked(api)[:7] == ["stream"] + ["list"] * 6
    assert not any(isinstance(found, Listed) for found in recorder.events[:6])


async def test_credentials_that_may_list_but_not_watch_are_broken(api: FakeApiServer, recorder: Recorder) -> None:
    api.faults.append(Fault(apiserver.fail(403), verb="watch"))
    async with following(api, recorder, stream=True) as (reflector, _):
        await recorder.until(lambda: len(recorder.of(Broken)) == 3)
    assert not reflector.synced


async def test_a_stream_is_given_up_when_nobody_reads_on(api: FakeApiServer, recorder: Recorder) -> None:
    """The connection is closed, not left to fill a buffer."""
    left = asyncio.Event()

    async def answer(request: web.Request) -> web.StreamResponse:
        try:
            return await endless(100)(request)
        finally:
            left.set()

    api.faults.append(Fault(answer, verb="watch", times=1))
    async with following(api, recorder, limits=SMALL, stream=True):
        await recorder.until(lambda: bool(recorder.of(Listed)))
        async with asyncio.timeout(5):
            await left.wait()
    assert LIMITS.stalled_seconds == 10
