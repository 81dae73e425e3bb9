"""The super cluster: the tenant `super`, where pods run, and what nodes are.

Placement is what tenants cannot write: the super cluster's own Pods, in which the name of the tenant is a label. Which
label, in this order:

1. `tenancy.x-k8s.io/cluster` together with `tenancy.x-k8s.io/vcname`: VirtualCluster's syncer made this Pod. (The
   control planes of VirtualClusters carry the first alone; they are the super cluster's.) The syncer removes what
   tenants write under these names, but copies their other labels: so the next one counts for nothing on such a Pod.
2. `vcproxy.dev/tenant`: whoever made this Pod in the super cluster says so.

Either holds the name of a tenant of the directory source. Pods with neither are the super cluster's own: their packets
are in no tenant's zone, so they are not placed.
"""

from collections.abc import Callable
from typing import Any

from vcproxy.brain.placement import Placement, pod_claims
from vcproxy.brain.sources import Kind
from vcproxy.brain.sources.directory import uid_of
from vcproxy.kube import shapes
from vcproxy.kube.reflector import Deleted, Event, Listed, Malformed, Upserted
from vcproxy.model.addresses import AddressError, Prefix, parse_address, parse_prefix
from vcproxy.model.node import NodeFacts

TENANT_LABEL = "vcproxy.dev/tenant"
CLUSTER_LABEL = "tenancy.x-k8s.io/cluster"
VC_NAME_LABEL = "tenancy.x-k8s.io/vcname"
ZONE_LABEL = "topology.kubernetes.io/zone"
TO_BE_DELETED_TAINT = "ToBeDeletedByClusterAutoscaler"
_NODE_ADDRESSES = ("InternalIP", "ExternalIP")  # as Kubernetes prefers them (GetNodeHostIPs)

Key = tuple[str, str]


def tenant_of_pod(pod: shapes.Pod) -> str | None:
    """The uid of the tenant a super-cluster Pod belongs to; None: the super cluster's own."""
    labels = pod.metadata.labels
    if CLUSTER_LABEL in labels:
        return uid_of(labels[CLUSTER_LABEL]) if VC_NAME_LABEL in labels else None
    name = labels.get(TENANT_LABEL, "")
    return uid_of(name) if name else None


def facts_of_node(node: shapes.Node) -> NodeFacts:
    """What a Node object says of its node; addresses and ranges that cannot be read are left out."""
    addresses: dict[bytes, None] = {}
    for kind in _NODE_ADDRESSES:
        for said in node.status.addresses:
            if said.type == kind:
                try:
                    addresses[parse_address(said.address)] = None
                except AddressError:
                    continue
    ranges: list[Prefix] = []
    for text in node.spec.pod_cidrs:
        try:
            ranges.append(parse_prefix(text))
        except AddressError:
            continue
    leaving = node.metadata.deletion_timestamp or any(taint.key == TO_BE_DELETED_TAINT for taint in node.spec.taints)
    zone = node.metadata.labels.get(ZONE_LABEL, "")
    return NodeFacts(zone, tuple(addresses), tuple(ranges), eligible=not leaving)


class Whereabouts:
    """Events about Pods and Nodes into the placement, for one origin of them.

    `tenant_of`: the uid a Pod belongs to, None for nobody's. `origin` keeps objects of the same name in different
    origins apart. `listed`: the kinds of which a complete list was read.
    """

    def __init__(
        self, placement: Placement, *, origin: str, tenant_of: Callable[[shapes.Pod], str | None] = tenant_of_pod
    ) -> None:
        self.listed: set[Kind] = set()
        self._placement = placement
        self._origin = origin
        self._tenant_of = tenant_of
        self._pods: set[Key] = set()
        self._nodes: set[Key] = set()

    def take(self, kind: Kind, event: Event[Any]) -> None:
        """One event; other kinds are ignored, and so are objects that cannot be read: what was known stays."""
        if kind not in ("Pod", "Node"):
            return
        known = self._pods if kind == "Pod" else self._nodes
        match event:
            case Listed(objects, errors):
                unread = {error.key for error in errors}
                if None not in unread:
                    for key in known - unread - {found.key for found in objects}:
                        self._remove(kind, key)
                for found in objects:
                    self._put(found)
                self.listed.add(kind)
            case Upserted(found):
                self._put(found)
            case Deleted(key):
                self._remove(kind, key)
            case Malformed():
                pass

    def clear(self) -> None:
        """Forget all that came from here."""
        for key in list(self._pods):
            self._remove("Pod", key)
        for key in list(self._nodes):
            self._remove("Node", key)

    def _put(self, found: shapes.Pod | shapes.Node) -> None:
        if isinstance(found, shapes.Node):
            self._nodes.add(found.key)
            self._placement.put_facts(found.metadata.name, facts_of_node(found))
            return
        tenant = self._tenant_of(found)
        claims = pod_claims(found, tenant) if tenant is not None else ()
        if claims:
            self._pods.add(found.key)
        else:
            self._pods.discard(found.key)
        self._placement.put(("Pod", self._origin, *found.key), claims)

    def _remove(self, kind: Kind, key: Key) -> None:
        if kind == "Pod":
            self._pods.discard(key)
            self._placement.remove(("Pod", self._origin, *key))
        elif key in self._nodes:
            self._nodes.discard(key)
            self._placement.put_facts(key[1], None)
