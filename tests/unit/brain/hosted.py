"""Tenants as the projects that host control planes write them into a super cluster.

Objects as their controllers leave them (versions: see the sources' modules), with what vcproxy does not read around it.
"""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Any

Json = dict[str, Any]

UID = "5f0f1a52-6c1c-4a43-9a4e-0d6c2f6f7a11"
OTHER_UID = "c1d7c6f5-30b6-4b44-8a0a-2f6fb4b1d0a2"


def kubeconfig(template: bytes, server: str = "", token: str = "") -> bytes:
    """A kubeconfig with another server or token."""
    document = json.loads(template)
    if server:
        document["clusters"][0]["cluster"]["server"] = server
    if token:
        document["users"][0]["user"] = {"token": token}
    return b"\n" + json.dumps(document).encode()


def secret(
    namespace: str, name: str, labels: dict[str, str] | None = None, kind: str = "Opaque", **data: bytes
) -> Json:
    """A Secret; keys as in `data`, with `__` for a dot and `_` for a dash."""
    return {
        "metadata": {"namespace": namespace, "name": name, "labels": labels or {}},
        "type": kind,
        "data": {
            key.replace("__", ".").replace("_", "-"): base64.b64encode(value).decode() for key, value in data.items()
        },
    }


def virtual_cluster(
    name: str = "tenant-a",
    *,
    namespace: str = "default",
    uid: str = UID,
    phase: str = "Running",
    annotations: dict[str, str] | None = None,
    root: str | None = None,
) -> Json:
    """A VirtualCluster of the native provisioner; `root`: status.clusterNamespace, by default what it sets."""
    status: Json = {
        "phase": phase,
        "message": "tenant control plane is running",
        "reason": "TenantControlPlaneRunning",
        "conditions": [{"lastTransitionTime": "2026-11-23T05:23:57Z", "status": "True"}],
        "clusterNamespace": root_of(name, namespace=namespace, uid=uid) if root is None else root,
    }
    return {
        "apiVersion": "tenancy.x-k8s.io/v1alpha1",
        "metadata": {
            "name": name,
            "namespace": namespace,
            "uid": uid,
            "finalizers": ["virtualcluster.finalizer.native"],
            "annotations": annotations or {},
        },
        "spec": {
            "clusterDomain": "cluster.local",
            "clusterVersionName": "cv",
            "opaqueMetaPrefixes": ["tenancy.x-k8s.io"],
        },
        "status": {key: value for key, value in status.items() if value},
    }


def root_of(name: str = "tenant-a", *, namespace: str = "default", uid: str = UID) -> str:
    """The root namespace of a VirtualCluster."""
    return f"{namespace}-{hashlib.sha256(uid.encode()).hexdigest()[:6]}-{name}"


def root_namespace(uid: str = UID, name: str = "tenant-a", namespace: str = "default") -> Json:
    """The Namespace that vc-manager makes for a control plane."""
    marks = {"vcname": name, "vcnamespace": namespace, "vcrootns": "true", "vcuid": uid}
    return _namespace(root_of(name, namespace=namespace, uid=uid), marks)


def synced_namespace(tenant_namespace: str, uid: str = UID, name: str = "tenant-a", namespace: str = "default") -> Json:
    """A Namespace that the syncer made for one of the tenant's."""
    cluster = root_of(name, namespace=namespace, uid=uid)
    marks = {
        "cluster": cluster,
        "namespace": tenant_namespace,
        "uid": "0f1c2d3e-0000-4000-8000-000000000001",
        "vcname": name,
        "vcnamespace": namespace,
        "vcuid": uid,
    }
    return _namespace(f"{cluster}-{tenant_namespace}", marks)


def _namespace(name: str, marks: dict[str, str]) -> Json:
    annotations = {f"tenancy.x-k8s.io/{key}": value for key, value in marks.items()}
    return {"metadata": {"name": name, "annotations": annotations}, "status": {"phase": "Active"}}


def synced_service(
    name: str, service_uid: str, *cluster_ips: str, tenant_namespace: str = "demo", uid: str = UID, **spec: Any
) -> Json:
    """A Service that the syncer made for one of the tenant's."""
    cluster = root_of(uid=uid)
    marks = {"cluster": cluster, "namespace": tenant_namespace, "uid": service_uid, "ownerReferences": "null"}
    return {
        "metadata": {
            "name": name,
            "namespace": f"{cluster}-{tenant_namespace}",
            "labels": {"tenancy.x-k8s.io/vcname": "tenant-a", "tenancy.x-k8s.io/vcnamespace": "default"},
            "annotations": {
                **{f"tenancy.x-k8s.io/{key}": value for key, value in marks.items()},
                "tenancy.x-k8s.io/clusterIP": "10.32.0.100",
                "transparency.tenancy.x-k8s.io/clusterIP": "10.96.135.228",
            },
        },
        "spec": {
            "type": "ClusterIP",
            "clusterIP": cluster_ips[0],
            "clusterIPs": list(cluster_ips),
            "ports": [{"name": "http", "port": 80, "protocol": "TCP", "targetPort": "http"}],
            **spec,
        },
        "status": {"loadBalancer": {}},
    }


def synced_pod(
    name: str, address: str, *, node: str = "n1", tenant_namespace: str = "demo", uid: str = UID, **labels: str
) -> Json:
    """A Pod that the syncer made for one of the tenant's; `labels` are those that the tenant wrote."""
    cluster = root_of(uid=uid)
    return {
        "metadata": {
            "name": name,
            "namespace": f"{cluster}-{tenant_namespace}",
            "labels": {
                **labels,
                "tenancy.x-k8s.io/cluster": cluster,
                "tenancy.x-k8s.io/vcname": "tenant-a",
                "tenancy.x-k8s.io/vcnamespace": "default",
            },
        },
        "spec": {"nodeName": node},
        "status": {"phase": "Running", "podIP": address, "podIPs": [{"ip": address}]},
    }


def cluster(group: str, version: str, name: str = "blue", uid: str = UID) -> Json:
    """A Cluster of Cluster API or k0smotron."""
    return {
        "apiVersion": f"{group}/{version}",
        "metadata": {"name": name, "namespace": "fleet", "uid": uid},
        "spec": {"clusterNetwork": {"services": {"cidrBlocks": ["10.96.0.0/12"]}}},
        "status": {"initialization": {"controlPlaneInitialized": True}},
    }


def tenant_control_plane(name: str = "blue", secret_name: str = "blue-admin-kubeconfig") -> Json:
    """Kamaji's; without `secret_name` its status has not been written yet."""
    admin = {"secretName": secret_name, "checksum": "d41d8cd98f00b204", "lastUpdate": "2026-08-01T00:00:00Z"}
    return {
        "apiVersion": "kamaji.clastix.io/v1alpha1",
        "metadata": {"name": name, "namespace": "fleet", "uid": UID},
        "spec": {"networkProfile": {"port": 6443, "serviceCidr": "10.96.0.0/16"}},
        "status": {"kubeconfig": {"admin": admin}, "controlPlaneEndpoint": "192.0.2.4:6443"} if secret_name else {},
    }


def hosted_cluster(name: str = "blue.eu") -> Json:
    """HyperShift's."""
    return {
        "apiVersion": "hypershift.openshift.io/v1beta1",
        "metadata": {"name": name, "namespace": "fleet", "uid": UID},
        "spec": {"networking": {"serviceNetwork": [{"cidr": "172.31.0.0/16"}]}},
        "status": {"kubeconfig": {"name": f"{name}-admin-kubeconfig"}},
    }


def vcluster_service(name: str = "blue", uid: str = UID, **labels: str) -> Json:
    """The Service of a vCluster's API server."""
    return {
        "metadata": {
            "name": name,
            "namespace": "fleet",
            "uid": uid,
            "labels": {"app": "vcluster", "release": name, "vcluster.loft.sh/service": "true", **labels},
        },
        "spec": {"clusterIP": "10.96.0.7", "ports": [{"name": "https", "port": 443, "targetPort": 8443}]},
    }
