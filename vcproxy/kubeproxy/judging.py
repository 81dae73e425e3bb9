"""What is wrong with a KubeProxyConfiguration, and what in it has no effect here. Pure.

`problems` holds kube-proxy's own validation of 1.37: what it refuses is refused, with the cure. `warnings` names every
field that somebody set to something and that changes nothing, once, and says why: a setting that is ignored in silence
is one that an operator believes in.
"""

import re
from collections.abc import Callable, Iterator

from vcproxy.kubeproxy.configuration import IPVS, MODES, IPTables, KubeProxyConfiguration, NFTables, Path, at, defaulted
from vcproxy.kubeproxy.reading import Origin, Warned
from vcproxy.model.addresses import AddressError, Prefix, is_address, parse_prefix
from vcproxy.ops.configfile import ConfigError

PRIMARY, LOCALHOST, ALL = "primary", "localhost", "all"
KEYWORDS = (PRIMARY, LOCALHOST, ALL)
LOCAL_MODES = ("ClusterCIDR", "NodeCIDR", "BridgeInterface", "InterfaceNamePrefix")
LOCALHOST_GATE = "KubeProxyNFTablesLocalhostNodePorts"
LONGEST_INTERFACE = 15  # IFNAMSIZ without its NUL

Found = tuple[Path, str]


def cidr(text: str) -> Prefix | None:
    """A CIDR, which unlike a bare address has a length; None if it is none."""
    try:
        return parse_prefix(text) if "/" in text else None
    except AddressError:
        return None


def cluster_cidrs(config: KubeProxyConfiguration) -> tuple[str, ...]:
    """clusterCIDR is a list in disguise."""
    return tuple(part.strip() for part in config.cluster_cidr.split(",")) if config.cluster_cidr else ()


def check(config: KubeProxyConfiguration, origin: Origin) -> None:
    """Raises ConfigError that names all problems, each at its place."""
    found = [f"{origin.where(path)}: {text}" for path, text in problems(config)]
    if found:
        raise ConfigError("; ".join(found))


def problems(config: KubeProxyConfiguration) -> Iterator[Found]:
    """What keeps a defaulted configuration from being used: (path, what is wrong and the cure)."""
    yield from _choices(config)
    yield from _numbers(config)
    yield from _periods(config)
    yield from _addresses(config)
    yield from _node_ports(config)
    yield from _local(config)


def _choices(config: KubeProxyConfiguration) -> Iterator[Found]:
    if config.mode not in MODES:
        yield ("mode",), f"{config.mode!r} is no mode: use nftables (iptables and ipvs are accepted, and mean nftables)"
    if config.detect_local_mode not in LOCAL_MODES:
        yield ("detectLocalMode",), f"{config.detect_local_mode!r} is none of {', '.join(LOCAL_MODES)}"
    if config.logging.format not in ("text", "json"):
        yield ("logging", "format"), f"{config.logging.format!r} is no log format: use text or json"


_RANGES: tuple[tuple[Path, int, int], ...] = (
    (("iptables", "masqueradeBit"), 0, 31),
    (("nftables", "masqueradeBit"), 0, 31),
    (("oomScoreAdj",), -1000, 1000),
    (("conntrack", "maxPerCore"), 0, 2**31 - 1),
    (("conntrack", "min"), 0, 2**31 - 1),
    (("clientConnection", "burst"), 0, 2**31 - 1),
    (("logging", "verbosity"), 0, 2**31 - 1),
)


def _numbers(config: KubeProxyConfiguration) -> Iterator[Found]:
    for path, least, most in _RANGES:
        if not least <= (at(config, path) or 0) <= most:
            yield path, f"must be {least} to {most}, not {at(config, path)}"


_NOT_NEGATIVE: tuple[Path, ...] = (
    ("conntrack", "tcpEstablishedTimeout"),
    ("conntrack", "tcpCloseWaitTimeout"),
    ("conntrack", "udpTimeout"),
    ("conntrack", "udpStreamTimeout"),
    ("ipvs", "tcpTimeout"),
    ("ipvs", "tcpFinTimeout"),
    ("ipvs", "udpTimeout"),
)


def _periods(config: KubeProxyConfiguration) -> Iterator[Found]:
    for path in _NOT_NEGATIVE:
        if (at(config, path) or 0) < 0:
            yield path, f"must not be negative, and is {at(config, path)}; 0s leaves the node's as it is"
    if config.config_sync_period <= 0:
        yield ("configSyncPeriod",), "must be more than 0s"
    section: IPTables | IPVS | NFTables = config.nftables
    if config.mode in ("iptables", "ipvs"):
        section = config.iptables if config.mode == "iptables" else config.ipvs
    if section.sync_period <= 0:
        yield (config.mode, "syncPeriod"), "must be more than 0s"
    if not 0 <= section.min_sync_period <= section.sync_period:
        yield (config.mode, "minSyncPeriod"), f"must be 0s up to syncPeriod, which is {section.sync_period}"


def _addresses(config: KubeProxyConfiguration) -> Iterator[Found]:
    if not is_address(config.bind_address):
        yield ("bindAddress",), f"{config.bind_address!r} is no IP address; 0.0.0.0 or :: leave it to the Node object"
    for path in (("healthzBindAddress",), ("metricsBindAddress",)):
        text: str = at(config, path)
        host, colon, port = text.rpartition(":")
        bracketed = host.startswith("[") and host.endswith("]")
        if text and not (
            colon
            and is_address(host[1:-1] if bracketed else host)
            and (bracketed or ":" not in host)
            and port.isascii()
            and port.isdigit()
            and 1 <= int(port) <= 65535
        ):
            yield path, f"{text!r} is not IP:PORT with a port of 1 to 65535, like 127.0.0.1:10249 or [::1]:10249"


def _node_ports(config: KubeProxyConfiguration) -> Iterator[Found]:
    seen: set[str] = set()
    for index, text in enumerate(config.node_port_addresses):
        if text in KEYWORDS:
            if text in seen:
                yield ("nodePortAddresses", index), f"{text} is there twice: remove one"
            seen.add(text)
        elif cidr(text) is None:
            yield ("nodePortAddresses", index), f"{text!r} is neither a CIDR nor one of {', '.join(KEYWORDS)}"


def _local(config: KubeProxyConfiguration) -> Iterator[Found]:
    cidrs = cluster_cidrs(config)
    match config.detect_local_mode:
        case "ClusterCIDR" if cidrs:
            parsed = [cidr(text) for text in cidrs]
            for text, found in zip(cidrs, parsed, strict=True):
                if found is None:
                    yield ("clusterCIDR",), f"{text!r} is no CIDR, like 10.244.0.0/16 or fd00:244::/56"
            families = [len(found.address) for found in parsed if found is not None]
            if len(cidrs) > 2 or len(set(families)) < len(families):
                yield ("clusterCIDR",), f"{config.cluster_cidr} is neither one CIDR nor one of IPv4 and one of IPv6"
        case "BridgeInterface":
            yield from _interface(("detectLocal", "bridgeInterface"), config.detect_local.bridge_interface)
        case "InterfaceNamePrefix":
            yield from _interface(("detectLocal", "interfaceNamePrefix"), config.detect_local.interface_name_prefix)


def _interface(path: Path, name: str) -> Iterator[Found]:
    if not name:
        yield path, "must not be empty in this detectLocalMode: name the device"
    elif len(name.encode()) > LONGEST_INTERFACE or re.search(r"[\s/*]", name):
        yield path, f"{name!r} is no device name: at most {LONGEST_INTERFACE} octets, without space, / and *"


# --- what has no effect ----------------------------------------------------------------------------------------------

_INCREMENTAL = "has no effect: every change is programmed at once and alone, and there is nothing to synchronise again"
_NO_MARK = "has no effect: vcproxy sets no packet mark"
_NO_IPVS = "has no effect: vcproxy does not use IPVS"
_WINDOWS = "has no effect on Linux"
_WATCHES = "has no effect: vcproxy holds a few watches open and reads JSON"
_KLOG = "has no effect: log lines are written at once, each to stderr"

_IDLE: dict[Path, str] = {
    ("iptables", "masqueradeBit"): _NO_MARK,
    ("iptables", "localhostNodePorts"): f"has no effect: name {LOCALHOST} in nodePortAddresses (TCP)",
    ("iptables", "syncPeriod"): _INCREMENTAL,
    ("iptables", "minSyncPeriod"): _INCREMENTAL,
    ("ipvs", "syncPeriod"): _INCREMENTAL,
    ("ipvs", "minSyncPeriod"): _INCREMENTAL,
    ("ipvs", "scheduler"): f"{_NO_IPVS}; endpoints are chosen at random",
    ("ipvs", "excludeCIDRs"): _NO_IPVS,
    ("ipvs", "strictARP"): f"{_NO_IPVS}, and gives no device a Service's address",
    ("ipvs", "tcpTimeout"): _NO_IPVS,
    ("ipvs", "tcpFinTimeout"): _NO_IPVS,
    ("ipvs", "udpTimeout"): _NO_IPVS,
    ("nftables", "masqueradeBit"): _NO_MARK,
    ("nftables", "syncPeriod"): _INCREMENTAL,
    ("nftables", "minSyncPeriod"): _INCREMENTAL,
    ("winkernel", "networkName"): _WINDOWS,
    ("winkernel", "sourceVip"): _WINDOWS,
    ("winkernel", "enableDSR"): _WINDOWS,
    ("winkernel", "rootHnsEndpointName"): _WINDOWS,
    ("winkernel", "forwardHealthCheckVip"): _WINDOWS,
    ("windowsRunAsService",): _WINDOWS,
    ("clientConnection", "acceptContentTypes"): _WATCHES,
    ("clientConnection", "contentType"): _WATCHES,
    ("clientConnection", "qps"): _WATCHES,
    ("clientConnection", "burst"): _WATCHES,
    ("configSyncPeriod",): _INCREMENTAL,
    ("portRange",): "has no effect: kube-proxy, too, has used no such ports since 1.26",
    ("enableProfiling",): "has no effect: /debug/pprof profiles Go programs",
    ("showHiddenMetricsForVersion",): "has no effect: vcproxy hides no metrics",
    ("logging", "flushFrequency"): _KLOG,
    ("logging", "vmodule"): "has no effect: it names source files of kube-proxy's",
    ("logging", "options", "text", "splitStream"): _KLOG,
    ("logging", "options", "text", "infoBufferSize"): _KLOG,
    ("logging", "options", "json", "splitStream"): _KLOG,
    ("logging", "options", "json", "infoBufferSize"): _KLOG,
}
"""Fields that change nothing, whatever they hold."""

_ONLY_IN: dict[Path, Callable[[KubeProxyConfiguration], bool]] = {
    ("clusterCIDR",): lambda config: config.detect_local_mode == "ClusterCIDR",
    ("detectLocal", "bridgeInterface"): lambda config: config.detect_local_mode == "BridgeInterface",
    ("detectLocal", "interfaceNamePrefix"): lambda config: config.detect_local_mode == "InterfaceNamePrefix",
}


def warnings(config: KubeProxyConfiguration, origin: Origin) -> Iterator[Warned]:
    """What somebody set, in a defaulted configuration without problems, that does not do what they may think."""
    default = defaulted(KubeProxyConfiguration())
    for path, why in _IDLE.items():
        if path in origin.given and at(config, path) != at(default, path):
            yield Warned(origin.where(path), why)
    for path, matters in _ONLY_IN.items():
        if path in origin.given and not matters(config):
            yield Warned(origin.where(path), f"has no effect with detectLocalMode {config.detect_local_mode}")
    for section in ("iptables", "nftables"):
        path = (section, "masqueradeAll")
        used = "nftables" if config.mode == "nftables" else "iptables"
        if section != used and path in origin.given:
            yield Warned(origin.where(path), f"has no effect with mode {config.mode}: set {used}.masqueradeAll")
    for gate in config.feature_gates:
        if gate != LOCALHOST_GATE:
            yield Warned(
                origin.where(("featureGates", gate)), f"{gate} has no effect: vcproxy has no such feature gate"
            )
    if config.mode in ("iptables", "ipvs"):
        yield Warned(origin.where(("mode",)), f"{config.mode} means nftables: vcproxy has one way to program a node")
        if ("nodePortAddresses",) not in origin.given:
            why = f"unset, and so primary as in kube-proxy's nftables mode; in {config.mode} mode kube-proxy has all"
            yield Warned(origin.where(("nodePortAddresses",)), why)
    yield from _families(config, origin)


def _families(config: KubeProxyConfiguration, origin: Origin) -> Iterator[Warned]:
    """As kube-proxy: CIDRs of one family alone say nothing about the other."""
    if missing := uncovered_family(config):
        yield Warned(
            origin.where(("nodePortAddresses",)),
            f"has no CIDR of IPv{missing}, and so, as in kube-proxy, NodePorts are accepted on every IPv{missing} "
            f"address of the node but loopback; add one, or {PRIMARY}",
        )


def uncovered_family(config: KubeProxyConfiguration) -> int:
    """The family that nodePortAddresses say nothing about, 4 or 6; 0 for none."""
    if any(text in KEYWORDS for text in config.node_port_addresses):
        return 0
    families = {len(found.address) for text in config.node_port_addresses if (found := cidr(text))}
    return {frozenset({4}): 6, frozenset({16}): 4}.get(frozenset(families), 0)
