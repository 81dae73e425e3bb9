"""Which tenants a node must know, from Pods, Nodes and slices."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.brain.kinds import endpoint_slice, node, pod
from vcproxy.brain.placement import Claim, Placement, Scope, pod_claims, slice_claims
from vcproxy.brain.sources.attribution import CONTROL_PLANE, NAME, VIRTUAL_CLUSTER, Owners, mark_of
from vcproxy.brain.sources.selfplaced import SelfPlaced
from vcproxy.brain.sources.supercluster import Whereabouts, facts_of_node
from vcproxy.brain.vouched import Vouched
from vcproxy.kube import shapes
from vcproxy.kube.errors import ShapeError
from vcproxy.kube.reflector import Deleted, Listed, Malformed, Upserted
from vcproxy.model.addresses import parse_address, parse_prefix
from vcproxy.model.endpoints import name_id
from vcproxy.model.node import NodeFacts

A, B = parse_address("10.0.0.1"), parse_address("10.0.0.2")


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


class Told(Placement):
    """A placement that is told of objects by name."""

    def __init__(self, **how: Any) -> None:
        super().__init__(**how)
        self._stood_for: dict[str, tuple[Claim, ...]] = {}

    def put(self, source: str, claims: Iterable[Claim]) -> None:
        new = tuple(claims)
        self.move(self._stood_for.get(source, ()), new)
        self._stood_for[source] = new

    def remove(self, source: str) -> None:
        self.put(source, ())


@pytest.fixture
def placement(clock: Clock) -> Told:
    return Told(clock=clock)


def announced(placement: Placement) -> list[str]:
    """Collects the nodes that callbacks name."""
    heard: list[str] = []
    placement.subscribe(heard.append)
    return heard


def test_a_pod_brings_its_tenant_at_binding_and_its_address_later(placement: Told) -> None:
    heard = announced(placement)
    placement.put("p", pod_claims(pod(ips=()), "t"))
    assert placement.tenants("n1") == {"t"}
    assert placement.pods("n1") == {}
    placement.put("p", pod_claims(pod(ips=("10.0.0.1", "fd00::1")), "t"))
    assert placement.pods("n1") == {A: "t", parse_address("fd00::1"): "t"}
    assert heard == ["n1", "n1"]
    placement.put("p", pod_claims(pod(ips=("10.0.0.1", "fd00::1")), "t"))
    assert len(heard) == 2, "nothing changed"
    assert placement.tenants("n2") == frozenset()


@pytest.mark.parametrize(
    ("why", "found"),
    [
        ("host network", pod(host_network=True)),
        ("not scheduled", pod(node="")),
        ("Succeeded", pod(phase="Succeeded")),
        ("Failed", pod(phase="Failed")),
    ],
)
def test_nobodys_pods(why: str, found) -> None:
    assert pod_claims(found, "t") == (), why


def test_an_address_no_pod_can_have_is_no_claim_but_the_pod_is() -> None:
    assert pod_claims(pod(ips=("127.0.0.1", "nonsense")), "t") == (Claim("n1", b"", "t"),)


def test_a_tenant_lingers_after_its_last_pod(placement: Told, clock: Clock) -> None:
    placement.put("p", [Claim("n1", A, "t")])
    placement.put("q", [Claim("n1", B, "t")])
    placement.remove("p")
    assert placement.next_expiry() is None, "one pod is left"
    heard = announced(placement)
    placement.remove("q")
    assert placement.pods("n1") == {}
    assert placement.tenants("n1") == {"t"}
    assert placement.next_expiry() == clock.now + 120
    clock.now += 119
    placement.expire()
    assert placement.tenants("n1") == {"t"}
    clock.now += 1
    placement.expire()
    assert placement.tenants("n1") == frozenset()
    assert placement.next_expiry() is None
    assert heard == ["n1", "n1"]


def test_a_pod_that_comes_back_ends_the_lingering(placement: Told, clock: Clock) -> None:
    placement.put("p", [Claim("n1", A, "t")])
    placement.remove("p")
    clock.now += 60
    placement.put("p", [Claim("n1", A, "t")])
    clock.now += 60
    placement.expire()
    assert placement.tenants("n1") == {"t"}
    placement.remove("p")
    clock.now += 119
    placement.expire()
    assert placement.tenants("n1") == {"t"}, "the linger counts from the second departure"


def test_a_pod_that_moves_leaves_its_tenant_lingering_behind(placement: Told) -> None:
    placement.put("p", [Claim("n1", A, "t")])
    heard = announced(placement)
    placement.put("p", [Claim("n2", A, "t")])
    assert placement.pods("n1") == {}
    assert placement.pods("n2") == {A: "t"}
    assert placement.tenants("n1") == placement.tenants("n2") == {"t"}
    assert heard == ["n1", "n2"]


def test_an_address_of_two_tenants_is_nobodys(placement: Told) -> None:
    placement.put("p", [Claim("n1", A, "t")])
    placement.put("q", [Claim("n1", A, "u")])
    assert placement.pods("n1") == {}
    placement.remove("p")
    assert placement.pods("n1") == {A: "u"}
    placement.put("r", [Claim("n1", A, "u")])
    placement.remove("q")
    assert placement.pods("n1") == {A: "u"}


def test_scopes(placement: Told) -> None:
    heard = announced(placement)
    placement.set_scope("super", Scope.EVERY_NODE)
    assert placement.tenants("anywhere") == {"super"}
    assert heard == [""]
    placement.set_scope("t", Scope.EVERY_NODE_UNTIL_PLACED)
    assert placement.tenants("anywhere") == {"super", "t"}
    placement.put("p", [Claim("n1", A, "t")])
    assert placement.tenants("anywhere") == {"super"}
    assert placement.tenants("n1") == {"super", "t"}
    placement.set_scope("u", Scope.PLACED)
    assert placement.tenants("anywhere") == {"super"}
    placement.remove("p")
    assert placement.tenants("anywhere") == {"super", "t"}, "nothing is known again"
    placement.forget("t")
    assert placement.tenants("anywhere") == {"super"}


def test_ready_is_announced_once(placement: Told) -> None:
    heard = announced(placement)
    assert not placement.ready
    placement.set_ready()
    placement.set_ready()
    assert placement.ready
    assert heard == [""]


def test_a_cancelled_subscription_is_silent(placement: Told) -> None:
    heard: list[str] = []
    cancel = placement.subscribe(heard.append)
    cancel()
    placement.put("p", [Claim("n1", A, "t")])
    assert heard == []


CLAIMS = st.lists(
    st.builds(Claim, st.sampled_from(["n1", "n2"]), st.sampled_from([b"", A, B]), st.sampled_from(["t", "u", "v"])),
    max_size=3,
    unique=True,
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["p", "q", "r"]), CLAIMS), max_size=15))
def test_counts_equal_counting_anew(changes) -> None:
    placement = Told(linger_seconds=0, clock=lambda: 1.0)
    held: dict[str, list[Claim]] = {}
    for source, claims in changes:
        placement.put(source, claims)
        held[source] = claims
    placement.expire()
    for name in ("n1", "n2"):
        here = [claim for claims in held.values() for claim in claims if claim.node == name]
        assert placement.tenants(name) == {claim.tenant for claim in here}
        wanted = {address: {claim.tenant for claim in here if claim.address == address} for address in (A, B)}
        flat = {address: owners for address, owners in wanted.items() if len(owners) == 1}
        assert placement.pods(name) == {address: min(owners) for address, owners in flat.items()}


# --- the super cluster ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "uid"),
    [
        ({}, None),
        ({"vcproxy.dev/tenant": "acme"}, "dir-acme"),
        ({"vcproxy.dev/tenant": ""}, None),
        ({"tenancy.x-k8s.io/cluster": "acme", "tenancy.x-k8s.io/vcname": "a"}, "dir-acme"),
        # A VirtualCluster's control plane is the super cluster's.
        ({"tenancy.x-k8s.io/cluster": "acme"}, None),
        # The syncer copies this label from the tenant: it must not count.
        (
            {
                "tenancy.x-k8s.io/cluster": "acme",
                "tenancy.x-k8s.io/vcname": "a",
                "vcproxy.dev/tenant": "globex",
            },
            "dir-acme",
        ),
        ({"tenancy.x-k8s.io/cluster": "acme", "vcproxy.dev/tenant": "globex"}, None),
        # A vCluster's Pods are for a source of vClusters to attribute: the other labels are the tenant's.
        ({"vcluster.loft.sh/managed-by": "acme"}, None),
        ({"app": "vcluster", "release": "acme"}, None),
        ({"app": "vcluster", "release": "acme", "vcproxy.dev/tenant": "globex"}, None),
        ({"app": "vcluster", "vcproxy.dev/tenant": "globex"}, "dir-globex"),
        ({"vcluster.loft.sh/managed-by": "acme", "vcproxy.dev/tenant": "globex"}, None),
    ],
)
def test_whose_a_super_cluster_pod_is(labels: dict[str, str], uid: str | None) -> None:
    mark = mark_of(pod(labels=labels))
    assert (Owners().owner(mark) if mark is not None else None) == uid


def test_facts_of_a_node() -> None:
    found = node("n1", zone="z", addresses=("192.0.2.2", "2001:db8::2", "bad"), pod_cidrs=("10.1.0.0/24", "worse"))
    assert facts_of_node(found) == NodeFacts(
        "z", (parse_address("192.0.2.2"), parse_address("2001:db8::2")), (parse_prefix("10.1.0.0/24"),)
    )


@pytest.mark.parametrize(
    ("deletion", "taints", "eligible"),
    [
        (None, (), True),
        (None, ("node.kubernetes.io/unschedulable", "DeletionCandidateOfClusterAutoscaler"), True),
        (None, ("node.kubernetes.io/unschedulable", "ToBeDeletedByClusterAutoscaler"), False),
        ("2026-01-01T00:00:00Z", (), False),
    ],
)
def test_a_node_on_its_way_out_is_not_eligible(deletion: str | None, taints: tuple[str, ...], eligible: bool) -> None:
    found = node("n1", deletion=deletion, taints=taints)
    assert facts_of_node(found).eligible is eligible


def test_a_node_without_a_node_object_is_eligible_until_all_nodes_are_known(placement: Told) -> None:
    seen: list[str] = []
    placement.subscribe(seen.append)
    assert placement.facts("n9").eligible, "without a super cluster there are no Nodes"
    placement.demand_nodes()
    assert seen == [""], "it concerns any node"
    placement.put("pod", [Claim("n9", A, "t")])
    assert not placement.facts("n9").eligible
    placement.put_facts("n9", NodeFacts(zone="z"))
    assert placement.facts("n9").eligible
    placement.put_facts("n9", None)
    assert placement.facts("n9") == NodeFacts(eligible=False)


def test_the_internal_address_of_a_node_comes_first() -> None:
    said = tuple(
        shapes.NodeAddress(type=kind, address=address)
        for kind, address in (("Hostname", "n1"), ("ExternalIP", "198.51.100.2"), ("InternalIP", "192.0.2.2"))
    )
    found = shapes.Node(metadata=shapes.NodeMetadata(name="n1"), status=shapes.NodeStatus(addresses=said))
    assert facts_of_node(found).addresses == (parse_address("192.0.2.2"), parse_address("198.51.100.2"))


ACME = {"vcproxy.dev/tenant": "acme"}


def test_addresses_of_nodes_come_move_and_go(placement: Placement) -> None:
    for name, addresses in (("n1", ("192.0.2.1",)), ("n2", ("192.0.2.1", "192.0.2.2")), ("n1", ("192.0.2.3",))):
        placement.put_facts(name, facts_of_node(node(name, addresses=addresses)))
    held = [text for text in ("192.0.2.1", "192.0.2.2", "192.0.2.3") if placement.is_node(parse_address(text))]
    assert held == ["192.0.2.1", "192.0.2.2", "192.0.2.3"]
    placement.put_facts("n2", None)
    assert not placement.is_node(parse_address("192.0.2.1"))
    assert placement.is_node(parse_address("192.0.2.3"))


def test_the_super_clusters_events(placement: Placement) -> None:
    seen = Whereabouts(placement, attribution=Owners())
    seen.take("Node", Listed((node("n1", zone="z"),), ()))
    assert seen.listed == {"Node"}
    assert placement.facts("n1").zone == "z"
    assert placement.node_names() == {name_id("n1"): "n1"}
    seen.take("Pod", Listed((pod("a", labels=ACME), pod("b", ips=("10.0.0.2",))), ()))
    assert seen.listed == {"Node", "Pod"}
    assert placement.pods("n1") == {A: "dir-acme"}
    seen.take("Pod", Upserted(pod("b", ips=("10.0.0.2",), labels=ACME)))
    assert set(placement.pods("n1")) == {A, B}
    seen.take("Pod", Deleted(("default", "a"), ""))
    assert set(placement.pods("n1")) == {B}
    seen.take("Node", Upserted(node("n1", zone="y")))
    assert placement.facts("n1").zone == "y"
    seen.take("Node", Deleted(("", "n1"), ""))
    assert placement.facts("n1") == NodeFacts()


def test_a_list_takes_away_but_not_what_could_not_be_read(placement: Placement) -> None:
    seen = Whereabouts(placement, attribution=Owners())
    seen.take("Pod", Listed((pod("a", labels=ACME), pod("b", ips=("10.0.0.2",), labels=ACME)), ()))

    def bad(key):
        return ShapeError(tenant="super", kind="Pod", key=key, field="$.spec", reason="bad")

    seen.take("Pod", Listed((), (bad(("default", "a")),)))
    assert set(placement.pods("n1")) == {A}
    seen.take("Pod", Malformed(bad(("default", "a"))))
    seen.take("Pod", Listed((), (bad(None),)))
    assert set(placement.pods("n1")) == {A}
    seen.take("Pod", Listed((), ()))
    assert placement.pods("n1") == {}


# --- who owns a mark may be known later -------------------------------------------------------------------------------

SYNCED = {"tenancy.x-k8s.io/cluster": "key", "tenancy.x-k8s.io/vcname": "a"}
MARK = (VIRTUAL_CLUSTER, "default", "key")


def test_an_owner_that_is_told_later_takes_the_pods_over(placement: Placement) -> None:
    owners = Owners([VIRTUAL_CLUSTER])
    seen = Whereabouts(placement, attribution=owners)
    seen.take("Pod", Listed((pod("a", labels=SYNCED), pod("b", ips=("10.0.0.2",), labels=ACME)), ()))
    assert placement.pods("n1") == {B: "dir-acme"}, "what a source speaks for is nobody's until it has spoken"
    owners.set(MARK, "u1")
    assert placement.pods("n1") == {A: "u1", B: "dir-acme"}
    seen.take("Pod", Upserted(pod("c", ips=("10.0.0.3",), labels=SYNCED)))
    assert placement.pods("n1")[parse_address("10.0.0.3")] == "u1"
    owners.set(MARK, "u2")
    assert set(placement.pods("n1").values()) == {"u2", "dir-acme"}
    owners.set(MARK, None)
    assert placement.pods("n1") == {B: "dir-acme"}


def test_a_pod_event_and_an_owner_cost_what_they_concern(placement: Placement) -> None:
    owners = Owners([VIRTUAL_CLUSTER])
    seen = Whereabouts(placement, attribution=owners)
    others = [
        pod(f"p{n}", node=f"m{n}", namespace=f"ns{n}", ips=(f"10.1.0.{n}",), labels=SYNCED) for n in range(1, 100)
    ]
    seen.take("Pod", Listed((*others, pod("a", labels=SYNCED)), ()))
    told: list[str] = []
    cancel = placement.subscribe(told.append)
    owners.set(MARK, "u1")
    assert set(told) == {"n1"}
    told.clear()
    seen.take("Pod", Upserted(pod("a", ips=("10.0.0.2",), labels=SYNCED)))
    assert set(told) == {"n1"}
    cancel()


def test_a_pod_that_changes_its_mark_changes_hands(placement: Placement) -> None:
    owners = Owners()
    seen = Whereabouts(placement, attribution=owners)
    seen.take("Pod", Upserted(pod("a", labels=ACME)))
    seen.take("Pod", Upserted(pod("a", labels={"vcproxy.dev/tenant": "globex"})))
    assert placement.pods("n1") == {A: "dir-globex"}
    owners.set((NAME, "acme"), "u1")
    assert placement.pods("n1") == {A: "dir-globex"}, "the old mark's owner has no say any more"
    assert placement.tenants("n1") == {"dir-acme", "dir-globex"}, "the former lingers"
    seen.take("Pod", Upserted(pod("a", labels={"tenancy.x-k8s.io/cluster": "root"})))
    assert placement.pods("n1") == {}
    seen.take("Pod", Upserted(pod("a", labels={"vcproxy.dev/tenant": "globex"})))
    assert placement.pods("n1") == {A: "dir-globex"}
    seen.take("Pod", Upserted(pod("a", labels=ACME, phase="Succeeded")))
    assert placement.pods("n1") == {}


def test_pods_of_a_control_plane_are_vouched_for_and_not_placed(placement: Placement) -> None:
    owners, vouched = Owners(), Vouched()
    told: list[str] = []
    vouched.subscribe(told.append)
    seen = Whereabouts(placement, attribution=owners, vouched=vouched)
    root = pod("apiserver-0", namespace="root", labels={"tenancy.x-k8s.io/cluster": "root"})
    seen.take("Pod", Upserted(root))
    assert vouched.api_servers("u1") == frozenset()
    owners.set((CONTROL_PLANE, "root"), "u1")
    assert vouched.api_servers("u1") == {A}
    seen.take("Pod", Upserted(pod("apiserver-1", namespace="root", ips=("10.0.0.2",), labels=root.metadata.labels)))
    seen.take("Pod", Deleted(("root", "apiserver-0"), ""))
    assert vouched.api_servers("u1") == {B}
    assert placement.pods("n1") == {}
    owners.set((CONTROL_PLANE, "root"), None)
    assert vouched.api_servers("u1") == frozenset()
    assert told == ["u1"] * 4


ROOT = {"tenancy.x-k8s.io/cluster": "root"}
STEPS = st.one_of(
    st.tuples(
        st.just("pod"),
        st.sampled_from("abc"),
        st.sampled_from(["10.0.0.1", "10.0.0.2", ""]),
        st.sampled_from([{}, ACME, SYNCED, ROOT]),
    ),
    st.tuples(st.just("gone"), st.sampled_from("abc")),
    st.tuples(
        st.just("owner"),
        st.sampled_from([MARK, (CONTROL_PLANE, "default"), (NAME, "acme")]),
        st.sampled_from(["u1", "u2", None]),
    ),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(STEPS, max_size=20))
def test_events_and_owners_in_any_order_equal_reading_anew(steps) -> None:
    def world() -> tuple[Placement, Vouched, Owners, Whereabouts]:
        placement, vouched = Placement(linger_seconds=0, clock=lambda: 1.0), Vouched()
        owners = Owners([VIRTUAL_CLUSTER])
        return placement, vouched, owners, Whereabouts(placement, attribution=owners, vouched=vouched)

    placement, vouched, owners, seen = world()
    pods: dict[str, shapes.Pod] = {}
    said: dict[Any, str | None] = {}
    for step in steps:
        if step[0] == "pod":
            _, name, address, labels = step
            pods[name] = pod(name, ips=(address,) if address else (), labels=labels)
            seen.take("Pod", Upserted(pods[name]))
        elif step[0] == "gone":
            pods.pop(step[1], None)
            seen.take("Pod", Deleted(("default", step[1]), ""))
        else:
            said[step[1]] = step[2]
            owners.set(step[1], step[2])
    placement.expire()
    fresh, freshly_vouched, owners, seen = world()
    for mark, uid in said.items():
        owners.set(mark, uid)
    seen.take("Pod", Listed(tuple(pods.values()), ()))
    assert placement.pods("n1") == fresh.pods("n1")
    assert placement.tenants("n1") == fresh.tenants("n1")
    for uid in ("u1", "u2", "dir-acme"):
        assert vouched.api_servers(uid) == freshly_vouched.api_servers(uid)


# --- tenants that say it themselves -----------------------------------------------------------------------------------


def test_slices_place_a_tenant_until_there_are_pods(placement: Placement) -> None:
    placed = SelfPlaced(placement, "dir-acme")
    said = {"addresses": ["10.0.0.1"], "nodeName": "n1"}
    nowhere = {"addresses": ["10.0.0.9"]}
    found = endpoint_slice(endpoints=[said, nowhere])
    assert slice_claims(found, "t") == (Claim("n1", A, "t"),)
    placed.take("EndpointSlice", Listed((found,), ()))
    assert not placed.listed
    placed.take("Pod", Listed((), ()))
    assert placed.listed
    assert placement.pods("n1") == {A: "dir-acme"}
    placed.take("Pod", Upserted(pod("a", node="n2", ips=("10.0.0.2",))))
    assert placement.pods("n1") == {}
    assert placement.pods("n2") == {B: "dir-acme"}
    placed.take("EndpointSlice", Upserted(endpoint_slice(endpoints=[said], name="other")))
    assert placement.pods("n1") == {}
    placed.take("Pod", Deleted(("default", "a"), ""))
    assert placement.pods("n1") == {A: "dir-acme"}
    placed.take("EndpointSlice", Deleted(("default", "web-1"), ""))
    assert placement.pods("n1") == {A: "dir-acme"}, "the other slice says so too"
    placed.take("EndpointSlice", Listed((), ()))
    assert placement.pods("n1") == {}
    placed.take("EndpointSlice", Upserted(found))
    placed.take("Node", Listed((node("n1", zone="z"),), ()))
    placed.clear()
    assert placement.pods("n1") == {}
    assert placement.facts("n1") == NodeFacts()
