"""vcproxy as users deploy it: from the manifests of deploy/, in containers of the Dockerfile's image.

What is done to a manifest is what its EDIT marks ask for, and what this cluster has in another place than kubeadm puts it.
"""

import base64
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from e2e.cluster.addresses import API_SERVER, CONTROL, POD_CIDRS
from e2e.cluster.control import Control
from e2e.cluster.machine import MachineFailed
from e2e.cluster.node import Node
from vcproxy.ops.pki import Authority

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
IMAGE = "docker.io/library/vcproxy:e2e"
"""Not `latest`, which kubelet would pull."""
NAMESPACE = "vcproxy-system"
_READY_WITHIN = 100.0  # seconds


def run(control: Control) -> None:
    """deploy/run.yaml: one DaemonSet, nothing else."""
    text = (DEPLOY / "run.yaml").read_text()
    # A limit of the whole machine is the host's, which no container of a machine may change. Upstream's tests ask for
    # NodePorts on localhost.
    further = ("conntrack: {maxPerCore: 0, min: 0}", "nodePortAddresses: [primary, localhost]")
    ranges = "\n    ".join([f"clusterCIDR: {','.join(POD_CIDRS)}", *further])
    edits = {"https://192.0.2.1:6443": API_SERVER, "clusterCIDR: 10.244.0.0/16": ranges}
    _apply(control, _documents(text, edits))
    rolled_out(control, "kube-system", "daemonset/vcproxy-run")


def split(control: Control, nodes: list[Node], tenants: Mapping[str, bytes]) -> None:
    """deploy/brain.yaml and deploy/node.yaml: the brain on the first node, an agent on each.

    tenants: kubeconfigs by name.
    """
    first = nodes[0]
    control.kubectl("label", "node", first.name, "node-role.kubernetes.io/control-plane=")
    control.kubectl("create", "namespace", NAMESPACE)
    authority = Authority("vcproxy brain CA")
    pair = authority.server([f"vcproxy-brain.{NAMESPACE}.svc"])
    tenant_files = {f"{name}.kubeconfig": content for name, content in tenants.items()}
    _apply(
        control,
        [
            _secret("vcproxy-brain-tls", {"tls.crt": pair.certificate, "tls.key": pair.key}, kind="kubernetes.io/tls"),
            _secret("vcproxy-tenants", tenant_files),
            {
                "apiVersion": "v1",
                "kind": "ConfigMap",
                "metadata": {"name": "vcproxy-brain-ca", "namespace": NAMESPACE},
                "data": {"ca.crt": authority.certificate.decode()},
            },
        ],
    )
    brain = _documents((DEPLOY / "brain.yaml").read_text(), {})
    for document in brain:
        if document["kind"] == "Deployment":  # the API server is not on the brain's node, as kubeadm has it
            (container,) = document["spec"]["template"]["spec"]["containers"]
            container["env"] = [variable for variable in container["env"] if "valueFrom" not in variable]
            container["env"].append({"name": "KUBERNETES_SERVICE_HOST", "value": CONTROL[0]})
    _apply(control, brain)
    for node in nodes:
        kubelet = control.authority.client(f"system:node:{node.name}", ("system:nodes",))
        pem = (kubelet.certificate + kubelet.key).decode()
        script = "umask 077; mkdir -p /var/lib/kubelet/pki; cat > /var/lib/kubelet/pki/kubelet-client-current.pem"
        node.machine.run("sh", "-ec", script, stdin=pem)
    rolled_out(control, NAMESPACE, "deployment/vcproxy-brain")
    edits = {"192.0.2.10:7443": f"{first.addresses.addresses[0]}:7443"}
    _apply(control, _documents((DEPLOY / "node.yaml").read_text(), edits))
    rolled_out(control, NAMESPACE, "daemonset/vcproxy-node")


def rolled_out(control: Control, namespace: str, what: str) -> None:
    """Wait until all pods of a Deployment or DaemonSet are ready. Raises MachineFailed saying what its pods lack."""
    try:
        control.kubectl("-n", namespace, "rollout", "status", what, f"--timeout={_READY_WITHIN:g}s")
    except MachineFailed as error:
        name = what.partition("/")[2]
        seen = [
            control.kubectl("-n", namespace, *command)
            for command in (
                ("describe", "pods"),
                ("logs", f"--selector=app.kubernetes.io/name={name}", "--all-containers", "--prefix", "--tail=20"),
            )
        ]
        raise MachineFailed("\n".join([str(error), *seen])) from None


def _documents(text: str, edits: Mapping[str, str]) -> list[dict[str, Any]]:
    for old, new in {"image: vcproxy:latest": f"image: {IMAGE}", **edits}.items():
        if old not in text:
            raise ValueError(f"a manifest of deploy/ has no {old!r} any more")
        text = text.replace(old, new)
    return [document for document in yaml.safe_load_all(text) if document]


def _apply(control: Control, documents: Iterable[dict[str, Any]]) -> None:
    control.kubectl("apply", "-f", "-", stdin=yaml.safe_dump_all(documents))


def _secret(name: str, data: Mapping[str, bytes], *, kind: str = "Opaque") -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "type": kind,
        "metadata": {"name": name, "namespace": NAMESPACE},
        "data": {key: base64.b64encode(content).decode() for key, content in data.items()},
    }
