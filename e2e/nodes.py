"""A node of the lab as one of a cluster: its Node object, its way to the API server, and daemons that run on it."""

import os
from collections.abc import Sequence
from pathlib import Path

from e2e import objects
from e2e.apiclient import ApiClient
from e2e.controlplane import ControlPlane
from e2e.processes import Process
from e2e.relay import Relay
from vcproxy.lab import Node, netns


def register(api: ApiClient, node: Node, *, zone: str | None = None) -> None:
    """Create the Node object, with the addresses and pod ranges that the node has."""
    api.create(objects.node(node.name, zone=zone, pod_cidrs=[node.pod_cidr4, node.pod_cidr6]))
    api.patch_status("Node", node.name, objects.node_status(node.ip4, node.ip6))


def relay(node: Node, plane: ControlPlane) -> Relay:
    """The plane's API server under its own URL, for the node; a context manager."""
    return Relay(node.ns, int(plane.url.rpartition(":")[2]))


def daemon(node: Node, name: str, command: Sequence[str], directory: Path) -> Process:
    """A command in the node's network namespace, not started; its home is the directory, and there its NAME.log."""
    inside = ["nsenter", f"--net={netns.DIRECTORY / node.ns}", "--", *command]
    environment = {"PATH": os.environ["PATH"], "HOME": str(directory), "PYTHONPATH": str(Path.cwd())}
    return Process(name, inside, log=directory / f"{name}.log", environment=environment)
