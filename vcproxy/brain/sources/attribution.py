"""Whose a Pod of the super cluster is.

That decides which node learns of which tenant and, on a flat network, into whose zone a pod's packets go; so only what
tenants cannot write counts. Where a project copies tenants' Pods into the super cluster it puts marks of its own on
them and takes those away that tenants wrote; such a Pod is judged by these marks alone, since its other labels
(`vcproxy.dev/tenant` among them) are the tenant's.

| labels of the Pod | mark | owner |
|---|---|---|
| `tenancy.x-k8s.io/cluster`, `…/vcname` | virtualcluster, namespace, cluster | as the Namespace's annotations say |
| `tenancy.x-k8s.io/cluster` alone | control-plane, namespace | as the root Namespace's say; is not placed |
| `vcluster.loft.sh/managed-by` | vcluster, namespace, name | the vCluster of this name in that namespace |
| `app: vcluster`, `release` | control-plane, namespace, name | the same; is not placed |
| `vcproxy.dev/tenant` | name, value | the tenant of that name or uid: whoever made this Pod says so |

A *mark* is read from the Pod alone; who *owns* it is said by sources, before or after the Pod is seen. So a Pod's event
costs one look-up, and a new owner as much as the Pods with its mark, whatever else there is. What no source speaks for
is the directory's: there tenants are named as the label says.
"""

from collections.abc import Callable, Iterable
from typing import Protocol

from vcproxy.brain.sources.directory import uid_of
from vcproxy.kube import shapes

TENANT_LABEL = "vcproxy.dev/tenant"
CLUSTER_LABEL = "tenancy.x-k8s.io/cluster"
VC_NAME_LABEL = "tenancy.x-k8s.io/vcname"
MANAGED_BY_LABEL = "vcluster.loft.sh/managed-by"
RELEASE_LABEL = "release"

VIRTUAL_CLUSTER = "virtualcluster"
CONTROL_PLANE = "control-plane"
VCLUSTER = "vcluster"
NAME = "name"

Mark = tuple[str, ...]
"""What kind of mark (the constants above), and what it says."""


def mark_of(pod: shapes.Pod) -> Mark | None:
    """The mark of a super-cluster Pod; None: the super cluster's own."""
    labels, namespace = pod.metadata.labels, pod.metadata.namespace
    if CLUSTER_LABEL in labels:
        if VC_NAME_LABEL not in labels:
            return CONTROL_PLANE, namespace
        return VIRTUAL_CLUSTER, namespace, labels[CLUSTER_LABEL]
    if MANAGED_BY_LABEL in labels:
        return VCLUSTER, namespace, labels[MANAGED_BY_LABEL]
    if labels.get("app") == "vcluster" and RELEASE_LABEL in labels:
        return CONTROL_PLANE, namespace, labels[RELEASE_LABEL]
    name = labels.get(TENANT_LABEL, "")
    return (NAME, name) if name else None


class Attribution(Protocol):
    """Says whose Pods are."""

    def mark(self, pod: shapes.Pod) -> Mark | None:
        """The Pod's mark; None: nobody's."""

    def owner(self, mark: Mark) -> str | None:
        """The uid of the tenant that owns it now; None: nobody known."""

    def subscribe(self, callback: Callable[[Mark], None]) -> None:
        """`callback` gets each mark whose owner has changed."""


class Owners:
    """Who owns which marks, as sources say. `spoken_for`: kinds of marks that are never the directory's."""

    def __init__(self, spoken_for: Iterable[str] = ()) -> None:
        self._spoken_for = frozenset(spoken_for)
        self._owners: dict[Mark, str] = {}
        self._subscribers: list[Callable[[Mark], None]] = []

    def mark(self, pod: shapes.Pod) -> Mark | None:
        """See the module."""
        return mark_of(pod)

    def owner(self, mark: Mark) -> str | None:
        """See the module."""
        known = self._owners.get(mark)
        if known is not None or mark[0] in self._spoken_for:
            return known
        return uid_of(mark[-1]) if mark[0] in (VIRTUAL_CLUSTER, NAME) else None

    def set(self, mark: Mark, uid: str | None) -> None:
        """The mark is owned by this tenant now; None: by none that a source speaks for."""
        if self._owners.get(mark) == uid:
            return
        if uid is None:
            del self._owners[mark]
        else:
            self._owners[mark] = uid
        for callback in self._subscribers:
            callback(mark)

    def subscribe(self, callback: Callable[[Mark], None]) -> None:
        """For as long as both live."""
        self._subscribers.append(callback)


class Sole:
    """All Pods are one tenant's: those among a tenant's own manifests."""

    def __init__(self, uid: str) -> None:
        self._uid = uid

    def mark(self, pod: shapes.Pod) -> Mark | None:
        """The same for all."""
        return (self._uid,)

    def owner(self, mark: Mark) -> str | None:
        """The tenant."""
        return self._uid

    def subscribe(self, callback: Callable[[Mark], None]) -> None:
        """Nothing ever changes."""
