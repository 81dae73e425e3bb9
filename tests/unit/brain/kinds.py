"""Kubernetes objects for tests, in few words: what is not said is as an API server would default it."""

from typing import Any

import msgspec

from vcproxy.kube import shapes


def service(name: str = "web", *, namespace: str = "default", labels: dict[str, str] | None = None, **spec: Any):
    """A Service with one TCP port 80 and ClusterIP 10.96.0.1; `spec` in the API's spelling, `ingress` for its status."""
    ingress = spec.pop("ingress", [])
    spec.setdefault("clusterIP", "10.96.0.1")
    spec.setdefault("ports", [{"port": 80}])
    return msgspec.convert(
        {
            "metadata": {"name": name, "namespace": namespace, "labels": labels or {}},
            "spec": spec,
            "status": {"loadBalancer": {"ingress": ingress}},
        },
        shapes.Service,
    )


def endpoint_slice(
    addresses: list[str] | None = None,
    *,
    name: str = "web-1",
    service: str | None = "web",
    namespace: str = "default",
    address_type: str = "IPv4",
    ports: list[dict[str, Any]] | None = None,
    endpoints: list[dict[str, Any]] | None = None,
    labels: dict[str, str] | None = None,
    trigger: str = "",
):
    """An EndpointSlice of Service `web` with the unnamed TCP port 8080."""
    marks = {**({"kubernetes.io/service-name": service} if service is not None else {}), **(labels or {})}
    said = [{"addresses": [address]} for address in addresses or []] + (endpoints or [])
    annotations = {"endpoints.kubernetes.io/last-change-trigger-time": trigger} if trigger else {}
    return msgspec.convert(
        {
            "metadata": {"name": name, "namespace": namespace, "labels": marks, "annotations": annotations},
            "addressType": address_type,
            "endpoints": said,
            "ports": [{"name": "", "protocol": "TCP", "port": 8080}] if ports is None else ports,
        },
        shapes.EndpointSlice,
    )


def service_cidr(*cidrs: str, name: str = "kubernetes"):
    """A ServiceCIDR."""
    return msgspec.convert({"metadata": {"name": name}, "spec": {"cidrs": list(cidrs)}}, shapes.ServiceCIDR)


def pod(
    name: str = "a",
    *,
    node: str = "n1",
    ips: tuple[str, ...] = ("10.0.0.1",),
    labels: dict[str, str] | None = None,
    phase: str = "Running",
    host_network: bool = False,
    namespace: str = "default",
):
    """A running Pod."""
    return msgspec.convert(
        {
            "metadata": {"name": name, "namespace": namespace, "labels": labels or {}},
            "spec": {"nodeName": node, "hostNetwork": host_network},
            "status": {"phase": phase, "podIPs": [{"ip": ip} for ip in ips]},
        },
        shapes.Pod,
    )


def node(
    name: str = "n1",
    *,
    zone: str = "",
    addresses: tuple[str, ...] = (),
    pod_cidrs: tuple[str, ...] = (),
    deletion: str | None = None,
    taints: tuple[str, ...] = (),
):
    """A Node."""
    labels = {"topology.kubernetes.io/zone": zone} if zone else {}
    said = [{"type": "InternalIP", "address": address} for address in addresses]
    said.append({"type": "Hostname", "address": name})
    return msgspec.convert(
        {
            "metadata": {"name": name, "labels": labels, "deletionTimestamp": deletion},
            "spec": {"podCIDRs": list(pod_cidrs), "taints": [{"key": key, "effect": "NoSchedule"} for key in taints]},
            "status": {"addresses": said},
        },
        shapes.Node,
    )
