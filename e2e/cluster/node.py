"""A node: containerd, its network plugins and kubelet on a machine, as kubeadm would set them up.

Every container runs from a copy of one image store (`images.py`): hard links to its read-only layers, so that a node
begins with all images in a fraction of a second, and always with the same.
"""

import json
import shutil
import subprocess
from pathlib import Path

import yaml

from e2e.cluster.addresses import DNS_SERVICE, NodeAddresses
from e2e.cluster.machine import Machine
from e2e.polling import eventually

PAUSE_IMAGE = "registry.k8s.io/pause:3.10.2"
PLUGINS = "/usr/lib/cni"
SOCKET = "/run/containerd/containerd.sock"
_START_WITHIN = 60.0


def start_containerd(machine: Machine) -> None:
    """Start containerd on a machine; returns when it answers."""
    config = machine.directory / "containerd.toml"
    config.write_text(_CONTAINERD)
    machine.start("containerd", ["containerd", f"--config={config}"])

    def answers() -> bool:
        machine.check("containerd")
        return machine.run("ctr", "version", check=False).returncode == 0

    try:
        eventually(answers, within=_START_WITHIN, every=0.1)
    except TimeoutError:
        raise TimeoutError(f"containerd on {machine.name} does not answer; {machine.tail('containerd')}") from None


def import_image(machine: Machine, archive: Path) -> None:
    """Add an image to the store of a machine's containerd."""
    machine.run("ctr", "--namespace=k8s.io", "images", "import", str(archive), timeout=300.0)


class Node:
    """One node: a machine with containerd and kubelet, each started when it is asked for."""

    def __init__(self, addresses: NodeAddresses, machine: Machine) -> None:
        self.addresses = addresses
        self.machine = machine
        self.name = addresses.name

    def start_containerd(self) -> None:
        self._write_network_plugins()
        start_containerd(self.machine)

    def start_kubelet(self, kubelet: Path, kubeconfig: Path, client_ca: Path) -> None:
        """Start kubelet; the node registers itself and is ready soon after."""
        directory = self.machine.directory
        resolver = directory / "resolv.conf"
        resolver.write_text("nameserver 192.0.2.53\n")  # RFC 5737: there is no world outside
        config = directory / "kubelet.yaml"
        config.write_text(
            yaml.safe_dump(
                {
                    "apiVersion": "kubelet.config.k8s.io/v1beta1",
                    "kind": "KubeletConfiguration",
                    "authentication": {
                        "anonymous": {"enabled": False},
                        "webhook": {"enabled": True},
                        "x509": {"clientCAFile": str(client_ca)},
                    },
                    "authorization": {"mode": "Webhook"},
                    "containerRuntimeEndpoint": f"unix://{SOCKET}",
                    "clusterDNS": [DNS_SERVICE],
                    "clusterDomain": "cluster.local",
                    "resolvConf": str(resolver),
                    "cgroupDriver": "cgroupfs",
                    "failCgroupV1": False,
                    "enforceNodeAllocatable": [],
                    "failSwapOn": False,
                    "oomScoreAdj": 0,  # less is CAP_SYS_RESOURCE's, which a container that runs this may lack
                    "maxPods": 200,
                    "serializeImagePulls": False,
                    "syncFrequency": "10s",
                    # The disk is the host's: what others put there is no reason to evict or to delete images.
                    "evictionHard": {"memory.available": "100Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
                    "imageGCHighThresholdPercent": 100,
                    "imageGCLowThresholdPercent": 99,
                }
            )
        )
        self.machine.start(
            "kubelet",
            [
                str(kubelet),
                f"--config={config}",
                f"--kubeconfig={kubeconfig}",
                f"--hostname-override={self.name}",
                f"--node-ip={','.join(self.addresses.addresses)}",
                f"--node-labels=topology.kubernetes.io/zone={self.addresses.zone}",
            ],
        )

    def _write_network_plugins(self) -> None:
        ranges = [[{"subnet": cidr}] for cidr in self.addresses.pod_cidrs]
        plugins = [
            {
                "type": "ptp",
                "ipMasq": False,
                "mtu": 1500,
                "ipam": {
                    "type": "host-local",
                    "dataDir": "/run/cni",
                    "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
                    "ranges": ranges,
                },
            },
            {"type": "portmap", "capabilities": {"portMappings": True}},
        ]
        text = json.dumps({"cniVersion": "0.4.0", "name": "e2e", "plugins": plugins})
        self.machine.run("sh", "-ec", "mkdir -p /etc/cni/net.d; cat > /etc/cni/net.d/10-e2e.conflist", stdin=text)


def copy_store(store: Path, state: Path) -> None:
    """Give a machine, before it starts, a copy of an image store."""
    target = state / "var-lib-containerd"
    target.mkdir(parents=True)
    # Layers are never written to; what knows of them (bolt databases) is.
    subprocess.run(["cp", "--archive", "--link", f"{store}/.", str(target)], check=True)
    for database in target.rglob("*.db"):
        own = database.with_suffix(".own")
        shutil.copy2(database, own)
        own.rename(database)


def with_image(store: Path, archive: Path, cache: Path) -> Path:
    """A store with one image more, in `cache` (a folder of the caller's): imported once, not on every node."""
    copy_store(store, cache)
    with Machine("images", directory=cache / "log", state=cache) as machine:
        start_containerd(machine)
        import_image(machine, archive)
        machine.stop("containerd")
    return cache / "var-lib-containerd"


_CONTAINERD = f"""\
version = 2
root = "/var/lib/containerd"
state = "/run/containerd"
disabled_plugins = ["io.containerd.internal.v1.opt"]
[grpc]
  address = "{SOCKET}"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{PAUSE_IMAGE}"
  # What a container that runs all this may lack: CAP_SYS_RESOURCE, AppArmor.
  restrict_oom_score_adj = true
  disable_apparmor = true
  stream_server_address = "127.0.0.1"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{PLUGINS}"
    conf_dir = "/etc/cni/net.d"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        SystemdCgroup = false
"""
