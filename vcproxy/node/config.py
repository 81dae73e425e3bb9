"""NodeConfiguration: the node agent's configuration file."""

from typing import Annotated, Any

from msgspec import Meta, field

from vcproxy.ops.configfile import Section


class BrainAddress(Section, frozen=True):
    """Where the brain is, and the certificates of both sides."""

    addresses: Annotated[
        tuple[str, ...], Meta(description="host:port of every replica; a name may stand for several addresses")
    ] = ("vcproxy-brain.vcproxy-system.svc:7443",)
    server_name: Annotated[str, Meta(description="name in the brain's certificate; empty: the host dialled")] = ""
    cert_file: Annotated[
        str, Meta(description="this node's certificate: common name system:node:NAME; read at each connect")
    ] = "/etc/vcproxy/tls/tls.crt"
    key_file: str = "/etc/vcproxy/tls/tls.key"
    ca_file: Annotated[str, Meta(description="the CA that signs the brain's certificate")] = "/etc/vcproxy/tls/ca.crt"


class BackendChoice(Section, frozen=True):
    """The backend that programs this node."""

    name: str = "nftables"
    options: dict[str, Any] = field(default_factory=dict)


class InterfaceAttachment(Section, frozen=True):
    """Overlay: packets that enter by these devices are the tenant's."""

    tenant: Annotated[str, Meta(description="tenant name, or * for every tenant placed on this node")]
    names: Annotated[tuple[str, ...], Meta(description="device names: globs; {tenant} and {uid} are filled in")]


class AddressAttachment(Section, frozen=True):
    """Flat network: the brain's placement says which pod address is whose."""


class Attachment(Section, frozen=True):
    """One way to recognise tenants' packets; exactly one field is set."""

    interface: InterfaceAttachment | None = None
    address: AddressAttachment | None = None


class DetectLocal(Section, frozen=True):
    """Which sources are pods of the super cluster on this node: they reach ClusterIPs without masquerade."""

    mode: Annotated[
        str,
        Meta(
            description="ClusterCIDR: sources in clusterCIDRs; NodeCIDR: in this node's podCIDRs; BridgeInterface:\n"
            "what enters by bridgeInterface; InterfaceNamePrefix: by a device of that prefix; None: no detector",
            pattern="^(ClusterCIDR|NodeCIDR|BridgeInterface|InterfaceNamePrefix|None)$",
        ),
    ] = "ClusterCIDR"
    cluster_cidrs: tuple[str, ...] = field(name="clusterCIDRs", default=())
    bridge_interface: str = ""
    interface_name_prefix: str = ""


class Conntrack(Section, frozen=True):
    """Connection tracking of the node, set at start; the limit and the hash table are the whole machine's."""

    max_per_core: Annotated[
        int, Meta(ge=0, description="entries per CPU, at most 1,048,576 in all; 0 leaves the limit alone")
    ] = 32_768
    min: Annotated[int, Meta(ge=0, description="entries at least")] = 131_072
    tcp_established_seconds: Annotated[int, Meta(ge=0, description="idle time; 0 here and below: left alone")] = 86_400
    tcp_close_wait_seconds: Annotated[int, Meta(ge=0)] = 3_600
    tcp_be_liberal: Annotated[bool, Meta(description="accept TCP packets outside the window")] = False
    udp_seconds: Annotated[int, Meta(ge=0, description="of UDP that nobody answered")] = 0
    udp_stream_seconds: Annotated[int, Meta(ge=0, description="of UDP that was answered")] = 0


class TenantBackends(Section, frozen=True):
    """What tenants' Services may lead to, against the node's own judgement; the brain must allow it too."""

    node_addresses: Annotated[bool, Meta(description="this node's own addresses")] = False
    other_tenants_pods: Annotated[bool, Meta(description="other tenants' pods on this node, on a flat network")] = False


class NodeConfiguration(Section, frozen=True):
    """The node agent."""

    node_name: Annotated[str, Meta(description="this node's name; empty: the host name, in lower case")] = ""
    brain: BrainAddress = BrainAddress()
    backend: BackendChoice = BackendChoice()
    attachments: tuple[Attachment, ...] = (Attachment(address=AddressAttachment()),)
    detect_local: DetectLocal = DetectLocal()
    tenant_backends: TenantBackends = TenantBackends()
    masquerade_all: Annotated[bool, Meta(description="masquerade every connection to a ClusterIP")] = False
    node_port_addresses: Annotated[
        tuple[str, ...],
        Meta(
            description="CIDRs of node addresses that accept NodePorts; primary: those of the Node object; all: every "
            "one but loopback;\nlocalhost: 127.0.0.1 and ::1, for TCP and the super cluster"
        ),
    ] = ("primary",)
    node_address: Annotated[
        str, Meta(description="the primary address of its family, in place of the Node object's; empty: none")
    ] = ""
    conntrack: Annotated[
        Conntrack | None, Meta(description="conntrack sysctls to set at start; null: none is touched")
    ] = None
    state_directory: Annotated[str, Meta(description="the last good state is kept here")] = "/var/lib/vcproxy"
    admin_socket: Annotated[str, Meta(description="unix socket behind status and get")] = "/run/vcproxy/node.sock"
    metrics_address: Annotated[str, Meta(description="host:port of /metrics; empty: none")] = "127.0.0.1:10249"
    health_address: Annotated[str, Meta(description="host:port of /healthz, /livez, /readyz; empty: none")] = (
        "0.0.0.0:10256"
    )
    bind_hard_fail: Annotated[
        bool, Meta(description="end when one of these two is taken; false: try again every five seconds")
    ] = True
    log_level: Annotated[
        str, Meta(description="debug, info, warning or error", pattern="^(debug|info|warning|error)$")
    ] = "info"
    log_format: Annotated[str, Meta(description="json or text", pattern="^(json|text)$")] = "json"
