"""Health: what makes the node unhealthy, what is one tenant's own trouble, and what is on the wire."""

from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from tests.fakes.backend import broken
from tests.unit.node.conftest import FACTS, MakeRig, Rig, service_port
from vcproxy.model.addresses import parse_address, parse_prefix
from vcproxy.model.node import NodeFacts
from vcproxy.node import health
from vcproxy.node.config import DetectLocal, NodeConfiguration
from vcproxy.node.health import Health
from vcproxy.node.holdings import Held, Tenant
from vcproxy.node.look import health_of, status_of
from vcproxy.node.nodestate import listen_addresses, node_rules, node_state
from vcproxy.ops import metrics
from vcproxy.ops.configfile import ConfigError

WEB = service_port("web", "10.0.1.1")


def late(rig: Rig) -> set[str]:
    return set(health_of(rig.agent).late)


async def test_a_node_without_queued_updates_is_healthy_however_long_nothing_happens(make_rig: MakeRig) -> None:
    rig = await make_rig(facts=FACTS)
    await rig.settle(after=10_000)
    assert late(rig) == set()


async def test_an_update_that_nobody_takes_up_makes_the_node_unhealthy_after_the_timeout(make_rig: MakeRig) -> None:
    rig = await make_rig(facts=FACTS)
    rig.sync("acme", WEB)
    rig.clock.now += 59.9
    assert late(rig) == set()
    rig.clock.now += 0.1
    assert late(rig) == {"acme", "attach"}
    await rig.settle()
    assert late(rig) == set()


async def test_a_tenant_that_fails_while_others_are_served_does_not_make_the_node_unhealthy(make_rig: MakeRig) -> None:
    rig = await make_rig(facts=FACTS)
    rig.backend.fail = broken("apply", uid="acme")
    rig.sync("acme", WEB)
    await rig.settle()
    await rig.settle(after=30)
    rig.sync("beta", WEB)
    await rig.settle(after=1)
    for _ in range(10):
        await rig.settle(after=10)
    assert late(rig) == set()
    assert [row["error"] for row in status_of(rig.agent)["tenants"]] == ["apply fails on order", ""]
    assert status_of(rig.agent)["healthy"] is False


async def test_failures_without_a_success_in_between_make_the_node_unhealthy(make_rig: MakeRig) -> None:
    rig = await make_rig(facts=FACTS)
    rig.backend.fail = broken("apply")
    rig.sync("acme", WEB)
    rig.sync("beta", WEB)
    for _ in range(10):
        await rig.settle(after=10)
    assert late(rig) == {"acme", "beta"}


async def test_a_duty_of_the_node_that_fails_makes_it_unhealthy(make_rig: MakeRig) -> None:
    rig = await make_rig(facts=FACTS)
    rig.backend.fail = broken("set_node")
    rig.facts(NodeFacts(addresses=(parse_address("192.168.0.9"),)))
    for _ in range(10):
        await rig.settle(after=10)
    assert late(rig) == {"node"}


async def test_ready_once_every_tenant_is_programmed(make_rig: MakeRig) -> None:
    rig = await make_rig()
    assert health_of(rig.agent).waiting_for == "the brain to name this node's tenants"
    rig.complete("acme")
    rig.sync("acme", WEB)
    assert health_of(rig.agent).waiting_for == "1 tenants to be programmed for the first time"
    await rig.settle()
    assert health_of(rig.agent).waiting_for == ""
    rig.holdings.put(Held(Tenant("new", "new")))
    assert health_of(rig.agent).waiting_for == "", "a tenant that the brain has not synced is not this node's to await"


@pytest.fixture
async def ask() -> AsyncIterator[Any]:
    state = Health({}, 0.0)

    async def get(path: str, now: Health) -> tuple[int, Any, dict[str, Any]]:
        nonlocal state
        state = now
        async with session.get(f"http://{address}{path}") as answer:
            return answer.status, answer.headers, await answer.json()

    async with (
        metrics.serve("127.0.0.1:0", health.handlers(lambda: state)) as address,
        aiohttp.ClientSession() as session,
    ):
        yield get


LATE = {"acme": 61.04}


@pytest.mark.parametrize(
    ("now", "healthz", "livez", "readyz"),
    [
        (Health({}, 5.0), 200, 200, 200),
        (Health({}, 5.0, "tenants"), 200, 200, 503),
        (Health({}, 5.0, eligible=False), 503, 200, 200),
        (Health(LATE, 5.0), 503, 503, 503),
        (Health(LATE, 5.0, eligible=False), 503, 503, 503),
    ],
)
async def test_kube_proxys_answers(ask: Any, now: Health, healthz: int, livez: int, readyz: int) -> None:
    """The cases of kube-proxy's TestHealthzServer and TestLivezServer, with bodies."""
    for path, wanted in (("/healthz", healthz), ("/livez", livez), ("/readyz", readyz)):
        told = metrics.value(f"kubeproxy_proxy_{path[1:]}_total", {"code": str(wanted)})
        status, headers, body = await ask(path, now)
        assert status == wanted, path
        assert headers["Content-Type"].startswith("application/json")
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert list(body)[:2] == ["lastUpdated", "currentTime"]
        assert body["healthy"] is (not now.late)
        alone = {"lastUpdated": "1970-01-01T00:00:05Z", "healthy": not now.late}
        assert body["status"] == {"IPv4": alone, "IPv6": alone}
        if path == "/readyz":
            assert body["late"] == {name: round(seconds, 1) for name, seconds in now.late.items()}
            assert body["waitingFor"] == now.waiting_for
            continue
        fields = {"lastUpdated", "currentTime", "healthy", "status"}
        assert body.keys() == fields | ({"nodeEligible"} if path == "/healthz" else set())
        assert body.get("nodeEligible", now.eligible) is now.eligible
        assert body["lastUpdated"] == (body["currentTime"] if wanted == 200 else "1970-01-01T00:00:05Z")
        assert metrics.value(f"kubeproxy_proxy_{path[1:]}_total", {"code": str(wanted)}) == told + 1


@pytest.mark.parametrize(
    ("path", "said"),
    [("/healthz", "ok"), ("/healthz?verbose", "[+]ping ok\nhealthz check passed\n"), ("/healthz/ping", "ok")],
)
async def test_the_metrics_port_says_only_that_the_process_answers(path: str, said: str) -> None:
    routes = {"/healthz": health.ping, "/healthz/ping": health.ping}
    async with (
        metrics.serve("127.0.0.1:0", routes) as address,
        aiohttp.ClientSession() as session,
        session.get(f"http://{address}{path}") as answer,
    ):
        assert (answer.status, await answer.text()) == (200, said)


@pytest.mark.parametrize(("facts", "eligible"), [(None, False), (FACTS, True), (NodeFacts(eligible=False), False)])
async def test_eligible_is_a_node_that_is_told_so(make_rig: MakeRig, facts: NodeFacts | None, eligible: bool) -> None:
    rig = await make_rig(facts=facts)
    assert health_of(rig.agent).eligible is eligible
    rig.facts(NodeFacts(eligible=not eligible))
    assert health_of(rig.agent).eligible is not eligible


NODE_FACTS = NodeFacts(
    addresses=(parse_address("192.168.0.2"), parse_address("127.0.0.1")), pod_ranges=(parse_prefix("10.0.1.0/24"),)
)
KERNEL = [parse_address(text) for text in ("192.168.0.2", "192.168.1.2", "10.9.0.1", "127.0.0.1", "::1")]


@pytest.mark.parametrize(
    ("accepted", "addresses"),
    [
        (("primary",), ["192.168.0.2"]),
        (("192.168.0.0/16",), ["192.168.0.2", "192.168.1.2"]),
        (("primary", "10.0.0.0/8"), ["10.9.0.1", "192.168.0.2"]),
        (("0.0.0.0/0", "::/0"), ["10.9.0.1", "192.168.0.2", "192.168.1.2"]),
        ((), []),
    ],
)
def test_node_port_addresses(accepted: tuple[str, ...], addresses: list[str]) -> None:
    rules = node_rules(NodeConfiguration(node_port_addresses=accepted))
    state = node_state(rules, NODE_FACTS, KERNEL)
    assert state.node_addresses == tuple(map(parse_address, addresses))
    assert state.own_addresses == NODE_FACTS.addresses


@pytest.mark.parametrize(
    ("accepted", "addresses"),
    [
        (("primary",), ["192.168.0.2"]),
        (("192.168.0.0/16",), ["192.168.0.2", "192.168.1.2"]),
        (("0.0.0.0/0",), ["0.0.0.0"]),
        (("0.0.0.0/0", "192.168.0.0/16"), ["0.0.0.0"]),
        (("192.168.1.0/24", "::/0"), ["192.168.1.2", "::"]),
        ((), []),
    ],
)
def test_where_load_balancers_may_ask(accepted: tuple[str, ...], addresses: list[str]) -> None:
    rules = node_rules(NodeConfiguration(node_port_addresses=accepted))
    elsewhere = parse_address("203.0.113.7")  # of the Node object, but of the cloud's router
    state = node_state(rules, NodeFacts(addresses=(parse_address("192.168.0.2"), elsewhere)), KERNEL)
    assert sorted(listen_addresses(rules, state, KERNEL)) == sorted(map(parse_address, addresses))


@pytest.mark.parametrize(
    ("detector", "facts", "local"),
    [
        (DetectLocal(mode="ClusterCIDR", cluster_cidrs=("10.0.0.0/16",)), NODE_FACTS, (parse_prefix("10.0.0.0/16"),)),
        (DetectLocal(mode="ClusterCIDR"), NODE_FACTS, None),
        (DetectLocal(mode="NodeCIDR"), NODE_FACTS, (parse_prefix("10.0.1.0/24"),)),
        (DetectLocal(mode="NodeCIDR"), NodeFacts(), None),
        (DetectLocal(mode="None", cluster_cidrs=("10.0.0.0/16",)), NODE_FACTS, None),
    ],
)
def test_detect_local(detector: DetectLocal, facts: NodeFacts, local: object) -> None:
    assert node_state(node_rules(NodeConfiguration(detect_local=detector)), facts, ()).local_sources == local


def test_a_range_that_is_none_is_named() -> None:
    with pytest.raises(ConfigError, match="nodePortAddresses: 'prmary'"):
        node_rules(NodeConfiguration(node_port_addresses=("prmary",)))
