"""The whole product in the lab, for tests: a brain, two node agents, tenants as folders of manifests, real packets.

A `Site` has the same pods in every tenant: a client and an endpoint on node `one`, a client and two endpoints on node
`two`. Overlay tenants share all their addresses; flat tenants share ClusterIPs only. Where pods run is told by Pod
manifests. `publish` returns when the kernel of every node has what it says: no test ever waits for a fixed time.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.packets.programmed import flows
from vcproxy.lab import Lab, Outcome, Pod, Reply, TcpSession, Tenant, tcp_request, udp_request
from vcproxy.lab.cluster import Cluster, endpoint_slice, service
from vcproxy.lab.dial import Place

PREFIX = "vcp-sys"
TARGET = 8080
PORTS = (("http", "TCP", 80, TARGET), ("ask", "UDP", 80, TARGET))
VIP = {4: "10.96.0.10", 6: "fd00:96::10"}
NODES = ("one", "two")
REQUESTS: dict[str, Callable[..., Outcome]] = {"tcp": tcp_request, "udp": udp_request}
# Name -> node and the last part of both addresses, the same in every tenant.
PODS = {"client-one": ("one", 10), "web-1": ("one", 11), "client-two": ("two", 20), "web-2": ("two", 21), "web-3": ("two", 22)}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Web:
    """A Service and its endpoints: names of pods of PODS."""

    pods: Sequence[str] = ()
    name: str = "web"
    ips: tuple[str, str] = (VIP[4], VIP[6])
    ports: Sequence[tuple[str, str, int, int]] = PORTS
    spec: Mapping[str, Any] = field(default_factory=dict)

    @property
    def frontends(self) -> set[tuple[str, str]]:
        """Protocol and address, as `get frontends` has them."""
        return {(protocol, text(ip, number)) for ip in self.ips for _, protocol, number, _ in self.ports}

    @property
    def affinity(self) -> int | None:
        """Seconds of its session affinity."""
        seconds: int | None = self.spec.get("sessionAffinityConfig", {}).get("clientIP", {}).get("timeoutSeconds")
        return seconds


class Site:
    """See the module. `pods`: by "TENANT/NAME"."""

    def __init__(self, lab: Lab, cluster: Cluster) -> None:
        self.lab = lab
        self.cluster = cluster
        self.nodes = {name: lab.node(name) for name in NODES}
        self.overlays: dict[str, Tenant] = {}
        self.pods: dict[str, Pod] = {}

    def add_overlay(self, name: str, pods: Sequence[str] = tuple(PODS)) -> None:
        """A tenant with a network of its own, and its pods, whose addresses are those of any other's."""
        tenant = self.overlays[name] = self.lab.overlay_tenant(name, vni=100 + len(self.overlays))
        for pod in pods:
            node, last = PODS[pod]
            self._serve(self.nodes[node].overlay_pod(tenant, pod, f"10.244.0.{last}", f"fd00:244::{last}"))
        self.tell_pods(name)

    def add_flat(self, name: str, number: int) -> None:
        """A tenant on the shared network; `number` keeps its pods' addresses from other tenants'."""
        for pod, (node, last) in PODS.items():
            network = NODES.index(node) + 1
            unique = number * 40 + last
            ip4, ip6 = f"10.200.{network}.{unique}", f"fd00:200:0:{network}::{unique}"
            self._serve(self.nodes[node].flat_pod(f"{name}/{pod}", ip4, ip6))
        self.tell_pods(name)

    def start(self) -> None:
        """Brain and agents; returns when every tenant is in both kernels."""
        self.cluster.start_brain()
        for node in self.nodes.values():
            self.cluster.start_agent(node, self.overlays.values())
        for tenant in {name.partition("/")[0] for name in self.pods}:
            self.committed(tenant)

    def committed(self, tenant: str, nodes: Sequence[str] = NODES) -> None:
        """Wait until these nodes' kernels have the brain's newest."""
        for node in nodes:
            self.cluster.wait_committed(node, f"dir-{tenant}")

    def write(self, tenant: str, *webs: Web) -> float:
        """Make these the Services of a tenant, without waiting. Slices stay when they are empty: an object that is
        missing from its folder is gone a second later only.
        """
        return self.cluster.apply(
            tenant, "services", list(itertools.chain.from_iterable(map(self._objects(tenant), webs)))
        )

    def publish(self, tenant: str, *webs: Web, nodes: Sequence[str] = NODES) -> None:
        """Make these the Services of a tenant, and wait until the brain and these nodes' kernels have them."""
        self.write(tenant, *webs)
        uid = f"dir-{tenant}"
        frontends = set[tuple[str, str]]().union(*(web.frontends for web in webs))
        targets = {
            (web.name, protocol, text(ip, target))
            for web in webs
            for name in web.pods
            for ip in (self.pods[f"{tenant}/{name}"].ip4, self.pods[f"{tenant}/{name}"].ip6)
            for _, protocol, _, target in web.ports
        }
        affinity = {web.name: web.affinity for web in webs}

        def compiled() -> bool:
            told = {(row["protocol"], row["frontend"]) for row in self.cluster.ask("brain", "/frontends", tenant=uid)}
            rows = self.cluster.ask("brain", "/endpoints", tenant=uid)
            if affinity != {
                row["service"]: row["affinitySeconds"] for row in self.cluster.ask("brain", "/services", tenant=uid)
            }:
                return False
            return told == frontends and targets == {(row["service"], row["protocol"], row["endpoint"]) for row in rows}

        self.cluster.wait(f"the brain has {tenant}'s Services", compiled)
        self.committed(tenant, nodes)

    def remove(self, tenant: str) -> None:
        """Take the tenant's folder away, without waiting."""
        shutil.rmtree(self.cluster.tenants / tenant)

    def counters(self) -> dict[str, Mapping[str, int]]:
        """Each node's counters of this run of its agent."""
        return {node: self.cluster.ask(node)["counters"] for node in NODES}

    def answered(
        self, tenant: str, client: str, protocol: str, address: str, port: int = 80, *, times: int = 20
    ) -> set[str | Outcome]:
        """Who answers a client, or what happened instead. Twenty requests meet each of two endpoints all but one in
        2^19 times; where refusals are counted make it fewer: Linux sends 50 ICMP errors at a time (icmp_msgs_burst).
        """
        request, place = REQUESTS[protocol], self.pods[f"{tenant}/{client}"]
        return {who(request(place, address, port)) for _ in range(times)}

    def session(self, tenant: str, client: str = "client-one", address: str = VIP[4], **how: Any) -> TcpSession:
        """A connection to hold on to."""
        return TcpSession(self.pods[f"{tenant}/{client}"], address, 80, **how)

    def nft(self, node: str, *words: str, stdin: str = "") -> str:
        """nft on a node."""
        return self.nodes[node].run(["nft", *words], stdin=stdin).stdout

    def elements(self, node: str, kind: str, name: str) -> list[Any]:
        """The elements of a map or set as `nft -j` has them."""
        listed = json.loads(self.nft(node, "-j", "list", kind, "inet", "vcproxy", name))["nftables"]
        found: list[Any] = next(entry[kind] for entry in listed if kind in entry).get("elem", [])
        return found

    def zone(self, node: str, tenant: str) -> int | None:
        """The conntrack zone of a tenant on a node; None: it has none."""
        for element in self.elements(node, "set", "tenants"):
            if element["elem"]["comment"] == f"dir-{tenant}":
                return int(element["elem"]["val"])
        return None

    def flows(self, node: str, zone: int) -> list[str]:
        """See programmed.flows."""
        return flows(self.nodes[node], zone)

    def forget_flows(self, node: str, zone: int) -> None:
        """Delete the connections in a zone: a client's port is taken again sooner than UDP's are forgotten."""
        for family in ("ipv4", "ipv6"):
            self.nodes[node].run(["conntrack", "-D", "-f", family, "-w", str(zone)], check=False)

    def connected(self) -> None:
        """Wait until both agents are with a brain."""
        self.cluster.wait("the agents are connected", lambda: all(self.cluster.ask(name)["brain"] for name in NODES))

    def kernel_state(self, node: str) -> str:
        """The table without what the packet path writes, to compare."""
        listed = json.loads(self.nft(node, "-j", "list", "table", "inet", "vcproxy"))["nftables"]
        skip = ("affinity4", "affinity6")
        rows = [
            entry for entry in listed if next(iter(entry.values())).get("name") not in skip and "metainfo" not in entry
        ]
        for entry in rows:
            for thing in entry.values():
                thing.pop("handle", None)
                if "elem" in thing:
                    thing["elem"].sort(key=json.dumps)
        return "\n".join(sorted(json.dumps(entry, sort_keys=True) for entry in rows))

    @contextlib.contextmanager
    def watched(self, node: str) -> Iterator[list[str]]:
        """The lines of `nft -n monitor` about our table that the body caused, complete when the context has ended.

        Tables made by hand before and behind mark the ends: the kernel tells changes in order.
        """
        lines: list[str] = []
        with tempfile.TemporaryFile() as output:
            process = self.nodes[node].spawn(["nft", "-n", "monitor"], stdout=output)
            try:
                self._mark(node, output.fileno(), "begin")
                yield lines
                told = self._mark(node, output.fileno(), "end")
                lines += [line for line in told.splitlines() if " inet vcproxy " in line]
            finally:
                process.terminate()
                process.wait()

    def _mark(self, node: str, output: int, name: str) -> str:
        """Make a table until the monitor has told of one; returns all it told."""
        told = ""
        for turn in range(200):
            self.nft(node, "add", "table", "inet", f"{name}{turn}")
            self.nft(node, "delete", "table", "inet", f"{name}{turn}")
            until = time.monotonic() + 0.05
            while time.monotonic() < until:
                told = Path(f"/proc/self/fd/{output}").read_text()
                if f" inet {name}" in told:
                    return told
                time.sleep(0.002)
        raise AssertionError(f"nft monitor on node {node} says nothing: {told[-500:]}")

    def _objects(self, tenant: str) -> Callable[[Web], list[dict[str, Any]]]:
        def objects(web: Web) -> list[dict[str, Any]]:
            pods = [self.pods[f"{tenant}/{name}"] for name in web.pods]
            ports = [(name, protocol, target) for name, protocol, _, target in web.ports]
            return [
                service(web.name, web.ips, web.ports, **web.spec),
                endpoint_slice(web.name, "IPv4", [(pod.ip4, pod.node) for pod in pods], ports),
                endpoint_slice(web.name, "IPv6", [(pod.ip6, pod.node) for pod in pods], ports),
            ]

        return objects

    def _serve(self, pod: Pod) -> None:
        self.pods[pod.name] = pod
        self.lab.serve(pod, tcp=[TARGET, TARGET + 1], udp=[TARGET, TARGET + 1])

    def tell_pods(self, tenant: str, without: Sequence[str] = ()) -> None:
        """The Pods of a tenant as manifests: where they run, and on the flat network whose address is whose."""
        hidden = {f"{tenant}/{name}" for name in without}
        mine = [pod for name, pod in self.pods.items() if name.startswith(f"{tenant}/") and name not in hidden]
        self.cluster.apply(tenant, "pods", [_pod(pod) for pod in mine])


def _pod(pod: Pod) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": pod.name.partition("/")[2], "namespace": "default"},
        "spec": {"nodeName": pod.node, "containers": []},
        "status": {"phase": "Running", "podIP": pod.ip4, "podIPs": [{"ip": pod.ip4}, {"ip": pod.ip6}]},
    }


def text(ip: str, port: int) -> str:
    """Address and port as the admin socket writes them."""
    return f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}"


def who(outcome: Outcome) -> str | Outcome:
    """The pod that answered, or what happened instead: one value that a failing test shows whole."""
    return outcome.pod if isinstance(outcome, Reply) else outcome


def eventually(ready: Callable[[], Any], timeout: float = 10.0) -> Any:
    """Poll until `ready` returns something true, and return that; after `timeout`, what it said last."""
    until = time.monotonic() + timeout
    while not (value := ready()) and time.monotonic() < until:
        time.sleep(0.01)
    return value


class Traffic:
    """Requests without pause from a thread, while the context is open. `outcomes`: how often each came."""

    def __init__(self, place: Place, address: str, *, request: Callable[..., Outcome] = tcp_request) -> None:
        self.outcomes: dict[str | Outcome, int] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(place, address, request), daemon=True)

    @property
    def count(self) -> int:
        """Requests so far."""
        return sum(self.outcomes.copy().values())

    def more(self, requests: int = 20) -> None:
        """Let this many more pass."""
        wanted = self.count + requests
        assert eventually(lambda: self.count >= wanted), f"only {self.outcomes}"

    def __enter__(self) -> Traffic:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self, place: Place, address: str, request: Callable[..., Outcome]) -> None:
        while not self._over.is_set():
            outcome = who(request(place, address, 80))
            self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1


@contextlib.contextmanager
def site(overlays: Sequence[str], flat: Sequence[str] = (), *, webs: Sequence[Web]) -> Iterator[Site]:
    """A running site in which each of the tenants has these Services."""
    with (
        tempfile.TemporaryDirectory(prefix=f"{PREFIX}-") as directory,
        Lab(PREFIX) as lab,
        Cluster(Path(directory)) as cluster,
    ):
        made = Site(lab, cluster)
        for name in overlays:
            made.add_overlay(name)
        for number, name in enumerate(flat):
            made.add_flat(name, number)
        for name in (*overlays, *flat):
            made.write(name, *webs)
        made.start()
        yield made
