"""Pods and Nodes into the placement: where pods run, and what nodes are.

Placement is what tenants cannot write: the super cluster's own Pods, and whose they are by attribution.py. Pods that
are nobody's are the super cluster's own: their packets are in no tenant's zone, so they are not placed.
"""

import sys
from typing import Any

import msgspec

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


class _Group:
    """The Pods with one mark, and the tenant that owns them; "": nobody known."""

    __slots__ = ("keys", "mark", "owner")

    def __init__(self, mark: Mark, owner: str) -> None:
        self.mark, self.owner = mark, owner
        self.keys: set[Key] = set()


class _Seen(msgspec.Struct, frozen=True, gc=False):
    """A Pod with a mark, and what was told of it: claims, at least one, of the tenant that owned it then."""

    group: _Group
    claims: tuple[Claim, ...]

    @property
    def placed(self) -> tuple[Claim, ...]:
        """What the placement is to know of it."""
        return self.claims if self.claims[0].tenant and self.group.mark[0] != CONTROL_PLANE else ()

    @property
    def vouched(self) -> str:
        """The tenant whose API server it is, "": none's."""
        return self.claims[0].tenant if self.group.mark[0] == CONTROL_PLANE else ""


class Whereabouts:
    """Events about Pods and Nodes into the placement, for one origin of them.

    `vouched` learns where tenants' API servers run. `listed`: the kinds of which a complete list was read.
    """

    def __init__(self, placement: Placement, *, attribution: Attribution, vouched: Vouched | None = None) -> None:
        self.listed: set[Kind] = set()
        self._placement = placement
        self._attribution = attribution
        self._vouched = vouched
        self._pods: dict[Key, _Seen] = {}
        self._groups: dict[Mark, _Group] = {}
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
        group = self._group(mark) if mark is not None else None
        claims = pod_claims(found, group.owner) if group is not None else ()
        if group is None or not claims:
            self._remove("Pod", found.key)
            return
        self._groups[group.mark] = group
        key = sys.intern(found.key[0]), found.key[1]
        self._tell(key, _Seen(group, claims))

    def _group(self, mark: Mark) -> _Group:
        """The Pods with this mark; a new one, that is not kept yet, if there are none."""
        return self._groups.get(mark) or _Group(mark, self._attribution.owner(mark) or "")

    def _remove(self, kind: Kind, key: Key) -> None:
        if kind == "Pod":
            self._tell(key, None)
        elif key in self._nodes:
            self._nodes.discard(key)
            self._placement.put_facts(key[1], None)

    def _owner_changed(self, mark: Mark) -> None:
        group = self._groups.get(mark)
        if group is None:
            return
        group.owner = self._attribution.owner(mark) or ""
        for key in list(group.keys):
            claims = self._pods[key].claims
            self._tell(key, _Seen(group, tuple(Claim(claim.node, claim.address, group.owner) for claim in claims)))

    def _tell(self, key: Key, new: _Seen | None) -> None:
        """A Pod is now so; None: it is gone, or nobody's."""
        old = self._pods.get(key)
        if new is not None:
            self._pods[key] = new
            new.group.keys.add(key)
        elif old is not None:
            del self._pods[key]
        else:
            return
        if old is not None and (new is None or new.group is not old.group):
            old.group.keys.discard(key)
            if not old.group.keys:
                del self._groups[old.group.mark]
        self._placement.move(old.placed if old is not None else (), new.placed if new is not None else ())
        self._vouch(key, old, new)

    def _vouch(self, key: Key, old: _Seen | None, new: _Seen | None) -> None:
        if self._vouched is None:
            return
        if old is not None and old.vouched and (new is None or new.vouched != old.vouched):
            self._vouched.put_api_server(old.vouched, key, ())
        if new is not None and new.vouched:
            addresses = tuple(claim.address for claim in new.claims if claim.address)
            self._vouched.put_api_server(new.vouched, key, addresses)
