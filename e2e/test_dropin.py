"""`vcproxy run` in kube-proxy's place: kubeadm's manifests unchanged, the real kube-proxy's flags, and taking over from it.

A real API server with kube-proxy's own role, a node of the lab, real packets, and the real kube-proxy to compare with.
"""

from __future__ import annotations

import http.client
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from e2e import nodes, objects
from e2e.apiclient import ApiClient
from e2e.controlplane import ControlPlane
from e2e.polling import eventually
from e2e.processes import Process
from tests.unit.kubeproxy.test_flags import FIELDS
from vcproxy.kubeproxy import flags, leftovers
from vcproxy.kubeproxy.leftovers import Leftovers
from vcproxy.lab import Client, Lab, Node, Pod, Refused, Reply, TcpSession, netns, tcp_request
from vcproxy.lab.iproute import ip as iproute
from vcproxy.lab.load import Load

pytestmark = [pytest.mark.controlplane, pytest.mark.packets]

KUBEADM = Path("tests/unit/kubeproxy/kubeadm.yaml")
VIP = {4: "10.32.0.10", 6: "fd00:32::10"}
LOCAL_VIP, NEAR_VIP = "10.32.0.11", "10.32.0.12"
NODE_PORT, LOCAL_PORT, NEAR_PORT = 30080, 30081, 30082
TARGET = 8080
CLUSTER_CIDR = "10.200.0.0/16,fd00:200::/32"
# The machine's limits of connection tracking are the machine's.
UNTOUCHED = {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"}


@dataclass(frozen=True)
class Scene:
    """A node n1 with an API server, whose credentials of kube-proxy are in `directory`, as kubeadm's pod has them."""

    plane: ControlPlane
    node: Node
    client: Pod
    near: Pod
    far: Pod
    outside: Client
    directory: Path

    @property
    def api(self) -> ApiClient:
        return self.plane.client

    def config(self, name: str, **changed: Any) -> Path:
        """kubeadm's config.conf for this place, with fields changed."""
        found = yaml.safe_load(KUBEADM.read_text())
        found["clientConnection"]["kubeconfig"] = str(self.directory / "kubeconfig.conf")
        found["clusterCIDR"] = CLUSTER_CIDR
        file = self.directory / f"{name}.conf"
        file.write_text(yaml.safe_dump(found | changed))
        return file

    def process(self, name: str, *command: str) -> Process:
        """A command on the node, not yet started."""
        return nodes.daemon(self.node, name, command, self.directory)

    def vcproxy(self, name: str, *arguments: str, by: Sequence[str] = ()) -> Process:
        """`vcproxy run` with directories of its own; `by`: a command that starts it."""
        places = (
            f"--state-directory={self.directory}/{name}-state",
            f"--runtime-directory={self.directory}/{name}-run",
        )
        return self.process(name, *by, sys.executable, "-m", "vcproxy", "run", *arguments, *places)

    def get(self, path: str, port: int = 10249) -> tuple[int, str, str]:
        """Status, content type and body of an address that is served on the node's loopback."""
        with netns.entered(self.node.ns):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            connection.connect()
        with connection.sock:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.headers["Content-Type"], answer.read().decode()

    def tables(self) -> list[str]:
        return self.node.run(["nft", "list", "tables"]).stdout.split("\n")

    def leftovers(self) -> Leftovers:
        with netns.entered(self.node.ns):
            return leftovers.find()

    def answers(self, address: str, port: int = 80) -> bool:
        return isinstance(tcp_request(self.client, address, port, timeout=0.3), Reply)


def _credentials(plane: ControlPlane, directory: Path) -> None:
    """The service account kube-proxy with its role and its token, and a kubeconfig like kubeadm's."""
    api = plane.client
    api.create(
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "kube-proxy", "namespace": "kube-system"}}
    )
    api.create(
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRoleBinding",
            "metadata": {"name": "kubeadm:node-proxier"},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "system:node-proxier"},
            "subjects": [{"kind": "ServiceAccount", "name": "kube-proxy", "namespace": "kube-system"}],
        }
    )
    path = "/api/v1/namespaces/kube-system/serviceaccounts/kube-proxy/token"
    asked = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}}
    token = api.request("POST", path, body=asked).object["status"]["token"]
    (directory / "token").write_text(token)
    (directory / "ca.crt").write_bytes(plane.authority.certificate)
    kubeconfig = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [
            {"name": "default", "cluster": {"certificate-authority": str(directory / "ca.crt"), "server": plane.url}}
        ],
        "contexts": [{"name": "default", "context": {"cluster": "default", "namespace": "default", "user": "default"}}],
        "current-context": "default",
        "users": [{"name": "default", "user": {"tokenFile": str(directory / "token")}}],
    }
    (directory / "kubeconfig.conf").write_text(yaml.safe_dump(kubeconfig))


def _service(name: str, vips: Sequence[str], pods: Sequence[Pod], node_port: int, **spec: Any) -> list[dict[str, Any]]:
    port = objects.service_port(80, name="http", target=TARGET, node_port=node_port)
    made = [objects.service(name, ports=[port], type="NodePort", cluster_ips=vips, spec=spec)]
    for family, addresses in (("IPv4", [pod.ip4 for pod in pods]), ("IPv6", [pod.ip6 for pod in pods])):
        ends = [objects.endpoint(address, node=pod.node) for address, pod in zip(addresses, pods, strict=True)]
        ports = [objects.slice_port(TARGET, name="http")]
        made.append(
            objects.endpoint_slice(f"{name}-{family[-1]}", service=name, endpoints=ends, ports=ports, family=family)
        )
    return made


@pytest.fixture(scope="module")
def scene(control_plane_binaries: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    directory = tmp_path_factory.mktemp("dropin")
    with ControlPlane("dropin", directory / "plane", bin_dir=control_plane_binaries) as plane, Lab("vcp-dropin") as lab:
        one, two = lab.node("n1"), lab.node("n2")
        client = one.flat_pod("client", "10.200.1.2", "fd00:200:0:1::2")
        near = one.flat_pod("near", "10.200.1.3", "fd00:200:0:1::3")
        far = two.flat_pod("far", "10.200.2.2", "fd00:200:0:2::2")
        outside = lab.client("outside", "192.168.77.200", "fd77::200")
        for pod in (near, far):
            lab.serve(pod, tcp=[TARGET])
        for node in (one, two):
            nodes.register(plane.client, node)
        for made in (
            *_service("web", tuple(VIP.values()), [near, far], NODE_PORT),
            *_service("local", (LOCAL_VIP,), [near, far], LOCAL_PORT, externalTrafficPolicy="Local"),
            *_service("near", (NEAR_VIP,), [near], NEAR_PORT),
        ):
            plane.client.create(made)
        _credentials(plane, directory)
        iproute(["link set lo up"], ns=one.ns)
        with nodes.relay(one, plane):
            yield Scene(plane, one, client, near, far, outside, directory)


@contextmanager
def running(scene: Scene, process: Process, *, cleanup: bool = True) -> Iterator[Process]:
    """A process until the end of the context, and then no rule of anybody's."""
    with ExitStack() as stack:
        if cleanup:
            stack.callback(clean, scene)
        stack.callback(process.wait, grace=10)
        stack.callback(process.terminate)
        process.start()
        yield process


def clean(scene: Scene) -> None:
    """Leave nothing on the node, by way of `--cleanup`."""
    done = scene.node.run(
        [sys.executable, "-m", "vcproxy", "run", "--cleanup", f"--state-directory={scene.directory}/none"]
    )
    assert "cleaned up" in done.stdout
    assert not [line for line in scene.tables() if "proxy" in line]


def serves(scene: Scene, process: Process) -> None:
    """Wait until all that is told to the API server is served."""

    def look() -> bool:
        process.check()
        return all(scene.answers(vip) for vip in (*VIP.values(), LOCAL_VIP, NEAR_VIP))

    eventually(look, within=40, what=f"{process.name} serves")
    # What was dialled while nobody served it is remembered as it was, untranslated, for two minutes (SYN_SENT): whoever
    # gets the same source port by then is led astray.
    scene.node.run(["conntrack", "-F"])


# --- the same files, the same flags -----------------------------------------------------------------------------------


def test_kubeadms_daemonset_works_with_another_command(scene: Scene) -> None:
    config = scene.config("config")
    process = scene.vcproxy("kubeadm", f"--config={config}", "--hostname-override=n1")
    with running(scene, process):
        serves(scene, process)
        for place, address in (
            (scene.outside, scene.node.ip4),
            (scene.outside, scene.node.ip6),
            (scene.node, scene.node.ip4),
        ):
            assert isinstance(tcp_request(place, address, NODE_PORT), Reply)
        outcome = tcp_request(scene.outside, scene.node.ip4, LOCAL_PORT)
        assert isinstance(outcome, Reply)
        assert (outcome.pod, outcome.peer[0]) == ("near", scene.outside.ip4)
        # The pod's own address where it is local (clusterCIDR).
        outcome = tcp_request(scene.client, VIP[4], 80)
        assert isinstance(outcome, Reply)
        assert outcome.peer[0] == scene.client.ip4

        assert scene.get("/proxyMode") == (200, "text/plain; charset=utf-8", "nftables")
        status, kind, body = scene.get("/configz")
        shown = json.loads(body)["kubeproxy.config.k8s.io"]
        assert (status, kind.partition(";")[0]) == (200, "application/json")
        assert (shown["kind"], shown["mode"], shown["clusterCIDR"]) == (
            "KubeProxyConfiguration",
            "nftables",
            CLUSTER_CIDR,
        )
        assert scene.get("/healthz", 10256)[0] == 200
        with netns.entered(scene.node.ns):
            netfilter = Path("/proc/sys/net/netfilter")
            assert (netfilter / "nf_conntrack_tcp_timeout_close_wait").read_text().strip() == "3600"
            assert (netfilter / "nf_conntrack_tcp_timeout_established").read_text().strip() == "86400"
        log = process.log.read_text()
        assert "[warning" not in log, log
        assert "[error" not in log, log

        # As kube-proxy: with the file the process changes, by way of ending.
        config.write_text(config.read_text() + "# changed\n")
        eventually(lambda: not process.running, within=20, what="the end after a change of the file")
        assert f"--config {config} changed" in process.log_tail(3)
        assert scene.answers(VIP[4])  # what is programmed stays


IN_A_POD = """
mount -t tmpfs none /run
mkdir -p /run/secrets/kubernetes.io/serviceaccount
cp "$0/token" "$0/ca.crt" /run/secrets/kubernetes.io/serviceaccount
exec "$@"
"""


def test_in_a_pod_without_a_kubeconfig(scene: Scene) -> None:
    """What Kubernetes mounts into a pod is enough, in a mount namespace of the test's own."""
    config = scene.config("pod", clientConnection={}, conntrack=UNTOUCHED)
    port = scene.plane.url.rpartition(":")[2]
    where = ("env", "KUBERNETES_SERVICE_HOST=127.0.0.1", f"KUBERNETES_SERVICE_PORT={port}")
    mounted = ("unshare", "--mount", "sh", "-ec", IN_A_POD, str(scene.directory))
    process = scene.vcproxy("pod", f"--config={config}", "--hostname-override=n1", by=(*where, *mounted))
    with running(scene, process):
        serves(scene, process)


def test_master_wins_over_the_kubeconfig(scene: Scene) -> None:
    kubeconfig = scene.directory / "elsewhere.conf"
    kubeconfig.write_text(
        (scene.directory / "kubeconfig.conf").read_text().replace(scene.plane.url, "https://192.0.2.1:6443")
    )
    config = scene.config("master", clientConnection={"kubeconfig": str(kubeconfig)}, conntrack=UNTOUCHED)
    process = scene.vcproxy("master", f"--config={config}", "--hostname-override=n1", f"--master={scene.plane.url}")
    with running(scene, process):
        serves(scene, process)


def _help_of_kube_proxy(binaries: Path) -> set[str]:
    done = subprocess.run([binaries / "kube-proxy", "--help"], capture_output=True, text=True, check=True, timeout=60)
    return set(re.findall(r"^ +(?:-\w, )?--([a-z0-9-]+)\b", done.stdout, re.MULTILINE))


def test_every_flag_of_kube_proxy_is_known(control_plane_binaries: Path) -> None:
    """Fails when a newer kube-proxy has a flag that nobody has thought about here, or has dropped one."""
    ours = {flag.name for flag in (*flags.FIELDS, *flags.ACTIONS)} | {"help", "version"}
    assert _help_of_kube_proxy(control_plane_binaries) == ours


def _written(command: Sequence[str | Path], arguments: Sequence[str], file: Path) -> Mapping[str, Any] | None:
    """The configuration that a program makes of its arguments; None if it refuses them."""
    done = subprocess.run(
        [*command, *arguments, f"--write-config-to={file}"], capture_output=True, text=True, timeout=60
    )
    if done.returncode:
        return None
    found: Mapping[str, Any] = yaml.safe_load(file.read_text())
    file.unlink()
    return found


ALPHA = "--feature-gates=LoggingAlphaOptions=true"  # which kube-proxy wants for some of the flags
ARGUMENTS = [
    ["--proxy-mode=nftables"],
    *(
        [f"--{name}={value.removeprefix('=')}", *([] if name == "proxy-mode" else ["--proxy-mode=nftables"])]
        for name, value, *_ in FIELDS
        if name not in ("feature-gates", "config-sync-period")
        and not name.startswith("log-")
        and "mode" not in name
        # In kube-proxy these have their effect by way of Complete, of which --write-config-to takes less.
        and name not in ("healthz-bind-address",)
    ),
    ["--proxy-mode=nftables", "--feature-gates=KubeProxyNFTablesLocalhostNodePorts=true"],
    ["--proxy-mode=nftables", "--conntrack-max-per-core=-1"],
    ["--proxy-mode=nftables", "--oom-score-adj=1001"],
    ["--proxy-mode=nftables", "--cluster-cidr=10.0.0.0/8,11.0.0.0/8"],
    ["--proxy-mode=nftables", "--cluster-cidr=10.0.0.0"],
    ["--proxy-mode=nftables", "--nodeport-addresses=primary,primary"],
    ["--proxy-mode=nftables", "--nodeport-addresses=primary,all,localhost"],
    ["--proxy-mode=nftables", "--nodeport-addresses=10.0.0.1"],
    ["--proxy-mode=nftables", "--detect-local-mode=BridgeInterface"],
    ["--proxy-mode=nftables", "--detect-local-mode=BridgeInterface", "--pod-bridge-interface=cni0"],
    ["--proxy-mode=nftables", "--detect-local-mode=InterfaceNamePrefix", "--pod-interface-name-prefix="],
    ["--proxy-mode=nftables", "--detect-local-mode=Nonsense"],
    ["--proxy-mode=userspace"],
    ["--proxy-mode=nftables", "--iptables-masquerade-bit=32"],
    ["--proxy-mode=nftables", "--config-sync-period=0s"],
    ["--proxy-mode=nftables", "--conntrack-udp-timeout=-1s"],
    ["--proxy-mode=nftables", "--metrics-bind-address=here:1"],
    ["--proxy-mode=nftables", "--masquerade-all=maybe"],
    ["--proxy-mode=nftables", "--masquerade_all"],
]


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=" ".join)
def test_flags_mean_what_they_mean_to_kube_proxy(
    arguments: list[str], control_plane_binaries: Path, tmp_path: Path
) -> None:
    """Both accept or refuse them, and write the same configuration."""
    theirs = _written([control_plane_binaries / "kube-proxy"], arguments, tmp_path / "theirs")
    ours = _written([sys.executable, "-m", "vcproxy", "run"], arguments, tmp_path / "ours")
    assert ours == theirs


DETECTORS = {
    "ClusterCIDR": {},
    "no detector": {"clusterCIDR": ""},
    "NodeCIDR": {"detectLocalMode": "NodeCIDR", "clusterCIDR": ""},
    "InterfaceNamePrefix": {"detectLocalMode": "InterfaceNamePrefix", "detectLocal": {"interfaceNamePrefix": "veth"}},
    "another prefix": {"detectLocalMode": "InterfaceNamePrefix", "detectLocal": {"interfaceNamePrefix": "cali"}},
    "BridgeInterface": {"detectLocalMode": "BridgeInterface", "detectLocal": {"bridgeInterface": "veth0001"}},
}


def _treatment(scene: Scene) -> dict[str, object]:
    """Whom endpoints see when each kind of client dials a ClusterIP, and where a Local policy lets it."""
    seen: dict[str, object] = {}
    iproute([f"route replace 10.32.0.0/16 via {scene.node.ip4}"], ns=scene.outside.ns)
    for name, place in (("pod", scene.client), ("node", scene.node), ("outside", scene.outside)):
        # Of an endpoint on this node: the answer of another one would take another way, if nobody is masqueraded.
        outcome = tcp_request(place, NEAR_VIP, 80)
        seen[f"{name} to a ClusterIP"] = outcome.peer[0] if isinstance(outcome, Reply) else outcome
        outcomes = [tcp_request(place, scene.node.ip4, LOCAL_PORT) for _ in range(24)]
        seen[f"{name} to a Local NodePort"] = {
            (outcome.pod, outcome.peer[0]) if isinstance(outcome, Reply) else outcome for outcome in outcomes
        }
    return seen


@pytest.mark.parametrize("detector", list(DETECTORS))
def test_local_clients_are_kube_proxys(scene: Scene, detector: str, control_plane_binaries: Path) -> None:
    """The same file, the same packets, one after the other."""
    config = scene.config("detector", mode="nftables", conntrack=UNTOUCHED, **DETECTORS[detector])
    arguments = (f"--config={config}", "--hostname-override=n1")
    slug = detector.replace(" ", "-")
    theirs = scene.process(f"theirs-{slug}", str(control_plane_binaries / "kube-proxy"), *arguments)
    ours = scene.vcproxy(f"ours-{slug}", *arguments)
    found = []
    for process in (theirs, ours):
        with running(scene, process):
            serves(scene, process)
            found.append(_treatment(scene))
    assert found[1] == found[0]
    local = detector not in ("no detector", "another prefix")
    assert found[0]["pod to a Local NodePort"] == (
        {("near", scene.client.ip4), ("far", scene.client.ip4)} if local else {("near", scene.client.ip4)}
    )


# --- taking over ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "runs", "by"),
    [
        ("nftables", True, ()),
        ("nftables", False, ()),
        ("iptables", True, ()),
        ("nftables", True, ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")),
    ],
    ids=["nftables, still running", "nftables, stopped before", "iptables, still running", "from another container"],
)
def test_no_connection_notices_that_vcproxy_takes_over(
    scene: Scene, mode: str, runs: bool, by: Sequence[str], control_plane_binaries: Path
) -> None:
    # What the two modes accept NodePorts on, where nobody says it, differs.
    config = scene.config("both", mode=mode, conntrack=UNTOUCHED, nodePortAddresses=["192.168.77.0/24", "fd77::/64"])
    arguments = (f"--config={config}", "--hostname-override=n1")
    name = f"{mode}-{runs}-{len(by)}"
    old = scene.process(f"kube-proxy-{name}", str(control_plane_binaries / "kube-proxy"), *arguments)
    new = scene.vcproxy(f"takeover-{name}", *arguments, "--take-over", by=by)
    node_ports = [
        ("tcp", scene.node.ip4, NODE_PORT),
        ("tcp", scene.node.ip6, NODE_PORT),
        ("tcp", scene.node.ip4, LOCAL_PORT),
    ]
    with ExitStack() as stack:
        stack.enter_context(running(scene, old))
        serves(scene, old)
        sessions = [
            stack.enter_context(TcpSession(place, address, port))
            for place, address, port in (
                *((scene.client, vip, 80) for vip in (*VIP.values(), LOCAL_VIP) for _ in range(4)),
                *((scene.outside, scene.node.ip4, port) for port in (NODE_PORT, LOCAL_PORT)),
                *((scene.node, scene.node.ip4, port) for port in (NODE_PORT, LOCAL_PORT)),
            )
        ]  # fmt: skip
        inside = stack.enter_context(Load(scene.client, [("tcp", vip, 80) for vip in (*VIP.values(), LOCAL_VIP)]))
        outside = stack.enter_context(Load(scene.outside, node_ports))

        def speak(word: str) -> None:
            for session in sessions:
                assert session.ask(word).endswith(word)

        speak("before")
        if not runs:
            old.terminate()
            old.wait(grace=20)
        stack.enter_context(running(scene, new, cleanup=False))
        if runs:
            said = "waiting for kube-proxy to end before its rules are removed"
            eventually(lambda: said in new.log.read_text(), within=40, what="vcproxy waits")
            assert ("it_listens_on=" if by else f"pid={old.pid}") in new.log.read_text()
            assert "table inet vcproxy" in scene.tables()
            assert scene.leftovers().rules
            assert old.running, "a kube-proxy is not ours to end"
            speak("both")
            old.signal(signal.SIGTERM)
            old.wait(grace=20)
        eventually(lambda: "took over from kube-proxy" in new.log.read_text(), within=40, what="taking over")
        assert scene.leftovers() == Leftovers()
        speak("after")
        # What kube-proxy held is served by vcproxy now, its ports for probes too.
        eventually(lambda: _serves_http(scene), within=20, what="health and metrics")
        for load in (inside, outside):
            result = load.finish()
            assert not result.failures, result.first_failures
            assert result.count > 100
        speak("in the end")
        serves(scene, new)


def _serves_http(scene: Scene) -> bool:
    try:
        return scene.get("/proxyMode")[2] == "nftables" and scene.get("/healthz", 10256)[0] == 200
    except ConnectionError:
        return False


def test_leftovers_are_named_and_stay_without_the_flag(scene: Scene, control_plane_binaries: Path) -> None:
    config = scene.config("left", mode="nftables", conntrack=UNTOUCHED)
    arguments = (f"--config={config}", "--hostname-override=n1")
    old = scene.process("kube-proxy-left", str(control_plane_binaries / "kube-proxy"), *arguments)
    with running(scene, old):
        serves(scene, old)
        old.terminate()
        old.wait(grace=20)
        new = scene.vcproxy("left", *arguments)
        with running(scene, new, cleanup=False):
            eventually(lambda: "table inet vcproxy" in scene.tables(), within=30, what="vcproxy's table")
            log = new.log.read_text()
            for table in ("ip kube-proxy", "ip6 kube-proxy"):
                assert f"found='nftables table {table}'" in log
                assert f"table {table}" in scene.tables()
            assert "--take-over removes it" in log


# --- privileges, addresses, loopback ----------------------------------------------------------------------------------


def test_after_init_only_cap_net_admin_is_enough(scene: Scene) -> None:
    config = scene.config("init")
    arguments = (f"--config={config}", "--hostname-override=n1")
    initialised = scene.vcproxy("init", *arguments, "--init-only")
    initialised.start()
    eventually(lambda: not initialised.running, within=30, what="--init-only ends")
    assert "initialised; run again" in initialised.log_tail()
    weak = scene.vcproxy("weak", *arguments, by=("setpriv", "--bounding-set=-all,+net_admin", "--inh-caps=-all", "--"))
    with running(scene, weak):
        serves(scene, weak)
        status = Path(f"/proc/{weak.pid}/status").read_text()
        assert re.search(r"^CapEff:\s*0*1000$", status, re.MULTILINE), status


def test_node_ports_follow_the_nodes_addresses(scene: Scene) -> None:
    """kube-proxy ends when its Node's addresses change or its Node is deleted; vcproxy follows."""
    config = scene.config("address", conntrack=UNTOUCHED)
    process = scene.vcproxy("address", f"--config={config}", "--hostname-override=n1")
    other = "192.168.77.99"

    def reached(address: str) -> bool:
        return isinstance(tcp_request(scene.outside, address, NODE_PORT, timeout=0.3), Reply)

    with running(scene, process):
        serves(scene, process)
        iproute([f"address add {other}/32 dev eth0"], ns=scene.node.ns)
        try:
            assert not reached(other)
            scene.api.patch_status("Node", "n1", objects.node_status(other, scene.node.ip6))
            eventually(lambda: reached(other), within=20, what="the new address accepts NodePorts")
            eventually(lambda: not reached(scene.node.ip4), within=20, what="the old one does not")
            scene.api.delete("Node", "n1")
            eventually(lambda: "there is no Node object" in process.log.read_text(), within=20, what="the deletion")
            assert reached(other)
            assert scene.answers(VIP[4])
        finally:
            nodes.register(scene.api, scene.node)
            iproute([f"address delete {other}/32 dev eth0"], ns=scene.node.ns)
        eventually(lambda: reached(scene.node.ip4), within=20, what="the first address accepts NodePorts again")
        process.check()


def test_an_address_that_appears_later_accepts_node_ports(scene: Scene) -> None:
    config = scene.config("later", nodePortAddresses=["all"], conntrack=UNTOUCHED)
    process = scene.vcproxy("later", f"--config={config}", "--hostname-override=n1")
    other = "192.168.77.98"

    def reached() -> bool:
        return isinstance(tcp_request(scene.outside, other, NODE_PORT, timeout=0.3), Reply)

    with running(scene, process):
        serves(scene, process)
        assert not reached()
        iproute([f"address add {other}/32 dev eth0"], ns=scene.node.ns)
        try:
            eventually(reached, within=10, what="the new address accepts NodePorts")
        finally:
            iproute([f"address delete {other}/32 dev eth0"], ns=scene.node.ns)


READ_ONLY = 'mount --bind /proc/sys /proc/sys; mount -o remount,bind,ro /proc/sys; exec "$@"'


def test_a_read_only_proc_sys_matters_where_it_would_have_to_change(scene: Scene) -> None:
    by = ("unshare", "--mount", "sh", "-ec", READ_ONLY, "read-only")
    config = scene.config("changed", conntrack=UNTOUCHED | {"tcpCloseWaitTimeout": "1h1m1s"})
    arguments = (f"--config={config}", "--hostname-override=n1")
    refused = scene.vcproxy("refused", *arguments, by=by)
    with running(scene, refused):
        eventually(lambda: not refused.running, within=30, what="the end")
        said = refused.log_tail(1)
        assert "(of kube-proxy's flags --conntrack-tcp-timeout-close-wait): cannot set /proc/sys/net/" in said
        assert "Read-only file system" in said
        assert "--init-only" in said
    initialised = scene.vcproxy("allowed", *arguments, "--init-only")
    initialised.start()
    eventually(lambda: not initialised.running, within=30, what="--init-only ends")
    served = scene.vcproxy("served", *arguments, by=by)
    with running(scene, served):
        serves(scene, served)


def test_pods_are_local_by_the_nodes_pod_cidrs_as_they_are_now(scene: Scene) -> None:
    config = scene.config("nodecidr", detectLocalMode="NodeCIDR", clusterCIDR="", conntrack=UNTOUCHED)
    process = scene.vcproxy("nodecidr", f"--config={config}", "--hostname-override=n1")

    def seen() -> str:
        outcome = tcp_request(scene.client, VIP[4], 80)
        assert isinstance(outcome, Reply)
        return outcome.peer[0]

    def recreate(cidrs: list[str]) -> None:  # podCIDRs of a Node never change; the Node object may
        scene.api.delete("Node", "n1")
        scene.api.create(objects.node("n1", pod_cidrs=cidrs))
        scene.api.patch_status("Node", "n1", objects.node_status(scene.node.ip4, scene.node.ip6))

    with running(scene, process):
        serves(scene, process)
        assert seen() == scene.client.ip4
        try:
            recreate(["10.200.99.0/24"])
            eventually(lambda: seen() == scene.node.ip4, within=20, what="the client is no local pod any more")
        finally:
            recreate([scene.node.pod_cidr4, scene.node.pod_cidr6])
        eventually(lambda: seen() == scene.client.ip4, within=20, what="the client is local again")


NODE_PORT_ADDRESSES = (
    ["primary", "localhost"],
    ["localhost"],
    ["127.0.0.0/8", "192.168.77.0/24"],
    ["all"],
    ["primary"],
    ["192.0.2.0/24", "2001:db8::/64"],
    ["192.168.77.0/24"],
)


@pytest.mark.parametrize("accepted", NODE_PORT_ADDRESSES, ids=",".join)
def test_node_ports_are_where_kube_proxy_has_them(
    scene: Scene, accepted: list[str], control_plane_binaries: Path
) -> None:
    """The same file, the same packets: from the node to loopback, from outside to each address of the node."""
    gates = {"KubeProxyNFTablesLocalhostNodePorts": True}
    config = scene.config(
        "accepted", mode="nftables", conntrack=UNTOUCHED, nodePortAddresses=accepted, featureGates=gates
    )
    arguments = (f"--config={config}", "--hostname-override=n1")
    second = ("192.168.78.1", "fd78::1")
    dialled = [(scene.node, loopback) for loopback in ("127.0.0.1", "127.0.0.2", "::1")]
    dialled += [(scene.outside, address) for address in (scene.node.ip4, scene.node.ip6, *second)]
    iproute([f"address add {address} dev lo" for address in second], ns=scene.node.ns)
    iproute(
        [f"route add {second[0]} via {scene.node.ip4}", f"route add {second[1]} via {scene.node.ip6}"],
        ns=scene.outside.ns,
    )

    def look() -> dict[str, object]:
        seen: dict[str, object] = {}
        for place, address in dialled:
            for port in (NODE_PORT, LOCAL_PORT):
                outcomes = [tcp_request(place, address, port) for _ in range(16)]
                names = {one.pod if isinstance(one, Reply) else one for one in outcomes}
                seen[f"{address} port {port}"] = names
        return seen

    found = []
    try:
        for name, command in (("theirs", str(control_plane_binaries / "kube-proxy")), ("ours", "")):
            slug = f"{name}-accepted-{NODE_PORT_ADDRESSES.index(accepted)}"
            process = scene.process(slug, command, *arguments) if command else scene.vcproxy(slug, *arguments)
            with running(scene, process):
                serves(scene, process)
                if any(text in ("localhost", "127.0.0.0/8") for text in accepted):
                    eventually(
                        lambda: isinstance(tcp_request(scene.node, "127.0.0.1", NODE_PORT), Reply),
                        within=20,
                        what="a NodePort on loopback",
                    )
                found.append(look())
    finally:
        iproute([f"address delete {address} dev lo" for address in second], ns=scene.node.ns)
        iproute([f"route delete {address}" for address in second], ns=scene.outside.ns)
    assert found[1] == found[0]


def test_node_ports_on_loopback(scene: Scene) -> None:
    config = scene.config("loopback", nodePortAddresses=["primary", "localhost"], conntrack=UNTOUCHED)
    process = scene.vcproxy("loopback", f"--config={config}", "--hostname-override=n1")
    with running(scene, process):
        serves(scene, process)
        for address in ("127.0.0.1", "::1"):
            eventually(
                lambda address=address: isinstance(tcp_request(scene.node, address, NODE_PORT), Reply),
                within=20,
                what=f"a NodePort on {address}",
            )
            names = {tcp_request(scene.node, address, NODE_PORT).pod for _ in range(24)}  # type: ignore[union-attr]
            assert names == {"near", "far"}
        # As kube-proxy has it: with policy Local the endpoints of this node.
        assert {tcp_request(scene.node, "127.0.0.1", LOCAL_PORT).pod for _ in range(12)} == {"near"}  # type: ignore[union-attr]
        assert tcp_request(scene.node, "127.0.0.2", NODE_PORT) == Refused()
        # Nobody reaches it from elsewhere by a packet to 127.0.0.1: no sysctl was changed for this.
        with netns.entered(scene.node.ns):
            assert Path("/proc/sys/net/ipv4/conf/all/route_localnet").read_text().strip() == "0"
        scene.api.patch("Service", "web", {"spec": {"type": "ClusterIP", "ports": [objects.service_port(80, name="http", target=TARGET)]}}, "default")  # fmt: skip
        try:
            eventually(
                lambda: tcp_request(scene.node, "127.0.0.1", NODE_PORT) == Refused(),
                within=20,
                what="the port is closed",
            )
        finally:
            port = objects.service_port(80, name="http", target=TARGET, node_port=NODE_PORT)
            scene.api.patch("Service", "web", {"spec": {"type": "NodePort", "ports": [port]}}, "default")
