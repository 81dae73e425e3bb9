"""Who proxies Services on the nodes.

vcproxy or kube-proxy as a daemon of each node, with the arguments that kubeadm's DaemonSet gives: both get the same
configuration file and read the cluster as system:kube-proxy, so that neither gets by on rights or settings that the other
has not. Or vcproxy from deploy/, see `deployed`.
"""

import http.client
import sys
from pathlib import Path

import yaml

from e2e.cluster.addresses import POD_CIDRS
from e2e.cluster.node import Node
from e2e.polling import eventually
from vcproxy.lab import netns

DAEMONS = ("vcproxy", "kube-proxy")
DEPLOYED = ("run", "split")
"""deploy/run.yaml; deploy/brain.yaml with deploy/node.yaml."""
PROXIES = (*DAEMONS, *DEPLOYED, "none")
HEALTH_PORT = 10256
_START_WITHIN = 60.0


def start(proxy: str, node: Node, *, kubeconfig: Path, kube_proxy: Path) -> None:
    """Start a node's proxy; it is not ready when this returns."""
    config = node.machine.directory / "kube-proxy.yaml"
    config.write_text(yaml.safe_dump(_configuration(kubeconfig)))
    program = [sys.executable, "-m", "vcproxy", "run"] if proxy == "vcproxy" else [str(kube_proxy)]
    node.machine.start("proxy", [*program, f"--config={config}", f"--hostname-override={node.name}"])


def wait_until_ready(node: Node) -> None:
    """Wait until the node's proxy says that it is healthy: everything that it has read is programmed."""

    def healthy() -> bool:
        node.machine.check("proxy")
        return _get(node, "/healthz") == 200

    try:
        eventually(healthy, within=_START_WITHIN, every=0.1)
    except TimeoutError:
        raise TimeoutError(f"the proxy of {node.name} is not healthy; {node.machine.tail('proxy')}") from None


def _get(node: Node, path: str) -> int:
    connection = http.client.HTTPConnection(node.addresses.addresses[0], HEALTH_PORT, timeout=2)
    try:
        with netns.entered(node.machine.ns):
            connection.connect()
        connection.request("GET", path)
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return 0
    finally:
        connection.close()


def _configuration(kubeconfig: Path) -> dict[str, object]:
    """kubeadm's configuration, in nftables mode and with NodePorts on localhost, which tests ask for and kube-proxy has
    behind a gate. Sysctls of the whole machine are left alone (they are the host's).
    """
    return {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": "nftables",
        "featureGates": {"KubeProxyNFTablesLocalhostNodePorts": True},
        "nodePortAddresses": ["primary", "localhost"],
        "clusterCIDR": ",".join(POD_CIDRS),
        "clientConnection": {"kubeconfig": str(kubeconfig)},
        "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "24h", "tcpCloseWaitTimeout": "1h"},
        "oomScoreAdj": 0,
    }
