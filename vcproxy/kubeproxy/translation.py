"""A KubeProxyConfiguration as the two configurations of vcproxy's halves. Pure.

What kube-proxy does not know of (tenants, where state is kept, how the halves meet) comes in `Surroundings`.
"""

import ipaddress
from typing import NamedTuple

from vcproxy.brain.config import BrainConfiguration, DirectorySource, SuperCluster, Tenants, TenantSource
from vcproxy.kubeproxy.configuration import KubeProxyConfiguration
from vcproxy.kubeproxy.judging import LOCALHOST, LOCALHOST_GATE, cidr, cluster_cidrs, uncovered_family
from vcproxy.model.addresses import format_address, parse_address
from vcproxy.node.config import BrainAddress, Conntrack, DetectLocal, NodeConfiguration
from vcproxy.node.session import IN_PROCESS

_DEBUG_FROM = 4  # klog: what a developer wants to see
_EVERY = {4: "0.0.0.0/0", 6: "::/0"}


class Surroundings(NamedTuple):
    """What goes beyond kube-proxy.

    `node`: its name. `tenants`: a folder, "" for none. `super_cluster`: proxy its Services. `master`: address of its
    API server, "" for the kubeconfig's.
    """

    node: str
    state_directory: str
    runtime_directory: str
    tenants: str = ""
    super_cluster: bool = True
    master: str = ""


def configurations(
    config: KubeProxyConfiguration, around: Surroundings
) -> tuple[BrainConfiguration, NodeConfiguration]:
    """`config` has its defaults and no problems (judging.check)."""
    level = log_level(config)
    brain = BrainConfiguration(
        super_cluster=_super_cluster(config, around),
        tenants=Tenants(
            sources=(TenantSource(directory=DirectorySource(path=around.tenants)),) if around.tenants else ()
        ),
        admin_socket=f"{around.runtime_directory}/brain.sock",
        metrics_address="",
        log_level=level,
        log_format=config.logging.format,
    )
    node = NodeConfiguration(
        node_name=around.node,
        brain=BrainAddress(addresses=(IN_PROCESS,)),
        detect_local=detector(config),
        masquerade_all=masquerade_all(config),
        node_port_addresses=node_port_addresses(config),
        node_address=_node_address(config),
        conntrack=conntrack(config),
        state_directory=around.state_directory,
        admin_socket=f"{around.runtime_directory}/node.sock",
        health_address=config.healthz_bind_address,
        metrics_address=config.metrics_bind_address,
        bind_hard_fail=config.bind_address_hard_fail,
        log_level=level,
        log_format=config.logging.format,
    )
    return brain, node


def log_level(config: KubeProxyConfiguration) -> str:
    """klog's verbosity as a level."""
    return "debug" if config.logging.verbosity >= _DEBUG_FROM else "info"


def _super_cluster(config: KubeProxyConfiguration, around: Surroundings) -> SuperCluster | None:
    if not around.super_cluster:
        return None
    # Where no tenant is, nothing hangs on Pods or policies: kube-proxy's role (system:node-proxier) may not read them.
    return SuperCluster(
        kubeconfig=config.client_connection.kubeconfig or None,
        server=around.master,
        node=around.node,
        pods=bool(around.tenants),
        tenant_policies=bool(around.tenants),
    )


def detector(config: KubeProxyConfiguration) -> DetectLocal:
    """How local pods are told. As in kube-proxy there is no detector in ClusterCIDR mode without a CIDR."""
    match config.detect_local_mode:
        case "ClusterCIDR":
            cidrs = cluster_cidrs(config)
            return DetectLocal(mode="ClusterCIDR" if cidrs else "None", cluster_cidrs=cidrs)
        case "BridgeInterface":
            return DetectLocal(mode="BridgeInterface", bridge_interface=config.detect_local.bridge_interface)
        case "InterfaceNamePrefix":
            prefix = config.detect_local.interface_name_prefix
            return DetectLocal(mode="InterfaceNamePrefix", interface_name_prefix=prefix)
        case _:
            return DetectLocal(mode="NodeCIDR")


def masquerade_all(config: KubeProxyConfiguration) -> bool:
    """kube-proxy reads the section of the mode in use; ipvs shares that of iptables."""
    return (config.nftables if config.mode == "nftables" else config.iptables).masquerade_all


def node_port_addresses(config: KubeProxyConfiguration) -> tuple[str, ...]:
    """As configured; a family without a word about it accepts them on all addresses, and localhost may be gated off."""
    found = config.node_port_addresses
    if family := uncovered_family(config):
        found = (*found, _EVERY[family])
    if not config.feature_gates.get(LOCALHOST_GATE, True):
        found = tuple(text for text in found if text != LOCALHOST and not _is_loopback(text))
    return found


def _is_loopback(text: str) -> bool:
    found = cidr(text)
    return found is not None and ipaddress.ip_address(found.address).is_loopback


def _node_address(config: KubeProxyConfiguration) -> str:
    address = parse_address(config.bind_address)
    return format_address(address) if any(address) else ""


def conntrack(config: KubeProxyConfiguration) -> Conntrack:
    """Periods in whole seconds."""
    wanted = config.conntrack
    established, close_wait = wanted.tcp_established_timeout, wanted.tcp_close_wait_timeout
    return Conntrack(
        max_per_core=wanted.max_per_core or 0,
        min=wanted.min or 0,
        tcp_established_seconds=established.seconds if established else 0,
        tcp_close_wait_seconds=close_wait.seconds if close_wait else 0,
        tcp_be_liberal=wanted.tcp_be_liberal,
        udp_seconds=wanted.udp_timeout.seconds,
        udp_stream_seconds=wanted.udp_stream_timeout.seconds,
    )
