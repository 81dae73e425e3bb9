"""The processes of this benchmark: helpers that take orders, and the brain itself with its clocks."""

import base64
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.brain.objects import tenant_name
from vcproxy.lab.cluster import BRAIN_NAME, DIE_WITH_PARENT
from vcproxy.ops import configfile, pki


class Helper:
    """A module of this package as a process: orders in, answers out."""

    def __init__(self, module: str, *arguments: object) -> None:
        argv = [*DIE_WITH_PARENT, sys.executable, "-m", f"benchmarks.brain.{module}", *map(str, arguments)]
        self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def order(self, *words: object) -> None:
        """Give an order."""
        assert self.process.stdin is not None
        self.process.stdin.write((" ".join(map(str, words)) + "\n").encode())
        self.process.stdin.flush()

    def answer(self) -> Any:
        """Wait for the next answer."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.process.args!r} ended")
        return json.loads(line)

    def ask(self, *words: object) -> Any:
        """Give an order and wait until it has been carried out."""
        self.order(*words)
        return self.answer()

    def __enter__(self) -> "Helper":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()


class Scene:
    """Certificates and kubeconfigs of so many tenants and nodes."""

    def __init__(self, directory: Path, tenants: int, nodes: int) -> None:
        self.directory, self.tenants = directory, tenants
        self._authority = pki.Authority("benchmark")
        (directory / "ca.crt").write_bytes(self._authority.certificate)
        self._authority.server([BRAIN_NAME]).write(directory, "brain")
        self._authority.server(["127.0.0.1"]).write(directory, "apiserver")
        for number in range(nodes):
            self._authority.node(f"node-{number}").write(directory, f"node-{number}")

    def enrol(self, ports: Sequence[int]) -> None:
        """Write each tenant's kubeconfig, and the super cluster's."""
        folder = self.directory / "all"
        folder.mkdir()
        for number, port in enumerate(ports):
            pair = self._authority.client("kubernetes-admin", ("system:masters",))
            file = folder / f"{tenant_name(number)}.kubeconfig" if number < self.tenants else self._super
            file.write_text(_kubeconfig(self._authority.certificate, pair, port))

    @property
    def _super(self) -> Path:
        return self.directory / "super.kubeconfig"

    def brain(self, tenants: int, *, placed: bool = True) -> "Brain":
        """Start a brain that has the first so many tenants; `placed`: each on the node of its pod, else on all."""
        folder = self.directory / "tenants"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for number in range(tenants):
            name = f"{tenant_name(number)}.kubeconfig"
            (folder / name).symlink_to(self.directory / "all" / name)
        return Brain(self.directory, folder, self._super if placed else None)


def _kubeconfig(authority: bytes, pair: pki.KeyPair, port: int) -> str:
    cluster = {"server": f"https://127.0.0.1:{port}", "certificate-authority-data": _base64(authority)}
    user = {"client-certificate-data": _base64(pair.certificate), "client-key-data": _base64(pair.key)}
    return json.dumps(
        {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "c", "cluster": cluster}],
            "users": [{"name": "u", "user": user}],
            "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
            "current-context": "x",
        }
    )


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


class Brain:
    """A brain as operators run it, that reads tenants from a folder."""

    def __init__(self, directory: Path, tenants: Path, super_cluster: Path | None) -> None:
        config = {
            "apiVersion": configfile.API_VERSION,
            "kind": "BrainConfiguration",
            "listen": {
                "address": "127.0.0.1:0",
                "certFile": str(directory / "brain.crt"),
                "keyFile": str(directory / "brain.key"),
                "clientCAFile": str(directory / "ca.crt"),
            },
            "superCluster": {"kubeconfig": str(super_cluster), "services": False} if super_cluster else None,
            "tenants": {"sources": [{"directory": {"path": str(tenants)}}]},
            "adminSocket": str(directory / "brain.sock"),
            "metricsAddress": "",
        }
        path, self._log = directory / "brain.yaml", directory / "brain.log"
        path.write_text(yaml.safe_dump(config))
        self.began = time.monotonic()
        with self._log.open("wb") as log:
            argv = [*DIE_WITH_PARENT, sys.executable, "-m", "vcproxy", "brain", "--config", str(path)]
            self.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def __enter__(self) -> "Brain":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    @property
    def cpu(self) -> float:
        """Seconds of processor time that it has taken, all threads."""
        return cpu(self.process.pid)

    def memory(self, field: str = "VmRSS") -> float:
        """MiB; VmHWM for the most there ever was."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(field)) / 1024

    def logged(self, event: str, timeout: float = 600) -> dict[str, Any]:
        """Wait for an event in its log."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            for line in self._log.read_bytes().splitlines(keepends=True):
                if event.encode() in line and line.endswith(b"}\n") and (said := json.loads(line))["event"] == event:
                    return dict(said)
            if self.process.poll() is not None:
                break
            time.sleep(0.02)
        raise RuntimeError(f"the brain did not say {event!r}:\n{self._log.read_text()[-4000:]}")


def cpu(pid: int) -> float:
    """Seconds of processor time of a process, to the nanosecond (clock_getcpuclockid(3))."""
    return time.clock_gettime(~pid << 3 | 2)
