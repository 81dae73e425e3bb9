"""The main job with real API servers: a super cluster and tenants whose ClusterIPs and pod addresses are the same."""

import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from e2e import kernel, objects
from e2e.apiclient import ApiClient, ApiError
from e2e.conftest import PlaneFactory
from e2e.controlplane import ControlPlane
from e2e.polling import eventually
from vcproxy.lab import Lab, Node, Pod, Refused, Reply, TcpSession, Tenant, tcp_request, udp_request
from vcproxy.lab.cluster import Cluster, endpoint_slice, service

pytestmark = [pytest.mark.controlplane, pytest.mark.packets]

VIP4, VIP6, PORT, TARGET = "10.32.77.7", "fd00:32::7:7", 80, 8080
NODES = ("one", "two")
OVERLAYS = ("alpha", "beta", "gamma")  # alpha and beta have API servers, gamma is a folder of manifests
CHURN_SECONDS = float(os.environ.get("VCPROXY_CHURN_SECONDS", "60"))
PORTS = [
    objects.service_port(PORT, name="http", target=TARGET),
    objects.service_port(PORT, name="ask", protocol="UDP", target=TARGET),
]
SLICE_PORTS = [objects.slice_port(TARGET, name="http"), objects.slice_port(TARGET, name="ask", protocol="UDP")]


class World:
    """Lab, brain, agents, API servers. `pods`: by tenant and name; every tenant has the same four, on both nodes."""

    def __init__(self, lab: Lab, cluster: Cluster, planes: dict[str, ControlPlane]) -> None:
        self.lab = lab
        self.cluster = cluster
        self.planes = planes
        self.clients = {name: ApiClient(plane.kubeconfig) for name, plane in planes.items()}
        self.nodes: dict[str, Node] = {name: lab.node(name) for name in NODES}
        self.overlays: dict[str, Tenant] = {}
        self.pods: dict[tuple[str, str], Pod] = {}
        for node in self.nodes.values():
            cidrs = (node.pod_cidr4, node.pod_cidr6)
            self.clients["super"].create(objects.node(node.name, pod_cidrs=cidrs))
            self.clients["super"].patch_status("Node", node.name, objects.node_status(node.ip4, node.ip6))

    def add_overlay(self, name: str) -> None:
        """A tenant with a network of its own: a client and an endpoint on each node, at the same addresses as ever."""
        tenant = self.overlays[name] = self.lab.overlay_tenant(name, vni=100 + len(self.overlays))
        for number, node in enumerate(NODES, 1):
            for kind, last in (("client", 10), ("web", 11)):
                pod = self.nodes[node].overlay_pod(
                    tenant, f"{kind}-{node}", f"10.244.{number}.{last}", f"fd00:244::{number}:{last}"
                )
                self._add(name, f"{kind}-{node}", pod)

    def add_super(self) -> None:
        """The super cluster's own pods, on the flat network."""
        for number, node in enumerate(NODES, 1):
            for kind, last in (("client", 10), ("web", 11)):
                pod = self.nodes[node].flat_pod(
                    f"super/{kind}-{node}", f"10.200.{number}.{last}", f"fd00:200:0:{number}::{last}"
                )
                self._add("super", f"{kind}-{node}", pod)

    def _add(self, tenant: str, name: str, pod: Pod) -> None:
        self.pods[tenant, name] = pod
        if name.startswith("web"):
            self.lab.serve(pod, tcp=[TARGET], udp=[TARGET])
        labels = {} if tenant == "super" else {"vcproxy.dev/tenant": tenant}
        api = self.clients["super"]
        unique = f"{tenant}-{name}"
        api.create(objects.pod(unique, node=pod.node, labels=labels))
        api.patch_status("Pod", unique, objects.pod_status(pod.ip4, pod.ip6), namespace="default")

    def publish(self, tenant: str) -> None:
        """The tenant's Service `web`; where a controller manager runs, its Pods, from which that makes the slices."""
        api = self.clients[tenant]
        controlled = tenant != "super"
        selector = {"app": "web"} if controlled else None
        if controlled:  # the virtual nodes that a syncer makes: without them the controller skips their Pods
            for node in NODES:
                api.create(objects.node(node))
        api.create(objects.service("web", cluster_ips=(VIP4, VIP6), dual_stack=True, ports=PORTS, selector=selector))
        web = [self.pods[tenant, f"web-{node}"] for node in NODES]
        if controlled:
            for node, pod in zip(NODES, web, strict=True):
                self.add_pod(tenant, f"web-{node}", node, pod)
            return
        for family in ("ip4", "ip6"):
            endpoints = [objects.endpoint(getattr(pod, family), node=pod.node) for pod in web]
            api.create(objects.endpoint_slice(f"web-{family}", service="web", endpoints=endpoints, ports=SLICE_PORTS))

    def add_pod(self, tenant: str, name: str, node: str, pod: Pod) -> None:
        """A ready Pod of the tenant, as its kubelet would report it."""
        self.clients[tenant].create(objects.pod(name, node=node, labels={"app": "web"}))
        self.clients[tenant].patch_status("Pod", name, objects.pod_status(pod.ip4, pod.ip6), namespace="default")

    def agrees(self, tenant: str, uid: str) -> None:
        """Both kernels hold what the API server says. Raises AssertionError."""
        wanted = kernel.wanted(self.clients[tenant])
        for node in self.nodes.values():
            assert kernel.forwarding(node, uid) == wanted, node.name

    def serves(self, tenant: str) -> bool:
        """Both kernels have both endpoints behind all four frontends of the tenant's `web`."""
        uid = "super" if tenant == "super" else f"dir-{tenant}"
        forwarding = [kernel.forwarding(node, uid) for node in self.nodes.values()]
        frontends = [(protocol, address, PORT) for protocol in ("tcp", "udp") for address in (VIP4, VIP6)]
        return all(len(held.get(frontend, ())) == 2 for held in forwarding for frontend in frontends)

    def answers(self, tenant: str, client: str, address: str, protocol: str, count: int = 6) -> set[str]:
        """Who answers; anything but an answer fails."""
        request = tcp_request if protocol == "TCP" else udp_request
        found = [request(self.pods[tenant, client], address, PORT) for _ in range(count)]
        assert all(isinstance(reply, Reply) for reply in found), found
        return {reply.pod for reply in found if isinstance(reply, Reply)}


@pytest.fixture(scope="module")
def world(
    super_plane: ControlPlane,
    tenant_planes: tuple[ControlPlane, ControlPlane],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[World]:
    planes = {"super": super_plane, "alpha": tenant_planes[0], "beta": tenant_planes[1]}
    with Lab("vcp-e2e") as lab:
        directory = tmp_path_factory.mktemp("cluster")
        settings = {"superCluster": {"kubeconfig": str(super_plane.kubeconfig)}}
        with Cluster(directory, brain=settings) as cluster:
            found = World(lab, cluster, planes)
            found.add_super()
            for name in OVERLAYS:
                found.add_overlay(name)
            for name in ("alpha", "beta"):
                planes[name].start_controller_manager()
                found.publish(name)
                (cluster.tenants / f"{name}.kubeconfig").write_text(planes[name].kubeconfig.read_text())
            found.publish("super")
            web = [found.pods["gamma", f"web-{node}"] for node in NODES]
            ports = [("http", "TCP", TARGET), ("ask", "UDP", TARGET)]
            cluster.apply(
                "gamma",
                "web",
                [
                    service("web", [VIP4, VIP6], [("http", "TCP", PORT, TARGET), ("ask", "UDP", PORT, TARGET)]),
                    endpoint_slice("web", "IPv4", [(pod.ip4, pod.node) for pod in web], ports),
                    endpoint_slice("web", "IPv6", [(pod.ip6, pod.node) for pod in web], ports),
                ],
            )
            cluster.start_brain()
            for node in found.nodes.values():
                cidrs = [f"10.200.{number}.0/24" for number in (1, 2)] + [
                    f"fd00:200:0:{number}::/64" for number in (1, 2)
                ]
                cluster.start_agent(
                    node, found.overlays.values(), detectLocal={"mode": "ClusterCIDR", "clusterCIDRs": cidrs}
                )
            for node in NODES:
                for uid in ("super", *(f"dir-{name}" for name in OVERLAYS)):
                    cluster.wait_committed(node, uid, timeout=60)
            for name in ("super", *OVERLAYS):
                eventually(lambda name=name: found.serves(name), within=60, what=f"both endpoints of {name}")
            yield found


@pytest.mark.parametrize("address", [VIP4, VIP6])
@pytest.mark.parametrize("protocol", ["TCP", "UDP"])
@pytest.mark.parametrize("node", NODES)
@pytest.mark.parametrize("tenant", ["super", *OVERLAYS])
def test_the_same_cluster_ip_leads_each_tenant_to_its_own_endpoints(
    world: World, tenant: str, node: str, protocol: str, address: str
) -> None:
    answers = world.answers(tenant, f"client-{node}", address, protocol, count=12)
    assert answers <= {f"{tenant}/web-one", f"{tenant}/web-two"}
    assert len(answers) == 2 or eventually(
        lambda: len(world.answers(tenant, f"client-{node}", address, protocol, 12)) == 2
    )


@pytest.mark.parametrize("address", [VIP4, VIP6])
@pytest.mark.parametrize("request_", [tcp_request, udp_request])
@pytest.mark.parametrize("node", NODES)
def test_the_host_reaches_super_services(world: World, node: str, request_: object, address: str) -> None:
    reply = request_(world.nodes[node], address, PORT)  # type: ignore[operator]
    assert isinstance(reply, Reply), reply
    assert reply.pod.startswith("super/")


def test_the_same_five_tuple_lives_in_all_tenants_at_once(world: World) -> None:
    names = ("alpha", "beta", "gamma")
    sessions = {name: TcpSession(world.pods[name, "client-one"], VIP4, PORT, source_port=41000) for name in names}
    try:
        assert len({session.reply.source for session in sessions.values()}) == 1
        for turn in range(3):
            for name, session in sessions.items():
                assert session.ask(f"{turn}").startswith(f"{name}/web-")
        sessions.pop("alpha").close()
        for name, session in sessions.items():
            assert session.ask("after alpha closed").startswith(f"{name}/web-")
        again = sessions["alpha"] = TcpSession(world.pods["alpha", "client-one"], VIP4, PORT, source_port=41000)
        assert again.reply.pod.startswith("alpha/")
        for name, session in sessions.items():
            assert session.ask("after alpha opened").startswith(f"{name}/web-")
    finally:
        for session in sessions.values():
            session.close()


def test_endpoints_follow_readiness_and_nothing_else_is_touched(world: World) -> None:
    """A Pod turns unready, then ready: only elements of alpha's Service appear in the node's netlink monitor."""
    api, node = world.clients["alpha"], world.nodes["one"]
    pod = world.pods["alpha", "web-two"]
    zone = kernel.zones(kernel.table(node))["dir-alpha"]
    monitor = node.spawn(["nft", "-j", "monitor", "elements"], stdout=subprocess.PIPE)
    try:
        before = {row["uid"]: row["revision"] for row in world.cluster.ask("one", "/tenants")}
        api.patch_status("Pod", "web-two", objects.pod_status(pod.ip4, pod.ip6, ready=False), namespace="default")
        eventually(lambda: world.answers("alpha", "client-one", VIP4, "TCP", 8) == {"alpha/web-one"})
        eventually(lambda: world.answers("alpha", "client-two", VIP6, "UDP", 8) == {"alpha/web-one"})
        api.patch_status("Pod", "web-two", objects.pod_status(pod.ip4, pod.ip6), namespace="default")
        eventually(lambda: world.serves("alpha"))
        after = {row["uid"]: row["revision"] for row in world.cluster.ask("one", "/tenants")}
    finally:
        monitor.terminate()
    out, _ = monitor.communicate(timeout=10)
    changed = {uid for uid in before if before[uid] != after[uid]}
    assert changed == {"dir-alpha"}
    lines = out.decode().splitlines()
    assert lines
    for line in lines:
        for change in json.loads(line).values():
            element = change["element"]
            assert (
                element["table"] != "vcproxy"
                or "frontends" not in element["name"]
                or f"[{zone}," in json.dumps(element, separators=(",", ":"))
            )


def test_service_created_ports_changed_type_changed_deleted(world: World) -> None:
    """The kernel follows every life of a Service."""
    api, pod = world.clients["beta"], world.pods["beta", "client-one"]
    vip = "10.32.77.8"
    web = world.pods["beta", "web-one"]
    api.create(
        objects.service(
            "second", cluster_ips=(vip,), ports=[objects.service_port(81, name="http", target=TARGET)], selector=None
        )
    )
    assert isinstance(
        eventually(lambda: found if isinstance(found := tcp_request(pod, vip, 81, timeout=0.5), Refused) else None),
        Refused,
    )
    api.create(
        objects.endpoint_slice(
            "second",
            service="second",
            endpoints=[objects.endpoint(web.ip4, node="one")],
            ports=[objects.slice_port(TARGET, name="http")],
        )
    )
    eventually(lambda: isinstance(tcp_request(pod, vip, 81, timeout=0.5), Reply))
    found = api.get("Service", "second", "default").object
    api.update({**found, "spec": {**found["spec"], "ports": [objects.service_port(82, name="http", target=TARGET)]}})
    eventually(lambda: isinstance(tcp_request(pod, vip, 82, timeout=0.5), Reply))
    eventually(lambda: isinstance(tcp_request(pod, vip, 81, timeout=0.5), Refused))
    api.patch("Service", "second", {"spec": {"type": "NodePort"}}, namespace="default")
    eventually(lambda: world.agrees("beta", "dir-beta") is None)
    assert isinstance(tcp_request(pod, vip, 82), Reply)
    api.delete("EndpointSlice", "second", namespace="default")
    api.delete("Service", "second", namespace="default")
    eventually(lambda: world.agrees("beta", "dir-beta") is None)


def test_a_node_port_of_the_super_cluster_comes_and_goes(world: World) -> None:
    api = world.clients["super"]
    api.patch("Service", "web", {"spec": {"type": "NodePort"}}, namespace="default")
    ports = {port["name"]: port["nodePort"] for port in api.get("Service", "web", "default").object["spec"]["ports"]}
    outside = world.lab.client("outside", "192.168.77.200", "fd77::200")
    for node in world.nodes.values():
        for address in (node.ip4, node.ip6):
            eventually(
                lambda node=node, address=address: isinstance(
                    tcp_request(outside, address, ports["http"], timeout=0.5), Reply
                ),
                what=f"node port on {address}",
            )
            assert isinstance(udp_request(outside, address, ports["ask"]), Reply)
    api.patch(
        "Service",
        "web",
        {"spec": {"type": "ClusterIP", "ports": [{**port, "nodePort": None} for port in PORTS]}},
        namespace="default",
    )
    eventually(lambda: not isinstance(tcp_request(outside, world.nodes["one"].ip4, ports["http"], timeout=0.3), Reply))


def row(world: World, uid: str) -> dict[str, object]:
    """The brain's row of a tenant."""
    return next((found for found in world.cluster.ask("brain", "/tenants") if found["uid"] == uid), {})


def test_an_api_server_stops_wipes_and_leaves(world: World, control_plane: PlaneFactory) -> None:
    """delta's API server dies, comes back, loses its etcd, and is withdrawn; alpha goes on changing all the while."""
    plane = control_plane("delta")
    world.planes["delta"], world.clients["delta"] = plane, ApiClient(plane.kubeconfig)
    world.add_overlay("delta")
    plane.start_controller_manager()
    world.publish("delta")
    # Its devices are new to the agents' configuration, so they are told by their addresses here: a flat tenant.
    kubeconfig = world.cluster.tenants / "delta.kubeconfig"
    kubeconfig.write_text(plane.kubeconfig.read_text())
    world.cluster.wait_committed("one", "dir-delta", timeout=60)
    eventually(lambda: world.serves("delta"), within=60)
    held = kernel.forwarding(world.nodes["one"], "dir-delta")

    plane.kill()
    stale = eventually(lambda: row(world, "dir-delta").get("staleSince"), within=30)
    assert time.time() - float(str(stale)) < 60
    status = subprocess.run(
        [sys.executable, "-m", "vcproxy", "status", "--socket", world.cluster.socket("brain")],
        capture_output=True,
        text=True,
    )
    assert status.returncode == 1
    assert "dir-delta" in status.stdout
    assert kernel.forwarding(world.nodes["one"], "dir-delta") == held
    world.clients["alpha"].create(objects.service("while-away", ports=[80]))
    eventually(lambda: world.agrees("alpha", "dir-alpha") is None)
    assert kernel.forwarding(world.nodes["one"], "dir-delta") == held

    plane.start()
    eventually(lambda: row(world, "dir-delta").get("staleSince") is None, within=60)
    assert kernel.forwarding(world.nodes["one"], "dir-delta") == held

    plane.kill()
    plane.wipe_etcd()
    plane.start()
    eventually(lambda: ("tcp", VIP4, PORT) not in kernel.forwarding(world.nodes["one"], "dir-delta"), within=60)
    eventually(lambda: world.agrees("delta", "dir-delta") is None, within=30)

    zone = kernel.zones(kernel.table(world.nodes["one"]))["dir-delta"]
    kubeconfig.unlink()
    for node in world.nodes.values():
        eventually(
            lambda node=node: "dir-delta" not in kernel.zones(kernel.table(node)),
            within=30,
            what="the zone is given back",
        )
        assert f"[{zone}," not in json.dumps(kernel.table(node), separators=(",", ":"))
    assert row(world, "dir-delta") == {}
    world.clients["alpha"].delete("Service", "while-away", namespace="default")


def test_rights_that_are_lost_lose_nothing(world: World, tmp_path: Path) -> None:
    """beta's kubeconfig is replaced by one without rights (403), then by a good one."""
    held = kernel.forwarding(world.nodes["one"], "dir-beta")
    target = world.cluster.tenants / "beta.kubeconfig"
    good = target.read_text()
    poor = world.planes["beta"].write_kubeconfig(tmp_path / "poor", user="nobody")
    (part := tmp_path / "part").write_text(poor.read_text())
    part.rename(target) if part.stat().st_dev == target.parent.stat().st_dev else target.write_text(part.read_text())
    eventually(lambda: row(world, "dir-beta").get("staleSince"), within=30)
    assert kernel.forwarding(world.nodes["one"], "dir-beta") == held
    assert world.answers("beta", "client-one", VIP4, "TCP")
    target.write_text(good)
    eventually(lambda: row(world, "dir-beta").get("staleSince") is None, within=30)
    assert kernel.forwarding(world.nodes["one"], "dir-beta") == held


def test_brain_and_agent_killed_cost_nothing(world: World) -> None:
    """SIGKILL of the brain, then of an agent: every connection works, no snapshot is sent, no element is touched."""
    failures: list[object] = []
    done = threading.Event()

    def loop() -> None:
        while not done.is_set():
            reply = tcp_request(world.pods["alpha", "client-one"], VIP4, PORT, timeout=1)
            if not isinstance(reply, Reply):
                failures.append(reply)

    with TcpSession(world.pods["beta", "client-one"], VIP6, PORT) as session:
        client = threading.Thread(target=loop)
        client.start()
        try:
            before = {node: world.cluster.ask(node)["counters"] for node in NODES}
            world.cluster.kill("brain")
            world.cluster.start_brain()
            for node in NODES:
                world.cluster.wait(f"{node} is back", lambda node=node: world.cluster.ask(node)["brain"], 60)
                for uid in ("super", "dir-alpha", "dir-beta", "dir-gamma"):
                    world.cluster.wait_committed(node, uid, timeout=60)
            assert {node: world.cluster.ask(node)["counters"] for node in NODES} == before
            world.cluster.kill("one")
            world.cluster.start_agent(world.nodes["one"])
            for uid in ("super", "dir-alpha", "dir-beta", "dir-gamma"):
                world.cluster.wait_committed("one", uid, timeout=60)
            counters = world.cluster.ask("one")["counters"]
            assert counters["snapshots"] == counters["operations"] == 0
            assert session.ask("still there?").startswith("beta/")
        finally:
            done.set()
            client.join()
    assert failures == []


def test_rolling_changes_end_where_the_api_servers_are(world: World) -> None:
    """Pods come, turn unready and go, in two tenants at random; at every quiet point the kernels equal the APIs.

    Each tenant's Service `web` stays as it is all the while: no connection to it fails.
    """
    rng = random.Random(20261123)
    alive: dict[str, set[str]] = {"alpha": set(), "beta": set()}
    serial = 0
    deadline = time.monotonic() + CHURN_SECONDS
    rounds = 0
    while time.monotonic() < deadline:
        for _ in range(rng.randrange(3, 12)):
            tenant = rng.choice(("alpha", "beta"))
            api = world.clients[tenant]
            act = rng.random()
            if act < 0.5 or not alive[tenant]:
                serial += 1
                name, address = f"roll-{serial}", f"10.244.9.{1 + serial % 250}"
                api.create(objects.pod(name, node=rng.choice(NODES), labels={"app": "roll"}))
                api.patch_status(
                    "Pod", name, objects.pod_status(address, f"fd00:244::9:{1 + serial % 250:x}"), namespace="default"
                )
                alive[tenant].add(name)
            elif act < 0.75:
                name = rng.choice(sorted(alive[tenant]))
                status = api.get("Pod", name, "default").object["status"]
                addresses = [found["ip"] for found in status["podIPs"]]
                api.patch_status(
                    "Pod", name, objects.pod_status(*addresses, ready=rng.random() < 0.5), namespace="default"
                )
            else:
                name = rng.choice(sorted(alive[tenant]))
                api.delete("Pod", name, namespace="default", grace_period=0)
                alive[tenant].discard(name)
            if rng.random() < 0.15:
                try:
                    api.create(objects.service("roll", ports=PORTS, selector={"app": "roll"}, dual_stack=True))
                except ApiError:
                    api.delete("Service", "roll", namespace="default")
            for probed in ("alpha", "beta"):
                assert world.answers(probed, "client-one", VIP4, "TCP", 1)
        for tenant in ("alpha", "beta"):
            eventually(
                lambda tenant=tenant: world.agrees(tenant, f"dir-{tenant}") is None,
                within=20,
                every=0.2,
                what=f"{tenant}: kernel equals API",
            )
        rounds += 1
    assert rounds >= 3
