"""What a Service costs a connection. `python -m benchmarks datapath`.

From a pod to an endpoint on another node, directly and through a ClusterIP in turns, so that whatever else the machine
does hits both alike: connect(2), SYN sent to SYN-ACK received, which shows what the first packet pays; and whole
connections (connect, a few octets each way, close), one after the other, of which a second has so many. The table is
filled with other Services (and other tenants') in between: a ruleset whose size does not depend on them must not get
slower. kube-proxy's node stands beside ours with the same endpoint behind it, and a third has no proxy: what a
connection to no Service at all pays for one being there is the difference of the columns "direct".
"""

import random
import socket
import statistics
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.table import Table

from e2e import churn, nodes, objects
from e2e.controlplane import ControlPlane, find_binaries
from e2e.polling import eventually
from vcproxy.backend.protocol import Attachments, NodeState, TenantUpdate
from vcproxy.lab import Lab, Node, Pod, Reply, netns, tcp_request
from vcproxy.model.addresses import parse_address, parse_prefix
from vcproxy.model.forwarding import Action, ForwardedFrontend, ForwardedPort, Masquerade
from vcproxy.model.services import FrontendKind, PortKey, Protocol
from vcproxy_nftables import NftablesBackend

ROUNDS = 4_000
VIP, PORT = "10.32.255.1", 8080
SIZES = ((1, 1), (1_000, 1), (10_000, 1), (100_000, 1), (100_000, 1_000))
"""Services and tenants."""
PEER_SERVICES = 1_000
RANGES = (parse_prefix("10.32.0.0/16"), parse_prefix("10.64.0.0/12"))
_LINGER = struct.pack("ii", 1, 0)


def report(show: Callable[[Any], None]) -> None:
    """Direct, through vcproxy at each size, through kube-proxy; one table."""
    drawn = Table(title=f"connections to a pod on another node, medians of {ROUNDS:,}, in turns with direct ones")
    for heading in ("proxy", "services", "tenants"):
        drawn.add_column(heading, justify="left" if heading == "proxy" else "right")
    for kind in ("connect", "whole"):
        for heading in (f"{kind}: direct", "ClusterIP", "price" if kind == "connect" else "a second, of direct"):
            drawn.add_column(heading, justify="right")
    with Lab("vcp-path") as lab:
        one, two, three = lab.node("one"), lab.node("two"), lab.node("three")
        four = lab.node("four")
        ours, theirs, bare = (
            node.flat_pod(f"client-{node.name}", f"10.200.{number}.2", f"fd00:200:0:{number}::2")
            for number, node in ((1, one), (2, two), (4, four))
        )
        web = three.flat_pod("web", "10.200.3.2", "fd00:200:0:3::2")
        lab.serve(web, tcp=[PORT])
        alone = [f"{measured(bare, way, (web.ip4, PORT))[0] * 1e6:.1f} us" for way in (connect, whole)]
        drawn.add_row("none", "", "", alone[0], "", "", alone[1], "", "")
        with netns.entered(one.ns):
            backend = NftablesBackend({})
            backend.open()
        try:
            fill(one, backend, [service(VIP, web)], complete=True)
            held = 1
            for services, tenants in SIZES:
                if tenants > 1:
                    spread(one, backend, tenants)
                else:
                    fill(one, backend, [other(number) for number in range(held, services)])
                    held = services
                row(drawn, "vcproxy", services, tenants, ours, web)
        finally:
            with netns.entered(one.ns):
                backend.cleanup()
        with kube_proxy(two, web):
            row(drawn, "kube-proxy", PEER_SERVICES, 1, theirs, web)
    show(drawn)


def row(drawn: Table, name: str, services: int, tenants: int, client: Pod, web: Pod) -> None:
    """Measure, and one line of the table."""
    direct, through = measured(client, connect, (web.ip4, PORT), (VIP, 80))
    direct_whole, through_whole = measured(client, whole, (web.ip4, PORT), (VIP, 80))
    drawn.add_row(
        name,
        f"{services:,}",
        f"{tenants:,}",
        f"{direct * 1e6:.1f} us",
        f"{through * 1e6:.1f} us",
        f"{(through - direct) * 1e6:+.1f} us",
        f"{direct_whole * 1e6:.1f} us",
        f"{through_whole * 1e6:.1f} us",
        f"{direct_whole / through_whole:.1%}",
    )


Way = Callable[[tuple[str, int]], float]


def measured(client: Pod, way: Way, *targets: tuple[str, int]) -> list[float]:
    """Median seconds of a way to connect, to each target; in turns."""
    seconds: list[list[float]] = [[] for _ in targets]
    with netns.entered(client.ns):
        for _ in range(ROUNDS):
            for target, taken in zip(targets, seconds, strict=True):
                taken.append(way(target))
    return [statistics.median(taken) for taken in seconds]


def connect(target: tuple[str, int]) -> float:
    """Seconds that connect(2) takes."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER)
        began = time.perf_counter()
        sock.connect(target)
        return time.perf_counter() - began


def whole(target: tuple[str, int]) -> float:
    """Seconds that a connection takes, with a question and an answer."""
    began = time.perf_counter()
    with socket.socket() as sock:
        sock.connect(target)
        sock.sendall(b"x\n")
        sock.recv(64)
    return time.perf_counter() - began


def service(address: str, web: Pod, *, name: str = "web") -> ForwardedPort:
    """A Service of one endpoint."""
    dialled = ForwardedFrontend(
        FrontendKind.CLUSTER_IP, parse_address(address), 80, Action.CLUSTER, Action.CLUSTER, Masquerade.NONLOCAL
    )
    target = parse_address(web.ip4) + PORT.to_bytes(2, "big")
    return ForwardedPort(PortKey("default", name, "http", Protocol.TCP), (dialled,), cluster4=target)


def other(number: int) -> ForwardedPort:
    """One of the Services beside it, of ten endpoints."""
    address = bytes((10, 64 + (number >> 16), number >> 8 & 255, number & 255))
    targets = b"".join(
        bytes((10, 128 + (number >> 12), number >> 4 & 255, (number & 15) << 4 | index, 0, 80)) for index in range(10)
    )
    dialled = ForwardedFrontend(
        FrontendKind.CLUSTER_IP, address, 80, Action.CLUSTER, Action.CLUSTER, Masquerade.NONLOCAL
    )
    return ForwardedPort(PortKey("default", f"svc-{number}", "http", Protocol.TCP), (dialled,), cluster4=targets)


def fill(
    node: Node, backend: NftablesBackend, ports: list[ForwardedPort], *, uid: str = "super", complete: bool = False
) -> None:
    """Program ports on a node, with the ServiceCIDRs that they are from."""
    with netns.entered(node.ns):
        if complete:
            sources = tuple(parse_prefix(cidr) for cidr in churn.CLUSTER_CIDR.split(","))
            backend.set_node(NodeState(node_addresses=(parse_address(node.ip4),), local_sources=sources))
        backend.apply(TenantUpdate(uid, put=tuple(ports), complete=complete, virtual_ranges=RANGES))


def spread(node: Node, backend: NftablesBackend, tenants: int) -> None:
    """A hundred Services for each of so many tenants, all with the same addresses."""
    with netns.entered(node.ns):
        uids = [f"tenant-{number}" for number in range(tenants)]
        backend.attach(Attachments(interfaces={f"vx-{number}": uid for number, uid in enumerate(uids)}))
    for uid in uids:
        fill(node, backend, [other(number) for number in range(100)], uid=uid)


@contextmanager
def kube_proxy(node: Node, web: Pod) -> Iterator[None]:
    """The real one on a node, with the same Service and PEER_SERVICES in all."""
    with (
        tempfile.TemporaryDirectory(prefix="vcproxy-bench-") as directory,
        ControlPlane("path", Path(directory) / "plane", bin_dir=find_binaries(build=False)) as plane,
        nodes.relay(node, plane),
    ):
        api, chance = plane.client, random.Random(1)
        api.create(objects.namespace("path"))
        nodes.register(api, node)
        names = {f"svc-{number}": churn.address(number) for number in range(PEER_SERVICES - 1)}
        port = objects.service_port(80, name="http", target=PORT)
        api.create_all(
            objects.service(name, namespace="path", ports=[port], cluster_ips=[address])
            for name, address in (names | {"web": VIP}).items()
        )
        for name in (*names, "web"):
            pods = [web.ip4] if name == "web" else [f"10.128.{chance.randrange(256)}.{index}" for index in range(1, 11)]
            api.create(
                objects.endpoint_slice(
                    name,
                    service=name,
                    namespace="path",
                    endpoints=[objects.endpoint(ip, node="three") for ip in pods],
                    ports=[objects.slice_port(PORT, name="http")],
                )
            )
        command = churn.kube_proxy(plane, node, Path(directory))
        process = nodes.daemon(node, "kube-proxy", command, Path(directory))
        process.start()
        try:
            eventually(
                lambda: isinstance(tcp_request(node, VIP, 80, timeout=0.2), Reply), within=60, what="kube-proxy serves"
            )
            yield
        finally:
            process.terminate()
            process.wait(grace=10)
