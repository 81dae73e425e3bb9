"""The columns with real packets: a proxy on the tested node, told of the table's objects, and every flow tried.

    super       `vcproxy run`, in kube-proxy's place, from a real API server
    kube-proxy  the real one in nftables mode, with the same flags, from the same API server and the same objects
    overlay     brain and node agent as processes; a tenant with a network of its own, given as manifests
    flat        the same on the shared network

In the tenants' columns a second tenant has the same ClusterIPs (and on the overlay the same pods) with the opposite
expectations: whoever is answered in one is refused in the other, and the other way round. Both are tried together.

All objects of a configuration are there at once, each scenario's in a namespace of its own. When a step's objects are
written, a canary Service follows, and the last step's goes; reads are in order, so once the new one answers in both
families and the old one does not any more, all the rest is in the kernel.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from e2e import nodes
from e2e import objects as k8s
from e2e.apiclient import ApiClient
from e2e.conformance.answers import Observation
from e2e.conformance.ground import Ground
from e2e.conformance.lines import Lines
from e2e.conformance.opposite import opposite_cases, opposite_objects
from e2e.conformance.probe import observe_all
from e2e.controlplane import ControlPlane
from e2e.polling import eventually
from e2e.processes import Process
from tests.conformance.differences import expected
from tests.conformance.interpreter import NODE_PORT_ADDRESSES, POD_CIDRS
from tests.conformance.model import (
    FLAT,
    KUBE_PROXY,
    OVERLAY,
    SUPER,
    Case,
    Configuration,
    Scenario,
)
from tests.conformance.objects import PUBLIC_CIDRS, SERVICE_CIDRS, Cast, Object, Plan, dialled, objects, service_cidr
from vcproxy.lab import Lab, Reply, tcp_request
from vcproxy.lab.cluster import Cluster, endpoint_slice, service

TENANT, OTHER = "acme", "globex"
CONVERGED_WITHIN = 120.0
"""Seconds until all of a step's objects are in the kernel, the proxy's start included."""
CANARY = "canary"
TENANTS = {SUPER: ("",), KUBE_PROXY: ("",), OVERLAY: (TENANT, OTHER), FLAT: (TENANT, OTHER)}


@dataclass(frozen=True)
class Run:
    """Cases of one column under one configuration."""

    column: str
    configuration: Configuration
    plan: Plan
    cases: Sequence[Case]

    @property
    def scenarios(self) -> list[Scenario]:
        return list({(case.scenario.family, case.scenario.name): case.scenario for case in self.cases}.values())

    @property
    def steps(self) -> int:
        return 1 + max(case.step for case in self.cases)

    def objects(self, cast: Cast, number: int) -> list[Object]:
        """All objects of a step; a scenario that has no more steps stays as it is."""
        return [
            made
            for scenario in self.scenarios
            for made in objects(self.plan, cast, scenario, scenario.steps[min(number, len(scenario.steps) - 1)])
        ]


@dataclass(frozen=True)
class Observed:
    """By case id: what happened, and in tenants' columns what happened to the other tenant and what should have."""

    found: Mapping[str, Observation]
    opposites: Mapping[str, tuple[Observation, Observation]]


def perform(run: Run, directory: Path, plane: ControlPlane | None) -> Observed:
    """Build the lab, run the proxy, try every case. `plane`: for the columns that read from an API server."""
    found: dict[str, Observation] = {}
    opposites: dict[str, tuple[Observation, Observation]] = {}
    with Lab("vcp-conf") as lab, ExitStack() as stack:
        ground = _ground(lab, run)
        lines = stack.enter_context(Lines())
        if run.column in (SUPER, KUBE_PROXY):
            assert plane is not None, f"column {run.column} reads from an API server"
            proxy: _Proxy = stack.enter_context(_from_api_server(run, ground, directory, plane))
        else:
            proxy = stack.enter_context(_from_manifests(run, ground, directory))
        for number in range(run.steps):
            proxy.publish(number)
            tenants = TENANTS[run.column]
            _await_canary(ground, tenants, number, proxy)
            cases = [_as_expected(case, run.column) for case in run.cases if case.step == number]
            found |= observe_all(ground, run.plan, tenants[0], cases, lines)
            if len(tenants) > 1 and number == 0:
                turned = opposite_cases(cases)
                seen = observe_all(ground, run.plan, tenants[1], turned, lines)
                opposites |= {case.id: (seen[case.id], case.expect) for case in turned}
    return Observed(found, opposites)


def _as_expected(case: Case, column: str) -> Case:
    """The case as it must be in this column: what a prober waits for."""
    flow = dataclasses.replace(case.flow, expect=expected(case, column), otherwise={})
    return dataclasses.replace(case, flow=flow)


def _ground(lab: Lab, run: Run) -> Ground:
    ground = Ground(lab)
    for tenant in TENANTS[run.column]:
        if not tenant:
            ground.add_super()
        elif run.column == OVERLAY:
            ground.add_overlay(tenant)
        else:
            ground.add_flat(tenant)
    cast = ground.casts[TENANTS[run.column][0]]
    if run.column != OVERLAY:  # whose routes know the node's first addresses only, and where nobody dials the node
        ground.second_addresses(cast)
        own = ("NodePort", "Secondary", "Node")
        dials = [
            one for case in run.cases if case.flow.target_kinds & set(own) for one in dialled(run.plan, cast, case)
        ]
        ground.listen_behind(sorted({port for _, port, _ in dials}))
    held = [
        run.plan.public(scenario, one.name, "LoadBalancer", number, ip)
        for scenario in run.scenarios
        for one in scenario.steps[0].services
        if one.held
        for number in range(len(one.ingress))
        for ip in (4, 6)
    ]
    ground.hold(held)
    return ground


def canary(number: int, ip: int) -> str:
    """The ClusterIP of a step's canary."""
    return f"10.32.251.{number + 1}" if ip == 4 else f"fd00:32::f:{number + 1:x}"


def _canaries(cast: Cast, number: int) -> list[Object]:
    name, port = f"canary-{number}", ("http", "TCP", 80, 8080)
    return [
        service(name, [canary(number, 4), canary(number, 6)], [port], namespace=CANARY, ipFamilyPolicy="RequireDualStack"),
        *(
            endpoint_slice(name, f"IPv{ip}", [(cast.address("local-1", ip), cast.nodes["here"])], [("http", "TCP", 8080)], namespace=CANARY)
            for ip in (4, 6)
        ),
    ]  # fmt: skip


def _await_canary(ground: Ground, tenants: Sequence[str], number: int, proxy: _Proxy) -> None:
    def answers(turn: int) -> set[bool]:
        return {
            isinstance(tcp_request(ground.place(tenant, "client"), canary(turn, ip), 80, timeout=0.2), Reply)
            for tenant in tenants
            for ip in (4, 6)
        }

    def sings() -> bool:
        proxy.check()
        return answers(number) == {True} and (number == 0 or answers(number - 1) == {False})

    try:
        eventually(sings, within=CONVERGED_WITHIN, what=f"the canary of step {number}")
    except TimeoutError as error:
        raise AssertionError(f"{error}\n{proxy.log()}") from None


class _Proxy:
    """A proxy under test, and how it is told of objects."""

    def publish(self, number: int) -> None:
        raise NotImplementedError

    def check(self) -> None:
        """Raise if it does not run."""
        raise NotImplementedError

    def log(self) -> str:
        raise NotImplementedError


# --- from an API server -----------------------------------------------------------------------------------------------


class _ApiProxy(_Proxy):
    def __init__(self, run: Run, cast: Cast, client: ApiClient, process: Process) -> None:
        self._run, self._cast, self._client, self._process = run, cast, client, process
        self._held: dict[tuple[str, str, str], Object] = {}

    def publish(self, number: int) -> None:
        """Write what differs from the last step, the node's label too, and when all is written the canary."""
        zone = self._run.configuration.zone_in(number) or None
        self._client.patch("Node", "one", {"metadata": {"labels": {"topology.kubernetes.io/zone": zone}}})
        wanted = {_key(item): item for item in self._run.objects(self._cast, number)}
        gone = [key for key in self._held if key not in wanted]
        for kind, namespace, name in gone:
            self._client.delete(kind, name, namespace or None)
        new = [item for key, item in wanted.items() if key not in self._held]
        self._client.create_all(_without_status(item) for item in new)
        for key, item in wanted.items():
            if key in self._held and _without_status(self._held[key]) != _without_status(item):
                self._update(_without_status(item))
            if _ingress(item) != _ingress(self._held.get(key, {})):
                self._client.patch_status("Service", key[2], {"loadBalancer": {"ingress": _ingress(item)}}, key[1])
        self._held = wanted
        for item in _canaries(self._cast, number):
            self._client.create(item)
        if number:
            for kind, namespace, name in map(_key, _canaries(self._cast, number - 1)):
                self._client.delete(kind, name, namespace)

    def _update(self, item: Object) -> None:
        """Replace an object, of a Service all but what the server wrote, so that nothing of the last step stays."""
        kind, namespace, name = _key(item)
        version = self._client.get(kind, name, namespace).resource_version
        self._client.update(item | {"metadata": item["metadata"] | {"resourceVersion": version}})

    def check(self) -> None:
        self._process.check()

    def log(self) -> str:
        return self._process.log_tail(40)


def _key(item: Object) -> tuple[str, str, str]:
    return item["kind"], item["metadata"].get("namespace", ""), item["metadata"]["name"]


def _without_status(item: Object) -> Object:
    return {field: value for field, value in item.items() if field != "status"}


def _ingress(item: Mapping[str, Any]) -> list[Object]:
    found: list[Object] = item.get("status", {}).get("loadBalancer", {}).get("ingress", [])
    return found


@contextmanager
def _from_api_server(run: Run, ground: Ground, directory: Path, plane: ControlPlane) -> Iterator[_Proxy]:
    client, cast = plane.client, ground.casts[""]
    namespaces = [CANARY, *map(run.plan.namespace, run.scenarios)]
    with ExitStack() as stack:
        for name in namespaces:
            if not any(item["metadata"]["name"] == name for item in client.list("Namespace").items):
                client.create(k8s.namespace(name))
            stack.callback(_empty, client, name)
        for where, node in ground.nodes.items():
            zone = run.configuration.zone if where == "here" else "zone-b"
            nodes.register(client, node, zone=zone or None)
            stack.callback(client.delete, "Node", node.name)
        stack.enter_context(nodes.relay(ground.here, plane))
        command = _kube_proxy(run, plane) if run.column == KUBE_PROXY else _vcproxy_run(run, plane, directory)
        process = nodes.daemon(ground.here, run.column, command, directory)
        proxy = _ApiProxy(run, cast, client, process)
        process.start()
        stack.callback(process.kill)
        yield proxy


def _empty(client: ApiClient, namespace: str) -> None:
    for kind in ("EndpointSlice", "Service"):
        client.delete_all(kind, namespace)


def _flags(run: Run, plane: ControlPlane) -> list[str]:
    """What kube-proxy and `vcproxy run` are both told, in the same words."""
    configuration = run.configuration
    flags = [
        f"--kubeconfig={plane.kubeconfig}",
        "--hostname-override=one",
        f"--nodeport-addresses={','.join(NODE_PORT_ADDRESSES[configuration.node_ports])}",
    ]
    if configuration.detector:
        flags.append(f"--cluster-cidr={','.join(POD_CIDRS)}")
    if configuration.masquerade_all:
        flags.append("--masquerade-all")
    return flags


def _kube_proxy(run: Run, plane: ControlPlane) -> list[str]:
    # Of the machine's limits of connection tracking it is told to keep its hands.
    untouched = ("--conntrack-max-per-core=0", "--conntrack-tcp-timeout-established=0", "--conntrack-tcp-timeout-close-wait=0")  # fmt: skip
    return [str(plane.bin_dir / "kube-proxy"), "--proxy-mode=nftables", *untouched, *_flags(run, plane)]


def _vcproxy_run(run: Run, plane: ControlPlane, directory: Path) -> list[str]:
    places = (f"--state-directory={directory}/state", f"--runtime-directory={directory}/run")
    return [sys.executable, "-m", "vcproxy", "run", *places, *_flags(run, plane)]


# --- from manifests ---------------------------------------------------------------------------------------------------


class _TenantProxy(_Proxy):
    def __init__(self, run: Run, ground: Ground, cluster: Cluster) -> None:
        self._run, self._ground, self._cluster = run, ground, cluster

    def publish(self, number: int) -> None:
        canaries = {tenant: _canaries(self._ground.casts[tenant], number) for tenant in (TENANT, OTHER)}
        first = [case for case in self._run.cases if case.step == 0]
        other = opposite_objects(self._run.plan, self._ground.casts[OTHER], first)
        held = {OTHER: other, TENANT: self._run.objects(self._ground.casts[TENANT], number)}
        for tenant, items in held.items():
            self._cluster.apply(tenant, "objects", [*self._facts(tenant, number), *items, *canaries[tenant]])

    def _facts(self, tenant: str, number: int) -> Iterator[Object]:
        """Nodes, the range of ClusterIPs, and where pods are."""
        yield service_cidr("kubernetes", SERVICE_CIDRS)
        for where, node in self._ground.nodes.items():
            zone = self._run.configuration.zone_in(number) if where == "here" else "zone-b"
            yield {**k8s.node(node.name, zone=zone or None), "status": k8s.node_status(node.ip4, node.ip6)}
        for role, pod in self._ground.pods(tenant).items():
            yield {**k8s.pod(role, node=pod.node), "status": k8s.pod_status(pod.ip4, pod.ip6)}

    def check(self) -> None:
        for name in ("brain", "one"):
            if not self._cluster.running(name):
                raise AssertionError(f"{name} has ended:\n{self._cluster.log(name)}")

    def log(self) -> str:
        return json.dumps(self._cluster.ask("brain"), indent=1)[:3000] + "\n".join(
            map(self._cluster.log, ("brain", "one"))
        )


@contextmanager
def _from_manifests(run: Run, ground: Ground, directory: Path) -> Iterator[_Proxy]:
    configuration = run.configuration
    policy = {"externalIPRanges": list(PUBLIC_CIDRS), "nodePorts": True}
    sources = [{"directory": {"path": str(directory / "tenants")}}]
    with Cluster(directory, brain={"tenants": {"sources": sources, "policy": policy}}) as cluster:
        proxy = _TenantProxy(run, ground, cluster)
        proxy.publish(0)
        cluster.start_brain()
        cluster.start_agent(
            ground.here,
            ground.overlays,
            detectLocal={"mode": "ClusterCIDR", "clusterCIDRs": list(POD_CIDRS)}
            if configuration.detector
            else {"mode": "None"},
            masqueradeAll=configuration.masquerade_all,
            nodePortAddresses=list(NODE_PORT_ADDRESSES[configuration.node_ports]),
        )
        yield proxy
