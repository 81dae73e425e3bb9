"""API servers that are away, frozen, emptied, or that refuse us: their tenant keeps forwarding and is shown as stale.

Nobody else notices: all the while the other tenant goes on changing.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from e2e.apiclient import ApiClient, ApiError
from e2e.controlplane import ControlPlane
from e2e.objects import namespace
from e2e.oracle import Forwarding
from e2e.polling import eventually
from e2e.traffic import Traffic
from e2e.watching import Watcher, concern
from e2e.world import PORT, World, fresh_vips, running, slices, web

pytestmark = [pytest.mark.controlplane, pytest.mark.packets]

SILENCE = 3.0
"""Seconds after which a watch that says nothing is given up, in these tests."""
BEAT = 0.5


class Patient:
    """Tenant `victim`, to whom things happen, with a Service that has two endpoints; `acme` is the other one."""

    def __init__(self, world: World, plane: ControlPlane, vips: tuple[str, str]) -> None:
        self.world, self.plane, self.vips = world, plane, vips

    @property
    def row(self) -> Mapping[str, Any]:
        """What the brain says of it."""
        return self.world.tenant_row("victim")

    def forwarding(self) -> dict[str, Forwarding]:
        """What both kernels do for it."""
        return {name: self.world.kernel(name).forwarding["dir-victim"] for name in self.world.nodes}

    def stale(self, *, since: float, within: float) -> Mapping[str, Any]:
        """Wait until it is stale, on both nodes too; the brain's row. `since`: when it began, at the earliest."""

        def shown() -> Mapping[str, Any] | None:
            rows = [self.world.tenant_row("victim", where) for where in ("brain", "one", "two")]
            return rows[0] if all(row["staleSince"] for row in rows) else None

        row = eventually(shown, within=within, what="victim is shown as stale")
        assert row is not None
        assert since <= row["staleSince"] <= time.time()
        assert row["staleReason"]
        assert not self.world.tenant_row("acme")["staleSince"]
        return row

    def fresh(self, *, within: float = 40) -> None:
        """Wait until it is well, on both nodes too."""

        def well() -> bool:
            rows = [self.world.tenant_row("victim", where) for where in ("brain", "one", "two")]
            return rows[0]["synced"] and not any(row["staleSince"] for row in rows)

        eventually(well, within=within, what="victim is fresh")

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """Sees that nothing is lost while the context is open: the kernel's elements of the tenant are not written, its
        clients are answered, and a change of acme arrives.
        """
        world = self.world
        zones = {name: world.kernel(name).zones["dir-victim"] for name in world.nodes}
        pools = {name: set(world.kernel(name).pools["dir-victim"].values()) for name in world.nodes}
        before = self.forwarding()
        with (
            Watcher(world.nodes["one"]) as one,
            Watcher(world.nodes["two"]) as two,
            Traffic(world.pods["victim", "client-one"], self.vips[0], PORT, "UDP") as datagrams,
            Traffic(world.pods["victim", "client-two"], self.vips[1], PORT) as connections,
        ):
            yield
            change_acme(world)
            datagrams.more()
            connections.more()
            assert self.forwarding() == before
            heard = {"one": one.heard(), "two": two.heard()}
        for name, elements in heard.items():
            concerns = [concern(element) for element in elements]
            assert concerns, "acme's change was not heard"
            assert not [said for said in concerns if said.zone == zones[name] or said.pool in pools[name]]
        assert not datagrams.losses and not connections.losses, f"{datagrams} {connections}"


@pytest.fixture(scope="module")
def victim(
    super_plane: ControlPlane,
    tenant_planes: tuple[ControlPlane, ControlPlane],
    control_plane_binaries: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Patient]:
    acme = tenant_planes[0]
    with (
        ControlPlane("victim", tmp_path_factory.mktemp("victim"), bin_dir=control_plane_binaries) as plane,
        beating(plane),
        beating(acme),
        running(
            tmp_path_factory.mktemp("faults"),
            super_plane,
            flat={"acme": acme, "victim": plane},
            tenants={"silenceSeconds": SILENCE},
        ) as world,
    ):
        patient = Patient(world, plane, fresh_vips())
        plane.client.create_all(web("web", patient.vips, world.some("victim", "web-1", "web-2")))
        world.planes["acme"].client.create_all(web("changing", fresh_vips(), world.some("acme", "web-1")))
        world.converged()
        yield patient
        acme.client.delete("Service", "changing", "default")
        for family in (4, 6):
            acme.client.delete("EndpointSlice", f"changing-{family}", "default")


@pytest.fixture(autouse=True)
def healthy(victim: Patient) -> Iterator[None]:
    """Whatever a test did to the API server, the next one finds it well."""
    yield
    victim.plane.thaw()
    victim.plane.start()
    victim.world.give_kubeconfig("victim", victim.plane.kubeconfig)
    victim.world.revive()
    victim.fresh()


@contextmanager
def beating(plane: ControlPlane) -> Iterator[None]:
    """Changes a Service and a slice again and again: API servers speak once a minute by themselves, which is often
    enough for the product's 150 seconds, but these tests have a shorter patience.
    """
    over = threading.Event()
    client = ApiClient(plane.kubeconfig, timeout=1.0)

    def beat() -> None:
        count = 0
        while not over.wait(BEAT):
            count += 1
            try:
                for kind in ("Service", "EndpointSlice"):
                    client.patch(kind, "kubernetes", {"metadata": {"annotations": {"beat": str(count)}}}, "default")
            except (OSError, ApiError):
                continue  # it is away, or empty; somebody's test

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        client.close()


def change_acme(world: World) -> None:
    """Change acme's endpoints, and wait until all kernels have it."""
    client = world.planes["acme"].client
    now = client.get("EndpointSlice", "changing-4", "default").object["endpoints"]
    roles = ("web-2", "web-3") if len(now) == 1 else ("web-1",)
    for item in slices("changing", world.some("acme", *roles)):
        client.update(item)
    world.converged("acme")


def test_rights_that_are_taken_away_lose_nothing(victim: Patient, tmp_path: Path) -> None:
    with victim.untouched():
        began = time.time()
        poor = victim.plane.write_kubeconfig(tmp_path / "poor", user="nobody")
        victim.world.give_kubeconfig("victim", poor)
        row = victim.stale(since=began, within=20)
        assert "403" in row["staleReason"] or "forbidden" in row["staleReason"].lower()
        victim.world.give_kubeconfig("victim", victim.plane.kubeconfig)
        victim.fresh()


def test_credentials_that_are_not_accepted_lose_nothing(victim: Patient, tmp_path: Path) -> None:
    with victim.untouched():
        began = time.time()
        theirs = yaml.safe_load(victim.world.planes["acme"].kubeconfig.read_text())
        ours = yaml.safe_load(victim.plane.kubeconfig.read_text())
        ours["users"][0]["user"] = theirs["users"][0]["user"]
        wrong = tmp_path / "wrong"
        wrong.write_text(yaml.safe_dump(ours))
        victim.world.give_kubeconfig("victim", wrong)
        row = victim.stale(since=began, within=20)
        assert "401" in row["staleReason"] or "unauthorized" in row["staleReason"].lower()
        victim.world.give_kubeconfig("victim", victim.plane.kubeconfig)
        victim.fresh()


def test_kubeconfig_that_turns_bad_loses_nothing(victim: Patient, tmp_path: Path) -> None:
    with victim.untouched():
        bad = tmp_path / "bad"
        bad.write_text("kind: Config\nclusters: [{name: x\n")
        victim.world.give_kubeconfig("victim", bad)

        def told() -> list[str]:
            problems = victim.world.cluster.ask("brain")["problems"]
            return [row["problem"] for row in problems if "victim.kubeconfig" in row["problem"]]

        assert eventually(told, what="the brain tells of the bad file")
        assert victim.row["synced"]
        victim.world.give_kubeconfig("victim", victim.plane.kubeconfig)
        eventually(lambda: not told(), what="the brain is content")


def test_killed_api_server_is_stale_until_it_is_back(victim: Patient) -> None:
    world = victim.world
    with victim.untouched():
        began = time.time()
        victim.plane.kill()
        victim.stale(since=began - 0.5, within=10)
        shown = status(world)
        assert shown.returncode == 1
        assert "dir-victim" in shown.stdout
        victim.plane.start()
        victim.fresh()
    shown = status(world)
    assert shown.returncode == 0, shown.stdout
    for item in slices("web", world.some("victim", "web-1", "web-2", "web-3")):
        victim.plane.client.update(item)
    world.converged("victim")
    for item in slices("web", world.some("victim", "web-1", "web-2")):
        victim.plane.client.update(item)
    world.converged("victim")


def test_frozen_api_server_is_stale_after_its_silence(victim: Patient) -> None:
    with victim.untouched():
        began = time.time()
        victim.plane.freeze()
        row = victim.stale(since=began, within=SILENCE + 10)
        assert row["staleSince"] - began > SILENCE - 2 * BEAT - 0.5
        victim.plane.thaw()
        victim.fresh()


@pytest.mark.parametrize("settings", [{}, {"stateDirectory": ""}], ids=["remembering", "empty-handed"])
def test_brain_that_starts_while_it_is_away_takes_nothing_from_nodes(victim: Patient, settings: dict[str, str]) -> None:
    world = victim.world
    with victim.untouched():
        victim.plane.kill()
        world.cluster.kill("brain")
        world.cluster.start_brain(**settings)
        world.connected()
        began = time.time()
        eventually(lambda: world.tenant_row("acme")["synced"], within=20, what="acme is synced")
        eventually(lambda: victim.row["staleSince"], within=20, what="victim is stale")
        assert not victim.row["synced"] or (victim.row["restored"] and not settings)
        assert time.time() - began < 20
    victim.plane.start()
    victim.fresh()
    world.converged()


def test_wiped_api_server_is_empty_and_its_deletions_arrive(victim: Patient) -> None:
    world, client = victim.world, victim.plane.client
    before = client.list("Service").resource_version
    victim.plane.wipe_etcd()
    client.create(namespace("anew"))
    assert int(client.list("Service").resource_version) < int(before)
    victim.fresh()
    world.converged("victim", within=20)
    for name in world.nodes:
        assert not {frontend.address for frontend in world.kernel(name).forwarding["dir-victim"]} & set(victim.vips)
    client.create_all(web("web", victim.vips, world.some("victim", "web-2", "web-3"), namespace="anew"))
    world.converged()
    with Traffic(world.pods["victim", "client-one"], victim.vips[0], PORT) as traffic:
        traffic.more(20)
    assert set(traffic.answers) == {"victim/web-2", "victim/web-3"}


def status(world: World) -> subprocess.CompletedProcess[str]:
    """`vcproxy status` of the brain."""
    command = [sys.executable, "-m", "vcproxy", "status", "--socket", world.cluster.socket("brain")]
    return subprocess.run(command, capture_output=True, text=True, check=False)
