"""What VirtualCluster's syncer leaves in the super cluster: whose Pods are, and super ClusterIPs as aliases."""

from __future__ import annotations

import itertools
import random
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.brain.hosted import (
    OTHER_UID,
    UID,
    root_namespace,
    root_of,
    synced_namespace,
    synced_pod,
    synced_service,
)
from vcproxy.brain.placement import Placement
from vcproxy.brain.sources.attribution import VIRTUAL_CLUSTER, Owners
from vcproxy.brain.sources.supercluster import Whereabouts
from vcproxy.brain.sources.virtualcluster import SyncedServices
from vcproxy.brain.vouched import Vouched
from vcproxy.kube import shapes
from vcproxy.kube.reflector import Deleted, Listed, Upserted
from vcproxy.model.addresses import parse_address

SERVICE_UID = "1030f5c6-a9b4-4ff1-be1b-ef2e9c724759"
OTHER_SERVICE_UID = "67c003a2-4466-4eed-92ad-f88ef4f71a67"
WEB = ("demo", "web")
VIP, VIP6 = parse_address("10.96.135.228"), parse_address("fd00:96::1")


class Super:
    """SyncedServices and the Pods' Whereabouts, fed by hand."""

    def __init__(self) -> None:
        self.owners, self.vouched, self.placement = Owners([VIRTUAL_CLUSTER]), Vouched(), Placement()
        self.synced = SyncedServices(self.owners, self.vouched)
        self.pods = Whereabouts(self.placement, attribution=self.owners, vouched=self.vouched)

    def put(self, kind: str, value: dict[str, Any]) -> None:
        shape = {"Namespace": shapes.Namespace, "Service": shapes.Service, "Pod": shapes.Pod}[kind]
        self.take(kind, Upserted(msgspec.convert(value, shape)))

    def take(self, kind: Any, event: Any) -> None:
        (self.pods if kind == "Pod" else self.synced).take(kind, event)

    def alias(self, key: tuple[str, str] = WEB, uid: str = SERVICE_UID, tenant: str = UID) -> tuple[bytes, ...]:
        return self.vouched.aliases(tenant).addresses(key, uid)


@pytest.fixture
def world() -> Super:
    return Super()


@pytest.mark.parametrize(
    ("clusterips", "spec", "alias"),
    [
        (["10.96.135.228"], {}, (VIP,)),
        (["10.96.135.228", "fd00:96::1"], {}, (VIP, VIP6)),
        (["10.96.135.228"], {"type": "NodePort"}, (VIP,)),
        (["10.96.135.228"], {"type": "LoadBalancer"}, (VIP,)),
        (["10.96.135.228"], {"clusterIPs": []}, (VIP,)),
        (["None"], {}, ()),
        ([""], {}, ()),
        (["10.96.135.228"], {"type": "ExternalName"}, ()),
    ],
)
def test_the_alias_of_a_super_service(world: Super, clusterips: list[str], spec: Any, alias: tuple[bytes, ...]) -> None:
    world.put("Namespace", synced_namespace("demo"))
    world.put("Service", synced_service("web", SERVICE_UID, *clusterips, **spec))
    assert world.alias() == tuple(sorted(alias))


def test_the_alias_counts_for_one_uid_and_goes_with_its_service(world: Super) -> None:
    world.put("Namespace", synced_namespace("demo"))
    world.put("Service", synced_service("web", SERVICE_UID, "10.96.135.228"))
    assert world.alias(uid=OTHER_SERVICE_UID) == ()
    assert world.alias(tenant=OTHER_UID) == ()
    world.put("Service", synced_service("web", OTHER_SERVICE_UID, "10.96.1.1"))
    assert world.alias() == ()
    assert world.alias(uid=OTHER_SERVICE_UID) == (parse_address("10.96.1.1"),)
    world.take("Service", Deleted((f"{root_of()}-demo", "web"), ""))
    assert world.alias(uid=OTHER_SERVICE_UID) == ()


def test_a_namespace_may_come_later_change_hands_and_go(world: Super) -> None:
    world.put("Service", synced_service("web", SERVICE_UID, "10.96.135.228"))
    assert world.alias() == ()
    namespace = synced_namespace("demo")
    world.put("Namespace", namespace)
    assert world.alias() == (VIP,)
    annotations = {**namespace["metadata"]["annotations"], "tenancy.x-k8s.io/vcuid": OTHER_UID}
    world.put("Namespace", {"metadata": {**namespace["metadata"], "annotations": annotations}})
    assert (world.alias(), world.alias(tenant=OTHER_UID)) == ((), (VIP,))
    world.take("Namespace", Deleted(("", f"{root_of()}-demo"), ""))
    assert world.alias(tenant=OTHER_UID) == ()


def test_the_tenants_namespace_is_what_the_super_namespace_says(world: Super) -> None:
    """Its name is cut and hashed when it is too long, so it is never taken apart."""
    value = synced_namespace("demo")
    value["metadata"]["name"] = long = "x" * 57 + "-ab12c"
    world.put("Namespace", value)
    service = synced_service("web", SERVICE_UID, "10.96.135.228", tenant_namespace="lies")
    service["metadata"]["namespace"] = long
    world.put("Service", service)
    assert world.alias() == (VIP,)


@pytest.mark.parametrize("uid", ["", "super", "dir-acme", "not a uid", UID.upper()])
def test_a_namespace_without_a_proper_uid_is_nobodys(world: Super, uid: str) -> None:
    value = synced_namespace("demo")
    value["metadata"]["annotations"]["tenancy.x-k8s.io/vcuid"] = uid
    world.put("Namespace", value)
    world.put("Pod", synced_pod("a", "10.244.1.4"))
    assert world.placement.pods("n1") == {}


def test_pods_by_their_namespace_whatever_their_tenant_wrote(world: Super) -> None:
    spoofed = {"vcproxy.dev/tenant": "victim", "app": "web", "vcluster.loft.sh/managed-by": "victim"}
    world.put("Pod", synced_pod("a", "10.244.1.4", **spoofed))
    world.put("Pod", synced_pod("b", "10.244.1.5", uid=OTHER_UID))
    assert world.placement.pods("n1") == {}
    world.put("Namespace", synced_namespace("demo"))
    world.put("Namespace", synced_namespace("demo", uid=OTHER_UID))
    assert world.placement.pods("n1") == {parse_address("10.244.1.4"): UID, parse_address("10.244.1.5"): OTHER_UID}
    assert world.placement.tenants("n1") == {UID, OTHER_UID}


def test_a_pod_whose_cluster_is_not_its_namespaces_is_nobodys(world: Super) -> None:
    world.put("Namespace", synced_namespace("demo"))
    value = synced_pod("a", "10.244.1.4")
    value["metadata"]["labels"]["tenancy.x-k8s.io/cluster"] = "another"
    world.put("Pod", value)
    assert world.placement.pods("n1") == {}


def test_the_control_planes_own_pods(world: Super) -> None:
    labels = {"tenancy.x-k8s.io/cluster": root_of(), "component-name": "apiserver"}
    value = synced_pod("apiserver-0", "10.244.1.2")
    value["metadata"] = {"name": "apiserver-0", "namespace": root_of(), "labels": labels}
    world.put("Pod", value)
    world.put("Namespace", root_namespace())
    assert world.vouched.api_servers(UID) == {parse_address("10.244.1.2")}
    assert world.placement.pods("n1") == {}
    value["status"]["podIPs"] = [{"ip": "10.244.1.9"}]
    world.put("Pod", value)
    assert world.vouched.api_servers(UID) == {parse_address("10.244.1.9")}


@pytest.mark.parametrize("order", [("x", "y"), ("y", "x")])
def test_of_two_super_services_for_one_the_first_by_name_counts(world: Super, order: tuple[str, str]) -> None:
    """As while a tenant moves to another root namespace."""
    for name in order:
        namespace = synced_namespace("demo")
        namespace["metadata"]["name"] = name
        world.put("Namespace", namespace)
        service = synced_service("web", SERVICE_UID, {"x": "10.96.0.1", "y": "10.96.0.2"}[name])
        service["metadata"]["namespace"] = name
        world.put("Service", service)
    assert world.alias() == (parse_address("10.96.0.1"),)
    world.take("Service", Deleted(("x", "web"), ""))
    assert world.alias() == (parse_address("10.96.0.2"),)


def test_a_service_of_the_control_plane_is_no_alias(world: Super) -> None:
    value = synced_service("apiserver-svc", SERVICE_UID, "10.96.135.228")
    value["metadata"]["namespace"] = root_of()
    world.put("Service", value)
    world.put("Namespace", root_namespace())
    assert not world.vouched._aliases


def test_the_order_of_events_does_not_matter() -> None:
    events = [
        ("Namespace", synced_namespace("demo")),
        ("Namespace", synced_namespace("demo", uid=OTHER_UID)),
        ("Namespace", root_namespace()),
        ("Service", synced_service("web", SERVICE_UID, "10.96.135.228")),
        ("Service", synced_service("web", OTHER_SERVICE_UID, "10.96.1.1", uid=OTHER_UID)),
        ("Pod", synced_pod("a", "10.244.1.4")),
        ("Pod", synced_pod("b", "10.244.1.5", uid=OTHER_UID)),
    ]
    orders = random.Random(7).sample(list(itertools.permutations(events)), 200)
    for order in orders:
        world = Super()
        for kind, value in order:
            world.put(kind, value)
        assert world.alias() == (VIP,)
        assert world.alias(uid=OTHER_SERVICE_UID, tenant=OTHER_UID) == (parse_address("10.96.1.1"),)
        assert set(world.placement.pods("n1").values()) == {UID, OTHER_UID}


# --- any events in any order equal reading the last objects anew ------------------------------------------------------

UIDS = st.sampled_from([UID, OTHER_UID])
PLACES = st.sampled_from([f"{root_of()}-demo", root_of()])
NAMES = st.sampled_from(["a", "b"])


def named(value: dict[str, Any], namespace: str) -> dict[str, Any]:
    value["metadata"]["namespace"] = namespace
    return value


@st.composite
def namespaces(draw: Any) -> tuple[str, dict[str, Any]]:
    value = root_namespace(draw(UIDS)) if draw(st.booleans()) else synced_namespace("demo", uid=draw(UIDS))
    value["metadata"]["name"] = draw(PLACES)
    return "Namespace", value


@st.composite
def services(draw: Any) -> tuple[str, dict[str, Any]]:
    addresses = draw(st.sampled_from([("10.96.0.1",), ("10.96.0.1", "fd00:96::2"), ("None",)]))
    return "Service", named(synced_service(draw(NAMES), SERVICE_UID, *addresses), draw(PLACES))


@st.composite
def pods(draw: Any) -> tuple[str, dict[str, Any]]:
    value = synced_pod(draw(NAMES), draw(st.sampled_from(["10.0.0.1", "10.0.0.2"])), uid=draw(UIDS))
    if draw(st.booleans()):
        del value["metadata"]["labels"]["tenancy.x-k8s.io/vcname"]
    if draw(st.booleans()):
        value["metadata"]["labels"] = {"vcproxy.dev/tenant": "acme"}
    return "Pod", named(value, draw(PLACES))


PUTS = st.one_of(namespaces(), services(), pods())
EVENTS = st.one_of(
    PUTS.map(lambda said: ("put", *said)), PUTS.map(lambda said: ("delete", *said)), st.just(("list", "Namespace", {}))
)


def seen(world: Super) -> Any:
    tenants = (UID, OTHER_UID, "dir-acme")
    keys = [("demo", name) for name in ("a", "b")]
    aliases = {
        (tenant, key, uid): world.vouched.aliases(tenant).addresses(key, uid)
        for tenant in tenants
        for key in keys
        for uid in (SERVICE_UID, OTHER_SERVICE_UID)
    }
    placed = dict(world.placement.pods("n1"))
    return aliases, placed, {tenant: world.vouched.api_servers(tenant) for tenant in tenants}


@settings(max_examples=800, deadline=None)
@given(st.lists(EVENTS, min_size=8, max_size=60))
def test_any_events_equal_reading_the_last_objects_anew(events: list[Any]) -> None:
    world, held = Super(), {}
    for what, kind, value in events:
        if what == "list":
            shape = shapes.Namespace
            objects = [msgspec.convert(said, shape) for (other, _), said in held.items() if other == kind]
            world.take(kind, Listed(tuple(objects), ()))
            continue
        key = (value["metadata"].get("namespace", ""), value["metadata"]["name"])
        if what == "put":
            world.put(kind, value)
            held[kind, key] = value
        else:
            world.take(kind, Deleted(key, ""))
            held.pop((kind, key), None)
    anew = Super()
    for (kind, _), value in held.items():
        anew.put(kind, value)
    assert seen(world) == seen(anew)


def test_a_list_takes_away_what_it_lacks(world: Super) -> None:
    world.put("Namespace", synced_namespace("demo"))
    world.put("Service", synced_service("web", SERVICE_UID, "10.96.135.228"))
    world.take("Service", Listed((), ()))
    assert world.alias() == ()
    world.take("Namespace", Listed((), ()))
    world.put("Service", synced_service("web", SERVICE_UID, "10.96.135.228"))
    assert world.alias() == ()


def test_a_tenant_that_is_gone_leaves_nothing(world: Super) -> None:
    world.put("Namespace", synced_namespace("demo"))
    world.put("Service", synced_service("web", SERVICE_UID, "10.96.135.228"))
    world.vouched.forget(UID)
    assert world.alias() == (VIP,), "the super cluster still has it"
    world.take("Service", Listed((), ()))
    assert not world.vouched._aliases
