"""Pods of a cluster as the lab knows pods: places to dial from and to serve in.

Each is a pause container; who serves in it is the lab's own server (`vcproxy.lab.servers`), which can enter its network
namespace and needs nothing in its image.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from e2e import objects
from e2e.apiclient import Object
from e2e.cluster.cluster import Cluster
from e2e.cluster.node import PAUSE_IMAGE, Node
from e2e.polling import eventually
from vcproxy.lab import netns

_RUNNING_WITHIN = 60.0


@dataclass(frozen=True)
class Pod:
    """One pod. ns: its network namespace; addresses: one of each family, IPv4 first."""

    name: str
    ns: str
    addresses: tuple[str, ...]


def create(
    cluster: Cluster, name: str, node: Node, *, namespace: str = "default", labels: Mapping[str, str] | None = None
) -> Pod:
    """Run a pod on a node; returns when it has addresses."""
    wanted = objects.pod(name, namespace=namespace, node=node.name, labels=labels)
    wanted["spec"] |= {"containers": [{"name": "main", "image": PAUSE_IMAGE}], "terminationGracePeriodSeconds": 1}
    client = cluster.control.client
    client.create(wanted)
    status: Object = {}

    def runs() -> bool:
        status.update(client.get("Pod", name, namespace).object["status"])
        return status["phase"] == "Running" and "podIPs" in status

    eventually(runs, within=_RUNNING_WITHIN, every=0.1, what=f"a running pod {name}")
    addresses = tuple(entry["ip"] for entry in status["podIPs"])
    return Pod(name, _namespace(node, addresses[0]), addresses)


def _namespace(node: Node, address: str) -> str:
    """The network namespace with an address, among those that the node's network plugins made; as a path."""
    made = Path("/proc", str(node.machine.pid), "root/run/netns")
    for path in made.iterdir():
        if path.name.startswith("cni-"):
            told = netns.run(str(path), ["ip", "-json", "address"], check=False)
            links = json.loads(told.stdout) if told.returncode == 0 else []
            if any(entry["local"] == address for link in links for entry in link["addr_info"]):
                return str(path)
    raise LookupError(f"no network namespace on {node.name} has {address}")
