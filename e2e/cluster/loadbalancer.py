"""The cloud's load balancers, for a cluster without a cloud: addresses for Services, and routes to the nodes.

A Service of type LoadBalancer gets an address per family, and the control machine routes it to the nodes: to all of them,
or with externalTrafficPolicy Local to those whose health check node port says so; with session affinity to one, since a
stateless router would break it. Packets arrive at a node with the load balancer's address as destination (ipMode VIP),
which is what most clouds do and what a Service proxy must handle.

Reads all Services a few times a second instead of watching: what is tested is the proxy, and this cannot lose an event.
"""

import http.client
import threading
import time
from typing import Any

from e2e.apiclient import ApiClient, ApiError, Object
from e2e.cluster.addresses import OUTSIDE
from e2e.cluster.machine import Machine
from vcproxy.lab import LabError, netns

FINALIZER = "service.kubernetes.io/load-balancer-cleanup"
_EVERY = 0.4  # seconds
_NUMBERS = range(10, 250)


class LoadBalancers:
    """Runs in a thread of its own from `start` to `close`. `errors`: what went wrong, in words; it goes on after each."""

    def __init__(self, client: ApiClient, machine: Machine) -> None:
        self.errors: list[str] = []
        self._client = client
        self._machine = machine
        self._numbers: dict[str, int] = {}  # by the Service's uid
        self._free = list(reversed(_NUMBERS))
        self._routes: dict[str, tuple[str, ...]] = {}  # next hops by address
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="load-balancers", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(_EVERY):
            try:
                self._step()
            except (OSError, http.client.HTTPException, ApiError, LabError) as error:
                self.errors.append(f"at {time.time():.3f}: {type(error).__name__}: {error}")

    def _step(self) -> None:
        nodes = [_addresses(node) for node in self._client.list("Node").items]
        live = set()
        for service in self._client.list("Service").items:
            spec, metadata = service["spec"], service["metadata"]
            gone = "deletionTimestamp" in metadata
            if spec["type"] == "LoadBalancer" and not spec.get("loadBalancerClass") and not gone:
                live.add(metadata["uid"])
                self._serve(service, nodes)
            elif FINALIZER in metadata.get("finalizers", ()):
                self._release(metadata["uid"])
                if not gone:
                    self._publish(service, [])
                self._finalizers(service, [name for name in metadata["finalizers"] if name != FINALIZER])
        for uid in self._numbers.keys() - live:
            self._release(uid)

    def _serve(self, service: Object, nodes: list[list[str]]) -> None:
        spec, metadata = service["spec"], service["metadata"]
        finalizers = metadata.get("finalizers", [])
        if FINALIZER not in finalizers:
            self._finalizers(service, [*finalizers, FINALIZER])
        if metadata["uid"] not in self._numbers:
            self._numbers[metadata["uid"]] = self._free.pop()
        number = self._numbers[metadata["uid"]]
        addresses = [_address(number, family) for family in spec["ipFamilies"]]
        for address in addresses:
            self._route(address, self._targets(address, spec, nodes))
        ingress = service["status"].get("loadBalancer", {}).get("ingress") or []
        if [entry.get("ip") for entry in ingress] != addresses:
            self._publish(service, addresses)

    def _targets(self, address: str, spec: dict[str, Any], nodes: list[list[str]]) -> tuple[str, ...]:
        own = [ip for node in nodes for ip in node if (":" in ip) == (":" in address)]
        if spec.get("externalTrafficPolicy") == "Local":
            own = [ip for ip in own if self._healthy(ip, spec.get("healthCheckNodePort", 0))]
        if spec.get("sessionAffinity") == "ClientIP":
            kept = [ip for ip in self._routes.get(address, ()) if ip in own]
            own = (kept or own)[:1]
        return tuple(own)

    def _healthy(self, address: str, port: int) -> bool:
        connection = http.client.HTTPConnection(address, port, timeout=1)
        try:
            with netns.entered(self._machine.ns):
                connection.connect()
            connection.request("GET", "/healthz")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _route(self, address: str, targets: tuple[str, ...]) -> None:
        if self._routes.get(address, ()) == targets:
            return
        if targets:
            hops = " ".join(f"nexthop via {target}" for target in targets)
            self._machine.ip([f"route replace {address} src {OUTSIDE[':' in address]} {hops}"])
        else:
            self._machine.ip([f"route del {address}"])
        self._routes[address] = targets

    def _release(self, uid: str) -> None:
        if (number := self._numbers.pop(uid, None)) is not None:
            for family in ("IPv4", "IPv6"):
                self._route(_address(number, family), ())
            self._free.insert(0, number)  # used again as late as possible

    def _publish(self, service: Object, addresses: list[str]) -> None:
        ingress = [{"ip": address, "ipMode": "VIP"} for address in addresses]
        metadata = service["metadata"]
        self._client.patch_status(
            "Service", metadata["name"], {"loadBalancer": {"ingress": ingress}}, metadata["namespace"]
        )

    def _finalizers(self, service: Object, finalizers: list[str]) -> None:
        metadata = service["metadata"]
        self._client.patch("Service", metadata["name"], {"metadata": {"finalizers": finalizers}}, metadata["namespace"])


def _address(number: int, family: str) -> str:
    return f"fd00:98::{number:x}" if family == "IPv6" else f"10.98.0.{number}"


def _addresses(node: Object) -> list[str]:
    return [entry["address"] for entry in node["status"].get("addresses", ()) if entry["type"] == "InternalIP"]
