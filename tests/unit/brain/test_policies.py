"""Grants by tenant: overrides, TenantPolicies of the super cluster, and what tenants are told."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.fakes import apiserver
from tests.fakes.apiserver import FakeApiServer, Fault, fail
from tests.unit.brain.polling import settle, until
from vcproxy.brain.announcer import BURST, PAUSE_SECONDS, WAITING, Announcer
from vcproxy.brain.config import BrainConfiguration, Limits, PolicyPatch
from vcproxy.brain.grants import Grants
from vcproxy.brain.guard import CURES, KUBERNETES_PORTS, PortRange, Reason, Refusal
from vcproxy.brain.inputs import ApiInput
from vcproxy.brain.policies import PATH, TENANT_POLICIES, Policies
from vcproxy.brain.sources import TenantFound
from vcproxy.kube.client import Client
from vcproxy.kube.client import Limits as ClientLimits
from vcproxy.ops.configfile import ConfigError, parse

ACME = TenantFound("vc-1", "acme", None, namespace="customers", labels={"tier": "gold"})
GLOBEX = TenantFound("vc-2", "globex", None, namespace="customers")


def grants(text: str, *, vouches: bool = True) -> Grants:
    head = "apiVersion: vcproxy.dev/v1alpha1\nkind: BrainConfiguration\n"
    return Grants(parse(head + text, BrainConfiguration, source="brain.yaml").tenants, vouches=vouches)


def test_later_overrides_change_only_what_they_say() -> None:
    made = grants("""
tenants:
  policy: {nodePorts: true, limits: {services: 7, endpoints: 8}}
  overrides:
  - match: {namespace: customers}
    policy: {limits: {services: 9}, egress: [203.0.113.0/24]}
  - match: {name: acme, labels: {tier: gold}}
    policy: {nodePorts: [31000-31099, "32000"], healthCheckNodePorts: false}
  - match: {uid: vc-2}
    policy: {backends: any, podNetwork: own}
""")
    acme, globex = made.of(ACME).policy, made.of(GLOBEX).policy
    assert acme.node_ports == (PortRange(31000, 31099), PortRange(32000, 32000))
    assert acme.health_check_node_ports == ()
    assert acme.own_pods_only
    assert globex.node_ports == globex.health_check_node_ports == KUBERNETES_PORTS
    assert (globex.own_pods_only, globex.shared_network) == (False, False)
    assert acme.limits is not None
    assert (acme.limits.services, acme.limits.endpoints) == (9, 8)
    assert [str(prefix) for prefix in acme.egress] == ["203.0.113.0/24"]
    assert made.of(TenantFound("x", "acme", None)).policy.limits.services == 7


@pytest.mark.parametrize(("strict", "vouches", "own"), [(True, True, True), (False, True, False), (True, False, False)])
def test_whose_endpoints_must_be_pods_by_default(strict: bool, vouches: bool, own: bool) -> None:
    found = TenantFound("x", "x", None, strict=strict)
    assert grants("", vouches=vouches).of(found).policy.own_pods_only is own


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tenants: {policy: {egress: [10.0.0.0/33]}}", r"^brain.yaml:3: tenants.policy.egress\[0\]: .* not a CIDR"),
        ("tenants: {policy: {nodePorts: [2-1]}}", r"brain.yaml:3: tenants.policy.nodePorts\[0\]: .* range of ports"),
        (
            "tenants:\n  overrides:\n  - match: {}\n    policy: {limits: {services: -1}}",
            r"brain.yaml:6: .*limits.services",
        ),
        (
            "tenants:\n  overrides:\n  - match: {nme: a}\n    policy: {}",
            r"brain.yaml:5: tenants.overrides\[0\].match.nme",
        ),
    ],
)
def test_errors_name_file_line_and_field(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        grants(text)


def test_same_tenant_pods_need_somebody_who_tells_of_pods() -> None:
    with pytest.raises(ConfigError, match=r"overrides\[0\]\.policy\.backends: sameTenantPods needs"):
        grants("tenants: {overrides: [{match: {}, policy: {backends: sameTenantPods}}]}", vouches=False)


def test_the_definition_has_the_fields_of_the_configuration() -> None:
    definition = yaml.safe_load(Path("deploy/tenantpolicy.yaml").read_text())
    version = definition["spec"]["versions"][0]
    policy = version["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]["policy"]["properties"]
    assert set(policy) == set(PolicyPatch.__struct_encode_fields__)
    assert set(policy["limits"]["properties"]) == set(Limits.__struct_encode_fields__)


# --- in the super cluster ---------------------------------------------------------------------------------------------


class Followed:
    """TenantPolicies of a fake super cluster."""

    def __init__(self, api: FakeApiServer, group: asyncio.TaskGroup) -> None:
        self.changes = 0
        made = grants("")
        self.input = ApiInput(api.credentials, tenant="super", resources=(TENANT_POLICIES,), limits=ClientLimits())
        self.policies = Policies(
            judge=made.problem, matched=lambda _: 3, patch=self.input.request, changed=self._changed, pause=0
        )
        self.tasks = [
            group.create_task(self.input.run(lambda _, event: self.policies.take(event))),
            group.create_task(self.policies.run()),
        ]

    def _changed(self) -> None:
        self.changes += 1

    def stop(self) -> None:
        for task in self.tasks:
            task.cancel()


def policy(name: str, **spec: Any) -> dict[str, Any]:
    return {"metadata": {"name": name, "generation": 2}, "spec": {"match": {}, "policy": {}, **spec}}


async def test_without_the_definition_there_are_none() -> None:
    async with FakeApiServer() as api, asyncio.TaskGroup() as group:
        found = Followed(api, group)
        await until(lambda: found.policies.known)
        assert (found.policies.overrides, found.policies.problems()) == ({}, [])
        found.stop()


async def test_who_may_not_read_them_goes_on_without_and_says_so() -> None:
    async with FakeApiServer() as api, asyncio.TaskGroup() as group:
        api.faults.append(Fault(fail(403), path=PATH))
        found = Followed(api, group)
        await until(lambda: found.policies.known)
        assert found.policies.problems()[0][0] == "TenantPolicies"
        found.stop()


async def test_a_super_cluster_that_is_away_may_have_any() -> None:
    async with FakeApiServer() as api, asyncio.TaskGroup() as group:
        api.faults.append(Fault(fail(503), path=PATH, times=1))
        found = Followed(api, group)
        await until(lambda: bool(found.policies.problems()))
        assert not found.policies.known
        found.stop()


async def test_a_bad_one_keeps_its_last_good_form_and_its_status_says_why() -> None:
    async with FakeApiServer() as api, asyncio.TaskGroup() as group:
        api.define("TenantPolicy", PATH)
        api.put("TenantPolicy", policy("a", policy={"nodePorts": True}), path=PATH)
        found = Followed(api, group)

        def status() -> dict[str, Any]:
            said: dict[str, Any] = api.objects("TenantPolicy", path=PATH)[0].get("status", {})
            return said

        await until(lambda: status() == {"observedGeneration": 2, "matchedTenants": 3, "problems": []})
        before = found.policies.overrides["a"]
        api.put("TenantPolicy", policy("a", policy={"nodePorts": ["x"]}), path=PATH)
        await until(lambda: bool(status().get("problems")))
        assert status()["problems"][0].startswith("spec.policy.nodePorts[0]: ")
        assert found.policies.overrides["a"] == before
        api.delete("TenantPolicy", "", "a", path=PATH)
        await until(lambda: not found.policies.overrides)
        found.stop()


# --- what the tenant is told ------------------------------------------------------------------------------------------


def refusal(name: str = "web", reason: Reason = Reason.OTHER_TENANTS_POD) -> Refusal:
    field = "endpoints[].addresses"
    return Refusal("EndpointSlice", "default", name, field, reason, "10.0.0.9", 2, CURES[reason], "u-1")


class Telling:
    """An announcer over a fake server, and a clock that only waits move."""

    def __init__(self, client: Client) -> None:
        self.now = 0.0
        self.waits: list[float] = []
        self.announcer = Announcer(
            client.request, tenant="acme", instance="b", clock=lambda: self.now, wall=lambda: 1e9, sleep=self._sleep
        )

    async def _sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds
        await asyncio.sleep(0)


async def test_a_tenant_is_told_once_and_then_counted_and_not_whose_the_address_is() -> None:
    async with FakeApiServer() as api, Client(api.credentials, tenant="acme") as client, asyncio.TaskGroup() as group:
        telling = Telling(client)
        task = group.create_task(telling.announcer.run())
        telling.announcer.tell(refusal())
        await until(lambda: bool(api.objects("Event")))
        (event,) = api.objects("Event")
        assert event["involvedObject"] == {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "namespace": "default",
            "name": "web",
            "uid": "u-1",
        }
        assert "not-own-pod" in event["message"]
        assert "other" not in event["message"]
        telling.announcer.tell(refusal())
        await until(lambda: api.objects("Event")[0]["count"] == 2)
        task.cancel()


@pytest.mark.parametrize("answer", [apiserver.hang(), apiserver.drip(), apiserver.cut(), apiserver.html(200)])
async def test_a_server_that_lies_about_events_holds_up_nothing_but_events(answer: apiserver.Answer) -> None:
    limits = ClientLimits(request_seconds=0.1)
    async with (
        FakeApiServer() as api,
        Client(api.credentials, tenant="acme", limits=limits) as client,
        asyncio.TaskGroup() as group,
    ):
        api.faults.append(Fault(answer, verb="POST", times=2))
        telling = Telling(client)
        task = group.create_task(telling.announcer.run())
        numbers = itertools.count()

        def one_arrived() -> bool:
            # On a busy machine a few more requests than the two that are answered with lies may be late.
            telling.announcer.tell(refusal(f"s{next(numbers)}"))  # never blocks
            return bool(api.objects("Event"))

        await until(one_arrived)
        event = api.objects("Event")[0]
        assert event["involvedObject"]["name"] not in ("s0", "s1")
        task.cancel()


async def test_a_fault_of_ours_ends_no_more_than_one_event() -> None:
    said: list[str] = []

    async def request(method: str, path: str, **_: Any) -> bytes:
        said.append(method)
        raise RuntimeError("a bug")

    async with asyncio.TaskGroup() as group:
        announcer = Announcer(request, tenant="acme", instance="b")
        task = group.create_task(announcer.run())
        for name in ("a", "b"):
            announcer.tell(refusal(name))
        await until(lambda: len(said) == 2)
        task.cancel()


async def test_a_flood_of_refusals_is_rationed_and_bounded() -> None:
    async with FakeApiServer() as api, Client(api.credentials, tenant="acme") as client, asyncio.TaskGroup() as group:
        telling = Telling(client)
        for number in range(10_000):
            telling.announcer.tell(refusal(f"s{number}"))
        task = group.create_task(telling.announcer.run())
        await until(lambda: len(api.objects("Event")) == WAITING)
        assert sum(telling.waits) == pytest.approx((WAITING - BURST) * PAUSE_SECONDS)
        task.cancel()


async def test_credentials_that_may_not_are_not_tried_again_until_they_change() -> None:
    async with FakeApiServer() as api, Client(api.credentials, tenant="acme") as client, asyncio.TaskGroup() as group:
        api.faults.append(Fault(fail(403), verb="POST", times=1))
        telling = Telling(client)
        task = group.create_task(telling.announcer.run())
        telling.announcer.tell(refusal())
        await until(lambda: telling.announcer.barred)
        telling.announcer.tell(refusal("other"))
        await settle()
        assert len(api.requests) == 1
        telling.announcer.credentials_changed()
        telling.announcer.tell(refusal("other"))
        await until(lambda: len(api.objects("Event")) == 1)
        task.cancel()
