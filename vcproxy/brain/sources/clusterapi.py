"""Cluster API (kubernetes-sigs/cluster-api, read at ae7ff04, after v1.14.0) and k0smotron (3897bbe, after v2.1.0).

A `Cluster` and a Secret of its namespace, NAME-kubeconfig, key `value`, type `cluster.x-k8s.io/secret` (util/secret and
the contract of control plane providers there). k0smotron keeps to that contract for Clusters of its own kind
(internal/controller/k0smotron.io/k0smotroncluster_kubeconfig.go), so it differs in its group only.

A cluster that k0smotron or VirtualCluster manages through Cluster API is both projects' object: name one source for it.
"""

from dataclasses import replace

from vcproxy.brain.sources.project import SECRETS, Project, Tenancy
from vcproxy.kube.decode import Resource
from vcproxy.kube.shapes import Object


class Cluster(Object, frozen=True):
    """cluster.x-k8s.io or k0smotron.io Cluster."""


class ClusterAPI(Project[Cluster]):
    """The project, for hosted.py."""

    title = "clusterAPI"
    group = "cluster.x-k8s.io"
    versions = ("v1beta2", "v1beta1")
    plural = "clusters"
    objects = Resource("Cluster", "", Cluster)
    secrets = replace(SECRETS, params={"fieldSelector": "type=cluster.x-k8s.io/secret"})

    def tenancy(self, found: Cluster) -> Tenancy:
        """See the module."""
        namespace, name = found.key
        return Tenancy((namespace, f"{name}-kubeconfig"), ("value",))


class K0smotron(ClusterAPI):
    """The project, for hosted.py."""

    title = "k0smotron"
    group = "k0smotron.io"
