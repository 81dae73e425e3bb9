"""Every source of tenants against a real API server, with the rights that deploy/ gives it and no others.

What the projects' controllers would write is written by hand; whether selectors, versions and rights fit together only
a real API server says.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest

from e2e.apiclient import ApiClient, Resource
from e2e.conftest import PlaneFactory
from e2e.controlplane import ControlPlane
from e2e.hosting import brains_kubeconfig
from e2e.objects import Object, namespace, service
from vcproxy.lab.cluster import Cluster

pytestmark = [pytest.mark.controlplane]

FLEET = "fleet"
KINDS = {
    "clusterAPI": Resource("cluster.x-k8s.io/v1beta2", "Cluster", "clusters"),
    "kamaji": Resource("kamaji.clastix.io/v1alpha1", "TenantControlPlane", "tenantcontrolplanes"),
    "k0smotron": Resource("k0smotron.io/v1beta1", "Cluster", "clusters"),
    "hypershift": Resource("hypershift.openshift.io/v1beta1", "HostedCluster", "hostedclusters"),
}
LABELS = {
    "kamaji": {"kamaji.clastix.io/certificate_lifecycle_controller": "kubeconfig"},
    "vcluster": {"app": "vcluster", "vcluster-name": "vcluster"},
}
SECRETS = {
    "clusterAPI": (FLEET, "clusterapi-kubeconfig", "value"),
    "kamaji": (FLEET, "kamaji-admin-kubeconfig", "admin.svc"),
    "k0smotron": (FLEET, "k0smotron-kubeconfig", "value"),
    "hypershift": (f"{FLEET}-hypershift", "service-network-admin-kubeconfig", "kubeconfig"),
    "vcluster": (FLEET, "vc-vcluster", "config"),
}


def definition(resource: Resource) -> Object:
    """A CustomResourceDefinition that takes anything."""
    group, version = resource.api_version.split("/")
    schema = {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{resource.plural}.{group}"},
        "spec": {
            "group": group,
            "scope": "Namespaced",
            "names": {"kind": resource.kind, "plural": resource.plural, "singular": resource.kind.lower()},
            "versions": [{"name": version, "served": True, "storage": True, "schema": schema}],
        },
    }


def secret(title: str, kubeconfig: Path) -> Object:
    """The Secret of a project's tenant."""
    place, name, key = SECRETS[title]
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": name, "namespace": place, "labels": LABELS.get(title, {})},
        "type": "cluster.x-k8s.io/secret" if key == "value" else "Opaque",
        "data": {key: base64.b64encode(kubeconfig.read_bytes()).decode()},
    }


def host(client: ApiClient, title: str) -> str:
    """Make the object that is a project's tenant; returns its uid."""
    name = title.lower()
    if title == "vcluster":
        labels = {"app": "vcluster", "release": name, "vcluster.loft.sh/service": "true"}
        made = client.create(service(name, namespace=FLEET, ports=[443], labels=labels))
    else:
        resource = KINDS[title]
        metadata = {"name": name, "namespace": FLEET}
        found = {"apiVersion": resource.api_version, "kind": resource.kind, "metadata": metadata}
        made = client.create(found, resource=resource)
    uid: str = made.object["metadata"]["uid"]
    return uid


def narrow(client: ApiClient, title: str) -> None:
    """Give the rights to a project's objects and Secrets in one namespace only, as the files say how to."""
    name = f"vcproxy-{title.lower()}"
    everywhere = client.get("ClusterRole", name).object
    own = [rule for rule in everywhere["rules"] if "watch" in rule["verbs"]]
    client.update({**everywhere, "rules": [rule for rule in everywhere["rules"] if rule not in own]})
    group = "rbac.authorization.k8s.io"
    metadata = {"name": name, "namespace": FLEET}
    client.create({"apiVersion": f"{group}/v1", "kind": "Role", "metadata": metadata, "rules": own})
    client.create(
        {
            "apiVersion": f"{group}/v1",
            "kind": "RoleBinding",
            "metadata": metadata,
            "roleRef": {"apiGroup": group, "kind": "Role", "name": name},
            "subjects": [{"apiGroup": group, "kind": "User", "name": "vcproxy-brain"}],
        }
    )


@pytest.mark.parametrize("namespaces", [(), (FLEET,)])
def test_every_source_finds_its_tenants_with_its_own_rights(
    control_plane: PlaneFactory,
    tenant_planes: tuple[ControlPlane, ControlPlane],
    tmp_path: Path,
    namespaces: tuple[str, ...],
) -> None:
    plane = control_plane("fleet", service_cidrs=("10.96.0.0/16",))
    client, kubeconfig = plane.client, tenant_planes[0].kubeconfig
    files = [f"sources/{title.lower()}.yaml" for title in SECRETS]
    brains = brains_kubeconfig(plane, tmp_path / "brain.kubeconfig", "brain.yaml", *files)
    for name in (FLEET, f"{FLEET}-hypershift"):
        client.create(namespace(name))
    for title in SECRETS:
        if namespaces and title != "hypershift":
            narrow(client, title)
    for resource in KINDS.values():
        client.create(definition(resource))
    scoped: dict[str, Any] = {"namespaces": list(namespaces)}
    sources = [{title: {} if title == "hypershift" else scoped} for title in SECRETS]
    brain = {
        "superCluster": {"kubeconfig": str(brains)},
        "tenants": {"sources": sources, "policy": {"apiServers": ["127.0.0.0/8"]}},
    }
    with Cluster(tmp_path / "cluster", brain=brain) as cluster:
        cluster.start_brain()
        cluster.wait("it is ready", lambda: cluster.ask("brain")["ready"], timeout=40)
        uids = {title: host(client, title) for title in SECRETS}

        def rows() -> dict[str, Any]:
            return {row["uid"]: row for row in cluster.ask("brain")["tenants"]}

        cluster.wait("all are found", lambda: set(uids.values()) < set(rows()))
        assert {rows()[uid]["name"] for uid in uids.values()} == {f"{FLEET}.{title.lower()}" for title in SECRETS}
        for title in SECRETS:
            client.create(secret(title, kubeconfig))
        followed = [uid for title, uid in uids.items() if title != "vcluster"]
        cluster.wait("they are synced", lambda: all(rows()[uid]["synced"] for uid in followed), timeout=30)
        # A vCluster's kubeconfig is for this machine; the Service that it means is none of those allowed here.
        reason = cluster.wait("the vCluster is refused", lambda: rows()[uids["vcluster"]]["staleReason"])
        assert "does not allow an API server at 10.96." in reason
        assert not cluster.ask("brain")["problems"]
        for title, uid in uids.items():
            if title == "vcluster":
                client.delete("Service", title, FLEET)
            else:
                client.delete(KINDS[title], title.lower(), FLEET)
            cluster.wait(f"{title}'s tenant is gone", lambda gone=uid: gone not in rows())
