"""Where a tenant's API server may be, and names of the super cluster's Services."""

from __future__ import annotations

import asyncio
import ipaddress
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.fakes.apiserver import Answer, FakeApiServer, Fault, fail, hang
from tests.unit.brain.kinds import node
from tests.unit.brain.polling import until
from vcproxy.brain.apiservers import ApiServers, SuperServices
from vcproxy.brain.config import SuperCluster
from vcproxy.brain.placement import Placement
from vcproxy.brain.sources.supercluster import facts_of_node
from vcproxy.brain.superaccess import SuperAccess
from vcproxy.kube.decode import SERVICES
from vcproxy.kube.errors import Unreachable
from vcproxy.kube.kubeconfig import load_kubeconfig
from vcproxy.model.addresses import AddressError

HOST = "https://api.example.com:6443"
NODE = "192.0.2.1"


@pytest.fixture
async def api() -> AsyncIterator[FakeApiServer]:
    async with FakeApiServer(token="super") as server:
        yield server


def access_to(api: FakeApiServer, directory: Path, **how: bool) -> SuperAccess:
    (directory / "super").write_bytes(api.kubeconfig())
    return SuperAccess(SuperCluster(kubeconfig=str(directory / "super")), **how)


def placed() -> Placement:
    placement = Placement()
    placement.put_facts("n1", facts_of_node(node("n1", addresses=(NODE, "2001:db8::1"))))
    return placement


@pytest.mark.parametrize(
    ("allowed", "restricted", "server", "address", "permitted"),
    [
        # Without a list: what a tenant has a hand in stays away from the operator's own.
        ([], True, HOST, "10.244.1.2", True),
        ([], True, HOST, "203.0.113.9", True),
        ([], True, HOST, "127.0.0.1", False),
        ([], True, HOST, "::1", False),
        ([], True, HOST, "169.254.169.254", False),
        ([], True, HOST, "fe80::1", False),
        ([], True, HOST, "0.0.0.0", False),
        ([], True, HOST, "224.0.0.1", False),
        ([], True, HOST, NODE, False),
        ([], True, HOST, "2001:db8::1", False),
        ([], True, f"https://{NODE}:10250", NODE, False),
        # A folder is the operator's own choice.
        ([], False, HOST, "127.0.0.1", True),
        ([], False, HOST, NODE, True),
        # With a list: what it says, for everybody, and nothing else.
        (["203.0.113.0/24"], True, HOST, "203.0.113.9", True),
        (["203.0.113.0/24"], True, HOST, "10.244.1.2", False),
        (["203.0.113.0/24"], False, HOST, "10.244.1.2", False),
        (["203.0.113.0/24"], False, HOST, "203.0.113.9", True),
        (["127.0.0.0/8"], True, HOST, "127.0.0.1", True),
        ([f"{NODE}/32"], True, HOST, NODE, True),
        (["2001:db8::1"], True, HOST, "2001:db8::1", True),
        (["api.example.com"], True, HOST, "10.244.1.2", True),
        (["API.example.com"], True, HOST, "10.244.1.2", True),
        (["*.example.com"], True, HOST, "10.244.1.2", True),
        (["*.example.com"], True, "https://api.example.com.evil.test:6443", "10.244.1.2", False),
        (["*.example.com"], True, "https://10.244.1.2:6443", "10.244.1.2", False),
        # A listed name may be led to any address by its DNS, but not to the operator's own.
        (["api.example.com"], True, HOST, "127.0.0.1", False),
        (["api.example.com"], True, HOST, NODE, False),
        (["api.example.com"], False, HOST, NODE, True),
        (["api.example.com"], False, HOST, "169.254.169.254", False),
    ],
)
def test_where_an_api_server_may_be(
    allowed: list[str], restricted: bool, server: str, address: str, permitted: bool
) -> None:
    servers = ApiServers(allowed, placement=placed())
    permit = servers.permit(server, restricted=restricted)
    assert (permit is None or permit(ipaddress.ip_address(address))) == permitted


def test_before_nodes_are_known_nobody_restricted_is_connected_to() -> None:
    known: list[bool] = []
    servers = ApiServers(placement=placed(), known=lambda: bool(known))
    permit = servers.permit(HOST, restricted=True)
    assert permit is not None
    with pytest.raises(PermissionError, match="Nodes have not been read yet"):
        permit(ipaddress.ip_address("10.244.1.2"))
    known.append(True)
    assert permit(ipaddress.ip_address("10.244.1.2"))


@pytest.mark.parametrize("text", ["10.0.0.0/33", "", "example.com/24"])
def test_a_list_that_cannot_be_read(text: str) -> None:
    with pytest.raises(AddressError):
        ApiServers([text])


async def test_the_super_clusters_own_api_server_is_out_of_reach(api: FakeApiServer, tmp_path: Path) -> None:
    """Its address, its Service's, and its endpoints'; a kubeconfig may be given any of them, by number or by name."""
    api.put("Service", {"metadata": {"namespace": "default", "name": "kubernetes"}, "spec": {"clusterIP": "10.96.0.1"}})
    publish(api, "default", "kubernetes", "10.96.0.1", 443, ["198.51.100.7"], 6443)
    access = access_to(api, tmp_path, guarded=True)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(access.run())
        await until(lambda: len(access.addresses) == 4)
        task.cancel()
    permit = ApiServers(access=access).permit(HOST, restricted=True)
    assert permit is not None
    judged = {text: permit(ipaddress.ip_address(text)) for text in ("10.96.0.1", "198.51.100.7", "10.96.0.2")}
    assert judged == {"10.96.0.1": False, "198.51.100.7": False, "10.96.0.2": True}


def publish(
    api: FakeApiServer, namespace: str, name: str, vip: str, port: int, endpoints: list[str], target: int
) -> None:
    """A Service of a control plane in the super cluster, and its endpoints."""
    api.put(
        "Service",
        {
            "metadata": {"namespace": namespace, "name": name},
            "spec": {"clusterIP": vip, "clusterIPs": [vip], "ports": [{"name": "api", "port": port}]},
        },
    )
    api.put(
        "EndpointSlice",
        {
            "metadata": {"namespace": namespace, "name": name, "labels": {"kubernetes.io/service-name": name}},
            "addressType": "IPv4",
            "ports": [{"name": "api", "port": target, "protocol": "TCP"}, {"name": "metrics", "port": 9}],
            "endpoints": [{"addresses": [address]} for address in endpoints]
            + [{"addresses": ["10.244.9.9"], "conditions": {"ready": False}}],
        },
    )


@pytest.mark.parametrize(
    ("host", "port", "found"),
    [
        ("apiserver-svc.root", 6443, [("10.244.1.2", 6444)]),
        ("apiserver-svc.root.svc", 6443, [("10.244.1.2", 6444)]),
        ("apiserver-svc.root.svc.cluster.local", 6443, [("10.244.1.2", 6444)]),
        ("apiserver-svc.root", 443, [("10.96.184.119", 443)]),
        ("apiserver-svc", 6443, None),
        ("apiserver-svc.root.example.com", 6443, None),
        ("example.com", 6443, None),
    ],
)
async def test_names_of_services(api: FakeApiServer, tmp_path: Path, host: str, port: int, found: object) -> None:
    publish(api, "root", "apiserver-svc", "10.96.184.119", 6443, ["10.244.1.2"], 6444)
    access = access_to(api, tmp_path)
    async with access.client:
        result = await SuperServices(access).look_up(host, port)
    assert (list(result) if result is not None else None) == found


@pytest.mark.parametrize("answer", [fail(503), hang()], ids=["503", "silence"])
async def test_what_was_found_stays_while_nobody_answers(api: FakeApiServer, tmp_path: Path, answer: Answer) -> None:
    publish(api, "root", "apiserver-svc", "10.96.184.119", 6443, ["10.244.1.2"], 6444)
    access = access_to(api, tmp_path)
    async with access.client:
        names = SuperServices(access, patience=0.05)
        found = await names.look_up("apiserver-svc.root", 6443)
        assert await names.look_up("example.com", 6443) is None
        fault = Fault(answer)
        api.faults.append(fault)
        assert await names.look_up("apiserver-svc.root", 6443) == found
        assert await names.look_up("example.com", 6443) is None, "a name of DNS stays one"
        fault.answer = fail(503)
        with pytest.raises(OSError, match=r"other\.root cannot be looked up"):
            await names.look_up("other.root", 6443)


async def test_a_tenant_by_the_name_of_its_service_over_tls(api: FakeApiServer, tmp_path: Path) -> None:
    """The host name in brackets, as VirtualCluster writes it; endpoints are dialled, the certificate has the name."""
    async with FakeApiServer() as tenant:
        publish(api, "acme", "apiserver-svc", "10.96.184.119", 6443, ["127.0.0.1"], tenant.port)
        document = json.loads(tenant.kubeconfig())
        document["clusters"][0]["cluster"]["server"] = "https://[apiserver-svc.acme]:6443"
        credentials = load_kubeconfig(json.dumps(document).encode())
        access = access_to(api, tmp_path)
        open_to_all = ApiServers(["127.0.0.0/8"], access=access)
        async with open_to_all.connect(credentials, restricted=True, tenant="acme") as client:
            assert [page.objects async for page in client.list_pages(SERVICES)] == [()]
        closed = ApiServers(access=access)
        async with closed.connect(credentials, restricted=True, tenant="acme") as client:
            with pytest.raises(Unreachable, match=r"does not allow an API server at 127\.0\.0\.1"):
                async for _ in client.list_pages(SERVICES):
                    pass
        await access.client.close()
