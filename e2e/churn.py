"""A node whose Services change all the time, under load: what the test and the benchmark of churn share.

One node with a proxy that reads a real API server: SERVICES Services of ENDPOINTS endpoints, all of which are real and
alive all the time; RATE EndpointSlices a second are rewritten, each with other endpoints of the same pods. Meanwhile
clients in a pod and outside the cluster open new connections as fast as they can to ClusterIPs and node ports all over:
none may fail, since whatever a change takes away goes on answering.

How late a change is, is told by packets: one more Service has a single endpoint that moves now and then; the clock runs
from the API server's answer to the write until a new connection is answered by the new endpoint.
"""

import json
import os
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from e2e import nodes, objects
from e2e.apiclient import ApiClient
from e2e.controlplane import ControlPlane, find_binaries
from e2e.polling import eventually
from e2e.processes import Process
from vcproxy.lab import Client, Lab, Node, Pod, Reply, tcp_request
from vcproxy.lab.load import Load, Result, Target

SERVICES, ENDPOINTS, RATE = 1_000, 10, 100
NODE_PORTS = 20
"""Services that have a node port."""
TARGET = 8080
NAMESPACE = "churn"
PROBE = ("10.32.250.1", "probe")
CLUSTER_CIDR = "10.200.0.0/16,fd00:200::/32"
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass
class Scene:
    """Where a proxy is tried."""

    plane: ControlPlane
    node: Node
    pods: list[Pod]
    client: Pod
    outside: Client
    chance: random.Random = field(default_factory=lambda: random.Random(1))

    @property
    def api(self) -> ApiClient:
        return self.plane.client


@dataclass(frozen=True)
class Outcome:
    """What was seen of one proxy. Seconds, MiB; `cpu`: of one core."""

    inside: Result
    outside: Result
    changes: int
    seconds: float
    late: Sequence[float]
    start: float
    cpu: float
    memory: float

    @property
    def connections(self) -> int:
        """All that were tried."""
        return self.inside.count + self.outside.count

    @property
    def failures(self) -> Counter[str]:
        """Those that got no answer, by what happened."""
        return Counter(self.inside.failures) + Counter(self.outside.failures)


@contextmanager
def scene(directory: Path) -> Iterator[Scene]:
    """A node with a client, pods on another node, the outside, and an API server that is full."""
    with (
        ControlPlane("churn", directory / "plane", bin_dir=find_binaries(build=False)) as plane,
        Lab("vcp-churn") as lab,
    ):
        one, two = lab.node("one"), lab.node("two")
        places = [(one if number < 4 else two, number) for number in range(ENDPOINTS + 2)]
        pods = [
            node.flat_pod(
                f"web-{number}",
                node.pod_cidr4.replace("0/24", str(10 + number)),
                node.pod_cidr6.replace("/64", f"{10 + number:x}"),
            )
            for node, number in places
        ]
        for pod in pods:
            lab.serve(pod, tcp=[TARGET])
        client = one.flat_pod("client", "10.200.1.2", "fd00:200:0:1::2")
        outside = lab.client("outside", "192.168.77.200", "fd77::200")
        found = Scene(plane, one, pods, client, outside)
        api = found.api
        api.create(objects.namespace(NAMESPACE))
        for node in (one, two):
            nodes.register(api, node)
        api.create_all([service(number) for number in range(SERVICES)])
        api.create_all([slice_of(found, f"svc-{number}", ENDPOINTS) for number in range(SERVICES)])
        with nodes.relay(one, plane):
            yield found


def address(number: int) -> str:
    """The ClusterIP of a Service."""
    return f"10.32.{1 + number // 250}.{1 + number % 250}"


def node_port(number: int) -> int:
    """The node port of one of the first NODE_PORTS Services."""
    return 30_100 + number


def service(number: int) -> dict[str, Any]:
    """A Service of one port."""
    public = number < NODE_PORTS
    port = objects.service_port(80, name="http", target=TARGET) | ({"nodePort": node_port(number)} if public else {})
    kind = "NodePort" if public else "ClusterIP"
    return objects.service(f"svc-{number}", namespace=NAMESPACE, ports=[port], type=kind, cluster_ips=[address(number)])


def slice_of(found: Scene, name: str, count: int) -> dict[str, Any]:
    """A Service's slice with so many of the pods."""
    chosen = found.chance.sample(found.pods, count)
    return objects.endpoint_slice(
        name,
        service=name,
        namespace=NAMESPACE,
        endpoints=[objects.endpoint(pod.ip4, node=pod.node) for pod in chosen],
        ports=[objects.slice_port(TARGET, name="http")],
    )


def vcproxy(found: Scene, directory: Path) -> list[str]:
    """`vcproxy run`, as a DaemonSet starts it."""
    places = (f"--state-directory={directory}/state", f"--runtime-directory={directory}/run")
    flags = (f"--kubeconfig={found.plane.kubeconfig}", "--hostname-override=one", f"--cluster-cidr={CLUSTER_CIDR}")
    return [sys.executable, "-m", "vcproxy", "run", *places, *flags]


def kube_proxy(plane: ControlPlane, node: Node, directory: Path, *, min_sync_period: str = "1s") -> list[str]:
    """The real one. The machine's limits of connection tracking stay as they are; 1s is the default, 1ns the least."""
    config = {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": "nftables",
        "clientConnection": {"kubeconfig": str(plane.kubeconfig)},
        "clusterCIDR": CLUSTER_CIDR,
        "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
        "nftables": {"minSyncPeriod": min_sync_period, "syncPeriod": "30s"},
    }
    file = directory / f"kube-proxy-{min_sync_period}.json"
    file.write_text(json.dumps(config))
    return [str(find_binaries(build=False) / "kube-proxy"), f"--config={file}", f"--hostname-override={node.name}"]


def churn(found: Scene, name: str, command: Sequence[str], directory: Path, *, duration: float = 60.0) -> Outcome:
    """Start a proxy, change and load for `duration` seconds, end it and remove all that it left."""
    process = nodes.daemon(found.node, name.partition(",")[0], command, directory)
    targets: list[Target] = [("tcp", address(number), 80) for number in range(SERVICES)]
    public: list[Target] = [("tcp", found.node.ip4, node_port(number)) for number in range(NODE_PORTS)]
    found.chance.shuffle(targets)
    with ExitStack() as stack:
        put_probe(found, found.pods[0])
        began = time.monotonic()
        process.start()
        stack.callback(clean, found, process)
        eventually(lambda: answered(found, address(SERVICES - 1)), within=120, what=f"{name} serves")
        eventually(lambda: answered(found, PROBE[0]), within=120, what=f"{name} serves")
        start = time.monotonic() - began
        spent = cpu_seconds(process.pid)
        longest = duration * 2
        with (
            Load(found.client, targets, seconds=longest) as pods,
            Load(found.outside, public, seconds=longest) as outside,
        ):
            late: list[float] = []
            over = threading.Event()
            probing = threading.Thread(target=probe, args=(found, late, over))
            probing.start()
            began = time.monotonic()
            changes = change(found, began + duration)
            seconds = time.monotonic() - began
            over.set()
            probing.join()
        cpu = (cpu_seconds(process.pid) - spent) / seconds
        return Outcome(pods.result, outside.result, changes, seconds, late, start, cpu, peak_memory(process.pid))


def change(found: Scene, until: float) -> int:
    """Rewrite slices at RATE until that monotonic time; returns how many."""
    count, began = 0, time.monotonic()
    while (now := time.monotonic()) < until:
        ahead = began + count / RATE - now
        if ahead > 0:
            time.sleep(ahead)
        number = found.chance.randrange(SERVICES)
        body = slice_of(found, f"svc-{number}", found.chance.choice((ENDPOINTS - 1, ENDPOINTS, ENDPOINTS)))
        found.api.patch("EndpointSlice", f"svc-{number}", {"endpoints": body["endpoints"]}, NAMESPACE)
        count += 1
    return count


def put_probe(found: Scene, pod: Pod) -> float:
    """Make the probe's only endpoint this; returns when the API server had answered."""
    ip, name = PROBE
    body = objects.endpoint_slice(
        name,
        service=name,
        namespace=NAMESPACE,
        endpoints=[objects.endpoint(pod.ip4, node=pod.node)],
        ports=[objects.slice_port(TARGET, name="http")],
    )
    if not any(item["metadata"]["name"] == name for item in found.api.list("Service", NAMESPACE).items):
        port = objects.service_port(80, name="http", target=TARGET)
        found.api.create(objects.service(name, namespace=NAMESPACE, ports=[port], cluster_ips=[ip]))
        return found.api.create(body).answered
    return found.api.update(body).answered


def probe(found: Scene, late: list[float], over: threading.Event) -> None:
    """Move the probe's endpoint again and again; notes how long each move took.

    At any time of kube-proxy's minSyncPeriod: always right after a sync, each would wait for all of it."""
    turn, chance = 0, random.Random(2)
    while not over.wait(chance.uniform(0, 1)):
        turn += 1
        pod = found.pods[turn % len(found.pods)]
        answer = put_probe(found, pod)
        while time.monotonic() < answer + 30:
            outcome = tcp_request(found.client, PROBE[0], 80, timeout=1)
            if isinstance(outcome, Reply) and outcome.pod == pod.name:
                break
        late.append(time.monotonic() - answer)


def answered(found: Scene, ip: str) -> bool:
    """Whether a Service works."""
    return isinstance(tcp_request(found.client, ip, 80, timeout=0.2), Reply)


def clean(found: Scene, process: Process) -> None:
    """End the proxy; the next one finds a node without rules, and without connections."""
    process.terminate()
    process.wait(grace=10)
    for family, table in (("inet", "vcproxy"), ("ip", "kube-proxy"), ("ip6", "kube-proxy")):
        found.node.run(["nft", "delete", "table", family, table], check=False)
    found.node.run(["conntrack", "-F"])


def tree(pid: int) -> list[int]:
    """A process and its children."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(each for child in children for each in tree(int(child)))]


def cpu_seconds(pid: int) -> float:
    """CPU time of a process, with that of the children it has waited for and of those it has."""
    total = 0.0
    for each in tree(pid):
        fields = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
        total += sum(map(int, fields[11:15])) / TICKS
    return total


def peak_memory(pid: int) -> float:
    """MiB, the largest resident size so far."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return 0.0
