"""Pods and Nodes into the placement: where pods run, and what nodes are.

Placement is what tenants cannot write: the super cluster's own Pods, and whose they are by attribution.py. Pods that
are nobody's are the super cluster's own: their packets are in no tenant's zone, so they are not placed.
"""

from typing import Any, NamedTuple

from vcproxy.brain.placement import Claim, Placement, pod_claims
from vcproxy.brain.sources import Kind
from vcproxy.brain.sources.attribution import CONTROL_PLANE, Attribution, Mark
from vcproxy.brain.vouched import Vouched
from vcproxy.kube import shapes
from vcproxy.kube.reflector import Deleted, Event, Listed, Malformed, Upserted
from vcproxy.model.addresses import AddressError, Prefix, parse_prefix, readable_addresses
from vcproxy.model.node import NodeFacts

ZONE_LABEL = "topology.kubernetes.io/zone"
TO_BE_DELETED_TAINT = "ToBeDeletedByClusterAutoscaler"
_NODE_ADDRESSES = ("InternalIP", "ExternalIP")  # as Kubernetes prefers them (GetNodeHostIPs)

Key = tuple[str, str]


def facts_of_node(node: shapes.Node) -> NodeFacts:
    """What a Node object says of its node; addresses and ranges that cannot be read are left out."""
    told = (said.address for kind in _NODE_ADDRESSES for said in node.status.addresses if said.type == kind)
    ranges: list[Prefix] = []
    for text in node.spec.pod_cidrs:
        try:
            ranges.append(parse_prefix(text))
        except AddressError:
            continue
    leaving = node.metadata.deletion_timestamp or any(taint.key == TO_BE_DELETED_TAINT for taint in node.spec.taints)
    zone = node.metadata.labels.get(ZONE_LABEL, "")
    return NodeFacts(zone, tuple(dict.fromkeys(readable_addresses(told))), tuple(ranges), eligible=not leaving)


class _Seen(NamedTuple):
    """A Pod with a mark: its claims without their tenant."""

    mark: Mark
    claims: tuple[Claim, ...]


class Whereabouts:
    """Events about Pods and Nodes into the placement, for one origin of them.

    `origin` keeps objects of the same name in different origins apart. `vouched` learns where tenants' API servers run.
    `listed`: the kinds of which a complete list was read.
    """

    def __init__(
        self, placement: Placement, *, origin: str, attribution: Attribution, vouched: Vouched | None = None
    ) -> None:
        self.listed: set[Kind] = set()
        self._placement = placement
        self._origin = origin
        self._attribution = attribution
        self._vouched = vouched
        self._pods: dict[Key, _Seen] = {}
        self._marked: dict[Mark, set[Key]] = {}
        self._owners: dict[Mark, str] = {}  # of the marks above, as last told
        self._nodes: set[Key] = set()
        attribution.subscribe(self._owner_changed)

    def take(self, kind: Kind, event: Event[Any]) -> None:
        """One event; other kinds are ignored, and so are objects that cannot be read: what was known stays."""
        if kind not in ("Pod", "Node"):
            return
        match event:
            case Listed(objects, errors):
                unread = {error.key for error in errors}
                if None not in unread:
                    known = self._pods.keys() if kind == "Pod" else self._nodes
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
        mark = self._attribution.mark(found)
        claims = pod_claims(found, "") if mark is not None else ()
        if mark is None or not claims:
            self._remove("Pod", found.key)
            return
        old = self._pods.get(found.key)
        if old is not None and old.mark != mark:
            if CONTROL_PLANE in (old.mark[0], mark[0]):  # claims of another sort, which the new ones do not replace
                self._place(found.key, old.mark, ())
            self._unmark(found.key, old.mark)
        self._pods[found.key] = _Seen(mark, claims)
        keys = self._marked.setdefault(mark, set())
        if not keys and (owner := self._attribution.owner(mark)) is not None:
            self._owners[mark] = owner
        keys.add(found.key)
        self._place(found.key, mark, claims)

    def _remove(self, kind: Kind, key: Key) -> None:
        if kind == "Node":
            if key in self._nodes:
                self._nodes.discard(key)
                self._placement.put_facts(key[1], None)
            return
        seen = self._pods.pop(key, None)
        if seen is None:
            return
        self._place(key, seen.mark, ())
        self._unmark(key, seen.mark)

    def _unmark(self, key: Key, mark: Mark) -> None:
        keys = self._marked[mark]
        keys.discard(key)
        if not keys:
            del self._marked[mark]
            self._owners.pop(mark, None)

    def _owner_changed(self, mark: Mark) -> None:
        keys = self._marked.get(mark)
        if not keys:
            return
        old, new = self._owners.pop(mark, None), self._attribution.owner(mark)
        if mark[0] == CONTROL_PLANE and old is not None:
            for key in keys:
                self._vouch(old, key, ())
        if new is not None:
            self._owners[mark] = new
        for key in keys:
            self._place(key, mark, self._pods[key].claims)

    def _place(self, key: Key, mark: Mark, claims: tuple[Claim, ...]) -> None:
        owner = self._owners.get(mark)
        if mark[0] == CONTROL_PLANE:
            if owner is not None:
                self._vouch(owner, key, claims)
            return
        placed = [claim._replace(tenant=owner) for claim in claims] if owner is not None else ()
        self._placement.put(("Pod", self._origin, *key), placed)

    def _vouch(self, uid: str, key: Key, claims: tuple[Claim, ...]) -> None:
        if self._vouched is not None:
            self._vouched.put_api_server(uid, key, tuple(claim.address for claim in claims if claim.address))
