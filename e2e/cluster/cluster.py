"""A whole cluster: control plane and nodes, with CoreDNS, load balancers, and a Service proxy on every node.

    with Cluster(directory, proxy="vcproxy") as cluster:
        cluster.control.kubectl("get", "nodes")

Up in some twenty seconds. Nothing on the host is configured; everything is in machines (see `machine`), which end with
this process, however it ends. Leftovers of a dead maker (image stores on disk, control groups) are removed by the next.
"""

import itertools
import os
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from e2e.cluster import deployed, images, machine, proxies
from e2e.cluster.addresses import CONTROL_SYSCTLS, NODE_SYSCTLS, NodeAddresses, control_links
from e2e.cluster.control import Control
from e2e.cluster.loadbalancer import LoadBalancers
from e2e.cluster.machine import Machine
from e2e.cluster.node import Node, copy_store
from e2e.controlplane import BUILD, MissingBinaries, find_binaries
from e2e.polling import eventually

CACHE = (
    Path(
        os.environ.get("VCPROXY_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "vcproxy")
    ).expanduser()
    / "cluster"
)
"""Where programs, images and the state of running clusters are, as e2e/tools/build has it."""

_READY_WITHIN = 120.0  # seconds, for nodes and CoreDNS
_SERIALS = itertools.count()
_TOOLS = {"containerd": "containerd", "runc": "runc", "debootstrap": "debootstrap", "unshare": "util-linux"}


@dataclass(frozen=True)
class Assets:
    """programs: where each binary is; store: containerd's image store."""

    programs: dict[str, Path]
    store: Path


def assets() -> Assets:
    """Programs and images, built if missing: some twenty minutes on two cores the first time, nothing later.

    Raises MissingBinaries or BuildFailed.
    """
    if missing := [package for tool, package in _TOOLS.items() if shutil.which(tool) is None]:
        raise MissingBinaries(f"not installed: {', '.join(missing)}; run tools/setup packages cluster")
    control_plane = find_binaries(build=True)
    done = subprocess.run([str(BUILD), "--cluster"], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise MissingBinaries("the build of the cluster's programs failed, see its messages above")
    own = Path(done.stdout.strip())
    store = images.store(own, CACHE)
    programs = {path.name: path for directory in (control_plane, own) for path in directory.iterdir() if path.is_file()}
    return Assets(programs, store)


class Cluster:
    """One cluster. `directory`: for logs, keys and configuration; `proxy`: one of `proxies.PROXIES`; `tenants`: their
    kubeconfigs by name, for the proxy "split".
    """

    def __init__(
        self, directory: Path, *, proxy: str = "vcproxy", nodes: int = 3, tenants: Mapping[str, bytes] | None = None
    ) -> None:
        if proxy not in proxies.PROXIES:
            raise ValueError(f"proxy {proxy!r}: want one of {', '.join(proxies.PROXIES)}")
        self.directory = directory
        self.proxy = proxy
        self.tenants = dict(tenants or {})
        self.nodes: list[Node] = []
        self._addresses = [NodeAddresses(number) for number in range(1, nodes + 1)]
        self._cleanup = ExitStack()

    def __enter__(self) -> Self:
        self.assets = assets()
        machine.sweep()
        with ExitStack() as undo:
            self._state = undo.enter_context(_state(CACHE / "run"))
            self._start(undo)
            self._cleanup = undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cleanup.close()

    def node(self, name: str) -> Node:
        return next(node for node in self.nodes if node.name == name)

    def kubeconfig(self, user: str, *, groups: tuple[str, ...] = ()) -> Path:
        """A kubeconfig for a user."""
        return self.control.kubeconfig(user, groups=groups)

    def _start(self, undo: ExitStack) -> None:
        machines = [undo.enter_context(self._machine("control"))]
        store = self.assets.store
        if self.proxy in proxies.DEPLOYED:
            store = images.with_vcproxy(store, CACHE)
        for addresses in self._addresses:
            copy_store(store, self._state / addresses.name)
            machines.append(undo.enter_context(self._machine(addresses.name)))
        self.nodes = [Node(addresses, own) for addresses, own in zip(self._addresses, machines[1:], strict=True)]
        self._connect(machines[0])
        keys = self.directory / "keys"
        keys.mkdir(exist_ok=True)
        self.control = Control(machines[0], keys, self.assets.programs)
        undo.callback(self.control.client.close)
        together([self.control.start, *(node.start_containerd for node in self.nodes)])
        balancers = LoadBalancers(self.control.client, machines[0])
        balancers.start()
        undo.callback(balancers.close)
        for node in self.nodes:
            config = self.kubeconfig(f"system:node:{node.name}", groups=("system:nodes",))
            node.start_kubelet(self.assets.programs["kubelet"], config, keys / "ca.crt")
        if self.proxy in proxies.DAEMONS:
            self._start_proxies()
        self._wait_for_nodes()
        self.control.kubectl("apply", "-f", "-", stdin=Path(__file__).with_name("coredns.yaml").read_text())
        if self.proxy != "none":
            self.control.kubectl(
                "-n", "kube-system", "rollout", "status", "deployment/coredns", f"--timeout={_READY_WITHIN:g}s"
            )

    def _machine(self, name: str) -> Machine:
        return Machine(name, directory=self.directory / name, state=self._state / name)

    def _connect(self, control: Machine) -> None:
        control.sysctl(CONTROL_SYSCTLS)
        control.ip(control_links())
        for node in self.nodes:
            node.machine.sysctl(NODE_SYSCTLS)
            node.machine.ip(node.addresses.uplink(control.pid))
            control.ip(node.addresses.accept())
        for node in self.nodes:
            others = [other.addresses for other in self.nodes if other is not node]
            node.machine.ip([line for other in others for line in other.routes()])

    def _start_proxies(self) -> None:
        config = self.kubeconfig("system:kube-proxy")
        for node in self.nodes:
            proxies.start(self.proxy, node, kubeconfig=config, kube_proxy=self.assets.programs["kube-proxy"])

    def _wait_for_nodes(self) -> None:
        client = self.control.client

        def registered() -> bool:
            for node in self.nodes:
                node.machine.check("kubelet")
            return len(client.list("Node").items) == len(self.nodes)

        eventually(registered, within=_READY_WITHIN, every=0.1, what="registration of all nodes")
        for node in self.nodes:
            cidrs = list(node.addresses.pod_cidrs)
            client.patch("Node", node.name, {"spec": {"podCIDR": cidrs[0], "podCIDRs": cidrs}})
        match self.proxy:
            case "run":
                deployed.run(self.control)
            case "split":
                deployed.split(self.control, self.nodes, self.tenants)
            case "vcproxy" | "kube-proxy":
                for node in self.nodes:
                    proxies.wait_until_ready(node)
        names = [f"node/{node.name}" for node in self.nodes]
        self.control.kubectl("wait", "--for=condition=Ready", *names, f"--timeout={_READY_WITHIN:g}s")


def together(tasks: Iterable[Callable[[], None]]) -> None:
    """Run tasks side by side; raises the first error when all have ended."""
    tasks = list(tasks)
    with ThreadPoolExecutor(max_workers=len(tasks)) as pool:
        for future in [pool.submit(task) for task in tasks]:
            future.result()


@contextmanager
def _state(parent: Path) -> Iterator[Path]:
    """A folder named after this process, removed at the end; first removes those of dead processes."""
    parent.mkdir(parents=True, exist_ok=True)
    for left in parent.iterdir():
        if not Path("/proc", left.name.partition(".")[0]).exists():
            shutil.rmtree(left)
    own = parent / f"{os.getpid()}.{next(_SERIALS)}"
    own.mkdir()
    try:
        yield own
    finally:
        shutil.rmtree(own)
