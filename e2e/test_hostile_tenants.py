"""A tenant that is hostile: administrator of its own API server and owner of its etcd, against everybody else.

`acme` attacks, all at once: whatever the real API server would refuse it writes into etcd. Then each row of the table is
looked at: the kernel has nothing of what was wished, the operator is told (explain, status, a metric), the tenant is told
by an Event; and for `globex` and the super cluster nothing at all has changed, neither in the kernel nor for packets.

The brain has the rights of deploy/ and a policy with ranges, as an operator's would; all else is by default.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from e2e.apiclient import Resource
from e2e.controlplane import TENANT_SERVICE_CIDRS, ControlPlane
from e2e.hosting import DEPLOY, HostedWorld, hosting
from e2e.objects import Object, endpoint, endpoint_slice, service, service_port, slice_port
from e2e.oracle import ANY_NODE, SUPER, Forwarding
from e2e.polling import eventually
from e2e.processes import Port
from e2e.traffic import REQUESTS, Traffic
from e2e.world import PORT, TARGET, fresh_vips, web
from vcproxy.lab import Node, Reply

pytestmark = [pytest.mark.controlplane, pytest.mark.packets]

SUPER_CIDRS = ("10.96.0.0/16", "fd00:96::/108")
TENANT_POLICY = Resource("vcproxy.dev/v1alpha1", "TenantPolicy", "tenantpolicies", namespaced=False)
OUTSIDE = "203.0.113.66"
NODE_PORT = 31234
NOWHERE = "198.51.100.7"
"""An address that is nobody's: of no pod and no node."""


class Row(NamedTuple):
    """One attack: `wish` says what a Service `name` of the attacker has, and of what it must be refused."""

    name: str
    field: str
    reason: str


ROWS = [
    Row("vip-outside", "spec.clusterIPs", "outside-virtual-ranges"),
    Row("vip-of-a-node", "spec.clusterIPs", "outside-virtual-ranges"),
    Row("vip-of-anothers-pod", "spec.clusterIPs", "outside-virtual-ranges"),
    Row("vip-super", "spec.clusterIPs", "outside-virtual-ranges"),
    Row("vip-loopback", "spec.clusterIPs", "never-allowed"),
    Row("vip-metadata", "spec.clusterIPs", "never-allowed"),
    Row("external", "spec.externalIPs", "external-ip-not-granted"),
    Row("external-node", "spec.externalIPs", "external-ip-not-granted"),
    Row("balanced", "status.loadBalancer.ingress[].ip", "external-ip-not-granted"),
    Row("node-port", "spec.ports[].nodePort", "node-port-not-granted"),
    Row("health-port", "spec.healthCheckNodePort", "node-port-not-granted"),
    Row("to-another", "endpoints[].addresses", "other-tenants-pod"),
    Row("to-another-named", "endpoints[].addresses", "other-tenants-pod"),
    Row("to-node", "endpoints[].addresses", "node-address"),
    Row("to-super-pod", "endpoints[].addresses", "not-own-pod"),
    Row("to-nowhere", "endpoints[].addresses", "not-own-pod"),
    Row("to-loopback", "endpoints[].addresses", "never-allowed"),
    Row("to-metadata", "endpoints[].addresses", "never-allowed"),
    Row("odd-address", "endpoints[].addresses", "malformed"),
    Row("odd-protocol", "spec.ports[].protocol", "malformed"),
]


class Attack:
    """What the attacker writes: by name of the Service, where it leads and what else it asks for."""

    def __init__(self, world: HostedWorld) -> None:
        self.world = world
        self.plane = world.planes["acme"]
        node, pods = world.nodes["one"], world.pods
        other, own = pods["globex", "web-1"].ip4, pods["acme", "web-1"].ip4
        self.vips: dict[str, str] = {
            "vip-outside": OUTSIDE,
            "vip-of-a-node": node.ip4,
            "vip-of-anothers-pod": other,
            "vip-super": super_vip(world),
            "vip-loopback": "127.0.0.1",
            "vip-metadata": "169.254.169.254",
        }
        self.targets: dict[str, str] = {
            "to-another": other,
            "to-another-named": other,
            "to-node": node.ip4,
            "to-super-pod": world.pods[SUPER, "web-1"].ip4,
            "to-nowhere": NOWHERE,
            "to-loopback": "127.0.0.1",
            "to-metadata": "169.254.169.254",
            "odd-address": "010.0.0.1\n;flush ruleset",
        }
        self.specs: dict[str, Mapping[str, Any]] = {
            "external": {"externalIPs": [OUTSIDE]},
            "external-node": {"externalIPs": [node.ip4]},
            "balanced": {"type": "LoadBalancer"},
            "node-port": {"type": "NodePort"},
            "health-port": {
                "type": "LoadBalancer",
                "externalTrafficPolicy": "Local",
                "healthCheckNodePort": NODE_PORT + 1,
            },
        }
        for row in ROWS:
            self.vips.setdefault(row.name, fresh_vips()[0])
            self.targets.setdefault(row.name, own)

    def write(self) -> None:
        """All of it."""
        for row in ROWS:
            found, held = self._service(row.name), self._slice(row.name)
            self.plane.forge("services/specs", found)
            self.plane.forge("endpointslices", held)

    def undo(self) -> None:
        """None of it."""
        for row in ROWS:
            self.plane.client.delete("Service", row.name, "default")
            self.plane.client.delete("EndpointSlice", row.name, "default")

    def _service(self, name: str) -> Object:
        protocol = "TCP" if name != "odd-protocol" else "ICMP"
        port = service_port(PORT, name="http", protocol=protocol, target=TARGET)
        if name == "node-port":
            port["nodePort"] = NODE_PORT
        spec = {"clusterIPs": [self.vips[name]], "clusterIP": self.vips[name], "ipFamilies": ["IPv4"]}
        spec |= {"sessionAffinity": "None", "internalTrafficPolicy": "Cluster", "ipFamilyPolicy": "SingleStack"}
        # Marks of the syncer and of this product: whoever reads them from a tenant has lost.
        marks = {"vcproxy.dev/tenant": "globex", "tenancy.x-k8s.io/cluster": "globex"}
        alias = {"transparency.tenancy.x-k8s.io/clusterIP": OUTSIDE, "tenancy.x-k8s.io/clusterIP": OUTSIDE}
        made = service(name, ports=[port], labels=marks, annotations=alias, spec={**spec, **self.specs.get(name, {})})
        made["metadata"]["uid"] = f"uid-of-{name}"
        if name == "balanced":
            made["status"] = {"loadBalancer": {"ingress": [{"ip": OUTSIDE, "ipMode": "VIP"}]}}
        return made

    def _slice(self, name: str) -> Object:
        where = endpoint(self.targets[name], node=self.world.nodes["one"].name)
        if name == "to-another-named":
            where["targetRef"] = {"kind": "Pod", "namespace": "default", "name": "web-1", "uid": "acme's, honestly"}
        ports = [slice_port(TARGET, name="http")]
        made = endpoint_slice(name, service=name, endpoints=[where], ports=ports, family="IPv4")
        made["metadata"]["uid"] = f"uid-of-slice-{name}"
        return made


def super_vip(world: HostedWorld) -> str:
    """The super cluster's kubernetes Service."""
    found: str = world.super.client.get("Service", "kubernetes", "default").object["spec"]["clusterIP"]
    return found


class Victims(NamedTuple):
    """What the kernels of both nodes had of everybody else."""

    forwarding: Mapping[tuple[str, str], Forwarding]
    attached: Mapping[tuple[str, str], frozenset[str]]

    @classmethod
    def see(cls, world: HostedWorld) -> Victims:
        """As it is now."""
        uids = [world.uid("globex"), SUPER]
        kernels = {name: world.kernel(name) for name in world.nodes}
        assert not any(kernel.faults for kernel in kernels.values())
        return cls(
            {(name, uid): kernel.forwarding.get(uid, {}) for name, kernel in kernels.items() for uid in uids},
            {
                (name, uid): kernel.attached.get(uid, frozenset())
                for name, kernel in kernels.items()
                for uid in [*uids, world.uid("acme")]
            },
        )


class Scene(NamedTuple):
    """After the attack. `before`: the victims before it; `vips`: globex's web, `metrics`: where the brain shows them."""

    world: HostedWorld
    attack: Attack
    before: Victims
    vips: tuple[str, str]
    metrics: int
    losses: list[str]


@pytest.fixture(scope="module")
def scene(
    control_plane_binaries: Path,
    tenant_planes: tuple[ControlPlane, ControlPlane],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Scene]:
    acme, globex = tenant_planes
    vips = fresh_vips()
    with ExitStack() as stack:
        directory, home = tmp_path_factory.mktemp("hostile"), tmp_path_factory.mktemp("host")
        plane = ControlPlane("host", home, service_cidrs=SUPER_CIDRS, bin_dir=control_plane_binaries)
        stack.enter_context(plane)
        plane.client.create(yaml.safe_load((DEPLOY / "tenantpolicy.yaml").read_text()))
        metrics = Port()
        stack.callback(metrics.close)
        brain = {
            "policy": {"virtualIPRanges": list(TENANT_SERVICE_CIDRS)},
            "metricsAddress": f"127.0.0.1:{metrics.number}",
        }
        world = stack.enter_context(hosting(directory, plane, {"acme": acme, "globex": globex}, brain=brain))
        for name in ("acme", "globex"):
            world.planes[name].client.create_all(web("web", vips, world.some(name, "web-1", "web-2")))
            stack.callback(remove_web, world.planes[name])
        world.converged()
        before, attack = Victims.see(world), Attack(world)
        with Traffic(world.pods["globex", "client-one"], vips[0], PORT) as traffic:
            traffic.more()
            attack.write()
            stack.callback(attack.undo)
            last = ROWS[-1].name
            eventually(lambda: explained(world, last)["refused"], within=20, what="the attack was read")
            traffic.more()
        yield Scene(world, attack, before, vips, metrics.number, traffic.losses)


def remove_web(plane: ControlPlane) -> None:
    plane.client.delete("Service", "web", "default")
    for family in (4, 6):
        plane.client.delete("EndpointSlice", f"web-{family}", "default")


def explained(world: HostedWorld, name: str, tenant: str = "acme") -> Any:
    """What the brain says of a Service."""
    return world.cluster.ask("brain", "/explain", tenant=world.uid(tenant), service=name)


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_each_wish_is_refused_and_the_operator_is_told_why(scene: Scene, row: Row) -> None:
    def said() -> bool:
        found = explained(scene.world, row.name)["refused"]
        assert (row.field, row.reason) in {(one["field"], one["reason"]) for one in found}, found
        assert all(one["cure"] for one in found)
        return True

    eventually(said, within=10, what=f"{row.name} is explained")
    uid, attack = scene.world.uid("acme"), scene.attack
    for name in scene.world.nodes:
        forwarding = scene.world.kernel(name).forwarding[uid]
        frontends = {frontend.address for frontend in forwarding}
        assert not frontends & {*attack.vips.values()} - {*map(vip_of(scene), granted(row))}, row.name
        targets = {target for answer in forwarding.values() if not isinstance(answer, str) for target, _ in answer}
        wished = attack.targets[row.name]
        assert row.field != "endpoints[].addresses" or wished not in targets
        assert not frontends & {*ANY_NODE.values(), OUTSIDE, scene.world.nodes["one"].ip4}


def vip_of(scene: Scene) -> Any:
    return lambda row: scene.attack.vips[row.name]


def granted(_: Row) -> list[Row]:
    """Rows whose ClusterIP is as it should be: only something else about them is wrong."""
    return [row for row in ROWS if row.field != "spec.clusterIPs"]


def test_each_endpoint_is_named_on_the_command_line(scene: Scene) -> None:
    socket = scene.world.cluster.socket("brain")
    command = [sys.executable, "-m", "vcproxy", "explain", "to-another", "-t", scene.world.uid("acme")]
    done = subprocess.run([*command, "--socket", socket], capture_output=True, text=True, check=True)
    where = scene.attack.targets["to-another"]
    assert f"refused endpoint: {where} (to-another): other-tenants-pod" in done.stdout
    assert scene.attack.vips["to-another"] in done.stdout, "its own address is shown beside it"


def test_status_and_metrics_count_it_with_few_series(scene: Scene) -> None:
    row = scene.world.tenant_row("acme")
    assert row["refused"] >= len(ROWS)
    assert scene.world.tenant_row("globex")["refused"] == 0
    uid = scene.world.uid("acme")

    def counted() -> set[str]:
        with urllib.request.urlopen(f"http://127.0.0.1:{scene.metrics}/metrics", timeout=5) as answer:
            lines = answer.read().decode().splitlines()
        lines = [line for line in lines if line.startswith("vcproxy_refused_total{")]
        assert all(f'tenant="{uid}"' in line for line in lines), "nobody else is refused anything"
        return {line.partition('reason="')[2].partition('"')[0] for line in lines}

    wanted = {row.reason for row in ROWS}
    eventually(lambda: counted() == wanted, within=15, what="each reason has its series")


def test_the_tenant_is_told_by_events_and_not_whose_an_address_is(scene: Scene) -> None:
    client = scene.world.planes["acme"].client

    def told() -> list[Object]:
        found = [one for one in client.list("Event", "default").items if one["reason"] == "Refused"]
        assert len(found) >= 10, len(found)
        return found

    for event in eventually(told, within=20, what="a first burst of Events"):
        assert event["involvedObject"]["name"] in {row.name for row in ROWS}
        assert not {"other-tenants-pod", "node-address", "globex"} & {*event["message"].split()}
    assert not [one for one in scene.world.planes["globex"].client.list("Event").items if one["reason"] == "Refused"]


@pytest.mark.parametrize("protocol", ["TCP", "UDP"])
def test_others_have_what_they_had_and_their_packets_go_where_they_went(scene: Scene, protocol: str) -> None:
    world = scene.world
    assert not scene.losses, scene.losses
    assert Victims.see(world) == scene.before
    world.converged("globex", SUPER)
    for address in scene.vips:
        for where in ("client-one", "client-two"):
            answer = REQUESTS[protocol](world.pods["globex", where], address, PORT)
            assert isinstance(answer, Reply) and answer.pod.startswith("globex/"), answer
    answer = REQUESTS[protocol](world.pods["acme", "client-one"], scene.vips[0], PORT)
    assert isinstance(answer, Reply) and answer.pod.startswith("acme/"), "nor is the attacker cut off"


@pytest.mark.parametrize("name", ["to-another", "to-another-named", "to-node", "to-super-pod", "to-nowhere"])
def test_no_packet_of_the_attacker_arrives_where_it_may_not(scene: Scene, name: str) -> None:
    for where in ("client-one", "client-two"):
        answer = REQUESTS["TCP"](scene.world.pods["acme", where], scene.attack.vips[name], PORT, timeout=1.0)
        assert not isinstance(answer, Reply), answer


def test_nodes_and_outside_see_no_port_and_no_address_of_the_attacker(scene: Scene) -> None:
    world, node = scene.world, scene.world.nodes["one"]
    places = (world.outside, world.nodes["two"])
    for place in places:
        for port in (NODE_PORT, PORT):
            assert not isinstance(REQUESTS["TCP"](place, node.ip4, port, timeout=1.0), Reply)
    assert listening(node) == {*()}


def listening(node: Node) -> set[int]:
    """Ports of the attack that a program on the node listens on: none that it was not granted."""
    said = node.run(["ss", "-Hltn"]).stdout
    return {port for port in (NODE_PORT, NODE_PORT + 1) if f":{port} " in said}


def test_a_flood_and_giants_cost_the_attacker_and_nobody_else(scene: Scene) -> None:
    """Many objects, one over the limit of octets, and names as long as they may be; globex changes meanwhile."""
    world, plane = scene.world, scene.world.planes["acme"]
    giant = endpoint_slice("giant", service="giant", endpoints=[NOWHERE], ports=[TARGET])
    giant["metadata"]["annotations"] = {"a": "x" * (1 << 20)}
    plane.forge("endpointslices", giant)
    longest = "n" + "x" * 251
    names = [longest, *(f"flood-{number}" for number in range(400))]
    for name in names:
        found = endpoint_slice(name, service="web", endpoints=[scene.attack.targets["to-another"]], ports=[TARGET])
        plane.forge("endpointslices", found)
    late = web("late", fresh_vips(), world.some("globex", "web-1"))
    began = time.monotonic()
    world.planes["globex"].client.create_all(late)
    try:
        world.converged("globex", within=10)
        assert time.monotonic() - began < 10
        flooded = explained(world, "web")
        assert all(one["reason"] == "other-tenants-pod" for one in flooded["refusedEndpoints"])
        eventually(lambda: len(explained(world, "web")["refusedEndpoints"]) == len(names), within=20, what="all read")
        answer = REQUESTS["TCP"](world.pods["acme", "client-one"], scene.vips[0], PORT)
        assert isinstance(answer, Reply) and answer.pod.startswith("acme/")
        refusals = world.cluster.ask("brain", "/refusals", tenant=world.uid("acme"))
        assert any(one["reason"] == "malformed" and one["name"] == "giant" for one in refusals), "too large"
    finally:
        world.planes["globex"].client.delete("Service", "late", "default")
        for family in (4, 6):
            world.planes["globex"].client.delete("EndpointSlice", f"late-{family}", "default")
        for name in [*names, "giant"]:
            plane.client.delete("EndpointSlice", name, "default")
    world.converged("globex")


TRICKS: dict[str, Any] = {
    "exec": lambda config: config["users"][0]["user"].update(exec={"command": "/bin/touch", "args": ["{marker}"]}),
    "file": lambda config: config["users"][0]["user"].update({"client-key": "/etc/shadow"}),
    "ca file": lambda config: config["clusters"][0]["cluster"].update({"certificate-authority": "/etc/passwd"}),
    "proxy": lambda config: config["clusters"][0]["cluster"].update({"proxy-url": "http://127.0.0.1:1"}),
    "http": lambda config: config["clusters"][0]["cluster"].update({"server": "http://127.0.0.1:1"}),
    "insecure": lambda config: config["clusters"][0]["cluster"].update({"insecure-skip-tls-verify": True}),
    "impersonation": lambda config: config["users"][0]["user"].update({"as": "system:admin"}),
    "another network": lambda config: config["clusters"][0]["cluster"].update({"server": "https://10.0.0.1:6443"}),
}


@pytest.mark.parametrize("trick", list(TRICKS))
def test_a_kubeconfig_is_data(scene: Scene, trick: str, tmp_path: Path) -> None:
    """What cannot be used is named; what was read before stays, and nothing is opened, run or dialled."""
    world, marker = scene.world, tmp_path / "marker"
    config = yaml.safe_load(world.planes["acme"].kubeconfig.read_text())
    TRICKS[trick](config)
    bad = tmp_path / "kubeconfig"
    bad.write_text(json.dumps(config).replace("{marker}", str(marker)))
    held = world.tenant_row("acme")["ports"]
    world.hostings["acme"].rotate(bad)
    try:

        def told() -> bool:
            status = world.cluster.ask("brain")
            said = [row["problem"] for row in status["problems"]]
            return any("acme" in line for line in said) or bool(world.tenant_row("acme")["staleSince"])

        eventually(told, within=20, what="it is a problem")
        assert world.tenant_row("acme")["ports"] == held, "what is held stays"
        assert not world.tenant_row("globex")["staleSince"]
        assert not marker.exists()
    finally:
        world.hostings["acme"].rotate(world.planes["acme"].kubeconfig)
        eventually(lambda: not world.tenant_row("acme")["staleSince"], within=20, what="it is read again")
        eventually(
            lambda: not any("acme" in row["problem"] for row in world.cluster.ask("brain")["problems"]),
            within=20,
            what="the problem is over",
        )


def test_what_the_operator_grants_is_had_and_taken_away_at_once(scene: Scene) -> None:
    """By a TenantPolicy in the super cluster; last, as it undoes a refusal."""
    world, client = scene.world, scene.world.super.client
    match = {"namespace": "default", "name": "default.acme"}
    spec = {"match": match, "policy": {"nodePorts": [f"{NODE_PORT}"]}}
    made = {"apiVersion": TENANT_POLICY.api_version, "kind": TENANT_POLICY.kind}
    client.create({**made, "metadata": {"name": "acme"}, "spec": spec}, resource=TENANT_POLICY)
    uid = world.uid("acme")

    def has_it() -> bool:
        return any(frontend.port == NODE_PORT for frontend in world.kernel("one").forwarding[uid])

    eventually(has_it, within=20, what="the node port is there")
    wanted = {"observedGeneration": 1, "matchedTenants": 1, "problems": []}
    eventually(lambda: client.get(TENANT_POLICY, "acme").object.get("status") == wanted, what="its status says so")
    client.delete(TENANT_POLICY, "acme")
    eventually(lambda: not has_it(), within=20, what="the node port is gone")
    assert Victims.see(world).forwarding == scene.before.forwarding
