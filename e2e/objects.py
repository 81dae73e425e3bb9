"""Builders of the Kubernetes objects that Service tests are made of.

Each returns a plain dict as it would be posted; what a builder has no argument for goes into `spec` (merged over the
built one), or is set on the dict afterwards. Both address families everywhere: an address says its family itself.
"""

import ipaddress
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Object = dict[str, Any]


def namespace(name: str, *, labels: Mapping[str, str] | None = None) -> Object:
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": dict(labels or {})}}


def service_port(
    port: int,
    *,
    name: str = "",
    protocol: str = "TCP",
    target: int | str | None = None,
    node_port: int | None = None,
    app_protocol: str | None = None,
) -> Object:
    """One port of a Service. target: number or name of the pods' port; default: the same as `port`."""
    return _without_none(
        name=name or None,
        port=port,
        protocol=protocol,
        targetPort=port if target is None else target,
        nodePort=node_port,
        appProtocol=app_protocol,
    )


def service(
    name: str,
    *,
    namespace: str = "default",
    ports: Iterable[int | Object] = (80,),
    selector: Mapping[str, str] | None = None,
    type: str = "ClusterIP",
    cluster_ips: Sequence[str] = (),
    dual_stack: bool = False,
    labels: Mapping[str, str] | None = None,
    annotations: Mapping[str, str] | None = None,
    spec: Mapping[str, Any] | None = None,
) -> Object:
    """A Service. ports: numbers or `service_port`s; a Service with several needs named ones.

    selector: None makes a Service whose EndpointSlices the test writes itself.
    cluster_ips: addresses to ask for, one per family, () for any, ("None",) for headless; dual_stack: require both
    families (the first of cluster_ips or the plane's default family comes first).
    """
    both = dual_stack or len(cluster_ips) > 1
    built = _without_none(
        type=type,
        ports=[service_port(port) if isinstance(port, int) else port for port in ports],
        selector=None if selector is None else dict(selector),
        clusterIP=cluster_ips[0] if cluster_ips else None,
        clusterIPs=list(cluster_ips) or None,
        ipFamilyPolicy="RequireDualStack" if both else None,
    )
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(name, namespace, labels, annotations),
        "spec": built | dict(spec or {}),
    }


def endpoint(
    *addresses: str,
    node: str | None = None,
    zone: str | None = None,
    ready: bool | None = True,
    serving: bool | None = None,
    terminating: bool | None = None,
    hint_zones: Iterable[str] = (),
    hint_nodes: Iterable[str] = (),
    target: str | None = None,
) -> Object:
    """One endpoint of an EndpointSlice. A condition of None is left out, which readers take as upstream's defaults
    (ready: true, serving: as ready, terminating: false). target: name of the Pod that it is."""
    hints = _without_none(
        forZones=[{"name": zone} for zone in hint_zones] or None,
        forNodes=[{"name": node} for node in hint_nodes] or None,
    )
    return _without_none(
        addresses=list(addresses),
        conditions=_without_none(ready=ready, serving=serving, terminating=terminating),
        nodeName=node,
        zone=zone,
        hints=hints or None,
        targetRef=None if target is None else {"kind": "Pod", "name": target},
    )


def slice_port(port: int | None, *, name: str = "", protocol: str = "TCP") -> Object:
    """One port of an EndpointSlice; name: that of the Service's port. port None means "all ports" (no port)."""
    return _without_none(name=name, port=port, protocol=protocol)


def endpoint_slice(
    name: str,
    *,
    service: str,
    namespace: str = "default",
    endpoints: Iterable[str | Object] = (),
    ports: Iterable[int | Object] = (80,),
    family: str | None = None,
    labels: Mapping[str, str] | None = None,
) -> Object:
    """An EndpointSlice of a Service. endpoints: addresses (ready, on no node) or `endpoint`s; ports: numbers or
    `slice_port`s; family: "IPv4" or "IPv6", default that of the first address, IPv4 if there is none."""
    built = [endpoint(item) if isinstance(item, str) else item for item in endpoints]
    if family is None:
        family = f"IPv{ipaddress.ip_address(built[0]['addresses'][0]).version}" if built else "IPv4"
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": _metadata(name, namespace, {"kubernetes.io/service-name": service} | dict(labels or {}), None),
        "addressType": family,
        "endpoints": built,
        "ports": [slice_port(port) if isinstance(port, int) else port for port in ports],
    }


def pod(
    name: str,
    *,
    namespace: str = "default",
    node: str | None = None,
    labels: Mapping[str, str] | None = None,
    annotations: Mapping[str, str] | None = None,
    ports: Iterable[Object] = (),
    spec: Mapping[str, Any] | None = None,
) -> Object:
    """A Pod with one container, bound to a node unless None. ports: container ports, e.g. {"name": "http",
    "containerPort": 80}. It runs nowhere: post `pod_status` as its kubelet would."""
    container = {"name": "main", "image": "none", "ports": list(ports)}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": _metadata(name, namespace, labels, annotations),
        "spec": _without_none(containers=[container], nodeName=node) | dict(spec or {}),
    }


def pod_status(*addresses: str, ready: bool = True, phase: str = "Running") -> Object:
    """The status a kubelet reports: the pod's addresses (one per family, the first is the main one) and readiness."""
    state = "True" if ready else "False"
    return {
        "phase": phase,
        "podIP": addresses[0],
        "podIPs": [{"ip": address} for address in addresses],
        "conditions": [{"type": kind, "status": state} for kind in ("Ready", "ContainersReady")],
    }


def node(
    name: str,
    *,
    zone: str | None = None,
    labels: Mapping[str, str] | None = None,
    pod_cidrs: Sequence[str] = (),
) -> Object:
    """A Node. zone: its topology.kubernetes.io/zone; pod_cidrs: one per family."""
    topology = {} if zone is None else {"topology.kubernetes.io/zone": zone}
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name} | topology | dict(labels or {})},
        "spec": _without_none(podCIDR=pod_cidrs[0] if pod_cidrs else None, podCIDRs=list(pod_cidrs) or None),
    }


def node_status(*addresses: str, ready: bool = True, cpu: int = 4) -> Object:
    """The status a kubelet reports: InternalIP addresses, readiness and size (topology hints weigh zones by CPU)."""
    return {
        "addresses": [{"type": "InternalIP", "address": address} for address in addresses],
        "allocatable": {"cpu": str(cpu), "memory": "8Gi", "pods": "110"},
        "conditions": [{"type": "Ready", "status": "True" if ready else "False"}],
    }


def _metadata(
    name: str, namespace: str, labels: Mapping[str, str] | None, annotations: Mapping[str, str] | None
) -> Object:
    metadata: Object = {"name": name, "namespace": namespace}
    if labels:
        metadata["labels"] = dict(labels)
    if annotations:
        metadata["annotations"] = dict(annotations)
    return metadata


def _without_none(**fields: Any) -> Object:
    return {name: value for name, value in fields.items() if value is not None}
