"""Kamaji (clastix/kamaji, read at ddbabd8, 26.8.2-edge).

A `TenantControlPlane` names a Secret of its namespace in `status.kubeconfig.admin.secretName` (NAME-admin-kubeconfig).
For each kubeconfig the Secret has two keys (internal/resources/kubeconfig.go): `….conf` names the address that the
tenant's workers use, `….svc` the Service NAME.NAMESPACE.svc in the super cluster, which is the one for the brain. The
plain admin's, which RBAC of the tenant can limit, goes before the super-admin's.
"""

from dataclasses import replace

from vcproxy.brain.sources.project import SECRETS, Project, Tenancy
from vcproxy.kube.decode import Resource
from vcproxy.kube.shapes import Object, Shape

LABEL = "kamaji.clastix.io/certificate_lifecycle_controller"
KEYS = ("admin.svc", "super-admin.svc", "admin.conf", "super-admin.conf")


class KubeconfigStatus(Shape, frozen=True):
    """status.kubeconfig.admin."""

    secret_name: str = ""


class Kubeconfigs(Shape, frozen=True):
    """status.kubeconfig."""

    admin: KubeconfigStatus = KubeconfigStatus()


class Status(Shape, frozen=True):
    """status of a TenantControlPlane."""

    kubeconfig: Kubeconfigs = Kubeconfigs()


class TenantControlPlane(Object, frozen=True):
    """kamaji.clastix.io/v1alpha1 TenantControlPlane."""

    status: Status = Status()


class Kamaji(Project[TenantControlPlane]):
    """The project, for hosted.py."""

    title = "kamaji"
    group = "kamaji.clastix.io"
    versions = ("v1alpha1",)
    plural = "tenantcontrolplanes"
    objects = Resource("TenantControlPlane", "", TenantControlPlane)
    secrets = replace(SECRETS, params={"labelSelector": f"{LABEL}=kubeconfig"})

    def tenancy(self, found: TenantControlPlane) -> Tenancy:
        """See the module; before the status is written, the name that it will say."""
        namespace, name = found.key
        return Tenancy((namespace, found.status.kubeconfig.admin.secret_name or f"{name}-admin-kubeconfig"), KEYS)
