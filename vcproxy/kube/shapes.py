"""The parts of Kubernetes objects that vcproxy reads, as typed structures.

Narrow on purpose: a field that is not named here is skipped by the decoder without being built, which is what makes
decoding some hundred thousand slices per second possible (managedFields alone is half of a Service). Nothing is
computed here: defaults stay as the API has them (`ready: None` means "not said"), and judging values is the guard's
task. Two things are checked because all that follows relies on them: types, and ranges of ports.

Names are those of the API in Python's spelling (`clusterIP` is `cluster_ip`). Everything is frozen, acyclic and without
garbage collection headers (`gc=False`). `None` for a list stands for the `null` that Go writes for an empty slice, so
read `slice.endpoints or ()`.

Sources: the v1 types of core, discovery.k8s.io and networking.k8s.io at Kubernetes 1.37; the upper bounds of an
EndpointSlice are those of its validation (pkg/apis/discovery/validation: 1000 endpoints of at most 100 addresses).
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

Port = Annotated[int, Meta(ge=0, le=65535)]
Name = Annotated[str, Meta(min_length=1, max_length=253)]

_SPELLING = {
    "cluster_ip": "clusterIP",
    "cluster_ips": "clusterIPs",
    "external_ips": "externalIPs",
    "client_ip": "clientIP",
    "pod_ips": "podIPs",
    "pod_ip": "podIP",
    "pod_cidrs": "podCIDRs",
    "continue_": "continue",
}
_ANNOTATIONS = {
    "cluster": "tenancy.x-k8s.io/cluster",
    "uid": "tenancy.x-k8s.io/uid",
    "namespace": "tenancy.x-k8s.io/namespace",
    "vc_name": "tenancy.x-k8s.io/vcname",
    "vc_namespace": "tenancy.x-k8s.io/vcnamespace",
    "vc_uid": "tenancy.x-k8s.io/vcuid",
    "vc_root_namespace": "tenancy.x-k8s.io/vcrootns",
    "tenant_cluster_ip": "tenancy.x-k8s.io/clusterIP",
    "super_cluster_ip": "transparency.tenancy.x-k8s.io/clusterIP",
    "last_change_trigger_time": "endpoints.kubernetes.io/last-change-trigger-time",
}


def spelling(name: str) -> str:
    """The API's spelling of a Python field name: camel case, save for initialisms and Python's keywords."""
    head, *tail = name.split("_")
    return _SPELLING.get(name) or head + "".join(part.capitalize() for part in tail)


class Shape(Struct, frozen=True, gc=False, rename=spelling):
    """Base of all shapes; also for those of a tenant source's own kinds."""


class Annotations(Struct, frozen=True, gc=False, rename=_ANNOTATIONS):
    """The annotations vcproxy reads; others (an object may carry 256 KiB of them) are skipped. Empty: not there.

    The `tenancy.x-k8s.io` ones are VirtualCluster's markers. They are worth something on objects of the super cluster
    only, where the syncer removes what tenants wrote; in a tenant's own API anybody may write them.
    `last_change_trigger_time` (RFC 3339) is when the oldest change in an EndpointSlice happened, for the latency
    metric.
    """

    cluster: str = ""
    uid: str = ""
    namespace: str = ""
    vc_name: str = ""
    vc_namespace: str = ""
    vc_uid: str = ""
    vc_root_namespace: str = ""
    tenant_cluster_ip: str = ""
    super_cluster_ip: str = ""
    last_change_trigger_time: str = ""


class Metadata(Shape, frozen=True):
    """metadata of an object; `namespace` is empty for cluster-scoped kinds, `deletion_timestamp` set on the way out."""

    name: Name
    namespace: str = ""
    uid: str = ""
    resource_version: str = ""
    labels: dict[str, str] = {}
    annotations: Annotations = Annotations()
    deletion_timestamp: str | None = None


class Object(Shape, frozen=True):
    """What every kind has; the reflector asks no more of an object than this."""

    metadata: Metadata

    @property
    def key(self) -> tuple[str, str]:
        """(namespace, name)."""
        return self.metadata.namespace, self.metadata.name


class ServicePort(Shape, frozen=True):
    """One port of a Service; `node_port` 0: none. targetPort is absent: endpoints carry the port it resolved to."""

    port: Port
    name: str = ""
    protocol: str = "TCP"
    node_port: Port = 0


class ClientIPConfig(Shape, frozen=True):
    """How long a client stays with its endpoint, in seconds; the API's default is 10800."""

    timeout_seconds: int | None = None


class SessionAffinityConfig(Shape, frozen=True):
    """Settings of `sessionAffinity: ClientIP`."""

    client_ip: ClientIPConfig | None = None


class ServiceSpec(Shape, frozen=True):
    """spec of a Service."""

    type: str = "ClusterIP"
    cluster_ip: str = ""
    cluster_ips: tuple[str, ...] = ()
    ip_families: tuple[str, ...] = ()
    ports: tuple[ServicePort, ...] = ()
    external_ips: tuple[str, ...] = ()
    load_balancer_source_ranges: tuple[str, ...] = ()
    external_traffic_policy: str = ""
    internal_traffic_policy: str | None = None
    session_affinity: str = "None"
    session_affinity_config: SessionAffinityConfig | None = None
    health_check_node_port: Port = 0


class LoadBalancerIngress(Shape, frozen=True):
    """One address of a load balancer; `ip_mode` None means "VIP" (KEP-1860)."""

    ip: str = ""
    hostname: str = ""
    ip_mode: str | None = None


class LoadBalancerStatus(Shape, frozen=True):
    """status.loadBalancer of a Service."""

    ingress: tuple[LoadBalancerIngress, ...] = ()


class ServiceStatus(Shape, frozen=True):
    """status of a Service."""

    load_balancer: LoadBalancerStatus = LoadBalancerStatus()


class Service(Object, frozen=True):
    """v1 Service."""

    spec: ServiceSpec
    status: ServiceStatus = ServiceStatus()


class EndpointPort(Shape, frozen=True):
    """One port of an EndpointSlice; a port without a number (all ports) is of no use to a proxy."""

    name: str | None = None
    protocol: str | None = None
    port: Port | None = None


class EndpointConditions(Shape, frozen=True):
    """Conditions as said; None means true for ready and serving, false for terminating (KEP-1672)."""

    ready: bool | None = None
    serving: bool | None = None
    terminating: bool | None = None


class ForZone(Shape, frozen=True):
    """A zone whose clients should use this endpoint."""

    name: str


class ForNode(Shape, frozen=True):
    """A node whose clients should use this endpoint."""

    name: str


class EndpointHints(Shape, frozen=True):
    """Topology hints (KEP-2433, KEP-3015)."""

    for_zones: tuple[ForZone, ...] = ()
    for_nodes: tuple[ForNode, ...] = ()


class ObjectReference(Shape, frozen=True):
    """What an endpoint stands for, usually a Pod; claims of whoever wrote the slice."""

    kind: str = ""
    namespace: str = ""
    name: str = ""
    uid: str = ""


class Endpoint(Shape, frozen=True):
    """One endpoint; only `addresses[0]` is used (as kube-proxy does)."""

    addresses: Annotated[tuple[str, ...], Meta(max_length=100)]
    conditions: EndpointConditions = EndpointConditions()
    node_name: str | None = None
    zone: str | None = None
    hints: EndpointHints | None = None
    target_ref: ObjectReference | None = None


class EndpointSlice(Object, frozen=True):
    """discovery.k8s.io/v1 EndpointSlice; its Service is the label kubernetes.io/service-name."""

    address_type: str
    endpoints: Annotated[tuple[Endpoint, ...], Meta(max_length=1000)] | None = None
    ports: tuple[EndpointPort, ...] | None = None


class PodSpec(Shape, frozen=True):
    """spec of a Pod; `node_name` is empty until it is scheduled."""

    node_name: str = ""
    host_network: bool = False


class PodIP(Shape, frozen=True):
    """One address of a Pod."""

    ip: str = ""


class PodStatus(Shape, frozen=True):
    """status of a Pod; `pod_ips` holds `pod_ip` first and the other family's address second."""

    phase: str = ""
    pod_ip: str = ""
    pod_ips: tuple[PodIP, ...] = ()


class Pod(Object, frozen=True):
    """v1 Pod."""

    spec: PodSpec = PodSpec()
    status: PodStatus = PodStatus()


class NodeMetadata(Shape, frozen=True):
    """metadata of a Node: all its annotations, since networks publish their tunnel addresses there."""

    name: Name
    namespace: str = ""
    uid: str = ""
    resource_version: str = ""
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    deletion_timestamp: str | None = None


class NodeAddress(Shape, frozen=True):
    """One address of a Node; `type` is InternalIP, ExternalIP, Hostname, ..."""

    type: str = ""
    address: str = ""


class Taint(Shape, frozen=True):
    """One taint of a Node."""

    key: str = ""


class NodeSpec(Shape, frozen=True):
    """spec of a Node."""

    pod_cidrs: tuple[str, ...] = ()
    taints: tuple[Taint, ...] = ()


class NodeStatus(Shape, frozen=True):
    """status of a Node."""

    addresses: tuple[NodeAddress, ...] = ()


class Node(Shape, frozen=True):
    """v1 Node; cluster-scoped."""

    metadata: NodeMetadata
    spec: NodeSpec = NodeSpec()
    status: NodeStatus = NodeStatus()

    @property
    def key(self) -> tuple[str, str]:
        """("", name)."""
        return "", self.metadata.name


class Namespace(Object, frozen=True):
    """v1 Namespace; cluster-scoped."""


class ServiceCIDRSpec(Shape, frozen=True):
    """spec of a ServiceCIDR: one CIDR per family."""

    cidrs: tuple[str, ...] = ()


class ServiceCIDR(Object, frozen=True):
    """networking.k8s.io/v1 ServiceCIDR; cluster-scoped."""

    spec: ServiceCIDRSpec = ServiceCIDRSpec()
