"""`vcproxy demo`: the main job on one machine, with real processes and real packets, and then no trace of it.

Two nodes; three tenants that share every address: the same ClusterIP and port, the same pod addresses. What is shown
is measured as it happens; a step that fails ends the demo with exit status 1 and the logs.
"""

import collections
import contextlib
import json
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from vcproxy.cli.main import Failure
from vcproxy.lab import Lab, LabError, Outcome, Pod, Reply, TcpSession, Tenant, dial, tcp_request, udp_request
from vcproxy.lab.cluster import Cluster, endpoint_slice, service

TENANTS = ("acme", "globex", "initech")
VIP4, VIP6, PORT, TARGET = "10.96.0.10", "fd00:96::10", 80, 8080
CLIENTS = {"one": ("10.244.0.10", "fd00:244::10"), "two": ("10.244.0.20", "fd00:244::20")}
WEB = {"web-1": ("one", "10.244.0.11", "fd00:244::11"), "web-2": ("two", "10.244.0.21", "fd00:244::21")}
SPARE = ("web-3", "two", "10.244.0.22", "fd00:244::22")
REQUESTS = 20
SOURCE_PORT = 40000
PORTS = (("http", "TCP", PORT, TARGET), ("ask", "UDP", PORT, TARGET))


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the results as one JSON document.")
@click.option("--pause", is_flag=True, help="Wait for Enter at the end, to look around, before cleaning up.")
def demo(as_json: bool, pause: bool) -> None:
    """Show tenants with the same ClusterIP, pod IPs and ports, each reaching its own pods.

    Needs root; builds everything in network namespaces of its own, touches nothing else, and cleans up.

    \b
    Examples:
      vcproxy demo
      vcproxy demo --json | jq .replaced
      vcproxy demo --pause     (then, in another terminal: ip netns)
    """
    # A terminated demo must clean up like an interrupted one.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with tempfile.TemporaryDirectory(prefix="vcproxy-demo-") as directory, Lab("vcp-demo") as lab:
            results = Demo(lab, Path(directory), Console(quiet=as_json, highlight=False)).run(pause=pause)
    except LabError as error:
        raise Failure(str(error)) from error
    except KeyboardInterrupt:
        raise Failure("interrupted; everything is cleaned up") from None
    if as_json:
        click.echo(json.dumps(results, indent=2))


class Demo:
    """The steps, each of which prints what it saw and adds it to the results."""

    def __init__(self, lab: Lab, directory: Path, console: Console) -> None:
        self._lab = lab
        self._console = console
        self._results: dict[str, Any] = {}
        self._pods: dict[tuple[str, str], Pod] = {}
        self._cluster = Cluster(directory, place=lab.client("brain", "192.168.77.2", "fd77::2"))

    def run(self, *, pause: bool) -> dict[str, Any]:
        """All steps in order. Raises LabError when one does not show what it should."""
        with self._cluster:
            self._build()
            self._reach()
            self._same_five_tuple()
            self._replace()
            self._brain_killed()
            if pause and sys.stdin.isatty():
                self._console.input("\nEverything is still there. Press Enter to clean up. ")
        self._console.print("\n[bold green]All of it worked.[/] Cleaning up.")
        return self._results

    @contextlib.contextmanager
    def _step(self, title: str) -> Iterator[None]:
        self._console.print(f"\n[bold]{title}[/]")
        yield

    def _say(self, text: str) -> None:
        self._console.print(f"  {text}", soft_wrap=True)

    def _build(self) -> None:
        with self._step("Two nodes, three tenants; brain and node agents as processes, over mutual TLS"):
            started = time.perf_counter()
            nodes = {name: self._lab.node(name) for name in CLIENTS}
            tenants = [self._lab.overlay_tenant(name, vni=100 + index) for index, name in enumerate(TENANTS)]
            for tenant in tenants:
                for node, (ip4, ip6) in CLIENTS.items():
                    self._pods[tenant.name, node] = nodes[node].overlay_pod(tenant, f"client-{node}", ip4, ip6)
                for name, (node, ip4, ip6) in WEB.items():
                    self._serve(nodes[node].overlay_pod(tenant, name, ip4, ip6), tenant, name)
            name, node, ip4, ip6 = SPARE
            self._serve(nodes[node].overlay_pod(tenants[0], name, ip4, ip6), tenants[0], name)
            built = time.perf_counter() - started
            for tenant in tenants:
                self._publish(tenant.name, WEB)
            started = time.perf_counter()
            self._cluster.start_brain()
            for agent in nodes.values():
                self._cluster.start_agent(agent, tenants)
            for agent in nodes.values():
                for tenant in tenants:
                    self._cluster.wait_committed(agent.name, f"dir-{tenant.name}")
            ready = time.perf_counter() - started
            self._say(f"{len(nodes)} nodes and {len(self._pods)} pods built in {built:.2f} s")
            self._say(f"brain and agents: from process start to all tenants in the kernel {ready:.2f} s")
            self._say(f"every tenant's web Service: {VIP4} and {VIP6}, port {PORT}, TCP and UDP")
            self._results["build"] = {"seconds": built, "pods": len(self._pods), "ready_seconds": ready}

    def _serve(self, pod: Pod, tenant: Tenant, name: str) -> None:
        self._pods[tenant.name, name] = pod
        self._lab.serve(pod, tcp=[TARGET], udp=[TARGET])

    def _publish(self, tenant: str, pods: dict[str, tuple[str, str, str]]) -> float:
        ports = [(name, protocol, target) for name, protocol, _, target in PORTS]
        return self._cluster.apply(
            tenant,
            "web",
            [
                service("web", [VIP4, VIP6], PORTS),
                endpoint_slice("web", "IPv4", [(ip4, node) for node, ip4, _ in pods.values()], ports),
                endpoint_slice("web", "IPv6", [(ip6, node) for node, _, ip6 in pods.values()], ports),
            ],
        )

    def _reach(self) -> None:
        with self._step(f"Who answers on {VIP4} and {VIP6}?"):
            drawn = Table("tenant", "client on", "protocol", "ClusterIP", "answered by", box=None, header_style="dim")
            rows: list[dict[str, Any]] = []
            for tenant in TENANTS:
                for node in CLIENTS:
                    for protocol, request in (("TCP", tcp_request), ("UDP", udp_request)):
                        for address in (VIP4, VIP6):
                            answers = collections.Counter(
                                self._own(tenant, request(self._pods[tenant, node], address, PORT))
                                for _ in range(REQUESTS)
                            )
                            shown = ", ".join(f"{name} x{n}" for name, n in sorted(answers.items()))
                            drawn.add_row(tenant, node, protocol, address, shown)
                            rows.append(
                                {"tenant": tenant, "node": node, "protocol": protocol, "address": address}
                                | {"answers": dict(answers)}
                            )
            self._console.print(drawn)
            self._say(f"{len(rows) * REQUESTS} requests; not one left its tenant")
            self._results["reached"] = rows

    def _own(self, tenant: str, outcome: Outcome) -> str:
        """The pod that answered; it must be of this tenant."""
        if not isinstance(outcome, Reply):
            raise LabError(f"{tenant}: no answer: {outcome}")
        if not outcome.pod.startswith(f"{tenant}/"):
            raise LabError(f"{tenant}'s client was answered by {outcome.pod}")
        return outcome.pod

    def _same_five_tuple(self) -> None:
        with self._step("The same five-tuple, live in all tenants at once"), contextlib.ExitStack() as open_sessions:
            sessions = {tenant: open_sessions.enter_context(self._dial(tenant)) for tenant in TENANTS}
            rows = []
            for turn in range(3):
                for tenant, session in sessions.items():
                    answer = session.ask(f"turn {turn}")
                    if not answer.startswith(f"{tenant}/"):
                        raise LabError(f"{tenant}'s connection carries {answer!r}")
            for tenant, session in sessions.items():
                source = f"{session.reply.source[0]}:{session.reply.source[1]}"
                self._say(f"TCP {source} -> {VIP4}:{PORT}   in {tenant:8} is answered by {session.reply.pod}")
                rows.append({"tenant": tenant, "source": source, "answered_by": session.reply.pod})
            self._say("data went both ways in all of them, in turns")
            self._results["same_five_tuple"] = rows

    def _dial(self, tenant: str) -> TcpSession:
        try:
            return TcpSession(self._pods[tenant, "one"], VIP4, PORT, source_port=SOURCE_PORT)
        except dial.DialFailed as error:
            raise LabError(f"{tenant}: {error}") from error

    def _replace(self) -> None:
        tenant = TENANTS[0]
        name, node, ip4, ip6 = SPARE
        with self._step(f"A pod is replaced: {tenant}/web-2 goes, {tenant}/{name} comes"):
            before = self._committed(tenant)
            written = self._publish(tenant, {"web-1": WEB["web-1"], name: (node, ip4, ip6)})
            rows = self._cluster.wait("both nodes had it", lambda: self._newer(tenant, before))
            answers = collections.Counter(
                self._own(tenant, tcp_request(self._pods[tenant, "one"], VIP4, PORT)) for _ in range(REQUESTS)
            )
            if set(answers) != {f"{tenant}/web-1", f"{tenant}/{name}"}:
                raise LabError(f"after the change these answered: {dict(answers)}")
            took = {row: (at - written) * 1000 for row, at in rows.items()}
            for where, milliseconds in took.items():
                self._say(f"node {where}: manifest written -> kernel committed in {milliseconds:.1f} ms")
            self._say(f"answered by {', '.join(f'{pod} x{n}' for pod, n in sorted(answers.items()))}")
            self._results["replaced"] = {"milliseconds": took, "answers": dict(answers)}

    def _committed(self, tenant: str) -> dict[str, float]:
        """When each node last committed the tenant, Unix seconds."""
        return {
            node: row["committedAt"]
            for node in CLIENTS
            for row in self._cluster.ask(node)["tenants"]
            if row["uid"] == f"dir-{tenant}"
        }

    def _newer(self, tenant: str, before: dict[str, float]) -> dict[str, float] | None:
        now = self._committed(tenant)
        return now if all(now[node] > before[node] for node in CLIENTS) else None

    def _brain_killed(self) -> None:
        with self._step("The brain is killed (SIGKILL); traffic goes on; it comes back"):
            before = {node: self._cluster.ask(node)["counters"] for node in CLIENTS}
            with contextlib.ExitStack() as open_sessions:
                sessions = {tenant: open_sessions.enter_context(self._dial(tenant)) for tenant in TENANTS}
                self._cluster.kill("brain")
                for tenant, session in sessions.items():
                    session.ask("still there?")
                    for node in CLIENTS:
                        self._own(tenant, tcp_request(self._pods[tenant, node], VIP4, PORT))
                self._say("open connections and new ones work while it is gone")
                started = time.perf_counter()
                self._cluster.start_brain()
                self._cluster.wait("the agents are back", self._all_connected)
                back = time.perf_counter() - started
                for tenant in TENANTS:
                    for node in CLIENTS:
                        self._cluster.wait_committed(node, f"dir-{tenant}")
                for session in sessions.values():
                    session.ask("and now?")
            after = {node: self._cluster.ask(node)["counters"] for node in CLIENTS}
            cost = {
                key: sum(after[node][key] - before[node][key] for node in CLIENTS)
                for key in ("snapshots", "operations")
            }
            if any(cost.values()):
                raise LabError(f"the brain's return cost {cost}; it should cost nothing")
            self._say(f"back after {back:.2f} s; snapshots sent: 0; kernel elements touched: 0")
            self._results["brain_killed"] = {"back_seconds": back, **cost}

    def _all_connected(self) -> bool:
        return all(self._cluster.ask(node)["brain"] for node in CLIENTS)
