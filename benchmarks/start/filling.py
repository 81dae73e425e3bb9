"""An API server that is full: so many Services of so many endpoints, written into its etcd.

Through the API 100,000 Services with their EndpointSlices take a quarter of an hour of two cores, straight into etcd
less than a minute. What is written is what the API server itself would have stored: objects with all that real ones
carry (managedFields, targetRef), and the IPAddress of each ClusterIP, without which the API server's repair would write
them one by one while a proxy is measured.

IPAddresses are written while the API server is down, so that its repair knows them all when it is told of Services. The
rest is written while it runs and follows by its watches: one that is started over a full etcd has to read all Services
within the minute that it gives its own controllers to begin (start-service-ip-repair-controllers), and else ends.
"""

import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import grpc

from benchmarks.brain.objects import MANAGER, SERVICE_FIELDS, SLICE_FIELDS
from benchmarks.pipeline import objects
from benchmarks.start.stored import length_delimited, stored
from e2e.apiclient import ApiClient

NAMESPACE = "bench"
SERVICE_CIDRS = ("10.32.0.0/12", "fd00:32::/108")
TARGET = 8080
SAMPLE = 16
"""Services whose endpoints are real pods, at most."""
NODES = 1_000
"""Nodes that endpoints nobody dials are on."""
_FIRST_SERVICE, _FIRST_ENDPOINT = 0x0A200100, 0x0A800000  # 10.32.1.0, 10.128.0.0
_AT_ONCE = 100  # etcd takes 128 operations in a transaction
_UNREAD = ("managedFields", "annotations", "ownerReferences", "generateName")
_CREATED = "2026-01-01T00:00:00Z"


Pair = tuple[str, dict[str, Any]]
"""A key in etcd, and an object."""


class Target(NamedTuple):
    """An endpoint: its address and its node."""

    address: str
    node: str


def sampled(services: int) -> list[int]:
    """Numbers of the Services whose endpoints are real, evenly spread; the last one is among them."""
    count = min(SAMPLE, services)
    return [services * (at + 1) // count - 1 for at in range(count)]


def vip(number: int) -> str:
    """The ClusterIP of a Service."""
    return socket.inet_ntoa((_FIRST_SERVICE + number).to_bytes(4, "big"))


def targets(number: int, count: int, turn: int = 0) -> list[Target]:
    """Endpoints of a Service, all different ones; the last depends on `turn`, up to 5."""
    hosts = [number * 16 + at for at in range(count - 1)] + [number * 16 + count - 1 + turn]
    addresses = [socket.inet_ntoa((_FIRST_ENDPOINT + host).to_bytes(4, "big")) for host in hosts]
    return [Target(address, f"node-{host % NODES}") for address, host in zip(addresses, hosts, strict=True)]


def service(number: int) -> dict[str, Any]:
    """A Service as it is stored."""
    found = objects.service(f"svc-{number}", vip(number))
    found["metadata"] |= {
        "labels": {"app": f"svc-{number}", "app.kubernetes.io/managed-by": "Helm", "helm.sh/chart": "app-1.2.3"},
        "annotations": {"kubectl.kubernetes.io/last-applied-configuration": "x" * 700},
        "managedFields": [{**MANAGER, "fieldsV1": SERVICE_FIELDS}],
    }
    found["spec"] |= {
        "ports": [{"name": "http", "protocol": "TCP", "port": 80, "targetPort": TARGET}],
        "selector": {"app": f"svc-{number}"},
        "ipFamilyPolicy": "SingleStack",
        "internalTrafficPolicy": "Cluster",
        "sessionAffinity": "None",
    }
    return _whole("v1", "Service", found, f"5e000000-0000-4000-8000-{number:012}")


def endpoint_slice(number: int, members: Sequence[Target]) -> dict[str, Any]:
    """Its EndpointSlice."""
    owner = f"svc-{number}"
    found = objects.endpoint_slice(owner, endpoints(number, members))
    found["metadata"] |= {
        "generateName": f"{owner}-",
        "annotations": {"endpoints.kubernetes.io/last-change-trigger-time": _CREATED},
        "ownerReferences": [
            {
                "apiVersion": "v1",
                "kind": "Service",
                "name": owner,
                "uid": f"5e000000-0000-4000-8000-{number:012}",
                "controller": True,
                "blockOwnerDeletion": True,
            }
        ],
        "managedFields": [{**MANAGER, "apiVersion": "discovery.k8s.io/v1", "fieldsV1": SLICE_FIELDS}],
    }
    return _whole("discovery.k8s.io/v1", "EndpointSlice", found, f"51000000-0000-4000-8000-{number:012}")


def endpoints(number: int, members: Sequence[Target]) -> list[dict[str, Any]]:
    """The slice's `endpoints`."""
    return [
        {
            "addresses": [member.address],
            "conditions": {"ready": True, "serving": True, "terminating": False},
            "nodeName": member.node,
            "targetRef": {
                "kind": "Pod",
                "namespace": NAMESPACE,
                "name": f"svc-{number}-6d4cf56db6-{at:05}",
                "uid": f"0f9a0c3e-6c0e-4d7c-9d5a-{number:06}{at:06}",
            },
            "zone": f"zone-{at % 3}",
        }
        for at, member in enumerate(members)
    ]


def _address(number: int) -> dict[str, Any]:
    """The IPAddress that says that the ClusterIP is taken."""
    reference = {"group": "", "resource": "services", "namespace": NAMESPACE, "name": f"svc-{number}"}
    labels = {"ipaddress.kubernetes.io/ip-family": "IPv4", "ipaddress.kubernetes.io/managed-by": "ipallocator.k8s.io"}
    # One without its Service is removed when it is a minute old: Services have ten minutes more to come.
    created = (datetime.now(UTC) + timedelta(minutes=10)).isoformat()
    metadata = {"name": vip(number), "labels": labels, "creationTimestamp": created}
    found = {"metadata": metadata, "spec": {"parentRef": reference}}
    return _whole("networking.k8s.io/v1", "IPAddress", found, f"1b000000-0000-4000-8000-{number:012}", namespace="")


def _whole(version: str, kind: str, found: dict[str, Any], uid: str, *, namespace: str = NAMESPACE) -> dict[str, Any]:
    metadata = {"creationTimestamp": _CREATED} | found["metadata"] | {"uid": uid}
    metadata.pop("resourceVersion", None)  # etcd's own revision says it
    if namespace:
        metadata["namespace"] = namespace
    return {"apiVersion": version, "kind": kind} | found | {"metadata": metadata}


def fill(
    etcd: str,
    kind: str,
    services: int,
    per_service: int,
    *,
    real: Mapping[int, Sequence[Target]],
    lean: bool,
) -> None:
    """Write all objects of one of KINDS into the etcd at this address. `real`: endpoints of those Services that
    somebody dials. `lean`: without what a proxy does not read, half the octets."""
    make, shape = KINDS[kind], _lean if lean else lambda found: found
    with grpc.insecure_channel(etcd) as channel:
        transaction = channel.unary_unary("/etcdserverpb.KV/Txn")
        for begin in range(0, services, _AT_ONCE):
            numbers = range(begin, min(services, begin + _AT_ONCE))
            pairs = (make(number, real.get(number), per_service) for number in numbers)
            transaction(_transaction((key, stored(shape(found))) for key, found in pairs), timeout=60)


def _lean(found: dict[str, Any]) -> dict[str, Any]:
    metadata = {name: value for name, value in found["metadata"].items() if name not in _UNREAD}
    found = found | {"metadata": metadata}
    if members := found.get("endpoints"):
        found["endpoints"] = [{name: value for name, value in each.items() if name != "targetRef"} for each in members]
    return found


def _address_pair(number: int, *_: object) -> Pair:
    return f"ipaddresses/{vip(number)}", _address(number)


def _service_pair(number: int, *_: object) -> Pair:
    return f"services/specs/{NAMESPACE}/svc-{number}", service(number)


def _slice_pair(number: int, members: Sequence[Target] | None, count: int) -> Pair:
    return f"endpointslices/{NAMESPACE}/svc-{number}-x", endpoint_slice(number, members or targets(number, count))


KINDS: Mapping[str, Callable[[int, Sequence[Target] | None, int], Pair]] = {
    "IPAddress": _address_pair,
    "Service": _service_pair,
    "EndpointSlice": _slice_pair,
}
"""Key and value, by the Service's number."""


def verify(api: ApiClient, number: int, members: Sequence[Target], *, lean: bool) -> None:
    """An API server tells of a Service what was written of it. Raises ValueError."""
    wanted = service(number), endpoint_slice(number, members)
    for found in wanted:
        told = api.get(found["kind"], found["metadata"]["name"], NAMESPACE).object
        if not _within(_lean(found) if lean else found, told):
            raise ValueError(f"the API server tells {told}, and what was written is {found}")


def _within(part: Any, whole: Any) -> bool:
    """Whether all fields of one are in the other, which may have more."""
    if isinstance(part, dict):
        return isinstance(whole, dict) and all(_within(value, whole.get(name)) for name, value in part.items())
    if isinstance(part, list):
        return isinstance(whole, list) and len(part) == len(whole) and all(map(_within, part, whole))
    return bool(part == whole)


def _transaction(pairs: Iterable[tuple[str, bytes]]) -> bytes:
    """A TxnRequest of puts (etcd's rpc.proto): success = 2; of it request_put = 2; of it key = 1, value = 2."""
    puts = (length_delimited(1, f"/registry/{key}".encode()) + length_delimited(2, value) for key, value in pairs)
    return b"".join(length_delimited(2, length_delimited(2, put)) for put in puts)
