"""What a tenant's API server says, as octets: lists, and events of one changed endpoint.

Objects are as large as real ones, managedFields and targetRef included: a Service 1.6 kB, a slice of ten endpoints
3.6 kB. All tenants have the same Services with the same ClusterIPs, and each its own pods' addresses, so that nothing
of one tenant's content is another's.
"""

import json
from datetime import UTC, datetime
from typing import Any

from benchmarks.pipeline import objects

NODES = 1000
"""Nodes that the pods of all tenants run on."""
READERS = 50
"""Nodes that read what changes, each the tenants that have pods there."""
_HOLE = "@@"
MANAGER = {
    "manager": "kube-controller-manager",
    "operation": "Update",
    "apiVersion": "v1",
    "time": "2026-01-01T00:00:00Z",
    "fieldsType": "FieldsV1",
}
SERVICE_FIELDS = {
    "f:metadata": {"f:annotations": {".": {}, "f:kubectl.kubernetes.io/last-applied-configuration": {}}},
    "f:spec": {f"f:{name}": {} for name in ("internalTrafficPolicy", "ports", "selector", "sessionAffinity", "type")},
}
SLICE_FIELDS = {
    "f:addressType": {},
    "f:endpoints": {},
    "f:metadata": {
        "f:annotations": {".": {}, "f:endpoints.kubernetes.io/last-change-trigger-time": {}},
        "f:generateName": {},
        "f:labels": {f"f:{name}": {} for name in ("app", "endpointslice.kubernetes.io/managed-by")},
        "f:ownerReferences": {".": {}, 'k:{"uid":"6a1a9c1e-0b1b-4b5e-8a43-0d8a4e0c0a11"}': {}},
    },
    "f:ports": {},
}


class Objects:
    """The objects of tenants that have so many `services` of so many `endpoints` each."""

    def __init__(self, services: int, endpoints: int) -> None:
        self.services, self.endpoints = services, endpoints
        self._services = _list("v1", "Service", [_service(number) for number in range(services)])
        slices = [_slice(number, [_HOLE] * endpoints, "2026-01-01T00:00:00Z", "1") for number in range(services)]
        self._slices = _holes(_list("discovery.k8s.io/v1", "EndpointSlice", slices))
        self._events = [
            _holes(_dump({"type": "MODIFIED", "object": _slice(number, [_HOLE] * endpoints, _HOLE, _HOLE)}) + b"\n")
            for number in range(services)
        ]
        self._ranges = _list("networking.k8s.io/v1", "ServiceCIDR", [_service_cidr()])

    def listed(self, path: str, tenant: int) -> bytes:
        """The whole collection at a path of the API."""
        if path.endswith("/endpointslices"):
            addresses = [_address(tenant, at) for at in range(self.services * self.endpoints)]
            return self._slices % tuple(addresses)
        return self._services if path.endswith("/services") else self._ranges

    def event(self, tenant: int, service: int, version: int) -> bytes:
        """The line of a watch that says that one endpoint of a Service has now another address; dated now."""
        return self._event(tenant, service, b"%d" % version, version)

    def flood(self, tenant: int) -> list[bytes]:
        """Lines as those of `event`, two of each Service, each a template for the version: cheaper to send."""
        return [self._event(tenant, service, b"%d", turn) for turn in (1, 2) for service in range(self.services)]

    def _event(self, tenant: int, service: int, version: bytes, turn: int) -> bytes:
        first = service * self.endpoints
        addresses = [_address(tenant, at) for at in range(first, first + self.endpoints - 1)]
        other = b"10.%d.%d.%d" % (0xC0 | turn >> 16 & 0x3F, turn >> 8 & 0xFF, turn & 0xFF)
        return self._events[service] % (version, datetime.now(UTC).isoformat().encode(), *addresses, other)


def whereabouts(path: str, tenants: int) -> bytes:
    """What the super cluster's API server lists: each tenant has a Pod on one of the first READERS nodes."""
    if path.endswith("/pods"):
        return _list("v1", "Pod", [_pod(tenant) for tenant in range(tenants)])
    if path.endswith("/nodes"):
        return _list("v1", "Node", [{"metadata": {"name": f"node-{number}"}} for number in range(READERS)])
    if path.endswith("/tenantpolicies"):
        return _list("vcproxy.dev/v1alpha1", "TenantPolicy", [])
    return _list("v1", "Unknown", [])


def stored_service(number: int) -> dict[str, Any]:
    """A Service as it is in etcd. Headless, for an API server sets about to repair addresses that it did not give."""
    found = _stored("v1", "Service", _service(number))
    return {**found, "spec": {**found["spec"], "clusterIP": "None", "clusterIPs": ["None"]}}


def stored_slice(number: int) -> dict[str, Any]:
    """An EndpointSlice of ten endpoints as it is in etcd."""
    addresses = [_address(number >> 8, number & 0xFF | at << 8).decode() for at in range(10)]
    return _stored("discovery.k8s.io/v1", "EndpointSlice", _slice(number, addresses, "2026-01-01T00:00:00Z", ""))


def _stored(version: str, kind: str, found: dict[str, Any]) -> dict[str, Any]:
    metadata = {name: value for name, value in found["metadata"].items() if name != "resourceVersion"}
    return {**found, "apiVersion": version, "kind": kind, "metadata": metadata}


def tenant_name(tenant: int) -> str:
    """A tenant's name; its uid is dir-NAME."""
    return f"t{tenant:05}"


def _pod(tenant: int) -> dict[str, Any]:
    labels = {"vcproxy.dev/tenant": tenant_name(tenant)}
    return {
        "metadata": {"namespace": "default", "name": f"pod-{tenant}", "uid": f"pod-{tenant}", "labels": labels},
        "spec": {"nodeName": f"node-{tenant % READERS}"},
        "status": {"phase": "Running", "podIPs": [{"ip": _address(tenant, 0).decode()}]},
    }


def bookmark(version: int) -> bytes:
    """The line of a watch that says that there was nothing to say."""
    said = {"kind": "Bookmark", "metadata": {"resourceVersion": str(version)}}
    return _dump({"type": "BOOKMARK", "object": said}) + b"\n"


def _address(tenant: int, number: int) -> bytes:
    host = tenant << 12 | number
    return b"10.%d.%d.%d" % (host >> 16 & 0xBF, host >> 8 & 0xFF, host & 0xFF)


def _service(number: int) -> dict[str, Any]:
    found = objects.service(f"service-{number}", f"10.96.{number >> 8}.{number & 0xFF}")
    found["metadata"] |= {
        "labels": {"app": f"service-{number}", "app.kubernetes.io/managed-by": "Helm", "helm.sh/chart": "app-1.2.3"},
        "annotations": {"kubectl.kubernetes.io/last-applied-configuration": "x" * 700},
        "creationTimestamp": "2026-01-01T00:00:00Z",
        "managedFields": [{**MANAGER, "fieldsV1": SERVICE_FIELDS}],
    }
    found["spec"] |= {"selector": {"app": f"service-{number}"}, "internalTrafficPolicy": "Cluster"}
    return {**found, "status": {"loadBalancer": {}}}


def _slice(number: int, addresses: list[str], changed: str, version: str) -> dict[str, Any]:
    owner = f"service-{number}"
    endpoints = [
        {
            "addresses": [address],
            "conditions": {"ready": True, "serving": True, "terminating": False},
            "nodeName": f"node-{(number * len(addresses) + at) % NODES}",
            "targetRef": {
                "kind": "Pod",
                "namespace": "default",
                "name": f"{owner}-6d4cf56db6-{at:05}",
                "uid": f"0f9a0c3e-6c0e-4d7c-9d5a-{number:06}{at:06}",
            },
            "zone": f"zone-{at % 3}",
        }
        for at, address in enumerate(addresses)
    ]
    found = objects.endpoint_slice(owner, endpoints)
    # The resourceVersion and the time come before the addresses: events fill them in this order.
    found["metadata"] = {
        "resourceVersion": version,
        "annotations": {"endpoints.kubernetes.io/last-change-trigger-time": changed},
        **{name: value for name, value in found["metadata"].items() if name != "resourceVersion"},
        "generateName": f"{owner}-",
        "ownerReferences": [{"apiVersion": "v1", "kind": "Service", "name": owner, "controller": True}],
        "managedFields": [{**MANAGER, "fieldsV1": SLICE_FIELDS}],
    }
    return found


def _service_cidr() -> dict[str, Any]:
    return {"metadata": {"name": "kubernetes", "resourceVersion": "1"}, "spec": {"cidrs": ["10.96.0.0/16"]}}


def _list(version: str, kind: str, items: list[dict[str, Any]]) -> bytes:
    return _dump({"kind": f"{kind}List", "apiVersion": version, "metadata": {"resourceVersion": "1"}, "items": items})


def _dump(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()  # the spelling of Go's encoder


def _holes(text: bytes) -> bytes:
    """A template for the operator %."""
    return text.replace(b"%", b"%%").replace(_HOLE.encode(), b"%s")
