"""VirtualCluster (kubernetes-sigs/cluster-api-provider-nested, read at 4d19ac6, its last commit).

A `VirtualCluster` stands for a tenant; its control plane runs in a *root namespace* of the super cluster. The names are
those of its ToClusterKey and GetKubeConfigOfVC (virtualcluster/pkg/syncer/conversion/helper.go):

- root namespace: `status.clusterNamespace`, else NAMESPACE-HASH-NAME. With Cluster API it is the VirtualCluster's own
  namespace, which several may share, so it is no identity.
- kubeconfig: the annotation `…/admin-kubeconfig`; else the Secret of the root namespace that the annotation
  `…/secret.admin-kubeconfig` names, key `value`; else the Secret and key `admin-kubeconfig`.
- host names in `server:` are in brackets (kubeconfig.go there); kube/servers.py takes them off.

Phase Running says that all of it is there, which Pending does not; Error comes and goes, and takes nothing away.

Its syncer copies tenants' Namespaces, Services and Pods into the super cluster and marks them; what tenants write
under the marks' names it removes. `SyncedServices` reads these marks: whose Pods are, and which super ClusterIP each
Service has.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import msgspec

from vcproxy.brain.sources.attribution import CONTROL_PLANE, VC_NAME_LABEL, VIRTUAL_CLUSTER, Mark, Owners
from vcproxy.brain.sources.collection import Collection
from vcproxy.brain.sources.project import SECRETS, Project, Tenancy, Unready
from vcproxy.brain.vouched import Alias, Vouched
from vcproxy.kube import shapes
from vcproxy.kube.decode import NAMESPACES, Key, Resource
from vcproxy.kube.reflector import Event
from vcproxy.kube.shapes import Name, Shape
from vcproxy.model.addresses import readable_addresses

ADMIN = "admin-kubeconfig"
_UID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")

_ANNOTATIONS = {
    "kubeconfig": "tenancy.x-k8s.io/admin-kubeconfig",
    "secret": "tenancy.x-k8s.io/secret.admin-kubeconfig",
}


class Annotations(msgspec.Struct, frozen=True, gc=False, rename=_ANNOTATIONS):
    """The annotations of a VirtualCluster that say where its kubeconfig is; None: not there, "" counts."""

    kubeconfig: str | None = None
    secret: str | None = None


class Metadata(Shape, frozen=True):
    """metadata of a VirtualCluster."""

    name: Name
    namespace: str = ""
    uid: str = ""
    resource_version: str = ""
    labels: dict[str, str] = msgspec.field(default_factory=dict)
    annotations: Annotations = Annotations()


class Status(Shape, frozen=True):
    """status of a VirtualCluster; phase is Pending, Running, Updating or Error, "" before the manager has seen it."""

    phase: str = ""
    cluster_namespace: str = ""


class VirtualCluster(Shape, frozen=True):
    """tenancy.x-k8s.io/v1alpha1 VirtualCluster."""

    metadata: Metadata
    status: Status = Status()

    @property
    def key(self) -> Key:
        """(namespace, name)."""
        return self.metadata.namespace, self.metadata.name


class VirtualClusters(Project[VirtualCluster]):
    """The project, for hosted.py."""

    title = "virtualCluster"
    group = "tenancy.x-k8s.io"
    versions = ("v1alpha1",)
    plural = "virtualclusters"
    shares_nodes = True
    objects = Resource("VirtualCluster", "", VirtualCluster)
    secrets = replace(SECRETS, params={"fieldSelector": f"metadata.name={ADMIN}"})

    def tenancy(self, found: VirtualCluster) -> Tenancy:
        """See the module."""
        if found.status.phase in ("", "Pending"):
            raise Unready(f"its phase is {found.status.phase or 'not set'}: it is read when that is Running")
        annotations, root = found.metadata.annotations, root_namespace(found)
        if annotations.secret is not None:
            return Tenancy((root, annotations.secret), ("value",), annotations.kubeconfig)
        return Tenancy((root, ADMIN), (ADMIN,), annotations.kubeconfig)

    def stands(self, secret: Key) -> bool:
        """Secrets of the usual name are followed in all namespaces at once."""
        return secret[1] == ADMIN


def root_namespace(found: VirtualCluster) -> str:
    """Where the control plane runs."""
    metadata = found.metadata
    digest = hashlib.sha256(metadata.uid.encode()).hexdigest()[:6]
    return found.status.cluster_namespace or f"{metadata.namespace}-{digest}-{metadata.name}"


class _Synced(NamedTuple):
    """What the annotations of a Namespace say: whose it is, and which of that tenant's Namespaces it stands for."""

    uid: str
    cluster: str
    namespace: str
    root: bool


_Place = tuple[str, Key]
"""Tenant's uid, and the Service's key in the tenant's API."""


class SyncedServices:
    """Marks on Namespaces and Services of the super cluster into `owners` and `vouched`.

    A super Namespace names the uid of its VirtualCluster; with that everything in it is attributed, so nothing depends
    on names that may be used again. The cost of a Service's event is one look-up; a Namespace's are those in it.
    """

    resources: Sequence[Resource[Any]] = (
        NAMESPACES,
        Resource("Service", "/api/v1/services", shapes.Service, {"labelSelector": VC_NAME_LABEL}),
    )

    def __init__(self, owners: Owners, vouched: Vouched) -> None:
        self._owners = owners
        self._vouched = vouched
        self._namespaces: Collection[shapes.Namespace, _Synced] = Collection(_synced)
        self._services: Collection[shapes.Service, Alias] = Collection(_alias)
        self._inside: dict[str, set[str]] = {}  # super namespace -> names of Services with an alias
        self._claims: dict[_Place, dict[Key, Alias]] = {}  # by the super Service's key

    def take(self, kind: str, event: Event[Any]) -> None:
        """One event about Namespaces or Services."""
        if kind == "Namespace":
            for key, was, now in self._namespaces.take(event):
                self._move(key[1], was, now)
        else:
            for key, _, alias in self._services.take(event):
                self._claim(self._namespaces.values.get(("", key[0])), key, alias)
                self._index(key, alias is not None)

    def _move(self, name: str, old: _Synced | None, new: _Synced | None) -> None:
        """A Namespace is now another's."""
        if old == new:
            return
        marks = dict.fromkeys(_marks(name, old)) | dict.fromkeys(_marks(name, new), new.uid if new else None)
        for mark, uid in marks.items():
            self._owners.set(mark, uid)
        for service in sorted(self._inside.get(name, ())):
            self._claim(old, (name, service), None)
            self._claim(new, (name, service), self._services.values[name, service])

    def _index(self, key: Key, present: bool) -> None:
        held = self._inside.setdefault(key[0], set())
        (held.add if present else held.discard)(key[1])
        if not held:
            del self._inside[key[0]]

    def _claim(self, owner: _Synced | None, key: Key, alias: Alias | None) -> None:
        """A super Service in a Namespace of this owner stands for this; None: for nothing.

        Should two stand for the same Service of the tenant, the first by name does.
        """
        if owner is None or owner.root:
            return
        place = owner.uid, (owner.namespace, key[1])
        claims = self._claims.setdefault(place, {})
        claims.pop(key, None)
        if alias is not None:
            claims[key] = alias
        if not claims:
            del self._claims[place]
        self._vouched.put_alias(owner.uid, place[1], claims[min(claims)] if claims else None)


def _marks(name: str, synced: _Synced | None) -> list[Mark]:
    if synced is None:
        return []
    return [(CONTROL_PLANE, name)] if synced.root else [(VIRTUAL_CLUSTER, name, synced.cluster)]


def _synced(found: shapes.Namespace) -> _Synced | None:
    said = found.metadata.annotations
    if not _UID.fullmatch(said.vc_uid):
        return None
    if said.vc_root_namespace == "true":
        return _Synced(said.vc_uid, "", "", root=True)
    return _Synced(said.vc_uid, said.cluster, said.namespace, root=False) if said.cluster and said.namespace else None


def _alias(found: shapes.Service) -> Alias | None:
    """The super ClusterIPs of a synced Service; None for one without (headless, ExternalName)."""
    spec, uid = found.spec, found.metadata.annotations.uid
    if not uid or spec.type == "ExternalName":
        return None
    addresses = readable_addresses(spec.cluster_ips or (spec.cluster_ip,))  # not "None", nor what is not allocated yet
    return Alias(uid, tuple(sorted(set(addresses)))) if addresses else None
