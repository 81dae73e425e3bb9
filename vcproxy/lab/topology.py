"""The lab: nodes, pods and clients as network namespaces, joined by a fabric; all IPv4 and IPv6.

    with Lab("vcp-demo") as lab:
        acme = lab.overlay_tenant("acme", vni=100)
        one, two = lab.node("one"), lab.node("two")
        client = one.overlay_pod(acme, "client", "10.244.0.2", "fd00:244::2")
        web = two.overlay_pod(acme, "web", "10.244.0.3", "fd00:244::3")
        lab.serve(web, tcp=[80], udp=[53])
        assert tcp_request(client, "10.244.0.3", 80).pod == "acme/web"

The machine's own network is not touched: everything, the fabric too, is in namespaces named PREFIX.PID.NUMBER.NAME, by
which the leftovers of a maker that was killed can be told from the labs of the living. `wiring` says how things are
connected, and why so.

A lab is built from one thread. Dialling (`vcproxy.lab.dial`) is for any number of threads.
"""

from __future__ import annotations

import ipaddress
import itertools
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from vcproxy.lab import netns, wiring
from vcproxy.lab.errors import LabError, LabUnavailable
from vcproxy.lab.iproute import bridge, ip
from vcproxy.lab.servers import Servers

_SERIALS = itertools.count()  # labs of this process
_GRACE = 5.0  # seconds for a node's process to end by itself
_TOOLS = {"ip": "iproute2", "bridge": "iproute2", "nft": "nftables"}  # and the package that has it
_CAPABILITIES = {12: "CAP_NET_ADMIN", 21: "CAP_SYS_ADMIN"}  # <linux/capability.h>


def require_root() -> None:
    """Raise `LabUnavailable`, with the cure, unless this process can make a lab: root with its capabilities, the tools,
    IPv6.
    """
    if os.geteuid() != 0:
        raise LabUnavailable("network namespaces need root; run it again with sudo")
    status = Path("/proc/self/status").read_text()
    effective = int(re.findall(r"^CapEff:\s*(\w+)$", status, re.MULTILINE)[0], 16)
    if missing := [name for bit, name in _CAPABILITIES.items() if not effective >> bit & 1]:
        raise LabUnavailable(f"{' and '.join(missing)} not granted; in a container, run it with --privileged")
    for tool, package in _TOOLS.items():
        if shutil.which(tool) is None:
            raise LabUnavailable(f"`{tool}` is not installed; install the package {package}")
    if not Path("/proc/sys/net/ipv6").exists():
        raise LabUnavailable("the kernel has no IPv6; boot without ipv6.disable=1")
    if not os.access("/proc/sys/net/ipv4/ip_forward", os.W_OK):
        raise LabUnavailable("/proc/sys is read-only; in a container, run it with --privileged")


@dataclass(frozen=True, kw_only=True)
class Pod:
    """A pod. `name` is "TENANT/NAME" in an overlay, and as given in the flat network."""

    name: str
    ns: str
    ip4: str
    ip6: str
    node: str
    device: str
    """The node's end of its link, which the node sees as the input device of the pod's packets."""
    tenant: str | None
    """The overlay tenant, None for a flat pod."""


@dataclass(frozen=True, kw_only=True)
class Client:
    """A machine on the fabric that is no node."""

    name: str
    ns: str
    ip4: str
    ip6: str


@dataclass(frozen=True, kw_only=True)
class Tenant:
    """A tenant with a network of its own on every node where it has pods."""

    name: str
    vni: int
    overlay: wiring.Overlay

    @property
    def interfaces(self) -> tuple[str, str]:
        """Globs of its devices on any node, for a NodeConfiguration: `attachments: [{interface: {tenant: NAME, names:
        [...]}}]`.
        """
        return self.overlay.interfaces


@dataclass(frozen=True, kw_only=True)
class Node:
    """A node: forwards between its pods and the fabric, and is the place for node agents and nft."""

    name: str
    ns: str
    ip4: str
    ip6: str
    pod_cidr4: str
    pod_cidr6: str
    """The flat pods' addresses come from here. Overlay pods' may be any."""
    vtep: wiring.Vtep = field(repr=False)
    lab: Lab = field(repr=False, compare=False)

    def flat_pod(self, name: str, ip4: str, ip6: str) -> Pod:
        """A pod in the flat network, addresses unique in the lab and within the node's pod CIDRs. `name` may have a
        slash ("acme/web-1").
        """
        return self.lab._add_pod(self, None, name, ip4, ip6)

    def overlay_pod(self, tenant: Tenant, name: str, ip4: str, ip6: str) -> Pod:
        """A pod of an overlay tenant, addresses unique within the tenant only."""
        return self.lab._add_pod(self, tenant, name, ip4, ip6)

    def run(
        self, argv: Sequence[str | os.PathLike[str]], *, stdin: str = "", check: bool = True, timeout: float = 30.0
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on the node to its end, as `netns.run` does: `node.run(["nft", "-f", "-"], stdin=ruleset)`."""
        return netns.run(self.ns, argv, stdin=stdin, check=check, timeout=timeout)

    def spawn(
        self,
        argv: Sequence[str | os.PathLike[str]],
        *,
        stdout: int | IO[Any] | None = None,
        stderr: int | IO[Any] | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start a process on the node, such as a node agent. It gets SIGTERM when the lab closes, if it still runs."""
        process = netns.spawn(self.ns, argv, stdout=stdout, stderr=stderr)
        self.lab._processes.append(process)
        return process


class Lab:
    """A data centre in namespaces. Entering it sweeps what dead runs with the same prefix left; leaving it, in whatever
    way, removes everything.

    `prefix`: small letters, digits and dashes; choose one per purpose ("vcp-demo"). Raises `LabUnavailable` on a
    machine that cannot hold a lab.
    """

    def __init__(self, prefix: str) -> None:
        _check_prefix(prefix)
        self.prefix = prefix
        self._scope = f"{prefix}.{os.getpid()}.{next(_SERIALS)}"
        self._cleanup = ExitStack()
        self._servers = Servers()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._namespaces: list[str] = []
        self._fabric = wiring.Fabric(
            ns=f"{self._scope}.fabric", gateway4="192.168.77.1", gateway6="fd77::1", length4=24, length6=64
        )
        self._ports = itertools.count(1)
        self._nodes: list[Node] = []
        self._tenants: dict[str, Tenant] = {}
        self._members: dict[str, list[Node]] = {}
        self._pods: list[Pod] = []

    def __enter__(self) -> Lab:
        require_root()
        Lab.sweep(self.prefix)
        with ExitStack() as undo:  # __exit__ is not called for a failed __enter__
            undo.callback(self._remove_namespaces)
            undo.enter_context(self._servers)
            undo.callback(self._end_processes)
            self._make("fabric")
            netns.sysctl(self._fabric.ns, wiring.ROUTER_SYSCTLS)
            ip(self._fabric.build(), ns=self._fabric.ns)
            self._cleanup = undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cleanup.close()

    @staticmethod
    def sweep(prefix: str) -> list[str]:
        """Remove the namespaces, and the processes in them, of labs with this prefix whose makers are dead; returns
        their names.
        """
        _check_prefix(prefix)
        found = re.compile(rf"{re.escape(prefix)}\.(\d+)\.\d+\..+")
        dead = [
            name for name in netns.names() if (match := found.fullmatch(name)) and not Path("/proc", match[1]).exists()
        ]
        for pid in itertools.chain.from_iterable(map(netns.pids, dead)):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        netns.delete(*dead)
        return dead

    def node(self, name: str, ip4: str | None = None, ip6: str | None = None) -> Node:
        """A node on the fabric; the n-th gets 192.168.77.(10+n) and fd77::(10+n), pod CIDRs 10.200.n.0/24 and
        fd00:200:0:n::/64.
        """
        number = len(self._nodes) + 1
        uplink = self._plug(
            name, wiring.NODE_SYSCTLS, ip4 or f"192.168.77.{10 + number}", ip6 or f"fd77::{10 + number}"
        )
        node = Node(
            name=name,
            ns=uplink.ns,
            ip4=uplink.ip4,
            ip6=uplink.ip6,
            pod_cidr4=f"10.200.{number}.0/24",
            pod_cidr6=f"fd00:200:0:{number:x}::/64",
            vtep=wiring.Vtep(number=number, ip4=uplink.ip4, ip6=uplink.ip6),
            lab=self,
        )
        ip([*self._fabric.accept(uplink), *_route_to(node)], ns=self._fabric.ns)
        ip([line for other in self._nodes for line in _route_to(other)], ns=node.ns)
        for other in self._nodes:
            ip(_route_to(node), ns=other.ns)
        self._nodes.append(node)
        return node

    def client(self, name: str, ip4: str, ip6: str) -> Client:
        """A machine on the fabric outside the cluster, with addresses in 192.168.77.0/24 and fd77::/64. Reaches nodes
        and flat pods.
        """
        uplink = self._plug(name, wiring.HOST_SYSCTLS, ip4, ip6)
        ip(self._fabric.accept(uplink), ns=self._fabric.ns)
        return Client(name=name, ns=uplink.ns, ip4=ip4, ip6=ip6)

    def overlay_tenant(self, name: str, vni: int) -> Tenant:
        """A tenant with its own network. `name`: up to 8 small letters and digits, because device names have 15
        (IFNAMSIZ).
        """
        if not re.fullmatch(r"[a-z][a-z0-9]{0,7}", name):
            raise LabError(f"overlay tenant {name!r}: want 1 to 8 small letters and digits, a letter first")
        if name in self._tenants or vni in (tenant.vni for tenant in self._tenants.values()):
            raise LabError(f"overlay tenant {name!r}: name or VNI {vni} is taken")
        overlay = wiring.Overlay(tenant=name, vni=vni, table=1001 + len(self._tenants))
        self._tenants[name] = Tenant(name=name, vni=vni, overlay=overlay)
        self._members[name] = []
        return self._tenants[name]

    def route(self, place: Node | Pod | Client, prefix: str, *, via: Node | Client) -> None:
        """Send what `place` has for a prefix, such as a load-balancer address, to a node or client. Both must be on the
        fabric.
        """
        ip([f"route replace {prefix} via {via.ip6 if ':' in prefix else via.ip4}"], ns=place.ns)

    def serve(
        self,
        place: Node | Pod | Client,
        *,
        tcp: Iterable[int] = (),
        udp: Iterable[int] = (),
        sctp: Iterable[int] = (),
        addresses: Iterable[str] = (),
    ) -> None:
        """Answer on these ports of the place's addresses with its name (see `server`). The ports are open when this
        returns. `addresses`: others that the place was given, in place of its own.
        """
        held = tuple(addresses) or (place.ip4, place.ip6)
        self._servers.serve(place.name, ns=place.ns, addresses=held, tcp=tcp, udp=udp, sctp=sctp)

    def stop_serving(self, place: Node | Pod | Client) -> None:
        """Close all ports of the place, and the connections to them."""
        self._servers.stop(place.name)

    def _make(self, name: str) -> str:
        if not re.fullmatch(r"[a-z0-9]([a-z0-9./-]{0,62}[a-z0-9])?", name):
            raise LabError(f"name {name!r}: want up to 64 of a-z, 0-9, dash, dot and slash, no punctuation at the ends")
        ns = f"{self._scope}.{name.replace('/', '.')}"
        if ns in self._namespaces:
            raise LabError(f"name {name!r} is taken")
        self._namespaces.append(ns)
        netns.create(ns)
        return ns

    def _plug(self, name: str, sysctls: wiring.Sysctls, ip4: str, ip6: str) -> wiring.Uplink:
        uplink = wiring.Uplink(ns=self._make(name), port=f"port{next(self._ports)}", ip4=ip4, ip6=ip6)
        netns.sysctl(uplink.ns, sysctls)
        ip(self._fabric.plug(uplink), ns=uplink.ns)
        return uplink

    def _add_pod(self, node: Node, tenant: Tenant | None, name: str, ip4: str, ip6: str) -> Pod:
        full_name = f"{tenant.name}/{name}" if tenant else name
        rivals = [pod for pod in self._pods if pod.tenant == (tenant.name if tenant else None)]
        for rival in rivals:
            if ip4 == rival.ip4 or ip6 == rival.ip6:
                raise LabError(f"pod {full_name}: {ip4} or {ip6} is the address of pod {rival.name}")
        if not tenant and not (_inside(ip4, node.pod_cidr4) and _inside(ip6, node.pod_cidr6)):
            raise LabError(
                f"pod {full_name}: want addresses in node {node.name}'s {node.pod_cidr4} and {node.pod_cidr6}"
            )
        number = 1 + sum(1 for pod in rivals if pod.node == node.name)
        device = tenant.overlay.pod_device(number) if tenant else f"veth{number:04x}"
        ns = self._make(full_name)
        mtu = wiring.OVERLAY_MTU if tenant else wiring.FLAT_MTU
        ip(wiring.pod(node_ns=node.ns, device=device, ip4=ip4, ip6=ip6, mtu=mtu), ns=ns)
        if tenant:
            self._join(node, tenant)
            self._attach(node, tenant, device, ip4, ip6)
        else:
            ip(wiring.pod_port(device=device, ip4=ip4, ip6=ip6), ns=node.ns)
        pod = Pod(
            name=full_name,
            ns=ns,
            ip4=ip4,
            ip6=ip6,
            node=node.name,
            device=device,
            tenant=tenant.name if tenant else None,
        )
        self._pods.append(pod)
        return pod

    def _attach(self, node: Node, tenant: Tenant, device: str, ip4: str, ip6: str) -> None:
        overlay = tenant.overlay
        rules = overlay.device_rules(device)
        ip([*wiring.pod_port(device=device, ip4=ip4, ip6=ip6, table=overlay.table), *rules], ns=node.ns)
        ip(rules, ns=node.ns, family=6)
        for other in self._members[tenant.name]:
            if other is not node:
                ip(overlay.behind(node.vtep, ip4=ip4, ip6=ip6), ns=other.ns)

    def _join(self, node: Node, tenant: Tenant) -> None:
        """The tenant's first pod on this node: connect the node with the tenant's other nodes and the pods there."""
        overlay, members = tenant.overlay, self._members[tenant.name]
        if node in members:
            return
        rules = overlay.device_rules(overlay.vxlan)
        ip([*overlay.join(node.vtep), *rules, *overlay.reply_rules(family=4)], ns=node.ns)
        ip([*rules, *overlay.reply_rules(family=6)], ns=node.ns, family=6)
        node.run(["nft", "-f", "-"], stdin=overlay.mark_rules())
        for here, there in itertools.chain.from_iterable(((node, other), (other, node)) for other in members):
            bridge(overlay.peer_forwarding(there.vtep), ns=here.ns)
            ip(overlay.peer(there.vtep), ns=here.ns)
        ip(list(self._routes_to_members(tenant)), ns=node.ns)
        members.append(node)

    def _routes_to_members(self, tenant: Tenant) -> Iterator[str]:
        vteps = {node.name: node.vtep for node in self._members[tenant.name]}
        for pod in self._pods:
            if pod.tenant == tenant.name:
                yield from tenant.overlay.behind(vteps[pod.node], ip4=pod.ip4, ip6=pod.ip6)

    def _end_processes(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.terminate()
        for process in self._processes:
            try:
                process.wait(_GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _remove_namespaces(self) -> None:
        netns.delete(*self._namespaces)


def _route_to(node: Node) -> list[str]:
    return wiring.flat_route(cidr4=node.pod_cidr4, cidr6=node.pod_cidr6, ip4=node.ip4, ip6=node.ip6)


def _inside(address: str, cidr: str) -> bool:
    return ipaddress.ip_address(address) in ipaddress.ip_network(cidr)


def _check_prefix(prefix: str) -> None:
    # No dots: they separate the parts of a namespace's name, and one prefix must never match into another's.
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,31}", prefix):
        raise LabError(f"lab prefix {prefix!r}: want up to 32 small letters, digits and dashes")
