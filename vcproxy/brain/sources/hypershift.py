"""HyperShift (openshift/hypershift, read at 3ee9615, release 5.2).

A `HostedCluster` has its control plane in a namespace of its own, NAMESPACE-NAME with the dots of NAME as dashes
(hypershift-operator/controllers/manifests/manifests.go). There the Secret `service-network-admin-kubeconfig`, key
`kubeconfig`, names the bare Service `kube-apiserver` (control-plane-operator …/v2/kas/kubeconfig.go), which means
something within that namespace only; so the namespace is added, and the certificate is still asked for the bare name.
The kubeconfig that `status.kubeconfig` names is for people outside.
"""

from dataclasses import replace

from yarl import URL

from vcproxy.brain.sources.project import SECRETS, Project, Tenancy
from vcproxy.kube.decode import Resource
from vcproxy.kube.kubeconfig import Credentials
from vcproxy.kube.shapes import Object

SECRET = "service-network-admin-kubeconfig"


class HostedCluster(Object, frozen=True):
    """hypershift.openshift.io/v1beta1 HostedCluster."""


class HyperShift(Project[HostedCluster]):
    """The project, for hosted.py."""

    title = "hypershift"
    group = "hypershift.openshift.io"
    versions = ("v1beta1",)
    plural = "hostedclusters"
    objects = Resource("HostedCluster", "", HostedCluster)
    secrets = replace(SECRETS, params={"fieldSelector": f"metadata.name={SECRET}"})

    def tenancy(self, found: HostedCluster) -> Tenancy:
        """See the module."""
        return Tenancy((control_plane_namespace(found), SECRET), ("kubeconfig",))

    def reach(self, found: HostedCluster, credentials: Credentials) -> Credentials:
        """With the control plane's namespace behind a bare Service name."""
        url = URL(credentials.server)
        host = url.host or ""
        if "." in host or ":" in host:
            return credentials
        server = f"https://{host}.{control_plane_namespace(found)}.svc:{url.port}{url.raw_path.rstrip('/')}"
        return replace(credentials, server=server, tls_server_name=credentials.tls_server_name or host)


def control_plane_namespace(found: HostedCluster) -> str:
    """Where the control plane runs."""
    namespace, name = found.key
    return f"{namespace}-{name.replace('.', '-')}"
