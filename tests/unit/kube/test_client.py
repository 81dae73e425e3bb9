"""Requests over real TLS: identity, budgets, and errors with names."""

from __future__ import annotations

import asyncio
import socket
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trustme
import uvloop

from tests.fakes import apiserver
from tests.fakes.apiserver import FakeApiServer, Fault
from vcproxy.kube.client import APPLY_PATCH, Client, Limits
from vcproxy.kube.decode import PODS, SERVICES
from vcproxy.kube.errors import ApiError, BadResponse, Conflict, KubeconfigError, NotFound, TooLarge, Unreachable
from vcproxy.kube.kubeconfig import Credentials, load_kubeconfig
from vcproxy.kube.lines import Line
from vcproxy.kube.shapes import Service


def service(name: str, size: int = 0) -> dict[str, Any]:
    return {"metadata": {"namespace": "demo", "name": name, "labels": {"pad": "x" * size}}, "spec": {}}


def client_of(api: FakeApiServer, **options: Any) -> Client:
    return Client(options.pop("credentials", api.credentials), tenant="acme", **options)


async def listed(client: Client, **options: Any) -> list[str]:
    return [item.metadata.name async for page in client.list_pages(SERVICES, **options) for item in page.objects]


async def test_client_certificate_proves_who_asks() -> None:
    async with FakeApiServer(client_certificate=True) as api:
        api.put("Service", service("web"))
        async with client_of(api, credentials=load_kubeconfig(api.kubeconfig())) as client:
            assert await listed(client) == ["web"]
        async with client_of(api, credentials=Credentials(server=api.url, ca_pem=api.ca_pem, token="x")) as client:
            with pytest.raises(Unreachable):
                await listed(client)


async def test_tls_server_name_replaces_the_host(api: FakeApiServer) -> None:
    async with client_of(api, credentials=replace(api.credentials, tls_server_name="apiserver-svc.acme")) as client:
        assert await listed(client) == []
    async with client_of(api, credentials=replace(api.credentials, tls_server_name="other.example")) as client:
        with pytest.raises(Unreachable, match="certificate"):
            await listed(client)


async def test_a_server_signed_by_another_ca_is_refused(api: FakeApiServer) -> None:
    other = trustme.CA(key_type=trustme.KeyType.ECDSA).cert_pem.bytes()
    async with client_of(api, credentials=replace(api.credentials, ca_pem=other)) as client:
        with pytest.raises(Unreachable, match="certificate verify failed"):
            await listed(client)


def test_certificate_and_key_must_belong_together() -> None:
    authority = trustme.CA(key_type=trustme.KeyType.ECDSA)
    one, two = authority.issue_cert("a@x"), authority.issue_cert("b@x")
    mixed = Credentials(
        server="https://127.0.0.1:1",
        ca_pem=authority.cert_pem.bytes(),
        client_cert_pem=one.cert_chain_pems[0].bytes(),
        client_key_pem=two.private_key_pem.bytes(),
    )
    with pytest.raises(KubeconfigError, match=r"user\.client-key-data"):
        Client(mixed, tenant="acme")


async def test_a_rotated_token_file_is_read_again(api: FakeApiServer, tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text(api.token)
    async with client_of(api, credentials=replace(api.credentials, token="", token_file=str(path))) as client:
        await listed(client)
        api.token = "rotated-token"
        path.write_text(api.token)
        await listed(client)
        path.unlink()
        with pytest.raises(Unreachable, match="tokenFile"):
            await listed(client)


async def test_nothing_comes_from_the_environment(api: FakeApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    async with client_of(api) as client:
        assert await listed(client) == []


async def test_redirects_lead_nowhere(api: FakeApiServer) -> None:
    api.put("Service", service("web"))
    api.faults.append(Fault(apiserver.redirect(f"{api.url}/api/v1/services"), path="/api/v1/pods"))
    async with client_of(api) as client:
        with pytest.raises(BadResponse, match="redirects are refused"):
            _ = [page async for page in client.list_pages(PODS)]
    assert [path for _, path, _ in api.requests] == ["/api/v1/pods"]


async def test_permit_is_asked_about_the_address_itself(api: FakeApiServer) -> None:
    asked: list[str] = []

    def permit(address: Any) -> bool:
        asked.append(str(address))
        return False

    for server in (api.url, api.url.replace("127.0.0.1", "localhost")):
        async with client_of(api, credentials=replace(api.credentials, server=server), permit=permit) as client:
            with pytest.raises(Unreachable, match="policy does not allow"):
                await listed(client)
    assert "127.0.0.1" in asked and api.requests == []


async def test_list_pages_shrinks_pages_that_are_over_the_budget(api: FakeApiServer) -> None:
    for index in range(20):
        api.put("Service", service(f"s{index:02}", size=1000))
    async with client_of(api, limits=Limits(page_bytes=5000)) as client:
        assert await listed(client, limit=16) == [f"s{index:02}" for index in range(20)]
    assert {query["limit"] for _, _, query in api.requests} == {"16", "2"}


@pytest.mark.parametrize("limits", [Limits(list_bytes=3000), Limits(list_objects=4), Limits(page_bytes=500)])
async def test_lists_over_the_budget_are_given_up(api: FakeApiServer, limits: Limits) -> None:
    for index in range(6):
        api.put("Service", service(f"s{index}", size=800))
    async with client_of(api, limits=limits) as client:
        with pytest.raises(TooLarge):
            await listed(client, limit=2)


async def test_a_list_of_ever_more_slow_pages_ends(api: FakeApiServer) -> None:
    for index in range(6):
        api.put("Service", service(f"s{index}"))
    async with client_of(api, limits=Limits(list_seconds=0)) as client:
        with pytest.raises(Unreachable, match="the list took more than 0 s"):
            await listed(client, limit=1)


async def test_the_same_page_for_ever_is_noticed(api: FakeApiServer) -> None:
    page = b'{"kind":"ServiceList","metadata":{"resourceVersion":"1","continue":"again"},"items":[]}'
    api.faults.append(Fault(apiserver.body(page)))
    async with client_of(api) as client:
        with pytest.raises(BadResponse, match="same continue token"):
            await listed(client)


async def test_objects_over_the_limit_are_errors_of_the_page(api: FakeApiServer) -> None:
    api.put("Service", service("big", size=5000))
    api.put("Service", service("small"))
    async with client_of(api, limits=Limits(object_bytes=2000)) as client:
        pages = [page async for page in client.list_pages(SERVICES)]
    assert [item.metadata.name for item in pages[0].objects] == ["small"]
    assert [error.key for error in pages[0].errors] == [("demo", "big")]
    assert "more than the limit of 2000" in str(pages[0].errors[0])


async def test_create_read_patch(api: FakeApiServer) -> None:
    async with client_of(api) as client:
        await client.post("/api/v1/namespaces/demo/services", service("web"))
        with pytest.raises(Conflict):
            await client.post("/api/v1/namespaces/demo/services", service("web"))
        path = "/api/v1/namespaces/demo/services/web"
        await client.patch(path, {"spec": {"clusterIP": "10.32.0.7"}})
        await client.patch(path, {"metadata": {"labels": {"a": "b"}}}, content_type=APPLY_PATCH)
        got = await client.get_json(path, Service)
        assert (got.spec.cluster_ip, got.metadata.labels["a"]) == ("10.32.0.7", "b")
        with pytest.raises(NotFound):
            await client.get_json("/api/v1/namespaces/demo/services/other", Service)


async def test_errors_name_tenant_path_and_status_and_tame_the_message(api: FakeApiServer) -> None:
    api.faults.append(Fault(apiserver.fail(403, "no\x1b[31m\nway " + "x" * 1000)))
    async with client_of(api) as client:
        with pytest.raises(ApiError) as caught:
            await client.request("GET", "/api/v1/services")
    error = caught.value
    assert (error.tenant, error.path, error.status) == ("acme", "/api/v1/services", 403)
    assert str(error).startswith("tenant acme: /api/v1/services: HTTP 403: no")
    assert str(error).isprintable() and len(error.message) == 256


@pytest.mark.parametrize(
    ("header", "expected"), [("7", 7.0), ("99999", 300.0), ("-1", None), ("Wed, 21 Oct", None), ("9" * 5000, None)]
)
async def test_retry_after_is_bounded(api: FakeApiServer, header: str, expected: float | None) -> None:
    api.faults.append(Fault(apiserver.fail(429, Retry_After=header)))
    async with client_of(api) as client:
        with pytest.raises(ApiError) as caught:
            await client.request("GET", "/api/v1/services")
    assert caught.value.retry_after == expected


async def test_no_answer_in_time(api: FakeApiServer) -> None:
    async with client_of(api, limits=Limits(request_seconds=0.1)) as client:
        for answer in (apiserver.hang(), apiserver.drip(), apiserver.stream(b"{", then="hang")):
            api.faults[:] = [Fault(answer)]
            with pytest.raises(Unreachable, match="no answer in time"):
                await listed(client)


async def test_what_does_not_speak_http(api: FakeApiServer) -> None:
    """A port that accepts and never speaks TLS."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"https://127.0.0.1:{silent.getsockname()[1]}"
        async with client_of(
            api, credentials=replace(api.credentials, server=url), limits=Limits(request_seconds=0.1)
        ) as client:
            with pytest.raises(Unreachable):
                await listed(client)
    async with client_of(api, credentials=replace(api.credentials, server=url)) as client:
        with pytest.raises(Unreachable, match=r"Connect call failed|refused"):
            await listed(client)


async def test_huge_headers_are_refused(api: FakeApiServer) -> None:
    api.faults.append(Fault(apiserver.fail(200, X_Long="x" * 20_000)))
    async with client_of(api) as client:
        with pytest.raises(BadResponse):
            await listed(client)


async def test_host_names_are_looked_up_apart_from_the_loops_threads(
    api: FakeApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name whose DNS servers never answer times out alone, and its lookups do not pile up."""
    slow: list[str] = []
    genuine = socket.getaddrinfo

    def getaddrinfo(host: Any, *rest: Any, **options: Any) -> Any:
        if host == "slow.example":
            slow.append(host)
            time.sleep(0.3)
        return genuine(host, *rest, **options)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    server = api.url.replace("127.0.0.1", "slow.example")
    async with (
        client_of(api, credentials=replace(api.credentials, server=server), limits=Limits(request_seconds=0.02)) as bad,
        client_of(api, credentials=replace(api.credentials, server=api.url.replace("127.0.0.1", "localhost"))) as good,
    ):
        for _ in range(5):
            with pytest.raises(Unreachable):
                await listed(bad)
        assert await listed(good) == []
    assert slow == ["slow.example"]


async def watch_three(api: FakeApiServer) -> list[Line]:
    """Three events of more than the receive buffer each, and a bookmark."""
    seen: list[Line] = []
    async with client_of(api) as client:
        watch = client.watch(SERVICES, resource_version="0", timeout_seconds=60)
        assert await anext(watch) == []
        for index in range(3):
            api.put("Service", service(f"s{index}", size=900_000))
        api.bookmark("Service")
        while len(seen) < 4:
            seen += await anext(watch)
        await watch.aclose()
    return seen


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_watch_reads_long_lines_on_both_loops(run: Any) -> None:
    async def main() -> list[Line]:
        async with FakeApiServer() as api, asyncio.timeout(20):
            return await watch_three(api)

    lines = run(main())
    assert [len(line) > 900_000 for line in lines] == [True, True, True, False]


def test_no_file_descriptor_is_left(api_calls: int = 3) -> None:
    async def main() -> None:
        async with FakeApiServer(client_certificate=True) as api:
            for _ in range(api_calls):
                async with client_of(api) as client:
                    await listed(client)

    asyncio.run(main())
    before = len(list(Path("/proc/self/fd").iterdir()))
    asyncio.run(main())
    assert len(list(Path("/proc/self/fd").iterdir())) == before
