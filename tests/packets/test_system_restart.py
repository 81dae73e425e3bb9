"""Brain and agents are killed, the table is tampered with: traffic goes on, and nothing is written that need not be."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.packets.system import VIP, Site, Traffic, Web, eventually, site
from vcproxy.ops import admin

pytestmark = pytest.mark.packets

ANSWERS = {"acme/web-1", "acme/web-2"}
NODE = "one"
TENANTS = ("acme", "globex", "initech")


@pytest.fixture(scope="module")
def running() -> Iterator[Site]:
    with site(("acme", "globex"), flat=("initech",), webs=[Web(pods=("web-1", "web-2"))]) as made:
        yield made


@pytest.fixture(autouse=True)
def whole(running: Site) -> Iterator[None]:
    """Each test finds, and leaves, everything up; a test that fails does not fail the next ones."""
    yield
    for name in ("brain", NODE):
        try:
            running.cluster.ask(name)
        except admin.AdminError:
            (running.cluster.start_brain if name == "brain" else lambda: restart(running))()
    running.connected()


def restart(site: Site) -> None:
    site.cluster.start_agent(site.nodes[NODE])


def back(site: Site) -> None:
    """Wait until the agent has taken over every tenant, with the brain or without."""

    def ready() -> bool:
        status = site.cluster.ask(NODE)
        return bool(
            status["started"]
            and len(status["tenants"]) == len(TENANTS)
            and all(
                row["adopted"] or (row["committedDigest"] == row["digest"] and not row["pending"])
                for row in status["tenants"]
            )
        )

    site.cluster.wait("the agent is back", ready)


def answers(site: Site) -> set[object]:
    """From the node's client, in both families and protocols."""
    return {
        found
        for protocol in ("tcp", "udp")
        for family in (4, 6)
        for found in site.answered("acme", "client-one", protocol, VIP[family])
    }


def test_brain_killed_and_started_again(running: Site) -> None:
    """No request fails, nothing is sent again, no element is touched."""
    before = running.counters()
    with (
        running.session("acme", address=VIP[4]) as held4,
        running.session("acme", address=VIP[6]) as held6,
        Traffic(running.pods["acme/client-one"], VIP[4]) as traffic4,
        Traffic(running.pods["acme/client-one"], VIP[6]) as traffic6,
    ):
        running.cluster.kill("brain")
        traffic4.more()
        traffic6.more()
        for held in (held4, held6):
            assert held.ask("gone") == f"{held.reply.pod} gone"
        running.cluster.wait("the agents noticed", lambda: not running.cluster.ask(NODE)["brain"])
        running.cluster.start_brain()
        running.connected()
        for tenant in TENANTS:
            running.committed(tenant)
        traffic4.more()
        traffic6.more()
        for held in (held4, held6):
            assert held.ask("back") == f"{held.reply.pod} back"
    assert set(traffic4.outcomes) == set(traffic6.outcomes) == ANSWERS
    after = running.counters()
    for node, counters in before.items():
        assert {key: after[node][key] for key in ("snapshots", "operations")} == {
            key: counters[key] for key in ("snapshots", "operations")
        }, node


def test_agent_killed_and_started_again(running: Site) -> None:
    """Established connections and new ones go on, and not one message of the kernel's monitor tells of our table."""
    with (
        running.session("acme", address=VIP[4]) as held4,
        running.session("acme", address=VIP[6]) as held6,
        Traffic(running.pods["acme/client-one"], VIP[4]) as traffic4,
        Traffic(running.pods["acme/client-one"], VIP[6]) as traffic6,
        running.watched(NODE) as lines,
    ):
        running.cluster.kill(NODE)
        traffic4.more()
        traffic6.more()
        restart(running)
        back(running)
        running.connected()
        traffic4.more()
        traffic6.more()
        for held in (held4, held6):
            assert held.ask("back") == f"{held.reply.pod} back"
    assert lines == []
    assert set(traffic4.outcomes) == set(traffic6.outcomes) == ANSWERS
    assert running.cluster.ask(NODE)["counters"]["operations"] == 0


def test_change_made_while_the_agent_was_down(running: Site) -> None:
    """It is programmed when the agent is back; a connection to an endpoint that stayed is not cut."""
    running.publish("globex", Web(pods=("web-1",)))
    with running.session("globex") as held:
        running.cluster.kill(NODE)
        running.write("globex", Web(pods=("web-1", "web-3")))
        restart(running)
        back(running)
        wanted = {"globex/web-1", "globex/web-3"}
        assert eventually(lambda: running.answered("globex", "client-one", "tcp", VIP[4]) == wanted)
        assert held.ask("still") == "globex/web-1 still"
    running.publish("globex", Web(pods=("web-1", "web-2")))


def test_agent_starts_from_disk_without_a_brain(running: Site) -> None:
    """A node that reboots while the brain is down has an empty kernel, and serves its last good state all the same.

    One whose agent only restarts is left as it is.
    """
    wanted = running.kernel_state(NODE)
    running.cluster.kill("brain")
    running.cluster.kill(NODE)
    restart(running)
    back(running)
    assert answers(running) == ANSWERS
    assert running.kernel_state(NODE) == wanted
    running.cluster.kill(NODE)
    running.nft(NODE, "delete", "table", "inet", "vcproxy")
    restart(running)
    back(running)
    assert answers(running) == ANSWERS
    assert running.cluster.ask(NODE)["brain"] is None
    running.cluster.start_brain()
    running.connected()
    for tenant in TENANTS:
        running.committed(tenant)
    assert answers(running) == ANSWERS


def test_pod_attached_a_moment_before_the_agent_was_killed_stays_attached(running: Site) -> None:
    """The table had the pod, the file on disk not yet; with the brain down nobody else knows it."""
    client = running.pods["initech/client-one"]
    remembered = running.cluster.directory / NODE / "node"

    def attached() -> bool:
        return client.ip4 in {row["address"] for row in running.cluster.ask(NODE, "/addresses")}

    running.cluster.wait("the pods are remembered", lambda: attached() and remembered.exists())
    before = remembered.read_bytes()
    running.tell_pods("initech", without=("client-one",))
    running.cluster.wait("the pod is gone", lambda: not attached() and remembered.read_bytes() != before)
    older = remembered.read_bytes()
    running.tell_pods("initech")
    running.cluster.wait("the pod is there", attached)
    running.cluster.kill("brain")
    running.cluster.kill(NODE)
    remembered.write_bytes(older)
    restart(running)
    back(running)
    assert running.answered("initech", "client-one", "tcp", VIP[4]) == {"initech/web-1", "initech/web-2"}
    assert running.answered("initech", "client-one", "udp", VIP[6]) == {"initech/web-1", "initech/web-2"}


def test_table_deleted_while_the_agent_was_down(running: Site) -> None:
    running.cluster.kill(NODE)
    running.nft(NODE, "delete", "table", "inet", "vcproxy")
    restart(running)
    back(running)
    assert answers(running) == ANSWERS


HARMS = {
    "table deleted": "delete table inet vcproxy",
    "all rulesets flushed": "flush ruleset",
    "endpoints flushed": "flush map inet vcproxy endpoints4",
    "frontends flushed": "flush map inet vcproxy tcp4_frontends",
    "zones flushed": "flush map inet vcproxy zone_by_interface",
    "zone allocation flushed": "flush set inet vcproxy tenants",
    "balancing flushed": "flush map inet vcproxy balance4",
    "foreign node port": "add element inet vcproxy tcp4_nodeports { 31000 : 2 }",
    "foreign frontend in nobody's zone": "add element inet vcproxy tcp4_frontends { 7 . 10.96.0.99 . 80 : 2 }",
    "foreign device": 'add element inet vcproxy zone_by_interface { "eth7" : 7 }',
    "rule removed": "flush chain inet vcproxy tcp4",
}


@pytest.mark.parametrize("harm", HARMS.values(), ids=HARMS.keys())
def test_table_changed_by_hand_is_mended(running: Site, harm: str) -> None:
    """Within a second or so the table is as it was, whatever was done to it."""
    lab = running.nft(NODE, "list", "table", "inet", "lab")  # the lab's own: a flushed ruleset takes it too
    wanted = running.kernel_state(NODE)
    repairs = running.counters()[NODE]["repairs"]
    running.nft(NODE, harm)
    if harm == "flush ruleset":
        running.nft(NODE, "-f", "-", stdin=lab)

    def state() -> str:
        listed = running.nodes[NODE].run(["nft", "list", "table", "inet", "vcproxy"], check=False)
        return running.kernel_state(NODE) if listed.returncode == 0 else ""

    eventually(lambda: state() == wanted, timeout=5)
    assert state() == wanted
    assert eventually(lambda: running.counters()[NODE]["repairs"] > repairs)
    assert answers(running) == ANSWERS
