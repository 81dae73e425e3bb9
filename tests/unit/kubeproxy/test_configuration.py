"""KubeProxyConfiguration files: what is read, what is wrong with them, what has no effect, and how it is said."""

from pathlib import Path

import msgspec
import pytest

from vcproxy.kubeproxy import judging, reading, translation
from vcproxy.kubeproxy.configuration import KubeProxyConfiguration, at, defaulted, external
from vcproxy.kubeproxy.reading import Read
from vcproxy.kubeproxy.translation import Surroundings
from vcproxy.node.config import Conntrack, DetectLocal, NodeConfiguration
from vcproxy.ops.configfile import ConfigError

HEADER = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n"
AROUND = Surroundings(node="n1", state_directory="/s", runtime_directory="/r")
KUBEADM = Path(__file__).with_name("kubeadm.yaml")


def read(text: str) -> Read:
    return reading.read_text(HEADER + text, source="f")


def warned(found: Read) -> list[str]:
    return [str(warning) for warning in (*found.warned, *judging.warnings(found.config, found.origin))]


def node_of(text: str) -> NodeConfiguration:
    found = read(text)
    judging.check(found.config, found.origin)
    return translation.configurations(found.config, AROUND)[1]


def test_kubeadms_file_needs_no_word() -> None:
    found = reading.read_file(KUBEADM)
    judging.check(found.config, found.origin)
    assert warned(found) == []
    brain, node = translation.configurations(found.config, AROUND)
    assert brain.super_cluster is not None
    assert brain.super_cluster.kubeconfig == "/var/lib/kube-proxy/kubeconfig.conf"
    assert brain.super_cluster.node == "n1"
    assert not brain.super_cluster.pods  # kube-proxy's role may not read them
    assert node.detect_local == DetectLocal(mode="ClusterCIDR", cluster_cidrs=("10.244.0.0/16",))
    assert node.node_port_addresses == ("primary",)
    assert node.health_address == "0.0.0.0:10256"
    assert node.metrics_address == "127.0.0.1:10249"
    assert node.conntrack == Conntrack()
    assert not node.bind_hard_fail
    assert node.log_format == "text"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mode: userspace", "f:3: mode: 'userspace' is no mode"),
        ("detectLocalMode: Guess", "f:3: detectLocalMode: 'Guess' is none of ClusterCIDR"),
        ("detectLocalMode: BridgeInterface", "detectLocal.bridgeInterface: must not be empty"),
        ("detectLocalMode: InterfaceNamePrefix\ndetectLocal: {interfaceNamePrefix: averyveryverylongname}", "f:4: detectLocal.interfaceNamePrefix: 'averyveryverylongname' is no device name"),
        ("clusterCIDR: 10.0.0.0", "f:3: clusterCIDR: '10.0.0.0' is no CIDR"),
        ("clusterCIDR: 10.0.0.0/8,11.0.0.0/8", "f:3: clusterCIDR: 10.0.0.0/8,11.0.0.0/8 is neither one CIDR nor one of IPv4 and one of IPv6"),
        ("clusterCIDR: 10.0.0.0/8,fd00::/8,11.0.0.0/8", "is neither one CIDR nor"),
        ("nodePortAddresses: [primary, 10.0.0.1]", "f:3: nodePortAddresses[1]: '10.0.0.1' is neither a CIDR nor"),
        ("nodePortAddresses:\n- all\n- primary\n- all", "f:6: nodePortAddresses[2]: all is there twice"),
        ("healthzBindAddress: host:1", "f:3: healthzBindAddress: 'host:1' is not IP:PORT"),
        ("metricsBindAddress: 127.0.0.1:70000", "f:3: metricsBindAddress: '127.0.0.1:70000' is not IP:PORT"),
        ("bindAddress: here", "f:3: bindAddress: 'here' is no IP address"),
        ("oomScoreAdj: -1001", "f:3: oomScoreAdj: must be -1000 to 1000"),
        ("iptables: {masqueradeBit: 32}", "f:3: iptables.masqueradeBit: must be 0 to 31"),
        ("conntrack: {maxPerCore: -1}", "f:3: conntrack.maxPerCore: must be 0 to"),
        ("conntrack: {udpTimeout: -1s}", "f:3: conntrack.udpTimeout: must not be negative, and is -1s"),
        ("configSyncPeriod: -1s", "f:3: configSyncPeriod: must be more than 0s"),
        ("mode: nftables\nnftables: {minSyncPeriod: 1m}", "f:4: nftables.minSyncPeriod: must be 0s up to syncPeriod, which is 30s"),
        ("clientConnection: {burst: -1}", "f:3: clientConnection.burst: must be 0 to"),
        ("logging: {format: xml}", "f:3: logging.format: 'xml' is no log format"),
        ("mode: 3", "f:3: mode: Expected `str`"),
        ("conntrack: {min: many}", "f:3: conntrack.min: Expected `int"),
        ("conntrack:\n  udpTimeout: 30", "f:4: conntrack.udpTimeout: expected a duration"),
        ("mode: [", "f:3: not YAML"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_its_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        found = read(text)
        judging.check(found.config, found.origin)
    assert message in str(raised.value)


def test_all_problems_are_named_at_once() -> None:
    found = read("mode: x\noomScoreAdj: 2000")
    with pytest.raises(ConfigError, match=r"f:3: mode: .*; f:4: oomScoreAdj: "):
        judging.check(found.config, found.origin)


@pytest.mark.parametrize(
    "text", ["apiVersion: v1", "kind: KubeletConfiguration\napiVersion: kubeproxy.config.k8s.io/v1alpha1"]
)
def test_another_document_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected"):
        reading.read_text(text, source="f")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bogus: 1", "f:3: bogus: is no field of kubeproxy.config.k8s.io/v1alpha1"),
        ("conntrack:\n  tcpTimeout: 5s", "f:4: conntrack.tcpTimeout: is no field of"),
        ("mode: iptables\nnodePortAddresses: [primary]", "f:3: mode: iptables means nftables"),
        ("mode: ipvs\nnodePortAddresses: [primary]", "f:3: mode: ipvs means nftables"),
        ("ipvs: {scheduler: rr}", "f:3: ipvs.scheduler: has no effect"),
        ("ipvs: {strictARP: true}", "f:3: ipvs.strictARP: has no effect"),
        ("iptables: {masqueradeBit: 15}", "f:3: iptables.masqueradeBit: has no effect: vcproxy sets no packet mark"),
        ("iptables: {localhostNodePorts: false}", "f:3: iptables.localhostNodePorts: has no effect: name localhost in"),
        ("nftables: {syncPeriod: 1m}", "f:3: nftables.syncPeriod: has no effect"),
        ("iptables: {masqueradeAll: true}", "f:3: iptables.masqueradeAll: has no effect with mode nftables: set nftables.masqueradeAll"),
        ("clientConnection: {qps: 50}", "f:3: clientConnection.qps: has no effect"),
        ("winkernel: {enableDSR: true}", "f:3: winkernel.enableDSR: has no effect on Linux"),
        ("portRange: 1-2", "f:3: portRange: has no effect"),
        ("enableProfiling: true", "f:3: enableProfiling: has no effect: /debug/pprof"),
        ("featureGates: {Foo: true}", "f:3: featureGates.Foo: Foo has no effect"),
        ("detectLocalMode: NodeCIDR\nclusterCIDR: 10.0.0.0/8", "f:4: clusterCIDR: has no effect with detectLocalMode NodeCIDR"),
        ("detectLocal: {bridgeInterface: cni0}", "f:3: detectLocal.bridgeInterface: has no effect with detectLocalMode ClusterCIDR"),
        ("nodePortAddresses: [10.0.0.0/8]", "f:3: nodePortAddresses: has no CIDR of IPv6"),
        ("logging: {vmodule: [{filePattern: a, verbosity: 3}]}", "f:3: logging.vmodule: has no effect"),
    ],
)  # fmt: skip
def test_what_has_no_effect_is_named_once(text: str, message: str) -> None:
    found = read(text)
    judging.check(found.config, found.origin)
    said = warned(found)
    assert len(said) == 1, said
    assert said[0].startswith(message)


def test_unset_node_port_addresses_mean_less_than_in_the_older_modes() -> None:
    assert any("nodePortAddresses: unset, and so primary" in said for said in warned(read("mode: iptables")))
    assert warned(read("")) == []


@pytest.mark.parametrize(
    "text",
    [
        "conntrack: {maxPerCore: null}\niptables: {masqueradeBit: 14, syncPeriod: 30s}",
        "featureGates: {KubeProxyNFTablesLocalhostNodePorts: true}",
        "logging: {flushFrequency: 5000000000}",
        "configSyncPeriod: 15m0s\nclientConnection: {qps: 5, burst: 10}",
        "nodePortAddresses: [10.0.0.0/8, primary]",
        "nodePortAddresses: [10.0.0.0/8, fd00::/8]",
    ],
)
def test_defaults_and_what_counts_need_no_warning(text: str) -> None:
    assert warned(read(text)) == []


def _local(mode: str, **fields: str) -> DetectLocal:
    return DetectLocal(mode=mode, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", {"detect_local": DetectLocal(mode="None")}),
        ("clusterCIDR: 10.1.0.0/16,fd00:1::/64", {"detect_local": DetectLocal(cluster_cidrs=("10.1.0.0/16", "fd00:1::/64"))}),
        ("detectLocalMode: NodeCIDR", {"detect_local": DetectLocal(mode="NodeCIDR")}),
        ("detectLocalMode: BridgeInterface\ndetectLocal: {bridgeInterface: cni0}", {"detect_local": _local("BridgeInterface", bridge_interface="cni0")}),
        ("detectLocalMode: InterfaceNamePrefix\ndetectLocal: {interfaceNamePrefix: veth}", {"detect_local": _local("InterfaceNamePrefix", interface_name_prefix="veth")}),
        ("mode: nftables\nnftables: {masqueradeAll: true}", {"masquerade_all": True}),
        ("mode: iptables\niptables: {masqueradeAll: true}", {"masquerade_all": True}),
        ("mode: ipvs\niptables: {masqueradeAll: true}", {"masquerade_all": True}),
        ("mode: iptables\nnftables: {masqueradeAll: true}", {"masquerade_all": False}),
        ("bindAddress: 192.0.2.7", {"node_address": "192.0.2.7"}),
        ("bindAddress: '::'", {"node_address": "", "health_address": "[::]:10256", "metrics_address": "[::1]:10249"}),
        ("healthzBindAddress: 127.0.0.1\nmetricsBindAddress: '::1'", {"health_address": "127.0.0.1:10256", "metrics_address": "[::1]:10249"}),
        ("nodePortAddresses: [localhost, primary]", {"node_port_addresses": ("localhost", "primary")}),
        ("nodePortAddresses: [localhost, primary, 127.0.0.0/8]\nfeatureGates: {KubeProxyNFTablesLocalhostNodePorts: false}", {"node_port_addresses": ("primary",)}),
        ("nodePortAddresses: [10.0.0.0/8]", {"node_port_addresses": ("10.0.0.0/8", "::/0")}),
        ("nodePortAddresses: ['fd00::/8']", {"node_port_addresses": ("fd00::/8", "0.0.0.0/0")}),
        ("bindAddressHardFail: true", {"bind_hard_fail": True}),
        ("logging: {verbosity: 4, format: json}", {"log_level": "debug", "log_format": "json"}),
        ("logging: {verbosity: 3}", {"log_level": "info"}),
        ("conntrack: {maxPerCore: 0, min: 5, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 90s, tcpBeLiberal: true, udpTimeout: 1m, udpStreamTimeout: 1h}",
         {"conntrack": Conntrack(max_per_core=0, min=5, tcp_established_seconds=0, tcp_close_wait_seconds=90, tcp_be_liberal=True, udp_seconds=60, udp_stream_seconds=3600)}),
    ],
)  # fmt: skip
def test_what_the_node_gets(text: str, wanted: dict[str, object]) -> None:
    node = node_of(text)
    assert {name: getattr(node, name) for name in wanted} == wanted


@pytest.mark.parametrize(
    ("around", "text", "wanted"),
    [
        (AROUND, "", {"kubeconfig": None, "server": "", "pods": False, "node": "n1"}),
        (AROUND._replace(tenants="/t"), "", {"pods": True}),
        (AROUND._replace(master="https://192.0.2.1:6443"), "clientConnection: {kubeconfig: /k}", {"kubeconfig": "/k", "server": "https://192.0.2.1:6443"}),
    ],
)  # fmt: skip
def test_what_the_brain_gets(around: Surroundings, text: str, wanted: dict[str, object]) -> None:
    brain, _ = translation.configurations(read(text).config, around)
    assert brain.super_cluster is not None
    assert {name: getattr(brain.super_cluster, name) for name in wanted} == wanted
    assert translation.configurations(read(text).config, around._replace(super_cluster=False))[0].super_cluster is None


def test_what_is_written_is_read_back_as_the_same() -> None:
    first = read("mode: nftables\nnodePortAddresses: [localhost]\nconntrack: {udpTimeout: 90s}").config
    again = reading.read_text(msgspec.yaml.encode(external(first)).decode(), source="f")
    assert again.warned == ()
    assert again.config == first


def test_fields_are_found_by_the_names_that_files_use() -> None:
    config = defaulted(KubeProxyConfiguration())
    assert at(config, ("conntrack", "maxPerCore")) == 32768
    assert at(config, ("oomScoreAdj",)) == -999
