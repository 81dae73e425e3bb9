"""vCluster (loft-sh/vcluster, read at 4876675, August 2026).

There is no object for a vCluster but what its Helm chart makes: the Service of its API server (labels `app: vcluster`
and `vcluster.loft.sh/service: "true"`, chart/templates/service.yaml), which bears its name and lives as long as it
does. That is the tenant here, rather than the Secret, which vCluster makes again when it is deleted. The Secret
vc-NAME, key `config` (pkg/util/kubeconfig), says `https://localhost:8443` for people who forward a port; unless the
chart was told another server, the Service itself is dialled, whose name is in the certificate (pkg/server/cert).

A vCluster copies its tenant's Services, Secrets and labels into the same namespace, so a tenant could write all of the
above. But what it copies bears `vcluster.loft.sh/managed-by` (pkg/util/translate/labels.go): such objects do not count.
The same label says whose Pods are; those without it that the chart labels are the control plane's. Namespaces that a
vCluster maps to others of the host (`sync.toHost.namespaces`) are not known here: Pods in them are nobody's.
"""

import ipaddress
from dataclasses import replace

from yarl import URL

from vcproxy.brain.sources.attribution import CONTROL_PLANE, MANAGED_BY_LABEL, VCLUSTER, Mark
from vcproxy.brain.sources.project import SECRETS, Project, Tenancy
from vcproxy.kube.decode import Resource
from vcproxy.kube.kubeconfig import Credentials
from vcproxy.kube.shapes import Object

PORT = 443
"""Of the Service."""


class Service(Object, frozen=True):
    """The Service of a vCluster's API server."""


class VCluster(Project[Service]):
    """The project, for hosted.py."""

    title = "vcluster"
    group = ""
    versions = ("v1",)
    plural = "services"
    shares_nodes = True
    objects = Resource(
        "Service",
        "/api/v1/services",
        Service,
        {"labelSelector": f"app=vcluster,vcluster.loft.sh/service=true,!{MANAGED_BY_LABEL}"},
    )
    secrets = replace(SECRETS, params={"labelSelector": f"app=vcluster,!{MANAGED_BY_LABEL}"})

    def tenancy(self, found: Service) -> Tenancy:
        """See the module."""
        namespace, name = found.key
        return Tenancy((namespace, f"vc-{name}"), ("config",))

    def reach(self, found: Service, credentials: Credentials) -> Credentials:
        """The Service, where the kubeconfig is for this machine."""
        if not _is_here(URL(credentials.server).host or ""):
            return credentials
        namespace, name = found.key
        return replace(credentials, server=f"https://{name}.{namespace}:{PORT}")

    def marks(self, found: Service) -> tuple[Mark, ...]:
        """What its syncer writes on Pods, and its chart on the control plane's."""
        return (VCLUSTER, *found.key), (CONTROL_PLANE, *found.key)


def _is_here(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
