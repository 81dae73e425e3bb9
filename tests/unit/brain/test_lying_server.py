"""A tenant's API server that lies in every way one can think of: nothing breaks, nothing grows, and the truth is found.

The lies are drawn by hypothesis: answers that are none, lists without an end, be it in pages or streams, slow drips,
redirects, TLS that is none, and watch events made of real objects in which any field may be anything, whose order and
resourceVersions make no sense. The server then stops lying and says 410, as a server does whose history is another's:
what the brain holds must be, port for port, what the API has.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import gc
import json
from typing import Any

import msgspec
import pytest
from aiohttp import web
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.fakes import apiserver
from tests.fakes.apiserver import FakeApiServer, Fault
from tests.unit.brain.polling import settle, until
from vcproxy.brain.announcer import REMEMBERED, WAITING, Announcer
from vcproxy.brain.compiler import MAX_RECORDED, compile_service
from vcproxy.brain.feed import Feed
from vcproxy.brain.guard import Limits, Policy
from vcproxy.brain.inputs import TENANT_KINDS, ApiInput
from vcproxy.brain.store import Store
from vcproxy.kube import shapes
from vcproxy.kube.client import Limits as ClientLimits
from vcproxy.kube.reflector import Timing
from vcproxy.model.addresses import parse_prefix
from vcproxy.model.tenant import Tenant, TenantModel

UID = "acme"
POLICY = Policy(virtual_ip_ranges=(parse_prefix("10.32.0.0/16"),), deny_nodes=False, deny_other_pods=False)
CLIENT = ClientLimits(
    object_bytes=20_000,
    page_bytes=100_000,
    list_bytes=300_000,
    list_objects=2_000,
    request_seconds=0.2,
    stalled_seconds=0.1,
    list_seconds=2,
)
TIMING = Timing(inactivity=0.5, backoff_base=0.005, backoff_cap=0.02, healthy_after=0.0, share=1.0, saved=10.0)
KINDS = ("Service", "EndpointSlice", "ServiceCIDR")


def a_service(number: int) -> dict[str, Any]:
    """A Service as an API server has it."""
    return {
        "metadata": {"name": f"s{number}", "namespace": "default", "labels": {"app": "web"}},
        "spec": {
            "type": "ClusterIP",
            "clusterIP": f"10.32.0.{number + 1}",
            "clusterIPs": [f"10.32.0.{number + 1}"],
            "ipFamilies": ["IPv4"],
            "ports": [{"name": "http", "port": 80, "protocol": "TCP", "targetPort": 8080}],
            "sessionAffinity": "None",
        },
        "status": {"loadBalancer": {}},
    }


def a_slice(number: int) -> dict[str, Any]:
    """Its EndpointSlice."""
    return {
        "metadata": {
            "name": f"s{number}-1",
            "namespace": "default",
            "labels": {"kubernetes.io/service-name": f"s{number}"},
        },
        "addressType": "IPv4",
        "endpoints": [{"addresses": [f"10.244.0.{number + 1}"], "conditions": {"ready": True}, "nodeName": "n1"}],
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
    }


def endless() -> apiserver.Answer:
    """A list whose pages never end, each with other objects."""
    pages = iter(range(1 << 30))

    async def answer(request: web.Request) -> web.StreamResponse:
        page = next(pages)
        items = [{"metadata": {"name": f"e{page}-{at}", "namespace": "default"}, "spec": {}} for at in range(100)]
        for kind, (path, _) in {"Service": ("services", 0), "EndpointSlice": ("endpointslices", 0)}.items():
            if request.path.endswith(path):
                metadata = {"resourceVersion": "7", "continue": f"more-{page}"}
                said = {"kind": f"{kind}List", "metadata": metadata, "items": items}
                return web.Response(body=json.dumps(said).encode(), content_type="application/json")
        return apiserver.failure(404, "no")

    return answer


def endless_stream() -> apiserver.Answer:
    """A watch that begins with more objects than anybody takes for a list; as a watch it must end some time, or there
    would be no end of lying.
    """

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            for number in range(5_000):
                metadata = {"name": f"e{number}", "namespace": "default"}
                await response.write(apiserver.event("ADDED", {"metadata": metadata, "spec": {}}))
                await asyncio.sleep(0)
        return response

    return answer


ENDS = {kind: apiserver.end_of_list(kind, 7) for kind in KINDS}
LIE = apiserver.event("ADDED", {"metadata": {"name": "lie", "namespace": "default"}, "spec": {}, "endpoints": []})
ANSWERS: dict[str, apiserver.Answer] = {
    "422": apiserver.fail(422),
    "stream without an end": apiserver.stream(LIE, then="hang"),
    "stream that ends early": apiserver.stream(LIE),
    "stream that is cut": apiserver.stream(LIE, LIE[:30], then="cut"),
    "stream with another mark": apiserver.stream(LIE, ENDS["Service"].replace(b"-end", b"-END"), then="hang"),
    "stream of another kind": apiserver.stream(LIE, ENDS["ServiceCIDR"], then="hang"),
    "stream of a lie": apiserver.stream(LIE, *ENDS.values(), LIE, then="hang"),
    "endless stream": endless_stream(),
    "401": apiserver.fail(401),
    "403": apiserver.fail(403),
    "429": apiserver.fail(429, Retry_After="0"),
    "500": apiserver.fail(500),
    "page of HTML": apiserver.html(200),
    "redirect": apiserver.redirect("https://169.254.169.254/latest/meta-data"),
    "redirect to itself": apiserver.redirect("/api/v1/services"),
    "nothing": apiserver.body(b""),
    "truncated": apiserver.body(b'{"kind":"ServiceList","metadata":{"resourceVersion":"3"},"items":[{"meta'),
    "deep": apiserver.body(b'{"items":' * 20_000),
    "wide": apiserver.body(
        b'{"kind":"ServiceList","metadata":{"resourceVersion":"3"},"items":[' + b"[]," * 9_000 + b"1]}"
    ),
    "items that are none": apiserver.body(
        b'{"kind":"ServiceList","metadata":{"resourceVersion":"3"},"items":[1,null,"x",{},{"metadata":7}]}'
    ),
    "too much": apiserver.body(b" " * 200_000),
    "hangs": apiserver.hang(),
    "drips": apiserver.drip(),
    "cuts": apiserver.cut(),
    "a line that never ends": apiserver.stream(b"x" * 50_000, b"x" * 50_000, then="hang"),
    "empty list": apiserver.body(b'{"kind":"ServiceList","metadata":{"resourceVersion":"1"},"items":[]}'),
    "endless": endless(),
}
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(min_value=-(1 << 70), max_value=1 << 70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=20),
    st.sampled_from(["127.0.0.1", "169.254.169.254", "::1", "0x7f.1", "10.0.0.1/8", "None", "A" * 9_000, "\n;flush"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=6,
)
EVENTS = st.sampled_from(["ADDED", "MODIFIED", "DELETED", "BOOKMARK", "ERROR", "", "added"])
NUMBERS = st.integers(0, 5)
MOVES = st.one_of(
    st.tuples(st.just("answer"), st.sampled_from(["list", "watch", "POST", ""]), st.sampled_from(sorted(ANSWERS))),
    st.tuples(
        st.just("mutant"), st.sampled_from(KINDS[:2]), NUMBERS, EVENTS, st.integers(0, 40), VALUES, st.text(max_size=4)
    ),
    st.tuples(st.just("raw"), st.sampled_from(KINDS), st.binary(max_size=60)),
    st.tuples(st.just("giant"), st.sampled_from(KINDS[:2])),
    st.tuples(st.just("unknown"), st.sampled_from(KINDS[:2]), NUMBERS),
    st.tuples(st.just("put"), NUMBERS),
    st.tuples(st.just("delete"), NUMBERS),
    st.tuples(st.just("end"), st.sampled_from(KINDS)),
    st.tuples(st.just("end of list"), st.sampled_from(KINDS), st.text("0123456789", max_size=3)),
    st.tuples(st.just("watch list"), st.sampled_from(["served", "refused", "ignored"])),
    st.tuples(st.just("compact")),
    st.tuples(st.just("wipe")),
    st.tuples(st.just("no tls")),
    st.tuples(st.just("truth")),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in an object."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, inner in items for found in ((*path, key), *places(inner, (*path, key)))]


def mutated(found: dict[str, Any], at: int, value: Any, version: str) -> dict[str, Any]:
    """The object with something else in one place, and a resourceVersion that need not be one."""
    made = copy.deepcopy(found)
    made["metadata"]["resourceVersion"] = version
    paths = places(made)
    *steps, last = paths[at % len(paths)]
    inner = made
    for step in steps:
        inner = inner[step]
    inner[last] = value
    return made


class Liar:
    """The server, and what is held of it."""

    def __init__(self, api: FakeApiServer, group: asyncio.TaskGroup, *, stream: bool) -> None:
        self.api = api
        self.store = Store()
        source = ApiInput(
            api.credentials, tenant=UID, resources=TENANT_KINDS, limits=CLIENT, timing=TIMING, stream=stream
        )
        self.announcer = Announcer(source.request, tenant=UID, instance="b", sleep=lambda _: asyncio.sleep(0))
        policy = msgspec.structs.replace(POLICY, limits=Limits(services=500, endpoints=5_000))
        self.feed = Feed(
            Tenant(UID, UID), source, store=self.store, policy=policy, noticed=self.announcer.tell, confirm_seconds=0
        )
        self.tasks = [group.create_task(self.feed.run()), group.create_task(self.announcer.run())]

    async def move(self, move: tuple[Any, ...]) -> None:
        """Lie once, or change something."""
        api = self.api
        match move:
            case ("answer", verb, name):
                api.faults.append(Fault(ANSWERS[name], verb=verb, times=3))
            case ("mutant", kind, number, event, at, value, version):
                found = a_service(number) if kind == "Service" else a_slice(number)
                api.send(kind, apiserver.event(event, mutated(found, at, value, version)))
            case ("raw", kind, data):
                api.send(kind, data + b"\n")
            case ("giant", kind):
                api.send(kind, apiserver.event("ADDED", mutated(a_service(0), 3, "x" * 30_000, "9")))
            case ("unknown", kind, number):
                metadata = {"name": f"unknown-{number}", "namespace": "nowhere", "resourceVersion": str(-number)}
                api.send(kind, apiserver.event("DELETED", {"metadata": metadata}))
            case ("put", number):
                api.put("Service", a_service(number))
                api.put("EndpointSlice", a_slice(number))
            case ("delete", number):
                for kind, name in (("Service", f"s{number}"), ("EndpointSlice", f"s{number}-1")):
                    if any(found["metadata"]["name"] == name for found in api.objects(kind)):
                        api.delete(kind, "default", name)
            case ("end", kind):
                api.end_watches(kind)
            case ("end of list", kind, version):
                api.send(kind, apiserver.end_of_list(kind, version))
            case ("watch list", how):
                api.watch_list = how
            case ("compact",):
                api.compact()
            case ("wipe",):
                api.wipe()
            case ("no tls",):
                await self._without_tls()
            case ("truth",):
                api.faults.clear()
        await settle()
        self.check()

    async def _without_tls(self) -> None:
        """Somebody else at the same place, who speaks no TLS."""
        port = self.api.port

        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n{}")
            writer.close()

        await self.api.stop()
        async with await asyncio.start_server(talk, "127.0.0.1", port, reuse_address=True):
            await asyncio.sleep(0.02)
        await self.api.start(port)

    def check(self) -> None:
        """Budgets hold, and nothing of ours went wrong."""
        assert self.feed.restarts == 0, self.feed.last_error
        assert not any(task.done() for task in self.tasks)
        compiler = self.feed.compiler
        assert len(compiler.keys("Service")) <= 500 + MAX_RECORDED
        assert sum(1 for _ in compiler.refusals()) <= MAX_RECORDED * 10
        assert len(self.announcer._waiting) <= WAITING and len(self.announcer._told) <= REMEMBERED

    async def honest(self) -> None:
        """The truth from now on: whoever resumes is told that his history is another's."""
        api = self.api
        api.faults.clear()
        api.put("Service", a_service(9))
        api.put("EndpointSlice", a_slice(9))
        for kind in KINDS:
            path = apiserver.KINDS[kind]
            api.faults.append(Fault(apiserver.fail(410), path=path, verb="watch", times=1))
        api.end_watches()
        wanted = self.truth()
        await until(lambda: self.store.tenants()[UID].model.ports == wanted.ports, timeout=20)
        await until(lambda: self.store.tenants()[UID].synced and self.store.tenants()[UID].stale_since is None)
        assert self.store.tenants()[UID].model.digest == wanted.digest

    def truth(self) -> TenantModel:
        """What the API's objects compile to."""
        services = [msgspec.convert(found, shapes.Service) for found in self.api.objects("Service")]
        slices = [msgspec.convert(found, shapes.EndpointSlice) for found in self.api.objects("EndpointSlice")]
        return TenantModel(port for found in services for port in compile_service(found, slices, POLICY).ports)


async def play(moves: list[tuple[Any, ...]], *, stream: bool) -> None:
    """One server's life."""
    before = len(asyncio.all_tasks())
    async with FakeApiServer() as api, asyncio.TaskGroup() as group:
        for number in range(3):
            api.put("Service", a_service(number))
            api.put("EndpointSlice", a_slice(number))
        liar = Liar(api, group, stream=stream)
        await until(lambda: liar.store.tenants()[UID].synced)
        for move in moves:
            await liar.move(move)
        await liar.honest()
        liar.check()
        for task in liar.tasks:
            task.cancel()
    await until(lambda: len(asyncio.all_tasks()) <= before)


@pytest.mark.timeout(900)
@settings(
    max_examples=800,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(st.lists(MOVES, min_size=3, max_size=25), st.booleans())
def test_after_any_lies_the_truth_is_found_and_nothing_is_left(moves: list[tuple[Any, ...]], stream: bool) -> None:
    asyncio.run(play(moves, stream=stream))


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_held_does_not_grow_with_the_lies(stream: bool) -> None:
    """The same life twice, and ten times: objects that are alive afterwards are those that were before."""
    life = [("answer", "", name) for name in ("endless", "drips", "cuts", "endless stream", "stream without an end")]
    life += [("mutant", kind, n, "ADDED", n, "x" * 99, str(n)) for kind in KINDS[:2] for n in range(6)]
    life += [("giant", "Service"), ("unknown", "Service", 1), ("end", "Service"), ("wipe",), ("no tls",)]
    asyncio.run(play(life, stream=stream))
    gc.collect()
    before = len(gc.get_objects())
    for _ in range(5):
        asyncio.run(play(life, stream=stream))
    gc.collect()
    assert len(gc.get_objects()) - before < 5_000
