"""BrainConfiguration: the brain's configuration file."""

from typing import Annotated

from msgspec import Meta, field

from vcproxy.ops.configfile import Section


class Listen(Section, frozen=True):
    """Where nodes connect, and the certificates of both sides."""

    address: Annotated[str, Meta(description="host:port; the host may be an IP address or a name")] = "0.0.0.0:7443"
    cert_file: Annotated[str, Meta(description="the brain's certificate, PEM; re-read when it changes")] = (
        "/etc/vcproxy/tls/tls.crt"
    )
    key_file: Annotated[str, Meta(description="its key, PEM")] = "/etc/vcproxy/tls/tls.key"
    client_ca_file: Annotated[str, Meta(description="the CA that signs the nodes' certificates, PEM")] = field(
        name="clientCAFile", default="/etc/vcproxy/tls/ca.crt"
    )


class SuperCluster(Section, frozen=True):
    """The cluster that owns the nodes."""

    kubeconfig: Annotated[
        str | None, Meta(description="path of a kubeconfig; empty: the in-cluster service account")
    ] = None
    server: Annotated[str, Meta(description="https://HOST:PORT of the API server, in place of the kubeconfig's")] = ""
    services: Annotated[bool, Meta(description="proxy its own Services, as tenant `super`")] = True
    pods: Annotated[
        bool, Meta(description="read its Pods, which say where whose pods run; false: tenants go to every node")
    ] = True
    node: Annotated[
        str, Meta(description="the only node that is served: others' Node objects and Pods are not read; empty: all")
    ] = ""


class DirectorySource(Section, frozen=True):
    """A folder with one NAME.kubeconfig, or one folder NAME of manifests, per tenant."""

    path: Annotated[str, Meta(description="the folder; watched")] = "/etc/vcproxy/tenants"


class VirtualClusterSource(Section, frozen=True):
    """VirtualCluster objects of the super cluster (kubernetes-sigs/cluster-api-provider-nested)."""


class HyperShiftSource(Section, frozen=True):
    """HostedCluster objects of the super cluster (OpenShift's hosted control planes)."""


class HostedSource(Section, frozen=True):
    """Control planes that a project hosts in the super cluster."""

    namespaces: Annotated[
        tuple[str, ...], Meta(description="where their objects and Secrets are, and may be read; empty: anywhere")
    ] = ()


class TenantSource(Section, frozen=True, omit_defaults=True):
    """One place where tenants are found; exactly one field is set."""

    directory: Annotated[
        DirectorySource | None,
        Meta(description="a folder with one NAME.kubeconfig, or one folder NAME of manifests, per tenant; watched"),
    ] = None
    virtual_cluster: Annotated[
        VirtualClusterSource | None, Meta(description="VirtualClusters (tenancy.x-k8s.io); their pods share the nodes")
    ] = None
    cluster_api: Annotated[HostedSource | None, Meta(description="Cluster API's Clusters (cluster.x-k8s.io)")] = field(
        name="clusterAPI", default=None
    )
    kamaji: Annotated[HostedSource | None, Meta(description="Kamaji's TenantControlPlanes (kamaji.clastix.io)")] = None
    k0smotron: Annotated[HostedSource | None, Meta(description="k0smotron's Clusters (k0smotron.io)")] = None
    hypershift: Annotated[
        HyperShiftSource | None, Meta(description="HyperShift's HostedClusters (hypershift.openshift.io)")
    ] = None
    vcluster: Annotated[
        HostedSource | None, Meta(description="vClusters, by the Services of their API servers; their pods share nodes")
    ] = None


class Limits(Section, frozen=True):
    """What one tenant may use; beyond it the last good state stays and the tenant is marked degraded."""

    services: int = 10_000
    endpoints: int = 100_000
    endpoints_per_service: int = 5_000
    object_bytes: Annotated[int, Meta(description="largest object read from a tenant's API server")] = 1 << 20
    events_per_second: int = 500


class TenantPolicy(Section, frozen=True):
    """What a tenant may ask for."""

    api_servers: Annotated[
        tuple[str, ...],
        Meta(
            description="host names (`*` for any part) and CIDRs that kubeconfigs may name; empty: any, but\n"
            "outside of the directory no loopback or link-local address, node, or API server of the super cluster"
        ),
    ] = ()

    virtual_ip_ranges: Annotated[
        tuple[str, ...],
        Meta(description="CIDRs that ClusterIPs must lie in; empty: any address but those never allowed"),
    ] = field(name="virtualIPRanges", default=())
    external_ip_ranges: Annotated[
        tuple[str, ...],
        Meta(description="CIDRs that external and load-balancer IPs must lie in; empty: tenants get none"),
    ] = field(name="externalIPRanges", default=())
    node_ports: Annotated[bool, Meta(description="tenants may have NodePorts on the shared nodes' addresses")] = False
    node_port_range: Annotated[
        str,
        Meta(
            description="which numbers; keep them apart from the super cluster's --service-node-port-range",
            pattern="^[0-9]+-[0-9]+$",
        ),
    ] = "30000-32767"
    limits: Limits = Limits()


class Tenants(Section, frozen=True):
    """Where tenants come from and what they may do."""

    sources: Annotated[tuple[TenantSource, ...], Meta(description="where tenants are found; each of them one of")] = (
        TenantSource(directory=DirectorySource()),
    )
    policy: TenantPolicy = TenantPolicy()
    silence_seconds: Annotated[
        float, Meta(description="a watch that says nothing for so long is given up; API servers speak once a minute")
    ] = 150.0
    linger_seconds: Annotated[
        float, Meta(description="how long a node keeps a tenant after the last of its pods there")
    ] = 120.0


class BrainConfiguration(Section, frozen=True):
    """The brain."""

    listen: Listen = Listen()
    super_cluster: Annotated[
        SuperCluster | None, Meta(description="null: no super cluster; then tenants' own manifests say where pods run")
    ] = SuperCluster()
    tenants: Tenants = Tenants()
    state_directory: Annotated[
        str,
        Meta(
            description="the last good content of tenants is kept here, for a start while API servers are down;\n"
            "empty: none is kept"
        ),
    ] = ""
    admin_socket: Annotated[str, Meta(description="unix socket behind status and get")] = "/run/vcproxy/brain.sock"
    metrics_address: Annotated[str, Meta(description="host:port of /metrics, /healthz and /readyz; empty: none")] = (
        "127.0.0.1:7449"
    )
    log_level: Annotated[
        str, Meta(description="debug, info, warning or error", pattern="^(debug|info|warning|error)$")
    ] = "info"
    log_format: Annotated[str, Meta(description="json or text", pattern="^(json|text)$")] = "json"
