"""KubeProxyConfiguration (kubeproxy.config.k8s.io/v1alpha1): its shape, what is read, what unset fields mean, how it is
written.

In Go "not set" and "zero" are the same, and every writer of such files (kubeadm, `kube-proxy --write-config-to`) writes
zeros and nulls for what nobody set. So the shape's own defaults are Go's zeros, null is "not set" everywhere, and
`defaulted` puts kube-proxy's defaults where zeros are. The shape is strict in types. Fields that are not in it are
reported and passed over, as kube-proxy does: a configuration may be newer than this.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
from msgspec import field

from vcproxy.kubeproxy.duration import Duration
from vcproxy.ops.configfile import Section

API_VERSION = "kubeproxy.config.k8s.io/v1alpha1"
KIND = "KubeProxyConfiguration"
GROUP = "kubeproxy.config.k8s.io"
HEALTHZ_PORT, METRICS_PORT = 10256, 10249

ZERO = Duration(0)
MODES = ("", "iptables", "ipvs", "nftables")


class ClientConnection(Section, frozen=True):
    """How to reach the API server."""

    kubeconfig: str = ""
    accept_content_types: str = ""
    content_type: str = ""
    qps: float = 0.0
    burst: int = 0


class OutputRouting(Section, frozen=True):
    """Of one log format."""

    split_stream: bool = False
    info_buffer_size: str | int = "0"


class LogOptions(Section, frozen=True):
    """By log format."""

    text: OutputRouting = OutputRouting()
    json: OutputRouting = OutputRouting()


class VModule(Section, frozen=True):
    """Verbosity of one source file of kube-proxy's."""

    file_pattern: str
    verbosity: int


class Frequency(Duration):
    """A duration that older files give as a number of nanoseconds."""

    __slots__ = ()


class Logging(Section, frozen=True):
    """Logs."""

    format: str = ""
    flush_frequency: Frequency = Frequency(0)
    verbosity: int = 0
    vmodule: tuple[VModule, ...] = ()
    options: LogOptions = LogOptions()


class IPTables(Section, frozen=True):
    """Of the mode iptables."""

    masquerade_bit: int | None = None
    masquerade_all: bool = False
    localhost_node_ports: bool | None = None
    sync_period: Duration = ZERO
    min_sync_period: Duration = ZERO


class IPVS(Section, frozen=True):
    """Of the mode ipvs."""

    sync_period: Duration = ZERO
    min_sync_period: Duration = ZERO
    scheduler: str = ""
    exclude_cidrs: tuple[str, ...] = field(name="excludeCIDRs", default=())
    strict_arp: bool = field(name="strictARP", default=False)
    tcp_timeout: Duration = ZERO
    tcp_fin_timeout: Duration = ZERO
    udp_timeout: Duration = ZERO


class NFTables(Section, frozen=True):
    """Of the mode nftables."""

    masquerade_bit: int | None = None
    masquerade_all: bool = False
    sync_period: Duration = ZERO
    min_sync_period: Duration = ZERO


class Winkernel(Section, frozen=True):
    """Of Windows."""

    network_name: str = ""
    source_vip: str = ""
    enable_dsr: bool = field(name="enableDSR", default=False)
    root_hns_endpoint_name: str = ""
    forward_health_check_vip: bool = False


class DetectLocal(Section, frozen=True):
    """What the interface modes of detectLocalMode look for."""

    bridge_interface: str = ""
    interface_name_prefix: str = ""


class Conntrack(Section, frozen=True):
    """Connection tracking of the node."""

    max_per_core: int | None = None
    min: int | None = None
    tcp_established_timeout: Duration | None = None
    tcp_close_wait_timeout: Duration | None = None
    tcp_be_liberal: bool = False
    udp_timeout: Duration = ZERO
    udp_stream_timeout: Duration = ZERO


class KubeProxyConfiguration(Section, frozen=True):
    """All of it. Fields are named and ordered as in kube-proxy's type."""

    feature_gates: dict[str, bool] = field(default_factory=dict)
    client_connection: ClientConnection = ClientConnection()
    logging: Logging = Logging()
    hostname_override: str = ""
    bind_address: str = ""
    healthz_bind_address: str = ""
    metrics_bind_address: str = ""
    bind_address_hard_fail: bool = False
    enable_profiling: bool = False
    show_hidden_metrics_for_version: str = ""
    mode: str = ""
    iptables: IPTables = IPTables()
    ipvs: IPVS = IPVS()
    nftables: NFTables = NFTables()
    winkernel: Winkernel = Winkernel()
    detect_local_mode: str = ""
    detect_local: DetectLocal = DetectLocal()
    cluster_cidr: str = field(name="clusterCIDR", default="")
    node_port_addresses: tuple[str, ...] = ()
    oom_score_adj: int | None = None
    conntrack: Conntrack = Conntrack()
    config_sync_period: Duration = ZERO
    port_range: str = ""
    windows_run_as_service: bool = False


Path = tuple[str | int, ...]
"""Names of fields as files write them, from the outside in."""


def at(config: msgspec.Struct, path: Path) -> Any:
    """The value of a field."""
    value: Any = config
    for step in path:
        names = {found.encode_name: found.name for found in msgspec.structs.fields(value)}
        value = getattr(value, names[str(step)])
    return value


def plain(config: KubeProxyConfiguration) -> dict[str, Any]:
    """As a file holds it, without apiVersion and kind; durations are text."""
    found: dict[str, Any] = msgspec.to_builtins(config, enc_hook=_encode)
    return found


def _encode(value: Any) -> str:
    if isinstance(value, Duration):
        return str(value)
    raise NotImplementedError(f"a configuration holds no {type(value)}")


def decode(kind: type, value: Any) -> Any:
    """msgspec's dec_hook for this shape."""
    if issubclass(kind, Duration):
        if isinstance(value, str):
            return kind.parse(value)
        if kind is Frequency and isinstance(value, int):
            return Frequency(value)
        raise ValueError("expected a duration like 30s, 5m or 1h30m")
    raise NotImplementedError(f"a configuration holds no {kind}")


def pruned(
    value: Mapping[str, Any], shape: type[msgspec.Struct] = KubeProxyConfiguration, path: Path = ()
) -> tuple[dict[str, Any], list[Path]]:
    """A document without nulls, and without the fields that the shape does not have, whose paths come second."""
    known = {found.encode_name: found.type for found in msgspec.structs.fields(shape)}
    kept: dict[str, Any] = {}
    unknown: list[Path] = []
    for name, inner in value.items():
        nested = known.get(name)
        if name not in known:
            unknown.append((*path, str(name)))
        elif isinstance(nested, type) and issubclass(nested, msgspec.Struct) and isinstance(inner, dict):
            kept[name], more = pruned(inner, nested, (*path, name))
            unknown.extend(more)
        elif inner is not None:
            kept[name] = inner
    return kept, unknown


def defaulted(config: KubeProxyConfiguration) -> KubeProxyConfiguration:
    """With kube-proxy's defaults where nothing is set. Addresses without a port get the usual one."""
    seconds = Duration.parse
    bind = config.bind_address or "0.0.0.0"
    healthz, metrics = ("[::]", "[::1]") if ":" in bind else ("0.0.0.0", "127.0.0.1")
    replace, set_to = msgspec.structs.replace, _first_set
    made = replace(
        config,
        bind_address=bind,
        healthz_bind_address=with_port(config.healthz_bind_address or healthz, HEALTHZ_PORT),
        metrics_bind_address=with_port(config.metrics_bind_address or metrics, METRICS_PORT),
        oom_score_adj=set_to(config.oom_score_adj, -999),
        iptables=replace(
            config.iptables,
            sync_period=config.iptables.sync_period or seconds("30s"),
            min_sync_period=config.iptables.min_sync_period or seconds("1s"),
            localhost_node_ports=set_to(config.iptables.localhost_node_ports, True),
            masquerade_bit=set_to(config.iptables.masquerade_bit, 14),
        ),
        ipvs=replace(config.ipvs, sync_period=config.ipvs.sync_period or seconds("30s")),
        nftables=replace(
            config.nftables,
            sync_period=config.nftables.sync_period or seconds("30s"),
            min_sync_period=config.nftables.min_sync_period or seconds("1s"),
            masquerade_bit=set_to(config.nftables.masquerade_bit, 14),
        ),
        conntrack=replace(
            config.conntrack,
            max_per_core=set_to(config.conntrack.max_per_core, 32 * 1024),
            min=set_to(config.conntrack.min, 128 * 1024),
            tcp_established_timeout=set_to(config.conntrack.tcp_established_timeout, seconds("24h")),
            tcp_close_wait_timeout=set_to(config.conntrack.tcp_close_wait_timeout, seconds("1h")),
        ),
        config_sync_period=config.config_sync_period or seconds("15m"),
        client_connection=replace(
            config.client_connection,
            content_type=config.client_connection.content_type or "application/vnd.kubernetes.protobuf",
            qps=config.client_connection.qps or 5.0,
            burst=config.client_connection.burst or 10,
        ),
        logging=replace(
            config.logging,
            format=config.logging.format or "text",
            flush_frequency=config.logging.flush_frequency or Frequency.parse("5s"),
        ),
    )
    return settled(made)


def settled(config: KubeProxyConfiguration) -> KubeProxyConfiguration:
    """The defaults that come last, over a file's and over flags' alike: an unset mode is nftables here, and unset
    nodePortAddresses are `primary`, kube-proxy's default in that mode."""
    return msgspec.structs.replace(
        config,
        mode=config.mode or "nftables",
        detect_local_mode=config.detect_local_mode or "ClusterCIDR",
        node_port_addresses=config.node_port_addresses or ("primary",),
    )


def _first_set(value: Any, default: Any) -> Any:
    return default if value is None else value


def with_port(address: str, port: int) -> str:
    """`address` as host:port; what has a port already, and what is no IP address, is as it was."""
    if address.startswith("[") and address.endswith("]"):
        return f"{address}:{port}"
    if address.count(":") > 1 and not address.startswith("["):
        return f"[{address}]:{port}"
    return address if ":" in address else f"{address}:{port}"


def external(config: KubeProxyConfiguration) -> dict[str, Any]:
    """What `--write-config-to` writes and /configz shows of a defaulted configuration, key by key as kube-proxy: the
    periods of the modes that are not in use are zeros, for kube-proxy keeps one pair of them."""
    found = {"apiVersion": API_VERSION, "kind": KIND, **plain(config)}
    for mode in ("iptables", "ipvs", "nftables"):
        if mode != config.mode:
            found[mode] |= {"syncPeriod": "0s", "minSyncPeriod": "0s"}
    return dict(_like_go(found))


# Go leaves these out when they are zero (omitempty); the other zeros it writes, and empty lists as null.
_OMITTED = {"featureGates", "vmodule", "splitStream", "windowsRunAsService"}


def _like_go(value: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name in sorted(value):
        inner = value[name]
        if name in _OMITTED and not inner:
            continue
        if isinstance(inner, dict):
            inner = dict(_like_go(inner))
        elif isinstance(inner, list | tuple):
            inner = list(inner) or None
        yield name, inner
