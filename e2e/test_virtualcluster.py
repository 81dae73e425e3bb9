"""VirtualClusters, as objects of a real super API server: they come, rotate, go; pods and super ClusterIPs are theirs.

The brain reads the super cluster with the rights of deploy/ and nothing more. Tenants have real API servers, all with
the same range of ClusterIPs; the super cluster has another, as in VirtualCluster's own samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from e2e.conftest import PlaneFactory
from e2e.controlplane import ControlPlane
from e2e.hosting import (
    DEFINITION,
    OWNER,
    HostedWorld,
    Hosting,
    brains_kubeconfig,
    configuration,
    hosting,
    served,
)
from e2e.objects import pod_status, service
from e2e.oracle import Frontend
from e2e.polling import eventually
from e2e.traffic import REQUESTS, Traffic
from e2e.watching import Watcher
from e2e.world import LABEL, PORT, fresh_vips, slices, web
from vcproxy.lab import Reply
from vcproxy.lab.cluster import Cluster
from vcproxy.ops.admin import AdminError

pytestmark = [pytest.mark.controlplane, pytest.mark.packets]

SUPER_CIDRS = ("10.96.0.0/16", "fd00:96::/108")


@pytest.fixture(scope="module")
def super_cluster(control_plane_binaries: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    directory = tmp_path_factory.mktemp("host")
    with ControlPlane("host", directory, service_cidrs=SUPER_CIDRS, bin_dir=control_plane_binaries) as plane:
        yield plane


@pytest.fixture(scope="module")
def world(
    super_cluster: ControlPlane,
    tenant_planes: tuple[ControlPlane, ControlPlane],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[HostedWorld]:
    acme, globex = tenant_planes
    directory = tmp_path_factory.mktemp("hosted")
    vips = fresh_vips()
    with hosting(directory, super_cluster, {"acme": acme, "globex": globex}) as world:
        for name, plane in (("acme", acme), ("globex", globex)):
            plane.client.create_all(web("web", vips, world.some(name, "web-1", "web-2")))
            world.sync(name, "web", "kubernetes")
        world.converged()
        yield world
        for plane in (acme, globex):
            plane.client.delete("Service", "web", "default")
            for family in (4, 6):
                plane.client.delete("EndpointSlice", f"web-{family}", "default")


@pytest.fixture(autouse=True)
def healthy(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "world" in request.fixturenames:
        world: HostedWorld = request.getfixturevalue("world")
        world.super.start()
        world.converged(within=30)


def problems(cluster: Cluster) -> list[str]:
    return [row["problem"] for row in cluster.ask("brain")["problems"]]


def vips(world: HostedWorld) -> tuple[str, ...]:
    """The ClusterIPs of web, the same in both tenants."""
    found: list[str] = world.planes["acme"].client.get("Service", "web", "default").object["spec"]["clusterIPs"]
    return tuple(found)


def test_the_definition_may_come_later(
    control_plane: PlaneFactory, tenant_planes: tuple[ControlPlane, ControlPlane], tmp_path: Path
) -> None:
    plane = control_plane("late", service_cidrs=SUPER_CIDRS)
    kubeconfig = brains_kubeconfig(plane, tmp_path / "brain.kubeconfig", "brain.yaml", "sources/virtualcluster.yaml")
    with Cluster(tmp_path / "cluster", brain=configuration(kubeconfig)) as cluster:
        cluster.start_brain()
        missing = "no CustomResourceDefinition virtualclusters.tenancy.x-k8s.io"
        cluster.wait("it says what is missing", lambda: any(missing in said for said in problems(cluster)))
        assert not cluster.ask("brain")["ready"], "nobody may be told that a tenant is not there"
        plane.client.create(DEFINITION)
        served(plane.client)
        cluster.wait("it is content", lambda: not problems(cluster), timeout=30)
        cluster.wait("it is ready", lambda: cluster.ask("brain")["ready"])
        hosted = Hosting(plane.client, "acme")
        cluster.wait("it is pending", lambda: any("phase is Pending" in said for said in problems(cluster)))
        hosted.run(tenant_planes[0].kubeconfig)

        def row() -> Any:
            return next((row for row in cluster.ask("brain")["tenants"] if row["uid"] == hosted.uid), None)

        cluster.wait("the tenant is synced", lambda: (found := row()) and found["synced"])
        assert row()["name"] == f"{OWNER}.acme"


def test_a_kubeconfig_may_not_lead_to_this_machine_or_the_super_api_server(world: HostedWorld, tmp_path: Path) -> None:
    """Where these tests' API servers are: so without `apiServers` nobody is connected to."""
    settings = configuration(world.cluster.directory / "brain.kubeconfig")
    del settings["tenants"]["policy"]
    with Cluster(tmp_path / "cluster", brain=settings) as cluster:
        cluster.start_brain()

        def refused() -> bool:
            rows = [row for row in cluster.ask("brain")["tenants"] if row["uid"] != "super"]
            reasons = [row["staleReason"] for row in rows]
            words = "does not allow an API server at 127.0.0.1"
            return len(reasons) == 2 and all(words in reason for reason in reasons)

        cluster.wait("both are refused, with the reason", refused)
        assert cluster.ask("brain")["ready"], "that concerns nobody else"
        assert not any(row["synced"] for row in cluster.ask("brain")["tenants"] if row["uid"] != "super")


@pytest.mark.parametrize("protocol", ["TCP", "UDP"])
@pytest.mark.parametrize("family", [0, 1])
def test_a_service_answers_on_its_own_and_on_its_super_address(world: HostedWorld, protocol: str, family: int) -> None:
    request = REQUESTS[protocol]
    for tenant, other in (("acme", "globex"), ("globex", "acme")):
        for where in ("client-one", "client-two"):
            client = world.pods[tenant, where]
            for address in (vips(world)[family], world.aliases[tenant, "default", "web"][family]):
                answers = {request(client, address, PORT) for _ in range(10)}
                assert all(isinstance(answer, Reply) for answer in answers), answers
                pods = {answer.pod for answer in answers if isinstance(answer, Reply)}
                assert pods <= {f"{tenant}/web-1", f"{tenant}/web-2"}
            strange = request(client, world.aliases[other, "default", "web"][family], PORT)
            assert not isinstance(strange, Reply), "another tenant's super address is nothing here"


def test_the_tenants_kubernetes_leads_to_its_api_server(world: HostedWorld) -> None:
    """On both addresses; that endpoint is no pod of the tenant."""
    for tenant in ("acme", "globex"):
        client = world.planes[tenant].client
        found = client.get("EndpointSlice", "kubernetes", "default").object
        target = (found["endpoints"][0]["addresses"][0], found["ports"][0]["port"])
        own = client.get("Service", "kubernetes", "default").object["spec"]["clusterIP"]
        (alias,) = world.aliases[tenant, "default", "kubernetes"]
        for name in world.nodes:
            forwarding = world.kernel(name).forwarding[world.uid(tenant)]
            for address in (own, alias):
                assert forwarding[Frontend("TCP", address, 443)] == frozenset([target])


def test_a_label_that_the_tenant_wrote_changes_nothing(world: HostedWorld) -> None:
    """The syncer copies a tenant's labels but for those under its own names; `vcproxy.dev/tenant` is copied."""
    made = world.pods["acme", "client-one"]
    place = world.hostings["acme"].place("default")
    uid, other = world.uid("acme"), world.uid("globex")
    for number, value in enumerate((other, f"{OWNER}.globex", "globex"), start=210):
        labels = {LABEL: value, "vcluster.loft.sh/managed-by": "globex", "app": "web"}
        world.super.client.patch("Pod", "acme-client-one", {"metadata": {"labels": labels}}, place)
        # Another address shows that the Pod was read since.
        new = world.nodes["one"].pod_cidr6.replace("/64", f"{number:x}")
        give_addresses(world, "client-one", made.ip4, new)
        kernel = world.kernel("one")
        assert {made.ip4, new} <= kernel.attached[uid]
        assert not {made.ip4, new} & kernel.attached[other]
    answers = {REQUESTS["TCP"](made, vips(world)[0], PORT) for _ in range(5)}
    assert all(isinstance(answer, Reply) and answer.pod.startswith("acme/") for answer in answers), answers
    unlabelled = {LABEL: None, "vcluster.loft.sh/managed-by": None, "app": None}
    world.super.client.patch("Pod", "acme-client-one", {"metadata": {"labels": unlabelled}}, place)
    give_addresses(world, "client-one", made.ip4, made.ip6)


def give_addresses(world: HostedWorld, role: str, *addresses: str) -> None:
    """Let the super cluster say that one of acme's pods on node one has these, and wait until the kernel knows."""
    place, uid = world.hostings["acme"].place("default"), world.uid("acme")
    others = {address for who in ("web-1",) for address in (world.pods["acme", who].ip4, world.pods["acme", who].ip6)}
    world.super.client.patch_status("Pod", f"acme-{role}", pod_status(*addresses), place)
    eventually(lambda: world.kernel("one").attached[uid] == {*addresses, *others}, what="the addresses are attached")


def test_credentials_rotate_without_a_gap(world: HostedWorld, tmp_path: Path) -> None:
    plane, client = world.planes["acme"], world.planes["acme"].client
    before = rotations(world)
    with (
        Watcher(world.nodes["one"]) as watcher,
        Traffic(world.pods["acme", "client-one"], vips(world)[0], PORT, "UDP") as traffic,
    ):
        for number in range(3):
            fresh = plane.write_kubeconfig(tmp_path / f"{number}", user=f"admin-{number}", groups=("system:masters",))
            world.hostings["acme"].rotate(fresh)
            eventually(
                lambda wanted=number + 1: rotations(world) - before >= wanted,  # type: ignore[misc]
                what="the new credentials are used",
            )
            assert not world.tenant_row("acme")["staleSince"]
        traffic.more()
        assert not watcher.heard(), "nothing was listed anew, nothing written"
        assert not traffic.losses, str(traffic)
    # Credentials that are worth nothing show that they are used, and the next good ones end it.
    world.hostings["acme"].rotate(plane.write_kubeconfig(tmp_path / "poor", user="nobody"))
    eventually(lambda: world.tenant_row("acme")["staleSince"], within=20, what="it is stale")
    world.hostings["acme"].rotate(plane.kubeconfig)
    eventually(lambda: not world.tenant_row("acme")["staleSince"], within=20, what="it is fresh")
    client.create_all(web("late", fresh_vips(), world.some("acme", "web-1")))
    world.converged("acme")
    client.delete("Service", "late", "default")
    for family in (4, 6):
        client.delete("EndpointSlice", f"late-{family}", "default")
    world.converged("acme")


def rotations(world: HostedWorld) -> int:
    """How often the brain took new credentials over."""
    return world.cluster.log("brain", 1_000_000).count("credentials rotated")


def test_a_bad_secret_leaves_the_last_good_credentials(world: HostedWorld, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    bad.write_text("kind: Config\nusers: [{name: u, user: {exec: {command: x}}}]\n")
    world.hostings["acme"].rotate(bad)
    words = "the last good credentials stay in use"
    eventually(lambda: any(words in said for said in problems(world.cluster)), what="it is told")
    assert not world.tenant_row("acme")["staleSince"]
    world.hostings["acme"].phase("Error")
    client = world.planes["acme"].client
    for item in slices("web", world.some("acme", "web-1", "web-2", "web-3")):
        client.update(item)
    world.converged("acme")
    world.hostings["acme"].rotate(world.planes["acme"].kubeconfig)
    world.hostings["acme"].phase("Running")
    for item in slices("web", world.some("acme", "web-1", "web-2")):
        client.update(item)
    eventually(lambda: not problems(world.cluster), what="nothing is wrong")


def test_a_super_address_goes_and_comes_with_its_super_service(world: HostedWorld) -> None:
    old = world.aliases.pop(("acme", "default", "web"))
    with Traffic(world.pods["acme", "client-one"], vips(world)[0], PORT) as traffic:
        world.hostings["acme"].unsync_service("web")
        world.converged("acme")
        assert not isinstance(REQUESTS["TCP"](world.pods["acme", "client-one"], old[0], PORT), Reply)
        # A super Service made for another uid, or by hand in that namespace, is no alias.
        place = world.hostings["acme"].place("default")
        world.super.client.create(service("web", namespace=place, labels={"tenancy.x-k8s.io/vcname": "acme"}))
        world.super.client.delete("Service", "web", place)
        world.sync("acme", "web")
        world.converged("acme")
        traffic.more()
        assert not traffic.losses, str(traffic)
    new = world.aliases["acme", "default", "web"]
    assert new != old
    assert isinstance(REQUESTS["TCP"](world.pods["acme", "client-one"], new[0], PORT), Reply)


def test_a_super_api_server_that_is_killed_loses_nothing(world: HostedWorld) -> None:
    client = world.planes["acme"].client
    alias = world.aliases["acme", "default", "web"][0]
    with (
        Traffic(world.pods["acme", "client-one"], alias, PORT, "UDP") as datagrams,
        Traffic(world.pods["globex", "client-two"], vips(world)[0], PORT) as connections,
    ):
        world.super.kill()
        words = "VirtualClusters cannot be followed"
        eventually(lambda: any(words in said for said in problems(world.cluster)), within=20, what="it is told")
        for item in slices("web", world.some("acme", "web-2", "web-3")):
            client.update(item)
        world.converged("acme")  # tenants go on
        world.cluster.kill("brain")  # a brain that starts while nobody tells it of tenants
        world.cluster.start_brain()
        eventually(lambda: problems_if_up(world), within=20, what="the new brain is up, and waits")
        datagrams.more()
        connections.more()
        world.super.start()
        eventually(lambda: world.cluster.ask("brain")["ready"], within=40, what="the brain is ready")
        world.converged(within=30)
        datagrams.more()
        connections.more()
    assert not datagrams.losses and not connections.losses, f"{datagrams} {connections}"
    for item in slices("web", world.some("acme", "web-1", "web-2")):
        client.update(item)
    world.converged("acme")
    made = world.pods["acme", "client-one"]
    give_addresses(world, "client-one", made.ip4, world.nodes["one"].pod_cidr6.replace("/64", "201"))
    give_addresses(world, "client-one", made.ip4, made.ip6)


def problems_if_up(world: HostedWorld) -> bool:
    try:
        return bool(problems(world.cluster))
    except AdminError:
        return False


def test_a_tenant_goes_and_another_of_its_name_comes(world: HostedWorld) -> None:
    old = world.hostings.pop("globex")
    old.end()

    def gone() -> bool:
        return all(old.uid not in world.kernel(name).forwarding for name in world.nodes)

    eventually(gone, within=20, what="end of elements")
    assert old.uid not in {row["uid"] for row in world.cluster.ask("brain")["tenants"]}
    for key in [key for key in world.aliases if key[0] == "globex"]:
        del world.aliases[key]
    # The root namespace and the copies live on for a while; a new one of the same name has others.
    plane = world.planes["globex"]
    world.give_kubeconfig("globex", plane.kubeconfig)
    assert world.uid("globex") != old.uid
    for (tenant, role), made in world.pods.items():
        if tenant == "globex":
            world.super.client.delete("Pod", f"globex-{role}", f"{old.root}-default", grace_period=0)
            world.tell_pod(f"globex-{role}", "globex", made)
    world.sync("globex", "web", "kubernetes")
    world.converged(within=30)
    answer = REQUESTS["TCP"](world.pods["globex", "client-one"], vips(world)[0], PORT)
    assert isinstance(answer, Reply)
    assert answer.pod.startswith("globex/")
    assert {row["name"] for row in world.cluster.ask("brain")["tenants"]} == {
        "super",
        f"{OWNER}.acme",
        f"{OWNER}.globex",
    }
