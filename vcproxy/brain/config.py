"""BrainConfiguration: the brain's configuration file."""

import re
from collections.abc import Container
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType, field

from vcproxy.brain.guard import PortRange
from vcproxy.model.addresses import Prefix, parse_prefix
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
    tenant_policies: Annotated[
        bool, Meta(description="read its TenantPolicies, if it has the CustomResourceDefinition")
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


class Cidr:
    """A CIDR, or an address alone."""

    __slots__ = ("prefix",)

    def __init__(self, prefix: Prefix) -> None:
        self.prefix = prefix

    @classmethod
    def parse(cls, text: str) -> "Cidr":
        """Raises ValueError."""
        return cls(parse_prefix(text))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Cidr) and other.prefix == self.prefix

    def __hash__(self) -> int:
        return hash(self.prefix)

    def __str__(self) -> str:
        return str(self.prefix)


class Ports:
    """One port, `8080`, or a range, `30000-30100`."""

    __slots__ = ("range",)

    def __init__(self, ports: PortRange) -> None:
        self.range = ports

    @classmethod
    def parse(cls, text: str) -> "Ports":
        """Raises ValueError."""
        match = re.fullmatch(r"([0-9]{1,5})(?:-([0-9]{1,5}))?", text.strip())
        first = int(match[1]) if match else 0
        last = int(match[2] or first) if match else 0
        if not 0 < first <= last < 65536:
            raise ValueError(f"{text[:32]!r} is no port or range of ports: write 30000-30100")
        return cls(PortRange(first, last))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ports) and other.range == self.range

    def __hash__(self) -> int:
        return hash(self.range)

    def __str__(self) -> str:
        return str(self.range)


Count = Annotated[int, Meta(ge=0)]


class Limits(Section, frozen=True):
    """What one tenant may use; beyond it the last good state stays and the tenant is marked degraded."""

    services: Count = 10_000
    endpoints: Count = 100_000
    endpoints_per_service: Count = 5_000
    object_bytes: Annotated[int, Meta(ge=1024, description="largest object read from a tenant's API server")] = 1 << 20
    events_per_second: Annotated[int, Meta(ge=0, description="changes compiled on average; 0: any number")] = 200


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
        tuple[Cidr, ...],
        Meta(description="CIDRs that ClusterIPs must lie in; empty: any address but those never allowed"),
    ] = field(name="virtualIPRanges", default=())
    external_ip_ranges: Annotated[
        tuple[Cidr, ...], Meta(description="CIDRs that externalIPs must lie in; empty: tenants get none")
    ] = field(name="externalIPRanges", default=())
    load_balancer_ip_ranges: Annotated[
        tuple[Cidr, ...] | None,
        Meta(description="CIDRs that load-balancer IPs must lie in; null: externalIPRanges; empty: tenants get none"),
    ] = field(name="loadBalancerIPRanges", default=None)
    node_ports: Annotated[
        bool | tuple[Ports, ...],
        Meta(
            description="NodePorts on the shared nodes' addresses: true: all of 30000-32767, false: none, or ranges "
            '(["31000-31099"]), best apart from those of the super cluster\'s --service-node-port-range'
        ),
    ] = False
    health_check_node_ports: Annotated[
        bool | tuple[Ports, ...] | None, Meta(description="the same for healthCheckNodePort; null: nodePorts")
    ] = None
    backends: Annotated[
        Literal["sameTenantPods", "any"] | None,
        Meta(
            description="sameTenantPods: an endpoint must be a pod that the super cluster says is the tenant's, or lie "
            "in egress; any: it may be any address that is not denied; null: sameTenantPods where the super cluster's "
            "pods are known, but any for tenants of a directory"
        ),
    ] = None
    egress: Annotated[tuple[Cidr, ...], Meta(description="CIDRs outside of the cluster that endpoints may lie in")] = ()
    denied_ranges: Annotated[
        tuple[Cidr, ...], Meta(description="CIDRs that no endpoint but the tenant's own pods may lie in, egress or not")
    ] = ()
    deny_node_addresses: Annotated[bool, Meta(description="no endpoint may be a node, egress or not")] = True
    deny_other_tenants_pods: Annotated[bool, Meta(description="nor a pod of another tenant")] = True
    pod_network: Annotated[
        Literal["shared", "own"] | None,
        Meta(
            description="shared: pod addresses are unique over all tenants; own: the tenant has a network of its own, "
            "where other\ntenants' pods may have equal ones; null: shared, but two tenants' pods may have equal ones"
        ),
    ] = None
    events: Annotated[
        bool, Meta(description="tell a tenant what is refused by Events in its own API server, if it lets us")
    ] = True
    limits: Limits = Limits()


class Match(Section, frozen=True):
    """Which tenants: those for which all that is said here is so; {}: all."""

    name: str | None = None
    namespace: Annotated[str | None, Meta(description="of the object in the super cluster that is the tenant")] = None
    uid: str | None = None
    labels: Annotated[dict[str, str], Meta(description="of that object")] = field(default_factory=dict)


def _patch(shape: type[Section], *, but: Container[str] = ()) -> type[Section]:
    """The same fields, each of which may be absent; `but` not these."""
    fields = [each for each in msgspec.structs.fields(shape) if each.name not in but]
    patched: list[tuple[str, Any, Any]] = []
    for each in fields:
        kind = _patch(each.type) if isinstance(each.type, type) and issubclass(each.type, Section) else each.type
        patched.append((each.name, kind | UnsetType, UNSET))
    names = {each.name: each.encode_name for each in fields}
    doc = {"__doc__": shape.__doc__}
    return msgspec.defstruct(
        f"{shape.__name__}Patch", patched, bases=(Section,), frozen=True, rename=names, namespace=doc
    )  # type: ignore[return-value]


PolicyPatch = _patch(TenantPolicy, but=("api_servers",))
"""A TenantPolicy of which anything may be left out; where API servers may be is one rule for all."""


class Override(Section, frozen=True):
    """A policy for some tenants: what it does not say is as before."""

    match: Match
    policy: PolicyPatch  # type: ignore[valid-type]


class Tenants(Section, frozen=True):
    """Where tenants come from and what they may do."""

    sources: Annotated[tuple[TenantSource, ...], Meta(description="where tenants are found; each of them one of")] = (
        TenantSource(directory=DirectorySource()),
    )
    policy: TenantPolicy = TenantPolicy()
    overrides: Annotated[
        tuple[Override, ...],
        Meta(
            description="for tenants by name, namespace, labels or uid; each changes what was said before it:\n"
            "  [{match: {name: acme}, policy: {nodePorts: [30000-30100]}}]"
        ),
    ] = ()
    silence_seconds: Annotated[
        float, Meta(description="a watch that says nothing for so long is given up; API servers speak once a minute")
    ] = 150.0
    watch_list: Annotated[
        bool,
        Meta(
            description="list as the beginning of a watch (WatchList, Kubernetes 1.34) where an API server has that;\n"
            "false: in pages, which take less processor time"
        ),
    ] = False
    linger_seconds: Annotated[
        float, Meta(description="how long a node keeps a tenant after the last of its pods there")
    ] = 120.0


class Sharding(Section, frozen=True):
    """Brains that share tenants: each feeds those of the shards whose Leases in the super cluster it holds."""

    shards: Annotated[
        int,
        Meta(ge=1, le=1024, description="into how many tenants are divided; the same for all brains, some for each"),
    ]
    namespace: Annotated[str, Meta(min_length=1, description="of the Leases, in the super cluster")] = "vcproxy-system"
    lease_seconds: Annotated[
        int, Meta(ge=1, le=3600, description="after which another brain takes what is not renewed")
    ] = 15
    renew_seconds: Annotated[
        float, Meta(gt=0, description="after which a brain that cannot renew gives up; less than leaseSeconds")
    ] = 10.0
    retry_seconds: Annotated[float, Meta(gt=0, description="between renewals; renewSeconds is at least twice that")] = (
        2.0
    )

    def __post_init__(self) -> None:
        """Raises ValueError."""
        if self.lease_seconds <= self.renew_seconds:
            raise ValueError("leaseSeconds must be more than renewSeconds: what is between them is the safety margin")
        if self.renew_seconds < 2 * self.retry_seconds:
            raise ValueError("renewSeconds must be at least twice retrySeconds")


class BrainConfiguration(Section, frozen=True):
    """The brain."""

    listen: Listen = Listen()
    super_cluster: Annotated[
        SuperCluster | None, Meta(description="null: no super cluster; then tenants' own manifests say where pods run")
    ] = SuperCluster()
    tenants: Tenants = Tenants()
    sharding: Annotated[
        Sharding | None, Meta(description="null: every brain feeds all tenants; else brains share them")
    ] = None
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

    def __post_init__(self) -> None:
        """Raises ValueError."""
        if self.sharding is not None and self.super_cluster is None:
            raise ValueError("sharding needs superCluster: that is where Leases are; else leave sharding null")
        if self.sharding is not None and self.super_cluster is not None and self.super_cluster.node:
            raise ValueError("sharding is for brains that serve all nodes: leave superCluster.node empty")
