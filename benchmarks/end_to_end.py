"""One endpoint change, from the write at a real API server to the kernel commit. `python -m benchmarks end-to-end`.

The clock starts when the API server has answered the write, and stops at the commit that the agent stamped; all on one
machine, so one clock. Beside it the floor: a bare watch on the same API server, from the same answer to the event's
arrival, which no proxy that watches can beat.
"""

import base64
import http.client
import json
import ssl
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

from benchmarks.results import quantile
from e2e import objects
from e2e.apiclient import ApiClient
from e2e.controlplane import ControlPlane, find_binaries
from vcproxy.lab import Lab
from vcproxy.lab.cluster import Cluster

CHANGES = 60
SERVICES = (0, 1_000)
"""Other Services in the tenant."""


def report(show: Callable[[Any], None]) -> None:
    """Measure at each size and show one table."""
    drawn = Table(title="one endpoint: API server answered the write -> kernel committed")
    for heading in ("other services", "median", "p99", "floor: bare watch, median"):
        drawn.add_column(heading, justify="right")
    with tempfile.TemporaryDirectory(prefix="vcproxy-bench-") as directory:
        path = Path(directory)
        with (
            ControlPlane("bench", path / "plane", bin_dir=find_binaries(build=False)) as plane,
            Lab("vcp-bench") as lab,
        ):
            node = lab.node("one")
            tenant = lab.overlay_tenant("acme", vni=100)
            node.overlay_pod(tenant, "client", "10.244.0.10", "fd00:244::10")
            with Cluster(path / "cluster") as cluster:
                (cluster.tenants / "acme.kubeconfig").write_text(plane.kubeconfig.read_text())
                cluster.start_brain()
                cluster.start_agent(node, [tenant])
                client = ApiClient(plane.kubeconfig)
                client.create(objects.namespace("bench"))
                held = 0
                for services in SERVICES:
                    client.create_all([a_service(number) for number in range(held, services)])
                    client.create_all([a_slice(f"svc-{number}", number) for number in range(held, services)])
                    held = services
                    took, floor = changes(cluster, client, plane)
                    drawn.add_row(
                        f"{services:,}",
                        f"{statistics.median(took) * 1e3:.1f} ms",
                        f"{quantile(took, 0.99) * 1e3:.1f} ms",
                        f"{statistics.median(floor) * 1e3:.1f} ms",
                    )
    show(drawn)


def a_service(number: int) -> dict[str, Any]:
    """A Service of one port."""
    return objects.service(f"svc-{number}", namespace="bench", ports=[objects.service_port(80, name="http")])


def a_slice(service: str, turn: int) -> dict[str, Any]:
    """A Service's slice, with one endpoint that depends on `turn`."""
    return objects.endpoint_slice(
        service,
        service=service,
        namespace="bench",
        endpoints=[objects.endpoint(f"10.244.{1 + turn // 250}.{1 + turn % 250}", node="one")],
        ports=[objects.slice_port(8080, name="http")],
    )


def changes(cluster: Cluster, client: ApiClient, plane: ControlPlane) -> tuple[list[float], list[float]]:
    """CHANGES changes, one at a time: seconds to the kernel, and to a bare watch."""
    name = f"changing-{time.monotonic_ns()}"
    service = objects.service(name, namespace="bench", ports=[objects.service_port(80, name="http")])
    client.create(service)
    client.create(a_slice(name, 0))
    cluster.wait_committed("one", "dir-acme")
    watch = Watch(plane, name)
    took, floor = [], []
    for turn in range(1, CHANGES + 1):
        before = committed_at(cluster)
        answer = client.patch("EndpointSlice", name, {"endpoints": a_slice(name, turn)["endpoints"]}, namespace="bench")
        answered = time.time() - (time.monotonic() - answer.answered)
        floor.append(watch.next() - answered)
        took.append(cluster.wait("it was committed", lambda before=before: newer(cluster, before)) - answered)
    watch.close()
    return took, floor


def committed_at(cluster: Cluster) -> float:
    """When the agent last committed the tenant, Unix seconds."""
    (row,) = [row for row in cluster.ask("one", "/tenants") if row["uid"] == "dir-acme"]
    return float(row["committedAt"] or 0)


def newer(cluster: Cluster, before: float) -> float | None:
    """The time of a commit after `before`."""
    now = committed_at(cluster)
    return now if now > before else None


class Watch:
    """A bare watch of one slice with the standard library: arrival times of its events."""

    def __init__(self, plane: ControlPlane, name: str) -> None:
        document = yaml.safe_load(plane.kubeconfig.read_text())
        self._times: list[float] = []
        self._new = threading.Condition()
        context = _context(document)
        host = plane.url.removeprefix("https://")
        self._connection = http.client.HTTPSConnection(host, context=context)
        selector = f"fieldSelector=metadata.name%3D{name}&watch=true"
        self._connection.request("GET", f"/apis/discovery.k8s.io/v1/namespaces/bench/endpointslices?{selector}")
        self._response = self._connection.getresponse()
        json.loads(self._response.readline())  # the object as it is
        threading.Thread(target=self._read, daemon=True).start()
        self._seen = 0

    def _read(self) -> None:
        try:
            while self._response.readline():
                with self._new:
                    self._times.append(time.time())
                    self._new.notify()
        except (OSError, ValueError, AttributeError):  # closed
            pass

    def next(self) -> float:
        """The arrival time of the next event."""
        with self._new:
            if not self._new.wait_for(lambda: len(self._times) > self._seen, timeout=10):
                raise TimeoutError("the API server sent no event within 10 s")
            self._seen += 1
            return self._times[self._seen - 1]

    def close(self) -> None:
        """End the watch."""
        if self._connection.sock:
            self._connection.sock.close()


def _context(document: dict[str, Any]) -> ssl.SSLContext:
    cluster, user = document["clusters"][0]["cluster"], document["users"][0]["user"]
    context = ssl.create_default_context(cadata=base64.b64decode(cluster["certificate-authority-data"]).decode())
    with tempfile.NamedTemporaryFile() as pem:
        pem.write(base64.b64decode(user["client-key-data"]) + base64.b64decode(user["client-certificate-data"]))
        pem.flush()
        context.load_cert_chain(pem.name)
    return context
