"""kube-proxy's flags, all of them, as a table: what each is called, and the field of the configuration that it is.

Flags are parsed as pflag does it: `--flag=true` and a bare `--flag`, lists with commas or by repetition, underscores
for dashes. They become a KubeProxyConfiguration, which then goes the way of a file. With `--config` a file is all there
is: as in kube-proxy the flags of fields are ignored, but for `--hostname-override` and those of logging.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from vcproxy.kubeproxy import configuration
from vcproxy.kubeproxy.configuration import KubeProxyConfiguration, Path, defaulted, settled, with_port
from vcproxy.kubeproxy.duration import Duration
from vcproxy.kubeproxy.reading import Origin, Read, Warned
from vcproxy.ops.configfile import ConfigError


class Flag(NamedTuple):
    """One flag. `path`: its field, () for none. `kind`: how its value is read. `survives`: also beside `--config`."""

    name: str
    path: Path
    kind: Callable[[str], Any]
    help: str
    many: bool = False
    survives: bool = False
    hidden: bool = False

    @property
    def option(self) -> str:
        """As people write it."""
        return f"--{self.name}"

    @property
    def is_switch(self) -> bool:
        """May be given without a value."""
        return self.kind is boolean


def boolean(text: str) -> bool:
    """As Go's ParseBool."""
    if text in ("1", "t", "T", "TRUE", "true", "True"):
        return True
    if text in ("0", "f", "F", "FALSE", "false", "False"):
        return False
    raise ValueError(f"{text[:32]!r} is neither true nor false")


def integer(text: str) -> int:
    """32 bits."""
    try:
        number = int(text, 0)
    except ValueError:
        raise ValueError(f"{text[:32]!r} is no whole number") from None
    if not -(1 << 31) <= number < 1 << 31:
        raise ValueError(f"{text[:32]} does not fit into 32 bits")
    return number


def decimal(text: str) -> float:
    """A number."""
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{text[:32]!r} is no number") from None


def strings(text: str) -> tuple[str, ...]:
    """Comma-separated."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def switches(text: str) -> dict[str, bool]:
    """NAME=true,NAME=false."""
    found = {}
    for part in strings(text):
        name, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"{part[:64]!r}: write NAME=true or NAME=false")
        found[name.strip()] = boolean(value.strip())
    return found


def modules(text: str) -> tuple[configuration.VModule, ...]:
    """PATTERN=N,..."""
    found = []
    for part in strings(text):
        pattern, equals, level = part.partition("=")
        if not equals:
            raise ValueError(f"{part[:64]!r}: write PATTERN=N")
        found.append(configuration.VModule(file_pattern=pattern, verbosity=integer(level)))
    return tuple(found)


def level(text: str) -> int:
    """A verbosity; `-v=4` gets here as `=4`."""
    return integer(text.removeprefix("="))


def host_name(text: str) -> str:
    """As kube-proxy: trimmed, in lower case."""
    if text and not text.strip():
        raise ValueError("is only white space")
    return text.strip().lower()


OF_MODE = "*"
"""In a flag's path: the section of the mode in use, where kube-proxy's flag has one meaning for all modes. The mode ipvs
shares that of iptables."""

_PORTS = (configuration.HEALTHZ_PORT, configuration.METRICS_PORT)
_CONNTRACK = "Connection tracking: "
_NONE_HERE = "No effect here: "

FIELDS: tuple[Flag, ...] = (
    Flag("kubeconfig", ("clientConnection", "kubeconfig"), str, "Of the cluster that owns the node; default: in-cluster."),
    Flag("hostname-override", ("hostnameOverride",), host_name, "Name of this node; default: the host name.", survives=True),
    Flag("cluster-cidr", ("clusterCIDR",), str, "Pod range, or one of IPv4 and one of IPv6 with a comma."),
    Flag("detect-local-mode", ("detectLocalMode",), str, "How local pods are told from other clients: ClusterCIDR (default), NodeCIDR, BridgeInterface, InterfaceNamePrefix."),
    Flag("pod-bridge-interface", ("detectLocal", "bridgeInterface"), str, "BridgeInterface: local is what enters by this device."),
    Flag("pod-interface-name-prefix", ("detectLocal", "interfaceNamePrefix"), str, "InterfaceNamePrefix: local is what enters by a device whose name begins so."),
    Flag("nodeport-addresses", ("nodePortAddresses",), strings, "CIDRs of node addresses that accept NodePorts, and primary (default), all, localhost (TCP).", many=True),
    Flag("masquerade-all", (OF_MODE, "masqueradeAll"), boolean, "Masquerade every connection to a ClusterIP."),
    Flag("bind-address", ("bindAddress",), str, "The node's primary IP, in place of the Node object's."),
    Flag("bind-address-hard-fail", ("bindAddressHardFail",), boolean, "End when an address to serve on is taken; default: try again every five seconds."),
    Flag("healthz-bind-address", ("healthzBindAddress",), str, 'Of /healthz and /livez; default 0.0.0.0:10256; "": none.'),
    Flag("metrics-bind-address", ("metricsBindAddress",), str, 'Of /metrics, /configz and /proxyMode; default 127.0.0.1:10249; "": none.'),
    Flag("oom-score-adj", ("oomScoreAdj",), integer, "Of this process; default -999."),
    Flag("conntrack-max-per-core", ("conntrack", "maxPerCore"), integer, f"{_CONNTRACK}entries per CPU; 0 leaves the limit alone; default 32768."),
    Flag("conntrack-min", ("conntrack", "min"), integer, f"{_CONNTRACK}entries at least; default 131072."),
    Flag("conntrack-tcp-timeout-established", ("conntrack", "tcpEstablishedTimeout"), Duration.parse, f"{_CONNTRACK}idle time of a TCP connection; 0 leaves it alone; default 24h."),
    Flag("conntrack-tcp-timeout-close-wait", ("conntrack", "tcpCloseWaitTimeout"), Duration.parse, f"{_CONNTRACK}of a half-closed TCP connection; default 1h."),
    Flag("conntrack-tcp-be-liberal", ("conntrack", "tcpBeLiberal"), boolean, f"{_CONNTRACK}accept TCP packets outside the window."),
    Flag("conntrack-udp-timeout", ("conntrack", "udpTimeout"), Duration.parse, f"{_CONNTRACK}of UDP that nobody answered; 0 leaves it alone."),
    Flag("conntrack-udp-timeout-stream", ("conntrack", "udpStreamTimeout"), Duration.parse, f"{_CONNTRACK}of UDP that was answered; 0 leaves it alone."),
    Flag("feature-gates", ("featureGates",), switches, "NAME=true,...: KubeProxyNFTablesLocalhostNodePorts=false turns localhost NodePorts off.", many=True),
    Flag("proxy-mode", ("mode",), str, "nftables; iptables and ipvs are accepted, and mean nftables."),
    Flag("v", ("logging", "verbosity"), level, "Log level: from 4 on debug.", survives=True),
    Flag("logging-format", ("logging", "format"), str, "text (default) or json.", survives=True),
    Flag("profiling", ("enableProfiling",), boolean, f"{_NONE_HERE}/debug/pprof is of Go programs."),
    Flag("show-hidden-metrics-for-version", ("showHiddenMetricsForVersion",), str, f"{_NONE_HERE}no metrics are hidden."),
    Flag("kube-api-content-type", ("clientConnection", "contentType"), str, f"{_NONE_HERE}JSON is read."),
    Flag("kube-api-burst", ("clientConnection", "burst"), integer, f"{_NONE_HERE}a few watches are all requests."),
    Flag("kube-api-qps", ("clientConnection", "qps"), decimal, f"{_NONE_HERE}a few watches are all requests."),
    Flag("config-sync-period", ("configSyncPeriod",), Duration.parse, f"{_NONE_HERE}nothing is synchronised again."),
    Flag("iptables-localhost-nodeports", ("iptables", "localhostNodePorts"), boolean, f"{_NONE_HERE}see --nodeport-addresses."),
    Flag("iptables-masquerade-bit", ("iptables", "masqueradeBit"), integer, f"{_NONE_HERE}no mark is set."),
    Flag("iptables-sync-period", (OF_MODE, "syncPeriod"), Duration.parse, f"{_NONE_HERE}nothing is synchronised again."),
    Flag("iptables-min-sync-period", (OF_MODE, "minSyncPeriod"), Duration.parse, f"{_NONE_HERE}changes are programmed at once."),
    Flag("ipvs-scheduler", ("ipvs", "scheduler"), str, f"{_NONE_HERE}IPVS is not used."),
    Flag("ipvs-exclude-cidrs", ("ipvs", "excludeCIDRs"), strings, f"{_NONE_HERE}IPVS is not used.", many=True),
    Flag("ipvs-strict-arp", ("ipvs", "strictARP"), boolean, f"{_NONE_HERE}IPVS is not used."),
    Flag("ipvs-sync-period", ("ipvs", "syncPeriod"), Duration.parse, f"{_NONE_HERE}IPVS is not used."),
    Flag("ipvs-min-sync-period", ("ipvs", "minSyncPeriod"), Duration.parse, f"{_NONE_HERE}IPVS is not used."),
    Flag("ipvs-tcp-timeout", ("ipvs", "tcpTimeout"), Duration.parse, f"{_NONE_HERE}IPVS is not used."),
    Flag("ipvs-tcpfin-timeout", ("ipvs", "tcpFinTimeout"), Duration.parse, f"{_NONE_HERE}IPVS is not used."),
    Flag("ipvs-udp-timeout", ("ipvs", "udpTimeout"), Duration.parse, f"{_NONE_HERE}IPVS is not used."),
    Flag("log-flush-frequency", ("logging", "flushFrequency"), Duration.parse, f"{_NONE_HERE}lines are written at once.", survives=True),
    Flag("log-json-info-buffer-size", ("logging", "options", "json", "infoBufferSize"), str, f"{_NONE_HERE}lines are written at once.", survives=True),
    Flag("log-json-split-stream", ("logging", "options", "json", "splitStream"), boolean, f"{_NONE_HERE}logs go to stderr.", survives=True),
    Flag("log-text-info-buffer-size", ("logging", "options", "text", "infoBufferSize"), str, f"{_NONE_HERE}lines are written at once.", survives=True),
    Flag("log-text-split-stream", ("logging", "options", "text", "splitStream"), boolean, f"{_NONE_HERE}logs go to stderr.", survives=True),
    Flag("vmodule", ("logging", "vmodule"), modules, f"{_NONE_HERE}it names source files of kube-proxy's.", many=True, survives=True),
)  # fmt: skip
"""Flags that are fields of the configuration."""

DEPRECATED: tuple[Flag, ...] = (
    Flag("healthz-port", (), integer, "Deprecated in kube-proxy: use --healthz-bind-address.", hidden=True),
    Flag("metrics-port", (), integer, "Deprecated in kube-proxy: use --metrics-bind-address.", hidden=True),
)
"""Flags of which a part of a field is left."""

ACTIONS: tuple[Flag, ...] = (
    Flag("config", (), str, "File with a KubeProxyConfiguration; then the flags of its fields are ignored, but for --hostname-override and logging.", survives=True),
    Flag("write-config-to", (), str, "Write the configuration that flags and defaults make to this file, and end.", survives=True),
    Flag("cleanup", (), boolean, "Remove all that vcproxy and any mode of kube-proxy left on this node, and end.", survives=True),
    Flag("init-only", (), boolean, "Do what needs all of root's privileges, and end; run later with CAP_NET_ADMIN alone.", survives=True),
    Flag("master", (), str, "Address of the API server, in place of the kubeconfig's.", survives=True),
)  # fmt: skip
"""Flags that are none, and hold whatever `--config` says."""

ALL = (*ACTIONS, *FIELDS, *DEPRECATED)


def from_flags(given: Mapping[str, Sequence[str]]) -> Read:
    """The configuration that flags make. `given`: values by the flag's name, in order. Raises ConfigError."""
    plain = configuration.plain(defaulted(KubeProxyConfiguration()))
    section = "iptables" if given.get("proxy-mode", ("",))[-1] in ("iptables", "ipvs") else "nftables"
    names: dict[Path, str] = {}
    for flag in FIELDS:
        if flag.name in given:
            path = tuple(section if step == OF_MODE else step for step in flag.path)
            names[path] = flag.option
            _put(plain, path, parsed(flag, given[flag.name]))
    config = _configuration(plain)
    healthz, metrics = (
        parsed(flag, given.get(flag.name, [str(usual)])) for flag, usual in zip(DEPRECATED, _PORTS, strict=True)
    )
    config = msgspec.structs.replace(
        config,
        healthz_bind_address=with_port(config.healthz_bind_address, healthz)
        if config.healthz_bind_address and healthz
        else "",
        metrics_bind_address=with_port(config.metrics_bind_address, metrics)
        if config.metrics_bind_address and metrics
        else "",
    )
    return Read(settled(config), Origin(names.keys(), flags=names))


def over_file(read: Read, given: Mapping[str, Sequence[str]]) -> Read:
    """A file's configuration with the flags that hold beside one. Raises ConfigError."""
    plain = configuration.plain(read.config)
    warned = list(read.warned)
    names: dict[Path, str] = {}
    for flag in (*FIELDS, *DEPRECATED):
        if flag.name not in given:
            continue
        if not flag.survives:
            warned.append(Warned(flag.option, "is ignored beside --config, as in kube-proxy: set it in the file"))
        elif (value := parsed(flag, given[flag.name])) != "":
            _put(plain, flag.path, value)
            names[flag.path] = flag.option
    return Read(_configuration(plain), read.origin.joined(names), tuple(warned))


def parsed(flag: Flag, values: Sequence[str]) -> Any:
    """The value of a flag: of the last one, or of all. Raises ConfigError that names the flag."""
    try:
        found = [flag.kind(value) for value in values]
    except ValueError as error:
        raise ConfigError(f"{flag.option}: {error}") from None
    if not flag.many:
        return found[-1]
    if flag.kind is switches:
        return {name: on for part in found for name, on in part.items()}
    return [item for part in found for item in part]


def _put(plain: dict[str, Any], path: Path, value: Any) -> None:
    for step in path[:-1]:
        plain = plain[str(step)]
    plain[str(path[-1])] = msgspec.to_builtins(value, enc_hook=str)


def _configuration(plain: Mapping[str, Any]) -> KubeProxyConfiguration:
    return msgspec.convert(plain, KubeProxyConfiguration, dec_hook=configuration.decode)
