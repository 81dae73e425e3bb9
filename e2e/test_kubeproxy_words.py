"""What kube-proxy shows to the outside, and what vcproxy does: the real kube-proxy on one node, `vcproxy run` on the
other, the same super cluster, the same questions."""

from __future__ import annotations

import datetime
import json
import secrets
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from e2e import nodes
from e2e.apiclient import ApiError, Resource
from e2e.controlplane import ControlPlane
from e2e.objects import endpoint, endpoint_slice, namespace, service, service_port, slice_port
from e2e.polling import eventually
from vcproxy.lab import Broken, HttpReply, Lab, Node, Refused, Reply, http_get, netns, udp_request

pytestmark = [pytest.mark.controlplane, pytest.mark.packets]

OPERATIONS = Path(__file__).parents[1] / "docs" / "operations.md"
EVENTS = Resource("events.k8s.io/v1", "Event", "events")
HEALTH, METRICS = 10256, 10249
TARGET = 8080
PORTS = [service_port(80, name="http", target=TARGET), service_port(80, name="ask", protocol="UDP", target=TARGET)]
SLICE_PORTS = [slice_port(TARGET, name="http"), slice_port(TARGET, name="ask", protocol="UDP")]
TAINT = {"key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule", "value": "1"}
NOT_SHOWN: Mapping[str, str] = {}
"""Metrics of kube-proxy that vcproxy does not have, and why; docs/operations.md has the same."""


class Proxies:
    """The two of them. `nodes`: by the program that runs there, kube-proxy and vcproxy."""

    def __init__(self, lab: Lab, plane: ControlPlane) -> None:
        self.plane, self.client = plane, plane.client
        self.outside = lab.client("outside", "192.168.77.200", "fd77::200")
        tag = secrets.token_hex(2)
        self.nodes: dict[str, Node] = {name: lab.node(f"{name}-{tag}") for name in ("kube-proxy", "vcproxy")}
        self.namespace = f"words-{tag}"
        self.pods = {}
        for number, (name, place) in enumerate(self.nodes.items(), start=1):
            pod = place.flat_pod(f"super/{name}", f"10.200.{number}.2", f"fd00:200:0:{number}::2")
            lab.serve(pod, tcp=[TARGET], udp=[TARGET])
            self.pods[name] = pod

    def ask(self, name: str, port: int, path: str = "/", *, family: int = 4) -> HttpReply | None:
        """Ask a node from outside, at its own address; None: nobody listens there, or just stopped to."""
        place = self.nodes[name]
        said = http_get(self.outside, place.ip4 if family == 4 else place.ip6, port, path)
        assert isinstance(said, HttpReply | Refused | Broken), said
        return said if isinstance(said, HttpReply) else None

    def metrics(self, name: str) -> dict[str, Metric]:
        """What a Prometheus reads."""
        said = http_get(self.nodes[name], "127.0.0.1", METRICS, "/metrics")
        assert isinstance(said, HttpReply), f"{name} shows no metrics: {said}"
        return {family.name: family for family in text_string_to_metric_families(said.body)}

    def slices(self, name: str, endpoints: Mapping[str, Mapping[str, Any]]) -> None:
        """Make these the endpoints of a Service, one on each node: conditions, by program."""
        for family in ("IPv4", "IPv6"):
            made = [
                endpoint(pod.ip4 if family == "IPv4" else pod.ip6, node=pod.node, **endpoints[program])
                for program, pod in self.pods.items()
                if program in endpoints
            ]
            built = endpoint_slice(
                f"{name}-{family.lower()}",
                service=name,
                namespace=self.namespace,
                endpoints=made,
                ports=SLICE_PORTS,
                family=family,
            )
            now = datetime.datetime.now(datetime.UTC).isoformat().replace("+00:00", "Z")
            built["metadata"]["annotations"] = {"endpoints.kubernetes.io/last-change-trigger-time": now}
            try:
                self.client.update(built)
            except ApiError as error:
                assert error.status == 404
                self.client.create(built)

    def balancer(self, name: str, **spec: Any) -> dict[str, Any]:
        """A new load balancer with a Local policy; the Service as the API server has it."""
        spec = {"externalTrafficPolicy": "Local", **spec}
        built = service(name, namespace=self.namespace, type="LoadBalancer", ports=PORTS, dual_stack=True, spec=spec)
        made: dict[str, Any] = self.client.create(built).object
        return made

    def both(
        self, port: int, wanted: int | None, *, family: int = 4, weight: str | None = None
    ) -> dict[str, HttpReply | None]:
        """Wait until both answer so on a health-check node port; returns the answers."""

        def look() -> dict[str, HttpReply | None]:
            said = {name: self.ask(name, port, family=family) for name in self.nodes}
            for name, answer in said.items():
                assert (answer and answer.status) == wanted, f"{name}: {answer}"
                assert weight is None or (answer and answer.headers["X-Load-Balancing-Endpoint-Weight"]) == weight, name
            return said

        return eventually(look, within=30, what=f"{wanted} on port {port} of both nodes")


@pytest.fixture(scope="module")
def proxies(
    super_plane: ControlPlane, control_plane_binaries: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Proxies]:
    directory = tmp_path_factory.mktemp("words")
    with ExitStack() as stack:
        lab = stack.enter_context(Lab("vcp-words"))
        made = Proxies(lab, super_plane)
        client = super_plane.client
        client.create(namespace(made.namespace))
        for kind in ("Service", "EndpointSlice"):
            stack.callback(client.delete_all, kind, made.namespace)
        for place in made.nodes.values():
            nodes.register(client, place)
            stack.callback(_forget, client.delete, "Node", place.name)
            stack.enter_context(nodes.relay(place, super_plane))
        config = directory / "kube-proxy.yaml"
        config.write_text(json.dumps(_kube_proxy(made.nodes["kube-proxy"].name, super_plane.kubeconfig)))
        commands = {
            "kube-proxy": [str(control_plane_binaries / "kube-proxy"), "--config", str(config)],
            "vcproxy": [
                sys.executable, "-m", "vcproxy", "run", "--kubeconfig", str(super_plane.kubeconfig),
                "--hostname-override", made.nodes["vcproxy"].name, "--cluster-cidr", "10.200.0.0/16,fd00:200::/32",
                "--state-directory", str(directory / "state"), "--runtime-directory", str(directory / "run"),
            ],
        }  # fmt: skip
        for name, command in commands.items():
            log = stack.enter_context((directory / f"{name}.log").open("wb"))
            process = made.nodes[name].spawn(command, stdout=log, stderr=log)
            stack.callback(process.wait, 20)
            stack.callback(process.terminate)

            def well(name: str = name) -> bool:
                said = made.ask(name, HEALTH, "/healthz")
                assert said is not None and said.status == 200, (directory / f"{name}.log").read_text()[-3000:]
                return True

            eventually(well, within=30, what=f"{name} healthy")
        yield made


def _kube_proxy(name: str, kubeconfig: Path) -> dict[str, Any]:
    return {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": "nftables",
        "hostnameOverride": name,
        "clientConnection": {"kubeconfig": str(kubeconfig)},
        "clusterCIDR": "10.200.0.0/16,fd00:200::/32",
        "nodePortAddresses": ["primary"],
        "conntrack": {"maxPerCore": 0, "min": 0},
    }


def _forget(call: Callable[..., object], *arguments: str) -> None:
    """Delete what a test may have deleted."""
    try:
        call(*arguments)
    except ApiError as error:
        assert error.status == 404, error


READY = {"ready": True, "serving": True, "terminating": False}
TERMINATING = {"ready": False, "serving": True, "terminating": True}
UNREADY = {"ready": False, "serving": False, "terminating": False}


def test_a_health_check_node_port_asked_from_outside(proxies: Proxies) -> None:
    made = proxies.balancer("asked")
    port = made["spec"]["healthCheckNodePort"]
    for family in (4, 6):
        assert proxies.both(port, 503, family=family, weight="0")
    for conditions, status, weight in (
        (READY, 200, "1"),
        (TERMINATING, 503, "0"),
        (READY, 200, "1"),
        (UNREADY, 503, "0"),
    ):
        proxies.slices("asked", dict.fromkeys(proxies.pods, conditions))
        for family in (4, 6):
            said = proxies.both(port, status, family=family, weight=weight)
            theirs, ours = said["kube-proxy"], said["vcproxy"]
            assert theirs is not None and ours is not None
            assert ours.body == theirs.body
            for header in ("Content-Type", "X-Content-Type-Options", "X-Load-Balancing-Endpoint-Weight"):
                assert ours.headers[header] == theirs.headers[header]
    proxies.slices("asked", {"kube-proxy": READY})  # for the other one an endpoint elsewhere
    for name, status in (("kube-proxy", 200), ("vcproxy", 503)):
        eventually(
            lambda name=name, status=status: getattr(proxies.ask(name, port), "status", None) == status, within=15
        )


def test_a_health_check_node_port_comes_and_goes_with_the_policy(proxies: Proxies) -> None:
    port = proxies.balancer("moved")["spec"]["healthCheckNodePort"]
    proxies.slices("moved", dict.fromkeys(proxies.pods, READY))
    proxies.both(port, 200)
    proxies.client.patch("Service", "moved", {"spec": {"externalTrafficPolicy": "Cluster"}}, proxies.namespace)
    proxies.both(port, None)
    local = {"spec": {"externalTrafficPolicy": "Local"}}
    again = proxies.client.patch("Service", "moved", local, proxies.namespace).object["spec"]["healthCheckNodePort"]
    proxies.both(again, 200)
    proxies.client.delete("Service", "moved", proxies.namespace)
    proxies.both(again, None)


def test_events(proxies: Proxies) -> None:
    """kube-proxy's own Events: the same but for the time, the node and the reporter."""
    taken = 31999
    with ExitStack() as stack:
        for place in proxies.nodes.values():
            held = stack.enter_context(netns.socket_in(place.ns, socket.AF_INET, socket.SOCK_STREAM))
            held.bind((place.ip4, taken))
            held.listen()
        proxies.balancer("taken", healthCheckNodePort=taken)
        for regarding, space in (("Node", "default"), ("Service", proxies.namespace)):

            def told(regarding: str = regarding, space: str = space) -> bool:
                found = proxies.client.list(EVENTS, space).items
                said = {}
                for name, place in proxies.nodes.items():
                    wanted = place.name if regarding == "Node" else "taken"
                    mine = [
                        event
                        for event in found
                        if event["reportingController"] == name
                        and event["regarding"] == {"kind": regarding, **_where(regarding, wanted, space)}
                    ]
                    assert mine, f"{name} has written none: {found}"
                    fields = {field: mine[0].get(field) for field in ("type", "reason", "action")}
                    note = mine[0].get("note", "").replace(place.name, "NODE").partition(": ")[0]
                    said[name] = {**fields, "note": note}
                assert said["vcproxy"] == said["kube-proxy"]
                return True

            eventually(told, within=20, what=f"Events about a {regarding}")


def _where(kind: str, name: str, space: str) -> dict[str, str]:
    place = {"namespace": space} if kind == "Service" else {}
    return {"apiVersion": "v1", "name": name, **place}


def shape(metric: Metric) -> tuple[str, set[str], set[float]]:
    """Type, names of labels, and a histogram's bounds."""
    labels = {name for sample in metric.samples for name in sample.labels if name != "le"}
    bounds = {float(sample.labels["le"]) for sample in metric.samples if "le" in sample.labels}
    return metric.type, labels, bounds


def unserved(metrics: Mapping[str, Metric]) -> float:
    """Service ports without local endpoints."""
    labels = {"traffic_policy": "internal", "ip_family": "IPv4"}
    samples = metrics["kubeproxy_sync_proxy_rules_no_local_endpoints_total"].samples
    return next((sample.value for sample in samples if sample.labels == labels), 0.0)


def test_metrics(proxies: Proxies) -> None:
    """All that kube-proxy shows of itself, we show: name, type, labels and their values, bounds."""
    client, space = proxies.client, proxies.namespace
    for name in proxies.nodes:  # its probes are counted
        proxies.ask(name, HEALTH, "/livez")
    inner = service("inner", namespace=space, ports=PORTS, dual_stack=True, spec={"internalTrafficPolicy": "Local"})
    vip = client.create(inner).object["spec"]["clusterIP"]
    proxies.slices("inner", dict.fromkeys(proxies.pods, READY))
    for pod in proxies.pods.values():
        eventually(lambda pod=pod: isinstance(udp_request(pod, vip, 80), Reply), within=15, what="the Service answers")
    for conditions in (UNREADY, READY):  # UDP flows are looked at when endpoints go
        proxies.slices("inner", dict.fromkeys(proxies.pods, conditions))
    other = {"vcproxy": {"kube-proxy": READY}, "kube-proxy": {"vcproxy": READY}}
    for name, endpoints in other.items():
        proxies.slices("inner", endpoints)
        eventually(lambda name=name: unserved(proxies.metrics(name)) >= 2, within=15, what=f"{name} counts two ports")

    theirs, ours = proxies.metrics("kube-proxy"), proxies.metrics("vcproxy")
    shown = {name for name in theirs if name.startswith("kubeproxy_")} | {"kubernetes_build_info"}
    assert len(shown) >= 16, f"kube-proxy shows less than it did when this was written: {sorted(shown)}"
    missing = shown - ours.keys() - NOT_SHOWN.keys()
    assert not missing, f"kube-proxy shows {missing}"
    for name in sorted(shown & ours.keys()):
        assert shape(ours[name]) == shape(theirs[name]), name
        for label in ("ip_family", "traffic_policy"):
            values = [{sample.labels.get(label) for sample in one[name].samples} for one in (ours, theirs)]
            assert values[0] == values[1], f"{name}: {label}"
    page = OPERATIONS.read_text()
    undocumented = [name for name in ours if name.startswith(("kubeproxy_", "kubernetes_")) and f"`{name}" not in page]
    assert not undocumented, undocumented
    assert all(f"`{name}" in page for name in NOT_SHOWN)


def test_a_tainted_node_is_drained_and_not_restarted(proxies: Proxies) -> None:
    for taints, healthz in (([TAINT], 503), ([], 200)):
        for place in proxies.nodes.values():
            proxies.client.patch("Node", place.name, {"spec": {"taints": taints}})

        def look(healthz: int = healthz) -> dict[str, HttpReply | None]:
            said = {name: proxies.ask(name, HEALTH, "/healthz") for name in proxies.nodes}
            assert all(answer is not None and answer.status == healthz for answer in said.values()), said
            return said

        bodies = {name: json.loads(answer.body) for name, answer in eventually(look, within=15).items() if answer}
        theirs, ours = bodies["kube-proxy"], bodies["vcproxy"]
        assert list(ours) == list(theirs)
        assert ours["nodeEligible"] is theirs["nodeEligible"] is (healthz == 200)
        assert ours["healthy"] is theirs["healthy"] is True
        assert ours["status"].keys() == theirs["status"].keys()
        for family, status in theirs["status"].items():
            assert ours["status"][family].keys() == status.keys()
        for name in proxies.nodes:
            assert (ours["lastUpdated"] == ours["currentTime"]) is (healthz == 200)
            livez = proxies.ask(name, HEALTH, "/livez")
            assert livez is not None and livez.status == 200
            assert "nodeEligible" not in livez.body


def test_the_ports_answer_alike(proxies: Proxies) -> None:
    for port, path in (
        (METRICS, "/healthz"),
        (METRICS, "/healthz?verbose"),
        (METRICS, "/healthz/ping"),
        (METRICS, "/livez"),
        (METRICS, "/nothing"),
        (HEALTH, "/nothing"),
    ):
        theirs, ours = (http_get(place, "127.0.0.1", port, path) for place in proxies.nodes.values())
        assert isinstance(theirs, HttpReply) and isinstance(ours, HttpReply)
        assert ours.status == theirs.status, (port, path)
        if theirs.status == 200:
            assert (ours.body, ours.headers["Content-Type"]) == (theirs.body, theirs.headers["Content-Type"])


def test_a_node_that_is_being_deleted_is_drained(proxies: Proxies) -> None:
    """The last one: it takes our Node away."""
    name = proxies.nodes["vcproxy"].name
    proxies.client.patch("Node", name, {"metadata": {"finalizers": ["vcproxy.dev/test"]}})
    proxies.client.delete("Node", name)

    def drained() -> bool:
        healthz, livez = (proxies.ask("vcproxy", HEALTH, path) for path in ("/healthz", "/livez"))
        assert healthz is not None and livez is not None
        assert (healthz.status, livez.status) == (503, 200)
        return json.loads(healthz.body)["nodeEligible"] is False

    eventually(drained, within=15, what="the node is not eligible while its Node is being deleted")
    proxies.client.patch("Node", name, {"metadata": {"finalizers": None}})
    with pytest.raises(ApiError, match="404"):
        proxies.client.get("Node", name)
    eventually(drained, within=15, what="nor when it is gone")
