"""`vcproxy run`: brain and node agent in one process, in kube-proxy's place on one node.

The two halves talk as they always do, over gRPC with mutual TLS, here on a unix socket and with certificates that live
as long as the process: one path through the code, whether they share a process or a continent.
"""

import asyncio
import ipaddress
import os
import socket
import tempfile
from pathlib import Path
from typing import Any

import click

from vcproxy.brain.config import BrainConfiguration, DirectorySource, Listen, SuperCluster, Tenants, TenantSource
from vcproxy.cli.daemons import run_daemon
from vcproxy.cli.main import Failure
from vcproxy.node.config import BrainAddress, DetectLocal, NodeConfiguration
from vcproxy.ops import logs, pki, stopping

BRAIN_NAME = "vcproxy-brain"


@click.command()
@click.option("--kubeconfig", type=click.Path(), help="Of the cluster that owns the node; default: in-cluster.")
@click.option("--no-super-cluster", is_flag=True, help="Proxy only the tenants of --tenants.")
@click.option(
    "--tenants", type=click.Path(file_okay=False), help="Folder with NAME.kubeconfig or NAME/*.yaml a tenant."
)
@click.option("--hostname-override", default="", help="Name of this node; default: the host name.")
@click.option("--cluster-cidr", default="", help="Pod ranges, comma-separated: their traffic is not masqueraded.")
@click.option(
    "--detect-local-mode",
    type=click.Choice(["ClusterCIDR", "NodeCIDR"]),
    default="ClusterCIDR",
    show_default=True,
    help="How local pods are told from other clients.",
)
@click.option("--nodeport-addresses", default="primary", show_default=True, help="CIDRs, comma-separated, or primary.")
@click.option("--masquerade-all", is_flag=True, help="Masquerade every connection to a ClusterIP.")
@click.option("--healthz-bind-address", default="0.0.0.0:10256", show_default=True, help="Empty: none.")
@click.option("--metrics-bind-address", default="127.0.0.1:10249", show_default=True, help="Empty: none.")
@click.option("--state-directory", default="/var/lib/vcproxy", show_default=True, type=click.Path(file_okay=False))
@click.option("--runtime-directory", default="/run/vcproxy", show_default=True, type=click.Path(file_okay=False))
@click.option("--log-format", type=click.Choice(["json", "text"]), default="json", show_default=True)
def run(**flags: Any) -> None:
    """Run brain and node agent in one process: the drop-in for kube-proxy on one node.

    \b
    Examples:
      vcproxy run --kubeconfig /var/lib/kube-proxy/kubeconfig.conf --cluster-cidr 10.244.0.0/16
      vcproxy run --no-super-cluster --tenants ./tenants
    """
    import uvloop

    logs.configure(fmt=flags["log_format"])
    if flags["no_super_cluster"] and not flags["tenants"]:
        raise Failure("--no-super-cluster leaves nothing to proxy: give --tenants DIRECTORY")
    runtime = Path(flags["runtime_directory"])
    try:
        runtime.mkdir(mode=0o755, parents=True, exist_ok=True)
    except OSError as error:
        raise Failure(f"--runtime-directory {runtime}: {error.strerror}") from error
    with tempfile.TemporaryDirectory(prefix="run-", dir=runtime) as directory:
        node = flags["hostname_override"] or socket.gethostname().lower()
        brain, agent = configurations(flags, node=node, directory=Path(directory))
        run_daemon(lambda: _both(brain, agent), loop=uvloop.new_event_loop)


def configurations(
    flags: dict[str, Any], *, node: str, directory: Path
) -> tuple[BrainConfiguration, NodeConfiguration]:
    """The configuration of both halves; writes the certificates that they share into `directory` (mode 0700)."""
    authority = pki.Authority("vcproxy run")
    os.umask(0o077)
    (directory / "ca.crt").write_bytes(authority.certificate)
    brain_cert, brain_key = authority.server([BRAIN_NAME]).write(directory, "brain")
    node_cert, node_key = authority.node(node).write(directory, "node")
    address = f"unix:{directory}/grpc"
    sources = (TenantSource(directory=DirectorySource(path=flags["tenants"])),) if flags["tenants"] else ()
    runtime = flags["runtime_directory"]
    brain = BrainConfiguration(
        listen=Listen(
            address=address,
            cert_file=str(brain_cert),
            key_file=str(brain_key),
            client_ca_file=str(directory / "ca.crt"),
        ),
        super_cluster=None
        if flags["no_super_cluster"]
        else SuperCluster(kubeconfig=flags["kubeconfig"], node=node, pods=bool(sources)),
        tenants=Tenants(sources=sources),
        admin_socket=f"{runtime}/brain.sock",
        metrics_address="",
        log_format=flags["log_format"],
    )
    agent = NodeConfiguration(
        node_name=node,
        brain=BrainAddress(
            addresses=(address,),
            server_name=BRAIN_NAME,
            cert_file=str(node_cert),
            key_file=str(node_key),
            ca_file=str(directory / "ca.crt"),
        ),
        detect_local=DetectLocal(mode=_detector(flags), cluster_cidrs=_cidrs("--cluster-cidr", flags["cluster_cidr"])),
        masquerade_all=flags["masquerade_all"],
        node_port_addresses=_cidrs("--nodeport-addresses", flags["nodeport_addresses"], words=("primary",)),
        state_directory=flags["state_directory"],
        admin_socket=f"{runtime}/node.sock",
        health_address=flags["healthz_bind_address"],
        metrics_address=flags["metrics_bind_address"],
        log_format=flags["log_format"],
    )
    return brain, agent


def _detector(flags: dict[str, Any]) -> str:
    """Without pod ranges kube-proxy's ClusterCIDR mode has no detector."""
    mode: str = flags["detect_local_mode"]
    return "None" if mode == "ClusterCIDR" and not flags["cluster_cidr"] else mode


def _cidrs(flag: str, text: str, words: tuple[str, ...] = ()) -> tuple[str, ...]:
    cidrs = tuple(part.strip() for part in text.split(",") if part.strip())
    for cidr in cidrs:
        if cidr not in words:
            try:
                ipaddress.ip_network(cidr, strict=False)
            except ValueError as error:
                raise Failure(f"{flag} {text}: {error}") from error
    return cidrs


async def _both(brain: BrainConfiguration, agent: NodeConfiguration) -> None:
    from vcproxy.brain.service import Brain
    from vcproxy.brain.supercluster import credentials_of
    from vcproxy.node.service import NodeAgent
    from vcproxy.ops.events import EventRecorder

    cluster = brain.super_cluster
    recorder = EventRecorder(lambda: credentials_of(cluster), host=agent.node_name) if cluster else None
    with stopping.signals() as stop:
        async with asyncio.TaskGroup() as group:
            group.create_task(Brain(brain).run(stop))
            group.create_task(NodeAgent(agent, events=recorder).run(stop))
