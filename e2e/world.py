"""The whole product on real control planes: a super cluster, tenants, two nodes, pods, a brain and node agents.

Every tenant, and the super cluster, has the same cast of pods (CAST). In an overlay tenant their addresses are those of
any other overlay tenant; on the flat network every pod has its own. Which pod is whose the super cluster says, by Pods
with a label, as the product wants it. All have the same range of ClusterIPs.

A tenant is followed from a real API server (its kubeconfig in the tenants' folder) or from a folder of manifests.
`converged` is how tests wait: until the kernel of every node has what the objects say, by the oracle of e2e.oracle.
"""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from e2e.controlplane import ControlPlane
from e2e.nodes import register
from e2e.objects import (
    Object,
    endpoint,
    endpoint_slice,
    namespace,
    pod,
    pod_status,
    service,
    service_port,
    slice_port,
)
from e2e.oracle import SUPER, Kernel, differences, wanted
from e2e.polling import eventually
from e2e.relay import Relay
from vcproxy.lab import Client, Lab, Node, Pod, Tenant
from vcproxy.lab.cluster import Cluster

CAST = {"client-one": "one", "web-1": "one", "client-two": "two", "web-2": "two", "web-3": "two"}
"""Pods of every tenant, and where they run."""
PORT, TARGET = 80, 8080
PORTS = (("http", "TCP", PORT, TARGET), ("ask", "UDP", PORT, TARGET))
"""Name, protocol, port and target port."""
TARGETS = (TARGET, TARGET + 1)
"""What every pod listens on, TCP and UDP."""
LABEL = "vcproxy.dev/tenant"
BRAIN = ("192.168.77.203", "fd77::203")
"""Addresses of the brain's machine, where it has one."""

_VIPS = itertools.count(10)

Ports = Sequence[tuple[str, str, int, int]]


def fresh_vips() -> tuple[str, str]:
    """ClusterIPs of both families that no test of this run has had, in the half that is not handed out by itself."""
    number = next(_VIPS)
    return f"10.32.0.{number}", f"fd00:32::{number:x}"


def web(
    name: str,
    vips: Sequence[str],
    pods: Iterable[Pod],
    *,
    namespace: str = "default",
    ports: Ports = PORTS,
    type: str = "ClusterIP",
    spec: Mapping[str, Any] | None = None,
) -> list[Object]:
    """A Service without selector and its EndpointSlices, one a family."""
    made = tuple(pods)
    named = [service_port(port, name=said, protocol=protocol, target=target) for said, protocol, port, target in ports]
    built = service(name, namespace=namespace, ports=named, type=type, cluster_ips=vips, spec=spec)
    return [built, *slices(name, made, namespace=namespace, ports=ports)]


def slices(name: str, pods: Iterable[Pod], *, namespace: str = "default", ports: Ports = PORTS) -> list[Object]:
    """The EndpointSlices of a Service, one a family: NAME-4 and NAME-6."""
    made = tuple(pods)
    return [
        endpoint_slice(
            f"{name}-{family[-1]}",
            service=name,
            namespace=namespace,
            endpoints=[endpoint(one.ip4 if family == "IPv4" else one.ip6, node=one.node) for one in made],
            ports=[slice_port(target, name=said, protocol=protocol) for said, protocol, _, target in ports],
            family=family,
        )
        for family in ("IPv4", "IPv6")
    ]


def uid_of(tenant: str) -> str:
    """The uid under which a tenant is known: of the super cluster, or of the tenants' folder."""
    return tenant if tenant == SUPER else f"dir-{tenant}"


class World:
    """See the module. `planes`: by tenant, SUPER among them. `nodes`: by their names in CAST."""

    def __init__(self, lab: Lab, cluster: Cluster, planes: Mapping[str, ControlPlane]) -> None:
        self.lab = lab
        self.cluster = cluster
        self.planes = dict(planes)
        self.manifests: dict[str, list[Object]] = {}
        """Of tenants without an API server."""
        tag = secrets.token_hex(2)  # worlds share a super cluster, and with it the names of Nodes
        self.nodes: dict[str, Node] = {name: lab.node(f"{name}-{tag}") for name in ("one", "two")}
        self.outside: Client = lab.client("outside", "192.168.77.200", "fd77::200")
        self.brain_ns = ""
        """Where a brain is that is apart."""
        self.relays: dict[str, Relay] = {}
        """By tenant, between that brain and API servers."""
        self.namespace = f"pods-{tag}"
        self.pods: dict[tuple[str, str], Pod] = {}
        self._overlays: list[Tenant] = []
        self._numbers: dict[str, Iterator[int]] = {name: itertools.count(2) for name in self.nodes}

    @property
    def super(self) -> ControlPlane:
        return self.planes[SUPER]

    def add_tenant(self, name: str, *, overlay: bool, plane: ControlPlane | None = None) -> None:
        """The pods of a tenant, before `start`. With a plane it is an API tenant, else a folder of manifests."""
        network = self.lab.overlay_tenant(name, vni=100 + len(self._overlays)) if overlay else None
        self._overlays += [network] if network else []
        for number, (role, where) in enumerate(CAST.items(), start=2):
            place = self.nodes[where]
            if network:
                made = place.overlay_pod(network, role, f"10.244.0.{number}", f"fd00:244::{number}")
            else:
                own = next(self._numbers[where])
                ip4, ip6 = place.pod_cidr4.replace("0/24", str(own)), place.pod_cidr6.replace("/64", f"{own:x}")
                made = place.flat_pod(f"{name}/{role}", ip4, ip6)
            self.lab.serve(made, tcp=TARGETS, udp=TARGETS)
            self.pods[name, role] = made
        if name == SUPER:
            return
        if plane is None:
            self.apply(name, [])
        else:
            self.planes[name] = plane
            self.give_kubeconfig(name, plane.kubeconfig)

    def start(self, **settings: Any) -> None:
        """Tell the super cluster of nodes and pods, start brain and agents, and wait until all kernels are right.

        `settings`: further fields of the NodeConfiguration.
        """
        self._tell_super()
        self.cluster.start_brain()
        for place in self.nodes.values():
            self.cluster.start_agent(place, self._overlays, **settings)
        self.converged(within=30)

    def apply(self, tenant: str, objects: Sequence[Object]) -> None:
        """Make these all objects of a tenant without API server."""
        self.manifests[tenant] = list(objects)
        if objects:
            self.cluster.apply(tenant, "objects", objects)
        else:  # an empty file says nothing (it may be half-written), a folder without files does
            folder = self.cluster.tenants / tenant
            folder.mkdir(exist_ok=True)
            (folder / "objects.yaml").unlink(missing_ok=True)

    def give_kubeconfig(self, tenant: str, file: Path) -> None:
        """Put a kubeconfig into the tenants' folder, in place of the tenant's last one."""
        part = self.cluster.tenants / f".{tenant}.part"
        part.write_text(file.read_text())
        part.rename(self.cluster.tenants / f"{tenant}.kubeconfig")

    def some(self, tenant: str, *roles: str) -> list[Pod]:
        """Pods of a tenant."""
        return [self.pods[tenant, role] for role in roles]

    def uid(self, tenant: str) -> str:
        """The uid under which a tenant is known."""
        return uid_of(tenant)

    # --- looking ------------------------------------------------------------------------------------------------------

    @property
    def tenants(self) -> list[str]:
        """All tenants, the super cluster among them."""
        return [*self.planes, *self.manifests]

    def kernel(self, place: str) -> Kernel:
        """What a node's kernel has."""
        return Kernel.read(self.nodes[place])

    def objects(self, tenant: str) -> tuple[list[Object], list[Object]]:
        """Services and EndpointSlices of a tenant, as its API server or its files have them now."""
        if tenant in self.manifests:
            held = self.manifests[tenant]
            found = [[item for item in held if item["kind"] == kind] for kind in ("Service", "EndpointSlice")]
            return found[0], found[1]
        client = self.planes[tenant].client
        return client.list("Service").items, client.list("EndpointSlice").items

    def disagreements(self, tenants: Iterable[str] = (), places: Iterable[str] = ()) -> list[str]:
        """Where the kernel of a node differs from what tenants' objects say, in words. Default: all of both."""
        found = []
        said = {tenant: self.objects(tenant) for tenant in tenants or self.tenants}
        for place in places or self.nodes:
            kernel, held = self.kernel(place), self.nodes[place]
            found += [f"{place}: {fault}" for fault in kernel.faults]
            for tenant, (services, endpoints) in said.items():
                want = wanted(services, endpoints, node=held.name, public=tenant == SUPER)
                have = kernel.forwarding.get(self.uid(tenant), {})
                found += [f"{place}: {tenant}: {difference}" for difference in differences(want, have)]
        return found

    def converged(self, *tenants: str, places: Iterable[str] = (), within: float = 15.0) -> None:
        """Wait until the kernels of these nodes have what these tenants' objects say. Default: all of both."""

        def agree() -> bool:
            found = self.disagreements(tenants, places)
            assert not found, "\n".join(found[:20])
            return True

        try:
            eventually(agree, within=within, every=0.05, what="kernel as the objects say")
        except TimeoutError as error:
            logs = "\n".join(
                f"--- {name}\n{self.cluster.log(name, 15)}"
                for name in ("brain", *(n.name for n in self.nodes.values()))
            )
            raise AssertionError(f"{error}\n{logs}") from None

    def counters(self) -> dict[str, Mapping[str, int]]:
        """Of each node's agent, since it started."""
        return {name: self.cluster.ask(place.name)["counters"] for name, place in self.nodes.items()}

    def tenant_row(self, tenant: str, where: str = "brain") -> Mapping[str, Any]:
        """A tenant's row in the status of "brain" or of a node ("one", "two")."""
        rows = self.cluster.ask(self.nodes[where].name if where in self.nodes else where)["tenants"]
        row: Mapping[str, Any] = next(row for row in rows if row["uid"] == self.uid(tenant))
        return row

    def connected(self, *, within: float = 20.0) -> None:
        """Wait until both agents are with a brain."""
        names = [place.name for place in self.nodes.values()]
        self.cluster.wait(
            "the agents are connected", lambda: all(self.cluster.ask(name)["brain"] for name in names), within
        )

    def revive(self, *, within: float = 20.0) -> None:
        """Start the brain and the agents that do not run, and wait until all is well."""
        if not self.cluster.running("brain"):
            self.cluster.start_brain()
        for place in self.nodes.values():
            if not self.cluster.running(place.name):
                self.cluster.start_agent(place)
        self.connected(within=within)
        self.converged(within=within)

    # --- the super cluster's view -------------------------------------------------------------------------------------

    def _tell_super(self) -> None:
        client = self.super.client
        client.create(namespace(self.namespace))
        for place in self.nodes.values():
            register(client, place)
        for (tenant, role), made in self.pods.items():
            self.tell_pod(f"{tenant}-{role}", tenant, made)

    def tell_pod(self, name: str, tenant: str, made: Pod) -> None:
        """Create the super cluster's Pod for a pod of the lab."""
        labels = {} if tenant == SUPER else {LABEL: tenant}
        self.super.client.create(pod(name, namespace=self.namespace, node=made.node, labels=labels))
        self.super.client.patch_status("Pod", name, pod_status(made.ip4, made.ip6), self.namespace)

    def forget(self) -> None:
        """Take nodes and pods out of the super cluster."""
        client = self.super.client
        client.delete_all("Pod", self.namespace)
        for place in self.nodes.values():
            client.delete("Node", place.name)


@contextmanager
def running(
    directory: Path,
    super_plane: ControlPlane,
    *,
    overlay: Mapping[str, ControlPlane | None] | None = None,
    flat: Mapping[str, ControlPlane | None] | None = None,
    tenants: Mapping[str, Any] | None = None,
    replicas: Sequence[str] = ("brain",),
    apart: bool = False,
    environment: Callable[[str], Mapping[str, str]] = lambda name: {},
    sharding: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Iterator[World]:
    """A running world with these tenants by network; None for a folder of manifests.

    `tenants`: further fields of the BrainConfiguration's `tenants`; `settings`: of the NodeConfiguration. `replicas`:
    brains that agents know; the first one is started. `apart`: the brain is on a machine of its own, BRAIN: nodes reach
    it over the fabric, and it reaches API servers through relays. `environment`: further variables of a process.
    `sharding`: of the BrainConfiguration.
    """
    brain = {
        "superCluster": {"kubeconfig": str(super_plane.kubeconfig)},
        "tenants": {"sources": [{"directory": {"path": str(directory / "tenants")}}], **(tenants or {})},
        "sharding": sharding,
    }
    with ExitStack() as stack:
        lab = stack.enter_context(Lab("vcp-e2e"))
        place = lab.client("brain", *BRAIN) if apart else None
        cluster = stack.enter_context(
            Cluster(directory, place=place, brain=brain, replicas=replicas, environment=environment)
        )
        world = World(lab, cluster, {SUPER: super_plane})
        world.add_tenant(SUPER, overlay=False)
        for is_overlay, said in ((True, overlay), (False, flat)):
            for name, plane in (said or {}).items():
                world.add_tenant(name, overlay=is_overlay, plane=plane)
        if place:
            world.brain_ns = place.ns
            for name, plane in world.planes.items():
                world.relays[name] = stack.enter_context(Relay(place.ns, int(plane.url.rpartition(":")[2])))
        stack.callback(world.forget)
        world.start(**settings)
        yield world
