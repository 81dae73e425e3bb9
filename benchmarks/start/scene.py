"""The scene: one node without a proxy yet, pods on it and on a second one, and a real API server that is full.

The whole scene has a network of its own, and the node a plain veth to the API server: nothing of this benchmark carries
the bytes between them. Most Services have endpoints that nobody dials; filling.SAMPLE of them, spread evenly and with
the last one, have pods, so that "all is programmed" can be asked with packets.
"""

import ctypes
import os
import random
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.start import filling
from benchmarks.start.filling import Target
from e2e import nodes, objects
from e2e.apiclient import Answer
from e2e.controlplane import ControlPlane, find_binaries
from e2e.polling import eventually
from vcproxy.lab import Lab, Node, Pod, netns
from vcproxy.lab.iproute import ip

PODS = 10
PROBE, PROBE_VIP = "probe", "10.47.0.1"
_API, _NODE = "198.18.0.1", "198.18.0.2"  # RFC 2544: for benchmarks
_NEWNET = 0x40000000  # CLONE_NEWNET
_RESET = struct.pack("ii", 1, 0)
_SETTLED, _SETTLE_WITHIN = 0.05, 600.0
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass
class Scene:
    """What is measured in. `sample`: ClusterIPs that real pods are behind."""

    plane: ControlPlane
    node: Node
    client: Pod
    pods: Sequence[Pod]
    services: int
    endpoints: int
    chance: random.Random = field(default_factory=lambda: random.Random(1))

    @property
    def sample(self) -> list[str]:
        return [filling.vip(number) for number in filling.sampled(self.services)]

    def move_probe(self, turn: int) -> tuple[Answer, Pod]:
        """Give the probe's Service another endpoint; the API server's answer, and the pod that is to answer now."""
        pod = self.pods[turn % len(self.pods)]
        return self.plane.client.update(probe_slice(pod)), pod


def own_network() -> None:
    """This process leaves the machine's network for an empty one. Before it has any other thread."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_NEWNET):
        raise SystemExit(f"cannot make a network namespace: {os.strerror(ctypes.get_errno())}; run as root")
    ip(["link set lo up"])


@contextmanager
def scene(
    directory: Path, services: int, endpoints: int, told: Callable[[str], None], *, lean: bool = False
) -> Iterator[Scene]:
    """Build and fill it."""
    with Lab("vcp-start") as lab:
        one, two = lab.node("one"), lab.node("two")
        pods = [_pod(one if number < PODS // 3 else two, number) for number in range(PODS)]
        for pod in pods:
            lab.serve(pod, tcp=[filling.TARGET])
        client = one.flat_pod("client", "10.200.1.2", "fd00:200:0:1::2")
        ip([f"link add plane type veth peer name plane netns {one.ns}", f"address add {_API}/30 dev plane"])
        ip(["link set plane up"])
        ip([f"address add {_NODE}/30 dev plane", "link set plane up"], ns=one.ns)
        with ControlPlane(
            "start",
            directory / "plane",
            service_cidrs=filling.SERVICE_CIDRS,
            address=_API,
            bin_dir=find_binaries(build=False),
        ) as plane:
            found = Scene(plane, one, client, pods, services, endpoints)
            for node in (one, two):
                nodes.register(plane.client, node)
            plane.client.create(objects.namespace(filling.NAMESPACE))
            began = time.monotonic()
            targets = [Target(pod.ip4, pod.node) for pod in pods[:endpoints]]
            real = dict.fromkeys(filling.sampled(services), targets)

            def fill(etcd: str, kind: str) -> None:
                told(f"filling etcd: kind {kind} ({time.monotonic() - began:.0f} s)")
                filling.fill(etcd, kind, services, endpoints, real=real, lean=lean)

            with plane.behind_its_back() as etcd:
                fill(etcd, "IPAddress")
            fill(etcd, "Service")
            fill(etcd, "EndpointSlice")
            settle(plane)
            filling.verify(plane.client, services - 1, targets, lean=lean)
            port = objects.service_port(80, name="http", target=filling.TARGET)
            made = objects.service(PROBE, namespace=filling.NAMESPACE, ports=[port], cluster_ips=[PROBE_VIP])
            plane.client.create(made)
            plane.client.create(probe_slice(pods[0]))
            told(f"the API server is full and quiet ({time.monotonic() - began:.0f} s)")
            yield found


def probe_slice(pod: Pod) -> objects.Object:
    """The probe's only slice, with its only endpoint."""
    return objects.endpoint_slice(
        PROBE,
        service=PROBE,
        namespace=filling.NAMESPACE,
        endpoints=[objects.endpoint(pod.ip4, node=pod.node)],
        ports=[objects.slice_port(filling.TARGET, name="http")],
    )


def _pod(node: Node, number: int) -> Pod:
    at = 10 + number
    ip4, ip6 = node.pod_cidr4.replace("0/24", str(at)), node.pod_cidr6.replace("/64", f"{at:x}")
    return node.flat_pod(f"web-{number}", ip4, ip6)


def settle(plane: ControlPlane) -> None:
    """Wait until API server and etcd have nothing left to do."""

    def idle() -> bool:
        before = {pid: cpu(pid) for pid in plane.pids.values()}
        time.sleep(1)
        return sum(cpu(pid) - spent for pid, spent in before.items()) < 2 * _SETTLED

    eventually(idle, within=_SETTLE_WITHIN, what="the API server settles")


def cpu(pid: int) -> float:
    """Seconds of processor time of a process, to the nanosecond (clock_getcpuclockid(3)), and of children that it has
    waited for, in ticks."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return time.clock_gettime(~pid << 3 | 2) + sum(map(int, fields[13:15])) / TICKS


def dial(address: str, timeout: float) -> bytes:
    """Who answers at a ClusterIP, a line of JSON; empty if nobody does. In the calling thread's namespace."""
    with socket.socket() as sock:
        sock.settimeout(timeout)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        try:
            sock.connect((address, 80))
            return sock.recv(4096)
        except OSError:
            return b""


def dial_until(
    scene: Scene, address: str, wanted: bytes, *, timeout: float, within: float, check: Callable[[], None]
) -> float:
    """Dial until the answer has these octets; returns the monotonic time of it. `check`: called at each attempt."""
    deadline, began = time.monotonic() + within, time.monotonic()
    with netns.entered(scene.client.ns):
        while True:
            told = dial(address, timeout)
            now = time.monotonic()
            if told and wanted in told:
                return now
            check()
            if now > deadline:
                raise TimeoutError(f"{address} was not answered by {wanted.decode()!r} within {within:g} s")
            # Fine where it is short, and out of the way of those who take long.
            time.sleep(0.0002 if now - began < 0.1 else 0.002)
