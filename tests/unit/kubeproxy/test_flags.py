"""kube-proxy 1.37's flags, every one: what each becomes, and what is said about those that have no effect."""

import pytest

from vcproxy.kubeproxy import flags, judging
from vcproxy.kubeproxy.configuration import KubeProxyConfiguration, VModule, at, defaulted
from vcproxy.kubeproxy.duration import Duration
from vcproxy.kubeproxy.reading import Read, read_text
from vcproxy.ops.configfile import ConfigError

# flag, value, field, value of the field; True: it has an effect
FIELDS = [
    ("bind-address", "192.0.2.9", "bindAddress", "192.0.2.9", True),
    ("bind-address-hard-fail", "true", "bindAddressHardFail", True, True),
    ("cluster-cidr", "10.0.0.0/8,fd00::/64", "clusterCIDR", "10.0.0.0/8,fd00::/64", True),
    ("config-sync-period", "1m", "configSyncPeriod", Duration.parse("1m"), False),
    ("conntrack-max-per-core", "0", "conntrack.maxPerCore", 0, True),
    ("conntrack-min", "7", "conntrack.min", 7, True),
    ("conntrack-tcp-be-liberal", "true", "conntrack.tcpBeLiberal", True, True),
    ("conntrack-tcp-timeout-close-wait", "2h", "conntrack.tcpCloseWaitTimeout", Duration.parse("2h"), True),
    ("conntrack-tcp-timeout-established", "0", "conntrack.tcpEstablishedTimeout", Duration(0), True),
    ("conntrack-udp-timeout", "90s", "conntrack.udpTimeout", Duration.parse("90s"), True),
    ("conntrack-udp-timeout-stream", "90s", "conntrack.udpStreamTimeout", Duration.parse("90s"), True),
    ("detect-local-mode", "NodeCIDR", "detectLocalMode", "NodeCIDR", True),
    ("feature-gates", "Foo=true,Bar=false", "featureGates", {"Foo": True, "Bar": False}, False),
    ("healthz-bind-address", "127.0.0.1", "healthzBindAddress", "127.0.0.1:10256", True),
    ("hostname-override", " Node-1 ", "hostnameOverride", "node-1", True),
    ("iptables-localhost-nodeports", "false", "iptables.localhostNodePorts", False, False),
    ("iptables-masquerade-bit", "15", "iptables.masqueradeBit", 15, False),
    ("iptables-min-sync-period", "2s", "nftables.minSyncPeriod", Duration.parse("2s"), False),
    ("iptables-sync-period", "1m", "nftables.syncPeriod", Duration.parse("1m"), False),
    ("ipvs-exclude-cidrs", "10.0.0.0/8", "ipvs.excludeCIDRs", ("10.0.0.0/8",), False),
    ("ipvs-min-sync-period", "2s", "ipvs.minSyncPeriod", Duration.parse("2s"), False),
    ("ipvs-scheduler", "rr", "ipvs.scheduler", "rr", False),
    ("ipvs-strict-arp", "true", "ipvs.strictARP", True, False),
    ("ipvs-sync-period", "1m", "ipvs.syncPeriod", Duration.parse("1m"), False),
    ("ipvs-tcp-timeout", "1m", "ipvs.tcpTimeout", Duration.parse("1m"), False),
    ("ipvs-tcpfin-timeout", "1m", "ipvs.tcpFinTimeout", Duration.parse("1m"), False),
    ("ipvs-udp-timeout", "1m", "ipvs.udpTimeout", Duration.parse("1m"), False),
    ("kube-api-burst", "20", "clientConnection.burst", 20, False),
    ("kube-api-content-type", "application/json", "clientConnection.contentType", "application/json", False),
    ("kube-api-qps", "7.5", "clientConnection.qps", 7.5, False),
    ("kubeconfig", "/k", "clientConnection.kubeconfig", "/k", True),
    ("log-flush-frequency", "1s", "logging.flushFrequency", Duration.parse("1s"), False),
    ("log-json-info-buffer-size", "4Ki", "logging.options.json.infoBufferSize", "4Ki", False),
    ("log-json-split-stream", "true", "logging.options.json.splitStream", True, False),
    ("log-text-info-buffer-size", "4Ki", "logging.options.text.infoBufferSize", "4Ki", False),
    ("log-text-split-stream", "true", "logging.options.text.splitStream", True, False),
    ("logging-format", "json", "logging.format", "json", True),
    ("masquerade-all", "true", "nftables.masqueradeAll", True, True),
    ("metrics-bind-address", "[::]:10249", "metricsBindAddress", "[::]:10249", True),
    ("nodeport-addresses", "localhost,primary,10.0.0.0/8", "nodePortAddresses", ("localhost", "primary", "10.0.0.0/8"), True),
    ("oom-score-adj", "-5", "oomScoreAdj", -5, True),
    ("pod-bridge-interface", "cni0", "detectLocal.bridgeInterface", "cni0", False),  # in the default detectLocalMode
    ("pod-interface-name-prefix", "veth", "detectLocal.interfaceNamePrefix", "veth", False),
    ("profiling", "true", "enableProfiling", True, False),
    ("proxy-mode", "ipvs", "mode", "ipvs", False),
    ("show-hidden-metrics-for-version", "1.36", "showHiddenMetricsForVersion", "1.36", False),
    ("v", "=4", "logging.verbosity", 4, True),
    ("vmodule", "a=1,b=2", "logging.vmodule", (VModule(file_pattern="a", verbosity=1), VModule(file_pattern="b", verbosity=2)), False),
]  # fmt: skip
ACTIONS = {"config", "write-config-to", "cleanup", "init-only", "master"}
CLICKS_OWN = {"help", "version"}


def made(**given: str | list[str]) -> Read:
    values = {name: [value] if isinstance(value, str) else value for name, value in given.items()}
    return flags.from_flags({name.replace("_", "-"): value for name, value in values.items()})


def test_the_table_is_complete() -> None:
    assert sorted(flag.name for flag in flags.FIELDS) == sorted(name for name, *_ in FIELDS)
    assert {flag.name for flag in flags.ACTIONS} == ACTIONS


@pytest.mark.parametrize(("name", "value", "path", "field", "matters"), FIELDS, ids=[name for name, *_ in FIELDS])
def test_what_a_flag_becomes(name: str, value: str, path: str, field: object, matters: bool) -> None:
    read = made(**{name: value})
    steps = tuple(path.split("."))
    assert at(read.config, steps) == field
    assert at(defaulted(KubeProxyConfiguration()), steps) != field, "the case shows nothing"
    judging.check(read.config, read.origin)
    said = [warning.where for warning in judging.warnings(read.config, read.origin)]
    if name == "feature-gates":
        assert said == ["featureGates.Foo", "featureGates.Bar"]
    elif name == "proxy-mode":
        assert said == ["--proxy-mode", "nodePortAddresses"]
    else:
        assert said == ([] if matters else [f"--{name}"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"oom-score-adj": "low"}, "--oom-score-adj: 'low' is no whole number"),
        ({"conntrack-min": "3000000000"}, "--conntrack-min: 3000000000 does not fit into 32 bits"),
        ({"masquerade-all": "yes"}, "--masquerade-all: 'yes' is neither true nor false"),
        ({"kube-api-qps": "fast"}, "--kube-api-qps: 'fast' is no number"),
        ({"conntrack-udp-timeout": "30"}, "--conntrack-udp-timeout: '30' is no duration"),
        ({"feature-gates": "Foo"}, "--feature-gates: 'Foo': write NAME=true"),
        ({"vmodule": "x"}, "--vmodule: 'x': write PATTERN=N"),
        ({"hostname-override": "  "}, "--hostname-override: is only white space"),
        ({"nodeport-addresses": "here"}, "--nodeport-addresses: 'here' is neither a CIDR nor one of"),
        ({"healthz-bind-address": "here"}, "--healthz-bind-address: 'here:10256' is not IP:PORT"),
        ({"proxy-mode": "userspace"}, "--proxy-mode: 'userspace' is no mode"),
        ({"iptables-masquerade-bit": "32"}, "--iptables-masquerade-bit: must be 0 to 31"),
        ({"detect-local-mode": "BridgeInterface"}, "detectLocal.bridgeInterface: must not be empty"),
    ],
)  # fmt: skip
def test_a_bad_value_is_named_with_its_flag(given: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        read = made(**given)
        judging.check(read.config, read.origin)
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize(
    ("given", "path", "value"),
    [
        ({"nodeport-addresses": ["primary", "10.0.0.0/8,fd00::/8"]}, "nodePortAddresses", ("primary", "10.0.0.0/8", "fd00::/8")),
        ({"feature-gates": ["A=true", "B=false,A=false"]}, "featureGates", {"A": False, "B": False}),
        ({"oom-score-adj": ["1", "2"]}, "oomScoreAdj", 2),
        ({"healthz-bind-address": ""}, "healthzBindAddress", ""),
        ({"healthz-port": "0"}, "healthzBindAddress", ""),
        ({"metrics-port": "9999"}, "metricsBindAddress", "127.0.0.1:10249"),  # as in kube-proxy: the default has a port
        ({"metrics-bind-address": "127.0.0.1", "metrics-port": "9999"}, "metricsBindAddress", "127.0.0.1:9999"),
        ({"proxy-mode": "iptables", "masquerade-all": "true"}, "iptables.masqueradeAll", True),
        ({"proxy-mode": ""}, "mode", "nftables"),
    ],
)  # fmt: skip
def test_repeated_empty_and_deprecated_ones(given: dict[str, str | list[str]], path: str, value: object) -> None:
    assert at(made(**given).config, tuple(path.split("."))) == value


FILE = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nhostnameOverride: from-file\n"


@pytest.mark.parametrize("flag", (*flags.FIELDS, *flags.DEPRECATED), ids=lambda flag: flag.name)
def test_beside_a_file_only_the_name_and_logging_hold(flag: flags.Flag) -> None:
    values = {name: value for name, value, *_ in FIELDS}
    file = read_text(FILE, source="f")
    read = flags.over_file(file, {flag.name: [values.get(flag.name, "1")]})
    survives = flag.name in ("hostname-override", "v", "vmodule") or flag.name.startswith("log")
    assert flag.survives == survives
    if survives:
        assert read.warned == ()
        assert read.config != file.config
    else:
        assert [warning.where for warning in read.warned] == [f"--{flag.name}"]
        assert read.config == file.config


def test_a_flag_beside_a_file_is_named_as_a_flag() -> None:
    file = read_text(FILE, source="f")
    read = flags.over_file(file, {"logging-format": ["xml"]})
    with pytest.raises(ConfigError, match=r"^--logging-format: 'xml' is no log format"):
        judging.check(read.config, read.origin)
    read = flags.over_file(file, {"vmodule": ["a=1"]})
    assert [warning.where for warning in judging.warnings(read.config, read.origin)] == ["--vmodule"]


def test_an_empty_name_leaves_the_files() -> None:
    assert (
        flags.over_file(read_text(FILE, source="f"), {"hostname-override": [""]}).config.hostname_override
        == "from-file"
    )
