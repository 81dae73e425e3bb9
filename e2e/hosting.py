"""VirtualClusters in a super cluster: a world whose tenants are objects there.

`Hosting` does by hand what vc-manager and the syncer do: a VirtualCluster, its root namespace and its kubeconfig Secret;
for each of the tenant's Namespaces, Services and Pods a copy in the super cluster with the syncer's marks, and of a
Service only the super ClusterIP that the super API server gave it is new. The definition's schema is that of
virtualcluster/config/crd in kubernetes-sigs/cluster-api-provider-nested.

The brain has no more rights than deploy/ gives it: its user is bound to the ClusterRoles from there.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import yaml

from e2e.apiclient import ApiClient, ApiError, Resource
from e2e.controlplane import ADVERTISED, ControlPlane
from e2e.objects import Object, namespace, pod, pod_status, service
from e2e.oracle import SUPER
from e2e.polling import eventually
from e2e.world import World
from vcproxy.lab import Lab, Pod
from vcproxy.lab.cluster import Cluster

DEPLOY = Path(__file__).parent.parent / "deploy"
VIRTUAL_CLUSTER = Resource("tenancy.x-k8s.io/v1alpha1", "VirtualCluster", "virtualclusters")
OWNER = "default"
"""The namespace of VirtualClusters."""
_TEXT, _TEXTS = {"type": "string"}, {"type": "array", "items": {"type": "string"}}
DEFINITION: Object = {
    "apiVersion": "apiextensions.k8s.io/v1",
    "kind": "CustomResourceDefinition",
    "metadata": {"name": "virtualclusters.tenancy.x-k8s.io"},
    "spec": {
        "group": "tenancy.x-k8s.io",
        "scope": "Namespaced",
        "names": {
            "kind": "VirtualCluster",
            "listKind": "VirtualClusterList",
            "plural": "virtualclusters",
            "singular": "virtualcluster",
            "shortNames": ["vc"],
        },
        "versions": [
            {
                "name": "v1alpha1",
                "served": True,
                "storage": True,
                "schema": {
                    "openAPIV3Schema": {
                        "type": "object",
                        "properties": {
                            "apiVersion": _TEXT,
                            "kind": _TEXT,
                            "metadata": {"type": "object"},
                            "spec": {
                                "type": "object",
                                "required": ["clusterVersionName"],
                                "properties": {
                                    "clusterDomain": _TEXT,
                                    "clusterVersionName": _TEXT,
                                    "opaqueMetaPrefixes": _TEXTS,
                                    "pkiExpireDays": {"type": "integer", "format": "int64"},
                                    "serviceCidr": _TEXT,
                                    "transparentMetaPrefixes": _TEXTS,
                                },
                            },
                            "status": {
                                "type": "object",
                                "required": ["phase"],
                                "properties": {
                                    "clusterNamespace": _TEXT,
                                    "message": _TEXT,
                                    "phase": _TEXT,
                                    "reason": _TEXT,
                                    "conditions": {
                                        "type": "array",
                                        "items": {
                                            "type": "object",
                                            "required": ["status"],
                                            "properties": {
                                                "lastTransitionTime": {"type": "string", "format": "date-time"},
                                                "message": _TEXT,
                                                "reason": _TEXT,
                                                "status": _TEXT,
                                            },
                                        },
                                    },
                                },
                            },
                        },
                    }
                },
            }
        ],
    },
}


class Hosting:
    """vc-manager and the syncer for one VirtualCluster `name`, by hand."""

    def __init__(self, super_client: ApiClient, name: str) -> None:
        self.client = super_client
        self.name = name
        made = self.client.create(
            {
                "apiVersion": VIRTUAL_CLUSTER.api_version,
                "kind": VIRTUAL_CLUSTER.kind,
                "metadata": {"name": name, "namespace": OWNER, "finalizers": []},
                "spec": {"clusterVersionName": "cv", "clusterDomain": "cluster.local"},
                "status": {"phase": "Pending"},
            },
            resource=VIRTUAL_CLUSTER,
        ).object
        self.uid: str = made["metadata"]["uid"]
        self.root = f"{OWNER}-{hashlib.sha256(self.uid.encode()).hexdigest()[:6]}-{name}"
        self._marks = {"vcname": name, "vcnamespace": OWNER}
        self._namespaces: set[str] = set()
        root = namespace(self.root)
        root["metadata"]["annotations"] = _tenancy(**self._marks, vcuid=self.uid, vcrootns="true")
        self.client.create(root)

    def run(self, kubeconfig: Path) -> None:
        """The control plane is there: its kubeconfig and its API server's Pod, then phase Running."""
        data = {"admin-kubeconfig": base64.b64encode(b"\n" + kubeconfig.read_bytes()).decode()}
        metadata = {"name": "admin-kubeconfig", "namespace": self.root}
        self.client.create({"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "data": data})
        self.client.create(
            pod("apiserver-0", namespace=self.root, node="elsewhere", labels=_tenancy(cluster=self.root))
        )
        self.client.patch_status("Pod", "apiserver-0", pod_status(ADVERTISED), self.root)
        self.phase("Running")

    def phase(self, phase: str) -> None:
        """Set status.phase (the definition has no status subresource)."""
        status = {"phase": phase, "clusterNamespace": self.root}
        self.client.patch(VIRTUAL_CLUSTER, self.name, {"status": status}, OWNER)

    def rotate(self, kubeconfig: Path) -> None:
        """Write another kubeconfig into the Secret: nothing else says that there is one."""
        data = {"admin-kubeconfig": base64.b64encode(b"\n" + kubeconfig.read_bytes()).decode()}
        self.client.patch("Secret", "admin-kubeconfig", {"data": data}, self.root)

    def place(self, tenant_namespace: str) -> str:
        """The super namespace of one of the tenant's, made when it is first asked for."""
        name = f"{self.root}-{tenant_namespace}"
        if name not in self._namespaces:
            self._namespaces.add(name)
            made = namespace(name)
            made["metadata"]["annotations"] = _tenancy(
                **self._marks, vcuid=self.uid, cluster=self.root, namespace=tenant_namespace, uid="of-the-namespace"
            )
            self.client.create(made)
        return name

    def sync_service(self, found: Object) -> tuple[str, ...]:
        """Copy one of the tenant's Services; returns the super ClusterIPs that the copy was given."""
        metadata, spec = found["metadata"], found["spec"]
        ports = [{key: port[key] for key in ("name", "port", "protocol") if key in port} for port in spec["ports"]]
        copy = service(
            metadata["name"],
            namespace=self.place(metadata["namespace"]),
            ports=ports,
            dual_stack=len(spec["clusterIPs"]) > 1,
            labels=_tenancy(**self._marks),
            annotations=_tenancy(
                **self._marks,
                cluster=self.root,
                namespace=metadata["namespace"],
                uid=metadata["uid"],
                clusterIP=spec["clusterIP"],
            ),
        )
        return tuple(self.client.create(copy).object["spec"]["clusterIPs"])

    def unsync_service(self, name: str, tenant_namespace: str = "default") -> None:
        """Delete the copy."""
        self.client.delete("Service", name, self.place(tenant_namespace))

    def sync_pod(self, name: str, made: Pod, *, labels: Mapping[str, str] | None = None) -> str:
        """Copy one of the tenant's Pods, bound and running; returns the super namespace. `labels`: the tenant's."""
        place = self.place("default")
        marks = _tenancy(**self._marks, cluster=self.root)
        self.client.create(pod(name, namespace=place, node=made.node, labels={**(labels or {}), **marks}))
        self.client.patch_status("Pod", name, pod_status(made.ip4, made.ip6), place)
        return place

    def end(self) -> None:
        """Delete the VirtualCluster; root namespace and copies live on for a while, as they do."""
        self.client.delete(VIRTUAL_CLUSTER, self.name, OWNER)


class HostedWorld(World):
    """A world whose tenants with API servers are VirtualClusters. `hostings`: by tenant."""

    def __init__(self, lab: Lab, cluster: Cluster, planes: Mapping[str, ControlPlane]) -> None:
        super().__init__(lab, cluster, planes)
        self.hostings: dict[str, Hosting] = {}
        self.aliases: dict[tuple[str, str, str], tuple[str, ...]] = {}
        """Super ClusterIPs by tenant, namespace and name of a Service."""

    def give_kubeconfig(self, tenant: str, file: Path) -> None:
        """A tenant's first kubeconfig brings its VirtualCluster into being; later ones rotate the Secret."""
        if tenant in self.hostings:
            self.hostings[tenant].rotate(file)
        else:
            self.hostings[tenant] = Hosting(self.super.client, tenant)
            self.hostings[tenant].run(file)

    def uid(self, tenant: str) -> str:
        """Of its VirtualCluster."""
        return tenant if tenant == SUPER else self.hostings[tenant].uid

    def tell_pod(self, name: str, tenant: str, made: Pod) -> None:
        """As the syncer makes it, for tenants."""
        if tenant == SUPER:
            super().tell_pod(name, tenant, made)
        else:
            self.hostings[tenant].sync_pod(name, made)

    def sync(self, tenant: str, *services: str) -> None:
        """Copy Services of the tenant's default namespace into the super cluster."""
        for name in services:
            found = self.planes[tenant].client.get("Service", name, "default").object
            self.aliases[tenant, "default", name] = self.hostings[tenant].sync_service(found)

    def objects(self, tenant: str) -> tuple[list[Object], list[Object]]:
        """Services once more under their super ClusterIPs, which is what an alias is."""
        services, slices = super().objects(tenant)
        return [*services, *self._aliased(tenant, services)], slices

    def _aliased(self, tenant: str, services: Iterable[Object]) -> Iterator[Object]:
        for found in services:
            metadata = found["metadata"]
            alias = self.aliases.get((tenant, metadata["namespace"], metadata["name"]))
            if alias:
                yield {**found, "spec": {**found["spec"], "clusterIPs": list(alias)}}


def brains_kubeconfig(plane: ControlPlane, path: Path, *files: str) -> Path:
    """Credentials of a user that has the rights of these files of deploy/, and no others."""
    for file in files:
        for found in yaml.safe_load_all((DEPLOY / file).read_text()):
            if found["kind"] == "ClusterRole":
                plane.client.create(found)
                name = found["metadata"]["name"]
                plane.client.create(
                    {
                        "apiVersion": "rbac.authorization.k8s.io/v1",
                        "kind": "ClusterRoleBinding",
                        "metadata": {"name": name},
                        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": name},
                        "subjects": [
                            {"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": "vcproxy-brain"}
                        ],
                    }
                )
    return plane.write_kubeconfig(path, user="vcproxy-brain")


def configuration(kubeconfig: Path, *, policy: Mapping[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """BrainConfiguration of a brain with VirtualClusters. In these tests API servers are on this machine.

    `policy`: further fields of `tenants.policy`; `more`: of the configuration.
    """
    return {
        "superCluster": {"kubeconfig": str(kubeconfig)},
        "tenants": {
            "sources": [{"virtualCluster": {}}],
            "policy": {"apiServers": ["127.0.0.0/8"], **(policy or {})},
        },
        **more,
    }


@contextmanager
def hosting(
    directory: Path,
    super_plane: ControlPlane,
    tenants: Mapping[str, ControlPlane],
    *,
    brain: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Iterator[HostedWorld]:
    """A running world on the flat network with these VirtualClusters. `brain`: see `configuration`; `settings`: of the
    NodeConfiguration.
    """
    super_plane.client.create(DEFINITION)
    kubeconfig = brains_kubeconfig(
        super_plane, directory / "brain.kubeconfig", "brain.yaml", "sources/virtualcluster.yaml"
    )
    with ExitStack() as stack:
        lab = stack.enter_context(Lab("vcp-host"))
        cluster = stack.enter_context(Cluster(directory, brain=configuration(kubeconfig, **(brain or {}))))
        world = HostedWorld(lab, cluster, {SUPER: super_plane})
        served(super_plane.client)
        for name, plane in ((SUPER, None), *tenants.items()):
            world.add_tenant(name, overlay=False, plane=plane)
        world.start(**settings)
        yield world


def served(client: ApiClient) -> None:
    """Wait until the API server serves VirtualClusters."""

    def there() -> bool:
        try:
            client.list(VIRTUAL_CLUSTER)
        except ApiError:
            return False
        return True

    eventually(there, what="VirtualClusters are served")


def _tenancy(**marks: str) -> dict[str, str]:
    return {f"tenancy.x-k8s.io/{key}": value for key, value in marks.items()}
