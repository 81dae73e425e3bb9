"""vcproxy itself in the lab: a brain and node agents as separate processes, over mutual TLS, fed from a directory.

They are started through the same command line and configuration files that an operator uses, so what the demo and the
tests see is the product. Certificates come from a small CA made for the occasion. The processes die with their maker
(PR_SET_PDEATHSIG, prctl(2)), so a killed test leaves nothing behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from vcproxy.lab import netns
from vcproxy.lab.errors import LabError
from vcproxy.lab.topology import Client, Node, Tenant
from vcproxy.ops import admin, configfile, pki

BRAIN_NAME = "vcproxy-brain"
_GRACE = 10.0  # seconds for a daemon to end by itself
# A program and not preexec_fn: for Python between fork and exec, subprocess forks in earnest, and a gRPC that the
# caller uses then starts its threads anew, in the child too, and in the network namespace of the caller at that time.
DIE_WITH_PARENT = ("setpriv", "--pdeathsig", "KILL", "--")


class Cluster:
    """A brain, or replicas of it, and its node agents.

    `directory` holds configuration, certificates, sockets, logs and each node's state; `tenants` below it is the
    brain's directory source. The brain listens in the namespace of `place` when one is given, else on a unix socket:
    that reaches every namespace, and leaves the brain where the API servers of a test are. `replicas`: names of all
    brains that agents know; one that is not started is not there. `environment`: further variables of a process, by its
    name.
    """

    def __init__(
        self,
        directory: Path,
        *,
        place: Client | None = None,
        brain: Mapping[str, Any] | None = None,
        replicas: Sequence[str] = ("brain",),
        environment: Callable[[str], Mapping[str, str]] = lambda name: {},
    ) -> None:
        self.directory = directory
        self._environment = environment
        self._replicas = tuple(replicas)
        self.tenants = directory / "tenants"
        self._place = place
        self._extra = dict(brain or {})
        self._authority = pki.Authority("lab")
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._agents: dict[str, tuple[Node, Path]] = {}
        self.tenants.mkdir(parents=True, exist_ok=True)
        (directory / "pki").mkdir(exist_ok=True)
        (directory / "pki" / "ca.crt").write_bytes(self._authority.certificate)
        names = [BRAIN_NAME, *((place.ip4, place.ip6) if place else ())]
        self._authority.server(names).write(directory / "pki", "brain")

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def address(self, name: str = "brain") -> str:
        """Where a brain listens."""
        return f"{self._place.ip4}:7443" if self._place else f"unix:{self.directory}/{name}.grpc"

    def start_brain(self, name: str = "brain", *, ns: str | None = None, **settings: Any) -> subprocess.Popen[bytes]:
        """Start (or start again) a brain; it is not ready when this returns.

        `ns`: it reaches API servers from this network namespace. `settings`: further fields of the BrainConfiguration.
        """
        config = {
            "listen": {"address": self.address(name), **self._tls("brain", "clientCAFile")},
            "superCluster": None,
            "tenants": {"sources": [{"directory": {"path": str(self.tenants)}}]},
            "stateDirectory": str(self.directory / f"{name}-state"),
            "adminSocket": self.socket(name),
            "metricsAddress": "",
            "logFormat": "text",
        }
        path = self._write(name, "BrainConfiguration", {**config, **self._extra, **settings})
        return self._spawn(name, self._place.ns if self._place else ns, path)

    def start_agent(self, node: Node, overlays: Iterable[Tenant] = (), **settings: Any) -> subprocess.Popen[bytes]:
        """Start (or start again, then with the settings of the first start) a node's agent.

        `overlays`: tenants recognised by their devices; pod addresses in the brain's placement always count too.
        `settings`: further fields of the NodeConfiguration.
        """
        if node.name not in self._agents:
            self._authority.node(node.name).write(self.directory / "pki", node.name)
            interfaces = [{"interface": {"tenant": t.name, "names": list(t.interfaces)}} for t in overlays]
            config = {
                "nodeName": node.name,
                "brain": {
                    "addresses": [self.address(name) for name in self._replicas],
                    "serverName": BRAIN_NAME,
                    **self._tls(node.name, "caFile"),
                },
                "attachments": [*interfaces, {"address": {}}],
                "stateDirectory": str(self.directory / node.name),
                "adminSocket": self.socket(node.name),
                "metricsAddress": "",
                "healthAddress": "",
                "logFormat": "text",
            }
            path = self._write(node.name, "NodeConfiguration", {**config, **settings})
            self._agents[node.name] = (node, path)
        node, path = self._agents[node.name]
        return self._spawn(node.name, node.ns, path)

    def socket(self, name: str) -> str:
        """The admin socket of "brain" or of a node."""
        return str(self.directory / f"{name}.sock")

    def ask(self, name: str, route: str = "/status", **parameters: str) -> Any:
        """An answer of the admin socket of "brain" or of a node. Raises AdminError while it is not there."""
        return asyncio.run(admin.fetch(self.socket(name), route, parameters))

    def wait(self, what: str, ready: Callable[[], Any], timeout: float = 20.0) -> Any:
        """Poll until `ready` returns something true, and return it; an admin socket that does not answer yet is not
        ready. Raises LabError naming `what`, with the end of the logs.
        """
        deadline = time.monotonic() + timeout
        while True:
            try:
                if value := ready():
                    return value
            except admin.AdminError:
                pass
            for name, process in self._processes.items():
                if (status := process.poll()) not in (None, -signal.SIGKILL, -signal.SIGTERM, 0):
                    raise LabError(f"{name} ended with {status} while waiting until {what}:\n{self.log(name)}")
            if time.monotonic() > deadline:
                logs = "\n".join(f"--- {name}\n{self.log(name)}" for name in self._processes)
                raise LabError(f"not within {timeout:g} s: {what}\n{logs}")
            time.sleep(0.005)

    def wait_committed(self, node: str, tenant: str, timeout: float = 20.0) -> Mapping[str, Any]:
        """Wait until a node has committed the brain's newest revision of a tenant (uid); returns the node's row."""

        def committed() -> Mapping[str, Any] | None:
            wanted = {row["uid"]: row for row in self.ask("brain", "/tenants")}.get(tenant)
            rows: Sequence[Mapping[str, Any]] = self.ask(node)["tenants"]
            held = {row["uid"]: row for row in rows}.get(tenant)
            if wanted and held and wanted["synced"] and held["digest"] == wanted["digest"]:
                return held if held["committedDigest"] == held["digest"] else None
            return None

        row: Mapping[str, Any] = self.wait(f"{node} committed tenant {tenant}", committed, timeout)
        return row

    def running(self, name: str) -> bool:
        """Whether the brain ("brain") or a node's agent was started and runs."""
        process = self._processes.get(name)
        return process is not None and process.poll() is None

    def kill(self, name: str) -> None:
        """SIGKILL the brain ("brain") or a node's agent."""
        process = self._processes.pop(name)
        process.kill()
        process.wait()

    def end(self, name: str) -> int:
        """SIGTERM the brain ("brain") or a node's agent, and wait; its status."""
        process = self._processes.pop(name)
        process.terminate()
        return process.wait(_GRACE)

    def freeze(self, name: str) -> None:
        """SIGSTOP the brain ("brain") or a node's agent: its connections stand, and it says nothing."""
        self._processes[name].send_signal(signal.SIGSTOP)

    def thaw(self, name: str) -> None:
        """SIGCONT what was frozen."""
        self._processes[name].send_signal(signal.SIGCONT)

    def stop(self) -> None:
        """SIGTERM everything and wait."""
        for process in self._processes.values():
            process.terminate()
        for process in self._processes.values():
            try:
                process.wait(_GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._processes.clear()

    def log(self, name: str, lines: int = 40) -> str:
        """The end of a process's log."""
        path = self.directory / f"{name}.log"
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:]) if path.exists() else ""

    def apply(self, tenant: str, name: str, objects: Sequence[Mapping[str, Any]]) -> float:
        """Make `objects` the content of one manifest file of a tenant; atomic. Returns the time of it (time.time)."""
        folder = self.tenants / tenant
        folder.mkdir(exist_ok=True)
        text = "---\n".join(json.dumps(item) + "\n" for item in objects)
        part = folder / f".{name}.part"
        part.write_text(text)
        now = time.time()
        part.rename(folder / f"{name}.yaml")
        return now

    def remove(self, tenant: str, name: str) -> None:
        """Remove one manifest file of a tenant."""
        (self.tenants / tenant / f"{name}.yaml").unlink()

    def _tls(self, name: str, authority: str) -> dict[str, str]:
        folder = self.directory / "pki"
        return {
            "certFile": str(folder / f"{name}.crt"),
            "keyFile": str(folder / f"{name}.key"),
            authority: str(folder / "ca.crt"),
        }

    def _write(self, name: str, kind: str, fields: Mapping[str, Any]) -> Path:
        path = self.directory / f"{name}.yaml"
        # JSON is YAML.
        path.write_text(json.dumps({"apiVersion": configfile.API_VERSION, "kind": kind, **fields}, indent=2))
        return path

    def _spawn(self, name: str, ns: str | None, config: Path) -> subprocess.Popen[bytes]:
        command = "brain" if name in self._replicas else "node"
        argv = [sys.executable, "-m", "vcproxy", command, "--config", str(config)]
        inside = netns.entered(ns) if ns else contextlib.nullcontext()
        with (self.directory / f"{name}.log").open("ab") as log, inside:
            process = subprocess.Popen(
                [*DIE_WITH_PARENT, *argv],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **self._environment(name)},
            )
        self._processes[name] = process
        return process


def service(
    name: str,
    cluster_ips: Sequence[str],
    ports: Sequence[tuple[str, str, int, int]],
    *,
    namespace: str = "default",
    **spec: Any,
) -> dict[str, Any]:
    """A Service manifest. `ports`: (name, protocol, port, target port) each; `spec`: further fields of the spec."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "type": "ClusterIP",
            "clusterIP": cluster_ips[0],
            "clusterIPs": list(cluster_ips),
            "ipFamilies": ["IPv6" if ":" in ip else "IPv4" for ip in cluster_ips],
            "ports": [
                {"name": port, "protocol": protocol, "port": number, "targetPort": target}
                for port, protocol, number, target in ports
            ],
            **spec,
        },
    }


def endpoint_slice(
    owner: str,
    family: str,
    endpoints: Sequence[tuple[str, str]],
    ports: Sequence[tuple[str, str, int]],
    *,
    namespace: str = "default",
    conditions: Mapping[str, bool] | None = None,
) -> dict[str, Any]:
    """An EndpointSlice manifest of a Service.

    `family`: IPv4 or IPv6; `endpoints`: (address, node) each; `ports`: (name, protocol, port) each.
    """
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": f"{owner}-{family.lower()}",
            "namespace": namespace,
            "labels": {"kubernetes.io/service-name": owner},
        },
        "addressType": family,
        "ports": [{"name": port, "protocol": protocol, "port": number} for port, protocol, number in ports],
        "endpoints": [
            {"addresses": [address], "conditions": dict(conditions or {"ready": True}), "nodeName": node}
            for address, node in endpoints
        ],
    }
