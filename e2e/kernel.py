"""What is, and what should be: the table of a node read through `nft`, and the same facts computed from API objects.

Neither side uses vcproxy's code: `nft` decodes the kernel, and the rules of which endpoint counts are written out here.
"""

import json
from collections.abc import Mapping
from typing import Any

from e2e.apiclient import ApiClient
from vcproxy.lab import Node

Frontend = tuple[str, str, int]
"""Protocol in small letters, address, port."""
Target = tuple[str, int]
Forwarding = dict[Frontend, frozenset[Target]]

_POOL_NUMBER = 0xFFFFF
_DROP, _REJECT = 1, 2


def table(node: Node) -> dict[str, list[Any]]:
    """The elements of every map and set of a node's table, by name."""
    listed = json.loads(node.run(["nft", "-j", "list", "table", "inet", "vcproxy"]).stdout)["nftables"]
    return {
        found[kind]["name"]: found[kind].get("elem", []) for found in listed for kind in ("map", "set") if kind in found
    }


def zones(elements: Mapping[str, list[Any]]) -> dict[str, int]:
    """The conntrack zone of each tenant (uid)."""
    return {found["elem"]["comment"]: found["elem"]["val"] for found in elements["tenants"]}


def forwarding(node: Node, uid: str) -> Forwarding:
    """ClusterIP frontends of a tenant with the targets that the kernel would choose from; refused ones have none."""
    elements = table(node)
    zone = 0 if uid == "super" else zones(elements)[uid]
    found: Forwarding = {}
    for family in (4, 6):
        targets: dict[int, set[Target]] = {}
        for key, value in elements[f"endpoints{family}"]:
            targets.setdefault(_priority(key["concat"][0]), set()).add((value["concat"][0], value["concat"][1]))
        for protocol in ("tcp", "udp", "sctp"):
            for key, value in elements[f"{protocol}{family}_frontends"]:
                in_zone, address, port = key["concat"]
                pool = _priority(value)
                if in_zone == zone:
                    chosen = () if pool in (_DROP, _REJECT) else targets[pool & _POOL_NUMBER]
                    found[protocol, address, port] = frozenset(chosen)
    return found


def _priority(text: str) -> int:
    """nft's `major:minor` in hexadecimal, or `none` for 0."""
    if text == "none":
        return 0
    major, minor = text.split(":")
    return int(major or "0", 16) << 16 | int(minor or "0", 16)


def wanted(client: ApiClient) -> Forwarding:
    """The same for all ClusterIP Services of an API server, without traffic policies and topology."""
    slices = client.list("EndpointSlice").items
    found: Forwarding = {}
    for service in client.list("Service").items:
        meta, spec = service["metadata"], service["spec"]
        if spec.get("clusterIP") in (None, "", "None") or spec["type"] == "ExternalName":
            continue
        for address in spec["clusterIPs"]:
            family = "IPv6" if ":" in address else "IPv4"
            for port in spec["ports"]:
                ready, terminating = set(), set()
                for its_slice in slices:
                    labels = its_slice["metadata"].get("labels", {})
                    same = its_slice["metadata"]["namespace"] == meta["namespace"]
                    if not same or labels.get("kubernetes.io/service-name") != meta["name"]:
                        continue
                    if its_slice["addressType"] != family:
                        continue
                    for its_port in its_slice.get("ports") or []:
                        if (its_port.get("name") or "", its_port["protocol"]) != (
                            port.get("name") or "",
                            port["protocol"],
                        ):
                            continue
                        for endpoint in its_slice.get("endpoints") or []:
                            conditions = endpoint.get("conditions", {})
                            target = (endpoint["addresses"][0], its_port["port"])
                            if conditions.get("ready") is not False:
                                ready.add(target)
                            elif conditions.get("serving") and conditions.get("terminating"):
                                terminating.add(target)
                found[port["protocol"].lower(), address, port["port"]] = frozenset(ready or terminating)
    return found
