"""Whose an endpoint's address is, by the super cluster's Pods and Nodes alone."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.brain.kinds import endpoint_slice, node, pod, service
from vcproxy.brain.compiler import Compiler, compile_service
from vcproxy.brain.guard import UNRESTRICTED, Policy, Reason
from vcproxy.brain.ownership import Ownership
from vcproxy.brain.placement import Claim, Placement
from vcproxy.brain.restriction import restrict
from vcproxy.brain.sources.attribution import Owners
from vcproxy.brain.sources.supercluster import Whereabouts
from vcproxy.kube.reflector import Deleted, Listed, Upserted
from vcproxy.model.addresses import format_target, parse_address, parse_prefix
from vcproxy.model.endpoints import unpack
from vcproxy.model.tenant import TenantModel

OWN = msgspec.structs.replace(
    UNRESTRICTED, own_pods_only=True, deny_nodes=True, deny_other_pods=True, unique_addresses=True
)
ANY = msgspec.structs.replace(OWN, own_pods_only=False)
DEFAULT = msgspec.structs.replace(OWN, unique_addresses=False)
ACME, GLOBEX = {"vcproxy.dev/tenant": "acme"}, {"vcproxy.dev/tenant": "globex"}
UID, OTHER = "dir-acme", "dir-globex"


class Super:
    """A super cluster that a test plays by hand."""

    def __init__(self) -> None:
        self.ownership = Ownership()
        self.placement = Placement()
        self.whereabouts = Whereabouts(self.ownership.reading(self.placement), attribution=Owners())
        self.ownership.set_known()

    def runs(self, *pods) -> None:
        for found in pods:
            self.whereabouts.take("Pod", Upserted(found))

    def gone(self, name: str) -> None:
        self.whereabouts.take("Pod", Deleted(("default", name), ""))

    def judge(self, text: str, policy: Policy = OWN, uid: str = UID, service=("default", "web")) -> Reason | None:
        address = parse_address(text)
        return self.ownership.rights(uid, policy).refused([address], service).get(address)


@pytest.fixture
def cluster() -> Super:
    return Super()


def test_a_pod_of_the_tenant_and_nobody_elses(cluster: Super) -> None:
    cluster.runs(pod("a", ips=("10.0.0.1", "fd00::1"), labels=ACME), pod("b", ips=("10.0.0.2",), labels=GLOBEX))
    assert cluster.judge("10.0.0.1") is None
    assert cluster.judge("fd00::1") is None
    assert cluster.judge("10.0.0.1", uid=OTHER) is Reason.OTHER_TENANTS_POD
    assert cluster.judge("10.0.0.2") is Reason.OTHER_TENANTS_POD
    assert cluster.judge("10.0.0.3") is Reason.NOT_OWN_POD


def test_a_pod_that_ends_takes_its_right_along(cluster: Super) -> None:
    cluster.runs(pod("a", labels=ACME))
    assert cluster.judge("10.0.0.1") is None
    cluster.runs(pod("a", labels=ACME, phase="Succeeded"))
    assert cluster.judge("10.0.0.1") is Reason.NOT_OWN_POD
    cluster.runs(pod("a", labels=ACME, ips=("10.0.0.9",)))
    assert (cluster.judge("10.0.0.1"), cluster.judge("10.0.0.9")) == (Reason.NOT_OWN_POD, None)
    cluster.whereabouts.take("Pod", Listed((), ()))
    assert cluster.judge("10.0.0.9") is Reason.NOT_OWN_POD


def test_an_address_that_is_taken_over_is_nobodys_until_its_former_owner_is_gone(cluster: Super) -> None:
    cluster.runs(pod("a", labels=ACME), pod("b", labels=GLOBEX))
    assert cluster.judge("10.0.0.1") is Reason.OTHER_TENANTS_POD
    assert cluster.judge("10.0.0.1", uid=OTHER) is Reason.OTHER_TENANTS_POD
    assert cluster.judge("10.0.0.1", ANY) is Reason.OTHER_TENANTS_POD
    cluster.gone("a")
    assert cluster.judge("10.0.0.1") is Reason.OTHER_TENANTS_POD
    assert cluster.judge("10.0.0.1", uid=OTHER) is None


def test_in_networks_of_their_own_both_have_it(cluster: Super) -> None:
    own = msgspec.structs.replace(DEFAULT, shared_network=False)
    cluster.runs(pod("a", labels=ACME), pod("b", labels=GLOBEX))
    assert cluster.judge("10.0.0.1", own) is None
    assert cluster.judge("10.0.0.1", own, uid=OTHER) is None
    assert cluster.judge("10.0.0.1", own, uid="dir-third") is Reason.NOT_OWN_POD
    cluster.gone("a")
    assert cluster.judge("10.0.0.1", own) is Reason.NOT_OWN_POD


def test_where_nobody_says_what_networks_there_are_a_tenant_has_its_own_pods_and_no_others(cluster: Super) -> None:
    cluster.runs(pod("a", labels=ACME), pod("b", labels=GLOBEX), pod("c", ips=("10.0.0.2",), labels=GLOBEX))
    assert cluster.judge("10.0.0.1", DEFAULT) is None
    assert cluster.judge("10.0.0.1", DEFAULT, uid=OTHER) is None
    assert cluster.judge("10.0.0.1", DEFAULT, uid="dir-third") is Reason.OTHER_TENANTS_POD
    assert cluster.judge("10.0.0.2", DEFAULT) is Reason.OTHER_TENANTS_POD


def test_two_pods_of_one_tenant_on_one_address(cluster: Super) -> None:
    """As a Pod that replaces another of the same tenant does for a moment."""
    cluster.runs(pod("a", labels=ACME), pod("b", labels=ACME))
    assert cluster.judge("10.0.0.1") is None
    cluster.gone("a")
    assert cluster.judge("10.0.0.1") is None
    cluster.gone("b")
    assert cluster.judge("10.0.0.1") is Reason.NOT_OWN_POD


@pytest.mark.parametrize("policy", [OWN, ANY])
def test_nodes_are_denied_whatever_is_granted(cluster: Super, policy: Policy) -> None:
    cluster.whereabouts.take("Node", Upserted(node("n1", addresses=("192.168.0.1",))))
    wide = msgspec.structs.replace(policy, egress=(parse_prefix("0.0.0.0/0"),))
    assert cluster.judge("192.168.0.1", wide) is Reason.NODE_ADDRESS
    assert cluster.judge("192.168.0.2", wide) is None
    assert cluster.judge("192.168.0.1", msgspec.structs.replace(wide, deny_nodes=False)) is None
    cluster.whereabouts.take("Node", Deleted(("", "n1"), ""))
    assert cluster.judge("192.168.0.1", wide) is None


def test_egress_and_denied_ranges(cluster: Super) -> None:
    cluster.runs(pod("a", labels=ACME))
    policy = msgspec.structs.replace(
        OWN,
        egress=(parse_prefix("203.0.113.0/24"),),
        denied_ranges=(parse_prefix("203.0.113.8/29"), parse_prefix("10.0.0.0/8")),
    )
    assert cluster.judge("203.0.113.1", policy) is None
    assert cluster.judge("203.0.113.9", policy) is Reason.DENIED_RANGE
    assert cluster.judge("198.51.100.1", policy) is Reason.NOT_OWN_POD
    assert cluster.judge("10.0.0.1", policy) is None, "the tenant's own pod, wherever pods are"


def test_the_tenants_own_api_server_for_the_one_service(cluster: Super) -> None:
    cluster.ownership.put_api_servers(UID, frozenset((parse_address("10.9.0.1"),)))
    assert cluster.judge("10.9.0.1", service=("default", "kubernetes")) is None
    assert cluster.judge("10.9.0.1", service=("default", "web")) is Reason.NOT_OWN_POD
    assert cluster.judge("10.9.0.1", uid=OTHER, service=("default", "kubernetes")) is Reason.NOT_OWN_POD
    cluster.ownership.put_api_servers(UID, frozenset())
    assert cluster.judge("10.9.0.1", service=("default", "kubernetes")) is Reason.NOT_OWN_POD


def test_a_host_network_pod_and_one_of_nobody_have_no_say(cluster: Super) -> None:
    cluster.runs(pod("a", labels=ACME, host_network=True), pod("b", ips=("10.0.0.2",)))
    assert cluster.judge("10.0.0.1") is Reason.NOT_OWN_POD
    assert cluster.judge("10.0.0.2") is Reason.NOT_OWN_POD


def test_who_is_told_of_a_change(cluster: Super) -> None:
    told: list[tuple[str, str]] = []
    for uid, policy in ((UID, OWN), (OTHER, OWN), ("dir-any", ANY)):
        rights = cluster.ownership.rights(uid, policy)
        rights.reconsider = lambda address, uid=uid: told.append((uid, address.hex()))
    cluster.runs(pod("a", labels=ACME))
    assert sorted(told) == [("dir-acme", "0a000001"), ("dir-any", "0a000001")]
    told.clear()
    cluster.runs(pod("a", labels=ACME))
    assert told == [], "nothing changed"
    cluster.runs(pod("a", labels=GLOBEX))
    assert sorted(told) == [("dir-acme", "0a000001"), ("dir-any", "0a000001"), ("dir-globex", "0a000001")]


# --- with the compiler ------------------------------------------------------------------------------------------------


def targets(model: TenantModel) -> list[str]:
    return [format_target(one.address, one.port) for port in model for one in unpack(port.endpoints4, 4)]


class Tenant:
    """A compiler that is told of rights, and the model that its changes add up to."""

    def __init__(self, cluster: Super, policy: Policy = OWN) -> None:
        self.rights = cluster.ownership.rights(UID, policy)
        self.doubtful: set[bytes] = set()
        self.rights.reconsider = self.doubtful.add
        self.noticed: list[object] = []
        self.compiler = Compiler(policy, rights=self.rights, noticed=self.noticed.append)
        self.model = TenantModel()
        for kind in ("Service", "EndpointSlice"):
            self.compiler.listed(kind)

    def settle(self) -> set[str]:
        """Returns the services whose ports were compiled for rights alone."""
        addresses = set(self.doubtful)
        self.doubtful.clear()
        change = self.compiler.reconsider(addresses)
        self._apply(change)
        return {port.key.service for port in change.put}

    def flush(self) -> None:
        self._apply(self.compiler.flush())

    def _apply(self, change) -> None:
        for key in change.removed:
            self.model.remove(key)
        for port in change.put:
            self.model.put(port)


def test_an_endpoint_waits_for_its_pod_and_goes_with_it(cluster: Super) -> None:
    tenant = Tenant(cluster)
    tenant.compiler.put(service())
    tenant.compiler.put(endpoint_slice(["10.0.0.1", "10.0.0.2"]))
    tenant.flush()
    assert targets(tenant.model) == []
    (waits,) = tenant.compiler.explain("default", "web")
    assert (waits.reason, waits.count, waits.value) == (Reason.NOT_OWN_POD, 2, "10.0.0.1")
    assert [(held, found[-1], why) for held, found, why in tenant.compiler.denied("default", "web")] == [
        ("web-1", number, Reason.NOT_OWN_POD) for number in (1, 2)
    ]
    cluster.runs(pod("a", labels=ACME))
    assert tenant.settle() == {"web"}
    assert targets(tenant.model) == ["10.0.0.1:8080"]
    cluster.runs(pod("b", ips=("10.0.0.2",), labels=ACME))
    tenant.settle()
    assert targets(tenant.model) == ["10.0.0.1:8080", "10.0.0.2:8080"]
    assert tenant.compiler.explain("default", "web") == ()
    cluster.gone("a")
    tenant.settle()
    assert targets(tenant.model) == ["10.0.0.2:8080"]


def test_one_pod_concerns_the_services_that_lead_to_it(cluster: Super) -> None:
    tenant = Tenant(cluster)
    for number in range(100):
        tenant.compiler.put(service(f"s{number}"))
        tenant.compiler.put(endpoint_slice([f"10.0.1.{number}"], name=f"s{number}-1", service=f"s{number}"))
    tenant.flush()
    cluster.runs(pod("a", ips=("10.0.1.7",), labels=ACME))
    assert tenant.settle() == {"s7"}
    cluster.runs(pod("x", ips=("10.9.9.9",), labels=ACME))
    assert tenant.settle() == set()


def test_a_right_that_is_lost_does_not_wait_for_other_changes(cluster: Super) -> None:
    tenant = Tenant(cluster)
    cluster.runs(pod("a", labels=ACME))
    tenant.settle()
    tenant.compiler.put(service())
    tenant.compiler.put(endpoint_slice(["10.0.0.1"]))
    tenant.flush()
    for number in range(100):
        tenant.compiler.put(service(f"flood-{number}"))
    cluster.gone("a")
    assert tenant.settle() == {"web"}
    assert targets(tenant.model) == []


def test_what_a_slice_said_wrong_is_still_told_after_its_pods_came(cluster: Super) -> None:
    tenant = Tenant(cluster)
    tenant.compiler.put(service())
    tenant.compiler.put(endpoint_slice(["127.0.0.1", "10.0.0.1"]))
    assert {said.reason for said in tenant.compiler.refusals()} == {Reason.NEVER_ALLOWED, Reason.NOT_OWN_POD}
    cluster.runs(pod("a", labels=ACME))
    tenant.settle()
    assert {said.reason for said in tenant.compiler.refusals()} == {Reason.NEVER_ALLOWED}


SERVICES = st.sampled_from(["a", "b"])
ADDRESSES = st.sampled_from([f"10.0.0.{n}" for n in range(1, 6)] + ["192.168.0.1"])
TENANTS = st.sampled_from([ACME, GLOBEX, {}])
ZONES = st.sampled_from([None, "z1", "z2"])
ENDPOINTS = st.lists(
    st.builds(
        lambda address, zone: {
            "addresses": [address],
            **({"hints": {"forZones": [{"name": zone}]}} if zone else {}),
        },
        ADDRESSES,
        ZONES,
    ),
    max_size=4,
)
STEPS = st.one_of(
    st.tuples(st.just("service"), SERVICES),
    st.tuples(st.just("slice"), SERVICES, st.sampled_from(["1", "2"]), ENDPOINTS),
    st.tuples(st.just("unslice"), st.sampled_from(["1", "2"])),
    st.tuples(
        st.just("pod"), st.sampled_from(["p", "q", "r"]), ADDRESSES, TENANTS, st.sampled_from(["Running", "Failed"])
    ),
    st.tuples(st.just("unpod"), st.sampled_from(["p", "q", "r"])),
    st.tuples(st.just("node"), st.booleans()),
    st.tuples(
        st.just("settle"),
    ),
    st.tuples(
        st.just("flush"),
    ),
)


@settings(max_examples=300)
@given(
    st.lists(STEPS, max_size=40),
    st.sampled_from([OWN, ANY, DEFAULT, msgspec.structs.replace(DEFAULT, shared_network=False)]),
)
def test_incremental_equals_full(steps, policy: Policy) -> None:
    """After any sequence of the tenant's and the super cluster's events, in any order of taking note of them."""
    cluster = Super()
    tenant = Tenant(cluster, policy)
    services: dict[str, object] = {}
    slices: dict[str, object] = {}
    for step in [*steps, ("settle",), ("flush",)]:
        match step:
            case ("service", name):
                services[name] = service(name)
                tenant.compiler.put(services[name])
            case ("slice", name, number, endpoints):
                slices[number] = endpoint_slice(name=number, service=name, endpoints=endpoints)
                tenant.compiler.put(slices[number])
            case ("unslice", number):
                slices.pop(number, None)
                tenant.compiler.delete("EndpointSlice", ("default", number))
            case ("pod", name, address, labels, phase):
                cluster.runs(pod(name, ips=(address,), labels=labels, phase=phase))
            case ("unpod", name):
                cluster.gone(name)
            case ("node", True):
                cluster.whereabouts.take("Node", Upserted(node("n1", addresses=("192.168.0.1", "10.0.0.5"))))
            case ("node", False):
                cluster.whereabouts.take("Node", Deleted(("", "n1"), ""))
            case ("settle",):
                tenant.settle()
            case ("flush",):
                tenant.flush()
    full = [compile_service(found, slices.values(), policy, tenant.rights) for found in services.values()]
    anew = TenantModel(port for compiled in full for port in compiled.ports)
    assert tenant.model.ports == anew.ports
    assert tenant.model.digest == anew.digest
    said = {
        (one.namespace, one.name, one.reason, one.value, one.count) for compiled in full for one in compiled.refusals
    }
    held = {(one.namespace, one.name, one.reason, one.value, one.count) for one in tenant.compiler.refusals()}
    orphans = {
        found.key for found in slices.values() if found.metadata.labels["kubernetes.io/service-name"] not in services
    }
    assert {one for one in held if one[:2] not in orphans} == said


@settings(max_examples=200)
@given(st.lists(STEPS, max_size=25), st.lists(STEPS, max_size=10))
def test_what_is_left_after_a_restriction_is_what_compiling_anew_would_give(before, after) -> None:
    """Of one slice a service: what several slices say of one address is not to be told apart once it is compiled."""
    cluster = Super()
    tenant = Tenant(cluster, UNRESTRICTED)
    slices: dict[str, object] = {}
    for step in before:
        if step[0] == "slice":
            slices[step[1]] = endpoint_slice(name=step[1], service=step[1], endpoints=step[3])
            tenant.compiler.put(slices[step[1]])
    for name in ("a", "b"):
        tenant.compiler.put(service(name))
    tenant.flush()
    for step in after:
        if step[0] == "pod":
            cluster.runs(pod(step[1], ips=(step[2],), labels=step[3]))
    rights = cluster.ownership.rights(UID, OWN)
    change = restrict(tenant.model, UNRESTRICTED, OWN, rights)
    for port in change.put:
        tenant.model.put(port)
    assert not change.removed
    full = [compile_service(service(name), slices.values(), OWN, rights) for name in ("a", "b")]
    assert tenant.model.ports == TenantModel(port for compiled in full for port in compiled.ports).ports
    assert restrict(tenant.model, OWN, OWN, rights) == ([], [])


def test_claims_without_address_count_for_nobody() -> None:
    ownership = Ownership()
    claims = (Claim("n1", b"", UID),)
    ownership.move((), claims)
    ownership.move(claims, ())
    assert ownership.judge(b"", UID, OWN, api_server=False) is Reason.NOT_OWN_POD
